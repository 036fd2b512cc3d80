r"""A mesh network for the sphere: encode a grid to an icosahedral multi-mesh, process there, decode to the grid.

After GraphCast (Lam et al. 2023, Science 382, 1416-1421, doi:10.1126/science.adi2336), with the noise level in every layer norm as in
GenCast (Price et al. 2025, Nature 637, 84-90, doi:10.1038/s41586-024-08252-9). All maps are perceptrons with one hidden layer, SiLU and
layer norm:

    encode    m_j <- m_j + f(m_j, sum_i a_ij e(g_i, m_j, r_ij))         over the grid points i near node j
    process   e_ij <- e_ij + d_ij, m_j <- m_j + f(m_j, sum_i d_ij), d_ij = e(e_ij, m_i, m_j)    along all edges, a number of rounds
    decode    g_i <- g_i + f(g_i, mean_j e(m_j, g_i, r_ij))             over the three nodes around point i

It differs from GraphCast where memory and polar rows ask for it. The mean over the grid points of a node is weighted by the area of their
cells (GraphCast adds them up), so that the crowded points at a pole count as much as others. The second layer of the maps on edges between
grid and mesh stands behind that mean: it is linear, and there are fewer nodes than edges. Places are given by the sine of latitude too,
without which two hemispheres look alike. The first layer of a map on edges is applied to senders and receivers before they are gathered, so
that no array of edges is wider than the network.

Inside, arrays are (nodes, batch, width): the first axis is gathered and added to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from xgenda.errors import GridError, OptionError, check_count, check_flag
from xgenda.networks.icosahedron import LARGEST_REFINEMENT, GridMesh
from xgenda.networks.shared import FieldNetwork

FREQUENCIES = 16
EMBEDDING = 64  # numbers that say the noise level
PIECE = 2**16  # grid points that are encoded and decoded at once
MARGIN = 2.0  # longest edges of the finest mesh around a regional grid


class LabelledNorm(nn.Module):
    """Layer norm whose scale and shift depend on the noise level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.affine = nn.Linear(EMBEDDING, 2 * width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Return (nodes, batch, width), in the precision of `h`."""
        scale, shift = self.affine(embedding).chunk(2, -1)
        out: Tensor = torch.addcmul(shift, functional.layer_norm(h, (self.width,)), 1 + scale).to(h.dtype)
        return out


class NodeUpdate(nn.Module):
    """What nodes become when messages reach them: h + norm(MLP(h, message))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.message, self.second = (
            nn.Linear(width, width),
            nn.Linear(width, width, bias=False),
            nn.Linear(width, width),
        )
        self.norm = LabelledNorm(width)

    def forward(self, h: Tensor, message: Tensor, embedding: Tensor) -> Tensor:
        """Return (nodes, batch, width)."""
        change: Tensor = self.norm(self.second(functional.silu(self.own(h) + self.message(message))), embedding)
        return h + change


class Round(nn.Module):
    """One round of messages along all edges of the mesh."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.edge, self.sender, self.receiver, self.second = (nn.Linear(width, width, bias=k in (0, 3)) for k in range(4))
        self.norm, self.update = LabelledNorm(width), NodeUpdate(width)

    def forward(self, nodes: Tensor, edges: Tensor, ends: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Return nodes (m, batch, width) and edges (e, batch, width)."""
        hidden = self.edge(edges)
        hidden = hidden + self.sender(nodes).index_select(0, ends[0])
        hidden = hidden + self.receiver(nodes).index_select(0, ends[1])
        change = self.norm(self.second(functional.silu(hidden)), embedding)
        heard = torch.zeros_like(nodes).index_add(0, ends[1], change.to(nodes.dtype))
        return self.update(nodes, heard, embedding), edges + change


class MeshNet(FieldNetwork):
    """Mesh network F(x, noise label, condition).

    Parameters
    ----------
    channels
        Channels of the state (input and output).
    condition_channels
        Channels of the condition, concatenated to the input.
    latitude, longitude
        Of rows and columns in degrees, ascending; a global grid or a region.
    width
        Of all layers.
    refinement
        Of the finest mesh; its edges are about 63 degrees long, halved so many times.
    rounds
        Of messages on the mesh.
    position
        Number of learned static input channels on the grid, as in `UNet`.
    absolute
        Whether points and nodes know where they are. Without, and without `position`, a field that is turned by a third around the axis
        gives a result that is turned.
    checkpointing
        Whether training computes each round and each piece of the grid once more on the way back, instead of keeping it.
    one_at_a_time
        Whether samples of a batch follow one another, to save memory.

    Raises
    ------
    OptionError, GridError
        If an argument is not accepted.
    """

    needs_whole = True  # its graph is of one grid: it cannot be asked for parts
    frequencies: Tensor
    ends: Tensor
    edge_features: Tensor
    up: Tensor
    up_features: Tensor
    up_weights: Tensor
    down: Tensor
    down_features: Tensor
    points: Tensor
    nodes: Tensor

    last: nn.Linear

    def __init__(
        self,
        channels: int,
        condition_channels: int = 0,
        *,
        latitude: Sequence[float],
        longitude: Sequence[float],
        width: int = 32,
        refinement: int = 3,
        rounds: int = 4,
        position: int = 0,
        absolute: bool = True,
        checkpointing: bool = False,
        one_at_a_time: bool = False,
    ) -> None:
        super().__init__()
        for argument, count in (("channels", channels), ("width", width), ("rounds", rounds)):
            check_count(argument, count)
        for argument, count in (("condition_channels", condition_channels), ("position", position), ("refinement", refinement)):
            check_count(argument, count, 0)
        for argument, flag in (("absolute", absolute), ("checkpointing", checkpointing), ("one_at_a_time", one_at_a_time)):
            check_flag(argument, flag)
        if refinement > LARGEST_REFINEMENT:
            raise OptionError(
                f"refinement={refinement} is not accepted; it must be at most {LARGEST_REFINEMENT}, of {10 * 4**LARGEST_REFINEMENT + 2} nodes."
            )
        lat, lon = _ascending("latitude", latitude, 180.0), _ascending("longitude", longitude, 360.0)
        self.arguments: dict[str, Any] = {
            "channels": channels, "condition_channels": condition_channels, "latitude": lat.tolist(), "longitude": lon.tolist(), "width": width,
            "refinement": refinement, "rounds": rounds, "position": position, "absolute": absolute, "checkpointing": checkpointing,
            "one_at_a_time": one_at_a_time,
        }  # fmt: skip
        self.stride, self.shape = 1, (len(lat), len(lon))
        self.width, self.checkpointing, self.one_at_a_time = width, checkpointing, one_at_a_time
        self._tie(GridMesh.of(lat, lon, refinement, MARGIN), absolute)
        self.embed = nn.Sequential(nn.Linear(2 * FREQUENCIES, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU())
        self.position = nn.Parameter(0.1 * torch.randn(position, *self.shape)) if position else None
        places = 4 if absolute else 0
        # encoder
        self.first, self.first_second, self.first_norm = (
            nn.Linear(channels + condition_channels + position + places, width),
            nn.Linear(width, width),
            LabelledNorm(width),
        )
        self.node, self.node_second, self.node_norm = nn.Linear(4, width), nn.Linear(width, width), LabelledNorm(width)
        self.edge, self.edge_second, self.edge_norm = nn.Linear(4, width), nn.Linear(width, width), LabelledNorm(width)
        self.up_edge, self.up_sender, self.up_receiver = (
            nn.Linear(4, width),
            nn.Linear(width, width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.up_second, self.up_norm, self.up_update = nn.Linear(width, width), LabelledNorm(width), NodeUpdate(width)
        # processor
        self.rounds = nn.ModuleList(Round(width) for _ in range(rounds))
        # decoder
        self.down_edge, self.down_sender, self.down_receiver = (
            nn.Linear(4, width),
            nn.Linear(width, width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.down_second, self.down_norm, self.down_update = nn.Linear(width, width), LabelledNorm(width), NodeUpdate(width)
        self.out, self.last = nn.Linear(width, width), nn.Linear(width, channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def _tie(self, graph: GridMesh, absolute: bool) -> None:
        """Keep the graph in buffers that are not stored: the grid gives it again."""
        ny, nx = self.shape
        lat, lon = (np.asarray(self.arguments[k]) for k in ("latitude", "longitude"))
        points = np.stack([np.repeat(lat, nx), np.tile(lon, ny)], 1)
        kept: dict[str, Any] = {
            "frequencies": np.geomspace(0.5, 32.0, FREQUENCIES), "ends": graph.edges, "edge_features": graph.edge_features, "up": graph.up,
            "up_features": graph.up_features, "up_weights": graph.up_weights, "down": graph.down, "down_features": graph.down_features,
            "points": _places(points), "nodes": _places(graph.nodes) * float(absolute),
        }  # fmt: skip
        self.absolute = absolute
        for name, values in kept.items():
            kind = torch.int64 if values.dtype.kind == "i" else torch.float32
            self.register_buffer(name, torch.as_tensor(np.ascontiguousarray(values), dtype=kind), persistent=False)
        self.in_pieces(PIECE)

    def in_pieces(self, size: int) -> None:
        """Encode and decode so many grid points at once, to save memory."""
        points = math.prod(self.shape)
        self.pieces = [(a, min(a + size, points)) for a in range(0, points, size)]
        bounds = torch.searchsorted(self.up[0].cpu().contiguous(), torch.tensor([0, *(b for _, b in self.pieces)])).tolist()
        self.up_pieces = list(itertools.pairwise(bounds))

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """Return F, of the shape of `x` (batch, channels, ny, nx).

        Parameters
        ----------
        x
            State.
        label
            Of the noise, shape (batch,).
        condition
            Shape (batch, c, ny, nx).
        position
            Instead of the network's own positional channels, shape (batch or 1, P, ny, nx).
        """
        if tuple(x.shape[-2:]) != self.shape:
            raise GridError(
                f"This mesh network is of a grid of {self.shape[0]} x {self.shape[1]} cells, and got {x.shape[-2]} x {x.shape[-1]}. It sees the "
                f"whole grid, and cannot be asked for parts: leave out tile and chunks."
            )
        if self.position is not None and position is None:
            position = self.position[None]
        if not self.one_at_a_time or len(x) == 1:
            return self._all(x, label, condition, position)
        out = []
        for k in range(len(x)):
            given = None if condition is None else condition[k : k + 1]
            where = position if position is None or len(position) == 1 else position[k : k + 1]
            out.append(self._all(x[k : k + 1], label[k : k + 1], given, where))
        return torch.cat(out)

    def _all(self, x: Tensor, label: Tensor, condition: Tensor | None, position: Tensor | None) -> Tensor:
        """Return F of samples that go together."""
        angles = label[:, None] * self.frequencies
        embedding = self.embed(torch.cat([angles.cos(), angles.sin()], -1))
        batch = len(x)
        parts = [
            f.flatten(2)
            for f in (x, condition, None if position is None else position.expand(batch, -1, -1, -1))
            if f is not None
        ]

        nodes = self.node_norm(self.node_second(functional.silu(self.node(self.nodes)))[:, None], embedding).expand(-1, batch, -1)
        nodes = nodes.to(_exact(nodes))  # few, and added to in every round
        toward = self.up_receiver(nodes)
        heard = torch.zeros_like(nodes)
        points: list[Tensor] = []
        for (a, b), (c, d) in zip(self.pieces, self.up_pieces, strict=True):
            point, added = self._run(self._encode, [p[..., a:b] for p in parts], toward, embedding, a, c, d)
            points.append(point)
            heard = heard + added
        nodes = self.up_update(nodes, self.up_norm(self.up_second(heard), embedding), embedding)
        edges = self.edge_norm(self.edge_second(functional.silu(self.edge(self.edge_features)))[:, None], embedding).expand(
            -1, batch, -1
        )
        for step in self.rounds:
            nodes, edges = self._run(step, nodes, edges, self.ends, embedding)
        del edges
        away = self.down_sender(nodes)
        out = torch.empty((batch, self.last.out_features, self.shape[0] * self.shape[1]), dtype=away.dtype, device=x.device)
        found = []
        for k, (a, b) in enumerate(self.pieces):
            piece = self._run(self._decode, points[k], away, embedding, a, b)
            points[k] = nodes[:0]  # no longer needed
            if torch.is_grad_enabled():
                found.append(piece)
            else:
                out[..., a:b] = piece.permute(1, 2, 0)
        if found:
            out = torch.cat(found).permute(1, 2, 0)
        return out.reshape(batch, -1, *self.shape)

    def _encode(
        self, parts: list[Tensor], toward: Tensor, embedding: Tensor, start: int, c: int, d: int
    ) -> tuple[Tensor, Tensor]:
        """Return some points of the grid, and what nodes hear from them, of edges c to d."""
        given = torch.cat(parts, 1).permute(2, 0, 1)
        if self.absolute:
            places = self.points[start : start + len(given)]
            given = torch.cat([given, places[:, None].expand(-1, given.shape[1], -1)], -1)
        point = self.first_norm(self.first_second(functional.silu(self.first(given))), embedding)
        sender, receiver = self.up[0, c:d] - start, self.up[1, c:d]
        hidden = self.up_sender(point).index_select(0, sender) + toward.index_select(0, receiver)
        hidden = functional.silu(hidden + self.up_edge(self.up_features[c:d])[:, None]) * self.up_weights[c:d, None, None].to(
            hidden.dtype
        )
        kind = _exact(hidden)
        return point, torch.zeros(toward.shape, dtype=kind, device=hidden.device).index_add(0, receiver, hidden.to(kind))

    def _decode(self, point: Tensor, away: Tensor, embedding: Tensor, a: int, b: int) -> Tensor:
        """Return the output at points a to b, shape (points, batch, channels)."""
        own, edge = self.down_receiver(point), self.down_edge(self.down_features[a:b])
        total: Tensor | None = None
        for k in range(3):
            part = functional.silu(away.index_select(0, self.down[a:b, k]) + own + edge[:, k, None])
            total = part if total is None else total + part
        assert total is not None
        message = self.down_norm(self.down_second(total / 3), embedding)
        point = self.down_update(point, message, embedding)
        out: Tensor = self.last(functional.silu(self.out(point)))
        return out

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a part of the network; in training with checkpointing what it computes inside is not kept."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            # the exception that ends a recomputation early would hold what it computed until the next garbage collection
            with set_checkpoint_early_stop(False):
                return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)


def _exact(h: Tensor) -> torch.dtype:
    """Return the precision in which sums are taken: single, or that of `h` where it is higher."""
    return torch.promote_types(h.dtype, torch.float32)


def _places(where: np.ndarray) -> np.ndarray:
    """Return what says where places (n, 2) in degrees are."""
    phi, lam = np.radians(where).T
    return np.stack([np.sin(phi), np.cos(phi), np.sin(lam), np.cos(lam)], 1)


def _ascending(name: str, given: Any, span: float) -> np.ndarray:
    """Return coordinates, checked."""
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    reach = float(np.ptp(values)) if values.size else 0.0
    inside = name == "longitude" or (values.size and float(np.abs(values).max()) <= 90.0 + 1e-6)
    if (
        values.ndim != 1
        or not values.size
        or not np.isfinite(values).all()
        or (np.diff(values) <= 0).any()
        or reach > span
        or not inside
    ):
        raise GridError(
            f"{name} of a mesh network must be one ascending axis in degrees, within {span:g} degrees; such as numpy.linspace(-89, 89, 90). Of "
            f"curvilinear grids and of points there is none; use architecture='unet', or interpolate first: ds.genda.regrid(target)"
        )
    return values

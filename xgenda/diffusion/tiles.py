r"""Tiles of a domain that is too large for one network call, blended at every call.

A denoiser D = skip(x) + scale F(x) is linear in F, so a blend of F over tiles is the same blend of D. Each tile gets a window that falls
to zero over its overlaps, and the windows of all tiles add to one at every cell, so a field without noise is left as it is
(Bar-Tal et al. 2023, arXiv 2302.08113, with smooth windows instead of a plain mean).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from xgenda.errors import GridError, OptionError, check_count
from xgenda.formatting import user_level

LEAST = 4  # cells at the deepest level of a network


@dataclass(frozen=True, eq=False)
class Axis:
    """Tiles along one axis.

    Parameters
    ----------
    corners
        First cell of each tile; where the axis is padded it may lie outside.
    cells
        Cell of the domain that each cell of a tile reads, shape (tiles, tile).
    weights
        Window of each tile, shape (tiles, tile), zero on padding; at each cell of the domain the windows add to one.
    """

    corners: tuple[int, ...]
    cells: Tensor
    weights: Tensor

    @cached_property
    def segments(self) -> tuple[tuple[tuple[slice, slice], ...], ...]:
        """For each tile, the runs of cells that it writes: slices of the tile and of the domain."""
        out = []
        for cells, weights in zip(self.cells, self.weights, strict=True):
            inside = weights > 0
            breaks = (cells.diff() != 1) | (inside[1:] != inside[:-1])
            edges = [0, *(torch.nonzero(breaks).flatten() + 1).tolist(), len(cells)]
            runs = [(a, b) for a, b in itertools.pairwise(edges) if inside[a]]
            out.append(tuple((slice(a, b), slice(int(cells[a]), int(cells[a]) + b - a)) for a, b in runs))
        return tuple(out)


@dataclass(frozen=True)
class Tiling:
    """How a domain is cut into tiles of one shape.

    Tiles are laid evenly, all of them whole and inside of the domain, so that neighbours share at least `overlap` cells. A tile that is
    larger than the domain is as large as the domain.

    Parameters
    ----------
    shape
        Rows and columns of the domain.
    tile
        Rows and columns of a tile; multiples of the stride of the network are best, since anything else is padded.
    overlap
        Rows and columns that neighbours share at least.
    periodic
        Whether the last column is next to the first; tiles then wrap around.
    multiple
        Corners are multiples of this many cells, except that the last ones end with the domain. With the stride of the network its
        coarser levels have the same cells in every tile.
    margin
        Rows and columns at the inner edges of tiles that count for nothing, less than half of the overlap. With the reach of a network
        that is local, the blend is what the network gives for the whole domain.
    boundary
        Rows and columns, or None. If given, tiles lie as in the published multi-diffusion of CorrDiff: from ``-boundary`` on, every
        ``tile - overlap - boundary`` cells; what is outside of the domain is its reflection, and overlaps are plain means.

    Raises
    ------
    GridError
        If a tile does not advance by at least one (multiple) cell from its neighbour.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    overlap: tuple[int, int] = (0, 0)
    periodic: bool = False
    multiple: int = 1
    margin: tuple[int, int] = (0, 0)
    boundary: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, least in (("shape", 1), ("tile", 1), ("overlap", 0), ("margin", 0), ("boundary", 0)):
            found = getattr(self, name)
            if found is None:
                continue
            if isinstance(found, (str, int)) or len(found) != 2:
                raise OptionError(f"{name}={found!r} is not accepted; give rows and columns, for example {name}=(64, 64).")
            object.__setattr__(self, name, tuple(check_count(name, n, least) for n in found))
        check_count("multiple", self.multiple)
        if self.periodic and self.boundary is not None:
            raise OptionError("boundary= pads by reflection, which a periodic domain has no use for; leave one of the two out.")
        if any(self.margin) and (
            self.boundary is not None or any(m and 2 * m >= o for m, o in zip(self.margin, self.overlap, strict=True))
        ):
            raise OptionError(
                f"margin={self.margin} needs an overlap of more than twice as much, and no boundary=; found {self}."
            )
        if self.boundary is None:
            object.__setattr__(self, "tile", tuple(min(t, n) for t, n in zip(self.tile, self.shape, strict=True)))
        for axis, (n, tile, step) in enumerate(zip(self.shape, self.tile, self._steps, strict=True)):
            if step < 1 and (tile < n or self.boundary is not None):
                given = f"overlap={self.overlap}" + ("" if self.boundary is None else f" and boundary={self.boundary}")
                raise GridError(
                    f"tile={self.tile} with {given} and multiple={self.multiple} does not advance along its "
                    f"{('rows', 'columns')[axis]}; use a larger tile or a smaller overlap, at most half a tile."
                )

    @property
    def _steps(self) -> list[int]:
        edges = self.boundary or (0, 0)
        return [(t - o - b) // self.multiple for t, o, b in zip(self.tile, self.overlap, edges, strict=True)]

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        """Rows and columns."""
        return self._axis(0), self._axis(1)

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Number of the row and of the column of each tile, in the order in which they are blended."""
        rows, columns = (len(a.corners) for a in self.axes)
        return tuple((i, j) for i in range(rows) for j in range(columns))

    @property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """First row and column of each tile."""
        rows, columns = self.axes
        return tuple((rows.corners[i], columns.corners[j]) for i, j in self.places)

    @property
    def whole(self) -> bool:
        """Whether one tile is the domain."""
        return self.boundary is None and self.tile == self.shape

    def window(self, place: tuple[int, int]) -> Tensor:
        """Return the weights of a tile, shape (rows, columns), float64."""
        rows, columns = self.axes
        return rows.weights[place[0]][:, None] * columns.weights[place[1]]

    def cut(self, fields: Tensor, place: tuple[int, int]) -> Tensor:
        """Return a tile of fields (..., rows, columns)."""
        rows, columns = (a.cells[k].to(fields.device) for a, k in zip(self.axes, place, strict=True))
        return fields.index_select(-2, rows).index_select(-1, columns)

    def add(self, total: Tensor, found: Tensor, place: tuple[int, int]) -> None:
        """Add a tile (..., rows, columns) times its window to `total`, fields of the domain, in place."""
        rows, columns = (a.segments[k] for a, k in zip(self.axes, place, strict=True))
        weighted = self.window(place).to(total) * found
        for tile_rows, domain_rows in rows:
            for tile_columns, domain_columns in columns:
                total[..., domain_rows, domain_columns] += weighted[..., tile_rows, tile_columns]

    def _axis(self, k: int) -> Axis:
        n, tile, step, wraps = self.shape[k], self.tile[k], self._steps[k], self.periodic and k == 1
        if self.boundary is not None:
            step = tile - self.overlap[k] - self.boundary[k]
            corners = [i * step - self.boundary[k] for i in range(math.ceil(n / step))]
            position = torch.tensor(corners)[:, None] + torch.arange(tile)
            cells, raw = _reflected(position, n), ((position >= 0) & (position < n)).double()
        else:
            corners = _corners(n, tile, step, self.multiple, wraps)
            cells, raw = (
                (torch.tensor(corners)[:, None] + torch.arange(tile)) % n,
                _ramps(corners, n, tile, wraps, self.margin[k]),
            )
        total = torch.zeros(n, dtype=torch.float64).index_add_(0, cells.flatten(), raw.flatten())
        return Axis(tuple(corners), cells, raw / total[cells])


def _corners(n: int, tile: int, step: int, multiple: int, wraps: bool) -> list[int]:
    """Return evenly laid corners, at most `step` multiples apart."""
    if tile >= n:
        return [0]
    if wraps:
        units = math.ceil(n / multiple)
        count = math.ceil(units / step)
        return [multiple * (i * units // count) for i in range(count)]
    units = math.ceil((n - tile) / multiple)
    gaps = math.ceil(units / step)
    return [min(multiple * (i * units // gaps), n - tile) for i in range(gaps + 1)]


def _ramps(corners: Sequence[int], n: int, tile: int, wraps: bool, margin: int) -> Tensor:
    """Return windows that fall to zero as a raised cosine over what each tile shares with its neighbours."""
    cells = torch.arange(tile, dtype=torch.float64) + 0.5
    out = torch.ones(len(corners), tile, dtype=torch.float64)
    if len(corners) == 1:
        return out
    following = [*corners[1:], corners[0] + n] if wraps else corners[1:]
    for i, (here, there) in enumerate(zip(corners, following, strict=False)):
        shared = here + tile - there
        if shared > 0:
            ramp = torch.sin(math.pi / 2 * ((cells - margin) / (shared - 2 * margin)).clamp(0, 1)).square()
            out[(i + 1) % len(corners)] *= ramp
            out[i] *= ramp.flip(0)
    return out


def _reflected(position: Tensor, n: int) -> Tensor:
    """Return the cell that a position outside of the domain mirrors, without repeating the edge."""
    period = max(2 * (n - 1), 1)
    folded = position % period
    return torch.minimum(folded, period - folded) if n > 1 else torch.zeros_like(position)


def decorrelation_length(residual: Tensor, level: float = 0.05) -> tuple[float, float]:
    """Return the distances in cells, along rows and along columns, at which the correlation of residuals has gone.

    Parameters
    ----------
    residual
        What diffusion has to add to the mean, shape (n, channels, rows, columns), with a mean of zero.
    level
        Correlation that counts as none.

    Returns
    -------
    tuple of float
        Of the channel that is correlated farthest; the size of the axis where the correlation never falls below `level`.
    """
    return _length_along(residual, -2, level), _length_along(residual, -1, level)


def _length_along(residual: Tensor, axis: int, level: float) -> float:
    n, other = residual.shape[axis], -3 - axis
    products = torch.zeros(residual.shape[1], n, dtype=torch.float64)
    for fields in residual:  # one at a time: transforms are twice as long as the fields
        power = torch.fft.rfft(fields.double(), 2 * n, axis).abs().square().mean(other)
        products += torch.fft.irfft(power, 2 * n, -1)[..., :n]
    covariance = products / (n - torch.arange(n))
    correlation = covariance / covariance[:, :1].clamp(min=torch.finfo(torch.float64).tiny)
    longest = 0.0
    for line in correlation.tolist():
        k = next((k for k, c in enumerate(line) if c < level), None)
        if k is None:
            return float(n)
        # a channel of zeros has no correlation at all
        longest = max(longest, k - (level - line[k]) / (line[k - 1] - line[k]) if k else 0.0)
    return longest


def suggest_tile(
    residual: Tensor, stride: int = 8, largest: tuple[int, int] = (448, 448)
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Suggest a tile and an overlap from data: a tile of twice the decorrelation length, an overlap of half of it.

    A network that is trained on tiles has to see at least the decorrelation length (Mardani et al. 2023, arXiv 2309.15214). Larger tiles
    repeat less work, smaller ones take less memory: see `xgenda.diffusion.memory.plan_memory`.

    Parameters
    ----------
    residual
        As in `decorrelation_length`.
    stride
        Of the network; tiles and overlaps are multiples of it.
    largest
        Rows and columns that fit in memory; a domain that is no larger, and a multiple of the stride, is one tile.

    Returns
    -------
    tuple of tuple of int
        Tile and overlap, rows and columns.
    """
    tile, overlap = [], []
    for n, most, length in zip(residual.shape[-2:], largest, decorrelation_length(residual), strict=True):
        if n <= max(most, stride) and (n % stride == 0 or n < stride):
            tile.append(n)
            overlap.append(0)
            continue
        limit = max(min(most, n) // stride, 1)
        tile.append(stride * min(max(math.ceil(2 * length / stride), LEAST), limit))
        overlap.append(stride * min(math.ceil(length / 2 / stride), tile[-1] // stride // 2))
        if length > tile[-1]:
            warnings.warn(
                f"The residuals are correlated over {length:.0f} cells, and a tile has {tile[-1]}: what is farther apart than a tile is "
                f"related through the overlaps alone. Give a larger `largest`, or a condition that explains the large scales.",
                stacklevel=user_level(),
            )
    return (tile[0], tile[1]), (overlap[0], overlap[1])


class TiledNetwork(nn.Module):
    """A network on a domain of any size: called tile by tile, the results blended.

    The result does not depend on the order of tiles nor on the size of batches beyond rounding: sums are in float64 and in the order
    of `Tiling.places`.

    Parameters
    ----------
    network
        F(x, label, condition, position); the last two only where it has them. With `position_channels()`, what depends on the place
        is cut with everything else.
    tiling
        Of the domain.
    batch
        Tiles (of all samples) in one network call.
    whole_condition
        Channels of the condition that each tile gets in addition as a whole, resized to the size of a tile by bilinear interpolation,
        as the published patched networks do; True for all of them.

    Raises
    ------
    GridError
        If the network wraps around an axis that tiles cut; when called, if state or positions are those of another domain.
    """

    def __init__(self, network: nn.Module, tiling: Tiling, batch: int = 1, whole_condition: bool | slice = False) -> None:
        super().__init__()
        self.network, self.tiling, self.batch = network, tiling, check_count("batch", batch)
        self.whole_condition = slice(None) if whole_condition is True else whole_condition or None
        wraps = getattr(network, "periodic", False)
        cuts = [t < n for t, n in zip(tiling.tile, tiling.shape, strict=True)]
        if (wraps and cuts[1]) or (wraps == "both" and cuts[0]):
            whole = (tiling.shape[0] if wraps == "both" else tiling.tile[0], tiling.shape[1])
            raise GridError(f"The network is periodic, and tile={tiling.tile} cuts its domain {tiling.shape}; use tile={whole}.")

    def position_channels(self) -> Tensor | None:
        """Return what tells the network where it is, shape (P, rows, columns), or None."""
        get = getattr(self.network, "position_channels", None)
        return None if get is None else get()

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """Return F for x (batch, channels, rows, columns); `position`, if given, replaces the network's own, (1 or batch, P, rows, columns)."""
        tiling = self.tiling
        if tuple(x.shape[-2:]) != tiling.shape:
            raise GridError(f"The state has {tuple(x.shape[-2:])} cells, and the tiles are those of {tiling.shape}.")
        if position is None and (own := self.position_channels()) is not None:
            position = own[None]
        if position is not None:
            if tuple(position.shape[-2:]) != tiling.shape:
                raise GridError(
                    f"The network knows the places of {tuple(position.shape[-2:])} cells, and the domain has {tiling.shape}; "
                    f"give position=, shape (1, P, {tiling.shape[0]}, {tiling.shape[1]})."
                )
            position = position.expand(len(x), -1, -1, -1)
        whole = None
        if self.whole_condition is not None and condition is not None:
            whole = nn.functional.interpolate(condition[:, self.whole_condition], tiling.tile, mode="bilinear")
        total: Tensor | None = None
        pairs = [(place, row) for place in tiling.places for row in range(len(x))]
        for start in range(0, len(pairs), self.batch):
            chosen = pairs[start : start + self.batch]
            rows = [row for _, row in chosen]
            groups = _grouped(chosen)
            given = [self._cut(f, groups) for f in (x, condition, position)]
            if whole is not None:
                given[1] = torch.cat([g for g in (given[1], whole[rows]) if g is not None], 1)
            # networks without positions need not know the argument
            found = self.network(given[0], label[rows], given[1], *(given[2:] if position is not None else ()))
            if total is None:
                # Metal has no float64
                precision = torch.float32 if x.device.type == "mps" else torch.float64
                total = torch.zeros(len(x), found.shape[1], *tiling.shape, dtype=precision, device=x.device)
            done = 0
            for place, those in groups:
                count = those.stop - those.start
                tiling.add(total[those], found[done : done + count], place)
                done += count
        assert total is not None
        return total.to(x.dtype)

    def _cut(self, fields: Tensor | None, groups: Sequence[tuple[tuple[int, int], slice]]) -> Tensor | None:
        return None if fields is None else torch.cat([self.tiling.cut(fields[rows], place) for place, rows in groups])


def _grouped(pairs: Sequence[tuple[tuple[int, int], int]]) -> list[tuple[tuple[int, int], slice]]:
    """Return pairs of place and row, in their order, as runs of rows of one place, which are worked on together."""
    out = []
    for place, same in itertools.groupby(pairs, lambda pair: pair[0]):
        rows = [row for _, row in same]
        out.append((place, slice(rows[0], rows[-1] + 1)))
    return out

"""Fine-tuning: a network that starts from the weights of another one, with other variables, resolution or region.

Layers that do not depend on the variables are kept as they are. What does, the first and the last convolution, is kept channel by channel; new
channels start at zero, so that at the beginning they neither disturb nor say anything.

Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + B A with B (out, r) and A (r, in) for every convolution, of which only A and B are
trained; B starts at zero. They are added to the weights in the end.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from xgenda.errors import GridError, OptionError
from xgenda.grids import Grid
from xgenda.maps import bilinear_between
from xgenda.models.generative import GenerativeModel
from xgenda.models.spec import VariableSpec
from xgenda.networks.mesh import MeshNet
from xgenda.networks.unet import SPHERE, UNet
from xgenda.training.anchoring import ANCHORS

FREEZE = ("none", "backbone")


def matched(ours: Sequence[VariableSpec], theirs: Sequence[VariableSpec]) -> dict[str, str]:
    """Return the name that each of our variables has in another model: the same, or that of the only one of the same standard name."""
    names = {v.name for v in theirs}
    found = {v.name: v.name for v in ours if v.name in names}
    left, free = ([v for v in vs if v.name not in found] for vs in (ours, theirs))
    for v in left:
        alike, rivals = ([w for w in vs if w.standard_name == v.standard_name] for vs in (free, left))
        if v.standard_name and len(alike) == len(rivals) == 1:
            found[v.name] = alike[0].name
    return found


def continued_anchor(before: GenerativeModel, plain: bool, note: object, anchor: str | None, width: int | None) -> str | None:
    """Return which Gaussian goes with the network of another model.

    Parameters
    ----------
    plain
        Whether that network was trained without one.
    note
        What that model says of its Gaussian.
    anchor, width
        As asked for.

    Raises
    ------
    OptionError
        If something else was asked for.
    """
    if width is not None and width != before.spec.options["network"].get("width"):
        raise OptionError(f"width={width} has no effect with start, whose network is kept. Leave it out.")
    if (anchor is None and not plain) or (plain and anchor not in (None, "auto")):
        raise OptionError(
            f"anchor={anchor!r} does not go with start={before.spec.name!r}, whose network was trained "
            f"{'without' if plain else 'with'} one. Leave it out."
        )
    if plain or anchor != "auto":
        return None if plain else anchor
    kind = str(note).rpartition(": ")[2].split(",")[0]  # the network corrects a Gaussian of this kind
    return kind if kind in ANCHORS else "auto"


def kept_arguments(found: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network that is to have the layers of another one.

    Raises
    ------
    OptionError
        If the other one cannot be laid on the grid.
    """
    if before.get("architecture") == "songunet":
        inputs = found["in_channels"] - found["grid_channels"] + before.get("grid_channels", 0)
        return {**before, "in_channels": inputs, "out_channels": found["out_channels"], "shape": found["shape"]}
    if before.get("architecture") == "mesh":  # its layers know nothing of the grid, nor of how fine the mesh is
        return {**found, **{k: before[k] for k in ("width", "rounds", "position")}}
    out = {**found, **{k: before[k] for k in ("width", "multipliers", "position")}}
    (ny, nx), stride = out["shape"], 2 ** (len(out["multipliers"]) - 1)
    if out["periodic"] in SPHERE and (before["periodic"] not in SPHERE or nx % (2 * stride)):
        out["periodic"] = True  # what it learned beside the poles, and what it can
    wrapped = (ny, nx) if out["periodic"] == "both" else (nx,) if out["periodic"] else ()
    if any(n % stride for n in wrapped):
        raise OptionError(
            f"The network of start halves its grid {len(out['multipliers']) - 1} times, and {ny} x {nx} cells cannot be halved so often along the "
            f"periodic axis. Crop to multiples of {stride}, or leave out start."
        )
    return out


def transfer(
    network: nn.Module, before: nn.Module, inputs: tuple[Sequence[Hashable], Sequence[Hashable]],
    outputs: tuple[Sequence[Hashable], Sequence[Hashable]], position: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Give `network` the weights of `before`, and say what was kept.

    Parameters
    ----------
    inputs, outputs
        What each channel is, of `network` and of `before`; equal ones are kept.
    position
        Positional channels of the new grid, shape (P, ny, nx), where those of `before` can be had on it.

    Returns
    -------
    dict
        'tensors': how many were kept, in part or not at all; 'new_inputs' and 'new_outputs': channels that start at zero.
    """
    if isinstance(network, (UNet, MeshNet)) and type(network) is type(before):
        extra = [("position", k) for k in range(0 if network.position is None else len(network.position))]
        inside = ".conv"
        if isinstance(network, MeshNet):
            extra, inside = [*extra, *(("place", k) for k in range(4 if network.absolute else 0))], ""
        inputs = ([*inputs[0], *extra], [*inputs[1], *extra])
        parts = {
            f"first{inside}.weight": (None, inputs),
            f"last{inside}.weight": (outputs, None),
            f"last{inside}.bias": (outputs, None),
        }
    else:
        parts = {}
        if list(inputs[0]) != list(inputs[1]) or list(outputs[0]) != list(outputs[1]):
            raise OptionError(
                "start has other variables or inputs, and its network is a 'songunet', whose channels cannot be exchanged; use the same "
                "variables, or leave out start."
            )
    old, new = before.state_dict(), dict(network.state_dict())
    kept = partly = 0
    for name, tensor in new.items():
        if name == "position":
            tensor.copy_(torch.zeros_like(tensor) if position is None else position)
            kept, partly = kept + int(position is not None), partly
        elif name in parts:
            rows, columns = parts[name]
            filled = torch.zeros_like(tensor)
            a, b = _pairs(rows, len(tensor), len(old[name]))
            if tensor.ndim > 1:
                c, d = _pairs(columns, tensor.shape[1], old[name].shape[1])
                filled[a[:, None], c] = old[name][b[:, None], d]
            else:
                filled[a] = old[name][b]
            whole = len(a) == len(tensor) and (tensor.ndim == 1 or len(c) == tensor.shape[1])
            kept, partly = kept + int(whole), partly + int(not whole)
            tensor.copy_(filled)
        elif name in old and old[name].shape == tensor.shape:
            tensor.copy_(old[name])
            kept += 1
        else:
            raise OptionError(
                f"start has another network: its {name!r} is {tuple(old[name].shape) if name in old else 'not there'}, and "
                f"{tuple(tensor.shape)} is needed. Leave out start, or what changes the network."
            )
    network.load_state_dict(new)
    new_inputs = [str(k) for k in inputs[0] if k not in inputs[1]]
    new_outputs = [str(k) for k in outputs[0] if k not in outputs[1]]
    return {
        "tensors": f"{kept} of {len(new)} kept" + (f", {partly} in part" if partly else ""),
        "new_inputs": len(new_inputs), "new_outputs": len(new_outputs),
        "position": "none" if "position" not in new else "zero" if position is None else "kept",
    }  # fmt: skip


def _pairs(keys: tuple[Sequence[Hashable], Sequence[Hashable]] | None, ours: int, theirs: int) -> tuple[Tensor, Tensor]:
    """Return channels of the new tensor, and those of the old one that are the same."""
    if keys is None:
        both = torch.arange(min(ours, theirs))
        return both, both
    where = {k: i for i, k in enumerate(keys[1])}
    found = [(i, where[k]) for i, k in enumerate(keys[0]) if k in where]
    pairs = torch.tensor(found, dtype=torch.long).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def position_on(grid: Any, before: nn.Module, before_grid: Any) -> Tensor | None:
    """Return the positional channels of a network on another grid: interpolated where that lies within the old one, else None."""
    own = before.position if isinstance(before, (UNet, MeshNet)) else None
    if own is None:
        return None
    if grid.same_as(before_grid):
        return own.detach().clone()
    if not isinstance(grid, Grid) or not isinstance(before_grid, Grid):
        return None
    east = grid.longitude - 360.0 * np.round((grid.longitude.mean() - before_grid.longitude.mean()) / 360.0)
    inside = all(
        a.min() >= b.min() - 0.51 * step and a.max() <= b.max() + 0.51 * step
        for a, b in ((grid.latitude, before_grid.latitude), (east, before_grid.longitude))
        for step in (float(np.abs(np.diff(b)).max()),)
    )
    if not inside:
        return None
    try:
        map_ = bilinear_between(before_grid, grid)
    except GridError:
        return None
    values = map_(own.detach().flatten(1).numpy())
    return torch.as_tensor(np.asarray(values), dtype=torch.float32).reshape(len(own), *grid.plane)


def freeze_backbone(network: nn.Module) -> None:
    """Leave only what belongs to variables and places trainable: first and last convolution, and positional channels."""
    if not isinstance(network, (UNet, MeshNet)):
        raise OptionError("freeze='backbone' is for the architectures 'unet' and 'mesh'; use adapters=8 instead.")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in ("first", "last", "position"))


class LowRankUpdate(nn.Module):
    """W + B A for the weight of a convolution or a linear map."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        rank = min(rank, rows, columns)
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight."""
        return weight + (self.up @ self.down).reshape(weight.shape)


def add_adapters(network: nn.Module, rank: int, seed: int) -> None:
    """Freeze all weights but first and last convolution, biases and positional channels, and give the others low-rank updates."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    own = {name for name, _ in network.named_parameters() if name.split(".")[0] in ("first", "last", "position")}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in own or parameter.ndim == 1)
    for name, module in list(network.named_modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)) and f"{name}.weight" not in own:
            parametrize.register_parametrization(module, "weight", LowRankUpdate(module.weight, rank, generator))


def thawed(network: nn.Module) -> None:
    """Make a network plain again: updates are added to the weights, and everything is trainable."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    network.requires_grad_(True)

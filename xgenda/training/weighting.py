"""What counts how much in the loss: cells by their area, levels by their pressure, variables as they are told to.

The loss is a mean of squares over cells and channels. On a grid of equal angles around the sphere that counts a square kilometre at 89 degrees
of latitude 57 times as much as one at the equator; weighted by area, all count alike. Weights have the mean 1 over what is not masked, so that
losses can be compared.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xgenda.errors import OptionError
from xgenda.grids import Grid
from xgenda.models.variables import VariableSpec
from xgenda.states import parse_channel

WEIGHTS = ("auto", "none", "area", "pressure")
UNEQUAL = 2.0  # largest over smallest area of cells, above which 'auto' weighs them


def check_weights(weights: object) -> None:
    """Refuse what are no weights.

    Raises
    ------
    OptionError
        Saying what would be accepted.
    """
    if isinstance(weights, str) and weights in WEIGHTS:
        return
    given: Mapping[Any, Any] = weights if isinstance(weights, Mapping) else {}
    if not given or not all(isinstance(k, str) and _positive(w) for k, w in given.items()):
        raise OptionError(
            f"weights={weights!r} is not accepted; give 'auto', 'none', 'area' or 'pressure', or a positive weight for each variable, or level of "
            f"one, that counts more or less than others: weights={{'t2m': 1.0, 'u10': 0.1, 'z@50000Pa': 2.0}}"
        )


def _positive(found: object) -> bool:
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        return False
    return 0 < float(found) < math.inf


def loss_weights(
    weights: str | Mapping[str, float],
    variables: Sequence[VariableSpec],
    grid: Any,
    valid: np.ndarray | None = None,
    window: int = 1,
) -> Tensor | None:
    """Return the weights of the loss, float32 of the shape (window * channels, ny, nx) with a mean of 1; None where all are alike.

    Parameters
    ----------
    weights
        'none'; 'area': of cells; 'auto': 'area' on grids around the sphere whose cells differ by more than a factor of two, else 'none';
        'pressure': besides 'auto', channels on pressure levels in proportion to their pressure, with a mean of 1 over the levels of a variable
        (Lam et al. 2023); or numbers by the name of a variable or channel, besides 'auto'.
    variables
        Channels of one state.
    grid
        Theirs.
    valid
        Where they are not masked, shape (channels, ny, nx).
    window
        States that go together.

    Raises
    ------
    OptionError
        If there is nothing that `weights` could refer to.
    """
    areas = _areas(weights, grid)
    levels = _of_channels(weights, variables)
    if areas is None and (levels == levels[0]).all():
        return None
    plane = np.ones(grid.plane) if areas is None else areas
    out = levels[:, None, None] * plane
    out = out / (out.mean() if valid is None else out[np.broadcast_to(valid, out.shape)].mean())
    return torch.as_tensor(np.tile(out, (window, 1, 1)), dtype=torch.float32)


def _areas(weights: str | Mapping[str, float], grid: Any) -> np.ndarray | None:
    """Return areas of cells where they count, shape (ny, nx)."""
    if weights == "none":
        return None
    if not isinstance(grid, Grid):
        if weights == "area":
            raise OptionError("weights='area' needs a grid of latitudes and longitudes along one axis each; leave it out.")
        return None
    areas = grid.areas()
    unequal = areas.min() * UNEQUAL < areas.max()
    return areas if weights == "area" or (grid.periodic and unequal) else None


def _of_channels(weights: str | Mapping[str, float], variables: Sequence[VariableSpec]) -> np.ndarray:
    """Return the weight of each channel."""
    names = [v.name for v in variables]
    parsed = [parse_channel(n) for n in names]
    out = np.ones(len(names))
    if weights == "pressure":
        pressures: dict[str, list[float]] = {}
        for variable, level, kind in parsed:
            if kind == "pressure" and level is not None:
                pressures.setdefault(variable, []).append(level)
        if not pressures:
            raise OptionError(
                f"weights='pressure' needs variables on pressure levels, and ds has {names}; leave it out, or give numbers: "
                f"weights={{{names[0]!r}: 1.0}}"
            )
        for k, (variable, level, kind) in enumerate(parsed):
            if kind == "pressure" and level is not None:
                out[k] = level / np.mean(pressures[variable])
    elif isinstance(weights, Mapping):
        known = {*names, *(variable for variable, _, _ in parsed)}
        if stray := sorted(set(weights) - known):
            raise OptionError(f"weights has {stray}, and the variables are {sorted(known)}; name these.")
        for k, (variable, _, _) in enumerate(parsed):
            out[k] = weights.get(names[k], weights.get(variable, 1.0))
    return out

r"""The classical mean of a background model: how the truth is expected to differ from a forecast of it, chosen for each variable.

Candidates, from the simplest on; one is taken where it predicts withheld blocks of times better than those before it, by more than twice the
standard error of the gain over the blocks, so that a variable is not made worse than the forecast by chance:

- ``identity``: the forecast;
- ``bias``: less its mean error, of all cells together;
- ``regression``: and regressed on all variables in the same cell, with the same numbers everywhere, under a penalty;
- ``local bias``: less its mean error in each cell, under a penalty;
- ``local``: and regressed on all variables in each cell on its own, under a penalty;
- ``ridge``: regressed on all variables everywhere.

The last three only where places differ: not on a doubly periodic box.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from xgenda.models.means import LARGEST, LinearMean, Pairs, everywhere, fit_mean, too_large_for_ridge

PENALTIES = (3.0, 10.0, 30.0, 100.0)
SHARED_PENALTIES = (1e-6, 0.1, 0.5)  # times the number of values that are regressed on
SURE = 2.0  # standard errors of a gain
WORTH = 0.995  # what a candidate must leave less of than the simpler ones
Fit = Callable[[Pairs, Tensor], LinearMean]


def fit_centre(
    pairs: Pairs, homogeneous: bool = False, chosen: Sequence[str] | None = None
) -> tuple[LinearMean, Tensor, list[str], str]:
    """Return the mean that predicts withheld blocks best, its predictions by fits without the block of each pair, its kinds, and a note.

    Parameters
    ----------
    pairs
        Whose input k is the forecast of channel k, standardised as the truth is.
    homogeneous
        Whether all places are alike.
    chosen
        The kind of each channel, where that is known.
    """
    channels = pairs.shape[0]
    names = ["identity"] * channels
    final = _identity(pairs)
    slope, offset, up, down = final.slope, final.offset, None, None
    crossed = pairs.interpolated[:, :channels].double().clone()
    losses = _losses(crossed, pairs)
    assert slope is not None
    for name, fitted, predicted in _candidates(pairs, homogeneous, None if chosen is None else set(chosen)):
        loss = _losses(predicted, pairs)
        gain = losses - loss
        sure = gain.mean(0) > (1 - WORTH) * losses.mean(0) + SURE * gain.std(0) / len(gain) ** 0.5
        better = sure if chosen is None else torch.tensor([c == name for c in chosen])
        if not better.any():
            continue
        rows = better[:, None, None]
        assert fitted.slope is not None
        slope = torch.where(rows[:, None], fitted.slope, slope)
        if fitted.offset is not None or offset is not None:
            nothing = torch.zeros(pairs.shape, dtype=torch.float64)
            offset = torch.where(
                rows,
                nothing if fitted.offset is None else fitted.offset.expand(pairs.shape),
                nothing if offset is None else offset,
            )
        if fitted.up is not None:
            up, down = torch.where(rows[..., None], fitted.up, 0.0), fitted.down
        elif up is not None:
            up = torch.where(rows[..., None], 0.0, up)
        crossed = torch.where(rows, predicted, crossed)
        losses = torch.where(better, loss, losses)
        names = [name if b else n for n, b in zip(names, better.tolist(), strict=True)]
    if up is not None and not bool((up != 0).any()):
        up = down = None
    note = names[0] if len(set(names)) == 1 else ", ".join(names)
    return LinearMean(pairs.shape, slope, offset, up, down), crossed, names, note


def _losses(predicted: Tensor, pairs: Pairs) -> Tensor:
    """Return the mean squared error of each block and channel, shape (blocks, channels)."""
    squares = (predicted - pairs.fine).square().mean((2, 3))
    return torch.stack([squares[torch.as_tensor(pairs.fold == k)].mean(0) for k in range(int(pairs.fold.max()) + 1)])


def _identity(pairs: Pairs) -> LinearMean:
    channels, inputs = pairs.shape[0], pairs.interpolated.shape[1]
    return LinearMean(pairs.shape, torch.eye(channels, inputs, dtype=torch.float64)[..., None, None])


def _candidates(pairs: Pairs, homogeneous: bool, only: set[str] | None) -> Iterator[tuple[str, LinearMean, Tensor]]:
    """Yield candidates, of all channels, with their predictions of withheld blocks."""
    fits: dict[str, Fit] = {"bias": _bias}
    fits |= {f"regression, penalty {p:g}": functools.partial(_regression, penalty=p) for p in SHARED_PENALTIES}
    if not homogeneous:
        fits |= {f"local bias, penalty {p:g}": functools.partial(_local_bias, penalty=p) for p in PENALTIES}
        if int(np.prod(pairs.shape)) * pairs.interpolated.shape[1] <= LARGEST:
            fits |= {f"local regression, penalty {p:g}": functools.partial(_local, penalty=p) for p in PENALTIES}
    place = everywhere(pairs)
    for name, fit in fits.items():
        if only is not None and name not in only:
            continue
        crossed = torch.zeros_like(pairs.fine)
        for k in range(int(pairs.fold.max()) + 1):
            inside, test = pairs.split(k)
            crossed[test] = fit(pairs, inside).at(pairs.coarse[test], pairs.interpolated[test], place)
        yield name, fit(pairs, torch.ones(len(pairs.fold), dtype=torch.bool)), crossed
    if not homogeneous and (only is None or "ridge" in only) and not too_large_for_ridge(pairs):
        mean, crossed, _, _ = fit_mean(pairs, ("ridge",), always=True)
        yield "ridge", mean, crossed


def _departures(pairs: Pairs, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the forecasts of some times, and by how much the truth differs from them."""
    given = pairs.interpolated[rows].double()
    return given, pairs.fine[rows] - given[:, : pairs.shape[0]]


def _bias(pairs: Pairs, rows: Tensor) -> LinearMean:
    _, left = _departures(pairs, rows)
    return LinearMean(pairs.shape, _identity(pairs).slope, left.mean((0, 2, 3))[:, None, None].expand(pairs.shape))


def _regression(pairs: Pairs, rows: Tensor, penalty: float) -> LinearMean:
    given, left = _departures(pairs, rows)
    inner, right, size = _normal_equations(given, left)
    held = torch.full((len(inner),), penalty * size, dtype=torch.float64)
    held[0] = 0.0  # the bias has its own candidate
    found = torch.linalg.solve(inner + torch.diag(held), right)  # (1 + inputs, channels)
    slope = _identity(pairs).slope
    assert slope is not None
    return LinearMean(pairs.shape, slope + found[1:].T[..., None, None], found[0][:, None, None].expand(pairs.shape))


def _normal_equations(given: Tensor, left: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return X^T X and X^T Y of a regression on ones and all inputs, summed over times and cells, and how many these are."""
    ones = torch.ones_like(given[:, :1])
    x = torch.cat([ones, given], 1).permute(1, 0, 2, 3).flatten(1)
    return x @ x.T, x @ left.permute(1, 0, 2, 3).flatten(1).T, x.shape[1]


def _local_bias(pairs: Pairs, rows: Tensor, penalty: float) -> LinearMean:
    """Return the identity less a mean error of each cell; `penalty` is how many times of no error are added."""
    _, left = _departures(pairs, rows)
    return LinearMean(pairs.shape, _identity(pairs).slope, left.sum(0) / (len(left) + penalty))


def _local(pairs: Pairs, rows: Tensor, penalty: float) -> LinearMean:
    """Regress what the forecast leaves on ones and all variables, cell by cell, with a penalty on what differs from the identity."""
    channels, ny, nx = pairs.shape
    given, left = _departures(pairs, rows)
    inputs = given.shape[1]
    slope = torch.empty(channels, inputs, ny, nx, dtype=torch.float64)
    offset = torch.empty(channels, ny, nx, dtype=torch.float64)
    for j in range(ny):  # row by row: the normal equations of all cells at once would not fit for many inputs
        x = torch.cat([torch.ones_like(given[:, :1, j]), given[:, :, j]], 1).permute(2, 0, 1)  # cells, n, 1 + inputs
        inner = x.transpose(1, 2) @ x + penalty * torch.eye(1 + inputs, dtype=torch.float64)
        found = torch.linalg.solve(inner, x.transpose(1, 2) @ left[:, :, j].permute(2, 0, 1))  # cells, 1 + inputs, channels
        offset[:, j], slope[:, :, j] = found[:, 0].T, found[:, 1:].permute(2, 1, 0)
    start = _identity(pairs).slope
    assert start is not None
    return LinearMean(pairs.shape, start + slope, offset)

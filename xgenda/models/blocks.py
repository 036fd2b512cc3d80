"""Blocks of cells: their means, and fields that are made to have given ones."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from xgenda.grids import Grid
from xgenda.models.calibration import filter_matrix
from xgenda.scaling import Scaling

WEIGHTS = ("cells", "areas")


class Blocks:
    """Means over blocks of `factor` x `factor` cells of a grid, weighted by cells (plain means) or by their areas.

    Parameters
    ----------
    grid
        Fine grid; its shape is a multiple of `factor`.
    factor
        Cells along each side of a block.
    weights
        'cells' or 'areas'.
    wraps
        Whether both axes wrap around.
    """

    def __init__(self, grid: Grid, factor: int, weights: str = "cells", wraps: bool = False) -> None:
        self.factor, self.shape, self.wraps = factor, grid.coarsened(factor).shape, wraps
        fine = torch.as_tensor(grid.areas()) if weights == "areas" else torch.ones(grid.shape, dtype=torch.float64)
        self.weights = fine / self._spread(self._sums(fine))

    def on(self, place: tuple[np.ndarray, np.ndarray]) -> Blocks:
        """Return the same on a window of the grid, given by its rows and columns: whole blocks."""
        rows, columns = (torch.as_tensor(p) for p in place)
        out = copy.copy(self)
        out.weights = self.weights.index_select(0, rows).index_select(1, columns)
        out.shape = (len(rows) // self.factor, len(columns) // self.factor)
        out.wraps = self.wraps and out.shape == self.shape
        return out

    def mean(self, fields: Tensor) -> Tensor:
        """Return block means (..., rows / factor, columns / factor) of fields (..., rows, columns)."""
        return self._sums(fields * self.weights.to(fields))

    def _sums(self, fields: Tensor) -> Tensor:
        f = self.factor
        return fields.reshape(*fields.shape[:-2], self.shape[0], f, self.shape[1], f).sum((-3, -1))

    def _spread(self, coarse: Tensor) -> Tensor:
        return coarse.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)

    def added(self, fields: Tensor, means: Tensor) -> Tensor:
        """Return the fields with these block means, by adding a number to each block."""
        return fields + self._spread(means - self.mean(fields))

    def smooth(self, means: Tensor) -> Tensor:
        """Return smooth fields (..., rows, columns) with these block means: no edges between blocks, unlike one number for each block."""
        along = (self.weights[:, : self.factor].sum(1), self.weights[: self.factor].sum(0))
        rows, columns = (self._smooth_along(w).to(means) for w in along)
        return rows @ means @ columns.T

    def _smooth_along(self, weights: Tensor) -> Tensor:
        """Return the map of means of intervals, with these weights of the cells in each, to a smooth sequence: blurred steps, inverted."""
        n, count = len(weights), len(weights) // self.factor
        steps = torch.eye(count, dtype=torch.float64).repeat_interleave(self.factor, 0)
        blurred = filter_matrix(n, self.factor / 4, torch.float64, self.wraps) @ steps
        found: Tensor = blurred @ torch.linalg.inv((steps.T * weights) @ blurred)
        return found

    def scaled(self, fields: Tensor, means: Tensor, low: float) -> Tensor:
        """Return the fields with these block means, by scaling what is above `low` in each block.

        Values stay above `low`. A block that has none of it gets its mean everywhere.
        """
        above, wanted = fields - low, (means - low).clamp(min=0.0)
        found = self.mean(above)
        nothing = found <= 1e-9 * wanted
        ratio = torch.where(nothing, 0.0, wanted / torch.where(nothing, 1.0, found))
        return low + above * self._spread(ratio) + self._spread(torch.where(nothing, wanted, 0.0))

    def kept(self, fields: Tensor, means: Tensor, low: float, high: float) -> Tensor:
        """Return fields within bounds with these block means: shifted without bounds, else scaled from the bound."""
        if high == np.inf:
            return self.added(fields, means) if low == -np.inf else self.scaled(fields, means, low)
        if low == -np.inf:
            return -self.scaled(-fields, -means, -high)
        # what scaling takes beyond the upper bound goes to the rest of the block
        return -self.scaled(-self.scaled(fields, means, low).clamp(max=high), -means, -high)

    def conserve(self, fields: Tensor, means: Tensor, bounds: tuple[tuple[float, float], ...]) -> Tensor:
        """Return physical fields (..., channels, rows, columns) with these block means (..., channels, y, x), within their bounds."""
        parts = [self.kept(fields[..., c, :, :], means[..., c, :, :], low, high) for c, (low, high) in enumerate(bounds)]
        return torch.stack(parts, -3)

    def matrix(self) -> Tensor:
        """Return the means as a matrix, shape (blocks, cells)."""
        ny, nx = self.weights.shape
        block = torch.arange(self.shape[0] * self.shape[1]).reshape(self.shape)
        row = self._spread(block).reshape(-1)
        out = torch.zeros(len(block.reshape(-1)), ny * nx, dtype=torch.float64)
        out[row, torch.arange(ny * nx)] = self.weights.reshape(-1)
        return out


def find_blocks(coarse: np.ndarray, fine: np.ndarray, grid: Grid, factor: int, scaling: Scaling) -> str | None:
    """Return the weights with which coarse fields are the block means of fine ones, or None where they are not.

    Parameters
    ----------
    coarse, fine
        Physical fields, shapes (n, channels, y, x) and (n, channels, rows, columns).
    scaling
        Of the fine fields: a thousandth of a standard deviation is close enough.
    """
    if not scaling.is_affine:
        spread = fine.std((0, 2, 3))[:, None, None]
    else:
        spread = scaling.std
    unit = np.asarray(spread).mean((-2, -1))
    given = torch.as_tensor(coarse)
    for weights in WEIGHTS:
        difference = (Blocks(grid, factor, weights).mean(torch.as_tensor(fine)) - given).square().mean((0, 2, 3)).sqrt().numpy()
        if (difference <= 1e-3 * unit).all():
            return weights
    return None

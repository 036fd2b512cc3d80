"""Spread of an ensemble, corrected by scale: what it is short of, or has too much of, on withheld times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LIMITS = (0.5, 2.0)  # of a factor; what needs more is another model
ROUNDS = 4
REACH = 3.0  # standard deviations of a filter


@dataclass(frozen=True)
class Calibration:
    """Factors of the parts of deviations by scale: a smooth part, what a narrower filter adds to it, and what that leaves.

    Parameters
    ----------
    widths
        Standard deviations of the Gaussian filters in cells, widest first.
    factors
        Per channel, from the smooth part to the finest: one more than there are widths.
    """

    widths: tuple[float, ...]
    factors: tuple[tuple[float, ...], ...]

    @property
    def reach(self) -> int:
        """Cells from which a value depends on others."""
        return max((_radius(w) for w in self.widths), default=0)

    def __call__(self, residual: Tensor) -> Tensor:
        """Return deviations (..., channels, rows, columns) with their parts multiplied."""
        factors = torch.tensor(self.factors, dtype=residual.dtype)
        parts = bands(residual, self.widths)
        return sum((part * factors[:, b, None, None] for b, part in enumerate(parts)), torch.zeros_like(residual))


def bands(fields: Tensor, widths: tuple[float, ...]) -> list[Tensor]:
    """Return the parts of fields (..., rows, columns) by scale, smoothest first; they add up to the fields."""
    smooth = [smoothed(fields, w) for w in widths] + [fields]
    return [smooth[0], *(b - a for a, b in itertools.pairwise(smooth))]


def smoothed(fields: Tensor, width: float) -> Tensor:
    """Return fields under a Gaussian filter with a standard deviation of `width` cells, renormalised at the edges."""
    rows, columns = (filter_matrix(n, width, fields.dtype) for n in fields.shape[-2:])
    return rows @ fields @ columns.T


def filter_matrix(n: int, width: float, dtype: torch.dtype, wraps: bool = False) -> Tensor:
    """Return the filter along an axis as a matrix: a product of matrices is much faster than a convolution with so long a kernel."""
    apart = (torch.arange(n, dtype=dtype)[:, None] - torch.arange(n, dtype=dtype)).abs()
    apart = torch.minimum(apart, n - apart) if wraps else apart
    kernel = torch.exp(-0.5 * (apart / width) ** 2).masked_fill(apart > _radius(width), 0.0)
    return kernel / kernel.sum(1, keepdim=True)


def _radius(width: float) -> int:
    return math.ceil(REACH * width)


def fit_calibration(
    error: Tensor, members: Tensor, widths: tuple[float, ...], project: Callable[[Tensor], Tensor] | None = None
) -> Calibration:
    r"""Return the factors that make spread and error agree on withheld times, per channel and scale.

    With t what the mean leaves of the truth, r the deviations of M members from it, and a the factor, the error of the ensemble mean is to be
    the spread: E (t - a mean(r))^2 = a^2 (M + 1) / M E var(r), a quadratic equation for a.

    Parameters
    ----------
    error
        Truth minus mean, shape (n, channels, rows, columns).
    members
        Deviations from the mean, shape (n, M, channels, rows, columns).
    widths
        See `Calibration`.
    project
        What happens to multiplied deviations afterwards, such as the removal of their block means.
    """
    truth = bands(error, widths)
    factors = torch.ones(error.shape[1], len(widths) + 1, dtype=torch.float64)
    for _ in range(ROUNDS):  # the parts are not independent of each other: what one is multiplied by, its neighbours see
        multiplied = Calibration(widths, tuple(map(tuple, factors.tolist())))(members)
        found = bands(multiplied if project is None else project(multiplied), widths)
        for b, (t, r) in enumerate(zip(truth, found, strict=True)):
            factors[:, b] = (factors[:, b] * _factor(t, r)).clamp(*LIMITS)
    return Calibration(widths, tuple(map(tuple, factors.tolist())))


def _factor(truth: Tensor, members: Tensor) -> Tensor:
    """Return the factor of one part per channel."""
    count, mean, over = members.shape[1], members.mean(1), (0, 2, 3)
    variance = members.var(1).mean(over) * (count + 1) / count
    a, half, c = variance - mean.square().mean(over), (truth * mean).mean(over), truth.square().mean(over)
    root = (-half + (half**2 + a * c).clamp(min=0).sqrt()) / a
    return torch.where((a > 0) & root.isfinite(), root, 1.0)

r"""What a network is trained on. Every objective is a mean square, plain or weighted by place and channel, with a target of about unit variance.

Denoising (Karras et al. 2022, arXiv 2206.00364, eq. 8): with D = skip(x) + scale F, the weighted loss
E |D(x0 + sigma e) - x0|^2 / scale^2 is E |F - (x0 - skip(x)) / scale|^2.

The Gaussian that a sample is compared with is fitted without that sample's block of times (cross-fitting). In sample, its
residuals would be too small, and the network would learn a confidence that does not carry over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xgenda.diffusion.anchors import Anchor
from xgenda.diffusion.denoisers import precondition
from xgenda.diffusion.random_fields import TorusField
from xgenda.training.fields import Fields, InMemory

LEVELS = 48


@dataclass(frozen=True, eq=False)
class Batch:
    """Input, noise label, condition and target of a network, for a number of samples; of a part of the grid, its first row and column.

    `weight`, of the shape of one target, is what each of its values counts in the loss; None: all the same.
    """

    x: Tensor
    label: Tensor
    condition: Tensor | None
    target: Tensor
    corner: tuple[int, int] | None = None
    weight: Tensor | None = None

    def of(self, rows: Tensor) -> Batch:
        """Return some of the samples."""
        condition = None if self.condition is None else self.condition[rows]
        return Batch(self.x[rows], self.label[rows], condition, self.target[rows], self.corner, self.weight)


class Draws:
    """Random numbers of a batch, a function of seed and step alone; each of several processes draws those of all and keeps its own.

    Parameters
    ----------
    seed, step
        The key.
    size
        Samples of the whole batch.
    part
        (k, n) for the k-th of n equal parts of it.
    """

    def __init__(self, seed: int, step: int, size: int, part: tuple[int, int] = (0, 1)) -> None:
        state = np.random.SeedSequence([seed % 2**63, step]).generate_state(1)
        self.generator, self.size = torch.Generator().manual_seed(int(state[0])), size
        self.own = torch.arange(size).tensor_split(part[1])[part[0]]

    def integers(self, below: int) -> Tensor:
        """Return one whole number for each sample."""
        return torch.randint(below, (self.size,), generator=self.generator)[self.own]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers of this shape for each sample."""
        return torch.randn((self.size, *shape), generator=self.generator)[self.own]

    def corner(self, tile: tuple[int, int] | None, plane: Sequence[int]) -> tuple[int, int] | None:
        """Return first row and column of a random part of the grid, the same for all samples; None for the whole grid."""
        if tile is None:
            return None
        row, column = (int(torch.randint(n - t + 1, (1,), generator=self.generator)) for n, t in zip(plane, tile, strict=True))
        return row, column

    def shifts(self, step: int, plane: Sequence[int]) -> list[list[int]]:
        """Return rows and columns by which to shift each sample around the plane: multiples of `step`; of zero not at all."""
        return [(step * self.integers(n // step)).tolist() if step else [0] * len(self.own) for n in plane]


class Denoising:
    """Denoising of standardised states.

    Parameters
    ----------
    states
        Standardised, shape (n, channels, ny, nx), or fields that are read when asked for.
    fold
        Block of each state, shape (n,).
    anchors
        One per block, fitted without it; None for a plain EDM denoiser.
    sigma_min, sigma_max
        Levels are drawn log-uniformly between these, which is the range that samplers ask for.
    condition
        Shape (n, c, ny, nx) or None.
    feeds_state
        As in `xgenda.diffusion.denoisers.EDMDenoiser`.
    shifts
        Where a shifted field is as likely as the field, each state and its condition are shifted around the grid by random multiples of
        so many rows and columns; 0: not at all. One number for both.
    tile
        Rows and columns of the random part of the grid that a batch shows, for grids that are too large; None: the whole grid.
    weights
        Of the values of a state in the loss, shape (channels, ny, nx), with a mean of 1; None: all the same.
    noise
        Covariance of the noise, on the grid of the states; None for white noise. Where it is band-limited, so are the states that are learnt:
        what is never under noise would give away the answer.
    """

    def __init__(
        self,
        states: Tensor | Fields,
        fold: Tensor,
        anchors: Sequence[Anchor] | None,
        sigma_min: float,
        sigma_max: float,
        condition: Tensor | None = None,
        feeds_state: bool = False,
        shifts: int | tuple[int, int] = 0,
        tile: tuple[int, int] | None = None,
        weights: Tensor | None = None,
        noise: TorusField | None = None,
    ) -> None:
        self.weights, self.noise = weights, noise
        self.fields = InMemory(states) if isinstance(states, Tensor) else states
        self.fold, self.anchors, self.condition, self.tile = fold, anchors, condition, tile
        self.feeds_state, self.shifts = feeds_state, (shifts, shifts) if isinstance(shifts, int) else shifts
        self.levels = torch.logspace(math.log10(sigma_min), math.log10(sigma_max), LEVELS, dtype=torch.float64).tolist()

    def batch(self, rows: Tensor, states: Tensor, draws: Draws) -> Batch:
        """Add noise to some samples."""
        corner = draws.corner(self.tile, states.shape[-2:])
        clean = cut(states, corner, self.tile)
        condition = None if self.condition is None else cut(self.condition[rows], corner, self.tile)
        if any(self.shifts):
            cells = [draws.shifts(s, [n])[0] for s, n in zip(self.shifts, clean.shape[-2:], strict=True)]
            clean, condition = rolled(clean, cells), None if condition is None else rolled(condition, cells)
        level = draws.integers(len(self.levels))
        noise = draws.normal(clean.shape[1:])
        if self.noise is not None:
            noise, clean = self.noise.root(noise), self.noise.limited(clean)
        inputs, targets, labels, fed = [], [], [], []
        for i in range(len(rows)):
            sigma = self.levels[int(level[i])]
            anchor = None if self.anchors is None else self.anchors[int(self.fold[rows[i]])]
            skip, scale, inner, state = precondition(anchor, (clean[i] + sigma * noise[i])[None], sigma)
            inputs.append(inner[0])
            targets.append(((clean[i] - skip) / scale)[0])
            labels.append(math.log(sigma) / 4)
            if state is not None and self.feeds_state:
                fed.append(state[0])
        parts = [] if condition is None else [condition]
        parts += [torch.stack(fed)] if fed else []
        return Batch(
            torch.stack(inputs),
            torch.tensor(labels),
            torch.cat(parts, 1) if parts else None,
            torch.stack(targets),
            corner,
            None if self.weights is None else cut(self.weights, corner, self.tile),
        )


class Regression:
    """Regression of a target on a condition; the network's state input is zero. The other arguments are those of `Denoising`."""

    def __init__(
        self,
        condition: Tensor,
        target: Tensor,
        tile: tuple[int, int] | None = None,
        shifts: int = 0,
        weights: Tensor | None = None,
    ) -> None:
        self.fields, self.condition, self.tile, self.shifts, self.weights = InMemory(target), condition, tile, shifts, weights

    def batch(self, rows: Tensor, states: Tensor, draws: Draws) -> Batch:
        """Return some samples."""
        corner = draws.corner(self.tile, states.shape[-2:])
        target, condition = (cut(f, corner, self.tile) for f in (states, self.condition[rows]))
        if self.shifts:
            cells = draws.shifts(self.shifts, target.shape[-2:])
            target, condition = rolled(target, cells), rolled(condition, cells)
        weight = None if self.weights is None else cut(self.weights, corner, self.tile)
        return Batch(torch.zeros_like(target), torch.zeros(len(rows)), condition, target, corner, weight)


def rolled(fields: Tensor, cells: Sequence[Sequence[int]]) -> Tensor:
    """Return fields (n, channels, rows, columns), each shifted around the plane by its own rows and columns."""
    return torch.stack([f.roll((i, j), (-2, -1)) for f, i, j in zip(fields, *cells, strict=True)])


def cut(fields: Tensor, corner: tuple[int, int] | None, tile: tuple[int, int] | None) -> Tensor:
    """Return a part of the grid, where there is one."""
    if corner is None or tile is None:
        return fields
    return fields[..., corner[0] : corner[0] + tile[0], corner[1] : corner[1] + tile[1]]

r"""What a network is trained on. Every objective is a mean square, plain or weighted by place and channel, with a target of about unit variance.

Denoising (Karras et al. 2022, arXiv 2206.00364, eq. 8): with D = skip(x) + scale F, the weighted loss
E |D(x0 + sigma e) - x0|^2 / scale^2 is E |F - (x0 - skip(x)) / scale|^2.

The Gaussian that a sample is compared with is fitted without that sample's block of times (cross-fitting). In sample, its
residuals would be too small, and the network would learn a confidence that does not carry over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xgenda.diffusion.anchors import Anchor
from xgenda.diffusion.denoisers import precondition
from xgenda.diffusion.random_fields import TorusField
from xgenda.networks.uno import resample
from xgenda.training.draws import Draws, cut
from xgenda.training.fields import Fields, InMemory
from xgenda.training.resolutions import drawn, step_cost

__all__ = ["Batch", "Denoising", "Draws", "Regression", "cut", "rolled"]
LEVELS = 48


@dataclass(frozen=True, eq=False)
class Batch:
    """Input, noise label, condition and target of a network, for a number of samples; of a part of the grid, its first row and column.

    `weight`, of the shape of one target, is what each of its values counts in the loss; None: all the same. `norm` is a linear map of answers and
    targets before that; None: none.
    """

    x: Tensor
    label: Tensor
    condition: Tensor | None
    target: Tensor
    corner: tuple[int, int] | None = None
    weight: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None

    def of(self, rows: Tensor) -> Batch:
        """Return some of the samples."""
        condition = None if self.condition is None else self.condition[rows]
        return Batch(self.x[rows], self.label[rows], condition, self.target[rows], self.corner, self.weight, self.norm)


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
        Rows and columns of the random part of the grid that a batch shows, for grids that are too large; None: the whole grid. States may
        come as these parts already, where there are no anchors. Those with anchors are compared with the Gaussian of the whole grid: of its
        answer, too, the network sees the part.
    weights
        Of the values of a state in the loss, shape (channels, ny, nx), with a mean of 1; None: all the same.
    wraps
        Whether the last column is next to the first; parts may then go across.
    noise
        Covariance of the noise, on the grid of the states; None for white noise. Where it is band-limited, so are the states that are learnt:
        what is never under noise would give away the answer.
    whitens
        Whether the loss is that of the Cameron-Martin space of the noise: of K^-1/2 times the error.
    resolutions
        In ascending order; a step takes the batch on the grid of 1 / f as many rows and columns, see `xgenda.training.resolutions`. With noise, and
        without anchors, condition and tile.
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
        wraps: bool = False,
        noise: TorusField | None = None,
        resolutions: Sequence[int] = (1,),
        whitens: bool = False,
    ) -> None:
        self.whitens = whitens
        self.weights, self.wraps, self.resolutions, self.cost = weights, wraps, resolutions, step_cost(resolutions)
        self.fields = InMemory(states) if isinstance(states, Tensor) else states
        self.fold, self.anchors, self.condition, self.tile = fold, anchors, condition, tile
        self.feeds_state, self.shifts = feeds_state, (shifts, shifts) if isinstance(shifts, int) else shifts
        ny, nx = self.fields.shape[-2:]
        # on a coarse grid with nothing of the waves that it does not show: what `resample` makes of the noise of the fine one
        self.noises = {f: noise if f == 1 or noise is None else noise.on((ny // f, nx // f), folded=False) for f in resolutions}
        self.levels = torch.logspace(math.log10(sigma_min), math.log10(sigma_max), LEVELS, dtype=torch.float64).tolist()

    def batch(self, rows: Tensor, states: Tensor, draws: Draws, given: Tensor | None = None) -> Batch:
        """Add noise to some samples; `given` are their conditions where these were read with them."""
        corner = draws.corner(self.tile, self.fields.shape[-2:], self.wraps)
        clean, condition = states, self.condition[rows] if given is None and self.condition is not None else given
        if any(self.shifts):  # around the whole grid
            cells = [draws.shifts(s, [n])[0] for s, n in zip(self.shifts, clean.shape[-2:], strict=True)]
            clean, condition = rolled(clean, cells), None if condition is None else rolled(condition, cells)
        condition = None if condition is None else cut(condition, corner, self.tile)
        if self.anchors is None and clean.shape[-2:] == self.fields.shape[-2:]:
            clean = cut(clean, corner, self.tile)
        factor = 1 if len(self.resolutions) == 1 else drawn(self.resolutions, draws)
        colour = self.noises[factor]
        if factor > 1 and colour is not None:
            clean = resample(clean, colour.shape, limit=True)
        level = draws.integers(len(self.levels))
        noise = draws.normal(clean.shape[1:])
        if colour is not None:
            noise, clean = colour.root(noise), colour.limited(clean)
        part = None if self.anchors is None else corner  # what is left to cut
        inputs, targets, labels, fed = [], [], [], []
        for i in range(len(rows)):
            sigma = self.levels[int(level[i])]
            anchor = None if self.anchors is None else self.anchors[int(self.fold[rows[i]])]
            skip, scale, inner, state = precondition(anchor, (clean[i] + sigma * noise[i])[None], sigma)
            inputs.append(cut(inner[0], part, self.tile))
            targets.append(cut(((clean[i] - skip) / scale)[0], part, self.tile))
            labels.append(math.log(sigma) / 4)
            if state is not None and self.feeds_state:
                fed.append(cut(state[0], part, self.tile))
        parts = [] if condition is None else [condition]
        parts += [torch.stack(fed)] if fed else []
        return Batch(
            torch.stack(inputs),
            torch.tensor(labels),
            torch.cat(parts, 1) if parts else None,
            torch.stack(targets),
            corner,
            None if self.weights is None else cut(self.weights[..., ::factor, ::factor], corner, self.tile),
            colour.whitened if self.whitens and colour is not None else None,
        )


class Regression:
    """Regression of a target on a condition; the network's state input is zero. The other arguments are those of `Denoising`."""

    def __init__(
        self,
        condition: Tensor | None,
        target: Tensor | Fields,
        tile: tuple[int, int] | None = None,
        shifts: int = 0,
        weights: Tensor | None = None,
    ) -> None:
        self.fields = InMemory(target) if isinstance(target, Tensor) else target
        self.condition, self.tile, self.shifts, self.weights = condition, tile, shifts, weights

    def batch(self, rows: Tensor, states: Tensor, draws: Draws, given: Tensor | None = None) -> Batch:
        """Return some samples; `given` are their conditions where these were read with them."""
        corner = draws.corner(self.tile, states.shape[-2:])
        given = self.condition[rows] if given is None and self.condition is not None else given
        assert given is not None
        target, condition = (cut(f, corner, self.tile) for f in (states, given))
        if self.shifts:
            cells = draws.shifts(self.shifts, target.shape[-2:])
            target, condition = rolled(target, cells), rolled(condition, cells)
        weight = None if self.weights is None else cut(self.weights, corner, self.tile)
        return Batch(torch.zeros_like(target), torch.zeros(len(rows)), condition, target, corner, weight)


def rolled(fields: Tensor, cells: Sequence[Sequence[int]]) -> Tensor:
    """Return fields (n, channels, rows, columns), each shifted around the plane by its own rows and columns."""
    return torch.stack([f.roll((i, j), (-2, -1)) for f, i, j in zip(fields, *cells, strict=True)])

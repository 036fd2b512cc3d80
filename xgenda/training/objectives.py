r"""What a network is trained on. Every objective is a plain mean square with a target of about unit variance.

Denoising (Karras et al. 2022, arXiv 2206.00364, eq. 8): with D = skip(x) + scale F, the weighted loss
E |D(x0 + sigma e) - x0|^2 / scale^2 is E |F - (x0 - skip(x)) / scale|^2.

The Gaussian that a sample is compared with is fitted without that sample's block of times (cross-fitting). In sample, its
residuals would be too small, and the network would learn a confidence that does not carry over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xgenda.diffusion.covariances import LowRank
from xgenda.diffusion.denoisers import anchor_scales

LEVELS = 48


@dataclass(frozen=True, eq=False)
class Batch:
    """Input, noise label, condition and target of a network, for a number of samples."""

    x: Tensor
    label: Tensor
    condition: Tensor | None
    target: Tensor


class Denoising:
    """Denoising of standardised states.

    Parameters
    ----------
    states
        Shape (n, channels, ny, nx), standardised.
    fold
        Block of each state, shape (n,).
    anchors
        One per block, fitted without it; None for a plain EDM denoiser.
    sigma_min, sigma_max
        Levels are drawn log-uniformly between these, which is the range that samplers ask for.
    condition
        Shape (n, c, ny, nx) or None.
    """

    def __init__(
        self,
        states: Tensor,
        fold: Tensor,
        anchors: list[LowRank] | None,
        sigma_min: float,
        sigma_max: float,
        condition: Tensor | None = None,
    ) -> None:
        self.states, self.fold, self.anchors, self.condition = states, fold, anchors, condition
        self.levels = torch.logspace(math.log10(sigma_min), math.log10(sigma_max), LEVELS, dtype=torch.float64).tolist()

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Draw noise for some samples."""
        clean = self.states[rows]
        level = torch.randint(len(self.levels), (len(rows),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        inputs, targets, labels = [], [], []
        for i in range(len(rows)):
            sigma = self.levels[int(level[i])]
            x = clean[i] + sigma * noise[i]
            if self.anchors is None:
                total = math.sqrt(sigma**2 + 1)
                inputs.append(x / total)
                targets.append((clean[i] - x / total**2) * (total / sigma))
            else:
                given = self.anchors[int(self.fold[rows[i]])].given_noise(sigma)
                guess = given.shrink(x.reshape(1, -1)).reshape(x.shape)
                scale_in, scale_out = (s.to(x).reshape(x.shape) for s in anchor_scales(given))
                inputs.append((x - guess) / scale_in)
                targets.append((clean[i] - guess) / scale_out)
            labels.append(math.log(sigma) / 4)
        condition = None if self.condition is None else self.condition[rows]
        return Batch(torch.stack(inputs), torch.tensor(labels), condition, torch.stack(targets))


class Regression:
    """Regression of a target on a condition; the network's state input is zero."""

    def __init__(self, condition: Tensor, target: Tensor) -> None:
        self.condition, self.target = condition, target

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return some samples."""
        target = self.target[rows]
        return Batch(torch.zeros_like(target), torch.zeros(len(rows)), self.condition[rows], target)

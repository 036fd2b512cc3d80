r"""Denoisers D(x; sigma) ~ E[x0 | x = x0 + sigma e]: the one internal form of every diffusion prior.

States are standardised, shape (batch, channels, ny, nx); sigma is one number for the whole batch.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from xgenda.diffusion.covariances import Conditional, LowRank


class Denoiser(Protocol):
    """Anything that estimates the clean state from a noisy one."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the estimate, of the shape of `x`."""
        ...


class GaussianDenoiser:
    """The exact denoiser of N(mean, S): mean + S (S + sigma^2 I)^-1 (x - mean)."""

    def __init__(self, mean: Tensor, covariance: LowRank) -> None:
        self.mean, self.covariance = mean, covariance

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the posterior mean of the state."""
        flat = x.reshape(len(x), -1)
        mean = self.mean.to(x)
        return (mean + self.covariance.given_noise(sigma).shrink(flat - mean)).reshape(x.shape)


class EDMDenoiser(nn.Module):
    r"""EDM preconditioning of a network F (Karras et al. 2022, arXiv 2206.00364, eq. 7), with an optional Gaussian anchor.

    Without an anchor, with data of standard deviation s_d = 1:
    D = x / (sigma^2 + 1) + sigma / sqrt(sigma^2 + 1) F(x / sqrt(sigma^2 + 1), ln(sigma) / 4).

    That skip connection is the denoiser of white unit-variance data. With an anchor N(0, S) it becomes the denoiser of S, and the
    output of the network is scaled by the standard deviation that S leaves at this noise level, C = (S^-1 + sigma^-2 I)^-1:

        D = G + sqrt(diag C) F(z, ln(sigma) / 4),   G = S (S + sigma^2 I)^-1 x,   z = (x - G) / sqrt(sigma^2 - diag C).

    A network that returns zero leaves exactly the Gaussian, the training target has unit variance for Gaussian data, and the
    network sees what the Gaussian does not explain instead of the state itself, so that a state far from the training
    climate does not drive it out of its range.

    Parameters
    ----------
    network
        F(x, noise label, condition).
    anchor
        Covariance of the standardised state, or None.
    """

    def __init__(self, network: nn.Module, anchor: LowRank | None = None) -> None:
        super().__init__()
        self.network, self.anchor = network, anchor

    def forward(self, x: Tensor, sigma: float, condition: Tensor | None = None) -> Tensor:
        """Return the denoised state."""
        if self.anchor is None:
            total = math.sqrt(sigma**2 + 1)
            return x / total**2 + sigma / total * self._network(x / total, sigma, condition)
        given = self.anchor.given_noise(sigma)
        clean = given.shrink(x.reshape(len(x), -1)).reshape(x.shape)
        scale_in, scale_out = (s.to(x).reshape(x.shape[1:]) for s in anchor_scales(given))
        return clean + scale_out * self._network((x - clean) / scale_in, sigma, condition)

    def _network(self, x: Tensor, sigma: float, condition: Tensor | None) -> Tensor:
        """Call the network in its own precision; the state may have a higher one."""
        label = torch.full((len(x),), math.log(sigma) / 4, device=x.device)
        out: Tensor = self.network(x.float(), label, condition).to(x.dtype)
        return out


def anchor_scales(given: Conditional) -> tuple[Tensor, Tensor]:
    """Return the standard deviations of x - G and of x0 - G under the anchor, each shape (n,)."""
    left = (given.sigma**2 - given.variance).clamp(min=1e-12 * given.sigma**2)
    return left.sqrt(), given.variance.sqrt()

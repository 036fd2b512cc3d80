r"""Denoisers D(x; sigma) ~ E[x0 | x = x0 + sigma e]: the one internal form of every diffusion prior.

States are standardised, shape (batch, channels, ny, nx); sigma is one number for the whole batch, or without an anchor shape (batch,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from xgenda.diffusion.anchors import Anchor, Conditional
from xgenda.diffusion.schedules import VP, signal_of, time_of
from xgenda.errors import check_choice

STATE_BOUND = 4.0  # climatological standard deviations


class Denoiser(Protocol):
    """Anything that estimates the clean state from a noisy one."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the estimate, of the shape of `x`."""
        ...


class GaussianDenoiser:
    """The exact denoiser of N(mean, S): mean + S (S + sigma^2 I)^-1 (x - mean)."""

    def __init__(self, mean: Tensor, covariance: Anchor) -> None:
        self.mean, self.covariance = mean, covariance

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the posterior mean of the state."""
        flat = x.reshape(len(x), -1)
        mean = self.mean.to(x)
        return (mean + self.covariance.given_noise(sigma).shrink(flat - mean)).reshape(x.shape)


class NoisePredictor:
    r"""A denoiser from a network that predicts the noise of a variance-preserving process, eps(x_t, t) with x_t = mu_t x.

    D(x; sigma) = x - sigma eps(mu_t x, t), with t the time at which the process has this noise-to-signal ratio.

    Parameters
    ----------
    network
        eps(x_t, t), with t of shape (batch,).
    process
        'vp-cosine', 'vp-linear' or 'rectified'; see `xgenda.diffusion.schedules`. For 'rectified' the network predicts the velocity
        e - x0 of x_t = (1 - t) x0 + t e, and D = x_t - t v.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], process: str) -> None:
        check_choice("process", process, VP)
        self.network, self.process = network, process

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the denoised state."""
        ratio = torch.tensor(sigma, dtype=torch.float64)
        t, mu = float(time_of(self.process, ratio)), float(signal_of(self.process, ratio))
        found = self.network((mu * x).float(), torch.full((len(x),), t, device=x.device)).to(x.dtype)
        if self.process == "rectified":
            return mu * x - t * found  # x_t - t v
        return x - sigma * found


class EDMDenoiser(nn.Module):
    r"""EDM preconditioning of a network F (Karras et al. 2022, arXiv 2206.00364, eq. 7), with an optional Gaussian anchor.

    Without an anchor, with data of standard deviation s_d and t = sqrt(sigma^2 + s_d^2):
    D = (s_d / t)^2 x + sigma s_d / t F(x / t, ln(sigma) / 4).

    That skip connection is the denoiser of white data of this variance. With an anchor N(0, S) it becomes the denoiser of S, and the
    output of the network is scaled by the standard deviation that S leaves at this noise level, C = (S^-1 + sigma^-2 I)^-1:

        D = G + sqrt(diag C) F(z, ln(sigma) / 4),   G = S (S + sigma^2 I)^-1 x,   z = (x - G) / sqrt(sigma^2 - diag C).

    A network that returns zero leaves exactly the Gaussian, the training target has unit variance for Gaussian data, and the
    network sees what the Gaussian does not explain instead of the state itself, so that a state far from the training
    climate does not drive it out of its range. What is not Gaussian may depend on the state all the same (which of two regimes it is
    in), so with `feeds_state` the network also gets G, bounded by G / sqrt(1 + (G / 4)^2), as a condition.

    Parameters
    ----------
    network
        F(x, noise label, condition).
    anchor
        Covariance of the standardised state, or None.
    feeds_state
        Whether the network gets the bounded G.
    sigma_range
        Lowest and highest noise level of the training, if known.
    sigma_data
        s_d, where there is no anchor.
    scale_condition
        Whether the condition is divided by t too, as in the oldest published networks; without an anchor only.
    """

    def __init__(
        self,
        network: nn.Module,
        anchor: Anchor | None = None,
        feeds_state: bool = False,
        sigma_range: tuple[float, float] | None = None,
        sigma_data: float = 1.0,
        scale_condition: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.anchor, self.feeds_state, self.sigma_range = network, anchor, feeds_state, sigma_range
        self.sigma_data, self.scale_condition = sigma_data, scale_condition

    def forward(self, x: Tensor, sigma: Tensor | float, condition: Tensor | None = None, **where: Tensor | None) -> Tensor:
        """Return the denoised state; `where` goes to the network, as positions of tiles do."""
        skip, correction = self.parts(x, sigma, condition, **where)
        return skip + correction

    def parts(
        self, x: Tensor, sigma: Tensor | float, condition: Tensor | None = None, **where: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what the Gaussian (or the skip connection) says and what the network adds to it."""
        skip, scale, inner, state = precondition(self.anchor, x, sigma, self.sigma_data)
        if condition is not None and self.scale_condition:
            condition = condition / _total(condition, sigma, self.sigma_data)
        parts = [c.float() for c in (condition, state if self.feeds_state else None) if c is not None]
        # below its training the network is asked as at its lowest level: the Gaussian, or the skip, has the rest, which is exact there
        lowest = self.sigma_range[0] if self.sigma_range else 0.0
        if isinstance(sigma, Tensor):
            label = (sigma.to(x.device, torch.float32).clamp(min=lowest).log() / 4).expand(len(x))
        else:
            label = torch.full((len(x),), math.log(max(sigma, lowest)) / 4, device=x.device)
        # the network in its own precision; the state may have a higher one
        found: Tensor = self.network(inner.float(), label, torch.cat(parts, 1) if parts else None, **where).to(x.dtype)
        return skip, scale * found


def precondition(
    anchor: Anchor | None, x: Tensor, sigma: Tensor | float, sigma_data: float = 1.0
) -> tuple[Tensor, Tensor | float, Tensor, Tensor | None]:
    """Return skip, scale, input of the network, and the bounded state: D = skip + scale F(input, ..., state)."""
    if anchor is None:
        total = _total(x, sigma, sigma_data)
        return x * sigma_data**2 / total**2, _level(x, sigma) * sigma_data / total, x / total, None
    given = anchor.given_noise(float(sigma))
    clean = given.shrink(x.reshape(len(x), -1)).reshape(x.shape)
    scale_in, scale_out = (s.to(x).reshape(x.shape[1:]) for s in anchor_scales(given))
    return clean, scale_out, (x - clean) / scale_in, clean / (1 + (clean / STATE_BOUND) ** 2).sqrt()


def _level(x: Tensor, sigma: Tensor | float) -> Tensor | float:
    """Return noise levels that multiply a batch of states."""
    return sigma.to(x).reshape(-1, *[1] * (x.ndim - 1)) if isinstance(sigma, Tensor) else sigma


def _total(x: Tensor, sigma: Tensor | float, sigma_data: float) -> Tensor | float:
    """Return the standard deviation of noisy data."""
    level = _level(x, sigma)
    return (level**2 + sigma_data**2).sqrt() if isinstance(level, Tensor) else math.hypot(level, sigma_data)


def anchor_scales(given: Conditional) -> tuple[Tensor, Tensor]:
    """Return the standard deviations of x - G and of x0 - G under the anchor, each shape (n,)."""
    least = 1e-12 * given.sigma**2  # where the anchor has no variance at all, as on masked cells
    left = (given.sigma**2 - given.variance).clamp(min=least)
    return left.sqrt(), given.variance.clamp(min=least).sqrt()

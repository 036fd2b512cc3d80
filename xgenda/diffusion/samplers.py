r"""Samplers: from noise of standard deviation sigma_max to a state, along the probability-flow ODE.

    dx / dsigma = (x - D(x; sigma)) / sigma       (Karras et al. 2022, arXiv 2206.00364, eq. 1 with sigma(t) = t)

A sampler gets any denoiser, guided or not, and only ever asks it for the levels of the schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from xgenda.diffusion.denoisers import Denoiser
from xgenda.errors import OptionError, check_choice, check_count

SAMPLERS = ("heun", "ddim")


def karras_schedule(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """Return steps + 1 noise levels from `sigma_max` to `sigma_min` and then 0 (Karras et al. 2022, eq. 5)."""
    check_count("steps", steps, 2)
    if not 0 < sigma_min < sigma_max:
        raise OptionError(f"sigma_min={sigma_min} and sigma_max={sigma_max}: 0 < sigma_min < sigma_max is needed.")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return [*levels.tolist(), 0.0]


def network_calls(sampler: str, steps: int) -> int:
    """Return the number of denoiser evaluations of one sample."""
    return 2 * steps - 1 if sampler == "heun" else steps


def integrate(
    denoise: Denoiser,
    start: Tensor,
    levels: list[float],
    sampler: str = "heun",
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """Take `start`, noise at ``levels[0]``, to the last level.

    Parameters
    ----------
    denoise
        D(x; sigma).
    start
        Shape (batch, channels, ny, nx), standard deviation ``levels[0]``.
    levels
        Decreasing, the last is 0.
    sampler
        'heun' (second order, 2 n - 1 evaluations; Karras et al. 2022, algorithm 1) or 'ddim' (first order, n evaluations;
        Song et al. 2021, arXiv 2010.02502, eq. 13, which in these variables is Euler's method).
    progress
        Called after each step.
    """
    check_choice("sampler", sampler, SAMPLERS)
    x = start
    for sigma, following in itertools.pairwise(levels):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if sampler == "heun" and following > 0:
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
            ahead = x + (following - sigma) * slope
        x = ahead
        if progress is not None:
            progress()
    return x

r"""Noise levels to sample at, and the signal scale of the processes that other systems train in.

Every diffusion here is written in one form, x = x0 + sigma e. A process with x_t = mu_t x0 + sigma_t e is the same one at
sigma = sigma_t / mu_t for x = x_t / mu_t (Karras et al. 2022, arXiv 2206.00364, section 3), and a step of its exponential
integrator (DDIM) is an Euler step of ours. So a schedule is a list of sigma, uniform in the time of its process:

=========== ==================================================== ==========================================================
name        sigma(t), t from 1 to 0                              source
=========== ==================================================== ==========================================================
karras      (a^(1/7) + t (b^(1/7) - a^(1/7)))^7                  Karras et al. 2022, eq. 5
log         a^(1 - t) b^t                                        log-uniform
vp-cosine   sqrt(1 - mu^2 + eta^2) / mu,                         Rozet & Louppe 2023, arXiv 2306.10574, section 4
            mu = cos^2(t arccos(sqrt(eta))), eta = 1e-3
vp-linear   sqrt(exp(0.1 t + 9.95 t^2) - 1)                      Ho et al. 2020, arXiv 2006.11239; Song et al. 2021,
                                                                 arXiv 2011.13456, eq. 29
rectified   ((1 - t) a + t) / ((1 - t) + t / b)                  Liu et al. 2022, arXiv 2209.03003, between the two ends
=========== ==================================================== ==========================================================

a and b are the lowest and the highest level asked for; the two VP processes run over the part of their time that covers them.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from xgenda.errors import OptionError, check_choice, check_count
from xgenda.formatting import user_level

SCHEDULES = ("karras", "log", "vp-cosine", "vp-linear", "rectified")
VP = ("vp-cosine", "vp-linear", "rectified")
ETA = 1e-3  # of the cosine process
BETA = (0.1, 20.0)  # of the linear process


def noise_levels(schedule: str, steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """Return `steps` noise levels from `sigma_max` to `sigma_min`, and then 0.

    Parameters
    ----------
    schedule
        One of `SCHEDULES`.
    steps
        At least 2.
    sigma_min, sigma_max
        Ends, both included.
    rho
        Exponent of 'karras'.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_count("steps", steps, 2)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise OptionError(f"sigma_min={sigma_min} and sigma_max={sigma_max}: 0 < sigma_min < sigma_max is needed.")
    t = torch.linspace(1, 0, steps, dtype=torch.float64)
    if schedule == "karras":
        levels = (sigma_min ** (1 / rho) + t * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho
    elif schedule == "log":
        levels = sigma_min ** (1 - t) * sigma_max**t
    elif schedule == "rectified":
        levels = ((1 - t) * sigma_min + t) / ((1 - t) + t / sigma_max)
    else:
        ends = time_of(schedule, torch.tensor([sigma_min, sigma_max], dtype=torch.float64))
        levels = sigma_of(schedule, ends[0] + t * (ends[1] - ends[0]))
    levels[0], levels[-1] = sigma_max, sigma_min  # not a rounding above what was trained
    return [*levels.tolist(), 0.0]


def karras_schedule(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """Return the levels of Karras et al. (2022), eq. 5, and then 0."""
    return noise_levels("karras", steps, sigma_min, sigma_max, rho)


def sigma_of(process: str, t: Tensor) -> Tensor:
    """Return sigma_t / mu_t of a VP or rectified process at t in [0, 1]."""
    if process == "vp-cosine":
        mu = torch.cos(t * math.acos(math.sqrt(ETA))) ** 2
        return (1 + ETA**2 - mu**2).clamp(min=0).sqrt() / mu
    if process == "vp-linear":
        return torch.expm1(BETA[0] * t + 0.5 * (BETA[1] - BETA[0]) * t**2).sqrt()
    check_choice("process", process, VP)
    return t / (1 - t)


def time_of(process: str, sigma: Tensor) -> Tensor:
    """Return the time at which a process has this noise-to-signal ratio."""
    if process == "vp-cosine":
        mu = signal_of(process, sigma)
        return torch.arccos(mu.clamp(max=1).sqrt()) / math.acos(math.sqrt(ETA))
    if process == "vp-linear":
        slope = BETA[1] - BETA[0]
        return (torch.sqrt(BETA[0] ** 2 + 2 * slope * torch.log1p(sigma**2)) - BETA[0]) / slope
    check_choice("process", process, VP)
    return sigma / (1 + sigma)


def signal_of(process: str, sigma: Tensor) -> Tensor:
    """Return mu_t at a noise-to-signal ratio."""
    if process == "vp-cosine":
        return torch.sqrt((1 + ETA**2) / (1 + sigma**2))
    if process == "vp-linear":
        return 1 / torch.sqrt(1 + sigma**2)
    check_choice("process", process, VP)
    return 1 / (1 + sigma)


def check_levels(levels: list[float], trained: tuple[float, float]) -> None:
    """Warn where levels lie outside the range that a denoiser was trained on."""
    low, high = trained
    asked = [s for s in levels if s > 0]
    if min(asked) < low * (1 - 1e-6) or max(asked) > high * (1 + 1e-6):
        warnings.warn(
            f"The sampler asks for noise levels from {min(asked):.3g} to {max(asked):.3g}, and the model was trained from {low:.3g} to "
            f"{high:.3g}; outside of that its answer is an extrapolation.",
            stacklevel=user_level(),
        )

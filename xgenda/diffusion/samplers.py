r"""Samplers: from noise of standard deviation sigma_max to a state.

All of them take any denoiser, guided or not, the same list of levels, and one source of noise per member. With
the slope d(x; sigma) = (x - D(x; sigma)) / sigma the probability-flow ODE is dx / dsigma = d (Karras et al. 2022, arXiv
2206.00364, eq. 1, with sigma(t) = t).

=========== ================= ==========================================================================================
name        calls of n levels what it does
=========== ================= ==========================================================================================
heun        2 n - 1           second order; `churn` adds noise before each step (Karras et al. 2022, algorithm 2)
ddim        n                 Euler's method in sigma (Song et al. 2021, arXiv 2010.02502); `eta` in [0, 1] adds noise
ancestral   n                 DDPM (Ho et al. 2020, arXiv 2006.11239): ddim with eta = 1
dpm++       n                 DPM-Solver++(2M), second order, multistep (Lu et al. 2022, arXiv 2211.01095, algorithm 2)
adams       n                 Adams-Bashforth of `order` 3: the slopes' polynomial, integrated exactly
pc          n + (n - 1) C     ddim, then C = `corrections` Langevin steps at the new level, each with step `tau` over the
                              mean square of the member's own noise estimate (Rozet & Louppe 2023, arXiv 2306.10574,
                              algorithm 4; Song et al. 2021, arXiv 2011.13456). On white Gaussians that inflates the
                              variance by 1 + tau / 2; with `unbiased` the noise is scaled so that it does not
=========== ================= ==========================================================================================

With `resample` = r every step of any sampler is taken r times, with fresh noise put back in between (RePaint, Lugmayr et al. 2022,
arXiv 2201.09865, algorithm 1, with a jump of one level). With `jump` = j above 1 it is blocks of j steps, all but the first.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xgenda.diffusion.denoisers import Denoiser
from xgenda.diffusion.schedules import check_levels
from xgenda.errors import OptionError, StateError, check_choice, check_count, check_flag, check_option

SAMPLERS = ("heun", "ddim", "ancestral", "dpm++", "adams", "pc")
#: Options of each sampler with their defaults; `resample` and `jump` belong to all.
OPTIONS: Mapping[str, Mapping[str, float]] = {
    "heun": {"churn": 0.0, "churn_min": 0.0, "churn_max": math.inf, "churn_noise": 1.0},
    "ddim": {"eta": 0.0},
    "ancestral": {},
    "dpm++": {},
    "adams": {"order": 3},
    "pc": {"corrections": 1, "tau": 0.25, "unbiased": False},
}
DIVERGED = 1e3  # standard deviations, on the way
IMPLAUSIBLE = 50.0  # standard deviations of a state without noise
_WHOLE = ("order", "corrections", "resample", "jump")


class Noise(Protocol):
    """A source of independent standard normal numbers, one stream per sample."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return shape (samples, *shape)."""
        ...


def sampler_options(sampler: str, given: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return all options of a sampler, checked.

    Raises
    ------
    OptionError
        If the sampler or an option is not known, or a value is out of its range.
    """
    check_choice("sampler", sampler, SAMPLERS)
    known = {**OPTIONS[sampler], "resample": 1, "jump": 1}
    for name, value in (given or {}).items():
        where = f"sampler_options[{name!r}]"
        check_option("sampler_options", sampler, name, known)
        lowest = 0 if name == "corrections" else 1
        if name in _WHOLE:
            check_count(where, value, lowest)
        elif name == "unbiased":
            check_flag(where, value)
        elif isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) >= 0:
            raise OptionError(f"{where}={value!r} is not accepted; it must be a number that is not negative.")
        known[name] = value
    if known.get("eta", 0) > 1:
        raise OptionError(f"sampler_options['eta']={known['eta']} is not accepted; it must lie between 0 and 1.")
    if "tau" in known and known["tau"] == 0:
        raise OptionError("sampler_options['tau']=0 is not accepted; it must be positive, for example 0.25.")
    if known.get("unbiased") and known["tau"] >= 2:
        raise OptionError(
            f"sampler_options['tau']={known['tau']} is not accepted with 'unbiased'; it must be below 2, for example 0.25."
        )
    return known


def network_calls(sampler: str, steps: int, options: Mapping[str, Any] | None = None) -> int:
    """Return the number of denoiser evaluations of one sample."""
    known = sampler_options(sampler, options)
    each = {"heun": 2, "pc": 1 + int(known.get("corrections", 0))}.get(sampler, 1)  # of a step that does not end without noise
    total = 0
    for begin, end, times in resampled_blocks(steps, known):
        total += times * (each * (end - begin) - (each - 1) * (end == steps))
    return total


def resampled_blocks(steps: int, options: Mapping[str, float]) -> list[tuple[int, int, int]]:
    """Return first step, end and number of repetitions of each block of steps."""
    jump, times = int(options["jump"]), int(options["resample"])
    return [(k, min(k + jump, steps), 1 if jump > 1 and k == 0 else times) for k in range(0, steps, jump)]


def is_stochastic(sampler: str, options: Mapping[str, Any] | None = None) -> bool:
    """Tell whether the sampler draws noise beyond its start."""
    known = sampler_options(sampler, options)
    return (
        sampler == "ancestral"
        or known["resample"] > 1
        or any(known.get(k, 0) > 0 for k in ("churn", "eta"))
        or (sampler == "pc" and known["corrections"] > 0)
    )


def integrate(
    denoise: Denoiser,
    start: Tensor,
    levels: list[float],
    sampler: str = "heun",
    noise: Noise | None = None,
    progress: Callable[[], None] | None = None,
    **options: Any,
) -> Tensor:
    """Take `start`, noise at ``levels[0]``, to the last level.

    Parameters
    ----------
    denoise
        D(x; sigma). If it has a `sigma_range`, levels outside of it are warned of.
    start
        Shape (batch, ...), standard deviation ``levels[0]``. Its dtype is that of the solver's arithmetic: give float64 where members
        must not depend on the batch, whatever the precision of the network.
    levels
        Decreasing. The last is 0, or positive to stop there and go on with another sampler.
    sampler
        See the table of this module.
    noise
        One stream per sample, needed by the stochastic samplers.
    progress
        Called after each step.
    **options
        See `OPTIONS`.

    Raises
    ------
    OptionError
        If an option is not known, or a stochastic sampler has no noise.
    StateError
        If the state is no longer finite, naming step and level.
    """
    known = sampler_options(sampler, options)
    if noise is None and is_stochastic(sampler, options):
        raise OptionError(f"sampler={sampler!r} draws random numbers; pass noise=NoiseStream(keys) with one key per sample.")
    if (trained := getattr(denoise, "sigma_range", None)) is not None:
        check_levels(levels, trained)
    stepper = _STEPPERS[sampler](denoise, levels, _source(noise, start), known)
    x = start
    for begin, end, times in resampled_blocks(len(levels) - 1, known):
        for attempt in range(times):
            if attempt:
                stepper.memory = []  # earlier slopes belong to the path before its noise was put back
                x = x + math.sqrt(levels[begin] ** 2 - levels[end] ** 2) * stepper.noise()
            for i in range(begin, end):
                x = stepper.step(i, x, levels[i], levels[i + 1])
                _check_finite(x, i, levels[i], levels[i + 1])
                if progress is not None and attempt == times - 1:
                    progress()
    return x


def _check_finite(x: Tensor, step: int, sigma: float, following: float) -> None:
    # standardised states with noise sigma: anything this large is no state, even though it is a number
    limit = DIVERGED * (1 + sigma) if following else IMPLAUSIBLE
    bad = ~(x.abs() < limit).flatten(1).all(1)
    if bad.any():
        what = "has diverged" if torch.isfinite(x).all() else "is not finite"
        raise StateError(
            f"The state {what} after step {step} of the sampler (sigma = {sigma:.4g}), in {int(bad.sum())} of {len(x)} members of a "
            f"batch. Use more steps; in assimilation also guidance='anchor' where the model has a Gaussian, or larger observation errors."
        )


def _source(noise: Noise | None, like: Tensor) -> Callable[[], Tensor]:
    def draw() -> Tensor:
        assert noise is not None
        # single precision is drawn twice as fast, and is precise enough for a random number
        return noise.normal(*like.shape[1:]).to(device=like.device, dtype=like.dtype)

    return draw


class _Stepper:
    """One step from a level to the next; multistep methods remember earlier slopes."""

    def __init__(self, denoise: Denoiser, levels: list[float], noise: Callable[[], Tensor], options: Mapping[str, float]) -> None:
        self.denoise, self.levels, self.noise, self.options = denoise, levels, noise, options
        self.memory: list[tuple[float, Tensor]] = []

    def step(self, index: int, x: Tensor, sigma: float, following: float) -> Tensor:
        raise NotImplementedError


class _Heun(_Stepper):
    def step(self, index: int, x: Tensor, sigma: float, following: float) -> Tensor:
        churn = self.options["churn"]
        if churn > 0 and self.options["churn_min"] <= sigma <= self.options["churn_max"]:
            # sqrt(2) - 1 is Karras' bound; the highest level is ours, since the network was not trained above it
            raised = min(sigma * (1 + min(churn / (len(self.levels) - 1), math.sqrt(2) - 1)), self.levels[0])
            if raised > sigma:
                x = x + self.options["churn_noise"] * math.sqrt(raised**2 - sigma**2) * self.noise()
                sigma = raised
        slope = (x - self.denoise(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (ahead - self.denoise(ahead, following)) / following) / 2
            ahead = x + (following - sigma) * slope
        return ahead


class _Ddim(_Stepper):
    def step(self, index: int, x: Tensor, sigma: float, following: float) -> Tensor:
        eta = self.options.get("eta", 1.0)  # ancestral
        clean = self.denoise(x, sigma)
        fresh = eta * following * math.sqrt(1 - (following / sigma) ** 2)
        kept = math.sqrt(following**2 - fresh**2)
        out = clean + (kept / sigma) * (x - clean)
        return out + fresh * self.noise() if fresh > 0 else out


class _Dpm(_Stepper):
    def step(self, index: int, x: Tensor, sigma: float, following: float) -> Tensor:
        clean = self.denoise(x, sigma)
        if following == 0:
            return clean
        target, ratio = clean, following / sigma
        if self.memory:
            previous, earlier = self.memory[-1]
            r = math.log(previous / sigma) / math.log(sigma / following)
            target = clean + (clean - earlier) / (2 * r)
        self.memory = [(sigma, clean)]
        return ratio * x + (1 - ratio) * target


class _Adams(_Stepper):
    def step(self, index: int, x: Tensor, sigma: float, following: float) -> Tensor:
        slope = (x - self.denoise(x, sigma)) / sigma
        self.memory = [*self.memory, (sigma, slope)][-int(self.options["order"]) :]
        weights = adams_weights([s for s, _ in self.memory], following)
        return x + sum(w * d for w, (_, d) in zip(weights, self.memory, strict=True))


def adams_weights(levels: list[float], following: float) -> list[float]:
    """Return the integral from the last level to the next of each Lagrange polynomial on `levels`."""
    last = levels[-1]
    nodes = np.array(levels) - last  # shifted, so that nothing cancels
    out = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        polynomial = np.atleast_1d(np.poly(others)) / np.prod(node - others)
        out.append(float(np.polyval(np.polyint(polynomial), following - last)))
    return out


class _PredictorCorrector(_Stepper):
    def step(self, index: int, x: Tensor, sigma: float, following: float) -> Tensor:
        clean = self.denoise(x, sigma)
        x = clean + (following / sigma) * (x - clean)
        if following > 0:
            for _ in range(int(self.options["corrections"])):
                estimate = (x - self.denoise(x, following)) / following
                power = estimate.flatten(1).square().mean(1).clamp(min=1e-12)  # of each member on its own
                delta = (self.options["tau"] / power).reshape(-1, *[1] * (x.ndim - 1))
                # x (1 - tau) + noise keeps the variance of a white Gaussian if the noise has 1 - (1 - tau)^2 of it
                spread = delta * (2 - self.options["tau"] if self.options["unbiased"] else 2)
                x = x - following * (delta * estimate + spread.sqrt() * self.noise())
        return x


_STEPPERS: Mapping[str, type[_Stepper]] = {
    "heun": _Heun, "ddim": _Ddim, "ancestral": _Ddim, "dpm++": _Dpm, "adams": _Adams, "pc": _PredictorCorrector,
}  # fmt: skip

r"""`BackgroundModel`: the truth given a forecast of it, as a regression of the mean and a diffusion of the error.

After DiffDA (Huang et al. 2024, ICML, arXiv 2401.05932), with the mean of `CorrectiveModel` underneath:

    m = K b + s R(f, K b),     x = m + u r,     r ~ diffusion given (m, f),

with b the background (a forecast on the grid of the truth), f the background with statics, season, hour and lead time, K a linear map, R a
network, and u the standard deviation of the error of each variable; everything standardised. Published: K = 1, R = 0, and u the standard
deviation of the tendency over six hours.

Observations act as likelihood guidance of the conditional diffusion, x = m + u r being affine in what is sampled, so that errors and operators
are those of any other prior; or by replacement under a mask, guidance 'inpaint'.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from xgenda.diffusion.denoisers import Denoiser, EDMDenoiser
from xgenda.errors import OptionError, check_choice
from xgenda.models.conditioning import (
    BATCH,
    STEPS,
    Conditioning,
    nothing_observed,
    physical_moments,
    places_of,
    plan_guided,
    without_logarithms,
)
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.generative import STAGES, Request, SamplingOptions
from xgenda.models.means import LinearMean
from xgenda.models.parts import Part
from xgenda.models.spec import ModelSpec


class BackgroundModel(CorrectiveModel):
    """The truth given a forecast on its grid.

    Parameters
    ----------
    spec, mean, regression, spread, denoiser, statics
        As of `CorrectiveModel`, with inputs that are the variables of the state on its grid; 'unit' of ``spec.options`` is a list, one
        standard deviation per channel. 'lag' (seconds) of ``spec.options``: where the background is the state so long before.
    """

    def __init__(
        self, spec: ModelSpec, mean: LinearMean, regression: nn.Module | None, spread: Tensor, denoiser: EDMDenoiser,
        statics: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(spec, mean, regression, spread, denoiser, statics)
        if self.blocks is not None or self.calibration is not None or not self.spec.needs_background:
            raise OptionError("A background model has neither block means to keep nor a calibration, and needs a background.")
        self.denoiser.sigma_range = (self.sigma_min, self.sigma_max)

    def plan(self, asked: SamplingOptions, *, linear: bool = True) -> SamplingOptions:
        """Resolve the options, see `plan_guided`; stage 'mean' is the mean alone."""
        check_choice("stage", asked.stage, STAGES)
        for argument, given in (("tile", asked.tile), ("overlap", asked.overlap)):
            if given not in ("auto", None):
                raise OptionError(
                    f"{argument}={given!r} has no effect: a background model is computed on its whole grid. Leave it out."
                )
        linear = linear and self.scaling.is_affine
        found = plan_guided(asked, self.spec.name, has_anchor=self.denoiser.anchor is not None, linear=linear)
        return dataclasses.replace(found, stage=asked.stage)

    def work(self, times: int, members: int, options: SamplingOptions) -> int:
        """Return the number of sampler steps of all samples."""
        return times if options.stage == "mean" else times * members * int(options.steps or STEPS)

    def prior_moments(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return the expected truth and the standard deviation of the error around it, in physical units, for the background check."""
        shape = (len(request.labels), self.spec.channels, self.grid.size)
        mean, std = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
        spread = torch.ones(shape[1:], dtype=torch.float64)
        if self.denoiser.anchor is not None:
            spread = self.denoiser.anchor.diagonal().sqrt().reshape(shape[1:])
        for part in self._parts(request, BATCH):
            centre, unit = self._affine(part)
            mean[part.rows], std[part.rows] = physical_moments(self.scaling, centre.flatten(2), unit.flatten(1) * spread)
        return mean, std

    def posterior(self, request: Request) -> Tensor:
        """Sample in micro-batches of (time, member); `request.fields` are the background."""
        options, members = request.options, len(request.members)
        assert options.batch_size is not None
        count = 1 if options.stage == "mean" else members
        places = places_of(self.grid, self.spec.options["network"].get("periodic"))
        out = torch.empty(len(request.labels), count, self.spec.channels, self.grid.size, dtype=torch.float64)
        for part in self._parts(request, max(1, options.batch_size // members)):
            centre, unit = self._affine(part)
            if options.stage == "mean":
                request.advance(len(part.rows))
                out[part.rows] = without_logarithms(self.scaling, centre, 1).flatten(2)[:, None]
                continue
            observed = [request.evidence[t] if request.evidence else nothing_observed() for t in part.rows]
            z = Conditioning(
                request, self.scaling, self.grid.plane, centre.flatten(1), unit.reshape(-1), [(k,) for k in range(len(part.rows))],
                observed, functools.partial(self._given, part, request), self.denoiser.anchor,
                (self.sigma_min, self.sigma_max), places, [request.labels[t] for t in part.rows],
            ).samples()  # fmt: skip
            state = centre.flatten(2)[:, None] + unit.flatten(1) * z
            out[part.rows] = without_logarithms(self.scaling, state, 2)
        return out

    def _parts(self, request: Request, size: int) -> Iterator[Part]:
        """Yield what the samples of some times share, some times after the other."""
        everywhere = self.features.everywhere()
        regression = None if self.regression is None else self._placed(self.regression, everywhere, request, None)
        with torch.no_grad():
            for rows, _ in self._groups(request, size):
                yield Part(self, request, rows, everywhere, regression)

    def _affine(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the mean of the state (t, channels, rows, columns) and what multiplies a sample (channels, rows, columns)."""
        std = part.std.double().expand(self.spec.channels, *self.grid.plane)
        return part.climatology + std * part.mean, std * self.unit

    def _given(self, part: Part, request: Request, batch: list[tuple[int, int]]) -> Denoiser:
        """Return the denoiser of some (time, member) with their condition."""
        denoiser = self.denoiser.to(request.device)
        condition = part.condition[[t for t, _ in batch]].to(request.device)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            found: Tensor = denoiser(x, sigma, condition)
            return found

        return denoise

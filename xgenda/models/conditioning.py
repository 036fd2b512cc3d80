"""Samples of a diffusion given observations: what unconditional priors and models of a forecast's error share.

The state is affine in what the diffusion samples, x = mean + std z, but for channels that are logarithms: for an unconditional prior with the
climatology and its standard deviation, for the error of a forecast with the expected truth and the standard deviation of the error.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xgenda.curvilinear import AnyGrid
from xgenda.diffusion.anchors import Anchor
from xgenda.diffusion.batches import in_batches
from xgenda.diffusion.coloured import ColouredNoise
from xgenda.diffusion.denoisers import Denoiser
from xgenda.diffusion.evidence import Evidence, FunctionEvidence, LinearEvidence
from xgenda.diffusion.guidance import GUIDANCES, LIKELIHOODS, factorises, guidance_options, guide
from xgenda.diffusion.masks import OnPlane, OnSphere, Places
from xgenda.diffusion.noise import LabelledNoise
from xgenda.diffusion.random_fields import Colour
from xgenda.diffusion.samplers import SAMPLERS, Noise, integrate, network_calls, sampler_options
from xgenda.diffusion.schedules import SCHEDULES, noise_levels
from xgenda.errors import OptionError, check_choice, check_count
from xgenda.models.generative import PointEvidence, Request, SamplingOptions
from xgenda.operators import extended
from xgenda.scaling import Scaling
from xgenda.spherical import unit_vectors

SIGMA_MIN = 0.02  # lowest noise level of training and, for usual observation errors, of sampling; in standard deviations of what is sampled
#: Sampling ends at most at this part of the smallest standard deviation that observations leave; above it the ensemble loses spread.
SHARE_OF_ERROR = 0.4
FINER = 2.0  # ratio of the levels that are added for precise observations
STEPS = 24
BATCH = 16


def plan_guided(asked: SamplingOptions, name: str, *, has_anchor: bool, linear: bool) -> SamplingOptions:
    """Resolve the options of a guided diffusion.

    Guidance 'auto' is 'anchor' where there is a Gaussian and all operators are linear: exact for Gaussians, and without
    backpropagation. Else it is 'mmps', which linearises the operator and takes the covariance from the network.

    Parameters
    ----------
    name
        Of the model, for messages.
    has_anchor, linear
        Whether there is a Gaussian, and whether all that is observed is linear in what is sampled.

    Raises
    ------
    OptionError
        If an option is not known, or does not go together with the model or the operators.
    """
    asked = _preset(asked)
    check_choice("guidance", asked.guidance, ("auto", *GUIDANCES))
    check_choice("sampler", asked.sampler, ("auto", *SAMPLERS))
    check_choice("schedule", asked.schedule, ("auto", *SCHEDULES))
    check_choice("likelihood", asked.likelihood, tuple(LIKELIHOODS))
    guidance = asked.guidance
    if guidance == "auto":
        guidance = "anchor" if has_anchor and linear else "mmps"
    if guidance == "anchor" and not has_anchor:
        raise OptionError(f"guidance='anchor' needs a Gaussian of the state, and {name!r} has none; use guidance='mmps'.")
    if guidance == "inpaint" and not linear:
        raise OptionError(
            "guidance='inpaint' needs linear operators, and those of log-scaled variables or in operators= are not; use guidance='mmps'."
        )
    sampler = asked.sampler
    if sampler == "auto":  # what is replaced needs fresh noise around it
        sampler = "ancestral" if guidance == "inpaint" else "heun"
    return SamplingOptions(
        guidance, sampler,
        STEPS if asked.steps is None else check_count("steps", asked.steps, 2),
        BATCH if asked.batch_size is None else check_count("batch_size", asked.batch_size),
        "karras" if asked.schedule == "auto" else asked.schedule,
        asked.likelihood,
        guidance_options(guidance, asked.guidance_options),
        sampler_options(sampler, asked.sampler_options),
    )  # fmt: skip


#: Of guidance 'inpaint': 'published' is DiffDA (Huang et al. 2024), 2,910 calls of the network; 'soft' the same in 47.
PRESETS: Mapping[str, SamplingOptions] = {
    "published": SamplingOptions(
        sampler="ddim", steps=300, schedule="vp-linear", guidance_options={"reach": 1.5, "interpolation": "matern"},
        sampler_options={"resample": 10, "jump": 10},
    ),
    "soft": SamplingOptions(
        sampler="ancestral", steps=24, schedule="karras", guidance_options={"reach": 1.5, "interpolation": "anchor"},
        sampler_options={"resample": 2},
    ),
}  # fmt: skip


def _preset(asked: SamplingOptions) -> SamplingOptions:
    """Return the options with those of a preset where nothing else was asked for."""
    given = dict(asked.guidance_options)
    if asked.guidance != "inpaint" or "preset" not in given:
        return asked
    found = PRESETS[check_choice("guidance_options['preset']", given.pop("preset"), PRESETS)]
    own = asked.sampler in ("auto", found.sampler)
    return dataclasses.replace(
        asked, sampler=found.sampler if asked.sampler == "auto" else asked.sampler, steps=asked.steps or found.steps,
        schedule=found.schedule if asked.schedule == "auto" else asked.schedule, guidance_options={**found.guidance_options, **given},
        sampler_options={**(found.sampler_options if own else {}), **asked.sampler_options},
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Observed:
    """What is observed of states that are affine in what is sampled, but for logarithms.

    Parameters
    ----------
    request
        Members, labels, seed, options, operators and device.
    scaling
        Which channels are logarithms.
    plane
        Rows and columns.
    mean
        Of the states in transformed units, shape (times, channels * cells), float64.
    std
        What multiplies a sample, shape (channels * cells,).
    spans
        Times that are solved together: one each, or all of a trajectory.
    observed
        Observations of each span.
    trajectory
        Whether the spans are of several times, along the first axis of a sample.
    """

    request: Request
    scaling: Scaling
    plane: tuple[int, int]
    mean: Tensor
    std: Tensor
    spans: Sequence[tuple[int, ...]]
    observed: Sequence[PointEvidence]
    trajectory: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def channels(self) -> int:
        """Number of variables on their levels."""
        return len(self.scaling.transforms)

    def evidence(self, which: list[int], group: Tensor) -> LinearEvidence:
        """Return the observations of some spans; `group` says which of these each sample of a batch has."""
        return stack_evidence(
            [self.observed[s] for s in which],
            [(self.mean[list(self.spans[s])].reshape(-1), self.std.repeat(len(self.spans[s]))) for s in which],
            self.scaling,
            group,
            len(self.std) // self.channels,
        )

    def through_operators(self, span: int) -> FunctionEvidence:
        """Return observations of the states of a span through the operators."""
        device, observed, rows = self.request.device, self.observed[span], list(self.spans[span])
        std = self.std.reshape(self.channels, *self.plane)
        mean = self.mean[rows].reshape(len(rows), self.channels, *self.plane)

        def observe(z: Tensor) -> Tensor:
            physical = self.physical(z.reshape(len(z), *mean.shape) * std.to(z) + mean.to(z), -3)
            flat = extended(physical, self.request.operators).flatten(1)
            return (flat[:, observed.indices.to(device)] * observed.weights.to(z)).sum(-1)

        shape = mean.shape if self.trajectory else mean.shape[1:]
        return FunctionEvidence(observe, shape, observed.value.double().to(device), observed.variance.double().to(device))

    def physical(self, scaled: Tensor, axis: int) -> Tensor:
        """Undo the logarithms of a state whose channels are along `axis`."""
        return without_logarithms(self.scaling, scaled, axis)


@dataclass(frozen=True, eq=False)
class Conditioning(Observed):
    """Samples the states of a request that its observations leave possible.

    Parameters
    ----------
    request, scaling, plane, mean, std, spans, observed, trajectory
        As of `Observed`.
    denoiser
        Returns the denoiser of a batch of (span, member).
    covariance
        Gaussian of a span, for guidance 'anchor'.
    sigmas
        Lowest and highest noise level.
    places
        Where the cells are, see `xgenda.diffusion.guidance.guide`.
    labels
        Of the times.
    colour
        Covariance of the noise, None where it is white.
    """

    denoiser: Callable[[list[tuple[int, int]]], Denoiser]
    covariance: Anchor | None
    sigmas: tuple[float, float]
    places: Places
    labels: Sequence[str]
    colour: Colour | None = None

    def samples(self) -> Tensor:
        """Return what the diffusion samples, shape (times, members, channels, cells), float64."""
        request, members = self.request, self.request.members
        assert request.options.batch_size is not None
        kinds = [self._kind(s) for s in range(len(self.spans))]
        parts: dict[int, Tensor] = {}
        for same in sorted(set(kinds)):
            which = [s for s in range(len(self.spans)) if kinds[s] == same]
            sample = functools.partial(self._batch, finer=same[0], operators=same[2])
            found = in_batches(sample, [(s, m) for s in which for m in members], request.options.batch_size)
            parts.update(zip(which, found.reshape(len(which), len(members), -1), strict=True))
        z = torch.stack([parts[s] for s in range(len(self.spans))])
        z = z.reshape(len(self.spans), len(members), len(self.spans[0]), self.channels, -1)
        return z.transpose(1, 2).flatten(0, 1).double()

    def _kind(self, span: int) -> tuple[int, bool, int]:
        """Return what samples of one batch must share: levels below the lowest, how the anchor is solved, their operators."""
        derives = self.trajectory or bool((self.observed[span].indices >= len(self.std)).any())
        if self.request.operators and derives:  # something beside the channels may be observed
            return 0, True, span
        evidence = self.evidence([span], torch.zeros(1, dtype=torch.int64))
        return (
            finer_levels(evidence.sharpness(), self.sigmas[0]),
            factorises(self.covariance, evidence),
            -1,
        )

    def _batch(self, batch: list[tuple[int, int]], finer: int, operators: int) -> Tensor:
        """Return samples of some (span, member), shape (batch, states * channels * cells), on the CPU."""
        request, options, spans = self.request, self.request.options, self.spans
        groups = sorted({s for s, _ in batch})
        evidence: Evidence = (
            self.through_operators(batch[0][0])
            if operators >= 0
            else self.evidence(groups, torch.tensor([groups.index(s) for s, _ in batch])).to(request.device)
        )
        keys = [[(request.seed, self.labels[t], m) for t in spans[s]] for s, m in batch]
        noise = LabelledNoise(keys) if self.colour is None else ColouredNoise(keys, self.colour)
        shape = (len(spans[0]), self.channels, *self.plane) if self.trajectory else (self.channels, *self.plane)
        guided = guide(
            self.denoiser(batch), evidence, options.guidance, anchor=self.covariance, likelihood=options.likelihood, places=self.places,
            colour=self.colour,
            **options.guidance_options,
        )  # fmt: skip
        done = sum(len(spans[s]) for s, _ in batch)
        x = from_noise(guided, request, self.sigmas, finer, noise, shape, lambda: request.advance(done))
        return x.reshape(len(batch), -1).cpu()


def from_noise(
    guided: Denoiser, request: Request, sigmas: tuple[float, float], finer: int, noise: Noise, shape: tuple[int, ...], done: Callable[[], None]
) -> Tensor:  # fmt: skip
    """Return what a guided denoiser makes of noise, shape (samples, *shape), with so many levels below the lowest of `sigmas`."""
    options, (low, high) = request.options, sigmas
    assert options.steps is not None
    levels = noise_levels(options.schedule, options.steps, low, high)
    added = [low / FINER ** (j + 1) for j in range(finer)]
    # double precision: at large sigma single precision loses what the last steps need, and batches would differ
    x = high * noise.normal(*shape, dtype=torch.float64).to(request.device)
    if added:  # below the training the anchor, or the skip connection, has the answer: see EDMDenoiser
        guided.sigma_range = (added[-1], high)  # type: ignore[attr-defined]
    with torch.no_grad():
        # At the highest level the guided estimate hardly depends on x and is the posterior mean; starting around it instead of
        # around zero removes the largest error of a finite highest level where the state is far from the expected one.
        x = x + guided(x, high)
        return integrate(guided, x, [*levels[:-1], *added, 0.0], options.sampler, noise, done, **options.sampler_options)


def evaluations(options: SamplingOptions) -> int:
    """Return how often `from_noise` asks for a denoised state, without the levels that precise observations add."""
    assert options.steps is not None
    return network_calls(options.sampler, options.steps, options.sampler_options) + 1


def places_of(grid: AnyGrid, periodic: object) -> Places:
    """Return where the cells of a grid are: on a plane where it is a doubly periodic box, else on the sphere."""
    if periodic == "both":
        return OnPlane(*grid.plane, wraps=(True, True))
    latitude, longitude = grid.points()
    vectors = unit_vectors(latitude, longitude).reshape(*grid.plane, 3)
    # of neighbouring rows, or where there is one row of neighbouring columns
    axis = 0 if grid.plane[0] > 1 else 1
    steps = np.linalg.norm(np.diff(vectors, axis=axis), axis=-1)
    spacing = 2 * math.asin(min(1.0, float(np.median(steps)) / 2)) if steps.size else 1.0
    return OnSphere(torch.as_tensor(vectors.reshape(-1, 3)), spacing)


def without_logarithms(scaling: Scaling, values: Tensor, axis: int) -> Tensor:
    """Return values in physical units, their channels along `axis`."""
    if scaling.is_affine:
        return values
    parts = list(values.unbind(axis))
    for c, (name, offset) in enumerate(zip(scaling.transforms, scaling.offsets, strict=True)):
        if name == "log":
            parts[c] = parts[c].exp() - offset
    return torch.stack(parts, axis)


def physical_moments(scaling: Scaling, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (t, channels, cells) of a Gaussian in transformed units in physical ones."""
    mean, std = mean.clone(), std.expand_as(mean).clone()
    for c, (name, offset) in enumerate(zip(scaling.transforms, scaling.offsets, strict=True)):
        if name == "log":  # the moments of a log-normal variable
            variance = std[:, c] ** 2
            middle = (mean[:, c] + variance / 2).exp()
            mean[:, c], std[:, c] = middle - offset, middle * torch.expm1(variance).sqrt()
    return mean, std


def nothing_observed() -> PointEvidence:
    """Return no observations."""
    return PointEvidence(
        torch.zeros(0, 1, dtype=torch.int64), *(torch.zeros(s, dtype=torch.float64) for s in ((0, 1), (0,), (0,)))
    )


def finer_levels(sharpness: Tensor, lowest: float = SIGMA_MIN) -> int:
    """Return how many levels below the `lowest` the sharpest observations need; see `LinearEvidence.sharpness`."""
    sharpest = float(sharpness.max())
    if not sharpest > 0:
        return 0
    wanted = SHARE_OF_ERROR / math.sqrt(sharpest)
    return max(0, math.ceil(math.log(lowest / wanted, FINER) - 1e-9))


def stack_evidence(
    items: list[PointEvidence], affine: list[tuple[Tensor, Tensor]], scaling: Scaling, group: Tensor, cells: int
) -> LinearEvidence:
    """Pad the observations of several times to one size; `affine` holds mean and standard deviation of the flat state per time."""
    longest, widest = max(len(e.value) for e in items), max(e.indices.shape[1] for e in items)
    logs = torch.tensor([t == "log" for t in scaling.transforms])
    offsets = torch.tensor(scaling.offsets, dtype=torch.float64)
    parts: dict[str, list[Tensor]] = {
        k: [] for k in ("indices", "weights", "mean", "std", "values", "variances", "log", "offset")
    }
    for e, (mean, std) in zip(items, affine, strict=True):
        pad = (0, widest - e.indices.shape[1], 0, longest - len(e.value))
        index = torch.nn.functional.pad(e.indices, pad)
        channel = index // cells % len(scaling.transforms)
        parts["indices"].append(index)
        parts["weights"].append(torch.nn.functional.pad(e.weights.double(), pad))
        parts["mean"].append(mean[index])
        parts["std"].append(std[index])
        parts["values"].append(torch.nn.functional.pad(e.value.double(), pad[2:]))
        parts["variances"].append(torch.nn.functional.pad(e.variance.double(), pad[2:], value=1.0))
        parts["log"].append(logs[channel])
        parts["offset"].append(offsets[channel])
    stacked: dict[str, Any] = {k: torch.stack(v) for k, v in parts.items()}
    if not logs.any():
        stacked["log"] = stacked["offset"] = None
    return LinearEvidence(**stacked, group=group)

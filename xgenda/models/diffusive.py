"""`DiffusionModel`: an unconditional diffusion prior, conditioned on observations by likelihood guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xgenda.diffusion.anchors import Anchor, Separable, anchor_tensors, read_anchor
from xgenda.diffusion.batches import in_batches
from xgenda.diffusion.denoisers import Denoiser, EDMDenoiser
from xgenda.diffusion.evidence import Evidence, FunctionEvidence, LinearEvidence
from xgenda.diffusion.guidance import GUIDANCES, LIKELIHOODS, direct_limit, guidance_options, guide
from xgenda.diffusion.noise import LabelledNoise
from xgenda.diffusion.samplers import SAMPLERS, integrate, network_calls, sampler_options
from xgenda.diffusion.schedules import SCHEDULES, noise_levels
from xgenda.diffusion.trajectories import TrajectoryDenoiser
from xgenda.errors import OptionError, check_choice, check_count
from xgenda.models.checkpoints import load_weights
from xgenda.models.generative import GenerativeModel, PointEvidence, Request, SamplingOptions
from xgenda.models.spec import ModelSpec
from xgenda.networks.mesh import MeshNet
from xgenda.networks.songunet import SongUNet
from xgenda.networks.unet import UNet
from xgenda.operators import extended
from xgenda.scaling import Scaling

SIGMA_MIN = (
    0.02  # lowest noise level of training and, for usual observation errors, of sampling; in climatological standard deviations
)
#: Sampling ends at most at this part of the smallest standard deviation that observations leave; above it the ensemble loses spread.
SHARE_OF_ERROR = 0.4
FINER = 2.0  # ratio of the levels that are added for precise observations
NETWORKS: dict[str, Any] = {"unet": UNet, "songunet": SongUNet, "mesh": MeshNet}
ARCHITECTURES = tuple(NETWORKS)
STEPS = 24
BATCH = 16


class DiffusionModel(GenerativeModel):
    """A diffusion prior of the standardised state, or of a window of consecutive states.

    Parameters
    ----------
    spec
        With grid, scaling and ``options``: 'network' (arguments of the U-Net), 'sigma_max', and where they apply 'feeds_state',
        'window' (number of states) and 'spacing' (seconds between them).
    denoiser
        Network and, where trained with one, Gaussian anchor.
    covariance
        Of the standardised state, for guidance='anchor'; by default that of the denoiser's anchor.
    valid
        Where the state is, see `GenerativeModel`.
    """

    def __init__(
        self, spec: ModelSpec, denoiser: EDMDenoiser, covariance: Anchor | None = None, valid: np.ndarray | None = None
    ) -> None:
        if spec.grid is None or spec.scaling is None:
            raise OptionError("A diffusion model needs a grid and a scaling.")
        self.spec, self.denoiser = spec, denoiser.eval().requires_grad_(False)
        self.covariance = denoiser.anchor if covariance is None else covariance
        self.scaling: Scaling = spec.scaling
        self.valid = valid
        self.sigma_max = float(spec.options["sigma_max"])
        self.denoiser.sigma_range = (SIGMA_MIN, self.sigma_max)

    @property
    def window(self) -> int:
        """Number of states that the model sees together."""
        return int(self.spec.options.get("window", 1))

    def plan(self, asked: SamplingOptions, *, linear: bool = True) -> SamplingOptions:
        """Resolve the options.

        Guidance 'auto' is 'anchor' where there is a Gaussian and all operators are linear: exact for Gaussians, and without
        backpropagation. Else it is 'mmps', which linearises the operator and takes the covariance from the network.
        """
        check_choice("guidance", asked.guidance, ("auto", *GUIDANCES))
        check_choice("sampler", asked.sampler, ("auto", *SAMPLERS))
        check_choice("schedule", asked.schedule, ("auto", *SCHEDULES))
        check_choice("likelihood", asked.likelihood, tuple(LIKELIHOODS))
        linear = linear and self.scaling.is_affine
        has_anchor = self.covariance is not None and (self.window == 1 or isinstance(self.covariance, Separable))
        guidance = asked.guidance
        if guidance == "auto":
            guidance = "anchor" if has_anchor and linear else "mmps"
        if guidance == "anchor" and not has_anchor:
            raise OptionError(
                f"guidance='anchor' needs a Gaussian of the state, and {self.spec.name!r} has none; use guidance='mmps'."
            )
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

    def work(self, times: int, members: int, options: SamplingOptions) -> int:
        """Return the number of sampler steps of all samples."""
        return times * members * int(options.steps or STEPS)

    def prior_moments(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return the climatology and its standard deviation, in physical units."""
        assert request.climatology is not None
        std = torch.as_tensor(self.scaling.std).expand(self.spec.channels, *_grid(self.spec).plane).flatten(1)
        if self.covariance is not None:
            spread = self.covariance.diagonal().sqrt().reshape(self.window, *std.shape)
            std = std * spread[self.window // 2]
        mean, std = request.climatology.clone(), std.expand_as(request.climatology).clone()
        for c, (name, offset) in enumerate(zip(self.scaling.transforms, self.scaling.offsets, strict=True)):
            if name == "log":  # the moments of a log-normal variable
                variance = std[:, c] ** 2
                middle = (mean[:, c] + variance / 2).exp()
                mean[:, c], std[:, c] = middle - offset, middle * torch.expm1(variance).sqrt()
        return mean, std

    def posterior(self, request: Request) -> Tensor:
        """Sample in micro-batches of (time, member), or of members where the model is of windows."""
        denoiser: Denoiser = self.denoiser.to(request.device)
        options, times, k = request.options, len(request.labels), self.window // 2
        assert options.steps is not None
        assert options.batch_size is not None
        assert request.climatology is not None
        levels = noise_levels(options.schedule, options.steps, SIGMA_MIN, self.sigma_max)
        climatology = request.climatology
        std = torch.as_tensor(self.scaling.std).expand(self.spec.channels, *_grid(self.spec).plane).reshape(-1)
        shape: tuple[int, ...] = (self.spec.channels, *_grid(self.spec).plane)
        # an item is what is solved together: one time of one member, or all times of one member
        if k == 0:
            spans: list[tuple[int, ...]] = [(t,) for t in range(times)]
            observed = list(request.evidence)
        else:
            spans, shape = [tuple(range(times))], (times, *shape)
            observed = list(request.evidence[:1])
            denoiser = TrajectoryDenoiser(self.denoiser, k, batch=options.batch_size)
        covariance = self.covariance.of_length(times) if isinstance(self.covariance, Separable) else self.covariance
        wraps = self.spec.options["network"].get("periodic", bool(getattr(_grid(self.spec), "periodic", False)))

        def evidence_of(which: list[int], group: Tensor) -> LinearEvidence:
            return stack_evidence(
                [observed[s] for s in which],
                [(climatology[list(spans[s])].reshape(-1), std.repeat(len(spans[s]))) for s in which],
                self.scaling,
                group,
                len(std) // self.spec.channels,
            )

        limit = direct_limit(covariance)

        def derives(span: int) -> bool:
            """Tell whether something beside the channels may be observed."""
            return bool(request.operators) and (k > 0 or bool((observed[span].indices >= len(std)).any()))

        def kind(span: int) -> tuple[int, bool, int]:
            """Return what samples of one batch must share: levels below the lowest, how the anchor is solved, their operators."""
            if derives(span):
                return 0, True, span
            evidence = evidence_of([span], torch.zeros(1, dtype=torch.int64))
            return finer_levels(evidence.sharpness()), evidence.values.shape[1] <= limit, -1

        def sample(batch: list[tuple[int, int]]) -> Tensor:
            groups = sorted({s for s, _ in batch})
            evidence: Evidence = (
                self._through_operators(request, observed[batch[0][0]], climatology[list(spans[batch[0][0]])])
                if kinds[batch[0][0]][2] >= 0
                else evidence_of(groups, torch.tensor([groups.index(s) for s, _ in batch])).to(request.device)
            )
            added = [SIGMA_MIN / FINER ** (j + 1) for j in range(kinds[batch[0][0]][0])]
            noise = LabelledNoise([[(request.seed, request.labels[t], m) for t in spans[s]] for s, m in batch])
            # double precision: at large sigma single precision loses what the last steps need, and batches would differ
            x = self.sigma_max * noise.normal(*shape, dtype=torch.float64).to(request.device)
            guided = guide(
                denoiser, evidence, options.guidance, anchor=covariance, likelihood=options.likelihood,
                wraps=(wraps == "both", bool(wraps)), **options.guidance_options,
            )  # fmt: skip
            if added:  # below the training the anchor, or the skip connection, has the answer: see EDMDenoiser
                guided.sigma_range = (added[-1], self.sigma_max)  # type: ignore[attr-defined]
            with torch.no_grad():
                # At sigma_max the guided estimate hardly depends on x and is the posterior mean; starting around it instead of
                # around zero removes the largest error of a finite sigma_max where the state is far from the climate.
                x = x + guided(x, self.sigma_max)
                done = sum(len(spans[s]) for s, _ in batch)
                x = integrate(
                    guided, x, [*levels[:-1], *added, 0.0], options.sampler, noise, lambda: request.advance(done),
                    **options.sampler_options,
                )  # fmt: skip
            return x.reshape(len(batch), -1).cpu()

        kinds = [kind(s) for s in range(len(spans))]
        parts: dict[int, Tensor] = {}
        for same in sorted(set(kinds)):
            which = [s for s in range(len(spans)) if kinds[s] == same]
            found = in_batches(sample, [(s, m) for s in which for m in request.members], options.batch_size)
            parts.update(zip(which, found.reshape(len(which), len(request.members), -1), strict=True))
        z = torch.stack([parts[s] for s in range(len(spans))])
        z = z.reshape(len(spans), len(request.members), len(spans[0]), self.spec.channels, -1)
        z = z.transpose(1, 2).flatten(0, 1).double()  # (times, members, channels, cells)
        return self._physical(z * std.reshape(self.spec.channels, -1) + request.climatology[:, None], -2)

    def _through_operators(self, request: Request, observed: PointEvidence, climatology: Tensor) -> FunctionEvidence:
        """Return observations of the states of some times, whose climatology (times, channels, cells) is given, through the operators."""
        plane, device = _grid(self.spec).plane, request.device
        std = torch.as_tensor(self.scaling.std).expand(self.spec.channels, *plane)
        mean = climatology.reshape(len(climatology), self.spec.channels, *plane)

        def observe(z: Tensor) -> Tensor:
            physical = self._physical(z.reshape(len(z), *mean.shape) * std.to(z) + mean.to(z), -3)
            flat = extended(physical, request.operators).flatten(1)
            return (flat[:, observed.indices.to(device)] * observed.weights.to(z)).sum(-1)

        shape = mean.shape if self.window > 1 else mean.shape[1:]
        return FunctionEvidence(observe, shape, observed.value.double().to(device), observed.variance.double().to(device))

    def _physical(self, scaled: Tensor, axis: int) -> Tensor:
        """Undo the logarithms of a state whose channels are along `axis`."""
        if self.scaling.is_affine:
            return scaled
        parts = list(scaled.unbind(axis))
        for c, (name, offset) in enumerate(zip(self.scaling.transforms, self.scaling.offsets, strict=True)):
            if name == "log":
                parts[c] = parts[c].exp() - offset
        return torch.stack(parts, axis)

    def calls(self, options: SamplingOptions) -> int:
        """Return the number of network evaluations of one member."""
        return network_calls(options.sampler, int(options.steps or STEPS), options.sampler_options) + 1

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, anchor, and the Gaussian for guidance where that is another one."""
        out = {f"network.{k}": v for k, v in self.denoiser.network.state_dict().items()}
        own = self.covariance if self.covariance is not self.denoiser.anchor else None
        masked = {} if self.valid is None else {"valid": torch.as_tensor(self.valid, dtype=torch.uint8)}
        return out | anchor_tensors(self.denoiser.anchor) | anchor_tensors(own, "covariance") | masked

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: dict[str, Tensor]) -> DiffusionModel:
        """Rebuild the model; the tensors must be exactly those that it stores."""
        anchor, covariance = read_anchor(tensors), read_anchor(tensors, "covariance")
        valid = tensors.pop("valid").bool().numpy() if "valid" in tensors else None
        network = build_network(spec.options["network"])
        load_weights(network, tensors, "network.")
        if stray := sorted(k for k in tensors if not k.startswith("network.")):
            raise KeyError(f"unexpected tensors {stray}")
        return cls(spec, EDMDenoiser(network, anchor, bool(spec.options.get("feeds_state", False))), covariance, valid)


def build_network(options: Mapping[str, Any]) -> UNet | SongUNet | MeshNet:
    """Build a network from stored options; 'architecture' says which, by default the small U-Net."""
    known = dict(options)
    architecture = check_choice("architecture", known.pop("architecture", "unet"), ARCHITECTURES)
    lists = {k: tuple(v) for k, v in known.items() if isinstance(v, list)}
    built: UNet | SongUNet | MeshNet = NETWORKS[architecture](**known | lists)
    return built


def highest_sigma(anchor: Anchor | None) -> float:
    """Return a noise level that drowns the largest mode of the state tenfold (a correlated field's is far above 1)."""
    return 80.0 if anchor is None else max(80.0, 10.0 * math.sqrt(anchor.largest()))


def finer_levels(sharpness: Tensor) -> int:
    """Return how many levels below `SIGMA_MIN` the sharpest observations need; see `LinearEvidence.sharpness`."""
    sharpest = float(sharpness.max())
    if not sharpest > 0:
        return 0
    wanted = SHARE_OF_ERROR / math.sqrt(sharpest)
    return max(0, math.ceil(math.log(SIGMA_MIN / wanted, FINER) - 1e-9))


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


def _grid(spec: ModelSpec) -> Any:
    return spec.grid

"""`DiffusionModel`: an unconditional diffusion prior, conditioned on observations by likelihood guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xgenda.diffusion.batches import in_batches
from xgenda.diffusion.covariances import LowRank
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.guidance import GUIDANCES, Evidence, guide
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.samplers import SAMPLERS, integrate, karras_schedule, network_calls
from xgenda.errors import OptionError, check_choice, check_count
from xgenda.models.generative import GenerativeModel, PointEvidence, Request, SamplingOptions
from xgenda.models.spec import ModelSpec
from xgenda.networks.unet import UNet
from xgenda.scaling import Scaling

SIGMA_MIN = 0.02  # of the climatological standard deviation: below any observation error
STEPS = 24
BATCH = 16


class DiffusionModel(GenerativeModel):
    """A diffusion prior of the standardised state.

    Parameters
    ----------
    spec
        With grid, scaling and ``options``: 'network' (arguments of the U-Net), 'sigma_max'.
    denoiser
        Network and, where trained with one, Gaussian anchor.
    """

    def __init__(self, spec: ModelSpec, denoiser: EDMDenoiser) -> None:
        if spec.grid is None or spec.scaling is None:
            raise OptionError("A diffusion model needs a grid and a scaling.")
        self.spec, self.denoiser = spec, denoiser.eval().requires_grad_(False)
        self.scaling: Scaling = spec.scaling
        self.sigma_max = float(spec.options["sigma_max"])

    def plan(self, *, guidance: str, sampler: str, steps: int | None, batch_size: int | None) -> SamplingOptions:
        """Resolve the options: guidance 'auto' is the anchor where there is one and the operator is linear, else 'sda'."""
        check_choice("guidance", guidance, ("auto", *GUIDANCES))
        check_choice("sampler", sampler, ("auto", *SAMPLERS))
        if guidance == "auto":
            guidance = "anchor" if self.denoiser.anchor is not None and self.scaling.is_affine else "sda"
        if guidance == "anchor" and self.denoiser.anchor is None:
            raise OptionError(f"guidance='anchor' needs a Gaussian anchor and {self.spec.name!r} has none; use guidance='sda'.")
        steps = STEPS if steps is None else check_count("steps", steps, 2)
        batch_size = BATCH if batch_size is None else check_count("batch_size", batch_size)
        return SamplingOptions(guidance, "heun" if sampler == "auto" else sampler, steps, batch_size)

    def work(self, times: int, members: int, options: SamplingOptions) -> int:
        """Return the number of sampler steps of all samples."""
        return times * members * options.steps

    def prior_moments(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return the climatology and its standard deviation, in physical units."""
        assert request.climatology is not None
        std = torch.as_tensor(self.scaling.std).expand(self.spec.channels, *_grid(self.spec).shape).flatten(1)
        if self.denoiser.anchor is not None:
            std = std * self.denoiser.anchor.diagonal().sqrt().reshape(std.shape)
        return request.climatology, std.expand_as(request.climatology)

    def posterior(self, request: Request) -> Tensor:
        """Sample in micro-batches of (time, member)."""
        denoiser = self.denoiser.to(request.device)
        shape = (self.spec.channels, *_grid(self.spec).shape)
        options = request.options
        levels = karras_schedule(options.steps, SIGMA_MIN, self.sigma_max)
        pairs = [(t, m) for t in range(len(request.labels)) for m in request.members]
        std = torch.as_tensor(self.scaling.std).expand(shape).flatten(1)

        def sample(batch: list[tuple[int, int]]) -> Tensor:
            times = sorted({t for t, _ in batch})
            group = torch.tensor([times.index(t) for t, _ in batch], device=request.device)
            evidence = stack_evidence(
                [request.evidence[t] for t in times], [self._affine(request, t, std) for t in times], self.scaling
            )
            moved: dict[str, Any] = {k: None if v is None else v.to(request.device) for k, v in vars(evidence).items()}
            evidence = Evidence(**moved)
            noise = NoiseStream([(request.seed, request.labels[t], m) for t, m in batch])
            # double precision: at large sigma single precision loses what the last steps need, and batches would differ
            x = self.sigma_max * noise.normal(*shape).double().to(request.device)
            guided = guide(denoiser, evidence, group, options.guidance, anchor=self.denoiser.anchor, **options.extra)  # type: ignore[arg-type]
            with torch.no_grad():
                # At sigma_max the guided estimate hardly depends on x and is the posterior mean; starting around it instead of
                # around zero removes the largest error of a finite sigma_max where the state is far from the climate.
                x = x + guided(x, self.sigma_max)
                x = integrate(guided, x, levels, options.sampler, lambda: request.advance(len(batch)))
            return x.flatten(1).cpu()

        z = in_batches(sample, pairs, options.batch_size)
        z = z.reshape(len(request.labels), len(request.members), shape[0], -1).double()
        assert request.climatology is not None
        out = z * std + request.climatology[:, None]
        for c, (name, offset) in enumerate(zip(self.scaling.transforms, self.scaling.offsets, strict=True)):
            if name == "log":
                out[:, :, c] = out[:, :, c].exp() - offset
        return out

    @staticmethod
    def _affine(request: Request, time: int, std: Tensor) -> tuple[Tensor, Tensor]:
        assert request.climatology is not None
        return request.climatology[time].reshape(-1), std.reshape(-1)

    def calls(self, options: SamplingOptions) -> int:
        """Return the number of network evaluations of one member."""
        return network_calls(options.sampler, options.steps) + 1

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and anchor."""
        out = {f"network.{k}": v for k, v in self.denoiser.network.state_dict().items()}
        return out | anchor_tensors(self.denoiser.anchor)

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: dict[str, Tensor]) -> DiffusionModel:
        """Rebuild the model; the tensors must be exactly those that it stores."""
        anchor = read_anchor(tensors)
        network = build_network(spec.options["network"])
        network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items()}, strict=True)
        return cls(spec, EDMDenoiser(network, anchor))


def build_network(options: Mapping[str, Any]) -> UNet:
    """Build the U-Net from stored options."""
    known = dict(options)
    return UNet(**{**known, "multipliers": tuple(known["multipliers"]), "shape": tuple(known["shape"])})


def anchor_tensors(anchor: LowRank | None, prefix: str = "anchor") -> dict[str, Tensor]:
    """Return the tensors of an anchor in single precision."""
    return {} if anchor is None else {f"{prefix}.factor": anchor.factor.float(), f"{prefix}.residual": anchor.residual.float()}


def read_anchor(tensors: dict[str, Tensor], prefix: str = "anchor") -> LowRank | None:
    """Take an anchor out of `tensors`, if there is one."""
    if f"{prefix}.factor" not in tensors:
        return None
    return LowRank(tensors.pop(f"{prefix}.factor"), tensors.pop(f"{prefix}.residual"))


def highest_sigma(anchor: LowRank | None) -> float:
    """Return a noise level that drowns the largest mode of the state tenfold (a correlated field's is far above 1)."""
    if anchor is None:
        return 80.0
    gram = anchor.factor.T @ anchor.factor
    return max(80.0, 10.0 * math.sqrt(float(torch.linalg.eigvalsh(gram)[-1])))


def stack_evidence(items: list[PointEvidence], affine: list[tuple[Tensor, Tensor]], scaling: Scaling) -> Evidence:
    """Pad the observations of several times to one size; `affine` holds mean and standard deviation of the flat state per time."""
    longest, widest = max(len(e.value) for e in items), max(e.indices.shape[1] for e in items)
    logs = torch.tensor([t == "log" for t in scaling.transforms])
    offsets = torch.tensor(scaling.offsets, dtype=torch.float64)
    parts: dict[str, list[Tensor]] = {k: [] for k in ("indices", "weights", "mean", "std", "value", "variance", "log", "offset")}
    for e, (mean, std) in zip(items, affine, strict=True):
        pad = (0, widest - e.indices.shape[1], 0, longest - len(e.value))
        index = torch.nn.functional.pad(e.indices, pad)
        channel = index // (len(mean) // len(scaling.transforms))
        parts["indices"].append(index)
        parts["weights"].append(torch.nn.functional.pad(e.weights.double(), pad))
        parts["mean"].append(mean[index])
        parts["std"].append(std[index])
        parts["value"].append(torch.nn.functional.pad(e.value.double(), pad[2:]))
        parts["variance"].append(torch.nn.functional.pad(e.variance.double(), pad[2:], value=1.0))
        parts["log"].append(logs[channel])
        parts["offset"].append(offsets[channel])
    stacked: dict[str, Any] = {k: torch.stack(v) for k, v in parts.items()}
    if not logs.any():
        stacked["log"] = stacked["offset"] = None
    return Evidence(**stacked)


def _grid(spec: ModelSpec) -> Any:
    return spec.grid

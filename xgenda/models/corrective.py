r"""`CorrectiveModel`: downscaling by a regression of the mean and a diffusion of the residual.

After CorrDiff (Mardani et al. 2023, arXiv 2309.15214), with a linear conditional mean underneath the regression network:

    x = K c + s R(c, K c) + r,     r ~ diffusion given (c, K c, R),     every block mean of x equal to its input.

K = S B^T (B S B^T)^-1 is the conditional mean of a Gaussian with localised sample covariance S given its block means B x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from xgenda.diffusion.anchors import anchor_tensors, read_anchor
from xgenda.diffusion.batches import in_batches
from xgenda.diffusion.covariances import DENSE_LIMIT
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.samplers import SAMPLERS, integrate, sampler_options
from xgenda.diffusion.schedules import SCHEDULES, noise_levels
from xgenda.errors import OptionError, check_choice, check_count
from xgenda.grids import Grid, rectilinear
from xgenda.maps import bilinear_between, block_mean
from xgenda.models.diffusive import BATCH, SIGMA_MIN, STEPS, build_network
from xgenda.models.fitting import kernel_on
from xgenda.models.generative import GenerativeModel, Request, SamplingOptions
from xgenda.models.spec import ModelSpec

RADII_KM = (500.0, 1000.0, 1500.0, 2000.0, 3000.0, 4000.0, 6000.0, 10000.0)
NUGGET = 1e-6


@dataclass(frozen=True, eq=False)
class CoarseMap:
    """K: from coarse anomalies (channels * coarse cells) to fine ones, shape (fine, coarse); and the block means B, shape (coarse, fine)."""

    matrix: Tensor
    blocks: Tensor

    def apply(self, fine: Tensor) -> Tensor:
        """Return K B x for fine anomalies (batch, n)."""
        return self.from_coarse(fine @ self.blocks.T)

    def from_coarse(self, coarse: Tensor) -> Tensor:
        """Return K c for coarse anomalies (batch, m)."""
        return coarse @ self.matrix.T


def conditional_map(
    z: np.ndarray, grid: Grid, channels: int, factor: int, fold: np.ndarray
) -> tuple[CoarseMap, list[CoarseMap], str]:
    """Fit K, and one per block of times without it; the radius of the taper is the one that predicts withheld blocks best.

    Too large a state for a dense covariance gets bilinear interpolation instead.
    """
    mean = torch.as_tensor(block_mean(grid, factor).matrix.toarray())
    blocks = torch.block_diag(*[mean] * channels)
    if grid.size * channels > DENSE_LIMIT:
        up = bilinear_between(grid.coarsened(factor), grid).matrix.toarray()
        plain = CoarseMap(torch.block_diag(*[torch.as_tensor(up)] * channels), blocks)
        return plain, [plain] * (int(fold.max()) + 1), "bilinear"
    cells = torch.arange(grid.size)
    kernels = {r: kernel_on(grid, "gaspari-cohn", r * 1e3).correlation(cells, cells).repeat(channels, channels) for r in RADII_KM}
    values = torch.as_tensor(z)
    loss = dict.fromkeys(RADII_KM, 0.0)
    crossed: dict[float, list[CoarseMap]] = {r: [] for r in RADII_KM}
    for k in range(int(fold.max()) + 1):
        inside = torch.as_tensor(fold != k)
        anomaly = values[inside] - values[inside].mean(0)
        sample = anomaly.T @ anomaly / (len(anomaly) - 1)
        for radius, taper in kernels.items():
            crossed[radius].append(_map_of(sample * taper, blocks))
            test = values[~inside]
            loss[radius] += float((crossed[radius][-1].apply(test) - test).square().sum())
    best = min(loss, key=lambda r: loss[r])
    anomaly = values - values.mean(0)
    final = _map_of(anomaly.T @ anomaly / (len(anomaly) - 1) * kernels[best], blocks)
    return final, crossed[best], f"localised covariance, radius {best:g} km"


def _map_of(covariance: Tensor, blocks: Tensor) -> CoarseMap:
    cross = covariance @ blocks.T
    inner = blocks @ cross
    inner = inner + NUGGET * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
    return CoarseMap(torch.linalg.solve(inner, cross.T).T, blocks)


def project_block_means(fields: Tensor, factor: int) -> Tensor:
    """Return the block means of fields (batch, channels, ny, nx), spread over their blocks."""
    return spread_blocks(functional.avg_pool2d(fields, factor), factor)


def spread_blocks(coarse: Tensor, factor: int) -> Tensor:
    """Repeat each coarse cell over its block."""
    return coarse.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


class CorrectiveModel(GenerativeModel):
    """Fine ensembles from block means.

    Parameters
    ----------
    spec
        ``options``: 'network', 'regression', 'sigma_max', and 'unit', the standard deviation of the residual in standardised units.
    linear
        K.
    regression
        R, whose output is in units of `spread`; None where it did not beat K alone on the validation block.
    spread
        Standard deviation of what K leaves, shape (channels, ny, nx), standardised.
    denoiser
        Of the residual in units of 'unit'.
    """

    def __init__(
        self, spec: ModelSpec, linear: CoarseMap, regression: nn.Module | None, spread: Tensor, denoiser: EDMDenoiser
    ) -> None:
        if spec.grid is None or spec.scaling is None or spec.factor is None:
            raise OptionError("A downscaling model needs a grid, a scaling and a factor.")
        self.spec, self.linear, self.spread = spec, linear, spread.float()
        self.grid, self.scaling, self.factor = rectilinear(spec.grid, spec.name), spec.scaling, spec.factor
        self.regression = None if regression is None else regression.eval().requires_grad_(False)
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.sigma_max, self.unit = float(spec.options["sigma_max"]), float(spec.options["unit"])

    def plan(self, asked: SamplingOptions, *, linear: bool = True) -> SamplingOptions:
        """Resolve the options; there is nothing to guide."""
        asked.refuse_all_but(("sampler", "steps", "schedule", "sampler_options"), "a downscaler is not guided by observations")
        check_choice("sampler", asked.sampler, ("auto", *SAMPLERS))
        check_choice("schedule", asked.schedule, ("auto", *SCHEDULES))
        sampler = "heun" if asked.sampler == "auto" else asked.sampler
        return SamplingOptions(
            "none", sampler,
            STEPS if asked.steps is None else check_count("steps", asked.steps, 2),
            BATCH if asked.batch_size is None else check_count("batch_size", asked.batch_size),
            "karras" if asked.schedule == "auto" else asked.schedule,
            sampler_options=sampler_options(sampler, asked.sampler_options),
        )  # fmt: skip

    def work(self, times: int, members: int, options: SamplingOptions) -> int:
        """Return the number of sampler steps of all samples."""
        return times * members * int(options.steps or STEPS)

    def mean(self, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean (batch, channels, ny, nx) for standardised coarse fields (batch, channels, cy, cx), and the condition."""
        shape = (len(coarse), self.spec.channels, *self.grid.shape)
        linear = self.linear.from_coarse(coarse.flatten(1).double()).reshape(shape).float()
        condition = torch.cat([spread_blocks(coarse.float(), self.factor), linear], 1)
        correction = torch.zeros(shape)
        if self.regression is not None:
            correction = self.regression(correction, torch.zeros(len(coarse)), condition) * self.spread
            correction = correction - project_block_means(correction, self.factor)
        return linear + correction, torch.cat([condition, correction / self.unit], 1)

    def posterior(self, request: Request) -> Tensor:
        """Sample in micro-batches of (time, member); `request.fields` are the coarse fields."""
        options, shape = request.options, (self.spec.channels, *self.grid.shape)
        assert options.steps is not None
        assert options.batch_size is not None
        levels = noise_levels(options.schedule, options.steps, SIGMA_MIN, self.sigma_max)
        assert request.climatology is not None
        times = len(request.labels)
        climatology = request.climatology.reshape(times, *shape)
        std = torch.as_tensor(self.scaling.std)
        coarse_shape = (times, self.spec.channels, *self.grid.coarsened(self.factor).shape)
        coarse = (request.fields.reshape(coarse_shape) - functional.avg_pool2d(climatology, self.factor)) / std
        with torch.no_grad():
            parts = [self.mean(c) for c in coarse.split(64)]
        mean, condition = (torch.cat(p) for p in zip(*parts, strict=True))
        pairs = [(t, m) for t in range(times) for m in request.members]
        denoiser = self.denoiser.to(request.device)

        def sample(batch: list[tuple[int, int]]) -> Tensor:
            rows = torch.tensor([t for t, _ in batch])
            given = condition[rows].to(request.device)
            noise = NoiseStream([(request.seed, request.labels[t], m) for t, m in batch])
            x = self.sigma_max * noise.normal(*shape).double().to(request.device)
            with torch.no_grad():
                x = integrate(
                    lambda y, sigma: denoiser(y, sigma, given),
                    x,
                    levels,
                    options.sampler,
                    noise,
                    lambda: request.advance(len(batch)),
                    **options.sampler_options,
                )
            return x.cpu()

        residual = in_batches(sample, pairs, options.batch_size).double() * self.unit
        residual = residual - project_block_means(residual, self.factor)
        rows = torch.tensor([t for t, _ in pairs])
        fine = mean[rows].double() + residual
        # the linear part conserves up to its nugget; this makes it exact
        fine = fine + spread_blocks(coarse[rows] - functional.avg_pool2d(fine, self.factor), self.factor)
        out = fine * std + climatology[rows]
        return out.reshape(times, len(request.members), self.spec.channels, -1)

    def tensors(self) -> dict[str, Tensor]:
        """Return networks, linear map, spread and anchor."""
        out: dict[str, Tensor] = {f"network.{k}": v for k, v in self.denoiser.network.state_dict().items()}
        if self.regression is not None:
            out |= {f"regression.{k}": v for k, v in self.regression.state_dict().items()}
        return out | {"linear": self.linear.matrix.float(), "spread": self.spread} | anchor_tensors(self.denoiser.anchor)

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: dict[str, Tensor]) -> CorrectiveModel:
        """Rebuild the model; the tensors must be exactly those that it stores."""
        anchor = read_anchor(tensors)
        matrix, spread = tensors.pop("linear").double(), tensors.pop("spread")
        networks: list[Any] = []
        for part in ("network", "regression"):
            if spec.options[part] is None:
                networks.append(None)
                continue
            built = build_network(spec.options[part])
            built.load_state_dict(
                {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}, strict=True
            )
            networks.append(built)
        stray = [k for k in tensors if not k.startswith(("network.", "regression."))]
        if stray or spec.grid is None or spec.factor is None:
            raise KeyError(f"unexpected tensors {stray}")
        blocks = torch.as_tensor(block_mean(rectilinear(spec.grid, spec.name), spec.factor).matrix.toarray())
        return cls(
            spec,
            CoarseMap(matrix, torch.block_diag(*[blocks] * spec.channels)),
            networks[1],
            spread,
            EDMDenoiser(networks[0], anchor),
        )

"""`train`: fit a generative model to a Dataset. The only place where arrays become tensors in training."""

from __future__ import annotations

import copy
import datetime
import numbers
import os
import re
import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr
from torch import nn

from xgenda import metadata
from xgenda.devices import resolve_device
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.engine import check_seed, progress_bar
from xgenda.errors import CheckpointError, OptionError, OutputExistsError, StateError, check_choice, check_count
from xgenda.models.checkpoints import content_hash
from xgenda.models.corrective import CorrectiveModel, conditional_map, project_block_means
from xgenda.models.diffusive import SIGMA_MIN, DiffusionModel, build_network, highest_sigma
from xgenda.models.fitting import candidates, cross_validate, fit_eofs, standardise
from xgenda.models.generative import GenerativeModel
from xgenda.models.loading import load_model
from xgenda.models.spec import ModelSpec
from xgenda.scaling import fit_scaling
from xgenda.training.objectives import Batch, Denoising, Regression
from xgenda.training.windows import Samples, blocks, read_samples, time_order

FOLDS = 6
DEFAULT_EPOCHS = 60
VALIDATION_REPEATS = 4


class Objective(Protocol):
    """Draws training batches."""

    def batch(self, rows: torch.Tensor, generator: torch.Generator) -> Batch:
        """Return a batch for some samples."""
        ...


@dataclass(frozen=True)
class Effort:
    """How long to train: the first of these that is reached ends it."""

    epochs: int | None
    steps: int | None
    seconds: float | None


def train(
    ds: xr.Dataset | xr.DataArray,
    *,
    task: str = "prior",
    factor: int | None = None,
    start: GenerativeModel | str | os.PathLike[str] | None = None,
    variables: Sequence[str] | None = None,
    climatology: str = "none",
    anchor: str | None = "eof",
    width: int = 16,
    epochs: int | None = None,
    steps: int | None = None,
    time_budget: str | float | None = None,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    ema: float = 0.995,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    name: str | None = None,
    licence: str = "that of the training data",
    device: str = "auto",
    progress: bool | None = None,
) -> GenerativeModel:
    """Train a generative model on the fields of a Dataset.

    The fields are cut into blocks of consecutive times. One block is withheld for validation, and the weights with the lowest
    validation loss are kept; training starts from the classical answer (a Gaussian, a linear regression), and what is kept
    is never worse than it on that block.

    Parameters
    ----------
    ds
        Training fields along ``time`` or ``member``, at least 20, without NaN. Read into memory.
    task
        'prior': an unconditional diffusion prior for `assimilate`. 'downscale': the fine fields behind their own block means, for
        `downscale`: a regression of the mean and a diffusion of the residual.
    factor
        For 'downscale': cells per coarse cell along each axis.
    start
        Model, name or path to go on from (task 'prior'): its scaling, anchor and network are kept, and trained on `ds`.
    variables
        Which variables of `ds`; by default all on its grid.
    climatology
        Part of the cycle to remove: 'none', 'dayofyear', 'hour', 'dayofyear+hour'.
    anchor
        'eof': the network corrects the exact denoiser of a Gaussian with EOF covariance, whose rank and inflation are
        cross-validated. None: a plain EDM denoiser, for large data.
    width
        Channels of the U-Net at full resolution.
    epochs, steps, time_budget
        How long: passes over the data, optimiser steps, or a time such as '10min' (or seconds), for each of the networks of
        the task together; the first that is reached. By default 60 epochs.
    batch_size, learning_rate, ema
        Of AdamW with a cosine schedule, and the decay of the averaged weights.
    seed
        Of initialisation and noise.
    out
        File to write, ending in ``.safetensors``.
    overwrite
        Whether `out` may exist.
    name, licence
        Stored with the model.
    device, progress
        As in `assimilate`.

    Returns
    -------
    GenerativeModel
        Its ``spec.training`` records data, period, options and the validation loss relative to the classical start.

    Raises
    ------
    OptionError, StateError, GridError, OutputExistsError
        Before any training.

    References
    ----------
    Karras, T. et al. (2022), Elucidating the design space of diffusion-based generative models, arXiv:2206.00364.
    Mardani, M. et al. (2023), Residual corrective diffusion modeling for km-scale atmospheric downscaling, arXiv:2309.15214.

    Examples
    --------
    >>> import xgenda
    >>> ds = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=slice(0, 60))
    >>> model = xgenda.train(ds, steps=2, width=8)
    >>> model.spec.task
    'prior'
    """
    check_choice("task", task, ("prior", "downscale"))
    if anchor is not None:
        check_choice("anchor", anchor, ("eof",))
    for argument, number in (("width", width), ("batch_size", batch_size)):
        check_count(argument, number)
    if width % 8:
        raise OptionError(f"width={width} is not accepted; it must be a multiple of 8, for example width=16.")
    for argument, real, highest in (("learning_rate", learning_rate, np.inf), ("ema", ema, 1.0)):
        if isinstance(real, bool) or not isinstance(real, numbers.Real) or not 0 < real < highest:
            below = "" if np.isinf(highest) else f" below {highest:g}"
            raise OptionError(f"{argument}={real!r} is not accepted; it must be a positive number{below}.")
    effort = Effort(
        None if epochs is None else check_count("epochs", epochs),
        None if steps is None else check_count("steps", steps),
        None if time_budget is None else parse_time_budget(time_budget),
    )
    seed = check_seed(seed)
    torch_device = resolve_device(device)
    if out is not None:
        if Path(out).suffix != ".safetensors":
            raise CheckpointError(f"out={str(out)!r}: a model file ends in .safetensors, for example out='model.safetensors'")
        if not Path(out).parent.is_dir():
            raise OptionError(
                f"out={str(out)!r}: there is no folder {str(Path(out).parent)!r}; make it first: mkdir -p {Path(out).parent}"
            )
        if Path(out).exists() and not overwrite:
            raise OutputExistsError(f"out={str(out)!r} exists. Choose another name, or pass overwrite=True.")
    if task == "downscale" and factor is None:
        raise OptionError("factor is missing: for task='downscale' give the cells per coarse cell, for example factor=4.")
    if task == "prior" and factor is not None:
        raise OptionError(f"factor={factor} belongs to task='downscale'.")
    samples = read_samples(ds, [variables] if isinstance(variables, str) else variables)
    optimiser = Optimiser(effort, batch_size, learning_rate, ema, seed, torch_device, progress)
    if task == "downscale":
        if start is not None:
            raise OptionError("start is not supported for task='downscale' yet; leave it out.")
        model: GenerativeModel = _train_downscaler(
            samples, check_count("factor", factor, 2), climatology, anchor, width, optimiser, name, licence
        )
    elif start is not None:
        model = _continue(samples, start, optimiser, name, licence)
    else:
        model = _train_prior(samples, climatology, anchor, width, optimiser, name, licence)
    model.sha256 = content_hash(model)
    if out is not None:
        model.save(out, overwrite=overwrite)
    return model


def parse_time_budget(budget: str | float) -> float:
    """Return seconds from '90s', '10min', '2h' or a number of seconds."""
    units = {"s": 1.0, "min": 60.0, "h": 3600.0}
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(s|min|h)?\s*", str(budget))
    if not match or float(match[1]) <= 0:
        raise OptionError(f"time_budget={budget!r} is not accepted; give seconds or a text such as '90s', '10min' or '2h'.")
    return float(match[1]) * units[match[2] or "s"]


@dataclass(frozen=True)
class Optimiser:
    """AdamW with warm-up and cosine decay, averaged weights, and the best weights on the validation block."""

    effort: Effort
    batch_size: int
    learning_rate: float
    ema: float
    seed: int
    device: torch.device
    progress: bool | None

    def fit(
        self, network: nn.Module, objective: Objective, rows: torch.Tensor, held: torch.Tensor, share: float, label: str
    ) -> dict[str, Any]:
        """Train `network` in place and leave the best averaged weights in it.

        Parameters
        ----------
        rows, held
            Training and validation samples.
        share
            Part of the effort that this network may use.
        label
            For the progress bar.

        Returns
        -------
        dict
            Steps taken, and validation loss before training and of the kept weights.
        """
        generator = torch.Generator().manual_seed(self.seed)
        per_epoch = max(1, len(rows) // self.batch_size)
        epochs = self.effort.epochs or (DEFAULT_EPOCHS if self.effort.steps is None and self.effort.seconds is None else 10**9)
        limit = min(per_epoch * epochs, max(1, round((self.effort.steps or 10**9) * share)))
        seconds = None if self.effort.seconds is None else self.effort.seconds * share
        network.to(self.device).train()
        averaged = copy.deepcopy(network)
        optimiser = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
        checks = [objective.batch(held, torch.Generator().manual_seed(1000 + k)) for k in range(VALIDATION_REPEATS)]
        first = lowest = self._validate(averaged, checks)
        best, best_step, step = copy.deepcopy(averaged.state_dict()), 0, 0
        begin = clock.monotonic()
        order: list[torch.Tensor] = []
        with progress_bar(limit if seconds is None else round(seconds), self.progress, label) as advance:
            told = 0
            while step < limit:
                elapsed = clock.monotonic() - begin
                fraction = step / limit if seconds is None else max(step / limit, elapsed / seconds)
                if fraction >= 1:
                    break
                if not order:
                    order = list(rows[torch.randperm(len(rows), generator=generator)].split(self.batch_size))
                batch = objective.batch(order.pop(), generator)
                loss = self._loss(network, batch)
                if not torch.isfinite(loss):
                    raise StateError(
                        f"The {label} loss is not finite at step {step}. Lower learning_rate (now {self.learning_rate:g})."
                    )
                for group in optimiser.param_groups:
                    group["lr"] = self.learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * min(1.0, fraction)))
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                step += 1
                decay = min(self.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    for mean, now in zip(averaged.parameters(), network.parameters(), strict=True):
                        mean.lerp_(now, 1 - decay)
                if step % max(20, per_epoch) == 0 or step == limit:
                    found = self._validate(averaged, checks)
                    if found < lowest:
                        lowest, best_step = found, step
                        best = {k: v.clone() for k, v in averaged.state_dict().items()}
                now_told = step if seconds is None else min(round(seconds), round(clock.monotonic() - begin))
                advance(now_told - told)
                told = now_told
        network.load_state_dict(best)
        network.cpu().eval()
        return {"steps": step, "best_step": best_step, "validation_start": first, "validation_best": lowest}

    def _loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        condition = None if batch.condition is None else batch.condition.to(self.device)
        found = network(batch.x.to(self.device), batch.label.to(self.device), condition)
        loss: torch.Tensor = (found - batch.target.to(self.device)).square().mean()
        return loss

    @torch.no_grad()
    def _validate(self, network: nn.Module, batches: list[Batch]) -> float:
        network.eval()
        found = float(np.mean([float(self._loss(network, b)) for b in batches]))
        network.train()
        return found


def _train_prior(
    samples: Samples,
    climatology: str,
    anchor: str | None,
    width: int,
    optimiser: Optimiser,
    name: str | None,
    licence: str,
) -> DiffusionModel:
    names = [v.name for v in samples.variables]
    scaling = fit_scaling(samples.values, samples.time, names, cycle=climatology)
    z = standardise(scaling, samples.values, samples.time)
    fold = blocks(samples.time, len(z), FOLDS)
    final, crossed, note = _fit_anchors(z, samples, fold) if anchor is not None else (None, None, "none")
    torch.manual_seed(optimiser.seed)
    network_options = _network_options(len(names), 0, width, samples)
    network = build_network(network_options)
    states = torch.as_tensor(z, dtype=torch.float32).reshape(samples.values.shape)
    sigma_max = highest_sigma(final)
    objective = Denoising(states, torch.as_tensor(fold), crossed, SIGMA_MIN, sigma_max)
    report = optimiser.fit(network, objective, *_split(fold), 1.0, "training the prior")
    spec = ModelSpec(
        name or "trained-prior", "prior", "diffusion", samples.variables, samples.grid, scaling,
        options={"network": network_options, "sigma_max": sigma_max},
        training=_record(samples, optimiser, {"anchor": note}, report), licence=licence,
        description="Unconditional diffusion prior" + ("" if anchor is None else " with a Gaussian anchor"),
    )  # fmt: skip
    return DiffusionModel(spec, EDMDenoiser(network, final))


def _continue(
    samples: Samples,
    start: GenerativeModel | str | os.PathLike[str],
    optimiser: Optimiser,
    name: str | None,
    licence: str,
) -> DiffusionModel:
    before = start if isinstance(start, GenerativeModel) else load_model(start)
    if not isinstance(before, DiffusionModel):
        raise OptionError(
            f"start={before.spec.name!r} is a {before.spec.kind} model for {before.spec.task!r}; a diffusion prior is needed."
        )
    expected = [v.name for v in before.spec.variables]
    found = [v.name for v in samples.variables]
    if found != expected or before.spec.grid is None or not before.spec.grid.same_as(samples.grid):
        raise OptionError(
            f"start={before.spec.name!r} has variables {expected} on {before.spec.grid and before.spec.grid.describe()}; "
            f"ds has {found} on {samples.grid.describe()}. Both must be the same; leave out start to train from scratch."
        )
    values = np.stack([
        samples.values[:, c] * s + o
        for c, (s, o) in enumerate(metadata.unit_factors(str(a.units), str(b.units)) if a.units and b.units else (1.0, 0.0)
                                   for a, b in zip(samples.variables, before.spec.variables, strict=True))
    ], 1)  # fmt: skip
    z = standardise(before.scaling, values, samples.time)
    fold = blocks(samples.time, len(z), FOLDS)
    anchor = before.denoiser.anchor
    network = copy.deepcopy(before.denoiser.network).requires_grad_(True)
    states = torch.as_tensor(z, dtype=torch.float32).reshape(values.shape)
    objective = Denoising(
        states, torch.as_tensor(fold), None if anchor is None else [anchor] * FOLDS, SIGMA_MIN, before.sigma_max
    )
    report = optimiser.fit(network, objective, *_split(fold), 1.0, "fine-tuning the prior")
    training = _record(samples, optimiser, {"started_from": f"{before.spec.name} ({before.sha256[:12]})"}, report)
    spec = ModelSpec(
        name or f"{before.spec.name}-tuned", "prior", "diffusion", before.spec.variables, before.spec.grid, before.scaling,
        options=before.spec.options, training=training, licence=licence, description=before.spec.description,
    )  # fmt: skip
    return DiffusionModel(spec, EDMDenoiser(network, anchor))


def _train_downscaler(
    samples: Samples,
    factor: int,
    climatology: str,
    anchor: str | None,
    width: int,
    optimiser: Optimiser,
    name: str | None,
    licence: str,
) -> CorrectiveModel:
    names = [v.name for v in samples.variables]
    samples.grid.coarsened(factor)  # refuses a shape that is not a multiple
    scaling = fit_scaling(samples.values, samples.time, names, cycle=climatology)
    z = standardise(scaling, samples.values, samples.time)
    n, channels = len(z), len(names)
    fold = blocks(samples.time, n, FOLDS)
    final_map, crossed_maps, radius = conditional_map(z, samples.grid, channels, factor, fold, time_order(samples.time, n))
    shape = (n, channels, *samples.grid.shape)
    coarse = project_block_means(torch.as_tensor(z).reshape(shape), factor)  # each block mean, spread over its block
    rows = torch.as_tensor(z)
    linear = torch.stack([crossed_maps[f].apply(rows[i : i + 1])[0] for i, f in enumerate(fold)]).reshape(shape)
    residual = torch.as_tensor(z).reshape(shape) - linear
    spread = residual.square().mean(0).sqrt().clamp(min=1e-3).float()
    condition = torch.cat([coarse, linear], 1).float()
    train_rows, held = _split(fold)
    torch.manual_seed(optimiser.seed)
    regression_options = _network_options(channels, 2 * channels, width, samples)
    regression = build_network(regression_options)
    target = (residual.float() / spread).contiguous()
    first = optimiser.fit(regression, Regression(condition, target), train_rows, held, 0.3, "training the mean")
    useful = first["best_step"] > 0
    correction = torch.zeros(shape)
    if useful:
        with torch.no_grad():
            chunks = condition.split(64)
            correction = torch.cat([regression(torch.zeros(len(c), *shape[1:]), torch.zeros(len(c)), c) for c in chunks]) * spread
        correction = correction - project_block_means(correction, factor)
    left = (residual.float() - correction).double()
    unit = float(left.square().mean().sqrt())
    states = (left / unit).float()
    flat = states.double().reshape(n, -1).numpy()
    final, crossed, note = _fit_anchors(flat, samples, fold) if anchor is not None else (None, None, "none")
    network_options = _network_options(channels, 3 * channels, width, samples)
    network = build_network(network_options)
    sigma_max = highest_sigma(final)
    with_mean = torch.cat([condition, correction / unit], 1)
    objective = Denoising(states, torch.as_tensor(fold), crossed, SIGMA_MIN, sigma_max, with_mean)
    second = optimiser.fit(network, objective, train_rows, held, 0.7, "training the residual")
    extra = {"linear_map": radius, "anchor": note, **{f"mean_{k}": v for k, v in first.items()}}
    spec = ModelSpec(
        name or "trained-downscaler", "downscale", "diffusion", samples.variables, samples.grid, scaling, factor,
        options={"network": network_options, "regression": regression_options if useful else None, "sigma_max": sigma_max, "unit": unit},
        training=_record(samples, optimiser, extra, second), licence=licence,
        description=f"Regression of the mean and diffusion of the residual, from {factor}x{factor} block means",
    )  # fmt: skip
    return CorrectiveModel(spec, final_map, regression if useful else None, spread, EDMDenoiser(network, final))


def _fit_anchors(z: np.ndarray, samples: Samples, fold: np.ndarray) -> tuple[Any, Any, str]:
    """Return the anchor of all samples, one per fold fitted without it, and a note on the choice."""
    order = time_order(samples.time, len(z))
    scores = cross_validate(z[order], samples.grid, list(candidates(("eof",), samples.grid, z.shape, None, None, None)), 5)
    _, rank, inflation = max(scores, key=lambda c: scores[c])
    anomaly = z - z.mean(0)
    crossed = [fit_eofs(z[fold != k] - z[fold != k].mean(0), int(rank), inflation) for k in range(FOLDS)]
    return fit_eofs(anomaly, int(rank), inflation), crossed, f"eof, rank {int(rank)}, inflation {inflation:g}"


def _split(fold: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return training rows and the rows of the validation block, the last but one: late, yet inside the period."""
    held = fold == FOLDS - 2
    return torch.as_tensor(np.flatnonzero(~held)), torch.as_tensor(np.flatnonzero(held))


def _network_options(channels: int, condition: int, width: int, samples: Samples) -> dict[str, Any]:
    return {
        "channels": channels, "condition_channels": condition, "width": width, "multipliers": [1, 2, 2], "position": 2,
        "shape": list(samples.grid.shape), "periodic": samples.grid.periodic,
    }  # fmt: skip


def _record(samples: Samples, optimiser: Optimiser, extra: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    return {
        "samples": f"{len(samples.values)} along {samples.dimension}",
        "period": samples.period,
        **extra,
        **report,
        "validation_ratio": report["validation_best"] / report["validation_start"],
        "batch_size": optimiser.batch_size,
        "learning_rate": optimiser.learning_rate,
        "ema": optimiser.ema,
        "seed": optimiser.seed,
        "trained_on": datetime.date.today().isoformat(),
        "versions": f"xgenda {metadata.package_version()}, torch {torch.__version__}",
    }

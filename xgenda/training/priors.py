"""Training of diffusion priors, from scratch or from an existing one."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from xgenda import metadata
from xgenda.diffusion.anchors import Separable
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.trajectories import windows_of
from xgenda.errors import OptionError, StateError
from xgenda.models.diffusive import SIGMA_MIN, DiffusionModel, build_network, highest_sigma
from xgenda.models.fitting import fit_standardised, memory_length, standardise
from xgenda.models.generative import GenerativeModel
from xgenda.models.loading import load_model
from xgenda.models.spec import ModelSpec
from xgenda.training.anchoring import correlation_in_time, fit_anchors
from xgenda.training.defaults import warn_of_little
from xgenda.training.objectives import Denoising
from xgenda.training.optimiser import Optimiser
from xgenda.training.windows import FOLDS, Samples, blocks, spacing_of, split_rows, time_order


def train_prior(
    samples: Samples,
    climatology: str,
    transform: str | Mapping[str, str],
    offset: float | Mapping[str, float],
    bounds: Mapping[str, Sequence[float | None]] | None,
    anchor: str | None,
    window: int,
    periodic: Any,
    width: int,
    optimiser: Optimiser,
    name: str | None,
    licence: str,
) -> DiffusionModel:
    """Train an unconditional prior of one state, or of a window of states."""
    names = [v.name for v in samples.variables]
    fold = blocks(samples.time, len(samples.values), FOLDS)
    scaling, z = fit_standardised(
        samples.values,
        samples.time,
        names,
        fold,
        climatology,
        transform=transform,
        offset=offset,
        bounds=bounds,
        homogeneous=periodic == "both",
        valid=samples.valid,
    )
    warn_of_little(z, samples, stacklevel=4)
    kind = anchor or ("spectral" if periodic == "both" else "auto")  # without one in the denoiser, still for guidance
    if window > 1:
        check_windows(samples, fold, window)  # before the fit of the anchors, which takes long
    final, crossed, note = fit_anchors(z, samples, fold, kind, crossed=anchor is not None, cycle=scaling.cycle)
    if window > 1:
        memory = [correlation_in_time(z, samples, fold, window, without) for without in (None, *range(len(crossed)))]
        in_time = [Separable(space, m) for space, m in zip([final, *crossed], memory, strict=True)]
        final, crossed = in_time[0], list(in_time[1:])
        note += f", correlation {float(memory[0][1]):.2f} from one time to the next"
    order = time_order(samples.time, len(z)) if window == 1 else None  # windows are in order
    gap = memory_length(z, fold, time_order(samples.time, len(z)))
    z, fold, extra = _windows(samples, z, fold, window)
    channels = len(names) * window
    feeds_state = anchor is not None
    network_options = network_arguments(channels, channels if feeds_state else 0, width, samples, periodic)
    network = build_network(network_options)
    states = torch.as_tensor(z, dtype=torch.float32).reshape(len(z), channels, *samples.grid.plane)
    sigma_max = highest_sigma(final)
    objective = Denoising(
        states, torch.as_tensor(fold), None if anchor is None else crossed, SIGMA_MIN, sigma_max, feeds_state=feeds_state,
        shifts=int(periodic == "both"),
    )  # fmt: skip
    report = optimiser.fit(network, objective, *split_rows(fold, gap, order), 1.0, "training the prior")
    report["card"] = _card(anchor, report)
    spec = ModelSpec(
        name or "trained-prior", "prior", "diffusion", samples.variables, samples.grid, scaling,
        options={"network": network_options, "sigma_max": sigma_max, "feeds_state": feeds_state, **extra},
        training=record_of(samples, optimiser, {"anchor": "none" if anchor is None else note, "guidance_covariance": note}, report),
        licence=licence,
        description="Unconditional diffusion prior" + ("" if anchor is None else " with a Gaussian anchor"),
    )  # fmt: skip
    denoiser = EDMDenoiser(network, final if anchor is not None else None, feeds_state)
    return DiffusionModel(spec, denoiser, final, samples.valid)


def _windows(samples: Samples, z: np.ndarray, fold: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return windows of consecutive states instead of states; none straddles two blocks."""
    if window == 1:
        return z, fold, {}
    spacing = check_windows(samples, fold, window)
    order = time_order(samples.time, len(z))
    rows, folds = [], []
    for k in range(FOLDS):
        inside = order[fold[order] == k]
        states = torch.as_tensor(z[inside]).reshape(len(inside), 1, -1)
        rows.append(windows_of(states, window // 2).flatten(1).numpy())
        folds.append(np.full(len(rows[-1]), k))
    return np.concatenate(rows), np.concatenate(folds), {"window": window, "spacing": spacing}


def check_windows(samples: Samples, fold: np.ndarray, window: int) -> float:
    """Return the seconds between equally spaced times, of which every block must hold a window."""
    spacing = spacing_of(samples, time_order(samples.time, len(fold)))
    if np.bincount(fold, minlength=FOLDS).min() < window:
        raise StateError(
            f"window={window} needs at least {FOLDS * window} times for {FOLDS} blocks, and ds has {len(fold)}; use a shorter window."
        )
    return spacing


def _card(anchor: str | None, report: dict[str, Any]) -> str:
    """Say in a sentence what training was worth on the validation block."""
    if anchor is None:
        return "plain network; no classical answer to fall back on"
    if not report["correction_weight"]:
        return "the learned correction explained nothing on the validation block: its weight is zero, and this is the Gaussian"
    ratio = report["validation_best"] / report["validation_start"]
    return f"validation loss {ratio:.3f} of the Gaussian's, with the correction at weight {report['correction_weight']:.2f}"


def continue_prior(
    samples: Samples,
    start: GenerativeModel | str | os.PathLike[str],
    optimiser: Optimiser,
    name: str | None,
    licence: str,
) -> DiffusionModel:
    """Go on training an existing prior on other fields."""
    before = start if isinstance(start, GenerativeModel) else load_model(start)
    if not isinstance(before, DiffusionModel):
        raise OptionError(
            f"start={before.spec.name!r} is a {before.spec.kind} model for {before.spec.task!r}; a diffusion prior is needed."
        )
    if not np.array_equal(np.asarray(before.valid), np.asarray(samples.valid)):
        raise OptionError(f"start={before.spec.name!r} has another mask than ds; leave out start to train from scratch.")
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
    z, fold, extra = _windows(samples, z, blocks(samples.time, len(z), FOLDS), before.window)
    spacing = before.spec.options.get("spacing")
    if spacing is not None and abs(extra["spacing"] - spacing) > 0.01 * spacing:
        raise StateError(
            f"start={before.spec.name!r} is of states {spacing:g} seconds apart, and those of ds are {extra['spacing']:g} seconds apart. "
            f"Select such times, or leave out start to train from scratch."
        )
    anchor = before.denoiser.anchor
    network = build_network(before.spec.options["network"])
    network.load_state_dict(before.denoiser.network.state_dict())
    states = torch.as_tensor(z, dtype=torch.float32).reshape(len(z), -1, *samples.grid.plane)
    feeds_state = before.denoiser.feeds_state
    objective = Denoising(
        states, torch.as_tensor(fold), None if anchor is None else [anchor] * FOLDS, SIGMA_MIN, before.sigma_max,
        feeds_state=feeds_state, shifts=before.spec.options["network"]["periodic"] == "both",
    )  # fmt: skip
    report = optimiser.fit(network, objective, *split_rows(fold), 1.0, "fine-tuning the prior")
    training = record_of(samples, optimiser, {"started_from": f"{before.spec.name} ({before.sha256[:12]})"}, report)
    spec = ModelSpec(
        name or f"{before.spec.name}-tuned", "prior", "diffusion", before.spec.variables, before.spec.grid, before.scaling,
        options=before.spec.options, training=training, licence=licence, description=before.spec.description,
    )  # fmt: skip
    return DiffusionModel(spec, EDMDenoiser(network, anchor, feeds_state), before.covariance, before.valid)


def network_arguments(channels: int, condition: int, width: int, samples: Samples, periodic: Any = None) -> dict[str, Any]:
    """Return the arguments of the U-Net; on a doubly periodic grid no place differs from another."""
    periodic = samples.grid.periodic if periodic is None else periodic
    ny, nx = samples.grid.plane
    wrapped = (ny, nx) if periodic == "both" else (nx,) if periodic else ()
    # a periodic axis cannot be padded, so it decides how often the grid is halved
    halvings = next(h for h in (2, 1, 0) if all(n % 2**h == 0 for n in wrapped))
    return {
        "channels": channels, "condition_channels": condition, "width": width, "multipliers": [1, 2, 2][: halvings + 1],
        "position": 0 if periodic == "both" else 2, "shape": list(samples.grid.plane), "periodic": periodic,
    }  # fmt: skip


def record_of(samples: Samples, optimiser: Optimiser, extra: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return what the model file says of its training."""
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

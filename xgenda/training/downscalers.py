"""Training of downscalers: a linear mean, a regression of what it leaves, and a diffusion of the residual."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.tiles import TiledNetwork, Tiling, decorrelation_length, suggest_tile
from xgenda.errors import OptionError
from xgenda.models import means
from xgenda.models.background import BackgroundModel
from xgenda.models.centring import fit_centre
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.diffusive import SIGMA_MIN, build_network, highest_sigma
from xgenda.models.generative import GenerativeModel
from xgenda.models.parts import with_means
from xgenda.training.anchoring import fit_anchors
from xgenda.training.architectures import WIDTHS, check_architecture
from xgenda.training.calibrating import fitted_calibration, with_calibration
from xgenda.training.comparing import LARGEST_SAMPLED, Withheld
from xgenda.training.objectives import Denoising, Regression
from xgenda.training.optimiser import Objective, Optimiser
from xgenda.training.pairs import Pairs
from xgenda.training.pairstreams import Paired, PairStream
from xgenda.training.priors import network_arguments, record_of
from xgenda.training.standardising import Prepared, prepare_pairs, seen_cycle
from xgenda.training.statistics import has_seen, some_marks
from xgenda.training.transfer import continued_anchor, kept_arguments, thawed
from xgenda.training.tuning import (
    Inheritance,
    check_common,
    kept_mean,
    predicts_better,
    scales,
    starting_downscaler,
)
from xgenda.training.weighting import loss_weights
from xgenda.training.windows import FOLDS, HELD

STAGES = ("both", "residual", "single")
LARGEST_PLANE = 448  # rows or columns, above which tile='auto' makes tiles
LARGEST_ANCHOR = 200_000  # cells of a state, above which no Gaussian is fitted to the residual


@dataclass(frozen=True)
class Recipe:
    """How to build a downscaler; see `xgenda.train`."""

    climatology: str
    transform: str | Mapping[str, str]
    offset: float | Mapping[str, float]
    bounds: Mapping[str, Sequence[float | None]] | None
    anchor: str | None
    periodic: Any
    width: int | None
    architecture: str
    stages: str
    mean_condition: bool
    conserve: bool | str
    calibrate: bool
    cycle: str
    lead_time: bool
    tile: Any
    validation: Any = None
    freeze: str = "none"
    adapters: int | None = None
    task: str = "downscale"
    lag: float | None = None
    network_options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | Mapping[str, float] = "auto"

    @property
    def of_background(self) -> bool:
        """Whether the inputs are forecasts of the fields themselves, on their grid."""
        return self.task != "downscale"

    @property
    def gaussian(self) -> str | None:
        """Which Gaussian is fitted: of the errors of forecasts on a doubly periodic box, where all places are alike, a spectrum."""
        return "spectral" if self.anchor == "auto" and self.of_background and self.periodic == "both" else self.anchor


def train_downscaler(
    pairs: Pairs,
    recipe: Recipe,
    start: GenerativeModel | str | os.PathLike[str] | None,
    optimiser: Optimiser,
    name: str | None,
    licence: str,
) -> CorrectiveModel:
    """Train the fine fields behind coarse ones, or the truth behind a forecast of it."""
    before = None if start is None else starting_downscaler(start)
    if before is not None:
        recipe = _continued(recipe, before, pairs)
    known = name or (
        f"trained-{'downscaler' if recipe.task == 'downscale' else recipe.task}"
        if before is None
        else f"{before.spec.name}-tuned"
    )
    ready = prepare_pairs(
        pairs, recipe.climatology, recipe.transform, recipe.offset, recipe.bounds, recipe.cycle, known, "diffusion",
        licence, recipe.periodic == "both", recipe.validation, None if before is None else before.inputs.lead_time,
        recipe.task, recipe.lag,
    )  # fmt: skip
    assert ready.spec.scaling is not None
    inherited = None
    if before is not None:
        inherited = Inheritance(before, ready, recipe.freeze, recipe.adapters, optimiser.seed)
    conserve = _conserved(ready, recipe)
    _check_tile(recipe, pairs)
    counts = loss_weights(recipe.weights, ready.spec.variables, pairs.fine.grid, pairs.fine.valid)
    channels, plane = ready.shape[0], (ready.shape[1], ready.shape[2])
    fold = torch.as_tensor(ready.fold)
    train_rows, held = ready.split()
    chosen = (train_rows, held) if pairs.reservoir is None else pairs.reservoir.split(ready.reach)  # for the networks
    kinds: list[str] | None = None
    if recipe.of_background:
        linear, predicted, kinds, note = fit_centre(ready.for_mean(), recipe.periodic == "both")
        kind = "background"
    elif recipe.stages == "single":
        linear, predicted, kind, note = means.LinearMean(ready.shape), torch.zeros_like(ready.fine), "none", "none"
    else:
        linear, predicted, kind, note = means.fit_mean(ready.for_mean())
    kept = None
    if before is not None and recipe.stages != "single" and recipe.bounds is None:
        seen = has_seen(before.spec, pairs.fine.values, ready.spec.scaling)  # then it has no errors to learn from
        kept = None if seen else kept_mean(before, ready, pairs, recipe.validation)
    if before is not None and kept is not None and predicts_better(kept, (ready, predicted)):
        (ready, predicted), linear, kind = kept, before.mean, "none"  # it has seen none of these times
        note = f"that of {before.spec.name!r}: {before.spec.training.get('linear_mean', 'as it was')}"
    else:
        kept = None
    given = ready.features.of(ready.interpolated, ready.planes, ready.features.everywhere())
    stream = None
    if pairs.reservoir is not None:
        stream = PairStream(pairs.reservoir, ready, _crossed(ready, linear, kind, kinds, recipe), not linear.is_zero)
        predicted = stream.predicted()
    left = ready.fine - predicted
    recipe = _with_tile(recipe, left)
    arguments = _arguments(recipe, pairs)
    spread = left.square().mean(0).sqrt().clamp(min=1e-3).float()
    shifts = 0
    alike = ready.spec.factor if ready.spec.wraps else int(recipe.of_background and recipe.periodic == "both")
    if alike and pairs.statics is None and recipe.tile is None:
        shifts = alike  # all blocks, or all cells, are alike
        spread = spread.square().mean((1, 2), keepdim=True).sqrt().expand_as(spread).contiguous()
    if before is not None and kept is not None:  # the unit in which its network corrects its mean
        spread = before.spread.expand_as(spread).contiguous()
    regression, regression_options = None, None
    correct: Callable[[Tensor], Tensor] | None = None
    optimistic = torch.ones(channels, dtype=torch.float64)
    first: dict[str, Any] = {"best_step": 0}
    if recipe.stages == "both":
        condition = given if linear.is_zero else torch.cat([given, predicted.float()], 1)
        regression_options = arguments(
            channels, condition.shape[1], None if before is None else before.spec.options["regression"]
        )
        network = build_network(regression_options)
        went_on = inherited is not None and inherited.give("mean", network, mean=not linear.is_zero)
        task: Objective = Regression(condition, (left.float() / spread).contiguous(), recipe.tile, shifts, counts)
        if stream is not None:
            fields = stream.regression(spread)
            task = Paired(fields, Regression(None, fields, recipe.tile, shifts, counts))
        first = optimiser.fit(network, task, *chosen, 0.3, "mean")
        thawed(network)
        if (went_on or first["best_step"] > 0) and first["correction_weight"]:
            regression = network
            whole: nn.Module = network
            if recipe.tile is not None:  # as it will be asked
                stride = int(network.stride)
                shared = [stride * (t // 4 // stride) for t in recipe.tile]
                whole = TiledNetwork(
                    network, Tiling(plane, recipe.tile, (shared[0], shared[1]), multiple=stride), optimiser.batch_size
                )
            with torch.no_grad():
                found = [whole(torch.zeros(len(c), *ready.shape), torch.zeros(len(c)), c) for c in condition.split(16)]
            added = torch.cat(found).double() * spread
            if recipe.of_background:
                weight, grown = _earned(added, left, train_rows, held)
                spread = (spread * weight.float()[:, None, None]).contiguous()
                added, optimistic = added * weight[:, None, None], grown
                if not weight.any():
                    regression, regression_options = None, None
            if regression is not None:
                correct = corrected(whole, spread, optimiser.device)
            predicted = predicted + added
        else:
            regression_options = None
    if conserve is not None:
        predicted = _with_means(ready, pairs, predicted, conserve["channels"])
    linear_unit = _unit(left, recipe)
    left = ready.fine - predicted
    left[fold != HELD] *= optimistic[:, None, None]  # what a network has seen it predicts too well
    unit = _unit(left, recipe)
    states = (left / torch.tensor(unit, dtype=torch.float64).reshape(-1, 1, 1)).float()
    final, crossed, anchor_note = None, None, "none"
    if recipe.gaussian is not None and states[0].numel() <= LARGEST_ANCHOR:
        flat = states.double().flatten(1).numpy()
        final, crossed, anchor_note = fit_anchors(flat, pairs.fine, ready.fold, recipe.gaussian, progress=optimiser.progress)
    condition = torch.cat([predicted.float(), given], 1) if recipe.mean_condition else given
    network_options = arguments(channels, condition.shape[1], None if before is None else before.spec.options["network"])
    network = build_network(network_options)
    if inherited is not None:
        inherited.give("residual", network, mean=recipe.mean_condition)
    sigma_max = highest_sigma(final)
    reach = decorrelation_length(states)
    options = {
        **ready.spec.options, "network": network_options, "regression": regression_options, "sigma_min": SIGMA_MIN, "sigma_max": sigma_max,
        "sigma_data": 1.0, "unit": unit, "mean_condition": recipe.mean_condition, "conserve": conserve, "calibration": None,
        **suggested_tile(reach, recipe.tile, int(getattr(network, "stride", 1))),
    }  # fmt: skip
    spread = spread.reshape(channels, *plane)
    # what is scored or calibrated must not have seen the times of the validation: neither its mean nor its Gaussian
    scored = int(np.prod(ready.shape)) <= LARGEST_SAMPLED
    apart, without = linear, None if crossed is None else crossed[HELD]
    if stream is not None:
        apart = stream.linear[HELD]
    elif kinds is not None:
        apart = fit_centre(ready.for_mean().less(HELD), recipe.periodic == "both", kinds)[0]
    elif kind != "none" and (recipe.calibrate or scored):
        apart = means.fit_mean(ready.for_mean().less(HELD), (kind,), always=True)[0]

    def in_training(network: nn.Module, corrected: bool) -> CorrectiveModel:
        own = options if corrected else {**options, "regression": None, "unit": linear_unit}
        return (BackgroundModel if recipe.of_background else CorrectiveModel)(
            dataclasses.replace(ready.spec, options=own), apart, copy.deepcopy(regression) if corrected else None, spread,
            EDMDenoiser(network, without), ready.features.statics,
        )  # fmt: skip

    given_to = {"shifts": shifts, "tile": recipe.tile, "weights": counts}
    objective: Objective = Denoising(states, fold, crossed, SIGMA_MIN, sigma_max, condition, **given_to)
    if stream is not None:
        fields = stream.residual(unit, optimistic, recipe.mean_condition, correct, conserve)
        objective = Paired(fields, Denoising(fields, stream.fold, crossed, SIGMA_MIN, sigma_max, **given_to))
    # of a time the first stage has had its part
    share = 1.0 if recipe.stages != "both" or optimiser.effort.steps is None else 0.7
    withheld = Withheld(in_training, ready, pairs, held, optimiser.batch_size) if scored else None
    score = None if withheld is None else withheld.scores
    second = optimiser.fit(network, objective, *chosen, share, "residual", score, pairs.every.labels)
    thawed(network)
    worse = False
    if withheld is not None and without is not None and second["correction_weight"]:
        compared = withheld.compare(network)
        second["scores"] = compared.describe(ready.spec.variables)
        worse = compared.worse
        if worse:  # the denoising got better, and the members did not
            network.scale_output(0.0)
            second |= {"correction_weight": 0.0, "validation_best": second["validation_without"]}
    extra = {
        "linear_mean": note,
        "anchor": anchor_note,
        "marks": some_marks(pairs.fine.values),
        "residual_correlated_over": f"{reach[0]:.0f} rows, {reach[1]:.0f} columns",
        **{f"mean_{k}": v for k, v in first.items() if k != "history"},
        "card": _card(recipe, first if regression is not None else None, second, final is not None, worse),
        **({} if inherited is None else inherited.record),
    }
    second["history"] = {**first.get("history", {}), **second["history"]}
    spec = dataclasses.replace(
        ready.spec, options=options, training=record_of(pairs.every.size, pairs.fine.dimension, pairs.every.period, optimiser, extra, second),
        description=_description(recipe, conserve is not None),
    )  # fmt: skip
    built = (BackgroundModel if recipe.of_background else CorrectiveModel)(
        spec, linear, regression, spread, EDMDenoiser(network, final), ready.features.statics
    )
    if not recipe.calibrate:
        return built
    return with_calibration(built, fitted_calibration(in_training(network, True), ready, pairs, held))


def _crossed(
    ready: Prepared, linear: means.LinearMean, kind: str, kinds: list[str] | None, recipe: Recipe
) -> list[means.LinearMean]:
    """Return linear means of the same kind, fitted without each block of times."""
    if kinds is not None:
        return [fit_centre(ready.for_mean().less(k), recipe.periodic == "both", kinds)[0] for k in range(FOLDS)]
    if kind == "none":  # nothing was fitted
        return [linear] * FOLDS
    return [means.fit_mean(ready.for_mean().less(k), (kind,), always=True)[0] for k in range(FOLDS)]


def corrected(network: nn.Module, spread: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function that gives what a regression adds to the linear mean, float64, of its inputs."""
    asked = copy.deepcopy(network).to(device).eval()

    def found(condition: Tensor) -> Tensor:
        nothing = torch.zeros(len(condition), *spread.shape, device=device)
        added: Tensor = asked(nothing, nothing[:, 0, 0, 0], condition.to(device)).cpu().double() * spread.double()
        return added

    return found


def _description(recipe: Recipe, conserved: bool) -> str:
    if recipe.of_background:
        return "Diffusion of the error of a forecast" if recipe.lag is None else "Diffusion of what a state becomes"
    return "Regression of the mean and diffusion of the residual" + (", block means kept" if conserved else "")


def _unit(left: Tensor, recipe: Recipe) -> float | list[float]:
    """Return the standard deviation of residuals: one for all channels, or of the error of a forecast that of each."""
    if not recipe.of_background:
        return float(left.square().mean().sqrt())
    found: list[float] = left.square().mean((0, 2, 3)).sqrt().clamp(min=1e-6).tolist()
    return found


def _earned(added: Tensor, left: Tensor, train: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a regression is worth, channel by channel, so that none is made worse than without it.

    Returns
    -------
    Tensor, Tensor
        The weight of each channel that predicts the validation block best, 0 to 1; and how much larger the error is there, relative to that
        without the network, than on what it was trained on.
    """

    def total(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((0, 2, 3))

    power = total(added[held], added[held])
    weight = torch.where(power > 0, total(added[held], left[held]) / power.clamp(min=1e-300), 0.0).clamp(0.0, 1.0)
    kept = left - weight[:, None, None] * added
    share = [total(kept[r], kept[r]) / total(left[r], left[r]).clamp(min=1e-300) for r in (held, train)]
    return weight, (share[0] / share[1].clamp(min=1e-300)).sqrt().clamp(min=1.0)


def _continued(recipe: Recipe, before: CorrectiveModel, pairs: Pairs) -> Recipe:
    """Return the recipe with what the networks of the other model fix."""
    check_common(before, pairs.fine.variables)
    network, plain = before.spec.options["network"], before.denoiser.anchor is None
    architecture = network.get("architecture", "unet")
    check_architecture(recipe.architecture, architecture, recipe.network_options)
    anchor = continued_anchor(before, plain, before.spec.training.get("anchor", "auto"), recipe.anchor, recipe.width)
    if not plain:
        size = len(pairs.fine.variables) * pairs.fine.grid.size
        found = f"tile={recipe.tile} cuts the grid" if recipe.tile is not None else f"the fine fields have {size} values each"
        if recipe.tile is not None or size > LARGEST_ANCHOR:
            raise OptionError(
                f"start={before.spec.name!r} corrects a Gaussian of the whole grid, and {found}, of at most {LARGEST_ANCHOR} values. Start from a "
                f"model that was trained with anchor=None, or leave out start."
            )
    climatology, transform, offset = scales(before, recipe.climatology, recipe.transform, recipe.offset)(
        pairs.every, pairs.coarse
    )
    time, cycle = pairs.every.time, recipe.cycle
    if cycle == "auto" and time is not None:  # what the networks know, and what the times go through
        both = {*before.inputs.cycle.split("+"), *seen_cycle("auto", time).split("+")}
        cycle = "+".join(part for part in ("dayofyear", "hour") if part in both) or "none"
    return dataclasses.replace(
        recipe, anchor=anchor, transform=transform, offset=offset, climatology=climatology, cycle=cycle, architecture=architecture,
        width=network.get("width"), periodic="both" if before.spec.wraps or network.get("periodic") == "both" else recipe.periodic,
    )  # fmt: skip


def _conserved(ready: Prepared, recipe: Recipe) -> dict[str, Any] | None:
    """Return what is kept of the coarse fields: block means, where 'auto' finds that they are these."""
    if recipe.conserve is True and ready.weights is None:
        raise OptionError(
            "conserve=True needs coarse fields that are the block means of the fine ones, of the same variables on a rectilinear grid, and these "
            "are not. Leave it out, or make them: fine.coarsen(latitude=4, longitude=4).mean()"
        )
    if recipe.conserve is False or ready.weights is None:
        return None
    inputs = ready.spec.inputs
    assert inputs is not None
    names = [v.name for v in inputs.variables]
    found = [names.index(v.name) for v in ready.spec.variables]
    return {"weights": ready.weights, "channels": list(range(len(found))), "inputs": found}


def _with_means(ready: Prepared, pairs: Pairs, z: Tensor, channels: Sequence[int]) -> Tensor:
    """Return standardised predictions with the block means of the true fields, as sampling has them."""
    scaling, built = ready.spec.scaling, ready.for_mean().blocks
    assert scaling is not None
    assert built is not None
    means_of_blocks = built.mean(torch.as_tensor(pairs.fine.values))[:, list(channels)]
    climatology = torch.tensor(pairs.climatology(scaling))
    return with_means(z, built, means_of_blocks, channels, scaling, torch.as_tensor(scaling.std), climatology)


def _with_tile(recipe: Recipe, residual: Tensor) -> Recipe:
    """Return the recipe with a tile where 'auto' was asked for, and without a Gaussian of the whole grid where there are tiles."""
    if recipe.tile == "auto":
        plane = tuple(residual.shape[-2:])
        recipe = dataclasses.replace(recipe, tile=None if max(plane) <= LARGEST_PLANE else suggest_tile(residual, stride=4)[0])
    return recipe if recipe.tile is None else dataclasses.replace(recipe, anchor=None)


def _card(recipe: Recipe, mean: Mapping[str, Any] | None, residual: Mapping[str, Any], gaussian: bool, worse: bool) -> str:
    """Say what each network was worth on the validation block; `mean` is the report of the first one where it was kept."""
    parts = []
    if mean is not None:
        ratio = mean["validation_best"] / mean["validation_without"]
        parts.append(
            f"mean: validation loss {ratio:.3f} of the linear mean's, with the correction at weight {mean['correction_weight']:.2f}"
        )
    elif recipe.stages == "both":
        parts.append(
            "mean: the learned correction explained nothing on the validation block: its weight is zero, and this is the linear mean"
        )
    else:
        parts.append("mean: linear, without a network" if recipe.stages == "residual" else "mean: none, as stages='single' asks")
    classical = "a Gaussian" if gaussian else "independent errors in all cells"
    if residual["correction_weight"]:
        ratio = residual["validation_best"] / residual["validation_without"]
        weight = residual["correction_weight"]
        text = f"validation loss {ratio:.3f} of that of {classical}, with the correction at weight {weight:.2f}"
    else:
        why = "did not make the members better" if worse else "explained nothing on the validation block"
        text = f"the learned correction {why}: its weight is zero, and this is {classical}"
    return "; ".join([*parts, f"residual: {text}"])


def _check_tile(recipe: Recipe, pairs: Pairs) -> None:
    if recipe.tile is not None and recipe.architecture == "mesh":  # that of start
        raise OptionError("start has mesh networks, which see the whole grid; leave out tile.")
    if recipe.tile is not None and recipe.periodic == "both":
        raise OptionError(
            "tile cuts a doubly periodic box, around which the network goes on; leave out tile, or periodic='both'."
        )
    if recipe.tile is None or isinstance(recipe.tile, str):
        return
    if recipe.anchor is not None and recipe.anchor != "auto":
        raise OptionError(f"anchor={recipe.anchor!r} is a Gaussian of the whole grid, which tile cuts; pass anchor=None.")
    for t, n, axis in zip(recipe.tile, pairs.fine.grid.plane, ("rows", "columns"), strict=True):
        if t > n:
            raise OptionError(f"tile={recipe.tile} is larger than the {n} {axis} of the fine grid; leave it out.")


def _arguments(recipe: Recipe, pairs: Pairs) -> Any:
    """Return the function that makes the arguments of a network with so many channels and conditions, like another one's where given."""
    width = recipe.width or WIDTHS[recipe.architecture]

    def make(channels: int, condition: int, before: Mapping[str, Any] | None) -> dict[str, Any]:
        periodic = False if recipe.tile is not None else recipe.periodic
        found = network_arguments(channels, condition, width, pairs.fine, periodic, recipe.architecture, recipe.network_options)
        if recipe.architecture == "songunet":
            found = {
                "architecture": "songunet", "in_channels": channels + condition + 2, "out_channels": channels, "shape": found["shape"],
                "width": width, "multipliers": found["multipliers"], "blocks": 2, "grid": "linear", "grid_channels": 2,
            }  # fmt: skip
        return found if before is None else kept_arguments(found, before)

    return make


def suggested_tile(lengths: tuple[float, float], tile: tuple[int, int] | None, stride: int) -> dict[str, Any]:
    """Return the options of tiles: those of the training with the overlap that the residual needs, and the halo of chunks."""
    reach = max(lengths)
    steps = max(1, math.ceil(reach / 2 / stride))
    out: dict[str, Any] = {"tile": None, "overlap": None, "halo": stride * max(2, math.ceil(reach / stride))}
    if tile is not None:
        out |= {"tile": list(tile), "overlap": [stride * min(steps, t // stride // 2) for t in tile]}
    return out

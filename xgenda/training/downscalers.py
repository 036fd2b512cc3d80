"""Training of downscalers: a linear mean, a regression of what it leaves, and a diffusion of the residual."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from xgenda import metadata
from xgenda.diffusion.anchors import Anchor
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.tiles import TiledNetwork, Tiling, decorrelation_length, suggest_tile
from xgenda.errors import GridError, OptionError
from xgenda.grids import rectilinear
from xgenda.models import means
from xgenda.models.blocks import Blocks, find_blocks
from xgenda.models.calibration import Calibration, fit_calibration
from xgenda.models.checkpoints import content_hash
from xgenda.models.conditions import Conditions, planes_of
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.diffusive import SIGMA_MIN, build_network, highest_sigma
from xgenda.models.features import Features
from xgenda.models.generative import GenerativeModel, Request, SamplingOptions
from xgenda.models.loading import load_model
from xgenda.models.spec import ModelSpec
from xgenda.scaling import Scaling, cycle_basis, fit_scaling
from xgenda.training.objectives import Denoising, Regression
from xgenda.training.optimiser import Optimiser
from xgenda.training.pairs import Pairs, as_described, read_pairs
from xgenda.training.priors import FOLDS, HELD, fit_anchors, network_arguments, record_of, split_rows
from xgenda.training.windows import blocks

STAGES = ("both", "residual", "single")
LARGEST_PLANE = 448  # rows or columns, above which tile='auto' makes tiles
LARGEST_ANCHOR = 200_000  # cells of a state, above which no Gaussian is fitted to the residual
CALIBRATION_TIMES, CALIBRATION_MEMBERS = 24, 8


@dataclass(frozen=True)
class Recipe:
    """How to build a downscaler; see `xgenda.train`."""

    climatology: str
    transform: str | Mapping[str, str]
    offset: float | Mapping[str, float]
    bounds: Mapping[str, Sequence[float | None]] | None
    anchor: str | None
    periodic: Any
    width: int
    architecture: str
    stages: str
    mean_condition: bool
    conserve: bool | str
    calibrate: bool
    cycle: str
    lead_time: bool
    tile: Any


@dataclass(frozen=True, eq=False)
class Prepared:
    """Standardised pairs, and what standardised them.

    Attributes
    ----------
    spec
        Without options and training record.
    fine
        Standardised, shape (n, channels, rows, columns), float64.
    coarse
        Standardised, shape (n, inputs, coarse cells), float64.
    planes
        Shape (n, planes).
    interpolated, features
        On the fine grid, see `Features`.
    fold
        Block of each pair.
    matched
        See `xgenda.models.means.Pairs`.
    weights
        Where coarse fields are block means of the fine ones.
    """

    spec: ModelSpec
    fine: Tensor
    coarse: Tensor
    planes: Tensor
    interpolated: Tensor
    features: Features
    fold: np.ndarray
    matched: list[tuple[int, float] | None]
    weights: str | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the fine fields."""
        c, ny, nx = self.fine.shape[1:]
        return c, ny, nx

    def for_mean(self) -> means.Pairs:
        """Return what `means.fit_mean` takes."""
        built = None
        grid = None if self.weights is None else rectilinear(self.spec.grid, "task='downscale'")
        if grid is not None and self.weights is not None:
            built = Blocks(grid, int(self.spec.factor or 0), self.weights)
        return means.Pairs(self.coarse, self.interpolated, self.fine, self.fold, self.matched, built, grid, self.spec.wraps)


def prepare_pairs(
    pairs: Pairs, climatology: str, transform: Any, offset: Any, bounds: Any, cycle: str, name: str, kind: str, licence: str,
    homogeneous: bool = False,
) -> Prepared:  # fmt: skip
    """Fit the standardisation of both sides, and put everything on the fine grid."""
    time = pairs.fine.time
    fine_names, coarse_names = ([v.name for v in s.variables] for s in (pairs.fine, pairs.coarse))
    _check_named(transform, offset, bounds, fine_names + coarse_names)

    def fit(values: np.ndarray, names: list[str]) -> Scaling:
        limits = None if bounds is None else {k: v for k, v in bounds.items() if k in names}
        return fit_scaling(
            values, time, names, cycle=climatology, transform=transform, offset=offset, bounds=limits, homogeneous=homogeneous
        )

    scaling, input_scaling = fit(pairs.fine.values, fine_names), fit(pairs.inputs(0), coarse_names)
    unit = None
    if pairs.lead is not None:
        unit = float(max(np.abs(pairs.lead).max(), 1.0))
    conditions = Conditions(
        pairs.coarse.variables,
        pairs.coarse.grid,
        input_scaling,
        pairs.offsets,
        pairs.spacing,
        _cycle(cycle, time),
        unit,
        pairs.static_names,
    )
    statics = None if pairs.statics is None else torch.as_tensor(pairs.statics).float()
    spec = ModelSpec(
        name, "downscale", kind, pairs.fine.variables, pairs.fine.grid, scaling, pairs.factor, inputs=conditions, licence=licence,
        options={"target": dict(pairs.target), **({"wraps": True} if homogeneous and pairs.factor is not None else {})},
    )  # fmt: skip
    return standardised_pairs(pairs, spec, Features(conditions, pairs.fine.grid, statics, spec.wraps))


def standardised_pairs(pairs: Pairs, spec: ModelSpec, features: Features) -> Prepared:
    """Return pairs as a model standardises them, and everything on the fine grid."""
    scaling, conditions = spec.scaling, features.conditions
    assert scaling is not None
    time, n, input_scaling = pairs.fine.time, len(pairs.fine.values), conditions.scaling
    fine_names, coarse_names = ([v.name for v in s.variables] for s in (pairs.fine, pairs.coarse))
    z_in = []
    for k in range(len(pairs.offsets)):
        around = None if pairs.coarse.time is None else pairs.coarse.time.isel({pairs.coarse.time.dims[0]: pairs.places[:, k]})
        z_in.append(input_scaling.forward(pairs.inputs(k), cycle_basis(around, input_scaling.cycle, n)))
    coarse = torch.as_tensor(np.concatenate(z_in, 1)).flatten(2)
    fine = torch.as_tensor(scaling.forward(pairs.fine.values, cycle_basis(time, scaling.cycle, n)))
    matched: list[tuple[int, float] | None] = [None] * len(fine_names)
    for c, v in enumerate(fine_names):
        if v not in coarse_names:
            continue
        i = coarse_names.index(v)
        if (scaling.transforms[c], scaling.offsets[c]) == (input_scaling.transforms[i], input_scaling.offsets[i]):
            matched[c] = (i, float(input_scaling.std[i].mean() / scaling.std[c].mean()))
    weights = None
    common = [(c, coarse_names.index(m)) for c, m in enumerate(fine_names) if m in coarse_names]
    if pairs.factor is not None and len(common) == len(fine_names):
        grid = rectilinear(pairs.fine.grid, "task='downscale'")
        weights = find_blocks(pairs.inputs(0)[:, [k for _, k in common]], pairs.fine.values, grid, pairs.factor, scaling)
    planes = torch.as_tensor(planes_of(time, conditions.cycle, pairs.lead, conditions.lead_time, n))
    interpolated = features.interpolated(coarse, features.everywhere())
    return Prepared(spec, fine, coarse, planes, interpolated, features, blocks(time, n, FOLDS), matched, weights)


def _check_named(transform: Any, offset: Any, bounds: Any, names: list[str]) -> None:
    for argument, given in (("transform", transform), ("offset", offset), ("bounds", bounds)):
        strange = [k for k in given if k not in names] if isinstance(given, Mapping) else []
        if strange:
            raise OptionError(
                f"{argument} names {strange[0]!r}, and the variables are {', '.join(map(repr, dict.fromkeys(names)))}."
            )


def _cycle(asked: str, time: xr.DataArray | None) -> str:
    """Return which harmonics are inputs; 'auto': those that the training times go through."""
    if asked != "auto":
        if asked != "none" and time is None:
            raise OptionError(f"time_features={asked!r} needs a time coordinate, and the fields have none; leave it out.")
        return asked
    if time is None:
        return "none"
    hours, months = len(np.unique(time.dt.hour)), len(np.unique(time.dt.month))
    return "+".join(n for n, count in (("dayofyear", months), ("hour", hours)) if count > 1) or "none"


def train_downscaler(pairs: Pairs, recipe: Recipe, optimiser: Optimiser, name: str | None, licence: str) -> CorrectiveModel:
    """Train the fine fields behind coarse ones."""
    ready = prepare_pairs(
        pairs, recipe.climatology, recipe.transform, recipe.offset, recipe.bounds, recipe.cycle, name or "trained-downscaler", "diffusion",
        licence, recipe.periodic == "both",
    )  # fmt: skip
    conserve = _conserved(ready, recipe)
    _check_tile(recipe, pairs)
    channels, plane = ready.shape[0], (ready.shape[1], ready.shape[2])
    everywhere = ready.features.everywhere()
    given = ready.features.of(ready.interpolated, ready.planes, everywhere)
    fold = torch.as_tensor(ready.fold)
    train_rows, held = split_rows(ready.fold)
    if recipe.stages == "single":
        linear, predicted, kind, note = means.LinearMean(ready.shape), torch.zeros_like(ready.fine), "none", "none"
    else:
        linear, predicted, kind, note = means.fit_mean(ready.for_mean())
    left = ready.fine - predicted
    recipe = _with_tile(recipe, left)
    arguments = _arguments(recipe, pairs)
    spread = left.square().mean(0).sqrt().clamp(min=1e-3).float()
    shifts = 0
    if ready.spec.wraps and ready.spec.factor and pairs.statics is None and recipe.tile is None:
        shifts = ready.spec.factor  # all blocks are alike
        spread = spread.square().mean((1, 2), keepdim=True).sqrt().expand_as(spread).contiguous()
    regression, regression_options, first = None, None, {"best_step": 0}
    if recipe.stages == "both":
        condition = given if linear.is_zero else torch.cat([given, predicted.float()], 1)
        regression_options = arguments(channels, condition.shape[1])
        network = build_network(regression_options)
        first = optimiser.fit(
            network,
            Regression(condition, (left.float() / spread).contiguous(), recipe.tile, shifts),
            train_rows,
            held,
            0.3,
            "training the mean",
        )
        if first["best_step"] > 0 and first["correction_weight"]:
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
            predicted = predicted + torch.cat(found).double() * spread
        else:
            regression_options = None
    if conserve is not None:
        predicted = _with_means(ready, predicted)
    left = ready.fine - predicted
    unit = float(left.square().mean().sqrt())
    states = (left / unit).float()
    final, crossed, anchor_note = None, None, "none"
    if recipe.anchor is not None and states[0].numel() <= LARGEST_ANCHOR:
        flat = states.double().flatten(1).numpy()
        final, crossed, anchor_note = fit_anchors(flat, pairs.fine, ready.fold, recipe.anchor)
    condition = torch.cat([predicted.float(), given], 1) if recipe.mean_condition else given
    network_options = arguments(channels, condition.shape[1])
    network = build_network(network_options)
    sigma_max = highest_sigma(final)
    objective = Denoising(states, fold, crossed, SIGMA_MIN, sigma_max, condition, shifts=shifts, tile=recipe.tile)
    second = optimiser.fit(network, objective, train_rows, held, 1.0 if recipe.stages != "both" else 0.7, "training the residual")
    reach = decorrelation_length(states)
    extra = {
        "linear_mean": note,
        "anchor": anchor_note,
        "residual_correlated_over": f"{reach[0]:.0f} rows, {reach[1]:.0f} columns",
        **{f"mean_{k}": v for k, v in first.items()},
    }
    options = {
        **ready.spec.options, "network": network_options, "regression": regression_options, "sigma_min": SIGMA_MIN, "sigma_max": sigma_max,
        "sigma_data": 1.0, "unit": unit, "mean_condition": recipe.mean_condition, "conserve": conserve, "calibration": None,
        **suggested_tile(reach, recipe.tile, int(getattr(network, "stride", 1))),
    }  # fmt: skip
    spec = dataclasses.replace(
        ready.spec, options=options, training=record_of(pairs.fine, optimiser, extra, second),
        description="Regression of the mean and diffusion of the residual" + ("" if conserve is None else ", block means kept"),
    )  # fmt: skip
    spread = spread.reshape(channels, *plane)

    def build(mean: means.LinearMean, anchor: Anchor | None) -> CorrectiveModel:
        return CorrectiveModel(spec, mean, regression, spread, EDMDenoiser(network, anchor), ready.features.statics)

    built = build(linear, final)
    if not recipe.calibrate:
        return built
    # what is calibrated must not have seen the times of the calibration: neither its mean nor its Gaussian
    apart = linear if kind == "none" else means.fit_mean(ready.for_mean().less(HELD), (kind,), always=True)[0]
    trial = build(apart, None if crossed is None else crossed[HELD])
    return with_calibration(built, fitted_calibration(trial, ready, pairs, held))


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


def _with_means(ready: Prepared, z: Tensor) -> Tensor:
    """Return standardised predictions with the block means of the true fields, where that is a matter of adding a number."""
    scaling, built = ready.spec.scaling, ready.for_mean().blocks
    if scaling is None or built is None:
        return z
    out = z.clone()
    for c, (transform, (low, _)) in enumerate(zip(scaling.transforms, scaling.bounds, strict=True)):
        if transform == "none" and low == -np.inf:
            out[:, c] = built.added(z[:, c], built.mean(ready.fine[:, c]))
    return out


def _with_tile(recipe: Recipe, residual: Tensor) -> Recipe:
    """Return the recipe with a tile where 'auto' was asked for, and without a Gaussian of the whole grid where there are tiles."""
    if recipe.tile == "auto":
        plane = tuple(residual.shape[-2:])
        recipe = dataclasses.replace(recipe, tile=None if max(plane) <= LARGEST_PLANE else suggest_tile(residual, stride=4)[0])
    return recipe if recipe.tile is None else dataclasses.replace(recipe, anchor=None)


def _check_tile(recipe: Recipe, pairs: Pairs) -> None:
    if recipe.tile is None or isinstance(recipe.tile, str):
        return
    if recipe.anchor is not None and recipe.anchor != "auto":
        raise OptionError(f"anchor={recipe.anchor!r} is a Gaussian of the whole grid, which tile cuts; pass anchor=None.")
    for t, n, axis in zip(recipe.tile, pairs.fine.grid.plane, ("rows", "columns"), strict=True):
        if t > n:
            raise OptionError(f"tile={recipe.tile} is larger than the {n} {axis} of the fine grid; leave it out.")


def _arguments(recipe: Recipe, pairs: Pairs) -> Any:
    """Return the function that makes the arguments of a network with so many channels and conditions."""

    def make(channels: int, condition: int) -> dict[str, Any]:
        periodic = False if recipe.tile is not None else recipe.periodic
        found = network_arguments(channels, condition, recipe.width, pairs.fine, periodic)
        if recipe.architecture == "unet":
            return found
        return {
            "architecture": "songunet", "in_channels": channels + condition + 2, "out_channels": channels, "shape": found["shape"],
            "width": recipe.width, "multipliers": found["multipliers"], "blocks": 2, "grid": "linear", "grid_channels": 2,
        }  # fmt: skip

    return make


def suggested_tile(lengths: tuple[float, float], tile: tuple[int, int] | None, stride: int) -> dict[str, Any]:
    """Return the options of tiles: those of the training with the overlap that the residual needs, and the halo of chunks."""
    reach = max(lengths)
    steps = max(1, math.ceil(reach / 2 / stride))
    out: dict[str, Any] = {"tile": None, "overlap": None, "halo": stride * max(2, math.ceil(reach / stride))}
    if tile is not None:
        out |= {"tile": list(tile), "overlap": [stride * min(steps, max(1, t // stride // 2)) for t in tile]}
    return out


def calibrate(
    model: GenerativeModel | str | os.PathLike[str],
    ds: xr.Dataset | xr.DataArray,
    target: xr.Dataset | xr.DataArray | None = None,
) -> CorrectiveModel:
    """Return a downscaling model with the spread of its members corrected by scale on data that it was not trained on.

    The residuals of the members are split into four scales, and each is multiplied by a factor per variable, with which the error of the
    ensemble mean and the spread agree on the data. Stored with the model.

    Parameters
    ----------
    model
        Of `train` with task 'downscale', or its name or path.
    ds
        Coarse fields; without `target` the fine ones, for a model that was trained on their block means. At least 2 times, better 20.
    target
        The fine fields at the same times.

    Returns
    -------
    GenerativeModel
        A new one; ``spec.training["calibration"]`` has the factors.

    Raises
    ------
    OptionError, GridError, UnitsError
        If the model is no diffusion model for downscaling, or the data are not on its grids or lack one of its variables.
    """
    model = model if isinstance(model, GenerativeModel) else load_model(model)
    if not isinstance(model, CorrectiveModel):
        raise OptionError(
            f"model={model.spec.name!r} is no diffusion model for downscaling; train one: xgenda.train(fine, task='downscale', factor=4)"
        )
    spec, inputs = model.spec, model.inputs
    if target is None:
        if spec.factor is None or [v.name for v in inputs.variables] != [v.name for v in spec.variables]:
            raise OptionError(
                f"model={spec.name!r} takes {', '.join(v.name for v in inputs.variables)} on {inputs.grid.describe()}, which are no means of "
                f"fine fields; give both: xgenda.calibrate(model, coarse, fine)"
            )
        ds = as_described(ds, spec.variables)
    else:
        ds, target = as_described(ds, inputs.variables), as_described(target, spec.variables, "target")
    pairs = read_pairs(
        ds, target, spec.factor if target is None else None, variables=None, statics=None, offsets=inputs.offsets,
        lead_time=inputs.lead_time is not None, fewest=2, weights="cells" if model.conserved is None else model.conserved.weights,
        spacing=inputs.spacing,
    )  # fmt: skip
    for what, found, expected in (("fine", pairs.fine.grid, spec.grid), ("coarse", pairs.coarse.grid, inputs.grid)):
        if expected is None or not expected.same_as(found):
            raise GridError(
                f"model={spec.name!r} has {what} fields on {expected and expected.describe()}; those given are on {found.describe()}."
            )
    ready = standardised_pairs(pairs, spec, model.features)
    plain = with_calibration(model, None)
    return with_calibration(plain, fitted_calibration(plain, ready, pairs, torch.arange(len(ready.fine))))


def with_calibration(model: CorrectiveModel, found: Calibration | None) -> CorrectiveModel:
    """Return the model with other factors."""
    given = None if found is None else {"widths": list(found.widths), "factors": [list(f) for f in found.factors]}
    note = "none" if found is None else "; ".join(", ".join(f"{f:.2f}" for f in row) for row in found.factors)
    spec = dataclasses.replace(
        model.spec, options={**model.spec.options, "calibration": given}, training={**model.spec.training, "calibration": note}
    )
    out = CorrectiveModel(spec, model.mean, model.regression, model.spread, model.denoiser, model.statics)
    out.sha256 = content_hash(out)
    return out


def fitted_calibration(model: CorrectiveModel, ready: Prepared, pairs: Pairs, among: Tensor) -> Calibration:
    """Return the factors that a few of some times ask for."""
    rows = among[torch.linspace(0, len(among) - 1, min(CALIBRATION_TIMES, len(among))).round().long()].unique()
    scaling = model.scaling
    time = None if pairs.fine.time is None else pairs.fine.time.isel({pairs.fine.time.dims[0]: rows.numpy()})
    climatology = np.broadcast_to(scaling.climatology(cycle_basis(time, scaling.cycle, len(rows))), (len(rows), *ready.shape))
    request = Request(
        model.inputs.grid, torch.as_tensor(np.concatenate([pairs.inputs(k)[rows] for k in range(len(pairs.offsets))], 1)).flatten(2),
        torch.as_tensor(climatology.copy()).flatten(2), [], list(map(str, metadata.time_labels(time, len(rows)))),
        range(CALIBRATION_MEMBERS), 0, model.plan(SamplingOptions(tile="auto")), torch.device("cpu"), lambda _: None,
        standardised=ready.coarse[rows], planes=ready.planes[rows],
    )  # fmt: skip
    mean, members = model.deviations(request)
    scale = float(model.spec.factor or _ratio(model))
    return fit_calibration(ready.fine[rows] - mean, members, (2 * scale, scale / 2, scale / 8), model.without_means)


def _ratio(model: CorrectiveModel) -> float:
    """Return the cells of the fine grid along one side of a coarse one, roughly."""
    fine, coarse = model.grid, model.inputs.grid
    return max(2.0, float(np.sqrt(fine.size / coarse.size)))

"""Fits of the classical downscalers, and of the errors that they made on times they were not fitted to."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from xgenda import weights
from xgenda.errors import OptionError
from xgenda.grids import rectilinear
from xgenda.models import means
from xgenda.models.blocks import Blocks
from xgenda.models.classical import ClassicalModel, mapped_quantiles
from xgenda.scaling import cycle_basis, fit_scaling
from xgenda.training.downscalers import Recipe
from xgenda.training.pairs import Pairs
from xgenda.training.standardising import Prepared, prepare_pairs
from xgenda.training.windows import FOLDS, evenly_spaced

LARGEST_ERRORS = 20_000_000  # numbers to store
QUANTILES = 101


def train_classical(pairs: Pairs, method: str, recipe: Recipe, name: str | None, licence: str) -> ClassicalModel:
    """Fit 'bilinear', 'bcsd' or 'ridge' to pairs, and keep some of its errors on withheld blocks."""
    ready = prepare_pairs(
        pairs,
        recipe.climatology,
        recipe.transform,
        recipe.offset,
        recipe.bounds,
        "none",
        name or f"trained-{method}",
        method,
        licence,
        recipe.periodic == "both",
        recipe.validation,
    )
    matched = _matched(ready, method)
    spec = dataclasses.replace(
        ready.spec, options={**ready.spec.options, "matched": matched}, training=_record(pairs), description=_WHAT[method]
    )
    nothing = torch.zeros(0, *ready.shape)
    ours = ready.for_mean()
    if method == "ridge":
        if means.too_large_for_ridge(ours):
            rows, columns = ready.shape[1:]
            raise OptionError(
                f"method='ridge' needs a map to each of {ready.shape[0]} x {rows} x {columns} cells, which is too large; use method='bcsd' or "
                f"'bilinear', or a part of the fine grid."
            )
        found = means.fit_mean(ours, ("ridge",))
        mean, predicted, note = found[0], found[1], found[3]
        spec = dataclasses.replace(spec, training={**spec.training, "fit": note})
        return ClassicalModel(spec, mean, _kept(ready.fine - predicted))
    if method == "bilinear":
        model = ClassicalModel(spec, means.LinearMean(ready.shape), nothing)
        fields = torch.as_tensor(pairs.inputs(0)).flatten(2)
        return ClassicalModel(
            spec,
            model.mean,
            _kept(ready.fine - model.predict(ready.coarse, fields, torch.tensor(pairs.climatology(model.scaling)))),
        )
    target, ratio = _aggregated(ready, pairs)
    slope = torch.zeros(len(ratio), len(ratio), 1, 1, dtype=torch.float64)
    slope[range(len(ratio)), range(len(ratio)), 0, 0] = torch.as_tensor(ratio)
    mean = means.LinearMean(ready.shape, slope)
    given, predicted = ready.coarse[:, matched], torch.empty_like(ready.fine)
    for k in range(FOLDS):
        inside, test = ours.split(k)
        moved = mapped_quantiles(given[test], *_tables(given[inside], target[inside]))
        everywhere = ready.features.everywhere()
        predicted[test] = mean.at(moved, ready.features.interpolated(moved, everywhere), everywhere)
    return ClassicalModel(spec, mean, _kept(ready.fine - predicted), _tables(given, target))


_WHAT = {
    "bilinear": "Bilinear interpolation of the coarse values, with its past errors",
    "bcsd": "Bias correction by quantiles and spatial disaggregation, with its past errors",
    "ridge": "Ridge regression on all coarse fields, with its past errors",
}


def _matched(ready: Prepared, method: str) -> list[int | None]:
    """Return the input that is the same variable as each fine one."""
    inputs = ready.spec.inputs
    assert inputs is not None
    names = [v.name for v in inputs.variables]
    found = [names.index(v.name) if v.name in names else None for v in ready.spec.variables]
    lost = [v.name for v, k in zip(ready.spec.variables, found, strict=True) if k is None]
    if lost and method != "ridge":
        raise OptionError(
            f"method={method!r} needs the fine variables among the coarse ones, and ds has no {lost[0]!r}; use method='ridge', or leave "
            f"it out of target: variables={[v.name for v in ready.spec.variables if v.name not in lost]}"
        )
    return found


def _record(pairs: Pairs) -> dict[str, str]:
    return {"samples": f"{len(pairs.fine.values)} along {pairs.fine.dimension}", "period": pairs.fine.period}


def _kept(errors: Tensor) -> Tensor:
    """Return some of the errors, evenly spaced in the sample, without their mean: members then scatter around the prediction."""
    errors = errors - errors.mean(0)
    count = max(1, min(len(errors), LARGEST_ERRORS // max(1, errors[0].numel())))
    return evenly_spaced(errors, count).float()


def _aggregated(ready: Prepared, pairs: Pairs) -> tuple[Tensor, np.ndarray]:
    """Return the means of the fine fields over coarse cells, standardised, shape (n, channels, cells), and their spread in fine units."""
    inputs, scaling = ready.spec.inputs, ready.spec.scaling
    assert inputs is not None
    assert scaling is not None
    n, channels = ready.fine.shape[:2]
    if pairs.factor is not None:
        grid = rectilinear(pairs.fine.grid, "method='bcsd'")
        found = Blocks(grid, pairs.factor, ready.weights or "cells").mean(torch.as_tensor(pairs.fine.values)).numpy()
    else:
        overlap, _, _ = weights.conservative(pairs.fine.grid, inputs.grid)
        total = np.asarray(overlap.matrix.sum(1)).ravel()
        values = overlap(pairs.fine.values.reshape(n * channels, -1)) / np.where(total > 0, total, 1.0)
        flat = values.reshape(n, channels, -1)
        if not (total > 0).all():  # coarse cells beyond the fine grid are mapped like the nearest one within
            near = weights.nearest(inputs.grid, *inputs.grid.points(), total > 0)
            flat = near(flat.reshape(n * channels, -1)).reshape(flat.shape)
        found = flat.reshape(n, channels, *inputs.grid.plane)
    names = [v.name for v in ready.spec.variables]
    own = fit_scaling(
        found, pairs.fine.time, names, cycle=scaling.cycle, transform=dict(zip(names, scaling.transforms, strict=True)),
        offset=dict(zip(names, scaling.offsets, strict=True)),
    )  # fmt: skip
    z = own.forward(found, cycle_basis(pairs.fine.time, own.cycle, n))
    return torch.as_tensor(z).flatten(2), own.std[:, 0, 0] / scaling.std[:, 0, 0]


def _tables(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return quantiles of both sides, each shape (quantiles, channels, cells)."""
    level = torch.linspace(0, 1, min(QUANTILES, len(given)), dtype=torch.float64)
    return torch.quantile(given, level, 0), torch.quantile(wanted, level, 0)

"""Training of downscalers: a linear conditional mean, a regression of what it leaves, and a diffusion of the residual."""

from __future__ import annotations

from typing import Any

import torch

from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.errors import StateError
from xgenda.grids import rectilinear
from xgenda.models.corrective import CorrectiveModel, conditional_map, project_block_means
from xgenda.models.diffusive import SIGMA_MIN, build_network, highest_sigma
from xgenda.models.fitting import standardise
from xgenda.models.spec import ModelSpec
from xgenda.scaling import fit_scaling
from xgenda.training.objectives import Denoising, Regression
from xgenda.training.optimiser import Optimiser
from xgenda.training.priors import FOLDS, fit_anchors, network_arguments, record_of, split_rows
from xgenda.training.windows import Samples, blocks


def train_downscaler(
    samples: Samples,
    factor: int,
    climatology: str,
    anchor: str | None,
    periodic: Any,
    width: int,
    optimiser: Optimiser,
    name: str | None,
    licence: str,
) -> CorrectiveModel:
    """Train the fine fields behind their own block means."""
    names = [v.name for v in samples.variables]
    if samples.valid is not None:
        raise StateError(
            "ds holds cells that are NaN at all times, and task='downscale' has no mask. Fill them or crop: ds.fillna(...), ds.isel(...)"
        )
    grid = rectilinear(samples.grid, "task='downscale'")
    grid.coarsened(factor)  # refuses a shape that is not a multiple
    scaling = fit_scaling(samples.values, samples.time, names, cycle=climatology)
    z = standardise(scaling, samples.values, samples.time)
    n, channels = len(z), len(names)
    fold = blocks(samples.time, n, FOLDS)
    final_map, crossed_maps, radius = conditional_map(z, grid, channels, factor, fold)
    shape = (n, channels, *grid.shape)
    coarse = project_block_means(torch.as_tensor(z).reshape(shape), factor)  # each block mean, spread over its block
    rows = torch.as_tensor(z)
    linear = torch.stack([crossed_maps[f].apply(rows[i : i + 1])[0] for i, f in enumerate(fold)]).reshape(shape)
    residual = torch.as_tensor(z).reshape(shape) - linear
    spread = residual.square().mean(0).sqrt().clamp(min=1e-3).float()
    condition = torch.cat([coarse, linear], 1).float()
    train_rows, held = split_rows(fold)
    regression_options = network_arguments(channels, 2 * channels, width, samples, periodic)
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
    final, crossed, note = fit_anchors(flat, samples, fold, anchor) if anchor is not None else (None, None, "none")
    network_options = network_arguments(channels, 3 * channels, width, samples, periodic)
    network = build_network(network_options)
    sigma_max = highest_sigma(final)
    with_mean = torch.cat([condition, correction / unit], 1)
    objective = Denoising(states, torch.as_tensor(fold), crossed, SIGMA_MIN, sigma_max, with_mean)
    second = optimiser.fit(network, objective, train_rows, held, 0.7, "training the residual")
    extra = {"linear_map": radius, "anchor": note, **{f"mean_{k}": v for k, v in first.items()}}
    spec = ModelSpec(
        name or "trained-downscaler", "downscale", "diffusion", samples.variables, samples.grid, scaling, factor,
        options={"network": network_options, "regression": regression_options if useful else None, "sigma_max": sigma_max, "unit": unit},
        training=record_of(samples, optimiser, extra, second), licence=licence,
        description=f"Regression of the mean and diffusion of the residual, from {factor}x{factor} block means",
    )  # fmt: skip
    return CorrectiveModel(spec, final_map, regression if useful else None, spread, EDMDenoiser(network, final))

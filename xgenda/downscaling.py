"""`downscale`: the fine ensemble behind a coarse field."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from xgenda import chunking, engine, metadata
from xgenda.devices import handle_of, resolve_device
from xgenda.errors import GridError, ModelNotFoundError, OptionError
from xgenda.grids import Grid, Orientation, grid_of, rectilinear
from xgenda.models.generative import GenerativeModel, SamplingOptions
from xgenda.models.loading import choose_model
from xgenda.scaling import cycle_basis


def downscale(
    ds: xr.Dataset | xr.DataArray,
    *,
    model: GenerativeModel | str | os.PathLike[str] | None = None,
    target: xr.Dataset | None = None,
    members: int = 16,
    seed: int | None = None,
    sampler: str = "auto",
    sampler_options: Mapping[str, Any] | None = None,
    schedule: str = "auto",
    steps: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> xr.Dataset:
    """Return an ensemble of fine fields whose block means are the coarse ones.

    Chunked input (dask, along time) gives a lazy result, unchunked input an eager one, with the same numbers.

    Parameters
    ----------
    ds
        Coarse fields, on the block means of the model's grid: ``fine.coarsen(latitude=4, longitude=4).mean()`` for a factor of 4.
        Dimensions in any order and direction.
    model
        A `GenerativeModel` for 'downscale', a registered name, or a path. None takes the one registered model that fits.
    target
        A Dataset on the fine grid, as a check that the model's grid is the one meant; by default the model's.
    members, seed, sampler, sampler_options, schedule, steps, batch_size, device, progress
        As in `xgenda.assimilate`.

    Returns
    -------
    xarray.Dataset
        The variables of the model with the leading dimension ``member`` on the fine grid, in the direction, longitude
        convention and units of `ds`. Every member has the block means of its input, to rounding.

    Raises
    ------
    GridError, OptionError, ChunkingError, ModelNotFoundError, UnitsError
        Before anything is computed.
    StateError
        If `ds` holds NaN, fill values, or a mean that suggests other units; for chunked input when it is computed.

    References
    ----------
    Mardani, M. et al. (2023), Residual corrective diffusion modeling for km-scale atmospheric downscaling, arXiv:2309.15214.

    Examples
    --------
    >>> import xgenda
    >>> fine = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=[200], latitude=slice(0, 36), longitude=slice(0, 48))
    >>> coarse = fine.coarsen(latitude=4, longitude=4).mean()
    >>> ensemble = coarse.genda.downscale(model="t2m-north-america-x4", members=2, seed=0, steps=4)
    >>> dict(ensemble.sizes)
    {'member': 2, 'time': 1, 'latitude': 36, 'longitude': 48}
    """
    ds = metadata.as_dataset(ds)
    numbers, drawn_seed = engine.check_members(members), engine.check_seed(seed)
    resolve_device(device)
    layout = metadata.find_layout(ds)
    if layout.member is not None:
        raise OptionError(
            f"ds has the ensemble dimension {layout.member!r}; downscale one member at a time: ds.isel({layout.member}=0)"
        )
    grid, orientation = grid_of(ds, layout)
    time = layout.time if layout.time in ds.dims else None
    if time is not None and ds.sizes[time] == 0:
        raise GridError(f"ds: dimension {time!r} is empty; there is nothing to do.")
    chosen = choose_model(model, ds, layout, grid, task="downscale")
    spec = chosen.spec
    if spec.task != "downscale" or spec.grid is None or spec.factor is None:
        raise ModelNotFoundError(
            f"model={spec.name!r} is for {spec.task!r}; train one for this: xgenda.train(fine, task='downscale', factor=4)"
        )
    target_grid = rectilinear(spec.grid, f"model={spec.name!r}")
    coarse = target_grid.coarsened(spec.factor)
    if not coarse.same_as(grid):
        ny, nx = target_grid.shape
        raise GridError(
            f"model={spec.name!r} needs the {spec.factor}x{spec.factor} block means of its grid: {coarse.describe()}; ds has "
            f"{grid.describe()}. From fine data type fine.isel(latitude=slice(0, {ny}), longitude=slice(0, {nx}))"
            f".coarsen(latitude={spec.factor}, longitude={spec.factor}).mean()"
        )
    if target is not None and not grid_of(metadata.as_dataset(target, "target"), None, "target")[0].same_as(spec.grid):
        raise GridError(
            f"target is not on the grid of model={spec.name!r}, {spec.grid.describe()}; leave out target to get that grid."
        )
    variables = [metadata.match_variable(ds, v.name, v.standard_name) for v in spec.variables]
    metadata.check_dims(ds, variables, layout)
    arrays = [ds[n] if time is None or time in ds[n].dims else ds[n].expand_dims({time: ds[time]}) for n in variables]
    chunking.check_core_chunks(arrays, layout.dims)
    factors = tuple(metadata.unit_factors_of(ds[n], v.units) for n, v in zip(variables, spec.variables, strict=True))
    times = ds[layout.time] if layout.time is not None else None
    labels = metadata.time_labels(times)
    metadata.check_unique_times(labels)
    options = chosen.plan(
        SamplingOptions(
            sampler=sampler, steps=steps, batch_size=batch_size, schedule=schedule, sampler_options=dict(sampler_options or {})
        )
    )
    fine, latitude, longitude = _fine_axes(
        target_grid, orientation, np.asarray(ds[layout.longitude].values, dtype=float), spec.factor
    )
    job = engine.Job(
        handle=handle_of(chosen), grid=grid, orientation=orientation, factors=factors, names=tuple(variables), labels=labels,
        basis=cycle_basis(times, "none" if spec.scaling is None else spec.scaling.cycle, len(labels)), located=None, threshold=None,
        members=numbers, seed=drawn_seed, options=options, device=device, output=fine, check=True, progress=progress, threads=None,
    )  # fmt: skip
    values = engine.lay(job, arrays, layout, time, target_grid.shape)
    out = {}
    for c, name in enumerate(variables):
        dims = ([time] if time else []) + ["member", *layout.dims]
        array = xr.DataArray(values[:, :, c] if time else values[0, :, c], dims=dims)
        out[name] = array.transpose("member", *arrays[c].dims)
    coords: dict[Any, Any] = {n: v for n, v in ds.coords.items() if not set(layout.dims) & set(v.dims)}
    coords |= {n: (d, v) for n, d, v in zip((layout.latitude, layout.longitude), layout.dims, (latitude, longitude), strict=True)}
    result = xr.Dataset(out, coords=coords).assign_coords(member=("member", np.array(numbers), metadata.MEMBER_ATTRS))
    provenance = {
        "model": spec.name, "model_sha256": chosen.sha256, "seed": drawn_seed, "sampler": options.sampler, "steps": options.steps,
    }  # fmt: skip
    call = f"downscale(model={spec.name!r}, members={members}, seed={drawn_seed})"
    return metadata.carry_metadata(result, ds, variables, call=call, provenance=provenance)


def _fine_axes(grid: Grid, coarse: Orientation, longitude: np.ndarray, factor: int) -> tuple[Orientation, np.ndarray, np.ndarray]:
    """Return how the fine result is stored and its coordinates: every block of fine cells where its coarse cell was."""
    rows, columns = _refined(coarse.rows, factor), _refined(coarse.columns, factor)
    turns = np.round((longitude[coarse.columns] - grid.coarsened(factor).longitude) / 360.0)
    east = grid.longitude + 360.0 * np.repeat(turns, factor)
    return Orientation(np.argsort(rows), np.argsort(columns)), grid.latitude[rows], east[columns]


def _refined(order: np.ndarray, factor: int) -> np.ndarray:
    """Return fine model positions in the user's order, given the user's positions of the coarse cells in model order."""
    place = np.argsort(order)
    backwards = len(place) > 1 and np.median(np.diff(place)) < 0
    within = np.arange(factor)[::-1] if backwards else np.arange(factor)
    return np.asarray((place[:, None] * factor + within).ravel())

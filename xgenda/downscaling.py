"""`downscale`: the fine ensemble behind a coarse field."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from xgenda import chunking, engine, metadata, states
from xgenda.curvilinear import AnyGrid
from xgenda.devices import handle_of, resolve_device
from xgenda.disaggregation import downscale_by_prior
from xgenda.errors import CoordinateError, GridError, ModelNotFoundError, OptionError, check_mapping, check_pair
from xgenda.formatting import user_level, written_call
from xgenda.grids import Grid
from xgenda.models.conditions import Conditions, lead_times, neighbours, planes_of
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.generative import GenerativeModel, SamplingOptions
from xgenda.models.loading import choose_model
from xgenda.models.spec import ModelSpec
from xgenda.models.templates import axes_of_result
from xgenda.scaling import cycle_basis

Pair = int | tuple[int, int] | Mapping[str, int]


def downscale(
    ds: xr.Dataset | xr.DataArray,
    *,
    model: GenerativeModel | str | os.PathLike[str] | None = None,
    target: xr.Dataset | xr.DataArray | None = None,
    members: int = 16,
    seed: int | None = None,
    stage: str = "all",
    sampler: str = "auto",
    sampler_options: Mapping[str, Any] | None = None,
    schedule: str = "auto",
    steps: int | None = None,
    tile: Pair | str | None = "auto",
    overlap: Pair | None = None,
    chunks: Pair | None = None,
    error: float | Mapping[str, float] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> xr.Dataset:
    """Return an ensemble of the fine fields behind coarse ones.

    Chunked input (dask, along time) gives a lazy result, unchunked input an eager one, with the same numbers.

    Parameters
    ----------
    ds
        The coarse fields that the model takes, on its input grid, in any order, direction and compatible units; ``print(model)`` says which.
        Where the model takes neighbouring times, they must be there; where it takes the lead time, a coordinate with standard_name
        ``forecast_period``. For an unconditional prior: any coarse fields of its variables within its grid.
    model
        A `GenerativeModel` for 'downscale', a registered name, or a path. None takes the one registered model that fits. An
        unconditional prior downscales without ever having seen a coarse field: these are taken as observations of means over its cells.
    target
        A Dataset on the fine grid, whose coordinates and order the result takes; by default the model's.
    members, seed, sampler, sampler_options, schedule, steps, batch_size, device, progress
        As in `xgenda.assimilate`. ``sampler_options={"churn": 40}`` makes 'heun' stochastic.
    stage
        'all', or 'mean' for the mean of the first stage alone, a single field without ``member``.
    tile, overlap
        Rows and columns of the parts in which the network sees the fine grid, and of what they share, blended at every call: a number of
        cells, a pair, or a mapping. 'auto': as in the training. None: the whole grid at once.
    chunks
        Rows and columns of the chunks of a lazy result, for domains that do not fit into memory. Each chunk is sampled on its own, with a halo
        and random numbers that belong to the cells, so that what is sampled on both sides of a border is nearly the same.
    error
        For an unconditional prior: the standard deviation of the error of the coarse values, a number or a mapping per variable; by default a
        fiftieth of the climatological standard deviation.

    Returns
    -------
    xarray.Dataset
        The variables of the model with the leading dimension ``member`` on the fine grid, in the direction, longitude
        convention and units of `ds`; variables that `ds` has not are in the units of the model. Where the model keeps the means of
        blocks, every member has those of its input, to rounding.

    Raises
    ------
    GridError, OptionError, CoordinateError, ChunkingError, ModelNotFoundError, UnitsError
        Before anything is computed.
    StateError
        If `ds` holds NaN, fill values, or a mean that suggests other units; for chunked input when it is computed.

    References
    ----------
    Mardani, M. et al. (2023), Residual corrective diffusion modeling for km-scale atmospheric downscaling, arXiv:2309.15214.
    Bar-Tal, O. et al. (2023), MultiDiffusion: fusing diffusion paths for controlled image generation, arXiv:2302.08113, for `tile`.

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
    state = states.enter(ds)
    layout = state.layout
    if layout.member is not None:
        raise OptionError(
            f"ds has the ensemble dimension {layout.member!r}; downscale one member at a time: ds.isel({layout.member}=0)"
        )
    time = layout.time if layout.time in state.ds.dims else None
    if time is not None and state.ds.sizes[time] == 0:
        raise GridError(f"ds: dimension {time!r} is empty; there is nothing to do.")
    chosen = choose_model(model, state.ds, layout, state.grid, task="downscale")
    parts = by_axis(state, chosen, tile=tile, overlap=overlap, chunks=chunks)
    asked = SamplingOptions(
        sampler=sampler, steps=steps, batch_size=batch_size, schedule=schedule, sampler_options=check_mapping("sampler_options", sampler_options),
        tile=parts["tile"], overlap=parts["overlap"], stage=stage,
    )  # fmt: skip
    if chosen.spec.task == "prior":
        for argument, found, default in (
            ("tile", tile, "auto"),
            ("overlap", overlap, None),
            ("chunks", chunks, None),
            ("stage", stage, "all"),
        ):
            if found != default:
                raise OptionError(f"{argument}={found!r} has no effect with an unconditional prior; leave it out.")
        return downscale_by_prior(
            state, chosen, target, error, members=members, seed=drawn_seed, sampler=sampler, sampler_options=sampler_options,
            schedule=schedule, steps=steps, batch_size=batch_size, device=device, progress=progress,
        )  # fmt: skip
    if error is not None:
        raise OptionError(
            f"error={error!r} belongs to unconditional priors; model={chosen.spec.name!r} was trained on coarse fields."
        )
    spec, inputs = chosen.spec, chosen.spec.inputs
    if spec.task in ("background", "forecast"):
        what = "assimilate(obs, model=...)" if spec.task == "background" else "forecast(model=...)"
        raise ModelNotFoundError(f"model={spec.name!r} is for {spec.task!r}; type ds.genda.{what}")
    if spec.task != "downscale" or spec.grid is None or inputs is None:
        raise ModelNotFoundError(
            f"model={spec.name!r} is for {spec.task!r}; train one for this: xgenda.train(fine, task='downscale', factor=4)"
        )
    _check_input_grid(spec, inputs, state.grid)
    variables = [states.match_channel(state.ds, v.name, v.standard_name) for v in inputs.variables]
    metadata.check_dims(state.ds, variables, layout)
    kept, places = _times(state.ds, layout.time, spec, inputs)
    arrays = _inputs(state.ds, variables, time, places)
    chunking.check_core_chunks(arrays, layout.dims, why="each field is needed whole")
    factors = tuple(metadata.unit_factors_of(state.ds[n], v.units) for n, v in zip(variables, inputs.variables, strict=True))
    times = None if layout.time is None else state.ds[layout.time]
    if times is not None and time is not None:
        times = times.isel({time: kept})
    labels = metadata.time_labels(times)
    metadata.check_unique_times(labels)
    options = chosen.plan(asked)
    if options.stage == "mean":
        numbers = (0,)
    windows = None if chunks is None else chunk_sizes(chosen, parts["chunks"])
    outputs = _outputs(state.ds, spec, inputs, variables)
    order, dims, coordinates = axes_of_result(spec, state, target, layout.dims)
    basis = np.stack([_basis(state.ds, layout.time, inputs.scaling.cycle, p) for p in places.T], 1)
    lead = (
        None
        if inputs.lead_time is None
        else lead_times(state.ds, layout.time, places.shape[0] if time is None else state.ds.sizes[time])
    )
    lead = lead if lead is None or time is None else lead[kept]
    conditions = engine.InputTimes(basis, planes_of(times, inputs.cycle, lead, inputs.lead_time, len(labels)))
    job = engine.Job(
        handle=handle_of(chosen), grid=state.grid, orientation=state.orientation, factors=factors * len(inputs.offsets),
        names=tuple(variables) * len(inputs.offsets), labels=labels,
        basis=cycle_basis(times, "none" if spec.scaling is None else spec.scaling.cycle, len(labels)), located=None, threshold=None,
        members=numbers, seed=drawn_seed, options=options, device=device, output=order, check=True, progress=progress, threads=None,
        conditions=conditions, outputs=tuple(f for _, f in outputs),
    )  # fmt: skip
    values = engine.lay(job, arrays, layout, time, spec.grid.plane, windows)
    if windows is not None:
        values = values[..., np.argsort(order.rows), :][..., np.argsort(order.columns)]
    result = _assemble(values, state.ds, outputs, spec, time, dims, arrays[0].dims, layout.dims, coordinates, kept)
    if options.stage == "mean":
        result = result.isel(member=0, drop=True)
    else:
        result = result.assign_coords(member=("member", np.array(numbers), metadata.MEMBER_ATTRS))
    provenance = {
        "model": spec.name, "model_sha256": chosen.sha256, "seed": drawn_seed, "sampler": options.sampler, "steps": options.steps,
        "stage": options.stage, "tile": options.tile, "overlap": options.overlap, "chunks": windows,
    }  # fmt: skip
    said = {
        "model": spec.name,
        "members": members,
        "seed": drawn_seed,
        "sampler": options.sampler,
        "steps": options.steps or None,
    }
    call = written_call("downscale", said)
    known = [n for n, _ in outputs if n in state.ds]
    out = metadata.carry_metadata(result, state.ds, known, call=call, provenance=provenance)
    mapping = spec.options.get("target", {}).get("mapping")
    for name in (n for n, _ in outputs):  # those of the coarse fields are of another grid
        out[name].attrs = {k: v for k, v in out[name].attrs.items() if k not in ("grid_mapping", "coordinates", "cell_measures")}
        if mapping is not None and mapping["name"] in coordinates:
            out[name].attrs["grid_mapping"] = str(mapping["name"])
    if any(n in state.verticals for n in state.variables(known)):
        out = state.leave(out).assign_coords(coordinates)
    return out


# -- what goes in ---------------------------------------------------------------------------------------------------------------


def _check_input_grid(spec: ModelSpec, inputs: Conditions, grid: AnyGrid) -> None:
    if inputs.grid.same_as(grid):
        return
    advice = "Bring ds there: ds.genda.regrid(model.template(inputs=True), method='conservative')"
    if spec.factor is not None and isinstance(spec.grid, Grid):
        ny, nx = spec.grid.shape
        advice = (
            f"These are the {spec.factor}x{spec.factor} block means of its grid. From fine data type fine.isel(latitude=slice(0, {ny}), "
            f"longitude=slice(0, {nx})).coarsen(latitude={spec.factor}, longitude={spec.factor}).mean()"
        )
    raise GridError(f"model={spec.name!r} takes fields on the grid {inputs.grid.describe()}; ds has {grid.describe()}. {advice}")


def _times(ds: xr.Dataset, time: str | None, spec: ModelSpec, inputs: Conditions) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the times that have all their neighbours, and of these neighbours, shape (t, offsets)."""
    cycles = (inputs.cycle, inputs.scaling.cycle, "none" if spec.scaling is None else spec.scaling.cycle)
    if time is None and any(c != "none" for c in cycles):
        raise CoordinateError(
            f"model={spec.name!r} takes the season or the hour, and ds has no time. Assign it: "
            f"ds.assign_coords(time=numpy.datetime64('2020-01-01T12:00'))"
        )
    # refuses what is no time, and before their steps are looked at what is there twice
    metadata.check_unique_times(metadata.time_labels(None if time is None else ds[time]))
    count = 1 if time is None or time not in ds.dims else ds.sizes[time]
    if inputs.offsets == (0,):
        return np.arange(count), np.arange(count)[:, None]
    if time is None or time not in ds.dims:
        raise CoordinateError(
            f"The model takes the times {inputs.offsets} times {inputs.spacing:g} s around each, and ds has no dimension of time."
        )
    values = ds[time].values
    places = neighbours(values, values, inputs.offsets, inputs.spacing, inputs.ends)
    if inputs.ends == "nearest":
        return _continued(values, places, spec, inputs)
    whole = (places >= 0).all(1)
    if not whole.any():
        raise CoordinateError(
            f"The model takes the times {', '.join(f'{o * inputs.spacing / 3600:+g} h' for o in inputs.offsets if inputs.spacing)} around "
            f"each, and no time of ds has all of them. Give a series with such steps."
        )
    if not whole.all():
        warnings.warn(
            f"{int((~whole).sum())} of {count} times have no neighbours in ds, which the model takes, and are left out of the result.",
            stacklevel=user_level(),
        )
    kept = np.flatnonzero(whole)
    return kept, places[kept]


def _continued(values: np.ndarray, places: np.ndarray, spec: ModelSpec, inputs: Conditions) -> tuple[np.ndarray, np.ndarray]:
    """Return all times and their places, of a model that goes on where a series ends; but refuse one of other steps."""
    after = neighbours(values, values, (1,), inputs.spacing)[:, 0]
    breaks = int((after < 0).sum())
    assert inputs.spacing is not None
    if len(values) > 1 and breaks == len(values):
        raise CoordinateError(
            f"model={spec.name!r} takes fields {inputs.spacing / 3600:g} h apart, and no two times of ds are. Give a series with such steps, or "
            f"single times: ds.isel(time=[0])"
        )
    if breaks > 1:
        warnings.warn(
            f"The times of ds have {breaks - 1} gaps, where they are not {inputs.spacing / 3600:g} h apart: each is taken as the end of one series "
            f"and the beginning of another.",
            stacklevel=user_level(),
        )
    return np.arange(len(values)), places


def _inputs(ds: xr.Dataset, variables: list[str], time: str | None, places: np.ndarray) -> list[xr.DataArray]:
    """Return the fields of each time and its neighbours, offset by offset."""
    out = []
    for place in places.T:
        for name in variables:
            array = ds[name]
            if time is not None:
                array = array if time in array.dims else array.expand_dims({time: ds[time]})
                if len(place) != array.sizes[time] or (place != np.arange(len(place))).any():
                    array = array.isel({time: place})
            out.append(array)
    return out


def _basis(ds: xr.Dataset, time: str | None, cycle: str, place: np.ndarray) -> np.ndarray:
    times = None if time is None else ds[time]
    basis = cycle_basis(times, cycle, len(place) if times is None else max(times.size, 1))
    return np.asarray(basis[place])


# -- what comes out -------------------------------------------------------------------------------------------------------------


def chunk_sizes(model: GenerativeModel, chunks: Any) -> tuple[int, int]:
    """Return rows and columns of the chunks of a result, which the model must allow."""
    if not isinstance(model, CorrectiveModel):
        raise OptionError(
            f"chunks={chunks!r} needs a diffusion model; model={model.spec.name!r} is computed whole. Leave it out."
        )
    rows, columns = (min(n, whole) for n, whole in zip(check_pair("chunks", chunks, 1), model.grid.plane, strict=True))
    model.check_windows((rows, columns))
    return rows, columns


def by_axis(state: states.State, model: GenerativeModel, **given: Any) -> dict[str, Any]:
    """Return options that are rows and columns, those that are mappings of names as pairs in this order."""
    own = model.spec.options.get("target", {})
    layout = state.layout
    names = [layout.dims, (layout.latitude, layout.longitude), tuple(own.get("dims", ())), ("latitude", "longitude")]
    out = {}
    for argument, value in given.items():
        if isinstance(value, Mapping):
            found = next((pair for pair in names if set(pair) == set(value) and len(pair) == 2), None)
            if found is None:
                raise OptionError(
                    f"{argument}={dict(value)} does not name rows and columns; type {argument}={{{names[0][0]!r}: 64, {names[0][1]!r}: 64}}"
                )
            value = value[found[0]], value[found[1]]
        out[argument] = value
    return out


def _outputs(ds: xr.Dataset, spec: ModelSpec, inputs: Conditions, variables: list[str]) -> list[tuple[str, tuple[float, float]]]:
    """Return the name of each fine variable and the factors from the user's units, where `ds` has it, to the model's."""
    known = {v.name: n for v, n in zip(inputs.variables, variables, strict=True)}
    return [
        (known[v.name], metadata.unit_factors_of(ds[known[v.name]], v.units)) if v.name in known else (v.name, (1.0, 0.0))
        for v in spec.variables
    ]


def _assemble(
    values: Any, ds: xr.Dataset, outputs: list[tuple[str, tuple[float, float]]], spec: ModelSpec, time: str | None, dims: tuple[str, str],
    given: tuple[Any, ...], before: tuple[str, str], coordinates: dict[str, Any], kept: np.ndarray,
) -> xr.Dataset:  # fmt: skip
    """Return the Dataset: dimensions in the order of the input, with the fine ones in place of the coarse ones."""
    renamed = dict(zip(before, dims, strict=True))
    order = ["member", *(renamed.get(str(d), d) for d in given)]
    out = {}
    for c, ((name, _), v) in enumerate(zip(outputs, spec.variables, strict=True)):
        array = xr.DataArray(values[:, :, c] if time else values[0, :, c], dims=([time] if time else []) + ["member", *dims])
        out[name] = array.transpose(*order).assign_attrs(v.attrs)
    coords: dict[Any, Any] = {n: c for n, c in ds.coords.items() if not set(before) & set(c.dims)}
    if time is not None and len(kept) < ds.sizes[time]:
        coords = {n: c.isel({time: kept}) if time in c.dims else c for n, c in coords.items()}
    return xr.Dataset(out, coords=coords | coordinates)

"""`assimilate`: the posterior ensemble of the state, given observations; and `innovations`: observation minus background."""

from __future__ import annotations

import dataclasses
import json
import numbers
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import chunking, engine, metadata
from xgenda.devices import handle_of, resolve_device
from xgenda.errors import GridError, ModelNotFoundError, OptionError, check_choice
from xgenda.grids import Grid, Orientation, grid_of
from xgenda.metadata import Layout
from xgenda.models.generative import GenerativeModel, SamplingOptions
from xgenda.models.loading import choose_model
from xgenda.observations.containers import ErrorLike, Observations, Wanted
from xgenda.observations.operators import Located, locate_observations
from xgenda.observations.quality import MEANINGS, Quality, QualityControl, count_codes
from xgenda.scaling import cycle_basis

#: Threshold of the background check where the prior is centred on a background, and where it is a climatology.
BACKGROUND_THRESHOLD = 3.0
CLIMATE_THRESHOLD = 10.0

ModelLike = GenerativeModel | str | os.PathLike[str] | None


def assimilate(
    ds: xr.Dataset | xr.DataArray,
    obs: Observations,
    *,
    model: ModelLike = None,
    error: ErrorLike = None,
    members: int = 16,
    seed: int | None = None,
    guidance: str = "auto",
    guidance_options: Mapping[str, Any] | None = None,
    likelihood: str = "gaussian",
    sampler: str = "auto",
    sampler_options: Mapping[str, Any] | None = None,
    schedule: str = "auto",
    steps: int | None = None,
    window: Any = None,
    background_check: float | str | None = "auto",
    quality: QualityControl | None = None,
    representativeness: float | Mapping[str, float] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> xr.Dataset:
    """Return an ensemble of the states that fit the observations.

    Reads the grid, times and variables of `ds`; its values are the background where the model needs one (a covariance function,
    or ``gaussian_prior(..., mean='background')``) and are not read otherwise. Each time is analysed on its own, unless the model was
    trained on windows of states: then all times are one trajectory, solved together. Chunked input (dask, along time) gives a
    lazy result, unchunked input an eager one, with the same numbers; a trajectory must be one chunk.

    Parameters
    ----------
    ds
        The background, or any Dataset on the analysis grid: dimensions latitude, longitude and optionally time, in any order and
        direction. Variables that the model does not know are left out of the result.
    obs
        A table along one dimension (Dataset or pandas DataFrame with latitude, longitude, time and one column per variable),
        a gridded Dataset with NaN where nothing was observed, or a list of these. Empty or None gives the prior, with a
        notice. Read into memory when called.
    model
        A `GenerativeModel`, a registered name, or a path. None takes the one registered model that fits.
    error
        Standard deviation of the observation error in the units of the observation, instrument and representativeness together:
        a number, or a mapping per variable (a number or one per row). None where `obs` carries ``<name>_error``.
    members
        Ensemble size. Member k does not depend on it.
    seed
        Key of the random numbers; None draws one and records it in the result.
    guidance
        How observations act on a diffusion model: 'anchor', 'mmps', 'sda', 'w2c', 'pigdm', 'dps', 'diffpir' or 'inpaint'; see the
        methods page. 'auto' is 'anchor' where the model has a Gaussian and all operators are linear, else 'mmps'; the result
        records which.
    guidance_options
        Such as ``{"gamma": 0.1}`` for 'sda' or ``{"iterations": 8, "solver": "gmres"}`` for 'mmps'.
    likelihood
        Of the observation errors: 'gaussian', or for suspect data 'student-t' or 'huber', for diffusion models.
    sampler
        'auto', or for diffusion models 'heun', 'ddim', 'ancestral', 'dpm++', 'adams' or 'pc'.
    sampler_options
        Such as ``{"churn": 20}`` for 'heun', ``{"corrections": 2, "tau": 0.25}`` for 'pc', ``{"resample": 5}`` for any.
    schedule
        Spacing of the noise levels: 'auto' ('karras'), 'karras', 'log', 'vp-cosine', 'vp-linear' or 'rectified'.
    steps
        Noise levels of the sampler.
    window
        Width of the half-open time window around each analysis time, such as '6h'; by default 1 h. An observation in several
        windows goes to the nearest time.
    background_check
        Reject observations with abs(O - B) above this many sqrt(s_o**2 + s_b**2). 'auto': 3 where the prior is
        centred on a background, 10 where it is a climatology, whose mean a warming world leaves. None turns it off.
    quality
        The other checks and what is thinned or merged, as a `QualityControl`; None takes its defaults.
    representativeness
        Standard deviation of what a cell of the grid cannot represent, added to `error` in quadrature: a number or a mapping per variable.
    batch_size
        Samples computed at once; changes time and memory only.
    device
        'auto', 'cpu' or 'cuda'.
    progress
        True or False; None shows a bar in notebooks and terminals.

    Returns
    -------
    xarray.Dataset
        The variables of the model with the leading dimension ``member``, on the coordinates and in the units of `ds`.
        Attributes record model, checksum, seed, guidance and (for eager results) the number of observations per quality code.

    Raises
    ------
    ObservationError, OptionError, GridError, ChunkingError, ModelNotFoundError, UnitsError
        Before anything is computed.
    StateError
        If the background holds NaN or fill values; for chunked input when it is computed.

    See Also
    --------
    innovations : observation minus background with the quality code of every observation.
    gaussian_prior : a prior that needs no training.

    References
    ----------
    Rozet, F. and Louppe, G. (2023), Score-based data assimilation, arXiv:2306.10574, eq. 6 and 13.

    Examples
    --------
    >>> import xgenda
    >>> background = xgenda.tutorial.open_dataset("europe-t2m-forecast")
    >>> stations = xgenda.tutorial.open_dataset("europe-synop")[["t2m"]].isel(obs=slice(0, 200))
    >>> prior = xgenda.gaussian_prior(background, length_scale=300e3, std=2.0)
    >>> analysis = background.genda.assimilate(stations, model=prior, error=1.75, members=2, seed=0)
    >>> dict(analysis.sizes)
    {'member': 2, 'time': 1, 'latitude': 97, 'longitude': 165}
    """
    ds = metadata.as_dataset(ds)
    member_numbers, drawn_seed = engine.check_members(members), engine.check_seed(seed)
    resolve_device(device)
    setup = _setup(ds, obs, model, error, window, background_check, quality, representativeness)
    asked = SamplingOptions(
        guidance, sampler, steps, batch_size, schedule, likelihood, dict(guidance_options or {}), dict(sampler_options or {})
    )
    options = setup.model.plan(asked)
    _check_trajectory(setup)
    job = setup.job(member_numbers, drawn_seed, options, device, progress)
    if setup.located is None or not (setup.located.table.code == Quality.USED).any():
        count = 0 if setup.located is None else len(setup.located.table)
        warnings.warn(
            f"No observation can be used ({count} given); the result is the prior. See xgenda.innovations(ds, obs, ...) for the reasons.",
            stacklevel=2,
        )
    values = engine.lay(job, setup.arrays, setup.layout, setup.time, setup.grid.shape)
    lazy = chunking.is_chunked(setup.arrays)
    counts = (
        None
        if lazy
        else json.dumps(count_codes(_final_codes(setup, job).table.code if setup.located is not None else np.zeros(0)))
    )
    result = _wrap(ds, setup, values, member_numbers)
    provenance = {
        "model": setup.model.spec.name,
        "model_sha256": setup.model.sha256,
        "seed": drawn_seed,
        "guidance": _described(options.guidance, options.guidance_options),
        "likelihood": options.likelihood,
        "sampler": _described(options.sampler, options.sampler_options),
        "schedule": options.schedule,
        "steps": options.steps or None,
        "background_check": "off" if setup.threshold is None else setup.threshold,
        "observation_counts": counts if counts is not None else "computed with the blocks; see xgenda.innovations",
    }
    call = f"assimilate(model={setup.model.spec.name!r}, members={members}, seed={drawn_seed}, guidance={options.guidance!r})"
    return metadata.carry_metadata(result, ds, list(setup.variables.values()), call=call, provenance=provenance)


def innovations(
    ds: xr.Dataset | xr.DataArray,
    obs: Observations,
    *,
    model: ModelLike = None,
    error: ErrorLike = None,
    window: Any = None,
    background_check: float | str | None = "auto",
    quality: QualityControl | None = None,
    representativeness: float | Mapping[str, float] | None = None,
) -> xr.Dataset:
    """Return observation minus background (O-B) at every observation, with its quality code.

    No row is dropped: each has exactly one code, and `counts` in the attributes adds up to the number of rows.

    Parameters
    ----------
    ds
        The background; read at the observed times when called.
    obs, model, error, window, background_check, quality, representativeness
        As in `assimilate`. Without a `model` there is no background error, so the background check is left out.

    Returns
    -------
    xarray.Dataset
        Along ``obs``, in the order of the input: `value`, `error`, `background` (interpolated), `innovation` (O-B), all in the
        units of the state; `quality_code` (see its ``flag_meanings``), and coordinates latitude, longitude, time, variable,
        source and row.

    Examples
    --------
    >>> import xgenda
    >>> background = xgenda.tutorial.open_dataset("europe-t2m-forecast")
    >>> stations = xgenda.tutorial.open_dataset("europe-synop")[["t2m"]]
    >>> departures = xgenda.innovations(background, stations, error=1.75)
    >>> round(float(departures.innovation.std()), 1)
    2.4
    """
    ds = metadata.as_dataset(ds)
    setup = _setup(ds, obs, model, error, window, background_check, quality, representativeness, any_model=False)
    located = setup.located
    if located is None:
        located = locate_observations(None, setup.wanted, setup.grid, None)
    background = np.full(len(located.table), np.nan)
    code = located.table.code.copy()
    for t in np.unique(located.time_index[located.time_index >= 0]):
        rows = np.flatnonzero(located.time_index == t)
        fields = [
            np.asarray(
                (a.isel({setup.time: int(t)}) if setup.time else a).transpose(setup.layout.latitude, setup.layout.longitude)
            )
            for a in setup.arrays
        ]
        scaled = [setup.orientation.to_model(f).astype(float) * s + o for f, (s, o) in zip(fields, setup.factors, strict=True)]
        inside = rows[located.operator.lengths[rows] > 0]
        background[inside] = located.operator.select(inside)(np.stack(scaled).ravel())
        if setup.model is not None:
            job = setup.job((0,), 0, None, "cpu", False)
            job = _at_time(job, int(t))
            mean, deviation, _ = engine.moments(job, *(f[None] for f in fields))
            now = located.at(int(t))
            code[rows] = engine.background_codes(
                Located(now.table, np.zeros(len(rows), dtype=np.int64), now.operator),
                mean.flatten(1).numpy(),
                deviation.flatten(1).numpy(),
                setup.threshold,
                setup.quality,
            )
    order = np.lexsort((located.table.row, located.table.variable, located.table.source))
    table = located.table
    names = np.array([w.name for w in setup.wanted])
    data = {
        "value": table.value, "error": table.error, "background": background, "innovation": table.value - background,
    }  # fmt: skip
    units = {w.units for w in setup.wanted}
    attrs = {"units": units.pop()} if len(units) == 1 and None not in units else {}
    out = xr.Dataset({k: ("obs", v[order], attrs) for k, v in data.items()})
    out["innovation"].attrs["long_name"] = "observation minus background"
    out["quality_code"] = ("obs", code[order], {
        "flag_values": np.array([int(q) for q in Quality], dtype=np.uint8), "flag_meanings": " ".join(q.name.lower() for q in Quality),
    })  # fmt: skip
    coords: dict[str, Any] = {
        "latitude": ("obs", table.latitude[order], {"standard_name": "latitude", "units": "degrees_north"}),
        "longitude": ("obs", table.longitude[order], {"standard_name": "longitude", "units": "degrees_east"}),
        "variable": ("obs", names[table.variable[order]]),
        "source": ("obs", table.source[order]),
        "row": ("obs", table.row[order]),
    }
    for name in ("station", "platform"):
        if (getattr(table, name) != "").any():
            coords[name] = ("obs", getattr(table, name)[order].astype(str))
    if np.isfinite(table.height).any():
        coords["height"] = ("obs", table.height[order], {"standard_name": "surface_altitude", "units": "m"})
    if table.time is not None:
        coords["time"] = ("obs", table.time[order], {"standard_name": "time"})
    out = out.assign_coords(coords)
    out.attrs = {"counts": json.dumps(count_codes(code)), "sign": "innovation = observation - background"}
    out.attrs["meanings"] = "; ".join(f"{q.name.lower()}: {m}" for q, m in MEANINGS.items())
    return out


def _described(name: str, options: Mapping[str, Any]) -> str:
    """Return a name with its options, for the attributes of the result."""
    return name if not options else f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})"


def _check_trajectory(setup: _Setup) -> None:
    """Refuse what a model of windows cannot solve together."""
    options = setup.model.spec.options
    window = int(options.get("window", 1))
    if window == 1:
        return
    name, count = setup.model.spec.name, len(setup.labels)
    if setup.time is None or count < window:
        raise GridError(
            f"model={name!r} is of windows of {window} consecutive times, and ds has {count}; give at least {window}."
        )
    steps = metadata.seconds_between(setup.ds[setup.time].values)
    if abs(steps - options["spacing"]).max() > 0.01 * options["spacing"]:
        raise GridError(
            f"model={name!r} is of states {options['spacing']:g} seconds apart, and those of ds are {steps.min():g} to {steps.max():g} "
            f"seconds apart. Select such times, in order: ds.sel({setup.time}=...)"
        )
    chunking.check_core_chunks(setup.arrays, (setup.time,))


class _Setup:
    """The checked input of one call."""

    def __init__(
        self, ds: xr.Dataset, layout: Layout, time: str | None, grid: Grid, orientation: Orientation, model: Any, wanted: list[Wanted],
        variables: dict[str, str], arrays: list[xr.DataArray], factors: tuple[tuple[float, float], ...], labels: np.ndarray,
        located: Located | None, threshold: float | None, quality: QualityControl,
    ) -> None:  # fmt: skip
        self.ds, self.layout, self.time, self.grid, self.orientation, self.model = (
            ds,
            layout,
            time,
            grid,
            orientation,
            model,
        )
        self.wanted, self.variables, self.arrays, self.factors, self.labels = wanted, variables, arrays, factors, labels
        self.located, self.threshold, self.quality = located, threshold, quality

    def job(self, members: tuple[int, ...], seed: int, options: Any, device: str, progress: bool | None) -> engine.Job:
        spec = self.model.spec
        time = self.ds[self.layout.time] if self.layout.time is not None else None
        cycle = "none" if spec.scaling is None else spec.scaling.cycle
        return engine.Job(
            handle=handle_of(self.model), grid=self.grid, orientation=self.orientation, factors=self.factors,
            names=tuple(self.variables.values()), labels=self.labels, basis=cycle_basis(time, cycle, len(self.labels)),
            located=self.located, threshold=self.threshold, quality=self.quality, members=members, seed=seed, options=options, device=device,
            output=self.orientation, check=spec.needs_background, progress=progress, threads=None,
        )  # fmt: skip


def _at_time(job: engine.Job, t: int) -> engine.Job:
    return dataclasses.replace(job, labels=job.labels[t : t + 1], basis=job.basis[t : t + 1], located=None)


def _setup(
    ds: xr.Dataset,
    obs: Observations,
    model: ModelLike,
    error: ErrorLike,
    window: Any,
    check: float | str | None,
    quality: QualityControl | None,
    representativeness: float | Mapping[str, float] | None,
    *,
    any_model: bool = True,
) -> _Setup:
    layout = metadata.find_layout(ds)
    if layout.member is not None and ds.sizes[layout.member] > 0:
        raise OptionError(
            f"ds has the ensemble dimension {layout.member!r}, and one background is needed. Type ds.mean({layout.member!r}), and for "
            f"the ensemble as prior: model=xgenda.gaussian_prior(ds)"
        )
    grid, orientation = grid_of(ds, layout)
    time = layout.time if layout.time in ds.dims else None
    if time is not None and ds.sizes[time] == 0:
        raise GridError(f"ds: dimension {time!r} is empty; there is nothing to do.")
    chosen = choose_model(model, ds, layout, grid, task="prior") if any_model or model is not None else None
    if chosen is not None:
        if chosen.spec.task != "prior":
            raise ModelNotFoundError(
                f"model={chosen.spec.name!r} is for {chosen.spec.task!r}; type ds.genda.{chosen.spec.task}(model=...)"
            )
        check_grid(chosen, grid)
        wanted = [Wanted(v.name, v.standard_name, v.units) for v in chosen.spec.variables]
    else:
        wanted = [
            Wanted(n, ds[n].attrs.get("standard_name"), ds[n].attrs.get("units")) for n in metadata.data_variables(ds, layout)
        ]
    variables = {w.name: metadata.match_variable(ds, w.name, w.standard_name) for w in wanted}
    wanted = [dataclasses.replace(w, given_units=ds[variables[w.name]].attrs.get("units")) for w in wanted]
    metadata.check_dims(ds, variables.values(), layout)
    arrays = [ds[n] if time is None or time in ds[n].dims else ds[n].expand_dims({time: ds[time]}) for n in variables.values()]
    chunking.check_core_chunks(arrays, (layout.latitude, layout.longitude))
    factors = tuple(metadata.unit_factors_of(ds[n], w.units) for n, w in zip(variables.values(), wanted, strict=True))
    times = ds[layout.time] if layout.time is not None else None
    labels = metadata.time_labels(times)
    metadata.check_unique_times(labels)
    located = None
    # the result, and so the message, speak of the user's variable; the table of the model's
    renamed = _rename_back(obs, variables)
    control = check_quality(quality)
    located = locate_observations(
        renamed, wanted, grid, times, error=_rename_error(error, variables), window=window, quality=control,
        representativeness=_renamed(representativeness, variables), ground=_ground(ds, layout, orientation),
    )  # fmt: skip
    threshold = _threshold(check, chosen)
    return _Setup(ds, layout, time, grid, orientation, chosen, wanted, variables, arrays, factors, labels,
                  located if len(located.table) else None, threshold, control)  # fmt: skip


def _rename_back(obs: Observations, variables: dict[str, str]) -> Observations:
    """Let observations use the names of `ds` as well as those of the model."""
    names = {theirs: ours for ours, theirs in variables.items() if theirs != ours}
    if not names:
        return obs
    if isinstance(obs, (list, tuple)):
        return [_rename_back(o, variables) for o in obs]
    if isinstance(obs, xr.DataArray) and obs.name is not None:
        obs = obs.to_dataset()
    if isinstance(obs, xr.Dataset):
        both = {o: n for o, n in names.items() if o in obs.data_vars and n not in obs.data_vars}
        return obs.rename({**both, **{f"{o}_error": f"{n}_error" for o, n in both.items() if f"{o}_error" in obs}})
    if isinstance(obs, pd.DataFrame):
        both = {o: n for o, n in names.items() if o in obs.columns and n not in obs.columns}
        return obs.rename(columns={**both, **{f"{o}_error": f"{n}_error" for o, n in both.items()}})
    return obs


def _rename_error(error: ErrorLike, variables: dict[str, str]) -> ErrorLike:
    if isinstance(error, (list, tuple)):
        return [_rename_error(e, variables) for e in error]
    renamed: ErrorLike = _renamed(error, variables)
    return renamed


def _renamed(given: Any, variables: dict[str, str]) -> Any:
    """Let a mapping use the names of `ds`."""
    if not isinstance(given, Mapping):
        return given
    names = {theirs: ours for ours, theirs in variables.items()}
    return {names.get(str(k), str(k)): v for k, v in given.items()}


def check_quality(quality: QualityControl | None) -> QualityControl:
    """Return the checks, the defaults for None."""
    if quality is not None and not isinstance(quality, QualityControl):
        raise OptionError(
            f"quality={quality!r} is not accepted; give for example quality=xgenda.QualityControl(thin=50e3, blacklist=['08181'])"
        )
    return quality or QualityControl()


def _ground(ds: xr.Dataset, layout: Layout, orientation: Orientation) -> np.ndarray | None:
    """Return the height of the ground in metres, flat in model order, where `ds` has it."""
    for name, array in ds.variables.items():
        horizontal = {layout.latitude, layout.longitude}
        if array.attrs.get("standard_name") == "surface_altitude" and set(array.dims) == horizontal:
            values = ds[name].transpose(layout.latitude, layout.longitude).values.astype(float)
            return orientation.to_model(values * metadata.unit_factors_of(ds[name], "m")[0]).ravel()
    return None


def _threshold(check: float | str | None, model: GenerativeModel | None) -> float | None:
    if check is None or model is None:
        return None
    if isinstance(check, str):
        check_choice("background_check", check, ("auto",))
        return BACKGROUND_THRESHOLD if model.spec.needs_background else CLIMATE_THRESHOLD
    if isinstance(check, bool) or not isinstance(check, numbers.Real) or not np.isfinite(check) or check <= 0:
        raise OptionError(f"background_check={check!r} is not accepted; give a positive number, 'auto' or None.")
    return float(check)


def check_grid(model: GenerativeModel, grid: Grid) -> None:
    """Refuse a grid that is not the model's."""
    expected = model.spec.grid
    if expected is not None and not expected.same_as(grid):
        raise GridError(
            f"model={model.spec.name!r} works on the grid {expected.describe()}; ds has {grid.describe()}. "
            f"Interpolate: ds.interp(latitude=model.spec.grid.latitude, longitude=model.spec.grid.longitude)"
        )


def _final_codes(setup: _Setup, job: engine.Job) -> Located:
    """Return all observations with their final codes, for an eager call."""
    located = setup.located
    assert located is not None
    if setup.threshold is None and setup.quality.buddy is None:
        return located
    fields = [
        a.transpose(*([setup.time] if setup.time else []), setup.layout.latitude, setup.layout.longitude).values
        for a in setup.arrays
    ]
    mean, deviation, _ = engine.moments(job, *(f if setup.time else f[None] for f in fields))
    return located.with_code(
        engine.background_codes(located, mean.flatten(1).numpy(), deviation.flatten(1).numpy(), setup.threshold, setup.quality)
    )


def _wrap(ds: xr.Dataset, setup: _Setup, values: Any, members: tuple[int, ...]) -> xr.Dataset:
    layout, out = setup.layout, {}
    for c, name in enumerate(setup.variables.values()):
        array = xr.DataArray(
            values[:, :, c] if setup.time else values[0, :, c],
            dims=([setup.time] if setup.time else []) + ["member", layout.latitude, layout.longitude],
        )
        order = list(setup.arrays[c].dims)
        out[name] = array.transpose("member", *order)
    kept = {
        str(n): v
        for n, v in ds.variables.items()
        if n not in out and (n in ds.coords or not {layout.latitude, layout.longitude} <= set(v.dims))
    }
    kept = {n: v for n, v in kept.items() if n in ds.coords or not set(v.dims) & {layout.member}}
    result = xr.Dataset(out, coords={n: v for n, v in kept.items() if n in ds.coords})
    result = result.assign({n: v for n, v in kept.items() if n not in ds.coords})
    return result.assign_coords(member=("member", np.array(members), metadata.MEMBER_ATTRS))

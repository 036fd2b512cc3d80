"""`innovations`: observation minus background, with the quality code of every observation; and what they say of the errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from xgenda import engine, metadata, states
from xgenda.errors import OptionError
from xgenda.observations.containers import ErrorLike, Observations
from xgenda.observations.operators import locate_observations
from xgenda.observations.quality import MEANINGS, Quality, QualityControl, count_codes
from xgenda.operators import AnyOperator, extended
from xgenda.preparation import ModelLike, Prepared, at_times, departure_chi2, prepare


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
    lapse_rate: float | Mapping[str, float] | None = None,
    operators: Mapping[str, AnyOperator] | None = None,
    first_guess: xr.Dataset | xr.DataArray | None = None,
    analysis: xr.Dataset | None = None,
) -> xr.Dataset:
    """Return observation minus background (O-B) at every observation, with its quality code.

    No row is dropped: each has exactly one code, and `counts` in the attributes adds up to the number of rows.

    Parameters
    ----------
    ds
        The background; read at the observed times when called.
    obs, model, error, window, background_check, quality, representativeness, lapse_rate, operators, first_guess
        As in `assimilate`. Without a `model` there is no background error, so the background and buddy checks are left out.
    analysis
        What `assimilate` returned for `ds`; its ensemble mean is compared with the observations as well.

    Returns
    -------
    xarray.Dataset
        Along ``obs``, in the order of the input: `value`, `error`, `background` (interpolated), `innovation` (O-B), with a model
        `background_error`, with `analysis` also `analysis` and `residual` (O-A), all in the
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
    setup = prepare(
        ds,
        obs,
        model,
        error,
        window,
        background_check,
        quality,
        representativeness,
        lapse_rate,
        operators,
        first_guess,
        any_model=False,
    )
    analysed = None if analysis is None else _analysed(analysis, setup)
    located = setup.located
    if located is None:
        located = locate_observations(None, setup.observable, setup.state.grid, None)
    size = len(located.table)
    background, spread, seen = (np.full(size, np.nan) for _ in range(3))
    code = located.table.code.copy()
    whole = None if setup.model is None else setup.job((0,), 0, None, "cpu", False)
    seen_times = np.unique(located.time_index[located.time_index >= 0])
    for times in [np.arange(len(setup.labels))] if located.trajectory else seen_times[:, None]:
        rows = np.flatnonzero(np.isin(located.time_index, times))
        fields = [np.stack([_field(a, setup, int(t)) for t in times]) for a in setup.arrays]
        inside = rows[located.operator.lengths[rows] > 0]
        operator = located.operator.select(inside)
        background[inside] = operator(_state(fields, setup))
        if analysed is not None:
            seen[inside] = operator(_state([np.stack([_field(a, setup, int(t)) for t in times]) for a in analysed], setup))
        if whole is not None:
            job = at_times(whole, times)
            mean, deviation, _ = engine.moments(job, *fields)
            now = located.take(rows)
            now = dataclasses.replace(now, time_index=np.searchsorted(times, now.time_index))
            code[rows], _, spread[rows] = engine.background_codes(
                now, *engine.in_observation_space(job, mean, deviation), setup.threshold, setup.quality
            )
    order = np.lexsort((located.table.row, located.table.variable, located.table.source))
    table = located.table
    names = np.array([w.name for w in setup.observable])
    shift = setup.shift if len(setup.shift) == size else np.zeros(size)
    data = {
        "value": table.value + shift, "error": table.error, "background": background + shift, "innovation": table.value - background,
    }  # fmt: skip
    if setup.model is not None:
        data["background_error"] = spread
    if analysed is not None:
        data["analysis"], data["residual"] = seen + shift, table.value - seen
    units = {setup.observable[v].units for v in np.unique(table.variable)}
    attrs = {"units": units.pop()} if len(units) == 1 and None not in units else {}
    out = xr.Dataset({k: ("obs", v[order], attrs) for k, v in data.items()})
    out["innovation"].attrs["long_name"] = "observation minus background (O-B)"
    if analysed is not None:
        out["residual"].attrs["long_name"] = "observation minus analysis (O-A)"
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
    if np.isfinite(table.level).any():
        coords["level"] = ("obs", table.level[order])
    if table.time is not None:
        coords["time"] = ("obs", table.time[order], {"standard_name": "time"})
    out = out.assign_coords(coords)
    out.attrs = {"counts": json.dumps(count_codes(code)), "sign": "innovation = observation - background"}
    if setup.model is not None:
        out.attrs["chi2"] = departure_chi2(table.value - background, table.error, spread, code)
    out.attrs["meanings"] = "; ".join(f"{q.name.lower()}: {m}" for q, m in MEANINGS.items())
    return out


def _field(array: xr.DataArray, setup: Prepared, t: int) -> np.ndarray:
    """Return the field of one time, rows and columns as the user has them."""
    return np.asarray((array.isel({setup.time: t}) if setup.time else array).transpose(*setup.state.layout.dims))


def _state(fields: list[np.ndarray], setup: Prepared) -> np.ndarray:
    """Return the flat states of some times in model order and units; `fields` are (times, rows, columns)."""
    scaled = [setup.state.orientation.to_model(f).astype(float) * s + o for f, (s, o) in zip(fields, setup.factors, strict=True)]
    wide: np.ndarray = extended(torch.as_tensor(np.stack(scaled, 1)), setup.operators).numpy().ravel()
    return wide


def _analysed(analysis: xr.Dataset, setup: Prepared) -> list[xr.DataArray]:
    """Return the ensemble means of an analysis, on the coordinates of the background."""
    out = []
    analysis = states.enter(analysis, "analysis").ds
    member = metadata.find_member(analysis)
    for name, array in zip(setup.variables.values(), setup.arrays, strict=True):
        if name not in analysis:
            raise OptionError(f"analysis lacks {name!r}; give what assimilate returned for this ds.")
        mean = analysis[name].mean(member) if member else analysis[name]
        dims = (*setup.state.layout.dims, *([setup.time] if setup.time else []))
        places = (setup.state.layout.latitude, setup.state.layout.longitude)
        same = set(dims) <= set(mean.dims) and all(
            n in mean.coords and mean[n].equals(array[n]) for n in {*places, *dims} & set(array.coords)
        )
        if not same:
            raise OptionError(
                f"analysis is not on the coordinates of ds ({', '.join(dims)}); give what assimilate returned for this ds."
            )
        out.append(mean)
    return out


def innovation_statistics(departures: xr.Dataset, by: str | Sequence[str] = "variable") -> xr.Dataset:
    r"""Return what departures say of the errors, over the observations that were used.

    Parameters
    ----------
    departures
        From `innovations`, with a model, and with `analysis` for the estimates of Desroziers et al.
    by
        Coordinates of `departures` to group by, such as 'variable' or ('variable', 'platform').

    Returns
    -------
    xarray.Dataset
        Along ``group`` (and its coordinates): `count`; `mean` and `std` of O-B; `chi2`, the mean of (O-B)^2 / (s_o^2 + s_b^2), 1 where the errors
        are right; `assumed_error`, root mean square of s_o; with an analysis also mean and std of O-A, `estimated_error` =
        sqrt(E[(O-A)(O-B)]) and `estimated_background_error` = sqrt(E[(A-B)(O-B)]), NaN where the expectation is negative.

    Notes
    -----
    Estimates from observations that the analysis used suppose that its weights were nearly right; they are biased otherwise.

    References
    ----------
    Desroziers, G. et al. (2005), Diagnosis of observation, background and analysis-error statistics in observation space, Q. J. R. Meteorol.
    Soc. 131, 3385-3396, eq. 1 to 3.
    """
    names = [by] if isinstance(by, str) else list(by)
    lacking = [n for n in names if n not in departures.coords]
    if lacking:
        raise OptionError(
            f"by={lacking[0]!r} is no coordinate of the departures; they have {', '.join(map(str, departures.coords))}."
        )
    used = departures.isel(obs=np.flatnonzero(departures["quality_code"].values == Quality.USED))
    columns = [used[n].values.astype(str) for n in names]
    keys, group = np.unique(np.stack(columns, -1) if columns else np.zeros((0, 1)), axis=0, return_inverse=True)
    group = group.ravel()
    count = np.bincount(group, minlength=len(keys)).astype(float)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.bincount(group, values, len(keys)) / count)

    ob = used["innovation"].values
    found = {"count": count.astype(int), "mean": mean(ob), "std": np.sqrt(np.maximum(mean(ob**2) - mean(ob) ** 2, 0.0))}
    found["assumed_error"] = np.sqrt(mean(used["error"].values ** 2))
    if "background_error" in used:
        found["chi2"] = mean(ob**2 / (used["error"].values ** 2 + used["background_error"].values ** 2))
    if "residual" in used:
        oa = used["residual"].values
        found |= {"mean_residual": mean(oa), "std_residual": np.sqrt(np.maximum(mean(oa**2) - mean(oa) ** 2, 0.0))}
        for name, product in (("estimated_error", mean(oa * ob)), ("estimated_background_error", mean((ob - oa) * ob))):
            found[name] = np.sqrt(np.where(product >= 0, product, np.nan))
    out = xr.Dataset({k: ("group", v) for k, v in found.items()}, coords={n: ("group", keys[:, i]) for i, n in enumerate(names)})
    return out.assign_attrs(sign="O-B: observation minus background; O-A: observation minus analysis")

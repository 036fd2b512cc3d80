"""`innovations`: observation minus background, with the quality code of every observation; and what they say of the errors."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy.optimize import minimize_scalar

from xgenda import engine, metadata, states
from xgenda.curvilinear import AnyGrid
from xgenda.diffusion.covariances import KERNELS, SphereKernel
from xgenda.errors import OptionError, check_choice
from xgenda.formatting import user_level
from xgenda.observations.containers import ErrorLike, Observations
from xgenda.observations.operators import Located, locate_observations
from xgenda.observations.quality import MEANINGS, Quality, QualityControl, count_codes
from xgenda.operators import AnyOperator
from xgenda.preparation import ModelLike, Prepared, at_times, departure_chi2, observed_state, prepare

FEWEST, MOST_AT_ONCE, GROSS = 30, 1000, 5.0  # of a fit: observations, observations per time, robust standard deviations
LENGTHS = (5e3, 5e6)  # m


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
    background, spread, seen, code = _seen(setup, located, analysed)
    order = np.lexsort((located.table.row, located.table.variable, located.table.source))
    table = located.table
    names = np.array([w.name for w in setup.observable])
    shift = setup.shift
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
    coords["time_index"] = (
        "obs",
        located.time_index[order],
        {"long_name": "position of the analysis time, -1 outside of all windows"},
    )
    out = out.assign_coords(coords)
    out.attrs = {"counts": json.dumps(count_codes(code)), "sign": "innovation = observation - background"}
    if setup.model is not None:
        out.attrs["chi2"] = departure_chi2(table.value - background, table.error, spread, code)
    out.attrs["meanings"] = "; ".join(f"{q.name.lower()}: {m}" for q, m in MEANINGS.items())
    return out


def _seen(
    setup: Prepared, located: Located, analysed: list[xr.DataArray] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what observations see of the background, its standard deviation, what they see of the analysis, and their codes."""
    size = len(located.table)
    background, spread, seen = (np.full(size, np.nan) for _ in range(3))
    code = located.table.code.copy()
    whole = None if setup.model is None else setup.job((0,), 0, None, "cpu", False)
    seen_times = np.unique(located.time_index[located.time_index >= 0])
    for times in [np.arange(len(setup.labels))] if located.trajectory else seen_times[:, None]:
        rows = np.flatnonzero(np.isin(located.time_index, times))
        fields = _fields(setup.arrays, setup, times)
        inside = rows[located.operator.lengths[rows] > 0]
        operator = located.operator.select(inside)
        background[inside] = operator(observed_state(setup, fields).ravel())
        if analysed is not None:
            seen[inside] = operator(observed_state(setup, _fields(analysed, setup, times)).ravel())
        if whole is not None:
            job = at_times(whole, times)
            mean, deviation, _ = engine.moments(job, *fields)
            now = located.take(rows)
            now = dataclasses.replace(now, time_index=np.searchsorted(times, now.time_index))
            code[rows], _, spread[rows] = engine.background_codes(
                now, *engine.in_observation_space(job, mean, deviation), setup.threshold, setup.quality
            )
    code[(code <= Quality.PASSIVE) & ~np.isfinite(background)] = Quality.OPERATOR
    return background, spread, seen, code


def _fields(arrays: Sequence[xr.DataArray], setup: Prepared, times: np.ndarray) -> list[np.ndarray]:
    """Return each array at some times, shape (times, rows, columns) as the user has them."""
    dims = setup.state.layout.dims
    picked = [[a.isel({setup.time: int(t)}) if setup.time else a for t in times] for a in arrays]
    return [np.stack([np.asarray(a.transpose(*dims)) for a in each]) for each in picked]


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
    each = [
        np.unique(used[n].values if used[n].dtype.kind in "fiuM" else used[n].values.astype(str), return_inverse=True)
        for n in names
    ]
    keys, group = np.unique(np.stack([place.ravel() for _, place in each], -1), axis=0, return_inverse=True)
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
    out = xr.Dataset(
        {k: ("group", v) for k, v in found.items()}, coords={n: ("group", each[i][0][keys[:, i]]) for i, n in enumerate(names)}
    )
    return out.assign_attrs(sign="O-B: observation minus background; O-A: observation minus analysis")


def fit_covariance(
    ds: xr.Dataset | xr.DataArray,
    obs: Observations,
    *,
    covariance: str = "exponential",
    window: Any = None,
    quality: QualityControl | None = None,
    lapse_rate: float | Mapping[str, float] | None = None,
) -> pd.DataFrame:
    r"""Estimate the errors of a background and of observations: what to give to `gaussian_prior` and as `error`.

    Departures of one variable and analysis time are taken as N(0, std^2 H C H^T + error^2 I), with C = c(d / length_scale) on the grid
    and H the interpolation: errors of the background are correlated in space and those of the observations are not, which tells
    them apart (Hollingsworth and Loennberg 1986). The three numbers maximise the likelihood of each departure given all others
    (Rasmussen and Williams 2006, eq. 5.10 to 5.12).

    Parameters
    ----------
    ds
        The background; read at the observed times when called.
    obs, window, quality, lapse_rate
        As in `assimilate`. What has no code 'used' or 'passive' is left out, and so is what lies more than five robust standard deviations
        from the median; of more than a thousand observations of one time some are taken at random, always the same.
    covariance
        'exponential', 'matern32', 'matern52' or 'gaussian', as in `gaussian_prior`.

    Returns
    -------
    pandas.DataFrame
        One row per variable: `length_scale` in metres, `std` and `error` in the units of `ds`, `count`.

    Raises
    ------
    OptionError
        For fewer than 30 departures of a variable.

    Notes
    -----
    Observations whose errors are correlated are mistaken for background. Score an analysis on other observations than these.

    References
    ----------
    Hollingsworth, A. and Loennberg, P. (1986), The statistical structure of short-range forecast errors as determined from radiosonde
    data. Part I: the wind field, Tellus A 38, 111-136.
    Rasmussen, C. E. and Williams, C. K. I. (2006), Gaussian processes for machine learning, MIT Press.

    Examples
    --------
    >>> import xgenda
    >>> background = xgenda.tutorial.open_dataset("europe-t2m-forecast")
    >>> stations = xgenda.tutorial.open_dataset("europe-synop")[["t2m"]].isel(obs=slice(0, 400))
    >>> fit = xgenda.fit_covariance(background, stations, lapse_rate=0.0065)
    >>> prior = xgenda.gaussian_prior(background, length_scale=fit.length_scale.to_dict(), std=fit["std"].to_dict())
    """
    check_choice("covariance", covariance, KERNELS)
    setup = prepare(metadata.as_dataset(ds), obs, None, 1.0, window, None, quality, None, lapse_rate, any_model=False)
    rows = {}
    located = setup.located
    if located is None:
        raise OptionError(f"obs is empty; a covariance needs at least {FEWEST} departures.")
    background = _seen(setup, located, None)[0]
    departure = located.table.value - background
    for v in np.unique(located.table.variable):
        at = np.flatnonzero((located.table.variable == v) & (located.table.code <= Quality.PASSIVE) & np.isfinite(departure))
        middle = np.median(departure[at]) if len(at) else 0.0
        robust = 1.4826 * np.median(np.abs(departure[at] - middle)) if len(at) else 0.0
        at = at[np.abs(departure[at] - middle) <= GROSS * robust]
        name = setup.observable[v].name
        if len(at) < FEWEST:
            raise OptionError(f"{len(at)} departures of {name!r} can be used; a covariance needs at least {FEWEST}.")
        rows[name] = _most_likely(departure[at], located.take(at), setup.state.grid, covariance, name)
    return pd.DataFrame(rows).T.astype({"count": int}).rename_axis("variable")


def _most_likely(departure: np.ndarray, located: Located, grid: AnyGrid, covariance: str, name: str) -> dict[str, float]:
    rng = np.random.default_rng(0)
    latitude, longitude = grid.points()
    parts = []
    for t in np.unique(located.time_index):
        at = np.flatnonzero(located.time_index == t)
        at = np.sort(rng.permutation(at)[:MOST_AT_ONCE])
        matrix = located.operator.select(at).matrix
        cells = np.unique(matrix.indices)
        places = [torch.as_tensor(a[cells % grid.size]) for a in (latitude, longitude)]
        level = cells // grid.size  # errors of different levels are taken to be independent
        parts.append((departure[at], matrix[:, cells], places, level[:, None] == level))
    found = {}

    def best_share(length: float) -> tuple[float, float, float]:
        """Return the lowest cost for a length scale, and the share of the observations in the variance and the variance there."""
        spectra = []
        for value, interpolation, places, same in parts:
            index = torch.arange(len(places[0]))
            between = SphereKernel.at(places[0], places[1], covariance, length).correlation(index, index).numpy() * same
            eigen, modes = np.linalg.eigh(interpolation @ (interpolation @ between).T)
            spectra.append((np.maximum(eigen, 0.0), modes, value @ modes, modes**2))

        def surprise(share: float) -> tuple[float, float]:
            """Return the mean logarithm of the variance of a departure given all others, and the mean square over that variance."""
            squares, variances = [], []
            for eigen, modes, along, weights in spectra:
                inverse = 1.0 / ((1 - share) * eigen + share)
                precision = weights @ inverse
                squares.append((modes @ (along * inverse)) ** 2 / precision)
                variances.append(-np.log(precision))
            return float(np.concatenate(variances).mean()), float(np.concatenate(squares).mean())

        def cost(share: float) -> float:
            logarithm, square = surprise(share)
            return logarithm + float(np.log(square))

        share = float(minimize_scalar(cost, bounds=(1e-3, 1 - 1e-3), method="bounded").x)
        return cost(share), share, surprise(share)[1]

    def profile(logarithm: float) -> float:
        found[logarithm] = best_share(float(np.exp(logarithm)))
        return found[logarithm][0]

    minimize_scalar(profile, bounds=tuple(np.log(LENGTHS)), method="bounded", options={"xatol": 0.02})
    best = min(found, key=lambda k: found[k][0])
    _, share, variance = found[best]
    if not 1.1 * LENGTHS[0] < np.exp(best) < LENGTHS[1] / 1.1:
        warnings.warn(
            f"The departures do not tell the length scale of {name!r}: its fit ends at {np.exp(best) / 1e3:.0f} km, which is as far as was "
            f"looked. Give more observations or a larger area, and do not use these numbers.",
            stacklevel=user_level(),
        )
    return {
        "length_scale": float(np.exp(best)), "std": float(np.sqrt((1 - share) * variance)), "error": float(np.sqrt(share * variance)),
        "count": sum(len(p[0]) for p in parts),
    }  # fmt: skip

"""When observations are: the analysis time whose window they fall in, and their weights in time on the states of a trajectory."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import xarray as xr

from xgenda import metadata
from xgenda.errors import ObservationError, OptionError

#: Not the spacing of the times: then a subset of the times would be given other observations.
DEFAULT_WINDOW = np.timedelta64(1, "h")
NEVER = np.iinfo(np.int64).min  # what NaT is as a number


def parse_window(window: object, argument: str = "window") -> np.timedelta64:
    """Return a time span as a positive numpy timedelta64 in nanoseconds."""
    try:
        if not isinstance(window, (str, datetime.timedelta, np.timedelta64)):
            raise TypeError
        width = np.timedelta64(pd.Timedelta(window).value, "ns")
    except (ValueError, TypeError):
        shown = f"={window!r}" if len(repr(window)) <= 80 else f" of {type(window).__name__}"
        raise OptionError(f"{argument}{shown} is no time span; give for example {argument}='6h'.") from None
    if not width > np.timedelta64(0, "ns"):
        raise OptionError(f"{argument}={window!r} must be positive; give for example {argument}='6h'.")
    return width


def assign_times(
    moments: np.ndarray | None, size: int, times: xr.DataArray | None, window: object, argument: str, *, trajectory: bool = False
) -> np.ndarray:
    """Return the analysis time of each observation, -1 where it falls in no window.

    Parameters
    ----------
    moments, size
        Times of the observations, or None, and their number.
    times
        Of the state.
    window
        Width, half-open around each time: [t - w/2, t + w/2). None: 1 h, or for a trajectory its spacing, so that windows tile.
    trajectory
        Whether the states are one trajectory.
    """
    width = None if window is None else parse_window(window)
    count = 1 if times is None else times.size
    if moments is None or times is None or not size:
        if count > 1 and size:
            raise ObservationError(
                f"{argument} has no time and the state has {count} times. Give each observation its time, or select one: ds.isel(time=0)"
            )
        return np.zeros(size, dtype=np.int64)
    state, seen, tick = common_ticks(moments, times, argument)
    order = np.argsort(state)
    ordered = state[order]
    if width is None and trajectory and count > 1:
        half = np.diff(ordered).max() // 2
    else:
        half = np.int64((DEFAULT_WINDOW if width is None else width).astype("timedelta64[ns]").astype(np.int64) // (2 * tick))
    right = np.clip(np.searchsorted(ordered, seen), 0, len(ordered) - 1)
    left = np.clip(right - 1, 0, None)
    nearest = np.where(np.abs(seen - ordered[left]) < np.abs(ordered[right] - seen), left, right)
    distance = seen - ordered[nearest]
    ok = (distance >= -half) & (distance < half) & (seen != NEVER)
    return np.where(ok, order[nearest], -1)


def far_away(seconds: float) -> str:
    """Return in words how far observations are from the nearest time, and what to do about it."""
    hours = seconds / 3600
    advice = f", or widen the window: window='{int(2 * hours) + 1}h'" if hours < 24 else ""
    shown = f"{hours:.3g} h" if hours < 48 else f"{hours / 24:.4g} days" if hours < 24e3 else f"{hours / 24:,.0f} days"
    return f"The nearest is {shown} away. Is their time UTC? Select the right ones{advice}"


def period_of(times: xr.DataArray | None, window: object, *, trajectory: bool = False) -> tuple[Any, Any] | None:
    """Return the first and the last moment of observations that may matter: a whole window before the first and after the last state."""
    if times is None or not times.size:
        return None
    stamps = np.sort(np.atleast_1d(times.values))
    width = DEFAULT_WINDOW if window is None else parse_window(window)
    seconds = int(width / np.timedelta64(1, "s")) + 1
    span = np.timedelta64(seconds, "s") if stamps.dtype.kind == "M" else datetime.timedelta(seconds=seconds)
    if trajectory and window is None and len(stamps) > 1:
        span = np.diff(stamps).max()
    return stamps[0] - span, stamps[-1] + span


def trajectory_weights(
    moments: np.ndarray, times: xr.DataArray, argument: str, period: np.ndarray | None = None
) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """Return the weights of the states of a trajectory in each observation, which is linear between them.

    Parameters
    ----------
    moments
        Times of the observations, shape (m,).
    times
        Of the states, in any order.
    period
        Nanoseconds up to `moments` over which an observation is a mean, shape (m,); 0 or None: at one moment.

    Returns
    -------
    scipy.sparse.csr_array
        Shape (m, times). Before the first state and after the last one the trajectory is constant.
    numpy.ndarray
        How far before the first state the period begins, in nanoseconds, shape (m,).
    """
    state, seen, tick = common_ticks(moments, times, argument)
    order = np.argsort(state)
    axis = state[order].astype(float)
    end = np.where(seen == NEVER, axis[0], seen)
    start = end - (0 if period is None else period / tick)
    rows = np.arange(len(end))
    instant = end == start
    lower, part = bracket(axis, end)
    row, column = [rows[instant], rows[instant]], [lower[instant], np.minimum(lower[instant] + 1, len(axis) - 1)]
    weight = [1.0 - part[instant], part[instant]]
    mean = rows[~instant]
    if len(mean):
        dense = (_integral(axis, end[mean]) - _integral(axis, start[mean])) / (end - start)[mean, None]
        at, where = np.nonzero(dense)
        row, column, weight = [*row, mean[at]], [*column, where], [*weight, dense[at, where]]
    shape = (len(end), len(axis))
    entries = (np.concatenate(weight), (np.concatenate(row), order[np.concatenate(column)]))
    out = scipy.sparse.coo_array(entries, shape=shape).tocsr()
    out.eliminate_zeros()
    return out, np.maximum(axis[0] - start, 0.0) * tick


def bracket(axis: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the state before each value, and the part of the way to the next one."""
    if len(axis) == 1:
        return np.zeros(len(values), dtype=np.int64), np.zeros(len(values))
    safe = np.clip(values, axis[0], axis[-1])
    lower = np.clip(np.searchsorted(axis, safe, side="right") - 1, 0, len(axis) - 2)
    return lower, (safe - axis[lower]) / (axis[lower + 1] - axis[lower])


def _integral(axis: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the weights of the states in the integral of the trajectory from its first state to each value, shape (m, times)."""
    lower, part = bracket(axis, values)
    step = np.diff(axis) if len(axis) > 1 else np.ones(1)
    whole = np.zeros((len(axis), len(axis)))  # up to each state, by trapezoids
    for j in range(1, len(axis)):
        whole[j] = whole[j - 1]
        whole[j, j - 1 : j + 1] += step[j - 1] / 2
    out, rows = whole[lower], np.arange(len(values))
    out[rows, lower] += step[np.minimum(lower, len(step) - 1)] * (part - part**2 / 2)
    upper = np.minimum(lower + 1, len(axis) - 1)
    out[rows, upper] += step[np.minimum(lower, len(step) - 1)] * part**2 / 2
    out[rows, 0] += np.minimum(values - axis[0], 0.0)
    out[rows, -1] += np.maximum(values - axis[-1], 0.0)
    return np.asarray(out)


def common_ticks(moments: np.ndarray, times: xr.DataArray, argument: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the times of the state and of observations as integers on one axis, and the nanoseconds of one count.

    Raises
    ------
    ObservationError
        If they have different calendars, or years that nanoseconds cannot count.
    """
    stamps = np.atleast_1d(times.values)
    if stamps.dtype.kind == moments.dtype.kind == "M" and not (fits_nanoseconds(stamps) and fits_nanoseconds(moments)):
        raise ObservationError(
            f"The times of {argument} or of the state lie outside the years 1678 to 2262, which numpy counts in nanoseconds; use "
            f"cftime in both: ds.convert_calendar('proleptic_gregorian', use_cftime=True)"
        )
    if stamps.dtype.kind != moments.dtype.kind or (
        stamps.dtype.kind == "O" and len(moments) and type(stamps.flat[0]) is not type(moments.flat[0])
    ):
        raise ObservationError(
            f"The time of {argument} is {type(moments.flat[0]).__name__} and that of the state is {type(stamps.flat[0]).__name__}; "
            f"use one calendar: {argument}.convert_calendar({str(times.dt.calendar)!r}, use_cftime={stamps.dtype.kind == 'O'})"
        )
    tick = 1 if stamps.dtype.kind == "M" else 1000
    return ticks(stamps, stamps), ticks(moments, stamps), tick


def fits_nanoseconds(stamps: np.ndarray) -> bool:
    """Whether datetime64 of any resolution lie in the years 1678 to 2262."""
    seconds = stamps[~np.isnat(stamps)].astype("datetime64[s]").astype(np.int64)
    return bool((np.abs(seconds) < np.iinfo(np.int64).max // 10**9).all())


def ticks(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return times as integers: nanoseconds for datetime64, microseconds since the first of `reference` for cftime.

    The years of climate calendars exceed what 64 bits of nanoseconds can count.
    """
    if values.dtype.kind == "M":
        return values.astype("datetime64[ns]").astype(np.int64)
    origin, step = reference.flat[0], datetime.timedelta(microseconds=1)
    return np.array([(v - origin) // step for v in values.ravel()], dtype=np.int64)


def mean_times(times: np.ndarray, weight: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the weighted mean time of each group, groups numbered from 0."""
    count = int(group.max(initial=-1)) + 1
    first = np.zeros(count, dtype=np.int64)
    first[group[::-1]] = np.arange(len(group))[::-1]
    since = (times - times[first[group]]).astype("timedelta64[us]").astype(float)
    mean = np.round(np.bincount(group, weight * since, count) / np.bincount(group, weight, count)).astype("timedelta64[us]")
    if times.dtype.kind == "M":
        return np.asarray(times[first] + mean)
    return np.array(
        [t + datetime.timedelta(microseconds=int(m.astype(int))) for t, m in zip(times[first], mean, strict=True)], dtype=object
    )


def later(ds: xr.Dataset, step: np.timedelta64) -> Any:
    """Return the time of a state plus a time span, datetime64 or cftime."""
    name = metadata.find_time(ds)
    if name is None:
        raise OptionError("The state has no time; assign one: ds.assign_coords(time=numpy.datetime64('2020-01-01T00:00'))")
    now = ds[name].values
    if now.dtype.kind == "M":
        return now + step
    return now + step.astype("timedelta64[us]").item()


def at_time(ds: xr.Dataset, time: Any) -> xr.Dataset:
    """Return a state with another time."""
    name = metadata.find_time(ds)
    assert name is not None
    return ds.assign_coords({name: (ds[name].dims, time, ds[name].attrs)})

"""The times of the analyses of a cycle: what a user gives, of whatever kind, in the calendar of the initial state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata
from xgenda.ensembles import Frame
from xgenda.errors import CoordinateError, OptionError
from xgenda.observations.containers import Observations
from xgenda.observations.shapes import decoded, open_container
from xgenda.observations.times import DEFAULT_WINDOW, fits_nanoseconds, parse_window

EXAMPLE = "times=pandas.date_range('2020-01-01', periods=8, freq='6h')"


def analysis_times(given: Any, window: Any, frame: Frame, obs: Observations) -> np.ndarray:
    """Return the analysis times, ascending: datetime64 in nanoseconds, or cftime.

    Parameters
    ----------
    given
        Times as anything that pandas, numpy or xarray have for them; None: every `window` from the initial time to the last observation.
    window
        Time span.
    frame
        Of the initial state.
    obs
        Observations.

    Raises
    ------
    OptionError, CoordinateError
        If they are no times, of another calendar, do not ascend, or begin too early.
    """
    start = frame.template[frame.time].values[()]
    _check_years(np.atleast_1d(frame.template[frame.time].values), "initial")
    if given is None:
        if window is None:
            raise OptionError(f"times or window is needed: {EXAMPLE}, or window='6h'")
        return _every(parse_window(window), start, obs)
    values = _as_times(given)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "MO":
        shown = f" of {type(given).__name__}" if len(str(given)) > 100 else f"={given!r}"
        raise OptionError(f"times{shown} is not accepted; give the analysis times: {EXAMPLE}")
    _check_years(values, "times")
    if values.dtype.kind == "M":
        values = values.astype("datetime64[ns]")
    if any(_calendar(v) != _calendar(start) for v in values):
        other = next(v for v in values if _calendar(v) != _calendar(start))
        raise CoordinateError(
            f"times are {_calendar(other)} and the time of initial is {_calendar(start)}; use one calendar: "
            f"times=xarray.date_range(..., calendar={_name(start)!r}, use_cftime={not isinstance(start, np.datetime64)})"
        )
    if values.dtype.kind == "M" and np.isnat(values).any():
        raise OptionError(f"times hold NaT; leave them out: times=times[~numpy.isnat(times)], or {EXAMPLE}")
    if not (values[1:] > values[:-1]).all():
        raise OptionError("times must ascend and not repeat: times=numpy.unique(times)")
    if values[0] < start:
        raise OptionError(f"times begin at {values[0]}, before initial, which is of {start}. Leave out those before it.")
    return values


def shortest(times: np.ndarray) -> Any:
    """Return the shortest spacing of times; for a single one the window that it has in `assimilate`."""
    if len(times) < 2:
        return DEFAULT_WINDOW
    return pd.Timedelta(seconds=float(metadata.seconds_between(times).min()))


def _as_times(given: Any) -> np.ndarray:
    """Return what was given as an array of datetime64, in UTC, or of cftime; an empty one where it is neither."""
    if isinstance(given, xr.DataArray) and given.dtype.kind in "fiu" and " since " in str(given.attrs.get("units", "")):
        given = xr.decode_cf(given.rename("times").to_dataset())["times"]
    if isinstance(given, Iterator):
        given = list(given)
    if isinstance(given, (pd.Index, pd.Series)):
        given = given.array
    values = np.atleast_1d(np.asarray(given.values if isinstance(given, xr.DataArray) else given))
    if values.dtype.kind in "UO" and not (values.dtype.kind == "O" and len(values) and hasattr(values[0], "calendar")):
        try:
            return np.asarray(pd.to_datetime(values, utc=True).tz_localize(None).values)
        except (ValueError, TypeError, AttributeError):
            return np.zeros(0)
    return values


def _calendar(moment: Any) -> str:
    return "datetime64" if isinstance(moment, np.datetime64) else f"{type(moment).__name__} of the calendar {_name(moment)!r}"


def _name(moment: Any) -> str:
    return str(getattr(moment, "calendar", "proleptic_gregorian"))


def _check_years(values: np.ndarray, argument: str) -> None:
    """Refuse years that nanoseconds cannot count, which would silently become others."""
    if values.dtype.kind == "M" and not fits_nanoseconds(values):
        raise CoordinateError(
            f"{argument} reaches the years {values.min()} to {values.max()}, beyond 1678 to 2262, which numpy counts in nanoseconds; use cftime in "
            f"initial, obs and times: ds.convert_calendar('proleptic_gregorian', use_cftime=True)"
        )


def _every(width: np.timedelta64, start: Any, obs: Observations) -> np.ndarray:
    """Return times every `width` to the last observation."""
    seen = []
    for item in obs if isinstance(obs, (list, tuple)) else [obs]:
        container = None if item is None else open_container(item, "obs")
        if container is not None and container.time is not None:
            found = np.ravel(decoded(container.ds[container.time], "obs"))
            found = found[~pd.isnull(found)]
            if any(_calendar(v) != _calendar(start) for v in found[:1]):
                raise CoordinateError(
                    f"The time of obs is {_calendar(found[0])} and that of initial is {_calendar(start)}; use one calendar: "
                    f"obs.convert_calendar({_name(start)!r}, use_cftime={not isinstance(start, np.datetime64)})"
                )
            seen.append(found)
    moments = np.concatenate(seen) if seen else np.zeros(0)
    if not len(moments):
        raise OptionError(f"times is needed where obs has none: {EXAMPLE}")
    one = width if isinstance(start, np.datetime64) else width.astype("timedelta64[us]").item()
    first, last = moments.min(), moments.max()
    begin = start if first < start + one / 2 else start + one
    count = int(np.floor((last - begin) / one + 0.5)) + 1
    if count < 1:
        raise OptionError(f"obs end at {last}, before the first analysis time {begin}. Give later ones, or times.")
    return np.array([begin + k * one for k in range(count)])

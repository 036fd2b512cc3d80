"""Forecasts for `xgenda.cycle`: any function from a state to the state a step later will do; here are the simplest, and an adapter.

A forecast gets a Dataset of one time (the scalar coordinate ``time``) with all members along ``member``, and returns one with the same variables
on the same grid, whose time is later. What it returns must depend on what it gets, and on nothing that it remembers: only then does a
cycle that was interrupted go on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata
from xgenda.errors import OptionError
from xgenda.observations.times import parse_window

Forecast = Callable[[xr.Dataset], xr.Dataset]


@dataclass(frozen=True)
class Persistence:
    """The forecast that nothing changes; see `persistence`."""

    step: np.timedelta64

    def __call__(self, ds: xr.Dataset) -> xr.Dataset:
        """Return `ds` one step later."""
        return at_time(ds, later(ds, self.step))


def persistence(step: Any) -> Persistence:
    """Return the forecast that nothing changes, one `step` at a time: the least that a forecast must beat.

    Parameters
    ----------
    step
        Time span, such as '1h'.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> from xgenda.forecasts import persistence
    >>> state = xr.Dataset({"t2m": ("x", [280.0])}, coords={"time": np.datetime64("2020-01-01T00:00", "ns")})
    >>> str(persistence("6h")(state).time.values)[:13]
    '2020-01-01T06'
    """
    return Persistence(parse_window(step, "step"))


def by_member(forecast: Forecast) -> Forecast:
    """Return a forecast of an ensemble from one of a single state: called once for each member, without the dimension ``member``.

    Parameters
    ----------
    forecast
        From a Dataset of one time to the same a step later.

    Examples
    --------
    >>> from xgenda.forecasts import by_member, persistence
    >>> ensemble_forecast = by_member(persistence("6h"))
    """
    if not callable(forecast):
        raise OptionError(f"forecast is a {type(forecast).__name__}; a function from a Dataset to a Dataset is needed.")

    def of_all(ds: xr.Dataset) -> xr.Dataset:
        member = metadata.find_member(ds)
        if member is None:
            return forecast(ds)
        parts = [forecast(ds.isel({member: k}, drop=True)) for k in range(ds.sizes[member])]
        with_members = [n for n, v in ds.data_vars.items() if member in v.dims]
        joined = xr.concat([p[with_members] for p in parts], ds[member], coords="minimal", compat="override", join="exact")
        return parts[0].drop_vars(with_members).merge(joined, join="exact", compat="override")

    return of_all


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

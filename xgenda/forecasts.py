"""Forecasts for `xgenda.cycle`: any function from a state to the state a step later will do; here are the simplest, and adapters.

A forecast gets a Dataset of one time (the scalar coordinate ``time``) with all members along ``member``, and returns one with the same variables
on the same grid, whose time is later. What it returns must depend on what it gets, and on nothing that it remembers: only then does a
cycle that was interrupted go on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata
from xgenda.earth2studio_forecasts import earth2studio
from xgenda.errors import OptionError
from xgenda.observations.times import at_time, later, parse_window
from xgenda.onnx_forecasts import onnx

__all__ = ["Forecast", "by_member", "earth2studio", "identity_of", "onnx", "persistence"]

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
    if isinstance(step, xr.Dataset):  # by `cycle`, which refuses it, or by someone else's loop
        raise OptionError("persistence makes a forecast from a step, and got a state; give forecast=persistence('6h')")
    return Persistence(parse_window(step, "step"))


@dataclass(frozen=True)
class ByMember:
    """A forecast of an ensemble, member by member; see `by_member`."""

    forecast: Forecast

    def __call__(self, ds: xr.Dataset) -> xr.Dataset:
        """Return the state of all members one step later."""
        member = metadata.find_member(ds)
        if member is None:
            return self.forecast(ds)
        parts = [self.forecast(ds.isel({member: k}, drop=True)) for k in range(ds.sizes[member])]
        with_members = [n for n, v in ds.data_vars.items() if member in v.dims]
        joined = xr.concat([p[with_members] for p in parts], ds[member], coords="minimal", compat="override", join="exact")
        return parts[0].drop_vars(with_members).merge(joined, join="exact", compat="override")

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """That of the forecast of one state."""
        return identity_of(self.forecast)


def by_member(forecast: Forecast) -> ByMember:
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
    return ByMember(forecast)


def identity_of(forecast: Forecast) -> Mapping[str, Any] | None:
    """Return what is written down of a forecast and compared where a cycle is resumed; None for a function that says nothing of itself.

    A forecast says it by an attribute `identity`, a mapping from text to what JSON can hold, such as checksums of its weights.
    """
    found = getattr(forecast, "identity", None)
    return found if isinstance(found, Mapping) else None

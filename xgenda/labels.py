"""Fields of someone else's making, such as a forecast, read by their labels: order of dimensions, coordinates and members, units, times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata
from xgenda.errors import CoordinateError, GridError, StateError, UnitsError

#: Part of the largest absolute value by which coordinates may differ: rounding of single precision.
ROUNDING = 1e-6
#: Part of the smallest spacing by which they may differ, where that is less.
APART = 0.1


def order_along(dim: str, wanted: xr.Variable, given: xr.Variable, argument: str, *, turns: bool = False) -> np.ndarray | None:
    """Return the positions along `dim` that bring a coordinate into the wanted order; None where it is in order.

    Parameters
    ----------
    dim
        Its name, for messages.
    wanted, given
        One-dimensional coordinates of one length: as it must be and as it is.
    argument
        What holds `given`, for messages.
    turns
        Whether values are longitudes in degrees, which are the same a whole turn away.

    Raises
    ------
    GridError
        If they are different places, or hold NaN.
    """
    mine, theirs = wanted.values, given.values
    if not (mine.dtype.kind in "fiu" and theirs.dtype.kind in "fiu"):
        return _order_of_names(dim, mine, theirs, argument)
    mine, theirs = mine.astype(float), theirs.astype(float)
    units = (given.attrs.get("units"), wanted.attrs.get("units"))
    if None not in units and units[0] != units[1] and not turns:
        scale, offset = _factors(str(units[0]), str(units[1]), f"{argument}: the coordinate {dim!r}")
        theirs = theirs * scale + offset
    if not np.isfinite(theirs).all():
        raise GridError(
            f"{argument} has a coordinate {dim!r} with values that are not finite; give it the one of the state: "
            f"out.assign_coords({dim}=ds.{dim})"
        )
    spacing = np.abs(np.diff(np.sort(mine))).min(initial=np.inf)
    slack = min(ROUNDING * np.abs(mine).max(initial=1.0), APART * spacing)
    if turns:  # counted eastward of the westernmost, with room for rounding
        origin = mine.min() - min(spacing, 1.0) / 2
        keys = [(v - origin) % 360.0 for v in (mine, theirs)]
        slack = max(slack, min(ROUNDING * 360.0, APART * spacing))
    else:
        keys = [mine, theirs]
    orders = [np.argsort(k, kind="stable") for k in keys]
    if np.abs(keys[0][orders[0]] - keys[1][orders[1]]).max(initial=0.0) > slack:
        raise GridError(
            f"{argument} is on another grid than the initial state: its {dim!r} goes from {theirs[0]:.6g} to {theirs[-1]:.6g}, and that of "
            f"initial from {mine[0]:.6g} to {mine[-1]:.6g}. Interpolate: out.interp_like(ds)"
        )
    out = np.empty(len(mine), dtype=np.int64)
    out[orders[0]] = orders[1]
    return None if (out == np.arange(len(out))).all() else out


def _order_of_names(dim: str, mine: np.ndarray, theirs: np.ndarray, argument: str) -> np.ndarray | None:
    if len(mine) == len(theirs) and (mine == theirs).all():
        return None
    found = pd.Index(theirs)
    out = found.get_indexer(pd.Index(mine)) if found.is_unique else np.array([-1])
    if (out < 0).any():
        raise GridError(
            f"{argument} has other labels along {dim!r} than the initial state: {', '.join(map(str, theirs[:4]))}, and initial has "
            f"{', '.join(map(str, mine[:4]))}. Give it those of the state: out.assign_coords({dim}=ds.{dim})"
        )
    return np.asarray(out)


def order_of_members(dim: str, numbers: np.ndarray, given: xr.Variable, argument: str) -> np.ndarray | None:
    """Return the positions that bring members into the order of `numbers`; None where they are in order.

    Raises
    ------
    StateError
        If they are others.
    """
    theirs = given.values
    if len(theirs) == len(numbers) and (theirs == numbers).all():
        return None
    found, mine = pd.Index(theirs), pd.Index(numbers)
    if found.is_unique and mine.is_unique and len(found) == len(mine):
        out = found.get_indexer(mine)
        if (out >= 0).all():
            return np.asarray(out)
    raise StateError(
        f"{argument} has {len(theirs)} members, called {_some(theirs)}, and the state has {len(numbers)}, called {_some(numbers)}. If they are the "
        f"same in this order, say so: out.assign_coords({dim}=ds.{dim})"
    )


def _some(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")


def check_positions(wanted: xr.Dataset, given: xr.Dataset, latitude: str, longitude: str, dims: set[str], argument: str) -> None:
    """Refuse positions along two dimensions, or along one that bears another name, that are not those of the state.

    Raises
    ------
    GridError
        If they differ.
    """
    for name in (latitude, longitude):
        if name in dims or name not in given.variables or name not in wanted.variables:
            continue
        mine, other = wanted.variables[name], given.variables[name]
        if set(mine.dims) != set(other.dims) or not set(mine.dims) <= dims:
            continue
        theirs = other.transpose(*mine.dims).values
        apart: Any = np.inf
        if theirs.shape == mine.shape and theirs.dtype.kind in "fiu":
            apart = np.abs(theirs.astype(float) - mine.values)
            if name == longitude:
                apart = np.minimum(apart % 360.0, 360.0 - apart % 360.0)
        if not np.all(apart <= ROUNDING * 360.0):
            raise GridError(
                f"{argument} is on another grid than the initial state: its {name!r} differs by up to {np.max(apart):.3g} degrees. Interpolate, or "
                f"bring it into the order of the state."
            )


def in_units_of(variable: xr.Variable, wanted: xr.Variable, argument: str) -> np.ndarray:
    """Return real values in the units and the precision of the variable that is wanted; without units they are taken to be in them.

    Raises
    ------
    StateError
        If they are no real numbers.
    UnitsError
        If units cannot be converted.
    """
    if variable.dtype.kind != "f":
        raise StateError(
            f"{argument} has dtype {variable.dtype}; real numbers are needed, such as the {wanted.dtype} of the state: "
            f".astype({str(wanted.dtype)!r})"
        )
    values = variable.values
    pair = [metadata.units_of(xr.DataArray(v)) for v in (variable[(0,) * variable.ndim], wanted[(0,) * wanted.ndim])]
    if None not in pair and pair[0] != pair[1]:
        scale, offset = _factors(str(pair[0]), str(pair[1]), argument)
        if (scale, offset) != (1.0, 0.0):
            values = values.astype(np.float64) * scale + offset
    with np.errstate(over="ignore"):  # infinity is told of where it is found
        return np.asarray(values.astype(wanted.dtype, copy=False))


def _factors(found: str, wanted: str, argument: str) -> tuple[float, float]:
    try:
        return metadata.unit_factors(found, wanted)
    except UnitsError as problem:
        raise UnitsError(f"{argument} is in {found!r}, and the state in {wanted!r}: {problem}") from problem


def time_in(ds: xr.Dataset, name: str, like: Any, argument: str) -> Any:
    """Return the one time of a Dataset as the kind of `like`: numpy.datetime64 in nanoseconds, or cftime of its calendar; None where there is none.

    Raises
    ------
    CoordinateError
        If there are several, or of another kind.
    """
    if name not in ds.variables:
        return None
    variable = ds.variables[name]
    if variable.size != 1:
        raise CoordinateError(f"{argument} has {variable.size} times, and one is needed: out.isel({name}=-1)")
    if variable.dtype.kind in "fiu" and " since " in str(variable.attrs.get("units", "")):
        cftime = not isinstance(like, np.datetime64)
        coder = xr.coders.CFDatetimeCoder(use_cftime=cftime)
        attrs = {k: variable.attrs[k] for k in ("units", "calendar") if k in variable.attrs}
        variable = coder.decode(xr.Variable(variable.dims, variable.values, attrs), name=name)
    found = np.ravel(variable.values)[0]
    if isinstance(like, np.datetime64):
        if isinstance(found, np.datetime64):
            return found.astype("datetime64[ns]")
    elif type(found) is type(like) and getattr(found, "calendar", None) == getattr(like, "calendar", None):
        return found
    kind = type(found).__name__ if not hasattr(found, "calendar") else f"cftime of the calendar {found.calendar!r}"
    wanted = type(like).__name__ if not hasattr(like, "calendar") else f"cftime of the calendar {like.calendar!r}"
    raise CoordinateError(
        f"{argument} has the time {found}, {'a ' if not kind.startswith('cftime') else ''}{kind}, and the state has {wanted}. Count from that: "
        f"out.assign_coords({name}=ds.{name} + step)"
    )

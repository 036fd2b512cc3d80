"""Levels of observations: which column holds them, in which units and direction, and how the pressure of the sea becomes a depth."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from xgenda import metadata
from xgenda.errors import ObservationError, UnitsError
from xgenda.observations.columns import numeric
from xgenda.observations.quality import is_missing
from xgenda.observations.shapes import Container
from xgenda.observations.table import Wanted

#: Standard names and usual names of levels, by what the state has; what comes first counts first.
STANDARD_NAMES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "pressure": (("air_pressure",),),
    "depth": (
        ("depth", "depth_below_geoid"),
        ("height", "altitude", "height_above_mean_sea_level"),
        ("sea_water_pressure", "sea_water_pressure_due_to_sea_water"),
    ),
    "height": (("height",),),
    "altitude": (("altitude", "height_above_mean_sea_level", "geopotential_height"),),
}
USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "pressure": ("pressure", "pres", "PRES", "plev", "isobaricInhPa", "PRLC", "level", "lev", "air_pressure"),
    "depth": ("depth", "DEPTH", "Depth", "deptht", "z", "Z", "PRES", "PRES_ADJUSTED", "pres", "pressure", "lev", "level"),
    "height": ("height", "z", "level", "lev"),
    "altitude": ("altitude", "alt", "z", "level", "lev"),
}
#: Columns whose name says their units: GRIB and the BUFR of NNJA, Argo.
UNITS_BY_NAME: Mapping[str, Mapping[str, str]] = {
    "pressure": {"isobaricInhPa": "hPa", "PRLC": "Pa"},
    "depth": {"PRES": "dbar", "PRES_ADJUSTED": "dbar"},
    "height": {},
    "altitude": {},
}
LEVEL_NAMES = tuple(dict.fromkeys(n for names in USUAL_NAMES.values() for n in names))
#: Pressures above this cannot be hPa in the atmosphere.
LARGEST_HPA = 1100.0
#: In Pa: 9999 and 99999 are pressures there, and fill values elsewhere.
HIGHEST_PRESSURE = 1.1e5
UNITS = {"pressure": "Pa", "depth": "m", "height": "m", "altitude": "m"}
UPWARD = ("height", "altitude", "height_above_mean_sea_level")
UPWARD_KINDS = ("height", "altitude")


@dataclass(frozen=True, eq=False)
class Levels:
    """Levels as the state has them, on the dimensions of their column."""

    name: str
    values: xr.DataArray


def read_levels(container: Container, wanted: Wanted, name: str, others: Collection[str]) -> Levels | None:
    """Return the levels of a variable in Pa or metres, None where it has none and needs none.

    Parameters
    ----------
    container, wanted, name
        The source, the variable of the state, and its name in the source.
    others
        Columns that are variables of the state, and so no levels.

    Raises
    ------
    ObservationError
        If there is no such column, several, or one whose units or direction are not known.
    UnitsError
        If its units are not those of a level.
    """
    assert wanted.vertical is not None
    ds, argument, vertical = container.ds, container.argument, wanted.vertical
    found = _find(ds, vertical, argument, others)
    if found is None and wanted.optional:
        return None
    if found is None:
        example = vertical
        set_units = f"{argument}.attrs[{example!r}]" if container.is_frame else f"{argument}[{example!r}].attrs"
        value = f"{{'units': {UNITS[vertical]!r}}}"
        raise ObservationError(
            f"{argument}[{name!r}] has no levels, and the state has {wanted.name!r} on levels of {vertical}. Give a column {example!r} in "
            f"{UNITS[vertical]}: {argument}[{example!r}] = ...; {set_units} = {value}"
        )
    column = numeric(ds[found], argument)
    values = column.values
    values = np.where(
        is_missing(values) & ~((vertical == "pressure") & (values > 0) & (values <= HIGHEST_PRESSURE)), np.nan, values
    )
    units, sign = _units(ds[found], found, values, vertical, container), 1.0
    at = f"{argument}[{found!r}]"
    try:
        if vertical == "depth" and _is_pressure(units):
            scale, offset = metadata.unit_factors(units, "dbar")
            latitude = numeric(ds[container.latitude], argument)
            sine = xr.DataArray(np.sin(np.radians(latitude.values)), dims=latitude.dims)
            pressure = xr.DataArray(values * scale + offset, dims=column.dims)
            return Levels(found, depth_of_pressure(pressure, sine**2))
        scale, offset = metadata.unit_factors(units, UNITS[vertical])
    except UnitsError as problem:
        raise UnitsError(f"{at}, the levels of {argument}[{name!r}]: {problem}") from problem
    if vertical != "pressure":
        sign = _direction(ds[found], found, values, vertical, container)
    return Levels(found, xr.DataArray(sign * (values * scale + offset), dims=column.dims))


def is_level(variable: xr.DataArray) -> bool:
    """Whether the CF standard name of a variable is that of a level."""
    return any(variable.attrs.get("standard_name") in names for kinds in STANDARD_NAMES.values() for names in kinds)


def _find(ds: xr.Dataset, vertical: str, argument: str, others: Collection[str]) -> str | None:
    free = {str(n): v for n, v in ds.variables.items() if str(n) not in others and v.dtype.kind in "fiuO"}
    for names in STANDARD_NAMES[vertical]:
        found = [n for n, v in free.items() if v.attrs.get("standard_name") in names]
        if len(found) > 1:
            raise ObservationError(
                f"{argument}: {' and '.join(map(repr, found))} both could be the levels; keep one: {argument}.drop_vars({found[1]!r})"
            )
        if found:
            return found[0]
    return next((n for n in USUAL_NAMES[vertical] if n in free), None)


def _units(column: xr.DataArray, name: str, values: np.ndarray, vertical: str, container: Container) -> str:
    """Return the units of a column of levels; pressures without units are accepted where only one unit is possible."""
    given = metadata.units_of(column) or UNITS_BY_NAME[vertical].get(name)
    if given is not None:
        return str(given)
    pressure = vertical == "pressure" or (name.lower().startswith("pres") and vertical == "depth")
    if not pressure:
        return "m"
    highest = np.nanmax(values, initial=-np.inf, where=np.isfinite(values))
    if vertical == "pressure" and (highest > LARGEST_HPA or highest == -np.inf):
        return "Pa"
    units = "hPa" if vertical == "pressure" else "dbar"
    argument = container.argument
    line = (
        f"{argument}.attrs[{name!r}] = {{'units': {units!r}}}"
        if container.is_frame
        else f"{argument}[{name!r}].attrs['units'] = {units!r}"
    )
    raise ObservationError(
        f"{argument}[{name!r}] has no units, and its values up to {highest:g} do not tell which. Say it: {line}"
    )


def _is_pressure(units: str) -> bool:
    try:
        metadata.unit_factors(units, "Pa")
    except UnitsError:
        return False
    return True


def _attrs(container: Container, name: str) -> str:
    """Return where the attributes of a column are set."""
    return f"{container.argument}.attrs[{name!r}]" if container.is_frame else f"{container.argument}[{name!r}].attrs"


def _direction(column: xr.DataArray, name: str, values: np.ndarray, vertical: str, container: Container) -> float:
    """Return 1 where levels count as those of the state do, -1 where they count the other way."""
    at = f"{container.argument}[{name!r}]"
    below, above = bool((values < 0).any()), bool((values > 0).any())
    positive = str(column.attrs.get("positive", "")).lower()
    if not positive and name in ("z", "Z") and vertical == "depth":
        if below and above:
            raise ObservationError(
                f"{at} has values below and above 0; say what it counts: {_attrs(container, name)} = {{'units': 'm', 'positive': 'down'}}"
            )
        positive = "up" if below else "down"
    if not positive:
        upward = column.attrs.get("standard_name") in UPWARD or (vertical in UPWARD_KINDS and "depth" not in name.lower())
        positive = "up" if upward else "down"
        if positive == "down" and below and not above:
            raise ObservationError(
                f"{at} is a depth and all its values are negative; if they count upward: {_attrs(container, name)} = "
                f"{{'units': 'm', 'positive': 'up'}}"
            )
    return 1.0 if (positive == "up") == (vertical in UPWARD_KINDS) else -1.0


def depth_of_pressure(pressure: xr.DataArray, sine2: xr.DataArray) -> xr.DataArray:
    """Return the depth in metres of a pressure in the sea (0 at its surface) of a standard ocean of 0 degC and salinity 35.

    Parameters
    ----------
    pressure
        In dbar.
    sine2
        Squared sine of the latitude.

    Notes
    -----
    Saunders (1981), Practical conversion of pressure to depth, J. Phys. Oceanogr. 11, 573-574, in the form of Fofonoff and Millard (1983),
    Algorithms for computation of fundamental properties of seawater, UNESCO Tech. Pap. Mar. Sci. 44; its check value is
    9712.653 m at 10000 dbar and 30 degrees.
    """
    gravity = 9.780318 * (1.0 + (5.2788e-3 + 2.36e-5 * sine2) * sine2) + 1.092e-6 * pressure
    return (((-1.82e-15 * pressure + 2.279e-10) * pressure - 2.2512e-5) * pressure + 9.72659) * pressure / gravity

"""Find what the data are: coordinates through CF, variables, units, time labels; and carry metadata to the result."""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cf_xarray  # noqa: F401  (registers the .cf accessor)
import numpy as np
import xarray as xr

from xgenda.errors import CoordinateError, OptionError, StateError, UnitsError, did_you_mean

LATITUDE_NAMES = ("latitude", "lat", "nav_lat", "y_lat")
LONGITUDE_NAMES = ("longitude", "lon", "nav_lon", "x_lon")
TIME_NAMES = ("time", "valid_time")
ROW_NAMES = (
    "y",
    "j",
    "nj",
    "yc",
    "rlat",
    "lat",
    "nlat",
    "latitude",
    "south_north",
    "eta_rho",
    "grid_latitude",
    "projection_y_coordinate",
)
COLUMN_NAMES = (
    "x",
    "i",
    "ni",
    "xc",
    "rlon",
    "lon",
    "nlon",
    "longitude",
    "west_east",
    "xi_rho",
    "grid_longitude",
    "projection_x_coordinate",
)
#: CF standard names of fields that describe the grid and are no state.
DESCRIPTIVE = (
    "surface_altitude", "sea_floor_depth_below_geoid", "sea_floor_depth_below_mean_sea_level", "sea_floor_depth", "land_binary_mask",
    "sea_binary_mask", "land_area_fraction", "sea_area_fraction", "cell_area", "latitude", "longitude",
)  # fmt: skip
MEMBER_NAMES = ("member", "number", "realization", "ensemble", "ensemble_member")

#: CF names of what xgenda writes: one table, used everywhere.
MEMBER_ATTRS = {"standard_name": "realization", "long_name": "ensemble member"}
KEPT_ENCODING = ("zlib", "complevel", "shuffle", "_FillValue", "units", "calendar")

#: Values that stand for "missing" in files that do not say so: exact values, and in a field only outside the range of all
#: others, because a pressure of 99999 Pa is real.
SENTINELS = (-9999.0, 9999.0, -99999.0, 99999.0, -888888.0, -999.0, 1e20, 9.969209968386869e36)
LARGEST_PLAUSIBLE = 1e15


@dataclass(frozen=True)
class Layout:
    """Names of the coordinates and of the two horizontal dimensions of a Dataset; on a rectilinear grid these are the same."""

    latitude: str
    longitude: str
    time: str | None
    member: str | None
    dims: tuple[str, str]


def as_dataset(obj: object, argument: str = "ds") -> xr.Dataset:
    """Return `obj` as a Dataset; a named DataArray is accepted, anything else is refused with the line to type."""
    if isinstance(obj, xr.Dataset):
        return obj
    if isinstance(obj, xr.DataArray):
        if obj.name is None:
            raise OptionError(f"{argument} is a DataArray without a name. Name the variable: {argument}.rename('t2m')")
        return obj.to_dataset()
    if isinstance(obj, (str, os.PathLike)):
        how = "open_zarr" if os.fspath(obj).rstrip("/").endswith(".zarr") else "open_dataset"
        raise OptionError(f"{argument}={str(obj)!r} is a path; an xarray Dataset is needed. Open it: xr.{how}({str(obj)!r})")
    raise OptionError(
        f"{argument} is a {type(obj).__module__}.{type(obj).__name__}; an xarray Dataset is needed. "
        f"For a table type xarray.Dataset.from_dataframe(df); for a DataTree node type tree['/node'].to_dataset()."
    )


def find_coordinate(ds: xr.Dataset, key: str, names: Iterable[str]) -> str | None:
    """Return the one coordinate that CF attributes, then usual names, identify as `key`."""
    try:
        found = list(dict.fromkeys(str(n) for n in ds.cf.coordinates.get(key, [])))
    except Exception:  # cf-xarray raises on odd attributes; the names still tell
        found = []
    if len(found) > 1:
        on_dims = [n for n in found if n in ds.dims]
        found = on_dims if len(on_dims) == 1 else found
    if len(found) > 1:
        raise CoordinateError(
            f"Several coordinates look like {key}: {', '.join(map(repr, found))}. Keep one: ds.drop_vars({found[1]!r})"
        )
    if found:
        return found[0]
    for name in names:
        if name in ds.variables:
            return name
    return None


def find_positions(ds: xr.Dataset) -> list[str | None]:
    """Return the names of latitude and longitude, None where there is none."""
    return [find_coordinate(ds, k, names) for k, names in (("latitude", LATITUDE_NAMES), ("longitude", LONGITUDE_NAMES))]


def find_member(ds: xr.Dataset) -> str | None:
    """Return the name of the ensemble dimension, or None."""
    for name in ds.dims:
        if name in MEMBER_NAMES or (name in ds.coords and ds[name].attrs.get("standard_name") == "realization"):
            return str(name)
    return None


def find_time(ds: xr.Dataset) -> str | None:
    """Return the name of the time coordinate (a dimension, or a scalar), or None."""
    return find_coordinate(ds, "time", TIME_NAMES)


def find_layout(ds: xr.Dataset, argument: str = "ds", *, rectilinear: bool = True) -> Layout:
    """Find latitude, longitude, time and member of a gridded Dataset.

    Parameters
    ----------
    rectilinear
        Whether only one-dimensional latitude and longitude will do.

    Raises
    ------
    CoordinateError
        If latitude or longitude is missing, ambiguous, of another shape, or holds NaN.
    """
    names, dims = {}, {}
    for key, usual in (("latitude", LATITUDE_NAMES), ("longitude", LONGITUDE_NAMES)):
        name = find_coordinate(ds, key, usual)
        if name is None:
            raise CoordinateError(
                f"{argument} has no {key} coordinate (found: {', '.join(map(str, ds.coords)) or 'none'}). "
                f"Assign one: {argument}.assign_coords({key}=(dim, values)), "
                f"or mark yours: {argument}['name'].attrs['standard_name'] = {key!r}"
            )
        coordinate = ds[name]
        if coordinate.ndim == 0:
            raise CoordinateError(
                f"{argument}: {key} coordinate {name!r} is a scalar; a grid needs it as a dimension: "
                f"{argument}.expand_dims({name!r})"
            )
        if coordinate.ndim > 1 and rectilinear:
            raise CoordinateError(
                f"{argument}: {key} coordinate {name!r} has dimensions {coordinate.dims}; this works on grids with "
                f"one-dimensional latitude and longitude only. Interpolate to such a grid first: {argument}.genda.regrid(target)"
            )
        values = coordinate.values
        if values.dtype.kind not in "fiu" or not np.isfinite(values.astype(float)).all():
            raise CoordinateError(f"{argument}: {key} coordinate {name!r} holds values that are not finite numbers.")
        names[key], dims[key] = name, tuple(map(str, coordinate.dims))
    across, along = dims["latitude"], dims["longitude"]
    if len(across) == len(along) == 1 and across != along:
        horizontal = (across[0], along[0])
    elif not rectilinear and set(across) == set(along) and len(across) == 2:
        rows_last = _direction(ds, across[0]) == "x" or _direction(ds, across[1]) == "y"
        horizontal = (across[1], across[0]) if rows_last else (across[0], across[1])
    else:
        raise CoordinateError(
            f"{argument}: latitude {names['latitude']!r} has dimensions {across} and longitude {names['longitude']!r} has {along}; "
            f"a grid has both along one axis each{'' if rectilinear else ', or both along the same two'}."
        )
    return Layout(names["latitude"], names["longitude"], find_time(ds), find_member(ds), horizontal)


def _direction(ds: xr.Dataset, dim: str) -> str | None:
    """Return whether a dimension counts rows ('y') or columns ('x'), by its attributes or its usual name; None where neither tells."""
    attrs = ds[dim].attrs if dim in ds.coords else {}
    standard = str(attrs.get("standard_name", ""))
    for axis, names in (("y", ROW_NAMES), ("x", COLUMN_NAMES)):
        if str(attrs.get("axis", "")).lower() == axis or standard in (f"projection_{axis}_coordinate",) or dim.lower() in names:
            return axis
    return None


def check_dims(ds: xr.Dataset, variables: Iterable[str], layout: Layout, argument: str = "ds") -> None:
    """Refuse variables that lack a horizontal dimension or have one that is not handled."""
    known = {*layout.dims, layout.time, layout.member}
    for name in variables:
        dims = ds[name].dims
        for needed in layout.dims:
            if needed not in dims:
                raise CoordinateError(f"{argument}[{name!r}] has dimensions {dims} and lacks {needed!r}.")
        extra = [d for d in dims if d not in known]
        if extra and str(extra[0]) in ("time", "valid_time", "date") and extra[0] not in ds.coords:
            raise CoordinateError(
                f"{argument} has the dimension {extra[0]!r} of size {ds.sizes[extra[0]]}, and no times along it. Assign them: "
                f"{argument}.assign_coords({extra[0]}=pandas.date_range('2020-01-01', periods={ds.sizes[extra[0]]}))"
            )
        if extra:
            size, advice = ds.sizes[extra[0]], ""
            if len(extra) == 1 and size > 1 and not {layout.time, layout.member} & set(dims):
                new = f"{argument}.rename({{{extra[0]!r}: 'time'}})"
                advice = f"if that is time, call it so: {new} (samples of another kind: 'member'); else "
            raise CoordinateError(
                f"{argument}[{name!r}] has the extra dimension {extra[0]!r} of size {size}; {advice}"
                f"select one entry: {argument}.isel({extra[0]}=0)"
            )
        if ds[name].dtype.kind not in "fiu":
            raise StateError(
                f"{argument}[{name!r}] has dtype {ds[name].dtype}; real numbers are needed: "
                f"{argument}[{name!r}].astype('float32')"
            )
        if ds[name].dtype.kind in "iu" and "scale_factor" in ds[name].attrs:
            raise StateError(
                f"{argument}[{name!r}] still carries scale_factor: it is packed. Open the file with "
                f"xarray.open_dataset(..., mask_and_scale=True) or decode it: xarray.decode_cf({argument})"
            )


def bounds_of(ds: xr.Dataset) -> set[str]:
    """Return the names that bounds of coordinates have, by CF, or by usage and shape; not all need be there."""
    named = {str(v.attrs.get(k, v.encoding.get(k))) for v in ds.variables.values() for k in ("bounds", "climatology")}
    for n, coordinate in ds.coords.items():
        for usual in (f"{n}_bnds", f"{n}_bounds", f"{n}_b"):
            if usual in ds.variables:
                shape = ds[usual].shape
                pairs = len(shape) == coordinate.ndim + 1 and shape[-1] in (2, 4)
                if pairs or shape == tuple(size + 1 for size in coordinate.shape):
                    named.add(usual)
    return named


def data_variables(ds: xr.Dataset, layout: Layout) -> list[str]:
    """Return the names of the variables on the horizontal grid; bounds, grid mappings, and what describes the grid are left out."""
    bounds = bounds_of(ds)
    return [
        str(n)
        for n, v in ds.data_vars.items()
        if set(layout.dims) <= set(v.dims)
        and v.dtype.kind in "fiuO"
        and n not in bounds
        and v.attrs.get("standard_name") not in DESCRIPTIVE
    ]


def match_variable(ds: xr.Dataset, name: str, standard_name: str | None, argument: str = "ds") -> str:
    """Return the variable of `ds` called `name`, else the only one with that `standard_name`."""
    if name in ds.data_vars:
        return name
    if standard_name:
        found = [str(n) for n, v in ds.data_vars.items() if v.attrs.get("standard_name") == standard_name]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            raise OptionError(
                f"{argument}: {', '.join(map(repr, found))} all have standard_name {standard_name!r}, and the model "
                f"needs one for {name!r}. Keep one: {argument}.drop_vars({found[1]!r})"
            )
    known = [str(n) for n in ds.data_vars]
    hint = did_you_mean(name, known)
    close = next((k for k in known if hint.endswith(f"{k!r}?")), None)
    raise OptionError(
        f"{argument} lacks the variable {name!r}"
        + (f" (or one with standard_name {standard_name!r})" if standard_name else "")
        + f"; it has {', '.join(map(repr, known)) or 'none'}."
        + (
            f"{hint} Rename yours: {argument}.rename({{{close!r}: {name!r}}})"
            if close
            else " Add it under this name, or leave it out."
        )
    )


#: Practical salinity has no unit; CF writes it as 1e-3, which is also what 1 g/kg is, and pint takes psu for 1.
PRACTICAL_SALINITY = ("psu", "pss", "pss-78", "practical_salinity_unit", "practical_salinity_units")


def _is_number(text: str) -> bool:
    try:
        return bool(float(text) > 0)
    except ValueError:
        return False


@functools.lru_cache(maxsize=256)
def unit_factors(found: str | None, wanted: str | None) -> tuple[float, float]:
    """Return (scale, offset) with ``wanted = scale * found + offset``; what has no units is taken to be in those of the other.

    Raises
    ------
    UnitsError
        If a unit is unknown or the two measure different things.
    """
    if found is None or wanted is None or found == wanted:
        return 1.0, 0.0
    from cf_xarray.units import units as registry  # pint with UDUNITS spelling

    def read(text: str) -> Any:
        try:
            if text.strip().lower() in PRACTICAL_SALINITY:
                return registry.Quantity(1, "g/kg")
            return registry.Quantity(registry.parse_expression(text, case_sensitive=True) if _is_number(text) else text)
        except Exception as error:
            raise UnitsError(
                f"The units {text!r} are not known; use UDUNITS spelling, for example 'K', 'degC', 'hPa', 'm s-1'."
            ) from error

    source, target = read(found), read(wanted)
    try:
        # a unit may be a plain number, such as the 1e-3 of salinity in CF, so each is one quantity
        zero, one = (
            registry.Quantity(v * source.magnitude, source.units).to(target.units).magnitude / target.magnitude
            for v in (0.0, 1.0)
        )
    except Exception as error:
        raise UnitsError(
            f"Units {found!r} cannot be converted to {wanted!r}. If they are written wrongly, set the true ones: "
            f"ds['name'].attrs['units'] = {wanted!r}. If they measure something else, convert the values first, for example precipitation: "
            f"ds['pr'] = (ds['pr'] * 86400).assign_attrs(units='mm day-1') from kg m-2 s-1"
        ) from error
    return float(one - zero), float(zero)


def units_of(array: xr.DataArray) -> str | None:
    """Return the units of an array; CF's canonical '1' of practical salinity is what others call psu."""
    found = array.attrs.get("units")
    if found is None:
        return None
    practical = array.attrs.get("standard_name") == "sea_water_practical_salinity"
    return "psu" if practical and str(found).strip() in ("1", "1.0", "") else str(found)


def unit_factors_of(array: xr.DataArray, wanted: str | None) -> tuple[float, float]:
    """Return (scale, offset) from the units of `array` to `wanted`; an array without units is taken to be in them."""
    return unit_factors(units_of(array), wanted)


def convert_units(array: xr.DataArray, wanted: str | None) -> xr.DataArray:
    """Return `array` in the units `wanted` (lazily for dask); without units in its attrs it is taken as it is."""
    found = units_of(array)
    if wanted is None or found is None or found == wanted:
        return array
    scale, offset = unit_factors(str(found), wanted)
    if (scale, offset) == (1.0, 0.0):
        return array
    kind = array.dtype.type if array.dtype.kind == "f" else np.float64
    out: xr.DataArray = array * kind(scale) + kind(offset)
    return out.assign_attrs(array.attrs, units=wanted)


def check_values(values: np.ndarray, name: str, argument: str = "ds", where: str = "") -> None:
    """Refuse NaN, infinity and finite fill values, naming the variable, how many, and the remedy.

    Parameters
    ----------
    values
        Array of any shape, in memory.
    name
        Variable name for the message.
    """
    finite = np.isfinite(values)
    if not finite.all():
        bad = int(values.size - np.count_nonzero(finite))
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise not_finite("NaN" if np.isnan(values).any() else "infinity", bad, values.size, first, name, argument, where)
    fill = find_fill_values(values)
    if fill.any():
        raise filled(float(values[fill][0]), int(np.count_nonzero(fill)), values.size, name, argument, where)


def not_finite(
    what: str, bad: int, size: int, first: tuple[int, ...], name: str, argument: str = "ds", where: str = ""
) -> StateError:
    """Build the error of a variable that holds NaN or infinity."""
    return StateError(
        f"{argument}[{name!r}]{where} holds {what} in {bad} of {size} cells ({100 * bad / size:.2g} %), "
        f"first at index {first}. Fill or crop them first: {argument}.fillna(...) or {argument}.dropna(...)"
    )


def filled(value: float, count: int, size: int, name: str, argument: str = "ds", where: str = "") -> StateError:
    """Build the error of a variable that holds a fill value."""
    return StateError(
        f"{argument}[{name!r}]{where} holds {value:.6g} in {count} of {size} cells "
        f"({100 * count / size:.2g} %), which looks like a fill value. Mask and fill them: "
        f"{argument}.where({argument}[{name!r}] != {value:.6g})"
    )


def find_fill_values(values: np.ndarray) -> np.ndarray:
    """Return True where a field holds an implausibly large value, or a sentinel well outside the range of the rest."""
    wide = values.astype(np.float64, copy=False)
    fill = np.abs(wide) > LARGEST_PLAUSIBLE
    for sentinel in SENTINELS:
        fill |= wide == sentinel
    if fill.any() and not fill.all():
        lowest, highest = wide[~fill].min(), wide[~fill].max()
        apart = 0.1 * (highest - lowest)
        fill &= (np.abs(wide) > LARGEST_PLAUSIBLE) | (wide < lowest - apart) | (wide > highest + apart)
    return fill


def time_labels(time: xr.DataArray | None, size: int = 1) -> np.ndarray:
    """Return one string per time, the same for equal instants whatever the dtype, unit or chunking.

    Labels key the random numbers, so that a result depends on the time and not on its place in the array. Without a time
    coordinate the label is the position.
    """
    if time is None:
        return np.array([f"#{i}" for i in range(size)])
    values = np.atleast_1d(time.values)
    if values.dtype.kind == "M":
        if np.isnat(values).any():
            raise CoordinateError(f"The time coordinate {time.name!r} holds NaT. Drop those: ds.dropna({time.name!r})")
        return np.datetime_as_string(values, unit="ns")
    if values.dtype.kind == "O":
        return np.array([_cftime_label(v) for v in values])
    raise CoordinateError(
        f"The time coordinate {time.name!r} has dtype {values.dtype}; decode it: xarray.decode_cf(ds), "
        f"or ds.assign_coords({time.name}=pandas.to_datetime(ds[{str(time.name)!r}]))"
    )


def _cftime_label(value: Any) -> str:
    """Return the label of a cftime date; in the calendar of datetime64 that of the same instant there."""
    calendar = str(getattr(value, "calendar", ""))
    same = calendar == "proleptic_gregorian" or (calendar in ("standard", "gregorian") and value.year > 1582)
    if same and 1678 <= value.year <= 2261:
        return str(np.datetime_as_string(np.datetime64(value.isoformat(), "ns"), unit="ns"))
    return f"{value.isoformat()}[{calendar}]"


def equal_steps(spacing: float) -> tuple[float, float]:
    """Return the shortest and the longest step that counts as one of `spacing` seconds: a hundredth away; all months are alike."""
    month = 28.0 <= spacing / 86400.0 <= 31.0
    return 0.99 * (28.0 * 86400.0 if month else spacing), 1.01 * (31.0 * 86400.0 if month else spacing)


def seconds_between(values: np.ndarray) -> np.ndarray:
    """Return the seconds between neighbouring times, datetime64 or cftime."""
    return in_seconds(np.diff(values))


def in_seconds(differences: np.ndarray) -> np.ndarray:
    """Return differences of times in seconds, timedelta64 or those of cftime."""
    if differences.dtype.kind == "m":
        return np.asarray(differences / np.timedelta64(1, "s"), dtype=float)
    return np.array([d.total_seconds() for d in differences])


def check_unique_times(labels: np.ndarray, argument: str = "ds") -> None:
    """Refuse repeated times: they would share random numbers and observations."""
    if len(np.unique(labels)) != len(labels):
        values, counts = np.unique(labels, return_counts=True)
        raise CoordinateError(
            f"{argument} holds the time {values[counts > 1][0]} more than once. Keep the first: "
            f"{argument}.drop_duplicates('time')"
        )


def carry_metadata(
    result: xr.Dataset, source: xr.Dataset, variables: Iterable[str], *, call: str, provenance: Mapping[str, object]
) -> xr.Dataset:
    """Copy attrs and chosen encoding from `source`, append one line to ``history``, and add provenance attributes.

    Parameters
    ----------
    result, source
        New and original Dataset.
    variables
        Names, the same in both.
    call
        The call, for the CF ``history`` attribute.
    provenance
        Written as attributes ``xgenda_<key>``.
    """
    out = result.copy()
    out.attrs = dict(source.attrs)
    for name in variables:
        out[name].attrs = dict(source[name].attrs)
        out[name].encoding = {k: v for k, v in source[name].encoding.items() if k in KEPT_ENCODING[:4]}
    for coordinate in out.coords:
        if coordinate in source.coords:
            out[coordinate].attrs = {**source[coordinate].attrs, **out[coordinate].attrs}
            # a chunked time coordinate is written with units only together with a dtype
            keys = (*KEPT_ENCODING, "dtype") if source[coordinate].dtype.kind in "MO" else KEPT_ENCODING
            out[coordinate].encoding = {k: v for k, v in source[coordinate].encoding.items() if k in keys}
    out.attrs |= provenance_attrs(source, call, provenance)
    return out


def provenance_attrs(source: xr.Dataset, call: str, provenance: Mapping[str, object]) -> dict[str, Any]:
    """Return ``history`` with one more line, the version, and attributes ``xgenda_<key>`` of what is not None."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    line = f"{stamp}: xgenda {package_version()}: {call}"
    attrs: dict[str, Any] = {"history": f"{source.attrs['history']}\n{line}" if source.attrs.get("history") else line}
    attrs["xgenda_version"] = package_version()
    for key, value in provenance.items():
        if value is not None:
            attrs[f"xgenda_{key}"] = value if isinstance(value, (int, float, str)) else str(value)
    return attrs


@functools.cache
def package_version() -> str:
    """Return the installed version of xgenda."""
    import importlib.metadata

    try:
        return importlib.metadata.version("xgenda")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

"""What users have -> one table of observations.

Accepted: an xarray Dataset, pandas or polars DataFrame along one dimension (latitude, longitude, time, one column per variable, or the columns
``variable`` and ``observation``), CF discrete samples (point, timeSeries, trajectory), a swath with two-dimensional coordinates, a gridded
Dataset with NaN where nothing was observed, or a list of these. All become one `Table`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cftime
import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata
from xgenda.errors import ObservationError, UnitsError, did_you_mean
from xgenda.maps import LinearMap
from xgenda.observations.quality import Quality, QualityControl, flagged, gross_bounds, is_missing

Observations = xr.Dataset | xr.DataArray | pd.DataFrame | list[Any] | None
ErrorLike = float | Mapping[str, Any] | Sequence[Any] | None

#: Columns that say where an observation comes from, by what they say; the first that is there counts.
STATION_NAMES = ("station_id", "station", "station_name", "wigos_id", "wmo_id", "stid", "RPT", "id")
PLATFORM_NAMES = ("platform", "platform_type", "platform_id", "platform_code", "type", "instrument", "satellite")
HEIGHT_NAMES = (
    "height",
    "elevation",
    "altitude",
    "station_height",
    "station_elevation",
    "surface_altitude",
    "elv",
    "ELV",
    "elev",
)
#: Other names of coordinates in common archives: NNJA frames, MADIS.
ALIASES = {
    "LAT": "latitude",
    "LON": "longitude",
    "OBS_TIMESTAMP": "time",
    "Latitude": "latitude",
    "Longitude": "longitude",
    "Time": "time",
}

#: Columns that describe an observation and are never a variable themselves.
DESCRIPTIONS = (
    *metadata.LATITUDE_NAMES,
    *metadata.LONGITUDE_NAMES,
    *metadata.TIME_NAMES,
    *STATION_NAMES,
    *PLATFORM_NAMES,
    *HEIGHT_NAMES,
    *("flag", "obs", "index", "id", "name"),
)


@dataclass(frozen=True)
class Wanted:
    """One variable of the state, as far as observations need to know it."""

    name: str
    standard_name: str | None
    units: str | None
    given_units: str | None = None  #: of the user's Dataset: what observations without units are in
    levels: tuple[float, ...] = ()  #: of its channels, in Pa or m; empty for one channel without a level
    vertical: str | None = None  #: what `levels` are: 'pressure', 'depth' (positive downward) or 'height' (above the sea)
    of: str | None = None  #: name of the variable that a linear operator observes; None for a variable itself
    rows: Callable[..., tuple[LinearMap, np.ndarray]] | None = None  #: of that operator, see `xgenda.operators.LinearOperator`


def first_channels(wanted: Sequence[Wanted]) -> np.ndarray:
    """Return the first channel of each variable, and after them the number of all channels, shape (n + 1,).

    What a linear operator observes has the channel of its variable and none of its own.
    """
    first = np.cumsum([0, *(0 if w.of is not None else max(1, len(w.levels)) for w in wanted)])
    names = [w.name for w in wanted]
    for i, w in enumerate(wanted):
        if w.of is not None:
            first[i] = first[names.index(w.of)]
    return first


@dataclass(frozen=True, eq=False)
class Table:
    """Observations in normal form: one entry per value, all arrays of one length.

    Attributes
    ----------
    source, row
        Which container of the input (0 for a single one) and which row (or flat cell) of it.
    time
        datetime64 or cftime; None where the source has no time.
    latitude, longitude
        Degrees.
    variable
        Index into the variables of the state.
    value, error
        In the units of the state; `error` is a standard deviation.
    code
        `Quality`, so far.
    station, platform
        Text; empty where unknown.
    height
        Of the station in metres; NaN where unknown.
    level
        Pressure in Pa, depth or height in m, as the levels of the variable; NaN where unknown.
    """

    source: np.ndarray
    row: np.ndarray
    time: np.ndarray | None
    latitude: np.ndarray
    longitude: np.ndarray
    variable: np.ndarray
    value: np.ndarray
    error: np.ndarray
    code: np.ndarray
    station: np.ndarray
    platform: np.ndarray
    height: np.ndarray
    level: np.ndarray

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self.value)

    def take(self, rows: np.ndarray) -> Table:
        """Return some rows (index or boolean array)."""
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        taken: dict[str, Any] = {k: None if v is None else v[rows] for k, v in fields.items()}
        return Table(**taken)

    def with_code(self, code: np.ndarray) -> Table:
        """Return the table with other quality codes."""
        return dataclasses.replace(self, code=code)


def read_observations(
    obs: Observations,
    wanted: list[Wanted],
    error: ErrorLike = None,
    argument: str = "obs",
    *,
    quality: QualityControl | None = None,
    representativeness: float | Mapping[str, float] | None = None,
) -> Table:
    """Bring observations to normal form and give each its first quality code (missing, bounds, passive).

    Parameters
    ----------
    obs
        See the module. None and empty tables are fine.
    wanted
        The variables of the state.
    error
        Standard deviation in the units of the observation: a number, a mapping per variable (a number, one per row, or a mapping per
        platform), a list of these for a list of observations, or None where `obs` carries ``<name>_error`` or CF ancillary variables.
        What is given here counts before what `obs` carries.
    quality
        Provider's flags, bounds and blacklist; None: the defaults.
    representativeness
        Standard deviation of what a grid cell cannot represent, a number or a mapping per variable, added in quadrature.

    Raises
    ------
    ObservationError
        Unknown variables, missing or impossible errors, no coordinates.
    UnitsError
        Units that cannot be converted to those of the state.
    """
    items = list(obs) if isinstance(obs, (list, tuple)) else [obs]
    several = isinstance(error, (list, tuple)) and isinstance(obs, (list, tuple))
    if several and len(error) != len(items):  # type: ignore[arg-type]
        raise ObservationError(f"error has {len(error)} entries and {argument} has {len(items)}; give one for each source.")  # type: ignore[arg-type]
    errors: list[Any] = list(error) if several else [error] * len(items)  # type: ignore[arg-type]
    known = [w.name for w in wanted]
    for name, given in [(f"error[{i}]" if several else "error", e) for i, e in enumerate(errors)] + [
        ("representativeness", representativeness)
    ]:
        for key in given if isinstance(given, Mapping) else ():
            if key not in known:
                raise ObservationError(
                    f"{name} names {key!r}, which is no variable of the state; it has {', '.join(map(repr, known))}."
                    + did_you_mean(key, known)
                )
    control = quality or QualityControl()
    tables = [
        _read_one(item, wanted, given, i, argument if len(items) == 1 else f"{argument}[{i}]", control)
        for i, (item, given) in enumerate(zip(items, errors, strict=True))
        if item is not None
    ]
    if representativeness is not None:
        tables = [_with_representativeness(t, wanted, representativeness) for t in tables]
    if not tables:
        return _empty()
    timed = {t.time is not None for t in tables if len(t)}
    if len(timed) == 2:
        raise ObservationError(f"Some of the {argument} have a time coordinate and some have none; give it to all or none.")
    tables = [t for t in tables if len(t)] or tables[:1]
    joined: dict[str, list[Any]] = {f.name: [getattr(t, f.name) for t in tables] for f in dataclasses.fields(Table)}
    columns: dict[str, Any] = {k: None if v[0] is None else np.concatenate(v) for k, v in joined.items()}
    return Table(**columns)


def _empty() -> Table:
    none, zero, text = np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=object)
    return Table(zero, zero, None, none, none, zero, none, none, np.zeros(0, dtype=np.uint8), text, text, none, none)


def _as_xarray(item: Any, argument: str) -> xr.Dataset:
    if isinstance(item, xr.DataArray) and item.name is not None:
        return item.to_dataset()
    if isinstance(item, xr.Dataset):
        return item
    if hasattr(item, "to_pandas") and type(item).__module__.split(".")[0] in ("polars", "pyarrow", "cudf"):
        item = item.to_pandas()
    if isinstance(item, pd.DataFrame):
        frame = item.reset_index(drop=item.index.names == [None])
        ds = xr.Dataset({str(c): ("obs", _column(frame[c])) for c in frame.columns})
        for name, column in ds.data_vars.items():  # pandas carries units in attrs, if at all
            column.attrs.update(frame.attrs.get(name, {}) if isinstance(frame.attrs.get(name), dict) else {})
        return ds
    raise ObservationError(
        f"{argument} is a {type(item).__module__}.{type(item).__name__}; give a pandas DataFrame or xarray Dataset with "
        f"latitude, longitude, time and one column per variable, or a gridded Dataset with NaN where nothing was observed."
    )


def _column(series: Any) -> np.ndarray:
    if getattr(series.dtype, "tz", None) is not None:
        series = series.dt.tz_convert("UTC").dt.tz_localize(None)
    return np.asarray(series.to_numpy())


def _numeric(array: xr.DataArray, argument: str) -> xr.DataArray:
    """Return `array` as float64; text that spells numbers is read as them."""
    try:
        return array.astype(float)
    except (TypeError, ValueError):
        flat = array.values.ravel()
        first = next((str(v) for v in flat if isinstance(v, str)), flat[0])
        name = f"{argument}[{array.name!r}]"
        raise ObservationError(
            f"{name} holds {first!r}, which is no number; make it numeric: {name} = pandas.to_numeric({name}, errors='coerce')"
        ) from None


def _read_one(item: Any, wanted: list[Wanted], error: Any, source: int, argument: str, control: QualityControl) -> Table:
    ds = _as_xarray(item, argument)
    ds = ds.rename({a: b for a, b in ALIASES.items() if a in ds.variables and b not in ds.variables})
    ds = _widened(ds, argument)
    coords = {}
    for key, usual in (("latitude", metadata.LATITUDE_NAMES), ("longitude", metadata.LONGITUDE_NAMES)):
        name = metadata.find_coordinate(ds, key, usual)
        if name is None:
            raise ObservationError(
                f"{argument} has no {key}; it has {', '.join(map(str, ds.variables))}. "
                f"Name the column: {argument} = {argument}.rename({'columns=' if isinstance(item, pd.DataFrame) else ''}{{'yours': {key!r}}})"
            )
        coords[key] = name
    time = metadata.find_time(ds)
    latitude, longitude = ds[coords["latitude"]], ds[coords["longitude"]]
    gridded = latitude.ndim == longitude.ndim == 1 and latitude.dims != longitude.dims
    names = _variables(ds, wanted, argument, isinstance(item, pd.DataFrame))
    base = (latitude.dims[0], longitude.dims[0]) if gridded else tuple(map(str, latitude.dims))
    if not gridded and latitude.dims != longitude.dims:
        raise ObservationError(
            f"{argument}: latitude has dimensions {latitude.dims} and longitude {longitude.dims}; a table along one "
            f"dimension, a swath with both along the same two, or a grid with one-dimensional latitude and longitude is needed."
        )
    swath = latitude.ndim > 1
    time_dims = ds[time].dims if time is not None else ()
    dims = tuple(dict.fromkeys((*map(str, time_dims), *map(str, base))))
    parts = []
    for code, name in names.items():
        part = _read_variable(ds, name, wanted[code], dims, error, argument, control)
        if part is not None:
            parts.append((code, *part))
    template = xr.Dataset(
        {"row": (dims, np.arange(int(np.prod([ds.sizes[d] for d in dims]))).reshape([ds.sizes[d] for d in dims]))}
    )
    flat = {
        "latitude": _spread(_numeric(latitude, argument), template, dims),
        "longitude": _spread(_numeric(longitude, argument), template, dims),
    }
    stamps = _spread(_decoded(ds[time], argument), template, dims) if time is not None else None
    row = template["row"].values.ravel()
    if not parts:
        return _empty()
    station, platform = (_text(ds, usual, template, dims) for usual in (STATION_NAMES, PLATFORM_NAMES))
    height = _heights(ds, template, dims, argument)
    columns: dict[str, list[np.ndarray]] = {
        k: []
        for k in ("row", "latitude", "longitude", "variable", "value", "error", "code", "station", "platform", "height", "level")
    }
    times = []
    for code, value, sigma, bounds, refused in parts:
        # NaN in a grid or swath: nothing was observed there; in a long table: another variable
        keep = np.isfinite(value) if gridded or swath or "long" in ds.attrs else np.ones(len(value), dtype=bool)
        sigma = _of_platforms(sigma, platform, wanted[code].name, argument)
        quality = _first_codes(value, sigma, flat, stamps, bounds)
        if control.blacklist:
            listed = np.isin(station, list(control.blacklist)) | np.isin(platform, list(control.blacklist))
            quality[listed & (quality <= Quality.PASSIVE)] = Quality.BLACKLISTED
        quality[refused & (quality != Quality.MISSING)] = Quality.FLAGGED
        _check_errors(sigma, quality, value, wanted[code].name, argument)
        for key, array in (
            ("row", row), ("latitude", flat["latitude"]), ("longitude", flat["longitude"]), ("value", value),
            ("error", sigma), ("code", quality), ("variable", np.full(len(value), code)),
            ("station", station), ("platform", platform), ("height", height), ("level", np.full(len(value), np.nan)),
        ):  # fmt: skip
            columns[key].append(array[keep])
        times.append(None if stamps is None else stamps[keep])
    return Table(
        source=np.full(sum(map(len, columns["row"])), source),
        time=None if stamps is None else np.concatenate([t for t in times if t is not None]),
        **{k: np.concatenate(v) for k, v in columns.items()},
    )


def _variables(ds: xr.Dataset, wanted: list[Wanted], argument: str, is_frame: bool = False) -> dict[int, str]:
    """Return index in the state -> name in the observations; anything that is not recognised is refused."""
    found: dict[int, str] = {}
    for i, w in enumerate(wanted):
        named = [w.name] if w.name in ds.data_vars else []
        named = named or [
            str(n) for n, v in ds.data_vars.items() if w.standard_name and v.attrs.get("standard_name") == w.standard_name
        ]
        if len(named) > 1:
            raise ObservationError(f"{argument}: {' and '.join(map(repr, named))} both could be {w.name!r}; keep one.")
        if named:
            found[i] = named[0]
    errors = {f"{n}_{suffix}" for n in found.values() for suffix in ("error", "flag", "qc")}
    ancillary = {a for n in found.values() for a in str(ds[n].attrs.get("ancillary_variables", "")).split()}
    known = {*found.values(), *errors, *ancillary, *DESCRIPTIONS}
    strange = [str(n) for n in ds.data_vars if n not in known and not str(n).endswith("_id") and ds[n].dtype.kind in "fiu"]
    if "long" in ds.attrs:
        strange = [n for n in strange if not n.endswith("_error")]
    if strange or not found:
        names = [w.name for w in wanted]
        kept = [n for n in map(str, ds.variables) if n in known and n != "obs"] if is_frame else list(found.values())
        part = f"{kept!r}" if "long" not in ds.attrs else f"{argument}['variable'].isin({list(found.values())!r})"
        hint = f" Keep what the state has: {argument}[{part}]" if found else did_you_mean((strange or [""])[0], names)
        raise ObservationError(
            f"{argument} holds {', '.join(map(repr, strange)) or 'no variable'}, which is not in the state; it has "
            f"{', '.join(map(repr, names))}.{hint}"
        )
    return found


def _spread(array: xr.DataArray, template: xr.Dataset, dims: tuple[str, ...]) -> np.ndarray:
    plain = xr.DataArray(array.values, dims=array.dims)
    return np.asarray(plain.broadcast_like(template["row"]).transpose(*dims).values.ravel())


def _decoded(time: xr.DataArray, argument: str) -> xr.DataArray:
    first = next((v for v in time.values.ravel()[:1]), None)
    if time.dtype.kind == "M" or isinstance(first, cftime.datetime) or time.size == 0:
        return time
    if time.dtype.kind not in "fiu":
        raise ObservationError(
            f"{argument}: time holds {type(first).__name__} such as {str(first)!r}; make it datetime64 in UTC: "
            f"{argument}['time'] = pandas.to_datetime({argument}['time'], utc=True)"
        )
    raise ObservationError(
        f"{argument}: time has dtype {time.dtype}; decode it, for example pandas.to_datetime({argument}['time'], unit='s', utc=True)"
    )


def _read_variable(
    ds: xr.Dataset, name: str, wanted: Wanted, dims: tuple[str, ...], error: Any, argument: str, control: QualityControl
) -> tuple[np.ndarray, Any, tuple[float, float], np.ndarray] | None:
    array = ds[name]
    extra = [d for d in array.dims if d not in dims]
    if extra:
        raise ObservationError(
            f"{argument}[{name!r}] has the extra dimension {extra[0]!r}; select: {argument}.isel({extra[0]}=0)"
        )
    units = metadata.units_of(array) or wanted.given_units
    scale, offset = 1.0, 0.0
    if units is not None and wanted.units is not None:
        try:
            scale, offset = metadata.unit_factors(str(units), wanted.units)
        except UnitsError as problem:
            raise UnitsError(f"{argument}[{name!r}]: {problem}") from problem
    template = xr.Dataset({"row": (dims, np.zeros([ds.sizes[d] for d in dims]))})
    value = _spread(_numeric(array, argument), template, dims)
    sigma = _error_of(ds, name, wanted, value, template, dims, error, abs(scale), argument)
    bounds = gross_bounds(wanted.standard_name, wanted.units)
    bounds = tuple(map(float, control.bounds.get(wanted.name, bounds)))  # type: ignore[assignment]
    refused = np.zeros(value.shape, dtype=bool)
    column = next((c for c in (f"{name}_flag", f"{name}_qc", "flag") if c in ds.variables), None)
    if control.flags is not None and column is not None:
        refused = flagged(_spread(ds[column], template, dims), control.flags)
    missing, value = is_missing(value), value * scale + offset
    if np.isfinite(bounds).all():
        missing &= ~((value >= bounds[0]) & (value <= bounds[1]))  # 99999 Pa is a pressure
    return np.where(missing, np.nan, value), sigma, bounds, refused


def _error_of(
    ds: xr.Dataset,
    name: str,
    wanted: Wanted,
    value: np.ndarray,
    template: xr.Dataset,
    dims: tuple[str, ...],
    error: Any,
    scale: float,
    argument: str,
) -> Any:
    """Return standard deviations in the units of the state; `scale` leads there from those of the observation.

    For an error per platform a mapping.
    """
    given: Any = error.get(wanted.name) if isinstance(error, Mapping) else error
    column = f"{name}_error" if given is None and f"{name}_error" in ds else None
    for ancillary in str(ds[name].attrs.get("ancillary_variables", "")).split():
        if given is None and ancillary in ds and str(ds[ancillary].attrs.get("standard_name", "")).endswith("standard_error"):
            column = ancillary
    if given is None and column is None:
        raise ObservationError(
            f"{argument}[{name!r}] has no error, and none is invented. Give the standard deviation in the units of the "
            f"observation: error={{{wanted.name!r}: 1.0}}, or a column {name + '_error'!r} in {argument}."
        )
    if column is not None:
        units = ds[column].attrs.get("units")
        if units is not None and wanted.units is not None:  # a difference: only the scale matters
            scale = abs(metadata.unit_factors(str(units), wanted.units)[0])
        return _spread(_numeric(ds[column], argument), template, dims) * scale
    if isinstance(given, Mapping):
        return {str(k): float(v) * scale for k, v in given.items()}
    if not isinstance(given, xr.DataArray) and np.ndim(given) > 1 and np.shape(given) == ds[name].shape:
        given = xr.DataArray(given, dims=ds[name].dims)
    if isinstance(given, xr.DataArray) and given.ndim:
        if any(given.sizes[d] != ds.sizes.get(d) for d in given.dims):
            raise ObservationError(
                f"error[{wanted.name!r}] has dimensions {dict(given.sizes)} and {argument}[{name!r}] has {dict(ds[name].sizes)}; "
                f"give one number, or one each."
            )
        return _spread(_numeric(given, argument), template, dims) * scale
    try:
        array = np.asarray(given, dtype=float).ravel()
    except (TypeError, ValueError):
        raise ObservationError(
            f"error={given!r} is no standard deviation; give a number or one number per observation: error={{{wanted.name!r}: 1.0}}"
        ) from None
    if array.size not in (1, value.size):
        raise ObservationError(
            f"error[{wanted.name!r}] has {array.size} values and {argument}[{name!r}] has {value.size}; give one number, or one each."
        )
    return np.broadcast_to(array, value.shape).astype(float) * scale


def _of_platforms(sigma: Any, platform: np.ndarray, name: str, argument: str) -> np.ndarray:
    """Return one standard deviation per row where they are given by platform."""
    if not isinstance(sigma, dict):
        return np.asarray(sigma)
    kinds = np.unique(platform.astype(str)).tolist()
    lacking = [k for k in kinds if k not in sigma]
    if lacking:
        raise ObservationError(
            f"error[{name!r}] has no entry for the platform {lacking[0]!r} of {argument}; it has {', '.join(map(repr, sigma))}. "
            f"Platforms are read from the column 'platform'."
        )
    return np.array([sigma[str(p)] for p in platform])


def _with_representativeness(table: Table, wanted: list[Wanted], given: float | Mapping[str, float]) -> Table:
    each = [float(given.get(w.name, 0.0)) if isinstance(given, Mapping) else float(given) for w in wanted]
    if not all(0 <= e < np.inf for e in each):
        raise ObservationError(f"representativeness={given!r} is not accepted; a standard deviation is a positive number.")
    return dataclasses.replace(table, error=np.hypot(table.error, np.array([*each, 0.0])[table.variable]))


def _text(ds: xr.Dataset, usual: tuple[str, ...], template: xr.Dataset, dims: tuple[str, ...]) -> np.ndarray:
    """Return a descriptive column as text, empty where there is none."""
    for name in usual:
        if name in ds.variables and set(ds[name].dims) <= set(dims):
            codes, labels = pd.factorize(
                _spread(ds[name], template, dims)
            )  # one text object per station, however many its reports
            text = np.array([v.decode() if isinstance(v, bytes) else str(v) for v in labels] + [""], dtype=object)
            return np.asarray(text[codes])
    return np.full(template["row"].size, "", dtype=object)


def _heights(ds: xr.Dataset, template: xr.Dataset, dims: tuple[str, ...], argument: str) -> np.ndarray:
    """Return heights of stations in metres, NaN where they are not known."""
    for name in HEIGHT_NAMES:
        if name in ds.variables and set(ds[name].dims) <= set(dims) and ds[name].dtype.kind in "fiu":
            scale = metadata.unit_factors_of(ds[name], "m")[0]
            flat = _spread(_numeric(ds[name], argument), template, dims) * scale
            return np.where(is_missing(flat), np.nan, flat)
    return np.full(template["row"].size, np.nan)


def _widened(ds: xr.Dataset, argument: str) -> xr.Dataset:
    """Turn a long table, with the columns ``variable`` and ``observation``, into one column per variable."""
    if not {"variable", "observation"} <= set(ds.variables) or ds["variable"].ndim != 1:
        return ds
    names = ds["variable"].values.astype(str)
    out = ds.drop_vars([n for n in ("variable", "observation", "observation_error") if n in ds.variables])
    for name in np.unique(names):
        there = names == name
        out[name] = (ds["variable"].dims, np.where(there, ds["observation"].values.astype(float), np.nan))
        if "observation_error" in ds.variables:
            out[f"{name}_error"] = (ds["variable"].dims, np.where(there, ds["observation_error"].values.astype(float), np.nan))
    return out.assign_attrs(long=1)


def _first_codes(
    value: np.ndarray,
    sigma: np.ndarray,
    flat: Mapping[str, np.ndarray],
    stamps: np.ndarray | None,
    bounds: tuple[float, float],
) -> np.ndarray:
    code = np.zeros(len(value), dtype=np.uint8)
    code[np.isposinf(sigma)] = Quality.PASSIVE
    wild = (np.abs(flat["latitude"]) > 90) | (flat["longitude"] < -360) | (flat["longitude"] > 360)
    code[(value < bounds[0]) | (value > bounds[1]) | wild] = Quality.BOUNDS
    lost = ~np.isfinite(value) | ~np.isfinite(flat["latitude"]) | ~np.isfinite(flat["longitude"])
    if stamps is not None and stamps.dtype.kind == "M":
        lost |= np.isnat(stamps)
    code[lost] = Quality.MISSING
    return code


def _check_errors(sigma: np.ndarray, code: np.ndarray, value: np.ndarray, name: str, argument: str) -> None:
    bad = (np.isnan(sigma) | (sigma <= 0)) & (code != Quality.MISSING)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ObservationError(
            f"The error of {argument}[{name!r}] is {sigma[first]:g} in {int(bad.sum())} of {len(sigma)} values, first at row "
            f"{first}; a standard deviation must be positive (inf keeps an observation passive): error={{{name!r}: 1.0}}"
        )

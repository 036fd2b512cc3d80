"""The shapes in which observations come -> one Dataset whose reports lie along known dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cftime
import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata
from xgenda.errors import ObservationError

#: Other names of coordinates in common archives: NNJA frames, MADIS, Argo.
ALIASES = {
    "LAT": "latitude",
    "LATITUDE": "latitude",
    "Latitude": "latitude",
    "LON": "longitude",
    "LONGITUDE": "longitude",
    "Longitude": "longitude",
    "OBS_TIMESTAMP": "time",
    "JULD": "time",
    "TIME": "time",
    "Time": "time",
}


@dataclass(frozen=True, eq=False)
class Container:
    """One source of observations as a Dataset, and what its shape is.

    Attributes
    ----------
    ds, argument
        The Dataset, and how messages call it.
    latitude, longitude, time
        Names of its coordinates; `time` may be None.
    dims
        Along which reports lie: time first.
    sparse
        Whether it is a grid or a swath: there NaN means that nothing was observed.
    rows
        For a long table, which rows are of each variable.
    is_frame
        Whether the user gave a table of columns.
    """

    ds: xr.Dataset
    argument: str
    latitude: str
    longitude: str
    time: str | None
    dims: tuple[str, ...]
    sparse: bool
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    is_frame: bool = False

    def within(self, period: tuple[Any, Any]) -> tuple[Container, np.ndarray] | None:
        """Return the part of lazy observations in a period, and which of the steps along the first dimension it has; None where it is all.

        Only the time is read. What is in memory is not cut: each of its rows gets a code.
        """
        lazy = any(v.chunks is not None for v in self.ds.variables.values())
        if not lazy or self.time is None or self.ds[self.time].ndim != 1 or self.ds[self.time].dims[0] != self.dims[0]:
            return None
        time = decoded(self.ds[self.time], self.argument).values
        if np.asarray(period).dtype.kind != time.dtype.kind or not len(time):
            return None
        steps = np.flatnonzero((time >= period[0]) & (time <= period[1]))
        if not len(steps):
            raise ObservationError(
                f"None of the {len(time)} times of {self.argument} is near those of the state (the first is {time[0]}, the last "
                f"{time[-1]}). Is their time UTC? Select the right ones, or widen the window: window=..."
            )
        if len(steps) == len(time):
            return None
        return dataclasses.replace(self, ds=self.ds.isel({self.dims[0]: steps})), steps

    def cells(self, extra: tuple[str, ...] = ()) -> Cells:
        """Return the cells along the dimensions of the reports and after them `extra`."""
        dims = (*self.dims, *extra)
        return Cells(dims, tuple(self.ds.sizes[d] for d in dims))


@dataclass(frozen=True)
class Cells:
    """Dimensions along which a variable has its values, and their sizes; values are flattened in this order."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of cells."""
        return int(np.prod(self.shape))

    def spread(self, array: xr.DataArray) -> np.ndarray:
        """Return an array along some of the dimensions on all cells, flat."""
        wide = xr.Variable(array.dims, array.values).set_dims(dict(zip(self.dims, self.shape, strict=True)))
        return np.asarray(wide.transpose(*self.dims).values.ravel())

    def holds(self, array: xr.DataArray) -> bool:
        """Whether an array can be spread over the cells."""
        return set(array.dims) <= set(self.dims)


def open_container(item: Any, argument: str) -> Container:
    """Find out what a source is.

    Raises
    ------
    ObservationError
        If it is no table or Dataset, has no coordinates, or none that belong together.
    """
    ds = as_xarray(item, argument)
    ds = ds.rename({a: b for a, b in ALIASES.items() if a in ds.variables and b not in ds.variables})
    ds = _without_ragged(ds, argument)
    ds, rows = _widened(ds)
    coords = {}
    is_frame = not isinstance(item, (xr.Dataset, xr.DataArray))
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
    if not gridded and latitude.dims != longitude.dims:
        raise ObservationError(
            f"{argument}: latitude has dimensions {latitude.dims} and longitude {longitude.dims}; a table along one "
            f"dimension, a swath with both along the same two, or a grid with one-dimensional latitude and longitude is needed."
        )
    place = (latitude.dims[0], longitude.dims[0]) if gridded else latitude.dims
    time_dims = ds[time].dims if time is not None else ()
    dims = tuple(dict.fromkeys((*map(str, time_dims), *map(str, place))))
    return Container(
        ds, argument, coords["latitude"], coords["longitude"], time, dims, gridded or latitude.ndim > 1, rows, is_frame
    )


def as_xarray(item: Any, argument: str) -> xr.Dataset:
    """Return a table or an array as a Dataset, with times in UTC.

    Raises
    ------
    ObservationError
        If it is neither.
    """
    if isinstance(item, xr.DataArray) and item.name is not None:
        return item.to_dataset()
    if isinstance(item, xr.Dataset):
        return item
    library = type(item).__module__.split(".")[0]
    if library == "polars":
        item = item.collect() if hasattr(item, "collect") else item  # a lazy frame
    if library == "polars" and hasattr(item, "columns"):  # its own way to pandas needs pyarrow
        return xr.Dataset({name: ("obs", np.asarray(item[name].to_numpy())) for name in item.columns})
    if library in ("pyarrow", "cudf") and hasattr(item, "to_pandas"):
        item = item.to_pandas()
    if isinstance(item, pd.DataFrame):
        kept = [n for n in item.index.names if n is not None and n not in item.columns]
        frame = (item.reset_index(level=kept) if kept else item).reset_index(drop=True)
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
    if (
        pd.api.types.is_extension_array_dtype(series.dtype)
        and pd.api.types.is_numeric_dtype(series.dtype)
        and series.isna().any()
    ):
        return np.asarray(series.to_numpy(dtype=float, na_value=np.nan))
    return np.asarray(series.to_numpy())


def decoded(time: xr.DataArray, argument: str) -> xr.DataArray:
    """Return times that are datetime64 or cftime; anything else is refused."""
    first = next((v for v in time.values.ravel()[:1]), None)
    if time.dtype.kind == "M" or isinstance(first, cftime.datetime) or time.size == 0:
        return time
    if time.dtype.kind not in "fiu":
        raise ObservationError(
            f"{argument}: time holds {type(first).__name__} such as {str(first)!r}; make it datetime64 in UTC: "
            f"{argument}['time'] = pandas.to_datetime({argument}['time']{'.astype(str)' if isinstance(first, bytes) else ''}, utc=True)"
        )
    raise ObservationError(
        f"{argument}: time has dtype {time.dtype}; decode it, for example pandas.to_datetime({argument}['time'], unit='s', utc=True)"
    )


def _widened(ds: xr.Dataset) -> tuple[xr.Dataset, dict[str, np.ndarray]]:
    """Turn a long table, with the columns ``variable`` and ``observation``, into one column per variable; return the rows of each, too."""
    if not {"variable", "observation"} <= set(ds.variables) or ds["variable"].ndim != 1:
        return ds, {}
    names = ds["variable"].values.astype(str)
    out = ds.drop_vars([n for n in ("variable", "observation", "observation_error") if n in ds.variables])
    rows = {str(name): names == name for name in np.unique(names)}
    for name, there in rows.items():
        for suffix in ("", "_error"):
            if f"observation{suffix}" in ds.variables:
                column = ds[f"observation{suffix}"]
                out[f"{name}{suffix}"] = (column.dims, np.where(there, column.values.astype(float), np.nan), column.attrs)
    return out, rows


def _without_ragged(ds: xr.Dataset, argument: str) -> xr.Dataset:
    """Spread what is said once per profile, trajectory or station over its samples: CF conventions 1.11, sections 9.3.3 and 9.3.4."""
    for name in [str(n) for n, v in ds.variables.items() if "instance_dimension" in v.attrs]:
        instance = str(ds[name].attrs["instance_dimension"])
        index = _whole(ds[name], instance, "index", argument, ds.sizes)
        if len(index) and not (index.min() >= 0 and index.max() < ds.sizes[instance]):
            raise ObservationError(
                f"{argument}[{name!r}] points to {instance!r} {int(index.min())} to {int(index.max())}, and there are {ds.sizes[instance]}, "
                f"counted from 0."
            )
        ds = _spread_instances(ds.drop_vars(name), instance, str(ds[name].dims[0]), index)
    for name in [str(n) for n, v in ds.variables.items() if "sample_dimension" in v.attrs]:
        sample = str(ds[name].attrs["sample_dimension"])
        count = _whole(ds[name], sample, "count", argument, ds.sizes)
        if (count < 0).any() or count.sum() != ds.sizes[sample]:
            raise ObservationError(
                f"{argument}[{name!r}] adds up to {int(count.sum())} and the dimension {sample!r} has {ds.sizes[sample]} samples; give the "
                f"whole file, select afterwards."
            )
        index = np.repeat(np.arange(len(count)), count)
        ds = _spread_instances(ds.drop_vars(name), str(ds[name].dims[0]), sample, index)
    return ds


def _whole(array: xr.DataArray, dimension: str, what: str, argument: str, sizes: Mapping[Any, int]) -> np.ndarray:
    """Return the counts or indices of a ragged array."""
    name = f"{argument}[{array.name!r}]"
    if dimension not in sizes:
        raise ObservationError(
            f"{name} is the {what} of a ragged array along {dimension!r}, and {argument} has the dimensions {', '.join(map(repr, sizes))}; give "
            f"the whole file, select afterwards."
        )
    if array.ndim != 1:
        raise ObservationError(f"{name} is the {what} of a ragged array and has dimensions {array.dims}; one is needed.")
    values = np.asarray(array.values)
    if values.dtype.kind not in "fiu" or not np.isfinite(values.astype(float)).all() or (values != np.round(values)).any():
        raise ObservationError(f"{name} is the {what} of a ragged array along {dimension!r} and must hold whole numbers.")
    return values.astype(np.int64)


def _spread_instances(ds: xr.Dataset, instance: str, sample: str, index: np.ndarray) -> xr.Dataset:
    moved = {}
    for name, variable in ds.variables.items():
        if instance in variable.dims:
            taken = variable.to_base_variable().isel({instance: index})
            moved[name] = xr.Variable([sample if d == instance else d for d in taken.dims], taken.values, variable.attrs)
    coords = [n for n in moved if n in ds.coords]
    return ds.drop_vars(list(moved)).assign(moved).set_coords(coords)

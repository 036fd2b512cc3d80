"""Columns of a source: values, errors, flags, and what describes where they come from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata
from xgenda.errors import ObservationError
from xgenda.formatting import user_level
from xgenda.observations.correlations import Correlated, ErrorCovariance
from xgenda.observations.quality import QualityControl, flagged, is_missing
from xgenda.observations.shapes import Cells, Container
from xgenda.observations.table import Wanted

#: Columns that say where an observation comes from, by what they say; the first that is there counts.
STATION_NAMES = ("station_id", "station", "station_name", "wigos_id", "wmo_id", "stid", "RPT", "PLATFORM_NUMBER", "id")
PLATFORM_NAMES = ("platform", "platform_type", "platform_id", "platform_code", "type", "instrument", "satellite")
HEIGHT_NAMES = (
    *("height", "elevation", "altitude", "station_height", "station_elevation", "surface_altitude"),
    *("elv", "ELV", "station_elev", "elev"),
)
#: Of a value, after its name; and of the report.
ERROR_SUFFIXES = ("error", "ERROR")
FLAG_SUFFIXES = ("flag", "qc", "QC")
FLAG_NAMES = ("flag", "quality")
REPORT_FLAGS = ("POSITION_QC", "JULD_QC", "TIME_QC")


def numeric(array: xr.DataArray, argument: str) -> xr.DataArray:
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


def error_of(container: Container, name: str, wanted: Wanted, cells: Cells, error: Any, scale: float) -> Any:
    """Return standard deviations in the units of the state; `scale` leads there from those of the observation.

    For an error per platform a mapping, for an `ErrorCovariance` what it says of this variable.
    """
    ds, argument = container.ds, container.argument
    given: Any = error.get(wanted.name) if isinstance(error, Mapping) else error
    column = next((f"{name}_{s}" for s in ERROR_SUFFIXES if f"{name}_{s}" in ds), None) if given is None else None
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
        return cells.spread(numeric(ds[column], argument)) * scale
    if isinstance(given, ErrorCovariance):
        return Correlated(given, scale)
    if isinstance(given, Mapping):
        try:
            return {str(k): float(v) * scale for k, v in given.items()}
        except (TypeError, ValueError):
            raise ObservationError(
                f"error[{wanted.name!r}]={given!r} must be numbers by platform: error={{{wanted.name!r}: {{'SYNOP': 1.0}}}}"
            ) from None
    if not isinstance(given, xr.DataArray) and np.ndim(given) > 1 and np.shape(given) == ds[name].shape:
        given = xr.DataArray(given, dims=ds[name].dims)
    if isinstance(given, xr.DataArray) and given.ndim:
        if any(given.sizes[d] != ds.sizes.get(d) for d in given.dims):
            raise ObservationError(
                f"error[{wanted.name!r}] has dimensions {dict(given.sizes)} and {argument}[{name!r}] has {dict(ds[name].sizes)}; "
                f"give one number, or one each."
            )
        return cells.spread(numeric(given, argument)) * scale
    try:
        array = np.asarray(given, dtype=float).ravel()
    except (TypeError, ValueError):
        raise ObservationError(
            f"error={given!r} is no standard deviation; give a number or one number per observation: error={{{wanted.name!r}: 1.0}}"
        ) from None
    if array.size not in (1, cells.size):
        raise ObservationError(
            f"error[{wanted.name!r}] has {array.size} values and {argument}[{name!r}] has {cells.size}; give one number, or one each."
        )
    return np.broadcast_to(array, (cells.size,)).astype(float) * scale


def deviations(sigma: Any, platform: np.ndarray, wanted: Wanted, cells: Cells, argument: str) -> np.ndarray:
    """Return one standard deviation per cell from what `error_of` found."""
    if isinstance(sigma, Correlated):
        return sigma.deviations(cells.size, f"error[{wanted.name!r}]", argument)
    if not isinstance(sigma, dict):
        return np.asarray(sigma)
    kinds = np.unique(platform.astype(str)).tolist()
    lacking = [k for k in kinds if k not in sigma]
    if lacking:
        raise ObservationError(
            f"error[{wanted.name!r}] has no entry for the platform {lacking[0]!r} of {argument}; it has {', '.join(map(repr, sigma))}. "
            f"Platforms are read from the column 'platform'."
        )
    return np.array([sigma[str(p)] for p in platform])


def refused_by_provider(container: Container, name: str, level: str | None, cells: Cells, control: QualityControl) -> np.ndarray:
    """Return True where the provider's flag of a value, of its level or of its report is not good."""
    refused = np.zeros(cells.size, dtype=bool)
    own = next((c for c in (*(f"{name}_{s}" for s in FLAG_SUFFIXES), *FLAG_NAMES) if c in container.ds.variables), None)
    if control.flags is None:
        _notice_unread(container, own)
        return refused
    of_level = [f"{level}_{s}" for s in FLAG_SUFFIXES] if level is not None else []
    for column in (own, *of_level, *REPORT_FLAGS):
        if column is not None and column in container.ds.variables and cells.holds(container.ds[column]):
            refused |= flagged(cells.spread(container.ds[column]), control.flags)
    return refused


def _notice_unread(container: Container, column: str | None) -> None:
    """Warn of flags that tell values apart, and of which nobody said what they mean; what is lazy is not read for that."""
    if column is None or container.ds[column].chunks is not None:
        return
    given = pd.Series(np.ravel(container.ds[column].values)).dropna()
    kinds = given.unique().tolist()
    if len(kinds) > 1:
        warnings.warn(
            f"{container.argument}[{column!r}] holds {', '.join(map(str, kinds[:4]))}{', ...' if len(kinds) > 4 else ''} and is not read: "
            f"say which are good, quality=xgenda.QualityControl(flags=[...]), or leave it out.",
            stacklevel=user_level(),
        )


def texts(ds: xr.Dataset, usual: tuple[str, ...], cells: Cells) -> np.ndarray:
    """Return a descriptive column as text, empty where there is none."""
    for name in usual:
        if name in ds.variables and cells.holds(ds[name]):
            # one text object per station, however many its reports
            codes, labels = pd.factorize(cells.spread(ds[name]))
            text = np.array([(v.decode() if isinstance(v, bytes) else str(v)).strip() for v in labels] + [""], dtype=object)
            return np.asarray(text[codes])
    return np.full(cells.size, "", dtype=object)


def heights(ds: xr.Dataset, cells: Cells, argument: str) -> np.ndarray:
    """Return heights of stations in metres, NaN where they are not known."""
    for name in HEIGHT_NAMES:
        if name in ds.variables and cells.holds(ds[name]) and ds[name].dtype.kind in "fiu":
            scale = metadata.unit_factors_of(ds[name], "m")[0]
            flat = cells.spread(numeric(ds[name], argument)) * scale
            return np.where(is_missing(flat), np.nan, flat)
    return np.full(cells.size, np.nan)

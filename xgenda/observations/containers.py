"""What users have -> one table of observations.

Accepted: an xarray Dataset, pandas or polars DataFrame along one dimension (latitude, longitude, time, one column per variable, or the columns
``variable`` and ``observation``), CF discrete samples (point, timeSeries, trajectory, profile; orthogonal, contiguous and indexed ragged
arrays), a swath with two-dimensional coordinates, a gridded Dataset with NaN where nothing was observed, or a list of these. All become
one `Table`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata
from xgenda.errors import ObservationError, UnitsError, did_you_mean
from xgenda.formatting import brief
from xgenda.observations.columns import (
    ERROR_SUFFIXES,
    FLAG_NAMES,
    FLAG_SUFFIXES,
    HEIGHT_NAMES,
    PLATFORM_NAMES,
    STATION_NAMES,
    deviations,
    error_of,
    heights,
    numeric,
    refused_by_provider,
    texts,
)
from xgenda.observations.consistency import contradictions
from xgenda.observations.correlations import Correlated, ErrorCovariance
from xgenda.observations.levels import LEVEL_NAMES, is_level, read_levels
from xgenda.observations.quality import Quality, QualityControl, gross_bounds, is_missing
from xgenda.observations.shapes import Cells, Container, decoded, open_container
from xgenda.observations.table import Table, Wanted, check_names, empty_table, first_channels, joined, per_variable

__all__ = ["ErrorLike", "Observations", "Table", "Wanted", "first_channels", "per_variable", "read_observations"]

Observations = xr.Dataset | xr.DataArray | pd.DataFrame | list[Any] | None
ErrorLike = float | ErrorCovariance | Mapping[str, Any] | Sequence[Any] | None

#: Columns that describe an observation and are never a variable themselves.
DESCRIPTIONS = (
    *metadata.LATITUDE_NAMES,
    *metadata.LONGITUDE_NAMES,
    *metadata.TIME_NAMES,
    *STATION_NAMES,
    *PLATFORM_NAMES,
    *HEIGHT_NAMES,
    *LEVEL_NAMES,
    *FLAG_NAMES,
    *("obs", "index", "id", "name"),
    *("class", "level_cat", "pressure_quality", "radius_curvature", "geoid_undulation"),  # earth2studio
    *("CYCLE_NUMBER", "CONFIG_MISSION_NUMBER"),  # Argo
)


def read_observations(
    obs: Observations,
    wanted: list[Wanted],
    error: ErrorLike = None,
    argument: str = "obs",
    *,
    quality: QualityControl | None = None,
    representativeness: float | Mapping[str, float] | None = None,
    period: tuple[Any, Any] | None = None,
) -> Table:
    """Bring observations to normal form and give each its first quality code (missing, bounds, consistency, passive, provider's).

    Parameters
    ----------
    obs
        See the module. None and empty tables are fine.
    wanted
        The variables of the state.
    error
        Standard deviation in the units of the observation: a number, a mapping per variable (a number, one per row, or a mapping per
        platform), an `ErrorCovariance` (or a mapping to some), a list of these for a list of observations, or None where `obs` carries
        ``<name>_error`` or CF ancillary variables. What is given here counts before what `obs` carries.
    quality
        Provider's flags, bounds and blacklist; None: the defaults.
    representativeness
        Standard deviation of what a grid cell cannot represent, in the units of the observation as `error` is, a number or a mapping per
        variable, added in quadrature.
    period
        First and last time of interest: of chunked observations the others are not read. None reads all.

    Raises
    ------
    ObservationError
        Unknown variables, missing or impossible errors, no coordinates, no levels.
    UnitsError
        Units that cannot be converted to those of the state.
    """
    items = list(obs) if isinstance(obs, (list, tuple)) else [obs]
    several = isinstance(error, (list, tuple)) and isinstance(obs, (list, tuple))
    if several and len(error) != len(items):  # type: ignore[arg-type]
        raise ObservationError(f"error has {len(error)} entries and {argument} has {len(items)}; give one for each source.")  # type: ignore[arg-type]
    errors: list[Any] = list(error) if several else [error] * len(items)  # type: ignore[arg-type]
    for i, given in enumerate(errors):
        check_names(f"error[{i}]" if several else "error", given, wanted)
    check_names("representativeness", representativeness, wanted)
    control = quality or QualityControl()
    cell = np.zeros(len(wanted))
    if representativeness is not None:
        values = representativeness.values() if isinstance(representativeness, Mapping) else (representativeness,)
        if not all(np.ndim(v) == 0 and np.asarray(v).dtype.kind in "fiu" for v in values):
            raise ObservationError(
                f"representativeness={brief(representativeness)} is not accepted; give a number, or one by variable: "
                f"representativeness={{{wanted[0].name!r}: 0.5}}"
            )
        cell = per_variable(representativeness, wanted)
        if not ((cell >= 0) & (cell < np.inf)).all():
            raise ObservationError(
                f"representativeness={representativeness!r} is not accepted; a standard deviation is a positive number."
            )
    tables = [
        _read_one(open_container(item, name), wanted, given, cell, i, control, period)
        for i, (item, given) in enumerate(zip(items, errors, strict=True))
        if item is not None
        for name in [argument if len(items) == 1 else f"{argument}[{i}]"]
    ]
    if not tables:
        return empty_table()
    timed = {t.time is not None for t in tables if len(t)}
    if len(timed) == 2:
        raise ObservationError(f"Some of the {argument} have a time coordinate and some have none; give it to all or none.")
    return joined([t for t in tables if len(t)] or tables[:1])


def _read_one(
    container: Container,
    wanted: list[Wanted],
    error: Any,
    cell: np.ndarray,
    source: int,
    control: QualityControl,
    period: tuple[Any, Any] | None,
) -> Table:
    names = _variables(container, wanted)
    part = container.within(period) if period is not None and not _by_row(error) else None
    if part is not None:
        cut, steps = part
        table = _read_one(cut, wanted, error, cell, source, control, None)
        # cells of all variables begin with the dimension that is cut; what is behind it may differ
        rest = np.array(
            [int(np.prod([n for d, n in cut.ds[names[v]].sizes.items() if d not in cut.dims])) for v in sorted(names)]
        )
        behind = rest[np.searchsorted(sorted(names), table.variable)] * int(np.prod([cut.ds.sizes[d] for d in cut.dims[1:]]))
        return dataclasses.replace(table, row=steps[table.row // behind] * behind + table.row % behind)
    if isinstance(error, ErrorCovariance) and error.matrix is not None and len(names) > 1:
        first = wanted[next(iter(names))].name
        raise ObservationError(
            f"error is one covariance matrix and {container.argument} has {len(names)} variables; give one each: error={{{first!r}: "
            f"xgenda.ErrorCovariance(matrix=...)}}"
        )
    values = {code: _values(container, column, wanted[code], names.values(), control) for code, column in names.items()}
    odd = contradictions({code: (wanted[code], np.where(v.wild, np.nan, v.value)) for code, v in values.items()})
    tables = []
    for code, read in values.items():
        table = _one_variable(container, names[code], wanted[code], read, odd[code], error, control)
        fill = np.full(len(table), code), np.full(len(table), source)
        total = np.hypot(table.error, cell[code] * abs(read.scale))
        tables.append(dataclasses.replace(table, variable=fill[0], source=fill[1], error=total))
    return joined(tables) if tables else empty_table()


def _by_row(error: Any) -> bool:
    """Whether errors are given one per row of the whole source."""
    if isinstance(error, Mapping):
        return any(_by_row(e) for e in error.values())
    return error.matrix is not None if isinstance(error, ErrorCovariance) else np.ndim(error) > 0


@dataclasses.dataclass(frozen=True, eq=False)
class _Values:
    """Values and levels of one variable in the units of the state, on its cells; whether values are outside of the bounds."""

    cells: Cells
    value: np.ndarray
    wild: np.ndarray
    level: np.ndarray
    level_name: str | None
    scale: float


def _values(container: Container, name: str, wanted: Wanted, others: Iterable[str], control: QualityControl) -> _Values:
    ds, argument = container.ds, container.argument
    array = ds[name]
    extra = tuple(str(d) for d in array.dims if d not in container.dims)
    if len(extra) > (wanted.vertical is not None):
        beside = "" if wanted.vertical is None else f" beside {extra[-1]!r}"
        raise ObservationError(
            f"{argument}[{name!r}] has the extra dimension {extra[0]!r}{beside}; select: {argument}.isel({extra[0]}=0)"
        )
    cells = container.cells(extra)
    units = metadata.units_of(array) or wanted.given_units
    try:
        scale, offset = metadata.unit_factors(units, wanted.units)
    except UnitsError as problem:
        raise UnitsError(f"{argument}[{name!r}]: {problem}") from problem
    raw = cells.spread(numeric(array, argument))
    level, level_name = np.full(cells.size, np.nan), None
    if wanted.vertical is not None:
        levels = read_levels(container, wanted, name, set(others))
    else:
        levels = None
    if levels is not None:
        if not cells.holds(levels.values) or (extra and extra[0] not in levels.values.dims):
            raise ObservationError(
                f"{argument}[{name!r}] has dimensions {array.dims} and its levels {argument}[{levels.name!r}] have {levels.values.dims}; "
                f"give levels along {(extra or container.dims)[0]!r}, or with it and the dimensions of the reports."
            )
        level, level_name = cells.spread(levels.values), levels.name
    value = raw * scale + offset
    if wanted.name in control.bounds:
        per_unit, shift = wanted.from_given
        low, high = sorted(float(b) * per_unit + shift for b in control.bounds[wanted.name])
    else:
        low, high = gross_bounds(wanted.standard_name, wanted.units)
    missing = is_missing(raw)
    if np.isfinite((low, high)).all():
        missing &= ~((value >= low) & (value <= high))  # 99999 Pa is a pressure
    value = np.where(missing, np.nan, value)
    return _Values(cells, value, (value < low) | (value > high), level, level_name, scale)


def _one_variable(
    container: Container, name: str, wanted: Wanted, read: _Values, odd: np.ndarray, error: Any, control: QualityControl
) -> Table:
    ds, argument, cells, value = container.ds, container.argument, read.cells, read.value
    latitude, longitude = (cells.spread(numeric(ds[c], argument)) for c in (container.latitude, container.longitude))
    time = cells.spread(decoded(ds[container.time], argument)) if container.time is not None else None
    station, platform = (texts(ds, usual, cells) for usual in (STATION_NAMES, PLATFORM_NAMES))
    given = error_of(container, name, wanted, cells, error, abs(read.scale))
    sigma = deviations(given, platform, wanted, cells, argument)

    code = np.zeros(cells.size, dtype=np.uint8)
    code[np.isposinf(sigma)] = Quality.PASSIVE
    if control.blacklist:
        listed = np.isin(station, list(control.blacklist)) | np.isin(platform, list(control.blacklist))
        code[listed] = Quality.BLACKLISTED
    code[odd] = Quality.CONSISTENCY
    wild = (np.abs(latitude) > 90) | (longitude < -360) | (longitude > 360)
    code[read.wild | wild] = Quality.BOUNDS
    code[refused_by_provider(container, name, read.level_name, cells, control)] = Quality.FLAGGED
    lost = ~np.isfinite(value) | ~np.isfinite(latitude) | ~np.isfinite(longitude)
    if read.level_name is not None:
        lost |= ~np.isfinite(read.level)
    if time is not None and time.dtype.kind == "M":
        lost |= np.isnat(time)
    code[lost] = Quality.MISSING
    _check_errors(sigma, code, value, wanted.name, argument)

    keep = container.rows.get(name, np.ones(cells.size, dtype=bool))
    if container.sparse:  # nothing was observed there
        keep = keep & np.isfinite(value)
    elif len(cells.dims) > len(container.dims):  # padding behind the last level of a profile
        keep = keep & ~(np.isnan(value) & np.isnan(read.level))
    correlated = isinstance(given, Correlated)
    # a height of a report on levels is that of the level, not of a station on the ground
    height = heights(ds, cells, argument) if read.level_name is None else np.full(cells.size, np.nan)
    none = np.zeros(cells.size, dtype=np.int64)
    table = Table(
        none, np.arange(cells.size), time, latitude, longitude, read.level, none, value, sigma, code, station, platform, height,
        np.full(cells.size, 0 if correlated else -1), (given,) if correlated else (),
    )  # fmt: skip
    return table if keep.all() else table.take(keep)


def _variables(container: Container, wanted: list[Wanted]) -> dict[int, str]:
    """Return index in the state -> name in the observations; anything that is not recognised is refused."""
    ds, argument = container.ds, container.argument
    found: dict[int, str] = {}
    own = {w.name for w in wanted}  # a name says more than a standard name
    for i, w in enumerate(wanted):
        named = [w.name] if w.name in ds.data_vars else []
        named = named or [
            str(n)
            for n, v in ds.data_vars.items()
            if w.standard_name and v.attrs.get("standard_name") == w.standard_name and n not in own
        ]
        if len(named) > 1:
            raise ObservationError(f"{argument}: {' and '.join(map(repr, named))} both could be {w.name!r}; keep one.")
        if named:
            found[i] = named[0]
    beside = {f"{n}_{suffix}" for n in found.values() for suffix in (*ERROR_SUFFIXES, *FLAG_SUFFIXES)}
    ancillary = {a for n in found.values() for a in str(ds[n].attrs.get("ancillary_variables", "")).split()}
    known = {*found.values(), *beside, *ancillary, *DESCRIPTIONS}
    known |= {str(n) for n, v in ds.data_vars.items() if is_level(v)}
    strange = [str(n) for n in ds.data_vars if n not in known and not str(n).endswith("_id") and ds[n].dtype.kind in "fiu"]
    if container.rows:
        strange = [n for n in strange if not n.endswith("_error")]
    if strange or not found:
        names = [w.name for w in wanted]
        columns = [n for n in map(str, ds.variables) if n in known and n != "obs"]
        kept = columns if container.is_frame else [n for n in columns if n in ds.data_vars]
        part = f"{argument}['variable'].isin({list(found.values())!r})" if container.rows else f"{kept!r}"
        hint = f" Keep what the state has: {argument}[{part}]" if found else did_you_mean((strange or [""])[0], names)
        values = [n for n in strange if not n.endswith(tuple(f"_{s}" for s in ERROR_SUFFIXES))]
        if not found and len(values) == len(names) == 1 and not container.rows:
            mapping = f"{{{values[0]!r}: {names[0]!r}}}"
            hint += f" If that is it, call it so: {argument}.rename({'columns=' if container.is_frame else ''}{mapping})"
        raise ObservationError(
            f"{argument} holds {', '.join(map(repr, strange)) or 'no variable'}, which is not in the state; it has "
            f"{', '.join(map(repr, names))}.{hint}"
        )
    return found


def _check_errors(sigma: np.ndarray, code: np.ndarray, value: np.ndarray, name: str, argument: str) -> None:
    bad = (np.isnan(sigma) | (sigma <= 0)) & (code != Quality.MISSING)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ObservationError(
            f"The error of {argument}[{name!r}] is {sigma[first]:g} in {int(bad.sum())} of {len(sigma)} values, first at row "
            f"{first}; a standard deviation must be positive (inf keeps an observation passive): error={{{name!r}: 1.0}}"
        )

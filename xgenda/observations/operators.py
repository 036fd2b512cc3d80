"""From the table of observations to what one analysis time needs: values, errors and a `LinearMap` from the state.

The state vector of one time is its channels one after the other, each flattened rows first.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda.curvilinear import AnyGrid
from xgenda.errors import ObservationError, OptionError
from xgenda.maps import LinearMap, concatenate
from xgenda.observations.containers import ErrorLike, Observations, Table, Wanted, first_channels, per_variable, read_observations
from xgenda.observations.correlations import check_blocks
from xgenda.observations.grouping import first_of_each
from xgenda.observations.quality import Quality, QualityControl, boxes, superob
from xgenda.weights import interpolation

#: Not the spacing of the times: then a subset of the times would be given other observations.
DEFAULT_WINDOW = np.timedelta64(1, "h")


@dataclass(frozen=True, eq=False)
class Located:
    """Observations of all analysis times, sorted by time and then by place, with their operator.

    Attributes
    ----------
    table
        Sorted; the order does not depend on the order of the input.
    time_index
        Analysis time of each, -1 where it falls in no window; shape (m,).
    operator
        `LinearMap` from the state of that time (channels x cells) to each; zero rows where it cannot be computed.
    """

    table: Table
    time_index: np.ndarray
    operator: LinearMap

    def at(self, time: int) -> Located:
        """Return the observations of one analysis time, whatever their code."""
        start, stop = np.searchsorted(self.time_index, [time, time + 1])
        rows = np.arange(start, stop)
        return Located(self.table.take(rows), self.time_index[rows], self.operator.select(rows))

    def between(self, start: int, stop: int) -> Located:
        """Return the observations of the analysis times start to stop - 1, numbered from 0."""
        first, last = np.searchsorted(self.time_index, [start, stop])
        rows = np.arange(first, last)
        return Located(self.table.take(rows), self.time_index[rows] - start, self.operator.select(rows))

    def used(self) -> Located:
        """Return the observations that passed all checks so far."""
        rows = np.flatnonzero(self.table.code == Quality.USED)
        return Located(self.table.take(rows), self.time_index[rows], self.operator.select(rows))

    def with_code(self, code: np.ndarray) -> Located:
        """Return the same with other quality codes."""
        return dataclasses.replace(self, table=self.table.with_code(code))


def locate_observations(
    obs: Observations,
    wanted: list[Wanted],
    grid: AnyGrid,
    times: xr.DataArray | None,
    *,
    error: ErrorLike = None,
    window: object = None,
    argument: str = "obs",
    quality: QualityControl | None = None,
    representativeness: float | Mapping[str, float] | None = None,
    ground: np.ndarray | None = None,
    lapse_rate: float | Mapping[str, float] | None = None,
) -> Located:
    """Read observations, assign each to an analysis time, and build the interpolation from the state.

    Parameters
    ----------
    obs, wanted, error, representativeness
        See `xgenda.observations.containers.read_observations`.
    grid
        Grid of the state.
    times
        Times of the state, or None.
    window
        Width of the time window around each analysis time, half-open: [t - w/2, t + w/2). A timedelta, a numpy
        timedelta64 or a string such as '6h'. By default 1 h. An observation in several windows goes to the nearest time.
    quality
        Checks that need no background; None: the defaults.
    ground
        Height of the ground of the state in metres, flat, for the check of station heights.
    lapse_rate
        Decrease per metre of height, a number or a mapping per variable: observations are taken from the height of their station to that
        of the ground, where both are known.
    """
    control = quality or QualityControl()
    table = read_observations(
        obs, wanted, error, argument, quality=control, representativeness=representativeness, period=_period(times, window)
    )
    index = _assign_times(table, times, window, argument)
    lost = ~(np.isfinite(table.latitude) & np.isfinite(table.longitude))
    points, inside = interpolation(grid, np.where(lost, np.nan, table.latitude), np.where(lost, 0.0, table.longitude))
    code = table.code.copy()
    fine = code <= Quality.PASSIVE
    code[fine & ~inside] = Quality.DOMAIN
    code[fine & inside & (index < 0)] = Quality.WINDOW
    _complain_if_all_outside(table, grid, fine, inside, index, argument)
    above = np.full(len(table), np.nan) if ground is None else table.height - points(ground)
    if control.height_difference is not None:
        code[(code <= Quality.PASSIVE) & (np.abs(above) > control.height_difference)] = Quality.HEIGHT
    table = table.with_code(code)
    if lapse_rate is not None:
        table = _at_the_ground(table, wanted, above, lapse_rate, argument)
    channel = first_channels(wanted)
    operator = points.shifted(channel[table.variable] * grid.size, grid.size * channel[-1])
    # a canonical order, so that permuted rows give the same bits; nothing else may tell two rows apart
    level = np.nan_to_num(table.level)
    keys = (index, table.variable, table.latitude, table.longitude, level, table.value, table.error, table.source, table.row)
    order = canonical_order(keys)
    table, index, operator = table.take(order), index[order], operator.select(order)
    located = _reduced(table, index, operator, grid, channel, control)
    check_blocks(located.table, index, located.table.code == Quality.USED, argument)
    return located


def canonical_order(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Return the order of rows by several columns, the most important first; most rows differ in the first three already."""
    order = np.lexsort(tuple(reversed(keys[:3])))
    tied = np.zeros(len(order) + 1, dtype=bool)
    tied[1:-1] = True
    for key in keys[:3]:
        ordered = key[order]
        tied[1:-1] &= (ordered[1:] == ordered[:-1]) | ((ordered[1:] != ordered[1:]) & (ordered[:-1] != ordered[:-1]))
    rows = np.flatnonzero(tied[:-1] | tied[1:])  # with an equal neighbour before or after
    if len(rows):
        some = order[rows]
        order[rows] = some[np.lexsort(tuple(key[some] for key in reversed(keys)))]
    return order


def _at_the_ground(
    table: Table, wanted: list[Wanted], above: np.ndarray, lapse_rate: float | Mapping[str, float], argument: str
) -> Table:
    rates = per_variable(lapse_rate, wanted)
    known = np.isfinite(above)
    if len(table) and not known.any():
        raise ObservationError(
            f"lapse_rate={lapse_rate!r} needs heights: a column 'height' in {argument}, and the height of the ground in ds, a variable with "
            f"standard_name 'surface_altitude'."
        )
    if not np.isfinite(rates).all():
        raise ObservationError(
            f"lapse_rate={lapse_rate!r} is not accepted; give for example lapse_rate={{'t2m': 0.0065}} (K per metre)."
        )
    return dataclasses.replace(table, value=table.value + np.where(known, above, 0.0) * rates[table.variable])


def _reduced(
    table: Table, index: np.ndarray, operator: LinearMap, grid: AnyGrid, channel: np.ndarray, control: QualityControl
) -> Located:
    """Give codes to duplicates, and thin or merge what lies in one box; rows keep their order."""
    code = table.code.copy()
    level = np.nan_to_num(table.level)
    if control.duplicates:
        rows = np.flatnonzero(code <= Quality.PASSIVE)
        corner = [np.round(table.latitude, 4), np.round(table.longitude, 4)]
        # rows that share a hash may be duplicates; all others are not
        mixed = np.zeros(len(rows), dtype=np.uint64)
        for key in (table.variable[rows], index[rows], *((p[rows] * 1e4).astype(np.int64) for p in (*corner, level))):
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + key.astype(np.int64).view(np.uint64)
        ordered = np.sort(mixed)
        rows = rows[np.isin(mixed, ordered[1:][ordered[1:] == ordered[:-1]])]
        if len(rows):
            same = [table.variable[rows], index[rows], *(p[rows] for p in (*corner, level))]
            if table.time is not None:
                same.append(_ticks(table.time[rows], table.time[rows]))
            # one station says one thing at a time; without names only equal reports are one
            value = np.where(table.station[rows] != "", 0.0, table.value[rows])
            labels = (pd.factorize(text[rows])[0] for text in (table.station, table.platform))
            first, _ = first_of_each([*same, *labels, value], (table.error[rows], rows))
            code[np.delete(rows, first)] = Quality.DUPLICATE
    side = control.thin or control.superob
    if side is None:
        return Located(table.with_code(code), index, operator)
    rows = np.flatnonzero(code == Quality.USED)
    if control.superob is not None and (table.correlation[rows] >= 0).any():
        raise ObservationError(
            "superob merges observations with independent errors, and an ErrorCovariance says that they depend on each other. Thin instead: "
            "quality=xgenda.QualityControl(thin=50e3)"
        )
    box = (table.variable[rows], index[rows], level[rows], *boxes(table.latitude[rows], table.longitude[rows], float(side)))
    first, group = first_of_each(box, (table.error[rows], rows))
    code[np.delete(rows, first)] = Quality.THINNED if control.superob is None else Quality.MERGED
    table = table.with_code(code)
    if control.superob is None:
        return Located(table, index, operator)
    # the first of each box stands for all of it, at their weighted mean
    kept = rows[first]
    merged = superob(
        table.value[rows], table.error[rows], table.latitude[rows], table.longitude[rows], group, control.floor
    )  # groups are numbered in the order of `first`
    replaced = {}
    for name, new in zip(("value", "error", "latitude", "longitude"), merged, strict=True):
        replaced[name] = getattr(table, name).copy()
        replaced[name][kept] = new
    table = dataclasses.replace(table, **replaced)
    points, inside = interpolation(grid, table.latitude[kept], table.longitude[kept])
    moved = points.shifted(channel[table.variable[kept]] * grid.size, grid.size * channel[-1])
    place = np.arange(len(table))
    place[kept] = len(table) + np.arange(len(kept))
    operator = concatenate([operator, moved]).select(place)
    code = table.code.copy()
    code[kept[~inside]] = Quality.DOMAIN
    return Located(table.with_code(code), index, operator)


def _complain_if_all_outside(
    table: Table, grid: AnyGrid, fine: np.ndarray, inside: np.ndarray, index: np.ndarray, argument: str
) -> None:
    n = int(fine.sum())
    if n < 5:
        return
    if (inside & fine).sum() < 0.2 * n:
        _, swapped = interpolation(grid, table.longitude[fine], table.latitude[fine])
        if swapped.sum() > 0.8 * n:
            raise ObservationError(
                f"{int((~inside & fine).sum())} of {n} {argument} lie outside the grid, and with latitude and longitude "
                f"exchanged {int(swapped.sum())} lie inside. Did you swap them? "
                f"{argument}.rename(latitude='longitude', longitude='latitude')"
            )
    if (index[fine] < 0).sum() > 0.9 * n:
        first = table.time[fine][0] if table.time is not None else ""
        raise ObservationError(
            f"{int((index[fine] < 0).sum())} of {n} {argument} fall in no time window of the state (the first is at {first}). "
            f"Is their time UTC? Select the right ones, or widen the window: window='12h'"
        )


def parse_window(window: object) -> np.timedelta64:
    """Return a window width as a positive numpy timedelta64 in nanoseconds."""
    try:
        if not isinstance(window, (str, datetime.timedelta, np.timedelta64)):
            raise TypeError
        width = np.timedelta64(pd.Timedelta(window).value, "ns")
    except (ValueError, TypeError):
        raise OptionError(f"window={window!r} is no time span; give for example window='6h'.") from None
    if not width > np.timedelta64(0, "ns"):
        raise OptionError(f"window={window!r} must be positive; give for example window='6h'.")
    return width


def _assign_times(table: Table, times: xr.DataArray | None, window: object, argument: str) -> np.ndarray:
    width = parse_window(window) if window is not None else None
    count = 1 if times is None else times.size
    if table.time is None or times is None or not len(table):
        if count > 1 and len(table):
            raise ObservationError(
                f"{argument} has no time and the state has {count} times. Give each observation its time, or select one: ds.isel(time=0)"
            )
        return np.zeros(len(table), dtype=np.int64)
    stamps, moments = np.atleast_1d(times.values), table.time
    if stamps.dtype.kind == moments.dtype.kind == "M" and not (_fits_nanoseconds(stamps) and _fits_nanoseconds(moments)):
        raise ObservationError(
            f"The times of {argument} or of the state lie outside the years 1678 to 2262, which numpy counts in nanoseconds; use "
            f"cftime in both: ds.convert_calendar('proleptic_gregorian', use_cftime=True)"
        )
    if stamps.dtype.kind != moments.dtype.kind or (
        stamps.dtype.kind == "O" and len(moments) and type(stamps.flat[0]) is not type(moments.flat[0])
    ):
        raise ObservationError(
            f"The time of {argument} is {type(moments.flat[0]).__name__} and that of the state is {type(stamps.flat[0]).__name__}; "
            f"use one calendar: {argument}.convert_calendar({str(times.dt.calendar)!r}, use_cftime={stamps.dtype.kind == 'O'})"
        )
    tick = 1 if stamps.dtype.kind == "M" else 1000  # nanoseconds in one count of _ticks
    state, seen = _ticks(stamps, stamps), _ticks(moments, stamps)
    order = np.argsort(state)
    ordered = state[order]
    half = _half(DEFAULT_WINDOW if width is None else width, tick)
    right = np.clip(np.searchsorted(ordered, seen), 0, len(ordered) - 1)
    left = np.clip(right - 1, 0, None)
    nearest = np.where(np.abs(seen - ordered[left]) < np.abs(ordered[right] - seen), left, right)
    distance = seen - ordered[nearest]
    ok = (distance >= -half) & (distance < half) & (seen != np.iinfo(np.int64).min)
    return np.where(ok, order[nearest], -1)


def _period(times: xr.DataArray | None, window: object) -> tuple[Any, Any] | None:
    """Return the first and the last moment that may matter: a whole window before the first and after the last state."""
    if times is None or not times.size:
        return None
    seconds = int((parse_window(window) if window is not None else DEFAULT_WINDOW) / np.timedelta64(1, "s")) + 1
    stamps = np.atleast_1d(times.values)
    width = np.timedelta64(seconds, "s") if stamps.dtype.kind == "M" else datetime.timedelta(seconds=seconds)
    return stamps.min() - width, stamps.max() + width


def _half(width: np.timedelta64, tick: int) -> np.int64:
    return np.int64(width.astype("timedelta64[ns]").astype(np.int64) // (2 * tick))


def _fits_nanoseconds(stamps: np.ndarray) -> bool:
    seconds = stamps[~np.isnat(stamps)].astype("datetime64[s]").astype(np.int64)
    return bool((np.abs(seconds) < np.iinfo(np.int64).max // 10**9).all())


def _ticks(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return times as integers: nanoseconds for datetime64, microseconds since the first of `reference` for cftime.

    The years of climate calendars exceed what 64 bits of nanoseconds can count.
    """
    if values.dtype.kind == "M":
        return values.astype("datetime64[ns]").astype(np.int64)
    origin, step = reference.flat[0], datetime.timedelta(microseconds=1)
    return np.array([(v - origin) // step for v in values.ravel()], dtype=np.int64)

"""From the table of observations to what one analysis time needs: values, errors and a `LinearMap` from the state.

The state vector of one time is its channels one after the other, each flattened rows first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse
import xarray as xr

from xgenda import states
from xgenda.curvilinear import AnyGrid
from xgenda.errors import ObservationError
from xgenda.maps import LinearMap
from xgenda.observations.containers import ErrorLike, Observations, Table, Wanted, first_channels, per_variable, read_observations
from xgenda.observations.correlations import check_blocks
from xgenda.observations.grouping import first_of_each
from xgenda.observations.quality import Quality, QualityControl, boxes, superob
from xgenda.observations.table import check_names
from xgenda.observations.times import (
    assign_times,
    bracket,
    common_ticks,
    far_away,
    mean_times,
    period_of,
    ticks,
    trajectory_weights,
)
from xgenda.weights import interpolation

#: Part of an observation's weight that must lie on valid cells.
HALF = 0.5
#: Part of the spacing of levels by which an observation may lie beyond the last: rounding of single precision.
SLACK = 1e-3
#: Part of its pressure within which an observation belongs to a single level; of a depth or height twice that, and a metre.
ALONE = 0.05


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
    trajectory
        Whether `operator` is from the states of all times instead, one after the other.
    """

    table: Table
    time_index: np.ndarray
    operator: LinearMap
    trajectory: bool = False

    def take(self, rows: np.ndarray) -> Located:
        """Return some rows."""
        return dataclasses.replace(
            self, table=self.table.take(rows), time_index=self.time_index[rows], operator=self.operator.select(rows)
        )

    def at(self, time: int) -> Located:
        """Return the observations of one analysis time, whatever their code."""
        return self.take(np.arange(*np.searchsorted(self.time_index, [time, time + 1])))

    def between(self, start: int, stop: int) -> Located:
        """Return the observations of the analysis times start to stop - 1, numbered from 0."""
        part = self.take(np.arange(*np.searchsorted(self.time_index, [start, stop])))
        return dataclasses.replace(part, time_index=part.time_index - start)

    def used(self) -> Located:
        """Return the observations that passed all checks so far."""
        return self.take(np.flatnonzero(self.table.code == Quality.USED))

    def with_code(self, code: np.ndarray) -> Located:
        """Return the same with other quality codes."""
        return dataclasses.replace(self, table=self.table.with_code(code))


def columned(channels: list[Wanted]) -> list[Wanted]:
    """Return variables on all their levels, of what observations must know of each channel."""
    return [
        dataclasses.replace(channels[at[0]], name=name, levels=levels, vertical=kind)
        for name, at, levels, kind in states.columns([w.name for w in channels])
    ]


@dataclass(frozen=True, eq=False)
class Space:
    """Where the state is: its grid, the levels of its variables, and its mask.

    Attributes
    ----------
    grid, wanted
        Horizontal grid; variables with their levels.
    valid
        Which cells of which channels hold a state, shape (channels, ...), or None for all. Further channels, which operators make,
        are where all others are.
    """

    grid: AnyGrid
    wanted: list[Wanted]
    valid: np.ndarray | None = None

    @functools.cached_property
    def channel(self) -> np.ndarray:
        """First channel of each variable, and the number of all."""
        return first_channels(self.wanted)

    def interpolate(self, table: Table) -> tuple[LinearMap, np.ndarray]:
        """Return the interpolation from one field to each observation, and which of them lie inside of the grid and its levels."""
        lost = ~(np.isfinite(table.latitude) & np.isfinite(table.longitude))
        latitude, longitude = np.where(lost, np.nan, table.latitude), np.where(lost, 0.0, table.longitude)
        points, inside = interpolation(self.grid, latitude, longitude)
        for i, w in enumerate(self.wanted):
            at = np.flatnonzero((table.variable == i) & ~lost)
            if w.rows is not None and len(at):
                found, inside[at] = w.rows(self.grid, latitude[at], longitude[at])
                points = points.replaced(at, found)
        return points, inside & self._between(table)[2]

    def observe(self, table: Table, points: LinearMap) -> tuple[LinearMap, np.ndarray]:
        """Return the map from the whole state to each observation, and which of them see it.

        They do where at least half of their weight is on valid cells, on both of the levels that they lie between. Those beyond the levels
        have empty rows.
        """
        lower, part, inside = self._between(table)
        first, size = self.channel[table.variable] + lower, self.grid.size * self.channel[-1]
        valid = self._valid_channels()

        def on_level(rows: np.ndarray, channel: np.ndarray, weight: np.ndarray) -> tuple[LinearMap, np.ndarray]:
            level = points.select(rows).shifted(channel * self.grid.size, size)
            seen = np.ones(len(rows), dtype=bool)
            if valid is not None:
                level, seen = level.restricted(valid, HALF)
            return level.scaled(weight), seen

        operator, seen = on_level(np.arange(len(table)), first, np.where(inside, 1.0 - part, 0.0))
        seen |= part == 1.0
        above = np.flatnonzero(inside & (part > 0))
        if len(above):
            upper, upper_seen = on_level(above, first[above] + 1, part[above])
            operator = operator.plus(upper.spread(above, len(table)))
            seen[above] &= upper_seen
        return operator.scaled(seen.astype(float)), seen

    def _valid_channels(self) -> np.ndarray | None:
        """Return which cells of all channels hold a state, flat; of what an operator makes where all that it takes do."""
        if self.valid is None:
            return None
        valid = self.valid.reshape(len(self.valid), -1)
        made = [np.asarray(valid[list(w.inputs)].all(0)) for w in self.wanted if w.inputs]
        return np.concatenate([valid, *(m[None] for m in made)]).ravel()

    def _between(self, table: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the level below each observation, counted from the first, the part of the next one, and which are between levels.

        Interpolation is linear in the logarithm of pressure, and in depth or height.
        """
        lower, part, inside = np.zeros(len(table), dtype=np.int64), np.zeros(len(table)), np.ones(len(table), dtype=bool)
        for v, w in enumerate(self.wanted):
            rows = np.flatnonzero(table.variable == v)
            if not w.levels or not len(rows):
                continue
            axis, place = np.array(w.levels), table.level[rows]
            with np.errstate(divide="ignore", invalid="ignore"):
                if w.vertical == "pressure":
                    axis, place = np.log(axis), np.log(place)
            if len(axis) == 1:
                near = ALONE if w.vertical == "pressure" else 1.0 + 2 * ALONE * abs(axis[0])
                inside[rows] = (np.abs(place - axis[0]) <= near) | (np.isnan(place) & w.optional)
                continue
            slack = SLACK * np.diff(axis).min()
            inside[rows] = (place >= axis[0] - slack) & (place <= axis[-1] + slack)
            lower[rows], part[rows] = bracket(axis, np.where(inside[rows], place, axis[0]))
        return lower, part, inside


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
    valid: np.ndarray | None = None,
    trajectory: bool = False,
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
        timedelta64 or a string such as '6h'. By default 1 h, for a trajectory its spacing. An observation in several windows goes to the
        nearest time.
    quality
        Checks that need no background; None: the defaults.
    ground
        Height of the ground of the state in metres, flat, for the check of station heights.
    lapse_rate
        Decrease per metre of height in the units of the state as given, a number or a mapping per variable: observations are taken from the
        height of their station to that of the ground, where both are known.
    valid
        Which cells hold a state, see `Space`.
    trajectory
        Whether the states are one trajectory, which is linear between its times: the operator then maps all of them, one after the other.
    """
    control = quality or QualityControl()
    table = read_observations(
        obs, wanted, error, argument, quality=control, representativeness=representativeness,
        period=period_of(times, window, trajectory=trajectory),
    )  # fmt: skip
    index = assign_times(table.time, len(table), times, window, argument, trajectory=trajectory)
    space = Space(grid, wanted, valid)
    points, inside = space.interpolate(table)
    operator, seen = space.observe(table, points)
    code = table.code.copy()
    fine = code <= Quality.PASSIVE
    code[fine & ~inside] = Quality.DOMAIN
    code[fine & inside & (index < 0)] = Quality.WINDOW
    code[(code <= Quality.PASSIVE) & ~seen] = Quality.LAND
    _complain_if_all_outside(table, grid, fine, inside, index, times, argument)
    above = np.full(len(table), np.nan) if ground is None else table.height - points(ground)
    above[np.array([w.of is not None for w in wanted])[table.variable]] = np.nan  # what sees an area has no height of its own
    if control.height_difference is not None:
        code[(code <= Quality.PASSIVE) & (np.abs(above) > control.height_difference)] = Quality.HEIGHT
    table = table.with_code(code)
    if lapse_rate is not None:
        table = _at_the_ground(table, wanted, above, lapse_rate, argument)
    # a canonical order, so that permuted rows give the same bits; nothing else may tell two rows apart
    level = np.nan_to_num(table.level)
    keys = (index, table.variable, table.latitude, table.longitude, level, table.value, table.error, table.source, table.row)
    order = canonical_order(keys)
    table, index, operator = table.take(order), index[order], operator.select(order)
    located = _reduced(table, index, operator, space, control)
    if trajectory and times is not None and located.table.time is not None:
        located = _along_trajectory(located, wanted, times, argument)
    check_blocks(located.table, index, located.table.code == Quality.USED, argument, trajectory=located.trajectory)
    return located


def _along_trajectory(located: Located, wanted: list[Wanted], times: xr.DataArray, argument: str) -> Located:
    """Return the same observations as seen by a trajectory; means over a period that begins before it are outside of the window."""
    table = located.table
    assert table.time is not None
    periods = np.array([0 if w.period is None else w.period.astype("timedelta64[ns]").astype(np.int64) for w in wanted])
    weights, before = trajectory_weights(table.time, times, argument, periods[table.variable])
    code = table.code.copy()
    code[(code <= Quality.PASSIVE) & (before > 0) & (periods[table.variable] > 0)] = Quality.WINDOW
    each = weights.tocoo()
    size = located.operator.size
    parts = located.operator.select(each.row).scaled(each.data).shifted(each.col.astype(np.int64) * size, size * weights.shape[1])
    total = scipy.sparse.csr_array(
        (np.ones(len(each.row)), (each.row, np.arange(len(each.row)))), shape=(len(table), len(each.row))
    )
    return Located(table.with_code(code), located.time_index, LinearMap(total @ parts.matrix), trajectory=True)


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
    rates = per_variable(lapse_rate, wanted) * [w.from_given[0] for w in wanted]
    known = np.isfinite(above)
    check_names("lapse_rate", lapse_rate, wanted)
    if not isinstance(lapse_rate, Mapping):  # a number is meant for temperatures
        others = [w.name for v, w in enumerate(wanted) if not _is_temperature(w) and bool((table.variable == v).any())]
        if others:
            raise ObservationError(
                f"lapse_rate={lapse_rate!r} is one number, and {argument} holds {others[0]!r}, which is no temperature. Say for which variable it "
                f"is: lapse_rate={{'t2m': {lapse_rate!r}}}"
            )
    if len(table) and not known.any() and all(wanted[v].levels for v in np.unique(table.variable)):
        raise ObservationError(f"lapse_rate={lapse_rate!r} has no effect on variables with levels; leave it out.")
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


def _is_temperature(wanted: Wanted) -> bool:
    if wanted.standard_name is not None:
        return "temperature" in wanted.standard_name
    return wanted.units in ("K", "degC", "Celsius", "celsius", "degree_Celsius") or wanted.units is None


def _reduced(table: Table, index: np.ndarray, operator: LinearMap, space: Space, control: QualityControl) -> Located:
    """Give codes to duplicates, and thin or merge what lies in one box; rows keep their order."""
    code = table.code.copy()
    level = np.nan_to_num(table.level)
    if control.duplicates:
        rows = np.flatnonzero(code <= Quality.PASSIVE)
        corner = [np.round(table.latitude, 4), np.round(table.longitude % 360.0, 4) % 360.0]  # -3 and 357 are one place
        # rows that share a hash may be duplicates; all others are not
        mixed = np.zeros(len(rows), dtype=np.uint64)
        for key in (table.variable[rows], index[rows], *((p[rows] * 1e4).astype(np.int64) for p in (*corner, level))):
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + key.astype(np.int64).view(np.uint64)
        ordered = np.sort(mixed)
        rows = rows[np.isin(mixed, ordered[1:][ordered[1:] == ordered[:-1]])]
        if len(rows):
            same = [table.variable[rows], index[rows], *(p[rows] for p in (*corner, level))]
            if table.time is not None:
                same.append(ticks(table.time[rows], table.time[rows]))
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
    if table.time is not None:
        replaced["time"] = table.time.copy()
        replaced["time"][kept] = mean_times(table.time[rows], table.error[rows] ** -2.0, group)
    table = dataclasses.replace(table, **replaced)
    merged_rows = table.take(kept)
    points, inside = space.interpolate(merged_rows)
    moved, seen = space.observe(merged_rows, points)
    operator = operator.replaced(kept, moved)
    code = table.code.copy()
    code[kept[~inside]] = Quality.DOMAIN
    code[kept[inside & ~seen]] = Quality.LAND
    return Located(table.with_code(code), index, operator)


def _complain_if_all_outside(
    table: Table,
    grid: AnyGrid,
    fine: np.ndarray,
    inside: np.ndarray,
    index: np.ndarray,
    times: xr.DataArray | None,
    argument: str,
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
    outside = fine & (index < 0)
    if outside.sum() > 0.9 * n:
        assert table.time is not None  # else all are within
        assert times is not None
        state, seen, tick = common_ticks(table.time[outside], times, argument)
        right = (
            np.clip(np.searchsorted(np.sort(state), seen), 1, len(state) - 1) if len(state) > 1 else np.zeros(len(seen), np.int64)
        )
        nearest = float(np.abs(seen - np.sort(state)[[right, right - 1]]).min()) * tick / 1e9
        raise ObservationError(
            f"{int(outside.sum())} of {n} {argument} fall in no time window of the state (the first is at {table.time[fine][0]}). "
            f"{far_away(nearest)}"
        )

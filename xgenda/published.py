"""Published forecast models as they see a state: channels in a fixed order, on a fixed grid, in fixed units; and the way back.

Models of the weather name their channels after variable and pressure level in hPa, such as ``z500`` and ``t2m``, and want latitude from north to
south and longitude from 0 to 360 degrees. A state has variables, some on levels, in any order and direction. `Interface.bind` finds the one in
the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata, states
from xgenda.errors import CoordinateError, DivergenceError, GridError, OptionError, StateError, UnitsError, did_you_mean
from xgenda.grids import Grid, Orientation, grid_of
from xgenda.observations.times import at_time, later
from xgenda.vocabulary import ON_LEVELS, SINGLE, listed, split_channel, units_of


@dataclass(frozen=True)
class Link:
    """Where in a state a channel of a model is.

    Attributes
    ----------
    channel
        Of the model.
    variable, level
        Of the state, and the position on its levels, 0 without.
    scale, offset
        The value of the model is scale times that of the state plus offset.
    """

    channel: str
    variable: str
    level: int
    scale: float
    offset: float


@dataclass(frozen=True, eq=False)
class Interface:
    """What a published model takes and gives.

    Attributes
    ----------
    inputs, outputs
        Channels, in the order of the model.
    grid, orientation
        Of its fields.
    step
        From input to output.
    variables
        Names of the variables of a state by channel, or by what is before the level in its name; ``name@50000Pa`` for one level of a variable.
    units
        By channel, or by what is before the level; see `ON_LEVELS` and `SINGLE` for those that are known.
    keep
        Variables of the state that the model does not forecast, and that stay as they are.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    grid: Grid
    orientation: Orientation
    step: np.timedelta64
    variables: Mapping[str, str]
    units: Mapping[str, str]
    keep: tuple[str, ...]

    @classmethod
    def of(
        cls, inputs: Sequence[str], outputs: Sequence[str], latitude: Any, longitude: Any, step: np.timedelta64,
        variables: Mapping[str, str] | None, units: Mapping[str, str] | None, keep: Sequence[str],
    ) -> Interface:  # fmt: skip
        """Check what is said of a model.

        Raises
        ------
        OptionError
            If channels repeat, or options name channels that the model has not.
        GridError
            If latitude or longitude are no axis of a grid.
        """
        for which, names in (("input", inputs), ("output", outputs)):
            twice = [n for n in names if list(names).count(n) > 1]
            if twice:
                raise OptionError(
                    f"The channel {twice[0]!r} is there {list(names).count(twice[0])} times in the {which}; name each once."
                )
        known = {n: None for c in (*inputs, *outputs) for n in (c, split_channel(c)[0])}
        for argument, given in (("variables", variables), ("units", units)):
            for key, value in (given or {}).items():
                if key not in known:
                    raise OptionError(
                        f"{argument} names {key!r}, which is no channel of the model; it has {listed(list(known))}.{did_you_mean(key, known)}"
                    )
                if not isinstance(value, str):
                    raise OptionError(
                        f"{argument}[{key!r}]={value!r} is not accepted; text is needed, for example {_EXAMPLES[argument]}"
                    )
        if isinstance(keep, str) or not all(isinstance(k, str) for k in keep):
            raise OptionError(f"keep={keep!r} is not accepted; give names of variables of the state: keep=('sst',)")
        axes = {}
        for name, values in (("latitude", latitude), ("longitude", longitude)):
            found = np.asarray(values)
            if found.ndim != 1 or found.dtype.kind not in "fiu" or not np.isfinite(found.astype(float)).all():
                raise GridError(
                    f"The {name} of the model has shape {found.shape} and dtype {found.dtype}; degrees along one axis are needed, in the "
                    "order of the "
                    f"model: {name}=numpy.{'linspace(90, -90, 721)' if name == 'latitude' else 'arange(0, 360, 0.25)'}"
                )
            axes[name] = (name, found.astype(float))
        grid, orientation = grid_of(xr.Dataset(coords=axes), argument="The model")
        return cls(tuple(inputs), tuple(outputs), grid, orientation, step, dict(variables or {}), dict(units or {}), tuple(keep))

    def settings(self) -> str:
        """Return a checksum of all this."""
        order = [self.orientation.rows.tolist(), self.orientation.columns.tolist(), self.grid.to_dict()]
        lists = [self.inputs, self.outputs, str(self.step), self.variables, self.units, sorted(self.keep), order]
        return hashlib.sha256(json.dumps(lists, sort_keys=True).encode()).hexdigest()

    def forecast(
        self, ds: xr.Dataset, run: Callable[[np.ndarray, Any, np.ndarray], np.ndarray], batch: int, dtype: Any
    ) -> xr.Dataset:
        """Return a state one step later.

        Parameters
        ----------
        ds
            Of one time, with or without members.
        run
            From fields (members, channels, rows, columns), the time of the state and the numbers of the members to fields
            (members, outputs, rows, columns).
        batch
            Members that are given to it at once.
        dtype
            Of its fields.

        Raises
        ------
        DivergenceError
            If what it returns is not finite.
        """
        bound = self.bind(ds)
        for first in range(0, bound.members, batch):
            chosen = slice(first, min(first + batch, bound.members))
            given = bound.take(chosen, dtype)
            found = run(given, bound.time, bound.numbers[chosen])
            wanted = (len(given), len(self.outputs), *self.grid.shape)
            if found.shape != wanted:
                raise StateError(
                    f"The model returned fields of shape {found.shape}; (members, channels, latitude, longitude) {wanted} is needed."
                )
            bound.put(chosen, found)
        return bound.result()

    def bind(self, ds: xr.Dataset) -> Bound:
        """Find the channels in a state.

        Raises
        ------
        OptionError, StateError
            If a channel is not there, or the state has variables that the model does not forecast.
        GridError, UnitsError, CoordinateError
            If the grid is another one, or units cannot be converted.
        """
        if not isinstance(ds, xr.Dataset):
            raise OptionError(f"ds is a {type(ds).__module__}.{type(ds).__name__}; an xarray Dataset is needed.")
        layout = metadata.find_layout(ds)
        if layout.time is None or ds[layout.time].ndim:
            raise CoordinateError(
                "A forecast needs a state of one time, as a scalar coordinate: "
                + (
                    "ds.assign_coords(time=numpy.datetime64('2020-01-01T00:00'))"
                    if layout.time is None
                    else f"ds.isel({layout.time}=0)"
                )
            )
        grid, orientation = grid_of(ds, layout)
        if not self.grid.same_as(grid):
            raise GridError(
                f"ds is on the grid {grid.describe()}, and the model on {self.grid.describe()}. Bring the state there: ds.genda.regrid(target)"
            )
        finder = _Finder.of(ds, layout, self)
        inputs = tuple(k for c in self.inputs if (k := finder.link(c, needed=True)) is not None)
        given = {k.channel: k for k in inputs}
        outputs = tuple(given.get(c) or finder.link(c, needed=False) for c in self.outputs)
        forecast = {(k.variable, k.level) for k in outputs if k is not None}
        places = forecast | {(k.variable, k.level) for k in inputs}
        missing = []
        for name in finder.state:
            levels = [i for i in range(finder.levels_of(name)) if (name, i) not in places]
            if levels and name not in self.keep:
                missing.append(
                    name if finder.levels[name] is None else f"{name} on {len(levels)} of {finder.levels_of(name)} levels"
                )
        if missing:
            first = missing[0].split(" on ")[0]
            raise OptionError(
                f"The model does not forecast {listed(missing)} of the state. Leave it out: ds.drop_vars({first!r}), name the channel that it is: "
                f"variables={{{self.outputs[0]!r}: {first!r}}}, or let it stay as it is: keep=({first!r},)"
            )
        doubled = [
            k
            for k in outputs
            if k is not None and sum(o is not None and (o.variable, o.level) == (k.variable, k.level) for o in outputs) > 1
        ]
        if doubled:
            raise OptionError(
                f"Channels {listed([k.channel for k in doubled])} of the model are all found in {doubled[0].variable!r}; say which is what: "
                f"variables={{{doubled[0].channel!r}: 'name'}}"
            )
        kept = tuple(k if k is not None and k.variable in finder.state else None for k in outputs)
        return Bound(self, ds, layout, orientation, inputs, kept, finder.levels)


@dataclass(frozen=True, eq=False)
class _Finder:
    """Finds channels in a state."""

    ds: xr.Dataset
    interface: Interface
    levels: dict[str, states.Vertical | None]
    state: list[str]

    @classmethod
    def of(cls, ds: xr.Dataset, layout: metadata.Layout, interface: Interface) -> _Finder:
        known = {*layout.dims, layout.member}
        levels: dict[str, states.Vertical | None] = {}
        for name, variable in ds.data_vars.items():
            others = [str(d) for d in variable.dims if d not in known]
            if not set(layout.dims) <= set(variable.dims) or variable.dtype.kind not in "fiub" or len(others) > 1:
                continue
            vertical = states.find_vertical(ds, others[0]) if others else None
            if others and vertical is None:
                continue
            levels[str(name)] = vertical
        changing = [
            n for n in metadata.data_variables(ds, layout)
            if ds[n].dtype.kind == "f" and (layout.member not in ds.dims or layout.member in ds[n].dims)
        ]  # fmt: skip
        odd = [n for n in changing if n not in levels and n not in interface.keep]
        if odd:
            raise CoordinateError(
                f"ds[{odd[0]!r}] has dimensions {ds[odd[0]].dims}; beside {', '.join(map(repr, known - {None}))} there may be one, of "
                "pressure levels. "
                f"Drop it: ds.drop_vars({odd[0]!r})"
            )
        return cls(ds, interface, levels, [n for n in changing if n in levels])

    def levels_of(self, name: str) -> int:
        vertical = self.levels[name]
        return 1 if vertical is None else len(vertical.values)

    def link(self, channel: str, *, needed: bool) -> Link | None:
        """Return where a channel is; None where it is not, and need not be."""
        stem, pressure = split_channel(channel)
        mapped = self.interface.variables.get(channel) or self.interface.variables.get(stem)
        single = [n for n, v in self.levels.items() if v is None]
        leveled = [n for n, v in self.levels.items() if v is not None and v.kind == "pressure"]
        if mapped is not None:
            return self._mapped(channel, mapped, pressure)
        if channel in single:
            return self._at(channel, channel, None)
        names, standard, _ = (ON_LEVELS.get(stem) if pressure else SINGLE.get(channel)) or ((), None, "")
        pool = leveled if pressure else single
        found = [n for n in (stem, *names) if n in pool][:1] or [
            n for n in pool if standard is not None and self.ds[n].attrs.get("standard_name") == standard
        ]
        if len(found) > 1:
            raise OptionError(
                f"ds: {listed(found)} all have standard_name {standard!r}; say which is {channel!r}: variables={{{stem!r}: {found[0]!r}}}"
            )
        if found:
            return self._at(channel, found[0], pressure, needed=needed)
        if not needed:
            return None
        raise OptionError(
            f"ds lacks the channel {channel!r} of the model: no variable {channel!r}"
            + (
                f", and none of {listed([stem, *names])} on pressure levels"
                if pressure
                else f", nor {listed(names)}"
                if names
                else ""
            )
            + (f", nor one with standard_name {standard!r}" if standard else "")
            + f"; it has {listed(list(map(str, self.ds.data_vars)))}. Say which it is: variables={{{stem!r}: 'name'}}"
        )

    def _mapped(self, channel: str, mapped: str, pressure: float | None) -> Link | None:
        """Return the place that was named."""
        name, value, kind = states.parse_channel(mapped)
        if name not in self.levels:
            raise OptionError(
                f"variables: {channel!r} is to be {name!r}, which is no field of ds; it has {listed(list(self.levels))}."
                f"{did_you_mean(name, self.levels)}"
            )
        vertical = self.levels[name]
        if vertical is None:
            return self._at(channel, name, None)
        if value is None and pressure is None:
            raise OptionError(
                f"variables: {channel!r} is to be {name!r}, which has {len(vertical.values)} levels; say which: "
                f"variables={{{channel!r}: {vertical.channels(name)[0]!r}}}"
            )
        if value is not None and kind != vertical.kind:
            raise OptionError(
                f"variables: {mapped!r} is a {kind}, and {name!r} has levels of {vertical.kind}: {vertical.channels(name)[0]!r}"
            )
        return self._at(channel, name, pressure if value is None else value)

    def _level(self, name: str, wanted: float | None) -> int | None:
        """Return the position of a level of a variable, None where it has not got it."""
        vertical = self.levels[name]
        if vertical is None or wanted is None:
            return 0
        near = np.flatnonzero(np.isclose(vertical.values, wanted, rtol=1e-5, atol=0))
        return int(near[0]) if len(near) else None

    def _at(self, channel: str, name: str, wanted: float | None, *, needed: bool = True) -> Link | None:
        """Return the link to a variable, on a level where it has some, with the conversion of its units."""
        vertical, level = self.levels[name], self._level(name, wanted)
        if level is None:
            if not needed:
                return None
            assert vertical is not None
            raise OptionError(
                f"ds[{name!r}] lacks the level {wanted:g} {states.UNITS[vertical.kind]}, channel {channel!r} of the model; it has "
                f"{', '.join(f'{v:g}' for v in vertical.values)}. Interpolate to the levels of the model, or use another one."
            )
        units = units_of(channel, self.interface.units)
        try:
            scale, offset = metadata.unit_factors_of(self.ds[name], units)
        except UnitsError as problem:
            problem.add_note(
                f"In ds[{name!r}], as channel {channel!r} of the model, whose units are an option: units={{{channel!r}: '...'}}"
            )
            raise
        return Link(channel, name, level, scale, offset)


@dataclass(eq=False)
class Bound:
    """A state as a model sees it, and the state that will be returned.

    Attributes
    ----------
    interface, ds, layout, orientation
        Of the model; the state, its coordinates, and the order of its fields.
    inputs, outputs
        Where channels are; None for outputs that the state does not have.
    levels
        Of the variables of the state.
    """

    interface: Interface
    ds: xr.Dataset
    layout: metadata.Layout
    orientation: Orientation
    inputs: tuple[Link, ...]
    outputs: tuple[Link | None, ...]
    levels: Mapping[str, states.Vertical | None]
    _before: dict[str, np.ndarray] = field(init=False)
    _after: dict[str, np.ndarray] = field(init=False)
    _turn: list[tuple[tuple[slice, slice], tuple[slice, slice]]] = field(init=False)

    def __post_init__(self) -> None:
        """Lay out the arrays."""
        changed = dict.fromkeys(k.variable for k in self.outputs if k is not None)
        before = dict.fromkeys([*(k.variable for k in self.inputs), *changed])
        self._before = {n: self._array(n) for n in before}
        self._after = {n: self._before[n].copy() for n in changed}
        mine, theirs = self.orientation, self.interface.orientation
        rows, columns = (a[np.argsort(b)] for a, b in ((mine.rows, theirs.rows), (mine.columns, theirs.columns)))
        self._turn = [((r, c), (s, d)) for r, s in _runs(rows) for c, d in _runs(columns)]

    @property
    def members(self) -> int:
        """Their number, 1 where there are none."""
        return int(self.ds.sizes[self.layout.member]) if self.layout.member is not None else 1

    @property
    def numbers(self) -> np.ndarray:
        """Of the members."""
        member = self.layout.member
        return np.asarray(self.ds[member].values) if member is not None else np.zeros(1, dtype=np.int64)

    @property
    def time(self) -> Any:
        """Of the state, a scalar DataArray."""
        return self.ds[self.layout.time]

    def _dims(self, name: str) -> tuple[str, ...]:
        vertical, member = self.levels[name], self.layout.member
        lead = [] if vertical is None else [vertical.dim]
        return (*([member] if member in self.ds[name].dims and member is not None else []), *lead, *self.layout.dims)

    def _array(self, name: str) -> np.ndarray:
        """Return a variable along (members or 1, levels or 1, rows, columns)."""
        values = self.ds[name].transpose(*self._dims(name)).values
        levels = 1 if self.levels[name] is None else len(self.levels[name].values)  # type: ignore[union-attr]
        return values.reshape(-1, levels, *values.shape[-2:])

    def take(self, members: slice, dtype: Any) -> np.ndarray:
        """Return the input of a model for some members, shape (members, channels, rows, columns).

        Raises
        ------
        StateError
            If a value is not finite.
        """
        size = members.stop - members.start
        out = np.empty((size, len(self.inputs), *self.interface.grid.shape), dtype=dtype)
        for c, link in enumerate(self.inputs):
            source = self._before[link.variable]
            values = source[members if len(source) > 1 else slice(0, 1), link.level]
            if not np.isfinite(values).all():
                bad = ~np.isfinite(values)
                first = tuple(int(i) for i in np.argwhere(bad)[0])
                what = "NaN" if np.isnan(values).any() else "infinity"
                raise metadata.not_finite(
                    what, int(bad.sum()), values.size, first, link.variable, where=f" (channel {link.channel!r})"
                )
            if (link.scale, link.offset) != (1.0, 0.0):
                values = values.astype(np.float64) * link.scale + link.offset
            for there, here in self._turn:
                out[(slice(None), c, *there)] = values[(..., *here)]
        return out

    def put(self, members: slice, values: np.ndarray) -> None:
        """Take what a model returned for some members, shape (members, outputs, rows, columns).

        Raises
        ------
        DivergenceError
            If a value is not finite.
        """
        for c, link in enumerate(self.outputs):
            if link is None:
                continue
            field = values[:, c]
            if not np.isfinite(field).all():
                bad = np.flatnonzero(~np.isfinite(field).reshape(len(field), -1).all(1))
                raise DivergenceError(
                    f"The forecast model returned NaN or infinity in channel {link.channel!r} of member {self.numbers[members][bad[0]]}; its input "
                    f"was finite. Are units and normalisation those of the model?"
                )
            if (link.scale, link.offset) != (1.0, 0.0):
                field = (field.astype(np.float64) - link.offset) / link.scale
            for there, here in self._turn:
                self._after[link.variable][(members, link.level, *here)] = field[(..., *there)]

    def result(self) -> xr.Dataset:
        """Return the state with what was put, one step later."""
        out = {}
        for name, values in self._after.items():
            variable, dims = self.ds[name].variable, self._dims(name)
            shape = tuple(variable.sizes[d] for d in dims)
            out[name] = xr.Variable(dims, values.reshape(shape), variable.attrs).transpose(*variable.dims)
        return at_time(self.ds.assign(out), later(self.ds, self.interface.step))


_EXAMPLES = {"variables": "variables={'z': 'geopotential', 'z500': 'phi@50000Pa'}", "units": "units={'z': 'm2 s-2'}"}


def _runs(index: np.ndarray) -> list[tuple[slice, slice]]:
    """Return an index as slices of what is taken in a row, up or down, with where each goes: two for a turned globe."""
    steps = np.diff(index)
    out, first = [], 0
    while first < len(index):
        step = int(steps[first]) if first < len(steps) and abs(steps[first]) == 1 else 1
        other = np.flatnonzero(steps[first:] != step)
        size = int(other[0]) + 1 if len(other) else len(index) - first
        start = int(index[first])
        end = start + step * size
        out.append((slice(first, first + size), slice(start, None if end < 0 else end, step)))
        first += size
    return out

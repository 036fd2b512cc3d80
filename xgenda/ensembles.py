"""One state of an ensemble as arrays, and back: what goes round in a cycle of forecasts and analyses."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xgenda import labels, metadata, states
from xgenda.curvilinear import PointSet
from xgenda.errors import CoordinateError, GridError, OptionError, StateError, did_you_mean
from xgenda.states import State

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Frame:
    """What all states of one cycle have in common.

    Attributes
    ----------
    template
        A Dataset of one time (a scalar coordinate) and one member, with all that does not change.
    state
        The template as channels.
    names
        Variables of the state; all others stay as they are.
    dims
        Of each variable, without members.
    masks
        Where a variable holds values, for those that do not everywhere.
    time, member
        Names of the coordinate and the dimension.
    numbers
        Of the members.
    """

    template: xr.Dataset
    state: State
    names: tuple[str, ...]
    dims: Mapping[str, tuple[str, ...]]
    masks: Mapping[str, np.ndarray]
    time: str
    member: str
    numbers: np.ndarray

    @property
    def places(self) -> dict[str, tuple[str, int | None]]:
        """Variable and position on its levels of each channel."""
        out: dict[str, tuple[str, int | None]] = {n: (n, None) for n in self.names if n not in self.state.verticals}
        for name, vertical in self.state.verticals.items():
            out |= {c: (name, i) for i, c in enumerate(vertical.channels(name))}
        return out

    def read(self, ds: object, argument: str, *, sample: str | None = None, call: str = "") -> Arrays:
        """Return the variables of a state of all members, shape (members, ...) each, in the order and the units of the template.

        Places and members are found by their coordinates, where they have some; what has no units is taken to be in those of the template.

        Parameters
        ----------
        ds
            What a forecast returned, or a sample of states.
        argument
            Its name in messages.
        sample
            Dimension of the sample; None: the members of the frame.
        call
            The line that helps where the dimension is missing.

        Raises
        ------
        StateError, GridError, UnitsError, OptionError
            If variables are missing, are no real numbers, or are on other dimensions, coordinates or members, or in units that do not fit.
        """
        if not isinstance(ds, xr.Dataset):
            advice = f"put its values into the state: ds.assign({self.names[0]}=(ds[{self.names[0]!r}].dims, values))"
            if isinstance(ds, xr.DataArray):
                advice = f"make it one: out.to_dataset(name={self.names[0]!r})"
            if ds is None:
                raise OptionError(f"{argument} is None; an xarray Dataset is needed. Its last line should be: return out")
            raise OptionError(f"{argument} is a {type(ds).__module__}.{type(ds).__name__}; an xarray Dataset is needed: {advice}")
        lead = sample or self.member
        ds = self._in_order(ds, argument, sample)
        out: Arrays = {}
        for name in self.names:
            if name not in ds.variables:
                known = [str(n) for n in ds.data_vars]
                raise StateError(
                    f"{argument} lacks the variable {name!r} of the state; it has {', '.join(map(repr, known)) or 'none'}."
                    f"{did_you_mean(name, known)}"
                )
            variable = ds.variables[name]
            extra = [d for d in variable.dims if d not in (*self.dims[name], lead)]
            if extra and all(variable.sizes[d] == 1 for d in extra):
                variable = variable.isel(dict.fromkeys(extra, 0))
            if lead not in variable.dims:
                raise StateError(f"{argument}[{name!r}] has dimensions {variable.dims} and lacks {lead!r}. {call}".rstrip())
            if set(variable.dims) != {lead, *self.dims[name]}:
                raise StateError(
                    f"{argument}[{name!r}] has dimensions {variable.dims}; {(lead, *self.dims[name])} are needed, in any order."
                )
            variable = variable.transpose(lead, *self.dims[name])
            template = self.template.variables[name]
            if variable.shape[1:] != template.shape or (sample is None and len(variable) != len(self.numbers)):
                raise GridError(
                    f"{argument}[{name!r}] has shape {variable.shape} along {(lead, *self.dims[name])}; "
                    f"{(len(self.numbers), *template.shape)} is needed. "
                    + (
                        "Interpolate: out.interp_like(ds)"
                        if variable.shape[1:] != template.shape
                        else "Return all members of ds."
                    )
                )
            values = labels.in_units_of(variable, template, f"{argument}[{name!r}]")
            # a forecast may leave anything where there is no state, such as on land
            out[name] = np.where(self.masks[name], values, values.dtype.type(np.nan)) if name in self.masks else values
        return out

    def _in_order(self, ds: xr.Dataset, argument: str, sample: str | None) -> xr.Dataset:
        """Return a Dataset with its places and members in the order of the frame, as its coordinates say."""
        dims = {d for n in self.names for d in self.dims[n]}
        latitude, longitude = self.state.layout.latitude, self.state.layout.longitude
        index = {}
        for dim in sorted(dims):
            mine, theirs = (x.variables.get(dim) for x in (self.template, ds))
            if mine is None or theirs is None or theirs.dims != (dim,) or mine.shape != theirs.shape:
                continue
            order = labels.order_along(dim, mine, theirs, argument, turns=dim == longitude)
            if order is not None:
                index[dim] = order
        given = ds.variables.get(self.member)
        if sample is None and given is not None and given.dims == (self.member,) and len(given) == len(self.numbers):
            order = labels.order_of_members(self.member, self.numbers, given, argument)
            if order is not None:
                index[self.member] = order
        out = ds.isel(index)
        labels.check_positions(self.template, out, latitude, longitude, dims, argument)
        return out

    def missing(self, arrays: Arrays) -> str | None:
        """Return where values are not finite, or beyond all that is plausible, in words; None where all is well."""
        for name, values in arrays.items():
            fine = np.abs(values) < metadata.LARGEST_PLAUSIBLE  # False for NaN
            if name in self.masks:
                fine = fine | ~self.masks[name]
            if not fine.all():
                bad = np.flatnonzero(~fine.reshape(len(fine), -1).all(1))
                what = f"is beyond {metadata.LARGEST_PLAUSIBLE:g}" if np.isfinite(values[bad]).all() else "is not finite"
                kind, first = ("members", self.numbers[bad[0]]) if len(values) == len(self.numbers) else ("states", bad[0])
                return f"{name!r} {what} in {len(bad)} of {len(values)} {kind}, first in {kind[:-1]} {first}"
        return None

    def dataset(self, arrays: Arrays, time: Any) -> xr.Dataset:
        """Return a state of all members as a Dataset of its own, as forecasts get it: they may write into it."""
        template = self.template
        data = {str(n): (self.member, *self.dims[str(n)]) if n in arrays else None for n in template.data_vars}
        variables = {
            n: template.variables[n] if dims is None else (dims, arrays[n], template.variables[n].attrs)
            for n, dims in data.items()
        }
        coords: dict[str, Any] = {str(n): template.variables[n] for n in template.coords if n != self.time}
        coords[self.member] = (self.member, self.numbers, metadata.MEMBER_ATTRS)
        coords[self.time] = ((), time, template.variables[self.time].attrs)
        return xr.Dataset(variables, coords, template.attrs).copy(deep=True)

    def fields(self, arrays: Arrays, channel: str) -> np.ndarray:
        """Return a channel of all members, shape (members, rows, columns), as the user has it."""
        name, level = self.places[channel]
        values = self._leveled(name, arrays[name])
        return values[:, 0 if level is None else level]

    def replace(self, arrays: Arrays, channels: Mapping[str, np.ndarray]) -> Arrays:
        """Return the arrays with some channels, shape (members, rows, columns) each, replaced."""
        out = {n: v.copy() for n, v in arrays.items()}
        for channel, values in channels.items():
            name, level = self.places[channel]
            self._leveled(name, out[name])[:, 0 if level is None else level] = values
        return out

    def _leveled(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return a view of the array of a variable with the axes (members, levels, rows, columns)."""
        horizontal = [self.state.ds.sizes[d] for d in self.state.layout.dims]
        levels = len(self.state.verticals[name].values) if name in self.state.verticals else 1
        return values.reshape(len(values), levels, *horizontal)

    def spread(self, arrays: Arrays) -> list[float]:
        """Return the root mean variance of each variable over its area and levels."""
        grid = self.state.grid
        out = []
        for name in self.names:
            variance = self._leveled(name, arrays[name].astype(np.float64)).var(0, ddof=1)
            weight = (
                np.ones(variance.shape[1:]) if isinstance(grid, PointSet) else self.state.orientation.from_model(grid.areas())
            )
            weight = np.where(np.isfinite(variance), weight, 0.0)
            out.append(float(np.sqrt((np.nan_to_num(variance) * weight).sum() / weight.sum())))
        return out

    def digest(self, arrays: Arrays) -> str:
        """Return a checksum of a state, its time, members, places and units, and of all that stays as it is."""
        found = hashlib.sha256()
        for name in self.names:
            found.update(
                f"{name}{arrays[name].dtype}{arrays[name].shape}{self.template.variables[name].attrs.get('units')}".encode()
            )
            found.update(np.ascontiguousarray(arrays[name]).tobytes())
        found.update(f"{metadata.time_labels(self.template[self.time])[0]}{self.numbers.tolist()}".encode())
        for name in sorted(map(str, self.template.variables)):
            if name not in self.names and name != self.time:
                variable = self.template.variables[name]
                found.update(f"{name}{variable.dims}{variable.attrs.get('units')}".encode())
                values = variable.values
                found.update(
                    str(values.tolist()).encode() if values.dtype.kind == "O" else np.ascontiguousarray(values).tobytes()
                )
        return found.hexdigest()


def read_initial(initial: xr.Dataset | xr.DataArray, members: int | None, otherwise: int | None = None) -> tuple[Frame, Arrays]:
    """Return the frame of a cycle and its first state, with as many members as it has or is to have.

    Parameters
    ----------
    initial
        One time, with or without members.
    members
        Their number.
    otherwise
        Their number where that is None and `initial` is a single state, of which all members are then copies; None: such is refused.

    Raises
    ------
    CoordinateError, StateError, OptionError
        If there are several times or none, or no variables on the grid.
    """
    ds = metadata.as_dataset(initial, "initial").compute()
    time = metadata.find_time(ds)
    if time is None:
        raise CoordinateError(
            "initial has no time; say of when it is: initial.assign_coords(time=numpy.datetime64('2020-01-01T00:00'))"
        )
    if ds[time].size != 1:
        raise CoordinateError(
            f"initial has {ds[time].size} times, and a cycle starts from one; select it: initial.isel({ds[time].dims[0]}=-1)"
        )
    ds = ds.squeeze(ds[time].dims) if ds[time].ndim else ds
    metadata.time_labels(ds[time])
    member = metadata.find_member(ds)
    count = ds.sizes[member] if member else None
    if count == 0:
        raise StateError(f"initial: dimension {member!r} is empty.")
    if count is not None and members not in (None, count):
        raise OptionError(
            f"members={members} is not accepted: initial has {count}. Leave it out, or select: initial.isel({member}=...)"
        )
    if count is None and otherwise is None:
        shown = _perhaps_members(ds)
        raise OptionError(
            f"A filter needs an ensemble to begin with, and initial has no dimension 'member'. {shown}Give one, such as states of other times: "
            "initial = xarray.concat([ds.isel(time=t, drop=True) for t in ...], 'member').assign_coords(time=...)"
        )
    template = ds if member is None else ds.isel({member: 0}, drop=True)
    state = states.enter(template, "initial")
    channels = metadata.data_variables(state.ds, state.layout)
    chosen = [n for n in state.variables(channels) if ds[n].dtype.kind == "f" and (member is None or member in ds[n].dims)]
    if not chosen:
        raise StateError(
            f"initial has no variable of real numbers on {' and '.join(map(repr, state.layout.dims))}"
            + (f" with {member!r}." if member else ".")
        )
    # half and long precision and foreign byte orders, which neither filters nor stores know, as the nearest that they do
    ds = ds.assign({n: ds[n].astype(np.float32 if ds[n].dtype.itemsize <= 4 else np.float64, copy=False) for n in chosen})
    template = template.assign({n: template[n].astype(ds[n].dtype, copy=False) for n in chosen})
    metadata.check_dims(state.ds, [c for c in channels if c in _channels_of(state, chosen)], state.layout, "initial")
    dims = {n: tuple(str(d) for d in ds[n].dims if d != member) for n in chosen}
    dims = {n: _levels_first(d, state, n) for n, d in dims.items()}
    template = template.assign({n: template[n].transpose(*dims[n]) for n in chosen})
    size = count or members or otherwise or 1
    values = {
        n: ds[n].transpose(member, *dims[n]).values.copy()
        if member
        else np.repeat(template[n].values[None], size, axis=0)
        for n in chosen
    }  # fmt: skip
    masks = {n: np.isfinite(v).all(0) for n, v in values.items() if not np.isfinite(v).all()}
    numbers = ds[member].values if member is not None and member in ds.coords else np.arange(size)
    frame = Frame(template, state, tuple(chosen), dims, masks, time, member or "member", numbers)
    for name, mask in masks.items():
        if np.isinf(values[name]).any() or not np.isnan(values[name][:, ~mask]).all():
            raise StateError(
                f"initial[{name!r}] holds NaN or infinity in some members where others have values. Fill or drop them."
            )
        if not mask.any():
            raise StateError(f"initial[{name!r}] is NaN everywhere. Drop it: initial.drop_vars({name!r})")
    return frame, values


def _perhaps_members(ds: xr.Dataset) -> str:
    """Return the line to type where a Dataset has one dimension more than a state, of no unit: an ensemble of another name."""
    layout = states.enter(ds, "initial").layout
    others = [str(d) for d in ds.dims if d not in layout.dims and (d not in ds.coords or not ds[d].attrs)]
    return f"If {others[0]!r} is it, call it so: initial.rename({{{others[0]!r}: 'member'}}). " if len(others) == 1 else ""


def _channels_of(state: State, names: list[str]) -> set[str]:
    """Return the channels of some variables."""
    return {c for n in names for c in (state.verticals[n].channels(n) if n in state.verticals else [n])}


def _levels_first(dims: tuple[str, ...], state: State, name: str) -> tuple[str, ...]:
    """Return the dimensions of a variable with those of the grid last."""
    horizontal = [d for d in state.layout.dims if d in dims]
    return (*(d for d in dims if d not in horizontal), *horizontal)

"""What a Dataset holds, as the engine wants it: fields on two horizontal dimensions, one per variable and level.

Verbs take their input through `enter` and give their result back through `State.leave`. A variable on levels becomes one channel per level,
named after variable and level: ``t@85000Pa``, ``thetao@-10m`` for ten metres of depth, ``u@100m`` above the ground, ``u@3000masl`` above the
sea. So models know levels as they know variables, and only observations have to know that some channels lie above each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata
from xgenda.curvilinear import AnyGrid
from xgenda.errors import CoordinateError, GridError, OptionError, UnitsError
from xgenda.grids import Orientation
from xgenda.horizontal import grid_in, with_positions
from xgenda.metadata import Layout

SINGLE = "_single"  # second horizontal dimension of a set of points
CHANNEL = re.compile(r"(?P<variable>.+)@(?P<level>-?[0-9.e+-]+)(?P<unit>Pa|masl|m)")
#: CF standard names of vertical coordinates.
STANDARD = {
    "air_pressure": "pressure",
    "depth": "depth",
    "depth_below_geoid": "depth",
    "height": "height",
    "altitude": "altitude",
    "height_above_mean_sea_level": "altitude",
    "geopotential_height": "altitude",
}
UNITS = {"pressure": "Pa", "depth": "m", "height": "m", "altitude": "masl"}  # in the names of channels
#: Names that promise a vertical coordinate and do not say its units.
USUAL = ("level", "lev", "plev", "pressure", "pressure_level", "isobaricInhPa", "depth", "deptht", "height", "altitude", "z")


@dataclass(frozen=True)
class Vertical:
    """The vertical coordinate along one dimension.

    Attributes
    ----------
    dim
        Name of the dimension.
    kind
        'pressure' (Pa), 'depth' (m, positive downward), 'height' (m above the ground) or 'altitude' (m above the sea).
    values
        In these units, in the order of the Dataset.
    """

    dim: str
    kind: str
    values: tuple[float, ...]

    def channels(self, variable: str) -> list[str]:
        """Return the names of the channels of a variable, in the order of the Dataset."""
        return [channel_name(variable, self.kind, v) for v in self.values]


@dataclass(frozen=True, eq=False)
class State:
    """Fields on two horizontal dimensions, and the way back.

    Attributes
    ----------
    ds
        One variable per channel.
    layout, grid, orientation
        Of its fields.
    origin
        As the user gave it.
    verticals
        Of the variables that have levels.
    """

    ds: xr.Dataset
    layout: Layout
    grid: AnyGrid
    orientation: Orientation
    origin: xr.Dataset
    verticals: dict[str, Vertical]

    def variables(self, channels: Iterable[str]) -> list[str]:
        """Return the user's variables that these channels belong to."""
        of = {c: v for v, vertical in self.verticals.items() for c in vertical.channels(v)}
        return list(dict.fromkeys(of.get(c, c) for c in channels))

    def leave(self, result: xr.Dataset) -> xr.Dataset:
        """Return a Dataset of channels as the user's variables: levels joined, in the order of the input; sets of points as they were."""
        out = result
        for variable, vertical in self.verticals.items():
            names = vertical.channels(variable)
            there = [i for i, n in enumerate(names) if n in result.data_vars]
            if not there:
                continue
            coordinate = self.origin[vertical.dim].isel({vertical.dim: there})
            joined = xr.concat([result[names[i]] for i in there], vertical.dim, coords="minimal", compat="override")
            lead = [d for d in joined.dims if d not in self.origin[variable].dims]
            order = [*lead, *(d for d in self.origin[variable].dims if d in joined.dims)]
            out = out.drop_vars([names[i] for i in there])
            if vertical.dim in out.dims and out.sizes[vertical.dim] == len(names) > len(there):  # what else has levels
                out = out.isel({vertical.dim: there})
            out = out.assign_coords({vertical.dim: coordinate})
            out[variable] = joined.drop_vars(vertical.dim, errors="ignore").transpose(*order)
        out = out.drop_vars([n for n in out.coords if n not in self.origin.coords and n not in result.dims and n != "member"])
        if SINGLE in out.dims:
            out = out.squeeze(SINGLE, drop=True)
        first = [v for v in self.origin.data_vars if v in out.data_vars]
        order = [*first, *(v for v in out.data_vars if v not in first)]
        return xr.Dataset({v: out[v] for v in order}, coords=out.coords, attrs=out.attrs)


def on_grid_of(state: State, ds: xr.Dataset, argument: str, other: str) -> xr.Dataset:
    """Return the channels of another Dataset on the same grid, in the order and on the coordinates of `state`.

    Parameters
    ----------
    state, other
        What it must fit, and its name in messages.

    Raises
    ------
    GridError
        If it is on another grid.
    """
    found = enter(ds, argument)
    if not found.grid.same_as(state.grid):
        raise GridError(
            f"{argument} is on the grid {found.grid.describe()} and {other} on {state.grid.describe()}. Interpolate: "
            f"{argument}.genda.regrid({other})"
        )
    index = {}
    orders = ((state.orientation.rows, found.orientation.rows), (state.orientation.columns, found.orientation.columns))
    for (mine, theirs), dim in zip(orders, found.layout.dims, strict=True):
        place = np.empty(len(mine), dtype=np.int64)
        place[mine] = theirs
        index[dim] = place
    out = found.ds.isel(index)
    out = out.drop_vars([n for n in {found.layout.latitude, found.layout.longitude, *found.layout.dims} if n in out.coords])
    renamed = {a: b for a, b in zip(found.layout.dims, state.layout.dims, strict=True) if a != b}
    if found.layout.time in out.dims and state.layout.time in state.ds.dims and found.layout.time != state.layout.time:
        renamed[str(found.layout.time)] = str(state.layout.time)
    out = out.rename(renamed)
    places = {state.layout.latitude, state.layout.longitude, *state.layout.dims} & set(map(str, state.ds.coords))
    return out.assign_coords({n: state.ds[n].variable for n in places})


def enter(ds: xr.Dataset, argument: str = "ds") -> State:
    """Return what a Dataset holds as fields of channels.

    Raises
    ------
    CoordinateError, GridError
        If there are no positions, or a vertical coordinate does not say what it is.
    """
    origin = ds
    if None in metadata.find_positions(ds) and any("grid_mapping_name" in v.attrs for v in ds.variables.values()):
        ds = with_positions(ds, argument)
    # of all that is lazy, positions must be known
    ds = ds.assign_coords({n: ds[n].compute() for n in metadata.find_positions(ds) if n is not None and ds[n].chunks is not None})
    ds = _in_two_dimensions(ds)
    layout = metadata.find_layout(ds, argument, rectilinear=False)
    verticals: dict[str, Vertical] = {}
    found: dict[str, Vertical | None] = {}
    known = {*layout.dims, layout.time, layout.member}
    for name in metadata.data_variables(ds, layout):
        for dim in (str(d) for d in ds[name].dims if d not in known):
            if dim not in found:
                found[dim] = find_vertical(ds, dim, argument)
            vertical = found[dim]
            if vertical is not None and name not in verticals:
                verticals[name] = vertical
    for name, vertical in verticals.items():
        order = np.argsort(vertical.values)
        parts = {vertical.channels(name)[i]: ds[name].isel({vertical.dim: int(i)}, drop=True) for i in order}
        ds = ds.drop_vars(name).assign(parts)
    if verticals:
        ds = ds.drop_vars([v.dim for v in verticals.values() if v.dim in ds.coords and v.dim not in _dims_used(ds)])
    grid, orientation = grid_in(ds, layout, argument)
    return State(ds, layout, grid, orientation, origin, verticals)


def _dims_used(ds: xr.Dataset) -> set[str]:
    return {str(d) for v in ds.data_vars.values() for d in v.dims}


def _in_two_dimensions(ds: xr.Dataset) -> xr.Dataset:
    """Give a set of points a second dimension of size one."""
    names = metadata.find_positions(ds)
    if None in names:
        return ds
    across, along = ds[names[0]].dims, ds[names[1]].dims
    if len(across) != 1 or across != along:
        return ds
    (dim,) = across
    wide = [str(n) for n, v in ds.data_vars.items() if dim in v.dims]
    coords = {str(n): ds[n].expand_dims({SINGLE: 1}, -1).variable for n in names}
    return ds.assign({n: ds[n].expand_dims({SINGLE: 1}, -1) for n in wide}).assign_coords(coords)


def find_vertical(ds: xr.Dataset, dim: str, argument: str = "ds") -> Vertical | None:
    """Return the vertical coordinate along a dimension, or None where it has none.

    Raises
    ------
    CoordinateError
        If it does not say its units or its direction, or repeats a level.
    """
    if dim not in ds.coords or ds[dim].ndim != 1 or ds[dim].dtype.kind not in "fiu":
        return None
    coordinate = ds[dim]
    units, standard = coordinate.attrs.get("units"), str(coordinate.attrs.get("standard_name", ""))
    if units is None and dim == "isobaricInhPa":
        units = "hPa"
    kind = STANDARD.get(standard)
    if units is None:
        if kind is None and dim not in USUAL:
            return None
        raise CoordinateError(
            f"{argument}: the vertical coordinate {dim!r} has no units; set them: {argument}[{dim!r}].attrs['units'] = "
            f"{'m' if dim.lower() in ('depth', 'deptht', 'height', 'altitude', 'z') else 'hPa'!r}"
        )
    if kind is None:
        kind = _kind_of(str(units), str(coordinate.attrs.get("positive", "")), dim, argument)
    if kind is None:
        return None
    scale, offset = metadata.unit_factors(str(units), "Pa" if kind == "pressure" else "m")
    values = coordinate.values.astype(float) * scale + offset
    if kind == "depth" and (values < 0).any():  # heights below the surface under the name of depths
        values = -values
    rounded = [float(f"{v:.7g}") for v in values]
    if not np.isfinite(values).all() or len(set(rounded)) < len(rounded):
        raise CoordinateError(
            f"{argument}: the levels {dim!r} repeat a value or hold NaN; keep the first of each: {argument}.drop_duplicates({dim!r})"
        )
    return Vertical(dim, kind, tuple(rounded))


def single_level(ds: xr.Dataset) -> Vertical | None:
    """Return the pressure, depth or altitude of a scalar coordinate, of a Dataset that was selected on one level, or None.

    Heights above the ground, such as the 2 m of a screen temperature, say nothing that observations of it would.
    """
    for name in map(str, ds.coords):
        if ds[name].ndim == 0 and ds[name].dtype.kind in "fiu" and ("units" in ds[name].attrs or name in USUAL):
            try:
                found = find_vertical(ds[[]].assign_coords({name: ds[name]}).expand_dims(name), name)
            except CoordinateError:
                continue
            if found is not None and found.kind != "height":
                return found
    return None


def _kind_of(units: str, positive: str, dim: str, argument: str) -> str | None:
    """Return what a vertical coordinate without a standard name is, by its units."""
    for wanted, kind in (("Pa", "pressure"), ("m", "height")):
        try:
            metadata.unit_factors(units, wanted)
        except UnitsError:
            continue
        if kind == "pressure":
            return kind
        if positive == "down" or "depth" in dim.lower():
            return "depth"
        if positive == "up" or dim.lower() in ("height", "altitude"):
            return "altitude" if dim.lower() == "altitude" else "height"
        raise CoordinateError(
            f"{argument}: the vertical coordinate {dim!r} in {units} does not say whether it counts up or down; set it: "
            f"{argument}[{dim!r}].attrs['positive'] = 'down'"
        )
    return None


def channel_name(variable: str, kind: str, level: float) -> str:
    """Return the name of the channel of a variable on one level."""
    return f"{variable}@{'-' if kind == 'depth' else ''}{level:.7g}{UNITS[kind]}"


def parse_channel(name: str) -> tuple[str, float | None, str | None]:
    """Return variable, level and kind of level of a channel; None for a variable without levels."""
    match = CHANNEL.fullmatch(name)
    if match is None:
        return name, None, None
    level = float(match["level"])
    kind = next(
        k for k, u in UNITS.items() if u == match["unit"] and (u != "m" or (k == "depth") == match["level"].startswith("-"))
    )
    return match["variable"], abs(level) if kind == "depth" else level, kind


def match_channel(ds: xr.Dataset, name: str, standard_name: str | None, argument: str = "ds") -> str:
    """Return the channel of `ds` called `name`, else the only one with that `standard_name` on the same level."""
    variable, level, kind = parse_channel(name)
    if level is None:
        plain = [n for n in ds.data_vars if parse_channel(str(n))[1] is None]
        return metadata.match_variable(ds[plain], name, standard_name, argument)
    suffix = name[name.rindex("@") :]
    same = [n for n in ds.data_vars if str(n).endswith(suffix)]
    if not same:
        found = [v for n in ds.data_vars for _, v, k in [parse_channel(str(n))] if k == kind and v is not None]
        unit = "Pa" if kind == "pressure" else "m"
        raise OptionError(
            f"{argument} lacks {variable!r} at a {kind} of {level:g} {unit}, which the model needs; it has "
            f"{', '.join(f'{v:g}' for v in sorted(set(found))) or 'no levels'}. Interpolate to the levels of the model, or use another one."
        )
    return metadata.match_variable(ds[same], name, standard_name, argument)


def columns(names: Sequence[str]) -> list[tuple[str, list[int], tuple[float, ...], str | None]]:
    """Group channels that follow each other and are one variable on several levels.

    Returns
    -------
    list
        Variable, indices of its channels, their levels (empty without) and the kind of level.
    """
    out: list[tuple[str, list[int], tuple[float, ...], str | None]] = []
    for i, name in enumerate(names):
        variable, level, kind = parse_channel(name)
        if level is not None and out and out[-1][0] == variable and out[-1][3] == kind:
            before = out.pop()
            out.append((variable, [*before[1], i], (*before[2], level), kind))
        else:
            out.append((variable, [i], () if level is None else (level,), kind))
    return out


def sample_dimension(state: State, names: Iterable[str], argument: str = "ds") -> str:
    """Return the one dimension of more than one entry, beside the horizontal ones, that channels have.

    Raises
    ------
    OptionError
        If there is none, or several.
    """
    dims = dict.fromkeys(str(d) for n in names for d in state.ds[n].dims if d not in state.layout.dims)
    long = [d for d in dims if state.ds.sizes[d] > 1]
    if len(long) != 1:
        raise OptionError(
            f"A sample needs one dimension (member or time) beside the horizontal ones; {argument} has {long or 'none'}. "
            + (f"Select: {argument}.isel({long[1]}=0), or join them: {argument}.stack(sample={long})" if len(long) > 1 else
               "For a single background give gaussian_prior(ds, length_scale=300e3, std=2.0).")
        )  # fmt: skip
    return long[0]


def described(ds: xr.Dataset, name: str) -> dict[str, Any]:
    """Return the CF attributes of a channel that a model keeps."""
    return {k: None if (v := ds[name].attrs.get(k)) is None else str(v) for k in ("standard_name", "units", "long_name")}

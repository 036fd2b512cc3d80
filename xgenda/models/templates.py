"""Empty Datasets on the grid of a model, and the coordinates of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata, states
from xgenda.curvilinear import AnyGrid, PointSet
from xgenda.errors import GridError
from xgenda.grids import Grid, Orientation, rectilinear
from xgenda.models.spec import ModelSpec
from xgenda.models.variables import VariableSpec

ATTRS = {
    "latitude": {"standard_name": "latitude", "units": "degrees_north"},
    "longitude": {"standard_name": "longitude", "units": "degrees_east"},
}


def coordinates_of(grid: AnyGrid, names: Mapping[str, Any] | None = None) -> tuple[tuple[str, str], dict[str, Any]]:
    """Return the horizontal dimensions and the coordinates of a grid in model order.

    Parameters
    ----------
    names
        Of the data that a model was trained on, see `remembered_axes`.

    Raises
    ------
    GridError
        For a set of points, which has no rows and columns.
    """
    if isinstance(grid, PointSet):
        raise GridError(f"There are no rows and columns in {grid.describe()}.")
    names = names or {}
    others: dict[str, Any] = {}
    latitude, longitude = str(names.get("latitude", "latitude")), str(names.get("longitude", "longitude"))
    if isinstance(grid, Grid):
        # the axes of a rectilinear grid are the coordinates themselves
        first, second = (str(d) for d in names.get("dims", (latitude, longitude)))
        found: list[tuple[tuple[str, ...], np.ndarray]] = [((first,), grid.latitude), ((second,), grid.longitude)]
    else:
        first, second = (str(d) for d in names.get("dims", ("y", "x")))
        found = [((first, second), grid.latitude), ((first, second), grid.longitude)]
        others = {str(n): ((str(c["dim"]),), np.asarray(c["values"]), dict(c["attrs"])) for n, c in names.get("axes", {}).items()}
        if (mapping := names.get("mapping")) is not None:
            others[str(mapping["name"])] = ((), np.int32(0), dict(mapping["attrs"]))
    coords = {
        n: (dims, values, ATTRS[kind])
        for n, kind, (dims, values) in zip((latitude, longitude), ("latitude", "longitude"), found, strict=True)
    }
    return (first, second), coords | others


def remembered_axes(state: states.State) -> dict[str, Any]:
    """Return what a model keeps of the coordinates of its fine fields, as JSON-serialisable values.

    Of latitude and longitude along an axis each the values as they are given, in model order: computed ones would differ in the last digit, and
    fields would not align. Of other grids the coordinates along their dimensions, such as rotated ones, and the grid mapping.
    """
    layout, ds = state.layout, state.ds
    out: dict[str, Any] = {"dims": list(layout.dims), "latitude": layout.latitude, "longitude": layout.longitude}
    if isinstance(state.grid, Grid):
        pairs = ((layout.latitude, state.orientation.rows), (layout.longitude, state.orientation.columns))
        out["values"] = [{"values": ds[n].values[order].tolist(), "dtype": str(ds[n].dtype)} for n, order in pairs]
        return out
    plain = ("standard_name", "long_name", "units", "axis")
    out["axes"] = {
        str(n): {
            "dim": str(c.dims[0]),
            "values": c.values.tolist(),
            "attrs": {k: str(v) for k, v in c.attrs.items() if k in plain},
        }
        for n, c in ds.coords.items()
        if c.ndim == 1 and c.dims[0] in layout.dims and c.dtype.kind in "fiu"
    }
    for n, v in ds.variables.items():
        if "grid_mapping_name" in v.attrs:
            kept = {
                k: a
                for k, a in ((k, np.asarray(a).tolist()) for k, a in v.attrs.items())
                if isinstance(a, (str, int, float, list))
            }
            out["mapping"] = {"name": str(n), "attrs": kept}
    return out


def _as_given(names: Mapping[str, Any], axis: int, order: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return coordinate values as they were in the training, where they are the same but for rounding and whole turns."""
    if "values" not in names:
        return values
    kept = names["values"][axis]
    given = np.asarray(kept["values"], dtype=kept["dtype"])[order]
    turns = np.round((values - given) / 360.0)
    return np.asarray(given + 360.0 * turns if turns.any() else given)


def empty(
    grid: AnyGrid, variables: Sequence[VariableSpec], time: xr.DataArray | None = None, names: Mapping[str, Any] | None = None
) -> xr.Dataset:
    """Return zeros on a grid, for each variable with its attributes, at some times."""
    dims, coords = coordinates_of(grid, names)
    lead: tuple[str, ...] = ()
    sizes: tuple[int, ...] = grid.plane
    if time is not None:
        name = "time" if time.name is None else str(time.name)
        lead, sizes = (name,), (time.size, *grid.plane)
        coords[name] = time.variable if time.ndim else time.expand_dims(name).variable
    found = {v.name: ((*lead, *dims), np.zeros(sizes, dtype=np.float32), v.attrs) for v in variables}
    return xr.Dataset(found, coords=coords)


def axes_of_result(
    spec: ModelSpec, state: states.State, target: Any, dims: tuple[str, str]
) -> tuple[Orientation, tuple[str, str], dict[str, Any]]:
    """Return the order of the fine result, its dimensions and its horizontal coordinates."""
    grid = spec.grid
    assert grid is not None
    if target is not None:
        wanted = states.enter(metadata.as_dataset(target, "target"), "target")
        if not wanted.grid.same_as(grid):
            raise GridError(
                f"target is not on the grid of model={spec.name!r}, {grid.describe()}; leave out target to get that grid."
            )
        coords = {str(n): c.variable for n, c in wanted.ds.coords.items() if c.dims and set(c.dims) <= set(wanted.layout.dims)}
        return wanted.orientation, wanted.layout.dims, coords
    if isinstance(grid, Grid) and isinstance(state.grid, Grid):
        east = np.asarray(state.ds[state.layout.longitude].values, dtype=float)
        found = _like_blocks if spec.factor is not None else _like_coarse
        order, latitude, longitude = found(spec, state, east)
        own_names = spec.options.get("target", {})
        latitude = _as_given(own_names, 0, np.argsort(order.rows), latitude)
        longitude = _as_given(own_names, 1, np.argsort(order.columns), longitude)
        names = (state.layout.latitude, state.layout.longitude)
        return order, dims, {n: ((d,), v) for n, d, v in zip(names, dims, (latitude, longitude), strict=True)}
    ny, nx = grid.plane
    own, coords = coordinates_of(grid, spec.options.get("target"))
    return Orientation(np.arange(ny), np.arange(nx)), own, coords


def _like_blocks(spec: ModelSpec, state: states.State, east: np.ndarray) -> tuple[Orientation, np.ndarray, np.ndarray]:
    """Return how the fine result is stored and its coordinates: every block of fine cells where its coarse cell was."""
    grid, coarse, factor = rectilinear(spec.grid, spec.name), state.orientation, int(spec.factor or 1)
    rows, columns = _refined(coarse.rows, factor), _refined(coarse.columns, factor)
    turns = np.round((east[coarse.columns] - grid.coarsened(factor).longitude) / 360.0)
    longitude = grid.longitude + 360.0 * np.repeat(turns, factor)
    return Orientation(np.argsort(rows), np.argsort(columns)), grid.latitude[rows], longitude[columns]


def _refined(order: np.ndarray, factor: int) -> np.ndarray:
    """Return fine model positions in the user's order, given the user's positions of the coarse cells in model order."""
    place = np.argsort(order)
    backwards = len(place) > 1 and np.median(np.diff(place)) < 0
    within = np.arange(factor)[::-1] if backwards else np.arange(factor)
    return np.asarray((place[:, None] * factor + within).ravel())


def _like_coarse(spec: ModelSpec, state: states.State, east: np.ndarray) -> tuple[Orientation, np.ndarray, np.ndarray]:
    """Return how the fine result is stored: in the direction and the longitude convention of the coarse fields."""
    grid = rectilinear(spec.grid, spec.name)
    rows, columns = np.arange(grid.shape[0]), np.arange(grid.shape[1])
    if len(state.orientation.rows) > 1 and state.orientation.rows[0] > state.orientation.rows[1]:
        rows = rows[::-1]
    if grid.periodic:
        start = east.min() - 180.0 / max(len(east), 1)
        longitude = (grid.longitude - start) % 360.0 + start
        columns = np.argsort(longitude, kind="stable")
    else:  # as a whole: a region is not cut where the longitudes of the coarse fields are
        centre = (east.min() + east.max()) / 2
        longitude = grid.longitude + 360.0 * np.round((centre - grid.longitude.mean()) / 360.0)
    if len(east) > 1 and np.median(np.diff(east)) < 0:
        columns = columns[::-1]
    return Orientation(np.argsort(rows), np.argsort(columns)), grid.latitude[rows], longitude[columns]

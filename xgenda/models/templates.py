"""Empty Datasets on the grid of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from xgenda.curvilinear import AnyGrid, PointSet
from xgenda.errors import GridError
from xgenda.grids import Grid
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
        'dims', 'latitude' and 'longitude' of the data that a model was trained on.

    Raises
    ------
    GridError
        For a set of points, which has no rows and columns.
    """
    if isinstance(grid, PointSet):
        raise GridError(f"There are no rows and columns in {grid.describe()}.")
    names = names or {}
    latitude, longitude = str(names.get("latitude", "latitude")), str(names.get("longitude", "longitude"))
    if isinstance(grid, Grid):
        # the axes of a rectilinear grid are the coordinates themselves
        first, second = (str(d) for d in names.get("dims", (latitude, longitude)))
        found: list[tuple[tuple[str, ...], np.ndarray]] = [((first,), grid.latitude), ((second,), grid.longitude)]
    else:
        first, second = (str(d) for d in names.get("dims", ("y", "x")))
        found = [((first, second), grid.latitude), ((first, second), grid.longitude)]
    coords = {
        n: (dims, values, ATTRS[kind])
        for n, kind, (dims, values) in zip((latitude, longitude), ("latitude", "longitude"), found, strict=True)
    }
    return (first, second), coords


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
    found = {
        v.name: ((*lead, *dims), np.zeros(sizes, dtype=np.float32),
                 {k: a for k, a in (("standard_name", v.standard_name), ("long_name", v.long_name), ("units", v.units)) if a})
        for v in variables
    }  # fmt: skip
    return xr.Dataset(found, coords=coords)

"""What maps and videos share: colours, proportions, one field on its grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata
from xgenda.errors import OptionError, missing_dependency
from xgenda.grids import Grid
from xgenda.spherical import wrapped
from xgenda.states import State

VALUES, DIFFERENCES, SPREADS = "viridis", "RdBu_r", "YlOrBr"
WIDTH = 4.4  # inches of one panel


def pyplot_module() -> Any:
    """Return matplotlib.pyplot, or say how to get it."""
    try:
        from matplotlib import pyplot
    except ImportError as problem:
        raise missing_dependency("matplotlib", "plot", "Drawing maps") from problem
    return pyplot


def proportions(longitude: np.ndarray, latitude: np.ndarray) -> tuple[float, float]:
    """Return the aspect of a map, a degree of latitude over one of longitude, and its height in inches."""
    stretch = float(1.0 / np.cos(np.radians(np.clip(latitude.mean(), -70.0, 70.0))))
    return stretch, WIDTH * min(1.2, max(0.45, stretch * np.ptp(latitude) / max(np.ptp(longitude), 1e-9))) + 0.3


def draw_map(
    ax: Any, state: State, longitude: np.ndarray, latitude: np.ndarray, field: np.ndarray, colours: dict[str, Any]
) -> Any:
    """Draw a field."""
    if isinstance(state.grid, Grid):
        return ax.pcolormesh(longitude, latitude, field, shading="nearest", rasterized=True, **colours)
    dot = min(60.0, max(1.0, 6e4 / field.size))  # a dot for each cell: whatever the grid does at its seams and poles
    return ax.scatter(longitude, latitude, c=field.ravel(), s=dot, linewidths=0, rasterized=True, **colours)


def hatch(ax: Any, state: State, longitude: np.ndarray, latitude: np.ndarray, where: np.ndarray) -> None:
    """Hatch some cells; of a grid without axes they get a cross each."""
    if isinstance(state.grid, Grid) and min(where.shape) > 1:
        ax.contourf(longitude, latitude, where.astype(float), levels=[0.5, 1.5], colors="none", hatches=["////"])
        return
    across, along = np.broadcast_arrays(longitude, latitude[:, None]) if isinstance(state.grid, Grid) else (longitude, latitude)
    flat = where.ravel()
    ax.scatter(
        across.ravel()[flat], along.ravel()[flat], marker="x", s=min(20.0, max(1.0, 2e4 / flat.size)), c="black", linewidths=0.4
    )


def fields_at(ds: xr.Dataset, name: str, layout: metadata.Layout, time: int) -> np.ndarray:
    """Return one time, shape (members, latitude, longitude), as stored along latitude and longitude."""
    array = ds[name]
    if layout.time is not None and layout.time in array.dims:
        array = array.isel({layout.time: time})
    member = layout.member or "member"
    if member not in array.dims:
        array = array.expand_dims(str(member))
    for dim in layout.dims:
        if dim not in array.dims:
            raise OptionError(f"reference[{name!r}] has dimensions {array.dims} and lacks {dim!r}.")
    return np.asarray(array.transpose(member, *layout.dims).values, dtype=float)


def axes_of(state: State) -> tuple[np.ndarray, np.ndarray]:
    """Return longitude and latitude: axes of a rectilinear grid as the user has them, else of every cell."""
    if isinstance(state.grid, Grid):
        longitude = np.asarray(state.ds[state.layout.longitude].values, dtype=float)
        # across the date line, or Greenwich: one axis without a jump
        longitude = longitude[0] + np.concatenate([[0.0], np.cumsum(wrapped(np.diff(longitude)))])
        if longitude.min() >= 180.0:
            longitude = longitude - 360.0
        return longitude, np.asarray(state.ds[state.layout.latitude].values, dtype=float)
    latitude, longitude = state.grid.points()
    middle = np.degrees(np.angle(np.exp(1j * np.radians(longitude)).mean()))  # a region across the date line stays in one piece
    around = wrapped(longitude - middle)
    return (wrapped(longitude) if np.ptp(around) > 270.0 else middle + around), latitude


def stamp(instant: Any) -> str:
    """Return what a title says of a time; nothing where there is none."""
    if instant is None:
        return ""
    if isinstance(instant, np.datetime64):
        return f", {np.datetime_as_string(instant, unit='m').replace('T', ' ')} UTC"
    return f", {instant.strftime('%Y-%m-%d %H:%M' if instant.hour or instant.minute else '%Y-%m-%d')}"

"""Find the horizontal grid of a Dataset, of whatever kind: axes, two-dimensional positions, points, projection coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata
from xgenda.curvilinear import CORNERS, AnyGrid, CurvilinearGrid, PointSet
from xgenda.errors import CoordinateError, GridError, missing_dependency
from xgenda.grids import Grid, Orientation, grid_of
from xgenda.spherical import positions, unit_vectors, wrapped


@dataclass(frozen=True, eq=False)
class Horizontal:
    """The horizontal part of a Dataset.

    Attributes
    ----------
    grid
        In model order where it is rectilinear.
    dims
        Its dimensions, in the order in which the cells of `places` are counted.
    latitude, longitude
        Names of the coordinates.
    places
        Flat index into `grid` of each cell as the user has them, shape (size,).
    coordinates
        Latitude and longitude with their dimensions and attributes, as they go into a result.
    """

    grid: AnyGrid
    dims: tuple[str, ...]
    latitude: str
    longitude: str
    places: np.ndarray
    coordinates: Mapping[str, xr.DataArray]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of `dims`."""
        return tuple(self.coordinates[self.latitude].sizes.get(d) or self.coordinates[self.longitude].sizes[d] for d in self.dims)

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Return latitude and longitude of all cells as the user counts them, each flat."""
        latitude, longitude = self.grid.points()
        return latitude[self.places], longitude[self.places]


def read_grid(ds: xr.Dataset, argument: str = "ds") -> Horizontal:
    """Return the horizontal grid of a Dataset, of whatever kind.

    Latitude and longitude may be axes, two-dimensional, or both along one dimension. Where there are none, they are computed
    from projection coordinates and a CF grid mapping: rotated poles here, other projections by pyproj.

    Raises
    ------
    CoordinateError
        If there are no positions, or they hold NaN.
    GridError
        If a rectilinear axis is not monotonic.
    MissingDependencyError
        If a projection needs pyproj and it is not installed.
    """
    names = metadata.find_positions(ds)
    if None in names:
        ds = with_positions(ds, argument)
        names = ["latitude", "longitude"]
    latitude, longitude = (str(n) for n in names)
    lat, lon = ds[latitude], ds[longitude]
    if lat.ndim == 0 and lon.ndim == 0:
        lat, lon = (xr.DataArray(c.values[None], dims="points", attrs=c.attrs, name=c.name) for c in (lat, lon))
    coordinates = {latitude: lat, longitude: lon}
    for name, coordinate in coordinates.items():
        values = coordinate.values
        if values.dtype.kind not in "fiu" or not np.isfinite(values.astype(float)).all():
            bad = int((~np.isfinite(values.astype(float))).sum()) if values.dtype.kind in "fiu" else values.size
            raise CoordinateError(
                f"{argument}: coordinate {name!r} holds {bad} of {values.size} values that are not finite numbers; a grid needs a "
                f"position for every cell, also where its data are masked."
            )
        if "latitude" in str(coordinate.attrs.get("standard_name", name)) and np.abs(values).max(initial=0) > 90 + 1e-6:
            raise GridError(
                f"{argument}: {name!r} reaches {values.ravel()[np.abs(values).argmax()]:.6g}; a latitude lies in -90 to 90 degrees."
            )
    if lat.ndim == lon.ndim == 1 and lat.dims != lon.dims:
        return _rectilinear(ds, latitude, longitude, argument)
    if set(lat.dims) != set(lon.dims) or lat.ndim > 2:
        raise CoordinateError(
            f"{argument}: {latitude!r} has dimensions {lat.dims} and {longitude!r} has {lon.dims}; a grid has both along one axis "
            f"each, or both along the same one or two dimensions."
        )
    dims = tuple(str(d) for d in lat.dims)
    phi, lam = lat.values.astype(float), lon.transpose(*dims).values.astype(float)
    grid: AnyGrid = (
        PointSet(phi, lam) if lat.ndim == 1 else CurvilinearGrid(phi, lam, _corners(ds, latitude, longitude, dims, argument))
    )
    return Horizontal(grid, dims, latitude, longitude, np.arange(phi.size), coordinates)


def _rectilinear(ds: xr.Dataset, latitude: str, longitude: str, argument: str) -> Horizontal:
    dims = (str(ds[latitude].dims[0]), str(ds[longitude].dims[0]))
    axes = xr.Dataset(coords={d: (d, ds[n].values, ds[n].attrs) for d, n in zip(dims, (latitude, longitude), strict=True)})
    layout = metadata.Layout(*dims, None, None, dims)
    grid, orientation = grid_of(axes, layout, argument)
    edges = [_edges(ds, n) for n in (latitude, longitude)]
    if edges[0] is not None and edges[1] is not None:
        grid = _with_edges(grid, orientation, edges[0], edges[1])
    ny, nx = grid.shape
    places = orientation.from_model(np.arange(grid.size).reshape(ny, nx)).ravel()
    return Horizontal(grid, dims, latitude, longitude, places, {n: ds[n] for n in (latitude, longitude)})


def _edges(ds: xr.Dataset, name: str) -> np.ndarray | None:
    """Return the edges of the cells along an axis as pairs, shape (n, 2), from CF bounds or `<name>_b`."""
    n = ds[name].size
    for found in _bounds_names(ds, name):
        values = np.asarray(ds[found].values, dtype=float)
        if values.shape == (n, 2) and np.isfinite(values).all():
            return values
        if values.shape == (n + 1,) and np.isfinite(values).all():
            return np.stack([values[:-1], values[1:]], -1)
    return None


def _bounds_names(ds: xr.Dataset, name: str) -> list[str]:
    """Return the variables that may hold the bounds of a coordinate, CF's first."""
    usual = (ds[name].attrs.get("bounds"), ds[name].encoding.get("bounds"), f"{name}_b", f"{name}_bnds", f"{name}_bounds")
    return [str(n) for n in usual if n in ds.variables]


def _with_edges(grid: Grid, orientation: Orientation, latitude: np.ndarray, longitude: np.ndarray) -> Grid:
    """Attach bounds to a grid in model order, where they are contiguous and hold their centres."""
    south, north = np.sort(latitude[orientation.rows], axis=1).T
    pairs = longitude[orientation.columns]
    west, east = pairs[:, 0], pairs[:, 1]
    if len(west) > 1 and (wrapped(east - west) < 0).all():
        west, east = east, west
    turns = np.round((grid.longitude - (west + (east - west) % 360 / 2)) / 360) * 360
    west, east = west + turns, west + turns + (east - west) % 360
    small = 1e-6
    joined = all(
        (np.abs(a[1:] - b[:-1]) < small).all() and (a < c + small).all() and (b > c - small).all()
        for a, b, c in ((south, north, grid.latitude), (west, east, grid.longitude))
    )
    if not joined:
        return grid
    return Grid(grid.latitude, grid.longitude, np.append(south, north[-1]), np.append(west, east[-1]))


def _corners(ds: xr.Dataset, latitude: str, longitude: str, dims: tuple[str, ...], argument: str) -> np.ndarray | None:
    """Return corners (ny, nx, 4, 2) from CF bounds (ny, nx, 4) or nodes (ny + 1, nx + 1)."""
    out = []
    shape = tuple(ds.sizes[d] for d in dims)
    for name in (latitude, longitude):
        found = next(iter(_bounds_names(ds, name)), None)
        if found is None:
            return None
        bounds = ds[found]
        values = np.asarray((bounds.transpose(*dims, ...) if set(dims) <= set(bounds.dims) else bounds).values, dtype=float)
        if values.shape == (shape[0] + 1, shape[1] + 1):
            values = np.stack([values[i : i + shape[0], j : j + shape[1]] for i, j in CORNERS], -1)
        if values.shape != (*shape, 4) or not np.isfinite(values).all():
            raise GridError(
                f"{argument}: the bounds {found!r} of {name!r} have shape {values.shape}"
                f"{' and hold NaN' if not np.isfinite(values).all() else ''}; {(*shape, 4)} or {tuple(s + 1 for s in shape)} is needed. "
                f"Without them they are inferred: {argument}.drop_vars({found!r})"
            )
        out.append(values)
    return np.stack(out, -1)


def grid_in(ds: xr.Dataset, layout: metadata.Layout, argument: str = "ds") -> tuple[AnyGrid, Orientation]:
    """Return the grid of fields on two horizontal dimensions, and how they get into model order.

    Model order is the user's but for rectilinear grids. A set of points has a second dimension of size one.
    """
    latitude, longitude = ds[layout.latitude], ds[layout.longitude]
    if latitude.ndim == 1:
        return grid_of(ds, layout, argument)
    values = [c.transpose(*layout.dims).values.astype(float) for c in (latitude, longitude)]
    if np.abs(values[0]).max(initial=0) > 90.0 + 1e-6:
        raise GridError(
            f"{argument}: {layout.latitude!r} reaches {values[0].flat[np.abs(values[0]).argmax()]:.6g}; a latitude lies in -90 to 90."
        )
    ny, nx = values[0].shape
    orientation = Orientation(np.arange(ny), np.arange(nx))
    if nx == 1:
        return PointSet(values[0].ravel(), values[1].ravel()), orientation
    return CurvilinearGrid(
        values[0], values[1], _corners(ds, layout.latitude, layout.longitude, layout.dims, argument)
    ), orientation


def with_positions(ds: xr.Dataset, argument: str) -> xr.Dataset:
    """Add two-dimensional latitude and longitude to a Dataset with projection coordinates and a grid mapping."""
    axes: dict[str, str] = {}
    for axis, standard in (
        ("y", ("projection_y_coordinate", "grid_latitude")),
        ("x", ("projection_x_coordinate", "grid_longitude")),
    ):
        found = [str(n) for n, c in ds.variables.items() if c.ndim == 1 and c.attrs.get("standard_name") in standard]
        if len(found) == 1:
            axes[axis] = found[0]
    mapping = next((ds[n] for n in ds.variables if "grid_mapping_name" in ds[n].attrs), None)
    if len(axes) < 2 or mapping is None:
        raise CoordinateError(
            f"{argument} has no latitude and longitude (found: {', '.join(map(str, ds.coords)) or 'none'}), and no projection "
            f"coordinates with a CF grid mapping to compute them from. Assign them: "
            f"{argument}.assign_coords(latitude=(dims, values), longitude=(dims, values))"
        )
    y, x = ds[axes["y"]], ds[axes["x"]]
    rows, columns = np.meshgrid(y.values.astype(float), x.values.astype(float), indexing="ij")
    attrs = mapping.attrs
    if attrs["grid_mapping_name"] == "rotated_latitude_longitude":
        latitude, longitude = unrotate(
            rows, columns, float(attrs["grid_north_pole_latitude"]), float(attrs["grid_north_pole_longitude"]),
            float(attrs.get("north_pole_grid_longitude", 0.0)),
        )  # fmt: skip
    else:
        latitude, longitude = _unproject(rows, columns, y.attrs.get("units", "m"), attrs)
    dims = (y.dims[0], x.dims[0])
    return ds.assign_coords(
        latitude=(dims, latitude, {"standard_name": "latitude", "units": "degrees_north"}),
        longitude=(dims, longitude, {"standard_name": "longitude", "units": "degrees_east"}),
    )


def unrotate(
    latitude: np.ndarray, longitude: np.ndarray, pole_latitude: float, pole_longitude: float, grid_longitude: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return geographical latitude and longitude of positions relative to a rotated pole, all in degrees.

    Parameters
    ----------
    latitude, longitude
        Rotated coordinates.
    pole_latitude, pole_longitude
        Where the north pole of the rotated coordinates lies: CF's ``grid_north_pole_latitude`` and ``..._longitude``.
    grid_longitude
        Rotated longitude of the true north pole: CF's ``north_pole_grid_longitude``.
    """
    # the meridian of the rotated coordinates that passes through the true pole is seen from there as pole_longitude
    rotated = unit_vectors(latitude, np.asarray(longitude) - grid_longitude + 180.0)
    tilt = np.radians(90.0 - pole_latitude)
    x, y, z = np.moveaxis(rotated, -1, 0)
    turned = np.stack([x * np.cos(tilt) + z * np.sin(tilt), y, -x * np.sin(tilt) + z * np.cos(tilt)], -1)
    phi, lam = positions(turned)
    return phi, wrapped(lam + pole_longitude)


def _unproject(y: np.ndarray, x: np.ndarray, units: str, attrs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    try:
        import pyproj
    except ImportError as error:
        raise missing_dependency("pyproj", "crs", f"Finding the positions of a {attrs['grid_mapping_name']} grid") from error
    scale = metadata.unit_factors(units, "m")[0]
    crs = pyproj.CRS.from_cf(dict(attrs))
    transformer = pyproj.Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)
    longitude, latitude = transformer.transform(x * scale, y * scale)
    return np.asarray(latitude), np.asarray(longitude)

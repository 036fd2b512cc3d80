"""Grids whose latitude and longitude are not axes: curvilinear, rotated pole, projected; and sets of points.

`read_grid` finds out what a Dataset has. Rectilinear grids are `xgenda.grids.Grid`; all kinds have `shape`, `size`, `points`,
`describe`, and those with cells `vertices` and `areas`.
"""

from __future__ import annotations

import base64
import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import xarray as xr
from scipy.spatial import ConvexHull, QhullError

from xgenda import metadata
from xgenda.errors import CoordinateError, GridError, missing_dependency
from xgenda.grids import EARTH_RADIUS, Grid, Orientation, grid_of
from xgenda.spherical import counterclockwise, normalised, polygon_areas, positions, unit_vectors, wrapped

LONGEST_EDGE = 5.0  # median edges, of a triangle between points

#: Corners of a cell from its lower left one, counterclockwise where rows go north and columns east.
CORNERS = ((0, 0), (0, 1), (1, 1), (1, 0))


@dataclass(frozen=True, eq=False)
class CurvilinearGrid:
    """A grid of quadrilaterals with two-dimensional latitude and longitude.

    Parameters
    ----------
    latitude, longitude
        Cell centres in degrees, shape (ny, nx).
    corners
        Latitude and longitude of the corners of each cell in either sense of rotation, shape (ny, nx, 4, 2); None infers them
        half-way between centres.
    """

    latitude: np.ndarray
    longitude: np.ndarray
    corners: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        rows, columns = self.latitude.shape
        return rows, columns

    @property
    def size(self) -> int:
        """Number of cells."""
        return int(self.latitude.size)

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Return latitude and longitude of all cells, each flat of length `size`, rows first."""
        return self.latitude.ravel(), self.longitude.ravel()

    @functools.cached_property
    def centres(self) -> np.ndarray:
        """Unit vectors of the cell centres, shape (ny, nx, 3)."""
        return unit_vectors(self.latitude, self.longitude)

    @functools.cached_property
    def periodic(self) -> bool:
        """Whether the last column is followed by the first, one spacing away."""
        if self.shape[1] < 3:
            return False
        between = np.linalg.norm(np.diff(self.centres, axis=1), axis=-1)
        seam = np.linalg.norm(self.centres[:, 0] - self.centres[:, -1], axis=-1)
        usual = np.median(between, axis=1)
        return bool(np.median(np.abs(seam / np.where(usual > 0, usual, np.inf) - 1.0)) < 0.5)

    @functools.cached_property
    def vertices(self) -> np.ndarray:
        """Unit vectors of the corners of all cells, counterclockwise, shape (size, 4, 3)."""
        if self.corners is not None:
            return counterclockwise(unit_vectors(self.corners[..., 0], self.corners[..., 1]).reshape(-1, 4, 3))
        if min(self.shape) < 2:
            raise GridError(
                f"The bounds of a grid of {self.shape[0]} x {self.shape[1]} cells cannot be inferred; give them as CF bounds."
            )
        c = self.centres
        c = np.concatenate(
            [c[:, -1:], c, c[:, :1]] if self.periodic else [2 * c[:, :1] - c[:, 1:2], c, 2 * c[:, -1:] - c[:, -2:-1]], 1
        )
        c = np.concatenate([2 * c[:1] - c[1:2], c, 2 * c[-1:] - c[-2:-1]])
        nodes = normalised(c[:-1, :-1] + c[:-1, 1:] + c[1:, :-1] + c[1:, 1:])
        ny, nx = self.shape
        cells = np.stack([nodes[i : i + ny, j : j + nx] for i, j in CORNERS], 2)
        return counterclockwise(cells.reshape(-1, 4, 3))

    def areas(self) -> np.ndarray:
        """Return cell areas in square metres, shape (ny, nx), with great circles as edges."""
        return np.asarray(EARTH_RADIUS**2 * polygon_areas(self.vertices).reshape(self.shape))

    def quads(self) -> np.ndarray:
        """Return the quadrilaterals between neighbouring centres as flat indices, shape (n, 4), around each."""
        ny, nx = self.shape
        columns = nx if self.periodic else nx - 1
        row, column = (a.ravel() for a in np.meshgrid(np.arange(ny - 1), np.arange(columns), indexing="ij"))
        return np.stack([(row + i) * nx + (column + j) % nx for i, j in CORNERS], -1)

    def same_as(self, other: object) -> bool:
        """Whether two grids have the same centres, to a thousandth of the median spacing."""
        if not isinstance(other, CurvilinearGrid) or self.shape != other.shape:
            return False
        steps = np.concatenate([np.linalg.norm(np.diff(self.centres, axis=a), axis=-1).ravel() for a in (0, 1)])
        spacing = float(np.median(steps)) if steps.size else 1e-3
        return bool(np.linalg.norm(self.centres - other.centres, axis=-1).max() <= 2e-3 * spacing)

    @property
    def plane(self) -> tuple[int, int]:
        """Number of rows and columns of fields."""
        return self.shape

    @property
    def longitude_count(self) -> None:
        """None: meridians are no columns."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form."""
        return {
            "kind": "curvilinear", "latitude": _packed(self.latitude), "longitude": _packed(self.longitude),
            "corners": None if self.corners is None else _packed(self.corners),
        }  # fmt: skip

    def describe(self) -> str:
        """Return one line: shape, ranges, periodicity."""
        return f"curvilinear {self.shape[0]} x {self.shape[1]}, {_ranges(self.latitude, self.longitude)}" + (
            ", periodic" if self.periodic else ""
        )


@dataclass(frozen=True, eq=False)
class PointSet:
    """Places without cells, shape (m,) in degrees: stations, buoys, an unstructured grid."""

    latitude: np.ndarray
    longitude: np.ndarray

    @property
    def shape(self) -> tuple[int]:
        """Number of points."""
        return (len(self.latitude),)

    @property
    def size(self) -> int:
        """Number of points."""
        return len(self.latitude)

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Return latitude and longitude."""
        return self.latitude, self.longitude

    @property
    def plane(self) -> tuple[int, int]:
        """Number of rows and columns of fields: one column."""
        return self.size, 1

    @property
    def longitude_count(self) -> None:
        """None: there are no columns."""

    @property
    def periodic(self) -> bool:
        """False: there is no last column."""
        return False

    def same_as(self, other: object) -> bool:
        """Whether two sets have the same points in the same order, to a ten-thousandth of a degree."""
        if not isinstance(other, PointSet) or self.size != other.size:
            return False
        apart = unit_vectors(self.latitude, self.longitude) - unit_vectors(other.latitude, other.longitude)
        return bool(np.abs(apart).max(initial=0) < np.radians(1e-4))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form."""
        return {"kind": "points", "latitude": _packed(self.latitude), "longitude": _packed(self.longitude)}

    @functools.cached_property
    def triangles(self) -> np.ndarray:
        """Delaunay triangles on the sphere as flat indices, shape (n, 3).

        They are the faces of the convex hull of the unit vectors (Renka 1997, ACM Trans. Math. Softw. 23, 416-434). Those with an edge
        longer than `LONGEST_EDGE` times the median edge are left out: they span a gap, or close a region around the back of the Earth.
        Points that coincide with another are in none.

        Raises
        ------
        GridError
            For fewer than three points, or points on one great circle.
        """
        nodes = unit_vectors(self.latitude, self.longitude)
        middle = normalised(nodes.sum(0)) if self.size else np.zeros(3)
        # the back of a region is closed over the antipode, whose faces are no part of it
        regional = bool((nodes @ middle > -0.1).all())
        try:
            found = ConvexHull(np.concatenate([nodes, -middle[None]]) if regional else nodes).simplices
        except (QhullError, ValueError):
            found = np.zeros((0, 3), dtype=np.int64)
        found = found[(found < self.size).all(1)]
        edges = np.linalg.norm(nodes[found] - nodes[np.roll(found, 1, axis=1)], axis=-1)
        thick = np.abs(np.linalg.det(nodes[found])) > 1e-9 * edges.max(1, initial=0.0) ** 2
        if not thick.any():
            raise GridError(
                f"Interpolation between points needs at least three that do not lie on one great circle, and the source is "
                f"{self.describe()}; use method='nearest'."
            )
        found, edges = found[thick], edges[thick]
        return np.asarray(found[edges.max(1) <= LONGEST_EDGE * np.median(edges)])

    def describe(self) -> str:
        """Return one line: number and ranges."""
        return f"{self.size} points, {_ranges(self.latitude, self.longitude)}"


AnyGrid: TypeAlias = Grid | CurvilinearGrid | PointSet


def _ranges(latitude: np.ndarray, longitude: np.ndarray) -> str:
    if not latitude.size:
        return "empty"
    return (
        f"latitude {np.min(latitude):.6g} to {np.max(latitude):.6g}, longitude {np.min(longitude):.6g} to {np.max(longitude):.6g}"
    )


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
    names = [
        metadata.find_coordinate(ds, key, usual)
        for key, usual in (("latitude", metadata.LATITUDE_NAMES), ("longitude", metadata.LONGITUDE_NAMES))
    ]
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


def grid_from_dict(data: Mapping[str, Any]) -> AnyGrid:
    """Read the form written by the method `to_dict` of a grid of any kind."""
    if data.get("kind") == "curvilinear":
        corners = None if data["corners"] is None else _unpacked(data["corners"])
        return CurvilinearGrid(_unpacked(data["latitude"]), _unpacked(data["longitude"]), corners)
    if data.get("kind") == "points":
        return PointSet(_unpacked(data["latitude"]), _unpacked(data["longitude"]))
    return Grid.from_dict(data)


def _packed(values: np.ndarray) -> dict[str, Any]:
    raw = np.ascontiguousarray(values, dtype="<f8").tobytes()
    return {"shape": list(values.shape), "float64": base64.b64encode(zlib.compress(raw, 6)).decode()}


def _unpacked(data: Mapping[str, Any]) -> np.ndarray:
    raw = zlib.decompress(base64.b64decode(data["float64"]))
    return np.frombuffer(raw, dtype="<f8").reshape(data["shape"]).astype(float)


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

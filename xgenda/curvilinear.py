"""Grids whose latitude and longitude are not axes: curvilinear, rotated pole, projected; and sets of points.

`xgenda.horizontal` finds out what a Dataset has. Rectilinear grids are `xgenda.grids.Grid`; all kinds have `shape`, `size`, `points`,
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
from scipy.spatial import ConvexHull, QhullError, cKDTree

from xgenda.errors import GridError
from xgenda.grids import EARTH_RADIUS, Grid
from xgenda.spherical import counterclockwise, normalised, polygon_areas, unit_vectors

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


def spacing_far_above(grid: AnyGrid, length: float) -> float:
    """Return the median distance of neighbouring cells in metres where it is more than ten times a length that someone gave, else 0."""
    # half of n cells cannot be further apart than this from their nearest: their caps would not fit on the sphere
    farthest = 4 * EARTH_RADIUS * np.arcsin(np.sqrt(min(1.0, 2 / grid.size)))
    if grid.size < 2 or length >= farthest / 10:
        return 0.0
    latitude, longitude = grid.points()
    some = np.random.default_rng(0).choice(len(latitude), min(200, len(latitude)), replace=False)
    places = unit_vectors(latitude, longitude)
    found = float(np.median(cKDTree(places).query(places[some], k=2)[0][:, 1])) * EARTH_RADIUS
    return found if length < found / 10 else 0.0

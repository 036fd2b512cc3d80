"""The horizontal grid, handled once: order of latitude, wrap of longitude, areas, periodicity.

Every array inside the library is in *model order*: latitude ascending, longitude ascending eastward and unwrapped, starting
in [-180, 180). An `Orientation` remembers how the user's array is stored and takes arrays to and from model order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xgenda.errors import GridError
from xgenda.metadata import Layout, find_layout, unit_factors_of
from xgenda.spherical import unit_vectors

EARTH_RADIUS = 6_371_229.0
GRAVITY = 9.80665  # m s-2
ROTATION = 7.292115e-5  # s-1: once per sidereal day of 86164 s
TOLERANCE = 1e-3  # of a grid spacing; float32 coordinates are that good


@dataclass(frozen=True)
class Orientation:
    """Index arrays that take the two last axes of an array from the user's order to model order."""

    rows: np.ndarray
    columns: np.ndarray

    def to_model(self, values: np.ndarray) -> np.ndarray:
        """Reorder the two last axes (latitude, longitude) to model order."""
        return np.ascontiguousarray(values[..., self.rows[:, None], self.columns])

    def from_model(self, values: np.ndarray) -> np.ndarray:
        """Reorder the two last axes from model order to the user's order."""
        return np.ascontiguousarray(values[..., np.argsort(self.rows)[:, None], np.argsort(self.columns)])


@dataclass(frozen=True, eq=False)
class Grid:
    """A rectilinear latitude-longitude grid.

    Parameters
    ----------
    latitude
        Cell centres in degrees north, ascending, shape (ny,).
    longitude
        Cell centres in degrees east, ascending and unwrapped, shape (nx,).
    latitude_edges, longitude_edges
        Bounds of the cells, shapes (ny + 1,) and (nx + 1,); None puts them half-way between centres, and not beyond the poles.
    """

    latitude: np.ndarray
    longitude: np.ndarray
    latitude_edges: np.ndarray | None = None
    longitude_edges: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows (latitude) and columns (longitude)."""
        return len(self.latitude), len(self.longitude)

    @property
    def plane(self) -> tuple[int, int]:
        """Number of rows and columns of fields."""
        return self.shape

    @property
    def size(self) -> int:
        """Number of cells."""
        return len(self.latitude) * len(self.longitude)

    @functools.cached_property
    def periodic(self) -> bool:
        """Whether the columns go around the globe with even spacing."""
        if len(self.longitude) < 2:
            return False
        step = np.diff(self.longitude)
        if np.ptp(step) > 0.01 * step.mean():
            return False
        return bool(abs(self.longitude[-1] - self.longitude[0] + step.mean() - 360.0) < 0.01 * step.mean())

    @functools.cached_property
    def longitude_count(self) -> int | None:
        """Number of columns of the same spacing around the whole circle, if that is a whole number, else None."""
        if len(self.longitude) < 2:
            return None
        step = np.diff(self.longitude)
        count = 360.0 / step.mean()
        if np.ptp(step) > 1e-3 * step.mean() or abs(count - round(count)) > 1e-3 * count / len(self.longitude):
            return None
        return round(count) if round(count) >= len(self.longitude) else None

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Return latitude and longitude of all cells, each flat of length `size`, rows first."""
        latitude, longitude = np.meshgrid(self.latitude, self.longitude, indexing="ij")
        return latitude.ravel(), longitude.ravel()

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds of the rows and of the columns in degrees, shapes (ny + 1,) and (nx + 1,)."""
        rows = np.clip(_edges(self.latitude), -90.0, 90.0) if self.latitude_edges is None else self.latitude_edges
        if self.longitude_edges is not None:
            return rows, self.longitude_edges
        columns = _edges(self.longitude)
        if self.periodic:  # exactly once around, whatever rounding the coordinates have
            columns = columns[0] + 360.0 / len(self.longitude) * np.arange(len(self.longitude) + 1)
        return rows, columns

    def areas(self) -> np.ndarray:
        """Return cell areas in square metres, shape (ny, nx), with parallels and meridians as edges."""
        rows, columns = self.edges()
        bands, widths = np.diff(np.sin(np.radians(rows))), np.radians(np.diff(columns))
        return np.asarray(EARTH_RADIUS**2 * bands[:, None] * widths[None, :])

    @functools.cached_property
    def vertices(self) -> np.ndarray:
        """Unit vectors of the corners of all cells, counterclockwise, shape (size, 4, 3)."""
        rows, columns = self.edges()
        south, west = np.meshgrid(rows, columns, indexing="ij")
        nodes = unit_vectors(south, west)
        cells = np.stack([nodes[:-1, :-1], nodes[:-1, 1:], nodes[1:, 1:], nodes[1:, :-1]], 2)
        return cells.reshape(-1, 4, 3)

    def locate(self, longitude: np.ndarray) -> np.ndarray:
        """Return `longitude` shifted by whole turns: eastward of the first column, or for a region around its middle."""
        start = self.longitude[0] if self.periodic else (self.longitude[0] + self.longitude[-1]) / 2 - 180.0
        east = (np.asarray(longitude, dtype=float) - start) % 360.0
        east = np.where(east > 360.0 - 1e-9, 0.0, east)  # rounding of whole turns does not go around once more
        return np.asarray(east + start)

    def same_as(self, other: object) -> bool:
        """Whether two grids have the same cells, to a thousandth of the spacing and but for whole turns."""
        if not isinstance(other, Grid) or self.shape != other.shape:
            return False
        # means over blocks at the date line start beyond it
        turned = other.longitude + 360.0 * np.round((self.longitude[0] - other.longitude[0]) / 360.0)
        for mine, theirs in ((self.latitude, other.latitude), (self.longitude, turned)):
            step = np.diff(mine).mean() if len(mine) > 1 else 1.0
            if np.abs(mine - theirs).max() > 2 * TOLERANCE * step:
                return False
        return True

    def coarsened(self, factor: int) -> Grid:
        """Return the grid of block means over `factor` x `factor` cells.

        Raises
        ------
        GridError
            If the shape is not a multiple of `factor`.
        """
        ny, nx = self.shape
        if ny % factor or nx % factor:
            raise GridError(
                f"A grid of {ny} x {nx} cells is not a multiple of {factor}; crop it: "
                f"ds.isel(latitude=slice(0, {ny // factor * factor}), longitude=slice(0, {nx // factor * factor}))"
            )
        return Grid(self.latitude.reshape(-1, factor).mean(1), self.longitude.reshape(-1, factor).mean(1))

    def describe(self) -> str:
        """Return one line: shape, ranges, periodicity."""
        ny, nx = self.shape
        return (
            f"{ny} x {nx}, latitude {self.latitude[0]:.6g} to {self.latitude[-1]:.6g}, "
            f"longitude {self.longitude[0]:.6g} to {self.longitude[-1]:.6g}" + (", periodic" if self.periodic else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form."""
        return {"kind": "rectilinear", "latitude": self.latitude.tolist(), "longitude": self.longitude.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Grid:
        """Read the form written by `to_dict`."""
        if data.get("kind") != "rectilinear":
            raise GridError(
                f"grid kind {data.get('kind')!r} is not known to this version; it reads 'rectilinear', 'curvilinear' and 'points'."
            )
        return cls(np.asarray(data["latitude"], dtype=float), np.asarray(data["longitude"], dtype=float))


def rectilinear(grid: object, what: str) -> Grid:
    """Return `grid` if it is rectilinear.

    Raises
    ------
    GridError
        If it is not, naming `what` needs it.
    """
    if not isinstance(grid, Grid):
        raise GridError(
            f"{what} needs latitude and longitude along one axis each. Interpolate to such a grid first: ds.genda.regrid(target)"
        )
    return grid


def factor_between(fine: object, coarse: object) -> int | None:
    """Return the factor by which coarse cells are blocks of fine ones, or None where they are not."""
    if not isinstance(fine, Grid) or not isinstance(coarse, Grid):
        return None
    factor, left = divmod(fine.shape[0], coarse.shape[0])
    if left or factor < 2 or coarse.shape[1] * factor != fine.shape[1]:
        return None
    return factor if fine.coarsened(factor).same_as(coarse) else None


def _edges(centres: np.ndarray) -> np.ndarray:
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def grid_of(ds: xr.Dataset, layout: Layout | None = None, argument: str = "ds") -> tuple[Grid, Orientation]:
    """Return the grid of a Dataset in model order, and how its arrays get there.

    Raises
    ------
    GridError
        If a coordinate is not monotonic, repeats itself, or leaves the globe.
    """
    layout = layout or find_layout(ds, argument)
    latitude = np.asarray(ds[layout.latitude].values, dtype=float)
    longitude = np.asarray(ds[layout.longitude].values, dtype=float)
    for name, values in ((layout.latitude, latitude), (layout.longitude, longitude)):
        if len(values) == 0:
            raise GridError(f"{argument}: dimension {name!r} is empty; there is nothing to do.")
    if np.abs(latitude).max() > 90.0 + 1e-6:
        raise GridError(
            f"{argument}: latitude {layout.latitude!r} reaches {latitude[np.abs(latitude).argmax()]:.6g}; it must lie in "
            f"-90 to 90 degrees. Are latitude and longitude swapped?"
        )
    rows = np.arange(len(latitude))
    if len(latitude) > 1:
        steps = np.diff(latitude)
        if not ((steps > 0).all() or (steps < 0).all()):
            raise GridError(
                f"{argument}: latitude {layout.latitude!r} is not monotonic or repeats a value; sort it: "
                f"{argument}.sortby({layout.latitude!r}).drop_duplicates({layout.latitude!r})"
            )
        rows = rows if steps[0] > 0 else rows[::-1]
    columns = np.arange(len(longitude))
    if len(longitude) > 1:
        steps = (np.diff(longitude) + 180.0) % 360.0 - 180.0
        if (steps < 0).all():
            columns, steps = columns[::-1], -steps[::-1]
        if not (steps > 0).all() or steps.sum() > 360.0 + TOLERANCE * steps.mean():
            raw = np.diff(longitude)
            if (steps < 0).any() and ((raw > 0).all() or (raw < 0).all()):  # cut at Greenwich or the date line
                name = f"{argument}.{layout.longitude}"
                turned = f"{name} % 360" if (longitude < 0).any() else f"({name} + 180) % 360 - 180"
                raise GridError(
                    f"{argument}: longitude {layout.longitude!r} holds one region in two parts; put them together: "
                    f"{argument}.assign_coords({layout.longitude}={turned}).sortby({layout.longitude!r})"
                )
            raise GridError(
                f"{argument}: longitude {layout.longitude!r} is not monotonic or repeats a value; sort it: "
                f"{argument}.sortby({layout.longitude!r}).drop_duplicates({layout.longitude!r})"
            )
        if steps.sum() > 360.0 - TOLERANCE * steps.mean():
            raise GridError(
                f"{argument}: longitude {layout.longitude!r} repeats its first meridian at the end; drop it: "
                f"{argument}.isel({layout.longitude}=slice(0, -1))"
            )
        unwrapped = longitude[columns[0]] + np.concatenate([[0.0], np.cumsum(steps)])
    else:
        unwrapped = longitude.copy()
    grid = Grid(latitude[rows], unwrapped)
    if grid.periodic:
        wrapped = unwrapped - 360.0 * np.floor((unwrapped + 180.0 + TOLERANCE) / 360.0)  # exact, unlike %
        start = int(wrapped.argmin())
        columns = np.roll(columns, -start)
        unwrapped = np.roll(wrapped, -start)
    else:
        unwrapped = unwrapped - 360.0 * np.floor((unwrapped[0] + 180.0 + TOLERANCE) / 360.0)
    return Grid(latitude[rows], unwrapped), Orientation(rows, columns)


def ground_of(ds: xr.Dataset, layout: Layout, orientation: Orientation) -> np.ndarray | None:
    """Return the height of the ground in metres, flat in model order, where `ds` has a ``surface_altitude`` on its grid."""
    for name, array in ds.variables.items():
        horizontal = set(layout.dims)
        if array.attrs.get("standard_name") == "surface_altitude" and set(array.dims) == horizontal:
            values = ds[name].transpose(*layout.dims).values.astype(float)
            return orientation.to_model(values * unit_factors_of(ds[name], "m")[0]).ravel()
    return None

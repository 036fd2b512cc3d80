"""Observations of functions: what lies between the cells of a grid is evaluated at its own place, and not interpolated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xgenda.curvilinear import AnyGrid
from xgenda.errors import GridError
from xgenda.maps import LinearMap
from xgenda.weights import interpolation

DIGITS = 6  # of places in degrees, a tenth of a metre: what agrees in these is one place
WHOLE = 1.0 - 1e-6  # of the weight of an interpolation, on one cell: the place is this cell


@dataclass(frozen=True, eq=False)
class Pointwise:
    """Observations of a state that has places after the cells of each channel.

    Attributes
    ----------
    operator
        From the channels, each with its cells and then the places. An observation at a cell sees that cell.
    places
        Latitude and longitude in degrees of places between cells, none twice, shape (p, 2): first those of observations, sorted.
    observed
        How many of them are those of observations.
    wanted
        Index into the cells and, after them, the places of each place that was asked for; None where none was.
    """

    operator: LinearMap
    places: np.ndarray
    observed: int
    wanted: np.ndarray | None


def at_places(
    operator: LinearMap,
    latitude: np.ndarray,
    longitude: np.ndarray,
    grid: AnyGrid,
    areal: np.ndarray,
    asked: tuple[np.ndarray, np.ndarray] | None = None,
) -> Pointwise:
    """Evaluate observations at their places.

    Parameters
    ----------
    operator
        From the channels, each flattened, to the observations: interpolation, or whatever those that are `areal` see.
    latitude, longitude
        Of the observations in degrees, shape (m,).
    grid
        Of the cells.
    areal
        Which observations see more than one place, and are left as they are; shape (m,).
    asked
        Latitude and longitude of further places, in any order, shapes (n,).
    """
    cells = grid.size
    between = (operator.lengths > 0) & ~areal & (cell_at(grid, latitude, longitude) < 0)
    places, of = np.unique(rounded(latitude[between], longitude[between]), axis=0, return_inverse=True)
    index = np.full(len(latitude), -1)
    index[between] = cells + of.ravel()
    observed, wanted = len(places), None
    if asked is not None:
        places, wanted = _joined(places, grid, *asked)
    entries = operator.matrix.tocoo()
    channel, cell = np.divmod(entries.col.astype(np.int64), cells)
    there = index[entries.row]
    width = cells + len(places)
    column = channel * width + np.where(there >= 0, there, cell)
    shape = (len(latitude), operator.size // cells * width)
    return Pointwise(LinearMap.from_entries(entries.row, column, entries.data, shape), places, observed, wanted)


def cell_at(grid: AnyGrid, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Return the cell whose centre each place is, -1 where it is between cells or outside; shape (m,)."""
    found, _ = interpolation(grid, latitude, longitude)
    out = np.full(len(latitude), -1)
    row = np.repeat(np.arange(len(latitude)), found.lengths)
    whole = found.matrix.data > WHOLE
    out[row[whole]] = found.matrix.indices[whole]
    return out


def rounded(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Return places as they are compared, shape (m, 2): a pole has one longitude, and every meridian one number."""
    latitude = np.round(np.asarray(latitude, dtype=float), DIGITS)
    longitude = np.round(np.asarray(longitude, dtype=float) % 360.0, DIGITS) % 360.0
    return np.stack([latitude, np.where(np.abs(latitude) >= 90.0, 0.0, longitude)], -1)


def _joined(places: np.ndarray, grid: AnyGrid, latitude: np.ndarray, longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return places (p, 2) with further ones after them, and the index in cells and places of each of the latter."""
    wanted = cell_at(grid, latitude, longitude)
    rest = np.flatnonzero(wanted < 0)
    asked, of = np.unique(rounded(latitude[rest], longitude[rest]), axis=0, return_inverse=True)
    known = {tuple(p): i for i, p in enumerate(places.tolist())}
    new = [p for p in asked.tolist() if tuple(p) not in known]
    known |= {tuple(p): len(places) + i for i, p in enumerate(new)}
    number = np.array([known[tuple(p)] for p in asked.tolist()], dtype=np.int64)
    wanted[rest] = grid.size + number[of.ravel()]
    return np.concatenate([places, np.reshape(new, (-1, 2))]), wanted


def interpolated(
    grid: AnyGrid, places: np.ndarray, channels: int, valid: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return interpolation from valid cells to places as indices (p, k) and weights (channels, p, k), and where most of it is valid.

    Parameters
    ----------
    grid
        Of the cells.
    places
        Shape (p, 2), all inside of the grid.
    channels, valid
        Their number, and which of their cells hold a state, shape (channels, ...); None: all.

    Raises
    ------
    GridError
        If a place lies outside of the grid.
    """
    found, inside = interpolation(grid, places[:, 0], places[:, 1])
    if not inside.all():
        far = places[np.flatnonzero(~inside)[0]]
        raise GridError(
            f"at: {int((~inside).sum())} of {len(places)} places lie outside of the grid of ds ({grid.describe()}), the first at latitude "
            f"{far[0]:.6g}, longitude {far[1]:.6g}. Leave them out."
        )
    indices = found.indices
    weights = np.broadcast_to(found.weights, (channels, *found.weights.shape)).copy()
    if valid is None:
        return indices, weights, np.ones(weights.shape[:2], dtype=bool)
    weights = weights * valid.reshape(channels, -1)[:, indices]
    whole = weights.sum(-1)
    return indices, weights / np.where(whole > 0, whole, 1.0)[..., None], whole >= 0.5

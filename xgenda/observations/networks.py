"""Simulated observing networks, as masks on a grid: what an instrument would have seen of a known truth."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter


def nadir_tracks(shape: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the cells under the ground tracks of nadir altimeters: straight lines, half of them ascending.

    Parameters
    ----------
    shape
        Rows and columns of the grid.
    count
        Number of tracks.
    rng
        Where they lie.

    Returns
    -------
    numpy.ndarray
        Shape `shape`, bool.
    """
    ny, nx = shape
    out = np.zeros(shape, dtype=bool)
    rows = np.arange(ny)
    for k in range(count):
        slope = (1 if k % 2 else -1) * rng.uniform(0.35, 0.55)  # columns per row, as of an orbit of 66 to 78 degrees inclination
        columns = np.round(rng.uniform(-0.25, 1.25) * nx + slope * (rows - ny / 2)).astype(int)
        inside = (columns >= 0) & (columns < nx)
        out[rows[inside], columns[inside]] = True
    return out


def swath(shape: tuple[int, int], width: float, rng: np.random.Generator, *, gap: float = 0.0) -> np.ndarray:
    """Return the cells of one wide swath, without the gap around its nadir.

    Parameters
    ----------
    shape
        Rows and columns of the grid.
    width, gap
        In cells, across the track.
    rng
        Where it lies.

    Returns
    -------
    numpy.ndarray
        Shape `shape`, bool.
    """
    ny, nx = shape
    slope = rng.choice([-1.0, 1.0]) * rng.uniform(0.35, 0.55)
    centre = rng.uniform(0.25, 0.75) * nx
    row, column = np.indices(shape)
    across = np.abs((column - centre) - slope * (row - ny / 2)) / np.hypot(1.0, slope)
    return np.asarray((across <= width / 2) & (across >= gap / 2))


def clouds(shape: tuple[int, int], cover: float, rng: np.random.Generator, *, size: float = 5.0) -> np.ndarray:
    """Return where clouds are: a smooth random field above the level that gives the wanted cover.

    Parameters
    ----------
    shape
        Rows and columns of the grid.
    cover
        Fraction of the cells, from 0 to 1.
    rng
        Where they lie.
    size
        Scale of the clouds in cells.

    Returns
    -------
    numpy.ndarray
        Shape `shape`, bool; True under clouds.
    """
    field = gaussian_filter(rng.standard_normal(shape), size, mode="wrap")
    return np.asarray(field > np.quantile(field, 1 - cover)) if cover > 0 else np.zeros(shape, dtype=bool)

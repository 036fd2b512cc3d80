"""The inputs of a downscaling model on its fine grid, or on a window of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xgenda.curvilinear import AnyGrid
from xgenda.errors import GridError
from xgenda.grids import Grid
from xgenda.maps import LinearMap, bilinear_between
from xgenda.models.conditions import Conditions
from xgenda.models.means import Place
from xgenda.spherical import unit_vectors
from xgenda.weights import interpolation, nearest

OUTSIDE = 0.05  # of the fine cells may lie beyond the coarse centres by more than the half cell that is held


class Features:
    """Interpolates coarse fields to the fine grid, and adds what never changes and what is the same everywhere.

    Parameters
    ----------
    conditions
        What the model takes.
    grid
        Fine grid.
    statics
        Fields that never change, standardised, shape (statics, rows, columns).
    wraps
        Whether the grid is a doubly periodic box, of whose blocks of cells the coarse ones are made.
    """

    def __init__(self, conditions: Conditions, grid: AnyGrid, statics: Tensor | None, wraps: bool = False) -> None:
        self.conditions, self.shape, self.statics = conditions, grid.plane, statics
        self.map = wrapped_between(conditions.grid.plane, grid.plane) if wraps else interpolated_to(conditions.grid, grid)

    @property
    def channels(self) -> int:
        """Number of inputs."""
        return self.conditions.coarse_channels + len(self.conditions.statics) + self.conditions.planes

    def everywhere(self) -> Place:
        """Return the whole fine grid as a window."""
        return np.arange(self.shape[0]), np.arange(self.shape[1])

    def interpolated(self, coarse: Tensor, place: Place) -> Tensor:
        """Return coarse fields (t, inputs, cells) on a window, shape (t, inputs, rows, columns), float32."""
        rows, columns = place
        whole = (len(rows), len(columns)) == self.shape
        map_ = self.map if whole else self.map.select((rows[:, None] * self.shape[1] + columns).ravel())
        values = map_(coarse.reshape(-1, coarse.shape[-1]).numpy()).astype(np.float32)
        return torch.as_tensor(values).reshape(*coarse.shape[:2], len(rows), len(columns))

    def of(self, interpolated: Tensor, planes: Tensor, place: Place) -> Tensor:
        """Return all inputs on a window, shape (t, channels, rows, columns): coarse fields, statics, planes.

        Parameters
        ----------
        interpolated
            From `interpolated`.
        planes
            Shape (t, planes).
        """
        size = interpolated.shape[-2:]
        parts = [interpolated]
        if self.statics is not None and len(self.statics):
            rows, columns = (torch.as_tensor(p) for p in place)
            parts.append(self.statics.index_select(1, rows).index_select(2, columns).expand(len(interpolated), -1, *size))
        if planes.shape[1]:
            parts.append(planes.float()[:, :, None, None].expand(-1, -1, *size))
        return torch.cat(parts, 1) if len(parts) > 1 else interpolated


def interpolated_to(source: AnyGrid, target: AnyGrid) -> LinearMap:
    """Build bilinear interpolation from coarse to fine cells; beyond the outermost centres the edge value is held.

    Raises
    ------
    GridError
        If the fine grid reaches beyond the coarse cells.
    """
    if spacing_of(target) > 1.01 * spacing_of(source):
        raise GridError(
            f"The fine grid, {target.describe()}, is coarser than the coarse one, {source.describe()}. Were they exchanged? The coarse fields come "
            f"first: xgenda.train(coarse, target=fine, task='downscale')"
        )
    latitude, longitude = target.points()
    found, inside = interpolation(source, latitude, longitude)
    if isinstance(source, Grid) and isinstance(target, Grid):
        _check_within(source, target)
        return bilinear_between(source, target)
    lost = np.flatnonzero(~inside)
    if not len(lost):
        return found
    held = nearest(source, latitude[lost], longitude[lost])
    far = _distance(source, held, latitude[lost], longitude[lost]) > spacing_of(source)
    if far.sum() > OUTSIDE * target.size:
        raise GridError(
            f"{far.sum()} of {target.size} fine cells lie more than one cell beyond the coarse fields ({source.describe()}); "
            f"the fine grid is {target.describe()}. Crop the fine fields, or give coarse ones of a larger region."
        )
    return found.replaced(lost, held)


def wrapped_between(source: tuple[int, int], target: tuple[int, int]) -> LinearMap:
    """Build bilinear interpolation from blocks of cells to the cells, on a doubly periodic plane of rows and columns."""
    steps = []
    for n, m in zip(source, target, strict=True):
        place = (np.arange(m) + 0.5) * n / m - 0.5
        low = np.floor(place).astype(int)
        steps.append((np.stack([low, low + 1]) % n, np.stack([low + 1 - place, place - low])))
    (rows, down), (columns, along) = steps
    index = rows[:, None, :, None] * source[1] + columns[None, :, None, :]
    weight = down[:, None, :, None] * along[None, :, None, :]
    return LinearMap.from_rows(index.reshape(4, -1).T, weight.reshape(4, -1).T, source[0] * source[1])


def _check_within(source: Grid, target: Grid) -> None:
    """Refuse a fine grid that reaches beyond the cells of the coarse one."""
    rows, columns = source.edges()
    tolerance = [1.01 * float(np.median(np.diff(edges))) / 2 for edges in (rows, columns)]
    south, north = rows[0] - tolerance[0], rows[-1] + tolerance[0]
    centre = source.longitude.mean()
    east = target.longitude - 360.0 * np.round((target.longitude.mean() - centre) / 360.0)
    beyond = (target.latitude < south).any() or (target.latitude > north).any()
    if not source.periodic:
        beyond = beyond or bool((east < columns[0] - tolerance[1]).any() or (east > columns[-1] + tolerance[1]).any())
    if beyond:
        raise GridError(
            f"The fine grid, {target.describe()}, reaches beyond the coarse fields, {source.describe()}. Crop the fine fields, or give "
            f"coarse ones of a larger region."
        )


def _distance(source: AnyGrid, held: LinearMap, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Return the angle in degrees between points and the cell that stands for each."""
    phi, lam = source.points()
    cell = held.matrix.indices
    chord = np.linalg.norm(unit_vectors(latitude, longitude) - unit_vectors(phi[cell], lam[cell]), axis=-1)
    return np.asarray(np.degrees(2 * np.arcsin(np.clip(chord / 2, 0, 1))))


def spacing_of(source: AnyGrid) -> float:
    """Return the usual distance of neighbouring cells in degrees, across a diagonal."""
    phi, lam = (p.reshape(source.plane) for p in source.points())
    places = unit_vectors(phi, lam)
    steps = [np.linalg.norm(np.diff(places, axis=a), axis=-1).ravel() for a in (0, 1) if places.shape[a] > 1]
    return float(np.degrees(np.sqrt(2) * np.median(np.concatenate(steps))))

"""`LinearMap`: rows of (indices, weights), the one sparse object of the library: interpolation, block means, regridding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from xgenda.errors import GridError
from xgenda.grids import EARTH_RADIUS, TOLERANCE, Grid

NODE = 1e-4  # of a cell


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A linear map y = A x from a flattened source.

    Parameters
    ----------
    matrix
        Shape (rows, size), float64, without entries that are zero: NaN goes through where, and only where, a weight is not zero.
    """

    matrix: scipy.sparse.csr_array

    @classmethod
    def from_rows(cls, indices: np.ndarray, weights: np.ndarray, size: int) -> LinearMap:
        """Make the map whose row i is ``sum_j weights[i, j] * x[indices[i, j]]``; entries of weight zero are nothing.

        Parameters
        ----------
        indices, weights
            Shape (rows, k).
        size
            Length of the flattened source.
        """
        rows, k = weights.shape
        kind = np.int32 if max(weights.size, size) < 2**31 else np.int64
        matrix = scipy.sparse.csr_array(
            (
                np.array(weights, dtype=float).ravel(),
                np.asarray(indices, dtype=kind).ravel(),
                np.arange(0, rows * k + 1, max(k, 1), dtype=kind)[: rows + 1] if k else np.zeros(rows + 1, dtype=kind),
            ),
            shape=(rows, size),
        )
        matrix.eliminate_zeros()
        return cls(matrix)

    @classmethod
    def from_entries(cls, row: np.ndarray, column: np.ndarray, weight: np.ndarray, shape: tuple[int, int]) -> LinearMap:
        """Make the map from single entries in any order; equal ones add up."""
        return cls.from_matrix(scipy.sparse.coo_array((np.asarray(weight, dtype=float), (row, column)), shape=shape))

    @classmethod
    def from_matrix(cls, matrix: scipy.sparse.sparray) -> LinearMap:
        """Make the map of any sparse matrix."""
        rows = scipy.sparse.csr_array(matrix)
        rows.eliminate_zeros()
        rows.sort_indices()
        return cls(rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.matrix.shape
        return int(rows), int(columns)

    @property
    def size(self) -> int:
        """Length of the flattened source."""
        return self.shape[1]

    @property
    def lengths(self) -> np.ndarray:
        """Number of entries of each row, shape (rows,)."""
        return np.asarray(np.diff(self.matrix.indptr))

    @functools.cached_property
    def transposed(self) -> scipy.sparse.csr_array:
        """The transpose, by rows."""
        return self.matrix.T.tocsr()

    @functools.cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.lengths
        k = int(lengths.max(initial=0))
        place = np.arange(k) < lengths[:, None]
        indices, weights = np.zeros(place.shape, dtype=np.int64), np.zeros(place.shape)
        indices[place], weights[place] = self.matrix.indices, self.matrix.data
        return indices, weights

    @property
    def indices(self) -> np.ndarray:
        """Indices into the source by rows, shape (rows, k), int64; rows shorter than the longest are padded.

        This gather form and `weights` run in torch: sparse tensors there break forward-mode differentiation.
        """
        return self._rows[0]

    @property
    def weights(self) -> np.ndarray:
        """Weights by rows, shape (rows, k); padded with zero."""
        return self._rows[1]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Apply to an array (..., size); returns (..., rows)."""
        return _multiply(self.matrix, np.asarray(values))

    def adjoint(self, values: np.ndarray) -> np.ndarray:
        """Apply the transpose to an array (..., rows); returns (..., size)."""
        return _multiply(self.transposed, np.asarray(values))

    def magnitude(self, values: np.ndarray) -> np.ndarray:
        """Apply the absolute weights to an array (size,): the largest standard deviation of a row whose cells have these."""
        absolute = self.matrix.copy()
        absolute.data = np.abs(absolute.data)
        return _multiply(absolute, np.asarray(values))

    def select(self, rows: np.ndarray) -> LinearMap:
        """Keep some rows (index or boolean array)."""
        return LinearMap(self.matrix[rows])

    def replaced(self, rows: np.ndarray, by: LinearMap) -> LinearMap:
        """Return the map with the rows of `by` in the place of some of its own (index array, shape (by.rows,))."""
        place = np.arange(self.shape[0])
        place[rows] = len(place) + np.arange(len(rows))
        return concatenate([self, by]).select(place)

    def kept(self, rows: np.ndarray) -> LinearMap:
        """Return the map with all rows empty but some (boolean array, shape (rows,))."""
        entries = self.matrix.tocoo()
        fine = np.asarray(rows)[entries.row]
        return LinearMap.from_entries(entries.row[fine], entries.col[fine], entries.data[fine], self.shape)

    def shifted(self, offset: np.ndarray | int, size: int) -> LinearMap:
        """Return the same map on a longer source in which this one starts at `offset` (a number, or one per row)."""
        start = np.repeat(np.broadcast_to(offset, self.shape[0]), self.lengths)
        entries = (self.matrix.data, self.matrix.indices + start, self.matrix.indptr)
        return LinearMap(scipy.sparse.csr_array(entries, shape=(self.shape[0], size)))

    def scaled(self, factor: np.ndarray) -> LinearMap:
        """Return the map with each row times a factor, shape (rows,)."""
        scaled = self.matrix.copy()
        scaled.data = scaled.data * np.repeat(factor, self.lengths)
        scaled.eliminate_zeros()
        return LinearMap(scaled)

    def plus(self, other: LinearMap) -> LinearMap:
        """Return the sum of two maps of one shape."""
        return LinearMap(self.matrix + other.matrix)

    def spread(self, rows: np.ndarray, count: int) -> LinearMap:
        """Return a map of `count` rows, of which `rows` (ascending) are those of this one and all others empty."""
        starts = np.zeros(count + 1, dtype=self.matrix.indptr.dtype)
        starts[rows + 1] = self.lengths
        entries = (self.matrix.data, self.matrix.indices, np.cumsum(starts))
        return LinearMap(scipy.sparse.csr_array(entries, shape=(count, self.size)))

    def restricted(self, valid: np.ndarray, least: float) -> tuple[LinearMap, np.ndarray]:
        """Return the map on valid cells only, its rows scaled back to their sum, and which rows have at least the part `least` there.

        Rows with less are empty, and so are rows with weights of both signs that are not wholly there: a part of a difference is none.
        """
        row = np.repeat(np.arange(self.shape[0]), self.lengths)
        there = valid[self.matrix.indices]
        whole, left = (np.bincount(row, w, self.shape[0]) for w in (np.abs(self.matrix.data), np.abs(self.matrix.data) * there))
        mixed = np.bincount(row, self.matrix.data < 0, self.shape[0]) > 0
        enough = (left >= np.where(mixed, 1 - 1e-12, least) * whole) & (whole > 0)
        factor = np.divide(whole, left, out=np.zeros(self.shape[0]), where=enough)
        kept = self.matrix.copy()
        kept.data = kept.data * there * factor[row]
        kept.eliminate_zeros()
        return LinearMap(kept), enough | (whole == 0)

    def after(self, first: LinearMap) -> LinearMap:
        """Return the composition: this map of what `first` gives."""
        return LinearMap(self.matrix @ first.matrix)


def _multiply(matrix: scipy.sparse.csr_array, values: np.ndarray) -> np.ndarray:
    if values.ndim == 1:
        return np.asarray(matrix @ values)
    flat = values.reshape(int(np.prod(values.shape[:-1])), values.shape[-1])
    return np.asarray((matrix @ flat.T).T).reshape(*values.shape[:-1], matrix.shape[0])


def concatenate(maps: Sequence[LinearMap]) -> LinearMap:
    """Stack the rows of several maps of one source."""
    return LinearMap(scipy.sparse.vstack([m.matrix for m in maps], format="csr"))


def identity(size: int) -> LinearMap:
    """Return the identity on `size` cells."""
    return LinearMap.from_rows(np.arange(size)[:, None], np.ones((size, 1)), size)


def bilinear(grid: Grid, latitude: np.ndarray, longitude: np.ndarray) -> tuple[LinearMap, np.ndarray]:
    """Build bilinear interpolation from a grid to points.

    Parameters
    ----------
    grid
        Source grid.
    latitude, longitude
        Points in degrees, shape (m,); longitudes in any convention.

    Returns
    -------
    LinearMap
        Shape (m, grid.size). Rows of points outside have weight zero.
    numpy.ndarray
        Shape (m,), True where the point lies within the hull of the cell centres (across the seam where the grid is periodic).
        Points outside are never snapped to the edge.
    """
    ny, nx = grid.shape
    row, fy, inside_y = _bracket(grid.latitude, np.asarray(latitude, dtype=float))
    located = grid.locate(longitude)
    axis = np.append(grid.longitude, grid.longitude[0] + 360.0) if grid.periodic else grid.longitude
    column, fx, inside_x = _bracket(axis, located)
    inside = inside_y & inside_x
    row1, column1 = np.minimum(row + 1, ny - 1), (column + 1) % nx if grid.periodic else np.minimum(column + 1, nx - 1)
    indices = np.stack([row * nx + column, row * nx + column1, row1 * nx + column, row1 * nx + column1], -1)
    weights = np.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], -1)
    weights[~inside] = 0.0
    return LinearMap.from_rows(indices, weights, grid.size), inside


def _bracket(axis: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lower index, fraction and whether inside, for ascending `axis`; within a rounding error of a node, the node."""
    step = np.diff(axis).mean() if len(axis) > 1 else 1.0
    slack = TOLERANCE * step
    inside = np.isfinite(values) & (values >= axis[0] - slack) & (values <= axis[-1] + slack)
    if len(axis) == 1:
        return np.zeros(len(values), dtype=np.int64), np.zeros(len(values)), inside
    safe = np.clip(np.where(inside, values, axis[0]), axis[0], axis[-1])
    lower = np.clip(np.searchsorted(axis, safe, side="right") - 1, 0, len(axis) - 2)
    fraction = (safe - axis[lower]) / (axis[lower + 1] - axis[lower])
    # float32 longitudes miss a node by up to 6e-5 of a cell of a quarter of a degree: such a point is the node
    fraction = np.where(fraction < NODE, 0.0, np.where(fraction > 1 - NODE, 1.0, fraction))
    return lower.astype(np.int64), fraction, inside


def block_mean(grid: Grid, factor: int) -> LinearMap:
    """Build plain means over blocks of `factor` x `factor` cells, as ``ds.coarsen(...).mean()`` takes them.

    Returns
    -------
    LinearMap
        Shape (grid.size / factor**2, grid.size), rows in the order of ``grid.coarsened(factor)``.
    """
    ny, nx = grid.coarsened(factor).shape
    cells = np.arange(grid.size).reshape(ny, factor, nx, factor).transpose(0, 2, 1, 3).reshape(ny * nx, factor**2)
    return LinearMap.from_rows(cells, np.full(cells.shape, 1.0 / factor**2), grid.size)


def gaussian_footprint(grid: Grid, cells: np.ndarray, sigma: float, *, wrap: bool = False) -> LinearMap:
    """Build means under a Gaussian footprint around some cells, cut off at three standard deviations.

    Distances are on the sphere, with the metric of the row of each footprint's centre. Weights add up to 1, also where the
    footprint reaches over the edge of the grid.

    Parameters
    ----------
    grid
        Source grid.
    cells
        Flat indices of the centres, shape (m,).
    sigma
        Standard deviation in metres.
    wrap
        Whether both axes wrap (a doubly periodic box); otherwise only longitude does, where the grid is periodic.

    Returns
    -------
    LinearMap
        Shape (m, grid.size).
    """
    ny, nx = grid.shape
    row, column = np.divmod(np.asarray(cells), nx)
    metre = np.pi / 180 * EARTH_RADIUS
    dy = metre * abs(np.diff(grid.latitude)).mean()
    dx = metre * abs(np.diff(grid.longitude)).mean() * np.cos(np.radians(grid.latitude))
    reach_y, reach_x = (int(np.ceil(3 * sigma / d)) for d in (dy, dx.min()))
    i, j = (a.ravel() for a in np.meshgrid(np.arange(-reach_y, reach_y + 1), np.arange(-reach_x, reach_x + 1), indexing="ij"))
    distance = np.hypot(i * dy, j * dx[row][:, None])
    weights = np.where(distance <= 3 * sigma, np.exp(-0.5 * (distance / sigma) ** 2), 0.0)
    to_row, to_column = row[:, None] + i, column[:, None] + j
    if not wrap:
        weights[(to_row < 0) | (to_row >= ny)] = 0.0
        if not grid.periodic:
            weights[(to_column < 0) | (to_column >= nx)] = 0.0
    indices = (to_row % ny) * nx + to_column % nx
    return LinearMap.from_rows(indices, weights / weights.sum(1, keepdims=True), grid.size)


def bilinear_between(source: Grid, target: Grid) -> LinearMap:
    """Build bilinear interpolation between grids; beyond the source's outermost centres the edge value is held."""
    latitude, longitude = target.points()
    latitude = np.clip(latitude, source.latitude[0], source.latitude[-1])
    if not source.periodic:
        located = longitude - 360.0 * np.round((longitude - source.longitude.mean()) / 360.0)
        longitude = np.clip(located, source.longitude[0], source.longitude[-1])
    out, inside = bilinear(source, latitude, longitude)
    if not inside.all():
        raise GridError("The target grid could not be located in the source grid.")
    return out

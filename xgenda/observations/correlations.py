"""Errors of observations that depend on each other: how a user gives them, and whitening, which makes them independent."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg
import scipy.sparse

from xgenda.errors import ObservationError, OptionError
from xgenda.grids import EARTH_RADIUS
from xgenda.maps import LinearMap
from xgenda.observations.grouping import first_of_each
from xgenda.spherical import great_circle, unit_vectors

if TYPE_CHECKING:
    from xgenda.observations.table import Table

#: Rows whose errors may depend on each other: the factor of their covariance is dense, and so are the rows of its inverse times H.
LARGEST_BLOCK = 2000
SYMMETRY = 1e-8


@dataclass(frozen=True, eq=False)
class ErrorCovariance:
    """Observation errors that depend on each other, for the argument `error`.

    Give either `std` and `length_scale`, or `matrix`.

    Parameters
    ----------
    std
        Standard deviation in the units of the observation, a positive number.
    length_scale
        In metres: errors of two observations of one variable (and level), one platform and one analysis time are correlated as
        exp(-distance / length_scale), with the great-circle distance.
    matrix
        Covariance in the squared units of the observation, shape (n, n), over the n rows of the container (over its flat cells where it has
        several dimensions), whatever their time. Analyses of single times know of what is between those of one time only.

    Raises
    ------
    OptionError
        If neither or both are given, if a number is not positive, or if `matrix` is not a covariance.

    Notes
    -----
    The analysis multiplies the observations of a block and their operator by the inverse of the Cholesky factor of the covariance of
    those that are used. Quality control and reports know the standard deviations only.

    Examples
    --------
    >>> import xgenda
    >>> xgenda.ErrorCovariance(std=0.5, length_scale=50e3).std
    0.5
    """

    std: float | None = None
    length_scale: float | None = None
    matrix: Any = None

    def __post_init__(self) -> None:
        """Refuse what is no covariance."""
        parts = (self.std is not None, self.length_scale is not None)
        if (self.matrix is not None and any(parts)) or (self.matrix is None and not all(parts)):
            raise OptionError(
                "ErrorCovariance needs either std and length_scale or matrix: ErrorCovariance(std=0.5, length_scale=50e3), or "
                "ErrorCovariance(matrix=r) with r of shape (n, n)."
            )
        if self.matrix is not None:
            object.__setattr__(self, "matrix", _checked(self.matrix))
            return
        given: list[tuple[str, Any]] = [("std", self.std), ("length_scale", self.length_scale)]
        for name, value in given:
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < np.inf:
                raise OptionError(f"ErrorCovariance: {name}={value!r} is not accepted; give a positive number.")


def _checked(given: Any) -> np.ndarray:
    """Return a covariance as a read-only array of its own."""
    try:
        matrix = np.array(given, dtype=float)
    except (TypeError, ValueError):
        raise OptionError(
            f"ErrorCovariance: matrix is a {type(given).__name__} that holds no numbers; give an array of shape (n, n)."
        ) from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise OptionError(f"ErrorCovariance: matrix has shape {matrix.shape} and must be square; give an array of shape (n, n).")
    if not np.isfinite(matrix).all():
        raise OptionError(
            f"ErrorCovariance: matrix holds {int((~np.isfinite(matrix)).sum())} values that are not finite, first in row "
            f"{int(np.argwhere(~np.isfinite(matrix))[0][0])}."
        )
    apart = np.abs(matrix - matrix.T).max(initial=0.0)
    if apart > SYMMETRY * np.abs(matrix).max(initial=0.0):
        raise OptionError(
            f"ErrorCovariance: matrix is not symmetric (it differs from its transpose by up to {apart:.3g}); type matrix=(r + r.T) / 2 "
            f"if that is what it should be."
        )
    matrix = (matrix + matrix.T) / 2
    if not _is_positive(matrix):
        least = float(scipy.linalg.eigvalsh(matrix, subset_by_index=[0, 0])[0])
        raise OptionError(
            f"ErrorCovariance: matrix is not positive definite; its smallest eigenvalue is {least:.3g}. Add the variance that is missing: "
            f"matrix=r + np.diag(...)"
        )
    matrix.flags.writeable = False
    out: np.ndarray = matrix
    return out


def _is_positive(matrix: np.ndarray) -> bool:
    try:
        scipy.linalg.cholesky(matrix, lower=True)
    except scipy.linalg.LinAlgError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class Correlated:
    """An `ErrorCovariance` of one variable of one container, in the units of the state.

    Attributes
    ----------
    given
        What the user gave.
    scale
        From the units of the observation to those of the state.
    """

    given: ErrorCovariance
    scale: float

    def deviations(self, size: int, what: str, argument: str) -> np.ndarray:
        """Return the standard deviations of `size` rows."""
        if self.given.std is not None:
            return np.full(size, self.given.std * self.scale)
        if len(self.given.matrix) != size:
            raise ObservationError(
                f"{what}: the matrix has shape {self.given.matrix.shape} and {argument} has {size} rows; give one of shape {(size, size)}."
            )
        return np.asarray(np.sqrt(np.diag(self.given.matrix)) * self.scale)

    def covariance(self, row: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
        """Return the covariance of some rows of the container, shape (m, m)."""
        if self.given.matrix is not None:
            return np.asarray(self.given.matrix[np.ix_(row, row)] * self.scale**2)
        assert self.given.std is not None
        assert self.given.length_scale is not None
        places = unit_vectors(latitude, longitude)
        distance = EARTH_RADIUS * great_circle(places[:, None], places[None])
        return np.asarray((self.given.std * self.scale) ** 2 * np.exp(-distance / self.given.length_scale))


def blocks(table: Table, time_index: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each group whose errors may depend on each other."""
    rows = np.flatnonzero(table.correlation >= 0)
    if not len(rows):
        return []
    _, group = first_of_each(_block_keys(table, rows, time_index), (rows,))
    order = np.argsort(group, kind="stable")
    return [rows[part] for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1)]


def _block_keys(table: Table, rows: np.ndarray, time_index: np.ndarray) -> list[np.ndarray]:
    by_distance = np.array([c.given.matrix is None for c in table.correlated])[table.correlation[rows]]
    platform = np.unique(table.platform[rows].astype(str), return_inverse=True)[1]
    return [
        table.correlation[rows],
        np.where(by_distance, platform, 0),
        np.where(by_distance, time_index[rows], 0),
        np.where(by_distance, np.nan_to_num(table.level[rows], nan=-1e30), 0.0),
    ]


def check_blocks(table: Table, time_index: np.ndarray, used: np.ndarray, argument: str, *, trajectory: bool) -> None:
    """Refuse, before anything is computed, blocks that are too large, and errors that are the same error twice.

    Parameters
    ----------
    table, time_index
        All observations and their analysis times.
    used
        Rows that passed all checks so far.
    trajectory
        Whether all times are solved together.
    """
    rows = np.flatnonzero(used & (table.correlation >= 0))
    if not len(rows):
        return
    keys: Sequence[np.ndarray] = [*_block_keys(table, rows, time_index), *([] if trajectory else [time_index[rows]])]
    _, group = first_of_each(keys, (rows,))
    largest = int(np.bincount(group).max())
    if largest > LARGEST_BLOCK:
        raise ObservationError(
            f"{argument}: the errors of {largest} observations of one time depend on each other, and at most {LARGEST_BLOCK} are handled. "
            f"Thin them: quality=xgenda.QualityControl(thin=50e3)"
        )
    _, place = first_of_each([*keys, table.latitude[rows], table.longitude[rows]], (rows,))
    twice = np.flatnonzero(np.bincount(place) > 1)
    for k in twice:
        some = rows[place == k]
        c = table.correlated[table.correlation[some[0]]]
        if c.given.std is not None and (table.error[some] <= c.given.std * c.scale * (1 + 1e-9)).all():
            raise ObservationError(
                f"{argument}: rows {table.row[some[0]]} and {table.row[some[1]]} are observations of one place, so that "
                f"ErrorCovariance(std, length_scale) makes their errors the same. Add what differs: representativeness=0.1, or drop one."
            )


def whitened(table: Table, operator: LinearMap, time_index: np.ndarray) -> tuple[LinearMap, np.ndarray, np.ndarray]:
    """Return observations with independent errors that say the same of the state.

    With R = L L^T the rows of a block become y' = L^-1 y and H' = L^-1 H, with variance 1; rows that are independent stay as they are.

    Parameters
    ----------
    table, operator
        Observations that are solved together, and their operator, shape (m, cells).
    time_index
        Analysis time of each; errors by distance are independent between them, those of a matrix are not.

    Returns
    -------
    LinearMap
        Shape (m, cells).
    numpy.ndarray
        Values, shape (m,).
    numpy.ndarray
        Variances, shape (m,).
    """
    value, variance = table.value.copy(), table.error**2
    replaced: list[np.ndarray] = []
    entries = []
    for rows in blocks(table, time_index):
        c = table.correlated[table.correlation[rows[0]]]
        covariance = c.covariance(table.row[rows], table.latitude[rows], table.longitude[rows])
        np.fill_diagonal(covariance, 0.0)
        coupled = covariance.any(1)
        rows, covariance = rows[coupled], covariance[np.ix_(coupled, coupled)]
        if not len(rows):
            continue
        np.fill_diagonal(covariance, table.error[rows] ** 2)  # with what is not correlated, such as representativeness
        try:
            factor = scipy.linalg.cholesky(covariance, lower=True)
        except scipy.linalg.LinAlgError:
            raise ObservationError(
                f"The error covariance of {len(rows)} observations that are used is not positive definite. Add a variance that is not "
                f"correlated: representativeness=0.1"
            ) from None
        sparse = operator.matrix[rows]
        columns = np.unique(sparse.indices)
        dense = scipy.linalg.solve_triangular(factor, sparse[:, columns].toarray(), lower=True)
        value[rows] = scipy.linalg.solve_triangular(factor, table.value[rows], lower=True)
        variance[rows] = 1.0
        replaced.append(rows)
        shape = (len(rows), len(columns))
        entries.append((np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns, shape), dense))
    if not replaced:
        return operator, value, variance
    kept = np.ones(len(value))
    kept[np.concatenate(replaced)] = 0.0
    same = (scipy.sparse.diags_array(kept) @ operator.matrix).tocoo()
    row, column, weight = (
        np.concatenate([a, *(e[k].ravel() for e in entries)]) for k, a in enumerate((same.row, same.col, same.data))
    )
    return LinearMap.from_entries(row, column, weight, operator.shape), value, variance

r"""Ensemble Kalman filters: the local ensemble transform Kalman filter, and without localisation the global square-root filter.

With the anomalies X of M members, those of what is observed S, both over sqrt(M - 1), and A = rho^(1/2) R^(-1/2) S around one cell::

    mean      x + X A^T (I + A A^T)^-1 rho^(1/2) R^(-1/2) (y - H(x))          Hunt et al. 2007, eq. 20 and 22
    anomalies X (I + A^T A)^(-1/2)                                            eq. 24, the symmetric square root

rho is the taper of Gaspari and Cohn of the distance between cell and observation (their section 2.3.2: errors grow with distance). The
transform has the size of the smaller of members and local observations, and is the same for all variables and levels of a cell.
Nothing here knows of xarray: see `xgenda.filtering`.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from xgenda.curvilinear import AnyGrid
from xgenda.errors import GridError, OptionError, check_flag
from xgenda.grids import EARTH_RADIUS, Grid, rectilinear
from xgenda.spherical import unit_vectors

ENTRIES = 2**24  # numbers of one array of a batch of cells
NEAREST = 1e-9  # tapers below it are zero
EVEN = 0.01  # part of the spacing by which that of a box that wraps may vary


@dataclass(frozen=True)
class Inflation:
    """What keeps the spread of an ensemble up.

    Parameters
    ----------
    prior
        Factor on the anomalies of the background: 1.02 is 4 % more variance.
    rtpp
        Relaxation to prior perturbations: analysis anomalies are ``(1 - rtpp) X_a + rtpp X_b`` (Zhang et al. 2004, eq. 5).
    rtps
        Relaxation to prior spread: analysis anomalies times ``1 + rtps (s_b - s_a) / s_a``, cell by cell (Whitaker and Hamill 2012, eq. 2).
    """

    prior: float = 1.0
    rtpp: float = 0.0
    rtps: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no factor or no part."""
        if not _is_number(self.prior) or not 1 <= self.prior < 10:
            raise OptionError(
                f"inflation={self.prior!r} is not accepted; it is a factor on the anomalies of the background, from 1: inflation=1.02"
            )
        for name in ("rtpp", "rtps"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise OptionError(f"{name}={value!r} is not accepted; it is a part, from 0 to 1: {name}=0.5")

    def before(self, ensemble: np.ndarray) -> np.ndarray:
        """Return a background, members first, with its anomalies inflated."""
        if self.prior == 1:
            return ensemble
        mean = ensemble.mean(0)
        return np.asarray(mean + self.prior * (ensemble - mean))

    def after(self, analysis: np.ndarray, background: np.ndarray) -> np.ndarray:
        """Return an analysis whose anomalies are relaxed to those of its background, both with members first."""
        if not self.rtpp and not self.rtps:
            return analysis
        mean = analysis.mean(0)
        anomalies, before = analysis - mean, background - background.mean(0)
        if self.rtpp:
            anomalies = (1 - self.rtpp) * anomalies + self.rtpp * before
        if self.rtps:
            now, then = (np.sqrt((a**2).mean(0)) for a in (anomalies, before))
            anomalies = anomalies * (1 + self.rtps * np.divide(then - now, now, out=np.zeros_like(now), where=now > 0))
        return np.asarray(mean + anomalies)


@dataclass(frozen=True)
class LETKF:
    """The local ensemble transform Kalman filter; without `localization` the global square-root filter (ETKF).

    Give it as ``model`` to `xgenda.assimilate`, with an ensemble as background, or to `xgenda.cycle`.

    Parameters
    ----------
    localization
        Great-circle distance in metres at which the weight of an observation reaches zero, by the function of Gaspari and Cohn (their
        2c; half of it is left at 0.34 of this distance). None: every observation acts everywhere, which needs more members than the
        state has growing directions. What lies beyond is not changed at all.
    inflation
        Factor on the anomalies of the background before the analysis: 1.02 is 4 % more variance. Where nothing is observed it adds
        up from cycle to cycle; `rtps` does not.
    rtpp, rtps
        Relaxation of the analysis to the perturbations or the spread of the background, 0 to 1.
    rotation
        Whether the anomalies are mixed after the analysis by a random rotation that leaves mean and covariance as they are (Sakov and
        Oke 2008, section 4), keyed by seed and time.
    wraps
        Whether the state is a doubly periodic box on a rectilinear grid of even spacing: distances are then the shortest ones across its
        edges, in a plane, instead of great circles.

    Raises
    ------
    OptionError
        If a number is not accepted.

    Notes
    -----
    A variable on levels is localised in the horizontal only. Errors that depend on each other (`ErrorCovariance`) need ``localization=None``.

    References
    ----------
    Hunt, B. R., Kostelich, E. J. and Szunyogh, I. (2007), Efficient data assimilation for spatiotemporal chaos: a local ensemble transform
    Kalman filter, Physica D 230, 112-126.
    Gaspari, G. and Cohn, S. E. (1999), Construction of correlation functions in two and three dimensions, Q. J. R. Meteorol. Soc. 125,
    723-757, eq. 4.10.
    Sakov, P. and Oke, P. R. (2008), Implications of the form of the ensemble transformation in the ensemble square root filters, Mon.
    Weather Rev. 136, 1042-1053.
    Whitaker, J. S. and Hamill, T. M. (2012), Evaluating methods to account for system errors in ensemble data assimilation, Mon. Weather
    Rev. 140, 3078-3089.

    Examples
    --------
    >>> import xgenda
    >>> xgenda.LETKF(localization=2000e3, inflation=1.05)
    LETKF(localization=2000000.0, inflation=1.05)
    """

    localization: float | None = None
    inflation: float = 1.0
    rtpp: float = 0.0
    rtps: float = 0.0
    rotation: bool = False
    wraps: bool = False

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if self.localization is not None and (not _is_number(self.localization) or self.localization <= 0):
            raise OptionError(
                f"localization={self.localization!r} is not accepted; give the distance in metres at which observations stop to act: "
                f"xgenda.LETKF(localization=2000e3), or None."
            )
        check_flag("rotation", self.rotation)
        check_flag("wraps", self.wraps)
        if self.wraps and self.localization is None:
            raise OptionError("wraps=True has no effect without localization; leave it out, or give localization in metres.")
        _ = self.relaxation
        for field in ("localization", "inflation", "rtpp", "rtps"):
            value = getattr(self, field)
            object.__setattr__(self, field, None if value is None else float(value))

    @property
    def relaxation(self) -> Inflation:
        """The three numbers of inflation together."""
        return Inflation(self.inflation, self.rtpp, self.rtps)

    def __repr__(self) -> str:
        """Show what is not at its default."""
        given = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"LETKF({', '.join(f'{k}={v!r}' for k, v in given)})"


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and bool(np.isfinite(float(value)))


def gaspari_cohn(distance: np.ndarray) -> np.ndarray:
    """Return the taper of Gaspari and Cohn (1999, eq. 4.10) of distances in units of that at which it reaches zero."""
    z = 2 * np.asarray(distance, dtype=float)
    near = (((-z / 4 + 1 / 2) * z + 5 / 8) * z - 5 / 3) * z**2 + 1
    with np.errstate(divide="ignore"):
        far = ((((z / 12 - 1 / 2) * z + 5 / 8) * z + 5 / 3) * z - 5) * z + 4 - 2 / (3 * np.maximum(z, 1.0))
    return np.asarray(np.where(z <= 1, near, np.where(z < 2, np.maximum(far, 0.0), 0.0)))


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Which observations act on which cells, and how strongly: entries sorted by cell.

    Attributes
    ----------
    cell, observation
        Of each entry.
    taper
        In (0, 1].
    cells
        Number of all cells.
    """

    cell: np.ndarray
    observation: np.ndarray
    taper: np.ndarray
    cells: int

    def padded(self, most: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield batches of cells with their observations: cells (b,), observations (b, k) and tapers (b, k), zero where padded.

        Parameters
        ----------
        most
            How many entries a batch may have.
        """
        count = np.bincount(self.cell, minlength=self.cells)
        first = np.concatenate([[0], np.cumsum(count)])
        order = np.argsort(count, kind="stable")  # cells with as many observations together
        order = order[count[order] > 0]
        begin = 0
        while begin < len(order):
            end = begin + 1
            while end < len(order) and (end + 1 - begin) * count[order[end]] <= most:
                end += 1
            cells = order[begin:end]
            k = int(count[cells].max())
            place = np.minimum(first[cells][:, None] + np.arange(k), len(self.cell) - 1)
            there = np.arange(k) < count[cells][:, None]
            yield cells, np.where(there, self.observation[place], 0), np.where(there, self.taper[place], 0.0)
            begin = end


def find_neighbours(
    grid: AnyGrid, latitude: np.ndarray, longitude: np.ndarray, localization: float, *, wraps: bool = False
) -> Neighbours:
    """Return which observations act on which cells of a grid.

    Parameters
    ----------
    grid
        Of the state.
    latitude, longitude
        Of the observations in degrees, shape (m,).
    localization
        Distance in metres at which the taper reaches zero.
    wraps
        See `LETKF`.

    Raises
    ------
    GridError
        If a box that wraps is not rectilinear and even, or is the globe.
    """
    at = [np.asarray(a, dtype=float) for a in grid.points()]
    if wraps:
        box, sides = wrapped_box(grid)
        origin = box.latitude[0], box.longitude[0]
        metre = np.radians(1.0) * EARTH_RADIUS
        scale = metre, metre * np.cos(np.radians(box.latitude.mean()))
        cells, places = (
            np.stack([_turned(s * (a - o), side) for s, a, o, side in zip(scale, pair, origin, sides, strict=True)], -1)
            for pair in (at, (latitude, box.locate(longitude)))
        )
        trees = [cKDTree(p, boxsize=sides) for p in (cells, places)]
        found = trees[0].sparse_distance_matrix(trees[1], localization, output_type="coo_matrix")
        distance = found.data
    else:
        reach = 2 * np.sin(min(localization / EARTH_RADIUS, np.pi) / 2)
        trees = [cKDTree(unit_vectors(*pair)) for pair in (at, (latitude, longitude))]
        found = trees[0].sparse_distance_matrix(trees[1], reach, output_type="coo_matrix")
        distance = 2 * EARTH_RADIUS * np.arcsin(np.minimum(found.data / 2, 1.0))
    taper = gaspari_cohn(distance / localization)
    order = np.lexsort((found.col, found.row))
    order = order[taper[order] > NEAREST]
    return Neighbours(found.row[order], found.col[order], taper[order], grid.size)


def wrapped_box(grid: AnyGrid) -> tuple[Grid, list[float]]:
    """Return a grid that wraps, and the metres after which it repeats itself along latitude and longitude; 0 along an axis of one cell.

    Raises
    ------
    GridError
        If it is not rectilinear, cells are not evenly spaced, or go around the globe.
    """
    box = rectilinear(grid, "LETKF(wraps=True)")
    metre = np.radians(1.0) * EARTH_RADIUS
    out = []
    for name, axis, scale in (
        ("latitude", box.latitude, 1.0),
        ("longitude", box.longitude, np.cos(np.radians(box.latitude.mean()))),
    ):
        step = np.diff(axis)
        if len(step) and np.ptp(step) > EVEN * step.mean():
            raise GridError(
                f"LETKF(wraps=True) needs a box with even spacing, and that of {name} goes from {step.min():.4g} to {step.max():.4g} degrees. "
                f"Regrid it, or leave wraps out: distances are then great circles."
            )
        out.append(float(metre * scale * len(axis) * step.mean()) if len(step) else 0.0)
    if box.periodic:
        raise GridError(
            "LETKF(wraps=True) is for a box, and this grid goes around the globe, where great circles do so already. Leave wraps out."
        )
    return box, out


def _turned(place: np.ndarray, side: float) -> np.ndarray:
    """Return places within a side, which rounding could leave."""
    if side == 0:
        return place
    out = place % side
    return np.where(out < side, out, 0.0)


def transform(
    ensemble: np.ndarray,
    observed: np.ndarray,
    value: np.ndarray,
    variance: np.ndarray,
    neighbours: Neighbours | None,
    *,
    entries: int = ENTRIES,
) -> np.ndarray:
    """Return the analysis ensemble.

    Parameters
    ----------
    ensemble
        Background, shape (members, channels, cells).
    observed
        What is observed of each member, shape (members, m).
    value, variance
        Observations and the variances of their independent errors, shape (m,).
    neighbours
        Which observations act where; None: all everywhere.
    entries
        Numbers of one array of a batch of cells; changes time and memory only.
    """
    if not len(value):
        return ensemble
    members = len(ensemble)
    root = np.sqrt(members - 1)
    mean, seen = ensemble.mean(0), observed.mean(0)
    scaled = ((observed - seen) / (root * np.sqrt(variance))).T  # R^(-1/2) S, shape (m, members)
    departure = (value - seen) / np.sqrt(variance)
    anomalies = np.ascontiguousarray(np.moveaxis(ensemble - mean, 0, -1).transpose(1, 0, 2))  # (cells, channels, members)
    if neighbours is None:
        change = _update(anomalies.reshape(1, -1, members), scaled[None], departure[None], root)
        return np.asarray(mean + change.reshape(anomalies.shape).transpose(2, 1, 0))
    out = ensemble.copy()  # where nothing is observed it stays as it is, to the bit
    for cells, rows, taper in neighbours.padded(max(1, entries // max(members, ensemble.shape[1]))):
        weight = np.sqrt(taper)
        change = _update(anomalies[cells], weight[..., None] * scaled[rows], weight * departure[rows], root)
        out[..., cells] = mean[:, cells] + change.transpose(2, 1, 0)
    return out


def _update(anomalies: np.ndarray, a: np.ndarray, departure: np.ndarray, root: float) -> np.ndarray:
    """Return analysis minus background mean of batches of cells, shape (b, channels, members).

    Parameters
    ----------
    anomalies
        Of the background, shape (b, channels, members).
    a, departure
        A and rho^(1/2) R^(-1/2) (y - H(x)), shapes (b, k, members) and (b, k).
    root
        sqrt(members - 1).
    """
    if a.shape[1] <= a.shape[2]:  # few observations, A A^T = U diag(s) U^T, r^2 = 1 + s: I - A^T U diag(1 / (r (r + 1))) U^T A
        s, u = np.linalg.eigh(a @ a.transpose(0, 2, 1))
        s = np.maximum(s, 0.0)
        r = np.sqrt(1 + s)
        modes = u.transpose(0, 2, 1)
        along = anomalies @ (a.transpose(0, 2, 1) @ u)
        change = anomalies - (along / (r * (r + 1))[:, None]) @ (modes @ a)
        shift = (along / root) @ ((modes @ departure[..., None]) / (1 + s)[..., None])
        return np.asarray(change + shift)
    s, v = np.linalg.eigh(a.transpose(0, 2, 1) @ a)
    s = np.maximum(s, 0.0)
    modes = v.transpose(0, 2, 1)
    along = anomalies @ v
    shift = (along / root) @ ((modes @ (a.transpose(0, 2, 1) @ departure[..., None])) / (1 + s)[..., None])
    return np.asarray((along / np.sqrt(1 + s)[:, None]) @ modes + shift)


def random_rotation(members: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random orthogonal matrix that maps the vector of ones to itself, shape (members, members).

    Uniform among these: Haar on the complement of the ones.
    """
    if members < 3:
        return np.eye(members)
    q, r = np.linalg.qr(rng.standard_normal((members - 1, members - 1)))
    inner = np.eye(members)
    inner[1:, 1:] = q * np.sign(np.diag(r))
    # the reflection that takes the first axis to the ones
    axis = np.full(members, members**-0.5)
    axis[0] -= 1
    mirror = np.eye(members) - 2 * np.outer(axis, axis) / (axis @ axis)
    return np.asarray(mirror @ inner @ mirror)


def rotated(ensemble: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Return an ensemble, members first, with its anomalies mixed by a matrix of `random_rotation`."""
    mean = ensemble.mean(0)
    return np.asarray(mean + np.tensordot(rotation, ensemble - mean, axes=1))

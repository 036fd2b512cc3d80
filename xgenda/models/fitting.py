"""Fit a Gaussian to a sample: read it, standardise it, choose localisation, rank and inflation by cross-validation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from xgenda import metadata, states
from xgenda.curvilinear import AnyGrid
from xgenda.diffusion.anchors import LowRank
from xgenda.diffusion.covariances import EARTH_RADIUS, SphereKernel
from xgenda.diffusion.hybrids import channel_correlation
from xgenda.grids import Grid
from xgenda.scaling import CYCLES, Scaling, cycle_basis, cycle_regression, fit_scaling
from xgenda.states import State

LINES = 7  # of a search, which it tells of
INFLATIONS = (0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0)
RANKS = (2, 5, 10, 20, 40, 80)
RADII = 8
SHARE, COMPONENTS = 0.9, 20  # of the variance, and the most principal components that are looked at for memory
RESEMBLES = 0.3  # the correlation of fields that tell of each other
PERIODS = {"none": 0.0, "dayofyear": 365.2425 * 86400, "hour": 86400.0}  # seconds
WORTH = 0.97  # what a cycle must leave less of
HYBRID_KERNELS = ("exponential", "matern32", "matern52")
LENGTHS = 8
WEIGHTS = (0.02, 0.05, 0.15, 0.3, 0.5, 0.75, 1.0)
TAPERED_LIMIT = 20_000  # entries of a state up to which hybrids with a taper are tried, whose modes take a while
PROBES = 150  # observed and predicted cells of one cross-validation fold


def kernel_on(grid: AnyGrid, kind: str, length: float) -> SphereKernel:
    """Return a correlation function on a grid."""
    if not isinstance(grid, Grid):
        latitude, longitude = (torch.as_tensor(p) for p in grid.points())
        return SphereKernel.at(latitude, longitude, kind, length)
    return SphereKernel(torch.as_tensor(grid.latitude), torch.as_tensor(grid.longitude), kind, length, grid.longitude_count)


def correlation_at(grid: AnyGrid, kind: str, length: float, places: Tensor) -> Tensor:
    """Return a correlation function between some cells of a grid, without the preparation of the others."""
    latitude, longitude = (torch.as_tensor(p)[places] for p in grid.points())
    everything = torch.arange(len(places))
    return SphereKernel.at(latitude, longitude, kind, length).correlation(everything, everything)


def read_sample(
    state: State, names: list[str], argument: str = "ds"
) -> tuple[str, np.ndarray, xr.DataArray | None, np.ndarray | None]:
    """Return the sample dimension, the fields (n, channels, ny, nx) in memory and model order, their times, and which cells are valid.

    Cells that are NaN in every field are masked, land in an ocean: they are filled with the mean of the others, and False in the last
    (channels, ny, nx), which is None without a mask.

    Raises
    ------
    OptionError
        If there is not one sample dimension.
    StateError
        If some fields are NaN where others are not.
    """
    ds, layout = state.ds, state.layout
    dimension = states.sample_dimension(state, names, argument)
    arrays, masks = [], []
    for n in names:
        single = [d for d in ds[n].dims if d not in (dimension, *layout.dims)]
        array = ds[n].squeeze(single).transpose(dimension, *layout.dims)
        values = np.asarray(array.values)
        masked = np.isnan(values).all(0)
        if masked.any() and not masked.all():
            values = np.where(masked, values[:, ~masked].mean(), values)
        metadata.check_values(values, n, argument)
        arrays.append(state.orientation.to_model(values))
        masks.append(state.orientation.to_model(~masked))
    time = ds[layout.time] if layout.time is not None and ds[layout.time].dims == (dimension,) else None
    valid = np.stack(masks)
    return dimension, np.stack(arrays, 1).astype(np.float64), time, None if valid.all() else valid


def standardise(scaling: Scaling, values: np.ndarray, time: xr.DataArray | None) -> np.ndarray:
    """Return standardised anomalies, shape (n, channels * cells)."""
    return scaling.forward(values, cycle_basis(time, scaling.cycle, len(values))).reshape(len(values), -1)


def outside(fold: np.ndarray, block: int, gap: int = 0, place: np.ndarray | None = None) -> np.ndarray:
    """Return which fields are neither in a block nor within `gap` of it; `place` counts their times, by default one each."""
    place = np.arange(len(fold)) if place is None else place
    inside = place[fold == block]
    return np.asarray((place < inside.min() - gap) | (place > inside.max() + gap))


def leading_components(z: np.ndarray) -> np.ndarray:
    """Return the normalised principal components of fields (n, state) that hold `SHARE` of their variance, at most so many, shape (k, n)."""
    patterns, power, _ = np.linalg.svd(z - z.mean(0), full_matrices=False)
    count = 1 + int((np.cumsum(power**2) < SHARE * (power**2).sum()).sum())
    return np.asarray(patterns[:, : min(count, COMPONENTS)].T)


def autocorrelation(component: np.ndarray, lag: int) -> float:
    """Return the correlation of a normalised component with itself `lag` fields later."""
    n = len(component)
    return float(component[lag:] @ component[: n - lag]) * n / (n - lag)


def memory_length(z: np.ndarray, fold: np.ndarray) -> int:
    """Return for how many fields the leading components stay correlated, at most half a block: so far do neighbours tell of each other.

    The median of the components, because a trend fills one of them.
    """
    most, found = int(np.bincount(fold).min()) // 2, []
    for p in leading_components(z):
        below = (lag - 1 for lag in range(1, most + 1) if autocorrelation(p, lag) < RESEMBLES)
        found.append(next(below, most))
    return int(np.median(found))


def fit_standardised(
    values: np.ndarray, time: xr.DataArray | None, names: list[str], fold: np.ndarray, climatology: str = "auto",
    observed: np.ndarray | None = None, **options: Any,
) -> tuple[Scaling, np.ndarray]:  # fmt: skip
    """Return a `fit_scaling` with these options, and the standardised anomalies (n, state); 'auto' by `choose_climatology`.

    Where not all values are `observed`, of their shape, the others count for nothing: they may be any that are plausible.
    """
    if observed is not None:
        scaling = fit_scaling(values, time, names, cycle="none", **options)
        z, seen = standardise(scaling, values, time), observed.reshape(len(values), -1)
        climatology = choose_climatology(z, time, fold, seen) if climatology == "auto" else climatology
        basis = cycle_basis(time, climatology, len(values))
        cycle = (basis @ regression(basis, z, seen)).reshape(values.shape)
        # of values that have their cycle where they are missing the fit is that of the others
        values = np.where(observed, values, scaling.inverse(cycle, cycle_basis(time, "none", len(values))))
    scaling = fit_scaling(values, time, names, cycle="none" if climatology == "auto" else climatology, **options)
    z = standardise(scaling, values, time)
    if climatology == "auto" and (cycle := choose_climatology(z, time, fold)) != "none":
        scaling = fit_scaling(values, time, names, cycle=cycle, **options)
        z = standardise(scaling, values, time)
    return scaling, z


def regression(basis: np.ndarray, z: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    """Return the coefficients (k, state) of standardised states (n, state) in a basis (n, k), by least squares.

    Of those that are `seen` where not all are: with a prior of one standard deviation, because some cells are seen a few times only.
    """
    if seen is None:
        return cycle_regression(basis, z)
    k = basis.shape[1]
    products = (basis[:, :, None] * basis[:, None]).reshape(len(basis), -1)
    inner = (products.T @ seen.astype(float)).T.reshape(-1, k, k) + np.eye(k)
    return np.asarray(np.linalg.solve(inner, (basis.T @ np.where(seen, z, 0.0)).T[..., None])[..., 0].T)


def choose_climatology(z: np.ndarray, time: xr.DataArray | None, fold: np.ndarray, seen: np.ndarray | None = None) -> str:
    """Return the cycle that describes withheld blocks of times best.

    It must leave less than `WORTH` of the mean square, in two blocks of three, and the times must go through it twice; else it is 'none'.

    Parameters
    ----------
    z
        Anomalies from the mean, shape (n, state); masked entries zero.
    time
        Of the fields; without one there is no cycle.
    fold
        Number of the block of consecutive times of each field.
    seen
        Which entries count, shape (n, state); None: all.
    """
    if time is None:
        return "none"
    span = float(metadata.seconds_between(np.sort(time.values)).sum())
    folds = int(fold.max()) + 1
    left, ranks = {}, {}
    for cycle in CYCLES:
        basis = cycle_basis(time, cycle, len(z))
        if len(z) * (folds - 1) < 2 * folds * basis.shape[1] or any(span < 2 * PERIODS[c] for c in cycle.split("+")):
            continue
        ranks[cycle] = int(np.linalg.matrix_rank(basis))
        parts = cycle.split("+") if "+" in cycle else ["none"]
        if cycle != "none" and ranks[cycle] <= max(ranks.get(c, 1) for c in parts):
            continue  # always the same hour: rounding would choose
        left[cycle] = np.zeros(folds)
        for k in range(folds):
            rest, block = fold != k, fold == k
            mean = regression(basis[rest], z[rest], None if seen is None else seen[rest])
            wrong = z[block] - basis[block] @ mean
            left[cycle][k] = float(((wrong if seen is None else wrong * seen[block]) ** 2).sum())
    plain = left["none"]
    better = {c: p.sum() for c, p in left.items() if p.sum() < WORTH * plain.sum() and (p < plain).mean() >= 2 / 3}
    return min(better, key=lambda c: float(better[c]), default="none")


class Choice(NamedTuple):
    """A covariance to choose from: 'localized' of a radius, 'eof' of a rank, or 'hybrid' of a length, a weight, a kernel and a radius."""

    kind: str
    size: float
    inflation: float
    weight: float = 0.0
    kernel: str = ""
    radius: float | None = None

    def describe(self) -> str:
        """Return the choice in words."""
        km = f"{self.size / 1e3:.3g} km"
        within = "" if self.radius is None else f" within {self.radius / 1e3:.3g} km"
        shown = {
            "eof": f"rank {self.size:.0f}",
            "localized": f"radius {self.size / 1e3:.0f} km",
            "hybrid": f"{1 - self.weight:.0%} of the sample{within} and {self.weight:.0%} {self.kernel} of {km}",
        }
        return f"{self.kind}, {shown[self.kind]}, inflation {self.inflation:g}"


def candidates(
    kinds: tuple[str, ...],
    grid: AnyGrid,
    shape: tuple[int, ...],
    radius: float | None,
    rank: int | None,
    inflation: float | None,
) -> Iterator[Choice]:
    """Yield choices; what is given is not varied."""
    latitude, longitude = (np.radians(a) for a in grid.points())
    extent = EARTH_RADIUS * 2 * np.arcsin(np.sqrt(_haversine(latitude, longitude).max())) or EARTH_RADIUS  # of a single cell
    inflations = INFLATIONS if inflation is None else (float(inflation),)
    if "localized" in kinds:
        radii = np.geomspace(extent / 12, extent * 2.5, RADII) if radius is None else [float(radius)]
        yield from (Choice("localized", float(r), i) for r, i in itertools.product(radii, inflations))
    if "eof" in kinds:
        ranks = [r for r in RANKS if r < 0.75 * shape[0]] if rank is None else [int(rank)]
        yield from (Choice("eof", float(r), i) for r, i in itertools.product(ranks, inflations))
    if "hybrid" in kinds:
        lengths = np.geomspace(extent / 80, extent / 3, LENGTHS)
        within: list[float | None] = (
            [None] if shape[1] > TAPERED_LIMIT else [None, *np.geomspace(extent / 12, extent * 2.5, RADII).tolist()]
        )
        yield from (
            Choice("hybrid", float(r), i, w, k, t)
            for k, r, w, t, i in itertools.product(HYBRID_KERNELS, lengths, WEIGHTS, within, inflations)
        )


def _haversine(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    i = np.array([0, latitude.argmax(), latitude.argmin(), longitude.argmax(), len(latitude) // 2])
    dy, dx = latitude[i][:, None] - latitude, longitude[i][:, None] - longitude
    return np.asarray(np.clip(np.sin(dy / 2) ** 2 + np.cos(latitude[i])[:, None] * np.cos(latitude) * np.sin(dx / 2) ** 2, 0, 1))


def fit_sample(z: np.ndarray, choice: Choice) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return options and arrays of a Gaussian fitted to standardised fields (n, state)."""
    anomaly, kind, inflation = z - z.mean(0), choice.kind, choice.inflation
    if kind == "eof":
        low_rank = fit_eofs(anomaly, int(choice.size), inflation)
        arrays = {"factor": low_rank.factor, "residual": low_rank.residual}
        return {"covariance": kind, "rank": int(choice.size), "inflation": inflation}, arrays
    options: dict[str, Any] = {"covariance": kind, "inflation": inflation}
    options |= (
        {"radius": choice.size}
        if kind == "localized"
        else {"kernel": choice.kernel, "length": choice.size, "weight": choice.weight}
    )
    if kind == "hybrid" and choice.radius is not None:
        options["radius"] = choice.radius
    return options, {"anomalies": torch.as_tensor(anomaly)}


def fit_eofs(anomaly: np.ndarray, rank: int, inflation: float = 1.0) -> LowRank:
    """Return the leading EOFs of a sample plus the variance they leave, as an uncorrelated residual."""
    return _truncated(*_eofs(anomaly * np.sqrt(inflation / (len(anomaly) - 1))), rank)


def _eofs(scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all EOFs times their standard deviations, shape (state, modes), and the variance of each entry, of anomalies over root n - 1."""
    _, singular, modes = np.linalg.svd(scaled, full_matrices=False)
    return modes.T * singular, (scaled**2).sum(0)


def _truncated(factor: np.ndarray, total: np.ndarray, rank: int) -> LowRank:
    kept = factor[:, :rank]
    residual = np.maximum(total - (kept**2).sum(1), 1e-6 * total)
    return LowRank(torch.as_tensor(kept.copy()), torch.as_tensor(residual))


def search(
    z: np.ndarray,
    grid: AnyGrid,
    choices: list[Choice],
    fold: np.ndarray,
    valid: np.ndarray | None = None,
    basis: np.ndarray | None = None,
    away: np.ndarray | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[Choice, dict[Choice, float]]:
    """Return the best choice by `Validation`, and the scores of those tried.

    The many hybrids are searched along lines: the best kernel and length, the best weight and radius, again, and the best inflation.
    `advance` is called after each of the `LINES` lines, of which the others are one.
    """
    validation = Validation(z, grid, fold, valid, basis, away)
    scores = validation.scores([c for c in choices if c.kind != "hybrid"])
    advance(1 if any(c.kind == "hybrid" for c in choices) else LINES)
    hybrids = [c for c in choices if c.kind == "hybrid"]
    if hybrids:
        at = min(
            hybrids, key=lambda c: (abs(c.weight - 0.3), abs(c.inflation - 1.5), c.radius is not None, c.kernel != "matern32")
        )
        for varied in (
            ("kernel", "size"),
            ("weight", "radius"),
            ("inflation",),
            ("kernel", "size"),
            ("weight", "radius"),
            ("inflation",),
        ):
            kept = [f for f in Choice._fields if f not in varied]
            line = [c for c in hybrids if all(getattr(c, f) == getattr(at, f) for f in kept)]
            scores |= validation.scores([c for c in line if c not in scores])
            at = max(line, key=lambda c: scores[c])
            advance(1)
    return max(scores, key=lambda c: scores[c]), scores


class Validation:
    """The mean log score of covariances over the blocks of consecutive fields that `fold` numbers from 0, on valid cells.

    With the `basis` of a climatology (n, k), that is fitted anew without each block; else the mean is. Which fields it is fitted to, shape
    (blocks, n), is told by `away`; by default all others. Blocks without a field do not count.
    """

    def __init__(
        self, z: np.ndarray, grid: AnyGrid, fold: np.ndarray, valid: np.ndarray | None = None, basis: np.ndarray | None = None,
        away: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        among = np.arange(z.shape[1]) if valid is None else np.flatnonzero(valid)
        basis = np.ones((len(z), 1)) if basis is None else basis
        self.parts = []
        for k in np.unique(fold):
            block, rest = np.flatnonzero(fold == k), np.flatnonzero(fold != k if away is None else away[k])
            probe = np.random.default_rng(k).choice(among, min(2 * PROBES, len(among)), replace=False)
            mean = cycle_regression(basis[rest], z[rest])
            test = z[np.ix_(block, probe)] - basis[block] @ mean[:, probe]
            self.parts.append((_Probe(z[rest] - basis[rest] @ mean, grid, probe), test))

    def scores(self, choices: list[Choice]) -> dict[Choice, float]:
        """Return the score of each choice."""
        total = dict.fromkeys(choices, 0.0)
        for matrix_of, test in self.parts:
            for choice in choices:
                matrix = choice.inflation * matrix_of(choice)
                total[choice] += _log_score(matrix, test, test.shape[1] // 3) / len(self.parts)
        return total


class _Probe:
    """Covariances, without their inflation, between some entries of the state."""

    def __init__(self, anomaly: np.ndarray, grid: AnyGrid, probe: np.ndarray) -> None:
        self.grid, self.index = grid, torch.as_tensor(probe)
        scaled = torch.as_tensor(anomaly) / np.sqrt(len(anomaly) - 1)
        self.sample = (scaled[:, self.index].T @ scaled[:, self.index]).numpy()
        self.place, self.channel = self.index % grid.size, self.index // grid.size
        between = channel_correlation(scaled, (scaled**2).sum(0).sqrt(), anomaly.shape[1] // grid.size)
        std = np.sqrt(np.diag(self.sample))
        self.scale = std[:, None] * between[self.channel][:, self.channel].numpy() * std
        self._made: dict[tuple[str, float], np.ndarray] = {}
        self._eofs = functools.cache(
            lambda: _eofs(anomaly / np.sqrt(len(anomaly) - 1))
        )  # the longest part, the same for all ranks

    def __call__(self, choice: Choice) -> np.ndarray:
        if choice.kind == "eof":
            return self._once(("eof", choice.size))
        radius = choice.size if choice.kind == "localized" else choice.radius
        sample = self.sample if radius is None else self.sample * self._once(("gaspari-cohn", radius))
        if choice.kind == "localized":
            return np.asarray(sample)
        return np.asarray((1 - choice.weight) * sample + choice.weight * self.scale * self._once((choice.kernel, choice.size)))

    def _once(self, key: tuple[str, float]) -> np.ndarray:
        if key not in self._made:
            kind, size = key
            if kind == "eof":
                found = _truncated(*self._eofs(), int(size)).block(self.index, self.index)
            else:
                found = correlation_at(self.grid, kind, size, self.place)
            self._made[key] = found.numpy()
        return self._made[key]


def _log_score(matrix: np.ndarray, test: np.ndarray, seen: int, error: float = 0.3) -> float:
    """Return the mean Gaussian log score of unseen entries given noisy seen ones; noise as large as a typical observation error."""
    rng = np.random.default_rng(0)
    value = test[:, :seen] + error * rng.standard_normal((len(test), seen))
    inner = matrix[:seen, :seen] + error**2 * np.eye(seen)
    gain = np.linalg.solve(inner, matrix[:seen, seen:]).T
    mean = value @ gain.T
    variance = np.maximum(np.diag(matrix)[seen:] - (gain * matrix[seen:, :seen]).sum(1), 1e-6)
    return float(-0.5 * np.mean((test[:, seen:] - mean) ** 2 / variance + np.log(variance)))

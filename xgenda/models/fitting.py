"""Fit a Gaussian to a sample: read it, standardise it, choose localisation, rank and inflation by cross-validation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from xgenda import metadata, states
from xgenda.curvilinear import AnyGrid
from xgenda.diffusion.anchors import LowRank
from xgenda.diffusion.covariances import EARTH_RADIUS, SphereKernel
from xgenda.grids import Grid
from xgenda.scaling import Scaling, cycle_basis
from xgenda.states import State

INFLATIONS = (0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0)
RANKS = (2, 5, 10, 20, 40, 80)
RADII = 8
PROBES = 150  # observed and predicted cells of one cross-validation fold


def kernel_on(grid: AnyGrid, kind: str, length: float) -> SphereKernel:
    """Return a correlation function on a grid."""
    if not isinstance(grid, Grid):
        latitude, longitude = (torch.as_tensor(p) for p in grid.points())
        return SphereKernel.at(latitude, longitude, kind, length)
    return SphereKernel(torch.as_tensor(grid.latitude), torch.as_tensor(grid.longitude), kind, length, grid.longitude_count)


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


Choice = tuple[str, float, float]


def candidates(
    kinds: tuple[str, ...],
    grid: AnyGrid,
    shape: tuple[int, ...],
    radius: float | None,
    rank: int | None,
    inflation: float | None,
) -> Iterator[Choice]:
    """Yield (kind, radius or rank, inflation) to choose from; what is given is not varied."""
    latitude, longitude = (np.radians(a) for a in grid.points())
    extent = EARTH_RADIUS * 2 * np.arcsin(np.sqrt(_haversine(latitude, longitude).max()))
    inflations = INFLATIONS if inflation is None else (float(inflation),)
    if "localized" in kinds:
        radii = np.geomspace(extent / 12, extent * 2.5, RADII) if radius is None else [float(radius)]
        yield from (("localized", float(r), i) for r, i in itertools.product(radii, inflations))
    if "eof" in kinds:
        ranks = [r for r in RANKS if r < 0.75 * shape[0]] if rank is None else [int(rank)]
        yield from (("eof", float(r), i) for r, i in itertools.product(ranks, inflations))


def _haversine(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    i = np.array([0, latitude.argmax(), latitude.argmin(), longitude.argmax(), len(latitude) // 2])
    dy, dx = latitude[i][:, None] - latitude, longitude[i][:, None] - longitude
    return np.asarray(np.clip(np.sin(dy / 2) ** 2 + np.cos(latitude[i])[:, None] * np.cos(latitude) * np.sin(dx / 2) ** 2, 0, 1))


def fit_sample(z: np.ndarray, kind: str, size: float, inflation: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return options and arrays of a Gaussian fitted to standardised fields (n, state)."""
    anomaly = z - z.mean(0)
    if kind == "localized":
        return {"covariance": kind, "radius": size, "inflation": inflation}, {"anomalies": torch.as_tensor(anomaly)}
    low_rank = fit_eofs(anomaly, int(size), inflation)
    return {"covariance": kind, "rank": int(size), "inflation": inflation}, {
        "factor": low_rank.factor,
        "residual": low_rank.residual,
    }


def fit_eofs(anomaly: np.ndarray, rank: int, inflation: float = 1.0) -> LowRank:
    """Return the leading EOFs of a sample plus the variance they leave, as an uncorrelated residual."""
    scaled = anomaly * np.sqrt(inflation / (len(anomaly) - 1))
    _, singular, modes = np.linalg.svd(scaled, full_matrices=False)
    factor = modes[:rank].T * singular[:rank]
    total = (scaled**2).sum(0)
    residual = np.maximum(total - (factor**2).sum(1), 1e-6 * total)
    return LowRank(torch.as_tensor(factor.copy()), torch.as_tensor(residual))


def cross_validate(
    z: np.ndarray, grid: AnyGrid, choices: list[Choice], fold: np.ndarray, valid: np.ndarray | None = None
) -> dict[Choice, float]:
    """Return the mean log score of each choice over the blocks of consecutive fields that `fold` numbers from 0, on valid cells."""
    total = dict.fromkeys(choices, 0.0)
    cells = z.shape[1] // grid.size
    taper = kernel_on(grid, "gaspari-cohn", 1.0)
    folds = int(fold.max()) + 1
    among = np.arange(z.shape[1]) if valid is None else np.flatnonzero(valid)
    for k in range(folds):
        block = np.flatnonzero(fold == k)
        rng = np.random.default_rng(k)
        probe = rng.choice(among, min(2 * PROBES, len(among)), replace=False)
        seen = len(probe) // 3
        rest = np.setdiff1d(np.arange(len(z)), block)
        centre = z[rest].mean(0)
        anomaly, test = (z[rest] - centre)[:, probe], (z[block] - centre)[:, probe]
        sample = anomaly.T @ anomaly / (len(rest) - 1)
        place = torch.as_tensor(probe % (z.shape[1] // cells))
        modes: dict[int, LowRank] = {}
        for kind, size, inflation in choices:
            if kind == "localized":
                taper.length = size
                matrix = sample * taper.correlation(place, place).numpy()
            else:
                if int(size) not in modes:
                    modes[int(size)] = fit_eofs(z[rest] - centre, int(size))
                index = torch.as_tensor(probe)
                matrix = modes[int(size)].block(index, index).numpy()
            total[kind, size, inflation] += _log_score(inflation * matrix, test, seen) / folds
    return total


def _log_score(matrix: np.ndarray, test: np.ndarray, seen: int, error: float = 0.3) -> float:
    """Return the mean Gaussian log score of unseen entries given noisy seen ones; noise as large as a typical observation error."""
    rng = np.random.default_rng(0)
    value = test[:, :seen] + error * rng.standard_normal((len(test), seen))
    inner = matrix[:seen, :seen] + error**2 * np.eye(seen)
    gain = np.linalg.solve(inner, matrix[:seen, seen:]).T
    mean = value @ gain.T
    variance = np.maximum(np.diag(matrix)[seen:] - (gain * matrix[seen:, :seen]).sum(1), 1e-6)
    return float(-0.5 * np.mean((test[:, seen:] - mean) ** 2 / variance + np.log(variance)))

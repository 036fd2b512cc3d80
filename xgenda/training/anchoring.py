"""The Gaussians that training starts from: fitted to all samples, and without each block of times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from xgenda import metadata
from xgenda.diffusion.anchors import Anchor, LowRank, Spectral
from xgenda.diffusion.covariances import LocalisedSample
from xgenda.diffusion.hybrids import LANDMARKS, HybridSample, Parts, hybrid_modes
from xgenda.errors import StateError
from xgenda.formatting import progress_bar
from xgenda.models.fitting import LINES, Choice, candidates, fit_eofs, kernel_on, memory_length, search
from xgenda.scaling import cycle_basis
from xgenda.training.windows import FOLDS, Samples, memory_of, near_blocks, time_order

ANCHORS = ("eof", "hybrid", "localized", "spectral")
FLOOR = 1e-3  # of the power of a correlation in time
HYBRID_LIMIT = 50_000  # entries of a state up to which 'auto' tries a hybrid, whose modes take minutes beyond


def fit_anchors(
    z: np.ndarray,
    samples: Samples,
    fold: np.ndarray,
    kind: str = "eof",
    *,
    crossed: bool = True,
    cycle: str = "none",
    progress: bool | None = False,
) -> tuple[Anchor, list[Anchor], str]:
    """Return the anchor of all samples, one per fold fitted without it (if `crossed`), and a note on the choice.

    `cycle` is the climatology that `z` are anomalies of; it is fitted anew without each fold, and without its neighbours that resemble it.
    """
    cells = samples.grid.size
    basis = cycle_basis(samples.time, cycle, len(z))
    gap = memory_length(z, fold) if samples.time is None else memory_of(z, samples.time)
    away = ~near_blocks(fold, samples.time, gap) & (fold != np.arange(FOLDS)[:, None])
    if away.sum(1).min() < 2:
        raise StateError(
            f"ds has {len(z)} fields at so few or so similar times ({samples.period}) that none are left to train on without each block of times. "
            f"Give fields over a longer time."
        )
    others = [*away] if crossed else []
    parts = [_anomaly(z[rows], basis[rows]) for rows in others]
    everything = z - z.mean(0)
    if kind == "spectral":
        shape = (-1, z.shape[1] // cells, *samples.grid.plane)
        fit = [Spectral.fit(torch.as_tensor(p).reshape(shape)) for p in [everything, *parts]]
        return fit[0], list(fit[1:]), "spectral"
    tried = ("hybrid", "eof") if z.shape[1] <= HYBRID_LIMIT else ("eof",)
    kinds = tried if kind == "auto" else (kind,)
    choices = list(candidates(kinds, samples.grid, z.shape, None, None, None))
    built = []
    with progress_bar(LINES + 1 + len(parts), progress, "fitting the Gaussian") as advance:
        choice, _ = search(z, samples.grid, choices, fold, samples.valid, basis, away, advance)
        for anchor in _anchors_of([everything, *parts], samples, choice):
            built.append(anchor)
            advance(1)
    return built[0], built[1:], choice.describe()


def _anomaly(z: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return np.asarray(z - basis @ np.linalg.lstsq(basis, z, rcond=None)[0])


def _anchors_of(anomalies: list[np.ndarray], samples: Samples, choice: Choice) -> Iterator[Anchor]:
    shared: Parts | None = None
    for anomaly in anomalies:
        if choice.kind == "eof":
            yield fit_eofs(anomaly, int(choice.size), choice.inflation)
        elif choice.kind == "localized":
            taper = kernel_on(samples.grid, "gaspari-cohn", choice.size)
            yield LowRank.of(LocalisedSample(torch.as_tensor(anomaly), taper, choice.inflation))
        else:
            kernel = kernel_on(samples.grid, choice.kernel, choice.size)
            within = None if choice.radius is None else kernel_on(samples.grid, "gaspari-cohn", choice.radius)
            hybrid = HybridSample(torch.as_tensor(anomaly), kernel, choice.weight, choice.inflation, within)
            if hybrid.size > LANDMARKS and shared is None:
                shared = Parts.of(hybrid)
            modes = hybrid_modes(hybrid, parts=shared)
            if shared is not None and shared.start is None:
                shared = replace(shared, start=modes.factor)
            yield modes


def correlation_in_time(z: np.ndarray, samples: Samples, fold: np.ndarray, window: int, without: int | None) -> torch.Tensor:
    """Return the correlation of states 0 to window - 1 steps apart, over all cells and variables and all blocks but one.

    Of pairs that are so many steps apart, not those on either side of a gap; lowered at all lags alike where the sequence is that of no process.
    """
    assert samples.time is not None
    order, total, count = time_order(samples.time, len(z)), np.zeros(window), np.zeros(window)
    steps = metadata.seconds_between(samples.time.values[order])
    run = np.concatenate([[0], np.cumsum((steps > 1.01 * np.median(steps)) | (np.diff(fold[order]) != 0))])
    for r in np.unique(run):
        rows = order[run == r]
        if fold[rows[0]] == without:
            continue
        for lag in range(min(window, len(rows))):
            total[lag] += float((z[rows[lag:]] * z[rows[: len(rows) - lag]]).sum())
            count[lag] += len(rows) - lag
    found = np.where(count > 0, total / np.maximum(count, 1), 0.0)
    found = found / found[0] if found[0] > 0 else np.eye(window)[0]  # of states that are all the same nothing is known
    while np.linalg.eigvalsh(found[np.abs(np.subtract.outer(np.arange(window), np.arange(window)))])[0] < FLOOR:
        found[1:] *= 0.99
    return torch.as_tensor(found)

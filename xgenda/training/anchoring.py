"""The Gaussians that training starts from: fitted to all samples, and without each block of times."""

from __future__ import annotations

import numpy as np
import torch

from xgenda.diffusion.anchors import Anchor, LowRank, Spectral
from xgenda.diffusion.covariances import LocalisedSample
from xgenda.models.fitting import Choice, candidates, cross_validate, fit_eofs, kernel_on
from xgenda.training.windows import FOLDS, Samples, time_order

ANCHORS = ("eof", "localized", "spectral")
LOCALIZED_LIMIT = 2500  # cells up to which 'auto' tries the localised covariance, whose eigenvectors are a dense matrix


def fit_anchors(
    z: np.ndarray, samples: Samples, fold: np.ndarray, kind: str = "eof", *, crossed: bool = True
) -> tuple[Anchor, list[Anchor], str]:
    """Return the anchor of all samples, one per fold fitted without it (if `crossed`), and a note on the choice."""
    cells = samples.grid.size
    parts = [z[fold != k] - z[fold != k].mean(0) for k in range(FOLDS)] if crossed else []
    everything = z - z.mean(0)
    if kind == "spectral":
        shape = (-1, z.shape[1] // cells, *samples.grid.plane)
        fit = [Spectral.fit(torch.as_tensor(p).reshape(shape)) for p in [everything, *parts]]
        return fit[0], list(fit[1:]), "spectral"
    kinds: tuple[str, ...] = (kind,)
    if kind == "auto":
        kinds = ("localized", "eof") if z.shape[1] <= LOCALIZED_LIMIT else ("eof",)
    scores = cross_validate(
        z, samples.grid, list(candidates(kinds, samples.grid, z.shape, None, None, None)), fold, samples.valid
    )
    choice: Choice = max(scores, key=lambda c: scores[c])
    built = [_anchor_of(p, samples, choice) for p in [everything, *parts]]
    size = f"rank {int(choice[1])}" if choice[0] == "eof" else f"radius {choice[1] / 1e3:.0f} km"
    return built[0], list(built[1:]), f"{choice[0]}, {size}, inflation {choice[2]:g}"


def _anchor_of(anomaly: np.ndarray, samples: Samples, choice: Choice) -> Anchor:
    kind, size, inflation = choice
    if kind == "eof":
        return fit_eofs(anomaly, int(size), inflation)
    taper = kernel_on(samples.grid, "gaspari-cohn", size)
    return LowRank.of(LocalisedSample(torch.as_tensor(anomaly), taper, inflation))


def correlation_in_time(z: np.ndarray, samples: Samples, fold: np.ndarray, window: int, without: int | None) -> torch.Tensor:
    """Return the correlation of states 0 to window - 1 steps apart, over all cells and variables and all blocks but one.

    Sums over pairs are divided by the same number at all lags, which makes the sequence that of some process.
    """
    order, total = time_order(samples.time, len(z)), np.zeros(window)
    for k in range(FOLDS):
        states = z[order[fold[order] == k]]
        if k != without:
            total += [float((states[lag:] * states[: len(states) - lag]).sum()) for lag in range(window)]
    return torch.as_tensor(total / total[0])

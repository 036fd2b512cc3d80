r"""The classical mean of a downscaler: a linear map from the coarse fields, chosen by cross-validation.

Five kinds, the first four each one more general than the one before, because a sample is often too small for the better ones:

- ``interpolation``: the matching coarse anomaly, interpolated;
- ``local``: each fine cell regressed on all coarse fields interpolated to it;
- ``ridge``: what interpolation leaves, regressed on all coarse fields everywhere;
- ``covariance``: the conditional mean S B^T (B S B^T)^-1 c of a Gaussian with localised sample covariance S, given block means c = B x;
- ``homogeneous``: the same with the homogeneous covariance of fields on a doubly periodic box, fitted in spectral space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xgenda.diffusion.anchors import Spectral, SpectralConditional
from xgenda.diffusion.covariances import DENSE_LIMIT
from xgenda.grids import Grid
from xgenda.models.blocks import Blocks
from xgenda.models.fitting import kernel_on

KINDS = ("interpolation", "local", "ridge", "covariance", "homogeneous")
PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(-1.0, 4.1, 0.5))
LOCAL_PENALTIES = (1.0, 10.0, 100.0)
RADII_KM = (500.0, 1000.0, 1500.0, 2000.0, 3000.0, 4000.0, 6000.0, 10000.0)
NUGGET = 1e-6
LARGEST = 50_000_000  # numbers in a map from everywhere to everywhere
RANK = 256
PROBES = 20_000  # fine cells that choose the penalty

Place = tuple[np.ndarray, np.ndarray]  # rows and columns of a window of the fine grid


@dataclass(frozen=True, eq=False)
class LinearMean:
    """offset + slope . (coarse fields interpolated) + up (down (coarse fields everywhere)), all standardised.

    Parameters
    ----------
    shape
        Channels, rows and columns of the fine fields.
    slope
        Shape (channels, inputs, rows or 1, columns or 1), or None.
    offset
        Shape (channels, rows, columns), or None.
    up, down
        Shapes (channels, rows, columns, k) and (k, inputs * coarse cells), or None.
    """

    shape: tuple[int, int, int]
    slope: Tensor | None = None
    offset: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Whether the mean is zero whatever the input."""
        return self.slope is None and self.offset is None and self.up is None

    def at(self, coarse: Tensor, interpolated: Tensor, place: Place) -> Tensor:
        """Return the mean in a window, shape (t, channels, rows, columns), float64.

        Parameters
        ----------
        coarse
            Standardised, shape (t, inputs, coarse cells).
        interpolated
            The same on the window, shape (t, inputs, rows, columns).
        """
        rows, columns = (torch.as_tensor(p) for p in place)
        out = torch.zeros(len(coarse), self.shape[0], len(rows), len(columns), dtype=torch.float64)

        def cut(array: Tensor) -> Tensor:
            if array.shape[-2] > 1:
                array = array.index_select(-2, rows)
            return array.index_select(-1, columns) if array.shape[-1] > 1 else array

        if self.slope is not None:
            slope = cut(self.slope).double()
            for k in range(slope.shape[1]):  # one input after the other: their product would not fit for many
                out += slope[:, k] * interpolated[:, k, None].double()
        if self.offset is not None:
            out += cut(self.offset)
        if self.up is not None:
            flat = coarse.flatten(1).double()
            flat = flat if self.down is None else flat @ self.down.T.double()
            up = self.up.index_select(1, rows).index_select(2, columns)
            out += torch.einsum("cyxk,tk->tcyx", up.double(), flat)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Return what there is to store."""
        parts = {"slope": self.slope, "offset": self.offset, "up": self.up, "down": self.down}
        return {f"mean.{k}": v.float() for k, v in parts.items() if v is not None}

    @classmethod
    def from_tensors(cls, shape: tuple[int, int, int], tensors: dict[str, Tensor]) -> LinearMean:
        """Rebuild the mean, taking its tensors out of the mapping."""
        parts = {k: tensors.pop(f"mean.{k}", None) for k in ("slope", "offset", "up", "down")}
        return cls(shape, **parts)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Standardised training pairs, as `fit_mean` takes them.

    Attributes
    ----------
    coarse
        Shape (n, inputs, coarse cells), float64.
    interpolated
        Shape (n, inputs, rows, columns), float32.
    fine
        Shape (n, channels, rows, columns), float64.
    fold
        Block of each pair, shape (n,).
    matched
        For each channel the input that is the same variable at the same time, and the ratio of their standard deviations; None where
        there is none, or one of them is a logarithm.
    blocks, grid
        Where the coarse cells are blocks of fine ones.
    wraps
        Whether the grid is a doubly periodic box where all places are alike.
    near
        Which pairs of other blocks are too near to each block in time to help predict it, shape (blocks, n).
    """

    coarse: Tensor
    interpolated: Tensor
    fine: Tensor
    fold: np.ndarray
    matched: Sequence[tuple[int, float] | None]
    blocks: Blocks | None = None
    grid: Grid | None = None
    wraps: bool = False
    near: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows, columns."""
        c, ny, nx = self.fine.shape[1:]
        return c, ny, nx

    def without(self, k: int) -> np.ndarray:
        """Return which pairs are in other blocks, and not near to this one."""
        apart = self.fold != k
        return np.asarray(apart if self.near is None else apart & ~self.near[k])

    def split(self, k: int) -> tuple[Tensor, Tensor]:
        """Return which pairs to fit to for the predictions of a block, and which pairs are in it."""
        return torch.as_tensor(self.without(k)), torch.as_tensor(self.fold == k)

    def less(self, k: int) -> Pairs:
        """Return the pairs of the other blocks, which are numbered anew."""
        rows = self.without(k)
        left, fold = np.unique(self.fold[rows], return_inverse=True)
        chosen = {n: getattr(self, n)[torch.as_tensor(rows)] for n in ("coarse", "interpolated", "fine")}
        near = None if self.near is None else self.near[left][:, rows]
        return dataclasses.replace(self, fold=fold, near=near, **chosen)


def fit_mean(pairs: Pairs, kinds: Sequence[str] = KINDS, *, always: bool = False) -> tuple[LinearMean, Tensor, str, str]:
    """Return the mean that predicts withheld blocks best, its predictions of each pair by a fit without its block, its kind, and a note.

    Parameters
    ----------
    kinds
        Which to choose from; those that do not apply, or are too large, are left out.
    always
        Whether to return the best of them even where the climate predicts withheld blocks better.
    """
    best: tuple[float, LinearMean, Tensor, str, str] | None = None
    for kind in kinds:
        for mean, crossed, note in _FITS[kind](pairs):
            loss = float((crossed - pairs.fine).square().mean())
            if best is None or loss < best[0]:
                best = loss, mean, crossed, kind, note
    nothing = torch.zeros_like(pairs.fine)
    if best is None or (not always and best[0] >= float(pairs.fine.square().mean())):
        return LinearMean(pairs.shape), nothing, "none", "none: no linear map predicts withheld blocks better than the climate"
    return best[1:]


Fit = tuple[LinearMean, Tensor, str]


def interpolated_mean(pairs: Pairs) -> LinearMean | None:
    """Return interpolation of the matching anomalies; None where no channel has one."""
    if all(m is None for m in pairs.matched):
        return None
    slope = torch.zeros(pairs.shape[0], pairs.coarse.shape[1], 1, 1, dtype=torch.float64)
    for c, match in enumerate(pairs.matched):
        if match is not None:
            slope[c, match[0]] = match[1]
    return LinearMean(pairs.shape, slope)


def everywhere(pairs: Pairs) -> Place:
    """Return the whole fine grid as a window."""
    return np.arange(pairs.shape[1]), np.arange(pairs.shape[2])


def _interpolation(pairs: Pairs) -> list[Fit]:
    mean = interpolated_mean(pairs)
    if mean is None:
        return []
    return [(mean, mean.at(pairs.coarse, pairs.interpolated, everywhere(pairs)), "interpolation")]


def _local(pairs: Pairs) -> list[Fit]:
    """Regress each fine cell on all inputs at the cell, with a penalty on what differs from nothing."""
    out: list[Fit] = []
    for penalty in LOCAL_PENALTIES:
        crossed = torch.zeros_like(pairs.fine)
        for k in range(int(pairs.fold.max()) + 1):
            inside, test = pairs.split(k)
            mean = _local_fit(pairs, inside, penalty)
            crossed[test] = mean.at(pairs.coarse[test], pairs.interpolated[test], everywhere(pairs))
        out.append(
            (
                _local_fit(pairs, torch.ones(len(pairs.fold), dtype=torch.bool), penalty),
                crossed,
                f"local regression, penalty {penalty:g}",
            )
        )
    return out


def _local_fit(pairs: Pairs, rows: Tensor, penalty: float) -> LinearMean:
    channels, ny, nx = pairs.shape
    slope = torch.empty(channels, pairs.coarse.shape[1], ny, nx, dtype=torch.float64)
    for j in range(ny):  # row by row: the normal equations of all cells at once would not fit for many inputs
        x = pairs.interpolated[rows, :, j].double().permute(2, 0, 1)  # cells, n, inputs
        y = pairs.fine[rows, :, j].permute(2, 0, 1)
        inner = x.transpose(1, 2) @ x + penalty * torch.eye(x.shape[2], dtype=torch.float64)
        slope[:, :, j] = torch.linalg.solve(inner, x.transpose(1, 2) @ y).permute(2, 1, 0)
    return LinearMean(pairs.shape, slope)


def _rank(pairs: Pairs) -> int:
    return min(len(pairs.coarse), pairs.coarse[0].numel(), RANK)


def too_large_for_ridge(pairs: Pairs) -> bool:
    """Whether a map from all coarse fields to all fine cells would have too many numbers."""
    return int(np.prod(pairs.shape)) * _rank(pairs) > LARGEST


def _ridge(pairs: Pairs) -> list[Fit]:
    """Regress what interpolation leaves on all coarse fields, by the singular vectors of the inputs."""
    x, cells, rank = pairs.coarse.flatten(1), int(np.prod(pairs.shape)), _rank(pairs)
    if too_large_for_ridge(pairs):
        return []
    base = interpolated_mean(pairs)
    left = pairs.fine if base is None else pairs.fine - base.at(pairs.coarse, pairs.interpolated, everywhere(pairs))
    y = left.flatten(1)
    chosen = torch.as_tensor(np.random.default_rng(0).choice(cells, min(PROBES, cells), replace=False))
    folds = [pairs.split(k) for k in range(int(pairs.fold.max()) + 1)]
    vectors = [_singular(x[inside], rank) for inside, _ in folds]
    loss = dict.fromkeys(PENALTIES, 0.0)
    for (inside, test), (u, s, v) in zip(folds, vectors, strict=True):
        seen, probe, truth = u.T @ y[inside][:, chosen], x[test] @ v, y[test][:, chosen]
        for penalty in PENALTIES:
            loss[penalty] += float((probe @ ((s / (s**2 + penalty))[:, None] * seen) - truth).square().sum())
    best = min(PENALTIES, key=lambda p: loss[p])
    crossed = pairs.fine - left
    for (inside, test), (u, s, v) in zip(folds, vectors, strict=True):
        crossed[test] += ((x[test] @ v) @ ((s / (s**2 + best))[:, None] * (u.T @ y[inside]))).reshape(-1, *pairs.shape)
    u, s, v = _singular(x, rank)
    up = ((s / (s**2 + best))[:, None] * (u.T @ y)).T.reshape(*pairs.shape, -1)
    mean = LinearMean(pairs.shape, None if base is None else base.slope, None, up.contiguous(), v.T.contiguous())
    return [(mean, crossed, f"ridge regression, penalty {best:g}")]


def _singular(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank].T


def _covariance(pairs: Pairs) -> list[Fit]:
    """Condition a Gaussian with a localised sample covariance on block means; the radius predicts withheld blocks best."""
    channels, ny, nx = pairs.shape
    matched = [m for m in pairs.matched if m is not None]
    if pairs.blocks is None or pairs.grid is None or channels * ny * nx > DENSE_LIMIT:
        return []
    if not len(matched) == pairs.coarse.shape[1] == channels:
        return []
    means = torch.block_diag(*[pairs.blocks.matrix()] * channels)
    ratio = torch.tensor([r for _, r in matched], dtype=torch.float64)
    order = [i for i, _ in matched]
    cells = torch.arange(pairs.grid.size)
    values = pairs.fine.flatten(1)
    given = (pairs.coarse[:, order] * ratio[:, None]).flatten(1)
    kernels = {
        r: kernel_on(pairs.grid, "gaspari-cohn", r * 1e3).correlation(cells, cells).repeat(channels, channels) for r in RADII_KM
    }
    loss = dict.fromkeys(RADII_KM, 0.0)
    crossed = {r: torch.zeros_like(values) for r in RADII_KM}
    for k in range(int(pairs.fold.max()) + 1):
        inside, test = pairs.split(k)
        anomaly = values[inside] - values[inside].mean(0)
        sample = anomaly.T @ anomaly / (len(anomaly) - 1)
        for radius, taper in kernels.items():
            crossed[radius][test] = given[test] @ _map_of(sample * taper, means).T
            loss[radius] += float((crossed[radius][test] - values[test]).square().sum())
    best = min(loss, key=lambda r: loss[r])
    anomaly = values - values.mean(0)
    matrix = _map_of(anomaly.T @ anomaly / (len(anomaly) - 1) * kernels[best], means)
    mean = LinearMean(pairs.shape, up=_placed(matrix, order, ratio).reshape(*pairs.shape, -1))
    return [(mean, crossed[best].reshape(pairs.fine.shape), f"localised covariance, radius {best:g} km")]


def _homogeneous(pairs: Pairs) -> list[Fit]:
    """Condition the homogeneous covariance of fields on a doubly periodic box on block means."""
    channels = pairs.shape[0]
    matched = [m for m in pairs.matched if m is not None]
    if not pairs.wraps or pairs.blocks is None or not len(matched) == pairs.coarse.shape[1] == channels:
        return []
    count = channels * pairs.blocks.shape[0] * pairs.blocks.shape[1]
    if pairs.fine[0].numel() * count > LARGEST:
        return []
    means = torch.block_diag(*[pairs.blocks.matrix()] * channels)
    ratio = torch.tensor([r for _, r in matched], dtype=torch.float64)
    order = [i for i, _ in matched]

    def fit(fine: Tensor) -> Tensor:
        spread = SpectralConditional(Spectral.fit(fine - fine.mean((0, 2, 3), keepdim=True)).spectrum, pairs.shape, 1.0)
        cross = spread.multiply(means).T
        return _placed(_solved(cross, means @ cross), order, ratio)

    crossed = torch.empty_like(pairs.fine)
    for k in range(int(pairs.fold.max()) + 1):
        inside, test = pairs.split(k)
        crossed[test] = (pairs.coarse[test].flatten(1) @ fit(pairs.fine[inside]).T).reshape(-1, *pairs.shape)
    return [(LinearMean(pairs.shape, up=fit(pairs.fine).reshape(*pairs.shape, -1)), crossed, "homogeneous covariance")]


def _placed(matrix: Tensor, order: list[int], ratio: Tensor) -> Tensor:
    """Return a map (cells, channels x blocks) of block means of the fine fields as one of the coarse inputs."""
    blocks = matrix.shape[1] // len(ratio)
    placed = torch.empty_like(matrix).reshape(-1, len(ratio), blocks)
    placed[:, order] = (matrix * ratio.repeat_interleave(blocks)).reshape(placed.shape)
    return placed.reshape(matrix.shape)


def _map_of(covariance: Tensor, means: Tensor) -> Tensor:
    """Return S B^T (B S B^T)^-1."""
    cross = covariance @ means.T
    return _solved(cross, means @ cross)


def _solved(cross: Tensor, inner: Tensor) -> Tensor:
    inner = inner + NUGGET * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
    found: Tensor = torch.linalg.solve(inner, cross.T)
    return found.T


_FITS = {
    "interpolation": _interpolation,
    "local": _local,
    "ridge": _ridge,
    "covariance": _covariance,
    "homogeneous": _homogeneous,
}

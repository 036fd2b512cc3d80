r"""A sample covariance blended with a covariance function, and its leading modes.

S = i ((1 - w) X^T X / (N - 1) + w D (R x C) D): the sample X of N fields knows what moves together, on any scale and between variables, but has
only N directions; the function C of distance fills the others with smooth fields of the sample's own local variance D^2 and with its mean
correlation R between channels. Variances are those of the sample whatever the weight w (Hamill and Snyder 2000, Mon. Weather Rev. 128,
2905-2919, with a function of distance in the place of their climatological covariance).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xgenda.diffusion.anchors import Modes
from xgenda.diffusion.covariances import SphereKernel, matrix_root
from xgenda.diffusion.noise import NoiseStream

LANDMARKS = 1500  # cells up to which the modes of a covariance function are exact
COLUMNS = 1600  # of the factor of which the leading modes are taken
STORED = 3 * 2**19  # elements of a stored factor: 6 MB
FEWEST_MODES, MOST_MODES = 80, 600


class HybridSample:
    """S = inflation ((1 - weight) X^T X / (N - 1) + weight D (R x C) D).

    Parameters
    ----------
    anomalies
        X, the sample minus its mean, shape (N, n), channels one after the other.
    kernel
        C, a correlation function between the cells.
    weight
        w, between 0 and 1.
    inflation
        Factor on the covariance.
    """

    def __init__(self, anomalies: Tensor, kernel: SphereKernel, weight: float, inflation: float = 1.0) -> None:
        scaled = anomalies.double() * math.sqrt(inflation / (len(anomalies) - 1))
        self.size, self.kernel = scaled.shape[1], kernel
        self.std = (scaled**2).sum(0).sqrt()
        self.sample = scaled * math.sqrt(1 - weight)
        self.spread = self.std * math.sqrt(weight)
        self.between = channel_correlation(scaled, self.std, self.size // kernel.size)

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return S[rows][:, columns]."""
        cells = self.kernel.size
        across = self.between[rows // cells][:, columns // cells] * self.kernel.correlation(rows % cells, columns % cells)
        return self.sample[:, rows].T @ self.sample[:, columns] + self.spread[rows, None] * across * self.spread[columns]

    def diagonal(self) -> Tensor:
        """Return the variances."""
        return self.std**2

    def draw(self, noise: NoiseStream) -> Tensor:
        """Draw one field per sample."""
        weights = noise.normal(len(self.sample), dtype=torch.float64)
        smooth = self.kernel.draw(noise, fields=len(self.between))
        mixed = torch.einsum("cd,sdn->scn", matrix_root(self.between), smooth)
        return weights @ self.sample + self.spread * mixed.flatten(1)


def channel_correlation(anomalies: Tensor, std: Tensor, channels: int) -> Tensor:
    """Return the correlation of channels at one place, averaged over places, shape (channels, channels); at least positive semi-definite.

    Parameters
    ----------
    anomalies
        Scaled so that their squares sum to the variances, shape (N, n).
    std
        Shape (n,); places where it is zero in any channel do not count.
    channels
        Number of channels.
    """
    counted = (std.reshape(channels, -1) > 0).all(0)
    if channels == 1 or not bool(counted.any()):
        return torch.eye(channels, dtype=torch.float64)
    unit = (anomalies / std.clamp(min=1e-300)).reshape(len(anomalies), channels, -1)[..., counted]
    mean = torch.einsum("scn,sdn->cd", unit, unit) / int(counted.sum())
    scale = torch.diagonal(mean).sqrt()
    return mean / torch.outer(scale, scale)


def kernel_modes(kernel: SphereKernel, count: int) -> Tensor:
    """Return the leading modes M of a correlation function, C ~ M M^T, shape (cells, count or fewer).

    On more than `LANDMARKS` cells by the Nystrom approximation from that many of them, which never exceeds C.
    """
    everything = torch.arange(kernel.size)
    if kernel.size <= LANDMARKS:
        power, vectors = torch.linalg.eigh(kernel.correlation(everything, everything))
        return vectors[:, -count:] * power[-count:].clamp(min=0.0).sqrt()
    some = torch.randperm(kernel.size, generator=torch.Generator().manual_seed(0))[:LANDMARKS].sort().values
    power, vectors = torch.linalg.eigh(kernel.correlation(some, some))
    kept = power > 1e-6 * power[-1]
    root = vectors[:, kept] / power[kept].sqrt()
    half = torch.cat([kernel.correlation(part, some) @ root for part in everything.split(2048)])
    return leading(half, count)


def leading(factor: Tensor, count: int) -> Tensor:
    """Return the leading orthogonal columns of a factor: G G^T is the best approximation of F F^T of that rank."""
    _, vectors = torch.linalg.eigh(factor.T @ factor)
    return factor @ vectors[:, -count:]


def most_modes(size: int) -> int:
    """Return how many modes of a state of this size are kept."""
    return min(max(FEWEST_MODES, min(MOST_MODES, STORED // size)), size)


def hybrid_modes(hybrid: HybridSample, modes: Tensor | None = None, count: int | None = None) -> Modes:
    """Return the leading modes of a hybrid covariance, and what they leave as one variance for all cells: the total is exact.

    Parameters
    ----------
    hybrid
        The covariance.
    modes
        Those of its kernel (`kernel_modes`), where they are at hand.
    count
        How many to keep; by default as many as can be stored.
    """
    channels = len(hybrid.between)
    modes = kernel_modes(hybrid.kernel, mode_columns(channels)) if modes is None else modes
    root = matrix_root(hybrid.between)
    smooth = torch.einsum("cd,nk->cndk", root, modes).reshape(hybrid.size, -1) * hybrid.spread[:, None]
    factor = leading(torch.cat([hybrid.sample.T, smooth], 1), most_modes(hybrid.size) if count is None else count)
    left = float(((hybrid.std**2).sum() - (factor**2).sum()) / hybrid.size)
    return Modes(factor, max(left, 1e-6 * float((hybrid.std**2).mean())))


def mode_columns(channels: int) -> int:
    """Return how many modes of a covariance function are worked with, for a number of channels."""
    return max(20, COLUMNS // channels)

r"""A sample covariance, tapered or not, blended with a covariance function; and the leading modes of the blend.

S = i ((1 - w) (X^T X / (N - 1)) o T + w D (R x C) D): the sample X of N fields knows what moves together, on any scale and between variables,
but has only N directions; the taper T takes from it what is far apart and not to be trusted; the function C of distance fills in smooth fields
of the sample's own local variance D^2 and with its mean correlation R between channels. Variances are those of the sample whatever w and T
(Hamill and Snyder 2000, Mon. Weather Rev. 128, 2905-2919, with a function of distance in the place of their climatological covariance).

The tapered sample is applied by modulation: with T = M M^T it is the covariance of the N r fields x_k o m_j (Bishop and Hodyss 2009, Tellus A 61,
84-96).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xgenda.diffusion.anchors import Modes
from xgenda.diffusion.covariances import SphereKernel, draw_tapered, matrix_root
from xgenda.diffusion.noise import NoiseStream

LANDMARKS = 2000  # cells up to which the modes of a covariance, and states up to which those of a blend, are exact
COLUMNS = 1600  # modes of covariance functions of all channels together
WORKED = 2**25  # elements of the modes of a covariance function: 268 MB
TAPER_SHARE, TAPER_MODES = 0.99, 200  # of the trace of a taper, and the most modes for it
STORED = 3 * 2**19  # elements of a stored factor: 6 MB
FEWEST_MODES, MOST_MODES, BEYOND = 80, 600, 10


class HybridSample:
    """S = inflation ((1 - weight) (X^T X / (N - 1)) o T + weight D (R x C) D).

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
    taper
        T, of kind 'gaspari-cohn'; None for a sample that is trusted at all distances.
    """

    def __init__(
        self, anomalies: Tensor, kernel: SphereKernel, weight: float, inflation: float = 1.0, taper: SphereKernel | None = None
    ) -> None:
        scaled = anomalies.double() * math.sqrt(inflation / (len(anomalies) - 1))
        self.size, self.kernel, self.taper = scaled.shape[1], kernel, taper
        self.std = (scaled**2).sum(0).sqrt()
        self.sample = scaled * math.sqrt(1 - weight)
        self.spread = self.std * math.sqrt(weight)
        self.between = channel_correlation(scaled, self.std, self.size // kernel.size)

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return S[rows][:, columns]."""
        cells = self.kernel.size
        a, b = rows % cells, columns % cells
        out = self.sample[:, rows].T @ self.sample[:, columns]
        if self.taper is not None:
            out *= self.taper.correlation(a, b)
        across = self.between[rows // cells][:, columns // cells] * self.kernel.correlation(a, b)
        return out + self.spread[rows, None] * across * self.spread[columns]

    def diagonal(self) -> Tensor:
        """Return the variances."""
        return self.std**2

    def draw(self, noise: NoiseStream) -> Tensor:
        """Draw one field per sample."""
        smooth = self.kernel.draw(noise, fields=len(self.between))
        mixed = self.spread * torch.einsum("cd,sdn->scn", matrix_root(self.between), smooth).flatten(1)
        if self.taper is None:
            return mixed + noise.normal(len(self.sample), dtype=torch.float64) @ self.sample
        return mixed + draw_tapered(self.sample, self.taper, noise)


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
    out: Tensor = mean / torch.outer(scale, scale)
    return out


def kernel_modes(kernel: SphereKernel, count: int, places: Tensor | None = None) -> Tensor:
    """Return the leading modes M of a correlation function, C ~ M M^T, shape (cells, count or fewer).

    On more than `LANDMARKS` cells by the Nystrom approximation from that many of them, or of `places`, which never exceeds C.
    """
    everything = torch.arange(kernel.size)
    if kernel.size <= LANDMARKS:
        power, vectors = torch.linalg.eigh(kernel.correlation(everything, everything))
        exact: Tensor = vectors[:, -count:] * power[-count:].clamp(min=0.0).sqrt()
        return exact
    places = everything if places is None else places
    some = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:LANDMARKS].sort().values]
    power, vectors = torch.linalg.eigh(kernel.correlation(some, some))
    kept = torch.nonzero(power > 1e-6 * power[-1])[-count:, 0]
    root = vectors[:, kept] / power[kept].sqrt()
    return torch.cat([kernel.correlation(part, some) @ root for part in everything.split(2048)])


def most_modes(size: int) -> int:
    """Return how many modes of a state of this size are kept."""
    return min(max(FEWEST_MODES, min(MOST_MODES, STORED // size)), size)


def taper_modes(taper: SphereKernel, places: Tensor | None = None) -> Tensor:
    """Return the leading modes of a taper, each row scaled to a length of one: the variances of what is tapered stay."""
    modes = kernel_modes(taper, TAPER_MODES, places).flip(1)
    share = (modes**2).sum(0).cumsum(0) / taper.size
    modes = modes[:, : int((share < TAPER_SHARE).sum()) + 1]
    out: Tensor = modes / modes.norm(dim=1, keepdim=True)
    return out


class Product:
    """S v of a `HybridSample`, from modes of its kernel and of its taper, in single precision.

    Parameters
    ----------
    hybrid
        The covariance.
    modes, taper
        `kernel_modes` of its kernel and `taper_modes` of its taper.
    """

    def __init__(self, hybrid: HybridSample, modes: Tensor, taper: Tensor | None) -> None:
        self.sample, self.spread, self.between = hybrid.sample.float(), hybrid.spread.float(), hybrid.between.float()
        self.modes, self.taper = modes.float(), None if taper is None else taper.float()

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return S v for the columns of `vectors`, shape (n, k)."""
        channels, cells, k = len(self.between), len(self.modes), vectors.shape[1]
        inner = (self.spread[:, None] * vectors).reshape(channels, cells, k)
        smooth = torch.stack([self.modes @ (self.modes.T @ v) for v in inner])
        out = self.spread[:, None] * torch.einsum("cd,dnk->cnk", self.between, smooth).reshape(-1, k)
        if self.taper is None:
            return out + self.sample.T @ (self.sample @ vectors)
        for x in self.sample:
            summed = (x[:, None] * vectors).reshape(channels, cells, k).sum(0)
            out += x[:, None] * (self.taper @ (self.taper.T @ summed)).repeat(channels, 1)
        return out


@dataclass(frozen=True, eq=False)
class Parts:
    """What hybrid covariances that differ in their sample alone have in common.

    Attributes
    ----------
    modes, taper
        `kernel_modes` of the kernel, and `taper_modes` of the taper where there is one.
    start
        Modes of a similar covariance, from which the iteration starts, or None.
    """

    modes: Tensor
    taper: Tensor | None
    start: Tensor | None = None

    @classmethod
    def of(cls, hybrid: HybridSample) -> Parts:
        """Return the parts of one covariance."""
        places = torch.nonzero((hybrid.std.reshape(len(hybrid.between), -1) > 0).any(0))[:, 0]
        taper = None if hybrid.taper is None else taper_modes(hybrid.taper, places)
        columns = min(COLUMNS // len(hybrid.between), WORKED // hybrid.kernel.size)
        return cls(kernel_modes(hybrid.kernel, max(FEWEST_MODES, columns), places), taper)


def hybrid_modes(hybrid: HybridSample, count: int | None = None, parts: Parts | None = None) -> Modes:
    """Return the leading modes of a hybrid covariance, and what they leave as one variance for all cells: the total is exact.

    Parameters
    ----------
    hybrid
        The covariance.
    count
        How many to keep; by default as many as can be stored.
    parts
        Where they are at hand.

    Notes
    -----
    Small states by a dense eigenproblem, others by subspace iteration from random vectors (Halko et al. 2011, SIAM Rev. 53, algorithm 4.4), or
    from given modes.
    """
    count = most_modes(hybrid.size) if count is None else min(count, hybrid.size)
    if hybrid.size <= LANDMARKS:
        everything = torch.arange(hybrid.size)
        power, vectors = torch.linalg.eigh(hybrid.block(everything, everything))
        factor = vectors[:, -count:] * power[-count:].clamp(min=0.0).sqrt()
    else:
        parts = Parts.of(hybrid) if parts is None else parts
        product = Product(hybrid, parts.modes, parts.taper)
        start = torch.empty(hybrid.size, 0) if parts.start is None else parts.start.float()
        more = max(0, min(count + BEYOND, hybrid.size) - start.shape[1])
        basis = torch.cat([start, torch.randn(hybrid.size, more, generator=torch.Generator().manual_seed(0))], 1)
        for _ in range(2 if parts.start is None else 1):
            basis = torch.linalg.qr(product(basis))[0]
        inner = (basis.T @ product(basis)).double()
        power, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        basis = torch.linalg.qr(basis.double())[0]
        factor = basis @ (vectors[:, -count:] * power[-count:].clamp(min=0.0).sqrt())
    strength = (factor**2).sum(0)
    factor = factor[:, strength > 1e-8 * float(strength.max())]
    total = float((hybrid.std**2).sum())
    return Modes(factor, max(total - float((factor**2).sum()), 1e-6 * total) / hybrid.size)

r"""Covariances of a gridded state: a kernel on the sphere, a localised sample, a low-rank factor plus a diagonal.

The state vector of a field is its channels one after the other, each flattened rows first; its length is n. No covariance is
stored as an n x n matrix: each gives blocks, its diagonal, and exact draws.

Distances are great-circle distances d for the exponential kernel. The other kernels are positive definite on the sphere only
as functions of the chord 2 R sin(d / 2R) (Gneiting 2013, Bernoulli 19, 1327-1349), so that is what they get; at 1000 km the two
differ by 0.1 %.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import OptionError

EARTH_RADIUS = 6_371_229.0
DENSE_LIMIT = 6000  # cells; a dense factorisation beyond this takes minutes and gigabytes
NODES, MOST_ROWS, MOST_COLUMNS, MOST_NODES, LEFT = 16, 256, 720, 4000, 0.1  # of draws at scattered places, see `Nearby`
LARGE = 1500
KERNELS = ("exponential", "matern32", "matern52", "gaussian")


class Covariance(Protocol):
    """What a Gaussian needs to know of its covariance S of a state of length `size`."""

    @property
    def size(self) -> int:
        """Length n of the state."""
        ...

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return S[rows][:, columns]."""
        ...

    def diagonal(self) -> Tensor:
        """Return the variances, shape (n,)."""
        ...

    def draw(self, noise: NoiseStream) -> Tensor:
        """Draw one N(0, S) vector per sample of `noise`, shape (samples, n)."""
        ...


class SphereKernel:
    """A correlation function of distance between the cells of a grid, or between scattered places (`SphereKernel.at`).

    Parameters
    ----------
    latitude, longitude
        Axes of a rectilinear grid in degrees, shapes (ny,) and (nx,).
    kind
        'exponential', 'matern32', 'matern52', 'gaussian', or 'gaspari-cohn'.
    length
        Length scale in metres; for 'gaspari-cohn' the distance at which the taper reaches zero.
    around
        Number of columns of this spacing around the whole circle, if that is a whole number. Then exact draws cost a Fourier
        transform along longitude and one small eigenproblem per zonal wavenumber, because the covariance of any field that is
        isotropic on the sphere is block-circulant in longitude.
    """

    def __init__(self, latitude: Tensor, longitude: Tensor, kind: str, length: float, around: int | None = None) -> None:
        self.kind, self.length, self.around = kind, float(length), around
        self.shape = (len(latitude), len(longitude))
        self.size = self.shape[0] * self.shape[1]
        self._axes = (latitude.double(), longitude.double())
        self.positions = unit_positions(*_mesh(*self._axes))
        self._root: Tensor | None = None
        self._nearby: Nearby | None = None

    @classmethod
    def at(cls, latitude: Tensor, longitude: Tensor, kind: str, length: float) -> SphereKernel:
        """Return the same between scattered places in degrees, shapes (n,).

        Up to `DENSE_LIMIT` of them are drawn with a dense root, more by `Nearby`.
        """
        kernel = cls(latitude, torch.zeros(1), kind, length)
        kernel.positions = unit_positions(latitude.double(), longitude.double())
        if len(latitude) > DENSE_LIMIT:
            kernel._nearby = Nearby(kernel)
        return kernel

    def correlation(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the correlation of cells, shape (rows, columns)."""
        return self.of_distance(_chord(self.positions[rows], self.positions[columns]))

    def of_distance(self, chord: Tensor) -> Tensor:
        """Return the correlation at distances along the chord, in radii of the Earth."""
        if self.kind == "exponential":
            distance = 2 * EARTH_RADIUS * torch.asin((chord / 2).clamp(max=1.0))
            return torch.exp(-distance / self.length)
        scaled = EARTH_RADIUS * chord / self.length
        if self.kind == "matern32":
            return (1 + math.sqrt(3) * scaled) * torch.exp(-math.sqrt(3) * scaled)
        if self.kind == "matern52":
            return (1 + math.sqrt(5) * scaled + 5 / 3 * scaled**2) * torch.exp(-math.sqrt(5) * scaled)
        if self.kind == "gaussian":
            return torch.exp(-0.5 * scaled**2)
        return gaspari_cohn(scaled)

    def draw(self, noise: NoiseStream, fields: int = 1) -> Tensor:
        """Draw `fields` independent fields per sample with this correlation, shape (samples, fields, size), float64."""
        if self._nearby is not None:
            return self._nearby.draw(noise, fields)
        if self._root is None:
            self._root = self._circulant_root() if self.around else self._dense_root()
        ny, nx = self.shape
        if not self.around:
            white = noise.normal(fields, self.size, dtype=torch.float64)
            dense: Tensor = white @ self._root.T
            return dense
        white = noise.normal(fields, ny, self.around, dtype=torch.float64)
        spectrum = torch.fft.rfft(white, dim=-1)
        root = self._root.to(spectrum.dtype)
        shaped = torch.einsum("mij,sfjm->sfim", root, spectrum)
        field = torch.fft.irfft(shaped, n=self.around, dim=-1)[..., :nx]
        out: Tensor = field.reshape(len(noise), fields, self.size)
        return out

    def _circulant_root(self) -> Tensor:
        assert self.around is not None
        latitude, _ = self._axes
        turn = torch.arange(self.around, dtype=torch.float64) * (360.0 / self.around)
        first = unit_positions(latitude, torch.zeros_like(latitude))
        everywhere = unit_positions(*_mesh(latitude, turn))
        lags = self.of_distance(_chord(first, everywhere)).reshape(len(latitude), len(latitude), self.around)
        spectrum = torch.fft.rfft(lags, dim=-1).real.permute(2, 0, 1)
        return matrix_root(spectrum)

    def _dense_root(self) -> Tensor:
        if self.size > DENSE_LIMIT:
            raise OptionError(
                f"Draws from a covariance function on {self.size} cells need evenly spaced longitudes that divide the circle "
                f"(or at most {DENSE_LIMIT} cells). Interpolate to such a grid first."
            )
        everything = torch.arange(self.size)
        matrix = self.correlation(everything, everything)
        if self.size > LARGE:  # a Cholesky factor takes a tenth of the time of an eigenproblem
            factor, failed = torch.linalg.cholesky_ex(matrix + 1e-9 * torch.eye(self.size, dtype=matrix.dtype))
            if not int(failed):
                root: Tensor = factor
                return root
        return matrix_root(matrix)


class Nearby:
    r"""Draws at many scattered places: drawn on a grid around them (all meridians, or a region), and kriged from its nearest nodes.

    x_i = w_i . u + s_i e_i, with w_i the weights of simple kriging from the `NODES` nearest nodes, s_i^2 the variance they leave, and e_i
    independent. Variances are exact; covariances as nearly as kriging is (Vecchia 1988, J. R. Stat. Soc. B 50, 297-312).

    Raises
    ------
    OptionError
        On drawing, if the nodes leave more than `LEFT` of the variance: the length scale is too short for so many cells.
    """

    def __init__(self, kernel: SphereKernel) -> None:
        self.kernel = kernel
        self._made: tuple[SphereKernel, Tensor, Tensor, Tensor] | None = None

    def draw(self, noise: NoiseStream, fields: int) -> Tensor:
        """Draw `fields` fields per sample, shape (samples, fields, size)."""
        self._made = self._made or self._make()
        nodes, index, weight, left = self._made
        known = nodes.draw(noise, fields)
        out = left * noise.normal(fields, self.kernel.size, dtype=torch.float64)
        for k in range(index.shape[1]):  # one node at a time: all at once would be many times the memory of the draws
            out += known[..., index[:, k]] * weight[:, k]
        return out

    def _make(self) -> tuple[SphereKernel, Tensor, Tensor, Tensor]:
        places = self.kernel.positions
        tree = cKDTree(places.numpy())
        apart = math.degrees(float(np.median(tree.query(places.numpy(), k=2)[0][:, 1]))) / 2
        choices = [c for c in (self._around_the_globe(places, apart), self._over_a_region(places, apart)) if c is not None]
        _, nodes, places = min(choices, key=lambda c: c[0])
        _, near = cKDTree(nodes.positions.numpy()).query(places.numpy(), k=NODES)
        index = torch.as_tensor(near)
        weight, left = torch.empty(index.shape, dtype=torch.float64), torch.empty(len(index), dtype=torch.float64)
        for some in torch.split(torch.arange(len(index)), 2**14):
            around_it = nodes.positions[index[some]]
            inner = self.kernel.of_distance(_chord(around_it, around_it)) + 1e-9 * torch.eye(NODES, dtype=torch.float64)
            cross = self.kernel.of_distance(_chord(places[some, None], around_it))[:, 0]
            weight[some] = torch.linalg.solve(inner, cross)
            left[some] = (1 - (weight[some] * cross).sum(-1)).clamp(min=0.0)
        if float(left.mean()) > LEFT:
            raise OptionError(
                f"A length scale of {self.kernel.length / 1e3:g} km cannot be drawn on {self.kernel.size} cells that are not in rows and "
                f"columns of latitude and longitude. Use a part of the grid, or a grid with evenly spaced longitudes: ds.genda.regrid(target)"
            )
        return nodes, index, weight, left.sqrt()

    def _around_the_globe(self, places: Tensor, apart: float) -> tuple[float, SphereKernel, Tensor]:
        """Return the spacing in degrees (at least `apart`) of a grid on all meridians, the grid, and the places.

        Its draws cost Fourier transforms.
        """
        latitude = torch.rad2deg(torch.asin(places[:, 2].clamp(-1, 1)))
        low, high = float(latitude.min()), float(latitude.max())
        step = max(apart, (high - low) / MOST_ROWS, 360 / MOST_COLUMNS)
        rows = torch.arange(
            max(low - step, -90 + step / 2), min(high + step, 90 - step / 2) + step / 2, step, dtype=torch.float64
        )
        around = math.ceil(360 / step)
        turn = torch.arange(around, dtype=torch.float64) * (360 / around)
        return step, SphereKernel(rows, turn, self.kernel.kind, self.kernel.length, around), places

    def _over_a_region(self, places: Tensor, apart: float) -> tuple[float, SphereKernel, Tensor] | None:
        """Return the same of a grid in coordinates whose equator and meridian cross in the middle of the places, and the places there.

        Its draws cost a dense root. None where the places are not within 60 degrees of their middle.
        """
        middle = places.mean(0)
        middle = middle / middle.norm()
        if not bool((places @ middle > 0.5).all()):
            return None
        pole = (
            torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
            if abs(float(middle[2])) < 0.9
            else torch.tensor([1.0, 0.0, 0.0]).double()
        )
        east = torch.linalg.cross(pole, middle)
        east = east / east.norm()
        turned = places @ torch.stack([middle, east, torch.linalg.cross(middle, east)], 1)
        axes = torch.rad2deg(torch.asin(turned[:, 2].clamp(-1, 1))), torch.rad2deg(torch.atan2(turned[:, 1], turned[:, 0]))
        height, width = (float(a.max() - a.min()) for a in axes)
        step = max(apart, math.sqrt((height + 2 * apart) * (width + 2 * apart) / MOST_NODES))
        rows, columns = (
            torch.arange(float(a.min()) - step, float(a.max()) + 1.5 * step, step, dtype=torch.float64) for a in axes
        )
        return step, SphereKernel(rows, columns, self.kernel.kind, self.kernel.length), turned


def gaspari_cohn(scaled: Tensor) -> Tensor:
    """Taper of Gaspari and Cohn (1999, Q. J. R. Meteorol. Soc. 125, eq. 4.10), of distance over the radius where it is zero."""
    r = 2 * scaled
    near = -(r**5) / 4 + r**4 / 2 + 5 / 8 * r**3 - 5 / 3 * r**2 + 1
    safe = r.clamp(min=1.0)
    far = safe**5 / 12 - safe**4 / 2 + 5 / 8 * safe**3 + 5 / 3 * safe**2 - 5 * safe + 4 - 2 / (3 * safe)
    return torch.where(r < 1, near, torch.where(r < 2, far, torch.zeros_like(r)))


def _mesh(latitude: Tensor, longitude: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.meshgrid(latitude, longitude, indexing="ij")
    return a.reshape(-1), b.reshape(-1)


def unit_positions(latitude: Tensor, longitude: Tensor) -> Tensor:
    """Return unit vectors of places in degrees, shape (..., 3)."""
    phi, lam = torch.deg2rad(latitude), torch.deg2rad(longitude)
    return torch.stack([phi.cos() * lam.cos(), phi.cos() * lam.sin(), phi.sin()], -1)


def _chord(a: Tensor, b: Tensor) -> Tensor:
    # the matrix-product form of the distance loses half the digits near zero
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def matrix_root(matrix: Tensor) -> Tensor:
    """Return a root L with L L^T = matrix for (a batch of) symmetric positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    return root


class KernelCovariance:
    """S = std_i c(d_ij) std_j within each channel, and between channels none, or the part `between` of it.

    Parameters
    ----------
    kernels
        One per channel, all on the same grid.
    std
        Standard deviations, shape (channels, cells).
    between
        Correlation of channels at one place, shape (channels, channels); between channels whose kernels differ it must be zero.
    """

    def __init__(self, kernels: list[SphereKernel], std: Tensor, between: Tensor | None = None) -> None:
        self.kernels, self.std = kernels, std.double()
        self.size = std.numel()
        self.between = torch.eye(len(kernels), dtype=torch.float64) if between is None else between.double()
        alike = torch.tensor([[a.kind == b.kind and a.length == b.length for b in kernels] for a in kernels])
        if bool((self.between[~alike] != 0).any()):
            raise OptionError("Channels can only be correlated where they have the same length scale and kind of covariance.")

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return S[rows][:, columns]."""
        cells = self.kernels[0].size
        out = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        for c, d in torch.nonzero(self.between).tolist():
            i, j = torch.nonzero(rows // cells == c)[:, 0], torch.nonzero(columns // cells == d)[:, 0]
            if len(i) and len(j):
                a, b = rows[i] % cells, columns[j] % cells
                out[i[:, None], j] = (
                    float(self.between[c, d]) * self.std[c, a, None] * self.kernels[c].correlation(a, b) * self.std[d, b]
                )
        return out

    def diagonal(self) -> Tensor:
        """Return the variances."""
        return (self.std**2).reshape(-1)

    def draw(self, noise: NoiseStream) -> Tensor:
        """Draw one field per sample."""
        fields = torch.stack([kernel.draw(noise)[:, 0] for kernel in self.kernels], 1)
        if len(self.between) > 1 and not torch.equal(self.between, torch.eye(len(self.between), dtype=torch.float64)):
            fields = torch.einsum("cd,sdn->scn", matrix_root(self.between), fields)
        return (fields * self.std).flatten(1)


class LocalisedSample:
    """S = inflation * (X^T X / (N - 1)) o T: a sample covariance under a Gaspari-Cohn taper T of horizontal distance.

    Exact draws need no factor of S: sum_k x_k o t_k / sqrt(N - 1), with t_k ~ N(0, T) independent, has this covariance.

    Parameters
    ----------
    anomalies
        Sample minus its mean, shape (N, n).
    taper
        Kernel of kind 'gaspari-cohn'.
    inflation
        Factor on the variance.
    """

    def __init__(self, anomalies: Tensor, taper: SphereKernel, inflation: float = 1.0) -> None:
        self.scaled = anomalies.double() * math.sqrt(inflation / (len(anomalies) - 1))
        self.taper = taper
        self.size = anomalies.shape[1]

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return S[rows][:, columns]."""
        cells = self.taper.size
        return (self.scaled[:, rows].T @ self.scaled[:, columns]) * self.taper.correlation(rows % cells, columns % cells)

    def diagonal(self) -> Tensor:
        """Return the variances."""
        return (self.scaled**2).sum(0)

    def draw(self, noise: NoiseStream) -> Tensor:
        """Draw one field per sample."""
        return draw_tapered(self.scaled, self.taper, noise)


def draw_tapered(scaled: Tensor, taper: SphereKernel, noise: NoiseStream) -> Tensor:
    """Draw fields whose covariance is that of a sample, (X^T X) o T for X of shape (N, n), shape (samples, n)."""
    channels = scaled.shape[1] // taper.size
    out = []
    for s in range(len(noise)):  # a sample at a time: N fields each are plenty of memory
        tapered = taper.draw(_Single(noise, s), fields=len(scaled))[0]
        out.append((scaled * tapered.repeat(1, channels)).sum(0))
    return torch.stack(out)


class _Single(NoiseStream):
    """One sample of a stream, sharing its generator."""

    def __init__(self, stream: NoiseStream, index: int) -> None:
        self._generators = [stream._generators[index]]

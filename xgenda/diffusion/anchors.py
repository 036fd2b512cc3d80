r"""Gaussian anchors: covariances whose posterior given a noisy copy of the state is cheap at every noise level.

A denoiser can be built on one (`EDMDenoiser`), and so can a guidance. Three forms in space: low rank plus a diagonal (EOFs), a full set of
modes (a localised sample of moderate size), and a spectrum (homogeneous fields on a doubly periodic grid); and each of them in time.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from xgenda.diffusion.covariances import DENSE_LIMIT, Covariance, matrix_root
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.random_fields import TorusField
from xgenda.errors import OptionError

FEW_CHANNELS = 8  # up to which sums over channels are faster than a batch of tiny matrix products
CACHE_ELEMENTS = 2**24  # of all noise levels of one anchor together
LARGEST_BETWEEN = 2**24  # entries of a matrix between cells, beyond which a covariance is applied to the rows of an operator


class Anchor(Covariance, Protocol):
    """A covariance that a denoiser can be built on: its posterior given a noisy copy of the state is cheap."""

    def given_noise(self, sigma: float) -> Conditional:
        """Return the covariance of x given x + sigma e."""
        ...

    def largest(self) -> float:
        """Return the variance of the largest mode."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what `read_anchor` needs, by name."""
        ...


class Conditional(Protocol):
    r"""C = (S^-1 + sigma^-2 I)^-1, the covariance of the state given a noisy copy of it with noise `sigma`."""

    sigma: float
    variance: Tensor

    def multiply(self, vector: Tensor) -> Tensor:
        """Return C v for vectors (batch, n)."""
        ...

    def shrink(self, vector: Tensor) -> Tensor:
        """Return S (S + sigma^2 I)^-1 v = C v / sigma^2: the best linear estimate of the state from a noisy one."""
        ...


@runtime_checkable
class Observable(Protocol):
    """A conditional covariance that can also be had as a matrix between observations.

    Attributes
    ----------
    direct_limit
        Observations up to which its factorisation beats iterating.
    """

    direct_limit: int

    def observed(self, columns: Tensor, matrix: Tensor) -> Tensor:
        """Return A C A^T, shape (m, m), for an A that is `matrix` (m, c) on the cells `columns` (c,) and zero elsewhere."""
        ...


class LowRank:
    """S = F F^T + diag(d).

    Parameters
    ----------
    factor
        F, shape (n, r).
    residual
        d, shape (n,), not negative.
    """

    def __init__(self, factor: Tensor, residual: Tensor) -> None:
        self.factor, self.residual = factor.double(), residual.double()
        self.size = len(residual)
        self._cache: dict[float, LowRankConditional] = {}
        self._cast: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return S[rows][:, columns]."""
        same = rows[:, None] == columns
        return self.factor[rows] @ self.factor[columns].T + torch.where(same, self.residual[columns], 0.0)

    def diagonal(self) -> Tensor:
        """Return the variances."""
        return (self.factor**2).sum(1) + self.residual

    def draw(self, noise: NoiseStream) -> Tensor:
        """Draw one field per sample."""
        modes = noise.normal(self.factor.shape[1], dtype=torch.float64)
        return modes @ self.factor.T + self.residual.sqrt() * noise.normal(self.size, dtype=torch.float64)

    def largest(self) -> float:
        """Return the variance of the largest mode of the factor."""
        return float(torch.linalg.eigvalsh(self.factor.T @ self.factor)[-1]) if self.factor.shape[1] else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Return factor and residual in single precision."""
        return {"factor": self.factor.float(), "residual": self.residual.float()}

    def given_noise(self, sigma: float) -> LowRankConditional:
        r"""Return the covariance of x given x + sigma e as a diagonal plus a low rank.

        With D = d + sigma^2 and M = (I + F^T D^-1 F)^-1 (Woodbury), every term is positive, so nothing cancels:
        C = diag(sigma^2 d / D) + (sigma^2 / D) F M F^T (sigma^2 / D).
        """
        if sigma not in self._cache:
            if len(self._cache) * (3 * self.size + 2 * self.factor.shape[1] ** 2) > CACHE_ELEMENTS:
                self._cache.clear()
            total = self.residual + sigma**2
            inner = torch.eye(self.factor.shape[1], dtype=torch.float64) + self.factor.T @ (self.factor / total[:, None])
            root = torch.linalg.cholesky(inner)
            half = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=torch.float64), upper=False).T
            weight = sigma**2 / total
            self._cache[sigma] = LowRankConditional(self, weight * self.residual, weight, half, sigma)
        return self._cache[sigma]

    def factor_like(self, like: Tensor) -> Tensor:
        """Return F in the dtype and on the device of `like`."""
        key = (like.dtype, like.device)
        if key not in self._cast:
            self._cast[key] = self.factor.to(like)
        return self._cast[key]

    @classmethod
    def of(cls, covariance: Covariance) -> LowRank:
        """Factorise any covariance of moderate size exactly.

        Raises
        ------
        OptionError
            If it is too large for a dense eigenproblem.
        """
        if isinstance(covariance, LowRank):
            return covariance
        if covariance.size > DENSE_LIMIT:
            raise OptionError(
                f"A denoiser of this covariance needs a dense eigenproblem of {covariance.size} cells (limit {DENSE_LIMIT}); "
                f"use a low-rank one: gaussian_prior(ds, covariance='eof')"
            )
        everything = torch.arange(covariance.size)
        return Modes(matrix_root(covariance.block(everything, everything)))


class Modes(LowRank):
    """S = F F^T + floor I with orthogonal columns: the same as a sum over modes, for which nothing needs solving.

    Parameters
    ----------
    factor
        F, shape (n, r), its columns eigenvectors times the root of their eigenvalue.
    floor
        Variance beside that of the modes, the same in all cells.
    """

    def __init__(self, factor: Tensor, floor: float = 0.0) -> None:
        super().__init__(factor, torch.full((len(factor),), floor, dtype=torch.float64))
        self.floor = floor
        self._square = self.factor**2
        self.power = self._square.sum(0)

    def given_noise(self, sigma: float) -> LowRankConditional:
        """Return C, mode by mode: an eigenvalue q = p + floor becomes sigma^2 q / (q + sigma^2), the floor itself among them."""
        beside = sigma**2 + self.floor
        # (of p + floor, less that of the floor) / p, without a difference of like numbers
        share = sigma**4 / (beside * (self.power + beside))
        return ModesConditional(self, share, self._square @ share, sigma)


class LowRankConditional:
    """C = diag(a) + B B^T with B = diag(w) F H, where F is shared with all other noise levels: as large a matrix for each would be too much.

    Parameters
    ----------
    whole
        The covariance, with F, shape (n, r).
    diagonal, weight
        a and w, shape (n,).
    half
        H, shape (r, r).
    """

    direct_limit = 4000

    def __init__(self, whole: LowRank, diagonal: Tensor, weight: Tensor, half: Tensor, sigma: float) -> None:
        self.whole, self.diagonal, self.weight, self.half, self.sigma = whole, diagonal, weight, half, sigma
        self.variance = diagonal + weight**2 * ((whole.factor @ half) ** 2).sum(1)
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def rows(self, columns: Tensor) -> Tensor:
        """Return B[columns]."""
        return self.weight[columns, None] * (self.whole.factor[columns] @ self.half)

    def multiply(self, vector: Tensor) -> Tensor:
        """Return C v for vectors (..., n)."""
        key = (vector.dtype, vector.device)
        if key not in self._cast:
            self._cast[key] = (self.diagonal.to(vector), self.weight.to(vector), self.half.to(vector))
        a, w, half = self._cast[key]
        factor = self.whole.factor_like(vector)
        return a * vector + w * ((((w * vector) @ factor) @ half) @ half.T @ factor.T)

    def shrink(self, vector: Tensor) -> Tensor:
        """Return C v / sigma^2."""
        return self.multiply(vector) / self.sigma**2

    def observed(self, columns: Tensor, matrix: Tensor) -> Tensor:
        """Return A C A^T."""
        half = matrix @ self.rows(columns)
        return (matrix * self.diagonal[columns]) @ matrix.T + half @ half.T


class ModesConditional(LowRankConditional):
    """C = F diag(share) F^T + c I."""

    def __init__(self, modes: Modes, share: Tensor, variance: Tensor, sigma: float) -> None:
        self.modes, self.share, self.sigma = modes, share, sigma
        self.beside = sigma**2 * modes.floor / (sigma**2 + modes.floor)
        self.variance = variance + self.beside
        self.diagonal = torch.full_like(modes.residual, self.beside)

    def rows(self, columns: Tensor) -> Tensor:
        """Return B[columns] of C = B B^T + c I."""
        return self.modes.factor[columns] * self.share.sqrt()

    def multiply(self, vector: Tensor) -> Tensor:
        """Return C v for vectors (..., n)."""
        factor = self.modes.factor_like(vector)
        return self.beside * vector + ((vector @ factor) * self.share.to(vector)) @ factor.T

    def observed(self, columns: Tensor, matrix: Tensor) -> Tensor:
        """Return A C A^T."""
        half = matrix @ self.modes.factor[columns]
        return (half * self.share) @ half.T + self.beside * (matrix @ matrix.T)


class Spectral:
    """The covariance of fields that are statistically homogeneous on a doubly periodic grid.

    Such a covariance is block diagonal in the wavenumbers: one Hermitian matrix between channels each.

    Parameters
    ----------
    spectrum
        E[f f^H] of the orthonormal two-dimensional Fourier transform f of the state, shape (ny, nx // 2 + 1, channels, channels),
        complex Hermitian, or real where channels do not depend on each other.
    shape
        (channels, ny, nx).
    noise
        Power of the waves of the noise over that of white noise, shape (ny, nx // 2 + 1), the same in all channels; None where it is white.
    """

    def __init__(self, spectrum: Tensor, shape: tuple[int, int, int], noise: Tensor | None = None) -> None:
        self.shape, self.size, self.noise = shape, shape[0] * shape[1] * shape[2], noise
        self.spectrum = spectrum.to(torch.complex128)
        self.power, self.vectors = torch.linalg.eigh(self.spectrum)
        self.power = self.power.clamp(min=0.0)
        self._cache: dict[float, SpectralConditional] = {}
        self._kernel: Tensor | None = None

    @classmethod
    def fit(cls, fields: Tensor, inflation: float = 1.0) -> Spectral:
        """Fit to anomalies (samples, channels, ny, nx): the mean of their cross-spectra."""
        f = torch.fft.rfft2(fields.double(), norm="ortho")
        spectrum = torch.einsum("scyx,sdyx->yxcd", f, f.conj()) * (inflation / (len(fields) - 1))
        return cls(spectrum, (fields.shape[1], fields.shape[2], fields.shape[3]))

    def under(self, field: TorusField) -> Spectral:
        """Return the same covariance, of states that are seen under noise of another covariance than white noise."""
        return Spectral(self.spectrum, self.shape, field.power * (self.shape[1] * self.shape[2]))

    def on(self, plane: tuple[int, int]) -> Spectral:
        """Return the covariance of the same functions on a finer grid of the same box, which has no more waves than this one."""
        (channels, ny, nx), (rows, columns) = self.shape, plane
        k = torch.arange(-((ny - 1) // 2), (ny + 1) // 2)  # without half waves, which are two on a finer grid
        across = (nx + 1) // 2
        spectrum = torch.zeros(rows, columns // 2 + 1, channels, channels, dtype=self.spectrum.dtype)
        spectrum[k % rows, :across] = self.spectrum[k % ny, :across] * (rows * columns / (ny * nx))
        return Spectral(spectrum, (channels, rows, columns))

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return S[rows][:, columns]."""
        if self._kernel is None:
            self._kernel = _lagged(self.spectrum, self.shape)
        return _between(self._kernel, self.shape, rows, columns)

    def diagonal(self) -> Tensor:
        """Return the variances: one number per channel."""
        return _channel_variance(self.spectrum, self.shape)

    def draw(self, noise: NoiseStream) -> Tensor:
        """Draw one field per sample."""
        white = torch.fft.rfft2(noise.normal(*self.shape, dtype=torch.float64), norm="ortho")
        root = self.vectors * self.power.sqrt()[..., None, :] @ self.vectors.conj().transpose(-1, -2)
        shaped = torch.einsum("yxcd,sdyx->scyx", root, white)
        out: Tensor = torch.fft.irfft2(shaped, s=self.shape[1:], norm="ortho").flatten(1)
        return out

    def largest(self) -> float:
        """Return the variance of the largest mode."""
        return float(self.power.max())

    def tensors(self) -> dict[str, Tensor]:
        """Return the spectrum in single precision, real and imaginary part apart."""
        return {"spectrum": torch.view_as_real(self.spectrum).float(), "shape": torch.tensor(self.shape)}

    def given_noise(self, sigma: float) -> SpectralConditional:
        """Return C, wavenumber by wavenumber."""
        if sigma not in self._cache:
            if len(self._cache) * self.spectrum.numel() > CACHE_ELEMENTS:
                self._cache.clear()
            level = sigma**2 * (torch.ones(()) if self.noise is None else self.noise[..., None]).to(self.power)
            share = torch.where(self.power > 0, self.power / (self.power + level).clamp(min=1e-300), 0.0)
            shrinking = None if self.noise is None else self._matrices(share)
            self._cache[sigma] = SpectralConditional(self._matrices(level * share), self.shape, sigma, shrinking)
        return self._cache[sigma]

    def _matrices(self, power: Tensor) -> Tensor:
        """Return the Hermitian matrices of other eigenvalues."""
        out: Tensor = self.vectors * power.to(self.vectors.dtype)[..., None, :] @ self.vectors.conj().transpose(-1, -2)
        return out


class SpectralConditional:
    """C of a homogeneous covariance, applied by Fourier transform.

    Parameters
    ----------
    kernel
        Spectrum of C.
    shape, sigma
        As of the covariance.
    shrinking
        Spectrum of the best linear estimate where the noise is not white.
    """

    direct_limit = 1500

    def __init__(self, kernel: Tensor, shape: tuple[int, int, int], sigma: float, shrinking: Tensor | None = None) -> None:
        self.kernel, self.shape, self.sigma, self.shrinking = kernel, shape, sigma, shrinking
        self.variance = _channel_variance(kernel, shape)
        self._cast: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def multiply(self, vector: Tensor) -> Tensor:
        """Return C v for vectors (batch, n)."""
        return self._filter("C", self.kernel, vector)

    def _filter(self, name: str, spectrum: Tensor, vector: Tensor) -> Tensor:
        key = (name, vector.dtype, vector.device)
        if key not in self._cast:
            complex_dtype = torch.complex128 if vector.dtype == torch.float64 else torch.complex64
            kernel = spectrum.to(device=vector.device, dtype=complex_dtype)
            self._cast[key] = kernel.permute(2, 3, 0, 1).contiguous()
        kernel, field = self._cast[key], torch.fft.rfft2(vector.reshape(-1, *self.shape), norm="ortho")
        if self.shape[0] <= FEW_CHANNELS:
            shaped = torch.stack(
                [sum((k * f for k, f in zip(row, field.unbind(1), strict=True)), 0 * field[:, 0]) for row in kernel], 1
            )
        else:
            shaped = torch.einsum("cdyx,sdyx->scyx", kernel, field)
        out: Tensor = torch.fft.irfft2(shaped, s=self.shape[1:], norm="ortho").reshape(vector.shape)
        return out

    def observed(self, columns: Tensor, matrix: Tensor) -> Tensor:
        """Return A C A^T."""
        if len(columns) ** 2 > LARGEST_BETWEEN:
            parts, n = [], len(self.variance)
            for some in matrix.split(max(1, LARGEST_BETWEEN // n)):
                whole = torch.zeros(len(some), n, dtype=torch.float64)
                whole[:, columns] = some
                parts.append(self.multiply(whole)[:, columns] @ matrix.T)
            return torch.cat(parts)
        between = _between(_lagged(self.kernel, self.shape), self.shape, columns, columns)
        few = matrix.to_sparse(layout=torch.sparse_coo)  # a few cells in each row
        half = torch.sparse.mm(few, between)
        out: Tensor = torch.sparse.mm(few, half.T.contiguous())
        return out

    def shrink(self, vector: Tensor) -> Tensor:
        """Return the best linear estimate of the state from a noisy one, C v / sigma^2 where the noise is white."""
        if self.shrinking is not None:
            return self._filter("shrink", self.shrinking, vector)
        return self.multiply(vector) / self.sigma**2


class Separable:
    r"""The covariance of consecutive states that have one covariance S_0 in space and one correlation in time: S = T x S_0.

    With T = U diag(t) U^T, the states rotated by U^T do not depend on each other and have covariances t_l S_0, so that everything
    asked of S is asked of S_0 at the noise levels sigma / sqrt(t_l).

    Parameters
    ----------
    space
        S_0, of one state.
    correlation
        Of states 0, 1, 2, ... steps apart, shape (lags,), beginning with 1; a positive sequence.
    length
        Number of states. Beyond the given lags the correlation goes on as that of the autoregressive process of the highest order
        that they determine, which has the largest entropy (Burg 1975).
    """

    def __init__(self, space: Anchor, correlation: Tensor, length: int | None = None) -> None:
        self.space, self.correlation = space, correlation.double()
        self.length = len(correlation) if length is None else length
        lags = extended_correlation(self.correlation, self.length)
        index = torch.arange(self.length)
        self.matrix = lags[(index[:, None] - index).abs()]
        power, self.rotation = torch.linalg.eigh(self.matrix)
        self.power = power.clamp(min=1e-10)
        self.size = self.length * space.size
        self._cache: dict[float, SeparableConditional] = {}

    def of_length(self, length: int) -> Separable:
        """Return the covariance of another number of states of the same process."""
        return Separable(self.space, self.correlation, length)

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return S[rows][:, columns]."""
        n = self.space.size
        return self.matrix[rows // n][:, columns // n] * self.space.block(rows % n, columns % n)

    def diagonal(self) -> Tensor:
        """Return the variances."""
        return self.space.diagonal().repeat(self.length)

    def draw(self, noise: NoiseStream) -> Tensor:
        """Draw one trajectory per sample."""
        states = torch.stack([self.space.draw(noise) for _ in range(self.length)], 1)
        root = self.rotation * self.power.sqrt()
        return torch.einsum("jl,bln->bjn", root, states.double()).flatten(1)

    def largest(self) -> float:
        """Return the variance of the largest mode."""
        return float(self.power[-1]) * self.space.largest()

    def tensors(self) -> dict[str, Tensor]:
        """Return the correlation and what the covariance in space needs."""
        return {"correlation": self.correlation} | {f"space.{k}": v for k, v in self.space.tensors().items()}

    def given_noise(self, sigma: float) -> SeparableConditional:
        """Return the covariance of x given x + sigma e."""
        if sigma not in self._cache:
            # denoiser and guidance ask for the same level one after the other
            kind = ObservableSeparable if isinstance(self.space.given_noise(1.0), Observable) else SeparableConditional
            self._cache = {sigma: kind(self, sigma)} | dict(list(self._cache.items())[:1])
        return self._cache[sigma]


class SeparableConditional:
    """C = U diag(t_l C_0(sigma / sqrt(t_l))) U^T over time."""

    def __init__(self, whole: Separable, sigma: float) -> None:
        self.whole, self.sigma = whole, sigma
        self.parts = [whole.space.given_noise(sigma / math.sqrt(t)) for t in whole.power.tolist()]
        each = torch.stack([t * p.variance for t, p in zip(whole.power, self.parts, strict=True)])
        self.variance = (whole.rotation.square() @ each.double()).flatten()

    def _each(self, vector: Tensor, scale: list[float], what: str) -> Tensor:
        shaped = vector.reshape(len(vector), self.whole.length, -1)
        rotation = self.whole.rotation.to(shaped)
        turned = torch.einsum("jl,bjn->lbn", rotation, shaped)
        done = torch.stack([s * getattr(p, what)(v) for s, p, v in zip(scale, self.parts, turned, strict=True)])
        return torch.einsum("jl,lbn->bjn", rotation, done).reshape(vector.shape)

    def multiply(self, vector: Tensor) -> Tensor:
        """Return C v for vectors (batch, n)."""
        return self._each(vector, self.whole.power.tolist(), "multiply")

    def shrink(self, vector: Tensor) -> Tensor:
        """Return C v / sigma^2."""
        return self._each(vector, [1.0] * self.whole.length, "shrink")


class ObservableSeparable(SeparableConditional):
    """The same where the covariance in space is `Observable`."""

    @property
    def direct_limit(self) -> int:
        """That of the covariance in space."""
        part = self.parts[0]
        assert isinstance(part, Observable)
        return part.direct_limit

    def observed(self, columns: Tensor, matrix: Tensor) -> Tensor:
        """Return A C A^T."""
        cells, place = torch.unique(columns % self.whole.space.size, return_inverse=True)
        times = columns // self.whole.space.size
        out = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
        for l, (power, part) in enumerate(zip(self.whole.power.tolist(), self.parts, strict=True)):  # noqa: E741
            assert isinstance(part, Observable)
            turned = torch.zeros(len(matrix), len(cells), dtype=torch.float64)
            turned.index_add_(1, place, matrix * self.whole.rotation[times, l])
            out += power * part.observed(cells, turned)
        return out


def extended_correlation(correlation: Tensor, length: int) -> Tensor:
    """Return `length` lags of a correlation of which the first are given (Yule-Walker)."""
    lags = correlation.double().tolist()
    order = len(lags) - 1
    if length > len(lags) and order:
        index = torch.arange(order)
        matrix = correlation.double()[(index[:, None] - index).abs()]
        weights = torch.linalg.solve(matrix, correlation.double()[1:]).tolist()
        while len(lags) < length:
            lags.append(sum(w * lags[-1 - i] for i, w in enumerate(weights)))
    return torch.tensor((lags + [0.0] * length)[:length], dtype=torch.float64)


def _lagged(kernel: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return a homogeneous covariance as a function of lag, shape (ny, nx, channels, channels)."""
    lags: Tensor = torch.fft.irfft2(kernel, s=shape[1:], dim=(0, 1), norm="forward")
    return lags / (shape[1] * shape[2])


def _between(lags: Tensor, shape: tuple[int, int, int], rows: Tensor, columns: Tensor) -> Tensor:
    """Return a homogeneous covariance between cells, shape (rows, columns)."""
    channels, ny, nx = shape
    (c, i, j), (d, k, m) = ((index // (ny * nx), index % (ny * nx) // nx, index % nx) for index in (rows, columns))
    # one flat index into lags from -n + 1 to n - 1: four indices and remainders of a million numbers take ten times as long
    wide = torch.cat([lags[1:], lags])
    wide = torch.cat([wide[:, 1:], wide], 1).contiguous()
    across, block = (2 * nx - 1) * channels * channels, channels * channels
    first = (i + ny - 1) * across + (j + nx - 1) * block + c * channels
    return torch.take(wide, first[:, None] - (k * across + m * block - d))


def _channel_variance(kernel: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the diagonal of a homogeneous covariance: the mean of its spectrum over all wavenumbers."""
    _, ny, nx = shape
    twice = torch.full((nx // 2 + 1,), 2.0, dtype=torch.float64)  # the half that a real transform leaves out
    twice[0] = 1.0
    if nx % 2 == 0:
        twice[-1] = 1.0
    diagonal = torch.diagonal(kernel, dim1=-2, dim2=-1).real
    mean = (diagonal * twice[:, None]).sum((0, 1)) / (ny * nx)
    return mean.repeat_interleave(ny * nx)


def read_anchor(tensors: dict[str, Tensor], prefix: str = "anchor") -> Anchor | None:
    """Take an anchor out of stored tensors, if there is one."""
    if f"{prefix}.correlation" in tensors:
        correlation, space = tensors.pop(f"{prefix}.correlation"), read_anchor(tensors, f"{prefix}.space")
        assert space is not None
        return Separable(space, correlation)
    if f"{prefix}.spectrum" in tensors:
        spectrum = torch.view_as_complex(tensors.pop(f"{prefix}.spectrum").double())
        channels, ny, nx = (int(n) for n in tensors.pop(f"{prefix}.shape"))
        return Spectral(spectrum, (channels, ny, nx))
    if f"{prefix}.factor" not in tensors:
        return None
    factor, residual = tensors.pop(f"{prefix}.factor"), tensors.pop(f"{prefix}.residual")
    alike = bool((residual == residual[0]).all())
    return Modes(factor, float(residual[0])) if alike and _orthogonal(factor) else LowRank(factor, residual)


def _orthogonal(factor: Tensor) -> bool:
    """Tell whether the columns are orthogonal, as those of `Modes` are."""
    inner = factor.double().T @ factor.double()
    scale = torch.diagonal(inner).sqrt()
    off = inner - torch.diag(torch.diagonal(inner))
    return bool((off.abs() <= 1e-5 * torch.outer(scale, scale)).all())


def anchor_tensors(anchor: Anchor | None, prefix: str = "anchor") -> dict[str, Tensor]:
    """Return the tensors of an anchor under a prefix."""
    return {} if anchor is None else {f"{prefix}.{k}": v for k, v in anchor.tensors().items()}

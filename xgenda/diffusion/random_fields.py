r"""Gaussian random fields by spectral sampling, at the cost of a Fourier transform.

On a torus of sides L a field is a sum of waves,

    f(x) = std sum_k sqrt(P_k) z_k exp(2 pi i k x / L),    E |z_k|^2 = 1,    z_-k = conj(z_k),    sum_k P_k = 1,

whose numbers z_k are drawn in order of shells of wavenumber, max(|k_y|, |k_x|) = 0, 1, 2, ...: a finer grid draws those of a coarser one
first, so that one seed is one field, and a grid says only how much of it is shown. What the waves that a grid cannot tell apart
(k and k + n) are worth together is their folded power, and with it the covariance between grid points is the kernel's exactly. On a plane
the grid is a part of a torus that is so large that no two of its points are nearer around the back (circulant embedding: Dietrich & Newsam 1997,
SIAM J. Sci. Comput. 18, 1088-1107; Wood & Chan 1994, J. Comput. Graph. Stat. 3, 409-432).

With x = x0 + sigma K^1/2 e instead of white noise the score of the noisy state and the denoiser are related by Tweedie's formula as
D = x + sigma^2 K grad log p(x); hence `apply`, K v, and `root`, K^1/2 v.
"""

from __future__ import annotations

import itertools
import math
import numbers
from typing import Protocol

import torch
from torch import Tensor

from xgenda.diffusion.kernels import Kernel
from xgenda.errors import GridError, OptionError, check_count, check_flag, check_pair

LARGEST_EMBEDDING = 2**24  # cells of a torus around a plane
INEXACT = 1e-9  # share of the variance in negative eigenvalues of a torus, below which it is exact to rounding
HIGHEST = 1e4  # standard deviations; a level beyond it says that the noise is of the wrong kind
MOST_BEYOND = 0.1  # share of the variance of a prior in waves that a cutoff leaves out
DROWNED = 10.0  # times the standard deviation of the prior that the highest noise must have in every wave


class Source(Protocol):
    """Standard normal numbers, one stream per sample, such as `xgenda.diffusion.noise.NoiseStream`."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return shape (samples, *shape)."""
        ...


class Colour(Protocol):
    """The covariance K of noise on a grid, whose variance is the same everywhere."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        ...

    def draw(self, noise: Source, *lead: int) -> Tensor:
        """Draw independent fields of every sample, shape (samples, *lead, ny, nx), float64, on the CPU."""
        ...

    def apply(self, x: Tensor) -> Tensor:
        """Return K x for fields (..., ny, nx)."""
        ...

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the covariance of cells (numbers along the flattened grid), which are broadcast against each other."""
        ...


class _Waves:
    """What fields on a torus and on a part of it share.

    Parameters
    ----------
    torus
        Rows and columns of the torus.
    power
        std^2 P_k in the order of a real Fourier transform, shape (my, mx // 2 + 1).
    shape
        Rows and columns that are shown.
    """

    def __init__(self, torus: tuple[int, int], power: Tensor, shape: tuple[int, int]) -> None:
        self.torus, self.power, self.shape = torus, power, shape
        self._cast: dict[tuple[torch.dtype, torch.device, bool], Tensor] = {}
        self._order: tuple[Tensor, Tensor] | None = None
        self._lags: Tensor | None = None

    def draw(self, noise: Source, *lead: int) -> Tensor:
        """Draw independent fields of every sample.

        Parameters
        ----------
        noise
            One stream per sample; a sample depends on its own stream alone.
        *lead
            Axes of independent fields before the two of the grid, such as the number of channels.

        Returns
        -------
        Tensor
            Shape (samples, *lead, ny, nx), float64, on the CPU.
        """
        if self._order is None:
            self._order = _places(self.torus)
        place, kind = self._order
        shells = range(max(n // 2 for n in self.torus) + 1)
        # one call for each shell: a longer draw of torch's generators does not begin with the shorter one
        white = torch.cat([noise.normal(*lead, max(1, 4 * s), 2, dtype=torch.float64) for s in shells], -2)
        z = white[..., place.flatten(), :].unflatten(-2, place.shape)
        real = z[..., 0] * torch.where(kind == 0, 1.0, math.sqrt(0.5))
        waves = torch.complex(real, z[..., 1] * math.sqrt(0.5) * kind) * self.power.sqrt()
        return self._shown(torch.fft.irfft2(waves, s=self.torus, norm="forward"))

    def root(self, x: Tensor) -> Tensor:
        """Return a root of K times x: fields of covariance K for white ones.

        Parameters
        ----------
        x
            Shape (..., my, mx), of the whole torus; that is the grid itself unless it is a plane.

        Returns
        -------
        Tensor
            Shape (..., ny, nx).
        """
        if tuple(x.shape[-2:]) != self.torus:
            raise GridError(f"x has {tuple(x.shape[-2:])} cells, and white noise on the torus of {self.torus} is needed.")
        return self._shown(self._times(x, True))

    def apply(self, x: Tensor) -> Tensor:
        """Return K x for fields (..., ny, nx)."""
        if tuple(x.shape[-2:]) != self.shape:
            raise GridError(f"x has {tuple(x.shape[-2:])} cells, and the field has {self.shape}.")
        if self.torus != self.shape:
            x = torch.nn.functional.pad(x, (0, self.torus[1] - self.shape[1], 0, self.torus[0] - self.shape[0]))
        return self._shown(self._times(x, False))

    def covariance(self) -> Tensor:
        """Return the covariance of the first cell with every cell, shape (ny, nx), float64."""
        if self._lags is None:
            self._lags = torch.fft.irfft2(self.power.to(torch.complex128), s=self.torus, norm="forward")
        return self._shown(self._lags)

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the covariance of cells (numbers along the flattened grid), which are broadcast against each other."""
        self.covariance()
        assert self._lags is not None
        nx = self.shape[1]
        out: Tensor = self._lags[(rows // nx - columns // nx) % self.torus[0], (rows % nx - columns % nx) % self.torus[1]]
        return out

    def _shown(self, field: Tensor) -> Tensor:
        return field[..., : self.shape[0], : self.shape[1]]

    def _times(self, x: Tensor, root: bool) -> Tensor:
        key = (x.dtype, x.device, root)
        if key not in self._cast:
            eigenvalues = self.power * (self.torus[0] * self.torus[1])
            self._cast[key] = (eigenvalues.sqrt() if root else eigenvalues).to(device=x.device, dtype=x.dtype)
        out: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * self._cast[key], s=self.torus)
        return out


class TorusField(_Waves):
    """Homogeneous Gaussian fields on a doubly periodic box.

    Parameters
    ----------
    shape
        Rows and columns of the grid.
    kernel
        Correlation function; on the torus it is summed over all ways around and scaled to 1 at distance zero.
    size
        Height and width of the box, in the units of the kernel's length.
    std
        Standard deviation.
    cutoff
        Number of waves across the longer side above which there are none, in any direction: the field is a band-limited function with variance
        std^2, the same one on every grid of more than 2 `cutoff` cells a side. None: no such limit.
    folded
        Whether waves that the grid cannot show count as those that they look like on it. True: the covariance between grid points is exact.
        False: they are left out, so that a finer grid adds waves and changes none, and a coarse one has less than the variance std^2.

    Attributes
    ----------
    left_out
        Share of the variance in waves that the grid does not show.

    Raises
    ------
    OptionError
        If an argument is out of its range.

    Examples
    --------
    >>> from xgenda.diffusion.kernels import Kernel
    >>> from xgenda.diffusion.noise import NoiseStream
    >>> noise = NoiseStream([(0, "2020-01-01", member) for member in range(4)])
    >>> TorusField((32, 32), Kernel("matern32", 0.1)).draw(noise).shape
    torch.Size([4, 32, 32])
    """

    def __init__(
        self,
        shape: tuple[int, int],
        kernel: Kernel,
        *,
        size: tuple[float, float] = (1.0, 1.0),
        std: float = 1.0,
        cutoff: int | None = None,
        folded: bool = True,
    ) -> None:
        shape = check_pair("shape", shape)
        _check_positive(std, "std")
        for side in size:
            _check_positive(side, "size")
        check_flag("folded", folded)
        self.kernel, self.size, self.std, self.cutoff, self.folded = kernel, (float(size[0]), float(size[1])), std, cutoff, folded
        if cutoff is not None:
            check_count("cutoff", cutoff)
            power = self._limited(shape, cutoff)
        elif folded:
            waves = torch.fft.rfft2(self._around(shape)).real.clamp(min=0.0)
            power = waves / _whole(waves, shape[1])
        else:
            total = float(self._around((1, 1))) * self.size[0] * self.size[1]
            power = self._density(*_axes(shape)) / total
            for axis, n in enumerate(shape):
                if n % 2 == 0:  # half of a wave, which a finer grid shows whole
                    power.select(axis, n // 2).zero_()
        self.left_out = max(0.0, 1.0 - _whole(power, shape[1]))
        super().__init__(shape, std**2 * power, shape)

    def on(self, shape: tuple[int, int], folded: bool | None = None) -> TorusField:
        """Return the same fields on another grid of the same box; `folded` there as here, or as is said."""
        folded = self.folded if folded is None else folded
        return TorusField(shape, self.kernel, size=self.size, std=self.std, cutoff=self.cutoff, folded=folded)

    def limited(self, x: Tensor) -> Tensor:
        """Return fields (..., ny, nx) without the waves that this noise does not have, those beyond `cutoff`."""
        if self.cutoff is None:
            return x
        kept = (self.power > 0).to(device=x.device, dtype=x.dtype)
        out: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * kept, s=self.shape)
        return out

    def whitened(self, x: Tensor) -> Tensor:
        """Return K^-1/2 x for fields (..., ny, nx), in the waves that this noise has, scaled to leave them their variance in white noise."""
        kept = self.power > 0
        share = torch.where(kept, 1 / self.power.clamp(min=1e-300), 0.0)
        gain = (share * (_whole(kept.double(), self.shape[1]) / _whole(share, self.shape[1]))).sqrt()
        out: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * gain.to(device=x.device, dtype=x.dtype), s=self.shape)
        return out

    def rows(self, row: Tensor, column: Tensor) -> Tensor:
        """Return what evaluates the functions of a field with a `cutoff` anywhere, as a matrix.

        Parameters
        ----------
        row, column
            Places in fractional rows and columns of the grid, shape (p,).

        Returns
        -------
        Tensor
            Shape (p, ny * nx), float64: its product with the values on the grid is the sum of the same waves at the places.

        Raises
        ------
        OptionError
            If there is no cutoff, or the grid does not show all waves up to it.
        """
        ny, nx = self.shape
        if (
            self.cutoff is None
            or self.left_out > INEXACT
            or any(2 * self.cutoff * n >= max(self.size) * m for n, m in zip(self.size, self.shape, strict=True))
        ):
            raise OptionError("Only a field whose cutoff the grid shows is known between its cells; give such a cutoff.")
        ky, kx = _axes(self.shape)
        phase = ky[:, None] * (row.double() / ny)[:, None, None] + kx * (column.double() / nx)[:, None, None]
        waves = torch.polar((self.power > 0).double() / (ny * nx), -2 * math.pi * phase)
        if not len(waves):  # of which the transform makes an error
            return torch.zeros(0, ny * nx, dtype=torch.float64)
        out: Tensor = torch.fft.irfft2(waves, s=self.shape, norm="forward").flatten(1)
        return out

    def highest_sigma(self, power: Tensor, share: float = 1e-4) -> float:
        """Return the noise level at which this noise drowns a prior tenfold in every wave.

        Sampling starts from noise alone, which is right only where the prior adds nothing to be seen: sigma^2 times the power of the noise must
        be far above that of the prior at every wavenumber, not only in total. So the spectrum of the noise must not fall faster than that of
        the prior. Of waves beyond `cutoff` there is no noise, and there must be no prior: see `limited`.

        Parameters
        ----------
        power
            Variance of the prior in each wave, in the order of a real Fourier transform, shape (ny, nx // 2 + 1).
        share
            Waves that together have less than this share of the prior's variance are not asked about.

        Raises
        ------
        OptionError
            If the level would be above 10,000, or more than a tenth of the variance lies beyond the cutoff.
        """
        known = (_multiplicity(self.torus[1]) * power).flatten().double()
        noise, total = self.power.flatten(), float(known.sum())
        if (beyond := float(known[noise == 0].sum())) > MOST_BEYOND * total:
            raise OptionError(
                f"cutoff={self.cutoff} leaves out waves that hold {beyond / total:.0%} of the variance of the prior; the noise must reach them: "
                f"use a larger cutoff, up to {(max(self.shape) - 1) // 2}, or none."
            )
        known = torch.where(noise > 0, known, 0.0)
        order = known.argsort()
        asked = known > 0
        asked[order[known[order].cumsum(0) < share * total]] = False
        ratio = power.double().flatten()[asked] / noise[asked]
        level = DROWNED * math.sqrt(float(ratio.max()))
        if level > HIGHEST:
            raise OptionError(
                f"The noise (kind={self.kernel.kind!r}, length={self.kernel.length:g}) is smoother than the prior: it would have to be "
                f"{level:.2g} standard deviations to drown every wave. Use a rougher or shorter kernel: "
                f"noise={{'kind': 'exponential', 'length': {min(0.1, self.kernel.scale / 2):.3g}}}, a share of the longer side of the box."
            )
        return level

    def _around(self, shape: tuple[int, int]) -> Tensor:
        """Return the kernel summed over all ways around the torus at every lag of the grid."""
        reach = self.kernel.reach()
        lags = [torch.arange(n, dtype=torch.float64) * (side / n) for n, side in zip(shape, self.size, strict=True)]
        turns = [range(-math.ceil(reach / side), math.ceil(reach / side) + 1) for side in self.size]
        # half of the lags along each axis: the other half mirrors them
        halves = [lag[: len(lag) // 2 + 1] for lag in lags]
        out = torch.zeros(len(halves[0]), len(halves[1]), dtype=torch.float64)
        for i, j in itertools.product(*turns):
            r = torch.hypot((halves[0] + i * self.size[0])[:, None], halves[1] + j * self.size[1])
            if float(r.min()) <= reach:
                out += self.kernel(r)
        for axis, n in enumerate(shape):
            back = torch.arange(n)
            out = out.index_select(axis, torch.minimum(back, n - back))
        return out

    def _density(self, ky: Tensor, kx: Tensor) -> Tensor:
        return self.kernel.density(2 * math.pi * torch.hypot((ky / self.size[0])[:, None], kx / self.size[1]))

    def _limited(self, shape: tuple[int, int], cutoff: int) -> Tensor:
        most = [math.floor(cutoff * side / max(self.size) + 1e-9) for side in self.size]
        ky, kx = (torch.arange(-m, m + 1) for m in most)
        waves = self._density(ky, kx)
        around = torch.hypot((ky / self.size[0])[:, None], kx / self.size[1]) * max(self.size)
        waves = torch.where(around <= cutoff + 1e-9, waves, 0.0)
        waves = waves / waves.sum()
        if not self.folded:
            waves = torch.where((2 * ky.abs() < shape[0])[:, None] & (2 * kx.abs() < shape[1]), waves, 0.0)
        out = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
        out.index_add_(0, ((ky % shape[0])[:, None] * shape[1] + kx % shape[1]).flatten(), waves.flatten())
        return out.reshape(shape)[:, : shape[1] // 2 + 1]


class PlaneField(_Waves):
    """Homogeneous Gaussian fields on a plane, with exactly the covariance of the kernel.

    Parameters
    ----------
    shape
        Rows and columns of the grid.
    kernel
        Correlation function.
    spacing
        Distance of rows and of columns, in the units of the kernel's length.
    std
        Standard deviation.

    Raises
    ------
    GridError
        If no torus of at most `LARGEST_EMBEDDING` cells has a covariance without negative eigenvalues: lengths too long for the grid.
    """

    def __init__(
        self, shape: tuple[int, int], kernel: Kernel, *, spacing: tuple[float, float] = (1.0, 1.0), std: float = 1.0
    ) -> None:
        shape = check_pair("shape", shape)
        _check_positive(std, "std")
        for step in spacing:
            _check_positive(step, "spacing")
        self.kernel, self.spacing, self.std = kernel, spacing, std
        times, negative = 2, math.inf
        while (torus := (times * shape[0], times * shape[1]))[0] * torus[1] <= LARGEST_EMBEDDING or times == 2:
            lags = [torch.minimum(k := torch.arange(n), n - k).double() * step for n, step in zip(torus, spacing, strict=True)]
            power = torch.fft.rfft2(kernel(torch.hypot(lags[0][:, None], lags[1])), norm="forward").real
            negative = -_whole(power.clamp(max=0.0), torus[1])
            if negative <= INEXACT:
                break
            times *= 2
        else:
            longest = math.hypot(*(n * step for n, step in zip(shape, spacing, strict=True))) / 4
            raise GridError(
                f"kind={kernel.kind!r} with length={kernel.length:g} is too long for {shape[0]} x {shape[1]} cells {spacing[0]:g} x "
                f"{spacing[1]:g} apart: even a torus of {torus[0] // 2} x {torus[1] // 2} cells has a covariance that is not positive (by "
                f"{negative:.1g} of the variance). Use kind='exponential', or a length of at most {longest:.3g}."
            )
        super().__init__(torus, std**2 * power.clamp(min=0.0), shape)


def _axes(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the wavenumbers of a real Fourier transform, rows and columns."""
    return torch.fft.fftfreq(shape[0]) * shape[0], torch.arange(shape[1] // 2 + 1)


def _multiplicity(columns: int) -> Tensor:
    """Return how many waves each column of a real Fourier transform stands for."""
    out = torch.full((columns // 2 + 1,), 2.0, dtype=torch.float64)
    out[0] = 1.0
    if columns % 2 == 0:
        out[-1] = 1.0
    return out


def _whole(power: Tensor, columns: int) -> float:
    """Return the sum over all waves."""
    return float((power * _multiplicity(columns)).sum())


def _places(torus: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return where in the order of shells the number of each wave of a real Fourier transform is, and how it is read.

    Shell s holds one of k and -k for all waves with max(|ky|, |kx|) = s: those with kx = s first, by ky; then for kx = 0, 1, ... below s those
    with ky = s and -s (for kx = 0 only s).

    Returns
    -------
    place, kind
        Shape (ny, nx // 2 + 1); kind is 1, -1 for the conjugate, or 0 where the number is real because k and -k are one wave on the grid.
    """
    ny, nx = torus
    ky = torch.arange(ny)
    ky = torch.where(2 * ky > ny, ky - ny, ky)[:, None]
    kx = torch.arange(nx // 2 + 1)[None]
    own = (kx == 0) | (2 * kx == nx)  # columns that hold k and -k
    flipped = own & (ky < 0)
    row = torch.where(flipped, -ky, ky)
    s = torch.maximum(row.abs(), kx.expand_as(row))
    inside = torch.where(kx == s, row + s, 2 * s + 1 + torch.where(kx == 0, 0, 2 * kx - 1 + (row < 0).long()))
    inside = torch.where((kx == 0) & (s == 0), 0, inside)
    place = torch.where(s == 0, 0, 1 + 2 * s * (s - 1) + inside)
    real = own & ((ky == 0) | (2 * ky == ny))
    return place, torch.where(real, 0, torch.where(flipped, -1, 1)).double()


def _check_positive(value: object, argument: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise OptionError(f"{argument}={value!r} is not accepted; it must be a positive number, for example {argument}=1.0.")

r"""Autoencoders of fields: a state of many cells and a latent vector of a few numbers.

Encoder and decoder are the best linear ones, which are known in closed form, plus a convolutional correction that starts at zero:

    mean(x) = P x + c(x),    log variance(x) = v + d(x),    g(z) = B z + e(z, B z).

For probabilistic principal components (Tipping and Bishop 1999, J. R. Stat. Soc. B 61, 611-622, eq. 5 to 8), x = B z + e with
e ~ N(0, s^2 I), these are P = (B^T B + s^2 I)^-1 B^T and v = log diag(s^2 (B^T B + s^2 I)^-1). Without the linear part this is a
plain convolutional variational autoencoder (Kingma and Welling 2014, arXiv 1312.6114).

Grids of any size: every level has half the cells of the one before, rounded up, and the decoder grows to exactly these sizes; nothing is padded
or cropped, and periodic axes may be of any length.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from xgenda.errors import OptionError
from xgenda.networks.unet import FieldConv, Periodic

LOWEST, HIGHEST = -14.0, 6.0  # logarithms of variances in the latent space
SMALLEST = 6  # cells along an axis, below which it is not halved again


def suitable_levels(shape: tuple[int, int]) -> int:
    """Return how often a grid is halved until its longer side has at most `SMALLEST` cells, at least once and at most five times."""
    return min(5, max(1, math.ceil(math.log2(max(shape) / SMALLEST)))) if max(shape) > 1 else 1


class Autoencoder(nn.Module):
    """Encoder to mean and log-variance of a latent vector, and decoder.

    Parameters
    ----------
    channels, shape
        Of a state.
    latent
        Length k of the latent vector.
    width
        Channels of the convolutions at half the resolution: half as many at the full one, twice as many from the second level on, and four
        times as many from the fourth. A search decodes hundreds of times, and at full resolution a channel costs most.
    levels
        How often the grid is halved; 0: no convolutions, the linear maps alone. None: until about six cells are left.
    periodic
        Whether longitude wraps; 'both' where latitude does too.
    variational
        Whether the latent vector of a state is uncertain; without, its log-variance is not used.
    linear
        Whether there is a linear part. Its arrays are buffers, zero until they are filled by `start_from`, and are not trained.

    Raises
    ------
    OptionError
        If there is neither a linear part nor a convolution.
    """

    def __init__(
        self,
        channels: int,
        shape: tuple[int, int],
        latent: int,
        *,
        width: int = 16,
        levels: int | None = None,
        periodic: Periodic = False,
        variational: bool = True,
        linear: bool = True,
    ) -> None:
        super().__init__()
        self.shape: tuple[int, int, int] = (channels, *shape)
        self.latent, self.variational = latent, variational
        levels = suitable_levels(shape) if levels is None else levels
        if levels == 0 and not linear:
            raise OptionError("An autoencoder without convolutions (levels=0) needs its linear part; pass linear=True.")
        size = math.prod(self.shape)
        self.basis: Tensor | None
        self.projection: Tensor | None
        self.register_buffer("basis", torch.zeros(latent, size) if linear else None)
        self.register_buffer("projection", torch.zeros(latent, size) if linear else None)
        self.log_variance: Tensor
        self.register_buffer("log_variance", torch.zeros(latent))
        # of the decoder's error, per channel: where it starts, and what is learned
        self.log_error_start: Tensor
        self.register_buffer("log_error_start", torch.zeros(channels))
        self.log_error = nn.Parameter(torch.zeros(channels))
        # latent vectors are given to the decoder, and taken from the encoder, through this affine map
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(latent))
        self.spread: Tensor
        self.register_buffer("spread", torch.eye(latent))
        self.inner = _Convolutions(channels, shape, latent, width, levels, periodic, linear) if levels else None

    @torch.no_grad()
    def start_from(self, basis: Tensor, projection: Tensor, log_variance: Tensor, log_error: Tensor) -> None:
        """Take the linear part and the errors that belong to it.

        Parameters
        ----------
        basis, projection
            B and P, both of shape (k, channels * rows * columns).
        log_variance
            Of the latent vector of a state, shape (k,).
        log_error
            Logarithm of the variance of the decoder's error, shape (channels,).
        """
        if self.basis is not None and self.projection is not None:
            self.basis.copy_(basis)
            self.projection.copy_(projection)
            self.log_variance.copy_(log_variance.clamp(LOWEST, HIGHEST))
        self.log_error_start.copy_(log_error)
        self.log_error.copy_(log_error)

    @torch.no_grad()
    def standardise(self, centre: Tensor, spread: Tensor) -> None:
        """Make latent vectors with this mean (k,) and this Cholesky factor of their covariance (k, k) standard normal ones."""
        self.centre.copy_(centre)
        self.spread.copy_(spread)

    @torch.no_grad()
    def restandardise(self, centre: Tensor, spread: Tensor) -> None:
        """Do the same to vectors as they are given to the decoder now, after an earlier `standardise`."""
        self.standardise(self.centre + self.spread @ centre.to(self.spread), self.spread @ spread.to(self.spread))

    @torch.no_grad()
    def scale_output(self, weight: float) -> None:
        """Multiply what the convolutions add, to latent vectors and fields, by a number; 0 leaves the linear part."""
        if self.inner is not None:
            for layer in (self.inner.condense, self.inner.last.conv):
                for parameter in layer.parameters():
                    parameter.mul_(weight)
        self.log_error.copy_(self.log_error_start + weight * (self.log_error - self.log_error_start))

    def exactly(self) -> Autoencoder:
        """Keep the linear maps in double precision, for states and latent vectors in double precision; convolutions stay as they are."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, buffer.double())
        return self

    def position_channels(self) -> Tensor | None:
        """Return None: the dense layers know where they are."""
        return None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latent vectors of states (batch, channels, rows, columns), each shape (batch, k).

        The log-variance is that of each component before `standardise`; see `turned`.
        """
        mean, variance = self._encoded(x)
        return self.turned(mean - self.centre), variance

    def turned(self, change: Tensor) -> Tensor:
        """Return differences (batch, k) of latent vectors from before `standardise` as they are after it."""
        out: Tensor = torch.linalg.solve_triangular(self.spread, change.to(self.spread).T, upper=False).T
        return out

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean: Tensor | float = 0.0
        if self.projection is not None:
            mean = x.flatten(1) @ self.projection.T
        variance: Tensor = self.log_variance.expand(len(x), -1)
        if self.inner is not None:
            added, wider = self.inner.encode(x.to(self.log_error.dtype)).to(x.dtype).chunk(2, 1)
            mean, variance = mean + added, (variance + wider).clamp(LOWEST, HIGHEST)
        assert isinstance(mean, Tensor)
        return mean, variance

    def decode(self, z: Tensor) -> Tensor:
        """Return the states (batch, channels, rows, columns) of latent vectors (batch, k)."""
        return self._decoded(self.centre + z @ self.spread.T)

    def _decoded(self, z: Tensor) -> Tensor:
        plain = None if self.basis is None else (z @ self.basis).reshape(-1, *self.shape)
        if self.inner is None:
            assert plain is not None
            return plain
        dtype = self.log_error.dtype
        added = self.inner.decode(z.to(dtype), None if plain is None else plain.to(dtype)).to(z.dtype)
        return added if plain is None else plain + added

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the loss of a variational autoencoder needs.

        Parameters
        ----------
        x
            States, shape (batch, channels, rows, columns).
        noise
            Standard normal numbers, shape (batch, k).

        Returns
        -------
        tuple
            Mean and log-variance of the latent vectors, shape (batch, k); the states of vectors drawn from these; and the logarithm of the
            variance of the decoder's error, shape (channels,).
        """
        mean, variance = self._encoded(x)
        z = mean + (0.5 * variance).exp() * noise if self.variational else mean
        return mean, variance, self._decoded(z), self.log_error


class Encoder(nn.Module):
    """Fields of any kind to mean and log-variance of a latent vector: what is added to those of a linear map.

    Parameters
    ----------
    channels, shape
        Of the fields.
    latent
        Length k of the latent vector.
    width, levels, periodic
        As of `Autoencoder`; at first nothing is added, and with 0 levels nothing ever is.
    """

    def __init__(
        self, channels: int, shape: tuple[int, int], latent: int, *, width: int = 16, levels: int | None = None, periodic: Periodic = False
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent = latent
        levels = suitable_levels(shape) if levels is None else levels
        self.log_variance: Tensor
        self.register_buffer("log_variance", torch.zeros(latent))
        self.inner = _Contraction(channels, shape, latent, width, levels, periodic, silent=True) if levels else None

    def position_channels(self) -> Tensor | None:
        """Return None: the dense layer knows where it is."""
        return None

    @torch.no_grad()
    def scale_output(self, weight: float) -> None:
        """Multiply what the convolutions add by a number; 0 leaves the linear map."""
        if self.inner is not None:
            for parameter in self.inner.condense.parameters():
                parameter.mul_(weight)

    def forward(self, x: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, each shape (batch, k), of fields (batch, channels, rows, columns) and their linear answers (batch, k)."""
        variance: Tensor = self.log_variance.expand(len(x), -1)
        if self.inner is not None:
            added, wider = self.inner.encode(x).chunk(2, 1)
            linear, variance = linear + added, variance + wider
        return linear, variance.clamp(LOWEST, HIGHEST)


class _Contraction(nn.Module):
    """Convolutions from fields to two numbers for each of a latent vector."""

    def __init__(
        self, channels: int, shape: tuple[int, int], latent: int, width: int, levels: int, periodic: Periodic, silent: bool
    ) -> None:
        super().__init__()
        sizes, widths = [shape], [width // 2]
        for k in range(levels):
            ny, nx = sizes[-1]
            sizes.append((-(-ny // 2), -(-nx // 2)))
            widths.append(width * (1 if k == 0 else 2 if k < 3 else 4))
        self.sizes, self.widths = sizes, widths
        self.first = FieldConv(channels, widths[0], periodic)
        self.down = nn.ModuleList(FieldConv(a, b, periodic, stride=2) for a, b in itertools.pairwise(widths))
        self.shrunk = nn.ModuleList(_norm(w) for w in widths[1:])
        self.coarsest = (widths[-1], *sizes[-1])
        self.condense = nn.Linear(math.prod(self.coarsest), 2 * latent)
        if silent:  # the best linear answer is where training starts
            nn.init.zeros_(self.condense.weight)
            nn.init.zeros_(self.condense.bias)

    def encode(self, x: Tensor) -> Tensor:
        """Return what is added to mean and log-variance, shape (batch, 2 k)."""
        h = self.first(x)
        for conv, norm in zip(self.down, self.shrunk, strict=True):
            h = norm(conv(functional.silu(h)))
        out: Tensor = self.condense(functional.silu(h).flatten(1))
        return out


class _Convolutions(_Contraction):
    """What is added to the linear maps."""

    def __init__(
        self, channels: int, shape: tuple[int, int], latent: int, width: int, levels: int, periodic: Periodic, linear: bool
    ) -> None:
        super().__init__(channels, shape, latent, width, levels, periodic, silent=linear)
        widths = self.widths
        self.expand = nn.Linear(latent, math.prod(self.coarsest))
        pairs = list(itertools.pairwise(widths[::-1]))
        self.up = nn.ModuleList(FieldConv(a, b, periodic) for a, b in pairs)
        self.grown = nn.ModuleList(_norm(b) for _, b in pairs)
        self.mix = FieldConv(widths[0] + (channels if linear else 0), widths[0], periodic)
        self.last = FieldConv(widths[0], channels, periodic)
        nn.init.zeros_(self.last.conv.weight)
        nn.init.zeros_(self.last.conv.bias)  # type: ignore[arg-type]

    def decode(self, z: Tensor, plain: Tensor | None) -> Tensor:
        """Return what is added to the linear field, which it sees."""
        h = self.expand(z).reshape(-1, *self.coarsest)
        for conv, norm, size in zip(self.up, self.grown, self.sizes[-2::-1], strict=True):
            h = norm(conv(functional.interpolate(functional.silu(h), size=size, mode="nearest")))
        h = functional.silu(h)
        h = functional.silu(self.mix(h if plain is None else torch.cat([h, plain], 1)))
        out: Tensor = self.last(h)
        return out


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, channels // 4), channels)

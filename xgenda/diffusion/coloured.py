r"""Diffusion with coloured noise: x = x0 + sigma K^1/2 e, for priors over functions.

White noise has no limit on ever finer grids; fields of a covariance K have one, so that the same diffusion is defined at every resolution
(Lim et al. 2023, arXiv 2302.07400). Where K has a unit diagonal all that concerns single cells stays as it is: levels, samplers, the scalings of
an EDM denoiser. Tweedie's formula becomes D = x + sigma^2 K grad log p(x), and with it guidance: the estimate given y is
D + sigma^2 K grad log p(y | x), and Cov[x0 | x] = sigma^2 J K with J = dD / dx.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xgenda.diffusion.noise import LabelledNoise
from xgenda.diffusion.random_fields import Colour, TorusField
from xgenda.errors import GridError


class ColouredNoise:
    """Draws of a random field in the place of white noise, for `xgenda.diffusion.samplers`.

    Each draw has a stream of its own, so that the second field of a sample is as independent of the resolution as the first.

    Parameters
    ----------
    keys
        As of `LabelledNoise`: of every sample, the (seed, time label, member number) of its parts.
    field
        What is drawn.
    """

    def __init__(self, keys: Sequence[Sequence[tuple[int, str, int]]], field: Colour) -> None:
        self._keys, self._field, self._drawn = [list(k) for k in keys], field, 0

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._keys)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw the next fields of every sample, shape (samples, *shape), on the CPU; `shape` ends with rows and columns of the field."""
        if tuple(shape[-2:]) != tuple(self._field.shape):
            raise GridError(f"The field has {self._field.shape} cells, and noise for {tuple(shape[-2:])} was asked for.")
        again = f"|draw {self._drawn}" if self._drawn else ""
        self._drawn += 1
        stream = LabelledNoise([[(seed, label + again, member) for seed, label, member in parts] for parts in self._keys])
        return self._field.draw(stream, *shape[:-2]).to(dtype)


class HomogeneousDenoiser:
    """The exact denoiser of a homogeneous Gaussian on a torus under coloured noise: mean + S (S + sigma^2 K)^-1 (x - mean).

    Parameters
    ----------
    prior
        S: fields on the same grid; channels are independent.
    noise
        K; None for white noise.
    mean
        A number, or of a shape that broadcasts to the state.
    """

    def __init__(self, prior: TorusField, noise: TorusField | None = None, mean: Tensor | float = 0.0) -> None:
        self.prior, self.mean = prior, mean
        white = torch.full_like(prior.power, 1 / (prior.shape[0] * prior.shape[1]))
        self._noise = white if noise is None else noise.power

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the posterior mean of states (batch, channels, ny, nx)."""
        power = self.prior.power
        gain = torch.where(power > 0, power / (power + sigma**2 * self._noise).clamp(min=1e-300), 0.0).to(x)
        out: Tensor = self.mean + torch.fft.irfft2(torch.fft.rfft2(x - self.mean) * gain, s=self.prior.shape)
        return out


def like_fields(colour: Colour, flat: Tensor) -> Tensor:
    """Return K v for flattened states (batch, channels * ny * nx), channels independent."""
    return colour.apply(flat.reshape(len(flat), -1, *colour.shape)).reshape(flat.shape)

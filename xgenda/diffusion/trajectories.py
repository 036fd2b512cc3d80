r"""Trajectories of any length from a model of short windows.

A network trained on windows of 2k + 1 consecutive states gives, for a trajectory of L states, L - 2k windows. Each keeps its centre;
the first also keeps the k states before, the last the k states after (Rozet & Louppe 2023, arXiv 2306.10574, algorithm 2). That is
the score of a trajectory in which a state depends on the others only through the k before and after it. All windows go through
the network in batches, and gradients go through the composition, so any guidance, operator and sampler acts on the whole.

At high noise the states far away still matter, and a composition of short windows does not see them. Where the denoiser of the window is built
on a Gaussian that is separable in time, the Gaussian of the whole trajectory is known too: it is used exactly, and only what the network
adds to that of a window is composed. Untrained that is the Gaussian posterior of the trajectory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xgenda.diffusion.anchors import Separable
from xgenda.diffusion.denoisers import Denoiser, EDMDenoiser
from xgenda.errors import OptionError


class TrajectoryDenoiser:
    """The denoiser of a trajectory, from that of a window.

    Parameters
    ----------
    denoise
        Of windows with their states flattened into channels, (batch, (2k + 1) channels, ...).
    k
        States before and after the centre.
    batch
        Windows computed at once; None for all. Changes memory only.
    """

    def __init__(self, denoise: Denoiser, k: int, batch: int | None = None) -> None:
        self.denoise, self.k, self.batch = denoise, k, batch
        anchor = getattr(denoise, "anchor", None)
        self.anchor = anchor if isinstance(anchor, Separable) and isinstance(denoise, EDMDenoiser) else None
        self._whole: Separable | None = None
        self.sigma_range = getattr(denoise, "sigma_range", None)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the denoised trajectory, shape (batch, length, channels, ...)."""
        width, length = 2 * self.k + 1, x.shape[1]
        if length < width:
            raise OptionError(f"The trajectory has {length} states and the windows of the model {width}; give at least {width}.")
        channels, event = x.shape[2], x.shape[3:]
        windows = x.unfold(1, width, 1).movedim(-1, 2)  # (batch, length - 2k, 2k + 1, channels, ...)
        count = windows.shape[1]
        flat = windows.reshape(len(x) * count, width * channels, *event)
        pieces = [flat] if self.batch is None else flat.split(self.batch)
        found = torch.cat([self._window(p, sigma) for p in pieces]).reshape(len(x), count, width, channels, *event)
        out = torch.cat([found[:, 0, : self.k], found[:, :, self.k], found[:, -1, self.k + 1 :]], 1)
        if self.anchor is None:
            return out
        return out + self.whole(length).given_noise(sigma).shrink(x.flatten(1)).reshape(x.shape)

    def whole(self, length: int) -> Separable:
        """Return the Gaussian of trajectories of this length, where there is one."""
        assert self.anchor is not None
        if self._whole is None or self._whole.length != length:
            self._whole = self.anchor.of_length(length)
        return self._whole

    def _window(self, windows: Tensor, sigma: float) -> Tensor:
        """Return what is composed: the denoised windows, or what the network adds to their Gaussian."""
        if self.anchor is None:
            return self.denoise(windows, sigma)
        assert isinstance(self.denoise, EDMDenoiser)
        return self.denoise.parts(windows, sigma)[1]


def windows_of(states: Tensor, k: int) -> Tensor:
    """Return all windows of 2k + 1 consecutive states (n, channels, ...) as (n - 2k, (2k + 1) channels, ...)."""
    width = 2 * k + 1
    moved = states.unfold(0, width, 1).movedim(-1, 1)
    return moved.reshape(len(moved), width * states.shape[1], *states.shape[2:])

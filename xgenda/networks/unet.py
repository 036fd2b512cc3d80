"""A small U-Net for fields, after the layout of Song et al. (2021, arXiv 2011.13456), kept light enough for two CPU cores.

Any grid size (padded to a multiple of the stride, cropped at the end), except along periodic axes, which must be such multiples and are
padded circularly; beyond the poles of a global grid are the rows of the meridian on the other side; group normalisation with
adaptive scale and shift from the noise level, output initialised to zero.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xgenda.errors import GridError
from xgenda.networks.shared import LevelNetwork

Periodic = bool | Literal["both", "sphere", "poles"]
SPHERE = ("sphere", "poles")  # grids around the sphere whose rows end beside the poles, or at them


def pad_field(x: Tensor, left: int, right: int, top: int, bottom: int, periodic: Periodic) -> Tensor:
    """Pad circularly along the periodic axes (longitude, or 'both'), by the edge value along the others.

    On the 'sphere' latitude goes on across the pole: rows are mirrored, and half of the longitudes away. Where the first and the last row are at
    the 'poles', these are not repeated.
    """
    if periodic == "both":
        return functional.pad(x, (left, right, top, bottom), mode="circular")
    if periodic in SPHERE:
        first, half = int(periodic == "poles"), x.shape[-1] // 2
        across = x.roll(half, -1)
        south, north = across[..., first : first + top, :].flip(-2), across.flip(-2)[..., first : first + bottom, :]
        return functional.pad(torch.cat([south, x, north], -2), (left, right, 0, 0), mode="circular")
    x = functional.pad(x, (left, right, 0, 0), mode="circular" if periodic else "replicate")
    return functional.pad(x, (0, 0, top, bottom), mode="replicate")


class FieldConv(nn.Module):
    """A 3 x 3 convolution with the padding of `pad_field`."""

    def __init__(self, inputs: int, outputs: int, periodic: Periodic, stride: int = 1) -> None:
        super().__init__()
        self.periodic = periodic
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, outputs, ny / stride, nx / stride)."""
        out: Tensor = self.conv(pad_field(x, 1, 1, 1, 1, self.periodic))
        return out


class Block(nn.Module):
    """Two convolutions with a residual connection; the noise embedding scales and shifts between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int, periodic: Periodic) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(min(8, inputs // 4), inputs), FieldConv(inputs, outputs, periodic)
        self.norm2, self.conv2 = nn.GroupNorm(min(8, outputs // 4), outputs), FieldConv(outputs, outputs, periodic)
        self.affine = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (batch, outputs, ny, nx)."""
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, 1)
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h) * (1 + scale) + shift))
        out: Tensor = (self.skip(x) + h) / math.sqrt(2)
        return out


class UNet(LevelNetwork):
    """U-Net F(x, noise label, condition).

    Parameters
    ----------
    channels
        Channels of the state (input and output).
    condition_channels
        Channels of the condition, concatenated to the input.
    position
        Number of learned static input channels on the grid `shape`, which tell the network where it is.
    shape
        Grid, needed for `position`.
    width, multipliers
        Channels of each level.
    periodic
        Whether longitude wraps; 'both' where latitude does too (doubly periodic boxes). 'sphere' or 'poles': longitude wraps, and latitude goes on
        across the poles, between rows or at the first and the last one. The components of a vector then come from across the pole as they are,
        though east is west there; the network sees that as any other feature of these rows.
    """

    last: FieldConv

    def __init__(
        self,
        channels: int,
        condition_channels: int = 0,
        *,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 2),
        position: int = 0,
        shape: tuple[int, int] = (1, 1),
        periodic: Periodic = False,
    ) -> None:
        super().__init__()
        self.arguments = {
            "channels": channels, "condition_channels": condition_channels, "width": width, "multipliers": multipliers, "position": position,
            "shape": shape, "periodic": periodic,
        }  # fmt: skip
        self.stride = 2 ** (len(multipliers) - 1)
        self.periodic = periodic
        embedding = self.hear(width)
        self.position = nn.Parameter(0.1 * torch.randn(position, *shape)) if position else None
        widths = [width * m for m in multipliers]
        self.first = FieldConv(channels + condition_channels + position, width, periodic)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        previous = width
        for i, w in enumerate(widths):
            self.down.append(Block(previous, w, embedding, periodic))
            self.shrink.append(FieldConv(w, w, periodic, stride=2) if i < len(widths) - 1 else nn.Identity())
            previous = w
        self.middle = Block(previous, previous, embedding, periodic)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i, w in reversed(list(enumerate(widths))):
            self.up.append(Block(previous + w, w, embedding, periodic))
            self.grow.append(FieldConv(w, widths[i - 1], periodic) if i else nn.Identity())
            previous = widths[i - 1] if i else w
        self.norm, self.last = nn.GroupNorm(min(8, previous // 4), previous), FieldConv(previous, channels, periodic)
        nn.init.zeros_(self.last.conv.weight)
        nn.init.zeros_(self.last.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """Return F, of the shape of `x` (batch, channels, ny, nx).

        Parameters
        ----------
        x
            State.
        label
            Of the noise, shape (batch,).
        condition
            Shape (batch, c, ny, nx).
        position
            Instead of the network's own positional channels, shape (batch, P, ny, nx): those of tiles of its domain.
        """
        embedding = self.heard(label)
        parts = [x] if condition is None else [x, condition]
        if self.position is not None:
            parts.append((self.position if position is None else position).expand(len(x), -1, -1, -1))
        h, size = torch.cat(parts, 1), x.shape[-2:]
        bottom, right = (-size[0]) % self.stride, (-size[1]) % self.stride
        if (right and self.periodic) or (bottom and self.periodic == "both"):  # what is appended would lie between neighbours
            raise GridError(
                f"A periodic axis must be a multiple of {self.stride} cells for this network, and the grid is {size[0]} x {size[1]}; "
                f"use fewer multipliers, or periodic=False."
            )
        if self.periodic in SPHERE and size[1] % (2 * self.stride):
            raise GridError(
                f"A grid around the sphere needs a multiple of {2 * self.stride} columns for this network, so that each meridian has one "
                f"across the pole, and the grid is {size[0]} x {size[1]}; use fewer multipliers, or periodic=True."
            )
        if bottom or right:
            h = pad_field(h, 0, right, 0, bottom, self.periodic)
        h = self.first(h)
        kept = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, embedding)
            kept.append(h)
            h = shrink(h)
        h = self.middle(h, embedding)
        for i, (block, grow) in enumerate(zip(self.up, self.grow, strict=True)):
            h = block(torch.cat([h, kept.pop()], 1), embedding)
            if i < len(self.up) - 1:
                h = grow(functional.interpolate(h, scale_factor=2, mode="nearest"))
        out: Tensor = self.last(functional.silu(self.norm(h)))
        return out[..., : size[0], : size[1]]

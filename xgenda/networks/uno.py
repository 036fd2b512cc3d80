r"""A small U-shaped neural operator: a U-Net whose convolutions are in Fourier space, so that it acts on functions and not on cells.

Layers are those of Fourier neural operators (Li et al. 2021, arXiv 2010.08895, eq. 4 and 5): a linear map of channels for each of the lowest
waves, beside a linear map at each place; the levels of a U (Rahman, Ross & Azizzadenesheli 2023, arXiv 2204.11127) are grids of half
as many cells, to which fields are carried by their Fourier coefficients. Weights are full, or of low rank (a CP decomposition, as Kossaifi et al.
2023, arXiv 2310.00120, have them): R_io(k) = sum_r A_ir B_or C_r(k_y) D_r(k_x).

Linear parts treat a band-limited function alike on every grid that shows it. Pointwise functions do not quite: they make shorter waves, and what a
grid cannot show it takes for something else. With `resolution` the network works on a grid of its own, to and from which fields are carried by
their Fourier coefficients: then it is the same function on every grid, and its cost does not depend on the grid, and what is
shorter than the waves of that grid it neither sees nor makes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xgenda.errors import OptionError, check_count, check_pair
from xgenda.networks.shared import LevelNetwork

MARGIN = 0.25  # of an axis that does not wrap, over which its two ends are joined


class SpectralConv(nn.Module):
    """A linear map of channels for each wave up to `modes` along both axes; nothing of the others.

    Parameters
    ----------
    inputs, outputs
        Channels.
    modes
        Highest wave along each axis. A grid that does not show so many uses those that it shows.
    rank
        Of the weights; None for full ones.
    """

    def __init__(self, inputs: int, outputs: int, modes: int, rank: int | None = None) -> None:
        super().__init__()
        self.outputs, self.modes, self.rank = outputs, modes, rank
        rows, columns = 2 * modes + 1, modes + 1
        # real and imaginary part along the last axis: optimisers, averages and files know real numbers only
        if rank is None:
            self.weight = nn.Parameter(torch.randn(inputs, outputs, rows, columns, 2) / math.sqrt(2 * inputs))
        else:
            self.inward = nn.Parameter(torch.randn(inputs, rank, 2) / math.sqrt(2 * inputs))
            self.outward = nn.Parameter(torch.randn(outputs, rank, 2) / math.sqrt(2 * rank))
            self.rows = nn.Parameter(torch.randn(rank, rows, 2) / math.sqrt(2))
            self.columns = nn.Parameter(torch.randn(rank, columns, 2) / math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, outputs, ny, nx), float32."""
        ny, nx = x.shape[-2:]
        with torch.autocast(x.device.type, enabled=False):  # transforms in half precision lose the long waves
            waves = torch.fft.rfft2(x.float(), norm="forward")
            most = [min(self.modes, (n - 1) // 2) for n in (ny, nx)]
            ky = torch.arange(-most[0], most[0] + 1, device=x.device)
            shown, own = ky % ny, ky + self.modes
            low = waves[:, :, shown, : most[1] + 1]
            out = torch.zeros(len(x), self.outputs, ny, nx // 2 + 1, dtype=waves.dtype, device=x.device)
            out[:, :, shown, : most[1] + 1] = self._multiply(low, own, most[1] + 1)
            found: Tensor = torch.fft.irfft2(out, s=(ny, nx), norm="forward")
            return found

    def _multiply(self, low: Tensor, own: Tensor, columns: int) -> Tensor:
        if self.rank is None:
            full = torch.view_as_complex(self.weight)[:, :, own, :columns]
            return torch.einsum("biyx,ioyx->boyx", low, full)
        a, b, c, d = (torch.view_as_complex(p) for p in (self.inward, self.outward, self.rows, self.columns))
        inner = torch.einsum("biyx,ir->bryx", low, a) * (c[:, own, None] * d[:, None, :columns])
        return torch.einsum("bryx,or->boyx", inner, b)


def resample(x: Tensor, size: tuple[int, int], *, limit: bool = False) -> Tensor:
    """Return fields on another grid of the same torus, by their Fourier coefficients: those that both grids show, and no others.

    On the same grid that is the fields themselves; with `limit` without what is half of a wave there (in rows or columns of even number).
    """
    ny, nx = x.shape[-2:]
    if (ny, nx) == size and not (limit and (ny % 2 == 0 or nx % 2 == 0)):
        return x
    with torch.autocast(x.device.type, enabled=False):
        waves = torch.fft.rfft2(x.float(), norm="forward")
        most = [(min(a, b) - 1) // 2 for a, b in zip((ny, nx), size, strict=True)]
        ky = torch.arange(-most[0], most[0] + 1, device=x.device)
        out = torch.zeros(*x.shape[:-2], size[0], size[1] // 2 + 1, dtype=waves.dtype, device=x.device)
        out[..., ky % size[0], : most[1] + 1] = waves[..., ky % ny, : most[1] + 1]
        found: Tensor = torch.fft.irfft2(out, s=size, norm="forward")
        return found


class OperatorBlock(nn.Module):
    """Two layers with a residual connection; the noise embedding scales and shifts between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int, modes: int, rank: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(math.gcd(8, c), c) for c in (inputs, outputs))
        self.spectral1, self.place1 = SpectralConv(inputs, outputs, modes, rank), nn.Conv2d(inputs, outputs, 1)
        self.spectral2, self.place2 = SpectralConv(outputs, outputs, modes, rank), nn.Conv2d(outputs, outputs, 1)
        self.affine = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (batch, outputs, ny, nx)."""
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, 1)
        h = functional.silu(self.norm1(x))
        h = self.spectral1(h) + self.place1(h)
        h = functional.silu(self.norm2(h) * (1 + scale) + shift)
        h = self.spectral2(h) + self.place2(h)
        out: Tensor = (self.skip(x) + h) / math.sqrt(2)
        return out


class UNO(LevelNetwork):
    """U-shaped neural operator F(x, noise label, condition), for any grid.

    Parameters
    ----------
    channels
        Channels of the state (input and output).
    condition_channels
        Channels of the condition, concatenated to the input.
    width, multipliers
        Channels of each level; each has half of the cells of the one before along both axes.
    modes
        Highest wave of the first level's layers, along both axes; each level has half of the one before.
    rank
        Of the spectral weights; None for full ones, which are (2 `modes` + 1) (`modes` + 1) matrices a layer.
    position
        Number of learned static input channels, kept on the grid `shape`, which tell the network where it is; on other grids interpolated.
    shape
        Grid, needed for `position`.
    periodic
        Whether longitude wraps; 'both' where latitude does too. An axis that does not is continued so that its ends join.
    resolution
        Rows and columns on which the network works; None: those of its input.

    Raises
    ------
    OptionError
        If an argument is out of its range.
    """

    def __init__(
        self,
        channels: int,
        condition_channels: int = 0,
        *,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 2),
        modes: int = 12,
        rank: int | None = None,
        position: int = 0,
        shape: tuple[int, int] = (1, 1),
        periodic: bool | Literal["both"] = False,
        resolution: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if periodic not in (True, False, "both"):
            raise OptionError(f"periodic={periodic!r} is not accepted by a neural operator; it must be True, False or 'both'.")
        check_count("modes", modes)
        if rank is not None:
            check_count("rank", rank)
        self.resolution = None if resolution is None else check_pair("resolution", resolution, 2)
        self.arguments = {
            "channels": channels, "condition_channels": condition_channels, "width": width, "multipliers": multipliers, "modes": modes,
            "rank": rank, "position": position, "shape": shape, "periodic": periodic, "resolution": resolution,
        }  # fmt: skip
        self.periodic, self.stride = periodic, 2 ** (len(multipliers) - 1)
        embedding = self.hear(width)
        self.position = nn.Parameter(0.1 * torch.randn(position, *shape)) if position else None
        widths, kept = [width * m for m in multipliers], [max(1, modes // 2**i) for i in range(len(multipliers))]
        self.first = nn.Conv2d(channels + condition_channels + position, width, 1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        previous = width
        for w, m in zip(widths, kept, strict=True):
            self.down.append(OperatorBlock(previous, w, embedding, m, rank))
            previous = w
        self.middle = OperatorBlock(previous, previous, embedding, kept[-1], rank)
        for w, m in zip(widths[::-1], kept[::-1], strict=True):
            self.up.append(OperatorBlock(previous + w, w, embedding, m, rank))
            previous = w
        self.norm, self.last = nn.GroupNorm(math.gcd(8, previous), previous), nn.Conv2d(previous, channels, 1)
        self.scale_output(0.0)

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
            Instead of the network's own positional channels, shape (batch, P, ny, nx).
        """
        embedding = self.heard(label)
        size = (int(x.shape[-2]), int(x.shape[-1]))
        parts = [x] if condition is None else [x, condition]
        if self.position is not None:
            own = self.position[None] if position is None else position
            if tuple(own.shape[-2:]) != size:
                own = functional.interpolate(own, size=size, mode="bilinear", align_corners=False)
            parts.append(own.expand(len(x), -1, -1, -1))
        joined = self._joined(torch.cat(parts, 1))
        whole = (int(joined.shape[-2]), int(joined.shape[-1]))
        inner = whole
        if self.resolution is not None:  # with the same share of margin
            inner = (round(self.resolution[0] * whole[0] / size[0]), round(self.resolution[1] * whole[1] / size[1]))
        h = self.first(resample(joined, inner, limit=self.resolution is not None))
        kept = []
        for i, block in enumerate(self.down):
            h = block(resample(h, _halved(inner, i)), embedding)
            kept.append(h)
        h = self.middle(h, embedding)
        for i, block in reversed(list(enumerate(self.up[::-1]))):
            h = block(torch.cat([resample(h, _halved(inner, i)), kept.pop()], 1), embedding)
        h = self.last(functional.silu(self.norm(h)))
        return resample(h, whole, limit=self.resolution is not None)[..., : size[0], : size[1]]

    def _joined(self, x: Tensor) -> Tensor:
        """Continue axes that do not wrap by a margin in which the last value goes over into the first."""
        for axis, wraps in ((-2, self.periodic == "both"), (-1, bool(self.periodic))):
            if wraps:
                continue
            n = x.shape[axis]
            margin = max(1, round(MARGIN * n))
            t = torch.arange(1, margin + 1, device=x.device, dtype=x.dtype) / (margin + 1)
            t = (0.5 - 0.5 * torch.cos(math.pi * t)).reshape([-1, 1] if axis == -2 else [-1])
            x = torch.cat([x, x.narrow(axis, n - 1, 1) * (1 - t) + x.narrow(axis, 0, 1) * t], axis)
        return x


def _halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """Return rows and columns of a level."""
    return max(1, -(-size[0] // 2**times)), max(1, -(-size[1] // 2**times))

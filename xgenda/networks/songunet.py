r"""SongUNet: the U-Net of Song et al. (2021, arXiv 2011.13456, "DDPM++") in the form of Karras et al. (2022, arXiv 2206.00364, table 7).

Published CorrDiff networks (Mardani et al. 2023, arXiv 2309.15214) are of this family, with the names of parameters that are used here, so that
their state dicts load strictly. Shapes are (batch, channels, rows, columns); rows and columns must be multiples of 2^(levels - 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xgenda.errors import GridError, OptionError, check_choice

EMBEDDINGS = ("positional", "fourier", "zero")
GRIDS = ("none", "sinusoidal", "sinusoidal_octave", "linear", "learnable")
SCALE = math.sqrt(0.5)  # of a sum of two branches of unit variance


class GroupNorm(nn.Module):
    """Group normalisation; with `unbiased` by the n - 1 variance in evaluation, as the published networks are evaluated."""

    def __init__(self, channels: int, unbiased: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        if channels % min(32, (channels + 3) // 4):
            raise OptionError(f"{channels} channels cannot be normalised in groups of 4; choose a width that is a multiple of 4.")
        self.groups, self.unbiased, self.eps = min(32, (channels + 3) // 4), unbiased, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each group of channels of each sample."""
        n = x[0].numel() // self.groups
        if not self.unbiased or self.training or n < 2:
            return nn.functional.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        # v + eps = (n / (n - 1)) (w + eps (n - 1) / n) with w the n variance: one fused kernel and a factor
        part = (n - 1) / n
        return nn.functional.group_norm(x, self.groups, self.weight * math.sqrt(part), self.bias, self.eps * part)


def silu(x: Tensor) -> Tensor:
    """Return x / (1 + exp(-x)), in place where no gradient needs x."""
    return nn.functional.silu(x, inplace=not torch.is_grad_enabled())


class Resampled(nn.Module):
    """A convolution after a change of resolution by two: the mean of 2 x 2 cells, or each cell four times."""

    def __init__(self, inside: int, outside: int, kernel: int, *, up: bool = False, down: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.kernel = up, down, kernel
        self.weight = nn.Parameter(torch.empty(outside, inside, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outside))
        nn.init.xavier_uniform_(self.weight)
        if up or down:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Return the convolution at the new resolution, times a number."""
        weight, bias = (self.weight, self.bias) if scale == 1 else (self.weight * scale, self.bias * scale)
        if self.down:
            x = nn.functional.avg_pool2d(x, 2)
        if self.kernel == 1:
            x = pointwise(x, weight, bias)
            # a pointwise map and a repetition commute, and the map is cheaper before
            return nn.functional.interpolate(x, scale_factor=2.0) if self.up else x
        if self.up:
            # of the nine cells below the kernel at most four differ: the same as a transposed convolution by sums of its weights
            for axis in (2, 3):
                weight = nn.functional.pad(weight, (0, 0, 1, 0) if axis == 2 else (1, 0)) + nn.functional.pad(
                    weight, (0, 0, 0, 1) if axis == 2 else (0, 1)
                )
            return nn.functional.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), bias, stride=2, padding=1)
        return nn.functional.conv2d(x, weight, bias, padding=1)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return a convolution with a kernel of one cell as one matrix product, which needs no copy where channels are the last in memory."""
    return nn.functional.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def drop(x: Tensor, probability: float) -> Tensor:
    """Return x with a share of its numbers set to zero and the others raised, so that the mean is kept."""
    if x.device.type != "cpu":
        return nn.functional.dropout(x, probability)
    # 16 random bits for each number take half the time of torch's dropout there
    batch, channels, rows, columns = x.shape
    lost = round(probability * 2**16)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]
    kept = torch.ge(bits, lost - 2**15, out=torch.empty(len(bits), dtype=x.dtype)).mul_(2**16 / (2**16 - lost))
    return x * kept.view(batch, rows, columns, channels).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention over all cells with one head; queries, keys and values are interleaved along the channels."""

    def __init__(self, channels: int, unbiased: bool) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, unbiased)
        self.qkv, self.proj = Resampled(channels, 3 * channels, 1), Resampled(channels, channels, 1)
        with torch.no_grad():
            self.qkv.weight.mul_(math.sqrt(0.2))
            self.proj.weight.mul_(1e-5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Return what attention adds to x, times a number."""
        batch, channels, rows, columns = x.shape
        weight, bias = (p.unflatten(0, (channels, 3)).transpose(0, 1).flatten(0, 1) for p in (self.qkv.weight, self.qkv.bias))
        qkv = pointwise(self.norm(x), weight, bias).permute(0, 2, 3, 1).reshape(batch, 1, rows * columns, 3 * channels)
        q, k, v = qkv.chunk(3, -1)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(found.reshape(batch, rows, columns, channels).permute(0, 3, 1, 2), scale)
        return out


class Block(nn.Module):
    """Two convolutions with the noise level in between, a skip connection, and attention where asked for."""

    def __init__(
        self, inside: int, outside: int, embedding: int, dropout: float, unbiased: bool, *, attention: bool = False, up: bool = False,
        down: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm0, self.conv0 = GroupNorm(inside, unbiased), Resampled(inside, outside, 3, up=up, down=down)
        self.affine = nn.Linear(embedding, outside)
        self.norm1, self.conv1 = GroupNorm(outside, unbiased), Resampled(outside, outside, 3)
        nn.init.xavier_uniform_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)
        with torch.no_grad():
            self.conv1.weight.mul_(1e-5)
        self.skip = Resampled(inside, outside, 1, up=up, down=down) if up or down or inside != outside else None
        self.attn = Attention(outside, unbiased) if attention else None
        self.dropout = dropout

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return features of the new number of channels."""
        # in place wherever nothing keeps the value: less memory, and less of it to go through
        hidden = self.conv0(silu(self.norm0(x))).add_(self.affine(embedding)[:, :, None, None])
        hidden = silu(self.norm1(hidden))
        if self.training and self.dropout:
            hidden = drop(hidden, self.dropout)
        # weights are scaled, not what they give: they are fewer
        out: Tensor = self.conv1(hidden, SCALE).add_(x if self.skip is None else self.skip(x), alpha=SCALE)
        return out if self.attn is None else self.attn(out, SCALE).add_(out, alpha=SCALE)


class NoiseEmbedding(nn.Module):
    """Sines and cosines of the noise label: with fixed ('positional') or random ('fourier') frequencies."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind, half = kind, channels // 2
        fixed = 10000.0 ** -(torch.arange(half, dtype=torch.float32) / (half - 1))
        self.register_buffer("freqs", fixed if kind == "positional" else 16 * torch.randn(half))

    def forward(self, label: Tensor) -> Tensor:
        """Return (batch, channels)."""
        assert isinstance(self.freqs, Tensor)
        phase = label[:, None] * self.freqs * (2 * math.pi if self.kind == "fourier" else 1.0)
        return torch.cat([phase.sin(), phase.cos()], 1)


class SongUNet(nn.Module):
    """A U-Net that is conditioned on a noise level, and by concatenation on anything else.

    Parameters
    ----------
    in_channels, out_channels
        Of the state, its conditions and the positional channels together, and of the result.
    shape
        Rows and columns; they name parameters and fix positional channels.
    width
        Channels at full resolution.
    multipliers
        Channels of each level in units of `width`; one level for each.
    blocks
        Per level.
    attention
        Numbers of rows of the levels with attention.
    embedding
        Of the noise level: 'positional', 'fourier', or 'zero' for a network without one.
    grid
        Positional channels: 'none', 'sinusoidal', 'sinusoidal_octave', 'linear' or 'learnable'.
    grid_channels
        How many.
    dropout
        Probability in training.
    unbiased
        See `GroupNorm`.
    lead_times
        Number of lead times that have positional channels of their own, learned; 0 for a network that knows none.
    lead_channels
        How many channels for each.
    probabilities
        Channels of the result that are probabilities of classes, which exclude each other: logits in training, a softmax in evaluation.
    additive
        Whether a learned field is added to the features of the first convolution (StormCast).
    bottleneck
        Whether the deepest level has attention in any case.

    Raises
    ------
    GridError
        If the shape cannot be halved as often as there are levels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shape: tuple[int, int],
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (),
        embedding: str = "positional",
        grid: str = "none",
        grid_channels: int = 0,
        dropout: float = 0.13,
        unbiased: bool = False,
        lead_times: int = 0,
        lead_channels: int = 0,
        probabilities: Sequence[int] = (),
        additive: bool = False,
        bottleneck: bool = True,
    ) -> None:
        super().__init__()
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_choice("embedding", embedding, EMBEDDINGS)
        check_choice("grid", grid, GRIDS)
        self.stride = stride = 2 ** (len(multipliers) - 1)
        if shape[0] % stride or shape[1] % stride:
            raise GridError(
                f"A network of {len(multipliers)} levels needs rows and columns that are multiples of {stride}, and the shape is "
                f"{shape[0]} x {shape[1]}; crop or pad, or give fewer multipliers."
            )
        self.shape, self.embedding_width = (int(shape[0]), int(shape[1])), 4 * width
        if embedding != "zero":
            self.map_noise = NoiseEmbedding(width, embedding)
            self.map_layer0, self.map_layer1 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        self.embedding = embedding
        if grid == "learnable":
            self.pos_embd: Tensor | nn.Parameter = nn.Parameter(torch.randn(grid_channels, *shape))
        elif grid != "none":
            self.register_buffer("pos_embd", positional_channels(grid, grid_channels, shape), persistent=False)
        self.has_grid = grid != "none"
        if lead_times:
            self.lt_embd = nn.Parameter(torch.randn(lead_times, lead_channels, *shape))
        self.probabilities = list(probabilities)
        if probabilities:
            self.scalar = nn.Parameter(torch.ones(1, len(self.probabilities), 1, 1))
        if additive:
            self.spatial_emb = nn.Parameter(0.02 * torch.randn(1, width, *shape))
        self.lead_times, self.additive = lead_times, additive

        def block(inside: int, outside: int, **options: bool) -> Block:
            return Block(inside, outside, 4 * width, dropout, unbiased, **options)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        now, skips = width, [width]
        rows = [shape[0] >> level for level in range(len(multipliers))]
        for level, multiplier in enumerate(multipliers):
            name = f"{rows[level]}x{rows[level]}"
            if level == 0:
                self.enc[f"{name}_conv"] = Resampled(in_channels, width, 3)
            else:
                self.enc[f"{name}_down"] = block(now, now, down=True)
                skips.append(now)
            for k in range(blocks):
                self.enc[f"{name}_block{k}"] = block(now, multiplier * width, attention=rows[level] in attention)
                now = multiplier * width
                skips.append(now)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            name = f"{rows[level]}x{rows[level]}"
            if level == len(multipliers) - 1:
                self.dec[f"{name}_in0"] = block(now, now, attention=bottleneck)
                self.dec[f"{name}_in1"] = block(now, now)
            else:
                self.dec[f"{name}_up"] = block(now, now, up=True)
            for k in range(blocks + 1):
                last = k == blocks and rows[level] in attention
                self.dec[f"{name}_block{k}"] = block(now + skips.pop(), multiplier * width, attention=last)
                now = multiplier * width
        self.dec[f"{rows[0]}x{rows[0]}_aux_norm"] = GroupNorm(now, unbiased)
        self.dec[f"{rows[0]}x{rows[0]}_aux_conv"] = Resampled(now, out_channels, 3)
        self.scale_output(1e-5)  # an untrained network leaves what it is added to
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions need no reordering

    def position_channels(self, lead: int | None = None) -> Tensor | None:
        """Return the channels that tell the network where (and at which lead time) it is, shape (P, rows, columns), or None."""
        parts = [self.pos_embd] if self.has_grid else []
        if self.lead_times:
            if lead is None or not 0 <= lead < self.lead_times:
                raise OptionError(f"lead={lead!r} is not accepted; this network knows the lead times 0 to {self.lead_times - 1}.")
            parts.append(self.lt_embd[lead])
        return torch.cat(parts) if parts else None

    @torch.no_grad()
    def scale_output(self, weight: float) -> None:
        """Multiply everything that the network returns by a number."""
        *_, last = self.dec.values()
        for parameter in last.parameters():
            parameter.mul_(weight)

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        condition: Tensor | None = None,
        position: Tensor | None = None,
        lead: Tensor | None = None,
    ) -> Tensor:
        """Return F.

        Parameters
        ----------
        x
            State, shape (batch, channels, rows, columns).
        label
            Of the noise, shape (batch,).
        condition
            Shape (batch, channels, rows, columns).
        position
            Instead of the network's own positional channels, shape (batch, P, rows, columns): those of tiles of a larger domain, with those
            of the lead time last. Rows and columns may then be any multiples of the stride.
        lead
            Indices of lead times, shape (batch,), for a network that knows them.

        Returns
        -------
        Tensor
            Shape (batch, out_channels, rows, columns).

        Raises
        ------
        GridError
            If rows and columns do not fit the network.
        OptionError
            If there is no such lead time.
        """
        self._check_shape(x, position)
        parts = [x] if condition is None else [x, condition]
        if position is not None:
            parts.append(position)
        elif self.lead_times:
            leads = [None] * len(x) if lead is None else lead.tolist()
            parts.append(torch.stack([t for k in leads if (t := self.position_channels(k)) is not None]))
        elif self.has_grid:
            parts.append(self.pos_embd)
        now = torch.cat([p.to(x.dtype).expand(len(x), -1, -1, -1) for p in parts], 1).contiguous(
            memory_format=torch.channels_last
        )
        if self.embedding == "zero":
            embedding = torch.zeros(len(x), self.embedding_width, dtype=x.dtype, device=x.device)
        else:
            hidden = nn.functional.silu(self.map_layer0(self.map_noise(label).to(x.dtype)))
            embedding = nn.functional.silu(self.map_layer1(hidden))
        skips: list[Tensor] = []
        for layer in self.enc.values():
            if isinstance(layer, Block):
                now = layer(now, embedding)
            else:
                now = layer(now) + self.spatial_emb if self.additive else layer(now)
            skips.append(now)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                now = silu(layer(now))
            elif name.endswith("aux_conv"):
                now = layer(now)
            else:
                now = layer(torch.cat([now, skips.pop()], 1) if "_block" in name else now, embedding)
        if self.probabilities:
            logits = now[:, self.probabilities] * self.scalar
            now = now.index_copy(
                1, torch.tensor(self.probabilities, device=now.device), logits if self.training else logits.softmax(1)
            )
        return now

    def _check_shape(self, x: Tensor, position: Tensor | None) -> None:
        rows, columns = x.shape[-2:]
        placed = (self.has_grid or self.lead_times) and position is None
        if (placed or self.additive) and (rows, columns) != self.shape:
            remedy = "crop or pad it" if self.additive else f"give position, shape (batch, P, {rows}, {columns}), for these cells"
            raise GridError(
                f"This network knows the places of {self.shape[0]} x {self.shape[1]} cells, and the state has {rows} x {columns}; {remedy}."
            )
        if rows % self.stride or columns % self.stride:
            raise GridError(
                f"This network needs rows and columns that are multiples of {self.stride}, and the state has {rows} x {columns}; pad it."
            )


def positional_channels(kind: str, channels: int, shape: tuple[int, int]) -> Tensor:
    """Return fixed channels that tell a network where it is, shape (channels, rows, columns).

    Parameters
    ----------
    kind
        'sinusoidal' and 'sinusoidal_octave': sines and cosines along columns and rows; 'linear': columns and rows from -1 to 1.
    """
    rows, columns = shape
    if channels < 1 or (channels != 2 if kind == "linear" else channels % 4):
        raise OptionError(
            f"A {kind} grid has {'two channels' if kind == 'linear' else 'a multiple of four channels'}, not {channels}."
        )
    if kind == "linear":
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        return torch.stack([x, y])
    angles = (torch.linspace(0, 2 * math.pi, n, dtype=torch.float64) for n in (rows, columns))
    y, x = torch.meshgrid(*angles, indexing="ij")
    count = channels // 4
    exponents = torch.arange(count, dtype=torch.float32) if kind == "sinusoidal_octave" else torch.linspace(0, count, count)
    return torch.cat([torch.stack([(b * x).sin(), (b * y).sin(), (b * x).cos(), (b * y).cos()]) for b in 2.0**exponents]).float()

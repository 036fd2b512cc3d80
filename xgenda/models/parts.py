"""What the samples of some times of a downscaler share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from xgenda.models.blocks import Blocks
from xgenda.models.generative import Request
from xgenda.models.means import Place
from xgenda.scaling import Scaling

if TYPE_CHECKING:
    from xgenda.models.corrective import CorrectiveModel

SMALLEST = 1e-30  # that has a logarithm
LARGEST_LOG = 50.0  # a logarithm that no physical value has; what exceeds it is noise on its way


class Part:
    """What the samples of some times share: mean and condition on a window, and the means of its blocks."""

    def __init__(
        self, model: CorrectiveModel, request: Request, rows: list[int], place: Place, regression: nn.Module | None
    ) -> None:
        assert request.standardised is not None
        assert request.planes is not None
        assert request.climatology is not None
        self.model, self.rows = model, rows
        shape = (model.spec.channels, *model.grid.plane)
        here = tuple(torch.as_tensor(p) for p in place)
        self.climatology = request.climatology[rows].reshape(-1, *shape)[:, :, here[0][:, None], here[1]].double()
        self.std = torch.as_tensor(model.scaling.std)
        if self.std.shape[-1] > 1:
            self.std = self.std[:, here[0][:, None], here[1]]
        coarse = request.standardised[rows]
        interpolated = model.features.interpolated(coarse, place)
        planes = request.planes[rows]
        features = model.features.of(interpolated, planes[:, :-1] if model.spec.options.get("lead_index") else planes, place)
        self._blocks(request, place)
        mean = model.mean.at(coarse, interpolated, place)
        if regression is not None:
            given = features if model.mean.is_zero else torch.cat([features, mean.float()], 1)
            spread = model.spread
            if spread.shape[-1] > 1:
                spread = spread[:, here[0][:, None], here[1]]
            device = request.device
            state = (
                mean.new_zeros(1, int(model.spec.options.get("regression_state", shape[0])), *mean.shape[-2:]).float().to(device)
            )
            # one time after the other: the mean is computed once, and its network may be large
            found = [regression(state, torch.zeros(1, device=device), g[None].to(device)).cpu() for g in given]
            mean = mean + torch.cat(found).double() * spread
        self.mean = self._kept(mean, list(range(len(rows))))
        self.condition = torch.cat([self.mean.float(), features], 1) if model.mean_condition else features

    def _blocks(self, request: Request, place: Place) -> None:
        self.blocks, conserved = self.model.blocks, self.model.conserved
        if self.blocks is None or conserved is None:
            return
        cells = self.model.inputs.grid.plane
        means = request.fields[self.rows].reshape(len(self.rows), -1, *cells)[:, list(conserved.inputs)]
        factor = self.blocks.factor
        rows, columns = (torch.as_tensor(p[::factor] // factor) for p in place)
        self.means = means.index_select(2, rows).index_select(3, columns)
        self.blocks = self.blocks.on(place)
        self.channels = list(conserved.channels)
        self.bounds = tuple(bounds_in_blocks(self.model.scaling)[c] for c in self.channels)

    def physical(self, z: Tensor) -> Tensor:
        """Return standardised fields (times, members, channels, rows, columns) in physical units, with the block means of their input."""
        scaling = self.model.scaling
        out = z * self.std + self.climatology[:, None]
        out = torch.as_tensor(scaling.clipped(scaling.untransformed(out.numpy(), 2), 2))
        if self.blocks is not None:
            out[:, :, self.channels] = self.blocks.conserve(out[:, :, self.channels], self.means[:, None], self.bounds)
        return out

    def _kept(self, z: Tensor, rows: list[int]) -> Tensor:
        """Return standardised fields (batch, channels, rows, columns) of these times, changed as little as their block means need."""
        if self.blocks is None:
            return z
        std, climatology = self.std.to(z), self.climatology[rows].to(z)
        return with_means(z, self.blocks, self.means[rows].to(z), self.channels, self.model.scaling, std, climatology)

    def conserving(self, residual: Tensor, rows: list[int]) -> Tensor:
        """Return the estimate of a residual in its units, as the nearest one with the right block means."""
        if self.blocks is None:
            return residual
        mean = self.mean[rows].to(residual)
        return (self._kept(mean + self.model.unit * residual, rows) - mean) / self.model.unit


def bounds_in_blocks(scaling: Scaling) -> tuple[tuple[float, float], ...]:
    """Return the bounds of each channel where block means are kept: what has a logarithm is not below minus its offset."""
    least = [-offset if name == "log" else -np.inf for name, offset in zip(scaling.transforms, scaling.offsets, strict=True)]
    return tuple((max(low, limit), high) for (low, high), limit in zip(scaling.bounds, least, strict=True))


def with_means(
    z: Tensor, blocks: Blocks, means: Tensor, channels: Sequence[int], scaling: Scaling, std: Tensor, climatology: Tensor
) -> Tensor:
    """Return standardised fields changed as little as their block means need.

    Parameters
    ----------
    z, climatology
        Shape (batch, channels, rows, columns).
    means
        Physical, of some of the channels, shape (batch, some, y, x).
    channels
        Which these are.
    std
        Shape (channels, rows or 1, columns or 1).
    """
    out, bounds = z.clone(), bounds_in_blocks(scaling)
    for i, c in enumerate(channels):
        offset, log = scaling.offsets[c], scaling.transforms[c] == "log"
        value = z[:, c] * std[c] + climatology[:, c]
        if not log and bounds[c] == (-np.inf, np.inf):  # a difference alone: nothing is rounded by the climatology
            out[:, c] = z[:, c] + (blocks.added(value, means[:, i]) - value) / std[c]
            continue
        value = (value.clamp(max=LARGEST_LOG).exp() - offset if log else value).clamp(*bounds[c])
        value = blocks.kept(value, means[:, i], *bounds[c])
        out[:, c] = ((value + offset).clamp(min=SMALLEST).log() if log else value) / std[c] - climatology[:, c] / std[c]
    return out

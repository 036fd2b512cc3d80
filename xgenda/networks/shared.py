"""What the networks of fields on a grid share: how they hear of the noise level, how they know where they are, and how their output is scaled."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FieldNetwork(nn.Module):
    """A network of fields whose last layer is `last`, and whose learned channels that tell it where it is are `position`."""

    last: nn.Module
    position: nn.Parameter | None

    @torch.no_grad()
    def scale_output(self, weight: float) -> None:
        """Multiply everything that the network returns by a number."""
        for parameter in self.last.parameters():
            parameter.mul_(weight)

    def position_channels(self) -> Tensor | None:
        """Return the learned channels that tell the network where it is, shape (P, ny, nx), or None where it has none."""
        return self.position


class LevelNetwork(FieldNetwork):
    """One that is told the noise level by waves of its logarithm, through two dense layers."""

    frequencies: Tensor

    def hear(self, width: int) -> int:
        """Make what tells of the noise level, and return how many numbers that are."""
        embedding = 4 * width
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.5), math.log(32.0), width // 2)))
        self.embed = nn.Sequential(nn.Linear(2 * (width // 2), embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        return embedding

    def heard(self, label: Tensor) -> Tensor:
        """Return what tells of noise labels (batch,), shape (batch, embedding)."""
        angles = label[:, None] * self.frequencies
        found: Tensor = self.embed(torch.cat([angles.cos(), angles.sin()], -1))
        return found

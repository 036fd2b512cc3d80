"""Scattered places where a prior over functions is evaluated beside the cells of the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Places of one time, after the cells of each channel.

    Attributes
    ----------
    latitude, longitude
        In degrees, shape (p,); none of them is a cell, and no two are the same.
    observed
        How many at the beginning are those of observations.
    indices, weights
        Linear interpolation from the cells, for what the prior expects: shape (p, k), and of each channel (channels, p, k).
    wanted
        Where the state is asked for, as indices into the cells and, after them, these places; None: the cells.
    """

    latitude: Tensor
    longitude: Tensor
    observed: int
    indices: Tensor
    weights: Tensor
    wanted: Tensor | None = None

    def extend(self, fields: Tensor) -> Tensor:
        """Return fields (..., channels, cells) with their interpolation to the places after the cells."""
        return torch.cat([fields, (fields[..., self.indices] * self.weights).sum(-1)], -1)

    def picked(self, fields: Tensor, cells: int) -> Tensor:
        """Return what is asked for of fields (..., cells + p)."""
        return fields[..., :cells] if self.wanted is None else fields[..., self.wanted]

    @property
    def key(self) -> bytes:
        """What tells these places from others."""
        parts = [self.latitude, self.longitude, torch.tensor([self.observed])] + ([] if self.wanted is None else [self.wanted])
        return b"|".join(x.numpy().tobytes() for x in parts)

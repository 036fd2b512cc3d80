"""Standardised training fields by number, and the order in which training takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Fields(Protocol):
    """Standardised states (n, channels, rows, columns) that are read when asked for.

    Attributes
    ----------
    shape
        n, channels, rows and columns.
    """

    shape: tuple[int, int, int, int]

    def read(self, rows: Tensor) -> Tensor:
        """Return some states, float32."""
        ...

    def order(self, rows: Tensor, seed: int, epoch: int) -> Tensor:
        """Return `rows` in the order of an epoch, which is a function of these arguments alone."""
        ...

    def batches(
        self, rows: Tensor, size: int, seed: int, step: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield row numbers and states of the batches of optimiser steps `step`, `step` + 1 and so on, without end.

        Epochs follow each other without a gap, and what a step gets is a function of the arguments alone, so that training can be resumed
        anywhere. `part` is (k, n) in the k-th of n processes, which gets that part of each batch.
        """
        ...


class InMemory:
    """All states in one tensor."""

    def __init__(self, states: Tensor) -> None:
        n, channels, ny, nx = states.shape
        self.states, self.shape = states, (n, channels, ny, nx)

    def read(self, rows: Tensor) -> Tensor:
        """Return some states."""
        return self.states[rows]

    def order(self, rows: Tensor, seed: int, epoch: int) -> Tensor:
        """Return a permutation."""
        return rows[torch.as_tensor(np.random.default_rng([seed % 2**63, epoch]).permutation(len(rows)))]

    def batches(
        self, rows: Tensor, size: int, seed: int, step: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches."""
        for chosen in row_batches(self, rows, size, seed, step, part):
            yield chosen, self.read(chosen)


def row_batches(fields: Fields, rows: Tensor, size: int, seed: int, step: int, part: tuple[int, int]) -> Iterator[Tensor]:
    """Yield the row numbers of `Fields.batches`."""
    epoch, at = divmod(step * size, len(rows))
    left = fields.order(rows, seed, epoch)[at:]
    k, n = part
    while True:
        while len(left) < size:
            epoch += 1
            left = torch.cat([left, fields.order(rows, seed, epoch)])
        yield left[:size].tensor_split(n)[k]
        left = left[size:]

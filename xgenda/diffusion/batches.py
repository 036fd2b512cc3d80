"""Micro-batches, with recovery when the memory of a GPU runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from xgenda.formatting import user_level

Item = TypeVar("Item")


def in_batches(function: Callable[[list[Item]], Tensor], items: list[Item], size: int) -> Tensor:
    """Apply `function` to batches of at most `size` items and concatenate; out of GPU memory halves the batch, with one warning."""
    out: list[Tensor] = []
    start = 0
    while start < len(items):
        try:
            out.append(function(items[start : start + size]))
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, size // 2)
            torch.cuda.empty_cache()
            warnings.warn(
                f"The GPU ran out of memory; going on with batches of {size}. Pass batch_size={size}.", stacklevel=user_level()
            )
            continue
        start += size
    return torch.cat(out)

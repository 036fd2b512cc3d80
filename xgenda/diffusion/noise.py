"""Random numbers keyed by label: the noise of a member is a function of (seed, time label, member number) and nothing else.

Each sample owns a generator on the CPU, so chunks, batch sizes, order, worker count and device never change a member.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_for(seed: int, label: str, member: int) -> int:
    """Return a 63-bit seed that depends on all three arguments and is the same in every process."""
    digest = hashlib.blake2b(f"{seed}|{label}|{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class NoiseStream:
    """One generator per sample.

    Parameters
    ----------
    keys
        (seed, time label, member number) of each sample.
    """

    def __init__(self, keys: Sequence[tuple[int, str, int]]) -> None:
        self._generators = [torch.Generator().manual_seed(seed_for(*key)) for key in keys]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._generators)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw the next standard normal numbers of every sample, shape (samples, *shape), on the CPU."""
        return torch.stack([torch.randn(shape, generator=g, dtype=dtype) for g in self._generators])


class LabelledNoise:
    """Noise of samples made of several labelled parts, such as the times of a trajectory: each part keeps its own stream.

    Parameters
    ----------
    keys
        Of every sample, the keys of its parts; all samples have as many. With one part its axis is left out.
    """

    def __init__(self, keys: Sequence[Sequence[tuple[int, str, int]]]) -> None:
        self._parts = len(keys[0])
        self._stream = NoiseStream([k for sample in keys for k in sample])

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw for every sample, shape (samples, *shape); with several parts the first of `shape` is their number."""
        if self._parts == 1:
            return self._stream.normal(*shape, dtype=dtype)
        drawn = self._stream.normal(*shape[1:], dtype=dtype)
        return drawn.reshape(-1, *shape)

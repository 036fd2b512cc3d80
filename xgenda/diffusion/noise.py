"""Random numbers keyed by label: the noise of a member is a function of (seed, time label, member number) and nothing else.

Each sample owns a generator on the CPU, so chunks, batch sizes, order, worker count and device never change a member.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xgenda.errors import GridError, check_count


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
        self._keys, self._beside = list(keys), dict[str, NoiseStream]()
        self._generators = [torch.Generator().manual_seed(seed_for(*key)) for key in keys]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._generators)

    def beside(self, name: str) -> NoiseStream:
        """Return a stream of the same samples that is independent of this one: what is drawn there changes nothing here."""
        if name not in self._beside:
            self._beside[name] = NoiseStream([(seed, f"{label}|{name}", member) for seed, label, member in self._keys])
        return self._beside[name]

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


class PlaneNoise:
    """Noise by coordinate: what a sample gets at a cell depends on its key, the number of the draw and the place of the cell, and nothing else.

    The plane is cut into fixed blocks with a generator each, so that a window of it, such as a dask block with its halo, gets exactly the
    cells that the whole plane would have.

    Parameters
    ----------
    keys
        (seed, time label, member number) of each sample.
    shape
        Rows and columns of the plane.
    corner
        First row and column of the window. Columns may lie outside of the plane: it wraps around.
    size
        Rows and columns of the window; up to the end of the plane if None.
    block
        Rows and columns of a block. Another number is other noise.

    Raises
    ------
    GridError
        If rows of the window lie outside of the plane, or it has more columns than the plane.
    """

    def __init__(
        self,
        keys: Sequence[tuple[int, str, int]],
        shape: tuple[int, int],
        corner: tuple[int, int] = (0, 0),
        size: tuple[int, int] | None = None,
        block: int = 64,
    ) -> None:
        self.size = (shape[0] - corner[0], shape[1] - corner[1]) if size is None else size
        self._block, self._count = check_count("block", block), len(keys)
        rows, columns = corner[0], corner[1] % shape[1]
        if rows < 0 or min(self.size) < 1 or rows + self.size[0] > shape[0] or self.size[1] > shape[1]:
            raise GridError(f"A window of {self.size} cells from {corner} on does not fit a plane of {shape}.")
        # where the window wraps it has two parts
        self._row_pieces = _pieces(rows, self.size[0], 0, block)
        first = min(self.size[1], shape[1] - columns)
        self._column_pieces = _pieces(columns, first, 0, block)
        for k, runs in _pieces(0, self.size[1] - first, first, block).items():
            self._column_pieces[k] = self._column_pieces.get(k, []) + runs
        # torch's generators on the CPU keep 32 bits of their seed, too few for that many blocks
        self._generators = [
            {
                (i, j): np.random.Generator(np.random.SFC64(_wide_seed(key, (i, j))))
                for i in self._row_pieces
                for j in self._column_pieces
            }
            for key in keys
        ]

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._count

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw the next standard normal numbers of every sample, shape (samples, *shape), on the CPU; `shape` ends with the window's size."""
        if tuple(shape[-2:]) != tuple(self.size):
            raise GridError(f"The window has {self.size} cells, and noise for {tuple(shape[-2:])} was asked for.")
        out = np.empty((self._count, *shape), np.float64 if dtype == torch.float64 else np.float32)
        for plane, generators in zip(out, self._generators, strict=True):
            for (i, j), generator in generators.items():
                # whole blocks, also at the edge of the window: the generator is then where it would be in any other window
                drawn = generator.standard_normal((*shape[:-2], self._block, self._block), dtype=out.dtype.type)
                for from_rows, to_rows in self._row_pieces[i]:
                    for from_columns, to_columns in self._column_pieces[j]:
                        plane[..., to_rows, to_columns] = drawn[..., from_rows, from_columns]
        return torch.from_numpy(out).to(dtype)


def _pieces(start: int, length: int, offset: int, block: int) -> dict[int, list[tuple[slice, slice]]]:
    """Return the blocks of a run of cells: their cells, and those of the window, where the run starts at `offset`."""
    out = {}
    for k in range(start // block, -(-(start + length) // block) if length else 0):
        low, high = max(start, k * block), min(start + length, (k + 1) * block)
        out[k] = [(slice(low - k * block, high - k * block), slice(offset + low - start, offset + high - start))]
    return out


def _wide_seed(key: tuple[int, str, int], block: tuple[int, int]) -> int:
    digest = hashlib.blake2b("|".join(map(str, (*key, *block))).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")

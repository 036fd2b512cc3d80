"""Training fields larger than memory: read, standardised and shuffled while the network trains.

Storage chunks are taken in random order. As many as a part of the memory holds form a group, whose rows are shuffled among each other, and
the next group is read by threads while the network trains on this one. The order is a function of rows, seed and epoch, so that training
resumes at any step, and what a step does not need is not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xgenda.errors import OptionError, check_pair
from xgenda.scaling import Scaling, cycle_basis
from xgenda.training.draws import Draws
from xgenda.training.sources import WORKERS, Source, Window, in_order

MEMORY = 512 * 2**20
BUFFER = 256 * 2**20  # bytes of fields or pairs that wait in a training
STORED = 0.75  # of the memory holds standardised states, half of it the group in use; the rest is for reading
SMALLEST = 2**20  # bytes of a block: less takes longer to ask for than to read


@dataclass(eq=False)
class _Block:
    """Some rows that are read together.

    Attributes
    ----------
    rows
        Increasing.
    nbytes
        Of their states.
    left
        How many of them were not yet handed out.
    states
        Being read: those of the distinct times, and which of them each row joins.
    """

    rows: np.ndarray
    nbytes: int
    left: int
    states: Future[tuple[Tensor, np.ndarray]] | None = None


class Streamed:
    """Standardised states of a source, read when asked for: `xgenda.training.fields.Fields`.

    Parameters
    ----------
    source
        With its mask, see `xgenda.training.statistics.gather`.
    scaling
        Standardises the fields.
    windows
        Rows of the source that each state joins along its channels, shape (n, window), see `xgenda.training.windows.window_rows`; None for
        one each.
    memory
        Bytes for states that wait, and for reading them. Storage chunks are decoded whole: a chunk should be at most a sixteenth of it.
    crop
        Rows and columns of a random part of the grid, the same for all states of a batch; None for the whole. Each batch is then read for
        itself, which suits grids that are stored in tiles, or with few times per chunk.
    workers
        Threads that read.

    Attributes
    ----------
    shape
        States, channels, rows and columns, of the whole grid.
    peak
        Most bytes of states that were held at once.
    """

    def __init__(
        self,
        source: Source,
        scaling: Scaling,
        windows: np.ndarray | None = None,
        memory: int = MEMORY,
        crop: tuple[int, int] | None = None,
        workers: int = WORKERS,
    ) -> None:
        self.source, self.scaling, self.workers, self.memory = source, scaling, workers, memory
        self.windows = np.arange(source.size)[:, None] if windows is None else np.asarray(windows)
        self.basis = cycle_basis(source.time, scaling.cycle, source.size)
        plane = source.grid.plane
        self.crop = None if crop is None else check_pair("crop", crop)
        if self.crop is not None and any(c > n for c, n in zip(self.crop, plane, strict=True)):
            raise OptionError(f"crop={crop} is larger than the grid of {plane[0]} x {plane[1]} cells; leave it out.")
        n, window = self.windows.shape
        self.shape = (n, window * len(source.variables), *plane)
        self.row_bytes = 4 * int(np.prod(self.shape[1:])) // window  # of a state of one time
        held = self.row_bytes * window if self.crop is None else 4 * self.shape[1] * self.crop[0] * self.crop[1]
        if memory < 16 * held:
            raise OptionError(
                f"memory={memory} bytes are too few for states of {held} bytes; give at least "
                f"memory={64 * held}, or crop the fields: crop=(64, 64)"
            )
        self.peak = 0
        per_block = max(1, min(memory // (16 * self.row_bytes), source.step(SMALLEST)))  # no more than a part of a large chunk
        self.block = blocks_of(source.places[self.windows[:, 0]], source.chunk, per_block)  # of each state

    def read(self, rows: Tensor, corner: tuple[int, int] | None = None) -> Tensor:
        """Return some states, float32; with a corner the crop there."""
        return _joined(*self._states(rows.numpy(), None if corner is None else self.window(corner)))

    def order(self, rows: Tensor, seed: int, epoch: int) -> Tensor:
        """Return `rows` in the order of an epoch."""
        return torch.as_tensor(np.concatenate(self._groups(rows, seed, epoch)))

    def corner(self, seed: int, step: int) -> tuple[int, int] | None:
        """Return the first row and column of the crop of a batch; None without crops.

        Those that `Draws.corner` has for the step that the batch is for, which is counted from one.
        """
        return Draws(seed, step + 1, 1).corner(self.crop, self.source.grid.plane)

    def window(self, corner: tuple[int, int]) -> Window:
        """Return the rows and columns of the crop with this corner."""
        assert self.crop is not None
        (row, column), (ny, nx) = corner, self.crop
        return slice(row, row + ny), slice(column, column + nx)

    def batches(
        self, rows: Tensor, size: int, seed: int, step: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield batches without end, see `xgenda.training.fields.Fields`; close it to stop its threads.

        Where there are crops, the states of a step have the corner `corner(seed, step)`.
        """
        share = np.concatenate([np.full(len(a), k) for k, a in enumerate(np.array_split(np.arange(size), part[1]))])
        count = int((share == part[0]).sum())
        groups = self._chosen(rows, share == part[0], seed, step)
        if self.crop is not None:
            yield from self._cropped(groups, count, seed, step)
            return
        with contextlib.closing(self._served(groups)) as states:
            while True:
                taken = list(itertools.islice(states, count))
                held = torch.as_tensor([row for row, _ in taken], dtype=torch.int64)
                yield held, torch.stack([s for _, s in taken]) if taken else torch.zeros((0, *self.shape[1:]))

    def _groups(self, rows: Tensor, seed: int, epoch: int) -> list[np.ndarray]:
        """Return the rows of an epoch in order, those that are shuffled together for themselves."""
        rng = np.random.default_rng([seed % 2**63, epoch])
        numbers = np.sort(rows.numpy())
        blocks, counts = np.unique(self.block[numbers], return_counts=True)
        members = np.split(numbers[np.argsort(self.block[numbers], kind="stable")], np.cumsum(counts)[:-1])
        order = rng.permutation(len(blocks))
        nbytes = (counts[order] + self.windows.shape[1] - 1) * self.row_bytes
        group = (np.cumsum(nbytes) - nbytes) // max(1, int(STORED / 2 * self.memory))
        out = []
        for k in np.unique(group):
            together = np.concatenate([members[i] for i in order[group == k]])
            out.append(together[rng.permutation(len(together))])
        return out

    def _chosen(self, rows: Tensor, mine: np.ndarray, seed: int, step: int) -> Iterator[np.ndarray]:
        """Yield group after group without end the rows that are at places of their batch where `mine` is True."""
        if not len(rows):
            raise OptionError("rows are empty; there is nothing to train on.")
        at = step * len(mine)
        epoch, skip = divmod(at, len(rows))
        for number in itertools.count(epoch):
            for group in self._groups(rows, seed, number):
                left, skip = group[skip:], max(0, skip - len(group))
                yield left[mine[(at + np.arange(len(left))) % len(mine)]]
                at += len(left)

    def _served(self, groups: Iterator[np.ndarray]) -> Generator[tuple[int, Tensor], None, None]:
        """Yield rows and their states; threads read the group in use and the next one, as far as the memory goes."""
        unread: deque[_Block] = deque()
        held, limit = 0, int(STORED * self.memory)
        pool = ThreadPoolExecutor(self.workers, "xgenda-fields")
        try:
            ahead = self._planned(next(groups), unread)
            while True:
                now, ahead = ahead, self._planned(next(groups), unread)
                for row, block in now:
                    while unread and (held + unread[0].nbytes <= limit or block.states is None):
                        one = unread.popleft()
                        held += one.nbytes
                        self.peak = max(self.peak, held)
                        one.states = pool.submit(self._states, one.rows)
                    assert block.states is not None
                    states, members = block.states.result()
                    yield row, states[members[np.searchsorted(block.rows, row)]].flatten(0, 1)
                    block.left -= 1
                    if not block.left:
                        held -= block.nbytes
                        block.states = None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _planned(self, group: np.ndarray, unread: deque[_Block]) -> list[tuple[int, _Block]]:
        """Return the rows of a group with the blocks that they are in; append these in the order in which they are first needed."""
        _, first, back, counts = np.unique(self.block[group], return_index=True, return_inverse=True, return_counts=True)
        members = np.split(group[np.argsort(back, kind="stable")], np.cumsum(counts)[:-1]) if len(group) else []
        sizes = [len(np.unique(self.windows[m])) * self.row_bytes for m in members]
        blocks = [_Block(np.sort(m), n, len(m)) for m, n in zip(members, sizes, strict=True)]
        unread.extend(blocks[i] for i in np.argsort(first))
        return [(int(row), blocks[i]) for row, i in zip(group, back, strict=True)]

    def _cropped(
        self, groups: Iterator[np.ndarray], count: int, seed: int, step: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield batches of crops; threads read the next ones."""
        ahead = max(
            1, min(4 * self.workers, self.memory // (2 * max(1, count) * int(np.prod([4, self.shape[1], *(self.crop or ())]))))
        )
        rows = _pieces(groups, count)

        def take(job: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor]:
            held = torch.as_tensor(job[1], dtype=torch.int64)
            return held, self.read(held, self.corner(seed, job[0]))

        with contextlib.closing(in_order(take, zip(itertools.count(step), rows), self.workers, ahead)) as found:
            yield from found

    def _states(self, rows: np.ndarray, window: Window | None = None) -> tuple[Tensor, np.ndarray]:
        """Return the states of the distinct times of some rows, and which of them each row joins, shape (rows, window).

        Each is standardised for itself, so that it has the same bits whatever it is read with.
        """
        places, members = np.unique(self.windows[rows], return_inverse=True)
        values = self.source.read(places, window)
        scaling = self.scaling if window is None else _on(self.scaling, window)
        out = standardised(values, self.basis[places], scaling)
        if self.source.valid is not None:  # the Gaussian has no variance there: rounding would be many standard deviations
            out[:, ~(self.source.valid if window is None else self.source.valid[:, window[0], window[1]])] = 0.0
        return torch.as_tensor(out), members.reshape(len(rows), self.windows.shape[1])


def blocks_of(places: np.ndarray, chunk: int, per_block: int) -> np.ndarray:
    """Return the number of the block of each place; parts of chunks do not go over their ends."""
    if per_block < chunk:
        return np.asarray(places // chunk * (-(-chunk // per_block)) + places % chunk // per_block)
    return np.asarray(places // per_block)


def standardised(values: np.ndarray, basis: np.ndarray, scaling: Scaling) -> np.ndarray:
    """Return float32 fields as `Scaling.forward` does, each for itself; those given may be overwritten."""
    out = values if values.dtype == np.float32 else np.empty(values.shape, np.float32)
    for i, row in enumerate(basis):
        # without BLAS, which would start threads of its own in each of ours
        climatology = np.einsum("k,kcyx->cyx", row, scaling.mean)
        out[i] = (scaling.transform(values[i : i + 1])[0] - climatology) / scaling.std
    return out


def _joined(states: Tensor, members: np.ndarray) -> Tensor:
    """Return states (rows, window * channels, ny, nx)."""
    return states[torch.as_tensor(members)].flatten(1, 2)


def _on(scaling: Scaling, window: Window) -> Scaling:
    """Return a scaling of a part of the grid."""
    mean, std = (a if a.shape[-2:] == (1, 1) else a[..., window[0], window[1]] for a in (scaling.mean, scaling.std))
    return dataclasses.replace(scaling, mean=mean, std=std)


def _pieces(groups: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield `count` rows after `count` rows."""
    left = np.zeros(0, np.int64)
    while True:
        while len(left) < count:
            left = np.concatenate([left, next(groups)])
        yield left[:count]
        left = left[count:]

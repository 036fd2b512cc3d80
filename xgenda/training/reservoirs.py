"""Training pairs larger than memory: where all of them are, their statistics, and evenly spaced ones in memory for the fits.

Linear means, Gaussians and calibrations are fitted to the pairs in memory; networks are trained on all, see `xgenda.training.pairstreams`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xgenda.curvilinear import AnyGrid
from xgenda.errors import GridError, OptionError
from xgenda.grids import Grid
from xgenda.models.blocks import Blocks
from xgenda.models.classical import METHODS
from xgenda.scaling import check_named
from xgenda.training.matching import check_kept, check_unmasked, later, match
from xgenda.training.sources import Samples, Source, Window
from xgenda.training.statistics import Statistics, gather
from xgenda.training.windows import FOLDS, blocks, split_rows, time_order

SAMPLE, FEWEST_SAMPLED, FEWEST_OF_BLOCK = 1000, 60, 8  # pairs in memory: at most, at least, and of a block of times at least
FINE_COPIES, INPUT_COPIES = 16, 3  # of a pair on the fine grid, in float64, in the working arrays of the fits
LEAST_WORK = 64 * 2**20  # bytes that these may take in any case

#: Climatology, transforms and offsets of fine and coarse fields, which are read in one pass.
Scales = Callable[[Source, Source], tuple[str, Any, Any]]


@dataclass(frozen=True, eq=False)
class Large:
    """What to do with pairs that are not in memory.

    Attributes
    ----------
    memory
        Bytes that they may take there.
    scales
        How fields are standardised.
    bounds, validation, method, progress
        As in `xgenda.train`.
    """

    memory: float
    scales: Scales
    bounds: Any = None
    validation: Any = None
    method: str = "diffusion"
    progress: bool | None = None

    def streams(self, *sources: Source) -> bool:
        """Return whether these fields stay where they are: some are not in memory, and together they would take too much of it."""
        return not all(s.in_memory for s in sources) and sum(s.nbytes for s in sources) > self.memory


@dataclass(frozen=True, eq=False)
class Reservoir:
    """Pairs that are read when asked for, numbered from 0.

    Attributes
    ----------
    fine, coarse
        Fields of both sides; the fine ones one for each pair.
    places
        The coarse fields of each pair, at its time and its neighbours, shape (n, offsets).
    fold
        Block of times of each pair, shape (n,).
    rows
        Which of the pairs are in memory, increasing.
    statistics, input_statistics
        Of both sides; None where the coarse fields are standardised as the fine ones.
    memory
        As in `Large`.
    lead
        Lead times in seconds, shape (n,), or None.
    """

    fine: Source
    coarse: Source
    places: np.ndarray
    fold: np.ndarray
    rows: np.ndarray
    statistics: Statistics
    input_statistics: Statistics | None
    memory: float
    lead: np.ndarray | None = None

    def sample(self) -> tuple[Samples, Samples, np.ndarray]:
        """Return fine and coarse fields in memory, and which of the latter belong to each of the former, shape (rows, offsets)."""
        needed, places = np.unique(self.places[self.rows], return_inverse=True)
        return self.fine.sample(self.rows), self.coarse.sample(needed), places.reshape(len(self.rows), -1)

    def split(self, near: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pairs to train on, none of which resembles the validation block, and those of that block.

        Parameters
        ----------
        near
            For how many times of the sample its fields resemble each other. Between those that do and the next ones, which do not, nothing
            is known.
        """
        time = self.fine.time
        if time is not None and len(self.rows) < self.fine.size:
            times = [len(np.unique(t)) for t in (time.values, time.values[self.rows])]
            near = math.ceil((near + 1) * times[0] / times[1]) - 1
        return split_rows(self.fold, time, near)


def open_reservoir(
    fine: Source,
    coarse: Source,
    offsets: tuple[int, ...],
    spacing: float | None,
    how: Large,
    task: str,
    argument: str,
    ends: str = "drop",
) -> Reservoir:
    """Match the times of both sides, pass over both once, and say which pairs are to be read into memory.

    Parameters
    ----------
    offsets, spacing
        See `xgenda.models.conditions.Conditions`.
    argument
        Name of the fine fields in messages.

    Raises
    ------
    OptionError, StateError
        Before any pass where that does not need one.
    """
    cycle, transform, offset = _scales(fine, coarse, how)
    count = _room(fine, coarse, len(offsets), how)
    places, kept = match(fine, coarse, offsets, spacing, ends)
    check_kept(len(kept), fine.size, fine.fewest, offsets, task)
    given = fine.only(kept)
    fine, statistics = gather(given, cycle, transform, offset, progress=how.progress)
    check_unmasked(fine.valid, argument, task)
    places = places[~statistics.missing]
    needed, back = np.unique(places, return_inverse=True)
    coarse, found = gather(coarse.only(needed), cycle, transform, offset, progress=how.progress)
    check_unmasked(coarse.valid, "ds", task)
    places = back.reshape(places.shape)
    if found.missing.any():
        whole = ~found.missing[places].any(1)
        places = (np.cumsum(~found.missing) - 1)[places[whole]]
        fine = fine.only(np.flatnonzero(whole))
        check_kept(fine.size, given.size, fine.fewest, offsets, task)
    return _of(fine, coarse, places, statistics, found if task == "downscale" else None, how, count)


def open_lagged(fine: Source, seconds: float, lag: Any, how: Large, task: str) -> Reservoir:
    """Return pairs of the states of a series and those so long before, in one pass.

    Raises
    ------
    OptionError, StateError
        Before any pass where that does not need one.
    """
    cycle, transform, offset = _scales(fine, fine, how)
    count = _room(fine, fine, 1, how)
    later(fine, seconds, lag)  # refuses what has no pairs
    fine, statistics = gather(fine, cycle, transform, offset, progress=how.progress)
    check_unmasked(fine.valid, "ds", task)
    coarse = later(fine, seconds, lag)
    places, kept = match(fine, coarse, (0,), None)
    check_kept(len(kept), fine.size, fine.fewest, None, task)
    return _of(fine.only(kept), coarse, places, statistics, None, how, count)


def _of(
    fine: Source, coarse: Source, places: np.ndarray, statistics: Statistics, inputs: Statistics | None, how: Large, count: int
) -> Reservoir:  # fmt: skip
    fold = blocks(fine.time, fine.size, FOLDS, how.validation)
    rows = evenly_spaced(fold, time_order(fine.time, fine.size), count)
    return Reservoir(fine, coarse, places, fold, rows, statistics, inputs, how.memory)


def _scales(fine: Source, coarse: Source, how: Large) -> tuple[str, Any, Any]:
    """Return how to standardise both sides; refuse what has no stream."""
    total = fine.nbytes + (0 if isinstance(coarse, BlockMeans) else coarse.nbytes)
    if how.method in METHODS:
        every = max(2, math.ceil(total / how.memory))
        raise OptionError(
            f"method={how.method!r} is fitted to all pairs at once, which take {_bytes(total)}, more than memory allows. Allow for that: "
            f"memory={_bytes(total)!r}, or take fewer: ds.isel({coarse.dimension}=slice(None, None, {every}))"
        )
    cycle, transform, offset = how.scales(fine, coarse)
    check_named(transform, offset, how.bounds, [*fine.names, *coarse.names])
    return cycle, transform, offset


def _room(fine: Source, coarse: Source, offsets: int, how: Large) -> int:
    """Return how many pairs fit into memory with what is fitted to them.

    Raises
    ------
    OptionError
        If they are too few for a fit.
    """
    cells = fine.grid.size
    each = 8.0 * cells * (FINE_COPIES * len(fine.variables) + INPUT_COPIES * len(coarse.variables) * offsets)
    least = FEWEST_SAMPLED * each
    if least > max(how.memory, LEAST_WORK):
        raise OptionError(
            f"memory={_bytes(how.memory)!r} is too little for the {FEWEST_SAMPLED} pairs that a linear mean is fitted to, on "
            f"{' x '.join(map(str, fine.grid.plane))} cells; with its working arrays these take {_bytes(least)}. Allow for that: "
            f"memory={_bytes(least)!r}, or train on a part of the grid: isel(...)"
        )
    return int(np.clip(how.memory / each, FEWEST_SAMPLED, SAMPLE))


def _bytes(number: float) -> str:
    """Return bytes as `xgenda.train` reads them, rounded up."""
    power = min(4, max(0, math.floor(math.log10(max(number, 1.0)) / 3)))
    return f"{math.ceil(number / 10 ** (3 * power))}{('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def evenly_spaced(fold: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Return about `count` pairs, evenly spaced in time, increasing; of each block its part, and at least `FEWEST_OF_BLOCK`.

    Parameters
    ----------
    fold
        Block of each pair.
    order
        Sorts the pairs by time.
    """
    if count >= len(fold):
        return np.arange(len(fold))
    out = []
    for k in np.unique(fold):
        members = order[fold[order] == k]
        own = min(len(members), max(FEWEST_OF_BLOCK, round(count * len(members) / len(fold))))
        out.append(members[np.linspace(0, len(members) - 1, own).round().astype(np.int64)])
    return np.unique(np.concatenate(out))


@dataclass(frozen=True, eq=False)
class BlockMeans(Source):
    """Means over blocks of cells of another source, of which each one is read.

    Attributes
    ----------
    of_fine
        The other source.
    means
        The blocks.
    """

    of_fine: Source | None = None
    means: Blocks | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of what is read for a field."""
        assert self.of_fine is not None
        return self.of_fine.row_bytes

    def read(self, rows: np.ndarray | Sequence[int], window: Window | None = None) -> np.ndarray:
        """Return means in physical units; of the whole grid."""
        assert self.of_fine is not None
        assert self.means is not None
        assert window is None
        fine = dataclasses.replace(self.of_fine, places=self.places).read(rows)
        return np.asarray(self.means.mean(torch.as_tensor(fine.astype(np.float64, copy=False))).numpy())


def block_means(fine: Source, factor: int, weights: str) -> BlockMeans:
    """Return the means over blocks of so many cells along each axis.

    Raises
    ------
    GridError
        If the grid has no such blocks.
    """
    grid = blocked(fine.grid)
    shared = {f.name: getattr(fine, f.name) for f in dataclasses.fields(Source)}
    shared |= {"grid": grid.coarsened(factor), "dtype": np.dtype(np.float64)}
    return BlockMeans(**shared, of_fine=fine, means=Blocks(grid, factor, weights))


def blocked(grid: AnyGrid) -> Grid:
    """Return a grid that has blocks of cells.

    Raises
    ------
    GridError
        If it has none.
    """
    if isinstance(grid, Grid):
        return grid
    raise GridError(
        "factor needs latitude and longitude along one axis each. Give coarse fields instead: xgenda.train(coarse, target=fine, "
        "task='downscale')"
    )

"""Training samples: fields of a Dataset in model order, and blocks of consecutive times for cross-fitting and validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from xgenda import metadata
from xgenda.errors import OptionError, StateError
from xgenda.formatting import duration
from xgenda.models.fitting import memory_length
from xgenda.training.sources import FEWEST, Samples, Source, open_source
from xgenda.training.surveys import Survey, look

__all__ = [
    "FEWEST",
    "FOLDS",
    "HELD",
    "Samples",
    "blocks",
    "evenly_spaced",
    "memory_of",
    "near_blocks",
    "read_samples",
    "read_source",
    "split_rows",
    "time_order",
    "window_rows",
]
FOLDS = 6
HELD = FOLDS - 2  # the validation block: late, yet inside the period
FEWEST_HELD = 5  # samples that are withheld where the user says which


def read_samples(
    ds: xr.Dataset | xr.DataArray, variables: Sequence[str] | None = None, argument: str = "ds", fewest: int = FEWEST
) -> Samples:
    """Read training fields into memory and check them; missing ones are left out.

    Raises
    ------
    OptionError
        If a variable is missing or there is no sample dimension.
    StateError
        If the fields hold NaN or fill values, or are too few.
    """
    return read_source(open_source(ds, variables, argument, fewest))


def read_source(source: Source) -> Samples:
    """Return what `read_samples` does, of an opened source."""
    found = Survey(source)
    values = source.read_all()
    found.add(look(values))
    source = found.apply()
    if found.missing.any() or source.valid is not None:
        values = values[~found.missing]
        if source.valid is not None and source.fill is not None:
            values = np.where(source.valid, values, source.fill[:, None, None].astype(values.dtype))
    return Samples(
        values.astype(np.float64, copy=False), source.time, source.grid, source.variables, source.dimension, source.valid
    )


def time_order(time: xr.DataArray | None, size: int) -> np.ndarray:
    """Return indices that sort the samples by time, so that the same time of two runs falls into the same block."""
    return np.arange(size) if time is None else np.argsort(time.values, kind="stable")


def blocks(time: xr.DataArray | None, size: int, count: int, validation: Any = None) -> np.ndarray:
    """Return the block number of each sample: `count` blocks of consecutive times.

    Parameters
    ----------
    validation
        What the block `HELD` is: None, one like the others; a part of all times, the last ones; or a slice of times.

    Raises
    ------
    OptionError
        If that leaves no block to speak of.
    """
    order, out = time_order(time, size), np.empty(size, dtype=np.int64)
    if validation is None:
        for k, members in enumerate(np.array_split(order, count)):
            out[members] = k
        return out
    held = np.zeros(size, dtype=bool)
    if isinstance(validation, slice):
        if time is None:
            raise OptionError(f"validation={validation!r} needs a time coordinate; give a part of the samples: validation=0.2")
        rows = xr.DataArray(np.arange(size), dims=time.dims, coords={"time": (time.dims, time.values)}).swap_dims(
            {time.dims[0]: "time"}
        )
        try:
            held[rows.sortby("time").sel(time=validation).values] = True
        except (TypeError, ValueError, KeyError) as problem:
            raise OptionError(
                f"validation={validation!r} is no slice of the times of ds ({problem}); give their ends as text, such as slice('2010', '2014')"
            ) from problem
    else:
        held[order[size - max(1, round(size * float(validation))) :]] = True
    rest = order[~held[order]]
    if held.sum() < FEWEST_HELD or len(rest) < max(count - 1, size // 5):
        raise OptionError(
            f"validation={validation!r} withholds {int(held.sum())} of {size} samples; at least {FEWEST_HELD} must be, and a fifth must be left. "
            f"Give another part, for example validation={max(0.2, np.ceil(100 * FEWEST_HELD / size) / 100):g}"
        )
    others = [k for k in range(count) if k != HELD]
    for k, members in zip(others, np.array_split(rest, count - 1), strict=True):
        out[members] = k
    out[held] = HELD
    return out


def evenly_spaced(rows: torch.Tensor, most: int) -> torch.Tensor:
    """Return at most so many of some rows, evenly spaced; all of them where they are no more."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), most)).round().long()]


def memory_of(z: np.ndarray, time: xr.DataArray | None) -> int:
    """Return for how many times standardised states (n, state) resemble each other, see `memory_length`; 0 without times."""
    if time is None:
        return 0
    _, first = np.unique(time.values, return_index=True)  # of several runs, one
    return memory_length(z[first].reshape(len(first), -1), np.arange(len(first)) * FOLDS // len(first))


def split_rows(fold: np.ndarray, time: xr.DataArray | None = None, gap: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return training rows and the rows of the validation block; `gap` times around that block are in neither."""
    held = fold == HELD
    near = near_blocks(fold, time, gap)[HELD]
    return torch.as_tensor(np.flatnonzero(~(held | near))), torch.as_tensor(np.flatnonzero(held))


def near_blocks(fold: np.ndarray, time: xr.DataArray | None, gap: int) -> np.ndarray:
    """Return which samples of other blocks are within `gap` times of each block, shape (blocks, n)."""
    rank = np.arange(len(fold)) if time is None else np.unique(time.values, return_inverse=True)[1].ravel()
    out = np.zeros((FOLDS, len(fold)), dtype=bool)
    for k in range(FOLDS):
        reached = np.zeros(int(rank.max()) + 1 + 2 * gap, dtype=bool)
        for shift in range(2 * gap + 1):
            reached[rank[fold == k] + shift] = True
        out[k] = reached[rank + gap] & (fold != k)
    return out


def window_rows(
    time: xr.DataArray | None, fold: np.ndarray, window: int, argument: str = "ds"
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Return windows of consecutive samples, none of which straddles a gap in time or two blocks.

    The spacing is the most common one; calendar months count as equal. A longer step is a gap; a shorter one is refused, because then
    times are not equally spaced.

    Parameters
    ----------
    time
        Of each sample, in any order.
    fold
        Block of each sample, see `blocks`.
    window
        Samples per window; 1 gives each sample for itself.
    argument
        Name of the Dataset in messages.

    Returns
    -------
    rows : ndarray
        Samples of each window in the order of time, shape (windows, window).
    fold : ndarray
        Block of each window.
    spacing : float or None
        Seconds from one sample to the next; None for a window of 1.

    Raises
    ------
    StateError
        If there is no time, the times are not equally spaced but for gaps, or a block holds no window.
    """
    if window == 1:
        return np.arange(len(fold))[:, None], fold, None
    if time is None:
        raise StateError(f"window above 1 needs consecutive times, and {argument} has no time coordinate.")
    order = time_order(time, len(fold))
    steps = metadata.seconds_between(time.values[order])
    values, counts = np.unique(np.round(steps, 3), return_counts=True)
    spacing = float(values[counts.argmax()]) if len(steps) else 1.0
    shortest, longest = metadata.equal_steps(spacing)
    if spacing <= 0 or steps.min(initial=np.inf) < shortest:
        raise StateError(
            f"window above 1 needs equally spaced times (gaps may be left out), and those of {argument} are from {duration(steps.min())} to "
            f"{duration(steps.max())} apart. Select one unbroken run, or interpolate: {argument}.resample(time='1D').interpolate()"
        )
    broken = (steps > longest) | (np.diff(fold[order]) != 0)
    run = np.concatenate([[0], np.cumsum(broken)])
    starts = np.flatnonzero(run[: max(0, len(run) - window + 1)] == run[window - 1 :])
    rows = order[starts[:, None] + np.arange(window)]
    if set(fold.tolist()) > set(fold[rows[:, 0]].tolist()):
        raise StateError(
            f"window={window} needs {window} consecutive times in each of {len(np.unique(fold))} blocks, and {argument} has {len(fold)} times "
            f"in {int(broken.sum()) + 1} unbroken runs; use a shorter window."
        )
    return rows, fold[rows[:, 0]], spacing

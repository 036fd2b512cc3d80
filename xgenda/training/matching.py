"""Which coarse field belongs to which fine one: by the labels of their times, in memory or not."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from xgenda import metadata
from xgenda.errors import OptionError, StateError
from xgenda.formatting import user_level
from xgenda.models.conditions import neighbours, spacing_of_times
from xgenda.training.sources import Samples, Source

Timed = TypeVar("Timed", Samples, Source)
FEW_LOST = 0.02  # of the fine fields may lack coarse ones without a word


def checked_offsets(
    offsets: Sequence[int], coarse: Samples | Source, spacing: float | None
) -> tuple[tuple[int, ...], float | None]:
    """Return the offsets of neighbours, zero first, and the seconds from one to the next.

    Raises
    ------
    OptionError
        If they are no whole steps with zero among them, or there are no times.
    """
    found = tuple(offsets) if isinstance(offsets, (tuple, list, range, np.ndarray)) else ()
    if (
        not found
        or any(isinstance(o, str) for o in found)
        or any(isinstance(o, bool) or int(o) != o for o in found)
        or 0 not in found
    ):
        raise OptionError(
            f"neighbours={offsets!r} is not accepted; give whole steps with 0 among them, for example neighbours=(-1, 0, 1)."
        )
    order = (0, *sorted({int(o) for o in found} - {0}))  # the time itself first
    if order == (0,):
        return order, None
    if coarse.time is None:
        raise OptionError("neighbours and context need a time coordinate, and ds has none.")
    return order, spacing_of_times(coarse.time.values) if spacing is None else spacing


def match(
    fine: Samples | Source, coarse: Samples | Source, offsets: tuple[int, ...], spacing: float | None, ends: str = "drop"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the coarse fields of each fine field that has them all, shape (n, offsets), and which fine fields these are.

    `ends` is that of `xgenda.models.conditions.neighbours`.

    Raises
    ------
    OptionError
        If the times of one side say nothing of the other, or none has what it needs.
    """
    if fine.time is None or coarse.time is None:
        if fine.size != coarse.size or (fine.time is None) != (coarse.time is None):
            raise OptionError(
                f"target has {fine.size} fields along {fine.dimension!r} and ds {coarse.size} along {coarse.dimension!r}; without "
                f"times on both sides they must be as many, in the same order."
            )
        return np.arange(fine.size)[:, None], np.arange(fine.size)
    n = fine.size
    if len(np.unique(metadata.time_labels(coarse.time))) < coarse.size:  # runs one after the other: only the order can tell
        if coarse.size == n and (coarse.time.values == fine.time.values).all() and offsets == (0,):
            return np.arange(n)[:, None], np.arange(n)
        raise OptionError(
            "ds holds a time more than once, so that target must have the same times in the same order, and neighbours cannot be told; "
            "give one run, or the runs one after the other without neighbours."
        )
    try:
        places = neighbours(coarse.time.values, fine.time.values, offsets, spacing, ends)
    except TypeError as problem:
        raise OptionError(
            f"The times of ds and target are of two calendars: {problem}. Convert one: ds.convert_calendar('standard')"
        ) from problem
    kept = np.flatnonzero((places >= 0).all(1))
    if not len(kept) and (places[:, offsets.index(0)] >= 0).any():
        raise OptionError(
            f"ds has the times of target, and none with all its neighbours {', '.join(f'{o * (spacing or 0) / 3600:+g} h' for o in offsets if o)}. "
            f"Give a series with such steps, or train without neighbours."
        )
    if not len(kept):
        raise OptionError(
            f"ds has none of the times of target: {coarse.time.values.min()} to {coarse.time.values.max()} against {fine.time.values.min()} to "
            f"{fine.time.values.max()}. Shift those of one, where they mean the same: ds.assign_coords(time=target.time)"
        )
    return places[kept], kept


def lag_in_seconds(lag: Any) -> float:
    """Return a positive time span in seconds."""
    try:
        seconds = 0.0 if isinstance(lag, (int, float)) else float(pd.Timedelta(lag).total_seconds())
    except (TypeError, ValueError):
        seconds = 0.0
    if not seconds > 0:
        raise OptionError(f"lag={lag!r} is not accepted; give a time span as pandas reads it, for example lag='48h'.")
    return seconds


def later(samples: Timed, seconds: float, lag: Any) -> Timed:
    """Return the states as backgrounds of the times so much later."""
    time = samples.time
    if time is None:
        raise OptionError(f"lag={lag!r} needs a time coordinate, and ds has none; give pairs: target=")
    if len(np.unique(metadata.time_labels(time))) < len(time):
        raise OptionError(
            f"lag={lag!r} needs times that are there once, and ds holds some more than once, as runs one after the other do; give pairs: target="
        )
    step = (
        np.timedelta64(round(seconds * 1e9), "ns") if time.dtype.kind == "M" else pd.Timedelta(seconds=seconds).to_pytimedelta()
    )
    moved = time.copy(data=time.values + step)
    if not np.isin(metadata.time_labels(moved), metadata.time_labels(time)).any():
        steps = np.sort(metadata.seconds_between(np.sort(time.values)))
        raise OptionError(
            f"lag={lag!r}: no two times of ds are so far apart; neighbours are {steps[0] / 3600:g} to {steps[-1] / 3600:g} h apart. Give a "
            f"multiple of that, for example lag='{np.median(steps) / 3600:g}h'"
        )
    return dataclasses.replace(samples, time=moved)


def check_kept(kept: int, size: int, fewest: int, offsets: tuple[int, ...] | None, task: str) -> None:
    """Refuse too few pairs, and tell where many fine fields have no coarse ones.

    Parameters
    ----------
    kept, size
        How many fine fields have what they need, of how many.
    fewest
        How many will do.
    offsets
        Of the coarse fields; None where those of one series are both sides, so that some have none in any case.

    Raises
    ------
    StateError
    """
    if kept < fewest:
        found = (
            f"Of {size} fine fields {kept} have all the coarse ones that they need"
            if task == "downscale"
            else f"Of {size} states of target {kept} have a field of ds at their time"
            if task == "conversion"
            else f"Of {size} states {kept} have a background"
        )
        raise StateError(f"{found}; at least {fewest} are needed. Give a longer series of what is short.")
    if offsets is None:
        return
    ends = max(offsets) - min(offsets)  # the first and the last lack neighbours in any case
    if kept < min(size - ends, size * (1 - FEW_LOST)):
        lost = (
            "fine fields have not all the coarse ones that they need, and"
            if task == "downscale"
            else "states have no background, and"
        )
        warnings.warn(f"{size - kept} of {size} {lost} are left out.", stacklevel=user_level())


def check_unmasked(valid: np.ndarray | None, argument: str, task: str) -> None:
    """Refuse masks, which pairs have not.

    Raises
    ------
    StateError
    """
    if valid is not None:
        raise StateError(
            f"{argument} holds cells that are NaN at all times, and task={task!r} has no mask. Fill them or crop: {argument}.fillna(...), "
            f"{argument}.isel(...)"
        )

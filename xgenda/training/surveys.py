"""What a pass over training fields finds: which are missing, which cells are masked, their range; and what has to be refused.

A time at which a variable is NaN everywhere is missing, and left out. A cell that is NaN at all other times is masked, land in an ocean.
Any other NaN is refused, and so are infinity and fill values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from xgenda import metadata
from xgenda.errors import StateError
from xgenda.metadata import LARGEST_PLAUSIBLE, SENTINELS
from xgenda.training.sources import Source


@dataclass(frozen=True, eq=False)
class Look:
    """What a block of fields (n, channels, ny, nx) holds.

    Attributes
    ----------
    missing
        Whether a channel is NaN everywhere, shape (n, channels).
    nan
        How many fields that are not missing are NaN, shape (channels, ny, nx); None: none.
    infinite
        Number of infinite values, shape (channels,).
    lowest, highest
        Of all others, without what may be fill values, shape (channels,).
    strange
        How often each value that may be a fill value occurs, per channel.
    total
        Sum of all that is not NaN, shape (channels,); only where there is some NaN.
    """

    missing: np.ndarray
    nan: np.ndarray | None
    infinite: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    strange: list[Counter[float]]
    total: np.ndarray | None

    @property
    def kept(self) -> np.ndarray:
        """Which fields are not missing, shape (n,)."""
        return np.asarray(~self.missing.any(1))


def look(block: np.ndarray) -> Look:
    """Look at a block of fields (n, channels, ny, nx)."""
    n, channels = block.shape[:2]
    low, high = (np.array([f(block[:, c]) for c in range(channels)], np.float64) for f in (np.min, np.max))  # NaN if any is
    missing, nan, total = np.zeros((n, channels), bool), None, None
    if np.isnan(low).any():
        holes = np.isnan(block)
        missing = holes.all((2, 3))
        kept = ~missing.any(1)
        block, holes = block[kept], holes[kept]
        nan = holes.sum(0, dtype=np.int64)
        total = np.asarray(np.nansum(block, (0, 2, 3), dtype=np.float64))
        low = np.array([np.fmin.reduce(block[:, c], None, initial=np.inf) for c in range(channels)], np.float64)
        high = np.array([np.fmax.reduce(block[:, c], None, initial=-np.inf) for c in range(channels)], np.float64)
    infinite, strange = np.zeros(channels, np.int64), [Counter[float]() for _ in range(channels)]
    for c in range(channels):
        inside = any((block[:, c] == s).any() for s in SENTINELS if low[c] <= s <= high[c])
        if not inside and max(-low[c], high[c]) <= LARGEST_PLAUSIBLE:
            continue
        values = block[:, c].astype(np.float64).ravel()
        values = values[~np.isnan(values)]
        infinite[c] = np.isinf(values).sum()
        huge, sentinel = np.abs(values) > LARGEST_PLAUSIBLE, np.isin(values, SENTINELS)
        strange[c].update(values[sentinel & ~huge].tolist())
        if (finite := values[huge & np.isfinite(values)]).size:
            strange[c][float(finite[0])] += finite.size
        plain = values[~(huge | sentinel)]
        low[c], high[c] = plain.min(initial=np.inf), plain.max(initial=-np.inf)
    return Look(missing, nan, infinite, low, high, strange, total)


class Survey:
    """Joins the looks at the blocks of a source, in their order."""

    def __init__(self, source: Source) -> None:
        channels = len(source.variables)
        self.source = source
        self._missing: list[np.ndarray] = []
        self._nan = np.zeros(source.shape[1:], np.int64)
        self._infinite = np.zeros(channels, np.int64)
        self._total = np.zeros(channels)
        self.lowest, self.highest = np.full(channels, np.inf), np.full(channels, -np.inf)
        self._strange = [Counter[float]() for _ in range(channels)]

    def add(self, found: Look) -> None:
        """Take a look into account."""
        self._missing.append(found.missing)
        self._infinite += found.infinite
        if found.nan is not None and found.total is not None:
            self._nan += found.nan
            self._total += found.total
        self.lowest, self.highest = np.minimum(self.lowest, found.lowest), np.maximum(self.highest, found.highest)
        for mine, theirs in zip(self._strange, found.strange, strict=True):
            mine.update(theirs)

    @property
    def missing(self) -> np.ndarray:
        """Which fields are missing, shape (n,)."""
        return np.asarray(np.concatenate(self._missing).any(1))

    def apply(self) -> Source:
        """Return the source without what is missing, with its mask.

        Raises
        ------
        StateError
            If some cells are NaN at some times only, or values are infinite or stand for missing ones.
        """
        missing = self.missing
        kept = int((~missing).sum())
        source, size = self.source, self.source.size * int(np.prod(self.source.grid.plane))
        for c, name in enumerate(source.names):
            if self._missing and np.concatenate(self._missing)[:, c].all():
                raise metadata.not_finite("NaN", size, size, (0, 0, 0), name, source.argument)
            partial = (self._nan[c] > 0) & (self._nan[c] < kept)
            if partial.any():
                raise metadata.not_finite(
                    "NaN", int(self._nan[c][partial].sum()), size, self._first(c, partial, missing), name, source.argument
                )
            if self._infinite[c]:
                raise metadata.not_finite(
                    "infinity", int(self._infinite[c]), size, self._first(c, None, missing), name, source.argument
                )
            apart = 0.1 * (self.highest[c] - self.lowest[c])
            low, high = self.lowest[c] - apart, self.highest[c] + apart
            for value, count in self._strange[c].items():
                if abs(value) > LARGEST_PLAUSIBLE or not low <= value <= high:
                    raise metadata.filled(value, count, size, name, source.argument)
                self.lowest[c], self.highest[c] = min(self.lowest[c], value), max(self.highest[c], value)
        if not kept:
            raise StateError(
                f"{source.argument} has no time at which no variable is missing; take fewer: variables=[{source.names[0]!r}]"
            )
        counts = (self._nan == 0).sum((1, 2)) * kept
        fill = np.divide(self._total, counts, out=np.zeros(len(counts)), where=counts > 0)
        return source.masked(missing, self._nan == 0, fill)

    def _first(self, channel: int, cells: np.ndarray | None, missing: np.ndarray) -> tuple[int, ...]:
        """Return where NaN (in some cells) or infinity is found first, in the order of the Dataset; reads again."""
        rows, columns = self.source.orientation.rows, self.source.orientation.columns
        for block in self.source.blocks():
            values = self.source.read(block)[:, channel]
            bad = np.isinf(values) if cells is None else np.isnan(values) & cells & ~missing[block][:, None, None]
            if bad.any():
                found = [(int(self.source.places[block[t]]), int(rows[y]), int(columns[x])) for t, y, x in np.argwhere(bad)]
                return min(found)
        return ()

"""The normal form of observations: one entry per value, and what must be known of the variables of a state to read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xgenda.errors import ObservationError, did_you_mean
from xgenda.maps import LinearMap
from xgenda.metadata import unit_factors
from xgenda.observations.correlations import Correlated


@dataclass(frozen=True)
class Wanted:
    """One variable of the state, as far as observations need to know it."""

    name: str
    standard_name: str | None
    units: str | None
    given_units: str | None = None  #: of the user's Dataset: what observations without units are in
    levels: tuple[float, ...] = ()  #: of its channels, in Pa or m; empty for one channel without a level
    vertical: str | None = (
        None  #: what `levels` are: 'pressure', 'depth' (positive downward), 'height' (above the ground) or 'altitude'
    )
    of: str | None = None  #: name of the variable that a linear operator observes; None for a variable itself
    rows: Callable[..., tuple[LinearMap, np.ndarray]] | None = None  #: of that operator, see `xgenda.operators.LinearOperator`
    period: np.timedelta64 | None = None  #: over which an observation is a mean, up to its time
    optional: bool = False  #: whether observations may come without a level: the state has a single one
    inputs: tuple[int, ...] = ()  #: channels of the state that an operator takes which is not linear

    @property
    def from_given(self) -> tuple[float, float]:
        """Scale and offset from the units of the user's Dataset to those of the state."""
        return unit_factors(self.given_units, self.units)


def first_channels(wanted: Sequence[Wanted]) -> np.ndarray:
    """Return the first channel of each variable, and after them the number of all channels, shape (n + 1,).

    What a linear operator observes has the channel of its variable and none of its own.
    """
    first = np.cumsum([0, *(0 if w.of is not None else max(1, len(w.levels)) for w in wanted)])
    names = [w.name for w in wanted]
    for i, w in enumerate(wanted):
        if w.of is not None:
            first[i] = first[names.index(w.of)]
    return first


def check_names(argument: str, given: object, wanted: Sequence[Wanted]) -> None:
    """Refuse text, and a mapping that names what is no variable of the state."""
    known = [w.name for w in wanted]
    for value in given.values() if isinstance(given, Mapping) else (given,):
        if isinstance(value, (str, bytes)):
            raise ObservationError(f"{argument}={given!r} is no standard deviation; give numbers: {argument}=1.0")
    for key in given if isinstance(given, Mapping) else ():
        if key not in known:
            raise ObservationError(
                f"{argument} names {key!r}, which is no variable of the state; it has {', '.join(map(repr, known))}.{did_you_mean(key, known)}"
            )


def per_variable(given: float | Mapping[str, float], wanted: Sequence[Wanted]) -> np.ndarray:
    """Return one number per variable; a mapping that does not name one means 0 for it."""
    return np.array([float(given.get(w.name, 0.0)) if isinstance(given, Mapping) else float(given) for w in wanted])


@dataclass(frozen=True, eq=False)
class Table:
    """Observations in normal form: one entry per value, all arrays of one length.

    Attributes
    ----------
    source, row
        Which container of the input (0 for a single one) and which row (or flat cell) of it.
    time
        datetime64 or cftime; None where the source has no time.
    latitude, longitude
        Degrees.
    level
        Pa, or metres below ('depth') or above ('height') the sea, as `Wanted.vertical` of the variable says; NaN for variables without levels.
    variable
        Index into the variables of the state.
    value, error
        In the units of the state; `error` is a standard deviation.
    code
        `Quality`, so far.
    station, platform
        Text; empty where unknown.
    height
        Of the station in metres; NaN where unknown, and for variables with levels.
    correlation
        Index into `correlated`, -1 where the error is independent of all others.
    correlated
        How errors depend on each other; not by row.
    """

    source: np.ndarray
    row: np.ndarray
    time: np.ndarray | None
    latitude: np.ndarray
    longitude: np.ndarray
    level: np.ndarray
    variable: np.ndarray
    value: np.ndarray
    error: np.ndarray
    code: np.ndarray
    station: np.ndarray
    platform: np.ndarray
    height: np.ndarray
    correlation: np.ndarray
    correlated: tuple[Correlated, ...] = ()

    @property
    def finite_error(self) -> np.ndarray:
        """What checks take as errors: 0 where they are infinite, of observations that are passive."""
        return np.where(np.isfinite(self.error), self.error, 0.0)

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self.value)

    def take(self, rows: np.ndarray) -> Table:
        """Return some rows (index or boolean array)."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in COLUMNS}
        taken: dict[str, Any] = {k: None if v is None else v[rows] for k, v in columns.items()}
        return dataclasses.replace(self, **taken)

    def moved(self, value: np.ndarray) -> Table:
        """Return the table with other values."""
        return dataclasses.replace(self, value=value)

    def with_code(self, code: np.ndarray) -> Table:
        """Return the table with other quality codes."""
        return dataclasses.replace(self, code=code)


COLUMNS = tuple(f.name for f in dataclasses.fields(Table) if f.name != "correlated")


def empty_table() -> Table:
    """Return a table without any row."""
    none, zero, text = np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=object)
    return Table(zero, zero, None, none, none, none, zero, none, none, np.zeros(0, dtype=np.uint8), text, text, none, zero)


def joined(tables: Sequence[Table]) -> Table:
    """Return one table after the other; all with times, or none."""
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        parts = [getattr(t, name) for t in tables]
        columns[name] = None if parts[0] is None else np.concatenate(parts)
    first = np.cumsum([0, *(len(t.correlated) for t in tables)])
    columns["correlation"] = np.concatenate(
        [np.where(t.correlation >= 0, t.correlation + n, -1) for t, n in zip(tables, first, strict=False)]
    )
    return Table(**columns, correlated=tuple(c for t in tables for c in t.correlated))

"""Every error that xgenda raises on purpose, grouped by what a caller would do about it.

::

    GendaError
    +-- CoordinateError        (ValueError)   a coordinate is missing, ambiguous or unusable
    +-- GridError              (ValueError)   the grid is not the one that is needed
    +-- UnitsError             (ValueError)   units are missing, unknown or incompatible
    +-- StateError             (ValueError)   the fields hold values that cannot be used
    +-- ChunkingError          (ValueError)   dask chunks need another layout
    +-- ObservationError       (ValueError)   the observations cannot be used as they are
    +-- DivergenceError        (RuntimeError) a cycle of forecasts and analyses has lost the truth
    +-- OptionError            (ValueError)   a keyword has a value that is not accepted
    +-- ModelNotFoundError     (KeyError)     no model of that name, or none that fits
    +-- ChecksumError          (ValueError)   a file is not the one that was registered
    +-- CheckpointError        (ValueError)   a model file cannot be read
    +-- PublishingError        (OSError)      a model could not be put on a hub
    +-- OutputExistsError      (FileExistsError)
    +-- MissingDependencyError (ImportError)  an optional package is not installed

    LittleDataWarning          (UserWarning)  there is too little to train on

A message says which argument is wrong, what was found, what would be accepted, and the line to type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class GendaError(Exception):
    """Base class of all errors raised by xgenda."""


class CoordinateError(GendaError, ValueError):
    """A coordinate is missing, ambiguous or unusable."""


class GridError(GendaError, ValueError):
    """The grid of the data is not the one that is needed."""


class UnitsError(GendaError, ValueError):
    """Units are missing, unknown, or cannot be converted."""


class StateError(GendaError, ValueError):
    """The fields hold values that cannot be used (NaN, infinity, fill values)."""


class ChunkingError(GendaError, ValueError):
    """The dask chunks need another layout."""


class ObservationError(GendaError, ValueError):
    """The observations cannot be used as they are."""


class DivergenceError(GendaError, RuntimeError):
    """A cycle of forecasts and analyses has lost the truth, or its forecast has failed.

    Attributes
    ----------
    cycle : int
        Which one, counted from 0.
    result : xarray.Dataset or None
        What `xgenda.cycle` would have returned of the cycles before it.
    """

    def __init__(self, message: str, cycle: int = -1, result: object = None) -> None:
        super().__init__(message)
        self.cycle, self.result = cycle, result


class OptionError(GendaError, ValueError):
    """A keyword has a value that is not accepted."""


class ModelNotFoundError(GendaError, KeyError):
    """No model has that name, or none fits the data."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class ChecksumError(GendaError, ValueError):
    """A file is not the one that was registered."""


class CheckpointError(GendaError, ValueError):
    """A model file cannot be read."""


class PublishingError(GendaError, OSError):
    """A model could not be put on a hub."""


class OutputExistsError(GendaError, FileExistsError):
    """An output already exists and overwriting was not asked for."""


class MissingDependencyError(GendaError, ImportError):
    """An optional package is needed and not installed."""


class LittleDataWarning(UserWarning):
    """The training fields are worth too few independent ones to learn from."""


def did_you_mean(found: object, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or an empty string."""
    names = list(known)
    close = difflib.get_close_matches(str(found), names, n=1, cutoff=0.5)
    if not close:  # in capitals
        folded = {str(n).casefold(): n for n in names}
        close = [folded[k] for k in difflib.get_close_matches(str(found).casefold(), folded, n=1, cutoff=0.5)]
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(argument: str, found: object, choices: Iterable[str]) -> str:
    """Return `found` if it is one of `choices`, else raise an `OptionError` that lists them."""
    choices = list(choices)
    if not isinstance(found, str) or found not in choices:
        raise OptionError(
            f"{argument}={found!r} is not accepted; choose one of {', '.join(map(repr, choices))}." + did_you_mean(found, choices)
        )
    return found


def check_option(argument: str, owner: str, name: str, known: Iterable[str]) -> None:
    """Refuse an option that its owner does not have, naming those that it has."""
    known = list(known)
    if name not in known:
        raise OptionError(f"{argument}: {owner!r} has no option {name!r}; it has {', '.join(known)}.{did_you_mean(name, known)}")


def check_flag(argument: str, found: object) -> None:
    """Refuse what is not True or False."""
    if not isinstance(found, bool):
        raise OptionError(f"{argument}={found!r} is not accepted; it must be True or False.")


def check_count(argument: str, found: object, minimum: int = 1) -> int:
    """Return `found` as an int of at least `minimum`, else raise an `OptionError`."""
    import numbers

    if isinstance(found, bool) or not isinstance(found, numbers.Integral) or int(found) < minimum:
        raise OptionError(
            f"{argument}={found!r} is not accepted; it must be a whole number of at least {minimum}, "
            f"for example {argument}={max(minimum, 8)}."
        )
    return int(found)


def check_mapping(argument: str, found: object) -> dict[str, Any]:
    """Return a mapping of options, or nothing, as a dictionary of one's own, else raise an `OptionError`."""
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise OptionError(f"{argument}={found!r} is not accepted; give a mapping of names to values: {argument}={{'name': 1.0}}")
    return {str(k): v for k, v in found.items()}


def check_pair(argument: str, found: object, minimum: int = 1) -> tuple[int, int]:
    """Return rows and columns from one number or a pair, each of at least `minimum`."""
    import numbers

    pair = (found, found) if isinstance(found, numbers.Integral) else found
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise OptionError(
            f"{argument}={found!r} is not accepted; give a number of cells, or rows and columns: {argument}=(64, 64)."
        )
    return check_count(argument, pair[0], minimum), check_count(argument, pair[1], minimum)


def missing_dependency(package: str, extra: str, purpose: str) -> MissingDependencyError:
    """Build the error that names the extra to install."""
    return MissingDependencyError(
        f"{purpose} needs the package {package!r}, which is not installed. Install it with: pip install 'xgenda[{extra}]'"
    )

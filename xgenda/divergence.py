"""Whether a cycle of forecasts and analyses has lost the truth, as its innovations tell."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from xgenda.errors import OptionError, check_count


@dataclass(frozen=True, eq=False)
class DivergenceGuard:
    """When a cycle counts as diverged, and what is done then.

    A filter that has lost the truth believes in itself: its spread is small and its error is not. Innovations tell: their mean square is many
    times the variance that background and observations let expect (chi2; 1 where both are right).

    Parameters
    ----------
    chi2, cycles
        Diverged is a cycle whose chi2, over all observations that were used or refused by the background check, was above `chi2` in this one
        and the ones before it, `cycles` in a row; those without observations do not count. No observation counts with more than the square of
        the threshold of the background check (or 9, where that is more), so that a few wrong instruments, refused every time, are no divergence.
    limits
        Lowest and highest value of a variable that is possible, in the units of `initial`; an analysis or a background beyond is diverged at
        once. Values that are not finite always are.
    restart
        States to go on from, a Dataset along ``member`` or ``time`` with at least as many as the cycle has members: such as a
        climatology. The background is then replaced by some of them, drawn by seed and time, and analysed anew: also where a forecast or an
        analysis is not finite or beyond `limits`. None: the cycle stops with a `DivergenceError`.
    most
        How many restarts before it stops after all.

    Raises
    ------
    OptionError
        If a number is not accepted.

    Examples
    --------
    >>> import xgenda
    >>> guard = xgenda.DivergenceGuard(chi2=6.0, cycles=10, limits={"t2m": (180.0, 340.0)})
    """

    chi2: float = 4.0
    cycles: int = 5
    limits: Mapping[str, tuple[float, float]] | None = None
    restart: xr.Dataset | None = None
    most: int = 3

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if isinstance(self.chi2, bool) or not isinstance(self.chi2, numbers.Real) or not 1 < float(self.chi2) < np.inf:
            raise OptionError(
                f"DivergenceGuard: chi2={self.chi2!r} is not accepted; it is a number above 1, for example chi2=4.0."
            )
        check_count("DivergenceGuard: cycles", self.cycles)
        check_count("DivergenceGuard: most", self.most, 0)
        if self.limits is not None and not isinstance(self.limits, Mapping):
            raise OptionError(
                f"DivergenceGuard: limits={self.limits!r} is not accepted; give a mapping: limits={{'t2m': (180.0, 340.0)}}"
            )
        for name, pair in (self.limits or {}).items():
            if not _is_range(pair):
                raise OptionError(
                    f"DivergenceGuard: limits[{name!r}]={pair!r} is not accepted; give (lowest, highest), with infinity where there is none: "
                    f"limits={{{name!r}: (0.0, float('inf'))}}"
                )
        if self.restart is not None and not isinstance(self.restart, xr.Dataset):
            raise OptionError(
                f"DivergenceGuard: restart is a {type(self.restart).__name__}; give a Dataset of states along 'member' or 'time'."
            )

    def lost(self, chi2: Sequence[float]) -> str | None:
        """Return in words why a cycle is diverged, given the chi2 of all cycles since the last restart (NaN without observations)."""
        some: list[float] = []
        for value in reversed(chi2):
            if value <= self.chi2:
                return None
            if not np.isnan(value):  # infinity is beyond all limits
                some.append(value)
            if len(some) == self.cycles:
                break
        else:
            return None
        return (
            f"squared innovations were {min(some):.1f} to {max(some):.1f} times what the errors of background and observations let expect, in "
            f"{self.cycles} cycles in a row (more than {self.chi2:g}: DivergenceGuard)"
        )

    def beyond(self, arrays: Mapping[str, np.ndarray]) -> str | None:
        """Return in words which variable is out of its limits; None where none is."""
        for name, (low, high) in (self.limits or {}).items():
            if name in arrays:
                least, most = float(np.nanmin(arrays[name])), float(np.nanmax(arrays[name]))  # of some cells they are NaN: land
                if least < low or most > high:
                    return f"{name!r} reaches {least if least < low else most:.6g}, and its limits are {low:g} to {high:g}"
        return None

    def described(self) -> dict[str, object]:
        """Return what goes into a record of the options."""
        sizes = None if self.restart is None else {str(k): int(v) for k, v in self.restart.sizes.items()}
        limits = {k: list(map(float, v)) for k, v in (self.limits or {}).items()}
        return {"chi2": self.chi2, "cycles": self.cycles, "limits": limits, "restart": sizes, "most": self.most}


def _is_range(pair: object) -> bool:
    """Whether this is two real numbers, the lower one first."""
    if not isinstance(pair, (Sequence, np.ndarray)) or isinstance(pair, str) or len(pair) != 2:
        return False
    if not all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in pair):
        return False
    return bool(float(pair[0]) < float(pair[1]))  # False for NaN

"""What a downscaling model takes beside noise: coarse fields of some times, the season and the hour, fields that never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata
from xgenda.curvilinear import AnyGrid, grid_from_dict
from xgenda.errors import CoordinateError, OptionError, check_choice
from xgenda.models.variables import VariableSpec
from xgenda.scaling import HARMONICS, Scaling, cycle_basis

SAME_TIME = 0.01  # of the spacing of neighbouring times
ENDS = ("drop", "nearest")


@dataclass(frozen=True, eq=False)
class Conditions:
    """The inputs of a downscaling model.

    Parameters
    ----------
    variables
        Of the coarse fields, in channel order.
    grid
        Of the coarse fields.
    scaling
        Their standardisation.
    offsets
        Times that are seen together, in units of `spacing`: (0,), or with neighbours (-1, 0, 1).
    spacing
        Seconds, where there are neighbours.
    cycle
        Whose harmonics are inputs: 'none', 'dayofyear', 'hour' or 'dayofyear+hour'.
    lead_time
        Seconds that count as one, of the lead time of a forecast; None where it is no input.
    statics
        Names of the fields on the fine grid that never change.
    ends
        What becomes of times that lack some of the others: 'drop', they are left out; 'nearest', the last one that is there stands for what is
        missing, see `neighbours`.
    """

    variables: tuple[VariableSpec, ...]
    grid: AnyGrid
    scaling: Scaling
    offsets: tuple[int, ...] = (0,)
    spacing: float | None = None
    cycle: str = "none"
    lead_time: float | None = None
    statics: tuple[str, ...] = ()
    ends: str = "drop"

    @property
    def coarse_channels(self) -> int:
        """Number of coarse fields, those of all times together."""
        return len(self.variables) * len(self.offsets)

    @property
    def planes(self) -> int:
        """Number of inputs that are the same everywhere."""
        harmonics = cycle_columns(self.cycle)
        return harmonics + (self.lead_time is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; the arrays of the scaling are stored apart."""
        return {
            "variables": [vars(v) for v in self.variables],
            "grid": self.grid.to_dict(),
            "scaling": self.scaling.to_dict(),
            "offsets": list(self.offsets),
            "spacing": self.spacing,
            "cycle": self.cycle,
            "lead_time": self.lead_time,
            "statics": list(self.statics),
            **({"ends": self.ends} if self.ends != "drop" else {}),  # files without are older
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], mean: np.ndarray, std: np.ndarray) -> Conditions:
        """Join the form written by `to_dict` and the arrays of the scaling."""
        return cls(
            tuple(VariableSpec(**v) for v in data["variables"]), grid_from_dict(data["grid"]),
            Scaling.from_dict(data["scaling"], mean, std), tuple(int(o) for o in data["offsets"]), data["spacing"], str(data["cycle"]),
            data["lead_time"], tuple(data["statics"]),
            check_choice("ends", data.get("ends", "drop"), ENDS),
        )  # fmt: skip


def cycle_columns(cycle: str) -> int:
    """Return the number of harmonics of a cycle, without the constant."""
    return 0 if cycle == "none" else 2 * HARMONICS * len(cycle.split("+"))


def planes_of(time: xr.DataArray | None, cycle: str, lead: np.ndarray | None, unit: float | None, size: int) -> np.ndarray:
    """Return the inputs that are the same everywhere, shape (t, planes): harmonics of the time, and the lead time."""
    parts = [] if cycle == "none" else [cycle_basis(time, cycle, size)[:, 1:]]
    if unit is not None:
        assert lead is not None
        parts.append(lead[:, None] / unit)
    return np.concatenate(parts, 1) if parts else np.zeros((size, 0))


def lead_times(ds: xr.Dataset, time: str | None, size: int, argument: str = "ds") -> np.ndarray:
    """Return the lead time of each time in seconds, from the coordinate with standard_name ``forecast_period``.

    Raises
    ------
    CoordinateError
        If there is none, it varies along another dimension than time, or is missing at some times.
    """
    found = [c for c in ds.coords.values() if c.attrs.get("standard_name") == "forecast_period"]
    found = found or [ds.coords[n] for n in ("step", "lead_time", "forecast_period") if n in ds.coords]
    if len(found) != 1 or not set(found[0].dims) <= ({time} if time else set()):
        raise CoordinateError(
            f"{argument} has no lead time for each time, which the model takes: assign one, "
            f"{argument}.assign_coords(forecast_period=('time', hours, {{'standard_name': 'forecast_period', 'units': 'h'}}))"
        )
    values = found[0].values
    if values.dtype.kind == "m":
        seconds = values / np.timedelta64(1, "s")
    else:
        seconds = values.astype(float) * metadata.unit_factors(str(found[0].attrs.get("units", "h")), "s")[0]
    if not np.isfinite(seconds).all():
        raise CoordinateError(
            f"{argument}[{str(found[0].name)!r}] holds lead times that are missing; drop those: {argument}.dropna('time')"
        )
    return np.broadcast_to(np.asarray(seconds, dtype=float), (size,)).copy()


def spacing_of_times(values: np.ndarray, argument: str = "ds") -> float:
    """Return the seconds between the times of a series: the most frequent difference of neighbours.

    Raises
    ------
    OptionError
        If there are fewer than two times, or no two differences agree.
    """
    steps = np.round(metadata.seconds_between(np.sort(values)), 3)
    steps = steps[steps > 0]
    if not steps.size:
        raise OptionError(f"neighbours and context need at least two times, and {argument} has {len(values)}; leave them out.")
    found, count = np.unique(steps, return_counts=True)
    return float(found[count.argmax()])


def neighbours(
    values: np.ndarray, wanted: np.ndarray, offsets: Sequence[int], spacing: float | None, ends: str = "drop"
) -> np.ndarray:
    """Return where the neighbours of each wanted time are among `values`, shape (wanted, offsets); -1 where one is missing.

    With ``ends="nearest"``, for offsets without gaps such as (0, -1, 1), a missing one is that which is next to it on the way to the wanted time,
    so that a series goes on at its ends as it ends, and a gap in it is the end of one series and the beginning of another.
    """
    if not len(values) or not len(wanted):
        return np.full((len(wanted), len(offsets)), -1)
    origin = values[0]
    have, want = metadata.in_seconds(values - origin), metadata.in_seconds(wanted - origin)
    order = np.argsort(have, kind="stable")
    sorted_times = have[order]
    tolerance = SAME_TIME * (spacing or 1.0)
    out = np.full((len(want), len(offsets)), -1)
    for k, offset in enumerate(offsets):
        at = want + offset * (spacing or 0.0)
        place = np.clip(np.searchsorted(sorted_times, at - tolerance), 0, len(have) - 1)
        out[:, k] = np.where(np.abs(sorted_times[place] - at) <= tolerance, order[place], -1)
    if ends == "nearest":
        missing = out < 0
        for k in sorted(range(len(offsets)), key=lambda k: abs(offsets[k])):
            if offsets[k]:
                inner = list(offsets).index(offsets[k] - int(np.sign(offsets[k])))
                missing[:, k] |= missing[:, inner]
                out[:, k] = np.where(missing[:, k], out[:, inner], out[:, k])
    return out

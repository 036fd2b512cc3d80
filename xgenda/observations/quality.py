"""Quality control: every observation ends with exactly one code, and none is dropped without one."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import numpy as np

from xgenda.metadata import SENTINELS, unit_factors


class Quality(enum.IntEnum):
    """What became of an observation. The first check that fails gives the code."""

    USED = 0
    PASSIVE = 1
    MISSING = 2
    BOUNDS = 3
    DOMAIN = 4
    WINDOW = 5
    BACKGROUND = 6


MEANINGS: Mapping[Quality, str] = {
    Quality.USED: "used",
    Quality.PASSIVE: "passive: error is infinite, departures are computed only",
    Quality.MISSING: "missing: value, position or time is NaN or a fill value",
    Quality.BOUNDS: "outside physical bounds",
    Quality.DOMAIN: "outside the grid",
    Quality.WINDOW: "outside every time window",
    Quality.BACKGROUND: "too far from the background",
}

#: Gross bounds by CF standard name: lower, upper, units.
BOUNDS: Mapping[str, tuple[float, float, str]] = {
    "air_temperature": (150.0, 350.0, "K"),
    "dew_point_temperature": (120.0, 320.0, "K"),
    "sea_surface_temperature": (270.65, 313.15, "K"),
    "air_pressure_at_mean_sea_level": (85000.0, 110000.0, "Pa"),
    "surface_air_pressure": (30000.0, 110000.0, "Pa"),
    "eastward_wind": (-150.0, 150.0, "m s-1"),
    "northward_wind": (-150.0, 150.0, "m s-1"),
    "wind_speed": (0.0, 150.0, "m s-1"),
    "relative_humidity": (0.0, 1.1, "1"),
    "specific_humidity": (0.0, 0.06, "1"),
    "geopotential": (-10000.0, 500000.0, "m2 s-2"),
}


def gross_bounds(standard_name: str | None, units: str | None) -> tuple[float, float]:
    """Return the physical bounds of a variable in its own units; infinite when none are known."""
    if standard_name is None or standard_name not in BOUNDS or units is None:
        return -np.inf, np.inf
    lower, upper, known = BOUNDS[standard_name]
    scale, offset = unit_factors(known, units)
    return lower * scale + offset, upper * scale + offset


def is_missing(values: np.ndarray) -> np.ndarray:
    """Return True where a value is NaN, infinite, or a finite fill value."""
    out = ~np.isfinite(values) | (np.abs(values) > 1e15)
    for sentinel in SENTINELS:
        out |= values == sentinel
    return np.asarray(out)


def background_check(
    value: np.ndarray, error: np.ndarray, background: np.ndarray, background_error: np.ndarray, threshold: float
) -> np.ndarray:
    """Return True where abs(O - B) > threshold * sqrt(s_o**2 + s_b**2); all arrays in the units of the observation."""
    departure = np.abs(value - background)
    return np.asarray(departure > threshold * np.sqrt(error**2 + background_error**2))


def count_codes(codes: np.ndarray) -> dict[str, int]:
    """Return the number of observations per code, by name, in the order of the checks; they add up to the whole."""
    return {q.name.lower(): int(np.count_nonzero(codes == q)) for q in Quality}

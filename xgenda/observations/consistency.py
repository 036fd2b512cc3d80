"""Values of one report that contradict each other, or what their name says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from xgenda import metadata
from xgenda.errors import UnitsError
from xgenda.observations.table import Wanted

#: How far a dew point may be above the temperature, in kelvin: both are rounded, to whole degrees in old reports.
DEW_POINT_EXCESS = 0.5
DIRECTIONS = ("wind_from_direction", "wind_to_direction", "sea_surface_wave_from_direction", "sea_water_velocity_to_direction")
NOT_NEGATIVE = (
    *("wind_speed", "wind_speed_of_gust", "sea_water_speed", "relative_humidity", "specific_humidity", "humidity_mixing_ratio"),
    *("precipitation_flux", "precipitation_amount", "lwe_precipitation_rate", "lwe_thickness_of_precipitation_amount"),
    *("rainfall_flux", "rainfall_amount", "depth", "surface_snow_thickness", "sea_floor_depth_below_geoid"),
)


def contradictions(values: Mapping[int, tuple[Wanted, np.ndarray]]) -> dict[int, np.ndarray]:
    """Return, for each variable, True where its values contradict others of their report.

    Parameters
    ----------
    values
        Variable of the state and its values in the units of the state, by its index, NaN where they are not to be judged; two variables are
        compared where they have the same cells.
    """
    out = {code: _impossible(wanted, value) for code, (wanted, value) in values.items()}
    dew, air = (
        [code for code, (wanted, _) in values.items() if wanted.standard_name == name]
        for name in ("dew_point_temperature", "air_temperature")
    )
    if len(dew) == len(air) == 1:  # of several it is not known which belong together
        (d, moist), (a, dry) = ((c[0], _in(*values[c[0]], "K")) for c in (dew, air))
        if moist.shape == dry.shape and values[d][0].vertical == values[a][0].vertical:
            high = moist > dry + DEW_POINT_EXCESS
            out[d], out[a] = out[d] | high, out[a] | high
    return out


def _in(wanted: Wanted, value: np.ndarray, units: str) -> np.ndarray:
    """Return values in other units; those without units are taken to be in them."""
    try:
        scale, offset = metadata.unit_factors(wanted.units or units, units)
    except UnitsError:
        return np.full(value.shape, np.nan)
    return value * scale + offset


def _impossible(wanted: Wanted, value: np.ndarray) -> np.ndarray:
    if wanted.standard_name in DIRECTIONS and wanted.units is not None:
        degrees = _in(wanted, value, "degree")
        return np.asarray((degrees < 0) | (degrees > 360))
    return np.asarray(value < 0) if wanted.standard_name in NOT_NEGATIVE else np.zeros(value.shape, dtype=bool)

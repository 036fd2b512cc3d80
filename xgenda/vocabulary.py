"""How published forecast models name their channels, and what their variables are called elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

#: Of channels on pressure levels: names that variables have, CF standard name, units.
ON_LEVELS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "z": (("geopotential",), "geopotential", "m2 s-2"),
    "t": (("temperature", "ta"), "air_temperature", "K"),
    "u": (("u_component_of_wind", "ua"), "eastward_wind", "m s-1"),
    "v": (("v_component_of_wind", "va"), "northward_wind", "m s-1"),
    "w": (("vertical_velocity", "wap"), "lagrangian_tendency_of_air_pressure", "Pa s-1"),
    "q": (("specific_humidity", "hus"), "specific_humidity", "kg kg-1"),
    "r": (("relative_humidity", "hur"), "relative_humidity", "%"),
}
#: Of channels without levels. Those at some height above the ground are found by name alone: their standard names do not tell the height.
SINGLE: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    "t2m": (("2t", "tas", "2m_temperature"), None, "K"),
    "d2m": (("2d", "2m_dewpoint_temperature"), None, "K"),
    "u10m": (("u10", "10u", "uas", "10m_u_component_of_wind"), None, "m s-1"),
    "v10m": (("v10", "10v", "vas", "10m_v_component_of_wind"), None, "m s-1"),
    "u100m": (("u100", "100u", "100m_u_component_of_wind"), None, "m s-1"),
    "v100m": (("v100", "100v", "100m_v_component_of_wind"), None, "m s-1"),
    "msl": (("psl", "mean_sea_level_pressure"), "air_pressure_at_mean_sea_level", "Pa"),
    "sp": (("ps", "surface_pressure"), "surface_air_pressure", "Pa"),
    "tcwv": (("prw", "total_column_water_vapour"), "atmosphere_mass_content_of_water_vapor", "kg m-2"),
    "sst": (("tos", "sea_surface_temperature"), "sea_surface_temperature", "K"),
}
LEVELED = re.compile(r"(?P<stem>[A-Za-z_]*[A-Za-z_])(?P<level>[1-9][0-9]{0,3})")


def split_channel(channel: str) -> tuple[str, float | None]:
    """Return the variable of a channel and its pressure in Pa, None where its name has none: ``z500`` is z at 50000 Pa, ``t2m`` is itself."""
    match = LEVELED.fullmatch(channel)
    return (match["stem"], 100.0 * float(match["level"])) if match else (channel, None)


def units_of(channel: str, given: Mapping[str, str]) -> str | None:
    """Return the units of a channel, None where they are not known."""
    stem, pressure = split_channel(channel)
    table = (ON_LEVELS.get(stem) if pressure else SINGLE.get(channel)) or (None, None, None)
    return given.get(channel) or given.get(stem) or table[2]


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names in quotes, not too many."""
    return ", ".join(map(repr, list(names)[:most])) + (f", and {len(names) - most} more" if len(names) > most else "") or "none"

"""Quality control: every observation ends with exactly one code, and none is dropped without one."""

from __future__ import annotations

import enum
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import cKDTree

from xgenda.errors import OptionError, check_flag
from xgenda.grids import EARTH_RADIUS
from xgenda.metadata import SENTINELS, unit_factors
from xgenda.observations.grouping import first_of_each
from xgenda.spherical import normalised, positions, unit_vectors

if TYPE_CHECKING:
    import pandas as pd

    from xgenda.observations.table import Table


class Quality(enum.IntEnum):
    """What became of an observation. The first check that fails gives the code."""

    USED = 0
    PASSIVE = 1
    MISSING = 2
    BOUNDS = 3
    DOMAIN = 4
    WINDOW = 5
    BACKGROUND = 6
    FLAGGED = 7
    BLACKLISTED = 8
    DUPLICATE = 9
    THINNED = 10
    MERGED = 11
    BUDDY = 12
    HEIGHT = 13
    OPERATOR = 14
    LAND = 15
    CONSISTENCY = 16


MEANINGS: Mapping[Quality, str] = {
    Quality.USED: "used",
    Quality.PASSIVE: "passive: error is infinite, departures are computed only",
    Quality.MISSING: "missing: value, position or time is NaN or a fill value",
    Quality.BOUNDS: "outside physical bounds",
    Quality.DOMAIN: "outside the grid",
    Quality.WINDOW: "outside every time window",
    Quality.BACKGROUND: "too far from the background",
    Quality.FLAGGED: "flagged as bad by its provider",
    Quality.BLACKLISTED: "station or platform on the blacklist",
    Quality.DUPLICATE: "the same report as another one",
    Quality.THINNED: "thinned: another one in its box is used",
    Quality.MERGED: "merged into the superob of its box",
    Quality.BUDDY: "contradicted by its neighbours",
    Quality.HEIGHT: "station too far above or below the ground of the state",
    Quality.OPERATOR: "the observation operator failed: what it would see of the background is not finite",
    Quality.LAND: "no sea (or no valid cell) of the state around it",
    Quality.CONSISTENCY: "contradicts another value of the same report, or what its name allows",
}

#: The nearest codes of JEDI/UFO (QCflags) and of DART (quality control of the data, input and outlier).
EQUIVALENTS: Mapping[Quality, tuple[int, int]] = {
    Quality.USED: (0, 0),
    Quality.PASSIVE: (1, 1),
    Quality.MISSING: (10, 4),
    Quality.BOUNDS: (12, 6),
    Quality.DOMAIN: (13, 5),
    Quality.WINDOW: (13, 5),
    Quality.BACKGROUND: (19, 7),
    Quality.FLAGGED: (11, 6),
    Quality.BLACKLISTED: (14, 5),
    Quality.DUPLICATE: (16, 5),
    Quality.THINNED: (16, 5),
    Quality.MERGED: (16, 5),
    Quality.BUDDY: (22, 6),
    Quality.HEIGHT: (13, 5),
    Quality.OPERATOR: (15, 4),
    Quality.LAND: (13, 5),
    Quality.CONSISTENCY: (12, 6),
}

#: Values of a provider's flag that are good, by convention.
GOOD_FLAGS: Mapping[str, tuple[str, ...]] = {
    "argo": ("1", "2"),
    "ncep": ("0", "1", "2", "3"),
    "madis": ("V", "S", "C", "G", "Z"),
    "xgenda": ("0",),
}
FEWEST_BUDDIES, MOST_BUDDIES = 2, 15
SUSPECTS_AT_ONCE = 4096
#: Of 32-bit integers in IODA: five above the lowest; that of its floats is beyond all that is plausible.
INTEGER_SENTINEL = -2147483643.0
SUSPECT = 2.0  # standard deviations from the background beyond which neighbours are asked


@dataclass(frozen=True)
class QualityControl:
    """Which checks observations pass before they are used, beside the background check.

    Parameters
    ----------
    flags
        How to read a provider's flags, the column ``flag`` or ``quality`` (or ``<name>_flag``, ``<name>_qc``, ``<name>_QC``; for levels those
        of the level's column, too; for Argo also ``POSITION_QC`` and ``JULD_QC``): 'argo', 'ncep', 'madis', or the values that are good. None
        ignores such columns; without one it means nothing.
    bounds
        Lowest and highest value by variable, in the units of `ds`; beyond those known for its CF standard name.
    blacklist
        Stations or platforms that are not used.
    duplicates
        Whether of equal reports (one variable, place, level and time, and one station or value) only one is used.
    thin
        Side of a box in metres in which only the observation with the smallest error is used, by variable, level and time.
    superob
        Side of a box in metres whose observations are merged into their weighted mean, with the error of a mean but not below
        `floor` times the smallest of theirs.
    floor
        See `superob`.
    buddy
        Reject observations that lie further than this many standard deviations from what their neighbours let expect (and more
        than two from the background). None turns it off.
    buddy_radius
        How far neighbours are looked for, in metres.
    height_difference
        Largest difference in metres between a station's height and the ground of the state, where both are known.

    Notes
    -----
    The buddy check compares observations of one variable and time on one level, and is that of optimal interpolation (Lorenc 1981, Mon.
    Weather Rev. 109, 701-721, section 4): each suspect is predicted from up to 15 neighbours with background errors correlated as
    exp(-distance / buddy_radius), and the worst are removed first, so that the order of the reports does not matter.
    """

    flags: str | Sequence[Any] | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    blacklist: Collection[str] = ()
    duplicates: bool = True
    thin: float | None = None
    superob: float | None = None
    floor: float = 0.5
    buddy: float | None = 4.0
    buddy_radius: float = 100e3
    height_difference: float | None = 500.0

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if isinstance(self.flags, str) and self.flags not in GOOD_FLAGS:
            raise OptionError(
                f"quality: flags={self.flags!r} is not accepted; choose one of {', '.join(map(repr, GOOD_FLAGS))}, or give the good values: "
                f"flags=(1, 2)"
            )
        check_flag("quality: duplicates", self.duplicates)
        for name in ("thin", "superob", "buddy", "buddy_radius", "height_difference", "floor"):
            value = getattr(self, name)
            optional = name not in ("buddy_radius", "floor")
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < np.inf:
                raise OptionError(
                    f"quality: {name}={value!r} is not accepted; give a positive number{' or None' if optional else ''}."
                )
        if self.thin is not None and self.superob is not None:
            raise OptionError("quality: thin and superob exclude each other; leave one out.")
        if isinstance(self.blacklist, str):
            raise OptionError(
                f"quality: blacklist={self.blacklist!r} is one text; give a collection: blacklist=[{self.blacklist!r}]"
            )
        for name, pair in self.bounds.items():
            if np.shape(pair) != (2,) or not float(pair[0]) < float(pair[1]):
                raise OptionError(f"quality: bounds[{name!r}]={pair!r} is not accepted; give (lowest, highest).")


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
    for sentinel in (*SENTINELS, INTEGER_SENTINEL):
        out |= values == sentinel
    return np.asarray(out)


def background_check(
    value: np.ndarray, error: np.ndarray, background: np.ndarray, background_error: np.ndarray, threshold: float
) -> np.ndarray:
    """Return True where abs(O - B) > threshold * sqrt(s_o**2 + s_b**2); all arrays in the units of the observation."""
    departure = np.abs(value - background)
    return np.asarray(departure > threshold * np.sqrt(error**2 + background_error**2))


def flagged(flags: np.ndarray, good: str | Sequence[Any]) -> np.ndarray:
    """Return True where a provider's flag is not among the good ones; bytes, text and numbers are compared as text."""
    accepted = set(GOOD_FLAGS[good]) if isinstance(good, str) else {_as_text(g) for g in good}
    kinds, place = np.unique(np.array([_as_text(f) for f in flags.ravel()], dtype=object).astype(str), return_inverse=True)
    return np.asarray(~np.array([k in accepted for k in kinds], dtype=bool)[place])


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip()
    if isinstance(value, (int, float, np.integer, np.floating)) and np.isfinite(value) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def boxes(latitude: np.ndarray, longitude: np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of boxes of about `side` by `side` metres: rows of equal height, columns as many as fit around each."""
    height = np.degrees(side / EARTH_RADIUS)
    row = np.floor((latitude + 90.0) / height).astype(np.int64)
    middle = np.clip((row + 0.5) * height - 90.0, -90.0, 90.0)
    around = np.maximum(1, np.floor(360.0 * np.cos(np.radians(middle)) / height)).astype(np.int64)
    column = np.floor((longitude % 360.0) / 360.0 * around).astype(np.int64) % around
    return row, column


def superob(
    value: np.ndarray, error: np.ndarray, latitude: np.ndarray, longitude: np.ndarray, group: np.ndarray, floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return weighted mean, its error, latitude and longitude of each group; errors not below `floor` times the smallest."""
    count = int(group.max(initial=-1)) + 1
    weight = error**-2.0
    total = np.bincount(group, weight, count)
    mean = np.bincount(group, weight * value, count) / total
    smallest = np.full(count, np.inf)
    np.minimum.at(smallest, group, error)
    vectors = unit_vectors(latitude, longitude) * weight[:, None]
    centre = np.stack([np.bincount(group, vectors[:, k], count) for k in range(3)], -1)
    phi, lam = positions(normalised(centre))
    return mean, np.maximum(total**-0.5, floor * smallest), phi, lam


def against_background(
    table: Table, expected: np.ndarray, spread: np.ndarray, threshold: float | None, quality: QualityControl
) -> np.ndarray:
    """Return the quality codes of the observations of one time after the background and buddy checks.

    Parameters
    ----------
    table
        The observations, m of them.
    expected, spread
        What the background lets expect of each and its standard deviation, shapes (m,).
    threshold
        Of the background check; None turns it off.
    quality
        Of the buddy check.
    """
    code, departure, error = table.code.copy(), table.value - expected, table.finite_error
    code[(code <= Quality.PASSIVE) & ~np.isfinite(expected)] = Quality.OPERATOR
    left = np.flatnonzero(code <= Quality.PASSIVE)
    if threshold is not None:
        bad = background_check(table.value[left], error[left], expected[left], spread[left], threshold)
        code[left[bad]] = Quality.BACKGROUND
        left = left[~bad]
    if quality.buddy is not None:
        # what lies above one place has no horizontal distance, and yet departures of its own
        _, group = first_of_each((table.variable[left], np.nan_to_num(table.level[left])), ())
        bad = buddy_check(
            table.latitude[left], table.longitude[left], departure[left], error[left], spread[left], float(quality.buddy),
            float(quality.buddy_radius), group,
        )  # fmt: skip
        code[left[bad]] = Quality.BUDDY
    return code


def buddy_check(
    latitude: np.ndarray,
    longitude: np.ndarray,
    departure: np.ndarray,
    error: np.ndarray,
    background_error: np.ndarray,
    threshold: float,
    radius: float,
    group: np.ndarray | None = None,
) -> np.ndarray:
    """Return True where observations of one time are contradicted by their neighbours; see `QualityControl`.

    Only those with the same number in `group`, a variable on a level, are neighbours; None: all are of one.
    """
    bad = np.zeros(len(departure), dtype=bool)
    total = np.sqrt(error**2 + background_error**2)
    suspects = np.flatnonzero(np.abs(departure) > SUSPECT * total)
    if not len(suspects):
        return bad
    places = unit_vectors(latitude, longitude)
    if group is not None:  # groups are further apart than any two places
        places = np.column_stack([places, 3.0 * group])
    tree, reach = cKDTree(places), 2 * np.sin(min(radius / EARTH_RADIUS, np.pi) / 2)
    k = min(MOST_BUDDIES + 1, len(departure))
    distance, near = tree.query(places[suspects], k=k, distance_upper_bound=reach)
    distance, near = distance.reshape(len(suspects), k), near.reshape(len(suspects), k)
    there = np.isfinite(distance) & (near != suspects[:, None])
    near = np.where(there, near, 0)

    def surprise_of(rows: np.ndarray) -> np.ndarray:
        """Return how many standard deviations suspects are from what their remaining neighbours let expect; 0 with too few of them."""
        at, alive = near[rows], there[rows] & ~bad[near[rows]]
        apart = np.linalg.norm(places[at][:, :, None] - places[at][:, None], axis=-1) * EARTH_RADIUS / radius
        spread = background_error[at]
        inner = np.where(alive[:, :, None] & alive[:, None], spread[:, :, None] * spread[:, None] * np.exp(-apart), 0.0)
        inner += np.eye(k) * np.where(alive, error[at] ** 2, 1.0)[:, :, None]
        near_by = np.exp(-np.where(alive, distance[rows], 0.0) * EARTH_RADIUS / radius)
        cross = np.where(alive, background_error[suspects[rows], None] * spread * near_by, 0.0)
        solved = np.linalg.solve(inner, np.stack([cross, np.where(alive, departure[at], 0.0)], -1))
        expected = (cross * solved[:, :, 1]).sum(1)
        own = total[suspects[rows]] ** 2
        left = np.maximum(own - (cross * solved[:, :, 0]).sum(1), 1e-12 * own)
        judged = ~bad[suspects[rows]] & (alive.sum(1) >= FEWEST_BUDDIES)
        return np.where(judged, np.abs(departure[suspects[rows]] - expected) / np.sqrt(left), 0.0)

    surprise, worst = np.zeros(len(suspects)), np.zeros(len(departure))
    todo = np.arange(len(suspects))
    while len(todo):
        for first in range(0, len(todo), SUSPECTS_AT_ONCE):
            rows = todo[first : first + SUSPECTS_AT_ONCE]
            surprise[rows] = surprise_of(rows)
        worst[suspects] = surprise
        beyond = np.flatnonzero(surprise > threshold)
        around = np.where(there[beyond], worst[near[beyond]], 0.0).max(1, initial=0.0)
        removed = suspects[beyond[surprise[beyond] >= around]]
        bad[removed] = True
        # only where a neighbour is gone does anything change
        todo = np.flatnonzero((there & np.isin(near, removed)).any(1) | np.isin(suspects, removed)) if len(removed) else todo[:0]
    return bad


def quality_report(departures: Any) -> pd.DataFrame:
    """Return how many observations got each code, by variable and platform.

    Parameters
    ----------
    departures
        What `xgenda.innovations` returns.

    Returns
    -------
    pandas.DataFrame
        One row per variable (and platform, where known), one column per code that occurs, and ``total``; prints as text and HTML.
    """
    import pandas as pd

    code = np.asarray(departures["quality_code"].values)
    names = np.array([q.name.lower() for q in Quality])[code]
    by = {"variable": departures["variable"].values}
    if "platform" in departures.coords:
        by["platform"] = departures["platform"].values.astype(str)
    table = pd.crosstab([pd.Series(v, name=k) for k, v in by.items()], pd.Series(names, name="code"))
    table = table[[q.name.lower() for q in Quality if q.name.lower() in table.columns]]
    table["total"] = table.sum(axis=1)
    return table


def count_codes(codes: np.ndarray) -> dict[str, int]:
    """Return the number of observations per code that occurs, by name, 'used' first; they add up to the whole."""
    count = {q.name.lower(): int(np.count_nonzero(codes == q)) for q in Quality}
    return {name: n for name, n in count.items() if n or name == "used"}

"""Simulated observing networks: where and when an instrument would have looked, as places on the sphere or as masks on a grid.

`sample` turns a known truth and such places into observations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.ndimage import gaussian_filter

from xgenda.errors import CoordinateError, OptionError, check_count
from xgenda.grids import EARTH_RADIUS, ROTATION
from xgenda.metadata import LATITUDE_NAMES, LONGITUDE_NAMES, TIME_NAMES, find_coordinate, match_variable
from xgenda.observations.shapes import as_xarray, decoded
from xgenda.spherical import normalised, positions, unit_vectors, wrapped
from xgenda.states import enter
from xgenda.weights import interpolation

LATITUDE = {"standard_name": "latitude", "units": "degrees_north"}
LONGITUDE = {"standard_name": "longitude", "units": "degrees_east"}


def random_stations(
    count: int,
    rng: np.random.Generator,
    *,
    latitude: tuple[float, float] = (-90.0, 90.0),
    longitude: tuple[float, float] = (-180.0, 180.0),
) -> xr.Dataset:
    """Return places that are spread evenly over the sphere, or over a part of it between parallels and meridians.

    Parameters
    ----------
    count
        Number of stations.
    rng
        Where they lie.
    latitude, longitude
        Bounds in degrees, ascending.

    Returns
    -------
    xarray.Dataset
        Coordinates latitude and longitude along ``obs``. As many per unit of area everywhere: no crowd at the poles.
    """
    check_count("count", count)
    if not -90 <= latitude[0] < latitude[1] <= 90:
        raise OptionError(f"latitude={latitude!r} is not accepted; give two ascending bounds between -90 and 90.")
    if not longitude[0] < longitude[1] <= longitude[0] + 360:
        raise OptionError(f"longitude={longitude!r} is not accepted; give two ascending bounds at most 360 degrees apart.")
    low, high = np.sin(np.radians(latitude))
    phi = np.degrees(np.arcsin(rng.uniform(low, high, count)))
    lam = wrapped(rng.uniform(*longitude, count))
    return xr.Dataset(coords={"latitude": ("obs", phi, LATITUDE), "longitude": ("obs", lam, LONGITUDE)})


def ground_track(
    seconds: np.ndarray, *, inclination: float = 98.7, period: float = 6072.0, node: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return latitude and longitude in degrees under a satellite on a circular orbit.

    Parameters
    ----------
    seconds
        Since it crossed the equator northward, any shape.
    inclination
        Of the orbit in degrees; the default is that of polar orbiters in the morning.
    period
        Of one revolution in seconds.
    node
        Longitude of that crossing in degrees.

    Notes
    -----
    The plane of the orbit is fixed; that of a sun-synchronous satellite turns by one degree a day.
    """
    angle, tilt = 2 * np.pi * np.asarray(seconds, dtype=float) / period, np.radians(inclination)
    phi = np.arcsin(np.sin(tilt) * np.sin(angle))
    lam = np.arctan2(np.cos(tilt) * np.sin(angle), np.cos(angle)) - ROTATION * np.asarray(seconds, dtype=float)
    return np.degrees(phi), wrapped(np.degrees(lam) + node)


def polar_swath(
    start: str | pd.Timestamp,
    duration: str | pd.Timedelta,
    *,
    width: float = 2000e3,
    pixels: int = 40,
    every: float = 8.0,
    inclination: float = 98.7,
    period: float = 6072.0,
    node: float = 0.0,
) -> xr.Dataset:
    """Return where and when a scanner on a polar orbiter looks.

    Parameters
    ----------
    start, duration
        Time of the northward crossing of the equator at `node`, and how long to look, as pandas reads them.
    width
        Of the swath in metres, from the first to the last pixel along the ground.
    pixels
        Number of them in each line.
    every
        Seconds between lines.
    inclination, period, node
        See `ground_track`.

    Returns
    -------
    xarray.Dataset
        Coordinates latitude and longitude along (scan, pixel), and time along ``scan``.
    """
    check_count("pixels", pixels)
    seconds = np.arange(0.0, pd.Timedelta(duration).total_seconds(), every)
    if not len(seconds) or not 0 < width < np.pi * EARTH_RADIUS:
        raise OptionError(
            f"duration={duration!r}, every={every!r} and width={width!r} must be positive, and the swath less than half the globe."
        )
    orbit = {"inclination": inclination, "period": period, "node": node}
    here, ahead = (unit_vectors(*ground_track(seconds + step, **orbit)) for step in (0.0, 1.0))
    left = normalised(np.cross(here, ahead - here))
    angle = (np.linspace(-0.5, 0.5, pixels) if pixels > 1 else np.zeros(1)) * width / EARTH_RADIUS
    phi, lam = positions(np.cos(angle)[None, :, None] * here[:, None] + np.sin(angle)[None, :, None] * left[:, None])
    time = pd.Timestamp(start) + pd.to_timedelta(seconds, unit="s")
    return xr.Dataset(
        coords={
            "latitude": (("scan", "pixel"), phi, LATITUDE),
            "longitude": (("scan", "pixel"), lam, LONGITUDE),
            "time": ("scan", time.values.astype("datetime64[ns]"), {"standard_name": "time"}),
        }
    )


def network_of(obs: xr.Dataset | pd.DataFrame, *, period: slice | None = None, to: Any = None) -> xr.Dataset:
    """Return where and when observations were made, without their values, moved to another time: the network of one date for the fields of another.

    How well would the network of 1916 see the weather of 2016, which is known? ``sample(truth, network_of(obs, period=slice("1916-03-12",
    "1916-03-12"), to="2016-03-12"), error, rng)`` are the observations to assimilate (after Brohan 2022, who looks at reanalyses so).

    Parameters
    ----------
    obs
        Table along one dimension, with latitude and longitude, and with times where `period` or `to` is given.
    period
        Which of them, as ``slice("1916-01-01", "1916-12-31")``, both ends included; all by default.
    to
        The time that the begin of `period`, or without it the first of the observations, is moved to; the others keep their distance
        from it. None: places without times, which every state is seen from.

    Returns
    -------
    xarray.Dataset
        Coordinates latitude and longitude, time unless `to` is None, and others along ``obs``, such as heights and names of stations.

    Raises
    ------
    OptionError
        If there are no times where some are needed, none is in `period`, or `to` is of another calendar.
    CoordinateError
        If there is no latitude or longitude along one dimension.
    ObservationError
        If `obs` is no table, or its times are numbers or text.

    Examples
    --------
    >>> import xgenda
    >>> from xgenda.observations.networks import network_of
    >>> stations = xgenda.tutorial.open_dataset("europe-synop")
    >>> str(network_of(stations, to="1916-03-12").time.values[0])[:10]
    '1916-03-12'
    """
    table = as_xarray(obs, "obs")
    names = {"latitude": LATITUDE_NAMES, "longitude": LONGITUDE_NAMES, "time": TIME_NAMES}
    found = {k: name for k, aliases in names.items() if (name := find_coordinate(table, k, aliases)) is not None}
    dims = {table[found[k]].dims if k in found else () for k in ("latitude", "longitude")}
    if len(dims) > 1 or len(rows_of := next(iter(dims))) != 1:
        raise CoordinateError("obs needs latitude and longitude along one dimension, a row for each observation.")
    (dim,) = rows_of
    fields = {str(n): c for n, c in table.coords.items() if c.dims == (dim,) and n != dim and n not in found.values()}
    fields |= {k: table[n] for k, n in found.items() if table[n].dims == (dim,)}
    if (period is not None or to is not None) and "time" not in fields:
        raise OptionError("obs has no time for each observation; leave out period and to: network_of(obs)")
    if "time" in fields and (period is not None or to is not None):
        fields["time"] = decoded(fields["time"], "obs")
    rows = np.arange(table.sizes[dim])
    if period is not None:
        time = fields["time"].values
        try:
            rows = np.sort(xr.DataArray(rows, dims="time", coords={"time": time}).sortby("time").sel(time=period).values)
        except (TypeError, ValueError, KeyError) as problem:
            raise OptionError(
                f"period={period!r} is not accepted ({problem}); give slice('1916-01-01', '1916-12-31')."
            ) from problem
        if not len(rows):
            raise OptionError(f"period={period!r} holds none of the {len(time)} observations, {time.min()} to {time.max()}.")
    coords = {k: ("obs", f.values[rows], dict(f.attrs)) for k, f in fields.items()}
    if to is None:
        coords.pop("time", None)
    else:
        _, times, attrs = coords["time"]
        first = getattr(period, "start", None)
        coords["time"] = ("obs", _moved(times, times.min() if first is None else first, to), attrs)
    out = xr.Dataset(coords=coords)
    out["latitude"].attrs |= LATITUDE
    out["longitude"].attrs |= LONGITUDE
    return out


def _moved(times: np.ndarray, first: Any, to: Any) -> np.ndarray:
    """Return times as long after `to` as they are after `first`."""
    calendar = getattr(times[0], "calendar", None)

    def read(given: Any) -> Any:
        if calendar is None:
            return pd.Timestamp(given).as_unit("ns").to_datetime64()  # whatever unit this version of pandas reads
        return xr.date_range(given, periods=1, calendar=calendar, use_cftime=True)[0] if isinstance(given, str) else given

    try:
        return np.asarray(times + (read(to) - read(first)))
    except (TypeError, ValueError) as problem:
        raise OptionError(f"to={to!r} cannot be reached from {first}: {problem}. Give a time of the same calendar.") from problem


def sample(truth: xr.Dataset, places: xr.Dataset, error: dict[str, float], rng: np.random.Generator) -> xr.Dataset:
    """Return observations of a truth at some places, with errors drawn and carried along.

    Parameters
    ----------
    truth
        Fields on a grid of any kind, of one time, or of several to which the nearest of each place is taken.
    places
        Latitude and longitude, and time where `truth` has several.
    error
        Standard deviation by variable, in the units of the variable; other variables are not observed.
    rng
        For the errors.

    Returns
    -------
    xarray.Dataset
        On the coordinates of `places`, with ``<name>_error``; NaN outside the grid of the truth and beside its masked cells.
    """
    state = enter(truth, "truth")
    truth, layout, grid, orientation = state.ds, state.layout, state.grid, state.orientation
    dims = places["latitude"].dims
    latitude, longitude = (places[n].values.ravel() for n in ("latitude", "longitude"))
    operator, inside = interpolation(grid, latitude, longitude)
    times = layout.time if layout.time in truth.dims else None
    which = np.zeros(len(latitude), dtype=np.int64)
    if times is not None and truth.sizes[times] > 1:
        if "time" not in places:
            raise OptionError(f"places has no time and truth has {truth.sizes[times]} times; select one: truth.isel({times}=0)")
        asked = places["time"].broadcast_like(places["latitude"]).transpose(*dims).values.ravel()
        which = np.asarray(np.abs(truth[times].values[None] - asked[:, None]).argmin(1))
    out = places.copy()
    for name, sigma in error.items():
        field = truth[match_variable(truth, name, None, "truth")]
        rows = field.transpose(*([times] if times else []), *layout.dims).values
        flat = orientation.to_model(rows).reshape(-1, grid.size).astype(float)
        value = np.full(len(latitude), np.nan)
        for t in np.unique(which):
            mine = np.flatnonzero((which == t) & inside)
            value[mine] = operator.select(mine)(flat[min(int(t), len(flat) - 1)])
        noisy = value + float(sigma) * rng.standard_normal(len(value))
        shape = [places.sizes[d] for d in dims]
        out[name] = (dims, noisy.reshape(shape), dict(field.attrs))
        out[f"{name}_error"] = (dims, np.full(shape, float(sigma)), {k: v for k, v in field.attrs.items() if k == "units"})
    return out


def nadir_tracks(shape: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the cells under the ground tracks of nadir altimeters: straight lines, half of them ascending.

    Parameters
    ----------
    shape
        Rows and columns of the grid.
    count
        Number of tracks.
    rng
        Where they lie.

    Returns
    -------
    numpy.ndarray
        Shape `shape`, bool.
    """
    ny, nx = shape
    out = np.zeros(shape, dtype=bool)
    rows = np.arange(ny)
    for k in range(count):
        slope = (1 if k % 2 else -1) * rng.uniform(0.35, 0.55)  # columns per row, as of an orbit of 66 to 78 degrees inclination
        columns = np.round(rng.uniform(-0.25, 1.25) * nx + slope * (rows - ny / 2)).astype(int)
        inside = (columns >= 0) & (columns < nx)
        out[rows[inside], columns[inside]] = True
    return out


def swath(shape: tuple[int, int], width: float, rng: np.random.Generator, *, gap: float = 0.0) -> np.ndarray:
    """Return the cells of one wide swath, without the gap around its nadir.

    Parameters
    ----------
    shape
        Rows and columns of the grid.
    width, gap
        In cells, across the track.
    rng
        Where it lies.

    Returns
    -------
    numpy.ndarray
        Shape `shape`, bool.
    """
    ny, nx = shape
    slope = rng.choice([-1.0, 1.0]) * rng.uniform(0.35, 0.55)
    centre = rng.uniform(0.25, 0.75) * nx
    row, column = np.indices(shape)
    across = np.abs((column - centre) - slope * (row - ny / 2)) / np.hypot(1.0, slope)
    return np.asarray((across <= width / 2) & (across >= gap / 2))


def clouds(shape: tuple[int, int], cover: float, rng: np.random.Generator, *, size: float = 5.0) -> np.ndarray:
    """Return where clouds are: a smooth random field above the level that gives the wanted cover.

    Parameters
    ----------
    shape
        Rows and columns of the grid.
    cover
        Fraction of the cells, from 0 to 1.
    rng
        Where they lie.
    size
        Scale of the clouds in cells.

    Returns
    -------
    numpy.ndarray
        Shape `shape`, bool; True under clouds.
    """
    field = gaussian_filter(rng.standard_normal(shape), size, mode="wrap")
    return np.asarray(field > np.quantile(field, 1 - cover)) if cover > 0 else np.zeros(shape, dtype=bool)

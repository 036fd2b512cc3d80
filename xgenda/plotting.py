"""Maps of ensembles with plain matplotlib: no projection library, no coastlines, nothing to download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata, states
from xgenda.errors import OptionError, check_choice, missing_dependency
from xgenda.grids import Grid
from xgenda.spherical import wrapped
from xgenda.states import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALUES, DIFFERENCES, SPREADS = "viridis", "RdBu_r", "YlOrBr"
WIDTH = 4.4  # inches of one panel


def plot_analysis(
    reference: xr.Dataset | xr.DataArray,
    ensemble: xr.Dataset | xr.DataArray,
    obs: xr.Dataset | pd.DataFrame | None = None,
    *,
    variable: str | None = None,
    time: int = 0,
    member: int = 0,
    reference_label: str = "background",
    title: str | None = None,
) -> Figure:
    """Draw an ensemble beside what it is compared with: the background it started from, or the truth.

    The upper row shows the reference (with the observed values as points on the same colours), the ensemble mean and one member
    on one colour scale; the lower row the spread, the mean minus the reference, and that member minus the mean.

    Parameters
    ----------
    reference
        The background or the truth, on the grid of `ensemble`.
    ensemble
        With the dimension ``member``, as `xgenda.assimilate` and `xgenda.downscale` return it. Read into memory where drawn.
    obs
        Table with latitude, longitude and the variable; of those with a time, the ones nearest to the time shown are drawn.
    variable
        Which variable; by default the first of `ensemble`.
    time
        Position along time.
    member
        Position along member of the one that is shown.
    reference_label
        What `reference` is, for the titles of the panels: 'background', 'truth'.
    title
        Of the figure; by default the long name of the variable and the time.

    Returns
    -------
    matplotlib.figure.Figure
        With six maps and three colour bars, which name the units.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    OptionError
        If `ensemble` has no member dimension or no such variable.
    GridError
        If the grids differ.

    Examples
    --------
    >>> import xgenda
    >>> from xgenda.plotting import plot_analysis
    >>> z = xgenda.tutorial.open_dataset("z500-ensemble")
    >>> figure = plot_analysis(z.isel(member=0), z.isel(member=slice(1, None)), reference_label="member 1")  # doctest: +SKIP
    """
    try:
        from matplotlib import pyplot
    except ImportError as problem:
        raise missing_dependency("matplotlib", "plot", "Drawing maps") from problem
    ensemble, reference = metadata.as_dataset(ensemble, "ensemble"), metadata.as_dataset(reference, "reference")
    state = states.enter(ensemble, "ensemble")
    ensemble, layout = state.ds, state.layout
    reference = states.on_grid_of(state, reference, "reference", "ensemble")
    if layout.member is None:
        raise OptionError("ensemble has no member dimension; a single field is drawn with ds['name'].plot().")
    names = metadata.data_variables(ensemble, layout)
    name = check_choice("variable", names[0] if variable is None and names else variable, names)
    size = ensemble.sizes[layout.member]
    if not 0 <= member < size:
        raise OptionError(f"member={member} is not accepted; the ensemble has {size} members, so choose one of 0 to {size - 1}.")
    instant = None
    if layout.time is not None and layout.time in ensemble[name].dims:
        count = ensemble.sizes[layout.time]
        if not 0 <= time < count:
            raise OptionError(f"time={time} is not accepted; the ensemble has {count} times, so choose one of 0 to {count - 1}.")
        instant = ensemble[layout.time].values[time]
    members = _fields(ensemble, name, layout, time)
    given = _fields(reference, metadata.match_variable(reference, name, None, "reference"), layout, time)
    mean, single = members.mean(0), members[member]
    spread = members.std(0, ddof=1) if size > 1 else np.zeros_like(mean)
    longitude, latitude = _axes(state)
    points = None if obs is None else _points(obs, name, ensemble, layout, instant, longitude)

    shown = [given[0], mean, single] + ([points[2]] if points is not None else [])
    low, high = (float(f(np.concatenate([a.ravel() for a in shown]))) for f in (np.nanmin, np.nanmax))
    value = {"cmap": VALUES, "vmin": low, "vmax": high}
    attrs = ensemble[name].attrs
    units = f"[{attrs['units']}]" if "units" in attrs else ""
    number = ensemble[layout.member].values[member] if layout.member in ensemble.coords else member
    seen = "" if points is None else f" and {len(points[2])} observation" + "s" * (len(points[2]) > 1)
    step, wander = mean - given[0], single - mean
    largest = float(np.nanmax(np.abs([step, wander]))) or 1.0
    difference = {"cmap": DIFFERENCES, "vmin": -largest, "vmax": largest}
    panels = [
        (reference_label + seen, given[0], value),
        ("ensemble mean", mean, value),
        (f"member {number}", single, value),
        ("spread (standard deviation)", spread, {"cmap": SPREADS, "vmin": 0.0, "vmax": float(np.nanmax(spread)) or 1.0}),
        (f"mean minus {reference_label}", step, difference),
        (f"member {number} minus mean", wander, difference),
    ]
    stretch = 1.0 / np.cos(np.radians(np.clip(latitude.mean(), -70.0, 70.0)))
    height = WIDTH * min(1.2, max(0.45, stretch * np.ptp(latitude) / max(np.ptp(longitude), 1e-9))) + 0.3
    figure, grid = pyplot.subplots(
        2, 3, figsize=(3 * WIDTH, 2 * height + 1.9), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    images = []
    for k, (ax, (label, field, colours)) in enumerate(zip(grid.ravel(), panels, strict=True)):
        if isinstance(state.grid, Grid):
            images.append(ax.pcolormesh(longitude, latitude, field, shading="nearest", rasterized=True, **colours))
        else:  # a dot for each cell: whatever the grid does at its seams and poles
            dot = min(60.0, max(1.0, 6e4 / field.size))
            images.append(ax.scatter(longitude, latitude, c=field.ravel(), s=dot, linewidths=0, rasterized=True, **colours))
        if k == 0 and points is not None:
            area = min(36.0, max(7.0, 4000.0 / len(points[2])))
            ax.scatter(points[1], points[0], c=points[2], s=area, edgecolors="black", linewidths=0.05 * area**0.5, **colours)
        ax.set(title=label, aspect=stretch)
        ax.set_xlabel("longitude [°E]" if k >= 3 else "")
        ax.set_ylabel("latitude [°N]" if k % 3 == 0 else "")
    long_name = f"{name} {units}".strip()
    for image, below, label in (
        (images[0], grid[0, :], long_name),
        (images[3], grid[1, 0], f"standard deviation of {long_name}"),
        (images[4], grid[1, 1:], f"difference of {long_name}"),
    ):
        wide = 3 if below is not grid[1, 0] else 1
        figure.colorbar(image, ax=below, orientation="horizontal", shrink=0.6 if wide > 1 else 0.9, aspect=25 * wide, label=label)
    if title is None:
        title = str(attrs.get("long_name") or attrs.get("standard_name") or name) + _stamp(instant)
    figure.suptitle(title)
    drawn: Figure = figure
    return drawn


def _fields(ds: xr.Dataset, name: str, layout: metadata.Layout, time: int) -> np.ndarray:
    """Return one time, shape (members, latitude, longitude), as stored along latitude and longitude."""
    array = ds[name]
    if layout.time is not None and layout.time in array.dims:
        array = array.isel({layout.time: time})
    if layout.member not in array.dims:
        array = array.expand_dims(str(layout.member))
    for dim in layout.dims:
        if dim not in array.dims:
            raise OptionError(f"reference[{name!r}] has dimensions {array.dims} and lacks {dim!r}.")
    return np.asarray(array.transpose(layout.member, *layout.dims).values, dtype=float)


def _axes(state: State) -> tuple[np.ndarray, np.ndarray]:
    """Return longitude and latitude: axes of a rectilinear grid as the user has them, else of every cell."""
    if isinstance(state.grid, Grid):
        longitude = np.asarray(state.ds[state.layout.longitude].values, dtype=float)
        if longitude.min() >= 180.0:
            longitude = longitude - 360.0
        return longitude, np.asarray(state.ds[state.layout.latitude].values, dtype=float)
    latitude, longitude = state.grid.points()
    middle = np.degrees(np.angle(np.exp(1j * np.radians(longitude)).mean()))  # a region across the date line stays in one piece
    around = wrapped(longitude - middle)
    return (wrapped(longitude) if np.ptp(around) > 270.0 else middle + around), latitude


def _points(
    obs: xr.Dataset | pd.DataFrame, name: str, ds: xr.Dataset, layout: metadata.Layout, instant: Any, axis: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return latitude, longitude (in the convention of the axes) and value of the observations near `instant`."""
    table = obs if isinstance(obs, xr.Dataset) else xr.Dataset.from_dataframe(obs)
    found = {k: metadata.find_coordinate(table, k, n) for k, n in (
        ("latitude", metadata.LATITUDE_NAMES), ("longitude", metadata.LONGITUDE_NAMES), ("time", metadata.TIME_NAMES),
    )}  # fmt: skip
    if found["latitude"] is None or found["longitude"] is None:
        raise OptionError("obs needs the columns latitude and longitude, one row per observation.")
    column = metadata.match_variable(table, name, ds[name].attrs.get("standard_name"), "obs")
    value = np.asarray(metadata.convert_units(table[column], ds[name].attrs.get("units")).values, dtype=float)
    latitude, longitude = (np.asarray(table[found[k]].values, dtype=float) for k in ("latitude", "longitude"))
    if value.ndim != 1 or latitude.shape != value.shape or longitude.shape != value.shape:
        raise OptionError(f"obs[{column!r}] has dimensions {table[column].dims}; a table along one dimension is needed.")
    keep = np.isfinite(value)
    if instant is not None and found["time"] is not None and table[found["time"]].shape == value.shape:
        nearest = ds.indexes[layout.time].get_indexer(table.indexes.get(found["time"], table[found["time"]].values), "nearest")
        keep &= ds[layout.time].values[nearest] == instant
    middle = (axis.min() + axis.max()) / 2
    longitude = wrapped(longitude - middle) + middle
    return (latitude[keep], longitude[keep], value[keep]) if keep.any() else None


def _stamp(instant: Any) -> str:
    if instant is None:
        return ""
    if isinstance(instant, np.datetime64):
        return f", {np.datetime_as_string(instant, unit='m').replace('T', ' ')} UTC"
    return f", {instant.strftime('%Y-%m-%d')}"

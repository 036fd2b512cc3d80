"""Maps and videos of ensembles with plain matplotlib: no projection library, no coastlines, nothing to download."""

from __future__ import annotations

import math
import numbers
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata, states
from xgenda.errors import MissingDependencyError, OptionError, StateError, check_choice, check_count, missing_dependency
from xgenda.files import aside, check_output
from xgenda.formatting import progress_bar
from xgenda.grids import Grid
from xgenda.spherical import wrapped
from xgenda.states import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALUES, DIFFERENCES, SPREADS = "viridis", "RdBu_r", "YlOrBr"
WIDTH = 4.4  # inches of one panel
PANELS = 4  # of a video, where nobody says how many
VIDEOS = (".gif", ".mp4")
BOTH_WAYS = 0.5  # values that go this far below zero, as a share of how far they go above, or the other way round, have zero in the middle


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
    stretch, height = _shape(longitude, latitude)
    figure, grid = pyplot.subplots(
        2, 3, figsize=(3 * WIDTH, 2 * height + 1.9), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    images = []
    for k, (ax, (label, field, colours)) in enumerate(zip(grid.ravel(), panels, strict=True)):
        images.append(_map(ax, state, longitude, latitude, field, colours))
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


def animate(
    ds: xr.Dataset | xr.DataArray,
    path: str | os.PathLike[str],
    *,
    variable: str | None = None,
    members: int | Sequence[int] | None = None,
    limits: tuple[float, float] | None = None,
    colours: str | None = None,
    fps: float = 6.0,
    dpi: float = 80.0,
    title: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write a video of a series: a frame for each time, a panel for each member, one colour scale for all.

    Parameters
    ----------
    ds
        With a dimension of time, and where there are any one of members, such as a trajectory of `xgenda.assimilate`. Of chunked data the frames
        are read one after the other, after a pass over all of them for the colour scale unless `limits` say it.
    path
        Ends with '.gif', or with '.mp4', which needs the program ffmpeg. It is written aside and then renamed.
    variable
        Which variable; by default the first.
    members
        How many of the first ones, or the positions of those to show; by default the first four.
    limits
        Lowest and highest value of the colour scale, in the units of the variable; by default those of what is shown.
    colours
        Name of a colour map of matplotlib; by default one that fits values to one side of zero or to both.
    fps
        Frames a second; a gif has steps of a hundredth of a second.
    dpi
        Dots per inch; a panel is about 4.4 inches wide.
    title
        Before the time; by default the long name of the variable.
    overwrite
        Whether a file of this name is replaced.
    progress
        Whether a bar is shown; by default in terminals and notebooks.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    MissingDependencyError
        If matplotlib, or ffmpeg for '.mp4', is not installed.
    OptionError
        If `ds` has no dimension of time or no such variable, or another argument is out of its range.
    StateError
        If no value is finite.
    OutputExistsError
        If there is a file of this name.

    Examples
    --------
    >>> import xgenda
    >>> from xgenda.plotting import animate
    >>> run = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=slice(0, 12))
    >>> animate(run, "run.gif")  # doctest: +SKIP
    """
    try:
        import matplotlib
        from matplotlib import animation, pyplot
    except ImportError as problem:
        raise missing_dependency("matplotlib", "plot", "Drawing videos") from problem
    kind = Path(path).suffix.lower()
    if kind not in VIDEOS:
        raise OptionError(f"path={str(path)!r} is not accepted; it must end with '.gif' or '.mp4': animate(ds, 'run.gif')")
    for argument, value in (("fps", fps), ("dpi", dpi)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
            raise OptionError(f"{argument}={value!r} is not accepted; it must be a positive number, for example {argument}=10.")
    if colours is not None and colours not in matplotlib.colormaps:
        raise OptionError(
            f"colours={colours!r} is no colour map of matplotlib; take colours='viridis', or one of matplotlib.colormaps."
        )
    target = check_output(path, "animate", overwrite=overwrite)
    if kind == ".mp4" and shutil.which(str(matplotlib.rcParams["animation.ffmpeg_path"])) is None:
        raise MissingDependencyError(
            "Writing mp4 needs the program ffmpeg, which is not found. Install it with: conda install -c conda-forge ffmpeg (or apt install "
            f"ffmpeg, brew install ffmpeg); or write a gif, which needs nothing: animate(ds, {str(target.with_suffix('.gif'))!r})"
        )
    state = states.enter(metadata.as_dataset(ds), "ds")
    whole, layout = state.ds, state.layout
    names = metadata.data_variables(whole, layout)
    name = check_choice("variable", names[0] if variable is None and names else variable, names)
    if layout.time is None or layout.time not in whole[name].dims or not whole.sizes[layout.time]:
        raise OptionError(
            f"ds[{name!r}] has no times to show one after the other; a single field is drawn with ds[{name!r}].plot()."
        )
    panels = {"": whole[[name]]}
    if layout.member is not None and layout.member in whole[name].dims:
        chosen = _members(members, whole.sizes[layout.member])
        numbers_of = whole[layout.member].values if layout.member in whole.coords else np.arange(whole.sizes[layout.member])
        panels = {f"member {numbers_of[m]}": whole[[name]].isel({layout.member: [m]}) for m in chosen}
    elif members is not None:
        raise OptionError(f"members={members!r} has no effect, since ds[{name!r}] has no dimension of members. Leave it out.")
    low, high = _limits(limits, list(panels.values()), name)
    if colours is None:
        both = low < 0 < high and min(-low, high) >= BOTH_WAYS * max(-low, high)
        colours = DIFFERENCES if both else VALUES
        if both and limits is None:
            low, high = -max(-low, high), max(-low, high)
    longitude, latitude = _axes(state)
    stretch, height = _shape(longitude, latitude)
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(columns * WIDTH, rows * height + 1.2),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    attrs, shown = whole[name].attrs, np.full(_fields(next(iter(panels.values())), name, layout, 0)[0].shape, np.nan)
    label = title if title is not None else str(attrs.get("long_name") or attrs.get("standard_name") or name)
    times = whole[layout.time].values
    images = []
    for k, ax in enumerate(grid.ravel()):
        if k >= len(panels):
            ax.set_axis_off()
            continue
        images.append(_map(ax, state, longitude, latitude, shown, {"cmap": colours, "vmin": low, "vmax": high}))
        ax.set(title=list(panels)[k], aspect=stretch)
        lowest = k + columns >= len(panels)
        ax.tick_params(labelbottom=lowest)
        ax.set_xlabel("longitude [°E]" if lowest else "")
        ax.set_ylabel("latitude [°N]" if k % columns == 0 else "")
    units = f"[{attrs['units']}]" if "units" in attrs else ""
    figure.colorbar(images[0], ax=grid, orientation="horizontal", shrink=0.7, aspect=30, label=f"{name} {units}".strip())
    heading = figure.suptitle(label + _stamp(times[0]))
    figure.canvas.draw()
    figure.set_layout_engine("none")  # or the panels move as titles change
    writer = animation.PillowWriter if kind == ".gif" else animation.FFMpegWriter
    try:
        with (
            aside(target, suffix=kind) as partial,
            progress_bar(len(times), progress, "frames") as advance,
            (video := writer(fps=fps)).saving(figure, str(partial), dpi),  # type: ignore[arg-type]
        ):
            for t in range(len(times)):
                for image, part in zip(images, panels.values(), strict=True):
                    image.set_array(_fields(part, name, layout, t)[0].ravel())
                heading.set_text(label + _stamp(times[t]))
                video.grab_frame()
                advance(1)
    finally:
        pyplot.close(figure)
    return target


def _members(asked: Any, size: int) -> list[int]:
    """Return the positions of the members to show."""
    if asked is None:
        return list(range(min(PANELS, size)))
    if isinstance(asked, numbers.Integral):
        asked = range(min(check_count("members", asked), size))
    given = list(asked) if isinstance(asked, (list, tuple, range, np.ndarray)) else None
    if not given or any(isinstance(m, bool) or not isinstance(m, numbers.Integral) or not 0 <= int(m) < size for m in given):
        raise OptionError(f"members={asked!r} is not accepted; give how many, or positions of 0 to {size - 1}: members=[0, 1]")
    return [int(m) for m in given]


def _limits(asked: Any, parts: Sequence[xr.Dataset], name: str) -> tuple[float, float]:
    """Return the ends of the colour scale."""
    if asked is not None:
        numeric = isinstance(asked, (list, tuple)) and len(asked) == 2 and all(isinstance(v, numbers.Real) for v in asked)
        if not numeric or not -math.inf < float(asked[0]) < float(asked[1]) < math.inf:
            raise OptionError(f"limits={asked!r} is not accepted; give the lowest and the highest value: limits=(-2.0, 2.0)")
        return float(asked[0]), float(asked[1])
    ends = [f for p in parts for f in (p[name].min(), p[name].max())]
    found = xr.Dataset({str(i): ((), end.data) for i, end in enumerate(ends)}).compute()  # of chunked data in one pass
    values = [float(found[str(i)]) for i in range(len(ends))]
    low, high = min(values), max(values)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise StateError(
            f"ds[{name!r}] has no finite values, or infinite ones, so that there is nothing to draw; give limits=(low, high)."
        )
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _shape(longitude: np.ndarray, latitude: np.ndarray) -> tuple[float, float]:
    """Return how much longer a degree of latitude is than one of longitude, and the height of a panel in inches."""
    stretch = 1.0 / np.cos(np.radians(np.clip(latitude.mean(), -70.0, 70.0)))
    return stretch, WIDTH * min(1.2, max(0.45, stretch * np.ptp(latitude) / max(np.ptp(longitude), 1e-9))) + 0.3


def _map(ax: Any, state: State, longitude: np.ndarray, latitude: np.ndarray, field: np.ndarray, colours: dict[str, Any]) -> Any:
    """Draw one field."""
    if isinstance(state.grid, Grid):
        return ax.pcolormesh(longitude, latitude, field, shading="nearest", rasterized=True, **colours)
    dot = min(60.0, max(1.0, 6e4 / field.size))  # for each cell: whatever the grid does at its seams and poles
    return ax.scatter(longitude, latitude, c=field.ravel(), s=dot, linewidths=0, rasterized=True, **colours)


def _fields(ds: xr.Dataset, name: str, layout: metadata.Layout, time: int) -> np.ndarray:
    """Return one time, shape (members, latitude, longitude), as stored along latitude and longitude."""
    array = ds[name]
    if layout.time is not None and layout.time in array.dims:
        array = array.isel({layout.time: time})
    member = layout.member or "member"
    if member not in array.dims:
        array = array.expand_dims(str(member))
    for dim in layout.dims:
        if dim not in array.dims:
            raise OptionError(f"reference[{name!r}] has dimensions {array.dims} and lacks {dim!r}.")
    return np.asarray(array.transpose(member, *layout.dims).values, dtype=float)


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

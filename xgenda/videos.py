"""Videos of series with plain matplotlib."""

from __future__ import annotations

import math
import numbers
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata, states
from xgenda.drawing import DIFFERENCES, VALUES, WIDTH, axes_of, draw_map, fields_at, proportions, stamp
from xgenda.errors import MissingDependencyError, OptionError, StateError, check_choice, check_count, missing_dependency
from xgenda.files import aside, check_output
from xgenda.formatting import progress_bar

PANELS = 4  # of a video, where nobody says how many
VIDEOS = (".gif", ".mp4")
BOTH_WAYS = 0.5  # values that go this far below zero, as a share of how far they go above, or the other way round, have zero in the middle


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
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"path is a {type(path).__name__}; give the fields first, then a name: animate(ds, 'run.gif')")
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
    longitude, latitude = axes_of(state)
    stretch, height = proportions(longitude, latitude)
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
    attrs, shown = whole[name].attrs, np.full([whole.sizes[d] for d in layout.dims], np.nan)
    label = title if title is not None else str(attrs.get("long_name") or attrs.get("standard_name") or name)
    times = whole[layout.time].values
    images = []
    for k, ax in enumerate(grid.ravel()):
        if k >= len(panels):
            ax.set_axis_off()
            continue
        images.append(draw_map(ax, state, longitude, latitude, shown, {"cmap": colours, "vmin": low, "vmax": high}))
        ax.set(title=list(panels)[k], aspect=stretch)
        lowest = k + columns >= len(panels)
        ax.tick_params(labelbottom=lowest)
        ax.set_xlabel("longitude [°E]" if lowest else "")
        ax.set_ylabel("latitude [°N]" if k % columns == 0 else "")
    units = f"[{attrs['units']}]" if "units" in attrs else ""
    figure.colorbar(images[0], ax=grid, orientation="horizontal", shrink=0.7, aspect=30, label=f"{name} {units}".strip())
    heading = figure.suptitle(label + stamp(times[0]))
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
                    image.set_array(fields_at(part, name, layout, t)[0].ravel())
                heading.set_text(label + stamp(times[t]))
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

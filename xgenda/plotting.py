"""Maps and videos of ensembles with plain matplotlib: no projection library, no coastlines, nothing to download."""

from __future__ import annotations

import numbers
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata, states
from xgenda.drawing import (
    DIFFERENCES,
    SPREADS,
    VALUES,
    WIDTH,
    axes_of,
    draw_map,
    fields_at,
    hatch,
    proportions,
    pyplot_module,
    stamp,
)
from xgenda.errors import OptionError, check_choice
from xgenda.observations.shapes import as_xarray, decoded
from xgenda.spherical import wrapped
from xgenda.states import State
from xgenda.videos import animate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from xgenda.models.generative import GenerativeModel

__all__ = ["animate", "plot_analysis", "plot_reconstruction"]
THRESHOLD = 0.33  # of the climate's standard deviation, beyond which observations have left most of it


def plot_analysis(
    reference: xr.Dataset | xr.DataArray,
    ensemble: xr.Dataset | xr.DataArray,
    obs: xr.Dataset | pd.DataFrame | None = None,
    *,
    variable: str | None = None,
    time: int = 0,
    member: int = 0,
    reference_label: str = "background",
    climatology: xr.Dataset | xr.DataArray | None = None,
    threshold: float = THRESHOLD,
    title: str | None = None,
) -> Figure:
    """Draw an ensemble beside what it is compared with: the background it started from, or the truth.

    The upper row shows the reference (with the observed values as points on the same colours), the ensemble mean and one member
    on one colour scale; the lower row the spread, the mean minus the reference, and that member minus the mean.

    Parameters
    ----------
    reference
        The background or the truth, on the grid of `ensemble`, in any units of its variable. Of one with times that of the time shown.
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
    climatology
        Standard deviation of the variable in its climate, on the grid of `ensemble`, in any units of it, such as ``series.std("time")``; with a
        dimension ``dayofyear``, as of ``series.groupby("time.dayofyear").std()``, that of the day shown. Mean and spread are hatched where the
        observations leave the analysis uncertain: where the spread is more than `threshold` of it.
    threshold
        0.33 is that of the published maps of long records with few stations (Brohan 2022).
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
        If `ensemble` has no member dimension or no such variable, `threshold` is no share, or `reference` or `climatology` lacks the time or
        the day shown.
    GridError
        If the grids differ.
    UnitsError
        If `reference` or `climatology` has units that are not those of a variable of this kind.

    Examples
    --------
    >>> import xgenda
    >>> from xgenda.plotting import plot_analysis
    >>> z = xgenda.tutorial.open_dataset("z500-ensemble")
    >>> figure = plot_analysis(z.isel(member=0), z.isel(member=slice(1, None)), reference_label="member 1")  # doctest: +SKIP
    """
    pyplot = pyplot_module()
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not 0 < threshold <= 1:
        raise OptionError(
            f"threshold={threshold!r} is not accepted; it must be a share between 0 and 1, for example threshold=0.33."
        )
    if climatology is None and threshold != THRESHOLD:
        raise OptionError(f"threshold={threshold!r} has no effect without climatology; give it too, or leave threshold out.")
    ensemble, reference = metadata.as_dataset(ensemble, "ensemble"), metadata.as_dataset(reference, "reference")
    state = states.enter(ensemble, "ensemble")
    ensemble, layout = state.ds, state.layout
    reference = states.on_grid_of(state, reference, "reference", "ensemble")
    if layout.member is None:
        raise OptionError("ensemble has no member dimension; a single field is drawn with ds['name'].plot().")
    names = metadata.data_variables(ensemble, layout)
    name = check_choice("variable", names[0] if variable is None and names else variable, names)
    size = ensemble.sizes[layout.member]
    _check_number("member", member, size, "the ensemble")
    instant = None
    if layout.time is not None and layout.time in ensemble[name].dims:
        count = ensemble.sizes[layout.time]
        _check_number("time", time, count, "the ensemble")
        instant = ensemble[layout.time].values[time]
    usual = None if climatology is None else _usual(climatology, state, name, instant)
    members = fields_at(ensemble, name, layout, time)
    given = _compared(reference, state, name, instant, time)
    mean, single = members.mean(0), members[member]
    spread = members.std(0, ddof=1) if size > 1 else np.zeros_like(mean)
    longitude, latitude = axes_of(state)
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
        (
            "spread (standard deviation)" if usual is None else f"spread, hatched above {threshold:g} of the climate's",
            spread,
            {"cmap": SPREADS, "vmin": 0.0, "vmax": float(np.nanmax(spread)) or 1.0},
        ),
        (f"mean minus {reference_label}", step, difference),
        (f"member {number} minus mean", wander, difference),
    ]
    stretch, height = proportions(longitude, latitude)
    figure, grid = pyplot.subplots(
        2, 3, figsize=(3 * WIDTH, 2 * height + 1.9), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    images = []
    for k, (ax, (label, field, colours)) in enumerate(zip(grid.ravel(), panels, strict=True)):
        images.append(draw_map(ax, state, longitude, latitude, field, colours))
        if usual is not None and k in (1, 3):
            hatch(ax, state, longitude, latitude, spread > threshold * usual)
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
        title = str(attrs.get("long_name") or attrs.get("standard_name") or name) + stamp(instant)
    figure.suptitle(title)
    drawn: Figure = figure
    return drawn


def plot_reconstruction(
    model: GenerativeModel | str | os.PathLike[str],
    ds: xr.Dataset | xr.DataArray,
    *,
    variable: str | None = None,
    time: int = 0,
    title: str | None = None,
) -> Figure:
    """Draw what is left of a field in the latent space of an autoencoder: the field, its reconstruction, their difference, and a scatter.

    The published validation of such models (Brohan 2022). Fields that the training has not seen tell how good the decoder is at best: no search
    of the latent space comes nearer to a state than what it can represent.

    Parameters
    ----------
    model
        A model of ``train(task="autoencoder")``, its name or path.
    ds
        Fields of its variables on its grid; cells may be NaN, and are not drawn then.
    variable
        Which variable; by default the first of the model.
    time
        Position along time of the field on the maps; the scatter is of all times of `ds`.
    title
        Of the figure; by default the long name of the variable and the time.

    Returns
    -------
    matplotlib.figure.Figure
        With three maps and a scatter of reconstructed against original values, whose correlation, bias and root mean square difference (in the
        units of the variable, cells weighted alike) it names.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    OptionError
        If `model` is no autoencoder, or there is no such variable or time.
    GridError
        If `ds` is on another grid.

    Examples
    --------
    >>> import xgenda
    >>> from xgenda.plotting import plot_reconstruction
    >>> ds = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=slice(200, 240))
    >>> figure = plot_reconstruction("t2m-north-america-vae", ds)  # doctest: +SKIP
    """
    pyplot = pyplot_module()
    from xgenda.downscaling import downscale  # what only draws does not wait for torch
    from xgenda.models.conversions import ConversionModel, reconstructing
    from xgenda.models.generative import GenerativeModel
    from xgenda.models.latents import LatentModel
    from xgenda.models.loading import load_model

    chosen = model if isinstance(model, GenerativeModel) else load_model(model)
    if isinstance(chosen, ConversionModel):
        raise OptionError(
            f"model={chosen.spec.name!r} makes one kind of fields of another, and reconstructs none; compare with the truth: "
            f"ds.genda.downscale(model=model).genda.verify(truth)"
        )
    if not isinstance(chosen, LatentModel):
        raise OptionError(
            f"model={chosen.spec.name!r} has no encoder to reconstruct fields by; train one that has: xgenda.train(ds, task='autoencoder')"
        )
    state = states.enter(metadata.as_dataset(ds))
    layout = state.layout
    found = downscale(ds, model=reconstructing(chosen), stage="mean", target=ds, progress=False)
    name = check_choice("variable", variable or next(iter(found.data_vars)), [str(n) for n in found.data_vars])
    count = 1 if layout.time is None or layout.time not in state.ds[name].dims else state.ds.sizes[layout.time]
    _check_number("time", time, count, "ds")
    instant = None if layout.time is None else np.atleast_1d(state.ds[layout.time].values)[time]
    original, again = ([fields_at(of, name, layout, t)[0] for t in range(count)] for of in (state.ds, states.enter(found).ds))
    given, decoded = np.stack(original), np.stack(again)
    decoded = np.where(np.isfinite(given), decoded, np.nan)
    longitude, latitude = axes_of(state)
    low, high = (float(f([given[time], decoded[time]])) for f in (np.nanmin, np.nanmax))
    difference = decoded[time] - given[time]
    largest = float(np.nanmax(np.abs(difference))) or 1.0
    value = {"cmap": VALUES, "vmin": low, "vmax": high}
    panels = [
        ("original", given[time], value),
        ("reconstruction", decoded[time], value),
        ("reconstruction minus original", difference, {"cmap": DIFFERENCES, "vmin": -largest, "vmax": largest}),
    ]
    stretch, height = proportions(longitude, latitude)
    figure, axes = pyplot.subplots(2, 2, figsize=(2 * WIDTH + 1, 2 * height + 1.9), squeeze=False, layout="constrained")
    attrs = state.ds[name].attrs
    long_name = f"{name} [{attrs['units']}]" if "units" in attrs else name
    for k, (ax, (label, field, colours)) in enumerate(zip(axes.ravel(), panels, strict=False)):
        image = draw_map(ax, state, longitude, latitude, field, colours)
        ax.set(title=label, aspect=stretch, xlabel="longitude [°E]", ylabel="latitude [°N]")
        figure.colorbar(
            image, ax=ax, orientation="horizontal", aspect=30, label=long_name if k < 2 else f"difference of {long_name}"
        )
    shown = np.isfinite(given) & np.isfinite(decoded)
    x, y = given[shown], decoded[shown]
    ax = axes[1, 1]
    ax.hexbin(x, y, gridsize=60, bins="log", cmap="Greys", mincnt=1, linewidths=0)
    ax.axline((float(x.mean()), float(x.mean())), slope=1.0, color="tab:red", linewidth=1.0)
    unit = f" {attrs['units']}" if "units" in attrs else ""
    correlation = float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else np.nan
    rmse, bias = float(np.sqrt(((y - x) ** 2).mean())), float((y - x).mean())
    ax.set(
        title=f"{count} time" + "s" * (count > 1) + f": correlation {correlation:.4f}\nRMSD {rmse:.3g}{unit}, bias {bias:.2g}{unit}",
        xlabel=f"original {long_name}", ylabel=f"reconstruction {long_name}", aspect="equal", adjustable="box",
    )  # fmt: skip
    figure.suptitle(title or str(attrs.get("long_name") or attrs.get("standard_name") or name) + stamp(instant))
    drawn: Figure = figure
    return drawn


def _check_number(argument: str, found: object, count: int, owner: str) -> None:
    """Refuse what is not the number of a member or time of an owner that has so many of them."""
    if not isinstance(found, numbers.Integral) or not 0 <= int(found) < count:
        raise OptionError(
            f"{argument}={found!r} is not accepted; {owner} has {count} {argument}s, so choose one of 0 to {count - 1}."
        )


def _compared(reference: xr.Dataset, state: State, name: str, instant: Any, time: int) -> np.ndarray:
    """Return the reference at the time shown, in the units of the ensemble, shape (members, latitude, longitude)."""
    found = metadata.match_variable(reference, name, state.ds[name].attrs.get("standard_name"), "reference")
    dim = state.layout.time
    if dim in reference[found].dims and dim in reference.coords and instant is not None:
        shown = metadata.time_labels(xr.DataArray([instant], dims="time", name="time"))[0]
        rows = np.flatnonzero(metadata.time_labels(reference[dim]) == shown)
        if not rows.size:
            raise OptionError(
                f"reference has no time {shown}, which is shown; give one that has it, or select a single one: reference.isel({dim}=0, drop=True)"
            )
        time = int(rows[0])
    array = metadata.convert_units(reference[found], state.ds[name].attrs.get("units"))
    return fields_at(reference.assign({found: array}), found, state.layout, time)


def _usual(climatology: xr.Dataset | xr.DataArray, state: State, name: str, instant: Any) -> np.ndarray:
    """Return the standard deviation of the climate, on the day shown where it has days, as stored along latitude and longitude."""
    given = metadata.as_dataset(climatology, "climatology")
    if "dayofyear" in given.dims:
        if instant is None:
            raise OptionError("climatology has days, and ensemble no time; select one: climatology.sel(dayofyear=1)")
        day = int(xr.DataArray([instant], dims="time").dt.dayofyear[0])
        if day not in given["dayofyear"].values:
            raise OptionError(
                f"climatology has no day {day}, which is shown; give one of all days, or one without the dimension dayofyear."
            )
        given = given.sel(dayofyear=day, drop=True)
    given = states.on_grid_of(state, given, "climatology", "ensemble")
    array = given[metadata.match_variable(given, name, None, "climatology")]
    if set(array.dims) != set(state.layout.dims):
        raise OptionError(
            f"climatology[{name!r}] has dimensions {array.dims}; a field of standard deviations is needed, or one per dayofyear."
        )
    scale = metadata.unit_factors_of(array, metadata.units_of(state.ds[name]))[0]  # a standard deviation has no offset
    return scale * np.asarray(array.transpose(*state.layout.dims).values, dtype=float)


def _points(
    obs: xr.Dataset | pd.DataFrame, name: str, ds: xr.Dataset, layout: metadata.Layout, instant: Any, axis: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return latitude, longitude (in the convention of the axes) and value of the observations near `instant`."""
    table = as_xarray(obs, "obs")
    found = {k: metadata.find_coordinate(table, k, n) for k, n in (
        ("latitude", metadata.LATITUDE_NAMES), ("longitude", metadata.LONGITUDE_NAMES), ("time", metadata.TIME_NAMES),
    )}  # fmt: skip
    if found["latitude"] is None or found["longitude"] is None:
        raise OptionError("obs needs the columns latitude and longitude, one row per observation.")
    column = metadata.match_variable(table, name, ds[name].attrs.get("standard_name"), "obs")
    array = metadata.convert_units(table[column], ds[name].attrs.get("units"))

    def along(coordinate: xr.DataArray) -> np.ndarray:
        """Return a coordinate at every value, of a table, a swath or a grid."""
        return np.asarray(coordinate.broadcast_like(array).transpose(*array.dims).values).ravel()

    time = None if instant is None or found["time"] is None else decoded(table[found["time"]], "obs")
    placed = {d for k in ("latitude", "longitude") for d in table[found[k]].dims} | set(() if time is None else time.dims)
    if strange := [d for d in array.dims if d not in placed]:
        raise OptionError(
            f"obs[{column!r}] is along {strange[0]!r} too, and would lie several times in each place; select one: obs.isel({strange[0]}=0)"
        )
    value = np.asarray(array.values, dtype=float).ravel()
    for k in ("latitude", "longitude"):
        if stray := [d for d in table[found[k]].dims if d not in array.dims]:
            raise OptionError(
                f"obs[{column!r}] has dimensions {array.dims}, and its {k} is along {stray[0]!r}; give each value a place."
            )
    latitude, longitude = (along(table[found[k]]).astype(float) for k in ("latitude", "longitude"))
    keep = np.isfinite(value)
    if time is not None and set(time.dims) <= set(array.dims):
        nearest = ds.indexes[layout.time].get_indexer(pd.Index(along(time)), "nearest")
        keep &= ds[layout.time].values[nearest] == instant
    middle = (axis.min() + axis.max()) / 2
    longitude = wrapped(longitude - middle) + middle
    return (latitude[keep], longitude[keep], value[keep]) if keep.any() else None

"""`verify`, `rank_histogram` and `power_spectrum`: an ensemble against a truth or against observations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import scipy.fft
import xarray as xr

from xgenda import metadata, states
from xgenda.curvilinear import PointSet
from xgenda.errors import GridError, OptionError
from xgenda.observations.containers import ErrorLike
from xgenda.observations.operators import locate_observations
from xgenda.observations.quality import Quality, QualityControl, count_codes
from xgenda.operators import AnyOperator
from xgenda.preparation import observed_state, prepare
from xgenda.states import State

#: Metric -> what to know about it; written to its attributes.
METRICS: dict[str, dict[str, str]] = {
    "rmse": {"long_name": "root mean square error of the ensemble mean", "orientation": "negative", "perfect": "0"},
    "mae": {"long_name": "mean absolute error of the ensemble mean", "orientation": "negative", "perfect": "0"},
    "bias": {"long_name": "ensemble mean minus truth", "perfect": "0"},
    "crps": {"long_name": "fair continuous ranked probability score", "orientation": "negative", "perfect": "0",
             "reference": "Ferro 2014, Q. J. R. Meteorol. Soc. 140, 1917-1923, eq. 6"},
    "spread": {"long_name": "root mean ensemble variance, times (M + 1) / M, with the observation error where given"},
    "spread_skill": {"long_name": "spread over rmse", "perfect": "1",
                     "reference": "Fortin et al. 2014, J. Hydrometeorol. 15, 1708-1713, eq. 15"},
    "chi2": {"long_name": "mean of squared error over predicted variance (M + 1) / M s^2 + r^2, of more than 3 members", "perfect": "1"},
}  # fmt: skip


def fair_crps(ensemble: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the fair CRPS of members along the first axis; the absolute error for a single one.

    Parameters
    ----------
    ensemble
        Shape (members, ...).
    truth
        Shape (...).

    Notes
    -----
    mean |x_i - y| - sum_ij |x_i - x_j| / (2 M (M - 1)); the double sum from the sorted members. Ferro 2014, eq. 6.
    """
    m = len(ensemble)
    error = np.abs(ensemble - truth).mean(0)
    if m < 2:
        return np.asarray(error)
    ranked = np.sort(ensemble, axis=0)
    weight = 2 * np.arange(1, m + 1) - m - 1
    spread = np.tensordot(weight, ranked, axes=(0, 0)) / (m * (m - 1))
    return np.asarray(error - spread)


def verify(
    ensemble: xr.Dataset | xr.DataArray,
    truth: Any,
    *,
    error: ErrorLike = None,
    dims: str | Sequence[str] | None = None,
    quality: QualityControl | None = None,
    lapse_rate: float | Mapping[str, float] | None = None,
    window: Any = None,
    representativeness: float | Mapping[str, float] | None = None,
    operators: Mapping[str, AnyOperator] | None = None,
) -> xr.Dataset:
    """Score an ensemble (or a single field) against a truth on its grid, or against observations.

    Parameters
    ----------
    ensemble
        With or without ``member``; read when called.
    truth
        A Dataset on the same grid and times; or observations in any form that `xgenda.assimilate` takes, to which the
        members are interpolated.
    error
        Standard deviation of the observation error: needed for observations that do not carry it. It enters spread and chi2, and
        is drawn nowhere: the CRPS is that of the state.
    dims
        Dimensions to average over; all by default, weighted by cell area, but for the ``stage`` of a cycle. For observations always all.
    quality, lapse_rate, window, representativeness, operators
        For observations, as in `xgenda.assimilate`. Those outside of the window, by default within half an hour of a time, are not scored:
        see the attribute `counts` of the result.

    Returns
    -------
    xarray.Dataset
        Each variable along ``metric``: rmse, mae, bias, crps (fair), spread, spread_skill, chi2. The ensemble scores are
        NaN for a single field, but crps, which is then the mean absolute error. chi2 is NaN for up to three members without an observation
        error: squared errors over so uncertain a variance have no mean. (With M members that are drawn as the truth is it tends to
        (M - 1) / (M - 3) instead of 1: 1.29 for 10, 1.15 for 16.) For observations the attribute `counts` says how many were
        scored ('used') and why others were not.

    Examples
    --------
    >>> import xgenda
    >>> z = xgenda.tutorial.open_dataset("z500-ensemble")
    >>> scores = z.isel(member=slice(1, None)).genda.verify(z.isel(member=0, drop=True))
    >>> 0.5 < float(scores.z.sel(metric="spread_skill")) < 2
    True
    """
    ds = metadata.as_dataset(ensemble, "ensemble")
    state = states.enter(ds, "ensemble")
    ds, layout = state.ds, state.layout
    gridded = False
    if isinstance(truth, (xr.Dataset, xr.DataArray)):
        reference = metadata.as_dataset(truth, "truth")
        gridded = set(layout.dims) - {states.SINGLE} <= set(reference.dims)
        if gridded and isinstance(state.grid, PointSet):  # the same points, or observations at others
            gridded = states.enter(reference, "truth").grid.same_as(state.grid)
    if not gridded:
        options = {
            "error": error, "window": window, "quality": quality, "representativeness": representativeness, "lapse_rate": lapse_rate,
            "operators": operators,
        }  # fmt: skip
        return _verify_at_points(state, truth, options)
    reference = states.on_grid_of(state, reference, "truth", "ensemble")
    area = None
    if not isinstance(state.grid, PointSet):
        area = xr.DataArray(state.orientation.from_model(state.grid.areas()), dims=layout.dims)
    out = {}
    for n, values, given in _matched(state, reference):
        over = _dimensions(dims, given, n)
        points = _point_scores(values, np.asarray(given.values, dtype=float), 0.0)
        fields = {k: xr.DataArray(v, dims=given.dims, coords=given.coords) for k, v in points.items()}
        out[n] = _aggregate(fields, area, over, len(values))
    return state.leave(_finish(out, {n: ds[n].attrs.get("units") for n in out}))


def _matched(state: State, reference: xr.Dataset) -> Iterator[tuple[str, np.ndarray, xr.DataArray]]:
    """Yield each common variable: its name, members (members, ...) and the truth in the same units and order."""
    ds, layout = state.ds, state.layout
    names = [n for n in metadata.data_variables(ds, layout) if n in reference]
    if not names:
        raise OptionError(
            f"truth has none of the variables {metadata.data_variables(ds, layout)}; it has {list(reference.data_vars)}."
        )
    for n in names:
        members = ds[n] if layout.member is not None else ds[n].expand_dims("member")
        given = metadata.convert_units(reference[n], ds[n].attrs.get("units"))
        try:
            members, given = xr.align(members, given, join="exact")
        except ValueError as problem:
            raise OptionError(
                f"truth[{n!r}] and the ensemble have different coordinates: {problem}. Select the common ones: "
                f"truth.sel(time=ensemble.time), or the other way round"
            ) from problem
        given = given.broadcast_like(members.isel({layout.member or "member": 0}, drop=True))
        order = (layout.member or "member", *given.dims)
        yield n, np.asarray(members.transpose(*order).values, dtype=float), given


def _dimensions(dims: str | Sequence[str] | None, array: xr.DataArray, name: str) -> list[str] | None:
    """Return the dimensions to average over, None for all."""
    if dims is None and "stage" in array.coords and set(array["stage"].values.ravel().tolist()) == {"background", "analysis"}:
        dims = [str(d) for d in array.dims if d != "stage"]  # of a cycle, whose mean says nothing
    over = None if dims is None else [dims] if isinstance(dims, str) else list(dims)
    strange = [d for d in over or () if d not in array.dims]
    if strange:
        raise OptionError(f"dims={strange[0]!r} is not averaged over; ensemble[{name!r}] has {', '.join(map(repr, array.dims))}.")
    return over


def rank_histogram(
    ensemble: xr.Dataset | xr.DataArray, truth: xr.Dataset | xr.DataArray, *, dims: str | Sequence[str] | None = None
) -> xr.Dataset:
    """Count how many members the truth exceeds, cell by cell.

    Where truth and members are draws of one distribution, all ranks are equally likely, and the histogram is flat. Too little spread fills
    the outermost ranks, a bias one of them. Neighbouring cells are not independent: the noise of the counts is that of far fewer.

    Parameters
    ----------
    ensemble
        With at least two members; read when called.
    truth
        On the same grid and times.
    dims
        Dimensions to count over; all by default.

    Returns
    -------
    xarray.Dataset
        Each variable along ``rank``, 0 to the number of members: a count. Cells without a value, in the truth or in a member, are not
        counted. A truth that equals members gets one of the ranks that this leaves open, at random, the same in every call.

    Raises
    ------
    GridError, OptionError

    References
    ----------
    Hamill, T. M. (2001), Interpretation of rank histograms for verifying ensemble forecasts, Mon. Wea. Rev. 129, 550-560.

    Examples
    --------
    >>> import xgenda
    >>> from xgenda.verification import rank_histogram
    >>> z = xgenda.tutorial.open_dataset("z500-ensemble")
    >>> counts = rank_histogram(z.isel(member=slice(1, 10)), z.isel(member=0, drop=True))
    >>> counts.z.sizes["rank"], int(counts.z.sum()) == 46 * 71
    (10, True)
    """
    state = states.enter(metadata.as_dataset(ensemble, "ensemble"), "ensemble")
    reference = states.on_grid_of(state, metadata.as_dataset(truth, "truth"), "truth", "ensemble")
    rng = np.random.default_rng(0)
    out = {}
    for n, values, given in _matched(state, reference):
        over, wanted = _dimensions(dims, given, n), np.asarray(given.values, dtype=float)
        if len(values) < 2:
            raise OptionError(f"ensemble[{n!r}] has one member; ranks need at least 2.")
        ties = (values == wanted).sum(0)
        found = (values < wanted).sum(0) + np.where(ties > 0, rng.integers(0, ties + 1), 0)
        found = np.where(np.isfinite(wanted) & np.isfinite(values).all(0), found, -1)
        ranks = xr.DataArray(found, dims=given.dims, coords=given.coords)
        counts = xr.concat([(ranks == r).sum(over) for r in range(len(values) + 1)], "rank")
        out[n] = counts.assign_coords(rank=np.arange(len(values) + 1)).assign_attrs(units="1", long_name="count")
    result = state.leave(xr.Dataset(out))
    result["rank"].attrs = {"long_name": "number of members below the truth", "units": "1"}
    return result


def power_spectrum(ds: xr.Dataset | xr.DataArray, *, periodic: bool | Literal["both"] | None = None) -> xr.Dataset:
    """Return the variance of fields by isotropic wavenumber.

    Fourier transform along axes that wrap; cosine transform along the others, which takes the field to be mirrored at its edges, so that
    a trend across the region does not fill all wavenumbers.

    Parameters
    ----------
    ds
        Fields on a grid of rows and columns, without NaN; read when called.
    periodic
        As in `xgenda.train`: whether the columns wrap (None: where the grid goes around the globe), or 'both' rows and columns.

    Returns
    -------
    xarray.Dataset
        Each variable along ``wavenumber``, in cycles per cell, in place of its horizontal dimensions. The sum over it is the variance over
        the cells, each counting alike. ``wavelength``, in cells, is a coordinate of it.

    Raises
    ------
    OptionError, GridError

    References
    ----------
    Denis, B., Cote, J. and Laprise, R. (2002), Spectral decomposition of two-dimensional atmospheric fields on limited-area domains using
    the discrete cosine transform (DCT), Mon. Wea. Rev. 130, 1812-1829.

    Examples
    --------
    >>> import xgenda
    >>> from xgenda.verification import power_spectrum
    >>> z = xgenda.tutorial.open_dataset("z500-ensemble").isel(member=[0])
    >>> power = power_spectrum(z).z
    >>> bool(abs(power.sum() / z.z.var() - 1) < 1e-6)
    True
    """
    if periodic is not None and periodic not in (True, False, "both"):
        raise OptionError(f"periodic={periodic!r} is not accepted; it must be True, False, 'both' or None.")
    state = states.enter(metadata.as_dataset(ds))
    if isinstance(state.grid, PointSet):
        raise GridError("ds has no rows and columns; a power spectrum needs a grid. Bring it to one: ds.genda.regrid(grid)")
    wraps = (periodic == "both", bool(getattr(state.grid, "periodic", False) if periodic is None else periodic))
    dims, plane = list(state.layout.dims), state.grid.plane
    along = [np.abs(np.fft.fftfreq(n)) if w else np.arange(n) / (2 * n) for n, w in zip(plane, wraps, strict=True)]
    step = max(1 / n if w else 1 / (2 * n) for n, w in zip(plane, wraps, strict=True))
    ring = np.maximum(np.round(np.hypot(along[0][:, None], along[1]) / step).astype(int), 1)
    ring[0, 0] = 0  # the mean
    count = int(ring.max())
    wavenumber = step * np.arange(1, count + 1)

    def binned(values: np.ndarray) -> np.ndarray:
        f = np.asarray(values, dtype=float)
        if not np.isfinite(f).all():
            raise OptionError("ds holds NaN; fill the gaps, or cut them off, before a transform of whole fields.")
        for axis, w in zip((-2, -1), wraps, strict=True):
            f = scipy.fft.fft(f, axis=axis, norm="ortho") if w else _cosine(f, axis)
        power = (np.abs(f) ** 2).reshape(*f.shape[:-2], -1) / (plane[0] * plane[1])
        return np.asarray(power @ (ring.ravel()[:, None] == np.arange(1, count + 1)))

    out = {}
    for n in metadata.data_variables(state.ds, state.layout):
        array = state.ds[n].transpose(..., *dims)
        units = array.attrs.get("units")
        power = xr.DataArray(
            binned(array.values), dims=(*array.dims[:-2], "wavenumber"),
            attrs={"long_name": f"variance of {n} by wavenumber"} | ({"units": f"({units})2"} if units else {}),
        )  # fmt: skip
        out[n] = power.assign_coords({k: c for k, c in array.coords.items() if not set(dims) & set(c.dims)})
    result = xr.Dataset(out).assign_coords(wavenumber=wavenumber, wavelength=("wavenumber", 1 / wavenumber))
    result["wavenumber"].attrs = {"long_name": "cycles per cell", "units": "1"}
    result["wavelength"].attrs = {"long_name": "cells per cycle", "units": "1"}
    return result


def _cosine(fields: np.ndarray, axis: int) -> np.ndarray:
    """Return the orthonormal cosine transform of real or complex fields."""
    out = scipy.fft.dct(fields.real, axis=axis, norm="ortho")
    if np.iscomplexobj(fields):
        out = out + 1j * scipy.fft.dct(fields.imag, axis=axis, norm="ortho")
    return np.asarray(out)


def _point_scores(members: np.ndarray, truth: np.ndarray, error: np.ndarray | float) -> dict[str, np.ndarray]:
    m = len(members)
    mean = members.mean(0)
    variance = members.var(0, ddof=1) * (m + 1) / m + np.asarray(error) ** 2 if m > 1 else np.full(truth.shape, np.nan)
    variance = np.where(np.isnan(truth), np.nan, variance)  # spread and skill are averaged over the same cells
    # where nothing is uncertain it says nothing, and over the variance of up to three members alone its expectation is infinite
    certain = (variance <= 0) | ((m <= 3) & (np.asarray(error) == 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        chi2 = np.where(certain, np.nan, (mean - truth) ** 2 / variance)
    return {
        "square": (mean - truth) ** 2, "mae": np.abs(mean - truth), "bias": mean - truth, "crps": fair_crps(members, truth),
        "variance": variance, "chi2": chi2,
    }  # fmt: skip


def _aggregate(
    fields: dict[str, xr.DataArray], weights: xr.DataArray | None, over: list[str] | None, members: int
) -> xr.DataArray:
    def average(array: xr.DataArray) -> xr.DataArray:
        use = array.dims if over is None else over
        if weights is not None and set(weights.dims) & set(use):
            weighted: xr.DataArray = array.weighted(weights).mean(use)
            return weighted
        return array.mean(use)

    means = {k: average(v) for k, v in fields.items()}
    rmse, spread = means["square"] ** 0.5, means["variance"] ** 0.5
    table: dict[str, xr.DataArray] = {
        "rmse": rmse, "mae": means["mae"], "bias": means["bias"], "crps": means["crps"],
        "spread": spread, "spread_skill": spread / rmse, "chi2": means["chi2"],
    }  # fmt: skip
    joined: xr.DataArray = xr.concat([table[k] for k in METRICS], "metric")
    return joined.assign_coords(metric=list(METRICS))


def _finish(scores: dict[str, xr.DataArray], units: Mapping[str, str | None]) -> xr.Dataset:
    out = xr.Dataset(scores)
    for n in scores:
        out[n].attrs = {"units": units[n] or "1", "comment": "spread_skill and chi2 have no unit"}
    out["metric"].attrs = {k: v["long_name"] for k, v in METRICS.items()}
    return out


def _verify_at_points(state: State, obs: Any, options: Mapping[str, Any]) -> xr.Dataset:
    ds, layout = state.ds, state.layout
    single = state.origin if layout.member is None else state.origin.isel({layout.member: 0})
    setup = prepare(
        single, obs, None, options["error"], options["window"], None, options["quality"], options["representativeness"],
        options["lapse_rate"], options["operators"], argument="truth", any_model=False,
    )  # fmt: skip
    found = setup.located or locate_observations(None, setup.observable, state.grid, None)
    located = found.used()
    count = 1 if layout.member is None else ds.sizes[layout.member]
    seen = np.empty((count, len(located.table)))
    for t in np.unique(located.time_index):
        rows = np.flatnonzero(located.time_index == t)
        stack = []
        for n in setup.variables.values():
            array = ds[n].isel({layout.time: int(t)}) if layout.time in ds[n].dims else ds[n]
            order = ([layout.member] if layout.member is not None else []) + list(layout.dims)
            stack.append(np.asarray(array.transpose(*order).values, dtype=float).reshape(count, *state.grid.plane))
        seen[:, rows] = located.operator.select(rows)(observed_state(setup, stack))
    blind = ~np.isfinite(seen).all(0)  # what no member says, such as land
    out = {}
    for i, w in enumerate(setup.observable):
        rows = np.flatnonzero((located.table.variable == i) & ~blind)
        if len(rows):
            points = _point_scores(seen[:, rows], located.table.value[rows], located.table.error[rows])
            out[w.name] = _aggregate({k: xr.DataArray(v, dims="obs") for k, v in points.items()}, None, None, count)
    if not out:
        raise OptionError(
            f"No observation in truth can be compared: {np.count_nonzero(located.table.code == Quality.USED)} usable."
        )
    code = found.table.code.copy()
    code[np.flatnonzero(code == Quality.USED)[blind]] = Quality.OPERATOR
    units = {w.name: w.given_units or w.units for w in setup.observable}
    return _finish(out, units).assign_attrs(counts=json.dumps(count_codes(code)))

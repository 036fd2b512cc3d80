"""The demo behind ``python -m xgenda demo``, and the pieces of its experiments: data splits, simulated observations, baselines.

Every score is taken where nothing was fitted: at stations that were withheld from the analysis, and in years that no model and
no baseline has seen. Baselines get their free parameters from the training years alone.
"""

from __future__ import annotations

import os
import time as clock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import tutorial
from xgenda.assimilation import assimilate
from xgenda.departures import fit_covariance, innovations
from xgenda.downscaling import downscale
from xgenda.errors import OptionError, OutputExistsError, check_count, missing_dependency
from xgenda.files import aside
from xgenda.models.gaussian import gaussian_prior
from xgenda.models.generative import GenerativeModel
from xgenda.observations.quality import Quality
from xgenda.plotting import plot_analysis
from xgenda.training.loop import train
from xgenda.verification import verify

STATION_ERROR = 1.0  # K, instrument and representativeness together
LAPSE_RATE = 0.0065  # K per metre, that of the standard atmosphere
BACKGROUND_STD, BACKGROUND_LENGTH = 1.9, 200e3  # K and m, of the covariance function around the forecast; all by fit_covariance
POINT_ERROR = 0.5  # K, of the simulated observations
LAST_TRAINING_YEAR, FIRST_TEST_YEAR = 2039, 2060
FACTOR = 4
#: What the cross-validation of `gaussian_prior(training_years())` finds, in minutes; given here to save them.
SAMPLE_COVARIANCES: Mapping[str, Mapping[str, Any]] = {
    "Gaussian prior, localised": {"covariance": "localized", "radius": 14734e3, "inflation": 1.2},
    "Gaussian prior, EOFs": {"covariance": "eof", "rank": 80, "inflation": 1.5},
}

ModelLike = GenerativeModel | str | os.PathLike[str]


def run(
    out: str | os.PathLike[str] = "xgenda-demo",
    *,
    members: int = 16,
    seed: int = 0,
    overwrite: bool = False,
    every: int = 10,
    folds: int = 5,
    steps: int | None = None,
    prior: ModelLike = "t2m-north-america",
    downscaler: ModelLike = "t2m-north-america-x4",
    say: Callable[[str], None] = print,
) -> dict[str, pd.DataFrame]:
    """Run the demo: real stations, then a climate run; print two tables, write netCDF files and maps.

    Parameters
    ----------
    out
        Folder for the files; made where it is missing.
    members, seed
        As in `xgenda.assimilate`.
    overwrite
        Whether `out` may hold files; those of the same name are replaced.
    every
        Use every how manyth test year.
    folds
        Of the stations.
    steps
        Noise levels of the samplers; fewer are faster and less accurate.
    prior, downscaler
        The models of the climate run.
    say
        Is given each line or table.

    Returns
    -------
    dict of str to pandas.DataFrame
        The tables: 'stations', 'downscaling', 'assimilation'.

    Raises
    ------
    OutputExistsError
        If `out` is a file, or holds something and `overwrite` is False; before anything is computed.
    MissingDependencyError
        If matplotlib is not installed; before anything is computed.
    """
    folder = check_folder(out, overwrite)
    if check_count("members", members) < 2:
        raise OptionError(f"members={members} is not accepted; scores of an ensemble need at least 2, for example members=16.")
    check_count("folds", folds, 2)
    try:
        import matplotlib  # noqa: F401
    except ImportError as problem:
        raise missing_dependency("matplotlib", "plot", "The demo draws maps and") from problem
    begin = clock.monotonic()

    say("1/3  Assimilating real stations into a real forecast ...")
    stations = station_experiment(members=members, seed=seed, folds=folds)
    say(f"\n{stations.title}\n{show(stations.table)}\n")
    stations.write(folder, "europe-analysis", reference_label="background")

    say("2/3  Downscaling the climate run ...")
    fine = downscaling_experiment(downscaler, members=members, seed=seed, every=every, steps=steps)
    fine.write(folder, "america-fine", reference_label="truth")

    say("3/3  Assimilating sparse observations into the climate run ...")
    sparse = sparse_experiment(prior, members=members, seed=seed, every=every, steps=steps)
    sparse.write(folder, "america-analysis", reference_label="truth")

    joined = pd.concat({fine.title: fine.table, sparse.title: sparse.table})
    say(f"\nClimate run, temperature at 1.5 m, years that no method was fitted to\n{show(joined)}\n")
    say(f"Wrote netCDF files and maps to {folder.absolute()} in {clock.monotonic() - begin:.0f} s:")
    for name in ("europe-analysis", "america-fine", "america-analysis"):
        say(f"  {name}.nc  {name}.png")
    return {"stations": stations.table, "downscaling": fine.table, "assimilation": sparse.table}


@dataclass(frozen=True, eq=False)
class Experiment:
    """What an experiment gives: a table of scores, and an ensemble with its reference and observations to draw."""

    title: str
    table: pd.DataFrame
    reference: xr.Dataset
    ensemble: xr.Dataset
    obs: xr.Dataset | None = None

    def write(self, folder: Path, name: str, *, reference_label: str) -> None:
        """Write ``<name>.nc`` and ``<name>.png``, each whole or not at all."""
        from matplotlib import pyplot

        folder.mkdir(parents=True, exist_ok=True)
        with aside(folder / f"{name}.nc") as path:
            self.ensemble.to_netcdf(path, engine="netcdf4")
        last = self.reference.sizes.get("time", 1) - 1
        figure = plot_analysis(self.reference, self.ensemble, self.obs, time=last, reference_label=reference_label)
        try:
            with aside(folder / f"{name}.png") as path:
                figure.savefig(path, dpi=110, format="png")
        finally:
            pyplot.close(figure)


def check_folder(out: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the folder to write to, which is refused if it holds something and `overwrite` is False."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"out={str(out)!r} is a file; give the name of a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputExistsError(
            f"out={str(out)!r} exists and is not empty. Choose another folder with --out DIR, or replace the files with --overwrite."
        )
    return folder


# -- scores ---------------------------------------------------------------------------------------------------------------------


def scores(ensemble: xr.Dataset, truth: Any, **options: Any) -> dict[str, float]:
    """Return RMSE, bias, fair CRPS, spread/skill and chi2 of the one variable of `ensemble`.

    The CRPS of a single field is its mean absolute error; its spread/skill and chi2 are NaN.
    """
    found = verify(ensemble, truth, **options)
    (name,) = found.data_vars
    return {k: float(found[name].sel(metric=k)) for k in ("rmse", "bias", "crps", "spread_skill", "chi2")}


def show(table: pd.DataFrame) -> str:
    """Return a table as text, with a dash where a score does not apply."""
    named = table.rename(columns={"rmse": "RMSE [K]", "bias": "bias [K]", "crps": "CRPS [K]", "spread_skill": "spread/skill"})
    return str(named.to_string(float_format=lambda x: f"{x:.3f}", na_rep="-"))


# -- real stations --------------------------------------------------------------------------------------------------------------


def station_data() -> tuple[xr.Dataset, xr.Dataset, GenerativeModel]:
    """Return the forecast of 2 m temperature, the station reports of the same hour, and the prior around the forecast."""
    background = tutorial.open_dataset("europe-t2m-forecast")
    return (
        background,
        tutorial.open_dataset("europe-synop")[["t2m"]],
        gaussian_prior(background, length_scale=BACKGROUND_LENGTH, std=BACKGROUND_STD),
    )


def station_folds(count: int, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Return for each of `count` stations the number of the fold that withholds it, shape (count,)."""
    return np.random.default_rng(seed).permutation(np.arange(count) % folds)


def fitted_errors(background: xr.Dataset, stations: xr.Dataset) -> dict[str, Any]:
    """Return the prior and the observation error that the departures of some stations let expect, as options of `assimilate`."""
    fit = fit_covariance(background, stations, lapse_rate=LAPSE_RATE)
    given = {c: {str(k): float(v) for k, v in fit[c].items()} for c in ("length_scale", "std", "error")}
    return {"model": gaussian_prior(background, length_scale=given["length_scale"], std=given["std"]), "error": given["error"]}


def station_experiment(*, members: int = 16, seed: int = 0, folds: int = 5) -> Experiment:
    """Assimilate the stations of all folds but one, and score the analysis at the withheld ones; then assimilate all.

    Stations that fail the background check are left out of the scores, because most such reports are wrong. The errors of forecast and
    stations are fitted to the departures of each fold's own stations, without the withheld ones.
    """
    background, stations, prior = station_data()
    height: dict[str, Any] = {"error": STATION_ERROR, "lapse_rate": LAPSE_RATE}
    departures = innovations(background, stations, model=prior, **height)
    code = departures["quality_code"].values
    good = stations.isel(obs=departures["row"].values[code == 0])
    keyword: dict[str, Any] = {"model": prior, "members": members, "seed": seed, **height}
    fold = station_folds(good.sizes["obs"], folds, seed)
    squares: dict[str, list[dict[str, float]]] = {"background": [], "analysis": []}
    for k in range(folds):
        withheld, seen = (good.isel(obs=np.flatnonzero(of)) for of in (fold == k, fold != k))
        fitted = fitted_errors(background, seen)
        analysis = assimilate(background, seen, **keyword | fitted)
        squares["analysis"].append(scores(analysis, withheld, **height | {"error": fitted["error"]}))
        squares["background"].append(scores(background, withheld, **height))
    table = pd.DataFrame({name: _pool(rows, np.bincount(fold)) for name, rows in squares.items()}).T
    # what the prior says of the departures: the background as an ensemble of infinitely many members
    departure = departures["innovation"].values[code == 0]
    table.loc["background", "chi2"] = float((departure**2).mean()) / (BACKGROUND_STD**2 + STATION_ERROR**2)
    rejected, missing = int(np.isin(code, (Quality.BACKGROUND, Quality.BUDDY)).sum()), int(np.isin(code, (2, 3, 4, 5)).sum())
    high = int((code == Quality.HEIGHT).sum())
    title = (
        f"2 m temperature at withheld stations, 2018-11-20 12 UTC: {folds} folds of {good.sizes['obs']} stations\n"
        f"(left out: {missing} without a usable value, {high} more than 500 m above or below the ground of the forecast,\n"
        f"{rejected} that disagree with the forecast or with their neighbours)"
    )
    final = assimilate(background, stations, **keyword)
    return Experiment(title, table[["rmse", "bias", "chi2"]], background, final, good)


def _pool(rows: Sequence[dict[str, float]], count: np.ndarray) -> dict[str, float]:
    """Join the scores of folds of `count` stations into those of all stations."""
    weight = count / count.sum()
    joined = {k: float(np.dot(weight, [r[k] for r in rows])) for k in ("bias", "chi2")}
    return {"rmse": float(np.sqrt(np.dot(weight, [r["rmse"] ** 2 for r in rows]))), **joined}


# -- climate run ----------------------------------------------------------------------------------------------------------------


def training_years() -> xr.Dataset:
    """Return the fields to fit to: scenario A1B until 2039, and E1 from 2000, where the two part, until 2039."""
    a1b, e1 = (tutorial.open_dataset(n)[["air_temperature"]] for n in ("a1b-north-america", "e1-north-america"))
    first = a1b.sel(time=a1b["time"].dt.year <= LAST_TRAINING_YEAR)
    second = e1.sel(time=(e1["time"].dt.year >= 2000) & (e1["time"].dt.year <= LAST_TRAINING_YEAR))
    joined: xr.Dataset = xr.concat([first, second], "time", coords="minimal", compat="override")
    return joined


def validation_years() -> xr.Dataset:
    """Return the fields between those to fit to and those to score with, 2040 to 2059 of scenario A1B: to calibrate with."""
    ds = tutorial.open_dataset("a1b-north-america")[["air_temperature"]]
    year = ds["time"].dt.year
    chosen: xr.Dataset = ds.sel(time=(year > LAST_TRAINING_YEAR) & (year < FIRST_TEST_YEAR))
    return chosen


def withheld_years(every: int = 1, scenario: str = "a1b") -> xr.Dataset:
    """Return the fields to score with: 2060 to 2099 of a scenario, or every so manyth of them."""
    ds = tutorial.open_dataset(f"{scenario}-north-america")[["air_temperature"]]
    chosen: xr.Dataset = ds.sel(time=ds["time"].dt.year >= FIRST_TEST_YEAR).isel(time=slice(None, None, every))
    return chosen


def crop(ds: xr.Dataset, factor: int = FACTOR) -> xr.Dataset:
    """Return the part of `ds` from its first corner whose shape is a multiple of `factor`."""
    ny, nx = (ds.sizes[d] // factor * factor for d in ("latitude", "longitude"))
    return ds.isel(latitude=slice(0, ny), longitude=slice(0, nx))


def coarsen(fine: xr.Dataset, factor: int = FACTOR) -> xr.Dataset:
    """Return the block means that a downscaling model takes."""
    means: xr.Dataset = fine.coarsen(latitude=factor, longitude=factor).mean()
    return means


def sparse_observations(truth: xr.Dataset, count: int = 40, error: float = POINT_ERROR, seed: int = 0) -> xr.Dataset:
    """Simulate observations of a truth: the same `count` random grid points at every time, with Gaussian errors.

    Returns
    -------
    xarray.Dataset
        A table along ``obs`` with latitude, longitude, time and each variable of `truth`, without the errors' size.
    """
    rng = np.random.default_rng(seed)
    ny, nx, times = truth.sizes["latitude"], truth.sizes["longitude"], truth.sizes["time"]
    row, column = np.unravel_index(rng.choice(ny * nx, count, replace=False), (ny, nx))
    out = {}
    for name, array in truth.data_vars.items():
        seen = array.transpose("time", "latitude", "longitude").values[:, row, column]
        out[name] = ("obs", (seen + error * rng.standard_normal(seen.shape)).ravel(), array.attrs)
    return xr.Dataset(
        out,
        coords={
            "latitude": ("obs", np.tile(truth["latitude"].values[row], times), truth["latitude"].attrs),
            "longitude": ("obs", np.tile(truth["longitude"].values[column], times), truth["longitude"].attrs),
            "time": ("obs", np.repeat(truth["time"].values, count)),
        },
    )


def downscaling_experiment(
    model: ModelLike, *, members: int = 16, seed: int = 0, every: int = 10, steps: int | None = None
) -> Experiment:
    """Downscale the block means of test years, beside bilinear interpolation and ridge regression."""
    truth = crop(withheld_years(every))
    coarse = coarsen(truth)
    fields = crop(training_years())
    bilinear, ridge = (train(fields, task="downscale", factor=FACTOR, method=m) for m in ("bilinear", "ridge"))
    keyword: dict[str, Any] = {"members": members, "seed": seed, "target": truth}
    fine = downscale(coarse, model=model, steps=steps, **keyword)
    rows = {
        "bilinear interpolation": downscale(coarse, model=bilinear, stage="mean", **keyword),
        "ridge regression": downscale(coarse, model=ridge, stage="mean", **keyword),
        "ridge regression + past errors": downscale(coarse, model=ridge, **keyword),
        f"xgenda: {_name(model)}": fine,
    }
    table = pd.DataFrame({k: scores(v, truth) for k, v in rows.items()}).T
    return Experiment(f"downscaling x{FACTOR}, {_years(truth)}", table, truth, fine)


def sparse_experiment(
    model: ModelLike, *, count: int = 40, members: int = 16, seed: int = 0, every: int = 10, steps: int | None = None
) -> Experiment:
    """Assimilate sparse simulated observations of test years, beside Gaussian priors from the same training years."""
    truth, train = withheld_years(every), training_years()
    obs = sparse_observations(truth, count, POINT_ERROR, seed)
    grid_only = xr.zeros_like(truth)  # the values of a truth must not reach a prior
    grid_only["air_temperature"].attrs = truth["air_temperature"].attrs
    keyword: dict[str, Any] = {"error": POINT_ERROR, "members": members, "seed": seed}
    climate = train.mean("time", keep_attrs=True).expand_dims(time=truth["time"])
    rows = {"mean of the training years": climate}
    rows |= {n: assimilate(grid_only, obs, model=gaussian_prior(train, **o), **keyword) for n, o in SAMPLE_COVARIANCES.items()}
    analysis = assimilate(grid_only, obs, model=model, steps=steps, **keyword)
    rows[f"xgenda: {_name(model)}"] = analysis
    table = pd.DataFrame({k: scores(v, truth) for k, v in rows.items()}).T
    return Experiment(f"{count} observations, {_years(truth)}", table, truth, analysis, obs)


def _name(model: ModelLike) -> str:
    return model.spec.name if isinstance(model, GenerativeModel) else Path(model).stem


def _years(ds: xr.Dataset) -> str:
    year = ds["time"].dt.year.values
    return f"{len(year)} years of {year[0]}-{year[-1]}"

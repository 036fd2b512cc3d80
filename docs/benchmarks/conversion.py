"""Conversion of one data set to another through a latent space, and what is not observed from what is, beside regression and a Gaussian.

python docs/benchmarks/conversion.py [--navy FILE] [--parts temperature winds]

1. Temperature over North America (bundled), trained to 2039, tested on years from 2060 to 2099: from means over blocks of 4 x 4 cells, of which a
   third is missing at random in every year, to the fields, in the bundled latent space.
2. Monthly winds over the Pacific (monthly_navy_winds.cdf, see small_data.py), the last fifth of the months withheld after a gap of six: the
   northward from the eastward wind. Once all of the eastward wind is given (conversion and regression), once every third cell along both axes with
   an error of a quarter of its standard deviation (search of the latent space, Gaussian, conversion and regression).

Ridge regression cannot take gaps: they are filled with the mean of their times, or with anomalies interpolated along longitude. Its members are its
past errors.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import xgenda
from xgenda.demo import coarsen, crop, scores, training_years, withheld_years

QUIET: dict[str, Any] = {"progress": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--navy", help="monthly_navy_winds.cdf; without it the second part is left out")
    parser.add_argument("--parts", nargs="*", choices=("temperature", "winds"))
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--members", type=int, default=16)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=xgenda.errors.LittleDataWarning)
    parts = options.parts or ("temperature", "winds")
    if "temperature" in parts:
        print(temperature(options.steps, options.members).round(4).to_string(), flush=True)
    tables = {}
    if "winds" in parts and options.navy is not None:
        tables |= winds(options.navy, options.steps, options.members)
    for name, table in tables.items():
        print(f"\n{name}\n{table.round(4).to_string()}", flush=True)


def timed(rows: dict[str, dict[str, float]], name: str, predict: Callable[[], xr.Dataset], truth: xr.Dataset) -> None:
    """Add the scores of a prediction, and the seconds of processor time that it took."""
    begin = time.process_time()
    found = predict()
    rows[name] = {**scores(found[list(truth.data_vars)], truth), "s of CPU": time.process_time() - begin}


def without(ds: xr.Dataset, share: float, seed: int) -> xr.Dataset:
    """Return fields of which a share of the cells is missing, others at every time."""
    rng = np.random.default_rng(seed)
    return ds.where(xr.zeros_like(ds["air_temperature"]).copy(data=rng.random(ds["air_temperature"].shape)) >= share)


def temperature(steps: int, members: int) -> pd.DataFrame:
    """Return scores of conversion and regression from block means with gaps."""
    past, later = training_years(), withheld_years(2)
    source, given = (without(coarsen(crop(ds)), 1 / 3, k) for k, ds in enumerate((past, later)))
    # two runs have the same times: one after the other, in the same order
    climate = source.mean("time")
    rows: dict[str, dict[str, float]] = {}

    def interpolated(ds: xr.Dataset) -> xr.Dataset:
        between = (ds - climate).interpolate_na("longitude", fill_value="extrapolate").fillna(0.0) + climate
        between["air_temperature"].attrs = past["air_temperature"].attrs
        return between

    fills: dict[str, Callable[[xr.Dataset], xr.Dataset]] = {
        "climate": lambda ds: ds.fillna(climate),
        "interpolated": interpolated,
    }
    converted = xgenda.train(source, target=past, task="conversion", start="t2m-north-america-vae", steps=steps, **QUIET)
    print(f"conversion: {converted.spec.training['card']}")
    own: dict[str, Any] = {"members": members, "seed": 0, "target": later}
    for name, fill in fills.items():
        ridge = xgenda.train(fill(source), target=past, task="downscale", method="ridge", **QUIET)
        timed(
            rows,
            f"ridge regression + past errors, gaps: {name}",
            lambda m=ridge, f=fill: f(given).genda.downscale(model=m, **own),
            later,
        )
    timed(rows, "conversion", lambda: given.genda.downscale(model=converted, **own), later)
    return pd.DataFrame(rows).T


def navy(path: str) -> xr.Dataset:
    """Return monthly winds over the Pacific."""
    ds = xr.open_dataset(path)[["UWND", "VWND"]].rename(FNOCX="longitude", FNOCY="latitude", TIME="time", UWND="u", VWND="v")
    for name, title in (("u", "eastward_wind"), ("v", "northward_wind")):
        ds[name].attrs = {"units": "m s-1", "standard_name": title}
    ds["latitude"].attrs, ds["longitude"].attrs = {"units": "degrees_north"}, {"units": "degrees_east"}
    return ds.sel(latitude=slice(-30, 60), longitude=slice(120, 290)).astype("float64").load()


def winds(path: str, steps: int, members: int) -> dict[str, pd.DataFrame]:
    """Return scores of the northward wind given the eastward one, whole or sparse."""
    ds = navy(path)
    count = ds.sizes["time"]
    past, later = ds.isel(time=slice(0, int(0.8 * count) - 6)), ds.isel(time=slice(int(0.8 * count), None))
    climate = past[["v"]].groupby("time.month").mean().sel(month=later["time"].dt.month).drop_vars("month")
    return unobserved(past, later, ["u"], "v", 3, climate, steps, members, climatology="dayofyear")


def unobserved(
    past: xr.Dataset, later: xr.Dataset, known: list[str], wanted: str, every: int, climate: xr.Dataset, steps: int, members: int, **options: Any
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Return scores of one variable given others everywhere, and at every so manyth cell along both axes with errors."""
    truth = later[[wanted]]
    latent = xgenda.train(past, task="autoencoder", steps=steps, width=8, **QUIET)
    gaussian = xgenda.gaussian_prior(past)
    record = latent.spec.training
    print(f"latent space: {record['latent']} numbers, {record['card']}; decoder's error {record['decoder_error']}")
    error = {n: float(0.25 * past[n].std()) for n in known}
    rng = np.random.default_rng(0)

    def sparse(fields: xr.Dataset) -> xr.Dataset:
        seen = xr.zeros_like(fields[known[0]][0], dtype=bool)
        seen[1::every, 1::every] = True
        return (
            fields[known] + xr.Dataset({n: (fields[n].dims, error[n] * rng.standard_normal(fields[n].shape)) for n in known})
        ).where(seen)

    out = {}
    for name, source, given in (("everywhere", past[known], later[known]), ("sparse, with errors", sparse(past), sparse(later))):
        for n in known:
            source[n].attrs = given[n].attrs = past[n].attrs
        gaps = bool(source[known[0]].isnull().any())
        filled, filled_later = (d.fillna(0.0) if gaps else d for d in (source, given))
        rows: dict[str, dict[str, float]] = {}
        timed(rows, "climate", lambda c=climate: c, truth)
        ridge = xgenda.train(filled, target=past[[wanted]], task="downscale", method="ridge", **QUIET, **options)
        converted = xgenda.train(source, target=past, task="conversion", start=latent, steps=steps, width=8, **QUIET)
        print(f"conversion, {name}: {converted.spec.training['card']}")
        own: dict[str, Any] = {"members": members, "seed": 0, "target": later}
        timed(
            rows, "ridge regression + past errors", lambda m=ridge, g=filled_later, o=own: g.genda.downscale(model=m, **o), truth
        )
        timed(rows, "conversion", lambda m=converted, g=given, o=own: g.genda.downscale(model=m, **o), truth)
        if gaps:
            blank = xr.zeros_like(later)
            for n in blank:
                blank[n].attrs = later[n].attrs
            for label, model in (("search of the latent space, rmap", latent), ("Gaussian", gaussian)):
                asked = {
                    "model": model,
                    "error": error,
                    "members": members,
                    "seed": 0,
                    "background_check": None,
                    "progress": False,
                }
                timed(rows, label, lambda b=blank, g=given, a=asked: b.genda.assimilate(g, **a), truth)
        out[f"{wanted} at {later.sizes['time']} times from {' and '.join(known)}, {name}"] = pd.DataFrame(rows).T
    return out


if __name__ == "__main__":
    main()

"""Priors that are trained on random parts of the grid, beside one that is trained on all of it: the CRPS of their analyses.

python docs/benchmarks/crops.py [--steps 150] [--tile 20 28] [--times 8] [--members 16]

Annual mean temperature of a climate run over North America (bundled, 37 x 49 cells, 1860 to 2099). The years 1980 to 2019 are not trained
on, and some of 1985 to 2014 are analysed from a twentieth of the cells, random ones, with errors of a quarter of the standard deviation.
Scored are the other cells. All models correct the same Gaussian. Networks that were trained on parts are called on tiles, and once more on
the whole grid, which they have never seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings

import numpy as np
import xarray as xr

import xgenda
from xgenda.models.diffusive import DiffusionModel
from xgenda.verification import fair_crps

HELD = slice(120, 160)  # years since 1860
GAP = 5


def on_the_whole(model: DiffusionModel) -> DiffusionModel:
    """Return a model whose network is called on the whole grid."""
    options = {k: v for k, v in model.spec.options.items() if k not in ("tile", "overlap")}
    return DiffusionModel(dataclasses.replace(model.spec, options=options), model.denoiser, model.covariance, model.valid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tile", type=int, nargs=2, default=(20, 28))
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--members", type=int, default=16)
    options = parser.parse_args()
    ds = xgenda.tutorial.open_dataset("a1b-north-america")[["air_temperature"]].load()
    years = np.arange(ds.sizes["time"])
    past = ds.isel(time=(years < HELD.start) | (years >= HELD.stop))
    truth = ds.isel(time=np.linspace(HELD.start + GAP, HELD.stop - 1 - GAP, options.times).round().astype(int))
    values = truth.air_temperature.values
    seen = np.random.default_rng(0).random(values.shape[1:]) < 0.05
    error = 0.25 * float((past.air_temperature - past.air_temperature.mean("time")).std())
    obs = truth.copy(data={"air_temperature": values + np.random.default_rng(1).normal(0, error, values.shape)})
    obs = obs.where(xr.DataArray(seen, dims=("latitude", "longitude")))
    tile = tuple(options.tile)
    longer = round(options.steps * seen.size / (tile[0] * tile[1]))
    print(
        f"{past.sizes['time']} years; parts of {tile[0]} x {tile[1]} cells; {options.times} analyses, {int(seen.sum())} cells observed"
    )
    print(
        "| trained on | steps | time of the processor [s] | validation loss / Gaussian | CRPS [K] | less than the first |\n"
        "|---|---|---|---|---|---|"
    )
    first: np.ndarray | None = None
    for name, parts, steps in (("the grid", None, options.steps), ("parts", tile, options.steps), ("parts", tile, longer)):
        begin = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", xgenda.errors.LittleDataWarning)
            model = xgenda.train(past, steps=steps, tile=parts, anchor="eof", seed=0, progress=False)
        took = time.process_time() - begin
        assert isinstance(model, DiffusionModel)
        calls = {name: model} if parts is None else {name: model, "parts, called on the grid": on_the_whole(model)}
        for label, one in calls.items():
            found = truth.genda.assimilate(obs, model=one, error=error, members=options.members, seed=0, progress=False)
            members = found.air_temperature.transpose("member", "time", "latitude", "longitude").values
            own = fair_crps(members, values)[:, ~seen].mean(1)
            first = own if first is None else first
            less = first - own
            print(
                f"| {label} | {steps} | {took:.0f} | {model.spec.training['validation_ratio']:.3f} | {own.mean():.4f} | "
                f"{less.mean():+.4f} ± {less.std(ddof=1) / len(less) ** 0.5:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

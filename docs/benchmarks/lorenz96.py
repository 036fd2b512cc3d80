"""Lorenz-96 through `xgenda.cycle`: our filters against published numbers.

The set-up of Sakov and Oke (2008): 40 variables on a ring, F = 8, Runge-Kutta steps of 0.05, all variables observed at every step with error
variance 1. The ring is the equator: 40 cells, 9 degrees of longitude or 1,000.75 km apart; a step is called 6 hours.

    python docs/benchmarks/lorenz96.py --cycles 5000 --seeds 0 1 2
    python docs/benchmarks/lorenz96.py --cycles 1000 --seeds 0 --methods "background model" [--steps 1400 1400]

Published time-mean RMSE of the analysis (of `mods/Lorenz96/sakov2008.py` of DAPPER, whose localisation radius of 4 cells is a taper that
reaches zero after 2 x 1.82 x 4 = 14.56 cells): LETKF with 7 members 0.22, square-root EnKF with 28 members 0.18, 3D-Var 0.41.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import xarray as xr

import xgenda

CELLS, FORCING, STEP, HOURS = 40, 8.0, 0.05, 6
CELL = np.radians(360 / CELLS) * 6_371_229.0  # m
BURN_IN = 400  # cycles: 20 units of time


def tendency(x: np.ndarray) -> np.ndarray:
    """Return dx/dt of states (..., 40)."""
    return (np.roll(x, -1, -1) - np.roll(x, 2, -1)) * np.roll(x, 1, -1) - x + FORCING


def advance(x: np.ndarray) -> np.ndarray:
    """Return states one step later, by the fourth-order scheme of Runge and Kutta."""
    a = tendency(x)
    b = tendency(x + STEP / 2 * a)
    c = tendency(x + STEP / 2 * b)
    d = tendency(x + STEP * c)
    return x + STEP / 6 * (a + 2 * b + 2 * c + d)


def forecast(ds: xr.Dataset) -> xr.Dataset:
    """Return an ensemble one step later."""
    return ds.copy(data={"x": advance(ds.x.values)}).assign_coords(time=ds.time + np.timedelta64(HOURS, "h"))


def on_the_ring(values: np.ndarray, dims: tuple[str, ...], **coords: object) -> xr.Dataset:
    """Return states (..., 40) as a Dataset on the equator."""
    return xr.Dataset(
        {"x": ((*dims, "latitude", "longitude"), values[..., None, :])},
        coords={"latitude": [0.0], "longitude": 360 / CELLS * np.arange(CELLS), **coords},
    )


def twin(cycles: int, members: int, seed: int) -> tuple[xr.Dataset, xr.Dataset, xr.Dataset]:
    """Return the initial ensemble, the truth and the observations of a twin experiment."""
    rng = np.random.default_rng(seed)
    x = np.full(CELLS, FORCING)
    x[0] += 0.01
    x += 0.1 * rng.standard_normal(CELLS)
    for _ in range(1000):
        x = advance(x)
    start = x + np.sqrt(0.001) * rng.standard_normal((members, CELLS))
    x = x + np.sqrt(0.001) * rng.standard_normal(CELLS)
    states = np.empty((cycles, CELLS))
    for t in range(cycles):
        x = advance(x)
        states[t] = x
    times = pd.Timestamp("2000-01-01") + pd.to_timedelta(HOURS * np.arange(cycles + 1), unit="h")
    initial = on_the_ring(start, ("member",), member=np.arange(members), time=times[0])
    truth = on_the_ring(states, ("time",), time=times[1:])
    obs = truth + rng.standard_normal(truth.x.shape)
    return initial, truth, obs


def scores(run: xr.Dataset, truth: xr.Dataset) -> dict[str, float]:
    """Return time-mean RMSE and spread of the analysis, RMSE of the background, and chi2, after the burn-in."""
    some = run.isel(time=slice(min(BURN_IN, run.sizes["time"] // 5), None))
    true = truth.sel(time=some.time)

    def rmse(stage: str) -> float:
        return float(np.sqrt(((some.x.sel(stage=stage).mean("member") - true.x) ** 2).mean(("latitude", "longitude"))).mean())

    return {
        "rmse": rmse("analysis"), "rmse of the background": rmse("background"),
        "spread": float(some.spread.sel(stage="analysis").mean()), "chi2": float(some.chi2.mean()),
    }  # fmt: skip


#: Name, members, model, published RMSE.
METHODS = {
    "LETKF": (7, xgenda.LETKF(localization=14.56 * CELL, inflation=1.04, rotation=True), 0.22),
    "square-root EnKF": (28, xgenda.LETKF(inflation=1.02, rotation=True), 0.18),
}


def variational(part: float = 0.02) -> xgenda.GenerativeModel:
    """Return the model of 3D-Var: a part of the covariance of the climate around the background."""
    climate = twin(2000, 2, 77)[1].isel(time=slice(None, None, 2))
    mean = climate.mean("time")
    sample = mean + np.sqrt(part) * (climate - mean)
    return xgenda.gaussian_prior(
        sample, covariance="localized", radius=60e6, inflation=1.0, climatology="none", mean="background"
    )


def trained(steps: list[int]) -> xgenda.GenerativeModel:
    """Return a model of the truth given a background: trained on cycles of 3D-Var over another truth, and again on its own."""
    model, parts = variational(), []
    for count in steps:
        initial, truth, obs = twin(3000, 2, 88)
        run = assimilated(initial, truth, obs, model, 0)
        some = slice(BURN_IN, None)
        background = run[["x"]].sel(stage="background", drop=True).mean("member").isel(time=some)
        parts.append((background, truth.isel(time=some)))
        given, wanted = (xr.concat(p, "time", coords="minimal", compat="override") for p in zip(*parts, strict=True))
        model = xgenda.train(
            given, target=wanted, task="background", periodic=True, time_features="none", steps=count, seed=0, batch_size=64
        )  # fmt: skip
        print(model, flush=True)
    return model


def assimilated(
    initial: xr.Dataset, truth: xr.Dataset, obs: xr.Dataset, model: xgenda.GenerativeModel | xgenda.LETKF, seed: int
) -> xr.Dataset:
    """Return backgrounds and analyses."""
    return xgenda.cycle(
        initial, obs, forecast=forecast, model=model, times=truth.time, error=1.0, seed=seed, background_check=None,
        quality=xgenda.QualityControl(buddy=None), guard=None,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=[*METHODS, "3D-Var"])
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[1400, 1400], help="of each round of training the background model"
    )
    options = parser.parse_args()
    methods = {**METHODS, "3D-Var": (2, variational(), 0.41)}
    if "background model" in options.methods:
        methods["background model"] = (8, trained(options.steps), float("nan"))
    print("| method | members | seed | RMSE, analysis | published | RMSE, background | spread | chi2 | CPU ms per cycle |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.methods:
        members, model, published = methods[name]
        for seed in options.seeds:
            initial, truth, obs = twin(options.cycles, members, seed)
            begin = time.process_time()
            run = assimilated(initial, truth, obs, model, seed)
            cost = (time.process_time() - begin) / options.cycles
            found = scores(run, truth)
            print(
                f"| {name} | {members} | {seed} | {found['rmse']:.3f} | {published:.2f} | {found['rmse of the background']:.3f} "
                f"| {found['spread']:.3f} | {found['chi2']:.2f} | {1e3 * cost:.1f} |",
                flush=True,
            )
    # without inflation and localisation few members lose the truth, and the guard says so
    initial, truth, obs = twin(options.cycles, 7, options.seeds[0])
    try:
        xgenda.cycle(
            initial, obs, forecast=forecast, model=xgenda.LETKF(), times=truth.time, error=1.0, seed=0, background_check=None
        )
    except xgenda.errors.DivergenceError as error:
        print(f"\n7 members, no inflation, no localisation: DivergenceError at cycle {error.cycle}\n{error}")


if __name__ == "__main__":
    main()

"""Cycles of forecasts and analyses of the simulated ocean, whose forecast is wrong: a filter, 3D-Var, and generative models beside them.

The truth is the two-layer quasi-geostrophic ocean of `xgenda.tutorial.simulate_ocean` on 32 x 32 cells of 20 km. The forecast has a wider
deformation radius, less shear and more drag. Every day the height (0.02 m), temperature (0.2 K) and
salinity (0.05 psu) of ten columns (1 %) are observed, always the same ones or others each time; the lower layer never is. The first
ensemble is wrong by half of the climate's standard deviation.

    python docs/benchmarks/cycling.py                        # all methods, both networks, seed 1
    python docs/benchmarks/cycling.py --tune letkf           # what the settings below were chosen by, on other seeds
    python docs/benchmarks/cycling.py --train model.safetensors                         # a background model of the errors of 3D-Var cycles ...
    python docs/benchmarks/cycling.py --model model.safetensors --background mean       # ... beside them

Settings were chosen on seed 101 with 50 cycles, most of the combinations of `GRIDS`; the table is of another truth. The background model is trained
on the backgrounds of cycles over other truths still: those of 3D-Var, and then of the model itself, whose errors are smaller.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import xgenda

SIZE, SPACING, STEP, COLUMNS = 32, 20e3, "1D", 10
ERRORS = {"ssh": 0.02, "temperature": 0.2, "salinity": 0.05}
STATE = ("ssh", "lower", "temperature", "salinity")
WRONG = {"rd": 27e3, "U1": 0.09, "rek": 1.3e-6}
BURN_IN = 20  # cycles
CLIMATE_SEED = 50
TRAINING_SEEDS = range(201, 213)


def ocean(times: int, seed: int, every: str = STEP) -> xr.Dataset:
    """Return complete states of the ocean."""
    run = xgenda.tutorial.simulate_ocean(times, every=every, size=SIZE, spacing=SPACING, spinup="400D", seed=seed, lower=True)
    return run[list(STATE)]


def twin(cycles: int, members: int, seed: int, network: str, climate: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset, xr.Dataset]:
    """Return the first ensemble, the truth and the observations."""
    truth, rng = ocean(cycles + 1, seed), np.random.default_rng(seed)
    some = climate.isel(time=rng.choice(climate.sizes["time"], members + 1, replace=False)).drop_vars("time")
    away = 0.5 * (some - climate.mean("time"))
    start = truth.isel(time=0) + away.isel(time=0) + away.isel(time=slice(1, None)).rename(time="member")
    start = start.assign_coords(member=np.arange(members)).astype("float64")
    parts, columns = [], rng.choice(SIZE**2, COLUMNS, replace=False)
    for t in range(1, cycles + 1):
        if network == "random":
            columns = rng.choice(SIZE**2, COLUMNS, replace=False)
        row, column = (xr.DataArray(a, dims="obs") for a in np.divmod(columns, SIZE))
        seen = truth[list(ERRORS)].isel(time=t, latitude=row, longitude=column)
        seen = seen + xr.Dataset({n: ("obs", e * rng.standard_normal(COLUMNS)) for n, e in ERRORS.items()})
        parts.append(seen.to_dataframe().reset_index(drop=True))
    for name in STATE:
        start[name].attrs = truth[name].attrs
    return start, truth.isel(time=slice(1, None)), pd.concat(parts, ignore_index=True)


def letkf(climate: xr.Dataset, localization: float = 180e3, inflation: float = 1.0, rtps: float = 0.3) -> dict[str, Any]:
    """Return the settings of the local filter."""
    return {"model": xgenda.LETKF(localization=localization, inflation=inflation, rtps=rtps, wraps=True)}


def variational(
    climate: xr.Dataset, length_scale: float = 40e3, std: float = 0.8, covariance: str = "gaussian"
) -> dict[str, Any]:
    """Return the settings of 3D-Var with a covariance function around the background, of each variable alone."""
    spread = {n: std * float(climate[n].std()) for n in STATE}
    model = xgenda.gaussian_prior(climate.isel(time=0), length_scale=length_scale, std=spread, covariance=covariance)
    return {"model": model, "background": "control", "members": 10}


def interpolation(climate: xr.Dataset, radius: float = 200e3, scale: float = 0.6) -> dict[str, Any]:
    """Return the settings of ensemble optimal interpolation: the localised covariance of the climate, scaled, of all variables together."""
    mean = climate.mean("time")
    sample = (mean + scale * (climate - mean)).map(lambda a: a.assign_attrs(climate[a.name].attrs))
    model = xgenda.gaussian_prior(
        sample, covariance="localized", radius=radius, inflation=1.0, climatology="none", mean="background"
    )
    return {"model": model, "background": "control", "members": 10}


METHODS: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "letkf": ("LETKF", letkf),
    "function": ("3D-Var, covariance function", variational),
    "climate": ("optimal interpolation, covariance of the climate", interpolation),
}
GRIDS: dict[str, dict[str, list[Any]]] = {
    "letkf": {"localization": [130e3, 180e3, 250e3, 350e3], "rtps": [0.2, 0.3, 0.5, 0.7]},
    "function": {"length_scale": [30e3, 40e3, 50e3, 80e3], "std": [0.2, 0.35, 0.5, 0.8, 1.1]},
    "climate": {"radius": [200e3, 350e3], "scale": [0.3, 0.6]},
}


def scores(run: xr.Dataset, truth: xr.Dataset) -> dict[str, float]:
    """Return RMSE of analysis and background by variable, spread over RMSE of the background, and chi2, after the burn-in."""
    some = run.isel(time=slice(BURN_IN, None))
    true = truth.sel(time=some.time)
    out = {}
    for stage in ("analysis", "background"):
        error = (some.sel(stage=stage)[list(STATE)].mean("member") - true) ** 2
        out |= {f"{n} {stage}": float(np.sqrt(error[n].mean())) for n in STATE}
    for name in ("ssh", "temperature"):
        part = some[name].sel(stage="analysis")
        members = part.sizes["member"]
        spread = np.sqrt(part.var("member", ddof=1).mean(("latitude", "longitude")) * (members + 1) / members)
        skill = np.sqrt(((part.mean("member") - true[name]) ** 2).mean(("latitude", "longitude")))
        ratio = spread / skill
        out |= {f"{name} ratio": float(np.sqrt((spread**2).mean() / (skill**2).mean()))}
        out |= {f"{name} low": float(ratio.quantile(0.05)), f"{name} high": float(ratio.quantile(0.95))}
        thirds = np.array_split(skill.values, 3)
        out |= {f"{name} third {k}": float(np.sqrt((t**2).mean())) for k, t in enumerate(thirds)}
    return out | {"chi2": float(some.chi2.mean())}


def run(settings: dict[str, Any], data: tuple[Any, Any, Any], seed: int, members: int) -> tuple[xr.Dataset, float]:
    """Return the result of one cycle and its CPU seconds for each analysis."""
    initial, truth, obs = data
    initial = initial.isel(member=slice(members))
    if not isinstance(settings["model"], xgenda.LETKF):
        initial = initial.mean("member", keep_attrs=True)
        settings = {"members": members, **settings}
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*observations were not used")
        result = xgenda.cycle(
            initial, obs, forecast=xgenda.tutorial.ocean_forecast(STEP, **WRONG), times=truth.time, window="1h",
            error=ERRORS, seed=seed, guard=None, quality=xgenda.QualityControl(buddy=None), **{"background_check": None, **settings},
        )  # fmt: skip
    return result, (time.process_time() - begin) / truth.sizes["time"]


def pairs(
    settings: dict[str, Any], seeds: Iterable[int], network: str, cycles: int, members: int, climate: xr.Dataset
) -> tuple[xr.Dataset, xr.Dataset]:
    """Return backgrounds and truths of cycles over several truths, the runs one after the other."""
    parts = []
    for seed in seeds:
        data = twin(cycles, members, seed, network, climate)
        result = run(settings, data, seed, members)[0].isel(time=slice(BURN_IN // 2, None))
        background = result[list(STATE)].sel(stage="background", drop=True)
        background = background.mean("member", keep_attrs=True) if "member" in background.dims else background
        parts.append((background, data[1].sel(time=result.time)))
    found = [xr.concat(some, "time", coords="minimal", compat="override", join="override") for some in zip(*parts, strict=True)]
    for name in STATE:
        found[0][name].attrs = found[1][name].attrs
    return found[0].astype("float32"), found[1].astype("float32")


def train(options: argparse.Namespace, climate: xr.Dataset) -> None:
    """Train a background model in two rounds: on cycles of 3D-Var, and on these and its own."""
    first = variational(climate) | {"background": "mean"}
    backgrounds, truths = pairs(first, TRAINING_SEEDS[: options.runs], options.networks[0], options.cycles, 10, climate)
    for round_, steps in enumerate(options.training_steps):
        model = xgenda.train(
            backgrounds, target=truths, task="background", periodic="both", time_features="none", steps=steps, seed=0,
            out=options.train, overwrite=True,
        )  # fmt: skip
        print(model, flush=True)
        if round_ + 1 < len(options.training_steps):
            own = {"model": model, "background": "mean", "steps": options.steps}
            more = pairs(own, TRAINING_SEEDS[: options.runs], options.networks[0], options.cycles, 10, climate)
            backgrounds, truths = (xr.concat(both, "time") for both in zip((backgrounds, truths), more, strict=True))


def tune(method: str, cycles: int, members: int, network: str, climate: xr.Dataset, options: dict[str, list[Any]]) -> None:
    """Print the scores of all combinations of settings on another truth."""
    data = twin(cycles, members, 101, network, climate)
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        try:
            result, cost = run(METHODS[method][1](climate, **chosen), data, 0, members)
        except xgenda.errors.StateError as overflow:  # of the forecast
            print(f"{chosen}: {str(overflow).splitlines()[0]}", flush=True)
            continue
        found = scores(result, data[1])
        print(
            f"{chosen}: ssh {found['ssh analysis']:.4f} temperature {found['temperature analysis']:.3f} lower {found['lower analysis']:.4f} "
            f"ratio {found['ssh ratio']:.2f} {found['temperature ratio']:.2f} chi2 {found['chi2']:.2f} ({cost:.2f} s)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--members", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--networks", nargs="*", default=["random", "fixed"], choices=["random", "fixed"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--model", default=None, help="a model of the truth given a background, by path or name")
    parser.add_argument("--background", default="control")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--tune", default=None, choices=list(METHODS))
    parser.add_argument("--grid", nargs="*", default=[], help="of --tune, such as rtps=0.4,0.6")
    parser.add_argument("--train", default=None, help="file of a background model to train")
    parser.add_argument(
        "--runs", type=int, default=len(TRAINING_SEEDS), help="over other truths, that --train takes backgrounds from"
    )
    parser.add_argument("--training-steps", type=int, nargs="*", default=[800, 800], help="of each round of training")
    options = parser.parse_args()
    climate = ocean(200, CLIMATE_SEED, every="10D").astype("float64")
    if options.train:
        train(options, climate)
        return
    if options.tune:
        given = {k: [float(x) for x in v.split(",")] for k, v in (g.split("=") for g in options.grid)}
        tune(options.tune, options.cycles, options.members, options.networks[0], climate, given or GRIDS[options.tune])
        return
    print(f"Standard deviation of the climate: {', '.join(f'{n} {float(climate[n].std()):.3g}' for n in STATE)}\n")
    print(
        "| method | network | seed | ssh, m | lower, m | temperature, K | salinity, psu | ssh, background | spread/skill ssh (5-95 %) "
        "| spread/skill temperature | RMSE of ssh by thirds | chi2 | CPU s per cycle |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    rows: list[tuple[str, dict[str, Any]]] = [(METHODS[m][0], METHODS[m][1](climate)) for m in options.methods]
    if options.model:
        rows.append((options.model, {"model": options.model, "background": options.background, "steps": options.steps}))
    for seed, network in itertools.product(options.seeds, options.networks):
        data = twin(options.cycles, options.members, seed, network, climate)
        for name, settings in rows:
            result, cost = run(settings, data, seed, options.members)
            f = scores(result, data[1])
            print(
                f"| {name} | {network} | {seed} | {f['ssh analysis']:.4f} | {f['lower analysis']:.4f} | {f['temperature analysis']:.3f} "
                f"| {f['salinity analysis']:.4f} | {f['ssh background']:.4f} | {f['ssh ratio']:.2f} ({f['ssh low']:.2f}-{f['ssh high']:.2f}) "
                f"| {f['temperature ratio']:.2f} ({f['temperature low']:.2f}-{f['temperature high']:.2f}) "
                f"| {f['ssh third 0']:.3f} {f['ssh third 1']:.3f} {f['ssh third 2']:.3f} | {f['chi2']:.2f} | {cost:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

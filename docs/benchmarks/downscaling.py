"""Downscaling of fields that no method has seen, by diffusion and by classical methods, all with the same verb.

python docs/benchmarks/downscaling.py --cache DIR [--pair a1b ocean] [--members 16] [--picture FILE]

Two pairs, each with years or runs to train on, others to calibrate with, and others again for the scores:

- a1b: annual mean temperature of a climate run, x4, 9 x 12 to 36 x 48 cells, with the bundled model;
- ocean: surface height, temperature, salinity and currents of the ocean twin, x8, 8 x 8 to 64 x 64 cells of a doubly periodic box. The
  model is trained here, in 10 to 20 minutes on one thread, and kept in DIR with the data.

The coarse fields are block means. Spectra are by cosine transform, where the domain is periodic by Fourier transform, as ratios to those of
the truth, in octaves of the wavelength.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import xgenda
from xgenda.demo import crop, training_years, validation_years, withheld_years
from xgenda.verification import power_spectrum, rank_histogram

TRAINING_SEEDS, VALIDATION_SEEDS, TEST_SEEDS = range(12), range(60, 64), (95, 96, 97, 98, 99)
STEPS = 1600
HEAD = (
    "method", "variable", "RMSE", "CRPS", "spread/skill", "chi2", "outer ranks", "power, 2-4 cells", "power, all octaves",
    "power of the mean, 2-4", "block means", "s/date",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pair:
    """Fine fields to train on, to calibrate with and to score with, and the models of a benchmark."""

    factor: int
    training: xr.Dataset
    validation: xr.Dataset
    test: xr.Dataset
    options: dict[str, Any]
    model: xgenda.GenerativeModel
    prior: str


def a1b(cache: Path, every: int, steps: int) -> Pair:
    """Return the climate run, with the bundled downscaler."""
    parts = [crop(ds) for ds in (training_years(), validation_years(), withheld_years(every))]
    return Pair(4, *parts, {}, xgenda.load_model("t2m-north-america-x4"), "t2m-north-america")


def ocean(cache: Path, every: int, steps: int) -> Pair:
    """Return the ocean twin, and train its downscaler where the cache has none."""
    training = simulated(cache / "ocean_training.nc", TRAINING_SEEDS, 90, "4D")
    validation = simulated(cache / "ocean_validation.nc", VALIDATION_SEEDS, 6, "24D")
    test = simulated(cache / "ocean_test.nc", TEST_SEEDS, 4, "24D").isel(time=slice(None, None, every))
    options = {"periodic": "both", "time_features": "none"}
    path = cache / "ocean_diffusion.safetensors"
    if not path.exists():
        begin = time.perf_counter()
        xgenda.train(
            training, task="downscale", factor=8, anchor="spectral", dtype="bfloat16", calibrate=False, steps=steps, name="ocean-x8",
            out=path, **options,
        )  # fmt: skip
        print(f"trained in {time.perf_counter() - begin:.0f} s")
    return Pair(8, training, validation, test, options, xgenda.load_model(path), "ocean-twin")


def simulated(path: Path, seeds: Sequence[int], count: int, every: str) -> xr.Dataset:
    """Return runs of the ocean twin, one after the other in time, from the cache where it has them."""
    if not path.exists():
        runs = [xgenda.tutorial.simulate_ocean(count, every=every, start=f"{2000 + s}-01-01", seed=s) for s in seeds]
        xr.concat(runs, "time").to_netcdf(path, engine="netcdf4")
    with xr.open_dataset(path, engine="netcdf4") as ds:
        return ds.load()


PAIRS: dict[str, Callable[[Path, int, int], Pair]] = {"a1b": a1b, "ocean": ocean}


def calibrated(pair: Pair, path: Path) -> xgenda.GenerativeModel:
    """Return the diffusion model, calibrated on the validation data, from the cache where it has it."""
    if not path.exists():
        begin = time.perf_counter()
        xgenda.calibrate(pair.model, pair.validation).save(path)
        print(f"calibrated in {time.perf_counter() - begin:.0f} s")
    return xgenda.load_model(path)


def ways(pair: Pair, members: int, better: xgenda.GenerativeModel) -> dict[str, Callable[[xr.Dataset], xr.Dataset]]:
    """Return each method as a function of the coarse fields."""
    own: dict[str, Any] = {"task": "downscale", "factor": pair.factor, **pair.options}
    own.pop("time_features", None)

    def by(model: xgenda.GenerativeModel, **options: Any) -> Callable[[xr.Dataset], xr.Dataset]:
        keyword: dict[str, Any] = {"members": members, "seed": 0, "model": model, "target": pair.test} | options
        return lambda coarse: coarse.genda.downscale(**keyword)

    out = {}
    for method in ("bilinear", "bcsd", "ridge"):
        model = xgenda.train(pair.training, method=method, **own)
        out[f"{method}, mean"] = by(model, stage="mean")
        out[f"{method}, past errors"] = by(model)
    out["diffusion, mean"] = by(pair.model, stage="mean")
    out["diffusion"] = by(pair.model)
    out["diffusion, calibrated"] = by(better)
    out["diffusion, calibrated, dpm++ 12"] = by(better, sampler="dpm++", steps=12)
    zero_shot = by(xgenda.load_model(pair.prior), sampler="dpm++", steps=12, target=None)
    out[f"prior {pair.prior}, zero-shot, dpm++ 12"] = lambda coarse: on_grid_of(pair.test, zero_shot(coarse))
    return out


def on_grid_of(truth: xr.Dataset, ds: xr.Dataset) -> xr.Dataset:
    """Return the part of `ds` at the cells of the truth, in its order."""
    near = ds.sel(latitude=truth.latitude, longitude=truth.longitude, method="nearest", tolerance=0.01)
    return near.assign_coords(latitude=truth.latitude, longitude=truth.longitude)


def octaves(ds: xr.Dataset, periodic: Any) -> xr.Dataset:
    """Return the variance in octaves of the wavelength, averaged over times and members; the first is that of 2 to 4 cells."""
    power = power_spectrum(ds, periodic=periodic)
    octave = np.floor(np.log2(power.wavelength.clip(2.0))).astype(int)
    summed = power.assign_coords(octave=octave).groupby("octave").sum()
    return summed.mean([d for d in summed.dims if d != "octave"])


def table(found: xr.Dataset, truth: xr.Dataset, pair: Pair) -> dict[str, list[str]]:
    """Return the scores of each variable as text."""
    periodic, several = pair.options.get("periodic"), "member" in found.dims
    scores = found.genda.verify(truth)
    plain = truth.coarsen(latitude=pair.factor, longitude=pair.factor)
    blocks = found.coarsen(latitude=pair.factor, longitude=pair.factor).mean() - plain.mean()
    true, ours = octaves(truth, periodic), octaves(found, periodic)
    smooth = octaves(found.mean("member"), periodic) if several else ours
    out = {}
    for name in truth.data_vars:
        score = {str(k): float(scores[name].sel(metric=k)) for k in scores.metric.values}
        ranks = "-"
        if several:
            counts = rank_histogram(found[[name]], truth[[name]], dims=["latitude", "longitude"])[name]
            m = counts.sizes["rank"]
            outer = (counts.isel(rank=0) + counts.isel(rank=-1)) / counts.sum("rank") * m / 2
            ranks = f"{float(outer.mean()):.2f} ± {float(outer.std(ddof=1)) / np.sqrt(outer.size):.2f}"
        ratio, mean = ((of[name] / true[name]).values for of in (ours, smooth))
        single = "-" if not several else None
        out[str(name)] = [
            f"{score['rmse']:.4f}", f"{score['crps']:.4f}", single or f"{score['spread_skill']:.2f}", single or f"{score['chi2']:.2f}",
            ranks, single or f"{ratio[0]:.2f}", single or f"{ratio.min():.2f}-{ratio.max():.2f}", f"{mean[0]:.2f}",
            f"{float(abs(blocks[name]).max()) / float(truth[name].std()):.0e}",
        ]  # fmt: skip
    return out


def draw(path: str, truth: xr.Dataset, shown: dict[str, xr.Dataset]) -> None:
    """Draw fields of the first date of each variable: a column for each of `shown`, after the truth."""
    from matplotlib.figure import Figure

    names = list(truth.data_vars)
    columns = {"truth": truth, **shown}
    figure = Figure(figsize=(3 * len(columns), 2.9 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        low, high = np.percentile(truth[name].isel(time=0), [0.5, 99.5])
        for ax, (title, ds) in zip(row, columns.items(), strict=True):
            ax.imshow(ds[name].isel(time=0), vmin=low, vmax=high, origin="lower", cmap="viridis")
            ax.set(title=f"{title}, {name}", xticks=[], yticks=[])
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder for data and the trained model, outside of the repository"
    )
    parser.add_argument("--pair", nargs="*", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--every", type=int, default=1, help="use every how manyth test date")
    parser.add_argument("--only", default="", help="part of the name of the methods to score")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training")
    parser.add_argument("--picture", default=None, help="file for a picture of the first date of the last pair")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    for name in options.pair:
        pair = PAIRS[name](options.cache, options.every, options.steps)
        coarse = pair.test.coarsen(latitude=pair.factor, longitude=pair.factor).mean()
        print(f"\n{name}, x{pair.factor}, {pair.test.sizes['time']} test dates, {options.members} members")
        better = calibrated(pair, options.cache / f"{name}_calibrated.safetensors")
        print(f"factors of the calibration: {better.spec.training['calibration']}")
        methods = ways(pair, options.members, better)
        print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
        for method, way in methods.items():
            if options.only not in method:
                continue
            begin = time.perf_counter()
            found = way(coarse)
            each = (time.perf_counter() - begin) / pair.test.sizes["time"]
            for variable, columns in table(found, pair.test, pair).items():
                print(f"| {method} | {variable} | " + " | ".join(columns) + f" | {each:.2f} |", flush=True)
            if options.picture and method == "diffusion, calibrated":
                members = {f"member {m}": found.isel(member=m) for m in (0, 1)}
                draw(options.picture, pair.test, {"coarse": coarse, "mean": found.mean("member"), **members})


if __name__ == "__main__":
    with xr.set_options(keep_attrs=True):
        main()

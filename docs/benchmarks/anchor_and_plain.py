"""A network with a Gaussian anchor against the same network without, on four series, by training time and density of observations.

python docs/benchmarks/anchor_and_plain.py --series a1b z500 ostia twin --steps 0 200 2000

Both networks have the same size, data and steps of the optimiser (which cost the same to a tenth); only the preconditioning differs. With
no step the anchored model is its own Gaussian (all later models must not be worse), and there is no plain one. The plain network is guided with
the same Gaussian (`anchor`) and by `sda`. Scores are over withheld fields: RMSE of the mean, fair CRPS, spread/skill, at all cells;
observations are single cells with an error of 0.3 climatological standard deviations.

a1b: annual mean temperature, trained to 2039, tested on every fourth year of 2060-2099. z500: 38 members of a forecast ensemble, tested on
12. ostia: monthly sea surface temperature of the tropical oceans, 42 months, tested on the last 12 (from the package iris-sample-data; the
columns with land are left out). twin: the quasi-geostrophic ocean twin, trained on 12 years, tested on a run of another seed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import xgenda
from xgenda.demo import training_years, withheld_years
from xgenda.models.diffusive import DiffusionModel
from xgenda.verification import fair_crps

MEMBERS = 16
ERROR = 0.3
DENSITIES = (0.01, 0.05)


def series(name: str) -> tuple[xr.Dataset, xr.Dataset, dict[str, Any]]:
    """Return training fields, test fields, and options of `train`."""
    if name == "a1b":
        return training_years(), withheld_years(every=4), {"anchor": "auto"}
    if name == "z500":
        ds = xgenda.tutorial.open_dataset("z500-ensemble").drop_vars("time", errors="ignore")  # one time for all members
        return ds.isel(member=slice(0, 38)), ds.isel(member=slice(38, 50)), {"anchor": "auto"}
    if name == "ostia":
        spec = find_spec("iris_sample_data")
        if spec is None or spec.origin is None:
            raise SystemExit("The series 'ostia' is in the package iris-sample-data: pip install --no-deps iris-sample-data")
        with xr.open_dataset(Path(spec.origin).parent / "sample_data" / "ostia_monthly.nc", decode_coords="all") as file:
            ds = file[["surface_temperature"]].load()
        fields = ds.reset_coords(drop=True)
        keep = np.isfinite(fields.surface_temperature).all(("time", "latitude"))
        # the longest stretch of columns without land
        runs = np.split(np.arange(keep.size), np.flatnonzero(np.diff(keep.values.astype(int))) + 1)
        best = max((r for r in runs if keep.values[r[0]]), key=len)
        fields = fields.isel(longitude=best)
        return fields.isel(time=slice(0, 42)), fields.isel(time=slice(42, 54)), {"anchor": "auto", "climatology": "dayofyear"}
    train = [xgenda.tutorial.simulate_ocean(90, every="4D", start=f"{2000 + s}-01-01", seed=s) for s in range(12)]
    test = xgenda.tutorial.simulate_ocean(12, every="24D", start="2020-01-01", seed=99)
    return xr.concat(train, "time"), test, {"anchor": "spectral", "periodic": "both", "dtype": "bfloat16"}


def observe(truth: xr.Dataset, density: float, model: DiffusionModel) -> xr.Dataset:
    """Return gridded observations with NaN where there is none, other cells at every date."""
    dim = next(d for d in ("time", "member") if d in truth.dims)
    out = {}
    for c, name in enumerate(truth.data_vars):
        error = ERROR * float(np.mean(model.scaling.std[c]))
        values = truth[name].values.astype(float)
        rng = np.random.default_rng(c)
        seen = rng.random(values.shape) < density
        noisy = values + error * rng.standard_normal(values.shape)
        out[name] = (truth[name].dims, np.where(seen, noisy, np.nan), truth[name].attrs)
        out[f"{name}_error"] = (truth[name].dims, np.where(seen, error, np.nan), truth[name].attrs)
    return xr.Dataset(out, coords=truth.coords).rename({dim: "time"}) if dim != "time" else xr.Dataset(out, coords=truth.coords)


def score(model: DiffusionModel, truth: xr.Dataset, density: float, **options: Any) -> tuple[float, float, float, float]:
    """Return RMSE, CRPS and spread/skill in climatological standard deviations, averaged over variables, and seconds."""
    obs = observe(truth, density, model)
    dim = next(d for d in ("time", "member") if d in truth.dims)
    if dim == "member":  # members of an ensemble are as good as times
        truth = truth.rename(member="time").assign_coords(time=np.arange(truth.sizes["member"]).astype("datetime64[D]"))
        obs = obs.assign_coords(time=truth.time)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = xgenda.assimilate(truth, obs, model=model, members=MEMBERS, seed=0, progress=False, **options)
    seconds = time.perf_counter() - begin
    scores = []
    for c, name in enumerate(truth.data_vars):
        std = float(np.mean(model.scaling.std[c]))
        ensemble, t = (result[name].transpose("member", ...).values.astype(float) / std, truth[name].values.astype(float) / std)
        error = np.sqrt(((ensemble.mean(0) - t) ** 2).mean())
        spread = np.sqrt(ensemble.var(0, ddof=1).mean() * (MEMBERS + 1) / MEMBERS)
        scores.append((error, fair_crps(ensemble, t).mean(), spread / error))
    rmse, crps, ratio = np.mean(scores, 0)
    return float(rmse), float(crps), float(ratio), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", nargs="+", default=["a1b", "z500", "ostia", "twin"])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 200, 2000])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "xgenda-anchor-and-plain")
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print("| series | network | training | density | guidance | RMSE | CRPS | spread/skill | s | loss | weight |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in options.series:
        train, test, extra = series(name)
        for steps in options.steps:
            for anchor in ("anchored", "plain"):
                if steps == 0 and anchor == "plain":
                    continue
                path = options.cache / f"{name}-{anchor}-{steps}.safetensors"
                if not path.exists():
                    arguments = dict(extra) | ({} if anchor == "anchored" else {"anchor": None})
                    effort: dict[str, Any] = {"steps": steps} if steps else {"steps": 1, "learning_rate": 1e-30}
                    xgenda.train(train, **arguments, **effort, out=path, progress=False, seed=0)
                model = xgenda.load_model(path)
                assert isinstance(model, DiffusionModel)
                record = model.spec.training
                guidances: list[dict[str, Any]] = [{"guidance": "anchor"}]
                if anchor == "plain":
                    guidances.append({"guidance": "sda", "guidance_options": {"gamma": 0.1}})
                for density in options.densities:
                    for guidance in guidances:
                        rmse, crps, ratio, seconds = score(model, test, density, **guidance)
                        loss = f"{record['validation_best'] / record['validation_start']:.3f}" if anchor == "anchored" else ""
                        print(
                            f"| {name} | {anchor} ({record['anchor']}) | {steps} | {density:.0%} "
                            f"| {guidance['guidance']} | {rmse:.4f} | {crps:.4f} | {ratio:.2f} | {seconds:.0f} | {loss} "
                            f"| {record['correction_weight']:.2f} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()

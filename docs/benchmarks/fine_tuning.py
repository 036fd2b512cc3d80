"""Fine-tuning of a bundled prior to another ocean, against training from scratch on the same fields.

python docs/benchmarks/fine_tuning.py [--steps 1000] [--dates 8] [--quick]

The prior ocean-twin is of a current at 38N on cells of 15 km. The other ocean is at 60N on cells of 10 km: another deformation radius in cells
(2.5 instead of 1.7), other speeds, heights and ranges of temperature. There are three runs of 90 fields, four days apart, to train on. Scaling and
Gaussian are fitted to these in both cases; what differs is where the network starts. Every number of steps is a training of its own, with
its own learning rates down to zero.

Scores are the fair CRPS of posterior ensembles on dates of a run with a seed of its own, given 2 % of the cells of all variables with errors of a
quarter of a standard deviation, relative to those of the Gaussian alone and averaged over variables; the same observations for all.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.denoisers import GaussianDenoiser
from xgenda.models.diffusive import DiffusionModel
from xgenda.models.fitting import standardise
from xgenda.training.scoring import posterior_crps

OTHER = {"latitude": 60.0, "longitude": -30.0, "spacing": 10e3, "every": "4D"}


def scored(model: DiffusionModel, truth: xr.Dataset) -> tuple[float, float]:
    """Return CRPS relative to that of the model's own Gaussian, and the standard error over dates."""
    values = np.stack([truth[v.name].values for v in model.spec.variables], 1).astype(np.float64)
    states = torch.as_tensor(standardise(model.scaling, values, truth.time)).reshape(values.shape)
    gaussian = model.covariance
    assert gaussian is not None
    found = posterior_crps(
        {"model": model.denoiser, "gaussian": GaussianDenoiser(torch.zeros(gaussian.size), gaussian)}, gaussian, states, share=0.02,
        members=8,
    )  # fmt: skip
    ratio = (found["model"] / found["gaussian"]).mean(1)
    return float(ratio.mean()), float(ratio.std() / np.sqrt(len(ratio)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of the longest training from scratch")
    parser.add_argument("--dates", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a minute, numbers without meaning")
    options = parser.parse_args()
    times, spinup = (10, "20D") if options.quick else (90, "360D")
    if options.quick:
        options.steps, options.dates = 10, 2
    runs = [
        xgenda.tutorial.simulate_ocean(times, seed=200 + s, spinup=spinup, start=f"{2000 + s}-01-01", **OTHER) for s in range(3)
    ]
    truth = xgenda.tutorial.simulate_ocean(options.dates * 6, seed=299, spinup=spinup, **OTHER).isel(time=slice(None, None, 6))
    ds = xr.concat(runs, "time")
    print("| start | steps | CRPS / Gaussian | kept weight | time [s] |\n|---|---|---|---|---|", flush=True)
    plan = [("ocean-twin", n) for n in (0.05, 0.1, 0.2)] + [(None, n) for n in (0.2, 0.5, 1.0)]
    for start, part in plan:
        steps, begin = max(1, round(options.steps * part)), time.perf_counter()
        extra = {"start": start} if start else {"anchor": "spectral", "periodic": "both"}
        model = xgenda.train(ds, steps=steps, dtype="bfloat16", progress=False, **extra)
        seconds = time.perf_counter() - begin
        ratio, error = scored(model, truth)
        weight = model.spec.training["correction_weight"]
        print(f"| {start or 'scratch'} | {steps} | {ratio:.4f} ± {error:.4f} | {weight:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

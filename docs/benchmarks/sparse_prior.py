"""Sparse observations of withheld years: the diffusion prior beside three Gaussian priors, each tuned on the training years.

python docs/benchmarks/sparse_prior.py [--seeds 10] [--every 1] [--guidance anchor ...]
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np
import pandas as pd
import xarray as xr

import xgenda
from xgenda.demo import POINT_ERROR, scores, sparse_observations, training_years, withheld_years


def tuned_covariance_function(train: xr.Dataset) -> tuple[dict[str, object], xr.Dataset]:
    """Choose kernel, length and standard deviation on the last twenty training years, from the mean of those before."""
    year = train.time.dt.year
    early, late = train.sel(time=year < 2020), train.sel(time=year >= 2020).isel(time=slice(0, 20))
    obs = sparse_observations(late, 40, POINT_ERROR, seed=99)
    mean = early.mean("time", keep_attrs=True).expand_dims(time=late.time)
    found = {}
    for kind, length, std in itertools.product(("exponential", "matern32"), (1e6, 2e6, 4e6, 8e6), (0.7, 1.0, 1.5, 2.0, 3.0)):
        prior = xgenda.gaussian_prior(mean, covariance=kind, length_scale=length, std=std)
        analysis = mean.genda.assimilate(obs, model=prior, error=POINT_ERROR, members=8, seed=0, background_check=None)
        found[kind, length, std] = scores(analysis, late)["crps"]
    kind, length, std = min(found, key=lambda k: found[k])
    return {"covariance": kind, "length_scale": length, "std": std}, train.mean("time", keep_attrs=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--every", type=int, default=1, help="take every so manyth test year")
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--guidance", nargs="*", default=["anchor"])
    options = parser.parse_args()
    truth, train = withheld_years(options.every), training_years()
    grid_only = xr.zeros_like(truth)  # the values of a truth must not reach a prior
    grid_only["air_temperature"].attrs = truth["air_temperature"].attrs
    chosen, mean = tuned_covariance_function(train)
    model = xgenda.load_model("t2m-north-america")
    priors = {f"{k} sample covariance": (xgenda.gaussian_prior(train, covariance=k), "auto") for k in ("localized", "eof")}
    function = xgenda.gaussian_prior(mean.expand_dims(time=truth.time), **chosen)
    priors[f"covariance function ({chosen['covariance']}, {chosen['length_scale'] / 1e3:g} km, {chosen['std']:g} K)"] = (
        function,
        "auto",
    )
    for kind in options.guidance:
        priors[f"diffusion ({kind})"] = (model, kind)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in priors}
    for seed in range(options.seeds):
        obs = sparse_observations(truth, 40, POINT_ERROR, seed)
        for name, (prior, kind) in priors.items():
            state = mean.expand_dims(time=truth.time) if prior is function else grid_only
            begin = time.monotonic()
            analysis = state.genda.assimilate(
                obs,
                model=prior,
                error=POINT_ERROR,
                members=options.members,
                seed=seed,
                guidance=kind,
                background_check=None,
                progress=False,
            )
            rows[name].append({**scores(analysis, truth), "time [s]": time.monotonic() - begin})
        print(f"after {seed + 1} seeds, {truth.sizes['time']} years, {options.members} members")
        table = pd.DataFrame({k: pd.DataFrame(v).mean() for k, v in rows.items()}).T
        table["crps standard error"] = [np.std([r["crps"] for r in v]) / max(1, len(v) - 1) ** 0.5 for v in rows.values()]
        best = min(range(3), key=lambda i: table["crps"].iloc[i])
        difference = np.array([[r["crps"] for r in v] for v in rows.values()])
        print(table.round(4).to_string(), flush=True)
        for i, name in enumerate(list(rows)[3:], 3):
            gap = difference[i] - difference[best]
            print(
                f"  CRPS of {name} minus {list(rows)[best]}: {gap.mean():+.4f} +- {gap.std() / max(1, len(gap) - 1) ** 0.5:.4f}"
            )


if __name__ == "__main__":
    main()

"""Real stations: RMSE of forecast and analysis at withheld stations, over several assignments of stations to folds.

python docs/benchmarks/stations.py [--seeds 5]
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

import xgenda
from xgenda.demo import (
    BACKGROUND_LENGTH,
    BACKGROUND_STD,
    STATION_ERROR,
    scores,
    show,
    station_data,
    station_experiment,
    station_folds,
)


def all_reports(seed: int, members: int) -> dict[str, float]:
    """The same with every usable report scored, also those that the background check rejects (and the analysis never sees)."""
    background, stations, prior = station_data()
    good = stations.isel(obs=np.flatnonzero(np.isfinite(stations.t2m.values)))
    fold = station_folds(good.sizes["obs"], 5, seed)
    square = {"background": 0.0, "analysis": 0.0}
    for k in range(5):
        withheld = good.isel(obs=np.flatnonzero(fold == k))
        analysis = background.genda.assimilate(
            good.isel(obs=np.flatnonzero(fold != k)), model=prior, error=STATION_ERROR, members=members, seed=seed
        )
        for name, field in (("background", background), ("analysis", analysis)):
            square[name] += scores(field, withheld, error=STATION_ERROR)["rmse"] ** 2 * withheld.sizes["obs"] / good.sizes["obs"]
    return {name: value**0.5 for name, value in square.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--members", type=int, default=64)
    options = parser.parse_args()
    print(
        f"prior: exponential, {BACKGROUND_LENGTH / 1e3:g} km, {BACKGROUND_STD:g} K; error {STATION_ERROR} K; xgenda {xgenda.__version__}"
    )
    tables = []
    for seed in range(options.seeds):
        experiment = station_experiment(members=options.members, seed=seed)
        tables.append(experiment.table)
        print(f"folds {seed}\n{experiment.title}\n{show(experiment.table)}")
    print("mean over the assignments to folds")
    print(show(pd.concat(tables).groupby(level=0, sort=False).mean()))
    print("every usable report scored, first assignment:", {k: round(v, 3) for k, v in all_reports(0, options.members).items()})


if __name__ == "__main__":
    main()

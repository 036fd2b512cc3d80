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
    LAPSE_RATE,
    STATION_ERROR,
    fitted_errors,
    scores,
    show,
    station_data,
    station_experiment,
    station_folds,
)

#: Stations far above or below the ground of the forecast are not assimilated, but they are scored.
ANY_HEIGHT = xgenda.QualityControl(height_difference=None)


def wider_sets(seed: int, members: int) -> dict[str, dict[str, float]]:
    """Score at more stations than the background check lets through; the analysis itself never sees those that it rejects."""
    background, stations, _ = station_data()
    usable = stations.isel(obs=np.flatnonzero(np.isfinite(stations.t2m.values)))
    departure = xgenda.innovations(background, usable, error=STATION_ERROR, lapse_rate=LAPSE_RATE).innovation.values
    robust = 1.4826 * np.median(np.abs(departure - np.median(departure)))
    sets = {
        "every usable report": np.isfinite(departure),
        "within 5 robust standard deviations": np.abs(departure) < 5 * robust,
    }
    fold = station_folds(len(departure), 5, seed)
    square = {name: {"background": 0.0, "analysis": 0.0, "chi2": 0.0} for name in sets}
    for k in range(5):
        seen = usable.isel(obs=np.flatnonzero(fold != k))
        fitted = fitted_errors(background, seen)
        analysis = background.genda.assimilate(seen, **fitted, lapse_rate=LAPSE_RATE, members=members, seed=seed)
        for name, inside in sets.items():
            withheld = usable.isel(obs=np.flatnonzero((fold == k) & inside))
            share = withheld.sizes["obs"] / inside.sum()
            after = scores(analysis, withheld, error=fitted["error"], lapse_rate=LAPSE_RATE, quality=ANY_HEIGHT)
            square[name]["analysis"] += after["rmse"] ** 2 * share
            square[name]["chi2"] += after["chi2"] * share
            square[name]["background"] += (
                scores(background, withheld, error=STATION_ERROR, lapse_rate=LAPSE_RATE, quality=ANY_HEIGHT)["rmse"] ** 2 * share
            )
    return {
        f"{name} ({sets[name].sum()})": {k: round(v if k == "chi2" else v**0.5, 3) for k, v in row.items()}
        for name, row in square.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--members", type=int, default=64)
    options = parser.parse_args()
    print(
        f"checks with {BACKGROUND_LENGTH / 1e3:g} km, {BACKGROUND_STD:g} K; error {STATION_ERROR} K; analyses with errors fitted to the "
        f"assimilated stations of each fold; xgenda {xgenda.__version__}"
    )
    tables = []
    for seed in range(options.seeds):
        experiment = station_experiment(members=options.members, seed=seed)
        tables.append(experiment.table)
        print(f"folds {seed}\n{experiment.title}\n{show(experiment.table)}")
    print("mean over the assignments to folds")
    print(show(pd.concat(tables).groupby(level=0, sort=False).mean()))
    wider = [wider_sets(seed, options.members) for seed in range(options.seeds)]
    for name in wider[0]:
        print(name, pd.DataFrame([w[name] for w in wider]).mean().round(3).to_dict())


if __name__ == "__main__":
    main()

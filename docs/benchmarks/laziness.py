"""Time to set up a lazy analysis of 10,000 times x 16 members with 40 observations each; a scheduler that refuses to compute is active.

python docs/benchmarks/laziness.py
"""

from __future__ import annotations

import statistics
import time

import dask
import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

import xgenda


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("something was computed")


def main() -> None:
    model = xgenda.load_model("t2m-north-america")
    grid = model.spec.grid
    times = pd.date_range("2000-01-01", periods=10_000, freq="6h")
    data = da.zeros((len(times), *grid.shape), chunks=(1, -1, -1), dtype="f4")
    ds = xr.Dataset(
        {"air_temperature": (("time", "latitude", "longitude"), data, {"units": "K"})},
        coords={"time": times, "latitude": grid.latitude, "longitude": grid.longitude},
    )
    rng = np.random.default_rng(0)
    for each in (0, 4, 40):
        n = each * len(times)
        obs = xr.Dataset(
            {"air_temperature": ("obs", rng.normal(285, 1, n))},
            coords={
                "latitude": ("obs", rng.uniform(16, 59, n)),
                "longitude": ("obs", rng.uniform(-130, -50, n)),
                "time": ("obs", np.repeat(times.values, each)),
            },
        )
        obs = (
            obs
            if n
            else xr.Dataset(
                {"air_temperature": ("obs", [285.0])},
                {"latitude": ("obs", [40.0]), "longitude": ("obs", [-90.0]), "time": ("obs", times[:1])},
            )
        )
        seconds = []
        with dask.config.set(scheduler=refuse):
            for _ in range(5):
                begin = time.monotonic()
                lazy = ds.genda.assimilate(obs, model=model, error=0.5, members=16, seed=0)
                seconds.append(time.monotonic() - begin)
        print(
            f"{len(times)} times x 16 members, {obs.sizes['obs']} observations: {statistics.median(seconds):.2f} s (median of 5)"
            f", shape {lazy.air_temperature.shape}"
        )


if __name__ == "__main__":
    main()

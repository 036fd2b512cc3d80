"""Downscaling x4 of withheld years, beside bilinear interpolation, ridge regression and the linear mean of the model itself.

python docs/benchmarks/downscaling.py [--members 16] [--every 1]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import xarray as xr

import xgenda
from xgenda.demo import crop, downscaling_experiment, scores, withheld_years


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    begin = time.monotonic()
    experiment = downscaling_experiment("t2m-north-america-x4", members=options.members, every=options.every)
    table = experiment.table
    truth = crop(withheld_years(options.every))
    coarse = truth.coarsen(latitude=4, longitude=4).mean()
    found = experiment.ensemble.air_temperature.coarsen(latitude=4, longitude=4).mean()
    table.loc["linear mean of the model (Gaussian, localised)"] = scores(linear_mean(coarse, truth), truth)
    print(experiment.title)
    print(table.round(4).to_string())
    print(
        f"largest difference of a member's block mean from its input: {np.abs(found.values - coarse.air_temperature.values).max():.1e} K"
    )
    print(f"{time.monotonic() - begin:.0f} s in all")


def linear_mean(coarse: xr.Dataset, truth: xr.Dataset) -> xr.Dataset:
    """Return the conditional mean of the Gaussian under the model, without the diffusion."""
    model = xgenda.load_model("t2m-north-america-x4")
    climate = model.scaling.mean[0]  # type: ignore[attr-defined]
    std = model.scaling.std  # type: ignore[attr-defined]
    blocks = climate.reshape(1, 9, 4, 12, 4).mean((2, 4))
    z = torch.as_tensor((coarse.air_temperature.values[:, None] - blocks) / std)
    fine = model.linear.from_coarse(z.flatten(1)).reshape(len(z), *climate.shape).numpy() * std + climate  # type: ignore[attr-defined]
    out = truth.copy()
    out["air_temperature"] = (truth.air_temperature.dims, fine[:, 0].astype("f4"), truth.air_temperature.attrs)
    return out


if __name__ == "__main__":
    main()

"""Sizes of batches and networks at the same cost: trainings of priors with other options than the defaults.

python docs/benchmarks/defaults.py a1b 16,16,1000 64,16,250
python docs/benchmarks/defaults.py navy 16,16,600 64,16,150 --navy monthly_navy_winds.cdf
python docs/benchmarks/defaults.py ocean 16,16,300 16,32,100

Each training is batch size, width, steps. The first is the training years of the climate runs, the second the winds of small_data.py, the last six
simulated years of the ocean twin. What is compared is the validation loss over that of the Gaussian, of blocks that no step has seen.
"""

from __future__ import annotations

import argparse
import time
import warnings

import xarray as xr
from small_data import navy, split

import xgenda
from xgenda.demo import training_years

OPTIONS = {"a1b": {"anchor": "eof"}, "navy": {}, "ocean": {"anchor": "spectral", "periodic": "both", "dtype": "bfloat16"}}


def fields(name: str, path: str | None) -> xr.Dataset:
    """Return the fields to train on."""
    if name == "a1b":
        return training_years()
    if name == "navy":
        assert path is not None, "--navy monthly_navy_winds.cdf"
        return split(navy(path), 2)[0]
    years = [xgenda.tutorial.simulate_ocean(90, every="4D", start=f"{2000 + s}-01-01", seed=s) for s in range(6)]
    return xr.concat(years, "time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=OPTIONS)
    parser.add_argument("trainings", nargs="+", help="batch size, width, steps: 16,16,1000")
    parser.add_argument("--navy")
    options = parser.parse_args()
    ds = fields(options.data, options.navy)
    print(
        "| batch size | width | steps | validation loss / Gaussian | kept weight | time [s] |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for training in options.trainings:
        batch, width, steps = map(int, training.split(","))
        begin = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", xgenda.errors.LittleDataWarning)
            model = xgenda.train(ds, batch_size=batch, width=width, steps=steps, seed=0, progress=False, **OPTIONS[options.data])
        record, took = model.spec.training, time.monotonic() - begin
        ratio, weight = record["validation_ratio"], record["correction_weight"]
        print(f"| {batch} | {width} | {steps} | {ratio:.3f} | {weight:.2f} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""Train the bundled models: two on the bundled fields, one on the simulated ocean; under an hour on two CPU cores.

    python examples/train_bundled_models.py --out xgenda/data/weights

Training years are those up to 2039 of the A1B and E1 scenarios. The two are one run until 1999, so E1 gives 2000-2039 only.
2040-2059 is a gap, and 2060-2099 of A1B is kept for the scores. The ocean has twelve runs of the quasi-geostrophic twin, a year
each, with the seeds 0 to 11. Prints the entries for weights.toml.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import xarray as xr

import xgenda
from xgenda.demo import crop, training_years

LICENCE = "Apache-2.0; trained on data under the Open Government Licence, British Crown copyright, Met Office"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("weights"))
    parser.add_argument("--steps", type=int, help="1500, and 2000 for the ocean")
    parser.add_argument("--only", choices=["prior", "downscale", "ocean"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    fields = training_years()
    if options.only in (None, "prior"):
        report(train_prior(fields, options.out, options.steps or 1500))
    if options.only in (None, "downscale"):
        report(train_downscaler(fields, options.out, options.steps or 1500))
    if options.only in (None, "ocean"):
        report(train_ocean(options.out, options.steps or 2000))


def train_prior(fields: xr.Dataset, out: Path, steps: int) -> Path:
    name = "t2m-north-america"
    path = out / f"{name}.safetensors"
    xgenda.train(fields, anchor="eof", steps=steps, seed=0, name=name, licence=LICENCE, out=path, overwrite=True)
    return path


def train_downscaler(fields: xr.Dataset, out: Path, steps: int) -> Path:
    name = "t2m-north-america-x4"
    path = out / f"{name}.safetensors"
    # The spread of the cross-validated Gaussian is kept: one calibrated in a cooler climate is too small in a warmer one.
    xgenda.train(
        crop(fields), task="downscale", factor=4, anchor="eof", calibrate=False, steps=steps, seed=0, name=name, licence=LICENCE,
        out=path, overwrite=True,
    )  # fmt: skip
    return path


def train_ocean(out: Path, steps: int) -> Path:
    name = "ocean-twin"
    path = out / f"{name}.safetensors"
    days, runs = (90, 12) if steps > 100 else (10, 6)  # a trial does not need the climate of the ocean
    fields = [xgenda.tutorial.simulate_ocean(days, every="4D", start=f"{2000 + s}-01-01", seed=s) for s in range(runs)]
    xgenda.train(
        xr.concat(fields, "time"), anchor="spectral", periodic="both", steps=steps, dtype="bfloat16", seed=0, name=name,
        licence="Apache-2.0", out=path, overwrite=True,
    )  # fmt: skip
    return path


def report(path: Path) -> None:
    model = xgenda.load_model(path)
    print(model)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f'[[models.{path.stem}.files]]\nfile = "{path.name}"\nsha256 = "{sha256}"\nsize = {path.stat().st_size}\n')


if __name__ == "__main__":
    main()

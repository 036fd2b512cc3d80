"""Make the data sets that are bundled with xgenda, in xgenda/data/.

Three files are copied as they are. The two climate runs (air temperature at 1.5 m over North America, annual means from
1860 to 2099, from the package iris-sample-data) are rounded to multiples of 1/128 K, which is at most 0.0039 K away
from the original, and compressed. Sources and licences: xgenda/data/LICENSES.md. To make them again::

    python examples/prepare_bundled_data.py A1B_north_america.nc E1_north_america.nc --copy FILE.nc ...
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import xarray as xr

STEP = 1 / 128  # K; a power of two, so that rounded values are exact in float32 and compress well
SCENARIOS = {"A1B": "a1b_north_america.nc", "E1": "e1_north_america.nc"}


def prepare(source: Path, out: Path) -> Path:
    """Write the rounded, compressed copy of one climate run and return its path."""
    with xr.open_dataset(source, decode_times=False) as original:
        ds = original.load()
    ds = ds.drop_vars(["forecast_period", "forecast_reference_time"])
    temperature = ds["air_temperature"]
    scenario = temperature.attrs["Model scenario"]
    rounded = (np.round(temperature.values.astype("float64") / STEP) * STEP).astype("float32")
    worst = float(np.abs(rounded.astype("float64") - temperature.values.astype("float64")).max())
    if worst > STEP / 2:
        raise ValueError(f"{source}: rounding moved a value by {worst} K, more than {STEP / 2} K")
    ds["air_temperature"] = temperature.copy(data=rounded)
    ds["air_temperature"].attrs["long_name"] = "annual mean air temperature at 1.5 m"
    ds.attrs = {
        "title": f"Annual mean air temperature at 1.5 m over North America, 1860 to 2099, scenario {scenario}",
        "source": f"Met Office Unified Model 6.05; {source.name} of the package iris-sample-data 2.5.2",
        "license": "Open Government Licence, http://www.nationalarchives.gov.uk/doc/open-government-licence; "
        "British Crown copyright, 2018, the Met Office",
        "comment": "Values are rounded to multiples of 1/128 K (at most 0.0039 K from the original); "
        "forecast_period and forecast_reference_time are left out",
        "Conventions": "CF-1.10",
    }
    for name in ds.variables:
        ds[name].encoding = {"_FillValue": None, "dtype": ds[name].dtype}
    ds["air_temperature"].encoding |= {"zlib": True, "complevel": 9, "shuffle": True, "chunksizes": rounded.shape}
    ds["air_temperature"].encoding["coordinates"] = "height"
    path = out / SCENARIOS[scenario]
    ds.to_netcdf(path, format="NETCDF4", engine="netcdf4")
    print(f"{path}: {path.stat().st_size} bytes, values within {worst:.5f} K of {source.name}")
    return path


def main() -> None:
    """Read the paths from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="A1B_north_america.nc and E1_north_america.nc")
    parser.add_argument("--copy", nargs="*", type=Path, default=[], help="files that are copied as they are")
    parser.add_argument("--out", type=Path, default=Path("xgenda/data"), help="folder to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for run in arguments.runs:
        prepare(run, arguments.out)
    for file in arguments.copy:
        shutil.copyfile(file, arguments.out / file.name)


if __name__ == "__main__":
    main()

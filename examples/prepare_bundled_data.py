"""Make the data sets that are bundled with xgenda, in xgenda/data/.

Three files are copied as they are. The two climate runs (air temperature at 1.5 m over North America, annual means from
1860 to 2099, from the package iris-sample-data) are rounded to multiples of 1/128 K, which is at most 0.0039 K away
from the original, and compressed. Sources and licences: xgenda/data/LICENSES.md. To make them again::

    python examples/prepare_bundled_data.py A1B_north_america.nc E1_north_america.nc --copy z500_ensemble.nc
    python examples/prepare_bundled_data.py --stations europe_synop.nc obs_3day.bufr \\
        --ground europe_t2m_forecast.nc HSURF_regional_model_0.11deg.nc

The second adds the heights of the stations, read from the original reports by eccodes (pip install eccodes), and the height of the
ground on the grid of the forecast: the mean over each of its cells of the orography of a regional model of 0.11 degrees.
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


def add_station_heights(reports: Path, bufr: Path, out: Path) -> None:
    """Write the reports with the heights of their stations, by their places in the original file."""
    import eccodes

    heights = []
    with bufr.open("rb") as file:
        while (handle := eccodes.codes_bufr_new_from_file(file)) is not None:
            eccodes.codes_set(handle, "unpack", 1)
            places = [float(eccodes.codes_get_array(handle, k)[0]) for k in ("latitude", "longitude", "heightOfStation")]
            heights.append(places)
            eccodes.codes_release(handle)
    with xr.open_dataset(reports, decode_times=False) as original:
        ds = original.load()
    found = np.array(heights)[ds["obs"].values]
    if not (np.array_equal(found[:, 0], ds["latitude"].values) and np.array_equal(found[:, 1], ds["longitude"].values)):
        raise ValueError(f"{bufr}: stations are elsewhere than in {reports}")
    known = np.abs(found[:, 2]) < 9000  # missing values are large
    attrs = {"standard_name": "surface_altitude", "long_name": "height of the station", "units": "m"}
    ds = ds.assign_coords(height=("obs", np.where(known, found[:, 2], np.nan).astype("float32"), attrs))
    ds["height"].encoding = {"_FillValue": np.float32(np.nan), "zlib": True, "complevel": 9}
    ds.to_netcdf(out / reports.name)
    print(f"{out / reports.name}: heights of {int(known.sum())} of {len(known)} stations")


def add_ground(forecast: Path, orography: Path, out: Path) -> None:
    """Write the forecast with the height of the ground as a coordinate."""
    import xgenda

    with xr.open_dataset(forecast, decode_times=False) as original, xr.open_dataset(orography, decode_times=False) as fine:
        ds, height = original.load(), fine[["HSURF"]].isel(time=0, drop=True).load()
    mean = xgenda.regrid(height, ds, method="conservative_normed", regridder="builtin").HSURF
    attrs = {
        "standard_name": "surface_altitude", "long_name": "height of the ground, NaN outside the regional model", "units": "m",
        "source": f"{orography.name} of the package libncarg-data 6.6.2, cell means",
    }  # fmt: skip
    ds = ds.assign_coords(orography=(mean.dims, np.round(mean.values).astype("float32"), attrs))
    ds["orography"].encoding = {"_FillValue": np.float32(np.nan), "zlib": True, "complevel": 9, "shuffle": True}
    ds.to_netcdf(out / forecast.name)
    print(f"{out / forecast.name}: {(out / forecast.name).stat().st_size} bytes")


def main() -> None:
    """Read the paths from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="A1B_north_america.nc and E1_north_america.nc")
    parser.add_argument("--copy", nargs="*", type=Path, default=[], help="files that are copied as they are")
    parser.add_argument("--stations", nargs=2, type=Path, metavar=("REPORTS", "BUFR"), help="reports to add heights to")
    parser.add_argument("--ground", nargs=2, type=Path, metavar=("FORECAST", "OROGRAPHY"), help="forecast to add the ground to")
    parser.add_argument("--out", type=Path, default=Path("xgenda/data"), help="folder to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for run in arguments.runs:
        prepare(run, arguments.out)
    for file in arguments.copy:
        shutil.copyfile(file, arguments.out / file.name)
    if arguments.stations:
        add_station_heights(*arguments.stations, arguments.out)
    if arguments.ground:
        add_ground(*arguments.ground, arguments.out)


if __name__ == "__main__":
    main()

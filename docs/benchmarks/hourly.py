"""Real stations, hour by hour: surface reports of North America of one day through `xgenda.cycle`, and a forecast of Europe as one cycle.

    apt-get install libncarg-data ferret-datasets
    python docs/benchmarks/hourly.py [--sao /usr/share/ncarg/data/cdf] [--etopo /usr/share/ferret-vis/data/etopo20.cdf]

The reports are those of 18 March 1995 (University Corporation for Atmospheric Research), as they came over the wire: places that do not
exist, fill values of several kinds, temperatures of 51 degrees. The state is 2 m temperature on half a degree over the contiguous United
States, with the ground of ETOPO20. Stations are dealt to three groups: four fifths are assimilated, a tenth chooses the settings in the hours
from 1 to 6 UTC, and a tenth is scored, from 7 to 23 UTC. The first state is an analysis of the hour 0 from one temperature everywhere.
Forecasts are persistence, or a wave of 24 hours with its crest at 15 h local solar time and an amplitude of 5 K, a guess before any data were
seen.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

import xgenda
from xgenda.demo import LAPSE_RATE, STATION_ERROR, fitted_errors, scores, station_data, station_folds
from xgenda.forecasts import persistence

DAY = "1995-03-18"
AMPLITUDE, CREST = 5.0, 15.0  # K, hours of local solar time
GRID: dict[str, list[float]] = {"length_scale": [100e3, 200e3, 300e3, 500e3], "error": [1.0, 2.0, 4.0]}
STD = 2.0  # K, while tuning; the ratio of error and std is what counts for the analysis, and chi2 then says how large they are
LAST_TUNING_HOUR = 6
GROSS = 10.0  # K, of a departure from the background that is left out of the scores


def reports(folder: Path) -> xr.Dataset:
    """Return the temperatures of all hours as they were sent, as a table along obs."""
    parts = []
    for hour in range(24):
        with xr.open_dataset(folder / f"95{DAY[5:7]}{DAY[8:]}{hour:02d}_sao.cdf", decode_times=False) as raw:
            names = [i.decode().strip("\x00 ") for i in raw["id"].values]
            time = pd.Timestamp(DAY) + pd.Timedelta(hours=hour)
            parts.append(
                xr.Dataset(
                    {"t2m": ("obs", raw["T"].values, {"units": "degC", "standard_name": "air_temperature"})},
                    coords={
                        "latitude": ("obs", raw["lat"].values), "longitude": ("obs", raw["lon"].values),
                        "height": ("obs", raw["elev"].values, {"units": "m", "standard_name": "surface_altitude"}),
                        "time": ("obs", np.full(raw.sizes["report"], time)), "station": ("obs", names),
                    },
                )
            )  # fmt: skip
    return xr.concat(parts, "obs")


def ground(file: Path) -> xr.Dataset:
    """Return a field of one temperature with the height of the ground."""
    latitude, longitude = np.arange(25.0, 50.1, 0.5), np.arange(-125.0, -65.9, 0.5)
    with xr.open_dataset(file, decode_times=False) as raw:
        (name,) = [n for n in raw.data_vars if raw[n].ndim == 2]
        y, x = raw[name].dims
        east = raw[name].assign_coords({x: (raw[x] + 180) % 360 - 180}).sortby(x)
        east = east.isel({x: np.flatnonzero(np.diff(east[x], prepend=-999) > 0)})
        height = east.interp({y: latitude, x: longitude}).clip(min=0.0).values
    return xr.Dataset(
        {"t2m": (("latitude", "longitude"), np.full(height.shape, 280.0), {"units": "K", "standard_name": "air_temperature"})},
        coords={
            "latitude": latitude, "longitude": longitude, "time": pd.Timestamp(DAY),
            "surface_altitude": (("latitude", "longitude"), height, {"units": "m", "standard_name": "surface_altitude"}),
        },
    )  # fmt: skip


def wave(ds: xr.Dataset) -> xr.Dataset:
    """Return the state of an hour later, changed by a wave of 24 hours."""
    after = ds.time + np.timedelta64(1, "h")

    def crest(time: xr.DataArray) -> xr.DataArray:
        local = time.dt.hour + time.dt.minute / 60 + ds.longitude / 15
        return AMPLITUDE * np.cos(2 * np.pi * (local - CREST) / 24)

    changed = ds.t2m + (crest(after) - crest(ds.time)).astype(ds.t2m.dtype)
    return ds.assign(t2m=changed.transpose(*ds.t2m.dims).assign_attrs(ds.t2m.attrs)).assign_coords(time=after)


FORECASTS: dict[str, Callable[[xr.Dataset], xr.Dataset]] = {"persistence": persistence("1h"), "daily wave": wave}


def cycled(
    first: xr.Dataset, obs: xr.Dataset, forecast: str, times: pd.DatetimeIndex, length_scale: float, std: float, error: float, members: int
) -> xr.Dataset:  # fmt: skip
    """Return the backgrounds and analyses of some hours."""
    model = xgenda.gaussian_prior(first, length_scale=length_scale, std=std)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*observations were not used|.*are not used")
        return xgenda.cycle(
            first, obs, forecast=FORECASTS[forecast], model=model, times=times, window="1h", error=error, members=members, seed=0,
            lapse_rate=LAPSE_RATE, guard=None,
        )  # fmt: skip


def departures(run: xr.Dataset, stations: xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hour, background error and analysis error of each report of some stations."""
    inside = stations.isel(obs=np.flatnonzero(np.isin(stations.time.values, run.time.values)))
    found = [
        xgenda.innovations(
            run[["t2m"]].sel(stage=stage, drop=True).mean("member", keep_attrs=True), inside, error=STATION_ERROR, lapse_rate=LAPSE_RATE,
            window="1h", quality=xgenda.QualityControl(buddy=None),
        )
        for stage in ("background", "analysis")
    ]  # fmt: skip
    before, after = (f.innovation.values for f in found)
    good = (found[0].quality_code.values == 0) & (np.abs(before) < GROSS)  # judged by the background for both
    return pd.DatetimeIndex(found[0].time.values[good]).hour.values, before[good], after[good]


def rmse(values: np.ndarray) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(values**2)))


def america(options: argparse.Namespace) -> None:
    """Print the scores of the day."""
    table, flat = reports(options.sao), ground(options.etopo)
    print(f"{table.sizes['obs']} reports of {len(np.unique(table.station))} stations")
    names = np.unique(table.station)
    group = dict(zip(names, np.random.default_rng(options.seed).permutation(np.arange(len(names)) % 10), strict=True))
    of = np.array([group[s] for s in table.station.values])
    seen, tuning, test = (table.isel(obs=np.flatnonzero(w)) for w in (of < 8, of == 8, of == 9))
    zero = seen.isel(obs=np.flatnonzero(seen.time.values == flat.time.values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        start = xgenda.assimilate(
            flat, zero, model=xgenda.gaussian_prior(flat, length_scale=700e3, std=12.0), error=1.5, lapse_rate=LAPSE_RATE, members=2, seed=0,
            window="1h", background_check=None,
        )  # fmt: skip
    first = start.mean("member", keep_attrs=True)
    times = pd.date_range(DAY, periods=24, freq="1h")
    for forecast in FORECASTS:
        found = {}
        for values in itertools.product(*GRID.values()):
            settings = dict(zip(GRID, values, strict=True))
            run = cycled(first, seen, forecast, times[1 : LAST_TUNING_HOUR + 1], std=STD, members=2, **settings)
            found[values] = rmse(departures(run, tuning)[2]), float(run.chi2.mean())
        best = min(found, key=lambda k: found[k][0])
        scale = found[best][1] ** 0.5
        chosen = {"length_scale": best[0], "std": scale * STD, "error": scale * best[1]}
        print(f"\n{forecast}: {', '.join(f'{k} {v:.3g}' for k, v in chosen.items())} (of {len(found)}; {found[best][0]:.3f} K)")
        run = cycled(first, seen, forecast, times[1:], members=options.members, **chosen)
        hour, before, after = departures(run, test)
        print("| hour, UTC | reports | background, K | analysis, K | chi2 | used |")
        print("|---|---|---|---|---|---|")
        for h in range(1, 24):
            of_hour = hour == h
            line = run.isel(time=h - 1)
            print(
                f"| {h} | {of_hour.sum()} | {rmse(before[of_hour]):.2f} | {rmse(after[of_hour]):.2f} | {float(line.chi2):.2f} "
                f"| {int(line.observations_used)} of {int(line.observations_given)} |"
            )
        scored = hour > LAST_TUNING_HOUR
        better = sum(rmse(after[hour == h]) < rmse(before[hour == h]) for h in range(LAST_TUNING_HOUR + 1, 24))
        count = 23 - LAST_TUNING_HOUR
        print(
            f"{LAST_TUNING_HOUR + 1} to 23 UTC: background {rmse(before[scored]):.3f} K, analysis {rmse(after[scored]):.3f} K, "
            f"better in {better} of {count} hours"
        )


def europe() -> None:
    """Print the scores of one cycle of the forecast of Europe, over five folds of its stations."""
    background, stations, _ = station_data()
    fold = station_folds(stations.sizes["obs"], 5, 0)
    squares = []
    for k in range(5):
        seen, withheld = (stations.isel(obs=np.flatnonzero(w)) for w in (fold != k, fold == k))
        fitted = fitted_errors(background, seen)
        run = xgenda.cycle(
            background.isel(time=0),
            seen,
            forecast=persistence("6h"),
            lapse_rate=LAPSE_RATE,
            members=64,
            seed=0,
            times=background.time,
            **fitted,
        )
        squares.append([])
        for stage in ("background", "analysis"):
            part = run[["t2m"]].sel(stage=stage, drop=True)
            good = xgenda.innovations(background, withheld, error=STATION_ERROR, lapse_rate=LAPSE_RATE, model=fitted["model"])
            chosen = withheld.isel(obs=good["row"].values[good["quality_code"].values == 0])
            squares[-1].append(scores(part, chosen, error=fitted["error"], lapse_rate=LAPSE_RATE)["rmse"] ** 2)
    before, after = np.sqrt(np.mean(squares, 0))
    print(f"Europe, one cycle: background {before:.3f} K, analysis {after:.3f} K at withheld stations; chi2 {float(run.chi2.squeeze()):.2f}, used "
          f"{int(run.observations_used.squeeze())} of {int(run.observations_given.squeeze())}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sao", type=Path, default=Path("/usr/share/ncarg/data/cdf"))
    parser.add_argument("--etopo", type=Path, default=Path("/usr/share/ferret-vis/data/etopo20.cdf"))
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the groups of stations")
    options = parser.parse_args()
    europe()
    america(options)


if __name__ == "__main__":
    main()

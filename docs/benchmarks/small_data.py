"""Small data, defaults only: `train` and `gaussian_prior` beside a tuned EOF Gaussian and a tuned covariance function, on later times.

python docs/benchmarks/small_data.py [--navy FILE] [--atlantic FILE] [--norkyst FILE] [--height FILE] [--budget 10min] [--seeds 3] [--times 6]

Nothing is downloaded. The files come from

- monthly_navy_winds.cdf: ``apt-get download ferret-datasets; dpkg -x ferret-datasets_*.deb .`` (usr/share/ferret-vis/data). Monthly winds at
  2.5 degrees, 1982 to 1992; the Pacific, 30S to 60N, and with --atlantic the Atlantic.
- norkyst800_subset_16Nov2015.nc: ``pip download --no-deps --no-binary :all: opendrift==1.14.12`` (tests/test_data/16Nov2015_NorKyst_z_surface).
  Hourly surface currents at 800 m, 67 hours, with coasts; means over 4 x 4 cells, of which all must be sea.
- hgt_djf.nc: ``pip download --no-deps --no-binary :all: eofs==2.0.0`` (lib/eofs/examples/example_data). Height of 500 hPa, means of the winters
  1948 to 2012, 2.5 degrees.

The last fifth of the times is withheld, with a gap before it. Some of them are observed at random cells (all variables) with errors of a quarter of
the standard deviation of the variable, and scored at all others. The EOF Gaussian has rank and inflation by cross-validation of its log
score; the covariance function has kernel, length and standard deviation by the same score in the same blocks, around the same climatology.
Standard errors are over pairs of time and seed, of differences where differences are shown.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.covariances import KERNELS
from xgenda.models.fitting import choose_climatology, correlation_at
from xgenda.models.generative import GenerativeModel
from xgenda.scaling import cycle_basis, fit_scaling
from xgenda.training.windows import blocks, read_samples
from xgenda.verification import fair_crps

FOLDS, PROBES = 6, 300
ERROR = 0.25  # of the observations, in standard deviations of the variable


def navy(path: str, longitude: tuple[float, float] = (120, 290)) -> xr.Dataset:
    """Monthly winds over the Pacific, or between other meridians."""
    ds = xr.open_dataset(path)[["UWND", "VWND"]].rename(FNOCX="longitude", FNOCY="latitude", TIME="time")
    for name, title in (("UWND", "eastward_wind"), ("VWND", "northward_wind")):
        ds[name].attrs = {"units": "m s-1", "standard_name": title}
    ds["latitude"].attrs, ds["longitude"].attrs = {"units": "degrees_north"}, {"units": "degrees_east"}
    return ds.sel(latitude=slice(-30, 60), longitude=slice(*longitude)).astype("float64").load()


def atlantic(path: str) -> xr.Dataset:
    """Monthly winds over the Atlantic: looked at only after everything was settled."""
    return navy(path, (290, 360))


def norkyst(path: str) -> xr.Dataset:
    """Hourly currents with coasts, means of 4 x 4 cells."""
    from pyproj import CRS, Transformer

    ds = xr.open_dataset(path).isel(depth=0, drop=True)
    crs = CRS.from_proj4(ds["projection_stere"].attrs["proj4"])
    blocks_of = ds[["u", "v"]].coarsen(X=4, Y=4, boundary="trim")
    coarse = blocks_of.mean(keep_attrs=True).where(ds[["u", "v"]].isnull().coarsen(X=4, Y=4, boundary="trim").sum() == 0)
    x, y = np.meshgrid(coarse["X"], coarse["Y"])
    longitude, latitude = Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True).transform(x, y)
    coarse = coarse.drop_vars(["X", "Y"]).assign_coords(
        latitude=(("Y", "X"), latitude, {"units": "degrees_north"}), longitude=(("Y", "X"), longitude, {"units": "degrees_east"})
    )
    for name in coarse:
        coarse[name].attrs = {"units": "m s-1", "standard_name": coarse[name].attrs["standard_name"]}
    return coarse.astype("float64").load()


def height(path: str) -> xr.Dataset:
    """Winter means of the height of 500 hPa over the North Atlantic; without the pole, which is one place in many columns."""
    ds = xr.open_dataset(path)[["z"]].isel(pressure=0, drop=True)
    ds["z"].attrs = {"units": "m", "standard_name": "geopotential_height"}
    return ds.sel(latitude=slice(20, 87.5)).load()


DATA = {
    "navy": (navy, 2),
    "atlantic": (atlantic, 2),
    "norkyst": (norkyst, 3),
    "height": (height, 1),
}  # with the number of times in the gap


def split(ds: xr.Dataset, gap: int) -> tuple[xr.Dataset, xr.Dataset]:
    """Return training and test times."""
    n = ds.sizes["time"]
    late = round(0.2 * n)
    return ds.isel(time=slice(0, n - late - gap)), ds.isel(time=slice(n - late, None))


def tuned_function(train: xr.Dataset, test: xr.Dataset) -> tuple[str, GenerativeModel, xr.Dataset]:
    """Return the best covariance function of the training times, and the climatology at the test times as its background."""
    samples = read_samples(train)
    names = [v.name for v in samples.variables]
    fold = blocks(samples.time, len(samples.values), FOLDS)
    options: dict[str, Any] = {"time": samples.time, "names": names, "valid": samples.valid}
    plain = fit_scaling(samples.values, **options)
    cycle = choose_climatology(plain.forward(samples.values, np.ones((len(fold), 1))).reshape(len(fold), -1), samples.time, fold)
    scaling = fit_scaling(samples.values, cycle=cycle, **options)
    basis = cycle_basis(samples.time, cycle, len(fold))
    z = scaling.forward(samples.values, basis).reshape(len(fold), -1)
    cells, valid = samples.grid.size, np.ones(z.shape[1], bool) if samples.valid is None else samples.valid.ravel()
    latitude, longitude = samples.grid.points()
    reach = 111e3 * max(np.ptp(latitude), np.ptp(longitude) * np.cos(np.radians(latitude.mean())))
    found: dict[tuple[str, float, float], float] = {}
    for k in range(FOLDS):
        rest, block = fold != k, fold == k
        probe = np.random.default_rng(k).choice(np.flatnonzero(valid), min(PROBES, int(valid.sum())), replace=False)
        mean = np.linalg.lstsq(basis[rest], z[rest][:, probe], rcond=None)[0]
        field, seen = z[block][:, probe] - basis[block] @ mean, len(probe) // 3
        same = (probe // cells)[:, None] == probe // cells
        noisy = field[:, :seen] + ERROR * np.random.default_rng(0).standard_normal((len(field), seen))
        for kind in KERNELS:
            for length in np.geomspace(reach / 80, reach / 2, 12):
                matrix = correlation_at(samples.grid, kind, length, torch.as_tensor(probe % cells)).numpy() * same
                for std in (0.6, 0.8, 1.0, 1.25, 1.6, 2.0):
                    inner = std**2 * matrix[:seen, :seen] + ERROR**2 * np.eye(seen)
                    gain = np.linalg.solve(inner, std**2 * matrix[:seen, seen:]).T
                    left = np.maximum(std**2 * (1 - (gain * matrix[seen:, :seen]).sum(1)), 1e-6)
                    departure = field[:, seen:] - noisy @ gain.T
                    score = -0.5 * np.mean(departure**2 / left + np.log(left))
                    found[kind, length, std] = found.get((kind, length, std), 0.0) + score
    kind, length, std = max(found, key=lambda c: found[c])
    climate = scaling.climatology(cycle_basis(test["time"], cycle, test.sizes["time"]))
    plane = [d for d in test[names[0]].dims if d != "time"]
    background = xr.Dataset(
        {n: (("time", *plane), climate[:, c].reshape(-1, *samples.grid.plane), test[n].attrs) for c, n in enumerate(names)},
        coords=test.coords,
    ).where(test.notnull())
    for n in names:
        background[n].attrs = test[n].attrs
    unit = dict(zip(names, scaling.std.reshape(len(names)), strict=True))
    given = {n: std * float(u) for n, u in unit.items()}
    prior = xgenda.gaussian_prior(background, covariance=kind, length_scale=float(length), std=given)
    return f"covariance function ({kind}, {length / 1e3:.3g} km, {std:g} std)", prior, background


def networks(truth: xr.Dataset, share: float, std: dict[str, float], seed: int) -> tuple[xr.Dataset, np.ndarray]:
    """Return observations of random cells, other ones at each time, and where they are, shape (time, cells)."""
    rng = np.random.default_rng(seed)
    names = list(truth.data_vars)
    latitude, longitude = (
        np.broadcast_to(c, truth[names[0]].isel(time=0).shape).ravel()
        for c in xr.broadcast(truth["latitude"], truth["longitude"])
    )
    sea = np.flatnonzero(truth.isel(time=0).to_dataarray().notnull().all("variable").values.ravel())
    seen, parts = np.zeros((truth.sizes["time"], len(latitude)), bool), []
    for t in range(truth.sizes["time"]):
        at = rng.choice(sea, max(4, round(share * len(sea))), replace=False)
        seen[t, at] = True
        values = {
            n: ("obs", truth[n].values[t].ravel()[at] + ERROR * std[n] * rng.standard_normal(len(at)), truth[n].attrs)
            for n in names
        }
        place = {"latitude": latitude[at], "longitude": longitude[at], "time": np.repeat(truth["time"].values[t], len(at))}
        parts.append(xr.Dataset(values, coords={k: ("obs", v) for k, v in place.items()}))
    obs = xr.concat(parts, "obs")
    obs["latitude"].attrs, obs["longitude"].attrs = {"units": "degrees_north"}, {"units": "degrees_east"}
    return obs, seen


def priors_of(
    train: xr.Dataset, test: xr.Dataset, budget: str | None
) -> Iterator[tuple[str, GenerativeModel, xr.Dataset, float]]:
    """Yield name, prior, what `assimilate` starts from, and the seconds that it took."""
    grid_only = xr.zeros_like(test).where(test.notnull())  # the values of a truth must not reach a prior
    for n in test:
        grid_only[n].attrs = test[n].attrs
    begin = time.monotonic()
    name, prior, background = tuned_function(train, test)
    yield name, prior, background, time.monotonic() - begin
    for kind in ("eof", "localized", None):
        begin = time.monotonic()
        prior = xgenda.gaussian_prior(train, covariance=kind)
        name = f"gaussian_prior{'' if kind is None else ' ' + kind} ({prior.spec.training['covariance']})"
        yield name, prior, grid_only, time.monotonic() - begin
    begin = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = xgenda.train(train, progress=False, **({} if budget is None else {"time_budget": budget}))
    for said in caught:
        print(f"\ntrain said beforehand: {said.message}")
    record = model.spec.training
    print(
        "\ntrain:",
        {k: v for k, v in record.items() if k in ("anchor", "steps", "best_step", "validation_ratio", "correction_weight")},
    )
    took = time.monotonic() - begin
    anchor_only = copy.deepcopy(model)
    anchor_only.denoiser.network.scale_output(0.0)
    yield f"train without its correction ({record['anchor']})", anchor_only, grid_only, took
    yield f"train (correction at weight {record['correction_weight']:.2f})", model, grid_only, took


def experiment(name: str, path: str, budget: str | None, seeds: int, times: int, members: int) -> None:
    """Print the table of one data set."""
    read, gap = DATA[name]
    train, late = split(read(path), gap)
    chosen = np.linspace(0, late.sizes["time"] - 1, min(times, late.sizes["time"])).round().astype(int)
    test = late.isel(time=chosen)
    std = {str(n): float((train[n] - train[n].mean("time")).std()) for n in train}
    sizes = dict(train.sizes)
    print(
        f"\n## {name}: {sizes}, {train.sizes['time']} times to train, {len(chosen)} to test, {seeds} networks each, {members} members"
    )
    results: dict[str, dict[float, np.ndarray]] = {}
    shares = (0.02, 0.1)
    lines = [f"| prior | fitted in [s] | {' | '.join(f'CRPS {s:.0%} | RMSE | spread/skill' for s in shares)} |"]
    lines.append("|---|---|" + "---|" * 3 * len(shares))
    for label, prior, start, seconds in priors_of(train, test, budget):
        results[label] = {}
        for share in shares:
            rows = []
            for seed in range(seeds):
                obs, seen = networks(test, share, std, seed)
                analysis = xgenda.assimilate(
                    start, obs, model=prior, error={n: ERROR * s for n, s in std.items()}, members=members, seed=seed,
                    background_check=None, progress=False,
                )  # fmt: skip
                per = []
                for n, s in std.items():
                    x = analysis[n].transpose("member", "time", ...).values.reshape(members, len(chosen), -1) / s
                    y = test[n].values.reshape(len(chosen), -1) / s
                    left = ~seen & np.isfinite(y)
                    crps, square = fair_crps(x, y), (x.mean(0) - y) ** 2 * members / (members + 1)
                    spread = x.var(0, ddof=1)
                    per.append([[np.mean(a[t][left[t]]) for t in range(len(chosen))] for a in (crps, square, spread)])
                rows.append(np.mean(per, 0).T)  # (time, score)
            results[label][share] = np.concatenate(rows)
        lines.append(line(label, seconds, results[label]))
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines) + "\n")
    *others, last = results
    for share in shares:
        for label in others:
            gap_ = results[last][share][:, 0] - results[label][share][:, 0]
            error = gap_.std(ddof=1) / len(gap_) ** 0.5
            print(
                f"- {share:.0%}: CRPS of train less that of {label}: {gap_.mean():+.4f} ± {error:.4f} ({gap_.mean() / error:+.1f})"
            )


def line(label: str, seconds: float, found: dict[float, np.ndarray]) -> str:
    """Return a row of the table; `found` holds CRPS, squared error and variance of each pair of time and network, by share."""
    shown = []
    for crps, square, spread in (r.T for r in found.values()):
        error = crps.std(ddof=1) / len(crps) ** 0.5
        ratio = np.sqrt(spread.mean() / square.mean())
        shown += [f"{crps.mean():.4f} ± {error:.4f}", f"{np.sqrt(square.mean()):.3f}", f"{ratio:.2f}"]
    return f"| {label} | {seconds:.0f} | {' | '.join(shown)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in DATA:
        parser.add_argument(f"--{name}")
    parser.add_argument("--budget", default=None, help="of train, such as 10min; by default its own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--times", type=int, default=6)
    parser.add_argument("--members", type=int, default=16)
    options = parser.parse_args()
    print("scores in standard deviations of each variable; errors over pairs of time and network")
    for name in DATA:
        if getattr(options, name) is not None:
            experiment(name, getattr(options, name), options.budget, options.seeds, options.times, options.members)


if __name__ == "__main__":
    main()

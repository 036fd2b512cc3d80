"""Observations denser than the grid: seen by interpolation from its cells, or by a prior over functions at their own places.

python docs/benchmarks/points.py              # about ten minutes on one core
python docs/benchmarks/points.py --quick      # seconds, numbers without meaning

Twins: rough fields and fields with fronts on 128 x 128 points, of which a model knows every eighth along both axes. Stations are points of the fine
grid. Scored are members at withheld points of the fine grid, and at the cells.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import numpy as np
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.kernels import Kernel
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.random_fields import PlaneField

STEP = 0.0125  # degrees between points of the fine grid, around the equator
METRES = STEP * np.pi / 180 * 6_371_229.0
LENGTH, ERROR = 40e3, 0.1


def truth(size: int, count: int, fronts: bool, first: int = 0) -> xr.Dataset:
    """Fields of variance 1, exponential correlations over 40 km; with fronts where such a field of a smoother kernel changes its sign."""
    keys = [(0, "points", k) for k in range(first, first + count)]
    rough = PlaneField((size, size), Kernel("exponential", LENGTH / METRES)).draw(NoiseStream(keys))
    if fronts:
        smooth = PlaneField((size, size), Kernel("matern52", 25e3 / METRES)).draw(
            NoiseStream([(1, "fronts", k) for _, _, k in keys])
        )
        rough = torch.tanh(6 * smooth) + 0.3 * rough
    axis = STEP * (np.arange(size) - size / 2)
    times = np.datetime64("2020-01-01", "ns") + (first + np.arange(count)) * np.timedelta64(1, "D")
    return xr.Dataset(
        {"a": (("time", "latitude", "longitude"), rough.numpy(), {"units": "m"})},
        coords={"time": times, "latitude": axis, "longitude": axis},
    )


def stations(fine: xr.Dataset, last: int, count: int, rng: np.random.Generator) -> xr.Dataset:
    """Return some of the points within the hull of the cells, at each time others."""
    row, column = (xr.DataArray(rng.integers(0, last + 1, count), dims="obs") for _ in range(2))
    return fine.isel(latitude=row, longitude=column).reset_coords(drop=False).set_coords(["latitude", "longitude"])


def scores(members: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Return the root mean square error of the mean and the fair CRPS."""
    m = len(members)
    apart = np.abs(members[:, None] - members[None]).sum((0, 1)) / (2 * m * (m - 1))
    return float(((members.mean(0) - exact) ** 2).mean() ** 0.5), float((np.abs(members - exact).mean(0) - apart).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    warnings.filterwarnings(
        "ignore", message="Squared departures|.*observations are too far"
    )  # of the gridded route with the instrument's error alone
    torch.set_num_threads(1)
    size, factor, train, cases, members, steps, budget, given = (
        (64, 8, 40, 1, 2, 4, 20, (1.0,)) if quick else (128, 8, 400, 4, 16, 16, 600, (0.25, 1.0, 4.0))
    )
    coarse = {"latitude": slice(0, None, factor), "longitude": slice(0, None, factor)}
    for fronts in (False, True):
        sample, fine = truth(size, train, fronts), truth(size, cases, fronts, 10_000)
        cells = fine.isel(coarse)
        last = (cells.sizes["latitude"] - 1) * factor
        begin = time.perf_counter()
        model = xgenda.train(sample.isel(coarse), steps=budget, progress=False, seed=0)
        between = model.between_cells(sample)
        fitted: dict[str, Any] = between.spec.options["between"]
        print(
            f"{'fronts' if fronts else 'rough'}: {cells.a[0].size} cells, trained in {time.perf_counter() - begin:.0f} s; between the cells "
            f"{fitted['covariance']}, {fitted['length_scale']['a'] / 1e3:.0f} km, {fitted['std']['a']:.2f}",
            flush=True,
        )
        mean = xr.full_like(cells, float(sample.a.mean()))
        history = sample.isel(time=slice(0, 20))
        parts = [stations(history.isel(time=[t]), last, 200, np.random.default_rng(t)) for t in range(20)]
        reports = xr.concat([p.stack(row=("time", "obs")).reset_index("row") for p in parts], "row")
        fit = xgenda.fit_covariance(xr.full_like(history.isel(coarse), float(sample.a.mean())), reports.drop_vars("obs")).loc["a"]
        print(f"  Gaussian: exponential, {fit['length_scale'] / 1e3:.0f} km, {fit['std']:.2f}", flush=True)
        kernel = {"length_scale": fit["length_scale"], "std": fit["std"]}
        flat = [xgenda.gaussian_prior(mean, representation=r, **kernel) for r in ("grid", "points")]
        # what a cell does not represent of a point: the best error of the gridded route, from the sample itself
        interpolated = (
            sample.isel(coarse)
            .isel(time=slice(0, 50))
            .interp(latitude=sample.latitude[: last + 1], longitude=sample.longitude[: last + 1])
        )
        missed = float(
            (
                (interpolated.a - sample.a.isel(time=slice(0, 50), latitude=slice(0, last + 1), longitude=slice(0, last + 1)))
                ** 2
            ).mean()
            ** 0.5
        )
        routes = {
            "Gaussian, gridded": (mean, flat[0], 0.0), f"Gaussian, gridded, representativeness {missed:.2f}": (mean, flat[0], missed),
            "Gaussian, points": (mean, flat[1], 0.0),
            "diffusion, gridded": (cells, model, 0.0), f"diffusion, gridded, representativeness {missed:.2f}": (cells, model, missed),
            "diffusion, points": (cells, between, 0.0),
        }  # fmt: skip
        for density in given:
            rng = np.random.default_rng(0)
            count = int(density * cells.a[0].size)
            found: dict[str, list[tuple[float, ...]]] = {name: [] for name in routes}
            for t in range(cases):
                obs, withheld = (stations(fine.isel(time=t, drop=True), last, n, rng) for n in (count, 400))
                obs["a"] = obs.a + ERROR * rng.standard_normal(count)
                asked = xr.Dataset(
                    coords={
                        n: ("place", np.r_[withheld[n], cells.a[t].stack(p=("latitude", "longitude"))[n].values])
                        for n in ("latitude", "longitude")
                    }
                )
                exact = np.r_[withheld.a.values, cells.a[t].values.ravel()]
                for name, (states, prior, missing) in routes.items():
                    options: dict[str, Any] = {
                        "model": prior,
                        "error": ERROR,
                        "representativeness": missing,
                        "seed": t,
                        "members": members,
                        "background_check": None,
                    }
                    options |= {"steps": steps} if prior in (model, between) else {"members": 2 * members}
                    begin = time.perf_counter()
                    result = xgenda.assimilate(states.isel(time=[t]), obs, at=asked, progress=False, **options)
                    values = result.a.values[:, 0]
                    found[name].append(
                        (
                            *scores(values[:, :400], exact[:400]),
                            *scores(values[:, 400:], exact[400:]),
                            time.perf_counter() - begin,
                        )
                    )
            print(f"  {density:g} stations a cell: rmse and crps at withheld points, at the cells; seconds", flush=True)
            for name, each in found.items():
                line = " ".join(f"{v:7.3f}" for v in np.mean(each, 0))
                print(f"    {name:48s} {line}", flush=True)


if __name__ == "__main__":
    main()

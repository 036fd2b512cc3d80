"""Speed of regridding weights, of their application, of a million scattered observations, of footprints and of scattered sources.

python docs/benchmarks/regridding.py

Interleaved repeats, medians. The reference of the application is the product of the same matrix in scipy.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import xarray as xr

import xgenda
from xgenda import regridding
from xgenda.curvilinear import PointSet
from xgenda.grids import Grid
from xgenda.observations.containers import Wanted
from xgenda.observations.operators import locate_observations
from xgenda.observations.quality import buddy_check
from xgenda.spherical import positions
from xgenda.weights import footprint_means, interpolation


def globe(ny: int, nx: int) -> xr.Dataset:
    """Return the coordinates of a grid with rows at the poles."""
    return xr.Dataset(coords={"latitude": np.linspace(-90, 90, ny), "longitude": 360 / nx * np.arange(nx)})


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def weights(repeats: int) -> None:
    source, target = globe(721, 1440), globe(181, 360)
    fields = np.random.default_rng(0).normal(size=(24, 721, 1440))
    ds = source.assign(t=(("time", "latitude", "longitude"), fields))
    print("| method | weights [s] | 24 fields [ms] | scipy [ms] |\n|---|---|---|---|")
    for method in ("bilinear", "conservative", "nearest"):
        build = []
        for _ in range(repeats):
            regridding._kept.clear()
            build.append(seconds(lambda m=method: xgenda.Regridder(source, target, method=m, regridder="builtin")))
        made = xgenda.Regridder(source, target, method=method, regridder="builtin")
        flat = fields.reshape(24, -1)
        pairs = []
        for _ in range(2 * repeats):
            begin = time.perf_counter()
            made(ds)
            middle = time.perf_counter()
            np.ascontiguousarray((made.map.matrix @ flat.T).T)
            pairs.append((middle - begin, time.perf_counter() - middle))
        ours, theirs = np.median(pairs, axis=0) * 1e3
        print(f"| {method} | {np.median(build):.2f} | {ours:.0f} | {theirs:.0f} |", flush=True)


def observations(count: int, repeats: int) -> None:
    rng = np.random.default_rng(0)
    latitude = np.degrees(np.arcsin(rng.uniform(-1, 1, count)))
    frame = pd.DataFrame({
        "latitude": latitude, "longitude": rng.uniform(-180, 180, count), "t": 280 + rng.normal(size=count),
        "station": rng.integers(0, count // 2, count).astype(str),
    })  # fmt: skip
    grid = Grid(np.linspace(-90, 90, 721), -180 + 0.25 * np.arange(1440))
    wanted = [Wanted("t", "air_temperature", "K")]
    field = rng.normal(size=grid.size)
    made, _ = interpolation(grid, latitude, frame.longitude.to_numpy())
    value = made(field)
    made.adjoint(value)
    print("\n| what | time |\n|---|---|")
    longitude = frame.longitude.to_numpy()
    build = [seconds(lambda: interpolation(grid, latitude, longitude)) for _ in range(repeats)]
    print(f"| LinearMap onto 721 x 1440 | {np.median(build):.2f} s |")
    both = [seconds(lambda: made(field)) + seconds(lambda: made.adjoint(value)) for _ in range(5 * repeats)]
    print(f"| one application and its adjoint | {np.median(both) * 1e3:.0f} ms |")
    read = [seconds(lambda: locate_observations(frame, wanted, grid, None, error=1.0)) for _ in range(repeats)]
    print(f"| reading, map, quality control before the background, sorting | {np.median(read):.2f} s |")
    departure, ones = rng.normal(size=count) * np.sqrt(2), np.ones(count)
    buddies = [
        seconds(lambda: buddy_check(latitude, frame.longitude.to_numpy(), departure, ones, ones, 4.0, 100e3))
        for _ in range(repeats)
    ]
    print(f"| buddy check | {np.median(buddies):.2f} s |")
    print(f"| largest memory of the program | {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB |")


def areas_and_points(repeats: int) -> None:
    """Time footprints, interpolation between points, and a regridder on tensors."""
    rng = np.random.default_rng(0)
    grid = Grid(np.linspace(-90, 90, 721), -180 + 0.25 * np.arange(1440))
    latitude, longitude = np.degrees(np.arcsin(rng.uniform(-1, 1, 1_000_000))), rng.uniform(-180, 180, 1_000_000)
    few = slice(200_000)
    print("\n| what | time [s] |\n|---|---|")
    for shape, radius in (("disc", 50e3), ("gaussian", 25e3)):
        build = [
            seconds(lambda s=shape, r=radius: footprint_means(grid, latitude[few], longitude[few], r, s)) for _ in range(repeats)
        ]
        cells = footprint_means(grid, latitude[:1000], longitude[:1000], radius, shape)[0].lengths.mean()
        print(
            f"| 200,000 footprints, {shape}, {radius / 1e3:.0f} km, {cells:.0f} cells each | {np.median(build):.2f} |", flush=True
        )
    nodes = positions(rng.normal(size=(100_000, 3)))
    print(
        f"| triangles of 100,000 points | {np.median([seconds(lambda: PointSet(*nodes).triangles) for _ in range(repeats)]):.2f} |"
    )
    points = PointSet(*nodes)
    found = [seconds(lambda: interpolation(points, latitude, longitude)) for _ in range(repeats)]
    print(f"| a million observations between them | {np.median(found):.2f} |", flush=True)
    made = xgenda.Regridder(globe(721, 1440), globe(181, 360), method="conservative", regridder="builtin")
    fields, apply = (
        torch.randn(24, 721, 1440, generator=torch.Generator().manual_seed(0)).double(),
        xgenda.operators.as_torch(made),
    )
    apply(fields)
    fields.requires_grad_(True)
    both = [seconds(lambda: apply(fields).sum().backward()) for _ in range(repeats)]
    print(f"| 24 fields 721 x 1440 to 181 x 360 in torch, and their gradient | {np.median(both):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--observations", type=int, default=1_000_000)
    parser.add_argument("--only", choices=["weights", "observations", "areas"])
    options = parser.parse_args()
    if options.only in (None, "observations"):
        observations(options.observations, options.repeats)
    if options.only in (None, "weights"):
        weights(options.repeats)
    if options.only in (None, "areas"):
        areas_and_points(options.repeats)


if __name__ == "__main__":
    main()

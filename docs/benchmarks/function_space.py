"""Random fields: their covariance, and what they cost up to 1024 x 1024; a prior over functions at the resolution of its training and finer.

python docs/benchmarks/function_space.py              # fields: a few minutes on one core
python docs/benchmarks/function_space.py --prior      # and priors of functions, trained here: half an hour on two cores
python docs/benchmarks/function_space.py --quick      # seconds, numbers without meaning
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import xgenda
from xgenda.diffusion.kernels import Kernel
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.random_fields import PlaneField, TorusField
from xgenda.diffusion.spherical_fields import SphereField

KERNELS = {
    "exponential, 0.1": Kernel("exponential", 0.1),
    "matern32, 0.1": Kernel("matern32", 0.1),
    "matern52, 0.1": Kernel("matern52", 0.1),
    "gaussian, 0.1": Kernel("gaussian", 0.1),
    "published, 0.05": Kernel("published", 0.05),
}


def stream(first: int, count: int) -> NoiseStream:
    return NoiseStream([(0, "fields", k) for k in range(first, first + count)])


def covariances(size: int, count: int) -> None:
    """Largest difference of the covariance of drawn fields from the kernel, over all lags, as a share of the variance.

    Averaged over the places of a field, as homogeneity allows: on a torus over all, on a plane over those pairs that it has.
    """
    print(
        f"covariance of {count} fields on {size} x {size} cells: largest error over all lags, share of the variance", flush=True
    )
    for name, kernel in KERNELS.items():
        torus = TorusField((size, size), kernel)
        plane = PlaneField((size, size), kernel, spacing=(1 / size, 1 / size))
        found, padded = torch.zeros(size, size, dtype=torch.float64), torch.zeros(2 * size, size + 1, dtype=torch.complex128)
        for first in range(0, count, 250):
            noise = stream(first, min(250, count - first))
            spectrum = torch.fft.rfft2(torus.draw(noise), norm="forward").abs().square().sum(0)
            found += torch.fft.irfft2(spectrum.to(torch.complex128), s=(size, size), norm="forward")
            fields = plane.draw(stream(first, min(250, count - first)))
            padded += torch.fft.rfft2(torch.nn.functional.pad(fields, (0, size, 0, size))).abs().square().sum(0)
        pairs = torch.arange(size, 0, -1, dtype=torch.float64)
        on_plane = torch.fft.irfft2(padded, s=(2 * size, 2 * size))[:size, :size] / count / (pairs[:, None] * pairs)
        half = size // 2  # lags with at least a quarter of the pairs
        wrong = [
            float((found / count - torus.covariance()).abs().max()),
            float((on_plane - plane.covariance())[:half, :half].abs().max()),
        ]
        print(f"  {name:18s} torus {wrong[0]:.4f}   plane {wrong[1]:.4f} (torus of {plane.torus[0]})", flush=True)


def seconds(call: Callable[[], object], times: int) -> float:
    call()
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def costs(sizes: tuple[int, ...], dense: int) -> None:
    """Seconds of set-up, of a draw and of K x on one core; a dense Cholesky factor for as long as one has patience."""
    print("cost in seconds on one core: set-up, one field, K x; per cell and log2 of cells: nanoseconds", flush=True)
    for size in sizes:
        times = max(1, 256 // size)
        kernel = Kernel("matern32", 0.05)
        begin = time.perf_counter()
        field = TorusField((size, size), kernel)
        ready = time.perf_counter() - begin
        one, x = seconds(lambda: field.draw(stream(0, 1)), times), torch.randn(1, 1, size, size)  # noqa: B023
        product = seconds(lambda: field.apply(x), times)  # noqa: B023
        line = f"  {size:5d}   {ready:8.3f} {one:8.4f} {product:8.4f}   {one / size**2 / np.log2(size**2) * 1e9:6.2f}"
        plane = PlaneField((size, size), kernel, spacing=(1 / size, 1 / size))
        line += f"   plane {seconds(lambda: plane.draw(stream(0, 1)), times):8.4f}"  # noqa: B023
        if size <= dense:
            cells = torch.arange(size**2)
            begin = time.perf_counter()
            torch.linalg.cholesky(field.block(cells[:, None], cells) + 1e-4 * torch.eye(size**2))
            line += f"   dense {time.perf_counter() - begin:8.2f}"
        print(line, flush=True)
    for rows in [n // 4 for n in sizes]:
        latitude = torch.linspace(-90 + 90 / rows, 90 - 90 / rows, rows)
        sphere = SphereField(latitude, torch.arange(2 * rows) * (180 / rows), Kernel("matern32", 1e6))
        print(
            f"  sphere {rows:4d} x {2 * rows:4d}, degree {sphere.cutoff}: {seconds(lambda: sphere.draw(stream(0, 1)), 1):.3f}", flush=True  # noqa: B023
        )  # fmt: skip


def box(values: np.ndarray) -> xr.Dataset:
    n = values.shape[-1]
    return xr.Dataset(
        {"a": (("time", "latitude", "longitude"), values, {"units": "m"})},
        coords={
            "time": np.datetime64("2020-01-01", "ns") + np.arange(len(values)) * np.timedelta64(1, "D"),
            "latitude": 30 + 3.2 / n * np.arange(n), "longitude": 3.2 / n * np.arange(n),
        },
    )  # fmt: skip


def truth(size: int, count: int, first: int = 0) -> Tensor:
    """Fields that are not Gaussian: fronts, from a smooth field through a steep function; the same functions on every grid."""
    smooth = TorusField((4 * size, 4 * size), Kernel("gaussian", 0.15), cutoff=size // 4).draw(stream(10_000 + first, count))
    fronts = torch.fft.rfft2(torch.tanh(3 * smooth), norm="forward")
    k = torch.arange(-(size // 2) + 1, size // 2)
    kept = torch.zeros(count, size, size // 2 + 1, dtype=fronts.dtype)
    kept[:, k[:, None] % size, : size // 2] = fronts[:, k[:, None] % (4 * size), : size // 2]
    return torch.fft.irfft2(kept, s=(size, size), norm="forward")


def bands(values: np.ndarray, edges: tuple[int, ...]) -> list[float]:
    """Variance in bands of wavenumber."""
    n = values.shape[-1]
    power = (np.abs(np.fft.fft2(values, norm="forward")) ** 2).mean(tuple(range(values.ndim - 2)))
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(n) * n, np.fft.fftfreq(n) * n))
    return [float(power[(k >= a) & (k < b)].sum()) for a, b in itertools.pairwise(edges)]


def priors(size: int, count: int, budget: str, members: int, steps: int) -> None:
    """Models of functions trained on one grid, and asked for twice as fine a one."""
    fields = truth(size, count).numpy()
    ds, edges = box(fields), tuple(int(e) for e in (1, size / 8, size / 4, size / 2, size))
    print(
        f"variance of a prior trained at {size} x {size}, in bands of wavenumber {edges}: at {size}, and refined to {2 * size}",
        flush=True,
    )
    fine = truth(2 * size, 64, count).numpy()
    print(f"  {'truth':44s} " + " ".join(f"{b:9.2e}" for b in bands(fine, edges)), flush=True)
    runs: dict[str, dict[str, Any]] = {
        "uno, white noise": {"architecture": "uno", "anchor": None},
        "uno, exponential 0.1": {"architecture": "uno", "noise": {"kind": "exponential", "length": 0.1}},
        f"uno, exponential 0.1, cutoff {size // 2 - 1}": {
            "architecture": "uno", "noise": {"kind": "exponential", "length": 0.1, "cutoff": size // 2 - 1},
        },
        "unet, white noise": {"architecture": "unet", "anchor": None},
    }  # fmt: skip
    coarse, wanted = box(fine[:1, ::2, ::2]), box(fine[:1])
    obs = coarse.isel(latitude=slice(0, None, 4), longitude=slice(0, None, 4))
    for name, options in runs.items():
        model = xgenda.train(ds, periodic="both", time_budget=budget, progress=False, seed=0, **options)
        print(f"  {name}: {model.spec.training['steps']} steps, highest noise {model.spec.options['sigma_max']:.0f}", flush=True)
        for n, states in ((size, coarse), (2 * size, wanted)):
            if n > size and "noise" not in options:
                continue
            asked = model if n == size else model.refined(2)
            call = {"model": asked, "members": members, "steps": steps, "seed": 0, "guidance": "mmps", "progress": False}
            far = obs.assign(a_error=xr.full_like(obs.a, 1e4))  # says nothing: members of the prior
            try:
                found = xgenda.assimilate(states, far, **call).a.values
                near = xgenda.assimilate(states, obs.assign(a_error=xr.full_like(obs.a, 0.1)), **call)
            except xgenda.errors.StateError as error:
                print(f"  {n:44d} {error}", flush=True)
                continue
            score = near.genda.verify(states).a.sel(metric=["rmse", "crps"]).values
            print(f"  {n:44d} " + " ".join(f"{b:9.2e}" for b in bands(found, edges)), end="", flush=True)
            print(f"   rmse {score[0]:.3f}, crps {score[1]:.3f} from {obs.a.size} points", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--prior", action="store_true", help="train priors too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        covariances(16, 100)
        costs((32, 64), 32)
        priors(16, 40, "5s", 2, 4)
        return
    covariances(64, 10_000)
    costs((64, 128, 256, 512, 1024), 64)
    if options.prior:
        torch.set_num_threads(2)
        priors(32, 1000, "5min", 8, 24)


if __name__ == "__main__":
    main()

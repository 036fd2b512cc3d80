"""Training from a store of 50 GB that does not exist: memory, waiting time of the network, speed of the statistics.

python docs/benchmarks/streaming.py [--gigabytes 50] [--statistics 50] [--steps 300] [--pairs] [--quick]

The store is a Zarr store whose chunks are computed when they are asked for: four variables on 64 x 64 cells, hourly, 256 times to a chunk, with
a seasonal and a daily cycle and slow waves, uncompressed. What the store computes counts as reading. Times are of the clock.

- memory: the most that the process ever held (VmHWM), with torch and all;
- busy: the part of the time of the steps of `xgenda.train` (the small U-Net, with validation and scores) that does not wait for data;
- statistics: climatology with harmonics of year and day, standard deviation, range and checks of the first so many gigabytes, in one pass.

With --pairs a second store has the means over 4 x 4 cells, 128 times to a chunk, and a downscaler is trained on both: a linear mean, a network that
regresses what it leaves, and a diffusion of the residual.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import time
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
import zarr.storage

import xgenda
from xgenda.training import corpus, pairstreams, reservoirs
from xgenda.training.pairstreams import PairFields
from xgenda.training.sources import Source, open_source
from xgenda.training.statistics import gather
from xgenda.training.streaming import Streamed

NY = NX = 64
CHUNK, FACTOR = 256, 4
VARIABLES = {"t2m": (280.0, 10.0), "u10": (2.0, 5.0), "v10": (-1.0, 5.0), "msl": (101300.0, 800.0)}
PERIODS = np.array([61.0, 73.0, 97.0, 141.0, 173.0, 221.0, 307.0, 411.0])  # hours
REPEATED = 4  # chunks of waves that are kept
BATCH = 16


class Virtual(zarr.storage.MemoryStore):
    """A store that holds metadata and coordinates, and computes the chunks of the variables."""

    coarse = False

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the bytes of a key."""
        match = re.fullmatch(r"(\w+)/c/(\d+)/0/0", key)
        if match is None or match[1] not in VARIABLES:
            return await super().get(key, prototype, byte_range)
        found = chunk(match[1], int(match[2]), self.coarse)
        return prototype.buffer.from_array_like(found.reshape(-1).view("B"))


class VirtualMeans(Virtual):
    """The means over blocks of cells."""

    coarse = True


def chunk(variable: str, number: int, coarse: bool) -> np.ndarray:
    """Return the fields of a chunk: some of the waves, and the cycles of the year and of the day."""
    mean, spread = VARIABLES[variable]
    times, fields = (CHUNK // 2, MEANS[variable]) if coarse else (CHUNK, WAVES[variable])
    hours = np.arange(number * times, (number + 1) * times)
    cycles = mean + spread * (np.cos(2 * np.pi * hours / 8766) + 0.3 * np.cos(2 * np.pi * hours / 24))
    return np.asarray(fields[hours % len(fields)] + cycles[:, None, None].astype(np.float32))


def waves(seed: int, spread: float) -> np.ndarray:
    """Return fields of smooth patterns that go around at periods of their own, shape (times, rows, columns)."""
    rng = np.random.default_rng(seed)
    wave = np.hypot(np.fft.fftfreq(NY)[:, None], np.fft.rfftfreq(NX)) * NY
    spectrum = np.fft.rfft2(rng.standard_normal((2 * len(PERIODS), NY, NX))) * np.exp(-((wave / 6) ** 2))
    smooth = np.fft.irfft2(spectrum, s=(NY, NX))
    smooth *= spread / (smooth.std((-2, -1), keepdims=True) * np.sqrt(len(PERIODS)))
    phase = 2 * np.pi * np.arange(REPEATED * CHUNK)[:, None] / PERIODS
    fields = np.concatenate([np.cos(phase), np.sin(phase)], 1) @ smooth.reshape(2 * len(PERIODS), -1)
    return np.asarray(fields.reshape(REPEATED * CHUNK, NY, NX), np.float32)


WAVES = {name: waves(k, spread) for k, (name, (_, spread)) in enumerate(VARIABLES.items())}


def means(fields: np.ndarray) -> np.ndarray:
    """Return means over blocks of cells."""
    return np.asarray(fields.reshape(*fields.shape[:-2], NY // FACTOR, FACTOR, NX // FACTOR, FACTOR).mean((-3, -1)), np.float32)


MEANS = {name: means(fields) for name, fields in WAVES.items()}


def store(gigabytes: float, coarse: bool = False) -> xr.Dataset:
    """Return the Dataset of a virtual store as it is opened from files; of block means of as many times where it is coarse."""
    times = max(1, round(gigabytes * 1e9 / (4 * CHUNK * NY * NX * len(VARIABLES)))) * CHUNK
    size, stored = (NY // FACTOR, NX // FACTOR) if coarse else (NY, NX), CHUNK // 2 if coarse else CHUNK
    empty = da.zeros((times, *size), chunks=(stored, *size), dtype=np.float32)
    dims = ("time", "latitude", "longitude")
    latitude, longitude = np.linspace(35, 66.5, NY), np.linspace(-10, 21.5, NX)
    coords = {
        "time": pd.date_range("1950-01-01", periods=times, freq="h", unit="s"),
        "latitude": latitude.reshape(size[0], -1).mean(1),
        "longitude": longitude.reshape(size[1], -1).mean(1),
    }
    ds = xr.Dataset(dict.fromkeys(VARIABLES, (dims, empty)), coords)
    virtual = VirtualMeans() if coarse else Virtual()
    encoding: dict[str, Any] = {n: {"compressors": None, "chunks": (stored, *size), "filters": None} for n in VARIABLES}
    ds.to_zarr(virtual, compute=False, encoding=encoding, consolidated=False, zarr_format=3)
    opened: xr.Dataset = xr.open_zarr(virtual, chunks=None, consolidated=False)
    return opened


def peak() -> float:
    """Return the most memory that this process ever held, in MB."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return float(match[1]) / 1e3 if match else float("nan")


def timed(batches: Any) -> Any:
    """Return a method that yields batches, and counts how long a training waits for them."""

    def found(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.closing(batches(self, *args, **kwargs)) as served:
            for k in itertools.count():
                asked = time.perf_counter()
                batch = next(served)
                WAITED.append(time.perf_counter() - asked if k else 0.0)  # the first waits for the first chunks
                yield batch

    return found


WAITED: list[float] = []


def trained(ds: xr.Dataset, target: xr.Dataset | None, steps: int, memory: int) -> tuple[float, float]:
    """Train for some steps, as a user would; return the seconds that they took, and those spent waiting for data."""
    if target is None:
        Streamed.batches = timed(Streamed.batches)  # type: ignore[method-assign]
        corpus.BUFFER = memory * 2**20
        model = xgenda.train(ds, steps=steps, batch_size=BATCH, memory="100MB", progress=False)
    else:
        PairFields.batches = timed(PairFields.batches)  # type: ignore[method-assign]
        reservoirs.BUFFER = pairstreams.BUFFER = memory * 2**20
        model = xgenda.train(ds, target=target, task="downscale", steps=steps, batch_size=BATCH, memory="200MB", progress=False)
    record = model.spec.training
    print(f"linear mean: {record.get('linear_mean', 'none')}; {record['card']}")
    return float(record["seconds"] + record.get("mean_seconds", 0.0)), sum(WAITED)


def passed_over(sources: list[Source]) -> tuple[float, float]:
    """Return the bytes of some fields, and the seconds that their statistics take."""
    begin = time.perf_counter()
    found = sum(gather(s, "dayofyear+hour", cache=False)[0].nbytes for s in sources)
    return found, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=50.0, help="size of the store")
    parser.add_argument("--statistics", type=float, default=None, help="gigabytes to pass over; all by default")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--memory", type=int, default=256, help="MB for states that wait")
    parser.add_argument("--pairs", action="store_true", help="a downscaler instead of a prior")
    parser.add_argument("--quick", action="store_true", help="a small store and few steps")
    options = parser.parse_args()
    if options.quick:
        options.gigabytes, options.steps = 0.5, 20
    print(f"after imports: peak {peak():.0f} MB")
    fine = store(options.gigabytes)
    sides = [fine, store(options.gigabytes, coarse=True)] if options.pairs else [fine]
    opened = [open_source(ds) for ds in sides]
    total = sum(s.nbytes for s in opened)
    print(f"store of {total / 1e9:.1f} GB, {opened[0].size} times, opened: peak {peak():.0f} MB")
    if options.statistics is not None:
        count = int(options.statistics * 1e9 / sum(s.row_bytes for s in opened))
        opened = [open_source(ds.isel(time=slice(0, count))) for ds in sides]
    found, seconds = passed_over(opened)
    print(f"statistics of {found / 1e9:.1f} GB: {found / 1e6 / seconds:.0f} MB/s, {seconds:.0f} s, peak {peak():.0f} MB")
    ds, target = (sides[1], sides[0]) if options.pairs else (fine, None)
    seconds, waited = trained(ds, target, options.steps, options.memory)
    print(
        f"training: {len(WAITED)} steps of {BATCH}, {1e3 * seconds / len(WAITED):.0f} ms each, busy {100 * (1 - waited / seconds):.1f} %, "
        f"peak {peak():.0f} MB"
    )


if __name__ == "__main__":
    main()

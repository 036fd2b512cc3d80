"""Training from a store of 50 GB that does not exist: memory, waiting time of the network, speed of the statistics.

python docs/benchmarks/streaming.py [--gigabytes 50] [--statistics 50] [--steps 300] [--quick]

The store is a Zarr store whose chunks are computed when they are asked for: four variables on 64 x 64 cells, hourly, 256 times to a chunk, with
a seasonal and a daily cycle and slow waves, uncompressed. What the store computes counts as reading. Times are of the clock.

- memory: the most that the process ever held (VmHWM), with torch and all;
- busy: the part of the time of the steps of `xgenda.train` (the small U-Net, with validation and scores) that does not wait for data;
- statistics: climatology with harmonics of year and day, standard deviation, range and checks of the first so many gigabytes, in one pass.
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
from xgenda.training import corpus
from xgenda.training.sources import open_source
from xgenda.training.statistics import gather
from xgenda.training.streaming import Streamed

NY = NX = 64
CHUNK = 256
VARIABLES = {"t2m": (280.0, 10.0), "u10": (2.0, 5.0), "v10": (-1.0, 5.0), "msl": (101300.0, 800.0)}
PERIODS = np.array([61.0, 73.0, 97.0, 141.0, 173.0, 221.0, 307.0, 411.0])  # hours
REPEATED = 4  # chunks of waves that are kept
BATCH = 16


class Virtual(zarr.storage.MemoryStore):
    """A store that holds metadata and coordinates, and computes the chunks of the variables."""

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the bytes of a key."""
        match = re.fullmatch(r"(\w+)/c/(\d+)/0/0", key)
        if match is None or match[1] not in VARIABLES:
            return await super().get(key, prototype, byte_range)
        return prototype.buffer.from_array_like(chunk(match[1], int(match[2])).reshape(-1).view("B"))


def chunk(variable: str, number: int) -> np.ndarray:
    """Return the fields of a chunk: one of a few with waves, and the cycles of the year and of the day."""
    mean, spread = VARIABLES[variable]
    hours = np.arange(number * CHUNK, (number + 1) * CHUNK)
    cycles = mean + spread * (np.cos(2 * np.pi * hours / 8766) + 0.3 * np.cos(2 * np.pi * hours / 24))
    return np.asarray(WAVES[variable][number % REPEATED] + cycles[:, None, None].astype(np.float32))


def waves(seed: int, spread: float) -> np.ndarray:
    """Return fields of smooth patterns that go around at periods of their own, shape (chunks, times, rows, columns)."""
    rng = np.random.default_rng(seed)
    wave = np.hypot(np.fft.fftfreq(NY)[:, None], np.fft.rfftfreq(NX)) * NY
    spectrum = np.fft.rfft2(rng.standard_normal((2 * len(PERIODS), NY, NX))) * np.exp(-((wave / 6) ** 2))
    smooth = np.fft.irfft2(spectrum, s=(NY, NX))
    smooth *= spread / (smooth.std((-2, -1), keepdims=True) * np.sqrt(len(PERIODS)))
    phase = 2 * np.pi * np.arange(REPEATED * CHUNK)[:, None] / PERIODS
    fields = np.concatenate([np.cos(phase), np.sin(phase)], 1) @ smooth.reshape(2 * len(PERIODS), -1)
    return np.asarray(fields.reshape(REPEATED, CHUNK, NY, NX), np.float32)


WAVES = {name: waves(k, spread) for k, (name, (_, spread)) in enumerate(VARIABLES.items())}


def store(gigabytes: float) -> xr.Dataset:
    """Return the Dataset of a virtual store as it is opened from files."""
    chunks = max(1, round(gigabytes * 1e9 / (4 * CHUNK * NY * NX * len(VARIABLES))))
    empty = da.zeros((chunks * CHUNK, NY, NX), chunks=(CHUNK, NY, NX), dtype=np.float32)
    dims = ("time", "latitude", "longitude")
    coords = {
        "time": pd.date_range("1950-01-01", periods=chunks * CHUNK, freq="h", unit="s"),
        "latitude": np.linspace(35, 66.5, NY),
        "longitude": np.linspace(-10, 21.5, NX),
    }
    ds = xr.Dataset(dict.fromkeys(VARIABLES, (dims, empty)), coords)
    virtual = Virtual()
    encoding: dict[str, Any] = {n: {"compressors": None, "chunks": (CHUNK, NY, NX), "filters": None} for n in VARIABLES}
    ds.to_zarr(virtual, compute=False, encoding=encoding, consolidated=False, zarr_format=3)
    opened: xr.Dataset = xr.open_zarr(virtual, chunks=None, consolidated=False)
    return opened


def peak() -> float:
    """Return the most memory that this process ever held, in MB."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return float(match[1]) / 1e3 if match else float("nan")


class Timed(Streamed):
    """Fields that count how long a training waits for them."""

    waited = 0.0

    def batches(self, *args: Any, **kwargs: Any) -> Any:
        """Yield batches."""
        found = super().batches(*args, **kwargs)
        with contextlib.closing(found):
            for k in itertools.count():
                asked = time.perf_counter()
                batch = next(found)
                Timed.waited += time.perf_counter() - asked if k else 0.0  # the first waits for the first chunks
                yield batch


def trained(ds: xr.Dataset, steps: int, memory: int) -> tuple[float, float]:
    """Train for some steps, as a user would; return the seconds that they took, and those spent waiting for data."""
    corpus.Streamed, corpus.BUFFER = Timed, memory * 2**20  # type: ignore[misc]
    model = xgenda.train(ds, steps=steps, batch_size=BATCH, memory="100MB", progress=False)
    return float(model.history.seconds[-1]), Timed.waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=50.0, help="size of the store")
    parser.add_argument("--statistics", type=float, default=None, help="gigabytes to pass over; all by default")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--memory", type=int, default=256, help="MB for states that wait")
    parser.add_argument("--quick", action="store_true", help="a small store and few steps")
    options = parser.parse_args()
    if options.quick:
        options.gigabytes, options.steps = 0.5, 20
    print(f"after imports: peak {peak():.0f} MB")
    ds = store(options.gigabytes)
    source = open_source(ds)
    print(f"store of {source.nbytes / 1e9:.1f} GB, {source.size} times, opened: peak {peak():.0f} MB")
    part = ds if options.statistics is None else ds.isel(time=slice(0, int(options.statistics * 1e9 / source.row_bytes)))
    begin = time.perf_counter()
    passed, _ = gather(open_source(part), "dayofyear+hour", cache=False)
    seconds = time.perf_counter() - begin
    print(
        f"statistics of {passed.nbytes / 1e9:.1f} GB: {passed.nbytes / 1e6 / seconds:.0f} MB/s, {seconds:.0f} s, peak {peak():.0f} MB"
    )
    seconds, waited = trained(ds, options.steps, options.memory)
    print(
        f"training: {options.steps} steps of {BATCH}, {1e3 * seconds / options.steps:.0f} ms each, busy {100 * (1 - waited / seconds):.1f} %, "
        f"peak {peak():.0f} MB"
    )


if __name__ == "__main__":
    main()

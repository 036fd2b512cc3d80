"""Tiles: the memory of a large domain against its prediction, and what is seen of the borders of tiles.

python docs/benchmarks/tiles.py --memory [--tile 128 256 448] [--calls 1]
python docs/benchmarks/tiles.py --seams [--steps 1500] [--members 48]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.memory import plan_memory
from xgenda.diffusion.noise import PlaneNoise
from xgenda.diffusion.samplers import integrate
from xgenda.diffusion.tiles import TiledNetwork, Tiling
from xgenda.networks.songunet import SongUNet

DOMAIN, CHANNELS, CONDITION = (1056, 1792), 8, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--seams", action="store_true")
    parser.add_argument("--tile", type=int, nargs="+", default=[128, 256, 448], help="rows and columns")
    parser.add_argument("--calls", type=int, default=1, help="tiles of each blend that are computed; 0 for all")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*json.loads(options.measure))
    if options.memory:
        memory(options.tile, options.calls)


class First(Tiling):
    """The first tiles alone."""

    def keep(self, count: int) -> None:
        object.__setattr__(self, "places", self.places[: count or None])


def network() -> SongUNet:
    """Return the network of the published checkpoints for 448 x 448 cells: 80 million parameters."""
    net = SongUNet(CHANNELS + CONDITION, CHANNELS, (448, 448), 128, (1, 2, 2, 2, 2), attention=(28,))
    return net.eval().requires_grad_(False)


def tiles_of(tile: int) -> First:
    return First(DOMAIN, (tile, tile), (tile // 8, tile // 8), multiple=16)


def resident(kind: str) -> float:
    """Return the current ('VmRSS') or the highest ('VmHWM') resident memory of this process in MB."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def measure(tile: int, calls: int) -> None:
    """Sample two Heun steps and print the peak of resident memory over that after the imports."""
    before = resident("VmRSS")
    net, tiling = network(), tiles_of(tile)
    tiling.keep(calls)
    built = resident("VmHWM") - before
    denoiser = EDMDenoiser(TiledNetwork(net, tiling))
    begin = time.monotonic()
    with torch.no_grad():
        condition = torch.randn(1, CONDITION, *DOMAIN)
        noise = PlaneNoise([(0, "", 0)], DOMAIN)
        start = noise.normal(CHANNELS, *DOMAIN).double()
        integrate(lambda x, sigma: denoiser(x, sigma, condition), start, [1.0, 0.5, 0.0], "heun", noise)
    seconds = (time.monotonic() - begin) / 3 / len(tiling.places)
    print(json.dumps({"built": built, "peak": resident("VmHWM") - before, "seconds": seconds}))


def memory(tiles: list[int], calls: int) -> None:
    """Compare prediction and measurement, each in a fresh process."""
    rows, columns = DOMAIN
    print(
        f"Domain {rows} x {columns}, {CHANNELS} channels, {CONDITION} conditions, {torch.__version__}, MB over the process after imports."
    )
    print(f"Each blend computes {calls or 'all'} of its tiles: the peak of memory is reached at the first.")
    print(
        f"{'tile':>6}{'tiles':>6}{'weights':>9}{'fields':>9}{'network':>9}{'predicted':>11}{'measured':>10}{'ratio':>7}{'s per call':>12}"
    )
    net = network()
    for tile in tiles:
        tiling = tiles_of(tile)
        plan = plan_memory(net, tiling, CHANNELS, CONDITION)
        command = [sys.executable, __file__, "--measure", json.dumps([tile, calls])]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        parts = "".join(f"{n / 1e6:9.0f}" for n in (plan.weights, plan.fields, plan.network))
        predicted = plan.peak / 1e6
        print(
            f"{tile:6d}{len(tiling.places):6d}{parts}{predicted:11.0f}{found['peak']:10.0f}{predicted / found['peak']:7.2f}"
            f"{found['seconds']:12.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

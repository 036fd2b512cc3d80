"""Tiles: the memory of a large domain against its prediction, and what is seen of the borders of tiles.

python docs/benchmarks/tiles.py --memory [--tile 128 256 448] [--calls 1]
python docs/benchmarks/tiles.py --seams [--steps 1500] [--fields 48]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
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
from xgenda.diffusion.schedules import noise_levels
from xgenda.diffusion.tiles import TiledNetwork, Tiling
from xgenda.networks.songunet import SongUNet
from xgenda.networks.unet import UNet

DOMAIN, CHANNELS, CONDITION = (1056, 1792), 8, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--seams", action="store_true")
    parser.add_argument("--tile", type=int, nargs="+", default=[128, 256, 448], help="rows and columns")
    parser.add_argument("--calls", type=int, default=1, help="tiles of each blend that are computed; 0 for all")
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--fields", type=int, default=48, help="withheld fields, each sampled once")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*json.loads(options.measure))
    if options.memory:
        memory(options.tile, options.calls)
    if options.seams:
        seams(options.steps, options.fields)


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


SIZE, BLOCK, SIGMA = 96, 16, (0.02, 40.0)


def synthetic(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what block means leave of two correlated fields, one log-normal and one that is often zero, and the interpolated block means.

    Two-dimensional spectra fall as k^-3.2 below a scale of 24 cells. Cut from a domain twice as large, so that nothing is periodic.
    """
    n = 2 * SIZE
    k = torch.cartesian_prod(torch.fft.fftfreq(n), torch.fft.fftfreq(n)).square().sum(1).reshape(n, n)
    amplitude = (k + 1 / 24**2) ** -0.8
    white = torch.randn(count, 2, n, n, generator=generator)
    smooth = torch.fft.ifft2(torch.fft.fft2(white) * amplitude).real[..., :SIZE, :SIZE] / amplitude.square().mean().sqrt()
    first, second = smooth[:, 0], 0.6 * smooth[:, 0] + 0.8 * smooth[:, 1]
    fields = torch.stack([(0.6 * first).exp(), (second - 0.3).clamp(min=0).sqrt()], 1)
    condition = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(fields, BLOCK), (SIZE, SIZE), mode="bilinear")
    residual = fields - condition
    scale = torch.tensor([0.70, 0.39])[:, None, None]  # about the standard deviations
    return residual / scale, (condition - 0.7) / 0.5


def trained(steps: int) -> UNet:
    """Train on random tiles of 48 x 48 cells."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    residual, condition = synthetic(512, generator)
    net = UNet(2, 2, width=16, multipliers=(1, 2, 2))
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-4)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps, pct_start=0.05)
    begin = time.monotonic()
    for step in range(steps):
        row, top, left = (torch.randint(n, (16,), generator=generator).tolist() for n in (len(residual), SIZE - 47, SIZE - 47))
        clean, given = (
            torch.stack([f[r, :, i : i + 48, j : j + 48] for r, i, j in zip(row, top, left, strict=True)])
            for f in (residual, condition)
        )
        low, high = (math.log(s) for s in SIGMA)
        sigma = (low + (high - low) * torch.rand(16, 1, 1, 1, generator=generator)).exp()
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
        total = (sigma.square() + 1).sqrt()
        target = (clean - noisy / total.square()) * total / sigma
        loss = (net(noisy / total, sigma.flatten().log() / 4, given) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rates.step()
        if step % 250 == 249:
            print(f"step {step + 1}, loss {float(loss.detach()):.3f}, {time.monotonic() - begin:.0f} s", flush=True)
    return net.eval().requires_grad_(False)


def seams(steps: int, count: int) -> None:
    """Compare samples of the whole domain with tiled ones and with those of separate blocks."""
    net = trained(steps)
    truth, condition = synthetic(count, torch.Generator().manual_seed(1))
    levels = noise_levels("karras", 10, *SIGMA)

    def sample(model: torch.nn.Module, given: torch.Tensor, noise: PlaneNoise) -> torch.Tensor:
        denoiser = EDMDenoiser(model)
        start = levels[0] * noise.normal(2, *given.shape[-2:])
        return integrate(lambda x, sigma: denoiser(x, sigma, given), start, levels, "heun", noise)

    def plane(seed: int, corner: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None) -> PlaneNoise:
        return PlaneNoise([(seed, "", k) for k in range(count)], (SIZE, SIZE), corner, size)

    def blocks(halo: int, shared: bool) -> torch.Tensor:
        out, half = torch.zeros(count, 2, SIZE, SIZE), SIZE // 2
        for k, (i, j) in enumerate(((0, 0), (0, half), (half, 0), (half, half))):
            top, left = max(i - halo, 0), max(j - halo, 0)
            size = (min(i + half + halo, SIZE) - top, min(j + half + halo, SIZE) - left)
            noise = plane(2 if shared else 10 + k, (top, left), size)
            found = sample(net, condition[..., top : top + size[0], left : left + size[1]], noise)
            out[..., i : i + half, j : j + half] = found[..., i - top : i - top + half, j - left : j - left + half]
        return out

    middle = [SIZE // 2]
    whole = sample(net, condition, plane(1))
    print(f"\n{count} fields of {SIZE} x {SIZE} cells, differences from the whole domain with other noise, bootstrap errors")
    print(f"{'':44}{'borders: gradient there over elsewhere':>40}{'spectrum, of 8 bands':>32}")
    print(f"{'':44}{'change':>22}{'z':>18}{'largest change':>20}{'at cells':>12}{'largest z':>12}")
    waves = [f"{1 / b:.0f}-{1 / a:.0f}" for a, b in itertools.pairwise(band_edges())]

    def row(name: str, found: torch.Tensor, borders: list[int]) -> None:
        change, error = bootstrap(roughness(found, borders), roughness(whole, borders))
        bands, errors = bootstrap(spectrum(found), spectrum(whole))
        worst = int(bands.abs().argmax())
        print(
            f"{name:44}{float(change):+14.3f} +- {float(error):.3f}{float(change / error):18.1f}{float(bands[worst]):+20.3f}"
            f"{waves[worst]:>12}{float((bands / errors).abs().max()):12.1f}",
            flush=True,
        )

    row("truth", truth, middle)
    row("whole, other noise", sample(net, condition, plane(2)), middle)
    for tile, overlap in ((48, 24), (40, 12), (36, 6), (48, 0)):
        tiling = Tiling((SIZE, SIZE), (tile, tile), (overlap, overlap))
        row(f"tiles of {tile}, overlap {overlap}", sample(TiledNetwork(net, tiling, 64), condition, plane(2)), borders_of(tiling))
    tiling = Tiling((SIZE, SIZE), (48, 48), (4, 4), boundary=(2, 2))
    row(
        "tiles of 48, overlap 4, boundary 2, plain means",
        sample(TiledNetwork(net, tiling, 64), condition, plane(2)),
        borders_of(tiling),
    )
    for halo in (24, 16, 8, 0):
        row(f"four blocks with a halo of {halo}", blocks(halo, True), middle)
    row("four blocks with a halo of 16, each its own noise", blocks(16, False), middle)


def borders_of(tiling: Tiling) -> list[int]:
    """Return the rows where a tile begins or has ended; columns are the same."""
    edges = {e for c in tiling.axes[0].corners for e in (c, c + tiling.tile[0])}
    return sorted(e for e in edges if 0 < e < SIZE)


def roughness(fields: torch.Tensor, borders: list[int]) -> torch.Tensor:
    """Return the mean absolute step across borders and elsewhere of each field, shape (n, 2, 1): above and below a fraction."""
    steps = (fields.diff(dim=-2).abs().mean((1, 3)) + fields.diff(dim=-1).abs().mean((1, 2))) / 2
    there = torch.zeros(SIZE - 1, dtype=torch.bool)
    there[[b - 1 for b in borders]] = True
    return torch.stack([steps[:, there].mean(1), steps[:, ~there].mean(1)], 1)[..., None]


def spectrum(fields: torch.Tensor) -> torch.Tensor:
    """Return the power in eight bands of total wavenumber over one, shape (n, 2, 8)."""
    hann = torch.hann_window(SIZE, periodic=False)
    power = torch.fft.fft2(fields * hann[:, None] * hann).abs().square().mean(1)
    k = torch.cartesian_prod(torch.fft.fftfreq(SIZE), torch.fft.fftfreq(SIZE)).square().sum(1).sqrt().reshape(SIZE, SIZE)
    bands = torch.stack([power[:, (k >= a) & (k < b)].mean(1) for a, b in itertools.pairwise(band_edges())], 1)
    return torch.stack([bands, torch.ones_like(bands)], 1)


def band_edges() -> list[float]:
    """Return the wavenumbers between bands, in cycles per cell."""
    return [float(k) for k in torch.logspace(math.log10(1.5 / SIZE), math.log10(0.5), 9)]


def bootstrap(found: torch.Tensor, reference: torch.Tensor, draws: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return by how much the ratio of means, (n, 2, bands), differs from that of the reference, relatively, and its standard error over fields."""

    def change(rows: torch.Tensor) -> torch.Tensor:
        (a, b), (c, d) = (f[rows].mean(-3).unbind(-2) for f in (found, reference))
        return a / b / (c / d) - 1

    rows = torch.randint(len(found), (draws, len(found)), generator=torch.Generator().manual_seed(0))
    return change(torch.arange(len(found))), change(rows).std(0)


if __name__ == "__main__":
    main()

"""Kolmogorov flow of Rozet & Louppe (2023): trajectories from three operators with a model of windows of five states.

python docs/benchmarks/kolmogorov.py            # an hour on one core; data and weights are kept in --cache, results as they come
python docs/benchmarks/kolmogorov.py --quick    # a minute, numbers without meaning
python docs/benchmarks/kolmogorov.py --check    # the solver only: closed forms, invariants, divergence

The figure of merit is the published one: the standard deviation of A(x) - y of a posterior trajectory, to compare with that of the
observation error. A trajectory that misses the observations has more, one that fits their errors less.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from xgenda.diffusion.anchors import Spectral
from xgenda.diffusion.denoisers import Denoiser, EDMDenoiser, precondition
from xgenda.diffusion.evidence import FunctionEvidence
from xgenda.diffusion.guidance import guide
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.samplers import integrate, network_calls
from xgenda.diffusion.schedules import noise_levels
from xgenda.diffusion.trajectories import TrajectoryDenoiser, windows_of
from xgenda.networks.unet import UNet

VISCOSITY, DRAG, WAVENUMBER = 1e-3, 0.1, 4
OUTPUT, STATES = 0.2, 64
GRID, K = 64, 2
SIGMA = (0.01, 100.0)
PUBLISHED_GAMMA = 1e-2


# The flow


class Flow:
    """Incompressible two-dimensional flow on a doubly periodic box of side 2 pi, in vorticity w = dv/dx - du/dy.

    dw/dt + (dxx - dyy)(u v) + dxy(v^2 - u^2) = curl f - drag w + viscosity lap w, which takes two transforms each way (Basdevant 1983).
    Wavenumbers above a third of the grid are cut; what is linear is integrated exactly, the rest with the fourth-order Runge-Kutta
    method. Arrays are (..., y, x), at cell centres.
    """

    def __init__(
        self, size: int, step: float, *, viscosity: float = VISCOSITY, drag: float = DRAG, forcing: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.size, self.step = size, step
        self.ky = torch.fft.fftfreq(size, 1 / size, dtype=dtype)[:, None]
        self.kx = torch.fft.rfftfreq(size, 1 / size, dtype=dtype)
        square = self.kx**2 + self.ky**2
        self.inverse = torch.where(square > 0, 1 / square.clamp(min=1), 0.0)
        self.keep = (self.kx.abs() < size / 3) & (self.ky.abs() < size / 3)
        # products of velocities to vorticity tendency; the sign is that of the left-hand side moved over
        self.from_uv = torch.where(self.keep, self.kx**2 - self.ky**2, 0.0)
        self.from_difference = torch.where(self.keep, self.kx * self.ky, 0.0)
        self.half = torch.exp(-0.5 * step * (drag + viscosity * square))
        y = (torch.arange(size, dtype=dtype) + 0.5) * (2 * math.pi / size)
        curl = -forcing * WAVENUMBER * torch.cos(WAVENUMBER * y)[:, None].expand(size, size)
        self.curl = torch.where(self.keep, torch.fft.rfft2(curl), 0.0)

    def velocity(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return u and v on the grid, from the transform of the vorticity."""
        stream = 1j * self.inverse * w  # u = d(psi)/dy and v = -d(psi)/dx with lap psi = -w
        shape = (self.size, self.size)
        return torch.fft.irfft2(self.ky * stream, shape), torch.fft.irfft2(-self.kx * stream, shape)

    def tendency(self, w: Tensor) -> Tensor:
        """Return what is not linear, and the forcing."""
        u, v = self.velocity(w)
        return self.curl + self.from_uv * torch.fft.rfft2(u * v) + self.from_difference * torch.fft.rfft2(v * v - u * u)

    def advance(self, w: Tensor) -> Tensor:
        """Return the transform one step later."""
        half, full, h = self.half, self.half**2, self.step
        k1 = self.tendency(w)
        k2 = self.tendency(half * (w + h / 2 * k1))
        k3 = self.tendency(half * w + h / 2 * k2)
        k4 = self.tendency(full * w + h * half * k3)
        return full * w + h / 6 * (full * k1 + 2 * half * (k2 + k3) + k4)

    def start(self, count: int, generator: torch.Generator, peak: float = 4.0, fastest: float = 3.0) -> Tensor:
        """Return random vorticities (transforms): energy in wavenumbers around `peak`, and a largest velocity of `fastest`."""
        k = (self.kx**2 + self.ky**2).sqrt()
        noise = torch.fft.rfft2(torch.randn(count, self.size, self.size, generator=generator, dtype=k.dtype))
        w = torch.where(self.keep, k * (k / peak) * torch.exp(-((k / peak) ** 2)), 0.0) * noise
        u, v = self.velocity(w)
        speed = (u**2 + v**2).sqrt().amax((-2, -1), keepdim=True)
        return w * fastest / speed


def block_mean(x: Tensor, r: int) -> Tensor:
    """Return means over r x r cells."""
    *lead, ny, nx = x.shape
    return x.reshape(*lead, ny // r, r, nx // r, r).mean((-3, -1))


def simulate(
    runs: int, size: int, substeps: int, states: int = STATES, spin_up: int = 64, seed: int = 0, batch: int = 8
) -> Tensor:
    """Return developed flow every `OUTPUT`, as means on the grid of the model: (runs, states, 2, GRID, GRID)."""
    flow, generator = Flow(size, OUTPUT / substeps), torch.Generator().manual_seed(seed)
    parts = []
    for first in range(0, runs, batch):  # few at a time stay in the cache of the processor
        w = flow.start(min(batch, runs - first), generator)
        kept = []
        for i in range(-spin_up, states):
            for _ in range(substeps):
                w = flow.advance(w)
            if i >= 0:
                kept.append(block_mean(torch.stack(flow.velocity(w), 1), size // GRID))
        parts.append(torch.stack(kept, 1))
        if not torch.isfinite(parts[-1]).all():
            raise RuntimeError("The flow is not finite; raise substeps.")
        print(f"simulated {first + len(w)} of {runs} runs", flush=True)
    return torch.cat(parts)


def check_flow(size: int = 64) -> dict[str, float]:
    """Return errors of the solver where the answer is known.

    taylor_green
        Relative error of the decaying vortex 2 cos(x) cos(y) under viscosity and drag.
    advection
        Relative difference of the tendency from -(u dw/dx + v dw/dy), for a smooth random flow.
    shear
        Relative error of the laminar answer to the forcing, which decays to f / (drag + 16 viscosity).
    energy, enstrophy
        Relative drift of the invariants of the inviscid flow from a random start, over one unit of time.
    divergence
        Largest divergence of its velocity, relative to the largest vorticity.
    """
    out: dict[str, float] = {}
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 * math.pi / size)
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    calm = Flow(size, 0.02, viscosity=0.05, forcing=0, dtype=torch.float64)
    w = begin = torch.fft.rfft2(2 * torch.cos(x) * torch.cos(y))
    for _ in range(50):
        w = calm.advance(w)
    out["taylor_green"] = float((w - begin * math.exp(-(2 * 0.05 + DRAG))).norm() / w.norm())
    driven = Flow(size, 0.02, dtype=torch.float64)
    w = torch.zeros_like(begin)
    for _ in range(50):
        w = driven.advance(w)
    rate = DRAG + WAVENUMBER**2 * VISCOSITY
    laminar = torch.sin(WAVENUMBER * y) * -math.expm1(-rate) / rate
    out["shear"] = float((driven.velocity(w)[0] - laminar).norm() / laminar.norm())
    free = Flow(size, 0.005, viscosity=0, drag=0, forcing=0, dtype=torch.float64)
    w = begin = free.start(1, torch.Generator().manual_seed(0))

    smooth = torch.where(free.kx**2 + free.ky**2 < (size / 6) ** 2, begin, 0.0)  # products of these are not cut
    (u, v), (wx, wy) = free.velocity(smooth), (torch.fft.irfft2(1j * k * smooth) for k in (free.kx, free.ky))
    slope = torch.fft.irfft2(free.tendency(smooth))
    out["advection"] = float((slope + u * wx + v * wy).norm() / slope.norm())

    def invariants(w: Tensor) -> tuple[float, float]:
        u, v = free.velocity(w)
        return float((u**2 + v**2).mean()), float(torch.fft.irfft2(w).square().mean())

    for _ in range(200):
        w = free.advance(w)
    for name, a, b in zip(("energy", "enstrophy"), invariants(begin), invariants(w), strict=True):
        out[name] = abs(b / a - 1)
    u, v = (torch.fft.rfft2(c) for c in free.velocity(w))
    divergence = torch.fft.irfft2(1j * free.kx * u + 1j * free.ky * v)
    out["divergence"] = float(divergence.abs().max() / torch.fft.irfft2(w).abs().max())
    return out


def spectrum(states: Tensor) -> Tensor:
    """Return the kinetic energy of velocities (..., 2, n, n) by whole wavenumber from 0 to n / 2."""
    n = states.shape[-1]
    power = (torch.fft.fft2(states) / n**2).abs().square().sum(-3).flatten(0, -3).mean(0) / 2
    k = torch.fft.fftfreq(n, 1 / n)
    shell = (k[:, None] ** 2 + k**2).sqrt().round().long()
    return torch.zeros(int(shell.max()) + 1).index_add(0, shell.flatten(), power.flatten())[: n // 2 + 1]


# The model of a window


class Exact(nn.Module):
    """A layer that is kept in single precision under autocast."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.layer(x.float())


class WindowNetwork(nn.Module):
    """F of `EDMDenoiser` for windows of 2 K + 1 states: a U-Net on patches of 2 x 2 cells, in bfloat16.

    Its condition is the linear estimate of the window. The first layer works in single precision: bfloat16 would round away noise of
    a hundredth of the state. The forcing is a fixed input channel, as published.
    """

    def __init__(self, width: int = 48, multipliers: tuple[int, ...] = (1, 2, 2)) -> None:
        super().__init__()
        states = 4 * 2 * (2 * K + 1)
        self.unet = UNet(states, states + 4, width=width, multipliers=multipliers, periodic="both")
        self.unet.first = Exact(self.unet.first)
        y = (torch.arange(GRID) + 0.5) * (2 * math.pi / GRID)
        channel = torch.sin(WAVENUMBER * y)[None, None, :, None].expand(1, 1, GRID, GRID)
        self.register_buffer("forcing", F.pixel_unshuffle(channel, 2))

    def forward(self, x: Tensor, label: Tensor, condition: Tensor) -> Tensor:
        """Return F, scaled as `precondition` says."""
        with torch.autocast("cpu", torch.bfloat16):
            seen = torch.cat([F.pixel_unshuffle(condition, 2), self.forcing.expand(len(x), -1, -1, -1)], 1)
            out = self.unet(F.pixel_unshuffle(x, 2), label, seen)
        return F.pixel_shuffle(out.float(), 2)


def symmetric(window: Tensor, generator: torch.Generator) -> Tensor:
    """Return a window (states, 2, y, x) under a random symmetry of the forced flow."""

    def chance(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    period = GRID // WAVENUMBER
    shift = period * chance(WAVENUMBER)
    if chance(2):  # half a turn
        window = -window.flip(-1, -2)
    if chance(2):  # mirrored in x, and by half a period of the forcing in y
        window = window.flip(-1) * torch.tensor([-1.0, 1.0])[:, None, None]
        shift += period // 2
    return window.roll((shift, chance(GRID)), (-2, -1))


def climate(data: Tensor, length: int, generator: torch.Generator) -> Spectral:
    """Return the covariance of `length` successive standardised states, homogeneous in space, from random parts and symmetries."""
    windows = []
    for run in data:
        for first in torch.randint(data.shape[1] - length + 1, (24,), generator=generator).tolist():
            windows.append(symmetric(run[first : first + length], generator))
    return Spectral.fit(torch.stack(windows).flatten(1, 2))


def train(
    data: Tensor, held: Tensor, path: Path, steps: int, width: int, *, batch: int = 16, rate: float = 1.5e-3
) -> EDMDenoiser:
    """Return the denoiser of windows of standardised trajectories, from `path` where it was trained before.

    It is built on the linear one: the network learns what a homogeneous Gaussian does not know, which makes short training enough.
    """
    torch.manual_seed(0)
    anchor = climate(data, 2 * K + 1, torch.Generator().manual_seed(3))
    network = WindowNetwork(width)
    denoiser = EDMDenoiser(network, anchor, feeds_state=True)
    if path.exists():
        network.load_state_dict(load_file(path))
        return denoiser.eval().requires_grad_(False)
    levels = torch.logspace(math.log10(SIGMA[0]), math.log10(SIGMA[1]), 64).tolist()  # few enough for the anchor to keep
    average = {n: p.clone() for n, p in network.state_dict().items()}
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(1)
    began, recent = time.perf_counter(), 0.0
    every = max(steps // 10, 1)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        which = torch.randint(len(data), (batch,), generator=generator)
        first = torch.randint(data.shape[1] - 2 * K, (batch,), generator=generator)
        windows = [symmetric(data[r, i : i + 2 * K + 1], generator) for r, i in zip(which, first, strict=True)]
        # one level from each part of the range
        part = len(levels) / batch
        chosen = [levels[int((i + float(torch.rand((), generator=generator))) * part)] for i in range(batch)]
        clean = torch.stack(windows).flatten(1, 2)
        e = torch.randn(clean.shape, generator=generator)
        pieces = [precondition(anchor, (x + s * n)[None], s) for x, n, s in zip(clean, e, chosen, strict=True)]
        skip, scale, inner, state = (torch.cat([p[i].expand(1, *clean.shape[1:]) for p in pieces]) for i in range(4))
        label = torch.tensor(chosen).log() / 4
        loss = (network(inner, label, state) - (clean - skip) / scale).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        recent += float(loss.detach())
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name].lerp_(value, 1 / min(step + 1, 300))
        if (step + 1) % every == 0:
            print(f"step {step + 1}, loss {recent / every:.5f}, {time.perf_counter() - began:.0f} s", flush=True)
            recent = 0.0
            save_file(average, path.with_suffix(".part"))
    network.load_state_dict(average)
    save_file(average, path)
    path.with_suffix(".part").unlink(missing_ok=True)
    denoiser = denoiser.eval().requires_grad_(False)
    print_skill(denoiser, held)
    return denoiser


def print_skill(denoiser: EDMDenoiser, held: Tensor) -> None:
    """Print the error of the centre state of withheld windows, and that of the linear estimate."""
    windows = windows_of(held[0], K)[::8]
    e = torch.randn(windows.shape, generator=torch.Generator().manual_seed(2))
    centre = slice(2 * K, 2 * K + 2)
    for sigma in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
        with torch.no_grad():
            x = windows + sigma * e
            linear = precondition(denoiser.anchor, x, sigma)[0]
            errors = [float((d - windows)[:, centre].square().mean() ** 0.5) for d in (denoiser(x, sigma), linear)]
        print(f"sigma {sigma:g}: error {errors[0]:.4f}, linear {errors[1]:.4f}", flush=True)


# The three published operators, in physical units


def vorticity(x: Tensor) -> Tensor:
    """Return dv/dx - du/dy inside the box, by central differences in units of the spacing, which is how it was published."""
    u, v = x.unbind(-3)
    return (v[..., 1:-1, 2:] - v[..., 1:-1, :-2] - u[..., 2:, 1:-1] + u[..., :-2, 1:-1]) / 2


def saturating(x: Tensor) -> Tensor:
    w = vorticity(block_mean(x, 4))
    return w / (1 + w.abs())


@dataclass(frozen=True)
class Case:
    """An operator on trajectories (batch, length, 2, GRID, GRID), with the published numbers."""

    title: str
    length: int
    error: float
    observe: Callable[[Tensor], Tensor]
    steps: int
    published: tuple[float, float]


CASES = {
    "a": Case("8 x 8 means, every 4th of 29 states", 29, 0.10, lambda x: block_mean(x[:, ::4], 8), 256, (0.110, 0.857)),
    "b": Case(
        "4 x 4 means, every 3rd of 8 states, central 8 x 8 box", 8, 0.01,
        lambda x: block_mean(x[:, ::3], 4)[..., 4:12, 4:12], 256, (0.018, 0.493),
    ),
    "c": Case("w / (1 + abs(w)) of 4 x 4 means, 8 states", 8, 0.05, saturating, 512, (0.061, 0.548)),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A guidance and a sampler; `steps` as a fraction of the published number, `gamma` as published where it is asked for."""

    title: str
    guidance: str
    options: dict[str, Any] = field(default_factory=dict)
    sampler: str = "pc"
    sampler_options: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    published_gamma: float | None = None


METHODS = {
    "sda": Method("sda, as published", "sda", published_gamma=PUBLISHED_GAMMA),
    "sda-quarter": Method("sda, as published", "sda", published_gamma=PUBLISHED_GAMMA, share=0.25),
    "sda-0.2": Method("sda, gamma 0.2", "sda", {"gamma": 0.2}, share=0.25),
    "mmps": Method("mmps (iterations 3)", "mmps", {"iterations": 3}, share=0.25),
    "anchor": Method("anchor, sampler dpm++", "anchor", {"iterations": 50, "tolerance": 1e-3}, "dpm++", share=0.25),
    "dps": Method("dps, as published", "dps"),
}


def posterior(
    denoiser: Denoiser,
    truth: Tensor,
    scale: float,
    case: Case,
    method: Method,
    steps: int,
    seed: int,
    members: int,
    anchor: Spectral | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return standardised members of the posterior and their scores, for a standardised true trajectory."""
    truth = truth[: case.length]

    def function(x: Tensor) -> Tensor:
        return case.observe(scale * x).flatten(1)

    clean = function(truth[None])[0]
    y = clean + case.error * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1000 + seed))
    evidence = FunctionEvidence(function, truth.shape, y, case.error**2, linear=case is not CASES["c"])
    options = dict(method.options)
    if method.published_gamma is not None:
        # published in units of the observations and of the state; here gamma multiplies diag(A A^T) of the standardised state
        options["gamma"] = method.published_gamma * scale**2 / float(evidence.gain(truth[None].flatten(1)).mean())
    calls = [0]

    def count(x: Tensor, sigma: float) -> Tensor:
        calls[0] += 1
        return prior(x, sigma)

    prior = TrajectoryDenoiser(denoiser, K)
    guided = guide(count, evidence, method.guidance, anchor=anchor, **options)
    levels = noise_levels("vp-cosine", steps, *SIGMA)
    noise = NoiseStream([(seed, "kolmogorov", m) for m in range(members)])
    began = time.perf_counter()
    x = integrate(guided, levels[0] * noise.normal(*truth.shape), levels, method.sampler, noise, **method.sampler_options)
    seconds = time.perf_counter() - began
    departure = function(x) - y
    return x, {
        "fit": float(departure.std()),
        "rmse": float((x - truth).square().mean() ** 0.5) * scale,
        "steps": steps,
        "calls": network_calls(method.sampler, steps, method.sampler_options),
        "seconds": seconds,
        **({"gamma": options["gamma"]} if "gamma" in options else {}),
    }


def picture(path: Path, truth: Tensor, members: Tensor, observed: str, scale: float) -> None:
    """Write a picture of the vorticity of the truth and of the first members, for four states of the trajectory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [("truth", truth), *((f"member {i + 1}", m) for i, m in enumerate(members[:3]))]
    times = [round(t) for t in torch.linspace(0, members.shape[1] - 1, 4).tolist()]
    figure, axes = plt.subplots(len(rows), len(times), figsize=(2.4 * len(times), 2.5 * len(rows)), squeeze=False)
    for line, (label, x) in zip(axes, rows, strict=True):
        for axis, t in zip(line, times, strict=True):
            axis.imshow(vorticity(scale * x[t]) * GRID / (2 * math.pi), cmap="RdBu", vmin=-12, vmax=12, origin="lower")
            axis.set(xticks=[], yticks=[], title=f"{label}, state {t + 1}")
    figure.suptitle(observed, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def flow_data(cache: Path, runs: int, size: int, substeps: int, **options: int) -> Tensor:
    """Return trajectories in physical units, from the cache where they are there."""
    path = cache / f"flow-{runs}x{size}.safetensors"
    if path.exists():
        return load_file(path)["states"]
    began = time.perf_counter()
    states = simulate(runs, size, substeps, **options)
    save_file({"states": states.contiguous()}, path)
    energy = " ".join(f"{e:.1e}" for e in spectrum(states[:, ::8])[[1, 2, 4, 8, 16, 32]].tolist())
    print(f"{time.perf_counter() - began:.0f} s; energy at wavenumbers 1, 2, 4, 8, 16, 32: {energy}", flush=True)
    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("kolmogorov"))
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=int, default=64, help="simulated runs; the last four are withheld")
    parser.add_argument("--size", type=int, default=128, help="cells along a side of the solver, a multiple of 64")
    parser.add_argument("--steps", type=int, default=1800, help="of training")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.check or args.quick:
        for name, error in check_flow().items():
            print(f"{name}: {error:.1e}")
        if args.check:
            return
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.quick:
        data = flow_data(args.cache, 6, 64, 30, spin_up=8, states=32)
        args.steps, args.width = 50, 16
    else:
        data = flow_data(args.cache, args.runs, args.size, 30)
    train_set, held = data[:-4], data[-4:]
    scale = float(train_set.square().mean().sqrt())
    path = args.cache / f"anchored-{len(data)}x{args.width}-{args.steps}.safetensors"
    denoiser = train(train_set / scale, held / scale, path, args.steps, args.width)
    print(f"standard deviation of velocity {scale:.3f}", flush=True)
    results = args.cache / ("quick.json" if args.quick else "results.json")
    known: dict[str, dict[str, float]] = json.loads(results.read_text()) if results.exists() else {}
    # the covariance of 29 states has matrices of 58 x 58 for every wavenumber and noise level; not worth it here
    names = [(c, m) for c in args.cases for m in args.methods if m != "anchor" or CASES[c].length <= 8]
    for c, m in names:
        key = f"{path.stem}/{c}/{m}/{args.members}/{args.seed}"
        if key in known and not args.quick:
            continue
        case, method = CASES[c], METHODS[m]
        steps = 8 if args.quick else round(method.share * case.steps)
        truth = held[args.seed % len(held)] / scale
        anchor = climate(train_set / scale, case.length, torch.Generator().manual_seed(4)) if m == "anchor" else None
        x, known[key] = posterior(denoiser, truth, scale, case, method, steps, args.seed, args.members, anchor)
        print(key, json.dumps(known[key]), flush=True)
        results.write_text(json.dumps(known, indent=1))
        picture(args.cache / f"{c}-{m}.png", truth, x, f"{case.title}; {method.title}", scale)
    print(
        "\n| operator | observation error | method | levels | network calls | std(A(x) - y) | over the error | RMSE | time [s] |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for c, m in names:
        r, case = known[f"{path.stem}/{c}/{m}/{args.members}/{args.seed}"], CASES[c]
        print(
            f"| {case.title} | {case.error:g} | {METHODS[m].title} | {r['steps']} | {r['calls']} | {r['fit']:.4f} | "
            f"{r['fit'] / case.error:.2f} | {r['rmse']:.3f} | {r['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()

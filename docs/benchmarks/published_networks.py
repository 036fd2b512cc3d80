"""The network of CorrDiff-Mini here and in PhysicsNeMo: the same weights, the same numbers, and the time of each.

python docs/benchmarks/published_networks.py [--parts forward member train steps memory] [--repeats 9] [--threads 2]

SongUNetPosEmbd of 64 x 64, 64 channels, multipliers 1, 2, 2, attention at 16: 10.9 million parameters, written by PhysicsNeMo and read here.
Everything runs in one process, in single precision on the CPU; the two take turns, and what is told is the median of each and the median of
the ratios of neighbours, since other programs disturb both. `steps` asks on a mixture of two Gaussian fields, whose denoiser is exact, how
many calls of the network DPM-Solver++ needs for the CRPS of 18 steps of Heun. PhysicsNeMo refuses bfloat16 on a CPU: there it computes in single
precision in those lines too.

Both packages in one environment, without those of PhysicsNeMo's dependencies that are not needed here:

    python -m venv env && . env/bin/activate
    pip install xgenda torch==2.13.0
    pip install --no-deps nvidia-physicsnemo==2.2.2 warp-lang==1.19.0 tensordict==0.15.3 pyvers cloudpickle timm==1.0.31 torchvision==0.28.0 \\
        pillow einops jaxtyping nvtx omegaconf==2.4.0 s3fs aiobotocore botocore jmespath aiohttp multidict yarl propcache attrs \\
        aiohappyeyeballs aiosignal frozenlist wrapt aioitertools treelib gitpython gitdb smmap

Without PhysicsNeMo, `steps` and `memory` still run.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xgenda.diffusion.samplers import integrate
from xgenda.diffusion.schedules import karras_schedule
from xgenda.models.physicsnemo import Preconditioned, read_mdlus, write_mdlus
from xgenda.networks.songunet import SongUNet

SHAPE, OUT, CONDITION = (64, 64), 4, 8
SIGMA_DATA, LOWEST, HIGHEST, STEPS = 0.5, 0.002, 800.0, 18
LIBRARY = torch.library.Library("torchvision", "DEF")
PARTS = ("forward", "member", "train", "steps", "memory")


def own_network() -> Preconditioned:
    """Return the network with random weights."""
    torch.manual_seed(0)
    net = SongUNet(
        CONDITION + OUT + 4, OUT, SHAPE, 64, (1, 2, 2), attention=(16,), grid="sinusoidal", grid_channels=4, unbiased=True
    )
    with torch.no_grad():  # what is near zero at the start of a training would hide differences
        for name, parameter in net.named_parameters():
            if name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight")):
                parameter.mul_(1e5)
    return Preconditioned(net, SIGMA_DATA).eval().requires_grad_(False)


def pair(folder: Path) -> tuple[Preconditioned, Any]:
    """Return the same network here and there."""
    for name in ("nms", "qnms"):  # which torchvision's wheels for CUDA cannot declare beside torch for CPUs
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from physicsnemo import Module

        theirs: Any = Module.from_checkpoint(str(write_mdlus(own_network(), folder / "mini.mdlus"))).eval().requires_grad_(False)
        theirs.save(str(folder / "theirs.mdlus"))
    ours = read_mdlus(folder / "theirs.mdlus")
    assert isinstance(ours, Preconditioned)
    return ours, theirs


def compare(title: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> float:
    """Print medians in seconds and the median ratio of neighbours."""
    ours(), theirs()
    pairs = []
    for _ in range(repeats):
        begin = time.perf_counter()
        ours()
        middle = time.perf_counter()
        theirs()
        pairs.append((middle - begin, time.perf_counter() - middle))
    ratio = statistics.median(a / b for a, b in pairs)
    here, there = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{title:<42} {here:8.3f} s here {there:8.3f} s there   ratio {ratio:.2f}", flush=True)
    return ratio


def halved(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that computes in bfloat16 where torch holds that for safe."""

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function()

    return run


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, condition = torch.randn(size, OUT, *SHAPE, generator=g), torch.randn(size, CONDITION, *SHAPE, generator=g)
    return x, condition, torch.linspace(0.05, 5.0, size)


def own_member(net: Preconditioned, start: Tensor, condition: Tensor, sampler: str, steps: int) -> Tensor:
    """Return samples from unit noise."""
    with torch.inference_mode():
        levels = karras_schedule(steps, LOWEST, HIGHEST)
        return integrate(lambda x, sigma: net(x, condition, sigma), levels[0] * start, levels, sampler)


def their_member(net: Any, start: Tensor, condition: Tensor) -> Tensor:
    from physicsnemo.diffusion.samplers import stochastic_sampler

    with torch.inference_mode():
        out: Tensor = stochastic_sampler(
            net, start, condition, num_steps=STEPS, sigma_min=LOWEST, sigma_max=HIGHEST, rho=7, S_churn=0
        )
        return out


def training(net: Any) -> Callable[[], None]:
    """Return one step of training at batch 8 with the loss of Karras et al. (2022, table 1)."""
    net.train().requires_grad_(True)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-4, fused=True)
    y, condition, sigma = batch(8)
    level = sigma[:, None, None, None]
    weight = (level**2 + SIGMA_DATA**2) / (level * SIGMA_DATA) ** 2

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        found = net(y + level * torch.randn_like(y), condition, sigma)
        (weight * (found - y) ** 2).sum().div(len(y)).backward()
        optimiser.step()

    return step


class Mixture:
    """The exact denoiser of two Gaussian fields with a power spectrum k^-3, of means +0.5 and -0.5, standard deviation 0.5 in all."""

    def __init__(self, separation: float = 0.4) -> None:
        ky, kx = torch.fft.fftfreq(SHAPE[0]) * SHAPE[0], torch.fft.fftfreq(SHAPE[1]) * SHAPE[1]
        wave = (ky[:, None] ** 2 + kx[None, :] ** 2).sqrt().double().clamp(min=1)
        spectrum = wave**-3
        self.spectrum = spectrum / spectrum.mean() * (SIGMA_DATA**2 - separation**2)
        self.mean = separation * torch.cos(2 * torch.pi * torch.arange(SHAPE[1]) / SHAPE[1]).sign().double().expand(SHAPE)

    def draw(self, count: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, *SHAPE, generator=g, dtype=torch.float64)
        field = torch.fft.ifft2(torch.fft.fft2(noise) * self.spectrum.sqrt()).real
        side = torch.randint(0, 2, (count, 1, 1), generator=g) * 2 - 1
        return field + side * self.mean

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the denoised fields, shape (batch, rows, columns)."""
        gain = 1 / (self.spectrum + sigma**2)
        spectra, mean = torch.fft.fft2(x), torch.fft.fft2(self.mean)
        # the logarithm of the ratio of the two densities is linear in x
        tilt = (2 * (spectra * mean.conj()).real * gain).sum((-2, -1), keepdim=True) / x[0].numel()
        side = torch.tanh(tilt / 2)
        out: Tensor = side * self.mean + torch.fft.ifft2(self.spectrum * gain * (spectra - side * mean)).real
        return out


def crps(members: Tensor, truth: Tensor) -> float:
    """Return the fair CRPS, averaged over truths and cells."""
    count = len(members)
    ordered = members.sort(0).values
    weights = (2 * torch.arange(1, count + 1) - count - 1).double()
    spread = (weights[:, None, None] * ordered).sum(0) / (count * (count - 1))  # half the mean distance of two members
    error = torch.stack([(ordered - t).abs().mean(0) for t in truth]).mean(0)
    return float((error - spread).mean())


def steps_needed(members: int = 256) -> None:
    """Print the CRPS of Heun's method with 18 steps, and of DPM-Solver++ with fewer calls."""
    case = Mixture()
    truth, exact = case.draw(64, 1), case.draw(members, 2)
    start = torch.randn(members, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    print(f"{'draws from the distribution':<42} CRPS {crps(exact, truth):.4f}")
    for sampler, steps in (("heun", STEPS), ("dpm++", 8), ("dpm++", 10), ("dpm++", 12), ("dpm++", 14), ("dpm++", 18)):
        levels = karras_schedule(steps, LOWEST, HIGHEST)
        found = integrate(case, levels[0] * start, levels, sampler)
        calls = 2 * steps - 1 if sampler == "heun" else steps
        power = torch.fft.fft2(found - found.mean(0)).abs().square().mean(0)
        high = float((power / torch.fft.fft2(exact - exact.mean(0)).abs().square().mean(0))[16:48, 16:48].mean())
        print(
            f"{sampler + ', ' + str(steps) + ' steps':<42} CRPS {crps(found, truth):.4f}   spread {float(found.std(0).mean()):.4f}"
            f"   variance of small scales {high:.3f} of the exact   calls {calls} ({calls / 35:.2f})"
        )


def memory(who: str) -> None:
    """Print by how much a forward pass and a training step at batch 8 raise the resident memory (Linux)."""
    x, condition, sigma = batch(8)
    with tempfile.TemporaryDirectory() as folder:
        net = own_network() if who == "here" else pair(Path(folder))[1]

    def forward() -> None:
        with torch.inference_mode():
            net(x, condition, sigma)

    def resident(field: str) -> float:
        return float(Path("/proc/self/status").read_text().split(field)[1].split()[0]) / 1024

    for title, call in (("forward", forward), ("training step", training(net))):
        if title == "forward":
            net.eval()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS:")
        net.train(title != "forward")
        call()
        print(f"{'memory of a ' + title + ', batch 8, ' + who:<42} {resident('VmHWM:') - before:8.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of DPM-Solver++")
    parser.add_argument("--memory-of", choices=("here", "there"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.memory_of:
        return memory(options.memory_of)
    both = importlib.util.find_spec("physicsnemo") is not None
    if both and {"forward", "member", "train"} & set(options.parts):
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = pair(Path(folder))
        x, condition, sigma = batch(8)
        here: Callable[[], Any]
        with torch.inference_mode():
            expected = theirs(x, condition, sigma)
            print(
                f"largest difference: {float((ours(x, condition, sigma) - expected).abs().max() / expected.std()):.1e} standard deviations"
            )
            if "forward" in options.parts:
                for size in (1, 8):
                    given = x[:size], condition[:size], sigma[:size]
                    here, beside = functools.partial(ours, *given), functools.partial(theirs, *given)
                    compare(f"forward, batch {size}", here, beside, options.repeats)
                    compare(f"forward, batch {size}, bfloat16 here", halved(here), beside, options.repeats)
        if "member" in options.parts:
            start, given = x[:1], condition[:1]
            found, expected = own_member(ours, start, given, "heun", STEPS), their_member(theirs, start, given)
            print(
                f"largest difference of a member: {float((found - expected).abs().max() / expected.std()):.1e} standard deviations"
            )
            few = max(options.repeats // 3, 3)
            compare(f"member, {STEPS} steps of Heun", lambda: own_member(ours, start, given, "heun", STEPS),
                    lambda: their_member(theirs, start, given), few)  # fmt: skip
            compare(f"member, {options.steps} steps of DPM-Solver++ here", lambda: own_member(ours, start, given, "dpm++", options.steps),
                    lambda: their_member(theirs, start, given), few)  # fmt: skip
        if "train" in options.parts:
            here, beside = training(ours), training(theirs)
            compare("training step, batch 8", here, beside, max(options.repeats // 2, 3))
            compare("training step, batch 8, bfloat16 here", halved(here), beside, max(options.repeats // 2, 3))
    if "steps" in options.parts:
        steps_needed()
    if "memory" in options.parts:
        for who in ("here", "there") if both else ("here",):
            subprocess.run([sys.executable, __file__, "--memory-of", who, "--threads", str(options.threads)], check=True)


if __name__ == "__main__":
    main()

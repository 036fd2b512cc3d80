"""The mesh network: memory and time of a call against their prediction, the prediction for 0.25 degrees, and the small U-Net beside it.

python docs/benchmarks/mesh.py --cost [--sizes 46 91 181] [--widths 32 128]
python docs/benchmarks/mesh.py --published
python docs/benchmarks/mesh.py --compare [--seconds 60]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from xgenda.diffusion.memory import CallCost, call_cost, step_cost
from xgenda.grids import Grid
from xgenda.models.diffusive import SIGMA_MIN, highest_sigma
from xgenda.models.variables import VariableSpec
from xgenda.networks.icosahedron import suitable_refinement
from xgenda.networks.mesh import MeshNet
from xgenda.networks.unet import UNet
from xgenda.spherical import unit_vectors
from xgenda.training.anchoring import fit_anchors
from xgenda.training.objectives import Denoising, Draws
from xgenda.training.optimiser import Effort, Optimiser
from xgenda.training.processes import Single
from xgenda.training.weighting import loss_weights
from xgenda.training.windows import HELD, Samples

CHANNELS = 83  # of GraphCast: six variables on 13 levels and five at the surface
ROUNDS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[46, 91, 181], help="rows; the columns are 2 (rows - 1)")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seconds", type=float, default=60.0, help="of processor time in the steps of training of each network")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*json.loads(options.measure))
    if options.cost:
        cost(options.sizes, options.widths)
    if options.published:
        published()
    if options.compare:
        compare(options.seconds)


def network(rows: int, width: int, checkpointing: bool = False) -> MeshNet:
    """Return a network of a grid from pole to pole: state and condition have 83 channels each."""
    lat, lon = np.linspace(-90, 90, rows), 180 / (rows - 1) * np.arange(2 * (rows - 1))
    return MeshNet(
        CHANNELS, CHANNELS, latitude=lat, longitude=lon, width=width, refinement=suitable_refinement(lat, lon), rounds=ROUNDS,
        checkpointing=checkpointing,
    )  # fmt: skip


def predicted(net: MeshNet, training: bool, dtype: torch.dtype = torch.float32) -> CallCost:
    shape = (1, CHANNELS, *net.shape)
    return step_cost(net.train(), shape, (1,), shape) if training else call_cost(net.eval(), shape, (1,), shape, dtype=dtype)


def resident(kind: str) -> float:
    """Return the current ('VmRSS') or the highest ('VmHWM') resident memory of this process in MB."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def measure(rows: int, width: int, training: bool) -> None:
    """Call a network and print the peak of resident memory over that after the imports, and seconds of processor time."""
    tiny = network(5, 8, checkpointing=True).train()
    x = torch.zeros(1, CHANNELS, *tiny.shape)
    tiny(x, torch.zeros(1), x).square().mean().backward()  # what the libraries load and take for themselves
    before = resident("VmRSS")
    net = network(rows, width, checkpointing=training).train(training)
    shape = (1, CHANNELS, *net.shape)
    x, condition, label = torch.randn(shape), torch.randn(shape), torch.zeros(1)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on: without that of the search for triangles
    seconds, peaks = [], []
    with torch.set_grad_enabled(training):
        for _ in range(2 if training else 3):
            net.zero_grad()
            begin = time.process_time()
            found = net(x, label, condition)
            if training:
                found.square().mean().backward()
            del found
            seconds.append(time.process_time() - begin)
            peaks.append(resident("VmHWM") - before)
    print(json.dumps({"peak": peaks[0], "seconds": min(seconds)}))


def cost(sizes: list[int], widths: list[int]) -> None:
    """Compare prediction and measurement, each in a fresh process; speeds are fitted to the two smaller grids."""
    rows = []
    for training in (False, True):
        for size in sizes:
            for width in widths:
                net = network(size, width, checkpointing=training)
                plan = predicted(net, training)
                command = [sys.executable, __file__, "--measure", json.dumps([size, width, training])]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                rows.append((training, size, width, plan, found))
                print(f"{'training' if training else 'call'} {size} {width}: {found}", file=sys.stderr, flush=True)
    for training, title in ((False, "a call"), (True, "a training step, with checkpointing")):
        some = [r for r in rows if r[0] == training]
        fitted = [r for r in some if r[1] != max(sizes)] or some
        system = np.array([[r[3].flops, r[3].traffic] for r in fitted], dtype=float)
        took = np.array([r[4]["seconds"] for r in fitted])
        rate, _ = nonnegative(system / took[:, None])
        print(f"\n{title}: {CHANNELS} channels, {ROUNDS} rounds, one sample, float32, torch {torch.__version__}")
        speeds = [f"{1 / r / 1e9:.1f}" if r else "no limit" for r in rate]
        print(f"fitted to the smaller grids: {speeds[0]} GFLOP/s, {speeds[1]} GB/s written")
        print(
            f"{'grid':>10}{'width':>7}{'GFLOP':>9}{'predicted MB':>14}{'measured MB':>13}{'ratio':>7}{'predicted s':>13}{'measured s':>12}"
        )
        for _, size, width, plan, found in some:
            memory, seconds = (plan.weights + plan.memory) / 1e6, plan.flops * rate[0] + plan.traffic * rate[1]
            print(
                f"{f'{size} x {2 * size - 2}':>10}{width:7d}{plan.flops / 1e9:9.1f}{memory:14.0f}{found['peak']:13.0f}{memory / found['peak']:7.2f}"
                f"{seconds:13.2f}{found['seconds']:12.2f}"
            )


def nonnegative(system: np.ndarray) -> tuple[np.ndarray, float]:
    """Return seconds per operation and per byte that give each measurement its time, in least squares of relative errors."""
    from scipy.optimize import nnls

    found, left = nnls(system, np.ones(len(system)))
    return found, float(left)


def published() -> None:
    """Print what 721 x 1440 cells with 83 channels would take, in bfloat16."""
    flops, bandwidth = 200e12, 1e12
    print(
        f"721 x 1440, {CHANNELS} channels and as many conditions, refinement 6, {ROUNDS} rounds, one sample; predicted, not measured.\n"
        f"A call in bfloat16; training in float32, with checkpointing, without the two moments of Adam and the averages of weights.\n"
        f"Seconds at {flops / 1e12:.0f} TFLOP/s and {bandwidth / 1e12:.0f} TB/s written, which are assumptions about a large GPU."
    )
    print(
        f"{'width':>6}{'parameters':>12}{'':>10}{'TFLOP':>8}{'TB written':>12}{'weights, graph, fields GB':>27}{'peak GB':>9}{'seconds':>9}"
    )
    for width in (64, 128, 256, 512):
        net = network(721, width, checkpointing=True)
        count = sum(p.numel() for p in net.parameters()) / 1e6
        for training in (False, True):
            plan = predicted(net, training, torch.bfloat16)
            print(
                f"{width:6d}{count:10.1f} M{'training' if training else 'call':>10}{plan.flops / 1e12:8.2f}{plan.traffic / 1e12:12.3f}"
                f"{plan.weights / 1e9:27.2f}{(plan.weights + plan.memory) / 1e9:9.1f}{plan.seconds(flops, bandwidth):9.2f}",
                flush=True,
            )


def simulated(count: int, grid: Grid, seed: int = 0) -> np.ndarray:
    """Return fields with fronts, (n, 1, ny, nx): tanh of smooth random fields that know no place on the sphere, and shorter waves."""
    rng = np.random.default_rng(seed)
    points = unit_vectors(*np.meshgrid(grid.latitude, grid.longitude, indexing="ij")).reshape(-1, 3)

    def waves(number: int, lowest: float, highest: float) -> np.ndarray:
        k = rng.normal(size=(count, number, 3))
        k *= rng.uniform(lowest, highest, size=(count, number, 1)) / np.linalg.norm(k, axis=-1, keepdims=True)
        phase = rng.uniform(0, 2 * np.pi, size=(count, number, 1))
        return np.stack([np.cos(a @ points.T + b).sum(0) for a, b in zip(k, phase, strict=True)]) * math.sqrt(2 / number)

    return (np.tanh(3 * waves(12, 2, 6)) + 0.2 * waves(20, 4, 12)).reshape(count, 1, *grid.plane)


def seconds_of_a_step(net: torch.nn.Module, objective: Denoising, states: torch.Tensor) -> float:
    """Return the processor time of an optimiser step of 16 samples, that of its batch included: others may use the machine too."""
    adam, rows, took = torch.optim.AdamW(net.parameters(), 1e-6), torch.arange(16), []
    for k in range(5):
        begin = time.process_time()
        batch = objective.batch(rows, states[rows], Draws(0, k, 16))
        adam.zero_grad()
        (net(batch.x, batch.label, batch.condition) - batch.target).square().mean().backward()
        adam.step()
        took.append(time.process_time() - begin)
    return float(np.median(took))


def compare(seconds: float) -> None:
    """Train networks for the same time as corrections of the same Gaussian."""
    grid = Grid((np.arange(40) + 0.5) * 4.5 - 90.0, 4.5 * np.arange(80) - 180.0)
    values = simulated(480, grid)
    fold = np.arange(480) // 80
    samples = Samples(values, None, grid, (VariableSpec("t"),), "member")
    z = (values / values.std()).reshape(480, -1)
    final, crossed, note = fit_anchors(z, samples, fold, "eof", progress=False)
    weights = loss_weights("auto", samples.variables, grid)
    states = torch.as_tensor(z, dtype=torch.float32).reshape(480, 1, *grid.plane)
    objective = Denoising(
        states, torch.as_tensor(fold), crossed, SIGMA_MIN, highest_sigma(final), feeds_state=True, shifts=(0, 1), weights=weights
    )
    held = torch.arange(480)[fold == HELD]
    rows = torch.arange(480)[fold != HELD]
    lat, lon = grid.latitude, grid.longitude
    unet = {"width": 16, "position": 2, "shape": grid.plane}
    mesh = {"latitude": lat, "longitude": lon, "position": 2}
    networks = {
        "U-Net, width 16, across the poles": lambda: UNet(1, 1, periodic="sphere", **unet),
        "mesh, width 32, refinement 2": lambda: MeshNet(1, 1, width=32, refinement=2, **mesh),
        "mesh, width 32, refinement 3": lambda: MeshNet(1, 1, width=32, refinement=3, **mesh),
        "U-Net, width 16, poles padded by their rows": lambda: UNet(1, 1, periodic=True, **unet),
    }
    print(f"{grid.describe()}; 480 fields; {note}; {seconds:.0f} s of processor time of training each")
    print(
        f"{'network':45}{'parameters':>12}{'ms per sample':>15}{'steps':>7}{'validation loss over the Gaussian':>35}{'weight':>8}"
    )
    for name, make in networks.items():
        torch.manual_seed(0)
        net = make()
        x, label = torch.randn(16, 1, *grid.plane), torch.zeros(16)
        with torch.no_grad():
            net(x, label, x)
            times = []
            for _ in range(5):
                begin = time.process_time()
                net(x, label, x)
                times.append((time.process_time() - begin) / 16)
        each = seconds_of_a_step(make(), objective, states)
        steps = max(1, round(seconds / each))
        how = Optimiser(Effort(None, steps, None), 16, 2e-3, None, 0, False, Single(torch.device("cpu")))
        report = how.fit(net, objective, rows, held, 1.0, "prior")
        count = sum(p.numel() for p in net.parameters())
        ratio = report["validation_best"] / report["validation_without"]
        print(
            f"{name:45}{count:12d}{1e3 * min(times):15.1f}{report['steps']:7d}{ratio:35.3f}{report['correction_weight']:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

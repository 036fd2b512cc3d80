"""The trainer: what a step costs beside the network, kill -9 and resume, two processes against one.

python docs/benchmarks/trainer.py --overhead [--rounds 60] [--anchor eof]
python docs/benchmarks/trainer.py --kill 20 [--steps 120]
python docs/benchmarks/trainer.py --processes
python docs/benchmarks/trainer.py --allocator 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import load_file

import xgenda
from xgenda.training import optimiser
from xgenda.training.objectives import Draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--kill", type=int, default=0, help="number of times")
    parser.add_argument("--processes", action="store_true")
    parser.add_argument(
        "--allocator", type=int, default=0, help="number of pairs of processes, for what keeping freed memory is worth"
    )
    parser.add_argument("--rounds", type=int, default=60, help="steps of each kind that are timed")
    parser.add_argument("--grid", type=int, nargs=2, default=[64, 96], help="rows and columns, for --overhead")
    parser.add_argument("--anchor", default="eof", help="for --overhead")
    parser.add_argument("--device", default="cpu", help="for --overhead")
    parser.add_argument("--width", type=int, default=16, help="of the network, for --overhead")
    parser.add_argument("--steps", type=int, default=120, help="of the training that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if options.overhead:
        overhead(tuple(options.grid), options.anchor, options.rounds, options.device, options.width)
    if options.allocator:
        allocator(options.allocator, tuple(options.grid))
    with tempfile.TemporaryDirectory() as folder:
        if options.kill:
            kill(Path(folder), options.kill, options.steps, options.seed)
        if options.processes:
            processes(Path(folder))


def fields(count: int, shape: tuple[int, int], seed: int = 0) -> xr.Dataset:
    """Return daily fields of two variables: smooth waves with random amplitudes, some of them shared, and noise."""
    rng, (ny, nx) = np.random.default_rng(seed), shape
    wave = np.hypot(np.fft.fftfreq(ny)[:, None] * ny, np.fft.rfftfreq(nx) * nx)
    smooth = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((2, 40, ny, nx))) * np.exp(-((wave / 4) ** 2)), s=shape)
    smooth /= smooth.std()
    values = np.einsum("tk,ckyx->ctyx", rng.standard_normal((count, 40)), smooth) / 6 + 0.2 * rng.standard_normal(
        (2, count, ny, nx)
    )
    coords = {
        "time": np.datetime64("2000-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D"),
        "latitude": np.linspace(30, 60, ny),
        "longitude": np.linspace(-20, 25, nx),
    }
    dims = ("time", "latitude", "longitude")
    return xr.Dataset({"t2m": (dims, 280 + 5 * values[0], {"units": "K"}), "u10": (dims, values[1], {"units": "m s-1"})}, coords)


class Measured(Exception):
    """Ends a training whose steps have been timed."""


def overhead(shape: tuple[int, int], anchor: str, rounds: int, device: str, width: int) -> None:
    """Time steps of the trainer, and the network and optimiser alone with a batch that is there, taking turns."""

    def measure(self: optimiser.Optimiser, network: Any, objective: Any, rows: Any, *more: Any, **options: Any) -> None:
        fit = optimiser._Fit(self, network, objective, rows, more[0], more[1], "prior", None, None)
        fit.limit = 10**6
        batches = objective.fields.batches(rows, self.batch_size, self.seed)
        held, states = next(batches)
        batch = objective.batch(held, states, Draws(0, 1, self.batch_size))

        def full() -> None:
            held, states = next(batches)
            fit.losses += fit._advance(network, held, states)

        def bare() -> None:
            fit.adam.zero_grad()
            fit._loss(network, batch).backward()
            fit.adam.step()

        network.train()
        for k in range(300):  # after these each noise level has been met, whose factors are kept
            chosen = rows[torch.randint(len(rows), (len(held),), generator=torch.Generator().manual_seed(k))]
            objective.batch(chosen, states, Draws(0, k, self.batch_size))
        parts: dict[str, list[float]] = {}
        for k in range(rounds + 3):
            for name, step in (("trainer", full), ("alone", bare)):
                begin = time.perf_counter()
                step()
                if device != "cpu":
                    torch.cuda.synchronize()
                if k >= 3:
                    parts.setdefault(name, []).append(time.perf_counter() - begin)
        both, alone = (1e3 * float(np.median(parts[n])) for n in ("trainer", "alone"))
        ratio = float(np.median(np.array(parts["alone"]) / np.array(parts["trainer"])))
        of = f"{shape[0]} x {shape[1]} cells, 2 variables, anchor={anchor!r}, width {width}, {self.device.type}"
        print(
            f"{of}: step {both:.1f} ms, forward, backward and optimiser {alone:.1f} ms, overhead {1 - alone / both:.1%} "
            f"(median of neighbours {1 - ratio:.1%})",
            flush=True,
        )
        raise Measured

    before, optimiser.Optimiser.fit = optimiser.Optimiser.fit, measure  # type: ignore[assignment, method-assign]
    try:
        xgenda.train(
            fields(200, shape), anchor=None if anchor == "none" else anchor, width=width, device=device, epochs=1, progress=False
        )
    except Measured:
        pass
    finally:
        optimiser.Optimiser.fit = before  # type: ignore[method-assign]


TRAINING = """
import json, sys
import xarray as xr
import xgenda
from xgenda.training import journal

journal.SAVE_EVERY, journal.SHARE = 0.0, 1.0  # after every step, or nothing would be saved between two kills
out, options = json.loads(sys.argv[1])
xgenda.train(xr.open_dataset(out + ".nc"), out=out + ".safetensors", progress=False, **options)
"""


KEEP = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
STEPS = """
import sys, time, torch
from xgenda.networks.unet import UNet
shape = (int(sys.argv[1]), int(sys.argv[2]))
network, batch = UNet(2, 2, width=16, shape=shape), torch.randn(16, 2, *shape)
adam = torch.optim.AdamW(network.parameters())
def step():
    network(batch, torch.zeros(16), batch).square().mean().backward()
    adam.step()
    adam.zero_grad()
step()
begin = time.process_time()
for _ in range(15):
    step()
print((time.process_time() - begin) / 15)
"""


def allocator(pairs: int, shape: tuple[int, int]) -> None:
    """Time steps of the small U-Net in processes that give freed memory back and in such that keep it, taking turns."""
    found: dict[str, list[float]] = {"given back": [], "kept": []}
    for _ in range(pairs):
        for name, more in (("given back", {}), ("kept", KEEP)):
            command = [sys.executable, "-c", STEPS, *map(str, shape)]
            done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=True)
            found[name].append(float(done.stdout))
    back, kept = (1e3 * float(np.median(v)) for v in found.values())
    ratio = float(np.median(np.array(found["kept"]) / np.array(found["given back"])))
    print(f"| {back:.0f} ms | {kept:.0f} ms | {ratio:.2f} |")


def kill(folder: Path, times: int, steps: int, seed: int) -> None:
    """Kill a training again and again, and compare with one that was left alone."""
    data, rng = fields(60, (24, 32)), random.Random(seed)
    options = {"anchor": "eof", "steps": steps, "width": 8, "batch_size": 8, "seed": 3}
    for name in ("whole", "killed"):
        data.to_netcdf(folder / f"{name}.nc")

    def start(name: str, resume: bool) -> subprocess.Popen[str]:
        asked = json.dumps([str(folder / name), {**options, "resume": resume}])
        return subprocess.Popen([sys.executable, "-c", TRAINING, asked], stderr=subprocess.PIPE, text=True)

    begin = time.monotonic()
    if start("whole", False).wait():
        raise SystemExit("the training that was left alone failed")
    whole, state = time.monotonic() - begin, folder / "killed.training" / "prior.safetensors"
    at: list[int] = []
    while len(at) < times:
        before = state.stat().st_mtime_ns if state.exists() else 0
        training = start("killed", bool(at))
        begin = time.monotonic()
        while training.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):  # until it computes
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.5 * max(0.1, whole - 5.0) / times))
        if training.poll() is not None:
            raise SystemExit(
                f"it ended before it was killed {times} times: more --steps. {training.stderr and training.stderr.read()}"
            )
        training.send_signal(signal.SIGKILL)
        training.wait()
        with safe_open(state, framework="pt") as file:
            at.append(int(json.loads((file.metadata() or {})["training"])["values"]["step"]))
    last = start("killed", True)
    if last.wait():
        raise SystemExit(last.stderr and last.stderr.read())
    a, b = (load_file(folder / f"{n}.safetensors") for n in ("whole", "killed"))
    same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    print(f"killed {len(at)} times, at steps {at} of {steps}: {'every bit is the same' if same else 'THE WEIGHTS DIFFER'}")


def processes(folder: Path) -> None:
    """Train in one process and in two, by the documented commands."""
    fields(80, (24, 32)).to_netcdf(folder / "data.nc")
    options = ["--device", "cpu", "--anchor", "eof", "--steps", "60", "--width", "8", "--batch-size", "16", "--seed", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for count in (1, 2):
        launcher = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [sys.executable, *launcher, "-m", "xgenda.training", str(folder / "data.nc"), *options]
        subprocess.run(
            [*command, "--out", str(folder / f"{count}.safetensors")], check=True, env=environment, stdout=subprocess.DEVNULL
        )
    one, two = (xgenda.load_model(folder / f"{n}.safetensors") for n in (1, 2))
    weights = max(float((v - two.tensors()[k]).abs().max()) for k, v in one.tensors().items())
    losses = max(float(np.abs(one.history[n] - two.history[n]).max()) for n in ("loss", "validation_loss"))
    print(f"two processes and one, 60 steps of 16: largest difference of weights {weights:.1e}, of losses {losses:.1e}")


if __name__ == "__main__":
    main()

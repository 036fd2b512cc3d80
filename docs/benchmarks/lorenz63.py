"""Noisy Lorenz-63 of Rozet & Louppe (2023): posteriors of 65 states from models of 3 to 9 states, against a particle filter.

python docs/benchmarks/lorenz63.py            # hours on one core; results are kept in --cache as they come
python docs/benchmarks/lorenz63.py --quick    # about a minute, numbers without meaning

The distance is the 1-Wasserstein distance between as many draws of a method as of the particle filter. It never falls below that between
two independent filters, the floor, and grows as the number of draws falls: compare a row with the floor of the same table only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torch.nn import functional as F

from xgenda.diffusion.denoisers import Denoiser, EDMDenoiser
from xgenda.diffusion.evidence import FunctionEvidence
from xgenda.diffusion.guidance import guide
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.samplers import integrate
from xgenda.diffusion.schedules import noise_levels, sigma_of
from xgenda.diffusion.trajectories import TrajectoryDenoiser

DT, LENGTH = 0.025, 65
MEAN, STD = torch.tensor([0.0, 0.0, 25.0]), torch.tensor([8.0, 9.0, 8.6])
#: Every how many states the first component is observed, and the standard deviation of its error in units of the state's.
CASES = {"lo": (8, 0.05), "hi": (1, 0.25)}


# The system, in physical units


def forecast(x: Tensor) -> Tensor:
    """Return the mean of the next state: one step of the fourth-order Runge-Kutta method."""

    def slope(x: Tensor) -> Tensor:
        a, b, c = x.unbind(-1)
        return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)

    k1 = slope(x)
    k2 = slope(x + DT / 2 * k1)
    k3 = slope(x + DT / 2 * k2)
    k4 = slope(x + DT * k3)
    return x + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def simulate(count: int, length: int, seed: int, spin_up: int = 1024) -> Tensor:
    """Return trajectories of the noisy system, (count, length, 3)."""
    generator = torch.Generator().manual_seed(seed)
    x = MEAN + STD * torch.randn(count, 3, generator=generator)
    states = torch.empty(count, length, 3)
    for i in range(-spin_up, length):
        x = forecast(x) + math.sqrt(DT) * torch.randn(count, 3, generator=generator)
        if i >= 0:
            states[:, i] = x
    return states


def log_prior(x: Tensor) -> Tensor:
    """Return log p(x_2, ..., x_L | x_1) of trajectories."""
    squares = (x[:, 1:] - forecast(x[:, :-1])).square().sum((1, 2)) / DT
    return -0.5 * squares - 1.5 * (x.shape[1] - 1) * math.log(2 * math.pi * DT)


def observe(x: Tensor, case: str) -> Tensor:
    """Return what is observed of standardised trajectories, without errors."""
    return x[:, :: CASES[case][0], 0]


def log_likelihood(x: Tensor, y: Tensor, case: str) -> Tensor:
    """Return log p(y | x) of trajectories in physical units."""
    error = CASES[case][1]
    departure = (y - observe((x - MEAN) / STD, case)) / error
    return (-0.5 * departure.square() - math.log(error * math.sqrt(2 * math.pi))).sum(1)


def particle_filter(y: Tensor, case: str, first: Tensor, draws: int, seed: int) -> Tensor:
    """Return trajectories of the posterior: a bootstrap filter with systematic resampling that carries whole trajectories."""
    generator = torch.Generator().manual_seed(seed)
    every, error = CASES[case]
    count = len(first)
    x = first[torch.randperm(count, generator=generator)][:, None]
    for i in range(LENGTH):
        if i:
            step = forecast(x[:, -1]) + math.sqrt(DT) * torch.randn(count, 3, generator=generator)
            x = torch.cat([x, step[:, None]], 1)
        if i % every == 0:
            departure = (y[i // every] - (x[:, -1, 0] - MEAN[0]) / STD[0]) / error
            weight = torch.softmax(-0.5 * departure.double().square(), 0)
            comb = (torch.arange(count) + torch.rand(1, generator=generator, dtype=torch.float64)) / count
            x = x[torch.searchsorted(weight.cumsum(0), comb).clamp(max=count - 1)]
    return x[torch.randperm(count, generator=generator)[:draws]]


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Return the exact earth mover's distance between equally many trajectories."""
    cost = cdist(a.flatten(1).double().numpy(), b.flatten(1).double().numpy())
    return float(cost[linear_sum_assignment(cost)].mean())


# The model of a window


class WindowNetwork(nn.Module):
    """F of `EDMDenoiser` for windows of 2 k + 1 states: a residual network of fully connected layers.

    It sees the states and their first and second differences in time, each divided by its standard deviation at this noise level:
    neighbouring states differ little, and layers in bfloat16 would lose that. The differences are taken in float32.
    """

    def __init__(self, k: int, width: int = 128, blocks: int = 4, spread: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        states = 2 * k + 1
        eye = torch.eye(states)
        first = eye.diff(dim=0)
        rows = torch.cat([eye, first, first.diff(dim=0)])
        order = torch.tensor([0] * states + [1] * (states - 1) + [2] * (states - 2))
        self.register_buffer("differences", torch.kron(rows, torch.eye(3)))
        self.register_buffer("gain", rows.square().sum(1).repeat_interleave(3))
        self.register_buffer("natural", torch.tensor([1.0, *spread])[order].repeat_interleave(3) ** 2)
        self.register_buffer("frequencies", math.pi / 4 * torch.arange(1, 17))
        self.embed = nn.Sequential(nn.Linear(33, width), nn.SiLU())
        self.enter = nn.Linear(len(self.differences), width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.shift = nn.Linear(width, blocks * width)
        self.leave = nn.Linear(width, 3 * states)
        for layer in self.outer:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return F for x / sqrt(1 + sigma^2) and ln(sigma) / 4."""
        if not self.training:
            label = label[:1]  # a sampler asks for one noise level at a time
        variance = (8 * label).exp()[:, None]
        scale = ((1 + variance) / (self.natural + self.gain * variance)).sqrt()
        phase = label[:, None] * self.frequencies
        time = self.embed(torch.cat([label[:, None], phase.sin(), phase.cos()], 1))
        shifts = self.shift(time).chunk(len(self.inner), 1)
        seen = (x @ self.differences.T) * scale
        with torch.autocast("cpu", torch.bfloat16):
            h = self.enter(seen)
            for inner, outer, shift in zip(self.inner, self.outer, shifts, strict=True):
                if self.training:
                    part = inner(h) + shift.to(h.dtype)
                else:
                    part = F.linear(h, inner.weight, inner.bias + shift[0])
                h = h + outer(F.silu(part))
            return self.leave(F.silu(h)).float()


def windows(states: Tensor, k: int, count: int, generator: torch.Generator) -> Tensor:
    """Return random windows of trajectories (n, length, 3), flattened."""
    which = torch.randint(len(states), (count,), generator=generator)
    start = torch.randint(states.shape[1] - 2 * k, (count,), generator=generator)
    return states[which[:, None], start[:, None] + torch.arange(2 * k + 1)].flatten(1)


def noisy(clean: Tensor, sigma: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return input, label and target of the network for clean windows (n, m) and levels (n, 1)."""
    total = (1 + sigma**2).sqrt()
    e = torch.randn(clean.shape, generator=generator)
    # x0 - (x0 + sigma e) / total^2, over sigma / total: the target has unit variance where the states have
    return (clean + sigma * e) / total, sigma[:, 0].log() / 4, (sigma * clean - e) / total


def train(
    k: int, steps: int, cache: Path, *, width: int = 128, blocks: int = 4, batch: int = 2048, rate: float = 2e-3
) -> EDMDenoiser:
    """Return the denoiser of windows of 2 k + 1 states, from the cache where it was trained before."""
    path = cache / f"window{k}-{width}x{blocks}-{steps}.safetensors"
    data = (simulate(1024, 1024, seed=1) - MEAN) / STD if not path.exists() else torch.zeros(1, 16, 3)
    spread = (float(data.diff(dim=1).std()), float(data.diff(n=2, dim=1).std()))
    torch.manual_seed(k)
    network = WindowNetwork(k, width, blocks, spread)
    if path.exists():
        network.load_state_dict(load_file(path))
        return EDMDenoiser(network).eval().requires_grad_(False)
    average = {n: p.clone() for n, p in network.state_dict().items()}
    # the composition keeps the centre of a window, and of the others only those at the two ends of the trajectory
    importance = torch.ones(2 * k + 1, 1).expand(-1, 3).clone()
    importance[k] = 2 * k
    importance = (importance / importance.mean()).flatten()
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(100 + k)
    network.train()
    began, recent = time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (1 - step / steps)
        sigma = sigma_of("vp-cosine", torch.rand(batch, 1, generator=generator)).clamp(1e-3, 1e3)
        x, label, target = noisy(windows(data, k, batch, generator), sigma, generator)
        loss = (importance * (network(x, label) - target).square()).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        recent += float(loss.detach())
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name].lerp_(value, 1 / min(step + 1, 500))
        if (step + 1) % max(steps // 8, 1) == 0:
            mean = recent / max(steps // 8, 1)
            print(f"k = {k}: step {step + 1}, loss {mean:.5f}, {time.perf_counter() - began:.0f} s", flush=True)
            recent = 0.0
    network.load_state_dict(average)
    cache.mkdir(parents=True, exist_ok=True)
    save_file(average, path)
    return EDMDenoiser(network).eval().requires_grad_(False)


# Posteriors


@dataclass(frozen=True)
class Stage:
    """Predictor-corrector steps over a part of the noise levels."""

    levels: int
    high: float
    low: float
    corrections: int
    tau: float
    schedule: str = "log"

    def __str__(self) -> str:
        """Return a part of a line for a table."""
        return (
            f"pc (corrections {self.corrections}, tau {self.tau}), "
            f"{self.levels} levels {self.schedule} {self.low:g} to {self.high:g}"
        )


@dataclass(frozen=True)
class Method:
    """A way to sample a posterior; each stage starts at the level where the one before ends."""

    guidance: str
    options: dict[str, float | int | str]
    stages: tuple[Stage, ...]

    def __str__(self) -> str:
        """Return a line for a table."""
        options = ", ".join(f"{k} {v}" for k, v in self.options.items())
        return f"{self.guidance} ({options}), " + "; ".join(map(str, self.stages))


def published(corrections: int) -> Method:
    """Return the method of Rozet & Louppe (2023) as in their evaluation."""
    return Method("sda", {"gamma": 3e-2}, (Stage(256, 1e3, 1e-3, corrections, 0.25, "vp-cosine"),))


# At most a quarter of the 4,352 evaluations of the published method with 16 corrections, counting forward and backward passes alike.
# One stage from twice the standard deviation of the state down wins little. Three win more:
# - Above 0.3 a window knows too little of its trajectory for the composed score to be right, so few steps are spent there.
# - Between 0.3 and 0.05 the chain moves along the whole trajectory within tens of steps, which have to be long.
# - Long steps leave too much variance in what is stiff, the noise of each state, which short ones at low noise take out again.
FASTER = [
    Method("sda", {"gamma": 3e-2}, (Stage(32, 2.0, 1e-2, 16, 0.5),)),
    Method("mmps", {"iterations": 1}, (Stage(21, 2.0, 1e-2, 16, 0.5),)),
    Method("mmps", {"iterations": 2}, (Stage(16, 2.0, 1e-2, 16, 0.8),)),
    Method("sda", {"gamma": 3e-2}, (Stage(8, 2.0, 0.3, 8, 0.5), Stage(9, 0.3, 0.05, 48, 0.5), Stage(10, 0.05, 3e-3, 8, 0.15))),
    Method("mmps", {"iterations": 1}, (Stage(8, 2.0, 0.3, 4, 0.5), Stage(9, 0.3, 0.05, 30, 0.6), Stage(9, 0.05, 3e-3, 7, 0.15))),
    Method("mmps", {"iterations": 2}, (Stage(7, 2.0, 0.3, 6, 0.7), Stage(8, 0.3, 0.05, 18, 0.8), Stage(9, 0.05, 3e-3, 8, 0.15))),
    # 1,611 evaluations and products, a fifth of the 8,672 of the published method: what mmps does with the steps of sda
    Method("mmps", {"iterations": 1}, (Stage(8, 2.0, 0.3, 8, 0.5), Stage(9, 0.3, 0.05, 48, 0.6), Stage(10, 0.05, 3e-3, 8, 0.15))),
]


@dataclass
class Counter:
    """A denoiser that counts its evaluations and the vector-Jacobian products through it."""

    denoise: Denoiser
    forward: int = 0
    backward: int = 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the denoised state."""
        self.forward += 1
        out = self.denoise(x, sigma)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, _: Tensor) -> None:
        self.backward += 1


def sample(model: Denoiser, k: int, y: Tensor, case: str, method: Method, draws: int, label: str) -> tuple[Tensor, Counter]:
    """Return draws of the posterior in physical units, and the counted denoiser."""
    counter = Counter(TrajectoryDenoiser(model, k))
    evidence = FunctionEvidence(lambda x: observe(x, case), (LENGTH, 3), y, CASES[case][1] ** 2, linear=True)
    guided = guide(counter, evidence, method.guidance, **method.options)
    noise = NoiseStream([(0, label, member) for member in range(draws)])
    x = method.stages[0].high * noise.normal(LENGTH, 3)
    for stage in method.stages:
        levels = noise_levels(stage.schedule, stage.levels, stage.low, stage.high)
        kept = levels if stage is method.stages[-1] else levels[:-1]  # without the zero
        x = integrate(guided, x, kept, "pc", noise, corrections=stage.corrections, tau=stage.tau)
    return MEAN + STD * x, counter


@dataclass
class Problem:
    """Observations of test trajectories with the draws of two particle filters each."""

    case: str
    y: Tensor
    first: Tensor
    draws: int
    filters: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def make(cls, case: str, observations: int, first: Tensor, draws: int) -> Problem:
        """Return the same observations for all methods and any number of them."""
        truth = (simulate(64, LENGTH, seed=4) - MEAN) / STD
        generator = torch.Generator().manual_seed(5)
        y = observe(truth, case)
        return cls(case, (y + CASES[case][1] * torch.randn(y.shape, generator=generator))[:observations], first, draws)

    def oracle(self, i: int) -> tuple[Tensor, Tensor]:
        """Return draws of two independent filters."""
        if i not in self.filters:
            a, b = (particle_filter(self.y[i], self.case, self.first, self.draws, seed) for seed in (1, 2))
            self.filters[i] = a, b
        return self.filters[i]

    def scores(self, i: int, x: Tensor) -> dict[str, float]:
        """Return the scores of draws of the posterior of an observation."""
        return {
            "W1": wasserstein(x, self.oracle(i)[0]),
            "prior": float(log_prior(x).mean()),
            "likelihood": float(log_likelihood(x, self.y[i], self.case).mean()),
        }


class Results:
    """Scores on disk, one line each, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, float]] = {}
        if path.exists():
            self.known = {r.pop("key"): r for r in map(json.loads, path.read_text().splitlines())}

    def get(self, key: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return the scores under this key, computed if they are not there."""
        if key not in self.known:
            began = time.perf_counter()
            found = {**make(), "seconds": time.perf_counter() - began}
            self.known[key] = found
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, **found}) + "\n")
        return self.known[key]


def row(name: str, scores: list[dict[str, float]], floors: list[float]) -> str:
    """Return a line of a table: medians over the observations, and the mean of the paired difference to the floor."""
    median = {k: float(np.median([s[k] for s in scores])) for k in scores[0]}
    above = np.array([s["W1"] for s in scores]) - np.array(floors)
    error = above.std(ddof=1) / math.sqrt(len(above)) if len(above) > 1 else math.nan
    return (
        f"| {name} | {median['W1']:.2f} | {above.mean():+.2f} ({error:.2f}) | {median['prior']:.1f} | {median['likelihood']:.2f} | "
        f"{median['forward']:.0f} + {median['backward']:.0f} | {median['seconds']:.0f} |"
    )


def run(problem: Problem, models: dict[int, Denoiser], plan: list[tuple[int, Method]], results: Results, training: int) -> None:
    """Print a table of the methods of a plan on all observations of a problem."""
    count, case = len(problem.y), problem.case
    print(
        f"\n{case}: {count} observations, {problem.draws} draws, {len(problem.first)} particles, training of {training} steps\n"
    )
    print(
        "| k | method | W1 | above the floor (standard error) | log p(x2:L given x1) | log p(y given x) | forward + backward | s |"
    )
    print("|---|---|---|---|---|---|---|---|")

    def floor(i: int) -> dict[str, float]:
        return {**problem.scores(i, problem.oracle(i)[1]), "forward": 0, "backward": 0}

    tag = f"{case}|{problem.draws}|{len(problem.first)}"
    reference = [results.get(f"{tag}|{i}|filter", lambda i=i: floor(i)) for i in range(count)]
    floors = [s["W1"] for s in reference]
    print(row("| particle filter", reference, floors), flush=True)
    for k, method in plan:

        def scored(i: int, k: int = k, method: Method = method) -> dict[str, float]:
            x, counter = sample(models[k], k, problem.y[i], case, method, problem.draws, f"{case} {i}")
            return {**problem.scores(i, x), "forward": counter.forward, "backward": counter.backward}

        found = [results.get(f"{tag}|{i}|{k}|{training}|{method}", lambda i=i, s=scored: s(i)) for i in range(count)]
        print(row(f"{k} | {method}", found, floors), flush=True)


def main() -> None:
    """Train what is not in the cache, sample, and print one table per case."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xgenda-benchmarks" / "lorenz63"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=home, help="where weights and scores are kept")
    parser.add_argument("--quick", action="store_true", help="a minute: little training, one observation, few draws, two methods")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--k", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--corrections", nargs="*", type=int, default=[1, 4, 16], help="of the published method")
    parser.add_argument(
        "--faster", nargs="*", type=int, default=[4], help="values of k for the methods with a quarter of the calls"
    )
    parser.add_argument("--observations", type=int, default=8)
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--training", type=int, default=10000, help="steps")
    parser.add_argument("--particles", type=int, default=16384)
    args = parser.parse_args()
    if args.quick:
        args.case, args.k, args.corrections, args.faster = ["lo"], [2], [1], [2]
        args.observations, args.draws, args.training = 1, 32, 200
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    models = {k: train(k, args.training, args.cache) for k in sorted({*args.k, *args.faster})}
    first = simulate(args.particles, 1, seed=3, spin_up=512)[:, 0]
    results = Results(args.cache / "scores.jsonl")
    plan = [(k, published(c)) for k in args.k for c in args.corrections] + [
        (k, m) for k in args.faster for m in FASTER[: 1 if args.quick else None]
    ]
    for case in args.case:
        run(Problem.make(case, args.observations, first, args.draws), models, plan, results, args.training)


if __name__ == "__main__":
    main()

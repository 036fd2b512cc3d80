"""What sampling costs beyond the network, what a guided step costs in forward passes, and the same beside azula.

python docs/benchmarks/cost.py [--batch 8] [--repeats 7]

On the bundled model `ocean-twin`, states of 5 x 64 x 64, one thread. Times are of the process (not of the clock, so that other programs
disturb less), medians of interleaved repeats. `azula` (0.11) is only needed for the last table: pip install --no-deps azula einops
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import xgenda
from xgenda.diffusion.evidence import LinearEvidence
from xgenda.diffusion.guidance import GUIDANCES, guide
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.samplers import SAMPLERS, integrate, network_calls
from xgenda.diffusion.schedules import noise_levels
from xgenda.models.diffusive import DiffusionModel

STEPS = 6


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the process seconds of every repeat; the functions take turns."""
    out: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            out[name].append(time.process_time() - begin)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = xgenda.load_model("ocean-twin")
    assert isinstance(model, DiffusionModel)
    denoise, batch = model.denoiser, options.batch
    levels = noise_levels("karras", STEPS, 0.02, 80.0)
    stream = NoiseStream([(0, "t", k) for k in range(batch)])
    start = levels[0] * stream.normal(5, 64, 64, dtype=torch.float64)
    sigma = levels[STEPS // 2]
    noisy = start / levels[0] * sigma
    for level in levels[:-1]:
        denoise(start, level)  # the parts of the anchor that depend on the level are made once

    def once() -> None:
        with torch.no_grad():
            denoise(noisy, sigma)

    print(f"{STEPS} levels, batch of {batch}\n| sampler | network calls | time over calls x one call |\n|---|---|---|")
    functions: dict[str, Callable[[], Any]] = {"one": lambda: [once() for _ in range(STEPS)]}
    for sampler in SAMPLERS:

        def run(sampler: str = sampler) -> None:
            with torch.no_grad():
                integrate(denoise, start, levels, sampler, stream)

        functions[sampler] = run
    found = interleaved(functions, options.repeats)
    for sampler in SAMPLERS:
        calls = network_calls(sampler, STEPS)
        ratio = statistics.median(a / (calls * b / STEPS) for a, b in zip(found[sampler], found["one"], strict=True))
        print(f"| {sampler} | {calls} | {ratio:.3f} |", flush=True)

    cells = torch.randperm(5 * 64 * 64, generator=torch.Generator().manual_seed(0))[:1000][None, :, None]
    one = torch.ones(1, 1000, 1, dtype=torch.float64)
    evidence = LinearEvidence(
        cells, one, 0 * one, one, torch.zeros(1, 1000), torch.full((1, 1000), 0.09), torch.zeros(batch, dtype=torch.long)
    )
    # as a sampler asks: other states at every call, each level twice, so that nothing is known from before
    asked = [(noisy + 0.1 * k * start / levels[0], sigma * 0.9 ** (k // 2)) for k in range(6)]

    def forwards() -> None:
        with torch.no_grad():
            for x, s in asked:
                denoise(x, s)

    functions = {"one": forwards}
    for name, kind, more in [*((k, k, {}) for k in GUIDANCES), ("mmps, 1 iteration", "mmps", {"iterations": 1})]:

        def steps(kind: str = kind, more: dict[str, Any] = more) -> None:
            guided = guide(denoise, evidence, kind, anchor=model.covariance, **more)
            for x, s in asked:
                guided(x, s)

        functions[name] = steps
    print("\n| guidance (1,000 observations) | one step, in forward passes |\n|---|---|")
    found = interleaved(functions, options.repeats)
    for name in functions:
        if name != "one":
            ratio = statistics.median(a / b for a, b in zip(found[name], found["one"], strict=True))
            print(f"| {name} | {ratio:.2f} |", flush=True)

    if importlib.util.find_spec("azula") is None:
        print("\nazula is not installed; its table is left out.")
        return
    beside_azula(denoise, start, options.repeats)


def beside_azula(denoise: Any, start: torch.Tensor, repeats: int) -> None:
    """Print the differences of results and the ratios of times where the methods coincide."""
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VESchedule
    from azula.sample import DDIMSampler, EulerSampler, HeunSampler

    class Wrapped(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = VESchedule(0.02, 80.0)

        def forward(self, x: torch.Tensor, t: torch.Tensor, **_: Any) -> DiracPosterior:
            return DiracPosterior(mean=denoise(x, float(self.schedule.sigma(t))))

    levels = noise_levels("log", STEPS + 1, 0.02, 80.0)[:-1]  # azula stops at the lowest level
    wrapped = Wrapped()
    print("\n| method | largest difference | xgenda over azula, time |\n|---|---|---|")
    for name, theirs in (("ddim", DDIMSampler), ("ddim (euler)", EulerSampler), ("heun", HeunSampler)):
        sampler = theirs(wrapped, steps=STEPS, silent=True, dtype=torch.float64)
        results: dict[str, torch.Tensor] = {}

        def run_ours(name: str = name, results: dict[str, torch.Tensor] = results) -> None:
            with torch.no_grad():
                results["ours"] = integrate(denoise, start, levels, name.split()[0])

        def run_theirs(sampler: Any = sampler, results: dict[str, torch.Tensor] = results) -> None:
            results["theirs"] = sampler(start)

        found = interleaved({"ours": run_ours, "theirs": run_theirs}, repeats)
        ratio = statistics.median(a / b for a, b in zip(found["ours"], found["theirs"], strict=True))
        difference = (results["ours"] - results["theirs"]).abs().max().item() / results["ours"].std().item()
        print(f"| {name} | {difference:.1e} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()

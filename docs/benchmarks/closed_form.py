"""Every guidance with an exact Gaussian denoiser against the closed-form posterior: 4,096 draws, three covariances, four operators.

python docs/benchmarks/closed_form.py

The prior is N(0, S) with unit variance on 8 x 10 cells. For each row: the error of the mean (root mean square over the cells, in units of
the posterior standard deviation, less what 4,096 draws scatter), the ratio of the variances, and the same two in standard errors: `z mean` is
the root mean square of the mean's error, `z cov` that of the whole covariance matrix (1 is what an exact sampler has; neighbouring
cells err together, so `z mean` varies from 0.5 to 1.6 between seeds).

Most rows are affine in the start: then the map from start to end is measured once, with as many starts as the state has cells, and
applied to the 4,096 draws; 64 of them are also taken through the sampler, and must agree to 1e-6 (1e-4 for `mmps`, whose solver stops).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from xgenda.diffusion.anchors import LowRank
from xgenda.diffusion.covariances import KernelCovariance, SphereKernel
from xgenda.diffusion.denoisers import Denoiser, GaussianDenoiser
from xgenda.diffusion.evidence import LinearEvidence
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.guidance import guide
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.samplers import integrate
from xgenda.diffusion.schedules import noise_levels

NY, NX = 8, 10
N = NY * NX
COVARIANCES = {"long": ("exponential", 3e6), "short": ("matern32", 3e5), "white": ("exponential", 1.0)}
ROWS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("anchor", {}, "heun", {}),
    ("mmps", {"iterations": 12}, "heun", {}),
    ("mmps", {"iterations": 5}, "heun", {}),
    ("mmps", {"iterations": 1}, "heun", {}),
    ("pigdm", {}, "heun", {}),
    ("sda", {"gamma": 0.03}, "heun", {}),
    ("sda", {"gamma": 0.1}, "heun", {}),
    ("sda", {"gamma": 0.3}, "heun", {}),
    ("sda", {"gamma": 1.0}, "heun", {}),
    ("sda", {"gamma": 0.3, "detach": True}, "heun", {}),
    ("w2c", {"gamma": 0.3}, "heun", {}),
    ("w2c", {"gamma": 1.0}, "heun", {}),
    ("dps", {"zeta": 1.0}, "heun", {}),
    ("diffpir", {"lambda": 1.0}, "heun", {}),
    ("diffpir", {"lambda": 1.0}, "ancestral", {}),
    ("inpaint", {}, "ancestral", {"resample": 4}),
]


def operators() -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Rows of each operator and its observation error; the prior has standard deviation 1."""
    cells = torch.arange(N).reshape(NY, NX)
    blocks = cells.reshape(NY // 2, 2, NX // 2, 2).permute(0, 2, 1, 3).reshape(-1, 4)
    points = torch.randperm(N, generator=torch.Generator().manual_seed(1))[: N // 20][:, None]
    # a 5 x 5 binomial blur, at every other cell whose kernel lies inside
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    centres = [(i, j) for i in range(2, NY - 2) for j in range(2, NX - 2)]
    blurred = torch.stack([cells[i - 2 : i + 3, j - 2 : j + 3].reshape(-1) for i, j in centres])
    return {
        "identity": (cells.reshape(-1, 1), torch.ones(N, 1), 1.0),
        "block mean": (blocks, torch.full(blocks.shape, 0.25), 0.3),
        "5 % points": (points, torch.ones(points.shape), 0.3),
        "blurred": (blurred, torch.outer(line, line).reshape(1, -1).expand(len(blurred), -1), 0.3),
    }


#: Guidances, and Krylov iterations, for which the sampler is an affine map.
AFFINE = (("anchor", None), ("mmps", 12), ("pigdm", None), ("sda", None), ("w2c", None), ("diffpir", None))


def through_affine_map(
    guide_for: Callable[..., Denoiser], start: torch.Tensor, levels: list[float], kind: str, chosen: dict[str, Any]
) -> torch.Tensor | None:
    """Return the ends of all starts from the ends of zero and of the unit vectors, or None where the map is not affine."""

    def run(starts: torch.Tensor) -> torch.Tensor:
        guided = guide_for(len(starts), kind, chosen)
        return integrate(guided, starts + guided(starts, levels[0]), levels, "heun").flatten(1)

    scale = levels[0]  # as large as the starts, so that no rounding is blown up
    units = torch.cat([torch.zeros(1, N, dtype=torch.float64), scale * torch.eye(N, dtype=torch.float64)])
    ends = run(units.reshape(-1, 1, NY, NX))
    found = ends[0] + start.flatten(1) / scale @ (ends[1:] - ends[0])
    few = run(start[:64])
    return found if (few - found[:64]).abs().max() < 1e-6 * found.std() + 1e-4 * (kind == "mmps") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4096)
    parser.add_argument("--levels", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draws = options.draws
    latitude, longitude = torch.linspace(20, 48, NY), torch.arange(NX) * 4.0
    white = NoiseStream([(0, "t", k) for k in range(draws)])
    print("| covariance | operator | guidance | sampler | error of the mean | variance | z mean | z cov | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cov_name, (kernel, length) in COVARIANCES.items():
        prior = KernelCovariance([SphereKernel(latitude, longitude, kernel, length)], torch.ones(1, N))
        anchor = LowRank.of(prior)
        levels = noise_levels("karras", options.levels, 0.005, 10 * anchor.largest() ** 0.5 + 20)
        start = levels[0] * white.normal(1, NY, NX, dtype=torch.float64)
        for name, (indices, weights, error) in operators().items():
            variance = torch.full((len(indices),), error**2, dtype=torch.float64)
            # observations of a state of the prior, as in nature
            state = prior.draw(NoiseStream([(1, name, 0)]))[0]
            noise = NoiseStream([(2, name, 0)]).normal(len(indices), dtype=torch.float64)[0]
            value = (state[indices] * weights).sum(1) + error * noise
            exact = GaussianPosterior(prior, indices, weights, variance)
            mean, cov = exact.mean(torch.zeros(N), value), exact.dense_covariance()
            w = weights.double()[None]

            def guide_for(
                count: int,
                kind: str,
                chosen: dict[str, Any],
                parts: tuple[torch.Tensor, ...] = (
                    indices[None],
                    w,
                    torch.zeros_like(w),
                    torch.ones_like(w),
                    value[None],
                    variance[None],
                ),
                anchor: LowRank = anchor,
            ) -> Denoiser:
                evidence = LinearEvidence(*parts, torch.zeros(count, dtype=torch.long))
                return guide(GaussianDenoiser(torch.zeros(N), anchor), evidence, kind, anchor=anchor, **chosen)

            for kind, chosen, sampler, extra in ROWS:
                begin = time.perf_counter()
                stream = NoiseStream([(3, "t", k) for k in range(draws)])
                found = None
                if sampler == "heun" and (kind, chosen.get("iterations")) in AFFINE:
                    found = through_affine_map(guide_for, start, levels, kind, chosen)
                if found is None:
                    guided = guide_for(draws, kind, chosen)
                    found = integrate(guided, start + guided(start, levels[0]), levels, sampler, stream, **extra).flatten(1)
                error_of = (found.mean(0) - mean) / cov.diagonal().sqrt()
                scatter = found.var(0) / cov.diagonal() / draws
                bias = (error_of**2 - scatter).mean().clamp(min=0).sqrt()
                z = (error_of**2 * draws).mean().sqrt()
                spread = (cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / draws
                c = ((torch.cov(found.T) - cov) ** 2 / spread).mean().sqrt()
                ratio = (found.var(0) / cov.diagonal()).mean()
                label = kind + "".join(f", {k} {v}" for k, v in chosen.items())
                how = sampler + "".join(f", {k} {v}" for k, v in extra.items())
                print(
                    f"| {cov_name} | {name} | {label} | {how} | {bias:.2f} | {ratio:.2f} | {z:.1f} | {c:.1f} "
                    f"| {time.perf_counter() - begin:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

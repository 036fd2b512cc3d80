"""Guided diffusion with an exact Gaussian denoiser against the closed-form posterior: 4,096 draws, three operators.

python docs/benchmarks/closed_form.py
"""

from __future__ import annotations

import torch

from xgenda.diffusion.anchors import LowRank
from xgenda.diffusion.covariances import KernelCovariance, SphereKernel
from xgenda.diffusion.denoisers import GaussianDenoiser
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.guidance import Evidence, guide
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.samplers import integrate, karras_schedule

NY, NX, DRAWS, STEPS = 6, 8, 4096, 48
N = NY * NX


def operators() -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Rows of each operator and its observation error; the prior has standard deviation 1."""
    blocks = torch.arange(N).reshape(3, 2, 4, 2).permute(0, 2, 1, 3).reshape(12, 4)
    points = torch.randint(0, N, (5, 4), generator=torch.Generator().manual_seed(1))
    return {
        "identity": (torch.arange(N)[:, None], torch.ones(N, 1), 1.0),
        "block mean": (blocks, torch.full((12, 4), 0.25), 0.3),
        "scattered points": (points, torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(5, 4), 0.3),
    }


def main() -> None:
    torch.set_num_threads(1)
    kernel = SphereKernel(torch.linspace(30, 60, NY), torch.linspace(0, 35, NX), "exponential", 1e6, 72)
    prior = KernelCovariance([kernel], torch.ones(1, N))
    anchor = LowRank.of(prior)
    levels = karras_schedule(STEPS, 0.005, 120.0)
    noise = NoiseStream([(0, "t", k) for k in range(DRAWS)]).normal(1, NY, NX)
    print(
        "| operator | guidance | mean, largest z | mean, rms z | covariance, rms z | variance ratio |\n|---|---|---|---|---|---|"
    )
    for name, (indices, weights, error) in operators().items():
        variance = torch.full((len(indices),), error**2, dtype=torch.float64)
        value = torch.randn(len(indices), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        exact = GaussianPosterior(prior, indices, weights, variance)
        mean, cov = exact.mean(torch.zeros(N), value), exact.dense_covariance()
        w = weights.double()[None]
        evidence = Evidence(indices[None], w, torch.zeros_like(w), torch.ones_like(w), value[None], variance[None])
        for kind, options in (
            ("anchor", {}),
            ("mmps", {"iterations": 8}),
            ("sda", {"gamma": 0.1}),
            ("sda", {"gamma": 0.3}),
            ("sda", {"gamma": 1.0}),
        ):
            guided = guide(
                GaussianDenoiser(torch.zeros(N), anchor),
                evidence,
                torch.zeros(DRAWS, dtype=torch.long),
                kind,
                anchor=anchor,
                **options,
            )
            start = levels[0] * noise
            draws = integrate(guided, start + guided(start, levels[0]), levels).flatten(1).double()
            z = (draws.mean(0) - mean) / (cov.diagonal() / DRAWS).sqrt()
            c = (torch.cov(draws.T) - cov) / ((cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / DRAWS).sqrt()
            ratio = draws.var(0).mean() / cov.diagonal().mean()
            label = kind + "".join(f" ({k} {v})" for k, v in options.items())
            print(
                f"| {name} | {label} | {z.abs().max():.1f} | {(z**2).mean() ** 0.5:.2f} | {(c**2).mean() ** 0.5:.2f} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Diffusion with coloured noise against closed forms on a torus."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from xgenda.diffusion.anchors import Spectral
from xgenda.diffusion.coloured import ColouredNoise, HomogeneousDenoiser
from xgenda.diffusion.evidence import Evidence, FunctionEvidence, LinearEvidence
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.guidance import GUIDANCES, WHITE_ONLY, guide
from xgenda.diffusion.kernels import Kernel
from xgenda.diffusion.random_fields import TorusField
from xgenda.diffusion.samplers import integrate
from xgenda.diffusion.schedules import karras_schedule
from xgenda.errors import OptionError

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (6, 8)
N = SHAPE[0] * SHAPE[1]
CUTOFF = 2
DRAWS = 2048
PRIOR = TorusField(SHAPE, Kernel("matern32", 0.2))
NOISE = TorusField(SHAPE, Kernel("exponential", 0.15))
HIGHEST = NOISE.highest_sigma(PRIOR.power)


def covariance(field: TorusField) -> torch.Tensor:
    cells = torch.arange(N)
    return field.block(cells[:, None], cells)


class Dense:
    """A covariance with a matrix, as `GaussianPosterior` wants it."""

    size = N

    def block(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return covariance(PRIOR)[rows][:, columns]

    def diagonal(self) -> torch.Tensor:
        return covariance(PRIOR).diagonal()


def keys(count: int) -> list[list[tuple[int, str, int]]]:
    return [[(0, "t", k)] for k in range(count)]


def operator(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if name == "points":
        return torch.tensor([[3], [17], [18], [44], [47]]), torch.ones(5, 1)
    rows = torch.arange(N).reshape(3, 2, 4, 2).permute(0, 2, 1, 3).reshape(12, 4)
    return rows[::2], torch.full((6, 4), 0.25)


def observed(
    indices: torch.Tensor, weights: torch.Tensor, value: torch.Tensor, variance: torch.Tensor, batch: int
) -> LinearEvidence:
    weights = weights.double()
    return LinearEvidence(
        indices[None], weights[None], torch.zeros_like(weights)[None], torch.ones_like(weights)[None], value[None], variance[None],
        torch.zeros(batch, dtype=torch.long),
    )  # fmt: skip


def in_sampling_error(draws: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> None:
    z = (draws.mean(0) - mean) / (cov.diagonal() / len(draws)).sqrt()
    assert z.abs().max() < 3.6
    assert (z**2).mean().sqrt() < 1.6
    spread = (torch.cov(draws.T) - cov) / ((cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / len(draws)).sqrt()
    assert (spread**2).mean().sqrt() < 1.5
    assert (spread.abs() < 3).double().mean() > 0.98


def test_the_denoiser_is_the_conditional_mean() -> None:
    s, k = covariance(PRIOR), covariance(NOISE)
    x = torch.randn(3, 1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sigma in (0.05, 1.0, 30.0):
        exact = 0.5 + (x.flatten(1) - 0.5) @ torch.linalg.solve(s + sigma**2 * k, s)
        torch.testing.assert_close(HomogeneousDenoiser(PRIOR, NOISE, 0.5)(x, sigma).flatten(1), exact)
        white = 0.5 + (x.flatten(1) - 0.5) @ torch.linalg.solve(s + sigma**2 * torch.eye(N), s)
        torch.testing.assert_close(HomogeneousDenoiser(PRIOR, None, 0.5)(x, sigma).flatten(1), white)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("heun", {}), ("heun", {"churn": 6.0}), ("pc", {"corrections": 1, "tau": 0.1, "unbiased": True})],
    ids=["heun", "churn", "pc"],
)
def test_samples_have_the_covariance_of_the_prior(sampler: str, options: dict[str, object]) -> None:
    """Every sampler takes noise of any colour, where the highest level drowns the prior in every wave."""
    plain = not options
    noise = ColouredNoise(keys(DRAWS if plain else 600), NOISE)
    levels = karras_schedule(32 if sampler == "heun" else 64, 0.01, HIGHEST)
    start = levels[0] * noise.normal(1, *SHAPE, dtype=torch.float64)
    draws = integrate(HomogeneousDenoiser(PRIOR, NOISE), start, levels, sampler, noise, **options).flatten(1)
    cov = covariance(PRIOR)
    if plain:
        in_sampling_error(draws, torch.zeros(N), cov)
    else:  # these have errors of the step
        assert (torch.cov(draws.T) - cov).abs().max() < 0.25
        assert draws.var(0).mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("name", "solver"), [("points", "damped"), ("block mean", "gmres"), ("points", "cg")])
def test_mmps_is_the_kalman_posterior(name: str, solver: str) -> None:
    indices, weights = operator(name)
    variance = torch.full((len(indices),), 0.3**2, dtype=torch.float64)
    value = torch.randn(len(indices), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = GaussianPosterior(Dense(), indices, weights, variance)  # type: ignore[arg-type]
    guided = guide(
        HomogeneousDenoiser(PRIOR, NOISE),
        observed(indices, weights, value, variance, DRAWS),
        "mmps",
        colour=NOISE,
        iterations=6,
        solver=solver,
    )
    levels = karras_schedule(24, 0.01, HIGHEST)
    start = levels[0] * ColouredNoise(keys(DRAWS), NOISE).normal(1, *SHAPE, dtype=torch.float64)
    draws = integrate(guided, start + guided(start, levels[0]), levels).flatten(1)
    in_sampling_error(draws, exact.mean(torch.zeros(N), value), exact.dense_covariance())


def test_forgetting_the_colour_is_wrong() -> None:
    """The same guidance without K does not give the posterior: the test above would notice."""
    indices, weights = operator("points")
    variance = torch.full((5,), 0.09, dtype=torch.float64)
    value = torch.ones(5, dtype=torch.float64)
    x = 3.0 * NOISE.draw(_Stream(2), 1)
    s, k = covariance(PRIOR), covariance(NOISE)
    a = torch.zeros(5, N, dtype=torch.float64)
    a[torch.arange(5), indices[:, 0]] = 1.0
    # E[x0 | x, y] in closed form
    given = torch.linalg.inv(torch.linalg.inv(s) + torch.linalg.inv(k) / 9.0)
    clean = x.flatten(1) @ (torch.linalg.inv(k) / 9.0) @ given
    gain = given @ a.T @ torch.linalg.inv(a @ given @ a.T + torch.diag(variance))
    exact = clean + (value - clean @ a.T) @ gain.T
    args = HomogeneousDenoiser(PRIOR, NOISE), observed(indices, weights, value, variance, 2), "mmps"
    found = guide(*args, colour=NOISE, iterations=5)(x, 3.0).flatten(1)
    torch.testing.assert_close(found, exact, atol=1e-8, rtol=0)
    without = guide(*args, iterations=5)(x, 3.0).flatten(1)
    assert (without - exact).abs().max() > 0.05


class _Stream:
    def __init__(self, count: int) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(self.count, *shape, dtype=dtype, generator=self.generator)


A, K, J = "a", "k", "j"
Formula = Callable[[float, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]
#: sigma^2 K times the gradient, for a departure r: with J symmetric only in K J^T, share = sigma^2 / (1 + sigma^2), V as in the table
FORMULAS: list[tuple[str, dict[str, object], Formula]] = [
    ("sda", {"gamma": 0.3}, lambda s, m, r: s**2 * m[K] @ m[J].T @ m[A].T @ (r / (0.25 + 0.3 * s**2 * (m[A] @ m[K] @ m[A].T).diagonal()))),
    ("sda", {"gamma": 0.3, "detach": True}, lambda s, m, r: s**2 * m[K] @ m[A].T @ (r / (0.25 + 0.3 * s**2 * (m[A] @ m[K] @ m[A].T).diagonal()))),
    (
        "w2c", {"gamma": 0.5},
        lambda s, m, r: s**2 / (1 + s**2) * m[K] @ m[A].T @ (r / (0.25 + 0.5 * s**2 / (1 + s**2) * (m[A] @ m[K] @ m[A].T).diagonal())),
    ),
    (
        "pigdm", {},
        lambda s, m, r: s**2 * m[K] @ m[J].T @ m[A].T @ torch.linalg.solve(
            s**2 / (1 + s**2) * m[A] @ m[K] @ m[A].T + 0.25 * torch.eye(len(r)), r
        ),
    ),
    (
        "diffpir", {"lambda": 2.0},
        lambda s, m, r: s**2 / 2 * m[K] @ m[A].T @ torch.linalg.solve(s**2 / 2 * m[A] @ m[K] @ m[A].T + 0.25 * torch.eye(len(r)), r),
    ),
    ("dps", {"zeta": 0.7}, lambda s, m, r: 1.4 * s**2 * m[K] @ m[J].T @ m[A].T @ r / r.norm()),
    (
        "mmps", {"iterations": 8},
        lambda s, m, r: s**2 * m[K] @ m[J].T @ m[A].T @ torch.linalg.solve(
            s**2 * m[A] @ m[K] @ m[J].T @ m[A].T + 0.25 * torch.eye(len(r)), r
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "push"), FORMULAS, ids=[f"{k}-{i}" for i, (k, _, _) in enumerate(FORMULAS)])
@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_each_guidance_is_its_formula_with_k(kind: str, options: dict[str, object], push: Formula, sigma: float) -> None:
    """Two channels, the operator across both; block means, whose variance under K is not the sum of squares."""
    both = 2 * N
    blocks, weights = operator("block mean")
    indices = torch.cat([blocks, blocks + N])
    weights = torch.cat([weights, weights])
    a = torch.zeros(12, both, dtype=torch.float64)
    a.scatter_(1, indices, weights.double())
    matrices = {A: a, K: torch.block_diag(covariance(NOISE), covariance(NOISE))}
    s = torch.block_diag(covariance(PRIOR), covariance(PRIOR))
    matrices[J] = s @ torch.linalg.inv(s + sigma**2 * matrices[K])
    value = torch.linspace(-1, 2, 12, dtype=torch.float64)
    ev = observed(indices, weights, value, torch.full((12,), 0.25, dtype=torch.float64), 1)
    denoise = HomogeneousDenoiser(PRIOR, NOISE)
    x = NOISE.draw(_Stream(1), 2)
    found = guide(denoise, ev, kind, colour=NOISE, **options)(x, sigma).flatten(1)[0]
    clean = denoise(x, sigma).flatten(1)[0]
    torch.testing.assert_close(found, clean + push(sigma, matrices, value - a @ clean), atol=2e-5, rtol=1e-4)


def two_channels(shape: tuple[int, int] = SHAPE) -> Spectral:
    """Return the covariance of two fields that depend on each other, whose waves end where those of a band-limited noise do."""
    first, second = (
        TorusField(shape, k, cutoff=CUTOFF).power * (shape[0] * shape[1])
        for k in (Kernel("gaussian", 0.2), Kernel("exponential", 0.1))
    )
    between = 0.6 * (first * second).sqrt()
    return Spectral(torch.stack([torch.stack([first, between], -1), torch.stack([between, second], -1)], -2), (2, *shape))


@pytest.mark.parametrize(
    "noise", [NOISE, TorusField(SHAPE, Kernel("exponential", 0.1), cutoff=CUTOFF)], ids=["all waves", "cutoff"]
)
@pytest.mark.parametrize("sigma", [0.1, 2.0])
@pytest.mark.parametrize("known", [True, False], ids=["factorised", "iterated"])
def test_a_homogeneous_anchor_is_its_formula_with_k(noise: TorusField, sigma: float, known: bool) -> None:
    r"""C = S - S (S + sigma^2 K)^-1 S, which needs no inverse of a K that has none."""
    prior = two_channels()
    rows = torch.arange(2 * N)
    s, k = prior.block(rows, rows), torch.block_diag(covariance(noise), covariance(noise))
    given = s - s @ torch.linalg.pinv(s + sigma**2 * k, hermitian=True, rtol=1e-12) @ s
    anchor = prior.under(noise)
    v = torch.randn(3, 2 * N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    conditional = anchor.given_noise(sigma)
    torch.testing.assert_close(conditional.multiply(v), v @ given, atol=1e-9, rtol=0)
    limited = v @ torch.linalg.pinv(s, hermitian=True, rtol=1e-12) @ s  # waves that states do not have say nothing
    torch.testing.assert_close(
        conditional.shrink(limited),
        limited @ torch.linalg.pinv(s + sigma**2 * k, hermitian=True, rtol=1e-12) @ s,
        atol=1e-8,
        rtol=0,
    )
    blocks, weights = operator("block mean")
    a = torch.zeros(6, 2 * N, dtype=torch.float64)
    a.scatter_(1, blocks + N, weights.double())
    value, error = torch.linspace(-1, 2, 6, dtype=torch.float64), torch.full((6,), 0.04, dtype=torch.float64)
    ev: Evidence = observed(blocks + N, weights, value, error, 3)
    if not known:
        ev = FunctionEvidence(lambda z: z.flatten(1) @ a.T, (2, *SHAPE), value, error, linear=True)
    x = v.reshape(3, 2, *SHAPE)
    found = guide(lambda z, _: z, ev, "anchor", anchor=anchor, colour=noise, tolerance=1e-12)(x, sigma).flatten(1)
    exact = v + (value - v @ a.T) @ torch.linalg.solve(a @ given @ a.T + torch.diag(error), a @ given)
    torch.testing.assert_close(found, exact, atol=1e-7, rtol=0)


def test_an_anchor_is_for_its_noise() -> None:
    indices, weights = operator("points")
    ev, prior = observed(indices, weights, torch.ones(5).double(), torch.ones(5).double(), 1), two_channels()
    for anchor, colour in ((prior, NOISE), (prior.under(NOISE), None)):
        with pytest.raises(OptionError, match="states under other noise than the denoiser; use guidance='mmps'"):
            guide(HomogeneousDenoiser(PRIOR, NOISE), ev, "anchor", anchor=anchor, colour=colour)


@pytest.mark.parametrize("finer", [(2 * SHAPE[0], 2 * SHAPE[1]), (3 * SHAPE[0], 3 * SHAPE[1])])
def test_a_covariance_on_a_finer_grid_is_that_of_the_same_functions(finer: tuple[int, int]) -> None:
    torch.testing.assert_close(two_channels().on(finer).spectrum, two_channels(finer).spectrum, atol=1e-12, rtol=0)


def test_observations_of_many_cells_take_no_matrix_between_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    conditional = two_channels().under(NOISE).given_noise(0.7)
    matrix = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    columns = torch.randperm(2 * N, generator=torch.Generator().manual_seed(5))[:40]
    between = conditional.observed(columns, matrix)
    monkeypatch.setattr("xgenda.diffusion.anchors.LARGEST_BETWEEN", 5 * N)  # two rows at a time
    torch.testing.assert_close(conditional.observed(columns, matrix), between, atol=1e-12, rtol=0)


def test_white_noise_of_a_torus_is_white_guidance() -> None:
    """K = I by way of the Fourier transform is what there is without it, and no colour is to the bit what there was."""
    white = TorusField(SHAPE, Kernel("exponential", 1e-4))
    torch.testing.assert_close(covariance(white), torch.eye(N, dtype=torch.float64), atol=1e-12, rtol=0)
    indices, weights = operator("block mean")
    ev = observed(indices, weights, torch.ones(6).double(), torch.full((6,), 0.1).double(), 2)
    denoise = HomogeneousDenoiser(PRIOR)
    x = NOISE.draw(_Stream(2), 1)
    for kind in set(GUIDANCES) - {"anchor", *WHITE_ONLY}:
        torch.testing.assert_close(
            guide(denoise, ev, kind, colour=white)(x, 0.7), guide(denoise, ev, kind)(x, 0.7), atol=1e-6, rtol=0
        )


def test_what_needs_white_noise_says_so() -> None:
    indices, weights = operator("points")
    ev = observed(indices, weights, torch.ones(5).double(), torch.ones(5).double(), 1)
    for kind in WHITE_ONLY:
        with pytest.raises(OptionError, match=f"guidance='{kind}' is for white noise.*use guidance='mmps'"):
            guide(HomogeneousDenoiser(PRIOR, NOISE), ev, kind, colour=NOISE)
    function = FunctionEvidence(lambda z: z.flatten(1)[:, :3], (1, *SHAPE), torch.ones(1, 3).double(), torch.ones(1, 3).double())
    x = NOISE.draw(_Stream(1), 1)
    with pytest.raises(OptionError, match="observations of at most 64 cells each.*use guidance='mmps'"):
        guide(HomogeneousDenoiser(PRIOR, NOISE), function, "sda", colour=NOISE)(x, 1.0)
    assert torch.isfinite(guide(HomogeneousDenoiser(PRIOR, NOISE), function, "mmps", colour=NOISE)(x, 1.0)).all()

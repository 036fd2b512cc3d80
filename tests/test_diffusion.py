"""Samplers, guidance and denoisers against closed forms."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

from xgenda.diffusion.anchors import LowRank, Spectral, anchor_tensors, read_anchor
from xgenda.diffusion.covariances import KernelCovariance, SphereKernel
from xgenda.diffusion.denoisers import EDMDenoiser, GaussianDenoiser, NoisePredictor
from xgenda.diffusion.evidence import FunctionEvidence, JointEvidence, LinearEvidence
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.guidance import GUIDANCES, guidance_options, guide
from xgenda.diffusion.masks import OnPlane
from xgenda.diffusion.noise import LabelledNoise, NoiseStream, seed_for
from xgenda.diffusion.samplers import SAMPLERS, adams_weights, integrate, is_stochastic, network_calls, sampler_options
from xgenda.diffusion.schedules import (
    SCHEDULES,
    VP,
    check_levels,
    karras_schedule,
    noise_levels,
    sigma_of,
    signal_of,
    time_of,
)
from xgenda.diffusion.solvers import arnoldi_solve, conjugate_gradients
from xgenda.errors import GridError, OptionError, StateError
from xgenda.networks.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")
NY, NX = 6, 8
N = NY * NX
DRAWS = 4096
#: Every sampler, and every way in which it draws noise.
WAYS: dict[str, tuple[str, dict[str, float]]] = {
    **{name: (name, {}) for name in SAMPLERS},
    "heun, churn": ("heun", {"churn": 12.0}),
    "ddim, eta": ("ddim", {"eta": 0.5}),
    "pc, unbiased": ("pc", {"corrections": 2, "tau": 0.5, "unbiased": True}),
    "heun, resampled": ("heun", {"resample": 2}),
    "dpm++, resampled": ("dpm++", {"resample": 4}),
}


def covariance() -> KernelCovariance:
    kernel = SphereKernel(torch.linspace(30, 60, NY), torch.linspace(0, 35, NX), "exponential", 1e6, 72)
    return KernelCovariance([kernel], torch.ones(1, N))


def operator(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if name == "identity":
        return torch.arange(N)[:, None], torch.ones(N, 1)
    if name == "block mean":
        return torch.arange(N).reshape(3, 2, 4, 2).permute(0, 2, 1, 3).reshape(12, 4), torch.full((12, 4), 0.25)
    rows = torch.randint(0, N, (5, 4), generator=torch.Generator().manual_seed(1))
    return rows, torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(5, 4)


def evidence(
    indices: torch.Tensor, weights: torch.Tensor, value: torch.Tensor, variance: torch.Tensor, batch: int = 1
) -> LinearEvidence:
    weights = weights.double()
    return LinearEvidence(
        indices[None], weights[None], torch.zeros_like(weights)[None], torch.ones_like(weights)[None], value[None], variance[None],
        torch.zeros(batch, dtype=torch.long),
    )  # fmt: skip


def noise(count: int) -> NoiseStream:
    return NoiseStream([(0, "t", k) for k in range(count)])


@pytest.mark.parametrize("name", ["identity", "block mean", "points"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("anchor", {}),
        ("mmps", {"iterations": 8, "solver": "damped"}),
        ("mmps", {"iterations": 8, "solver": "gmres"}),
        ("mmps", {"iterations": 8, "solver": "cg"}),
    ],
)
def test_guided_diffusion_reproduces_the_closed_form(name: str, kind: str, options: dict[str, object]) -> None:
    """Mean and covariance of 4,096 draws within three standard errors of the Kalman posterior."""
    prior = covariance()
    indices, weights = operator(name)
    variance = torch.full((len(indices),), 1.0 if name == "identity" else 0.3**2, dtype=torch.float64)
    value = torch.randn(len(indices), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = GaussianPosterior(prior, indices, weights, variance)
    mean, cov = exact.mean(torch.zeros(N), value), exact.dense_covariance()
    anchor = LowRank.of(prior)
    guided = guide(
        GaussianDenoiser(torch.zeros(N), anchor),
        evidence(indices, weights, value, variance, DRAWS),
        kind,
        anchor=anchor,
        **options,
    )
    levels = karras_schedule(48, 0.005, 120.0)
    start = levels[0] * noise(DRAWS).normal(1, NY, NX)
    draws = integrate(guided, start + guided(start, levels[0]), levels).flatten(1).double()
    z = (draws.mean(0) - mean) / (cov.diagonal() / DRAWS).sqrt()
    assert z.abs().max() < 3.6  # three standard errors, for the largest of 48
    assert (z**2).mean().sqrt() < 1.6  # neighbouring cells err together
    spread = (torch.cov(draws.T) - cov) / ((cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / DRAWS).sqrt()
    assert (spread**2).mean().sqrt() < 1.5
    assert (spread.abs() < 3).double().mean() > 0.98


@pytest.mark.parametrize("kind", ["anchor", "mmps", "pigdm", "w2c"])
def test_scalar_guidances_are_exact_for_white_unit_variance(kind: str) -> None:
    """Where S = I and no two observations share a cell, r^2 is the true posterior variance and all of these are the Kalman posterior."""
    white = LowRank(torch.zeros(N, 0), torch.ones(N))
    indices, weights = operator("block mean")
    variance = torch.linspace(0.05, 0.5, len(indices), dtype=torch.float64)
    value = torch.linspace(-2, 2, len(indices), dtype=torch.float64)
    exact = GaussianPosterior(white, indices, weights, variance)
    guided = guide(GaussianDenoiser(torch.zeros(N), white), evidence(indices, weights, value, variance, 2), kind, anchor=white)
    mean = exact.mean(torch.zeros(N), value)
    # the map from start to end is affine: its value at the mean and its slope are those of N(mean, cov) with the noise of the start
    levels = noise_levels("log", 200, 1e-3, 300.0)
    start = mean.float().double().reshape(1, 1, NY, NX)
    found = integrate(guided, torch.cat([start, start]), levels, "heun").flatten(1)[0]
    torch.testing.assert_close(found, mean, atol=2e-3, rtol=0)


#: (kind, options, sigma^2 times the guidance for N(0, 1), one cell, y = x + N(0, 1/4)) with g = D(x) / x and r = y - g x
SCALAR: list[tuple[str, dict[str, object], Callable[[float, float, float], float]]] = [
    ("sda", {"gamma": 0.3}, lambda s, g, r: s**2 * g * r / (0.25 + 0.3 * s**2)),
    ("sda", {"gamma": 0.3, "detach": True}, lambda s, g, r: s**2 * r / (0.25 + 0.3 * s**2)),
    ("w2c", {"gamma": 0.5}, lambda s, g, r: s**2 * g * r / (0.25 + 0.5 * s**2 * g)),
    ("pigdm", {}, lambda s, g, r: s**2 * g * r / (0.25 + s**2 * g)),
    ("mmps", {}, lambda s, g, r: s**2 * g * r / (0.25 + s**2 * g)),
    ("anchor", {}, lambda s, g, r: s**2 * g * r / (0.25 + s**2 * g)),
    ("dps", {"zeta": 0.7}, lambda s, g, r: s**2 * g * 2 * 0.7 * np.sign(r)),
    ("diffpir", {"lambda": 2.0}, lambda s, g, r: s**2 / 2 * r / (0.25 + s**2 / 2)),
    ("inpaint", {}, lambda s, g, r: r / (1 + 0.25 / (s**2 * g))),
]


@pytest.mark.parametrize(("kind", "options", "push"), SCALAR, ids=[f"{k}-{i}" for i, (k, _, _) in enumerate(SCALAR)])
@pytest.mark.parametrize("sigma", [0.02, 0.7, 30.0])
def test_each_guidance_is_its_formula(
    kind: str, options: dict[str, object], push: Callable[[float, float, float], float], sigma: float
) -> None:
    one = LowRank(torch.zeros(1, 0), torch.ones(1))
    ev = evidence(torch.tensor([[0]]), torch.ones(1, 1), torch.tensor([1.0]).double(), torch.tensor([0.25]).double(), 3)
    guided = guide(GaussianDenoiser(torch.zeros(1), one), ev, kind, anchor=one, **options)
    x = torch.tensor([-3.0, 0.2, 40.0], dtype=torch.float64)
    found = guided(x.reshape(3, 1, 1, 1), sigma).flatten()
    g = 1 / (1 + sigma**2)
    expected = [g * v + push(sigma, g, 1.0 - g * v) for v in x.tolist()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_sda_is_biased_as_its_formula_says() -> None:
    """One cell, N(0, 1), one observation: V = gamma sigma^2 has an ODE that can be integrated by brute force."""
    gamma, r2, y = 0.3, 0.25, 1.0
    anchor = LowRank(torch.zeros(1, 0), torch.ones(1))
    ev = evidence(torch.tensor([[0]]), torch.ones(1, 1), torch.tensor([y]), torch.tensor([r2]))
    guided = guide(GaussianDenoiser(torch.zeros(1), anchor), ev, "sda", gamma=gamma)
    x = torch.tensor([[[[30.0]]]])
    found = integrate(guided, x, karras_schedule(400, 1e-3, 80.0)).item()

    def slope(s: float, v: float) -> float:
        g = 1 / (1 + s**2)
        return (v - (g * v + s**2 * g * (y - g * v) / (r2 + gamma * s**2))) / s

    reference = solve_ivp(lambda s, v: [slope(s, v[0])], (80.0, 1e-3), [30.0], rtol=1e-9, atol=1e-12).y[0, -1]
    assert found == pytest.approx(reference, abs=2e-3)


def standard_normal() -> GaussianDenoiser:
    return GaussianDenoiser(torch.zeros(1), LowRank(torch.zeros(1, 0), torch.ones(1)))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpm++", 2), ("adams", 3)])
def test_samplers_converge_at_their_order(sampler: str, order: int) -> None:
    """N(0, 1) from sigma_max: x ends at x_start / sqrt(1 + sigma_max^2)."""
    start = torch.tensor([[[[10.0]]]], dtype=torch.float64)
    # up to a level where the last step, which is a jump to the estimate, no longer matters
    exact = 10.0 / np.sqrt(101.0)
    errors = []
    for steps in (80, 160):
        levels = noise_levels("log", steps, 1e-4, 10.0)
        errors.append(abs(integrate(standard_normal(), start, levels, sampler).item() - exact))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_adams_weights_integrate_polynomials_exactly() -> None:
    nodes, following = [5.0, 3.0, 2.0], 0.7
    for power in range(3):
        found = sum(w * s**power for w, s in zip(adams_weights(nodes, following), nodes, strict=True))
        assert found == pytest.approx((following ** (power + 1) - 2.0 ** (power + 1)) / (power + 1))


@pytest.mark.parametrize("way", WAYS)
def test_samplers_sample_the_prior(way: str) -> None:
    """White N(0, 1) in 20,000 members: mean and variance at the end, whatever noise is drawn on the way."""
    sampler, options = WAYS[way]
    levels = noise_levels("karras", 250, 2e-3, 40.0)
    keys = noise(2)
    shape = (1, 100, 100)
    start = levels[0] * keys.normal(*shape, dtype=torch.float64)
    white = GaussianDenoiser(torch.zeros(10_000), LowRank(torch.zeros(10_000, 0), torch.ones(10_000)))
    if way == "pc":
        options = {"corrections": 8}
    out = integrate(white, start, levels, sampler, keys, **options)
    assert out.mean().abs() < 4 / np.sqrt(20_000)
    # Langevin steps with a forgotten start have the variance of their own discretisation
    expected = 1 + 0.25 / 2 if way == "pc" else 1.0
    # first-order samplers with noise are still 4 % short with 250 levels
    assert out.var().item() == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("way", WAYS)
def test_samplers_keep_their_contract(way: str) -> None:
    """The stated number of calls, only at levels of the schedule or between them, and one report per step."""
    sampler, options = WAYS[way]
    calls, steps = [], []

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        calls.append(sigma)
        return 0 * x

    levels = karras_schedule(7, 0.1, 3.0)
    start = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    out = integrate(denoise, start, levels, sampler, noise(2), lambda: steps.append(1), **options)
    assert out.shape == start.shape
    assert out.dtype == start.dtype
    assert len(calls) == network_calls(sampler, 7, options)
    assert len(steps) == 7
    assert min(calls) >= 0.1
    assert max(calls) <= 3.0
    if "churn" not in options:
        assert set(calls) <= set(levels[:-1])
    if is_stochastic(sampler, options):
        with pytest.raises(OptionError, match="NoiseStream"):
            integrate(denoise, start, levels, sampler, **options)


def test_churn_is_reached_and_clamped() -> None:
    """Karras et al. (2022), algorithm 2: the level is raised by min(churn / n, sqrt(2) - 1), and never above the first."""
    for churn, factor in ((2.0, 1 + 2.0 / 8), (1e6, np.sqrt(2))):
        calls: list[float] = []

        def denoise(x: torch.Tensor, sigma: float, calls: list[float] = calls) -> torch.Tensor:
            calls.append(sigma)
            return 0 * x

        levels = karras_schedule(8, 0.1, 3.0)
        integrate(denoise, torch.ones(1, 1), levels, "heun", noise(1), churn=churn)
        assert calls[0] == 3.0
        assert calls[4] == pytest.approx(min(factor * levels[2], 3.0))


def test_a_state_that_is_not_finite_is_named() -> None:
    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x * float("nan") if sigma < 0.5 else 0 * x

    with pytest.raises(StateError, match=r"is not finite after step \d+ of the sampler \(sigma = 0\.\d+\)"):
        integrate(denoise, torch.ones(1, 1), karras_schedule(8, 0.1, 3.0), "ddim")
    with pytest.raises(StateError, match="has diverged after step"):
        integrate(lambda x, s: 1e5 * x, torch.ones(2, 1), karras_schedule(8, 0.1, 3.0), "ddim")


@pytest.mark.parametrize(
    ("sampler", "given", "message"),
    [
        ("heun", {"chrun": 3}, r"no option 'chrun'; it has churn.*did you mean 'churn'"),
        ("pc", {"corrections": 1.5}, "corrections"),
        ("pc", {"tau": 0}, "positive"),
        ("ddim", {"eta": 2.0}, "between 0 and 1"),
        ("ddim", {"resample": 0}, "resample"),
    ],
)
def test_sampler_options_are_checked(sampler: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=f"(?i){message}"):
        sampler_options(sampler, given)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("sda", {"gama": 1}, r"no option 'gama'; it has gamma"),
        ("sda", {"gamma": -1.0}, "positive number"),
        ("mmps", {"solver": "lu"}, "damped"),
        ("mmps", {"iterations": 0}, "iterations"),
        ("sda", {"detach": 1}, "True or False"),
    ],
)
def test_guidance_options_are_checked(kind: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=f"(?i){message}"):
        guidance_options(kind, given)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_run_between_their_ends(schedule: str) -> None:
    levels = noise_levels(schedule, 33, 0.01, 50.0)
    assert len(levels) == 34
    assert levels[0] == pytest.approx(50.0, rel=1e-6)
    assert levels[-2] == pytest.approx(0.01, rel=1e-6)
    assert levels[-1] == 0.0
    assert (np.diff(levels) < 0).all()


def test_karras_schedule() -> None:
    levels = karras_schedule(18, 0.002, 80.0)
    assert levels[1] == pytest.approx(57.586, abs=1e-3)  # Karras et al. 2022, eq. 5 with n = 18, rho = 7
    with pytest.raises(OptionError, match="sigma_min"):
        karras_schedule(8, 3.0, 1.0)


def test_vp_processes_are_the_published_ones() -> None:
    t = torch.linspace(0.05, 0.85, 17, dtype=torch.float64)
    # DDPM's thousand betas from 1e-4 to 0.02 approach the continuous process
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    discrete = ((1 - kept) / kept).sqrt()[(t * 1000).long() - 1]
    torch.testing.assert_close(sigma_of("vp-linear", t), discrete, rtol=2e-2, atol=0)
    # Rozet & Louppe: alpha = cos^2(t arccos(sqrt(1e-3))), sigma^2 = 1 - alpha^2 + 1e-6, from 1e-3 to 1e3
    ends = sigma_of("vp-cosine", torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1e-3, 1e3], dtype=torch.float64), rtol=1e-3, atol=0)
    for process in VP:
        sigma = sigma_of(process, t)
        torch.testing.assert_close(time_of(process, sigma), t)
        mu = signal_of(process, sigma)
        total = {"vp-cosine": mu**2 * (1 + sigma**2), "vp-linear": mu**2 * (1 + sigma**2), "rectified": mu * (1 + sigma)}[process]
        torch.testing.assert_close(total, torch.full_like(t, 1 + 1e-6 if process == "vp-cosine" else 1.0))


@pytest.mark.parametrize("process", VP)
def test_noise_predictors_become_denoisers(process: str) -> None:
    """N(0, 1) has a linear optimal network: eps = sigma_t x_t / (mu_t^2 + sigma_t^2), or the velocity of the straight line."""

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.double()
        if process == "rectified":
            return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x
        sigma = sigma_of(process, t)
        mu = signal_of(process, sigma)
        return (mu * sigma / (mu**2 * (1 + sigma**2))) * x

    x = torch.tensor([0.7, -2.0], dtype=torch.float64)
    for sigma in (0.02, 1.0, 60.0):
        torch.testing.assert_close(NoisePredictor(network, process)(x, sigma), x / (1 + sigma**2), rtol=1e-5, atol=1e-6)


def test_levels_outside_of_the_training_are_told() -> None:
    with pytest.warns(UserWarning, match="trained from 0.02 to 80; outside of that its answer is an extrapolation"):
        check_levels(noise_levels("vp-cosine", 16, 1e-3, 1e3), (0.02, 80.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_levels(noise_levels("log", 16, 0.02, 80.0), (0.02, 80.0))


def test_samplers_pass_the_range_on() -> None:
    trained = EDMDenoiser(UNet(1, width=8), sigma_range=(0.1, 5.0)).requires_grad_(False)
    ev = evidence(torch.tensor([[0]]), torch.ones(1, 1), torch.zeros(1).double(), torch.ones(1).double())
    start = torch.zeros(1, 1, NY, NX)
    with pytest.warns(UserWarning, match="trained from 0.1 to 5"):
        integrate(guide(trained, ev, "w2c"), start, karras_schedule(3, 0.05, 5.0), "ddim")
    integrate(trained, start, karras_schedule(3, 0.1, 5.0), "ddim")


def _network(anchor: LowRank) -> EDMDenoiser:
    torch.manual_seed(0)
    network = UNet(1, 1, width=8)
    torch.nn.init.normal_(network.last.conv.weight, std=0.02)
    return EDMDenoiser(network, anchor, feeds_state=True).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", GUIDANCES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_members_do_not_know_each_other(kind: str, way: str) -> None:
    """Alone, in another order and in another batch: to the bit at equal batch size, to 1e-5 across.

    Krylov spaces of the derivative of a single-precision network amplify its rounding, which is not the same in batches of another size:
    up to 1.0e-5 on some processors, so that 'mmps' gets 5e-5.
    """
    sampler, options = WAYS[way]
    anchor = LowRank.of(covariance())
    indices, weights = operator("points")
    value = torch.tensor([1.0, -1.0, 0.5, 3.0, -2.0], dtype=torch.float64)
    denoise = _network(anchor)
    levels = karras_schedule(12, 0.1, 10.0)

    def members(keys: list[int]) -> torch.Tensor:
        stream = NoiseStream([(0, "t", k) for k in keys])
        start = levels[0] * stream.normal(1, NY, NX, dtype=torch.float64)
        ev = evidence(indices, weights, value, torch.full((5,), 0.2, dtype=torch.float64), len(keys))
        given = {"reach": 1.0} if kind == "inpaint" and way == "ancestral" else {}
        return integrate(guide(denoise, ev, kind, anchor=anchor, **given), start, levels, sampler, stream, **options)

    together = members([0, 1, 2, 3])
    assert torch.equal(members([3, 2, 1, 0]).flip(0), together)
    bound = 5e-5 if kind == "mmps" else 1e-5
    assert (members([3]) - together[3:4]).abs().max() < bound * together.std()


def test_noise_is_keyed_by_label() -> None:
    whole = NoiseStream([(1, "2000-01-01", k) for k in range(3)]).normal(4, 5)
    alone = NoiseStream([(1, "2000-01-01", 2)]).normal(4, 5)
    assert torch.equal(whole[2], alone[0])
    keys = {seed_for(s, t, m) for s in range(5) for t in ("a", "b", "a|1") for m in range(20)}
    assert len(keys) == 300
    assert seed_for(0, "2000-01-01T00:00:00", 3) == 9013105602413114490  # the same in every process and version


def test_untrained_anchored_denoiser_is_the_gaussian() -> None:
    anchor = LowRank.of(covariance())
    x = torch.randn(3, 1, NY, NX, generator=torch.Generator().manual_seed(0))
    for sigma in (0.05, 1.0, 30.0):
        plain = GaussianDenoiser(torch.zeros(N), anchor)(x, sigma)
        torch.testing.assert_close(EDMDenoiser(UNet(1, width=8), anchor)(x, sigma), plain)


def test_edm_preconditioning_without_anchor() -> None:
    network = UNet(1, width=8)
    torch.nn.init.ones_(network.last.conv.bias)
    x = torch.randn(2, 1, NY, NX, generator=torch.Generator().manual_seed(0))
    sigma = 0.7
    expected = x / (1 + sigma**2) + sigma / np.sqrt(1 + sigma**2) * network(
        x / np.sqrt(1 + sigma**2), torch.full((2,), float(np.log(sigma) / 4))
    )
    torch.testing.assert_close(EDMDenoiser(network)(x, sigma), expected)


def test_unet_is_periodic_where_the_grid_is() -> None:
    torch.manual_seed(0)
    network = UNet(1, width=8, periodic=True).eval()
    torch.nn.init.normal_(network.last.conv.weight)
    x, label = torch.randn(1, 1, 9, 16), torch.zeros(1)
    rolled = network(x.roll(4, -1), label).roll(-4, -1)  # a multiple of the stride
    torch.testing.assert_close(rolled, network(x, label), atol=1e-5, rtol=1e-4)
    closed = UNet(1, width=8, periodic=False).eval()
    closed.load_state_dict(network.state_dict())
    assert (closed(x.roll(4, -1), label).roll(-4, -1) - closed(x, label)).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 13), (37, 49)])
def test_unet_takes_any_shape(shape: tuple[int, int]) -> None:
    assert UNet(2, 1, width=8)(torch.zeros(1, 2, *shape), torch.zeros(1), torch.zeros(1, 1, *shape)).shape == (1, 2, *shape)


def test_solvers_agree_with_dense_algebra() -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((3, 6, 6))
    spread = torch.as_tensor(root @ root.transpose(0, 2, 1))
    matrix = spread + torch.eye(6, dtype=torch.float64)
    target = torch.as_tensor(rng.standard_normal((3, 6)))
    exact = torch.linalg.solve(matrix, target)

    def times(m: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda v: (m @ v[..., None])[..., 0]

    torch.testing.assert_close(conjugate_gradients(times(matrix), target, 40, tolerance=1e-12), exact, atol=1e-8, rtol=1e-6)
    scaled = conjugate_gradients(times(matrix), target, 40, tolerance=1e-12, preconditioner=1 / matrix.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(scaled, exact, atol=1e-8, rtol=1e-6)
    for damped in (True, False):
        found, residual = arnoldi_solve(times(spread), target, 10, damped=damped)
        torch.testing.assert_close(found, exact, atol=1e-8, rtol=1e-6)
        assert residual.max() < 1e-8
    # gmres solves what is not symmetric
    skew = spread + torch.as_tensor(rng.standard_normal((3, 6, 6)))
    found, _ = arnoldi_solve(times(skew), target, 6, damped=False)
    torch.testing.assert_close(found, torch.linalg.solve(skew + torch.eye(6).double(), target), atol=1e-7, rtol=1e-5)
    # one bad row: the others do not notice, nothing is returned that is larger than the target
    bad = spread.clone()
    bad[1] = -0.999 * torch.eye(6)
    safe, _ = arnoldi_solve(times(bad), target, 10, damped=True)
    torch.testing.assert_close(safe[[0, 2]], exact[[0, 2]], atol=1e-8, rtol=1e-6)
    assert (safe.norm(dim=1) <= target.norm(dim=1) * (1 + 1e-9)).all()
    bad[1] = float("nan")
    for damped in (True, False):
        found, residual = arnoldi_solve(times(bad), target, 10, damped=damped)
        assert torch.isfinite(found).all()
        assert torch.isinf(residual[1])
        torch.testing.assert_close(found[2], exact[2], atol=1e-8, rtol=1e-6)
    negative = matrix.clone()
    negative[1] = -negative[1]
    again = conjugate_gradients(times(negative), target, 40, tolerance=1e-12)
    torch.testing.assert_close(again[0], exact[0], atol=1e-8, rtol=1e-6)
    assert torch.isfinite(again).all()


def test_mmps_survives_a_network_whose_jacobian_is_no_covariance() -> None:
    """An expanding, rotating map: the Krylov system has negative and complex eigenvalues."""

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        flat = x.flatten(1)
        return (0.1 * flat.roll(1, 1) - 2.0 * flat + 0.5 * (3 * flat).sin()).reshape(x.shape)

    indices, weights = operator("points")
    ev = evidence(indices, weights, torch.full((5,), 2.0).double(), torch.full((5,), 1e-4).double(), 4)
    for solver in ("damped", "gmres"):
        guided = guide(denoise, ev, "mmps", solver=solver)
        x = noise(4).normal(1, NY, NX, dtype=torch.float64)
        for sigma in (0.01, 1.0, 100.0):
            push = guided(sigma * x, sigma) - denoise(sigma * x, sigma)
            assert torch.isfinite(push).all()


def test_joint_evidence_is_the_evidence_of_all_parts() -> None:
    anchor = LowRank.of(covariance())
    denoise = GaussianDenoiser(torch.zeros(N), anchor)
    parts = []
    for name, error in (("points", 0.1), ("block mean", 0.4)):
        indices, weights = operator(name)
        value = torch.linspace(-1, 1, len(indices), dtype=torch.float64)
        parts.append(evidence(indices, weights, value, torch.full_like(value, error**2), 3))
    joint = JointEvidence(parts)
    matrix = torch.cat([torch.zeros(len(p.values[0]), N, dtype=torch.float64) for p in parts])
    row = 0
    for p in parts:
        for index, weight in zip(p.indices[0], p.weights[0], strict=True):
            matrix[row].index_add_(0, index, weight)
            row += 1
    value, variance = torch.cat([p.values[0] for p in parts]), torch.cat([p.variances[0] for p in parts])
    function = FunctionEvidence(lambda x: x.flatten(1) @ matrix.T.to(x), (1, NY, NX), value, variance, linear=True)
    x = noise(3).normal(1, NY, NX, dtype=torch.float64)
    for kind in GUIDANCES:
        if kind in ("sda", "w2c", "dps"):  # scaled by the gain, which a function only estimates
            continue
        a = guide(denoise, joint, kind, anchor=anchor, **({"tolerance": 1e-9} if kind == "anchor" else {}))
        b = guide(denoise, function, kind, anchor=anchor, **({"tolerance": 1e-9} if kind == "anchor" else {}))
        torch.testing.assert_close(a(x, 1.3), b(x, 1.3), atol=1e-5, rtol=1e-5)
    gain = (matrix**2).sum(1)
    assert (function.gain(x.flatten(1))[0] - gain).abs().mean() < 0.3 * gain.mean()


@pytest.mark.parametrize("kind", ["linear", "log", "function", "joint"])
def test_tangents_are_derivatives_and_their_own_adjoints(kind: str) -> None:
    indices, weights = operator("points")
    one = torch.ones(1, 5, 4, dtype=torch.float64)
    shared = {"values": torch.zeros(1, 5), "variances": torch.ones(1, 5), "group": torch.zeros(2, dtype=torch.long)}
    log = {"log": one.bool(), "offset": 0.1 * one} if kind in ("log", "joint") else {}
    ev: object = LinearEvidence(indices[None], weights.double()[None], 0.3 * one, 0.5 * one, **shared, **log)
    if kind in ("function", "joint"):
        function = FunctionEvidence(lambda x: x.flatten(1)[:, ::7].sin(), (1, NY, NX), torch.zeros(7), 1.0)
        ev = function if kind == "function" else JointEvidence([ev, function])  # type: ignore[list-item]
    rng = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(2, N, generator=rng, dtype=torch.float64) for _ in range(2))
    tangent = ev.tangent(x)  # type: ignore[attr-defined]
    moved = tangent.forth(dx)
    v = torch.randn(moved.shape, generator=rng, dtype=torch.float64)
    torch.testing.assert_close((moved * v).sum(1), (dx * tangent.back(v)).sum(1), rtol=1e-10, atol=1e-10)
    step = 1e-6
    difference = (ev.observe(x + step * dx) - ev.observe(x - step * dx)) / (2 * step)  # type: ignore[attr-defined]
    torch.testing.assert_close(moved, difference, rtol=1e-6, atol=1e-8)


def test_operators_are_tried_before_they_are_used() -> None:
    with pytest.raises(OptionError, match=r"returned \(2, 48\).*expected a tensor of shape \(2, 5\)"):
        FunctionEvidence(lambda x: x.flatten(1), (1, NY, NX), torch.zeros(5), 1.0)
    with pytest.raises(OptionError, match="returned ndarray"):
        FunctionEvidence(lambda x: x.detach().numpy(), (1, NY, NX), torch.zeros(5), 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(OptionError, match="without gradient"):
        FunctionEvidence(lambda x: x.detach().flatten(1)[:, :5], (1, NY, NX), torch.zeros(5), 1.0)


def _posterior_mean(likelihood: Callable[[float], float]) -> float:
    weights = [quad(lambda x, p=p: x**p * np.exp(-0.5 * x**2) * likelihood(x), -8, 12, limit=200)[0] for p in (0, 1)]
    return weights[1] / weights[0]


def _sampled_mean(ev: FunctionEvidence | LinearEvidence, kind: str, **options: object) -> float:
    one = LowRank(torch.zeros(1, 0), torch.ones(1))
    guided = guide(GaussianDenoiser(torch.zeros(1), one), ev, kind, anchor=one, **options)  # type: ignore[arg-type]
    levels = karras_schedule(40, 0.01, 50.0)
    start = levels[0] * noise(DRAWS).normal(1, 1, 1, dtype=torch.float64)
    return integrate(guided, start, levels).mean().item()


@pytest.mark.parametrize("kind", ["mmps", "anchor"])
def test_non_linear_operators_against_quadrature(kind: str) -> None:
    """x ~ N(0, 1), y = x + x^3 / 5 + N(0, 0.5^2) = 1.5: the linearisation costs a few hundredths."""
    ev = FunctionEvidence(lambda x: (x + 0.2 * x**3).flatten(1), (1, 1, 1), torch.tensor([1.5], dtype=torch.float64), 0.25)
    exact = _posterior_mean(lambda x: np.exp(-0.5 * (1.5 - x - 0.2 * x**3) ** 2 / 0.25))
    assert _sampled_mean(ev, kind) == pytest.approx(exact, abs=0.06)


@pytest.mark.parametrize("likelihood", ["student-t", "huber"])
@pytest.mark.parametrize("value", [1.0, 6.0])
def test_heavy_tailed_errors_against_quadrature(likelihood: str, value: float) -> None:
    """A value six standard deviations from the climate is mostly disbelieved, one of normal size is used as ever."""

    def density(x: float) -> float:
        u = (value - x) / 0.5
        if likelihood == "student-t":
            return float((1 + u**2 / 4) ** -2.5)
        return float(np.exp(-0.5 * u**2) if abs(u) < 1.345 else np.exp(-1.345 * (abs(u) - 1.345 / 2)))

    ev = evidence(torch.tensor([[0]]), torch.ones(1, 1), torch.tensor([value]).double(), torch.tensor([0.25]).double(), DRAWS)
    exact, gaussian = _posterior_mean(density), value / 1.25
    found = _sampled_mean(ev, "anchor", likelihood=likelihood)
    assert _sampled_mean(ev, "anchor") == pytest.approx(gaussian, abs=0.05)
    # the weights are set from the estimate, not from the whole posterior: right to a third of what they change
    assert abs(found - exact) < 0.3 * abs(gaussian - exact) + 0.12


def test_soft_mask_spreads_an_observation() -> None:
    ev = evidence(torch.tensor([[27]]), torch.ones(1, 1), torch.tensor([2.0]).double(), torch.tensor([1e-6]).double(), 2)
    guided = guide(lambda x, s: 0 * x, ev, "inpaint", reach=1.5)
    field = guided(torch.zeros(2, 1, NY, NX, dtype=torch.float64), 1.0)[0, 0]
    distance = torch.tensor([[(i - 3) ** 2 + (j - 3) ** 2 for j in range(NX)] for i in range(NY)], dtype=torch.float64)
    torch.testing.assert_close(field, 2.0 * torch.exp(-distance / (2 * 1.5**2)), atol=1e-5, rtol=0)  # an error of 1e-3


def test_spectral_anchor_is_the_dense_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 6, 7)
    raw = torch.randn(400, *shape, generator=generator, dtype=torch.float64)
    fields = raw + raw.roll(1, -1) + 0.5 * raw.roll(1, -2).flip(1)
    anchor = Spectral.fit(fields)
    n = anchor.size
    everything = torch.arange(n)
    dense = anchor.block(everything, everything)
    torch.testing.assert_close(dense, dense.T, atol=1e-12, rtol=0)
    # the covariance of the sample averaged over all shifts
    shifted = torch.stack([fields.roll((i, j), (2, 3)) for i in range(6) for j in range(7)]).flatten(0, 1).flatten(1)
    torch.testing.assert_close(dense, shifted.T @ shifted / len(shifted) * 400 / 399, atol=1e-10, rtol=0)
    torch.testing.assert_close(anchor.diagonal(), dense.diagonal())
    given = anchor.given_noise(0.6)
    exact = torch.linalg.inv(torch.linalg.inv(dense) + torch.eye(n) / 0.36)
    v = torch.randn(3, n, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(given.multiply(v), v @ exact, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(given.variance, exact.diagonal())
    torch.testing.assert_close(given.shrink(v), v @ exact / 0.36, atol=1e-7, rtol=1e-6)
    assert anchor.largest() == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item())
    draws = anchor.draw(noise(6000))
    error = torch.cov(draws.T) - dense
    assert (error.abs() / ((dense**2 + torch.outer(dense.diagonal(), dense.diagonal())) / 6000).sqrt()).mean() < 1.0
    # the direct and the iterative solution of 'anchor' are one
    indices = torch.randint(0, n, (9, 2), generator=generator)
    weights = torch.full((9, 2), 0.5, dtype=torch.float64)
    ev = evidence(indices, weights, torch.ones(9).double(), torch.full((9,), 0.04).double(), 3)
    x = 0.6 * torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    modes = LowRank.of(anchor)
    direct = guide(GaussianDenoiser(torch.zeros(n), modes), ev, "anchor", anchor=modes)(x, 0.6)
    iterated = guide(GaussianDenoiser(torch.zeros(n), anchor), ev, "anchor", anchor=anchor, tolerance=1e-9)(x, 0.6)
    torch.testing.assert_close(direct, iterated, atol=1e-6, rtol=1e-6)


def test_labelled_noise_keeps_the_stream_of_each_time() -> None:
    keys = [[(0, t, m) for t in ("a", "b", "c")] for m in range(2)]
    whole = LabelledNoise(keys).normal(3, 4, 5)
    assert whole.shape == (2, 3, 4, 5)
    assert torch.equal(whole[1, 2], NoiseStream([(0, "c", 1)]).normal(4, 5)[0])
    assert torch.equal(LabelledNoise([[(0, "c", 1)]]).normal(4, 5), NoiseStream([(0, "c", 1)]).normal(4, 5))


def test_log_scaled_channels_are_observed_in_physical_units() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    ev = LinearEvidence(
        torch.zeros(1, 1, 1, dtype=torch.long), one, 0.5 * one, 2 * one, torch.zeros(1, 1), torch.ones(1, 1),
        group=torch.zeros(1, dtype=torch.long), log=one.bool(), offset=0.1 * one,
    )  # fmt: skip
    z = torch.tensor([[0.3]], dtype=torch.float64)
    assert ev.observe(z).item() == pytest.approx(np.exp(0.5 + 0.6) - 0.1)
    with pytest.raises(OptionError, match="non-linear"):
        ev.matrices()


def seam(variance: float, value: float = 2.0) -> LinearEvidence:
    """One observation half-way between the last and the first of sixteen columns, in the third of six rows."""
    return evidence(
        torch.tensor([[2 * 16, 2 * 16 + 15]]),
        torch.full((1, 2), 0.5),
        torch.tensor([value]).double(),
        torch.tensor([variance]).double(),
    )


def test_the_soft_mask_of_inpainting_crosses_the_seam() -> None:
    flat = GaussianDenoiser(torch.zeros(96), LowRank(torch.zeros(96, 0), torch.ones(96)))
    x = torch.zeros(1, 1, 6, 16, dtype=torch.float64)
    guided = guide(flat, seam(1e-6), "inpaint", reach=1.5, places=OnPlane(6, 16, (False, True)))
    row = guided(x, 10.0)[0, 0, 2]
    assert row[0] == pytest.approx(float(row[15]))
    assert row.argmax() in (0, 15)
    assert row[1] == pytest.approx(float(row[14]))
    assert row[:8].diff().max() < 0  # ever less towards the middle
    assert row[7] < 1e-3 * row[0]


@pytest.mark.parametrize("options", [{}, {"reach": 1.5}])
def test_inpainting_heeds_the_error(options: dict[str, float]) -> None:
    flat = GaussianDenoiser(torch.zeros(96), LowRank(torch.zeros(96, 0), torch.ones(96)))
    x = torch.zeros(1, 1, 6, 16, dtype=torch.float64)
    precise, vague = (
        float(guide(flat, seam(v), "inpaint", places=OnPlane(6, 16, (False, True)), **options)(x, 1.0).max()) for v in (1e-9, 1e6)
    )
    assert precise > 1.0
    assert vague < 1e-5 * precise
    # half of the departure where the error is as large as what is not known of the observation: 1/2 * (0.5^2 + 0.5^2)
    half = float(guide(flat, seam(0.25), "inpaint", places=OnPlane(6, 16, (False, True)), **options)(x, 1.0).max())
    assert half == pytest.approx(precise / 2, rel=1e-6)


def test_a_factor_that_is_not_orthogonal_is_read_back_as_it_was() -> None:
    skewed = LowRank(torch.tensor([[1.0, 0.9], [0.2, 0.3], [0.0, 0.4]]), torch.zeros(3))
    again = read_anchor(anchor_tensors(skewed))
    assert again is not None
    vector = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(again.given_noise(0.7).multiply(vector), skewed.given_noise(0.7).multiply(vector))


def test_unbiased_corrections_have_a_largest_step() -> None:
    with pytest.raises(OptionError, match=r"sampler_options\['tau'\]=2.5 is not accepted with 'unbiased'; it must be below 2"):
        sampler_options("pc", {"unbiased": True, "tau": 2.5})


def test_repeated_calls_of_a_guided_denoiser_agree() -> None:
    """The solver starts from its last answer, which must not show."""
    anchor = Spectral.fit(torch.randn(40, 1, NY, NX, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    indices, weights = operator("block mean")
    ev = evidence(indices, weights, torch.ones(len(indices)).double(), torch.full((len(indices),), 0.01).double())
    guided = guide(GaussianDenoiser(torch.zeros(N), anchor), ev, "anchor", anchor=anchor)
    x = torch.randn(1, 1, NY, NX, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    once = guided(x, 0.5)
    guided(3 * x, 5.0)
    torch.testing.assert_close(guided(x, 0.5), once, atol=1e-5, rtol=0)


def test_operators_may_hold_double_precision() -> None:
    weights = torch.linspace(0, 1, 4, dtype=torch.float64)
    found = FunctionEvidence(lambda s: (s.flatten(1) * weights).sum(1, keepdim=True), (4,), torch.ones(1).double(), 0.1)
    assert found.gain(torch.zeros(1, 4).double()).item() == pytest.approx(float((weights**2).sum()), rel=0.5)


def test_a_periodic_axis_must_be_a_multiple_of_the_stride() -> None:
    network = UNet(1, width=8, periodic=True)
    with pytest.raises(GridError, match="must be a multiple of 4 cells for this network, and the grid is 8 x 18"):
        network(torch.zeros(1, 1, 8, 18), torch.zeros(1))
    torch.manual_seed(0)
    shallow = UNet(1, width=8, multipliers=(1, 2), periodic=True)
    torch.nn.init.normal_(shallow.last.conv.weight)
    x = torch.randn(1, 1, 7, 18)
    with torch.no_grad():
        torch.testing.assert_close(
            shallow(x.roll(4, -1), torch.zeros(1)), shallow(x, torch.zeros(1)).roll(4, -1), atol=1e-5, rtol=1e-5
        )


def test_a_spectrum_is_observed_as_its_dense_matrix_is() -> None:
    anchor = Spectral.fit(torch.randn(60, 2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    everything = torch.arange(48)
    dense = anchor.block(everything, everything)
    given = anchor.given_noise(0.8)
    expected = dense - dense @ torch.linalg.solve(dense + 0.64 * torch.eye(48), dense)
    columns = torch.tensor([0, 7, 23, 24, 40])
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(given.observed(columns, matrix), matrix @ expected[columns][:, columns] @ matrix.T)


def test_factorising_and_iterating_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    anchor = Spectral.fit(torch.randn(40, 1, NY, NX, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    indices, weights = operator("block mean")
    ev = evidence(indices, weights, torch.ones(len(indices)).double(), torch.full((len(indices),), 0.01).double(), 2)
    x = torch.randn(2, 1, NY, NX, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoise = GaussianDenoiser(torch.zeros(N), anchor)
    direct = guide(denoise, ev, "anchor", anchor=anchor)(x, 0.5)
    monkeypatch.setattr("xgenda.diffusion.anchors.SpectralConditional.direct_limit", 0)
    torch.testing.assert_close(guide(denoise, ev, "anchor", anchor=anchor)(x, 0.5), direct, atol=1e-5, rtol=0)


def test_precise_observations_are_factorised_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    # they need more iterations than others; one is not enough for either
    anchor = Spectral.fit(torch.randn(40, 1, NY, NX, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    indices, weights = operator("block mean")
    x = torch.randn(2, 1, NY, NX, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoise, worst, first = GaussianDenoiser(torch.zeros(N), anchor), {}, {}
    for limit, variance in itertools.product((10**6, len(indices) // 2, len(indices) // 4), (1e-3, 0.5)):
        monkeypatch.setattr("xgenda.diffusion.anchors.SpectralConditional.direct_limit", limit)
        errors = torch.full((len(indices),), variance).double()
        ev = evidence(indices, weights, torch.ones(len(indices)).double(), errors, 2)
        found = guide(denoise, ev, "anchor", anchor=anchor, iterations=1)(x, 0.5)
        worst[limit, variance] = float((found - first.setdefault(variance, found)).abs().max())
    half, quarter = len(indices) // 2, len(indices) // 4
    assert worst[half, 1e-3] < 1e-12
    assert min(worst[half, 0.5], worst[quarter, 1e-3], worst[quarter, 0.5]) > 1e-4

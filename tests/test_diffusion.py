"""Samplers, guidance and denoisers against closed forms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from xgenda.diffusion.covariances import KernelCovariance, LowRank, SphereKernel
from xgenda.diffusion.denoisers import EDMDenoiser, GaussianDenoiser
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.guidance import GUIDANCES, Evidence, conjugate_gradients, guide
from xgenda.diffusion.noise import NoiseStream, seed_for
from xgenda.diffusion.samplers import SAMPLERS, integrate, karras_schedule, network_calls
from xgenda.errors import OptionError
from xgenda.networks.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")
NY, NX = 6, 8
N = NY * NX
DRAWS = 4096


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def evidence(indices: torch.Tensor, weights: torch.Tensor, value: torch.Tensor, variance: torch.Tensor) -> Evidence:
    weights = weights.double()
    return Evidence(
        indices[None], weights[None], torch.zeros_like(weights)[None], torch.ones_like(weights)[None], value[None], variance[None]
    )


def noise(count: int) -> NoiseStream:
    return NoiseStream([(0, "t", k) for k in range(count)])


@pytest.mark.parametrize("name", ["identity", "block mean", "points"])
@pytest.mark.parametrize("kind", ["mmps", "anchor"])
def test_guided_diffusion_reproduces_the_closed_form(name: str, kind: str) -> None:
    """Mean and covariance of 4,096 draws within three standard errors of the Kalman posterior."""
    prior = covariance()
    indices, weights = operator(name)
    variance = torch.full((len(indices),), 1.0 if name == "identity" else 0.3**2, dtype=torch.float64)
    value = torch.randn(len(indices), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = GaussianPosterior(prior, indices, weights, variance)
    mean, cov = exact.mean(torch.zeros(N), value), exact.dense_covariance()
    anchor = LowRank.of(prior)
    guided = guide(
        GaussianDenoiser(torch.zeros(N), anchor), evidence(indices, weights, value, variance),
        torch.zeros(DRAWS, dtype=torch.long), kind, anchor=anchor, iterations=8,
    )  # fmt: skip
    levels = karras_schedule(48, 0.005, 120.0)
    start = levels[0] * noise(DRAWS).normal(1, NY, NX)
    draws = integrate(guided, start + guided(start, levels[0]), levels).flatten(1).double()
    z = (draws.mean(0) - mean) / (cov.diagonal() / DRAWS).sqrt()
    assert z.abs().max() < 3.6  # three standard errors, for the largest of 48
    assert (z**2).mean().sqrt() < 1.6  # neighbouring cells err together
    spread = (torch.cov(draws.T) - cov) / ((cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / DRAWS).sqrt()
    assert (spread**2).mean().sqrt() < 1.5
    assert (spread.abs() < 3).double().mean() > 0.98


def test_sda_is_biased_as_its_formula_says() -> None:
    """One cell, N(0, 1), one observation: V = gamma sigma^2 has an ODE that can be integrated by brute force."""
    gamma, r2, y = 0.3, 0.25, 1.0
    anchor = LowRank(torch.zeros(1, 0), torch.ones(1))
    ev = evidence(torch.tensor([[0]]), torch.ones(1, 1), torch.tensor([y]), torch.tensor([r2]))
    guided = guide(GaussianDenoiser(torch.zeros(1), anchor), ev, torch.zeros(1, dtype=torch.long), "sda", gamma=gamma)
    x = torch.tensor([[[[30.0]]]])
    found = integrate(guided, x, karras_schedule(400, 1e-3, 80.0)).item()

    def slope(s: float, v: float) -> float:
        g = 1 / (1 + s**2)
        return (v - (g * v + s**2 * g * (y - g * v) / (r2 + gamma * s**2))) / s

    from scipy.integrate import solve_ivp

    reference = solve_ivp(lambda s, v: [slope(s, v[0])], (80.0, 1e-3), [30.0], rtol=1e-9, atol=1e-12).y[0, -1]
    assert found == pytest.approx(reference, abs=2e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_converge_at_their_order(sampler: str) -> None:
    """N(0, 1) from sigma_max: x ends at x_start / sqrt(1 + sigma_max^2); Heun errs like n^-2, DDIM like n^-1."""
    denoise = GaussianDenoiser(torch.zeros(1), LowRank(torch.zeros(1, 0), torch.ones(1)))
    start = torch.tensor([[[[10.0]]]], dtype=torch.float64)
    exact = 10.0 / np.sqrt(101.0)
    errors = []
    for steps in (40, 80):
        levels = karras_schedule(steps, 1e-3, 10.0)
        errors.append(abs(integrate(denoise, start, levels, sampler).item() - exact))
    order = np.log2(errors[0] / errors[1])
    assert order == pytest.approx({"heun": 2, "ddim": 1}[sampler], abs=0.25)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_make_the_stated_number_of_calls(sampler: str) -> None:
    calls = []

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        calls.append(sigma)
        return 0 * x

    levels = karras_schedule(7, 0.1, 3.0)
    integrate(denoise, torch.ones(1, 1, 2, 2), levels, sampler)
    assert len(calls) == network_calls(sampler, 7)
    assert set(calls) <= set(levels[:-1])


def test_schedule() -> None:
    levels = karras_schedule(18, 0.002, 80.0)
    assert levels[0] == pytest.approx(80.0)
    assert levels[-2] == pytest.approx(0.002)
    assert levels[-1] == 0.0
    assert levels[1] == pytest.approx(57.586, abs=1e-3)  # Karras et al. 2022, eq. 5 with n = 18, rho = 7
    with pytest.raises(OptionError, match="sigma_min"):
        karras_schedule(8, 3.0, 1.0)


@pytest.mark.parametrize("kind", GUIDANCES)
def test_members_do_not_know_each_other(kind: str) -> None:
    prior = covariance()
    anchor = LowRank.of(prior)
    indices, weights = operator("points")
    value = torch.tensor([1.0, -1.0, 0.5, 3.0, -2.0], dtype=torch.float64)
    ev = evidence(indices, weights, value, torch.full((5,), 0.2, dtype=torch.float64))
    torch.manual_seed(0)
    network = UNet(1, width=8)
    torch.nn.init.normal_(network.last.conv.weight, std=0.02)
    denoise = EDMDenoiser(network, anchor).eval().requires_grad_(False)
    levels = karras_schedule(6, 0.02, 20.0)

    def members(keys: list[int]) -> torch.Tensor:
        start = levels[0] * NoiseStream([(0, "t", k) for k in keys]).normal(1, NY, NX).double()
        guided = guide(denoise, ev, torch.zeros(len(keys), dtype=torch.long), kind, anchor=anchor)
        return integrate(guided, start, levels)

    together = members([0, 1, 2, 3, 4, 5])
    assert torch.equal(members([5, 4, 3, 2, 1, 0]).flip(0), together)
    assert (members([3]) - together[3:4]).abs().max() < 1e-5 * together.std()


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


def test_conjugate_gradients_solves_per_row_and_survives_a_bad_row() -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((3, 6, 6))
    matrix = torch.as_tensor(root @ root.transpose(0, 2, 1) + np.eye(6))
    target = torch.as_tensor(rng.standard_normal((3, 6)))
    solved = conjugate_gradients(lambda v: (matrix @ v[..., None])[..., 0], target, 30)
    torch.testing.assert_close(solved, torch.linalg.solve(matrix, target), atol=1e-8, rtol=1e-6)
    bad = matrix.clone()
    bad[1] = -bad[1]
    again = conjugate_gradients(lambda v: (bad @ v[..., None])[..., 0], target, 30)
    torch.testing.assert_close(again[0], solved[0])
    assert torch.isfinite(again).all()


def test_log_scaled_channels_are_observed_in_physical_units() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    ev = Evidence(
        torch.zeros(1, 1, 1, dtype=torch.long), one, 0.5 * one, 2 * one, torch.zeros(1, 1), torch.ones(1, 1),
        log=one.bool(), offset=0.1 * one,
    )  # fmt: skip
    z = torch.tensor([[0.3]], dtype=torch.float64)
    assert ev.observe(z, torch.zeros(1, dtype=torch.long)).item() == pytest.approx(np.exp(0.5 + 0.6) - 0.1)
    with pytest.raises(OptionError, match="non-linear"):
        ev.matrices()

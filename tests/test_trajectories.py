"""Trajectories composed of windows, against the exact denoiser of a Markov chain."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from xgenda.diffusion.evidence import FunctionEvidence
from xgenda.diffusion.guidance import guide
from xgenda.diffusion.trajectories import TrajectoryDenoiser, windows_of
from xgenda.errors import OptionError

LENGTH, MEMORY = 13, torch.tensor([0.9, 0.5], dtype=torch.float64)  # two independent chains of unit variance, as channels


def covariance(states: int) -> Tensor:
    """Covariance of consecutive states, flattened as (state, channel)."""
    lag = (torch.arange(states)[:, None] - torch.arange(states)).abs()
    return torch.einsum("cij,cd->icjd", MEMORY[:, None, None] ** lag, torch.eye(2).double()).reshape(2 * states, 2 * states)


def exact(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x] of any number of consecutive states, (batch, states * channels)."""
    prior = covariance(x.shape[1] // 2)
    return torch.linalg.solve(prior + sigma**2 * torch.eye(len(prior)), prior @ x.T).T


def noisy(count: int, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(covariance(LENGTH))
    clean, e = torch.randn(2, count, 2 * LENGTH, generator=generator, dtype=torch.float64)
    return (clean @ root.T + sigma * e).reshape(count, LENGTH, 2)


def test_the_composition_approaches_the_exact_denoiser() -> None:
    """Each state sees k neighbours; more of them tell less and less, and one window as long as the trajectory tells all."""
    sigma = 0.7
    x = noisy(200, sigma)
    truth = exact(x.flatten(1), sigma).reshape(x.shape)
    errors = [float((TrajectoryDenoiser(exact, k)(x, sigma) - truth).square().mean().sqrt()) for k in range(1, 7)]
    assert all(b < 0.8 * a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-12


def test_little_noise_needs_few_neighbours() -> None:
    """The score of a Markov chain without noise needs one neighbour on either side."""
    errors = []
    for sigma in (0.01, 0.1, 1.0):
        x = noisy(200, sigma)
        truth = exact(x.flatten(1), sigma).reshape(x.shape)
        errors.append(float((TrajectoryDenoiser(exact, 1)(x, sigma) - truth).square().mean().sqrt()) / sigma)
    assert errors[0] < 1e-4
    assert errors == sorted(errors)


def test_a_state_comes_from_the_window_around_it() -> None:
    sigma, k = 0.5, 2
    x = noisy(3, sigma)
    out = TrajectoryDenoiser(exact, k)(x, sigma)
    for i in range(LENGTH):
        start = min(max(i - k, 0), LENGTH - 2 * k - 1)
        window = exact(x[:, start : start + 2 * k + 1].flatten(1), sigma).reshape(3, 2 * k + 1, 2)
        torch.testing.assert_close(out[:, i], window[:, i - start])


@pytest.mark.parametrize("batch", [None, 5])
def test_gradients_go_through_the_composition(batch: int | None) -> None:
    """The composition of linear denoisers is a matrix M, so the vector-Jacobian product is M^T v."""
    sigma = 0.5
    compose = TrajectoryDenoiser(exact, 2, batch)
    n = 2 * LENGTH
    matrix = compose(torch.eye(n).double().reshape(n, LENGTH, 2), sigma).reshape(n, n).T
    x = noisy(4, sigma).requires_grad_(True)
    vector = torch.randn(4, LENGTH, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad(compose(x, sigma), x, vector)
    torch.testing.assert_close(found.flatten(1), vector.flatten(1) @ matrix)


@pytest.mark.parametrize("every", [1, 4])
def test_guidance_acts_on_the_whole_trajectory(every: int) -> None:
    """E[x0 | x, y] with observations all along a trajectory that one window covers, and nearly that with half of it."""
    sigma, error, m = 0.6, 0.3, len(range(0, LENGTH, every))
    x = noisy(8, sigma)
    y = torch.randn(m, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    evidence = FunctionEvidence(lambda x: x[:, ::every, 0], (LENGTH, 2), y, error**2, linear=True)

    def found(k: int) -> Tensor:
        return guide(TrajectoryDenoiser(exact, k), evidence, "mmps", iterations=m)(x, sigma)

    prior, flat = covariance(LENGTH), x.flatten(1)
    observed = torch.eye(2 * LENGTH).double().reshape(2 * LENGTH, LENGTH, 2)[:, ::every, 0].T
    precision = torch.linalg.inv(prior) + torch.eye(len(prior)) / sigma**2 + observed.T @ observed / error**2
    truth = torch.linalg.solve(precision, (flat / sigma**2 + y @ observed / error**2).T).T.reshape(x.shape)
    torch.testing.assert_close(found(6), truth, atol=1e-6, rtol=1e-6)
    assert (found(3) - truth).square().mean().sqrt() < 0.05


def test_fields_keep_their_shape_and_batches_change_nothing() -> None:
    def smooth(x: Tensor, sigma: float) -> Tensor:
        return x / (1 + sigma) + x.mean((2, 3), keepdim=True) + x.roll(1, 1)

    x = torch.randn(3, 9, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    whole = TrajectoryDenoiser(smooth, 2)(x, 0.5)
    assert whole.shape == x.shape
    for batch in (1, 4, 100):
        assert torch.equal(TrajectoryDenoiser(smooth, 2, batch)(x, 0.5), whole)


def test_windows_of_states_are_what_the_composition_asks_for() -> None:
    asked = []

    def record(x: Tensor, sigma: float) -> Tensor:
        asked.append(x)
        return x

    states = torch.randn(9, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    TrajectoryDenoiser(record, 2)(states[None], 1.0)
    found = windows_of(states, 2)
    assert found.shape == (5, 10, 4, 5)
    assert torch.equal(found, asked[0])
    assert torch.equal(found[1].reshape(5, 2, 4, 5), states[1:6])


def test_a_trajectory_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(OptionError, match="has 4 states and the windows of the model 5; give at least 5"):
        TrajectoryDenoiser(exact, 2)(torch.zeros(1, 4, 2), 1.0)

"""Trajectories composed of windows, against the exact denoiser of a Markov chain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import xgenda
from xgenda.diffusion.anchors import LowRank, Observable, Separable, anchor_tensors, extended_correlation, read_anchor
from xgenda.diffusion.covariances import SphereKernel
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.evidence import FunctionEvidence
from xgenda.diffusion.guidance import guide
from xgenda.diffusion.noise import NoiseStream
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


# -- a Gaussian that is separable in time ----------------------------------------------------------------------------------

SPACE = LowRank(torch.tensor([[1.0, 0.3], [0.8, -0.2], [0.5, 0.6]]).double(), torch.tensor([0.1, 0.2, 0.3]).double())
LAGS = torch.tensor([1.0, 0.8, 0.5]).double()


def dense(anchor: Separable) -> Tensor:
    everything = torch.arange(anchor.size)
    return anchor.block(everything, everything)


def test_a_separable_covariance_is_a_kronecker_product() -> None:
    anchor = Separable(SPACE, LAGS)
    time = torch.tensor([[1.0, 0.8, 0.5], [0.8, 1.0, 0.8], [0.5, 0.8, 1.0]]).double()
    space = SPACE.block(torch.arange(3), torch.arange(3))
    torch.testing.assert_close(dense(anchor), torch.kron(time, space))
    torch.testing.assert_close(anchor.diagonal(), torch.kron(time, space).diagonal())
    noise = NoiseStream([(0, "t", m) for m in range(20000)])
    torch.testing.assert_close(torch.cov(anchor.draw(noise).T), dense(anchor), atol=0.06, rtol=0)
    again = read_anchor(anchor_tensors(anchor))
    assert isinstance(again, Separable)
    torch.testing.assert_close(dense(again.of_length(7)), dense(anchor.of_length(7)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [3, 8])
@pytest.mark.parametrize("sigma", [0.05, 1.0, 40.0])
def test_its_posterior_is_that_of_the_dense_matrix(length: int, sigma: float) -> None:
    anchor = Separable(SPACE, LAGS).of_length(length)
    full = dense(anchor)
    expected = full - full @ torch.linalg.solve(full + sigma**2 * torch.eye(len(full)), full)
    given = anchor.given_noise(sigma)
    x = torch.randn(4, len(full), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(given.multiply(x), x @ expected)
    torch.testing.assert_close(given.shrink(x), x @ expected / sigma**2)
    torch.testing.assert_close(given.variance, expected.diagonal())
    columns = torch.tensor([0, 1, 4, len(full) - 1])
    matrix = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert isinstance(given, Observable)
    torch.testing.assert_close(given.observed(columns, matrix), matrix @ expected[columns][:, columns] @ matrix.T)


def test_the_correlation_goes_on_as_that_of_an_autoregressive_process() -> None:
    torch.testing.assert_close(extended_correlation(torch.tensor([1.0, 0.7]), 6), 0.7 ** torch.arange(6).double())
    found = extended_correlation(LAGS, 40)
    torch.testing.assert_close(found[:3], LAGS)
    a = np.linalg.solve([[1, 0.8], [0.8, 1]], [0.8, 0.5])
    torch.testing.assert_close(found[2:], a[0] * found[1:-1] + a[1] * found[:-2])
    index = torch.arange(40)
    assert torch.linalg.eigvalsh(found[(index[:, None] - index).abs()]).min() > 0
    assert extended_correlation(torch.tensor([1.0]), 3).tolist() == [1.0, 0.0, 0.0]


class Silent(torch.nn.Module):
    """A network that has nothing to add."""

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


def test_untrained_the_composition_is_the_gaussian_of_the_whole_trajectory() -> None:
    window = Separable(SPACE, LAGS)
    compose = TrajectoryDenoiser(EDMDenoiser(Silent(), window), 1)
    full = dense(window.of_length(9))
    x = torch.randn(2, 9, 1, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sigma in (0.1, 3.0):
        expected = x.flatten(1) @ torch.linalg.solve(full + sigma**2 * torch.eye(27), full)
        torch.testing.assert_close(compose(x, sigma).flatten(1), expected)


def chain(count: int, seed: int) -> xr.Dataset:
    """Smooth fields that follow each other with a correlation of 0.9."""
    latitude, longitude = np.linspace(30, 50, 8), np.linspace(0, 30, 10)
    kernel = SphereKernel(torch.as_tensor(latitude), torch.as_tensor(longitude), "matern32", 700e3, 120)
    shocks = kernel.draw(NoiseStream([(seed, "s", k) for k in range(count)]))[:, 0].reshape(count, 8, 10).numpy()
    fields = np.empty_like(shocks)
    fields[0] = shocks[0]
    for t in range(1, count):
        fields[t] = 0.9 * fields[t - 1] + np.sqrt(1 - 0.9**2) * shocks[t]
    coords = {
        "time": np.datetime64("2000-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D"),
        "latitude": latitude,
        "longitude": longitude,
    }
    return xr.Dataset({"h": (("time", "latitude", "longitude"), fields)}, coords=coords)


def best_estimate(seen: xr.DataArray, error: float) -> np.ndarray:
    """The mean of the true posterior, from the true covariance."""
    grid = seen.isel(time=0)
    kernel = SphereKernel(torch.tensor(grid.latitude.values), torch.tensor(grid.longitude.values), "matern32", 700e3, 120)
    cells = torch.arange(grid.size)
    lag = np.abs(np.subtract.outer(np.arange(seen.sizes["time"]), np.arange(seen.sizes["time"])))
    full = np.kron(0.9**lag, kernel.correlation(cells, cells).numpy())
    y = seen.values.ravel()
    at = np.flatnonzero(np.isfinite(y))
    gain = full[:, at] @ np.linalg.inv(full[np.ix_(at, at)] + error**2 * np.eye(len(at)))
    return (gain @ y[at]).reshape(seen.shape)


@pytest.mark.slow
def test_a_model_of_windows_solves_a_trajectory() -> None:
    """Observed at every third time: nearly as good as the true covariance, an honest spread, and a prior with the right memory."""
    model = xgenda.train(chain(400, 0), window=3, steps=20, width=8, progress=False)
    assert "correlation 0.9" in model.spec.training["anchor"]
    truth = chain(12, 1)
    rng = np.random.default_rng(0)
    seen = truth.h.where((rng.random(truth.h.shape) < 0.15) & (np.arange(12) % 3 == 0)[:, None, None])
    seen = seen + 0.1 * rng.standard_normal(seen.shape)
    result = xgenda.assimilate(truth, seen.to_dataset(name="h"), model=model, error=0.1, members=24, seed=0, progress=False)
    assert result.attrs["xgenda_guidance"].startswith("anchor")

    def rmse(field: np.ndarray) -> float:
        return float(np.sqrt(((field - truth.h.values) ** 2).mean()))

    best = rmse(best_estimate(seen, 0.1))
    found = rmse(result.h.mean("member").values)
    assert found < 1.15 * best
    assert 0.8 < float(np.sqrt(result.h.var("member", ddof=1).mean() * 25 / 24)) / found < 1.25
    with pytest.warns(UserWarning, match="the result is the prior"):
        prior = xgenda.assimilate(truth, None, model=model, members=60, seed=0, progress=False).h
    assert model.spec.scaling is not None
    anomaly = prior - float(model.spec.scaling.mean.mean())
    assert float((anomaly * anomaly.shift(time=1)).mean() / (anomaly**2).mean()) == pytest.approx(0.9, abs=0.06)
    assert float(prior.diff("longitude").std()) == pytest.approx(float(chain(400, 0).h.diff("longitude").std()), rel=0.25)

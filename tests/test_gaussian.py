"""The Gaussian prior against numpy, its draws against its covariance, its kernels against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.special import gamma, kv

import xgenda
from xgenda.diffusion.anchors import LowRank
from xgenda.diffusion.covariances import (
    EARTH_RADIUS,
    KernelCovariance,
    LocalisedSample,
    SphereKernel,
    gaspari_cohn,
)
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.noise import NoiseStream
from xgenda.models.generative import SamplingOptions
from xgenda.observations.quality import QualityControl

LATITUDE, LONGITUDE = torch.linspace(30, 60, 5), torch.linspace(-10, 25, 8)
CELLS = 40


def stream(count: int, seed: int = 0) -> NoiseStream:
    return NoiseStream([(seed, "t", k) for k in range(count)])


def central_angle(latitude: torch.Tensor, longitude: torch.Tensor) -> np.ndarray:
    """Great-circle angle between all cells by the haversine formula, independent of the library's vectors."""
    phi, lam = (a.ravel() for a in np.meshgrid(np.radians(latitude), np.radians(longitude), indexing="ij"))
    h = np.sin((phi[:, None] - phi) / 2) ** 2 + np.cos(phi)[:, None] * np.cos(phi) * np.sin((lam[:, None] - lam) / 2) ** 2
    return 2 * np.arcsin(np.sqrt(h))


def covariances() -> dict[str, object]:
    rng = np.random.default_rng(0)
    kernel = SphereKernel(LATITUDE, LONGITUDE, "exponential", 800e3, 72)
    taper = SphereKernel(LATITUDE, LONGITUDE, "gaspari-cohn", 3000e3, 72)
    return {
        "kernel": KernelCovariance([kernel, kernel], torch.tensor([[2.0], [0.5]]).expand(2, CELLS)),
        "localised": LocalisedSample(torch.as_tensor(rng.standard_normal((12, 2 * CELLS))), taper, 1.3),
        "lowrank": LowRank(torch.as_tensor(rng.standard_normal((2 * CELLS, 5))), torch.as_tensor(rng.uniform(0.1, 1, 2 * CELLS))),
    }


def operators() -> dict[str, np.ndarray]:
    n = 2 * CELLS
    rng = np.random.default_rng(1)
    block = np.zeros((10, n))
    for i in range(10):
        block[i, 4 * i : 4 * i + 4] = 0.25
    points = np.zeros((7, n))
    for row in points:
        row[rng.choice(n, 4, replace=False)] = rng.dirichlet(np.ones(4))
    return {"identity": np.eye(n), "block mean": block, "points": points}


def rows_of(matrix: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    width = int((matrix != 0).sum(1).max())
    index = np.argsort(matrix == 0, axis=1, kind="stable")[:, :width]
    return torch.as_tensor(index), torch.as_tensor(np.take_along_axis(matrix, index, 1))


@pytest.mark.parametrize("name", ["kernel", "localised", "lowrank"])
@pytest.mark.parametrize("operator", ["identity", "block mean", "points"])
def test_posterior_equals_numpy(name: str, operator: str) -> None:
    covariance, H = covariances()[name], operators()[operator]
    n, m = 2 * CELLS, len(H)
    rng = np.random.default_rng(2)
    S = covariance.block(torch.arange(n), torch.arange(n)).numpy()
    r, y, mu = rng.uniform(0.2, 1, m), rng.standard_normal(m), rng.standard_normal(n)
    K = S @ H.T @ np.linalg.inv(H @ S @ H.T + np.diag(r**2))
    posterior = GaussianPosterior(covariance, *rows_of(H), torch.as_tensor(r**2))
    mean = posterior.mean(torch.as_tensor(mu), torch.as_tensor(y)).numpy()
    expected = S - K @ H @ S
    np.testing.assert_allclose(mean, mu + K @ (y - H @ mu), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(posterior.dense_covariance().numpy(), expected, rtol=1e-6, atol=1e-9 * np.abs(S).max())
    np.testing.assert_allclose(posterior.variance().numpy(), np.diag(expected), rtol=1e-6)


@pytest.mark.parametrize("name", ["kernel", "localised", "lowrank"])
def test_draws_have_the_covariance(name: str) -> None:
    covariance, n, N = covariances()[name], 2 * CELLS, 4000
    S = covariance.block(torch.arange(n), torch.arange(n)).numpy()
    draws = covariance.draw(stream(N)).numpy()
    error = np.sqrt((S**2 + np.outer(np.diag(S), np.diag(S))) / N)
    z = (np.cov(draws.T) - S) / error
    assert np.sqrt((z**2).mean()) < 1.25
    assert np.abs(z).max() < 6
    assert np.abs(draws.mean(0) / np.sqrt(np.diag(S) / N)).max() < 5


@pytest.mark.parametrize("name", ["kernel", "localised", "lowrank"])
def test_posterior_draws_have_the_posterior_moments(name: str) -> None:
    covariance, H, N = covariances()[name], operators()["points"], 3000
    y = torch.linspace(-1, 1, len(H), dtype=torch.float64)
    posterior = GaussianPosterior(covariance, *rows_of(H), torch.full((len(H),), 0.3**2))
    mean, cov = posterior.mean(torch.zeros(2 * CELLS), y).numpy(), posterior.dense_covariance().numpy()
    draws = posterior.draw(torch.zeros(2 * CELLS), y, stream(N)).numpy()
    z = (draws.mean(0) - mean) / np.sqrt(np.diag(cov) / N)
    assert np.sqrt((z**2).mean()) < 1.5
    spread = (np.cov(draws.T) - cov) / np.sqrt((cov**2 + np.outer(np.diag(cov), np.diag(cov))) / N)
    assert np.sqrt((spread**2).mean()) < 1.25


@pytest.mark.parametrize(("kind", "nu"), [("exponential", 0.5), ("matern32", 1.5), ("matern52", 2.5), ("gaussian", np.inf)])
def test_kernels_are_the_matern_family(kind: str, nu: float) -> None:
    length = 900e3
    kernel = SphereKernel(LATITUDE, LONGITUDE, kind, length)
    angle = central_angle(LATITUDE.numpy(), LONGITUDE.numpy())
    distance = EARTH_RADIUS * (angle if kind == "exponential" else 2 * np.sin(angle / 2))
    if np.isinf(nu):
        expected = np.exp(-0.5 * (distance / length) ** 2)
    else:
        s = np.sqrt(2 * nu) * np.maximum(distance, 1e-3) / length
        expected = 2 ** (1 - nu) / gamma(nu) * s**nu * kv(nu, s)
    everything = torch.arange(CELLS)
    np.testing.assert_allclose(kernel.correlation(everything, everything).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "matern32", "matern52", "gaussian", "gaspari-cohn"])
def test_kernels_are_valid_all_around_the_globe(kind: str) -> None:
    kernel = SphereKernel(torch.linspace(-80, 80, 9), torch.arange(0, 360, 20.0), kind, 3000e3, 18)
    everything = torch.arange(kernel.size)
    assert np.linalg.eigvalsh(kernel.correlation(everything, everything).numpy()).min() > -1e-9


def test_circulant_draws_equal_dense_ones_in_distribution() -> None:
    fast = SphereKernel(LATITUDE, LONGITUDE, "matern32", 700e3, 72)
    N = 4000
    everything = torch.arange(CELLS)
    C = fast.correlation(everything, everything).numpy()
    z = (np.cov(fast.draw(stream(N))[:, 0].T.numpy()) - C) / np.sqrt((C**2 + 1) / N)
    assert np.sqrt((z**2).mean()) < 1.25


def test_gaspari_cohn_values() -> None:
    r = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5], dtype=torch.float64)
    # eq. 4.10 at z/c = 0, 1/2, 1, 2: 1, 0.684896, 5/24, 0
    np.testing.assert_allclose(gaspari_cohn(r).numpy(), [1, 0.68489583, 5 / 24, 0, 0], atol=1e-8)


def test_low_rank_given_noise_is_the_woodbury_inverse() -> None:
    covariance, sigma = covariances()["lowrank"], 0.37
    n = covariance.size
    S = covariance.block(torch.arange(n), torch.arange(n)).numpy()
    expected = np.linalg.inv(np.linalg.inv(S) + np.eye(n) / sigma**2)
    given = covariance.given_noise(sigma)
    np.testing.assert_allclose(given.multiply(torch.eye(n, dtype=torch.float64)).numpy(), expected, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(given.variance.numpy(), np.diag(expected), rtol=1e-9)
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(given.shrink(x).numpy(), S @ np.linalg.solve(S + sigma**2 * np.eye(n), x.numpy()), rtol=1e-8)


@pytest.fixture(scope="module")
def background() -> xr.Dataset:
    latitude, longitude = np.arange(40.0, 52, 2), np.arange(-10.0, 10, 2)
    values = 280 + np.random.default_rng(0).standard_normal((6, 10)).astype("f4")
    attrs = {"units": "K", "standard_name": "air_temperature"}
    return xr.Dataset({"t2m": (("latitude", "longitude"), values, attrs)}, coords={"latitude": latitude, "longitude": longitude})


def point(value: float, latitude: float = 45.0, longitude: float = 1.0, **more: object) -> xr.Dataset:
    coords = {"latitude": ("obs", [latitude]), "longitude": ("obs", [longitude])}
    return xr.Dataset({"t2m": ("obs", [value], {"units": "K"}), **more}, coords=coords)


def moments(background: xr.Dataset, obs: xr.Dataset, error: float = 1.0, members: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Exact posterior mean and standard deviation through the public path, from the model's closed form."""
    from xgenda import engine, preparation

    prior = xgenda.gaussian_prior(background, length_scale=500e3, std=2.0)
    setup = preparation.prepare(background, obs, prior, error, None, None, QualityControl(duplicates=False), None)
    job = setup.job((0,), 0, prior.plan(SamplingOptions()), "cpu", False)
    fields = background["t2m"].values[None]
    _, _, request = engine.moments(job, fields)
    mean, deviation = prior.moments(request)
    return mean[0, 0].numpy(), deviation[0, 0].numpy()


def test_one_observation_gives_the_kernel_shaped_increment(background: xr.Dataset) -> None:
    at = {"latitude": 46.0, "longitude": 2.0}
    value = float(background.t2m.sel(at)) + 3.0
    mean, _ = moments(background, point(value, 46.0, 2.0))
    increment = mean - background.t2m.values.ravel()
    angle = central_angle(background.latitude.values, background.longitude.values)
    here = 3 * 10 + 6
    expected = 4 * np.exp(-EARTH_RADIUS * angle[here] / 500e3) / (4 + 1) * 3.0
    np.testing.assert_allclose(increment, expected, atol=2e-5)


def test_two_observations_of_root_two_times_the_error_equal_one(background: xr.Dataset) -> None:
    one = point(283.0)
    two = xr.concat([one, one], "obs")
    for a, b in zip(moments(background, one, 1.0), moments(background, two, np.sqrt(2)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_a_hopeless_observation_leaves_the_prior_and_a_perfect_one_is_met(background: xr.Dataset) -> None:
    mean, deviation = moments(background, point(283.0), 1e6)
    np.testing.assert_allclose(mean, background.t2m.values.ravel(), atol=1e-4)
    np.testing.assert_allclose(deviation, 2.0, rtol=1e-9)
    mean, deviation = moments(background, point(283.0, 46.0, 2.0), 1e-4)
    assert abs(mean[36] - 283.0) < 1e-5
    assert deviation[36] < 2e-4


def test_sample_prior_is_the_tapered_sample_covariance() -> None:
    z = xgenda.tutorial.open_dataset("z500-ensemble").isel(latitude=slice(0, 12), longitude=slice(0, 15))
    prior = xgenda.gaussian_prior(z, covariance="localized", radius=2000e3, inflation=1.0)
    covariance = prior.covariance()
    n = covariance.size
    values = z.z.values[:, ::-1].reshape(50, -1).astype(float)
    sample = np.cov(values.T) / float(prior.spec.scaling.std.squeeze()) ** 2
    angle = central_angle(z.latitude.values[::-1], z.longitude.values)
    taper = gaspari_cohn(torch.as_tensor(2 * EARTH_RADIUS * np.sin(angle / 2) / 2000e3)).numpy()
    np.testing.assert_allclose(covariance.block(torch.arange(n), torch.arange(n)).numpy(), sample * taper, atol=1e-9)


def test_cross_validation_recovers_the_inflation_of_a_short_sample() -> None:
    """Twelve draws of rank-30 fields: in sample the EOFs are overconfident, and blocks that are withheld show it."""
    rng = np.random.default_rng(3)
    kernel = SphereKernel(torch.linspace(30, 60, 12), torch.linspace(0, 35, 14), "matern32", 600e3, None)
    fields = kernel.draw(stream(24, seed=5))[:, 0].numpy().reshape(24, 12, 14) + 1e-3 * rng.standard_normal((24, 12, 14))
    ds = xr.Dataset(
        {"x": (("member", "latitude", "longitude"), fields)},
        coords={"latitude": np.linspace(30, 60, 12), "longitude": np.linspace(0, 35, 14)},
    )
    eof = xgenda.gaussian_prior(ds, covariance="eof", rank=10)
    assert eof.spec.options["inflation"] >= 1.2
    localised = xgenda.gaussian_prior(ds, covariance="localized")
    assert localised.spec.options["radius"] < 8000e3


def test_eof_prior_keeps_the_total_variance() -> None:
    z = xgenda.tutorial.open_dataset("z500-ensemble").isel(latitude=slice(0, 12), longitude=slice(0, 15))
    prior = xgenda.gaussian_prior(z, covariance="eof", rank=5, inflation=1.0)
    values = z.z.values[:, ::-1].reshape(50, -1).astype(float)
    std = float(prior.spec.scaling.std.squeeze())
    np.testing.assert_allclose(prior.covariance().diagonal().numpy() * std**2, values.var(0, ddof=1), rtol=2e-6)


def test_round_trip_through_a_file(tmp_path: object) -> None:
    z = xgenda.tutorial.open_dataset("z500-ensemble").isel(latitude=slice(0, 8), longitude=slice(0, 8))
    prior = xgenda.gaussian_prior(z, covariance="localized", radius=2000e3, inflation=1.0)
    again = xgenda.load_model(prior.save(tmp_path / "prior.safetensors"))  # type: ignore[operator]
    n = torch.arange(64)
    np.testing.assert_allclose(again.covariance().block(n, n), prior.covariance().block(n, n), rtol=1e-5, atol=1e-6)
    assert again.spec.to_dict() == prior.spec.to_dict()
    assert "localized" in repr(again)

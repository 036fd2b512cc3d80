"""Latent spaces: with a linear decoder the search is the Kalman filter, without one it is what quadrature says; and it can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import CheckpointError, OptionError, StateError
from xgenda.latent import adam, hamiltonian, lbfgs
from xgenda.models.checkpoints import as_stored
from xgenda.models.generative import SamplingOptions
from xgenda.models.latents import LatentModel, build_autoencoder
from xgenda.models.spec import ModelSpec, VariableSpec
from xgenda.networks.autoencoder import Autoencoder
from xgenda.scaling import Scaling
from xgenda.states import enter
from xgenda.training.autoencoders import Components

TIMES = np.array(["2001-01-01", "2001-01-02"], dtype="datetime64[ns]")


def empty(names: tuple[str, ...] = ("x",), shape: tuple[int, int] = (3, 4)) -> xr.Dataset:
    coords = {"time": TIMES, "latitude": np.linspace(40, 44, shape[0]), "longitude": np.linspace(0, 9, shape[1])}
    return xr.Dataset({n: (("time", "latitude", "longitude"), np.full((2, *shape), 5.0), {"units": "m"}) for n in names}, coords)


def linear_model(
    latent: int = 3, error: float = 0.3, kind: str = "white", names: tuple[str, ...] = ("x",), transform: str = "none"
) -> LatentModel:
    """A model whose decoder is a matrix."""
    grid = enter(empty(names)).grid
    generator = torch.Generator().manual_seed(1)
    size = len(names) * grid.size
    basis = torch.randn(latent, size, generator=generator)
    options: dict[str, Any] = {"channels": len(names), "shape": list(grid.plane), "latent": latent, "levels": 0}
    network = build_autoencoder(options)
    network.start_from(basis, basis, torch.zeros(latent), torch.zeros(len(names)))
    scaling = Scaling(
        np.full((1, len(names), 1, 1), 5.0 if transform == "none" else 1.0), np.full((len(names), 1, 1), 2.0 if transform == "none" else 0.3),
        transforms=(transform,) * len(names), offsets=(0.0,) * len(names),
    )  # fmt: skip
    spec = ModelSpec(
        "linear", "prior", "latent", tuple(VariableSpec(n, units="m") for n in names), grid, scaling,
        options={"network": options, "error_kind": kind, "error_lengths": [] if kind == "white" else [400e3] * len(names)},
    )  # fmt: skip
    deviations = error * torch.linspace(0.5, 1.5, size).reshape(len(names), *grid.plane)
    return as_stored(LatentModel(spec, network, deviations))  # type: ignore[return-value]


def observed(values: dict[tuple[int, int, int], float], name: str = "x", units: str = "m") -> xr.Dataset:
    """Observations of single cells (time, row, column)."""
    out = empty((name,))
    field = np.full(out[name].shape, np.nan)
    for where, value in values.items():
        field[where] = value
    return out.assign({name: (out[name].dims, field, {"units": units})})


OBS = {(0, 0, 0): 7.0, (0, 1, 2): 4.0, (0, 2, 3): 3.5, (0, 2, 1): 6.0, (1, 1, 1): 2.0}


def kalman(model: LatentModel, t: int, error: float) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance of the state in closed form."""
    assert model.network.basis is not None
    rows = torch.arange(12)
    prior = 4.0 * (model.network.basis.T @ model.network.basis + model.covariance.block(rows, rows)).numpy()
    cells = [np.ravel_multi_index(w[1:], (3, 4)) for w in OBS if w[0] == t]
    y = np.array([v for w, v in OBS.items() if w[0] == t])
    gain = prior[:, cells] @ np.linalg.inv(prior[np.ix_(cells, cells)] + error**2 * np.eye(len(y)))
    return 5.0 + gain @ (y - 5.0), prior - gain @ prior[cells]


def analysis(model: Any, members: int = 4, **options: Any) -> np.ndarray:
    given: dict[str, Any] = {"error": 0.5, "seed": 0, "background_check": None, "progress": False} | options
    result = xgenda.assimilate(given.pop("ds", empty()), given.pop("obs", observed(OBS)), model=model, members=members, **given)
    return np.asarray(result["x"].transpose("time", "member", "latitude", "longitude").values, dtype=float).reshape(
        2, members, -1
    )


@pytest.mark.parametrize("optimiser", ["lbfgs", "adam"])
def test_most_probable_state_is_the_kalman_mean(optimiser: str) -> None:
    model = linear_model(error=0.0)
    found = analysis(model, sampler="map", sampler_options={"optimiser": optimiser, "tolerance": 1e-9}, steps=600)
    for t in range(2):
        np.testing.assert_allclose(
            found[t], np.broadcast_to(kalman(model, t, 0.5)[0], (4, 12)), atol=2e-4 if optimiser == "lbfgs" else 0.02
        )


def test_most_probable_state_knows_the_error_of_the_decoder() -> None:
    model = linear_model(kind="matern32", error=0.6)
    mean, _ = kalman(model, 0, 0.5)
    found = analysis(model, 300, batch_size=600, sampler="map", sampler_options={"tolerance": 1e-12})
    spread = found[0].std(0, ddof=1) / np.sqrt(300)
    assert (np.abs(found[0].mean(0) - mean) < 4 * spread + 1e-3).all()
    without = analysis(model, 2, sampler="map", guidance_options={"decoder_error": False})
    assert np.abs(without[0].mean(0) - mean).max() > 0.05  # it takes the state to be on the decoder's plane


@pytest.mark.parametrize("kind", ["white", "exponential"])
@pytest.mark.parametrize("sampler", ["rmap", "hmc"])
def test_ensembles_are_draws_from_the_kalman_posterior(kind: str, sampler: str) -> None:
    model, count = linear_model(kind=kind, error=0.6), 800
    found = analysis(model, count, sampler=sampler, steps=None if sampler == "rmap" else 4, batch_size=2000)
    for t in range(2):
        mean, covariance = kalman(model, t, 0.5)
        std = np.sqrt(np.diag(covariance))
        assert (np.abs(found[t].mean(0) - mean) < 4.5 * std / np.sqrt(count)).all()
        # of the covariance of n draws: (S_ii S_jj + S_ij^2) / n
        uncertain = np.sqrt((np.outer(std**2, std**2) + covariance**2) / count)
        assert (np.abs(np.cov(found[t].T) - covariance) < 4.5 * uncertain).all()


def test_chains_forget_where_they_begin() -> None:
    """From far outside, to a Gaussian with any covariance: the chain itself draws, not its start."""
    factor = torch.tensor([[1.0, 0.0], [0.6, 0.5]], dtype=torch.float64)
    precision = torch.linalg.inv(factor @ factor.T)

    def function(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slope = (u - 1.0) @ precision
        return 0.5 * ((u - 1.0) * slope).sum(1), slope

    noise = NoiseStream([(0, "chain", k) for k in range(800)])
    ends, accepted = hamiltonian(function, torch.full((800, 2), 6.0, dtype=torch.float64), noise, 20, 5)
    assert 0.6 < float(accepted.mean()) <= 1.0
    assert (ends.mean(0) - 1.0).abs().max() < 0.16
    np.testing.assert_allclose(np.cov(ends.numpy().T), (factor @ factor.T).numpy(), atol=0.16)


def test_log_variable_by_quadrature() -> None:
    """One latent number behind logarithms: the posterior is no Gaussian, and known by summing over a line."""
    model = linear_model(latent=1, error=0.0, transform="log")
    assert model.network.basis is not None
    obs = observed({(0, 1, 1): 4.0, (1, 0, 0): 2.0})
    found = analysis(model, 1500, obs=obs, sampler="hmc", steps=5, batch_size=3000, error=1.0)
    z = np.linspace(-8, 8, 4001)
    states = np.exp(1.0 + 0.3 * model.network.basis[0].numpy()[:, None] * z)
    for t, (cell, value) in enumerate([(5, 4.0), (0, 2.0)]):
        density = np.exp(-0.5 * z**2 - 0.5 * (states[cell] - value) ** 2)
        density /= density.sum()
        mean = (states * density).sum(1)
        std = np.sqrt((states**2 * density).sum(1) - mean**2)
        assert (np.abs(found[t].mean(0) - mean) < 4.5 * std / np.sqrt(1500)).all()
        np.testing.assert_allclose(found[t].std(0), std, rtol=0.12)


def test_published_search_is_least_squares_without_a_prior() -> None:
    """As many latent numbers as observations: the fit is perfect, however far from the prior it is, and whatever the errors."""
    model = linear_model(latent=4, error=0.0)
    found = analysis(model, guidance="mse", sampler="map", steps=500, sampler_options={"tolerance": 1e-14})
    cells = [np.ravel_multi_index(w[1:], (3, 4)) for w in OBS if w[0] == 0]
    np.testing.assert_allclose(found[0][:, cells], np.broadcast_to([7.0, 4.0, 3.5, 6.0], (4, 4)), atol=1e-2)
    assert found[1].std(0).max() > 0.1  # one observation for four numbers: where the search began is kept


def test_restarts_find_one_minimum_and_perturbed_observations_a_spread() -> None:
    model = linear_model(error=0.0)
    assert analysis(model, 6, sampler="map")[0].std(0).max() < 5e-3
    both = analysis(model, 300, sampler="rmap", batch_size=600)[0].std(0)
    only = analysis(model, 300, sampler="rmap", batch_size=600, sampler_options={"perturb": "observations"})[0].std(0)
    assert only.mean() < 0.99 * both.mean()
    assert (only > 0.05).any()


@pytest.mark.parametrize("sampler", ["map", "hmc"])  # 'rmap' is among those of test_engine.py
def test_a_member_depends_on_seed_label_and_number_alone(sampler: str) -> None:
    model, steps = linear_model(kind="matern32"), 3 if sampler == "hmc" else None
    whole = analysis(model, 5, sampler=sampler, steps=steps)
    np.testing.assert_allclose(analysis(model, 5, sampler=sampler, steps=steps, batch_size=1), whole, atol=1e-4)
    np.testing.assert_allclose(analysis(model, 3, sampler=sampler, steps=steps), whole[:, :3], atol=1e-4)
    np.testing.assert_allclose(analysis(model, 5, sampler=sampler, steps=steps, ds=empty().chunk(time=1)), whole, atol=1e-4)
    backwards = analysis(model, 5, sampler=sampler, steps=steps, ds=empty().isel(time=[1, 0], latitude=slice(None, None, -1)))
    np.testing.assert_allclose(backwards[::-1].reshape(2, 5, 3, 4)[:, :, ::-1].reshape(2, 5, 12), whole, atol=1e-4)
    assert np.abs(analysis(model, 5, sampler=sampler, steps=steps, seed=1) - whole).max() > 0.01


def test_operators_that_are_not_linear() -> None:
    """Only the speed is observed: the search finds winds that have it, each time at its own time."""
    model = linear_model(names=("u", "v"), error=0.05)
    speed = observed({(0, 1, 1): 9.0, (1, 1, 1): 6.0, (0, 0, 3): 8.0}, "speed", "m s-1")
    operators = {"speed": xgenda.operators.wind_speed("u", "v")}
    result = xgenda.assimilate(
        empty(("u", "v")), speed, model=model, error=0.05, members=3, seed=0, operators=operators, background_check=None, sampler="map",
        guidance_options={"decoder_error": False},
    )  # fmt: skip
    found = np.hypot(result["u"], result["v"]).transpose("time", "member", "latitude", "longitude").values
    np.testing.assert_allclose(found[0, :, 1, 1], 9.0, atol=0.15)
    np.testing.assert_allclose(found[1, :, 1, 1], 6.0, atol=0.15)


def test_suspect_observations_count_less() -> None:
    model = linear_model(latent=2, error=0.0)
    truth = analysis(model, 1, sampler="map")[0, 0]
    wrong = {(0, *w[1:]): float(truth[np.ravel_multi_index(w[1:], (3, 4))]) for w in OBS} | {(0, 0, 0): 60.0}
    plain, robust = (
        analysis(model, 1, obs=observed(wrong), sampler="map", likelihood=k, steps=500)[0, 0] for k in ("gaussian", "student-t")
    )
    assert np.abs(robust - truth).max() < 0.2 * np.abs(plain - truth).max()


def test_without_observations_members_are_draws_of_the_prior() -> None:
    model = linear_model(kind="exponential")
    with pytest.warns(UserWarning, match="No observation can be used"):
        result = xgenda.assimilate(empty(), None, model=model, members=800, seed=0, batch_size=1600)
    found = result["x"].isel(time=0).transpose("member", ...).values.reshape(800, -1)
    assert model.network.basis is not None
    std = 2 * np.sqrt((model.network.basis**2).sum(0).numpy() + model.error.reshape(-1).numpy() ** 2)
    np.testing.assert_allclose(found.std(0), std, rtol=0.13)


def test_background_check_knows_the_prior() -> None:
    """What lies 10 standard deviations of the decoder's draws off is refused, and what lies 9 off is not."""
    model = linear_model()
    assert model.network.basis is not None
    std = 2 * np.sqrt((model.network.basis**2).sum(0).numpy() + model.error.reshape(-1).numpy() ** 2)
    obs = observed({(0, 0, 0): 5.0 + 12 * std[0], (0, 2, 3): 5.0 + 8 * std[11]})
    codes = xgenda.innovations(empty(), obs, model=model, error=0.01)
    found = dict(zip(codes["latitude"].values, codes["quality_code"].values, strict=True))
    assert found[44.0] == 0
    assert found[40.0] != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "anchor"}, "guidance='anchor' is not accepted.*'posterior', 'mse'"),
        ({"sampler": "heun"}, "sampler='heun' is not accepted.*'map', 'rmap', 'hmc'"),
        ({"schedule": "karras"}, "schedule='karras' has no effect.*latent space"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"likelihood": "cauchy"}, "likelihood='cauchy'"),
        ({"guidance": "mse", "sampler": "hmc"}, "no probability to draw from"),
        ({"guidance": "mse", "likelihood": "huber"}, "has no effect with guidance='mse'"),
        ({"guidance": "mse", "guidance_options": {"prior": True}}, "'mse' has no option 'prior'"),
        ({"guidance_options": {"prior": 1}}, "must be True or False"),
        ({"guidance_options": {"prior": False}, "sampler": "hmc"}, "needs its prior"),
        ({"sampler_options": {"leapfrog": 8}}, "'rmap' has no option 'leapfrog'"),
        ({"sampler_options": {"optimiser": "sgd"}}, "'lbfgs', 'adam'"),
        ({"sampler_options": {"rate": 0.1}}, "is the step of Adam"),
        ({"sampler_options": {"tolerance": -1.0}}, "positive number"),
        ({"sampler": "hmc", "sampler_options": {"leapfrog": 0}}, "leapfrog"),
        ({"sampler_options": {"perturb": "none"}}, "'both', 'observations'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_computed(options: dict[str, Any], message: str, no_compute: None) -> None:
    with pytest.raises(OptionError, match=message):
        analysis(linear_model(), ds=empty().chunk(time=1), **options)


# -- searches ---------------------------------------------------------------------------------------------------------------------------


def valley(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rosenbrock's, with another floor for each sample."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        value = (1 - leaf[:, 0]) ** 2 + 100 * (leaf[:, 1] - leaf[:, 0] ** 2) ** 2
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def test_quasi_newton_finds_the_end_of_the_valley_and_samples_do_not_meet() -> None:
    start = torch.tensor([[-1.2, 1.0], [3.0, -2.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    found = lbfgs(valley, start, 300, 1e-14)
    assert (found - 1.0).abs().max() < 1e-4
    for k in range(4):
        torch.testing.assert_close(lbfgs(valley, start[k : k + 1], 300, 1e-14)[0], found[k], rtol=1e-9, atol=1e-9)
    slow = adam(valley, start, 300, 0.05, 1e-9)
    for k in (0, 2):
        torch.testing.assert_close(adam(valley, start[k : k + 1], 300, 0.05, 1e-9)[0], slow[k], rtol=1e-9, atol=1e-9)
    assert (valley(slow)[0] < 5.0).all()


# -- networks and training --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "periodic"), [((9, 13), False), ((7, 5), True), ((1, 9), False), ((6, 10), "both")])
def test_network_takes_any_grid_and_periodic_axes_have_no_seam(shape: tuple[int, int], periodic: Any) -> None:
    network = Autoencoder(2, shape, 3, width=8, periodic=periodic)
    x = torch.randn(4, 2, *shape, generator=torch.Generator().manual_seed(0))
    mean, variance, found, error = network(x, torch.zeros(4, 3))
    assert (mean.shape, variance.shape, found.shape, error.shape) == ((4, 3), (4, 3), (4, 2, *shape), (2,))
    if periodic:
        inner = network.inner
        assert inner is not None
        torch.testing.assert_close(inner.first(x.roll(2, -1)), inner.first(x).roll(2, -1))


def test_linear_part_is_probabilistic_principal_components() -> None:
    """With all but one component kept, the covariance of the model is that of the sample."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 6, generator=generator, dtype=torch.float64
    )
    z = z + 0.1 * torch.randn(200, 6, generator=generator, dtype=torch.float64)
    found = Components.of(z, 6).first(3)
    basis, projection, log_variance = found.maps(True)
    covariance = basis.T @ basis + found.left * torch.eye(6, dtype=torch.float64)
    values = torch.linalg.eigvalsh(z.T @ z / 200)
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance)[3:], values[3:], rtol=1e-6, atol=1e-9)
    assert found.left == pytest.approx(float(values[:3].mean()), rel=1e-5)
    inner = torch.linalg.inv(basis @ basis.T + found.left * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(projection, inner @ basis, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(log_variance.exp(), found.left * inner.diagonal(), rtol=1e-4, atol=1e-10)
    density = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance).log_prob(z).mean()
    other = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    shift = float(density) - found.likelihood(z)
    assert shift == pytest.approx(-3 * np.log(2 * np.pi), rel=1e-6)
    assert float(density) > float(other.log_prob(z).mean())


def test_variances_of_principal_components_are_those_of_withheld_states() -> None:
    """Twice the variance in withheld states, and a tenth more of what no component explains, are found."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(2, 40, generator=generator, dtype=torch.float64)

    def states(signal: float, left: float) -> torch.Tensor:
        white = torch.randn(400, 42, generator=generator, dtype=torch.float64)
        return signal * white[:, :2] @ patterns + left * white[:, 2:]

    fitted = Components.of(states(1.0, 0.1), 2)
    found = fitted.suited(states(2**0.5, 0.12), (0.7, 1.0, 1.4, 2.0, 2.8))
    assert found.left == pytest.approx(0.0144, rel=0.05)
    torch.testing.assert_close(found.power - found.left, 2.0 * (fitted.power - fitted.left))
    assert fitted.suited(states(1.0, 0.1), (0.7, 1.0, 1.4, 2.0, 2.8)).power[0] == pytest.approx(float(fitted.power[0]), rel=1e-2)


def bumps(count: int = 240, shape: tuple[int, int] = (6, 12)) -> xr.Dataset:
    """A bump somewhere on a ring of longitudes: one number says all, and no plane of few dimensions holds it."""
    rng = np.random.default_rng(0)
    place = rng.uniform(0, 2 * np.pi, count)
    longitude, latitude = np.arange(shape[1]) * 360 / shape[1], np.linspace(-40, 40, shape[0])
    wave = np.exp(4 * (np.cos(np.deg2rad(longitude) - place[:, None]) - 1))
    values = wave[:, None] * np.cos(np.deg2rad(latitude))[:, None] + 0.02 * rng.standard_normal((count, *shape))
    time = np.datetime64("2000-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D")
    return xr.Dataset(
        {"x": (("time", "latitude", "longitude"), values, {"units": "m"})},
        {"time": time, "latitude": latitude, "longitude": longitude},
    )


@pytest.fixture(scope="module")
def trained() -> LatentModel:
    return xgenda.train(bumps(), task="autoencoder", latent=2, steps=140, width=8, seed=0, progress=False, climatology="none")  # type: ignore[return-value]


def test_training_beats_principal_components_on_a_curved_manifold(trained: LatentModel) -> None:
    record = trained.spec.training
    assert record["correction_weight"] == 1.0
    assert record["validation_best"] < record["validation_without"] - 0.2
    assert trained.spec.kind == "latent"
    assert "latent vector of 2 numbers" in trained.spec.description
    assert set(trained.history.data_vars) >= {"loss", "validation_loss"}


def test_observations_of_few_cells_place_the_bump(trained: LatentModel) -> None:
    truth = bumps().isel(time=[200, 203])
    obs = truth.isel(longitude=slice(None, None, 3), latitude=slice(1, None, 3)).reindex_like(truth)
    kept = {"error": 0.05, "members": 4, "seed": 0, "background_check": None, "progress": False}
    result = xgenda.assimilate(xr.zeros_like(truth), obs, model=trained, sampler="rmap", **kept)
    error = float(np.sqrt(((result["x"].mean("member") - truth["x"]) ** 2).mean()))
    assert error < 0.6 * float(truth["x"].std())


def test_round_trip_keeps_every_bit(trained: LatentModel, tmp_path: Path) -> None:
    again = xgenda.load_model(trained.save(tmp_path / "m.safetensors", card=True))
    assert again.spec.to_dict() == trained.spec.to_dict()
    for name, tensor in trained.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    card = (tmp_path / "m.md").read_text()
    assert "prior (latent)" in card
    assert "decoder error" in card
    truth = bumps().isel(time=[200])
    one, two = (
        xgenda.assimilate(
            xr.zeros_like(truth), truth, model=m, error=0.1, members=2, seed=0, background_check=None, progress=False
        )
        for m in (trained, again)
    )
    xr.testing.assert_equal(one["x"], two["x"])


def test_files_of_another_error_are_refused() -> None:
    model = linear_model()
    spec = ModelSpec.from_dict(
        model.spec.to_dict() | {"options": dict(model.spec.options) | {"error_kind": "pink"}}, model.spec.scaling
    )
    with pytest.raises(CheckpointError, match="pink"):
        LatentModel.from_tensors(spec, model.tensors())
    with pytest.raises(OptionError, match="decoder's error"):
        LatentModel(model.spec, model.network, model.error[:, 1:])


def test_training_is_reproducible_and_resumes_to_the_bit(tmp_path: Path) -> None:
    kept = {"task": "autoencoder", "latent": 2, "steps": 45, "width": 8, "seed": 3, "progress": False}
    whole = xgenda.train(bumps(80), **kept)

    def stop(report: xgenda.Progress) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        xgenda.train(bumps(80), **kept, out=tmp_path / "m.safetensors", callbacks=[stop])
    assert (tmp_path / "m.training" / "autoencoder.safetensors").exists()
    resumed = xgenda.train(bumps(80), **kept, out=tmp_path / "m.safetensors", resume=True)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_missing_and_masked_cells(tmp_path: Path) -> None:
    """A fifth of all cells missing at random, and land: the first are not learned from, the second are NaN in the result."""
    ds = bumps(120)
    seen = np.random.default_rng(1).random(ds["x"].shape) > 0.2
    land = np.zeros(ds["x"].shape[1:], dtype=bool)
    land[:3, :4] = True
    gappy = ds.where(seen & ~land)
    model = xgenda.train(gappy, task="autoencoder", latent=4, steps=60, width=8, progress=False, climatology="none")
    assert model.spec.training["observed"] == pytest.approx(0.8, abs=0.02)
    assert model.valid is not None
    assert (~model.valid).sum() == land.sum()
    # standard deviations are of what was observed
    assert model.spec.scaling is not None
    anomaly = (gappy["x"] - gappy["x"].mean("time")).values
    assert float(model.spec.scaling.std.mean()) == pytest.approx(np.sqrt(np.nanmean(anomaly**2)), rel=0.02)
    truth = ds.isel(time=[90]).where(~land)
    result = xgenda.assimilate(truth, truth, model=model, error=0.05, members=2, seed=0, background_check=None, progress=False)
    np.testing.assert_array_equal(result["x"].isnull().any("member").isel(time=0), land)
    left = (result["x"].mean("member") - truth["x"]).values
    assert np.sqrt(np.nanmean(left**2)) < 0.05


def test_plain_autoencoder_has_standard_latent_vectors() -> None:
    model: Any = xgenda.train(bumps(120), task="autoencoder", latent=3, variational=False, steps=40, width=8, progress=False)
    assert model.spec.options["network"]["variational"] is False
    fields = torch.as_tensor(bumps(120)["x"].values)[:, None]
    scaled = (fields - torch.as_tensor(model.spec.scaling.mean[0])) / torch.as_tensor(model.spec.scaling.std)
    with torch.no_grad():
        latent, _ = model.network.encode(scaled)
    np.testing.assert_allclose(np.cov(latent.numpy().T), np.eye(3), atol=0.3)


def test_length_of_the_latent_vector_is_found() -> None:
    """Three patterns and white noise, along members: eight components of those that are tried, none of them too many."""
    rng = np.random.default_rng(0)
    ds = bumps(2).isel(time=0, drop=True)
    patterns = rng.standard_normal((3, *ds["x"].shape))
    fields = np.tensordot(rng.standard_normal((90, 3)), patterns, 1) + 0.1 * rng.standard_normal((90, *ds["x"].shape))
    members = xr.Dataset({"x": (("member", *ds["x"].dims), fields, {"units": "m"})}, ds.coords)
    model: Any = xgenda.train(members, task="autoencoder", steps=2, width=8, progress=False)
    assert model.latent == 8
    assert float(model.error.mean() * model.spec.scaling.std.mean()) == pytest.approx(0.1, rel=0.2)


def test_network_without_a_linear_part() -> None:
    model: Any = xgenda.train(bumps(80), task="autoencoder", latent=2, anchor=None, steps=20, width=8, progress=False)
    assert model.network.basis is None
    assert "card" in model.spec.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "prior", "latent": 8}, "latent=8 belongs to task='autoencoder'"),
        ({"task": "downscale", "factor": 2, "beta": 2.0}, "beta=2.0 has no effect with task='downscale'"),
        ({"latent": 0}, "latent=0"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"variational": "yes"}, "variational='yes'"),
        ({"variational": False, "beta": 2.0}, "no effect with variational=False"),
        ({"anchor": "hybrid"}, "starts from principal components"),
        ({"start": "t2m-north-america"}, "start has no effect with task='autoencoder'"),
        ({"window": 3}, "window=3 belongs to task='prior'"),
        ({"factor": 2}, "factor=2 has no effect with task='autoencoder'"),
        ({"architecture": "mesh"}, "architecture='mesh' has no effect with task='autoencoder'"),
        ({"latent": 60}, "latent=60 is more than"),
    ],
)
def test_bad_training_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        xgenda.train(bumps(60), **{"task": "autoencoder", "steps": 1, "progress": False} | options)


def test_fill_values_are_refused_among_missing_ones() -> None:
    ds = bumps(40)
    values = ds["x"].values.copy()
    values[3, 2, 2], values[5, 4, 4] = np.nan, 1e20
    with pytest.raises(StateError):
        xgenda.train(ds.assign(x=(ds["x"].dims, values)), task="autoencoder", steps=1, progress=False)


def test_plan_of_a_search_holds_every_value() -> None:
    model = linear_model()
    found = model.plan(SamplingOptions())
    assert found.guidance_options == {"prior": True, "decoder_error": True}
    assert found.sampler_options["tolerance"] == 1e-5


@pytest.mark.parametrize("climatology", ["auto", "dayofyear"])
def test_seasons_are_those_of_what_was_observed(climatology: str) -> None:
    """Seven of ten values missing: the cycle of the year is as large as with all of them, and what is left of them as small."""
    rng, count = np.random.default_rng(0), 800
    times = np.datetime64("2000-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D")
    season = 10 * np.cos(2 * np.pi * np.arange(count) / 365.2425)
    values = 280 + season[:, None, None] + (rng.standard_normal((count, 3)) @ rng.standard_normal((3, 12))).reshape(count, 3, 4)
    ds = empty().isel(time=[0] * count).assign_coords(time=times)
    ds = ds.assign(x=(ds["x"].dims, values, ds["x"].attrs))
    seen = rng.random(values.shape) > 0.7
    seen[:, 0, 0] = True  # no time is without any
    gappy = ds.where(seen)
    model: Any = xgenda.train(gappy, task="autoencoder", steps=1, width=8, latent=2, climatology=climatology, progress=False)
    whole: Any = xgenda.train(ds, task="autoencoder", steps=1, width=8, latent=2, climatology=climatology, progress=False)
    assert model.scaling.cycle == whole.scaling.cycle == "dayofyear"
    np.testing.assert_allclose(model.scaling.mean[1], 10.0, atol=0.6)
    np.testing.assert_allclose(model.scaling.std, whole.scaling.std, rtol=0.05)

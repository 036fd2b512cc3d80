"""Diffusion in a latent space: with a linear decoder it is the Kalman filter and smoother, and it knows codes that are not normal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from test_latents import OBS, analysis, bumps, empty, linear_model, observed

import xgenda
from xgenda.diffusion.anchors import Modes, Separable
from xgenda.diffusion.covariances import Covariance
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.evidence import FunctionEvidence
from xgenda.errors import CheckpointError, OptionError
from xgenda.latent import Decoded, Factored
from xgenda.models.checkpoints import as_stored
from xgenda.models.decoding import Independent
from xgenda.models.generative import SamplingOptions
from xgenda.models.latents import LatentModel
from xgenda.networks.autoencoder import Autoencoder
from xgenda.networks.dense import LatentNet

pytestmark = pytest.mark.usefixtures("one_thread")

CODES = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.5, 0.3], [0.0, 0.3, 0.2]], dtype=torch.float64)  # covariance, far from I
CENTRE = torch.tensor([0.7, -0.4, 1.0], dtype=torch.float64)
IN_TIME = torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64)  # correlation of consecutive ones


def days(count: int) -> xr.Dataset:
    """The grid at so many days."""
    times = np.datetime64("2001-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D")
    return empty().isel(time=[0] * count).assign_coords(time=times)


def gaussian_codes(window: int = 1, **options: Any) -> Any:
    """A linear decoder of Gaussian codes, whose network adds nothing."""
    model = linear_model(**options)
    model.network.restandardise(CENTRE, torch.linalg.cholesky(CODES))
    anchor = Separable(Modes(torch.eye(3)), IN_TIME) if window > 1 else None
    size = 3 * window
    arguments = {"channels": size, "condition_channels": size if window > 1 else 0, "width": 16, "blocks": 1}
    extra = {"window": window, "spacing": 86400.0} if window > 1 else {}
    spec = dataclasses.replace(model.spec, options={**model.spec.options, "prior": arguments, "sigma_max": 80.0, **extra})
    prior = EDMDenoiser(LatentNet(**arguments), anchor, anchor is not None)
    return as_stored(LatentModel(spec, model.network, model.error, model.valid, prior))


def smoothed(model: Any, times: int, values: dict[tuple[int, int, int], float], error: float) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance of all states in closed form, by the correlation in time of the codes."""
    rows = torch.arange(12)
    basis = model.network.basis
    codes = (basis.T @ CODES @ basis).numpy()
    lags = np.array([1.0, 0.8, 0.5, *[0.0] * 10])
    weights = np.linalg.solve([[1, 0.8], [0.8, 1]], [0.8, 0.5])  # beyond the window: Yule-Walker
    for k in range(3, 12):
        lags[k] = weights @ lags[[k - 1, k - 2]]
    together = lags[np.abs(np.subtract.outer(np.arange(times), np.arange(times)))] if model.window > 1 else np.eye(times)
    prior = 4.0 * (np.kron(together, codes) + np.kron(np.eye(times), model.covariance.block(rows, rows).numpy()))
    mean = np.tile(5.0 + 2.0 * (CENTRE @ basis).numpy(), times)
    cells = [12 * t + 4 * i + j for t, i, j in values]
    y = np.array(list(values.values()))
    gain = prior[:, cells] @ np.linalg.inv(prior[np.ix_(cells, cells)] + error**2 * np.eye(len(y)))
    return mean + gain @ (y - mean[cells]), prior - gain @ prior[cells]


def agree(found: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Compare draws (n, size) with a Gaussian, to sampling errors."""
    count, std = len(found), np.sqrt(np.diag(covariance))
    assert (np.abs(found.mean(0) - mean) < 4.5 * std / np.sqrt(count) + 0.01 * std).all()
    uncertain = np.sqrt((np.outer(std**2, std**2) + covariance**2) / count)
    assert (np.abs(np.cov(found.T) - covariance) < 4.5 * uncertain).all()


@pytest.mark.parametrize(("guidance", "kind"), [("anchor", "white"), ("mmps", "exponential")])
def test_linear_decoder_of_gaussian_codes_is_the_kalman_filter(guidance: str, kind: str) -> None:
    model = gaussian_codes(error=0.6, kind=kind)
    found = analysis(model, 300, guidance=guidance, batch_size=600).transpose(1, 0, 2).reshape(300, -1)
    agree(found, *smoothed(model, 2, OBS, 0.5))


@pytest.mark.parametrize("guidance", ["anchor", "mmps"])
def test_trajectory_of_codes_is_the_kalman_smoother(guidance: str) -> None:
    """Five times from windows of three; one is not observed at all, and another knows what its neighbours saw."""
    model = gaussian_codes(3, error=0.4, kind="exponential")
    values = {(0, 0, 0): 7.0, (0, 1, 2): 4.0, (2, 2, 3): 3.5, (2, 2, 1): 6.0, (3, 1, 1): 2.0}
    grid = days(5)
    obs = xr.full_like(grid, np.nan)
    for where, value in values.items():
        obs["x"][where] = value
    result = xgenda.assimilate(
        grid, obs, model=model, error=0.5, members=400, seed=0, background_check=None, progress=False, guidance=guidance, batch_size=400
    )  # fmt: skip
    found = result["x"].transpose("member", "time", ...).values.reshape(400, -1).astype(float)
    agree(found, *smoothed(model, 5, values, 0.5))


def test_decoder_error_is_in_the_ensemble_unless_it_is_left_out() -> None:
    model = gaussian_codes(error=0.6)
    on_plane = analysis(model, 8, steps=6, guidance_options={"decoder_error": False})[0]
    assert np.linalg.matrix_rank(on_plane - on_plane.mean(0), tol=1e-3) == 3
    off = analysis(model, 8, steps=6)[0]
    assert np.linalg.matrix_rank(off - off.mean(0), tol=1e-3) == 7


def test_without_observations_members_are_draws_of_the_codes() -> None:
    model = gaussian_codes(error=0.3)
    with pytest.warns(UserWarning, match="No observation can be used"):
        result = xgenda.assimilate(empty().isel(time=[0]), None, model=model, members=400, seed=0, batch_size=400)
    found = result["x"].isel(time=0).transpose("member", ...).values.reshape(400, -1).astype(float)
    mean, covariance = smoothed(model, 1, {}, 0.5)
    agree(found, mean, covariance)


def test_background_check_knows_the_learned_prior() -> None:
    model = gaussian_codes()
    mean, covariance = smoothed(model, 1, {}, 0.5)
    std = np.sqrt(np.diag(covariance))
    obs = observed({(0, 0, 0): mean[0] + 12 * std[0], (0, 2, 3): mean[11] + 8 * std[11]})
    codes = xgenda.innovations(empty(), obs, model=model, error=0.01)
    found = dict(zip(codes["latitude"].values, codes["quality_code"].values, strict=True))
    assert found[44.0] == 0
    assert found[40.0] != 0


def test_operators_that_are_not_linear() -> None:
    """Only the speed is observed, of winds whose decoder is linear: mmps linearises the operator."""
    model = linear_model(names=("u", "v"), error=0.05)
    arguments = {"channels": 3, "width": 16, "blocks": 1}
    spec = dataclasses.replace(model.spec, options={**model.spec.options, "prior": arguments, "sigma_max": 80.0})
    whole: Any = as_stored(LatentModel(spec, model.network, model.error, None, EDMDenoiser(LatentNet(**arguments))))
    speed = observed({(0, 1, 1): 9.0, (1, 1, 1): 6.0, (0, 0, 3): 8.0}, "speed", "m s-1")
    result = xgenda.assimilate(
        empty(("u", "v")), speed, model=whole, error=0.3, members=3, seed=0, background_check=None, progress=False, steps=12,
        operators={"speed": xgenda.operators.wind_speed("u", "v")},
    )  # fmt: skip
    found = np.hypot(result["u"], result["v"]).transpose("time", "member", "latitude", "longitude").values
    np.testing.assert_allclose(found[0, :, 1, 1], 9.0, atol=1.2)
    np.testing.assert_allclose(found[1, :, 1, 1], 6.0, atol=1.2)


def test_suspect_observations_count_less() -> None:
    model = gaussian_codes(error=0.1)
    truth = analysis(model, 16, steps=12)[0].mean(0)
    wrong = observed({(0, *w[1:]): float(truth[4 * w[1] + w[2]]) for w in OBS} | {(0, 0, 0): 60.0})
    plain, robust = (
        np.abs(analysis(model, 8, obs=wrong, likelihood=k, steps=12)[0].mean(0) - truth).max() for k in ("gaussian", "student-t")
    )
    assert robust < 0.2 * plain


# -- parts ------------------------------------------------------------------------------------------------------------------------------


def test_tangent_through_decoder_operator_and_errors() -> None:
    """The derivative of whitened observations is that of differences, and its two directions belong together."""
    torch.manual_seed(0)
    network = Autoencoder(1, (5, 7), 4, width=8, linear=False).double()
    torch.nn.init.normal_(network.inner.last.conv.weight, std=0.3)  # type: ignore[union-attr]
    inner = FunctionEvidence(lambda x: x.flatten(1)[:, ::5] ** 2, (1, 5, 7), torch.randn(7).double(), 0.3)
    factor = torch.linalg.cholesky(torch.eye(7).double() + 0.3)
    seen = Decoded(
        lambda z: network.decode(z).flatten(1), inner, Factored(factor[None], torch.zeros(2).long()), torch.zeros(2, 7, 4)
    )
    z, change, vector = torch.randn(2, 4).double(), torch.randn(2, 4).double(), torch.randn(2, 7).double()
    tangent, step = seen.tangent(z), 1e-6
    forth = tangent.forth(change)
    with torch.no_grad():
        torch.testing.assert_close(
            forth, (seen.observe(z + step * change) - seen.observe(z - step * change)) / (2 * step), rtol=1e-5, atol=1e-7
        )
    torch.testing.assert_close((forth * vector).sum(1), (tangent.back(vector) * change).sum(1))
    torch.testing.assert_close(seen.value @ factor.T, inner.value.expand(2, -1))


def test_network_of_codes_counts_where_the_noise_leaves_something_to_know() -> None:
    """At high noise the covariance that guidances take from the denoiser, sigma^2 dD/dx, is that of the codes, whatever the weights."""
    torch.manual_seed(0)
    network = LatentNet(3, width=16, blocks=1)
    torch.nn.init.normal_(network.last.weight)
    denoise = EDMDenoiser(network)

    def covariance(sigma: float) -> torch.Tensor:
        x = sigma * torch.randn(1, 3, 1, 1, dtype=torch.float64)
        return sigma**2 * torch.autograd.functional.jacobian(lambda v: denoise(v, sigma), x).reshape(3, 3)  # type: ignore[no-untyped-call]

    torch.testing.assert_close(covariance(80.0), torch.eye(3, dtype=torch.float64), atol=0.1, rtol=0)
    assert (covariance(1.0) - 0.5 * torch.eye(3)).abs().max() > 0.1
    far = network(torch.full((1, 3, 1, 1), 1e4), torch.zeros(1))
    torch.testing.assert_close(far, network(torch.full((1, 3, 1, 1), 1e6), torch.zeros(1)), rtol=1e-3, atol=1e-3)


def test_independent_states_have_the_covariance_of_one_each() -> None:
    one: Covariance = linear_model(kind="exponential").covariance
    three, cells = Independent(one, 3), torch.arange(12)
    dense = np.kron(np.eye(3), one.block(cells, cells).numpy())
    rows, columns = torch.tensor([0, 13, 30, 5]), torch.tensor([35, 1, 14, 20, 12])
    np.testing.assert_allclose(three.block(rows, columns).numpy(), dense[np.ix_(rows, columns)])
    np.testing.assert_allclose(three.diagonal().numpy(), np.diag(dense))


def test_restandardising_moves_codes_and_not_states() -> None:
    model = linear_model()
    network, u = model.network, torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    root = torch.linalg.cholesky(CODES)
    network.restandardise(CENTRE, root)
    before = network.decode(u)
    network.restandardise(CENTRE, root)
    torch.testing.assert_close(network.decode(torch.linalg.solve(root, (u - CENTRE).T).T), before)
    states = network.decode(u)
    shifted = network.encode(states)[0] - network.encode(torch.zeros_like(states))[0]
    raw = states.flatten(1) @ network.projection.T  # type: ignore[union-attr]
    torch.testing.assert_close(network.turned(raw), shifted)


# -- learned priors ---------------------------------------------------------------------------------------------------------------------


def regimes(count: int = 400) -> tuple[LatentModel, xr.Dataset, torch.Tensor]:
    """A linear decoder of two numbers, of which the first is about -1.5 or 1.5; states of such, and what projects them back."""
    model = linear_model(latent=2, error=0.1)
    assert model.network.basis is not None
    assert model.network.projection is not None
    back = torch.linalg.pinv(model.network.basis)
    model.network.projection.copy_(back.T)
    model.network.log_variance.fill_(-6.0)
    rng = np.random.default_rng(0)
    codes = np.stack([1.5 * rng.choice([-1, 1], count) + 0.2 * rng.standard_normal(count), rng.standard_normal(count)], 1)
    states = codes @ model.network.basis.numpy() + model.error.reshape(-1).numpy() * rng.standard_normal((count, 12))
    return model, days(count).copy(data={"x": 5.0 + 2.0 * states.reshape(count, 3, 4)}), back


@pytest.mark.slow
def test_two_regimes_are_learned_and_observations_choose_between_them() -> None:
    """Where N(0, I) puts its mode there is no state; what was learned knows it, and agrees with the mixture in closed form."""
    model, ds, back = regimes()
    learned: Any = xgenda.train(
        ds, task="autoencoder", start=model, latent_prior="diffusion", steps=300, batch_size=32, progress=False
    )
    assert learned.spec.training["prior_correction_weight"] > 0.5
    assert learned.spec.training["prior_codes"].startswith("-0.")  # two regimes have short tails
    basis = model.network.basis[:, 0].numpy()  # type: ignore[index]

    def first(of: Any, value: float, error: float, **options: Any) -> np.ndarray:
        obs = observed({(0, 0, 0): value})
        found = analysis(of, 120, obs=obs, error=error, batch_size=240, **options)
        return np.asarray((found - 5.0) / 2.0 @ back.numpy()[:, 0])[0]

    undecided, blind = first(learned, 5.0, 3.0, guidance="mmps"), first(model, 5.0, 3.0, sampler="rmap")
    assert (np.abs(undecided) < 0.75).mean() < 0.25
    assert min((undecided > 0).mean(), (undecided < 0).mean()) > 0.25
    assert undecided.std() > 1.1
    assert (np.abs(blind) < 0.75).mean() > 0.5
    z = np.linspace(-3, 3, 601)
    prior = sum(np.exp(-0.5 * ((z - m) / 0.2) ** 2) for m in (-1.5, 1.5))
    left = 0.5**2 + 4 * (basis[1] ** 2 + float(model.error.reshape(-1)[0]) ** 2)
    density = prior * np.exp(-0.5 * (8.5 - 5.0 - 2 * basis[0] * z) ** 2 / left)
    mean = (z * density).sum() / density.sum()
    std = np.sqrt(((z - mean) ** 2 * density).sum() / density.sum())
    decided, blind = first(learned, 8.5, 0.5, guidance="mmps"), first(model, 8.5, 0.5, sampler="rmap")
    assert (decided > 0).mean() < 0.02
    assert abs(decided.mean() - mean) < 0.6 * abs(blind.mean() - mean)
    assert std < decided.std() < 2.2 * std  # guidance takes what is left for a Gaussian


@pytest.fixture(scope="module")
def trained() -> LatentModel:
    return xgenda.train(
        bumps(120), task="autoencoder", latent=2, steps=40, width=8, seed=0, progress=False, climatology="none", latent_prior="diffusion",
        window=3,
    )  # type: ignore[return-value]  # fmt: skip


def test_windows_of_codes_that_are_all_the_same_have_no_correlation_in_time() -> None:
    """An encoder that learned nothing sends every state to the same code: nothing is known of the next one, and that is no failure."""
    options: dict[str, Any] = {"anchor": None, "latent": 2, "steps": 2, "width": 8, "climatology": "none", "progress": False}
    found: Any = xgenda.train(bumps(60), task="autoencoder", latent_prior="diffusion", window=3, **options)
    assert found.spec.training["correction_weight"] == 0.0
    torch.testing.assert_close(found.prior.anchor.of_length(4).matrix, torch.eye(4, dtype=torch.float64))
    assert found.spec.training["prior_codes"].startswith("0.00")


def test_training_in_one_call_and_round_trip_to_the_bit(trained: Any, tmp_path: Path) -> None:
    assert trained.window == 3
    assert trained.spec.options["spacing"] == 86400.0
    assert set(trained.history.data_vars) >= {"autoencoder_loss", "codes_loss"}
    again = xgenda.load_model(trained.save(tmp_path / "m.safetensors"))
    assert again.spec.to_dict() == trained.spec.to_dict()
    for name, tensor in trained.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    truth = bumps(120).isel(time=slice(60, 63))
    one, two = (
        xgenda.assimilate(truth, truth, model=m, error=0.1, members=2, seed=0, background_check=None, progress=False, steps=4)
        for m in (trained, again)
    )
    xr.testing.assert_equal(one["x"], two["x"])


def test_resumed_training_ends_with_the_same_prior(trained: Any, tmp_path: Path) -> None:
    kept: dict[str, Any] = {
        "task": "autoencoder", "start": trained, "latent_prior": "diffusion", "steps": 45, "seed": 3, "progress": False,
        "out": tmp_path / "m.safetensors",
    }  # fmt: skip

    def stop(report: xgenda.Progress) -> bool:
        raise KeyboardInterrupt

    before = {k: v.clone() for k, v in trained.tensors().items()}
    with pytest.raises(KeyboardInterrupt):
        xgenda.train(bumps(120), **kept, callbacks=[stop])
    assert (tmp_path / "m.training" / "codes.safetensors").exists()
    resumed = xgenda.train(bumps(120), **kept, resume=True)
    assert not (tmp_path / "m.training").exists()
    whole = xgenda.train(bumps(120), **{**kept, "out": None})
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
    for name, tensor in trained.tensors().items():
        assert torch.equal(tensor, before[name]), name  # the model that was started from stays as it is
    assert resumed.window == 1  # type: ignore[attr-defined]


def test_files_of_other_parts_are_refused() -> None:
    model = gaussian_codes()
    windowed = dataclasses.replace(model.spec, options={**model.spec.options, "window": 3, "spacing": 1.0})
    with pytest.raises(CheckpointError, match="has a Gaussian"):
        LatentModel.from_tensors(windowed, model.tensors())
    plain = dataclasses.replace(model.spec, options={k: v for k, v in model.spec.options.items() if k != "prior"})
    with pytest.raises(KeyError, match="unexpected tensors"):
        LatentModel.from_tensors(plain, model.tensors())


# -- what is refused --------------------------------------------------------------------------------------------------------------------


def test_plan_holds_every_value_and_chooses_by_what_is_linear() -> None:
    model = gaussian_codes()
    found = model.plan(SamplingOptions())
    assert (found.guidance, found.sampler, found.guidance_options["decoder_error"]) == ("anchor", "heun", True)
    assert model.plan(SamplingOptions(), linear=False).guidance == "mmps"
    assert model.plan(SamplingOptions(sampler="hmc")).guidance == "posterior"
    assert model.plan(SamplingOptions(guidance="mse")).sampler == "rmap"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "inpaint"}, "guidance='inpaint' is not accepted"),
        ({"guidance": "mmps", "sampler": "rmap"}, "guidance='mmps' is not accepted.*'posterior', 'mse'"),
        ({"guidance": "posterior", "sampler": "heun"}, "sampler='heun' is not accepted.*'rmap'"),
        ({"guidance_options": {"decoder_error": 1}}, "must be True or False"),
        ({"guidance_options": {"prior": False}}, "has no option 'prior'"),
        ({"sampler": "pc", "sampler_options": {"tries": 3}}, "'pc' has no option 'tries'"),
        ({"steps": 1}, "steps=1"),
        ({"schedule": "linear"}, "schedule='linear'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, no_compute: None) -> None:
    with pytest.raises(OptionError, match=message):
        analysis(gaussian_codes(), ds=empty().chunk(time=1), **options)


def test_searches_are_for_single_states_and_diffusions_for_learned_priors(no_compute: None) -> None:
    with pytest.raises(OptionError, match=r"searches are for single states\. Leave out sampler='hmc'\.$"):
        gaussian_codes(3).plan(SamplingOptions(sampler="hmc"))
    with pytest.raises(OptionError, match="latent_prior='diffusion'"):
        linear_model().plan(SamplingOptions(guidance="mmps"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_prior": "flow"}, "latent_prior='flow' is not accepted"),
        ({"window": 3}, "latent_prior='diffusion'"),
        ({"task": "prior", "latent_prior": "diffusion"}, "belongs to task='autoencoder'"),
        ({"start": linear_model()}, "latent_prior='diffusion'"),
        ({"start": linear_model(), "latent_prior": "diffusion", "latent": 4}, "latent=4 has no effect with start"),
        ({"start": linear_model(), "latent_prior": "diffusion"}, "on another grid"),
        ({"start": "t2m-north-america", "latent_prior": "diffusion"}, "a latent model is needed"),
    ],
)
def test_bad_training_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        xgenda.train(bumps(60), **{"task": "autoencoder", "steps": 1, "progress": False} | options)


def test_other_variables_are_refused() -> None:
    model, ds, _ = regimes(60)
    with pytest.raises(OptionError, match="Rename or convert"):
        xgenda.train(ds.rename(x="y"), task="autoencoder", start=model, latent_prior="diffusion", steps=1, progress=False)

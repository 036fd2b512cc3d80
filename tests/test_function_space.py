"""Priors over functions through the public verbs: coloured noise, a neural operator, any resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.kernels import Kernel
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.random_fields import TorusField
from xgenda.errors import OptionError
from xgenda.models.diffusive import DiffusionModel
from xgenda.networks.uno import UNO
from xgenda.training.objectives import Denoising, Draws
from xgenda.training.optimiser import counted

N = 16
NOISE = {"kind": "exponential", "length": 0.1, "cutoff": 7}
FAST: dict[str, Any] = {
    "periodic": "both", "architecture": "uno", "width": 8, "network_options": {"modes": 4, "rank": 4}, "progress": False, "device": "cpu",
}  # fmt: skip


def box(values: np.ndarray, start: int = 0) -> xr.Dataset:
    n = values.shape[-1]
    return xr.Dataset(
        {"a": (("time", "latitude", "longitude"), values, {"units": "m"})},
        coords={
            "time": np.datetime64("2020-01-01", "ns") + (start + np.arange(len(values))) * np.timedelta64(1, "D"),
            "latitude": 30 + 1.6 / n * np.arange(n), "longitude": 1.6 / n * np.arange(n),
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def fields() -> xr.Dataset:
    torus = TorusField((N, N), Kernel("gaussian", 0.12), cutoff=7)
    return box(3 + 2 * torus.draw(NoiseStream([(0, "t", k) for k in range(48)])).numpy())


@pytest.fixture(scope="module")
def model(fields: xr.Dataset) -> DiffusionModel:
    found = xgenda.train(fields, noise=NOISE, steps=40, **FAST)
    assert isinstance(found, DiffusionModel)
    return found


def observations(fields: xr.Dataset) -> xr.Dataset:
    picked = fields.isel(time=[3], latitude=[2, 5, 11], longitude=[3, 8, 14])
    return picked.assign(a_error=xr.full_like(picked.a, 0.1))


def analysis(model: DiffusionModel, states: xr.Dataset, obs: xr.Dataset, **options: Any) -> xr.Dataset:
    return xgenda.assimilate(states, obs, model=model, members=2, steps=6, seed=0, progress=False, **options)


def test_what_is_trained_is_stored(model: DiffusionModel, fields: xr.Dataset, tmp_path: Path) -> None:
    assert model.spec.options["noise"] == NOISE
    assert isinstance(model.denoiser.network, UNO)
    assert model.denoiser.anchor is None
    model.save(tmp_path / "model.safetensors")
    again = xgenda.load_model(tmp_path / "model.safetensors")
    obs, states = observations(fields), fields.isel(time=[3])
    found = analysis(model, states, obs)
    xr.testing.assert_identical(found.a.drop_attrs(), analysis(again, states, obs).a.drop_attrs())
    assert found.attrs["xgenda_guidance"].startswith("anchor")
    near = found.a.isel(latitude=[2, 5, 11], longitude=[3, 8, 14])
    assert float(np.abs(near - obs.a).mean()) < 0.5  # of fields with a standard deviation of 2


@pytest.mark.parametrize("guidance", ["anchor", "mmps"])
def test_a_refined_model_is_the_same_functions(model: DiffusionModel, fields: xr.Dataset, guidance: str) -> None:
    """Members on a grid of twice as many rows and columns pass through those of the coarse one."""
    finer = model.refined(2)
    states = fields.isel(time=[3])
    fine = box(np.full((1, 2 * N, 2 * N), 3.0), 3)
    coarse_members, members = (
        analysis(m, s, observations(fields), guidance=guidance) for m, s in ((model, states), (finer, fine))
    )
    assert members.a.sizes["latitude"] == 2 * N
    np.testing.assert_allclose(members.a.values[..., ::2, ::2], coarse_members.a.values, atol=5e-3)
    waves = np.abs(np.fft.fft2(members.a.values, norm="forward"))
    assert waves[..., N // 2 : N + N // 2 + 1, :].max() < 1e-5  # nothing that the coarse grid does not show
    assert waves[..., 1:8, :8].mean() > 1e-3
    with pytest.raises(OptionError, match="factor=1 is not accepted"):
        model.refined(1)


def test_noise_of_training_has_the_covariance_of_sampling() -> None:
    field = TorusField((8, 8), Kernel("matern32", 0.3))
    objective = Denoising(torch.zeros(1500, 1, 8, 8), torch.zeros(1500, dtype=torch.long), None, 1.0, 1.0 + 1e-9, noise=field)
    batch = objective.batch(torch.arange(1500), torch.zeros(1500, 1, 8, 8), Draws(0, 0, 1500))
    noise = batch.x.flatten(1).double() * np.sqrt(2)  # sigma 1, divided by the total standard deviation
    cells = torch.arange(64)
    exact = field.block(cells[:, None], cells)
    assert ((torch.cov(noise.T) - exact) / ((exact**2 + 1) / 1500).sqrt()).abs().max() < 4.5


def test_states_have_no_waves_that_the_noise_has_not() -> None:
    """Else the network would read them off a state under any noise, and miss them when it samples."""
    field = TorusField((16, 16), Kernel("exponential", 0.1), cutoff=4)
    white = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    objective = Denoising(white, torch.zeros(8, dtype=torch.long), None, 0.1, 10.0, noise=field)
    batch = objective.batch(torch.arange(8), white, Draws(0, 0, 8))
    for values in (batch.x, batch.target):
        assert torch.fft.rfft2(values, norm="forward").abs()[..., field.power == 0].max() < 1e-6
        assert torch.fft.rfft2(values, norm="forward").abs()[..., field.power > 0].min() > 1e-5


@pytest.mark.parametrize("cutoff", [None, 3])
def test_the_norm_of_cameron_and_martin_is_that_of_the_inverse_covariance(cutoff: int | None) -> None:
    """The loss of a batch is r' K^-1 r for its error r, up to a factor that is the same for all errors that the noise can make."""
    field = TorusField((8, 8), Kernel("matern32", 0.3), cutoff=cutoff)
    states = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    objective = Denoising(states, torch.zeros(6, dtype=torch.long), None, 0.1, 10.0, noise=field, whitens=True)
    batch = objective.batch(torch.arange(6), states, Draws(0, 0, 6)).of(torch.arange(3))
    cells = torch.arange(64)
    inverse = torch.linalg.pinv(field.block(cells[:, None], cells), hermitian=True, rtol=1e-9)
    white = torch.fft.irfft2(
        torch.where(field.power > 0, torch.fft.rfft2(torch.eye(64, dtype=torch.float64).reshape(64, 8, 8)), 0), s=(8, 8)
    )
    factor = float(white.square().sum() / torch.einsum("bi,ij,bj->", white.flatten(1), inverse, white.flatten(1)))
    found = counted(batch.target.double(), batch).square().sum((-2, -1))
    r = batch.target.double().flatten(-2)
    torch.testing.assert_close(found, factor * torch.einsum("bci,ij,bcj->bc", r, inverse, r), rtol=1e-5, atol=1e-6)
    plain = Denoising(states, torch.zeros(6, dtype=torch.long), None, 0.1, 10.0, noise=field)
    assert plain.batch(torch.arange(6), states, Draws(0, 0, 6)).norm is None


def test_training_takes_the_norm_that_was_asked_for(fields: xr.Dataset, tmp_path: Path) -> None:
    steps = {"steps": 3, **FAST}
    plain, other = (xgenda.train(fields, noise=NOISE | extra, **steps) for extra in ({"norm": "l2"}, {"norm": "cameron-martin"}))
    assert isinstance(plain, DiffusionModel)
    assert isinstance(other, DiffusionModel)
    assert plain.spec.options["noise"] == NOISE
    assert other.spec.options["noise"] == NOISE | {"norm": "cameron-martin"}
    assert other.sha256 != plain.sha256
    assert other.spec.training["validation_without"] != pytest.approx(plain.spec.training["validation_without"], rel=1e-3)
    other.save(tmp_path / "model.safetensors")
    assert isinstance(xgenda.load_model(tmp_path / "model.safetensors"), DiffusionModel)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "exponential"}, r"noise='exponential' is not accepted; give a mapping: noise=\{'kind'"),
        ({"noise": {"kind": "exponential", "scale": 1}}, r"noise has \['scale'\].*it takes 'kind', 'length', 'nu', 'cutoff'"),
        ({"noise": {"kind": "exponential"}}, "has no 'length'; give it too"),
        ({"noise": NOISE | {"norm": "l1"}}, r"noise\['norm'\]='l1' is not accepted; choose one of 'l2', 'cameron-martin'"),
        ({"noise": {"kind": "exponental", "length": 0.1}}, "Did you mean 'exponential'"),
        ({"periodic": None}, "pass periodic='both' too"),
        ({"anchor": "eof"}, "anchor='eof' is a denoiser of white noise.*pass anchor=None"),
        ({"window": 3}, "noise= is for single states, and window=3"),
        ({"noise": {"kind": "gaussian", "length": 0.3}}, "is smoother than the prior"),
        (
            {"network_options": {"rounds": 3}},
            r"which a neural operator does not take; it takes 'modes', 'rank', 'resolution', 'position'",
        ),
        ({"architecture": "unet", "network_options": {"modes": 3}}, "belongs to architecture='uno'; pass it too"),
        ({"architecture": "fno"}, "architecture='fno' is not accepted; choose one of .*'uno'"),
        ({"network_options": [("modes", 4)]}, r"give a mapping: network_options=\{'modes': 16, 'rank': 8\}"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_what_does_not_go_with_it_is_refused(fields: xr.Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        xgenda.train(fields, **{"noise": NOISE, "steps": 1, **FAST, **options})


def test_observations_of_cells_alone_are_those_of_the_gridded_model(model: DiffusionModel, fields: xr.Dataset) -> None:
    obs, states = observations(fields), fields.isel(time=[3])
    found = analysis(model.between_cells(), states, obs)
    xr.testing.assert_allclose(found.a.drop_attrs(), analysis(model, states, obs).a.drop_attrs(), atol=1e-5)
    assert model.colour is not None
    assert model.colour.rows(torch.zeros(0), torch.zeros(0)).shape == (0, N * N)


def test_what_a_model_cannot_do_it_says(model: DiffusionModel, fields: xr.Dataset) -> None:
    with pytest.raises(OptionError, match="guidance='inpaint' is for white noise.*use guidance='mmps'"):
        analysis(model, fields.isel(time=[3]), observations(fields), guidance="inpaint")
    white = xgenda.train(fields, steps=1, periodic="both", width=8, anchor=None, progress=False)
    assert isinstance(white, DiffusionModel)
    with pytest.raises(OptionError, match="knows one resolution only.*architecture='uno'.*'cutoff': 5"):
        white.refined(2)


def test_models_of_functions_are_not_trained_on(fields: xr.Dataset) -> None:
    model = xgenda.train(fields, periodic="both", noise=NOISE, steps=1, width=8, progress=False)
    with pytest.raises(OptionError, match="has coloured noise, and models of functions are trained from scratch"):
        xgenda.train(fields, start=model, steps=1)
    with pytest.raises(OptionError, match="architecture='uno' is for task='prior'"):
        xgenda.train(fields, task="downscale", factor=4, architecture="uno", steps=1)
    with pytest.raises(OptionError, match="more waves than 16 cells show; give at most 7"):
        xgenda.train(fields, noise=NOISE | {"cutoff": 8}, steps=1, **FAST)


def test_heavy_tails_expect_departures_of_the_coloured_noise(model: DiffusionModel) -> None:
    """The noise of a mean over cells nearer than its length is hardly less than that of one cell, and white noise is far less."""
    from xgenda.diffusion.evidence import LinearEvidence
    from xgenda.diffusion.guidance import guide

    torus = TorusField((N, N), Kernel("gaussian", 0.5))
    one = torch.arange(4)[:, None] * N + torch.arange(4)
    index = one.reshape(1, 1, -1)
    flat = {"mean": torch.zeros(1, 1, 16).double(), "std": torch.ones(1, 1, 16).double()}
    rows = LinearEvidence(
        indices=index, weights=torch.full((1, 1, 16), 1 / 16).double(), values=torch.full((1, 1), 2.0).double(),
        variances=torch.full((1, 1), 0.01).double(), log=None, offset=None, group=torch.zeros(1, dtype=torch.int64), **flat,
    )  # fmt: skip
    weights = []
    for colour in (torus, None):
        guided = guide(lambda x, _: torch.zeros_like(x), rows, "diffpir", likelihood="student-t", colour=colour)
        _, error = guided.departure(torch.zeros(1, N * N).double(), 10.0)
        weights.append(float(error))
    assert weights[0] < 0.5 * weights[1]

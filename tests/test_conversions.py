"""Conversions: what one source says of the fields of another, through a latent space whose decoder is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.errors import CheckpointError, GridError, OptionError, OutputExistsError, StateError
from xgenda.models.conversions import ConversionModel, filled_from_around, reconstructing
from xgenda.models.latents import LatentModel
from xgenda.models.spec import ModelSpec
from xgenda.plotting import plot_reconstruction
from xgenda.training.conversions import _latent

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, KNOWN = 500, 400
NOISE = 0.5
QUIET: dict[str, Any] = {"progress": False, "climatology": "none"}


def field(name: str, values: np.ndarray, latitude: np.ndarray, longitude: np.ndarray, units: str) -> xr.Dataset:
    time = np.datetime64("2000-01-01", "ns") + np.arange(len(values)) * np.timedelta64(1, "D")
    shaped = values.reshape(len(values), len(latitude), len(longitude))
    coords = {"time": time, "latitude": latitude, "longitude": longitude}
    return xr.Dataset({name: (("time", "latitude", "longitude"), shaped, {"units": units})}, coords)


def pair() -> tuple[xr.Dataset, xr.Dataset, np.ndarray, np.ndarray]:
    """Three numbers behind fields x; winds w on another grid know two of them, with noise. And mean and covariance of x given w."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((COUNT, 3))
    basis, other = rng.standard_normal((3, 40)), rng.standard_normal((3, 24))
    other[2] = 0.0
    x = z @ basis + 0.1 * rng.standard_normal((COUNT, 40))
    w = z @ other + NOISE * rng.standard_normal((COUNT, 24))
    left = np.linalg.inv(other @ other.T / NOISE**2 + np.eye(3))
    gain = left @ other / NOISE**2
    states = field("x", x, np.linspace(40, 44, 5), np.linspace(0, 9, 8), "m")
    source = field("w", w, np.linspace(39, 45, 4), np.linspace(-2, 11, 6), "m s-1")
    return states, source, (w @ gain.T @ basis).reshape(COUNT, 5, 8), basis.T @ left @ basis + 0.01 * np.eye(40)


@pytest.fixture(scope="module")
def fields() -> Any:
    return pair()


@pytest.fixture(scope="module")
def latent(fields: Any) -> LatentModel:
    past = fields[0].isel(time=slice(0, KNOWN))
    return xgenda.train(past, task="autoencoder", steps=2, width=8, latent=3, **QUIET)  # type: ignore[return-value]


def converted(fields: Any, latent: LatentModel, **options: Any) -> Any:
    states, source = fields[:2]
    given = {"steps": 4, "width": 8} | options
    past = slice(0, KNOWN)
    return xgenda.train(source.isel(time=past), target=states.isel(time=past), task="conversion", start=latent, **QUIET, **given)


@pytest.fixture(scope="module")
def model(fields: Any, latent: LatentModel) -> ConversionModel:
    found = converted(fields, latent)
    assert isinstance(found, ConversionModel)
    return found


def test_mean_is_the_regression_and_spread_is_what_it_leaves(fields: Any, model: ConversionModel) -> None:
    """Of three numbers the source knows two: the ensemble is as wide as what is unknown, most of which the encoder of x would deny."""
    states, source, expected, covariance = fields
    later = slice(KNOWN + 5, COUNT)
    ensemble = source.isel(time=later).genda.downscale(model=model, members=32, seed=0)
    assert dict(ensemble.sizes) == {"member": 32, "time": COUNT - KNOWN - 5, "latitude": 5, "longitude": 8}
    assert ensemble["x"].attrs["units"] == "m"
    truth = states["x"].isel(time=later)
    best = float(np.sqrt(((expected[later] - truth) ** 2).mean()))
    mean = source.isel(time=later).genda.downscale(model=model, stage="mean")
    assert float(np.sqrt(((mean["x"] - truth) ** 2).mean())) < 1.05 * best
    assert float(np.abs(ensemble["x"].mean("member") - mean["x"]).mean()) < 0.3 * best
    found = np.cov((ensemble["x"] - mean["x"]).transpose("latitude", "longitude", "member", "time").values.reshape(40, -1))
    np.testing.assert_allclose(np.sqrt(np.diag(found)), np.sqrt(np.diag(covariance)), rtol=0.25)
    assert np.trace(found) == pytest.approx(np.trace(covariance), rel=0.15)
    assert found.sum() == pytest.approx(covariance.sum(), rel=0.25)  # errors of different places belong together


def test_round_trip_keeps_every_bit(fields: Any, model: ConversionModel, tmp_path: Path) -> None:
    again = xgenda.load_model(model.save(tmp_path / "m.safetensors", card=True))
    assert again.spec.to_dict() == model.spec.to_dict()
    for name, tensor in model.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    source = fields[1].isel(time=slice(KNOWN, KNOWN + 2))
    one, two = (source.genda.downscale(model=m, members=2, seed=1)["x"] for m in (model, again))
    xr.testing.assert_equal(one, two)
    assert "downscale (conversion)" in (tmp_path / "m.md").read_text()


def test_gaps_of_the_source_are_taken_for_what_they_are(fields: Any, latent: LatentModel) -> None:
    """A third of the source missing at random, and one column always: less is known, the spread says so, and fill values stay refused."""
    states, source = fields[:2]
    rng = np.random.default_rng(1)
    holes = rng.random(source["w"].shape) < 0.33
    holes[:, :, 2] = True
    gappy = source.where(~holes)
    model = converted((states, gappy), latent, steps=40)
    assert model.gaps
    assert model.spec.options["encoder"]["masks"]
    later = slice(KNOWN + 5, COUNT)
    truth = states.isel(time=later)
    scores = gappy.isel(time=later).genda.downscale(model=model, members=24, seed=0).genda.verify(truth)["x"]
    assert 0.75 < float(scores.sel(metric="spread_skill")) < 1.25
    whole = float(np.sqrt(((fields[2][later] - truth["x"]) ** 2).mean()))  # with nothing missing
    assert whole < float(scores.sel(metric="rmse")) < 1.1 * whole
    with pytest.raises(StateError, match="fill value"):
        gappy.isel(time=[410]).fillna(-9999.0).genda.downscale(model=model, members=1)
    with pytest.raises(StateError, match=r"NaN everywhere at 2001-02-.* says nothing"):
        gappy.isel(time=slice(410, 412)).where(gappy.time < gappy.time[411]).genda.downscale(model=model, members=1, seed=0)
    with pytest.raises(StateError, match="holds NaN"):
        gappy.isel(time=[410]).genda.downscale(model=converted(fields, latent), members=1)


def test_land_of_the_states_is_theirs_alone(fields: Any) -> None:
    """States with land, and another part missing now and then; the source is whole, and on a grid of its own."""
    states, source = fields[:2]
    past = slice(0, 120)
    holes = np.random.default_rng(3).random(states["x"].shape) < 0.1
    holes[:, :2, :3] = True
    gappy = states.where(~holes)
    own: Any = xgenda.train(gappy.isel(time=past), task="autoencoder", steps=2, width=8, latent=3, **QUIET)
    found: Any = xgenda.train(
        source.isel(time=past), target=gappy.isel(time=past), task="conversion", start=own, steps=2, width=8, **QUIET
    )
    assert not found.gaps
    result = source.isel(time=slice(200, 260)).genda.downscale(model=found, members=2, seed=0, stage="mean")["x"]
    np.testing.assert_array_equal(
        result.isnull().any("time"), holes[0] & (np.indices((5, 8))[0] < 2) & (np.indices((5, 8))[1] < 3)
    )
    left = (result - states["x"].isel(time=slice(200, 260))).values
    best = np.where(np.isnan(left), np.nan, fields[2][200:260] - states["x"].values[200:260])
    assert np.nanmean(left**2) < 1.2 * np.nanmean(best**2)


def test_gaps_are_filled_from_around() -> None:
    """A field that is the same everywhere stays so whatever is missing, also beyond the odd edge of a grid; nothing seen is the climate."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(5, 2, 7, 13, generator=generator) > 0.8
    seen[0] = seen[1, 0] = False
    seen[1, 1] = True
    seen[2, 0] = False
    seen[2, 0, 6, 12] = True  # a single cell in a corner
    found = filled_from_around(torch.where(seen, 4.0, torch.nan), seen)
    torch.testing.assert_close(found[1:, 1], torch.full_like(found[1:, 1], 4.0))
    torch.testing.assert_close(found[2:], torch.full_like(found[2:], 4.0))
    assert not found[0].any()
    assert not found[1, 0].any()
    slope = torch.arange(13.0).expand(1, 1, 7, 13)
    some = torch.rand(1, 1, 7, 13, generator=generator) > 0.5
    assert (filled_from_around(torch.where(some, slope, torch.nan), some) - slope).abs().max() < 3.0
    torch.testing.assert_close(filled_from_around(slope, torch.ones_like(some)), slope)


def test_network_learns_what_no_linear_map_can() -> None:
    """The source holds the signs of the latent numbers apart from their sizes: a product, which regression cannot see."""
    rng = np.random.default_rng(2)
    z = rng.standard_normal((COUNT, 3))
    values = z @ rng.standard_normal((3, 40)) + 0.1 * rng.standard_normal((COUNT, 40))
    states = field("x", values, np.linspace(40, 44, 5), np.linspace(0, 9, 8), "m")
    known = np.concatenate([np.sign(z[:, :1]), np.abs(z[:, :1])], 1).repeat(12, 1)
    source = field("w", known, np.linspace(39, 45, 4), np.linspace(-2, 11, 6), "m")
    past = slice(0, KNOWN)
    own: Any = xgenda.train(states.isel(time=past), task="autoencoder", steps=2, width=8, latent=3, **QUIET)
    found = xgenda.train(
        source.isel(time=past), target=states.isel(time=past), task="conversion", start=own, steps=200, width=8, **QUIET
    )
    record = found.spec.training
    assert record["correction_weight"] == 1.0
    assert record["validation_best"] < record["validation_without"] - 0.1
    later = slice(KNOWN + 5, COUNT)
    mean = source.isel(time=later).genda.downscale(model=found, stage="mean")["x"]
    ridge = xgenda.train(source.isel(time=past), target=states.isel(time=past), task="downscale", method="ridge", progress=False)
    other = source.isel(time=later).genda.downscale(model=ridge, stage="mean")["x"]
    truth = states["x"].isel(time=later)
    assert float(((mean - truth) ** 2).mean()) < 0.97 * float(((other - truth) ** 2).mean())


def test_states_are_reconstructed_by_their_own_encoder(fields: Any, latent: LatentModel) -> None:
    states = fields[0].isel(time=slice(KNOWN, KNOWN + 4))
    found = states.genda.downscale(model=reconstructing(latent), stage="mean", target=states)
    scaling = latent.scaling
    z = torch.as_tensor((states["x"].values[:, None] - scaling.mean[0]) / scaling.std)
    expected = latent.network.decode(latent.network.encode(z)[0]).numpy() * scaling.std + scaling.mean[0]
    np.testing.assert_allclose(found["x"].values, expected[:, 0], rtol=1e-5, atol=1e-5)
    assert float(np.abs(found["x"] - states["x"]).mean()) < 0.15  # the noise of the states is 0.1


def test_states_that_are_never_known_somewhere_are_told_of(fields: Any, latent: LatentModel) -> None:
    states, source = fields[:2]
    with pytest.warns(UserWarning, match="target says nothing at any time of 16 of the 40 values of a state") as caught:
        xgenda.train(
            source, target=states.where(states.latitude < 43), task="conversion", start=latent, steps=1, width=8, **QUIET
        )
    assert caught[0].filename == __file__
    hidden = states.assign(x=states.x.where(states.latitude < 43, states.x.where(states.time.dt.month == 1)))
    xgenda.train(source, target=hidden, task="conversion", start=latent, steps=1, width=8, **QUIET)  # known now and then
    with pytest.raises(OptionError, match="makes one kind of fields of another, and reconstructs none; compare with the truth"):
        plot_reconstruction(converted(fields, latent, steps=1), states)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": None}, OptionError, "leads to the latent space of the model start, and there is none"),
        ({"start": "t2m-north-america"}, OptionError, r"'t2m-north-america' is prior \(diffusion\); train one first"),
        ({"target": None}, OptionError, "needs target"),
        ({"target": "coarse"}, GridError, r"target is on the grid 3 x 4.*regrid\(start.template\(\)\)"),
        ({"target": "swapped"}, GridError, r"regrid\(start.template\(\)\).*; or are ds and target exchanged\?"),
        ({"target": "other units"}, StateError, r"target\['x'\] has mean 27\d.*Other units\? Set the true ones: target\['x'\]"),
        ({"target": "few"}, StateError, "Of 60 states of target 10 have a field of ds at their time; at least 20 are needed"),
        ({"target": "later"}, OptionError, "ds has none of the times of target"),
        ({"memory": "10kB"}, OptionError, r"conversions are trained on fields in memory: memory='\d+MB'"),
        ({"latent": 8}, OptionError, "latent=8 has no effect with task='conversion'"),
        ({"anchor": None}, OptionError, "anchor=None has no effect with task='conversion'"),
        ({"weights": "area"}, OptionError, "weights='area' has no effect with task='conversion'"),
        ({"adapters": 2}, OptionError, "adapters=2 has no effect with task='conversion'"),
        ({"architecture": "mesh"}, OptionError, "architecture='mesh' has no effect with task='conversion'"),
    ],
)  # fmt: skip
def test_bad_training_is_refused(options: dict[str, Any], error: Any, message: str, fields: Any, latent: LatentModel) -> None:
    states, source = fields[:2]
    if options.get("target") == "coarse":
        options = {"target": states.isel(latitude=slice(0, 3), longitude=slice(0, 4))}
    elif options.get("target") == "later":
        options = {"target": states.assign_coords(time=states.time + np.timedelta64(4000, "D"))}
    elif options.get("target") == "swapped":
        options, source = {"target": source.rename(w="x").assign(x=source.w.assign_attrs(units="m"))}, states
    elif options.get("target") == "other units":
        options = {"target": states.assign(x=(states.x + 273.15).assign_attrs(units="m"))}
    elif options.get("target") == "few":
        options, source = {"target": states.isel(time=slice(0, 60))}, source.isel(time=slice(50, 110))
    given = {"target": states, "start": latent, "steps": 1, "progress": False} | options
    with pytest.raises(error, match=message):
        xgenda.train(source, task="conversion", **given)


def test_bad_use_is_refused(fields: Any, model: ConversionModel, latent: LatentModel) -> None:
    source = fields[1].isel(time=[0])
    for options, message in (
        ({"steps": 4}, "steps=4 has no effect"),
        ({"tile": 4}, "sees the whole grid"),
        ({"stage": "half"}, "stage"),
    ):
        with pytest.raises(OptionError, match=message):
            source.genda.downscale(model=model, members=1, **options)
    assert model.route is not None
    with pytest.raises(OptionError, match="has length 3"):
        ConversionModel(model.spec, latent, type(model.route)(model.route.mean, model.route.encoder, torch.eye(4)))
    spec = ModelSpec.from_dict(model.spec.to_dict() | {"inputs": None}, model.spec.scaling)
    with pytest.raises(CheckpointError, match="needs inputs"):
        ConversionModel.from_tensors(spec, model.tensors())


def test_training_resumes_to_the_bit(fields: Any, latent: LatentModel, tmp_path: Path) -> None:
    whole = converted(fields, latent, steps=45)

    def stop(report: xgenda.Progress) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(fields, latent, steps=45, out=tmp_path / "m.safetensors", callbacks=[stop])
    with pytest.raises(OutputExistsError, match="holds a training that was interrupted"):
        converted(fields, latent, steps=45, out=tmp_path / "m.safetensors")
    resumed = converted(fields, latent, steps=45, out=tmp_path / "m.safetensors", resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_latent_vectors_that_were_standardised_again(fields: Any, latent: LatentModel) -> None:
    """Another affine map of the codes is another name for the same vectors: neither what is learned of them nor the ensemble changes."""
    other = copy.deepcopy(latent)
    spread = torch.linalg.cholesky(torch.tensor([[0.04, 0.02, 0.0], [0.02, 0.05, 0.01], [0.0, 0.01, 0.03]], dtype=torch.float64))
    centre = torch.tensor([0.02, -0.01, 0.01], dtype=torch.float64)
    other.network.restandardise(centre, spread)
    states = torch.randn(6, 1, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (mean, variance, covariance), (moved, turned, mixed) = (_latent(model, states) for model in (latent, other))
    own = torch.linalg.inv(spread)
    torch.testing.assert_close(moved @ spread.T + centre, mean)
    for before, after in zip(variance, turned, strict=True):
        torch.testing.assert_close((own @ before.diag() @ own.T).diagonal(), after)
    torch.testing.assert_close(spread @ mixed @ spread.T, covariance)
    found = fields[0].isel(time=[KNOWN]).genda.downscale(model=reconstructing(other), members=400, seed=0)["x"]
    expected = fields[0].isel(time=[KNOWN]).genda.downscale(model=reconstructing(latent), members=400, seed=1)["x"]
    np.testing.assert_allclose(found.std("member"), expected.std("member"), rtol=0.2)
    source = fields[1].isel(time=slice(KNOWN, KNOWN + 20))
    spreads = [
        float(source.genda.downscale(model=converted(fields, m), members=50, seed=0)["x"].std("member").mean())
        for m in (latent, other)
    ]
    assert spreads[1] == pytest.approx(spreads[0], rel=0.05)


def test_states_of_another_climate_are_met(fields: Any, latent: LatentModel) -> None:
    """Targets of times that are all warmer than those of the autoencoder: what is the same at all of them needs no source to tell it."""
    states, source = fields[:2]
    assert latent.network.basis is not None
    warmer = states + 3.0 * float(latent.scaling.std.mean()) * latent.network.basis[0].numpy().reshape(5, 8)
    warmer["x"].attrs = states["x"].attrs
    past = slice(0, KNOWN)
    errors = []
    for truth in (states, warmer):
        found = source.isel(time=past).genda.downscale(model=converted((truth, source), latent), stage="mean")["x"]
        errors.append(found - truth["x"].isel(time=past))
    assert float(np.abs(errors[1].mean("time")).max()) < 0.05 * float(errors[0].std())
    assert float(errors[1].std()) == pytest.approx(float(errors[0].std()), rel=0.02)


def test_what_the_source_never_had_is_not_looked_at(fields: Any, latent: LatentModel, tmp_path: Path) -> None:
    """Land of the source that a later file has filled by some number or other."""
    states, source = fields[:2]
    sea = source["latitude"] < 43
    model = converted((states, source.where(sea)), latent)
    later = source.isel(time=slice(KNOWN, KNOWN + 3))
    whole = later.where(sea).genda.downscale(model=model, members=2, seed=0)
    again = xgenda.load_model(model.save(tmp_path / "m.safetensors"))
    for filled in (later, later.where(sea, 5.0)):
        xr.testing.assert_equal(filled.genda.downscale(model=again, members=2, seed=0)["x"], whole["x"])
    with pytest.raises(StateError, match="NaN everywhere"):
        later.where(~sea).genda.downscale(model=model, members=1, seed=0)

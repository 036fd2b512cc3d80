"""Training: it learns, it records what it did, it never ends below its classical start, and its files are whole."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.covariances import SphereKernel
from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import OptionError, StateError
from xgenda.models.corrective import CorrectiveModel
from xgenda.training import loop, optimiser
from xgenda.training.loop import parse_time_budget
from xgenda.training.objectives import Denoising, Draws
from xgenda.training.windows import blocks


def bimodal(count: int = 160, shape: tuple[int, int] = (8, 8)) -> xr.Dataset:
    """Fields that a Gaussian cannot describe: a smooth pattern of amplitude +1 or -1 with a little noise."""
    rng = np.random.default_rng(0)
    pattern = np.outer(np.sin(np.linspace(0.5, 2.5, shape[0])), np.cos(np.linspace(-1, 1, shape[1])))
    sign = rng.choice([-1.0, 1.0], count)
    values = sign[:, None, None] * pattern + 0.1 * rng.standard_normal((count, *shape))
    coords = {"latitude": np.linspace(0, 35, shape[0]), "longitude": np.linspace(0, 35, shape[1])}
    return xr.Dataset({"x": (("member", "latitude", "longitude"), values)}, coords=coords)


def smooth(count: int = 80, shape: tuple[int, int] = (12, 16)) -> xr.Dataset:
    """Short-range fields: the EOFs of few samples leave a residual that they call uncorrelated, and it is not."""
    latitude, longitude = np.linspace(30, 60, shape[0]), np.linspace(0, 60, shape[1])
    kernel = SphereKernel(torch.as_tensor(latitude), torch.as_tensor(longitude), "matern32", 400e3, 90)
    fields = kernel.draw(NoiseStream([(0, "s", k) for k in range(count)]))[:, 0].reshape(count, *shape).numpy()
    return xr.Dataset({"x": (("member", "latitude", "longitude"), fields)}, coords={"latitude": latitude, "longitude": longitude})


@pytest.fixture(scope="module")
def trained() -> xgenda.GenerativeModel:
    return xgenda.train(smooth(), anchor="eof", steps=150, width=8, learning_rate=4e-3, seed=0, progress=False)


def test_training_learns_what_the_anchor_leaves(trained: xgenda.GenerativeModel) -> None:
    record = trained.spec.training
    assert record["best_step"] > 0
    assert record["validation_best"] < 0.985 * record["validation_start"]


@pytest.mark.slow
def test_training_learns_two_regimes() -> None:
    """Which of the two regimes a state is in is Gaussian information; what follows from it is not, and needs the state."""
    ds = bimodal(480, (6, 6))  # in small batches the noise of the gradient hides it
    record = xgenda.train(
        ds, anchor="eof", steps=300, width=8, batch_size=64, learning_rate=4e-3, seed=1, progress=False
    ).spec.training
    assert record["validation_best"] < 0.97 * record["validation_start"]
    assert record["correction_weight"] > 0.5


def test_a_correction_of_gaussian_fields_earns_nothing() -> None:
    """The right Gaussian leaves noise: the correction gets the weight that it deserves, and the card says what it is worth."""
    record = xgenda.train(smooth(), anchor="localized", steps=40, width=8, learning_rate=1e-2, progress=False).spec.training
    assert record["validation_best"] <= record["validation_start"]
    assert record["validation_best"] > 0.97 * record["validation_start"]
    assert ("weight is zero" in record["card"]) == (record["correction_weight"] == 0)


def test_training_is_reproducible() -> None:
    a, b = (xgenda.train(bimodal(40), steps=5, width=8, seed=3, progress=False) for _ in range(2))
    assert a.sha256 == b.sha256
    assert xgenda.train(bimodal(40), steps=5, width=8, seed=4, progress=False).sha256 != a.sha256


def test_kept_weights_are_never_worse_than_the_start() -> None:
    model = xgenda.train(bimodal(40), steps=3, width=8, learning_rate=5.0, progress=False)  # far too large: every step does harm
    record = model.spec.training
    assert record["validation_best"] <= record["validation_start"]


def test_round_trip_keeps_every_bit(trained: xgenda.GenerativeModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    again = xgenda.load_model(trained.save(tmp_path / "m.safetensors"))
    assert again.spec.to_dict() == trained.spec.to_dict()
    for name, tensor in trained.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]  # nothing left beside it


def test_file_says_what_it_is(climate: xr.Dataset, tiny_prior: xgenda.GenerativeModel) -> None:
    spec = tiny_prior.spec
    assert [v.name for v in spec.variables] == ["air_temperature"]
    assert spec.variables[0].units == "K"
    assert spec.grid is not None
    assert spec.grid.shape == (8, 12)
    assert spec.training["period"] == "1860-06-01 to 1889-06-01"
    assert spec.licence
    text = repr(tiny_prior)
    assert "air_temperature [K]" in text
    assert "8 x 12" in text
    assert "<table>" in tiny_prior._repr_html_()
    with xr.set_options(display_style="text"):
        assert tiny_prior._repr_html_().startswith("<pre>")


def test_start_goes_on_from_a_model(trained: xgenda.GenerativeModel) -> None:
    more = xgenda.train(smooth(), start=trained, steps=1, learning_rate=1e-12, progress=False)
    assert more.spec.training["started_from"].startswith(trained.spec.name)
    assert more.spec.scaling is not None
    assert trained.spec.scaling is not None
    np.testing.assert_array_equal(more.spec.scaling.mean, trained.spec.scaling.mean)
    np.testing.assert_array_equal(more.spec.scaling.std, trained.spec.scaling.std)
    x = torch.randn(1, 1, 12, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(more.denoiser(x, 0.5), trained.denoiser(x, 0.5), atol=1e-4, rtol=1e-4)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_regression_stage_learns_and_conserves() -> None:
    """Fine structure that depends on the sign of the coarse field: beyond any linear map."""
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((200, 2, 2))
    detail = np.tile([[1.0, -1.0], [-1.0, 1.0]], (4, 4))
    fine = np.repeat(np.repeat(coarse, 4, 1), 4, 2)
    values = fine + np.abs(fine) * detail + 0.05 * rng.standard_normal((200, 8, 8))
    ds = xr.Dataset(
        {"x": (("member", "latitude", "longitude"), values)},
        coords={"latitude": np.linspace(0, 35, 8), "longitude": np.linspace(0, 35, 8)},
    )
    model = xgenda.train(ds, task="downscale", factor=4, steps=250, width=8, learning_rate=5e-3, progress=False)
    assert isinstance(model, CorrectiveModel)
    record = model.spec.training
    assert record["mean_validation_best"] < 0.6 * record["mean_validation_start"]
    means = ds.coarsen(latitude=4, longitude=4).mean().isel(member=[0, 7]).rename(member="time")
    means = means.assign_coords(time=np.array(["2000-01-01", "2000-01-02"], dtype="datetime64[ns]"))
    mean = means.genda.downscale(model=model, stage="mean")
    back = mean.coarsen(latitude=4, longitude=4).mean()
    np.testing.assert_allclose(back.x.values, means.x.values, atol=1e-6)


def test_blocks_are_consecutive_and_share_times() -> None:
    years = xr.DataArray(np.array([5, 1, 3, 2, 4, 6, 6, 1], dtype="datetime64[Y]"), dims="time")
    fold = blocks(years, 8, 4)
    assert fold.tolist() == [2, 0, 1, 1, 2, 3, 3, 0]


def test_denoising_target_is_the_preconditioned_one() -> None:
    """The loss of a perfect network is zero: D with F = target gives back the clean state."""
    states = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    objective = Denoising(states, torch.zeros(6, dtype=torch.long), None, 0.1, 10.0)
    batch = objective.batch(torch.arange(6), states, Draws(0, 1, 6))
    sigma = torch.exp(4 * batch.label)[:, None, None, None]
    noisy = batch.x * (sigma**2 + 1).sqrt()
    rebuilt = noisy / (sigma**2 + 1) + sigma / (sigma**2 + 1).sqrt() * batch.target
    torch.testing.assert_close(rebuilt, states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("10min", 600.0), ("1.5 h", 5400.0), (30, 30.0)])
def test_time_budget(text: str | float, seconds: float) -> None:
    assert parse_time_budget(text) == seconds


def test_time_budget_ends_the_training() -> None:
    model = xgenda.train(bimodal(40), time_budget=1.0, width=8, progress=False)
    assert 1 <= model.spec.training["steps"] < 10_000


def test_saving_twice_gives_the_same_bytes(trained: xgenda.GenerativeModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    files = [trained.save(tmp_path / f"{k}.safetensors") for k in range(4)]
    assert len({f.read_bytes() for f in files}) == 1
    plain = tmp_path / "plain"
    plain.touch()
    assert files[0].stat().st_mode == plain.stat().st_mode  # others may read it where the umask says so


@pytest.mark.slow
def test_a_time_budget_keeps_the_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch longer than the budget still ends with a validation; the clock is one that ticks once per look."""
    looks = itertools.count()
    for module in (optimiser, loop):
        monkeypatch.setattr(module, "clock", SimpleNamespace(monotonic=lambda: 0.01 * next(looks)))
    record = xgenda.train(bimodal(800), anchor="eof", time_budget="4s", batch_size=2, width=8, progress=False).spec.training
    assert 50 < record["steps"] < 330
    assert record["best_step"] > 0


def test_training_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    xgenda.train(bimodal(40), steps=1, width=8, progress=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("columns", [16, 18, 21])
def test_periodic_grids_of_any_width_are_periodic(columns: int) -> None:
    rng = np.random.default_rng(0)
    coords = {"latitude": np.linspace(-35, 35, 8), "longitude": np.arange(columns) * 360 / columns}
    values = rng.normal(size=(40, 8, columns))
    model = xgenda.train(
        xr.Dataset({"x": (("member", "latitude", "longitude"), values)}, coords=coords),
        steps=2,
        width=8,
        anchor=None,
        progress=False,
    )
    network = model.denoiser.network
    network.position = None  # what is left must not know where it is
    network.first.conv.weight.data = network.first.conv.weight.data[:, :1]
    torch.manual_seed(0)
    torch.nn.init.normal_(network.last.conv.weight)
    x = torch.randn(1, 1, 8, columns)
    with torch.no_grad():
        moved = network(x.roll(network.stride, -1), torch.zeros(1))
        torch.testing.assert_close(moved, network(x, torch.zeros(1)).roll(network.stride, -1), atol=1e-4, rtol=1e-4)


def daily(hours: int) -> xr.Dataset:
    ds = bimodal(60).rename(member="time")
    return ds.assign_coords(time=np.datetime64("2000-01-01", "ns") + np.arange(60) * np.timedelta64(hours, "h"))


def test_a_trajectory_model_goes_on_with_its_own_spacing_only() -> None:
    model = xgenda.train(daily(24), steps=1, width=8, window=3, anchor="eof", progress=False)
    assert xgenda.train(daily(24), start=model, steps=1, progress=False).window == 3
    with pytest.raises(StateError, match="is of states 1 day apart, and those of ds are 1 hour apart"):
        xgenda.train(daily(1), start=model, steps=1, progress=False)
    for argument, value in {"width": 16, "anchor": None}.items():
        with pytest.raises(OptionError, match=f"{argument}=.* with start.* Leave it out"):
            xgenda.train(daily(24), start=model, steps=1, progress=False, **{argument: value})


def test_a_logarithmic_variable_is_checked_and_returned_in_its_own_units() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 8, 8)).cumsum(1).cumsum(2) / 12
    ds = xr.Dataset(
        {"rain": (("time", "latitude", "longitude"), np.exp(z - 1), {"units": "mm"})},
        coords={"time": np.datetime64("2000-01-01", "ns") + np.arange(60) * np.timedelta64(1, "D"),
                "latitude": np.linspace(0, 7, 8), "longitude": np.linspace(0, 7, 8)},
    )  # fmt: skip
    model = xgenda.train(ds, transform={"rain": "log"}, steps=1, width=8, anchor="eof", progress=False)
    assert model.spec.scaling is not None
    assert model.spec.scaling.transforms == ("log",)
    value = float(np.exp(z[3, 4, 4] - 1))
    obs = xr.Dataset(
        {"rain": ("obs", [value], {"units": "mm"})},
        coords={"latitude": ("obs", [4.0]), "longitude": ("obs", [4.0]), "time": ("obs", ds.time.values[[3]])},
    )
    departures = xgenda.innovations(ds.isel(time=[3]), obs, model=model, error=0.05, background_check=4.0)
    assert departures.quality_code.item() == 0
    gross = xgenda.innovations(ds.isel(time=[3]), obs + 400.0, model=model, error=0.05, background_check=4.0)
    assert gross.quality_code.item() == 6
    result = xgenda.assimilate(ds.isel(time=[3]), obs, model=model, error=0.02 * value, members=8, seed=0, progress=False)
    assert float(result.rain.min()) > -1e-3
    assert float(result.rain.isel(latitude=4, longitude=4).mean()) == pytest.approx(value, rel=0.05)
    down = xgenda.train(ds, task="downscale", factor=4, transform="log", steps=1, width=8, anchor="eof", progress=False)
    coarse = ds.isel(time=[3, 9]).coarsen(latitude=4, longitude=4).mean()
    fine = coarse.genda.downscale(model=down, members=4, seed=0, steps=6)
    assert float(fine.rain.min()) >= 0.0
    assert float(fine.rain.std()) > 0.0
    np.testing.assert_allclose(
        fine.rain.coarsen(latitude=4, longitude=4).mean().values, np.broadcast_to(coarse.rain, (4, *coarse.rain.shape)), rtol=1e-5
    )

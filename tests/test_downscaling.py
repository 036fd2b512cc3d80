"""`downscale` from anything to anything: conditions, other grids, conservation, tiles and chunks, calibration, classical methods, priors."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import xgenda
from xgenda.errors import CoordinateError, GridError, OptionError, StateError
from xgenda.grids import Grid
from xgenda.models.blocks import Blocks, find_blocks
from xgenda.models.calibration import Calibration, bands, fit_calibration
from xgenda.models.classical import mapped_quantiles
from xgenda.models.conditions import lead_times, neighbours, spacing_of_times
from xgenda.models.corrdiff import read_corrdiff, read_corrdiff_output
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.physicsnemo import Preconditioned, Regression, read_mdlus, write_mdlus
from xgenda.networks.songunet import SongUNet
from xgenda.training.downscalers import _card

FAST: dict[str, Any] = {"steps": 3, "width": 8, "progress": False, "anchor": None}


def smooth(rng: np.random.Generator, n: int, ny: int, nx: int) -> np.ndarray:
    """Return smooth random fields, shape (n, ny, nx)."""
    y, x = np.meshgrid(np.linspace(0, 1, ny), np.linspace(0, 1, nx), indexing="ij")
    waves = np.stack([np.cos(np.pi * (j * y + k * x)) for j, k in itertools.product(range(3), range(3))])
    return np.tensordot(rng.normal(size=(n, len(waves))), waves, 1)


def series(n: int = 40, ny: int = 16, nx: int = 24, hours: int = 6) -> xr.Dataset:
    """Return fine temperature, every six hours, with small structure that depends on the large one."""
    rng = np.random.default_rng(1)
    large = smooth(rng, n, ny, nx)
    small = np.sin(np.arange(nx))[None, None] * np.cos(np.arange(ny))[None, :, None]
    values = 280 + 3 * large + 0.5 * large * small + 0.2 * rng.normal(size=large.shape)
    return xr.Dataset(
        {"t2m": (("time", "latitude", "longitude"), values, {"units": "K", "standard_name": "air_temperature"})},
        coords={
            "time": np.datetime64("2020-01-01", "ns") + np.arange(n) * np.timedelta64(hours, "h"),
            "latitude": np.linspace(40.0, 43.75, ny), "longitude": np.linspace(5.0, 10.75, nx),
        },
    )  # fmt: skip


def coarse_of(fine: xr.Dataset, factor: int = 4) -> xr.Dataset:
    out: xr.Dataset = fine.coarsen(latitude=factor, longitude=factor).mean()
    return out


@pytest.fixture(scope="module")
def fine() -> xr.Dataset:
    return series()


@pytest.fixture(scope="module")
def paired(fine: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """Coarse temperature and humidity; fine temperature in other units on a curvilinear grid, and rain that the coarse fields lack."""
    rng = np.random.default_rng(2)
    coarse = coarse_of(fine)
    coarse["q"] = coarse.t2m * 0.1 + 0.05 * rng.normal(size=coarse.t2m.shape)
    coarse["q"].attrs = {"units": "g kg-1"}
    angle = np.radians(20.0)
    y, x = np.meshgrid(np.linspace(-0.8, 0.8, 12), np.linspace(-1.2, 1.2, 16), indexing="ij")
    latitude, longitude = 41.8 + np.cos(angle) * y - np.sin(angle) * x, 7.8 + np.sin(angle) * y + np.cos(angle) * x
    grid = xr.Dataset(coords={"lat": (("j", "i"), latitude), "lon": (("j", "i"), longitude)})
    for name, standard in (("lat", "latitude"), ("lon", "longitude")):
        grid[name].attrs["standard_name"] = standard
    target = fine.genda.regrid(grid)
    target["t2m"] = (target.t2m - 273.15).assign_attrs(units="degC", standard_name="air_temperature")
    rain = np.maximum(target.t2m - 7.0, 0.0) * np.exp(rng.normal(size=target.t2m.shape))
    target["rain"] = rain.assign_attrs(units="mm h-1", standard_name="rainfall_rate")
    return coarse, target


@pytest.fixture(scope="module")
def pair_model(paired: tuple[xr.Dataset, xr.Dataset], tmp_path_factory: pytest.TempPathFactory) -> xgenda.GenerativeModel:
    coarse, target = paired
    orography = xr.Dataset({"orog": (("j", "i"), np.arange(192.0).reshape(12, 16))}, coords=target[["lat", "lon"]].coords)
    path = tmp_path_factory.mktemp("models") / "pairs.safetensors"
    xgenda.train(
        coarse, target=target, task="downscale", statics=orography, neighbours=(-1, 0, 1), transform={"rain": "log"}, offset={"rain": 0.01},
        bounds={"rain": (0, 400)}, out=path, **FAST,
    )  # fmt: skip
    return xgenda.load_model(path)


# -- pairs, conditions, other grids ---------------------------------------------------------------------------------------------


def test_new_variables_on_a_curvilinear_grid_from_neighbouring_times(
    pair_model: xgenda.GenerativeModel, paired: tuple[xr.Dataset, xr.Dataset]
) -> None:
    coarse, target = paired
    with pytest.warns(UserWarning, match="2 of 5 times have no neighbours in ds"):
        found = coarse.isel(time=slice(0, 5)).genda.downscale(model=pair_model, members=2, seed=0, steps=3)
    assert found.t2m.dims == found.rain.dims == ("member", "time", "j", "i")
    assert (found.time.values == coarse.time.values[1:4]).all()
    np.testing.assert_allclose(found.lat, target.lat)
    assert found.t2m.attrs["units"] == "K"  # those of ds
    assert found.rain.attrs == {"units": "mm h-1", "standard_name": "rainfall_rate"}  # those of the training
    assert float(found.rain.min()) >= 0.0
    assert float(found.rain.max()) <= 400.0
    assert abs(float(found.t2m.mean()) - 280) < 5
    inputs = pair_model.spec.inputs
    assert inputs is not None
    assert (inputs.offsets, inputs.spacing, inputs.cycle, inputs.statics) == ((0, -1, 1), 21600.0, "hour", ("orog",))
    assert "orog; hour of the day" in repr(pair_model)


@pytest.mark.filterwarnings("ignore:.*have no neighbours in ds")
def test_neighbouring_times_are_those_at_these_times_wherever_they_stand(
    pair_model: xgenda.GenerativeModel, paired: tuple[xr.Dataset, xr.Dataset]
) -> None:
    coarse = paired[0].isel(time=slice(2, 9))
    expected = coarse.genda.downscale(model=pair_model, members=1, seed=0, steps=4)
    shuffled = coarse.isel(time=[3, 0, 6, 2, 1, 5, 4]).genda.downscale(model=pair_model, members=1, seed=0, steps=4)
    lazy = coarse.chunk(time=2).genda.downscale(model=pair_model, members=1, seed=0, steps=4)
    xr.testing.assert_allclose(shuffled.sortby("time").t2m, expected.t2m, rtol=1e-5)
    assert lazy.t2m.chunks is not None
    xr.testing.assert_allclose(lazy.t2m.compute(), expected.t2m, rtol=1e-5)
    with pytest.raises(CoordinateError, match=r"takes the times \+0 h, -6 h, \+6 h around each, and no time of ds has all"):
        coarse.isel(time=[0, 3, 6]).genda.downscale(model=pair_model, members=1)


@pytest.mark.filterwarnings("ignore:.*have no neighbours in ds")
def test_the_network_sees_its_neighbours(pair_model: xgenda.GenerativeModel, paired: tuple[xr.Dataset, xr.Dataset]) -> None:
    coarse = paired[0].isel(time=slice(0, 3))
    before = coarse.genda.downscale(model=pair_model, stage="mean")
    changed = coarse.copy(deep=True)
    changed["t2m"][0] += 1.0
    after = changed.genda.downscale(model=pair_model, stage="mean")
    assert float(abs(after.t2m - before.t2m).max()) > 1e-3


@pytest.mark.filterwarnings("ignore:.*have no neighbours in ds")
def test_templates_say_what_a_model_takes(pair_model: xgenda.GenerativeModel, paired: tuple[xr.Dataset, xr.Dataset]) -> None:
    coarse, target = paired
    inputs, out = pair_model.template(inputs=True), pair_model.template()
    assert list(inputs.data_vars) == ["t2m", "q"]
    assert dict(inputs.sizes) == {"latitude": 4, "longitude": 6}
    np.testing.assert_allclose(out.lat, target.lat)
    again = xgenda.regrid(coarse, inputs, method="nearest").isel(time=slice(0, 3))
    assert again.genda.downscale(model=pair_model, members=1, steps=4).sizes["time"] == 1


def test_lead_times_are_inputs(fine: xr.Dataset) -> None:
    lead = ("time", np.tile([0, 6, 12, 18], 10), {"standard_name": "forecast_period", "units": "h"})
    coarse = coarse_of(fine).assign_coords(step=lead)
    model = xgenda.train(coarse, target=fine, task="downscale", lead_time=True, time_features="none", **FAST | {"steps": 40})
    assert model.spec.inputs is not None
    assert model.spec.inputs.lead_time == 18 * 3600.0
    assert isinstance(model, CorrectiveModel)
    torch.nn.init.normal_(model.denoiser.network.last.conv.weight, std=0.01)  # type: ignore[union-attr]
    few = coarse.isel(time=[3])
    one = few.genda.downscale(model=model, members=1, seed=0, steps=3)
    other = few.assign_coords(step=("time", [0], lead[2])).genda.downscale(model=model, members=1, seed=0, steps=3)
    assert float(abs(one.t2m - other.t2m).max()) > 0
    with pytest.raises(CoordinateError, match="ds has no lead time for each time, which the model takes: assign one"):
        few.drop_vars("step").genda.downscale(model=model, members=1)
    assert lead_times(few.assign_coords(step=("time", np.array([6], dtype="timedelta64[h]"))), "time", 1).tolist() == [21600.0]


@pytest.mark.parametrize("stages", ["residual", "single"])
def test_one_stage(fine: xr.Dataset, stages: str) -> None:
    model = xgenda.train(fine, task="downscale", factor=4, stages=stages, mean_condition=stages == "residual", **FAST)
    assert isinstance(model, CorrectiveModel)
    assert model.regression is None
    assert model.mean.is_zero == (stages == "single")
    said = {
        "residual": "mean: linear, without a network; residual: ",
        "single": "mean: none, as stages='single' asks; residual: ",
    }
    assert model.spec.training["card"].startswith(said[stages])
    coarse = coarse_of(fine).isel(time=[0, 5])
    found = coarse.genda.downscale(model=model, members=2, seed=0, steps=3)
    np.testing.assert_allclose(coarse_of(found).t2m, np.broadcast_to(coarse.t2m, (2, *coarse.t2m.shape)), atol=1e-4)


def test_the_card_of_a_downscaler_says_what_both_networks_are_worth() -> None:
    report = {"validation_best": 0.9, "validation_without": 1.2, "correction_weight": 0.987}
    nothing = {"validation_best": 1.2, "validation_without": 1.2, "correction_weight": 0.0}
    recipe = SimpleNamespace(stages="both")
    worth = "validation loss 0.750 of {}, with the correction at weight 0.99"
    zero = "the learned correction explained nothing on the validation block: its weight is zero, and this is "
    mean, residual = _card(recipe, report, report, True, False).split("; ")  # type: ignore[arg-type]
    assert mean == "mean: " + worth.format("the linear mean's")
    assert residual == "residual: " + worth.format("that of a Gaussian")
    mean, residual = _card(recipe, None, nothing, False, False).split("; ")  # type: ignore[arg-type]
    assert mean == f"mean: {zero}the linear mean"
    assert residual == f"residual: {zero}independent errors in all cells"


def test_the_song_unet_is_a_choice_and_goes_to_mdlus_and_back(fine: xr.Dataset, tmp_path: Path) -> None:
    model = xgenda.train(fine, task="downscale", factor=4, architecture="songunet", out=tmp_path / "a.safetensors", **FAST)
    again = xgenda.load_model(tmp_path / "a.safetensors")
    assert isinstance(again, CorrectiveModel)
    assert isinstance(again.denoiser.network, SongUNet)
    coarse = coarse_of(fine).isel(time=[0])
    a, b = (coarse.genda.downscale(model=m, members=1, seed=0, steps=3) for m in (model, again))
    xr.testing.assert_allclose(a.t2m, b.t2m, rtol=1e-5)


# -- block means ----------------------------------------------------------------------------------------------------------------


def test_members_keep_block_means_of_pairs_with_either_weights(fine: xr.Dataset) -> None:
    area = np.cos(np.radians(fine.latitude))
    weighted = (fine * area).coarsen(latitude=4, longitude=4).mean() / area.coarsen(latitude=4).mean().values[:, None]
    weighted.t2m.attrs = fine.t2m.attrs
    for coarse, weights in ((coarse_of(fine), "cells"), (weighted, "areas")):
        model = xgenda.train(coarse, target=fine, task="downscale", **FAST)
        conserve = model.spec.options["conserve"]
        assert conserve["weights"] == ("cells" if weights == "cells" else conserve["weights"])
        found = coarse.isel(time=[3]).genda.downscale(model=model, members=3, seed=0, steps=3)
        w = np.ones(16) if conserve["weights"] == "cells" else area.values
        blocks = (found.t2m.values * w[:, None]).reshape(3, 1, 4, 4, 6, 4).sum((3, 5)) / (4 * w.reshape(4, 4).sum(1)[:, None])
        np.testing.assert_allclose(blocks, np.broadcast_to(coarse.t2m.isel(time=[3]), blocks.shape), atol=2e-3)


def test_nothing_is_kept_where_the_coarse_fields_are_others(fine: xr.Dataset) -> None:
    coarse = coarse_of(fine) + 1.0
    model = xgenda.train(coarse.assign_attrs(fine.attrs), target=fine, task="downscale", **FAST)
    assert model.spec.options["conserve"] is None
    with pytest.raises(OptionError, match="conserve=True needs coarse fields that are the block means of the fine ones"):
        xgenda.train(coarse, target=fine, task="downscale", conserve=True, **FAST)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    factor=st.sampled_from([2, 3, 4]),
    weights=st.sampled_from(["cells", "areas"]),
    low=st.floats(-2, 2),
)
def test_blocks_are_given_their_means_and_nothing_else_changes_much(seed: int, factor: int, weights: str, low: float) -> None:
    rng = np.random.default_rng(seed)
    grid = Grid(np.linspace(30, 60, 12), np.linspace(0, 30, 24))
    blocks = Blocks(grid, factor, weights)
    fields, means = (
        torch.as_tensor(rng.normal(size=(2, 12, 24))),
        torch.as_tensor(low + rng.exponential(size=(2, 12 // factor, 24 // factor))),
    )
    added = blocks.added(fields, means)
    assert torch.allclose(blocks.mean(added), means)
    difference = (added - fields).reshape(2, 12 // factor, factor, 24 // factor, factor)
    assert float(difference.std((2, 4)).max()) < 1e-12
    above = fields.clamp(min=low)
    scaled = blocks.scaled(above, means, low)
    assert torch.allclose(blocks.mean(scaled), means)
    assert float(scaled.min()) >= low - 1e-12
    assert bool((scaled[above == low] <= scaled.max()).all())
    assert torch.allclose(blocks.matrix() @ fields[0].reshape(-1), blocks.mean(fields[0]).reshape(-1))
    dry = torch.full((1, 12, 24), low, dtype=torch.float64)  # nothing to scale: the mean itself
    assert torch.allclose(blocks.scaled(dry, means[:1], low), blocks._spread(means[:1]))


def test_blocks_of_a_window_are_those_of_the_grid() -> None:
    grid = Grid(np.linspace(30, 60, 12), np.linspace(0, 30, 24))
    blocks, fields = Blocks(grid, 3, "areas"), torch.randn(12, 24, dtype=torch.float64)
    part = blocks.on((np.arange(3, 9), np.arange(6, 18)))
    assert torch.allclose(part.mean(fields[3:9, 6:18]), blocks.mean(fields)[1:3, 2:6])


def test_area_means_are_found_where_rows_differ_in_area() -> None:
    grid = Grid(np.linspace(-10, 80, 12), np.linspace(0, 30, 24))
    rng = np.random.default_rng(0)
    fields = rng.normal(size=(30, 1, 12, 24)) + 5 * np.linspace(0, 1, 12)[:, None]
    from xgenda.scaling import fit_scaling

    scaling = fit_scaling(fields, None, ["x"])
    for weights in ("cells", "areas"):
        means = Blocks(grid, 4, weights).mean(torch.as_tensor(fields)).numpy()
        assert find_blocks(means, fields, grid, 4, scaling) == weights
    assert find_blocks(means + 0.1, fields, grid, 4, scaling) is None


# -- tiles and chunks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled(fine: xr.Dataset) -> xgenda.GenerativeModel:
    return xgenda.train(fine, task="downscale", factor=4, tile=(8, 12), calibrate=False, **FAST | {"steps": 30})


def test_tiles_are_those_of_the_training_and_others_where_asked(tiled: xgenda.GenerativeModel, fine: xr.Dataset) -> None:
    coarse = coarse_of(fine).isel(time=[0])
    own = coarse.genda.downscale(model=tiled, members=2, seed=0, steps=4)
    assert own.attrs["xgenda_tile"] == "(8, 12)"
    whole = coarse.genda.downscale(model=tiled, members=2, seed=0, steps=4, tile=None)
    other = coarse.genda.downscale(model=tiled, members=2, seed=0, steps=4, tile=8, overlap={"latitude": 4, "longitude": 4})
    for found in (own, other):
        difference = float((found.t2m - whole.t2m).std() / whole.t2m.std())
        assert 0 < difference < 0.1
        np.testing.assert_allclose(coarse_of(found).t2m, np.broadcast_to(coarse.t2m, (2, *coarse.t2m.shape)), atol=1e-4)
    for tile, problem in ((6, "multiples of 4"), ("small", "give a number of cells"), ((8, 8, 8), "give a number of cells")):
        with pytest.raises(OptionError, match=problem):
            coarse.genda.downscale(model=tiled, tile=tile)  # type: ignore[arg-type]


def test_chunks_of_the_result_have_the_noise_of_their_cells(fine: xr.Dataset, no_compute: None) -> None:
    """A network that does nothing but shrink: chunked and whole results are the same, so their noise and their means are."""
    model = xgenda.train(fine, task="downscale", factor=4, calibrate=False, **FAST)
    assert isinstance(model, CorrectiveModel)
    model.denoiser.network.scale_output(0.0)
    coarse = coarse_of(fine).isel(time=[0, 7])
    flipped = coarse.isel(latitude=slice(None, None, -1))
    for given_ in (coarse, flipped):
        whole = given_.genda.downscale(model=model, members=2, seed=0, steps=4)
        parts = given_.genda.downscale(model=model, members=2, seed=0, steps=4, chunks={"latitude": 8, "longitude": 12})
        assert parts.t2m.chunks == ((2,), (1, 1), (8, 8), (12, 12))
        import dask

        with dask.config.set(scheduler="sync"):
            np.testing.assert_allclose(parts.t2m.values, whole.t2m.values, rtol=1e-6)
    for chunks, problem in (
        (10, "multiples of 4"),
        ((8, 8, 8), "give a number of cells, or rows and columns"),
        (0, "whole number of at least 1"),
    ):
        with pytest.raises(OptionError, match=problem):
            coarse.genda.downscale(model=model, chunks=chunks)  # type: ignore[arg-type]


def test_a_plan_counts_calls_tiles_and_chunks(tiled: xgenda.GenerativeModel, fine: xr.Dataset) -> None:
    coarse = coarse_of(fine).isel(time=[0, 3])
    assert isinstance(tiled, CorrectiveModel)
    found = xgenda.plan(coarse, model=tiled, members=3, steps=5, overlap=4)
    rows, columns = 3, 3  # tiles of 8 x 12 with 4 shared cells in 16 x 24
    assert (found.tile, found.tiles, found.parts, found.samples) == ((8, 12), rows * columns, 1, 6)
    assert found.calls == 6 * 9 * rows * columns + (2 * rows * columns if tiled.regression is not None else 0)
    whole = xgenda.plan(coarse, model=tiled, members=3, steps=5, tile=None, sampler="dpm++", chunks=(8, 8))
    assert (whole.parts, whole.tiles, whole.part) == (6, 1, (16, 24))
    assert whole.calls == 6 * 5 * 6 + (12 if tiled.regression is not None else 0)
    assert "6 of at most 16 x 24 cells with their halo" in repr(whole)
    assert xgenda.plan(coarse, model=tiled, members=16, tile=None).memory > whole.memory > 0
    with pytest.raises(OptionError, match="is no diffusion model; there is nothing to plan"):
        xgenda.plan(coarse, model=xgenda.train(fine, task="downscale", factor=4, method="bilinear"))


def test_tiles_are_chosen_for_large_grids_only(fine: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    small = xgenda.train(fine, task="downscale", factor=4, tile="auto", calibrate=False, **FAST)
    assert small.spec.options["tile"] is None
    assert re.fullmatch(r"\d+ rows, \d+ columns", small.spec.training["residual_correlated_over"])
    monkeypatch.setattr("xgenda.training.downscalers.LARGEST_PLANE", 20)
    monkeypatch.setattr("xgenda.training.downscalers.suggest_tile", lambda residual, stride: ((12, 12), (4, 4)))
    large = xgenda.train(fine, task="downscale", factor=4, tile="auto", calibrate=False, **FAST | {"anchor": "auto"})
    assert large.spec.options["tile"] == [12, 12]
    assert large.spec.training["anchor"] == "none"


def test_a_gaussian_of_the_whole_grid_cannot_be_cut(fine: xr.Dataset) -> None:
    model = xgenda.train(fine, task="downscale", factor=4, calibrate=False, **FAST | {"anchor": "eof"})
    with pytest.raises(OptionError, match="has a Gaussian of the whole grid.*anchor=None"):
        coarse_of(fine).genda.downscale(model=model, chunks=8)
    with pytest.raises(OptionError, match="anchor='eof' is a Gaussian of the whole grid, which tile cuts"):
        xgenda.train(fine, task="downscale", factor=4, tile=8, **FAST | {"anchor": "eof"})


def test_churn_makes_the_sampler_stochastic(tiled: xgenda.GenerativeModel, fine: xr.Dataset) -> None:
    coarse = coarse_of(fine).isel(time=[0])
    options: dict[str, Any] = {"model": tiled, "members": 1, "seed": 0, "steps": 6}
    plain, again = (coarse.genda.downscale(**options) for _ in range(2))
    churned = [coarse.genda.downscale(**options, sampler_options={"churn": 10}) for _ in range(2)]
    assert plain.t2m.equals(again.t2m)
    assert churned[0].t2m.equals(churned[1].t2m)
    assert float(abs(churned[0].t2m - plain.t2m).max()) > 1e-3


# -- calibration ----------------------------------------------------------------------------------------------------------------


def test_bands_add_up_and_smooth_fields_are_in_the_smooth_one() -> None:
    fields = torch.randn(2, 3, 20, 30, dtype=torch.float64)
    parts = bands(fields, (4.0, 1.0))
    torch.testing.assert_close(sum(parts), fields)
    ones = bands(torch.ones(1, 20, 30, dtype=torch.float64), (4.0, 1.0))
    torch.testing.assert_close(ones[0], torch.ones(1, 20, 30, dtype=torch.float64))


def test_factors_are_found_that_make_spread_and_error_agree() -> None:
    """Members whose smooth part has too little spread, and whose fine part has too much."""
    rng = torch.Generator().manual_seed(0)
    widths = (4.0, 1.0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 40, 40, generator=rng, dtype=torch.float64)

    truth, members = draw(60, 1), draw(60, 8, 1)
    wrong = Calibration(widths, ((0.6, 1.0, 1.5),))
    found = fit_calibration(truth, wrong(members), widths)
    expected = np.array([1 / 0.6, 1.0, 1 / 1.5])
    np.testing.assert_allclose(found.factors[0], expected, rtol=0.12)  # the filters overlap a little


@pytest.mark.slow
def test_calibration_is_stored_and_changes_the_spread_alone(fine: xr.Dataset, tmp_path: Path) -> None:
    train, held, test = fine.isel(time=slice(0, 24)), fine.isel(time=slice(24, 34)), coarse_of(fine).isel(time=slice(34, 40))
    plain = xgenda.train(train, task="downscale", factor=4, calibrate=False, **FAST | {"steps": 30})
    model = xgenda.calibrate(plain, held)
    assert plain.spec.options["calibration"] is None
    assert model.sha256 != plain.sha256
    model.save(tmp_path / "c.safetensors")
    again = xgenda.load_model(tmp_path / "c.safetensors")
    a, b, c = (test.genda.downscale(model=m, members=8, seed=0, steps=6) for m in (model, again, plain))
    xr.testing.assert_allclose(a.t2m, b.t2m, rtol=1e-5)
    assert float(abs(a.t2m.std("member") - c.t2m.std("member")).max()) > 1e-3
    truth = fine.isel(time=slice(34, 40))
    ratio = {k: float(xgenda.verify(v, truth).t2m.sel(metric="spread_skill")) for k, v in {"a": a, "c": c}.items()}
    assert abs(np.log(ratio["a"])) < abs(np.log(ratio["c"]))
    pairs = xgenda.calibrate(plain, coarse_of(held), held)
    assert pairs.spec.options["calibration"] == model.spec.options["calibration"]
    with pytest.raises(GridError, match="has fine fields on"):
        xgenda.calibrate(plain, held.isel(latitude=slice(0, 8)))
    with pytest.raises(OptionError, match="is no diffusion model for downscaling"):
        xgenda.calibrate(xgenda.train(train, task="downscale", factor=4, method="ridge"), held)


# -- classical methods ----------------------------------------------------------------------------------------------------------


def test_bilinear_is_interpolation(fine: xr.Dataset) -> None:
    coarse = coarse_of(fine)
    model = xgenda.train(fine, task="downscale", factor=4, method="bilinear")
    found = coarse.isel(time=[1, 2]).genda.downscale(model=model, stage="mean")
    inside = {d: fine[d].clip(coarse[d].min(), coarse[d].max()) for d in ("latitude", "longitude")}  # the edge value is held
    expected = coarse.t2m.isel(time=[1, 2]).interp(inside, method="linear").transpose("time", "latitude", "longitude")
    np.testing.assert_allclose(found.t2m, expected, rtol=1e-6)


def test_ridge_is_better_than_interpolation_and_its_errors_are_out_of_sample(fine: xr.Dataset, tmp_path: Path) -> None:
    train, test = fine.isel(time=slice(0, 30)), fine.isel(time=slice(30, 40))
    scores = {}
    for method in ("bilinear", "bcsd", "ridge"):
        model = xgenda.train(train, task="downscale", factor=4, method=method, out=tmp_path / f"{method}.safetensors")
        again = xgenda.load_model(tmp_path / f"{method}.safetensors")
        mean, members = (coarse_of(test).genda.downscale(model=again, stage=s, members=12, seed=3) for s in ("mean", "all"))
        few = coarse_of(test).genda.downscale(model=model, members=3, seed=3)
        xr.testing.assert_allclose(few.t2m, members.t2m.isel(member=slice(0, 3)), rtol=1e-5)
        scores[method] = float(xgenda.verify(mean, test).t2m.sel(metric="rmse"))
        ratio = float(xgenda.verify(members, test).t2m.sel(metric="spread_skill"))
        assert 0.6 < ratio < 1.6
    assert scores["ridge"] < 0.8 * scores["bcsd"] < 0.8 * scores["bilinear"]
    with pytest.raises(OptionError, match="steps=5 has no effect: ridge has a closed form"):
        coarse_of(test).genda.downscale(model=model, steps=5)


def test_quantiles_are_mapped() -> None:
    rng = np.random.default_rng(0)
    given_, wanted = rng.normal(size=(4000, 2, 3)), 2.0 + 3.0 * rng.normal(size=(4000, 2, 3))
    level = torch.linspace(0, 1, 101, dtype=torch.float64)
    tables = [torch.quantile(torch.as_tensor(v), level, 0) for v in (given_, wanted)]
    moved = mapped_quantiles(torch.as_tensor(given_), *tables)
    assert float((moved.mean() - 2.0).abs()) < 0.1
    assert float(moved.std()) == pytest.approx(3.0, rel=0.03)
    beyond = mapped_quantiles(torch.full((1, 2, 3), 99.0, dtype=torch.float64), *tables)
    torch.testing.assert_close(beyond[0], tables[1][-1] + 99.0 - tables[0][-1])
    same = mapped_quantiles(torch.as_tensor(given_), tables[0], tables[0])
    torch.testing.assert_close(same, torch.as_tensor(given_))


def test_bcsd_removes_a_bias_of_the_coarse_fields_on_pairs(paired: tuple[xr.Dataset, xr.Dataset]) -> None:
    coarse, target = paired
    warm = coarse[["t2m"]] * 1.5 - 120.0
    warm.t2m.attrs = coarse.t2m.attrs
    model = xgenda.train(warm, target=target[["t2m"]], task="downscale", method="bcsd")
    found = warm.genda.downscale(model=model, stage="mean").t2m - 273.15
    raw = warm.genda.regrid(target).t2m - 273.15
    rmse = [float(((f.transpose("time", "j", "i") - target.t2m) ** 2).mean() ** 0.5) for f in (found, raw)]
    assert rmse[0] < 0.3 * rmse[1]
    with pytest.raises(OptionError, match="method='bcsd' needs the fine variables among the coarse ones, and ds has no 'rain'"):
        xgenda.train(coarse, target=target, task="downscale", method="bcsd")


# -- priors ---------------------------------------------------------------------------------------------------------------------


def test_an_unconditional_prior_downscales(fine: xr.Dataset) -> None:
    """A Gaussian diffusion prior is as good as the closed form: the posterior given block means."""
    prior = xgenda.train(fine.isel(time=slice(0, 36)), steps=2, width=8, anchor="eof", progress=False)
    truth = fine.isel(time=slice(36, 40))
    coarse = coarse_of(truth)
    found = coarse.genda.downscale(model=prior, members=16, seed=0, steps=12, error=0.02)
    back = coarse_of(found).t2m
    assert float(abs(back - coarse.t2m).mean()) < 0.05
    flat = truth.t2m.coarsen(latitude=4, longitude=4).construct(latitude=("a", "y"), longitude=("b", "x"))
    plain = float(flat.std(("y", "x")).mean())
    error = float(((found.t2m.mean("member") - truth.t2m) ** 2).mean() ** 0.5)
    assert error < 0.7 * plain
    with pytest.raises(OptionError, match="chunks=8 has no effect with an unconditional prior"):
        coarse.genda.downscale(model=prior, chunks=8)
    with pytest.raises(OptionError, match="ds has none of the variables of model"):
        coarse.rename(t2m="x").drop_attrs().genda.downscale(model=prior)


# -- published models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_condition", [True, False])
def test_a_published_pair_of_networks_is_a_model(tmp_path: Path, mean_condition: bool) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"shape": (16, 24), "width": 8, "multipliers": (1, 2), "blocks": 1, "unbiased": True}
    given_ = 3
    regression = Regression(SongUNet(2 + given_ + 4, 2, embedding="zero", grid="sinusoidal", grid_channels=4, **small), 2)
    diffusion = Preconditioned(SongUNet(2 + 2 * mean_condition + given_ + 4, 2, grid="sinusoidal", grid_channels=4, **small))
    for parameter in itertools.chain(regression.parameters(), diffusion.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    paths = [write_mdlus(n, tmp_path / f"{k}.mdlus") for k, n in (("r", regression), ("d", diffusion))]
    rng = np.random.default_rng(0)
    lat, lon = np.linspace(40, 43, 7), np.linspace(5, 11, 9)
    inputs = xr.Dataset(
        {
            n: (("time", "latitude", "longitude"), rng.normal(size=(2, 7, 9)), {"units": u})
            for n, u in (("t", "K"), ("u10", "m s-1"))
        },
        coords={"time": np.array(["2020-01-01", "2020-01-02"], "datetime64[ns]"), "latitude": lat, "longitude": lon},
    )
    grid = {"latitude": np.linspace(40.2, 42.8, 16), "longitude": np.linspace(5.2, 10.8, 24)}
    target = xr.Dataset(
        {n: (("latitude", "longitude"), np.zeros((16, 24)), {"units": "m s-1"}) for n in ("u10", "v10")}, coords=grid
    )
    statics = xr.Dataset({"orog": (("latitude", "longitude"), rng.normal(size=(16, 24)))}, coords=grid)
    statistics = {"t": (0.2, 1.5), "u10": (1.0, 2.0), "input/u10": (0.1, 0.9), "v10": (-1.0, 3.0), "orog": (0.5, 2.0)}
    options: dict[str, Any] = {"inputs": inputs, "target": target, "statics": statics, "statistics": statistics}
    model = read_corrdiff(*paths, **options)
    model.save(tmp_path / "model.safetensors")
    model = xgenda.load_model(tmp_path / "model.safetensors")
    mean = inputs.genda.downscale(model=model, stage="mean")
    members = inputs.genda.downscale(model=model, members=2, seed=4, steps=4)

    up = inputs.genda.regrid(target)
    parts = [(up[n].values - m) / s for n, (m, s) in (("t", (0.2, 1.5)), ("u10", (0.1, 0.9)))]
    parts.append(np.broadcast_to((statics.orog.values - 0.5) / 2.0, parts[0].shape))
    condition = torch.as_tensor(np.stack(parts, 1)).float()
    first, second = read_mdlus(paths[0]), read_mdlus(paths[1])
    assert isinstance(first, Regression)
    mu = first(condition)
    for k, (n, m, s) in enumerate((("u10", 1.0, 2.0), ("v10", -1.0, 3.0))):
        np.testing.assert_allclose(mean[n].values, mu[:, k].numpy() * s + m, atol=1e-4)
    levels = (800 ** (1 / 7) + np.arange(4) / 3 * (0.002 ** (1 / 7) - 800 ** (1 / 7))) ** 7
    assert isinstance(model, CorrectiveModel)
    from xgenda.models.corrective import plane_noise

    keys = [(4, str(t), m) for m in (0, 1) for t in np.datetime_as_string(inputs.time.values, unit="ns")]
    x = levels[0] * plane_noise(keys, (16, 24), (np.arange(16), np.arange(24))).normal(2, 16, 24)
    given_all = torch.cat([mu, condition] if mean_condition else [condition], 1).repeat(2, 1, 1, 1)
    for here, there in itertools.pairwise([*levels, 0.0]):
        slope = (x - second(x.float(), given_all, float(here))) / here
        ahead = x + (there - here) * slope
        x = (
            ahead
            if there == 0
            else x + (there - here) * (slope + (ahead - second(ahead.float(), given_all, float(there))) / there) / 2
        )
    residual = x.reshape(2, 2, 2, 16, 24).numpy()
    np.testing.assert_allclose(members.v10.values, (mu[:, 1].numpy() + residual[:, :, 1]) * 3.0 - 1.0, atol=5e-3)

    for change, error, problem in (
        ({"statistics": {}}, OptionError, "statistics has None for 't'"),
        (
            {"statics": None},
            xgenda.errors.CheckpointError,
            "takes 3 channels beside its positions; inputs and statics have 2|takes",
        ),
        ({"lead_step": 3600.0}, OptionError, "the networks know 0 lead times. Leave it out"),
        (
            {"target": target.isel(latitude=slice(0, 8)), "statics": None},
            xgenda.errors.CheckpointError,
            "is for 2 variables on 16 x 24 cells",
        ),
    ):
        with pytest.raises(error, match=problem):
            read_corrdiff(*paths, **options | change)
    with pytest.raises(xgenda.errors.CheckpointError, match="Were the two files exchanged"):
        read_corrdiff(*reversed(paths), **options)


def test_grouped_output_files_become_one_dataset(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "out.nc"
    root = xr.Dataset(
        {
            "lat": (("y", "x"), 40 + np.arange(12.0).reshape(3, 4) / 10),
            "lon": (("y", "x"), 5 + np.arange(12.0).reshape(3, 4) / 10),
        },
        coords={"time": ("time", [0.0, 6.0], {"units": "hours since 1990-01-01", "calendar": "standard"})},
        attrs={"cfg": "a: 1"},
    )
    root.to_netcdf(path, engine="netcdf4")
    fields = rng.normal(size=(3, 2, 3, 4)).astype("f4")
    xr.Dataset({"10u": (("ensemble", "time", "y", "x"), fields)}).to_netcdf(path, mode="a", group="prediction", engine="netcdf4")
    xr.Dataset({"10u": (("time", "y", "x"), fields[0])}).to_netcdf(path, mode="a", group="truth", engine="netcdf4")
    found, truth = read_corrdiff_output(path), read_corrdiff_output(path, "truth")
    assert found["10u"].dims == ("member", "time", "y", "x")
    np.testing.assert_array_equal(found["10u"], fields)
    assert (found.time.values == np.array(["1990-01-01T00", "1990-01-01T06"], "datetime64[ns]")).all()
    scores = found.genda.verify(truth)
    assert float(scores["10u"].sel(metric="crps")) > 0
    with pytest.raises(xgenda.errors.CheckpointError, match="has no group 'input'"):
        read_corrdiff_output(path, "input")


# -- bad input ------------------------------------------------------------------------------------------------------------------


def test_neighbours_are_found_by_time() -> None:
    times = np.datetime64("2020-01-01", "ns") + np.array([0, 6, 12, 24, 30]) * np.timedelta64(1, "h")
    assert spacing_of_times(times) == 21600.0
    found = neighbours(times, times, (0, -1, 1), 21600.0)
    assert found.tolist() == [[0, -1, 1], [1, 0, 2], [2, 1, -1], [3, -1, 4], [4, 3, -1]]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "target of a prior": ({"task": "prior"}, OptionError, r"target=... belongs to task='downscale'; pass it too"),
    "factor and target": ({"factor": 4}, OptionError, "factor=4 has no effect with target"),
    "a method": ({"method": "kriging"}, OptionError, "method='kriging' is not accepted"),
    "stages": ({"stages": "three"}, OptionError, "stages='three' is not accepted"),
    "neighbours without the time itself": ({"neighbours": (1, 2)}, OptionError, "give whole steps with 0 among them"),
    "half neighbours": ({"neighbours": (0, 0.5)}, OptionError, "give whole steps with 0 among them"),
    "an architecture": ({"architecture": "dit"}, OptionError, "architecture='dit' is not accepted"),
    "a tile": ({"tile": 6}, OptionError, "multiples of 4"),
    "a large tile": ({"tile": 64}, OptionError, "is larger than the 16 rows of the fine grid"),
    "bounds": ({"bounds": {"t2m": (300, 310)}}, StateError, r"outside of its bounds \(300, 310\)"),
    "bounds of nothing": ({"bounds": {"x": (0, 1)}}, OptionError, "bounds names 'x', and the variables are 't2m'"),
    "odd bounds": ({"bounds": {"t2m": (1,)}}, OptionError, "a lowest and a highest value are needed"),
    "a flag": ({"calibrate": "yes"}, OptionError, "calibrate='yes' is not accepted; it must be True or False"),
    "no lead times": ({"lead_time": True}, CoordinateError, "ds has no lead time for each time"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_options_of_training(fine: xr.Dataset, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        xgenda.train(coarse_of(fine), **{"target": fine, "task": "downscale", **FAST} | change)


def test_bad_pairs(fine: xr.Dataset) -> None:
    coarse = coarse_of(fine)
    train: dict[str, Any] = {"target": fine, "task": "downscale", **FAST}
    with pytest.raises(OptionError, match="ds has none of the times of target"):
        xgenda.train(coarse.assign_coords(time=coarse.time + np.timedelta64(1, "D") * 900), **train)
    with pytest.raises(GridError, match="reaches beyond the coarse fields"):
        xgenda.train(coarse.isel(longitude=slice(0, 2)), **train)
    with pytest.raises(StateError, match="Of 40 fine fields 10 have all the coarse ones that they need"):
        xgenda.train(xr.concat([coarse.isel(time=slice(0, 10)), coarse.isel(time=slice(10, 40)).assign_coords(
            time=coarse.time[10:] + np.timedelta64(900, "D"))], "time"), **train)  # fmt: skip
    with pytest.raises(GridError, match="statics are on the grid .* Bring them there: statics.genda.regrid"):
        xgenda.train(coarse, statics=coarse.isel(time=0, drop=True), **train)
    with pytest.raises(StateError, match="'flat'.* is the same everywhere"):
        xgenda.train(coarse, statics=xr.ones_like(fine.isel(time=0, drop=True)).rename(t2m="flat"), **train)
    with pytest.raises(StateError, match="holds cells that are NaN at all times"):
        xgenda.train(coarse, **train | {"target": fine.where(fine.latitude > 41)})


@pytest.mark.filterwarnings("ignore:.*have no neighbours in ds")
def test_bad_input_of_downscale(
    pair_model: xgenda.GenerativeModel, paired: tuple[xr.Dataset, xr.Dataset], fine: xr.Dataset
) -> None:
    coarse = paired[0]
    with pytest.raises(GridError, match=r"takes fields on the grid .*model.template\(inputs=True\)"):
        coarse.isel(latitude=slice(0, 2)).genda.downscale(model=pair_model)
    with pytest.raises(OptionError, match="ds lacks the variable 'q'"):
        coarse[["t2m"]].genda.downscale(model=pair_model)
    with pytest.raises(OptionError, match="error=0.1 belongs to unconditional priors"):
        coarse.genda.downscale(model=pair_model, error=0.1)
    with pytest.raises(OptionError, match="stage='half' is not accepted"):
        coarse.genda.downscale(model=pair_model, stage="half")
    with pytest.raises(GridError, match="target is not on the grid of model"):
        coarse.genda.downscale(model=pair_model, target=fine)
    with pytest.raises(OptionError, match="has no inputs; there is no template"):
        xgenda.load_model("t2m-north-america").template(inputs=True)


def test_training_sees_the_mean_that_sampling_has(fine: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under a logarithm, where keeping block means is no matter of adding a number."""
    from xgenda.training import downscalers

    rain = xr.Dataset({"rain": np.exp((fine.t2m - 280) / 3).assign_attrs(units="mm")})
    seen: list[torch.Tensor] = []

    class Watched(downscalers.Denoising):
        def __init__(self, *given: Any, **named: Any) -> None:
            seen.append(given[5])
            super().__init__(*given, **named)

    monkeypatch.setattr(downscalers, "Denoising", Watched)
    model = xgenda.train(rain, task="downscale", factor=4, transform="log", offset=0.1, calibrate=False, **FAST)
    assert isinstance(model, CorrectiveModel)
    mean = coarse_of(rain).genda.downscale(model=model, stage="mean")
    trained = np.exp(seen[0][:, 0].numpy() * model.scaling.std[0] + model.scaling.mean[0, 0]) - 0.1
    blocks = trained.reshape(40, 4, 4, 6, 4).mean((2, 4))
    np.testing.assert_allclose(blocks, coarse_of(rain).rain, rtol=1e-4)
    np.testing.assert_allclose(coarse_of(mean).rain, coarse_of(rain).rain, rtol=1e-6)

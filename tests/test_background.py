"""Models of the truth given a forecast: closed forms, the soft mask of DiffDA, training from pairs and lags, levels, bad input."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.anchors import LowRank
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.masks import OnPlane, OnSphere
from xgenda.diffusion.samplers import integrate, network_calls
from xgenda.errors import CoordinateError, GridError, ModelNotFoundError, OptionError, StateError, UnitsError
from xgenda.grids import Grid
from xgenda.models.background import BackgroundModel
from xgenda.models.centring import fit_centre
from xgenda.models.conditioning import PRESETS, places_of
from xgenda.models.conditions import Conditions
from xgenda.models.diffusive import build_network
from xgenda.models.generative import SamplingOptions
from xgenda.models.means import LinearMean, Pairs
from xgenda.models.spec import ModelSpec, VariableSpec
from xgenda.scaling import Scaling
from xgenda.training.downscalers import _earned

NY, NX = 6, 8
LATITUDE, LONGITUDE = np.linspace(40.0, 45.0, NY), np.linspace(0.0, 7.0, NX)
FAST: dict[str, Any] = {"steps": 4, "width": 8, "progress": False}


def smooth(rng: np.random.Generator, n: int, ny: int = NY, nx: int = NX, width: float = 1.5) -> np.ndarray:
    """Return correlated random fields of variance one, shape (n, ny, nx)."""
    pad = 6
    found = scipy.ndimage.gaussian_filter(rng.standard_normal((n, ny + 2 * pad, nx + 2 * pad)), (0, width, width))
    found = found[:, pad:-pad, pad:-pad]
    return np.asarray(found / found.std())


def dataset(t: np.ndarray, q: np.ndarray, start: str = "2020-01-01T00", every: str = "12h") -> xr.Dataset:
    dims = ("time", "latitude", "longitude")
    return xr.Dataset(
        {
            "t": (dims, t, {"units": "K", "standard_name": "air_temperature"}),
            "q": (dims, q, {"units": "kg kg-1", "standard_name": "specific_humidity"}),
        },
        coords={"time": pd.date_range(start, periods=len(t), freq=every), "latitude": LATITUDE, "longitude": LONGITUDE},
    )


@pytest.fixture(scope="module")
def twin() -> tuple[xr.Dataset, xr.Dataset]:
    """Forecasts and truth: temperature that is too warm by 1 K, humidity that is nearly useless as a forecast."""
    rng = np.random.default_rng(0)
    t, q = 280 + 5 * smooth(rng, 60), 0.01 + 0.002 * smooth(rng, 60)
    truth = dataset(t, q)
    return dataset(t + 1 + 1.5 * smooth(rng, 60), q + 0.003 * smooth(rng, 60)), truth


@pytest.fixture(scope="module")
def trained(twin: tuple[xr.Dataset, xr.Dataset], tmp_path_factory: pytest.TempPathFactory) -> xgenda.GenerativeModel:
    path = tmp_path_factory.mktemp("models") / "background.safetensors"
    xgenda.train(twin[0], target=twin[1], task="background", anchor="eof", out=path, name="tiny-background", **FAST)
    return xgenda.load_model(path)


@pytest.fixture(scope="module")
def obs(twin: tuple[xr.Dataset, xr.Dataset]) -> xr.Dataset:
    """Four columns of each of three times."""
    seen = np.zeros((NY, NX), dtype=bool)
    seen[[0, 2, 4, 5], [1, 6, 3, 7]] = True
    return twin[1].isel(time=[3, 30, 31]).where(xr.DataArray(seen, dims=("latitude", "longitude")))


ERROR = {"t": 0.3, "q": 2e-4}


# -- closed form ----------------------------------------------------------------------------------------------------------------

UNIT = np.array([0.4, 0.7])
MEAN, STD = np.array([280.0, 0.01]), np.array([5.0, 0.002])
BIAS = np.array([-0.2, 0.1])


def covariance() -> np.ndarray:
    """Return the covariance of the errors in their unit: Gaussian in space, correlated 0.5 between the variables."""
    y, x = np.meshgrid(np.arange(NY), np.arange(NX), indexing="ij")
    place = np.stack([y.ravel(), x.ravel()], 1)
    space = np.exp(-((place[:, None] - place[None]) ** 2).sum(-1) / (2 * 2.0**2)) + 1e-3 * np.eye(NY * NX)
    return np.kron([[1.0, 0.5], [0.5, 1.0]], space)


@pytest.fixture(scope="module")
def exact() -> BackgroundModel:
    """A model with a known Gaussian of the error and a known bias, and a network that says nothing."""
    grid = Grid(LATITUDE, LONGITUDE)
    scaling = Scaling(MEAN[None, :, None, None], STD[:, None, None])
    variables = (VariableSpec("t", "air_temperature", "K"), VariableSpec("q", "specific_humidity", "kg kg-1"))
    arguments = {
        "channels": 2, "condition_channels": 4, "width": 8, "multipliers": [1], "position": 0, "shape": [NY, NX], "periodic": False,
    }  # fmt: skip
    spec = ModelSpec(
        "exact", "background", "diffusion", variables, grid, scaling, needs_background=True, inputs=Conditions(variables, grid, scaling),
        options={
            "network": arguments, "regression": None, "sigma_min": 0.02, "sigma_max": 200.0, "sigma_data": 1.0, "unit": UNIT.tolist(),
            "mean_condition": True, "conserve": None, "calibration": None,
        },
    )  # fmt: skip
    network = build_network(arguments)
    network.scale_output(0.0)
    identity = torch.eye(2, dtype=torch.float64)[..., None, None]
    offset = torch.as_tensor(BIAS)[:, None, None].expand(2, NY, NX).contiguous()
    anchor = LowRank.of(LowRank(torch.linalg.cholesky(torch.as_tensor(covariance())), torch.zeros(2 * NY * NX)))
    shape = (2, NY, NX)
    return BackgroundModel(spec, LinearMean(shape, identity, offset), None, torch.ones(shape), EDMDenoiser(network, anchor), None)


def kalman(background: xr.Dataset, values: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the posterior, shape (2, NY, NX)."""
    given = np.stack([background[n].values[0] for n in "tq"]).astype(float)
    unit = np.repeat(STD * UNIT, NY * NX)
    centre = (given + (STD * BIAS)[:, None, None]).ravel()
    prior = unit[:, None] * covariance() * unit
    y = np.stack([values[n].values[0] for n in "tq"]).ravel()
    seen = np.flatnonzero(np.isfinite(y))
    error = np.repeat([ERROR["t"], ERROR["q"]], NY * NX)[seen]
    gain = np.linalg.solve(prior[np.ix_(seen, seen)] + np.diag(error**2), prior[seen]).T
    mean = centre + gain @ (y[seen] - centre[seen])
    std = np.sqrt(np.diag(prior - gain @ prior[seen]))
    return mean.reshape(2, NY, NX), std.reshape(2, NY, NX)


def moments(analysis: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    members = np.stack([analysis[n].values[:, 0] for n in "tq"], 1).astype(float)
    return members.mean(0), members.std(0, ddof=1)


def test_a_gaussian_error_has_the_posterior_of_kalman(exact: BackgroundModel, twin: Any, obs: xr.Dataset) -> None:
    background, values = twin[0].isel(time=[3]), obs.isel(time=[0])
    mean, std = kalman(background, values)
    count = 400
    analysis = xgenda.assimilate(
        background, values, model=exact, error=ERROR, members=count, seed=0, steps=20, batch_size=200, background_check=None
    )
    found, spread = moments(analysis)
    assert np.abs((found - mean) / std).max() < 5 / np.sqrt(count)
    np.testing.assert_allclose(spread / std, 1.0, atol=5 / np.sqrt(2 * count))
    assert abs((spread / std).mean() - 1) < 0.05
    # precise observations ask for levels below those of the training
    sharp = {k: 0.02 * v for k, v in ERROR.items()}
    close = xgenda.assimilate(background, values, model=exact, error=sharp, members=40, seed=0, steps=20, background_check=None)
    left = np.abs(close.t.mean("member") - values.t).values
    assert np.nanmax(left) < 3 * sharp["t"]


def test_without_observations_it_is_the_prior(exact: BackgroundModel, twin: Any) -> None:
    background = twin[0].isel(time=[3])
    with pytest.warns(UserWarning, match="the result is the prior"):
        found, spread = moments(xgenda.assimilate(background, None, model=exact, members=300, seed=1, steps=16, batch_size=300))
    expected = np.stack([background[n].values[0] for n in "tq"]) + (STD * BIAS)[:, None, None]
    unit = (STD * UNIT)[:, None, None]
    assert np.abs((found - expected) / unit).max() < 5 / np.sqrt(300)
    assert np.abs(spread / unit - 1).mean() < 0.06


def test_where_all_observations_are_rejected_it_is_the_prior(exact: BackgroundModel, twin: Any, obs: xr.Dataset) -> None:
    background, given = twin[0].isel(time=[3]), {"model": exact, "error": ERROR, "members": 2, "seed": 0}
    far = obs[["t"]].isel(time=[0]) + 40.0
    with pytest.warns(
        UserWarning, match="No observation can be used: of 4 given, all on the grid are too far from what the model expects"
    ):
        found = xgenda.assimilate(background, far, **given | {"error": 0.3})
    with pytest.warns(UserWarning, match=r"No observation can be used \(0 given\)"):
        prior = xgenda.assimilate(background, None, **given)
    np.testing.assert_array_equal(found.t, prior.t)
    alone = xgenda.assimilate(background, obs.isel(time=[0]), **given | {"members": 1})
    both = xgenda.assimilate(background, obs.isel(time=[0]), **given)
    np.testing.assert_allclose(alone.t.isel(member=0), both.t.isel(member=0), rtol=1e-6)


def test_mmps_agrees_with_the_closed_form(exact: BackgroundModel, twin: Any, obs: xr.Dataset) -> None:
    background, values = twin[0].isel(time=[3]), obs.isel(time=[0])
    mean, std = kalman(background, values)
    options: dict[str, Any] = {"model": exact, "error": ERROR, "members": 40, "seed": 0, "steps": 12, "batch_size": 40}
    found, _ = moments(
        xgenda.assimilate(
            background, values, guidance="mmps", guidance_options={"iterations": 8}, background_check=None, **options
        )
    )
    assert np.abs((found - mean) / std).mean() < 2.5 / np.sqrt(40)


def test_background_errors_are_those_around_the_mean(exact: BackgroundModel, twin: Any, obs: xr.Dataset) -> None:
    background = twin[0].isel(time=[3])
    departures = xgenda.innovations(background, obs.isel(time=[0]), model=exact, error=ERROR)
    temperature = departures.variable == "t"
    np.testing.assert_allclose(departures.background_error[temperature], STD[0] * UNIT[0] * np.sqrt(1.001), rtol=1e-6)
    gross = obs.isel(time=[0]).copy(deep=True)
    gross["t"] = gross.t + xr.where(gross.longitude == LONGITUDE[1], 40.0, 0.0)
    analysis = xgenda.assimilate(background, gross, model=exact, error=ERROR, members=2, seed=0, steps=4)
    assert json.loads(analysis.attrs["xgenda_observation_counts"]) == {"used": 7, "background": 1}
    with pytest.raises(OptionError, match="no posterior in closed form; take the moments of members"):
        xgenda.posterior_moments(background, obs.isel(time=[0]), model=exact, error=ERROR)


# -- inpainting -----------------------------------------------------------------------------------------------------------------


def great_circle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return angles in degrees between (latitude, longitude) pairs, by the haversine."""
    (p, k), (q, m) = np.radians(a).T[:, :, None], np.radians(b).T[:, None]
    h = np.sin((q - p) / 2) ** 2 + np.cos(p) * np.cos(q) * np.sin((m - k) / 2) ** 2
    return np.asarray(np.degrees(2 * np.arcsin(np.sqrt(h))))


def test_soft_masks_cross_the_date_line_and_the_pole() -> None:
    grid = Grid(np.linspace(-88.0, 88.0, 45), np.arange(-180.0, 180.0, 4.0))
    places = places_of(grid, True)
    assert isinstance(places, OnSphere)
    assert places.spacing == pytest.approx(np.radians(4.0))
    cells = np.stack(grid.points(), 1)
    # two observations between cells: across the date line, and near the pole
    index = torch.tensor([[22 * 90, 22 * 90 + 89], [44 * 90 + 10, 44 * 90 + 10]])
    at = places.centres(index, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    true = np.array([[0.0, 178.0], [88.0, -140.0]])
    distance = great_circle(true, cells) / 4.0
    np.testing.assert_allclose(places.between(at), distance, atol=1e-6)
    east, west = distance[0].reshape(45, 90)[22, [0, 89]]
    assert east == pytest.approx(west)  # on both sides of the line alike
    assert distance[1].reshape(45, 90)[44, 55] == pytest.approx(1.0, rel=0.01)  # over the pole, half around the world in columns
    box = OnPlane(8, 10, (True, True))
    assert float(box.between(box.centres(torch.tensor([[9, 0]]), torch.tensor([[0.5, 0.5]])))[0, 8]) == pytest.approx(1.5)


def test_columns_are_reproduced_under_a_soft_mask(exact: BackgroundModel, twin: Any, obs: xr.Dataset) -> None:
    background, values = twin[0].isel(time=[3]), obs.isel(time=[0])
    options: dict[str, Any] = {
        "model": exact,
        "members": 3,
        "seed": 0,
        "guidance": "inpaint",
        "steps": 8,
        "background_check": None,
    }
    for given in ({"preset": "soft"}, {"preset": "soft", "interpolation": "matern"}, {"preset": "soft", "also": "anchor"}):
        found = xgenda.assimilate(background, values, error={"t": 1e-3, "q": 1e-6}, guidance_options=given, **options)
        assert float(np.abs(found.t - values.t).max()) < 5e-3, given
        assert float(np.abs(found.q - values.q).max()) < 5e-6, given
    corner = values.where((values.latitude < 41) & (values.longitude < 2))
    alone = xgenda.assimilate(background, corner, error=ERROR, guidance_options={"preset": "soft"}, **options)
    assert float(alone.t.std("member").isel(time=0, latitude=-1, longitude=-1)) > 0.3  # far away members differ
    assert found.attrs["xgenda_sampler"] == "ancestral(resample=2, jump=1)"
    with pytest.raises(OptionError, match="need a soft mask; give its width in cells: 'reach': 1.5"):
        xgenda.assimilate(background, values, error=ERROR, guidance_options={"interpolation": "matern"}, **options)
    with pytest.raises(OptionError, match="choose one of 'published', 'soft'"):
        xgenda.assimilate(background, values, error=ERROR, guidance_options={"preset": "publish"}, **options)


def test_the_published_preset_is_the_published_schedule(exact: BackgroundModel) -> None:
    asked = SamplingOptions(guidance="inpaint", guidance_options={"preset": "published"})
    plan = exact.plan(asked)
    assert network_calls(plan.sampler, int(plan.steps or 0), plan.sampler_options) == 2910
    assert (plan.schedule, plan.guidance_options["reach"], plan.guidance_options["interpolation"]) == ("vp-linear", 1.5, "matern")
    assert network_calls("ancestral", 24, PRESETS["soft"].sampler_options) == 48
    other = exact.plan(dataclasses.replace(asked, steps=30, guidance_options={"preset": "published", "reach": 2.5}))
    assert (other.steps, other.guidance_options["reach"], other.sampler_options["jump"]) == (30, 2.5, 10)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "pc"])
def test_jumps_call_the_network_as_often_as_told_with_fresh_noise(sampler: str) -> None:
    calls: list[float] = []
    drawn: list[torch.Tensor] = []

    class Source:
        def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            drawn.append(torch.randn(2, *shape, generator=torch.Generator().manual_seed(len(drawn)), dtype=torch.float64))
            return drawn[-1]

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        calls.append(sigma)
        return x / (1 + sigma**2)

    levels = [*np.geomspace(10, 0.1, 7).tolist(), 0.0]
    options = {"resample": 3, "jump": 3}
    done: list[int] = []
    integrate(denoise, 10 * torch.ones(2, 5, dtype=torch.float64), levels, sampler, Source(), lambda: done.append(1), **options)
    assert len(calls) == network_calls(sampler, 7, options)
    assert len(done) == 7
    assert len({float(d[0, 0]) for d in drawn}) == len(drawn)
    if sampler == "ddim":
        assert len(calls) == 3 + 3 * 3 + 3 * 1
        assert len(drawn) == 4


# -- training -------------------------------------------------------------------------------------------------------------------


def rmse(found: xr.DataArray, truth: xr.DataArray) -> float:
    return float(np.sqrt(((found - truth) ** 2).mean()))


def test_trained_from_pairs(trained: xgenda.GenerativeModel, twin: Any, obs: xr.Dataset) -> None:
    assert isinstance(trained, BackgroundModel)
    spec = trained.spec
    assert (spec.task, spec.needs_background, len(spec.options["unit"])) == ("background", True, 2)
    assert spec.inputs is not None
    assert spec.inputs.cycle == "dayofyear+hour"[10:]
    assert "background (diffusion)" in repr(trained)
    forecasts, truth = (d.isel(time=[3, 30, 31]) for d in twin)
    analysis = forecasts.genda.assimilate(obs, model=trained, error=ERROR, members=8, seed=0, steps=8)
    for name in "tq":
        assert rmse(analysis[name].mean("member"), truth[name]) < 0.8 * rmse(forecasts[name], truth[name])
    assert analysis.attrs["xgenda_guidance"].startswith("anchor")
    scores = xgenda.verify(analysis, truth)
    assert 0.4 < float(scores.t.sel(metric="spread_skill").mean()) < 2.5


def test_the_same_numbers_however_it_is_laid_out(trained: xgenda.GenerativeModel, twin: Any, obs: xr.Dataset) -> None:
    forecasts = twin[0].isel(time=[3, 30, 31])
    for given in ({}, {"guidance": "inpaint", "guidance_options": {"preset": "soft"}}):
        options: dict[str, Any] = {"model": trained, "error": ERROR, "members": 3, "seed": 2, "steps": 5, **given}
        reference = forecasts.genda.assimilate(obs, **options)
        whole = forecasts.chunk(time=-1).genda.assimilate(obs, **options)
        assert whole.t.chunks is not None
        assert np.array_equal(whole.compute().t, reference.t)
        for other in (
            forecasts.chunk(time=1).genda.assimilate(obs, **options).compute(),
            forecasts.genda.assimilate(obs, **{**options, "batch_size": 2}),
            forecasts.genda.assimilate(obs, **{**options, "members": 5}).isel(member=slice(0, 3)),
            forecasts.isel(time=[2, 0, 1]).genda.assimilate(obs, **options).isel(time=[1, 2, 0]),
            forecasts.isel(latitude=slice(None, None, -1)).genda.assimilate(obs, **options).sortby("latitude"),
        ):
            assert float(np.abs(other.t - reference.t).max()) < 1e-4
    celsius = forecasts.assign(t=(forecasts.t - 273.15).assign_attrs(forecasts.t.attrs, units="degC"))
    cold = celsius.genda.assimilate(obs, model=trained, error=ERROR, members=2, seed=2, steps=5)
    warm = forecasts.genda.assimilate(obs, model=trained, error=ERROR, members=2, seed=2, steps=5)
    np.testing.assert_allclose(cold.t + 273.15, warm.t, atol=1e-4)


def test_a_file_holds_all_of_it(trained: xgenda.GenerativeModel, twin: Any, obs: xr.Dataset, tmp_path: Any) -> None:
    path = trained.save(tmp_path / "copy.safetensors", card=True)
    assert "xgenda.load_model" in path.with_suffix(".md").read_text()
    again = xgenda.load_model(path)
    assert again.sha256 == trained.sha256
    forecasts = twin[0].isel(time=[3])
    options: dict[str, Any] = {"error": ERROR, "members": 2, "seed": 0, "steps": 4}
    first = forecasts.genda.assimilate(obs, model=trained, **options)
    assert np.array_equal(forecasts.genda.assimilate(obs, model=str(path), **options).t, first.t)


def test_trained_from_one_series(twin: Any) -> None:
    rng = np.random.default_rng(3)
    days = np.cumsum(smooth(rng, 60), 0)
    series = dataset(280 + days, 0.01 + 1e-3 * smooth(rng, 60), every="24h")
    ground = (series.t.isel(time=0, drop=True) * 0 + series.latitude).to_dataset(name="height")
    model = xgenda.train(series, task="background", lag="48h", anchor="eof", statics=ground, **FAST)
    assert model.spec.options["lag"] == 48 * 3600
    assert model.spec.training["samples"] == "58 along time"
    assert model.spec.inputs is not None
    assert model.spec.inputs.statics == ("height",)
    # the background of a time is the state two days before: the error of temperature is that of two steps of its walk
    expected = float(np.sqrt(((series.t.values[2:] - series.t.values[:-2]) ** 2).mean()))
    assert model.spec.scaling is not None
    found = model.spec.options["unit"][0] * float(model.spec.scaling.std[0].mean())
    assert found == pytest.approx(expected, rel=0.15)
    days_apart = series.isel(time=slice(0, 40, 2))
    with pytest.raises(OptionError, match=r"lag='24h': no two times of ds are so far apart.*for example lag='48h'"):
        xgenda.train(days_apart, task="background", lag="24h", **FAST)
    with pytest.raises(StateError, match="Of 20 states 19 have a background; at least 20"):
        xgenda.train(days_apart, task="background", lag="48h", **FAST)


def test_the_lead_time_and_logarithms(twin: Any) -> None:
    forecasts, truth = twin
    hours = ("time", np.where(np.arange(60) % 2, 24, 48), {"standard_name": "forecast_period", "units": "h"})
    led = forecasts.assign_coords(lead=hours).assign(q=forecasts.q.clip(min=1e-5).assign_attrs(forecasts.q.attrs))
    positive = truth.assign(q=truth.q.clip(min=1e-5).assign_attrs(truth.q.attrs))
    model = xgenda.train(
        led, target=positive, task="background", anchor="eof", lead_time=True, transform={"q": "log"}, offset={"q": 1e-3}, **FAST
    )
    assert model.spec.inputs is not None
    assert model.spec.inputs.lead_time == 48 * 3600
    assert "lead time" in repr(model)
    background, values = led.isel(time=[3]), positive.isel(time=[3], latitude=[1, 4], longitude=[2, 6])
    analysis = background.genda.assimilate(values, model=model, error=ERROR, members=4, seed=0, steps=8)
    assert analysis.attrs["xgenda_guidance"].startswith("mmps")  # a logarithm is no linear operator
    assert float(analysis.q.min()) >= 0.0
    near = analysis.sel(latitude=values.latitude, longitude=values.longitude)
    assert float(np.abs(near.t.mean("member") - values.t).max()) < 1.0
    with pytest.raises(CoordinateError, match="ds has no lead time"):
        forecasts.isel(time=[3]).genda.assimilate(values, model=model, error=ERROR)


def test_each_variable_gets_the_mean_that_it_needs() -> None:
    """A forecast that is right, one with a bias, one that is worth nothing: none is made worse."""
    rng = np.random.default_rng(1)
    n = 120
    truth = np.stack([smooth(rng, n) for _ in range(3)], 1)
    given = truth + 0.3 * np.stack([smooth(rng, n) for _ in range(3)], 1)
    given[:, 1] += 0.8
    given[:, 2] = smooth(rng, n)
    both = [torch.as_tensor(a) for a in (given, truth)]
    fold = np.arange(n) * 6 // n
    pairs = Pairs(both[0].flatten(2), both[0].float(), both[1], fold, [(c, 1.0) for c in range(3)])
    mean, crossed, kinds, _ = fit_centre(pairs)
    error = (crossed - both[1]).square().mean((0, 2, 3))
    before = (both[0] - both[1]).square().mean((0, 2, 3))
    assert (error <= before * (1 + 1e-6)).all()
    assert float(error[1]) < 0.15
    assert float(error[2]) < 1.1 < float(before[2])
    predicted = mean.at(pairs.coarse, pairs.interpolated, (np.arange(NY), np.arange(NX)))
    assert abs(float((predicted - both[1])[:, 1].mean())) < 0.05
    again, _, same, _ = fit_centre(pairs.less(4), chosen=kinds)
    assert same == kinds
    assert again.slope is not None


def test_a_regression_counts_for_what_it_is_worth_in_each_variable() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(8, 3, 4, 5, generator=generator, dtype=torch.float64)
    added = torch.stack([2 * left[:, 0], -left[:, 1], torch.zeros_like(left[:, 2])], 1)
    added[:6, 1] = left[:6, 1]  # learned by heart: perfect where it was trained, harmful elsewhere
    weight, grown = _earned(added, left, torch.arange(6), torch.arange(6, 8))
    np.testing.assert_allclose(weight, [0.5, 0.0, 0.0], atol=1e-12)
    assert (grown >= 1).all()
    half = added.clone()
    half[6:, 0] = left[6:, 0] + torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    weight, grown = _earned(half, left, torch.arange(6), torch.arange(6, 8))
    assert 0.2 < float(weight[0]) < 0.8
    assert float(grown[0]) > 0.5


# -- levels ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def column_twin() -> tuple[xr.Dataset, xr.Dataset]:
    """Four variables on three levels, correlated in the vertical and between them, and forecasts of them."""
    rng = np.random.default_rng(5)
    n, levels = 60, np.array([85000.0, 50000.0, 25000.0])
    vertical = np.linalg.cholesky(np.exp(-np.abs(np.subtract.outer(np.arange(3), np.arange(3))) / 2.0))
    between = np.linalg.cholesky(0.4 + 0.6 * np.eye(4))

    def draw(width: float) -> np.ndarray:
        white = np.stack([smooth(rng, n, width=width) for _ in range(12)], 1).reshape(n, 4, 3, NY, NX)
        return np.asarray(np.einsum("vw,lk,nwkyx->nvlyx", between, vertical, white))

    truth, error = draw(1.5), draw(1.0)
    scale = np.array([5.0, 2e-3, 8.0, 8.0])[:, None, None, None]
    centre = np.array([270.0, 5e-3, 10.0, 0.0])[:, None, None, None]
    size = np.array([0.4, 0.6, 0.5, 0.5])[:, None, None, None]
    dims = ("time", "pressure", "latitude", "longitude")
    coords = {
        "time": pd.date_range("2021-01-01", periods=n, freq="24h"),
        "pressure": ("pressure", levels, {"units": "Pa", "standard_name": "air_pressure"}), "latitude": LATITUDE, "longitude": LONGITUDE,
    }  # fmt: skip
    units = {"t": "K", "q": "kg kg-1", "u": "m s-1", "v": "m s-1"}

    def ds(values: np.ndarray) -> xr.Dataset:
        return xr.Dataset({k: (dims, values[:, i], {"units": u}) for i, (k, u) in enumerate(units.items())}, coords=coords)

    return ds(centre + scale * (truth + size * error)), ds(centre + scale * truth)


def test_four_variables_on_three_levels_from_partial_columns(column_twin: tuple[xr.Dataset, xr.Dataset]) -> None:
    forecasts, truth = column_twin
    train = slice(0, 48)
    model = xgenda.train(
        forecasts.isel(time=train),
        target=truth.isel(time=train),
        task="background",
        anchor="hybrid",
        time_features="none",
        **FAST,
    )
    assert [v.name for v in model.spec.variables][:4] == ["t@25000Pa", "t@50000Pa", "t@85000Pa", "q@25000Pa"]
    late = slice(48, 60)
    background, true = forecasts.isel(time=late), truth.isel(time=late)
    rng = np.random.default_rng(0)
    seen = xr.DataArray(rng.random((NY, NX)) < 0.12, dims=("latitude", "longitude"))
    high = xr.DataArray(rng.random((NY, NX)) < 0.5, dims=("latitude", "longitude"))  # fewer reach the upper levels
    aloft = (true.pressure >= 85000.0) | high
    columns = true.where(seen & aloft)
    error = {"t": 0.4, "q": 2e-4, "u": 0.6, "v": 0.6}
    analysis = xgenda.assimilate(background, columns, model=model, error=error, members=8, seed=0, steps=6)
    assert analysis.t.dims == ("member", "time", "pressure", "latitude", "longitude")
    for name in error:
        squares = [
            ((f - true[name]) ** 2).mean(("time", "latitude", "longitude"))
            for f in (analysis[name].mean("member"), background[name])
        ]
        assert bool((squares[0] < squares[1]).all()), name


# -- forecasts ------------------------------------------------------------------------------------------------------------------


def test_a_series_teaches_what_becomes_of_a_state(twin: Any) -> None:
    rng = np.random.default_rng(7)
    t = np.zeros((80, NY, NX))
    shocks = smooth(rng, 80)
    for k in range(1, 80):
        t[k] = 0.8 * t[k - 1] + 0.6 * shocks[k]
    series = dataset(280 + 5 * t, 0.01 + 1e-3 * smooth(rng, 80), every="24h")
    model = xgenda.train(series, task="forecast", lag="24h", anchor="hybrid", time_features="none", **FAST)
    state = series.isel(time=[70, 60])
    later = state.genda.forecast(model=model, members=100, seed=0, steps=8, batch_size=100)
    assert later.t.dims == ("member", "time", "latitude", "longitude")
    assert (later.time.values == series.time.values[[71, 61]]).all()
    expected = 280 + 0.8 * (state.t.values - 280)
    assert np.abs(later.t.mean("member").values - expected).mean() < 1.5
    assert float(later.t.std("member").mean()) == pytest.approx(3.0, rel=0.25)
    # an ensemble: one forecast of each member, the same whoever else is there
    ensemble = later.isel(member=slice(0, 3))
    following = xgenda.forecast(ensemble, model=model, seed=1, steps=8)
    assert following.t.shape == ensemble.t.shape
    assert (following.time.values == later.time.values + np.timedelta64(24, "h")).all()
    two = xgenda.forecast(ensemble.isel(member=slice(0, 2)).chunk(time=1), model=model, seed=1, steps=8)
    assert two.t.chunks is not None
    np.testing.assert_allclose(two.t.values, following.t.values[:2], atol=1e-3)
    with pytest.raises(OptionError, match="members=2 has no effect on an ensemble"):
        xgenda.forecast(ensemble, model=model, members=2)
    with pytest.raises(ModelNotFoundError, match=r"is for 'forecast'; type ds.genda.forecast\(model=...\)"):
        state.genda.assimilate(None, model=model)
    with pytest.raises(OptionError, match="task='forecast' needs lag"):
        xgenda.train(series, task="forecast", **FAST)


# -- bad input ------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_on(twin: Any) -> None:
    forecasts, truth = twin

    def refused(error: type[Exception], match: str, ds: Any = forecasts, **options: Any) -> None:
        with pytest.raises(error, match=match):
            xgenda.train(ds, **{"task": "background", "target": truth, **FAST, **options})

    refused(OptionError, r"task='background' needs pairs: xgenda.train\(forecasts, target=truth.*lag='48h'", target=None)
    refused(OptionError, "lag='48h' has no effect with target", lag="48h")
    refused(OptionError, "lag=48 is not accepted; give a time span", target=None, lag=48)
    refused(OptionError, "lag='soon' is not accepted", target=None, lag="soon")
    refused(OptionError, "lag='48h' belongs to task='background'; pass it too", task="prior", lag="48h", target=None)
    refused(OptionError, "lead_time=True has no effect with lag", target=None, lag="24h", lead_time=True)
    refused(OptionError, "ds has no variable 'q'|lacks|no 'q'", ds=forecasts[["t"]])
    refused(
        UnitsError,
        r"ds\['q'\]: Units 'm s-1' cannot be converted",
        ds=forecasts.assign(q=forecasts.q.assign_attrs(units="m s-1")),
    )
    refused(
        GridError,
        r"The forecasts are on the grid 3 x 4.*ds.genda.regrid\(target\)",
        ds=forecasts.coarsen(latitude=2, longitude=2).mean(),
    )
    late = forecasts.assign_coords(time=forecasts.time + np.timedelta64(3650, "D"))
    refused(OptionError, "ds has none of the times of target", ds=late)
    refused(CoordinateError, "ds has no lead time for each time", lead_time=True)
    refused(OptionError, "factor=4 has no effect with task='background'", factor=4)
    refused(OptionError, "stages='single' has no effect", stages="single")
    refused(OptionError, "neighbours=.* has no effect", neighbours=(-1, 0))
    masked = truth.where(truth.longitude > 2)
    refused(StateError, "cells that are NaN at all times, and task='background' has no mask", target=masked)
    with pytest.raises(OptionError, match="ds holds some more than once"):
        xgenda.train(xr.concat([truth, truth], "time"), task="background", lag="24h", **FAST)


def test_forecasts_in_other_units_are_converted(twin: Any) -> None:
    forecasts, truth = twin
    celsius = forecasts.assign(t=(forecasts.t - 273.15).assign_attrs(forecasts.t.attrs, units="degC"))
    found = [xgenda.train(f, target=truth, task="background", anchor="eof", **FAST) for f in (forecasts, celsius)]
    assert found[0].spec.options["unit"] == pytest.approx(found[1].spec.options["unit"], rel=1e-5)


def test_what_cannot_be_assimilated(trained: xgenda.GenerativeModel, twin: Any, obs: xr.Dataset) -> None:
    background = twin[0].isel(time=[3])
    options: dict[str, Any] = {"model": trained, "error": ERROR, "members": 2, "steps": 4}
    holed = background.copy(deep=True)
    holed.t[0, 2, 3] = np.nan
    with pytest.raises(StateError, match="'t'.*NaN"):
        holed.genda.assimilate(obs, **options)
    lazy = holed.chunk(time=1).genda.assimilate(obs, **options)
    with pytest.raises(StateError, match="'t'.*NaN"):
        lazy.compute()
    with pytest.raises(GridError, match="works on the grid 6 x 8"):
        background.isel(latitude=slice(1, None)).genda.assimilate(obs, **options)
    with pytest.raises(CoordinateError, match="takes the season or the hour, and ds has no time"):
        background.isel(time=0, drop=True).genda.assimilate(obs.isel(time=0, drop=True), **options)
    with pytest.raises(StateError, match="Other units"):
        background.assign(t=(background.t * 10).assign_attrs(background.t.attrs)).genda.assimilate(obs, **options)
    with pytest.raises(ModelNotFoundError, match=r"is for 'background'; type ds.genda.assimilate\(obs, model=...\)"):
        background.genda.downscale(model=trained)
    with pytest.raises(ModelNotFoundError, match="is for 'background'; train one for this"):
        background.genda.forecast(model=trained)
    with pytest.raises(OptionError, match="tile=4 has no effect"):
        xgenda.plan(background, model=trained, tile=4)

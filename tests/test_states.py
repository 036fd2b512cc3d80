"""States on grids of any kind, on levels, and with masks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import xgenda
from xgenda import states
from xgenda.curvilinear import CurvilinearGrid, PointSet, grid_from_dict
from xgenda.diffusion.covariances import DENSE_LIMIT, SphereKernel
from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import CoordinateError, GridError, OptionError, StateError
from xgenda.observations.quality import Quality, QualityControl
from xgenda.spherical import unit_vectors

RADIUS = 6_371_229.0
LENGTH, STD, ERROR = 600e3, 2.0, 0.7


def field(values: np.ndarray, latitude: np.ndarray, longitude: np.ndarray, dims: tuple[str, ...] = ("y", "x")) -> xr.Dataset:
    return xr.Dataset(
        {"t2m": (dims, values, {"units": "K", "standard_name": "air_temperature"})},
        coords={
            "lat": (dims, latitude, {"standard_name": "latitude", "units": "degrees_north"}),
            "lon": (dims, longitude, {"standard_name": "longitude", "units": "degrees_east"}),
        },
    )


def bent(ny: int = 7, nx: int = 9) -> xr.Dataset:
    """Return a field on a grid whose rows and columns are no parallels and meridians, across the date line."""
    i, j = np.meshgrid(np.arange(ny), np.arange(nx), indexing="ij")
    latitude, longitude = 45 + 2.0 * i + 0.4 * j, 170 + 2.5 * j - 0.6 * i
    return field(280 + np.sin(i / 2.0) + np.cos(j / 3.0), latitude, (longitude + 180) % 360 - 180)


def table(latitude: np.ndarray, longitude: np.ndarray, values: np.ndarray, **more: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"latitude": latitude, "longitude": longitude, "t2m": values, **more})


def exponential(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return STD^2 exp(-d / LENGTH), with d by the haversine formula."""
    (p, q), (r, s) = (tuple(np.radians(np.ravel(c)) for c in x) for x in (a, b))
    h = np.sin((p[:, None] - r) / 2) ** 2 + np.cos(p)[:, None] * np.cos(r) * np.sin((q[:, None] - s) / 2) ** 2
    return STD**2 * np.exp(-2 * RADIUS * np.arcsin(np.sqrt(h)) / LENGTH)


def posterior(ds: xr.Dataset, obs: object, members: int = 400, **options: object) -> xr.Dataset:
    prior = xgenda.gaussian_prior(ds, length_scale=LENGTH, std=STD)
    return xgenda.assimilate(ds, obs, model=prior, error=ERROR, members=members, seed=0, background_check=None, **options)


def exact(ds: xr.Dataset, obs: object) -> np.ndarray:
    """Return the posterior mean of the library's model in closed form, flat."""
    from xgenda.preparation import prepare

    prior = xgenda.gaussian_prior(ds, length_scale=LENGTH, std=STD)
    from xgenda import engine

    setup = prepare(ds, obs, prior, ERROR, None, None, None, None)
    job = setup.job((0,), 0, None, "cpu", False)
    _, _, request = engine.moments(job, *(a.values[None] for a in setup.arrays))
    return prior.moments(request)[0][0].numpy()


def test_a_curvilinear_state_has_the_closed_form() -> None:
    ds = bent()
    rows, columns = np.array([1, 3, 5, 2]), np.array([2, 4, 1, 7])
    places = (ds.lat.values[rows, columns], ds.lon.values[rows, columns])
    values = ds.t2m.values[rows, columns] + np.array([1.0, -0.5, 0.3, 0.8])
    obs = table(*places, values)
    everywhere = (ds.lat.values, ds.lon.values)
    gain = exponential(everywhere, places) @ np.linalg.inv(exponential(places, places) + ERROR**2 * np.eye(4))
    expected = ds.t2m.values.ravel() + gain @ (values - ds.t2m.values[rows, columns])
    assert exact(ds, obs)[0] == pytest.approx(expected, abs=1e-8)
    analysis = posterior(ds, obs)
    assert analysis.t2m.dims == ("member", "y", "x")
    assert analysis.lat.equals(ds.lat)
    left = STD**2 - (gain * exponential(everywhere, places)).sum(1)
    apart = (analysis.t2m.mean("member").values.ravel() - expected) / np.sqrt(left / 400)
    assert np.abs(apart).max() < 4.5


def test_two_ways_to_write_a_grid_are_one_state() -> None:
    """Latitude and longitude as axes, or as fields: the same analysis where observations lie on cells."""
    plain = xgenda.tutorial.open_dataset("europe-t2m-forecast").isel(time=0, latitude=slice(0, 30, 3), longitude=slice(0, 40, 4))
    plain = plain[["t2m"]].drop_vars("time")
    longitude, latitude = np.meshgrid(plain.longitude, plain.latitude)
    full = field(plain.t2m.transpose("latitude", "longitude").values.astype(float), latitude, longitude)
    obs = table(latitude[2:6, 3].ravel(), longitude[2:6, 3].ravel(), plain.t2m.values[2:6, 3] + 1.0)
    ours = exact(full, obs).reshape(full.t2m.shape)
    theirs = exact(plain, obs).reshape(full.t2m.shape)[::-1]  # latitude ascends in model order
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_rotated_pole_needs_no_two_dimensional_coordinates() -> None:
    y, x = np.linspace(-4, 4, 6), np.linspace(-5, 5, 8)
    ds = xr.Dataset(
        {"t2m": (("rlat", "rlon"), np.full((6, 8), 280.0), {"units": "K", "grid_mapping": "pole"}), "pole": ((), 0)},
        coords={
            "rlat": ("rlat", y, {"standard_name": "grid_latitude"}),
            "rlon": ("rlon", x, {"standard_name": "grid_longitude"}),
        },
    )
    ds.pole.attrs = {
        "grid_mapping_name": "rotated_latitude_longitude", "grid_north_pole_latitude": 39.25, "grid_north_pole_longitude": -162.0,
    }  # fmt: skip
    analysis = posterior(ds, table(np.array([50.75]), np.array([18.0]), np.array([281.0])), members=2)
    assert set(analysis.coords) == {"member", "rlat", "rlon"}
    assert analysis.pole.attrs == ds.pole.attrs
    increment = exact(ds, table(np.array([50.75]), np.array([18.0]), np.array([281.0])))[0].reshape(6, 8) - 280
    assert np.unravel_index(increment.argmax(), (6, 8))[0] in (2, 3)  # around the equator of the rotated pole
    assert np.unravel_index(increment.argmax(), (6, 8))[1] in (3, 4)


def test_a_masked_grid_is_the_set_of_its_valid_cells() -> None:
    ds = xgenda.tutorial.open_dataset("europe-t2m-forecast").isel(time=0, latitude=slice(0, 30, 3), longitude=slice(0, 40, 4))
    ds = ds[["t2m"]].drop_vars("time").transpose("latitude", "longitude").astype(float)
    rng = np.random.default_rng(0)
    land = rng.random(ds.t2m.shape) < 0.3
    land[4:7, 5] = False
    ocean = ds.where(~xr.DataArray(land, dims=("latitude", "longitude")))
    longitude, latitude = np.meshgrid(ds.longitude, ds.latitude)
    obs = table(latitude[4:7, 5], longitude[4:7, 5], ds.t2m.values[4:7, 5] + 1.0)
    wet = field(ds.t2m.values[~land], latitude[~land], longitude[~land], ("cell",))
    masked = posterior(ocean, obs, members=3)
    assert np.array_equal(np.isnan(masked.t2m.values).all(0), land)
    assert not np.isnan(masked.t2m.values[:, ~land]).any()
    expected = exact(wet, obs)[0]
    found = exact(ocean, obs)[0].reshape(land.shape)[::-1][~land]
    assert found == pytest.approx(expected, abs=1e-8)
    points = posterior(wet, obs, members=2)
    assert points.t2m.dims == ("member", "cell")


def test_observations_at_the_coast() -> None:
    """More than half of the weight on land: refused; less: the sea around it counts."""
    values = np.full((2, 4), 280.0)
    values[:, 2:] = np.nan
    ds = xr.Dataset(
        {"t2m": (("latitude", "longitude"), values, {"units": "K"})},
        coords={"latitude": [0.0, 1.0], "longitude": [0.0, 1.0, 2.0, 3.0]},
    )
    obs = table(np.full(4, 0.5), np.array([0.5, 1.3, 1.7, 2.5]), np.full(4, 281.0))
    prior = xgenda.gaussian_prior(ds, length_scale=LENGTH, std=STD)
    departures = xgenda.innovations(ds, obs, model=prior, error=ERROR, background_check=None)
    assert departures.quality_code.values.tolist() == [Quality.USED, Quality.USED, Quality.LAND, Quality.LAND]
    assert departures.innovation.values[:2] == pytest.approx(1.0)
    assert np.isnan(departures.innovation.values[2:]).all()
    # without a model there is no mask: what the background does not say is not used
    alone = xgenda.innovations(ds, obs, error=ERROR)
    assert alone.quality_code.values.tolist() == [Quality.USED] + [Quality.OPERATOR] * 3


def columns_of(levels: list[float], units: str = "hPa") -> xr.Dataset:
    """Return two variables, one of them on levels, on a small grid."""
    shape = (len(levels), 3, 4)
    values = 200.0 + 0.08 * np.array(levels)[:, None, None] + np.arange(12.0).reshape(3, 4) / 10
    ds = xr.Dataset(
        {
            "t": (("level", "latitude", "longitude"), values, {"units": "K", "standard_name": "air_temperature"}),
            "mslp": (("latitude", "longitude"), np.full(shape[1:], 1e5), {"units": "Pa"}),
        },
        coords={
            "level": ("level", levels, {"units": units, "positive": "down"}),
            "latitude": [0.0, 2, 4],
            "longitude": [0.0, 2, 4, 6],
        },
    )
    return ds


def test_levels_are_channels_and_come_back_as_levels() -> None:
    ds = columns_of([1000.0, 500.0, 850.0])
    state = states.enter(ds)
    assert list(state.ds.data_vars) == ["mslp", "t@50000Pa", "t@85000Pa", "t@100000Pa"]
    back = state.leave(state.ds)
    xr.testing.assert_identical(back, ds)


@pytest.mark.parametrize("units", ["hPa", "Pa", "mbar"])
def test_an_observation_between_levels(units: str) -> None:
    """Linear in the logarithm of pressure; its increment is that of the covariance between levels."""
    levels = np.array([300.0, 500.0, 850.0, 1000.0])
    ds = columns_of(list(levels * (100 if units == "Pa" else 1)), units)
    prior = xgenda.gaussian_prior(ds, length_scale=LENGTH, std={"t": STD, "mslp": 100.0}, vertical_scale=0.5)
    obs = pd.DataFrame({"latitude": [2.0, 2.0], "longitude": [2.0, 2.0], "pressure": [60000.0, 20000.0], "t": [250.0, 250.0]})
    ds_obs = xr.Dataset({"t": ("obs", obs.t)}, coords={k: ("obs", obs[k]) for k in ("latitude", "longitude", "pressure")})
    ds_obs.pressure.attrs["units"] = "Pa"
    departures = xgenda.innovations(ds, ds_obs, model=prior, error=ERROR, background_check=None)
    part = np.log(600 / 500) / np.log(850 / 500)
    column = ds.t.values[:, 1, 1]
    assert departures.background.values[0] == pytest.approx((1 - part) * column[1] + part * column[2], abs=1e-9)
    assert departures.quality_code.values.tolist() == [Quality.USED, Quality.DOMAIN]
    analysis = xgenda.assimilate(ds, ds_obs, model=prior, error=ERROR, members=2000, seed=0, background_check=None)
    assert analysis.t.dims == ("member", "level", "latitude", "longitude")
    between = np.exp(-np.abs(np.log(levels)[:, None] - np.log(levels)) / 0.5) * STD**2
    weights = np.array([0, 1 - part, part, 0])
    gain = between @ weights / (weights @ between @ weights + ERROR**2)
    increment = gain * (250.0 - departures.background.values[0])
    found = analysis.t.mean("member").values[:, 1, 1] - column
    assert found == pytest.approx(increment, abs=4.5 * STD / np.sqrt(2000))
    assert analysis.mslp.mean().item() == pytest.approx(1e5, abs=4.5 * 100 / np.sqrt(2000))


def test_depth_counts_downward() -> None:
    ds = columns_of([0.0, 10.0, 50.0], "m").rename(level="depth")
    state = states.enter(ds)
    assert [n for n in state.ds.data_vars if n != "mslp"] == ["t@-0m", "t@-10m", "t@-50m"]
    assert states.columns(list(state.ds.data_vars))[1][2:] == ((0.0, 10.0, 50.0), "depth")
    heights = ds.rename(depth="height").assign_coords(height=("height", [2.0, 10.0, 100.0], {"units": "m", "positive": "up"}))
    assert states.columns(list(states.enter(heights).ds.data_vars))[1][3] == "height"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ds: ds.assign_coords(level=("level", [1000.0, 500, 850])), r"'level' has no units.*attrs\['units'\] = 'hPa'"),
        (
            lambda ds: ds.assign_coords(level=("level", [1000.0, 500, 500], {"units": "hPa"})),
            r"repeat a value.*drop_duplicates\('level'\)",
        ),
        (
            lambda ds: ds.rename(level="lev").assign_coords(lev=("lev", [1.0, 2, 3], {"units": "m"})),
            r"whether it counts up or down.*attrs\['positive'\] = 'down'",
        ),
        (
            lambda ds: ds.rename(level="band").drop_vars("band"),
            r"extra dimension 'band' of size 3; .*select one entry: ds.isel\(band=0\)",
        ),
    ],
)
def test_levels_that_cannot_be_read(change, message: str) -> None:
    with pytest.raises(CoordinateError, match=message):
        xgenda.gaussian_prior(change(columns_of([1000.0, 500.0, 850.0])), length_scale=LENGTH, std=STD)


def test_a_model_of_levels_takes_what_it_needs() -> None:
    """Levels in another order and other units, and more of them than the model knows."""
    few = columns_of([1000.0, 500.0])
    prior = xgenda.gaussian_prior(few, length_scale=LENGTH, std={"t": STD, "mslp": 100.0})
    more = columns_of([30000.0, 50000.0, 85000.0, 100000.0], "Pa")
    analysis = xgenda.assimilate(
        more, few.isel(latitude=[1], longitude=[1]).drop_vars("t"), model=prior, error=50.0, members=2, seed=0
    )
    assert analysis.level.values.tolist() == [50000.0, 100000.0]
    with pytest.raises(OptionError, match=r"ds lacks 't' at a pressure of 30000 Pa, which the model needs; it has 50000, 100000"):
        xgenda.assimilate(few, None, model=xgenda.gaussian_prior(more, length_scale=LENGTH, std=STD), members=2)


def test_masks_must_not_change_within_a_sample(climate: xr.Dataset) -> None:
    part = climate.where((climate.latitude < 30) | (climate.time != climate.time[0]))
    with pytest.raises(StateError, match=r"holds NaN in .* cells"):
        xgenda.gaussian_prior(part)


@pytest.mark.parametrize("covariance", ["eof", "localized"])
def test_a_masked_sample(climate: xr.Dataset, covariance: str, tmp_path) -> None:
    """The model of a masked sample is that of its valid cells; its file keeps the mask."""
    land = climate.latitude > float(climate.latitude[4])
    ocean = climate.where(~land).isel(latitude=slice(0, 7), longitude=slice(0, 9))
    options = {"rank": 5} if covariance == "eof" else {"radius": 2000e3}
    whole = xgenda.gaussian_prior(ocean, inflation=1.0, **options)
    part = xgenda.gaussian_prior(ocean.isel(latitude=slice(0, 5)), inflation=1.0, **options)
    assert whole.spec.scaling.std == pytest.approx(part.spec.scaling.std)
    here = ocean.isel(time=[0])
    obs = here.isel(latitude=[2], longitude=[3])
    a = xgenda.assimilate(here, obs, model=whole, error=0.3, members=500, seed=0)
    b = xgenda.assimilate(here.isel(latitude=slice(0, 5)), obs, model=part, error=0.3, members=500, seed=0)
    name = next(iter(climate.data_vars))
    spread = float(b[name].std())
    difference = a[name].isel(latitude=slice(0, 5)).mean("member") - b[name].mean("member")
    assert float(abs(difference).max()) < 4.5 * spread * np.sqrt(2 / 500)
    assert bool(a[name].isel(latitude=slice(5, None)).isnull().all())
    path = whole.save(tmp_path / "masked.safetensors")
    again = xgenda.load_model(path)
    assert np.array_equal(again.valid, whole.valid)
    assert "29 % of the cells are masked" in repr(again)
    c = xgenda.assimilate(here, obs, model=again, error=0.3, members=2, seed=0)
    assert float(abs(c - a.isel(member=slice(2)))[name].max()) < 1e-3


def test_training_on_a_masked_curvilinear_grid(climate: xr.Dataset, tmp_path) -> None:
    part = climate.isel(latitude=slice(0, 8), longitude=slice(0, 8))
    longitude, latitude = np.meshgrid(part.longitude, part.latitude)
    name = next(iter(part.data_vars))
    values = part[name].transpose("time", "latitude", "longitude").values.astype(float)
    ds = xr.Dataset(
        {name: (("time", "y", "x"), values, part[name].attrs)},
        coords={"time": part.time, "latitude": (("y", "x"), latitude), "longitude": (("y", "x"), longitude)},
    )
    ds[name] = ds[name].where(~((ds.y > 5) & (ds.x > 4)))
    model = xgenda.train(ds, steps=3, width=8, progress=False, out=tmp_path / "model.safetensors")
    again = xgenda.load_model(tmp_path / "model.safetensors")
    assert isinstance(again.spec.grid, CurvilinearGrid)
    assert again.spec.grid.same_as(model.spec.grid)
    obs = table(latitude[2:4, 3], longitude[2:4, 3], values[0, 2:4, 3] + 0.5).rename(columns={"t2m": name})
    analysis = xgenda.assimilate(ds.isel(time=0), obs, model=again, error=0.1, members=4, seed=0, steps=8)
    land = np.isnan(ds[name].values[0])
    assert np.array_equal(np.isnan(analysis[name].values).all(0), land)
    assert np.isfinite(analysis[name].values[:, ~land]).all()
    assert analysis[name].mean("member").values[2:4, 3] == pytest.approx(values[0, 2:4, 3] + 0.5, abs=0.3)
    with pytest.raises(GridError, match=r"the network needs rows and columns"):
        xgenda.train(ds.stack(cell=("y", "x")).reset_index("cell"), steps=1)


def test_grids_of_all_kinds_are_stored() -> None:
    ds = bent()
    for grid in (CurvilinearGrid(ds.lat.values, ds.lon.values), PointSet(ds.lat.values.ravel(), ds.lon.values.ravel())):
        again = grid_from_dict(grid.to_dict())
        assert again.same_as(grid)
        assert np.array_equal(again.latitude, grid.latitude)


@settings(max_examples=15, deadline=None)
@given(
    st.permutations(["t", "mslp"]), st.permutations(["level", "latitude", "longitude"]),
    st.lists(st.sampled_from([10.0, 100, 250, 500, 700, 850, 925, 1000]), min_size=1, max_size=5, unique=True),
)  # fmt: skip
def test_in_and_out_is_nothing(variables: list[str], dims: list[str], levels: list[float]) -> None:
    ds = columns_of(levels)[variables].transpose(*dims)
    state = states.enter(ds)
    xr.testing.assert_identical(state.leave(state.ds), ds)


@pytest.mark.parametrize(("kind", "length", "error"), [("exponential", 1500e3, 0.02), ("matern32", 800e3, 0.01)])
def test_draws_on_many_scattered_cells_have_the_covariance(kind: str, length: float, error: float) -> None:
    """The covariance that kriging from the nodes implies, computed without drawing."""
    rng = np.random.default_rng(0)
    latitude, longitude = np.degrees(np.arcsin(rng.uniform(0.2, 0.8, DENSE_LIMIT + 1))), rng.uniform(-180, 180, DENSE_LIMIT + 1)
    kernel = SphereKernel.at(torch.as_tensor(latitude), torch.as_tensor(longitude), kind, length)
    draw = kernel.draw(NoiseStream([(0, "a", m) for m in range(3)]))
    assert draw.shape == (3, 1, DENSE_LIMIT + 1)
    nodes, index, weight, left = kernel._nearby._made
    some = torch.arange(150)
    places = torch.as_tensor(unit_vectors(*(np.ravel(a) for a in np.meshgrid(*nodes._axes, indexing="ij"))))
    flat = places[index[some]].reshape(-1, 3)
    between = nodes.of_distance(torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist"))
    implied = torch.einsum("ia,iajb,jb->ij", weight[some], between.reshape(150, 16, 150, 16), weight[some]) + torch.diag(
        left[some] ** 2
    )
    assert float((implied - kernel.correlation(some, some)).abs().max()) < error
    assert implied.diagonal() == pytest.approx(np.ones(150), abs=1e-6)


def test_draws_on_a_regional_grid_of_many_cells() -> None:
    """A limited-area model of 3 km: nodes lie over the region only, and what they leave is small."""
    y, x = np.meshgrid(np.arange(80.0), np.arange(80.0), indexing="ij")
    latitude, longitude = 45 + y * 0.027 + 0.002 * x, 10 + x * 0.038 - 0.004 * y
    kernel = SphereKernel.at(torch.as_tensor(latitude.ravel()), torch.as_tensor(longitude.ravel()), "exponential", 100e3)
    assert kernel.draw(NoiseStream([(0, "a", 0)])).shape == (1, 1, 6400)
    nodes, index, weight, left = kernel._nearby._made
    assert float((left**2).mean()) < 0.03
    some = torch.arange(0, 6400, 64)
    flat = torch.as_tensor(unit_vectors(*(np.ravel(a) for a in np.meshgrid(*nodes._axes, indexing="ij"))))[index[some]].reshape(
        -1, 3
    )
    between = nodes.of_distance(torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")).reshape(100, 16, 100, 16)
    implied = torch.einsum("ia,iajb,jb->ij", weight[some], between, weight[some]) + torch.diag(left[some] ** 2)
    assert float((implied - kernel.correlation(some, some)).abs().max()) < 0.01


def test_what_a_model_and_an_analysis_say_of_themselves() -> None:
    ds = columns_of([1000.0, 850.0, 500.0])
    prior = xgenda.gaussian_prior(ds, length_scale=LENGTH, std={"t@50000Pa": 1.0, "t": 2.0, "mslp": 100.0}, vertical_scale=0.5)
    text = repr(prior)
    assert "mslp [Pa], t [K] at 3 levels of pressure, 50000 to 100000 Pa" in text
    assert "t: 600 km, 1 to 2 K; between levels 0.5" in text
    obs = pd.DataFrame({"latitude": [2.0], "longitude": [2.0], "mslp": [1.001e5]})
    analysis = xgenda.assimilate(ds, obs, model=prior, error={"mslp": 50.0}, members=1, seed=0, representativeness=10.0)
    assert analysis.attrs["xgenda_error"] == "{'mslp': 50.0}"
    assert analysis.attrs["xgenda_representativeness"] == "10.0"
    assert "xgenda_window" not in analysis.attrs
    with pytest.warns(
        UserWarning,
        match=r"length_scale=600 for 't2m' is in metres, and the cells of ds are about .* km apart.*length_scale=600000",
    ):
        xgenda.gaussian_prior(bent(), length_scale=600.0, std=1.0)


def test_a_length_scale_too_short_to_draw() -> None:
    rng = np.random.default_rng(0)
    kernel = SphereKernel.at(
        torch.as_tensor(rng.uniform(-90, 90, 6001)), torch.as_tensor(rng.uniform(0, 360, 6001)), "exponential", 20e3
    )
    with pytest.raises(OptionError, match=r"A length scale of 20 km cannot be drawn on 6001 cells"):
        kernel.draw(NoiseStream([(0, "a", 0)]))


def test_quality_control_of_a_point_set() -> None:
    """Stations as the state: an observation at a station is its value, one elsewhere is outside."""
    ds = field(np.array([280.0, 281.0, 282.0]), np.array([50.0, 51, 52]), np.array([10.0, 11, 12]), ("station",))
    obs = table(np.array([50.0, 53.0]), np.array([10.0, 10.0]), np.array([281.0, 281.0]))
    departures = xgenda.innovations(ds, obs, error=ERROR, quality=QualityControl(duplicates=False))
    assert departures.quality_code.values.tolist() == [Quality.USED, Quality.DOMAIN]
    assert departures.innovation.values[0] == pytest.approx(1.0)


@pytest.mark.parametrize("points", [False, True])
def test_maps_of_any_grid(points: bool) -> None:
    from matplotlib import pyplot

    from xgenda.plotting import plot_analysis

    ds = bent()
    if points:
        ds = ds.stack(cell=("y", "x")).reset_index("cell", drop=True)
    ensemble = posterior(ds, table(np.array([50.0]), np.array([180.0]), np.array([282.0])), members=3)
    figure = plot_analysis(ds, ensemble, table(np.array([50.0]), np.array([180.0]), np.array([282.0])))
    dots = figure.axes[1].collections[0]
    assert np.asarray(dots.get_array()) == pytest.approx(ensemble.t2m.mean("member").values.ravel())
    longitude = dots.get_offsets()[:, 0]
    assert np.ptp(longitude) < 30  # across the date line in one piece
    pyplot.close(figure)


def test_chunks_change_nothing(no_compute: None) -> None:
    """A masked field on levels of a bent grid, at three times: nothing is computed early, and the numbers are the same."""
    import dask

    ds = bent()
    times = pd.date_range("2020-01-01", periods=3, freq="6h")
    levels = xr.DataArray([1000.0, 700.0, 400.0], dims="level", attrs={"units": "hPa"})
    full = ds.t2m + xr.DataArray(np.arange(3.0), dims="time") - 0.05 * (1000 - levels)
    full = full.where((xr.DataArray(np.arange(7), dims="y") > 1) | (levels < 900)).assign_attrs(units="K")
    whole = xr.Dataset({"t": full.transpose("level", "x", "time", "y")}).assign_coords(
        time=times, level=("level", levels.values, levels.attrs)
    )
    prior = xgenda.gaussian_prior(whole, length_scale=LENGTH, std=STD, vertical_scale=0.4)
    places = {"latitude": ("obs", ds.lat.values[3, [1, 4, 6]]), "longitude": ("obs", ds.lon.values[3, [1, 4, 6]])}
    obs = xr.Dataset(
        {"t": ("obs", [270.0, 275.0, 268.0])},
        coords={**places, "pressure": ("obs", [850.0, 600.0, 500.0], {"units": "hPa"}), "time": ("obs", times)},
    )
    given = {"model": prior, "error": ERROR, "members": 2, "seed": 0, "background_check": None, "progress": False}
    eager = xgenda.assimilate(whole, obs, **given)
    lazy = xgenda.assimilate(whole.chunk(time=1, level=1).assign_coords(whole.coords), obs, **given)
    assert lazy.t.dims == eager.t.dims == ("member", "level", "x", "time", "y")
    assert lazy.t.chunks is not None
    with dask.config.set(scheduler="synchronous"):
        computed = lazy.compute()
    np.testing.assert_allclose(computed.t, eager.t, rtol=0, atol=1e-9)
    assert np.array_equal(np.isnan(computed.t.isel(member=0)), np.isnan(whole.t))
    flipped = xgenda.assimilate(whole.isel(level=slice(None, None, -1)).transpose("y", "x", "level", "time"), obs, **given)
    xr.testing.assert_allclose(flipped.t.transpose(*eager.t.dims).sel(level=eager.level), eager.t)


@pytest.mark.parametrize("kind", ["bent", "degrees Celsius", "levels", "sample"])
def test_posterior_moments_are_those_of_many_members(kind: str, climate: xr.Dataset) -> None:
    obs: object
    if kind == "levels":
        ds = columns_of([1000.0, 850.0, 500.0])
        prior = xgenda.gaussian_prior(ds, length_scale=LENGTH, std={"t": STD, "mslp": 100.0}, vertical_scale=0.5)
        obs = pd.DataFrame({"latitude": [2.0], "longitude": [2.0], "pressure": [70000.0], "t": [262.0]})
    elif kind == "sample":
        prior = xgenda.gaussian_prior(climate, covariance="eof", rank=5, inflation=1.0)
        ds = climate.isel(time=[0, 3])
        obs = ds.isel(latitude=[2], longitude=[3])
    else:
        ds = bent().where(lambda d: d.x < 7)
        prior = xgenda.gaussian_prior(ds, length_scale=LENGTH, std=STD)
        obs = table(ds.lat.values[3, [1, 4]], ds.lon.values[3, [1, 4]], np.array([283.0, 279.0]))
        if kind == "degrees Celsius":
            ds = ds.map(lambda a: (a - 273.15).assign_attrs(units="degC", standard_name="air_temperature"))
    given = {"model": prior, "error": ERROR, "background_check": None}
    members = xgenda.assimilate(ds, obs, members=2000, seed=0, **given)
    moments = ds.genda.posterior_moments(obs, **given)
    for name in members.data_vars:
        mean, std = moments[name].sel(moment="mean", drop=True), moments[name].sel(moment="std", drop=True)
        assert moments[name].dims == ("moment", *ds[name].dims)
        noise = members[name].std("member") / np.sqrt(2000)
        assert float((abs(members[name].mean("member") - mean) / noise).max()) < 5
        assert float(abs(members[name].std("member") / std - 1).max()) < 0.12
    lazy = ds.chunk(time=1) if "time" in ds.dims else ds.chunk()
    xr.testing.assert_allclose(xgenda.posterior_moments(lazy, obs, **given).compute(), moments, atol=1e-5)


def test_moments_are_for_gaussians(climate: xr.Dataset, tiny_prior) -> None:
    with pytest.raises(OptionError, match=r"has no posterior in closed form; take the moments of members"):
        xgenda.posterior_moments(climate, None, model=tiny_prior)

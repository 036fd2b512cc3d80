"""Priors over functions evaluated at scattered places: closed forms, draws, and the grid as a special case."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import xgenda
from xgenda import forecasts
from xgenda.diffusion.covariances import SphereKernel
from xgenda.diffusion.kriging import ExtendedKernel, Kriged
from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import GridError, OptionError
from xgenda.models.gaussian import GaussianModel
from xgenda.observations.places import at_places, rounded

RADIUS = 6_371_229.0
LATITUDE, LONGITUDE = np.linspace(40, 46, 4), np.linspace(-4, 4, 5)
KINDS = ("exponential", "matern32", "matern52", "gaussian")


def field(latitude: np.ndarray = LATITUDE, longitude: np.ndarray = LONGITUDE, **sizes: int) -> xr.Dataset:
    rng = np.random.default_rng(0)
    shape = (*sizes.values(), len(latitude), len(longitude))
    ds = xr.Dataset(
        {"t": ((*sizes, "latitude", "longitude"), 280 + rng.standard_normal(shape), {"units": "K"})},
        coords={"latitude": latitude, "longitude": longitude},
    )
    if "time" in sizes:
        ds = ds.assign_coords(time=np.datetime64("2020-01-01", "ns") + np.arange(sizes["time"]) * np.timedelta64(1, "D"))
    return ds


def stations(count: int, seed: int = 1, south: float = 40.05, north: float = 45.95, west: float = -3.9) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    return xr.Dataset(
        {"t": ("obs", 280 + rng.standard_normal(count), {"units": "K"})},
        coords={
            "latitude": ("obs", rng.uniform(south, north, count).round(4)),
            "longitude": ("obs", rng.uniform(west, -west, count).round(4)),
        },
    )


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Great-circle distance by the haversine formula, independent of the library's vectors."""
    p, q = np.radians(a)[:, None], np.radians(b)[None]
    h = (
        np.sin((p[..., 0] - q[..., 0]) / 2) ** 2
        + np.cos(p[..., 0]) * np.cos(q[..., 0]) * np.sin((p[..., 1] - q[..., 1]) / 2) ** 2
    )
    return np.asarray(2 * RADIUS * np.arcsin(np.sqrt(h)))


def places(ds: xr.Dataset) -> np.ndarray:
    if ds.latitude.dims == ds.longitude.dims:
        return np.stack([ds.latitude.values, ds.longitude.values], -1)
    return np.stack([a.ravel() for a in np.meshgrid(ds.latitude, ds.longitude, indexing="ij")], -1)


def prior(background: xr.Dataset, representation: Any = "points", **options: Any) -> GaussianModel:
    given: dict[str, Any] = {"length_scale": 300e3, "std": 2.0} | options
    return xgenda.gaussian_prior(background, representation=representation, **given)


def optimal(background: xr.Dataset, obs: xr.Dataset, where: xr.Dataset, error: float) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the posterior at places, by numpy, for std 2 and exponential correlations over 300 km."""
    seen, asked = places(obs), places(where)
    expected = [background.t.interp(latitude=("p", p[:, 0]), longitude=("p", p[:, 1])).values for p in (seen, asked)]
    inner = 4 * np.exp(-distance(seen, seen) / 300e3) + error**2 * np.eye(len(seen))
    cross = 4 * np.exp(-distance(asked, seen) / 300e3)
    mean = expected[1] + cross @ np.linalg.solve(inner, obs.t.values - expected[0])
    return mean, np.sqrt(4 - (cross * np.linalg.solve(inner, cross.T).T).sum(1))


@pytest.mark.parametrize("where", ["grid", "observations", "elsewhere", "finer"])
def test_the_posterior_is_that_of_a_gaussian_process(where: str) -> None:
    background, obs = field(), stations(9)
    at: dict[str, xr.Dataset | None] = {
        "grid": None, "observations": obs, "elsewhere": stations(5, 2).drop_vars("t"), "finer": field(np.linspace(40, 46, 7)).drop_vars("t"),
    }  # fmt: skip
    model, target = prior(background), at[where]
    asked = background if target is None else target
    found = xgenda.posterior_moments(background, obs, model=model, error=0.5, at=target)
    mean, std = optimal(background, obs, asked, 0.5)
    np.testing.assert_allclose(found.t.sel(moment="mean").values.ravel(), mean, atol=2e-6)
    np.testing.assert_allclose(found.t.sel(moment="std").values.ravel(), std, atol=2e-6)
    members = xgenda.assimilate(background, obs, model=model, error=0.5, at=target, members=1500, seed=0).t
    z = (members.mean("member").values.ravel() - mean) / (std / np.sqrt(1500))
    assert np.abs(z).max() < 4
    np.testing.assert_allclose(members.std("member").values.ravel(), std, rtol=0.08)
    if target is not None:
        for name in ("latitude", "longitude"):
            xr.testing.assert_equal(found[name], target[name])
        assert members.dims == ("member", *(("obs",) if where != "finer" else ("latitude", "longitude")))


def test_at_grid_points_it_is_the_gridded_route() -> None:
    background = field(time=2)
    obs = background.isel(latitude=[0, 2], longitude=[1, 4]) + 1.0
    call: dict[str, Any] = {"error": 0.5, "members": 3, "seed": 0}
    gridded, pointwise = (xgenda.assimilate(background, obs, model=prior(background, r), **call) for r in ("grid", "points"))
    assert (gridded.t.values == pointwise.t.values).all()
    one, other = (
        xgenda.assimilate(background, obs, model=prior(background, r), at=background, **call) for r in ("grid", "points")
    )
    assert (one.t.values == gridded.t.values).all()
    assert (other.t.values == gridded.t.values).all()
    # in the tolerance of coordinates in single precision
    near = obs.assign_coords(latitude=obs.latitude.astype("f4"), longitude=obs.longitude + 1e-6)
    moved = xgenda.assimilate(background, near, model=prior(background), **call)
    np.testing.assert_allclose(moved.t.values, gridded.t.values, atol=1e-6)


def test_between_cells_it_differs_from_the_gridded_route_as_it_must() -> None:
    """Interpolation takes variance away between cells; a function has none less there."""
    background = field()
    obs = xr.Dataset({"t": ("obs", [285.0], {"units": "K"})}, coords={"latitude": ("obs", [41.0]), "longitude": ("obs", [-3.0])})
    gridded, pointwise = (
        xgenda.posterior_moments(background, obs, model=prior(background, r), error=1.0) for r in ("grid", "points")
    )
    mean, _ = optimal(background, obs, background, 1.0)
    np.testing.assert_allclose(pointwise.t.sel(moment="mean").values.ravel(), mean, atol=2e-6)
    assert np.abs(gridded.t.sel(moment="mean").values.ravel() - mean).max() > 0.1


def test_where_stations_are_denser_than_cells_it_is_nearer_to_the_truth() -> None:
    """Than the gridded route with whatever error of representativeness: at the cells, and at withheld stations."""
    rng, times = np.random.default_rng(2), 16
    background = field(time=times) * 0 + 280.0
    background.t.attrs["units"] = "K"
    at = torch.as_tensor(rng.uniform((40.1, -3.9), (45.9, 3.9), (120, 2))).T.round(decimals=4)
    kernel = SphereKernel(torch.as_tensor(LATITUDE), torch.as_tensor(LONGITUDE), "exponential", 300e3)
    drawn = 280 + 2 * ExtendedKernel(kernel, *at, 120).draw(NoiseStream([(0, "t", k) for k in range(times)]))[:, 0].numpy()
    network = xr.Dataset(
        {"t": (("time", "obs"), drawn[:, 20:], {"units": "K"})},
        coords={"time": background.time, "latitude": ("obs", at[0].numpy()), "longitude": ("obs", at[1].numpy())},
    )
    given, withheld = network.isel(obs=slice(0, 80)), network.isel(obs=slice(80, None))
    given = given + 0.3 * rng.standard_normal(given.t.shape)
    given.t.attrs["units"] = "K"
    table = given.stack(row=("time", "obs")).reset_index("row").drop_vars("obs")
    call: dict[str, Any] = {"error": 0.3, "background_check": None}

    def errors(analysis: xr.Dataset, there: xr.Dataset | None) -> tuple[float, float]:
        mean = analysis.t.sel(moment="mean")
        seen = (
            mean.interp(latitude=withheld.latitude, longitude=withheld.longitude) if there is None else there.t.sel(moment="mean")
        )
        cells = drawn[:, :20].reshape(mean.shape)
        return float(((mean - cells) ** 2).mean() ** 0.5), float(((seen.values - withheld.t.values) ** 2).mean() ** 0.5)

    model = prior(background)
    grid, there = (
        xgenda.posterior_moments(background, table, model=model, at=at, **call) for at in (None, withheld.drop_vars("t"))
    )
    best = errors(grid, there)
    for representativeness in (0.0, 0.5, 1.0, 1.5):
        gridded = xgenda.posterior_moments(
            background, table, model=prior(background, "grid"), representativeness=representativeness, **call
        )
        cells, elsewhere = errors(gridded, None)
        assert best[0] < 0.98 * cells
        assert best[1] < 0.9 * elsewhere


def test_members_are_the_same_wherever_they_are_asked_for() -> None:
    background, obs, where = field(), stations(9), stations(6, 3).drop_vars("t")
    call: dict[str, Any] = {"model": prior(background), "error": 0.5, "members": 3, "seed": 0}
    grid = xgenda.assimilate(background, obs, **call)
    mixed = xr.Dataset(
        coords={
            "latitude": ("place", np.r_[where.latitude, 42.0, obs.latitude[:2]]),
            "longitude": ("place", np.r_[where.longitude, 2.0, obs.longitude[:2]]),
        }
    )
    some = xgenda.assimilate(background, obs, at=mixed, **call)
    # a cell among the places is that cell of the analysis on the grid: what is asked for changes nothing
    np.testing.assert_allclose(some.t[:, 6], grid.t.sel(latitude=42, longitude=2), atol=1e-12)
    again = xgenda.assimilate(background, obs, at=mixed.isel(place=slice(None, None, -1)), **call)
    np.testing.assert_allclose(again.t[:, ::-1], some.t, atol=1e-12)
    shuffled = xgenda.assimilate(background, obs.isel(obs=[3, 1, 8, 0, 2, 7, 5, 4, 6]), at=mixed, **call)
    np.testing.assert_allclose(shuffled.t, some.t, atol=1e-12)
    at_table = mixed.to_dataframe().reset_index(drop=True)
    assert isinstance(at_table, pd.DataFrame)
    np.testing.assert_array_equal(xgenda.assimilate(background, obs, at=at_table, **call).t, some.t)
    # far fewer members, and the rows of two places
    alone = xgenda.assimilate(background, obs, **{**call, "members": 1})
    np.testing.assert_allclose(alone.t[0], grid.t[0], atol=1e-12)


def test_chunks_and_times_with_other_elsewherechange_nothing() -> None:
    background = field(time=3)
    moving = xr.concat(
        [stations(4, 5 + k).expand_dims(time=[t]).stack(row=("time", "obs")).reset_index("row") for k, t in enumerate(background.time.values)],
        "row",
    ).drop_vars("obs")  # fmt: skip
    where = (
        stations(3, 9)
        .drop_vars("t")
        .assign_coords(time=("obs", background.time.values[[0, 0, 2]]), station=("obs", ["a", "b", "c"]))
    )
    call: dict[str, Any] = {"model": prior(background), "error": 0.5, "members": 2, "seed": 0}
    for at in (None, where):
        eager = xgenda.assimilate(background, moving, at=at, **call)
        lazy = xgenda.assimilate(background.chunk(time=2), moving, at=at, **call)
        assert lazy.t.chunks is not None
        np.testing.assert_allclose(lazy.t, eager.t, atol=1e-12)
        xr.testing.assert_equal(eager.time, background.time)
        alone = xgenda.assimilate(background.isel(time=[1]), moving, at=at, **call)
        np.testing.assert_allclose(alone.t, eager.t.isel(time=[1]), atol=1e-12)
    own = moving.isel(row=np.flatnonzero(moving.time.values == background.time.values[2]))
    mean, _ = optimal(background.isel(time=2, drop=True), own, background, 0.5)
    found = xgenda.posterior_moments(background, moving, model=prior(background), error=0.5)
    np.testing.assert_allclose(found.t.sel(moment="mean").isel(time=2).values.ravel(), mean, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_covariance_of_the_kernel_everywhere(kind: str) -> None:
    """Closer than statistics could tell: the covariance that the weights of kriging imply, over more places than are looked at."""
    latitude, longitude = np.linspace(40, 47.5, 16), np.linspace(0, 7.5, 16)
    kernel = SphereKernel(torch.as_tensor(latitude), torch.as_tensor(longitude), kind, 200e3)
    rng = np.random.default_rng(0)
    where = [torch.as_tensor(rng.uniform(*ends, 80)) for ends in ((40, 47.5), (0, 7.5))]
    extended = ExtendedKernel(kernel, *where, 60)
    made = Kriged(kernel, *where)
    cells, points = torch.arange(256), 256 + torch.arange(80)
    exact = extended.correlation(torch.cat([cells, points]), torch.cat([cells, points]))
    across = made.rows @ exact[:256, :256]
    assert (across - exact[256:, :256]).abs().max() < 0.005
    implied = made.rows @ across.T + made.root @ made.root.T
    assert (implied - exact[256:, 256:]).abs().max() < 0.005
    np.testing.assert_allclose(implied.diagonal(), 1.0, atol=1e-3)
    noise = [(0, "t", k) for k in range(4000)]
    drawn = extended.draw(NoiseStream(noise))[:, 0]
    torch.testing.assert_close(drawn[:, :256], kernel.draw(NoiseStream(noise))[:, 0], rtol=0, atol=0)
    some = torch.arange(240, 336, 3)
    sampled = torch.cov(drawn[:, some].T)
    expected = exact[some[:, None], some]
    assert ((sampled - expected) / ((1 + expected**2) / 4000).sqrt()).abs().max() < 4.5


def test_an_observed_place_does_not_depend_on_the_others() -> None:
    kernel = SphereKernel(torch.as_tensor(LATITUDE), torch.as_tensor(LONGITUDE), "exponential", 300e3)
    here, there = [torch.tensor([41.3, 44.2]), torch.tensor([0.3, 1.2])], [torch.tensor([42.9]), torch.tensor([-2.0])]
    keys = [(0, "t", k) for k in range(3)]
    few = ExtendedKernel(kernel, *here, 2).draw(NoiseStream(keys), 2)
    more = ExtendedKernel(kernel, *(torch.cat(p) for p in zip(here, there, strict=True)), 2).draw(NoiseStream(keys), 2)
    torch.testing.assert_close(more[..., :22], few, rtol=0, atol=1e-12)


def test_dateline_and_poles() -> None:
    """On a globe, a place is one place whichever way its longitude is written; at a pole it has any."""
    background = field(np.linspace(-80, 80, 9), np.arange(-180.0, 180.0, 30.0))
    model = prior(background, length_scale=2000e3)
    rows = {"latitude": [10.0, 10.0, 90.0, -90.0], "longitude": [179.0, -179.5, 12.0, 0.0], "t": [281.0, 280.5, 279.0, 282.0]}
    written = {**rows, "longitude": [-181.0, 180.5, -100.0, 77.0]}
    tables = [pd.DataFrame(r) for r in (rows, written)]
    options: dict[str, Any] = {"model": model, "error": 0.5, "background_check": None}
    first, second = (xgenda.posterior_moments(background, o, **options) for o in tables)
    np.testing.assert_allclose(first.t, second.t, atol=1e-9)
    at = [xgenda.posterior_moments(background, tables[0], at=o[["latitude", "longitude"]], **options) for o in tables]
    np.testing.assert_allclose(at[0].t, at[1].t, atol=1e-9)
    # both observations beside the date line act as one of the mean, if they were at one place
    gain = first.t.sel(moment="mean") - background.t
    assert float(abs(gain.sel(latitude=20, longitude=[-180, 150]) / gain.sel(latitude=20, longitude=0)).min()) > 1
    members = xgenda.assimilate(background, tables[0], at=tables[0], members=800, seed=0, **options).t
    exact = at[0].t
    assert float(abs((members.mean("member") - exact.sel(moment="mean")) / exact.sel(moment="std")).max()) < 4 / np.sqrt(800)


def test_levels_and_several_variables() -> None:
    """What an observation is a sum of, it sums up at its own place."""
    background = (
        field().expand_dims(level=[500.0, 850.0], axis=0).assign_coords(level=("level", [500.0, 850.0], {"units": "hPa"}))
    )
    background = background.assign(u=background.t.isel(level=0, drop=True) * 0 + 5).assign_attrs(a=1)
    background.u.attrs["units"] = "m s-1"
    model = prior(background, std={"t": 2.0, "u": 3.0}, vertical_scale=1.0)
    seen = {"level": [70000.0, np.nan, 85000.0], "t": [282.0, np.nan, 279.0], "u": [np.nan, 9.0, np.nan]}
    obs = pd.DataFrame({"latitude": [42.7, 42.7, 44.1], "longitude": [0.6, 0.6, 1.9], **seen})
    found = xgenda.posterior_moments(background, obs, model=model, error={"t": 0.5, "u": 1.0}, at=obs[["latitude", "longitude"]])
    assert set(found.t.dims) == {"moment", "level", "point"}
    part = (np.log(850) - np.log(700)) / (np.log(850) - np.log(500))
    between = np.exp(-np.log(850 / 500))
    levels = np.array([[part, 1 - part, 0], [0, 0, 1], [0, 1, 0]])  # of t at 500, t at 850, u
    channels = np.array([[4, 4 * between, 0], [4 * between, 4, 0], [0, 0, 9]])
    at = obs[["latitude", "longitude"]].to_numpy()
    inner = (levels @ channels @ levels.T) * np.exp(-distance(at, at) / 300e3) + np.diag([0.25, 1.0, 0.25])
    expected = background.t.interp(latitude=("p", at[:, 0]), longitude=("p", at[:, 1])).transpose("p", "level").values
    mean = np.array([levels[0, :2] @ expected[0], 5.0, expected[2, 1]])
    cross = (channels @ levels.T)[None] * np.exp(-distance(at, at) / 300e3)[:, None]
    gain = cross @ np.linalg.solve(inner, np.array([282.0, 9.0, 279.0]) - mean)
    np.testing.assert_allclose(found.t.sel(moment="mean").transpose("point", "level") - expected, gain[:, :2], atol=2e-6)
    np.testing.assert_allclose(found.u.sel(moment="mean") - 5, gain[:, 2], atol=2e-6)


def test_correlated_errors_are_whitened_at_their_places() -> None:
    background, obs = field(), stations(6)
    error = xgenda.ErrorCovariance(std=0.5, length_scale=200e3)
    found = xgenda.posterior_moments(background, obs, model=prior(background), error=error, at=obs).t.sel(moment="mean")
    apart = distance(places(obs), places(obs))
    inner, cross = 4 * np.exp(-apart / 300e3), 0.25 * np.exp(-apart / 200e3)
    expected = background.t.interp(latitude=obs.latitude, longitude=obs.longitude).values
    np.testing.assert_allclose(found, expected + inner @ np.linalg.solve(inner + cross, obs.t.values - expected), atol=2e-6)


def test_cycles_see_observations_at_their_places() -> None:
    background, day = field(time=1).isel(time=0), np.timedelta64(1, "D")
    obs = stations(6).assign_coords(time=("obs", [background.time.values] * 6))
    obs = xr.concat([obs, obs.assign_coords(time=obs.time + day)], "obs")
    times = background.time.values + np.arange(2) * day
    call: dict[str, Any] = {"model": prior(background), "error": 0.5}
    found = xgenda.cycle(
        background, obs, forecast=forecasts.persistence("1D"), times=times, window="6h", members=2, seed=0, progress=False, **call
    )
    analysis = found.t.isel(time=0).sel(stage="analysis").mean("member")
    exact = xgenda.posterior_moments(background, obs.isel(obs=slice(0, 6)), **call).t.sel(moment="mean")
    np.testing.assert_allclose(analysis, exact, atol=1e-4)


def test_what_is_asked_wrongly_is_refused() -> None:
    background, obs = field(), stations(4)
    with pytest.raises(OptionError, match="representation='points' needs a covariance between cells"):
        xgenda.gaussian_prior(field(time=12), representation="points")
    with pytest.raises(OptionError, match="representation='lattice'"):
        prior(background, "lattice")
    model = prior(background)
    far = xr.Dataset(coords={"latitude": ("p", [42.0, 50.0]), "longitude": ("p", [0.0, 1.0])})
    for lazy in (background, background.expand_dims(time=[np.datetime64("2020-01-01", "ns")]).chunk(time=1)):
        with pytest.raises(GridError, match="1 of 2 places lie outside of the grid of ds"):
            xgenda.assimilate(lazy, obs, model=model, error=0.5, at=far)
    track = xr.Dataset(coords={"latitude": ("time", [42.0]), "longitude": ("time", [0.0])})
    with pytest.raises(OptionError, match=r"at.rename\(time='point'\)"):
        xgenda.assimilate(field(time=1), obs, model=model, error=0.5, at=track)
    with pytest.raises(OptionError, match="at=3 is not accepted"):
        xgenda.assimilate(background, obs, model=model, error=0.5, at=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="representation='points'"):
        xgenda.posterior_moments(background, obs, model=prior(background, "grid"), error=0.5, at=obs)
    with pytest.raises(OptionError, match="at has no effect on a filter"):
        xgenda.assimilate(field(member=4), obs, model=xgenda.LETKF(), error=0.5, at=obs)


def test_places_of_observations() -> None:
    np.testing.assert_array_equal(
        rounded(np.array([90.0, 0.0, -1.0]), np.array([33.0, 360.0, -1e-9])), [[90, 0], [0, 0], [-1, 0]]
    )
    from xgenda.grids import Grid
    from xgenda.maps import bilinear

    grid = Grid(LATITUDE, LONGITUDE)
    at = np.array([[41.0, 1.0], [42.0, 2.0], [41.0, 1.0], [43.0, 0.5]]).T
    found = at_places(bilinear(grid, *at)[0], *at, grid, np.array([False, False, False, True]))
    assert found.observed == len(found.places) == 1
    assert found.operator.shape == (4, 21)
    np.testing.assert_allclose(found.operator(np.arange(21.0))[:3], [20.0, 8.0, 20.0])
    assert found.operator.lengths.tolist()[:3] == [1, 1, 1]
    assert found.operator.lengths[3] > 1  # sees more than one place

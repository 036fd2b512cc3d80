"""Ensemble filters: closed forms, invariances, and what they refuse."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.curvilinear import PointSet
from xgenda.diffusion.covariances import SphereKernel
from xgenda.errors import ChunkingError, GridError, OptionError, StateError
from xgenda.filters import Inflation, find_neighbours, gaspari_cohn, random_rotation, transform
from xgenda.grids import EARTH_RADIUS, Grid

SHAPE = (5, 6)


@pytest.fixture
def ensemble() -> xr.Dataset:
    """Twelve members of temperature and wind on 5 x 6 cells."""
    rng = np.random.default_rng(0)
    draw = rng.normal(size=(2, 12, *SHAPE)).cumsum(-1).cumsum(-2)
    dims = ("member", "latitude", "longitude")
    return xr.Dataset(
        {
            "t2m": (dims, 280 + draw[0], {"units": "K", "standard_name": "air_temperature"}),
            "u": (dims, draw[1] + 0.5 * draw[0], {"units": "m s-1"}),
        },
        coords={"latitude": np.linspace(40, 44, 5), "longitude": np.linspace(10, 15, 6), "time": pd.Timestamp("2020-01-01")},
    )


@pytest.fixture
def table() -> xr.Dataset:
    """Temperatures at four places, two between cells."""
    return xr.Dataset(
        {"t2m": ("obs", [281.0, 279.0, 283.0, 280.5]), "t2m_error": ("obs", [0.5, 1.0, 0.7, 0.8])},
        coords={"latitude": ("obs", [40.0, 41.5, 43.0, 42.2]), "longitude": ("obs", [10.0, 12.5, 13.0, 14.4])},
    )


def flat(ds: xr.Dataset) -> np.ndarray:
    """All variables of each member, shape (members, n)."""
    return np.concatenate(
        [ds[n].transpose("member", "latitude", "longitude").values.reshape(ds.sizes["member"], -1) for n in ("t2m", "u")], 1
    )


def interpolation(ds: xr.Dataset, table: xr.Dataset) -> np.ndarray:
    """The operator as a matrix, column by column, by xarray's own interpolation."""
    size = int(np.prod(SHAPE))
    cells = xr.DataArray(
        np.eye(size).reshape(size, *SHAPE),
        dims=("cell", "latitude", "longitude"),
        coords={k: ds[k] for k in ("latitude", "longitude")},
    )
    found = cells.interp(latitude=table.latitude, longitude=table.longitude).transpose("obs", "cell").values
    return np.concatenate([found, np.zeros_like(found)], 1)


def kalman(
    x: np.ndarray, h: np.ndarray, y: np.ndarray, error: np.ndarray, p: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the Kalman filter with the covariance of a sample, or another."""
    p = np.cov(x.T) if p is None else p
    gain = p @ h.T @ np.linalg.inv(h @ p @ h.T + np.diag(error**2))
    return x.mean(0) + gain @ (y - h @ x.mean(0)), p - gain @ h @ p


@pytest.mark.parametrize("members", [3, 12])  # fewer and more than observations: both forms of the transform
def test_without_localisation_it_is_the_kalman_filter(ensemble: xr.Dataset, table: xr.Dataset, members: int) -> None:
    ensemble = ensemble.isel(member=slice(0, members))
    analysis = xgenda.assimilate(ensemble, table, model=xgenda.LETKF(), background_check=None)
    mean, covariance = kalman(flat(ensemble), interpolation(ensemble, table), table.t2m.values, table.t2m_error.values)
    found = flat(analysis)
    np.testing.assert_allclose(found.mean(0), mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.cov(found.T), covariance, rtol=0, atol=1e-10)


def test_an_observation_without_a_position_is_missing(ensemble: xr.Dataset, table: xr.Dataset) -> None:
    """Without a time it comes before all others."""
    timed = table.assign_coords(time=("obs", np.full(4, ensemble.time.values)))
    lost = timed.isel(obs=[0]).assign_coords(latitude=("obs", [np.nan]), time=("obs", [np.datetime64("NaT", "ns")]))
    model = xgenda.LETKF(localization=300e3)
    analysis = xgenda.assimilate(ensemble, xr.concat([timed, lost], "obs"), model=model)
    assert json.loads(analysis.attrs["xgenda_observation_counts"]) == {"used": 4, "missing": 1}
    np.testing.assert_array_equal(analysis.t2m, xgenda.assimilate(ensemble, timed, model=model).t2m)


def test_inflation_is_a_factor_on_the_anomalies(ensemble: xr.Dataset, table: xr.Dataset) -> None:
    analysis = xgenda.assimilate(ensemble, table, model=xgenda.LETKF(inflation=1.3), background_check=None)
    x = flat(ensemble)
    mean, covariance = kalman(x, interpolation(ensemble, table), table.t2m.values, table.t2m_error.values, 1.69 * np.cov(x.T))
    np.testing.assert_allclose(flat(analysis).mean(0), mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.cov(flat(analysis).T), covariance, rtol=0, atol=1e-10)


def test_a_localisation_in_kilometres_is_noticed(ensemble: xr.Dataset, table: xr.Dataset) -> None:
    with pytest.warns(UserWarning, match=r"localization=350\) is in metres, .* Kilometres\? localization=350000"):
        xgenda.assimilate(ensemble, table, model=xgenda.LETKF(localization=350), background_check=None)


def test_one_observation_localised(ensemble: xr.Dataset, table: xr.Dataset) -> None:
    # the error of the observation grows by the taper's inverse: a scalar Kalman filter at each cell
    one = table.isel(obs=[2])
    radius = 350e3
    analysis = xgenda.assimilate(ensemble, one, model=xgenda.LETKF(localization=radius), background_check=None)
    phi, lam = (a.ravel() for a in np.meshgrid(np.radians(ensemble.latitude), np.radians(ensemble.longitude), indexing="ij"))
    angle = np.arccos(
        np.clip(np.sin(phi) * np.sin(np.radians(43)) + np.cos(phi) * np.cos(np.radians(43)) * np.cos(lam - np.radians(13)), -1, 1)
    )
    taper = np.tile(gaspari_cohn(EARTH_RADIUS * angle / radius), 2)
    x = flat(ensemble)
    seen = x @ interpolation(ensemble, one)[0]
    covariance = ((x - x.mean(0)) * (seen - seen.mean())[:, None]).sum(0) / (len(x) - 1)
    with np.errstate(divide="ignore"):
        gain = covariance / (seen.var(ddof=1) + 0.7**2 / taper)
    found = flat(analysis)
    np.testing.assert_allclose(found.mean(0), x.mean(0) + gain * (283.0 - seen.mean()), rtol=0, atol=1e-7)
    beyond = taper == 0
    assert 0 < beyond.sum() < len(taper)
    np.testing.assert_array_equal(found[:, beyond], x[:, beyond])


def test_batches_of_cells_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    grid = Grid(np.arange(8.0), np.arange(10.0))
    ensemble, places = rng.normal(size=(6, 2, 80)), rng.uniform(0, 7, (2, 25))
    observed = ensemble[:, 0, rng.integers(0, 80, 25)]
    neighbours = find_neighbours(grid, *places, 300e3)
    parts = list(neighbours.padded(12))
    assert len(parts) > 10
    assert sorted(np.concatenate([cells for cells, _, _ in parts])) == sorted(set(neighbours.cell))
    for cells, rows, taper in parts:
        for c, r, w in zip(cells, rows, taper, strict=True):
            at = neighbours.cell == c
            assert sorted(r[w > 0]) == sorted(neighbours.observation[at])
            assert w.sum() == pytest.approx(neighbours.taper[at].sum())
    value, variance = rng.normal(size=25), rng.uniform(0.5, 1, 25)
    whole = transform(ensemble, observed, value, variance, neighbours)
    np.testing.assert_allclose(transform(ensemble, observed, value, variance, neighbours, entries=400), whole, rtol=0, atol=1e-12)


def test_far_taper_is_the_global_filter() -> None:
    rng = np.random.default_rng(2)
    ensemble, grid = rng.normal(size=(5, 1, 12)), Grid(np.arange(3.0), np.arange(4.0))
    observed, value, variance = ensemble[:, 0, :7], rng.normal(size=7), np.full(7, 0.5)
    neighbours = find_neighbours(grid, *(a[:7] for a in grid.points()), 1e12)
    np.testing.assert_allclose(
        transform(ensemble, observed, value, variance, neighbours),
        transform(ensemble, observed, value, variance, None),
        atol=1e-9,
    )


def test_taper_against_the_other_implementation() -> None:
    latitude = torch.linspace(-80, 80, 30, dtype=torch.float64)
    kernel = SphereKernel(latitude, torch.zeros(1, dtype=torch.float64), "gaspari-cohn", 9e6)
    index = torch.arange(30)
    chord = 2 * EARTH_RADIUS * np.sin(np.radians((latitude[:, None] - latitude).abs().numpy()) / 2)
    np.testing.assert_allclose(gaspari_cohn(chord / 9e6), kernel.correlation(index, index).numpy(), atol=1e-12)


def test_neighbours_of_a_box_that_wraps() -> None:
    grid = Grid(38 + 0.1 * np.arange(10), 0.125 * np.arange(12))
    phi, lam = grid.points()
    near = find_neighbours(grid, phi[:1], lam[:1], 25e3, wraps=True)
    rows, columns = np.divmod(near.cell, 12)
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) >= {(0, 0), (0, 1), (0, 11), (1, 0), (9, 0)}
    opposite = dict(zip(near.cell, near.taper, strict=True))
    assert opposite[12] == pytest.approx(opposite[9 * 12])  # a row to the north and one to the south
    assert opposite[0] == 1.0
    assert len(find_neighbours(grid, phi[:1], lam[:1], 25e3).cell) < len(near.cell)
    one_by_one = [find_neighbours(grid, phi[k : k + 1], lam[k : k + 1], 25e3, wraps=True).taper.sum() for k in (0, 37, 119)]
    assert one_by_one == pytest.approx([one_by_one[0]] * 3)


def test_boxes_that_do_not_wrap_are_refused() -> None:
    even, place = 0.125 * np.arange(12), (np.array([38.0]), np.array([0.5]))
    with pytest.raises(GridError, match="that of latitude goes from 0.1 to 0.6 degrees"):
        find_neighbours(Grid(np.array([38.0, 38.1, 38.3, 38.9]), even), *place, 25e3, wraps=True)
    with pytest.raises(GridError, match="this grid goes around the globe"):
        find_neighbours(Grid(np.arange(-60.0, 61.0, 30.0), np.arange(-180.0, 180.0, 30.0)), *place, 25e3, wraps=True)
    row = find_neighbours(Grid(np.array([0.0]), even), np.zeros(1), np.zeros(1), 28e3, wraps=True)  # one row: a ring
    assert row.cell.tolist() == [0, 1, 2, 10, 11]
    south = find_neighbours(Grid(38 + 0.1 * np.arange(10), even), np.array([38 - 1e-14]), np.array([-1e-18]), 25e3, wraps=True)
    assert 0 in south.cell  # a whole side away but for rounding


@pytest.mark.parametrize(("latitude", "longitude"), [(10.0, 179.5), (10.0, -179.5), (90.0, 0.0), (-90.0, 77.0), (88.0, 3.0)])
def test_increments_cross_the_date_line_and_the_poles(latitude: float, longitude: float) -> None:
    rng = np.random.default_rng(7)
    rows, columns = np.linspace(-90, 90, 13), np.arange(0, 360, 20.0)
    ds = xr.Dataset(
        {"t": (("member", "latitude", "longitude"), rng.normal(280, 2, (8, 13, 18)), {"units": "K"})},
        coords={"latitude": rows, "longitude": columns, "time": pd.Timestamp("2020-01-01")},
    )
    obs = xr.Dataset({"t": ("obs", [283.0])}, coords={"latitude": ("obs", [latitude]), "longitude": ("obs", [longitude])})
    found = xgenda.assimilate(ds, obs, model=xgenda.LETKF(localization=3000e3), error=1.0, background_check=None)
    phi, lam, at = (np.radians(x) for x in (ds.latitude, ds.longitude, (latitude, longitude)))
    cosine = np.sin(phi) * np.sin(at[0]) + np.cos(phi) * np.cos(at[0]) * np.cos(lam - at[1])
    distance = EARTH_RADIUS * np.arccos(cosine.clip(-1, 1)).transpose("latitude", "longitude").values
    changed = (found.t != ds.t).any("member").values
    np.testing.assert_array_equal(changed, gaspari_cohn(distance / 3000e3) > 1e-9)
    turned = ds.assign_coords(longitude=(ds.longitude + 180) % 360 - 180).sortby("longitude")
    other = xgenda.assimilate(turned, obs, model=xgenda.LETKF(localization=3000e3), error=1.0, background_check=None)
    back = other.assign_coords(longitude=other.longitude % 360).sortby("longitude")
    np.testing.assert_allclose(back.t, found.t, rtol=0, atol=1e-9)


def test_distances_go_around_the_globe() -> None:
    ring = Grid(np.zeros(1), 9.0 * np.arange(40) - 180)
    near = find_neighbours(ring, np.zeros(1), np.array([178.5]), 2.1 * np.radians(9) * EARTH_RADIUS)
    assert set(near.cell) == {38, 39, 0, 1}


def test_order_of_members_and_observations(ensemble: xr.Dataset, table: xr.Dataset) -> None:
    method = xgenda.LETKF(localization=500e3, inflation=1.1, rtps=0.3)
    analysis = xgenda.assimilate(ensemble, table, model=method)
    shuffled = xgenda.assimilate(ensemble, table.isel(obs=[3, 1, 0, 2]), model=method)
    xr.testing.assert_identical(analysis.drop_attrs(deep=False), shuffled.drop_attrs(deep=False))
    order = np.random.default_rng(3).permutation(12)
    turned = xgenda.assimilate(ensemble.isel(member=order), table, model=method)
    xr.testing.assert_allclose(turned.drop_attrs(), analysis.isel(member=order).drop_attrs(), atol=1e-9)


def test_relaxation_formulas() -> None:
    rng = np.random.default_rng(4)
    background, analysis = rng.normal(size=(9, 4)), 0.4 * rng.normal(size=(9, 4))
    perturbations = analysis - analysis.mean(0)
    found = Inflation(rtpp=0.3).after(analysis, background)
    np.testing.assert_allclose(
        found - analysis.mean(0), 0.7 * perturbations + 0.3 * (background - background.mean(0)), atol=1e-14
    )
    found = Inflation(rtps=0.6).after(analysis, background)
    np.testing.assert_allclose(found.std(0), 0.4 * analysis.std(0) + 0.6 * background.std(0))
    np.testing.assert_allclose(found.mean(0), analysis.mean(0), atol=1e-14)
    np.testing.assert_allclose(Inflation(1.1).before(background).std(0), 1.1 * background.std(0))
    assert np.isfinite(Inflation(rtps=1.0).after(np.ones((3, 2)), background[:3, :2])).all()


def test_relaxation_where_there_is_no_spread(ensemble: xr.Dataset, table: xr.Dataset) -> None:
    flat_row = ensemble.assign(t2m=ensemble.t2m.where(ensemble.latitude > 40, 280.0))
    analysis = xgenda.assimilate(flat_row, table, model=xgenda.LETKF(rtps=1.0, inflation=1.2), background_check=None, members=12)
    np.testing.assert_allclose(analysis.t2m.sel(latitude=40.0), 280.0, rtol=1e-12)
    expected = 1.2 * flat_row.t2m.std("member")  # wholly relaxed: that of the inflated background
    np.testing.assert_allclose(analysis.t2m.std("member"), expected, rtol=1e-9, atol=1e-12)


def test_rotations_leave_mean_and_covariance(ensemble: xr.Dataset, table: xr.Dataset) -> None:
    for members in (2, 3, 7):
        matrix = random_rotation(members, np.random.default_rng(members))
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(members), atol=1e-13)
        np.testing.assert_allclose(matrix.sum(0), 1.0)
    plain, mixed, again = (
        flat(xgenda.assimilate(ensemble, table, model=xgenda.LETKF(localization=800e3, rotation=r), seed=5))
        for r in (False, True, True)
    )
    assert np.abs(plain - mixed).max() > 0.1
    np.testing.assert_array_equal(mixed, again)
    np.testing.assert_allclose(mixed.mean(0), plain.mean(0), rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.cov(mixed.T), np.cov(plain.T), rtol=0, atol=1e-9)


def test_operators_that_are_not_linear(ensemble: xr.Dataset) -> None:
    # observed through the ensemble: the regression of the state on what each member lets expect
    ensemble = ensemble.assign(v=ensemble.u * 0.3 + 1.0)
    speed = xr.Dataset(
        {"speed": ("obs", [2.0]), "speed_error": ("obs", [0.5])},
        coords={"latitude": ("obs", [42.0]), "longitude": ("obs", [12.0])},
    )
    analysis = xgenda.assimilate(
        ensemble, speed, model=xgenda.LETKF(), operators={"speed": xgenda.operators.wind_speed("u", "v")}, background_check=None
    )
    u, v = (ensemble[n].sel(latitude=42.0, longitude=12.0).values for n in ("u", "v"))
    seen = np.hypot(u, v)
    x = flat(ensemble)
    covariance = ((x - x.mean(0)) * (seen - seen.mean())[:, None]).sum(0) / 11
    mean = x.mean(0) + covariance / (seen.var(ddof=1) + 0.25) * (2.0 - seen.mean())
    np.testing.assert_allclose(flat(analysis).mean(0), mean, rtol=0, atol=1e-3)  # speed is smoothed near calm


def test_errors_that_depend_on_each_other(ensemble: xr.Dataset, table: xr.Dataset) -> None:
    r = 0.6 * np.eye(4) + 0.3
    analysis = xgenda.assimilate(
        ensemble, table[["t2m"]], model=xgenda.LETKF(), error=xgenda.ErrorCovariance(matrix=r), background_check=None
    )
    x, h = flat(ensemble), interpolation(ensemble, table)
    p = np.cov(x.T)
    gain = p @ h.T @ np.linalg.inv(h @ p @ h.T + r)
    np.testing.assert_allclose(flat(analysis).mean(0), x.mean(0) + gain @ (table.t2m.values - h @ x.mean(0)), rtol=0, atol=1e-9)
    with pytest.raises(OptionError, match="localization exclude each other"):
        xgenda.assimilate(ensemble, table[["t2m"]], model=xgenda.LETKF(localization=1e6), error=xgenda.ErrorCovariance(matrix=r))


def test_states_with_times_levels_and_land() -> None:
    rng = np.random.default_rng(6)
    dims = ("time", "level", "latitude", "longitude", "member")
    ds = xr.Dataset(
        {"t": (dims, rng.normal(270, 2, (2, 2, 4, 4, 6)), {"units": "K"})},
        coords={
            "time": pd.to_datetime(["2020-01-01", "2020-01-02"]), "level": ("level", [850.0, 500.0], {"units": "hPa"}),
            "latitude": [43.0, 42.0, 41.0, 40.0], "longitude": [0.0, 1.0, 2.0, 3.0],
        },
    )  # fmt: skip
    ds["t"] = ds.t.where((ds.latitude < 43) | (ds.longitude > 0))
    obs = (
        pd.DataFrame(
            {
                "time": ds.time.values[[0, 1]],
                "latitude": [41.0, 41.0],
                "longitude": [1.0, 1.0],
                "level": [500.0, 850.0],
                "t": [272.0, 268.0],
            }
        )
        .assign(t_error=0.5, level_units="hPa")
        .drop(columns="level_units")
    )
    obs = xr.Dataset.from_dataframe(obs.rename_axis("obs"))
    obs["level"].attrs["units"] = "hPa"
    analysis = xgenda.assimilate(
        ds, obs.set_coords(["latitude", "longitude", "level", "time"]), model=xgenda.LETKF(localization=1e6)
    )
    assert analysis.t.dims == ("member", *dims[:-1])
    np.testing.assert_array_equal(np.isnan(analysis.t), np.isnan(ds.t.transpose(*analysis.t.dims)))
    alone = xgenda.assimilate(
        ds.isel(time=1), obs.isel(obs=[1]).set_coords(["latitude", "longitude", "level", "time"]), model=xgenda.LETKF(1e6)
    )
    xr.testing.assert_allclose(alone.t, analysis.t.isel(time=1))
    spot = {"latitude": 41.0, "longitude": 1.0}
    seen = ds.t.isel(time=0, level=1).sel(spot)
    expected = seen.mean() + seen.var(ddof=1) / (seen.var(ddof=1) + 0.25) * (272.0 - seen.mean())
    assert float(analysis.t.isel(time=0, level=1).sel(spot).mean()) == pytest.approx(float(expected))
    assert analysis.attrs["xgenda_observation_counts"] == '{"used": 2}'


def test_without_observations_it_is_the_background(ensemble: xr.Dataset, table: xr.Dataset) -> None:
    with pytest.warns(UserWarning, match="No observation can be used"):
        analysis = xgenda.assimilate(ensemble, None, model=xgenda.LETKF(inflation=1.5))
    xr.testing.assert_equal(analysis, ensemble)
    wild = table.assign(t2m=table.t2m + 60)
    with pytest.warns(UserWarning, match="No observation can be used"):
        analysis = xgenda.assimilate(ensemble, wild, model=xgenda.LETKF(inflation=1.5))
    xr.testing.assert_equal(analysis, ensemble)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": xgenda.LETKF(), "members": 16}, OptionError, "members=16 is not accepted: a filter has the 12 members of ds"),
        ({"model": xgenda.LETKF(), "members": 40}, OptionError, "a filter has the 12 members of ds"),
        ({"model": xgenda.LETKF(), "guidance": "mmps"}, OptionError, "guidance='mmps' has no effect: a filter draws nothing"),
        ({"model": xgenda.LETKF(), "background_check": -1}, OptionError, "background_check=-1 is not accepted"),
    ],
)
def test_options_are_refused(ensemble: xr.Dataset, table: xr.Dataset, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        xgenda.assimilate(ensemble, table, **change)


def test_backgrounds_are_refused(ensemble: xr.Dataset, table: xr.Dataset) -> None:
    with pytest.raises(OptionError, match="A filter needs an ensemble as background"):
        xgenda.assimilate(ensemble.isel(member=0), table, model=xgenda.LETKF())
    with pytest.raises(OptionError, match="ds has 1 member"):
        xgenda.assimilate(ensemble.isel(member=[0]), table, model=xgenda.LETKF())
    with pytest.raises(ChunkingError, match=r"ds\.compute\(\)"):
        xgenda.assimilate(ensemble.chunk(member=1), table, model=xgenda.LETKF())
    same = ensemble.isel(member=[0] * 4)
    with pytest.raises(StateError, match="All members of ds are the same, so that a filter cannot learn"):
        xgenda.assimilate(same.assign_coords(member=range(4)), table, model=xgenda.LETKF())
    broken = ensemble.copy(deep=True)
    broken.t2m[3, 1, 1] = np.nan
    with pytest.raises(StateError, match="in 1 of 12 members where others, or other times, have values, first in member 3"):
        xgenda.assimilate(broken, table, model=xgenda.LETKF())
    with pytest.raises(GridError, match="wraps=True"):
        find_neighbours(PointSet(np.arange(3.0), np.arange(3.0)), np.zeros(1), np.zeros(1), 1e5, wraps=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"localization": 0}, "localization=0 is not accepted; give the distance in metres"),
        ({"localization": "1000km"}, "localization='1000km' is not accepted"),
        ({"inflation": 0.9}, "inflation=0.9 is not accepted; it is a factor"),
        ({"inflation": True}, "inflation=True"),
        ({"rtps": 1.5}, "rtps=1.5 is not accepted; it is a part"),
        ({"rtpp": -0.1}, "rtpp=-0.1"),
        ({"inflation": 0}, "inflation=0 is not accepted; it is a factor"),
        ({"inflation": {"t2m": 1.1}}, "inflation={'t2m': 1.1} is not accepted; it is a factor"),
        ({"rtps": {"t2m": 0.5}}, "rtps={'t2m': 0.5} is not accepted; it is a part"),
        ({"rtps": float("nan")}, "rtps=nan is not accepted"),
        ({"rotation": 1}, "rotation=1 is not accepted"),
        ({"wraps": True}, "wraps=True has no effect without localization"),
    ],
)
def test_numbers_of_a_filter_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        xgenda.LETKF(**options)


def test_repr_shows_what_was_given() -> None:
    assert repr(xgenda.LETKF(2e6, rtps=0.5)) == "LETKF(localization=2000000.0, rtps=0.5)"
    assert eval(repr(xgenda.LETKF(rotation=True)), {"LETKF": xgenda.LETKF}) == xgenda.LETKF(rotation=True)

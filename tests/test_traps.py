"""Ways to get a number that looks right and is not, each of which was once open."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import xgenda
from xgenda import operators
from xgenda.errors import GridError, ObservationError, OptionError
from xgenda.observations.quality import Quality, QualityControl
from xgenda.operators import LinearOperator
from xgenda.plotting import plot_analysis

LATITUDE, LONGITUDE = np.arange(40.0, 46.0), np.arange(0.0, 6.0)
PLACES = {"latitude": LATITUDE, "longitude": LONGITUDE}


def flat(value: float = 280.0, **attrs: str) -> xr.Dataset:
    attrs = {"units": "K", "standard_name": "air_temperature"} | attrs
    return xr.Dataset({"t": (("latitude", "longitude"), np.full((6, 6), value), attrs)}, coords=PLACES)


def column(levels: list[float], values: list[float], name: str = "pressure", **attrs: str) -> xr.Dataset:
    data = np.broadcast_to(np.array(values)[:, None, None], (len(values), 6, 6)).copy()
    coords = {name: (name, levels, attrs), **PLACES}
    return xr.Dataset({"t": ((name, "latitude", "longitude"), data, {"units": "K"})}, coords=coords)


def at(value: float | list[float], **more: object) -> pd.DataFrame:
    values = np.atleast_1d(value)
    return pd.DataFrame({"latitude": 42.5, "longitude": 2.5, "t": values, **more})


def bent(shift: float) -> xr.Dataset:
    y, x = np.meshgrid(np.arange(8.0), np.arange(9.0), indexing="ij")
    latitude = 40 + 0.5 * y + 0.1 * x + shift
    coords = {"lat": (("y", "x"), latitude), "lon": (("y", "x"), 5 + 0.5 * x - 0.1 * y)}
    return xr.Dataset({"t": (("y", "x"), 270 + latitude, {"units": "K"})}, coords=coords)


# -- two fields that are compared are on one grid ---------------------------------------------------------------------------


def test_scores_compare_places_not_cells() -> None:
    with pytest.raises(GridError, match=r"truth is on the grid curvilinear.*Interpolate: truth.genda.regrid\(ensemble\)"):
        xgenda.verify(bent(0), bent(3))
    with pytest.raises(GridError, match="truth is on the grid curvilinear"):
        xgenda.verify(bent(0), bent(0).isel(y=slice(None, None, -1)))
    assert float(xgenda.verify(bent(0), bent(0).transpose("x", "y")).t.sel(metric="rmse")) == 0.0
    plain = flat().assign(t=lambda d: d.t + d.latitude)
    turned = plain.isel(latitude=slice(None, None, -1)).assign_coords(longitude=lambda d: d.longitude + 360)
    assert float(xgenda.verify(plain, turned).t.sel(metric="rmse")) == 0.0


def test_maps_compare_places_not_cells() -> None:
    from matplotlib import pyplot

    ensemble = flat().assign(t=lambda d: d.t + d.latitude).expand_dims(member=3)
    figure = plot_analysis(ensemble.isel(member=0, latitude=slice(None, None, -1)), ensemble)
    assert np.abs(figure.axes[4].collections[0].get_array()).max() == 0
    pyplot.close(figure)
    with pytest.raises(GridError, match="reference is on the grid"):
        plot_analysis(ensemble.isel(member=0).assign_coords(latitude=LATITUDE + 20), ensemble)


def test_stations_elsewhere_are_observations() -> None:
    points = {"latitude": ("obs", [50.0, 51, 52, 53]), "longitude": ("obs", [10.0, 12, 11, 13])}
    state = xr.Dataset({"t": ("obs", [280.0, 281, 282, 283], {"units": "K"})}, coords=points)
    same = xgenda.verify(state, state)
    assert float(same.t.sel(metric="rmse")) == 0.0
    elsewhere = state.assign_coords(latitude=("obs", [51.0, 51.5, 52, 52]), longitude=("obs", [11.5, 12, 11.5, 12]))
    found = xgenda.verify(state, elsewhere, error=0.1)
    assert sum(json.loads(found.attrs["counts"]).values()) == 4


# -- scores of observations -----------------------------------------------------------------------------------------------------


def test_scores_say_what_was_scored_and_take_the_window() -> None:
    times = pd.date_range("2020-01-01", periods=2, freq="6h")
    ds = flat().expand_dims(time=times)
    obs = at([281.0, 281.0, 281.0], time=times[0] + pd.to_timedelta([0, 2, 3], unit="h"))
    assert json.loads(xgenda.verify(ds, obs, error=1.0).attrs["counts"]) == {"used": 1, "window": 2}
    assert json.loads(xgenda.verify(ds, obs, error=1.0, window="6h").attrs["counts"]) == {"used": 3}
    wide = obs.rename(columns={"t": "wide"})
    seen = xgenda.verify(ds, wide, error=1.0, window="6h", operators={"wide": operators.footprint("t", radius=100e3)})
    assert float(seen.wide.sel(metric="bias")) == pytest.approx(-1.0)


def test_the_name_of_an_operator_says_more_than_a_standard_name() -> None:
    obs = at(281.0).to_xarray().rename(index="obs", t="wide").set_coords(["latitude", "longitude"])
    obs.wide.attrs = {"standard_name": "air_temperature", "units": "K"}
    found = xgenda.innovations(flat(), obs, error=1.0, operators={"wide": operators.footprint("t", radius=100e3)})
    assert found["variable"].values.tolist() == ["wide"]


def test_both_analysis_and_time_are_told() -> None:
    ds = flat().expand_dims(time=pd.date_range("2020-01-01", periods=1))
    prior = xgenda.gaussian_prior(ds, length_scale=3e5, std=1.0)
    obs = at(281.0, time=ds.time.values[0])
    analysis = xgenda.assimilate(ds, obs, model=prior, error=0.5, members=4, seed=0)
    found = xgenda.innovations(ds, obs, model=prior, error=0.5, analysis=analysis)
    assert found.analysis.values == pytest.approx((found.value - found.residual).values)
    assert 280 < float(found.analysis[0]) < 282
    assert found.time_index.values.tolist() == [0]


# -- levels --------------------------------------------------------------------------------------------------------------------------


def test_nothing_is_said_beyond_the_levels() -> None:
    ds = column([30000.0, 100000.0], [230.0, 285.0], units="Pa")
    obs = at([286.0, 286.0], pressure=[101500.0, 99000.0])
    found = xgenda.innovations(ds, obs, error=1.0)
    assert found.quality_code.values.tolist() == [Quality.DOMAIN, Quality.USED]
    assert np.isnan(found.background.values[0])


def test_nothing_is_said_below_the_sea_floor() -> None:
    """Between a level that is wet and one that is rock there is no interpolation."""
    ds = column([0.0, 200.0, 1000.0], [18.0, 10.0, 4.0], "depth", units="m", positive="down")
    ds.t[2, :, 3:] = np.nan
    prior = xgenda.gaussian_prior(ds, length_scale=1e5, std=1.0)
    obs = pd.DataFrame({"latitude": 42.0, "longitude": [4.0, 1.0, 4.0, 4.0], "depth": [590.0, 590.0, 200.0, 150.0], "t": 7.0})
    found = xgenda.innovations(ds, obs, model=prior, error=0.1, background_check=None)
    assert found.quality_code.values.tolist() == [Quality.LAND, Quality.USED, Quality.USED, Quality.USED]
    assert found.background.values[1:] == pytest.approx([10 - 6 * 390 / 800, 10.0, 12.0])


def test_a_state_on_one_level_does_not_see_others() -> None:
    ds = column([85000.0, 50000.0], [280.0, 250.0], units="Pa").sel(pressure=85000.0)
    found = xgenda.innovations(ds, at([281.0, 251.0, 281.0], pressure=[85000.0, 50000.0, 84500.0]), error=1.0)
    assert found.quality_code.values.tolist() == [Quality.USED, Quality.DOMAIN, Quality.USED]
    assert xgenda.innovations(ds, at(281.0), error=1.0).quality_code.values.tolist() == [Quality.USED]
    screen = flat().assign_coords(height=((), 2.0, {"units": "m", "standard_name": "height"}))
    assert xgenda.innovations(screen, at(281.0, height=500.0), error=1.0).quality_code.values.tolist() == [Quality.USED]


def test_fits_take_levels_as_independent() -> None:
    rng = np.random.default_rng(0)
    ds = column([85000.0, 50000.0, 30000.0], [0.0, 0.0, 0.0], units="Pa")
    prior = xgenda.gaussian_prior(ds, length_scale=300e3, std=2.0)
    with pytest.warns(UserWarning, match="the result is the prior"):
        truth = xgenda.assimilate(ds, None, model=prior, members=1, seed=3).t[0]
    obs = []
    for level in ds.pressure.values:
        y, x = rng.uniform(40, 45, 150), rng.uniform(0, 5, 150)
        seen = truth.sel(pressure=level).interp(latitude=xr.DataArray(y, dims="o"), longitude=xr.DataArray(x, dims="o")).values
        obs.append(pd.DataFrame({"latitude": y, "longitude": x, "pressure": level, "t": seen + 0.5 * rng.standard_normal(150)}))
    fit = xgenda.fit_covariance(ds, pd.concat(obs, ignore_index=True), quality=QualityControl(buddy=None))
    assert 100e3 < fit.loc["t", "length_scale"] < 900e3
    assert fit.loc["t", "error"] == pytest.approx(0.5, rel=0.3)


def test_a_length_scale_that_departures_do_not_tell() -> None:
    rng = np.random.default_rng(1)
    obs = pd.DataFrame(
        {"latitude": rng.uniform(40, 45, 60), "longitude": rng.uniform(0, 5, 60), "t": 283 + 0.1 * rng.standard_normal(60)}
    )
    with pytest.warns(UserWarning, match=r"do not tell the length scale of 't'.*do not use these numbers"):
        xgenda.fit_covariance(flat(), obs, quality=QualityControl(buddy=None))


# -- what is state, and what describes it ---------------------------------------------------------------------------------------


def test_orography_and_bounds_are_no_state() -> None:
    ds = flat().assign(
        orog=(("latitude", "longitude"), np.full((6, 6), 500.0), {"standard_name": "surface_altitude", "units": "m"}),
        latitude_bnds=(("latitude", "bnds"), np.zeros((6, 2))),
        place_bnds=(("latitude", "longitude", "corner"), np.zeros((6, 6, 4))),
    )
    ds = ds.assign_coords(place=(("latitude", "longitude"), np.zeros((6, 6))))
    prior = xgenda.gaussian_prior(ds, length_scale=3e5, std=1.0)
    assert [v.name for v in prior.spec.variables] == ["t"]
    analysis = xgenda.assimilate(ds, at(281.0, height=600.0), model=prior, error=1.0, lapse_rate=0.0065, members=2, seed=0)
    assert "orog" not in analysis
    assert "place_bnds" not in analysis


def test_a_lapse_rate_is_for_temperatures() -> None:
    ds = flat().assign(u=lambda d: (d.t * 0 + 5).assign_attrs(units="m s-1", standard_name="eastward_wind"))
    ds = ds.assign_coords(orog=(("latitude", "longitude"), np.zeros((6, 6)), {"standard_name": "surface_altitude", "units": "m"}))
    obs = at(281.0, u=6.0, height=200.0)
    with pytest.raises(ObservationError, match=r"holds 'u', which is no temperature. Say for which variable"):
        xgenda.innovations(ds, obs, error=1.0, lapse_rate=0.0065)
    with pytest.raises(ObservationError, match=r"lapse_rate names 't2n', which is no variable of the state; it has 't', 'u'"):
        xgenda.innovations(ds, obs, error=1.0, lapse_rate={"t2n": 0.0065})
    found = xgenda.innovations(ds, obs, error=1.0, lapse_rate={"t": 0.0065})
    assert found.innovation.values == pytest.approx([1 + 1.3, 1.0])


def test_a_superob_has_the_mean_time_of_its_reports() -> None:
    times = pd.date_range("2020-01-01", periods=13, freq="1h")
    guess = flat().expand_dims(time=times) + xr.DataArray(np.arange(13.0), dims="time")
    guess.t.attrs = {"units": "K"}
    exact = pd.DataFrame({"latitude": [42.5, 42.6], "longitude": [2.5, 2.55], "time": [times[4], times[8]], "t": [284.0, 288.0]})
    found = xgenda.innovations(
        guess.isel(time=6), exact, error=1.0, window="6h", first_guess=guess, quality=QualityControl(superob=5e5)
    )
    used = found.isel(obs=np.flatnonzero(found.quality_code.values == Quality.USED))
    assert used.innovation.values == pytest.approx([0.0], abs=1e-9)
    assert used.time.values[0] == np.datetime64("2020-01-01T06:00")


def test_weights_of_both_signs() -> None:
    """A difference of neighbours: its background error is not below what it is, so that it is not rejected for nothing."""
    from xgenda.weights import interpolation

    def difference(grid, latitude, longitude):
        here, inside = interpolation(grid, latitude, longitude)
        there, also = interpolation(grid, latitude, longitude + 1)
        return here.plus(there.scaled(-np.ones(len(latitude)))), inside & also

    prior = xgenda.gaussian_prior(flat(), length_scale=300e3, std=2.0)
    obs = at(1.5).rename(columns={"t": "dt"})
    found = xgenda.innovations(flat(), obs, model=prior, error=0.1, operators={"dt": LinearOperator("t", difference)})
    assert found.quality_code.values.tolist() == [Quality.USED]
    assert float(found.background_error[0]) > 1.3


def test_an_operator_needs_its_own_channels_only() -> None:
    """The surface of a shallow sea can be observed through an operator, however deep other variables go."""
    ds = column([0.0, 100.0], [10.0, 8.0], "depth", units="m", positive="down")
    ds.t[1] = np.nan
    ds.t[1, 0, 0] = 8.0
    ds["zos"] = (("latitude", "longitude"), np.full((6, 6), 0.5), {"units": "m"})
    prior = xgenda.gaussian_prior(ds, length_scale=1e5, std={"t": 1.0, "zos": 0.1})
    obs = at(1.1).rename(columns={"t": "twice"})
    twice = operators.function(lambda z: 2 * z, ("zos",), units="m")
    found = xgenda.innovations(ds, obs, model=prior, error=0.1, operators={"twice": twice})
    assert found.quality_code.values.tolist() == [Quality.USED]


def test_a_model_with_fewer_levels_than_the_data() -> None:
    more = column([85000.0, 50000.0, 30000.0], [280.0, 250.0, 230.0], units="Pa")
    prior = xgenda.gaussian_prior(more.isel(pressure=[0, 2]), length_scale=3e5, std=1.0)
    more = more.assign(weight=("pressure", [1.0, 2.0, 3.0])).assign_coords(letter=("pressure", list("abc")))
    analysis = xgenda.assimilate(more, at(281.0, pressure=85000.0), model=prior, error=1.0, members=2, seed=0)
    assert analysis.pressure.values.tolist() == [85000.0, 30000.0]
    assert analysis.weight.values.tolist() == [1.0, 3.0]
    assert analysis.letter.values.tolist() == ["a", "c"]


def test_a_prior_for_points_and_then_for_their_grid() -> None:
    diagonal = {"latitude": ("station", LATITUDE), "longitude": ("station", LONGITUDE)}
    points = xr.Dataset({"t": ("station", np.full(6, 280.0), {"units": "K"})}, coords=diagonal)
    prior = xgenda.gaussian_prior(points, length_scale=3e5, std=1.0)
    with pytest.warns(UserWarning, match="the result is the prior"):
        xgenda.assimilate(points, None, model=prior, members=1, seed=0)
    assert xgenda.assimilate(flat(), at(281.0), model=prior, error=1.0, members=1, seed=0).t.shape == (1, 6, 6)


def test_one_hole_in_a_masked_background_is_named() -> None:
    ds = flat().where(lambda d: d.latitude > 41)
    prior = xgenda.gaussian_prior(ds, length_scale=3e5, std=1.0)
    broken = ds.copy(deep=True)
    broken.t[4, 2] = np.nan
    with pytest.raises(xgenda.errors.StateError, match=r"NaN in 1 of 36 cells .*first at index \(0, 4, 2\)|NaN in 1 of 36 cells"):
        xgenda.assimilate(broken, at(281.0), model=prior, error=1.0, members=1, seed=0)


def test_lengths_that_differ_between_correlated_levels() -> None:
    ds = column([85000.0, 50000.0], [280.0, 250.0], units="Pa")
    with pytest.raises(OptionError, match=r"length_scale differs between the levels of 't', and vertical_scale needs one"):
        xgenda.gaussian_prior(ds, length_scale={"t@85000Pa": 3e5, "t@50000Pa": 5e5}, std=1.0, vertical_scale=0.5)
    with pytest.raises(OptionError, match=r"std names 'tt', which ds does not have; it has t"):
        xgenda.gaussian_prior(ds, length_scale=3e5, std={"tt": 1.0})


def test_flags_follow_the_names_of_the_state() -> None:
    """Observations by the user's name of a variable bring its errors and flags along."""
    prior = xgenda.gaussian_prior(flat(), length_scale=3e5, std=1.0)
    obs = at([281.0, 290.0]).rename(columns={"t": "temperature"}).assign(temperature_qc=["1", "4"], temperature_error=0.5)
    found = xgenda.innovations(
        flat().rename(t="temperature"),
        obs,
        model=prior,
        background_check=None,
        quality=QualityControl(flags="argo", duplicates=False),
    )
    assert found.quality_code.values.tolist() == [Quality.USED, Quality.FLAGGED]


def test_statistics_by_level_are_in_order() -> None:
    ds = column([85000.0, 100000.0, 5000.0], [280.0, 285.0, 210.0], units="Pa")
    obs = at([281.0, 286.0, 211.0, 283.0], pressure=[85000.0, 100000.0, 5000.0, 85000.0], station=["a", "b", "c", "d"])
    prior = xgenda.gaussian_prior(ds, length_scale=3e5, std=2.0)
    found = xgenda.innovations(ds, obs, model=prior, error=1.0)
    statistics = xgenda.innovation_statistics(found, by=("variable", "level"))
    assert statistics.level.values.tolist() == [5000.0, 85000.0, 100000.0]
    assert statistics["variable"].values.tolist() == ["t"] * 3
    assert statistics["count"].values.tolist() == [1, 2, 1]
    assert statistics["mean"].values == pytest.approx([1.0, 2.0, 1.0])
    assert xgenda.innovation_statistics(found.isel(obs=slice(0, 0))).sizes["group"] == 0

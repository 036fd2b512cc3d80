"""Departures: what they are, what they say of the errors, and when a user is told."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import xgenda
from xgenda.errors import OptionError


@pytest.fixture(scope="module")
def experiment() -> tuple[xr.Dataset, pd.DataFrame, xgenda.GenerativeModel, xr.Dataset]:
    """A background with errors of 2 K over 300 km, and 1,500 observations with errors of 1 K, both as the analysis believes."""
    lat, lon = np.linspace(40, 55, 31), np.linspace(0, 20, 41)
    flat = xr.Dataset(
        {
            "t2m": (
                ("latitude", "longitude"),
                np.full((31, 41), 280.0, dtype="f4"),
                {"units": "K", "standard_name": "air_temperature"},
            )
        },
        coords={"latitude": lat, "longitude": lon},
    )
    prior = xgenda.gaussian_prior(flat, length_scale=300e3, std=2.0)
    with pytest.warns(UserWarning, match="the result is the prior"):
        truth = xgenda.assimilate(flat, None, model=prior, members=1, seed=5).t2m.isel(member=0)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"latitude": rng.uniform(40, 55, 1500), "longitude": rng.uniform(0, 20, 1500)})
    at = truth.interp({k: xr.DataArray(frame[k].to_numpy(), dims="obs") for k in ("latitude", "longitude")})
    frame["t2m"] = at.to_numpy() + rng.normal(size=1500)
    frame["platform"] = np.where(rng.random(1500) < 0.3, "buoy", "ship")
    analysis = xgenda.assimilate(flat, frame, model=prior, error=1.0, members=32, seed=0)
    return flat, frame, prior, analysis


def test_departures_are_what_they_are_called(experiment) -> None:  # type: ignore[no-untyped-def]
    flat, frame, prior, analysis = experiment
    found = xgenda.innovations(flat, frame, model=prior, error=1.0, analysis=analysis)
    np.testing.assert_allclose(found.innovation, frame.t2m - 280.0, atol=1e-4)
    mean = analysis.t2m.mean("member").interp(
        {k: xr.DataArray(frame[k].to_numpy(), dims="obs") for k in ("latitude", "longitude")}
    )
    np.testing.assert_allclose(found.residual, frame.t2m - mean.to_numpy(), atol=2e-3)
    np.testing.assert_allclose(found.background_error, 2.0, atol=1e-6)
    assert found.attrs["sign"] == "innovation = observation - background"
    assert found.attrs["chi2"] == pytest.approx(analysis.attrs["xgenda_departure_chi2"])
    used = found.quality_code.values == 0
    expected = float((found.innovation.values[used] ** 2).mean() / 5.0)
    assert found.attrs["chi2"] == pytest.approx(expected)
    assert float(found.residual[used].std()) < float(found.innovation[used].std())


def test_desroziers_recovers_errors_that_were_right(experiment) -> None:  # type: ignore[no-untyped-def]
    flat, frame, prior, analysis = experiment
    departures = xgenda.innovations(flat, frame, model=prior, error=1.0, analysis=analysis)
    stats = xgenda.innovation_statistics(departures)
    assert stats["variable"].values.tolist() == ["t2m"]
    one = stats.isel(group=0)
    assert float(one.estimated_error) == pytest.approx(1.0, rel=0.08)
    assert float(one.estimated_background_error) == pytest.approx(2.0, rel=0.3)  # few independent places
    assert float(one.assumed_error) == 1.0
    assert int(one["count"]) == int((departures.quality_code == 0).sum())
    wrong = xgenda.assimilate(flat, frame, model=prior, error=0.5, members=32, seed=0)
    told = xgenda.innovation_statistics(xgenda.innovations(flat, frame, model=prior, error=0.5, analysis=wrong))
    assert float(told.estimated_error.squeeze()) > 1.4 * float(told.assumed_error.squeeze())  # too small, and it shows


def test_statistics_by_platform(experiment) -> None:  # type: ignore[no-untyped-def]
    flat, frame, prior, _ = experiment
    departures = xgenda.innovations(flat, frame, model=prior, error=1.0)
    stats = xgenda.innovation_statistics(departures, by=("variable", "platform"))
    assert stats.platform.values.tolist() == ["buoy", "ship"]
    used = departures.quality_code.values == 0
    for platform, count, mean in zip(stats.platform.values, stats["count"].values, stats["mean"].values, strict=True):
        mine = used & (departures.platform.values == platform)
        assert count == mine.sum()
        assert mean == pytest.approx(departures.innovation.values[mine].mean())
    assert "estimated_error" not in stats
    with pytest.raises(OptionError, match="by='ship' is no coordinate of the departures; they have"):
        xgenda.innovation_statistics(departures, by="ship")


def test_disagreement_is_told(experiment) -> None:  # type: ignore[no-untyped-def]
    flat, frame, prior, _ = experiment
    options = {"model": prior, "error": 1.0, "members": 2, "seed": 0}
    with pytest.warns(
        UserWarning, match=r"of 1500 observations are too far from the background .* Other units, or another datum\?"
    ):
        xgenda.assimilate(flat, frame.assign(t2m=frame.t2m + 12.0), **options)
    with pytest.warns(
        UserWarning, match="Squared departures from the background are .* times as large as their errors let expect"
    ):
        xgenda.assimilate(flat, frame.assign(t2m=frame.t2m + 5.0), background_check=None, **options)


def test_an_analysis_of_something_else_is_refused(experiment) -> None:  # type: ignore[no-untyped-def]
    flat, frame, prior, analysis = experiment
    for other, message in (
        (analysis.rename(t2m="x"), "analysis lacks 't2m'"),
        (analysis.isel(latitude=slice(5)), "analysis is not on the coordinates of ds"),
    ):
        with pytest.raises(OptionError, match=message):
            xgenda.innovations(flat, frame, model=prior, error=1.0, analysis=other)


def test_errors_are_fitted_to_departures() -> None:
    """Departures drawn from a covariance function on the grid and independent errors: three numbers come back."""
    latitude, longitude = np.arange(30.0, 60.0, 1.0), np.arange(0.0, 40.0, 1.0)
    rng = np.random.default_rng(0)
    zero = xr.Dataset(
        {"t": (("time", "latitude", "longitude"), np.zeros((3, 30, 40)), {"units": "K"})},
        coords={"time": pd.date_range("2020-01-01", periods=3, freq="D"), "latitude": latitude, "longitude": longitude},
    )
    prior = xgenda.gaussian_prior(zero, length_scale=400e3, std=2.0)
    with pytest.warns(UserWarning, match="the result is the prior"):
        truth = xgenda.assimilate(zero, None, model=prior, members=1, seed=1).t.isel(member=0)
    frames = []
    for t in zero.time.values:
        places = {"latitude": rng.uniform(31, 58, 400), "longitude": rng.uniform(1, 38, 400)}
        seen = truth.sel(time=t).interp(**{k: xr.DataArray(v, dims="obs") for k, v in places.items()})
        frames.append(pd.DataFrame({"time": t, **places, "t": seen.values + 0.8 * rng.standard_normal(400)}))
    obs = pd.concat(frames, ignore_index=True)
    obs.loc[5, "t"] = 60.0  # an outlier does not count
    fit = xgenda.fit_covariance(zero, obs, quality=xgenda.QualityControl(buddy=None))
    assert fit.loc["t", "count"] == 1199
    assert fit.loc["t", "length_scale"] == pytest.approx(400e3, rel=0.25)
    assert fit.loc["t", "std"] == pytest.approx(2.0, rel=0.15)
    assert fit.loc["t", "error"] == pytest.approx(0.8, rel=0.15)
    with pytest.raises(OptionError, match=r"12 departures of 't' can be used; a covariance needs at least 30"):
        xgenda.fit_covariance(zero, obs.iloc[6:18])
    with pytest.raises(OptionError, match=r"obs is empty"):
        xgenda.fit_covariance(zero, None)
    with pytest.raises(OptionError, match=r"covariance='spherical' is not accepted"):
        xgenda.fit_covariance(zero, obs, covariance="spherical")

"""When observations are: windows that tile, the first guess at appropriate time, and trajectories between their times."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import xgenda
from xgenda import operators
from xgenda.errors import CoordinateError, GridError, OptionError
from xgenda.models.generative import GenerativeModel
from xgenda.observations.quality import Quality, QualityControl
from xgenda.observations.times import assign_times, trajectory_weights

HOUR = np.timedelta64(1, "h")
START = np.datetime64("2020-01-01", "ns")


def hours(count: int, step: int = 1) -> xr.DataArray:
    return xr.DataArray(START + np.arange(count) * step * HOUR, dims="time", name="time")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.0, 60.0), min_size=1, max_size=30), st.integers(1, 12), st.integers(2, 8), st.integers(0, 3),
)  # fmt: skip
def test_weights_in_time_are_those_of_a_linear_trajectory(at: list[float], step: int, count: int, power: int) -> None:
    """They add up to one; a mean over a period is that of numpy on a fine axis."""
    times = hours(count, step)
    moments = START + (np.array(at) * 3600e9).astype("timedelta64[ns]")
    values = (np.arange(count) * step / 10.0) ** power
    weights, _ = trajectory_weights(moments, times, "obs")
    assert weights.sum(1) == pytest.approx(np.ones(len(at)))
    assert (weights.data >= 0).all()
    axis = np.arange(count) * step
    assert weights @ values == pytest.approx(np.interp(at, axis, values), abs=1e-9)  # times are whole nanoseconds
    period = np.full(len(at), 6 * 3600e9)
    means, before = trajectory_weights(moments, times, "obs", period)
    fine = np.linspace(-6.0, 0.0, 6001)
    expected = [np.trapezoid(np.interp(a + fine, axis, values), fine) / 6 for a in at]
    assert means @ values == pytest.approx(np.array(expected), abs=2e-3 * (1 + values.max()))
    assert before == pytest.approx(np.maximum(6.0 - np.array(at), 0) * 3600e9, abs=1e3)


def test_weights_do_not_depend_on_the_order_of_the_states() -> None:
    times, order = hours(6, 3), np.array([3, 1, 5, 0, 2, 4])
    moments = START + np.array([0, 4, 7, 15]) * HOUR
    straight, _ = trajectory_weights(moments, times, "obs")
    mixed, _ = trajectory_weights(moments, times[order], "obs")
    assert np.array_equal(mixed.toarray(), straight.toarray()[:, order])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-10, 200), min_size=1, max_size=50), st.integers(1, 9), st.integers(2, 12))
def test_windows_as_wide_as_the_spacing_use_every_observation_once(minutes: list[int], step: int, count: int) -> None:
    times = hours(count, step)
    moments = START + np.array(minutes) * np.timedelta64(7, "m")
    index = assign_times(moments, len(moments), times, f"{step}h", "obs")
    offset = (moments - START) / HOUR
    inside = (offset >= -step / 2) & (offset < (count - 0.5) * step)
    assert np.array_equal(index >= 0, inside)
    assert (np.abs(offset - index * step)[inside] <= step / 2).all()
    assert np.array_equal(assign_times(moments, len(moments), times, None, "obs", trajectory=True), index)


@pytest.fixture
def forecast() -> xr.Dataset:
    """An hourly background whose temperature rises by one kelvin an hour, and faster in the east."""
    latitude, longitude = np.arange(40.0, 48, 2), np.arange(0.0, 12, 2)
    rise = np.arange(13.0)[:, None, None] * (1 + longitude / 10)
    values = 280.0 + rise + np.zeros((13, 4, 6))
    return xr.Dataset(
        {"t2m": (("time", "latitude", "longitude"), values, {"units": "K", "standard_name": "air_temperature"})},
        coords={"time": hours(13).values, "latitude": latitude, "longitude": longitude},
    )


def reports(hour: list[float], value: list[float]) -> pd.DataFrame:
    time = START + (np.array(hour) * 3600e9).astype("timedelta64[ns]")
    return pd.DataFrame({"time": time, "latitude": 44.0, "longitude": np.arange(len(hour)) * 2.0, "t2m": value})


def test_first_guess_at_appropriate_time(forecast: xr.Dataset) -> None:
    """A report that agrees with the background at its own time changes nothing, one that is 1 K warmer does so by a kelvin's worth."""
    hour = [3.0, 4.5, 6.0, 8.25]
    rise = np.array(hour) * (1 + np.arange(4) * 2.0 / 10)
    middle = forecast.sel(time=START + 6 * HOUR)
    prior = xgenda.gaussian_prior(forecast, length_scale=300e3, std=2.0)
    given = {"model": prior, "error": 0.5, "window": "6h", "background_check": None}
    exact = reports(hour, list(280.0 + rise))
    departures = xgenda.innovations(middle, exact, first_guess=forecast, **given)
    assert departures.innovation.values == pytest.approx(np.zeros(4), abs=1e-9)
    assert departures.value.values == pytest.approx(280.0 + rise)
    assert departures.background.values == pytest.approx(280.0 + rise)
    still = xgenda.innovations(middle, exact, **given)
    assert still.innovation.values == pytest.approx(280.0 + rise - (280 + 6 * (1 + np.arange(4) / 5)))
    warmer = reports(hour, list(281.0 + rise))
    at_noon = warmer.assign(time=START + 6 * HOUR, t2m=281 + 6 * (1 + np.arange(4) / 5))
    a = xgenda.assimilate(middle, warmer, first_guess=forecast, members=3, seed=0, **given)
    b = xgenda.assimilate(middle, at_noon, members=3, seed=0, **given)
    assert a.t2m.values == pytest.approx(b.t2m.values, abs=1e-6)
    chunked = xgenda.assimilate(middle.chunk(), warmer, first_guess=forecast.chunk(time=4), members=3, seed=0, **given)
    assert chunked.t2m.values == pytest.approx(a.t2m.values, abs=1e-6)


def test_first_guess_of_a_speed(forecast: xr.Dataset) -> None:
    """What is observed through an operator is moved through it, too."""
    ds = forecast.rename(t2m="u").assign(v=forecast.t2m * 0 + 3.0)
    for n in ("u", "v"):
        ds[n].attrs = {"units": "m s-1"}
    speed = np.hypot(280.0 + 4.0, 3.0)
    obs = reports([4.0], [speed]).rename(columns={"t2m": "speed"})
    found = xgenda.innovations(
        ds.sel(time=START + 6 * HOUR),
        obs,
        first_guess=ds,
        error=1.0,
        window="6h",
        operators={"speed": operators.wind_speed("u", "v")},
    )
    assert found.innovation.item() == pytest.approx(0.0, abs=1e-5)


def test_a_first_guess_that_ends_too_early(forecast: xr.Dataset) -> None:
    obs = reports([5.0, 8.0], [285.0, 288.0])
    hole = forecast.isel(time=slice(0, 8)).copy(deep=True)
    found = xgenda.innovations(forecast.sel(time=START + 6 * HOUR), obs, first_guess=hole, error=1.0, window="6h")
    assert found.quality_code.values.tolist() == [Quality.USED, Quality.WINDOW]
    hole.t2m[5] = np.nan
    found = xgenda.innovations(forecast.sel(time=START + 6 * HOUR), obs, first_guess=hole, error=1.0, window="6h")
    assert found.quality_code.values.tolist() == [Quality.OPERATOR, Quality.WINDOW]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda ds: ds.isel(time=0, drop=True), CoordinateError, "first_guess has no dimension time"),
        (lambda ds: ds.isel(latitude=slice(0, 3)), GridError, "first_guess is on the grid 3 x 6.*ds on 4 x 6"),
        (
            lambda ds: ds.rename(t2m="other").drop_attrs(),
            OptionError,
            "first_guess lacks the variable 't2m'.*it has 'other'",
        ),
        (
            lambda ds: ds.expand_dims(member=2),
            OptionError,
            r"first_guess has the ensemble dimension 'member'.*first_guess.mean\('member'\)",
        ),
        (lambda ds: 3.0, OptionError, "first_guess is a builtins.float; an xarray Dataset is needed"),
    ],
)
def test_a_first_guess_that_does_not_fit(forecast: xr.Dataset, change, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        xgenda.innovations(forecast.isel(time=6), reports([5.0], [285.0]), first_guess=change(forecast), error=1.0, window="6h")


@pytest.fixture(scope="module")
def windows() -> tuple[xr.Dataset, GenerativeModel]:
    """A model of three states whose prior is the separable Gaussian: its network is silent."""
    rng = np.random.default_rng(0)
    amplitude = np.zeros(300)
    for t in range(1, 300):
        amplitude[t] = 0.8 * amplitude[t - 1] + 0.6 * rng.standard_normal()
    values = amplitude[:, None, None] * np.ones((6, 6)) + 0.05 * rng.standard_normal((300, 6, 6))
    ds = xr.Dataset(
        {"x": (("time", "latitude", "longitude"), values, {"units": "m"})},
        coords={"time": hours(300, 24).values, "latitude": np.linspace(0, 25, 6), "longitude": np.linspace(0, 25, 6)},
    )
    return ds, xgenda.train(ds, window=3, anchor="eof", steps=1, width=8, learning_rate=1e-30, progress=False)


def gaussian_trajectory(model: GenerativeModel, days: int, rows: np.ndarray, values: np.ndarray, error: float) -> np.ndarray:
    """Return the posterior mean in closed form, from the covariance that the model has; `rows` (m, days * cells)."""
    import torch

    covariance = model.covariance.of_length(days)
    index = torch.arange(covariance.size)
    full = covariance.block(index, index).numpy() * model.scaling.std.item() ** 2
    mean = np.tile(model.scaling.mean[0].ravel(), days)
    gain = full @ rows.T @ np.linalg.inv(rows @ full @ rows.T + error**2 * np.eye(len(rows)))
    return (mean + gain @ (values - rows @ mean)).reshape(days, 6, 6)


@pytest.mark.parametrize("kind", ["between", "mean"])
@pytest.mark.slow
def test_observations_between_the_times_of_a_trajectory(windows: tuple[xr.Dataset, GenerativeModel], kind: str) -> None:
    """Against the closed form; taken at the nearest time instead they would be off by more than the error allowed here."""
    series, model = windows
    days = series.isel(time=slice(50, 55))
    moments = days.time.values[[1, 3]] + 6 * HOUR
    table = xr.Dataset(
        {"y": ("obs", np.array([2.0, -2.0]), {"units": "m"})},
        coords={"latitude": ("obs", [10.0, 15.0]), "longitude": ("obs", [10.0, 15.0]), "time": ("obs", moments)},
    )
    rows = np.zeros((2, 5, 6, 6))
    for i, (day, cell) in enumerate(((1, 2), (3, 3))):
        if kind == "between":
            rows[i, day, cell, cell], rows[i, day + 1, cell, cell] = 0.75, 0.25
        else:  # of the 24 h up to 6 h after the state: 3/4 of the day before and 1/4 of the one after, each linear
            rows[i, day - 1, cell, cell] = 0.75**2 / 2
            rows[i, day, cell, cell] = 0.75 - 0.75**2 / 2 + 0.25 - 0.25**2 / 2
            rows[i, day + 1, cell, cell] = 0.25**2 / 2
    expected = gaussian_trajectory(model, 5, rows.reshape(2, -1), np.array([2.0, -2.0]), 0.1)
    given = {"model": model, "error": 0.1, "members": 200, "seed": 0, "steps": 12, "progress": False, "background_check": None}
    if kind == "between":
        result = xgenda.assimilate(days, table.rename(y="x"), **given)
    else:
        result = xgenda.assimilate(days, table, operators={"y": operators.time_mean("x", period="24h")}, **given)
    assert result.attrs["xgenda_guidance"].startswith("anchor")
    spread = result.x.std("member", ddof=1).values
    assert np.abs((result.x.mean("member").values - expected) / (spread / np.sqrt(200) + 0.01)).max() < 5
    departures = xgenda.innovations(
        days, table.rename(y="x") if kind == "between" else table, model=model, error=0.1, background_check=None,
        operators=None if kind == "between" else {"y": operators.time_mean("x", period="24h")},
    )  # fmt: skip
    assert departures.background.values == pytest.approx(rows.reshape(2, -1) @ days.x.values.ravel())


def test_a_period_that_begins_before_the_trajectory(windows: tuple[xr.Dataset, GenerativeModel]) -> None:
    series, model = windows
    days = series.isel(time=slice(50, 55))
    table = pd.DataFrame({"time": days.time.values[:2], "latitude": 10.0, "longitude": 10.0, "y": 1.0})
    mean = operators.time_mean(operators.footprint("x", radius=600e3), period="1D")
    found = xgenda.innovations(
        days, table, model=model, error=0.1, operators={"y": mean}, quality=QualityControl(duplicates=False)
    )
    assert found.quality_code.values.tolist() == [Quality.WINDOW, Quality.USED]
    with pytest.raises(OptionError, match=r"operators\['y'\] is a mean in time.*xgenda.train\(ds, window=3\)"):
        xgenda.innovations(days, table, error=0.1, operators={"y": mean})
    with pytest.raises(OptionError, match=r"first_guess has no effect on a model of windows"):
        xgenda.innovations(days, table.rename(columns={"y": "x"}), model=model, error=0.1, first_guess=series)
    with pytest.raises(OptionError, match=r"period='day' is no time span; give for example period='6h'"):
        operators.time_mean("x", period="day")
    with pytest.raises(OptionError, match=r"observed=3 is not accepted"):
        operators.time_mean(3, period="1D")


@pytest.mark.slow
def test_a_covariance_matrix_reaches_across_the_times_of_a_trajectory(windows: tuple[xr.Dataset, GenerativeModel]) -> None:
    """Against the closed form with the full R; with what is between times left out the mean would be another."""
    import torch

    series, model = windows
    days = series.isel(time=slice(50, 55))
    table = pd.DataFrame(
        {
            "time": days.time.values[[0, 2, 4]],
            "latitude": [10.0, 15.0, 10.0],
            "longitude": [10.0, 15.0, 20.0],
            "x": [1.0, 2.0, 1.5],
        }
    )
    errors = 0.5**2 * (0.9 + 0.1 * np.eye(3))
    rows = np.zeros((3, 5, 6, 6))
    for i, (t, y, x) in enumerate(((0, 2, 2), (2, 3, 3), (4, 2, 4))):
        rows[i, t, y, x] = 1.0
    flat = rows.reshape(3, -1)
    covariance = model.covariance.of_length(5)
    index = torch.arange(covariance.size)
    full = covariance.block(index, index).numpy() * model.scaling.std.item() ** 2
    mean = np.tile(model.scaling.mean[0].ravel(), 5)

    def expected(r: np.ndarray) -> np.ndarray:
        return mean + full @ flat.T @ np.linalg.solve(flat @ full @ flat.T + r, table.x.to_numpy() - flat @ mean)

    given = {"model": model, "members": 300, "seed": 0, "steps": 12, "progress": False, "background_check": None}
    result = xgenda.assimilate(days, table, error={"x": xgenda.ErrorCovariance(matrix=errors)}, **given)
    noise = result.x.std("member", ddof=1).values.ravel() / np.sqrt(300) + 0.01
    found = result.x.mean("member").values.ravel()
    assert np.abs((found - expected(errors)) / noise).max() < 5
    assert np.abs((found - expected(np.diag(np.diag(errors)))) / noise).max() > 5

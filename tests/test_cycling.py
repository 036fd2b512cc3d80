"""Cycles of forecasts and analyses: what they equal, what is kept, what stops them, and how they go on."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import cftime
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.integrate import solve_ivp

import xgenda
from xgenda.errors import (
    CheckpointError,
    CoordinateError,
    DivergenceError,
    GridError,
    ObservationError,
    OptionError,
    OutputExistsError,
    StateError,
    UnitsError,
)
from xgenda.forecasts import by_member, persistence

PROGRAMS = Path(__file__).parents[1] / "docs" / "benchmarks"
STEP = np.timedelta64(6, "h")
PLAIN: dict[str, Any] = {"background_check": None, "quality": xgenda.QualityControl(buddy=None)}


@pytest.fixture(scope="module")
def lorenz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_lorenz96", PROGRAMS / "lorenz96.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def later(ds: xr.Dataset) -> xr.Dataset:
    return ds.assign_coords(time=ds.time + STEP)


def drift(ds: xr.Dataset) -> xr.Dataset:
    """A forecast with something to see: everything relaxes to 280 K and moves by one cell."""
    out = ds.assign({n: 280 + 0.9 * (v.roll(longitude=1) - 280) for n, v in ds.data_vars.items() if "longitude" in v.dims})
    return later(out)


@pytest.fixture
def initial() -> xr.Dataset:
    """Six members of temperature on 4 x 5 cells, and the height of the ground."""
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "t2m": (("member", "latitude", "longitude"), 280 + rng.normal(size=(6, 4, 5)).cumsum(-1), {"units": "K"}),
            "orography": (("latitude", "longitude"), np.full((4, 5), 20.0), {"standard_name": "surface_altitude", "units": "m"}),
        },
        coords={
            "time": np.datetime64("2020-01-01T00", "ns"), "member": np.arange(6), "latitude": [53.0, 52.0, 51.0, 50.0],
            "longitude": [0.0, 1.0, 2.0, 3.0, 4.0],
        },
        attrs={"title": "a test"},
    )  # fmt: skip


@pytest.fixture
def obs() -> pd.DataFrame:
    """Two temperatures at each of five times, six hours apart, from the time of `initial`."""
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "time": np.repeat(pd.date_range("2020-01-01", periods=5, freq="6h"), 2),
            "latitude": rng.uniform(50, 53, 10), "longitude": rng.uniform(0, 4, 10), "t2m": 280 + rng.normal(size=10),
        }
    ).assign(t2m_error=0.5)  # fmt: skip


def test_fields_without_members_stay_as_they_are_and_reach_the_forecast(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    ground = xr.DataArray(np.arange(20.0).reshape(4, 5) / 50, dims=("latitude", "longitude"), attrs={"units": "m"})

    def forecast(ds: xr.Dataset) -> xr.Dataset:
        return later(ds.assign(t2m=ds.t2m + ds.ground))

    given = {"forecast": forecast, "model": xgenda.LETKF(localization=400e3), "window": "6h", "seed": 0, **PLAIN}
    run = xgenda.cycle(initial.assign(ground=ground), obs, **given)
    assert run.ground.dims == ("latitude", "longitude")
    np.testing.assert_array_equal(run.ground, ground)
    assert run.field.values.tolist() == run.observed.values.tolist() == ["t2m"]
    before, after = run.t2m.isel(time=0).sel(stage="analysis"), run.t2m.isel(time=1).sel(stage="background")
    np.testing.assert_array_equal(after.values, (before + ground).values)


def test_lorenz96(lorenz: ModuleType) -> None:
    # published for long runs: 0.22 and 0.18; 160 cycles scatter by about 0.03
    for name, bound in (("LETKF", 0.28), ("square-root EnKF", 0.25)):
        members, model, _ = lorenz.METHODS[name]
        initial, truth, obs = lorenz.twin(160, members, 1)
        run = xgenda.cycle(
            initial, obs, forecast=lorenz.forecast, model=model, times=truth.time, error=1.0, seed=0, progress=False, **PLAIN
        )
        found = lorenz.scores(run, truth)
        assert found["rmse"] < bound, name
        assert found["rmse"] < found["rmse of the background"]
        assert found["spread"] == pytest.approx(found["rmse"], rel=0.3)
        assert found["chi2"] == pytest.approx(1.0, abs=0.1)


def test_scores_of_a_run_keep_its_stages(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    run = xgenda.cycle(**options_of(initial, obs))
    truth = initial.t2m.mean("member").expand_dims(time=run.time).to_dataset()
    scores = run.genda.verify(truth).t2m
    assert set(scores.dims) == {"metric", "stage"}
    for stage in ("background", "analysis"):
        np.testing.assert_allclose(scores.sel(stage=stage), run.sel(stage=stage).genda.verify(truth).t2m, rtol=1e-12)


def test_lorenz96_forecast(lorenz: ModuleType) -> None:
    x = lorenz.twin(1, 2, 0)[1].x.values.ravel()
    exact = solve_ivp(lambda _, y: lorenz.tendency(y), (0, 0.05), x, rtol=1e-12, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(lorenz.advance(x), exact, rtol=0, atol=2e-3)


def test_a_cycle_is_analyses_and_forecasts_one_after_the_other(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    model = xgenda.LETKF(localization=400e3, inflation=1.05, rtps=0.2, rotation=True)
    run = xgenda.cycle(initial, obs, forecast=drift, model=model, window="6h", seed=3)
    assert run.t2m.dims == ("time", "stage", "member", "latitude", "longitude")
    state = initial
    for t in range(5):
        xr.testing.assert_equal(run.t2m.isel(time=t).sel(stage="background", drop=True), state.t2m)
        now = obs[obs.time == state.time.values]
        state = xgenda.assimilate(state, now, model=model, seed=3)
        xr.testing.assert_equal(run.t2m.isel(time=t).sel(stage="analysis", drop=True), state.t2m)
        seen = xgenda.innovations(run.isel(time=t, stage=0)[["t2m"]].mean("member"), now)
        assert float(run.innovation_rms[t, 0]) == pytest.approx(float(np.sqrt((seen.innovation**2).mean())))
        assert float(run.innovation_mean[t, 0]) == pytest.approx(float(seen.innovation.mean()))
        assert float(run.chi2[t]) == pytest.approx(state.attrs["xgenda_departure_chi2"])
        state = drift(state)
    assert run.observations_used.values.tolist() == run.observations_given.values.tolist() == [2] * 5
    assert not (run.notice & 3).any()
    assert all(
        len(run[n].long_name) <= 50 for n in ("spread", "chi2", "innovation_mean", "inflation")
    )  # they are axes of pictures
    assert run.attrs["title"] == "a test"
    assert "cycle(model=" in run.attrs["history"]
    assert run.orography.dims == ("latitude", "longitude")
    weight = np.cos(np.radians(initial.latitude))
    spread = np.sqrt(run.t2m.var("member", ddof=1).weighted(weight).mean(("latitude", "longitude")))
    np.testing.assert_allclose(run.spread.isel(field=0), spread, rtol=1e-3)  # areas between parallels
    xr.testing.assert_identical(
        run, xgenda.cycle(initial, obs, forecast=drift, model=model, window="6h", seed=3).assign_attrs(run.attrs)
    )


@pytest.mark.parametrize("background", ["control", "mean", "members"])
def test_a_cycle_with_a_covariance_function(initial: xr.Dataset, obs: pd.DataFrame, background: str) -> None:
    model = xgenda.gaussian_prior(initial.isel(member=0)[["t2m"]], length_scale=200e3, std=1.0)
    run = xgenda.cycle(initial, obs, forecast=drift, model=model, window="6h", seed=3, background=background, **PLAIN)
    state = initial.t2m
    for t in range(5):
        now = obs[obs.time == run.time.values[t]]
        mean = state.mean("member")
        before, after = (run.t2m.isel(time=t).sel(stage=k, drop=True) for k in ("background", "analysis"))
        options = {"model": model, "seed": 3, "members": 6, **PLAIN}
        if background == "members":
            found = xr.concat(
                [
                    xgenda.assimilate(state.isel(member=k, drop=True).to_dataset(name="t2m"), now, **options).t2m.isel(member=k)
                    for k in range(6)
                ],
                "member",
            )
        else:
            found = xgenda.assimilate(mean.to_dataset(name="t2m").assign_coords(time=run.time[t]), now, **options).t2m
        if background != "members":
            exact = xgenda.posterior_moments(
                mean.to_dataset(name="t2m").assign_coords(time=run.time[t]), now, model=model, **PLAIN
            )
            found = found - found.mean("member") + exact.t2m.sel(moment="mean", drop=True)
        xr.testing.assert_allclose(before, mean.broadcast_like(before) if background == "control" else state, atol=1e-12)
        xr.testing.assert_allclose(after, found, atol=1e-12)
        state = found.assign_coords(time=run.time[t])
        given = state.mean("member").expand_dims(member=6) if background == "control" else state
        state = drift(given.to_dataset(name="t2m")).t2m
    assert bool((run.spread.isel(stage=0) < 1e-10).all()) == (background == "control")
    assert (run.spread.isel(stage=1) > 0).all()


def test_control_is_one_forecast(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    sizes = []

    def counted(ds: xr.Dataset) -> xr.Dataset:
        sizes.append(ds.sizes["member"])
        return drift(ds)

    model = xgenda.gaussian_prior(initial.isel(member=0)[["t2m"]], length_scale=200e3, std=1.0)
    xgenda.cycle(initial, obs, forecast=counted, model=model, window="6h", seed=3)
    assert sizes == [1] * 4
    single = initial.isel(member=0, drop=True)
    run = xgenda.cycle(single, obs, forecast=counted, model=model, window="6h", seed=3)
    assert run.sizes["member"] == 16
    assert xgenda.cycle(single, obs, forecast=counted, model=model, window="6h", seed=3, members=3).sizes["member"] == 3


def test_relaxation_of_a_model(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    model = xgenda.gaussian_prior(initial.isel(member=0)[["t2m"]], length_scale=200e3, std=0.3)
    given = {"forecast": drift, "model": model, "times": initial.time.values, "seed": 3, "background": "mean"}
    plain, relaxed = (xgenda.cycle(initial, obs.iloc[:2], rtps=r, **given) for r in (0.0, 0.5))
    prior = initial.t2m.std("member")
    expected = 0.5 * (plain.t2m.isel(time=0, stage=1).std("member") + prior)
    np.testing.assert_allclose(relaxed.t2m.isel(time=0, stage=1).std("member"), expected, rtol=1e-6)
    assert float(relaxed.inflation[0]) > 1.5


def test_relaxation_is_told_of(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    """How many times wider the analysis is, of a filter, on land and of a single member."""
    first = {"forecast": drift, "times": initial.time.values, "seed": 3}
    plain, relaxed = (xgenda.cycle(initial, obs.iloc[:2], model=xgenda.LETKF(rtps=r, inflation=1.2), **first) for r in (0.0, 0.5))
    spread = [x.t2m.isel(time=0, stage=1).std("member").mean() for x in (plain, relaxed)]
    assert float(plain.inflation[0]) == 1.2
    assert float(relaxed.inflation[0]) == pytest.approx(1.2 * float(spread[1] / spread[0]))
    sea = initial.assign(t2m=initial.t2m.where(initial.longitude > 0))
    model = xgenda.gaussian_prior(sea.isel(member=0)[["t2m"]], length_scale=200e3, std=0.3)
    run = xgenda.cycle(sea, obs.iloc[:2].assign(longitude=2.0), model=model, rtps=0.5, background="mean", **first)
    assert float(run.inflation[0]) > 1.5
    run = xgenda.cycle(
        sea.isel(member=0), obs.iloc[:2].assign(longitude=2.0), model=model, rtps=0.5, background="mean", members=1, **first
    )
    assert float(run.inflation[0]) == 1.0
    assert np.isfinite(run.t2m.sel(longitude=2.0)).all()


def test_what_inflation_did_does_not_depend_on_units(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    """Relaxation widens the variable that is observed, and hardly the other one."""
    rng = np.random.default_rng(2)
    both = initial.assign(p=(initial.t2m.dims, 1000 + 5 * rng.normal(size=initial.t2m.shape), {"units": "hPa"}))
    given = {"forecast": drift, "times": initial.time.values, "seed": 3, "model": xgenda.LETKF(rtps=0.5)}
    found = []
    for units, scale in (("hPa", 1.0), ("Pa", 100.0), ("bar", 1e-3)):
        run = xgenda.cycle(both.assign(p=(scale * both.p).assign_attrs(units=units)), obs.iloc[:2], **given)
        found.append(float(run.inflation[0]))
    plain = xgenda.cycle(both, obs.iloc[:2], **given | {"model": xgenda.LETKF()})
    run = xgenda.cycle(both, obs.iloc[:2], **given)
    widths = [
        float(run[n].isel(time=0, stage=1).std("member").mean() / plain[n].isel(time=0, stage=1).std("member").mean())
        for n in ("t2m", "p")
    ]
    assert found == pytest.approx([float(np.sqrt(np.prod(widths)))] * 3)
    assert widths[0] > 1.1


def test_one_stuck_station_is_no_divergence(initial: xr.Dataset) -> None:
    """It is refused every time; a filter whose observations are all refused is lost."""
    rng = np.random.default_rng(4)
    times = np.repeat(pd.date_range("2020-01-01", periods=8, freq="6h"), 10)
    obs = pd.DataFrame(
        {
            "time": times,
            "latitude": rng.uniform(50, 53, 80),
            "longitude": rng.uniform(0, 4, 80),
            "t2m": 280 + 0.5 * rng.normal(size=80),
        }
    )
    stuck = obs.drop_duplicates("time").assign(latitude=51.5, longitude=2.0, t2m=320.0)
    given = {"forecast": persistence("6h"), "model": xgenda.LETKF(inflation=1.1), "window": "6h", "seed": 0, "error": 0.5}
    alone, run = (xgenda.cycle(initial, o, **given) for o in (obs, pd.concat([obs, stuck])))
    np.testing.assert_array_equal(run.t2m, alone.t2m)
    assert float(run.chi2.max()) < 4
    np.testing.assert_allclose(run.chi2, (10 * alone.chi2 + 25) / 11, rtol=1e-6)
    with pytest.raises(DivergenceError, match="in 5 cycles in a row"):
        xgenda.cycle(initial, obs.assign(t2m=320.0), **given)


def test_a_guard_that_never_fires_is_refused(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    given = options_of(initial, obs) | {"guard": xgenda.DivergenceGuard(chi2=30.0)}
    with pytest.raises(
        OptionError, match=r"DivergenceGuard: chi2=30.0 is never reached: .* for example chi2=6.25, or pass background_check=None"
    ):
        xgenda.cycle(**given)
    xgenda.cycle(**given, background_check=None)


def test_other_checks_of_observations_are_refused_on_resuming(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    """However long the options are, and not because a set has another order."""
    names = [f"station {k}" for k in range(40)]
    given = options_of(initial, obs) | {"store": tmp_path / "run.zarr", "times": pd.unique(obs.time)}
    xgenda.cycle(**given | {"times": given["times"][:2]}, quality=xgenda.QualityControl(blacklist=set(names)))
    with pytest.raises(OptionError, match="buddy"):
        xgenda.cycle(**given, resume=True, quality=xgenda.QualityControl(blacklist=set(names), buddy=0.5))
    run = xgenda.cycle(**given, resume=True, quality=xgenda.QualityControl(blacklist=frozenset(reversed(names))))
    assert run.sizes["time"] == 5


def test_errors_of_more_observations_go_on(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    """One number per row, of more rows; and the same number written otherwise. Another one is refused."""
    plain = obs.drop(columns="t2m_error")
    given = options_of(initial, plain) | {"store": tmp_path / "run.zarr", "times": pd.unique(obs.time)}
    whole = xgenda.cycle(**given | {"store": None}, error=0.5)
    xgenda.cycle(**given | {"obs": plain[:4], "times": given["times"][:2]}, error=np.full(4, 0.5))
    with pytest.raises(OptionError, match="those of the 2 cycles"):
        xgenda.cycle(**given, resume=True, error=0.6)
    xgenda.cycle(**given | {"obs": plain[:6], "times": given["times"][:3]}, error=np.full(6, 0.5), resume=True)
    run = xgenda.cycle(**given, error={"t2m": np.float64(0.5)}, resume=True)
    np.testing.assert_array_equal(run.t2m, whole.t2m)


def test_nothing_is_inflated_without_observations(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    model = xgenda.gaussian_prior(initial.isel(member=0)[["t2m"]], length_scale=200e3, std=1.0)
    with pytest.warns(UserWarning, match="In 1 of 2 cycles no observation could be used"):
        run = xgenda.cycle(
            initial.assign(u=initial.t2m - 280), obs.iloc[2:4], forecast=drift, model=model, times=pd.unique(obs.time)[:2], seed=3,
            background="members", inflation=1.2,
        )  # fmt: skip
    np.testing.assert_array_equal(run.t2m[0, 0], run.t2m[0, 1])
    np.testing.assert_array_equal(run.u[:, 0], run.u[:, 1])  # the model does not know it
    assert (run.t2m[1, 0] != run.t2m[1, 1]).any()


def test_spread_is_weighted_by_area(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    wide = initial.assign_coords(latitude=[80.0, 50.0, 20.0, -10.0], longitude=20.0 * np.arange(5))
    wide["t2m"] = 280 + (wide.t2m - 280) * xr.DataArray([9.0, 1.0, 1.0, 1.0], dims="latitude")
    latitude, longitude = xr.broadcast(wide.latitude, wide.longitude)
    curved = wide.assign_coords(lat=latitude, lon=longitude).rename(latitude="y", longitude="x").drop_vars(["x", "y"])
    given = options_of(wide, obs.assign(latitude=20.0, longitude=20.0)) | {"times": wide.time.values, "forecast": later}
    flat, bent = (xgenda.cycle(**given | {"initial": ds}).spread.isel(stage=0) for ds in (wide, curved))
    weight = np.cos(np.radians(wide.latitude))
    expected = np.sqrt(wide.t2m.var("member", ddof=1).weighted(weight).mean(("latitude", "longitude")))
    np.testing.assert_allclose(flat, expected, rtol=0.05)
    np.testing.assert_allclose(bent, flat, rtol=0.1)  # great circles as edges; without weights 1.7 times as much


def test_times_of_all_kinds(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    first = {"forecast": drift, "model": xgenda.LETKF(), "window": "6h", "seed": 0}
    times = pd.date_range("2020-01-01", periods=2, freq="6h")
    expected = xgenda.cycle(initial, obs.iloc[:4], times=times, **first)
    hours = xr.DataArray([0, 6], dims="time", attrs={"units": "hours since 2020-01-01"})
    seconds = initial.assign_coords(time=initial.time.values.astype("datetime64[s]"))
    kinds: list[Any] = [
        list(times), times.to_pydatetime().tolist(), times.values.astype("datetime64[s]"), times.astype(str).tolist(), hours,
        times.tz_localize("UTC").tz_convert("Asia/Tokyo"), pd.Series(times), xr.DataArray(times), iter(times),
    ]  # fmt: skip
    for given in kinds:
        run = xgenda.cycle(seconds, obs.iloc[:4], times=given, **first)
        xr.testing.assert_identical(run.drop_attrs(), expected.drop_attrs())
    there = np.array(["1000-01-01"], "datetime64[s]")
    bad: list[tuple[Any, Any, Any, type, str]] = [
        (initial, obs, there, CoordinateError, "times reaches the years 1000-01-01T00:00:00 to 1000-01-01T00:00:00, beyond 1678"),
        (initial.assign_coords(time=there[0]), obs, times, CoordinateError, "initial reaches the years 1000"),
        (initial, obs, [times[0], pd.NaT], OptionError, "times hold NaT"),
        (
            initial, obs, xr.date_range("2020-01-01", periods=2, calendar="noleap", use_cftime=True), CoordinateError,
            "times are DatetimeNoLeap of the calendar 'noleap' and the time of initial is datetime64; use one calendar",
        ),
        (
            initial.assign_coords(time=cftime.DatetimeNoLeap(2020, 1, 1)), obs,
            xr.date_range("2020-01-01", periods=2, calendar="360_day", use_cftime=True), CoordinateError,
            "times are Datetime360Day of the calendar '360_day' and the time of initial is DatetimeNoLeap",
        ),
        (
            initial.assign_coords(time=cftime.DatetimeNoLeap(2020, 1, 1)), obs, None, CoordinateError,
            "The time of obs is datetime64 and that of initial is DatetimeNoLeap",
        ),
    ]  # fmt: skip
    for start, table, given, error, message in bad:
        with pytest.raises(error, match=re.escape(message)):
            xgenda.cycle(start, table, times=given, **first)


@pytest.mark.filterwarnings("ignore:.*observations were not used|.*fall in no window")
def test_observations_on_the_border_of_windows_count_once(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    at = pd.to_datetime(
        ["2019-12-31T21", "2020-01-01T02:59:59.999999999", "2020-01-01T03", "2020-01-01T09", "2020-01-01T15"], format="ISO8601"
    )
    table = pd.concat([obs.iloc[[0]]] * 5).assign(time=at, t2m=280.0, latitude=np.linspace(50, 53, 5))
    first = {
        "forecast": persistence("1h"),
        "model": xgenda.LETKF(),
        "seed": 0,
        "times": pd.date_range("2020-01-01", periods=3, freq="6h"),
    }
    for window, given in (("6h", [2, 1, 1]), ("12h", [2, 1, 2]), ("30D", [2, 1, 2])):  # wider ones overlap: the nearest counts
        run = xgenda.cycle(initial, table, window=window, **first)
        assert run.observations_given.values.tolist() == given


def test_forecasts_in_several_steps_and_before_the_first_analysis(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    times = pd.to_datetime(["2020-01-01T12", "2020-01-02T00"])
    calls = []

    def counted(ds: xr.Dataset) -> xr.Dataset:
        calls.append(ds.time.values)
        return drift(ds)

    run = xgenda.cycle(initial, obs, forecast=counted, model=xgenda.LETKF(), times=times, window="1h", seed=0)
    assert calls == [np.datetime64("2020-01-01T00"), *pd.date_range("2020-01-01T06", periods=3, freq="6h").values]
    xr.testing.assert_allclose(run.t2m.isel(time=0, stage=0, drop=True), drift(drift(initial)).t2m.drop_vars("time"))
    many = pd.concat([obs] * 2).assign(latitude=np.linspace(50, 53, 20))
    with pytest.warns(UserWarning, match="12 of 20 observations fall in no window of the 2 analysis times"):
        xgenda.cycle(initial, many, forecast=drift, model=xgenda.LETKF(), times=times, window="1h", seed=0)


def test_windows_without_observations(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    for bad in (obs.drop(index=[4, 5]), obs.assign(t2m_error=[0.5] * 4 + [np.inf] * 2 + [0.5] * 4)):
        with pytest.warns(UserWarning, match="In 1 of 5 cycles no observation could be used, first at 2020-01-01T12:00"):
            run = xgenda.cycle(initial, bad, forecast=drift, model=xgenda.LETKF(inflation=1.2), window="6h", seed=0)
        assert run.notice.values.tolist() == [0, 0, 1, 0, 0]
        np.testing.assert_array_equal(run.t2m.isel(time=2, stage=0), run.t2m.isel(time=2, stage=1))
        assert run.inflation.values.tolist() == [1.2, 1.2, 1.0, 1.2, 1.2]
        assert np.isnan(run.innovation_rms.values[2, 0])
        assert run.notice.attrs["flag_meanings"].split()[0] == "no_observation_used"
    far = pd.concat([obs] * 6, ignore_index=True)
    far = far.assign(latitude=np.linspace(50, 53, 60)).assign(latitude=lambda t: t.latitude.where(t.index % 3 > 0, -40.0))
    given = {"forecast": drift, "model": xgenda.LETKF(), "window": "6h", "seed": 0, **PLAIN}
    # off the grid is no reason to warn, as in `assimilate`
    assert xgenda.cycle(initial, far, **given).observations_used.sum() == 40
    with pytest.warns(UserWarning, match="In 5 of 5 cycles") as told:
        xgenda.cycle(initial, far.assign(latitude=-40.0, t2m_error=[np.inf] * 6 + [0.5] * 54), **given)
    assert [str(w.message) for w in told] == [
        "In 5 of 5 cycles no observation could be used, first at 2020-01-01T00:00: the analysis is the forecast. Of 60 observations "
        "60 are not used: 60 domain (outside the grid). See the variable notice."
    ]
    near = far.assign(latitude=np.linspace(50, 53, 60), t2m=lambda t: t.t2m.where(t.index >= 50, 320.0))
    with pytest.warns(UserWarning, match="^50 of 60 observations were too far from the background or from their neighbours"):
        xgenda.cycle(initial, near, **given | {"background_check": 5.0, "guard": None})
    with pytest.warns(UserWarning, match="In 5 of 5 cycles .* There are no observations"):
        xgenda.cycle(initial, None, forecast=drift, model=xgenda.LETKF(), times=pd.unique(obs.time), seed=0)


def test_levels_land_and_calendars() -> None:
    rng = np.random.default_rng(2)
    times = xr.date_range("2000-02-28", periods=3, freq="1D", calendar="noleap", use_cftime=True)
    ds = xr.Dataset(
        {"t": (("latitude", "level", "longitude", "member"), rng.normal(270, 2, (3, 2, 4, 5)).astype("float32"), {"units": "K"})},
        coords={
            "time": times[0], "level": ("level", [500.0, 850.0], {"units": "hPa"}), "latitude": [50.0, 51.0, 52.0],
            "longitude": [0.0, 1.0, 2.0, 3.0],
        },
    )  # fmt: skip
    ds["t"] = ds.t.where((ds.latitude > 50) | (ds.longitude > 0))
    table = xr.Dataset(
        {"t": ("obs", [271.0, 272.0, 269.0]), "level": ("obs", [850.0, 500.0, 600.0], {"units": "hPa"})},
        coords={"time": ("obs", times), "latitude": ("obs", [51.0, 51.5, 52.0]), "longitude": ("obs", [1.0, 1.5, 3.0])},
    )

    def forecast(x: xr.Dataset) -> xr.Dataset:
        return x.assign_coords(time=x.time.values[()] + (times[1] - times[0]))

    run = xgenda.cycle(ds, table, forecast=forecast, model=xgenda.LETKF(500e3), times=times, error=0.5, seed=0)
    assert run.t.dims == ("time", "stage", "member", "level", "latitude", "longitude")
    assert run.t.dtype == np.float32
    assert int(np.isnan(run.t).sum()) == 3 * 2 * 5 * 2
    assert run.observations_used.values.tolist() == [1, 1, 1]
    state = ds
    for t in range(3):
        xr.testing.assert_equal(
            run.t.isel(time=t, stage=0).transpose(*state.t.dims).drop_vars(["time", "stage", "member"]), state.t.drop_vars("time")
        )
        state = xgenda.assimilate(state, table.isel(obs=[t]), model=xgenda.LETKF(500e3), error=0.5, seed=0).transpose(*ds.t.dims)
        state = forecast(state)


def test_by_member_and_persistence(initial: xr.Dataset) -> None:
    seen = []

    def one(ds: xr.Dataset) -> xr.Dataset:
        seen.append(ds.t2m.dims)
        return drift(ds)

    xr.testing.assert_equal(by_member(one)(initial), drift(initial))
    assert seen == [("latitude", "longitude")] * 6
    xr.testing.assert_identical(persistence("6h")(initial), later(initial))
    single = initial.isel(member=0)
    xr.testing.assert_identical(by_member(persistence("6h"))(single), later(single))
    with pytest.raises(OptionError, match="step='6 apples' is no time span"):
        persistence("6 apples")
    with pytest.raises(OptionError, match="forecast is a int"):
        by_member(3)


def options_of(initial: xr.Dataset, obs: pd.DataFrame) -> dict[str, Any]:
    return {
        "initial": initial,
        "obs": obs,
        "forecast": drift,
        "model": xgenda.LETKF(400e3, rotation=True),
        "window": "6h",
        "seed": 1,
    }


def test_a_store_is_what_memory_holds(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    given = options_of(initial, obs)
    run = xgenda.cycle(**given)
    stored = xgenda.cycle(**given, store=tmp_path / "run.zarr")
    assert stored.t2m.chunks is not None
    xr.testing.assert_identical(stored.compute().drop_attrs(), run.drop_attrs())
    assert stored.t2m.attrs == run.t2m.attrs
    with xr.open_zarr(tmp_path / "run.zarr") as plain:
        xr.testing.assert_identical(plain.compute(), stored.compute())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.zarr"]
    with pytest.raises(OutputExistsError, match="holds a cycle of 5 analyses. Go on with it: resume=True"):
        xgenda.cycle(**given, store=tmp_path / "run.zarr")
    again = xgenda.cycle(**given, store=tmp_path / "run.zarr", overwrite=True)
    xr.testing.assert_identical(again.compute().drop_attrs(), run.drop_attrs())
    finished = xgenda.cycle(**given, store=tmp_path / "run.zarr", resume=True)
    xr.testing.assert_identical(finished.compute().drop_attrs(), run.drop_attrs())


def test_packing_does_not_reach_a_store(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    """Whatever attributes and encoding say, what is read back is what was computed."""
    packed = {"scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -32768, "missing_value": -32768, "dtype": "int16"}
    odd = {
        "none": None,
        "flag": np.bool_(True),
        "when": pd.Timestamp("2020-01-01"),
        "mapping": {"a": 1},
        "range": np.array([1.0, 2.0]),
    }
    ds = initial.assign(t2m=initial.t2m.assign_attrs(**packed, **odd), orography=initial.orography.assign_attrs(_FillValue=20.0))
    ds = ds.assign(mask=("latitude", np.array([0, 1, 2, 3], "int16"), {"scale_factor": 0.5})).assign_attrs(odd)
    for name in ("t2m", "orography"):
        ds[name].encoding = packed | {"chunks": (1, 2, 3), "zlib": True}
    ds = ds.assign_coords(time=xr.Variable((), initial.time.values, {"units": "days since 1900-01-01"}))
    given = options_of(ds, obs) | {"times": pd.unique(obs.time)}
    expected = xgenda.cycle(**options_of(initial, obs)).drop_attrs()
    xgenda.cycle(**given | {"times": given["times"][:2]}, store=tmp_path / "run.zarr")
    found = xgenda.cycle(**given, store=tmp_path / "run.zarr", resume=True).compute()
    np.testing.assert_array_equal(found["mask"], [0.0, 0.5, 1.0, 1.5])
    xr.testing.assert_identical(found.drop_vars("mask").drop_attrs(), expected)
    assert found.t2m.attrs["when"] == "2020-01-01 00:00:00"
    assert found.t2m.attrs["units"] == "K"
    assert "scale_factor" not in {*found.t2m.attrs, *found.t2m.encoding}


@pytest.mark.parametrize(("kind", "native"), [(">f4", "float32"), ("float16", "float32"), ("longdouble", "float64")])
def test_precisions_and_byte_orders(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path, kind: str, native: str) -> None:
    given = options_of(initial.assign(t2m=initial.t2m.astype(kind)), obs) | {"times": pd.unique(obs.time)[:2]}
    stored = xgenda.cycle(**given, store=tmp_path / "run.zarr")
    assert stored.t2m.dtype == native
    again = xgenda.cycle(**given | {"initial": initial.assign(t2m=initial.t2m.astype(kind).astype(native))})
    np.testing.assert_array_equal(stored.t2m, again.t2m)


def test_a_forecast_that_fails_leaves_a_store_to_go_on_with(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    given, path = options_of(initial, obs), tmp_path / "run.zarr"
    whole = xgenda.cycle(**given)

    def fails(ds: xr.Dataset) -> xr.Dataset:
        if ds.time.values >= np.datetime64("2020-01-01T12"):
            raise RuntimeError("no more")
        return drift(ds)

    with pytest.raises(RuntimeError, match="no more") as found:
        xgenda.cycle(**given | {"forecast": fails}, store=path)
    assert "Cycle 3 of 5" in found.value.__notes__[0]
    so_far = xgenda.open_cycles(path)
    xr.testing.assert_identical(so_far.compute().drop_attrs(), whole.isel(time=slice(0, 3)).drop_attrs())
    resumed = xgenda.cycle(**given, store=path, resume=True)
    xr.testing.assert_identical(resumed.compute().drop_attrs(), whole.drop_attrs())


def test_a_full_disk(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    given, path = options_of(initial, obs), tmp_path / "run.zarr"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(ds: xr.Dataset) -> xr.Dataset:
        if ds.time.values == np.datetime64("2020-01-01T12"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # bytes of a file
        return drift(ds)

    try:
        with pytest.raises(OSError, match="File too large") as found:
            xgenda.cycle(**given | {"forecast": fills}, store=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "is whole up to cycle 3; go on from there with resume=True" in found.value.__notes__[-1]
    whole = xgenda.cycle(**given)
    xr.testing.assert_identical(xgenda.open_cycles(path).compute().drop_attrs(), whole.isel(time=slice(0, 3)).drop_attrs())
    resumed = xgenda.cycle(**given, store=path, resume=True)
    xr.testing.assert_identical(resumed.compute().drop_attrs(), whole.drop_attrs())


def test_a_run_is_extended(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    given, path = options_of(initial, obs), tmp_path / "run.zarr"
    whole = xgenda.cycle(**given)
    xgenda.cycle(**given | {"obs": obs.iloc[:4]}, store=path)
    assert xgenda.open_cycles(path).sizes["time"] == 2
    longer = xgenda.cycle(**given | {"seed": None}, store=path, resume=True)
    xr.testing.assert_identical(longer.compute().drop_attrs(), whole.drop_attrs())
    with pytest.raises(OptionError, match="holds 5 from 2020-01-01T00:00:00 to 2020-01-02T00:00:00; times has 2 from"):
        xgenda.cycle(**given | {"obs": obs.iloc[:4]}, store=path, resume=True)


def test_a_run_of_one_time_is_extended(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    """As one who gives a time a day does: windows may change as long as those of the cycles that are over hold the same."""
    times, path = pd.unique(obs.time), tmp_path / "run.zarr"
    given = options_of(initial, obs) | {"window": None}
    one = xgenda.cycle(**given | {"times": times[:1]}, store=path)
    assert one.attrs["xgenda_window"] == "0 days 01:00:00"
    for n, window, found in ((2, None, 6), (3, "5h", 5), (5, None, 6)):
        longer = xgenda.cycle(**given | {"times": times[:n], "window": window}, store=path, resume=True)
        assert longer.attrs["xgenda_window"] == f"0 days 0{found}:00:00"
    xr.testing.assert_identical(longer.compute().drop_attrs(), xgenda.cycle(**given | {"times": times}).drop_attrs())
    late = obs.assign(time=[times[0], times[0] + np.timedelta64(2, "h"), *obs.time[2:]])  # in the wider window only
    given |= {"obs": late.iloc[:4], "times": times[:2]}
    xgenda.cycle(**given | {"times": times[:1]}, store=path, overwrite=True)
    with pytest.raises(OptionError, match="The window was 0 days 01:00:00 and is 0 days 06:00:00") as refused:
        xgenda.cycle(**given, store=path, resume=True)
    as_before = re.search("window='(.*?)'", str(refused.value))
    assert as_before is not None
    assert xgenda.cycle(**given | {"window": as_before[1]}, store=path, resume=True).observations_given.values.tolist() == [1, 2]


def test_other_options_are_refused_on_resuming(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    given, path = options_of(initial, obs), tmp_path / "run.zarr"
    xgenda.cycle(**given, store=path)
    changes: list[tuple[dict[str, Any], str]] = [
        (
            {"model": xgenda.LETKF(500e3)},
            "model.filter: 'LETKF(localization=400000.0, rotation=True)' then, 'LETKF(localization=500000.0)' now",
        ),
        ({"seed": 2}, "seed: 1 then, 2 now"),
        ({"window": "5h", "times": pd.unique(obs.time)}, "window: '0 days 06:00:00' then, '0 days 05:00:00' now"),
        ({"background_check": 4.0}, "background_check: 5.0 then, 4.0 now"),
        ({"initial": initial + 1e-9 * initial}, "initial: the data differ"),
        ({"obs": obs.assign(t2m=obs.t2m + 1e-9)}, "resume=True goes on with the same observations"),
        ({"guard": None}, "guard: {'chi2': 4.0"),
    ]
    for change, message in changes:
        with pytest.raises(OptionError, match=re.escape(message)):
            xgenda.cycle(**{**given, **change}, store=path, resume=True)
    record = json.loads((path / "cycle.json").read_text())
    assert record["done"] == 5
    (path / "cycle.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this one reads 1"):
        xgenda.open_cycles(path)


def test_other_data_are_refused_on_resuming(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    """What has the same options and the same observed values, and is not the same."""
    obs = obs.iloc[:4]
    given, path = options_of(initial, obs) | {"times": pd.unique(obs.time)}, tmp_path / "run.zarr"
    many = pd.concat([obs] * 2).assign(latitude=np.linspace(50, 53, 8))
    guards = [xgenda.DivergenceGuard(restart=ds) for ds in (initial, initial + 1)]
    warm = [{"warm": xgenda.operators.Operator(("t2m",), f, "K")} for f in (lambda x: 1.0 * x, lambda x: 1.0 * x + 0.1)]
    wide = [{"warm": xgenda.operators.footprint("t2m", radius=r)} for r in (100e3, 150e3)]
    renamed = obs.rename(columns={"t2m": "warm", "t2m_error": "warm_error"})
    plain = many.drop(columns="t2m_error").reset_index(drop=True)
    r = 0.2 * np.eye(8) + 0.05
    r[0, 1] = r[1, 0] = 0.06
    covariances = [xgenda.ErrorCovariance(matrix=m) for m in (0.2 * np.eye(8) + 0.05, r)]
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"initial": initial.assign_coords(member=initial.member + 1)}, "initial: the data differ"),
        ({}, {"initial": initial.assign(t2m=initial.t2m.assign_attrs(units="degC"))}, "initial: the data differ"),
        ({}, {"initial": initial.assign(orography=initial.orography + 1)}, "initial: the data differ"),
        ({}, {"initial": initial.assign_coords(time=initial.time - STEP)}, "initial: the data differ"),
        ({"guard": guards[0]}, {"guard": guards[1]}, "guard.restart: the data differ"),
        ({"obs": renamed, "operators": warm[0]}, {"operators": warm[1]}, "operators.warm: 'mean "),
        ({"obs": renamed, "operators": wide[0]}, {"operators": wide[1]}, "the same observations, errors and operators"),
        (
            {"obs": plain, "model": xgenda.LETKF(), "error": covariances[0]}, {"error": covariances[1]},
            "the same observations, errors and operators",
        ),
    ]  # fmt: skip
    for first, change, message in cases:
        begun = given | {"overwrite": path.exists()} | first
        xgenda.cycle(**begun, store=path)
        with pytest.raises(OptionError, match=re.escape(message)):
            xgenda.cycle(**begun | {"overwrite": False} | change, store=path, resume=True)
    xgenda.cycle(**given | {"overwrite": True}, store=path)
    same = xgenda.cycle(**given | {"window": pd.Timedelta(hours=6)}, store=path, resume=True)
    assert same.sizes["time"] == 2


def test_a_forecast_of_other_steps_is_refused_on_resuming(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    given = options_of(initial, obs) | {"forecast": persistence("3h"), "times": pd.unique(obs.time)}
    xgenda.cycle(**given | {"times": pd.unique(obs.time)[:3]}, store=tmp_path / "run.zarr")
    with pytest.raises(OptionError, match="this one goes 21600 s ahead at a time, that of the cycles in the store 10800 s"):
        xgenda.cycle(**given | {"forecast": persistence("6h")}, store=tmp_path / "run.zarr", resume=True)
    assert xgenda.cycle(**given, store=tmp_path / "run.zarr", resume=True).sizes["time"] == 5


def test_times_to_come_may_change(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    def fails(ds: xr.Dataset) -> xr.Dataset:
        if ds.time.values >= np.datetime64("2020-01-01T12"):
            raise RuntimeError("no more")
        return persistence("1h")(ds)

    given, path = options_of(initial, obs), tmp_path / "run.zarr"
    with pytest.raises(RuntimeError, match="no more"):
        xgenda.cycle(**given | {"forecast": fails}, store=path)
    others = [*pd.date_range("2020-01-01", periods=3, freq="6h"), pd.Timestamp("2020-01-01T17"), pd.Timestamp("2020-01-02")]
    for times in (others[:4], others):
        given |= {"forecast": persistence("1h"), "times": times}
        resumed = xgenda.cycle(**given, store=path, resume=True)
        xr.testing.assert_identical(resumed.compute().drop_attrs(), xgenda.cycle(**given).drop_attrs())


@pytest.mark.parametrize(
    ("file", "content", "whole"),
    [
        ("t2m/2.0.0.0.0", None, 2),
        ("t2m/2.0.0.0.0", b"cut", 2),
        ("t2m/2.0.0.0.0", b"\0" * 2 * 6 * 20 * 8, 2),  # of the right size
        ("chi2/2", b"", 2),
        ("t2m/1.0.0.0.0", b"cut", 1),
        ("spread/0.0.0", None, 0),
    ],
)
def test_cycles_that_are_damaged_are_computed_again(
    initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path, file: str, content: bytes | None, whole: int
) -> None:
    given, path = options_of(initial, obs), tmp_path / "run.zarr"
    xgenda.cycle(**given | {"obs": obs.iloc[:6]}, store=path)
    (path / file).unlink() if content is None else (path / file).write_bytes(content)
    with pytest.warns(UserWarning, match=f"is damaged: {re.escape(file)} .* Of its 3 cycles the first {whole} are whole"):
        resumed = xgenda.cycle(**given, store=path, resume=True)
    xr.testing.assert_identical(resumed.compute().drop_attrs(), xgenda.cycle(**given).drop_attrs())


def test_stores_that_are_damaged_are_refused(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    given, path = options_of(initial, obs), tmp_path / "run.zarr"
    xgenda.cycle(**given | {"obs": obs.iloc[:6]}, store=path)
    record = json.loads((path / "cycle.json").read_text())
    header = json.loads((path / "t2m" / ".zarray").read_text())
    cases: list[tuple[str, str | None, str]] = [
        ("t2m/.zarray", None, "its array 't2m' cannot be read: FileNotFoundError"),
        ("chi2/.zarray", "{", "its array 'chi2' cannot be read: JSONDecodeError"),
        ("t2m/.zarray", json.dumps(header | {"dtype": "<f4"}), "its array 't2m' is of float32 (2, 6, 4, 5), and float64 (2, 6, 4, 5) was laid out"),
        (".zmetadata", None, "it cannot be opened as a Zarr group"),
        ("time/0", None, "its times do not ascend"),
        ("cycle.json", json.dumps(record | {"done": 99}), "says that 99 cycles are whole, and there is room for 3"),
        ("cycle.json", json.dumps(record | {"done": "x"}), "cycle.json has done='x'"),
        ("cycle.json", json.dumps({k: v for k, v in record.items() if k != "seed"}), "cycle.json has seed=None"),
    ]  # fmt: skip
    for file, content, message in cases:
        before = (path / file).read_bytes()
        (path / file).unlink() if content is None else (path / file).write_text(content)
        with pytest.raises(
            CheckpointError, match=f"is damaged: .*{re.escape(message)}.* start again: resume=False, overwrite=True"
        ):
            xgenda.cycle(**given | {"seed": None}, store=path, resume=True)
        (path / file).write_bytes(before)
    assert xgenda.cycle(**given, store=path, resume=True).sizes["time"] == 5


def test_all_of_a_cycle_is_on_the_disk_before_it_is_said_to_be_whole(
    initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, path = options_of(initial, obs), tmp_path / "run.zarr"
    xgenda.cycle(**given | {"obs": obs.iloc[:4]}, store=path)
    flushed, flush, replace = [], os.fsync, os.replace
    events: list[tuple[str, str]] = []

    def flushes(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        flush(handle)

    def replaces(source: Any, target: Any) -> Any:
        if "/.z" in os.fspath(target) or "/time/" in os.fspath(target):  # by zarr, to make room
            return replace(source, target)
        events.append((os.fspath(source), os.fspath(target)))
        if str(target).endswith("cycle.json"):
            written = [(s, t) for s, t in events if not t.endswith("cycle.json")]
            assert all(s in flushed and os.path.dirname(t) in flushed for s, t in written)
        assert os.fspath(source) in flushed
        return replace(source, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs the names of open files")
    monkeypatch.setattr(os, "fsync", flushes)
    monkeypatch.setattr(os, "replace", replaces)
    xgenda.cycle(**given | {"obs": obs.iloc[:6]}, store=path, resume=True)
    assert {os.path.relpath(t, path) for _, t in events} >= {"t2m/2.0.0.0.0", "chi2/2", "cycle.json"}
    assert flushed[-1] == str(path)


def test_what_is_no_store_is_left_alone(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    given = options_of(initial, obs)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputExistsError, match="is no store of a cycle"):
        xgenda.cycle(**given, store=tmp_path / "mine", overwrite=True)
    with pytest.raises(CheckpointError, match="is no store of a cycle"):
        xgenda.cycle(**given | {"seed": None}, store=tmp_path / "mine", resume=True)
    with pytest.raises(CheckpointError, match="mine is no store of a cycle: it has no cycle.json, which each has. Give"):
        xgenda.open_cycles(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="yours is no store of a cycle: there is no such folder. Give"):
        xgenda.open_cycles(tmp_path / "yours")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    with pytest.raises(OptionError, match="a store lies on a local disk"):
        xgenda.cycle(**given, store="s3://bucket/run.zarr")
    with pytest.raises(OptionError, match="mkdir -p"):
        xgenda.cycle(**given, store=tmp_path / "not" / "there.zarr")


def test_two_writers(initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path) -> None:
    given, path = options_of(initial, obs), tmp_path / "run.zarr"
    messages = []

    def meddles(ds: xr.Dataset) -> xr.Dataset:
        try:
            xgenda.cycle(**given, store=path, resume=True)
        except OutputExistsError as error:
            messages.append(str(error))
        return drift(ds)

    xgenda.cycle(**given | {"forecast": meddles}, store=path)
    assert len(messages) == 4
    assert f"run.zarr is being written by process {os.getpid()} on " in messages[0]


PROGRAM = """
import importlib.util, sys
import xgenda
spec = importlib.util.spec_from_file_location("lorenz", sys.argv[1])
lorenz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lorenz)
initial, truth, obs = lorenz.twin(100, 7, 0)
xgenda.cycle(
    initial, obs, forecast=lorenz.forecast, model=lorenz.METHODS["LETKF"][1], times=truth.time, error=1.0, seed=5, store=sys.argv[2],
    progress=False,
)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_bit(lorenz: ModuleType, tmp_path: Path) -> None:
    path, program = tmp_path / "run.zarr", tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(PROGRAMS / "lorenz96.py"), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not path.exists() or json.loads((path / "cycle.json").read_text())["done"] < 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(np.random.default_rng().uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    so_far = xgenda.open_cycles(path).compute()  # readable whatever the moment
    assert np.isfinite(so_far.x).all()
    assert 5 <= so_far.sizes["time"] < 100
    initial, truth, obs = lorenz.twin(100, 7, 0)
    given = {"forecast": lorenz.forecast, "model": lorenz.METHODS["LETKF"][1], "times": truth.time, "error": 1.0, "seed": 5}
    resumed = xgenda.cycle(initial, obs, **given, store=path, resume=True)
    whole = xgenda.cycle(initial, obs, **given)
    xr.testing.assert_identical(resumed.compute().drop_attrs(), whole.drop_attrs())
    xr.testing.assert_identical(so_far.drop_attrs(), whole.isel(time=slice(0, so_far.sizes["time"])).drop_attrs())
    assert not list(path.rglob("*.partial*"))


def test_the_guard_stops_a_run_that_diverges(lorenz: ModuleType, tmp_path: Path) -> None:
    # seven members without inflation and localisation
    initial, truth, obs = lorenz.twin(200, 7, 0)
    given = {"forecast": lorenz.forecast, "model": xgenda.LETKF(), "times": truth.time, "error": 1.0, "seed": 0}
    with pytest.raises(DivergenceError, match="the run has diverged: squared innovations were") as found:
        xgenda.cycle(initial, obs, **given, store=tmp_path / "run.zarr")
    result = found.value.result
    assert result.sizes["time"] == found.value.cycle + 1 < 200
    last = result.isel(time=slice(-5, None)).compute()
    assert (last.chi2 > 4).all()
    assert (last.notice == 4).all()
    assert result.chi2[-6] <= 4
    error = last.x.sel(stage="analysis").mean("member") - truth.x.sel(time=last.time)
    assert float((error**2).mean()) > 4 * float((last.spread.sel(stage="analysis") ** 2).mean())  # sure of itself


def test_the_guard_goes_on_from_other_states(lorenz: ModuleType) -> None:
    initial, truth, obs = lorenz.twin(120, 28, 0)
    rng = np.random.default_rng(0)
    climate = (
        lorenz.twin(2000, 2, 9)[1].rename(time="member").isel(member=slice(None, None, 10)).assign_coords(member=np.arange(200))
    )
    far = initial + 4.0 * rng.standard_normal(initial.x.shape[-1])  # lost from the start, and sure of itself
    guard = xgenda.DivergenceGuard(restart=climate, cycles=3)
    with pytest.warns(UserWarning, match=r"Cycle \d+ of 120 .* It goes on from states of DivergenceGuard"):
        run = xgenda.cycle(
            far, obs, forecast=lorenz.forecast, model=xgenda.LETKF(inflation=1.05, rotation=True), times=truth.time, error=1.0, seed=0,
            guard=guard, **PLAIN,
        )  # fmt: skip
    restarted = np.flatnonzero(run.notice.values & 2)
    assert 1 <= len(restarted) <= 3
    assert lorenz.scores(run, truth)["rmse"] < 0.3


def test_states_that_are_broken(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    given = options_of(initial, obs)

    def breaks(ds: xr.Dataset) -> xr.Dataset:
        out = drift(ds)
        return out.assign(t2m=out.t2m.where((out.member != 3) | (out.time < np.datetime64("2020-01-01T12"))))

    with pytest.raises(
        DivergenceError, match=r"Cycle 2 of 5 .*'t2m' is not finite in 1 of 6 members, first in member 3"
    ) as found:
        xgenda.cycle(**given | {"forecast": breaks})
    assert found.value.cycle == 2
    assert found.value.result.sizes["time"] == 2
    with pytest.raises(DivergenceError, match="Cycle 0 of 5 .* the forecast is broken: 't2m' reaches 27"):
        xgenda.cycle(**given, guard=xgenda.DivergenceGuard(limits={"t2m": (279.9, 300)}))


@pytest.mark.parametrize("limits", [None, {"t2m": (200, 400)}])
def test_the_guard_replaces_states_that_are_broken(
    initial: xr.Dataset, obs: pd.DataFrame, tmp_path: Path, limits: dict[str, tuple[float, float]] | None
) -> None:
    def breaks(ds: xr.Dataset) -> xr.Dataset:
        out, at = drift(ds), ds.time.values == np.datetime64("2020-01-01T06")
        return out.assign(t2m=out.t2m.where((out.member != 3) | ~at, 1e3 if limits else np.nan))

    guard = xgenda.DivergenceGuard(restart=initial.drop_vars("time").rename(member="time"), limits=limits, most=1)
    given = options_of(initial, obs) | {"forecast": breaks, "guard": guard}
    message = "reaches 1000" if limits else "is not finite in 1 of 6 members"
    with pytest.warns(
        UserWarning, match=rf"Cycle 2 of 5 .* is broken: 't2m' {message}.* It goes on from states of DivergenceGuard"
    ):
        run = xgenda.cycle(**given)
    assert (run.notice.values & 2).tolist() == [0, 0, 2, 0, 0]
    np.testing.assert_array_equal(run.t2m[2, 0], initial.t2m)  # six of six
    with pytest.warns(UserWarning, match="It goes on"):
        xgenda.cycle(**given | {"obs": obs.iloc[:8]}, store=tmp_path / "run.zarr")
    resumed = xgenda.cycle(**given, store=tmp_path / "run.zarr", resume=True)
    xr.testing.assert_identical(resumed.compute().drop_attrs(), run.drop_attrs())

    def breaks_again(ds: xr.Dataset) -> xr.Dataset:
        return drift(ds) * np.where(ds.time.values > np.datetime64("2020-01-01T00"), np.nan, 1.0)

    with (
        pytest.warns(UserWarning, match="Cycle 2 of 5"),
        pytest.raises(DivergenceError, match="Cycle 3 of 5 .* is broken: 't2m' is not finite in 6 of 6 members"),
    ):
        xgenda.cycle(**given | {"forecast": breaks_again})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda ds: ds,
            StateError,
            "returned the time 2020-01-01T00:00:00.000000000; it must be later. If it is of the next analysis, at 2020-01-01T06:00:00.000000000, "
            "say so: out.assign_coords(time=ds.time + numpy.timedelta64(21600, 's'))",
        ),
        (
            persistence("4h"),
            StateError,
            "from 2020-01-01T04:00:00.000000000 returned the time 2020-01-01T08:00:00.000000000, beyond the next analysis at "
            "2020-01-01T06:00:00.000000000. The step of the forecast, 4 h, must divide the 6 h from 2020-01-01T00:00:00.000000000 to there: give "
            "one of shorter steps, such as xgenda.forecasts.persistence('2h'), or other times=...",
        ),
        (lambda ds: ds.drop_vars("time"), StateError, "returned no time; it must be later"),
        (
            lambda ds: later(ds).drop_vars("t2m"),
            StateError,
            "What forecast returned lacks the variable 't2m' of the state; it has 'orography'",
        ),
        (lambda ds: later(ds).mean("member"), StateError, "xgenda.forecasts.by_member(forecast)"),
        (
            lambda ds: later(ds).isel(member=slice(0, 3)),
            GridError,
            "has shape (3, 4, 5) along ('member', 'latitude', 'longitude'); (6, 4, 5)",
        ),
        (
            lambda ds: later(ds).assign_coords(latitude=[54.0, 53.0, 52.0, 51.0]),
            GridError,
            "its 'latitude' goes from 54 to 51, and that of initial from 53 to 50. Interpolate: out.interp_like(ds)",
        ),
        (
            lambda ds: later(ds).assign_coords(latitude=[53.0, np.nan, 51.0, 50.0]),
            GridError,
            "coordinate 'latitude' with values that are not finite",
        ),
        (
            lambda ds: later(ds).assign_coords(member=ds.member.values + 1),
            StateError,
            "has 6 members, called 1, 2, 3, 4, 5, 6, and the state has 6, called 0, 1, 2, 3, 4, 5",
        ),
        (
            lambda ds: later(ds.assign(t2m=ds.t2m.assign_attrs(units="Pa"))),
            UnitsError,
            "What forecast returned['t2m'] is in 'Pa', and the state in 'K'",
        ),
        (
            lambda ds: later(ds).astype("int32"),
            StateError,
            "What forecast returned['t2m'] has dtype int32; real numbers are needed",
        ),
        (lambda ds: later(ds).astype(complex), StateError, "What forecast returned['t2m'] has dtype complex128"),
        (lambda ds: later(ds).astype(object), StateError, "What forecast returned['t2m'] has dtype object"),
        (lambda ds: ds.assign_coords(time=6), CoordinateError, "has the time 6, a int64, and the state has datetime64"),
        (lambda ds: ds.assign_coords(time="2020-01-01T06"), CoordinateError, "has the time 2020-01-01T06, a str_"),
        (lambda ds: ds.assign_coords(time=np.datetime64("NaT", "ns")), StateError, "returned the time NaT; it must be later"),
        (
            lambda ds: ds.assign_coords(time=cftime.DatetimeGregorian(2020, 1, 1, 6)),
            CoordinateError,
            "cftime of the calendar 'standard', and the state has datetime64. Count from that: out.assign_coords(time=ds.time + step)",
        ),
        (
            lambda ds: later(ds).t2m,
            OptionError,
            "is a xarray.core.dataarray.DataArray; an xarray Dataset is needed: make it one: out.to_dataset(",
        ),
        (lambda ds: later(ds).t2m.values, OptionError, "ds.assign(t2m=(ds['t2m'].dims, values))"),
        (
            lambda _: None,
            OptionError,
            "What forecast returned is None; an xarray Dataset is needed. Its last line should be: return out",
        ),
        (lambda ds: later(ds).isel(latitude=slice(0, 3)), GridError, "(6, 4, 5) is needed. Interpolate: out.interp_like(ds)"),
        (
            lambda ds: later(ds).expand_dims(step=2),
            StateError,
            "('step', 'member', 'latitude', 'longitude'); ('member', 'latitude', 'longitude')",
        ),
    ],
)
def test_forecasts_that_return_no_state(initial: xr.Dataset, obs: pd.DataFrame, change: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        xgenda.cycle(**options_of(initial, obs) | {"forecast": change})


def turned(ds: xr.Dataset) -> xr.Dataset:
    """The same state as another program would write it: other orders, degrees Celsius, longitudes to 360, and time since a date."""
    hours = (ds.time.values - np.datetime64("2020-01-01")) / np.timedelta64(1, "h")
    out = ds.isel(latitude=slice(None, None, -1), member=[3, 1, 5, 0, 4, 2]).transpose("longitude", "member", "latitude")
    out = out.assign(t2m=(out.t2m - 273.15).assign_attrs(units="degC"), orography=out.orography + 1)
    out = out.assign_coords(longitude=out.longitude.astype("float32") % 360).sortby("longitude")
    return out.assign_coords(time=((), float(hours), {"units": "hours since 2020-01-01"}))


def test_what_a_forecast_returns_is_read_by_its_labels(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    west = initial.assign_coords(longitude=initial.longitude - 2)  # on both sides of Greenwich
    given = options_of(west, obs.assign(longitude=obs.longitude - 2))
    plain = xgenda.cycle(**given)
    other = xgenda.cycle(**given | {"forecast": lambda ds: turned(drift(ds))})
    xr.testing.assert_allclose(other.drop_attrs(), plain.drop_attrs(), rtol=1e-12)
    xr.testing.assert_identical(other.orography, plain.orography)  # only the state is forecast


def test_a_forecast_may_write_into_what_it_gets(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    def writes(ds: xr.Dataset) -> xr.Dataset:
        out = drift(ds)
        for name in ("t2m", "orography"):
            ds[name].values[:] = -1.0
        ds.attrs["title"] = "another"
        return out

    given = options_of(initial, obs)
    plain, found = xgenda.cycle(**given), xgenda.cycle(**given | {"forecast": writes})
    xr.testing.assert_identical(found.drop_attrs(deep=False), plain.drop_attrs(deep=False))
    assert found.attrs["title"] == "a test"


def test_a_forecast_may_leave_anything_on_land(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    sea = initial.assign(t2m=initial.t2m.where(initial.longitude > 0))
    given = options_of(sea, obs.assign(longitude=obs.longitude.clip(1.5)))
    plain, filled = (xgenda.cycle(**given | {"forecast": f}) for f in (later, lambda ds: later(ds.fillna(0.0))))
    xr.testing.assert_identical(filled.drop_attrs(), plain.drop_attrs())


def test_curvilinear_forecasts_are_compared(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    latitude, longitude = xr.broadcast(initial.latitude, initial.longitude)
    tilted = (
        initial.assign_coords(lat=latitude + 0.1 * longitude, lon=longitude)
        .rename(latitude="y", longitude="x")
        .drop_vars(["x", "y"])
    )
    given = options_of(tilted, obs)
    same = xgenda.cycle(**given | {"forecast": lambda ds: later(ds.assign_coords(lon=ds.lon + 360))})
    xr.testing.assert_identical(same.drop_attrs(), xgenda.cycle(**given | {"forecast": later}).drop_attrs())
    with pytest.raises(GridError, match="its 'lat' differs by up to"):
        xgenda.cycle(**given | {"forecast": lambda ds: later(ds.isel(y=slice(None, None, -1)))})


def test_initial_states_that_are_refused(initial: xr.Dataset, obs: pd.DataFrame) -> None:
    given = options_of(initial, obs)
    cases: list[tuple[xr.Dataset, type, str]] = [
        (initial.drop_vars("time"), CoordinateError, "initial has no time; say of when it is"),
(xr.concat([initial, later(initial)], "time"), CoordinateError, "initial has 2 times, and a cycle starts from one"),
        (initial.isel(member=0), OptionError, "A filter needs an ensemble to begin with"),
        (initial.isel(member=[0]), OptionError, "ds has 1 member"),
        (initial.astype("int32"), StateError, "initial has no variable of real numbers"),
        (initial.where(initial.member != 2), StateError, "NaN or infinity in some members"),
        (initial.rename(t2m="chi2"), OptionError, "initial has a variable 'chi2'"),
        (initial.expand_dims("sea"), CoordinateError, "extra dimension 'sea'"),
    ]  # fmt: skip
    for bad, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            xgenda.cycle(**given | {"initial": bad})


def test_options_that_are_refused(initial: xr.Dataset, obs: pd.DataFrame, tiny_prior: Any) -> None:
    given = options_of(initial, obs)
    gaussian = xgenda.gaussian_prior(initial.isel(member=0)[["t2m"]], length_scale=200e3, std=1.0)
    cases: list[tuple[dict[str, Any], type, str]] = [
        ({"window": None}, OptionError, "times or window is needed"),
        ({"window": "soon"}, OptionError, "window='soon' is no time span"),
        ({"times": ["2019-12-31"]}, OptionError, "before initial"),
        ({"times": ["2020-01-02", "2020-01-01"]}, OptionError, "times must ascend"),
        ({"times": [3, 4]}, OptionError, "times=[3, 4] is not accepted"),
        ({"times": ["x"]}, OptionError, "times=['x'] is not accepted"),
        ({"obs": None}, OptionError, "times is needed where obs has none"),
        ({"obs": obs.assign(time=obs.time - pd.Timedelta("30D"))}, OptionError, "before the first analysis time"),
        ({"obs": obs.rename(columns={"t2m": "rain", "t2m_error": "rain_error"})}, ObservationError, "which is not in the state"),
        ({"forecast": persistence}, OptionError, "call it: forecast=xgenda.forecasts.persistence('6h')"),
        ({"model": xgenda.LETKF}, OptionError, "model is the class LETKF itself; make one of it: model=xgenda.LETKF(...)"),
        ({"initial": initial.rename(member="ens")}, OptionError, "If 'ens' is it, call it so: initial.rename({'ens': 'member'})"),
        (
            {"obs": obs.rename(columns={"t2m": "rain"})}, ObservationError, "If that is it, call it so: obs.rename(columns={'rain': 't2m'})",
        ),
        ({"window": initial}, OptionError, "window of Dataset is no time span"),
        ({"forecast": "persistence"}, OptionError, "forecast is a str; a function from a Dataset"),
        ({"members": 7}, OptionError, "members=7 is not accepted: initial has 6"),
        ({"inflation": 1.1}, OptionError, "A filter has its own inflation: model=xgenda.LETKF(inflation=1.1"),
        ({"background": "mean"}, OptionError, "a filter has its ensemble"),
        ({"guidance": "mmps"}, OptionError, "a filter draws nothing"),
        ({"guard": 3}, OptionError, "guard=3 is not accepted"),
        ({"resume": True}, OptionError, "resume=True needs a store"),
        ({"resume": True, "overwrite": True, "store": "x.zarr"}, OptionError, "exclude each other"),
        ({"resume": 1}, OptionError, "resume=1 is not accepted"),
        ({"model": gaussian, "inflation": 1.1}, OptionError, "inflation=1.1 has no effect with background='control'"),
        ({"model": gaussian, "rtps": 0.5}, OptionError, "rtpp and rtps need forecasts of all members"),
        ({"model": gaussian, "background": "best"}, OptionError, "background='best' is not accepted"),
        ({"model": tiny_prior}, GridError, "model='tiny-prior' works on the grid 8 x 12"),
        ({"guard": xgenda.DivergenceGuard(limits={"q": (0, 1)})}, OptionError, "limits names 'q'"),
        ({"guard": xgenda.DivergenceGuard(restart=initial.isel(member=slice(0, 3)))}, OptionError, "restart has 3 states"),
        (
            {"guard": xgenda.DivergenceGuard(restart=initial.where(initial.member != 4))}, StateError,
            "restart: 't2m' is not finite in 1 of 6 members, first in member 4, where initial has values",
        ),
        (
            {"guard": xgenda.DivergenceGuard(restart=initial, limits={"t2m": (0, 280)})}, StateError,
            "restart is beyond the limits itself: 't2m' reaches",
        ),
        ({"initial": initial.isel(member=[0, 0]).assign_coords(member=[0, 1])}, StateError, "All members of initial are the same"),
        ({"guard": xgenda.DivergenceGuard(restart=initial.isel(member=0, drop=True))}, OptionError, "neither a dimension 'member' nor 'time'"),
    ]  # fmt: skip
    for change, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            xgenda.cycle(**given | change)
    for wrong, message in (
        ({"chi2": 0.5}, "chi2=0.5 is not accepted"), ({"cycles": 0}, "cycles=0"), ({"limits": {"t": (2, 1)}}, "limits['t']=(2, 1)"),
        ({"restart": 3}, "restart is a int"), ({"limits": {"t": (None, 2)}}, "limits['t']=(None, 2) is not accepted"),
        ({"limits": {"t": "ab"}}, "limits['t']='ab'"), ({"limits": (1, 2)}, "limits=(1, 2) is not accepted; give a mapping"),
        ({"limits": {"t": (float("nan"), 2)}}, "limits['t']=(nan, 2)"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=re.escape(message)):
            xgenda.DivergenceGuard(**wrong)


def test_a_model_that_forgets_is_named(climate: xr.Dataset, tiny_prior: Any) -> None:
    name, times = next(iter(climate.data_vars)), climate.time.values[:2]
    places = {"latitude": ("obs", climate.latitude.values[3:4]), "longitude": ("obs", climate.longitude.values[4:5])}
    table = xr.Dataset({name: ("obs", [float(climate[name].mean())])}, coords={**places, "time": ("obs", times[1:])})
    given = {"error": 5.0, "members": 3, "seed": 0}
    for model in (xgenda.gaussian_prior(climate, covariance="eof", rank=3), tiny_prior):
        with pytest.warns(UserWarning, match="does not read its background"):
            run = xgenda.cycle(
                climate.isel(time=0), table, forecast=persistence(times[1] - times[0]), model=model, times=times[1:], **given
            )
        alone = xgenda.assimilate(climate.isel(time=1), table, model=model, **given)[name]
        np.testing.assert_allclose(run[name].values[0, 1].std(0), alone.std("member").values, rtol=1e-5)


def test_the_guard_is_told_by_the_last_cycles() -> None:
    guard = xgenda.DivergenceGuard(chi2=4.0, cycles=3)
    nan = float("nan")
    assert guard.lost([9, 9]) is None
    assert guard.lost([9, 9, 9, 1]) is None
    assert guard.lost([9, 9, 1, 9]) is None
    assert "9.0 to 10.0 times" in str(guard.lost([1, 9, nan, 10, nan, 9]))
    assert dataclasses.replace(guard, cycles=1).lost([nan]) is None
    assert "inf times" in str(guard.lost([float("inf")] * 3))


def test_background_models_and_diffusion_forecasts_cycle(climate: xr.Dataset) -> None:
    """The first analysis is that of `assimilate`, and a model of task 'forecast' is a forecast like any other."""
    step, name = "360D", next(iter(climate.data_vars))
    options: dict[str, Any] = {"lag": step, "anchor": "eof", "steps": 2, "width": 8, "progress": False}
    past, future = climate.isel(time=slice(0, 27)), climate.isel(time=slice(27, 30))
    model = xgenda.train(past, task="background", **options)
    ahead = xgenda.train(past, task="forecast", **options)
    obs = future.isel(time=slice(1, None), latitude=slice(None, None, 4), longitude=slice(None, None, 4))
    given: dict[str, Any] = {"model": model, "error": 0.3, "members": 3, "seed": 0, "steps": 4, "progress": False}
    cycled: dict[str, Any] = {"times": future.time[1:], **given}
    run = xgenda.cycle(future.isel(time=0), obs, forecast=persistence(step), **cycled)
    background = future.isel(time=[0]).assign_coords(time=future.time[1:2])
    alone = xgenda.assimilate(background, obs.isel(time=[0]), **given)
    np.testing.assert_array_equal(
        run[name].sel(stage="analysis").values[0], alone[name].transpose("time", "member", ...).values[0]
    )
    forecast = functools.partial(xgenda.forecast, model=ahead, seed=0, steps=4, progress=False)
    run = xgenda.cycle(future.isel(time=0), obs, forecast=forecast, **cycled)
    expected = forecast(future.isel(time=[0]), members=1)[name]
    assert run[name].sel(stage="background").isel(time=0, member=0).values == pytest.approx(expected.values.squeeze(), rel=1e-5)
    # one seed for both, and yet the analysis has random numbers of its own
    wide = obs.isel(time=[0], latitude=[0], longitude=[0])
    run = xgenda.cycle(
        future.isel(time=0),
        wide,
        forecast=forecast,
        **cycled | {"times": future.time[1:2], "error": 1e3, "members": 12},
        background="members",
    )
    off = run[name].isel(time=0) - run[name].isel(time=0).mean("member")
    before, after = (off.sel(stage=s) for s in ("background", "analysis"))
    own = after - before * float((before * after).sum() / (before**2).sum())
    assert float((own**2).sum() / (after**2).sum()) > 0.2

"""Models of windows of states: all times of a Dataset solved together, from training to the lazy result."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import xgenda
from xgenda.errors import ChunkingError, GridError, OptionError, StateError
from xgenda.models.generative import GenerativeModel
from xgenda.training.windows import window_rows

MEMORY = 0.6  # correlation from one day to the next


@pytest.fixture(scope="module")
def series() -> xr.Dataset:
    """A smooth pattern whose amplitude is a first-order autoregressive process, and a little noise."""
    rng = np.random.default_rng(0)
    amplitude = np.zeros(600)
    for t in range(1, 600):
        amplitude[t] = MEMORY * amplitude[t - 1] + np.sqrt(1 - MEMORY**2) * rng.standard_normal()
    pattern = np.outer(np.linspace(0.8, 1.2, 6), np.linspace(0.9, 1.1, 6))
    values = amplitude[:, None, None] * pattern + 0.1 * rng.standard_normal((600, 6, 6))
    return xr.Dataset(
        {"x": (("time", "latitude", "longitude"), values)},
        coords={
            "time": np.datetime64("2000-01-01", "ns") + np.arange(600) * np.timedelta64(1, "D"),
            "latitude": np.linspace(0, 25, 6),
            "longitude": np.linspace(0, 25, 6),
        },
    )


@pytest.fixture(scope="module")
def model(series: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> GenerativeModel:
    path = tmp_path_factory.mktemp("models") / "window.safetensors"
    xgenda.train(series, window=5, anchor="eof", steps=1, width=8, learning_rate=1e-30, out=path, progress=False)
    return xgenda.load_model(path)


@pytest.fixture(scope="module")
def days(series: xr.Dataset) -> xr.Dataset:
    return series.isel(time=slice(100, 109))


@pytest.fixture(scope="module")
def obs(days: xr.Dataset) -> xr.Dataset:
    """One day, five cells, all at two standard deviations."""
    out = xr.full_like(days, np.nan)
    out.x[4, [1, 2, 2, 3, 4], [1, 1, 3, 2, 4]] = 2.0
    out["x_error"] = xr.where(np.isfinite(out.x), 0.2, np.nan)
    return out


def run(days: xr.Dataset, obs: xr.Dataset | None, model: GenerativeModel, **options: object) -> xr.Dataset:
    given = {"members": 4, "seed": 0, "steps": 8, "sampler": "dpm++", "guidance_options": {"iterations": 3}, "progress": False}
    return xgenda.assimilate(days, obs, model=model, **given | options)


def test_observations_act_on_the_days_around(days: xr.Dataset, obs: xr.Dataset, model: GenerativeModel) -> None:
    """Away from the observed day the posterior mean decays like the memory of the process."""
    result = run(days, obs, model, members=24, steps=16)
    assert result.attrs["xgenda_guidance"].startswith("anchor")
    mean = result.x.mean(("member", "latitude", "longitude")).values
    spread = result.x.std("member").mean(("latitude", "longitude")).values
    assert mean[4] == pytest.approx(2.0, abs=0.15)
    lags = np.abs(np.arange(9) - 4)
    error = 1.0 / np.sqrt(24)  # of the mean of 24 members
    np.testing.assert_allclose(mean, mean[4] * MEMORY**lags, atol=2.5 * error)
    assert mean[[3, 5]].mean() > 0.8
    assert spread[4] < 0.4 * spread[0]
    np.testing.assert_allclose(spread[[3, 5]], np.sqrt(1 - MEMORY**2), rtol=0.4)


def test_one_chunk_is_the_eager_result_and_several_are_refused(days: xr.Dataset, obs: xr.Dataset, model: GenerativeModel) -> None:
    eager = run(days, obs, model)
    lazy = run(days.chunk(time=-1), obs, model)
    assert lazy.x.chunks is not None
    np.testing.assert_allclose(lazy.x.values, eager.x.values, atol=1e-5)
    with pytest.raises(ChunkingError, match=r"chunk\(.*time.*-1"):
        run(days.chunk(time=3), obs, model)
    np.testing.assert_allclose(run(days, obs, model, members=2).x.values, eager.x.values[:2], atol=2e-5)
    np.testing.assert_allclose(run(days, obs, model, batch_size=1).x.values, eager.x.values, atol=2e-5)


def test_what_is_no_trajectory_is_refused(days: xr.Dataset, obs: xr.Dataset, model: GenerativeModel) -> None:
    with pytest.raises(GridError, match=r"windows of 5 consecutive times, and ds has 2; give at least 5"):
        run(days.isel(time=slice(2)), None, model)
    with pytest.raises(GridError, match=r"states 1 day apart, and those of ds are 2 days to"):
        run(days.isel(time=slice(None, None, 2)), None, model)


def test_training_of_windows_is_checked(series: xr.Dataset) -> None:
    with pytest.raises(OptionError, match=r"window=4 is not accepted; it must be odd"):
        xgenda.train(series, window=4)
    with pytest.raises(OptionError, match=r"window=3 belongs to task='prior'"):
        xgenda.train(series, window=3, task="downscale", factor=2)
    gap: xgenda.GenerativeModel = xgenda.train(  # numbers of numpy are numbers
        series.drop_isel(time=[50]),
        window=np.int64(3),
        steps=np.int64(1),
        width=np.int64(8),
        batch_size=np.int32(16),
        anchor="eof",
        progress=False,
    )
    assert gap.spec.options["spacing"] == 86400.0
    uneven = series.assign_coords(
        time=series.time.where(series.time != series.time[50], series.time[50] + np.timedelta64(12, "h"))
    )
    with pytest.raises(StateError, match=r"equally spaced times .*, and those of ds are from 12 hours to 1.5 days apart"):
        xgenda.train(uneven, window=3)
    with pytest.raises(StateError, match=r"window=15 needs 15 consecutive times in each of 6 blocks, and ds has 60 times"):
        xgenda.train(series.isel(time=slice(60)), window=15)


def test_calendar_months_are_equally_spaced() -> None:
    times = xr.DataArray(xr.date_range("2001-01-01", periods=60, freq="MS"), dims="time", name="time")
    fold = np.arange(60) // 10
    rows, _, spacing = window_rows(times, fold, 3)
    assert len(rows) == 6 * 8
    assert spacing == 31 * 86400
    assert len(window_rows(times.drop_isel(time=5), np.delete(fold, 5), 3)[0]) == 6 * 8 - 3  # a missing one is a gap
    days = times[:1] + np.arange(60) * np.timedelta64(1, "D")
    assert window_rows(days, fold, 3)[2] == 86400

"""Chunked observations: only what is near the times of the state is read."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import xgenda
from xgenda.errors import ObservationError
from xgenda.observations.correlations import ErrorCovariance

HOURS = pd.date_range("2018-01-01", periods=365 * 24, freq="h")
DAY = 24


class Counted:
    """A year of hourly values of five stations in chunks of a day, which remembers the chunks that were computed."""

    def __init__(self, *more: int) -> None:
        self.days: list[int] = []
        self.values = 280.0 + np.random.default_rng(0).standard_normal((len(HOURS), 5, *more))
        shape = ((DAY,) * 365, (5,), *((n,) for n in more))
        self.array = da.map_blocks(self.block, chunks=shape, dtype=float, meta=np.zeros((0,) * len(shape)))

    def block(self, block_info: dict | None = None) -> np.ndarray:  # type: ignore[type-arg]
        assert block_info is not None
        day = block_info[None]["chunk-location"][0]
        self.days.append(day)
        return self.values[DAY * day : DAY * (day + 1)]

    def dataset(self, array: object, *more: str) -> xr.Dataset:
        place = {"latitude": ("station", [41.0, 43.0, 45.0, 47.0, 49.0]), "longitude": ("station", [-5.0, 0.0, 5.0, 10.0, 14.0])}
        return xr.Dataset({"t2m": (("time", "station", *more), array)}, coords={"time": HOURS, **place})


@pytest.fixture
def state(background: xr.Dataset) -> xr.Dataset:
    return background.assign_coords(time=pd.to_datetime(["2018-11-20T06", "2018-11-20T12"]))


def near(ds: xr.Dataset) -> xr.Dataset:
    return ds.sel(time=slice("2018-11-20T05", "2018-11-20T13"))


def test_only_what_is_near_is_read(state: xr.Dataset) -> None:
    counted = Counted()
    with dask.config.set(scheduler="synchronous"):
        found = xgenda.innovations(state, counted.dataset(counted.array), error=1.0)
    assert set(counted.days) == {HOURS.get_loc(pd.Timestamp("2018-11-20")) // DAY}  # type: ignore[operator]
    eager = xgenda.innovations(state, near(counted.dataset(counted.values)), error=1.0)
    assert (found.quality_code == 0).sum() == (eager.quality_code == 0).sum() == 10
    xr.testing.assert_identical(
        found.isel(obs=found.quality_code.values == 0).drop_vars("row"),
        eager.isel(obs=eager.quality_code.values == 0).drop_vars("row"),
    )
    assert counted.values.ravel()[found.row.values].tolist() == found.value.values.tolist()  # rows are those of the whole


def test_the_analysis_is_that_of_the_part(state: xr.Dataset) -> None:
    counted = Counted()
    prior = xgenda.gaussian_prior(state, length_scale=500e3, std=2.0)
    for error in (1.0, {"t2m": 1.0}, ErrorCovariance(std=1.0, length_scale=1e5)):
        lazy = xgenda.assimilate(state, counted.dataset(counted.array), model=prior, error=error, members=2, seed=0)
        part = xgenda.assimilate(state, near(counted.dataset(counted.values)), model=prior, error=error, members=2, seed=0)
        assert np.array_equal(lazy.t2m.values, part.t2m.values)


def test_errors_by_row_keep_their_rows(state: xr.Dataset) -> None:
    """What is given for all rows cannot be cut: then all is read, and refused as it would be in memory."""
    counted = Counted()
    error = {"t2m": np.ones((len(HOURS), 5))}
    with pytest.raises(ObservationError, match="fall in no time window of the state"):
        xgenda.innovations(state, counted.dataset(counted.array), error=error)
    assert len(set(counted.days)) == 365


def test_none_is_near(state: xr.Dataset) -> None:
    counted = Counted()
    later = state.assign_coords(time=pd.to_datetime(["2020-11-20T06", "2020-11-20T12"]))
    with pytest.raises(
        ObservationError, match=r"None of the 8760 times of obs is near those of the state \(the first is 2018-01-01T00"
    ):
        xgenda.innovations(later, counted.dataset(counted.array), error=1.0)
    assert not counted.days


def test_profiles_keep_their_rows() -> None:
    """Behind the time: stations, and for one of two variables levels."""
    from xgenda.observations.containers import Wanted, read_observations

    counted = Counted(3)
    ds = counted.dataset(counted.array, "pressure").rename(t2m="t").assign_coords(pressure=("pressure", [1e5, 8e4, 5e4]))
    surface = Counted()
    ds["t2m"] = surface.dataset(surface.array).t2m
    wanted = [Wanted("t2m", "air_temperature", "K"), Wanted("t", None, "K", levels=(1e5, 5e4), vertical="pressure")]
    period = (np.datetime64("2018-11-20T05"), np.datetime64("2018-11-20T07"))
    table = read_observations(ds, wanted, 1.0, period=period)
    assert len(table) == 3 * 5 * (1 + 3)
    for code, values in enumerate((surface.values, counted.values)):
        mine = table.variable == code
        assert values.ravel()[table.row[mine]].tolist() == table.value[mine].tolist()
    assert set(counted.days) == set(surface.days) == {323}

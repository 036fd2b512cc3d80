"""Real reports as a decoder left them, and codes for what contradicts itself: nothing is dropped, nothing bad acts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import xgenda
from xgenda.observations.containers import Wanted, read_observations
from xgenda.observations.operators import locate_observations
from xgenda.observations.quality import Quality, is_missing

SAO = Path(__file__).parent / "data" / "sao-1995-03-18T21.nc"
T2M, D2M = Wanted("t2m", "air_temperature", "K"), Wanted("d2m", "dew_point_temperature", "K")


@pytest.fixture(scope="module")
def reports() -> xr.Dataset:
    with xr.open_dataset(SAO) as ds:
        ds = ds.load()
    time = pd.to_datetime(ds.time.values.astype(str), format="%Y %m %d %H:%M UTC")
    return ds.assign(time=("report", time)).rename(T="t2m", TD="d2m")


@pytest.fixture(scope="module")
def america() -> xr.Dataset:
    """A smooth background over North America."""
    latitude, longitude = np.arange(24.0, 51.0, 2.0), np.arange(-126.0, -65.0, 2.0)
    values = (300 - 0.9 * (latitude - 25))[:, None] + np.zeros(len(longitude))
    return xr.Dataset(
        {"t2m": (("latitude", "longitude"), values.astype("float32"), {"standard_name": "air_temperature", "units": "K"})},
        coords={"latitude": latitude, "longitude": longitude, "time": pd.Timestamp("1995-03-18T21")},
    )


def test_real_reports_get_one_code_each(reports: xr.Dataset, america: xr.Dataset) -> None:
    departures = xgenda.innovations(america, reports[["t2m", "id", "lat", "lon", "elev", "time"]], error=1.5, window="2h")
    assert departures.sizes["obs"] == reports.sizes["report"] == 2171
    assert departures.row.values.tolist() == list(range(2171))
    counts = json.loads(departures.attrs["counts"])
    assert sum(counts.values()) == 2171
    table = xgenda.quality_report(departures)
    assert {k: int(table[k].sum()) for k in counts} == counts
    assert int(table["total"].sum()) == 2171
    code = departures.quality_code.values
    lost = (reports.t2m.isnull() | reports.lat.isnull() | reports.lon.isnull()).values
    assert np.array_equal(code == Quality.MISSING, lost)
    # a longitude of -790 and a temperature of 406 degrees, one of them in a report whose other half is missing
    far, hot = (reports.lon < -360).values, (reports.t2m > 350 - 273.15).values
    assert far.sum() == hot.sum() == 1
    assert np.array_equal(code == Quality.BOUNDS, (far | hot) & ~lost)
    assert set(code[far | hot]) == {Quality.BOUNDS, Quality.MISSING}
    # of the reports of one station and minute one is used
    used = pd.DataFrame({"id": reports.id.values, "time": reports.time.values})[code == Quality.USED]
    assert not used.duplicated().any()
    again = pd.DataFrame({"id": reports.id.values, "time": reports.time.values})[np.isin(code, (Quality.USED, Quality.DUPLICATE))]
    assert again.duplicated().sum() == counts["duplicate"] > 100


def test_real_dirt_does_not_move_the_analysis(reports: xr.Dataset, america: xr.Dataset) -> None:
    obs = reports[["t2m", "id", "lat", "lon", "elev", "time"]]
    prior = xgenda.gaussian_prior(america, length_scale=500e3, std=5.0)
    options = {"model": prior, "error": 1.5, "window": "2h", "members": 2, "seed": 0}
    dirty = xgenda.assimilate(america, obs, **options)  # type: ignore[arg-type]
    departures = xgenda.innovations(america, obs, model=prior, error=1.5, window="2h")
    good = obs.isel(report=np.flatnonzero(departures.quality_code.values == Quality.USED))
    clean = xgenda.assimilate(america, good, **options)  # type: ignore[arg-type]
    assert np.array_equal(dirty.t2m.values, clean.t2m.values)
    counts = json.loads(dirty.attrs["xgenda_observation_counts"])
    assert counts == json.loads(departures.attrs["counts"])
    assert 300 < counts["used"] == good.sizes["report"] < 1000
    assert counts["background"] + counts.get("buddy", 0) > 0


def test_real_dew_points(reports: xr.Dataset) -> None:
    table = read_observations(reports, [T2M, D2M], 1.5)
    assert len(table) == 2 * 2171
    t, d = reports.t2m.values, reports.d2m.values
    above = (d > t + 0.5) & (d < 46) & (t < 76) & np.isfinite(reports.lat.values) & (np.abs(reports.lon.values) < 360)
    for variable in (0, 1):
        code = table.code[table.variable == variable]
        assert np.array_equal(np.flatnonzero(code == Quality.CONSISTENCY), np.flatnonzero(above))


def place(**columns: object) -> pd.DataFrame:
    return pd.DataFrame({"latitude": 45.0, "longitude": 3.0, **columns})


def test_a_dew_point_above_the_temperature() -> None:
    frame = place(t2m=[280.0, 280.0, 280.0, 280.0, np.nan, 280.0], d2m=[279.0, 280.5, 280.6, 9999.0, 281.0, 500.0])
    table = read_observations(frame, [T2M, D2M], 1.0)
    odd, lost = Quality.CONSISTENCY, Quality.MISSING
    assert table.code[table.variable == 0].tolist() == [0, 0, odd, 0, lost, 0]
    assert table.code[table.variable == 1].tolist() == [0, 0, odd, lost, 0, Quality.BOUNDS]


def test_dew_points_are_compared_in_one_unit_and_with_their_own_temperature() -> None:
    celsius = Wanted("d2m", "dew_point_temperature", "degC")
    frame = place(t2m=[280.0, 280.0], d2m=[6.0, 8.0], t850=[270.0, 270.0])
    assert read_observations(frame.drop(columns="t850"), [T2M, celsius], 1.0).code.tolist() == [0, Quality.CONSISTENCY] * 2
    upper = Wanted("t850", "air_temperature", "K")  # which of the two belongs to the dew point is not known
    assert read_observations(frame, [T2M, upper, celsius], 1.0).code.tolist() == [0] * 6


@pytest.mark.parametrize(
    ("standard_name", "units", "values", "bad"),
    [
        ("wind_from_direction", "degree", [0.0, 360.0, 361.0, -1.0], [2, 3]),
        ("wind_from_direction", "radian", [0.0, 6.28, 6.3, -0.1], [2, 3]),
        ("precipitation_flux", "kg m-2 s-1", [0.0, 1e-3, -1e-3, 5.0], [2]),
        ("lwe_thickness_of_precipitation_amount", "mm", [0.0, -1.0, 2.0, 3.0], [1]),
        ("depth", "m", [0.0, -1.0, 2.0, 3.0], [1]),
        ("humidity_mixing_ratio", "1", [0.0, -1e-4, 2e-3, 3e-3], [1]),
        ("eastward_wind", "m s-1", [0.0, -1.0, 2.0, 3.0], []),
        (None, "m s-1", [0.0, -1.0, 2.0, 3.0], []),
    ],
)
def test_what_a_name_does_not_allow(standard_name: str | None, units: str, values: list[float], bad: list[int]) -> None:
    table = read_observations(place(x=values), [Wanted("x", standard_name, units)], 1.0)
    assert np.flatnonzero(table.code == Quality.CONSISTENCY).tolist() == bad
    assert np.flatnonzero(table.code).tolist() == bad


def test_a_negative_speed_is_out_of_bounds_first() -> None:
    table = read_observations(place(x=[5.0, -1.0]), [Wanted("x", "wind_speed", "m s-1")], 1.0)
    assert table.code.tolist() == [0, Quality.BOUNDS]


def test_fill_values_of_ioda() -> None:
    lowest = np.finfo(np.float32).min * np.float32(0.99)
    assert is_missing(np.array([lowest, -2147483643.0, np.finfo(np.float64).min * 0.99, -2147483.0])).tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert read_observations(place(t2m=np.float32([lowest, 280.0])), [T2M], 1.0).code.tolist() == [Quality.MISSING, 0]


def test_contradictory_reports_of_one_station(background: xr.Dataset) -> None:
    """One station says one thing at a time: the more certain counts, whatever the order, the other is a duplicate."""
    frame = pd.DataFrame(
        {
            "time": pd.Timestamp("2018-11-20T00"),
            "latitude": 44.0,
            "longitude": 3.0,
            "station": ["a", "a", "b", ""],
            "t2m": [280.0, 285.0, 281.0, 283.0],
            "t2m_error": [1.0, 0.5, 1.0, 1.0],
        }
    )
    from xgenda.grids import Grid

    grid = Grid(background.latitude.values, background.longitude.values)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        located = locate_observations(frame.iloc[order], [T2M], grid, background.time)
        by_value = dict(zip(located.table.value.tolist(), located.table.code.tolist(), strict=True))
        assert by_value == {280.0: Quality.DUPLICATE, 285.0: 0, 281.0: 0, 283.0: 0}
    equal = frame.assign(t2m_error=1.0)
    kept = {
        float(t.value[(t.code == 0) & (t.station == "a")][0])
        for order in ([0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0])
        for t in [locate_observations(equal.iloc[order], [T2M], grid, background.time).table]
    }
    assert kept == {280.0}  # of equal errors the lowest value: arbitrary, but not the order of the file

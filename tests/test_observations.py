"""Whatever users have becomes one table; every value ends with one quality code; what cannot be understood is refused by name."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re

import cftime
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import xgenda
from xgenda.errors import ObservationError, OptionError, UnitsError
from xgenda.grids import Grid
from xgenda.observations.containers import Table, Wanted, read_observations
from xgenda.observations.operators import Located, locate_observations
from xgenda.observations.quality import (
    EQUIVALENTS,
    MEANINGS,
    Quality,
    QualityControl,
    background_check,
    boxes,
    buddy_check,
    count_codes,
    gross_bounds,
    is_missing,
)
from xgenda.observations.times import DEFAULT_WINDOW, parse_window

T2M = Wanted("t2m", "air_temperature", "K")
MSLP = Wanted("mslp", "air_pressure_at_mean_sea_level", "Pa")
GRID = Grid(np.linspace(40, 50, 6), np.linspace(-6, 15, 8))


@pytest.fixture
def frame(stations: pd.DataFrame) -> pd.DataFrame:
    return stations


def same(one: Table, other: Table, *, but: tuple[str, ...] = ("row", "source", "station")) -> None:
    """Assert that two tables hold the same values, in any order."""

    def ordered(table: Table) -> dict[str, np.ndarray | None]:
        order = np.lexsort((table.error, table.value, table.longitude, table.latitude, table.variable))
        return {
            f.name: None if (v := getattr(table, f.name)) is None else v[order]
            for f in dataclasses.fields(table)
            if f.name != "correlated"
        }

    a, b = ordered(one), ordered(other)
    for name in a:
        if name not in but:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# -- one normal form ---------------------------------------------------------------------------------------------------


def as_table(frame: pd.DataFrame) -> xr.Dataset:
    return frame.to_xarray().set_coords(["latitude", "longitude", "time"]).drop_vars("index")


def as_grid(frame: pd.DataFrame) -> xr.Dataset:
    """Every time, latitude and longitude that occurs, NaN where they do not occur together."""
    return frame.set_index(["time", "latitude", "longitude"]).to_xarray()


FORMS = {
    "dataset": as_table,
    "dataset with data variables": lambda f: f.to_xarray(),
    "dataset along another dimension": lambda f: as_table(f).rename(index="station"),
    "short names": lambda f: f.rename(columns={"latitude": "lat", "longitude": "lon"}),
    "names by attributes": lambda f: (
        as_table(f)
        .rename(t2m="T", t2m_error="T_error")
        .pipe(lambda d: d.assign(T=d["T"].assign_attrs(standard_name="air_temperature")))
    ),
    "ancillary error": lambda f: (
        as_table(f)
        .rename(t2m_error="sigma")
        .pipe(
            lambda d: d.assign(
                t2m=d.t2m.assign_attrs(ancillary_variables="flagged sigma"),
                sigma=d.sigma.assign_attrs(standard_name="air_temperature standard_error"),
            )
        )
    ),
    "time as index": lambda f: f.set_index("time"),
    "two indices": lambda f: f.set_index(["time", "latitude"]),
    "aware time": lambda f: f.assign(time=f.time.dt.tz_localize("UTC")),
    "aware time elsewhere": lambda f: f.assign(time=f.time.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")),
    "aware index": lambda f: f.assign(time=f.time.dt.tz_localize("UTC").dt.tz_convert("America/New_York")).set_index("time"),
    "time in seconds": lambda f: f.assign(time=f.time.astype("datetime64[s]")),
    "gridded": as_grid,
    "gridded, transposed": lambda f: as_grid(f).transpose("longitude", "time", "latitude"),
    "gridded, descending": lambda f: as_grid(f).isel(latitude=slice(None, None, -1)),
    "list": lambda f: [f.iloc[:2], as_table(f.iloc[2:4]), as_grid(f.iloc[4:])],
    "list with nothing": lambda f: [None, f, f.iloc[:0]],
    "text that spells numbers": lambda f: f.assign(t2m=f.t2m.astype(str)),
    "objects": lambda f: f.astype({"t2m": object, "latitude": object}),
    "with a station name": lambda f: f.assign(station="EDDM", wigos_id=range(6), remark="none"),
    "degrees Celsius": lambda f: as_table(f).pipe(lambda d: d.assign(t2m=(d.t2m - 273.15).assign_attrs(units="degC"))),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_normal_form(form: str, frame: pd.DataFrame) -> None:
    reference = read_observations(frame, [MSLP, T2M])
    assert reference.value.tolist() == frame.t2m.tolist()
    assert reference.error.tolist() == frame.t2m_error.tolist()
    assert reference.variable.tolist() == [1] * 6
    assert reference.row.tolist() == list(range(6))
    found = read_observations(FORMS[form](frame), [MSLP, T2M])
    found = dataclasses.replace(found, value=np.round(found.value, 9))
    assert found.time is not None
    assert found.time.dtype.kind == "M"
    same(found, reference)


def test_rows_and_sources_point_back(frame: pd.DataFrame) -> None:
    parts = [frame.iloc[:2], frame.iloc[2:]]
    table = read_observations(parts, [T2M])
    for source, row, value in zip(table.source, table.row, table.value, strict=True):
        assert parts[source].t2m.iloc[row] == value
    grid = as_grid(frame)
    table = read_observations(grid, [T2M])
    assert grid.t2m.values.ravel()[table.row].tolist() == table.value.tolist()


def test_several_variables(frame: pd.DataFrame) -> None:
    frame["mslp"] = 1013.0 + np.arange(6)
    frame.attrs["mslp"] = {"units": "hPa"}
    table = read_observations(frame, [MSLP, T2M], error={"mslp": 0.5})
    assert table.value[table.variable == 0] == pytest.approx(100 * frame.mslp.values)
    assert table.error[table.variable == 0] == pytest.approx(np.full(6, 50.0))
    assert table.error[table.variable == 1].tolist() == frame.t2m_error.tolist()


def test_a_station_series_with_scalar_coordinates() -> None:
    time = pd.date_range("2018-11-20", periods=4, freq="6h")
    ds = xr.Dataset({"t2m": ("time", [280.0, 281.0, np.nan, 283.0])}, coords={"time": time, "latitude": 45.0, "longitude": 3.0})
    table = read_observations(ds, [T2M], 1.0)
    assert table.latitude.tolist() == [45.0] * 4
    assert np.array_equal(table.time, time.values)
    assert table.code.tolist() == [0, 0, Quality.MISSING, 0]
    single = read_observations(ds.isel(time=0), [T2M], 1.0)
    assert (single.value.tolist(), single.time.tolist()) == ([280.0], time.values[:1].tolist())


def test_a_scalar_time_holds_for_all_rows(frame: pd.DataFrame) -> None:
    ds = frame.drop(columns="time").to_xarray().assign_coords(time=frame.time[0])
    assert (read_observations(ds, [T2M]).time == frame.time[0].to_datetime64()).all()


def test_a_data_array(frame: pd.DataFrame) -> None:
    same(read_observations(as_grid(frame).t2m, [T2M], 1.0), read_observations(frame, [T2M], 1.0))


@pytest.mark.parametrize("nothing", [None, [], [None]])
def test_nothing(nothing: object) -> None:
    assert len(read_observations(nothing, [T2M])) == 0


@pytest.mark.parametrize(
    "cut", [lambda f: f.iloc[:0], lambda f: pd.DataFrame({k: [] for k in f}), lambda f: as_table(f).isel(index=slice(0))]
)
def test_an_empty_table(frame: pd.DataFrame, background: xr.Dataset, cut) -> None:
    located = locate_observations(cut(frame), [T2M], GRID, background.time)
    assert len(located.table) == 0
    assert located.operator.shape == (0, GRID.size)


def test_a_gridded_time_without_any_value(frame: pd.DataFrame) -> None:
    grid = as_grid(frame)
    grid["t2m"][1] = np.nan
    same(read_observations(grid, [T2M]), read_observations(frame.iloc[:3], [T2M]))


def test_the_europe_stations(europe) -> None:
    background, stations = europe
    table = read_observations(stations, [Wanted("t2m", "air_temperature", "K")], 1.75)
    assert len(table) == 1215
    assert (table.code == Quality.MISSING).sum() == int(stations.t2m.isnull().sum())
    departures = xgenda.innovations(background, stations, error=1.75)
    counts = json.loads(departures.attrs["counts"])
    assert sum(counts.values()) == 1215
    expected = background.t2m.isel(time=0).interp(latitude=stations.latitude, longitude=stations.longitude)
    used = departures.quality_code == 0
    assert departures.background.values[used] == pytest.approx(
        expected.values[used], abs=0.01
    )  # a point beside a node is the node


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (2.0, [2.0] * 6),
        (np.float32(2.0), [2.0] * 6),
        ({"t2m": 2.0}, [2.0] * 6),
        ({"t2m": [1, 2, 3, 4, 5, 6]}, [1, 2, 3, 4, 5, 6]),
        ({"t2m": np.arange(1.0, 7.0)}, [1, 2, 3, 4, 5, 6]),
        ({"t2m": pd.Series(np.arange(1.0, 7.0), index=range(10, 16))}, [1, 2, 3, 4, 5, 6]),
        ({"t2m": xr.DataArray(np.arange(1.0, 7.0), dims="index")}, [1, 2, 3, 4, 5, 6]),
        ({"t2m": xr.DataArray(3.0)}, [3.0] * 6),
        ({}, [1.0, 0.5, 0.8, 1.2, 0.7, 1.0]),
        (None, [1.0, 0.5, 0.8, 1.2, 0.7, 1.0]),
        (np.inf, [np.inf] * 6),
    ],
)
def test_errors_in_every_form(frame: pd.DataFrame, error: object, expected: list) -> None:
    assert read_observations(as_table(frame), [T2M], error).error.tolist() == expected


def test_an_error_per_cell_follows_its_cell(frame: pd.DataFrame) -> None:
    grid = as_grid(frame)
    for array in (grid, grid.transpose("longitude", "time", "latitude")):
        given = array[["t2m"]]
        expected = read_observations(frame, [T2M])
        same(read_observations(given, [T2M], {"t2m": array.t2m_error.fillna(9.0)}), expected)
        same(read_observations(given, [T2M], {"t2m": array.t2m_error.fillna(9.0).values}), expected)
    by_time = read_observations(grid[["t2m"]], [T2M], {"t2m": xr.DataArray([1.0, 2.0], dims="time")})
    assert by_time.error.tolist() == [1.0] * 3 + [2.0] * 3


@pytest.mark.parametrize(
    ("units", "error_units", "error", "expected"),
    [
        ("degC", None, 1.0, 1.0),
        ("degC", "K", 1.0, 1.0),
        ("degF", None, 9.0, 5.0),
        ("degF", "K", 5.0, 5.0),
    ],
)
def test_the_units_of_errors(frame: pd.DataFrame, units: str, error_units: str | None, error: float, expected: float) -> None:
    ds = as_table(frame)
    ds["t2m"] = (ds.t2m - 250.0).assign_attrs(units=units)
    ds["t2m_error"] = xr.full_like(ds.t2m_error, error)
    if error_units:
        ds["t2m_error"].attrs["units"] = error_units
    assert read_observations(ds, [T2M]).error == pytest.approx(np.full(6, expected))


REFUSED_ERRORS = {
    "missing": (None, r"obs\['t2m'\] has no error, and none is invented.*error={'t2m': 1.0}, or a column 't2m_error' in obs"),
    "missing in the mapping": ({}, r"obs\['t2m'\] has no error, and none is invented"),
    "zero": (0.0, r"The error of obs\['t2m'\] is 0 in 6 of 6 values, first at row 0; a standard deviation must be positive"),
    "negative": ({"t2m": -1.0}, r"is -1 in 6 of 6 values"),
    "nan": (np.nan, r"is nan in 6 of 6 values"),
    "one is zero": ({"t2m": [1, 1, 0, 1, 1, 1]}, r"is 0 in 1 of 6 values, first at row 2"),
    "too few": ({"t2m": [1.0, 2.0]}, r"error\['t2m'\] has 2 values and obs\['t2m'\] has 6; give one number, or one each"),
    "too many": (np.ones(7), r"error\['t2m'\] has 7 values and obs\['t2m'\] has 6"),
    "other dimensions": ({"t2m": xr.DataArray(np.ones(5), dims="index")}, r"error\['t2m'\] has dimensions {'index': 5} and"),
    "text": ("large", r"error='large' is no standard deviation; give numbers: error=1.0"),
    "unknown variable": (
        {"t2mm": 1.0},
        r"error names 't2mm', which is no variable of the state; it has 't2m'. Did you mean 't2m'",
    ),
}


@pytest.mark.parametrize(("error", "message"), REFUSED_ERRORS.values(), ids=REFUSED_ERRORS)
def test_errors_that_are_refused(frame: pd.DataFrame, error: object, message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        read_observations(as_table(frame[["time", "latitude", "longitude", "t2m"]]), [T2M], error)


def test_a_missing_value_may_have_a_missing_error(frame: pd.DataFrame) -> None:
    frame.loc[2, ["t2m", "t2m_error"]] = np.nan
    assert read_observations(frame, [T2M]).code.tolist() == [0, 0, Quality.MISSING, 0, 0, 0]


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "a number": (lambda f: 5, ObservationError, r"obs is a builtins.int; give a pandas DataFrame or xarray Dataset"),
    "a path": (lambda f: "obs.nc", ObservationError, r"obs is a builtins.str; give a pandas DataFrame"),
    "an array": (lambda f: f.t2m.to_numpy(), ObservationError, r"obs is a numpy.ndarray"),
    "in a list": (lambda f: [f, 5], ObservationError, r"obs\[1\] is a builtins.int"),
    "no latitude": (
        lambda f: f.drop(columns="latitude"),
        ObservationError,
        r"obs has no latitude; it has .*obs.rename\(columns={'yours': 'latitude'}\)",
    ),
    "no longitude": (lambda f: f.drop(columns="longitude"), ObservationError, r"obs has no longitude"),
    "unknown variable": (
        lambda f: f.assign(humidity=1.0),
        ObservationError,
        r"obs holds 'humidity', which is not in the state; it has 't2m'. Keep what",
    ),
    "misspelt": (
        lambda f: f.rename(columns={"t2m": "t2n"}),
        ObservationError,
        r"obs holds 't2n', 't2m_error', which is not in the state.*Did you mean 't2m'",
    ),
    "no variable": (
        lambda f: f[["time", "latitude", "longitude"]],
        ObservationError,
        r"obs holds no variable, which is not in the state",
    ),
    "text": (
        lambda f: f.assign(t2m=["281", "n/a"] * 3),
        ObservationError,
        r"obs\['t2m'\] holds '281', which is no number.*pandas.to_numeric\(obs\['t2m'\], errors='coerce'\)",
    ),
    "text in a dataset": (
        lambda f: as_table(f).assign(t2m=("index", list("abcdef"))),
        ObservationError,
        r"obs\['t2m'\] holds 'a', which is no number",
    ),
    "text in the error": (
        lambda f: f.assign(t2m_error="small"),
        ObservationError,
        r"obs\['t2m_error'\] holds 'small', which is no number",
    ),
    "text in a coordinate": (
        lambda f: f.assign(latitude="52N"),
        ObservationError,
        r"obs\['latitude'\] holds '52N', which is no number",
    ),
    "time as text": (
        lambda f: f.assign(time="2018-11-20"),
        ObservationError,
        r"time holds str such as '2018-11-20'.*pandas.to_datetime\(obs\['time'\], utc=True\)",
    ),
    "time as number": (
        lambda f: f.assign(time=0.0),
        ObservationError,
        r"time has dtype float64; decode it, for example pandas.to_datetime",
    ),
    "units": (
        lambda f: as_table(f).pipe(lambda d: d.assign(t2m=d.t2m.assign_attrs(units="m"))),
        UnitsError,
        r"obs\['t2m'\]: Units 'm' cannot be converted to 'K'",
    ),
    "unknown units": (
        lambda f: as_table(f).pipe(lambda d: d.assign(t2m=d.t2m.assign_attrs(units="Kelwin"))),
        UnitsError,
        r"obs\['t2m'\]: The units 'Kelwin' are not known",
    ),
    "extra dimension": (
        lambda f: as_table(f).expand_dims(level=2).transpose("index", ...),
        ObservationError,
        r"obs\['t2m'\] has the extra dimension 'level'; select: obs.isel\(level=0\)",
    ),
    "swath with one axis": (
        lambda f: xr.Dataset(
            {"t2m": (("y", "x"), np.ones((2, 2)))},
            coords={"latitude": (("y", "x"), np.ones((2, 2))), "longitude": ("x", np.ones(2))},
        ),
        ObservationError,
        r"latitude has dimensions \('y', 'x'\) and longitude \('x',\); a table along one dimension, a swath",
    ),
    "two candidates": (
        lambda f: (
            as_table(f)
            .rename(t2m="a")
            .assign_coords()
            .pipe(lambda d: d.assign({n: d.a.assign_attrs(standard_name="air_temperature") for n in "ab"}))
        ),
        ObservationError,
        r"'a' and 'b' both could be 't2m'; keep one",
    ),
    "time in some": (
        lambda f: [f, f.drop(columns="time")],
        ObservationError,
        r"Some of the obs have a time coordinate and some have none",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_observations_that_are_refused(frame: pd.DataFrame, change, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        read_observations(change(frame), [T2M])


# -- quality -----------------------------------------------------------------------------------------------------------

CODES = {
    "used": ({}, Quality.USED),
    "infinite error": ({"t2m_error": np.inf}, Quality.PASSIVE),
    "nan": ({"t2m": np.nan}, Quality.MISSING),
    "infinite": ({"t2m": np.inf}, Quality.MISSING),
    **{
        f"sentinel {v:g}": ({"t2m": v}, Quality.MISSING)
        for v in (-9999.0, 9999.0, 99999.0, 1e20, 9.969209968386869e36, -888888.0)
    },
    "no latitude": ({"latitude": np.nan}, Quality.MISSING),
    "no longitude": ({"longitude": np.nan}, Quality.MISSING),
    "no time": ({"time": pd.NaT}, Quality.MISSING),
    "too hot": ({"t2m": 406.0}, Quality.BOUNDS),
    "too cold": ({"t2m": 7.0}, Quality.BOUNDS),
    "latitude 95": ({"latitude": 95.0}, Quality.BOUNDS),
    "longitude -790": ({"longitude": -790.2}, Quality.BOUNDS),
    "longitude 361": ({"longitude": 361.0}, Quality.BOUNDS),
    "north of the grid": ({"latitude": 50.1}, Quality.DOMAIN),
    "west of the grid": ({"longitude": -6.1}, Quality.DOMAIN),
    "other side of the globe": ({"longitude": 184.0}, Quality.DOMAIN),
    "another convention": ({"longitude": 355.0}, Quality.USED),
    "too late": ({"time": pd.Timestamp("2018-11-20T18:00")}, Quality.WINDOW),
    "missing before bounds": ({"t2m": np.nan, "latitude": 95.0}, Quality.MISSING),
    "bounds before domain": ({"t2m": 7.0, "latitude": 60.0}, Quality.BOUNDS),
    "domain before window": ({"latitude": 60.0, "time": pd.Timestamp("2018-11-20T18:00")}, Quality.DOMAIN),
    "passive and outside": ({"t2m_error": np.inf, "latitude": 60.0}, Quality.DOMAIN),
}


@pytest.mark.parametrize(("change", "expected"), CODES.values(), ids=CODES)
def test_every_code(frame: pd.DataFrame, background: xr.Dataset, change: dict, expected: Quality) -> None:
    for name, value in change.items():
        frame.loc[3, name] = value
    located = locate_observations(frame, [T2M], GRID, background.time)
    by_row = dict(zip(located.table.row.tolist(), located.table.code.tolist(), strict=True))
    assert by_row == {0: 0, 1: 0, 2: 0, 3: expected, 4: 0, 5: 0}
    assert sum(count_codes(located.table.code).values()) == 6
    assert count_codes(located.table.code)[expected.name.lower()] == (6 if expected == Quality.USED else 1)


def test_a_pressure_of_99999_pascal_is_no_fill_value(frame: pd.DataFrame) -> None:
    frame = frame.rename(columns={"t2m": "mslp", "t2m_error": "mslp_error"}).assign(mslp=99999.0)
    assert read_observations(frame, [MSLP]).code.tolist() == [0] * 6
    assert read_observations(frame, [Wanted("mslp", None, "Pa")]).code.tolist() == [Quality.MISSING] * 6


def test_the_background_check() -> None:
    value, error = np.array([0.0, 4.9, 5.1, -5.1]), np.full(4, 0.6)
    assert background_check(value, error, np.zeros(4), np.full(4, 0.8), 5.0).tolist() == [False, False, True, True]


def test_an_outlier_is_rejected_by_the_background(background, frame, prior) -> None:
    frame.loc[1, "t2m"] += 30
    departures = xgenda.innovations(background, frame, model=prior)
    assert departures.quality_code.values.tolist() == [0, Quality.BACKGROUND, 0, 0, 0, 0]
    assert departures.row.values.tolist() == list(range(6))
    with_it = xgenda.assimilate(background, frame, model=prior, members=2, seed=0)
    without = xgenda.assimilate(background, frame.drop(index=1), model=prior, members=2, seed=0)
    xr.testing.assert_allclose(with_it.t2m, without.t2m)
    assert json.loads(with_it.attrs["xgenda_observation_counts"])["background"] == 1
    off = xgenda.innovations(background, frame, model=prior, background_check=None)
    assert off.quality_code.values.tolist() == [0] * 6


def test_codes_add_up(background, frame, prior) -> None:
    frame.loc[0, "t2m"] = np.nan
    frame.loc[1, "t2m"] = 500.0
    frame.loc[2, "latitude"] = 60.0
    frame.loc[3, "time"] = pd.Timestamp("2018-11-21T12")
    frame.loc[4, "t2m"] = 310.0
    expected = {"used": 1, "missing": 1, "bounds": 1, "domain": 1, "window": 1, "background": 1}
    departures = xgenda.innovations(background, frame, model=prior)
    assert json.loads(departures.attrs["counts"]) == expected
    analysis = xgenda.assimilate(background, frame, model=prior, members=2, seed=0)
    assert json.loads(analysis.attrs["xgenda_observation_counts"]) == expected
    assert np.isnan(departures.background.values[[2]]).all()


def test_bounds_are_in_the_units_of_the_state() -> None:
    assert gross_bounds("air_temperature", "degC") == pytest.approx((-123.15, 76.85))
    assert gross_bounds("relative_humidity", "%") == pytest.approx((0, 110))
    assert gross_bounds("air_temperature", None) == (-np.inf, np.inf)
    assert gross_bounds("mass_of_the_sun", "kg") == (-np.inf, np.inf)


def test_missing_values() -> None:
    assert is_missing(np.array([0.0, np.nan, np.inf, -9999.0, -9998.9, 2e15, 9.969209968386869e36])).tolist() == [
        False, True, True, True, False, True, True,
    ]  # fmt: skip
    assert is_missing(np.float32([9.96921e36])).all()


# -- time windows ------------------------------------------------------------------------------------------------------


def window_of(state: list[str], seen: list[str], window: object = None) -> list[int]:
    """Return the analysis time of each observation, in the order given."""
    n = len(seen)
    frame = pd.DataFrame(
        {"time": pd.to_datetime(seen, format="ISO8601"), "latitude": 45.0, "longitude": 0.0, "t2m": 280.0 + np.arange(n)}
    )
    times = xr.DataArray(pd.to_datetime(state, format="ISO8601"), dims="time", name="time")
    located = locate_observations(frame, [T2M], GRID, times if len(state) > 1 else times.isel(time=0), error=1.0, window=window)
    assert ((located.table.code == Quality.WINDOW) == (located.time_index < 0)).all()
    return located.time_index[np.argsort(located.table.row)].tolist()


def test_windows_are_half_open() -> None:
    seen = ["2018-11-20T08:59:59.999999999", "2018-11-20T09:00", "2018-11-20T14:59:59.999999999", "2018-11-20T15:00"]
    assert window_of(["2018-11-20T12"], seen, "6h") == [-1, 0, 0, -1]
    assert window_of(["2018-11-20T12"], seen, datetime.timedelta(hours=12)) == [0, 0, 0, 0]
    assert window_of(["2018-11-20T12"], ["2018-11-20T11:30", "2018-11-20T12:30", "2018-11-20T12"], np.timedelta64(1, "h")) == [
        0,
        -1,
        0,
    ]


def test_the_default_window_is_the_same_for_one_time_and_for_several() -> None:
    state = [np.datetime64(t, "ns") for t in ("2018-11-20T00", "2018-11-20T12", "2018-11-21T00")]
    half, tick = DEFAULT_WINDOW.astype("timedelta64[ns]") // 2, np.timedelta64(1, "ns")
    seen = [str(t + d) for t in state for d in (-half - tick, -half, half - tick, half)]
    expected = [-1, 0, 0, -1, -1, 1, 1, -1, -1, 2, 2, -1]
    assert window_of([str(t) for t in state], seen) == expected
    assert window_of([str(t) for t in state[::-1]], seen) == [2 - k if k >= 0 else k for k in expected]  # the state in any order
    assert window_of([str(state[0])], seen[:4]) == expected[:4]


def test_windows_that_meet_share_no_observation() -> None:
    state = ["2018-11-20T00", "2018-11-20T12"]
    seen = ["2018-11-19T17:59", "2018-11-19T18", "2018-11-20T05:59", "2018-11-20T06", "2018-11-20T17:59", "2018-11-20T18"]
    assert window_of(state, seen, "12h") == [-1, 0, 0, 1, 1, -1]


def test_a_wide_window_takes_the_nearest_time() -> None:
    state = ["2018-11-20T00", "2018-11-20T12"]
    assert window_of(state, ["2018-11-20T05", "2018-11-20T06", "2018-11-20T07", "2018-11-21T10"], "48h") == [0, 1, 1, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-4000, 4000), min_size=1, max_size=4), st.integers(1, 600), st.sampled_from(["numpy", "cftime"]))
def test_windows_against_the_definition(offsets: list[int], width: int, kind: str) -> None:
    state = pd.date_range("2018-11-20", periods=4, freq="12h")
    seen = state[1] + pd.to_timedelta(offsets, unit="min")
    half = width / 2
    minutes = (seen.values[:, None] - state.values) / np.timedelta64(1, "m")
    expected = [next((int(i) for i in np.argsort(np.abs(m), kind="stable") if -half <= m[i] < half), -1) for m in minutes]

    def times(index: pd.DatetimeIndex) -> np.ndarray:
        if kind == "numpy":
            return index.values
        return np.array([cftime.DatetimeNoLeap(*t.timetuple()[:6]) for t in index])

    obs = xr.Dataset(
        {"t2m": ("obs", 280.0 + np.arange(len(seen)))},
        coords={"time": ("obs", times(seen)), "latitude": ("obs", [45.0] * len(seen)), "longitude": ("obs", [0.0] * len(seen))},
    )
    located = locate_observations(
        obs, [T2M], GRID, xr.DataArray(times(state), dims="time", name="time"), error=1.0, window=f"{width}min"
    )
    assert located.time_index[np.argsort(located.table.row)].tolist() == expected


def test_climate_calendars_beyond_the_range_of_nanoseconds(climate: xr.Dataset) -> None:
    times = [cftime.Datetime360Day(year, 2, 30) for year in (1200, 3000)]
    state = xr.DataArray(times, dims="time", name="time")
    obs = xr.Dataset(
        {"t2m": ("obs", [280.0, 281.0])},
        coords={
            "time": ("obs", [cftime.Datetime360Day(3000, 3, 1), times[0]]),
            "latitude": ("obs", [45.0, 45.0]),
            "longitude": ("obs", [0.0, 0.0]),
        },
    )
    located = locate_observations(obs, [T2M], GRID, state, error=1.0, window="4D")
    assert (located.time_index.tolist(), located.table.row.tolist()) == ([0, 1], [1, 0])


def test_numpy_times_beyond_the_range_of_nanoseconds_are_refused(frame: pd.DataFrame) -> None:
    state = xr.DataArray(np.array(["3000-01-01"], dtype="datetime64[s]"), dims="time", name="time")
    with pytest.raises(ObservationError, match=r"outside the years 1678 to 2262.*use cftime in both: ds.convert_calendar"):
        locate_observations(frame, [T2M], GRID, state)


@pytest.mark.parametrize("window", ["six hours", "6 hrz", 6, None, True, [6]])
def test_what_is_no_window(window: object) -> None:
    with pytest.raises(OptionError, match=r"window=.* is no time span; give for example window='6h'"):
        parse_window(window)


@pytest.mark.parametrize("window", ["0h", "-6h", "", np.timedelta64(0, "s"), np.timedelta64("NaT")])
def test_a_window_is_positive(window: object) -> None:
    with pytest.raises(OptionError, match=r"window=.* must be positive; give for example window='6h'"):
        parse_window(window)


def test_calendars_must_agree(frame: pd.DataFrame, background: xr.Dataset) -> None:
    noleap = as_table(frame).assign_coords(time=("index", [cftime.DatetimeNoLeap(2018, 11, 20)] * 6))
    message = r"The time of obs is DatetimeNoLeap and that of the state is datetime64; use one calendar: obs.convert_calendar"
    with pytest.raises(ObservationError, match=message):
        locate_observations(noleap, [T2M], GRID, background.time)
    state = xr.DataArray([cftime.Datetime360Day(2018, 11, 20)], dims="time", name="time")
    with pytest.raises(
        ObservationError, match=r"obs is DatetimeNoLeap and that of the state is Datetime360Day.*'360_day', use_cftime=True"
    ):
        locate_observations(noleap, [T2M], GRID, state)


def test_without_time(frame: pd.DataFrame, background: xr.Dataset) -> None:
    timeless = frame.drop(columns="time")
    with pytest.raises(
        ObservationError, match=r"obs has no time and the state has 2 times. Give each observation its time, or select"
    ):
        locate_observations(timeless, [T2M], GRID, background.time)
    for times in (background.time[:1], background.time[0], None):
        assert locate_observations(timeless, [T2M], GRID, times).time_index.tolist() == [0] * 6
    assert locate_observations(frame, [T2M], GRID, None).time_index.tolist() == [0] * 6


def test_almost_all_outside_the_window(frame: pd.DataFrame, background: xr.Dataset) -> None:
    frame["time"] += pd.Timedelta("30D")
    message = r"6 of 6 obs fall in no time window of the state \(.* at 2018-12-20.*nearest is 29.5 days away. Is their time UTC\? .* right ones$"
    with pytest.raises(ObservationError, match=message):
        locate_observations(frame, [T2M], GRID, background.time)


def test_latitude_and_longitude_swapped(frame: pd.DataFrame, background: xr.Dataset) -> None:
    swapped = frame.rename(columns={"latitude": "longitude", "longitude": "latitude"})
    message = (
        r"6 of 6 obs lie outside the grid, and with latitude and longitude exchanged 6 lie inside. Did you swap them\? obs.rename"
    )
    with pytest.raises(ObservationError, match=message):
        locate_observations(swapped, [T2M], GRID, background.time)
    far = frame.assign(latitude=frame.latitude - 80)  # somewhere else altogether: no such suspicion
    assert (locate_observations(far, [T2M], GRID, background.time).table.code == Quality.DOMAIN).all()


# -- operators ---------------------------------------------------------------------------------------------------------


def unordered(located: Located) -> list[np.ndarray]:
    t = located.table
    return [
        t.latitude,
        t.longitude,
        t.value,
        t.error,
        t.code,
        t.variable,
        located.time_index,
        located.operator.indices,
        located.operator.weights,
    ]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)))
def test_the_order_of_the_rows_does_not_matter(permutation: list[int]) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({
        "time": pd.to_datetime(["2018-11-20T00", "2018-11-20T12"] * 3), "latitude": rng.uniform(39, 50, 6),
        "longitude": rng.uniform(-6, 15, 6), "t2m": rng.uniform(270, 290, 6), "t2m_error": rng.uniform(0.5, 1, 6),
    })  # fmt: skip
    times = xr.DataArray(pd.to_datetime(["2018-11-20T00", "2018-11-20T12"]), dims="time", name="time")
    one = locate_observations(frame, [T2M], GRID, times)
    other = locate_observations(frame.iloc[permutation], [T2M], GRID, times)
    for a, b in zip(unordered(one), unordered(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_permuted_rows_give_the_same_bits(background, frame, prior) -> None:
    options = {"model": prior, "members": 3, "seed": 1}
    one = xgenda.assimilate(background, frame, **options)
    other = xgenda.assimilate(background, frame.sample(frac=1, random_state=3), **options)
    split = xgenda.assimilate(background, [frame.iloc[3:], frame.iloc[:3]], **options)
    xr.testing.assert_equal(one, other)
    xr.testing.assert_equal(one, split)


def test_the_operator_reads_the_right_variable_and_time(background, frame) -> None:
    frame["mslp"] = 101300.0
    located = locate_observations(frame, [MSLP, T2M], GRID, background.time, error={"mslp": 1.0})
    rng = np.random.default_rng(0)
    fields = rng.normal(size=(2, 2, *GRID.shape))  # time, variable
    for t in range(2):
        now = located.at(t)
        assert len(now.table) == 6
        seen = now.operator(fields[t].ravel())
        for k in range(6):
            field = xr.DataArray(fields[t, now.table.variable[k]], coords={"y": GRID.latitude, "x": GRID.longitude})
            expected = float(field.interp(y=now.table.latitude[k], x=now.table.longitude[k]))
            assert seen[k] == pytest.approx(expected, abs=1e-3)
    both = located.between(0, 2)
    assert len(both.table) == 12
    assert located.between(1, 2).time_index.tolist() == [0] * 6


def test_no_background_at_a_place_that_is_not_known(background, frame) -> None:
    frame.loc[0, "longitude"] = np.nan
    departures = xgenda.innovations(background, frame)
    assert np.isnan(departures.background.values).tolist() == [True] + [False] * 5


def test_messages_name_the_argument() -> None:
    with pytest.raises(ObservationError, match=re.escape("truth[1] is a builtins.float")):
        read_observations([None, 1.0], [T2M], argument="truth")


# -- where an observation comes from, and its errors -----------------------------------------------------------------------


def test_stations_platforms_and_heights(frame: pd.DataFrame) -> None:
    given = frame.assign(station_id=[10, 11, 12, 13, 14, 15], platform=list("abcabc"), elevation=[1.0, 2, 3, -9999, np.nan, 6])
    table = read_observations(given, [T2M])
    assert table.station.tolist() == ["10", "11", "12", "13", "14", "15"]
    assert table.platform.tolist() == list("abcabc")
    np.testing.assert_array_equal(table.height, [1, 2, 3, np.nan, np.nan, 6])
    feet = as_table(given)
    feet["elevation"] = (feet.elevation / 0.3048).assign_attrs(units="ft")
    assert read_observations(feet, [T2M]).height[:3] == pytest.approx([1, 2, 3])
    binary = as_table(given).assign(platform=("index", np.array(list("abcabc"), dtype="S1")))
    assert read_observations(binary, [T2M]).platform.tolist() == list("abcabc")


def test_errors_by_platform_source_and_representativeness(frame: pd.DataFrame) -> None:
    plain = frame.drop(columns="t2m_error").assign(platform=["ship", "buoy"] * 3)
    table = read_observations(plain, [T2M], {"t2m": {"ship": 2.0, "buoy": 0.5}})
    assert table.error.tolist() == [2.0, 0.5] * 3
    celsius = as_table(plain)
    celsius["t2m"] = ((celsius.t2m - 273.15) * 9 / 5 + 32).assign_attrs(units="degF")
    assert read_observations(celsius, [T2M], {"t2m": {"ship": 1.8, "buoy": 0.9}}).error == pytest.approx([1.0, 0.5] * 3)
    with pytest.raises(ObservationError, match=r"error\['t2m'\] has no entry for the platform 'buoy' of obs; it has 'ship'"):
        read_observations(plain, [T2M], {"t2m": {"ship": 2.0}})
    two = read_observations([frame, plain], [T2M], [None, 0.2])
    assert two.error.tolist() == [*frame.t2m_error, *([0.2] * 6)]
    with pytest.raises(ObservationError, match="error has 3 entries and obs has 2; give one for each source"):
        read_observations([frame, plain], [T2M], [None, 0.2, 0.3])
    with pytest.raises(ObservationError, match=r"error\[1\] names 't2', which is no variable of the state"):
        read_observations([frame, plain], [T2M], [None, {"t2": 0.2}])
    for added in (1.2, {"t2m": 1.2}):
        rough = read_observations(plain, [T2M], 0.5, representativeness=added)
        assert rough.error == pytest.approx([1.3] * 6)
    fahrenheit = read_observations(celsius, [T2M], 0.9, representativeness=1.2)  # in degF as the error is
    assert fahrenheit.error == pytest.approx([1.5 * 5 / 9] * 6)
    with pytest.raises(ObservationError, match="representativeness=-1 is not accepted"):
        read_observations(plain, [T2M], 0.5, representativeness=-1)
    with pytest.raises(ObservationError, match="representativeness names 'x'"):
        read_observations(plain, [T2M], 0.5, representativeness={"x": 1.0})


def test_a_long_table(frame: pd.DataFrame) -> None:
    """One row per value, with the columns of earth2studio frames."""
    long = pd.concat([
        frame[["time", "latitude", "longitude"]].assign(variable="t2m", observation=frame.t2m, observation_error=frame.t2m_error),
        frame[["time", "latitude", "longitude"]].assign(variable="mslp", observation=101300.0, observation_error=100.0),
    ]).rename(columns={"latitude": "lat", "longitude": "lon"})  # fmt: skip
    table = read_observations(long, [MSLP, T2M])
    assert np.bincount(table.variable).tolist() == [6, 6]
    same(table.take(table.variable == 1), dataclasses.replace(read_observations(frame, [T2M]), variable=np.ones(6, dtype=int)))
    with pytest.raises(ObservationError, match=r"'mslp', which is not in the state.*obs\[obs\['variable'\].isin\(\['t2m'\]\)\]"):
        read_observations(long, [T2M])


def test_a_swath(frame: pd.DataFrame) -> None:
    rng = np.random.default_rng(0)
    lat, lon = 41 + rng.random((4, 5)), rng.random((4, 5))
    lat[1, 1] = np.nan  # a line without geolocation
    value = 280 + rng.random((4, 5))
    value[0, 0] = np.nan
    time = pd.date_range("2018-11-20", periods=4, freq="1min")
    swath = xr.Dataset(
        {"t2m": (("scan", "pixel"), value, {"units": "K"})},
        coords={"latitude": (("scan", "pixel"), lat), "longitude": (("scan", "pixel"), lon), "time": ("scan", time)},
    )
    table = read_observations(swath, [T2M], 1.0)
    assert len(table) == 19
    assert table.time is not None
    assert (table.time[:4] == time.values[0]).all()
    assert table.code.tolist().count(Quality.MISSING) == 1
    same(table, read_observations(swath.transpose("pixel", "scan"), [T2M], 1.0))


def test_names_of_other_archives(frame: pd.DataFrame) -> None:
    nnja = frame.rename(columns={"latitude": "LAT", "longitude": "LON", "time": "OBS_TIMESTAMP"}).assign(ELV=12.0)
    same(read_observations(nnja, [T2M]), read_observations(frame, [T2M]), but=("row", "source", "height"))
    assert (read_observations(nnja, [T2M]).height == 12.0).all()
    aware = nnja.assign(OBS_TIMESTAMP=nnja.OBS_TIMESTAMP.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"))
    same(read_observations(aware, [T2M]), read_observations(frame, [T2M]), but=("row", "source", "height"))


def test_hints_for_tables_work_on_tables(frame: pd.DataFrame) -> None:
    wide = frame.assign(humidity=1.0)
    with pytest.raises(ObservationError, match=re.escape("obs[['time', 'latitude', 'longitude', 't2m', 't2m_error']]")):
        read_observations(wide, [T2M])


# -- quality control beyond single values ----------------------------------------------------------------------------------


def checked(frame: pd.DataFrame, background: xr.Dataset, **options: object) -> list[str]:
    located = locate_observations(frame, [T2M], GRID, background.time, quality=QualityControl(**options))  # type: ignore[arg-type]
    code = np.empty(len(frame), dtype=int)
    code[located.table.row] = located.table.code
    return [Quality(c).name.lower() for c in code]


def test_flags(frame: pd.DataFrame, background: xr.Dataset) -> None:
    for flags, good in (
        (["1", "4", "2", "1", "3", "1"], "argo"),
        ([b"1", b"4", b"2", b"1", b"3", b"1"], "argo"),
        ([1.0, 4, 2, 1, 3, 1], (1, 2)),
    ):
        for column in ("flag", "t2m_qc", "t2m_flag"):
            found = checked(frame.assign(**{column: flags}), background, flags=good)
            assert found == ["used", "flagged", "used", "used", "flagged", "used"]
    assert checked(frame.assign(flag=9), background) == ["used"] * 6  # nobody said what it means
    with pytest.warns(UserWarning, match=r"obs\['quality'\] holds 0, 4 and is not read: say which are good, quality=.*\(flags="):
        assert checked(frame.assign(quality=[0, 4, 0, 0, 0, 0]), background) == ["used"] * 6
    assert checked(frame.assign(flag=list("VSXQBk")), background, flags="madis") == ["used", "used"] + ["flagged"] * 4


def test_bounds_blacklist_and_height(frame: pd.DataFrame, background: xr.Dataset) -> None:
    assert checked(frame, background, bounds={"t2m": (279.0, 282.0)}) == ["used", "bounds", "used", "bounds", "used", "used"]
    named = frame.assign(station=list("abcdef"), platform=["x"] * 5 + ["y"])
    assert checked(named, background, blacklist=["b", "y"]) == ["used", "blacklisted", "used", "used", "used", "blacklisted"]
    ground = np.full(GRID.size, 100.0)
    high = frame.assign(height=[100.0, 650.0, 590.0, np.nan, -450.0, -350.0])
    located = locate_observations(high, [T2M], GRID, background.time, ground=ground)
    code = dict(zip(located.table.row.tolist(), located.table.code.tolist(), strict=True))
    assert [code[k] for k in range(6)] == [0, Quality.HEIGHT, 0, 0, Quality.HEIGHT, 0]
    orography = (100.0 + 0 * background.t2m[0].drop_vars("time")).assign_attrs(standard_name="surface_altitude", units="m")
    departures = xgenda.innovations(background.assign_coords(z=orography), high)
    assert departures.quality_code.values.tolist() == [0, Quality.HEIGHT, 0, 0, Quality.HEIGHT, 0]
    assert departures.height.values[0] == 100.0


def test_duplicates(frame: pd.DataFrame, background: xr.Dataset) -> None:
    twice = pd.concat([frame, frame.iloc[[1, 4]]], ignore_index=True)
    assert checked(twice, background) == ["used"] * 6 + ["duplicate"] * 2
    assert checked(twice, background, duplicates=False) == ["used"] * 8
    precise = twice.assign(t2m_error=[*frame.t2m_error, 0.1, 0.1])
    assert checked(precise, background) == ["used", "duplicate", "used", "used", "duplicate", "used", "used", "used"]
    other = twice.assign(t2m=[*frame.t2m, 270.0, 271.0])
    assert checked(other, background) == ["used"] * 8  # two different reports without a name
    named = other.assign(station=[*"abcdef", "b", "e"])
    assert checked(named, background).count("duplicate") == 2  # one station says one thing at a time
    stranger = twice.assign(station=[*"abcdef", "x", "y"])
    assert checked(stranger, background) == ["used"] * 8


def crowd(count: int = 400, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({
        "time": pd.Timestamp("2018-11-20"), "latitude": rng.uniform(41, 49, count), "longitude": rng.uniform(-5, 14, count),
        "t2m": 280 + rng.normal(size=count), "t2m_error": rng.uniform(0.5, 1.5, count),
    })  # fmt: skip


def test_thinning_keeps_one_per_box(background: xr.Dataset) -> None:
    frame = crowd()
    found = np.array(checked(frame, background, thin=200e3))
    row, column = boxes(frame.latitude.values, frame.longitude.values, 200e3)
    best = frame.assign(row=row, column=column).groupby(["row", "column"]).t2m_error.idxmin()
    assert sorted(np.flatnonzero(found == "used")) == sorted(best)
    assert set(found) == {"used", "thinned"}


def test_boxes_have_one_size() -> None:
    lat, lon = np.linspace(-89.9, 89.9, 60)[:, None] + np.zeros(4000), np.linspace(-180, 179.9, 4000) + np.zeros((60, 1))
    row, column = boxes(lat.ravel(), lon.ravel(), 300e3)
    for k in np.unique(row):
        around = np.cos(np.radians(lat.ravel()[row == k])).mean() * 2 * np.pi * 6371229
        if around > 3e6:
            assert around / (column[row == k].max() + 1) == pytest.approx(300e3, rel=0.15)
    assert np.array_equal(boxes(np.array([5.0]), np.array([-170.0]), 1e5), boxes(np.array([5.0]), np.array([190.0]), 1e5))


def test_superobs_are_weighted_means(background: xr.Dataset) -> None:
    frame = crowd()
    control = QualityControl(superob=200e3, floor=0.3)
    located = locate_observations(frame, [T2M], GRID, background.time, quality=control)
    used = located.table.code == Quality.USED
    row, column = boxes(frame.latitude.values, frame.longitude.values, 200e3)
    weight = frame.t2m_error**-2
    groups = frame.assign(w=weight, wv=weight * frame.t2m, row=row, column=column).groupby(["row", "column"])
    expected = (groups.wv.sum() / groups.w.sum()).sort_values().to_numpy()
    np.testing.assert_allclose(np.sort(located.table.value[used]), expected)
    floor = np.maximum(groups.w.sum() ** -0.5, 0.3 * groups.t2m_error.min())
    np.testing.assert_allclose(np.sort(located.table.error[used]), np.sort(floor))
    assert (located.table.code == Quality.MERGED).sum() + used.sum() == 400
    y, x = GRID.points()
    seen = located.operator.select(used)(np.concatenate([2 * y - x]))
    np.testing.assert_allclose(seen, 2 * located.table.latitude[used] - located.table.longitude[used], atol=1e-2)
    one = locate_observations(frame.iloc[[3]], [T2M], GRID, background.time, quality=control).table
    assert one.value.tolist() == pytest.approx([frame.t2m[3]])


def test_the_buddy_check_finds_what_disagrees_with_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    lat, lon = 50 + rng.uniform(-2, 2, 300), 10 + rng.uniform(-3, 3, 300)
    weather = 6 * np.exp(-((lat - 50) ** 2 + (lon - 10) ** 2) / 2)  # a real feature that the background lacks
    departure = weather + 0.5 * rng.normal(size=300)
    wrong = [5, 77, 150]
    departure[wrong] = np.where(weather[wrong] > 3, 0.0, 6.5) - np.where(weather[wrong] > 3, 1.5, 0.0)
    error, spread = np.full(300, 0.5), np.full(300, 2.0)
    bad = buddy_check(lat, lon, departure, error, spread, 4.0, 100e3)
    assert sorted(np.flatnonzero(bad)) == wrong
    order = rng.permutation(300)
    again = buddy_check(lat[order], lon[order], departure[order], error, spread, 4.0, 100e3)
    assert np.array_equal(np.flatnonzero(again), np.flatnonzero(np.isin(order, wrong)))
    alone = buddy_check(np.array([0.0, 40.0]), np.array([0.0, 50.0]), np.array([50.0, 0.1]), np.ones(2), np.ones(2), 4.0, 100e3)
    assert not alone.any()  # nobody to ask
    assert not buddy_check(*np.zeros((2, 0)), *np.zeros((3, 0)), 4.0, 100e3).any()


def test_buddies_in_an_analysis(background, prior) -> None:
    frame = crowd(200).assign(t2m_error=0.5)
    field = background.t2m.isel(time=0)
    places = {k: xr.DataArray(frame[k].to_numpy(), dims="obs") for k in ("latitude", "longitude")}
    frame["t2m"] = field.interp(places).to_numpy()
    frame.loc[7, "t2m"] += 5.0
    both = frame.iloc[[7]].assign(latitude=frame.latitude[7] + 0.1, t2m=frame.t2m[7] - 5)
    third = both.assign(longitude=both.longitude + 0.1)
    obs = pd.concat([frame, both, third], ignore_index=True)
    departures = xgenda.innovations(background.isel(time=[0]), obs, model=prior, background_check=None)
    assert np.flatnonzero(departures.quality_code.values == Quality.BUDDY).tolist() == [7]
    report = xgenda.quality_report(departures)
    assert report.loc["t2m"].to_dict() == {"used": 201, "buddy": 1, "total": 202}
    analysis = xgenda.assimilate(background.isel(time=[0]), obs, model=prior, members=2, seed=0, background_check=None)
    clean = xgenda.assimilate(background.isel(time=[0]), obs.drop(index=7), model=prior, members=2, seed=0, background_check=None)
    np.testing.assert_allclose(analysis.t2m, clean.t2m, atol=1e-4)
    off = xgenda.innovations(
        background.isel(time=[0]), obs, model=prior, background_check=None, quality=QualityControl(buddy=None)
    )
    assert (off.quality_code == 0).all()


def test_levels_of_one_profile_are_no_buddies() -> None:
    """They have no distance and departures of their own; those of neighbours on one level are compared."""
    rng = np.random.default_rng(0)
    pressure = np.array([300.0, 500.0, 700.0])
    draw = rng.normal(size=(40, 3, 1, 1)) * np.ones((40, 3, 4, 4)) + 0.05 * rng.normal(size=(40, 3, 4, 4))
    coords = {
        "latitude": np.linspace(40, 46, 4),
        "longitude": np.linspace(0, 9, 4),
        "pressure": ("pressure", pressure, {"units": "hPa"}),
    }
    dims = ("member", "pressure", "latitude", "longitude")
    ensemble = xr.Dataset({"t": (dims, 250 + draw, {"units": "K"})}, coords)
    one = pd.DataFrame({"latitude": 43.0, "longitude": 4.0, "pressure": 100 * pressure, "t": [252.5, 247.5, 250.0]})
    prior = xgenda.gaussian_prior(ensemble.isel(member=0, drop=True), length_scale=300e3, std=1.0)
    mean = ensemble.mean("member", keep_attrs=True)
    for obs, wrong in (
        (one, []),
        (pd.concat([one, *[one.assign(latitude=43 + d, t=250.0) for d in (0.1, 0.2, 0.3)]]), [252.5, 247.5]),
    ):
        analysis = xgenda.assimilate(ensemble, obs, model=xgenda.LETKF(), error=0.1)
        counts = json.loads(analysis.attrs["xgenda_observation_counts"])
        assert counts.get("buddy", 0) == len(wrong)
        assert counts["used"] == len(obs) - len(wrong)
        found = xgenda.innovations(mean, obs, model=prior, error=0.1)
        assert sorted(obs.t.to_numpy()[found.row.values[found.quality_code.values == Quality.BUDDY]]) == sorted(wrong)


def test_bounds_and_lapse_rates_are_in_units_of_the_state() -> None:
    """Whatever the units of the model and of the observations."""
    coords = {"latitude": np.linspace(45, 55, 5), "longitude": np.linspace(0, 10, 5)}
    dims, ground = ("latitude", "longitude"), {"standard_name": "surface_altitude", "units": "m"}
    ds = xr.Dataset({"p": (dims, np.full((5, 5), 1e5), {"units": "Pa"}), "orography": (dims, np.zeros((5, 5)), ground)}, coords)
    obs = pd.DataFrame({"latitude": 50.0, "longitude": [5.0, 5.5], "p": [100300.0, 106000.0], "height": [10.0, 0.0]})
    scaled = ds[["p"]].assign(p=(ds.p / 100).assign_attrs(units="hPa"))
    given = {"error": 50.0, "representativeness": 120.0, "lapse_rate": {"p": 12.0}, "background_check": None}
    quality = QualityControl(bounds={"p": (95000.0, 105000.0)}, buddy=None)
    found = [
        xgenda.innovations(ds, obs, model=xgenda.gaussian_prior(of, length_scale=3e5, std=std), quality=quality, **given)
        for of, std in ((ds[["p"]], 300.0), (scaled, 3.0))
    ]
    for departures, scale in zip(found, (1.0, 0.01), strict=True):  # in the units of the model
        assert departures.quality_code.values.tolist() == [Quality.USED, Quality.BOUNDS]
        assert float(departures.innovation[0]) == pytest.approx(420.0 * scale)  # 300 Pa, and ten metres of 12 Pa
        assert float(departures.error[0]) == pytest.approx(130.0 * scale)


def test_one_report_in_two_conventions_of_longitude_is_one(frame: pd.DataFrame) -> None:
    one = frame.iloc[[0]].assign(longitude=-3.0, station="X")
    located = locate_observations([one, one.assign(longitude=357.0)], [T2M], GRID, None)
    assert sorted(located.table.code.tolist()) == [Quality.USED, Quality.DUPLICATE]


def test_reports_by_platform(background, frame) -> None:
    departures = xgenda.innovations(
        background, frame.assign(platform=["ship", "buoy"] * 3, t2m=[np.nan, 500, 281, 281, 281, 281])
    )
    report = xgenda.quality_report(departures)
    assert report.loc[("t2m", "ship")].to_dict() == {"used": 2, "missing": 1, "bounds": 0, "total": 3}
    assert report.total.sum() == 6
    assert "<table" in report.to_html()
    assert set(EQUIVALENTS) == set(MEANINGS) == set(Quality)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flags": "noaa"}, "flags='noaa' is not accepted; choose one of 'argo', 'ncep', 'madis'"),
        ({"thin": -1}, "thin=-1 is not accepted; give a positive number or None"),
        ({"thin": 1e4, "superob": 1e4}, "thin and superob exclude each other"),
        ({"buddy": 0}, "buddy=0 is not accepted"),
        ({"buddy_radius": None}, "buddy_radius=None is not accepted; give a positive number."),
        ({"blacklist": "08181"}, r"blacklist='08181' is one text; give a collection: blacklist=\['08181'\]"),
        ({"bounds": {"t2m": (300, 200)}}, r"bounds\['t2m'\]=\(300, 200\) is not accepted; give \(lowest, highest\)"),
        ({"duplicates": 1}, "quality: duplicates=1 is not accepted; it must be True or False"),
        ({"height_difference": "far"}, "height_difference='far' is not accepted"),
    ],
)
def test_quality_options_that_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QualityControl(**options)


def test_quality_must_be_one(background, frame) -> None:
    with pytest.raises(OptionError, match=r"quality='default' is not accepted; give for example quality=xgenda.QualityControl\("):
        xgenda.innovations(background, frame, quality="default")


# -- the same observations in any container ----------------------------------------------------------------------------


def as_polars(frame: pd.DataFrame) -> object:
    return pytest.importorskip("polars").DataFrame({name: frame[name].tolist() for name in frame})


def as_long(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per value; errors follow their values."""
    parts = [
        frame.drop(columns=["a", "a_error", "b", "b_error"]).assign(
            variable=n, observation=frame[n], observation_error=frame[f"{n}_error"]
        )
        for n in "ab"
    ]
    return pd.concat(parts, ignore_index=True)


def as_stations(frame: pd.DataFrame) -> xr.Dataset:
    """Station x time, NaN (a missing value) where a station was silent."""
    wide = frame.set_index(["station", "time"])[["a", "a_error", "b", "b_error"]].to_xarray()
    place = frame.drop_duplicates("station").set_index("station").loc[wide.station.values]
    return wide.assign_coords({k: ("station", place[k].to_numpy()) for k in ("latitude", "longitude")})


def as_ragged(frame: pd.DataFrame) -> xr.Dataset:
    code, names = pd.factorize(frame["station"])
    place = frame.drop_duplicates("station").set_index("station").loc[names]
    samples = {k: ("obs", frame[k].to_numpy()) for k in ("time", "a", "a_error", "b", "b_error")}
    instances = {k: ("series", place[k].to_numpy()) for k in ("latitude", "longitude")}
    index = ("obs", code, {"instance_dimension": "series"})
    return xr.Dataset(samples | instances | {"station": ("series", list(names)), "index": index})


CONTAINERS = {
    "polars": as_polars,
    "dataset": lambda f: f.to_xarray().drop_vars("index"),
    "long": as_long,
    "gridded": lambda f: f.drop(columns="station").set_index(["time", "latitude", "longitude"]).to_xarray(),
    "station x time": as_stations,
    "ragged": as_ragged,
    "pieces": lambda f: [f.iloc[: len(f) // 2], as_ragged(f.iloc[len(f) // 2 :])],
    "shuffled": lambda f: f.sample(frac=1.0, random_state=3),
    "degC": lambda f: (
        f.to_xarray().drop_vars("index").pipe(lambda d: d.assign({n: (d[n] - 273.15).assign_attrs(units="degC") for n in "ab"}))
    ),
    "longitude from 0 to 360": lambda f: f.assign(longitude=f.longitude % 360),
    "hours and other names": lambda f: f.rename(columns={"latitude": "LAT", "longitude": "LON", "time": "OBS_TIMESTAMP"}),
}


@st.composite
def networks_of_stations(draw: st.DrawFn) -> pd.DataFrame:
    """Some stations at some of three times, two variables, either may be missing."""
    count = draw(st.integers(1, 4))
    places = draw(st.lists(st.tuples(st.integers(-89, 89), st.integers(-179, 179)), min_size=count, max_size=count, unique=True))
    seen = draw(
        st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, 2)), min_size=1, max_size=8, unique=True)
    )  # station and time
    value = st.one_of(st.integers(2300, 3200).map(lambda v: v / 10), st.just(np.nan))
    rows = [
        {
            "station": f"s{i}", "latitude": float(places[i][0]), "longitude": float(places[i][1]),
            "time": pd.Timestamp("2018-11-20") + t * pd.Timedelta("6h"),
            "a": draw(value), "b": draw(value), "a_error": 1.0 + i, "b_error": 0.5 + t,
        }
        for i, t in seen
    ]  # fmt: skip
    return pd.DataFrame(rows)


def canonical(obs: object) -> list[tuple[object, ...]]:
    """Return what is observed, in canonical order; what is missing is left out."""
    table = read_observations(obs, [Wanted(n, "air_temperature", "K") for n in "ab"])  # type: ignore[arg-type]
    assert table.time is not None
    fine = table.code == 0
    assert (table.code[~fine] == Quality.MISSING).all()
    columns = (
        table.variable, table.time.astype("M8[s]").astype(int), table.latitude, (table.longitude + 180) % 360 - 180,
        np.round(table.value, 6), table.error,
    )  # fmt: skip
    return sorted(zip(*(c[fine].tolist() for c in columns), strict=True))


@pytest.mark.parametrize("form", CONTAINERS)
@settings(max_examples=15, deadline=None)
@given(frame=networks_of_stations())
def test_any_container_says_the_same(form: str, frame: pd.DataFrame) -> None:
    expected = canonical(frame)
    assert len(expected) == int(frame[["a", "b"]].notna().to_numpy().sum())
    assert canonical(CONTAINERS[form](frame)) == expected


def test_polars_knows_nulls_and_time_zones() -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(
        {
            "time": ["2018-11-20T01:00", None],
            "latitude": [45.0, 46.0],
            "longitude": [3, 4],
            "station": ["x", None],
            "t2m": [None, 281.0],
        }
    ).with_columns(polars.col("time").str.to_datetime(time_zone="UTC").dt.convert_time_zone("Asia/Tokyo"))
    table = read_observations(frame, [T2M], 1.0)
    assert table.time is not None
    assert table.time[0] == np.datetime64("2018-11-20T01:00")
    assert table.station.tolist() == ["x", ""]
    assert table.code.tolist() == [Quality.MISSING] * 2
    same(read_observations(frame.lazy(), [T2M], 1.0), table)
    with pytest.raises(ObservationError, match=r"obs is a polars.*Series; give a pandas DataFrame"):
        read_observations(frame["t2m"], [T2M], 1.0)

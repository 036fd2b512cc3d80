"""Observations on levels: profiles, ragged arrays, the archives that have them; what their levels mean, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import xgenda
from xgenda.errors import ObservationError, UnitsError
from xgenda.observations.containers import Table, Wanted, read_observations
from xgenda.observations.levels import depth_of_pressure
from xgenda.observations.quality import Quality, QualityControl

AIR = Wanted("t", "air_temperature", "K", levels=(50000.0, 85000.0, 100000.0), vertical="pressure")
SEA = Wanted("temperature", "sea_water_temperature", "degC", levels=(0.0, 100.0, 1000.0), vertical="depth")
SALT = Wanted("salinity", "sea_water_practical_salinity", "psu", levels=(0.0, 100.0, 1000.0), vertical="depth")
HIGH = Wanted("t", "air_temperature", "K", levels=(0.0, 1000.0, 5000.0), vertical="altitude")
T2M = Wanted("t2m", None, "K")
TIMES = pd.to_datetime(["2018-11-20T00", "2018-11-20T06", "2018-11-20T12"])


def soundings() -> pd.DataFrame:
    """Three ascents: levels unsorted, one repeated."""
    pressure = [100000.0, 85000.0, 50000.0, 92500.0, 92500.0, 30000.0, 70000.0]
    station = np.array([0, 0, 0, 1, 1, 2, 2])
    return pd.DataFrame(
        {
            "time": TIMES[station],
            "latitude": np.array([45.0, 46.0, 47.0])[station],
            "longitude": np.array([3.0, -5.0, 12.0])[station],
            "station": np.array(["07157", "08001", "10868"])[station],
            "pressure": pressure,
            "t": 220.0 + np.array(pressure) / 2000,
        }
    )


def rows(table: Table) -> list[tuple[object, ...]]:
    """Return what each row says, in any order."""
    assert table.time is not None
    columns = (
        table.time.astype("M8[s]").astype(int),
        table.latitude,
        table.longitude,
        table.level,
        table.value,
        table.error,
        table.station,
    )
    return sorted(zip(*(np.asarray(c).tolist() for c in columns), strict=True))


def columns_of(frame: pd.DataFrame) -> xr.Dataset:
    return frame.to_xarray().drop_vars("index")


def two_dimensional(frame: pd.DataFrame) -> xr.Dataset:
    """Profiles side by side, padded with NaN; levels of each profile."""
    names = frame.station.unique()
    most = frame.groupby("station").size().max()
    first = frame.drop_duplicates("station")
    wide = {k: np.full((len(names), most), np.nan) for k in ("pressure", "t")}
    for i, name in enumerate(names):
        for k, array in wide.items():
            column = frame[k][frame.station == name]
            array[i, : len(column)] = column
    return xr.Dataset(
        {k: (("profile", "level_index"), v) for k, v in wide.items()}
        | {k: ("profile", first[k].to_numpy()) for k in ("time", "latitude", "longitude", "station")}
    )


def contiguous(frame: pd.DataFrame) -> xr.Dataset:
    """CF contiguous ragged array."""
    first = frame.drop_duplicates("station")
    count = frame.groupby("station", sort=False).size().to_numpy()
    return xr.Dataset(
        {k: ("obs", frame[k].to_numpy()) for k in ("pressure", "t")}
        | {k: ("profile", first[k].to_numpy()) for k in ("time", "latitude", "longitude", "station")}
        | {"row_size": ("profile", count, {"sample_dimension": "obs"})},
        attrs={"featureType": "profile"},
    )


def indexed(frame: pd.DataFrame) -> xr.Dataset:
    """CF indexed ragged array, its samples in any order; the station is the coordinate of its dimension."""
    frame = frame.sample(frac=1.0, random_state=1)
    code, names = pd.factorize(frame.station)
    first = frame.drop_duplicates("station").set_index("station").loc[names]
    return xr.Dataset(
        {k: ("obs", frame[k].to_numpy()) for k in ("pressure", "t", "time")}
        | {k: ("station", first[k].to_numpy()) for k in ("latitude", "longitude")}
        | {"which": ("obs", code, {"instance_dimension": "station"})},
        coords={"station": list(names)},
        attrs={"featureType": "timeSeriesProfile"},
    )


def both_ragged(frame: pd.DataFrame) -> xr.Dataset:
    """CF time series of profiles: levels contiguous by profile, profiles indexed by station."""
    ds = contiguous(frame)
    index = [2, 0, 1]
    for name in ("latitude", "longitude", "station"):
        values = np.empty_like(ds[name].values)
        values[index] = ds[name].values
        ds[name] = ("site", values)
    return ds.assign(site_index=("profile", index, {"instance_dimension": "site"}))


FORMS: dict[str, Callable[[pd.DataFrame], object]] = {
    "frame": lambda f: f,
    "dataset": columns_of,
    "two-dimensional": two_dimensional,
    "two-dimensional, transposed": lambda f: two_dimensional(f).transpose(),
    "contiguous ragged": contiguous,
    "indexed ragged": indexed,
    "ragged twice": both_ragged,
    "hectopascal": lambda f: columns_of(f).pipe(lambda d: d.assign(pressure=(d.pressure / 100).assign_attrs(units="hPa"))),
    "name of GRIB": lambda f: f.assign(isobaricInhPa=f.pressure / 100).drop(columns="pressure"),
    "by standard name": lambda f: columns_of(f).pipe(
        lambda d: d.assign(pressure=d.pressure.assign_attrs(standard_name="air_pressure")).rename(pressure="p")
    ),
    "list": lambda f: [f.iloc[:3], two_dimensional(f.iloc[3:])],
    "degC": lambda f: columns_of(f).pipe(lambda d: d.assign(t=(d.t - 273.15).assign_attrs(units="degC"))),
    "long": lambda f: f.rename(columns={"t": "observation"}).assign(variable="t"),
    "shuffled": lambda f: f.sample(frac=1.0, random_state=0),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_one_normal_form_of_profiles(form: str) -> None:
    frame = soundings()
    found = rows(read_observations(FORMS[form](frame), [AIR], 1.0))  # type: ignore[arg-type]
    expected = rows(read_observations(frame, [AIR], 1.0))
    assert [r[3] for r in expected] == [50000.0, 85000.0, 100000.0, 92500.0, 92500.0, 30000.0, 70000.0]
    for one, other in zip(found, expected, strict=True):
        assert one[-1] == other[-1]
        assert one[:-1] == pytest.approx(other[:-1], rel=1e-12)


def test_levels_along_a_dimension() -> None:
    """A profiler: level is a coordinate; time and level span the values."""
    ds = xr.Dataset(
        {"t": (("time", "level"), [[280.0, np.nan, 250.0], [281.0, 270.0, 251.0], [282.0, 271.0, 252.0]])},
        coords={
            "time": TIMES,
            "level": ("level", [1000.0, 850.0, 500.0], {"units": "millibar"}),
            "latitude": 45.0,
            "longitude": 3.0,
        },
    )
    table = read_observations(ds, [AIR], 1.0)
    assert table.level.tolist() == [100000.0, 85000.0, 50000.0] * 3
    assert table.code.tolist() == [0, Quality.MISSING] + [0] * 7  # a level without a value is no padding
    assert table.row.tolist() == list(range(9))
    stations = ds.expand_dims(station=["a", "b"]).assign_coords(
        latitude=("station", [45.0, 46.0]), longitude=("station", [3.0, 4.0])
    )
    table = read_observations(stations, [AIR], 1.0)
    assert len(table) == 18
    assert table.value[table.station == "b"][~np.isnan(table.value[table.station == "b"])].tolist() == [
        280.0, 250.0, 281.0, 270.0, 251.0, 282.0, 271.0, 252.0,
    ]  # fmt: skip


def test_levels_and_none_in_one_container() -> None:
    ds = two_dimensional(soundings()).assign(t2m=("profile", [280.0, 281.0, 282.0]), height=("profile", [300.0, 400.0, 500.0]))
    table = read_observations(ds, [T2M, AIR], 1.0)
    assert np.isnan(table.level[table.variable == 0]).all()
    assert table.height[table.variable == 0].tolist() == [300.0, 400.0, 500.0]
    assert np.isnan(table.height[table.variable == 1]).all()  # levels are not on the ground
    assert sorted(table.level[table.variable == 1]) == sorted(soundings().pressure)


def test_a_level_that_is_not_known_is_missing() -> None:
    frame = soundings()
    frame.loc[2, "pressure"] = np.nan
    frame.loc[3, "pressure"] = -9999.0
    frame.loc[4, "pressure"] = 99999.0
    assert read_observations(frame, [AIR], 1.0).code.tolist() == [0, 0, Quality.MISSING, Quality.MISSING, 0, 0, 0]


def test_values_at_other_levels_are_no_duplicates() -> None:
    ds = xr.Dataset(coords={"latitude": np.arange(40.0, 51.0), "longitude": np.arange(-6.0, 16.0)})
    state = ds.assign(t=(("latitude", "longitude"), np.full((11, 22), 280.0), {"units": "K"}))
    frame = soundings().assign(t=280.0).drop(columns="time")
    flat = Wanted("t", None, "K", levels=(1000.0, 110000.0), vertical="pressure")
    from xgenda.grids import Grid
    from xgenda.observations.operators import locate_observations

    grid = Grid(state.latitude.values, state.longitude.values)
    located = locate_observations(frame, [flat], grid, None, error=1.0)
    found = dict(zip(located.table.row.tolist(), located.table.code.tolist(), strict=True))
    assert [row for row, code in found.items() if code == Quality.DUPLICATE] == [4]
    thinned = locate_observations(frame, [flat], grid, None, error=1.0, quality=QualityControl(thin=1e3))
    assert (thinned.table.code == Quality.USED).sum() == 6


def test_depths_of_pressures_in_the_sea() -> None:
    """Check value of UNESCO Technical Papers in Marine Science 44; and the quadratic formula of Saunders (1981)."""

    def depth(pressure: np.ndarray, latitude: np.ndarray) -> np.ndarray:
        sine2 = xr.DataArray(np.sin(np.radians(latitude)) ** 2, dims="y")
        return depth_of_pressure(xr.DataArray(pressure, dims="p"), sine2).transpose("p", "y").values

    assert depth(np.array([10000.0]), np.array([30.0])).item() == pytest.approx(9712.653, abs=5e-4)
    pressure, latitude = np.linspace(0, 6000, 7), np.array([0.0, 30.0, 60.0])
    c1, c2 = (5.92 + 5.25 * np.sin(np.radians(latitude)) ** 2) * 1e-3, 2.21e-6
    quadratic = (1 - c1) * pressure[:, None] - c2 * pressure[:, None] ** 2
    assert np.abs(depth(pressure, latitude) - quadratic).max() < 0.5


def sea() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "latitude": [30.0, 30.0, -50.0],
            "longitude": [0.0, 0.0, 170.0],
            "depth": [5.0, 993.0, 100.0],
            "temperature": [20.0, 5.0, 8.0],
        }
    )


DEPTHS: dict[str, Callable[[xr.Dataset], xr.Dataset]] = {
    "depth": lambda d: d,
    "kilometres": lambda d: d.assign(depth=(d.depth / 1000).assign_attrs(units="km")),
    "upward": lambda d: d.assign(depth=(-d.depth).assign_attrs(units="m", positive="up")),
    "z": lambda d: d.assign(z=-d.depth).drop_vars("depth"),
    "z downward": lambda d: d.rename(depth="z"),
    "altitude": lambda d: d.assign(a=(-d.depth).assign_attrs(standard_name="altitude")).drop_vars("depth"),
    "standard name": lambda d: d.rename(depth="x").pipe(lambda e: e.assign(x=e.x.assign_attrs(standard_name="depth"))),
    "pressure as well": lambda d: d.assign(PRES=d.depth * 7),
}


@pytest.mark.parametrize("form", DEPTHS)
def test_one_normal_form_of_depths(form: str) -> None:
    table = read_observations(DEPTHS[form](columns_of(sea())), [SEA], 0.1)
    assert table.level == pytest.approx([5.0, 993.0, 100.0])


@pytest.mark.parametrize("units", ["dbar", "decibar", "Pa", "hPa"])
def test_pressures_of_the_sea_become_depths(units: str) -> None:
    pressure = np.array([5.0, 1000.0, 100.0])
    ds = columns_of(sea().drop(columns="depth"))
    ds["pres"] = ("index", pressure * {"Pa": 1e4, "hPa": 100.0}.get(units, 1.0), {"units": units})
    x = np.sin(np.radians([30.0, 30.0, -50.0])) ** 2
    saunders = (1 - (5.92 + 5.25 * x) * 1e-3) * pressure - 2.21e-6 * pressure**2
    assert read_observations(ds, [SEA], 0.1).level == pytest.approx(saunders, abs=0.5)


def test_heights() -> None:
    frame = soundings().drop(columns="pressure").assign(altitude=np.arange(7) * 100.0, height=2.0)
    table = read_observations(frame, [HIGH], 1.0)
    assert table.level.tolist() == (np.arange(7) * 100.0).tolist()
    below = columns_of(frame.drop(columns="height")).pipe(
        lambda d: d.assign(altitude=(-d.altitude / 1000).assign_attrs(units="km", positive="down"))
    )
    assert read_observations(below, [HIGH], 1.0).level == pytest.approx(np.arange(7) * 100.0)


def test_a_height_is_above_the_ground_and_an_altitude_above_the_sea() -> None:
    frame = soundings().drop(columns="pressure").assign(altitude=1500.0, height=np.arange(7) * 10.0)
    above_ground = Wanted("t", "air_temperature", "K", levels=(0.0, 100.0), vertical="height")
    assert read_observations(frame, [above_ground], 1.0).level.tolist() == (np.arange(7) * 10.0).tolist()
    with pytest.raises(ObservationError, match=r"on levels of height. Give a column 'height' in m"):
        read_observations(frame.drop(columns="height"), [above_ground], 1.0)


def argo() -> xr.Dataset:
    """Two profiles as the global assembly centres write them (Argo user's manual 3.41), less what is not read here."""
    deep = [[4.0, 10.0, 500.0, 2000.0], [5.0, 50.0, np.nan, np.nan]]
    flags = np.array([[b"1", b"1", b"4", b"2"], [b"1", b"1", b" ", b" "]])
    return xr.Dataset(
        {
            "PLATFORM_NUMBER": ("N_PROF", np.array([b"6901234 ", b"4900111 "])),
            "CYCLE_NUMBER": ("N_PROF", [1.0, 7.0]),
            "JULD": ("N_PROF", TIMES[:2], {"standard_name": "time", "axis": "T"}),
            "JULD_QC": ("N_PROF", np.array([b"1", b"1"])),
            "LATITUDE": ("N_PROF", [30.0, 45.0], {"standard_name": "latitude", "units": "degree_north", "axis": "Y"}),
            "LONGITUDE": ("N_PROF", [-40.0, -20.0], {"standard_name": "longitude", "units": "degree_east", "axis": "X"}),
            "POSITION_QC": ("N_PROF", np.array([b"1", b"4"])),
            "PRES": (("N_PROF", "N_LEVELS"), deep, {"standard_name": "sea_water_pressure", "units": "decibar", "axis": "Z"}),
            "PRES_QC": (("N_PROF", "N_LEVELS"), np.where(flags == b"2", b"3", np.where(flags == b"4", b"1", flags))),
            "TEMP": (
                ("N_PROF", "N_LEVELS"), [[20.0, 19.0, 10.0, 3.0], [15.0, 14.0, np.nan, np.nan]],
                {"standard_name": "sea_water_temperature", "units": "degree_Celsius"},
            ),
            "TEMP_QC": (("N_PROF", "N_LEVELS"), flags),
            "PSAL": (
                ("N_PROF", "N_LEVELS"), [[36.0, 36.1, 35.0, 34.9], [35.5, 35.6, np.nan, np.nan]],
                {"standard_name": "sea_water_salinity", "units": "psu"},
            ),
            "PSAL_QC": (("N_PROF", "N_LEVELS"), np.where(flags == b"4", b"1", flags)),
        }
    )  # fmt: skip


def test_argo() -> None:
    wanted = [SEA, Wanted("salinity", "sea_water_salinity", "psu", levels=SALT.levels, vertical="depth")]
    table = read_observations(argo(), wanted, {"temperature": 0.1, "salinity": 0.02}, quality=QualityControl(flags="argo"))
    assert table.variable.tolist() == [0] * 6 + [1] * 6
    assert table.station.tolist() == (["6901234"] * 4 + ["4900111"] * 2) * 2
    bad = Quality.FLAGGED
    # the third temperature is flagged, the fourth pressure, and the second position; padding is no observation
    assert table.code.tolist() == [0, 0, bad, bad, bad, bad, 0, 0, 0, bad, bad, bad]
    assert table.level[:4] == pytest.approx([3.97, 9.93, 496.1, 1976.9], abs=0.5)
    assert table.time is not None
    assert table.time[:6].tolist() == TIMES[[0, 0, 0, 0, 1, 1]].to_numpy().tolist()
    with pytest.warns(UserWarning, match=r"obs\['(TEMP|PSAL)_QC'\] holds .* and is not read: .*flags="):
        unflagged = read_observations(argo(), wanted, 0.1)
    assert unflagged.code.tolist() == [0] * 12
    both = argo().pipe(lambda d: d.assign(TEMP_ADJUSTED=d.TEMP))
    with pytest.raises(ObservationError, match=r"'TEMP' and 'TEMP_ADJUSTED' both could be 'temperature'; keep one"):
        read_observations(both, wanted, 0.1)


def test_frames_of_nnja() -> None:
    """Columns of the frames of nnja-ai: coordinates and BUFR mnemonics in capitals, times in UTC."""
    frame = pd.DataFrame(
        {
            "OBS_TIMESTAMP": TIMES.tz_localize("UTC"),
            "LAT": [45.0, 46.0, 47.0],
            "LON": [3.0, -5.0, 12.0],
            "RPT": ["72293", "72293", "72403"],
            "PRLC": [925.0, 500.0, 20.0],  # Pa, however small
            "t": pd.array([280.0, None, 250.0], dtype="Float64"),
        }
    )
    table = read_observations(frame, [AIR], 1.0)
    assert table.level.tolist() == [925.0, 500.0, 20.0]
    assert table.code.tolist() == [0, Quality.MISSING, 0]
    assert table.station.tolist() == ["72293", "72293", "72403"]
    assert table.time is not None
    assert table.time.tolist() == TIMES.to_numpy().tolist()
    radiance = frame.drop(columns=["PRLC", "t"]).assign(TMBR_00006=[230.0, 231.0, 232.0])
    assert read_observations(radiance, [Wanted("TMBR_00006", "toa_brightness_temperature", "K")], 1.0).value.tolist() == [
        230.0,
        231.0,
        232.0,
    ]


def test_frames_of_earth2studio() -> None:
    """Columns of `earth2studio.data.NNJAObsConv` and `ISD`: one row per value, pressure in Pa, elevation of the level."""
    frame = pd.DataFrame(
        {
            "time": TIMES[[0, 0, 1, 2]], "lat": np.float32([45, 45, 46, 47]), "lon": np.float32([3, 3, 355, 12]),
            "pres": np.float32([100000, 50000, np.nan, 92500]), "elev": np.float32([100, 5500, 10, 800]),
            "type": pd.array([120, 120, 181, 120], dtype="UInt16"), "level_cat": pd.array([1, 1, None, 1], dtype="UInt16"),
            "class": "ADPUPA", "station": ["a", "a", "b", "c"], "station_elev": np.float32([90, 90, 10, 700]),
            "quality": pd.array([2, 2, 9, None], dtype="UInt16"), "pressure_quality": pd.array([2, 2, 2, 2], dtype="UInt16"),
            "observation": np.float32([281, 255, 283, np.nan]), "variable": ["t", "t", "t2m", "t"],
        }
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"obs\['quality'\] holds 2.0, 9.0 and is not read"):
        table = read_observations(frame, [T2M, AIR], {"t": 1.0, "t2m": 2.0})
    assert table.row.tolist() == [2, 0, 1, 3]
    assert table.code.tolist() == [0, 0, 0, Quality.MISSING]  # a null is an observation that is missing
    assert table.level.tolist()[1:] == [100000.0, 50000.0, 92500.0]
    assert table.height.tolist()[0] == 10.0
    assert table.platform.tolist() == ["181", "120", "120", "120"]
    flagged = read_observations(frame, [T2M, AIR], 1.0, quality=QualityControl(flags="ncep"))
    assert flagged.code.tolist() == [Quality.FLAGGED, 0, 0, Quality.MISSING]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 100))
def test_ragged_arrays_of_any_counts(counts: list[int], seed: int) -> None:
    """Profiles without any level and of equal lengths; contiguous, indexed and as a table they are the same."""
    total, generator = sum(counts), np.random.default_rng(seed)
    which = np.repeat(np.arange(len(counts)), counts)
    place = {"latitude": np.linspace(-60, 60, len(counts)), "longitude": np.linspace(0, 100, len(counts))}
    samples = {"pressure": generator.uniform(1e4, 1e5, total), "t": generator.uniform(200, 300, total)}
    flat = xr.Dataset({k: ("obs", v) for k, v in samples.items()} | {k: ("obs", v[which]) for k, v in place.items()})
    ragged = xr.Dataset({k: ("obs", v) for k, v in samples.items()} | {k: ("profile", v) for k, v in place.items()})
    expected = read_observations(flat, [AIR], 1.0)
    order = generator.permutation(total)
    for found in (
        ragged.assign(n=("profile", counts, {"sample_dimension": "obs"})),
        ragged.isel(obs=order).assign(i=("obs", which[order].astype(float), {"instance_dimension": "profile"})),
    ):
        table = read_observations(found, [AIR], 1.0)
        back = np.argsort(table.value)
        ahead = np.argsort(expected.value)
        for name in ("value", "level", "latitude", "longitude"):
            assert np.array_equal(getattr(table, name)[back], getattr(expected, name)[ahead])


REFUSED: dict[str, tuple[Callable[[], object], Wanted, type, str]] = {
    "no levels": (
        lambda: soundings().drop(columns="pressure"), AIR, ObservationError,
        r"obs\['t'\] has no levels, and the state has 't' on levels of pressure. Give a column 'pressure' in Pa: obs\['pressure'\] = ...; "
        r"obs.attrs\['pressure'\] = {'units': 'Pa'}",
    ),
    "no levels in a dataset": (
        lambda: columns_of(sea()).drop_vars("depth"), SEA, ObservationError,
        r"has no levels.*on levels of depth. Give a column 'depth' in m: .*obs\['depth'\].attrs = {'units': 'm'}",
    ),
    "no heights": (lambda: soundings(), HIGH, ObservationError, r"on levels of altitude. Give a column 'altitude' in m"),
    "depths for the air": (lambda: soundings().rename(columns={"pressure": "depth"}), AIR, ObservationError, r"has no levels"),
    "hPa or Pa": (
        lambda: soundings().assign(pressure=[1000.0, 850, 500, 925, 925, 300, 700]), AIR, ObservationError,
        r"obs\['pressure'\] has no units, and its values up to 1000 do not tell which. Say it: obs.attrs\['pressure'\] = {'units': 'hPa'}",
    ),
    "level without units": (
        lambda: columns_of(soundings()).pipe(lambda d: d.assign(level=d.pressure / 100).drop_vars("pressure")), AIR, ObservationError,
        r"obs\['level'\] has no units.*obs\['level'\].attrs\['units'\] = 'hPa'",
    ),
    "sea pressure without units": (
        lambda: sea().rename(columns={"depth": "pressure"}), SEA, ObservationError,
        r"obs\['pressure'\] has no units.*obs.attrs\['pressure'\] = {'units': 'dbar'}",
    ),
    "model levels": (
        lambda: columns_of(soundings()).pipe(lambda d: d.assign(pressure=d.pressure.assign_attrs(units="1"))), AIR, UnitsError,
        r"obs\['pressure'\], the levels of obs\['t'\]: Units '1' cannot be converted to 'Pa'",
    ),
    "unknown units": (
        lambda: columns_of(sea()).pipe(lambda d: d.assign(depth=d.depth.assign_attrs(units="fathons"))), SEA, UnitsError,
        r"the levels of obs\['temperature'\]: The units 'fathons' are not known",
    ),
    "two columns of levels": (
        lambda: argo().pipe(lambda d: d.assign(PRES_ADJUSTED=d.PRES).drop_vars("PSAL")), SEA, ObservationError,
        r"'PRES' and 'PRES_ADJUSTED' both could be the levels; keep one: obs.drop_vars\('PRES_ADJUSTED'\)",
    ),
    "a depth that is negative": (
        lambda: sea().assign(depth=[-5.0, -10.0, -20.0]), SEA, ObservationError,
        r"obs\['depth'\] is a depth and all its values are negative; if they count upward: obs.attrs\['depth'\] = {'units': 'm', 'positive': 'up'}",
    ),
    "a z of both signs": (
        lambda: sea().rename(columns={"depth": "z"}).assign(z=[-5.0, 0.0, 3.0]), SEA, ObservationError,
        r"obs\['z'\] has values below and above 0; say what it counts: obs.attrs\['z'\] = {'units': 'm', 'positive': 'down'}",
    ),
    "levels as text": (
        lambda: soundings().assign(pressure="500 hPa"), AIR, ObservationError, r"obs\['pressure'\] holds '500 hPa', which is no number",
    ),
    "levels along another dimension": (
        lambda: two_dimensional(soundings()).assign(pressure=("profile", [1e5, 9e4, 8e4])), AIR, ObservationError,
        r"obs\['t'\] has dimensions \('profile', 'level_index'\) and its levels obs\['pressure'\] have \('profile',\)",
    ),
    "two extra dimensions": (
        lambda: two_dimensional(soundings()).pipe(lambda d: d.assign(t=d.t.expand_dims(sensor=2))), AIR, ObservationError,
        r"has the extra dimension 'sensor' beside 'level_index'; select: obs.isel\(sensor=0\)",
    ),
    "an extra dimension without levels": (
        lambda: two_dimensional(soundings()), Wanted("t", None, "K"), ObservationError,
        r"obs\['t'\] has the extra dimension 'level_index'; select: obs.isel\(level_index=0\)",
    ),
    "counts that do not add up": (
        lambda: contiguous(soundings()).isel(obs=slice(5)), AIR, ObservationError,
        r"obs\['row_size'\] adds up to 7 and the dimension 'obs' has 5 samples; give the whole file, select afterwards",
    ),
    "no samples": (
        lambda: contiguous(soundings()).drop_dims("obs").assign(t=("profile", [280.0, 281.0, 282.0])),
        AIR,
        ObservationError,
        r"obs\['row_size'\] is the count of a ragged array along 'obs', and obs has the dimensions 'profile'; give the whole file",
    ),
    "no instances": (
        lambda: indexed(soundings()).drop_dims("station"),
        AIR,
        ObservationError,
        r"obs\['which'\] is the index of a ragged array along 'station', and obs has the dimensions 'obs'",
    ),
    "negative counts": (
        lambda: contiguous(soundings()).pipe(lambda d: d.assign(row_size=d.row_size.copy(data=[-1, 6, 2]))), AIR, ObservationError,
        r"obs\['row_size'\] adds up to 7",
    ),
    "counts that are missing": (
        lambda: contiguous(soundings()).pipe(lambda d: d.assign(row_size=d.row_size.copy(data=[np.nan, 5.0, 2.0]))), AIR, ObservationError,
        r"obs\['row_size'\] is the count of a ragged array along 'obs' and must hold whole numbers",
    ),
    "an index out of range": (
        lambda: indexed(soundings()).pipe(lambda d: d.assign(which=d.which + 1)).pipe(
            lambda d: d.assign(which=d.which.assign_attrs(instance_dimension="station"))
        ), AIR, ObservationError,
        r"obs\['which'\] points to 'station' 1 to 3, and there are 3, counted from 0",
    ),
    "an index of two dimensions": (
        lambda: indexed(soundings()).assign(which=(("obs", "x"), np.zeros((7, 1)), {"instance_dimension": "station"})), AIR,
        ObservationError, r"obs\['which'\] is the index of a ragged array and has dimensions \('obs', 'x'\); one is needed",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "wanted", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_profiles_that_are_refused(make: Callable[[], object], wanted: Wanted, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_observations(make(), [wanted], 1.0)  # type: ignore[arg-type]


def test_the_line_to_type_works() -> None:
    frame = soundings().assign(pressure=[1000.0, 850, 500, 925, 925, 300, 700])
    with pytest.raises(ObservationError) as problem:
        read_observations(frame, [AIR], 1.0)
    line = re.search(r"Say it: obs(.*)", str(problem.value))
    assert line is not None
    exec(f"frame{line[1]}", {"frame": frame})
    assert read_observations(frame, [AIR], 1.0).level == pytest.approx(frame.pressure.to_numpy() * 100)


def test_levels_are_reported() -> None:
    state = xr.Dataset(
        {"t2m": (("latitude", "longitude"), np.full((3, 3), 280.0), {"units": "K"})},
        coords={"latitude": [40.0, 45.0, 50.0], "longitude": [0.0, 5.0, 10.0]},
    )
    departures = xgenda.innovations(
        state, pd.DataFrame({"latitude": [44.0], "longitude": [4.0], "t2m": [281.0], "pressure": [900.0]}), error=1.0
    )
    assert "level" not in departures.coords  # a pressure beside a variable without levels says nothing

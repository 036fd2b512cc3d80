"""Simulated networks against geometry, and a whole simulated experiment."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import xgenda
from xgenda.errors import CoordinateError, ObservationError, OptionError
from xgenda.grids import EARTH_RADIUS
from xgenda.observations.networks import ground_track, network_of, polar_swath, random_stations, sample
from xgenda.spherical import great_circle, unit_vectors


def test_stations_are_as_dense_at_the_poles_as_elsewhere() -> None:
    places = random_stations(40000, np.random.default_rng(0))
    share = [float((np.abs(places.latitude) < bound).mean()) for bound in (30.0, 60.0, 80.0)]
    assert share == pytest.approx(np.sin(np.radians([30, 60, 80])), abs=0.01)
    assert np.histogram(places.longitude, np.linspace(-180, 180, 9))[0] / 5000 == pytest.approx(np.ones(8), abs=0.07)
    part = random_stations(500, np.random.default_rng(0), latitude=(40, 50), longitude=(170, 200))
    assert 40 <= float(part.latitude.min()) < float(part.latitude.max()) <= 50
    assert (((part.longitude - 170) % 360) <= 30).all()


def test_the_ground_track_is_that_of_a_circular_orbit() -> None:
    period = 6072.0
    lat, lon = ground_track(np.array([0.0, period / 4, period / 2, 3 * period / 4, period]), inclination=98.7, node=20.0)
    assert lat == pytest.approx([0.0, 81.3, 0.0, -81.3, 0.0], abs=1e-9)
    turn = 360 * period / 86164.1
    assert [lon[0], lon[4]] == pytest.approx([20.0, 20.0 - turn], abs=1e-3)
    assert (lon[2] - (20.0 + 180.0 - turn / 2) + 180) % 360 - 180 == pytest.approx(0.0, abs=1e-3)
    equator, _ = ground_track(np.linspace(0, period, 7), inclination=0.0)
    assert equator == pytest.approx(np.zeros(7), abs=1e-12)


def test_a_swath_is_as_wide_as_asked_and_lies_across_the_track() -> None:
    swath = polar_swath("2020-01-01T10:00", "101min", width=1400e3, pixels=15, every=60.0)
    assert dict(swath.sizes) == {"scan": 101, "pixel": 15}
    points = unit_vectors(swath.latitude.values, swath.longitude.values)
    assert great_circle(points[:, 0], points[:, -1]) * EARTH_RADIUS == pytest.approx(np.full(101, 1400e3), rel=1e-6)
    lat, lon = ground_track(np.arange(101) * 60.0)
    assert great_circle(points[:, 7], unit_vectors(lat, lon)).max() < 1e-9
    ahead = unit_vectors(*ground_track(np.arange(101) * 60.0 + 1.0)) - unit_vectors(lat, lon)
    across = points[:, 14] - points[:, 0]
    cosine = (ahead * across).sum(-1) / np.linalg.norm(ahead, axis=-1) / np.linalg.norm(across, axis=-1)
    assert np.abs(cosine).max() < 1e-3
    assert swath.time.values[1] - swath.time.values[0] == np.timedelta64(60, "s")


def test_a_simulated_experiment() -> None:
    lat, lon = np.linspace(30, 60, 31), np.linspace(-20, 20, 41)
    y, x = np.meshgrid(lat, lon, indexing="ij")
    time = np.array(["2020-01-01T00", "2020-01-01T12"], "M8[ns]")
    fields = np.stack([280 + 0.3 * y + 0.1 * x, 290 + 0.3 * y])
    truth = xr.Dataset(
        {"t2m": (("time", "latitude", "longitude"), fields, {"units": "K"})},
        coords={"time": time, "latitude": lat, "longitude": lon},
    )
    rng = np.random.default_rng(1)
    stations = random_stations(300, rng, latitude=(31, 59), longitude=(-19, 19))
    stations = stations.assign_coords(time=("obs", time[rng.integers(0, 2, 300)]))
    obs = sample(truth, stations, {"t2m": 0.5}, rng)
    expected = np.where(
        stations.time.values == time[0], 280 + 0.3 * stations.latitude + 0.1 * stations.longitude, 290 + 0.3 * stations.latitude
    )
    assert float((obs.t2m - expected).std()) == pytest.approx(0.5, rel=0.1)
    assert obs.t2m.attrs == {"units": "K"}
    assert (obs.t2m_error == 0.5).all()
    found = xgenda.innovations(truth, obs)
    assert float(found.innovation.std()) == pytest.approx(0.5, rel=0.1)
    swath = polar_swath("2020-01-01T11:50", "25min", node=10.0)
    seen = sample(truth.isel(time=1), swath, {"t2m": 0.2}, rng)
    there = np.isfinite(seen.t2m.values)
    assert 0.02 < there.mean() < 0.6
    assert np.abs(seen.t2m.values - (290 + 0.3 * swath.latitude.values))[there].max() < 1.2
    departures = xgenda.innovations(truth, seen, window="2h")
    assert len(departures.obs) == there.sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: random_stations(0, rng), "count=0 is not accepted"),
        (
            lambda rng: random_stations(5, rng, latitude=(50, 40)),
            r"latitude=\(50, 40\) is not accepted; give two ascending bounds",
        ),
        (lambda rng: random_stations(5, rng, longitude=(0, 400)), "at most 360 degrees apart"),
        (lambda rng: polar_swath("2020", "0s"), "must be positive, and the swath less than half the globe"),
        (lambda rng: polar_swath("2020", "1min", pixels=0), "pixels=0 is not accepted"),
    ],
)
def test_what_is_no_network(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError, match=message):
        call(np.random.default_rng(0))


def test_the_network_of_one_date_sees_the_fields_of_another() -> None:
    times = pd.to_datetime(["1916-03-13T06", "1916-03-12T18", "1916-03-11T00", "1916-03-12T06"])
    table = pd.DataFrame(
        {"lat": [50.0, 45.0, 40.0, 35.0], "lon": [0.0, 10.0, -10.0, 5.0], "time": times, "mslp": [1e5, 9.8e4, 1.1e5, 1e5]}
    )
    moved = network_of(table, period=slice("1916-03-12", "1916-03-13"), to="2016-03-12")
    assert (
        moved.time.values.tolist()
        == pd.to_datetime(["2016-03-13T06", "2016-03-12T18", "2016-03-12T06"]).as_unit("ns").values.tolist()
    )
    assert moved.latitude.values.tolist() == [50.0, 45.0, 35.0]
    assert not moved.data_vars
    assert moved.longitude.attrs["standard_name"] == "longitude"
    whole = network_of(table, to="2016-01-01T12")
    assert whole.time.values[2] == np.datetime64("2016-01-01T12")
    assert np.diff(whole.time.values).tolist() == np.diff(times.as_unit("ns").values).tolist()
    anywhen = network_of(table.rename(columns={"lat": "latitude"}))
    assert "time" not in anywhen.coords
    coords = {
        "time": pd.date_range("2016-03-12", periods=3),
        "latitude": np.linspace(30, 60, 4),
        "longitude": np.linspace(-20, 20, 5),
    }
    values = np.arange(3)[:, None, None] * np.ones((3, 4, 5))
    truth = xr.Dataset({"mslp": (("time", "latitude", "longitude"), values, {"units": "Pa"})}, coords)
    seen = sample(truth, moved, {"mslp": 1e-9}, np.random.default_rng(0))
    np.testing.assert_allclose(seen.mslp, [1.0, 1.0, 0.0], atol=1e-6)  # the nearest day of each


def test_a_network_keeps_what_describes_its_stations_and_its_calendar() -> None:
    stations = xgenda.tutorial.open_dataset("europe-synop")
    moved = network_of(stations.isel(obs=slice(3, 9)), to="1916-02-29T12")
    np.testing.assert_array_equal(moved.height, stations.height[3:9])
    np.testing.assert_array_equal(moved.station_id, stations.station_id[3:9])
    assert str(moved.time.values[0])[:13] == "1916-02-29T12"
    annual = xgenda.tutorial.open_dataset("a1b-north-america").time[:2]  # of 360 days
    table = xr.Dataset(
        coords={"latitude": ("obs", [20.0, 30.0]), "longitude": ("obs", [240.0, 250.0]), "time": ("obs", annual.values)}
    )
    late = network_of(table, to="2050-06-01").time.values
    assert [t.year for t in late] == [2050, 2051]
    assert late[0].calendar == "360_day"


def test_times_of_a_zone_are_read_in_utc() -> None:
    table = pd.DataFrame(
        {"latitude": 50.0, "longitude": [0.0, 1.0, 2.0], "time": pd.date_range("1916-03-12", periods=3, freq="6h")}
    )
    zoned = table.assign(time=table.time.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"))
    for options in ({"to": "2016-03-12"}, {"period": slice("1916-03-12T06", "1916-03-12T12"), "to": "2016-03-12T06"}):
        assert network_of(zoned, **options).identical(network_of(table, **options))
    named = table.set_index("time", drop=False)
    assert network_of(named, to="2016-03-12").identical(network_of(table, to="2016-03-12"))
    assert network_of(table.assign(time="12:00")).identical(network_of(table))  # where it is not asked for
    with pytest.raises(
        ObservationError, match=r"obs: time holds str such as '1916.*pandas.to_datetime\(obs\['time'\], utc=True\)"
    ):
        network_of(table.assign(time=table.time.astype(str)), to="2016-03-12")


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda t: t.drop_vars("time"), {"to": "2000-01-01"}, OptionError, "no time for each observation"),
        (lambda t: t, {"period": slice("1800", "1801")}, OptionError, "holds none of the 1215 observations"),
        (lambda t: t, {"period": slice("yesterday", None)}, OptionError, "period=.* is not accepted"),
        (lambda t: t, {"to": "the past"}, OptionError, "to='the past' cannot be reached"),
        (lambda t: t.drop_vars("latitude"), {}, CoordinateError, "latitude and longitude along one dimension"),
        (lambda t: xgenda.tutorial.open_dataset("europe-t2m-forecast"), {}, CoordinateError, "latitude and longitude along one dimension"),
    ],
)  # fmt: skip
def test_what_is_no_network_is_refused(change, options, error, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        network_of(change(xgenda.tutorial.open_dataset("europe-synop")), **options)

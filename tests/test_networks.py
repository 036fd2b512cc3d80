"""Simulated networks against geometry, and a whole simulated experiment."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import xgenda
from xgenda.errors import OptionError
from xgenda.grids import EARTH_RADIUS
from xgenda.observations.networks import ground_track, polar_swath, random_stations, sample
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

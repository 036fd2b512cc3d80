"""What is standardised comes back, and a climatology is what was put in."""

from __future__ import annotations

import cftime
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from xgenda.errors import OptionError, StateError
from xgenda.models.fitting import choose_climatology
from xgenda.scaling import CYCLES, Scaling, cycle_basis, fit_scaling

CALENDARS = ("standard", "noleap", "360_day", "proleptic_gregorian", "all_leap")


def times(calendar: str, count: int = 120, freq: str = "5D") -> xr.DataArray:
    cf = calendar not in ("standard", "proleptic_gregorian")
    stamps = xr.date_range("1999-01-01T03:00", periods=count, freq=freq, calendar=calendar, use_cftime=cf)
    return xr.DataArray(stamps, dims="time", name="time")


def fields(count: int = 120, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, size=(count, 2, 3, 4)) * np.array([1.0, 50.0])[:, None, None]


@pytest.mark.parametrize("calendar", CALENDARS)
@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("transform", ["none", "log", {"b": "log"}])
@pytest.mark.parametrize("pointwise", [False, True])
def test_round_trip(calendar: str, cycle: str, transform, pointwise: bool) -> None:
    time, values = times(calendar), fields()
    scaling = fit_scaling(values, time, ["a", "b"], cycle=cycle, transform=transform, pointwise_std=pointwise)
    basis = cycle_basis(time, cycle, len(values))
    z = scaling.forward(values, basis)
    assert scaling.inverse(z, basis) == pytest.approx(values, rel=1e-9)
    assert z.mean(0) == pytest.approx(np.zeros(values.shape[1:]), abs=1e-9)
    axes = (0,) if pointwise else (0, 2, 3)
    assert (z**2).mean(axes) == pytest.approx(np.ones_like((z**2).mean(axes)))
    assert scaling.is_affine == (transform == "none")
    again = Scaling.from_dict(scaling.to_dict(), scaling.mean, scaling.std)
    assert np.array_equal(again.forward(values, basis), z)
    values[0, 0] = 12.0  # nothing is changed in place
    assert not np.array_equal(again.forward(values, basis), z)


@pytest.mark.parametrize(
    ("calendar", "year"), [("360_day", 360.0), ("noleap", 365.0), ("all_leap", 366.0), ("standard", 365.2425)]
)
def test_a_seasonal_cycle_is_found(calendar: str, year: float) -> None:
    time = times(calendar, 400, "3D")
    phase = 2 * np.pi * ((time.dt.dayofyear.values - 1) + 3 / 24) / year
    values = (280 + 10 * np.cos(phase) + 2 * np.sin(2 * phase))[:, None, None, None] + 0.1 * fields(400)[:, :1]
    scaling = fit_scaling(values, time, ["t"], cycle="dayofyear")
    assert scaling.mean.shape == (5, 1, 3, 4)
    assert scaling.mean[1:, 0].mean((1, 2)) == pytest.approx([10, 0, 0, 2], abs=0.02)  # cos, sin, cos 2, sin 2
    assert scaling.std.item() == pytest.approx(0.1 * np.sqrt(2), rel=0.05)
    new = times(calendar, 1)
    expected = 280.2 + 10 * np.cos(2 * np.pi * 0.125 / year) + 2 * np.sin(4 * np.pi * 0.125 / year)
    assert scaling.climatology(cycle_basis(new, "dayofyear")).mean() == pytest.approx(expected, abs=0.05)


def test_a_daily_cycle_is_found() -> None:
    time = times("standard", 240, "3h")
    values = np.sin(2 * np.pi * time.dt.hour.values / 24)[:, None, None, None] * 4 + 0.1 * fields(240)[:, :1]
    scaling = fit_scaling(values, time, ["t"], cycle="hour")
    assert scaling.mean[1:, 0].mean((1, 2)) == pytest.approx([0, 4, 0, 0], abs=0.03)


@pytest.mark.parametrize(
    ("step", "cycle"), [("24h", "hour"), ("24h", "dayofyear+hour"), ("12h", "hour"), ("12h", "dayofyear+hour")]
)
def test_hours_that_were_never_seen_have_what_the_others_say(step: str, cycle: str) -> None:
    """Of fields that are all of one hour the cycle of the day is nothing; of two hours it is half their difference, and nothing in between."""
    rng, midnight = np.random.default_rng(0), np.timedelta64(3, "h")
    time = times("standard", 800, step) - midnight
    day = np.cos(2 * np.pi * time.dt.hour.values / 24)[:, None, None, None]
    values = 280 + 3 * day + 0.1 * rng.standard_normal((800, 1, 3, 4))
    scaling = fit_scaling(values, time, ["t"], cycle=cycle)
    found = scaling.climatology(cycle_basis(times("standard", 8, "3h") - midnight, cycle)).mean((1, 2, 3))
    day = 2 * np.pi * np.arange(8) / 8
    expected = 283 + 0 * day if step == "24h" else 280 + 3 * np.cos(day)
    assert found == pytest.approx(expected, abs=0.05)
    assert scaling.std.item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(("step", "cycle"), [("24h", "none"), ("12h", "hour"), ("6h", "hour")])
def test_a_cycle_is_chosen_where_the_times_tell_of_it(step: str, cycle: str) -> None:
    time = times("standard", 240, step) - np.timedelta64(3, "h")
    z = np.cos(2 * np.pi * time.dt.hour.values / 24)[:, None] + 0.3 * np.random.default_rng(0).standard_normal((240, 12))
    assert choose_climatology(z - z.mean(0), time, np.arange(240) // 80) == cycle


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 28), st.integers(0, 23))
def test_the_same_date_has_the_same_basis_in_like_calendars(month: int, day: int, hour: int) -> None:
    one = xr.DataArray([cftime.DatetimeProlepticGregorian(2001, month, day, hour)], dims="time", name="time")
    other = xr.DataArray(np.array([f"2001-{month:02d}-{day:02d}T{hour:02d}"], dtype="datetime64[ns]"), dims="time", name="time")
    for cycle in CYCLES:
        assert cycle_basis(one, cycle) == pytest.approx(cycle_basis(other, cycle), abs=1e-12)
        assert cycle_basis(other.isel(time=0), cycle) == pytest.approx(cycle_basis(other, cycle))


@pytest.mark.parametrize("value", [0.0, 0.1, 280.0, 1e-14, -5e8])
def test_a_constant_field_is_refused(value: float) -> None:
    values = fields()
    values[:, 1] = value
    with pytest.raises(StateError, match=r"ds\['b'\] does not vary, so it cannot be standardised; drop it: ds.drop_vars\('b'\)"):
        fit_scaling(values, None, ["a", "b"])


def test_one_constant_cell_is_refused_where_each_cell_has_its_own_std() -> None:
    values = fields()
    values[:, 0, 1, 2] = 3.0
    fit_scaling(values, None, ["a", "b"])
    with pytest.raises(StateError, match=r"ds\['a'\] does not vary"):
        fit_scaling(values, None, ["a", "b"], pointwise_std=True)


def test_a_variable_of_small_numbers_varies() -> None:
    values = 1e-14 * fields()  # a mixing ratio
    scaling = fit_scaling(values, None, ["a", "b"])
    z = scaling.forward(values, np.ones((120, 1)))
    assert z.std() == pytest.approx(1.0)


def test_the_logarithm_needs_positive_values() -> None:
    values = fields()
    values[3, 1, 0, 0] = -0.5
    with pytest.raises(StateError, match=r"'b' is to be scaled by log.* and holds -0.5. Clip it: ds.'b'..clip\(min=0\)"):
        fit_scaling(values, None, ["a", "b"], transform={"b": "log"})
    scaling = fit_scaling(values, None, ["a", "b"], transform={"b": "log"}, offset={"b": 1.0})
    assert scaling.offsets == (1e-3, 1.0)
    basis = np.ones((120, 1))
    assert scaling.inverse(scaling.forward(values, basis), basis) == pytest.approx(values)


def test_options_that_are_refused() -> None:
    with pytest.raises(OptionError, match=r"climatology='monthly' is not accepted; choose one of 'none', 'dayofyear', 'hour'"):
        fit_scaling(fields(), None, ["a", "b"], cycle="monthly")
    with pytest.raises(OptionError, match=r"climatology='dayofyear' needs a time coordinate"):
        fit_scaling(fields(), None, ["a", "b"], cycle="dayofyear")
    with pytest.raises(OptionError, match=r"transform='sqrt' is not accepted; choose one of 'none', 'log'"):
        fit_scaling(fields(), None, ["a", "b"], transform="sqrt")
    with pytest.raises(StateError, match=r"9 times are too few to fit climatology='dayofyear' \(5 coefficients\)"):
        fit_scaling(fields(9), times("standard", 9), ["a", "b"], cycle="dayofyear")

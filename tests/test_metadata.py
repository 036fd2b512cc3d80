"""Coordinates are found through CF, units are converted, fill values are refused, and metadata come through to the files."""

from __future__ import annotations

from pathlib import Path

import cftime
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import xgenda
from xgenda import metadata
from xgenda.errors import CoordinateError, OptionError, StateError, UnitsError


def field(latitude: str = "latitude", longitude: str = "longitude", attrs: dict[str, dict[str, str]] | None = None) -> xr.Dataset:
    attrs = attrs or {}
    coords = {
        latitude: (latitude, [10.0, 20.0], attrs.get("latitude", {})),
        longitude: (longitude, [0.0, 5.0, 10.0], attrs.get("longitude", {})),
    }
    return xr.Dataset({"t": ((latitude, longitude), np.ones((2, 3)))}, coords=coords)


# -- finding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latitude", "longitude", "attrs"),
    [
        ("latitude", "longitude", {}),
        ("lat", "lon", {}),
        ("nav_lat", "nav_lon", {}),
        ("phi", "lam", {"latitude": {"standard_name": "latitude"}, "longitude": {"standard_name": "longitude"}}),
        ("phi", "lam", {"latitude": {"units": "degrees_north"}, "longitude": {"units": "degrees_east"}}),
        # attributes win over names
        ("lon", "lat", {"latitude": {"standard_name": "latitude"}, "longitude": {"standard_name": "longitude"}}),
    ],
)
def test_coordinates_are_found(latitude: str, longitude: str, attrs: dict) -> None:
    layout = metadata.find_layout(field(latitude, longitude, attrs))
    assert (layout.latitude, layout.longitude, layout.time, layout.member) == (latitude, longitude, None, None)


def test_time_and_member_are_found() -> None:
    ds = field().expand_dims(valid_time=pd.date_range("2000", periods=2), run=3)
    assert metadata.find_layout(ds).time == "valid_time"
    assert metadata.find_layout(ds).member is None
    named = ds.assign_coords(run=("run", range(3), {"standard_name": "realization"}))
    assert metadata.find_layout(named).member == "run"
    for name in metadata.MEMBER_NAMES:
        assert metadata.find_layout(ds.rename(run=name)).member == name
    assert metadata.find_layout(ds.isel(valid_time=0)).time == "valid_time"  # a scalar counts


def test_a_dimension_wins_over_another_coordinate_of_that_kind() -> None:
    ds = field(attrs={"latitude": {"standard_name": "latitude"}}).assign_coords(
        lat2d=(("latitude", "longitude"), np.ones((2, 3)), {"standard_name": "latitude"})
    )
    assert metadata.find_layout(ds).latitude == "latitude"


@pytest.mark.parametrize(
    ("ds", "message"),
    [
        (field("a", "longitude"), r"ds has no latitude coordinate \(found: a, longitude\).*standard_name'\] = 'latitude'"),
        (field("latitude", "b"), r"ds has no longitude coordinate"),
        (field().isel(latitude=0), r"latitude coordinate 'latitude' is a scalar.*ds.expand_dims\('latitude'\)"),
        (field().assign_coords(latitude=[10.0, np.nan]), r"latitude coordinate 'latitude' holds values that are not finite"),
        (field().assign_coords(longitude=["a", "b", "c"]), r"longitude coordinate 'longitude' holds values that are not finite"),
        (
            field("y", "x").assign_coords(latitude=(("y", "x"), np.ones((2, 3))), longitude=(("y", "x"), np.ones((2, 3)))),
            r"latitude coordinate 'latitude' has dimensions \('y', 'x'\); this works on grids with one-dimensional",
        ),
    ],
)
def test_a_coordinate_that_is_missing_or_unusable(ds: xr.Dataset, message: str) -> None:
    with pytest.raises(CoordinateError, match=message):
        metadata.find_layout(ds)


def test_two_candidates_are_refused() -> None:
    attrs = {"standard_name": "latitude"}
    ds = xr.Dataset(coords={"a": ("x", [1.0], attrs), "b": ("x", [1.0], attrs), "longitude": ("x", [1.0])})
    with pytest.raises(CoordinateError, match=r"Several coordinates look like latitude: 'a', 'b'. Keep one: ds.drop_vars\('b'\)"):
        metadata.find_layout(ds)


def test_variables_by_name_then_by_standard_name() -> None:
    ds = xr.Dataset({"t2m": ("x", [1.0]), "other": ("x", [1.0], {"standard_name": "air_temperature"})})
    assert metadata.match_variable(ds, "t2m", "air_temperature") == "t2m"
    assert metadata.match_variable(ds, "tas", "air_temperature") == "other"
    message = r"lacks the variable 't2'; it has 't2m', 'other'. Did you mean 't2m'\? Rename yours: ds.rename\({'t2m': 't2'}\)"
    with pytest.raises(OptionError, match=message):
        metadata.match_variable(ds, "t2", None)
    twice = ds.assign(third=ds.other)
    with pytest.raises(
        OptionError, match=r"'other', 'third' all have standard_name 'air_temperature'.*Keep one: ds.drop_vars\('third'\)"
    ):
        metadata.match_variable(twice, "tas", "air_temperature")


def test_only_fields_are_data_variables() -> None:
    ds = field().assign(crs=0, bounds=("latitude", [1.0, 2.0]), label=(("latitude", "longitude"), [["a"] * 3] * 2))
    assert metadata.data_variables(ds, metadata.find_layout(ds)) == ["t"]


# -- units -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "wanted", "value", "expected"),
    [
        ("degC", "K", 10.0, 283.15),
        ("celsius", "K", -40.0, 233.15),
        ("K", "degC", 0.0, -273.15),
        ("degF", "degC", 212.0, 100.0),
        ("hPa", "Pa", 1013.25, 101325.0),
        ("mbar", "hPa", 5.0, 5.0),
        ("%", "1", 50.0, 0.5),
        ("m s-1", "km h-1", 10.0, 36.0),
        ("kg m-2 s-1", "kg m-2 day-1", 1.0, 86400.0),
        ("m**2 s**-2", "m2 s-2", 7.0, 7.0),
        ("1e-3", "psu", 35.0, 35.0),
        ("psu", "g kg-1", 35.0, 35.0),
        ("1e-3", "1", 35.0, 0.035),
    ],
)
def test_conversion(found: str, wanted: str, value: float, expected: float) -> None:
    scale, offset = metadata.unit_factors(found, wanted)
    assert scale * value + offset == pytest.approx(expected, rel=1e-12)
    back, shift = metadata.unit_factors(wanted, found)
    assert back * expected + shift == pytest.approx(value, abs=1e-9)


def test_unknown_and_incompatible_units() -> None:
    with pytest.raises(UnitsError, match=r"The units 'kelvins_of_old' are not known; use UDUNITS spelling, for example 'K'"):
        metadata.unit_factors("kelvins_of_old", "K")
    with pytest.raises(UnitsError, match=r"Units 'm' cannot be converted to 'K'.*set the true ones: .*attrs\['units'\] = 'K'"):
        metadata.unit_factors("m", "K")


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
def test_an_array_is_converted_whatever_its_type(dtype: str) -> None:
    array = xr.DataArray(np.array([0, 10, -5], dtype=dtype), dims="x", attrs={"units": "degC", "long_name": "temperature"})
    out = metadata.convert_units(array, "K")
    assert out.values == pytest.approx([273.15, 283.15, 268.15], rel=1e-6)
    assert out.attrs == {"units": "K", "long_name": "temperature"}
    assert array.attrs["units"] == "degC"
    if dtype != "int16":
        assert out.dtype == dtype


def test_conversion_is_lazy(no_compute: None) -> None:
    array = xr.DataArray(np.zeros(4), dims="x", attrs={"units": "degC"}).chunk(x=2)
    assert metadata.convert_units(array, "K").chunks == ((2, 2),)


def test_an_array_without_units_is_taken_as_it_is() -> None:
    array = xr.DataArray([1.0], dims="x")
    assert metadata.convert_units(array, "K") is array


# -- values ------------------------------------------------------------------------------------------------------------


def around(value: float, dtype: str = "float32") -> np.ndarray:
    values = np.linspace(270, 290, 200).reshape(10, 20).astype(dtype)
    values[3, 4] = values[5, 6] = value
    return values


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"ds\['t'\] holds NaN in 2 of 200 cells \(1 %\), first at index \(3, 4\). Fill or crop them first: ds.fillna"),
        (np.inf, r"ds\['t'\] holds infinity in 2 of 200 cells \(1 %\), first at index \(3, 4\)"),
        (-np.inf, r"holds infinity"),
        *(
            (
                v,
                rf"holds {float(np.float32(v)):.6g} in 2 of 200 cells \(1 %\), which looks like a fill value. Mask".replace(
                    "+", r"\+"
                ),
            )
            for v in metadata.SENTINELS
        ),
        (3.4e38, r"which looks like a fill value"),
        (-1e30, r"which looks like a fill value"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_that_cannot_be_used(value: float, message: str, dtype: str) -> None:
    with pytest.raises(StateError, match=message):
        metadata.check_values(around(value, dtype), "t")


def test_integers_hold_fill_values_too() -> None:
    with pytest.raises(StateError, match="holds -9999 in 2 of 200"):
        metadata.check_values(around(-9999, "int16"), "t", where=" at 2000-01-01")


def test_a_physical_value_that_equals_a_sentinel_is_none() -> None:
    pressure = np.linspace(98000.0, 103000.0, 5001)  # in steps of 1 Pa: holds 99999 Pa
    assert 99999.0 in pressure
    metadata.check_values(pressure, "mslp")
    metadata.check_values(np.arange(9000.0, 11000.0), "z")
    metadata.check_values(np.zeros((0, 3)), "empty")
    both = np.append(pressure, -9999.0)
    assert np.flatnonzero(metadata.find_fill_values(both)).tolist() == [5001]
    assert metadata.find_fill_values(np.full(3, -9999.0)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda ds: ds.expand_dims(level=3),
            CoordinateError,
            r"ds\['t'\] has the extra dimension 'level' of size 3.*ds.isel\(level=0\)",
        ),
        (lambda ds: ds.isel(longitude=0), CoordinateError, r"ds\['t'\] has dimensions \('latitude',\) and lacks 'longitude'"),
        (lambda ds: ds.astype(complex), StateError, r"ds\['t'\] has dtype complex128; real numbers are needed: ds\['t'\].astype"),
        (lambda ds: ds.astype(object), StateError, r"ds\['t'\] has dtype object"),
        (
            lambda ds: ds.assign(t=ds.t.astype("int16").assign_attrs(scale_factor=0.1)),
            StateError,
            r"still carries scale_factor.*mask_and_scale=True",
        ),
    ],
)
def test_dimensions_and_types_that_cannot_be_used(change, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        metadata.check_dims(change(field()), ["t"], metadata.find_layout(field()))


# -- times -------------------------------------------------------------------------------------------------------------


def stamps(values: object) -> xr.DataArray:
    return xr.DataArray(values, dims="time", name="time")


def test_labels_do_not_depend_on_the_unit() -> None:
    days = np.array(["2018-11-20T12", "1999-01-01T00"], dtype="datetime64[h]")
    labels = [metadata.time_labels(stamps(days.astype(f"datetime64[{unit}]"))) for unit in ("s", "ms", "us", "ns")]
    for other in labels[1:]:
        assert np.array_equal(labels[0], other)
    assert labels[0][0] == "2018-11-20T12:00:00.000000000"
    assert np.array_equal(metadata.time_labels(stamps(days.astype("datetime64[ns]")).isel(time=0)), labels[0][:1])


def test_labels_beyond_the_range_of_nanoseconds_do_not_overflow() -> None:
    labels = metadata.time_labels(stamps(np.array(["3000-01-01", "1200-06-01"], dtype="datetime64[s]")))
    assert [label[:10] for label in labels] == ["3000-01-01", "1200-06-01"]


def test_labels_of_climate_calendars() -> None:
    of = {
        c: metadata.time_labels(stamps([cftime.datetime(1900, 2, 28, 6, calendar=c)]))[0]
        for c in ("360_day", "noleap", "standard")
    }
    assert of["360_day"] == "1900-02-28T06:00:00[360_day]"
    assert of["standard"] == metadata.time_labels(stamps(np.array(["1900-02-28T06"], "datetime64[ns]")))[0]  # the same members
    assert len(set(of.values())) == 3
    thirtieth = metadata.time_labels(stamps([cftime.Datetime360Day(1900, 2, 30)]))
    assert thirtieth[0].startswith("1900-02-30")


def test_labels_without_time() -> None:
    assert metadata.time_labels(None, 3).tolist() == ["#0", "#1", "#2"]


def test_times_that_cannot_be_used() -> None:
    with pytest.raises(CoordinateError, match=r"'time' holds NaT. Drop those: ds.dropna\('time'\)"):
        metadata.time_labels(stamps(np.array(["2000-01-01", "NaT"], dtype="datetime64[ns]")))
    with pytest.raises(CoordinateError, match=r"'time' has dtype float64; decode it: xarray.decode_cf\(ds\)"):
        metadata.time_labels(stamps([0.0, 1.0]))
    with pytest.raises(CoordinateError, match=r"ds holds the time 2000-01-01T.* more than once.*ds.drop_duplicates\('time'\)"):
        metadata.check_unique_times(metadata.time_labels(stamps(np.array(["2000-01-01"] * 2, dtype="datetime64[ns]"))))


# -- what comes through to the result ----------------------------------------------------------------------------------


@pytest.fixture
def analysis(background: xr.Dataset, stations: pd.DataFrame, prior) -> xr.Dataset:
    background["t2m"].encoding = {
        "zlib": True,
        "complevel": 4,
        "_FillValue": np.float32(-32767.0),
        "dtype": "int16",
        "scale_factor": 0.1,
    }
    background["time"].encoding = {"units": "hours since 1900-01-01", "calendar": "gregorian", "dtype": "int64"}
    background["crs"] = ((), 0, {"grid_mapping_name": "latitude_longitude"})
    background["t2m"].attrs["grid_mapping"] = "crs"
    return xgenda.assimilate(background, stations, model=prior, members=3, seed=5)


def test_attributes_and_encoding(analysis: xr.Dataset, background: xr.Dataset) -> None:
    assert analysis.t2m.attrs == background.t2m.attrs
    assert analysis.latitude.attrs == background.latitude.attrs
    assert analysis.crs.attrs == {"grid_mapping_name": "latitude_longitude"}
    assert analysis.attrs["title"] == "a test"
    first, line = analysis.attrs["history"].split("\n")
    assert first == "2018-11-20: made"
    assert line.endswith("assimilate(model='gaussian-exponential', members=3, seed=5, guidance='exact', sampler='exact')")
    assert f"xgenda {xgenda.__version__}" in line
    assert analysis.attrs["xgenda_seed"] == 5
    assert len(analysis.attrs["xgenda_model_sha256"]) == 64
    assert analysis.t2m.encoding == {"zlib": True, "complevel": 4, "_FillValue": -32767.0}  # the packing does not fit a new range
    assert analysis.time.encoding == {"units": "hours since 1900-01-01", "calendar": "gregorian", "dtype": "int64"}
    assert analysis.member.attrs["standard_name"] == "realization"
    assert background.attrs == {"title": "a test", "history": "2018-11-20: made"}
    assert analysis.t2m.dims == ("member", "time", "latitude", "longitude")


def test_a_drawn_seed_is_recorded(background: xr.Dataset, stations: pd.DataFrame, prior) -> None:
    one = xgenda.assimilate(background, stations, model=prior, members=2)
    again = xgenda.assimilate(background, stations, model=prior, members=2, seed=one.attrs["xgenda_seed"])
    xr.testing.assert_equal(one, again)


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_a_result_survives_a_round_trip(analysis: xr.Dataset, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"analysis.{suffix}"
    if suffix == "nc":
        analysis.to_netcdf(path)
    else:
        analysis.to_zarr(path, consolidated=False, zarr_format=2)
    with xr.open_dataset(
        path, engine="netcdf4" if suffix == "nc" else "zarr", **({} if suffix == "nc" else {"consolidated": False})
    ) as ds:
        copy = ds.load()
    xr.testing.assert_equal(copy, analysis)
    assert copy.attrs == analysis.attrs
    for name in (*analysis.data_vars, "latitude", "longitude", "time", "member"):
        missing = {k: v for k, v in analysis[name].attrs.items() if copy[name].attrs.get(k) != v and k != "grid_mapping"}
        assert not missing, name
    assert copy.t2m.encoding["_FillValue"] == -32767.0
    assert copy.time.encoding["units"].startswith("hours since 1900-01-01")
    if suffix == "nc":
        assert copy.t2m.encoding["zlib"]
        assert copy.t2m.encoding["complevel"] == 4


def test_the_result_of_a_climate_calendar(climate: xr.Dataset, tmp_path: Path) -> None:
    prior = xgenda.gaussian_prior(climate, length_scale=500e3, std=1.0)
    obs = climate.isel(time=[0], latitude=[2], longitude=[3])
    analysis = xgenda.assimilate(climate.isel(time=[0, 1]), obs, model=prior, error=0.5, members=2, seed=0, window="2D")
    analysis.to_netcdf(tmp_path / "a.nc")
    with xr.open_dataset(tmp_path / "a.nc", decode_coords="all") as copy:
        assert copy.time.values[0] == cftime.Datetime360Day(1860, 6, 1)
        assert copy.time_bnds.equals(climate.time_bnds.isel(time=[0, 1]))
        xr.testing.assert_equal(copy.air_temperature.variable, analysis.air_temperature.variable)


def test_a_lazy_result_with_time_bounds_is_written_to_zarr(tiny_downscaler, climate: xr.Dataset, tmp_path) -> None:
    """Chunked time coordinates keep units and dtype together, without which zarr refuses them."""
    lazy = climate.isel(time=slice(0, 3)).coarsen(latitude=4, longitude=4).mean().chunk(time=1)
    fine = lazy.genda.downscale(model=tiny_downscaler, members=2, seed=0, steps=4)
    fine.to_zarr(tmp_path / "fine.zarr", consolidated=False)
    again = xr.open_zarr(tmp_path / "fine.zarr", consolidated=False)
    assert np.array_equal(again.air_temperature, fine.air_temperature)
    assert again.time.equals(fine.time)


def test_practical_salinity_in_its_canonical_unit() -> None:
    """CF gives sea_water_practical_salinity the unit 1, with values of about 35; other ratios of unit 1 are not in thousandths."""
    practical = xr.DataArray([35.0], attrs={"units": "1", "standard_name": "sea_water_practical_salinity"})
    assert metadata.unit_factors_of(practical, "1e-3") == pytest.approx((1.0, 0.0))
    assert metadata.convert_units(practical, "psu").item() == 35.0
    other = practical.assign_attrs(standard_name="sea_water_salinity")
    assert metadata.unit_factors_of(other, "1e-3") == pytest.approx((1000.0, 0.0))

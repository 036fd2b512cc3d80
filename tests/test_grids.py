"""However a grid is stored (direction, longitude convention, where the seam is), inside it is one and the same grid."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xgenda.errors import GridError
from xgenda.grids import EARTH_RADIUS, Grid, grid_of

QUICK = settings(max_examples=60, deadline=None)


def dataset(latitude: np.ndarray, longitude: np.ndarray) -> xr.Dataset:
    """Return a field whose value says where on the globe it is."""
    where = 1000 * np.asarray(latitude, float)[:, None] + np.asarray(longitude, float) % 360
    return xr.Dataset({"f": (("latitude", "longitude"), where)}, coords={"latitude": latitude, "longitude": longitude})


def model_order(ds: xr.Dataset) -> tuple[Grid, np.ndarray]:
    grid, orientation = grid_of(ds)
    return grid, orientation.to_model(ds.f.values)


regions = st.tuples(
    st.integers(-80, 60),  # first latitude
    st.integers(1, 8),  # rows
    st.floats(-180, 179.9),  # first longitude
    st.integers(1, 12),  # columns
    st.sampled_from([0.25, 1.0, 2.5]),
)


@QUICK
@given(regions, st.booleans(), st.booleans(), st.sampled_from(["as it is", "0-360", "-180-180", "+360"]))
def test_every_way_to_store_a_region(region: tuple, flip_rows: bool, flip_columns: bool, convention: str) -> None:
    south, ny, west, nx, step = region
    latitude, longitude = south + step * np.arange(ny), west + step * np.arange(nx)
    stored = {
        "as it is": longitude,
        "0-360": longitude % 360,  # wraps in the middle where the region crosses Greenwich
        "-180-180": (longitude + 180) % 360 - 180,  # ... or the date line
        "+360": longitude + 360,
    }[convention]
    ds = dataset(latitude[:: -1 if flip_rows else 1], stored[:: -1 if flip_columns else 1])
    grid, orientation = grid_of(ds)
    values = orientation.to_model(ds.f.values)
    assert grid.shape == (ny, nx)
    assert grid.latitude == pytest.approx(latitude)
    assert grid.longitude == pytest.approx(longitude, abs=1e-9)
    assert values == pytest.approx(1000 * latitude[:, None] + longitude % 360, abs=1e-6) or np.isclose(longitude % 360, 360).any()
    assert np.array_equal(orientation.from_model(values), ds.f.values)
    assert not grid.periodic


@QUICK
@given(st.sampled_from([4, 5, 36, 37, 144]), st.integers(0, 200), st.booleans(), st.booleans(), st.sampled_from(["f4", "f8"]))
def test_every_way_to_store_the_globe(nx: int, roll: int, flip: bool, east: bool, dtype: str) -> None:
    longitude = np.roll(np.arange(nx) * 360 / nx, roll)
    longitude = longitude if east else (longitude + 180) % 360 - 180
    ds = dataset(np.array([-30.0, 0.0, 30.0]), longitude[:: -1 if flip else 1].astype(dtype))
    grid, values = model_order(ds)
    reference, expected = model_order(dataset(np.array([-30.0, 0.0, 30.0]), np.arange(nx) * 360 / nx))
    assert grid.periodic
    assert grid.same_as(reference)
    assert grid.longitude_count == nx
    assert -180 - 1e-3 <= grid.longitude[0] < -180 + 360 / nx
    if dtype == "f8" and nx in (4, 36, 144):  # whole degrees and halves stay as they are
        assert np.array_equal(grid.longitude, -180 + np.arange(nx) * 360 / nx)
    assert values == pytest.approx(expected, abs=1e-3)
    assert np.array_equal(grid_of(ds)[1].from_model(values), ds.f.values)


@QUICK
@given(
    st.integers(2, 40),
    st.integers(3, 60),
    st.booleans(),
    st.floats(-400, 400),
)
def test_the_areas_of_a_globe_add_up(ny: int, nx: int, poles: bool, west: float) -> None:
    step = 180 / (ny - 1) if poles else 180 / ny
    latitude = -90 + (0 if poles else step / 2) + step * np.arange(ny)
    grid, _ = grid_of(dataset(latitude, west + np.arange(nx) * 360 / nx))
    areas = grid.areas()
    assert grid.periodic
    assert areas.shape == grid.shape
    assert (areas > 0).all()
    assert areas.sum() == pytest.approx(4 * np.pi * EARTH_RADIUS**2, rel=1e-9)


def test_the_area_of_a_region() -> None:
    grid, _ = grid_of(dataset(np.array([59.5, 60.5]), np.array([9.0, 10.0, 11.0])))
    band = EARTH_RADIUS**2 * np.radians(1) * (np.sin(np.radians(61)) - np.sin(np.radians(60)))
    assert grid.areas()[1] == pytest.approx([band] * 3)


def test_a_pole_row_is_a_cap() -> None:
    grid, _ = grid_of(dataset(np.array([90.0, 89.0]), np.arange(0.0, 360.0, 90.0)))
    cap = 2 * np.pi * EARTH_RADIUS**2 * (1 - np.sin(np.radians(89.5)))
    assert grid.areas()[-1].sum() == pytest.approx(cap)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("start", [-180.0, 0.0, 0.3])
@pytest.mark.parametrize("step", [10.0, 0.7, 360 / 7])
def test_a_repeated_meridian_is_refused(start: float, step: float, dtype: str) -> None:
    count = round(360 / step)
    longitude = np.linspace(start, start + 360, count + 1).astype(dtype)
    message = r"longitude 'longitude' repeats its first meridian at the end; drop it: ds.isel\(longitude=slice\(0, -1\)\)"
    with pytest.raises(GridError, match=message):
        grid_of(dataset(np.array([0.0, 1.0]), longitude))
    with pytest.raises(GridError, match="repeats its first meridian"):
        grid_of(dataset(np.array([0.0, 1.0]), longitude[::-1]))
    assert grid_of(dataset(np.array([0.0, 1.0]), longitude[:-1]))[0].periodic


@pytest.mark.parametrize(
    ("latitude", "longitude", "message"),
    [
        ([0.0, 2.0, 1.0], [0.0, 1.0], r"latitude 'latitude' is not monotonic or repeats a value; sort it: ds.sortby\('latitude'\)"),
        ([0.0, 1.0, 1.0], [0.0, 1.0], r"latitude 'latitude' is not monotonic or repeats a value.*drop_duplicates"),
        ([0.0, 1.0], [0.0, 2.0, 1.0], r"longitude 'longitude' is not monotonic or repeats a value"),
        ([0.0, 1.0], [0.0, 1.0, 1.0], r"longitude 'longitude' is not monotonic or repeats a value"),
        ([0.0, 1.0], [0.0, 120.0, 240.0, 360.0, 480.0], r"longitude 'longitude' is not monotonic or repeats a value"),
        ([0.0, 91.0], [0.0, 1.0], r"latitude 'latitude' reaches 91; it must lie in -90 to 90 degrees. Are latitude and longitude swapped"),
        ([], [0.0, 1.0], r"dimension 'latitude' is empty; there is nothing to do"),
        ([0.0, 1.0], [], r"dimension 'longitude' is empty; there is nothing to do"),
        ([0.0, 1.0], [0.0, 5.0, 350.0, 355.0], r"one region in two parts.*longitude=\(ds.longitude \+ 180\) % 360 - 180\).sortby"),
        ([0.0, 1.0], [-180.0, -175.0, 170.0, 175.0], r"one region in two parts.*longitude=ds.longitude % 360\).sortby"),
    ],
)  # fmt: skip
def test_coordinates_that_are_no_grid(latitude: list, longitude: list, message: str) -> None:
    with pytest.raises(GridError, match=message):
        grid_of(dataset(np.array(latitude), np.array(longitude)))


def test_the_advice_on_a_region_in_two_parts_works() -> None:
    east = dataset(np.array([0.0, 1.0]), np.array([0.0, 5.0, 350.0, 355.0]))
    grid, _ = grid_of(east.assign_coords(longitude=(east.longitude + 180) % 360 - 180).sortby("longitude"))
    assert grid.longitude.tolist() == [-10.0, -5.0, 0.0, 5.0]
    dateline = dataset(np.array([0.0, 1.0]), np.array([-180.0, -175.0, 170.0, 175.0]))
    grid, _ = grid_of(dateline.assign_coords(longitude=dateline.longitude % 360).sortby("longitude"))
    assert grid.longitude.tolist() == [170.0, 175.0, 180.0, 185.0]


@QUICK
@given(regions, st.integers(-3, 3), st.floats(0, 1), st.booleans())
@example(region=(0, 1, 152.487100447984, 1, 0.25), turns=1, place=0.0, periodic=True)
def test_a_longitude_is_located_in_any_convention(region: tuple, turns: int, place: float, periodic: bool) -> None:
    south, ny, west, nx, step = region
    longitude = west + (np.arange(8) * 45 if periodic else step * np.arange(nx))
    grid = Grid(south + step * np.arange(ny), longitude)
    point = longitude[0] + place * (longitude[-1] - longitude[0])
    assert grid.locate(np.array([point + 360 * turns])) == pytest.approx([point], abs=1e-9)


def test_a_point_just_west_of_a_region_stays_there() -> None:
    grid = Grid(np.array([0.0, 1.0]), np.array([10.0, 11.0, 12.0]))
    assert grid.locate(np.array([9.0, 9.9999, 372.5, -348.5])) == pytest.approx([9.0, 9.9999, 12.5, 11.5])


@QUICK
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_coarsened_as_xarray_does(factor: int, rows: int, columns: int) -> None:
    ds = dataset(np.linspace(-10, 30, rows * factor), np.linspace(0, 50, columns * factor))
    coarse = grid_of(ds)[0].coarsened(factor)
    theirs = ds.coarsen(latitude=factor, longitude=factor).mean()
    assert coarse.latitude == pytest.approx(theirs.latitude.values)
    assert coarse.longitude == pytest.approx(theirs.longitude.values)


def test_a_shape_that_is_no_multiple() -> None:
    grid, _ = grid_of(dataset(np.arange(5.0), np.arange(9.0)))
    message = r"A grid of 5 x 9 cells is not a multiple of 4; crop it: ds.isel\(latitude=slice\(0, 4\), longitude=slice\(0, 8\)\)"
    with pytest.raises(GridError, match=message):
        grid.coarsened(4)


def test_the_same_grid_to_rounding() -> None:
    grid = Grid(np.linspace(40, 50, 11), np.linspace(-5, 5, 11))
    assert grid.same_as(Grid(grid.latitude.astype("f4").astype(float), grid.longitude.astype("f4").astype(float)))
    assert not grid.same_as(Grid(grid.latitude + 0.01, grid.longitude))
    assert not grid.same_as(Grid(grid.latitude, grid.longitude[:-1]))


def test_a_grid_survives_json() -> None:
    grid = Grid(np.linspace(40, 50, 7), np.linspace(-5, 5, 3))
    again = Grid.from_dict(grid.to_dict())
    assert np.array_equal(again.latitude, grid.latitude)
    assert np.array_equal(again.longitude, grid.longitude)
    with pytest.raises(GridError, match=r"grid kind 'icosahedral' is not known to this version; it reads 'rectilinear'"):
        Grid.from_dict({"kind": "icosahedral"})


def test_how_many_columns_would_go_around() -> None:
    assert Grid(np.zeros(1), np.arange(10) * 2.5).longitude_count == 144
    assert Grid(np.zeros(1), np.arange(10) * 0.7).longitude_count is None
    assert Grid(np.zeros(1), np.array([0.0, 1.0, 3.0])).longitude_count is None
    assert Grid(np.zeros(1), np.array([0.0, 1.0, 3.0])).periodic is False
    assert Grid(np.zeros(1), np.zeros(1)).longitude_count is None


def test_in_one_line() -> None:
    assert Grid(np.array([0.0, 1.0]), np.arange(4) * 90.0).describe() == "2 x 4, latitude 0 to 1, longitude 0 to 270, periodic"

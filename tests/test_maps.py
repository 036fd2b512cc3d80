"""Interpolation against scipy, closed forms and the adjoint; block means against xarray."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from xgenda.grids import Grid
from xgenda.maps import NODE, LinearMap, bilinear, bilinear_between, block_mean, concatenate, identity

QUICK = settings(max_examples=50, deadline=None)
REGION = Grid(np.array([40.0, 41.5, 42.0, 44.0, 47.0]), np.array([-7.0, -5.0, -4.5, 0.0, 2.0, 6.0]))
GLOBE = Grid(np.linspace(-87.5, 87.5, 36), -180 + 5.0 * np.arange(72))


def random_points(grid: Grid, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    east = grid.longitude[0] + 360 if grid.periodic else grid.longitude[-1]
    return rng.uniform(grid.latitude[0], grid.latitude[-1], count), rng.uniform(grid.longitude[0], east, count)


def test_against_scipy() -> None:
    field = np.random.default_rng(1).normal(size=REGION.shape)
    latitude, longitude = random_points(REGION, 500)
    expected = RegularGridInterpolator((REGION.latitude, REGION.longitude), field)(np.stack([latitude, longitude], -1))
    operator, inside = bilinear(REGION, latitude, longitude + 360)
    assert inside.all()
    assert operator(field.ravel()) == pytest.approx(expected, abs=1e-9)
    assert operator.weights.sum(1) == pytest.approx(np.ones(500))


@QUICK
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(40, 47), st.floats(-7, 6), st.integers(-2, 2))
def test_linear_fields_are_exact(a: float, b: float, c: float, latitude: float, longitude: float, turns: int) -> None:
    y, x = REGION.points()
    operator, inside = bilinear(REGION, np.array([latitude]), np.array([longitude + 360 * turns]))
    assert inside.all()
    snapped = NODE * (3.0 * abs(b) + 4.5 * abs(c))  # so close to a node, a point is the node
    assert operator(a + b * y + c * x) == pytest.approx([a + b * latitude + c * longitude], abs=snapped + 1e-9)


def test_across_the_seam() -> None:
    longitude = np.array([177.5, 179.0, 180.0, -179.0, -177.5, 182.5, 540.0])
    operator, inside = bilinear(GLOBE, np.full(7, 12.5), longitude)
    assert inside.all()
    field = np.cos(np.radians(GLOBE.points()[1]))  # even about the seam
    ends = np.cos(np.radians(5))
    expected = [-(1 + ends) / 2, -(0.8 + 0.2 * ends), -1, -(0.8 + 0.2 * ends), -(1 + ends) / 2, -(1 + ends) / 2, -1]
    assert operator(field) == pytest.approx(expected, abs=1e-9)
    rolled = Grid(GLOBE.latitude, GLOBE.longitude + 180)  # the seam elsewhere: the same answer
    again, _ = bilinear(rolled, np.full(7, 12.5), longitude)
    assert again(np.cos(np.radians(rolled.points()[1]))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("step", [0.05, 0.25, 1.0, 5.0])
def test_no_gap_at_the_seam(step: float) -> None:
    count = round(360 / step)
    grid = Grid(np.array([0.0, step]), -180 + step * np.arange(count))
    near = np.concatenate([[0.0], np.geomspace(1e-9, step / 2, 30)])
    longitude = np.concatenate([-180 - near, -180 + near, 180 - near])
    operator, inside = bilinear(grid, np.zeros(len(longitude)), longitude)
    assert inside.all()
    assert operator(np.abs(((grid.points()[1] + 360) % 360) - 180)) == pytest.approx(np.tile(near, 3), abs=2 * NODE * step)


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [
        (39.9, 0.0),
        (47.1, 0.0),
        (43.0, -7.1),
        (43.0, 6.1),
        (43.0, 180.0),
        (90.0, 0.0),
        (np.nan, 0.0),
        (43.0, np.nan),
        (np.inf, 0.0),
    ],
)
def test_outside_is_flagged_and_never_snapped(latitude: float, longitude: float) -> None:
    operator, inside = bilinear(REGION, np.array([latitude, 43.0]), np.array([longitude, 0.0]))
    assert inside.tolist() == [False, True]
    assert operator.lengths.tolist() == [0, 2]
    assert operator(np.ones(REGION.size)).tolist() == [0.0, 1.0]


def test_beyond_the_last_row_of_a_globe_is_outside() -> None:
    _, inside = bilinear(GLOBE, np.array([87.4, 87.6, -90.0]), np.zeros(3))
    assert inside.tolist() == [True, False, False]


@pytest.mark.parametrize("grid", [REGION, GLOBE], ids=["region", "globe"])
def test_float32_coordinates_hit_the_nodes(grid: Grid) -> None:
    thirds = Grid(grid.latitude + 1 / 3, grid.longitude + 1 / 3)
    latitude, longitude = thirds.points()
    operator, inside = bilinear(thirds, latitude.astype("f4"), longitude.astype("f4") % np.float32(360))
    assert inside.all()
    assert np.array_equal(operator.matrix.toarray(), np.eye(grid.size))


def test_a_single_row_or_column() -> None:
    line = Grid(np.array([45.0]), np.array([0.0, 10.0]))
    operator, inside = bilinear(line, np.array([45.0, 45.1]), np.array([2.5, 2.5]))
    assert inside.tolist() == [True, False]
    assert operator(np.array([0.0, 4.0]))[0] == pytest.approx(1.0)


@QUICK
@given(st.integers(0, 10**6), st.integers(0, 40), st.booleans())
def test_the_adjoint(seed: int, count: int, globe: bool) -> None:
    grid, rng = GLOBE if globe else REGION, np.random.default_rng(seed)
    latitude, longitude = random_points(grid, count, seed)
    operator, _ = bilinear(grid, latitude + 1, longitude)  # some are outside
    x, y = rng.normal(size=(3, grid.size)), rng.normal(size=(3, count))
    left, right = (operator(x) * y).sum(-1), (x * operator.adjoint(y)).sum(-1)
    assert left == pytest.approx(right, rel=1e-10, abs=1e-10)


def test_nan_goes_through_where_it_matters() -> None:
    field = np.arange(float(REGION.size)).reshape(REGION.shape)
    field[1, 1] = np.nan
    latitude = np.array([REGION.latitude[0], 41.0, 46.0, REGION.latitude[1]])
    longitude = np.array([REGION.longitude[1], -4.8, 3.0, REGION.longitude[2]])
    operator, _ = bilinear(REGION, latitude, longitude)
    assert np.isnan(operator(field.ravel())).tolist() == [False, True, False, False]


@QUICK
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_block_means_are_those_of_xarray(factor: int, rows: int, columns: int) -> None:
    grid = Grid(np.linspace(0, 10, rows * factor), np.linspace(0, 20, columns * factor))
    values = np.random.default_rng(0).normal(size=(2, *grid.shape))
    expected = xr.DataArray(values, dims=("t", "y", "x")).coarsen(y=factor, x=factor).mean().values
    operator = block_mean(grid, factor)
    assert operator.shape == (rows * columns, grid.size)
    assert operator(values.reshape(2, -1)) == pytest.approx(expected.reshape(2, -1))


def test_rows_are_stacked_selected_and_shifted() -> None:
    field = np.random.default_rng(0).normal(size=24)
    grid = Grid(np.arange(4.0), np.arange(6.0))
    points, _ = bilinear(grid, np.array([1.5, 2.2]), np.array([0.3, 4.9]))
    parts = [points, identity(24), block_mean(grid, 2)]
    joined = concatenate(parts)
    assert joined.shape == (2 + 24 + 6, 24)
    assert joined(field) == pytest.approx(np.concatenate([p(field) for p in parts]))
    assert joined.select(np.array([1, 3]))(field) == pytest.approx(joined(field)[[1, 3]])
    assert joined.select(np.arange(32) > 25)(field) == pytest.approx(block_mean(grid, 2)(field))
    state = np.concatenate([field + 100, field - 100])  # two variables, one after the other
    assert points.shifted(np.array([0, 24]), 48)(state) == pytest.approx(points(field) + np.array([100, -100]))
    assert joined.matrix.toarray() @ field == pytest.approx(joined(field))


def test_repeated_indices_add_up() -> None:
    operator = LinearMap.from_rows(np.array([[1, 1, 0]]), np.array([[0.5, 0.25, 0.0]]), 3)
    assert operator(np.array([9.0, 4.0, 9.0])) == pytest.approx([3.0])
    assert operator.adjoint(np.array([[1.0]])) == pytest.approx(np.array([[0.0, 0.75, 0.0]]))


def test_between_grids() -> None:
    fine = Grid(np.linspace(39, 48, 19), np.linspace(-8, 7, 16))
    y, x = (np.clip(a, lowest, highest) for a, lowest, highest in zip(fine.points(), (40, -7), (47, 6), strict=True))
    latitude, longitude = REGION.points()
    out = bilinear_between(REGION, fine)(2 * latitude - longitude)
    assert out == pytest.approx(2 * y - x, abs=1e-9)  # held beyond the outermost centres
    half = Grid(GLOBE.latitude[:-1] + 2.5, GLOBE.longitude + 2.5)
    assert bilinear_between(GLOBE, half)(np.ones(GLOBE.size)) == pytest.approx(np.ones(half.size))


def test_rows_on_valid_cells() -> None:
    """Means over what is left, differences only where they are whole."""
    rows = LinearMap.from_rows(
        np.array([[0, 1, 2, 3]] * 3), np.array([[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [1.0, -1.0, 0.0, 0.0]]), 4
    )
    valid = np.array([False, True, True, True])
    kept, enough = rows.restricted(valid, 0.5)
    assert enough.tolist() == [True, False, False]
    assert kept(np.array([np.nan, 1.0, 2.0, 3.0])) == pytest.approx([2.0, 0.0, 0.0])
    assert rows.restricted(~valid | valid, 0.5)[1].all()
    assert rows.magnitude(np.ones(4)) == pytest.approx([1.0, 1.0, 2.0])

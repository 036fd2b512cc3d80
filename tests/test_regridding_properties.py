"""What regridding promises on grids of every kind, and on two real ones: a tripolar ocean and a rotated pole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import xgenda
from xgenda.curvilinear import CurvilinearGrid, PointSet
from xgenda.grids import Grid
from xgenda.horizontal import read_grid, unrotate
from xgenda.spherical import polygon_areas, positions, unit_vectors, wrapped

DATA = Path(__file__).parent / "data" / "grids"
QUICK = settings(max_examples=25, deadline=None)
KINDS = ("regional", "global", "rotated", "points")


def axes(latitude: np.ndarray, longitude: np.ndarray) -> xr.Dataset:
    return xr.Dataset(coords={"lat": ("lat", latitude), "lon": ("lon", longitude)})


@st.composite
def grids(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> xr.Dataset:
    """Coordinates of a grid; a region has its middle away from the poles of its own coordinates."""
    kind = draw(st.sampled_from(kinds))
    ny, nx = draw(st.integers(4, 14)), draw(st.integers(4, 16))
    if kind == "global":
        ny, nx = 2 * ny, 4 * nx
        start = draw(st.sampled_from([0.0, -180.0, 7.0]))
        ds = axes(-90 + 180 / ny * (np.arange(ny) + 0.5), start + 360 / nx * np.arange(nx))
    elif kind == "regional":
        step, west = draw(st.floats(0.3, 3.0)), draw(st.floats(-180, 180))
        ds = axes(draw(st.floats(-60, 20)) + step * np.arange(ny), west + step * np.arange(nx))
    elif kind == "rotated":
        step, pole = draw(st.floats(0.3, 2.5)), (draw(st.floats(20, 90)), draw(st.floats(-180, 180)))
        y, x = step * (np.arange(ny) - ny / 2 + 0.5), step * (np.arange(nx) - nx / 2 + 0.5)
        lat, lon = unrotate(*np.meshgrid(y, x, indexing="ij"), *pole)
        ds = xr.Dataset(coords={"lat": (("y", "x"), lat), "lon": (("y", "x"), lon)})
    else:
        rng = np.random.default_rng(draw(st.integers(0, 10**6)))
        middle = unit_vectors(draw(st.floats(-80, 80)), draw(st.floats(-180, 180)))
        lat, lon = positions(middle + draw(st.sampled_from([0.1, 0.5])) * rng.normal(size=(150, 3)))
        ds = xr.Dataset(coords={"lat": ("point", lat), "lon": ("point", lon)})
    if kind in ("regional", "global") and draw(st.booleans()):
        ds = ds.isel(lat=slice(None, None, -1))
    return ds


def disguised(ds: xr.Dataset, how: int) -> xr.Dataset:
    """The same cells, stored in another order and with other longitudes."""
    dims = [d for d in ("lat", "y", "lon", "x", "point") if d in ds.dims]
    if how & 1:
        ds = ds.isel({dims[0]: slice(None, None, -1)})
    if how & 2:
        ds = (
            ds.isel({dims[-1]: slice(None, None, -1)})
            if len(dims) > 1
            else ds.isel({dims[0]: np.roll(np.arange(ds.sizes[dims[0]]), 7)})
        )
    if how & 4:
        ds = ds.assign_coords(lon=ds["lon"] + 360.0)
    return ds.transpose(*reversed(dims)) if how & 8 else ds


def smooth(ds: xr.Dataset) -> xr.DataArray:
    x, y, z = (xr.ones_like(ds["lat"] * ds["lon"]) * 0 + p for p in _vectors(ds))
    return 3 + x * y - 0.5 * z + 0.3 * x


def _vectors(ds: xr.Dataset) -> list[xr.DataArray]:
    phi, lam = np.radians(ds["lat"]), np.radians(ds["lon"])
    return [np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi) * xr.ones_like(lam)]


@QUICK
@given(grids(), grids(), st.sampled_from(["bilinear", "conservative", "conservative_normed", "nearest"]))
def test_constants_stay_constants(source: xr.Dataset, target: xr.Dataset, method: str) -> None:
    """Weights add up to 1 wherever there is a value, and to at most 1 where a cell is partly covered; they are never negative."""
    assume("point" not in {*source.dims, *target.dims} or not method.startswith("conservative"))
    made = xgenda.Regridder(source, target, method=method)
    assert made.map.matrix.data.min(initial=0.0) >= 0
    total = made.map(np.ones(made.map.size))
    assert not total[~made.weights.mapped].any()
    if method == "conservative":
        assert total.max(initial=0.0) <= 1 + 1e-9
    else:
        np.testing.assert_allclose(total[made.weights.mapped], 1.0, rtol=1e-12)
    field = smooth(source)
    low, high = float(field.min()), float(field.max())
    out = made(field.to_dataset(name="t")).t.values
    if method != "conservative":
        assert (out[np.isfinite(out)] >= low - 1e-9).all()
        assert (out[np.isfinite(out)] <= high + 1e-9).all()


@QUICK
@given(grids(("regional", "rotated", "global")), st.integers(6, 30), st.booleans())
def test_conservative_regridding_keeps_integrals(source: xr.Dataset, ny: int, curvilinear: bool) -> None:
    """To 1e-12, onto a globe of axes or of curvilinear cells."""
    whole = axes(-90 + 180 / ny * (np.arange(ny) + 0.5), 180 / ny * np.arange(2 * ny))
    if curvilinear:
        lat, lon = np.meshgrid(whole["lat"], whole["lon"], indexing="ij")
        edges = np.meshgrid(np.linspace(-90, 90, ny + 1), 180 / ny * (np.arange(2 * ny + 1) - 0.5), indexing="ij")
        whole = xr.Dataset(coords={"lat": (("y", "x"), lat), "lon": (("y", "x"), lon)})
        whole = whole.assign_coords(lat_b=(("yb", "xb"), edges[0]), lon_b=(("yb", "xb"), edges[1]))
    made = xgenda.Regridder(source, whole, method="conservative")
    both_plain = isinstance(made.source.grid, Grid) and isinstance(made.target.grid, Grid)
    one, two = (
        g.grid.areas().ravel()[g.places] if both_plain else polygon_areas(g.grid.vertices)[g.places]
        for g in (made.source, made.target)
    )
    field = np.random.default_rng(0).uniform(1, 2, made.map.size)
    assert (made.map(field) * two).sum() == pytest.approx((field * one).sum(), rel=1e-12 if both_plain else 1e-11)


@QUICK
@given(grids(("rotated",)), st.integers(0, 10**6), st.floats(-2, 2), st.floats(-2, 2))
def test_linear_fields_are_exact_on_curvilinear_grids(source: xr.Dataset, seed: int, a: float, b: float) -> None:
    """Linear in latitude and longitude, away from the poles, where these are no coordinates."""
    grid, rng = read_grid(source).grid, np.random.default_rng(seed)
    assert isinstance(grid, CurvilinearGrid)
    quads, share = grid.quads()[rng.integers(0, len(grid.quads()), 50)], rng.dirichlet(np.ones(4), 50)
    lat, lon = positions(np.einsum("mk,mkc->mc", share, grid.centres.reshape(-1, 3)[quads]))
    far = np.abs(lat) < 79
    assume(far.any() and np.abs(grid.latitude).max() < 89)
    middle = positions(grid.centres.sum((0, 1)))[1]
    assume(np.abs(wrapped(grid.longitude - middle)).max() < 170)  # the field would jump
    target = xr.Dataset(coords={"lat": ("point", lat[far]), "lon": ("point", lon[far])})
    out = xgenda.regrid(source.assign(t=a * source["lat"] + b * wrapped(source["lon"] - middle)), target).t
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, a * lat[far] + b * wrapped(lon[far] - middle), atol=1e-6 * (1 + np.abs(lon).max()))


@QUICK
@given(grids(), grids(), st.sampled_from(["bilinear", "conservative"]), st.integers(0, 15), st.integers(0, 15))
def test_the_order_of_storage_changes_nothing(source: xr.Dataset, target: xr.Dataset, method: str, one: int, two: int) -> None:
    assume("point" not in {*source.dims, *target.dims} or method == "bilinear")
    expected = xgenda.regrid(source.assign(t=smooth(source)), target, method=method).t
    other = disguised(source, one)
    found = xgenda.regrid(other.assign(t=smooth(other)), disguised(target, two), method=method).t
    undone = disguised(found.to_dataset(name="t"), two & 3).t.transpose(*expected.dims)
    if two & 2 and "point" in expected.dims:
        undone = found.isel(point=np.roll(np.arange(found.sizes["point"]), -7))
        undone = undone.isel(point=slice(None, None, -1)) if two & 1 else undone
    assert (
        np.isfinite(undone.values) == np.isfinite(expected.values)
    ).mean() > 0.98  # a point on the edge may fall to either side
    both = np.isfinite(undone.values) & np.isfinite(expected.values)
    np.testing.assert_allclose(undone.values[both], expected.values[both], atol=1e-6)


# -- real grids --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ocean() -> xr.Dataset:
    with xr.open_dataset(DATA / "orca2_arctic.nc") as file:
        return file.load()


@pytest.fixture(scope="module")
def pressure() -> xr.Dataset:
    with xr.open_dataset(DATA / "rotated_pole.nc") as file:
        return file.load()


ARCTIC = xr.Dataset(coords={"latitude": np.arange(50.5, 90, 1.0), "longitude": np.arange(-179.5, 180, 1.0)})
ATLANTIC = xr.Dataset(coords={"latitude": np.arange(-60, 89.1, 1.5), "longitude": np.arange(-180, 180, 1.5)})


def test_a_tripolar_grid_and_its_fold(ocean: xr.Dataset) -> None:
    """The last row holds its cells twice: they are told of, and with one half masked every cell is counted once."""
    grid = read_grid(ocean).grid
    assert isinstance(grid, CurvilinearGrid)
    assert grid.periodic
    np.testing.assert_allclose(grid.centres[-1, 1:90], grid.centres[-1, :90:-1], atol=2e-6)
    with pytest.warns(UserWarning, match=r"Cells of the source overlap, and 7\d\d target cells count some of them twice"):
        folded = xgenda.Regridder(ocean, ARCTIC, method="conservative")
    assert folded.map(np.ones(grid.size)).max() == pytest.approx(2.0)
    once = xr.ones_like(ocean.votemper, dtype=bool)
    once[-1, 91:] = False
    made = xgenda.Regridder(ocean, ARCTIC, method="conservative", source_mask=once)
    total = made.map(np.ones(grid.size)).reshape(40, 360)
    assert total.max() == pytest.approx(1.0)
    assert total[-20:].min() > 0.98  # all the way to the pole; corners are inferred, and leave slits along the fold
    # inferred cells cross themselves where the grid ends in a pole on land, over a millionth of the sphere
    heat = (ocean.votemper.fillna(0) + 2).where(once, 0).values.ravel()
    wide = xgenda.Regridder(ocean, axes(np.arange(40.5, 90), np.arange(360.0)), method="conservative", source_mask=once)
    assert isinstance(wide.target.grid, Grid)
    cells = polygon_areas(wide.target.grid.vertices)[wide.target.places]
    assert (wide.map(heat) * cells).sum() == pytest.approx((heat * polygon_areas(grid.vertices)).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "largest", "typical"), [("bilinear", 0.4, 0.05), ("conservative_normed", 0.4, 0.05), ("nearest", 0.6, 0.04)]
)
def test_an_ocean_there_and_back(ocean: xr.Dataset, method: str, largest: float, typical: float) -> None:
    """Onto one degree and back: within a third of the spread at fronts, and within 3 % of it in the mean."""
    once = xr.ones_like(ocean.votemper, dtype=bool)
    once[-1, 91:] = False
    out = xgenda.regrid(ocean, ARCTIC, method=method, skipna=True, source_mask=once if method == "conservative_normed" else None)
    back = xgenda.regrid(out, ocean, method=method).votemper
    assert back.dims == ("y", "x")
    wrong = np.abs(back - ocean.votemper)
    assert int(wrong.notnull().sum()) > 0.94 * int(ocean.votemper.notnull().sum())
    assert float(wrong.max()) < largest
    assert float(np.sqrt((wrong**2).mean())) < typical


@pytest.mark.parametrize(
    ("method", "largest", "typical"), [("bilinear", 250.0, 40.0), ("conservative_normed", 250.0, 40.0), ("nearest", 1e-9, 1e-9)]
)
def test_a_rotated_pole_there_and_back(pressure: xr.Dataset, method: str, largest: float, typical: float) -> None:
    """Cells of 2.2 degrees onto 1.5 degrees and back, of a field that varies by 880 Pa."""
    out = xgenda.regrid(pressure, ATLANTIC, method=method)
    back = xgenda.regrid(out, pressure, method=method).air_pressure_at_sea_level
    assert back.dims == ("grid_latitude", "grid_longitude")
    wrong = np.abs(back - pressure.air_pressure_at_sea_level)
    assert float(wrong.notnull().mean()) > 0.85
    assert float(wrong.max()) < largest
    assert float(np.sqrt((wrong**2).mean())) < typical


def test_real_grids_as_points(ocean: xr.Dataset, pressure: xr.Dataset) -> None:
    """Interpolation on triangles between the centres is close to that in the cells; the fold row, held twice, does no harm."""
    for ds, name, bound in ((ocean.fillna(0.0), "votemper", 0.5), (pressure, "air_pressure_at_sea_level", 150.0)):
        side = read_grid(ds)
        lat, lon = side.points()
        points = xr.Dataset({name: ("point", ds[name].values.ravel())}, coords={"lat": ("point", lat), "lon": ("point", lon)})
        assert isinstance(read_grid(points).grid, PointSet)
        target = ARCTIC if name == "votemper" else ATLANTIC
        by_cells, by_points = (xgenda.regrid(d, target)[name].values for d in (ds, points))
        both = np.isfinite(by_cells) & np.isfinite(by_points)
        assert both.sum() > 0.97 * np.isfinite(by_cells).sum()
        difference = (by_cells - by_points)[both]
        assert np.sqrt((difference**2).mean()) < 0.15 * bound
        assert np.quantile(np.abs(difference), 0.99) < bound

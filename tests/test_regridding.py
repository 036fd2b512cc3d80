"""Regridding against weights of ESMF, closed forms, conservation, and both backends by one contract."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import xgenda
from xgenda.curvilinear import CurvilinearGrid, PointSet
from xgenda.errors import ChunkingError, CoordinateError, GridError, MissingDependencyError, OptionError, OutputExistsError
from xgenda.grids import EARTH_RADIUS, Grid
from xgenda.horizontal import read_grid, unrotate
from xgenda.regridding import compute
from xgenda.spherical import clip, great_circle, polygon_areas, positions, unit_vectors
from xgenda.weights import conservative, interpolation

REFERENCE = Path(__file__).parent / "data" / "esmf"
QUICK = settings(max_examples=25, deadline=None)
HAS_XESMF = importlib.util.find_spec("xesmf") is not None and importlib.util.find_spec("esmpy") is not None
BACKENDS = ["builtin", pytest.param("xesmf", marks=pytest.mark.skipif(not HAS_XESMF, reason="needs xESMF and esmpy"))]
SPHERE = 4 * np.pi * EARTH_RADIUS**2


def reference(name: str) -> tuple[xr.Dataset, xr.Dataset, scipy.sparse.csr_array]:
    """Return source, target and the matrix of ESMF."""
    with xr.open_dataset(REFERENCE / f"{name}.nc", engine="scipy") as file:
        ds = file.load()
    sides = []
    for prefix in ("src_", "dst_"):
        names = [str(v) for v in ds.variables if str(v).startswith(prefix)]
        sides.append(ds[names].rename({n: n[4:] for n in names}).set_coords([n[4:] for n in names]))
    shape = tuple(int(np.prod(ds.attrs[k])) for k in ("shape_out", "shape_in"))
    matrix = scipy.sparse.coo_array((ds.S.values, (ds.row.values - 1, ds.col.values - 1)), shape=shape).tocsr()
    return sides[0], sides[1], matrix


#: file -> (method, largest difference of a weight), after the notes that come with the files
TOLERANCES = {
    "global_rect_bilinear_periodic": ("bilinear", 7e-3),
    "global_rect_conservative": ("conservative", 1e-2),
    "global_rect_conservative_reverse": ("conservative", 1e-2),
    "rect_to_curvilinear_bilinear": ("bilinear", 3e-4),
    "rect_to_points_bilinear": ("bilinear", 3e-4),
    "curvilinear_to_rect_bilinear_unmapped_nan": ("bilinear", 1e-3),
    "curvilinear_to_points_bilinear": ("bilinear", 1e-3),
    "rect_to_curvilinear_conservative": ("conservative", 1e-10),  # both with great circles
    "masked_rect_to_curvilinear_bilinear": ("bilinear", 3e-4),
}


@pytest.mark.parametrize("name", TOLERANCES)
def test_weights_of_esmf(name: str) -> None:
    source, target, matrix = reference(name)
    method, tolerance = TOLERANCES[name]
    mask = (source["mask"] != 0) if "mask" in source.variables else None
    made = xgenda.Regridder(source, target, method=method, regridder="builtin", source_mask=mask)
    expected = matrix.toarray()
    mapped = np.isfinite(expected).all(1) & (np.nan_to_num(expected).sum(1) > 0)
    assert np.array_equal(made.weights.mapped, mapped)
    assert np.abs(made.map.matrix.toarray() - np.nan_to_num(expected))[mapped].max() < tolerance
    assert made.map.matrix.toarray()[~mapped].any() == False  # noqa: E712


def test_nearest_of_esmf() -> None:
    for name in ("global_rect_nearest", "curvilinear_to_rect_nearest"):
        source, target, matrix = reference(name)
        made = xgenda.Regridder(source, target, method="nearest", regridder="builtin")
        mine, theirs = (np.asarray(m.argmax(1)).ravel() for m in (made.map.matrix.toarray(), matrix.toarray()))
        (lat, lon), (to_lat, to_lon) = ([g.grid.points()[k][g.places] for k in (0, 1)] for g in (made.source, made.target))
        place, point = unit_vectors(lat, lon), unit_vectors(to_lat, to_lon)
        # the same cell, or one as far away
        np.testing.assert_allclose(great_circle(place[mine], point), great_circle(place[theirs], point), atol=1e-12)


def test_extrapolation_of_esmf() -> None:
    source, target, matrix = reference("masked_rect_to_curvilinear_bilinear_extrap_nearest")
    made = xgenda.Regridder(source, target, regridder="builtin", extrapolate="nearest", source_mask=source["mask"] != 0)
    assert made.weights.mapped.all()
    difference = np.abs(made.map.matrix.toarray() - matrix.toarray()).max(1)
    assert (difference < 3e-4).mean() > 0.99  # the rest: two cells equally near
    assert difference[difference >= 3e-4].tolist() == pytest.approx([1.0] * int((difference >= 3e-4).sum()))


# -- geometry ----------------------------------------------------------------------------------------------------------


def globe(ny: int, nx: int, start: float = -180.0) -> Grid:
    return Grid(-90 + 180 / ny * (np.arange(ny) + 0.5), start + 360 / nx * np.arange(nx))


@QUICK
@given(st.integers(2, 40), st.integers(3, 80))
def test_areas_add_up_to_the_sphere(ny: int, nx: int) -> None:
    grid = globe(ny, nx)
    assert grid.areas().sum() == pytest.approx(SPHERE, rel=1e-12)
    if nx > 3:
        assert polygon_areas(grid.vertices).sum() == pytest.approx(4 * np.pi, rel=1e-12)


def test_the_area_of_an_octant_and_of_tiny_cells() -> None:
    octant = np.eye(3)[None]
    assert polygon_areas(octant)[0] == pytest.approx(np.pi / 2)
    assert polygon_areas(octant[:, ::-1])[0] == pytest.approx(-np.pi / 2)
    side = 1e-5  # degrees: about a metre
    lat, lon = np.array([[45, 45, 45 + side, 45 + side]]), np.array([[7, 7 + side, 7 + side, 7]])
    expected = np.radians(side) ** 2 * np.cos(np.radians(45 + side / 2))
    assert polygon_areas(unit_vectors(lat, lon))[0] == pytest.approx(expected, rel=1e-8)


@QUICK
@given(st.integers(0, 10**6))
def test_clipping_against_counting(seed: int) -> None:
    """The area of the intersection of two random quadrilaterals, by points in both."""
    rng = np.random.default_rng(seed)

    def quadrilateral() -> np.ndarray:
        lat, lon = rng.uniform(-60, 60), rng.uniform(-180, 180)
        return unit_vectors(lat + np.array([-15, -15, 15, 15]), lon + np.array([-20, 20, 20, -20]))

    a = quadrilateral()
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    b = a @ np.linalg.matrix_power(np.eye(3) * 0.8 + 0.2 * turn, 1).T
    b /= np.linalg.norm(b, axis=-1, keepdims=True)
    points = rng.normal(size=(40000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)

    def inside(polygon: np.ndarray) -> np.ndarray:
        return np.all([points @ np.cross(polygon[i], polygon[(i + 1) % 4]) > 0 for i in range(4)], axis=0)

    found = polygon_areas(clip(a[None], b[None]))[0]
    share = (inside(a) & inside(b)).mean()
    assert found / (4 * np.pi) == pytest.approx(share, abs=5 * np.sqrt(max(share, 1e-4) / 40000))


def rotated(ny: int = 30, nx: int = 40, spacing: float = 0.5, pole: tuple[float, float] = (39.25, -162.0)) -> xr.Dataset:
    """A rotated grid, as regional models have them."""
    y, x = spacing * (np.arange(ny) - ny / 2), spacing * (np.arange(nx) - nx / 2)
    lat, lon = unrotate(*np.meshgrid(y, x, indexing="ij"), *pole)
    attrs = ({"standard_name": "latitude", "units": "degrees_north"}, {"standard_name": "longitude", "units": "degrees_east"})
    return xr.Dataset(coords={"lat": (("y", "x"), lat, attrs[0]), "lon": (("y", "x"), lon, attrs[1])})


def plain(south: float, north: float, west: float, east: float, step: float) -> xr.Dataset:
    lat, lon = np.arange(south, north + 1e-9, step), np.arange(west, east + 1e-9, step)
    return xr.Dataset(
        coords={
            "latitude": ("latitude", lat, {"units": "degrees_north"}),
            "longitude": ("longitude", lon, {"units": "degrees_east"}),
        }
    )


@pytest.mark.parametrize("pole", [(39.25, -162.0), (0.0, 0.0), (70.0, 30.0)], ids=["Europe", "over the pole", "high"])
def test_linear_fields_are_exact_from_curvilinear_grids(pole: tuple[float, float]) -> None:
    """Linear in latitude and longitude, and near the poles, where these are none, in the plane that touches the point."""
    source = rotated(pole=pole)
    grid = read_grid(source).grid
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(4), 400)
    cells = grid.quads()[rng.integers(0, len(grid.quads()), 400)]
    centre = np.einsum("mk,mkc->mc", weights, grid.centres.reshape(-1, 3)[cells])
    lat, lon = positions(centre)
    far = np.abs(lat) < 80
    found, inside = interpolation(grid, lat, lon)
    assert inside.all()
    y, x = grid.points()
    for i in np.flatnonzero(far)[:200]:
        near = (x - lon[i] + 180) % 360 - 180
        value = found.select(np.array([i]))(0.3 * y - 0.7 * near)[0]
        assert value == pytest.approx(0.3 * lat[i], abs=1e-6 * 180)
    for i in np.flatnonzero(~far)[:200]:
        p = unit_vectors(lat[i], lon[i])
        east = np.cross([0.3, 0.9, 0.1], p)
        touching = (grid.centres.reshape(-1, 3) @ east) / np.maximum(grid.centres.reshape(-1, 3) @ p, 0.1)
        assert found.select(np.array([i]))(touching)[0] == pytest.approx(0.0, abs=1e-6)


def test_a_curvilinear_copy_of_a_plain_grid_gives_the_same() -> None:
    flat = plain(-40, 40, 0, 100, 2.5)
    lat, lon = np.meshgrid(flat.latitude, flat.longitude, indexing="ij")
    copy = xr.Dataset(coords={"lat": (("y", "x"), lat), "lon": (("y", "x"), lon)})
    target = plain(-30, 30, 10, 90, 1.7)
    for method, tolerance in (("bilinear", 1e-9), ("conservative", 1e-2), ("nearest", 1e-12)):
        a, b = (xgenda.Regridder(s, target, method=method, regridder="builtin").map.matrix.toarray() for s in (flat, copy))
        assert np.abs(a - b).max() < tolerance, method


@pytest.mark.parametrize("start", [0.0, -180.0, 20.0])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("method", ["bilinear", "conservative", "nearest"])
def test_conventions_of_the_source_change_nothing(start: float, flip: bool, method: str) -> None:
    grid = globe(36, 72)
    y, x = np.meshgrid(grid.latitude, grid.longitude, indexing="ij")
    ds = xr.Dataset(
        {"t": (("lat", "lon"), np.sin(np.radians(y)) + np.cos(np.radians(2 * x)) * np.cos(np.radians(y)))},
        coords={"lat": grid.latitude, "lon": grid.longitude},
    )
    target = plain(-88, 88, -170, 170, 11.3)
    expected = xgenda.regrid(ds, target, method=method, regridder="builtin").t
    other = ds.assign_coords(lon=(ds.lon - start) % 360 + start).sortby("lon")
    other = other.isel(lat=slice(None, None, -1)) if flip else other
    found = xgenda.regrid(other.transpose("lon", "lat"), target, method=method, regridder="builtin").t
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found.transpose(*expected.dims), expected, atol=1e-9)


# -- what both backends promise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("regridder", BACKENDS)
@pytest.mark.parametrize("method", ["bilinear", "conservative", "conservative_normed", "nearest"])
def test_contract(regridder: str, method: str) -> None:
    source = rotated()
    field = np.cos(np.radians(3 * source.lat)) + 0.01 * source.lon
    ds = source.assign(t=field.astype("f4").assign_attrs(units="K", standard_name="air_temperature"))
    target = plain(44, 56, 10, 26, 0.7)
    made = xgenda.Regridder(ds, target, method=method, regridder=regridder)
    out = made(ds)
    assert out.t.dims == ("latitude", "longitude")
    assert out.t.dtype == np.float32
    assert out.t.attrs == ds.t.attrs
    assert "regrid(" in out.attrs["history"]
    sums = np.asarray(made.map.matrix.sum(1)).ravel()[made.weights.mapped]
    if method == "conservative":
        assert sums.max() <= 1 + 1e-9
    else:
        assert sums == pytest.approx(np.ones(len(sums)), abs=1e-9)
    lat, lon = np.meshgrid(target.latitude, target.longitude, indexing="ij")
    truth = np.cos(np.radians(3 * lat)) + 0.01 * lon
    whole = np.asarray(made.map.matrix.sum(1)).reshape(out.t.shape) > 0.999
    difference = np.abs(out.t.values - truth)[whole & np.isfinite(out.t.values)]
    assert difference.size > 100
    assert difference.max() < {"bilinear": 1e-3, "nearest": 0.02}.get(method, 2e-2)


@pytest.mark.parametrize("regridder", BACKENDS)
@pytest.mark.parametrize("kinds", [("plain", "plain"), ("rotated", "plain"), ("plain", "rotated")])
def test_integrals_are_kept(regridder: str, kinds: tuple[str, str]) -> None:
    """To 1e-12: what a covered source holds is what the target holds."""
    wide = {"plain": plain(30, 70, -30, 60, 1.3), "rotated": rotated(60, 80, 0.9)}
    small = {"plain": plain(44, 56, 10, 26, 0.7), "rotated": rotated(20, 24)}
    source, target = read_grid(small[kinds[0]]), read_grid(wide[kinds[1]])
    found = compute(source, target, "conservative", regridder)
    field = np.random.default_rng(0).normal(size=source.grid.size) + 5
    both_plain = kinds == ("plain", "plain")
    one, two = (
        g.grid.areas().ravel()[g.places] if both_plain else polygon_areas(g.grid.vertices)[g.places] for g in (source, target)
    )
    before, after = (field * one).sum(), (found.map(field) * two).sum()
    assert after == pytest.approx(before, rel=1e-12 if regridder == "builtin" else 1e-9)


def test_integrals_over_the_globe_are_kept() -> None:
    for a, b in (((36, 72), (23, 50)), ((23, 50), (36, 72)), ((180, 360), (45, 90))):
        source, target = globe(*a), globe(*b, start=3.0)
        overlap, one, two = conservative(source, target)
        np.testing.assert_allclose(overlap.matrix.sum(0), one, rtol=1e-12)
        np.testing.assert_allclose(overlap.matrix.sum(1), two, rtol=1e-12)


def test_a_reflex_cell_is_split() -> None:
    """A dart in one grid: areas still agree."""
    lat = np.array([[0.0, 0, 0], [4, 1, 4], [8, 8, 8]])
    lon = np.array([[0.0, 4, 8], [0, 4, 8], [0, 4, 8]])
    corners = np.stack(
        [np.stack([a[i : i + 2, j : j + 2] for i, j in ((0, 0), (0, 1), (1, 1), (1, 0))], -1) for a in (lat, lon)], -1
    )
    dart = CurvilinearGrid(corners[..., 0].mean(-1), corners[..., 1].mean(-1), corners)
    cover = Grid(np.arange(-1, 10.0), np.arange(-1, 10.0))
    for one, two in ((dart, cover), (cover, dart)):
        overlap, a, b = conservative(one, two)
        inner = a if one is dart else b
        found = np.asarray(overlap.matrix.sum(0 if one is dart else 1)).ravel()
        np.testing.assert_allclose(found, inner, rtol=1e-10)


# -- missing values, masks, laziness, files -----------------------------------------------------------------------------


def ocean() -> xr.Dataset:
    ds = plain(-20, 20, 0, 40, 2)
    y, x = np.meshgrid(ds.latitude, ds.longitude, indexing="ij")
    field = xr.DataArray(np.stack([y + x, y - x]), dims=("time", "latitude", "longitude"))
    return ds.assign(sst=field.where((np.hypot(y, x - 20) > 8)[None])).assign_coords(
        time=np.array(["2001-01-01", "2001-01-02"], "M8[ns]")
    )


def test_missing_values() -> None:
    ds = ocean()
    target = plain(-15, 15, 5, 35, 1.5)
    strict = xgenda.regrid(ds, target, regridder="builtin").sst
    filled = xgenda.regrid(ds.fillna(0), target, regridder="builtin").sst
    touched = xgenda.regrid(ds.isnull().astype(float), target, regridder="builtin").sst > 0
    assert np.array_equal(strict.isnull(), touched)
    np.testing.assert_allclose(strict.where(~touched, 0), filled.where(~touched, 0))
    loose = xgenda.regrid(ds, target, regridder="builtin", skipna=True, na_thres=0.5).sst
    assert 0 < int(loose.isnull().sum()) < int(strict.isnull().sum())
    np.testing.assert_allclose(loose.where(~touched, 0), strict.where(~touched, 0))
    ones = xgenda.regrid(ds * 0 + 7, target, regridder="builtin", skipna=True).sst
    np.testing.assert_allclose(ones.values[np.isfinite(ones.values)], 7.0)  # what is left stands for all
    none_lost = xgenda.regrid(ds, target, regridder="builtin", skipna=True, na_thres=0.0).sst
    assert np.array_equal(none_lost.isnull(), strict.isnull())


def test_masks() -> None:
    ds = ocean()
    wet = ds.sst.isel(time=0, drop=True).notnull()
    target = plain(-15, 15, 5, 35, 1.5)
    strict = xgenda.regrid(ds, target, regridder="builtin").sst
    masked = xgenda.regrid(ds, target, regridder="builtin", source_mask=wet).sst
    xr.testing.assert_allclose(masked, strict)
    everywhere = xgenda.regrid(ds, target, regridder="builtin", source_mask=wet, extrapolate="nearest").sst
    assert everywhere.notnull().all()
    few = xr.zeros_like(target.latitude * target.longitude, dtype=bool)
    few[3:5] = True
    assert np.array_equal(
        xgenda.regrid(ds.fillna(0), target, regridder="builtin", target_mask=few).sst.notnull(), few.broadcast_like(strict)
    )
    mean = xgenda.regrid(
        ds * 0 + 3, plain(-16, 16, 4, 36, 8), regridder="builtin", method="conservative_normed", source_mask=wet
    ).sst
    np.testing.assert_allclose(mean.values[np.isfinite(mean.values)], 3.0)
    with pytest.raises(
        OptionError, match="source_mask is .*'time': 2.*; a DataArray with the dimensions {'latitude': 21, 'longitude': 21}"
    ):
        xgenda.regrid(ds, target, source_mask=ds.sst.notnull())


@pytest.mark.parametrize("method", ["bilinear", "conservative"])
def test_lazy_input_gives_a_lazy_result_with_the_same_bits(method: str, no_compute) -> None:  # type: ignore[no-untyped-def]
    import dask

    ds = xr.concat(
        [
            ocean().isel(time=[0]).assign_coords(time=[np.datetime64("2001-01-01", "ns") + np.timedelta64(k, "D")])
            for k in range(6)
        ],
        "time",
    )
    target = rotated(20, 20, pole=(90.0, -160.0)).assign_coords(other=3)
    eager = xgenda.regrid(ds, target, method=method, regridder="builtin")
    lazy = xgenda.regrid(ds.chunk(time=2), target, method=method, regridder="builtin")
    assert lazy.sst.chunks is not None
    assert lazy.sst.chunks[0] == (2, 2, 2)
    with dask.config.set(scheduler="sync"):
        computed = lazy.compute()
    xr.testing.assert_identical(computed.sst, eager.sst)
    with pytest.raises(ChunkingError, match=r"regridding needs whole fields. Type: ds.chunk\(latitude=-1\)"):
        xgenda.regrid(ds.chunk(latitude=5), target, regridder="builtin")


def test_chunks_that_grow_are_told() -> None:
    import dask.array as da

    ds = plain(-10, 10, 0, 20, 2).assign(
        t=(("time", "latitude", "longitude"), da.zeros((100000, 11, 11), chunks=(50000, 11, 11)))
    )
    with pytest.warns(UserWarning, match=r"Chunks of ds\['t'\] grow from 46 to .* MiB; make them smaller first: ds.chunk\(time="):
        xgenda.regrid(ds, plain(-10, 10, 0, 20, 0.2), regridder="builtin")


def test_other_variables_and_orders_are_kept() -> None:
    ds = ocean().assign(depth=5.0, profile=("z", [1.0, 2.0]), flag=(("longitude", "latitude"), np.ones((21, 21), dtype=int)))
    ds = ds.assign(sst=ds.sst.transpose("latitude", "time", "longitude")).expand_dims(member=2)
    ds.attrs["title"] = "made up"
    out = xgenda.regrid(ds, rotated(10, 12, pole=(90.0, -160.0)), regridder="builtin")
    assert out.sst.dims == ("member", "y", "time", "x") or out.sst.dims == ("member", "time", "y", "x")
    assert out.flag.dims[-2:] == ("y", "x")
    assert out.attrs["title"] == "made up"
    assert out.attrs["xgenda_regridder"] == "builtin"
    assert {"lat", "lon"} <= set(out.coords)
    assert "latitude" not in out.coords
    assert out.depth.values.tolist() == [5.0, 5.0]
    array = xgenda.regrid(ocean().sst, plain(-10, 10, 5, 30, 5), regridder="builtin")
    assert isinstance(array, xr.DataArray)
    assert array.name == "sst"


def test_points_are_targets_and_nearest_sources() -> None:
    stations = xr.Dataset(
        coords={"lat": ("station", [0.0, 10.3, 80.0]), "lon": ("station", [30.0, 3.3, 10.0]), "station": ["a", "b", "c"]}
    )
    out = xgenda.regrid(ocean(), stations, regridder="builtin").sst
    assert out.dims == ("time", "station")
    assert out.isnull().values.tolist() == [[False, False, True]] * 2
    assert out.values[0, :2] == pytest.approx([30.0, 13.6])
    back = xgenda.regrid(
        out.isel(station=[0, 1]).to_dataset(), plain(-4, 12, 0, 32, 4), method="nearest", regridder="builtin"
    ).sst
    assert set(np.unique(back.isel(time=0).values.round(6))) == {30.0, 13.6}
    assert isinstance(read_grid(stations).grid, PointSet)
    circle = positions(unit_vectors(0.0, np.arange(10.0)) @ np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0])
    tilted = xr.Dataset(coords={"lat": ("station", circle[0]), "lon": ("station", circle[1])})
    for few in (
        tilted,
        stations.isel(station=[0, 1]),
        stations.assign_coords(lat=("station", [0.0, 0, 0])),
        stations.isel(station=[]),
    ):
        with pytest.raises(GridError, match="needs at least three that do not lie on one great circle, and the source is"):
            xgenda.Regridder(few, ocean(), regridder="builtin")
    with pytest.raises(GridError, match="Conservative regridding needs cells, and the target is 3 points"):
        xgenda.Regridder(ocean(), stations, method="conservative", regridder="builtin")


def test_weights_are_saved_and_read(tmp_path: Path) -> None:
    ds, target = ocean().fillna(0), rotated(20, 20, pole=(90.0, -160.0))
    made = xgenda.Regridder(ds, target, regridder="builtin")
    path = made.save(tmp_path / "w.nc")
    assert [p.name for p in tmp_path.iterdir()] == ["w.nc"]
    again = xgenda.Regridder(ds, target, weights=path)
    xr.testing.assert_equal(again(ds).sst, made(ds).sst)
    with xr.open_dataset(path) as file:
        assert {"S", "row", "col", "xc_a", "yc_b", "src_grid_dims"} <= set(file.variables)
        assert int(file.row.min()) == 1
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        made.save(path)
    made.save(path, overwrite=True)
    with pytest.raises(OptionError, match="is no folder; make it first: mkdir -p"):
        made.save(tmp_path / "none" / "w.nc")
    with pytest.raises(GridError, match="is of another source grid than 21 x 21"):
        xgenda.Regridder(ds.assign_coords(longitude=ds.longitude + 1), target, weights=path)
    with pytest.raises(GridError, match="it belongs to others"):
        xgenda.Regridder(plain(0, 10, 0, 10, 5), target, weights=path)
    with pytest.raises(OptionError, match=r"does not exist; make it: xgenda.Regridder\(source, target\).save"):
        xgenda.Regridder(ds, target, weights=tmp_path / "none.nc")
    source, to, _ = reference("rect_to_points_bilinear")
    read = xgenda.Regridder(source, to, weights=REFERENCE / "rect_to_points_bilinear.nc")  # as ESMF wrote it
    built = xgenda.Regridder(source, to, regridder="builtin")
    assert np.abs((read.map.matrix - built.map.matrix).toarray()).max() < 3e-4


def test_weights_are_kept_by_both_grids() -> None:
    ds, target = ocean(), plain(-10, 10, 5, 30, 5)
    one = xgenda.Regridder(ds, target, regridder="builtin")
    assert xgenda.Regridder(ds.copy(deep=True), target, regridder="builtin").weights is one.weights
    assert xgenda.Regridder(ds, target, method="nearest", regridder="builtin").weights is not one.weights
    assert xgenda.Regridder(ds, target.isel(latitude=slice(1, None)), regridder="builtin").weights is not one.weights
    flipped = ds.isel(latitude=slice(None, None, -1))
    assert xgenda.Regridder(flipped, target, regridder="builtin").weights is not one.weights
    assert "bilinear (builtin)" in repr(one)


def test_poles() -> None:
    """Beyond the last row the mean of that row stands at the pole, as in ESMF."""
    ds = xr.Dataset(
        {"t": (("lat", "lon"), np.cos(np.radians(np.arange(0, 360, 10)))[None] * np.ones((18, 1)) + 2)},
        coords={"lat": np.arange(-85, 90, 10.0), "lon": np.arange(0, 360, 10.0)},
    )
    poles = xr.Dataset(coords={"lat": ("p", [90.0, 90.0, 87.5, -90.0]), "lon": ("p", [0.0, 77.0, 0.0, 5.0])})
    assert xgenda.regrid(ds, poles, regridder="builtin").t.values == pytest.approx([2.0, 2.0, 2.5, 2.0])


# -- between points ----------------------------------------------------------------------------------------------------


def scattered(kind: str, seed: int, count: int = 400) -> PointSet:
    rng = np.random.default_rng(seed)
    if kind == "globe":
        lat, lon = positions(rng.normal(size=(count, 3)))
    elif kind == "reduced grid":  # rings with fewer points near the poles, each in one plane
        rings = [
            np.stack(np.broadcast_arrays(y, np.arange(n) * 360 / n), -1)
            for y, n in zip(np.linspace(-85, 85, 18), 20 + 4 * np.arange(9).repeat(2), strict=True)
        ]
        lat, lon = np.concatenate(rings).T
    else:
        lat, lon = rng.uniform(50, 70, count), rng.uniform(165, 195, count)
    return PointSet(lat, lon)


@QUICK
@given(st.sampled_from(["globe", "reduced grid", "region"]), st.integers(0, 10**6))
def test_interpolation_between_points(kind: str, seed: int) -> None:
    """Partition of unity, non-negative, exact at nodes, exact for linear functions in the plane of each triangle."""
    source, rng = scattered(kind, seed), np.random.default_rng(seed)
    nodes, triangles = unit_vectors(*source.points()), source.triangles
    share = rng.dirichlet(np.ones(3), 300)
    picked = triangles[rng.integers(0, len(triangles), 300)]
    within = np.einsum("mk,mkc->mc", share, nodes[picked])
    found, inside = interpolation(source, *positions(within))
    assert inside.all()
    assert found.matrix.data.min() > 0
    np.testing.assert_allclose(found(np.ones(source.size)), 1.0, atol=1e-12)
    np.testing.assert_allclose(found(nodes.T).T, within, atol=1e-5)
    at_nodes, inside = interpolation(source, *source.points())
    known = np.isin(np.arange(source.size), triangles)
    assert known.mean() > (0.98 if kind == "region" else 0.999)
    np.testing.assert_allclose(at_nodes.matrix.toarray()[known], np.eye(source.size)[known], atol=1e-9)
    if kind != "region":
        lat, lon = positions(rng.normal(size=(300, 3)))
        _, inside = interpolation(source, lat, lon)
        assert inside.all() or len(triangles) < 2 * (source.size - 2)  # Euler: fewer where some were left out
        assert inside.mean() > 0.99


def test_points_converge_to_second_order() -> None:
    """A smooth function of position, on points four times as many: a quarter of the error."""
    errors = []
    for count in (500, 2000, 8000):
        k = np.arange(count) + 0.5
        lat, lon = np.degrees(np.arcsin(1 - 2 * k / count)), np.degrees(k * np.pi * (3 - np.sqrt(5)))
        to = scattered("globe", 1, 3000)
        found, inside = interpolation(PointSet(lat, lon), *to.points())
        assert inside.all()
        x, y, z = unit_vectors(lat, lon).T
        a, b, c = unit_vectors(*to.points()).T
        errors.append(np.sqrt(np.mean((found(x + 2 * y * z) - (a + 2 * b * c)) ** 2)))
    assert np.polyfit(np.log([500, 2000, 8000]), np.log(errors), 1)[0] == pytest.approx(-1.0, abs=0.1)


def test_gaps_between_points_are_outside() -> None:
    """A hole, the far side of the Earth, and a bay: outside. A large triangle beside small ones is found."""
    lat, lon = (a.ravel() for a in np.meshgrid(np.arange(-20.0, 21), np.arange(0.0, 41), indexing="ij"))
    hole = np.hypot(lat, lon - 20) > 8
    source = PointSet(lat[hole], lon[hole] % 360)
    _, inside = interpolation(source, np.array([0.0, 3, 15, 0, 0, 89, -0.5, 30]), np.array([20.0, 21, 20, 200, 100, 0, 2.3, 20]))
    assert inside.tolist() == [False, False, True, False, False, False, True, False]
    rng = np.random.default_rng(0)
    dense = PointSet(
        np.concatenate([rng.uniform(0, 1, 2000), [0.5, 3.0, 1.5]]), np.concatenate([rng.uniform(0, 1, 2000), [1.1, 1.2, 1.15]])
    )
    triangles = dense.triangles
    assert 2001 not in triangles  # 2 degrees from all others, which are hundredths apart
    wide = PointSet(np.array([0.0, 0, 4, 4, 0.1, 0.1, 0.2]), np.array([0.0, 4, 0, 4, 0.1, 0.2, 0.1]))
    _, inside = interpolation(wide, np.array([3.5, 2.0, 4.2]), np.array([3.5, 2.1, 2.0]))
    assert inside.tolist() == [True, True, False]


def test_half_of_the_earth_as_points() -> None:
    """The equator closes nothing: beyond it is outside."""
    lat, lon = (a.ravel() for a in np.meshgrid(np.arange(0.0, 90, 5), np.arange(0.0, 360, 5), indexing="ij"))
    to = np.array([2.0, 88.0, -2.0, -90.0, -40.0]), np.array([33.0, 3.0, 33.0, 0.0, 10.0])
    for case in (slice(None), lat >= 5):
        _, inside = interpolation(PointSet(lat[case], lon[case]), *to)
        assert inside.tolist() == [case == slice(None) if isinstance(case, slice) else False, True, False, False, False]


def test_points_are_sources_of_regridding() -> None:
    """A rotated grid as points: the same field, to the accuracy of linear interpolation."""
    grid = rotated(spacing=0.3)
    field = np.cos(np.radians(4 * grid.lat)) + np.sin(np.radians(3 * grid.lon))
    flat = grid.assign(t=field).stack(cell=("y", "x")).reset_index("cell").drop_vars(["x", "y"])
    target = plain(47, 53, 13, 23, 0.37)
    points = xgenda.regrid(flat, target, regridder="builtin").t
    cells = xgenda.regrid(grid.assign(t=field), target, regridder="builtin").t
    assert points.notnull().all()
    np.testing.assert_allclose(points, cells, atol=2e-4)
    np.testing.assert_allclose(
        points, np.cos(np.radians(4 * target.latitude)) + np.sin(np.radians(3 * target.longitude)), atol=2e-4
    )


# -- what is refused ---------------------------------------------------------------------------------------------------

PROJECTED = ("projection_y_coordinate", "projection_x_coordinate")
BAD = {
    "method": (lambda: xgenda.regrid(ocean(), ocean(), method="cubic"), OptionError, "method='cubic' is not accepted"),
    "regridder": (lambda: xgenda.regrid(ocean(), ocean(), regridder="esmf"), OptionError, "regridder='esmf' is not accepted"),
    "patch, built in": (
        lambda: xgenda.regrid(ocean(), ocean(), method="patch", regridder="builtin"), OptionError, "method='patch' is not built in; leave out",
    ),
    "skipna": (lambda: xgenda.regrid(ocean(), ocean(), skipna=1), OptionError, "skipna=1 is not accepted"),  # type: ignore[arg-type]
    "threshold": (lambda: xgenda.regrid(ocean(), ocean(), na_thres=2), OptionError, "na_thres=2 is not accepted; .* from 0 to 1"),
    "extrapolate": (lambda: xgenda.regrid(ocean(), ocean(), extrapolate="linear"), OptionError, "extrapolate='linear' is not accepted"),
    "extrapolated mean": (
        lambda: xgenda.regrid(ocean(), ocean(), method="conservative", extrapolate="nearest"),
        OptionError, "does not go with method='conservative'",
    ),
    "no grid": (lambda: xgenda.regrid(ocean(), xr.Dataset({"a": 1})), CoordinateError, "target has no latitude and longitude"),
    "no fields": (lambda: xgenda.regrid(ocean()[["time"]].assign_coords(ocean().coords), ocean()), OptionError, "ds has no variable with"),
    "a string": (
        lambda: xgenda.regrid(ocean().assign(n=(("latitude", "longitude"), np.full((21, 21), "x"))), plain(0, 5, 0, 5, 1)),
        OptionError, r"ds\['n'\] has dtype <U1; only numbers can be regridded: ds.drop_vars\('n'\)",
    ),
    "NaN position": (
        lambda: xgenda.regrid(ocean(), rotated().pipe(lambda d: d.assign_coords(lat=d.lat.where(d.lat > 50)))),
        CoordinateError, "target: coordinate 'lat' holds .* values that are not finite numbers; a grid needs a position for every cell",
    ),
    "latitude of 100": (
        lambda: xgenda.regrid(ocean(), rotated().pipe(lambda d: d.assign_coords(lat=d.lat + 60))), GridError, "a latitude lies in -90 to 90",
    ),
    "different dims": (
        lambda: xgenda.regrid(ocean(), xr.Dataset(coords={"lat": (("y", "x"), np.zeros((2, 3))), "lon": ("x", np.zeros(3))})),
        CoordinateError, r"'lat' has dimensions \('y', 'x'\) and 'lon' has \('x',\)",
    ),
    "metres without a projection": (
        lambda: xgenda.regrid(ocean(), with_mapping({}, PROJECTED, (np.arange(3.0), np.arange(3.0)), "m")),
        CoordinateError, "no projection coordinates with a CF grid mapping",
    ),
    "wrong bounds": (
        lambda: xgenda.regrid(ocean(), rotated(4, 5).assign_coords(lat_b=(("a", "b"), np.zeros((3, 3))), lon_b=(("a", "b"), np.zeros((3, 3))))),
        GridError, r"bounds 'lat_b' of 'lat' have shape \(3, 3\); \(4, 5, 4\) or \(5, 6\) is needed",
    ),
    "another grid": (
        lambda: xgenda.Regridder(ocean(), plain(0, 5, 0, 5, 1), regridder="builtin")(ocean().isel(latitude=slice(5))),
        GridError, r"ds is on 5 x 21.*, and this Regridder starts from 21 x 21",
    ),
    "a mask with NaN": (
        lambda: xgenda.regrid(ocean(), plain(0, 5, 0, 5, 1), source_mask=ocean().sst.isel(time=0)), OptionError, "source_mask holds NaN",
    ),
    "all masked": (
        lambda: xgenda.regrid(ocean(), plain(0, 5, 0, 5, 1), method="nearest", regridder="builtin", source_mask=ocean().sst.isel(time=0) > 1e9),
        GridError, "Every cell of the source is masked",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(HAS_XESMF, reason="xESMF is installed")
def test_what_only_xesmf_does() -> None:
    for options in ({"method": "patch"}, {"regridder": "xesmf"}):
        with pytest.raises(MissingDependencyError, match="conda install -c conda-forge xesmf"):
            xgenda.regrid(ocean(), plain(0, 5, 0, 5, 1), **options)


@pytest.mark.parametrize("method", ["bilinear", "conservative", "conservative_normed", "nearest"])
def test_the_default_does_not_depend_on_what_is_installed(method: str) -> None:
    out = xgenda.regrid(ocean(), plain(0, 5, 0, 5, 1), method=method)
    assert out.attrs["xgenda_regridder"] == "builtin"
    assert "regridder='builtin'" in out.attrs["history"]


# -- grids -------------------------------------------------------------------------------------------------------------


def test_rotated_poles_are_those_of_proj() -> None:
    pyproj = pytest.importorskip("pyproj")
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(-70, 70, 200), rng.uniform(-180, 180, 200)
    for pole_lat, pole_lon, offset in ((39.25, -162.0, 0.0), (37.5, 177.5, 0.0), (52.0, 10.0, 25.0)):
        attrs = {
            "grid_mapping_name": "rotated_latitude_longitude", "grid_north_pole_latitude": pole_lat,
            "grid_north_pole_longitude": pole_lon, "north_pole_grid_longitude": offset,
        }  # fmt: skip
        crs = pyproj.CRS.from_cf(attrs)
        x, y = pyproj.Transformer.from_crs(crs, crs.source_crs, always_xy=True).transform(lon, lat)
        found = unrotate(lat, lon, pole_lat, pole_lon, offset)
        np.testing.assert_allclose(found[0], y, atol=1e-9)
        np.testing.assert_allclose((found[1] - x + 180) % 360, 180.0, atol=1e-9)


def with_mapping(
    attrs: dict[str, object], names: tuple[str, str], values: tuple[np.ndarray, np.ndarray], units: str
) -> xr.Dataset:
    coords = {d: (d, v, {"standard_name": n, "units": units}) for d, n, v in zip("yx", names, values, strict=True)}
    return xr.Dataset({"t": (("y", "x"), np.zeros((len(values[0]), len(values[1])))), "crs": ((), 0, attrs)}, coords=coords)


def test_grid_mappings_give_positions() -> None:
    turned = with_mapping(
        {"grid_mapping_name": "rotated_latitude_longitude", "grid_north_pole_latitude": 39.25, "grid_north_pole_longitude": -162.0},
        ("grid_latitude", "grid_longitude"), (np.arange(-5.0, 5), np.arange(-8.0, 8)), "degrees",
    )  # fmt: skip
    grid = read_grid(turned).grid
    assert isinstance(grid, CurvilinearGrid)
    assert (grid.latitude[5, 8], grid.longitude[5, 8]) == (pytest.approx(50.75), pytest.approx(18.0))
    pytest.importorskip("pyproj")
    attrs = {
        "grid_mapping_name": "lambert_conformal_conic", "standard_parallel": [38.5, 38.5], "latitude_of_projection_origin": 38.5,
        "longitude_of_central_meridian": -97.5, "earth_radius": 6371229.0,
    }  # fmt: skip
    for scale, units in ((1.0, "m"), (1e-3, "km")):
        axis = np.arange(-5, 6) * 3000.0 * scale
        hrrr = read_grid(with_mapping(attrs, PROJECTED, (axis, axis), units)).grid
        assert (hrrr.latitude[5, 5], hrrr.longitude[5, 5]) == (pytest.approx(38.5), pytest.approx(-97.5))
        assert np.sqrt(hrrr.areas()[5, 5]) == pytest.approx(3000.0, rel=1e-3)


def test_without_pyproj_other_projections_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyproj", None)
    stereographic = with_mapping({"grid_mapping_name": "polar_stereographic"}, PROJECTED, (np.arange(3.0), np.arange(3.0)), "m")
    with pytest.raises(
        MissingDependencyError, match=r"positions of a polar_stereographic grid needs .*pip install 'xgenda\[crs\]'"
    ):
        read_grid(stereographic)


def test_curvilinear_grids_know_where_they_close() -> None:
    lat, lon = np.meshgrid(np.linspace(-80, 80, 17), np.arange(0, 360, 10.0), indexing="ij")
    whole, part = CurvilinearGrid(lat, lon), CurvilinearGrid(lat[:, :-6], lon[:, :-6])
    assert (whole.periodic, part.periodic) == (True, False)
    assert len(whole.quads()) == 16 * 36
    assert len(part.quads()) == 16 * 29
    assert whole.areas().sum() == pytest.approx(SPHERE * np.sin(np.radians(85)), rel=2e-3)
    assert whole.same_as(CurvilinearGrid(lat, lon - 360))
    assert not whole.same_as(part)
    assert "periodic" in whole.describe()


def test_bounds_are_used() -> None:
    lat, lon = np.array([10.0, 20.0, 40.0]), np.array([0.0, 10.0])
    ds = xr.Dataset(coords={"lat": ("lat", lat, {"bounds": "lat_bnds"}), "lon": ("lon", lon, {"bounds": "lon_bnds"})})
    ds["lat_bnds"] = (("lat", "n"), [[5.0, 15.0], [15.0, 30.0], [30.0, 50.0]])
    ds["lon_bnds"] = (("lon", "n"), [[-5.0, 5.0], [5.0, 20.0]])
    for case in (ds, ds.isel(lat=slice(None, None, -1)), ds.assign_coords(lon=(ds.lon + 360).assign_attrs(ds.lon.attrs))):
        grid = read_grid(case).grid
        assert isinstance(grid, Grid)
        rows, columns = grid.edges()
        assert rows.tolist() == [5.0, 15.0, 30.0, 50.0]
        assert (columns - columns[0]).tolist() == [0.0, 10.0, 25.0]
    gap = ds.copy()
    gap["lat_bnds"] = (("lat", "n"), [[5.0, 15.0], [16.0, 30.0], [30.0, 50.0]])
    assert read_grid(gap).grid.edges()[0].tolist() == [5.0, 15.0, 30.0, 50.0]  # inferred: those given leave a gap


def test_bilinear_over_the_poles_for_observations() -> None:
    grid = globe(18, 36)
    y, x = grid.points()
    field = np.cos(np.radians(y)) * np.cos(np.radians(x))  # linear in the plane that touches the pole
    lat, lon = np.array([85.0, 87.0, 89.9, -88.0, -90.0]), np.array([0.0, 130.0, -60.0, 10.0, 0.0])
    operator, inside = interpolation(grid, lat, lon)
    assert inside.all()
    assert operator(field) == pytest.approx(np.cos(np.radians(lat)) * np.cos(np.radians(lon)), abs=2e-3)
    assert operator(np.ones(grid.size)) == pytest.approx(np.ones(5))
    _, outside = interpolation(Grid(grid.latitude[:-2], grid.longitude), lat, lon)
    assert outside.tolist() == [False, False, False, True, True]


def test_the_accessor_forwards() -> None:
    ds, target = ocean(), plain(-10, 10, 5, 30, 5)
    options = {"method": "nearest", "regridder": "builtin", "skipna": True, "na_thres": 0.5}
    xr.testing.assert_equal(ds.genda.regrid(target, **options), xgenda.regrid(ds, target, **options))
    assert ds.sst.genda.regrid(target, **options).name == "sst"

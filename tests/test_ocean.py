"""Currents against closed forms on the sphere, coefficients that are known, and parts that add up."""

from __future__ import annotations

import dask
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from xgenda.errors import CoordinateError, GendaError, GridError, OptionError, StateError, UnitsError
from xgenda.grids import EARTH_RADIUS
from xgenda.ocean import (
    GRAVITY,
    ROTATION,
    compose_velocity,
    coriolis_parameter,
    decompose_velocity,
    ekman_velocity,
    fit_ekman,
    geostrophic_velocity,
    wind_stress,
)


def on_sphere(function: object, latitude: np.ndarray, longitude: np.ndarray, **attrs: str) -> xr.DataArray:
    """Return values of a function of latitude and longitude in radians."""
    phi, lam = np.meshgrid(np.radians(latitude), np.radians(longitude), indexing="ij")
    return xr.DataArray(
        function(phi, lam),  # type: ignore[operator]
        dims=("latitude", "longitude"),
        coords={"latitude": latitude, "longitude": longitude},
        attrs={"units": "m"} | attrs,
    )


def region(n: int = 24, **attrs: str) -> xr.DataArray:
    """A hill and a wave around 38 north."""
    return on_sphere(
        lambda phi, lam: np.sin(20 * phi + 15 * lam) + 0.5 * np.cos(25 * lam),
        np.linspace(30, 46, n),
        np.linspace(-65, -45, n),
        **attrs,
    )


def series(times: int = 40, seed: int = 0) -> dict[str, xr.DataArray]:
    """Velocities, sea surface height and wind stress over time on a small grid."""
    rng = np.random.default_rng(seed)
    coords = {
        "time": pd.date_range("2000-01-01", periods=times), "latitude": np.linspace(30, 34, 5), "longitude": np.linspace(-60, -55, 6),
    }  # fmt: skip
    scales = {"u": (0.3, "m s-1"), "v": (0.3, "m s-1"), "ssh": (0.02, "m"), "tau_x": (0.1, "N m-2"), "tau_y": (0.1, "N m-2")}
    return {
        name: xr.DataArray(scale * rng.normal(size=(times, 5, 6)), coords, name=name, attrs={"units": units})
        for name, (scale, units) in scales.items()
    }


# -- Coriolis ----------------------------------------------------------------------------------------------------------


def test_coriolis_parameter() -> None:
    assert coriolis_parameter(30.0) == pytest.approx(ROTATION)
    assert coriolis_parameter(45) == pytest.approx(1.0312608e-4, rel=1e-7)
    assert coriolis_parameter(-90.0) == pytest.approx(-1.458423e-4)
    assert 2 * np.pi / ROTATION == pytest.approx(86164.1, abs=0.1)  # the sidereal day, not the solar one
    found = coriolis_parameter(np.array([[0.0, 30.0]]))
    assert isinstance(found, np.ndarray)
    assert found == pytest.approx(np.array([[0.0, ROTATION]]))
    labelled = coriolis_parameter(region().latitude)
    assert isinstance(labelled, xr.DataArray)
    assert labelled.attrs["standard_name"] == "coriolis_parameter"
    assert labelled.attrs["units"] == "s-1"


# -- geostrophic velocity ----------------------------------------------------------------------------------------------


def test_solid_body_rotation_in_every_latitude() -> None:
    # u = U cos(lat) balances height -(R Omega U / g) sin(lat)^2
    height = on_sphere(
        lambda phi, lam: -EARTH_RADIUS * ROTATION * 0.5 / GRAVITY * np.sin(phi) ** 2, np.arange(-89.5, 90), np.arange(0.0, 360, 2)
    )
    found = geostrophic_velocity(height)
    expected = 0.5 * np.cos(np.radians(height.latitude))
    away = abs(height.latitude) >= 5
    error = abs(found.u_geostrophic - expected).where(away)
    assert float(error.isel(latitude=slice(1, -1)).max()) < 2e-4
    assert float(error.max()) < 1e-2
    assert float(abs(found.v_geostrophic).max()) < 1e-12
    assert found.u_geostrophic.notnull().all("longitude").equals(away)
    assert found.v_geostrophic.notnull().all("longitude").equals(away)
    assert found.u_geostrophic.attrs["standard_name"] == "surface_geostrophic_eastward_sea_water_velocity"
    assert found.v_geostrophic.attrs["standard_name"] == "surface_geostrophic_northward_sea_water_velocity"
    assert found.u_geostrophic.attrs["units"] == found.v_geostrophic.attrs["units"] == "m s-1"


def test_a_zonal_wave_has_the_metric_of_its_row() -> None:
    height = on_sphere(lambda phi, lam: np.sin(3 * lam), np.array([-60.0, -20.0, 20.0, 60.0]), np.arange(-180.0, 180, 0.5))
    v = geostrophic_velocity(height).v_geostrophic
    for latitude in height.latitude.values:
        factor = GRAVITY / coriolis_parameter(latitude) / (EARTH_RADIUS * np.cos(np.radians(latitude)))
        expected = factor * 3 * np.cos(3 * np.radians(height.longitude.values))
        assert v.sel(latitude=latitude).values == pytest.approx(expected, rel=2e-4, abs=1e-4 * abs(factor))


@pytest.mark.parametrize("uneven", [False, True])
def test_second_order(uneven: bool) -> None:
    def error(n: int) -> float:
        s = np.linspace(0, 1, n)
        s = s + 0.1 * np.sin(2 * np.pi * s) if uneven else s
        height = on_sphere(lambda phi, lam: np.sin(20 * phi + 15 * lam), 30 + 10 * s, -60 + 10 * s)
        phi, lam = np.meshgrid(np.radians(height.latitude), np.radians(height.longitude), indexing="ij")
        slope = np.cos(20 * phi + 15 * lam) * GRAVITY / (coriolis_parameter(np.degrees(phi)) * EARTH_RADIUS)
        found = geostrophic_velocity(height)
        return max(
            float(np.abs(found.u_geostrophic + 20 * slope).max()),
            float(np.abs(found.v_geostrophic - 15 * slope / np.cos(phi)).max()),
        )  # edges and all

    errors = [error(n) for n in (21, 41, 81)]
    assert np.log2(np.array(errors[:-1]) / errors[1:]) == pytest.approx(2.0, abs=0.25)


def test_order_and_direction_do_not_matter() -> None:
    height = xr.concat([region(), 2 * region() ** 2], "time", join="exact").assign_coords(time=[0, 1])
    expected = geostrophic_velocity(height)
    for other in (
        height.isel(latitude=slice(None, None, -1)),
        height.isel(longitude=slice(None, None, -1)),
        height.transpose("longitude", "time", "latitude"),
        height.assign_coords(longitude=height.longitude % 360),
        height.rename(latitude="lat", longitude="lon"),
        height.to_dataset(name="zos").zos,
    ):
        found = geostrophic_velocity(other)
        assert found.u_geostrophic.dims == other.dims
        names = {"lat": "latitude", "lon": "longitude"}
        found = found.rename({k: v for k, v in names.items() if k in found.dims})
        found = found.assign_coords(longitude=(found.longitude + 180) % 360 - 180).sortby(["latitude", "longitude"])
        xr.testing.assert_allclose(found.transpose(*expected.u_geostrophic.dims), expected, rtol=1e-9)


def test_a_global_grid_has_no_seam() -> None:
    height = on_sphere(lambda phi, lam: np.sin(2 * lam) * np.cos(phi), np.arange(-60.0, 61, 5), np.arange(0.0, 360, 5))
    found = geostrophic_velocity(height)
    rolled = geostrophic_velocity(height.assign_coords(longitude=(height.longitude + 180) % 360 - 180).sortby("longitude"))
    rolled = rolled.assign_coords(longitude=rolled.longitude % 360).sortby("longitude")
    xr.testing.assert_allclose(found, rolled)
    v = found.v_geostrophic.sel(latitude=45)
    assert float(v[0]) == pytest.approx(float(v[36]), rel=1e-9)  # half a turn on, the wave is the same


@pytest.mark.parametrize(("units", "scale"), [("cm", 100.0), ("mm", 1000.0), ("m", 1.0)])
def test_units_of_the_height(units: str, scale: float) -> None:
    expected = geostrophic_velocity(region())
    xr.testing.assert_allclose(geostrophic_velocity((scale * region()).assign_attrs(units=units)), expected)


def test_a_height_without_units_is_in_metres() -> None:
    xr.testing.assert_allclose(geostrophic_velocity(region().drop_attrs()), geostrophic_velocity(region()))


def test_single_precision_and_whole_numbers() -> None:
    assert geostrophic_velocity(region().astype("float32")).u_geostrophic.dtype == "float32"
    xr.testing.assert_allclose(geostrophic_velocity(region().astype("float32")), geostrophic_velocity(region()), atol=1e-4)
    millimetres = (1000 * region()).round().astype("int32").assign_attrs(units="mm")
    xr.testing.assert_allclose(geostrophic_velocity(millimetres), geostrophic_velocity(region()), atol=0.1)


def test_land_spoils_its_neighbours_only() -> None:
    height = region()
    full = geostrophic_velocity(height)
    height[10, 12] = np.nan
    height[0, 2] = height[2, 20] = np.nan  # at an edge, and two cells from one
    found = geostrophic_velocity(height)
    for name, step in (("u_geostrophic", (1, 0)), ("v_geostrophic", (0, 1))):
        missing = {
            (i + sign * step[0], j + sign * step[1]) for i, j in ((10, 12), (0, 2), (2, 20)) for sign in (-1, 0, 1)
        }  # fmt: skip
        missing = {(i, j) for i, j in missing if i >= 0}
        assert set(zip(*np.nonzero(found[name].isnull().values), strict=True)) == missing
        same = found[name].notnull() & (abs(found[name] - full[name]) < 1e-12)
        assert int((found[name].notnull() & ~same).sum()) <= 2  # the edge cells take the first order


@pytest.mark.parametrize(("equator", "rows"), [(5.0, 9), (0.0, 1), (12.5, 25)])
def test_the_equator_is_masked(equator: float, rows: int) -> None:
    height = on_sphere(lambda phi, lam: np.sin(lam) + phi, np.arange(-20.0, 21), np.arange(0.0, 20))
    found = geostrophic_velocity(height, equator=equator)
    assert int(found.u_geostrophic.isnull().all("longitude").sum()) == rows
    assert np.isfinite(found.u_geostrophic.where(abs(height.latitude) >= max(equator, 0.5), 0.0)).all()


def test_poles_have_no_east() -> None:
    height = on_sphere(lambda phi, lam: np.cos(phi) * np.sin(lam), np.arange(-90.0, 91, 5), np.arange(0.0, 360, 5))
    found = geostrophic_velocity(height)
    assert found.isel(latitude=[0, -1]).to_array().isnull().all()
    assert float(abs(found.v_geostrophic).max()) < 1.0


def test_smoothing_a_wave() -> None:
    # a Gaussian of width s leaves exp(-(k s)^2 / 2) of a wave of wavenumber k
    cell, waves = 0.25, 36
    height = on_sphere(lambda phi, lam: np.sin(waves * lam) + 0 * phi, np.arange(30.0, 60, cell), np.arange(0.0, 360, cell))
    plain, smooth = (geostrophic_velocity(height, smoothing=s).v_geostrophic for s in (None, 60.0))
    for latitude in (35.0, 45.0, 55.0):
        k = waves / (EARTH_RADIUS * np.cos(np.radians(latitude)))
        ratio = float(smooth.sel(latitude=latitude).std() / plain.sel(latitude=latitude).std())
        assert ratio == pytest.approx(np.exp(-((k * 60e3) ** 2) / 2), rel=0.03)
    north = on_sphere(lambda phi, lam: np.sin(waves * phi) + 0 * lam, np.arange(30.0, 60, cell), np.arange(0.0, 20, cell))
    plain, smooth = (geostrophic_velocity(north, smoothing=s).u_geostrophic for s in (None, 100.0))
    inner = {"latitude": slice(40, 80)}
    expected = np.exp(-((waves / EARTH_RADIUS * 100e3) ** 2) / 2)
    assert float(smooth.isel(inner).std() / plain.isel(inner).std()) == pytest.approx(expected, rel=0.03)


def test_smoothing_leaves_a_uniform_current_and_land() -> None:
    scale = 0.3 * 2 * ROTATION * EARTH_RADIUS / GRAVITY
    height = on_sphere(lambda phi, lam: scale * np.cos(phi) + 0 * lam, np.arange(30.0, 45, 0.5), np.arange(0.0, 20, 0.5))
    height[10:14, 10:14] = np.nan
    plain, smooth = geostrophic_velocity(height), geostrophic_velocity(height, smoothing=80.0)
    assert smooth.u_geostrophic.isnull().equals(plain.u_geostrophic.isnull())
    known = smooth.u_geostrophic.values[smooth.u_geostrophic.notnull().values]
    assert known == pytest.approx(0.3, abs=2e-3)
    assert geostrophic_velocity(height * np.nan, smoothing=80.0).to_array().isnull().all()


def test_uneven_longitudes_are_not_smoothed() -> None:
    height = region().isel(longitude=[0, 1, 2, 4, 7, 11])
    geostrophic_velocity(height)
    with pytest.raises(GridError, match=r"ssh: smoothing needs evenly spaced longitudes; .* Leave it out: smoothing=None"):
        geostrophic_velocity(height, smoothing=50.0)


# -- wind stress -------------------------------------------------------------------------------------------------------


def test_wind_stress() -> None:
    wind = region().assign_attrs(units="m s-1")
    found = wind_stress(3.0 + 0 * wind.assign_attrs(units="m s-1"), 4.0 + 0 * wind)
    assert found.tau_x.values == pytest.approx(1.2 * 1.2e-3 * 5 * 3)
    assert found.tau_y.values == pytest.approx(1.2 * 1.2e-3 * 5 * 4)
    assert found.tau_x.attrs["standard_name"] == "surface_downward_eastward_stress"
    assert found.tau_y.attrs["standard_name"] == "surface_downward_northward_stress"
    assert found.tau_x.attrs["units"] == "N m-2"
    other = wind_stress(3 + 0 * wind, 4 + 0 * wind, air_density=2.4, drag=0.6e-3)
    xr.testing.assert_allclose(other, found)
    knots = ((3 + 0 * wind) * 3600 / 1852).assign_attrs(units="knot")
    xr.testing.assert_allclose(wind_stress(knots, 4 + 0 * wind), found)


# -- Ekman -------------------------------------------------------------------------------------------------------------

TRUE = {"C_ux": 0.35, "C_uy": 0.12, "C_vx": -0.15, "C_vy": 0.28}


def driven(stress: dict[str, xr.DataArray], noise: float, seed: int = 1) -> tuple[xr.DataArray, xr.DataArray]:
    """Velocities that the stress drives with the coefficients `TRUE`, which vary from cell to cell, and noise."""
    rng = np.random.default_rng(seed)
    x, y = stress["tau_x"], stress["tau_y"]
    scale = 1 + 0.1 * (y.latitude - 32)
    u, v = scale * (TRUE["C_ux"] * x + TRUE["C_uy"] * y), scale * (TRUE["C_vx"] * x + TRUE["C_vy"] * y)
    return ((a + noise * rng.normal(size=a.shape)).transpose(*x.dims).assign_attrs(units="m s-1") for a in (u, v))  # type: ignore[return-value]


@pytest.mark.parametrize("intercept", [False, True])
def test_known_coefficients_are_found(intercept: bool) -> None:
    stress = {n: a for n, a in series(400).items() if n.startswith("tau")}
    stress["tau_x"] = stress["tau_x"] + 0.5 * stress["tau_y"]  # correlated with each other
    u, v = driven(stress, 0.05)
    if intercept:
        u, v = u + 0.4, v - 0.2
    found = fit_ekman(u, v, **stress, intercept=intercept)
    scale = 1 + 0.1 * (found.latitude - 32)
    assert list(found) == [*TRUE, *(["C_u", "C_v"] if intercept else [])]
    for name, value in TRUE.items():
        # standard error: noise / (spread of the stress that the other does not share * sqrt(times))
        assert float(abs(found[name] - value * scale).max()) < 4.5 * 0.05 / (0.089 * 20)
        assert float((found[name] - value * scale).mean()) == pytest.approx(0.0, abs=0.02)
        assert found[name].attrs["units"] == "m3 N-1 s-1"
        assert found[name].dims == ("latitude", "longitude")
    if intercept:
        assert float(abs(found.C_u - 0.4).max()) < 4.5 * 0.05 / 20
        assert float(abs(found.C_v + 0.2).max()) < 4.5 * 0.05 / 20


@pytest.mark.parametrize("intercept", [False, True])
def test_the_fit_is_that_of_least_squares(intercept: bool) -> None:
    f = series(30)
    found = fit_ekman(f["u"], f["v"], f["tau_x"], f["tau_y"], intercept=intercept)
    columns = [f["tau_x"][:, 2, 3], f["tau_y"][:, 2, 3], *([np.ones(30)] if intercept else [])]
    for name in "uv":
        expected = np.linalg.lstsq(np.stack(columns, -1), f[name].values[:, 2, 3], rcond=None)[0]
        names = [f"C_{name}x", f"C_{name}y", *([f"C_{name}"] if intercept else [])]
        assert [float(found[n][2, 3]) for n in names] == pytest.approx(expected, rel=1e-9)


def test_cells_that_cannot_be_fitted_are_missing() -> None:
    f = series(30)
    f["u"][4, 1, 1] = np.nan
    f["tau_y"][:, 2, 2] = 0.0
    f["tau_y"][:, 3, 3] = 2 * f["tau_x"][:, 3, 3]
    found = fit_ekman(f["u"], f["v"], f["tau_x"], f["tau_y"])
    for array in found.values():
        missing = np.argwhere(array.isnull().values).tolist()
        assert missing == [[1, 1], [2, 2], [3, 3]]


def test_units_of_the_fit() -> None:
    f = series(30)
    expected = fit_ekman(f["u"], f["v"], f["tau_x"], f["tau_y"])
    in_cm = (100 * f["u"]).assign_attrs(units="cm s-1")
    in_dyn = (10 * f["tau_x"]).assign_attrs(units="dyn cm-2")
    xr.testing.assert_allclose(fit_ekman(in_cm, f["v"], in_dyn, f["tau_y"]), expected)
    xr.testing.assert_allclose(ekman_velocity(expected, in_dyn, f["tau_y"]), ekman_velocity(expected, f["tau_x"], f["tau_y"]))


def test_ekman_velocity() -> None:
    f = series(5)
    ones = xr.ones_like(f["tau_x"][0], dtype=float).drop_vars("time")
    coefficients = xr.Dataset({n: c * ones for n, c in TRUE.items()})
    found = ekman_velocity(coefficients, f["tau_x"], f["tau_y"])
    xr.testing.assert_allclose(found.u_ekman, 0.35 * f["tau_x"] + 0.12 * f["tau_y"])
    xr.testing.assert_allclose(found.v_ekman, -0.15 * f["tau_x"] + 0.28 * f["tau_y"])
    assert found.u_ekman.dims == f["tau_x"].dims
    assert found.u_ekman.attrs["standard_name"] == "eastward_sea_water_velocity_due_to_ekman_drift"
    shifted = ekman_velocity(coefficients.assign(C_u=0.1 * ones, C_v=-0.1 * ones), f["tau_x"], f["tau_y"])
    xr.testing.assert_allclose(shifted.u_ekman, found.u_ekman + 0.1)
    xr.testing.assert_allclose(shifted.v_ekman, found.v_ekman - 0.1)


# -- all parts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([None, 60.0]), st.booleans())
def test_decompose_and_compose(seed: int, wind: bool, intercept: bool, smoothing: float | None, turned: bool) -> None:
    f = series(12, seed)
    if turned:
        f["v"] = f["v"].transpose("longitude", "time", "latitude")
    stress = {n: f[n] for n in ("tau_x", "tau_y")} if wind else {}
    parts = decompose_velocity(f["u"], f["v"], f["ssh"], **stress, intercept=intercept, smoothing=smoothing)
    assert ("u_ekman" in parts) == ("C_ux" in parts) == wind
    kept = [n for n in parts if not str(n).endswith("_geostrophic")]
    ways = [compose_velocity(parts), compose_velocity(parts[kept], ssh=f["ssh"], smoothing=smoothing)]
    if wind:
        raw = parts[["u_ageostrophic", "v_ageostrophic"]]
        coefficients = parts[[n for n in parts if str(n).startswith("C_")]]
        ways.append(compose_velocity(raw, ssh=f["ssh"], **stress, coefficients=coefficients, smoothing=smoothing))
        ways.append(compose_velocity(parts, ssh=f["ssh"], **stress, smoothing=smoothing))
    for found in ways:
        for n in ("u", "v"):
            assert found[n].dims == f[n].dims
            assert np.abs(found[n] - f[n]).max() < 1e-12
            assert found[n].notnull().all()


@settings(max_examples=25, deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 10**6), st.sampled_from([None, 40.0]))
def test_geostrophic_velocity_is_linear(a: float, b: float, seed: int, smoothing: float | None) -> None:
    one, other = series(2, seed)["ssh"], series(2, seed + 1)["ssh"]
    found = geostrophic_velocity(a * one + b * other, smoothing=smoothing)
    expected = a * geostrophic_velocity(one, smoothing=smoothing) + b * geostrophic_velocity(other, smoothing=smoothing)
    xr.testing.assert_allclose(found, expected, atol=1e-10)


def test_parts_of_a_known_current() -> None:
    f = series(400)
    u, v = driven(f, 0.02)
    balanced = geostrophic_velocity(f["ssh"])
    parts = decompose_velocity(u + balanced.u_geostrophic, v + balanced.v_geostrophic, f["ssh"], f["tau_x"], f["tau_y"])
    xr.testing.assert_allclose(parts.u_geostrophic, balanced.u_geostrophic)
    assert float(parts.u_ageostrophic.std()) == pytest.approx(0.02, rel=0.05)
    assert float(parts.C_vx.sel(latitude=32).mean()) == pytest.approx(TRUE["C_vx"], abs=0.01)
    for name in ("u_geostrophic", "v_ekman", "u_ageostrophic"):
        assert parts[name].attrs["units"] == "m s-1"
        assert "long_name" in parts[name].attrs
    assert compose_velocity(parts).u.attrs["standard_name"] == "eastward_sea_water_velocity"


def test_coefficients_of_other_years() -> None:
    f = series(60)
    u, v = driven(f, 0.0)
    early, late = ({n: a.isel(time=s) for n, a in {**f, "u": u, "v": v}.items()} for s in (slice(40), slice(40, None)))
    early, late = ({**d, "ssh": 0 * d["ssh"]} for d in (early, late))
    coefficients = fit_ekman(early["u"], early["v"], early["tau_x"], early["tau_y"])
    parts = decompose_velocity(*(late[n] for n in ("u", "v", "ssh", "tau_x", "tau_y")), coefficients=coefficients)
    assert float(abs(parts.u_ageostrophic).max()) < 1e-12
    xr.testing.assert_allclose(parts.C_ux, coefficients.C_ux)


def test_where_a_part_is_missing_so_is_the_remainder() -> None:
    f = series(30)
    f["ssh"][:, 2, 2] = np.nan
    parts = decompose_velocity(*(f[n] for n in ("u", "v", "ssh", "tau_x", "tau_y")))
    assert parts.u_ageostrophic[:, 2, 2].isnull().all()
    assert parts.u_ekman[:, 1, 2].isnull().all()  # a neighbour: no coefficient, rather than one of zero
    assert parts.u_ekman[:, 2, 1].isnull().all()  # both components are fitted to the same cells
    assert parts.u_ekman[:, 1, 1].notnull().all()
    assert compose_velocity(parts).u.isnull().equals(parts.u_ageostrophic.isnull())


# -- dask --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [{"time": 4}, {"latitude": 2, "longitude": 3}])
def test_chunked_fields_stay_lazy(chunks: dict[str, int], no_compute: None) -> None:
    f = series(12)
    lazy = {n: a.chunk(chunks) for n, a in f.items()}
    wind = wind_stress(lazy["u"], lazy["v"])
    parts = decompose_velocity(*(lazy[n] for n in ("u", "v", "ssh", "tau_x", "tau_y")), smoothing=50.0)
    total = compose_velocity(parts, ssh=lazy["ssh"], smoothing=50.0)
    for ds in (wind, parts, total):
        for array in ds.values():
            assert array.chunks is not None
    with dask.config.set(scheduler="synchronous"):
        expected = decompose_velocity(*(f[n] for n in ("u", "v", "ssh", "tau_x", "tau_y")), smoothing=50.0)
        xr.testing.assert_allclose(parts.compute(), expected)
        assert np.abs(total.u.compute() - f["u"]).max() < 1e-12
        xr.testing.assert_allclose(wind.compute(), wind_stress(f["u"], f["v"]))


def test_times_stay_in_their_chunks() -> None:
    found = geostrophic_velocity(series(12)["ssh"].chunk(time=4))
    assert found.u_geostrophic.chunks == ((4, 4, 4), (5,), (6,))
    assert isinstance(coriolis_parameter(region().latitude.to_dataset(name="x").x.chunk()), xr.DataArray)


# -- what is refused ---------------------------------------------------------------------------------------------------


def altered(**changes: object) -> dict[str, object]:
    return {**series(12), **changes}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: geostrophic_velocity(region().to_dataset(name="ssh")),
            OptionError,
            r"ssh is a xarray.*Dataset; .* ssh=ds\['ssh'\]",
        ),
        (lambda: geostrophic_velocity(region().values), OptionError, r"ssh is a numpy.ndarray; an xarray DataArray is needed"),
        (lambda: geostrophic_velocity(region(units="K")), UnitsError, r"ssh: Units 'K' cannot be converted to 'm'"),
        (lambda: geostrophic_velocity(region() > 0), StateError, r"ssh has dtype bool; real numbers are needed"),
        (lambda: geostrophic_velocity(region().rename(latitude="y")), CoordinateError, r"ssh has no latitude coordinate"),
        (lambda: geostrophic_velocity(region()[[2, 1, 3]]), GridError, r"ssh: latitude 'latitude' is not monotonic"),
        (lambda: geostrophic_velocity(region()[:1]), GridError, r"ssh has 1 x 24 cells; gradients need at least 2 x 2"),
        (
            lambda: geostrophic_velocity(region(), equator=-1.0),
            OptionError,
            r"equator=-1.0 is not accepted; .* example equator=5",
        ),
        (lambda: geostrophic_velocity(region(), smoothing=0), OptionError, r"smoothing=0 is not accepted; .* in kilometres"),
        (lambda: wind_stress(region(), region()), UnitsError, r"u10: Units 'm' cannot be converted to 'm s-1'"),
        (lambda: wind_stress(region().drop_attrs(), 1.0), OptionError, r"v10 is a builtins.float"),
        (lambda: wind_stress(series()["u"], series()["v"][1:]), OptionError, r"u10 and v10 have different coordinates"),
        (lambda: wind_stress(series()["u"], series()["v"], drag=-1), OptionError, r"drag=-1 is not accepted; .* drag=1.2e-3"),
        (lambda: decompose_velocity(**altered(tau_y=None)), OptionError, r"tau_x is given without tau_y; add it: tau_y="),
        (lambda: decompose_velocity(**altered(ssh=series(11)["ssh"])), OptionError, r"u, v, ssh, .* have different coordinates"),
        (
            lambda: decompose_velocity(**altered(tau_x=None, tau_y=None), coefficients=xr.Dataset()),
            OptionError,
            r"coefficients are given without wind stress; add it",
        ),
        (
            lambda: decompose_velocity(**altered(), coefficients=xr.Dataset()),
            OptionError,
            r"coefficients lack 'C_ux', .*fit_ekman",
        ),
        (lambda: decompose_velocity(**altered(), time="day"), CoordinateError, r"residual_u has dimensions .* lacks 'day'"),
        (lambda: decompose_velocity(**series(2)), OptionError, r"2 times along 'time' cannot fix 2 coefficients in each cell"),
        (lambda: compose_velocity(series()["u"]), OptionError, r"parts is a DataArray; a Dataset is needed"),
        (lambda: compose_velocity(xr.Dataset(series())), OptionError, r"parts lack 'u_ageostrophic', .*; they have 'u', 'v'"),
        (
            lambda: compose_velocity(xr.Dataset({"u_ageostrophic": series()["u"], "v_ageostrophic": series()["v"]})),
            OptionError,
            r"parts lack 'u_geostrophic', 'v_geostrophic'; .* Give the sea surface height: ssh=",
        ),
    ],
)
def test_bad_input(call: object, error: type[GendaError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]

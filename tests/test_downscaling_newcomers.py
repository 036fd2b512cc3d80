"""What somebody who downscales for the first time stumbles over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

import xgenda
from xgenda.errors import CheckpointError, CoordinateError, GridError, OptionError, StateError, UnitsError
from xgenda.models.corrdiff import read_corrdiff_output
from xgenda.models.physicsnemo import write_mdlus
from xgenda.models.templates import remembered_axes
from xgenda.states import enter

FAST: dict[str, Any] = {"steps": 2, "width": 8, "progress": False, "anchor": None, "calibrate": False}


def fields(lon: np.ndarray, lat: np.ndarray | None = None, n: int = 24) -> xr.Dataset:
    lat = np.arange(40.05, 41.6, 0.1) if lat is None else lat
    rng = np.random.default_rng(0)
    large = rng.normal(size=(n, 1, 1)) + rng.normal(size=(n, len(lat), 1)).cumsum(1) / 4
    values = 280 + large + 0.3 * rng.normal(size=(n, len(lat), len(lon)))
    return xr.Dataset(
        {"t": (("time", "lat", "lon"), values, {"units": "K"})},
        coords={"time": np.datetime64("2020-01-01", "ns") + np.arange(n) * np.timedelta64(1, "D"), "lat": lat, "lon": lon},
    )


def coarse_of(fine: xr.Dataset) -> xr.Dataset:
    out: xr.Dataset = fine.coarsen(lat=4, lon=4).mean()
    return out


@pytest.mark.parametrize("start", [6.05, -94.05, 266.05, 350.05])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_results_align_with_the_fine_fields(start: float, dtype: str) -> None:
    fine = fields((start + 0.1 * np.arange(16)).astype(dtype)).isel(lat=slice(None, None, -1))
    model = xgenda.train(fine, task="downscale", factor=4, method="ridge")
    found = coarse_of(fine).isel(time=[0]).genda.downscale(model=model, members=2, seed=0)
    assert (fine.isel(time=[0]) - found).sizes == {"time": 1, "lat": 16, "lon": 16, "member": 2}
    assert found.lon.dtype == dtype


def test_rotated_axes_and_grid_mapping_come_back() -> None:
    axes = {"rlat": np.linspace(-1, 1, 12), "rlon": np.linspace(-1, 1, 16)}
    rng = np.random.default_rng(0)
    pole = {
        "grid_mapping_name": "rotated_latitude_longitude",
        "grid_north_pole_latitude": 49.0,
        "grid_north_pole_longitude": -170.0,
    }
    fine = xr.Dataset(
        {"t": (("time", "rlat", "rlon"), 280 + rng.normal(size=(24, 12, 16)), {"units": "K", "grid_mapping": "pole"})},
        coords={"time": np.datetime64("2020-01-01", "ns") + np.arange(24) * np.timedelta64(1, "D"),
                "rlat": ("rlat", axes["rlat"], {"standard_name": "grid_latitude", "units": "degrees"}),
                "rlon": ("rlon", axes["rlon"], {"standard_name": "grid_longitude", "units": "degrees"}), "pole": ((), 0, pole)},
    )  # fmt: skip
    assert remembered_axes(enter(fine))["mapping"]["attrs"] == pole
    positions = enter(fine).ds
    lat, lon = positions.latitude, positions.longitude
    grid = {
        "latitude": np.linspace(float(lat.min()) - 1, float(lat.max()) + 1, 5),
        "longitude": np.linspace(float(lon.min()) - 1, float(lon.max()) + 1, 5),
    }
    coarse = xr.Dataset(
        {"t": (("time", "latitude", "longitude"), 280 + rng.normal(size=(24, 5, 5)), {"units": "K"})},
        coords={"time": fine.time, **grid},
    )
    model = xgenda.train(coarse, target=fine, task="downscale", method="ridge")
    found = coarse.isel(time=[0]).genda.downscale(model=model, members=2, seed=0)
    for n in axes:
        np.testing.assert_array_equal(found[n], fine[n])
        assert found[n].attrs["standard_name"] == fine[n].attrs["standard_name"]
    assert found.t.attrs["grid_mapping"] == "pole"
    assert found["pole"].attrs == pole
    again = enter(found.drop_vars(["latitude", "longitude"], errors="ignore").isel(member=0))
    assert again.grid.same_as(enter(fine).grid)


def test_rain_stays_within_what_is_known() -> None:
    rng = np.random.default_rng(0)
    fine = fields(6.05 + 0.1 * np.arange(16))
    rain = np.where(rng.random(fine.t.shape) < 0.6, 0.0, rng.exponential(5.0, fine.t.shape))
    fine = fine.assign(pr=(fine.t.dims, rain, {"units": "mm day-1"}))[["pr"]]
    model = xgenda.train(fine, task="downscale", factor=4, transform="log", offset=0.1, conserve=False, **FAST)
    assert model.spec.scaling is not None
    assert model.spec.scaling.bounds == ((0.0, 2 * rain.max()),)
    found = coarse_of(fine).isel(time=[0, 1]).genda.downscale(model=model, members=4, seed=0, steps=4)
    assert float(found.pr.max()) <= 2 * rain.max() * 1.0001
    assert float(found.pr.min()) >= 0
    scores = found.genda.verify(fine.isel(time=[0, 1]))
    assert np.isfinite(scores.pr).all()


def test_dry_cells_of_all_members_do_not_make_chi2_infinite() -> None:
    truth = fields(6.05 + 0.1 * np.arange(16), n=2)
    members = xr.concat([truth + 0.1, truth - 0.1, truth, truth], "member")
    members["t"][:, :, 0, 0] = 280.0
    assert np.isfinite(members.genda.verify(truth).t).all()


def test_members_of_a_classical_method_scatter_around_its_prediction() -> None:
    fine = fields(6.05 + 0.1 * np.arange(16), n=40)
    warm = coarse_of(fine) + 2.0
    warm.t.attrs = fine.t.attrs
    model = xgenda.train(warm, target=fine, task="downscale", method="bilinear")
    mean = warm.genda.downscale(model=model, stage="mean")
    members = warm.genda.downscale(model=model, members=40, seed=0)
    assert float(abs((members.mean("member") - mean).t).max()) < 1e-3  # 40 members are all the errors
    assert float((mean - fine).t.mean()) == pytest.approx(2.0, abs=0.05)


def test_members_do_not_depend_on_the_type_of_the_times() -> None:
    fine = fields(6.05 + 0.1 * np.arange(16))
    model = xgenda.train(fine, task="downscale", factor=4, method="ridge")
    coarse = coarse_of(fine).isel(time=[3, 4])
    a = coarse.genda.downscale(model=model, members=3, seed=0)
    b = coarse.convert_calendar("standard", use_cftime=True).genda.downscale(model=model, members=3, seed=0)
    np.testing.assert_array_equal(a.t.values, b.t.values)


def test_messages_say_what_to_type(tmp_path: Any) -> None:
    fine = fields(6.05 + 0.1 * np.arange(16))
    coarse, options = coarse_of(fine), {"task": "downscale", "method": "ridge"}
    with pytest.raises(GridError, match=r"Were they exchanged\? The coarse fields come first"):
        xgenda.train(fine, target=coarse, **options)
    with pytest.raises(CoordinateError, match=r"no times along it. Assign them: ds.assign_coords\(time=pandas.date_range"):
        xgenda.train(fine.drop_vars("time"), factor=4, **options)
    for neighbours in (3, "all", (0, "1")):
        with pytest.raises(OptionError, match="give whole steps with 0 among them"):
            xgenda.train(coarse, target=fine, neighbours=neighbours, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a lowest and a highest value are needed"):
        xgenda.train(fine, factor=4, bounds={"t": 0}, **options)  # type: ignore[dict-item]
    with pytest.warns(
        UserWarning, match="4 of 24 fine fields have not all the coarse ones that they need, and are left out"
    ) as caught:
        xgenda.train(coarse.isel(time=slice(0, 20)), target=fine, **options)
    assert caught[0].filename == __file__  # the line of the user
    model = xgenda.train(fine, factor=4, **options)
    with pytest.raises(CheckpointError, match="A .mdlus file holds one network, and this is a ClassicalModel"):
        write_mdlus(model, tmp_path / "a.mdlus")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is one network of a CorrDiff model.*read_corrdiff"):
        xgenda.downscale(coarse, model="a.mdlus")
    with pytest.raises(CheckpointError, match="nothing.nc does not exist"):
        read_corrdiff_output(tmp_path / "nothing.nc")
    odd = coarse.copy()
    odd["t"] = odd.t.assign_attrs(units="kg m-2 s-1")
    with pytest.raises(UnitsError, match="convert the values first"):
        xgenda.downscale(odd, model=model)


def test_a_prior_refuses_what_it_does_not_know() -> None:
    product = (
        xgenda.tutorial.open_dataset("a1b-north-america").isel(time=[3]).coarsen(latitude=4, longitude=4, boundary="trim").mean()
    )
    use: dict[str, Any] = {"model": "t2m-north-america", "members": 1, "steps": 2}
    with pytest.raises(GridError, match=r"100 % of the coarse cells lie outside of the grid of model='t2m-north-america'"):
        product.assign_coords(latitude=product.latitude - 70).genda.downscale(**use)
    with pytest.raises(StateError, match="Other units"):
        (product - 273.15).genda.downscale(**use)
    for error in (0, "small", {"air_temperature": -1.0}):
        with pytest.raises(OptionError, match="give a standard deviation above zero"):
            product.genda.downscale(error=error, **use)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="error names 't', and ds has 'air_temperature'"):
        product.genda.downscale(error={"t": 1.0}, **use)

"""What an unconditional prior gives back when it downscales: the order, the convention of longitude and the units of what it was given."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from xgenda.demo import coarsen, crop, withheld_years
from xgenda.errors import GridError

MODEL = "t2m-north-america"


@pytest.fixture(scope="module")
def whole() -> xr.Dataset:
    return withheld_years(20)


@pytest.fixture(scope="module")
def plain(whole: xr.Dataset) -> xr.Dataset:
    found: xr.Dataset = coarsen(crop(whole)).genda.downscale(model=MODEL, members=2, seed=0, steps=3)
    return found


def test_coordinates_are_like_those_of_the_coarse_fields(whole: xr.Dataset, plain: xr.Dataset) -> None:
    np.testing.assert_allclose(plain.longitude, whole.longitude)  # 0 to 360, as given, not -180 to 180, as in the model
    np.testing.assert_allclose(plain.latitude, whole.latitude)
    coarse = coarsen(crop(whole))
    flipped = coarse.isel(latitude=slice(None, None, -1)).rename(latitude="lat", longitude="lon")
    turned = flipped.assign_coords(lon=flipped.lon - 360).genda.downscale(model=MODEL, members=2, seed=0, steps=3)
    assert turned.air_temperature.dims == ("member", "time", "lat", "lon")
    np.testing.assert_allclose(turned.lon, whole.longitude - 360)
    np.testing.assert_allclose(turned.lat, whole.latitude[::-1])
    np.testing.assert_allclose(turned.air_temperature.values[..., ::-1, :], plain.air_temperature, rtol=1e-4)


def test_units_are_those_of_the_coarse_fields(whole: xr.Dataset, plain: xr.Dataset) -> None:
    coarse = coarsen(crop(whole))
    celsius = coarse.copy(data={"air_temperature": coarse.air_temperature.values - 273.15})
    celsius.air_temperature.attrs = {**coarse.air_temperature.attrs, "units": "degC"}
    found = celsius.genda.downscale(model=MODEL, members=2, seed=0, steps=3)
    assert found.air_temperature.attrs["units"] == "degC"
    np.testing.assert_allclose(found.air_temperature + 273.15, plain.air_temperature, atol=0.01)


def test_the_result_takes_the_order_of_target(whole: xr.Dataset, plain: xr.Dataset) -> None:
    target = whole.isel(latitude=slice(None, None, -1)).rename(latitude="y")
    target["y"].attrs = {"standard_name": "latitude", "units": "degrees_north"}
    coarse = coarsen(crop(whole))
    found = coarse.genda.downscale(model=MODEL, members=2, seed=0, steps=3, target=target)
    assert found.air_temperature.dims == ("member", "time", "y", "longitude")
    np.testing.assert_allclose(found.y, target.y)
    np.testing.assert_allclose(found.air_temperature.values[..., ::-1, :], plain.air_temperature, rtol=1e-4)
    with pytest.raises(GridError, match="target is not on the grid of model='t2m-north-america'"):
        coarse.genda.downscale(model=MODEL, target=crop(whole))

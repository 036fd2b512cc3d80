"""Pictures of latent spaces and of what observations leave uncertain."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot
from matplotlib.contour import QuadContourSet

import xgenda
from xgenda.errors import GridError, OptionError
from xgenda.plotting import plot_analysis, plot_reconstruction

VAE = "t2m-north-america-vae"


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    pyplot.close("all")


@pytest.fixture
def states() -> xr.Dataset:
    return xgenda.tutorial.open_dataset("a1b-north-america").isel(time=[200, 210, 220])


def test_a_reconstruction_is_drawn_beside_its_field(states: xr.Dataset) -> None:
    gappy = states.where((states.latitude < 58) | (states.longitude > 230))
    figure = plot_reconstruction(VAE, gappy, time=1)
    titles = [ax.get_title() for ax in figure.axes[:4]]
    assert titles[:3] == ["original", "reconstruction", "reconstruction minus original"]
    shown = [ax.collections[0].get_array().reshape(37, 49) for ax in figure.axes[:3]]
    np.testing.assert_allclose(shown[0].filled(np.nan), gappy.air_temperature[1])
    np.testing.assert_allclose(shown[2].compressed(), (shown[1] - shown[0]).compressed(), atol=1e-3)
    assert shown[1].mask.sum() == int(gappy.air_temperature[1].isnull().sum()) > 0
    assert figure.axes[0].collections[0].get_clim() == figure.axes[1].collections[0].get_clim()
    rmse = float(np.sqrt((shown[2] ** 2).mean()))
    assert 0.05 < rmse < 0.6  # of a climate that varies by more than a kelvin
    assert titles[3].startswith("3 times: correlation 0.99")
    assert "[K]" in figure.axes[3].get_xlabel()
    assert "annual mean air temperature" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("model", "change", "options", "error", "message"),
    [
        ("t2m-north-america", lambda d: d, {}, OptionError, "'t2m-north-america' has no encoder"),
        (VAE, lambda d: d, {"variable": "t2m"}, OptionError, "choose one of 'air_temperature'|'air_temperature'"),
        (VAE, lambda d: d, {"time": 3}, OptionError, "choose one of 0 to 2"),
        (VAE, lambda d: d.isel(latitude=slice(0, 9)), {}, GridError, "9 x 49"),
    ],
)  # fmt: skip
def test_what_cannot_be_reconstructed(model: str, change, options, error, message: str, states: xr.Dataset) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        plot_reconstruction(model, change(states), **options)


def ensemble() -> xr.Dataset:
    """A spread of 1 in the west and of 3 in the east."""
    spread = np.where(np.arange(8) < 4, 1.0, 3.0)
    values = np.array([-1.0, 1.0])[:, None, None, None] * spread / np.sqrt(2) * np.ones((2, 2, 6, 8))
    time = np.array(["2001-01-01", "2001-12-31"], "M8[ns]")
    coords = {"member": [0, 1], "time": time, "latitude": np.linspace(30, 55, 6), "longitude": np.linspace(0, 70, 8)}
    return xr.Dataset({"x": (("member", "time", "latitude", "longitude"), values, {"units": "K"})}, coords)


def hatched(figure: pyplot.Figure) -> dict[str, np.ndarray]:
    """Return the corners of what is hatched, by the number of the panel."""
    found = {}
    for k, ax in enumerate(figure.axes[:6]):
        for part in ax.collections:
            if isinstance(part, QuadContourSet):
                assert part.hatches == ["////"]
                found[k] = np.concatenate([p.vertices for p in part.get_paths()])
    return found


def test_uncertain_places_are_hatched() -> None:
    ds = ensemble()
    usual = xr.full_like(ds.isel(member=0, time=0, drop=True), 5.0)
    parts = hatched(plot_analysis(ds.isel(member=0), ds, climatology=usual))
    assert set(parts) == {1, 3}  # the mean and the spread
    assert parts[3][:, 0].min() == pytest.approx(35.0)  # half of the way from the last certain column to the first uncertain one
    assert parts[3][:, 0].max() == pytest.approx(70.0)
    assert not hatched(plot_analysis(ds.isel(member=0), ds, climatology=usual, threshold=0.7)).get(3, np.zeros(0)).size
    assert not hatched(plot_analysis(ds.isel(member=0), ds))
    turned = usual.isel(latitude=slice(None, None, -1)) * xr.where(usual.latitude > 42, 1.0, 0.01)
    parts = hatched(plot_analysis(ds.isel(member=0), ds, climatology=turned, threshold=0.65))
    assert parts[1][:, 1].max() < 43  # in the north the east is just certain


def test_the_climate_of_the_day_counts() -> None:
    ds = ensemble()
    usual = xr.full_like(ds.isel(member=0, time=0, drop=True), 1.0) * xr.DataArray(
        [100.0, 5.0], dims="dayofyear", coords={"dayofyear": [1, 365]}
    )
    assert not hatched(plot_analysis(ds.isel(member=0), ds, climatology=usual)).get(3, np.zeros(0)).size
    assert hatched(plot_analysis(ds.isel(member=0), ds, climatology=usual, time=1))[3].size
    assert "hatched above 0.33" in plot_analysis(ds.isel(member=0), ds, climatology=usual).axes[3].get_title()
    with pytest.raises(OptionError, match="climatology has no day 1,"):
        plot_analysis(ds.isel(member=0), ds, climatology=usual.isel(dayofyear=[1]))
    with pytest.raises(OptionError, match=r"threshold=0\.5 has no effect without climatology"):
        plot_analysis(ds.isel(member=0), ds, threshold=0.5)
    with pytest.raises(OptionError, match="threshold=33 is not accepted; it must be a share between 0 and 1"):
        plot_analysis(ds.isel(member=0), ds, climatology=usual, threshold=33)
    with pytest.raises(OptionError, match="threshold=0 is not accepted"):
        plot_analysis(ds.isel(member=0), ds, climatology=usual, threshold=0)
    with pytest.raises(OptionError, match="a field of standard deviations is needed"):
        plot_analysis(ds.isel(member=0), ds, climatology=ds.isel(member=0))
    with pytest.raises(GridError, match="climatology is on the grid 6 x 4"):
        plot_analysis(ds.isel(member=0), ds, climatology=usual.isel(longitude=slice(0, 4)))


def panels(figure: pyplot.Figure) -> list[np.ndarray]:
    """Return what is on each of the six maps."""
    return [np.asarray(ax.collections[0].get_array()).ravel() for ax in figure.axes[:6]]


def test_what_is_compared_has_the_same_units_and_time() -> None:
    ds = ensemble() + 280.0
    ds["x"].attrs["units"] = "K"
    truth = ds.isel(member=0) + 1.0
    truth["x"].attrs["units"] = "K"
    expected = panels(plot_analysis(truth, ds, time=1))
    celsius = truth - 273.15
    celsius["x"].attrs["units"] = "degC"
    longer = xr.concat([truth.isel(time=[0]).assign_coords(time=[np.datetime64("2000-01-01", "ns")]) + 50.0, truth], "time")
    longer["x"].attrs["units"] = "K"
    for other in (celsius, longer, truth.isel(time=[1]), truth.isel(time=1)):
        for found, same in zip(panels(plot_analysis(other, ds, time=1)), expected, strict=True):
            np.testing.assert_allclose(found, same, atol=1e-9)
    with pytest.raises(OptionError, match=r"reference has no time 2001-12-31.*reference.isel\(time=0, drop=True\)"):
        plot_analysis(truth.isel(time=[0]), ds, time=1)


@pytest.mark.parametrize(("units", "factor"), [("mK", 1000.0), ("degF", 1.8), ("degC", 1.0), (None, 1.0)])
def test_deviations_of_the_climate_have_units(units: str | None, factor: float) -> None:
    ds = ensemble()
    usual = factor * xr.full_like(ds.isel(member=0, time=0, drop=True), 5.0)
    usual["x"].attrs = {} if units is None else {"units": units}
    assert hatched(plot_analysis(ds.isel(member=0), ds, climatology=usual, threshold=0.55))[3].size  # 3 of 5
    assert not hatched(plot_analysis(ds.isel(member=0), ds, climatology=usual, threshold=0.65)).get(3, np.zeros(0)).size


def test_maps_across_the_date_line_are_in_one_piece() -> None:
    ds = ensemble()
    longitude = (ds["longitude"].values + 330.0) % 360.0 - 180.0
    figure = plot_analysis(ds.isel(member=0).assign_coords(longitude=longitude), ds.assign_coords(longitude=longitude))
    assert np.diff(figure.axes[0].get_xlim())[0] == pytest.approx(80.0)  # eight columns of ten degrees


@pytest.mark.parametrize(
    ("options", "message"),
    [({"member": 1.0}, "member=1.0"), ({"time": "2001-01-01"}, "time='2001-01-01'"), ({"threshold": "a"}, "threshold='a'")],
)
def test_bad_options_of_a_map(options: dict[str, object], message: str) -> None:
    ds = ensemble()
    with pytest.raises(OptionError, match=f"{message} is not accepted"):
        plot_analysis(ds.isel(member=0), ds, **options)  # type: ignore[arg-type]

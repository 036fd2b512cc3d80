"""Traps of downscaling: other units, orders and names than in the training, and what must not depend on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.errors import CoordinateError, OptionError
from xgenda.models.corrective import CorrectiveModel

FAST: dict[str, Any] = {"task": "downscale", "steps": 5, "width": 8, "progress": False, "anchor": None}


def series(n: int = 36, ny: int = 8, nx: int = 12, west: float = 5.0, step: float = 0.5) -> xr.Dataset:
    """Return fine temperature, every six hours."""
    rng = np.random.default_rng(1)
    y, x = np.meshgrid(np.linspace(0, np.pi, ny), np.linspace(0, np.pi, nx), indexing="ij")
    large = sum(rng.normal(size=(n, 1, 1)) * wave for wave in (np.ones_like(y), np.cos(y), np.cos(x), np.cos(x) * np.cos(y)))
    values = 280 + 3 * large + 0.3 * rng.normal(size=(n, ny, nx))
    return xr.Dataset(
        {"t2m": (("time", "latitude", "longitude"), values, {"units": "K", "standard_name": "air_temperature"})},
        coords={
            "time": np.datetime64("2020-01-01", "ns") + np.arange(n) * np.timedelta64(6, "h"),
            "latitude": 40.0 + step * np.arange(ny), "longitude": west + step * np.arange(nx),
        },
    )  # fmt: skip


def means_of(fine: xr.Dataset, factor: int = 4) -> xr.Dataset:
    out: xr.Dataset = fine.coarsen(latitude=factor, longitude=factor).mean()
    return out


def with_humidity(coarse: xr.Dataset) -> xr.Dataset:
    noise = np.random.default_rng(2).normal(size=coarse.t2m.shape)
    return coarse.assign(q=(0.1 * coarse.t2m + noise).assign_attrs(units="g kg-1", standard_name="specific_humidity"))


def in_celsius(ds: xr.Dataset) -> xr.Dataset:
    return ds.assign(t2m=(ds.t2m - 273.15).assign_attrs(ds.t2m.attrs, units="degC"))


@pytest.fixture(scope="module")
def fine() -> xr.Dataset:
    return series()


@pytest.fixture(scope="module")
def model(fine: xr.Dataset) -> xgenda.GenerativeModel:
    return xgenda.train(fine, factor=4, calibrate=False, **FAST)


@pytest.fixture(scope="module")
def paired(fine: xr.Dataset) -> xgenda.GenerativeModel:
    return xgenda.train(with_humidity(means_of(fine)), target=fine, calibrate=False, **FAST)


# -- calibration ----------------------------------------------------------------------------------------------------------------


def factors(model: xgenda.GenerativeModel) -> np.ndarray:
    return np.array(model.spec.options["calibration"]["factors"])


@pytest.mark.slow
def test_calibration_takes_other_units_names_orders_and_more_variables(
    model: xgenda.GenerativeModel, paired: xgenda.GenerativeModel, fine: xr.Dataset
) -> None:
    held = fine.isel(time=slice(24, 34))
    expected = factors(xgenda.calibrate(model, held))
    renamed = in_celsius(held).rename(t2m="tas").assign(z=held.t2m.drop_attrs() * 2)
    for given in (
        in_celsius(held),
        renamed,
        held.isel(latitude=slice(None, None, -1)).transpose("longitude", "time", "latitude"),
    ):
        np.testing.assert_allclose(factors(xgenda.calibrate(model, given)), expected, atol=1e-6)
    coarse = with_humidity(means_of(fine)).isel(time=slice(24, 34))
    expected = factors(xgenda.calibrate(paired, coarse, held))
    for given, target in ((coarse[["q", "t2m"]], held), (in_celsius(coarse), held), (coarse, in_celsius(held))):
        np.testing.assert_allclose(factors(xgenda.calibrate(paired, given, target)), expected, atol=1e-6)
    with pytest.raises(OptionError, match=r"takes t2m, q on .* give both: xgenda.calibrate\(model, coarse, fine\)"):
        xgenda.calibrate(paired, held)


def test_calibration_looks_at_neighbours_as_far_apart_as_in_the_training(fine: xr.Dataset) -> None:
    model = xgenda.train(fine, factor=4, neighbours=(-1, 0, 1), calibrate=False, **FAST)
    with pytest.raises(OptionError, match=r"none with all its neighbours -6 h, \+6 h\. Give a series with such steps"):
        xgenda.calibrate(model, fine.isel(time=slice(0, 36, 4)))


def test_deviations_are_in_the_order_of_the_times_whatever_the_lead_times(
    model: xgenda.GenerativeModel, fine: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that know lead times by number sample those of one lead time together."""
    assert isinstance(model, CorrectiveModel)
    held = fine.isel(time=slice(24, 34))
    expected = factors(xgenda.calibrate(model, held))

    def turned(self: CorrectiveModel, request: Any, size: int) -> Any:
        rows = list(range(len(request.labels)))
        yield from ((part, None) for part in (rows[1::2], rows[0::2]))

    monkeypatch.setattr(CorrectiveModel, "_groups", turned)
    np.testing.assert_allclose(factors(xgenda.calibrate(model, held)), expected, atol=1e-6)


# -- block means ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "transform", "offset"),
    [((0, 100), "none", 0.0), ((None, 100), "none", 0.0), ((None, 100), "log", 0.5), ((0, 100), "log", 0.5), (None, "log", 60.0)],
)
def test_means_are_kept_within_any_bounds(fine: xr.Dataset, bounds: Any, transform: str, offset: float) -> None:
    """Humidity that is often at its bounds; a logarithm of values below zero (shifted by its offset) has no bound of its own."""
    values = 100 * ((fine.t2m - 275) / 10).clip(0, 1) - (50 if bounds is None else 0)
    humid = fine.assign(t2m=values.assign_attrs(units="%")).rename(t2m="rh")
    limits = None if bounds is None else {"rh": bounds}
    model = xgenda.train(humid, factor=4, calibrate=False, bounds=limits, transform={"rh": transform}, offset=offset, **FAST)
    coarse = means_of(humid).isel(time=slice(0, 12))
    found = coarse.genda.downscale(model=model, members=3, seed=0, steps=3)
    np.testing.assert_allclose(means_of(found).rh, np.broadcast_to(coarse.rh, (3, *coarse.rh.shape)), atol=1e-6)
    low, high = (-np.inf, np.inf) if bounds is None else (0 if bounds[0] == 0 or transform == "log" else -np.inf, 100)
    assert float(found.rh.min()) >= low - offset - 1e-9
    assert float(found.rh.max()) <= high + 1e-9


# -- longitudes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("west", [178.5, -181.5, 176.0])
def test_a_region_at_the_date_line(west: float) -> None:
    """The first fine column lies west of it, the first coarse one east of it."""
    fine = series(west=west, step=1.0)
    model = xgenda.train(fine, factor=4, calibrate=False, **FAST)
    for longitude in (fine.longitude, fine.longitude % 360):
        coarse = means_of(fine.assign_coords(longitude=longitude)).isel(time=[3])
        found = coarse.genda.downscale(model=model, members=1, seed=0, steps=3)
        np.testing.assert_allclose(means_of(found).longitude, coarse.longitude)
        np.testing.assert_allclose(means_of(found).t2m[0], coarse.t2m, atol=1e-6)


@pytest.mark.parametrize("west", [-3.0, 5.0, 200.0])
@pytest.mark.parametrize("start", [0.0, -180.0])
def test_a_region_within_global_fields_stays_in_one_part(west: float, start: float) -> None:
    fine = series(west=west)
    rng = np.random.default_rng(0)
    grid = {"latitude": np.arange(30.0, 60.0, 5.0), "longitude": np.arange(start, start + 360.0, 5.0)}
    values = fine.t2m.mean(("latitude", "longitude")).values[:, None, None] + rng.normal(size=(36, 6, 72))
    coarse = xr.Dataset({"t2m": (("time", "latitude", "longitude"), values, fine.t2m.attrs)}, coords={"time": fine.time, **grid})
    model = xgenda.train(coarse, target=fine, method="bilinear", task="downscale")
    found = coarse.isel(time=[0]).genda.downscale(model=model, stage="mean")
    steps = np.diff(found.longitude)
    np.testing.assert_allclose(steps, 0.5)
    np.testing.assert_allclose((found.longitude - fine.longitude.values + 180) % 360 - 180, 0, atol=1e-9)
    expected = coarse.isel(time=[0]).genda.regrid(fine, method="bilinear")
    np.testing.assert_allclose(found.t2m.values, expected.t2m.values, rtol=1e-6)


def test_a_global_grid_in_either_convention() -> None:
    """Fine cells from 0 or -180 on, east first, with pole-to-pole rows from the north: the same values at the same places."""
    fine = series(ny=12, nx=24).assign_coords(latitude=-82.5 + 15.0 * np.arange(12), longitude=7.5 + 15.0 * np.arange(24))
    model = xgenda.train(fine, factor=2, calibrate=False, **FAST)
    expected = means_of(fine, 2).isel(time=[3]).genda.downscale(model=model, members=2, seed=0, steps=3)
    turned = (
        fine.assign_coords(longitude=(fine.longitude + 180) % 360 - 180).sortby("longitude").isel(latitude=slice(None, None, -1))
    )
    found = means_of(turned, 2).isel(time=[3]).genda.downscale(model=model, members=2, seed=0, steps=3)
    assert float(found.longitude.min()) < 0 < float(expected.longitude.min())
    back = found.assign_coords(longitude=found.longitude % 360).sortby(["latitude", "longitude"])
    np.testing.assert_allclose(back.longitude, expected.longitude)
    np.testing.assert_allclose(back.t2m, expected.t2m, atol=1e-9)


# -- priors ---------------------------------------------------------------------------------------------------------------------


def test_a_prior_downscales_in_the_units_names_and_order_of_its_input() -> None:
    """Pressure in Pa in the training and in hPa in the coarse fields, whose default error is then a hundredth too."""
    fine = series()
    pressure = ((fine.t2m - 280) * 100 + 101325).assign_attrs(units="Pa", standard_name="air_pressure_at_mean_sea_level")
    fine = fine.assign(msl=pressure)[["msl"]]
    prior = xgenda.train(fine, steps=2, width=8, progress=False, anchor="eof")
    options: dict[str, Any] = {"model": prior, "members": 2, "seed": 0, "steps": 4}
    coarse = means_of(fine).isel(time=[3, 4])
    expected = coarse.genda.downscale(**options)
    other = (coarse.msl / 100).assign_attrs(pressure.attrs, units="hPa").rename("psl").to_dataset()
    other = other.isel(latitude=slice(None, None, -1)).transpose("longitude", "time", "latitude")
    other = other.assign_coords(longitude=other.longitude + 360, lead=("time", [1, 2]))
    found = other.genda.downscale(**options)
    assert found.psl.attrs["units"] == "hPa"
    assert found.psl.dims == ("member", "longitude", "time", "latitude")
    assert float(found.longitude.min()) == 365.0
    assert found.latitude.values[0] > found.latitude.values[-1]
    back = 100 * found.psl.isel(latitude=slice(None, None, -1)).transpose(*expected.msl.dims)
    np.testing.assert_allclose(back.values, expected.msl.values, atol=0.1)
    lazy = coarse.chunk(time=1).genda.downscale(**options)
    assert lazy.msl.chunks is not None
    np.testing.assert_allclose(lazy.msl.values, expected.msl.values, atol=0.1)
    on_target = coarse.isel(time=0).genda.downscale(**options, target=fine.isel(latitude=slice(None, None, -1)))
    assert on_target.msl.dims == ("member", "latitude", "longitude")
    np.testing.assert_allclose(on_target.msl.values[:, ::-1], expected.msl.isel(time=0).values, atol=0.1)
    deep = fine.expand_dims(plev=[85000.0])
    deep.plev.attrs["units"] = "Pa"
    prior = xgenda.train(deep, steps=2, width=8, progress=False, anchor="eof")
    with pytest.raises(OptionError, match="has levels, and an unconditional prior downscales single fields"):
        means_of(deep).genda.downscale(model=prior, members=1)


# -- options --------------------------------------------------------------------------------------------------------------------


def test_rows_and_columns_go_by_their_names(model: xgenda.GenerativeModel, fine: xr.Dataset) -> None:
    coarse = means_of(fine).isel(time=[0])
    options: dict[str, Any] = {"model": model, "members": 1, "seed": 0, "steps": 3}
    found = coarse.genda.downscale(**options, chunks={"longitude": 4, "latitude": 8})
    assert found.t2m.chunks[-2:] == ((8,), (4, 4, 4))
    renamed = coarse.rename(latitude="lat", longitude="lon").genda.downscale(**options, tile={"lon": 8, "lat": 4})
    assert renamed.attrs["xgenda_tile"] == "(4, 8)"
    assert xgenda.plan(coarse, model=model, chunks={"longitude": 4, "latitude": 8}).parts == 3
    for chunks, problem in (
        ({"lat": 8, "lon": 8}, r"does not name rows and columns; type chunks=\{'latitude': 64, 'longitude': 64\}"),
        (8.5, "give a number of cells"),
        ("auto", "give a number of cells"),
    ):
        with pytest.raises(OptionError, match=problem):
            coarse.genda.downscale(**options, chunks=chunks)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("ridge", {"conserve": True}), ("bilinear", {"neighbours": (-1, 0, 1)}), ("bcsd", {"tile": 8}), ("ridge", {"stages": "single"}),
        ("ridge", {"lead_time": True}), ("bcsd", {"architecture": "songunet"}), ("ridge", {"time_features": "hour"}),
    ],
)  # fmt: skip
def test_methods_in_closed_form_refuse_what_they_would_ignore(fine: xr.Dataset, method: str, option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(option))}=.* has no effect with method='{method}'"):
        xgenda.train(fine, task="downscale", factor=4, method=method, **option)


def test_a_missing_time_is_asked_for(model: xgenda.GenerativeModel, fine: xr.Dataset) -> None:
    coarse = means_of(fine)
    with pytest.raises(CoordinateError, match="takes the season or the hour, and ds has no time. Assign it: ds.assign_coords"):
        coarse.isel(time=0, drop=True).genda.downscale(model=model)
    with pytest.raises(CoordinateError, match="has dtype int64; decode it"):
        coarse.isel(time=[0, 1]).assign_coords(time=("time", [0, 6], {"standard_name": "time"})).genda.downscale(model=model)
    scalar = coarse.isel(time=3).genda.downscale(model=model, members=1, seed=0, steps=3)
    along = coarse.isel(time=[3]).genda.downscale(model=model, members=1, seed=0, steps=3)
    np.testing.assert_allclose(scalar.t2m, along.t2m.isel(time=0))
    sample = fine.drop_vars("time").rename(time="member")
    with pytest.raises(OptionError, match="time_features='hour' needs a time coordinate, and the fields have none"):
        xgenda.train(sample, factor=4, time_features="hour", **FAST)


# -- the same numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["diffusion", "ridge", "bcsd"])
def test_a_model_gives_the_same_numbers_saved_or_not(fine: xr.Dataset, tmp_path: Path, method: str) -> None:
    options = FAST | {"anchor": "eof"} if method == "diffusion" else {"task": "downscale", "method": method}
    model = xgenda.train(fine, factor=4, climatology="hour", **options)
    coarse = means_of(fine).isel(time=[3, 9])
    keyword: dict[str, Any] = {"members": 2, "seed": 0, **({"steps": 3} if method == "diffusion" else {})}
    before = coarse.genda.downscale(model=model, **keyword)
    model.save(tmp_path / "model.safetensors")
    after = coarse.genda.downscale(model=xgenda.load_model(tmp_path / "model.safetensors"), **keyword)
    np.testing.assert_array_equal(after.t2m, before.t2m)


# -- means ----------------------------------------------------------------------------------------------------------------------


def test_the_trial_of_a_calibration_has_the_mean_of_the_model(fine: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the validation block the climate may be the better prediction; the network still takes the mean that it was trained with."""
    from xgenda.models import means

    fit, before = means.fit_mean, means.Pairs.less
    kinds: list[str] = []

    def noted(*args: Any, **options: Any) -> Any:
        kinds.append((found := fit(*args, **options))[2])
        return found

    def less(self: means.Pairs, k: int) -> means.Pairs:  # nothing to be learned from the others
        out = before(self, k)
        return dataclasses.replace(out, fine=out.fine[torch.randperm(len(out.fine), generator=torch.Generator().manual_seed(0))])

    monkeypatch.setattr(means, "fit_mean", noted)
    monkeypatch.setattr(means.Pairs, "less", less)
    model = xgenda.train(fine, factor=4, **FAST | {"steps": 40})
    assert kinds[0] == kinds[1] != "none"
    assert model.spec.options["calibration"] is not None


def test_ridge_says_where_it_is_too_large(fine: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from xgenda.models import means

    monkeypatch.setattr(means, "LARGEST", 100)
    with pytest.raises(
        OptionError, match="method='ridge' needs a map to each of 1 x 8 x 12 cells, which is too large; use method='bcsd'"
    ):
        xgenda.train(fine, task="downscale", factor=4, method="ridge")


# -- values ---------------------------------------------------------------------------------------------------------------------


def test_a_logarithm_of_one_variable_does_not_hide_other_units_of_another(fine: xr.Dataset) -> None:
    coarse = means_of(fine)
    coarse["rain"] = np.exp((coarse.t2m - 280) / 3).assign_attrs(units="mm")
    model = xgenda.train(coarse, target=fine, transform={"rain": "log"}, calibrate=False, **FAST)
    with pytest.raises(xgenda.errors.StateError, match=r"ds\['t2m'\] has mean .* Other units\?"):
        coarse.assign(t2m=(coarse.t2m - 273.15).drop_attrs()).isel(time=[0]).genda.downscale(model=model, members=1, steps=3)


def test_missing_lead_times_are_refused(fine: xr.Dataset) -> None:
    lead = ("time", np.array(["NaT"] * 36, "timedelta64[h]"), {"standard_name": "forecast_period"})
    with pytest.raises(CoordinateError, match=r"ds\['step'\] holds lead times that are missing"):
        xgenda.train(means_of(fine).assign_coords(step=lead), target=fine, lead_time=True, **FAST)


# -- plans ----------------------------------------------------------------------------------------------------------------------


def globe() -> xr.Dataset:
    return series(ny=8, nx=24).assign_coords(latitude=-78.75 + 22.5 * np.arange(8), longitude=7.5 + 15.0 * np.arange(24))


@pytest.fixture(scope="module")
def around() -> xgenda.GenerativeModel:
    """On a globe, whose tiles wrap around, with a calibration, which asks for the mean of the denoiser."""
    fine = globe()
    return xgenda.calibrate(xgenda.train(fine, factor=4, calibrate=False, **FAST | {"steps": 40}), fine.isel(time=slice(24, 34)))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"tile": (8, 8), "overlap": (0, 4)}, {"sampler": "dpm++"}])
def test_a_plan_counts_the_calls_that_are_made(
    around: xgenda.GenerativeModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xgenda.networks.unet import UNet

    fine, model = globe(), around
    assert isinstance(model, CorrectiveModel)
    coarse = means_of(fine).isel(time=[3, 7])
    planned = xgenda.plan(coarse, model=model, members=3, steps=4, **options)
    made, forward = [0], UNet.forward

    def counted(self: UNet, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        made[0] += len(x)
        return forward(self, x, *arguments)

    monkeypatch.setattr(UNet, "forward", counted)
    coarse.genda.downscale(model=model, members=3, steps=4, seed=0, **options)
    assert planned.calls == made[0]


def test_a_globe_in_rows_still_wraps_around(monkeypatch: pytest.MonkeyPatch) -> None:
    model = xgenda.train(globe(), factor=4, calibrate=False, **FAST)
    assert isinstance(model, CorrectiveModel)
    rows, columns = model.features.everywhere()
    network = model.denoiser.network
    for place, cut, expected in (
        ((rows, columns), (False, False), "sphere"),
        ((rows[:4], columns), (False, False), True),
        ((rows, columns), (True, False), True),
        ((rows, columns[:8]), (False, False), False),
        ((rows, columns), (False, True), False),
    ):
        found = model.network_on(network, place, cut=cut)
        assert getattr(found, "network", found).periodic == expected


# -- memory ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_network_call_of_the_training_is_larger_than_a_batch_or_a_tile(
    fine: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation and the mean of the first stage too; and that mean is what `downscale` makes of tiles."""
    from xgenda.networks.unet import UNet

    seen: set[tuple[int, ...]] = set()
    forward = UNet.forward

    def noted(self: UNet, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        seen.add((len(x), *x.shape[-2:]))
        return forward(self, x, *arguments)

    monkeypatch.setattr(UNet, "forward", noted)
    amplitude = np.random.default_rng(4).normal(size=(72, 1, 1))
    pattern = np.sin(np.arange(12.0)) * np.cos(np.arange(8.0))[:, None]
    bent = series(72)  # what no linear map explains
    bent["t2m"] = (bent.t2m.dims, 280 + amplitude + 3 * np.abs(amplitude) * pattern, fine.t2m.attrs)
    longer = FAST | {"steps": 150, "learning_rate": 1e-2}
    model = xgenda.train(bent, factor=4, tile=4, batch_size=8, calibrate=False, conserve=False, **longer)
    assert isinstance(model, CorrectiveModel)
    assert model.regression is not None
    assert {size[1:] for size in seen} == {(4, 4)}
    assert max(size[0] for size in seen) <= 8


def test_lead_times_between_those_of_the_networks_are_refused(
    model: xgenda.GenerativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(model, CorrectiveModel)
    monkeypatch.setitem(model.spec.options, "lead_index", True)  # type: ignore[arg-type]
    monkeypatch.setattr(model, "inputs", dataclasses.replace(model.inputs, lead_time=21600.0))
    request = SimpleNamespace(labels=["a", "b", "c"], planes=torch.tensor([[0.0], [1.001], [0.0]]))
    assert list(model._groups(request, 4)) == [([0, 2], 0), ([1], 1)]  # type: ignore[arg-type]
    request.planes[1] = 1.5
    with pytest.raises(OptionError, match="The lead time at b is 9 h, and .* knows multiples of 6 h"):
        list(model._groups(request, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbours": 0}, "neighbours=0 is not accepted; give whole steps"),
        ({"bounds": {"t2m": 3}}, "bounds of 't2m' are 3; a lowest"),
    ],
)
def test_options_of_another_type_are_refused(fine: xr.Dataset, change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        xgenda.train(fine, factor=4, **FAST | change)


def test_calibrate_takes_a_path_and_leaves_random_numbers_alone(
    model: xgenda.GenerativeModel, fine: xr.Dataset, tmp_path: Path
) -> None:
    copy = xgenda.train(fine, factor=4, calibrate=False, **FAST)
    copy.save(tmp_path / "m.safetensors")
    held = fine.isel(time=slice(24, 34))
    np.testing.assert_array_equal(
        factors(xgenda.calibrate(tmp_path / "m.safetensors", held)), factors(xgenda.calibrate(model, held))
    )
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    means_of(fine).isel(time=[0]).genda.downscale(model=model, members=1, steps=3, seed=0)
    assert torch.equal(torch.rand(1), expected)

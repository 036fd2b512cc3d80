"""Downscalers that see a window of coarse fields: p(u_t | y_t-k ... y_t+k), at the ends of series and gaps too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import xgenda
from xgenda.errors import CoordinateError, OptionError
from xgenda.models.conditions import Conditions, neighbours
from xgenda.models.corrective import CorrectiveModel

CALL: dict[str, Any] = {"members": 2, "seed": 0, "steps": 3}


def fields() -> xr.Dataset:
    """Fine fields whose small scales are the change of the large ones: what one coarse field does not say, its neighbours do."""
    rng = np.random.default_rng(0)
    large = rng.normal(size=(31, 3, 4)).cumsum(0)
    small = np.diff(large, axis=0).repeat(4, 1).repeat(4, 2) * np.tile([[1.0, -1.0], [-1.0, 1.0]], (6, 8))
    values = large[1:].repeat(4, 1).repeat(4, 2) + small
    return xr.Dataset(
        {"a": (("time", "latitude", "longitude"), values, {"units": "K"})},
        coords={
            "time": np.datetime64("2020-01-01", "ns") + np.arange(30) * np.timedelta64(6, "h"),
            "latitude": np.linspace(40.0, 42.75, 12), "longitude": np.linspace(5.0, 8.75, 16),
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def fine() -> xr.Dataset:
    return fields()


@pytest.fixture(scope="module")
def coarse(fine: xr.Dataset) -> xr.Dataset:
    out: xr.Dataset = fine.coarsen(latitude=4, longitude=4).mean()
    return out


@pytest.fixture(scope="module")
def model(coarse: xr.Dataset, fine: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> CorrectiveModel:
    path = tmp_path_factory.mktemp("models") / "context.safetensors"
    options: dict[str, Any] = {
        "steps": 30,
        "width": 8,
        "anchor": None,
        "calibrate": False,
        "time_features": "none",
        "stages": "residual",
    }
    xgenda.train(coarse, target=fine, task="downscale", context=2, progress=False, learning_rate=1e-2, out=path, **options)
    found = xgenda.load_model(path)
    assert isinstance(found, CorrectiveModel)
    return found


def test_where_fields_are_taken_from() -> None:
    times = np.datetime64("2020-01-01", "ns") + np.array([0, 1, 2, 5, 6]) * np.timedelta64(6, "h")
    found = neighbours(times, times, (0, -2, -1, 1, 2), 6 * 3600.0, "nearest")
    # the last three times but one end a series, and the other two are another: nothing is taken across the gap
    assert found.tolist() == [[0, 0, 0, 1, 2], [1, 0, 0, 2, 2], [2, 0, 1, 2, 2], [3, 3, 3, 4, 4], [4, 3, 3, 4, 4]]
    assert (neighbours(times, times[[2]] + np.timedelta64(6, "h"), (0, -1, 1), 6 * 3600.0, "nearest")[:, 0] == -1).all()
    # a gap of one time, with a field two steps away: across it all the same nothing is taken
    gap = times[[0, 2]]
    assert neighbours(gap, gap, (0, 1, 2), 6 * 3600.0, "nearest").tolist() == [[0, 0, 0], [1, 1, 1]]
    assert neighbours(gap, gap, (0, 1, 2), 6 * 3600.0).tolist() == [[0, -1, 1], [1, -1, -1]]


def test_every_time_is_trained_on_and_answered(model: CorrectiveModel, coarse: xr.Dataset) -> None:
    inputs = model.inputs
    assert (inputs.offsets, inputs.spacing, inputs.ends) == ((0, -2, -1, 1, 2), 21600.0, "nearest")
    assert model.spec.training["samples"] == "30 along time"
    found = coarse.isel(time=slice(0, 6)).genda.downscale(model=model, **CALL)
    assert (found.time == coarse.time[:6]).all()


def test_the_ends_go_on_as_they_are(model: CorrectiveModel, coarse: xr.Dataset) -> None:
    # what the field next to it stands for at the ends is the field itself
    own = coarse.isel(time=slice(4, 8))
    longer = coarse.isel(time=slice(2, 10)).copy(deep=True)
    longer["a"][:2], longer["a"][-2:] = own.a[0].values, own.a[-1].values
    found, wanted = (ds.genda.downscale(model=model, **CALL) for ds in (own, longer))
    xr.testing.assert_allclose(found, wanted.sel(time=own.time), rtol=1e-5, atol=1e-5)
    inside = coarse.isel(time=slice(2, 10)).genda.downscale(model=model, **CALL).sel(time=own.time)
    assert float(abs(found.a - inside.a).isel(time=0).max()) > 1e-3  # and it does matter what is beyond


def test_inside_of_a_series_it_is_the_model_of_neighbours(model: CorrectiveModel, coarse: xr.Dataset) -> None:
    spec = dataclasses.replace(model.spec, inputs=dataclasses.replace(model.inputs, ends="drop"))
    plain = CorrectiveModel(spec, model.mean, model.regression, model.spread, model.denoiser, model.statics)
    ds = coarse.isel(time=slice(0, 7))
    with pytest.warns(UserWarning, match="4 of 7 times have no neighbours"):
        expected = ds.genda.downscale(model=plain, **CALL)
    found = ds.genda.downscale(model=model, **CALL).sel(time=expected.time)
    xr.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 9])
def test_chunks_change_nothing(model: CorrectiveModel, coarse: xr.Dataset, chunk: int) -> None:
    ds = coarse.isel(time=slice(0, 9))
    lazy = ds.chunk(time=chunk).genda.downscale(model=model, **CALL)
    assert lazy.a.chunks is not None
    xr.testing.assert_allclose(lazy.compute(), ds.genda.downscale(model=model, **CALL), rtol=1e-5, atol=1e-5)
    part = ds.isel(time=slice(2, 7)).chunk(time=chunk)  # and as far as the window sees, neither does what is not there
    xr.testing.assert_allclose(part.genda.downscale(model=model, **CALL).isel(time=2), lazy.isel(time=4), rtol=1e-5, atol=1e-5)


def test_a_gap_is_an_end_and_a_beginning(model: CorrectiveModel, coarse: xr.Dataset) -> None:
    before, after = coarse.isel(time=slice(0, 4)), coarse.isel(time=slice(6, 9))
    with pytest.warns(UserWarning, match="have 1 gaps, where they are not 6 h apart"):
        found = xr.concat([before, after], "time").genda.downscale(model=model, **CALL)
    parts = [ds.genda.downscale(model=model, **CALL) for ds in (before, after)]
    xr.testing.assert_allclose(found, xr.concat(parts, "time"), rtol=1e-5, atol=1e-5)
    with pytest.raises(CoordinateError, match="takes fields 6 h apart, and no two times of ds are"):
        coarse.isel(time=slice(0, 9, 2)).genda.downscale(model=model, **CALL)
    assert coarse.isel(time=[3]).genda.downscale(model=model, **CALL).sizes["time"] == 1
    with pytest.raises(CoordinateError, match="ds has no dimension of time"):
        coarse.isel(time=3, drop=True).genda.downscale(model=model, **CALL)


def test_the_window_is_used(coarse: xr.Dataset, fine: xr.Dataset, model: CorrectiveModel) -> None:
    # the change from the field before is in the small scales, of which a single coarse field says nothing
    found = coarse.genda.downscale(model=model, stage="mean")
    changed = coarse.copy(deep=True)
    changed["a"][10] += 1.0
    moved = abs(changed.genda.downscale(model=model, stage="mean").a - found.a).max(("latitude", "longitude"))
    assert set(np.flatnonzero(moved > 1e-6)) <= {8, 9, 10, 11, 12}
    members = coarse.genda.downscale(model=model, **CALL)
    moved = abs(changed.genda.downscale(model=model, **CALL).a - members.a).max(("member", "latitude", "longitude"))
    assert set(np.flatnonzero(moved > 1e-4)) == {8, 9, 10, 11, 12}


def test_files_without_it_are_read_and_written_as_before(model: CorrectiveModel) -> None:
    inputs = model.inputs
    data = inputs.to_dict()
    assert data["ends"] == "nearest"
    again = Conditions.from_dict(data, inputs.scaling.mean, inputs.scaling.std)
    assert again.ends == "nearest"
    older = dataclasses.replace(inputs, ends="drop").to_dict()
    assert older == {k: v for k, v in data.items() if k != "ends"}
    assert Conditions.from_dict(older, inputs.scaling.mean, inputs.scaling.std).ends == "drop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1, "neighbours": (-1, 0)}, "both say which times the model sees"),
        ({"context": -1}, "context=-1"),
        ({"context": True}, "context=True"),
        ({"context": 1, "task": "prior", "target": None}, "context=1 belongs to task='downscale'"),
        ({"context": 1, "method": "bilinear"}, "context=1 has no effect with method='bilinear'"),
    ],
)
def test_refusals(coarse: xr.Dataset, fine: xr.Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        xgenda.train(coarse, **{"task": "downscale", "target": fine, "steps": 1, **options})


def test_ridge_sees_the_window_too(coarse: xr.Dataset, fine: xr.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "ridge.safetensors"
    xgenda.train(coarse, target=fine, task="downscale", method="ridge", context=1, out=path, progress=False)
    found = coarse.isel(time=slice(0, 3)).genda.downscale(model=path, members=2, seed=0)
    assert found.sizes["time"] == 3

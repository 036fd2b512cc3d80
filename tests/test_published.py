"""Published forecast models: ONNX files run through `cycle` against numpy, in every order of a grid; models of earth2studio."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import xgenda
from xgenda import forecasts
from xgenda.errors import (
    CheckpointError,
    ChecksumError,
    CoordinateError,
    DivergenceError,
    GridError,
    MissingDependencyError,
    OptionError,
    StateError,
    UnitsError,
)
from xgenda.onnx_files import weight_files

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper

LATITUDE, LONGITUDE = np.linspace(60, -60, 5), np.arange(0, 360, 45.0)
PLANE = (len(LATITUDE), len(LONGITUDE))
CHANNELS = ["z500", "z850", "t850", "t500", "t2m"]
#: Exact in floating point, and others for each channel, row and column, so that a turned or flipped field shows; shape (channels, rows, columns).
BY_CELL = xr.DataArray(
    2.0 ** np.random.default_rng(2).integers(-1, 2, PLANE),
    dims=("latitude", "longitude"),
    coords={"latitude": LATITUDE, "longitude": LONGITUDE},
)
BY_CHANNEL = dict(zip(CHANNELS, (1.0, 0.5, 0.25, 2.0, 4.0), strict=True))
FACTOR = np.array(list(BY_CHANNEL.values()))[:, None, None] * BY_CELL.values
GRID: dict[str, Any] = {"lead": "6h", "latitude": LATITUDE, "longitude": LONGITUDE}
FLOATS = {np.dtype("f2"): TensorProto.FLOAT16, np.dtype("f4"): TensorProto.FLOAT, np.dtype("f8"): TensorProto.DOUBLE}


def shift_model(
    path: Path, shape: list[Any], *, dtype: str = "f4", factor: np.ndarray | None = None, external: bool = False
) -> Path:
    """Write a model that moves its fields by one cell to the east and south, around the globe, and multiplies them by a factor.

    Everywhere else the order of the axes would not show: a field that is flipped or turned by mistake moves the other way.
    """
    kind, rank = FLOATS[np.dtype(dtype)], len(shape)
    index = [np.roll(np.arange(n), 1) for n in PLANE]
    tensors = [numpy_helper.from_array(i, name) for i, name in zip(index, ("rows", "columns"), strict=True)]
    factor = np.ones((1,) * rank) if factor is None else factor
    tensors.append(numpy_helper.from_array(factor.astype(dtype), "factor"))
    nodes = [
        helper.make_node("Gather", ["x", "rows"], ["a"], axis=rank - 2),
        helper.make_node("Gather", ["a", "columns"], ["b"], axis=rank - 1),
        helper.make_node("Mul", ["b", "factor"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(n, kind, shape)] for n in ("x", "y")]
    return write(path, helper.make_graph(nodes, "shift", *ends, initializer=tensors), external)


def write(path: Path, graph: Any, external: bool = False) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    if external:
        onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    else:
        onnx.save_model(model, path)
    return path


def moved(ds: xr.Dataset) -> xr.Dataset:
    """What the model does, by xarray's own means, along axes as the model has them."""
    turned = ds.assign_coords(longitude=ds.longitude % 360).sortby("longitude").sortby("latitude", ascending=False)
    out = turned.roll(latitude=1, longitude=1, roll_coords=False)
    for name in ("z", "t", "t2m"):
        levels = [f"{name}{level:.0f}" for level in ds.level.values] if "level" in ds[name].dims else [name]
        factor = xr.DataArray(np.array([BY_CHANNEL[c] for c in levels], dtype="f4"), dims="level").squeeze()
        out[name] = (
            out[name]
            * (factor if "level" in ds[name].dims else factor.drop_vars("level", errors="ignore"))
            * BY_CELL.astype("f4")
        )
    return out


@pytest.fixture
def state() -> xr.Dataset:
    """Three members on two levels and at the ground, in single precision, as the model has them."""
    rng = np.random.default_rng(0)
    wide, flat = ("member", "level", "latitude", "longitude"), ("member", "latitude", "longitude")
    sizes = {"member": 3, "level": 2, "latitude": PLANE[0], "longitude": PLANE[1]}

    def field(dims: tuple[str, ...], mean: float, units: str) -> Any:
        return dims, (mean + rng.normal(size=[sizes[d] for d in dims])).astype("f4"), {"units": units}

    return xr.Dataset(
        {"z": field(wide, 5e4, "m2 s-2"), "t": field(wide, 260.0, "K"), "t2m": field(flat, 280.0, "K")},
        coords={
            "member": [3, 5, 8], "level": ("level", [850.0, 500.0], {"units": "hPa"}), "latitude": LATITUDE, "longitude": LONGITUDE,
            "time": np.datetime64("2020-01-01T00", "ns"),
        },
        attrs={"title": "a test"},
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return shift_model(tmp_path / "model.onnx", [1, 5, *PLANE], factor=FACTOR)


def from_the_date_line(ds: xr.Dataset) -> xr.Dataset:
    return ds.assign_coords(longitude=(ds.longitude + 180) % 360 - 180).sortby("longitude")


def flipped(ds: xr.Dataset, *dims: str) -> xr.Dataset:
    return ds.isel(dict.fromkeys(dims, slice(None, None, -1)))


ORDERS: dict[str, Any] = {
    "as the model": lambda ds: ds,
    "south to north": lambda ds: flipped(ds, "latitude"),
    "from the date line": from_the_date_line,
    "both, columns first": lambda ds: flipped(from_the_date_line(ds), "latitude").transpose("longitude", "member", "latitude", "level"),
    "from 90 W": lambda ds: ds.roll(longitude=2, roll_coords=True),
    "east to west": lambda ds: flipped(ds, "longitude"),
    "levels upside down": lambda ds: flipped(ds, "level").transpose("level", "latitude", "longitude", "member"),
}  # fmt: skip
TIMES = pd.date_range("2020-01-01", periods=4, freq="6h")


def cycled(initial: xr.Dataset, forecast: Any, times: pd.DatetimeIndex = TIMES, **options: Any) -> xr.Dataset:
    """A cycle with observations that say next to nothing."""
    point = {"latitude": 30.0, "longitude": 90.0, "t2m": 280.0, "t2m_error": 1e6}
    return xgenda.cycle(
        initial, pd.DataFrame([point | {"time": t} for t in times]), forecast=forecast, times=times, seed=0, guard=None,
        model=xgenda.LETKF(), **options,
    )  # fmt: skip


def assert_same_fields(found: xr.Dataset, expected: xr.Dataset) -> None:
    """Bit for bit, wherever the cells are stored."""
    expected = expected.sel(latitude=found.latitude.values, longitude=found.longitude.values % 360)
    if "level" in found.dims:
        expected = expected.sel(level=found.level.values)
    for name in ("z", "t", "t2m"):
        np.testing.assert_array_equal(found[name].values, expected[name].transpose(*found[name].dims).values)
        assert found[name].dtype == np.float32


@pytest.mark.parametrize("order", ORDERS)
def test_a_cycle_gives_what_numpy_gives_in_every_order_of_the_grid(order: str, state: xr.Dataset, path: Path) -> None:
    run = cycled(ORDERS[order](state), forecasts.onnx(path, channels=CHANNELS, **GRID))
    for t in range(1, 4):
        before, after = (run.isel(time=k).sel(stage=s) for k, s in ((t - 1, "analysis"), (t, "background")))
        assert_same_fields(after, moved(before))
    assert float(run.t2m.isel(time=3).mean()) > 5000  # each step is four times the one before, and more


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_changes_values_and_time_alone(order: str, state: xr.Dataset, path: Path) -> None:
    given = ORDERS[order](state)
    before = given.copy(deep=True)
    out = forecasts.onnx(path, channels=CHANNELS, **GRID)(given)
    xr.testing.assert_identical(given, before)
    assert_same_fields(out, moved(given))
    same = out.assign({n: given[n] for n in given.data_vars}).assign_coords(time=given.time)
    xr.testing.assert_identical(same, given)
    assert [out[n].dims for n in out] == [given[n].dims for n in given]
    assert [out[n].attrs for n in out] == [given[n].attrs for n in given]
    assert out.time.values == np.datetime64("2020-01-01T06")


def test_the_reference_of_these_tests_moves_south_and_east(state: xr.Dataset) -> None:
    for order in ORDERS.values():
        given = order(state)
        there, here = (x.t2m.sel(latitude=y, longitude=z, drop=True) for x, y, z in ((moved(given), 0, 90), (given, 30, 45)))
        xr.testing.assert_equal(there / 4 / BY_CELL.sel(latitude=0, longitude=90, drop=True).astype("f4"), here)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("by", [-1, 3, 4])
def test_models_that_start_at_other_longitudes(by: int, order: str, state: xr.Dataset, tmp_path: Path) -> None:
    path = shift_model(tmp_path / "turned.onnx", [1, 5, *PLANE], factor=np.roll(FACTOR, by, -1))
    forecast = forecasts.onnx(path, channels=CHANNELS, **GRID | {"longitude": np.roll(LONGITUDE, by)})
    given = ORDERS[order](state)
    assert_same_fields(forecast(given), moved(given))


def test_a_model_from_south_to_north_and_east_to_west(state: xr.Dataset, tmp_path: Path) -> None:
    path = shift_model(tmp_path / "turned.onnx", [1, 5, *PLANE], factor=FACTOR[:, ::-1, ::-1])
    forecast = forecasts.onnx(path, channels=CHANNELS, **GRID | {"latitude": LATITUDE[::-1], "longitude": LONGITUDE[::-1]})
    factor = BY_CHANNEL["t2m"] * BY_CELL.astype("f4")
    for order in ORDERS.values():
        found = forecast(order(state)).t2m
        found = found.assign_coords(longitude=found.longitude % 360).sel(latitude=LATITUDE, longitude=LONGITUDE)
        expected = state.t2m.roll(latitude=-1, longitude=-1) * factor  # from south to north the first is the south
        np.testing.assert_array_equal(found.transpose(*expected.dims).values, expected.values)


def test_a_single_state_and_one_of_cftime(state: xr.Dataset, path: Path) -> None:
    forecast = forecasts.onnx(path, channels=CHANNELS, **GRID)
    one = state.isel(member=0, drop=True)
    assert_same_fields(forecast(one), moved(one))
    later = forecast(one.assign_coords(time=xr.date_range("2020-02-29", periods=1, use_cftime=True, calendar="all_leap")[0]))
    assert str(later.time.values[()])[:13] == "2020-02-29 06"
    xr.testing.assert_identical(forecasts.by_member(forecast)(state), forecast(state))


def test_variables_are_found_by_names_and_standard_names_and_converted(state: xr.Dataset, path: Path) -> None:
    other = state.rename(t="temperature", z="phi", t2m="2t").assign_coords(level=("level", [85000.0, 50000.0], {"units": "Pa"}))
    other["phi"].attrs["standard_name"] = "geopotential"
    other["2t"] = (other["2t"].astype("f8") - 273.15).assign_attrs(units="degC")
    forecast = forecasts.onnx(path, channels=CHANNELS, **GRID)
    out = forecast(other)
    expected = moved(state)
    np.testing.assert_array_equal(out.phi, expected.z)
    np.testing.assert_array_equal(out.temperature, expected.t)
    np.testing.assert_allclose(out["2t"] + 273.15, expected.t2m, rtol=3e-7)
    assert out["2t"].attrs["units"] == "degC"
    named = other.rename(phi="a", temperature="b", **{"2t": "c"})
    named["a"].attrs.pop("standard_name")
    given = {"z": "a", "t850": "b@85000Pa", "t": "b", "t2m": "c"}
    found = forecasts.onnx(path, channels=CHANNELS, variables=given, **GRID)(named)
    for mine, theirs in zip(found.data_vars, out.data_vars, strict=True):
        np.testing.assert_array_equal(found[mine], out[theirs])


def test_levels_that_are_variables_of_their_own(state: xr.Dataset, path: Path) -> None:
    flat = xr.Dataset(
        {f"{n}{p}": state[n].sel(level=p, drop=True) for n, p in (("z", 500), ("z", 850), ("t", 850), ("t", 500))} | {"t2m": state.t2m}
    )  # fmt: skip
    out, expected = forecasts.onnx(path, channels=CHANNELS, **GRID)(flat), moved(state)
    np.testing.assert_array_equal(out.t850, expected.t.sel(level=850))
    np.testing.assert_array_equal(out.z500, expected.z.sel(level=500))


def test_units_of_the_model_are_an_option(state: xr.Dataset, path: Path) -> None:
    forecast = forecasts.onnx(path, channels=CHANNELS, units={"t": "degC", "z500": "km2 s-2"}, **GRID)
    out, expected = forecast(state), moved(state)
    np.testing.assert_allclose(out.t.sel(level=500), expected.t.sel(level=500) + 273.15 * (1 - 2 * BY_CELL), rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(out.z, expected.z, rtol=1e-6)


@pytest.mark.parametrize("kind", ["numbers by channel", "array", "array of a file", "fields", ".npy", ".json"])
def test_normalisation(kind: str, state: xr.Dataset, tmp_path: Path) -> None:
    """The model halves what it sees: mean + (x - mean) / 2, whatever the standard deviation; and adds nothing that depends on it."""
    path = shift_model(tmp_path / "half.onnx", [1, 5, *PLANE], factor=np.full((1, 1, 1), 0.5))
    mean, std = np.array([5e4, 5e4, 250.0, 260.0, 280.0]), np.array([1e3, 2e3, 10.0, 20.0, 5.0])
    given: dict[str, Any] = {"mean": mean, "std": std}
    if kind in ("numbers by channel", ".json"):
        given = {k: dict(zip(CHANNELS, v.tolist(), strict=True)) for k, v in given.items()}
    if kind in ("array of a file", ".npy"):
        given = {k: v[None, :, None, None] for k, v in given.items()}
    if kind == "fields":
        given = {k: np.broadcast_to(v[:, None, None], (5, *PLANE)) for k, v in given.items()}
    if kind.startswith("."):
        for k, v in given.items():
            file = tmp_path / f"{k}{kind}"
            np.save(file, v) if kind == ".npy" else file.write_text(json.dumps(v), encoding="utf-8")
            given[k] = file
    out = forecasts.onnx(path, channels=CHANNELS, **given, **GRID)(state)
    turned = state.roll(latitude=1, longitude=1, roll_coords=False)
    np.testing.assert_allclose(out.t2m, 280 + (turned.t2m - 280) / 2, rtol=2e-7)
    np.testing.assert_allclose(out.t.sel(level=850), 250 + (turned.t.sel(level=850) - 250) / 2, rtol=2e-7)
    np.testing.assert_allclose(out.z.sel(level=500), 5e4 + (turned.z.sel(level=500) - 5e4) / 2, rtol=2e-7)


def test_the_model_sees_standardised_values(state: xr.Dataset, tmp_path: Path) -> None:
    kinds = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 5, *PLANE])] for n in ("x", "y")]
    path = write(tmp_path / "tanh.onnx", helper.make_graph([helper.make_node("Tanh", ["x"], ["y"])], "tanh", *kinds))
    mean, std = np.array([5e4, 5e4, 260.0, 260.0, 280.0]), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    out = forecasts.onnx(path, channels=CHANNELS, mean=mean, std=std, **GRID)(state)
    np.testing.assert_allclose(out.t2m, 280 + 5 * np.tanh((state.t2m.astype("f8") - 280) / 5), rtol=2e-7)
    np.testing.assert_allclose(
        out.t.sel(level=500), 260 + 4 * np.tanh((state.t.sel(level=500).astype("f8") - 260) / 4), rtol=2e-7
    )


@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        (["n", 5, *PLANE], 1), (["n", 5, *PLANE], 2), (["n", 5, *PLANE], 7), ([2, 5, *PLANE], 1), ([5, *PLANE], 1), ([1, 1, 5, *PLANE], 1),
        (["n", "c", "y", "x"], 3), (["c", *PLANE], 1), ([1, "c", *PLANE], 1),
    ],
)  # fmt: skip
def test_shapes_and_batches(shape: list[Any], batch: int, state: xr.Dataset, tmp_path: Path) -> None:
    path = shift_model(tmp_path / "model.onnx", shape, factor=FACTOR)
    assert_same_fields(forecasts.onnx(path, channels=CHANNELS, batch=batch, **GRID)(state), moved(state))


def test_several_inputs_with_levels_as_an_axis(state: xr.Dataset, tmp_path: Path) -> None:
    """As Pangu-Weather has them; what comes out is another for each."""
    nodes = [helper.make_node("Neg", ["upper"], ["upper_out"]), helper.make_node("Identity", ["ground"], ["ground_out"])]
    upper, ground = [2, 2, *PLANE], [1, *PLANE]
    ends = [
        [helper.make_tensor_value_info(f"{n}{end}", TensorProto.FLOAT, s) for n, s in (("upper", upper), ("ground", ground))]
        for end in ("", "_out")
    ]
    path = write(tmp_path / "two.onnx", helper.make_graph(nodes, "two", *ends))
    channels = {"ground": ["t2m"], "upper": ["z850", "z500", "t850", "t500"]}
    out = forecasts.onnx(path, channels=channels, **GRID)(state)
    xr.testing.assert_equal(out, state.assign(z=-state.z, t=-state.t).assign_coords(time=out.time))
    with pytest.raises(OptionError, match="say which channels are where: channels={'upper'"):
        forecasts.onnx(path, channels=CHANNELS, **GRID)
    with pytest.raises(OptionError, match="names the inputs 'upper', and the model has 'upper', 'ground'"):
        forecasts.onnx(path, channels={"upper": channels["upper"]}, **GRID)


def test_double_precision_stays(state: xr.Dataset, tmp_path: Path) -> None:
    path = shift_model(tmp_path / "double.onnx", [1, 5, *PLANE], dtype="f8")
    wide = state.astype("f8") + 1e-9
    out = forecasts.onnx(path, channels=CHANNELS, **GRID)(wide)
    np.testing.assert_array_equal(out.t2m, np.roll(wide.t2m.values, (1, 1), (-2, -1)))


def test_half_precision_with_standardised_fields(state: xr.Dataset, tmp_path: Path) -> None:
    """Ten bits of what is standardised are a thousandth of a standard deviation; those of heights themselves would be 32 m2 s-2."""
    path = shift_model(tmp_path / "half.onnx", ["n", 5, *PLANE], dtype="f2")
    mean = {"z500": 5e4, "z850": 5e4, "t850": 260.0, "t500": 260.0, "t2m": 280.0}
    out = forecasts.onnx(path, channels=CHANNELS, mean=mean, std=dict.fromkeys(CHANNELS, 1.0), batch=3, **GRID)(state)
    np.testing.assert_allclose(out.z, np.roll(state.z, (1, 1), (-2, -1)), rtol=0, atol=4e-3)
    assert out.z.dtype == np.float32


@pytest.fixture
def with_forcing(tmp_path: Path) -> Path:
    """A model that adds the height of the ground to temperature, and returns besides what no state holds."""
    node = [
        helper.make_node("Split", ["x"], ["t", "h"], axis=0, num_outputs=2),
        helper.make_node("Add", ["t", "h"], ["sum"]),
        helper.make_node("Concat", ["sum", "sum"], ["y"], axis=0),
    ]
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, *PLANE])] for n in ("x", "y")]
    model = helper.make_model(helper.make_graph(node, "forced", *ends), opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save_model(model, tmp_path / "forced.onnx")
    return tmp_path / "forced.onnx"


def test_what_is_not_forecast_stays(state: xr.Dataset, with_forcing: Path) -> None:
    ground = xr.DataArray(
        np.arange(40, dtype="f4").reshape(PLANE), dims=("latitude", "longitude"), attrs={"standard_name": "surface_altitude"}
    )
    given = state[["t2m"]].assign(orography=ground, ice=state.t2m * 0)
    options: dict[str, Any] = {"channels": ["t2m", "orography"], "outputs": ["t2m", "precipitation"], **GRID}
    with pytest.raises(OptionError, match=r"does not forecast 'ice' of the state.*keep=\('ice',\)"):
        forecasts.onnx(with_forcing, **options)(given)
    run = cycled(given, forecasts.onnx(with_forcing, keep=("ice",), **options))
    np.testing.assert_array_equal(run.orography, ground)
    assert not run.ice.any()
    before, after = run.t2m.isel(time=0).sel(stage="analysis"), run.t2m.isel(time=1).sel(stage="background")
    np.testing.assert_array_equal(after.values, (before + ground).values)


def test_models_of_several_times_are_refused(tmp_path: Path) -> None:
    path = shift_model(tmp_path / "history.onnx", [1, 2, 5, *PLANE])
    with pytest.raises(
        OptionError, match=r"shape \(1, 2, 5, 5, 8\), which is 2 times the 5 channels: models of several times are not"
    ):
        forecasts.onnx(path, channels=CHANNELS, **GRID)


def test_models_that_take_more_than_fields_are_refused(tmp_path: Path) -> None:
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [5, *PLANE]), ("hour", [1]), ("y", [5, *PLANE]))
    ]
    path = write(
        tmp_path / "hour.onnx", helper.make_graph([helper.make_node("Add", ["x", "hour"], ["y"])], "hour", ends[:2], ends[2:])
    )
    with pytest.raises(
        OptionError, match="'x', 'hour'.*Models that take more than fields, such as the time of the year, are not supported"
    ):
        forecasts.onnx(path, channels=CHANNELS, **GRID)
    with pytest.raises(OptionError, match=r"'hour' of the model has shape \(1,\)"):
        forecasts.onnx(path, channels={"x": CHANNELS, "hour": ["hour"]}, outputs=CHANNELS, **GRID)


def no_level(ds: xr.Dataset) -> xr.Dataset:
    return ds.assign_coords(level=("level", [850.0, 700.0], {"units": "hPa"}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda ds: ds.drop_vars("t2m"), OptionError, "lacks the channel 't2m' of the model"),
        (lambda ds: ds.drop_vars("z"), OptionError, "none of 'z', 'geopotential' on pressure levels.*variables={'z': 'name'}"),
        (no_level, OptionError, "lacks the level 50000 Pa, channel 'z500' of the model; it has 85000, 70000"),
        (lambda ds: ds.assign(t2m=ds.t2m.where(ds.latitude < 50)), StateError, r"'t2m'\] \(channel 't2m'\) holds NaN in 8 of 40"),
        (lambda ds: ds.assign(t=ds.t + np.float32(np.inf)), StateError, "holds infinity"),
        (lambda ds: ds.isel(latitude=slice(0, 4)), GridError, "on the grid 4 x 8.*and the model on 5 x 8"),
        (lambda ds: ds.assign_coords(longitude=ds.longitude + 1), GridError, "on the grid 5 x 8.*Bring the state there"),
        (lambda ds: ds.drop_vars("time"), CoordinateError, "needs a state of one time"),
        (lambda ds: ds.expand_dims("time"), CoordinateError, r"ds.isel\(time=0\)"),
        (lambda ds: ds.assign(t2m=ds.t2m.assign_attrs(units="m")), UnitsError, "'m' cannot be converted to 'K'"),
        (lambda ds: ds.assign(q=ds.t), OptionError, "does not forecast 'q on 2 of 2 levels' of the state"),
        (lambda ds: ds.assign(s=ds.t2m.expand_dims(kind=2)), CoordinateError, "there may be one, of pressure levels"),
        (lambda ds: ds.t2m, OptionError, "an xarray Dataset is needed"),
    ],
)  # fmt: skip
def test_states_that_do_not_fit_are_refused(change: Any, error: Any, message: str, state: xr.Dataset, path: Path) -> None:
    with pytest.raises(error, match=message):
        forecasts.onnx(path, channels=CHANNELS, **GRID)(change(state))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lead": "-6h"}, OptionError, "lead='-6h' must be positive"),
        ({"channels": CHANNELS[:4]}, OptionError, "and 4 channels are named for it"),
        ({"channels": ["t2m"] * 5}, OptionError, "'t2m' is there 5 times"),
        ({"channels": "t2m"}, OptionError, "give names in the order of the model"),
        ({"latitude": LATITUDE[:-1]}, OptionError, "with 4 latitudes and 8 longitudes"),
        ({"latitude": 5}, GridError, "degrees along one axis are needed"),
        ({"latitude": [1, 0, 2, 3, 4]}, GridError, "The model: latitude .* is not monotonic"),
        ({"variables": {"t3m": "t2m"}}, OptionError, "variables names 't3m'.*Did you mean 't2m'"),
        ({"units": {"t2m": 1}}, OptionError, "units\\['t2m'\\]=1 is not accepted"),
        ({"keep": "t2m"}, OptionError, "keep='t2m' is not accepted"),
        ({"batch": 2}, OptionError, "batch=2 is not accepted: the model takes 1 at once"),
        ({"threads": 0}, OptionError, "threads=0"),
        ({"providers": ["Abacus"]}, OptionError, "this onnxruntime has .*'CPUExecutionProvider'"),
        ({"mean": np.zeros(4)}, OptionError, "mean has shape \\(4,\\); \\(5,\\) is needed"),
        ({"mean": {"t2m": 0.0}}, OptionError, "mean lacks the channel 'z500'"),
        ({"mean": np.zeros(5)}, OptionError, "mean is given without std"),
        ({"std": np.zeros(5)}, OptionError, "std of 'z500' holds 0"),
        ({"std": "x.npy"}, CheckpointError, "std='x.npy' cannot be read"),
        ({"std": "x.pkl"}, OptionError, "a .npy or .json file is read"),
        ({"sha256": "0" * 64}, ChecksumError, "has the sha256"),
    ],
)  # fmt: skip
def test_options_that_are_refused(change: dict[str, Any], error: Any, message: str, path: Path) -> None:
    with pytest.raises(error, match=message):
        forecasts.onnx(path, **{"channels": CHANNELS, **GRID} | change)


def test_a_forecast_shows_itself_in_one_line(path: Path) -> None:
    shown = repr(forecasts.onnx(path, channels=CHANNELS, **GRID))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert shown.startswith("<OnnxForecast of z500, z850, t850, ... (5 channels), 6 h, 5 x 8")
    assert shown.endswith(f"sha256 {checksum[:12]}>")
    assert len(shown) < 200


def test_variables_that_cannot_be(state: xr.Dataset, path: Path) -> None:
    for given, message in (
        ({"t2m": "temperatur"}, "is to be 'temperatur', which is no field of ds"),
        ({"t2m": "t"}, "which has 2 levels; say which: variables={'t2m': 't@85000Pa'}"),
        ({"t2m": "t@-85000m"}, "is a depth, and 't' has levels of pressure"),
        ({"t2m": "t@85000Pa"}, "'t850', 't2m' of the model are all found in 't'"),
    ):
        with pytest.raises(OptionError, match=message):
            forecasts.onnx(path, channels=CHANNELS, variables=given, keep=("t2m",), **GRID)(state)


def test_what_is_no_model(tmp_path: Path, path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no file"):
        forecasts.onnx(tmp_path / "none.onnx", channels=CHANNELS, **GRID)
    for name, content in (("empty", b""), ("text", b"this is no model"), ("cut", path.read_bytes()[:-40])):
        file = tmp_path / f"{name}.onnx"
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="is empty|is no ONNX file, or was cut short"):
            forecasts.onnx(file, channels=CHANNELS, **GRID)
    node = helper.make_node("Abacus", ["x"], ["y"], domain="nobody")
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [5, *PLANE])] for n in ("x", "y")]
    odd = helper.make_model(
        helper.make_graph([node], "odd", *ends), opset_imports=[helper.make_opsetid("nobody", 1)], ir_version=8
    )
    onnx.save_model(odd, tmp_path / "odd.onnx")
    with pytest.raises(CheckpointError, match="cannot be opened as an ONNX model"):
        forecasts.onnx(tmp_path / "odd.onnx", channels=CHANNELS, **GRID)


def test_a_model_that_breaks_ends_the_cycle_with_what_there_is(state: xr.Dataset, tmp_path: Path) -> None:
    path = shift_model(tmp_path / "growing.onnx", [1, 5, *PLANE], factor=np.full((1, 1, 1), 1e12))
    with pytest.raises(
        DivergenceError, match=r"Cycle 1.*beyond 1e\+15|returned NaN or infinity in channel 'z500' of member 3"
    ) as found:
        cycled(state, forecasts.onnx(path, channels=CHANNELS, **GRID))
    path = shift_model(tmp_path / "nan.onnx", [1, 5, *PLANE], factor=np.full((1, 1, 1), np.nan))
    with pytest.raises(
        DivergenceError, match="The forecast model returned NaN or infinity in channel 'z500' of member 3"
    ) as found:
        cycled(state, forecasts.onnx(path, channels=CHANNELS, **GRID))
    assert found.value.cycle == 1
    assert isinstance(found.value.result, xr.Dataset)
    assert found.value.result.sizes["time"] == 1


def test_a_cycle_is_not_resumed_with_another_model(state: xr.Dataset, path: Path, tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    forecast = forecasts.onnx(path, channels=CHANNELS, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **GRID)
    whole = cycled(state, forecast)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in whole.attrs["xgenda_forecast"]
    cycled(state, forecast, TIMES[:2], store=store)
    other = shift_model(tmp_path / "other.onnx", [1, 5, *PLANE], factor=2 * FACTOR)
    changed: list[Any] = [
        forecasts.onnx(other, channels=CHANNELS, **GRID), forecasts.onnx(path, channels=CHANNELS[::-1], **GRID),
        forecasts.onnx(path, channels=CHANNELS, std=np.full(5, 2.0), **GRID), forecasts.persistence("6h"),
        forecasts.by_member(forecasts.onnx(other, channels=CHANNELS, **GRID)),
    ]  # fmt: skip
    for wrong in changed:
        with pytest.raises(OptionError, match="(?s)resume=True goes on with the same data and options only.*\n  forecast"):
            cycled(state, wrong, store=store, resume=True)
    resumed = cycled(state, forecasts.by_member(forecasts.onnx(path, channels=CHANNELS, **GRID)), store=store, resume=True)
    xr.testing.assert_identical(resumed.compute().drop_attrs(), whole.drop_attrs())


def test_weights_in_other_files_count_for_the_identity(state: xr.Dataset, tmp_path: Path) -> None:
    path = shift_model(tmp_path / "model.onnx", [1, 5, *PLANE], factor=FACTOR, external=True)
    assert weight_files(path) == ["weights.bin"]
    forecast = forecasts.onnx(path, channels=CHANNELS, **GRID)
    before = forecast(state)
    assert_same_fields(before, moved(state))
    weights = tmp_path / "weights.bin"
    assert forecast.identity["weights.bin"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    content = weights.read_bytes()  # whose last number is the factor of the last channel in the last cell
    weights.write_bytes(content[:-4] + (2 * np.frombuffer(content[-4:], "f4")).tobytes())
    other = forecasts.onnx(path, channels=CHANNELS, **GRID)
    assert other.identity["onnx"] == forecast.identity["onnx"]
    assert other.identity != forecast.identity
    found = other(state).t2m / before.t2m
    np.testing.assert_array_equal(found[:, -1, -1], 2)
    assert float(found.sum()) == found.size + 3
    path.write_bytes(path.read_bytes().replace(b"weights.bin", b"../else.bin"))
    with pytest.raises(CheckpointError, match="'../else.bin', which is not in its folder"):
        forecasts.onnx(path, channels=CHANNELS, **GRID)
    path.write_bytes(path.read_bytes().replace(b"../else.bin", b"missing.bin"))
    with pytest.raises(CheckpointError, match="'missing.bin', which is not there"):
        forecasts.onnx(path, channels=CHANNELS, **GRID)


def test_the_extra_is_named_where_it_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'xgenda\[onnx\]'") as found:
        forecasts.onnx(path, channels=CHANNELS, **GRID)
    assert isinstance(found.value, ImportError)


def test_nothing_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    program = "import sys; from xgenda.forecasts import onnx, earth2studio; print({'torch', 'onnxruntime'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "set()"


#: Of what earth2studio 0.19 calls a prognostic model.
E2S = {"variable": np.array(CHANNELS), "lat": LATITUDE, "lon": LONGITUDE}


class Shift(torch.nn.Module):
    """A prognostic model with the interface of earth2studio 0.19, as strict about its coordinates as those are."""

    def __init__(self, dims: tuple[str, ...] = ("batch", "time"), leads: tuple[int, ...] = (6,), history: int = 1) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(FACTOR, dtype=torch.float32))
        self.dims, self.leads, self.history, self.seen = dims, leads, history, []

    def input_coords(self) -> Any:
        before = np.array([np.timedelta64(-6 * i, "h") for i in reversed(range(self.history))])
        return OrderedDict({**{d: np.empty(0) for d in self.dims}, "lead_time": before, **E2S})

    def output_coords(self, coords: Any) -> Any:
        expected = self.input_coords()
        assert list(coords) == list(expected)
        for name in ("variable", "lat", "lon"):
            np.testing.assert_array_equal(coords[name], expected[name])
        out = OrderedDict(coords)
        out["lead_time"] = coords["lead_time"][-1] + np.array([np.timedelta64(h, "h") for h in self.leads])
        return out

    def __call__(self, x: Any, coords: Any) -> Any:
        assert isinstance(coords, OrderedDict)
        assert tuple(x.shape) == tuple(len(v) for v in coords.values())
        assert x.dtype == torch.float32
        assert not self.training
        self.seen.append(coords)
        axis = list(coords).index("lead_time")
        steps = [x]
        for _ in self.leads:
            steps.append(torch.roll(steps[-1], (1, 1), (-2, -1)) * self.factor)
        return torch.cat(steps[1:], axis), self.output_coords(coords)

    def create_iterator(self, x: Any, coords: Any) -> Iterator[Any]:
        yield x, coords
        while True:
            x, coords = self(x, coords)
            yield x, coords


@pytest.mark.parametrize("order", ORDERS)
def test_a_cycle_with_a_model_of_earth2studio_in_every_order(order: str, state: xr.Dataset) -> None:
    run = cycled(ORDERS[order](state), forecasts.earth2studio(Shift()), TIMES[:3])
    for t in (1, 2):
        assert_same_fields(run.isel(time=t).sel(stage="background"), moved(run.isel(time=t - 1).sel(stage="analysis")))


@pytest.mark.parametrize(("dims", "batch"), [(("batch", "time"), 2), (("batch",), 3), (("time",), 1), ((), 1)])
def test_dimensions_of_models_of_earth2studio(dims: tuple[str, ...], batch: int, state: xr.Dataset) -> None:
    model = Shift(dims)
    out = forecasts.earth2studio(model, batch=batch)(state)
    assert_same_fields(out, moved(state))
    assert [len(c.get("batch", [0])) for c in model.seen] == {1: [1, 1, 1], 2: [2, 1], 3: [3]}[batch]
    if "time" in dims:
        assert model.seen[0]["time"] == np.array([np.datetime64("2020-01-01T00")])
    assert out.time.values == np.datetime64("2020-01-01T06")


def test_lead_times_of_models_of_earth2studio(state: xr.Dataset) -> None:
    twice = moved(moved(state))
    for model, lead in ((Shift(), "12h"), (Shift(leads=(6, 12)), "12h"), (Shift(leads=(6, 12)), "6h")):
        out = forecasts.earth2studio(model, lead=lead)(state)
        assert_same_fields(out, twice if lead == "12h" else moved(state))
        assert out.time.values == np.datetime64("2020-01-01T00") + np.timedelta64(int(lead[:-1]), "h")
    with pytest.raises(OptionError, match="returns lead times 6 hours, 12 hours; say which: lead='6h'"):
        forecasts.earth2studio(Shift(leads=(6, 12)))
    with pytest.raises(OptionError, match="is not accepted: the model goes from lead times before it to 12 hours"):
        forecasts.earth2studio(Shift(), lead="9h")(state)


class Noisy(Shift):
    """One that draws."""

    def set_rng(self, seed: int, reset: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Any, coords: Any) -> Any:
        out, after = super().__call__(x, coords)
        return out + torch.randn(out.shape, generator=self.generator), after


def test_random_numbers_are_of_seed_time_and_member(state: xr.Dataset) -> None:
    with pytest.raises(OptionError, match="draws random numbers.*seed=0"):
        forecasts.earth2studio(Noisy())
    forecast = forecasts.earth2studio(Noisy(), seed=1)
    out = forecast(state)
    xr.testing.assert_identical(forecast(state), out)
    xr.testing.assert_identical(forecast(state.isel(member=[2, 0])), out.isel(member=[2, 0]))
    noise = (out - moved(state)).t2m
    for other in (
        forecasts.earth2studio(Noisy(), seed=2)(state),
        forecast(state.assign_coords(time=state.time + np.timedelta64(1, "h"))),
    ):
        assert abs(xr.corr(noise, (other - moved(state)).t2m)) < 0.3
    assert abs(xr.corr(noise.isel(member=0), noise.isel(member=1))) < 0.5
    assert float(noise.std()) == pytest.approx(1, abs=0.2)


def test_a_cycle_is_not_resumed_with_other_weights_of_earth2studio(state: xr.Dataset, tmp_path: Path) -> None:
    whole = cycled(state, forecasts.earth2studio(Shift()))
    cycled(state, forecasts.earth2studio(Shift()), TIMES[:2], store=tmp_path / "run.zarr")
    other = Shift()
    with torch.no_grad():
        other.factor[0] = 3.0
    with pytest.raises(OptionError, match="(?s)same data and options only.*\n  forecast.weights: "):
        cycled(state, forecasts.earth2studio(other), store=tmp_path / "run.zarr", resume=True)
    resumed = cycled(state, forecasts.earth2studio(Shift()), store=tmp_path / "run.zarr", resume=True)
    xr.testing.assert_identical(resumed.compute().drop_attrs(), whole.drop_attrs())


class Healpix(Shift):
    def input_coords(self) -> Any:
        return OrderedDict(
            {"lead_time": np.zeros(1, "timedelta64[h]"), "variable": E2S["variable"], "face": np.arange(12), "h": np.arange(2)}
        )


class Regridding(Shift):
    def output_coords(self, coords: Any) -> Any:
        return super().output_coords(coords) | {"lat": LATITUDE[:3]}


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (torch.nn.Identity(), {}, OptionError, "model is a Identity without 'input_coords'"),
        (Shift, {}, OptionError, "model is the class Shift; a prognostic model of earth2studio is needed"),
        (Shift(history=2), {}, OptionError, "needs the states at lead times -6 hours, 0 hours: models of several input times are not supported"),
        (Healpix(), {}, GridError, "has fields along .*'face'"),
        (Regridding(), {}, GridError, "returns fields on other lat than it takes"),
        (Shift(), {"seed": 1}, OptionError, "seed=1 has no effect"),
        (Noisy(), {"seed": 1, "batch": 2}, OptionError, "batch=2 is not accepted with a seed"),
        (Shift(()), {"batch": 2}, OptionError, "has no dimension 'batch'"),
        (Shift(), {"variables": {"q": "q"}}, OptionError, "variables names 'q'"),
    ],
)  # fmt: skip
def test_models_of_earth2studio_that_are_refused(model: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        forecasts.earth2studio(model, **options)


def test_states_that_do_not_fit_a_model_of_earth2studio(state: xr.Dataset) -> None:
    forecast = forecasts.earth2studio(Shift())
    with pytest.raises(StateError, match="holds NaN"):
        forecast(state.where(state.latitude < 50))
    with pytest.raises(CoordinateError, match="calendar of datetime64 only"):
        forecast(state.assign_coords(time=xr.date_range("2020-02-29", periods=1, use_cftime=True, calendar="all_leap")[0]))
    broken = Shift()
    with torch.no_grad():
        broken.factor[4] = torch.nan
    with pytest.raises(DivergenceError, match="returned NaN or infinity in channel 't2m' of member 3"):
        forecasts.earth2studio(broken)(state)


def test_names_that_may_be_ten_metres_or_ten_hectopascals_are_asked_about(tmp_path: Path) -> None:
    path = shift_model(tmp_path / "winds.onnx", [1, 2, *PLANE])
    with pytest.raises(OptionError, match=r"'u10' may be at 10 m or at 10 hPa.*variables=\{'u10': 'u10'\}"):
        forecasts.onnx(path, channels=["u10", "u500"], **GRID)
    assert forecasts.onnx(path, channels=["u10", "u500"], variables={"u10": "uas"}, **GRID) is not None

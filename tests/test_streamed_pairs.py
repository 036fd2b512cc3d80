"""Pairs read when asked for: equal to those in memory, with fits to evenly spaced ones, in bounded memory; trainings that can be resumed."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.errors import GridError, OptionError, StateError, UnitsError
from xgenda.models.checkpoints import content_hash
from xgenda.models.means import LinearMean, fit_mean
from xgenda.training import reservoirs, statistics
from xgenda.training.downscalers import Recipe, _crossed, _with_means
from xgenda.training.pairs import Pairs, read_background_pairs, read_pairs
from xgenda.training.pairstreams import PairStream, Sides
from xgenda.training.reporting import Progress
from xgenda.training.reservoirs import Large, evenly_spaced
from xgenda.training.sources import Source
from xgenda.training.standardising import Prepared, prepare_pairs
from xgenda.training.tuning import scales
from xgenda.training.windows import FOLDS, HELD, blocks

SMALL = 1000.0  # bytes, which no store here fits into


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGENDA_CACHE", str(tmp_path / "cache"))


def weather(n: int = 60, seed: int = 0, memory: float = 0.0) -> xr.Dataset:
    """Two variables on 8 x 8 cells whose blocks of 4 x 4 have something in common, float32; `memory` from one time to the next."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((n, 2, 2))
    for k in range(1, n):
        noise[k] = memory * noise[k - 1] + (1 - memory**2) ** 0.5 * noise[k]
    base = noise.repeat(4, 1).repeat(4, 2)
    season = np.cos(2 * np.pi * np.arange(n) / 73)[:, None, None]
    t = 280 + 4 * season + base + 0.5 * rng.standard_normal((n, 8, 8))
    rain = np.exp(0.5 * base + 0.3 * rng.standard_normal((n, 8, 8)))
    dims = ("time", "latitude", "longitude")
    return xr.Dataset(
        {
            "t2m": (dims, t.astype("f4"), {"units": "K", "standard_name": "air_temperature"}),
            "rain": (dims, rain.astype("f4"), {"units": "mm"}),
        },
        {
            "time": pd.date_range("2001-01-01", periods=n, freq="6h"),
            "latitude": ("latitude", np.linspace(40, 47, 8), {"units": "degrees_north"}),
            "longitude": ("longitude", np.linspace(0, 7, 8), {"units": "degrees_east"}),
        },
    )


def coarsened(ds: xr.Dataset, cells: int = 2) -> xr.Dataset:
    return ds.coarsen(latitude=cells, longitude=cells).mean(keep_attrs=True).astype("f4")


def stored(ds: xr.Dataset, path: Path, chunk: int = 7) -> xr.Dataset:
    """Return `ds` as opened from a Zarr store."""
    encoding = {n: {"chunks": (chunk, *v.shape[1:])} for n, v in ds.data_vars.items()}
    ds.to_zarr(path, encoding=encoding, consolidated=False)
    opened: xr.Dataset = xr.open_zarr(path, chunks=None, consolidated=False)
    return opened[list(ds.data_vars)]


def large(memory: float = SMALL, transform: Any = "none", **options: Any) -> Large:
    return Large(memory, scales(options.pop("start", None), "none", transform, 1e-3), **options)


def read(ds: xr.Dataset, target: xr.Dataset | None = None, factor: int | None = None, **options: Any) -> Pairs:
    asked: dict[str, Any] = {"variables": None, "statics": None, "offsets": (0,), "lead_time": False, **options}
    return read_pairs(ds, target, factor, **asked)


def prepared(pairs: Pairs, transform: Any = "none", cycle: str = "none", task: str = "downscale") -> Prepared:
    return prepare_pairs(pairs, "none", transform, 1e-3, None, cycle, "x", "diffusion", "none", task=task)


def nothing(ready: Prepared) -> list[LinearMean]:
    return [LinearMean(ready.shape)] * FOLDS


def check_equal(streamed: Pairs, whole: Pairs, rows: np.ndarray, **how: Any) -> None:
    """Check what is read of some pairs against those in memory."""
    assert streamed.reservoir is not None
    ready, wanted = prepared(streamed, **how), prepared(whole, **how)
    np.testing.assert_allclose(ready.spec.scaling.mean, wanted.spec.scaling.mean, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    np.testing.assert_allclose(ready.spec.scaling.std, wanted.spec.scaling.std, rtol=1e-5)  # type: ignore[union-attr]
    given, known = ready.features.conditions, wanted.features.conditions
    assert (given.offsets, given.spacing, given.lead_time) == (known.offsets, known.spacing, known.lead_time)
    assert ready.weights == wanted.weights
    fields = PairStream(streamed.reservoir, ready, nothing(ready), sees_mean=False).regression(torch.ones(ready.shape))
    found = fields.read(torch.as_tensor(rows))
    channels = ready.shape[0]
    assert fields.shape == (len(wanted.fine), channels + wanted.features.channels, *ready.shape[1:])
    inputs = wanted.features.of(wanted.interpolated, wanted.planes, wanted.features.everywhere())
    # without neighbours, statistics of the inputs are of the same fields
    tolerance = 1e-4 if len(given.offsets) == 1 else 0.2
    torch.testing.assert_close(found[:, :channels], wanted.fine[rows].float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found[:, channels:], inputs[rows].float(), rtol=0, atol=tolerance)


# what is read


@pytest.mark.parametrize("chunks", [(7, 7), (4, 25), (25, 4)])
def test_pairs_are_those_in_memory(chunks: tuple[int, int], tmp_path: Path) -> None:
    ds = weather(200)
    coarse = coarsened(ds)
    streamed = read(stored(coarse, tmp_path / "c", chunks[1]), stored(ds, tmp_path / "f", chunks[0]), large=large())
    rows = np.array([3, 199, 20, 21, 3, 0, 100])
    check_equal(streamed, read(coarse, ds), rows, cycle="hour")
    assert streamed.reservoir is not None
    chosen = streamed.reservoir.rows
    assert 60 <= len(chosen) <= 70
    np.testing.assert_array_equal(streamed.fine.values, np.stack([ds.t2m.values, ds.rain.values], 1)[chosen])
    np.testing.assert_array_equal(streamed.inputs(0), np.stack([coarse.t2m.values, coarse.rain.values], 1)[chosen])


@pytest.mark.parametrize("transform", ["none", {"rain": "log"}])
def test_block_means_are_made_while_reading(transform: Any, tmp_path: Path) -> None:
    ds = weather(90)
    streamed = read(stored(ds, tmp_path / "f"), factor=2, large=large(transform=transform))
    check_equal(streamed, read(ds, factor=2), np.arange(0, 90, 7), transform=transform)


def test_sides_of_other_times_units_orders_and_variables(tmp_path: Path) -> None:
    ds = weather(100)
    coarse = coarsened(ds)
    coarse["t2m"] = (coarse.t2m - 273.15).assign_attrs(units="degC", standard_name="air_temperature")
    coarse["wind"] = (coarse.rain + 1).assign_attrs(units="m s-1")
    coarse = coarse[["wind", "t2m"]].isel(latitude=slice(None, None, -1), time=slice(None, None, -1))
    fine = ds.isel(time=slice(10, None, 2))
    lazy = coarse.chunk(time=9), stored(fine.drop_encoding(), tmp_path / "f")
    check_equal(read(*lazy, large=large()), read(coarse, fine), np.array([44, 0, 13, 14]))


@pytest.mark.parametrize("window", [{"offsets": (-1, 0, 2)}, {"offsets": (-1, 0, 1), "ends": "nearest"}])
def test_neighbours_statics_and_lead_times(window: dict[str, Any], tmp_path: Path) -> None:
    ds = weather(100)
    hours = ("time", np.arange(100) % 4 * 6, {"standard_name": "forecast_period", "units": "h"})
    coarse = coarsened(ds).assign_coords(forecast_period=hours)
    statics = xr.Dataset({"height": (("latitude", "longitude"), np.arange(64.0).reshape(8, 8))}, ds.drop_vars("time").coords)
    options: dict[str, Any] = {**window, "statics": statics, "lead_time": True}
    streamed = read(stored(coarse, tmp_path / "c"), stored(ds, tmp_path / "f"), **options, large=large())
    check_equal(streamed, read(coarse, ds, **options), np.array([0, 50, 96, 3]))


@pytest.mark.parametrize("how", ["forecasts", "lag"])
def test_backgrounds_are_those_in_memory(how: str, tmp_path: Path) -> None:
    ds = weather(100)
    options: dict[str, Any] = {"task": "background", "variables": None, "statics": None, "lead_time": False}
    if how == "lag":
        pairs = [
            read_background_pairs(d, None, "12h", **options, large=large())[0]
            for d in (stored(ds, tmp_path / "f"), ds.isel(time=slice(0, None)))
        ]
    else:
        given = ds.assign_coords(time=ds.time + np.timedelta64(6, "h"))
        given["t2m"] = (given.t2m - 273.15).assign_attrs(units="degC", standard_name="air_temperature")
        given = given.rename(t2m="temperature")[["rain", "temperature"]].assign(wind=given.rain)
        sides = given.isel(time=slice(0, -1)), ds.isel(time=slice(1, None))
        lazy = [stored(d, tmp_path / str(k), 5 + 4 * k) for k, d in enumerate(sides)]
        pairs = [read_background_pairs(*s, None, **options, large=large())[0] for s in (lazy, sides)]
    streamed, whole = pairs
    assert whole.reservoir is None
    assert [v.name for v in streamed.coarse.variables] == ["t2m", "rain"]
    assert streamed.reservoir is not None
    ready, wanted = (prepared(p, task="background") for p in pairs)
    assert ready.features.conditions.scaling is ready.spec.scaling
    fields = PairStream(streamed.reservoir, ready, nothing(ready), sees_mean=False).regression(torch.ones(ready.shape))
    rows = torch.tensor([0, 40, 41, len(wanted.fine) - 1])
    found = fields.read(rows)
    # with lag, statistics are of all states of the series, and not of those alone that have a background
    torch.testing.assert_close(found[:, :2], wanted.fine[rows].float(), rtol=0, atol=1e-4 if how == "forecasts" else 0.1)
    torch.testing.assert_close(found[:, 2:], wanted.interpolated[rows], rtol=0, atol=1e-4 if how == "forecasts" else 0.1)


def test_levels_that_are_stored_together(tmp_path: Path) -> None:
    ds = weather(70)
    levels = xr.concat([ds.t2m + 3 * k * ds.rain for k in range(3)], pd.Index([500, 850, 1000], name="level"))
    both = xr.Dataset({"t": levels.transpose("time", "level", ...).astype("f4").assign_attrs(units="K")})
    both.level.attrs["units"] = "hPa"
    both.to_zarr(tmp_path / "a", encoding={"t": {"chunks": (10, 3, 8, 8)}}, consolidated=False)
    lazy = xr.open_zarr(tmp_path / "a", chunks=None, consolidated=False)
    truth = both.sel(level=[1000, 500])
    options: dict[str, Any] = {"task": "background", "variables": None, "statics": None, "lead_time": False}
    streamed, _ = read_background_pairs(lazy, truth.chunk(time=10), None, **options, large=large())
    whole, _ = read_background_pairs(both, truth, None, **options)
    assert streamed.reservoir is not None
    np.testing.assert_array_equal(streamed.inputs(0), whole.inputs(0)[streamed.reservoir.rows])
    assert len(streamed.reservoir.coarse.parts) == 1  # each chunk is decoded once


def test_missing_times_of_either_side_are_left_out(tmp_path: Path) -> None:
    ds = weather(100)
    coarse = coarsened(ds)
    ds["rain"][11] = np.nan
    coarse["t2m"][40] = np.nan
    lazy = stored(coarse, tmp_path / "c"), stored(ds, tmp_path / "f")
    with pytest.warns(UserWarning, match="1 of [0-9]+ fields along 'time' are missing") as found:
        streamed = read(*lazy, large=large())
    assert len(found) == 2
    with pytest.warns(UserWarning, match="1 of 100 fields along 'time' are missing"):
        whole = read(coarse, ds)
    assert streamed.reservoir is not None
    np.testing.assert_array_equal(streamed.reservoir.fine.time, whole.fine.time)
    assert streamed.reservoir.fine.size == 98
    np.testing.assert_array_equal(streamed.inputs(0), whole.inputs(0)[streamed.reservoir.rows])


def test_what_is_in_memory_or_small_is_used_whole(tmp_path: Path) -> None:
    ds = weather()
    lazy = ds.chunk(time=7)
    assert read(ds, factor=2, large=large()).reservoir is None
    assert read(lazy, factor=2, large=large(1e6)).reservoir is None
    assert read(coarsened(ds), ds, large=large()).reservoir is None
    assert read(coarsened(ds), lazy, large=large()).reservoir is not None
    assert read(coarsened(ds).chunk(time=7), ds, large=large()).reservoir is not None
    # both sides count
    both = ds.nbytes + coarsened(ds).nbytes - 2000
    assert read(coarsened(lazy), lazy, large=large(both * 0.9)).reservoir is not None
    ds.to_netcdf(tmp_path / "a.nc")
    with xr.open_dataset(tmp_path / "a.nc") as opened:
        assert read(opened, factor=2, large=large()).reservoir is not None


# the sample, the statistics and the fits


def test_the_sample_is_evenly_spaced_with_enough_of_each_block() -> None:
    time = xr.DataArray(pd.date_range("2000-01-01", periods=1000), dims="time")
    fold = blocks(time, 1000, FOLDS, slice("2001-01-01", "2001-01-12"))
    rows = evenly_spaced(fold, np.arange(1000), 100)
    assert (np.diff(rows) > 0).all()
    counts = np.bincount(fold[rows], minlength=FOLDS)
    assert counts[HELD] == 8 < 12
    assert abs(len(rows) - 108) < 4
    for k in set(range(FOLDS)) - {HELD}:
        steps = np.diff(np.flatnonzero(fold == k)[np.isin(np.flatnonzero(fold == k), rows)])
        assert steps.max() - steps.min() <= 13  # the withheld days lie within a block
    np.testing.assert_array_equal(evenly_spaced(fold, np.arange(1000), 1000), np.arange(1000))


def test_times_that_resemble_the_validation_block_are_not_trained_on(tmp_path: Path) -> None:
    ds = weather(600, memory=0.97)
    pairs = read(stored(ds, tmp_path / "f", 30), factor=2, large=large())
    assert pairs.reservoir is not None
    train, held = pairs.reservoir.split(prepared(pairs).reach)
    whole = prepared(read(ds, factor=2)).split()
    assert held.tolist() == whole[1].tolist()
    assert set(train.tolist()) <= set(whole[0].tolist())
    assert len(train) > 300
    independent = read(stored(weather(600), tmp_path / "g", 30), factor=2, large=large())
    assert independent.reservoir is not None
    # a sample of every tenth time cannot tell less than that
    assert len(independent.reservoir.split(0)[0]) == 500 - 2 * 9


def test_statistics_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "HASHED", 0)
    monkeypatch.setattr(statistics, "FIELDS", 2)
    ds = weather(400)
    lazy = stored(coarsened(ds), tmp_path / "c", 10), stored(ds, tmp_path / "f", 10)
    loaded, load, lock = [0], Source._load, threading.Lock()

    def counted(self: Source, start: int, stop: int, *others: Any) -> None:
        with lock:
            loaded[0] += stop - start
        load(self, start, stop, *others)

    monkeypatch.setattr(Source, "_load", counted)
    first, passed = read(*lazy, large=large()), loaded[0]
    assert passed >= 800  # a pass over each side
    loaded[0] = 0
    again = read(*lazy, large=large())
    assert loaded[0] <= passed - 790
    assert first.reservoir is not None
    assert again.reservoir is not None
    np.testing.assert_array_equal(first.reservoir.statistics.mean, again.reservoir.statistics.mean)
    loaded[0] = 0
    read(*lazy, large=large(transform={"rain": "log"}))  # other options
    assert loaded[0] >= 800


def test_predictions_of_a_block_know_nothing_of_it(tmp_path: Path) -> None:
    ds, other = weather(60), weather(60)
    fold = blocks(ds.time, 60, FOLDS)
    other["t2m"][fold == 2] += np.arange(8, dtype="f4")
    found = []
    for k, d in enumerate((ds, other)):
        pairs = read(stored(coarsened(ds), tmp_path / f"c{k}"), stored(d, tmp_path / f"f{k}"), large=large())
        assert pairs.reservoir is not None
        # standardised alike, whatever the other block holds
        before = read(coarsened(ds), ds)
        ready = prepare_pairs(pairs, "none", "none", 1e-3, None, "none", "x", "diffusion", "none")
        ready.fine[:] = torch.as_tensor((pairs.fine.values - before.fine.values.mean(0)) / 3)
        recipe = Recipe("none", "none", 1e-3, None, None, None, 8, "unet", "both", True, False, False, "none", False, None)
        linear, _, kind, _ = fit_mean(ready.for_mean(), ("local",), always=True)
        crossed = _crossed(ready, linear, kind, None, recipe)
        found.append([m.at(ready.coarse, ready.interpolated, ready.features.everywhere()) for m in crossed])
    same = [torch.equal(a, b) for a, b in zip(*found, strict=True)]
    assert same[2]
    assert not any(same[:2] + same[3:])


@pytest.mark.parametrize("transform", ["none", {"rain": "log"}])
def test_targets_are_what_the_mean_leaves(transform: Any, tmp_path: Path) -> None:
    """The same numbers as training in memory makes of all pairs at once."""
    ds = weather(60)
    pairs = read(stored(ds, tmp_path / "f"), factor=2, large=large(transform=transform))
    ready = prepared(pairs, transform)
    assert pairs.reservoir is not None
    assert len(pairs.reservoir.rows) == 60
    rng = np.random.default_rng(0)
    slopes = [torch.as_tensor(rng.standard_normal((2, 2, 1, 1))) for _ in range(FOLDS)]
    linear = [LinearMean(ready.shape, s) for s in slopes]
    stream = PairStream(pairs.reservoir, ready, linear, sees_mean=True)
    everything = torch.arange(60)
    given = ready.interpolated
    mean = torch.stack(
        [(slopes[k][..., 0, 0] @ given[i].double().flatten(1)).reshape(ready.shape) for i, k in enumerate(ready.fold)]
    )
    torch.testing.assert_close(stream.predicted(), mean)
    spread = torch.full(ready.shape, 0.5)
    found = stream.regression(spread).read(everything)
    torch.testing.assert_close(found[:, :2], ((ready.fine - mean) / 0.5).float(), rtol=0, atol=1e-4)
    condition = torch.cat([given, mean.float()], 1)
    torch.testing.assert_close(found[:, 2:], condition, rtol=0, atol=1e-4)

    asked: list[torch.Tensor] = []

    def network(condition: torch.Tensor) -> torch.Tensor:
        asked.append(condition)
        return 0.1 * condition[:, :2].double()

    conserve = {"weights": "cells", "channels": [0, 1], "inputs": [0, 1]}
    optimistic = torch.tensor([2.0, 3.0], dtype=torch.float64)
    found = stream.residual([0.5, 2.0], optimistic, True, network, conserve).read(everything)
    torch.testing.assert_close(asked[0], condition, rtol=0, atol=1e-4)
    whole = _with_means(ready, pairs, mean + 0.1 * given.double(), [0, 1])
    left = ready.fine - whole
    left[torch.as_tensor(ready.fold != HELD)] *= optimistic[:, None, None]
    torch.testing.assert_close(found[:, :2], (left / torch.tensor([0.5, 2.0])[:, None, None]).float(), rtol=0, atol=2e-3)
    torch.testing.assert_close(found[:, 2:], torch.cat([whole.float(), given], 1), rtol=0, atol=2e-3)


# the order, and what is held


def test_batches_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    ds = weather(90)
    pairs = read(stored(coarsened(ds), tmp_path / "c", 20), stored(ds, tmp_path / "f"), large=large())
    ready = prepared(pairs)
    assert pairs.reservoir is not None
    stream = PairStream(pairs.reservoir, ready, nothing(ready), sees_mean=False)
    fields, chosen = stream.regression(torch.ones(ready.shape)), torch.arange(5, 85)

    def taken(
        count: int, seed: int = 0, step: int = 0, part: tuple[int, int] = (0, 1)
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches = fields.batches(chosen, 6, seed, step, part)
        out = list(itertools.islice(batches, count))
        batches.close()
        return out

    whole = taken(30)
    for step in (1, 7, 14, 29):
        for (a, x), (b, y) in zip(taken(30 - step, step=step), whole[step:], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(x, y)
    for workers in (1, 5):
        stream.sides.workers = workers
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(taken(30), whole, strict=True))
    for k, (a, b) in enumerate(zip(taken(9, part=(0, 2)), taken(9, part=(1, 2)), strict=True)):
        assert torch.equal(torch.cat([a[0], b[0]]), whole[k][0])
        torch.testing.assert_close(torch.cat([a[1], b[1]]), whole[k][1])
    rows = torch.cat([r for r, _ in whole])
    assert sorted(rows[:80].tolist()) == sorted(rows[80:160].tolist()) == list(range(5, 85))
    assert rows[:80].tolist() != rows[80:160].tolist()
    assert not torch.equal(taken(1, seed=1)[0][0], whole[0][0])
    for row, state in zip(*whole[3], strict=True):  # whatever it is read with
        torch.testing.assert_close(fields.read(row[None])[0], state, rtol=0, atol=1e-6)
    assert not any(t.name.startswith("xgenda") for t in threading.enumerate())


def test_no_more_is_held_than_fits(tmp_path: Path) -> None:
    ds = weather(600)
    pairs = read(stored(coarsened(ds), tmp_path / "c", 50), stored(ds, tmp_path / "f", 50), large=large())
    ready = prepared(pairs)
    assert pairs.reservoir is not None
    sides = Sides(pairs.reservoir, ready, memory=1)  # the least that will do: 64 pairs
    rows = torch.arange(600)
    batches = sides.batches(rows, 4, 0)
    seen = [r for r, _ in itertools.islice(batches, 150)]
    batches.close()
    assert sorted(torch.cat(seen).tolist()) == rows.tolist()
    assert sides.memory == 64 * sides.row_bytes
    assert 0 < sides.peak <= 0.75 * sides.memory
    assert sides.row_bytes == 4 * 2 * (64 + 16)


# what is refused


def test_what_cannot_be_streamed_is_refused_unread(no_compute: None) -> None:
    ds = weather(60)
    lazy, coarse = ds.chunk(time=5), coarsened(ds).chunk(time=5)
    with pytest.raises(
        OptionError, match=r"method='bcsd' is fitted to all pairs at once, .*: memory='31kB', or take fewer: .*None, 4\)"
    ):
        read(lazy, factor=2, large=large(8000, method="bcsd"))
    with pytest.raises(OptionError, match="ds has none of the times of target"):
        read(coarse.assign_coords(time=ds.time + np.timedelta64(1, "h")), lazy, large=large())
    with pytest.raises(StateError, match="Of 60 fine fields 15 have all the coarse ones that they need; at least 20"):
        read(coarse.assign_coords(time=ds.time - np.timedelta64(45 * 6, "h")), lazy, large=large())
    with pytest.raises(GridError, match="they must be the same"):
        read_background_pairs(coarse, lazy, None, task="background", variables=None, statics=None, lead_time=False, large=large())
    wrong = lazy.assign(t2m=lazy.t2m.assign_attrs(units="m s-1"))
    with pytest.raises(UnitsError, match="K"):
        read_background_pairs(wrong, lazy, None, task="background", variables=None, statics=None, lead_time=False, large=large())
    with pytest.raises(OptionError, match="no two times of ds are so far apart"):
        read_background_pairs(lazy, None, "5h", task="background", variables=None, statics=None, lead_time=False, large=large())
    with pytest.raises(OptionError, match="transform names 'wind'"):
        read(lazy, factor=2, large=large(transform={"wind": "log"}))


def test_too_little_memory_for_the_fits_says_how_much_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservoirs, "LEAST_WORK", 0)
    ds = weather(80).chunk(time=5)
    with pytest.raises(OptionError, match=r"memory='1kB' is too little for the 60 pairs .* 8 x 8 cells; .*memory='2MB'"):
        read(ds, factor=2, large=large())
    assert reservoirs._bytes(1.0) == "1B"
    assert reservoirs._bytes(12.3e9) == "13GB"


def test_masks_are_refused(tmp_path: Path) -> None:
    ds = weather(60)
    land = ds.assign(rain=ds.rain.where(ds.latitude > 42))
    with pytest.raises(StateError, match=r"target holds cells that are NaN at all times, and task='downscale' has no mask"):
        read(coarsened(ds), stored(land, tmp_path / "f"), large=large())
    with pytest.raises(StateError, match=r"ds holds cells that are NaN at all times"):
        read(coarsened(land), ds.chunk(time=5), large=large())


# training


OPTIONS: dict[str, Any] = {"width": 8, "batch_size": 4, "anchor": "eof", "calibrate": False, "progress": False, "device": "cpu"}


@pytest.mark.slow
def test_a_training_on_pairs_larger_than_memory_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    ds = stored(weather(150), tmp_path / "f", 10)
    options = {**OPTIONS, "task": "downscale", "factor": 2, "steps": 8, "memory": "10kB"}

    def stop(report: Progress) -> None:
        if report.stage == "residual":
            raise KeyboardInterrupt

    whole = xgenda.train(ds, **options)
    out = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt):
        xgenda.train(ds, out=out, callbacks=[stop], **options)
    with pytest.raises(OptionError, match="memory: 10000.0 then, 20000.0 now"):
        xgenda.train(ds, out=out, resume=True, **{**options, "memory": "20kB"})
    again = xgenda.train(ds, out=out, resume=True, **options)
    assert content_hash(again) == content_hash(whole)
    assert whole.spec.training["samples"] == "150 along time"
    assert whole.spec.training["period"] == "2001-01-01 to 2001-02-07"
    fine = whole.spec.scaling
    assert fine is not None
    values = np.stack([ds.t2m.values, ds.rain.values], 1)
    np.testing.assert_allclose(fine.mean[0], values.mean(0), rtol=1e-5)  # of all, and not of the sample
    result = coarsened(weather(3)).genda.downscale(model=whole, members=2, steps=4, seed=0)
    means = result.coarsen(latitude=2, longitude=2).mean()
    np.testing.assert_allclose(means.t2m.isel(member=0), coarsened(weather(3)).t2m, atol=1e-3)


@pytest.mark.slow
def test_a_training_in_memory_is_what_it_was(tmp_path: Path) -> None:
    """Whether the pairs are in a store or not, as long as they fit, and in memory whatever their size."""
    ds = weather(60)
    options = {**OPTIONS, "task": "downscale", "factor": 2, "steps": 2, "stages": "residual"}
    whole = content_hash(xgenda.train(ds, **options))
    assert content_hash(xgenda.train(ds, memory=SMALL, **options)) == whole
    assert content_hash(xgenda.train(stored(ds, tmp_path / "f"), **options)) == whole


@pytest.mark.slow
def test_backgrounds_are_trained_and_downscalers_are_tuned(tmp_path: Path) -> None:
    ds = stored(weather(120, memory=0.9), tmp_path / "f", 10)
    options = {k: v for k, v in OPTIONS.items() if k != "calibrate"}
    model = xgenda.train(ds, task="background", lag="6h", steps=4, memory=SMALL, **options)
    assert model.spec.task == "background"
    assert model.spec.training["samples"] == "119 along time"
    assert model.spec.options["lag"] == 21600.0
    before = xgenda.train(
        weather(60), task="downscale", factor=2, transform={"rain": "log"}, steps=2, stages="residual", **OPTIONS
    )
    options = {k: v for k, v in OPTIONS.items() if k not in ("width", "anchor")}
    tuned = xgenda.train(ds, task="downscale", factor=2, start=before, steps=2, stages="residual", memory=SMALL, **options)
    assert tuned.spec.scaling is not None
    assert tuned.spec.scaling.transforms == ("none", "log")
    assert tuned.spec.training["started_from"].startswith("trained-downscaler")

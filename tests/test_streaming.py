"""Training fields read when asked for: equal to those in memory, in an order that is a function of seed and epoch, in bounded memory."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import warnings
from pathlib import Path
from typing import Any

import cftime
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from xgenda.errors import GridError, OptionError, StateError, UnitsError
from xgenda.models.fitting import standardise
from xgenda.scaling import cycle_basis, fit_scaling
from xgenda.training import sources, statistics, streaming
from xgenda.training.fields import Fields, InMemory, row_batches
from xgenda.training.sources import Source, in_order, open_source, spread
from xgenda.training.statistics import fingerprint, gather
from xgenda.training.streaming import Streamed
from xgenda.training.windows import FOLDS, blocks, read_samples, window_rows


def weather(n: int = 60, ny: int = 6, nx: int = 8, seed: int = 0, **change: Any) -> xr.Dataset:
    """Two variables with a seasonal cycle, one of them positive, float32."""
    rng = np.random.default_rng(seed)
    time = change.pop("time", pd.date_range("2001-01-01", periods=n, freq="5D"))
    season = np.cos(2 * np.pi * np.arange(n) / 73)[:, None, None]
    t = 280 + 8 * season + rng.standard_normal((n, ny, nx))
    rain = np.exp(0.5 * season + rng.standard_normal((n, ny, nx)))
    dims = ("time", "latitude", "longitude")
    coords = {"time": time, "latitude": np.linspace(40, 50, ny), "longitude": np.linspace(0, 14, nx)} | change
    return xr.Dataset(
        {
            "t2m": (dims, t.astype("f4"), {"units": "K", "standard_name": "air_temperature"}),
            "rain": (dims, rain.astype("f4"), {"units": "mm"}),
        },
        coords,
    )


def stored(ds: xr.Dataset, path: Path | str, chunk: int = 7, **options: Any) -> xr.Dataset:
    """Return `ds` as opened from a Zarr store."""
    encoding = {n: {"chunks": (chunk, *v.shape[1:])} for n, v in ds.data_vars.items()}
    ds.to_zarr(path, encoding=encoding, consolidated=False, **options)
    opened: xr.Dataset = xr.open_zarr(path, chunks=None, consolidated=False)
    return opened[list(ds.data_vars)]  # a store lists them in any order


def threads() -> int:
    return sum(t.name.startswith("xgenda") for t in threading.enumerate())


# what is read


@pytest.mark.parametrize("how", ["memory", "zarr", "dask", "netcdf", "object store"])
@pytest.mark.parametrize("turned", [False, True])
def test_fields_are_those_of_the_dataset_in_model_order(how: str, turned: bool, tmp_path: Path) -> None:
    plain = weather()
    ds = plain
    if turned:  # the same fields, stored from the north and from 0 to 360 degrees
        ds = plain.assign_coords(longitude=plain.longitude - 7)
        plain = ds
        ds = ds.assign_coords(longitude=ds.longitude % 360).isel(latitude=slice(None, None, -1))
    if how == "zarr":
        ds = stored(ds, tmp_path / "a.zarr")
    elif how == "dask":
        ds = ds.chunk(time=7, latitude=4)
    elif how == "netcdf":
        ds.to_netcdf(tmp_path / "a.nc", encoding={n: {"chunksizes": (7, 3, 4)} for n in ds})
        ds = xr.open_dataset(tmp_path / "a.nc")
    elif how == "object store":
        ds = stored(ds, f"memory://{tmp_path.name}-{turned}.zarr", mode="w")
    source = open_source(ds)
    assert source.chunk == (1 if how == "memory" else 7)
    assert source.dtype == np.float32
    assert source.nbytes == plain.nbytes - sum(c.nbytes for c in plain.coords.values())
    rows = np.array([3, 59, 20, 21, 3, 0])
    wanted = np.stack([plain.t2m.values[rows], plain.rain.values[rows]], 1)
    np.testing.assert_array_equal(source.read(rows), wanted)
    np.testing.assert_array_equal(source.read(rows, (slice(1, 4), slice(2, 7))), wanted[:, :, 1:4, 2:7])
    whole, before = source.sample(), read_samples(plain)
    np.testing.assert_array_equal(whole.values, before.values)
    assert whole.grid.same_as(before.grid)
    assert whole.variables == before.variables
    assert whole.period == before.period == source.period
    ds.close()


def test_levels_are_channels_that_are_read_together(tmp_path: Path) -> None:
    ds = weather()
    levels = xr.concat([ds.t2m + k for k in range(3)], pd.Index([500, 850, 1000], name="level")).transpose("time", "level", ...)
    levels.coords["level"].attrs["units"] = "hPa"
    both = xr.Dataset({"t": levels.astype("f4"), "rain": ds.rain})
    both.to_zarr(
        tmp_path / "a.zarr", encoding={"t": {"chunks": (10, 3, 6, 8)}, "rain": {"chunks": (5, 6, 8)}}, consolidated=False
    )
    source = open_source(xr.open_zarr(tmp_path / "a.zarr", chunks=None, consolidated=False))
    assert source.chunk == 10
    assert len(source.parts) == 2
    before = read_samples(both)
    assert source.names == [v.name for v in before.variables]
    np.testing.assert_array_equal(source.read([5, 6, 40]), before.values[[5, 6, 40]])
    for name, k in (("t@50000Pa", 0), ("t@85000Pa", 1), ("t@100000Pa", 2)):
        np.testing.assert_array_equal(source.read([7])[0, source.names.index(name)], levels.values[7, k])


def test_opening_reads_no_field(no_compute: None) -> None:
    open_source(weather().chunk(time=5))


def test_what_cannot_be_trained_on_is_refused_unread(no_compute: None) -> None:
    ds = weather().chunk(time=5)
    with pytest.raises(StateError, match="ds has 19 fields along 'time'; at least 20"):
        open_source(ds.isel(time=slice(0, 19)))
    with pytest.raises(OptionError, match="lacks the variable 'wind'"):
        open_source(ds, ["wind"])
    with pytest.raises(OptionError, match=r"one dimension .* beside the horizontal ones; ds has none"):
        open_source(ds.isel(time=0))
    with pytest.raises(OptionError, match=r"ds\['rain'\] has no dimension 'time'; leave it out: ds.drop_vars\('rain'\)"):
        open_source(ds.assign(rain=ds.rain.isel(time=0, drop=True)))
    points = ds.stack(place=("latitude", "longitude")).reset_index("place")
    with pytest.raises(GridError, match="needs rows and columns"):
        open_source(points)


# what is missing


def with_holes() -> xr.Dataset:
    """Land in one variable, two missing times, one of them in one variable only."""
    ds = weather()
    ds["rain"] = ds.rain.where((ds.latitude > 42) | (ds.longitude > 5))
    ds["rain"][11] = np.nan
    ds["t2m"][40] = np.nan
    ds["rain"][40] = np.nan
    return ds


@pytest.mark.parametrize("lazy", [False, True])
def test_missing_times_are_left_out_and_land_is_masked(lazy: bool, tmp_path: Path) -> None:
    ds = with_holes()
    source = open_source(stored(ds, tmp_path / "a.zarr") if lazy else ds)
    with pytest.warns(UserWarning, match=r"2 of 60 fields along 'time' are missing .* the first at 2001-02-25") as caught:
        kept, found = gather(source, cache=False, progress=False)
    with pytest.warns(UserWarning, match="2 of 60 fields"):
        samples = read_samples(ds)
    assert caught[0].filename == __file__  # the line of the user, at whatever depth
    assert kept.size == 58
    assert kept.places.tolist() == [i for i in range(60) if i not in (11, 40)]
    assert kept.valid is not None
    np.testing.assert_array_equal(kept.valid[1], np.isfinite(ds.rain.values[0]))
    assert kept.valid[0].all()
    read = kept.read(np.arange(58))
    left_out = ds.isel(time=kept.places)
    np.testing.assert_array_equal(np.where(kept.valid, read, np.nan)[:, 1], left_out.rain)
    np.testing.assert_allclose(read[:, 1, ~kept.valid[1]], np.nanmean(left_out.rain.values.astype(float)), rtol=1e-6)
    np.testing.assert_array_equal(samples.valid, kept.valid)
    np.testing.assert_array_equal(samples.values, read)
    assert samples.time is not None
    assert (samples.time.values == left_out.time.values).all()
    assert found.lowest[1] == np.nanmin(left_out.rain)
    wanted = fit_scaling(samples.values, samples.time, kept.names, cycle="dayofyear", valid=samples.valid)
    with pytest.warns(UserWarning, match="2 of 60 fields"):
        scaling = gather(source, "dayofyear", cache=False, progress=False)[1].scaling()
    np.testing.assert_allclose(scaling.mean, wanted.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scaling.std, wanted.std, rtol=1e-9)


@pytest.mark.parametrize("function", ["gather", "read_samples"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"ds\['t2m'\] holds NaN in 1 of 2880 cells \(0.035 %\), first at index \(8, 2, 3\).*ds.fillna"),
        (np.inf, r"ds\['t2m'\] holds infinity in 1 of 2880 cells \(0.035 %\), first at index \(8, 2, 3\)"),
        (-9999.0, r"ds\['t2m'\] holds -9999 in 1 of 2880 cells.*looks like a fill value.*ds.where"),
        (1e20, r"ds\['t2m'\] holds 1e\+20 in 1 of 2880 cells"),
    ],
)
def test_other_holes_are_refused(function: str, value: float, message: str) -> None:
    ds = weather().isel(latitude=slice(None, None, -1))
    ds["t2m"][8, 2, 3] = value
    with pytest.raises(StateError, match=message):
        gather(open_source(ds), cache=False, progress=False) if function == "gather" else read_samples(ds)


def test_a_sentinel_inside_the_range_is_a_value() -> None:
    ds = weather()
    ds["t2m"] = ds.t2m * 0 + np.float32(99950) + 20 * (ds.t2m - 280)
    ds["t2m"][8, 2, 3] = 99999.0
    assert gather(open_source(ds), cache=False, progress=False)[1].highest[0] == ds.t2m.max()


def test_a_variable_without_any_value_is_refused() -> None:
    ds = weather()
    ds["rain"] = ds.rain * np.nan
    with pytest.raises(StateError, match=r"ds\['rain'\] holds NaN in 2880 of 2880"):
        gather(open_source(ds), cache=False, progress=False)
    ds = weather()
    ds["rain"][::2] = np.nan
    ds["t2m"][1::2] = np.nan
    with pytest.raises(StateError, match=r"no time at which no variable is missing; take fewer: variables=\['t2m'\]"):
        gather(open_source(ds), cache=False, progress=False)


def test_too_few_are_left() -> None:
    ds = weather(22)
    ds["t2m"][:4] = np.nan
    with pytest.warns(UserWarning, match="4 of 22"), pytest.raises(StateError, match="ds has 18 fields"):
        gather(open_source(ds), cache=False, progress=False)


# windows


def test_windows_do_not_straddle_gaps_or_blocks() -> None:
    days = np.delete(np.arange(90), [20, 21, 50])
    time = xr.DataArray(np.datetime64("2001-01-01", "ns") + days * np.timedelta64(1, "D"), dims="time", name="time")
    shuffled = np.random.default_rng(0).permutation(len(days))
    fold = blocks(time, len(days), FOLDS)
    for order in (np.arange(len(days)), shuffled):
        rows, found, spacing = window_rows(time[order], fold[order], 5)
        assert spacing == 86400
        assert (np.diff(days[order][rows], axis=1) == 1).all()
        assert (fold[order][rows] == found[:, None]).all()
        whole = [w for w in np.lib.stride_tricks.sliding_window_view(np.arange(len(days)), 5) if days[w[-1]] - days[w[0]] == 4]
        inside = [w for w in whole if len(set(fold[w])) == 1]
        assert sorted(map(tuple, order[rows])) == sorted(map(tuple, inside))


def test_windows_of_one_are_the_states() -> None:
    rows, fold, spacing = window_rows(None, np.array([0, 0, 1]), 1)
    assert rows.tolist() == [[0], [1], [2]]
    assert fold.tolist() == [0, 0, 1]
    assert spacing is None


@pytest.mark.parametrize("calendar", ["noleap", "360_day"])
def test_windows_in_other_calendars(calendar: str) -> None:
    time = xr.date_range("2001-01-01", periods=40, freq="D", calendar=calendar, use_cftime=True)
    array = xr.DataArray(time, dims="time", name="time")[np.delete(np.arange(40), 9)]
    rows, _, spacing = window_rows(array, np.zeros(39, int), 3)
    assert spacing == 86400
    assert len(rows) == 7 + 28
    assert isinstance(array.values[0], cftime.datetime)


@pytest.mark.parametrize("freq", ["odd"])
def test_unequal_spacing_is_refused(freq: str) -> None:
    steps = pd.date_range("2001-01-01", periods=40, freq="D" if freq == "odd" else freq)
    if freq == "odd":
        steps = steps.append(steps[5:6] + pd.Timedelta("6h"))
    time = xr.DataArray(steps, dims="time", name="time")
    with pytest.raises(StateError, match=r"needs equally spaced times .* Select one unbroken run"):
        window_rows(time, np.zeros(len(steps), int), 3)
    with pytest.raises(StateError, match="has no time coordinate"):
        window_rows(None, np.zeros(5, int), 3)
    with pytest.raises(StateError, match="use a shorter window"):
        window_rows(time[:40] if freq == "odd" else time[:1], np.arange(40)[: 40 if freq == "odd" else 1] // 2, 3)


# statistics


@settings(max_examples=25, deadline=None)
@given(
    cycle=st.sampled_from(["none", "dayofyear", "hour", "dayofyear+hour"]),
    step=st.sampled_from(["1D", "5D", "6h", "7h"]),
    log=st.booleans(),
    homogeneous=st.booleans(),
    land=st.booleans(),
    shift=st.sampled_from([0.0, 1e5, -3e6]),
    chunk=st.integers(1, 80),
    seed=st.integers(0, 10**6),
)
def test_one_pass_gives_what_the_fit_in_memory_gives(
    cycle: str, step: str, log: bool, homogeneous: bool, land: bool, shift: float, chunk: int, seed: int
) -> None:
    ds = weather(70, seed=seed, time=pd.date_range("2003-05-01T03", periods=70, freq=step)).astype("f8")
    ds["t2m"] = ds.t2m + shift
    if land:
        ds = ds.where(ds.longitude > 4)
    options: dict[str, Any] = {"transform": {"rain": "log"}, "offset": {"rain": 0.01}} if log else {}
    kept, found = gather(open_source(ds.chunk(time=chunk)), cycle, **options, cache=False, progress=False)
    samples = read_samples(ds)
    wanted = fit_scaling(
        samples.values,
        samples.time,
        kept.names,
        cycle=cycle,
        homogeneous=homogeneous,
        valid=samples.valid,
        bounds={"t2m": (None, 1e9)},
        **options,
    )
    scaling = found.scaling({"t2m": (None, 1e9)}, homogeneous)
    assert scaling.to_dict() == wanted.to_dict()
    # the coefficients are of anomalies of about 10, with condition numbers up to 1e3 where the times span part of a cycle
    clim, before = (s.climatology(cycle_basis(samples.time, cycle)) for s in (scaling, wanted))
    np.testing.assert_allclose(clim, before, rtol=1e-10, atol=1e-6)
    np.testing.assert_allclose(scaling.std, wanted.std, rtol=1e-6)


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 4000)
    source = open_source(weather(200).chunk(time=3))
    one, three = (gather(source, "dayofyear", cache=False, workers=w, progress=False)[1] for w in (1, 3))
    assert (one.mean == three.mean).all()
    assert (one.squares == three.squares).all()


def test_a_constant_and_a_logarithm_of_nothing_are_refused() -> None:
    ds = weather()
    with pytest.raises(StateError, match="does not vary"):
        gather(open_source(ds.assign(rain=ds.rain * 0 + np.float32(3.1))), cache=False, progress=False)[1].scaling()
    with pytest.raises(StateError, match=r"'rain' is to be scaled by log\(x \+ 0.001\) and holds -0.8"):
        gather(open_source(ds.assign(rain=ds.rain - 1 - ds.rain.min())), transform={"rain": "log"}, cache=False, progress=False)
    with pytest.raises(StateError, match="outside of its bounds"):
        gather(open_source(ds), cache=False, progress=False)[1].scaling({"rain": (0, 1)})


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Count passes over the data; the cache is in `tmp_path`."""
    monkeypatch.setenv("XGENDA_CACHE", str(tmp_path / "cache"))
    counted: list[int] = []
    real = statistics._pass
    monkeypatch.setattr(statistics, "_pass", lambda *a: counted.append(1) or real(*a))
    return counted


def test_a_second_call_takes_no_pass(passes: list[int], tmp_path: Path) -> None:
    ds = with_holes()

    def gathered(ds: xr.Dataset, *options: Any) -> tuple[Source, statistics.Statistics]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return gather(open_source(ds), *options, progress=False)

    kept, first = gathered(ds, "dayofyear")
    again, second = gathered(stored(ds, tmp_path / "a.zarr"), "dayofyear")  # wherever the same data are
    assert len(passes) == 1
    np.testing.assert_array_equal(first.mean, second.mean)
    np.testing.assert_array_equal(kept.places, again.places)
    np.testing.assert_array_equal(kept.read([0, 30]), again.read([0, 30]))
    assert first.fingerprint == second.fingerprint == fingerprint(ds)
    gathered(ds, "none")
    assert len(passes) == 2
    ds["t2m"][17, 2, 3] += 0.001
    gathered(ds, "dayofyear")
    assert len(passes) == 3
    gathered(ds.assign_coords(time=ds.time + np.timedelta64(1, "h")), "dayofyear")
    assert len(passes) == 4


def test_half_a_file_in_the_cache_is_made_anew(passes: list[int], tmp_path: Path) -> None:
    source = open_source(weather())
    first = gather(source, progress=False)[1]
    (file,) = (tmp_path / "cache" / "statistics").iterdir()
    whole = file.read_bytes()
    for broken in (whole[:100], whole[: len(whole) // 2], b""):
        file.write_bytes(broken)
        again = gather(source, progress=False)[1]
        np.testing.assert_array_equal(first.mean, again.mean)
        assert file.read_bytes() == whole
    assert len(passes) == 4
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_done_without(passes: list[int], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    gather(open_source(weather()), progress=False)
    gather(open_source(weather()), progress=False)
    assert len(passes) == 2


def test_fingerprints_of_large_data_are_of_some_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "HASHED", 10 * 2 * 48 * 4)
    ds = weather()
    before = fingerprint(ds)
    assert before == fingerprint(ds.chunk(time=7))
    for row in (0, 59):
        changed = ds.copy(deep=True)
        changed["rain"][row, 0, 0] += 1
        assert fingerprint(changed) != before
    between = ds.copy(deep=True)
    between["rain"][1, 0, 0] += 1
    assert fingerprint(between) == before
    assert fingerprint(ds.rename(rain="snow")) != before
    assert fingerprint(ds.isel(latitude=slice(None, None, -1))) == before


# streaming


def prepared(ds: xr.Dataset, cycle: str = "dayofyear", **options: Any) -> tuple[Streamed, InMemory]:
    """Return the same states streamed and in memory."""
    source, found = gather(open_source(ds), cycle, cache=False, progress=False)
    scaling = found.scaling()
    samples = source.sample()
    z = torch.as_tensor(standardise(scaling, samples.values, samples.time)).float().reshape(source.shape)
    windows = options.get("windows")
    if windows is not None:
        z = z[torch.as_tensor(windows)].flatten(1, 2)
    return Streamed(source, scaling, **options), InMemory(z)


def taken(fields: Fields, count: int, *arguments: Any, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = fields.batches(*arguments, **options)
    out = list(itertools.islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return out


SMALL = 24 * 1024  # a few blocks of the fields of `weather`


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SMALLEST", 1000)


@pytest.mark.parametrize("memory", [SMALL, 2**29])
@pytest.mark.parametrize("window", [1, 3])
def test_streamed_states_are_those_in_memory(small_blocks: None, tmp_path: Path, memory: int, window: int) -> None:
    ds = weather(200)
    rows, _, _ = window_rows(ds.time, np.zeros(200, int), window)
    streamed, memory_fields = prepared(stored(ds, tmp_path / "a.zarr"), windows=rows, memory=memory)
    assert streamed.shape == memory_fields.shape
    chosen = torch.arange(0, len(rows), 2)
    torch.testing.assert_close(streamed.read(chosen), memory_fields.read(chosen), rtol=1e-6, atol=1e-6)
    seen = taken(streamed, 60, chosen, 7, 5)
    order = list(itertools.islice(row_batches(streamed, chosen, 7, 5, 0, (0, 1)), 60))
    for (numbers, states), wanted in zip(seen, order, strict=True):
        assert torch.equal(numbers, wanted)
        assert torch.equal(states, streamed.read(numbers))  # to the bit, whatever they were read with
    epoch = torch.cat([r for r, _ in seen])[: len(chosen)]
    assert torch.equal(epoch.sort().values, chosen)
    assert threads() == 0


def test_the_order_is_a_function_of_rows_seed_and_epoch(small_blocks: None) -> None:
    streamed, _ = prepared(weather(300).chunk(time=10), memory=SMALL)
    rows = torch.arange(40, 300)
    order = streamed.order(rows, 1, 2)
    assert torch.equal(order, streamed.order(rows, 1, 2))
    assert torch.equal(order.sort().values, rows)
    for other in (streamed.order(rows, 1, 3), streamed.order(rows, 2, 2)):
        assert not torch.equal(order, other)
        assert torch.equal(other.sort().values, rows)
    # neighbours in the order are seldom neighbours in time
    assert ((order[1:] - order[:-1]).abs() < 10).float().mean() < 0.5


def test_training_resumes_at_any_step_without_reading_what_was_before(small_blocks: None, tmp_path: Path) -> None:
    ds = weather(400)
    streamed, _ = prepared(stored(ds, tmp_path / "a.zarr", chunk=4), memory=SMALL, workers=1)
    rows = torch.arange(400)
    whole = taken(streamed, 110, rows, 8, 3)
    for step in (1, 37, 49, 50, 103):
        resumed = taken(streamed, 5, rows, 8, 3, step)
        for (a, x), (b, y) in zip(whole[step : step + 5], resumed, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(x, y)
    read: list[int] = []
    real = streamed.source.read
    counting = dataclasses.replace(streamed.source)
    object.__setattr__(counting, "read", lambda r, w=None: read.extend(np.asarray(r).tolist()) or real(r, w))
    streamed.source = counting
    taken(streamed, 1, rows, 8, 3, 45)  # of 50 in an epoch
    assert len(read) < 150
    done = set(torch.cat([r for r, _ in whole[:30]]).tolist())
    left = set(torch.cat([r for r, _ in whole[45:50]]).tolist())
    assert set(whole[45][0].tolist()) <= set(read)
    next_epoch = set(streamed._groups(rows, 3, 1)[0].tolist()) | set(streamed._groups(rows, 3, 1)[1].tolist())
    assert not (set(read) & done) - next_epoch - left


@pytest.mark.parametrize(("size", "processes"), [(8, 2), (7, 3), (2, 3)])
def test_processes_share_a_batch(small_blocks: None, size: int, processes: int) -> None:
    streamed, _ = prepared(weather(100).chunk(time=6), memory=SMALL)
    rows = torch.arange(90)
    whole = taken(streamed, 40, rows, size, 3, 2)
    parts = [taken(streamed, 40, rows, size, 3, 2, (k, processes)) for k in range(processes)]
    for step, (numbers, states) in enumerate(whole):
        assert torch.equal(torch.cat([p[step][0] for p in parts]), numbers)
        assert torch.equal(torch.cat([p[step][1] for p in parts]), states)


def test_crops_are_parts_of_the_states_at_a_corner_of_the_step(tmp_path: Path) -> None:
    ds = weather(80, 9, 10)
    rows, _, _ = window_rows(ds.time, np.zeros(80, int), 3)
    streamed, _ = prepared(stored(ds, tmp_path / "a.zarr", 1), windows=rows, crop=(4, 6))
    chosen = torch.arange(70)
    whole = taken(streamed, 40, chosen, 6, 11)
    corners = set()
    for step, (numbers, states) in enumerate(whole):
        corner = streamed.corner(11, step)
        assert corner is not None
        corners.add(corner)
        row, column = corner
        assert 0 <= row <= 5
        assert 0 <= column <= 4
        torch.testing.assert_close(states, streamed.read(numbers)[..., row : row + 4, column : column + 6], rtol=1e-6, atol=1e-6)
    assert len(corners) > 15
    resumed = taken(streamed, 3, chosen, 6, 11, 20)
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(whole[20:23], resumed, strict=True))
    parts = [taken(streamed, 3, chosen, 6, 11, 20, (k, 2)) for k in range(2)]
    assert all(torch.equal(x, torch.cat([parts[0][i][1], parts[1][i][1]])) for i, (_, x) in enumerate(resumed))
    assert threads() == 0
    with pytest.raises(OptionError, match=r"crop=\(10, 4\) is larger than the grid of 9 x 10 cells"):
        Streamed(streamed.source, streamed.scaling, crop=(10, 4))


def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    import tracemalloc

    n, ny, nx = 6000, 32, 48  # 37 MB
    ds = xr.Dataset(
        {"t": (("time", "latitude", "longitude"), np.random.default_rng(0).standard_normal((n, ny, nx)).astype("f4"))},
        {"time": pd.date_range("2000-01-01", periods=n), "latitude": np.arange(ny) * 1.0, "longitude": np.arange(nx) * 1.0},
    )
    opened = stored(ds, tmp_path / "a.zarr", 20)
    del ds
    memory = 8 * 2**20
    source, found = gather(open_source(opened), cache=False, progress=False)
    streamed = Streamed(source, found.scaling(), memory=memory)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    seen = 0
    batches = streamed.batches(torch.arange(n), 16, 0)
    for numbers, _ in itertools.islice(batches, 400):
        seen += len(numbers)
    batches.close()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert seen == 6400
    assert memory / 4 < streamed.peak <= memory
    assert peak < 1.5 * memory < source.nbytes / 2


def test_threads_end_with_the_batches_and_after_errors(small_blocks: None) -> None:
    streamed, _ = prepared(weather(100).chunk(time=6), memory=SMALL)
    rows = torch.arange(100)
    for crop in (None, (3, 3)):
        streamed.crop = crop
        batches = streamed.batches(rows, 4, 0)
        next(batches)
        assert threads() > 0
        batches.close()
        assert threads() == 0
        batches = streamed.batches(rows, 4, 0)
        next(batches)
        del batches  # forgotten
        gc.collect()
        assert threads() == 0
        broken = dataclasses.replace(streamed.source)

        def fail(rows: np.ndarray, window: Any = None) -> np.ndarray:
            raise OSError("the disk is gone")

        object.__setattr__(broken, "read", fail)
        whole, streamed.source = streamed.source, broken
        with pytest.raises(OSError, match="the disk is gone"):
            next(streamed.batches(rows, 4, 0))
        assert threads() == 0
        streamed.source = whole


def test_threads_yield_in_order_and_no_further_ahead() -> None:
    started: list[int] = []
    found = in_order(lambda i: started.append(i) or i * i, range(100), 3, 5)
    assert [next(found) for _ in range(10)] == [i * i for i in range(10)]
    assert max(started) <= 15
    found.close()
    assert threads() == 0


def test_fewer_rows_than_a_batch_and_none() -> None:
    streamed, _ = prepared(weather())
    (first, _), (second, _) = taken(streamed, 2, torch.arange(3), 5, 0)
    assert sorted(torch.cat([first, second]).tolist()[:9]) == sorted([0, 1, 2] * 3)
    with pytest.raises(OptionError, match="rows are empty"):
        next(streamed.batches(torch.arange(0), 4, 0))


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(OptionError, match=r"memory=1000 bytes are too few .* crop=\(64, 64\)"):
        prepared(weather(), memory=1000)


def test_chunks_larger_than_the_memory_are_read_in_parts(small_blocks: None) -> None:
    streamed, memory_fields = prepared(weather(200).chunk(time=90), memory=SMALL)
    assert np.bincount(np.unique(streamed.block, return_inverse=True)[1]).max() * streamed.row_bytes <= SMALL / 8
    assert len({(b, p // 90) for b, p in zip(streamed.block, range(200), strict=True)}) == len(set(streamed.block.tolist()))
    for numbers, states in taken(streamed, 20, torch.arange(200), 10, 0):
        torch.testing.assert_close(states, memory_fields.read(numbers), rtol=1e-6, atol=1e-6)


def test_runs_of_rows_are_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(stored(weather(100), tmp_path / "a.zarr", 10))
    loaded: list[tuple[int, int]] = []
    real = Source._load
    monkeypatch.setattr(Source, "_load", lambda self, a, b, *to: loaded.append((a, b)) or real(self, a, b, *to))
    source.read([3, 7, 25, 26, 91])
    assert loaded == [(3, 8), (25, 27), (91, 92)]
    monkeypatch.setattr(sources, "BLOCK", 1)
    assert [len(b) for b in source.blocks(1)] == [10] * 10


def test_long_chunks_are_read_in_parts_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    ds = weather(100).chunk(time=100)
    wanted = gather(open_source(ds), cache=False, progress=False)[1]
    monkeypatch.setattr(sources, "LARGEST_CHUNK", 8000)
    monkeypatch.setattr(statistics, "LARGEST_CHUNK", 8000)
    source = open_source(ds)
    assert {len(b) * source.row_bytes <= 8000 for b in source.blocks()} == {True}
    with pytest.warns(UserWarning, match=r"chunks of 100 along 'time', together 0 MB, .*ds.chunk\(time=2\).to_zarr"):
        found = gather(source, cache=False, progress=False)[1]
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-12)


def test_the_scheduler_of_the_user_reads() -> None:
    import dask

    used: list[int] = []

    def scheduler(graph: Any, keys: Any, **options: Any) -> Any:
        used.append(1)
        return dask.get(graph, keys)

    with dask.config.set(scheduler=scheduler):
        found = read_samples(weather().chunk(time=9))
    assert used
    np.testing.assert_array_equal(found.values, read_samples(weather()).values)


@pytest.mark.parametrize("calendar", ["noleap", "360_day"])
def test_calendars_of_models(calendar: str, tmp_path: Path) -> None:
    time = xr.date_range("2001-01-01", periods=120, freq="3D", calendar=calendar, use_cftime=True)
    ds = weather(120, time=time)
    opened = stored(ds, tmp_path / "a.zarr")
    streamed, memory_fields = prepared(opened)
    samples = read_samples(ds)
    wanted = fit_scaling(samples.values, samples.time, ["t2m", "rain"], cycle="dayofyear")
    np.testing.assert_allclose(streamed.scaling.mean, wanted.mean, rtol=1e-6, atol=1e-9)
    assert streamed.source.period == samples.period == f"2001-01-01 to {str(time[-1])[:10]}"
    torch.testing.assert_close(streamed.read(torch.arange(120)), memory_fields.read(torch.arange(120)), rtol=1e-6, atol=1e-6)
    assert fingerprint(opened) == fingerprint(ds)


def test_units_are_converted_while_reading() -> None:
    ds = weather()
    source = open_source(ds).in_units(["degC", None])
    assert [v.units for v in source.variables] == ["degC", "mm"]
    np.testing.assert_allclose(source.read([3, 1])[:, 0], ds.t2m.values[[3, 1]] - 273.15, rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(source.read([3, 1])[:, 1], ds.rain.values[[3, 1]])
    np.testing.assert_allclose(source.in_units(["K", "m"]).read([0])[0, 1], ds.rain.values[0] / 1000, rtol=1e-6)
    np.testing.assert_allclose(source.in_units(["K", "m"]).read([0])[0, 0], ds.t2m.values[0], rtol=1e-6)
    with pytest.raises(UnitsError, match="cannot be converted"):
        source.in_units(["kg", None])


def test_rows_are_spread_in_runs() -> None:
    rows = np.arange(100, 300)
    assert spread(rows, 200).tolist() == rows.tolist()
    some = spread(rows, 30, 3)
    assert len(some) == 30
    assert (some[0], some[-1]) == (100, 299)
    assert (np.diff(some.reshape(-1, 3), axis=1) == 1).all()
    assert set(np.diff(some.reshape(-1, 3)[:, 0])) <= {21, 22}


def test_a_crop_reads_no_more_than_its_chunks() -> None:
    import dask.array as da

    plain = weather(40, 12, 16)
    read: list[tuple[int, ...]] = []

    def counted(block: np.ndarray, block_info: Any = None) -> np.ndarray:
        read.append(block_info[0]["chunk-location"])
        return block

    lazy = da.from_array(plain.t2m.values, chunks=(1, 4, 4)).map_blocks(counted, dtype="f4", meta=np.empty((0, 0, 0), "f4"))
    source = open_source(plain[["t2m"]].copy(data={"t2m": lazy}))
    read.clear()
    np.testing.assert_array_equal(source.read([5, 30], (slice(4, 8), slice(3, 9)))[:, 0], plain.t2m.values[[5, 30], 4:8, 3:9])
    assert sorted(read) == [(t, 1, x) for t in (5, 30) for x in (0, 1, 2)]


@pytest.mark.parametrize("descending", [False, True])
def test_windows_of_a_global_grid_go_over_the_seam_of_the_file(descending: bool) -> None:
    ds = weather(20, 9, 12, latitude=np.linspace(-80, 80, 9), longitude=np.arange(0.0, 360, 30))
    if descending:
        ds = ds.isel(latitude=slice(None, None, -1))
    source = open_source(ds.chunk(longitude=5))
    whole = read_samples(ds).values
    assert source.grid.periodic
    np.testing.assert_array_equal(source.read([4, 2]), whole[[4, 2]])
    for columns in (slice(0, 4), slice(4, 9), slice(7, 12)):
        np.testing.assert_array_equal(source.read([4, 2], (slice(2, 5), columns)), whole[[4, 2], :, 2:5, columns])

"""Priors that are trained on random parts of their grid, and called on tiles of it; and how wide networks are where nobody says."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import xgenda
from xgenda.diffusion.anchors import LowRank
from xgenda.errors import GendaError, LittleDataWarning, OptionError
from xgenda.models.diffusive import DiffusionModel, build_network
from xgenda.models.generative import GenerativeModel
from xgenda.networks.unet import UNet
from xgenda.training import anchoring, crops, optimiser, priors
from xgenda.training.architectures import suitable_width
from xgenda.training.crops import automatic_tile, laid_corners, saves_reading, tile_options
from xgenda.training.draws import Draws, cut
from xgenda.training.objectives import Denoising
from xgenda.training.optimiser import DEFAULT_EPOCHS, Effort, Optimiser
from xgenda.training.processes import Single
from xgenda.training.sources import Source, open_source

QUICK: dict[str, Any] = {"steps": 4, "width": 8, "anchor": "eof", "climatology": "none", "progress": False, "batch_size": 8}


def smooth(count: int = 48, ny: int = 16, nx: int = 24, seed: int = 0, *, around: bool = False) -> xr.Dataset:
    """Correlated fields, skewed, so that there is something to learn; of a region, or around the globe."""
    rng = np.random.default_rng(seed)
    waves = rng.standard_normal((count, 3 * ny, 3 * nx))
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(3 * ny), np.fft.fftfreq(3 * nx), indexing="ij"))
    x = np.fft.ifft2(np.fft.fft2(waves) / (0.06 + k) ** 2).real[:, :ny, :nx]
    x = np.exp(0.5 * x / x.std())
    longitude = np.arange(nx) * 360 / nx if around else np.linspace(0, 2 * (nx - 1), nx)
    latitude = -90 + 180 * (np.arange(ny) + 0.5) / ny if around else np.linspace(20, 20 + 2 * (ny - 1), ny)
    time = np.datetime64("2000-01-01", "ns") + np.arange(count) * np.timedelta64(10, "D")
    coords = {"time": time, "latitude": latitude, "longitude": longitude}
    return xr.Dataset({"x": (("time", "latitude", "longitude"), x, {"units": "K"})}, coords)


def trained(ds: xr.Dataset, **change: Any) -> DiffusionModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LittleDataWarning)
        model = xgenda.train(ds, **{**QUICK, **change})
    assert isinstance(model, DiffusionModel)
    return model


def same_bits(a: GenerativeModel, b: GenerativeModel) -> bool:
    one, two = a.tensors(), b.tensors()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def observed(ds: xr.Dataset) -> xr.Dataset:
    return ds.isel(latitude=slice(1, None, 5), longitude=slice(1, None, 5))


def analysis(ds: xr.Dataset, model: GenerativeModel, **change: Any) -> xr.Dataset:
    options: dict[str, Any] = {"error": 0.2, "members": 2, "steps": 3, "seed": 0, "progress": False}
    return xgenda.assimilate(ds, observed(ds.compute()), model=model, **{**options, **change})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that U-Nets are called on."""
    shapes: list[tuple[int, ...]] = []
    forward = UNet.forward

    def spied(self: UNet, x: torch.Tensor, *given: Any) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return forward(self, x, *given)

    monkeypatch.setattr(UNet, "forward", spied)
    return shapes


@pytest.fixture(scope="module")
def fields() -> xr.Dataset:
    return smooth()


@pytest.fixture(scope="module")
def tiled(fields: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    """Trained on parts, as read from its file."""
    path = tmp_path_factory.mktemp("tiled") / "tiled.safetensors"
    trained(fields, tile=(8, 12), steps=30, learning_rate=1e-2, out=path)
    found = xgenda.load_model(path)
    assert isinstance(found, DiffusionModel)
    return found


# -- where parts lie


@pytest.mark.parametrize("wraps", [False, True])
def test_corners_differ_between_batches_reach_everywhere_and_are_those_of_all_processes(wraps: bool) -> None:
    plane, tile = (20, 30), (8, 12)
    corners = [Draws(3, step, 16).corner(tile, plane, wraps) for step in range(1, 1500)]
    rows, columns = ({c[k] for c in corners if c is not None} for k in (0, 1))
    assert rows == set(range(20 - 8 + 1))
    assert columns == set(range(30 if wraps else 30 - 12 + 1))
    assert sum(a == b for a, b in itertools.pairwise(corners)) < 30
    shown = torch.zeros(plane)
    for c in corners:
        assert c is not None
        shown[c[0] : c[0] + 8, [(c[1] + k) % 30 for k in range(12)]] += 1
    assert shown.min() > 0
    assert Draws(3, 7, 16, (1, 4)).corner(tile, plane, wraps) == Draws(3, 7, 16).corner(tile, plane, wraps)
    assert Draws(3, 7, 16).corner(None, plane, wraps) is None


@given(st.integers(8, 40), st.integers(8, 40), st.integers(8, 40), st.integers(8, 40), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_validation_covers_the_grid(ny: int, nx: int, rows: int, columns: int, most: int) -> None:
    tile = min(rows, ny), min(columns, nx)
    corners = laid_corners(tile, (ny, nx), most)
    assert 1 <= len(corners) <= most
    shown = torch.zeros(ny, nx)
    for i, j in corners:
        assert 0 <= i <= ny - tile[0]
        assert 0 <= j <= nx - tile[1]
        shown[i : i + tile[0], j : j + tile[1]] += 1
    if most >= -(-ny // tile[0]) * -(-nx // tile[1]):
        assert shown.min() > 0


def test_a_part_goes_across_the_seam() -> None:
    x = torch.arange(5 * 7).reshape(1, 5, 7)
    for row, column in ((0, 0), (2, 3), (1, 5), (2, 6)):
        wanted = x.roll((-row, -column), (-2, -1))[..., :3, :4]
        assert torch.equal(cut(x, (row, column), (3, 4)), wanted)
    assert cut(x, None, (3, 4)) is x


# -- what a network sees of them


def gaussian(size: int) -> LowRank:
    generator = torch.Generator().manual_seed(5)
    return LowRank(0.5 * torch.randn(size, 6, generator=generator).double(), 0.3 * torch.ones(size).double())


@pytest.mark.parametrize("shifts", [(0, 0), (0, 1)])
def test_a_part_of_a_batch_is_the_part_of_what_the_whole_grid_gives(shifts: tuple[int, int]) -> None:
    """The Gaussian is that of the whole grid: its answer is cut, not made from what is cut."""
    states = torch.randn(6, 2, 10, 12, generator=torch.Generator().manual_seed(0))
    fold, anchors = torch.arange(6) % 2, [gaussian(240), gaussian(240)]
    weights = torch.rand(2, 10, 12)
    rows, corner, tile = torch.tensor([4, 1, 2]), (2, 9), (5, 8)
    options: dict[str, Any] = {"feeds_state": True, "shifts": shifts, "weights": weights}
    whole = Denoising(states, fold, anchors, 0.02, 50.0, **options).batch(rows, states[rows], Draws(1, 1, 3))
    part = Denoising(states, fold, anchors, 0.02, 50.0, tile=tile, wraps=True, **options)
    found = part.batch(rows, states[rows], Draws(1, 1, 3, place=corner))
    assert found.corner == corner
    assert found.condition is not None
    assert found.weight is not None
    assert whole.condition is not None
    for one, two in (
        (found.x, whole.x),
        (found.target, whole.target),
        (found.condition, whole.condition),
        (found.weight, weights),
    ):
        assert torch.equal(one, cut(two, corner, tile))
    alone = Denoising(states[..., 2:7, :8], fold, [gaussian(80), gaussian(80)], 0.02, 50.0, feeds_state=True)
    assert not torch.allclose(alone.batch(rows, states[rows][..., 2:7, :8], Draws(1, 1, 3)).x, found.x)


def test_without_a_gaussian_states_may_come_as_parts() -> None:
    states = torch.randn(6, 1, 10, 12, generator=torch.Generator().manual_seed(0))
    objective = Denoising(states, torch.zeros(6, dtype=torch.int64), None, 0.02, 50.0, tile=(4, 8))
    corner = Draws(2, 9, 6).corner((4, 8), (10, 12))
    one = objective.batch(torch.arange(6), states, Draws(2, 9, 6))
    two = objective.batch(torch.arange(6), cut(states, corner, (4, 8)), Draws(2, 9, 6))
    assert one.corner == two.corner == corner
    assert one.x.shape == (6, 1, 4, 8)
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.target, two.target)


def test_batches_of_a_training_show_other_parts_and_the_network_never_sees_more(
    fields: xr.Dataset, seen: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in training nor in validation, in the scores of ensembles or in an analysis."""
    corners: list[Any] = []
    batch = Denoising.batch

    def spied(self: Denoising, rows: torch.Tensor, states: torch.Tensor, draws: Draws) -> Any:
        found = batch(self, rows, states, draws)
        corners.append(found.corner)
        return found

    monkeypatch.setattr(Denoising, "batch", spied)
    monkeypatch.setattr(optimiser, "LEAST_INTERVAL", 11)
    monkeypatch.setattr(optimiser, "VALIDATION_SHARE", 1.0)
    model = trained(fields, tile={"longitude": 12, "latitude": 8}, steps=22)
    assert np.isfinite(model.history.crps_x).any()
    in_training = corners[-22:]
    assert len(set(in_training)) > 15
    laid = {(i, j) for i in (0, 8) for j in (0, 12)}
    assert set(corners[:-22]) == laid  # the validation
    assert model.spec.training["crops"] == "8 x 12 of 16 x 24 cells"
    analysis(fields.isel(time=[0]), model)
    assert {s[-2:] for s in seen} == {(8, 12)}


def test_a_tile_of_the_whole_grid_is_no_tile(fields: xr.Dataset) -> None:
    plain = trained(fields)
    for tile in ((16, 24), {"latitude": 16}, "auto"):
        found = trained(fields, tile=tile)
        assert "tile" not in found.spec.options
        assert same_bits(found, plain)


# -- the model


def test_tiles_are_stored_and_results_are_lazy(
    tiled: DiffusionModel, fields: xr.Dataset, seen: list[tuple[int, ...]], request: pytest.FixtureRequest
) -> None:
    assert tiled.spec.options["tile"] == [8, 12]
    assert tiled.spec.options["overlap"] == [4, 4]
    ds = fields.isel(time=slice(0, 2))
    eager = analysis(ds, tiled)
    lazy = analysis(ds.chunk(time=1), tiled)
    assert lazy.chunks
    seen.clear()
    np.testing.assert_allclose(lazy.compute().x, eager.x, rtol=1e-5, atol=1e-6)
    assert {s[-2:] for s in seen} == {(8, 12)}
    one = analysis(ds, tiled, batch_size=1)
    np.testing.assert_allclose(one.x, eager.x, rtol=1e-5, atol=1e-6)
    assert tiled.sha256 == xgenda.load_model(str(tiled.path)).sha256


def test_the_guidance_goes_through_tiles(tiled: DiffusionModel, fields: xr.Dataset) -> None:
    """Of the methods that take gradients of the network."""
    ds = fields.isel(time=[3])
    found = analysis(ds, tiled, guidance="mmps", members=4, steps=8)
    prior = float(np.abs(fields.x - fields.x.mean("time")).mean())
    assert float(np.abs(observed(found).x.mean("member") - observed(ds).x).mean()) < 0.5 * prior


def test_tiles_leave_no_seams(tiled: DiffusionModel) -> None:
    """What tiles change is small, and the correction has no larger steps across their borders; without blending it would."""
    x = torch.randn(8, 1, 16, 24, generator=torch.Generator().manual_seed(0)).double()
    apart = DiffusionModel(
        dataclasses.replace(tiled.spec, options={**tiled.spec.options, "overlap": [0, 0]}), tiled.denoiser, tiled.covariance
    )
    with torch.no_grad():
        _, whole = tiled.denoiser.parts(x, 1.0)
        _, blended = tiled.in_tiles(4).parts(x, 1.0)
        _, side_by_side = apart.in_tiles(4).parts(x, 1.0)
    assert 0 < float((blended - whole).square().mean().sqrt()) < min(0.05, 0.5 * float(whole.square().mean().sqrt()))

    def steps(found: torch.Tensor) -> torch.Tensor:
        return found.diff(dim=-1).square().mean((0, 1, 2)).sqrt()

    assert float((steps(blended) / steps(whole)).max()) < 1.3
    assert float(steps(side_by_side)[11] / steps(blended)[11]) > 1.3


# -- what goes with it


def test_masks_and_windows(fields: xr.Dataset) -> None:
    ds = fields.copy(deep=True)
    ds.x.values[:, :9, :5] = np.nan
    found = trained(ds, tile=(8, 12), window=3)
    assert found.spec.options["tile"] == [8, 12]
    result = analysis(ds.isel(time=slice(0, 4)), found)
    assert result.x.isel(latitude=slice(0, 9), longitude=slice(0, 5)).isnull().all()
    assert result.x.isnull().mean() == ds.x.isnull().mean()


def test_an_interrupted_training_on_parts_goes_on_to_the_same_weights(
    fields: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchoring, "HYBRID_LIMIT", 0)

    def stop(progress: Any) -> None:
        if progress.step >= 20:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"tile": {"longitude": 12}, "steps": 26, "anchor": None, "batch_size": 4}
    whole = trained(fields, **options)
    with pytest.raises(KeyboardInterrupt):
        trained(fields, **options, out=tmp_path / "a.safetensors", callbacks=[stop])
    with pytest.raises(OptionError, match=r"tile: \{'longitude': 12\} then, 8 now"):
        trained(fields, **{**options, "tile": 8}, out=tmp_path / "a.safetensors", resume=True)
    assert same_bits(trained(fields, **options, out=tmp_path / "a.safetensors", resume=True), whole)


@pytest.mark.slow
def test_a_model_on_parts_is_trained_on_with_its_own_or_others(tiled: DiffusionModel, fields: xr.Dataset) -> None:
    assert trained(fields, start=tiled, anchor="auto", width=None).spec.options["tile"] == [8, 12]
    whole = trained(fields, start=tiled, anchor="auto", width=None, tile=(16, 24))
    assert "tile" not in whole.spec.options
    north = trained(fields.isel(latitude=slice(4, 16)), start=whole, anchor="auto", width=None, tile=8)
    assert north.spec.options["tile"] == [8, 8]
    assert north.spec.training["transfer_position"] == "kept"


def test_parts_go_across_the_seam_of_a_globe_or_are_of_all_columns() -> None:
    ds = smooth(ny=16, nx=32, around=True)
    with pytest.raises(
        OptionError, match=r"periodic=False has no effect with tile=\(8, 16\).* leave out periodic, .*tile=\(8, 32\)"
    ):
        trained(ds, tile=(8, 16), periodic=False)
    assert trained(ds, tile=(8, 32), periodic=False, steps=1).spec.options["network"]["periodic"] is False


@pytest.mark.slow
def test_on_the_globe_parts_and_tiles_go_across_the_date_line(seen: list[tuple[int, ...]]) -> None:
    ds = smooth(ny=16, nx=32, around=True)
    plain, band, cutting = (trained(ds, tile=tile) for tile in (None, {"latitude": 8}, (8, 16)))
    assert [m.spec.options["network"]["periodic"] for m in (plain, band, cutting)] == ["sphere", True, False]
    whole = cutting.in_tiles(4).network
    assert (3, 28) in [(i % 4 + 3, j) for i, j in whole.tiling.corners] or max(j for _, j in whole.tiling.corners) > 32 - 16
    seen.clear()
    # a globe that is turned by some columns is the same globe: tiles beside the seam are as good as others
    x = torch.randn(1, 1, 16, 32, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        cutting.in_tiles(4)(x, 1.0)
    assert {s[-2:] for s in seen} == {(8, 16)}


# -- streams


def stored(ds: xr.Dataset, path: Path, time: int, latitude: int, longitude: int) -> xr.Dataset:
    ds.astype("f4").to_zarr(path, encoding={"x": {"chunks": (time, latitude, longitude)}}, consolidated=False)
    return xr.open_zarr(path, chunks=None, consolidated=False)


def test_parts_are_read_alone_where_that_saves_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = smooth(40)
    ds.x.values[:, :5, :7] = np.nan
    apart = stored(ds, tmp_path / "a.zarr", 1, 8, 24)
    windows: list[Any] = []
    read = Source.read

    def spied(self: Source, rows: Any, window: Any = None) -> np.ndarray:
        windows.append(window)
        return read(self, rows, window)

    monkeypatch.setattr(Source, "read", spied)
    monkeypatch.setattr(anchoring, "HYBRID_LIMIT", 0)
    options: dict[str, Any] = {"memory": 50_000, "anchor": None, "tile": (8, 8), "steps": 4, "progress": False}
    found = trained(apart, **options)
    shapes = {tuple(w.stop - w.start for w in window) for window in windows if window is not None}
    assert shapes == {(8, 8)}
    assert sum(w is not None for w in windows) >= 4
    monkeypatch.setattr(priors, "saves_reading", lambda *given: False)
    windows.clear()
    whole = trained(apart, **options)
    assert all(w is None for w in windows)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(tensor, found.tensors()[name], atol=2e-5, rtol=1e-3)


def test_what_saves_reading_is_what_is_unpacked(tmp_path: Path) -> None:
    ds = smooth(20, 32, 48)
    for chunk, tile, wanted in (
        ((1, 16, 16), (8, 8), True),  # four chunks of 16 x 16 at most, once
        ((8, 8, 8), (8, 8), False),  # eight times: up to 8 x 16 x 16 values for a field of 32 x 48
        ((4, 8, 8), (8, 8), True),  # 4 x 15 x 15
        ((1, 32, 48), (8, 8), False),  # the whole field either way
        ((20, 32, 48), (8, 8), False),
        ((1, 16, 48), (8, 48), True),  # often one band
    ):
        source = open_source(stored(ds, tmp_path / f"{chunk}.zarr", *chunk))
        assert saves_reading(source, tile) is wanted, chunk
    assert saves_reading(open_source(ds), (8, 8))  # in memory, or one after the other in a file
    assert saves_reading(open_source(ds.chunk(time=1, latitude=8)), (8, 8))


# -- bad input


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too many rows": ({"tile": (64, 12)}, r"tile=\(64, 12\) is larger than the 16 rows of ds; type tile=\(16, 12\)"),
    "too many columns": ({"tile": (8, 32)}, r"is larger than the 24 columns of ds; type tile=\(8, 24\)"),
    "one number, too large": ({"tile": 20}, r"tile=\(20, 20\) is larger than the 16 rows of ds; type tile=\(16, 20\)"),
    "no multiple": ({"tile": (8, 10)}, r"multiples of 4 and at least 8, or all of the 24 columns: tile=\(8, 8\)"),
    "too small": ({"tile": 4}, r"tile=\(4, 4\) is not accepted; .* at least 8, or all of the 16 rows: tile=\(8, 8\)"),
    "zero": ({"tile": 0}, "tile=0"),
    "text": ({"tile": "small"}, "give a number of cells, or rows and columns"),
    "three": ({"tile": (8, 8, 8)}, "give a number of cells, or rows and columns"),
    "fractions": ({"tile": (8.0, 8)}, "tile=8.0"),
    "other names": ({"tile": {"rows": 8, "columns": 8}}, r"does not name rows and columns; type tile=\{'latitude': 8, 'longitude': 12\}"),
    "no names": ({"tile": {}}, r"does not name rows and columns; type"),
    "a doubly periodic box": ({"tile": 8, "periodic": "both"}, r"tile=\(8, 8\) cuts a doubly periodic box.* leave out tile"),
    "a periodic axis": ({"tile": 8, "periodic": True}, r"all 24 columns, which tile=\(8, 8\) cuts; .*: tile=\(8, 24\)"),
    "a mesh": ({"tile": 8, "architecture": "mesh"}, "architecture='mesh' sees the whole grid, which tile cuts; leave out tile"),
    "a forecast": ({"tile": 8, "task": "forecast", "lag": "10D"}, "tile=8 has no effect with task='forecast'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_tiles_are_refused_before_anything_is_read(
    fields: xr.Dataset, change: dict[str, Any], message: str, no_compute: None
) -> None:
    options = {k: v for k, v in QUICK.items() if k not in ("width",) or change.get("architecture") != "mesh"}
    with pytest.raises(GendaError, match=message):
        xgenda.train(fields.chunk(time=8), **{**options, **change})


def test_a_model_that_goes_around_its_box_is_not_trained_on_with_tiles(fields: xr.Dataset) -> None:
    box = trained(fields, periodic="both", anchor="spectral")
    with pytest.raises(OptionError, match="cuts a doubly periodic box"):
        trained(fields, start=box, tile=8, anchor="auto", width=None)
    mesh = trained(fields, architecture="mesh", network_options={"rounds": 1, "refinement": 1}, steps=2)
    with pytest.raises(OptionError, match="start has a mesh network, which sees the whole grid; leave out tile"):
        trained(fields, start=mesh, tile=8, anchor="auto", width=None)


def test_automatic_tiles_are_of_large_grids_and_as_large_as_fields_are_correlated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "LARGEST_PLANE", 96)
    rng = np.random.default_rng(0)
    white = rng.standard_normal((20, 1, 120, 120))
    # a mean over 5 x 5 cells: correlation (5 - lag) / 5, gone after five cells
    x = sum(np.roll(white, (i, j), (2, 3)) for i in range(5) for j in range(5))
    x = np.asarray(x)
    assert automatic_tile(x.reshape(20, -1), (120, 120), None, False) == (16, 16)  # four cells at the deepest level, at least
    assert automatic_tile(x.reshape(20, -1), (120, 120), True, False) == (16, 120)
    assert automatic_tile(x.reshape(20, -1), (120, 120), False, True) == (16, 120)
    assert automatic_tile(x.reshape(20, -1), (120, 120), False, False) == (16, 16)
    assert automatic_tile(x.reshape(20, -1), (120, 120), "both", False) is None
    assert automatic_tile(x[..., :96, :96].reshape(20, -1), (96, 96), None, False) is None
    long = np.repeat(np.repeat(white[..., :12, :12], 10, 2), 10, 3)
    assert automatic_tile(long.reshape(20, -1), (120, 120), None, False) == (20, 20)


@pytest.mark.parametrize(("tile", "overlap"), [((8, 8), [4, 4]), ((16, 24), [4, 8]), ((48, 64), [12, 16]), ((20, 37), [8, 12])])
def test_tiles_share_about_a_quarter(tile: tuple[int, int], overlap: list[int]) -> None:
    assert tile_options(tile, 4) == {"tile": list(tile), "overlap": overlap}
    assert tile_options(None, 4) == {}


# -- widths

WIDE: list[tuple[str, int | None, float, int]] = [
    # architecture, planned steps, independent values, width; networks of 2 * width^2 parameters: 512, 2048, 8192
    ("unet", 19_999, 1e9, 16),
    ("unet", 20_000, 1e9, 32),
    ("unet", 20_000, 20_480, 32),
    ("unet", 20_000, 20_479, 16),
    ("unet", 79_999, 1e9, 32),
    ("unet", 80_000, 1e9, 64),
    ("unet", 80_000, 81_920, 64),
    ("unet", 80_000, 81_919, 32),
    ("unet", 10**7, 20_479, 16),
    ("unet", 10**7, 0, 16),
    ("unet", None, 1e12, 16),
    ("songunet", 80_000, 1e9, 64),
    ("mesh", 10**7, 1e12, 32),
    ("mesh", None, 1e12, 32),
]


@pytest.mark.parametrize(("architecture", "steps", "values", "width"), WIDE)
def test_widths_by_the_length_of_training_and_its_data(architecture: str, steps: int | None, values: float, width: int) -> None:
    assert suitable_width(architecture, steps, values, lambda w: 2 * w**2) == width


def effort(**change: Any) -> Optimiser:
    given = {"epochs": None, "steps": None, "seconds": None, **change}
    batch = given.pop("batch_size", 16)
    return Optimiser(Effort(**given), batch, 1e-3, None, 0, False, Single(torch.device("cpu")))


PLANNED: list[tuple[int, dict[str, Any], int | None]] = [
    # training fields, options, steps: by default 60 times all fields
    (1_600, {}, 6_000),
    (10 * 365, {}, 228 * DEFAULT_EPOCHS),  # ten years of days
    (10 * 8760, {}, 328_500),  # ten years of hours
    (10 * 8760, {"batch_size": 64}, 1_368 * DEFAULT_EPOCHS),
    (10 * 8760, {"epochs": 2}, 10_950),
    (10 * 8760, {"epochs": 2, "steps": 500}, 500),
    (10, {}, 60),
    (1_600, {"steps": 25_000}, 25_000),
    (10 * 8760, {"seconds": 60.0}, None),
    (10 * 8760, {"seconds": 60.0, "steps": 10**6}, None),
]


@pytest.mark.parametrize(("samples", "change", "steps"), PLANNED)
def test_planned_steps(samples: int, change: dict[str, Any], steps: int | None) -> None:
    assert effort(**change).planned(samples) == steps


def test_a_training_has_the_width_of_the_rule(fields: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own planned steps and values, and the parameters of its own network."""
    asked: list[tuple[str, int | None, float, int]] = []

    def spied(architecture: str, steps: int | None, values: float, parameters: Callable[[int], int]) -> int:
        asked.append((architecture, steps, values, parameters(8)))
        return 8

    monkeypatch.setattr(priors, "suitable_width", spied)
    model = trained(fields, width=None, steps=3)
    assert model.spec.options["network"]["width"] == 8
    architecture, steps, values, parameters = asked[0]
    assert (architecture, steps) == ("unet", 3)
    assert 0 < values <= 48 * 16 * 24
    assert parameters == sum(p.numel() for p in build_network(model.spec.options["network"]).parameters())
    trained(fields, width=None, time_budget="1s", steps=1)
    assert asked[1][1] is None
    trained(fields, start=model, width=None, anchor="auto", steps=1)
    assert len(asked) == 2


def test_a_plan_counts_the_parts(fields: xr.Dataset, tiled: DiffusionModel, seen: list[tuple[int, ...]]) -> None:
    some = fields.isel(time=[0, 1])
    planned = xgenda.plan(some, model=tiled, members=2, steps=3)
    seen.clear()
    analysis(some, tiled)
    assert planned.tile == (8, 12) == seen[0][-2:]
    assert planned.calls == sum(shape[0] for shape in seen)
    assert planned.tiles > 1


def test_parts_of_a_doubly_periodic_box_are_refused_for_downscalers_too(fields: xr.Dataset) -> None:
    with pytest.raises(OptionError, match="tile cuts a doubly periodic box"):
        xgenda.train(fields, task="downscale", factor=4, periodic="both", tile=(8, 8), anchor=None, steps=1)

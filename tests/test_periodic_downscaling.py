"""Downscaling on a doubly periodic box, where all places are alike: wrapped interpolation, homogeneous statistics, shifted samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.ndimage import gaussian_filter, map_coordinates

import xgenda
from xgenda.grids import Grid
from xgenda.models.blocks import Blocks
from xgenda.models.calibration import Calibration, smoothed
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.features import wrapped_between
from xgenda.training.objectives import Denoising, Draws, Regression

NY, NX, FACTOR = 16, 24, 4
FAST: dict[str, Any] = {"task": "downscale", "factor": FACTOR, "periodic": "both", "width": 8, "progress": False}


@pytest.fixture(scope="module")
def spectrum() -> np.ndarray:
    """The root of the spectrum of two variables, shape (2, 2, rows, columns)."""
    k = np.hypot(np.fft.fftfreq(NY)[:, None] * NY, np.fft.fftfreq(NX) * NX)
    one, other = np.exp(-k / 3), 0.5 * np.exp(-k / 4)
    return np.stack([np.stack([one, 0 * one]), np.stack([0.6 * one, other])])


@pytest.fixture(scope="module")
def fields(spectrum: np.ndarray) -> xr.Dataset:
    """Homogeneous Gaussian fields of two variables that depend on each other."""
    white = np.fft.fft2(np.random.default_rng(0).normal(size=(60, 2, NY, NX)))
    values = np.fft.ifft2(np.einsum("cdyx,sdyx->scyx", spectrum, white)).real
    dims = ("time", "latitude", "longitude")
    return xr.Dataset(
        {"a": (dims, 5 + values[:, 0], {"units": "m"}), "b": (dims, 2 * values[:, 1], {"units": "K"})},
        coords={
            "time": np.datetime64("2020-01-01", "ns") + np.arange(60) * np.timedelta64(1, "D"),
            "latitude": 30 + 0.1 * np.arange(NY), "longitude": 0.1 * np.arange(NX),
        },
    )  # fmt: skip


def coarse_of(ds: xr.Dataset) -> xr.Dataset:
    out: xr.Dataset = ds.coarsen(latitude=FACTOR, longitude=FACTOR).mean()
    return out


def test_interpolation_wraps_both_ways() -> None:
    coarse = np.random.default_rng(0).normal(size=(4, 6))
    rows, columns = ((np.arange(n) + 0.5) / FACTOR - 0.5 for n in (NY, NX))
    expected = map_coordinates(coarse, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="grid-wrap")
    found = wrapped_between((4, 6), (NY, NX))(coarse.ravel())
    np.testing.assert_allclose(found.reshape(NY, NX), expected, atol=1e-12)


@pytest.mark.slow
def test_the_mean_is_that_of_the_homogeneous_gaussian(fields: xr.Dataset, spectrum: np.ndarray, tmp_path: Path) -> None:
    """Against the dense conditional mean with the covariance that the fields were drawn from."""
    model = xgenda.train(fields.isel(time=slice(0, 56)), stages="residual", steps=1, calibrate=False, **FAST)
    assert isinstance(model, CorrectiveModel)
    assert model.spec.training["linear_mean"] == "homogeneous covariance"
    impulses = np.fft.fft2(np.eye(2 * NY * NX).reshape(-1, 2, NY, NX))
    root = np.fft.ifft2(np.einsum("cdyx,sdyx->scyx", spectrum, impulses)).real.reshape(2 * NY * NX, -1)
    covariance = root.T @ root
    assert model.blocks is not None
    means = np.kron(np.eye(2), model.blocks.matrix().numpy())
    cross = covariance @ means.T
    exact = cross @ np.linalg.inv(means @ cross)
    test = fields.isel(time=slice(56, 60))
    flat = coarse_of(test)
    given = np.concatenate([(flat.a.values - 5).reshape(4, -1), flat.b.values.reshape(4, -1) / 2], 1)
    expected = (given @ exact.T).reshape(4, 2, NY, NX)
    found = flat.genda.downscale(model=model, stage="mean")
    for name, wanted, unit in (("a", expected[:, 0] + 5, 1.0), ("b", expected[:, 1] * 2, 2.0)):
        wrong = np.sqrt(((found[name].values - wanted) ** 2).mean()) / unit
        left = np.sqrt(((test[name].values - wanted) ** 2).mean()) / unit
        assert wrong < 0.15 * left  # 56 fields say what the covariance is, not quite
    # all places are alike: a field that is shifted by whole blocks gives the shifted result
    rolled = flat.copy(data={n: np.roll(v.values, (1, 2), (1, 2)) for n, v in flat.data_vars.items()})
    shifted = rolled.genda.downscale(model=model, stage="mean")
    np.testing.assert_allclose(shifted.b, np.roll(found.b, (FACTOR, 2 * FACTOR), (1, 2)), atol=1e-5)
    model.save(tmp_path / "model.safetensors")
    again = xgenda.load_model(tmp_path / "model.safetensors")
    a, b = (flat.genda.downscale(model=m, members=2, seed=0, steps=3) for m in (model, again))
    xr.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("method", ["bilinear", "bcsd", "ridge"])
def test_classical_methods_wrap_too(fields: xr.Dataset, method: str, tmp_path: Path) -> None:
    xgenda.train(fields, method=method, out=tmp_path / "model.safetensors", **FAST)
    model = xgenda.load_model(tmp_path / "model.safetensors")
    coarse = coarse_of(fields.isel(time=[0]))
    found = coarse.genda.downscale(model=model, stage="mean")
    rolled = coarse.copy(data={n: np.roll(v.values, (1, 1), (1, 2)) for n, v in coarse.data_vars.items()})
    shifted = rolled.genda.downscale(model=model, stage="mean")
    same = np.allclose(shifted.a, np.roll(found.a, (FACTOR, FACTOR), (1, 2)), atol=1e-6)
    assert same == (method == "bilinear")  # the others are fitted cell by cell


def test_a_sample_and_its_condition_are_shifted_together() -> None:
    states = torch.randn(5, 2, NY, NX)
    condition = torch.cat([states, -states], 1)
    found = Regression(condition, states, shifts=FACTOR).batch(torch.arange(5), states, Draws(0, 1, 5))
    assert found.condition is not None
    torch.testing.assert_close(found.condition[:, :2], found.target)
    moved = 0
    for before, after in zip(states, found.target, strict=True):
        shifts = [(i, j) for i in range(NY) for j in range(NX) if torch.equal(before.roll((i, j), (1, 2)), after)]
        assert len(shifts) == 1
        assert all(s % FACTOR == 0 for s in shifts[0])
        moved += shifts[0] != (0, 0)
    assert moved > 2
    denoising = Denoising(states, torch.zeros(5, dtype=torch.long), None, 1e-4, 1e-3, condition, shifts=FACTOR)
    batch = denoising.batch(torch.arange(5), states, Draws(0, 2, 5))
    assert batch.condition is not None
    sigma = torch.exp(4 * batch.label)[:, None, None, None]
    torch.testing.assert_close(batch.x * (1 + sigma**2).sqrt(), batch.condition[:, :2], atol=1e-2, rtol=0)


@pytest.mark.parametrize("width", [0.7, 5.0])
def test_the_filter_of_the_calibration_is_gaussian(width: float) -> None:
    fields = torch.randn(3, 20, 30, dtype=torch.float64)
    ones = np.ones((20, 30))

    def filtered(field: np.ndarray) -> np.ndarray:
        return np.asarray(gaussian_filter(field, width, mode="constant", radius=int(np.ceil(3 * width))))

    expected = np.stack([filtered(f.numpy()) / filtered(ones) for f in fields])
    np.testing.assert_allclose(smoothed(fields, width), expected, atol=1e-12)


@pytest.mark.parametrize("wraps", [True, False])
@pytest.mark.parametrize("weights", ["cells", "areas"])
def test_smooth_fields_have_the_means_of_their_blocks_and_no_edges(wraps: bool, weights: str) -> None:
    grid = Grid(np.linspace(30, 70, 24), np.linspace(0, 40, 32))
    blocks = Blocks(grid, 8, weights, wraps)
    means = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = blocks.smooth(means)
    torch.testing.assert_close(blocks.mean(found), means)
    steps = blocks.added(torch.zeros(5, 24, 32, dtype=torch.float64), means)
    assert float(found.diff(dim=-1).abs().max()) < 0.5 * float(steps.diff(dim=-1).abs().max())
    assert float(found.std()) < 2 * float(steps.std())
    if wraps and weights == "cells":
        torch.testing.assert_close(blocks.smooth(means.roll((1, 1), (1, 2))), found.roll((8, 8), (1, 2)))
    part = blocks.on((np.arange(8, 24), np.arange(32)))
    torch.testing.assert_close(part.mean(part.smooth(means[:, 1:])), means[:, 1:])


@pytest.mark.slow
def test_calibration_leaves_block_means_and_no_edges(fields: xr.Dataset) -> None:
    """Deviations whose smooth part is multiplied lose their block means by a smooth field: no more roughness than they had."""
    model = xgenda.train(fields, stages="residual", steps=1, calibrate=False, **FAST)
    assert isinstance(model, CorrectiveModel)
    assert model.blocks is not None
    deviations = torch.randn(4, 2, NY, NX, dtype=torch.float64)
    wide = Calibration((8.0, 2.0), ((1.0, 2.0, 1.0), (1.0, 1.0, 1.0)))
    smooth_one = smoothed(deviations, 2.0)
    kept = model.without_means(wide(smooth_one))
    torch.testing.assert_close(model.blocks.mean(kept), torch.zeros(4, 2, NY // FACTOR, NX // FACTOR, dtype=torch.float64))
    stepped = model.blocks.added(wide(smooth_one)[:, 0], torch.zeros(4, NY // FACTOR, NX // FACTOR, dtype=torch.float64))
    jumps = [
        float(f[..., FACTOR - 1 :: FACTOR, :][..., :-1, :].sub(f[..., FACTOR::FACTOR, :]).square().mean())
        for f in (kept[:, 0], stepped)
    ]
    assert jumps[0] < 0.5 * jumps[1]

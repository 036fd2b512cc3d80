"""Slips that would go unseen: fits that have seen what they are judged on, options without effect, files of others."""

from __future__ import annotations

import copy
import json
import time as clock
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import save_file

import xgenda
from xgenda.errors import OptionError, StateError, UnitsError
from xgenda.models.diffusive import DiffusionModel
from xgenda.models.generative import GenerativeModel
from xgenda.networks.unet import UNet
from xgenda.training.anchoring import correlation_in_time, fit_anchors
from xgenda.training.corpus import Corpus
from xgenda.training.journal import Journal
from xgenda.training.objectives import Denoising
from xgenda.training.optimiser import Effort, Optimiser, _Fit
from xgenda.training.processes import Single
from xgenda.training.windows import FOLDS, HELD, Samples, blocks, read_samples

SHAPE = (6, 8)
QUICK: dict[str, Any] = {"anchor": "eof", "climatology": "none", "steps": 2, "width": 8, "progress": False}


def dataset(values: np.ndarray, time: np.ndarray | None = None, **attrs: str) -> xr.Dataset:
    n, ny, nx = values.shape
    days = np.datetime64("2000-01-01", "ns") + np.arange(n) * np.timedelta64(1, "D")
    coords = {"time": days if time is None else time, "latitude": np.linspace(40, 50, ny), "longitude": np.linspace(0, 14, nx)}
    return xr.Dataset({"x": (("time", "latitude", "longitude"), values, {"units": "K", **attrs})}, coords)


def white(n: int = 60, seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    return dataset(280 + (rng.standard_normal((n, 3)) @ rng.standard_normal((3, 48))).reshape(n, *SHAPE))


def autoregressive(n: int, rho: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((n, 6))
    for t in range(1, n):
        out[t] = rho * out[t - 1] + np.sqrt(1 - rho**2) * out[t]
    return (out @ rng.standard_normal((6, 48))).reshape(n, *SHAPE)


def train(ds: xr.Dataset, **change: Any) -> GenerativeModel:
    return xgenda.train(ds, **{**QUICK, **change})


def standardised(ds: xr.Dataset) -> tuple[np.ndarray, Samples]:
    samples = read_samples(ds)
    z = samples.values.reshape(len(samples.values), -1)
    return (z - z.mean(0)) / z.std(), samples


# -- what is judged has not been seen


def rank_without(ds: xr.Dataset, fold: np.ndarray, block: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Return the rows that the Gaussian of a block was fitted to."""
    from xgenda.training import anchoring

    z, samples = standardised(ds)
    taken: list[np.ndarray] = []
    original = anchoring._anomaly

    def watched(part: np.ndarray, basis: np.ndarray) -> np.ndarray:
        taken.append(np.array([int(np.abs(z - row).sum(1).argmin()) for row in part]))
        return original(part, basis)

    monkeypatch.setattr(anchoring, "_anomaly", watched)
    fit_anchors(z, samples, fold, "eof")
    return taken[block]


def test_gaussians_are_fitted_away_from_their_block_in_all_of_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of the same times: a field tells of those of its own run some days later, which are not the next ones in order."""
    n = 90
    day = np.datetime64("2000-01-01", "ns") + np.arange(n) * np.timedelta64(1, "D")
    both = np.concatenate([autoregressive(n, 0.9, seed) for seed in (1, 2)])
    ds = dataset(both, np.concatenate([day, day]))
    fold = blocks(ds.time, 2 * n, FOLDS)
    rows = rank_without(ds, fold, 2, monkeypatch) % n
    inside = np.flatnonzero(fold == 2) % n
    apart = np.abs(rows[:, None] - inside).min()
    assert apart > 3


def test_a_short_validation_block_has_the_same_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    ds = dataset(autoregressive(180, 0.9))
    fold = blocks(ds.time, 180, FOLDS, slice("2000-05-01", "2000-05-05"))
    rows = rank_without(ds, fold, HELD, monkeypatch)
    assert np.abs(rows[:, None] - np.flatnonzero(fold == HELD)).min() > 3


def test_a_validation_block_that_no_field_of_the_sample_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from xgenda.training import corpus

    monkeypatch.setattr(corpus, "SAMPLE", 15)
    ds = white(90)
    model = train(ds, validation=slice(ds.time.values[39], ds.time.values[43]))
    assert model.spec.training["steps"] == 2


def test_a_gaussian_that_has_seen_the_fields_is_fitted_anew() -> None:
    """More training on the same fields, or on some more: what is withheld now was in the Gaussian of the first model."""
    ds = white(60)
    first = train(ds.isel(time=slice(0, 50)))
    for again in (ds.isel(time=slice(0, 50)), ds, ds.isel(time=slice(0, 30))):
        assert not train(again, start=first, width=None).spec.training["guidance_covariance"].startswith("that of")
    old = train(ds.isel(time=slice(0, 50)))
    del old.spec.training["marks"]  # of an earlier version
    assert not train(ds.isel(time=slice(0, 50)), start=old, width=None).spec.training["guidance_covariance"].startswith("that of")


def test_correlations_in_time_are_of_pairs_within_a_run() -> None:
    """Runs of ten days, as a stream is sampled: the last day of one says nothing of the first of the next."""
    rho, runs = 0.9, 60
    values = autoregressive(100 * runs, rho)
    rows = (np.arange(runs)[:, None] * 100 + np.arange(10)).ravel()
    ds = dataset(values).isel(time=rows)
    z, samples = standardised(ds)
    found = correlation_in_time(z, samples, blocks(samples.time, len(z), FOLDS), 5, None)
    np.testing.assert_allclose(found, rho ** np.arange(5), atol=0.05)
    alternating = dataset(np.sign(np.arange(60) % 2 - 0.5)[:, None, None] * np.ones((60, *SHAPE)))
    z, samples = standardised(alternating)
    found = correlation_in_time(z, samples, blocks(samples.time, len(z), FOLDS), 5, None)
    index = np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    assert np.linalg.eigvalsh(found.numpy()[index])[0] > 0


def test_scores_of_fine_tuning_are_relative_to_the_gaussian() -> None:
    """Not to the network that it started from, which may be anything."""
    first = train(white(60, 1))
    assert isinstance(first, DiffusionModel)
    for p in first.denoiser.network.parameters():
        p.data.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    record = train(white(60, 2), start=first, width=None, learning_rate=1e-9, augment="none").spec.training
    assert record["validation_start"] > 1.2 * record["validation_without"]
    assert record["validation_ratio"] == pytest.approx(record["validation_best"] / record["validation_without"])
    assert 0.9 < record["validation_ratio"] <= 1.0


@pytest.mark.parametrize("sampled", ["alone", "in runs"])
def test_the_gap_around_a_block_is_not_shorter_than_the_memory_of_what_is_between_samples(sampled: str) -> None:
    rho, n = 0.9, 1200  # correlated for 11 days
    ds = dataset(autoregressive(n, rho))
    rows = np.arange(0, n, 20) if sampled == "alone" else (np.arange(0, n, 60)[:, None] + np.arange(6)).ravel()
    z, samples = standardised(ds.isel(time=rows))
    assert 8 <= Corpus(samples, rows, ds.time, n).gap(z) <= 130
    z, samples = standardised(ds)
    assert 6 <= Corpus(samples, np.arange(n), ds.time, n).gap(z) <= 16


# -- options that would have no effect, or another one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": {"y": "log"}}, "transform names 'y', and the variables are 'x'"),
        ({"bounds": {"y": (0, 1)}}, "bounds names 'y'"),
        ({"offset": {"y": 0.1}}, "offset names 'y'"),
        ({"offset": "a"}, "offset='a' is not accepted"),
        ({"offset": None}, "offset=None is not accepted"),
        ({"bounds": 5}, "bounds=5 is not accepted"),
        ({"bounds": {"x": ("a", "b")}}, "bounds of 'x' are"),
        ({"variables": 5}, "variables=5 is not accepted"),
        ({"variables": []}, "variables=.* is not accepted"),
        ({"out": 5}, "out=5 is not accepted"),
        ({"name": ["a"]}, "name=.*must be text"),
        ({"licence": None}, "licence=None must be text"),
    ],
)
def test_slips_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        train(white(), **options)


def test_what_are_no_times_is_told() -> None:
    ds = white()
    with pytest.raises(OptionError, match="holds int64, not times"):
        train(ds.assign_coords(time=np.arange(60)))
    late = ds.time.values.copy()
    late[3] = np.datetime64("NaT")
    with pytest.raises(OptionError, match="has 1 missing times"):
        train(ds.assign_coords(time=late))
    with pytest.raises(StateError, match="none are left to train on"):
        train(ds.assign_coords(time=np.full(60, ds.time.values[0])))


@pytest.mark.filterwarnings("ignore::xgenda.errors.LittleDataWarning")
def test_a_single_cell_is_a_grid() -> None:
    assert train(white().isel(latitude=[0], longitude=[0]), anchor="auto").spec.training["steps"] == 2


def test_options_of_fine_tuning_are_in_the_units_of_ds() -> None:
    kelvin = white()
    first = train(kelvin)
    celsius = kelvin - 273.15
    celsius["x"].attrs["units"] = "degC"
    tuned = train(celsius, start=first, width=None, bounds={"x": (-50.0, None)}, transform={"x": "log"}, offset={"x": 60.0})
    np.testing.assert_allclose(tuned.scaling.bounds, [(223.15, np.inf)])
    np.testing.assert_allclose(tuned.scaling.offsets, [60.0 - 273.15])


# -- what belongs to others


def test_a_folder_of_the_same_name_keeps_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "model.training"
    (folder / ".git").mkdir(parents=True)
    (folder / "data.safetensors").write_bytes(b"precious")
    for _ in range(2):
        train(white(), out=tmp_path / "model.safetensors", overwrite=True)
        assert sorted(p.name for p in folder.iterdir()) == [".git", "data.safetensors"]
    journal = Journal(tmp_path / "other.training", {})
    assert journal.save("prior", {"a": torch.zeros(1)}, {})
    (tmp_path / "other.training" / ".prior.safetensors.partial-1").touch()
    assert journal.holds
    journal.close()
    assert not (tmp_path / "other.training").exists()


def test_random_numbers_of_the_caller_stay(tmp_path: Path) -> None:
    first = train(white(), out=tmp_path / "model.safetensors")
    before = torch.random.get_rng_state()
    xgenda.load_model(tmp_path / "model.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)
    train(white(60, 1), start=str(tmp_path / "model.safetensors"), width=None)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.spec.task == "prior"


def test_other_statics_are_other_data(tmp_path: Path) -> None:
    fine = white(48).isel(latitude=slice(0, 4))
    ground = fine.isel(time=0, drop=True).rename(x="orog")
    options: dict[str, Any] = {"task": "downscale", "factor": 2, "out": tmp_path / "m.safetensors", "steps": 2}
    train(fine, statics=ground, **options)
    with pytest.raises(OptionError, match="statics: "):
        train(fine, statics=ground**2, resume=True, **options)
    assert train(fine, statics=ground, resume=True, **options).spec.task == "downscale"


def test_a_resumed_training_does_not_get_its_time_again(tmp_path: Path) -> None:
    """What the first network took belongs to the time that was given, when the second one is resumed."""
    states = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    objective = Denoising(states, torch.zeros(24, dtype=torch.long), None, 0.05, 10.0)
    rows, left = torch.arange(24), []
    for _ in range(2):  # uninterrupted, and resumed when the first network was finished
        journal = Journal(tmp_path / "model.training", {})
        how = Optimiser(
            Effort(None, 3, 100.0, clock.monotonic()), 8, 1e-3, None, 0, False, Single(torch.device("cpu")), journal=journal
        )
        network = UNet(1, 0, width=8, multipliers=(1, 2), position=2, shape=(8, 8))
        how.fit(network, objective, rows[:16], rows[16:], 1.0, "mean")
        second = _Fit(how, copy.deepcopy(network), objective, rows[:16], rows[16:], 1.0, "residual", None, None)
        assert second.seconds is not None
        left.append(second.seconds)
        path = tmp_path / "model.training" / "mean.safetensors"
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            header = json.loads(file.metadata()["training"])
        header["values"]["spent"] = 60.0
        save_file(tensors, path, metadata={"training": json.dumps(header)})
    assert left[0] > 90
    assert left[1] == pytest.approx(40, abs=8)


def masked(tmp_path: Path) -> tuple[xr.Dataset, xr.Dataset]:
    """Fields in units in which single precision rounds, with land, in memory and in a store."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((240, 8, 12)).cumsum(1).cumsum(2) / 8 + rng.standard_normal((240, 1, 1))
    land = np.zeros((8, 12), bool)
    land[2:5, 3:7] = True
    values = np.where(land, np.nan, 288 + noise).astype(np.float32)
    coords = {"time": np.datetime64("2000-01-01", "ns") + np.arange(240) * np.timedelta64(1, "D"),
              "latitude": np.linspace(0, 35, 8), "longitude": np.linspace(0, 55, 12)}  # fmt: skip
    ds = xr.Dataset({"sst": (("time", "latitude", "longitude"), values, {"units": "K"})}, coords=coords)
    ds.chunk(time=20).to_zarr(tmp_path / "sst.zarr", zarr_format=2)
    return ds, xr.open_zarr(tmp_path / "sst.zarr")


def test_masked_cells_of_a_stream_are_no_error(tmp_path: Path) -> None:
    """The Gaussian has no variance on land, where rounding of a stream in single precision would be many standard deviations."""
    ds, store = masked(tmp_path)
    losses = [
        xgenda.train(d, steps=1, width=8, anchor="eof", climatology="none", memory=m, progress=False).spec.training[
            "validation_start"
        ]
        for d, m in ((ds, "10MB"), (store, "20kB"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_units_must_be_said_in_fine_tuning(tmp_path: Path) -> None:
    ds, _ = masked(tmp_path)
    model = xgenda.train(ds, steps=1, width=8, anchor="eof", climatology="none", progress=False)
    celsius = (ds - 273.15).drop_attrs()
    with pytest.raises(UnitsError, match="has no units, and start=.* has it in K"):
        xgenda.train(celsius, start=model, steps=1, progress=False)

"""`plan`: what it predicts is what then happens."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch.nn.modules.module import register_module_forward_hook

import xgenda
from xgenda.devices import handle_of
from xgenda.diffusion.guidance import GUIDANCES, goes_through, guidance_options
from xgenda.diffusion.memory import MemoryTracker
from xgenda.errors import ModelNotFoundError, OptionError
from xgenda.models.generative import GenerativeModel
from xgenda.networks.dense import LatentNet
from xgenda.networks.unet import UNet
from xgenda.networks.uno import UNO


@pytest.fixture(scope="module")
def truth() -> xr.Dataset:
    return xgenda.tutorial.open_dataset("a1b-north-america").isel(time=slice(200, 203))


@contextlib.contextmanager
def watched(decoder: torch.nn.Module | None = None) -> Iterator[dict[str, int]]:
    """Count the samples that networks see, those that are kept for a gradient, what a decoder makes, and the most memory that is alive."""
    seen = {"calls": 0, "kept": 0, "decoded": 0, "memory": 0}

    def count(module: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if isinstance(module, (UNet, UNO, LatentNet)):
            seen["calls"] += len(given[0])
            seen["kept"] += len(given[0]) * out.requires_grad
        if module is decoder:
            seen["decoded"] += len(given[0])

    handle = register_module_forward_hook(count)
    try:
        with MemoryTracker() as tracker:
            yield seen
            seen["memory"] = tracker.peak + tracker.given
    finally:
        handle.remove()


def observed(fields: xr.Dataset) -> pd.DataFrame:
    """Return one cell of each time as an observation."""
    cell = fields.isel(latitude=4, longitude=4)
    return pd.DataFrame(
        {
            "time": cell.time.values,
            "latitude": float(cell.latitude),
            "longitude": float(cell.longitude),
            "air_temperature": cell.air_temperature.values,
        }
    )


@pytest.mark.parametrize(("guidance", "gradients"), [("anchor", 0), ("mmps", 6), ("inpaint", 0), ("dps", 1)])
def test_a_plan_of_an_analysis_is_what_it_takes(truth: xr.Dataset, guidance: str, gradients: int) -> None:
    model = xgenda.load_model("t2m-north-america")
    options = {"members": 2, "steps": 3, "guidance": guidance}
    planned = xgenda.plan(truth, model=model, **options)
    with watched() as seen:
        truth.genda.assimilate(observed(truth), model=model, error=1.0, seed=0, batch_size=6, device="cpu", **options)
    assert (planned.samples, planned.calls) == (6, seen["calls"])
    assert planned.gradients == planned.calls * gradients
    assert seen["kept"] == (planned.calls if gradients else 0)
    assert planned.guidance == guidance
    assert planned.memory == pytest.approx(seen["memory"], rel=0.25)


def test_which_guidances_go_through_the_network() -> None:
    assert goes_through("sda", guidance_options("sda", {"detach": True})) == 0
    assert goes_through("inpaint", guidance_options("inpaint", {"also": "sda"})) == 1
    assert goes_through("mmps", guidance_options("mmps", {"iterations": 2})) == 3
    assert [goes_through(k, guidance_options(k)) > 0 for k in GUIDANCES] == [False, True, True, False, True, True, False, False]


def test_a_plan_of_a_trajectory_counts_its_windows(truth: xr.Dataset) -> None:
    series = xgenda.tutorial.open_dataset("a1b-north-america").isel(latitude=slice(8, 16), longitude=slice(12, 24))
    model = xgenda.train(series.isel(time=slice(0, 60)), window=3, steps=2, width=8, seed=0, progress=False)
    states = series.isel(time=slice(60, 66))
    planned = xgenda.plan(states, model=model, members=2, steps=3)
    with watched() as seen:
        states.genda.assimilate(
            observed(states), model=model, error=1.0, members=2, steps=3, seed=0, device="cpu", background_check=None
        )
    assert (planned.samples, planned.calls) == (12, seen["calls"])
    assert planned.memory == pytest.approx(seen["memory"], rel=0.3)
    with pytest.raises(OptionError, match="give at least 3"):
        xgenda.plan(states.isel(time=[0, 1]), model=model)


def test_plans_of_background_models_and_forecasts(truth: xr.Dataset) -> None:
    series = xgenda.tutorial.open_dataset("a1b-north-america").isel(latitude=slice(8, 16), longitude=slice(12, 24))
    for task in ("background", "forecast"):
        model = xgenda.train(
            series.isel(time=slice(0, 60)), task=task, lag="360D", anchor="eof", steps=2, width=8, seed=0, progress=False
        )
        given = series.isel(time=slice(60, 63))
        planned = xgenda.plan(given, model=model, members=2, steps=3)
        regression = 0 if model.regression is None else 3
        with watched() as seen:
            if task == "forecast":
                xgenda.forecast(given, model=model, members=2, steps=3, seed=0, device="cpu")
            else:
                given.genda.assimilate(observed(given), model=model, error=1.0, members=2, steps=3, seed=0, device="cpu")
        assert (planned.samples, planned.calls) == (6, seen["calls"] + regression)
        assert planned.guidance == ("" if task == "forecast" else "anchor")
        assert planned.memory == pytest.approx(seen["memory"], rel=0.3)


@pytest.mark.parametrize(
    ("window", "guidance", "gradients", "members"),
    [(1, "anchor", 0, 2), (3, "mmps", 6, 2), (1, "dps", 1, 64), (3, "mmps", 6, 64)],
)
def test_plans_of_diffusions_of_latent_vectors(
    climate: xr.Dataset, tiny_latents: Any, tiny_trajectories: Any, window: int, guidance: str, gradients: int, members: int, tmp_path: Path
) -> None:  # fmt: skip
    """With what the background check takes, which a process finds once: calls, states that are decoded, and memory."""
    file = shutil.copy((tiny_latents if window == 1 else tiny_trajectories).path, tmp_path / "model.safetensors")
    model: Any = handle_of(xgenda.load_model(file)).load()  # that which a process keeps
    assert model.window == window
    states = climate.isel(time=slice(0, 4))
    options: dict[str, Any] = {"members": members, "steps": 3, "guidance": guidance, "batch_size": 2 * members}
    planned = xgenda.plan(states, model=model, **options)
    with watched(model.network.inner.last) as seen:
        states.genda.assimilate(observed(states), model=model, error=5.0, seed=0, device="cpu", **options)
    assert (planned.samples, planned.calls, planned.decoded) == (4 * members, seen["calls"], seen["decoded"])
    assert planned.once == 512 * 47
    sampled = planned.calls - planned.once
    assert sampled == members * (4 if window == 1 else 2) * 6
    assert planned.gradients == sampled * gradients
    assert seen["kept"] == (sampled if gradients else 0)
    assert planned.memory == pytest.approx(seen["memory"], rel=0.3)
    assert f"{planned.decoded} states" in repr(planned)
    assert "; 24064 of them once in a process, for background_check" in repr(planned)
    with watched() as again:
        states.genda.assimilate(observed(states), model=model, error=5.0, seed=0, device="cpu", **options)
    assert again["calls"] == sampled


@pytest.mark.slow
def test_plans_of_priors_over_functions_and_of_windows_of_coarse_fields(
    climate: xr.Dataset, tiny_functions: GenerativeModel, tiny_points: GenerativeModel, tiny_context: GenerativeModel
) -> None:
    states = climate.isel(time=slice(0, 3))
    for model in (tiny_functions, tiny_points):
        one = states.isel(time=[0])
        planned = xgenda.plan(one, model=model, members=1, steps=3)
        with watched() as seen:
            one.genda.assimilate(observed(one), model=model, error=5.0, members=1, steps=3, seed=0, device="cpu")
        assert planned.calls == seen["calls"]
    coarse = states.coarsen(latitude=4, longitude=4).mean()
    planned = xgenda.plan(coarse, model=tiny_context, members=2, steps=3)
    with watched() as seen:
        coarse.genda.downscale(model=tiny_context, members=2, steps=3, seed=0, device="cpu")
    assert planned.calls == seen["calls"]


def test_what_cannot_be_planned_is_refused(truth: xr.Dataset) -> None:
    with pytest.raises(OptionError, match="no diffusion model"):
        xgenda.plan(truth, model=xgenda.gaussian_prior(truth, length_scale=3e5, std=1.0))
    for asked in ({"sampler": "rmap"}, {"guidance": "mse"}, {}):
        with pytest.raises(OptionError, match="is searched with sampler='rmap', and how often it is decoded depends"):
            xgenda.plan(truth, model="t2m-north-america-vae", **asked)
    with pytest.raises(OptionError, match="tile=8 has no effect"):
        xgenda.plan(truth, model="t2m-north-america", tile=8)
    with pytest.raises(OptionError, match="guidance"):
        xgenda.plan(truth, model="t2m-north-america", guidance="magic")
    with pytest.raises(OptionError, match="task"):
        xgenda.plan(truth, task="prediction")
    with pytest.raises(ModelNotFoundError, match="task 'forecast'"):
        xgenda.plan(truth, task="forecast")
    fine = truth.isel(latitude=slice(0, 36), longitude=slice(0, 48))
    coarse = fine.coarsen(latitude=4, longitude=4).mean()
    with pytest.raises(OptionError, match="for downscaling"):
        xgenda.plan(coarse, model="t2m-north-america-x4", guidance="sda")
    assert xgenda.plan(truth, task="prior", members=1, steps=2).model == "t2m-north-america"
    assert np.isfinite(xgenda.plan(coarse, members=1, steps=2).memory)

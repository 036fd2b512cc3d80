"""`plan`: what it predicts is what then happens."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch.nn.modules.module import register_module_forward_hook

import xgenda
from xgenda.diffusion.guidance import GUIDANCES, goes_through, guidance_options
from xgenda.diffusion.memory import MemoryTracker
from xgenda.errors import ModelNotFoundError, OptionError
from xgenda.networks.unet import UNet


@pytest.fixture(scope="module")
def truth() -> xr.Dataset:
    return xgenda.tutorial.open_dataset("a1b-north-america").isel(time=slice(200, 203))


@contextlib.contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Count the samples that networks see, those that are kept for a gradient, and the most memory that is alive."""
    seen = {"calls": 0, "kept": 0, "memory": 0}

    def count(module: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if isinstance(module, UNet):
            seen["calls"] += len(given[0])
            seen["kept"] += len(given[0]) * out.requires_grad

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


def test_what_cannot_be_planned_is_refused(truth: xr.Dataset) -> None:
    with pytest.raises(OptionError, match="no diffusion model"):
        xgenda.plan(truth, model=xgenda.gaussian_prior(truth, length_scale=3e5, std=1.0))
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

"""Fixtures for all tests: small models, small data, and a guard against computing too early."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin while they wait starve other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models in tests are tiny: waking a second thread takes longer than their work
# Processes that are started from this one, as those of the tests are, keep the memory that they free: on Linux a training on the CPU
# otherwise spends up to a fifth of its time in page faults.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "2000000000")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "4000000000")

import matplotlib
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import xgenda
from xgenda.models.generative import GenerativeModel

matplotlib.use("Agg")


@pytest.fixture
def no_compute() -> Iterator[None]:
    """Fail if anything is computed by dask."""
    import dask

    def refuse(graph: object, keys: object, **options: object) -> None:
        raise AssertionError("dask was asked to compute")

    with dask.config.set(scheduler=refuse):
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread would only wait."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def climate() -> xr.Dataset:
    """Thirty years of annual mean temperature on 8 x 12 cells: enough to train on."""
    ds = xgenda.tutorial.open_dataset("a1b-north-america")
    return ds.isel(time=slice(0, 30), latitude=slice(8, 16), longitude=slice(12, 24))


@pytest.fixture(scope="session")
def tiny_prior(climate: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> GenerativeModel:
    """A diffusion prior on the grid of `climate`, read from a file as a user would."""
    path = tmp_path_factory.mktemp("models") / "tiny-prior.safetensors"
    xgenda.train(climate, steps=2, width=8, name="tiny-prior", out=path, progress=False)
    return xgenda.load_model(path)


@pytest.fixture(scope="session")
def tiny_downscaler(climate: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> GenerativeModel:
    """A model from 4 x 4 block means to the grid of `climate`, read from a file."""
    path = tmp_path_factory.mktemp("models") / "tiny-downscaler.safetensors"
    xgenda.train(climate, task="downscale", factor=4, steps=2, width=8, name="tiny-downscaler", out=path, progress=False)
    return xgenda.load_model(path)


@pytest.fixture(scope="session")
def tiny_eofs(climate: xr.Dataset) -> GenerativeModel:
    """A Gaussian of the leading patterns of `climate`."""
    return xgenda.gaussian_prior(climate, covariance="eof", rank=4)


@pytest.fixture(scope="session")
def tiny_process(climate: xr.Dataset) -> GenerativeModel:
    """A Gaussian process around the first field of `climate`."""
    return xgenda.gaussian_prior(climate.isel(time=[0]), length_scale=800e3, std=1.0, representation="points")


@pytest.fixture(scope="session")
def tiny_latents(climate: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> GenerativeModel:
    """An autoencoder of the grid of `climate` that is not linear, with a diffusion of its latent vectors, read from a file."""
    path = tmp_path_factory.mktemp("models") / "tiny-latents.safetensors"
    options = {"latent": 3, "latent_prior": "diffusion", "steps": 30, "learning_rate": 1e-2, "width": 8, "name": "tiny-latents"}
    model = xgenda.train(climate, task="autoencoder", out=path, progress=False, **options)
    assert model.network.inner is not None  # type: ignore[attr-defined]
    assert model.spec.training["correction_weight"] > 0
    return xgenda.load_model(path)


@pytest.fixture(scope="session")
def tiny_trajectories(
    climate: xr.Dataset, tiny_latents: GenerativeModel, tmp_path_factory: pytest.TempPathFactory
) -> GenerativeModel:
    """The same autoencoder with a diffusion of three consecutive latent vectors."""
    path = tmp_path_factory.mktemp("models") / "tiny-trajectories.safetensors"
    options = {"latent_prior": "diffusion", "window": 3, "steps": 2, "name": "tiny-trajectories"}
    xgenda.train(climate, task="autoencoder", start=tiny_latents, out=path, progress=False, **options)
    return xgenda.load_model(path)


@pytest.fixture(scope="session")
def tiny_conversion(
    climate: xr.Dataset, tiny_latents: GenerativeModel, tmp_path_factory: pytest.TempPathFactory
) -> GenerativeModel:
    """From 4 x 4 block means to the states of the autoencoder."""
    path = tmp_path_factory.mktemp("models") / "tiny-conversion.safetensors"
    coarse = climate.coarsen(latitude=4, longitude=4).mean()
    options = {"target": climate, "start": tiny_latents, "steps": 2, "width": 8, "name": "tiny-conversion"}
    xgenda.train(coarse, task="conversion", out=path, progress=False, **options)
    return xgenda.load_model(path)


@pytest.fixture(scope="session")
def tiny_points(tiny_prior: GenerativeModel, tmp_path_factory: pytest.TempPathFactory) -> GenerativeModel:
    """The diffusion prior on the grid of `climate`, known between its cells."""
    between = tiny_prior.between_cells(covariance="exponential", length_scale=400e3, std=0.5)  # type: ignore[attr-defined]
    return xgenda.load_model(between.save(tmp_path_factory.mktemp("models") / "tiny-points.safetensors"))


@pytest.fixture(scope="session")
def tiny_functions(climate: xr.Dataset) -> GenerativeModel:
    """A prior over functions, trained on every other row and column of `climate` and refined to its grid; it was never in a file."""
    options = {"architecture": "uno", "periodic": "both", "network_options": {"modes": 2, "rank": 2}, "width": 8, "steps": 2}
    noise = {"kind": "exponential", "length": 0.3}
    coarse = climate.isel(latitude=slice(None, None, 2), longitude=slice(None, None, 2))
    return xgenda.train(coarse, noise=noise, name="tiny-functions", progress=False, **options).refined(2)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def tiny_context(climate: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> GenerativeModel:
    """From 4 x 4 block means and those of the times around to the grid of `climate`."""
    path = tmp_path_factory.mktemp("models") / "tiny-context.safetensors"
    xgenda.train(climate, task="downscale", factor=4, context=1, steps=2, width=8, name="tiny-context", out=path, progress=False)
    return xgenda.load_model(path)


@pytest.fixture(scope="session")
def _europe() -> tuple[xr.Dataset, xr.Dataset]:
    return xgenda.tutorial.open_dataset("europe-t2m-forecast"), xgenda.tutorial.open_dataset("europe-synop")


@pytest.fixture
def europe(_europe: tuple[xr.Dataset, xr.Dataset]) -> tuple[xr.Dataset, xr.Dataset]:
    """A forecast of 2 m temperature on a coarse grid over Europe, and the stations of the same hour."""
    background, stations = _europe
    return background.isel(latitude=slice(None, None, 8), longitude=slice(None, None, 8)).copy(deep=True), stations[["t2m"]].copy(
        deep=True
    )


@pytest.fixture
def background() -> xr.Dataset:
    """Temperature at two times on 6 x 8 cells around Greenwich, in any case a few kelvin around 280 K."""
    latitude, longitude = np.linspace(40.0, 50.0, 6), np.linspace(-6.0, 15.0, 8)
    wave = np.sin(np.radians(10 * latitude))[:, None] + np.cos(np.radians(12 * longitude))
    values = 280.0 + np.stack([3 * wave, -2 * wave]).astype("float32")
    return xr.Dataset(
        {"t2m": (("time", "latitude", "longitude"), values, {"standard_name": "air_temperature", "units": "K", "long_name": "temperature"})},
        coords={
            "time": ("time", pd.to_datetime(["2018-11-20T00", "2018-11-20T12"]), {"standard_name": "time"}),
            "latitude": ("latitude", latitude, {"standard_name": "latitude", "units": "degrees_north"}),
            "longitude": ("longitude", longitude, {"standard_name": "longitude", "units": "degrees_east"}),
        },
        attrs={"title": "a test", "history": "2018-11-20: made"},
    )  # fmt: skip


@pytest.fixture
def stations() -> pd.DataFrame:
    """Six observations within the grid of `background`, three at each of its times."""
    return pd.DataFrame(
        {
            "time": pd.to_datetime(["2018-11-20T00"] * 3 + ["2018-11-20T12"] * 3),
            "latitude": [41.0, 44.4, 49.0, 42.5, 46.0, 48.7],
            "longitude": [-5.0, 3.3, 14.0, 10.0, 0.5, -2.2],
            "t2m": [281.0, 283.0, 279.5, 278.0, 281.5, 280.0],
            "t2m_error": [1.0, 0.5, 0.8, 1.2, 0.7, 1.0],
        }
    )


@pytest.fixture
def prior(background: xr.Dataset) -> GenerativeModel:
    """Exponential covariance around the background, for any grid."""
    return xgenda.gaussian_prior(background, length_scale=500e3, std=2.0)

"""The engine: same numbers for every way of laying out the work, nothing computed before it is asked for, all members honest."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from model_kinds import KINDS, Kind

import xgenda
from xgenda.diffusion.guidance import GUIDANCES
from xgenda.errors import ChunkingError, StateError
from xgenda.models.generative import GenerativeModel

#: Rounding of batched kernels, in units of the standard deviation of the field.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def fields(climate: xr.Dataset) -> xr.Dataset:
    return climate.isel(time=slice(0, 6))


@pytest.fixture(scope="module")
def obs(fields: xr.Dataset) -> xr.Dataset:
    """Eight noisy points a year, and none in the fourth year."""
    rng = np.random.default_rng(0)
    years = np.delete(np.arange(6), 3)
    rows, columns = rng.integers(0, 8, 8), rng.integers(0, 12, 8)
    values = fields.air_temperature.values[years][:, rows, columns] + 0.5 * rng.standard_normal((5, 8))
    return xr.Dataset(
        {"air_temperature": ("obs", values.ravel(), {"units": "K"})},
        coords={
            "latitude": ("obs", np.tile(fields.latitude.values[rows], 5)),
            "longitude": ("obs", np.tile(fields.longitude.values[columns], 5)),
            "time": ("obs", np.repeat(fields.time.values[years], 8)),
        },
    )


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def method(request: pytest.FixtureRequest, kind: Kind, obs: xr.Dataset):  # type: ignore[no-untyped-def]
    """A function of a Dataset on the fine grid, for every route through the engine."""
    call = kind.call(request)

    def run(ds: xr.Dataset, observations: xr.Dataset = obs, **options: object) -> xr.Dataset:
        return call(kind.given(ds), observations, **options)

    return run


def close(a: xr.Dataset, b: xr.Dataset, fields: xr.Dataset) -> bool:
    """Compare to 1e-5 of the standard deviation, or two units in the last place of single precision at 290 K if that is more."""
    difference = np.abs(a.air_temperature.values.astype(float) - b.air_temperature.values).max()
    return bool(difference <= max(ROUNDING * float(fields.air_temperature.std()), 6.2e-5))


@pytest.mark.slow
def test_layout_of_the_work_changes_nothing(kind: Kind, method, fields: xr.Dataset, obs: xr.Dataset) -> None:  # type: ignore[no-untyped-def]
    reference = method(fields)
    assert reference.air_temperature.dims == ("member", "time", "latitude", "longitude")
    for size in (1, 4, -1) if kind.sees != "all" else (-1,):
        lazy = method(fields.chunk(time=size))
        assert lazy.air_temperature.chunks is not None
        assert lazy.air_temperature.dtype == lazy.compute().air_temperature.dtype == reference.air_temperature.dtype
        assert close(lazy.compute(), reference, fields), f"chunks of {size}"
    for members in (1, 7):
        found = method(fields, members=members).isel(member=slice(0, 4))
        assert close(found, reference.isel(member=slice(0, members)), fields), f"{members} members"
    if kind.sees == "own":
        assert close(method(fields.isel(time=[5, 2])), reference.isel(time=[5, 2]), fields), "some of the times, in another order"
    if kind.sees == "around":
        assert close(method(fields.isel(time=slice(None, None, -1))), reference.isel(time=slice(None, None, -1)), fields), (
            "backwards"
        )
        inside = method(fields.isel(time=slice(1, 6))).isel(time=slice(1, 4))
        assert close(inside, reference.isel(time=slice(2, 5)), fields), "without what is out of sight"
    if kind.batches:
        for size in (1, 8):
            assert close(method(fields, batch_size=size), reference, fields), f"batches of {size}"
    order = np.random.default_rng(1).permutation(obs.sizes["obs"])
    assert np.array_equal(method(fields, obs.isel(obs=order)).air_temperature, reference.air_temperature), (
        "observation rows permuted"
    )


def test_nothing_is_computed_before_it_is_asked_for(kind: Kind, method, fields: xr.Dataset, no_compute: None) -> None:  # type: ignore[no-untyped-def]
    if kind.sees == "all":
        with pytest.raises(ChunkingError, match=r"split along 'time' into 6 chunks.*Type: ds.chunk\(time=-1\)"):
            method(fields.chunk(time=1))
    lazy = method(fields.chunk(time=-1 if kind.sees == "all" else 1))
    assert lazy.air_temperature.chunks is not None
    assert lazy.air_temperature.shape == (4, 6, 8, 12)


def test_members_differ_and_the_seed_decides(kind: Kind, method, fields: xr.Dataset) -> None:  # type: ignore[no-untyped-def]
    few = fields.isel(time=slice(0, 3 if kind.sees == "all" else 2))
    one = method(few)
    values = one.air_temperature.values
    assert np.ptp(values, axis=0).min() > 0
    assert not np.allclose(values[:, 0] - values[:, 0].mean(0), values[:, 1] - values[:, 1].mean(0), atol=1e-3)
    assert np.array_equal(method(few).air_temperature, values)
    lazy = method(few.chunk(time=-1 if kind.sees == "all" else 1), members=2)
    assert close(lazy.compute(), one.isel(member=slice(0, 2)), fields)
    assert not np.allclose(method(few, seed=4).air_temperature, values, atol=1e-3)
    drawn = method(few, seed=None)
    again = method(few, seed=drawn.attrs["xgenda_seed"])
    assert np.array_equal(again.air_temperature, drawn.air_temperature)


def test_orientation_and_units_change_nothing(method, fields: xr.Dataset) -> None:  # type: ignore[no-untyped-def]
    reference = method(fields)
    flipped = fields.isel(latitude=slice(None, None, -1)).transpose("longitude", "time", "latitude", ...)
    flipped = flipped.assign_coords(longitude=((flipped.longitude + 180) % 360 - 180).assign_attrs(fields.longitude.attrs))
    found = method(flipped)
    assert float(found.latitude[0]) > float(found.latitude[-1])
    assert float(found.longitude[0]) < 0
    straight = found.transpose(*reference.air_temperature.dims, ...).sortby("latitude")
    assert close(straight, reference, fields)
    celsius = fields.copy()
    celsius["air_temperature"] = (fields.air_temperature - 273.15).assign_attrs(fields.air_temperature.attrs, units="degC")
    cold = method(celsius)
    assert cold.air_temperature.attrs["units"] == "degC"
    kelvin = cold.assign(air_temperature=cold.air_temperature + 273.15)
    assert np.abs(kelvin.air_temperature.values - reference.air_temperature.values).max() < 2e-4


@pytest.mark.slow
def test_same_bits_for_every_scheduler_and_worker_count(
    request: pytest.FixtureRequest, fields: xr.Dataset, obs: xr.Dataset
) -> None:
    """Of all kinds, one after the other in the same processes."""
    import dask
    from distributed import Client, LocalCluster

    lazy = {}
    kinds = {n: k for n, k in KINDS.items() if n not in ("mmps", "sda")}  # which go the way of 'anchor'
    for name, kind in kinds.items():
        given = kind.given(fields.isel(time=slice(0, 3))).chunk(time=-1 if kind.sees == "all" else 2)
        # without the check, for which every process would draw from the priors of latent vectors again
        options = {} if kind.downscales else {"background_check": None}
        lazy[name] = kind.call(request)(given, obs, members=2, **options).air_temperature
    (serial,) = dask.compute(lazy, scheduler="synchronous")
    (threads,) = dask.compute(lazy, scheduler="threads", num_workers=2)
    found = {"threads": threads}
    for workers in (1, 2):
        with (
            LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None, processes=True) as cluster,
            Client(cluster),
        ):
            (found[f"{workers} workers"],) = dask.compute(lazy)
    for where, values in found.items():
        for name in kinds:
            assert values[name].identical(serial[name]), f"{name}, {where}"


def test_ten_thousand_times_are_set_up_without_computing(tiny_prior: GenerativeModel, no_compute: None) -> None:
    import dask.array as da

    grid = tiny_prior.spec.grid
    assert grid is not None
    times = pd.date_range("2000-01-01", periods=10_000, freq="6h")
    ds = xr.Dataset(
        {
            "air_temperature": (
                ("time", "latitude", "longitude"),
                da.zeros((10_000, *grid.shape), chunks=(1, -1, -1), dtype="f4"),
                {"units": "K"},
            )
        },
        coords={"time": times, "latitude": grid.latitude, "longitude": grid.longitude},
    )
    rng = np.random.default_rng(0)
    table = xr.Dataset(
        {"air_temperature": ("obs", rng.normal(280, 1, 20_000))},
        coords={
            "latitude": ("obs", rng.uniform(grid.latitude[0], grid.latitude[-1], 20_000)),
            "longitude": ("obs", rng.uniform(grid.longitude[0], grid.longitude[-1], 20_000)),
            "time": ("obs", np.repeat(times.values, 2)),
        },
    )
    analysis = ds.genda.assimilate(table, model=tiny_prior, error=0.5, members=16, seed=0)
    assert analysis.air_temperature.data.chunksize == (16, 1, *grid.shape)
    assert dict(analysis.sizes) == {"member": 16, "time": 10_000, "latitude": grid.shape[0], "longitude": grid.shape[1]}


def test_a_task_carries_a_handle_and_not_the_weights(tiny_prior: GenerativeModel) -> None:
    import cloudpickle  # noqa: TID251  (dask sends objects so)

    from xgenda.devices import handle_of

    handle = handle_of(tiny_prior)
    assert handle.model is None
    assert len(cloudpickle.dumps(handle)) < 1000
    assert handle.load() is handle.load()


def test_a_file_that_changed_after_set_up_is_refused(tiny_prior: GenerativeModel, fields: xr.Dataset, tmp_path) -> None:  # type: ignore[no-untyped-def]
    shutil.copy(tiny_prior.path, tmp_path / "copy.safetensors")  # type: ignore[arg-type]
    copy = xgenda.load_model(tmp_path / "copy.safetensors")
    with pytest.warns(UserWarning, match="No observation can be used"):
        lazy = fields.chunk(time=3).genda.assimilate(None, model=copy, members=2, seed=0, steps=4)
    with open(tmp_path / "copy.safetensors", "ab") as file:
        file.write(b" ")
    with pytest.raises(xgenda.errors.ChecksumError, match="has changed since"):
        lazy.compute(scheduler="synchronous")


def test_no_observation_gives_the_prior(tiny_prior: GenerativeModel, fields: xr.Dataset, obs: xr.Dataset) -> None:
    with pytest.warns(UserWarning, match="No observation can be used"):
        prior = fields.genda.assimilate(None, model=tiny_prior, members=3, seed=1, steps=4)
    partly = fields.genda.assimilate(obs, model=tiny_prior, error=0.5, members=3, seed=1, steps=4)
    # the fourth year has no observation: the same member as without any
    assert np.abs(partly.air_temperature[:, 3] - prior.air_temperature[:, 3]).max() < 1e-3
    assert np.abs(partly.air_temperature[:, 2] - prior.air_temperature[:, 2]).max() > 0.1


def test_counts_add_up_and_the_bad_observation_has_no_influence(
    background: xr.Dataset, stations: pd.DataFrame, prior: GenerativeModel
) -> None:
    clean = background.genda.assimilate(stations, model=prior, members=4, seed=0)
    wild = stations.iloc[[0]].assign(t2m=340.0, latitude=44.0, longitude=3.0)
    outside = stations.iloc[[1]].assign(latitude=80.0)
    late = stations.iloc[[2]].assign(time=pd.Timestamp("2018-11-22"))
    dirty = pd.concat([stations, wild, outside, late], ignore_index=True)
    found = background.genda.assimilate(dirty, model=prior, members=4, seed=0)
    counts = json.loads(found.attrs["xgenda_observation_counts"])
    assert counts == {"used": 6, "domain": 1, "window": 1, "background": 1}
    assert np.array_equal(found.t2m, clean.t2m)
    departures = xgenda.innovations(background, dirty, model=prior)
    assert json.loads(departures.attrs["counts"]) == counts
    assert departures.sizes["obs"] == len(dirty)
    assert departures.quality_code.values.tolist() == [0] * 6 + [6, 4, 5]


def test_chunked_and_eager_innovations_agree(background: xr.Dataset, stations: pd.DataFrame, prior: GenerativeModel) -> None:
    eager = xgenda.innovations(background, stations, model=prior)
    assert xgenda.innovations(background.chunk(time=1), stations, model=prior).identical(eager)
    by_hand = background.t2m.interp(
        time=stations.time.to_xarray(), latitude=stations.latitude.to_xarray(), longitude=stations.longitude.to_xarray()
    )
    np.testing.assert_allclose(eager.background, by_hand.values, atol=1e-3)
    np.testing.assert_allclose(eager.innovation, stations.t2m - by_hand.values, atol=1e-3)


def test_analysis_fits_the_observations_better_than_the_background(europe: tuple[xr.Dataset, xr.Dataset]) -> None:
    background, stations = europe
    prior = xgenda.gaussian_prior(background, length_scale=300e3, std=2.0)
    analysis = background.genda.assimilate(stations, model=prior, error=1.75, members=8, seed=0)
    before = xgenda.innovations(background, stations, model=prior, error=1.75)
    after = xgenda.innovations(analysis.mean("member", keep_attrs=True), stations, model=prior, error=1.75)
    used = before.quality_code == 0
    assert float(after.innovation.where(used).std()) < 0.8 * float(before.innovation.where(used).std())


def test_downscaled_members_conserve_their_input(tiny_downscaler: GenerativeModel, fields: xr.Dataset) -> None:
    coarse = fields.coarsen(latitude=4, longitude=4).mean()
    fine = coarse.genda.downscale(model=tiny_downscaler, members=3, seed=0, steps=4)
    again = fine.air_temperature.coarsen(latitude=4, longitude=4).mean()
    assert np.abs(again.values - coarse.air_temperature.values).max() < 2e-4
    np.testing.assert_allclose(fine.latitude, fields.latitude)
    np.testing.assert_allclose(fine.longitude, fields.longitude)


@pytest.mark.gpu
def test_gpu_gives_the_same_members(tiny_prior: GenerativeModel, fields: xr.Dataset, obs: xr.Dataset) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    a, b = (
        fields.genda.assimilate(obs, model=tiny_prior, error=0.5, members=2, seed=0, steps=4, device=d) for d in ("cpu", "cuda")
    )
    assert np.abs(a.air_temperature - b.air_temperature).max() < 1e-2


@pytest.fixture(scope="module")
def uneven(fields: xr.Dataset) -> xr.Dataset:
    """Three observations at the first time, twelve at the second, none at the third, each with its own error, some seventy times another."""
    rng = np.random.default_rng(2)
    time = np.repeat([0, 1], [3, 12])
    rows, columns = rng.integers(0, 8, 15), rng.integers(0, 12, 15)
    error = rng.uniform(0.02, 1.5, 15)
    values = fields.air_temperature.values[time, rows, columns] + error * rng.standard_normal(15)
    return xr.Dataset(
        {"air_temperature": ("obs", values, {"units": "K"}), "air_temperature_error": ("obs", error)},
        coords={
            "latitude": ("obs", fields.latitude.values[rows]),
            "longitude": ("obs", fields.longitude.values[columns]),
            "time": ("obs", fields.time.values[time]),
        },
    )


@pytest.mark.parametrize("likelihood", ["gaussian", "huber"])
@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.slow
def test_no_guidance_lets_times_with_unequal_observations_touch(
    tiny_prior: GenerativeModel, fields: xr.Dataset, uneven: xr.Dataset, guidance: str, likelihood: str
) -> None:
    options = {"model": tiny_prior, "members": 3, "seed": 1, "steps": 5, "guidance": guidance, "likelihood": likelihood}
    if guidance in ("pigdm", "diffpir", "sda", "w2c", "dps"):
        uneven = uneven.assign(air_temperature_error=uneven.air_temperature_error + 1.0)  # with five levels they may diverge
    three = fields.isel(time=slice(0, 3))
    together = xgenda.assimilate(three, uneven, batch_size=16, **options)
    assert close(xgenda.assimilate(three, uneven, batch_size=1, **options), together, fields)
    assert close(xgenda.assimilate(three.isel(time=[0]), uneven, **options), together.isel(time=[0]), fields)


@pytest.mark.parametrize("error", [1.0, 0.1, 0.02, 0.005])
@pytest.mark.slow
def test_spread_is_right_however_precise_the_observations(climate: xr.Dataset, fields: xr.Dataset, error: float) -> None:
    """With the default settings; the correction of this model is zero, so that the posterior is known."""
    model = xgenda.train(climate, steps=1, learning_rate=1e-30, width=8, anchor="eof", progress=False)
    std = float(model.spec.scaling.std.mean())
    place = {"latitude": [float(fields.latitude[3])] * 2, "longitude": [float(fields.longitude[k]) for k in (4, 5)]}
    obs = xr.Dataset(
        {"air_temperature": ("obs", fields.air_temperature.values[0, 3, 4:6], {"units": "K"})},
        coords={k: ("obs", v) for k, v in place.items()} | {"time": ("obs", fields.time.values[[0, 0]])},
    )
    result = xgenda.assimilate(
        fields.isel(time=[0]), obs, model=model, error=error * std, members=300, seed=0, batch_size=300, progress=False
    )
    found = result.air_temperature.values[:, 0, 3, 4:6].var(0, ddof=1)
    cells = torch.tensor([3 * 12 + 4, 3 * 12 + 5])
    prior = model.covariance.block(cells, cells) * std**2
    exact = (torch.linalg.inv(torch.linalg.inv(prior) + torch.eye(2) / (error * std) ** 2)).diagonal().numpy()
    assert found / exact == pytest.approx(np.ones(2), abs=0.28)  # 3.4 standard errors of 300 draws


def test_a_state_that_is_none_is_refused(tiny_prior: GenerativeModel, fields: xr.Dataset, obs: xr.Dataset) -> None:
    wild = obs.assign(air_temperature=349.0 + 0 * obs.air_temperature)
    with pytest.raises(
        StateError,
        match="has diverged after step .* Use more steps; in assimilation also guidance='anchor' where the model has a Gaussian, or larger",
    ):
        xgenda.assimilate(fields, wild, model=tiny_prior, error=0.5, members=2, seed=0, steps=4, background_check=None)

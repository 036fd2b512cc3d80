"""Diffusion priors between their cells: against the Gaussian process, through the public verbs, and as band-limited functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.covariances import KernelCovariance, SphereKernel
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.kernels import Kernel
from xgenda.diffusion.kriging import ExtendedKernel, Kriged
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.random_fields import PlaneField, TorusField
from xgenda.errors import GridError, OptionError
from xgenda.models.diffusive import DiffusionModel
from xgenda.models.generative import PointEvidence
from xgenda.models.places import Between, Places, between_cells, given_cells

N = 16
FAST: dict[str, Any] = {"progress": False, "device": "cpu", "steps": 10}


def box(values: np.ndarray) -> xr.Dataset:
    n = values.shape[-1]
    return xr.Dataset(
        {"a": (("time", "latitude", "longitude"), values, {"units": "m"})},
        coords={
            "time": np.datetime64("2020-01-01", "ns") + np.arange(len(values)) * np.timedelta64(1, "D"),
            "latitude": -0.8 + 1.6 / n * np.arange(n), "longitude": 1.6 / n * np.arange(n),
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def fine() -> xr.Dataset:
    """Rough fields on 64 x 64 points: exponential correlations over 40 km, two cells of a coarse grid of 16 x 16."""
    step = 1.6 / (4 * N) * np.pi / 180 * 6_371_229.0
    drawn = PlaneField((4 * N, 4 * N), Kernel("exponential", 40e3 / step)).draw(NoiseStream([(0, "t", k) for k in range(24)]))
    return box(3 + 2 * drawn.numpy())


@pytest.fixture(scope="module")
def model(fine: xr.Dataset) -> DiffusionModel:
    found = xgenda.train(fine.isel(latitude=slice(0, None, 4), longitude=slice(0, None, 4)), width=8, **FAST)
    assert isinstance(found, DiffusionModel)
    return found


@pytest.fixture(scope="module")
def pointwise(model: DiffusionModel, fine: xr.Dataset) -> DiffusionModel:
    return model.between_cells(fine)


def gaussian() -> tuple[SphereKernel, Places, PointEvidence, torch.Tensor]:
    """Return a kernel on 5 x 6 cells, seven observed places and three others, two variables, and what is expected everywhere."""
    rng = np.random.default_rng(0)
    kernel = SphereKernel(torch.linspace(40, 44, 5), torch.linspace(0, 5, 6), "matern32", 200e3)
    latitude, longitude = torch.as_tensor(rng.uniform(40.1, 43.9, 10)), torch.as_tensor(rng.uniform(0.1, 4.9, 10))
    indices = torch.zeros(10, 3, dtype=torch.long), torch.zeros(10, 3)
    places = Places(latitude, longitude, 7, indices[0], indices[1].expand(2, -1, -1))
    width = 40
    # single values, a sum of two channels, and one at a cell
    index = torch.tensor([[30, 0], [31, 0], [32, 72], [73, 0], [74, 0], [75, 0], [76, 0], [4, 0], [width + 5, 0]])
    weight = torch.tensor([[1.0, 0.0]] * 9, dtype=torch.float64)
    weight[2] = torch.tensor([0.6, 0.4])
    value = torch.as_tensor(rng.normal(2, 2, 9))
    variance = torch.as_tensor(rng.uniform(0.05, 0.5, 9))
    mean = torch.as_tensor(rng.normal(0, 1, (2, width)))
    return kernel, places, PointEvidence(index, weight, value, variance, places=places), mean


def test_with_a_gaussian_prior_of_the_cells_it_is_the_gaussian_process() -> None:
    kernel, places, evidence, mean = gaussian()
    std = torch.tensor([1.5, 0.7], dtype=torch.float64)
    extended = ExtendedKernel(kernel, places.latitude, places.longitude, 7)
    whole = KernelCovariance([extended, extended], std[:, None].expand(-1, 40))
    exact = GaussianPosterior(whole, evidence.indices, evidence.weights, evidence.variance)
    kriged = Kriged(kernel, places.latitude, places.longitude)
    between = [Between(kriged.rows, s * kriged.root) for s in std]
    of_cells = given_cells(evidence, between, mean)
    assert of_cells.places is None
    assert int(of_cells.indices.max()) < 60
    cells = KernelCovariance([kernel, kernel], std[:, None].expand(-1, 30))
    found = GaussianPosterior(cells, of_cells.indices, of_cells.weights, of_cells.variance)
    wanted = exact.mean(mean.flatten(), evidence.value).reshape(2, 40)
    own = mean[:, :30].flatten()
    torch.testing.assert_close(found.mean(own, of_cells.value).reshape(2, 30), wanted[:, :30], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.variance().reshape(2, 30), exact.variance().reshape(2, 40)[:, :30], rtol=0, atol=1e-6)
    count = 6000
    keys = [(0, "t", k) for k in range(count)]
    drawn = found.draw(own, of_cells.value, NoiseStream(keys)).reshape(count, 2, 30)
    members = between_cells(evidence, between, mean, drawn, keys)
    assert torch.equal(members[..., :30], drawn)
    covariance = exact.dense_covariance()
    z = (members.flatten(1).mean(0) - wanted.flatten()) / (covariance.diagonal() / count).sqrt()
    assert z.abs().max() < 4.5
    sampled = torch.cov(members.flatten(1).T)
    scale = covariance.diagonal().outer(covariance.diagonal())
    assert ((sampled - covariance) / ((covariance**2 + scale) / count).sqrt()).abs().max() < 5


def test_what_is_observed_at_cells_alone_is_left_as_it_is() -> None:
    kernel, places, evidence, mean = gaussian()
    kriged = Kriged(kernel, places.latitude, places.longitude)
    elsewhere = Places(places.latitude, places.longitude, 0, places.indices, places.weights)
    alone = PointEvidence(evidence.indices[7:], evidence.weights[7:], evidence.value[7:], evidence.variance[7:], places=elsewhere)
    found = given_cells(alone, [Between(kriged.rows, kriged.root)] * 2, mean)
    assert found.indices[:, 0].tolist() == [4, 35]
    assert found.value is alone.value
    assert found.variance is alone.variance


def test_the_kernel_is_found_from_a_finer_grid(pointwise: DiffusionModel) -> None:
    between = pointwise.spec.options["between"]
    assert between["covariance"] == "exponential"
    # near a point the structure function of the truth is 2 * 2^2 / 40 km
    assert 2 * between["std"]["a"] ** 2 / between["length_scale"]["a"] == pytest.approx(2 * 4 / 40e3, rel=0.15)


def scattered(fine: xr.Dataset, count: int) -> tuple[xr.Dataset, xr.Dataset]:
    """Return observations and withheld places among the points of the finer grid."""
    rng = np.random.default_rng(3)
    row, column = (xr.DataArray(rng.integers(0, 61, 2 * count), dims="obs") for _ in range(2))
    picked = fine.isel(time=-1, latitude=row, longitude=column).reset_coords(drop=False).set_coords(["latitude", "longitude"])
    picked = picked.drop_vars("time")
    return picked.isel(obs=slice(0, count)), picked.isel(obs=slice(count, None))


def test_members_through_the_public_verbs(pointwise: DiffusionModel, fine: xr.Dataset, tmp_path: Path) -> None:
    states = fine.isel(time=[-1], latitude=slice(0, None, 4), longitude=slice(0, None, 4))
    obs, withheld = scattered(fine, 100)
    call: dict[str, Any] = {"error": 0.1, "members": 4, "steps": 5, "seed": 0, "progress": False}
    grid = xgenda.assimilate(states, obs, model=pointwise, **call)
    there = xgenda.assimilate(states, obs, model=pointwise, at=withheld, **call)
    assert there.a.dims == ("member", "time", "obs")
    lazy = xgenda.assimilate(states.chunk(time=1), obs, model=pointwise, at=withheld, **call)
    np.testing.assert_allclose(lazy.a, there.a, atol=1e-5)
    order = np.random.default_rng(0).permutation(100)
    mixed = xr.Dataset(
        coords={
            "latitude": ("obs", np.r_[withheld.latitude, states.latitude[4]]),
            "longitude": ("obs", np.r_[withheld.longitude, states.longitude[7]]),
        }
    )
    again = xgenda.assimilate(states, obs.isel(obs=order), model=pointwise, at=mixed, **call)
    np.testing.assert_allclose(again.a[..., :-1], there.a, atol=1e-5)
    np.testing.assert_allclose(again.a[..., -1], grid.a[..., 4, 7], atol=1e-5)
    pointwise.save(tmp_path / "model.safetensors")
    loaded = xgenda.load_model(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(xgenda.assimilate(states, obs, model=loaded, at=withheld, **call).a, there.a)


def test_at_grid_points_it_is_the_gridded_route(model: DiffusionModel, pointwise: DiffusionModel, fine: xr.Dataset) -> None:
    states = fine.isel(time=[-1], latitude=slice(0, None, 4), longitude=slice(0, None, 4))
    obs = states.isel(latitude=[2, 5, 11], longitude=[3, 8, 14]) + 0.3
    call: dict[str, Any] = {"error": 0.2, "members": 2, "steps": 6, "seed": 0, "progress": False}
    one, other = (xgenda.assimilate(states, obs, model=m, **call) for m in (model, pointwise))
    np.testing.assert_array_equal(one.a, other.a)


def test_what_does_not_go_together_is_refused(model: DiffusionModel, pointwise: DiffusionModel, fine: xr.Dataset) -> None:
    states = fine.isel(time=[-1], latitude=slice(0, None, 4), longitude=slice(0, None, 4))
    obs, _ = scattered(fine, 5)
    with pytest.raises(OptionError, match="needs a covariance"):
        model.between_cells()
    with pytest.raises(OptionError, match="takes covariance, length_scale and std together"):
        model.between_cells(covariance="exponential", std=1.0)
    with pytest.raises(OptionError, match="takes fine, or covariance"):
        model.between_cells(fine, std=1.0)
    with pytest.raises(OptionError, match="length_scale=-1 is not accepted"):
        model.between_cells(covariance="exponential", length_scale=-1, std=1.0)
    with pytest.raises(OptionError, match="covariance='linear'"):
        model.between_cells(covariance="linear", length_scale=1e5, std=1.0)
    with pytest.raises(GridError, match="places between its cells"):
        model.between_cells(states)
    for option in ({"likelihood": "student-t"}, {"guidance": "inpaint"}):
        with pytest.raises(OptionError, match="needs likelihood='gaussian'"):
            xgenda.assimilate(states, obs, model=pointwise, error=0.1, progress=False, **option)  # type: ignore[arg-type]
    many = xr.Dataset(coords={"latitude": np.linspace(-0.7, 0.6, 90), "longitude": np.linspace(0.1, 1.4, 90)})
    with pytest.raises(OptionError, match="are more than"):
        xgenda.assimilate(states.chunk(), obs, model=pointwise, error=0.1, at=many)
    given = model.between_cells(covariance="exponential", length_scale=40e3, std=2.0)
    assert given.spec.options["between"] == {"covariance": "exponential", "length_scale": {"a": 40e3}, "std": {"a": 2.0}}
    assert len({model.sha256, given.sha256, pointwise.sha256}) == 3


def test_band_limited_functions_are_known_everywhere() -> None:
    """The same seed is the same function on the grid, on a finer grid, and at any place."""
    field = TorusField((16, 12), Kernel("matern32", 0.2), size=(16 / 12, 1.0), std=2.0, cutoff=7)
    keys = [(0, "t", k) for k in range(4)]
    coarse, finer = (f.draw(NoiseStream(keys)) for f in (field, field.on((64, 48))))
    row, column = torch.meshgrid(torch.arange(64) / 4, torch.arange(48) / 4, indexing="ij")
    found = coarse.flatten(1) @ field.rows(row.flatten(), column.flatten()).T
    torch.testing.assert_close(found.reshape(finer.shape), finer, rtol=0, atol=1e-10)
    # their covariance is that of the grid's cells, as exactly
    some = torch.tensor([0, 101, 777, 1300, 3000])
    rows = field.rows(row.flatten()[some], column.flatten()[some])
    cells = torch.arange(192)
    implied = rows @ field.block(cells[:, None], cells) @ rows.T
    torch.testing.assert_close(implied, field.on((64, 48)).block(some[:, None], some), rtol=0, atol=1e-10)
    around = field.rows(torch.tensor([3.5, 19.5, -12.5]), torch.tensor([1.0, 13.0, 1.0]))  # the box wraps
    torch.testing.assert_close(around, around[:1].expand(3, -1), rtol=0, atol=1e-12)
    with pytest.raises(OptionError, match="cutoff"):
        TorusField((16, 16), Kernel("matern32", 0.2)).rows(row[0], column[0])
    with pytest.raises(OptionError, match="cutoff"):
        field.on((8, 6)).rows(row[0], column[0])


def test_a_neural_operator_is_evaluated_by_its_waves() -> None:
    """With noise that has a cutoff members are band-limited functions; at any place they are the sum of their waves."""
    torus = TorusField((N, N), Kernel("gaussian", 0.12), cutoff=6)
    fields = box(3 + 2 * torus.draw(NoiseStream([(0, "t", k) for k in range(32)])).numpy())
    noise = {"kind": "exponential", "length": 0.1, "cutoff": 6}
    options = {"periodic": "both", "architecture": "uno", "width": 8, "network_options": {"modes": 4, "rank": 4}, "noise": noise}
    trained = xgenda.train(fields, **options, **FAST)
    assert isinstance(trained, DiffusionModel)
    pointwise = trained.between_cells()
    assert pointwise.spec.options["between"] == {"covariance": "waves"}
    states = fields.isel(time=[3])
    truth = torus.on((4 * N, 4 * N)).draw(NoiseStream([(0, "t", 3)]))[0] * 2 + 3
    finer = box(truth[None].numpy()).isel(time=0, drop=True)
    obs = finer.isel(latitude=xr.DataArray([3, 21, 37, 50], dims="obs"), longitude=xr.DataArray([5, 30, 14, 43], dims="obs"))
    call: dict[str, Any] = {"error": 0.1, "members": 2, "steps": 6, "seed": 0, "progress": False}
    grid = xgenda.assimilate(states, obs, model=pointwise, **call)
    inside = finer.isel(latitude=slice(0, 21), longitude=slice(0, 21))
    there = xgenda.assimilate(states, obs, model=pointwise, at=inside.drop_vars("a"), **call)
    assert there.a.shape == (2, 1, 21, 21)
    np.testing.assert_allclose(there.a[..., ::4, ::4], grid.a[..., :6, :6], atol=1e-5)
    spectrum = np.fft.rfft2(grid.a.values - 3, norm="forward")
    k = np.fft.fftfreq(N) * N
    at = np.arange(21) / 4
    phase = np.exp(2j * np.pi * at[:, None] * k / N)
    whole = np.fft.fft2(grid.a.values - 3, norm="forward")
    expected = 3 + np.einsum("yk,...kl,xl->...yx", phase, whole, phase).real
    np.testing.assert_allclose(there.a, expected, atol=2e-3)
    assert np.abs(spectrum[..., 7:10, :]).max() < 1e-4
    near = xgenda.assimilate(states, obs, model=pointwise, at=obs.drop_vars("a"), **call)
    assert float(np.abs(near.a - obs.a).mean()) < 0.5


def test_what_lies_between_cells_of_the_globe(one_thread: None) -> None:
    """Rows at the poles are one place each: they are no neighbours, and the length that is found is that of the fields."""
    latitude, longitude = np.linspace(-90, 90, 13), np.arange(0.0, 360.0, 22.5)
    phi, lam = np.meshgrid(np.radians(latitude), np.radians(longitude), indexing="ij")
    a = np.random.default_rng(0).standard_normal((4, 30, 1, 1))
    waves = a[0] * np.sin(phi) + np.cos(phi) * (a[1] * np.cos(lam) + a[2] * np.sin(2 * lam)) + a[3] * np.sin(3 * phi)
    time = np.datetime64("2000-01-01", "ns") + np.arange(30) * np.timedelta64(1, "D")
    fine = xr.Dataset(
        {"x": (("time", "latitude", "longitude"), waves, {"units": "K"})},
        {"time": time, "latitude": latitude, "longitude": longitude},
    )
    coarse = fine.isel(latitude=slice(None, None, 2), longitude=slice(None, None, 2))
    model: Any = xgenda.train(coarse, steps=1, width=8, anchor="eof", climatology="none", progress=False)
    found = model.between_cells(fine).spec.options["between"]
    assert 1e6 < found["length_scale"]["x"] < 1e8
    assert 0.1 < found["std"]["x"] < 20.0
    with pytest.raises(OptionError, match=r"fine has the ensemble dimension 'member'; give one member: fine.isel\(member=0\)"):
        model.between_cells(fine.expand_dims(member=2))

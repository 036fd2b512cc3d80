"""Observed quantities that are functions of the state: the contract of each, and what they do in an analysis."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import Tensor

import xgenda
from xgenda import engine, operators
from xgenda.curvilinear import CurvilinearGrid, PointSet
from xgenda.errors import GridError, OptionError
from xgenda.grids import EARTH_RADIUS, Grid
from xgenda.maps import LinearMap, block_mean, concatenate, identity
from xgenda.models.generative import GenerativeModel, SamplingOptions
from xgenda.observations.containers import Wanted, first_channels
from xgenda.observations.operators import locate_observations
from xgenda.observations.quality import Quality
from xgenda.operators import LinearOperator, Operator, extended, extended_deviation
from xgenda.preparation import prepare
from xgenda.spherical import great_circle, unit_vectors
from xgenda.weights import footprint_means, interpolation

SHAPE = (6, 7)
ALL = {
    "speed": operators.wind_speed("u", "v"),
    "sine": operators.wind_direction("u", "v", part="sine"),
    "cosine": operators.wind_direction("u", "v", part="cosine"),
    "logarithm": operators.logarithm("u", offset=0.1),
    "function": operators.function(lambda u, v: u * v + u.roll(1, -1), ("u", "v")),
}


REGION = Grid(np.linspace(40.0, 45.0, 6), np.linspace(-4.0, 4.0, 8))
GLOBE = Grid(np.linspace(-84.0, 84.0, 15), -180 + 12.0 * np.arange(30))


@dataclass
class Case:
    """What the contract asks of an operator from states (batch, n) to values (batch, m)."""

    forward: Callable[[np.ndarray], np.ndarray]
    tangent: Callable[[np.ndarray, np.ndarray], np.ndarray]  # at a state, of a change of it
    adjoint: Callable[[np.ndarray, np.ndarray], np.ndarray]  # at a state, of a vector of values
    jacobian: np.ndarray  # at the state that `states` gives
    order: int  # to which the difference of two values vanishes, less what is linear: 1 where nothing is taken off


def states(size: int, batch: int = 3) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1.5, (batch, size))


def function_case(operator: Operator) -> Case:
    def forward(x: Tensor) -> Tensor:
        return operator(*x.reshape(len(x), len(operator.variables), *SHAPE).unbind(1)).flatten(1)

    def tangent(x: np.ndarray, dx: np.ndarray) -> np.ndarray:
        return np.asarray(torch.autograd.functional.jvp(forward, torch.as_tensor(x), torch.as_tensor(dx))[1])

    def adjoint(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return np.asarray(torch.autograd.functional.vjp(forward, torch.as_tensor(x), torch.as_tensor(w))[1])

    size = len(operator.variables) * SHAPE[0] * SHAPE[1]
    jacobian = torch.autograd.functional.jacobian(lambda x: forward(x[None])[0], torch.as_tensor(states(size)[0]))
    return Case(lambda x: forward(torch.as_tensor(x)).numpy(), tangent, adjoint, jacobian.numpy(), 2)


def linear_case(operator: LinearMap) -> Case:
    return Case(operator, lambda x, dx: operator(dx), lambda x, w: operator.adjoint(w), operator.matrix.toarray(), 1)


def tensor_case(make: Callable[[], LinearMap]) -> Case:
    made = make()
    wanted = linear_case(made)
    apply = operators.as_torch(made)

    def forward(x: np.ndarray) -> np.ndarray:
        return apply(torch.as_tensor(x)).numpy()

    def tangent(x: np.ndarray, dx: np.ndarray) -> np.ndarray:
        return np.asarray(torch.autograd.functional.jvp(apply, torch.as_tensor(x), torch.as_tensor(dx))[1])

    def adjoint(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        pulled = torch.func.vjp(apply, torch.as_tensor(x))[1](torch.as_tensor(w))[0].numpy()
        np.testing.assert_allclose(pulled, made.adjoint(w), rtol=1e-12, atol=1e-12)
        return pulled

    return Case(forward, tangent, adjoint, wanted.jacobian, 1)


def observed(operator: LinearOperator, grid: Grid, count: int = 25) -> LinearMap:
    """The map to some places, a few of them outside."""
    rng = np.random.default_rng(1)
    south, north, west, east = grid.latitude[0], grid.latitude[-1], grid.longitude[0], grid.longitude[-1]
    latitude, longitude = rng.uniform(south - 2, north + 2, count), rng.uniform(west - 2, east + 2, count)
    operator.check("seen", grid, ["u"])
    found, inside = operator.rows(grid, latitude, longitude)
    assert found.shape == (count, grid.size)
    assert np.array_equal(found.lengths > 0, inside)
    return found


def dataset(grid: Grid) -> xr.Dataset:
    return xr.Dataset(coords={"latitude": grid.latitude, "longitude": grid.longitude})


def to_coarse(grid: Grid, method: str = "conservative") -> xgenda.Regridder:
    south, north, west, east = grid.latitude[0], grid.latitude[-1], grid.longitude[0], grid.longitude[-1]
    target = Grid(np.arange(south + 0.6, north - 0.5, 1.3), np.arange(west + 0.6, east - 0.5, 1.7))
    return xgenda.Regridder(
        dataset(grid).isel(latitude=slice(None, None, -1)), dataset(target), method=method, regridder="builtin"
    )


def cases() -> dict[str, Callable[[], Case]]:
    out = {n: functools.partial(function_case, o) for n, o in ALL.items()}
    for place, grid in (("region", REGION), ("globe", GLOBE)):
        factor, radius = (2, 150e3) if place == "region" else (3, 2500e3)
        made = {
            "disc": operators.footprint("u", radius=radius),
            "gaussian": operators.footprint("u", radius=radius / 3, shape="gaussian"),
            "small": operators.footprint("u", radius=radius / 5),
            "coarsened": operators.coarsened("u", factor=factor),
            "regridded": operators.regridded("u", to_coarse(grid)),
        }
        maps = {n: functools.partial(observed, o, grid) for n, o in made.items()}
        disc, means = maps["disc"], block_mean(grid, factor)
        maps["composed"] = lambda g=grid, f=factor, m=means: interpolation(
            g.coarsened(f), g.latitude[::2], g.longitude[:15:2][: len(g.latitude[::2])]
        )[0].after(m)
        maps["stacked"] = lambda d=disc, m=means: concatenate([d(), m])
        maps["replaced"] = lambda d=disc, m=means: m.replaced(np.array([3, 0]), d().select(np.array([1, 4])))
        out |= {f"{n} in torch, {place}": functools.partial(tensor_case, maps[n]) for n in ("disc", "coarsened")}
        maps["kept"] = lambda m=means: m.kept(np.arange(m.shape[0]) % 3 == 0)
        out |= {f"{n}, {place}": (lambda made=made: linear_case(made())) for n, made in maps.items()}
    return out


@pytest.mark.parametrize("name", cases())
def test_contract(name: str) -> None:
    """Shape, independence of the batch, adjoint, Taylor slope, NaN: for every operator, linear or not."""
    case = cases()[name]()
    rows, size = case.jacobian.shape
    x, rng = states(size), np.random.default_rng(2)
    out = case.forward(x)
    assert out.shape == (3, rows)
    assert np.abs(case.jacobian).sum() > 0
    np.testing.assert_allclose(case.forward(x[1:2])[0], out[1], rtol=1e-14, atol=1e-14)
    dx, w = rng.normal(size=x.shape), rng.normal(size=out.shape)
    forth, pulled = case.tangent(x, dx), case.adjoint(x, w)
    assert (forth * w).sum() == pytest.approx((dx * pulled).sum(), rel=1e-10)
    np.testing.assert_allclose(forth[0], case.jacobian @ dx[0], rtol=1e-9, atol=1e-12)
    steps = np.array([1e-2, 1e-3, 1e-4])
    left = [np.linalg.norm(case.forward(x + h * dx) - out - (case.order == 2) * h * forth) for h in steps]
    assert np.polyfit(np.log(steps), np.log(left), 1)[0] == pytest.approx(case.order, rel=0.05)
    for cell in rng.choice(size, 10, replace=False):
        holed = x.copy()
        holed[0, cell] = np.nan
        found = np.isnan(case.forward(holed))
        assert np.array_equal(found[0], case.jacobian[:, cell] != 0)
        assert not found[1:].any()


@pytest.mark.parametrize("name", ALL)
def test_functions_pass_their_own_check(name: str) -> None:
    ALL[name].check(name, SHAPE, ["u", "v"])


def test_values_against_closed_forms() -> None:
    u, v = torch.tensor([[3.0, 0.0, -1.0]]).double(), torch.tensor([[-4.0, 0.0, 0.0]]).double()
    assert ALL["speed"](u, v).tolist()[0] == pytest.approx([5.0, 1e-3, 1.0], abs=1e-6)
    # a wind from the north blows to the south; from the east to the west
    assert ALL["sine"](u, v).tolist()[0] == pytest.approx([-0.6, 0.0, 1.0], abs=1e-6)
    assert ALL["cosine"](u, v).tolist()[0] == pytest.approx([0.8, 0.0, 0.0], abs=1e-6)
    assert ALL["logarithm"](torch.tensor([-1.0, 0.9])).tolist() == pytest.approx([np.log(0.1), 0.0], abs=1e-6)


@pytest.mark.parametrize("name", ["speed", "sine", "cosine"])
def test_gradients_are_finite_in_a_calm(name: str) -> None:
    calm = torch.zeros(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ALL[name](calm, calm).sum(), calm)
    assert torch.isfinite(slope).all()


def test_channels_are_extended() -> None:
    state = torch.rand(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    made = extended(state, ((ALL["speed"], (2, 0)), (ALL["logarithm"], (1,))))
    assert made.shape == (2, 5, *SHAPE)
    torch.testing.assert_close(made[:, :3], state)
    torch.testing.assert_close(made[:, 3], ALL["speed"](state[:, 2], state[:, 0]))
    assert extended(state, ()) is state
    deviation = torch.full_like(state, 0.01)
    spread = extended_deviation(state, deviation, ((ALL["speed"], (2, 0)),))
    noise = 0.01 * torch.randn(4000, 2, 3, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    found = ALL["speed"](state[:, 2] + noise[:, :, 2], state[:, 0] + noise[:, :, 0]).std(0)
    windy = state[:, [0, 2]].norm(dim=1) > 0.1
    torch.testing.assert_close(spread[:, 3][windy], found[windy], rtol=0.08, atol=0)
    calm = torch.zeros_like(state)  # the slope is zero there; the root mean square of a speed is not
    around = extended_deviation(calm, 3.0 + calm, ((ALL["speed"], (2, 0)),))[:, 3]
    torch.testing.assert_close(around, torch.full_like(around, 3.0 * 2**0.5), rtol=1e-3, atol=0)


# -- footprints and coarse grids -----------------------------------------------------------------------------------------


def turned(grid: Grid) -> CurvilinearGrid:
    """The same cells, as a curvilinear grid whose rows run along meridians."""
    y, x = np.meshgrid(grid.latitude, grid.longitude, indexing="ij")
    return CurvilinearGrid(y.T, x.T)


FINE = Grid(np.arange(-89.5, 90.0), -180.0 + np.arange(360.0))


@pytest.mark.parametrize("shape", ["disc", "gaussian"])
@pytest.mark.parametrize("kind", ["rectilinear", "curvilinear"])
def test_footprints_of_a_constant_and_of_a_linear_field(shape: str, kind: str) -> None:
    """Over the poles and across the seam too: against the closed form of the mean of a linear field over a cap."""
    grid = FINE if kind == "rectilinear" else turned(FINE)
    latitude, longitude = np.array([0.3, 47.0, 90.0, -89.9, 60.0, 10.0]), np.array([0.2, 11.7, 0.0, 33.0, 180.0, -179.9])
    radius = 600e3 if shape == "disc" else 300e3
    found, inside = footprint_means(grid, latitude, longitude, radius, shape)
    assert inside.all()
    np.testing.assert_allclose(found(np.full(grid.size, 7.0)), 7.0, rtol=1e-12)
    means = found(unit_vectors(*grid.points()).T).T
    # along the axis of a cap the mean of the position is (1 + cos r) / 2; under a Gaussian by quadrature
    r = np.linspace(0, 3 * radius / EARTH_RADIUS, 20001)
    weight = np.sin(r) * np.exp(-0.5 * (r * EARTH_RADIUS / radius) ** 2)
    length = (1 + np.cos(radius / EARTH_RADIUS)) / 2 if shape == "disc" else (weight * np.cos(r)).sum() / weight.sum()
    np.testing.assert_allclose(means, length * unit_vectors(latitude, longitude), atol=3e-3)


def test_a_footprint_holds_the_cells_within_its_radius() -> None:
    """Against a search of all cells, with the areas as weights."""
    latitude, longitude = np.array([44.2, 41.0, 43.1]), np.array([0.1, -3.0, 2.2])
    grid = Grid(np.linspace(39, 46, 36), np.linspace(-5, 5, 41))
    found, inside = operators.footprint("t", radius=60e3).rows(grid, latitude, longitude)
    assert inside.all()
    apart = great_circle(unit_vectors(latitude, longitude)[:, None], unit_vectors(*grid.points())) * EARTH_RADIUS
    expected = np.where(apart <= 60e3, grid.areas().ravel(), 0.0)
    np.testing.assert_allclose(found.matrix.toarray(), expected / expected.sum(1, keepdims=True), rtol=1e-12)
    bell, _ = operators.footprint("t", radius=20e3, shape="gaussian").rows(grid, latitude, longitude)
    expected = expected * np.exp(-0.5 * (apart / 20e3) ** 2)
    np.testing.assert_allclose(bell.matrix.toarray(), expected / expected.sum(1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize("shape", ["disc", "gaussian"])
@pytest.mark.parametrize("kind", ["rectilinear", "curvilinear"])
def test_footprints_over_the_edge(shape: str, kind: str) -> None:
    """Less than half covered is outside; a disc on a straight edge is covered by half."""
    plain = Grid(np.arange(-10.05, 10.06, 0.1), np.arange(-10.05, 10.06, 0.1))  # the last cells end at 10.1
    grid = plain if kind == "rectilinear" else turned(plain)
    longitude = np.array([8.0, 9.9, 10.05, 10.15, 10.3, 13.0, -10.05, -10.15, 0.0])
    for latitude in (np.zeros(9), np.array([0.0] * 8 + [10.3])):
        found, inside = footprint_means(grid, latitude, longitude, 60e3 if shape == "disc" else 25e3, shape)
        expected = [True] * 3 + [False] * 3 + [True, False, not latitude[-1]]
        assert inside.tolist() == expected
        assert np.array_equal(found.lengths > 0, inside)
    _, corner = footprint_means(grid, np.array([10.0, 9.0]), np.array([10.0, 9.0]), 60e3, shape)
    assert corner.tolist() == [False, True] if shape == "disc" else [False, False]


def test_footprints_between_cells_and_nowhere() -> None:
    """Where no centre is near, bilinear interpolation; NaN and impossible latitudes are outside."""
    latitude, longitude = np.array([42.5, np.nan, 42.5, 95.0, 60.0, 39.9]), np.array([0.5, 0.0, np.nan, 0.0, 0.0, 0.0])
    found, inside = footprint_means(REGION, latitude, longitude, 10e3)
    assert inside.tolist() == [True, False, False, False, False, False]
    expected, _ = interpolation(REGION, latitude[:1], longitude[:1])
    np.testing.assert_allclose(found.select(np.array([0])).matrix.toarray(), expected.matrix.toarray())
    assert found.lengths[1:].tolist() == [0] * 5
    with pytest.raises(GridError, match="A footprint needs cells with areas, and the source is 3 points"):
        footprint_means(PointSet(np.zeros(3), np.arange(3.0)), np.zeros(1), np.zeros(1), 1e6)


def test_coarse_and_regridded_fields() -> None:
    """Against xarray's coarsen, and against regridding followed by interpolation."""
    grid = Grid(np.linspace(40.0, 47.0, 8), np.linspace(-4.0, 7.0, 12))
    field = np.random.default_rng(0).normal(size=grid.shape)
    ds = dataset(grid).assign(t=(("latitude", "longitude"), field))
    latitude, longitude = np.array([42.0, 44.9, 40.1]), np.array([0.0, 3.3, 0.0])
    places = {"latitude": xr.DataArray(latitude, dims="obs"), "longitude": xr.DataArray(longitude, dims="obs")}
    found, inside = operators.coarsened("t", factor=2).rows(grid, latitude, longitude)
    assert inside.tolist() == [True, True, False]
    expected = ds.t.coarsen(latitude=2, longitude=2).mean().interp(places)
    np.testing.assert_allclose(found(field.ravel())[:2], expected[:2], rtol=1e-9)
    target = dataset(Grid(np.arange(40.05, 46.9, 0.9), np.arange(-4.2, 7.0, 1.3)))
    for flipped in (ds, ds.isel(latitude=slice(None, None, -1)).transpose("longitude", "latitude")):
        made = xgenda.Regridder(flipped, target, method="conservative", regridder="builtin")
        found, inside = operators.regridded("t", made).rows(grid, latitude, longitude)
        assert inside.tolist() == [True, True, True]
        expected = made(flipped).t.interp(places)
        np.testing.assert_allclose(found(field.ravel()), expected, rtol=1e-9)
    # a target cell that reaches over the edge of the state is no mean
    wide = xgenda.Regridder(
        ds, dataset(Grid(np.arange(38.0, 48.0), np.arange(-6.0, 9.0))), method="conservative", regridder="builtin"
    )
    _, inside = operators.regridded("t", wide).rows(grid, np.array([43.0, 39.6]), np.zeros(2))
    assert inside.tolist() == [True, False]
    copy = turned(grid)
    sideways = xr.Dataset(coords={"lat": (("y", "x"), copy.latitude), "lon": (("y", "x"), copy.longitude)})
    made = xgenda.Regridder(sideways, target, regridder="builtin")
    found, inside = operators.regridded("t", made).rows(copy, np.array([43.0]), np.array([1.0]))
    assert inside.all()
    assert found(copy.latitude.ravel()) == pytest.approx(43.0, abs=1e-6)


# -- on tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bilinear", "conservative", "nearest"])
def test_regridders_on_tensors(method: str) -> None:
    """The same numbers as on a Dataset, whatever the order of its dimensions; NaN where nothing maps."""
    target = dataset(Grid(np.arange(39.0, 46.0, 1.1), np.arange(-6.0, 5.0, 1.3)))
    values = np.random.default_rng(0).normal(size=(2, 5, *REGION.shape))
    ds = dataset(REGION).assign(t=(("time", "level", "latitude", "longitude"), values))
    for source, to in ((ds, target), (ds.isel(latitude=slice(None, None, -1)), target.isel(longitude=slice(None, None, -1)))):
        made = xgenda.Regridder(source, to, method=method, regridder="builtin")
        fields = torch.as_tensor(source.t.transpose("time", "level", *made.source.dims).values.copy())
        found = operators.as_torch(made)(fields.requires_grad_(True))
        expected = made(source).t.transpose("time", "level", *made.target.dims).values
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
        assert np.isnan(expected).any() == (method != "nearest")
        (slope,) = torch.autograd.grad(found.nansum(), fields)
        np.testing.assert_allclose(slope[0, 0].flatten(), made.map.adjoint(np.ones(made.map.shape[0])), rtol=1e-12)
    with pytest.raises(ValueError, match=r"fields have shape \(8, 6\); \(..., 6, 8\) is needed"):
        operators.as_torch(made)(torch.ones(8, 6))
    with pytest.raises(OptionError, match="linear=3 is not accepted; give a LinearMap or a xgenda.Regridder"):
        operators.as_torch(3)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch itself, in forward mode
def test_derivatives_on_tensors() -> None:
    """Both modes, twice, and batched: against those of the dense matrix."""
    made = block_mean(Grid(np.arange(4.0), np.arange(6.0)), 2)
    apply, dense = operators.as_torch(made), torch.as_tensor(made.matrix.toarray())
    x = torch.as_tensor(states(24, 2)).requires_grad_(True)
    assert torch.autograd.gradcheck(apply, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda z: apply(z.square()), x)
    torch.testing.assert_close(torch.func.vmap(apply)(x[:, None])[:, 0], x @ dense.T)
    hessian = torch.func.hessian(lambda z: apply(z).pow(3).sum())(x[0].detach())
    torch.testing.assert_close(hessian, dense.T @ torch.diag(6 * dense @ x[0].detach()) @ dense)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        found = apply(x.detach().to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), (x @ dense.T).detach(), rtol=tolerance, atol=tolerance)
    assert apply(torch.ones(24, dtype=torch.int64)).tolist() == [1.0] * 6
    assert apply(x[:0]).shape == (0, 6)


# -- in an analysis ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def winds() -> xr.Dataset:
    """Sixty days of two smooth components of wind."""
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(np.linspace(0, 1, 8), np.linspace(0, 1, 12), indexing="ij")
    amplitudes = rng.normal(size=(60, 2, 3))
    patterns = np.stack([np.ones_like(y), np.cos(np.pi * y), np.cos(np.pi * x)])
    values = 3 * np.einsum("tck,kyx->tcyx", amplitudes, patterns) + 0.2 * rng.normal(size=(60, 2, 8, 12)) + 4
    coords = {
        "time": np.datetime64("2000-01-01", "ns") + np.arange(60) * np.timedelta64(1, "D"),
        "latitude": np.linspace(40, 47, 8), "longitude": np.linspace(0, 11, 12),
    }  # fmt: skip
    return xr.Dataset(
        {n: (("time", "latitude", "longitude"), values[:, c], {"units": "m s-1"}) for c, n in enumerate("uv")}, coords=coords
    )


@pytest.fixture(scope="module")
def model(winds: xr.Dataset) -> GenerativeModel:
    return xgenda.train(winds, steps=5, width=8, anchor="eof", progress=False)


def speeds(winds: xr.Dataset, times: list[int], units: float = 1.0) -> pd.DataFrame:
    parts = []
    for t in times:
        day = winds.isel(time=t)
        speed = np.hypot(day.u, day.v)
        for i, j in ((1, 2), (3, 8), (6, 5), (4, 4), (2, 10), (6, 1)):
            parts.append((day.time.values, float(day.latitude[i]), float(day.longitude[j]), float(speed[i, j]) * units))
    return pd.DataFrame(parts, columns=["time", "latitude", "longitude", "wind_speed"])


@pytest.mark.slow
def test_speeds_are_assimilated(winds: xr.Dataset, model: GenerativeModel) -> None:
    times = [7, 30]
    ds, obs = winds.isel(time=times), speeds(winds, times)
    options = {"model": model, "error": 0.3, "members": 6, "seed": 0, "operators": {"wind_speed": ALL["speed"]}}
    result = xgenda.assimilate(ds, obs, **options)
    assert result.attrs["xgenda_guidance"].startswith("mmps")
    assert set(result.data_vars) == {"u", "v"}
    speed = np.hypot(result.u, result.v).mean("member")
    places = {k: xr.DataArray(obs[k].to_numpy(), dims="obs") for k in ("time", "latitude", "longitude")}
    after = speed.sel(places).to_numpy() - obs.wind_speed.to_numpy()
    with pytest.warns(UserWarning, match="the result is the prior"):
        prior = xgenda.assimilate(ds, None, model=model, members=6, seed=0)
    before = np.hypot(prior.u, prior.v).mean("member").sel(places).to_numpy() - obs.wind_speed.to_numpy()
    assert np.sqrt((after**2).mean()) < 0.5
    assert np.sqrt((after**2).mean()) < 0.3 * np.sqrt((before**2).mean())
    one = xgenda.assimilate(ds.isel(time=[1]), obs, **options)  # a time on its own, and lazily, is the same
    np.testing.assert_allclose(one.u, result.u.isel(time=[1]), atol=2e-4)
    lazy = xgenda.assimilate(ds.chunk(time=1), obs, **options).compute()
    np.testing.assert_allclose(lazy.u, result.u, atol=2e-4)


def test_speeds_and_components_together(winds: xr.Dataset, model: GenerativeModel) -> None:
    ds, obs = winds.isel(time=[7]), speeds(winds, [7])
    component = obs.assign(
        u=[float(winds.u[7].sel(latitude=a, longitude=b)) for a, b in zip(obs.latitude, obs.longitude, strict=True)]
    )
    both = [obs, component.drop(columns="wind_speed")]
    result = xgenda.assimilate(
        ds, both, model=model, error={"wind_speed": 0.3, "u": 0.3}, members=6, seed=0, operators={"wind_speed": ALL["speed"]}
    )
    wrong = np.abs(result.v.mean("member") - ds.v).mean()  # the sign of v is not seen, its size is
    assert float(np.abs(result.u.mean("member") - ds.u).mean()) < 0.4
    assert min(float(wrong), float(np.abs(-result.v.mean("member") - ds.v).mean())) < 1.5


def test_departures_of_speeds(winds: xr.Dataset, model: GenerativeModel) -> None:
    ds, obs = winds.isel(time=[7]), speeds(winds, [7], units=1.9438)
    knots = obs.to_xarray().set_coords(["latitude", "longitude", "time"]).drop_vars("index")
    knots["wind_speed"].attrs["units"] = "knot"
    found = xgenda.innovations(ds, knots, error=1.0, operators={"wind_speed": ALL["speed"]})
    np.testing.assert_allclose(found.innovation, 0.0, atol=2e-3)
    assert found["variable"].values.tolist() == ["wind_speed"] * 6
    gross = obs.assign(wind_speed=[500.0, *obs.wind_speed[1:]])
    codes = xgenda.innovations(ds, gross, model=model, error=0.3, operators={"wind_speed": ALL["speed"]}).quality_code
    assert codes.values.tolist()[0] == 3  # the bounds of the standard name wind_speed


def test_one_footprint_has_the_closed_form_of_a_gaussian() -> None:
    """Against the posterior in numpy, with an exponential covariance and weights by a search of all cells."""
    grid = Grid(np.linspace(40, 47, 15), np.linspace(0, 11, 23))
    truth = xr.Dataset(
        {"t": (("latitude", "longitude"), np.full(grid.shape, 280.0), {"units": "K"})},
        coords={"latitude": grid.latitude[::-1], "longitude": grid.longitude},
    )
    prior = xgenda.gaussian_prior(truth, length_scale=200e3, std=2.0)
    obs = pd.DataFrame({"latitude": [43.2], "longitude": [5.3], "seen": [283.0]})
    options = {"error": 0.5, "operators": {"seen": operators.footprint("t", radius=150e3)}}
    found = xgenda.assimilate(truth, obs, model=prior, members=400, seed=0, **options)
    assert found.attrs["xgenda_guidance"] == "exact"
    places = unit_vectors(*grid.points())
    apart = EARTH_RADIUS * great_circle(places[:, None], places)
    covariance = 4.0 * np.exp(-apart / 200e3)
    h = np.where(EARTH_RADIUS * great_circle(unit_vectors(43.2, 5.3), places) <= 150e3, grid.areas().ravel(), 0.0)
    h /= h.sum()
    gain = covariance @ h / (h @ covariance @ h + 0.25)
    mean = 280.0 + gain * 3.0
    variance = np.diag(covariance) - gain * (covariance @ h)
    model_order = found.t.sortby("latitude").transpose("member", "latitude", "longitude").values.reshape(400, -1)
    np.testing.assert_allclose(model_order.mean(0), mean, atol=5 * 2.0 / np.sqrt(400))
    np.testing.assert_allclose((model_order @ h).mean(), h @ mean, atol=5 * np.sqrt(h @ covariance @ h / 400))
    np.testing.assert_allclose(model_order.var(0) / variance, 1.0, atol=0.4)
    departures = xgenda.innovations(truth, obs, model=prior, **options)
    assert departures["variable"].values.tolist() == ["seen"]
    assert float(departures.innovation[0]) == pytest.approx(3.0)
    exact = prior.moments  # the same, without sampling
    request = _request_of(truth, obs, prior, options)
    np.testing.assert_allclose(exact(request)[0].numpy().ravel(), mean, rtol=1e-10)
    np.testing.assert_allclose(exact(request)[1].numpy().ravel() ** 2, variance, rtol=1e-8)


def _request_of(ds: xr.Dataset, obs: pd.DataFrame, model: GenerativeModel, options: dict[str, object]):  # type: ignore[no-untyped-def]
    """The request that an analysis of one time makes."""
    setup = prepare(ds, obs, model, options["error"], None, None, None, None, None, options["operators"])  # type: ignore[arg-type]
    assert setup.linear
    job = setup.job((0,), 0, model.plan(SamplingOptions()), "cpu", False)
    fields = [np.asarray(a.transpose("latitude", "longitude"))[None] for a in setup.arrays]
    return engine._request(job, np.array([0]), tuple(fields), torch.device("cpu"), lambda n: None)


def test_footprints_and_speeds_together(winds: xr.Dataset, model: GenerativeModel) -> None:
    """A linear operator has no channel of its own; with it alone the model keeps its Gaussian guidance."""
    day = winds.isel(time=[7])
    seen = operators.footprint("u", radius=200e3)
    frame = speeds(winds, [7])
    grid = Grid(winds.latitude.values, winds.longitude.values)
    mean, _ = seen.rows(grid, frame.latitude.to_numpy(), frame.longitude.to_numpy())
    wide = frame.drop(columns="wind_speed").assign(wide_u=mean(day.u.values.ravel()) * 1.9438, wide_u_error=0.5)
    wide = wide.set_index(pd.RangeIndex(len(wide), name="obs")).to_xarray().set_coords(["latitude", "longitude", "time"])
    for n in ("wide_u", "wide_u_error"):
        wide[n].attrs["units"] = "knot"
    given = {"wind_speed": ALL["speed"], "wide_u": seen, "coarse_v": operators.coarsened("v", factor=2)}
    alone = xgenda.assimilate(day, wide, model=model, members=6, seed=0, operators=given)
    assert alone.attrs["xgenda_guidance"].startswith("anchor")
    after = mean(alone.u.mean("member").values.ravel()) - mean(day.u.values.ravel())
    assert np.abs(after).max() < 0.4
    both = [wide, frame.assign(wind_speed_error=0.3)]
    together = xgenda.assimilate(day, both, model=model, members=6, seed=0, operators=given)
    assert together.attrs["xgenda_guidance"].startswith("mmps")
    speed = np.hypot(together.u, together.v).mean("member")
    places = {k: xr.DataArray(frame[k].to_numpy(), dims="obs") for k in ("latitude", "longitude")}
    assert np.sqrt(((speed.isel(time=0).sel(places).values - frame.wind_speed.to_numpy()) ** 2).mean()) < 0.5
    departures = xgenda.innovations(day, both, operators=given)
    np.testing.assert_allclose(departures.innovation, 0.0, atol=2e-3)
    assert departures["variable"].values.tolist() == ["wide_u"] * 6 + ["wind_speed"] * 6
    outside = xgenda.innovations(day, wide.assign_coords(latitude=wide.latitude + 10), operators=given)
    assert set(outside.quality_code.values.tolist()) == {int(Quality.DOMAIN)}


def test_merged_footprints_are_seen_through_their_operator() -> None:
    """A superob is the operator at its mean place, not interpolation there; heights of stations do not count."""
    grid = Grid(np.linspace(40, 47, 15), np.linspace(0, 11, 23))
    seen = operators.footprint("t", radius=150e3)
    wanted = [Wanted("t", None, "K"), Wanted("wide", None, "K", of="t", rows=seen.rows), Wanted("s", None, "1")]
    assert first_channels(wanted).tolist() == [0, 0, 1, 2]
    frame = pd.DataFrame({"latitude": [43.0, 43.1], "longitude": [5.0, 5.1], "wide": [1.0, 2.0], "height": [9e3, 9e3]})
    made = locate_observations(
        frame, wanted, grid, None, error=1.0, quality=xgenda.QualityControl(superob=500e3), ground=np.zeros(grid.size)
    )
    used = made.used()
    assert len(used.table) == 1
    expected, _ = seen.rows(grid, used.table.latitude, used.table.longitude)
    assert used.operator.shape == (1, 2 * grid.size)
    np.testing.assert_allclose(used.operator.matrix.toarray()[:, : grid.size], expected.matrix.toarray())


def detached(u: Tensor) -> Tensor:
    return u.detach()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"w": ALL["speed"].function}, r"operators\['w'\] is a function; make it with xgenda.operators"),
        (ALL["speed"], "operators=Operator.* is not accepted; give a mapping"),
        ({"u": ALL["speed"]}, r"operators\['u'\] has the name of a variable of the state"),
        (
            {"w": operators.wind_speed("u", "w")},
            r"operators\['w'\] needs 'w', which is no variable of the state; it has 'u', 'v'",
        ),
        (
            {"w": operators.function(lambda u: u.mean((-1, -2)), ("u",))},
            r"returned shape \(2,\) for fields of shape \(2, 8, 12\)",
        ),
        ({"w": operators.function(lambda u: u.detach().numpy(), ("u",))}, "returned a numpy.ndarray"),
        ({"w": operators.function(detached, ("u",))}, "returned a tensor without gradient; use torch functions"),
        (
            {"w": operators.function(lambda u: (u - u).sqrt() + u, ("u",))},
            "has a gradient that is not finite; add a small number",
        ),
        ({"w": operators.footprint("w", radius=1e5)}, r"operators\['w'\] needs 'w', which is no variable of the state"),
        (
            {"w": operators.coarsened("u", factor=5)},
            r"operators\['w'\] does not work on the grid of the state: .* not a multiple of 5",
        ),
        (
            {"w": operators.regridded("u", to_coarse(REGION))},
            "does not work on the grid of the state: The regridder starts from 6 x 8.*, and the state is on 8 x 12",
        ),
        (
            {"w": LinearOperator("u", lambda *_: 3)},
            r"returned int of shape None for two observations; a LinearMap of shape \(2, 96\)",
        ),
        ({"w": LinearOperator("u", lambda *_: identity(96))}, r"returned LinearMap of shape \(96, 96\) for two"),
        ({"w": LinearOperator("u", lambda *_: 1 / 0)}, "failed for two observations: division by zero"),
        (
            {
                "w": LinearOperator(
                    "u", lambda *_: (LinearMap.from_rows(np.zeros((2, 1), int), np.full((2, 1), np.nan), 96), np.ones(2, bool))
                )
            },
            "has weights that are not finite",
        ),
        ({"w": operators.function(lambda u, v: u, ("u",))}, "failed on fields of shape .*missing 1 required positional argument"),
    ],
)
def test_what_is_no_operator(winds: xr.Dataset, model: GenerativeModel, given: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        xgenda.assimilate(winds.isel(time=[7]), speeds(winds, [7]), model=model, error=0.3, operators=given)  # type: ignore[arg-type]


def test_what_operators_cannot_do(winds: xr.Dataset, model: GenerativeModel) -> None:
    ds, obs = winds.isel(time=[7]), speeds(winds, [7])
    options = {"error": 0.3, "operators": {"wind_speed": ALL["speed"]}}
    gaussian = xgenda.gaussian_prior(winds, covariance="eof", rank=5)
    with pytest.raises(
        OptionError, match="is Gaussian and solved in closed form, which operators that are not linear do not have"
    ):
        xgenda.assimilate(ds, obs, model=gaussian, **options)
    with pytest.raises(OptionError, match="guidance='inpaint' needs linear operators"):
        xgenda.assimilate(ds, obs, model=model, guidance="inpaint", **options)
    for call, message in (
        (lambda: operators.wind_direction("u", "v", part="angle"), "part='angle' is not accepted; choose 'sine' or 'cosine'"),
        (lambda: operators.logarithm("u", offset=0), "offset=0 is not accepted; it must be a positive number"),
        (lambda: operators.function(3, ("u",)), "function=3 cannot be called"),  # type: ignore[arg-type]
        (lambda: operators.footprint("u", radius=0), "radius=0 is not accepted; give metres"),
        (
            lambda: operators.footprint("u", radius=1e5, shape="box"),
            "shape='box' is not accepted; choose one of 'disc', 'gaussian'",
        ),
        (lambda: operators.coarsened("u", factor=1), "factor=1 is not accepted; it must be a whole number of at least 2"),
        (lambda: operators.regridded("u", 3), "regridder=3 is not accepted; make one: xgenda.Regridder"),  # type: ignore[arg-type]
    ):
        with pytest.raises(OptionError, match=message):
            call()

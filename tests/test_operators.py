"""Observed quantities that are functions of the state: the contract of each, and what they do in an analysis."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import Tensor

import xgenda
from xgenda import operators
from xgenda.errors import OptionError
from xgenda.models.generative import GenerativeModel
from xgenda.operators import Operator, extended, extended_deviation

SHAPE = (6, 7)
ALL = {
    "speed": operators.wind_speed("u", "v"),
    "sine": operators.wind_direction("u", "v", part="sine"),
    "cosine": operators.wind_direction("u", "v", part="cosine"),
    "logarithm": operators.logarithm("u", offset=0.1),
    "function": operators.function(lambda u, v: u * v + u.roll(1, -1), ("u", "v")),
}


def fields(operator: Operator, seed: int = 0, batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.5 + torch.rand(batch, *SHAPE, generator=generator, dtype=torch.float64) for _ in operator.variables]


@pytest.mark.parametrize("name", ALL)
def test_contract(name: str) -> None:
    """Shape, independence of the batch, adjoint, Taylor slope, NaN."""
    operator = ALL[name]
    x = fields(operator)
    out = operator(*x)
    assert out.shape == (3, *SHAPE)
    torch.testing.assert_close(operator(*(f[1:2] for f in x))[0], out[1])
    operator.check(name, SHAPE, ["u", "v"])

    def flat(z: Tensor) -> Tensor:
        return operator(*z.reshape(len(x), 3, *SHAPE)).flatten()

    z, dz = torch.cat([f.flatten() for f in x]), torch.randn(len(x) * 3 * 42, generator=torch.Generator().manual_seed(1)).double()
    _, forth = torch.autograd.functional.jvp(flat, z, dz)
    w = torch.randn(len(forth), generator=torch.Generator().manual_seed(2)).double()
    _, pulled = torch.autograd.functional.vjp(flat, z, w)
    assert float(forth @ w) == pytest.approx(float(dz @ pulled), rel=1e-10)
    steps = [10.0**-k for k in (2, 3, 4)]
    left = [float((flat(z + h * dz) - flat(z) - h * forth).norm()) for h in steps]
    assert np.polyfit(np.log(steps), np.log(left), 1)[0] == pytest.approx(2.0, abs=0.1)
    x[0][0, 2, 3] = torch.nan
    assert bool(torch.isnan(operator(*x)[0, 2, 3]))
    assert not bool(torch.isnan(operator(*x)[1:]).any())


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
    ):
        with pytest.raises(OptionError, match=message):
            call()

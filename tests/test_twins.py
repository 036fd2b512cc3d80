"""The quasi-geostrophic model against a published run, conservation laws and dispersion relations; the ocean made with it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import xgenda
from xgenda import tutorial
from xgenda.errors import GridError, OptionError, StateError, UnitsError
from xgenda.metadata import unit_factors
from xgenda.ocean import geostrophic_velocity
from xgenda.twins import OCEAN_VARIABLES, Tracer, TwoLayerQG, simulate_ocean

DAY = 86400.0


def random_q(model: TwoLayerQG, seed: int = 0, amplitude: float = 1e-5) -> np.ndarray:
    """Smooth random vorticity of both layers."""
    rng = np.random.default_rng(seed)
    k, l = model.wavenumbers  # noqa: E741
    cycles = np.hypot(k, l) * model.length / (2 * np.pi)
    q = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(2, model.nx, model.nx))) * np.exp(-((cycles - 4) ** 2) / 4), axes=(-2, -1))
    return amplitude * (q - q.mean((-2, -1), keepdims=True)) / q.std()


def cosine(model: TwoLayerQG, east: int, north: int = 0) -> np.ndarray:
    """One wave, shape (n, n)."""
    x = np.arange(model.nx) / model.nx
    return np.cos(2 * np.pi * (east * x[None, :] + north * x[:, None]))


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_published_reference_run() -> None:
    # parameters and numbers of test_two_layer in pyqg (Abernathey et al.), pyqg/tests/test_reference_solns.py
    model = TwoLayerQG(nx=32, length=1e6, rd=30e3, U1=0.05, filterfac=18.4, dt=12800.0, order=2)
    x = (np.arange(32) + 0.5) / 32
    q1 = 1e-6 * np.cos(10 * np.pi * x[None, :]) + 1e-7 * np.cos(10 * np.pi * x[:, None])
    state = model.start(np.stack([q1, 0 * q1]))
    state = model.advance(state, 2430)
    energies = []
    for _ in range(486):  # the two later years
        state = model.advance(state, 10)
        energies.append(model.kinetic_energy(state))
    assert state.time == 3 * 360 * DAY
    assert (model.fields(state)[0] ** 2).sum() == pytest.approx(9.5614e-8, rel=0.01)
    assert np.mean(energies, 0) == pytest.approx([0.0081838, 0.00015617], rel=0.01)


@pytest.mark.parametrize("beta", [0.0, 2e-11])
def test_energy_and_enstrophy_are_conserved_without_forcing(beta: float) -> None:
    model = TwoLayerQG(nx=48, length=6e5, rd=25e3, beta=beta, U1=0.0, U2=0.0, rek=0.0, filterfac=None, dt=600.0)
    state = model.start(random_q(model))
    weights = np.array([model.delta, 1.0]) / (1 + model.delta)

    def enstrophy(q: np.ndarray) -> float:
        return float(weights @ (q**2).mean((-2, -1)))

    later = model.advance(state, 1500)
    before, after = model.fields(state), model.fields(later)
    assert np.corrcoef(before[0].ravel(), after[0].ravel())[0, 1] < 0.9  # it has moved
    assert model.energy(later) == pytest.approx(model.energy(state), rel=1e-5)
    assert enstrophy(after) == pytest.approx(enstrophy(before), rel=1e-4)
    assert after.mean((-2, -1)) == pytest.approx(0.0, abs=1e-18)


@pytest.mark.parametrize("order", [2, 3])
def test_order_of_the_time_steps(order: int) -> None:
    def run(steps: int, steps_order: int = order) -> np.ndarray:
        model = TwoLayerQG(nx=32, length=5e5, rd=25e3, U1=0.1, filterfac=None, dt=2 * DAY / steps, order=steps_order)
        return model.fields(model.advance(model.start(random_q(model)), steps))

    exact = run(6400, 3)
    errors = [np.abs(run(n) - exact).max() for n in (100, 200, 400)]
    assert np.log2(errors[1] / errors[2]) == pytest.approx(2.0, abs=0.3)  # the first step of all is Euler's: an error of dt**2
    if order == 3:
        assert errors[-1] < np.abs(run(400, 2) - exact).max() / 2


@pytest.mark.parametrize(("wave", "beta"), [(3, 0.0), (5, 0.0), (4, 1e-11), (3, 2e-11)])
def test_growth_of_the_two_layer_instability(wave: int, beta: float) -> None:
    # Vallis 2017, section 9.6.2: layers of equal depth, U_1 = -U_2 = U
    U, rd, length = 0.05, 30e3, 1e6
    square, kd2 = (2 * np.pi * wave / length) ** 2, rd**-2.0
    # c = -beta / (K^2 + kd^2) (1 + kd^2 / 2 K^2 +- sqrt(D)), with beta^2 D written so that beta may be zero
    beta2_d = (kd2 / (2 * square)) ** 2 * (beta**2 + 4 * square**2 * (square**2 - kd2**2) * U**2 / kd2**2)
    assert beta2_d < 0  # unstable
    expected = np.sqrt(square) * np.sqrt(-beta2_d) / (square + kd2)

    model = TwoLayerQG(nx=32, length=length, rd=rd, delta=1.0, beta=beta, U1=U, U2=-U, rek=0.0, filterfac=None, dt=3600.0)
    state = model.start(1e-14 * np.stack([cosine(model, wave), 0.3 * cosine(model, wave)]))
    state = model.advance(state, round(8 / expected / model.dt))  # until the growing mode is all there is
    later = model.advance(state, round(2 / expected / model.dt))
    found = np.log(model.energy(later) / model.energy(state)) / 2 / (later.time - state.time)
    assert found == pytest.approx(expected, rel=2e-3)


def test_phase_speed_of_rossby_waves() -> None:
    model = TwoLayerQG(nx=32, length=1e6, rd=30e3, delta=1.0, U1=0.0, U2=0.0, rek=0.0, dt=3600.0)
    square = (2 * np.pi * 2 / 1e6) ** 2
    for q2, divisor in ((1, square), (-1, square + 30e3**-2.0)):  # barotropic and baroclinic
        wave = 1e-12 * cosine(model, 2)
        state = model.advance(model.start(np.stack([wave, q2 * wave])), 240)
        phase = np.angle(np.fft.rfft(model.fields(state)[0].mean(0))[2])
        turned = 2 * np.pi * 2 / 1e6 * model.beta / divisor * state.time  # westward
        assert np.angle(np.exp(1j * (phase - turned))) == pytest.approx(0.0, abs=2e-3)


def test_bottom_drag() -> None:
    model = TwoLayerQG(nx=16, beta=0.0, rd=1e9, U1=0.0, U2=0.0, rek=1e-6, dt=3600.0)  # layers that know nothing of each other
    state = model.start(1e-9 * np.stack([cosine(model, 2), cosine(model, 2)]))
    ratio = model.kinetic_energy(model.advance(state, 240)) / model.kinetic_energy(state)
    assert ratio == pytest.approx([1.0, np.exp(-2 * 1e-6 * 10 * DAY)], rel=1e-3)


def test_fields_of_a_known_streamfunction() -> None:
    model = TwoLayerQG(nx=32, length=4e5)
    wave = 2 * np.pi * 3 / 4e5
    psi = np.stack([1000 * cosine(model, 3), 200 * cosine(model, 0, 3)])
    upper, lower = model.stretching
    assert (upper + lower) * model.rd**2 == pytest.approx(1.0)
    q = np.stack([-(wave**2) * psi[0] + upper * (psi[1] - psi[0]), -(wave**2) * psi[1] + lower * (psi[0] - psi[1])])
    state = model.start(q)
    assert model.streamfunction(state) == pytest.approx(psi, abs=1e-8)
    sine = np.sin(2 * np.pi * 3 * np.arange(32) / 32)
    u, v = model.velocity(state)
    assert v[0] == pytest.approx(np.broadcast_to(-1000 * wave * sine, (32, 32)), abs=1e-10)
    assert u[1] == pytest.approx(np.broadcast_to(200 * wave * sine[:, None], (32, 32)), abs=1e-10)
    assert np.abs(u[0]).max() < 1e-12
    assert model.kinetic_energy(state) == pytest.approx([(1000 * wave) ** 2 / 4, (200 * wave) ** 2 / 4])


def test_a_run_in_two_parts_is_the_same_run() -> None:
    model = TwoLayerQG(nx=16, tracers=(Tracer(gradient_y=1e-5),))
    state = model.start(random_q(model))
    whole, parts = model.advance(state, 9), model.advance(model.advance(state, 4), 5)
    assert np.array_equal(whole.spectrum, parts.spectrum)
    assert whole.time == parts.time == 9 * model.dt


def test_decay_of_tracers() -> None:
    still = {"nx": 16, "length": 1e6, "U1": 0.0, "dt": 3600.0}
    model = TwoLayerQG(**still, tracers=(Tracer(relaxation=20 * DAY), Tracer(diffusivity=500.0), Tracer()))
    state = model.start(np.zeros((2, 16, 16)), np.stack([1 + cosine(model, 2), 1 + cosine(model, 2), 1 + cosine(model, 2)]))
    relaxed, diffused, kept = model.fields(model.advance(state, 240))[2:]
    assert relaxed == pytest.approx((1 + cosine(model, 2)) * np.exp(-0.5), rel=1e-5)
    rate = 500 * (2 * np.pi * 2 / 1e6) ** 2
    assert diffused == pytest.approx(1 + cosine(model, 2) * np.exp(-rate * 10 * DAY), rel=1e-5)
    assert kept == pytest.approx(1 + cosine(model, 2), rel=1e-12)


def test_the_variance_budget_of_a_tracer() -> None:
    tracer = Tracer(gradient_x=3e-6, gradient_y=-1e-5, relaxation=30 * DAY, diffusivity=200.0)
    model = TwoLayerQG(nx=48, length=6e5, rd=25e3, U1=0.1, filterfac=None, dt=300.0, tracers=(tracer, Tracer()))
    rng = np.random.default_rng(1)
    blob = np.stack([rng.normal() * cosine(model, 2, 1) + cosine(model, 1, 3), 2 + cosine(model, 2)])
    states = [model.advance(model.start(random_q(model), blob), 200)]
    for _ in range(2):
        states.append(model.advance(states[-1], 1))
    variance = [model.fields(s)[2:].var((-2, -1)) for s in states]
    found = (variance[2] - variance[0]) / (2 * model.dt) / 2
    field = model.fields(states[1])[2]
    u, v = model.velocity(states[1])[:, 0]
    k, l = model.wavenumbers  # noqa: E741
    gradient = np.fft.irfft2(
        np.stack([1j * k * states[1].spectrum[2], 1j * l * states[1].spectrum[2]]), s=(48, 48), axes=(-2, -1)
    )
    gain = -(field * (u * 3e-6 - v * 1e-5)).mean()
    loss = field.var() / (30 * DAY) + 200 * (gradient**2).sum(0).mean()
    assert abs(gain) > 1e-3 * loss
    assert found[0] == pytest.approx(gain - loss, rel=1e-3)
    assert abs(found[1]) * 100 * DAY < 1e-3 * variance[0][1]  # nothing makes or takes it
    assert model.fields(states[2])[3].mean() == pytest.approx(2.0, rel=1e-12)


def test_a_step_that_is_too_long() -> None:
    model = TwoLayerQG(nx=32, length=3e5, dt=1e5)
    with pytest.raises(StateError, match=r"overflowed with time steps of dt=100000 s; .* dt=50000"):
        model.advance(model.start(random_q(model, amplitude=1e-4)), 200)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"nx": 33}, r"nx=33 is not accepted; it must be even, for example nx=34"),
        ({"nx": 2}, r"nx=2 is not accepted"),
        ({"dt": 0.0}, r"dt=0.0 is not accepted; it must be a positive number"),
        ({"rd": -1.0}, r"rd=-1.0 is not accepted"),
        ({"order": 4}, r"order=4 is not accepted; choose order=2 or order=3"),
    ],
)
def test_models_that_are_not_accepted(keywords: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TwoLayerQG(**keywords)


# -- the ocean ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ocean() -> xr.Dataset:
    """Days 180, 190, ... of a run at the default size."""
    return simulate_ocean(12, every="10D", spinup="180D", seed=5)


def small(**keywords: object) -> xr.Dataset:
    return simulate_ocean(**{"times": 3, "size": 16, "spinup": "2D", **keywords})  # type: ignore[arg-type]


def test_what_the_ocean_holds(ocean: xr.Dataset) -> None:
    assert tutorial.simulate_ocean is simulate_ocean
    assert {n: v.shape for n, v in ocean.data_vars.items()} == dict.fromkeys(OCEAN_VARIABLES, (12, 64, 64))
    for name, variable in ocean.data_vars.items():
        assert variable.dtype == "float32"
        assert {"standard_name", "long_name", "units"} <= set(variable.attrs)
        assert np.isfinite(variable).all(), name
    assert unit_factors(ocean.salinity.attrs["units"], "PSU") == (1.0, 0.0)
    assert unit_factors(ocean.temperature.attrs["units"], "K") == (1.0, pytest.approx(273.15))
    assert {"title", "source", "Conventions", "seed", "beta", "rd", "U1", "rek", "dt"} <= set(ocean.attrs)
    assert ocean.time.values[1] - ocean.time.values[0] == np.timedelta64(10, "D")
    assert float(ocean.latitude.mean()) == pytest.approx(38.0)
    assert float(ocean.longitude.mean()) == pytest.approx(-55.0)
    kilometres = 111.2 * float(ocean.latitude[1] - ocean.latitude[0])
    assert kilometres == pytest.approx(15.0, rel=1e-3)
    assert 111.2 * np.cos(np.radians(38)) * float(ocean.longitude[1] - ocean.longitude[0]) == pytest.approx(15.0, rel=1e-3)


def test_the_ocean_looks_like_one(ocean: xr.Dataset) -> None:
    std = {n: float(v.std()) for n, v in ocean.data_vars.items()}
    assert 0.08 < std["ssh"] < 0.17
    assert 0.9 < std["temperature"] < 1.8
    assert 0.18 < std["salinity"] < 0.4
    assert 0.15 < std["u"] < 0.3
    assert 0.15 < std["v"] < 0.3
    flat = {n: ocean[n].values.ravel() for n in ("ssh", "temperature", "salinity")}
    assert 0.5 < np.corrcoef(flat["ssh"], flat["temperature"])[0, 1] < 0.85
    assert abs(np.corrcoef(flat["temperature"], flat["salinity"])[0, 1]) < 0.5
    assert abs(np.corrcoef(flat["ssh"], flat["salinity"])[0, 1]) < 0.6
    for name in OCEAN_VARIABLES:  # eddies are resolved: next to nothing in waves shorter than four cells
        power = (np.abs(np.fft.fft2(ocean[name].values - ocean[name].values.mean())) ** 2).mean(0)
        cycles = np.hypot(*np.meshgrid(np.fft.fftfreq(64) * 64, np.fft.fftfreq(64) * 64))
        assert power[cycles > 16].sum() < 0.08 * power.sum(), name


def test_velocities_are_those_of_the_sea_surface() -> None:
    ocean = small(size=32, spinup="20D", cyclogeostrophic=False)
    curved = small(size=32, spinup="20D")
    middle = {"latitude": slice(14, 18), "longitude": slice(4, 28)}  # where the plane is close to the sphere
    found = geostrophic_velocity(ocean.ssh).isel(middle)
    for n in ("u", "v"):
        assert np.corrcoef(found[f"{n}_geostrophic"].values.ravel(), ocean[n].isel(middle).values.ravel())[0, 1] > 0.995
        difference = float((curved[n] - ocean[n]).std() / ocean[n].std())
        assert 0.01 < difference < 0.25
    xr.testing.assert_identical(curved.ssh, ocean.ssh)


@pytest.mark.parametrize("latitude", [38.0, -38.0])
def test_the_centrifugal_force_slows_cyclones(latitude: float) -> None:
    options = {"size": 32, "spinup": "20D", "latitude": latitude}
    curved, plain = small(**options), small(**options, cyclogeostrophic=False)
    low = plain.ssh < plain.ssh.quantile(0.03)
    high = plain.ssh > plain.ssh.quantile(0.97)

    def vorticity(ds: xr.Dataset) -> xr.DataArray:
        return abs(ds.v.differentiate("longitude") / np.cos(np.radians(latitude)) - ds.u.differentiate("latitude"))

    assert vorticity(curved).where(low).mean() < vorticity(plain).where(low).mean()
    assert vorticity(curved).where(high).mean() > vorticity(plain).where(high).mean()


def test_poleward_is_colder_in_both_hemispheres() -> None:
    # water carried poleward is warm; high water is warm in both
    for latitude in (38.0, -38.0):
        ocean = small(size=32, spinup="60D", latitude=latitude)
        assert np.corrcoef(ocean.ssh.values.ravel(), ocean.temperature.values.ravel())[0, 1] > 0.3
        flux = float((ocean.v * (ocean.temperature - ocean.temperature.mean())).mean())
        assert flux * latitude > 0


def test_seeds() -> None:
    xr.testing.assert_identical(small(seed=1), small(seed=1))
    assert abs(np.corrcoef(small(seed=1).ssh.values.ravel(), small(seed=2).ssh.values.ravel())[0, 1]) < 0.5
    assert small(seed=2).attrs["seed"] == 2


def test_finer_output_times_are_the_same_run() -> None:
    daily, often = small(times=3), small(times=9, every="6h")
    xr.testing.assert_identical(daily.drop_attrs(), often.isel(time=slice(None, None, 4)).drop_attrs())
    assert (daily.time == pd.date_range("2000-01-01", periods=3)).all()


def test_a_later_start_is_the_same_run() -> None:
    early, late = small(times=4), small(times=2, spinup="4D", start="2000-01-03")
    xr.testing.assert_equal(early.isel(time=slice(2, 4)), late)


def test_the_ocean_survives_a_round_trip(tmp_path: Path) -> None:
    ocean = small()
    ocean.to_netcdf(tmp_path / "ocean.nc")
    with xr.open_dataset(tmp_path / "ocean.nc") as copy:
        xr.testing.assert_identical(ocean, copy.load())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"times": 0}, r"times=0 is not accepted; it must be a whole number of at least 1"),
        ({"size": 17}, r"size=17 is not accepted; it must be even, for example size=18"),
        ({"size": 8}, r"size=8 is not accepted; .* at least 16"),
        ({"seed": -1}, r"seed=-1 is not accepted"),
        ({"spacing": 50e3}, r"spacing=50000.0 is not accepted; it is 1e3 to 20e3 metres"),
        ({"spacing": "15km"}, r"spacing='15km' is not accepted"),
        ({"latitude": 0.0}, r"latitude=0.0 is not accepted; it must be 25 to 70 degrees"),
        ({"longitude": "west"}, r"longitude='west' is not accepted"),
        ({"every": "weekly"}, r"every='weekly' is not accepted; give a time span .* every='1D'"),
        ({"every": "0h"}, r"every='0h' is not accepted"),
        ({"every": 24}, r"every=24 is not accepted"),
        ({"spinup": "-1D"}, r"spinup='-1D' is not accepted"),
        ({"start": "some day"}, r"start='some day' is not accepted; give a date"),
    ],
)
def test_options_that_are_not_accepted(keywords: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        small(**keywords)


def test_no_spin_up() -> None:
    assert float(small(spinup="0D").temperature.isel(time=0).std()) == 0.0


def test_a_forecast_is_the_simulation() -> None:
    run = xgenda.tutorial.simulate_ocean(3, size=16, spinup="60D", seed=3, lower=True)
    forecast = xgenda.tutorial.ocean_forecast("1D")
    members = run.isel(time=[0, 1]).drop_vars("time").rename(time="member").assign_coords(time=run.time[0])
    found = forecast(members)
    assert found.time == run.time[1]
    for name in run.data_vars:  # but for the first steps, which know of none before
        change = float(abs(run[name][1] - run[name][0]).max())
        np.testing.assert_allclose(found[name], run[name].isel(time=[1, 2]), rtol=0, atol=0.01 * change, err_msg=name)
        assert found[name].dtype == np.float32
    alone = forecast(run.isel(time=1))
    xr.testing.assert_allclose(alone.drop_vars("time"), found.isel(member=1).drop_vars("time"), rtol=1e-5)
    turned = forecast(members.transpose("longitude", "member", "latitude")[["lower", "ssh", "temperature", "salinity"]])
    np.testing.assert_array_equal(turned.ssh.transpose(*found.ssh.dims), found.ssh)
    wrong = xgenda.tutorial.ocean_forecast("1D", rd=30e3)(members)
    assert float(abs(wrong.ssh - found.ssh).max()) > 0.05 * float(abs(found.ssh - members.ssh).max())


def test_forecasts_that_are_refused() -> None:
    run = xgenda.tutorial.simulate_ocean(1, size=16, spinup="2D", lower=True).isel(time=0)
    forecast = xgenda.tutorial.ocean_forecast("12h")
    with pytest.raises(StateError, match=r"lacks 'lower'; .*lower=True"):
        forecast(run.drop_vars("lower"))
    with pytest.raises(GridError, match="8 x 16 cells"):
        forecast(run.isel(latitude=slice(8)))
    with pytest.raises(GridError, match="16 x 16 cells of -15 x 15 km"):
        forecast(run.isel(latitude=slice(None, None, -1)))
    with pytest.raises(OptionError, match="rd=0 is not accepted"):
        xgenda.tutorial.ocean_forecast("1D", rd=0)


def test_the_forecast_of_the_ocean_reads_units() -> None:
    state = xgenda.tutorial.simulate_ocean(times=1, size=16, spinup="20D", lower=True).isel(time=0)
    forecast = xgenda.tutorial.ocean_forecast("6h")
    expected = forecast(state)
    centimetres, kelvin = state.ssh * 100.0, state.temperature.astype("float64") + 273.15
    found = forecast(state.assign(ssh=centimetres.assign_attrs(units="cm"), temperature=kelvin.assign_attrs(units="K")))
    np.testing.assert_allclose(found.ssh, 100 * expected.ssh, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.temperature, expected.temperature + 273.15, atol=1e-3)
    assert found.ssh.attrs["units"] == "cm"
    bad = [
        (state.assign(ssh=state.ssh.assign_attrs(units="K")), UnitsError, "Units 'K' cannot be converted to 'm'"),
        (state.assign(ssh=state.ssh.where(state.ssh > 0)), StateError, "ds['ssh'] holds NaN"),
        (state.assign(ssh=state.ssh.astype(int)), StateError, "'ssh' has dtype int64; real numbers are needed"),
        (state.assign(ssh=state.ssh.expand_dims(member=2)), StateError, "'lower' has dimensions ('latitude', 'longitude'), and 'ssh'"),
    ]  # fmt: skip
    for ds, error, message in bad:
        with pytest.raises(error, match=re.escape(message)):
            forecast(ds)

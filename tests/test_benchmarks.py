"""The parts of the benchmark programs that have a known answer."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.grids import GRAVITY

PROGRAMS = Path(__file__).parents[1] / "docs" / "benchmarks"


def program(name: str) -> ModuleType:
    """Import a benchmark program by its path."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", PROGRAMS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(p.stem for p in PROGRAMS.glob("*.py")))
def test_every_program_finds_what_it_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PROGRAMS)  # as where it is started
    assert callable(program(name).main)


@pytest.fixture(scope="module")
def kolmogorov() -> ModuleType:
    return program("kolmogorov")


def test_kolmogorov_solver(kolmogorov: ModuleType) -> None:
    found = kolmogorov.check_flow(32)
    for name in ("taylor_green", "shear", "advection", "divergence"):
        assert found[name] < 1e-12, name
    assert found["energy"] < 1e-9
    assert found["enstrophy"] < 1e-7


def test_kolmogorov_symmetries(kolmogorov: ModuleType) -> None:
    # a symmetry commutes with the forced dynamics: a run from the transformed start is the transformed run
    flow = kolmogorov.Flow(64, 0.01, dtype=torch.float64)
    w = flow.start(1, torch.Generator().manual_seed(0))

    def run(velocity: torch.Tensor) -> torch.Tensor:
        u, v = torch.fft.rfft2(velocity)
        w = 1j * flow.kx * v - 1j * flow.ky * u
        for _ in range(10):
            w = flow.advance(w)
        return torch.stack(flow.velocity(w))

    start = torch.stack(flow.velocity(w[0]))
    end = run(start)
    assert (end - start).norm() > 0.02 * start.norm()
    for seed in range(3):
        both = kolmogorov.symmetric(torch.stack([start, end]), torch.Generator().manual_seed(seed))
        torch.testing.assert_close(run(both[0]), both[1], atol=1e-10, rtol=0)


def test_kolmogorov_vorticity(kolmogorov: ModuleType) -> None:
    # solid rotation turns twice as fast as it looks
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    torch.testing.assert_close(kolmogorov.vorticity(torch.stack([-y, x])), torch.full((4, 4), 2.0))


def test_downscaling_octaves() -> None:
    # a wave lies in the octave of its wavelength, with its variance
    dims, coords = ("time", "latitude", "longitude"), {"latitude": 40 + 0.1 * np.arange(64), "longitude": 0.1 * np.arange(64)}
    for wavelength, octave in ((2.5, 1), (5.0, 2), (3.2, 1), (32.0, 5)):
        wave = np.cos(2 * np.pi * np.round(64 / wavelength) * np.arange(64) / 64) * np.ones((1, 64, 1))
        found = program("downscaling").octaves(xr.Dataset({"t": (dims, wave)}, coords=coords), "both").t
        assert float(found.sel(octave=octave)) == pytest.approx(0.5)
        assert float(found.sum()) == pytest.approx(0.5)


def test_downscaling_scores_of_the_truth_itself() -> None:
    downscaling = program("downscaling")
    rng = np.random.default_rng(0)
    dims = ("time", "latitude", "longitude")
    coords = {
        "time": np.array(["2000-01-01", "2001-01-01"], "datetime64[ns]"),
        "latitude": 40.0 + np.arange(32),
        "longitude": np.arange(32.0),
    }
    truth = xr.Dataset({"t": (dims, rng.normal(size=(2, 32, 32)), {"units": "K"})}, coords=coords)
    members = truth + xr.Dataset({"t": (("member", *dims), rng.normal(size=(15, 2, 32, 32)) * 1e-3)})
    members["t"].attrs = truth.t.attrs
    pair = downscaling.Pair(4, truth, truth, truth, {}, None, "")
    (row,) = downscaling.table(members, truth, pair).values()
    assert float(row[0]) < 1e-3
    assert row[5] == "1.00"
    assert row[6] == "1.00-1.00"
    (single,) = downscaling.table(truth, truth, pair).values()
    assert single == ["0.0000", "0.0000", "-", "-", "-", "-", "-", "1.00", "0e+00"]


def test_function_space_bands_and_fronts() -> None:
    functions = program("function_space")
    y, x = np.meshgrid(np.arange(16) / 16, np.arange(16) / 16, indexing="ij")
    wave = np.cos(2 * np.pi * (3 * y + 2 * x))  # of wavenumber 3.6
    assert functions.bands(wave[None], (1, 2, 4, 8)) == pytest.approx([0, 0.5, 0])
    fronts = functions.truth(16, 3)
    assert fronts.shape == (3, 16, 16)
    torch.testing.assert_close(functions.truth(16, 1, 2)[0], fronts[2])
    assert torch.fft.rfft2(fronts)[:, 8].abs().max() < 1e-12
    assert 0.3 < float(fronts.square().mean()) < 1


def test_resolution_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROGRAMS))
    resolution = program("resolution")
    n, cells = 32, 8
    k = torch.hypot(torch.fft.fftfreq(n, 1 / n)[:, None], torch.arange(n // 2 + 1.0)).double()
    power = torch.where((k > 0) & (k < n // 2), k.clamp(min=1) ** -3, 0.0)
    fields = resolution.drawn(power, 400, "fields")
    # a spectrum that is a power law goes on as one, and what it says of the shown waves is what they have
    found = resolution.extrapolated(fields, 2 * n)
    wave = torch.hypot(torch.fft.fftfreq(2 * n, 1 / (2 * n))[:, None], torch.arange(n + 1.0))
    beyond = (wave > 18) & (wave < 31)
    assert float((found[beyond] / wave[beyond] ** -3).log().abs().max()) < 0.15
    np.testing.assert_allclose(
        resolution.bands(fields)[:4], resolution.bands(resolution.drawn(power, 400, "other"))[:4], rtol=0.15
    )
    assert np.isnan(resolution.bands(fields)[4:]).all()
    # members of the Gaussian keep the means, and are as far from the truth as from their own mean
    truth = fields[:20]
    means = resolution.block_means(truth, cells)
    members = torch.stack([resolution.gaussian(power, y, 8, f"date {i}") for i, y in enumerate(means)])
    torch.testing.assert_close(resolution.block_means(members, cells), means[:, None].expand(-1, 8, -1, -1))
    error = (members.mean(1) - truth).square().mean()
    assert float(error / members.var(1).mean()) == pytest.approx(1 + 1 / 8, rel=0.1)
    assert float(error) < 0.9 * float((resolution.upsampled(means, n, "bilinear") - truth).square().mean())
    # a field that the blocks show whole comes back
    low = torch.fft.irfft2(torch.where(k < cells // 2 - 0.5, torch.fft.rfft2(truth), 0.0), s=(n, n))
    torch.testing.assert_close(
        resolution.upsampled(resolution.block_means(low, cells), n, "spectral"), low, atol=1e-4, rtol=0, check_dtype=False
    )
    crps, rmse = resolution.scores(members, truth)
    assert crps == pytest.approx(
        0.56 * rmse / (1 + 1 / 8) ** 0.5, rel=0.1
    )  # of a normal distribution that is right: std / sqrt(pi)
    assert resolution.scores(truth[:, None], truth) == (0.0, 0.0)


# -- conversion --------------------------------------------------------------------------------------------------------


def twin(size: int, times: int, **options: Any) -> xr.Dataset:
    return xgenda.tutorial.simulate_ocean(times, size=size, spinup="40D", **options)[["ssh", "u", "v"]]


def test_conversion_balances_of_the_twin() -> None:
    balanced = twin(32, 3, cyclogeostrophic=False)
    u, v = (balanced[n].values.astype(float) for n in ("u", "v"))
    scale = float(balanced.ssh.std())
    balance = program("conversion").Balance(balanced)
    assert max(balance.departure.values()) < 1e-12
    assert balance.height(u, v, 0) == pytest.approx(balanced.ssh.values, abs=1e-5 * scale)
    curved = twin(32, 3)  # the same heights
    u, v = (curved[n].values.astype(float) for n in ("u", "v"))
    errors = [np.abs(balance.height(u, v, rounds) - curved.ssh.values).max() for rounds in range(7)]
    assert errors[0] > 0.02 * scale
    assert all(b < 0.8 * a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.01 * errors[0]
    # members are what is best plus past errors, without the mean of these
    found = balance.inverted(curved, curved.isel(time=[1]), 400, 0).ssh
    past = curved.ssh.values - balance.height(u, v, 0)
    possible = curved.ssh.values[1] - past[1] + past - past.mean(0)
    distance = np.abs(found.values - possible).max((-2, -1))  # of each member from each
    assert distance.min(1) == pytest.approx(0, abs=1e-9)
    assert set(distance.argmin(1)) == {0, 1, 2}


def test_conversion_interpolation_is_the_closed_form() -> None:
    # the same Gaussian with dense matrices, columns of which are derivatives of single cells
    past = twin(16, 6, every="5D")
    balance = program("conversion").Balance(past)
    n, f, spacing = 16, past.attrs["f"], past.attrs["spacing"]
    cells = np.eye(n * n).reshape(-1, n, n)
    wave = 2 * np.pi * np.fft.fftfreq(n, spacing)

    def dense(factor: np.ndarray) -> np.ndarray:
        return np.fft.ifft2(factor * np.fft.fft2(cells)).real.reshape(n * n, -1).T

    heights = past.ssh.values.astype(float)
    prior = np.mean(
        [np.roll(h, (i, j), (0, 1)).ravel()[:, None] * np.roll(h, (i, j), (0, 1)).ravel() for h in heights for i in range(n) for j in range(n)], 0
    )  # fmt: skip
    east, north = dense(-1j * GRAVITY / f * wave[:, None]), dense(1j * GRAVITY / f * wave[None, :])
    given = past[["u", "v"]].isel(time=[2, 4]).where(xr.DataArray(np.arange(n) % 5 == 2, dims="latitude"))
    given = given.where(xr.DataArray(np.arange(n) % 4 == 1, dims="longitude"))
    where = given.u[0].notnull().values.ravel()
    error = {"u": 0.03, "v": 0.05}
    noise = np.repeat([error[k] ** 2 + balance.departure[k] for k in ("u", "v")], where.sum())
    operator = np.concatenate([east[where], north[where]])
    gain = prior @ operator.T @ np.linalg.inv(operator @ prior @ operator.T + np.diag(noise))
    values = np.concatenate([given[k].values.reshape(2, -1)[:, where] for k in ("u", "v")], 1)
    covariance = prior - gain @ operator @ prior
    found = balance.interpolated(given, error, 2000)
    for name, matrix in (("ssh", np.eye(n * n)), ("u", east), ("v", north)):
        expected, spread = values @ (matrix @ gain).T, np.sqrt(np.diag(matrix @ covariance @ matrix.T))
        members = found[name].values.reshape(2000, 2, -1)
        assert np.abs((members.mean(0) - expected) / spread).max() < 5 / 2000**0.5
        assert members.std(0) == pytest.approx(np.broadcast_to(spread, (2, n * n)), rel=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::xgenda.errors.LittleDataWarning")
def test_conversion_currents() -> None:
    whole, sparse = (
        program("conversion").currents(2, 3, size=16, runs=2, withheld=1, times=25, every=20, days=2, spinup="20D").values()
    )
    assert list(whole.index[-2:]) == ["geostrophic balance + past errors", "cyclogeostrophic balance + past errors"]
    assert whole.rmse.iloc[-1] < whole.rmse.iloc[-2] < whole.rmse["climate"]
    assert np.isfinite(sparse[["rmse", "crps"]]).all(axis=None)
    assert (sparse.rmse.drop("climate") < 1.2 * sparse.rmse["climate"]).all()
    # what is estimated together with the height is scored, too
    known = sparse["rmse of u"].notnull()
    assert set(sparse.index[~known]) == {"ridge regression + past errors", "conversion to ssh alone"}

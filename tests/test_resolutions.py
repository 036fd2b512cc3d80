"""Training on several resolutions: coarse steps are of the same functions under the same noise, drawn by seed and step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.denoisers import Denoiser
from xgenda.diffusion.kernels import Kernel
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.random_fields import TorusField
from xgenda.errors import OptionError
from xgenda.models.diffusive import DiffusionModel
from xgenda.networks.uno import UNO
from xgenda.training.objectives import Batch, Denoising, Draws
from xgenda.training.resolutions import drawn, step_cost

pytestmark = pytest.mark.usefixtures("one_thread")
N = 16
NOISE = {"kind": "exponential", "length": 0.1, "cutoff": 7}
FAST: dict[str, Any] = {
    "periodic": "both", "architecture": "uno", "noise": NOISE, "resolutions": (1, 2), "width": 8,
    "network_options": {"modes": 4, "rank": 4}, "progress": False, "device": "cpu",
}  # fmt: skip
PRIOR = TorusField((N, N), Kernel("gaussian", 0.2), cutoff=7)  # Gaussian: what a denoiser should say of it is known


def box(values: np.ndarray) -> xr.Dataset:
    ny, nx = values.shape[-2:]
    return xr.Dataset(
        {"a": (("time", "latitude", "longitude"), values, {"units": "m"})},
        coords={
            "time": np.datetime64("2020-01-01", "ns") + np.arange(len(values)) * np.timedelta64(1, "D"),
            "latitude": 30 + 0.1 * np.arange(ny), "longitude": 0.1 * np.arange(nx),
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def fields() -> xr.Dataset:
    return box(PRIOR.draw(NoiseStream([(0, "t", k) for k in range(48)])).numpy())


def recovered(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states and noise of unit level that a batch was made of: D = x / t^2 + s / t F, with F the target and x / t the input."""
    level = (4 * batch.label.double()).exp().reshape(-1, 1, 1, 1)
    total = (level**2 + 1).sqrt()
    noisy = batch.x.double() * total
    clean = noisy / total**2 + level / total * batch.target.double()
    return clean, (noisy - clean) / level


def shown(fields: np.ndarray, n: int, cutoff: int) -> np.ndarray:
    """Return the waves of fields (count, ny, nx) that n x n cells show, up to a cutoff, one after the other."""
    waves, (ny, nx) = np.fft.fft2(fields, norm="forward"), fields.shape[1:]
    y, x = np.meshgrid(np.arange(n) / n, np.arange(n) / n, indexing="ij")
    out = np.zeros((len(fields), n, n), dtype=complex)
    for ky in range(-(n // 2) + 1, n // 2):
        for kx in range(-(n // 2) + 1, n // 2):
            if np.hypot(ky, kx) <= cutoff:
                out += waves[:, ky % ny, kx % nx, None, None] * np.exp(2j * np.pi * (ky * y + kx * x))
    return out.real


def step_of(factor: int, seed: int = 0) -> int:
    return next(s for s in range(1, 1000) if drawn((1, 2, 4), Draws(seed, s, 1)) == factor)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_coarse_batch_is_of_the_waves_that_its_grid_shows(factor: int) -> None:
    n, count, cutoff = 32, 1500, 13
    field = TorusField((n, n), Kernel("exponential", 0.1), cutoff=cutoff)
    states = torch.randn(count, 1, n, n, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(1, n, n)
    objective = Denoising(
        states, torch.zeros(count, dtype=torch.long), None, 0.5, 0.5 + 1e-9, weights=weights, noise=field, resolutions=(1, 2, 4)
    )
    batch = objective.batch(torch.arange(count), states, Draws(0, step_of(factor), count))
    m = n // factor
    assert batch.x.shape == batch.target.shape == (count, 1, m, m)
    assert batch.weight is not None
    for i, j in ((0, 0), (1, 2), (m - 1, 3)):
        assert batch.weight[0, i, j] == weights[0, factor * i, factor * j]
    clean, noise = recovered(batch)
    np.testing.assert_allclose(clean[:8, 0].numpy(), shown(states[:8, 0].double().numpy(), m, cutoff), atol=1e-4)
    # each wave of the noise has the variance that it has on the fine grid, and not that of others that look like it here
    power = np.abs(np.fft.fft2(noise[:, 0].numpy(), norm="forward")) ** 2
    whole = np.abs(np.fft.fft2(field.covariance().numpy(), norm="forward"))
    for ky in range(-(m // 2) + 1, m // 2):
        for kx in range(-(m // 2) + 1, m // 2):
            expected, found = whole[ky % n, kx % n], power[:, ky % m, kx % m]
            assert abs(found.mean() - expected) <= 5 * np.sqrt(2 / count) * expected + 1e-10
    assert power[:, m // 2].max() < 1e-10


def test_resolutions_are_drawn_by_seed_and_step_for_equal_time() -> None:
    factors, steps = (1, 2, 4), range(1, 3001)
    found = [drawn(factors, Draws(5, s, 4)) for s in steps]
    assert found == [drawn(factors, Draws(5, s, 4, part=(1, 2))) for s in steps]  # all processes the same one
    assert found != [drawn(factors, Draws(6, s, 4)) for s in steps]
    counts = Counter(found)
    for f in factors:
        share = f**2 / 21
        assert abs(counts[f] - 3000 * share) < 4 * np.sqrt(3000 * share * (1 - share))
    assert step_cost(factors) == pytest.approx(sum(f**2 / 21 / f**2 for f in factors))
    assert step_cost((1,)) == 1.0
    assert {drawn(factors, Draws(s, 0, 4)) for s in range(1000, 1020)} == {1}  # validation


def test_one_resolution_draws_what_it_always_did() -> None:
    """The numbers of a batch, and so all trainings, are those of a training that knows nothing of resolutions."""
    field, states = TorusField((8, 8), Kernel("exponential", 0.1)), torch.randn(4, 1, 8, 8)
    batch = Denoising(states, torch.zeros(4, dtype=torch.long), None, 0.1, 10.0, noise=field).batch(
        torch.arange(4), states, Draws(3, 7, 4)
    )
    draws = Draws(3, 7, 4)
    draws.integers(48)
    _, noise = recovered(batch)
    torch.testing.assert_close(noise, field.root(draws.normal((1, 8, 8))).double(), atol=2e-4, rtol=1e-4)


def loss(denoiser: Denoiser, factor: int) -> float:
    """Return the error of a denoiser on a coarse grid over the least possible one, that of the Gaussian, at some noise levels."""
    m, count = N // factor, 400
    keys = [(9, "test", k) for k in range(count)]
    noise = TorusField((N, N), Kernel("exponential", 0.1), cutoff=7)
    states, coloured = PRIOR.draw(NoiseStream(keys)).numpy(), noise.draw(NoiseStream([(10, *k[1:]) for k in keys])).numpy()
    clean, noise_there = (shown(x, m, 7) for x in (states, coloured))
    signal, spectrum = (np.abs(np.fft.fft2(f.covariance().numpy(), norm="forward")) for f in (PRIOR, noise))
    out = []
    for sigma in (0.3, 1.0, 3.0):
        x = torch.as_tensor(clean + sigma * noise_there).float()[:, None]
        with torch.no_grad():
            found = denoiser(x, sigma)[:, 0].numpy()
        least = 0.0  # S N / (S + N) of each wave that the coarse grid shows
        for ky in range(-(m // 2) + 1, m // 2):
            for kx in range(-(m // 2) + 1, m // 2):
                s, e = signal[ky % N, kx % N], sigma**2 * spectrum[ky % N, kx % N]
                least += s * e / (s + e) if s + e > 0 else 0.0
        out.append(((found - clean) ** 2).mean() / least)
    return float(np.mean(out))


@pytest.mark.slow
def test_what_is_learnt_on_the_coarse_grid_is_what_it_teaches(fields: xr.Dataset) -> None:
    """One network is nearer to the best there is, on either grid, than the skip connection that it began as."""
    model = xgenda.train(fields, steps=200, learning_rate=0.01, **FAST)
    assert isinstance(model, DiffusionModel)
    network = model.denoiser.network
    assert isinstance(network, UNO)
    assert network.resolution is None
    assert float(model.scaling.std.mean()) == pytest.approx(1.0, abs=0.1)  # denoisers are of standardised states
    for factor in (1, 2):
        untrained = loss(lambda x, sigma: x / (1 + sigma**2), factor)
        assert loss(model.denoiser, factor) - 1 < 0.75 * (untrained - 1)


def test_the_model_is_one_of_the_grid_of_the_data(fields: xr.Dataset, tmp_path: Path) -> None:
    model = xgenda.train(fields, steps=2, out=tmp_path / "m.safetensors", **FAST)
    assert isinstance(model, DiffusionModel)
    assert model.spec.grid is not None
    assert model.spec.grid.plane == (N, N)
    assert model.spec.options["network"]["resolution"] is None
    assert model.spec.training["resolutions"] == "16 x 16, 8 x 8 cells"
    assert model.refined(2).spec.options["network"]["resolution"] == [N, N]  # of which it goes on to know no other scale
    again = xgenda.load_model(tmp_path / "m.safetensors")
    assert again.sha256 == model.sha256
    with pytest.raises(xgenda.errors.GendaError, match="resolutions"):
        xgenda.train(fields, steps=2, out=tmp_path / "m.safetensors", resume=True, **{**FAST, "resolutions": (1,)})


def test_an_interrupted_training_ends_with_the_same_bits(fields: xr.Dataset, tmp_path: Path) -> None:
    def stop(report: Any) -> None:
        raise KeyboardInterrupt

    def weights(**options: Any) -> dict[str, torch.Tensor]:
        model = xgenda.train(fields, **{"steps": 40, **FAST, **options})
        assert isinstance(model, DiffusionModel)
        return model.denoiser.network.state_dict()

    whole, out = weights(), tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt) as found:
        weights(out=out, callbacks=[stop])
    assert found.value.__notes__[0].startswith(
        "Stopped at step 34. "
    )  # seldom enough for steps that cost two fifths of one on the fine grid
    resumed, other = weights(out=out, resume=True), weights(seed=1, steps=2)
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())
    assert any(not torch.equal(v, other[k]) for k, v in whole.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolutions": 2}, r"resolutions=2 is not accepted; .*with 1 among them.*: resolutions=\(1, 2, 4\)"),
        ({"resolutions": (2, 4)}, "with 1 among them"),
        ({"resolutions": (1, 2, 2)}, "give different whole numbers"),
        ({"resolutions": (1, 0.5)}, "give different whole numbers"),
        ({"resolutions": (1, True)}, "give different whole numbers"),
        ({"architecture": "unet", "network_options": None}, "architecture='unet' is another one; pass architecture='uno' too"),
        ({"noise": None}, "white noise is another one on each; pass noise="),
        (
            {"task": "autoencoder", "architecture": "unet", "network_options": None},
            r"resolutions=\(1, 2\) belongs to task='prior'",
        ),
        ({"network_options": {"resolution": 16}}, "network_options has 'resolution', one grid for all. Leave one of them out"),
        ({"resolutions": (1, 3)}, r"16 x 16 cells cannot be divided by 3. Choose from \[1, 2\]: resolutions=\(1, 2\)"),
        ({"resolutions": (1, 4)}, r"4 x 4 rows and columns are fewer than the least, 8. Choose from \[1, 2\]"),
        ({"network_options": {"modes": 9}}, r"8 x 8 rows.* fewer than the modes.*network_options=\{'modes': 9\}. Leave it out"),
        ({"window": 3}, "window=3; leave one of them out"),
        ({"tile": 8}, "leave out tile"),
        ({"start": "model"}, "cannot be combined with start"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_what_does_not_go_with_it_is_refused(fields: xr.Dataset, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        xgenda.train(fields, steps=1, out=tmp_path / "m.safetensors", **{**FAST, **options})
    assert not list(tmp_path.iterdir())  # before anything is begun


def test_masked_cells_are_refused(fields: xr.Dataset) -> None:
    land = fields.where((fields.latitude > 30.15) | (fields.longitude > 0.15))
    with pytest.raises(OptionError, match=r"resolutions=\(1, 2\) cannot be had of fields with masked cells"):
        xgenda.train(land, steps=1, **FAST)

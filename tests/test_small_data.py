"""What training and Gaussian priors do with little data: hybrid covariances, the choice of a climatology, the verdict, scores of a posterior."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import norm

import xgenda
from xgenda.diffusion import hybrids
from xgenda.diffusion.anchors import Modes, anchor_tensors, read_anchor
from xgenda.diffusion.covariances import LocalisedSample, SphereKernel, matrix_root
from xgenda.diffusion.denoisers import EDMDenoiser, GaussianDenoiser
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.hybrids import HybridSample, Parts, Product, hybrid_modes, kernel_modes, taper_modes
from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import LittleDataWarning
from xgenda.models import gaussian
from xgenda.models.fitting import choose_climatology, memory_length, outside
from xgenda.models.variables import VariableSpec
from xgenda.training.defaults import independent_fields
from xgenda.training.scoring import beside_gaussian, fair_crps, posterior_crps
from xgenda.training.windows import memory_of, near_blocks, split_rows

LATITUDE, LONGITUDE = torch.linspace(30, 60, 7), torch.linspace(0, 40, 9)
CELLS = len(LATITUDE) * len(LONGITUDE)
EVERYTHING = torch.arange(2 * CELLS)


def kernel(kind: str, length: float) -> SphereKernel:
    return SphereKernel(LATITUDE, LONGITUDE, kind, length)


def anomalies(n: int = 12, seed: int = 0) -> torch.Tensor:
    """Smooth fields of two correlated channels, with a masked cell."""
    rng = torch.Generator().manual_seed(seed)
    root = matrix_root(kernel("matern32", 1500e3).correlation(EVERYTHING[:CELLS], EVERYTHING[:CELLS]))
    a, b = (torch.randn(n, CELLS, generator=rng, dtype=torch.float64) @ root.T for _ in range(2))
    z = torch.cat([a, 0.6 * a + 0.8 * b], 1) * torch.linspace(0.5, 2, 2 * CELLS)
    z[:, [5, CELLS + 5]] = 0.0
    return z - z.mean(0)


def hybrid(weight: float = 0.3, taper: float | None = 3000e3, inflation: float = 1.5) -> HybridSample:
    within = None if taper is None else kernel("gaspari-cohn", taper)
    return HybridSample(anomalies(), kernel("exponential", 800e3), weight, inflation, within)


@pytest.mark.parametrize("taper", [None, 3000e3])
def test_a_hybrid_is_the_blend_of_sample_and_function(taper: float | None) -> None:
    z, w, i = anomalies().numpy(), 0.3, 1.5
    sample = np.cov(z.T)
    std = np.sqrt(np.diag(sample))
    kept = np.flatnonzero(std[:CELLS])
    unit = z[:, np.concatenate([kept, CELLS + kept])] / std[np.concatenate([kept, CELLS + kept])] / np.sqrt(len(z) - 1)
    between = float((unit[:, : len(kept)] * unit[:, len(kept) :]).sum(0).mean())
    distance = kernel("exponential", 800e3).correlation(EVERYTHING[:CELLS], EVERYTHING[:CELLS]).numpy()
    function = np.kron([[1, between], [between, 1]], distance) * np.outer(std, std)
    if taper is not None:
        inside = kernel("gaspari-cohn", taper).correlation(EVERYTHING[:CELLS], EVERYTHING[:CELLS]).numpy()
        sample = sample * np.kron(np.ones((2, 2)), inside)
    found = hybrid(w, taper, i)
    np.testing.assert_allclose(found.block(EVERYTHING, EVERYTHING), i * ((1 - w) * sample + w * function), atol=1e-12)
    np.testing.assert_allclose(found.diagonal(), i * std**2, atol=1e-12)


def test_a_hybrid_of_weight_zero_is_the_localised_sample() -> None:
    localised = LocalisedSample(anomalies(), kernel("gaspari-cohn", 3000e3), 1.5).block(EVERYTHING, EVERYTHING)
    np.testing.assert_allclose(hybrid(0.0).block(EVERYTHING, EVERYTHING), localised, atol=1e-12)


@pytest.mark.parametrize("taper", [None, 3000e3])
def test_draws_have_the_covariance(taper: float | None) -> None:
    covariance = hybrid(0.3, taper)
    drawn = covariance.draw(NoiseStream([(0, "draws", m) for m in range(4000)])).numpy()
    exact = covariance.block(EVERYTHING, EVERYTHING).numpy()
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert np.abs(drawn.T @ drawn / len(drawn) - exact).max() < 0.1 * scale.max()
    assert np.abs((drawn.T @ drawn / len(drawn) - exact) / np.maximum(scale, 1e-9)).mean() < 0.02


def test_a_modulated_product_is_the_tapered_sample() -> None:
    """The product of an operator that never makes the matrix is that of the matrix, where no mode is left out."""
    covariance = hybrid()
    assert covariance.taper is not None
    full = kernel_modes(covariance.taper, CELLS)
    product = Product(covariance, kernel_modes(covariance.kernel, CELLS), full)
    exact = covariance.block(EVERYTHING, EVERYTHING)
    np.testing.assert_allclose(product(torch.eye(2 * CELLS)), exact, atol=2e-5)
    cut = taper_modes(covariance.taper)
    assert cut.shape[1] < CELLS
    np.testing.assert_allclose(cut.norm(dim=1), 1.0)  # what is left out of a taper takes no variance


def test_the_iteration_finds_the_leading_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    covariance = hybrid()
    exact = torch.linalg.eigvalsh(covariance.block(EVERYTHING, EVERYTHING)).flip(0)
    dense = hybrid_modes(covariance, 20)
    np.testing.assert_allclose(dense.power.flip(0), exact[:20], rtol=1e-9)
    monkeypatch.setattr(hybrids, "LANDMARKS", CELLS)  # below the size of the state, so that it is iterated
    monkeypatch.setattr(hybrids, "TAPER_SHARE", 0.9999)
    parts = Parts.of(covariance)
    found = hybrid_modes(covariance, 20, parts)
    np.testing.assert_allclose(found.power.flip(0)[:12], exact[:12], rtol=0.02)
    again = hybrid_modes(covariance, 20, Parts(parts.modes, parts.taper, found.factor))
    np.testing.assert_allclose(again.power.flip(0)[:12], exact[:12], rtol=0.02)
    for modes in (dense, found, again):  # what the modes leave is kept as a floor
        assert float(modes.diagonal().sum()) == pytest.approx(float(covariance.diagonal().sum()), rel=1e-6)
        np.testing.assert_allclose(modes.factor.T @ modes.factor, torch.diag(modes.power), atol=1e-5 * float(exact[0]))


def test_landmarks_give_nearly_the_covariance_function(monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = kernel("matern52", 2000e3)
    exact = smooth.correlation(EVERYTHING[:CELLS], EVERYTHING[:CELLS])
    monkeypatch.setattr(hybrids, "LANDMARKS", 40)
    modes = kernel_modes(smooth, 40)
    assert float((modes @ modes.T - exact).abs().max()) < 0.05
    assert float(torch.linalg.eigvalsh(exact - modes @ modes.T)[0]) > -1e-9


@pytest.mark.parametrize("sigma", [0.02, 0.7, 30.0])
def test_modes_with_a_floor_given_noise_are_the_inverse(sigma: float) -> None:
    modes = hybrid_modes(hybrid(), 10)
    assert modes.floor > 0
    matrix = modes.block(EVERYTHING, EVERYTHING)
    exact = torch.linalg.inv(torch.linalg.inv(matrix) + torch.eye(len(matrix)) / sigma**2)
    given = modes.given_noise(sigma)
    np.testing.assert_allclose(given.multiply(torch.eye(len(matrix), dtype=torch.float64)), exact, atol=1e-9)
    np.testing.assert_allclose(given.variance, torch.diagonal(exact), atol=1e-9)
    some = torch.tensor([3, 50, 90])
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(given.observed(some, weights), weights @ exact[some][:, some] @ weights.T, atol=1e-9)


def test_modes_with_a_floor_are_stored() -> None:
    modes = hybrid_modes(hybrid(), 10)
    again = read_anchor(anchor_tensors(modes))
    assert isinstance(again, Modes)
    assert again.floor == pytest.approx(modes.floor, rel=1e-6)
    np.testing.assert_allclose(again.block(EVERYTHING, EVERYTHING), modes.block(EVERYTHING, EVERYTHING), atol=1e-5)


def monthly(n: int, seasonal: float, seed: int = 0) -> tuple[np.ndarray, xr.DataArray]:
    time = xr.DataArray(np.datetime64("1990-01", "M") + np.arange(n), dims="time").astype("datetime64[ns]")
    time = time.assign_coords(time=time)["time"]
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 30)) + seasonal * np.cos(2 * np.pi * time.dt.month.values / 12)[:, None]
    return z - z.mean(0), time


def test_a_cycle_is_found_and_noise_has_none() -> None:
    z, time = monthly(96, 0.8)
    fold = np.arange(96) // 16
    assert choose_climatology(z, time, fold) == "dayofyear"
    assert choose_climatology(z, None, fold) == "none"
    assert choose_climatology(monthly(96, 0.0)[0], time, fold) == "none"
    hourly = xr.DataArray(np.datetime64("2000-03-01", "ns") + np.arange(96) * np.timedelta64(1, "h"), dims="time", name="time")
    wave = np.sin(2 * np.pi * np.arange(96) / 24)[:, None] + 0.5 * np.random.default_rng(1).standard_normal((96, 30))
    assert choose_climatology(wave - wave.mean(0), hourly, fold) == "hour"
    year, within = monthly(20, 3.0)
    assert choose_climatology(year, within, np.arange(20) // 4) == "none"  # a year and a half shows no cycle
    few, when = monthly(8, 3.0)
    assert choose_climatology(few, when, np.arange(8) // 2) == "none"  # too few for its coefficients


def test_memory_takes_from_the_worth_of_fields() -> None:
    """An AR(1) process of coefficient a is worth N (1 - a^2) / (1 + a^2) independent fields, for its covariance."""
    rng, a = np.random.default_rng(0), 0.8
    patterns = rng.standard_normal((5, 60))
    z = rng.standard_normal((2000, 5))
    assert independent_fields(z @ patterns) == pytest.approx(2000, rel=0.12)
    for t in range(1, len(z)):
        z[t] = a * z[t - 1] + np.sqrt(1 - a**2) * z[t]
    wanted = 2000 * (1 - a**2) / (1 + a**2)
    assert independent_fields(z @ patterns) == pytest.approx(wanted, rel=0.15)
    trend = np.linspace(-3, 3, 2000)[:, None] * np.ones(60)
    assert independent_fields(z @ patterns + trend) == pytest.approx(wanted, rel=0.25)


def test_neighbours_that_tell_of_each_other_are_left_out() -> None:
    rng = np.random.default_rng(0)
    fold = np.arange(120) // 20
    white = rng.standard_normal((120, 4)) @ rng.standard_normal((4, 50))
    assert memory_length(white, fold) == 0
    slow = np.repeat(white[::4], 4, axis=0)  # a lag of three keeps a quarter of the variance
    assert memory_length(slow, fold) in (2, 3)
    assert memory_length(np.repeat(white[::40], 40, axis=0), fold) == 10  # half a block
    shuffled = rng.permutation(120)
    time = xr.DataArray(np.datetime64("2000-01-01", "ns") + shuffled * np.timedelta64(1, "D"), dims="time")
    assert memory_of(slow[shuffled], time) == memory_length(slow, fold)
    near = near_blocks(fold[shuffled], time, 3)[2]
    np.testing.assert_array_equal(np.sort(shuffled[near]), [37, 38, 39, 60, 61, 62])
    np.testing.assert_array_equal(np.flatnonzero(outside(fold, 2, 3)), [*range(37), *range(63, 120)])
    rows, held = split_rows(fold, gap=3)
    assert held.tolist() == list(range(80, 100))
    assert rows.tolist() == [*range(77), *range(103, 120)]


def test_a_day_of_hours_is_said_to_be_little() -> None:
    rng = np.random.default_rng(1)
    slow = np.cumsum(rng.standard_normal((40, 4, 6)), 0)
    hours = np.datetime64("2001-05-01", "ns") + np.arange(40) * np.timedelta64(1, "h")
    ds = xr.Dataset(
        {"t2m": (("time", "latitude", "longitude"), slow, {"units": "K"})},
        {"time": hours, "latitude": 40.0 + np.arange(4), "longitude": 5.0 + np.arange(6)},
    )
    with pytest.warns(LittleDataWarning, match=r"40 fields .* worth about \d independent .*gaussian_prior") as caught:
        xgenda.train(ds, steps=1, width=8, progress=False)
    assert caught[0].filename == __file__  # the line of the user


class Zero(torch.nn.Module):
    """A network that says nothing."""

    def forward(self, x: torch.Tensor, label: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return torch.zeros_like(x)


def test_the_posterior_score_of_a_gaussian_is_that_of_its_closed_form() -> None:
    anchor = hybrid_modes(hybrid(taper=None), 2 * CELLS)
    states = anchor.draw(NoiseStream([(1, "truth", t) for t in range(4)])).reshape(4, 2, 7, 9)
    valid = np.ones((2, 7, 9), bool)
    valid[:, 0, 5] = False
    std = np.array([2.0, 0.5]).reshape(2, 1, 1)
    gaussian = GaussianDenoiser(torch.zeros(2 * CELLS), anchor)
    options = {"std": std, "valid": valid, "share": 0.15, "members": 300, "steps": 24}
    found = posterior_crps({"gaussian": gaussian, "model": EDMDenoiser(Zero(), anchor)}, anchor, states, **options)
    torch.testing.assert_close(found["gaussian"], found["model"], atol=1e-6, rtol=1e-6)  # a correction of nothing changes nothing
    # the same in closed form: the mean of the CRPS of N(m, v), with the network that the score draws
    generator = torch.Generator().manual_seed(0)
    sea = torch.nonzero(torch.as_tensor(valid).reshape(2, -1).any(0))[:, 0]
    seen = sea[torch.randperm(len(sea), generator=generator)[: round(0.15 * len(sea))]]
    where = torch.cat([seen, CELLS + seen])
    value = states.reshape(4, -1)[:, where] + 0.25 * torch.randn(4, len(where), generator=generator, dtype=torch.float64)
    solver = GaussianPosterior(anchor, where[:, None], torch.ones(len(where), 1), torch.full((len(where),), 0.25**2))
    mean = torch.stack([solver.mean(torch.zeros(2 * CELLS), v) for v in value])
    deviation = solver.variance().clamp(min=1e-12).sqrt()
    u = ((states.reshape(4, -1) - mean) / deviation).numpy()
    exact = deviation.numpy() * (u * (2 * norm.cdf(u) - 1) + 2 * norm.pdf(u) - 1 / np.sqrt(np.pi))
    left = valid.reshape(2, -1).copy()
    left[:, seen] = False
    wanted = std[:, 0, 0] * np.stack([exact.reshape(4, 2, -1)[:, c][:, left[c]].mean(1) for c in range(2)], 1)
    np.testing.assert_allclose(found["gaussian"], wanted, rtol=0.08)
    assert found["gaussian"].mean() == pytest.approx(wanted.mean(), rel=0.03)


def test_a_wrong_correction_scores_worse() -> None:
    class One(Zero):
        def forward(self, x: torch.Tensor, label: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
            return 0.7 * torch.ones_like(x)

    anchor = hybrid_modes(hybrid(taper=None), 2 * CELLS)
    states = anchor.draw(NoiseStream([(1, "truth", t) for t in range(3)])).reshape(3, 2, 7, 9)
    nothing, harm = (beside_gaussian(n, anchor, states, feeds_state=False) for n in (Zero(), One()))
    assert nothing.gain == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(harm.gaussian, nothing.gaussian)  # the same observations and random numbers
    assert harm.worse
    assert harm.gain < -0.05
    assert bool((harm.model > harm.gaussian).all())
    assert "gain -" in harm.describe()
    variables = [VariableSpec("t2m", units="K"), VariableSpec("ratio", units="1")]
    (a, b), (c, d) = harm.model.tolist(), harm.gaussian.tolist()
    words = f"CRPS of withheld states: t2m {a:.4g} (Gaussian {c:.4g}) K, ratio {b:.4g} (Gaussian {d:.4g}); gain -"
    assert harm.describe(variables).startswith(words)
    with pytest.raises(ValueError, match="zip"):
        harm.describe(variables[:1])


def test_crps_of_members_is_that_of_all_pairs() -> None:
    members, truth = torch.randn(2, 5, 1, 3, dtype=torch.float64), torch.randn(2, 1, 1, 3, dtype=torch.float64)
    pairs = (members[:, :, None] - members[:, None]).abs().sum((1, 2)) / (2 * 5 * 4)
    torch.testing.assert_close(fair_crps(members, truth), (members - truth).abs().mean(1) - pairs)


def history(n: int = 40) -> xr.Dataset:
    """Fields with a correlation of 1500 km and a mode that is the same everywhere."""
    z = anomalies(n, 3)[:, :CELLS].reshape(n, 7, 9).numpy()
    z = z - z.mean((1, 2), keepdims=True) + np.random.default_rng(0).standard_normal((n, 1, 1))
    days = np.datetime64("2001-01-01", "ns") + 10 * np.arange(n) * np.timedelta64(1, "D")
    axes = {"time": days, "latitude": LATITUDE.numpy(), "longitude": LONGITUDE.numpy()}
    return xr.Dataset({"x": (("time", "latitude", "longitude"), z + 0.0, {"units": "m"})}, axes)


def test_a_hybrid_prior_is_kept_in_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    ds = history()
    prior = xgenda.gaussian_prior(ds, covariance="hybrid")
    options = prior.spec.options
    assert options["covariance"] == "hybrid"
    assert {"kernel", "length", "weight", "inflation"} <= set(options)
    assert prior.spec.training["climatology"] == "none"
    assert prior.spec.training["covariance"].startswith("hybrid, ")
    path = tmp_path / "hybrid.safetensors"
    prior.save(path)
    again = xgenda.load_model(path)
    obs = xr.Dataset(
        {"x": ("obs", [1.0, -0.5], {"units": "m"})}, {"latitude": ("obs", [35.0, 50.0]), "longitude": ("obs", [10.0, 30.0])}
    )
    given = {"error": 0.2, "members": 400, "seed": 0, "progress": False, "background_check": None}
    state = ds.isel(time=0)
    one, two = (xgenda.assimilate(state, obs, model=m, **given) for m in (prior, again))
    np.testing.assert_allclose(one.x, two.x, atol=1e-4)
    # the mean in closed form, at the two cells that were observed
    covariance = prior.covariance()
    at = torch.tensor([1 * 9 + 2, 4 * 9 + 6])
    s = covariance.block(at, at).numpy() * float(prior.spec.scaling.std.item()) ** 2
    mean = prior.spec.scaling.mean[0].ravel()[at]
    exact = mean + s @ np.linalg.solve(s + 0.04 * np.eye(2), np.array([1.0, -0.5]) - mean)
    found = one.x.sel(latitude=[35, 50], longitude=[10, 30]).mean("member").values
    np.testing.assert_allclose([found[0, 0], found[1, 1]], exact, atol=0.05)


def test_training_takes_a_hybrid_where_it_is_better() -> None:
    model = xgenda.train(history(), steps=1, width=8, learning_rate=1e-30, progress=False)
    assert model.spec.training["anchor"].startswith("hybrid, ")
    assert isinstance(model.covariance, Modes)
    total = float(model.covariance.diagonal().sum())
    assert model.covariance.floor * model.covariance.size < 0.05 * total


def test_runs_of_the_same_times_share_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs one after the other: what is fitted without a block has neither of them near its times."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((2, 60, 5, 6)).cumsum(1)
    days = np.datetime64("2001-01-01", "ns") + np.arange(60) * np.timedelta64(1, "D")
    coords = {"time": days, "latitude": 40.0 + np.arange(5), "longitude": 5.0 + np.arange(6)}
    runs = [xr.Dataset({"t2m": (("time", "latitude", "longitude"), v, {"units": "K"})}, coords) for v in values]
    seen = []
    found = gaussian.search

    def search(z: np.ndarray, grid: object, choices: list, fold: np.ndarray, *rest: object) -> object:  # type: ignore[type-arg]
        seen.append((fold, rest[2]))
        return found(z, grid, choices, fold, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gaussian, "search", search)
    xgenda.gaussian_prior(xr.concat(runs, "time"), climatology="none")
    ((fold, away),) = seen
    np.testing.assert_array_equal(fold[:60], fold[60:])
    np.testing.assert_array_equal(away[:, :60], away[:, 60:])
    assert (away & (fold == np.arange(5)[:, None])).sum() == 0
    assert away.sum() < 4 * 120  # and a gap

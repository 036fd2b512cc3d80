"""An observing-system simulation of the ocean twin: tracks, a swath, cloudy temperature and a blurred product, all in one operator.

python docs/benchmarks/ocean_osse.py [--dates 20] [--members 16]

The truth are five runs of the quasi-geostrophic twin with seeds that no training run had, at dates 24 days apart. Every date has

- sea surface height under five nadir tracks, error 2 cm, and in one swath of 8 cells (120 km) with a gap at nadir, error 3 cm;
- temperature where there is no cloud (60 % cover), error 0.3 K;
- height, temperature and salinity under a Gaussian footprint of 30 km at every fifth cell, errors 2 cm, 0.2 K and 0.06: a
  low-resolution product. Velocity is never observed.

Beside the diffusion prior stand two optimal interpolations with the covariances of the same training fields, homogeneous, fitted in
spectral space: of every variable on its own, and of all together, in closed form (mean by conjugate gradients to 1e-6, members by
Matheron's rule). The second is the posterior of the model's own Gaussian anchor.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.anchors import Spectral, SpectralConditional
from xgenda.diffusion.evidence import LinearEvidence
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.samplers import network_calls
from xgenda.diffusion.solvers import conjugate_gradients
from xgenda.maps import LinearMap, concatenate, gaussian_footprint
from xgenda.models.diffusive import DiffusionModel, stack_evidence
from xgenda.models.generative import PointEvidence, Request, SamplingOptions
from xgenda.observations.networks import clouds, nadir_tracks, swath
from xgenda.verification import fair_crps

NAMES = ("ssh", "temperature", "salinity", "u", "v")
ERRORS = {"track": 0.02, "swath": 0.03, "cloudy": 0.3, "low": (0.02, 0.2, 0.06)}
TRUTH_SEEDS = (95, 96, 97, 98, 99)


def observe(truth: np.ndarray, model: DiffusionModel, rng: np.random.Generator) -> PointEvidence:
    """Return the observations of one field (channels, ny, nx)."""
    grid = model.spec.grid
    assert grid is not None
    shape, cells, size = grid.shape, grid.size, grid.size * len(NAMES)
    maps, errors = [], []

    def add(indices: np.ndarray, channel: int, error: float) -> None:
        maps.append(LinearMap.from_rows(indices.reshape(-1, 1) + channel * cells, np.ones((indices.size, 1)), size))
        errors.append(np.full(indices.size, error))

    add(np.flatnonzero(nadir_tracks(shape, 5, rng)), 0, ERRORS["track"])
    add(np.flatnonzero(swath(shape, 8.0, rng, gap=1.5)), 0, ERRORS["swath"])
    add(np.flatnonzero(~clouds(shape, 0.6, rng)), 1, ERRORS["cloudy"])
    low = np.arange(cells).reshape(shape)[2::5, 2::5].ravel()
    footprint = gaussian_footprint(grid, low, 30e3, wrap=True)
    for channel, error in enumerate(ERRORS["low"]):
        maps.append(footprint.shifted(channel * cells, size))
        errors.append(np.full(low.size, error))
    operator, error = concatenate(maps), np.concatenate(errors)
    value = operator(truth.ravel()) + error * rng.standard_normal(len(error))
    return PointEvidence(
        torch.as_tensor(operator.indices), torch.as_tensor(operator.weights), torch.as_tensor(value), torch.as_tensor(error**2)
    )


def affine(model: DiffusionModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return climatology and standard deviation of the flat state."""
    assert model.spec.grid is not None
    shape = (len(NAMES), *model.spec.grid.shape)
    mean = torch.as_tensor(np.broadcast_to(model.scaling.mean[0], shape).copy()).flatten()
    return mean, torch.as_tensor(np.broadcast_to(model.scaling.std, shape).copy()).flatten()


def optimal_interpolation(
    model: DiffusionModel, evidence: PointEvidence, covariance: Spectral, members: int, label: str
) -> np.ndarray:
    """Return exact members of the Gaussian posterior, shape (members, channels, ny, nx), and the mean as the last."""
    mean, std = affine(model)
    linear: LinearEvidence = stack_evidence(
        [evidence], [(mean, std)], model.scaling, torch.zeros(members + 1, dtype=torch.long), len(mean) // len(NAMES)
    )
    noise = NoiseStream([(5, label, k) for k in range(members)])
    prior = torch.cat([covariance.draw(noise), torch.zeros(1, covariance.size, dtype=torch.float64)])
    root = linear.variance.sqrt()
    perturbation = torch.cat([noise.normal(len(evidence.value), dtype=torch.float64), torch.zeros(1, len(evidence.value))]) * root
    tangent = linear.tangent(prior)
    spread = SpectralConditional(covariance.spectrum, covariance.shape, 1.0).multiply
    target = (linear.value + perturbation - linear.observe(prior)) / root
    solved = conjugate_gradients(lambda v: v + tangent.forth(spread(tangent.back(v / root))) / root, target, 1000, tolerance=1e-6)
    state = prior + spread(tangent.back(solved / root))
    return (state * std + mean).reshape(members + 1, *covariance.shape).numpy()


def sample(
    model: DiffusionModel, evidence: list[PointEvidence], labels: list[str], members: int, asked: SamplingOptions
) -> np.ndarray:
    """Return members of the diffusion posterior, shape (dates, members, channels, ny, nx)."""
    mean, _ = affine(model)
    assert model.spec.grid is not None
    climatology = mean.reshape(1, len(NAMES), -1).expand(len(labels), -1, -1)
    request = Request(
        model.spec.grid, climatology, climatology, evidence, labels, range(members), 0, model.plan(asked), torch.device("cpu"),
        lambda _: None,
    )  # fmt: skip
    return model.posterior(request).reshape(len(labels), members, len(NAMES), *model.spec.grid.shape).numpy()


def spectrum(fields: np.ndarray) -> np.ndarray:
    """Return the isotropic power spectrum of fields (..., ny, nx), averaged over everything else, by whole wavenumber."""
    n = fields.shape[-1]
    power = np.abs(np.fft.fft2(fields - fields.mean((-1, -2), keepdims=True))) ** 2
    power = power.reshape(-1, n, n).mean(0)
    k = np.fft.fftfreq(n, 1 / n)
    ring = np.round(np.hypot(k[:, None], k)).astype(int).ravel()
    return np.bincount(ring, power.ravel()) / np.bincount(ring)


def report(name: str, ensemble: np.ndarray, truth: np.ndarray, seconds: float, mean: np.ndarray | None = None) -> None:
    """Print one row per variable."""
    members = ensemble.shape[1]
    mean = ensemble.mean(1) if mean is None else mean
    top = truth.shape[-1] // 4  # wavelengths down to 4 cells
    for c, variable in enumerate(NAMES):
        t, e, m = truth[:, c], ensemble[:, :, c], mean[:, c]
        rmse = np.sqrt(((m - t) ** 2).mean())
        spread = np.sqrt(e.var(1, ddof=1).mean() * (members + 1) / members)
        own_rmse = np.sqrt(((e.mean(1) - t) ** 2).mean())
        r2 = 1 - rmse**2 / t.var()
        crps = fair_crps(e.transpose(1, 0, 2, 3), t).mean()
        true, of_members, of_mean = (spectrum(x)[1 : top + 1] for x in (t, e, m))
        ratio, smooth = of_members / true, of_mean / true
        print(
            f"| {name} | {variable} | {rmse:.4f} | {r2:.3f} | {crps:.4f} | {spread / own_rmse:.2f} "
            f"| {ratio.min():.2f}-{ratio.max():.2f} | {smooth.min():.2f}-{smooth.max():.2f} | {seconds:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ocean-twin")
    parser.add_argument("--dates", type=int, default=20)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument(
        "--samplers", nargs="*", default=["heun:24", "heun:18", "dpm++:12"], help="each a name and a number of levels"
    )
    parser.add_argument("--picture", default=None, help="file for a picture of the first date")
    options = parser.parse_args()
    model = xgenda.load_model(options.model)
    assert isinstance(model, DiffusionModel)
    assert isinstance(model.covariance, Spectral)
    count = -(-options.dates // len(TRUTH_SEEDS))
    runs = [xgenda.tutorial.simulate_ocean(count, every="24D", start=f"{2020 + s}-01-01", seed=s) for s in TRUTH_SEEDS]
    ds = xr.concat(runs, "time").isel(time=slice(options.dates))
    truth = np.stack([ds[n].values for n in NAMES], 1).astype(float)
    labels = [str(t) for t in ds.time.values]
    evidence = [observe(f, model, np.random.default_rng(1000 + k)) for k, f in enumerate(truth)]
    print(f"{options.dates} dates, {options.members} members, {np.mean([len(e.value) for e in evidence]):.0f} observations each")
    print("| method | variable | RMSE | R2 | CRPS | spread/skill | spectrum, members | spectrum, mean | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    own = model.covariance.spectrum * torch.eye(len(NAMES))
    for name, spectrum_of in (("OI, each variable alone", own), ("OI, all together", model.covariance.spectrum)):
        begin = time.perf_counter()
        covariance = Spectral(spectrum_of, model.covariance.shape)
        found = np.stack([
            optimal_interpolation(model, e, covariance, options.members, label) for e, label in zip(evidence, labels, strict=True)
        ])  # fmt: skip
        report(name, found[:, :-1], truth, time.perf_counter() - begin, found[:, -1])
    for way in options.samplers:
        begin = time.perf_counter()
        sampler, steps = way.split(":")
        asked = SamplingOptions(sampler=sampler, steps=int(steps))
        calls = network_calls(sampler, int(steps))
        ensemble = sample(model, evidence, labels, options.members, asked)
        report(f"{model.spec.name}, {sampler}, {calls} calls", ensemble, truth, time.perf_counter() - begin)
        if options.picture and way == options.samplers[0]:
            draw(options.picture, truth[0], ensemble[0], found[0, -1], evidence[0])


def draw(path: str, truth: np.ndarray, ensemble: np.ndarray, interpolated: np.ndarray, evidence: PointEvidence) -> None:
    """Draw truth, observations, optimal interpolation, mean, member and spread of height, temperature and speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 9), layout="constrained")
    axes = figure.subplots(3, 6)
    cells = truth[0].size

    def shown(fields: np.ndarray, row: int) -> np.ndarray:
        return np.hypot(fields[..., 3, :, :], fields[..., 4, :, :]) if row == 2 else fields[..., row, :, :]

    for row, name in enumerate(("height [m]", "temperature [degC]", "speed [m/s]")):
        low, high = np.percentile(shown(truth, row), [0.5, 99.5])
        seen = np.full(cells, np.nan)
        if row < 2:
            index = evidence.indices[:, 0].numpy()
            at = (evidence.weights != 0).sum(1).numpy() == 1
            inside = at & (index // cells == row)
            seen[index[inside] % cells] = evidence.value.numpy()[inside]
        panels = [
            shown(truth, row), seen.reshape(truth[0].shape), shown(interpolated, row), shown(ensemble, row).mean(0),
            shown(ensemble, row)[0],
        ]  # fmt: skip
        for ax, field, title in zip(
            axes[row], panels, ("truth", "observed", "optimal interpolation", "mean", "member 0"), strict=False
        ):
            image = ax.imshow(field, vmin=low, vmax=high, origin="lower", cmap="viridis")
            ax.set(title=f"{title}, {name}" if title == "truth" else title, xticks=[], yticks=[])
        figure.colorbar(image, ax=axes[row, :5], shrink=0.8)
        spread = axes[row, 5].imshow(shown(ensemble, row).std(0), origin="lower", cmap="magma")
        axes[row, 5].set(title="spread", xticks=[], yticks=[])
        figure.colorbar(spread, ax=axes[row, 5], shrink=0.8)
    figure.savefig(path, dpi=70)


if __name__ == "__main__":
    xr.set_options(keep_attrs=True)
    main()

"""Single analyses of a three-level atmosphere from a background: four variables on three levels, with a forecast of two days.

python docs/benchmarks/columns.py [--steps 2000] [--dates 8] [--members 8] [--cache folder]

Quasi-geostrophic turbulence in three layers with one tracer in each, on a doubly periodic square of 6,000 km: height, two velocities and
humidity at 250, 500 and 850 hPa, 12 fields on 96 x 96 cells (62 km), twice as fine as the grid that the flow is computed on. Forecasts begin
two days before the truth that they are for, from the truth plus a tenth of an independent state, with a model of a tenth less shear and a
third more drag. Training is on runs of other seeds. At every date some of the columns are observed, all variables at all levels, at places
drawn anew for every date, with errors of a hundredth of the standard deviation of the forecast error, or of half of it; with `--fewer-aloft`
half of the columns have nothing above 850 hPa.

Scores are RMSE of the ensemble mean over that of the forecast; what a finite ensemble adds to it is taken off. Optimal interpolation has the
spectral Gaussian of the same training errors around the forecast less its mean error, its variance and the errors of the observations tuned on the
last of the training runs, to which it was then not fitted.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.fft
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.anchors import Spectral
from xgenda.grids import EARTH_RADIUS

F0, BETA, GRAVITY = 1e-4, 1.6e-11, 9.81
SIDE, COARSE, FINE = 6e6, 48, 96  # metres, cells of the model, cells of the state
DT, PER_DAY = 450.0, 192
LEVELS = np.array([25000.0, 50000.0, 85000.0])
VARIABLES = {
    "z": {"standard_name": "geopotential_height", "units": "m"},
    "u": {"standard_name": "eastward_wind", "units": "m s-1"},
    "v": {"standard_name": "northward_wind", "units": "m s-1"},
    "q": {"standard_name": "specific_humidity", "units": "g kg-1"},
}
HUMIDITY_GRADIENT = np.array([-0.05e-6, -0.5e-6, -1.5e-6])  # g kg-1 m-1, northward
RELAXATION = 10 * 86400.0
LEAD, EVERY, PERTURBATION = 2, 2, 0.1  # days, days, part of an independent state
TRAINING_SEEDS, TEST_SEEDS = range(8), range(90, 94)
SHARES = (0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 2.0, 4.0)
ERRORS = {"precise": 0.01, "realistic": 0.5}


@dataclass(frozen=True)
class Atmosphere:
    """Three layers of equal depth (Vallis 2017, section 5.4, with one more layer), potential vorticity and a tracer in each.

    States are spectra of shape (6, n, n // 2 + 1).

    Parameters
    ----------
    wind
        Eastward mean flow of the layers from above, m s-1.
    drag
        At the bottom, s-1.
    radius
        F ** -1/2 in metres; the deformation radii are that and that over sqrt(3).
    """

    wind: tuple[float, float, float] = (16.0, 10.0, 4.0)
    drag: float = 1 / (2 * 86400.0)
    radius: float = 450e3

    def __post_init__(self) -> None:
        step = SIDE / COARSE
        k = 2 * np.pi * scipy.fft.rfftfreq(COARSE, step)[None, :]
        l = 2 * np.pi * scipy.fft.fftfreq(COARSE, step)[:, None]  # noqa: E741
        coupling = np.array([[-1.0, 1.0, 0.0], [1.0, -2.0, 1.0], [0.0, 1.0, -1.0]]) / self.radius**2
        square = k**2 + l**2
        matrix = coupling - square[..., None, None] * np.eye(3)
        matrix[0, 0] = np.eye(3)
        inverse = np.linalg.inv(matrix)
        inverse[0, 0] = 0.0
        scaled = np.hypot(k, l) * step
        slope = BETA - coupling @ np.array(self.wind)
        for name, value in {
            "k": k, "l": l, "square": square, "inverse": np.moveaxis(inverse, (0, 1), (2, 3)), "slope": slope,
            "sieve": np.exp(-18.4 * np.maximum(scaled - 0.65 * np.pi, 0.0) ** 4),
        }.items():  # fmt: skip
            object.__setattr__(self, name, value)

    def streamfunction(self, spectrum: np.ndarray) -> np.ndarray:
        """Return the spectra of the streamfunctions, shape (3, n, n // 2 + 1)."""
        return np.einsum("ijyx,jyx->iyx", self.inverse, spectrum[:3])

    def tendency(self, spectrum: np.ndarray) -> np.ndarray:
        """Return the time derivative of a state."""
        psi, mean = self.streamfunction(spectrum), np.array(self.wind)[:, None, None]
        grid = scipy.fft.irfft2(np.concatenate([-1j * self.l * psi, 1j * self.k * psi, spectrum]), s=(COARSE, COARSE))
        u, v, fields = grid[:3] + mean, grid[3:6], grid[6:]
        flux = np.concatenate([np.tile(u, (2, 1, 1)) * fields, np.tile(v, (2, 1, 1)) * fields])
        along = scipy.fft.rfft2(flux)
        change = -1j * self.k * along[:6] - 1j * self.l * along[6:]
        change[:3] -= 1j * self.k * psi * self.slope[:, None, None]
        change[2] += self.drag * self.square * psi[2]
        change[3:] -= 1j * self.k * psi * HUMIDITY_GRADIENT[:, None, None] + spectrum[3:] / RELAXATION
        return change

    def advance(self, spectrum: np.ndarray, days: int) -> np.ndarray:
        """Return the state some days later (Adams-Bashforth of third order, begun anew)."""
        past: list[np.ndarray] = []
        for _ in range(days * PER_DAY):
            past = [self.tendency(spectrum), *past[:2]]
            weights = {1: (1.0,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12)}[len(past)]
            spectrum = (spectrum + DT * sum(w * t for w, t in zip(weights, past, strict=True))) * self.sieve
        return spectrum

    def fields(self, spectrum: np.ndarray) -> np.ndarray:
        """Return the 12 fields of a state on the fine grid, variable by variable."""
        psi = self.streamfunction(spectrum)
        rows = np.concatenate([psi * (F0 / GRAVITY), -1j * self.l * psi, 1j * self.k * psi, spectrum[3:]])
        wide = np.zeros((12, FINE, FINE // 2 + 1), dtype=complex)
        half = COARSE // 2
        wide[:, :half, : half + 1], wide[:, -half:, : half + 1] = rows[:, :half], rows[:, -half:]
        return scipy.fft.irfft2(wide, s=(FINE, FINE)) * (FINE / COARSE) ** 2


NATURE = Atmosphere()
FORECASTER = replace(NATURE, wind=tuple(4.0 + 0.9 * (w - 4.0) for w in NATURE.wind), drag=NATURE.drag * 4 / 3)  # type: ignore[arg-type]


def begun(seed: int) -> np.ndarray:
    """Return a state of the turbulence."""
    noise = np.random.default_rng(seed).standard_normal((6, COARSE, COARSE))
    spectrum = scipy.fft.rfft2(noise) * np.exp(-(((np.hypot(NATURE.k, NATURE.l) * NATURE.radius - 1.0) / 0.4) ** 2) / 2)
    spectrum[:, 0, 0] = spectrum[3:] = 0.0
    u = scipy.fft.irfft2(-1j * NATURE.l * NATURE.streamfunction(spectrum), s=(COARSE, COARSE))
    return NATURE.advance(spectrum * (8.0 / u.std()), 60)


def run(seed: int, count: int, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Return forecasts and truth of a run, each shape (count, 12, rows, columns), `every` days apart."""
    rng, state, other = np.random.default_rng(seed), begun(seed), begun(seed + 1000)
    forecasts, truth = [], []
    for _ in range(count):
        shifted = scipy.fft.rfft2(np.roll(scipy.fft.irfft2(other, s=(COARSE, COARSE)), rng.integers(COARSE, size=2), (1, 2)))
        forecasts.append(FORECASTER.fields(FORECASTER.advance(state + PERTURBATION * shifted, LEAD)))
        later = NATURE.advance(state, LEAD)
        truth.append(NATURE.fields(later))
        state = later if every == LEAD else NATURE.advance(later, every - LEAD)
    return np.stack(forecasts), np.stack(truth)


def simulated(cache: Path | None, seeds: range, count: int, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Return forecasts and truth of several runs, shape (runs, count, 12, rows, columns), kept in a folder where one is given."""
    parts = []
    for seed in seeds:
        file = None if cache is None else cache / f"columns_{seed}_{count}_{every}.npz"
        if file is not None and file.exists():
            with np.load(file, allow_pickle=False) as stored:  # noqa: TID251
                parts.append((stored["forecasts"], stored["truth"]))
            continue
        parts.append(run(seed, count, every))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, forecasts=parts[-1][0].astype("f4"), truth=parts[-1][1].astype("f4"))
    forecasts, truth = (np.stack([p[k] for p in parts]) for k in range(2))
    return forecasts, truth


def dataset(fields: np.ndarray, every: int) -> xr.Dataset:
    """Return fields (n, 12, rows, columns) or (runs, n, ...) as a Dataset, the runs one after the other with the same times."""
    runs = 1 if fields.ndim == 4 else len(fields)
    flat = fields.reshape(-1, len(VARIABLES), len(LEVELS), FINE, FINE)
    degree, offset = math.radians(EARTH_RADIUS), (np.arange(FINE) - (FINE - 1) / 2) * SIDE / FINE
    times = pd.date_range("2000-01-01", periods=len(flat) // runs, freq=f"{every}D")
    return xr.Dataset(
        {n: (("time", "pressure", "latitude", "longitude"), flat[:, c], dict(a)) for c, (n, a) in enumerate(VARIABLES.items())},
        coords={
            "time": np.tile(times.values, runs), "pressure": ("pressure", LEVELS, {"units": "Pa", "standard_name": "air_pressure"}),
            "latitude": 45.0 + offset / degree, "longitude": offset / (degree * math.cos(math.radians(45.0))),
        },
    )  # fmt: skip


def fields_of(ds: xr.Dataset) -> np.ndarray:
    """Return the fields of a Dataset, shape (..., 12, rows, columns)."""
    lead = [d for d in ("member", "time") if d in ds.dims]
    stacked = np.stack([ds[n].transpose(*lead, "pressure", "latitude", "longitude").values for n in VARIABLES], len(lead))
    return stacked.reshape(*stacked.shape[: len(lead)], 12, FINE, FINE)


def seen(share: float, seed: int, fewer_aloft: bool) -> np.ndarray:
    """Return what is observed, shape (12, cells); more columns hold those of fewer."""
    rng = np.random.default_rng(seed)
    order, high = rng.permutation(FINE**2), rng.random(FINE**2) < 0.5
    inside = np.zeros(FINE**2, dtype=bool)
    inside[order[: round(share / 100 * FINE**2)]] = True
    aloft = np.tile(LEVELS < 80000.0, len(VARIABLES))
    return inside & (~aloft[:, None] | high if fewer_aloft else True)


def observed(truth: np.ndarray, mask: np.ndarray, error: np.ndarray, seed: int) -> np.ndarray:
    """Return observations on the grid, NaN where there are none, shape (12, rows, columns)."""
    noise = np.random.default_rng([seed, 1]).standard_normal((12, FINE**2))
    return np.where(mask, truth.reshape(12, -1) + error[:, None] * noise, np.nan).reshape(truth.shape)


@dataclass
class Interpolation:
    """Optimal interpolation around a forecast less its mean error."""

    covariance: Spectral
    unit: np.ndarray
    bias: np.ndarray
    inflation: float = 1.0
    error_factor: float = 1.0

    @classmethod
    def fit(cls, forecasts: np.ndarray, truth: np.ndarray) -> Interpolation:
        """Fit the Gaussian of the errors, shape (n, 12, rows, columns)."""
        left = truth - forecasts
        bias = left.mean((0, 2, 3))
        unit = (left - bias[:, None, None]).std((0, 2, 3))
        return cls(Spectral.fit(torch.as_tensor((left - bias[:, None, None]) / unit[:, None, None])), unit, bias)

    def __call__(self, forecast: np.ndarray, values: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Return the analysis, shape (12, rows, columns)."""
        centre = forecast + self.bias[:, None, None]
        rows = np.flatnonzero(np.isfinite(values.ravel()))
        if not len(rows):
            return centre
        index = torch.as_tensor(rows)
        sizes = np.repeat(self.error_factor * error / self.unit, FINE**2)[rows]
        departure = ((values - centre) / self.unit[:, None, None]).ravel()[rows]
        matrix = self.inflation * self.covariance.block(index, index).numpy() + np.diag(sizes**2)
        spread = torch.zeros(1, values.size, dtype=torch.float64)
        spread[0, index] = torch.as_tensor(np.linalg.solve(matrix, departure))
        wide = self.covariance.given_noise(1e5).multiply(spread)  # with so much noise C is the covariance itself
        return np.asarray(centre + self.unit[:, None, None] * self.inflation * wide.numpy().reshape(centre.shape))


def tuned(forecasts: np.ndarray, truth: np.ndarray, levels: dict[str, np.ndarray], fewer_aloft: bool) -> dict[str, Interpolation]:
    """Return interpolations with inflation and error factor tuned on the last of the runs, for each level of error."""
    fitted = Interpolation.fit(*(a[:-1].reshape(-1, *a.shape[2:]) for a in (forecasts, truth)))
    final = Interpolation.fit(*(a.reshape(-1, *a.shape[2:]) for a in (forecasts, truth)))
    out = {}
    for name, error in levels.items():
        scores = {}
        for inflation in (0.5, 0.7, 1.0, 1.4, 2.0):
            for factor in (0.3, 1.0, 2.0, 4.0, 8.0):
                way, total = replace(fitted, inflation=inflation, error_factor=factor), 0.0
                for k in range(0, len(forecasts[-1]), 15):
                    values = observed(truth[-1, k], seen(1.0, 5000 + k, fewer_aloft), error, 5000 + k)
                    found = way(forecasts[-1, k], values, error)
                    total += float((((found - truth[-1, k]) / fitted.unit[:, None, None]) ** 2).mean())
                scores[inflation, factor] = total
        inflation, factor = min(scores, key=lambda k: scores[k])
        print(f"optimal interpolation, {name} errors: inflation {inflation:g}, errors x {factor:g}", flush=True)
        out[name] = replace(final, inflation=inflation, error_factor=factor)
    return out


def ratio(members: np.ndarray, truth: np.ndarray, forecasts: np.ndarray) -> np.ndarray:
    """Return the RMSE of the mean of members (m, dates, 12, rows, columns), were they many, over that of the forecasts, by field."""
    error = ((members.mean(0) - truth) ** 2).mean((0, 2, 3))
    if len(members) > 1:
        error = error - members.var(0, ddof=1).mean((0, 2, 3)) / len(members)
    return np.asarray(np.sqrt(error / ((forecasts - truth) ** 2).mean((0, 2, 3))))


def decorrelation(errors: np.ndarray) -> np.ndarray:
    """Return the distance in cells at which the correlation of the errors of each field falls below 1/e."""
    power = np.abs(scipy.fft.fft2(errors - errors.mean((-1, -2), keepdims=True))) ** 2
    correlation = scipy.fft.ifft2(power.mean(0)).real
    correlation = correlation / correlation[:, :1, :1]
    along = (correlation[:, 0, : FINE // 2] + correlation[:, : FINE // 2, 0]) / 2
    first = np.argmax(along < math.exp(-1), 1)
    before, after = along[np.arange(12), first - 1], along[np.arange(12), first]
    return np.asarray(first - 1 + (before - math.exp(-1)) / (before - after))


def row(name: str, level: str, values: list[np.ndarray], calls: int, seconds: float) -> None:
    """Print one row: the root mean square over fields of each share, height at 500 hPa, and the worst field."""
    parts = (
        np.array([np.sqrt((v**2).mean()) for v in values]),
        np.array([v[1] for v in values]),
        np.array([v.max() for v in values]),
    )
    shown = " | ".join(", ".join(f"{x:.2f}" for x in part) for part in parts)
    print(f"| {level} | {name} | {shown} | {calls} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of the training, three tenths of them of the regression")
    parser.add_argument("--pairs", type=int, default=60, help="of each training run")
    parser.add_argument("--dates", type=int, default=8)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache", type=Path, default=None, help="folder for the simulations and the model")
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES)
    parser.add_argument("--levels", nargs="*", default=list(ERRORS))
    parser.add_argument("--fewer-aloft", action="store_true")
    parser.add_argument("--classical", action="store_true", help="optimal interpolation alone")
    options = parser.parse_args()
    begin = time.perf_counter()
    forecasts, truth = simulated(options.cache, TRAINING_SEEDS, options.pairs, EVERY)
    test_forecasts, test_truth = (
        a.reshape(-1, *a.shape[2:]) for a in simulated(options.cache, TEST_SEEDS, options.dates // len(TEST_SEEDS), 20)
    )
    print(f"simulated in {time.perf_counter() - begin:.0f} s", flush=True)
    errors = (truth - forecasts).reshape(-1, *truth.shape[2:])
    spread, climate = errors.std((0, 2, 3)), truth.std((0, 1, 3, 4))
    lengths = decorrelation(errors[:: max(1, len(errors) // 60)])
    names = [f"{n} {round(p / 100)}" for n in VARIABLES for p in LEVELS]
    print("climate: " + ", ".join(f"{n} {c:.3g}" for n, c in zip(names, climate, strict=True)))
    print("error over climate: " + ", ".join(f"{n} {s / c:.2f}" for n, s, c in zip(names, spread, climate, strict=True)))
    print("correlated over: " + ", ".join(f"{n} {v:.1f}" for n, v in zip(names, lengths, strict=True)) + " cells")
    area = math.pi * lengths[1] ** 2
    print(f"columns in a circle of that radius, height at 500 hPa: {', '.join(f'{s / 100 * area:.2f}' for s in options.shares)}")
    levels = {k: v * spread for k, v in ERRORS.items() if k in options.levels}
    classical = tuned(forecasts, truth, levels, options.fewer_aloft)
    model = None if options.classical else trained(options, forecasts, truth)
    print(model)
    ds = dataset(test_forecasts, EVERY).assign_coords(time=pd.date_range("2010-01-01", periods=len(test_truth), freq="5D"))
    print("| errors | method | RMSE over background, all fields | height at 500 hPa | worst field | calls per member | s |")
    print("|---|---|---|---|---|---|---|")
    for level, error in levels.items():
        given = {
            share: np.stack([
                observed(t, seen(share, 100 + k, options.fewer_aloft), error, 100 + k) for k, t in enumerate(test_truth)
            ])
            for share in options.shares
        }  # fmt: skip
        begin = time.perf_counter()
        found = [
            np.stack([classical[level](f, o, error) for f, o in zip(test_forecasts, v, strict=True)]) for v in given.values()
        ]
        row(
            "optimal interpolation",
            level,
            [ratio(f[None], test_truth, test_forecasts) for f in found],
            0,
            time.perf_counter() - begin,
        )
        if model is None:
            continue
        begin, values, asked = time.perf_counter(), [], {"guidance": "anchor", "sampler": "dpm++", "steps": 8}
        sizes = {n: xr.DataArray(error.reshape(4, 3)[k], dims="pressure") for k, n in enumerate(VARIABLES)}
        for gridded in given.values():
            obs = dataset(gridded, EVERY).assign_coords(time=ds.time)
            table = obs.assign({f"{n}_error": xr.zeros_like(obs[n]) + sizes[n] for n in VARIABLES})
            analysis: Any = xgenda.assimilate(
                ds, table, model=model, members=options.members, seed=0, background_check=None,
                quality=xgenda.QualityControl(buddy=None), **asked,
            )  # fmt: skip
            values.append(ratio(fields_of(analysis), test_truth, test_forecasts))
            print(np.round(values[-1], 3), flush=True)
        row("background model, `anchor`", level, values, 9, time.perf_counter() - begin)


def trained(options: argparse.Namespace, forecasts: np.ndarray, truth: np.ndarray) -> Any:
    """Return the model, trained or from the cache."""
    file = None if options.cache is None else options.cache / f"columns_{options.steps}_{options.dtype}.safetensors"
    if file is not None and file.exists():
        return xgenda.load_model(file)
    return xgenda.train(
        dataset(forecasts, EVERY), target=dataset(truth, EVERY), task="background", periodic="both", time_features="none",
        steps=options.steps, dtype=options.dtype, seed=0, width=8, batch_size=8, out=file,
    )  # fmt: skip


if __name__ == "__main__":
    main()

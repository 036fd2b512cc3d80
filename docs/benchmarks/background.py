"""Single analyses from a background: columns of a quasi-geostrophic twin, with a forecast of ten days as background.

python docs/benchmarks/background.py [--steps 600] [--dates 16] [--members 16] [--cache folder]

Two-layer quasi-geostrophic turbulence with two tracers on 64 x 64 cells (`xgenda.twins`): height, temperature, salinity and two velocities.
Forecasts begin ten days before the truth that they are for, from the truth plus a tenth of an independent state, and are made by a model with a
tenth less shear, 30 % more drag and a slightly larger deformation radius. Training is on runs of other seeds.

At every date some of the columns are observed, all variables in each, at places drawn anew for every date: with errors of a hundredth of the
standard deviation of the forecast error (the published experiment has none), or of half of it. Scores are RMSE of the ensemble mean over that
of the forecast, over all dates together; what a finite ensemble adds to the square of the former, its variance over its size, is taken off.
Beside it stands optimal interpolation with the Gaussian of the same training errors, homogeneous, around the same forecast less its mean error,
in closed form; its variance and the error that it takes for the observations are tuned on a training run that it was not fitted to.
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
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.anchors import Spectral
from xgenda.grids import EARTH_RADIUS, ROTATION
from xgenda.models.background import BackgroundModel
from xgenda.models.conditioning import evaluations
from xgenda.models.generative import SamplingOptions
from xgenda.twins import OCEAN_TRACERS, OCEAN_VARIABLES, QGState, TwoLayerQG, _random_flow, ocean_surface

NAMES = tuple(OCEAN_VARIABLES)
SIZE, SPACING, LATITUDE = 64, 15e3, 38.0
LEAD, EVERY, PERTURBATION = 10, 5, 0.1  # days, days, part of an independent state
PER_DAY = 36
TRAINING_SEEDS, TEST_SEEDS = range(8), range(90, 94)
SHARES = (0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 2.0, 4.0)  # per cent of the columns, as published but for none
ERRORS = {"precise": 0.01, "realistic": 0.5}  # of the standard deviation of the forecast error


def models() -> tuple[TwoLayerQG, TwoLayerQG]:
    """Return the model of the truth and the one that forecasts."""
    phi = math.radians(LATITUDE)
    truth = TwoLayerQG(
        nx=SIZE, length=SIZE * SPACING, beta=2 * ROTATION * math.cos(phi) / EARTH_RADIUS, rd=25e3, delta=0.25, U1=0.1, U2=0.0, rek=1e-6,
        filterfac=18.4, dt=86400 / PER_DAY, tracers=OCEAN_TRACERS,
    )  # fmt: skip
    return truth, replace(truth, U1=0.09, rek=1.3e-6, rd=26e3)


def run(seed: int, count: int, every: int = EVERY) -> tuple[np.ndarray, np.ndarray]:
    """Return forecasts and truth of a run, each shape (count, variables, rows, columns), `every` days apart."""
    nature, forecaster = models()
    coriolis = 2 * ROTATION * math.sin(math.radians(LATITUDE))
    rng = np.random.default_rng(seed)
    state = nature.advance(_random_flow(nature, seed), 300 * PER_DAY)
    other = nature.advance(_random_flow(nature, seed + 1000), 300 * PER_DAY).spectrum
    pending: dict[int, QGState] = {}
    forecasts, truth = [], []
    for day in range(LEAD + every * (count - 1) + 1):
        if (begun := pending.pop(day - LEAD, None)) is not None:
            forecasts.append(ocean_surface(forecaster, forecaster.advance(begun, LEAD * PER_DAY), coriolis, True))
            truth.append(ocean_surface(nature, state, coriolis, True))
        if day % every == 0:
            shifted = np.fft.rfft2(np.roll(np.fft.irfft2(other), rng.integers(SIZE, size=2), (1, 2)))
            pending[day] = QGState(state.spectrum + PERTURBATION * shifted)
        state = nature.advance(state, PER_DAY)
    return np.stack(forecasts), np.stack(truth)


def simulated(cache: Path | None, seeds: range, count: int, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Return forecasts and truth of several runs, shape (runs, count, ...), kept in a folder where one is given."""
    parts = []
    for seed in seeds:
        file = None if cache is None else cache / f"run_{seed}_{count}_{every}.npz"
        if file is not None and file.exists():
            with np.load(file, allow_pickle=False) as stored:  # noqa: TID251
                parts.append((stored["forecasts"], stored["truth"]))
            continue
        parts.append(run(seed, count, every))
        if file is not None:
            np.savez(file, forecasts=parts[-1][0].astype("f4"), truth=parts[-1][1].astype("f4"))
    return tuple(np.stack([p[k] for p in parts]) for k in range(2))  # type: ignore[return-value]


def dataset(fields: np.ndarray, every: int) -> xr.Dataset:
    """Return fields (n, variables, rows, columns) or (runs, n, ...) as a Dataset, the runs one after the other with the same times."""
    runs = 1 if fields.ndim == 4 else len(fields)
    flat = fields.reshape(-1, *fields.shape[-3:])
    degree = math.radians(EARTH_RADIUS)
    offset = (np.arange(SIZE) - (SIZE - 1) / 2) * SPACING
    times = pd.date_range("2000-01-01", periods=len(flat) // runs, freq=f"{every}D")
    return xr.Dataset(
        {n: (("time", "latitude", "longitude"), flat[:, c], dict(OCEAN_VARIABLES[n])) for c, n in enumerate(NAMES)},
        coords={
            "time": np.tile(times.values, runs), "latitude": LATITUDE + offset / degree,
            "longitude": -55.0 + offset / (degree * math.cos(math.radians(LATITUDE))),
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Which columns are observed at a date, and with which errors."""

    cells: np.ndarray
    error: np.ndarray  # standard deviation of each variable
    noise: np.ndarray  # (variables, columns)


def network(share: float, error: np.ndarray, seed: int) -> Network:
    """Return random columns; more of them hold those of fewer."""
    rng = np.random.default_rng(seed)
    cells = rng.permutation(SIZE * SIZE)
    noise = rng.standard_normal((len(NAMES), SIZE * SIZE))
    count = round(share / 100 * SIZE * SIZE)
    return Network(cells[:count], error, noise[:, :count])


def observed(truth: np.ndarray, at: Network) -> np.ndarray:
    """Return what is observed of a field (variables, rows, columns), shape (variables, columns)."""
    return truth.reshape(len(NAMES), -1)[:, at.cells] + at.error[:, None] * at.noise


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
        """Fit the Gaussian of the errors, shape (n, variables, rows, columns)."""
        left = truth - forecasts
        bias = left.mean((0, 2, 3))
        unit = (left - bias[:, None, None]).std((0, 2, 3))
        z = (left - bias[:, None, None]) / unit[:, None, None]
        return cls(Spectral.fit(torch.as_tensor(z)), unit, bias)

    def __call__(self, forecast: np.ndarray, values: np.ndarray, at: Network) -> np.ndarray:
        """Return the analysis, shape (variables, rows, columns)."""
        centre = forecast + self.bias[:, None, None]
        rows = (np.arange(len(NAMES))[:, None] * SIZE * SIZE + at.cells).ravel()
        index = torch.as_tensor(rows)
        cross = self.inflation * self.covariance.block(torch.arange(self.covariance.size), index).numpy()
        error = np.repeat(self.error_factor * at.error / self.unit, len(at.cells))
        departure = (values - centre.reshape(len(NAMES), -1)[:, at.cells]) / self.unit[:, None]
        solved = np.linalg.solve(cross[rows] + np.diag(error**2), departure.ravel())
        return np.asarray(centre + self.unit[:, None, None] * (cross @ solved).reshape(centre.shape))


def tuned(forecasts: np.ndarray, truth: np.ndarray, levels: dict[str, np.ndarray]) -> dict[str, Interpolation]:
    """Return interpolations with inflation and error factor tuned on the last of the runs, for each level of error."""
    flat = [a[:-1].reshape(-1, *a.shape[2:]) for a in (forecasts, truth)]
    fitted = Interpolation.fit(*flat)
    final = Interpolation.fit(*(a.reshape(-1, *a.shape[2:]) for a in (forecasts, truth)))
    out = {}
    for name, error in levels.items():
        scores = {}
        for inflation in (0.5, 0.7, 1.0, 1.4, 2.0, 3.0):
            for factor in (0.3, 1.0, 2.0, 3.0):
                way = replace(fitted, inflation=inflation, error_factor=factor)
                total = 0.0
                for k in range(0, len(forecasts[-1]), 12):
                    for share in (0.4, 2.0):
                        at = network(share, error, 5000 + k)
                        found = way(forecasts[-1, k], observed(truth[-1, k], at), at)
                        total += float((((found - truth[-1, k]) / fitted.unit[:, None, None]) ** 2).mean())
                scores[inflation, factor] = total
        inflation, factor = min(scores, key=lambda k: scores[k])
        print(f"optimal interpolation, {name} errors: inflation {inflation:g}, errors x {factor:g}")
        out[name] = replace(final, inflation=inflation, error_factor=factor)
    return out


def table_of(truth: np.ndarray, networks: list[Network], times: np.ndarray, ds: xr.Dataset) -> xr.Dataset:
    """Return the observations of some dates as a table."""
    rows = []
    for k, at in enumerate(networks):
        y, x = np.divmod(at.cells, SIZE)
        values = dict(zip(NAMES, observed(truth[k], at), strict=True))
        errors = {f"{n}_error": np.full(len(at.cells), e) for n, e in zip(NAMES, at.error, strict=True)}
        rows.append(
            xr.Dataset(
                {n: ("obs", v) for n, v in (values | errors).items()},
                coords={
                    "latitude": ("obs", ds.latitude.values[y]), "longitude": ("obs", ds.longitude.values[x]),
                    "time": ("obs", np.full(len(at.cells), times[k])),
                },
            )
        )  # fmt: skip
    table = xr.concat(rows, "obs")
    for n in NAMES:
        table[n].attrs["units"] = OCEAN_VARIABLES[n]["units"]
    return table


def ratio(members: np.ndarray, truth: np.ndarray, forecasts: np.ndarray) -> np.ndarray:
    """Return the RMSE of the mean of members (m, dates, variables, rows, columns), were they many, over that of the forecasts, by variable."""
    error = ((members.mean(0) - truth) ** 2).mean((0, 2, 3))
    if len(members) > 1:
        error = error - members.var(0, ddof=1).mean((0, 2, 3)) / len(members)
    return np.asarray(np.sqrt(error / ((forecasts - truth) ** 2).mean((0, 2, 3))))


def decorrelation(errors: np.ndarray) -> np.ndarray:
    """Return the distance in cells at which the correlation of each variable's errors falls below 1/e."""
    power = np.abs(np.fft.fft2(errors - errors.mean((-1, -2), keepdims=True))) ** 2
    correlation = np.fft.ifft2(power.mean(0)).real
    correlation = correlation / correlation[:, :1, :1]
    along = (correlation[:, 0, : SIZE // 2] + correlation[:, : SIZE // 2, 0]) / 2
    out = []
    for row in along:
        k = int(np.argmax(row < math.exp(-1)))
        out.append(k - 1 + (row[k - 1] - math.exp(-1)) / (row[k - 1] - row[k]))
    return np.array(out)


def row(name: str, level: str, values: list[np.ndarray], calls: int, seconds: float) -> None:
    """Print one row: the root mean square over variables of each share, and the worst variable of each."""
    means = ", ".join(f"{np.sqrt((v**2).mean()):.2f}" for v in values)
    worst = ", ".join(f"{v.max():.2f}" for v in values)
    print(f"| {level} | {name} | {means} | {worst} | {calls} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of the training, three tenths of them of the regression")
    parser.add_argument("--pairs", type=int, default=60, help="of each training run")
    parser.add_argument("--dates", type=int, default=16)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache", type=Path, default=None, help="folder for the simulations and the model")
    parser.add_argument("--ways", nargs="*", default=None, help="names of the rows to compute")
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES)
    parser.add_argument("--levels", nargs="*", default=list(ERRORS))
    options = parser.parse_args()
    begin = time.perf_counter()
    forecasts, truth = simulated(options.cache, TRAINING_SEEDS, options.pairs, EVERY)
    per_run = options.dates // len(TEST_SEEDS)
    test_forecasts, test_truth = (a.reshape(-1, *a.shape[2:]) for a in simulated(options.cache, TEST_SEEDS, per_run, 40))
    print(f"simulated in {time.perf_counter() - begin:.0f} s", flush=True)
    errors = (truth - forecasts).reshape(-1, *truth.shape[2:])
    spread, climate = errors.std((0, 2, 3)), truth.std((0, 1, 3, 4))
    lengths = decorrelation(errors)
    area = math.pi * float((lengths**2).mean())
    print("error over climatology: " + ", ".join(f"{n} {s / c:.2f}" for n, s, c in zip(NAMES, spread, climate, strict=True)))
    print(
        "correlated over: "
        + ", ".join(f"{n} {v:.1f}" for n, v in zip(NAMES, lengths, strict=True))
        + f" cells; area {area:.0f} cells"
    )
    per_area = ", ".join(f"{s / 100 * area:.2f}" for s in options.shares)
    print(f"columns per correlation area at {options.shares} %: {per_area}")
    levels = {k: v * spread for k, v in ERRORS.items() if k in options.levels}
    classical = tuned(forecasts, truth, levels)
    model = trained(options, forecasts, truth)
    print(model)
    ds = dataset(test_forecasts, 5).assign_coords(time=pd.date_range("2010-01-01", periods=len(test_truth), freq="5D"))
    print("| errors | method | RMSE over background, all variables | worst variable | calls per member | s |")
    print("|---|---|---|---|---|---|")
    for level, error in levels.items():
        begin, values = time.perf_counter(), []
        for share in options.shares:
            nets = [network(share, error, 100 + k) for k in range(len(test_truth))]
            found = np.stack([
                classical[level](f, observed(t, at), at) for f, t, at in zip(test_forecasts, test_truth, nets, strict=True)
            ])  # fmt: skip
            values.append(ratio(found[None], test_truth, test_forecasts))
        row("optimal interpolation", level, values, 0, time.perf_counter() - begin)
        for name, asked in ways().items():
            if options.ways is not None and name not in options.ways:
                continue
            begin, values = time.perf_counter(), []
            for share in options.shares:
                nets = [network(share, error, 100 + k) for k in range(len(test_truth))]
                table = table_of(test_truth, nets, ds.time.values, ds)
                analysis = xgenda.assimilate(
                    ds, table, model=model, members=options.members, seed=0, background_check=None,
                    quality=xgenda.QualityControl(buddy=None), **asked,
                )  # fmt: skip
                members = np.stack([analysis[n].transpose("member", "time", ...).values for n in NAMES], 2)
                values.append(ratio(members, test_truth, test_forecasts))
                if options.ways is not None:
                    print(share, np.round(values[-1], 3), flush=True)
            planned = model.plan(SamplingOptions(**asked))
            row(name, level, values, evaluations(planned), time.perf_counter() - begin)


def trained(options: argparse.Namespace, forecasts: np.ndarray, truth: np.ndarray) -> BackgroundModel:
    """Return the model, trained or from the cache."""
    file = None if options.cache is None else options.cache / f"background_{options.steps}_{options.dtype}.safetensors"
    if file is None or not file.exists():
        begin = time.perf_counter()
        model = xgenda.train(
            dataset(forecasts, EVERY), target=dataset(truth, EVERY), task="background", periodic="both", time_features="none",
            steps=options.steps, dtype=options.dtype, seed=0, width=8, batch_size=8,
        )  # fmt: skip
        print(f"trained in {time.perf_counter() - begin:.0f} s")
        if file is None:
            assert isinstance(model, BackgroundModel)
            return model
        model.save(file)
    model = xgenda.load_model(file)
    assert isinstance(model, BackgroundModel)
    return model


def ways() -> dict[str, dict[str, Any]]:
    """Return the conditionings that are compared."""
    return {
        "anchor": {"guidance": "anchor", "sampler": "dpm++", "steps": 8},
        **{
            f"soft mask {reach}": {"guidance": "inpaint", "steps": 8, "guidance_options": {"preset": "soft", "reach": reach}}
            for reach in (0.5, 1.0, 1.5, 2.0, 2.5)
        },
        "soft mask 1.5, kriging": {
            "guidance": "inpaint",
            "steps": 8,
            "guidance_options": {"preset": "soft", "interpolation": "matern", "length": 4.0},
        },
        "soft mask 1.5 and anchor": {"guidance": "inpaint", "steps": 8, "guidance_options": {"preset": "soft", "also": "anchor"}},
        "published": {"guidance": "inpaint", "guidance_options": {"preset": "published", "length": 4.0}},
    }


if __name__ == "__main__":
    main()

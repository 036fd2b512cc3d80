"""Conversion of one data set to another through a latent space, and what is not observed from what is, beside regression and a Gaussian.

python docs/benchmarks/conversion.py [--navy FILE] [--parts temperature winds currents]

1. Temperature over North America (bundled), trained to 2039, tested on years from 2060 to 2099: from means over blocks of 4 x 4 cells, of which a
   third is missing at random in every year, to the fields, in the bundled latent space.
2. Monthly winds over the Pacific (monthly_navy_winds.cdf, see small_data.py), the last fifth of the months withheld after a gap of six: the
   northward from the eastward wind. Once all of the eastward wind is given (conversion and regression), once every third cell along both axes with
   an error of a quarter of its standard deviation (search of the latent space, Gaussian, conversion and regression).
3. Sea surface height from the currents of the quasi-geostrophic twin (`simulate_ocean`, a doubly periodic box of 32 x 32 cells), six independent
   runs, the last two withheld. Once both components are given everywhere with errors of a tenth of their standard deviation, once at every
   fifth cell along both axes with errors of a quarter of it. Beside the methods above a diffusion prior of homogeneous fields, and what a
   physicist would do: the height in balance with the currents from a Poisson equation, and optimal interpolation with covariances that geostrophy
   ties together. These three know that the box is periodic and all places are alike, and the last two f and that there is no mean.

Ridge regression cannot take gaps: they are filled with the mean of their times, or with anomalies interpolated along longitude. Its members,
and those of the balances, are its past errors.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import xgenda
from xgenda.demo import coarsen, crop, scores, training_years, withheld_years
from xgenda.grids import GRAVITY

Predict = Callable[[], xr.Dataset]
Physics = Callable[[xr.Dataset, xr.Dataset, dict[str, float], int], dict[str, Predict]]
QUIET: dict[str, Any] = {"progress": False}
PARTS = ("temperature", "winds", "currents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--navy", help="monthly_navy_winds.cdf; without it the second part is left out")
    parser.add_argument("--parts", nargs="*", choices=PARTS)
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--members", type=int, default=16)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=xgenda.errors.LittleDataWarning)
    parts = options.parts or PARTS
    if "temperature" in parts:
        print(temperature(options.steps, options.members).round(4).to_string(), flush=True)
    tables = {}
    if "winds" in parts and options.navy is not None:
        tables |= winds(options.navy, options.steps, options.members)
    if "currents" in parts:
        tables |= currents(options.steps, options.members)
    for name, table in tables.items():
        print(f"\n{name}\n{table.round(4).to_string()}", flush=True)


def timed(rows: dict[str, dict[str, float]], name: str, predict: Predict, truth: xr.Dataset) -> None:
    """Add the scores of a prediction, and the seconds of processor time that it took; of further variables that it holds RMSE and CRPS."""
    begin = time.process_time()
    found = predict()
    spent = time.process_time() - begin
    first, *others = truth.data_vars
    rows[name] = {**scores(found[[first]], truth[[first]]), "s of CPU": spent}
    for n in others:
        if n in found:
            rows[name] |= {f"{k} of {n}": v for k, v in scores(found[[n]], truth[[n]]).items() if k in ("rmse", "crps")}


def fitted(make: Callable[[], Any], name: str) -> Any:
    """Return what is made, and print the seconds of processor time that it took."""
    begin = time.process_time()
    made = make()
    print(f"{name}: fitted in {time.process_time() - begin:.1f} s of CPU", flush=True)
    return made


def without(ds: xr.Dataset, share: float, seed: int) -> xr.Dataset:
    """Return fields of which a share of the cells is missing, others at every time."""
    rng = np.random.default_rng(seed)
    return ds.where(xr.zeros_like(ds["air_temperature"]).copy(data=rng.random(ds["air_temperature"].shape)) >= share)


def temperature(steps: int, members: int) -> pd.DataFrame:
    """Return scores of conversion and regression from block means with gaps."""
    past, later = training_years(), withheld_years(2)
    source, given = (without(coarsen(crop(ds)), 1 / 3, k) for k, ds in enumerate((past, later)))
    # two runs have the same times: one after the other, in the same order
    climate = source.mean("time")
    rows: dict[str, dict[str, float]] = {}

    def interpolated(ds: xr.Dataset) -> xr.Dataset:
        between = (ds - climate).interpolate_na("longitude", fill_value="extrapolate").fillna(0.0) + climate
        between["air_temperature"].attrs = past["air_temperature"].attrs
        return between

    fills: dict[str, Callable[[xr.Dataset], xr.Dataset]] = {
        "climate": lambda ds: ds.fillna(climate),
        "interpolated": interpolated,
    }
    converted = xgenda.train(source, target=past, task="conversion", start="t2m-north-america-vae", steps=steps, **QUIET)
    print(f"conversion: {converted.spec.training['card']}")
    own: dict[str, Any] = {"members": members, "seed": 0, "target": later}
    for name, fill in fills.items():
        ridge = xgenda.train(fill(source), target=past, task="downscale", method="ridge", **QUIET)
        timed(
            rows,
            f"ridge regression + past errors, gaps: {name}",
            lambda m=ridge, f=fill: f(given).genda.downscale(model=m, **own),
            later,
        )
    timed(rows, "conversion", lambda: given.genda.downscale(model=converted, **own), later)
    return pd.DataFrame(rows).T


def navy(path: str) -> xr.Dataset:
    """Return monthly winds over the Pacific."""
    ds = xr.open_dataset(path)[["UWND", "VWND"]].rename(FNOCX="longitude", FNOCY="latitude", TIME="time", UWND="u", VWND="v")
    for name, title in (("u", "eastward_wind"), ("v", "northward_wind")):
        ds[name].attrs = {"units": "m s-1", "standard_name": title}
    ds["latitude"].attrs, ds["longitude"].attrs = {"units": "degrees_north"}, {"units": "degrees_east"}
    return ds.sel(latitude=slice(-30, 60), longitude=slice(120, 290)).astype("float64").load()


def winds(path: str, steps: int, members: int) -> dict[str, pd.DataFrame]:
    """Return scores of the northward wind given the eastward one, whole or sparse."""
    ds = navy(path)
    count = ds.sizes["time"]
    past, later = ds.isel(time=slice(0, int(0.8 * count) - 6)), ds.isel(time=slice(int(0.8 * count), None))
    climate = past[["v"]].groupby("time.month").mean().sel(month=later["time"].dt.month).drop_vars("month")
    return unobserved(past, later, ["u"], "v", 3, climate, steps, members, climatology="dayofyear")


def unobserved(
    past: xr.Dataset, later: xr.Dataset, known: list[str], wanted: str, every: int, climate: xr.Dataset, steps: int, members: int, *,
    small: float = 0.0, alone: bool = False, priors: Mapping[str, Callable[[], Any]] | None = None, physics: Physics | None = None,
    **options: Any,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Return scores of one variable given others everywhere, and at every so manyth cell along both axes with errors.

    What is given everywhere has errors of a share `small` of the standard deviations; without any, only regression and conversion are asked.
    `alone` adds a latent space of the wanted variable, and scores of the known ones where they are estimated. `priors` are asked besides, and
    `physics`, which gets the source in training and test, its errors, and the number of members.
    """
    truth = later[[wanted, *known]] if alone else later[[wanted]]
    spaces = {}
    for label, names in (("conversion", [*past]), (f"conversion to {wanted} alone", [wanted]))[: 1 + alone]:
        target = past[names]
        made = fitted(
            lambda t=target: xgenda.train(t, task="autoencoder", steps=steps, width=8, **QUIET), f"autoencoder of {names}"
        )
        record = made.spec.training
        print(f"latent space: {record['latent']} numbers, {record['card']}; decoder's error {record['decoder_error']}")
        spaces[label] = target, made
    models = {
        "search of the latent space, rmap": spaces["conversion"][1],
        "Gaussian": fitted(lambda: xgenda.gaussian_prior(past), "Gaussian"),
        **{label: fitted(make, label) for label, make in (priors or {}).items()},
    }
    blank = xr.zeros_like(later)
    for n in blank:
        blank[n].attrs = later[n].attrs
    rng = np.random.default_rng(0)

    def seen(fields: xr.Dataset, step: int, error: dict[str, float]) -> xr.Dataset:
        where = xr.zeros_like(fields[known[0]][0], dtype=bool)
        where[step // 2 :: step, step // 2 :: step] = True
        noise = xr.Dataset({n: (fields[n].dims, error[n] * rng.standard_normal(fields[n].shape)) for n in known if error[n]})
        out = fields[known].assign({n: fields[n] + noise[n] for n in noise}).where(where)
        for n in known:
            out[n].attrs = fields[n].attrs
        return out

    out = {}
    for name, step, share in (("everywhere", 1, small), ("sparse, with errors", every, 0.25)):
        error = {n: share * float(past[n].std()) for n in known}
        source, given = seen(past, step, error), seen(later, step, error)
        filled, filled_later = (d.fillna(0.0) if step > 1 else d for d in (source, given))
        rows: dict[str, dict[str, float]] = {}
        timed(rows, "climate", lambda c=climate: c, truth)
        own: dict[str, Any] = {"members": members, "seed": 0, "target": later}
        ridge = fitted(
            lambda f=filled: xgenda.train(f, target=past[[wanted]], task="downscale", method="ridge", **QUIET, **options),
            "ridge regression",
        )
        timed(
            rows, "ridge regression + past errors", lambda m=ridge, g=filled_later, o=own: g.genda.downscale(model=m, **o), truth
        )
        for label, (target, space) in spaces.items():
            converted = fitted(
                lambda s=source, t=target, a=space: xgenda.train(
                    s, target=t, task="conversion", start=a, steps=steps, width=8, **QUIET
                ),
                label,
            )
            print(f"{label}, {name}: {converted.spec.training['card']}")
            timed(rows, label, lambda m=converted, g=given, o=own: g.genda.downscale(model=m, **o), truth)
        if share:
            asked: dict[str, Any] = {"error": error, "members": members, "seed": 0, "background_check": None, "progress": False}
            for label, model in models.items():
                timed(rows, label, lambda m=model, g=given, a=asked: blank.genda.assimilate(g, model=m, **a), truth)
        if physics is not None:
            for label, predict in physics(source, given, error, members).items():
                timed(rows, label, predict, truth)
        out[f"{wanted} at {later.sizes['time']} times from {' and '.join(known)}, {name}"] = pd.DataFrame(rows).T
    return out


def ocean(size: int, times: int, runs: int, days: int, spinup: str) -> list[xr.Dataset]:
    """Return height and currents of independent runs of the twin, a state every so many days, as if one followed the other."""
    out = []
    for k in range(runs):
        start = pd.Timestamp("1900-01-01") + k * (days * times + 360) * pd.Timedelta("1D")
        run = xgenda.tutorial.simulate_ocean(times, every=f"{days}D", size=size, seed=k, spinup=spinup, start=start)
        out.append(run[["ssh", "u", "v"]])
    return out


def currents(
    steps: int, members: int, *, size: int = 32, times: int = 60, runs: int = 6, withheld: int = 2, every: int = 10, days: int = 15,
    spinup: str = "300D",
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Return scores of the height given the currents of the twin, whole with small errors or sparse, at every so manyth time of withheld runs."""
    found = fitted(lambda: ocean(size, times, runs, days, spinup), "twin")
    past = xr.concat(found[: runs - withheld], "time")
    later = xr.concat([run.isel(time=slice(None, None, every)) for run in found[runs - withheld :]], "time")
    climate = past.mean("time").expand_dims(time=later["time"])
    for n in climate:
        climate[n].attrs = past[n].attrs
    balance = Balance(past)

    def physics(source: xr.Dataset, given: xr.Dataset, error: dict[str, float], members: int) -> dict[str, Predict]:
        if bool(given["u"].isnull().any()):
            return {"interpolation with geostrophic covariances": lambda: balance.interpolated(given, error, members)}
        return {
            "geostrophic balance + past errors": lambda: balance.inverted(source, given, members, 0),
            "cyclogeostrophic balance + past errors": lambda: balance.inverted(source, given, members, 4),
        }

    def homogeneous() -> Any:
        return xgenda.train(past, periodic="both", anchor="spectral", steps=steps, width=8, **QUIET)

    return unobserved(
        past, later, ["u", "v"], "ssh", 5, climate, steps, members,
        small=0.1, alone=True, priors={"diffusion prior of homogeneous fields": homogeneous}, physics=physics,
    )  # fmt: skip


class Balance:
    """The balance of height and currents on the doubly periodic plane of the twin.

    Parameters
    ----------
    past
        Training fields of the twin, with its attributes: their heights and the departures of their currents from geostrophy are the covariances of
        `interpolated`, and their heights the truth behind past errors.
    """

    def __init__(self, past: xr.Dataset) -> None:
        self.past, self.f = past, past.attrs["f"]
        self.cells = past["ssh"].shape[-1]
        wave = 2 * np.pi * np.fft.fftfreq(self.cells, past.attrs["spacing"])
        self.k, self.l = wave[None, :], wave[:, None]
        # what makes height and geostrophic currents of the height, wave by wave
        self.factors = {"ssh": np.ones((1, 1)), "u": -1j * GRAVITY / self.f * self.l, "v": 1j * GRAVITY / self.f * self.k}
        heights = past["ssh"].values.astype(float)
        self.power = (np.abs(np.fft.fft2(heights)) ** 2).mean(0) / self.cells**2
        waves = np.fft.fft2(heights)
        self.departure = {n: float(np.var(past[n].values - self.grid(self.factors[n] * waves))) for n in ("u", "v")}

    def grid(self, waves: np.ndarray) -> np.ndarray:
        return np.asarray(np.fft.ifft2(waves).real)

    def height(self, u: np.ndarray, v: np.ndarray, rounds: int) -> np.ndarray:
        """Return the height whose gradient balances the Coriolis force on currents (..., y, x), and after the first round the centrifugal one.

        g lap(h) = div(-f k x u - (w . grad) w), with w the geostrophic current of the round before (none in the first); h has no mean.
        """
        u, v = np.asarray(u, float), np.asarray(v, float)
        square = self.k**2 + self.l**2
        square[0, 0] = np.inf
        force, waves = np.fft.fft2(np.stack([self.f * v, -self.f * u])), np.zeros_like(u, dtype=complex)
        for _ in range(rounds + 1):
            w = np.stack([self.factors[n] * waves for n in ("u", "v")])
            east, north = self.grid(w)
            carried = np.fft.fft2(east * self.grid(1j * self.k * w) + north * self.grid(1j * self.l * w))
            x, y = force - carried
            waves = -1j * (self.k * x + self.l * y) / (GRAVITY * square)
        return self.grid(waves)

    def inverted(self, source: xr.Dataset, given: xr.Dataset, members: int, rounds: int) -> xr.Dataset:
        """Return the height of currents that are given everywhere, plus errors of the same made of past ones, without their mean."""
        errors = self.past["ssh"].values - self.height(source["u"].values, source["v"].values, rounds)
        best = self.height(given["u"].values, given["v"].values, rounds)
        chosen = np.random.default_rng(0).integers(len(errors), size=(members, len(best)))
        return self.dataset({"ssh": best + errors[chosen] - errors.mean(0)}, given)

    def interpolated(self, given: xr.Dataset, error: dict[str, float], members: int) -> xr.Dataset:
        """Return the posterior of a homogeneous Gaussian of the height, whose currents are geostrophic, given currents at some cells.

        Optimal interpolation with tied covariances (Bretherton, Davis and Fandry 1976, Deep-Sea Res. 23, 559-582). The spectrum is that of the
        training heights; what is not geostrophic in observed currents is an error that is added to theirs.
        """
        rows, columns = np.nonzero(given["u"][0].notnull().values)
        names = ("u", "v")

        def covariance(a: str, b: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
            table = self.grid(self.factors[a] * np.conj(self.factors[b]) * self.power)
            return np.asarray(table[(y[:, None] - rows) % self.cells, (x[:, None] - columns) % self.cells])

        everywhere = [axis.ravel() for axis in np.indices((self.cells, self.cells))]
        seen = np.block([[covariance(a, b, rows, columns) for b in names] for a in names])
        across = np.concatenate([covariance("ssh", b, *everywhere) for b in names], 1)
        size = np.repeat([np.sqrt(error[n] ** 2 + self.departure[n]) for n in names], len(rows))
        gain = np.linalg.solve(seen + np.diag(size**2), across.T).T

        def analysed(values: np.ndarray) -> np.ndarray:
            return np.asarray((values @ gain.T).reshape(*values.shape[:-1], self.cells, self.cells))

        rng = np.random.default_rng(0)
        shape = (members, given.sizes["time"])
        white = np.fft.fft2(rng.standard_normal((*shape, self.cells, self.cells)))
        drawn = np.sqrt(self.power) * white
        simulated = np.concatenate([self.grid(self.factors[n] * drawn)[..., rows, columns] for n in names], -1)
        observed = np.concatenate([given[n].values[:, rows, columns] for n in names], -1)
        heights = self.grid(drawn) + analysed(observed - simulated - size * rng.standard_normal(simulated.shape))
        waves = np.fft.fft2(heights)
        return self.dataset({n: self.grid(factor * waves) for n, factor in self.factors.items()}, given)

    def dataset(self, fields: dict[str, np.ndarray], given: xr.Dataset) -> xr.Dataset:
        dims = ("member", "time", "latitude", "longitude")
        return xr.Dataset({n: (dims, values, self.past[n].attrs) for n, values in fields.items()}, coords=given.coords)


if __name__ == "__main__":
    main()

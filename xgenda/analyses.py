"""One analysis within a cycle, by a filter or by a generative model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from xgenda import engine
from xgenda.ensembles import Arrays, Frame
from xgenda.errors import OptionError
from xgenda.filtering import Departures, analyse, spread_ratio
from xgenda.filters import LETKF, Inflation
from xgenda.formatting import brief, user_level
from xgenda.models.generative import SamplingOptions
from xgenda.observations.operators import Located
from xgenda.observations.quality import Quality
from xgenda.preparation import Prepared, at_times, observed_state

BACKGROUNDS = ("control", "mean", "members")


@dataclass(frozen=True, eq=False)
class Step:
    """What one analysis gives.

    Attributes
    ----------
    analysis
        The state.
    innovation_mean, innovation_rms
        Of what was used, by what is observed; NaN where nothing is.
    chi2
        Mean squared innovation over its expected variance, of what was used or refused by the background, each at most `highest_square`;
        NaN where nothing was.
    used, given
        Numbers of observations.
    inflation
        The factor on the anomalies of the background, times how many times wider relaxation makes the analysis.
    """

    analysis: Arrays
    innovation_mean: np.ndarray
    innovation_rms: np.ndarray
    chi2: float
    used: int
    given: int
    inflation: float


class Analyst(Protocol):
    """How a cycle makes its analyses."""

    @property
    def threshold(self) -> float | None:
        """Of the background check."""
        ...

    def analyse(self, t: int, background: Arrays) -> Step:
        """Return the analysis of cycle `t`."""
        ...

    def to_forecast(self, state: Arrays) -> Arrays:
        """Return the states that are forecast."""
        ...

    def from_forecast(self, found: Arrays) -> Arrays:
        """Return the background of all members of what was forecast."""
        ...

    def described(self) -> dict[str, Any]:
        """Return what goes into a record of the options."""
        ...


def highest_square(threshold: float) -> float:
    """Return with how much one observation counts in chi2 at most, for a threshold of the background check.

    One stuck instrument, refused each time, says nothing of the ensemble, and would be most of a mean without bound.
    """
    return max(threshold, 3.0) ** 2


def _step(
    setup: Prepared, located: Located | None, departures: Departures, analysis: Arrays, inflation: float, threshold: float | None
) -> Step:
    """Return an analysis with what its departures say."""
    size = len(setup.observable)
    code, innovation = departures.code, departures.innovation
    used = code == Quality.USED
    judged = used | (code == Quality.BACKGROUND) | (code == Quality.BUDDY)
    judged &= np.isfinite(innovation)
    if located is not None:
        judged &= np.isfinite(located.table.error)  # passive ones are checked, too
    variance = departures.error**2 + departures.spread**2
    squares = innovation[judged] ** 2 / variance[judged]
    if threshold is not None:
        squares = np.minimum(squares, highest_square(threshold))
    chi2 = float(np.mean(squares)) if judged.any() else float("nan")
    mean, rms = np.full(size, np.nan), np.full(size, np.nan)
    if located is not None and used.any():
        variable = located.table.variable[used]
        count = np.bincount(variable, minlength=size).astype(float)
        count[count == 0] = np.nan
        mean = np.bincount(variable, innovation[used], size) / count
        rms = np.sqrt(np.bincount(variable, innovation[used] ** 2, size) / count)
    return Step(analysis, mean, rms, chi2, int(used.sum()), len(code), inflation)


def observations_of(setup: Prepared, t: int) -> Located | None:
    """Return the observations of one cycle, None where there are none."""
    if setup.located is None:
        return None
    part = setup.located.between(t, t + 1)
    return part if len(part.table) else None


@dataclass(frozen=True, eq=False)
class FilterAnalyst:
    """Analyses by a filter."""

    frame: Frame
    setup: Prepared
    filter: LETKF
    threshold: float | None
    seed: int

    def analyse(self, t: int, background: Arrays) -> Step:
        """See `Analyst`."""
        setup, frame = self.setup, self.frame
        channels = list(setup.variables.values())
        located = observations_of(setup, t)
        fields = [frame.fields(background, c) for c in channels]
        found, departures = analyse(setup, located, self.filter, fields, self.threshold, self.seed, str(setup.labels[t]))
        analysed = dict(zip(channels, found, strict=True)) if (departures.code == Quality.USED).any() else {}
        return _step(setup, located, departures, frame.replace(background, analysed), departures.inflation, self.threshold)

    def to_forecast(self, state: Arrays) -> Arrays:
        """See `Analyst`."""
        return state

    def from_forecast(self, found: Arrays) -> Arrays:
        """See `Analyst`."""
        return found

    def described(self) -> dict[str, Any]:
        """See `Analyst`."""
        return {"filter": repr(self.filter)}


@dataclass(frozen=True, eq=False)
class ModelAnalyst:
    """Analyses by a generative model.

    Attributes
    ----------
    background
        'control', 'mean' or 'members'.
    inflation
        Of the ensemble.
    job
        Of all times.
    """

    frame: Frame
    setup: Prepared
    background: str
    inflation: Inflation
    job: engine.Job

    @classmethod
    def of(
        cls, frame: Frame, setup: Prepared, background: str, inflation: Inflation, asked: SamplingOptions, seed: int, device: str
    ) -> ModelAnalyst:
        """Check what is asked of the model.

        Raises
        ------
        OptionError
            If it is of windows of states, or inflation has nothing to act on.
        """
        spec = setup.model.spec
        if int(spec.options.get("window", 1)) > 1:
            raise OptionError(
                f"model={spec.name!r} is of windows of states, which are solved together: use xgenda.assimilate for all times at once, or a model "
                f"of single states here."
            )
        if inflation.prior != 1 and background != "members":
            raise OptionError(
                f"inflation={inflation.prior!r} has no effect with background={background!r}: the spread of the background is that of the model. "
                f"Scale that, gaussian_prior(..., std=...), or relax: rtps=0.5 with background='mean'"
            )
        if (inflation.rtpp or inflation.rtps) and background == "control":
            raise OptionError("rtpp and rtps need forecasts of all members: background='mean'")
        if not spec.needs_background:
            warnings.warn(
                f"model={spec.name!r} does not read its background: each analysis begins from the climate of the model, and what was observed "
                f"before is forgotten. Use a filter, or a model of the errors of the forecast: xgenda.gaussian_prior(ds, length_scale=300e3, "
                f"std=2.0)",
                stacklevel=user_level(),
            )
        members = tuple(range(len(frame.numbers)))
        job = setup.job(members, seed, setup.model.plan(asked, linear=setup.linear), device, False)
        dtype = np.result_type(np.float32, *(frame.template[n].dtype for n in frame.names))
        return cls(frame, setup, background, inflation, dataclasses.replace(job, dtype=dtype))

    @property
    def threshold(self) -> float | None:
        """See `Analyst`."""
        return self.setup.threshold

    def analyse(self, t: int, background: Arrays) -> Step:
        """See `Analyst`."""
        setup, frame = self.setup, self.frame
        channels = list(setup.variables.values())
        located = observations_of(setup, t)
        fields = [frame.fields(background, c) for c in channels]
        one = [f[:1] if self.background == "control" else f.mean(0, dtype=np.float64, keepdims=True) for f in fields]
        job = at_times(self.job, np.array([t]))
        departures = self._departures(job, located, one)
        if located is None or not (departures.code == Quality.USED).any():
            return _step(setup, located, departures, frame.replace(background, {}), 1.0, self.threshold)
        # the checks are done; all members have the same observations
        job = dataclasses.replace(
            job, located=located.with_code(departures.code), threshold=None, quality=dataclasses.replace(job.quality, buddy=None)
        )
        index = np.zeros(1, dtype=np.int64)
        if self.background == "members":
            if self.inflation.prior != 1:
                fields = [self.inflation.before(f.astype(np.float64)).astype(f.dtype) for f in fields]
            parts = [
                engine.run(index, *(f[k : k + 1] for f in fields), payload=dataclasses.replace(job, members=(k,)))
                for k in job.members
            ]
            found = np.concatenate(parts, 1)[0]
        else:
            found = engine.run(index, *one, payload=job)[0]
        if self.background != "members" and setup.model.closed_form:  # the noise of a mean of few members would be forecast
            exact = engine.run(index, *one, payload=dataclasses.replace(job, moments=True, spread=False, members=(0, 1)))[0, 0]
            found = found + (exact - found.mean(0, dtype=np.float64)).astype(found.dtype)
        before = np.stack(fields, 1)
        relaxed = self.inflation.after(found, before)
        ratio = spread_ratio(relaxed, found, [np.isfinite(f).all(0) for f in found.swapaxes(0, 1)])
        analysis = frame.replace(background, dict(zip(channels, relaxed.swapaxes(0, 1), strict=True)))
        return _step(setup, located, departures, analysis, ratio, self.threshold)

    def _departures(self, job: engine.Job, located: Located | None, fields: list[np.ndarray]) -> Departures:
        """Return codes and departures from one background."""
        if located is None:
            none = np.zeros(0)
            return Departures(none.astype(np.uint8), none, none, none)
        mean, deviation, _ = engine.moments(job, *fields)
        seen = engine.in_observation_space(job, mean, deviation)
        code, expected, spread = engine.background_codes(located, *seen, self.threshold, self.setup.quality)
        return Departures(code, located.table.value - expected, located.table.finite_error, spread)

    def to_forecast(self, state: Arrays) -> Arrays:
        """See `Analyst`."""
        if self.background != "control":
            return state
        return {n: v.mean(0, dtype=np.float64, keepdims=True).astype(v.dtype) for n, v in state.items()}

    def from_forecast(self, found: Arrays) -> Arrays:
        """See `Analyst`."""
        size = len(self.frame.numbers)
        if self.background != "control":
            return found
        return {n: np.repeat(v.mean(0, dtype=np.float64, keepdims=True).astype(v.dtype), size, axis=0) for n, v in found.items()}

    def described(self) -> dict[str, Any]:
        """See `Analyst`."""
        model, options = self.setup.model, dataclasses.asdict(self.job.options)
        kept = {k: v for k, v in options.items() if k not in ("batch_size", "tile", "overlap", "stage") and v not in ({}, None)}
        return {
            "name": model.spec.name, "sha256": model.sha256, "background": self.background,
            "inflation": dataclasses.asdict(self.inflation), **kept,
        }  # fmt: skip


def fingerprints(setup: Prepared, frame: Frame, state: Arrays) -> dict[str, str]:
    """Return of each operator that is not linear what it makes of the first state, by which another one of the same name is told."""
    if not setup.operators:
        return {}
    fields = [np.nan_to_num(frame.fields(state, c)[:1].astype(np.float64)) for c in setup.variables.values()]
    seen = observed_state(setup, fields).reshape(-1, setup.state.grid.size)[len(fields) :]
    names = [w.name for w in setup.observable[-len(setup.operators) :]]
    return {
        n: f"mean {v.mean():.5g} and standard deviation {v.std():.5g} of the first state"
        for n, v in zip(names, seen, strict=True)
    }


def summary_of(
    error: Any, quality: Any, representativeness: Any, lapse_rate: Any, operators: Mapping[str, str]
) -> dict[str, Any]:
    """Return options of the observations for a record; their values, and linear operators, are in a checksum of what was made of them."""
    shown = {"error": error, "representativeness": representativeness, "lapse_rate": lapse_rate}
    out: dict[str, Any] = {key: brief(value) for key, value in shown.items()}
    out["quality"] = None if quality is None else _written(dataclasses.asdict(quality))
    out["operators"] = dict(operators) or None
    return out


def _written(given: Any) -> Any:
    """Return options as JSON has them, in an order that does not depend on the process."""
    if isinstance(given, Mapping):
        return {str(k): _written(v) for k, v in sorted(given.items(), key=lambda pair: str(pair[0]))}
    if isinstance(given, (set, frozenset)):
        return sorted(map(str, given))
    if isinstance(given, (list, tuple, np.ndarray)):
        return [_written(v) for v in given]
    return given.item() if isinstance(given, np.generic) else given

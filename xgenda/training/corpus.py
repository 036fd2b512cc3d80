"""What a prior is trained on: fields in memory, or streamed fields with a sample of them in memory for the fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from xgenda import metadata
from xgenda.models.fitting import fit_standardised, standardise
from xgenda.scaling import Scaling, check_named
from xgenda.training.fields import Fields, InMemory
from xgenda.training.sources import Samples, Source, open_source
from xgenda.training.statistics import Statistics, gather
from xgenda.training.streaming import BUFFER, Streamed
from xgenda.training.windows import FOLDS, memory_of, read_samples

SAMPLE = 1000  # fields of a sample, at most
COPIES = 8  # of a field, in the working arrays of the fits
RUN = 64  # consecutive fields of a sample for windows
FEWEST_WAITING = 32  # fields that wait at least, however large they are


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training fields.

    Attributes
    ----------
    samples
        All of them, or evenly spaced ones.
    rows
        Which of all fields these are.
    time
        Of all fields.
    source, statistics
        Where they are streamed.
    """

    samples: Samples
    rows: np.ndarray
    time: xr.DataArray | None
    size: int
    source: Source | None = None
    statistics: Statistics | None = None

    def gap(self, z: np.ndarray) -> int:
        """Return how many fields around a block resemble it, given the standardised sample; of a sparse sample at most so many.

        Between fields of the sample that still resemble each other and the next ones, which do not, nothing is known.
        """
        near = memory_of(z, self.samples.time)
        breaks = np.flatnonzero(np.diff(self.rows) > 1)
        if self.samples.time is None or len(self.rows) == self.size or not breaks.size:
            return near
        run = int(breaks[0]) + 1
        if run > 1 and near < run // 2:
            return near
        chosen = np.arange(0, len(self.rows), run)
        time = self.samples.time.isel({self.samples.dimension: chosen})
        return int(np.ceil((memory_of(z[chosen], time) + 1) * self.size / len(chosen))) - 1

    def few(self) -> tuple[np.ndarray, Samples]:
        """Return evenly spaced fields of the sample, enough for a covariance, and where they are in it."""
        count = len(self.rows)
        if count <= SAMPLE:
            return np.arange(count), self.samples
        chosen = np.unique(np.linspace(0, count - 1, SAMPLE).round().astype(int))
        time = None if self.samples.time is None else self.samples.time.isel({self.samples.dimension: chosen})
        return chosen, dataclasses.replace(self.samples, values=self.samples.values[chosen], time=time)

    @property
    def labels(self) -> list[str]:
        """What to call each field in messages."""
        if self.time is None:
            return [f"{self.samples.dimension} {k}" for k in range(self.size)]
        return [str(t)[:19] for t in self.time.values]

    @property
    def period(self) -> str:
        """First and last time."""
        return self.samples.period if self.source is None else self.source.period

    def standardised(
        self, fold: np.ndarray, climatology: str, transform: Any, offset: Any, bounds: Mapping[str, Sequence[float | None]] | None,
        homogeneous: bool, observed: np.ndarray | None = None,
    ) -> tuple[Scaling, np.ndarray]:  # fmt: skip
        """Return a scaling fitted to all fields, or to what was `observed` of them, and the standardised sample (n, state)."""
        if self.statistics is not None:
            scaling = self.statistics.scaling(bounds, homogeneous)
            return scaling, self.anomalies(scaling)
        names = [v.name for v in self.samples.variables]
        scaling, _ = fit_standardised(
            self.samples.values, self.time, names, fold, climatology, observed, transform=transform, offset=offset, bounds=bounds,
            homogeneous=homogeneous, valid=self.samples.valid,
        )  # fmt: skip
        return scaling, self.anomalies(scaling)

    def anomalies(self, scaling: Scaling) -> np.ndarray:
        """Return the standardised sample (n, state), zero at masked cells."""
        z = standardise(scaling, self.samples.values, self.samples.time)
        if self.samples.valid is not None:
            z[:, ~self.samples.valid.ravel()] = 0.0
        return z

    def fields(self, scaling: Scaling, z: np.ndarray, windows: np.ndarray, crop: tuple[int, int] | None = None) -> Fields:
        """Return the standardised windows of states (n, window): in memory from `z`, else read when asked for, or parts of them."""
        if self.source is not None:
            each = 4 * windows.shape[1] * len(self.source.variables) * math.prod(self.source.grid.plane)
            return Streamed(self.source, scaling, windows, memory=max(BUFFER, FEWEST_WAITING * each), crop=crop)
        states = torch.as_tensor(z, dtype=torch.float32)[torch.as_tensor(windows)]
        return InMemory(states.reshape(len(windows), -1, *self.samples.grid.plane))


def open_corpus(
    ds: xr.Dataset | xr.DataArray, variables: Sequence[str] | None, memory: float, window: int, climatology: str, transform: Any, offset: Any,
    bounds: Any, progress: bool | None,
) -> Corpus:  # fmt: skip
    """Check the fields, and read them where they take no more than `memory` bytes; else pass over them once, and read a sample."""
    source = open_source(ds, variables)
    check_named(transform, offset, bounds, source.names)
    if source.nbytes <= memory:
        samples = read_samples(ds, variables)
        return Corpus(samples, np.arange(len(samples.values)), samples.time, len(samples.values))
    cycle = usual_cycle(source.time) if climatology == "auto" else climatology
    source, statistics = gather(source, cycle, transform, offset, progress=progress)
    count = int(np.clip(memory / (COPIES * 8 * np.prod(source.shape[1:])), min(source.size, 120), min(source.size, SAMPLE)))
    run = min(RUN, max(2 * window, count // (2 * FOLDS))) if window > 1 else 1
    starts = np.linspace(0, source.size - run, max(1, count // run)).round().astype(int)
    rows = np.unique((starts[:, None] + np.arange(run)).ravel())
    return Corpus(source.sample(rows), rows, source.time, source.size, source, statistics)


def usual_cycle(time: xr.DataArray | None) -> str:
    """Return the cycles that many fields go through: the year where they cover two, the day where several hours are among them."""
    if time is None or time.size < 2:
        return "none"
    steps = metadata.seconds_between(np.sort(time.values))
    days = float(steps.sum()) / 86400.0
    found = (["dayofyear"] if days >= 730.0 else []) + (["hour"] if len(np.unique(time.dt.hour)) >= 4 and days >= 10.0 else [])
    return "+".join(found) or "none"

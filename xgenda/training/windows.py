"""Training samples: fields of a Dataset in model order, and blocks of consecutive times for cross-fitting and validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from xgenda import metadata, states
from xgenda.curvilinear import AnyGrid, PointSet
from xgenda.errors import GridError, OptionError, StateError
from xgenda.models.fitting import outside, read_sample
from xgenda.models.spec import VariableSpec

FEWEST = 20
FOLDS = 6
HELD = FOLDS - 2  # the validation block: late, yet inside the period


@dataclass(frozen=True, eq=False)
class Samples:
    """Fields (n, channels, ny, nx) in physical units with what describes them; `valid` (channels, ny, nx) where some cells are masked."""

    values: np.ndarray
    time: xr.DataArray | None
    grid: AnyGrid
    variables: tuple[VariableSpec, ...]
    dimension: str
    valid: np.ndarray | None = None

    @property
    def period(self) -> str:
        """First and last time, for the description of the model."""
        if self.time is None:
            return f"{len(self.values)} fields along {self.dimension}"
        stamps = self.time.values
        first, last = min(stamps), max(stamps)
        return f"{str(first)[:10]} to {str(last)[:10]}"


def read_samples(
    ds: xr.Dataset | xr.DataArray, variables: Sequence[str] | None = None, argument: str = "ds", fewest: int = FEWEST
) -> Samples:
    """Read training fields into memory and check them.

    Raises
    ------
    OptionError
        If a variable is missing or there is no sample dimension.
    StateError
        If the fields hold NaN or fill values, or are too few.
    """
    ds = metadata.as_dataset(ds, argument)
    for name in variables or ():
        metadata.match_variable(ds, name, None, argument)
    mappings = [str(n) for n, v in ds.data_vars.items() if "grid_mapping_name" in v.attrs]
    state = states.enter(ds if variables is None else ds[[*variables, *mappings]], argument)
    names = metadata.data_variables(state.ds, state.layout)
    if not names:
        raise OptionError(f"{argument} has no variable on the dimensions {' and '.join(map(repr, state.layout.dims))}.")
    if isinstance(state.grid, PointSet):
        raise GridError(
            f"{argument} holds {state.grid.describe()}; the network needs rows and columns. Put them on a grid first: "
            f"{argument}.genda.regrid(grid), or use xgenda.gaussian_prior({argument})"
        )
    metadata.check_dims(state.ds, names, state.layout, argument)
    dimension, values, time, valid = read_sample(state, names, argument)
    if len(values) < fewest:
        raise StateError(
            f"{argument} has {len(values)} fields along {dimension!r}; at least {fewest} are needed. With so few, a Gaussian prior is the "
            f"better model: xgenda.gaussian_prior({argument})"
        )
    specs = tuple(VariableSpec(n, **states.described(state.ds, n)) for n in names)
    return Samples(values, time, state.grid, specs, dimension, valid)


def time_order(time: xr.DataArray | None, size: int) -> np.ndarray:
    """Return indices that sort the samples by time, so that the same time of two runs falls into the same block."""
    return np.arange(size) if time is None else np.argsort(time.values, kind="stable")


def blocks(time: xr.DataArray | None, size: int, count: int) -> np.ndarray:
    """Return the block number of each sample: `count` blocks of consecutive times."""
    out = np.empty(size, dtype=np.int64)
    for k, members in enumerate(np.array_split(time_order(time, size), count)):
        out[members] = k
    return out


def spacing_of(samples: Samples, order: np.ndarray) -> float:
    """Return the seconds between consecutive times, which a model of windows needs to be the same throughout.

    Raises
    ------
    StateError
        If there is no time, or the spacing varies by more than a hundredth.
    """
    if samples.time is None:
        raise StateError("window above 1 needs consecutive times, and ds has no time coordinate.")
    steps = metadata.seconds_between(samples.time.values[order])
    if not steps.size or steps.min() <= 0 or steps.max() > 1.01 * steps.min():
        raise StateError(
            f"window above 1 needs equally spaced times, and those of ds are from {steps.min():g} to {steps.max():g} seconds apart. Select "
            f"one unbroken run, or interpolate: ds.resample(time='1D').interpolate()"
        )
    return float(np.median(steps))


def split_rows(fold: np.ndarray, gap: int = 0, order: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return training rows, `gap` away from the validation block in the order of time, and the rows of that."""
    rows = outside(fold, HELD, gap, order)
    return torch.as_tensor(np.flatnonzero(rows)), torch.as_tensor(np.flatnonzero(fold == HELD))

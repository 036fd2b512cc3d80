"""Training pairs of a downscaler: coarse fields and the fine ones behind them, at the same times."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata, states
from xgenda.curvilinear import AnyGrid
from xgenda.errors import GridError, OptionError, StateError, UnitsError
from xgenda.grids import factor_between
from xgenda.models.blocks import Blocks
from xgenda.models.conditions import lead_times
from xgenda.models.spec import VariableSpec
from xgenda.models.templates import remembered_axes
from xgenda.scaling import Scaling, cycle_basis
from xgenda.training.matching import check_kept, check_unmasked, checked_offsets, lag_in_seconds, later, match
from xgenda.training.reservoirs import Large, Reservoir, block_means, blocked, open_lagged, open_reservoir
from xgenda.training.sources import Source, open_source
from xgenda.training.windows import FEWEST, Samples, read_samples, read_source


@dataclass(frozen=True, eq=False)
class Pairs:
    """Coarse and fine fields in physical units.

    Attributes
    ----------
    fine
        The fields to predict.
    coarse
        What they are predicted from; as many fields as there are distinct times, with the grid and the variables.
    places
        Of each fine field the coarse ones of its time and neighbours, shape (n, offsets).
    offsets, spacing, ends
        See `xgenda.models.conditions.Conditions`.
    factor
        Where the coarse cells are blocks of fine ones.
    lead
        Lead times in seconds, shape (n,), or None.
    statics, static_names
        Fields that never change, shape (statics, rows, columns), standardised, in model order.
    target
        Names of the horizontal dimensions and coordinates of the fine fields.
    reservoir
        Where these are some of many pairs: all of them.
    """

    fine: Samples
    coarse: Samples
    places: np.ndarray
    offsets: tuple[int, ...]
    spacing: float | None
    factor: int | None
    lead: np.ndarray | None
    statics: np.ndarray | None
    static_names: tuple[str, ...]
    target: Mapping[str, Any]
    reservoir: Reservoir | None = None
    ends: str = "drop"

    @property
    def every(self) -> Samples | Source:
        """The fine fields of all pairs."""
        return self.fine if self.reservoir is None else self.reservoir.fine

    def inputs(self, offset: int) -> np.ndarray:
        """Return the coarse fields at one of the offsets, by its position, shape (n, variables, y, x)."""
        return np.asarray(self.coarse.values[self.places[:, offset]])

    def climatology(self, scaling: Scaling) -> np.ndarray:
        """Return the mean of the fine fields at their times, in transformed units, shape (n, channels, rows, columns)."""
        basis = cycle_basis(self.fine.time, scaling.cycle, len(self.fine.values))
        return np.broadcast_to(scaling.climatology(basis), self.fine.values.shape)


def read_pairs(
    ds: xr.Dataset | xr.DataArray,
    target: xr.Dataset | xr.DataArray | None,
    factor: int | None,
    *,
    variables: Sequence[str] | None,
    statics: xr.Dataset | xr.DataArray | None,
    offsets: Sequence[int],
    lead_time: bool,
    fewest: int = FEWEST,
    weights: str = "cells",
    spacing: float | None = None,
    large: Large | None = None,
    ends: str = "drop",
) -> Pairs:
    """Read pairs into memory and check them, or some of them where they are too large for it.

    Parameters
    ----------
    ds
        Coarse fields; without `target` the fine ones, whose block means are the coarse ones.
    target
        Fine fields, at some of the times of `ds`.
    factor
        Cells per coarse cell along each axis, without `target`.
    variables
        Which of the fine variables.
    weights
        Of the block means that are made without `target`, 'cells' or 'areas'.
    spacing
        Seconds from one neighbour to the next; None for those from one time of `ds` to the next.
    large
        What to do with pairs that are not in memory; None: read them.
    ends
        What becomes of times that lack neighbours, see `xgenda.models.conditions.Conditions`.

    Raises
    ------
    OptionError, GridError, StateError
    """
    coarse: Samples | Source
    if target is None:
        if factor is None:
            raise OptionError(
                "factor is missing: for task='downscale' give the cells per coarse cell, for example factor=4, and fine fields as ds; or "
                "pairs: xgenda.train(coarse, target=fine, task='downscale')"
            )
        source, argument = metadata.as_dataset(ds), "ds"
        opened = open_source(ds, variables, fewest=fewest)
        if large is not None and large.streams(opened):
            coarse = block_means(opened, factor, weights)
            return _lazily(opened, coarse, source, ds, statics, offsets, spacing, factor, lead_time, large, argument, ends)
        fine = read_source(opened)
        check_unmasked(fine.valid, "ds", "downscale")
        coarse = _block_means(fine, factor, weights)
    else:
        if factor is not None:
            raise OptionError(f"factor={factor} has no effect with target, whose grid says it. Leave it out.")
        source, argument = metadata.as_dataset(target, "target"), "target"
        opened, given = open_source(source, variables, "target", fewest), open_source(ds, fewest=fewest)
        factor = factor_between(opened.grid, given.grid)
        if large is not None and large.streams(opened, given):
            units = {v.name: v.units for v in opened.variables}
            given = given.in_units([units.get(v.name) for v in given.variables])
            return _lazily(opened, given, source, ds, statics, offsets, spacing, factor, lead_time, large, argument, ends)
        fine, coarse = read_source(opened), read_source(given)
        for name, samples in (("target", fine), ("ds", coarse)):
            check_unmasked(samples.valid, name, "downscale")
        coarse = _in_units_of(coarse, fine)
    order, spacing = checked_offsets(offsets, coarse, spacing)
    places, kept = match(fine, coarse, order, spacing, ends)
    check_kept(len(kept), fine.size, fewest, order, "downscale")
    lead = _leads(ds, coarse, coarse.size)[places[:, order.index(0)]] if lead_time else None
    return dataclasses.replace(_in_memory(fine, coarse, places, kept, order, spacing, factor, lead, statics, source), ends=ends)


def _lazily(
    fine: Source, coarse: Source, source: xr.Dataset, ds: xr.Dataset | xr.DataArray, statics: Any, offsets: Sequence[int], spacing: float | None,
    factor: int | None, lead_time: bool, large: Large, argument: str, ends: str,
) -> Pairs:  # fmt: skip
    """Return pairs of a downscaler of which evenly spaced ones are read."""
    order, spacing = checked_offsets(offsets, coarse, spacing)
    fixed = read_statics(statics, fine.grid)
    leads = _leads(ds, coarse, coarse.size) if lead_time else None
    found = open_reservoir(fine, coarse, order, spacing, large, "downscale", argument, ends)
    return dataclasses.replace(_sampled(found, order, spacing, factor, leads, fixed, source), ends=ends)


def _in_memory(
    fine: Samples, coarse: Samples, places: np.ndarray, kept: np.ndarray, order: tuple[int, ...], spacing: float | None, factor: int | None,
    lead: np.ndarray | None, statics: Any, source: xr.Dataset,
) -> Pairs:  # fmt: skip
    """Return pairs of which all are in memory."""
    if len(kept) < fine.size:
        time = None if fine.time is None else fine.time.isel({fine.dimension: kept})
        fine = dataclasses.replace(fine, values=fine.values[kept], time=time)
    names = remembered_axes(states.enter(source))
    fields, static_names = read_statics(statics, fine.grid)
    return Pairs(fine, coarse, places, order, spacing, factor, lead, fields, static_names, names)


def _sampled(
    found: Reservoir, order: tuple[int, ...], spacing: float | None, factor: int | None, leads: np.ndarray | None,
    statics: tuple[np.ndarray | None, tuple[str, ...]], source: xr.Dataset,
) -> Pairs:  # fmt: skip
    """Return pairs of which evenly spaced ones are in memory; `leads` of all times of the coarse Dataset."""
    if leads is not None:
        found = dataclasses.replace(found, lead=leads[found.coarse.places[found.places[:, order.index(0)]]])
    fine, coarse, places = found.sample()
    lead = None if found.lead is None else found.lead[found.rows]
    return Pairs(fine, coarse, places, order, spacing, factor, lead, *statics, remembered_axes(states.enter(source)), found)


def _leads(ds: xr.Dataset | xr.DataArray, coarse: Samples | Source, size: int) -> np.ndarray:
    return lead_times(metadata.as_dataset(ds), coarse.dimension, size)


def read_background_pairs(
    ds: xr.Dataset | xr.DataArray,
    target: xr.Dataset | xr.DataArray | None,
    lag: str | pd.Timedelta | None,
    *,
    task: str,
    variables: Sequence[str] | None,
    statics: xr.Dataset | xr.DataArray | None,
    lead_time: bool,
    fewest: int = FEWEST,
    large: Large | None = None,
) -> tuple[Pairs, float | None]:
    """Read pairs of a forecast and the truth on the same grid into memory and check them, or some of them where they are too large for it.

    Parameters
    ----------
    ds
        Forecasts at the times that they are for; with `lag` the truth.
    target
        The truth at some of these times; its variables are those of the model.
    lag
        Without `target`: the background of a time is the state so long before.
    task
        Which `xgenda.train` was asked for, for messages.
    large
        What to do with pairs that are not in memory; None: read them.

    Returns
    -------
    Pairs, float or None
        The pairs, whose coarse fields are the backgrounds with the variables and the units of the truth; and the lag in seconds.

    Raises
    ------
    OptionError, GridError, StateError, UnitsError
    """
    if target is not None and lag is not None:
        raise OptionError(f"lag={lag!r} has no effect with target, whose forecasts are given. Leave it out.")
    if lag is not None and lead_time:
        raise OptionError("lead_time=True has no effect with lag, which is the lead time of all. Leave it out.")
    fixed: tuple[np.ndarray | None, tuple[str, ...]]
    if target is not None:
        source = metadata.as_dataset(target, "target")
        opened = open_source(source, variables, "target", fewest)
        state = states.enter(metadata.as_dataset(ds))
        if not state.grid.same_as(opened.grid):
            raise GridError(
                f"The forecasts are on the grid {state.grid.describe()}, and target on {opened.grid.describe()}; for task={task!r} they must be "
                f"the same. Bring them there: ds.genda.regrid(target), or for other grids: task='downscale'"
            )
        if large is not None and large.streams(opened, given := _described(ds, opened.variables, fewest)):
            fixed, leads = read_statics(statics, opened.grid), _leads(ds, given, given.size) if lead_time else None
            found = open_reservoir(opened, given, (0,), None, large, task, "target")
            return _sampled(found, (0,), None, None, leads, fixed, source), None
        fine = read_source(opened)
        coarse = read_samples(as_described(ds, fine.variables), [v.name for v in fine.variables], fewest=fewest)
        seconds = None
    elif lag is not None:
        source = metadata.as_dataset(ds)
        opened, seconds = open_source(ds, variables, fewest=fewest), lag_in_seconds(lag)
        if large is not None and large.streams(opened):
            fixed = read_statics(statics, opened.grid)
            return _sampled(open_lagged(opened, seconds, lag, large, task), (0,), None, None, None, fixed, source), seconds
        fine = read_source(opened)
        coarse = later(fine, seconds, lag)
    else:
        raise OptionError(
            f"task={task!r} needs pairs: xgenda.train(forecasts, target=truth, task={task!r}), or of a single series the time from a background "
            f"to the state that it is one of: xgenda.train(series, task={task!r}, lag='48h')"
        )
    for name, samples in (("target", fine), ("ds", coarse)):
        check_unmasked(samples.valid, name if target is not None else "ds", task)
    places, kept = match(fine, coarse, (0,), None)
    check_kept(len(kept), fine.size, fewest, (0,) if target is not None else None, task)
    lead = _leads(ds, coarse, coarse.size)[places[:, 0]] if lead_time else None
    return _in_memory(fine, coarse, places, kept, (0,), None, None, lead, statics, source), seconds


def as_described(ds: xr.Dataset | xr.DataArray, variables: Sequence[VariableSpec], argument: str = "ds") -> xr.Dataset:
    """Return the variables that a model knows, with its names, in its order and in its units; levels are variables of their own.

    Raises
    ------
    OptionError, UnitsError
        If one is missing, or is in units of another kind.
    """
    state = states.enter(metadata.as_dataset(ds, argument), argument)
    names = [states.match_channel(state.ds, v.name, v.standard_name, argument) for v in variables]
    fields = {}
    for n, v in zip(names, variables, strict=True):
        try:
            fields[v.name] = metadata.convert_units(state.ds[n], v.units)
        except UnitsError as problem:
            raise UnitsError(f"{argument}[{n!r}]: {problem}") from problem
    return xr.Dataset(fields, coords=state.ds.coords)


def _described(ds: xr.Dataset | xr.DataArray, variables: Sequence[VariableSpec], fewest: int) -> Source:
    """Return what `as_described` does, unread."""
    state = states.enter(metadata.as_dataset(ds))
    names = [states.match_channel(state.ds, v.name, v.standard_name, "ds") for v in variables]
    found = open_source(ds, list(dict.fromkeys(state.variables(names))), fewest=fewest).of(names)
    found = found.in_units([v.units for v in variables])
    specs = tuple(dataclasses.replace(s, name=v.name) for s, v in zip(found.variables, variables, strict=True))
    return dataclasses.replace(found, variables=specs)


def _block_means(fine: Samples, factor: int, weights: str) -> Samples:
    import torch

    grid = blocked(fine.grid)
    means = Blocks(grid, factor, weights).mean(torch.as_tensor(fine.values)).numpy()
    return dataclasses.replace(fine, values=means, grid=grid.coarsened(factor))


def _in_units_of(coarse: Samples, fine: Samples) -> Samples:
    """Return coarse fields in the units of the fine ones, where they are the same variables."""
    units = {v.name: v.units for v in fine.variables}
    values, specs = coarse.values.copy(), []
    for c, v in enumerate(coarse.variables):
        wanted = units.get(v.name)
        if wanted is not None and v.units is not None and v.units != wanted:
            scale, offset = metadata.unit_factors(v.units, wanted)
            values[:, c] = values[:, c] * scale + offset
            v = VariableSpec(v.name, v.standard_name, wanted, v.long_name)
        specs.append(v)
    return dataclasses.replace(coarse, values=values, variables=tuple(specs))


def read_statics(statics: Any, grid: AnyGrid) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return fields that never change in model order, standardised, shape (statics, rows, columns), and their names."""
    if statics is None:
        return None, ()
    state = states.enter(metadata.as_dataset(statics, "statics"), "statics")
    if not state.grid.same_as(grid):
        raise GridError(
            f"statics are on the grid {state.grid.describe()}; the fine one is {grid.describe()}. Bring them there: statics.genda.regrid(fine)"
        )
    # what describes the grid, such as the height of the ground, is just what is wanted here
    names = [str(n) for n, v in state.ds.data_vars.items() if set(state.layout.dims) <= set(v.dims) and v.dtype.kind in "fiub"]
    out = []
    for name in names:
        array = state.ds[name].squeeze(drop=True)
        if set(array.dims) != set(state.layout.dims):
            raise OptionError(
                f"statics[{name!r}] has dimensions {array.dims}; fields that never change have {state.layout.dims}."
            )
        values = array.transpose(*state.layout.dims).values.astype(float)
        metadata.check_values(values, name, "statics")
        values = state.orientation.to_model(values)
        spread = values.std()
        if spread <= 1e-12 * max(abs(values).max(), 1e-300):
            raise StateError(f"statics[{name!r}] is the same everywhere; drop it: statics.drop_vars({name!r})")
        out.append((values - values.mean()) / spread)
    if not out:
        raise OptionError(f"statics has no field on the dimensions {state.layout.dims}; it has {list(statics.data_vars)}.")
    return np.stack(out), tuple(names)

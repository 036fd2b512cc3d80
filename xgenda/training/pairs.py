"""Training pairs of a downscaler: coarse fields and the fine ones behind them, at the same times."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata, states
from xgenda.curvilinear import AnyGrid
from xgenda.errors import GridError, OptionError, StateError, UnitsError
from xgenda.formatting import user_level
from xgenda.grids import Grid, factor_between
from xgenda.models.blocks import Blocks
from xgenda.models.conditions import lead_times, neighbours, spacing_of_times
from xgenda.models.spec import VariableSpec
from xgenda.models.templates import remembered_axes
from xgenda.scaling import Scaling, cycle_basis
from xgenda.training.windows import FEWEST, Samples, read_samples


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
    offsets, spacing
        See `xgenda.models.conditions.Conditions`.
    factor
        Where the coarse cells are blocks of fine ones.
    lead
        Lead times in seconds, shape (n,), or None.
    statics, static_names
        Fields that never change, shape (statics, rows, columns), standardised, in model order.
    target
        Names of the horizontal dimensions and coordinates of the fine fields.
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
) -> Pairs:
    """Read pairs into memory and check them.

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

    Raises
    ------
    OptionError, GridError, StateError
    """
    if target is None:
        if factor is None:
            raise OptionError(
                "factor is missing: for task='downscale' give the cells per coarse cell, for example factor=4, and fine fields as ds; or "
                "pairs: xgenda.train(coarse, target=fine, task='downscale')"
            )
        fine = read_samples(ds, variables, fewest=fewest)
        if fine.valid is not None:
            raise StateError(_MASKED.format("ds", "downscale"))
        coarse = _block_means(fine, factor, weights)
        source = metadata.as_dataset(ds)
    else:
        if factor is not None:
            raise OptionError(f"factor={factor} has no effect with target, whose grid says it. Leave it out.")
        fine = read_samples(metadata.as_dataset(target, "target"), variables, "target", fewest)
        coarse = read_samples(ds, fewest=fewest)
        for name, samples in (("target", fine), ("ds", coarse)):
            if samples.valid is not None:
                raise StateError(_MASKED.format(name, "downscale"))
        factor = factor_between(fine.grid, coarse.grid)
        coarse = _in_units_of(coarse, fine)
        source = metadata.as_dataset(target, "target")
    order, spacing = _offsets(offsets, coarse, spacing)
    places, kept = _match(fine, coarse, order, spacing)
    if len(kept) < fewest:
        raise StateError(
            f"Of {len(fine.values)} fine fields {len(kept)} have all the coarse ones that they need; at least {fewest} are needed."
        )
    ends = max(order) - min(order)  # the first and the last lack neighbours in any case
    if len(kept) < min(len(fine.values) - ends, len(fine.values) * (1 - FEW_LOST)):
        warnings.warn(
            f"{len(fine.values) - len(kept)} of {len(fine.values)} fine fields have not all the coarse ones that they need, and are left out.",
            stacklevel=user_level(),
        )
    lead = None
    if lead_time:
        given = metadata.as_dataset(ds)
        all_leads = lead_times(given, coarse.dimension, len(coarse.values))
        lead = all_leads[places[:, order.index(0)]]
    if len(kept) < len(fine.values):
        time = None if fine.time is None else fine.time.isel({fine.dimension: kept})
        fine = dataclasses.replace(fine, values=fine.values[kept], time=time)
    names = remembered_axes(states.enter(source))
    fields, static_names = read_statics(statics, fine.grid)
    return Pairs(fine, coarse, places, order, spacing, factor, lead, fields, static_names, names)


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
) -> tuple[Pairs, float | None]:
    """Read pairs of a forecast and the truth on the same grid into memory and check them.

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
    if target is not None:
        fine = read_samples(metadata.as_dataset(target, "target"), variables, "target", fewest)
        given = states.enter(metadata.as_dataset(ds))
        if not given.grid.same_as(fine.grid):
            raise GridError(
                f"The forecasts are on the grid {given.grid.describe()}, and target on {fine.grid.describe()}; for task={task!r} they must be "
                f"the same. Bring them there: ds.genda.regrid(target), or for other grids: task='downscale'"
            )
        coarse = read_samples(as_described(ds, fine.variables), [v.name for v in fine.variables], fewest=fewest)
        seconds = None
    elif lag is not None:
        fine = read_samples(ds, variables, fewest=fewest)
        seconds = lag_in_seconds(lag)
        coarse = _later(fine, seconds, lag)
    else:
        raise OptionError(
            f"task={task!r} needs pairs: xgenda.train(forecasts, target=truth, task={task!r}), or of a single series the time from a background "
            f"to the state that it is one of: xgenda.train(series, task={task!r}, lag='48h')"
        )
    for name, samples in (("target", fine), ("ds", coarse)):
        if samples.valid is not None:
            raise StateError(_MASKED.format(name if target is not None else "ds", task))
    places, kept = _match(fine, coarse, (0,), None)
    if len(kept) < fewest:
        raise StateError(f"Of {len(fine.values)} states {len(kept)} have a background; at least {fewest} are needed.")
    if target is not None and len(kept) < len(fine.values) * (1 - FEW_LOST):
        warnings.warn(
            f"{len(fine.values) - len(kept)} of {len(fine.values)} states have no background, and are left out.",
            stacklevel=user_level(),
        )
    lead = None
    if lead_time:
        given_leads = metadata.as_dataset(ds)
        lead = lead_times(given_leads, coarse.dimension, len(coarse.values))[places[:, 0]]
    if len(kept) < len(fine.values):
        time = None if fine.time is None else fine.time.isel({fine.dimension: kept})
        fine = dataclasses.replace(fine, values=fine.values[kept], time=time)
    names = remembered_axes(states.enter(metadata.as_dataset(ds if target is None else target)))
    fields, static_names = read_statics(statics, fine.grid)
    return Pairs(fine, coarse, places, (0,), None, None, lead, fields, static_names, names), seconds


def lag_in_seconds(lag: Any) -> float:
    """Return a positive time span in seconds."""
    try:
        seconds = 0.0 if isinstance(lag, (int, float)) else float(pd.Timedelta(lag).total_seconds())
    except (TypeError, ValueError):
        seconds = 0.0
    if not seconds > 0:
        raise OptionError(f"lag={lag!r} is not accepted; give a time span as pandas reads it, for example lag='48h'.")
    return seconds


def _later(samples: Samples, seconds: float, lag: Any) -> Samples:
    """Return the states as backgrounds of the times so much later."""
    time = samples.time
    if time is None:
        raise OptionError(f"lag={lag!r} needs a time coordinate, and ds has none; give pairs: target=")
    if len(np.unique(metadata.time_labels(time))) < len(time):
        raise OptionError(
            f"lag={lag!r} needs times that are there once, and ds holds some more than once, as runs one after the other do; give pairs: target="
        )
    step = (
        np.timedelta64(round(seconds * 1e9), "ns") if time.dtype.kind == "M" else pd.Timedelta(seconds=seconds).to_pytimedelta()
    )
    moved = time.copy(data=time.values + step)
    if not np.isin(metadata.time_labels(moved), metadata.time_labels(time)).any():
        steps = np.sort(metadata.seconds_between(np.sort(time.values)))
        raise OptionError(
            f"lag={lag!r}: no two times of ds are so far apart; neighbours are {steps[0] / 3600:g} to {steps[-1] / 3600:g} h apart. Give a "
            f"multiple of that, for example lag='{np.median(steps) / 3600:g}h'"
        )
    return dataclasses.replace(samples, time=moved)


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


FEW_LOST = 0.02  # of the fine fields may lack coarse ones without a word
_MASKED = (
    "{0} holds cells that are NaN at all times, and task={1!r} has no mask. Fill them or crop: {0}.fillna(...), {0}.isel(...)"
)


def _block_means(fine: Samples, factor: int, weights: str) -> Samples:
    if not isinstance(fine.grid, Grid):
        raise GridError(
            "factor needs latitude and longitude along one axis each. Give coarse fields instead: xgenda.train(coarse, target=fine, "
            "task='downscale')"
        )
    import torch

    means = Blocks(fine.grid, factor, weights).mean(torch.as_tensor(fine.values)).numpy()
    return dataclasses.replace(fine, values=means, grid=fine.grid.coarsened(factor))


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


def _offsets(offsets: Sequence[int], coarse: Samples, spacing: float | None) -> tuple[tuple[int, ...], float | None]:
    found = tuple(offsets) if isinstance(offsets, (tuple, list, range, np.ndarray)) else ()
    if (
        not found
        or any(isinstance(o, str) for o in found)
        or any(isinstance(o, bool) or int(o) != o for o in found)
        or 0 not in found
    ):
        raise OptionError(
            f"neighbours={offsets!r} is not accepted; give whole steps with 0 among them, for example neighbours=(-1, 0, 1)."
        )
    order = (0, *sorted({int(o) for o in found} - {0}))  # the time itself first
    if order == (0,):
        return order, None
    if coarse.time is None:
        raise OptionError(f"neighbours={offsets!r} needs a time coordinate, and ds has none.")
    return order, spacing_of_times(coarse.time.values) if spacing is None else spacing


def _match(fine: Samples, coarse: Samples, offsets: tuple[int, ...], spacing: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the coarse fields of each fine field that has them all, shape (n, offsets), and which fine fields these are."""
    if fine.time is None or coarse.time is None:
        if len(fine.values) != len(coarse.values) or (fine.time is None) != (coarse.time is None):
            raise OptionError(
                f"target has {len(fine.values)} fields along {fine.dimension!r} and ds {len(coarse.values)} along {coarse.dimension!r}; without "
                f"times on both sides they must be as many, in the same order."
            )
        return np.arange(len(fine.values))[:, None], np.arange(len(fine.values))
    n = len(fine.values)
    if len(np.unique(metadata.time_labels(coarse.time))) < len(
        coarse.values
    ):  # runs one after the other: only the order can tell
        if len(coarse.values) == n and (coarse.time.values == fine.time.values).all() and offsets == (0,):
            return np.arange(n)[:, None], np.arange(n)
        raise OptionError(
            "ds holds a time more than once, so that target must have the same times in the same order, and neighbours cannot be told; "
            "give one run, or the runs one after the other without neighbours."
        )
    try:
        places = neighbours(coarse.time.values, fine.time.values, offsets, spacing)
    except TypeError as problem:
        raise OptionError(
            f"The times of ds and target are of two calendars: {problem}. Convert one: ds.convert_calendar('standard')"
        ) from problem
    kept = np.flatnonzero((places >= 0).all(1))
    if not len(kept) and (places[:, offsets.index(0)] >= 0).any():
        raise OptionError(
            f"ds has the times of target, and none with all its neighbours {', '.join(f'{o * (spacing or 0) / 3600:+g} h' for o in offsets if o)}. "
            f"Give a series with such steps, or train without neighbours."
        )
    if not len(kept):
        raise OptionError(
            f"ds has none of the times of target: {coarse.time.values.min()} to {coarse.time.values.max()} against {fine.time.values.min()} to "
            f"{fine.time.values.max()}. Shift those of one, where they mean the same: ds.assign_coords(time=target.time)"
        )
    return places[kept], kept


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

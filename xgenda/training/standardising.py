"""Training pairs of a downscaler or a background model, standardised and on the grid of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from xgenda.errors import OptionError
from xgenda.grids import rectilinear
from xgenda.models import means
from xgenda.models.blocks import Blocks, find_blocks
from xgenda.models.conditions import Conditions, planes_of
from xgenda.models.features import Features
from xgenda.models.spec import ModelSpec
from xgenda.scaling import Scaling, check_named, cycle_basis, fit_scaling
from xgenda.training.pairs import Pairs
from xgenda.training.statistics import Statistics
from xgenda.training.windows import FOLDS, HELD, blocks, memory_of, near_blocks


@dataclass(frozen=True, eq=False)
class Prepared:
    """Standardised pairs, and what standardised them.

    Attributes
    ----------
    spec
        Without options and training record.
    fine
        Standardised, shape (n, channels, rows, columns), float64.
    coarse
        Standardised, shape (n, inputs, coarse cells), float64.
    planes
        Shape (n, planes).
    interpolated, features
        On the fine grid, see `Features`.
    fold, near
        Block of each pair, and to which other blocks it is too near in time to help predict them, shape (blocks, n).
    matched
        See `xgenda.models.means.Pairs`.
    weights
        Where coarse fields are block means of the fine ones.
    reach
        For how many times the fine fields resemble each other.
    """

    spec: ModelSpec
    fine: Tensor
    coarse: Tensor
    planes: Tensor
    interpolated: Tensor
    features: Features
    fold: np.ndarray
    near: np.ndarray
    matched: list[tuple[int, float] | None]
    weights: str | None
    reach: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the fine fields."""
        c, ny, nx = self.fine.shape[1:]
        return c, ny, nx

    def split(self) -> tuple[Tensor, Tensor]:
        """Return pairs to train on, none of which is near the validation block, and those of that block."""
        held = self.fold == HELD
        return torch.as_tensor(np.flatnonzero(~(held | self.near[HELD]))), torch.as_tensor(np.flatnonzero(held))

    def for_mean(self) -> means.Pairs:
        """Return what `means.fit_mean` takes."""
        built = None
        grid = None if self.weights is None else rectilinear(self.spec.grid, "task='downscale'")
        if grid is not None and self.weights is not None:
            built = Blocks(grid, int(self.spec.factor or 0), self.weights)
        return means.Pairs(
            self.coarse, self.interpolated, self.fine, self.fold, self.matched, built, grid, self.spec.wraps, self.near
        )


def prepare_pairs(
    pairs: Pairs, climatology: str, transform: Any, offset: Any, bounds: Any, cycle: str, name: str, kind: str, licence: str,
    homogeneous: bool = False, validation: Any = None, lead_unit: float | None = None, task: str = "downscale", lag: float | None = None,
) -> Prepared:  # fmt: skip
    """Fit the standardisation of both sides, and put everything on the fine grid.

    A background is standardised as the truth is: where it says nothing else, it is the truth.
    """
    time, every = pairs.every.time, pairs.reservoir
    fine_names, coarse_names = ([v.name for v in s.variables] for s in (pairs.fine, pairs.coarse))
    check_named(transform, offset, bounds, fine_names + coarse_names)

    def fit(values: np.ndarray, names: list[str], known: Statistics | None) -> Scaling:
        limits = None if bounds is None else {k: v for k, v in bounds.items() if k in names}
        if known is not None:
            return known.scaling(limits, homogeneous)
        return fit_scaling(
            values, time, names, cycle=climatology, transform=transform, offset=offset, bounds=limits, homogeneous=homogeneous
        )

    scaling = fit(pairs.fine.values, fine_names, None if every is None else every.statistics)
    input_scaling = scaling
    if task == "downscale":
        input_scaling = fit(pairs.inputs(0), coarse_names, None if every is None else every.input_statistics)
    unit, leads = None, pairs.lead if every is None else every.lead
    if leads is not None:
        unit = lead_unit or float(max(np.abs(leads).max(), 1.0))
    conditions = Conditions(
        pairs.coarse.variables,
        pairs.coarse.grid,
        input_scaling,
        pairs.offsets,
        pairs.spacing,
        seen_cycle(cycle, time),
        unit,
        pairs.static_names,
        pairs.ends,
    )
    statics = None if pairs.statics is None else torch.as_tensor(pairs.statics).float()
    spec = ModelSpec(
        name, task, kind, pairs.fine.variables, pairs.fine.grid, scaling, pairs.factor, inputs=conditions, licence=licence,
        needs_background=task != "downscale",
        options={
            "target": dict(pairs.target), **({"wraps": True} if homogeneous and pairs.factor is not None else {}),
            **({} if lag is None else {"lag": lag}),
        },
    )  # fmt: skip
    return standardised_pairs(pairs, spec, Features(conditions, pairs.fine.grid, statics, spec.wraps), validation)


def standardised_pairs(pairs: Pairs, spec: ModelSpec, features: Features, validation: Any = None) -> Prepared:
    """Return pairs as a model standardises them, and everything on the fine grid."""
    scaling, conditions = spec.scaling, features.conditions
    assert scaling is not None
    time, n, input_scaling = pairs.fine.time, len(pairs.fine.values), conditions.scaling
    fine_names, coarse_names = ([v.name for v in s.variables] for s in (pairs.fine, pairs.coarse))
    z_in = []
    for k in range(len(pairs.offsets)):
        around = None if pairs.coarse.time is None else pairs.coarse.time.isel({pairs.coarse.time.dims[0]: pairs.places[:, k]})
        z_in.append(input_scaling.forward(pairs.inputs(k), cycle_basis(around, input_scaling.cycle, n)))
    coarse = torch.as_tensor(np.concatenate(z_in, 1)).flatten(2)
    fine = torch.as_tensor(scaling.forward(pairs.fine.values, cycle_basis(time, scaling.cycle, n)))
    matched: list[tuple[int, float] | None] = [None] * len(fine_names)
    for c, v in enumerate(fine_names):
        if v not in coarse_names:
            continue
        i = coarse_names.index(v)
        if (scaling.transforms[c], scaling.offsets[c]) == (input_scaling.transforms[i], input_scaling.offsets[i]):
            matched[c] = (i, float(input_scaling.std[i].mean() / scaling.std[c].mean()))
    weights = None
    common = [(c, coarse_names.index(m)) for c, m in enumerate(fine_names) if m in coarse_names]
    if pairs.factor is not None and len(common) == len(fine_names):
        grid = rectilinear(pairs.fine.grid, "task='downscale'")
        weights = find_blocks(pairs.inputs(0)[:, [k for _, k in common]], pairs.fine.values, grid, pairs.factor, scaling)
    planes = torch.as_tensor(planes_of(time, conditions.cycle, pairs.lead, conditions.lead_time, n))
    interpolated = features.interpolated(coarse, features.everywhere())
    fold = blocks(time, n, FOLDS, validation) if pairs.reservoir is None else pairs.reservoir.fold[pairs.reservoir.rows]
    reach = memory_of(fine.flatten(1).numpy(), time)
    near = near_blocks(fold, time, reach)
    return Prepared(spec, fine, coarse, planes, interpolated, features, fold, near, matched, weights, reach)


def seen_cycle(asked: str, time: xr.DataArray | None) -> str:
    """Return which harmonics are inputs; 'auto': those that the training times go through."""
    if asked != "auto":
        if asked != "none" and time is None:
            raise OptionError(f"time_features={asked!r} needs a time coordinate, and the fields have none; leave it out.")
        return asked
    if time is None:
        return "none"
    hours, months = len(np.unique(time.dt.hour)), len(np.unique(time.dt.month))
    return "+".join(n for n, count in (("dayofyear", months), ("hour", hours)) if count > 1) or "none"

"""An unconditional prior as a downscaler: coarse fields are observations of means over their cells."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata, operators, states
from xgenda.assimilation import assimilate
from xgenda.engine import check_plausible
from xgenda.errors import GridError, ModelNotFoundError, OptionError
from xgenda.grids import factor_between
from xgenda.models.generative import GenerativeModel
from xgenda.models.spec import ModelSpec
from xgenda.models.templates import axes_of_result
from xgenda.models.variables import VariableSpec
from xgenda.regridding import Regridder
from xgenda.weights import interpolation

LEAST_INSIDE = 0.5  # of the coarse cells
SHARE_OF_SPREAD = 0.02  # of the climatological standard deviation: the error that coarse values are taken to have


def downscale_by_prior(
    state: states.State, model: GenerativeModel, target: Any, error: Any, *, members: int, seed: int, **options: Any
) -> xr.Dataset:
    """Assimilate coarse fields as observations of means over the cells of an unconditional prior."""
    spec = model.spec
    if spec.grid is None or spec.scaling is None:
        raise ModelNotFoundError(
            f"model={spec.name!r} has no grid of its own, and a prior that downscales needs one: train it on fine fields, xgenda.train(fine)"
        )
    there = [v for v in spec.variables if any(v.name == str(n) or v.standard_name == state.ds[n].attrs.get("standard_name", object())
                                              for n in state.ds.data_vars)]  # fmt: skip
    if not there:
        raise OptionError(f"ds has none of the variables of model={spec.name!r}: {', '.join(v.name for v in spec.variables)}.")
    names = [states.match_channel(state.ds, v.name, v.standard_name) for v in there]
    on_levels = [n for n in names if states.parse_channel(n)[1] is not None]
    if on_levels:
        raise OptionError(
            f"ds[{states.parse_channel(on_levels[0])[0]!r}] has levels, and an unconditional prior downscales single fields. Train a downscaler: "
            f"xgenda.train(fine, task='downscale', factor=4)"
        )
    metadata.check_dims(state.ds, names, state.layout)
    _check_prior(state, spec, names, there, error)
    fine = _blank(state, spec, target, dict(zip((v.name for v in there), names, strict=True)))
    factor = factor_between(spec.grid, state.grid)
    coarse = state.ds[names].rename({n: f"coarse_{n}" for n in names})
    east = coarse[state.layout.longitude]  # of observations between -180 and 360
    turns = np.ceil(max(float(east.max()) - 360.0, 0.0) / 360.0) - np.ceil(max(-180.0 - float(east.min()), 0.0) / 360.0)
    coarse = coarse.assign_coords({east.name: (east - 360.0 * turns).assign_attrs(east.attrs)})
    maps: dict[str, Any] = {
        f"coarse_{n}": operators.coarsened(n, factor=factor) if factor is not None
        else operators.regridded(n, Regridder(fine, coarse, method="conservative"))
        for n in names
    }  # fmt: skip
    given: Any = {f"coarse_{k}": e for k, e in error.items()} if isinstance(error, Mapping) else error
    if given is None:  # in the units of ds
        given = {
            f"coarse_{n}": SHARE_OF_SPREAD
            * _typical(spec, spec.variables.index(v))
            / metadata.unit_factors_of(state.ds[n], v.units)[0]
            for n, v in zip(names, there, strict=True)
        }
    out = assimilate(
        fine, coarse, model=model, error=given, members=members, seed=seed, operators=maps, background_check=None, **options
    )  # fmt: skip
    return out


def _check_prior(state: states.State, spec: ModelSpec, names: list[str], there: list[VariableSpec], error: Any) -> None:
    """Refuse errors that are no errors, a product of another region, and values far from the climate of the prior."""
    for name, sigma in error.items() if isinstance(error, Mapping) else () if error is None else [("", error)]:
        if name and name not in names:
            raise OptionError(f"error names {name!r}, and ds has {', '.join(map(repr, names))}.")
        if isinstance(sigma, bool) or not isinstance(sigma, numbers.Real) or not 0 < float(sigma) < np.inf:
            raise OptionError(
                f"error={error!r} is not accepted; give a standard deviation above zero in the units of ds, or a mapping per variable."
            )
    assert spec.grid is not None
    inside = interpolation(spec.grid, *state.grid.points())[1].mean()
    if inside < LEAST_INSIDE:
        raise GridError(
            f"{100 * (1 - inside):.0f} % of the coarse cells lie outside of the grid of model={spec.name!r}, {spec.grid.describe()}; ds is on "
            f"{state.grid.describe()}. Crop ds to that region, or take another model."
        )
    scaling = spec.scaling
    assert scaling is not None
    for n, v in zip(names, there, strict=True):
        if state.ds[n].chunks is not None:
            continue
        scale, offset = metadata.unit_factors_of(state.ds[n], v.units)
        check_plausible(n, float(state.ds[n].mean()) * scale + offset, scaling, spec.variables.index(v), v.units)


def _blank(state: states.State, spec: ModelSpec, target: Any, known: Mapping[str, str]) -> xr.Dataset:
    """Return zeros on the grid of a prior in the order, names and units of `ds`, whose name of each variable `known` has."""
    ds, layout = state.ds, state.layout
    _, dims, places = axes_of_result(spec, state, target, layout.dims)
    coords = {n: xr.Variable(*c) if isinstance(c, tuple) else c for n, c in places.items()}
    for n, c in coords.items():
        c.attrs = {**(ds[n].attrs if n in ds.coords else {}), **c.attrs}
    renamed = dict(zip(layout.dims, dims, strict=True))
    first = ds[next(iter(known.values()))]
    order = [renamed.get(str(d), str(d)) for d in first.dims]
    if layout.time is not None:
        coords[layout.time] = ds[layout.time].variable
        if layout.time in ds.dims and layout.time not in order:
            order = [layout.time, *order]
    sizes = {**{str(d): ds.sizes[d] for d in first.dims}, **{str(d): n for c in coords.values() for d, n in c.sizes.items()}}
    blank = np.zeros([sizes[d] for d in order], dtype=np.float32)
    out = {}
    for v in spec.variables:
        out[known.get(v.name, v.name)] = (order, blank, {**v.attrs, **(ds[known[v.name]].attrs if v.name in known else {})})
    lazy = (
        None if layout.time is None else next((ds[n].chunksizes.get(layout.time) for n in known.values() if ds[n].chunks), None)
    )
    found = xr.Dataset(out, coords=coords, attrs=ds.attrs)
    return found if lazy is None else found.chunk({str(layout.time): lazy})


def _typical(spec: ModelSpec, channel: int) -> float:
    """Return the climatological standard deviation of a channel in its units."""
    assert spec.scaling is not None
    std = float(np.mean(spec.scaling.std[channel]))
    if spec.scaling.transforms[channel] == "log":
        return std * float(np.exp(spec.scaling.mean[0, channel].mean()))
    return std

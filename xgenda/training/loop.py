"""`train`: fit a generative model to a Dataset."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

from xgenda.devices import resolve_device
from xgenda.engine import check_seed
from xgenda.errors import CheckpointError, OptionError, OutputExistsError, check_choice, check_count, check_flag, check_pair
from xgenda.models.checkpoints import as_stored
from xgenda.models.classical import METHODS
from xgenda.models.diffusive import ARCHITECTURES
from xgenda.models.generative import GenerativeModel
from xgenda.scaling import CYCLES
from xgenda.training.anchoring import ANCHORS
from xgenda.training.classical import train_classical
from xgenda.training.downscalers import STAGES, Recipe, train_downscaler
from xgenda.training.optimiser import Effort, Optimiser
from xgenda.training.pairs import read_pairs
from xgenda.training.priors import continue_prior, train_prior
from xgenda.training.windows import Samples, read_samples

CLASSICAL = (
    "target",
    "factor",
    "method",
    "calibrate",
)  # what methods in closed form take of what belongs to task 'downscale', or do without
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(
    ds: xr.Dataset | xr.DataArray,
    *,
    task: str = "prior",
    target: xr.Dataset | xr.DataArray | None = None,
    factor: int | None = None,
    method: str = "diffusion",
    stages: str = "both",
    statics: xr.Dataset | xr.DataArray | None = None,
    neighbours: Sequence[int] = (0,),
    time_features: str = "auto",
    lead_time: bool = False,
    conserve: bool | Literal["auto"] = "auto",
    calibrate: bool = True,
    mean_condition: bool = True,
    tile: int | tuple[int, int] | Literal["auto"] | None = None,
    start: GenerativeModel | str | os.PathLike[str] | None = None,
    variables: Sequence[str] | None = None,
    climatology: str = "auto",
    transform: str | Mapping[str, str] = "none",
    offset: float | Mapping[str, float] = 1e-3,
    bounds: Mapping[str, Sequence[float | None]] | None = None,
    anchor: str | None = "auto",
    window: int = 1,
    periodic: bool | Literal["both"] | None = None,
    width: int = 16,
    architecture: str = "unet",
    epochs: int | None = None,
    steps: int | None = None,
    time_budget: str | float | None = None,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    ema: float = 0.995,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    name: str | None = None,
    licence: str = "that of the training data",
    device: str = "auto",
    dtype: str = "float32",
    progress: bool | None = None,
) -> GenerativeModel:
    """Train a generative model on the fields of a Dataset.

    The fields are cut into blocks of consecutive times. One block is withheld for validation, and the weights with the lowest
    validation loss are kept; training starts from the classical answer (a Gaussian, a linear regression), and what is kept
    is never worse than it on that block.

    Parameters
    ----------
    ds
        Training fields along ``time`` or ``member``, at least 20, without NaN. Read into memory. For 'downscale' the coarse fields, or
        without `target` the fine ones.
    task
        'prior': an unconditional diffusion prior for `assimilate`. 'downscale': the fine fields behind coarse ones, for `downscale`.
    target
        For 'downscale': the fine fields, at times of `ds`, on any grid within that of `ds`. They may hold other variables than `ds`.
    factor
        For 'downscale' without `target`: the fine fields are those of `ds`, the coarse ones their means over blocks of so many cells along
        each axis.
    method
        For 'downscale': 'diffusion', or a classical method to compare with: 'bilinear' (interpolation of the coarse values), 'bcsd'
        (quantile mapping and spatial disaggregation) or 'ridge' (regression on all coarse fields), each with its own past errors as members.
    stages
        For 'downscale': 'both', a linear mean chosen by cross-validation, a network that regresses what it leaves, and a diffusion
        of the residual; 'residual', without the network for the mean; 'single', diffusion of the fine fields themselves.
    statics
        For 'downscale': fields on the fine grid that never change, such as orography and land-sea mask. Stored with the model.
    neighbours
        For 'downscale': which times the model sees, in steps of the times of `ds`, such as (-1, 0, 1).
    time_features
        For 'downscale': harmonics that the networks see: 'none', 'dayofyear', 'hour', 'dayofyear+hour', or 'auto', those that the times of
        the training go through.
    lead_time
        For 'downscale': whether the networks see the lead time of forecasts, a coordinate of `ds` with standard_name ``forecast_period``.
    conserve
        For 'downscale': whether every member keeps the coarse values as means of its blocks. 'auto': where they are these in training.
    calibrate
        For 'downscale': whether the spread of the members is corrected by scale, on the validation block. Stored with the model.
    mean_condition
        For 'downscale': whether the diffusion sees the mean.
    tile
        For 'downscale': rows and columns of the random parts of the fine grid that networks are trained on, for grids that are too large;
        `downscale` then samples in such tiles. Without an anchor. 'auto': twice the distance at which the residuals of the linear mean are
        no longer correlated, where the grid is larger than 448 cells.
    start
        Model, name or path to go on from (task 'prior'): its scaling, anchor and network are kept, and trained on `ds`.
    variables
        Which variables of `ds`; by default all on its grid.
    climatology
        Part of the cycle to remove: 'none', 'dayofyear', 'hour', 'dayofyear+hour'; 'auto': for a prior what describes withheld blocks of
        times best, for 'downscale' none.
    transform, offset
        'none', or 'log' for log(x + offset), with the offset in the units of the variable; for all variables or by a mapping,
        such as ``transform={"precipitation": "log"}``. Results of a logarithm are not below zero and not above
        twice the largest training value; `bounds` says otherwise. The offset is best about what can be measured: 0.1 mm for daily precipitation.
    bounds
        Lowest and highest value per variable, which results keep to, None for none: ``bounds={"relative_humidity": (0, 100)}``.
    anchor
        The network corrects the exact denoiser of a Gaussian, fitted and cross-validated: 'eof' (EOFs plus a residual), 'hybrid' (the
        sample covariance, under a taper or not, blended with a function of distance), 'localized' (the sample covariance under a taper; for
        small grids), 'spectral' (homogeneous fields on a doubly periodic grid), or 'auto': the better of the first two by
        cross-validation. None: a plain EDM denoiser; a Gaussian is then still fitted, for guidance='anchor'.
    window
        For 'prior': number of consecutive times that the model sees together, odd. Above 1, `assimilate` solves all times of the
        Dataset together, composed of such windows.
    periodic
        Whether longitude wraps (None: where the grid goes around the sphere); 'both' for doubly periodic boxes.
    width
        Channels of the network at full resolution.
    architecture
        For 'downscale': 'unet', small and fast, for any grid; 'songunet', the network of the published models, for grids whose rows and
        columns are multiples of 4.
    epochs, steps, time_budget
        How long: passes over the data, optimiser steps, or a time such as '10min' (or seconds), for each of the networks of
        the task together; the first that is reached. By default 60 epochs.
    batch_size, learning_rate, ema
        Of AdamW with a cosine schedule, and the decay of the averaged weights.
    seed
        Of initialisation and noise.
    out
        File to write, ending in ``.safetensors``.
    overwrite
        Whether `out` may exist.
    name, licence
        Stored with the model.
    device, progress
        As in `assimilate`.
    dtype
        Of the network's arithmetic in training: 'float32', or 'bfloat16', which is two to three times as fast on recent processors.
        Weights are float32 either way.

    Returns
    -------
    GenerativeModel
        Its ``spec.training`` records data, period, options and the validation loss relative to the classical start.

    Raises
    ------
    OptionError, StateError, GridError, OutputExistsError
        Before any training.

    References
    ----------
    Karras, T. et al. (2022), Elucidating the design space of diffusion-based generative models, arXiv:2206.00364.
    Rozet, F. and Louppe, G. (2023), Score-based data assimilation, arXiv:2306.10574, for `window`.
    Mardani, M. et al. (2023), Residual corrective diffusion modeling for km-scale atmospheric downscaling, arXiv:2309.15214.

    Examples
    --------
    >>> import xgenda
    >>> ds = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=slice(0, 60))
    >>> model = xgenda.train(ds, steps=2, width=8)
    >>> model.spec.task
    'prior'
    """
    check_choice("task", task, ("prior", "downscale"))
    if anchor is not None:
        check_choice("anchor", anchor, ("auto", *ANCHORS))
    if periodic is not None and periodic not in (True, False, "both"):
        raise OptionError(f"periodic={periodic!r} is not accepted; it must be True, False, 'both' or None.")
    if anchor == "spectral" and periodic != "both":
        raise OptionError("anchor='spectral' is for doubly periodic grids; pass periodic='both' too, or use anchor='eof'.")
    if check_count("window", window) % 2 == 0:
        raise OptionError(
            f"window={window} is not accepted; it must be odd: a state with as many before it as after it, such as 5."
        )
    if window > 1 and task != "prior":
        raise OptionError(f"window={window} belongs to task='prior'.")
    if not isinstance(neighbours, (tuple, list, range)):
        raise OptionError(
            f"neighbours={neighbours!r} is not accepted; give whole steps with 0 among them: neighbours=(-1, 0, 1)."
        )
    own = {
        "target": (target, None), "factor": (factor, None), "method": (method, "diffusion"), "stages": (stages, "both"),
        "statics": (statics, None), "neighbours": (tuple(neighbours), (0,)), "time_features": (time_features, "auto"),
        "lead_time": (lead_time, False), "conserve": (conserve, "auto"), "calibrate": (calibrate, True),
        "mean_condition": (mean_condition, True), "tile": (tile, None), "architecture": (architecture, "unet"),
    }  # fmt: skip
    for argument, (given, default) in own.items():
        if given is default or (argument not in ("target", "statics") and given == default):
            continue
        shown = "..." if argument in ("target", "statics") else repr(given)
        if task == "prior":
            raise OptionError(f"{argument}={shown} belongs to task='downscale'; pass it too: task='downscale'")
        if method in METHODS and argument not in CLASSICAL and not (argument, method) == ("neighbours", "ridge"):
            raise OptionError(f"{argument}={shown} has no effect with method={method!r}, which has a closed form. Leave it out.")
    check_choice("method", method, ("diffusion", *METHODS))
    check_choice("stages", stages, STAGES)
    check_choice("architecture", architecture, ARCHITECTURES)
    for argument, cycle in (("time_features", time_features), ("climatology", climatology)):
        check_choice(argument, cycle, ("auto", *CYCLES))
    for argument, flag in (("lead_time", lead_time), ("calibrate", calibrate), ("mean_condition", mean_condition)):
        check_flag(argument, flag)
    if conserve != "auto":
        check_flag("conserve", conserve)
    for argument, number in (("width", width), ("batch_size", batch_size)):
        check_count(argument, number)
    if width % 8:
        raise OptionError(f"width={width} is not accepted; it must be a multiple of 8, for example width=16.")
    for argument, real, highest in (("learning_rate", learning_rate, np.inf), ("ema", ema, 1.0)):
        if isinstance(real, bool) or not isinstance(real, numbers.Real) or not 0 < real < highest:
            below = "" if np.isinf(highest) else f" below {highest:g}"
            raise OptionError(f"{argument}={real!r} is not accepted; it must be a positive number{below}.")
    effort = Effort(
        None if epochs is None else check_count("epochs", epochs),
        None if steps is None else check_count("steps", steps),
        None if time_budget is None else parse_time_budget(time_budget),
    )
    seed = check_seed(seed)
    torch_device = resolve_device(device)
    if out is not None:
        if Path(out).suffix != ".safetensors":
            raise CheckpointError(f"out={str(out)!r}: a model file ends in .safetensors, for example out='model.safetensors'")
        if not Path(out).parent.is_dir():
            raise OptionError(
                f"out={str(out)!r}: there is no folder {str(Path(out).parent)!r}; make it first: mkdir -p {Path(out).parent}"
            )
        if Path(out).exists() and not overwrite:
            raise OutputExistsError(f"out={str(out)!r} exists. Choose another name, or pass overwrite=True.")
    chosen = [variables] if isinstance(variables, str) else variables
    if task == "downscale":
        if start is not None:
            raise OptionError("start is not supported for task='downscale' yet; leave it out.")
        if target is None and factor is not None:
            check_count("factor", factor, 2)
        pairs = read_pairs(ds, target, factor, variables=chosen, statics=statics, offsets=neighbours, lead_time=lead_time)
    else:
        samples = read_samples(ds, chosen)
    optimiser = Optimiser(
        effort, batch_size, learning_rate, ema, seed, torch_device, progress, DTYPES[check_choice("dtype", dtype, DTYPES)]
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        if task == "prior":
            model: GenerativeModel = _trained_prior(
                samples, start, optimiser, climatology=climatology, transform=transform, offset=offset, bounds=bounds, anchor=anchor,
                window=window, periodic=periodic, width=width, name=name, licence=licence,
            )  # fmt: skip
        else:
            recipe = Recipe(
                "none" if climatology == "auto" else climatology, transform, offset, bounds, anchor, periodic, width,
                architecture, stages, mean_condition, conserve, calibrate, time_features, lead_time, _tile(tile),
            )  # fmt: skip
            model = (
                train_downscaler(pairs, recipe, optimiser, name, licence)
                if method == "diffusion"
                else train_classical(pairs, method, recipe, name, licence)
            )
    model = as_stored(model)
    if out is not None:
        model.save(out, overwrite=overwrite)
    return model


def _tile(tile: Any) -> Any:
    """Return rows and columns of a tile, or 'auto'."""
    if tile is None or (isinstance(tile, str) and tile == "auto"):
        return tile
    pair = check_pair("tile", tile)
    if any(n % 4 for n in pair):
        raise OptionError(
            f"tile={tile!r} is not accepted; rows and columns must be multiples of 4, for example tile=64, or 'auto'."
        )
    return pair


def _trained_prior(
    samples: Samples, start: GenerativeModel | str | os.PathLike[str] | None, optimiser: Optimiser, *, climatology: str,
    transform: str | Mapping[str, str], offset: float | Mapping[str, float], bounds: Mapping[str, Sequence[float | None]] | None,
    anchor: str | None, window: int, periodic: bool | Literal["both"] | None, width: int, name: str | None, licence: str,
) -> GenerativeModel:  # fmt: skip
    if start is not None:
        kept = {"window": (window, 1), "width": (width, 16), "anchor": (anchor, "auto"), "climatology": (climatology, "auto"),
                "transform": (transform, "none"), "bounds": (bounds, None), "periodic": (periodic, None)}  # fmt: skip
        for argument, (found, default) in kept.items():
            if found != default:
                raise OptionError(
                    f"{argument}={found!r} has no effect with start, whose network and scaling are kept. Leave it out."
                )
        return continue_prior(samples, start, optimiser, name, licence)
    return train_prior(samples, climatology, transform, offset, bounds, anchor, window, periodic, width, optimiser, name, licence)


def parse_time_budget(budget: str | float) -> float:
    """Return seconds from '90s', '10min', '2h' or a number of seconds."""
    units = {"s": 1.0, "min": 60.0, "h": 3600.0}
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(s|min|h)?\s*", str(budget))
    if not match or float(match[1]) <= 0:
        raise OptionError(f"time_budget={budget!r} is not accepted; give seconds or a text such as '90s', '10min' or '2h'.")
    return float(match[1]) * units[match[2] or "s"]

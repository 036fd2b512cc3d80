"""`train`: fit a generative model to a Dataset."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xarray as xr

from xgenda.devices import resolve_device
from xgenda.engine import check_seed
from xgenda.errors import CheckpointError, OptionError, OutputExistsError, check_choice, check_count
from xgenda.models.checkpoints import content_hash
from xgenda.models.generative import GenerativeModel
from xgenda.training.downscalers import train_downscaler
from xgenda.training.optimiser import Effort, Optimiser
from xgenda.training.priors import ANCHORS, continue_prior, train_prior
from xgenda.training.windows import Samples, read_samples

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(
    ds: xr.Dataset | xr.DataArray,
    *,
    task: str = "prior",
    factor: int | None = None,
    start: GenerativeModel | str | os.PathLike[str] | None = None,
    variables: Sequence[str] | None = None,
    climatology: str = "none",
    transform: str | Mapping[str, str] = "none",
    offset: float | Mapping[str, float] = 1e-3,
    anchor: str | None = "auto",
    window: int = 1,
    periodic: bool | Literal["both"] | None = None,
    width: int = 16,
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
        Training fields along ``time`` or ``member``, at least 20, without NaN. Read into memory.
    task
        'prior': an unconditional diffusion prior for `assimilate`. 'downscale': the fine fields behind their own block means, for
        `downscale`: a regression of the mean and a diffusion of the residual.
    factor
        For 'downscale': cells per coarse cell along each axis.
    start
        Model, name or path to go on from (task 'prior'): its scaling, anchor and network are kept, and trained on `ds`.
    variables
        Which variables of `ds`; by default all on its grid.
    climatology
        Part of the cycle to remove: 'none', 'dayofyear', 'hour', 'dayofyear+hour'.
    transform, offset
        For 'prior': 'none', or 'log' for log(x + offset), with the offset in the units of the variable; for all variables or by a mapping,
        such as ``transform={"precipitation": "log"}``.
    anchor
        The network corrects the exact denoiser of a Gaussian, fitted and cross-validated: 'eof' (EOFs plus a residual), 'localized' (a
        sample covariance under a taper; for small grids), 'spectral' (homogeneous fields on a doubly periodic grid), or 'auto': the
        better of the first two by cross-validation where the grid is small, else 'eof'. None: a plain EDM denoiser; a Gaussian
        is then still fitted, for guidance='anchor'.
    window
        For 'prior': number of consecutive times that the model sees together, odd. Above 1, `assimilate` solves all times of the
        Dataset together, composed of such windows.
    periodic
        Whether longitude wraps (None: where the grid goes around the sphere); 'both' for doubly periodic boxes.
    width
        Channels of the U-Net at full resolution.
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
    if task == "downscale" and factor is None:
        raise OptionError("factor is missing: for task='downscale' give the cells per coarse cell, for example factor=4.")
    if task == "prior" and factor is not None:
        raise OptionError(f"factor={factor} belongs to task='downscale'.")
    samples = read_samples(ds, [variables] if isinstance(variables, str) else variables)
    optimiser = Optimiser(
        effort, batch_size, learning_rate, ema, seed, torch_device, progress, DTYPES[check_choice("dtype", dtype, DTYPES)]
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        model = _trained(
            task, samples, start, optimiser, factor=factor, climatology=climatology, transform=transform, offset=offset, anchor=anchor,
            window=window, periodic=periodic, width=width, name=name, licence=licence,
        )  # fmt: skip
    model.sha256 = content_hash(model)
    if out is not None:
        model.save(out, overwrite=overwrite)
    return model


def _trained(
    task: str, samples: Samples, start: GenerativeModel | str | os.PathLike[str] | None, optimiser: Optimiser, *, factor: int | None,
    climatology: str, transform: str | Mapping[str, str], offset: float | Mapping[str, float], anchor: str | None, window: int,
    periodic: bool | Literal["both"] | None, width: int, name: str | None, licence: str,
) -> GenerativeModel:  # fmt: skip
    if task == "downscale":
        if transform != "none":
            raise OptionError(f"transform={transform!r} belongs to task='prior': a block mean of logarithms is none of values.")
        if start is not None:
            raise OptionError("start is not supported for task='downscale' yet; leave it out.")
        return train_downscaler(
            samples, check_count("factor", factor, 2), climatology, anchor, periodic, width, optimiser, name, licence
        )
    if start is not None:
        kept = {"window": (window, 1), "width": (width, 16), "anchor": (anchor, "auto"), "climatology": (climatology, "none"),
                "transform": (transform, "none"), "periodic": (periodic, None)}  # fmt: skip
        for argument, (found, default) in kept.items():
            if found != default:
                raise OptionError(
                    f"{argument}={found!r} has no effect with start, whose network and scaling are kept. Leave it out."
                )
        return continue_prior(samples, start, optimiser, name, licence)
    return train_prior(samples, climatology, transform, offset, anchor, window, periodic, width, optimiser, name, licence)


def parse_time_budget(budget: str | float) -> float:
    """Return seconds from '90s', '10min', '2h' or a number of seconds."""
    units = {"s": 1.0, "min": 60.0, "h": 3600.0}
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(s|min|h)?\s*", str(budget))
    if not match or float(match[1]) <= 0:
        raise OptionError(f"time_budget={budget!r} is not accepted; give seconds or a text such as '90s', '10min' or '2h'.")
    return float(match[1]) * units[match[2] or "s"]

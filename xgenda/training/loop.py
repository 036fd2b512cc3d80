"""`train`: fit a generative model to a Dataset."""

from __future__ import annotations

import dataclasses
import numbers
import os
import re
import time as clock
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr

from xgenda.devices import resolve_device
from xgenda.engine import check_seed
from xgenda.errors import (
    CheckpointError,
    GendaError,
    OptionError,
    OutputExistsError,
    check_choice,
    check_count,
    check_flag,
    check_pair,
)
from xgenda.models.checkpoints import as_stored
from xgenda.models.classical import METHODS
from xgenda.models.colouring import check_coloured, check_noise
from xgenda.models.diffusive import ARCHITECTURES
from xgenda.models.generative import GenerativeModel
from xgenda.models.latents import PRIORS, LatentModel
from xgenda.models.loading import load_model
from xgenda.scaling import CYCLES, check_kinds
from xgenda.training.anchoring import ANCHORS
from xgenda.training.architectures import check_network_options
from xgenda.training.autoencoders import AutoencoderRecipe, open_gappy, train_autoencoder, train_latent_prior
from xgenda.training.classical import train_classical
from xgenda.training.conversions import open_conversion, train_conversion
from xgenda.training.corpus import open_corpus
from xgenda.training.crops import check_tile
from xgenda.training.downscalers import STAGES, Recipe, train_downscaler
from xgenda.training.journal import Journal
from xgenda.training.optimiser import Effort, Optimiser
from xgenda.training.pairs import read_background_pairs, read_pairs
from xgenda.training.priors import PriorRecipe, train_prior
from xgenda.training.processes import Accelerated, Processes, Single, launched, launched_in_bfloat16
from xgenda.training.reporting import Callback
from xgenda.training.reservoirs import Large
from xgenda.training.resolutions import check_coarse, check_resolutions
from xgenda.training.sources import open_source
from xgenda.training.statistics import content_of, fingerprint
from xgenda.training.transfer import FREEZE
from xgenda.training.tuning import check_common, scales
from xgenda.training.weighting import check_weights

CLASSICAL = (
    "target",
    "factor",
    "method",
    "calibrate",
)  # what methods in closed form take of what belongs to task 'downscale', or do without
TASKS = ("prior", "downscale", "background", "forecast", "autoencoder", "conversion")
OF_BACKGROUND = ("target", "lag", "stages", "statics", "time_features", "lead_time", "mean_condition", "architecture")
#: Which of the options that belong to a task each one has.
OF_TASK: Mapping[str, tuple[str, ...]] = {
    "downscale": (
        "target", "factor", "method", "stages", "statics", "neighbours", "context", "time_features", "lead_time", "conserve", "calibrate",
        "mean_condition", "tile", "architecture",
    ),
    "background": OF_BACKGROUND,
    "forecast": tuple(n for n in OF_BACKGROUND if n not in ("target", "lead_time")),
    "autoencoder": ("latent", "variational", "beta", "latent_prior"),
    "conversion": ("target",),
}  # fmt: skip
LEARNING_RATE = 2e-3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(
    ds: xr.Dataset | xr.DataArray,
    *,
    task: str = "prior",
    target: xr.Dataset | xr.DataArray | None = None,
    lag: str | pd.Timedelta | None = None,
    factor: int | None = None,
    method: str = "diffusion",
    stages: str = "both",
    statics: xr.Dataset | xr.DataArray | None = None,
    neighbours: Sequence[int] = (0,),
    context: int = 0,
    time_features: str = "auto",
    lead_time: bool = False,
    conserve: bool | Literal["auto"] = "auto",
    calibrate: bool = True,
    mean_condition: bool = True,
    tile: int | tuple[int, int] | Mapping[str, int] | Literal["auto"] | None = None,
    latent: int | None = None,
    variational: bool = True,
    beta: float = 1.0,
    latent_prior: str = "normal",
    start: GenerativeModel | str | os.PathLike[str] | None = None,
    variables: Sequence[str] | None = None,
    climatology: str = "auto",
    transform: str | Mapping[str, str] = "none",
    offset: float | Mapping[str, float] = 1e-3,
    bounds: Mapping[str, Sequence[float | None]] | None = None,
    anchor: str | None = "auto",
    window: int = 1,
    periodic: bool | Literal["both"] | None = None,
    width: int | None = None,
    architecture: str = "unet",
    network_options: Mapping[str, Any] | None = None,
    noise: Mapping[str, Any] | None = None,
    resolutions: Sequence[int] = (1,),
    weights: str | Mapping[str, float] = "auto",
    freeze: str = "none",
    adapters: int | None = None,
    augment: str = "auto",
    validation: float | slice | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    time_budget: str | float | None = None,
    batch_size: int = 16,
    accumulate: int = 1,
    learning_rate: float | None = None,
    ema: float | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    name: str | None = None,
    licence: str = "that of the training data",
    device: str = "auto",
    dtype: str = "auto",
    memory: str | float = "500MB",
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
) -> GenerativeModel:
    """Train a generative model on the fields of a Dataset.

    The fields are cut into blocks of consecutive times. One block is withheld for validation, with a gap around it as long as states
    remember each other, and the weights with the lowest validation loss are kept; training starts from the classical answer (a Gaussian, a
    linear regression), and what is kept is never worse than it on that block.

    Training can be interrupted at any time. Where a file is asked for with `out`, its state is kept beside it, and the same call with
    ``resume=True`` goes on to the weights that an uninterrupted training would have had.

    Parameters
    ----------
    ds
        Training fields along ``time`` or ``member``, at least 20, in memory or chunked. Fields that are NaN everywhere
        are left out; cells that are NaN at all times, land in an ocean, are masked. For 'downscale' the coarse fields, or
        without `target` the fine ones. For 'background' forecasts at the times that they are for, or with `lag` the truth.
    task
        'prior': an unconditional diffusion prior for `assimilate`. 'downscale': the fine fields behind coarse ones, for `downscale`.
        'background': the truth given a forecast of it, for `assimilate` around that forecast. 'forecast': the state `lag` later, for `forecast`.
        'autoencoder': a latent space of a few numbers, which `assimilate` searches, or samples by a diffusion that was learned in it
        (`latent_prior`); cells may be NaN at some of the times.
        'conversion': from fields on another grid, of other variables or with gaps, to the latent space of the autoencoder `start`, for `downscale`.
    target
        For 'downscale': the fine fields, at times of `ds`, on any grid within that of `ds`. They may hold other variables than `ds`. For
        'background': the truth, at times of `ds` and on its grid; the model is of its variables, and others of `ds` are not used.
        For 'conversion': fields of the variables and on the grid of `start`, at times of `ds`.
    lag
        For 'background' without `target`: the background of a time is the state so long before, such as '48h'. For 'forecast': how far ahead.
    factor
        For 'downscale' without `target`: the fine fields are those of `ds`, the coarse ones their means over blocks of so many cells along
        each axis.
    method
        For 'downscale': 'diffusion', or a classical method to compare with: 'bilinear' (interpolation of the coarse values), 'bcsd'
        (quantile mapping and spatial disaggregation) or 'ridge' (regression on all coarse fields), each with its own past errors as members.
    stages
        For 'downscale' and 'background': 'both', a linear mean chosen by cross-validation, a network that regresses what it leaves, and a diffusion
        of the residual; 'residual', without the network for the mean; 'single' (for 'downscale'), diffusion of the fine fields themselves.
    statics
        For 'downscale' and 'background': fields on the fine grid that never change, such as orography and land-sea mask. Stored with the model.
    neighbours
        For 'downscale': which times the model sees, in steps of the times of `ds`, such as (-1, 0, 1). Times that lack some are left out.
    context
        For 'downscale', instead of `neighbours`: how many times before and after each the model sees, p(u_t | y_t-k ... y_t+k). None is left out:
        where the series ends, or has a gap, its last field stands for those that are missing.
    time_features
        For 'downscale' and 'background': harmonics that the networks see: 'none', 'dayofyear', 'hour', 'dayofyear+hour', or 'auto', those that
        the times of the training go through.
    lead_time
        For 'downscale' and 'background': whether the networks see the lead time of forecasts, a coordinate of `ds` with standard_name
        ``forecast_period``.
    conserve
        For 'downscale': whether every member keeps the coarse values as means of its blocks. 'auto': where they are these in training.
    calibrate
        For 'downscale': whether the spread of the members is corrected by scale, on the validation block. Stored with the model.
    mean_condition
        For 'downscale' and 'background': whether the diffusion sees the mean.
    tile
        For 'prior' and 'downscale': rows and columns of the random parts of the (fine) grid that networks are trained on, for grids that are too
        large; `assimilate` and `downscale` then call them on such tiles. Of a prior also a mapping of dimensions, and all of an axis where it is
        not cut: its Gaussian remains that of the whole grid. A downscaler then has none. 'auto': where the grid is larger than 448 cells, twice the
        distance at which fields, or the residuals of the linear mean, are no longer correlated. Not on doubly periodic boxes.
    latent
        For 'autoencoder': the length of the latent vector; by default that of 8, 16, 32, 64 and 100 with which principal components describe the
        validation block best.
    variational
        For 'autoencoder': whether it is a variational one, whose latent vectors are standard normal by its loss; without, by their covariance in
        training.
    beta
        For 'autoencoder': weight of the divergence from the latent prior. The error of the decoder is learned, so that 1 is the probability of
        the fields.
    latent_prior
        For 'autoencoder': what latent vectors are: 'normal', standard normal ones; or 'diffusion', which is learned of those of the training
        fields after the autoencoder, in the last three tenths of the effort, and only that with `start`, the latent model whose encoder and decoder
        are kept. With `window` it is of so many consecutive ones.
    start
        For 'conversion': the autoencoder, whose decoder is kept. Else the model, name or path to go on from, of the same task (for
        'downscale' of method 'diffusion'). Its networks are kept layer by layer, and trained on `ds`. Other variables, another resolution or
        another region are accepted: channels of variables that are new start at zero, and so do positional channels outside of the region. A
        downscaler may also have other coarse variables, `neighbours`, `statics` and `time_features`. Scaling, Gaussian and linear mean are
        refitted; Gaussian (of a prior) and linear mean are kept, with their scaling,
        where they are of the same variables and grids, have not seen these fields, and explain `ds` better. Networks of the
        architecture 'songunet' need the same channels.
        What was kept is in ``spec.training``. Of other options, such as `transform` and `climatology`, the defaults are those of the model.
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
        cross-validation. None: a plain EDM denoiser; a Gaussian is then still fitted, for guidance='anchor'. For 'autoencoder' the network
        corrects principal components ('auto'), or there is only the network (None).
    window
        For 'prior', and for 'autoencoder' with latent_prior='diffusion': number of consecutive times that the model sees together, odd; they are
        equally spaced, or calendar months.
        Above 1, `assimilate` solves all times of the Dataset together, composed of such windows.
    periodic
        Whether longitude wraps; 'both' for doubly periodic boxes. None: where the grid goes around the sphere, and where it ends at the poles the
        U-Net goes on across them.
    width
        Channels of the network at full resolution; by default 16. For a prior 32 where 20,000 steps are planned and 64 where 80,000 are,
        without `time_budget`, and if the fields, or a thousand of them, have at least ten independent values for each parameter. Of the
        architecture 'mesh', of all layers; by default 32.
    architecture
        'unet', small and fast, for any grid; on a global grid it goes on across the poles. 'mesh': messages on an icosahedral mesh (Lam et al.
        2023), for grids of latitudes and longitudes, global or not, without tiles. 'uno': a neural operator with spectral convolutions, for
        priors on any grid, of which other resolutions can be asked. For 'downscale' also 'songunet', the network of the
        published models, for grids whose rows and columns are multiples of 4.
    network_options
        For 'mesh': 'refinement' of the mesh, by default such that its edges are two to four cells long; 'rounds' of messages, by default 4;
        'position', learned channels that tell where it is, by default 2; 'checkpointing', less memory for a third more time; and 'one_at_a_time',
        samples of a batch one after the other. For 'uno': 'modes', the highest wave of its layers, by default a quarter of the cells of the
        shorter side; 'rank' of their weights, by default full; 'resolution' that it works on, by default that of `ds`; and 'position', by
        default 2, on boxes 0.
    noise
        For a prior on a doubly periodic box: noise of this covariance instead of white noise, so that the model is one of functions and can
        be refined (`model.refined(2)`). A mapping: 'kind', 'exponential', 'matern32', 'matern52', 'matern' (with 'nu'), 'gaussian' or
        'published'; 'length', as a share of the longer side of the box; 'cutoff', the most waves across it, for noise that is the same
        function on every grid: ``noise={"kind": "exponential", "length": 0.1}``. It must be as rough as the fields. There is no Gaussian to
        start from then; that of guidance 'anchor' is homogeneous. 'norm' is that of the loss: 'l2', or 'cameron-martin',
        of K^-1/2 times the error, where each wave counts in proportion to the noise that it was under.
    resolutions
        Of a neural operator with `noise`: each step takes the batch on the grid of `ds` (1), or on one of 1/2 or 1/4 as many rows and columns,
        ``resolutions=(1, 2, 4)``, without the waves that it does not show. Steps on a coarse grid cost in proportion to its cells, and are drawn so
        often that each resolution gets the same processor time; validation is on the grid of `ds`. The network works on the grid of its input.
    weights
        What counts how much in the loss, in training and validation. 'auto': cells by their area, on grids around the sphere whose areas
        differ by more than a factor of two; 'area': on any grid of latitudes and longitudes; 'none'; 'pressure': as 'auto', and levels in
        proportion to their pressure; or numbers by variable, or variable and level, as 'auto' besides: ``weights={"u10": 0.1, "z@50000Pa": 2.0}``.
    freeze
        With `start`: 'backbone' trains only what belongs to variables and places, the first and the last convolution and positional channels.
    adapters
        With `start`: rank of updates that are trained instead of the weights of the inner layers (LoRA); they are added to the weights in the end.
    augment
        'auto': on a doubly periodic box fields are shifted at random, because all places are alike. 'longitude': on a grid around the sphere
        fields are shifted along longitude, which physics allows where there are neither continents nor a fixed sun. 'none'.
    validation
        What is withheld: a part of all times, the last ones (0.2); a slice of times, ``slice("2010", "2014")``; by default one of six
        blocks, late yet inside the period.
    epochs, steps, time_budget
        How long: passes over the data, optimiser steps, or a time such as '10min' (or seconds); the first that is reached. By default 60
        epochs. A time is for all of the call; the fit of the Gaussian is not cut short, and networks get at least three tenths of it.
    batch_size, accumulate
        Samples of an optimiser step, over all processes; and in how many parts each process takes its own, to save memory.
    learning_rate
        Of AdamW with a warm-up and a cosine; by default 0.002, and half of that with `start`.
    ema
        Width of the average of weights that is kept, relative to the length of training (a power-function average); by default the best of
        several on the validation block.
    seed
        Of initialisation and noise.
    out
        File to write, ending in ``.safetensors``.
    overwrite
        Whether `out` may exist, or the state of an interrupted training of it.
    resume
        Whether to go on with an interrupted training. Other data or options are refused, with the differences. Without one it begins; of one that
        is finished the model is returned.
    name, licence
        Stored with the model.
    device, progress
        As in `assimilate`.
    memory
        Fields that take more than this are not read into memory: they are streamed from where they are (Zarr, netCDF, object stores),
        shuffled in blocks, and read ahead while the network computes. Of pairs both sides count, and what is in memory already stays there.
    callbacks
        Functions that get a `Progress` at every validation; training ends when one returns True. `TensorBoard` is one.
    dtype
        Of the network's arithmetic in training: 'float32', or 'bfloat16', which is two to three times as fast on recent processors; 'auto'
        takes that on GPUs that have it. Weights are float32 either way.

    Returns
    -------
    GenerativeModel
        Its ``spec.training`` records data, period, options and the validation loss relative to the classical start; ``history`` is a Dataset of
        losses and scores, which ``plot_history`` shows.

    Raises
    ------
    OptionError, StateError, GridError, OutputExistsError
        Before any training.

    References
    ----------
    Karras, T. et al. (2022), Elucidating the design space of diffusion-based generative models, arXiv:2206.00364.
    Karras, T. et al. (2024), Analyzing and improving the training dynamics of diffusion models, arXiv:2312.02696, for `ema`.
    Hu, E. et al. (2021), LoRA: low-rank adaptation of large language models, arXiv:2106.09685, for `adapters`.
    Lam, R. et al. (2023), Learning skillful medium-range global weather forecasting, Science 382, 1416-1421, doi:10.1126/science.adi2336, for
    the architecture 'mesh' and `weights`.
    Rozet, F. and Louppe, G. (2023), Score-based data assimilation, arXiv:2306.10574, for `window`.
    Pidstrigach, J. et al. (2023), Infinite-dimensional diffusion models, arXiv:2302.10130, for `noise`.
    Mardani, M. et al. (2023), Residual corrective diffusion modeling for km-scale atmospheric downscaling, arXiv:2309.15214.

    Examples
    --------
    >>> import xgenda
    >>> ds = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=slice(0, 60))
    >>> model = xgenda.train(ds, steps=2, width=8)
    >>> model.spec.task
    'prior'
    """
    check_choice("task", task, TASKS)
    if anchor is not None:
        check_choice("anchor", anchor, ("auto", *ANCHORS))
    if periodic is not None and periodic not in (True, False, "both"):
        raise OptionError(f"periodic={periodic!r} is not accepted; it must be True, False, 'both' or None.")
    if anchor == "spectral" and periodic != "both":
        raise OptionError("anchor='spectral' is for doubly periodic grids; pass periodic='both' too, or use anchor='eof'.")
    if isinstance(window, bool) or not isinstance(window, numbers.Integral) or window < 1 or window % 2 == 0:
        raise OptionError(
            f"window={window!r} is not accepted; it must be odd: a state with as many before it as after it, such as window=5."
        )
    window = int(window)  # a file has no numbers of numpy
    if task == "autoencoder" and anchor not in ("auto", None):
        raise OptionError(
            f"anchor={anchor!r} has no effect with task='autoencoder', which starts from principal components: leave it out, or pass anchor=None."
        )
    check_choice("latent_prior", latent_prior, PRIORS)
    if window > 1 and task not in ("prior", "autoencoder"):
        raise OptionError(f"window={window} belongs to task='prior'.")
    if window > 1 and task == "autoencoder" and latent_prior == "normal":
        raise OptionError(
            f"window={window} belongs to task='prior', or with task='autoencoder' to a learned prior of the latent vectors; pass that too: "
            f"latent_prior='diffusion'"
        )
    if not isinstance(neighbours, (tuple, list, range)):
        raise OptionError(
            f"neighbours={neighbours!r} is not accepted; give whole steps with 0 among them: neighbours=(-1, 0, 1)."
        )
    context = check_count("context", context, 0)
    if context and tuple(neighbours) != (0,):
        raise OptionError(
            f"context={context} and neighbours={neighbours!r} both say which times the model sees; give one of them."
        )
    check_choice("method", method, ("diffusion", *METHODS))
    check_choice("stages", stages, STAGES)
    check_choice("architecture", architecture, ARCHITECTURES)
    own = {
        "target": (target, None), "lag": (lag, None), "factor": (factor, None), "method": (method, "diffusion"), "stages": (stages, "both"),
        "statics": (statics, None), "neighbours": (tuple(neighbours), (0,)), "context": (context, 0),
        "time_features": (time_features, "auto"), "lead_time": (lead_time, False), "conserve": (conserve, "auto"), "calibrate": (calibrate, True),
        "mean_condition": (mean_condition, True), "tile": (tile, None), "architecture": (architecture, "unet"),
        "latent": (latent, None), "variational": (variational, True), "beta": (beta, 1.0),
        "latent_prior": (latent_prior, "normal"),
    }  # fmt: skip
    for argument, (given, default) in own.items():
        if given is default or (argument not in ("target", "statics") and given == default):
            continue
        if argument == "architecture" and given == "uno" and task not in ("prior", "autoencoder"):
            raise OptionError(f"architecture='uno' is for task='prior'; with task={task!r} use architecture='unet' or 'mesh'.")
        if (
            argument == "architecture"
            and given in ("mesh", "uno")
            and method not in METHODS
            and task not in ("autoencoder", "conversion")
        ):
            continue
        if argument == "tile" and task == "prior":
            continue
        shown = "..." if argument in ("target", "statics") else repr(given)
        if task == "prior":
            of = "background" if argument == "lag" else "autoencoder" if argument in OF_TASK["autoencoder"] else "downscale"
            raise OptionError(f"{argument}={shown} belongs to task={of!r}; pass it too: task={of!r}")
        if argument not in OF_TASK[task] or (task != "downscale" and (argument, given) == ("stages", "single")):
            raise OptionError(f"{argument}={shown} has no effect with task={task!r}. Leave it out.")
        if method in METHODS and argument not in CLASSICAL and not (argument in ("neighbours", "context") and method == "ridge"):
            raise OptionError(f"{argument}={shown} has no effect with method={method!r}, which has a closed form. Leave it out.")
    network_options = check_network_options(architecture, network_options)
    noise = check_noise(noise)
    resolutions = check_resolutions(resolutions, task, architecture, noise, network_options)
    anchor = check_coloured(noise, task, periodic, anchor, window, start)
    check_weights(weights)
    if architecture in ("mesh", "uno") and tile is not None:
        raise OptionError(
            f"architecture={architecture!r} sees the whole grid, which tile cuts; leave out tile, or use architecture='unet'."
        )
    if weights != "auto" and task == "downscale" and method in METHODS:
        raise OptionError(f"weights={weights!r} has no effect with method={method!r}, which has a closed form. Leave it out.")
    for argument, cycle in (("time_features", time_features), ("climatology", climatology)):
        check_choice(argument, cycle, ("auto", *CYCLES))
    for argument, flag in (
        ("lead_time", lead_time),
        ("calibrate", calibrate),
        ("mean_condition", mean_condition),
        ("variational", variational),
    ):
        check_flag(argument, flag)
    if conserve != "auto":
        check_flag("conserve", conserve)
    width, latent = (None if n is None else check_count(a, n) for a, n in (("width", width), ("latent", latent)))
    batch_size, accumulate = check_count("batch_size", batch_size), check_count("accumulate", accumulate)
    if width is not None and width % 8:
        raise OptionError(f"width={width} is not accepted; it must be a multiple of 8, for example width=16.")
    if not variational and beta != 1.0:
        raise OptionError(f"beta={beta!r} has no effect with variational=False. Leave it out.")
    for argument, real, highest in (("learning_rate", learning_rate, np.inf), ("ema", ema, 0.3), ("beta", beta, np.inf)):
        if real is None:
            continue
        if isinstance(real, bool) or not isinstance(real, numbers.Real) or not 0 < real < highest:
            below = "" if np.isinf(highest) else f" below {highest:g}"
            why = "" if argument != "ema" else ": the part of training that the average reaches over, for example ema=0.1"
            raise OptionError(f"{argument}={real!r} is not accepted; it must be a positive number{below}{why}.")
    check_kinds(transform, offset, bounds)
    kept: dict[str, tuple[object, object]] = {
        "anchor": (anchor, "auto"), "weights": (weights, "auto"), "freeze": (freeze, "none"), "adapters": (adapters, None),
    }  # fmt: skip
    if task == "conversion":
        _refuse_changes(kept, "with task='conversion', a new encoder that starts from ridge regression")
    if task == "autoencoder" and start is not None:
        if latent_prior == "normal":
            raise OptionError(
                "start has no effect with task='autoencoder': autoencoders are trained from scratch. Leave it out, or learn a prior of the latent "
                "vectors of a trained one: latent_prior='diffusion'"
            )
        kept |= {
            "latent": (latent, None), "variational": (variational, True), "beta": (beta, 1.0), "climatology": (climatology, "auto"),
            "transform": (transform, "none"), "bounds": (bounds, None), "periodic": (periodic, None), "width": (width, None),
        }  # fmt: skip
        _refuse_changes(kept, "with start: the autoencoder is kept as it is")
    _check_fine_tuning(start, task, freeze, adapters)
    check_choice("augment", augment, ("auto", "none", "longitude"))
    _check_validation(validation)
    if task != "prior" and augment != "auto":
        raise OptionError(f"augment={augment!r} belongs to task='prior'; leave it out.")
    check_flag("resume", resume)
    texts: tuple[object, ...] = (licence, "model" if name is None else name)
    if not all(isinstance(text, str) and text for text in texts):
        raise OptionError(
            f"name={name!r} and licence={licence!r} must be text, for example name='my-model', licence='CC-BY-4.0'."
        )
    if not isinstance(callbacks, (tuple, list)) or not all(callable(c) for c in callbacks):
        raise OptionError(f"callbacks={callbacks!r} is not accepted; give a list of functions: callbacks=[print]")
    effort = Effort(
        None if epochs is None else check_count("epochs", epochs),
        None if steps is None else check_count("steps", steps),
        None if time_budget is None else parse_time_budget(time_budget),
        clock.monotonic(),
    )
    drawn, seed = seed is None, check_seed(seed)
    dtype = "bfloat16" if launched_in_bfloat16() else dtype
    check_choice("dtype", dtype, ("auto", *DTYPES))
    processes: Processes = Accelerated(device) if launched() else Single(resolve_device(device))
    if dtype == "auto":
        dtype = "bfloat16" if processes.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if isinstance(processes, Accelerated):
        accumulate = max(accumulate, processes.accumulate)
    if drawn:  # the same one in all processes
        seed = int(processes.mean(seed))
    target_file = None if out is None else _output(out, overwrite=overwrite or resume)
    if resume and target_file is None:
        raise OptionError(
            "resume=True needs the file of the model, beside which the state of the training is: out='model.safetensors'"
        )
    start = None if start is None else _started(start, task, adapters)
    chosen = _names(variables)
    large = Large(parse_memory(memory), scales(start, climatology, transform, offset), bounds, validation, method, progress)
    if task == "downscale":
        if start is not None and method != "diffusion":
            raise OptionError(f"start has no effect with method={method!r}, which has a closed form. Leave it out.")
        if target is None and factor is not None:
            factor = check_count("factor", factor, 2)
        pairs = read_pairs(
            ds, target, factor, variables=chosen, statics=statics, offsets=range(-context, context + 1) if context else neighbours,
            lead_time=lead_time, large=large, ends="nearest" if context else "drop",
        )  # fmt: skip
        content = {"ds": fingerprint(ds), "target": "" if target is None else fingerprint(target)} if out is not None else {}
    elif task == "conversion":
        converted = open_conversion(ds, target, start, chosen, parse_memory(memory))
        content = {"ds": fingerprint(ds), "target": "" if target is None else fingerprint(target)} if out is not None else {}
    elif task == "autoencoder":
        if start is not None and not isinstance(start, LatentModel):
            raise OptionError(f"start={start.spec.name!r} is a {start.spec.kind} model; a latent model is needed. Leave it out.")
        corpus, observed = open_gappy(ds, chosen, parse_memory(memory), climatology, transform, offset, bounds, progress)
        content = {"ds": fingerprint(ds if corpus.source is None else corpus.source) if out is not None else ""}
    elif task != "prior":
        if task == "forecast" and lag is None:
            raise OptionError(
                "task='forecast' needs lag, how far ahead the state is: xgenda.train(series, task='forecast', lag='48h')"
            )
        pairs, seconds = read_background_pairs(
            ds, target, lag, task=task, variables=chosen, statics=statics, lead_time=lead_time, large=large
        )
        content = {"ds": fingerprint(ds), "target": "" if target is None else fingerprint(target)} if out is not None else {}
    else:
        crops = None if tile is None else check_tile(tile, open_source(ds, chosen), periodic)
        corpus = open_corpus(ds, chosen, parse_memory(memory), window, climatology, transform, offset, bounds, progress)
        check_coarse(resolutions, corpus.samples.grid.plane, corpus.samples.valid is not None, network_options)
        if start is not None and start.spec.kind == "diffusion":
            check_common(start, corpus.samples.variables, "ds")
        content = {"ds": fingerprint(ds if corpus.source is None else corpus.source) if out is not None else ""}
    if len(resolutions) > 1:
        network_options = {**network_options, "resolution": None}
    rate = learning_rate or (LEARNING_RATE if start is None else LEARNING_RATE / 2)
    journal = Journal()
    if target_file is not None:
        asked: dict[str, Any] = {
            **content, "task": task, "lag": None if lag is None else str(lag),
            "factor": factor, "method": method, "stages": stages, "neighbours": list(neighbours),
            **({"context": context} if context else {}),  # what was interrupted before it was there goes on
            "statics": None if statics is None else content_of(pairs.statics),
            "time_features": time_features, "lead_time": lead_time, "conserve": conserve, "calibrate": calibrate,
            "mean_condition": mean_condition, "tile": tile, "variables": chosen, "climatology": climatology, "transform": transform,
            "offset": offset, "bounds": bounds, "anchor": anchor, "window": window, "periodic": periodic, "width": width,
            "architecture": architecture, "network_options": network_options or None, **({"noise": noise} if noise else {}),
            **({"resolutions": list(resolutions)} if len(resolutions) > 1 else {}),
            "weights": weights if isinstance(weights, str) else dict(weights), "freeze": freeze, "adapters": adapters, "augment": augment,
            "validation": str(validation),
            "start": None if start is None else start.sha256, "epochs": epochs, "steps": steps,
            "memory": None
            if task == "conversion" or (pairs.reservoir if task not in ("prior", "autoencoder") else corpus.source) is None
            else parse_memory(memory),
            "time_budget": time_budget, "batch_size": batch_size, "learning_rate": rate, "ema": ema, "seed": seed, "dtype": dtype,
            **({"latent": latent, "variational": variational, "beta": beta} if task == "autoencoder" else {}),
            **({"latent_prior": latent_prior} if latent_prior != "normal" else {}),
        }  # fmt: skip
        journal = Journal(target_file.with_suffix(".training"), asked)
        if resume and not journal.holds and (found := _finished(target_file, journal)) is not None:
            return found
        if overwrite and not resume and processes.index == 0:
            journal.close()
        processes.wait()
        journal.open(resume=resume)
    optimiser = Optimiser(
        effort, batch_size, rate, ema, seed, progress, processes, DTYPES[dtype], accumulate, journal, tuple(callbacks)
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.default_generator.manual_seed(seed % 2**63)
        if task == "prior":
            prior_recipe = PriorRecipe(
                climatology,
                transform,
                offset,
                bounds,
                anchor,
                window,
                periodic,
                width,
                validation,
                freeze,
                adapters,
                augment,
                architecture,
                network_options,
                weights,
                crops,
                noise,
                resolutions,
            )
            model: GenerativeModel = train_prior(corpus, prior_recipe, start, optimiser, name, licence)
        elif task in ("autoencoder", "conversion"):
            encoding = AutoencoderRecipe(
                latent,
                variational,
                float(beta),
                climatology,
                transform,
                offset,
                bounds,
                anchor is not None,
                periodic,
                width,
                validation,
                weights,
                latent_prior,
                window,
            )
            if task == "conversion":
                model = train_conversion(converted, encoding, optimiser, name, licence)
            elif isinstance(start, LatentModel):
                model = train_latent_prior(corpus, observed, start, encoding, optimiser, name)
            else:
                model = train_autoencoder(corpus, observed, encoding, optimiser, name, licence)
        else:
            recipe = Recipe(
                "none" if climatology == "auto" and start is None else climatology, transform, offset, bounds, anchor, periodic, width,
                architecture, stages, mean_condition, conserve, calibrate and task == "downscale", time_features, lead_time, _tile(tile),
                validation, freeze, adapters, task, None if task in ("prior", "downscale") else seconds, network_options, weights,
            )  # fmt: skip
            model = (
                train_downscaler(pairs, recipe, start, optimiser, name, licence)
                if method == "diffusion"
                else train_classical(pairs, method, recipe, name, licence)
            )
    if journal.folder is not None:
        model.spec = dataclasses.replace(model.spec, training={**model.spec.training, "asked": journal.asked})
    model = as_stored(model)
    if target_file is not None:
        if processes.index == 0:
            model.save(target_file, overwrite=True)
            journal.close()
        processes.wait()
    return model


def _output(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Return the file to write."""
    if not isinstance(out, (str, os.PathLike)):
        raise OptionError(f"out={out!r} is not accepted; give the path of a file: out='model.safetensors'")
    path = Path(out)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"out={str(out)!r}: a model file ends in .safetensors, for example out='model.safetensors'")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"out={str(out)!r}: there is no folder {str(path.parent)!r}; make it first: mkdir -p {path.parent}")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"out={str(out)!r} exists. Choose another name, or pass overwrite=True.")
    return path


def _names(variables: Any) -> list[str] | None:
    """Return the names of the variables to take; None for all."""
    if variables is None:
        return None
    found = [variables] if isinstance(variables, str) else list(variables) if isinstance(variables, Iterable) else []
    if not found or not all(isinstance(v, str) for v in found):
        raise OptionError(f"variables={variables!r} is not accepted; give names: variables=['t2m']")
    return found


def _finished(path: Path, journal: Journal) -> GenerativeModel | None:
    """Return the model of a training that is finished, if it was of these data and options."""
    if not path.exists():
        return None
    model = load_model(path)
    journal.compare(model.spec.training.get("asked", {}), path)
    return model


def _refuse_changes(given: Mapping[str, tuple[object, object]], why: str) -> None:
    """Refuse options that are not their defaults, where they have no effect."""
    for argument, (value, default) in given.items():
        if value != default:
            raise OptionError(f"{argument}={value!r} has no effect {why}. Leave it out.")


def _check_fine_tuning(start: Any, task: str, freeze: str, adapters: int | None) -> None:
    check_choice("freeze", freeze, FREEZE)
    if adapters is not None:
        check_count("adapters", adapters)
    for argument, given, default in (("freeze", freeze, "none"), ("adapters", adapters, None)):
        if given != default and start is None:
            raise OptionError(f"{argument}={given!r} belongs to fine-tuning; pass the model to start from: start='name'")
    if freeze != "none" and adapters is not None:
        raise OptionError(f"freeze={freeze!r} and adapters={adapters} exclude each other; leave out one of them.")


def _started(start: GenerativeModel | str | os.PathLike[str], task: str, adapters: int | None) -> GenerativeModel:
    """Return the model to start from, which must be of the same task and wide enough for the adapters."""
    if not isinstance(start, GenerativeModel):
        try:
            start = load_model(start)
        except GendaError as problem:
            raise type(problem)(re.sub(r"\bmodel=", "start=", str(problem))) from problem
    if {"background", "forecast"} & {task, start.spec.task}:
        raise OptionError(
            f"start={start.spec.name!r} is for {start.spec.task!r} and task={task!r}: models of a background are trained from scratch. Leave out "
            f"start."
        )
    if task == "prior" and start.spec.task == "downscale":
        raise OptionError(
            f"start={start.spec.name!r} is a model for downscaling; pass task='downscale' too, with target= or factor= for the fine fields."
        )
    width = (start.spec.options.get("network") or {}).get("width")
    if adapters is not None and width is not None and adapters > width:
        raise OptionError(
            f"adapters={adapters} is not accepted; the network of start={start.spec.name!r} is {width} channels wide; "
            f"give a rank of 1 to {width}, for example adapters={max(1, width // 4)}."
        )
    return start


def _check_validation(validation: object) -> None:
    if validation is None or isinstance(validation, slice):
        return
    if isinstance(validation, bool) or not isinstance(validation, numbers.Real) or not 0 < float(validation) < 0.8:
        raise OptionError(
            f"validation={validation!r} is not accepted; give a part of the times, the last ones, below 0.8: validation=0.2, or a slice: "
            f"validation=slice('2010', '2014')"
        )


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


def parse_memory(memory: str | float) -> float:
    """Return bytes from '500MB', '2GB' or a number of bytes."""
    units = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    if isinstance(memory, numbers.Real) and not isinstance(memory, bool) and float(memory) > 0:
        return float(memory)
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kKMGT]?B)\s*", memory) if isinstance(memory, str) else None
    if not match or float(match[1]) <= 0:
        raise OptionError(f"memory={memory!r} is not accepted; give bytes or a text such as '500MB' or '2GB', with its unit.")
    return float(match[1]) * units[match[2].upper()]


def parse_time_budget(budget: str | float) -> float:
    """Return seconds from '90s', '10min', '2h' or a number of seconds."""
    units = {"s": 1.0, "min": 60.0, "h": 3600.0}
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(s|min|h)?\s*", str(budget))
    if not match or float(match[1]) <= 0:
        raise OptionError(f"time_budget={budget!r} is not accepted; give seconds or a text such as '90s', '10min' or '2h'.")
    return float(match[1]) * units[match[2] or "s"]

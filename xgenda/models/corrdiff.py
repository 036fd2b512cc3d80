"""Published CorrDiff models as models of this library, and their output files as Datasets.

CorrDiff (Mardani et al. 2023, arXiv 2309.15214) is two networks in `.mdlus` files and, elsewhere, grids, statistics and names; `read_corrdiff`
joins them. Its generation script writes netCDF files with groups, in which `xarray.open_dataset` finds nothing; `read_corrdiff_output` does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from xgenda import metadata, states
from xgenda.curvilinear import PointSet
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.errors import CheckpointError, CoordinateError, OptionError
from xgenda.models.checkpoints import as_stored
from xgenda.models.conditions import Conditions
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.means import LinearMean
from xgenda.models.physicsnemo import Preconditioned, read_mdlus
from xgenda.models.spec import ModelSpec
from xgenda.models.variables import VariableSpec
from xgenda.networks.songunet import SongUNet
from xgenda.scaling import Scaling

SIGMAS = (0.002, 800.0)  # of the published sampler
STEPS = 18
Statistics = Mapping[str, Any]  # pairs of a mean and a standard deviation, checked


def read_corrdiff(
    regression: str | os.PathLike[str] | None,
    diffusion: str | os.PathLike[str],
    *,
    inputs: xr.Dataset,
    target: xr.Dataset,
    statistics: Statistics,
    statics: xr.Dataset | None = None,
    lead_step: float | None = None,
    tile: tuple[int, int] | None = None,
    overlap: tuple[int, int] | None = None,
    name: str = "corrdiff",
    licence: str = "not stated",
) -> CorrectiveModel:
    """Return a published CorrDiff model, to be used with `xgenda.downscale` and saved as one file.

    Parameters
    ----------
    regression, diffusion
        The two ``.mdlus`` files. None for a model without a mean.
    inputs
        Any Dataset with the coarse variables on their grid, in the order of the training. Only names, attributes and coordinates are read;
        fields are interpolated from this grid to that of `target`.
    target
        The same for the fine variables.
    statistics
        Mean and standard deviation of every variable of `inputs`, `target` and `statics`, by name. Where a coarse and a fine variable have one
        name, those of the coarse one may be given under ``"input/<name>"``.
    statics
        Fields on the fine grid that never change, in the order of the training.
    lead_step
        For networks with an embedding of the lead time: seconds from one to the next.
    tile, overlap
        For diffusion networks that were trained on parts of their grid: rows and columns of these parts, and of what they share when sampling.
    name, licence
        Kept with the model.

    Returns
    -------
    GenerativeModel
        For ``coarse.genda.downscale(model=...)``; its sampler is that of the publication, 18 steps of Heun from 800 to 0.002.

    Raises
    ------
    CheckpointError
        If a file cannot be read, or a network takes another number of channels than there are.
    OptionError
        If a statistic is missing.

    References
    ----------
    Mardani, M. et al. (2023), Residual corrective diffusion modeling for km-scale atmospheric downscaling, arXiv:2309.15214.
    """
    coarse, fine = states.enter(inputs, "inputs"), states.enter(target, "target")
    if isinstance(fine.grid, PointSet):
        raise OptionError(f"target is {fine.grid.describe()}; the networks need rows and columns.")
    (ins, scale_in), (outs, scale_out) = _described(coarse, statistics, "input/"), _described(fine, statistics, "")
    fixed, names = _statics(statics, fine, statistics)
    drift = read_mdlus(diffusion)
    if not isinstance(drift, Preconditioned):
        raise CheckpointError(f"diffusion={str(diffusion)!r} holds a regression network. Were the two files exchanged?")
    mean = None if regression is None else read_mdlus(regression)
    if isinstance(mean, Preconditioned):
        raise CheckpointError(f"regression={str(regression)!r} holds a diffusion network. Were the two files exchanged?")
    denoiser = drift.denoiser
    given = len(ins) + len(names)
    for what, network, path in (
        ("regression", None if mean is None else mean.model, regression),
        ("diffusion", drift.model, diffusion),
    ):
        if network is not None and (network.shape != fine.grid.plane or network.arguments["out_channels"] != len(outs)):
            raise CheckpointError(
                f"{what}={str(path)!r} is for {network.arguments['out_channels']} variables on {network.shape[0]} x {network.shape[1]} cells, and "
                f"target has {len(outs)} on {fine.grid.describe()}."
            )
    taken = _conditions_of(drift.model, len(outs))
    mean_condition = taken in (given + len(outs), 2 * given + len(outs))
    whole = taken in (2 * given, 2 * given + len(outs)) and tile is not None
    if taken != given * (1 + whole) + len(outs) * mean_condition:
        raise CheckpointError(
            f"diffusion={str(diffusion)!r} takes {taken} channels beside its {len(outs)} and its positions; inputs and statics have {given}."
        )
    if mean is not None and (found := _conditions_of(mean.model, mean.latent)) != given:
        raise CheckpointError(
            f"regression={str(regression)!r} takes {found} channels beside its positions; inputs and statics have {given}."
        )
    leads = drift.model.lead_times
    if bool(leads) != (lead_step is not None):
        raise OptionError(
            f"lead_step={lead_step} is not accepted: the networks know {leads} lead times. "
            + ("Give the seconds from one to the next." if leads else "Leave it out.")
        )
    conditions = Conditions(ins, coarse.grid, scale_in, lead_time=lead_step, statics=names)
    options = {
        "target": {"dims": list(fine.layout.dims), "latitude": fine.layout.latitude, "longitude": fine.layout.longitude},
        "network": _arguments(drift.model), "regression": None if mean is None else _arguments(mean.model),
        "regression_state": None if mean is None else mean.latent, "sigma_min": SIGMAS[0], "sigma_max": SIGMAS[1],
        "sigma_data": denoiser.sigma_data, "scale_condition": denoiser.scale_condition, "unit": 1.0, "mean_condition": mean_condition,
        "conserve": None, "calibration": None, "halo": 64, "tile": None if tile is None else list(tile),
        "overlap": None if overlap is None else list(overlap),
        "whole_condition": whole, "steps": STEPS, "lead_index": bool(leads),
    }  # fmt: skip
    spec = ModelSpec(
        name, "downscale", "diffusion", outs, fine.grid, scale_out, inputs=conditions, options=options, licence=licence,
        training={"source": ", ".join(Path(p).name for p in (regression, diffusion) if p is not None)},
        description="Published CorrDiff networks: regression of the mean and diffusion of the residual",
    )  # fmt: skip
    shape = (len(outs), *fine.grid.plane)
    plain = EDMDenoiser(drift.model, None, sigma_data=denoiser.sigma_data, scale_condition=denoiser.scale_condition)
    model = as_stored(
        CorrectiveModel(spec, LinearMean(shape), None if mean is None else mean.model, torch.ones(len(outs), 1, 1), plain, fixed)
    )
    assert isinstance(model, CorrectiveModel)
    return model


def _described(state: states.State, statistics: Statistics, prefix: str) -> tuple[tuple[VariableSpec, ...], Scaling]:
    """Return the variables of a template and their standardisation."""
    names = metadata.data_variables(state.ds, state.layout)
    pairs = []
    for n in names:
        found = statistics.get(f"{prefix}{n}", statistics.get(n))
        if (
            found is None
            or not isinstance(found, (tuple, list))
            or len(found) != 2
            or not np.isfinite(found).all()
            or not found[1] > 0
        ):
            raise OptionError(
                f"statistics has {found!r} for {n!r}; its mean and its standard deviation are needed: {{{n!r}: (mean, std)}}"
            )
        pairs.append((float(found[0]), float(found[1])))
    mean, std = np.array(pairs).reshape(-1, 2).T
    specs = tuple(VariableSpec(n, **states.described(state.ds, n)) for n in names)
    return specs, Scaling(mean[None, :, None, None], std[:, None, None])


def _statics(
    statics: xr.Dataset | None, fine: states.State, statistics: Statistics
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    if statics is None:
        return None, ()
    state = states.enter(statics, "statics")
    if not state.grid.same_as(fine.grid):
        raise OptionError(f"statics are on {state.grid.describe()}, and target on {fine.grid.describe()}.")
    names, out = [str(n) for n, v in state.ds.data_vars.items() if set(state.layout.dims) <= set(v.dims)], []
    for n in names:
        if n not in statistics:
            raise OptionError(f"statistics lacks {n!r}; its mean and its standard deviation are needed: {{{n!r}: (mean, std)}}")
        values = state.orientation.to_model(state.ds[n].squeeze(drop=True).transpose(*state.layout.dims).values.astype(float))
        metadata.check_values(values, n, "statics")
        out.append((values - statistics[n][0]) / statistics[n][1])
    return torch.as_tensor(np.stack(out)).float(), tuple(names)


def _conditions_of(network: SongUNet, state: int) -> int:
    """Return the channels that a network takes beside its state and its positions."""
    own = network.arguments
    return int(own["in_channels"] - state - own["grid_channels"] - (own["lead_channels"] if own["lead_times"] else 0))


def _arguments(network: SongUNet) -> dict[str, object]:
    return {"architecture": "songunet", **{k: list(v) if isinstance(v, tuple) else v for k, v in network.arguments.items()}}


def read_corrdiff_output(path: str | os.PathLike[str], group: str = "prediction") -> xr.Dataset:
    """Return what CorrDiff's generation script wrote as one Dataset.

    Parameters
    ----------
    path
        A netCDF file with the groups 'input', 'truth' and 'prediction'.
    group
        Which of them.

    Returns
    -------
    xarray.Dataset
        Variables with the dimensions ``member`` (of predictions), ``time``, ``y`` and ``x``, coordinates latitude and longitude. Lazy where
        dask is asked for: it is opened with xarray and can be chunked.

    Raises
    ------
    CheckpointError
        If the file is no netCDF file, or has no such group.
    CoordinateError
        If it has no times or positions.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist.")
    try:
        root = xr.open_dataset(file, engine="netcdf4")
        fields = xr.open_dataset(file, engine="netcdf4", group=group)
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{file} has no group {group!r} of a CorrDiff output file: {problem}") from problem
    lost = [n for n in ("lat", "lon", "time") if n not in root.variables]
    if lost:
        raise CoordinateError(f"{file} has no {', '.join(lost)}; it is no output file of CorrDiff.")
    latitude, longitude = (root[n].reset_coords(drop=True) for n in ("lat", "lon"))
    coords: dict[Any, Any] = {}
    if np.isfinite(latitude.values).all() and np.isfinite(longitude.values).all():
        coords = {
            "latitude": latitude.assign_attrs(standard_name="latitude", units="degrees_north"),
            "longitude": longitude.assign_attrs(standard_name="longitude", units="degrees_east"),
        }
    out = fields.assign_coords(time=root["time"].variable, **coords)
    if "ensemble" in out.dims:
        out = out.rename(ensemble="member").assign_coords(
            member=("member", np.arange(fields.sizes["ensemble"]), metadata.MEMBER_ATTRS)
        )
    lead = ["member"] if "member" in out.dims else []
    out = out.transpose(*lead, "time", ...)
    out.attrs = {**root.attrs, **metadata.provenance_attrs(root, f"read_corrdiff_output(group={group!r})", {})}
    return out

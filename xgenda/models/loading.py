"""Names, paths and objects -> models."""

from __future__ import annotations

import os
from pathlib import Path

import xarray as xr

from xgenda import metadata, states
from xgenda.curvilinear import AnyGrid
from xgenda.errors import GendaError, ModelNotFoundError, OptionError
from xgenda.models.checkpoints import read_model
from xgenda.models.generative import GenerativeModel
from xgenda.models.store import find_file, registry, state_of


def load_model(name_or_path: str | os.PathLike[str], *, sha256: str | None = None) -> GenerativeModel:
    """Return a model by its registered name, from a file, or from an address.

    Parameters
    ----------
    name_or_path
        A name of `list_models`; the path of a ``.safetensors`` file written by ``model.save``, or of a folder that holds one; or an
        address: ``hf://organisation/repository@<commit>/file``, ``https://...``, ``s3://...``, ``gs://...``. Files that are not on
        this machine are fetched once and kept in the cache directory (environment variable ``XGENDA_CACHE``); those of registered
        models are checked against their SHA-256.
    sha256
        What the file must be, 64 hexadecimal digits, for one that is not registered. Without it, a file from an address is taken as
        it is, and a warning says its SHA-256.

    Returns
    -------
    GenerativeModel

    Raises
    ------
    ModelNotFoundError
        If there is no such name or file, or it cannot be fetched.
    ChecksumError
        If a file is not the registered one, or not that of `sha256`.
    CheckpointError
        If the file is no xgenda model.

    Examples
    --------
    >>> import xgenda
    >>> xgenda.load_model("t2m-north-america").spec.task
    'prior'
    """
    path, found = find_file(name_or_path, sha256=sha256)
    return read_model(Path(path), found)


def choose_model(
    model: GenerativeModel | str | os.PathLike[str] | None,
    ds: xr.Dataset,
    layout: metadata.Layout,
    grid: AnyGrid,
    *,
    task: str,
) -> GenerativeModel:
    """Return the model that a call asks for; None takes the one registered model that fits variables and grid.

    Raises
    ------
    ModelNotFoundError
        If none or several fit; the message lists them and says what to type.
    """
    if isinstance(model, GenerativeModel):
        return model
    if isinstance(model, (str, os.PathLike)):
        return load_model(model)
    if isinstance(model, type):
        raise OptionError(
            f"model is the class {model.__name__} itself; make one of it: model=xgenda.{model.__name__}(...), such as "
            f"model=xgenda.LETKF(localization=1000e3)"
        )
    if model is not None:
        raise OptionError(
            f"model={model!r} is not accepted; give a GenerativeModel, a registered name, or a path: model='t2m-north-america'"
        )
    candidates, reasons = [], []
    for name, entry in registry().items():
        if entry.task != task:
            continue
        if entry.alternative_to:
            reasons.append(
                f"  {name}: it is an alternative to {entry.alternative_to}; if it is the one you want, type model={name!r}"
            )
            continue
        if state_of(entry) == "remote":  # nothing is downloaded that was not asked for by its name
            reasons.append(f"  {name}: it is not on this machine; if it is the one you want, type model={name!r}")
            continue
        try:
            found = load_model(name)
            _fits(found, ds, layout, grid)
        except GendaError as problem:
            reasons.append(f"  {name}: {problem}")
        else:
            candidates.append(found)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = [c.spec.name for c in candidates]
        raise ModelNotFoundError(f"Several registered models fit: {', '.join(names)}. Choose one: model={names[0]!r}")
    if task == "prior":
        advice = "Use a prior that needs no training: model=xgenda.gaussian_prior(ds, length_scale=300e3, std=2.0)"
    elif task == "forecast":
        advice = "Train one: model=xgenda.train(series, task='forecast', lag='48h')"
    else:
        advice = "Train one: model=xgenda.train(fine_ds, task='downscale', factor=4)"
    raise ModelNotFoundError(
        "\n".join([f"No registered model for task {task!r} fits ds:", *(reasons or ["  (none registered)"]), advice])
    )


def _fits(model: GenerativeModel, ds: xr.Dataset, layout: metadata.Layout, grid: AnyGrid) -> None:
    inputs = model.spec.inputs
    variables, expected = (model.spec.variables, model.spec.grid) if inputs is None else (inputs.variables, inputs.grid)
    for v in variables:
        name = states.match_channel(ds, v.name, v.standard_name)
        if v.units is not None and ds[name].attrs.get("units") is not None:
            metadata.unit_factors(str(ds[name].attrs["units"]), v.units)
    if expected is not None and not expected.same_as(grid):
        raise ModelNotFoundError(f"it works on the grid {expected.describe()}; ds has {grid.describe()}")

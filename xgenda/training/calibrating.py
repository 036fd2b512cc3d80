"""`calibrate`: the spread of a downscaler, corrected on data that it was not trained on."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from xgenda import metadata
from xgenda.errors import GridError, OptionError
from xgenda.models.calibration import Calibration, fit_calibration
from xgenda.models.checkpoints import content_hash
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.generative import GenerativeModel, Request, SamplingOptions
from xgenda.models.loading import load_model
from xgenda.training.pairs import Pairs, as_described, read_pairs
from xgenda.training.standardising import Prepared, standardised_pairs
from xgenda.training.windows import evenly_spaced

CALIBRATION_TIMES, CALIBRATION_MEMBERS = 24, 8


def calibrate(
    model: GenerativeModel | str | os.PathLike[str],
    ds: xr.Dataset | xr.DataArray,
    target: xr.Dataset | xr.DataArray | None = None,
) -> CorrectiveModel:
    """Return a downscaling model with the spread of its members corrected by scale on data that it was not trained on.

    The residuals of the members are split into four scales, and each is multiplied by a factor per variable, with which the error of the
    ensemble mean and the spread agree on the data. Stored with the model.

    Parameters
    ----------
    model
        Of `train` with task 'downscale', or its name or path.
    ds
        Coarse fields; without `target` the fine ones, for a model that was trained on their block means. At least 2 times, better 20.
    target
        The fine fields at the same times.

    Returns
    -------
    GenerativeModel
        A new one; ``spec.training["calibration"]`` has the factors.

    Raises
    ------
    OptionError, GridError, UnitsError
        If the model is no diffusion model for downscaling, or the data are not on its grids or lack one of its variables.
    """
    model = model if isinstance(model, GenerativeModel) else load_model(model)
    if not isinstance(model, CorrectiveModel) or model.spec.task != "downscale":
        raise OptionError(
            f"model={model.spec.name!r} is no diffusion model for downscaling; train one: xgenda.train(fine, task='downscale', factor=4)"
        )
    spec, inputs = model.spec, model.inputs
    if target is None:
        if spec.factor is None or [v.name for v in inputs.variables] != [v.name for v in spec.variables]:
            raise OptionError(
                f"model={spec.name!r} takes {', '.join(v.name for v in inputs.variables)} on {inputs.grid.describe()}, which are no means of "
                f"fine fields; give both: xgenda.calibrate(model, coarse, fine)"
            )
        ds = as_described(ds, spec.variables)
    else:
        ds, target = as_described(ds, inputs.variables), as_described(target, spec.variables, "target")
    pairs = read_pairs(
        ds, target, spec.factor if target is None else None, variables=None, statics=None, offsets=inputs.offsets,
        lead_time=inputs.lead_time is not None, fewest=2, weights="cells" if model.conserved is None else model.conserved.weights,
        spacing=inputs.spacing, ends=inputs.ends,
    )  # fmt: skip
    for what, found, expected in (("fine", pairs.fine.grid, spec.grid), ("coarse", pairs.coarse.grid, inputs.grid)):
        if expected is None or not expected.same_as(found):
            raise GridError(
                f"model={spec.name!r} has {what} fields on {expected and expected.describe()}; those given are on {found.describe()}."
            )
    ready = standardised_pairs(pairs, spec, model.features)
    plain = with_calibration(model, None)
    return with_calibration(plain, fitted_calibration(plain, ready, pairs, torch.arange(len(ready.fine))))


def with_calibration(model: CorrectiveModel, found: Calibration | None) -> CorrectiveModel:
    """Return the model with other factors."""
    given = None if found is None else {"widths": list(found.widths), "factors": [list(f) for f in found.factors]}
    note = "none" if found is None else "; ".join(", ".join(f"{f:.2f}" for f in row) for row in found.factors)
    spec = dataclasses.replace(
        model.spec, options={**model.spec.options, "calibration": given}, training={**model.spec.training, "calibration": note}
    )
    out = CorrectiveModel(spec, model.mean, model.regression, model.spread, model.denoiser, model.statics)
    out.sha256 = content_hash(out)
    return out


def fitted_calibration(model: CorrectiveModel, ready: Prepared, pairs: Pairs, among: Tensor) -> Calibration:
    """Return the factors that a few of some times ask for."""
    size, options = (CALIBRATION_TIMES, CALIBRATION_MEMBERS), model.plan(SamplingOptions(tile="auto"))
    rows, request = withheld_request(model, ready, pairs, among, size, options, torch.device("cpu"))
    mean, members = model.deviations(request)
    scale = float(model.spec.factor or _ratio(model))
    return fit_calibration(ready.fine[rows] - mean, members, (2 * scale, scale / 2, scale / 8), model.without_means)


def withheld_request(
    model: CorrectiveModel, ready: Prepared, pairs: Pairs, among: Tensor, size: tuple[int, int], options: SamplingOptions,
    device: torch.device,
) -> tuple[Tensor, Request]:  # fmt: skip
    """Return a few of some times, evenly spread, and the request for members at them; `size` is how many of both."""
    rows = evenly_spaced(among, size[0]).unique()
    time = None if pairs.fine.time is None else pairs.fine.time.isel({pairs.fine.time.dims[0]: rows.numpy()})
    return rows, Request(
        model.inputs.grid, torch.as_tensor(np.concatenate([pairs.inputs(k)[rows] for k in range(len(pairs.offsets))], 1)).flatten(2),
        torch.as_tensor(pairs.climatology(model.scaling)[rows.numpy()]).flatten(2), [], list(map(str, metadata.time_labels(time, len(rows)))),
        range(size[1]), 0, options, device, lambda _: None, standardised=ready.coarse[rows], planes=ready.planes[rows],
    )  # fmt: skip


def _ratio(model: CorrectiveModel) -> float:
    """Return the cells of the fine grid along one side of a coarse one, roughly."""
    fine, coarse = model.grid, model.inputs.grid
    return max(2.0, float(np.sqrt(fine.size / coarse.size)))

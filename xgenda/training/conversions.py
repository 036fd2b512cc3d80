r"""Training of conversions: an encoder from another source into the latent space of an autoencoder whose decoder is kept.

What is learned is the distribution of the latent vector z of a state x given the source s. With q(z | x) of the encoder that was there, the loss is

    E_(x, s) E_(z ~ q(z | x)) [-2 log N(z; m(s), D(s)^2)] / k = E (1/k) sum_i ((m_i(s) - m_i(x))^2 + v_i(x)) / d_i(s) + log d_i(s),    d = D^2,

least where m and d are mean and variance of the latent vector given the source. (The published loss, that of the reconstruction with its divergence
from the prior, has the same mean, but as d what is left when x itself is known: ensembles of it have too little spread whenever the source says
less than all.) m begins as a ridge regression, d as its error on withheld blocks, and a convolutional network is added to both.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from xgenda import metadata, states
from xgenda.engine import check_plausible
from xgenda.errors import GridError, OptionError
from xgenda.formatting import user_level
from xgenda.models import means
from xgenda.models.conditions import Conditions
from xgenda.models.conversions import ConversionModel, Route, encoder_arguments, encoder_inputs
from xgenda.models.fitting import fit_standardised, standardise
from xgenda.models.generative import GenerativeModel
from xgenda.models.latents import LatentModel
from xgenda.models.spec import ModelSpec
from xgenda.models.templates import remembered_axes
from xgenda.networks.autoencoder import LOWEST, Encoder, suitable_levels
from xgenda.scaling import check_named
from xgenda.training.autoencoders import AutoencoderRecipe, by_observed, read_gappy
from xgenda.training.defaults import warn_of_little
from xgenda.training.fields import InMemory
from xgenda.training.matching import check_kept, match
from xgenda.training.objectives import Batch, Draws
from xgenda.training.optimiser import Optimiser
from xgenda.training.pairs import as_described
from xgenda.training.priors import record_of
from xgenda.training.sources import FEWEST, Samples, open_source
from xgenda.training.windows import FOLDS, blocks, memory_of, near_blocks, split_rows


class Converting:
    """Prediction of latent vectors from fields of the source.

    Parameters
    ----------
    fields
        Standardised, with their masks, see `encoder_inputs`, shape (n, inputs, rows, columns).
    linear
        What a linear map that has not seen a time predicts there, shape (n, k).
    mean, variance
        Of the latent vectors of the states, both of shape (n, k).
    """

    def __init__(self, fields: Tensor, linear: Tensor, mean: Tensor, variance: Tensor) -> None:
        self.fields, self.linear, self.known = InMemory(fields), linear.float(), torch.cat([mean, variance], 1).float()
        self.tile = None

    def batch(self, rows: Tensor, states: Tensor, draws: Draws) -> Batch:
        """Return some samples; the label is what the linear map predicts, and the target what is known of the latent vector."""
        return Batch(states, self.linear[rows], None, self.known[rows])

    def losses(self, network: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """Return the loss of each sample, shape (n,)."""
        found, spread = (t.float() for t in network(batch.x.to(device), batch.label.to(device)))
        mean, variance = batch.target.to(device).chunk(2, 1)
        out: Tensor = (((found - mean).square() + variance) * (-spread).exp() + spread).mean(1)
        return out


@dataclass(frozen=True, eq=False)
class Converted:
    """Pairs of a source and of states of a latent model, at the same times.

    Attributes
    ----------
    start
        The latent model.
    source, states
        Fields, with as many times.
    seen
        Where the source has values, of the shape of its fields; None: everywhere.
    shown
        Where the states have values; None: everywhere.
    axes
        Names of the coordinates of the states.
    """

    start: LatentModel
    source: Samples
    states: Samples
    seen: np.ndarray | None
    shown: np.ndarray | None
    axes: dict[str, Any]


def open_conversion(
    ds: xr.Dataset | xr.DataArray, target: xr.Dataset | xr.DataArray | None, start: GenerativeModel | None, variables: Sequence[str] | None,
    memory: float,
) -> Converted:  # fmt: skip
    """Read source and states, check them, and bring them to the same times.

    Raises
    ------
    OptionError
        If there is no target, `start` is no latent model, or the fields take more than `memory` bytes.
    GridError
        If `target` is not on the grid of `start`.
    StateError, UnitsError
        Of fields that do not fit.
    """
    if not isinstance(start, LatentModel):
        found = "there is none" if start is None else f"{start.spec.name!r} is {start.spec.task} ({start.spec.kind})"
        raise OptionError(
            f"task='conversion' leads to the latent space of the model start, and {found}; train one first: "
            f"start=xgenda.train(target, task='autoencoder')"
        )
    if target is None:
        raise OptionError(
            "task='conversion' needs target, fields of the kind that start knows, at times of ds: "
            "xgenda.train(ds, target=target, task='conversion', start=model)"
        )
    given = metadata.as_dataset(target, "target")
    described = as_described(given, start.spec.variables, "target")
    opened, source = open_source(described, [v.name for v in start.spec.variables], "target", FEWEST), open_source(ds, variables)
    assert start.spec.grid is not None
    if not start.spec.grid.same_as(opened.grid):
        raise GridError(
            f"target is on the grid {opened.grid.describe()}, and start={start.spec.name!r} on {start.spec.grid.describe()}. Bring it there: "
            f"target.genda.regrid(start.template()), with the model that xgenda.load_model gives"
            + ("; or are ds and target exchanged?" if start.spec.grid.same_as(source.grid) else "")
        )
    if (size := source.nbytes + opened.nbytes) > memory:
        raise OptionError(
            f"ds and target take {size / 1e6:.0f} MB, and memory={memory / 1e6:g}MB; conversions are trained on fields in memory: "
            f"memory='{math.ceil(size / 1e6)}MB'"
        )
    (fine, shown), (coarse, seen) = read_gappy(opened), read_gappy(source)
    places, kept = match(fine, coarse, (0,), None)
    check_kept(len(kept), fine.size, FEWEST, None, "conversion")
    fine, coarse = _taken(fine, kept), _taken(coarse, places[:, 0])
    seen, shown = (None if m is None else m[rows] for m, rows in ((seen, places[:, 0]), (shown, kept)))
    entered = states.enter(given, "target")
    _check_states(entered.ds, fine, shown, start)
    return Converted(start, coarse, fine, seen, shown, remembered_axes(entered))


def _check_states(given: xr.Dataset, fine: Samples, shown: np.ndarray | None, start: LatentModel) -> None:
    """Refuse states that are far from those of the latent space, as other units make them, and tell of places where none is known."""
    sought = np.ones(fine.values.shape[1:], dtype=bool) if start.valid is None else start.valid
    found = sought if fine.valid is None else sought & fine.valid
    known = np.broadcast_to(found, fine.values.shape) if shown is None else shown & found
    for c, v in enumerate(start.spec.variables):
        if known[:, c].any():
            name = states.match_channel(given, v.name, v.standard_name, "target")
            check_plausible(name, float(fine.values[:, c][known[:, c]].mean()), start.scaling, c, v.units, "target")
    if never := int((sought & ~known.any(0)).sum()):
        warnings.warn(
            f"target says nothing at any time of {never} of the {int(sought.sum())} values of a state. They count as their climate in "
            f"{start.spec.name!r}, and such states are learned less well: give whole fields where there are some.",
            stacklevel=user_level(),
        )


def _taken(samples: Samples, rows: np.ndarray) -> Samples:
    time = None if samples.time is None else samples.time.isel({samples.dimension: rows})
    return dataclasses.replace(samples, values=samples.values[rows], time=time)


def train_conversion(
    pairs: Converted, recipe: AutoencoderRecipe, optimiser: Optimiser, name: str | None, licence: str
) -> ConversionModel:
    """Train an encoder from the source to the latent space."""
    start, source, time = pairs.start, pairs.source, pairs.states.time
    names, n = [v.name for v in source.variables], pairs.states.size
    check_named(recipe.transform, recipe.offset, recipe.bounds, names)
    known = standardise(start.scaling, pairs.states.values, time).reshape(pairs.states.values.shape)
    for where in (pairs.states.valid, pairs.shown, start.valid):
        known = known if where is None else np.where(where, known, 0.0)
    mean, variance, unsaid = _latent(start, torch.as_tensor(known))
    fold = blocks(time, n, FOLDS, recipe.validation)
    gap = memory_of(known.reshape(n, -1), time)
    warn_of_little(known.reshape(n, -1), pairs.states, n)
    climatology = start.scaling.cycle if recipe.climatology == "auto" else recipe.climatology
    scaling, z = fit_standardised(
        source.values, time, names, fold, climatology, pairs.seen, transform=recipe.transform, offset=recipe.offset, bounds=recipe.bounds,
        homogeneous=recipe.periodic == "both", valid=source.valid,
    )  # fmt: skip
    if pairs.seen is not None:
        scaling, z = by_observed(scaling, z, torch.as_tensor(pairs.seen))
    masks = pairs.seen is not None or source.valid is not None
    z = z.reshape(n, len(names), -1)
    if source.valid is not None:
        z[:, ~source.valid.reshape(len(names), -1)] = np.nan
    if pairs.seen is not None:
        z[~pairs.seen.reshape(z.shape)] = np.nan
    given = encoder_inputs(torch.as_tensor(z), source.grid.plane, masks)
    rows, held = split_rows(fold, time, gap)
    centre = mean.mean(0)  # of other times than those of the autoencoder it need not be zero
    ridge = means.Pairs(
        given[:, : len(names)], given[:, : len(names), :1, None].float(), (mean - centre)[:, :, None, None], fold, [None] * mean.shape[1],
        near=near_blocks(fold, time, gap),
    )  # fmt: skip
    linear, crossed, _, note = means.fit_mean(ridge, ("ridge",))
    linear = dataclasses.replace(linear, offset=centre[:, None, None] + (0.0 if linear.offset is None else linear.offset))
    predicted = centre + crossed[:, :, 0, 0]
    left = mean - predicted
    error = left.square().mean(0) + variance.mean(0)
    grid = source.grid
    options = {
        **start.spec.options, "target": pairs.axes,
        "encoder": {
            "masks": masks, "width": recipe.width or 16, "levels": suitable_levels(grid.plane),
            "periodic": grid.periodic if recipe.periodic is None else recipe.periodic,
        },
    }  # fmt: skip
    spec = ModelSpec(
        name or f"{start.spec.name}-conversion", "downscale", "conversion", start.spec.variables, start.spec.grid, start.scaling,
        inputs=Conditions(source.variables, grid, scaling), options=options, licence=licence,
        description=f"Conversion of {', '.join(names)} into the latent space of {start.spec.name}",
    )  # fmt: skip
    network = Encoder(**encoder_arguments(spec))
    network.log_variance.copy_(error.log())
    fields = given.reshape(n, -1, *grid.plane).float()
    report = optimiser.fit(
        network, Converting(fields, predicted, mean, variance), rows, held, 1.0, "conversion", None, pairs.states.labels
    )
    if not report["correction_weight"]:  # convolutions that add nothing
        spec = dataclasses.replace(spec, options={**options, "encoder": {**options["encoder"], "levels": 0}})
        network = Encoder(**encoder_arguments(spec))
        network.log_variance.copy_(error.log())
        report["card"] = "the convolutions did not predict the validation block better than ridge regression, and are left out"
    else:
        report["card"] = (
            f"validation loss {report['validation_best']:.3f}, that of ridge regression {report['validation_without']:.3f}"
        )
    explained = 1 - left.square().sum(0) / (mean - centre).square().sum(0).clamp(min=1e-12)
    extra = {
        "start": start.spec.name,
        "linear_mean": note,
        "latent_variance_explained": f"{float(explained.mean()):.3f} by ridge regression",
    }
    record = record_of(n, pairs.states.dimension, pairs.states.period, optimiser, extra, report)
    record.pop("validation_ratio")  # the losses are logarithms of densities
    spec = dataclasses.replace(spec, training=record)
    seen = None if source.valid is None else torch.as_tensor(source.valid)
    return ConversionModel(spec, start, Route(linear, network, _correlation(left, unsaid), seen))


@torch.no_grad()
def _latent(model: LatentModel, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance (n, k) of the latent vectors of standardised states, and their mean covariance (k, k), float64.

    Components that the encoder has for themselves are mixed where the vectors were standardised again, for a prior that was learned of them.
    """
    found = [model.network.encode(part.double()) for part in states.split(64)]
    mean, variance = (torch.cat(parts).double() for parts in zip(*found, strict=True))
    one = torch.eye(model.latent, dtype=torch.float64)
    if not model.network.variational:
        return mean, torch.full_like(mean, math.exp(LOWEST)), math.exp(LOWEST) * one
    turn, variance = model.network.turned(one).T, variance.exp()
    return mean, variance @ turn.square().T, (turn * variance.mean(0)) @ turn.T


def _correlation(left: Tensor, known: Tensor) -> Tensor:
    """Return the Cholesky factor of the correlation of errors (n, k) beside the covariance (k, k) that the latent vector of a known state has.

    The sample correlation is blended with the identity, as if k states without any had been seen beside these n.
    """
    n, k = left.shape
    covariance = left.T @ left / n + known
    deviation = covariance.diagonal().sqrt()
    correlation = covariance / deviation[:, None] / deviation
    factor: Tensor = torch.linalg.cholesky((n * correlation + k * torch.eye(k, dtype=left.dtype)) / (n + k))
    return factor

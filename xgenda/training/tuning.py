"""What a downscaler takes over from another one, of other variables, inputs, resolution or region."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xgenda import metadata
from xgenda.errors import OptionError
from xgenda.formatting import user_level
from xgenda.models.conditions import Conditions, cycle_columns
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.diffusive import Network
from xgenda.models.features import Features
from xgenda.models.generative import GenerativeModel
from xgenda.models.loading import load_model
from xgenda.models.spec import VariableSpec
from xgenda.scaling import Scaling
from xgenda.training.pairs import Pairs
from xgenda.training.sources import Samples, Source
from xgenda.training.standardising import Prepared, standardised_pairs
from xgenda.training.transfer import add_adapters, freeze_backbone, matched, position_on, transfer

OF_ITS_OWN = ("lead_index", "whole_condition", "scale_condition", "regression_state")  # options that training does not know


def starting_downscaler(start: GenerativeModel | str | os.PathLike[str]) -> CorrectiveModel:
    """Return the model to go on from.

    Raises
    ------
    OptionError
        If it is none that `xgenda.train` can go on from.
    """
    before = start if isinstance(start, GenerativeModel) else load_model(start)
    if not isinstance(before, CorrectiveModel):
        raise OptionError(
            f"start={before.spec.name!r} is a {before.spec.kind} model for {before.spec.task!r}; a diffusion model for downscaling is needed, "
            f"of xgenda.train(..., task='downscale')."
        )
    networks = [n for n in (before.denoiser.network, before.regression) if n is not None]
    options = before.spec.options
    if (
        not all(isinstance(n, Network) for n in networks)
        or any(options.get(k) for k in OF_ITS_OWN)
        or before.denoiser.sigma_data != 1.0
    ):
        raise OptionError(
            f"start={before.spec.name!r} was not trained here, and is conditioned in a way of its own, which cannot be trained on. Leave out start "
            f"to train from scratch."
        )
    return before


def scales(
    start: GenerativeModel | str | os.PathLike[str] | None, climatology: str, transform: Any, offset: Any
) -> Callable[[Samples | Source, Samples | Source], tuple[str, Any, Any]]:
    """Return the function that gives climatology, transforms and offsets of fine and coarse fields: those asked for, else those of `start`."""

    def found(fine: Samples | Source, coarse: Samples | Source) -> tuple[str, Any, Any]:
        if start is None:
            return "none" if climatology == "auto" else climatology, transform, offset
        before = starting_downscaler(start)
        check_common(before, fine.variables)
        cycle = climatology
        if cycle == "auto":
            cycle = "none" if fine.time is None else before.scaling.cycle
        how = (transform, offset) if transform != "none" else inherited_scales(before, fine.variables, coarse.variables)
        return cycle, *how

    return found


def inherited_scales(
    before: CorrectiveModel, fine: Sequence[VariableSpec], coarse: Sequence[VariableSpec]
) -> tuple[dict[str, str], dict[str, float]]:
    """Return transforms and offsets, in our units, of the variables that the other model has too."""
    transforms: dict[str, str] = {}
    offsets: dict[str, float] = {}
    for ours, theirs, scaling in (
        (coarse, before.inputs.variables, before.inputs.scaling),
        (fine, before.spec.variables, before.scaling),
    ):
        places, units = {v.name: i for i, v in enumerate(theirs)}, {v.name: v.units for v in ours}
        for name, other in matched(ours, theirs).items():
            i = places[other]
            transforms[name], offsets[name] = scaling.transforms[i], scaling.offsets[i]
            unit, known = units[name], theirs[i].units
            if transforms[name] == "log" and unit and known and unit != known:
                offsets[name] *= metadata.unit_factors(str(known), str(unit))[0]
    return transforms, offsets


def check_common(before: GenerativeModel, variables: Sequence[VariableSpec], argument: str = "the fine fields") -> None:
    """Refuse a model with none of the variables to train on."""
    theirs = before.spec.variables
    if not matched(variables, theirs):
        ours, name, standard = variables[0].name, theirs[0].name, theirs[0].standard_name
        alike = "" if standard is None else f", or with the attribute standard_name = {standard!r}"
        raise OptionError(
            f"start={before.spec.name!r} has the variables {[v.name for v in theirs]}, and {argument} has "
            f"{[v.name for v in variables]}: none in common. Leave out start to train from scratch; where one is the same, name it so: "
            f"rename({{{ours!r}: {name!r}}}){alike}."
        )


def kept_mean(before: CorrectiveModel, ready: Prepared, pairs: Pairs, validation: Any) -> tuple[Prepared, Tensor] | None:
    """Return the pairs as the other model standardises them, and its linear mean, where it is of the same variables and grids."""
    spec, own = ready.spec, ready.features.conditions
    scaling = spec.scaling
    assert scaling is not None

    def described(variables: Sequence[VariableSpec], how: Scaling) -> list[Any]:
        return [(v.name, v.units, t, o) for v, t, o in zip(variables, how.transforms, how.offsets, strict=True)]

    same = (
        described(spec.variables, scaling) == described(before.spec.variables, before.scaling)
        and described(own.variables, own.scaling) == described(before.inputs.variables, before.inputs.scaling)
        and (scaling.cycle, own.scaling.cycle) == (before.scaling.cycle, before.inputs.scaling.cycle)
        and (own.offsets, own.spacing, own.ends) == (before.inputs.offsets, before.inputs.spacing, before.inputs.ends)
        and before.grid.same_as(pairs.fine.grid)
        and before.inputs.grid.same_as(own.grid)
        and before.spec.wraps == spec.wraps
    )
    if not same:
        return None
    conditions = dataclasses.replace(own, scaling=before.inputs.scaling)
    features = Features(conditions, pairs.fine.grid, ready.features.statics, spec.wraps)
    theirs = standardised_pairs(pairs, dataclasses.replace(spec, scaling=before.scaling, inputs=conditions), features, validation)
    return theirs, before.mean.at(theirs.coarse, theirs.interpolated, features.everywhere())


def predicts_better(kept: tuple[Prepared, Tensor], fitted: tuple[Prepared, Tensor]) -> bool:
    """Return whether one prediction of all pairs has the smaller mean squared error, in units of the standard deviations of the other."""
    (ready, predicted), (other, crossed) = kept, fitted
    assert ready.spec.scaling is not None
    assert other.spec.scaling is not None
    ratio = torch.as_tensor(ready.spec.scaling.std / other.spec.scaling.std)
    return float(((ready.fine - predicted) * ratio).square().mean()) < float((other.fine - crossed).square().mean())


class Inheritance:
    """Gives the networks of a downscaler in training the weights of another one.

    Parameters
    ----------
    before
        The other model.
    ready
        What is trained on.
    freeze, adapters, seed
        As in `xgenda.train`.
    """

    def __init__(self, before: CorrectiveModel, ready: Prepared, freeze: str, adapters: int | None, seed: int) -> None:
        self.before, self.freeze, self.adapters, self.seed = before, freeze, adapters, seed
        self.grid = ready.spec.grid
        self.record: dict[str, Any] = {"started_from": f"{before.spec.name} ({before.sha256[:12]})"}
        conditions = ready.features.conditions
        fine = matched(ready.spec.variables, before.spec.variables)
        self.fine = [fine.get(v.name, ("new", v.name)) for v in ready.spec.variables], [v.name for v in before.spec.variables]
        coarse = matched(conditions.variables, before.inputs.variables)
        self.given = (
            _inputs(conditions, coarse),
            _inputs(before.inputs, {v.name: v.name for v in before.inputs.variables}),
        )
        lost = [_words(k) for k in self.given[1] if k not in self.given[0]]
        if lost:
            self.record["dropped_inputs"] = ", ".join(dict.fromkeys(lost))
            warnings.warn(
                f"start={before.spec.name!r} sees {self.record['dropped_inputs']}, not given here: what it learned of them is lost. Give them "
                f"too: ds, statics, neighbours, time_features or lead_time.",
                stacklevel=user_level(),
            )

    def give(self, stage: str, network: Network, *, mean: bool) -> bool:
        """Give the network of a stage, 'mean' or 'residual', its weights; return whether the other model has such a network.

        Parameters
        ----------
        mean
            Whether it gets the mean as a condition.
        """
        own = self.before.regression if stage == "mean" else self.before.denoiser.network
        if own is None:
            self.record[f"transfer_{stage}"] = "none: from scratch"
            return False
        assert isinstance(own, Network)
        # a mean that was zero throughout says nothing of what its channels are worth
        zero = self.before.mean.is_zero and (stage == "mean" or self.before.regression is None)
        had = not self.before.mean.is_zero if stage == "mean" else self.before.mean_condition
        parts = []
        for k, has in enumerate((mean, had)):
            means = [("nothing" if zero and k else "mean", name) for name in self.fine[k]] if has else []
            condition = [*self.given[k], *means] if stage == "mean" else [*means, *self.given[k]]
            parts.append([*(("state", name) for name in self.fine[k]), *condition])
        inputs: tuple[list[Hashable], list[Hashable]] = (parts[0], parts[1])
        position = position_on(self.grid, own, self.before.grid)
        found = transfer(network, own, inputs, self.fine, position)
        self.record |= {f"transfer_{stage}_{k}": v for k, v in found.items()}
        if self.freeze == "backbone":
            freeze_backbone(network)
        if self.adapters is not None:
            add_adapters(network, self.adapters, self.seed)
        return True


def _inputs(conditions: Conditions, names: Mapping[str, str]) -> list[Hashable]:
    """Return what each channel of `Features` is, coarse variables by the name that the other model has for them."""
    seconds = [round(o * (conditions.spacing or 0.0)) for o in conditions.offsets]
    out: list[Hashable] = [("coarse", names.get(v.name, ("new", v.name)), s) for s in seconds for v in conditions.variables]
    out += [("static", name) for name in conditions.statics]
    parts = [] if conditions.cycle == "none" else conditions.cycle.split("+")
    out += [(part, k) for part in parts for k in range(cycle_columns(part))]
    return out + ([("lead",)] if conditions.lead_time is not None else [])


def _words(key: Any) -> str:
    """Return a channel of `Features` in words."""
    if key[0] == "coarse":
        return str(key[1]) + (f" {key[2] / 3600:+g} h" if key[2] else "")
    return {"static": str(key[-1]), "dayofyear": "day of the year", "hour": "hour of the day", "lead": "lead time"}[key[0]]

"""What a model remembers of its training, in words, as a Dataset and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xgenda.errors import OptionError, missing_dependency
from xgenda.models.variables import VariableSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG_NAMES = {
    "loss": "mean loss of the steps since the last report",
    "validation_loss": "loss of the averaged weights on the validation block",
    "seconds": "time since the training of this network began",
    "samples_per_second": "training samples per second",
}
INTERNAL = ("averaging_width", "validation_without", "seconds")  # kept for who looks for them


def remarks_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is worth telling of a training: no long lists, nothing twice, and nothing of the inside of the optimiser."""
    said = {str(k): v for k, v in training.items() if k not in ("history", "marks")}
    if said.get("guidance_covariance") == said.get("anchor"):
        said.pop("guidance_covariance", None)
    return {k: v for k, v in said.items() if k.removeprefix("mean_") not in INTERNAL}


def history_of(name: str, training: Mapping[str, Any], variables: Sequence[VariableSpec] = ()) -> xr.Dataset:
    """Return losses and scores along the steps of training, as `GenerativeModel.history` documents.

    Raises
    ------
    OptionError
        If the model was not trained in steps.
    """
    stages: Mapping[str, Mapping[str, list[Any]]] = training.get("history", {})
    if not stages:
        raise OptionError(f"model={name!r} has no history: it was not trained in steps, or by an earlier version.")
    out = xr.Dataset(attrs={"title": f"training of {name}"})
    units = {v.name: v.units for v in variables if v.units}
    for stage, columns in stages.items():
        prefix = "" if len(stages) == 1 else f"{stage}_"
        dim = f"{prefix}step"
        out = out.assign_coords({dim: (dim, columns["step"], {"long_name": f"optimiser steps of the {stage}"})})
        for column, values in columns.items():
            if column != "step":
                attrs = {"long_name": LONG_NAMES.get(column, column.replace("_", " "))}
                scored = column.removeprefix("crps_").removesuffix("_gaussian").removesuffix("_linear")
                if scored != column and scored in units:
                    attrs["units"] = units[scored]
                out[prefix + column] = (dim, np.array([np.nan if v is None else v for v in values], dtype=float), attrs)
    return out


def plot_history(name: str, training: Mapping[str, Any], variables: Sequence[VariableSpec] = ()) -> Figure:
    """Draw losses, and scores where there are some, as `GenerativeModel.plot_history` documents."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as problem:
        raise missing_dependency("matplotlib", "plot", "Plotting") from problem
    history = history_of(name, training, variables)
    stages = list(training["history"])
    scores = sorted(
        {n for n in history.data_vars if "crps_" in str(n) and not str(n).endswith(("_gaussian", "_linear"))}, key=str
    )
    figure = Figure(figsize=(4.8 * (len(stages) + len(scores)), 3.6), layout="constrained")
    axes = figure.subplots(1, len(stages) + len(scores), squeeze=False)[0]
    dot = {"marker": "o", "markersize": 3}
    for axis, stage in zip(axes, stages, strict=False):
        prefix = "" if len(stages) == 1 else f"{stage}_"
        steps, validation = history[f"{prefix}step"].values, history[f"{prefix}validation_loss"].values
        axis.plot(steps, history[f"{prefix}loss"], color="0.6", label="loss", **dot)
        start = training.get("mean_validation_start" if stage == "mean" else "validation_start")
        if start is not None:  # before the first step
            steps, validation = np.append(0, steps), np.append(start, validation)
        axis.plot(steps, validation, color="C0", label="validation loss", **dot)
        axis.set(title=f"{stage}: loss", ylabel="loss; of a network that\nexplains nothing about 1")
    for axis, score in zip(axes[len(stages) :], scores, strict=True):
        lines = ((str(score), "model", "C0"), (f"{score}_gaussian", "Gaussian", "C1"), (f"{score}_linear", "linear mean", "C1"))
        for column, label, colour in lines:
            if column in history:
                known = history[column].dropna(str(history[column].dims[0]))
                axis.plot(known[known.dims[0]], known, color=colour, label=label, **dot)
        unit = history[score].attrs.get("units")
        end = float(history[history[score].dims[0]][-1])  # also where scores ended before
        axis.set(
            title=str(score).split("crps_", 1)[1],
            xlim=(0, 1.03 * end),
            ylabel="CRPS, validation" + (f" [{unit}]" if unit else ""),
        )
    for axis in axes:
        low, high = axis.get_ylim()
        missing = 0.01 * max(abs(low), abs(high)) - (high - low)
        if missing > 0:  # so that rounding does not look like a gain
            axis.set_ylim(low - missing / 2, high + missing / 2)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("step")
        axis.legend(frameon=False)
    return figure

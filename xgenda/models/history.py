"""What a model remembers of its training, as a Dataset and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xgenda.errors import OptionError, missing_dependency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG_NAMES = {
    "loss": "mean loss of the steps since the last report",
    "validation_loss": "loss of the averaged weights on the validation block",
    "seconds": "time since the training of this network began",
    "samples_per_second": "training samples per second",
}


def history_of(name: str, training: Mapping[str, Any]) -> xr.Dataset:
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
    for stage, columns in stages.items():
        prefix = "" if len(stages) == 1 else f"{stage}_"
        dim = f"{prefix}step"
        out = out.assign_coords({dim: (dim, columns["step"], {"long_name": f"optimiser steps of the {stage}"})})
        for column, values in columns.items():
            if column != "step":
                attrs = {"long_name": LONG_NAMES.get(column, column.replace("_", " "))}
                out[prefix + column] = (dim, np.array([np.nan if v is None else v for v in values], dtype=float), attrs)
    return out


def plot_history(name: str, training: Mapping[str, Any]) -> Figure:
    """Draw losses, and scores where there are some, as `GenerativeModel.plot_history` documents."""
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise missing_dependency("matplotlib", "plot", "Plotting") from problem
    history = history_of(name, training)
    stages = list(training["history"])
    scores = sorted(
        {n for n in history.data_vars if "crps_" in str(n) and not str(n).endswith(("_gaussian", "_linear"))}, key=str
    )
    figure = Figure(figsize=(4.8 * (len(stages) + len(scores)), 3.6), layout="constrained")
    axes = figure.subplots(1, len(stages) + len(scores), squeeze=False)[0]
    for axis, stage in zip(axes, stages, strict=False):
        prefix = "" if len(stages) == 1 else f"{stage}_"
        axis.plot(history[f"{prefix}step"], history[f"{prefix}loss"], color="0.6", label="training")
        axis.plot(history[f"{prefix}step"], history[f"{prefix}validation_loss"], color="C0", label="validation")
        axis.set(title=f"{stage}: loss", xlabel="step", ylabel="relative to no correction")
        axis.legend(frameon=False)
    for axis, score in zip(axes[len(stages) :], scores, strict=True):
        lines = ((str(score), "model", "C0"), (f"{score}_gaussian", "Gaussian", "C1"), (f"{score}_linear", "linear mean", "C1"))
        for column, label, colour in lines:
            if column in history:
                known = history[column].dropna(str(history[column].dims[0]))
                axis.plot(known[known.dims[0]], known, marker="o", markersize=3, color=colour, label=label)
        axis.set(title=str(score).split("crps_", 1)[1], xlabel="step", ylabel="fair CRPS, validation")
        axis.legend(frameon=False)
    return figure

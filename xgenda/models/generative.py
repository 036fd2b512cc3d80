"""`GenerativeModel`: what every prior offers to the engine, and what users see of it."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xgenda.curvilinear import AnyGrid
from xgenda.errors import OptionError, check_count
from xgenda.formatting import rounded
from xgenda.models.conditions import Conditions
from xgenda.models.spec import ModelSpec, VariableSpec
from xgenda.operators import Operator
from xgenda.states import columns

if TYPE_CHECKING:
    import os

    import xarray as xr
    from matplotlib.figure import Figure
    from torch import Tensor, device

    from xgenda.models.places import Places


STAGES = ("all", "mean")  # of downscaling


@dataclass(frozen=True, eq=False)
class PointEvidence:
    """The observations of one time, as tensors: rows of a `LinearMap` from the state, values and error variances.

    With `places` each channel of that state has these after its cells.
    """

    indices: Tensor
    weights: Tensor
    value: Tensor
    variance: Tensor
    places: Places | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Request:
    """What the engine asks of a model: an ensemble for a block of times.

    Attributes
    ----------
    grid
        Grid of `fields`.
    fields
        Background or coarse fields in model units, shape (t, channels, cells), float64.
    climatology
        Scaling mean of each time on the state grid, shape (t, channels, cells); None where the model has no scaling.
    evidence
        One per time; of a trajectory one in all, whose indices count through the states of all times, or without observations one per time.
    labels
        One time label per time.
    members
        Member numbers.
    seed
        With label and member, the key of the random numbers.
    options
        Resolved by `GenerativeModel.plan`.
    device
        Where to compute.
    advance
        Called with a number of finished units of work, `GenerativeModel.work` in all.
    operators
        What `evidence` may observe beside the channels, each with the channels that it takes: further channels after them.
    standardised, planes
        For downscaling: the coarse fields standardised, shape (t, inputs, cells), and what is the same everywhere, shape (t, planes).
    window
        Rows and columns that are wanted, where not the whole grid.
    """

    grid: AnyGrid
    fields: Tensor
    climatology: Tensor | None
    evidence: Sequence[PointEvidence]
    labels: Sequence[str]
    members: Sequence[int]
    seed: int
    options: SamplingOptions
    device: device
    advance: Callable[[int], None]
    operators: Sequence[tuple[Operator, tuple[int, ...]]] = ()
    standardised: Tensor | None = None
    planes: Tensor | None = None
    window: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample: what the user asked for, or, after `GenerativeModel.plan`, what will be done.

    In a plan nothing is 'auto' or None, and the options hold every value, so that two equal plans give the same numbers.
    """

    guidance: str = "auto"
    sampler: str = "auto"
    steps: int | None = None
    batch_size: int | None = None
    schedule: str = "auto"
    likelihood: str = "gaussian"
    guidance_options: Mapping[str, Any] = field(default_factory=dict)
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    tile: Any = None
    overlap: Any = None
    stage: str = "all"

    def refuse_all_but(self, accepted: tuple[str, ...], why: str) -> None:
        """Refuse options that a model has no use for.

        Raises
        ------
        OptionError
            Naming the first option that is not at its default.
        """
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        for name in (f.name for f in fields(self) if f.name != "batch_size"):
            value = getattr(self, name)
            if name not in accepted and value not in ("auto", "gaussian", "all", None) and value != {}:
                raise OptionError(f"{name}={value!r} has no effect: {why}. Leave it out.")


def described_inputs(inputs: Conditions) -> dict[str, str]:
    """Return what a downscaling model takes, in a line or two."""
    also = [
        *inputs.statics,
        *(n for c, n in (("dayofyear", "season"), ("hour", "hour of the day")) if c in inputs.cycle),
        *(["lead time"] if inputs.lead_time else []),
    ]
    times = "" if inputs.spacing is None else f", at {len(inputs.offsets)} times {inputs.spacing / 3600:g} h apart"
    return {
        "inputs": ", ".join(_on_levels(inputs.variables)) + times + "".join(f"; {a}" for a in also),
        "input grid": inputs.grid.describe(),
    }


def _on_levels(variables: Sequence[VariableSpec]) -> list[str]:
    """Return each variable with its units, and its levels where it has some."""
    out = []
    for name, at, levels, kind in columns([v.name for v in variables]):
        units = variables[at[0]].units or "no units"
        unit = "Pa" if kind == "pressure" else "m"
        out.append(
            f"{name} [{units}]"
            + (f" at {len(levels)} levels of {kind}, {levels[0]:g} to {levels[-1]:g} {unit}" if levels else "")
        )
    return out


class GenerativeModel(ABC):
    """A prior (or a conditional model) with its description.

    Attributes
    ----------
    spec : ModelSpec
        Variables, grid, scaling, provenance.
    path : Path or None
        The file it was read from; dask tasks then carry this and the checksum, never weights.
    sha256 : str
        Of that file, or of the content for a model that was never saved.
    valid : numpy.ndarray or None
        Where the state is, shape (channels, rows, columns), bool: False on land in an ocean. None: everywhere.
    closed_form : bool
        Whether `moments` are known.
    gaps : bool
        Whether what it takes, as a model of `downscale`, may be NaN in some cells; these are NaN in ``Request.standardised`` too.
    """

    spec: ModelSpec
    path: Path | None = None
    sha256: str = ""
    valid: np.ndarray | None = None
    closed_form: bool = False
    gaps: bool = False

    @property
    def pointwise(self) -> bool:
        """Whether the prior is evaluated at the places of observations, instead of interpolated there from the cells."""
        return bool(self.spec.options.get("representation") == "points")

    @abstractmethod
    def plan(self, asked: SamplingOptions, *, linear: bool = True) -> SamplingOptions:
        """Resolve 'auto' and None, and refuse what this model cannot do; `linear` tells whether all observation operators are."""

    @abstractmethod
    def posterior(self, request: Request) -> Tensor:
        """Return members in model units, shape (t, members, channels, cells), float32 or float64, on the CPU."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return everything to store, by name."""

    def work(self, times: int, members: int, options: SamplingOptions) -> int:
        """Return the number of units of work that `posterior` reports."""
        return times

    def moments(self, request: Request, *, spread: bool = True) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the posterior, each shape (t, channels, cells), where they have a closed form.

        Without `spread` the latter, which takes longer, is zero.
        """
        raise NotImplementedError

    def prior_moments(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the prior, each shape (t, channels, cells), for the background check."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False, card: bool = False) -> Path:
        """Write the model to a safetensors file, whole or not at all.

        Parameters
        ----------
        path
            Ends in ``.safetensors``.
        overwrite
            Whether an existing file may be replaced.
        card
            Whether the model's card is written beside it, under the same name with ``.md``.

        Raises
        ------
        OutputExistsError
            If `path`, or the card, exists and `overwrite` is False.
        """
        from xgenda.models.checkpoints import save_model

        return save_model(self, path, overwrite=overwrite, card=card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        file: str = "model.safetensors",
        private: bool | None = None,
        card: bool = True,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Publish the model on the Hugging Face hub, as a safetensors file and a model card.

        Parameters
        ----------
        repo_id
            ``organisation/repository``; it is made if it does not exist.
        file
            The name of the model file there.
        private
            Whether a repository that is made is private; by default as the hub has it.
        card
            Whether ``README.md`` there is replaced by the card of the model.
        message
            Of the commit.
        token
            By default that of ``hf auth login`` or of the environment variable ``HF_TOKEN``. It is never shown.

        Returns
        -------
        str
            What `xgenda.load_model` takes, pinned to the commit: ``hf://organisation/repository@<commit>/file``.

        Raises
        ------
        PublishingError
            If the hub cannot be reached, or does not let you write there.
        """
        from xgenda.models.publishing import push_model

        return push_model(self, repo_id, file=file, private=private, card=card, message=message, token=token)

    def template(self, *, inputs: bool = False) -> xr.Dataset:
        """Return zeros on the grid of the model with the attributes of its variables: what fields for it look like.

        Parameters
        ----------
        inputs
            For a downscaling model: those of the coarse fields that it takes.

        Raises
        ------
        OptionError
            If the model works on any grid, or has no inputs.
        """
        from xgenda.models.templates import empty

        found = self.spec.inputs if inputs else self.spec
        if found is None or found.grid is None:
            raise OptionError(
                f"model={self.spec.name!r} has no {'inputs' if inputs else 'grid of its own'}; there is no template."
            )
        return empty(found.grid, found.variables, names=None if inputs else self.spec.options.get("target"))

    @property
    def history(self) -> xr.Dataset:
        """Losses and scores along ``step``, the optimiser steps of training; of a model of several networks each with its name before it.

        Losses are relative to a network that explains nothing. ``crps_<variable>`` and ``crps_<variable>_gaussian`` are the fair CRPS of posterior
        ensembles on the validation block, of the model and of the Gaussian it builds on, in the units of the variable, NaN at steps
        where they were not taken.

        Raises
        ------
        OptionError
            If the model was not trained in steps.
        """
        from xgenda.models.history import history_of

        return history_of(self.spec.name, self.spec.training, self.spec.variables)

    def plot_history(self) -> Figure:
        """Draw `history` with matplotlib, from the validation loss before the first step; in a notebook the figure shows itself."""
        from xgenda.models.history import plot_history

        return plot_history(self.spec.name, self.spec.training, self.spec.variables)

    def summary(self) -> dict[str, str]:
        """Return what a user wants to know at a glance; all that was recorded is in ``spec.training``."""
        from xgenda.models.history import remarks_of

        spec = self.spec
        rows: dict[str, Any] = {
            "task": f"{spec.task} ({spec.kind})" + (f", x{spec.factor}" if spec.factor else ""),
            **({} if spec.inputs is None else described_inputs(spec.inputs)),
            "variables": ", ".join(_on_levels(spec.variables)),
            "grid": spec.grid.describe() if spec.grid is not None else "any",
            **({"representation": "points: between cells evaluated, not interpolated"} if self.pointwise else {}),
            **({"mask": f"{100 * (1 - self.valid.mean()):.0f} % of the cells are masked"} if self.valid is not None else {}),
            **(
                {"window": f"{spec.options['window']} states, {spec.options['spacing'] / 86400:g} days apart"}
                if "spacing" in spec.options
                else {}
            ),
            **{k: v for k, v in remarks_of(spec.training).items() if not isinstance(v, (dict, list))},
            "licence": spec.licence,
            "file": f"{self.path} (sha256 {self.sha256[:12]})" if self.path else f"not saved (content {self.sha256[:12]})",
        }
        return {k: rounded(v) for k, v in rows.items()}

    def __repr__(self) -> str:
        """Return the summary as text."""
        rows = self.summary()
        width = max(map(len, rows))
        return f"<xgenda.GenerativeModel {self.spec.name!r}>\n" + "\n".join(f"  {k:<{width}}  {v}" for k, v in rows.items())

    def _repr_html_(self) -> str:
        import xarray as xr

        if xr.get_options()["display_style"] == "text":
            return f"<pre>{html.escape(repr(self))}</pre>"
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(k)}</th><td style='text-align:left'>{html.escape(v)}</td></tr>"
            for k, v in self.summary().items()
        )
        return f"<b>xgenda.GenerativeModel</b> {html.escape(self.spec.name)}<table>{rows}</table>"

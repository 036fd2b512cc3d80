"""What a model is, without its numbers: variables, grid, scaling, options, provenance. Frozen dataclasses, stored as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xgenda.curvilinear import AnyGrid, grid_from_dict
from xgenda.errors import CheckpointError
from xgenda.models.conditions import Conditions
from xgenda.models.variables import VariableSpec
from xgenda.scaling import Scaling

__all__ = ["ModelSpec", "VariableSpec"]

TASKS = ("prior", "downscale", "background", "forecast")
KINDS = ("gaussian", "diffusion", "latent", "conversion", "bilinear", "bcsd", "ridge")


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its arrays.

    Parameters
    ----------
    name
        Registered name, or a description of an unsaved model.
    task
        'prior' and 'background' (for `assimilate`), 'downscale' or 'forecast'.
    kind
        'gaussian', 'diffusion' or 'latent'; for 'downscale' also 'conversion' or a classical method, 'bilinear', 'bcsd' or 'ridge'.
    variables
        In channel order.
    grid
        Of the state (for 'downscale': the fine grid); None where any grid will do.
    scaling
        Standardisation; None where the model works in physical units.
    factor
        Cells per coarse cell along each axis, for 'downscale' where the coarse cells are blocks of fine ones.
    inputs
        For 'downscale', 'background' and 'forecast': what the model takes.
    needs_background
        Whether the values of the Dataset given to `assimilate` are the prior mean.
    options
        Architecture and defaults, by the class that reads them.
    training
        Where the numbers come from: data, period, samples, scores.
    licence, description
        Free text.
    doi, citation
        Of the weights, where they are published; shown by their card.
    """

    name: str
    task: str
    kind: str
    variables: tuple[VariableSpec, ...]
    grid: AnyGrid | None = None
    scaling: Scaling | None = None
    factor: int | None = None
    needs_background: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "not stated"
    description: str = ""
    inputs: Conditions | None = None
    doi: str = ""
    citation: str = ""

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.variables)

    @property
    def wraps(self) -> bool:
        """Whether the grid of a downscaling model is a doubly periodic box where all places are alike."""
        return bool(self.options.get("wraps", False))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; the arrays of the scaling are stored apart."""
        return {
            "name": self.name,
            "task": self.task,
            "kind": self.kind,
            "variables": [vars(v) for v in self.variables],
            "grid": None if self.grid is None else self.grid.to_dict(),
            "scaling": None if self.scaling is None else self.scaling.to_dict(),
            "factor": self.factor,
            "needs_background": self.needs_background,
            "options": dict(self.options),
            "training": dict(self.training),
            "licence": self.licence,
            "description": self.description,
            "inputs": None if self.inputs is None else self.inputs.to_dict(),
            "doi": self.doi,
            "citation": self.citation,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], scaling: Scaling | None, inputs: Conditions | None = None) -> ModelSpec:
        """Read the form written by `to_dict`; what has arrays is given apart.

        Raises
        ------
        CheckpointError
            If keys are missing or not known.
        """
        expected = {
            "name", "task", "kind", "variables", "grid", "scaling", "factor", "needs_background", "options", "training",
            "licence", "description", "inputs", "doi", "citation",
        }  # fmt: skip
        if set(data) != expected:
            raise CheckpointError(f"The model description has unexpected or missing keys: {sorted(set(data) ^ expected)}.")
        if data["task"] not in TASKS or data["kind"] not in KINDS:
            raise CheckpointError(f"The model is a {data['kind']!r} for {data['task']!r}, which this version does not know.")
        grid = None if data["grid"] is None else grid_from_dict(data["grid"])
        variables = tuple(VariableSpec(**v) for v in data["variables"])
        return cls(**{**data, "variables": variables, "grid": grid, "scaling": scaling, "inputs": inputs})

"""A variable of a model, by its CF names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VariableSpec:
    """One variable of a model, by its CF names; `units` are those the model computes in."""

    name: str
    standard_name: str | None = None
    units: str | None = None
    long_name: str | None = None

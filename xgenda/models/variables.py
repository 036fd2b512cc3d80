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

    @property
    def attrs(self) -> dict[str, str]:
        """The attributes of a variable of a Dataset, those that are known."""
        given = (("standard_name", self.standard_name), ("long_name", self.long_name), ("units", self.units))
        return {k: a for k, a in given if a}

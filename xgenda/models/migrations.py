"""How descriptions in older model files are brought to today's form, one format at a time.

A model file is safetensors whose header has one entry of ours, ``xgenda``: a JSON document. Since format 2 it is

``format``
    Number of the format.
``requires``
    The first version of xgenda that reads this format; what an older one tells its user to install.
``model``
    The description, `xgenda.models.spec.ModelSpec.to_dict`.
``tensors``
    The shape of each tensor by its name, so that a file that was edited is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Document = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Migration = Callable[[Document, Shapes], Document]

FORMAT = 2
REQUIRES = "0.1.0"  # the first version that reads `FORMAT`
KEYS = ("format", "requires", "model", "tensors")
MIGRATIONS: dict[int, Migration] = {}


def migration(before: int) -> Callable[[Migration], Migration]:
    """Register the function that brings a document of format `before` to the next one."""

    def register(function: Migration) -> Migration:
        MIGRATIONS[before] = function
        return function

    return register


def migrated(document: Document, shapes: Shapes) -> Document:
    """Return a document in today's format.

    Parameters
    ----------
    document
        Of format 1 to `FORMAT`; its ``format`` must be one of these.
    shapes
        Of the tensors in the file.
    """
    while document["format"] < FORMAT:
        document = MIGRATIONS[document["format"]](document, shapes)
    return document


@migration(1)
def _nested(document: Document, shapes: Shapes) -> Document:
    """Format 1 had the description beside its number, and neither shapes nor sources to cite; the first priors had no inputs."""
    described = {k: v for k, v in document.items() if k != "format"}
    return {
        "format": 2,
        "requires": REQUIRES,
        "model": {"inputs": None, "doi": "", "citation": "", **described},
        "tensors": {k: list(v) for k, v in shapes.items()},
    }

"""All models that are known by name: those of the package, and those that a user or another package adds.

The environment variable ``XGENDA_REGISTRY`` names registry files of the user, several of them separated as in ``PATH``. An
installed package adds its own by an entry point of the group ``xgenda.models``: the path of a registry file, or a function
without arguments that returns one. A name that two files have is an error, so that no model is ever replaced unseen.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

from xgenda.errors import CheckpointError
from xgenda.models import entries
from xgenda.models.entries import Entry, read_registry

VARIABLE = "XGENDA_REGISTRY"
GROUP = "xgenda.models"


def registry(path: Path | None = None) -> dict[str, Entry]:
    """Read the registered models.

    Parameters
    ----------
    path : Path, optional
        One registry file. By default the models of the package, then those of ``XGENDA_REGISTRY``, then those of entry points.

    Returns
    -------
    dict of str to Entry
        The models by name.

    Raises
    ------
    CheckpointError
        A file is not as it should be, or two files have a model of the same name.
    """
    if path is not None:
        return read_registry(Path(path))
    inside = entries.PACKAGE / "weights.toml"  # an installed package; in a source tree the file is one level up
    bundled = inside if inside.is_file() else entries.PACKAGE.parent / "weights.toml"
    found = read_registry(bundled, entries.PACKAGE / "data" / "weights")
    seen = {bundled.resolve()}
    for own, source in _own():
        if own.resolve() in seen:  # the same file twice is no clash
            continue
        seen.add(own.resolve())
        try:
            added = read_registry(own)
        except CheckpointError as error:
            raise CheckpointError(f"{error} ({source})") from error
        for name, entry in added.items():
            if name in found:
                raise CheckpointError(
                    f"Two models are named {name!r}: one in {found[name].registry}, one in {own} ({source}). Rename one of them."
                )
            found[name] = entry
    return found


def _own() -> Iterator[tuple[Path, str]]:
    """Yield the files that are added, and how."""
    for text in os.environ.get(VARIABLE, "").split(os.pathsep):
        if text.strip():
            yield Path(text.strip()).expanduser().absolute(), f"added by the environment variable {VARIABLE}"
    for point in importlib.metadata.entry_points(group=GROUP):
        owner = point.dist.name if point.dist is not None else "an unknown package"
        source = f"added by the entry point {point.name!r} of {owner}"
        try:
            given = point.load()
            given = given() if callable(given) else given
            path = Path(given)
        except Exception as error:  # of another package: anything can happen
            raise CheckpointError(
                f"The models {source} cannot be found: {error!r}. It must be the path of a registry file, or a function that returns "
                f"one. Type: pip install --upgrade {owner}, or pip uninstall {owner}"
            ) from error
        yield path.absolute(), source

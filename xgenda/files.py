"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from xgenda.errors import GendaError, OptionError, OutputExistsError


def check_output(path: str | os.PathLike[str], call: str, *, overwrite: bool, error: type[GendaError] = OptionError) -> Path:
    """Return `path`, if a file may be written there.

    Parameters
    ----------
    path
        Where the file goes.
    call
        What the user typed, without its arguments, for the message.
    overwrite
        Whether an existing file may be replaced.
    error
        Raised where there is no such folder.

    Raises
    ------
    OutputExistsError
        If there is such a file.
    """
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise error(f"{target.parent} is no folder; make it first: mkdir -p {target.parent}")
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target} exists. Choose another name, or replace it: {call}({str(target)!r}, overwrite=True)")
    return target


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to, which is renamed in the end: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        mask = os.umask(0)  # there is no other way to read it
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # some writers make files that only their owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

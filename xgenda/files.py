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
def aside(path: Path, *, durable: bool = False, suffix: str = "") -> Iterator[Path]:
    """Yield a name beside `path` to write to, which is renamed in the end: a reader sees the old file or the new one.

    Parameters
    ----------
    path
        Where the file goes.
    durable
        Whether its content is on the disk before it has its name, so that a power failure leaves no name without content; the name itself is
        there for good after `flush` of the folder.
    suffix
        What the name beside it ends with, for writers that go by it.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}{suffix}")
    try:
        yield partial
        mask = os.umask(0)  # there is no other way to read it
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # some writers make files that only their owner can read
        if durable:
            flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

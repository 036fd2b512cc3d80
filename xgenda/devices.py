"""Device and thread count, and the per-process cache of models."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xgenda.errors import ChecksumError, OptionError

if TYPE_CHECKING:
    from xgenda.models.generative import GenerativeModel

_locks: dict[str, threading.RLock] = {}
_guard = threading.Lock()
_limited: list[int] = []  #: thread count before the first of the tasks that run now, and one entry more for each further one


def resolve_device(device: str) -> torch.device:
    """Return the torch device for 'auto', 'cpu', 'cuda' or 'cuda:N'.

    Raises
    ------
    OptionError
        If there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise OptionError(f"device={device!r} is not accepted; choose 'auto', 'cpu' or 'cuda'.") from None
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise OptionError(
            f"device={device!r} was asked for, and torch sees {torch.cuda.device_count() if torch.cuda.is_available() else 'no'} "
            f"GPU here. Type device='cpu', or install a build of torch for your GPU."
        )
    if found.type not in ("cpu", "cuda"):
        raise OptionError(f"device={device!r} is not supported; double precision is needed: choose 'cpu' or 'cuda'.")
    return found


@contextlib.contextmanager
def exclusive(device: torch.device, threads: int | None) -> Iterator[None]:
    """Compute on `device`: one task at a time on a GPU; with `threads` torch threads on the CPU.

    In dask tasks `threads` is 1: the scheduler brings the parallelism, and sums are then added up in the same order by every
    scheduler and any number of workers, which makes their results equal to the bit.
    """
    with _guard:
        lock = _locks.setdefault(str(device), threading.RLock())
    with lock if device.type != "cpu" else contextlib.nullcontext():
        if threads is None:
            yield
            return
        with _guard:
            _limited.append(torch.get_num_threads())
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            with _guard:  # tasks overlap in any order: the last one to leave restores what the first one found
                first = _limited[0]
                _limited.pop()
                if not _limited:
                    torch.set_num_threads(first)


@dataclass(frozen=True)
class Handle:
    """What a dask task carries instead of a model: path and checksum, or the model itself where it was never saved."""

    sha256: str
    path: str | None = None
    model: GenerativeModel | None = None

    def __dask_tokenize__(self) -> tuple[str, str]:
        """Identify the model by its content."""
        return ("xgenda.Handle", self.sha256)

    def load(self) -> GenerativeModel:
        """Return the model, read once per process."""
        return self.model if self.model is not None else _load(self.path or "", self.sha256)


@functools.lru_cache(maxsize=8)
def _load(path: str, sha256: str) -> GenerativeModel:
    from xgenda.models.checkpoints import read_model
    from xgenda.models.store import sha256_of

    found = sha256_of(Path(path))
    if found != sha256:
        raise ChecksumError(
            f"{path} has changed since this computation was set up: sha256 {found[:12]}, expected {sha256[:12]}. Call it again."
        )
    return read_model(Path(path), sha256)


def handle_of(model: GenerativeModel) -> Handle:
    """Return the handle of a model."""
    if model.path is not None:
        return Handle(model.sha256, str(model.path))
    return Handle(model.sha256, None, model)

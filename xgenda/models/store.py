"""Where model files come from: the registry ``weights.toml``, the cache, and files on disk.

A model file is found by name or by path, and handed over only after its size and SHA-256 were compared with the
registered ones. Nothing is downloaded, and no folder is made, before a file is asked for. Downloads go through pooch
into one cache, which the environment variable ``XGENDA_CACHE`` moves; a file gets its name there by an atomic move
once it is complete, so that several processes may ask for it at once.

Only safetensors are read: a pickled checkpoint (``.pt``, ``.ckpt``, ...) can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from xgenda.errors import CheckpointError, ChecksumError, ModelNotFoundError, OptionError, did_you_mean
from xgenda.models import entries as _entries
from xgenda.models.entries import HUB_URL, PICKLES, Entry, registry

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Entry", "cache_dir", "find_file", "list_models", "path_of", "registry", "sha256_of"]

_RETRIES = 3


def cache_dir() -> Path:
    """Return the folder of downloaded models: ``$XGENDA_CACHE``, else the user's cache; it may not exist yet."""
    import pooch

    return Path(os.environ.get("XGENDA_CACHE") or pooch.os_cache("xgenda")).expanduser().absolute()


def path_of(entry: Entry) -> Path:
    """Return where a registered model's file is on this machine, or will be once it is downloaded."""
    if entry.file is not None:
        return _entries.PACKAGE / "data" / "weights" / entry.file
    return cache_dir() / f"{entry.name}-{entry.sha256[:8]}.safetensors"  # a new version gets a new name


def _where(entry: Entry) -> Literal["bundled", "cached", "remote"]:
    if entry.file is not None:
        return "bundled"
    path = path_of(entry)
    return "cached" if path.is_file() and path.stat().st_size == entry.size else "remote"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_models(*, registry: Mapping[str, Entry] | None = None) -> pd.DataFrame:
    """List the registered models: task, variables, region, size in bytes, licence, and where each file is.

    Parameters
    ----------
    registry : mapping of str to Entry, optional
        Models by name. By default those that come with xgenda.

    Returns
    -------
    pandas.DataFrame
        One row per model, indexed by ``name``. ``where`` is "bundled", "cached" or "remote".
    """
    import pandas as pd

    columns = ["task", "variables", "region", "size", "licence", "where"]
    entries = list((_registry() if registry is None else registry).values())
    rows = [[e.task, ", ".join(e.variables), e.region, e.size, e.licence, _where(e)] for e in entries]
    return pd.DataFrame(rows, columns=columns, index=pd.Index([e.name for e in entries], name="name", dtype=object))


def find_file(name_or_path: str | os.PathLike[str], *, registry: Mapping[str, Entry] | None = None) -> tuple[Path, str]:
    """Find a model's file on this machine, downloading it if need be.

    Parameters
    ----------
    name_or_path : str or path
        A registered name (see `list_models`), or the path of a safetensors file. A string is a path if it has a
        folder or the suffix of a model file, or if no model has that name and there is such a file.
    registry : mapping of str to Entry, optional
        Models by name. By default those that come with xgenda.

    Returns
    -------
    path : Path
        A file that exists; for a registered model its size and SHA-256 were verified.
    sha256 : str
        Its SHA-256.

    Raises
    ------
    ModelNotFoundError
        No model has that name, there is no such file, or it cannot be downloaded.
    ChecksumError
        The file is not the registered one.
    CheckpointError
        The file is pickled, or the registry is faulty.
    """
    given: object = name_or_path
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise OptionError(f"model={name_or_path!r} is not accepted; pass a registered name or a path.")
    entries = _registry() if registry is None else registry
    text, path = os.fspath(name_or_path), Path(name_or_path).expanduser()
    is_path = not isinstance(name_or_path, str) or "/" in text or os.sep in text
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"model={text!r} is a pickled checkpoint, which is never loaded: opening one can run code. "
            "Convert it to safetensors where you trust it, and pass that file."
        )
    if path.suffix.lower() == ".mdlus":
        raise CheckpointError(
            f"model={text!r} is one network of a CorrDiff model, without its variables and grids. Join them: "
            f"xgenda.models.corrdiff.read_corrdiff(regression, diffusion, inputs=coarse, target=fine, statistics=...)"
        )
    if not is_path and text in entries:
        entry = entries[text]
        return (_bundled(entry) if entry.file is not None else _fetched(entry)), entry.sha256
    if path.is_file():
        return path.absolute(), sha256_of(path)
    if is_path or path.suffix == ".safetensors":
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ModelNotFoundError(f"model={text!r}: {path.absolute()} {kind}. Pass the path of a .safetensors file.")
    known = ", ".join(map(repr, entries)) or "none"
    raise ModelNotFoundError(
        f"No model is named {text!r}.{did_you_mean(text, entries)} Registered models: {known}. "
        "The path of a .safetensors file is accepted too, for example model='./model.safetensors'."
    )


_registry = registry  # the functions above have a keyword of the same name


def _bundled(entry: Entry) -> Path:
    path, again = path_of(entry), "Install the package again: pip install --force-reinstall xgenda"
    if not path.is_file():
        raise ModelNotFoundError(f"{path}, the file of the model {entry.name!r}, is missing. {again}")
    found = sha256_of(path)
    if found != entry.sha256:
        raise ChecksumError(
            f"{path}, the file of the model {entry.name!r}, is not the registered one: "
            f"expected sha256 {entry.sha256}, found {found}. {again}"
        )
    return path


def _fetched(entry: Entry) -> Path:
    """Return the verified file in the cache, downloading it where it is missing or not the registered one."""
    import pooch

    path, url = path_of(entry), str(entry.url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelNotFoundError(
            f"The cache {path.parent} cannot be used: {error}. Set the environment variable XGENDA_CACHE to a folder "
            "that can be written."
        ) from error

    def failure(kind: type[ModelNotFoundError] | type[ChecksumError], problem: str) -> Exception:
        note = ""
        if path.is_file() and (found := sha256_of(path)) != entry.sha256:
            path.unlink(missing_ok=True)
            note = f" (The file in the cache had sha256 {found} and was removed.)"
        return kind(
            f"Model {entry.name!r}: {problem}.{note} Try again with xgenda.load_model({entry.name!r}), or download "
            f"{url} on another machine and copy it, under the name {path.name}, to {path.parent}"
        )

    cache = pooch.create(path=path.parent, base_url="", registry={path.name: f"sha256:{entry.sha256}"}, urls={path.name: url})
    cache.retry_if_failed = _RETRIES
    try:
        cache.fetch(path.name, downloader=_Download(entry))
    except _RefusedError as error:
        raise failure(ModelNotFoundError if error.absent else ChecksumError, str(error)) from error.__cause__
    except OSError as error:  # requests' errors are OSErrors, and some of them ValueErrors too
        raise failure(ModelNotFoundError, f"{url} could not be downloaded: {error}") from error
    except ValueError as error:
        raise failure(ChecksumError, str(error)) from error
    return path


class _RefusedError(Exception):
    """What came is not what was asked for, and asking again would not change that."""

    def __init__(self, message: str, *, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


class _Download:
    """A downloader for pooch that stops at the registered size and says what it got instead of the file."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def __call__(self, url: str, output_file: str, pooch: object) -> None:
        entry = self.entry
        with open(output_file, "wb") as file:
            bounded = _Bounded(file, entry.size)
            if url.startswith("hf://"):
                _from_hub(url, bounded, Path(output_file).parent)
            else:
                _from_web(url, bounded)
        if bounded.size < entry.size:
            raise ValueError(f"the file is incomplete: expected {entry.size} bytes, found {bounded.size}")
        if bounded.hash.hexdigest() != entry.sha256:
            raise _RefusedError(
                f"the file from {url} is not the registered one and was removed: expected sha256 {entry.sha256}, "
                f"found {bounded.hash.hexdigest()}"
            )


class _Bounded:
    """A file that counts and hashes what is written, and refuses a web page or more than the registered size."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self.file, self.limit, self.size, self.hash = file, limit, 0, hashlib.sha256()

    def write(self, chunk: bytes) -> int:
        if not self.size and chunk[:512].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            raise _RefusedError("the server sent a web page instead of the file (a login or error page?)")
        self.size += len(chunk)
        if self.size > self.limit:
            raise _RefusedError(f"the file is larger than the registered {self.limit} bytes and was not kept")
        self.hash.update(chunk)
        return self.file.write(chunk)


def _from_web(url: str, output: _Bounded) -> None:
    import requests

    with requests.get(url, stream=True, timeout=30) as response:
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise _RefusedError(f"{url} answered {response.status_code} {response.reason}", absent=True)
        response.raise_for_status()  # a server in trouble is asked again
        for chunk in response.iter_content(2**20):
            output.write(chunk)


def _from_hub(url: str, output: _Bounded, folder: Path) -> None:
    """Copy a file from the Hugging Face hub, pinned to a commit, by way of a temporary folder in the cache."""
    from huggingface_hub import hf_hub_download

    match = HUB_URL.fullmatch(url)
    if match is None:
        raise _RefusedError(f"{url} is not hf://organisation/repository@<40 digit commit>/path", absent=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            local = hf_hub_download(match["repo"], match["path"], revision=match["commit"], local_dir=temporary)
        except Exception as error:  # the hub's errors have no common base across its versions
            raise _RefusedError(f"{url} could not be downloaded: {error}", absent=True) from error
        with open(local, "rb") as file:
            shutil.copyfileobj(file, output, 2**20)

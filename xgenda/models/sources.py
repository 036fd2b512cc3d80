"""How a file comes from elsewhere: https, the Hugging Face hub, and object stores.

Downloads go through pooch, whatever the transport: to a temporary name, several times where a server is in trouble, and to
their own name by an atomic move once they are complete and verified. Messages never show a token, a password or the query of a
signed address.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from xgenda.errors import MissingDependencyError
from xgenda.formatting import bar_class
from xgenda.models.entries import HUB_URL, is_allowed

RETRIES = 3  # after 1, 2 and 3 seconds
CHUNK = 2**20
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
PACKAGES |= {"oss": "ossfs", "sftp": "paramiko", "ssh": "paramiko", "hdfs": "pyarrow", "smb": "smbprotocol"}


class RefusedError(Exception):
    """What came is not what was asked for, and asking again would not change that."""

    def __init__(self, message: str, *, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


class TransientError(ValueError):
    """The other side is in trouble, or cannot be reached; `answered` tells which. Pooch asks again."""

    def __init__(self, message: str, *, answered: bool = False) -> None:
        super().__init__(message)
        self.answered = answered


def download(url: str, target: Path, *, label: str, size: int | None = None, sha256: str | None = None) -> str:
    """Copy a file from elsewhere to `target`, which is there when it is whole and verified, and not before.

    Parameters
    ----------
    url : str
        ``https://``, ``hf://organisation/repository@commit/path``, or of an object store.
    target : Path
        Where to; the folder must exist.
    label : str
        The name that the progress bar shows.
    size : int, optional
        Bytes to expect; more are not read.
    sha256 : str, optional
        What the file must be.

    Returns
    -------
    str
        The SHA-256 of the file.

    Raises
    ------
    RefusedError
        The file is absent or another one, or access is not granted.
    TransientError, OSError
        The other side could not be reached, or broke off.
    ValueError
        The file is incomplete.
    MissingDependencyError
        The package for this kind of store is not installed.
    """
    import pooch

    found: list[str] = []

    def copy(url: str, output_file: str, _: object) -> None:
        os.unlink(output_file)  # made by pooch for its owner alone; a cache may be shared
        with open(output_file, "xb") as file, _bar(label, size) as advance:
            bounded = _Bounded(file, size, advance)
            _transport(url)(url, bounded, Path(output_file).parent)
        if size is not None and bounded.size < size:
            raise ValueError(f"the file is incomplete: expected {size} bytes, found {bounded.size}")
        digest = bounded.hash.hexdigest()
        if sha256 is not None and digest != sha256:
            whose = "the registered one" if size is not None else "the one asked for"
            raise RefusedError(
                f"the file from {shown(url)} is not {whose} and was removed: expected sha256 {sha256}, found {digest}"
            )
        found.append(digest)

    known = f"sha256:{sha256}" if sha256 is not None else None
    cache = pooch.create(path=target.parent, base_url="", registry={target.name: known}, urls={target.name: url})
    cache.retry_if_failed = RETRIES
    with _quiet(pooch.get_logger()):
        cache.fetch(target.name, downloader=copy)
    return found[-1] if found else str(sha256)


def identity(url: str) -> str:
    """Return what tells one version of a remote file from the next: its ETag, or its size and date, as 8 hexadecimal digits.

    Raises
    ------
    RefusedError
        There is no such file.
    TransientError
        The other side cannot be reached.
    """
    if url.startswith("hf://"):
        return hashlib.sha256(url.encode()).hexdigest()[:8]  # pinned to a commit
    if url.startswith(("https://", "http://")):
        given = _validators(url)
    else:
        with _store_errors(url):
            file_system, path = _opened(url)
            given = [str(file_system.ukey(path))]
    return hashlib.sha256("\n".join(given).encode()).hexdigest()[:8]


def _validators(url: str) -> list[str]:
    for wait in range(1, RETRIES + 2):
        try:
            with _get(url) as response:
                return [response.headers.get(n, "") for n in ("ETag", "Last-Modified", "Content-Length")]
        except TransientError as error:
            if not error.answered or wait > RETRIES:
                raise
            time.sleep(wait)
    return []


def shown(url: str) -> str:
    """Return a URL as messages show it: without query, where signatures and keys are, and without a password."""
    return re.sub(r"(://)[^/@]*@(?=[^/]*/)", r"\1", url.split("?", maxsplit=1)[0]) if not url.startswith("hf://") else url


def without_secrets(text: object, url: str = "") -> str:
    """Return a text in which no token and no query of `url` is left, whoever put it there."""
    out = str(text)
    if (query := urlsplit(url).query if url and not url.startswith("hf://") else "") and len(query) > 3:
        out = out.replace(query, "...")
    for secret in _tokens():
        out = out.replace(secret, "<token>")
    return re.sub(r"hf_[A-Za-z0-9]{8,}|(?<=Bearer )[^\s'\"]+", "<token>", out)


def _tokens() -> set[str]:
    found = {os.environ.get(k, "") for k in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    if "huggingface_hub" in sys.modules:
        with contextlib.suppress(Exception):
            found.add(sys.modules["huggingface_hub"].get_token() or "")
    return {secret.strip() for secret in found if len(secret.strip()) > 3}


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Keep pooch from writing addresses to standard error."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _bar(label: str, size: int | None) -> Iterator[Callable[[int], Any]]:
    """Show a bar in notebooks and terminals, and nothing elsewhere."""
    with bar_class()(total=size, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False) as bar:
        yield bar.update


class _Bounded:
    """A file that counts and hashes what is written, and refuses a web page or more than the expected size."""

    def __init__(self, file: IO[bytes], limit: int | None, advance: Callable[[int], Any]) -> None:
        self.file, self.limit, self.advance, self.size, self.hash = file, limit, advance, 0, hashlib.sha256()

    def write(self, chunk: bytes) -> int:
        if not self.size and chunk[:512].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            raise RefusedError("the server sent a web page instead of the file (a login or error page?)")
        if not self.size and self.limit is None and chunk[8:9] != b"{":
            raise RefusedError("the file is no safetensors file")
        self.size += len(chunk)
        if self.limit is not None and self.size > self.limit:
            raise RefusedError(f"the file is larger than the registered {self.limit} bytes and was not kept")
        self.hash.update(chunk)
        self.advance(len(chunk))
        return self.file.write(chunk)


def _transport(url: str) -> Callable[[str, _Bounded, Path], None]:
    if url.startswith("hf://"):
        return _from_hub
    return _from_web if url.startswith(("https://", "http://")) else _from_store


@contextlib.contextmanager
def _get(url: str) -> Iterator[Any]:
    """Yield the response to a request, with errors that show no query."""
    import requests

    try:
        with requests.get(url, stream=True, timeout=30) as response:
            status = f"{shown(url)} answered {response.status_code} {response.reason}"
            if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
                raise RefusedError(without_secrets(status, url), absent=True)
            for step in (*response.history[1:], response):  # who answers one that is not encrypted, chooses where the next leads
                if not is_allowed(step.url):
                    raise RefusedError(f"{shown(url)} leads to {shown(step.url)}, which is not encrypted")
            if response.status_code != 200:
                raise TransientError(without_secrets(status, url), answered=True)
            yield response
    except requests.exceptions.RequestException as error:
        raise TransientError(f"{urlsplit(url).hostname} does not answer: {without_secrets(_cause(error), url)}") from None


def _cause(error: BaseException) -> str:
    """Return what an error comes down to, in one line: that of the system at the bottom, without what libraries wrapped around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())


def _from_web(url: str, output: _Bounded, folder: Path) -> None:
    with _get(url) as response:
        for chunk in response.iter_content(CHUNK):
            output.write(chunk)


def _opened(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    import fsspec

    scheme = url.split("://")[0]
    try:
        file_system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(scheme, "")
        remedy = f"Install it with: pip install {package}" if package else str(error)
        raise MissingDependencyError(
            f"Files at {scheme}:// need the package {package or 'for it'!r}, which is not installed. {remedy}"
        ) from None
    return file_system, str(path)


@contextlib.contextmanager
def _store_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (RefusedError, MissingDependencyError):
        raise
    except FileNotFoundError:
        raise RefusedError(f"{shown(url)} does not exist", absent=True) from None
    except (OSError, TimeoutError) as error:
        if isinstance(error, PermissionError):
            hint = "Check the credentials of the object store"
            raise RefusedError(f"{shown(url)} may not be read: {without_secrets(error, url)}. {hint}", absent=True) from None
        raise TransientError(f"{shown(url)}: {without_secrets(error, url)}") from None
    except Exception as error:  # of the client of the store: no credentials, no such bucket
        text = without_secrets(f"{type(error).__name__}: {error}", url)
        raise RefusedError(f"{shown(url)} could not be read: {text}", absent=True) from None


def _from_store(url: str, output: _Bounded, folder: Path) -> None:
    """Copy a file from a store that fsspec knows."""
    with _store_errors(url):
        file_system, path = _opened(url)
        with file_system.open(path, "rb") as stored:
            shutil.copyfileobj(stored, output, CHUNK)


def hub_endpoint() -> str:
    """Return the address of the hub: ``HF_ENDPOINT``, else that of Hugging Face."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    """Tell whether ``HF_HUB_OFFLINE`` forbids to ask the hub."""
    return any(os.environ.get(k, "").upper() in ("1", "ON", "YES", "TRUE") for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _from_hub(url: str, output: _Bounded, folder: Path) -> None:
    """Copy a file of a commit of the hub: out of the hub's own cache, or by way of a temporary folder."""
    match = HUB_URL.fullmatch(url)
    if match is None:
        raise RefusedError(f"{url} is not hf://organisation/repository@<40 digit commit>/path", absent=True)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo, path, commit = match["repo"], match["path"], match["commit"]
    cached = try_to_load_from_cache(repo, path, revision=commit)
    if isinstance(cached, str):
        _copied(Path(cached), output)
        return
    if is_offline():
        raise RefusedError(f"{url} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it", absent=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".hub-") as temporary:
        try:
            local = hf_hub_download(repo, path, revision=commit, local_dir=temporary, endpoint=hub_endpoint())
        except Exception as error:  # the hub's errors have no common base across its versions
            problem = hub_error(error, repo, url)
            if isinstance(problem, TransientError) and time.monotonic() - began > 2:  # newer clients have asked several times
                problem = RefusedError(str(problem), absent=True)
            raise problem from None  # the original may show what the server repeated of the request
        _copied(Path(local), output)


def _copied(path: Path, output: _Bounded) -> None:
    with path.open("rb") as file:
        shutil.copyfileobj(file, output, CHUNK)


def hub_error(error: Exception, repo: str, url: str, token: str | None = None) -> RefusedError | TransientError:
    """Return what went wrong on the hub, with the line to type, and without anything that the server should not have said."""
    chain = [e for e in (error, error.__cause__) if e is not None]  # the first may only say that the file is not cached
    kinds = {kind.__name__ for e in chain for kind in type(e).__mro__}
    status = next((s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None)) is not None), None)
    said = without_secrets(" ".join(" ".join(map(str, chain)).split()).replace(token or "\0", "<token>"))
    login = "log in: hf auth login (or set the environment variable HF_TOKEN)"
    if "GatedRepoError" in kinds:
        page = f"{hub_endpoint()}/{repo}"
        return RefusedError(f"{repo} is gated: ask for access at {page}, then {login}", absent=True)
    if "RepositoryNotFoundError" in kinds or status in (401, 403):
        return RefusedError(
            f"{repo} does not exist on {hub_endpoint()}, is private, or your token does not reach it: check the name, or {login}",
            absent=True,
        )
    if "RevisionNotFoundError" in kinds:
        return RefusedError(f"{repo} has no such commit: {url} (see {hub_endpoint()}/{repo}/commits/main)", absent=True)
    if "RemoteEntryNotFoundError" in kinds or ("EntryNotFoundError" in kinds and status == 404):
        return RefusedError(f"{repo} has no such file: {url} (see {hub_endpoint()}/{repo}/tree/main)", absent=True)
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return RefusedError(f"{url} answered {status}: {said}", absent=True)
    if kinds & {"HFValidationError", "FileMetadataError"}:  # a malformed name; or no hub answered
        return RefusedError(f"{url}: {said}", absent=True)
    return TransientError(
        f"{hub_endpoint()} cannot be reached: {without_secrets(_cause(error))}"
        if status is None
        else f"{hub_endpoint()} is in trouble: {said}"
    )

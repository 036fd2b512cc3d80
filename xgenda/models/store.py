"""Where model files come from: registered names, the cache, files on disk, and addresses.

A registered model is handed over only after its size and SHA-256 were compared with the registered ones. Nothing is downloaded,
and no folder is made, before a file is asked for. Downloads go into one cache, which the environment variable ``XGENDA_CACHE``
moves; a file gets its name there by an atomic move once it is complete, so that several processes may ask for it at once. A copy
of that folder serves a machine without network.

Only safetensors are read: a pickled checkpoint (``.pt``, ``.ckpt``, ...) can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from xgenda.errors import CheckpointError, ChecksumError, ModelNotFoundError, OptionError, did_you_mean
from xgenda.formatting import user_level
from xgenda.metadata import package_version
from xgenda.models import sources
from xgenda.models.entries import PICKLES, STORES, Entry, File, is_allowed
from xgenda.models.registries import registry

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Entry", "File", "cache_dir", "fetch", "find_file", "list_models", "path_of", "registry", "sha256_of", "state_of",
]  # fmt: skip

#: Networks of which a training has a file each while it lasts.
PARTS = ("prior", "mean", "residual", "autoencoder", "codes", "conversion")

State = Literal["bundled", "cached", "remote", "damaged", "missing"]


def cache_dir() -> Path:
    """Return the folder of downloaded models: ``$XGENDA_CACHE``, else the user's cache; it may not exist yet."""
    import pooch

    return Path(os.environ.get("XGENDA_CACHE") or pooch.os_cache("xgenda")).expanduser().absolute()


def path_of(entry: Entry, file: File | None = None) -> Path:
    """Return where a file of a registered model is on this machine, or will be once it is downloaded; by default the model."""
    wanted = entry.files[0] if file is None else file
    if wanted.file is not None:
        return entry.root / wanted.file
    suffix = ".safetensors" if wanted == entry.files[0] else f"-{wanted.label}"
    return cache_dir() / f"{entry.name}-{wanted.sha256[:8]}{suffix}"  # a new version gets a new name


def state_of(entry: Entry, file: File | None = None, *, verify: bool = False) -> State:
    """Tell where a file of a model is: beside its registry ("bundled"), in the cache, elsewhere, or not as it should be.

    Parameters
    ----------
    entry, file
        The model, and which of its files; by default the model itself.
    verify
        Whether its SHA-256 is compared; by default only its size is.
    """
    wanted, path = entry.files[0] if file is None else file, path_of(entry, file)
    if not path.is_file():
        return "remote" if wanted.url is not None else "missing"
    if path.stat().st_size != wanted.size or (verify and sha256_of(path) != wanted.sha256):
        return "damaged"
    return "cached" if wanted.url is not None else "bundled"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_models(*, registry: Mapping[str, Entry] | None = None) -> pd.DataFrame:
    """List the registered models: task, variables, grid, region, size in bytes, licence, and where each file is.

    Parameters
    ----------
    registry : mapping of str to Entry, optional
        Models by name. By default those that come with xgenda, those of ``XGENDA_REGISTRY``, and those of installed packages.

    Returns
    -------
    pandas.DataFrame
        One row per model, indexed by ``name``. ``where`` is "bundled", "cached", "remote", "damaged" or "missing".
    """
    import pandas as pd

    columns = ["task", "variables", "grid", "region", "size", "licence", "where"]
    entries = list((_registry() if registry is None else registry).values())
    rows = [[e.task, ", ".join(e.variables), e.grid, e.region, e.size, e.licence, state_of(e)] for e in entries]
    return pd.DataFrame(rows, columns=columns, index=pd.Index([e.name for e in entries], name="name", dtype=object))


def find_file(
    name_or_path: str | os.PathLike[str], *, sha256: str | None = None, registry: Mapping[str, Entry] | None = None
) -> tuple[Path, str]:
    """Find a model's file on this machine, downloading it if need be.

    Parameters
    ----------
    name_or_path : str or path
        A registered name (see `list_models`); an address, ``hf://organisation/repository@commit/file``, ``https://...`` or of an
        object store, ``s3://...``; or the path of a safetensors file, or of a folder that holds one. A string is a path if it has
        a folder or the suffix of a model file, or if no model has that name and there is such a file.
    sha256 : str, optional
        What the file must be, for one that is not registered.
    registry : mapping of str to Entry, optional
        Models by name. By default all that are known.

    Returns
    -------
    path : Path
        A file that exists; for a registered model its size and SHA-256 were verified.
    sha256 : str
        Its SHA-256.

    Raises
    ------
    ModelNotFoundError
        No model has that name, there is no such file, it cannot be downloaded, or it is for another version of xgenda.
    ChecksumError
        The file is not the registered one, or not the one that was asked for.
    CheckpointError
        The file is pickled, or the registry is faulty.
    """
    given: object = name_or_path
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise OptionError(f"model={name_or_path!r} is not accepted; pass a registered name or a path.")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", str(sha256).lower()):
        raise OptionError(f"sha256={sha256!r} is not accepted; it must be 64 hexadecimal digits.")
    wanted = None if sha256 is None else sha256.lower()
    text = os.fspath(name_or_path)
    path, url = Path(text).expanduser(), text if isinstance(name_or_path, str) and "://" in text else None
    _check_suffix(text if url is None else sources.shown(url))
    if url is not None and url.startswith("file://"):
        path = Path(re.sub(r"^file://(localhost)?", "", url))  # has a "/" and is a path below too
    elif url is not None:
        return _unregistered(url, wanted)
    is_path = not isinstance(name_or_path, str) or "/" in text or os.sep in text
    entries: Mapping[str, Entry] = {}
    if not is_path:
        entries = _registry() if registry is None else registry
        if text in entries:
            entry = entries[text]
            if wanted not in (None, entry.sha256):
                raise ChecksumError(
                    f"sha256={sha256!r} is not that of the model {text!r}, which is registered with {entry.sha256}."
                )
            return fetch(entry), entry.sha256
    if path.is_dir():
        path = _only_file(text, path)
    if path.is_file():
        found = sha256_of(path)
        if wanted not in (None, found):
            raise ChecksumError(f"model={text!r}: {path.absolute()} has sha256 {found}, expected {wanted}.")
        return path.absolute(), found
    if is_path or path.suffix == ".safetensors":
        close = did_you_mean(path.stem, entries)
        raise ModelNotFoundError(
            f"model={text!r}: {path.absolute()} does not exist.{close} Pass the path of a .safetensors file, or a registered name."
        )
    known = ", ".join(map(repr, entries)) or "none"
    raise ModelNotFoundError(
        f"No model is named {text!r}.{did_you_mean(text, entries)} Registered models: {known}. "
        "The path of a .safetensors file is accepted too, for example model='./model.safetensors'."
    )


_registry = registry  # the functions above have a keyword of the same name


def _check_suffix(text: str) -> None:
    suffix = PurePosixPath(text).suffix.lower()
    if suffix in PICKLES:
        raise CheckpointError(
            f"model={text!r} is a pickled checkpoint, which is never loaded: opening one can run code. "
            "Convert it to safetensors where you trust it, and pass that file."
        )
    if suffix == ".mdlus":
        raise CheckpointError(
            f"model={text!r} is one network of a CorrDiff model, without its variables and grids. Join them: "
            f"xgenda.models.corrdiff.read_corrdiff(regression, diffusion, inputs=coarse, target=fine, statistics=...)"
        )


def _only_file(text: str, folder: Path) -> Path:
    """Return the one model file that a folder holds."""
    found = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("."))
    if len(found) == 1 or (found and {p.stem for p in found} <= set(PARTS)):
        return found[0]  # of several parts of a training that was interrupted; reading one says so
    names = ", ".join(p.name for p in found[:5]) + (", ..." if len(found) > 5 else "")
    raise ModelNotFoundError(
        f"model={text!r} is a folder, not a file, and it holds {f'{len(found)} model files: {names}' if found else 'no model file'}. "
        f"Pass the path of a .safetensors file{f': model={str(found[0])!r}' if found else '.'}"
    )


def fetch(entry: Entry, file: File | None = None) -> Path:
    """Return the verified file of a registered model, downloading it where it is missing or not the registered one.

    Parameters
    ----------
    entry, file
        The model, and which of its files; by default the model itself.
    """
    wanted, path = entry.files[0] if file is None else file, path_of(entry, file)
    what = f"Model {entry.name!r}" if file is None else f"Model {entry.name!r}, file {wanted.label!r}"
    _check_version(entry)
    if wanted.url is None:
        return _beside_registry(entry, wanted, path)
    _make_cache(path.parent)
    url = wanted.url

    def failure(kind: type[ModelNotFoundError] | type[ChecksumError], problem: object) -> Exception:
        note = ""
        if path.is_file() and (found := sha256_of(path)) != wanted.sha256:
            path.unlink(missing_ok=True)
            note = f" (The file in the cache had sha256 {found} and was removed.)"
        return kind(
            f"{what}: {sources.without_secrets(problem)}.{note} Try again with xgenda.load_model({entry.name!r}), or download "
            f"{url} on another machine and copy it, under the name {path.name}, to {path.parent}"
        )

    try:
        sources.download(url, path, label=entry.name, size=wanted.size, sha256=wanted.sha256)
    except sources.RefusedError as error:
        raise failure(ModelNotFoundError if error.absent else ChecksumError, error) from None
    except (sources.TransientError, OSError) as error:
        raise failure(ModelNotFoundError, f"{url} could not be downloaded: {error}") from None
    except ValueError as error:
        raise failure(ChecksumError, error) from None
    _check_size(entry, wanted, path)
    return path


def _beside_registry(entry: Entry, file: File, path: Path) -> Path:
    again = (
        "Install the package again: pip install --force-reinstall xgenda"
        if entry.root != entry.registry.parent
        else f"Put it there again, or correct {entry.registry}"
    )
    if not path.is_file():
        raise ModelNotFoundError(f"{path}, the file of the model {entry.name!r}, is missing. {again}")
    found = sha256_of(path)
    if found != file.sha256:
        raise ChecksumError(
            f"{path}, the file of the model {entry.name!r}, is not the registered one: "
            f"expected sha256 {file.sha256}, found {found}. {again}"
        )
    _check_size(entry, file, path)
    return path


def _check_size(entry: Entry, file: File, path: Path) -> None:
    """Refuse an entry whose size is not that of its file."""
    if (found := path.stat().st_size) != file.size:
        raise ChecksumError(
            f"Model {entry.name!r}: {path} has {found} bytes and the registered sha256, and {file.size} bytes are registered. "
            f"Correct the entry: size = {found} in {entry.registry}"
        )


def _check_version(entry: Entry) -> None:
    """Refuse a model that is for another version of xgenda."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        own = Version(package_version())
    except InvalidVersion:
        return
    if entry.xgenda and not SpecifierSet(entry.xgenda).contains(own, prereleases=True):
        raise ModelNotFoundError(
            f"Model {entry.name!r} is for xgenda {entry.xgenda}, and this is {own}. Type: pip install 'xgenda{entry.xgenda}'"
        )


def _make_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelNotFoundError(
            f"The cache {folder} cannot be used: {error}. Set the environment variable XGENDA_CACHE to a folder "
            "that can be written."
        ) from error


def _unregistered(url: str, sha256: str | None) -> tuple[Path, str]:
    """Return the file at an address that no registry has, from the cache if this version of it is there.

    The name in the cache has hashes of the address, of the version there, and of the content.
    """
    shown = sources.shown(url)
    _check_url(url)
    folder, stem = cache_dir(), re.sub(r"[^\w.-]", "_", PurePosixPath(shown).name.removesuffix(".safetensors")) or "model"
    if sha256 is not None and (found := _cached(folder, f"*-{sha256[:16]}.safetensors", sha256)):
        return found, sha256
    address = hashlib.sha256(url.encode()).hexdigest()[:8]
    again = f"Try again with xgenda.load_model({shown!r}), or give the path of a copy of the file"
    try:
        version = sources.identity(url)
    except sources.RefusedError as error:
        raise ModelNotFoundError(f"model={shown!r}: {error}. {again}") from None
    except (sources.TransientError, OSError) as error:
        if found := _cached(folder, f"*-{address}-*.safetensors", sha256):
            warnings.warn(f"{shown} cannot be asked for changes; the copy {found} is taken.", stacklevel=user_level())
            return found, sha256_of(found)
        raise ModelNotFoundError(f"model={shown!r} cannot be reached: {sources.without_secrets(error, url)}. {again}") from None
    if found := _cached(folder, f"*-{address}-{version}-*.safetensors", sha256):
        return found, sha256_of(found)
    _make_cache(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
        partial = Path(temporary) / "model.safetensors"
        try:
            digest = sources.download(url, partial, label=stem, sha256=sha256)
        except sources.RefusedError as error:
            kind = ModelNotFoundError if error.absent else ChecksumError
            raise kind(f"model={shown!r}: {sources.without_secrets(error, url)}. {again}") from None
        except (OSError, ValueError) as error:
            problem = sources.without_secrets(error, url)
            raise ModelNotFoundError(f"model={shown!r} could not be downloaded: {problem}. {again}") from None
        path = folder / f"{stem}-{address}-{version}-{digest[:16]}.safetensors"
        os.replace(partial, path)
    if sha256 is None and not url.startswith("hf://"):
        warnings.warn(
            f"Nothing vouches for {shown}, which has sha256 {digest}. To have it checked: "
            f"xgenda.load_model({shown!r}, sha256={digest!r})",
            stacklevel=user_level(),
        )
    return path, digest


def _cached(folder: Path, pattern: str, sha256: str | None) -> Path | None:
    """Return the newest file of that name whose content is what its name says, and what is asked for."""
    for path in sorted(folder.glob(pattern), key=lambda p: p.stat().st_mtime, reverse=True) if folder.is_dir() else ():
        digest = sha256_of(path)
        if digest[:16] == path.stem.rpartition("-")[2] and sha256 in (None, digest):
            return path
    return None


def _check_url(url: str) -> None:
    if is_allowed(url):
        return
    if re.fullmatch(r"hf://[\w.-]+/[\w.-]+@[0-9a-f]{40}/?", url):
        raise OptionError(f"model={url!r} lacks the name of the file. Type: model={url.rstrip('/') + '/model.safetensors'!r}")
    if url.startswith("hf://"):
        repo = "/".join(re.split("[/@]", url.removeprefix("hf://"))[:2])
        file = url.rpartition("/")[2] if url.count("/") > 3 else "model.safetensors"
        raise OptionError(
            f"model={url!r} is not pinned to a commit, so it may change at any time. Type: "
            f"xgenda.load_model('hf://{repo}@<commit>/{file}') with the 40 digits that "
            f"huggingface_hub.HfApi().model_info({repo!r}).sha gives."
        )
    scheme = url.split("://")[0]
    raise OptionError(
        f"model={sources.shown(url)!r} is not accepted; use https://..., hf://organisation/repository@<40 digit commit>/file, or an object "
        f"store ({scheme}:// is not one of {', '.join(s + '://' for s in STORES if s != 'file')})."
    )

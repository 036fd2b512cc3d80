"""The format of ``weights.toml``: the models that a registry lists, read strictly.

A slip in the file is found by whoever makes it: a key that is unknown, missing or of the wrong type is an error that names
the file, line, model and key. Schema 2 lists the files of a model in tables of their own; schema 1, which had one file beside
the description, is still read.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from xgenda.errors import CheckpointError, did_you_mean

SCHEMA = 2
TASKS = ("prior", "downscale", "background", "forecast")
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".joblib")
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "sftp", "ssh", "hdfs", "webhdfs", "smb", "memory", "file")

PACKAGE = Path(__file__).resolve().parents[1]
_PLACE: dict[str, type] = {"file": str, "url": str, "sha256": str, "size": int}
_COMMON: dict[str, type] = {"task": str, "description": str, "licence": str, "variables": list, "region": str}
_FILE = _PLACE | {"name": str}
_MODEL: dict[int, dict[str, type]] = {
    1: _PLACE | _COMMON,
    2: _COMMON | {"grid": str, "files": list, "doi": str, "citation": str, "xgenda": str, "alternative_to": str},
}
_OPTIONAL = ("file", "url", "name", "doi", "citation", "xgenda", "alternative_to")
HUB_URL = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})/(?P<path>[^?#\\]+)")


@dataclass(frozen=True)
class File:
    """One file of a model: below the folder of its registry (`file`) or elsewhere (`url`), and what it must be."""

    sha256: str
    size: int
    file: str | None = None
    url: str | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        """What the file is called: its own name, or the last part of where it is."""
        return self.name or PurePosixPath(re.split("[?#]", self.file or self.url or "")[0]).name


@dataclass(frozen=True)
class Entry:
    """One registered model: what it is, and where its files are; the first is the model.

    `registry` is the file that lists it, `root` the folder below which its own files are. `alternative_to` names the model that is taken
    where a call names none and both would fit; this one is then only taken by its name.
    """

    name: str
    task: str
    description: str
    licence: str
    variables: tuple[str, ...]
    region: str
    files: tuple[File, ...]
    registry: Path
    root: Path
    grid: str = "not stated"
    doi: str = ""
    citation: str = ""
    xgenda: str = ""
    alternative_to: str = ""

    @property
    def file(self) -> str | None:
        """Where the model is below `root`."""
        return self.files[0].file

    @property
    def url(self) -> str | None:
        """Where the model is elsewhere."""
        return self.files[0].url

    @property
    def sha256(self) -> str:
        """SHA-256 of the model."""
        return self.files[0].sha256

    @property
    def size(self) -> int:
        """Bytes of the model."""
        return self.files[0].size


class _FaultError(Exception):
    """What is wrong with a table: the key, and the number of the file where it is in one."""

    def __init__(self, text: str, key: str | None = None, file: int | None = None) -> None:
        super().__init__(text)
        self.key, self.file = key, file


def read_registry(path: Path, root: Path | None = None) -> dict[str, Entry]:
    """Read one registry file.

    Parameters
    ----------
    path : Path
        A file in the format of ``weights.toml``.
    root : Path, optional
        The folder that ``file`` is below; by default that of `path`.

    Returns
    -------
    dict of str to Entry
        The models by name, in the order of the file.

    Raises
    ------
    CheckpointError
        The file is not as it should be; the message names the file, line, model and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(f"The model registry {path} cannot be read: {error}.") from error

    def refuse(problem: object, model: str | None = None, key: str | None = None, file: int | None = None) -> CheckpointError:
        line = _line_of(text, model, key, file)
        place = f"{path}, line {line}" if line else f"{path}"
        within = f"[models.{model}]: " if model else ""
        return CheckpointError(f"{place}: {within}{'' if file is None else f'file {file + 1}: '}{problem}")

    for key in table:
        if key not in ("schema", "models"):
            raise refuse(f"unknown key {key!r}; known are 'schema' and 'models'.", key=key)
    schema = table.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        newer = " Update xgenda: pip install --upgrade xgenda" if type(schema) is int and schema > SCHEMA else ""
        raise refuse(f"schema = {schema!r}, but this version reads schema = 1 and schema = {SCHEMA}.{newer}", key="schema")
    models = table.get("models", {})
    if not isinstance(models, dict):
        raise refuse("'models' must be a table of tables, [models.<name>].", key="models")
    entries = {}
    for name, fields in models.items():
        if not isinstance(fields, dict):
            raise refuse(f"must be a table [models.{name}], found {fields!r}.", name)
        try:
            entries[name] = _entry(name, fields, schema, path, path.parent if root is None else root)
        except _FaultError as fault:
            raise refuse(fault, name, fault.key, fault.file) from None
    return entries


def _entry(name: str, fields: dict[str, Any], schema: int, path: Path, root: Path) -> Entry:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise _FaultError(f"the name {name!r} must be lower-case letters, digits and hyphens.")
    _check_keys(fields, _MODEL[schema])
    if not all(type(v) is str and v for v in fields["variables"]):
        raise _FaultError(
            f"'variables' must not be empty or hold anything but names, found {fields['variables']!r}.", "variables"
        )
    if fields["task"] not in TASKS:
        accepted = " or ".join(map(repr, TASKS))
        raise _FaultError(f"'task' must be {accepted}, found {fields['task']!r}.", "task")
    if "doi" in fields and not re.fullmatch(r"10\.\d{4,9}/\S+", fields["doi"]):
        raise _FaultError(f"'doi' must be the identifier alone, as in 10.5281/zenodo.123, found {fields['doi']!r}.", "doi")
    if "xgenda" in fields:
        _check_range(fields["xgenda"])
    if schema == 1:
        tables = [{k: fields[k] for k in _PLACE if k in fields}]
        fields = {k: v for k, v in fields.items() if k not in _PLACE}
        _check_file(tables[0], first=True)
    else:
        tables = fields["files"]
        for number, given in enumerate(tables):
            try:
                if not isinstance(given, dict):
                    raise _FaultError(f"must be a table [[models.{name}.files]], found {given!r}.")
                _check_keys(given, _FILE)
                _check_file(given, first=number == 0)
            except _FaultError as fault:
                raise _FaultError(str(fault), fault.key, number) from None
    own = {**fields, "variables": tuple(fields["variables"]), "files": tuple(File(**t) for t in tables)}
    labels = [f.label for f in own["files"]]
    if len(set(labels)) < len(labels):
        raise _FaultError(f"its files have the same name, {labels}; give one a 'name'.", "files")
    return Entry(name=name, registry=path, root=root, **own)


def _check_keys(fields: dict[str, Any], known: dict[str, type]) -> None:
    for key, value in fields.items():
        if key not in known:
            raise _FaultError(f"unknown key {key!r}.{did_you_mean(key, known)} Known keys: {', '.join(known)}.", key)
        if type(value) is not known[key]:
            raise _FaultError(f"{key!r} must be a {known[key].__name__}, found {value!r}.", key)
        if value in ("", []):
            raise _FaultError(f"{key!r} must not be empty or hold anything but names, found {value!r}.", key)
    for key in known:
        if key not in fields and key not in _OPTIONAL:
            raise _FaultError(f"the key {key!r} is missing.")


def _check_file(fields: dict[str, Any], *, first: bool) -> None:
    """Check where a file is, and what it must be; the first one is the model."""
    if ("file" in fields) == ("url" in fields):
        raise _FaultError("exactly one of 'file' (beside the registry) and 'url' must be there.")
    if not re.fullmatch("[0-9a-f]{64}", fields["sha256"]):
        raise _FaultError(f"'sha256' must be 64 lower-case hexadecimal digits, found {fields['sha256']!r}.", "sha256")
    if fields["size"] <= 0:
        raise _FaultError(f"'size' must be the size in bytes, found {fields['size']!r}.", "size")
    key = "file" if "file" in fields else "url"
    place = fields[key]
    suffix = PurePosixPath(re.split("[?#]", place)[0]).suffix.lower()
    if suffix in PICKLES or (key == "file" and first and suffix != ".safetensors"):
        raise _FaultError(f"{key!r} must be a safetensors file, found {place!r}; pickled files can run code.", key)
    if key == "file" and not is_below(place):
        raise _FaultError(f"'file' must be a path below the folder of the registry without '..', found {place!r}.", key)
    if "name" in fields and (not is_below(fields["name"]) or "/" in fields["name"]):
        raise _FaultError(f"'name' must be the name of a file, found {fields['name']!r}.", "name")
    if key == "url" and not is_allowed(place):
        accepted = "https://..., hf://organisation/repository@<40 digit commit>/path, s3://..., or http:// on this machine"
        raise _FaultError(f"'url' = {place!r} is not accepted; use {accepted}.", key)


def _check_range(text: str) -> None:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        raise _FaultError(f"'xgenda' must be a range of versions, as in \">=0.1,<2\", found {text!r}.", "xgenda") from None


def is_below(place: str) -> bool:
    """Tell whether a path stays below the folder that it is relative to."""
    return not (re.search(r"[\\:]", place) or place.startswith("/") or ".." in place.split("/"))


def is_allowed(url: str) -> bool:
    """Tell whether a URL is encrypted, pinned to a commit of the hub, of an object store, or of this very machine."""
    if url.startswith("hf://"):
        match = HUB_URL.fullmatch(url)
        return match is not None and ".." not in match["path"].split("/")
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    if "@" in parts.netloc:
        return False
    if parts.scheme in STORES:
        return len(url) > len(parts.scheme) + 3 and "::" not in url
    if not host:
        return False
    loopback = host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
    return parts.scheme == "https" or (parts.scheme == "http" and loopback)


def _line_of(text: str, model: str | None, key: str | None, file: int | None = None) -> int | None:
    """Find the line of a key, or of its table's header when there is no such line; `file` counts the tables of files."""
    inside, header, count = model is None, None, -1
    for number, line in enumerate(text.splitlines(), start=1):
        if table := re.match(r"\s*\[{1,2}\s*([^\[\]]+?)\s*\]", line):
            name = table[1].replace('"', "").replace("'", "")
            if name == f"models.{model}.files":
                count += 1
            inside = name == (f"models.{model}" if file is None else f"models.{model}.files") and (file is None or count == file)
            header = number if inside or (header is None and name == f"models.{model}") else header
            if model is None and key is not None and name.split(".")[0] == key:
                return number
        elif inside and key is not None and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
    return header

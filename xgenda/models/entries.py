"""The models that xgenda knows by name, as ``weights.toml`` lists them.

The format is strict, so that a slip in the file is found by whoever makes it: a key that is unknown, missing or of the
wrong type is an error that names the file, line, model and key.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from xgenda.errors import CheckpointError, did_you_mean

SCHEMA = 1
PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")

PACKAGE = Path(__file__).resolve().parents[1]
_TYPES = {"file": str, "url": str, "sha256": str, "size": int, "task": str, "description": str, "licence": str}
_TYPES |= {"variables": list, "region": str}
HUB_URL = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})/(?P<path>[^?#\\]+)")


@dataclass(frozen=True)
class Entry:
    """One registered model: what it is, and where its file is (`file` in the package, or `url`)."""

    name: str
    task: Literal["prior", "downscale"]
    description: str
    licence: str
    variables: tuple[str, ...]
    region: str
    sha256: str
    size: int
    file: str | None = None
    url: str | None = None


def registry(path: Path | None = None) -> dict[str, Entry]:
    """Read the registered models.

    Parameters
    ----------
    path : Path, optional
        A file in the format of ``weights.toml``. By default the one that comes with xgenda.

    Returns
    -------
    dict of str to Entry
        The models by name, in the order of the file.

    Raises
    ------
    CheckpointError
        The file is not as it should be; the message names the file, line, model and key.
    """
    if path is None:
        inside = PACKAGE / "weights.toml"  # an installed package; in a source tree the file is one level up
        path = inside if inside.is_file() else PACKAGE.parent / "weights.toml"
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(f"The model registry {path} cannot be read: {error}.") from error

    def refuse(problem: str, model: str | None = None, key: str | None = None) -> CheckpointError:
        line = _line_of(text, model, key)
        place = f"{path}, line {line}" if line else f"{path}"
        return CheckpointError(f"{place}: {f'[models.{model}]: ' if model else ''}{problem}")

    for key in table:
        if key not in ("schema", "models"):
            raise refuse(f"unknown key {key!r}; known are 'schema' and 'models'.", key=key)
    if type(table.get("schema")) is not int or table["schema"] != SCHEMA:
        raise refuse(f"schema = {table.get('schema')!r}, but this version reads schema = {SCHEMA}.", key="schema")
    models = table.get("models", {})
    if not isinstance(models, dict):
        raise refuse("'models' must be a table of tables, [models.<name>].", key="models")
    entries = {}
    for name, fields in models.items():
        if not isinstance(fields, dict):
            raise refuse(f"must be a table [models.{name}], found {fields!r}.", name)
        found = _problem(name, fields)
        if found is not None:
            raise refuse(found[1], name, found[0])
        entries[name] = Entry(name=name, **{**fields, "variables": tuple(fields["variables"])})
    return entries


def _problem(name: str, fields: dict[str, Any]) -> tuple[str | None, str] | None:
    """Find the first fault of a model's table: the key, and what is wrong with it."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        return None, f"the name {name!r} must be lower-case letters, digits and hyphens."
    for key, value in fields.items():
        if key not in _TYPES:
            return key, f"unknown key {key!r}.{did_you_mean(key, _TYPES)} Known keys: {', '.join(_TYPES)}."
        if type(value) is not _TYPES[key]:
            return key, f"{key!r} must be a {_TYPES[key].__name__}, found {value!r}."
        if value in ("", []) or (isinstance(value, list) and not all(type(v) is str and v for v in value)):
            return key, f"{key!r} must not be empty or hold anything but names, found {value!r}."
    for key in _TYPES:
        if key not in fields and key not in ("file", "url"):
            return None, f"the key {key!r} is missing."
    if ("file" in fields) == ("url" in fields):
        return None, "exactly one of 'file' (part of the package) and 'url' must be there."
    if not re.fullmatch("[0-9a-f]{64}", fields["sha256"]):
        return "sha256", f"'sha256' must be 64 lower-case hexadecimal digits, found {fields['sha256']!r}."
    if fields["size"] <= 0:
        return "size", f"'size' must be the size in bytes, found {fields['size']!r}."
    if fields["task"] not in ("prior", "downscale"):
        return "task", f"'task' must be 'prior' or 'downscale', found {fields['task']!r}."
    key = "file" if "file" in fields else "url"
    place = fields[key]
    suffix = PurePosixPath(re.split("[?#]", place)[0]).suffix.lower()
    if suffix in PICKLES or (key == "file" and suffix != ".safetensors"):
        return key, f"{key!r} must be a safetensors file, found {place!r}; pickled files can run code."
    if key == "file" and (re.search(r"[\\:]", place) or place.startswith("/") or ".." in place.split("/")):
        return key, f"'file' must be a path below data/weights/ without '..', found {place!r}."
    if key == "url" and not _is_allowed(place):
        accepted = "https://..., hf://organisation/repository@<40 digit commit>/path, or http:// on this machine"
        return key, f"'url' = {place!r} is not accepted; use {accepted}."
    return None


def _is_allowed(url: str) -> bool:
    """Tell whether a URL is encrypted, pinned to a commit of the hub, or of this very machine."""
    if url.startswith("hf://"):
        match = HUB_URL.fullmatch(url)
        return match is not None and ".." not in match["path"].split("/")
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    if not host or "@" in parts.netloc:
        return False
    loopback = host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
    return parts.scheme == "https" or (parts.scheme == "http" and loopback)


def _line_of(text: str, model: str | None, key: str | None) -> int | None:
    """Find the line of a key, or of its table's header when there is no such line."""
    inside, header = model is None, None
    for number, line in enumerate(text.splitlines(), start=1):
        if table := re.match(r"\s*\[\s*([^\]]+?)\s*\]", line):
            inside = table[1].replace('"', "").replace("'", "") == f"models.{model}"
            header = number if inside else header
            if model is None and key is not None and table[1].split(".")[0] == key:
                return number
        elif inside and key is not None and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
    return header

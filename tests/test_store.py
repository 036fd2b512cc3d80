"""The contract of the model store.

A file is handed over only if it is the registered one; whatever else comes is refused with a message that says what was
expected, what was found and what to do; the cache never holds anything but complete, verified files.
Downloads go through a real HTTP server on this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

import xgenda
from xgenda.errors import CheckpointError, ChecksumError, GendaError, ModelNotFoundError, OptionError
from xgenda.models import entries as entries_module
from xgenda.models import sources, store
from xgenda.training.journal import Journal

GOOD = bytes(range(256)) * 40
SHA = hashlib.sha256(GOOD).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.hits.append(self.path)
            hit = server.hits.count(self.path)
        status, body, length = 200, GOOD, None
        if self.path == "/wrong":
            body = b"x" * len(GOOD)
        elif self.path == "/large":
            body = GOOD * 1000
        elif self.path == "/short":
            body = GOOD[:-1]
        elif self.path == "/truncated":
            body, length = GOOD[:5000], len(GOOD)
        elif self.path == "/half":
            body, length = LIKE_A_MODEL[:5000], len(LIKE_A_MODEL)
        elif self.path == "/html":
            body = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
        elif self.path == "/missing":
            status, body = 404, b"nothing here"
        elif self.path == "/busy" and hit == 1:
            status, body = 503, b"try later"
        elif self.path == "/slow":
            time.sleep(0.5)
        elif self.path.split("?")[0] in server.files:
            body = server.files[self.path.split("?")[0]]
        elif self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", f"http://0.0.0.0:{server.server_address[1]}/good")  # no loopback address by its name
            self.end_headers()
            return
        elif self.path in ("/by-way", "/way"):  # of that address, and back
            host, place = ("0.0.0.0", "way") if self.path == "/by-way" else ("127.0.0.1", "good")
            self.send_response(302)
            self.send_header("Location", f"http://{host}:{server.server_address[1]}/{place}")
            self.end_headers()
            return
        self.send_response(status)
        if body != GOOD:
            self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client had enough
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hits: list[str] = []
        self.files: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XGENDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RETRIES", 0)  # they wait 1 + 2 + 3 seconds


def table(**fields: object) -> str:
    """Write the table of one model, ``[models.tiny]``; a field that is None is left out."""
    default = {
        "url": "https://example.org/tiny.safetensors",
        "sha256": SHA,
        "size": len(GOOD),
        "task": "prior",
        "description": "a test",
        "licence": "Apache-2.0",
        "variables": ["t2m", "mslp"],
        "region": "Europe",
    }
    lines = ["schema = 1", "[models.tiny]"]
    for key, value in (default | fields).items():
        if value is not None:
            lines.append(f"{key} = {json.dumps(value)}")  # for these types JSON is TOML
    return "\n".join(lines) + "\n"


def read(tmp_path: Path, text: str) -> dict[str, store.Entry]:
    (tmp_path / "weights.toml").write_text(text)
    return store.registry(tmp_path / "weights.toml")


@pytest.fixture
def remote(tmp_path: Path, server: Server):
    """Make a registry of one model whose file is at the given place of the server."""
    return lambda place: read(tmp_path, table(url=f"{server.url}/{place}"))


# -- the registry ------------------------------------------------------------------------------------------------------


def test_the_registry_of_the_package_is_sound() -> None:
    for name, entry in store.registry().items():
        assert entry.name == name
        if entry.file is not None:
            assert store.find_file(name) == (store.path_of(entry), entry.sha256)
            assert store.path_of(entry).stat().st_size == entry.size


def test_an_entry_has_what_its_table_says(tmp_path: Path) -> None:
    entry = read(tmp_path, table())["tiny"]
    assert entry == store.Entry(
        name="tiny",
        task="prior",
        description="a test",
        licence="Apache-2.0",
        variables=("t2m", "mslp"),
        region="Europe",
        files=(entries_module.File(sha256=SHA, size=len(GOOD), url="https://example.org/tiny.safetensors"),),
        registry=tmp_path / "weights.toml",
        root=tmp_path,
    )
    assert (entry.sha256, entry.size, entry.url, entry.file) == (SHA, len(GOOD), entry.files[0].url, None)
    with pytest.raises(AttributeError):
        entry.size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/tiny.safetensors",
        "https://example.org/files/tiny.safetensors/content?download=1",
        "http://localhost:8000/tiny.safetensors",
        "http://127.0.0.1/tiny.safetensors",
        "http://[::1]:80/tiny.safetensors",
        "s3://bucket/folder/tiny.safetensors",
        "gs://bucket/tiny.safetensors",
        "memory://tiny.safetensors",
        f"hf://an-org/a.repo_1@{COMMIT}/folder/tiny.safetensors",
    ],
)
def test_urls_that_are_accepted(tmp_path: Path, url: str) -> None:
    assert read(tmp_path, table(url=url))["tiny"].url == url


def test_a_url_of_the_hub_is_taken_apart() -> None:
    match = entries_module.HUB_URL.fullmatch(f"hf://an-org/a.repo_1@{COMMIT}/folder/tiny.safetensors")
    assert match is not None
    assert match.groupdict() == {"repo": "an-org/a.repo_1", "commit": COMMIT, "path": "folder/tiny.safetensors"}


MALFORMED = {
    "not TOML": ("schema = 1\n[models.tiny\n", r"cannot be read: .*line 2"),
    "a key twice": (table() + 'region = "Asia"\n', r"cannot be read: .*line 11"),
    "no schema": ("", r"schema = None, but this version reads schema = 1 and schema = 2"),
    "a later schema": ("# a comment\nschema = 3\n", r"line 2: schema = 3, but this version reads .*pip install --upgrade xgenda"),
    "schema = true": ("schema = true\n", r"line 1: schema = True"),
    "unknown top-level key": ("schema = 1\nmodel = 1\n", r"line 2: unknown key 'model'"),
    "unknown top-level table": ("schema = 1\n\n[model.tiny]\n", r"line 3: unknown key 'model'"),
    "models is no table": ("schema = 1\nmodels = 3\n", r"line 2: 'models' must be a table"),
    "a model is no table": ("schema = 1\n[models]\ntiny = 3\n", r"\[models.tiny\]: must be a table .*found 3"),
    "upper-case name": ('schema = 1\n[models."Ti/ny"]\n', r"line 2: \[models.Ti/ny\]: the name 'Ti/ny' must be"),
    "unknown key": (table(license="MIT"), r"line 11: \[models.tiny\]: unknown key 'license'. Did you mean 'licence'\?"),
    "a missing key": (table(region=None), r"line 2: \[models.tiny\]: the key 'region' is missing"),
    "wrong type": (table(size="12"), r"line 5: \[models.tiny\]: 'size' must be a int, found '12'"),
    "size = true": (table(size=True), r"line 5: .*'size' must be a int, found True"),
    "size = 0": (table(size=0), r"line 5: .*'size' must be the size in bytes, found 0"),
    "short hash": (table(sha256=SHA[:-1]), r"line 4: .*'sha256' must be 64 lower-case hexadecimal digits"),
    "upper-case hash": (table(sha256=SHA.upper()), r"line 4: .*64 lower-case hexadecimal digits"),
    "unknown task": (table(task="nowcast"), r"line 6: .*'task' must be 'prior' or 'downscale' or .*, found 'nowcast'"),
    "no variables": (table(variables=[]), r"line 9: .*'variables' must not be empty"),
    "variables that are no names": (table(variables=[1]), r"line 9: .*'variables' must not be empty or hold"),
    "empty licence": (table(licence=""), r"line 8: .*'licence' must not be empty"),
    "file and url": (table(file="tiny.safetensors"), r"line 2: .*exactly one of 'file' .* and 'url'"),
    "neither file nor url": (table(url=None), r"line 2: .*exactly one of 'file' .* and 'url'"),
    "file above": (table(url=None, file="../tiny.safetensors"), r"'file' must be a path below the folder of the registry"),
    "absolute file": (table(url=None, file="/tiny.safetensors"), r"'file' must be a path below the folder of the registry"),
    "drive letter": (table(url=None, file="C:/tiny.safetensors"), r"'file' must be a path below the folder of the registry"),
    "pickled file": (
        table(url=None, file="tiny.pt"),
        r"must be a safetensors file, found 'tiny.pt'; pickled files can",
    ),
    "pickled url": (table(url="https://example.org/tiny.ckpt"), r"line 3: .*must be a safetensors file"),
    "plain http": (table(url="http://example.org/tiny"), r"line 3: .*is not accepted; use https://"),
    "http that looks local": (table(url="http://127.0.0.1.example.org/tiny"), r"is not accepted; use https://"),
    "password in url": (table(url="https://me:secret@example.org/tiny"), r"is not accepted; use https://"),
    "ftp": (table(url="ftp://example.org/tiny"), r"is not accepted; use https://"),
    "password in a store": (table(url="s3://me:secret@bucket/tiny"), r"is not accepted; use https://"),
    "no path in a store": (table(url="s3://"), r"is not accepted; use https://"),
    "chained stores": (table(url="s3://zip::memory://tiny"), r"is not accepted; use https://"),
    "no host": (table(url="https:///tiny"), r"is not accepted; use https://"),
    "broken address": (table(url="http://[::1/tiny"), r"is not accepted; use https://|cannot be"),
    "hub without commit": (table(url="hf://org/repo/tiny"), r"is not accepted; .*@<40 digit commit>"),
    "hub with branch": (table(url="hf://org/repo@main/tiny"), r"is not accepted; .*@<40 digit commit>"),
    "hub with ..": (table(url=f"hf://org/repo@{COMMIT}/../tiny"), r"is not accepted; .*@<40 digit commit>"),
}


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_registry_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "weights.toml") in str(caught.value)


def test_a_registry_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.toml cannot be read: .*No such file"):
        store.registry(tmp_path / "absent.toml")


# -- names and paths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_taken_as_it_is(tmp_path: Path, kind: type, cache: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(GOOD)
    assert store.find_file(kind(path)) == (path, SHA)
    assert not cache.exists()


def test_a_path_may_be_relative_or_without_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.safetensors", "mine"):
        Path(name).write_bytes(GOOD)
        assert store.find_file(name) == (tmp_path / name, SHA)


def test_a_registered_name_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch, remote) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_bytes(b"something else")
    registry = remote("good")
    assert store.find_file("tiny", registry=registry)[1] == SHA
    assert store.find_file("./tiny", registry=registry)[0] == tmp_path / "tiny"


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"absent\.safetensors does not exist. Pass the path of"):
        store.find_file(tmp_path / "absent.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"is a folder, not a file, and it holds no model file. Pass the path"):
        store.find_file(tmp_path)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_that_holds_one_model(tmp_path: Path, kind: type) -> None:
    for name in ("README.md", ".model.safetensors.partial-3", ".hidden.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert store.find_file(kind(tmp_path)) == (tmp_path / "model.safetensors", SHA)
    (tmp_path / "other.safetensors").write_bytes(GOOD)
    with pytest.raises(
        ModelNotFoundError, match=r"holds 2 model files: model.safetensors, other.safetensors. Pass .* model='.*/model\."
    ):
        store.find_file(tmp_path)


def test_a_file_can_be_asked_for_by_its_checksum(tmp_path: Path, remote) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(GOOD)
    assert store.find_file(path, sha256=SHA.upper()) == (path, SHA)
    with pytest.raises(ChecksumError, match=f"has sha256 {SHA}, expected {'0' * 64}"):
        store.find_file(path, sha256="0" * 64)
    with pytest.raises(OptionError, match="sha256='123' is not accepted; it must be 64 hexadecimal digits"):
        store.find_file(path, sha256="123")
    with pytest.raises(ChecksumError, match=f"is not that of the model 'tiny', which is registered with {SHA}"):
        store.find_file("tiny", sha256="0" * 64, registry=remote("good"))


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    message = (
        r"No model is named 'tinny'. Did you mean 'tiny'\? Registered models: 'tiny'. "
        r"The path of a .safetensors file is accepted too"
    )
    with pytest.raises(ModelNotFoundError, match=message):
        store.find_file("tinny", registry=read(tmp_path, table()))
    with pytest.raises(KeyError, match="Registered models: none"):
        store.find_file("tinny", registry={})


@pytest.mark.parametrize("name", [f"model{suffix}" for suffix in (".pt", ".pth", ".ckpt", ".pkl", ".bin", ".PT")])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cposix\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(CheckpointError, match=r"never loaded: opening one can run code. Convert it to safetensors"):
        store.find_file(tmp_path / name)


@pytest.mark.parametrize("value", ["", None, 3, b""])
def test_what_is_neither_name_nor_path(value: object) -> None:
    with pytest.raises(OptionError, match="is not accepted; pass a registered name or a path"):
        store.find_file(value)  # type: ignore[arg-type]


# -- bundled files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay out a package of its own, with a registry and one file in it."""
    package = tmp_path / "package"
    (package / "data" / "weights").mkdir(parents=True)
    (package / "data" / "weights" / "tiny.safetensors").write_bytes(GOOD)
    (package / "weights.toml").write_text(table(url=None, file="tiny.safetensors"))
    monkeypatch.setattr(entries_module, "PACKAGE", package)
    return package


def test_a_bundled_file_is_verified(bundle: Path, cache: Path) -> None:
    path = bundle / "data" / "weights" / "tiny.safetensors"
    assert store.find_file("tiny") == (path, SHA)
    assert store.list_models().loc["tiny", "where"] == "bundled"
    path.write_bytes(GOOD[::-1])
    with pytest.raises(ChecksumError, match=f"expected sha256 {SHA}, found .*pip install --force-reinstall xgenda"):
        store.find_file("tiny")
    path.unlink()
    with pytest.raises(ModelNotFoundError, match="is missing. Install the package again: pip install"):
        store.find_file("tiny")
    assert not cache.exists()


def test_a_wrong_size_is_refused_whatever_the_source(bundle: Path, tmp_path: Path, server: Server, cache: Path) -> None:
    (bundle / "weights.toml").write_text(table(url=None, file="tiny.safetensors", size=len(GOOD) + 1))
    with pytest.raises(ChecksumError, match=rf"has {len(GOOD)} bytes and .*: size = {len(GOOD)} in {bundle}"):
        store.find_file("tiny")
    cache.mkdir()
    (cache / f"tiny-{SHA[:8]}.safetensors").write_bytes(GOOD)
    with pytest.raises(ChecksumError, match=rf"{len(GOOD) - 1} bytes are registered. Correct the entry"):
        store.find_file("tiny", registry=read(tmp_path, table(url=f"{server.url}/good", size=len(GOOD) - 1)))


@pytest.mark.parametrize("begin", [b"\x89HDF\r\n\x1a\n", b"CDF\x01\0\0\0\1", b"CDF\x05\0\0\0\1"])
def test_fields_are_no_model(tmp_path: Path, begin: bytes) -> None:
    (tmp_path / "x.nc").write_bytes(begin + b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"x.nc is a netCDF file, and no model.*xr.open_dataset\('x.nc'\)"):
        xgenda.load_model(tmp_path / "x.nc")


@pytest.mark.parametrize("stages", [("prior",), ("mean", "residual")])
def test_the_state_of_a_training_is_no_model(tmp_path: Path, stages: tuple[str, ...]) -> None:
    folder = tmp_path / "long.training"
    folder.mkdir()
    for stage in stages:
        Journal(folder, {"seed": 0}).save(stage, {"weight": torch.zeros(2)}, {"step": 1})
    for path in (folder, folder / f"{stages[0]}.safetensors"):
        with pytest.raises(CheckpointError, match=r"interrupted, and no model.*out='long.safetensors', resume=True"):
            xgenda.load_model(path)


def test_the_registry_of_a_source_tree_is_beside_the_package(bundle: Path) -> None:
    (bundle / "weights.toml").rename(bundle.parent / "weights.toml")
    assert list(store.registry()) == ["tiny"]


# -- downloads ---------------------------------------------------------------------------------------------------------


def test_a_download_is_kept(remote, server: Server, cache: Path) -> None:
    registry = remote("good")
    assert store.list_models(registry=registry).loc["tiny", "where"] == "remote"
    assert not cache.exists()
    path, sha256 = store.find_file("tiny", registry=registry)
    assert (path, sha256) == (cache / f"tiny-{SHA[:8]}.safetensors", SHA)
    assert path.read_bytes() == GOOD
    (cache / "other").touch()
    assert path.stat().st_mode == (cache / "other").stat().st_mode  # others may read it where the umask lets them
    assert store.list_models(registry=registry).loc["tiny", "where"] == "cached"
    assert store.find_file("tiny", registry=registry) == (path, sha256)
    assert server.hits == ["/good"]


def test_list_models(remote, tmp_path: Path) -> None:
    models = store.list_models(registry=remote("good"))
    assert models.index.name == "name"
    assert models.loc["tiny"].to_dict() == {
        "task": "prior",
        "variables": "t2m, mslp",
        "grid": "not stated",
        "region": "Europe",
        "size": len(GOOD),
        "licence": "Apache-2.0",
        "where": "remote",
    }
    empty = store.list_models(registry={})
    assert list(empty.columns) == list(models.columns)
    assert len(empty) == 0


def test_the_cache_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XGENDA_CACHE")
    assert store.cache_dir().is_absolute()
    assert "xgenda" in store.cache_dir().parts


def test_a_server_that_is_busy_is_asked_again(remote, server: Server) -> None:
    assert store.find_file("tiny", registry=remote("busy"))[0].read_bytes() == GOOD
    assert server.hits == ["/busy", "/busy"]


REFUSED = {
    "wrong": (ChecksumError, f"is not the registered one and was removed: expected sha256 {SHA}, found [0-9a-f]{{64}}"),
    "large": (ChecksumError, f"is larger than the registered {len(GOOD)} bytes"),
    "html": (ChecksumError, "the server sent a web page instead of the file"),
    "missing": (ModelNotFoundError, "answered 404"),
    "by-way": (ChecksumError, r"/by-way leads to http://0.0.0.0:\d+/way, which is not encrypted"),
    "elsewhere": (ChecksumError, r"/elsewhere leads to http://0.0.0.0:\d+/good, which is not encrypted"),
}


@pytest.mark.parametrize("place", REFUSED)
def test_another_file_is_refused_at_once(remote, server: Server, cache: Path, place: str) -> None:
    error, message = REFUSED[place]
    with pytest.raises(error, match=message) as caught:
        store.find_file("tiny", registry=remote(place))
    assert_says_what_to_do(str(caught.value), cache, server.url)
    assert server.hits in ([f"/{place}"], ["/elsewhere", "/good"], ["/by-way", "/way", "/good"])
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("no_retries")
@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("truncated", ModelNotFoundError, "could not be downloaded: "),
        ("short", ChecksumError, f"is incomplete: expected {len(GOOD)} bytes, found {len(GOOD) - 1}"),
    ],
)
def test_part_of_a_file_is_refused(remote, server, cache: Path, place: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        store.find_file("tiny", registry=remote(place))
    assert_says_what_to_do(str(caught.value), cache, server.url)
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("no_retries")
def test_without_a_network(tmp_path: Path, server: Server, cache: Path) -> None:
    with Server() as closed:
        url = closed.url
    registry = read(tmp_path, table(url=f"{url}/good"))
    with pytest.raises(ModelNotFoundError, match="Model 'tiny': http.* could not be downloaded: ") as caught:
        store.find_file("tiny", registry=registry)
    assert "127.0.0.1 does not answer: Connection refused. Try again" in str(caught.value)
    assert_says_what_to_do(str(caught.value), cache, url)
    # ... and what the message says works
    (cache / f"tiny-{SHA[:8]}.safetensors").write_bytes(GOOD)
    assert store.find_file("tiny", registry=registry)[1] == SHA


def test_a_hub_that_cannot_be_reached_is_one_line() -> None:
    bottom = ConnectionRefusedError(111, "Connection refused")
    middle = OSError("HTTPSConnectionPool(host='hub', port=443): Max retries exceeded\nwith url")
    middle.__cause__ = bottom
    top = RuntimeError("An error happened while trying to locate the file on the Hub")
    top.__context__ = middle
    problem = sources.hub_error(top, "a/b", "hf://a/b")
    assert isinstance(problem, sources.TransientError)
    assert str(problem) == f"{sources.hub_endpoint()} cannot be reached: Connection refused"


def assert_says_what_to_do(message: str, cache: Path, url: str) -> None:
    assert "Try again with xgenda.load_model('tiny')" in message
    assert f"or download {url}/" in message
    assert f"copy it, under the name tiny-{SHA[:8]}.safetensors, to {cache}" in message


def test_a_damaged_file_in_the_cache_is_replaced(remote, cache: Path) -> None:
    cache.mkdir()
    path = cache / f"tiny-{SHA[:8]}.safetensors"
    path.write_bytes(b"y" * len(GOOD))
    assert store.find_file("tiny", registry=remote("good")) == (path, SHA)
    assert path.read_bytes() == GOOD


def test_a_damaged_file_in_the_cache_is_removed(remote, cache: Path) -> None:
    cache.mkdir()
    (cache / f"tiny-{SHA[:8]}.safetensors").write_bytes(b"y" * len(GOOD))
    with pytest.raises(ModelNotFoundError, match=r"answered 404.*The file in the cache had sha256 [0-9a-f]{64} and was removed"):
        store.find_file("tiny", registry=remote("missing"))
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made(remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XGENDA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelNotFoundError, match="cannot be used: .*Set the environment variable XGENDA_CACHE"):
        store.find_file("tiny", registry=remote("good"))


def test_two_processes_at_once(remote, server: Server, cache: Path, tmp_path: Path) -> None:
    remote("slow")
    program = (
        "import pathlib, sys; from xgenda.models import store;"
        "print(*store.find_file('tiny', registry=store.registry(pathlib.Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "weights.toml")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ.copy()}
    answers = []
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        answers.append(out.strip())
    assert answers == [f"{cache / f'tiny-{SHA[:8]}.safetensors'} {SHA}"] * 2
    assert [path.read_bytes() for path in cache.iterdir()] == [GOOD]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_in_a_terminal_and_nowhere_else(remote, tmp_path: Path, terminal: bool) -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    remote("good")
    program = (
        "import pathlib, sys; from xgenda.models import store;"
        "store.find_file('tiny', registry=store.registry(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "weights.toml")]
    if terminal:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True)
        shown = os.read(ours, 10_000) if select.select([ours], [], [], 5)[0] else b""
        os.close(theirs)
        os.close(ours)
        assert b"tiny:" in shown
        assert b"10.0k" in shown
    else:
        done = subprocess.run(command, capture_output=True, check=True)
        assert done.stderr == b""
    assert done.stdout == b""


def test_importing_the_store_is_light_and_touches_nothing(cache: Path) -> None:
    program = "import sys, xgenda.models.store; print([m for m in ('torch', 'pooch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() in ("[]", "['pandas']")  # the package itself may need pandas, by way of xarray
    assert not cache.exists()


# -- addresses that no registry has ------------------------------------------------------------------------------------

LIKE_A_MODEL = (2).to_bytes(8, "little") + b"{}" + GOOD  # as safetensors begin
DIGEST = hashlib.sha256(LIKE_A_MODEL).hexdigest()


def test_a_model_from_anywhere(server: Server, cache: Path) -> None:
    """Its checksum is shown once; with it, the cache answers without any question."""
    server.files["/model.safetensors"] = LIKE_A_MODEL
    url = f"{server.url}/model.safetensors"
    with pytest.warns(UserWarning, match=f"Nothing vouches for {url}, .* xgenda.load_model\\('{url}', sha256='{DIGEST}'\\)"):
        path, sha256 = store.find_file(url)
    assert (path.parent, sha256, path.read_bytes()) == (cache, DIGEST, LIKE_A_MODEL)
    asked = len(server.hits)
    assert store.find_file(url) == (path, DIGEST)  # no warning: warnings are errors
    assert len(server.hits) == asked + 1  # whether it has changed
    assert store.find_file(url, sha256=DIGEST) == (path, DIGEST)
    assert len(server.hits) == asked + 1
    path.write_bytes(b"damaged")
    assert store.find_file(url, sha256=DIGEST)[0].read_bytes() == LIKE_A_MODEL


def test_a_model_that_changed_at_its_address_is_fetched_again(server: Server, cache: Path) -> None:
    url = f"{server.url}/model.safetensors"
    server.files["/model.safetensors"] = LIKE_A_MODEL
    with pytest.warns(UserWarning, match=DIGEST):
        first, _ = store.find_file(url)
    server.files["/model.safetensors"] = LIKE_A_MODEL + b"more"
    with pytest.warns(UserWarning, match="Nothing vouches for"):
        second, sha256 = store.find_file(url)
    assert first != second
    assert sha256 == hashlib.sha256(LIKE_A_MODEL + b"more").hexdigest()
    with pytest.raises(ChecksumError, match=f"is not the one asked for and was removed: expected sha256 {'0' * 64}"):
        store.find_file(url, sha256="0" * 64)
    assert len(list(cache.iterdir())) == 2


def test_a_model_from_anywhere_without_network(server: Server, cache: Path) -> None:
    server.files["/model.safetensors"] = LIKE_A_MODEL
    url = f"{server.url}/model.safetensors"
    with pytest.warns(UserWarning, match=DIGEST):
        path, _ = store.find_file(url)
    server.shutdown()
    server.server_close()
    with pytest.warns(UserWarning, match=f"cannot be asked for changes; the copy {path} is taken"):
        assert store.find_file(url) == (path, DIGEST)
    assert store.find_file(url, sha256=DIGEST) == (path, DIGEST)
    with pytest.raises(ModelNotFoundError, match=r"cannot be reached: .*Try again with xgenda.load_model\("):
        store.find_file(f"{url}-other")


ANYWHERE = {
    "html": (ChecksumError, "the server sent a web page instead of the file"),
    "good": (ChecksumError, "the file is no safetensors file"),
    "missing": (ModelNotFoundError, r"answered 404 .*Try again with xgenda.load_model\('http"),
    "half": (ModelNotFoundError, "could not be downloaded: "),
}


@pytest.mark.usefixtures("no_retries")
@pytest.mark.parametrize("place", ANYWHERE)
def test_what_is_refused_from_anywhere(place: str, server: Server, cache: Path) -> None:
    error, message = ANYWHERE[place]
    with pytest.raises(error, match=message):
        store.find_file(f"{server.url}/{place}")
    assert not cache.exists() or list(cache.iterdir()) == []


def test_the_query_of_a_signed_address_is_never_shown(server: Server, no_retries: None) -> None:
    secret = "X-Amz-Signature=0123456789abcdef"
    server.files["/model.safetensors"] = LIKE_A_MODEL
    with pytest.warns(UserWarning, match="Nothing vouches for") as caught:
        store.find_file(f"{server.url}/model.safetensors?{secret}")
    assert secret not in str(caught[0].message)
    for url in (f"{server.url}/missing?{secret}", f"http://127.0.0.1:9/a?{secret}", f"http://example.org/a?{secret}"):
        with pytest.raises(GendaError) as refused:
            store.find_file(url)
        assert secret not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    "url", ["http://example.org/a", "ftp://example.org/a", "https://me:secret@example.org/a", "memory://a::b"]
)
def test_addresses_that_are_not_accepted(url: str) -> None:
    with pytest.raises(
        OptionError, match="is not accepted; use https://..., hf://organisation/repository@<40 digit commit>/file"
    ) as caught:
        store.find_file(url)
    assert "secret" not in str(caught.value)


def test_a_pickle_is_not_fetched(server: Server) -> None:
    with pytest.raises(CheckpointError, match="never loaded"):
        store.find_file(f"{server.url}/model.pt?download=1")
    assert server.hits == []


# -- object stores -----------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/model.safetensors", LIKE_A_MODEL)
    yield files
    files.rm("/bucket", recursive=True)


def test_a_model_of_a_store(memory: fsspec.AbstractFileSystem, cache: Path) -> None:
    with pytest.warns(UserWarning, match=f"Nothing vouches for memory://bucket/model.safetensors, which has sha256 {DIGEST}"):
        path, sha256 = store.find_file("memory://bucket/model.safetensors")
    assert (path.parent, sha256, path.read_bytes()) == (cache, DIGEST, LIKE_A_MODEL)
    assert store.find_file("memory://bucket/model.safetensors") == (path, DIGEST)
    memory.pipe("/bucket/model.safetensors", LIKE_A_MODEL + b"more")
    with pytest.warns(UserWarning, match="Nothing vouches for"):
        assert store.find_file("memory://bucket/model.safetensors")[0] != path
    with pytest.raises(ModelNotFoundError, match="memory://bucket/other does not exist"):
        store.find_file("memory://bucket/other")


def test_a_registered_model_of_a_store(memory: fsspec.AbstractFileSystem, tmp_path: Path, cache: Path) -> None:
    registry = read(tmp_path, table(url="memory://bucket/model.safetensors", sha256=DIGEST, size=len(LIKE_A_MODEL)))
    assert store.find_file("tiny", registry=registry) == (cache / f"tiny-{DIGEST[:8]}.safetensors", DIGEST)
    shutil.rmtree(cache)
    for content, message in (
        (LIKE_A_MODEL[:-1] + b"x", "is not the registered one and was removed"),
        (LIKE_A_MODEL + b"x", f"is larger than the registered {len(LIKE_A_MODEL)} bytes"),
    ):
        memory.pipe("/bucket/model.safetensors", content)
        with pytest.raises(ChecksumError, match=message):
            store.find_file("tiny", registry=registry)
    memory.rm("/bucket/model.safetensors")
    memory.pipe("/bucket/keep", b"")
    with pytest.raises(ModelNotFoundError, match="memory://bucket/model.safetensors does not exist.*download memory://"):
        store.find_file("tiny", registry=registry)
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("no_retries")
def test_part_of_a_file_of_a_store(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    registry = read(tmp_path, table(url="memory://bucket/model.safetensors", sha256=DIGEST, size=len(LIKE_A_MODEL) + 1))
    with pytest.raises(ChecksumError, match=f"is incomplete: expected {len(LIKE_A_MODEL) + 1} bytes, found {len(LIKE_A_MODEL)}"):
        store.find_file("tiny", registry=registry)


def test_an_address_of_this_machine_is_a_path(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(GOOD)
    assert store.find_file(f"file://{tmp_path}/a.safetensors") == (tmp_path / "a.safetensors", SHA)
    assert store.find_file(f"file://{tmp_path}") == (tmp_path / "a.safetensors", SHA)
    registry = read(tmp_path, table(url=f"file://{tmp_path}/a.safetensors"))  # in a registry it is copied to the cache, verified
    assert store.find_file("tiny", registry=registry) == (cache / f"tiny-{SHA[:8]}.safetensors", SHA)


def test_a_store_whose_package_is_not_installed(tmp_path: Path) -> None:
    """In a process of its own, where these packages cannot be imported; fsspec remembers what it has imported."""
    read(tmp_path, table(url="s3://bucket/tiny.safetensors"))
    program = (
        "import pathlib, sys\n"
        "for name in ('s3fs', 'gcsfs', 'adlfs'): sys.modules[name] = None\n"
        "from xgenda.errors import MissingDependencyError\n"
        "from xgenda.models import store\n"
        "registry = store.registry(pathlib.Path(sys.argv[1]))\n"
        "for model in ('tiny', 's3://b/a.safetensors', 'gs://b/a.safetensors', 'az://b/a.safetensors'):\n"
        "    try: store.find_file(model, registry=registry)\n"
        "    except MissingDependencyError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "weights.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"Files at {scheme}:// need the package {package!r}, which is not installed. Install it with: pip install {package}"
        for scheme, package in (("s3", "s3fs"), ("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs"))
    ]

"""The contract of the Hugging Face hub, and of model cards: the real client against a small hub on this machine.

What is fetched is pinned to a commit and verified; what goes wrong says what to type; no message ever holds a token.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import logging
import os
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

import xgenda
from xgenda.errors import ChecksumError, ModelNotFoundError, OptionError, OutputExistsError, PublishingError
from xgenda.models import store
from xgenda.models.cards import hub_licence, model_card
from xgenda.models.generative import GenerativeModel

TOKEN = "hf_averysecrettokenindeed"
ABSENT = "f" * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """The endpoints that the client calls; see ``huggingface_hub.hf_api`` and ``huggingface_hub.lfs``."""

    def do_HEAD(self) -> None:
        self.resolve(body=False)

    def do_GET(self) -> None:
        self.resolve(body=True)

    def resolve(self, *, body: bool) -> None:
        hub = self.server
        hub.note(self)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", unquote(self.path))
        if found is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        repo, commit, path = found.groups()
        name = repo.split("/")[1]
        if name == "gated" and not self.headers.get("Authorization"):
            return self.answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."})
        if name == "gated":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "You are not on the list."})
        if name == "private":
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if name == "forbidden":
            return self.answer(403, b"no", {})
        if name == "talkative":  # a server that repeats what it was told
            said = str(self.headers.get("Authorization"))
            return self.answer(
                418, json.dumps({"error": said}).encode(), {"X-Error-Message": said, "Content-Type": "application/json"}
            )
        if name == "page":
            return self.answer(200, b"<!DOCTYPE html><html>Please log in</html>", {})
        if name == "busy" and hub.count("HEAD") < 2:
            return self.answer(503, b"later", {})
        if repo not in hub.repos:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if commit not in hub.repos[repo]:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path not in hub.repos[repo][commit]:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = hub.repos[repo][commit][path]
        given = content[: len(content) // 2] if name == "truncated" and body else content
        etag = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Content-Length": str(len(content))}
        self.answer(200, given if body else b"", headers)

    def do_POST(self) -> None:
        hub = self.server
        hub.note(self)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b"", {"X-Error-Message": f"Invalid token {self.headers.get('Authorization')}"})
        if self.path == "/api/repos/create":
            given = json.loads(data)
            repo = f"{given['organization']}/{given['name']}"
            hub.created.append(given)
            if repo in hub.repos:
                return self.reply({"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}, 409)
            hub.repos[repo] = {}
            return self.reply({"url": f"{hub.url}/{repo}", "name": repo})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            modes = [
                {"path": f["path"], "uploadMode": mode_of(f["path"]), "shouldIgnore": False} for f in json.loads(data)["files"]
            ]
            return self.reply({"files": modes})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "authenticated": True, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}", "header": {}}}}
                for o in json.loads(data)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            return self.reply(hub.commit(found[1], [json.loads(line) for line in data.splitlines()]))
        return self.answer(404, b"", {})

    def do_PUT(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self.answer(200, b"", {})

    def reply(self, data: dict, status: int = 200) -> None:
        self.answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if self.command != "HEAD":
                self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


def mode_of(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.hits: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def note(self, handler: Handler) -> None:
        with self.lock:
            self.hits.append((handler.command, handler.path))

    def count(self, method: str) -> int:
        return sum(command == method for command, _ in self.hits)

    def put(self, repo: str, **files: bytes) -> str:
        commit = hashlib.sha1(repr((repo, files)).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        return commit

    def commit(self, repo: str, lines: list[dict]) -> dict:
        before = list(self.repos[repo].values())
        files = dict(before[-1]) if before else {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.blobs[line["value"]["oid"]]
        commit = hashlib.sha1(repr((repo, len(before))).encode()).hexdigest()
        self.repos[repo][commit] = files
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{repo}/commit/{commit}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("XGENDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # a protocol of its own; git-lfs is spoken instead
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def content(tiny_prior: GenerativeModel) -> bytes:
    return Path(tiny_prior.path or "").read_bytes()


def entry(url: str, content: bytes) -> dict[str, store.Entry]:
    file = store.File(sha256=hashlib.sha256(content).hexdigest(), size=len(content), url=url)
    own = store.Entry("tiny", "prior", "a test", "MIT", ("t2m",), "Europe", (file,), Path("weights.toml"), Path())
    return {"tiny": own}


# -- fetching -------------------------------------------------------------------------------------------------------------------


def test_a_model_of_the_hub(hub: Hub, content: bytes, tmp_path: Path) -> None:
    commit = hub.put("org/repo", **{"folder/tiny.safetensors": content})
    place = f"hf://org/repo@{commit}/folder/tiny.safetensors"
    model = xgenda.load_model(place)
    assert model.sha256 == hashlib.sha256(content).hexdigest()
    assert [method for method, _ in hub.hits] == ["HEAD", "GET"]
    cached = list((tmp_path / "cache").iterdir())
    assert [p.name for p in cached] == [f"tiny-{hashlib.sha256(place.encode()).hexdigest()[:8]}{cached[0].name[13:]}"]
    assert cached[0].read_bytes() == content
    assert xgenda.load_model(place).sha256 == model.sha256
    assert xgenda.load_model(place, sha256=model.sha256).path == model.path
    assert len(hub.hits) == 2  # and no further question
    with pytest.raises(ChecksumError, match=f"expected sha256 {'0' * 64}, found {model.sha256}"):
        xgenda.load_model(place, sha256="0" * 64)


def test_a_registered_model_of_the_hub(hub: Hub, content: bytes, tmp_path: Path) -> None:
    commit = hub.put("org/repo", **{"tiny.safetensors": content})
    registry = entry(f"hf://org/repo@{commit}/tiny.safetensors", content)
    path, sha256 = store.find_file("tiny", registry=registry)
    assert path == tmp_path / "cache" / f"tiny-{sha256[:8]}.safetensors"
    assert path.read_bytes() == content
    other = entry(f"hf://org/repo@{commit}/tiny.safetensors", content[:-1] + b"x")
    path.unlink()
    with pytest.raises(ChecksumError, match="is not the registered one and was removed"):
        store.find_file("tiny", registry=other)
    assert list((tmp_path / "cache").iterdir()) == []


def test_offline(hub: Hub, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the cache serves another machine; the hub's own cache serves too."""
    commit = hub.put("org/repo", **{"tiny.safetensors": content})
    place = f"hf://org/repo@{commit}/tiny.safetensors"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="is not on this machine, and HF_HUB_OFFLINE forbids to fetch it"):
        xgenda.load_model(place)
    assert hub.hits == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    xgenda.load_model(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("XGENDA_CACHE", str(tmp_path / "elsewhere"))
    hub.hits.clear()
    assert xgenda.load_model(place).path.parent == tmp_path / "elsewhere"
    monkeypatch.setenv("XGENDA_CACHE", str(tmp_path / "new"))
    snapshot = tmp_path / "hub-cache" / "models--org--repo" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "tiny.safetensors").write_bytes(content)
    assert xgenda.load_model(place).path.parent == tmp_path / "new"
    assert hub.hits == []


REFUSED = {
    "gated": (ModelNotFoundError, r"org/gated is gated: ask for access at http://127.0.0.1:\d+/org/gated, then log in: hf auth login"),
    "private": (ModelNotFoundError, r"org/private does not exist on http://\S+, is private, or .*: check the name, or log in: hf auth login"),
    "forbidden": (ModelNotFoundError, r"org/forbidden does not exist on .* log in: hf auth login \(or set .* HF_TOKEN\)"),
    "absent": (ModelNotFoundError, r"org/absent does not exist on "),
    "talkative": (ModelNotFoundError, r"cannot be reached|answered 418"),
    "page": (ModelNotFoundError, r"does not seem to be served by a Hugging Face Hub|cannot be reached|trying to locate the file"),
}  # fmt: skip


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_refuses(
    name: str, token: str | None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The message says what to type, and neither it, nor the traceback, nor any log has the token."""
    caplog.set_level(logging.DEBUG)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    error, message = REFUSED[name]
    place = f"hf://org/{name}@{ABSENT}/tiny.safetensors"
    for call in (lambda: xgenda.load_model(place), lambda: store.find_file("tiny", registry=entry(place, b"x"))):
        with pytest.raises(error, match=message) as caught:
            call()
        shown = "".join(traceback.format_exception(caught.value))
        assert TOKEN not in shown
        assert "Try again with xgenda.load_model(" in shown
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith("httpcore")]  # which traces what the server says
    assert TOKEN not in "\n".join(ours)
    assert hub.count("HEAD") >= 2
    assert not list((tmp_path / "cache").iterdir())


def test_no_such_commit_and_no_such_file(hub: Hub) -> None:
    commit = hub.put("org/repo", **{"tiny.safetensors": b"x"})
    with pytest.raises(ModelNotFoundError, match=r"org/repo has no such commit: hf://.*@ffff.* \(see http.*/commits/main\)"):
        xgenda.load_model(f"hf://org/repo@{ABSENT}/tiny.safetensors")
    with pytest.raises(
        ModelNotFoundError, match=r"org/repo has no such file: hf://.*/other.safetensors \(see http.*/tree/main\)"
    ):
        xgenda.load_model(f"hf://org/repo@{commit}/other.safetensors")


@pytest.mark.slow
def test_a_hub_that_is_busy_is_asked_again(hub: Hub, content: bytes) -> None:
    commit = hub.put("org/busy", **{"tiny.safetensors": content})
    assert xgenda.load_model(f"hf://org/busy@{commit}/tiny.safetensors").spec.name == "tiny-prior"
    assert hub.count("HEAD") == 2


@pytest.mark.slow
def test_a_file_of_the_hub_that_breaks_off(hub: Hub, content: bytes, tmp_path: Path) -> None:
    commit = hub.put("org/truncated", **{"tiny.safetensors": content})
    place = f"hf://org/truncated@{commit}/tiny.safetensors"
    with pytest.raises((ModelNotFoundError, ChecksumError), match="Try again"):
        store.find_file("tiny", registry=entry(place, content))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hf://org/repo/tiny.safetensors", r"is not pinned to a commit.*load_model\('hf://org/repo@<commit>/tiny.safetensors'\)"),
        ("hf://org/repo@main/tiny.safetensors", r"is not pinned to a commit, .* huggingface_hub.HfApi\(\).model_info\('org/repo'\).sha"),
        ("hf://org/repo", r"is not pinned to a commit.*'hf://org/repo@<commit>/model.safetensors'"),
        (f"hf://org/repo@{ABSENT}", rf"lacks the name of the file. Type: model='hf://org/repo@{ABSENT}/model.safetensors'"),
        (f"hf://org/repo@{ABSENT}/../x.safetensors", "is not pinned"),
    ],
)  # fmt: skip
def test_what_is_not_pinned_is_refused(place: str, message: str, hub: Hub) -> None:
    with pytest.raises(OptionError, match=message):
        xgenda.load_model(place)
    assert hub.hits == []


@pytest.mark.slow
def test_a_process_of_its_own_with_the_documented_variables(hub: Hub, content: bytes, tmp_path: Path) -> None:
    """HF_ENDPOINT is read by the client too when it is imported."""
    commit = hub.put("org/repo", **{"tiny.safetensors": content})
    program = "import sys, xgenda; print(xgenda.load_model(sys.argv[1]).sha256)"
    command = [sys.executable, "-W", "error", "-c", program, f"hf://org/repo@{commit}/tiny.safetensors"]
    root = str(Path(xgenda.__file__).parents[1])
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": root}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (out.strip(), err) == (hashlib.sha256(content).hexdigest(), "")  # silent where there is no terminal
    env["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(content).hexdigest(), done.stderr
    assert len(list((tmp_path / "cache").iterdir())) == 1


# -- publishing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client itself
def test_a_model_is_pushed_and_loaded_by_the_line_that_is_returned(
    hub: Hub, tiny_prior: GenerativeModel, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = tiny_prior.path
    place = tiny_prior.push_to_hub("org/new", private=True)
    assert tiny_prior.path == before
    first, second = hub.repos["org/new"]
    assert place == f"hf://org/new@{first}/model.safetensors"
    assert hub.repos["org/new"][first] == {"model.safetensors": content}
    card = hub.repos["org/new"][second]["README.md"].decode()
    assert f'model = xgenda.load_model("{place}")' in card
    assert hub.created[0]["name"] == "new"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    again = xgenda.load_model(place)
    assert again.spec.to_dict() == tiny_prior.spec.to_dict()
    assert again.sha256 == hashlib.sha256(content).hexdigest()
    third = tiny_prior.push_to_hub("org/new", file="v2/other.safetensors", card=False)  # the repository is there already
    assert third.endswith("/v2/other.safetensors")
    assert len(hub.repos["org/new"]) == 3
    assert xgenda.load_model(third).sha256 == again.sha256


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client itself
def test_a_token_that_is_given(hub: Hub, tiny_prior: GenerativeModel) -> None:
    assert tiny_prior.push_to_hub("org/new", token=TOKEN).startswith("hf://org/new@")


@pytest.mark.parametrize("given", [None, "hf_anothersecretthatiswrong", "plainsecretwithoutprefix"])
def test_what_cannot_be_pushed(given: str | None, hub: Hub, tiny_prior: GenerativeModel) -> None:
    with pytest.raises(
        PublishingError, match=r"could not be put on the hub: org/new does not exist on .* hf auth login"
    ) as caught:
        tiny_prior.push_to_hub("org/new", token=given)
    assert given is None or given not in "".join(traceback.format_exception(caught.value))
    assert hub.repos == {}


def test_nothing_is_pushed_offline(hub: Hub, tiny_prior: GenerativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PublishingError, match="HF_HUB_OFFLINE forbids to reach the hub"):
        tiny_prior.push_to_hub("org/new")
    assert hub.hits == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"repo_id": "repo"}, "repo_id='repo' is not accepted; give 'organisation/repository'"),
        ({"repo_id": 3}, "repo_id=3 is not accepted"),
        ({"file": "model.pt"}, "file='model.pt' is not accepted; it must end in .safetensors"),
        ({"file": "../a.safetensors"}, "is not accepted; it must end"),
        ({"private": "yes"}, "private='yes' is not accepted; it must be True or False"),
        ({"card": 1}, "card=1 is not accepted"),
    ],
)
def test_bad_arguments_are_refused_before_the_hub_is_asked(
    given: dict, message: str, hub: Hub, tiny_prior: GenerativeModel
) -> None:
    with pytest.raises(OptionError, match=message):
        tiny_prior.push_to_hub(**({"repo_id": "org/repo"} | given))
    assert hub.hits == []


# -- cards ----------------------------------------------------------------------------------------------------------------------


def test_a_card_says_what_its_model_is(tiny_downscaler: GenerativeModel) -> None:
    card = model_card(tiny_downscaler)
    _, front, body = card.split("---\n", 2)
    head = [line for line in front.splitlines() if not line.startswith("- ")]
    assert head == ['license: "other"', 'license_name: "that-of-the-training-data"', 'library_name: "xgenda"', "tags:"]
    assert '- "downscaling"' in front
    variable = tiny_downscaler.spec.variables[0]
    assert f"| {variable.name} | {variable.standard_name} | {variable.units} | {variable.long_name} |" in body
    assert 'xgenda.load_model("tiny-downscaler")' in body
    assert "| grid | 8 x 12, latitude " in body
    assert "| input grid | 2 x 3, latitude " in body
    assert f"| period | {tiny_downscaler.spec.training['period']} |" in body
    scores = body[body.index("## Scores") :]
    assert f"| validation best | {tiny_downscaler.spec.training['validation_best']:.4g} |" in scores


def test_what_a_card_shows_is_escaped_and_nested(prior: GenerativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    training = {"data": "a|b\nc", "scores": {"t2m": {"crps": 0.123456, "years": list(range(20)), "none": None}}}
    training["asked"] = {"steps": 4}
    training["history"] = {
        "network": {"step": [1, 2, 3], "loss": [3, 2, 1], "crps_t2m": [0.9, 0.75, None], "crps_t2m_gaussian": [1.0] * 3}
    }
    monkeypatch.setattr(prior, "spec", replace(prior.spec, training=training, doi="10.5281/zenodo.1", citation="A (2020)"))
    card = model_card(prior, place='a"b')
    assert "| data | a\\|b c |" in card
    assert "### T2m\n\n|  |  |\n| --- | --- |\n| crps | 0.1235 |\n| years | 20 values |" in card
    assert "| crps t2m | 0.75 |\n| crps t2m gaussian | 1 |" in card[card.index("## Scores") :]
    assert "| loss |" not in card
    assert "| none |" not in card
    assert "### Options of training\n\n|  |  |\n| --- | --- |\n| steps | 4 |" in card
    assert 'load_model("a\\"b")' in card
    assert "DOI: [10.5281/zenodo.1](https://doi.org/10.5281/zenodo.1)" in card
    assert "## Citation\n\nA (2020)" in card
    assert "| grid | any |" in card


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Apache-2.0; trained on data under the Open Government Licence", {"license": "apache-2.0"}),
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("Open Government Licence", {"license": "other", "license_name": "open-government-licence"}),
        ("", {"license": "other", "license_name": "not-stated"}),
    ],
)
def test_licences_as_the_hub_knows_them(text: str, expected: dict[str, str]) -> None:
    assert hub_licence(text) == expected


def test_a_card_beside_the_file(prior: GenerativeModel, tmp_path: Path) -> None:
    path = prior.save(tmp_path / "a.safetensors", card=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.md", "a.safetensors"]
    assert 'xgenda.load_model("a.safetensors")' in (tmp_path / "a.md").read_text()
    path.unlink()
    with pytest.raises(OutputExistsError, match=r"a.md exists"):
        prior.save(path, card=True)
    assert not path.exists()
    prior.save(path, card=True, overwrite=True)
    prior.save(tmp_path / "b.safetensors")
    assert not (tmp_path / "b.md").exists()

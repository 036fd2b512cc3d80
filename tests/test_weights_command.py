"""``xgenda weights``: what it prints, its exit status, and a cache that is carried to a machine without network."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import xgenda
from xgenda.cli import main
from xgenda.models import registries
from xgenda.models.generative import GenerativeModel

CARD = b"# A card\n"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, tiny_prior: GenerativeModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    """A server of two files, and a registry of one's own that lists them, and a model that is not there."""
    folder = tmp_path / "served"
    folder.mkdir()
    content = Path(tiny_prior.path or "").read_bytes()
    (folder / "tiny.safetensors").write_bytes(content)
    (folder / "tiny.md").write_bytes(CARD)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        common = 'task = "prior"\ndescription = "a test"\nlicence = "MIT"\nvariables = ["t"]\ngrid = "any"\nregion = "here"\n'
        text = "schema = 2\n"
        for name, files in {"tiny": {"tiny.safetensors": content, "tiny.md": CARD}, "gone": {"gone.safetensors": b"x"}}.items():
            text += f"[models.{name}]\n{common}"
            for file, data in files.items():
                digest = hashlib.sha256(data).hexdigest()
                text += f'[[models.{name}.files]]\nurl = "{url}/{file}"\nsha256 = "{digest}"\nsize = {len(data)}\n'
        (tmp_path / "mine.toml").write_text(text)
        monkeypatch.setenv(registries.VARIABLE, str(tmp_path / "mine.toml"))
        monkeypatch.setenv("XGENDA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(served: object, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str) -> tuple[int, list[str], str]:
        status = main(["weights", *arguments])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return call


def test_list_is_that_of_models(run, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, _ = run("list")
    assert main(["models"]) == status == 0
    assert lines == capsys.readouterr().out.splitlines()
    assert any(line.startswith("tiny") and line.endswith("remote") for line in lines)


def test_fetch_verify_where(run, tmp_path: Path) -> None:
    status, lines, err = run("where", "tiny")
    assert status == 1
    assert "tiny is not on this machine; type: xgenda weights fetch tiny" in err
    path = Path(lines[0])
    assert not (tmp_path / "cache").exists()
    status, lines, err = run("fetch", "tiny")
    assert (status, err) == (0, "")
    assert lines == [f"tiny\t{path}", f"tiny\t{path.parent}/{next(p.name for p in path.parent.glob('*.md'))}"]
    assert Path(lines[1].split("\t")[1]).read_bytes() == CARD
    assert run("where", "tiny") == (0, [str(path)], "")
    assert run("verify", "tiny")[:2] == (0, [line.replace("\t", "\tok\t") for line in lines])
    assert xgenda.load_model("tiny").spec.name == "tiny-prior"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    status, lines, err = run("verify")
    assert status == 1
    assert f"tiny\tdamaged\t{path}" in lines
    assert any(line.startswith("gone\tnot fetched\t") for line in lines)
    assert any(line.startswith("t2m-north-america\tok\t") for line in lines)
    assert err.strip() == "xgenda: tiny: tiny.safetensors is damaged; type: xgenda weights fetch tiny"
    assert run("fetch", "tiny")[0] == 0
    assert run("verify")[0] == 0
    assert run("verify", "gone")[0] == 1


def test_fetch_all_goes_on_after_a_failure(run, tmp_path: Path) -> None:
    status, lines, err = run("fetch", "--all")
    assert status == 1
    names = [line.split("\t")[0] for line in lines]
    bundled = ["t2m-north-america", "t2m-north-america-vae", "t2m-north-america-x4", "ocean-twin"]  # each with its card
    assert names == [name for name in [*bundled, "tiny"] for _ in range(2)]
    assert "xgenda: error: Model 'gone': http" in err
    assert "answered 404" in err
    assert "Try again with xgenda weights fetch gone, or download" in err


def test_fetch_takes_addresses(run, served: http.server.HTTPServer) -> None:
    url = f"http://127.0.0.1:{served.server_address[1]}/tiny.safetensors"
    with pytest.warns(UserWarning, match=rf"Nothing vouches for {url}, which has sha256 [0-9a-f]{{64}}"):
        status, lines, _ = run("fetch", url)
    assert status == 0
    assert Path(lines[0].split("\t")[1]).is_file()


def test_what_is_named_wrong(run) -> None:
    for action in ("where", "verify"):
        status, lines, err = run(action, "tyni")
        assert (status, lines) == (1, [])
        assert "No model is named 'tyni'. Did you mean 'tiny'?" in err
    status, _, err = run("fetch", "tyni")
    assert status == 1
    assert "No model is named 'tyni'" in err
    status, _, err = run("fetch")
    assert status == 2
    assert "xgenda weights fetch --all" in err
    with pytest.raises(SystemExit) as stopped:
        main(["weights"])
    assert stopped.value.code == 2


def test_a_cache_is_carried_to_a_machine_without_network(run, served: http.server.HTTPServer, tmp_path: Path) -> None:
    """As docs/models.md says: fetch, copy the folder, set the variable; nothing is asked of any server."""
    assert run("fetch", "tiny")[0] == 0
    shutil.copytree(tmp_path / "cache", tmp_path / "stick")
    served.shutdown()
    served.server_close()
    program = (
        "import socket, xgenda\n"
        "def refuse(*a, **k): raise AssertionError('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "print(xgenda.load_model('tiny').path)"
    )
    root = str(Path(xgenda.__file__).parents[1])
    env = os.environ | {"XGENDA_CACHE": str(tmp_path / "stick"), "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == tmp_path / "stick"

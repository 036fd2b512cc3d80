"""The contract of registries: schema 2 is read strictly, and models of one's own are added without hiding any other."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import xarray as xr

import xgenda
from xgenda.errors import CheckpointError, ChecksumError, ModelNotFoundError
from xgenda.models import registries, store

GOOD = b"a model" * 100
SHA = hashlib.sha256(GOOD).hexdigest()
CARD = b"# A card"
MODEL = f"""\
schema = 2

[models.tiny]
task = "prior"
description = "a test"
licence = "Apache-2.0"
variables = ["t2m"]
grid = "8 x 12"
region = "Europe"
doi = "10.5281/zenodo.123"
citation = "Someone (2020)"
xgenda = ">=0.0.1"

[[models.tiny.files]]
file = "weights/tiny.safetensors"
sha256 = "{SHA}"
size = {len(GOOD)}

[[models.tiny.files]]
file = "weights/tiny.md"
sha256 = "{hashlib.sha256(CARD).hexdigest()}"
size = {len(CARD)}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A registry with the files that it lists."""
    (tmp_path / "own" / "weights").mkdir(parents=True)
    (tmp_path / "own" / "weights" / "tiny.safetensors").write_bytes(GOOD)
    (tmp_path / "own" / "weights" / "tiny.md").write_bytes(CARD)
    path = tmp_path / "own" / "mine.toml"
    path.write_text(MODEL)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XGENDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(registries.VARIABLE, raising=False)
    return tmp_path / "cache"


# -- schema 2 -------------------------------------------------------------------------------------------------------------------


def test_an_entry_of_schema_2(own: Path) -> None:
    (entry,) = store.registry(own).values()
    assert (entry.grid, entry.doi, entry.citation, entry.xgenda) == ("8 x 12", "10.5281/zenodo.123", "Someone (2020)", ">=0.0.1")
    assert (entry.file, entry.sha256, entry.size) == ("weights/tiny.safetensors", SHA, len(GOOD))
    assert entry.registry == own
    assert [f.label for f in entry.files] == ["tiny.safetensors", "tiny.md"]
    assert store.fetch(entry) == own.parent / "weights" / "tiny.safetensors"
    assert store.fetch(entry, entry.files[1]).read_bytes() == CARD
    assert [store.state_of(entry, f, verify=True) for f in entry.files] == ["bundled", "bundled"]


FAULTS = {
    "no grid": ('grid = "8 x 12"\n', "", r"line 3: \[models.tiny\]: the key 'grid' is missing"),
    "file beside the description": ('region = "Europe"', 'region = "Europe"\nurl = "https://a.b/c"', r"line 10: .*unknown key 'url'"),
    "a link for a DOI": ("10.5281", "https://doi.org/10.5281", r"line 10: .*'doi' must be the identifier alone, as in 10.5281"),
    "no range": ('">=0.0.1"', '"new"', r"line 12: .*'xgenda' must be a range of versions, as in \">=0.1,<2\", found 'new'"),
    "another task": ('"prior"', '"nowcast"', r"line 4: .*'task' must be 'prior' or 'downscale' or 'background' or 'forecast', found 'nowcast'"),
    "unknown key of a file": ("size = 8", "length = 8", r"line 22: \[models.tiny\]: file 2: unknown key 'length'"),
    "missing key of a file": ("size = 8", "", r"line 19: \[models.tiny\]: file 2: the key 'size' is missing"),
    "wrong hash": (f'"{SHA}"', '"00"', r"line 16: \[models.tiny\]: file 1: 'sha256' must be 64"),
    "the model is no safetensors": ("tiny.safetensors", "tiny.md2", r"line 15: .*file 1: 'file' must be a safetensors file"),
    "a pickled extra": ("tiny.md", "tiny.pkl", r"line 20: .*file 2: 'file' must be a safetensors file, found .*run code"),
    "outside": ("weights/tiny.md", "../tiny.md", r"line 20: .*'file' must be a path below the folder of the registry"),
    "name with a folder": ("size = 8", 'size = 8\nname = "../a"', r"line 23: .*'name' must be the name of a file"),
    "two files of one name": ("weights/tiny.md", "more/tiny.safetensors", r"files have the same name, .*; give one a 'name'"),
    "files are no tables": ("[[models.tiny.files]]\n", "", r"line 14: .*unknown key 'file'. Did you mean 'files'"),
    "no files": (MODEL[MODEL.index("[[models.") :], "files = []", r"line 14: .*'files' must not be empty"),
    "files are numbers": (MODEL[MODEL.index("[[models.") :], "files = [3]", r"file 1: must be a table \[\[models.tiny.files\]\], found 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_found_with_its_line(what: str, own: Path) -> None:
    before, after, message = FAULTS[what]
    assert before in MODEL
    own.write_text(MODEL.replace(before, after, 1 if before != "size = 8" else -1))
    with pytest.raises(CheckpointError, match=message) as caught:
        store.registry(own)
    assert str(own) in str(caught.value)


def test_a_model_for_another_version(own: Path) -> None:
    own.write_text(MODEL.replace(">=0.0.1", ">=99,<100"))
    (entry,) = store.registry(own).values()
    with pytest.raises(ModelNotFoundError, match=r"'tiny' is for xgenda >=99,<100, and this is .* pip install 'xgenda>=99,<100'"):
        store.find_file("tiny", registry={"tiny": entry})


def test_nothing_is_downloaded_that_was_not_named(own: Path, monkeypatch: pytest.MonkeyPatch, background: xr.Dataset) -> None:
    """A model that is elsewhere is offered, not fetched; one for another version is a reason like any other."""
    local, elsewhere = 'file = "weights/tiny.safetensors"', 'url = "https://192.0.2.1/tiny.safetensors"'  # an address of nobody
    own.write_text(MODEL.replace(local, elsewhere))
    monkeypatch.setenv(registries.VARIABLE, str(own))
    with pytest.raises(ModelNotFoundError, match="tiny: it is not on this machine; if it is the one you want, type model='tiny'"):
        xgenda.assimilate(background, background.isel(latitude=[1], longitude=[2]), error=1.0)
    own.write_text(MODEL.replace(">=0.0.1", ">=99"))
    with pytest.raises(ModelNotFoundError, match="tiny: Model 'tiny' is for xgenda >=99"):
        xgenda.assimilate(background, background.isel(latitude=[1], longitude=[2]), error=1.0)


def test_an_alternative_is_taken_by_its_name_only(own: Path, monkeypatch: pytest.MonkeyPatch, background: xr.Dataset) -> None:
    own.write_text(MODEL.replace('region = "Europe"', 'region = "Europe"\nalternative_to = "large"'))
    monkeypatch.setenv(registries.VARIABLE, str(own))
    with pytest.raises(
        ModelNotFoundError, match="tiny: it is an alternative to large; if it is the one you want, type model='tiny'"
    ):
        xgenda.assimilate(background, background.isel(latitude=[1], longitude=[2]), error=1.0)
    assert store.find_file("tiny")[1] == SHA
    truth = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=[-1])
    assert xgenda.plan(truth, task="prior", members=1, steps=2).model == "t2m-north-america"
    assert xgenda.load_model("t2m-north-america-vae").latent == 32  # type: ignore[attr-defined]


# -- registries of one's own ----------------------------------------------------------------------------------------------------


def test_a_registry_of_ones_own_is_added(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("schema = 2\n")
    monkeypatch.setenv(registries.VARIABLE, os.pathsep.join([str(own), str(other), "", str(own)]))
    names = list(store.registry())
    assert names[-1] == "tiny"
    assert names.count("tiny") == 1
    assert "t2m-north-america" in names
    assert store.find_file("tiny") == (own.parent / "weights" / "tiny.safetensors", SHA)
    assert xgenda.list_models().loc["tiny", "where"] == "bundled"
    (own.parent / "weights" / "tiny.safetensors").write_bytes(GOOD[::-1])
    with pytest.raises(ChecksumError, match=f"is not the registered one: .*Put it there again, or correct {own}"):
        store.find_file("tiny")


def test_a_path_needs_no_registry(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registries.VARIABLE, "/absent.toml")
    assert store.find_file(own.parent / "weights")[1] == SHA


def test_a_registry_that_is_not_there_is_said_to_be_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(registries.VARIABLE, str(tmp_path / "absent.toml"))
    with pytest.raises(CheckpointError, match=r"absent.toml cannot be read: .*added by the environment variable XGENDA_REGISTRY"):
        store.registry()


@pytest.mark.parametrize("name", ["t2m-north-america", "twice"])
def test_no_name_is_hidden(name: str, own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = MODEL.replace("models.tiny", f"models.{name}")
    files = [own, tmp_path / "second.toml"]
    for path in files:
        path.write_text(text)
    monkeypatch.setenv(registries.VARIABLE, os.pathsep.join(map(str, files)))
    with pytest.raises(
        CheckpointError, match=f"Two models are named '{name}': one in .*toml, one in .*toml .*Rename one"
    ) as caught:
        store.registry()
    assert str(own) in str(caught.value)
    assert ("weights.toml" if name != "twice" else "second.toml") in str(caught.value)


PLUGIN = {
    "a path": ("PLACE = {path!r}\n", "plugin:PLACE", None),
    "a function": ("def models():\n    return {path!r}\n", "plugin:models", None),
    "broken": ("import absent_module\n", "plugin:models", "'mine' of plugin cannot be found: ModuleNotFoundError.*pip uninstall plugin"),
    "a number": ("PLACE = 3\n", "plugin:PLACE", "'mine' of plugin cannot be found: TypeError.*must be the path"),
}  # fmt: skip


@pytest.mark.parametrize("what", PLUGIN)
def test_another_package_adds_models(what: str, own: Path, tmp_path: Path) -> None:
    """A package as pip lays it out, in a process of its own."""
    code, value, message = PLUGIN[what]
    site = tmp_path / "site"
    (site / "plugin-1.0.dist-info").mkdir(parents=True)
    (site / "plugin.py").write_text(code.format(path=str(own)))
    (site / "plugin-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (site / "plugin-1.0.dist-info" / "entry_points.txt").write_text(f"[xgenda.models]\nmine = {value}\n")
    program = "import xgenda.models.store as s; print(s.find_file('tiny')[1])"
    root = str(Path(xgenda.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), root])}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True)
    if message is None:
        assert done.stdout.strip() == SHA, done.stderr
    else:
        assert done.returncode == 1
        assert re.search(message, done.stderr), done.stderr

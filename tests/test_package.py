"""The package as it is shipped: what the wheel holds, what importing it costs, and what lies at the top level."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | (env or {}), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_its_data_and_its_registry(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        registry = archive.read("xgenda/weights.toml")
    assert registry == (ROOT / "weights.toml").read_bytes()
    shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT / "xgenda").rglob("*") if p.is_file()}
    shipped = {name for name in shipped if "__pycache__" not in name}
    assert {name for name in names if name.startswith("xgenda/")} == shipped | {"xgenda/weights.toml"}
    assert {"xgenda/py.typed", "xgenda/data/LICENSES.md", "xgenda/data/europe_synop.nc"} <= names
    others = {name.split("/")[0] for name in names if not name.startswith("xgenda/")}
    assert len(others) == 1
    assert others.pop().endswith(".dist-info")
    assert any(name.endswith("entry_points.txt") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 6_500_000


def test_the_wheel_works_away_from_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import xgenda.tutorial, xgenda.models.store as store;"
        "print(xgenda.tutorial.__file__, len(store.registry()));"
        "[xgenda.tutorial.open_dataset(name) for name in xgenda.tutorial.list_datasets()];"
        "[store.find_file(name) for name, entry in store.registry().items() if entry.file]"
    )
    out = run(sys.executable, "-c", program, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")})
    expected = tomllib.loads((ROOT / "weights.toml").read_text(encoding="utf-8")).get("models", {})
    assert out.split() == [str(tmp_path / "site" / "xgenda" / "tutorial.py"), str(len(expected))]


def test_the_version_is_that_of_the_distribution() -> None:
    version = importlib.metadata.version("xgenda")
    assert re.match(r"\d+\.\d+", version)
    xgenda = pytest.importorskip("xgenda")
    assert getattr(xgenda, "__version__", version) == version


@pytest.mark.parametrize("module", ["torch", "dask", "matplotlib", "scipy", "huggingface_hub", "pooch"])
def test_importing_xgenda_is_light(module: str, tmp_path: Path) -> None:
    program = f"import sys, xgenda; print({module!r} in sys.modules)"
    assert run(sys.executable, "-c", program, cwd=tmp_path).strip() == "False"


def test_importing_xgenda_writes_nothing(tmp_path: Path) -> None:
    env = {"XGENDA_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    run(sys.executable, "-c", "import xgenda", cwd=tmp_path, env=env)
    assert not (tmp_path / "cache").exists()
    assert list((tmp_path / "home").iterdir()) == []


def test_the_top_level_is_tidy() -> None:
    expected = {"README.md", "LICENSE", "pyproject.toml", "weights.toml", "xgenda", "tests", "docs", "examples", ".ci"}
    found = {path.name for path in ROOT.iterdir()}
    assert expected <= found
    assert not {"setup.py", "setup.cfg", "requirements.txt", "xgenda.py"} & found
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_readme_has_the_command_that_runs_the_tests() -> None:
    command = "python -m pip install -e '.[test]' && python -m pytest"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "pd.read_pickle"}


def pickles_in(text: str) -> list[str]:
    """Return what in a program reads or writes pickles: imports, calls, and allow_pickle."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLING]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{a.name}" for a in node.names]
            found += [n for n in names if n.split(".")[0] in PICKLING or n in CALLS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            found += [called] if called in CALLS or called.split(".")[0] in PICKLING or called.endswith("to_pickle") else []
            unsaid = "True" if called in ("np.load", "numpy.load") else "False"  # what keeps pickles out must be said
            found += ["allow_pickle"] if keywords.get("allow_pickle", unsaid) != "False" else []
            found += ["weights_only"] if keywords.get("weights_only", "True") != "True" else []
    return found


def test_nothing_is_stored_as_a_pickle() -> None:
    """But for the files of PhysicsNeMo, of which only numbers are read."""
    found = {}
    for path in [*ROOT.glob("xgenda/**/*.py"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("docs/benchmarks/*.py")]:
        if names := pickles_in(path.read_text(encoding="utf-8")):
            found[path.relative_to(ROOT).as_posix()] = sorted(names)
    assert found == {"xgenda/models/physicsnemo.py": ["torch.load", "torch.save"]}
    text = (ROOT / "xgenda/models/physicsnemo.py").read_text(encoding="utf-8")
    assert text.count("weights_only=True") == text.count("torch.load(") == 1


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from dill import loads", "import joblib.memory", "from torch import load", "torch.load(f, weights_only=True)",
        "torch.save(x, f)", "open_archive(f, allow_pickle=True)", "read(f, weights_only=False)", "df.to_pickle(f)", "np.load(f)",
    ],
)  # fmt: skip
def test_a_pickle_would_be_found(text: str) -> None:
    assert pickles_in(text)


def test_the_linter_refuses_pickles() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert {"TID251", "S301"} <= set(config["select"])
    banned = set(config["flake8-tidy-imports"]["banned-api"])
    assert {"pickle", "cloudpickle", "dill", "joblib", "torch.load", "torch.save", "numpy.load"} <= banned

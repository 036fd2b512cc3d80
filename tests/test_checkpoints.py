"""The contract of model files: what is saved is what is read, older formats are read, and whatever does not fit is told apart.

The files of format 1 in ``tests/data/format-1`` were written by the last version that wrote it, with the numbers below.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import save_file

import xgenda
from xgenda.errors import CheckpointError
from xgenda.models import migrations
from xgenda.models.checkpoints import differences, read_tensors
from xgenda.models.generative import GenerativeModel

OLD = Path(__file__).parent / "data" / "format-1"
NUMBERS = {  # first row, every fifth column, of two members
    "prior": [[295.7679, 287.6745, 298.66702], [295.70483, 289.2267, 297.54886]],
    "downscaler": [[295.48386, 287.64038, 298.0038], [296.27573, 286.9968, 297.85483]],
    "gaussian": [[295.4406, 287.7786, 297.77112], [296.59393, 287.59796, 297.80838]],
}


def document(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["xgenda"])


def rewritten(source: Path, path: Path, change: Callable[[dict, dict], object]) -> Path:
    """Write a copy of a model file with another document or other tensors."""
    with safe_open(source, "pt") as file:
        data, tensors = json.loads(file.metadata()["xgenda"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(data, tensors)
    save_file(tensors, path, metadata={"xgenda": json.dumps(data)})
    return path


def computed(model: GenerativeModel, climate: xr.Dataset) -> np.ndarray:
    now = climate.isel(time=[0])
    if model.spec.task == "downscale":
        out = xgenda.downscale(now.coarsen(latitude=4, longitude=4).mean(), model=model, steps=4, members=2, seed=0)
    else:
        steps = {} if model.spec.kind == "gaussian" else {"steps": 4}
        obs = now.isel(latitude=[3], longitude=[4])
        out = xgenda.assimilate(now, obs, error=0.5, model=model, members=2, seed=0, **steps)
    return out.air_temperature.squeeze("time").values[:, 0, ::5]


@pytest.mark.parametrize("name", NUMBERS)
def test_files_of_format_1_give_the_numbers_that_they_gave(name: str, climate: xr.Dataset, tmp_path: Path) -> None:
    old = OLD / f"{name}.safetensors"
    assert document(old)["format"] == 1
    model = xgenda.load_model(old)
    np.testing.assert_allclose(computed(model, climate), NUMBERS[name], rtol=2e-6)
    again = xgenda.load_model(model.save(tmp_path / "again.safetensors"))
    found = document(tmp_path / "again.safetensors")
    assert found["format"] == migrations.FORMAT == 2
    assert again.spec.to_dict() == model.spec.to_dict()
    assert again.spec.doi == again.spec.citation == ""
    before, after = read_tensors(old)[1], read_tensors(tmp_path / "again.safetensors")[1]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_every_older_format_has_its_migration() -> None:
    assert sorted(migrations.MIGRATIONS) == list(range(1, migrations.FORMAT))


def test_the_very_first_files_had_their_format_beside_and_no_inputs(tmp_path: Path) -> None:
    with safe_open(OLD / "gaussian.safetensors", "pt") as file:
        data, tensors = json.loads(file.metadata()["xgenda"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    del data["format"], data["inputs"]
    save_file(tensors, tmp_path / "first.safetensors", metadata={"xgenda": json.dumps(data), "format": "1"})
    assert xgenda.load_model(tmp_path / "first.safetensors").spec.inputs is None


def test_equal_models_give_equal_files(tiny_prior: GenerativeModel, tmp_path: Path) -> None:
    one, two = (xgenda.load_model(tiny_prior.path).save(tmp_path / f"{n}.safetensors") for n in "ab")
    assert one.read_bytes() == two.read_bytes() == Path(tiny_prior.path or "").read_bytes()


def shorter(tensors: dict, name: str) -> None:
    tensors[name] = tensors[name][..., :-1].clone()


BIAS = "network.embed.0.bias"
REFUSED: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "wrong shape": (lambda d, t: shorter(t, BIAS), r"wrong shape: network.embed.0.bias: expected \(32,\), found \(31,\)"),
    "missing": (lambda d, t: t.pop(BIAS), r"missing: network.embed.0.bias \(32,\)"),
    "unexpected": (lambda d, t: t.update(more=torch.zeros(2, 3)), r"unexpected: more \(2, 3\)"),
    "another network": (
        lambda d, t: d["model"]["options"]["network"].update(width=16),
        r"do not fit the description:\n  wrong shape: network.* expected .* found .*\n(.*\n)*  wrong shape: and \d+ more",
    ),
    "listed but not of this network": (
        lambda d, t: (t.update(stray=torch.zeros(2)), d["tensors"].update(stray=[2])),
        r"unexpected tensors \['stray'\]",
    ),
    "not listed right": (lambda d, t: d["tensors"].update({BIAS: [5]}), r"wrong shape: .* expected \(5,\), found \(32,\)"),
    "NaN": (lambda d, t: t[BIAS].fill_(np.nan), r"tensor 'network.embed.0.bias' holds values that are not finite"),
    "infinite scaling": (lambda d, t: t["scaling.std"].fill_(np.inf), r"tensor 'scaling.std' holds values that are not finite"),
    "unknown key of the header": (lambda d, t: d.update(colour=1), r"header has unexpected or missing keys: \['colour'\]"),
    "no list of tensors": (lambda d, t: d.pop("tensors"), r"header has unexpected or missing keys: \['tensors'\]"),
    "tensors are no mapping": (lambda d, t: d.update(tensors=3), r"'model' and 'tensors' of the header must be mappings"),
    "unknown key of the model": (lambda d, t: d["model"].update(colour=1), r"unexpected or missing keys: \['colour'\]"),
    "missing key of the model": (lambda d, t: d["model"].pop("grid"), r"unexpected or missing keys: \['grid'\]"),
    "newer": (
        lambda d, t: d.update(format=3, requires="0.4", novelty=1),
        r"has format 3; xgenda \S+ reads formats 1 to 2. Type: pip install --upgrade 'xgenda>=0.4'",
    ),
    "newer, and silent on the version": (
        lambda d, t: d.update(format=3, requires=None),
        r"has format 3; .* Type: pip install --upgrade xgenda$",
    ),
    "format 0": (lambda d, t: d.update(format=0), r"has format 0; .* It is no model file of xgenda"),
    "no format": (lambda d, t: d.pop("format"), r"has format None; .* It is no model file of xgenda"),
    "format is no number": (lambda d, t: d.update(format=[2]), r"has format \[2\]; .* It is no model file of xgenda"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_told(what: str, tiny_prior: GenerativeModel, tmp_path: Path) -> None:
    change, message = REFUSED[what]
    path = rewritten(Path(tiny_prior.path or ""), tmp_path / "altered.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        xgenda.load_model(path)
    assert str(path) in str(caught.value)


def test_differences_are_counted_beyond_the_first() -> None:
    text = differences({f"a{i}": (i,) for i in range(9)} | {"same": (1,)}, {"same": (1,)})
    assert text.splitlines() == [*(f"  missing: a{i} ({i},)" for i in range(5)), "  missing: and 4 more"]
    assert differences({"a": (1,)}, {"a": (1,)}) == ""


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("bad", [None, 0, "x", [], {}])
def test_parts_of_other_types_are_told(bad: object, tiny_prior: GenerativeModel, tmp_path: Path) -> None:
    source = tiny_prior.save(tmp_path / "good.safetensors")
    for keys in (("scaling",), ("grid",), ("options",), ("options", "network"), ("options", "network", "width"), ("variables",)):

        def change(data: dict, tensors: dict, keys: tuple[str, ...] = keys) -> None:
            part = data["model"]
            for key in keys[:-1]:
                part = part[key]
            part[keys[-1]] = bad

        path = rewritten(source, tmp_path / "bad.safetensors", change)
        with pytest.raises(CheckpointError):
            xgenda.load_model(path)

"""Model files: safetensors with the description in the header. No code is ever run by reading one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xgenda.errors import CheckpointError, check_flag
from xgenda.files import aside, check_output
from xgenda.metadata import package_version
from xgenda.models.conditions import Conditions
from xgenda.models.migrations import FORMAT, KEYS, REQUIRES, migrated
from xgenda.models.spec import ModelSpec
from xgenda.models.store import sha256_of
from xgenda.scaling import Scaling

if TYPE_CHECKING:
    from torch import Tensor, nn

    from xgenda.models.generative import GenerativeModel

LARGEST_HEADER = 16 * 2**20
NETCDF = (b"\x89HDF\r\n\x1a\n", b"CDF\x01", b"CDF\x02", b"CDF\x05")  # how the files begin
LISTED = 5  # differences of one kind in a message


def save_model(model: GenerativeModel, path: str | os.PathLike[str], *, overwrite: bool = False, card: bool = False) -> Path:
    """Write `model` beside `path` and rename it into place, and its card with it where that is asked for."""
    from xgenda.models.cards import model_card

    target = Path(path)
    if target.suffix != ".safetensors":
        raise CheckpointError(
            f"A model file ends in .safetensors; got {target.name!r}. Type: model.save('{target.stem}.safetensors')"
        )
    check_flag("card", card)
    check_output(target, "model.save", overwrite=overwrite, error=CheckpointError)
    beside = target.with_suffix(".md")
    if card:
        check_output(beside, "model.save", overwrite=overwrite, error=CheckpointError)
    with aside(target) as partial:
        write_model(model, partial)
    model.path, model.sha256 = target.resolve(), sha256_of(target)
    if card:
        with aside(beside) as partial:
            partial.write_text(model_card(model, place=target.name), encoding="utf-8")
    return target


def write_model(model: GenerativeModel, path: Path) -> None:
    """Write a model file."""
    from safetensors.torch import save_file

    # one entry only: safetensors writes several in random order, and equal models would have different checksums
    save_file(stored_tensors(model), path, metadata={"xgenda": json.dumps(_document(model))})


def stored_tensors(model: GenerativeModel) -> dict[str, Tensor]:
    """Return what a file of the model holds, by name; scalings are stored in single precision."""
    import torch

    tensors = {k: v.detach().contiguous().cpu() for k, v in model.tensors().items()}
    for prefix, scaling in _scalings(model.spec):
        tensors[f"{prefix}.mean"] = torch.as_tensor(scaling.mean, dtype=torch.float32)
        tensors[f"{prefix}.std"] = torch.as_tensor(scaling.std, dtype=torch.float32)
    return tensors


def _document(model: GenerativeModel) -> dict[str, Any]:
    """Return the entry of the header; see `xgenda.models.migrations`."""
    shapes = {k: list(v.shape) for k, v in sorted(stored_tensors(model).items())}
    return {"format": FORMAT, "requires": REQUIRES, "model": model.spec.to_dict(), "tensors": shapes}


def as_stored(model: GenerativeModel) -> GenerativeModel:
    """Return the model as it would be read from a file, so that it gives the same numbers whether it was saved or not."""
    import torch

    tensors = {k: v.clone() for k, v in stored_tensors(model).items()}
    spec = _described(Path("model"), json.loads(json.dumps(model.spec.to_dict())), tensors)
    with torch.random.fork_rng(devices=[]):  # new networks draw numbers before they get theirs
        out: GenerativeModel = _reader(spec).from_tensors(spec, tensors)
    out.sha256 = content_hash(out)
    return out


def read_model(path: Path, sha256: str) -> GenerativeModel:
    """Read a model file whose checksum is already known.

    Raises
    ------
    CheckpointError
        If the file is truncated, foreign, from a newer version, or holds tensors that are not finite or not expected.
    """
    import torch

    spec, tensors = read_tensors(path)
    try:
        with torch.random.fork_rng(devices=[]):  # those of the caller stay as they are
            model: GenerativeModel = _reader(spec).from_tensors(spec, tensors)
    except CheckpointError as problem:
        raise CheckpointError(f"{path}: {problem}") from problem
    except (
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ArithmeticError,
        AssertionError,
    ) as problem:
        raise CheckpointError(f"{path}: the tensors do not fit the description: {problem}") from problem
    model.path, model.sha256 = path, sha256
    return model


def _reader(spec: ModelSpec) -> Any:
    """Return the class of a model."""
    if spec.kind == "gaussian":
        from xgenda.models.gaussian import GaussianModel as reader
    elif spec.kind == "latent":
        from xgenda.models.latents import LatentModel as reader  # type: ignore[assignment]
    elif spec.kind == "conversion":
        from xgenda.models.conversions import ConversionModel as reader  # type: ignore[assignment]
    elif spec.kind != "diffusion":
        from xgenda.models.classical import ClassicalModel as reader  # type: ignore[assignment]
    elif spec.needs_background:
        from xgenda.models.background import BackgroundModel as reader  # type: ignore[assignment]
    elif spec.task == "downscale":
        from xgenda.models.corrective import CorrectiveModel as reader  # type: ignore[assignment]
    else:
        from xgenda.models.diffusive import DiffusionModel as reader  # type: ignore[assignment]
    return reader


def read_tensors(path: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Read description and tensors, checked."""
    from safetensors import safe_open

    try:
        with path.open("rb") as stream:
            begin = stream.read(8)
        if begin.startswith(NETCDF):
            raise CheckpointError(
                f"{path} is a netCDF file, and no model, which ends in .safetensors. Its fields are opened by xr.open_dataset({path.name!r})."
            )
        size = int.from_bytes(begin, "little")
        if size > LARGEST_HEADER:
            raise CheckpointError(f"{path} is no safetensors file (its header claims {size} bytes). Was it downloaded whole?")
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = dict(file.metadata() or {})
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (not a mapping)
    except CheckpointError:
        raise
    except Exception as problem:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({problem}). It may be truncated; fetch it again."
        ) from problem
    if "training" in header and "xgenda" not in header:
        raise CheckpointError(
            f"{path.parent} holds the state of a training that was interrupted, and no model. Go on with it by the same call of xgenda.train: "
            f"out={path.parent.with_suffix('.safetensors').name!r}, resume=True"
        )
    if "xgenda" not in header:
        raise CheckpointError(f"{path} is a safetensors file, but no xgenda model: its header has no 'xgenda' entry.")
    check_finite(path, tensors)
    try:
        data = json.loads(header["xgenda"])
    except json.JSONDecodeError as problem:
        raise CheckpointError(f"{path}: the model description is no valid JSON: {problem}") from problem
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: the model description is no mapping.")
    data.setdefault("format", header.get("format"))  # beside the description in the first files
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    return _described(path, _current(path, data, shapes)["model"], tensors), tensors


def _current(path: Path, document: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return a document of any known format in today's, after comparing it with the tensors of its file."""
    found = document["format"]
    known = isinstance(found, (int, str)) and str(found).isdecimal()
    if not known or not 1 <= int(found) <= FORMAT:
        newer = known and int(found) > FORMAT
        needed = document.get("requires") if newer else None
        wanted = f"'xgenda>={needed}'" if isinstance(needed, str) else "xgenda"
        raise CheckpointError(
            f"{path} has format {found}; xgenda {package_version()} reads formats 1 to {FORMAT}."
            + (f" Type: pip install --upgrade {wanted}" if newer else " It is no model file of xgenda.")
        )
    document = migrated({**document, "format": int(found)}, shapes)
    if set(document) != set(KEYS):
        raise CheckpointError(f"{path}: the header has unexpected or missing keys: {sorted(set(document) ^ set(KEYS))}.")
    if not isinstance(document["model"], dict) or not isinstance(document["tensors"], dict):
        raise CheckpointError(f"{path}: 'model' and 'tensors' of the header must be mappings.")
    expected = {k: tuple(v) if isinstance(v, list) else v for k, v in document["tensors"].items()}
    if found_out := differences(expected, shapes):
        raise CheckpointError(f"{path}: the tensors are not those that its header lists:\n{found_out}")
    return document


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return how two sets of named shapes differ, a line each; an empty string where they don't."""
    kinds = {
        "missing": [f"{k} {v}" for k, v in expected.items() if k not in found],
        "unexpected": [f"{k} {v}" for k, v in found.items() if k not in expected],
        "wrong shape": [f"{k}: expected {v}, found {found[k]}" for k, v in expected.items() if k in found and v != found[k]],
    }
    lines = []
    for kind, items in kinds.items():
        lines += [f"  {kind}: {item}" for item in items[:LISTED]]
        lines += [f"  {kind}: and {len(items) - LISTED} more"] if len(items) > LISTED else []
    return "\n".join(lines)


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Copy the tensors whose names begin with `prefix` into a network that must have exactly these.

    Raises
    ------
    CheckpointError
        Listing what is missing, unexpected, or of another shape.
    """
    own = {k: v for k, v in tensors.items() if k.startswith(prefix)}
    expected = {prefix + k: tuple(v.shape) for k, v in module.state_dict().items()}
    if found := differences(expected, {k: tuple(v.shape) for k, v in own.items()}):
        raise CheckpointError(f"the tensors do not fit the description:\n{found}")
    module.load_state_dict({k.removeprefix(prefix): v for k, v in own.items()}, strict=True)


def _described(path: Path, data: dict[str, Any], tensors: dict[str, Tensor]) -> ModelSpec:
    """Return the description, taking the arrays of its scalings out of the tensors."""
    parts: dict[str, Any] = {"scaling": None, "inputs": None}
    for prefix, reader in (("scaling", Scaling.from_dict), ("inputs", Conditions.from_dict)):
        if data.get(prefix) is None:
            continue
        try:
            mean, std = (tensors.pop(f"{prefix}.{k}").double().numpy() for k in ("mean", "std"))
        except KeyError as problem:
            raise CheckpointError(f"{path}: the tensor {problem} is missing.") from problem
        try:
            parts[prefix] = reader(data[prefix], mean, std)
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise CheckpointError(f"{path}: the {prefix} cannot be read: {problem}") from problem
    try:
        spec = ModelSpec.from_dict(data, **parts)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise CheckpointError(f"{path}: the model description cannot be read: {problem}") from problem
    for prefix, scaling in _scalings(spec):
        names = [v.name for v in (spec.variables if prefix == "scaling" or spec.inputs is None else spec.inputs.variables)]
        if scaling.std.shape[:1] != (len(names),) or scaling.mean.shape[1:2] != (len(names),):
            raise CheckpointError(
                f"{path}: the {prefix} is of {len(scaling.std)} variables, and the description has {len(names)}: {names}"
            )
    return spec


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: tensor {name!r} holds values that are not finite.")


def content_hash(model: GenerativeModel) -> str:
    """Return a checksum of a model that was never saved, from its description and tensors, without the record of its training."""
    described = {k: v for k, v in model.spec.to_dict().items() if k != "training"}  # which has dates and durations
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    tensors = dict(model.tensors())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    for _, scaling in _scalings(model.spec):
        digest.update(scaling.mean.tobytes() + scaling.std.tobytes())
    return digest.hexdigest()


def _scalings(spec: ModelSpec) -> list[tuple[str, Scaling]]:
    """Return the scalings whose arrays are stored, by the prefix of their tensors."""
    found = (("scaling", spec.scaling), ("inputs", None if spec.inputs is None else spec.inputs.scaling))
    return [(name, scaling) for name, scaling in found if scaling is not None]

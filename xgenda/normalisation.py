"""Mean and standard deviation of the channels of a published model, from arrays or files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xgenda.errors import CheckpointError, OptionError


@dataclass(frozen=True, eq=False)
class Numbers:
    """Mean and standard deviation by channel, each a number or a field (rows, columns) in the order of the model."""

    mean: Mapping[str, np.ndarray]
    std: Mapping[str, np.ndarray]

    def __bool__(self) -> bool:
        return bool(self.mean or self.std)

    def standardised(self, fields: np.ndarray, channels: Sequence[str]) -> np.ndarray:
        """Return (x - mean) / std, for fields (members, channels, rows, columns); they are overwritten."""
        for c, name in enumerate(channels):
            if name in self.mean:
                fields[:, c] -= self.mean[name]
            if name in self.std:
                fields[:, c] /= self.std[name]
        return fields

    def original(self, fields: np.ndarray, channels: Sequence[str]) -> np.ndarray:
        """Undo `standardised`, in double precision."""
        if not self:
            return fields
        out = fields.astype(np.float64)
        for c, name in enumerate(channels):
            if name in self.std:
                out[:, c] *= self.std[name]
            if name in self.mean:
                out[:, c] += self.mean[name]
        return out

    def checksum(self) -> str:
        """Return a checksum of all numbers."""
        found = hashlib.sha256()
        for part in (self.mean, self.std):
            for name in sorted(part):
                found.update(f"{name}{part[name].shape}".encode())
                found.update(np.ascontiguousarray(part[name]).tobytes())
            found.update(b"|")
        return found.hexdigest()


def read_numbers(mean: Any, std: Any, inputs: Sequence[str], outputs: Sequence[str], plane: tuple[int, int]) -> Numbers:
    """Return the normalisation of a model.

    Parameters
    ----------
    mean, std
        By channel, or an array with the first axis along `inputs`, or the path of a ``.npy`` or ``.json`` file of such; None: 0 and 1.
    inputs, outputs
        Channels of the model.
    plane
        Rows and columns of its fields.

    Raises
    ------
    OptionError
        If there is a mean and no std, shapes do not fit, a channel is missing, or values are not finite, or not positive for `std`.
    CheckpointError
        If a file cannot be read.
    """
    every = dict.fromkeys([*inputs, *outputs])
    out = []
    for argument, given in (("mean", mean), ("std", std)):
        found = {} if given is None else _by_channel(_read(given, argument), argument, inputs, plane)
        odd = [n for n in found if n not in every]
        lacking = [n for n in every if n not in found] if given is not None else []
        if odd or lacking:
            raise OptionError(
                f"{argument} "
                f"{'names ' + repr(odd[0]) + ', which is no channel of the model' if odd else 'lacks the channel ' + repr(lacking[0])}; it "
                f"needs {', '.join(map(repr, every))}: {argument}={{{next(iter(every))!r}: {0.0 if argument == 'mean' else 1.0}, ...}}"
            )
        for name, value in found.items():
            if not np.isfinite(value).all() or (argument == "std" and not (value > 0).all()):
                raise OptionError(
                    f"{argument} of {name!r} holds {value.min():g}; finite {'positive ' if argument == 'std' else ''}numbers are needed."
                )
        out.append(found)
    if mean is not None and std is None:
        raise OptionError("mean is given without std, and a model is fed with (x - mean) / std; give both: mean=..., std=...")
    return Numbers(out[0], out[1])


def _read(given: Any, argument: str) -> Any:
    """Return what is in a file, or what was given."""
    if not isinstance(given, (str, os.PathLike)):
        return given
    file = Path(given)
    try:
        if file.suffix == ".npy":
            return np.load(file, allow_pickle=False)  # noqa: TID251
        if file.suffix == ".json":
            return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{argument}={str(given)!r} cannot be read: {problem}") from problem
    raise OptionError(
        f"{argument}={str(given)!r} is not accepted; a .npy or .json file is read, or give an array, or numbers by channel."
    )


def _by_channel(given: Any, argument: str, inputs: Sequence[str], plane: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return numbers or fields by channel."""
    if isinstance(given, Mapping):
        parts = {str(n): v for n, v in given.items()}
    else:
        array = np.asarray(given)
        # files have axes of size one for times, members, rows and columns
        size = len(inputs)
        shape = (size, *plane) if array.size == size * plane[0] * plane[1] and array.shape[-2:] == plane else (size,)
        if array.size != np.prod(shape) or [s for s in array.shape if s > 1] != [s for s in shape if s > 1]:
            raise OptionError(
                f"{argument} has shape {array.shape}; ({size},) is needed, one number for each channel of the input, or {(size, *plane)}."
            )
        parts = dict(zip(inputs, array.reshape(shape), strict=True))
    out = {}
    for name, value in parts.items():
        try:
            found = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            found = np.full(3, np.nan)
        found = found.reshape(()) if found.size == 1 else found
        if found.shape not in ((), plane):
            raise OptionError(
                f"{argument} of {name!r} has shape {np.shape(value)}; a number or a field of shape {plane} is needed."
            )
        out[name] = found
    return out

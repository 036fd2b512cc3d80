"""Which other files an ONNX file keeps its weights in, read without the package onnx.

An ONNX file is a message of Protocol Buffers: fields of a number, a type and a value. Numbers are those of ``onnx.proto``.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from xgenda.errors import CheckpointError

#: Fields that hold messages in which tensors may be, by kind of message.
INSIDE = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def weight_files(file: Path) -> list[str]:
    """Return the names of the files beside `file` that hold weights of its model, sorted.

    Raises
    ------
    CheckpointError
        If it is no ONNX file, or such a file is not there or not beside it.
    """
    if not file.stat().st_size:
        raise CheckpointError(f"{file} is empty.")
    found: set[str] = set()
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
        try:
            _search(view, "model", found)
        except (IndexError, ValueError, UnicodeDecodeError):
            raise CheckpointError(f"{file} is no ONNX file, or was cut short.") from None
    for name in sorted(found):
        beside = (file.parent / name).resolve()
        if not beside.is_relative_to(file.parent.resolve()):
            raise CheckpointError(
                f"{file} reads its weights from {name!r}, which is not in its folder; such files are not opened."
            )
        if not beside.is_file():
            raise CheckpointError(f"{file} reads its weights from {name!r}, which is not there; put it beside.")
    return sorted(found)


def _search(message: memoryview, kind: str, found: set[str]) -> None:
    """Collect the locations of tensors in a message."""
    inside = INSIDE[kind]
    for number, value in _fields(message):
        if number not in inside:
            value.release()
            continue
        if inside[number] == "entry":
            pair = {n: bytes(v).decode() for n, v in _fields(value)}
            if pair.get(1) == "location":
                found.add(pair.get(2, ""))
        else:
            _search(value, inside[number], found)
        value.release()


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and value of the fields of a message that hold bytes; numbers are passed over."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError
            yield number, message[at : at + size]
            at += size
        elif wire == 0:
            _, at = _varint(message, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return a whole number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError

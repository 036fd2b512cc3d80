"""Training from the command line, in one process or many: ``accelerate launch -m xgenda.training data.zarr --out model.safetensors``."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import re
import shlex
import sys
import time as clock
from collections.abc import Mapping, Sequence
from typing import Any

from xgenda.errors import GendaError, OptionError

DATASETS = ("target", "statics")
NOT_HERE = ("ds", "callbacks")
TEXTS = ("out", "name", "licence", "start", "memory", *DATASETS)  # also where they look like numbers
PATIENCE = 60.0  # seconds, in which the launcher ends the other processes once the first one has failed
VALUES = """Values are written as Python writes them, in quotes where the shell would take them apart: --neighbours -1,0,1
--variables "['t2m', 'msl']" --bounds "{'sst': (271, 310)}"; None, or none, where there is to be none. Periods: --validation 2010/2014."""
LITERAL = r"""(?P<value>slice\([^()]*\)|'[^']*'|\{[^{}]*\}|\([^()]*\)|\[[^\[\]]*\]|-?\d[\w.+-]*(?<![.])|True|False|None)?"""


def main(argv: Sequence[str] | None = None) -> int:
    """Call `xgenda.train` with what was typed; every keyword of it is an option.

    Returns
    -------
    int
        0 where all went well, 1 after an error of xgenda, whose message is on standard error, 130 after Ctrl-C.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from xgenda.training.loop import train

    parameters = inspect.signature(train).parameters
    options = vars(_parser(train).parse_args(_joined(sys.argv[1:] if argv is None else argv)))
    if threads := options.pop("threads"):
        torch.set_num_threads(threads)
    try:
        path = options.pop("ds")
        given = {k: opened(v) if k in DATASETS and v is not None else v for k, v in options.items()}
        model = train(opened(path), **given)
    except GendaError as problem:
        _tell(f"xgenda: error: {typed(str(problem), parameters)}")
        return 1
    except KeyboardInterrupt as stop:
        for note in getattr(stop, "__notes__", ["Stopped before the first step."]) if _rank() == 0 else ():
            print(f"xgenda: {typed(note.replace('same call', 'same command'), parameters)}", file=sys.stderr)
        return 130
    if _rank() == 0:
        print(model)
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _tell(text: str) -> None:
    """Print an error once: of several processes the first one says it, and a launcher that ends with a report of its own says it there."""
    if _rank() > 0:
        clock.sleep(PATIENCE)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        try:
            with open(report, "w", encoding="utf-8") as file:
                about = {"py_callstack": text, "timestamp": str(int(clock.time()))}
                json.dump({"message": {"message": text, "extraInfo": about}}, file)
            return
        except OSError:
            pass
    print(text, file=sys.stderr)


def typed(message: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """Return a message with its keywords as they are typed in a shell, but for those of calls."""

    def option(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        before = message[: match.start()]
        if name not in parameters or before.count("(") > before.count(")"):
            return match[0]
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            return flag
        if isinstance(parameters[name].default, bool) and value in ("True", "False"):
            return flag if value == "True" else f"--no-{flag[2:]}"
        if period := re.fullmatch(r"slice\('([^']*)', '([^']*)'(?:, None)?\)", value):
            return f"{flag} {period[1]}/{period[2]}"
        return f"{flag} {shlex.quote(value[1:-1]) if value[0] == chr(39) else value if value[0] not in '([{' else chr(34) + value + chr(34)}"

    return re.sub(rf"(?<![\w.])(?P<name>[a-z_]+)=(?![=]){LITERAL}", option, message)


def opened(path: str) -> Any:
    """Open a netCDF file, several by a pattern, or a Zarr store, here or on an object store.

    Raises
    ------
    OptionError
        If it cannot be opened.
    """
    import xarray as xr

    try:
        if "*" in path and "://" not in path:
            return xr.open_mfdataset(path)
        zarr = "://" in path or os.path.isdir(path) or path.rstrip("/").endswith(".zarr")
        return xr.open_zarr(path) if zarr else xr.open_dataset(path)
    except (OSError, ValueError) as problem:
        raise OptionError(
            f"{path!r} cannot be opened: {problem}. Give a netCDF file, a pattern of them in quotes, or a Zarr store."
        ) from problem


def _parser(train: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xgenda.training", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        description=f"Train a model; the options are the keywords of xgenda.train. {VALUES}",
        epilog="On several GPUs: accelerate launch --num_processes 4 -m xgenda.training data.zarr --out model.safetensors. On two processors: "
        "torchrun --nproc-per-node 2 -m xgenda.training data.zarr --out model.safetensors --device cpu",
    )  # fmt: skip
    parser.add_argument("ds", help="training fields: a netCDF file, a pattern, or a Zarr store")
    parser.add_argument("--threads", type=int, default=None, help="of the processor, for each process")
    described = _described(train)
    for name, parameter in inspect.signature(train).parameters.items():
        if name in NOT_HERE:
            continue
        file = "A netCDF file, a pattern, or a Zarr store. " if name in DATASETS else ""
        shown = f"{file}{described.get(name, '')} (default {parameter.default!r})".replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        if isinstance(parameter.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=shown)
        else:
            kind = str if name in TEXTS else _period if name == "validation" else _value
            kind = _or_none if kind is _value and "None" in str(parameter.annotation) else kind
            parser.add_argument(flag, type=kind, metavar="VALUE", help=shown)
    return parser


def _described(function: Any) -> dict[str, str]:
    """Return what the section Parameters of a docstring says of each."""
    section = (inspect.getdoc(function) or "").partition("Parameters\n----------\n")[2].partition("\n\n")[0]
    out: dict[str, str] = {}
    for names, text in re.findall(r"^(\S.*)\n((?: +.*(?:\n|$))+)", section, re.MULTILINE):
        out |= dict.fromkeys(names.split(", "), " ".join(text.replace("`", "").split()))
    return out


def _joined(argv: Sequence[str]) -> list[str]:
    """Return the arguments with values that begin like a negative number, -1,0,1, joined to their options."""
    out: list[str] = []
    for text in argv:
        if re.match(r"-\.?\d", text) and out and re.fullmatch(r"--[\w-]+", out[-1]):
            out[-1] += f"={text}"
        else:
            out.append(text)
    return out


def _period(text: str) -> Any:
    """Read an interval of times as ISO 8601 writes it, 2010/2014, or with a colon, or as a slice; or a part."""
    if match := re.fullmatch(r"slice\(\s*(?:'([^']*)'|None)\s*,\s*(?:'([^']*)'|None)\s*\)", text.replace('"', "'")):
        return slice(match[1], match[2])
    mark = "/" if "/" in text else ":" if text.count(":") == 1 else None
    if mark is None:
        return _or_none(text)
    first, _, last = text.partition(mark)
    return slice(first.strip() or None, last.strip() or None)


def _or_none(text: str) -> Any:
    """Read a value of an option that may be None."""
    return None if text.lower() == "none" else _value(text)


def _value(text: str) -> Any:
    """Read a number, a list, a mapping or None as Python writes them; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())

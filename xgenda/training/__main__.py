"""Training from the command line, in one process or many: ``accelerate launch -m xgenda.training data.zarr --out model.safetensors``."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Any

from xgenda.errors import GendaError, OptionError

DATASETS = ("target", "statics")
NOT_HERE = ("ds", "callbacks")
TEXTS = ("out", "name", "licence", "start", *DATASETS)  # also where they look like numbers


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

    options = vars(_parser(train).parse_args(argv))
    if threads := options.pop("threads"):
        torch.set_num_threads(threads)
    try:
        path = options.pop("ds")
        given = {k: opened(v) if k in DATASETS and v is not None else v for k, v in options.items()}
        model = train(opened(path), **given)
    except GendaError as problem:
        print(f"xgenda: error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        for note in getattr(stop, "__notes__", ["Stopped before the first step."]):
            print(
                f"xgenda: {note.replace('call and resume=True', 'command and --resume').replace('out=', '--out ')}",
                file=sys.stderr,
            )
        return 130
    if int(os.environ.get("RANK", "0")) == 0:
        print(model)
    return 0


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
        prog="python -m xgenda.training", argument_default=argparse.SUPPRESS,
        description="Train a model; the options are the keywords of xgenda.train.",
        epilog="On several GPUs: accelerate launch --num_processes 4 -m xgenda.training data.zarr --out model.safetensors. On two processors: "
        "torchrun --nproc-per-node 2 -m xgenda.training data.zarr --out model.safetensors --device cpu",
    )  # fmt: skip
    parser.add_argument("ds", help="training fields: a netCDF file, a pattern, or a Zarr store")
    parser.add_argument("--threads", type=int, default=None, help="of the processor, for each process")
    for name, parameter in inspect.signature(train).parameters.items():
        if name in NOT_HERE:
            continue
        shown = "" if parameter.default is inspect.Parameter.empty else f"default {parameter.default!r}"
        flag = f"--{name.replace('_', '-')}"
        if isinstance(parameter.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=shown)
        else:
            kind = str if name in TEXTS else _period if name == "validation" else _value
            parser.add_argument(flag, type=kind, metavar="VALUE", help=shown)
    return parser


def _period(text: str) -> Any:
    """Read an interval of times as ISO 8601 writes it, 2010/2014, or a part."""
    first, slash, last = text.partition("/")
    return slice(first, last) if slash else _value(text)


def _value(text: str) -> Any:
    """Read a number, a list, a mapping or None as Python writes them; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``xgenda demo`` and ``xgenda models``; the library is imported when a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from xgenda.errors import GendaError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments without the name of the program; by default those of the process.

    Returns
    -------
    int
        0 where all went well, 1 after an error of xgenda (its message is on standard error), 2 where no command was given.

    Examples
    --------
    >>> from xgenda.cli import main
    >>> main(["models"])  # doctest: +SKIP
    """
    # Before torch is loaded: waiting threads that spin make everything several times slower where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return _demo(options) if options.command == "demo" else _models()
    except GendaError as problem:
        print(f"xgenda: error: {problem}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xgenda", description="Generative data assimilation and downscaling for xarray.")
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="assimilate and downscale the bundled data; print scores, write netCDF files and maps",
        description="Assimilate real stations into a real forecast, downscale and assimilate a climate run with the bundled "
        "models, print scores beside those of baselines, and write netCDF files and maps. Takes one to three minutes.",
    )
    demo.add_argument("--out", default="xgenda-demo", metavar="DIR", help="folder to write (default: %(default)s)")
    demo.add_argument("--members", type=_count, default=16, metavar="N", help="ensemble size, from 2 (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="key of the random numbers (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run")
    commands.add_parser("models", help="list the models that can be used by name", description="List the registered models.")
    return parser


class _Version(argparse.Action):
    """Print the version; it is looked up when asked for, not at every start."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from xgenda.metadata import package_version

        print(f"xgenda {package_version()}")
        parser.exit()


def _count(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is too few: an ensemble has at least 2 members")
    return number


def _demo(options: argparse.Namespace) -> int:
    from xgenda.demo import run

    run(options.out, members=options.members, seed=options.seed, overwrite=options.overwrite)
    return 0


def _models() -> int:
    from xgenda.models.store import list_models

    table = list_models()
    if table.empty:
        print("No model is registered.")
        return 0
    table["size"] = [f"{size / 1e6:.1f} MB" for size in table["size"]]
    print(table.to_string())
    return 0

"""The command line: ``xgenda demo``, ``models`` and ``weights``; the library is imported when a command needs it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xgenda.errors import GendaError

if TYPE_CHECKING:
    from xgenda.models.entries import Entry


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments without the name of the program; by default those of the process.

    Returns
    -------
    int
        0 where all went well, 1 after an error of xgenda (its message is on standard error), or where a file is not as it should be,
        2 where no command was given.

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
    commands: dict[str, Callable[[argparse.Namespace], int]] = {"demo": _demo, "models": _models, "weights": _weights}
    try:
        return commands[options.command](options)
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
    weights = commands.add_parser(
        "weights",
        help="list, fetch and verify the files of models",
        description="The files of the registered models: those of the package, of XGENDA_REGISTRY and of installed packages. "
        "Files are kept in the cache (environment variable XGENDA_CACHE), a copy of which serves a machine without network.",
    )
    actions = weights.add_subparsers(dest="action", metavar="action", required=True)
    actions.add_parser("list", help="list the registered models", description="List the registered models.")
    fetch = actions.add_parser(
        "fetch",
        help="download the files of models, for use without network",
        description="Download the files of models that are not on this machine, and verify all of them.",
    )
    fetch.add_argument("names", nargs="*", metavar="NAME", help="registered names, or addresses: hf://..., https://..., s3://...")
    fetch.add_argument("--all", action="store_true", help="all registered models")
    verify = actions.add_parser(
        "verify",
        help="compare files with their registered checksums",
        description="Compare size and SHA-256 of the files on this machine with the registered ones. The exit status is 1 where one "
        "differs, or where a model that was named is not here.",
    )
    verify.add_argument("names", nargs="*", metavar="NAME", help="registered names (default: all)")
    where = actions.add_parser(
        "where",
        help="print the paths of model files",
        description="Print where the file of each model is; the exit status is 1 where one that was named is not here. With one name "
        "the path is printed alone.",
    )
    where.add_argument("names", nargs="*", metavar="NAME", help="registered names (default: all)")
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


def _models(_: argparse.Namespace) -> int:
    from xgenda.models.store import list_models

    table = list_models()
    if table.empty:
        print("No model is registered.")
        return 0
    table["size"] = [f"{size / 1e6:.1f} MB" for size in table["size"]]
    print(table.to_string())
    return 0


def _weights(options: argparse.Namespace) -> int:
    actions = {"list": _models, "fetch": _fetch, "verify": _verify, "where": _paths}
    return actions[options.action](options)


def _fetch(options: argparse.Namespace) -> int:
    """Download what was asked for; a model that fails keeps no other from being fetched."""
    from xgenda.models.store import fetch, find_file, registry

    entries = registry()
    names = [*options.names, *(n for n in entries if options.all and n not in options.names)]
    if not names:
        print("xgenda: error: name the models to fetch, or type: xgenda weights fetch --all", file=sys.stderr)
        return 2
    failed = 0
    for name in names:
        try:
            if name in entries:
                paths = [fetch(entries[name], file if number else None) for number, file in enumerate(entries[name].files)]
            else:
                paths = [find_file(name)[0]]
        except GendaError as problem:
            text = re.sub(r"xgenda\.load_model\('([^']*)'\)", r"xgenda weights fetch \1", str(problem))
            print(f"xgenda: error: {text}", file=sys.stderr)
            failed += 1
        else:
            for path in paths:
                print(f"{name}\t{path}")
    return 1 if failed else 0


def _verify(options: argparse.Namespace) -> int:
    """Print the state of each file: ok, damaged, missing, or not fetched."""
    from xgenda.models.store import path_of, state_of

    words = {"bundled": "ok", "cached": "ok", "remote": "not fetched", "damaged": "damaged", "missing": "missing"}
    wrong = {"damaged", "missing"} | ({"not fetched"} if options.names else set())
    status = 0
    for entry in _chosen(options.names):
        for number, file in enumerate(entry.files):
            asked = file if number else None
            word = words[state_of(entry, asked, verify=True)]
            print(f"{entry.name}\t{word}\t{path_of(entry, asked)}")
            if word in wrong:
                status = 1
                if file.url is not None:
                    remedy = f"type: xgenda weights fetch {entry.name}"
                elif entry.root != entry.registry.parent:  # part of the package
                    remedy = "type: pip install --force-reinstall xgenda"
                else:
                    remedy = f"put it there again, or correct {entry.registry}"
                print(f"xgenda: {entry.name}: {file.label} is {word}; {remedy}", file=sys.stderr)
    return status


def _paths(options: argparse.Namespace) -> int:
    """Print where files are."""
    from xgenda.models.store import path_of, state_of

    status = 0
    for entry in _chosen(options.names):
        print(path_of(entry) if len(options.names) == 1 else f"{entry.name}\t{path_of(entry)}")
        if options.names and state_of(entry) not in ("bundled", "cached"):
            print(f"xgenda: {entry.name} is not on this machine; type: xgenda weights fetch {entry.name}", file=sys.stderr)
            status = 1
    return status


def _chosen(names: Sequence[str]) -> list[Entry]:
    """Return the entries of these names; of all models where there are none."""
    from xgenda.errors import ModelNotFoundError, did_you_mean
    from xgenda.models.store import registry

    entries = registry()
    for name in names:
        if name not in entries:
            known = ", ".join(map(repr, entries))
            raise ModelNotFoundError(f"No model is named {name!r}.{did_you_mean(name, entries)} Registered models: {known}.")
    return [entries[name] for name in names] if names else list(entries.values())

"""What an interrupted training leaves on disk, so that it can go on where it was.

Beside the model file ``model.safetensors`` there is a folder ``model.training`` while training runs, with one file for each network. Every file is
written aside and renamed, so that the last one is whole whatever happens; it holds weights, averages, the state of the optimiser and the
step, and in its header which data and options it belongs to. These files are removed when the model is written, and the folder, unless it
holds anything else.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time as clock
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from xgenda.errors import CheckpointError, OptionError, OutputExistsError
from xgenda.files import aside
from xgenda.formatting import user_level
from xgenda.models.store import PARTS

FORMAT = 1
CONTENT = dict.fromkeys(("ds", "target", "statics"), "the data differ") | {"start": "another model"}
SAVE_EVERY = 10.0  # seconds, at least
SHARE = 0.02  # of the time that saving may take


@dataclass
class Journal:
    """Training states of the networks of one model.

    Parameters
    ----------
    folder
        Where they are; None: nothing is kept.
    options
        What the result depends on, by the name of the argument; compared when training is resumed.
    recalled
        Seconds that networks took which were found finished.
    """

    folder: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    recalled: float = 0.0
    _saved: float = field(default_factory=clock.monotonic)
    _cost: float = 0.0
    _failed: bool = False

    def open(self, *, resume: bool) -> None:
        """Make the folder, or check what is in it.

        Raises
        ------
        OutputExistsError
            If there is a training that was not asked to be resumed.
        OptionError
            If it is one of other data or options; the message lists the differences.
        """
        if self.folder is None:
            return
        found = list(self._states())
        if found and not resume:
            raise OutputExistsError(
                f"{self.folder} holds a training that was interrupted. Go on with it: resume=True, or start again: overwrite=True"
            )
        for path in found:
            self.compare(_header(path)["options"], path)
        for path in self._partial():
            path.unlink(missing_ok=True)

    @property
    def holds(self) -> bool:
        """Whether there is a state to go on from."""
        return any(True for _ in self._states())

    @property
    def asked(self) -> dict[str, Any]:
        """Return the options as a file has them."""
        found: dict[str, Any] = json.loads(json.dumps(self.options, default=str))
        return found

    def compare(self, before: Mapping[str, Any], path: Path) -> None:
        """Refuse what belongs to other data or options.

        Raises
        ------
        OptionError
            With the differences.
        """
        now = self.asked
        lines = [
            f"  {k}: {CONTENT[k]}"
            if k in CONTENT and before.get(k) and now.get(k)  # checksums, which tell nobody anything
            else f"  {k}: {before.get(k, 'not there')!r} then, {now.get(k, 'not there')!r} now"
            for k in sorted({*before, *now})
            if before.get(k) != now.get(k)
        ]
        if lines:
            raise OptionError(
                f"resume=True goes on with the same data and options only, and those of {path} differ:\n"
                + "\n".join(lines)
                + "\nCall train as "
                "before, or start again: resume=False, overwrite=True"
            )

    def load(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and values of a network, or None where nothing was saved."""
        path = self._path(stage)
        if path is None or not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (not a mapping)
        return tensors, _header(path)["values"]

    def due(self) -> bool:
        """Return whether it is time to save."""
        return self.folder is not None and clock.monotonic() - self._saved >= max(SAVE_EVERY, self._cost / SHARE)

    def save(self, stage: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bool:
        """Write the state of a network; where that fails, as on a full disk, the last one stays, and training goes on with a warning."""
        path = self._path(stage)
        if path is None:
            return False
        begin = clock.monotonic()
        header = {"training": json.dumps({"format": FORMAT, "options": self.asked, "values": dict(values)})}
        try:
            path.parent.mkdir(exist_ok=True)
            with aside(path) as partial:
                save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata=header)
        except Exception as problem:  # safetensors has an error of its own for a full disk
            if not self._failed:
                warnings.warn(
                    f"The state of the training could not be saved to {path} ({problem}). Training goes on; what was saved before is whole.",
                    stacklevel=user_level(),
                )
            self._failed = True
            return False
        finally:
            self._saved = clock.monotonic()
            self._cost = self._saved - begin
        self._failed = False
        return True

    def close(self) -> None:
        """Remove what is no longer needed, and nothing that is somebody else's."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                for path in [*self._states(), *self._partial()]:
                    path.unlink(missing_ok=True)
                self.folder.rmdir()

    def _states(self) -> Iterator[Path]:
        """Yield the files that are whole."""
        paths = () if self.folder is None else (self.folder / f"{n}.safetensors" for n in PARTS)
        return (path for path in paths if path.is_file())

    def _partial(self) -> Iterator[Path]:
        """Yield files that are half written, by processes that were killed."""
        if self.folder is not None:
            patterns = (".tmp*", *(f".{name}.safetensors.partial-*" for name in PARTS))  # safetensors' own and ours
            yield from (path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file())

    def _path(self, stage: str) -> Path | None:
        if self.folder is None:
            return None
        assert stage in PARTS, f"{stage} would neither be found again nor removed"
        return self.folder / f"{stage}.safetensors"


class Interrupts:
    """Ctrl-C between two steps instead of within one, whose half would be no state to go on from; a second one stops at once.

    Attributes
    ----------
    asked
        Whether it was typed.
    """

    def __init__(self) -> None:
        self.asked, self._ours = False, False

    def __enter__(self) -> Interrupts:
        """Take over, unless somebody else has, or this is not the thread that gets signals."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._remember)
            self._ours = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give back, and raise what was not raised yet."""
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.asked and kind is None:
            raise KeyboardInterrupt

    def _remember(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})["training"])
        if found["format"] != FORMAT:
            raise CheckpointError(f"{path} is of another version of xgenda. Start again: overwrite=True")
    except CheckpointError:
        raise
    except Exception as problem:
        raise CheckpointError(f"{path} is no state of a training ({problem}). Start again: overwrite=True") from problem
    return found

"""What is shown while work is done."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any


def bar_class() -> Any:
    """Return the tqdm class for where this runs: notebook or terminal."""
    # the notebook bar without ipywidgets only warns
    notebook = "ipykernel" in sys.modules and importlib.util.find_spec("ipywidgets") is not None
    return importlib.import_module("tqdm.notebook" if notebook else "tqdm.std").tqdm


class progress_bar:
    """A tqdm bar in notebooks and terminals, silent elsewhere; ``progress=True`` or ``False`` decides."""

    def __init__(self, total: int, progress: bool | None, description: str = "sampling") -> None:
        self.total, self.progress, self.description = total, progress, description

    def __enter__(self) -> Callable[[int], None]:
        """Return the function to call with finished units of work."""
        self.bar = bar_class()(
            total=self.total,
            desc=self.description,
            disable=None if self.progress is None else not self.progress,
            leave=False,
        )

        def advance(n: int) -> None:
            self.bar.update(n)

        return advance

    def note(self, text: str) -> None:
        """Show a text behind the bar."""
        self.bar.set_postfix_str(text)

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        self.bar.close()


def rounded(value: object) -> str:
    """Return a number with at most four digits that count, and anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Return a time span in the largest unit of which it is at least one."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if abs(seconds) >= size:
            return f"{seconds / size:.4g} {unit if seconds != size else unit[:-1]}"
    return f"{seconds:.4g} seconds"


def user_level() -> int:
    """Return the ``stacklevel`` with which a warning of the calling function points to the line that called this package."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]:
        frame, level = frame.f_back, level + 1
    return level


def brief(given: object) -> str | None:
    """Return an option as text where that is short, else its type."""
    if given is None:
        return None
    text = str(given)
    return text if len(text) <= 200 and "\n" not in text else f"{type(given).__name__}"


def written_call(name: str, arguments: Mapping[str, object]) -> str:
    """Return a call as one would type it, without what is None."""
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items() if v is not None)})"

"""What is shown while work is done."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


def bar_class() -> Any:
    """Return the tqdm class for where this runs: notebook or terminal."""
    # the notebook bar without ipywidgets only warns
    notebook = "ipykernel" in sys.modules and importlib.util.find_spec("ipywidgets") is not None
    return importlib.import_module("tqdm.notebook" if notebook else "tqdm.std").tqdm

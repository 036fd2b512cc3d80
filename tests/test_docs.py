"""What the pages tell users to type runs as it stands."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/grids.md",
    "docs/observations.md",
    "docs/cycling.md",
    "docs/downscaling.md",
    "docs/models.md",
    "docs/training.md",
    "docs/methods.md",
)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one page follow each other, in an empty folder."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XGENDA_REGISTRY", "")  # which a page sets
    names: dict[str, object] = {}
    for k, block in enumerate(blocks):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* have no neighbours in ds")
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part in the Zarr format 3")
            exec(compile(block, f"{page}, block {k}", "exec"), names)

"""``python -m xgenda``: the command line."""

from __future__ import annotations

from xgenda.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

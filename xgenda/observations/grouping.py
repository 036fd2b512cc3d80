"""Rows that are equal in some columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def first_of_each(keys: Sequence[np.ndarray], rank: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Group rows with equal `keys`; return the row of each group that is first by `rank`, and the group of each row.

    Parameters
    ----------
    keys
        Columns that are equal within a group, shape (n,) each.
    rank
        Columns that decide, the most important first.
    """
    order = np.lexsort((*reversed(rank), *reversed(keys)))
    starts = np.zeros(len(order), dtype=bool)
    starts[:1] = True
    for key in keys:
        ordered = key[order]
        starts[1:] |= ordered[1:] != ordered[:-1]
    group = np.empty(len(order), dtype=np.int64)
    group[order] = np.cumsum(starts) - 1
    return order[starts], group

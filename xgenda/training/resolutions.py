"""Training on several resolutions: which are accepted, how often each is drawn, and what a step then costs.

A step takes the whole batch on the grid of the data, or on one of 1 / f as many rows and columns of the same box: the states without the waves
that this does not show, under noise that is the same random function without them. What the network learns there of the long waves costs
1 / f^2 of a step, and only what is shorter has to be learnt on the fine grid.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from xgenda.errors import OptionError
from xgenda.training.architectures import default_modes
from xgenda.training.draws import Draws

SMALLEST = 8  # rows and columns of the coarsest grid: two cells at the deepest level of the network
EXAMPLE = "resolutions=(1, 2, 4)"


def check_resolutions(
    given: Any, task: str, architecture: str, noise: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the factors of coarsening in ascending order, (1,) where one resolution is asked for.

    Parameters
    ----------
    given, task, architecture
        As in `xgenda.train`.
    noise, options
        `noise` and `network_options` of it, checked.

    Raises
    ------
    OptionError
        Saying what to type.
    """
    whole = isinstance(given, (tuple, list, range)) and all(
        not isinstance(f, bool) and isinstance(f, numbers.Integral) and int(f) >= 1 for f in given
    )
    found = tuple(sorted(map(int, given))) if whole else ()
    if 1 not in found or len(set(found)) < len(found):
        raise OptionError(
            f"resolutions={given!r} is not accepted; give different whole numbers with 1 among them, the grid of ds, and 2 for half as many "
            f"rows and columns: {EXAMPLE}"
        )
    if len(found) == 1:
        return found
    shown = f"resolutions={found}"
    if task != "prior":
        raise OptionError(f"{shown} belongs to task='prior', and has no effect with task={task!r}. Leave it out.")
    if architecture != "uno":
        raise OptionError(
            f"{shown} needs a network whose lengths are no numbers of cells, and architecture={architecture!r} is another one; pass "
            f"architecture='uno' too, or leave resolutions out."
        )
    if not noise:
        raise OptionError(
            f"{shown} needs noise that is one function on all grids, and white noise is another one on each; pass noise={{'kind': "
            f"'exponential', 'length': 0.1}} and periodic='both' too, or leave resolutions out."
        )
    if options.get("resolution") is not None:
        raise OptionError(
            f"{shown} trains a network that works on the grid of its input, and network_options has 'resolution', one grid for all. Leave one "
            f"of them out."
        )
    return found


def check_coarse(resolutions: Sequence[int], plane: tuple[int, int], masked: bool, options: Mapping[str, Any]) -> None:
    """Refuse factors by which a grid cannot be coarsened.

    Parameters
    ----------
    resolutions
        As `check_resolutions` returns them.
    plane
        Rows and columns of the grid.
    masked
        Whether there are masked cells.
    options
        `network_options`.

    Raises
    ------
    OptionError
        Saying what to type.
    """
    if len(resolutions) == 1:
        return
    ny, nx = plane
    shown = f"resolutions={tuple(resolutions)}"
    if masked:
        raise OptionError(f"{shown} cannot be had of fields with masked cells, which have no waves. Leave it out.")
    modes = int(options.get("modes", default_modes(plane)))
    least = max(SMALLEST, modes)
    possible = [f for f in range(1, min(plane) // least + 1) if ny % f == 0 and nx % f == 0]
    remedy = f"Choose from {possible}: resolutions={tuple(possible[:3])}" if possible[1:] else "Leave it out."
    for f in resolutions[1:]:
        if ny % f or nx % f:
            raise OptionError(f"{shown}: the grid of {ny} x {nx} cells cannot be divided by {f}. {remedy}")
        if min(plane) // f < least:
            why = (
                f"the modes of the network, network_options={{'modes': {modes}}}"
                if modes > SMALLEST
                else f"the least, {SMALLEST}"
            )
            raise OptionError(f"{shown}: {ny // f} x {nx // f} rows and columns are fewer than {why}. {remedy}")


def drawn(resolutions: Sequence[int], draws: Draws) -> int:
    """Return the factor of a step, and 1 in validation.

    The probability of f is proportional to f^2, which a step costs less: each resolution gets the same processor time. With equal numbers of
    steps the finest would take nearly all of it, and learn again what the coarse ones teach for a fraction.
    """
    return resolutions[draws.choice([f**2 for f in resolutions])]


def step_cost(resolutions: Sequence[int]) -> float:
    """Return what a step costs on average, with one on the finest grid as the unit, and cost in proportion to cells."""
    return len(resolutions) / sum(f**2 for f in resolutions)

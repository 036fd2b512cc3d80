"""Which network goes with a grid, and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xgenda.errors import GridError, OptionError, check_count, check_flag, check_pair
from xgenda.grids import Grid
from xgenda.networks.icosahedron import LARGEST_REFINEMENT, suitable_refinement
from xgenda.networks.unet import SPHERE

WIDTHS = {"unet": 16, "songunet": 16, "mesh": 32, "uno": 16}
MESH_OPTIONS = ("refinement", "rounds", "position", "checkpointing", "one_at_a_time")
OPERATOR_OPTIONS = ("modes", "rank", "resolution", "position")
OPTIONS: Mapping[str, tuple[str, ...]] = {"mesh": MESH_OPTIONS, "uno": OPERATOR_OPTIONS}
EXAMPLES = {"mesh": "{'refinement': 4, 'rounds': 8}", "uno": "{'modes': 16, 'rank': 8}"}
ROUNDS = 4
STEPS_FOR = {64: 80_000, 32: 20_000}  # planned steps from which a convolutional network is so wide
VALUES_PER_PARAMETER = 10  # of independent training values, at least, where it is wider than the narrowest


def suitable_width(architecture: str, steps: int | None, values: float, parameters: Callable[[int], int]) -> int:
    """Return the width of a network for which none was asked.

    Narrow networks learn more in short trainings, because they take more steps in the same time. Wider ones are for trainings that
    are long, in steps that are planned, and have much to learn from. What a time budget leaves for steps is known to nobody: the
    narrowest.

    Parameters
    ----------
    architecture
        'mesh' has one width.
    steps
        Planned; None where a time was given.
    values
        Independent values in the training fields: independent fields times the values of each.
    parameters
        Returns how many parameters the network has at a width.
    """
    if steps is not None and architecture != "mesh":
        for width, least in STEPS_FOR.items():
            if steps >= least and values >= VALUES_PER_PARAMETER * parameters(width):
                return width
    return WIDTHS[architecture]


def check_network_options(architecture: str, given: Any) -> dict[str, Any]:
    """Return what is asked of a network beside its width, checked.

    Raises
    ------
    OptionError
        Saying what would be accepted.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise OptionError(
            f"network_options={given!r} is not accepted; give a mapping: "
            f"network_options={EXAMPLES.get(architecture, EXAMPLES['mesh'])}"
        )
    if given and architecture not in OPTIONS:
        other = next((k for k, names in OPTIONS.items() if set(given) <= set(names)), "mesh")
        raise OptionError(f"network_options={dict(given)} belongs to architecture={other!r}; pass it too, or leave it out.")
    known = OPTIONS.get(architecture, ())
    if stray := sorted(set(map(str, given)) - set(known)):
        kind = {"mesh": "mesh network", "uno": "neural operator"}[architecture]
        raise OptionError(f"network_options has {stray}, which a {kind} does not take; it takes {', '.join(map(repr, known))}.")
    for name, value in given.items():
        what = f"network_options[{name!r}]"
        if name in ("checkpointing", "one_at_a_time"):
            check_flag(what, value)
        elif name == "resolution":
            check_pair(what, value, 2)
        else:
            check_count(what, value, 0 if name in ("refinement", "position") else 1)
    if given.get("refinement", 0) > LARGEST_REFINEMENT:
        raise OptionError(f"network_options['refinement']={given['refinement']} is not accepted; at most {LARGEST_REFINEMENT}.")
    return dict(given)


def check_architecture(asked: str, kept: str, given: Mapping[str, Any]) -> None:
    """Refuse another architecture than that of the network to start from, and options of it.

    Raises
    ------
    OptionError
        Saying what to leave out.
    """
    if asked not in ("unet", kept):
        raise OptionError(
            f"architecture={asked!r} has no effect with start, whose networks, of the architecture {kept!r}, are kept. Leave it out."
        )
    if fixed := sorted({"rounds", "position"} & set(given)):
        raise OptionError(f"network_options has {fixed}, which have no effect with start, whose network is kept. Leave them out.")


def mesh_arguments(
    channels: int, condition: int, width: int, grid: Any, periodic: Any, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the arguments of a mesh network.

    Raises
    ------
    GridError, OptionError
        If the grid is not one of latitudes and longitudes.
    """
    if not isinstance(grid, Grid):
        raise GridError(
            f"architecture='mesh' needs latitude and longitude along one axis each, and the grid is {grid.describe()}. Use "
            f"architecture='unet', or interpolate first: ds.genda.regrid(target)"
        )
    if periodic == "both":
        raise OptionError(
            "architecture='mesh' is for the sphere, and periodic='both' for boxes that are no part of it; use architecture='unet'."
        )
    options = {"refinement": suitable_refinement(grid.latitude, grid.longitude), "rounds": ROUNDS, "position": 2} | dict(
        given or {}
    )
    return {
        "architecture": "mesh", "channels": channels, "condition_channels": condition, "width": width,
        "latitude": grid.latitude.tolist(), "longitude": grid.longitude.tolist(), **options,
    }  # fmt: skip


def default_modes(plane: tuple[int, int]) -> int:
    """Return the highest wave of the layers of a neural operator for which none was asked."""
    return max(2, min(plane) // 4)


def operator_arguments(
    channels: int, condition: int, width: int, grid: Any, periodic: Any, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the arguments of a neural operator, which on other grids than this one goes on working on this one's waves."""
    periodic = bool(grid.periodic) if periodic is None else periodic
    options: dict[str, Any] = {
        "modes": default_modes(grid.plane), "rank": None, "position": 0 if periodic == "both" else 2, "resolution": list(grid.plane),
    } | dict(given or {})  # fmt: skip
    if isinstance(options["resolution"], (tuple, list)):
        options["resolution"] = list(options["resolution"])
    return {
        "architecture": "uno", "channels": channels, "condition_channels": condition, "width": width, "multipliers": [1, 2, 2],
        "shape": list(grid.plane), "periodic": periodic, **options,
    }  # fmt: skip


def around_the_sphere(grid: Any, halvings: int) -> str | None:
    """Return how a convolution goes on across the poles of a grid: 'sphere', 'poles' where its rows end at the poles; None where it does not.

    The meridian across the pole must be one of the grid at each of its halvings.
    """
    if not isinstance(grid, Grid) or not grid.periodic or len(grid.latitude) < 4 or grid.plane[1] % (2 * 2**halvings):
        return None
    ends = 90.0 - np.array([-grid.latitude[0], grid.latitude[-1]])
    steps = np.diff(grid.latitude)[[0, -1]]
    if (ends < 0.25 * steps).all():
        return SPHERE[1]
    # half a row away, but for Gaussian latitudes and the like
    return SPHERE[0] if ((ends >= 0.25 * steps) & (ends < 0.9 * steps)).all() else None

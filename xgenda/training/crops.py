"""Parts of the grid that the batches of a training show: which are accepted, where they lie, and whether reading them alone saves anything."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from xgenda.diffusion.tiles import Tiling, suggest_tile
from xgenda.errors import OptionError, check_pair
from xgenda.training.sources import Source

MULTIPLE = 4  # of the rows and columns of parts: what networks halve twice
SMALLEST = 8  # rows and columns of a part: two cells at the deepest level
LARGEST_PLANE = 448  # rows or columns, above which 'auto' makes parts
SAMPLED = 64  # fields whose correlation lengths 'auto' looks at
Tile = tuple[int, int]


def check_tile(tile: Any, source: Source, periodic: Any) -> Tile | str | None:
    """Return rows and columns of the parts that a prior is trained on, 'auto', or None where nothing is asked for.

    Parameters
    ----------
    tile, periodic
        As in `xgenda.train`.
    source
        What is trained on; nothing is read.

    Raises
    ------
    OptionError
        If no such parts can be cut from the grid, with what can be typed instead.
    """
    if tile is None or (isinstance(tile, str) and tile == "auto"):
        return None if tile is None else "auto"
    found = _pair(tile, source.dims, source.grid.plane)
    _check_cells(found, source.grid.plane)
    check_wraps(found, source.grid.plane, periodic, source.grid.periodic)
    return found


def check_wraps(tile: Tile, plane: Tile, periodic: Any, wraps: bool) -> None:
    """Refuse parts of an axis around which a network is to go on, or that go on where it is not to: around a grid that `wraps`.

    Raises
    ------
    OptionError
        If `periodic` is that of `xgenda.train`, and not None, and `tile` cuts the axis.
    """
    if periodic == "both" and tile != plane:
        raise OptionError(
            f"tile={tile} cuts a doubly periodic box, around which the network goes on in both directions; leave out tile, or periodic='both'."
        )
    if periodic is False and wraps and tile[1] != plane[1]:
        raise OptionError(
            f"periodic=False has no effect with tile={tile}: on a grid around the globe parts go across the seam; leave out periodic, or show all "
            f"{plane[1]} columns: tile=({tile[0]}, {plane[1]})"
        )
    if periodic is True and tile[1] != plane[1]:
        raise OptionError(
            f"periodic=True lets the network go on around all {plane[1]} columns, which tile={tile} cuts; leave out periodic, or show them all: "
            f"tile=({tile[0]}, {plane[1]})"
        )


def inherited_tile(tile: Sequence[int] | None, before: Tile, plane: Tile) -> Tile | None:
    """Return the parts on which a model goes on being trained: its own, on another grid as far as that goes."""
    if tile is None:
        return None
    rows, columns = (n if t == whole else min(t, n) for t, whole, n in zip(tile, before, plane, strict=True))
    return rows, columns


def _pair(tile: Any, dims: Sequence[str], plane: Tile) -> Tile:
    if not isinstance(tile, Mapping):
        return check_pair("tile", tile)
    names: list[tuple[str, str]] = [(dims[0], dims[1]), ("latitude", "longitude")]
    axes = next((pair for pair in names if set(tile) <= set(pair)), None)
    if axes is None or not tile:
        raise OptionError(
            f"tile={dict(tile)} does not name rows and columns; type tile={{{dims[0]!r}: {_suggested(plane[0])}, {dims[1]!r}: "
            f"{_suggested(plane[1])}}}"
        )
    return check_pair("tile", tuple(tile.get(axis, n) for axis, n in zip(axes, plane, strict=True)))


def _check_cells(tile: Tile, plane: Tile) -> None:
    """Refuse numbers of rows and columns that cannot be cut."""
    wanted = tuple(min(t, n) if t >= n else _suggested(n, t) for t, n in zip(tile, plane, strict=True))
    for t, n, axis in zip(tile, plane, ("rows", "columns"), strict=True):
        if t > n:
            raise OptionError(f"tile={tile} is larger than the {n} {axis} of ds; type tile={wanted}, or leave it out.")
        if t < n and (t % MULTIPLE or t < SMALLEST):
            raise OptionError(
                f"tile={tile} is not accepted; rows and columns must be multiples of {MULTIPLE} and at least {SMALLEST}, or all of the "
                f"{n} {axis}: tile={wanted}"
            )


def _suggested(n: int, near: int | None = None) -> int:
    """Return a number of cells that is accepted along an axis of n."""
    near = n // 2 if near is None else near
    found = max(SMALLEST, near - near % MULTIPLE)
    return min(found, n)


def automatic_tile(fields: np.ndarray, plane: Tile, periodic: Any, wraps: bool) -> Tile | None:
    """Return twice the distance at which standardised fields (n, state) are no longer correlated, on grids of more than 448 rows or columns."""
    if max(plane) <= LARGEST_PLANE or periodic == "both":
        return None
    some = fields[np.unique(np.linspace(0, len(fields) - 1, min(SAMPLED, len(fields))).round().astype(int))]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The residuals are correlated over"
        )  # the Gaussian of the whole grid knows that
        found, _ = suggest_tile(torch.as_tensor(some).reshape(len(some), -1, *plane), MULTIPLE, (LARGEST_PLANE, LARGEST_PLANE))
    return (found[0], plane[1]) if periodic is True or (periodic is False and wraps) else found


def network_periodic(tile: Tile | None, periodic: Any, plane: Tile, wraps: bool) -> Any:
    """Return how a network that is called on such parts goes on: not along what is cut, nor across poles; None: as the grid does."""
    if tile is None:
        return periodic
    return tile[1] == plane[1] and (wraps if periodic is None else periodic is True)


def tile_options(tile: Tile | None, stride: int) -> dict[str, Any]:
    """Return what a model keeps of its parts: rows and columns, and how many neighbours share, about a quarter."""
    if tile is None:
        return {}
    return {"tile": list(tile), "overlap": [min(-(-t // (4 * stride)) * stride, t // 2) for t in tile]}


def laid_corners(tile: Tile, plane: Sequence[int], most: int) -> list[Tile]:
    """Return first rows and columns of parts that cover the grid evenly; at most so many of them."""
    corners = Tiling((plane[0], plane[1]), tile).corners
    if len(corners) <= most:
        return list(corners)
    return [corners[int(k)] for k in np.linspace(0, len(corners) - 1, most).round()]


def saves_reading(source: Source, tile: Tile, window: int = 1) -> bool:
    """Return whether reading a part of a field for itself unpacks less than the field.

    Fields that are read as a whole are unpacked once in an epoch, with all those of their chunks. A part is read for itself, and unpacks
    all times of the chunks that it touches.
    """
    cells = []
    for part in source.parts:
        stored = storage_chunks(part.variable)
        time = stored.get(source.dimension, 1)
        touched = 1.0
        for dim, t, n in zip(source.dims, tile, source.grid.plane, strict=True):
            size = min(stored.get(dim, 1), n)
            corners = np.arange(n - t + 1)
            touched *= float(np.minimum(((corners + t - 1) // size - corners // size + 1) * size, n).mean())
        cells.append((time + window - 1) * touched * len(part.channels))
    return sum(cells) < window * sum(len(part.channels) for part in source.parts) * float(np.prod(source.grid.plane))


def storage_chunks(variable: xr.Variable) -> dict[Any, int]:
    """Return how many cells along each dimension are stored together, where that is known."""
    if variable.chunks is not None:
        return {d: max(1, *sizes) for d, sizes in zip(variable.dims, variable.chunks, strict=True)}
    preferred = variable.encoding.get("preferred_chunks") or {}
    return {d: max(1, int(np.max(n))) for d, n in preferred.items()}

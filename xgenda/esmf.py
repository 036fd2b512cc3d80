"""ESMF: weights that it computes through xESMF, and its weight files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from xgenda.curvilinear import PointSet
from xgenda.errors import GridError, MissingDependencyError, OptionError
from xgenda.horizontal import Horizontal
from xgenda.maps import LinearMap
from xgenda.spherical import great_circle, positions, unit_vectors


@dataclass(frozen=True, eq=False)
class Weights:
    """A linear map between two grids, in the order in which the user's arrays count their cells.

    Attributes
    ----------
    map
        Shape (target cells, source cells).
    mapped
        Target cells that get a value, shape (target cells,), bool.
    origin
        Who computed them: 'builtin', 'xesmf', or the name of a file.
    method
        That the file names; None where it names none, or they were computed here.
    """

    map: LinearMap
    mapped: np.ndarray
    origin: str
    method: str | None = None


def same_points(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
    """Tell whether positions in degrees agree to a thousandth of one."""
    return bool(np.degrees(great_circle(unit_vectors(*one), unit_vectors(*other)).max(initial=0.0)) < 1e-3)


def from_xesmf(
    source: Horizontal,
    target: Horizontal,
    method: str,
    extrapolate: str | None,
    source_mask: np.ndarray | None,
    target_mask: np.ndarray | None,
) -> Weights:
    """Let ESMF compute the weights between two grids; masks are flat, in the order of the user's arrays."""
    try:
        import xesmf
    except ImportError as error:
        raise MissingDependencyError(
            f"method={method!r} with ESMF needs xESMF and esmpy, which come from conda-forge: conda install -c conda-forge xesmf. "
            f"Built in are 'bilinear', 'conservative', 'conservative_normed' and 'nearest': regridder='builtin'."
        ) from error
    sides = []
    for side, mask in ((source, source_mask), (target, target_mask)):
        grid = side.grid
        latitude, longitude = side.points()
        if isinstance(grid, PointSet):
            sides.append(xr.Dataset(coords={"lat": ("points", latitude), "lon": ("points", longitude)}))
            continue
        shaped = {"lat": (("y", "x"), latitude.reshape(side.shape)), "lon": (("y", "x"), longitude.reshape(side.shape))}
        ds = xr.Dataset(coords=shaped)
        if method.startswith("conservative"):
            corners = np.stack(positions(grid.vertices[side.places]), -1).reshape(*side.shape, 4, 2)
            for name, k in (("lat_b", 0), ("lon_b", 1)):
                ds[name] = (("y_b", "x_b"), _nodes(corners[..., k]))
        if mask is not None:
            ds["mask"] = (("y", "x"), mask.reshape(side.shape).astype(int))
        sides.append(ds)
    names = {"nearest": "nearest_s2d"}
    made = xesmf.Regridder(
        sides[0], sides[1], names.get(method, method), periodic=bool(getattr(source.grid, "periodic", False)),
        locstream_in=isinstance(source.grid, PointSet), locstream_out=isinstance(target.grid, PointSet),
        extrap_method="nearest_s2d" if extrapolate else None,
    )  # fmt: skip
    found = LinearMap.from_matrix(made.weights.data.tocsr())
    mapped = found.lengths > 0
    if target_mask is not None:
        mapped &= target_mask
    return Weights(found, mapped, f"xesmf {xesmf.__version__}")


def _nodes(corners: np.ndarray) -> np.ndarray:
    """Return the nodes (ny + 1, nx + 1) of cells whose corners (ny, nx, 4) go around from their lower left one."""
    ny, nx = corners.shape[:2]
    out = np.empty((ny + 1, nx + 1))
    out[:-1, :-1], out[:-1, -1], out[-1, -1], out[-1, :-1] = (
        corners[..., 0],
        corners[:, -1, 1],
        corners[-1, -1, 2],
        corners[-1, :, 3],
    )
    return out


def weights_dataset(found: Weights, source: Horizontal, target: Horizontal, method: str) -> xr.Dataset:
    """Return weights in the form of an ESMF weight file: S, row and col counted from 1, the places of both grids."""
    entries = found.map.matrix.tocoo()
    out = xr.Dataset({
        "S": ("n_s", entries.data),
        "row": ("n_s", (entries.row + 1).astype(np.int32)),
        "col": ("n_s", (entries.col + 1).astype(np.int32)),
        "frac_b": ("n_b", found.mapped.astype(float)),
    })  # fmt: skip
    for letter, side, name in (("a", source, "src"), ("b", target, "dst")):
        latitude, longitude = side.points()
        out[f"yc_{letter}"] = (f"n_{letter}", latitude, {"units": "degrees"})
        out[f"xc_{letter}"] = (f"n_{letter}", longitude, {"units": "degrees"})
        out[f"{name}_grid_dims"] = (f"{name}_grid_rank", np.array(side.shape[::-1], dtype=np.int32))
    out.attrs = {
        "title": "xgenda weights", "map_method": method, "origin": found.origin, "conventions": "NCAR-CSM",
        "normalization": "fracarea" if method == "conservative_normed" else "destarea",
    }  # fmt: skip
    return out


def read_weights(path: str | os.PathLike[str], source: Horizontal, target: Horizontal) -> Weights:
    """Read an ESMF weight file and check that it belongs to these grids.

    Raises
    ------
    GridError
        If the file is of other grids, or no weight file.
    """
    file = Path(path)
    if not file.exists():
        raise OptionError(f"weights={str(path)!r} does not exist; make it: xgenda.Regridder(source, target).save({str(path)!r})")
    try:
        with xr.open_dataset(file) as opened:
            ds = opened.load()
    except Exception as problem:
        raise GridError(f"weights={str(path)!r} cannot be read as netCDF: {problem}") from problem
    lacking = [n for n in ("S", "row", "col") if n not in ds]
    if lacking:
        raise GridError(f"weights={str(path)!r} lacks {', '.join(lacking)}; an ESMF weight file has S, row and col.")
    value, row, col = (ds[n].values for n in ("S", "row", "col"))
    shape = (target.grid.size, source.grid.size)
    if len(row) and (row.min() < 1 or col.min() < 1 or row.max() > shape[0] or col.max() > shape[1]):
        raise GridError(
            f"weights={str(path)!r} goes from {int(col.max())} or more cells to {int(row.max())} or more, and the grids have {shape[1]} and "
            f"{shape[0]}; it belongs to others. Compute them: xgenda.Regridder(source, target)"
        )
    for letter, side, name in (("a", source, "source"), ("b", target, "target")):
        if f"yc_{letter}" not in ds:
            continue
        latitude, longitude = (ds[f"{n}_{letter}"].values for n in ("yc", "xc"))
        if not latitude.size == longitude.size == side.grid.size or not same_points((latitude, longitude), side.points()):
            raise GridError(f"weights={str(path)!r} is of another {name} grid than {side.grid.describe()}.")
    fine = np.isfinite(value)  # xESMF writes one NaN for a cell that is not mapped
    found = LinearMap.from_entries(row[fine] - 1, col[fine] - 1, value[fine], shape)
    return Weights(found, found.lengths > 0, file.name, str(ds.attrs["map_method"]).lower() if "map_method" in ds.attrs else None)

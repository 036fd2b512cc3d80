"""`regrid`: fields from one horizontal grid to another, by weights that are built once.

Weights come from xESMF where it can be imported (which needs esmpy, from conda-forge), else from `xgenda.weights`; they are a `LinearMap`
either way, and are kept, saved and read as ESMF weight files.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import numbers
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import xarray as xr

from xgenda import chunking, metadata, weights
from xgenda.curvilinear import Horizontal, PointSet, read_grid
from xgenda.errors import GridError, MissingDependencyError, OptionError, check_choice, check_flag
from xgenda.files import aside, check_output
from xgenda.grids import Grid
from xgenda.maps import LinearMap
from xgenda.spherical import great_circle, positions, unit_vectors

METHODS = ("bilinear", "conservative", "conservative_normed", "nearest", "patch")
REGRIDDERS = ("auto", "builtin", "xesmf")
EXTRAPOLATIONS = ("nearest",)
KEPT_WEIGHTS = 16  # pairs of grids whose weights are kept in memory
LARGE_CHUNK = 512 * 2**20  # bytes

_kept: collections.OrderedDict[str, Weights] = collections.OrderedDict()


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
    """

    map: LinearMap
    mapped: np.ndarray
    origin: str


def regrid(
    ds: xr.Dataset | xr.DataArray,
    target: xr.Dataset | xr.DataArray,
    *,
    method: str = "bilinear",
    regridder: str = "auto",
    skipna: bool = False,
    na_thres: float = 1.0,
    extrapolate: str | None = None,
    source_mask: xr.DataArray | None = None,
    target_mask: xr.DataArray | None = None,
) -> xr.Dataset | xr.DataArray:
    """Return the fields of `ds` on the horizontal grid of `target`.

    Chunked input gives a lazy result, one chunk for each of the input; the horizontal dimensions must be whole. For the same two grids
    again and again make a `Regridder`.

    Parameters
    ----------
    ds
        Fields on a grid with one-dimensional latitude and longitude, two-dimensional ones, projection coordinates with a CF grid
        mapping, or points. Variables without the horizontal dimensions are kept as they are.
    target
        Anything with a horizontal grid of these kinds; only its coordinates are read.
    method
        'bilinear', between points linear on their Delaunay triangles, of which those over a gap are left out; 'conservative', which keeps
        the integral (a target cell that is partly covered counts what is not as zero); 'conservative_normed', the mean over the covered
        part; 'nearest'; 'patch' (xESMF only).
    regridder
        'auto': xESMF where it is installed, else built in; 'xesmf'; 'builtin'. The result records which.
    skipna
        Whether missing source values are left out of each weighted mean. Otherwise a target value is NaN as soon as one of
        its source values is.
    na_thres
        With `skipna`: the largest part of the weights that may be missing, from 0 to 1.
    extrapolate
        'nearest' gives target cells outside the source the nearest source value; None leaves them NaN.
    source_mask, target_mask
        True where cells may be used, or are wanted. Bilinear values that would need a masked source cell are NaN.

    Returns
    -------
    xarray.Dataset or xarray.DataArray
        As `ds`, on the coordinates of `target`, with attributes; target cells that nothing maps to are NaN.

    Raises
    ------
    GridError, CoordinateError, OptionError, ChunkingError, MissingDependencyError
        Before anything is computed.

    References
    ----------
    Jones, P. W. (1999), First- and second-order conservative remapping schemes for grids in spherical coordinates, Mon. Weather Rev.
    127, 2204-2210, eq. 6 without its gradient terms.

    Examples
    --------
    >>> import numpy as np, xarray as xr, xgenda
    >>> ds = xgenda.tutorial.open_dataset("europe-t2m-forecast")
    >>> coarse = xr.Dataset(coords={"latitude": np.arange(35.0, 60.0, 2.0), "longitude": np.arange(-10.0, 30.0, 2.0)})
    >>> xgenda.regrid(ds, coarse, method="conservative").t2m.shape
    (1, 13, 20)
    """
    made = Regridder(
        ds, target, method=method, regridder=regridder, extrapolate=extrapolate, source_mask=source_mask, target_mask=target_mask
    )
    return made(ds, skipna=skipna, na_thres=na_thres)


class Regridder:
    """Weights from one horizontal grid to another, to be applied to any fields.

    Parameters
    ----------
    source, target
        Anything with a horizontal grid; see `regrid`.
    method, regridder, extrapolate, source_mask, target_mask
        See `regrid`.
    weights
        An ESMF weight file to read instead of computing anything; it must be of grids of these sizes.

    Examples
    --------
    >>> import numpy as np, xarray as xr, xgenda
    >>> ds = xgenda.tutorial.open_dataset("europe-t2m-forecast")
    >>> coarse = xr.Dataset(coords={"latitude": np.arange(35.0, 60.0, 2.0), "longitude": np.arange(-10.0, 30.0, 2.0)})
    >>> to_coarse = xgenda.Regridder(ds, coarse, method="nearest")
    >>> to_coarse.map.shape
    (260, 16005)
    """

    def __init__(
        self,
        source: xr.Dataset | xr.DataArray,
        target: xr.Dataset | xr.DataArray,
        *,
        method: str = "bilinear",
        regridder: str = "auto",
        extrapolate: str | None = None,
        source_mask: xr.DataArray | None = None,
        target_mask: xr.DataArray | None = None,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        self.method = check_choice("method", method, METHODS)
        check_choice("regridder", regridder, REGRIDDERS)
        if extrapolate is not None:
            check_choice("extrapolate", extrapolate, EXTRAPOLATIONS)
        if extrapolate is not None and method.startswith("conservative"):
            raise OptionError(f"extrapolate={extrapolate!r} does not go with method={method!r}; leave it out, or use 'bilinear'.")
        self.source, self.target = (
            read_grid(_with_coordinates(o, name), name) for o, name in ((source, "source"), (target, "target"))
        )
        masks = [
            _mask(m, h, n) for m, h, n in ((source_mask, self.source, "source_mask"), (target_mask, self.target, "target_mask"))
        ]
        key = _key(self.source, self.target, method, regridder, extrapolate, masks)
        if weights is not None:
            self.weights = read_weights(weights, self.source, self.target)
        elif key in _kept:
            _kept.move_to_end(key)
            self.weights = _kept[key]
        else:
            self.weights = _kept[key] = compute(self.source, self.target, method, regridder, extrapolate, masks[0], masks[1])
            while len(_kept) > KEPT_WEIGHTS:
                _kept.popitem(last=False)

    @property
    def map(self) -> LinearMap:
        """The linear map, shape (target cells, source cells), in the order of the user's arrays."""
        return self.weights.map

    def __call__(
        self, ds: xr.Dataset | xr.DataArray, *, skipna: bool = False, na_thres: float = 1.0
    ) -> xr.Dataset | xr.DataArray:
        """Return the fields of `ds` on the target grid; see `regrid`."""
        check_flag("skipna", skipna)
        if isinstance(na_thres, bool) or not isinstance(na_thres, numbers.Real) or not 0 <= float(na_thres) <= 1:
            raise OptionError(
                f"na_thres={na_thres!r} is not accepted; give the part of the weights that may be missing, from 0 to 1."
            )
        if isinstance(ds, xr.DataArray):
            name = ds.name
            whole = self(ds.to_dataset(name="__field"), skipna=skipna, na_thres=na_thres)
            assert isinstance(whole, xr.Dataset)
            return whole["__field"].rename(name)
        ds = metadata.as_dataset(ds)
        here = self.source
        if not all(n in ds.coords and ds[n].variable.equals(c.variable) for n, c in here.coordinates.items()):
            found = read_grid(ds, "ds")
            if found.dims != here.dims or found.shape != here.shape or not _same_points(found.points(), here.points()):
                raise GridError(
                    f"ds is on {found.grid.describe()}, dimensions {found.dims}, and this Regridder starts from {here.grid.describe()}, "
                    f"dimensions {here.dims}. Make one for ds: xgenda.Regridder(ds, target)"
                )
        out: dict[str, Any] = {}
        for name, array in ds.data_vars.items():
            held = [d for d in here.dims if d in array.dims]
            if len(held) == len(here.dims):
                out[str(name)] = self._field(array, skipna, float(na_thres))
            elif not held and str(name) not in self.target.dims:
                out[str(name)] = array
        if not any(set(self.target.dims) <= set(v.dims) for v in out.values()):
            raise OptionError(f"ds has no variable with the dimensions {', '.join(map(repr, here.dims))}.")
        kept = {n: c for n, c in ds.coords.items() if not set(c.dims) & set(here.dims) and n not in here.coordinates}
        kept = {n: c for n, c in kept.items() if n not in self.target.coordinates and n not in self.target.dims}
        result = xr.Dataset(out, coords={**kept, **self.target.coordinates}, attrs=ds.attrs)
        fields = [n for n, v in out.items() if set(self.target.dims) <= set(v.dims)]
        for name in fields:
            result[name].attrs = {
                k: v for k, v in ds[name].attrs.items() if k not in ("grid_mapping", "coordinates", "cell_measures")
            }
        provenance = {"regridder": self.weights.origin, "regrid_method": self.method}
        call = f"regrid(method={self.method!r}, regridder={self.weights.origin!r})"
        result.attrs = {**ds.attrs, **metadata.provenance_attrs(ds, call, provenance)}
        return result

    def _field(self, array: xr.DataArray, skipna: bool, na_thres: float) -> xr.DataArray:
        if array.dtype.kind not in "fiub":
            raise OptionError(
                f"ds[{array.name!r}] has dtype {array.dtype}; only numbers can be regridded: ds.drop_vars({array.name!r})"
            )
        chunking.check_core_chunks([array], self.source.dims, "ds", "regridding needs whole fields")
        _warn_of_growth(array, self.map.shape)
        dtype = array.dtype if array.dtype in (np.float32, np.float64) else np.dtype("f8" if array.dtype.itemsize > 4 else "f4")
        lead = [d for d in array.dims if d not in self.source.dims]
        ordered = array.transpose(*lead, *self.source.dims)
        work = _Apply(self.weights, len(self.source.dims), self.target.shape, skipna, na_thres, dtype)
        data = chunking.lay_fields(work, ordered, len(lead), self.target.shape, dtype)
        place = max([i for i, d in enumerate(array.dims) if d in self.source.dims]) - len(self.source.dims) + 1
        found = xr.DataArray(data, dims=(*lead, *self.target.dims), name=array.name)
        order = [*lead[:place], *self.target.dims, *lead[place:]]
        return found.transpose(*order)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the weights as an ESMF weight file (netCDF), whole or not at all."""
        file = check_output(path, "regridder.save", overwrite=overwrite)
        with aside(file) as partial:
            weights_dataset(self.weights, self.source, self.target, self.method).to_netcdf(partial)
        return file

    def __repr__(self) -> str:
        """Return both grids, the method and who computed the weights."""
        return (
            f"<xgenda.Regridder {self.method} ({self.weights.origin})>\n  from  {self.source.grid.describe()}\n"
            f"  to    {self.target.grid.describe()}\n  {int(self.weights.mapped.sum())} of {self.map.shape[0]} cells mapped"
        )


@dataclass(frozen=True, eq=False)
class _Apply:
    """Weights times fields (..., source cells), for one block."""

    weights: Weights
    source_ndim: int
    shape: tuple[int, ...]
    skipna: bool
    na_thres: float
    dtype: np.dtype[Any]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return (..., target dims)."""
        lead = values.shape[: values.ndim - self.source_ndim]
        flat = np.ascontiguousarray(values).reshape(-1, self.weights.map.size)
        missing = ~np.isfinite(flat) if self.skipna and flat.dtype.kind == "f" else np.zeros((1, 1), dtype=bool)
        if missing.any():
            total = np.asarray(self.weights.map.matrix.sum(1)).ravel()
            out = self.weights.map(np.where(missing, 0, flat).astype(float))
            lost = self.weights.map(missing.astype(float))
            with np.errstate(divide="ignore", invalid="ignore"):
                share = lost / total
                # what is left stands for the whole row
                out = np.where((share <= self.na_thres + 1e-12) & (share < 1 - 1e-12), out / (1 - share), np.nan)
        else:
            out = self.weights.map(flat.astype(float, copy=False))
        if not self.weights.mapped.all():
            out[:, ~self.weights.mapped] = np.nan
        return out.reshape(*lead, *self.shape).astype(self.dtype, copy=False)


def compute(
    source: Horizontal,
    target: Horizontal,
    method: str,
    regridder: str = "auto",
    extrapolate: str | None = None,
    source_mask: np.ndarray | None = None,
    target_mask: np.ndarray | None = None,
) -> Weights:
    """Build the weights between two grids, by xESMF or built in; masks are flat, in the order of the user's arrays."""
    chosen = regridder
    if regridder == "auto":
        chosen = "xesmf" if _has_xesmf() else "builtin"
    if chosen == "builtin" and method == "patch":
        raise MissingDependencyError(
            "method='patch' is done by xESMF, which is not installed; esmpy comes from conda-forge: conda install -c conda-forge xesmf. "
            "Built in are 'bilinear', 'conservative', 'conservative_normed' and 'nearest'."
        )
    build = _from_xesmf if chosen == "xesmf" else _built_in
    return build(source, target, method, extrapolate, source_mask, target_mask)


def _built_in(
    source: Horizontal,
    target: Horizontal,
    method: str,
    extrapolate: str | None,
    source_mask: np.ndarray | None,
    target_mask: np.ndarray | None,
) -> Weights:
    usable, wanted = _placed(source_mask, source), _placed(target_mask, target)
    latitude, longitude = target.grid.points()
    if method == "nearest":
        found = weights.nearest(source.grid, latitude, longitude, usable)
        mapped = np.ones(target.grid.size, dtype=bool)
    elif method == "bilinear":
        if isinstance(source.grid, Grid):
            found, mapped = weights.pole_means(source.grid, latitude, longitude)
        else:
            found, mapped = weights.interpolation(source.grid, latitude, longitude)
        if not usable.all():
            mapped = mapped & (found((~usable).astype(float)) == 0)
    else:
        overlap, _, areas = weights.conservative(source.grid, target.grid)
        matrix = overlap.matrix if usable.all() else overlap.matrix @ scipy.sparse.diags_array(usable.astype(float))
        covered = np.asarray(matrix.sum(1)).ravel()
        mapped = covered > 1e-9 * areas
        by = areas if method == "conservative" else covered
        found = LinearMap.from_matrix(scipy.sparse.diags_array(np.where(mapped, 1 / np.where(by > 0, by, 1.0), 0.0)) @ matrix)
    if extrapolate == "nearest" and not mapped.all():
        lost = np.flatnonzero(~mapped)
        found = found.replaced(lost, weights.nearest(source.grid, latitude[lost], longitude[lost], usable))
        mapped = np.ones_like(mapped)
    mapped = mapped & wanted
    # from model order to the order of the user's arrays
    matrix = found.kept(mapped).matrix[target.places][:, source.places]
    return Weights(LinearMap.from_matrix(matrix), mapped[target.places], "builtin")


def _placed(mask: np.ndarray | None, side: Horizontal) -> np.ndarray:
    """Return a mask, or True everywhere, in model order."""
    out = np.ones(side.grid.size, dtype=bool)
    if mask is not None:
        out[side.places] = mask
    return out


def _has_xesmf() -> bool:
    return importlib.util.find_spec("xesmf") is not None and importlib.util.find_spec("esmpy") is not None


def _from_xesmf(
    source: Horizontal,
    target: Horizontal,
    method: str,
    extrapolate: str | None,
    source_mask: np.ndarray | None,
    target_mask: np.ndarray | None,
) -> Weights:
    try:
        import xesmf
    except ImportError as error:
        raise MissingDependencyError(
            "regridder='xesmf' needs xESMF and esmpy, which come from conda-forge: conda install -c conda-forge xesmf. "
            "Or use regridder='builtin'."
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
        if not latitude.size == longitude.size == side.grid.size or not _same_points((latitude, longitude), side.points()):
            raise GridError(f"weights={str(path)!r} is of another {name} grid than {side.grid.describe()}.")
    fine = np.isfinite(value)  # xESMF writes one NaN for a cell that is not mapped
    found = LinearMap.from_entries(row[fine] - 1, col[fine] - 1, value[fine], shape)
    return Weights(found, found.lengths > 0, file.name)


def _with_coordinates(obj: xr.Dataset | xr.DataArray, argument: str) -> xr.Dataset:
    if isinstance(obj, xr.DataArray):
        return obj.to_dataset(name=obj.name if obj.name is not None else "__field")
    return metadata.as_dataset(obj, argument)


def _mask(mask: Any, side: Horizontal, argument: str) -> np.ndarray | None:
    if mask is None:
        return None
    fits = isinstance(mask, xr.DataArray) and set(mask.dims) == set(side.dims) and mask.size == side.grid.size
    if not fits:
        found = dict(getattr(mask, "sizes", {})) or type(mask).__name__
        raise OptionError(
            f"{argument} is {found}; a DataArray with the dimensions {dict(zip(side.dims, side.shape, strict=True))} is needed, True where "
            f"cells may be used: {argument}=ds['sst'].isel(time=0).notnull()"
        )
    values = mask.transpose(*side.dims).values
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise OptionError(f"{argument} holds NaN; make it True or False: {argument}.notnull()")
    return np.asarray(values != 0).ravel()


def _same_points(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
    """Tell whether positions in degrees agree to a thousandth of one."""
    return bool(np.degrees(great_circle(unit_vectors(*one), unit_vectors(*other)).max(initial=0.0)) < 1e-3)


def _key(
    source: Horizontal, target: Horizontal, method: str, regridder: str, extrapolate: str | None, masks: list[np.ndarray | None]
) -> str:
    digest = hashlib.sha256(f"{method}|{regridder}|{extrapolate}".encode())
    for side in (source, target):
        parts: list[Any] = [*side.grid.points(), side.places]
        parts += [getattr(side.grid, n, None) for n in ("latitude_edges", "longitude_edges", "corners")]
        digest.update(f"{type(side.grid).__name__}|{side.shape}|{side.dims}".encode())
        for part in parts:
            digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    for mask in masks:
        digest.update(b"-" if mask is None else mask.tobytes())
    return digest.hexdigest()


def _warn_of_growth(array: xr.DataArray, shape: tuple[int, int]) -> None:
    if array.chunks is None:
        return
    before = float(np.prod([max(c) for c in array.chunks])) * array.dtype.itemsize
    after = before * shape[0] / max(shape[1], 1)
    if after > LARGE_CHUNK and after > 2 * before:
        lead = next((str(d) for d, c in zip(array.dims, array.chunks, strict=True) if len(c) >= 1 and max(c) > 1), "time")
        warnings.warn(
            f"Chunks of ds[{array.name!r}] grow from {before / 2**20:.0f} to {after / 2**20:.0f} MiB; make them smaller first: "
            f"ds.chunk({lead}={max(1, int(max(array.chunksizes.get(lead, (1,))) * LARGE_CHUNK / after / 2))})",
            stacklevel=4,
        )

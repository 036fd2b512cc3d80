"""`regrid`: fields from one horizontal grid to another, by weights that are built once.

Weights come from `xgenda.weights`, or where asked for from xESMF; they are a `LinearMap` either way, and are kept, saved and read as ESMF
weight files.
"""

from __future__ import annotations

import collections
import hashlib
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
from xgenda.errors import GridError, OptionError, check_choice, check_flag
from xgenda.esmf import Weights, from_xesmf, read_weights, same_points, weights_dataset
from xgenda.files import aside, check_output
from xgenda.formatting import user_level
from xgenda.grids import Grid
from xgenda.horizontal import Horizontal, read_grid
from xgenda.maps import LinearMap

BUILT_IN = ("bilinear", "conservative", "conservative_normed", "nearest")
METHODS = (*BUILT_IN, "patch")  # xESMF has the last
REGRIDDERS = ("auto", "builtin", "xesmf")
EXTRAPOLATIONS = ("nearest",)
KEPT_WEIGHTS = 16  # pairs of grids whose weights are kept in memory
LARGE_CHUNK = 512 * 2**20  # bytes

_kept: collections.OrderedDict[str, Weights] = collections.OrderedDict()


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
        'builtin'; 'xesmf' (with esmpy, from conda-forge); 'auto': built in, and xESMF only for 'patch', so that the numbers do not depend
        on what is installed: weights of the two differ by up to 0.01. The result records which.
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
        if check_choice("regridder", regridder, REGRIDDERS) == "builtin" and method not in BUILT_IN:
            raise OptionError(f"method={method!r} is not built in; leave out regridder='builtin', or choose one of {BUILT_IN}.")
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
            self.method = self.weights.method or method
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
            if found.dims != here.dims or found.shape != here.shape or not same_points(found.points(), here.points()):
                raise GridError(
                    f"ds is on {found.grid.describe()}, dimensions {found.dims}, and this Regridder starts from {here.grid.describe()}, "
                    f"dimensions {here.dims}. Make one for ds: xgenda.Regridder(ds, target)"
                )
        out: dict[str, Any] = {}
        bounds = metadata.bounds_of(ds)
        for name, array in ds.data_vars.items():
            held = [d for d in here.dims if d in array.dims]
            if (held and name in bounds) or "grid_mapping_name" in array.attrs:  # of the source grid
                continue
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
    build = from_xesmf if regridder == "xesmf" or (regridder == "auto" and method not in BUILT_IN) else _built_in
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
        twice = int((covered > 1.01 * areas).sum())
        if method == "conservative" and twice:
            warnings.warn(
                f"Cells of the source overlap, and {twice} target cells count some of them twice; a tripolar grid may hold each cell of its "
                f"last row two times. Leave one out: source_mask=..., or take the mean: method='conservative_normed'",
                stacklevel=user_level(),
            )
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
            stacklevel=user_level(),
        )

r"""Climatology, standard deviation and range of training fields in one pass over them, whatever their size.

With B the harmonics of the times, shape (n, k), the least-squares coefficients of a cell with the series y minimise |y - B m|^2. Of
B = U S V' only U, of full rank, is used for the sums over blocks: m = V / S (U' U)^-1 U' y, where U' U is near the identity whatever
the times are. Series are taken relative to their first value, so that the squares that are summed are of the size of the anomalies.

Blocks are read by threads and summed in their order, so that the result does not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata
from xgenda.errors import check_choice
from xgenda.files import aside
from xgenda.formatting import progress_bar, user_level
from xgenda.models.spec import ModelSpec
from xgenda.models.store import cache_dir
from xgenda.scaling import CYCLES, Scaling, check_logarithms, check_times, cycle_basis, per_channel, scaling_of, settled
from xgenda.training.sources import BLOCK, LARGEST_CHUNK, WORKERS, Source, in_order, open_source
from xgenda.training.surveys import Look, Survey, look

VERSION = 2  # of the cached files
HASHED = 256 * 2**20  # bytes up to which a fingerprint is of all values
FIELDS = 64  # of larger data
LARGEST_BLOCK = 128 * 2**20
MARKED = 128  # fields whose hash a model keeps
CACHED = 2**17  # values that are worked on at once, a megabyte, which stays in the cache of the processor


@dataclass(frozen=True, eq=False)
class Statistics:
    """What one pass found.

    Attributes
    ----------
    names, cycle, transforms, offsets
        As in `xgenda.scaling.Scaling`.
    missing
        Fields to leave out, shape (size of the source).
    valid
        False at masked cells, shape (channels, ny, nx).
    fill
        What is read there instead: the mean of all others, shape (channels,).
    lowest, highest
        In physical units, shape (channels,).
    mean
        Coefficients of the harmonics in transformed units, shape (k, channels, ny, nx).
    squares
        Sum of squared anomalies over times and valid cells, shape (channels,).
    gram
        Sums of products of the harmonics over the times, shape (k, k).
    fingerprint
        Of the source, see `fingerprint`.
    """

    names: tuple[str, ...]
    cycle: str
    transforms: tuple[str, ...]
    offsets: tuple[float, ...]
    missing: np.ndarray
    valid: np.ndarray
    fill: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    gram: np.ndarray
    fingerprint: str = ""

    def scaling(self, bounds: Mapping[str, Sequence[float | None]] | None = None, homogeneous: bool = False) -> Scaling:
        """Return what `xgenda.scaling.fit_scaling` returns for the fields in memory, to rounding."""
        mean, squares = self.mean, self.squares
        if homogeneous:  # the residual of the fit is orthogonal to the harmonics, so squares add up
            mean = mean.mean((2, 3), keepdims=True)
            apart = np.where(self.valid, self.mean - mean, 0.0)
            squares = squares + np.einsum("kcyx,kl,lcyx->c", apart, self.gram, apart, optimize=True)
        count = int((~self.missing).sum()) * self.valid.sum((1, 2))
        std = np.sqrt(np.maximum(squares, 0.0) / count)[:, None, None]
        ends = _transformed(np.stack([self.lowest, self.highest]), self.transforms, self.offsets)
        return scaling_of(
            self.names, mean, std, np.abs(ends).max(0)[:, None, None], self.lowest, self.highest,
            cycle=self.cycle, transforms=self.transforms, offsets=self.offsets, bounds=bounds,
        )  # fmt: skip


def gather(
    source: Source,
    cycle: str = "none",
    transform: str | Mapping[str, str] = "none",
    offset: float | Mapping[str, float] = 1e-3,
    *,
    cache: bool = True,
    workers: int = WORKERS,
    progress: bool | None = None,
) -> tuple[Source, Statistics]:
    """Pass over all fields once, and return the source without what is missing and with its mask, and the statistics.

    Parameters
    ----------
    source
        As opened.
    cycle, transform, offset
        As in `xgenda.scaling.fit_scaling`.
    cache
        Keep the statistics in the folder ``statistics`` of the cache, and take them from there where source and options are the same (see
        `fingerprint`). Files that cannot be read are made anew; a cache that cannot be written is done without.
    workers
        Threads that read.
    progress
        As in `xgenda.train`.

    Raises
    ------
    StateError
        If the fields hold NaN at some times only, infinity or fill values, are too few, or not positive where logarithms are asked for.
    """
    transforms, offsets = per_channel(source.names, transform, offset)
    check_choice("climatology", cycle, CYCLES)
    basis = cycle_basis(source.time, cycle, source.size)
    check_times(source.size, basis.shape[1], cycle)
    mark = fingerprint(source) if cache else ""
    options = json.dumps([VERSION, mark, cycle, transforms, offsets])
    path = cache_dir() / "statistics" / f"{hashlib.blake2b(options.encode(), digest_size=16).hexdigest()}.npz"
    described: dict[str, Any] = {"names": tuple(source.names), "cycle": cycle, "transforms": transforms, "offsets": offsets}
    arrays = _cached(path, source.shape) if cache else None
    if arrays is not None:
        found = Statistics(**described, **arrays, fingerprint=mark)
        return source.masked(found.missing, found.valid, found.fill), found
    kept, arrays = _pass(source, basis, transforms, offsets, workers, progress)
    found = Statistics(**described, **arrays, fingerprint=mark)
    if cache:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside(path) as partial, open(partial, "wb") as file:
                np.savez(file, **arrays)
    return kept, found


def fingerprint(data: Source | xr.Dataset | xr.DataArray) -> str:
    """Return a hash of training fields: variables, grid, times and values; 64 hexadecimal digits.

    Values are all hashed up to 256 MB, of more data those of up to 64 evenly spaced fields with the first and the last, so that it takes
    seconds. How the data are stored, chunked or compressed does not matter, nor does the order of rows and columns, nor history.
    """
    source = data if isinstance(data, Source) else open_source(data, fewest=1)
    source = dataclasses.replace(source, valid=None, fill=None)
    about = {
        "variables": [dataclasses.asdict(v) for v in source.variables],
        "shape": source.shape,
        "dtype": str(source.dtype),
        "dimension": source.dimension,
        "grid": source.grid.to_dict(),
        "time": metadata.time_labels(source.time, source.size).tolist(),
    }
    total = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=32)
    blocks = source.blocks()
    if source.nbytes > HASHED:
        count = min(FIELDS, max(2, HASHED // source.row_bytes))
        blocks = [np.array([i]) for i in np.linspace(0, source.size - 1, count).round().astype(np.int64)]
    for values in in_order(source.read, blocks, WORKERS):
        total.update(np.ascontiguousarray(values).data)
    return total.hexdigest()


def content_of(fields: np.ndarray | None) -> str:
    """Return a hash of an array, 64 hexadecimal digits."""
    found = np.ascontiguousarray(np.zeros(0) if fields is None else fields)
    return hashlib.blake2b(found.tobytes(), digest_size=32).hexdigest()


def marks_of(values: np.ndarray) -> list[str]:
    """Return a short hash of each field, to the precision of float32."""
    return [hashlib.blake2b(np.ascontiguousarray(v, np.float32).tobytes(), digest_size=6).hexdigest() for v in values]


def some_marks(values: np.ndarray) -> list[str]:
    """Return `marks_of` up to `MARKED` evenly spaced fields, which a model keeps."""
    return marks_of(values[np.unique(np.linspace(0, len(values) - 1, min(MARKED, len(values))).round().astype(int))])


def has_seen(spec: ModelSpec, values: np.ndarray, scaling: Scaling) -> bool:
    """Return whether a model was trained on some of these fields, shape (n, channels, ny, nx), in its units.

    `scaling` is fitted to them: of models without marks it tells, where it is that of the model.
    """
    if "marks" in spec.training:
        return not set(spec.training["marks"]).isdisjoint(marks_of(values))
    own = spec.scaling
    return (
        own is not None
        and own.mean.shape == scaling.mean.shape
        and np.allclose(own.mean, scaling.mean, 1e-5, 1e-5 * float(scaling.std.max()))
    )


ARRAYS = ("missing", "valid", "fill", "lowest", "highest", "mean", "squares", "gram")


def _cached(path: Path, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """Return cached arrays, or None where there are none or the file is no good."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:  # noqa: TID251  (leaves a broken file open)
            arrays = {name: file[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return arrays if arrays["missing"].shape == shape[:1] and arrays["mean"].shape[1:] == shape[1:] else None


def _transformed(values: np.ndarray, transforms: Sequence[str], offsets: Sequence[float]) -> np.ndarray:
    """Return float64 values (n, channels, ...), transformed."""
    shape = (*values.shape, 1, 1)[:4]
    blank = Scaling(
        np.zeros((1, len(transforms), 1, 1)), np.ones((len(transforms), 1, 1)), "none", tuple(transforms), tuple(offsets)
    )
    return np.asarray(blank.transform(values.reshape(shape)).reshape(values.shape))


def _pass(
    source: Source,
    basis: np.ndarray,
    transforms: tuple[str, ...],
    offsets: tuple[float, ...],
    workers: int,
    progress: bool | None,
) -> tuple[Source, dict[str, Any]]:
    """Read everything once."""
    n, channels, ny, nx = source.shape
    u, singular, v = np.linalg.svd(basis, full_matrices=False)
    rank = int((singular > np.finfo(float).eps * max(basis.shape) * singular[0]).sum())
    u, back = u[:, :rank], v[:rank].T / singular[:rank]
    constant = u.T @ np.ones(n)  # U times this is one everywhere
    if (stored := source.chunk * source.row_bytes) > LARGEST_CHUNK:
        warnings.warn(
            f"{source.argument} is stored in chunks of {source.chunk} along {source.dimension!r}, together {stored / 1e6:.0f} MB, which are "
            f"decoded again and again for their parts. Store it in shorter ones: {source.argument}.chunk({source.dimension}="
            f"{max(1, LARGEST_CHUNK // (8 * source.row_bytes))}).to_zarr(...)",
            stacklevel=user_level(),
        )
    blocks = source.blocks(max(BLOCK, min(8 * source.row_bytes, LARGEST_BLOCK)))
    reference = _first(source, blocks, transforms, offsets)

    def sums(rows: np.ndarray) -> tuple[Look, np.ndarray, np.ndarray]:
        block = source.read(rows)
        found = look(block)
        check_logarithms(source.names, transforms, offsets, found.lowest)
        kept = found.kept
        if not kept.all():
            block, rows = block[kept], rows[kept]
        product, squares = np.zeros((rank, channels, ny * nx)), np.zeros(channels)
        step = max(1, CACHED // (ny * nx))
        for c, start in itertools.product(range(channels), range(0, len(rows), step)):
            y = block[start : start + step, c].reshape(-1, ny * nx)
            y = np.log(y.astype(np.float64) + offsets[c]) - reference[c] if transforms[c] == "log" else y - reference[c]
            if found.nan is not None:
                np.copyto(y, 0.0, where=np.isnan(y))
            # BLAS would start threads of its own in each of ours, and be slower
            product[:, c] += np.einsum("tr,tc->rc", u[rows[start : start + step]], y)
            squares[c] += np.einsum("tc,tc->", y, y)
        return found, product, squares

    product, squares, survey = np.zeros((rank, channels, ny * nx)), np.zeros(channels), Survey(source)
    workers = max(1, min(workers, LARGEST_BLOCK // product.nbytes))
    with (
        progress_bar(n, progress, "statistics") as advance,
        contextlib.closing(in_order(sums, blocks, workers, workers)) as found,
    ):
        for rows, (seen, p, s) in zip(blocks, found, strict=True):
            survey.add(seen)
            product += p
            squares += s
            advance(len(rows))
    kept = survey.apply()
    valid = np.ones(source.shape[1:], bool) if kept.valid is None else kept.valid
    fill = np.zeros(channels) if kept.fill is None else kept.fill
    rows = ~survey.missing
    solved = np.linalg.pinv(u[rows].T @ u[rows], hermitian=True) @ product.reshape(rank, -1)
    squares -= (solved * product.reshape(rank, -1)).reshape(rank, channels, -1).sum((0, 2))
    filled = _transformed(np.where(valid, 1.0, fill[:, None, None])[None], transforms, offsets)[0].reshape(channels, -1)
    start = np.where(valid.reshape(channels, -1), reference, filled)
    mean = settled(basis[rows], back @ (solved + constant[:, None] * start.ravel()))
    return kept, {
        "missing": survey.missing, "valid": valid, "fill": fill, "lowest": survey.lowest, "highest": survey.highest,
        "mean": mean.reshape(-1, channels, ny, nx), "squares": squares, "gram": basis[rows].T @ basis[rows],
    }  # fmt: skip


def _first(source: Source, blocks: list[np.ndarray], transforms: tuple[str, ...], offsets: tuple[float, ...]) -> np.ndarray:
    """Return the first field that is not missing in transformed units, zero where it is NaN, shape (channels, cells)."""
    for rows in blocks:
        found = source.read(rows[:1])
        seen = look(found)
        if seen.kept.all():
            check_logarithms(source.names, transforms, offsets, seen.lowest)
            return np.asarray(np.nan_to_num(_transformed(found, transforms, offsets)[0].reshape(len(transforms), -1)))
    return np.zeros((len(transforms), source.grid.size))

"""Lay a function over the blocks of a (chunked) Dataset: the only place that knows about dask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from xgenda.errors import ChunkingError


def is_chunked(arrays: Sequence[xr.DataArray]) -> bool:
    """Whether any of the arrays is a dask array."""
    return any(a.chunks is not None for a in arrays)


def check_core_chunks(
    arrays: Sequence[xr.DataArray], dims: Sequence[str], argument: str = "ds", why: str = "each analysis needs whole fields"
) -> None:
    """Refuse core dimensions in several chunks, and print the call to type."""
    for array in arrays:
        split = [d for d in dims if d in array.dims and array.chunks is not None and len(array.chunksizes[d]) > 1]
        if split:
            call = ", ".join(f"{d}=-1" for d in split)
            raise ChunkingError(
                f"{argument}[{array.name!r}] is split along {', '.join(map(repr, split))} into "
                f"{' x '.join(str(len(array.chunksizes[d])) for d in split)} chunks, and {why}. "
                f"Type: {argument}.chunk({call})"
            )
        if array.chunks is not None and any(np.isnan(c) for sizes in array.chunks for c in sizes):
            raise ChunkingError(f"{argument}[{array.name!r}] has chunks of unknown size; type {argument}.compute_chunk_sizes()")


def lay(
    function: Callable[..., np.ndarray],
    payload: Any,
    arrays: Sequence[xr.DataArray],
    *,
    time: str | None,
    horizontal: tuple[str, str],
    output: tuple[int, int, int, int],
    dtype: np.dtype[Any],
    windows: tuple[int, int] | None = None,
) -> Any:
    """Apply `function` block by block along time.

    Parameters
    ----------
    function
        ``function(index, *fields, payload=...)``: `index` (t,) are positions along the whole time axis, fields are (t, ny, nx);
        returns (t, *output). With `windows`, ``payload.on(rows, columns)`` is the payload for these rows and columns of the result.
    payload
        Passed on; one shared task where the arrays are chunked.
    arrays
        Fields with dimensions `time` (if any) and `horizontal`, in any order.
    time, horizontal
        Names of dimensions.
    output
        Sizes of the trailing axes of the result: members, variables, rows, columns.
    dtype
        Of the result, which `function` returns.
    windows
        Rows and columns of a chunk of the result, which is then lazy whatever the input; None for whole fields.

    Returns
    -------
    array
        Shape (times, *output); a numpy array, or a dask array with nothing computed.
    """
    ordered = [a.transpose(*([time] if time else []), *horizontal) for a in arrays]
    plain = [a.data if time else a.data[None] for a in ordered]
    length = plain[0].shape[0]
    if not is_chunked(arrays) and windows is None:
        return function(np.arange(length), *plain, payload=payload)
    import dask.array as da
    from dask.delayed import delayed

    chunks = next((a.chunks[0] for a in plain if hasattr(a, "chunks")), (1,) * length)
    blocks = [da.asarray(a).rechunk((chunks, -1, -1)) for a in plain]
    index = da.arange(length, chunks=(chunks,), dtype=np.int64)
    shared = delayed(payload, pure=True, traverse=False)
    operands: list[Any] = [index, "t"]
    for block in blocks:
        operands += [block, "tyx"]
    new_axes = dict(zip("mvrc", output, strict=True))
    if windows is not None:
        for axis, size in zip("rc", windows, strict=True):
            operands += [da.arange(new_axes.pop(axis), chunks=size, dtype=np.int64), axis]
        function = _on_window(function)
    return da.blockwise(
        function, "tmvrc", *operands, payload=shared, dtype=dtype, concatenate=True,
        new_axes=new_axes, meta=np.empty((0,) * 5, dtype=dtype),
    )  # fmt: skip


class _on_window:
    """A function whose last two operands are the rows and columns of its window."""

    def __init__(self, function: Callable[..., np.ndarray]) -> None:
        self.function = function

    def __call__(self, index: np.ndarray, *operands: np.ndarray, payload: Any) -> np.ndarray:
        """Call the function for a window."""
        *fields, rows, columns = operands
        return self.function(index, *fields, payload=payload.on(rows, columns))


def lay_fields(
    function: Callable[[np.ndarray], np.ndarray], array: xr.DataArray, lead: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Any:
    """Apply `function` to an array block by block along its first `lead` dimensions; the others become `shape`.

    Parameters
    ----------
    function
        From (..., *source) to (..., *shape); one shared task where the array is chunked.
    array
        Leading dimensions first, horizontal ones in one chunk.
    lead
        Number of leading dimensions.
    shape
        Trailing shape of the result.
    dtype
        Of the result, which `function` returns.
    """
    data = array.data
    if array.chunks is None:
        return function(np.asarray(data))
    import dask.array as da
    from dask.delayed import delayed

    leading, inner, outer = (tuple(range(a, b)) for a, b in ((0, lead), (lead, data.ndim), (100, 100 + len(shape))))
    whole = data.rechunk(dict.fromkeys(inner, -1))
    return da.blockwise(
        _call, (*leading, *outer), whole, (*leading, *inner), function=delayed(function, pure=True, traverse=False), dtype=dtype,
        concatenate=True, new_axes=dict(zip(outer, shape, strict=True)), meta=np.empty((0,) * (lead + len(shape)), dtype=dtype),
    )  # fmt: skip


def _call(block: np.ndarray, *, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return function(block)

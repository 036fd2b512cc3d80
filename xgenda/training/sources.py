"""Training fields that are read when asked for: those of a Dataset of any size, in memory, in files or in an object store."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import dask
import numpy as np
import xarray as xr

from xgenda import metadata, states
from xgenda.curvilinear import AnyGrid, PointSet
from xgenda.errors import GridError, OptionError, StateError, UnitsError
from xgenda.formatting import user_level
from xgenda.grids import Orientation
from xgenda.models.spec import VariableSpec
from xgenda.states import State

FEWEST = 20
BLOCK = 8 * 2**20  # bytes that are read at once, at least: large enough that the time goes into reading
LARGEST_CHUNK = 256 * 2**20  # bytes of all channels, above which parts of chunks are read
WORKERS = 2  # threads that read
Window = tuple[slice, slice]  # rows and columns in model order
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Samples:
    """Fields (n, channels, ny, nx) in physical units with what describes them; `valid` (channels, ny, nx) where some cells are masked."""

    values: np.ndarray
    time: xr.DataArray | None
    grid: AnyGrid
    variables: tuple[VariableSpec, ...]
    dimension: str
    valid: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Number of fields."""
        return len(self.values)

    @property
    def labels(self) -> list[str]:
        """What to call each sample in messages."""
        return _labels(self.time, len(self.values), self.dimension)

    @property
    def period(self) -> str:
        """First and last time, for the description of the model."""
        return _period(self.time, len(self.values), self.dimension)


@dataclass(frozen=True)
class Part:
    """A variable of the Dataset and the channels that it holds: one, or one per level.

    Attributes
    ----------
    variable
        With the dimensions of the Dataset, in its order.
    channels
        Their positions among all channels.
    level
        Name of the vertical dimension, None without.
    levels
        Position along it of each channel.
    """

    variable: xr.Variable
    channels: tuple[int, ...]
    level: str | None
    levels: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """Fields of a Dataset that are read when asked for; made by `open_source`.

    Rows are numbered from 0 to `size` - 1. Methods may be called from several threads.

    Attributes
    ----------
    parts, orientation, dims
        Where the fields are, how they get into model order, and the names of their horizontal dimensions.
    places
        Position of each row along `dimension`.
    time
        Of each row; None without.
    grid, variables, dimension
        As in `Samples`.
    dtype
        float32 where all is stored as such, else float64.
    chunk
        Rows that are stored together, and are read together where possible; 1 where each can be read for itself.
    valid
        False where a cell is NaN in every field, shape (channels, ny, nx); None without such cells. Known after a first pass.
    fill
        What is read there instead, shape (channels,).
    factors
        Factor and offset to the units of `variables` from those that are stored, per channel; None where they are the same.
    argument, fewest
        Name of the Dataset in messages, and the fewest fields that will do.
    """

    parts: tuple[Part, ...]
    orientation: Orientation
    dims: tuple[str, str]
    places: np.ndarray
    time: xr.DataArray | None
    grid: AnyGrid
    variables: tuple[VariableSpec, ...]
    dimension: str
    dtype: np.dtype[Any]
    chunk: int
    valid: np.ndarray | None = None
    fill: np.ndarray | None = None
    factors: tuple[tuple[float, float], ...] | None = None
    argument: str = "ds"
    fewest: int = FEWEST

    @property
    def size(self) -> int:
        """Number of fields."""
        return len(self.places)

    @property
    def names(self) -> list[str]:
        """Names of the channels."""
        return [v.name for v in self.variables]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Fields, channels, rows and columns."""
        return self.size, len(self.variables), *self.grid.plane

    @property
    def row_bytes(self) -> int:
        """Bytes of all channels at one time."""
        return int(np.prod(self.shape[1:])) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all fields, unpacked."""
        return self.size * self.row_bytes

    @property
    def period(self) -> str:
        """First and last time, for the description of the model."""
        return _period(self.time, self.size, self.dimension)

    @property
    def labels(self) -> list[str]:
        """What to call each field in messages."""
        return _labels(self.time, self.size, self.dimension)

    @property
    def in_memory(self) -> bool:
        """Whether nothing has to be read or computed."""
        return all(part.variable._in_memory for part in self.parts)

    def only(self, rows: np.ndarray) -> Self:
        """Return the source of some of the fields, in this order."""
        time = None if self.time is None else self.time.isel({self.dimension: rows})
        return dataclasses.replace(self, places=self.places[rows], time=time)

    def of(self, names: Sequence[str]) -> Source:
        """Return the source of some of the channels, in this order; before the pass that finds the mask."""
        parts = []
        for part in self.parts:
            kept = [k for k, c in enumerate(part.channels) if self.variables[c].name in names]
            channels = tuple(names.index(self.variables[part.channels[k]].name) for k in kept)
            if kept:
                parts.append(
                    dataclasses.replace(part, channels=channels, levels=tuple(part.levels[k] for k in kept if part.levels))
                )
        order = [self.names.index(n) for n in names]
        factors = None if self.factors is None else tuple(self.factors[c] for c in order)
        return dataclasses.replace(self, parts=tuple(parts), variables=tuple(self.variables[c] for c in order), factors=factors)

    def read(self, rows: np.ndarray | Sequence[int], window: Window | None = None) -> np.ndarray:
        """Return fields in physical units and model order.

        Parameters
        ----------
        rows
            In any order; may repeat.
        window
            Rows and columns of a part of the grid, with start and stop; None for the whole.

        Returns
        -------
        ndarray
            Shape (rows, channels, ny, nx); masked cells are filled, where the mask is known.
        """
        places, back = np.unique(self.places[np.asarray(rows, dtype=np.int64)], return_inverse=True)
        window = (slice(0, self.shape[2]), slice(0, self.shape[3])) if window is None else window
        plane = [part.stop - part.start for part in window]
        out = np.empty((len(places), len(self.variables), *plane), self.dtype)
        for run in self._runs(places):
            first = int(places[run][0])
            stop = int(places[run][-1]) + 1
            if stop - first == run.stop - run.start:
                self._load(first, stop, window, out[run])
            else:
                raw = np.empty((stop - first, *out.shape[1:]), self.dtype)
                self._load(first, stop, window, raw)
                out[run] = raw[places[run] - first]
        for c, (factor, offset) in enumerate(self.factors or ()):
            if (factor, offset) != (1.0, 0.0):
                out[:, c] = out[:, c] * out.dtype.type(factor) + out.dtype.type(offset)
        if self.valid is not None and self.fill is not None:
            for c, valid in enumerate(self.valid):
                out[:, c, ~valid[window]] = self.fill[c]
        return out if np.array_equal(back, np.arange(len(out))) else out[back]

    def read_all(self) -> np.ndarray:
        """Return all fields, read by several threads."""
        blocks = self.blocks()
        if len(blocks) == 1:
            return self.read(blocks[0])
        out = np.empty(self.shape, self.dtype)
        with contextlib.closing(in_order(self.read, blocks, WORKERS)) as found:
            for rows, values in zip(blocks, found, strict=True):
                out[rows] = values
        return out

    def sample(self, rows: np.ndarray | None = None) -> Samples:
        """Return fields in memory; all by default."""
        values = self.read_all() if rows is None else self.read(rows)
        time = self.time if rows is None or self.time is None else self.time.isel({self.dimension: np.asarray(rows)})
        return Samples(values.astype(np.float64, copy=False), time, self.grid, self.variables, self.dimension, self.valid)

    def blocks(self, nbytes: int = BLOCK) -> list[np.ndarray]:
        """Return the rows in blocks of `step` fields, the last perhaps of less."""
        return np.split(np.arange(self.size), np.flatnonzero(np.diff(self.places // self.step(nbytes))) + 1)

    def step(self, nbytes: int = BLOCK) -> int:
        """Return a number of fields of at least `nbytes` that is a multiple of those of a chunk; of large chunks a part."""
        if self.chunk * self.row_bytes > LARGEST_CHUNK:
            return max(1, LARGEST_CHUNK // self.row_bytes)
        return self.chunk * max(1, -(-nbytes // (self.row_bytes * self.chunk)))

    def in_units(self, units: Sequence[str | None]) -> Source:
        """Return the source with its channels in other units; None leaves one as it is, and so does a channel without units.

        Raises
        ------
        UnitsError
            If some measure something else.
        """
        assert self.fill is None, "units come before the pass that finds the mask"
        factors, variables = [], []
        for (factor, offset), v, wanted in zip(self.factors or ((1.0, 0.0),) * len(units), self.variables, units, strict=True):
            try:
                further = metadata.unit_factors(v.units, wanted) if v.units and wanted else (1.0, 0.0)
            except UnitsError as problem:
                raise UnitsError(f"{self.argument}[{v.name!r}]: {problem}") from problem
            factors.append((factor * further[0], offset * further[0] + further[1]))
            variables.append(dataclasses.replace(v, units=wanted) if v.units and wanted else v)
        return dataclasses.replace(self, factors=tuple(factors), variables=tuple(variables))

    def masked(self, missing: np.ndarray, valid: np.ndarray, fill: np.ndarray) -> Source:
        """Return the source without missing fields, and with its mask.

        Parameters
        ----------
        missing
            True for rows to leave out, shape (size,).
        valid
            Shape (channels, ny, nx).
        fill
            Shape (channels,).

        Raises
        ------
        StateError
            If too few fields are left.
        """
        out = self
        if missing.any():
            warnings.warn(
                f"{int(missing.sum())} of {self.size} fields along {self.dimension!r} are missing (NaN everywhere) and are left out, the "
                f"first at {self._label(int(missing.argmax()))}.",
                stacklevel=user_level(),
            )
            out = self.only(np.flatnonzero(~missing))
            check_size(out.size, out)
        return out if valid.all() else dataclasses.replace(out, valid=valid, fill=fill)

    def _label(self, row: int) -> str:
        return f"index {int(self.places[row])}" if self.time is None else str(self.time.values[row])[:19]

    def _runs(self, places: np.ndarray) -> list[slice]:
        """Return which of some increasing places to read together: neighbours, and those of a chunk, no more than a block."""
        apart = (np.diff(places) > 1) & (np.diff(places // self.chunk) > 0)
        cuts = np.flatnonzero(apart | (np.diff(places // self.step()) > 0)) + 1
        edges = [0, *cuts.tolist(), len(places)]
        return [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]

    def _load(self, start: int, stop: int, window: Window, out: np.ndarray) -> None:
        """Write the fields between two places into `out` in model order, with the NaN that they hold."""
        spans, picks = zip(
            *(_span(i[w]) for i, w in zip((self.orientation.rows, self.orientation.columns), window, strict=True)), strict=True
        )
        # the threads are ours, where the user has not chosen otherwise, a cluster for example
        scheduler = {} if dask.config.get("scheduler", None) is not None else {"scheduler": "synchronous"}
        for part in self.parts:
            dims = (self.dimension, *([part.level] if part.level else []), *self.dims)
            index: dict[Any, Any] = {d: 0 for d in part.variable.dims if d not in dims}
            index |= {self.dimension: slice(start, stop), **dict(zip(self.dims, spans, strict=True))}
            if part.level is not None and len(part.levels) == 1:
                index[part.level] = slice(part.levels[0], part.levels[0] + 1)
            found = part.variable.isel(index).load(**scheduler)
            values = np.transpose(found.values, [found.dims.index(d) for d in dims])
            for channel, level in zip(part.channels, part.levels or (None,), strict=True):
                field = values if level is None else values[:, level if len(part.levels) > 1 else 0]
                out[:, channel] = field[..., picks[0], :][..., picks[1]]


def open_source(
    ds: xr.Dataset | xr.DataArray, variables: Sequence[str] | None = None, argument: str = "ds", fewest: int = FEWEST
) -> Source:
    """Check what can be checked without reading a field, and return a `Source`.

    Parameters
    ----------
    ds
        In memory, chunked with dask, or as opened from files or a store.
    variables
        Which to take; None for all on the grid.
    argument
        Name of `ds` in messages.
    fewest
        The fewest fields that will do.

    Raises
    ------
    OptionError
        If a variable is missing or there is no sample dimension.
    GridError
        If the fields are not on rows and columns.
    StateError
        If there are too few.
    """
    ds = metadata.as_dataset(ds, argument)
    for name in variables or ():
        metadata.match_variable(ds, name, None, argument)
    mappings = [str(n) for n, v in ds.data_vars.items() if "grid_mapping_name" in v.attrs]
    state = states.enter(ds if variables is None else ds[[*variables, *mappings]], argument)
    names = metadata.data_variables(state.ds, state.layout)
    if not names:
        raise OptionError(f"{argument} has no variable on the dimensions {' and '.join(map(repr, state.layout.dims))}.")
    if isinstance(state.grid, PointSet):
        raise GridError(
            f"{argument} holds {state.grid.describe()}; the network needs rows and columns. Put them on a grid first: "
            f"{argument}.genda.regrid(grid), or use xgenda.gaussian_prior({argument})"
        )
    metadata.check_dims(state.ds, names, state.layout, argument)
    dimension = states.sample_dimension(state, names, argument)
    for n in names:
        if dimension not in state.ds[n].dims:
            raise OptionError(f"{argument}[{n!r}] has no dimension {dimension!r}; leave it out: {argument}.drop_vars({n!r})")
    parts = _parts_of(state, names)
    layout, size = state.layout, state.ds.sizes[dimension]
    time = state.ds[layout.time] if layout.time is not None and state.ds[layout.time].dims == (dimension,) else None
    if time is not None:
        _check_times(time, argument)
    found = Source(
        parts,
        state.orientation,
        layout.dims,
        np.arange(size),
        None if time is None else time.compute(),
        state.grid,
        tuple(VariableSpec(n, **states.described(state.ds, n)) for n in names),
        dimension,
        np.dtype(np.float32) if all(p.variable.dtype in (np.float16, np.float32) for p in parts) else np.dtype(np.float64),
        min(size, max(_chunk_of(p.variable, dimension) for p in parts)),
        argument=argument,
        fewest=fewest,
    )
    check_size(size, found)
    return found


def _check_times(time: xr.DataArray, argument: str) -> None:
    """Refuse what are no times."""
    if time.dtype.kind != "M" and not hasattr(time.values[0], "calendar"):
        raise OptionError(
            f"{argument}[{time.name!r}] holds {time.dtype}, not times. Decode them: xr.decode_cf({argument}), or assign some: "
            f"{argument}.assign_coords({time.name}=pd.date_range('2000-01-01', periods={time.size}))"
        )
    if missing := int(time.isnull().sum()):
        raise OptionError(
            f"{argument}[{time.name!r}] has {missing} missing times (NaT). Leave them out: {argument}.dropna({time.name!r})"
        )


def check_size(size: int, source: Source) -> None:
    """Refuse too few fields."""
    if size < source.fewest:
        raise StateError(
            f"{source.argument} has {size} fields along {source.dimension!r}; at least {source.fewest} are needed. With so few, a Gaussian "
            f"prior is the better model: xgenda.gaussian_prior({source.argument})"
        )


def spread(rows: np.ndarray, count: int, run: int = 1) -> np.ndarray:
    """Return some of many rows, at most `count`, in evenly spaced runs of `run` that follow each other in `rows`."""
    if len(rows) <= count:
        return rows
    starts = np.linspace(0, len(rows) - run, max(1, count // run)).round().astype(np.int64)
    return np.asarray(rows[np.unique(starts[:, None] + np.arange(run))])


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int | None = None) -> Generator[R, None, None]:
    """Yield `function` of each item in their order, computed by threads that are at most `ahead` items in front.

    An exception in a thread is raised here. When the generator is closed, the threads have ended.
    """
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, "xgenda")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > (2 * workers if ahead is None else ahead):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _labels(time: xr.DataArray | None, size: int, dimension: str) -> list[str]:
    return [f"{dimension} {k}" for k in range(size)] if time is None else [str(t)[:19] for t in time.values]


def _period(time: xr.DataArray | None, size: int, dimension: str) -> str:
    if time is None:
        return f"{size} fields along {dimension}"
    first, last = min(time.values), max(time.values)
    return f"{str(first)[:10]} to {str(last)[:10]}"


def _parts_of(state: State, names: list[str]) -> tuple[Part, ...]:
    """Return the user's variables that hold these channels, so that levels of one chunk are read together."""
    out = []
    for variable in state.variables(names):
        vertical = state.verticals.get(variable)
        if vertical is None:
            out.append(Part(state.ds[variable].variable, (names.index(variable),), None, ()))
            continue
        own = {c: i for i, c in enumerate(vertical.channels(variable)) if c in names}
        channels = tuple(names.index(c) for c in own)
        out.append(Part(state.origin[variable].variable, channels, vertical.dim, tuple(own.values())))
    return tuple(out)


def _chunk_of(variable: xr.Variable, dimension: str) -> int:
    """Return how many entries along a dimension are stored together."""
    if variable.chunks is not None:
        return max(1, *variable.chunks[variable.dims.index(dimension)])
    preferred = variable.encoding.get("preferred_chunks") or {}
    return max(1, int(np.max(preferred.get(dimension, 1))))


def _span(index: np.ndarray) -> tuple[slice, Any]:
    """Return the slice of the user's axis that holds some rows or columns, and what brings these into model order."""
    low, high = int(index.min()), int(index.max()) + 1
    local, count = index - low, high - low
    if (local == np.arange(count)[: len(local)]).all() and len(local) == count:
        return slice(low, high), slice(None)
    if len(local) == count and (local == np.arange(count)[::-1]).all():
        return slice(low, high), slice(None, None, -1)
    return slice(low, high), local

"""The Zarr store of a cycle: what a run leaves on disk, whole up to its last cycle whatever happens, so that it can go on.

A store is a folder, a Zarr group of format 2 (which all versions of zarr read) without compression, with all times laid out from the start.
Nothing that was written is touched again: each cycle adds its own chunks, and when the disk has them, ``cycle.json`` in the folder, renamed into
its place, says that it is whole. Chunks behind that are those of a cycle that was interrupted, and are written again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import numbers
import os
import shutil
import socket
import warnings
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from xgenda.errors import CheckpointError, OptionError, OutputExistsError
from xgenda.files import aside, flush

FORMAT = 1
RECORD = "cycle.json"
LARGEST_CHUNK = 2**26  # bytes
#: Attributes of how values were packed in a file, of all arrays and of times.
PACKING = ("scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned", "dtype", "coordinates")
TIME_PACKING = ("units", "calendar")


@dataclass
class CycleStore:
    """An open store.

    Attributes
    ----------
    path
        Its folder.
    record
        What ``cycle.json`` holds: 'done', the number of whole cycles; 'options'; 'content', checksums; 'seed'; 'observations', a
        checksum of those of the cycles that are whole; 'window_given', whether the width of time windows was; 'leads', seconds that each
        forecast before the last of these went; 'checksums', CRC-32 of the chunks of the last.
    """

    path: Path
    record: dict[str, Any]
    _headers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Number of whole cycles."""
        return int(self.record["done"])

    def write(self, cycle: int, values: Mapping[str, np.ndarray], observations: str, leads: Sequence[float] = ()) -> None:
        """Write the next cycle, and when all of it is on the disk that it is whole.

        Parameters
        ----------
        cycle
            Its number.
        values
            Of each array.
        observations
            Checksum of those up to here.
        leads
            Seconds that each call of the forecast went ahead, from the analysis before.
        """
        sums: dict[str, int] = {}
        for name, array in values.items():
            for place, block in self._blocks(name, array):
                data, file = np.ascontiguousarray(block).tobytes(), _chunk_of(name, cycle, place)
                with aside(self.path / file, durable=True) as partial:
                    partial.write_bytes(data)
                sums[file] = zlib.crc32(data)
            flush(self.path / name)
        self.record |= {"done": cycle + 1, "observations": observations, "leads": list(leads), "checksums": sums}
        _write_record(self.path, self.record)

    def _header(self, name: str) -> dict[str, Any]:
        if name not in self._headers:
            self._headers[name] = json.loads((self.path / name / ".zarray").read_text(encoding="utf-8"))
        return self._headers[name]

    def _blocks(self, name: str, values: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yield the places of the chunks of one cycle of an array and their values, which without compression are their bytes."""
        header = self._header(name)
        chunks, kind = header["chunks"][1:], np.dtype(header["dtype"])
        for place in np.ndindex(*(n // c for n, c in zip(values.shape, chunks, strict=True))):
            block = values[tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunks, strict=True))]
            yield place, np.asarray(block, dtype=kind)

    def check_layout(self, layout: xr.Dataset) -> None:
        """Refuse a store whose arrays are not there, or not as they were laid out.

        Raises
        ------
        CheckpointError
            With the first that is not.
        """
        for name, variable in layout.variables.items():
            if "time" not in variable.dims:
                continue
            try:
                header = self._header(str(name))
                found = tuple(header["shape"][1:]), np.dtype(header["dtype"])
            except (OSError, ValueError, KeyError, TypeError) as problem:
                raise damaged(self.path, f"its array {name!r} cannot be read: {type(problem).__name__}: {problem}") from problem
            wanted = variable.shape[1:], variable.dtype
            if name != "time" and (found != wanted or header.get("compressor") is not None or header.get("filters")):
                raise damaged(
                    self.path, f"its array {name!r} is of {found[1]} {found[0]}, and {wanted[1]} {wanted[0]} was laid out"
                )

    def whole(self, layout: xr.Dataset) -> tuple[int, str]:
        """Return how many of the cycles that were written are still whole, by the sizes of their chunks and the checksums of the last.

        Returns
        -------
        int
            The number of the first that is not, else that of all.
        str
            What is wrong with it; empty where all is well.
        """
        worst, why = self.done, ""
        sums = self.record.get("checksums", {})
        for name in (str(n) for n, v in layout.variables.items() if "time" in v.dims and n != "time"):
            header = self._header(name)
            size = int(np.prod(header["chunks"])) * np.dtype(header["dtype"]).itemsize
            places = list(np.ndindex(*(n // c for n, c in zip(header["shape"][1:], header["chunks"][1:], strict=True))))
            for cycle, place in itertools.product(range(worst), places):
                file = _chunk_of(name, cycle, place)
                if problem := self._problem(file, size, sums.get(file)):
                    worst, why = cycle, f"{file} {problem}"
                    break
        return worst, why

    def _problem(self, file: str, size: int, checksum: int | None) -> str:
        path = self.path / file
        try:
            found = path.stat().st_size
        except OSError:
            return "is missing"
        if found != size:
            return f"has {found} bytes instead of {size}"
        if checksum is not None and zlib.crc32(path.read_bytes()) != checksum:
            return "has another content than was written"
        return ""

    def back_to(self, cycle: int, observations: str) -> None:
        """Forget the cycles from this one on."""
        self.record |= {"done": cycle, "observations": observations, "leads": [], "checksums": {}}
        _write_record(self.path, self.record)

    def read(self, name: str, cycle: int) -> np.ndarray:
        """Return what was written of one cycle, as it was."""
        return np.asarray(self._group("r")[name][cycle])

    def _group(self, mode: Any) -> Any:
        import zarr

        return zarr.open_group(str(self.path), mode=mode)

    def compare(self, options: Mapping[str, Any], content: Mapping[str, str], *, window_given: bool = True) -> None:
        """Refuse to go on with other data or options.

        The windows count where both were given. What else they are, the spacing of the times or the one of a single time, may change
        with these, as long as the cycles have the observations that they had.

        Raises
        ------
        OptionError
            With the differences.
        """
        now = json.loads(json.dumps(options))
        before = self.record["options"]
        if not (window_given and self.record.get("window_given", before.get("window") is not None)):
            now = {**now, "window": before.get("window")}
        # errors of the cycles that are over are in the checksum of their observations; those of later ones are new
        asked = sorted({*before, *now} - {"error"})
        lines = [line for k in asked for line in _differences(k, before.get(k, "not there"), now.get(k, "not there"))]
        lines += [f"  {k}: the data differ" for k, v in content.items() if v != self.record["content"].get(k)]
        if lines:
            raise OptionError(
                f"resume=True goes on with the same data and options only, and those of {self.path} differ:\n"
                + "\n".join(lines)
                + "\nCall cycle as before, or start again: resume=False, overwrite=True"
            )

    def adopt_window(self, window: str, given: bool) -> None:
        """Write down the window from here on."""
        if (self.record["options"].get("window"), self.record.get("window_given")) != (window, given):
            self.record |= {"options": {**self.record["options"], "window": window}, "window_given": given}
            _write_record(self.path, self.record)

    def extend(self, layout: xr.Dataset) -> None:
        """Make room for more times; readers see the old ones until all is done."""
        import zarr

        times = layout.sizes["time"]
        group = self._group("r+")
        stored = xr.open_zarr(self.path, consolidated=True, decode_cf=False)
        names = [str(n) for n in stored.variables if "time" in stored[n].dims]
        encoding = {k: stored["time"].attrs[k] for k in ("units", "calendar")}
        encoded = xr.conventions.encode_cf_variable(
            xr.Variable("time", layout["time"].values, encoding=encoding | {"dtype": stored["time"].dtype}), name="time"
        ).values
        arrays = {n: group[n] for n in names}
        longer = any(a.shape[0] < times for a in arrays.values()) or stored.sizes["time"] < times
        for array in arrays.values() if longer else ():  # also those that an extension which was interrupted had resized
            array.resize((max(times, array.shape[0]), *array.shape[1:]))
        if longer or (arrays["time"][:times] != encoded).any():  # those of cycles that are yet to come may have changed
            arrays["time"][:times] = encoded
        window = layout.attrs.get("xgenda_window")
        other = group.attrs.get("xgenda_window") != window
        if other:
            group.attrs["xgenda_window"] = window
        if longer or other:
            self._headers.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other formats have no consolidated metadata; this one has
                zarr.consolidate_metadata(str(self.path))
        for file in (*self.path.glob(".z*"), *self.path.glob("*/.z*"), *(self.path / "time").iterdir()):
            flush(file)


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield a line for each option that differs, of mappings only what does."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(f"{name}.{key}", before.get(key, "not there"), now.get(key, "not there"))
    elif before != now:
        yield f"  {name}: {before!r} then, {now!r} now"


def _chunk_of(name: str, cycle: int, place: Sequence[int]) -> str:
    """Return the file of a chunk of one cycle, below the folder of the store."""
    return f"{name}/{'.'.join(map(str, (cycle, *place)))}"


def damaged(path: Path, why: str) -> CheckpointError:
    """Return the error of a store that cannot be gone on from."""
    return CheckpointError(f"{path} is damaged: {why}. Put back a copy of it, or start again: resume=False, overwrite=True")


def check_path(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a store.

    Raises
    ------
    OptionError
        If it is no local path.
    """
    text = os.fspath(path)
    if "://" in text:
        raise OptionError(
            f"store={text!r} is not accepted; a store lies on a local disk: store='run.zarr'. Copy it when it is done."
        )
    target = Path(text)
    if not target.absolute().parent.is_dir():
        raise OptionError(f"store: {target.parent} is no folder; make it first: mkdir -p {target.parent}")
    return target


def create(path: Path, layout: xr.Dataset, record: Mapping[str, Any], *, overwrite: bool) -> CycleStore:
    """Make an empty store.

    Parameters
    ----------
    path
        Its folder.
    layout
        All that will be in it, of dask arrays along ``time``.
    record
        For ``cycle.json``.
    overwrite
        Whether a store of that name is replaced.

    Raises
    ------
    OutputExistsError
        If there is one.
    """
    import zarr

    if path.exists():
        if not (path / RECORD).is_file():
            raise OutputExistsError(f"{path} exists and is no store of a cycle. Choose another name, or remove it yourself.")
        if not overwrite:
            raise OutputExistsError(
                f"{path} holds a cycle of {read_record(path)['done']} analyses. Go on with it: resume=True, or start again: overwrite=True"
            )
    layout = _storable(layout)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    plain = "compressors" if int(zarr.__version__.split(".")[0]) > 2 else "compressor"
    try:
        encoding = {
            str(n): {"chunks": _chunks(v), plain: None} for n, v in layout.variables.items() if "time" in v.dims and n != "time"
        }
        layout["time"].encoding = {
            "units": f"microseconds since {str(layout['time'].values[0])[:19]}",
            "dtype": np.dtype(np.int64),
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata")
            layout.to_zarr(partial, mode="w", compute=False, encoding=encoding, consolidated=True, zarr_format=2)
        whole = {"format": FORMAT, "done": 0, "observations": "", "leads": [], "checksums": {}, **record}
        _write_record(partial, whole)
        if path.exists():
            shutil.rmtree(path)
        for file in (p for p in partial.rglob("*") if p.is_file()):
            flush(file)
        partial.rename(path)
        flush(path.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return CycleStore(path, whole)


def _storable(layout: xr.Dataset) -> xr.Dataset:
    """Return a Dataset whose values are read back as they are, and whose attributes Zarr can hold.

    Attributes that tell of packing would have the values unpacked once more. Integers that still are packed are unpacked now.
    """
    variables: dict[Hashable, xr.Variable] = {}
    for name, given in layout.variables.items():
        variable = given.copy(deep=False)
        if variable.dtype.kind in "iu" and {"scale_factor", "add_offset"} & set(variable.attrs):
            variable = xr.conventions.decode_cf_variable(str(name), variable, decode_times=False)
        dropped = (*PACKING, *TIME_PACKING) if variable.dtype.kind in "mMO" else PACKING
        variable.attrs = {k: _plain(v) for k, v in variable.attrs.items() if k not in dropped}
        variable.encoding = {}
        variables[name] = variable
    coords = {n: v for n, v in variables.items() if n in layout.coords}
    attrs = {k: _plain(v) for k, v in layout.attrs.items()}
    return xr.Dataset({n: v for n, v in variables.items() if n not in coords}, coords, attrs)


def _plain(value: Any) -> Any:
    """Return the value of an attribute as something that Zarr holds; what it cannot hold as text."""
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, (str, numbers.Number)) or (isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in "fiub"):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(v, (str, numbers.Number)) for v in value):
        return value
    return str(value)


def reopen(path: Path) -> CycleStore:
    """Return a store to go on with."""
    store = CycleStore(path, read_record(path))
    for left in (*path.glob(f".{RECORD}.partial-*"), *path.glob("*/.*.partial-*")):  # by processes that were killed
        left.unlink(missing_ok=True)
    return store


def read_record(path: Path) -> dict[str, Any]:
    """Return what ``cycle.json`` says.

    Raises
    ------
    CheckpointError
        If there is none, or one of another version, or one that is damaged.
    """
    try:
        found: dict[str, Any] = json.loads((path / RECORD).read_text(encoding="utf-8"))
        version = found["format"]
    except (FileNotFoundError, NotADirectoryError):
        why = (
            f"it has no {RECORD}, which each has"
            if path.is_dir()
            else "it is a file"
            if path.exists()
            else "there is no such folder"
        )
        raise CheckpointError(f"{path} is no store of a cycle: {why}. Give what was given to xgenda.cycle(store=...).") from None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(f"{path} is no store of a cycle ({problem}).") from problem
    if version != FORMAT:
        raise CheckpointError(f"{path} was written by another version of xgenda (format {version}; this one reads {FORMAT}).")
    for key, kind in (("done", int), ("seed", int), ("observations", str), ("options", dict), ("content", dict)):
        if not isinstance(found.get(key), kind) or (key == "done" and found[key] < 0):
            raise damaged(path, f"{RECORD} has {key}={found.get(key)!r}")
    return found


def open_cycles(path: str | os.PathLike[str]) -> xr.Dataset:
    """Open the store of a cycle, also of one that is still running or was interrupted.

    Parameters
    ----------
    path
        What was given to `xgenda.cycle` as ``store``.

    Returns
    -------
    xarray.Dataset
        All whole cycles, lazily.

    Raises
    ------
    CheckpointError
        If it is none, or one that is damaged.
    """
    folder = check_path(path)
    done = int(read_record(folder)["done"])
    try:
        found: xr.Dataset = xr.open_zarr(folder, consolidated=True)
    except (OSError, ValueError, KeyError) as problem:
        raise damaged(folder, f"it cannot be opened as a Zarr group ({type(problem).__name__}: {problem})") from problem
    if done > found.sizes.get("time", 0):
        raise damaged(folder, f"{RECORD} says that {done} cycles are whole, and there is room for {found.sizes.get('time', 0)}")
    return found.isel(time=slice(0, done))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a store for this process.

    Raises
    ------
    OutputExistsError
        If another one writes to it.
    """
    lock = path.with_name(f".{path.name}.lock")
    who = f"process {os.getpid()} on {socket.gethostname()}"
    handle = _taken(lock, who)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _taken(lock: Path, who: str) -> int:
    """Return the file of a lock that is now ours; it is released by the system when this process ends, however it does."""
    try:
        import fcntl
    except ImportError:  # where files cannot be locked, that it exists must do
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            raise _held(lock, f"If that is over, remove it: {lock}") from None
        os.write(handle, who.encode())
        return handle
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise _held(lock, "Wait for it, or choose another store.") from None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == lock.stat().st_ino:  # else it was removed by the one who had it
                os.ftruncate(handle, 0)
                os.write(handle, who.encode())
                return handle
        os.close(handle)


def _held(lock: Path, advice: str) -> OutputExistsError:
    try:
        who = lock.read_text(encoding="utf-8") or "another process"
    except OSError:
        who = "another process"
    return OutputExistsError(f"{lock.name[1:-5]} is being written by {who}. {advice}")


def _chunks(variable: xr.Variable) -> tuple[int, ...]:
    """Return chunks of one time, cut from the front until they are small enough; each axis is whole or in pieces of one."""
    shape = [1, *variable.shape[1:]]
    for axis in range(1, len(shape)):
        if np.prod(shape) * variable.dtype.itemsize <= LARGEST_CHUNK:
            break
        shape[axis] = 1
    return tuple(max(1, n) for n in shape)


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    with aside(path / RECORD, durable=True) as partial:
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    flush(path)

"""Forecast models that are stored as ONNX, run by onnxruntime."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from xgenda.errors import CheckpointError, ChecksumError, OptionError, StateError, check_count, missing_dependency
from xgenda.normalisation import Numbers, read_numbers
from xgenda.observations.times import parse_window
from xgenda.onnx_files import weight_files
from xgenda.published import Interface
from xgenda.vocabulary import SINGLE, split_channel

#: Types of the fields of a model.
KINDS = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes
    ----------
    name
        In the graph.
    channels
        How many.
    lead
        Axes before those of the grid, without a batch.
    batch
        Members at once: None for any number, 0 for no such axis.
    """

    name: str
    channels: int
    lead: tuple[int, ...]
    batch: int | None

    @classmethod
    def of(cls, node: Any, channels: int, plane: tuple[int, int], which: str) -> Port:
        """Read the shape of an input or output.

        Raises
        ------
        OptionError
            If it holds something else than fields of these channels on this grid, such as several times.
        """
        shape = list(node.shape)
        what = f"The {which} {node.name!r} of the model has shape {tuple(shape)}"
        named = [not isinstance(s, int) for s in shape]
        if len(shape) < 3 or any(not n and s != p for s, n, p in zip(shape[-2:], named[-2:], plane, strict=True)):
            raise OptionError(
                f"{what}; (..., channels, latitude, longitude) is needed, with {plane[0]} latitudes and {plane[1]} longitudes."
            )
        lead, open_ = shape[:-2], named[:-2]
        if not any(open_):
            for batch, rest in ((0, lead), (lead[0], lead[1:])):
                if math.prod(rest) == channels:
                    return cls(node.name, channels, tuple(rest), batch)
        else:
            batch, rest, unknown = (None, lead[1:], open_[1:]) if open_[0] and len(lead) > 1 else (0, lead, open_)
            if not open_[0]:
                batch, rest, unknown = (lead[0], lead[1:], open_[1:]) if len(lead) > 1 else (0, lead, open_)
            size = math.prod(r for r, u in zip(rest, unknown, strict=True) if not u)
            if sum(unknown) <= 1 and channels % size == 0 and (any(unknown) or size == channels):
                return cls(
                    node.name, channels, tuple(channels // size if u else r for r, u in zip(rest, unknown, strict=True)), batch
                )
        held = math.prod(s for s in lead if isinstance(s, int))
        if held % channels == 0 and held > channels:
            raise OptionError(
                f"{what}, which is {held // channels} times the {channels} channels: models of several times are not supported, because a state of "
                f"`cycle` is of one. If these are channels, name them all: channels=[...]"
            )
        raise OptionError(
            f"{what}, and {channels} channels are named for it. Name them all, in the order of the model: channels=[...]"
        )


@dataclass(frozen=True, eq=False, repr=False)
class OnnxForecast:
    """A forecast by a model that is stored as ONNX; see `onnx`.

    Attributes
    ----------
    interface
        What it takes and gives.
    identity
        What `cycle` writes down and compares where a run is resumed: checksums of the files and of the options.
    """

    interface: Interface
    identity: Mapping[str, Any]
    session: Any
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    numbers: Numbers
    batch: int
    dtype: Any

    def __repr__(self) -> str:
        """Show what it forecasts, on which grid, and which file it is of."""
        names = self.interface.outputs
        shown = ", ".join(names[:3]) + (f", ... ({len(names)} channels)" if len(names) > 3 else "")
        hours = self.interface.step / np.timedelta64(1, "h")
        return f"<OnnxForecast of {shown}, {hours:g} h, {self.interface.grid.describe()}, sha256 {self.identity['onnx'][:12]}>"

    def __call__(self, ds: xr.Dataset) -> xr.Dataset:
        """Return the state of all members one step later."""
        dtype = np.float64 if self.numbers else self.dtype  # standardised in double precision
        return self.interface.forecast(ds, self._run, self.batch, dtype)

    def _run(self, fields: np.ndarray, time: Any, members: np.ndarray) -> np.ndarray:
        size = len(fields)
        fields = self.numbers.standardised(fields, self.interface.inputs).astype(self.dtype, copy=False)
        if size < self.batch and self.inputs[0].batch:  # the batch of the graph is fixed, and its rest is thrown away
            fields = np.concatenate([fields, np.repeat(fields[-1:], self.batch - size, axis=0)])
        feeds, first = {}, 0
        for port in self.inputs:
            part = fields[:, first : first + port.channels]
            first += port.channels
            lead = port.lead if port.batch == 0 else (len(fields), *port.lead)
            feeds[port.name] = np.ascontiguousarray(part.reshape(*lead, *fields.shape[-2:]))
        out = []
        for port, found in zip(self.outputs, self.session.run([p.name for p in self.outputs], feeds), strict=True):
            wanted = (len(fields), port.channels, *fields.shape[-2:])
            if found.shape[-2:] != wanted[-2:] or found.size != math.prod(wanted):
                raise StateError(
                    f"The output {port.name!r} of the model has shape {found.shape}; {port.channels} channels of {len(fields)} members on "
                    f"{wanted[-2]} x {wanted[-1]} cells are needed."
                )
            out.append(found.reshape(wanted))
        return self.numbers.original(np.concatenate(out, 1), self.interface.outputs)[:size]


def onnx(
    path: str | os.PathLike[str],
    *,
    lead: Any,
    channels: Sequence[str] | Mapping[str, Sequence[str]],
    latitude: Any,
    longitude: Any,
    outputs: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    variables: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    mean: Any = None,
    std: Any = None,
    batch: int = 1,
    threads: int | None = 1,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    sha256: str | None = None,
) -> OnnxForecast:
    """Return a forecast for `xgenda.cycle` from a model that is stored as ONNX, such as Pangu-Weather or a network exported from PyTorch.

    Variables of the state are found by name or standard name, converted to the units of the model, and turned to the order of its latitudes and
    longitudes; what it returns goes the same way back. All values must be finite, before and after.

    Parameters
    ----------
    path
        The file; weights that it keeps in other files are read from beside it.
    lead
        What lies between input and output, such as '6h'.
    channels
        Channels of the input in the order of the model, such as ``["z500", "t850", "t2m"]``; by name of the input where it has several:
        ``{"input": [...], "input_surface": [...]}``. Axes before those of the grid are filled in this order. An input that is not among the
        outputs stays as it is.
    latitude, longitude
        Of the model in degrees, in its order, such as ``numpy.linspace(90, -90, 721)`` and ``numpy.arange(0, 360, 0.25)``.
    outputs
        As `channels`, where they differ; those that the state does not have are left out.
    variables
        Variable of the state by channel, or by what is before the level: ``{"z": "geopotential", "t2m": "temperature@100000Pa"}``. None: by
        name, by other usual names, or by standard name where that tells all.
    units
        Of the model, in the same way. None: those usual for channels such as ``z500`` (m2 s-2), ``t2m`` (K), ``msl`` (Pa), and for all others
        those of the state.
    keep
        Variables of the state that the model does not forecast, which stay as they are. Without their names here they are refused.
    mean, std
        The model sees (x - mean) / std, and returns such: by channel, or as an array with the first axis along all channels of the input, of
        numbers or of fields in the order of the model, in its units; or the path of a ``.npy`` or ``.json`` file with that. None: it takes
        fields as they are.
    batch
        Members that the model is given at once, where it has an axis for them. More take more memory, and may change last bits.
    threads
        Of onnxruntime. None: as many as it likes. Another number may change last bits.
    providers
        Of onnxruntime, in order of preference: ``("CUDAExecutionProvider",)``.
    sha256
        Of the file, which is compared where it is given.

    Returns
    -------
    OnnxForecast
        A function from a Dataset of one time, with or without members, to the same a step later, of the same dtypes. Its `identity` goes into
        the record of a cycle, so that this is not resumed with another file.

    Raises
    ------
    MissingDependencyError
        If onnxruntime is not installed.
    CheckpointError, ChecksumError
        If the file cannot be read, or is another one.
    OptionError, GridError
        If channels and grid do not fit the model, it takes more than fields (such as the time of the year), or fields of several times: a state
        is all that goes round in a cycle. When called, if a channel is not found in the state, or the state has another grid.
    StateError, DivergenceError
        When called, if the state or what the model returns is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from xgenda import forecasts
    >>> levels = (1000, 925, 850, 700, 600, 500, 400, 300, 250, 200, 150, 100, 50)
    >>> pangu = forecasts.onnx(
    ...     "pangu_weather_6.onnx", lead="6h", latitude=np.linspace(90, -90, 721), longitude=np.arange(0, 360, 0.25),
    ...     channels={"input": [f"{v}{p}" for v in "zqtuv" for p in levels], "input_surface": ["msl", "u10m", "v10m", "t2m"]},
    ... )  # doctest: +SKIP
    """
    step = parse_window(lead, "lead")
    check_count("batch", batch)
    if threads is not None:
        check_count("threads", threads)
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"path={str(path)!r} is no file; give that of the model: forecasts.onnx('model.onnx', ...)")
    identity = _identity(file, sha256)
    session = _session(file, threads, providers)
    given = _by_port(channels, [n.name for n in session.get_inputs()], "channels", "input")
    if outputs is None and len(session.get_outputs()) != len(session.get_inputs()):
        raise OptionError(
            f"The model has {len(session.get_inputs())} inputs and {len(session.get_outputs())} outputs; say what the outputs are: "
            f"outputs={{{session.get_outputs()[0].name!r}: [...], ...}}"
        )
    names = [n.name for n in session.get_outputs()]
    returned = dict(zip(names, given.values(), strict=True)) if outputs is None else _by_port(outputs, names, "outputs", "output")
    every = [[c for part in x.values() for c in part] for x in (given, returned)]
    for name in every[0]:
        if name not in (variables or {}) and any(name in names for names, *_ in SINGLE.values()) and split_channel(name)[1]:
            raise OptionError(
                f"{name!r} may be at 10 m or at 10 hPa; say which variable it is: variables={{{name!r}: 'u10'}}, or for the level "
                f"variables={{{name!r}: '{split_channel(name)[0]}@1000Pa'}}"
            )
    interface = Interface.of(every[0], every[1], latitude, longitude, step, variables, units, keep)
    kinds = {n.type for n in session.get_inputs()}
    if len(kinds) > 1 or kinds - set(KINDS):
        raise OptionError(f"The inputs of the model are {', '.join(sorted(kinds))}; one of {', '.join(KINDS)} is needed for all.")
    plane = interface.grid.plane
    ins = tuple(Port.of(n, len(given[n.name]), plane, "input") for n in session.get_inputs())
    outs = tuple(Port.of(n, len(returned[n.name]), plane, "output") for n in session.get_outputs() if n.name in returned)
    fixed = {p.batch for p in ins}
    if len(fixed) > 1:
        raise OptionError(f"The inputs of the model have batches of {', '.join(map(str, fixed))}; they must be the same.")
    most = fixed.pop()
    if batch > 1 and most not in (None, batch):
        raise OptionError(f"batch={batch} is not accepted: the model takes {most or 1} at once. Leave it out.")
    numbers = read_numbers(mean, std, every[0], every[1], plane)
    identity["options"] = hashlib.sha256(f"{interface.settings()} {numbers.checksum()}".encode()).hexdigest()
    return OnnxForecast(interface, identity, session, ins, outs, numbers, most or batch, KINDS[kinds.pop()])


def _identity(file: Path, wanted: str | None) -> dict[str, Any]:
    """Return the checksums of a model."""
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if wanted is not None and found != str(wanted).lower():
        raise ChecksumError(
            f"{file} has the sha256 {found}, and {wanted} is asked for: it is another model, or the download was cut short."
        )
    out: dict[str, Any] = {"onnx": found}
    for name in weight_files(file):
        with open(file.parent / name, "rb") as stream:
            out[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return out


def _session(file: Path, threads: int | None, providers: Sequence[Any]) -> Any:
    """Return the model, ready to run."""
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_dependency("onnxruntime", "onnx", "A forecast model stored as ONNX") from error
    names = [p if isinstance(p, str) else p[0] for p in ([providers] if isinstance(providers, str) else providers)]
    there = onnxruntime.get_available_providers()
    if not names or set(names) - set(there):
        raise OptionError(f"providers={providers!r} is not accepted: this onnxruntime has {', '.join(map(repr, there))}.")
    options = onnxruntime.SessionOptions()
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # warnings of graphs are for their makers
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    try:
        return onnxruntime.InferenceSession(
            os.fspath(file), options, providers=list(providers) if not isinstance(providers, str) else names
        )
    except Exception as error:  # onnxruntime has classes of its own for each kind of failure
        raise CheckpointError(f"{file} cannot be opened as an ONNX model: {error}") from error


def _by_port(given: Any, names: Sequence[str], argument: str, which: str) -> dict[str, list[str]]:
    """Return the channels of each input or output, in the order of the model."""
    example = f"{argument}={{{', '.join(f'{n!r}: [...]' for n in names)}}}"
    if not isinstance(given, Mapping):
        if len(names) > 1 and which == "input":
            raise OptionError(
                f"The model has {len(names)} inputs, {', '.join(map(repr, names))}; say which channels are where: {example}. Models that take more "
                f"than fields, such as the time of the year, are not supported."
            )
        given = {names[0]: given}
    odd = [str(n) for n in given if n not in names]
    lacking = [n for n in names if n not in given] if which == "input" else []
    if odd or lacking:
        raise OptionError(
            f"{argument} names the {which}s {', '.join(map(repr, given))}, and the model has {', '.join(map(repr, names))}: {example}. "
            "Models that take more "
            f"than fields, such as the time of the year, are not supported."
        )
    out = {}
    for name in names:
        part = given.get(name)
        if part is None:
            continue
        if isinstance(part, str) or not isinstance(part, Sequence) or not part or not all(isinstance(c, str) for c in part):
            raise OptionError(
                f"{argument}: {part!r} is not accepted for {name!r}; give names in the order of the model: ['z500', 't850', 't2m']"
            )
        out[name] = list(part)
    return out

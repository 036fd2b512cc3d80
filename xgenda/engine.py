"""The engine: lay one batched posterior sampler over a (chunked) Dataset. The only place where arrays become tensors at inference."""

from __future__ import annotations

import dataclasses
import numbers
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from xgenda import chunking, metadata
from xgenda.curvilinear import AnyGrid
from xgenda.devices import Handle, exclusive, resolve_device
from xgenda.errors import OptionError, StateError, check_count
from xgenda.formatting import progress_bar
from xgenda.grids import Orientation
from xgenda.maps import LinearMap
from xgenda.models.generative import GenerativeModel, PointEvidence, Request, SamplingOptions
from xgenda.models.places import Places
from xgenda.observations.correlations import whitened
from xgenda.observations.operators import Located
from xgenda.observations.places import at_places, interpolated, rounded
from xgenda.observations.quality import Quality, QualityControl, against_background
from xgenda.operators import Operator, extended, extended_deviation
from xgenda.scaling import Scaling

#: Indices, weights, values and variances of no observation.
NOTHING = (np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1)), *np.zeros((2, 0)))
IMPLAUSIBLE = 20.0  # standard deviations from the training climate: surely other units or a fill value


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that a block needs beside its own fields; travels to workers once.

    Attributes
    ----------
    handle
        The model.
    grid, orientation
        Of the input fields.
    factors
        (scale, offset) per variable from the user's units to the model's.
    names
        Variable names, for messages.
    labels, basis
        Time label (t,) and climatology basis (t, k) of every time.
    located
        Observations of all times, or None.
    threshold
        Of the background check, or None.
    quality
        For the buddy check.
    operators
        See `Request`.
    members, seed, options, device
        See `Request`.
    output
        Orientation and shape of the result.
    moments, spread
        Whether mean and standard deviation are asked for, instead of members; and whether the latter is needed.
    conditions
        For downscaling: what the inputs need beside their values.
    outputs
        (scale, offset) per variable of the result, as `factors`; None where these are the same variables.
    window
        See `Request`.
    areal
        Of everything observable, whether it sees more than one place.
    at
        Where the result is wanted, where not on the grid.
    """

    handle: Handle
    grid: AnyGrid
    orientation: Orientation
    factors: tuple[tuple[float, float], ...]
    names: tuple[str, ...]
    labels: np.ndarray
    basis: np.ndarray
    located: Located | None
    threshold: float | None
    members: tuple[int, ...]
    seed: int
    options: SamplingOptions
    device: str
    output: Orientation
    check: bool
    progress: bool | None
    threads: int | None
    moments: bool = False
    spread: bool = True
    dtype: Any = np.float32
    quality: QualityControl = dataclasses.field(default_factory=QualityControl)
    operators: tuple[tuple[Operator, tuple[int, ...]], ...] = ()
    conditions: InputTimes | None = None
    outputs: tuple[tuple[float, float], ...] | None = None
    window: tuple[np.ndarray, np.ndarray] | None = None
    areal: tuple[bool, ...] = ()
    at: AnyGrid | None = None

    def on(self, rows: np.ndarray, columns: np.ndarray) -> Job:
        """Return the job for some rows and columns of the model's grid."""
        return dataclasses.replace(self, window=(rows, columns))


@dataclass(frozen=True, eq=False)
class InputTimes:
    """What the inputs of a downscaling model need beside their values, along the times.

    Attributes
    ----------
    basis
        Climatology basis of each time and its neighbours, shape (t, offsets, k).
    planes
        Inputs that are the same everywhere, shape (t, planes).
    """

    basis: np.ndarray
    planes: np.ndarray


def run(index: np.ndarray, *fields: np.ndarray, payload: Job) -> np.ndarray:
    """Compute one block of times; returns (t, members, variables, rows, columns) in the user's units and order."""
    job = payload
    device = resolve_device(job.device)
    with exclusive(device, job.threads):
        model = job.handle.load()
        total = model.work(len(index), len(job.members), job.options)
        with progress_bar(total, job.progress) as advance:
            request = _request(dataclasses.replace(job, located=None), index, fields, device, advance)
            if job.located is not None:
                located = job.located.between(int(index[0]), int(index[0]) + len(index))
                if job.threshold is not None or job.quality.buddy is not None or job.operators:
                    located = _recheck(job, request, located)
                request = dataclasses.replace(request, evidence=_evidence(job, located, len(index)))
            if job.moments:
                values = torch.stack(model.moments(request, spread=job.spread), 1)
                advance(total)
            else:
                values = model.posterior(request)
    spec = model.spec
    values, valid = _elsewhere(job, model, values)
    shape = (job.at or spec.grid or job.grid).plane if job.window is None else (len(job.window[0]), len(job.window[1]))
    out = values.numpy().reshape(len(index), len(job.members), spec.channels, *shape)
    if not np.isfinite(out).all():
        raise StateError(
            f"The sampler returned values that are not finite at time {job.labels[int(index[np.argwhere(~np.isfinite(out))[0][0]])]} "
            f"with guidance={job.options.guidance!r}. Use guidance='anchor' where the model has a Gaussian, "
            f"more steps, or larger observation errors."
        )
    if spec.scaling is not None and not job.moments:
        out = spec.scaling.clipped(out, 2)
    for c, (scale, offset) in enumerate(job.factors if job.outputs is None else job.outputs):
        if (scale, offset) != (1.0, 0.0):
            shift = np.array([offset, 0.0])[:, None, None] if job.moments else offset  # a standard deviation has no offset
            out[:, :, c] = (out[:, :, c] - shift) / scale
    if valid is not None:
        out[:, :, ~valid] = np.nan
    if job.window is None:
        out = job.output.from_model(out)
    return out.astype(job.dtype, copy=False)


def _elsewhere(job: Job, model: GenerativeModel, values: torch.Tensor) -> tuple[torch.Tensor, np.ndarray | None]:
    """Return values where they are wanted, and the mask there; a model of the cells alone is interpolated."""
    if job.at is None:
        return values, model.valid
    places = rounded(*job.at.points())
    indices, weights, seen = interpolated(job.grid, places, model.spec.channels, model.valid)
    if not model.pointwise:
        values = (values[..., torch.as_tensor(indices)] * torch.as_tensor(weights)).sum(-1)
    return values, None if seen.all() else seen.reshape(-1, *job.at.plane)


def moments(job: Job, *fields: np.ndarray) -> tuple[Any, Any, Request]:
    """Return prior mean and standard deviation at all times, for checks outside of a sampling run."""
    index = np.arange(len(job.labels))
    request = _request(job, index, fields, torch.device("cpu"), lambda _: None)
    mean, deviation = job.handle.load().prior_moments(request)
    return mean, deviation, request


def _recheck(job: Job, request: Request, located: Located) -> Located:
    """Return the observations of a block with the codes of the background check."""
    mean, deviation = job.handle.load().prior_moments(request)
    code, _, _ = background_codes(located, *in_observation_space(job, mean, deviation), job.threshold, job.quality)
    return located.with_code(code)


def in_observation_space(job: Job, mean: torch.Tensor, deviation: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return moments (t, channels, cells) with those of the operators after them, flat, (t, (channels + operators) * cells)."""
    shaped = [m.reshape(*m.shape[:2], *job.grid.plane) for m in (mean, deviation)]
    wide = extended(shaped[0], job.operators), extended_deviation(shaped[0], shaped[1], job.operators)
    return wide[0].flatten(1).numpy(), wide[1].flatten(1).numpy()


def background_codes(
    located: Located, mean: np.ndarray, deviation: np.ndarray, threshold: float | None, quality: QualityControl
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return quality codes after the background and buddy checks, and what the prior says of each observation and how surely.

    `mean` and `deviation` are (t, channels * cells).
    """
    code = located.table.code.copy()
    prior, deviations = np.full(len(code), np.nan), np.full(len(code), np.nan)
    fine = code <= Quality.PASSIVE
    for t in np.unique(located.time_index[fine]):
        rows = np.flatnonzero(fine & (located.time_index == t))
        part, at = located.take(rows), slice(None) if located.trajectory else t
        expected = part.operator(mean[at].ravel())
        spread = part.operator.magnitude(deviation[at].ravel())  # as if the errors of all cells were one; never too small
        prior[rows], deviations[rows] = expected, spread
        code[rows] = against_background(part.table, expected, spread, threshold, quality)
    return code, prior, deviations


def _request(
    job: Job, index: np.ndarray, fields: tuple[np.ndarray, ...], device: torch.device, advance: Callable[[int], None]
) -> Request:
    model = job.handle.load()
    where = f" at {job.labels[index[0]]}" if len(index) == 1 else ""
    channels = []
    for c, (name, given, (scale, offset)) in enumerate(zip(job.names, fields, job.factors, strict=True)):
        field = np.asarray(given)
        checked = field
        if model.gaps:
            checked = np.where(np.isnan(field), np.nanmean(field) if np.isfinite(field).any() else 0.0, field)
        elif (
            model.valid is not None and model.spec.inputs is None
        ):  # what is masked has no value; some number in its place keeps arithmetic finite
            valid = job.orientation.from_model(model.valid[c])
            inside = field[:, valid]
            checked = field = np.where(valid, field, inside[np.isfinite(inside)].mean() if np.isfinite(inside).any() else 0.0)
        if job.check:
            metadata.check_values(checked, name, where=where)
        channels.append(job.orientation.to_model(field).astype(np.float64) * scale + offset)
    values = np.stack(channels, 1)
    climatology = None
    if model.spec.scaling is not None:
        grid = model.spec.grid or job.grid
        mean = model.spec.scaling.climatology(job.basis[index])
        climatology = torch.as_tensor(np.broadcast_to(mean, (len(index), model.spec.channels, *grid.plane)).copy()).flatten(2)
    standardised = planes = None
    inputs = model.spec.inputs
    if inputs is not None and job.conditions is not None:
        parts = values.reshape(len(index), len(inputs.offsets), len(inputs.variables), *values.shape[2:])
        basis = job.conditions.basis[index]
        z = np.stack([inputs.scaling.forward(parts[:, o], basis[:, o]) for o in range(parts.shape[1])], 1)
        standardised = torch.as_tensor(z.reshape(values.shape)).flatten(2)
        planes = torch.as_tensor(job.conditions.planes[index])
    if job.check:
        described = model.spec if inputs is None else inputs
        for c, v in enumerate(
            described.variables if described.scaling is not None else ()
        ):  # neighbouring times come after these
            assert described.scaling is not None
            seen = values[:, c][~np.isnan(values[:, c])]
            if seen.size:
                check_plausible(job.names[c], float(seen.mean()), described.scaling, c, v.units)
    located = None if job.located is None else job.located.between(int(index[0]), int(index[0]) + len(index))
    return Request(
        job.grid, torch.as_tensor(values).flatten(2), climatology, _evidence(job, located, len(index)),
        [str(job.labels[i]) for i in index], job.members, job.seed, job.options, device, advance, job.operators, standardised, planes,
        job.window,
    )  # fmt: skip


def check_plausible(name: str, found: float, scaling: Scaling, channel: int, units: str | None, argument: str = "ds") -> None:
    """Refuse a mean that is far from the climate of the training, unless the channel is a logarithm."""
    if scaling.transforms[channel] != "none":
        return
    usual = float(scaling.mean[0, channel].mean())
    if abs(found - usual) > IMPLAUSIBLE * float(scaling.std[channel].mean() + scaling.mean[0, channel].std()):
        raise StateError(
            f"{argument}[{name!r}] has mean {found:.5g}, and the model was trained on a mean of {usual:.5g} {units or ''}. "
            f"Other units? Set the true ones: {argument}[{name!r}].attrs['units'] = 'degC'"
        )


def _evidence(job: Job, located: Located | None, times: int) -> list[PointEvidence]:
    """Return the observations of each time as tensors; those of a trajectory as one."""
    model = job.handle.load()
    if model.pointwise:
        return [_pointwise(job, model, None if located is None else located.at(t).used()) for t in range(times)]
    if located is None:
        return [PointEvidence(*map(torch.as_tensor, NOTHING))] * times
    together = [located.used()] if located.trajectory else [located.at(t).used() for t in range(times)]
    found = [whitened(now.table, now.operator, now.time_index) for now in together]
    return [PointEvidence(*map(torch.as_tensor, (o.indices, o.weights, value, variance))) for o, value, variance in found]


def _pointwise(job: Job, model: GenerativeModel, now: Located | None) -> PointEvidence:
    """Return the observations of one time at their places, which the state has after the cells of each channel."""
    asked = None if job.at is None else job.at.points()
    if now is None:
        empty = LinearMap.from_rows(NOTHING[0], NOTHING[1], model.spec.channels * job.grid.size)
        found, given = at_places(empty, NOTHING[2], NOTHING[3], job.grid, np.zeros(0, dtype=bool), asked), NOTHING
    else:
        table, areal = now.table, np.array(job.areal, dtype=bool)[now.table.variable]
        found = at_places(now.operator, table.latitude, table.longitude, job.grid, areal, asked)
        operator, value, variance = whitened(table, found.operator, now.time_index)
        given = operator.indices, operator.weights, value, variance
    indices, weights, _ = interpolated(job.grid, found.places, model.spec.channels, model.valid)
    wanted = None if found.wanted is None else torch.as_tensor(found.wanted)
    latitude, longitude = torch.as_tensor(found.places.T.copy())
    places = Places(latitude, longitude, found.observed, torch.as_tensor(indices), torch.as_tensor(weights), wanted=wanted)
    return PointEvidence(*map(torch.as_tensor, given), places=places)


def lay(
    job: Job, arrays: list[xr.DataArray], layout: metadata.Layout, time: str | None, shape: tuple[int, int],
    windows: tuple[int, int] | None = None,
) -> Any:  # fmt: skip
    """Lay `run` over the blocks; returns (t, members, variables, rows, columns), a numpy or dask array.

    With `windows`, rows and columns of a chunk, it is a dask array in model order.
    """
    lazy = chunking.is_chunked(arrays) or windows is not None
    if job.at is not None:
        shape = job.at.plane
    dtype = np.result_type(np.float32, *(a.dtype for a in arrays if a.dtype.kind == "f"))
    job = dataclasses.replace(job, dtype=dtype)
    if lazy:
        job = dataclasses.replace(job, progress=False, threads=1)
    return chunking.lay(
        run, job, arrays, time=time, horizontal=layout.dims,
        output=(len(job.members), len(arrays) if job.outputs is None else len(job.outputs), *shape), dtype=dtype, windows=windows,
    )  # fmt: skip


def check_members(members: object) -> tuple[int, ...]:
    """Return member numbers 0 to members - 1."""
    return tuple(range(check_count("members", members)))


def check_seed(seed: object) -> int:
    """Return the seed, or draw one; it is recorded in the result either way."""
    if seed is None:
        return secrets.randbits(31)
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise OptionError(f"seed={seed!r} is not accepted; give a whole number or None, for example seed=0.")
    return int(seed)

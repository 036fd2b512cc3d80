"""`cycle`: forecast, assimilate, forecast again, for as long as one likes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import engine, labels, metadata, storage
from xgenda.analyses import BACKGROUNDS, Analyst, FilterAnalyst, ModelAnalyst, fingerprints, highest_square, summary_of
from xgenda.analysis_times import analysis_times, shortest
from xgenda.devices import resolve_device
from xgenda.diffusion.noise import seed_for
from xgenda.divergence import DivergenceGuard
from xgenda.ensembles import Arrays, Frame, read_initial
from xgenda.errors import DivergenceError, OptionError, StateError, check_choice, check_flag, check_mapping
from xgenda.filtering import check_filter, check_spread, ensemble_threshold
from xgenda.filters import LETKF, Inflation
from xgenda.forecasts import by_member, identity_of, persistence
from xgenda.formatting import progress_bar, user_level
from xgenda.models.generative import SamplingOptions
from xgenda.observations.containers import ErrorLike, Observations
from xgenda.observations.quality import QualityControl
from xgenda.observations.times import parse_window
from xgenda.operators import AnyOperator
from xgenda.preparation import MEMBERS, ModelLike, Prepared, prepare
from xgenda.runs import DIAGNOSTICS, EMPTY, RESTARTED, SUSPECT, Memory, Outline, Stored, warn_of_run

#: Names of the result that no variable of a state may have.
RESERVED = (*DIAGNOSTICS, "stage", "field", "observed")
#: Of chi2, where no guard says it.
SUSPICIOUS = 4.0


@dataclass(frozen=True, eq=False)
class _Plan:
    """All that one call of `cycle` is about."""

    frame: Frame
    setup: Prepared
    analyst: Analyst
    forecast: Callable[[xr.Dataset], xr.Dataset]
    times: np.ndarray
    seed: int
    guard: DivergenceGuard | None
    restart: Arrays | None


def cycle(
    initial: xr.Dataset | xr.DataArray,
    obs: Observations,
    *,
    forecast: Callable[[xr.Dataset], xr.Dataset],
    model: ModelLike | LETKF,
    window: Any = None,
    times: Any = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    error: ErrorLike = None,
    members: int | None = None,
    seed: int | None = None,
    background: str = "control",
    inflation: float = 1.0,
    rtpp: float = 0.0,
    rtps: float = 0.0,
    guard: DivergenceGuard | str | None = "default",
    guidance: str = "auto",
    guidance_options: Mapping[str, Any] | None = None,
    likelihood: str = "gaussian",
    sampler: str = "auto",
    sampler_options: Mapping[str, Any] | None = None,
    schedule: str = "auto",
    steps: int | None = None,
    background_check: float | str | None = "auto",
    quality: QualityControl | None = None,
    representativeness: float | Mapping[str, float] | None = None,
    lapse_rate: float | Mapping[str, float] | None = None,
    operators: Mapping[str, AnyOperator] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> xr.Dataset:
    """Assimilate, forecast, and assimilate again: analyses at many times, each with the forecast from the one before as background.

    Parameters
    ----------
    initial
        The state to begin with, at one time, with or without ``member``. It is the background of the first analysis where that is
        at its time, else it is forecast to it. Variables that are no real numbers on the grid, or in an ensemble have no members, stay as
        they are and are handed to every forecast.
    obs
        Observations of all times, as in `assimilate`. Read into memory, checked and put in place before the first forecast.
    forecast
        A function from a Dataset of one time (the scalar coordinate time) with all members along ``member`` (the one of the control) to
        the same at a later time; called until the next analysis time is reached. See `xgenda.forecasts` for one of a single state
        (`by_member`), for `persistence`, and for published models (`onnx`, `earth2studio`). Its result must depend on what it gets alone.
        Its attribute `identity`, where it has one, is among what is compared when a store is resumed.
    model
        A filter, `LETKF`; or a `GenerativeModel`, registered name or path, as in `assimilate`: with ``gaussian_prior(ds, length_scale=...,
        std=...)`` this is 3D-Var or optimal interpolation. A model that does not read its background forgets all that was observed before.
    window
        Width of the half-open time window around each analysis time. None: the shortest spacing of `times`, so that the windows of even times
        meet; 1 h where there is one time only. A store may be resumed with another where the observations of its cycles stay the same, unless
        both were given.
    times
        Analysis times, ascending, not before that of `initial`. None: every `window` from the time of `initial` (a window later, where
        nothing was observed before) to the last observation.
    store
        A folder for the result, on a local disk; written after every cycle. None: all is kept in memory.
    resume
        Whether to go on with what is in `store`, to the bit as if it had not been interrupted; `times` and `obs` may have grown at
        their ends. Where there is no store yet, it is begun.
    overwrite
        Whether to begin anew where there is one.
    error, guidance, guidance_options, likelihood, sampler, sampler_options, schedule, steps, batch_size, device
        As in `assimilate`.
    members
        Ensemble size. None: that of `initial`, or 16. For a filter `initial` must be an ensemble.
    seed
        Key of the random numbers, with time and member; None draws one and records it in the result.
    background
        For a `GenerativeModel`, what it conditions on. 'control': one forecast from the mean of the analysis; all members of the background are
        this one. 'mean': the mean of forecasts from all members. 'members': each member its own forecast, which counts the error
        of the forecast twice, in their spread and in the model, unless the model is made for that. With the first two the
        members of a Gaussian analysis are moved so that their mean is the exact one.
    inflation, rtpp, rtps
        For a `GenerativeModel` with 'mean' (relaxation only) or 'members'; as in `LETKF`, which has its own.
    guard
        When the run counts as diverged, and what is done then: a `DivergenceGuard`, 'default' for its defaults; None never.
    background_check
        As in `assimilate`; 'auto' is 5 for a filter.
    quality, representativeness, lapse_rate, operators
        As in `assimilate`.
    progress
        True or False; None shows a bar in notebooks and terminals.

    Returns
    -------
    xarray.Dataset
        The variables of the state along (time, stage, member, ...), with ``stage`` 'background' and 'analysis': ``.sel(stage="analysis")`` is
        what `assimilate` returns. Along time also `spread` (by stage and ``field``, the variables of the state), `innovation_mean` and
        `innovation_rms` (by ``observed``), `chi2`, `observations_used`, `observations_given`, `inflation` and `notice`. From `store` it is
        opened lazily.

    Raises
    ------
    DivergenceError
        If the run diverges, or a forecast returns what is not finite. It carries the cycles before as `result`.
    OutputExistsError
        If `store` exists, and neither `resume` nor `overwrite` is asked for, or another process writes to it.
    OptionError
        If a store is resumed with other data or options; the message lists what differs.
    ObservationError, StateError, GridError, CoordinateError
        Before anything is computed, as `assimilate`; and where a forecast returns something else than a state.

    See Also
    --------
    assimilate : one analysis.
    open_cycles : what is in a store.

    Notes
    -----
    A window without observations that can be used leaves the forecast as analysis, without inflation; `notice` says so. Variables that a
    `GenerativeModel` does not know keep their background. Observations count as of the centre of their window.

    References
    ----------
    Hunt, B. R. et al. (2007), Physica D 230, 112-126. Whitaker, J. S. and Hamill, T. M. (2012), Mon. Weather Rev. 140, 3078-3089.

    Examples
    --------
    >>> import xgenda
    >>> from xgenda.forecasts import persistence
    >>> background = xgenda.tutorial.open_dataset("europe-t2m-forecast").isel(latitude=slice(None, None, 8), longitude=slice(None, None, 8))
    >>> stations = xgenda.tutorial.open_dataset("europe-synop")[["t2m"]].isel(obs=slice(0, 200))
    >>> run = xgenda.cycle(
    ...     background.isel(time=0), stations, forecast=persistence("6h"), error=1.0, lapse_rate=0.0065, members=4, seed=0,
    ...     model=xgenda.gaussian_prior(background, length_scale=200e3, std=1.9), times=background.time,
    ... )
    >>> dict(run.t2m.sizes)
    {'time': 1, 'stage': 2, 'member': 4, 'latitude': 13, 'longitude': 21}
    """
    for name, flag in (("resume", resume), ("overwrite", overwrite)):
        check_flag(name, flag)
    if store is None and (resume or overwrite):
        raise OptionError(f"{'resume' if resume else 'overwrite'}=True needs a store: store='run.zarr'")
    if resume and overwrite:
        raise OptionError("resume=True and overwrite=True exclude each other; leave one out.")
    if not callable(forecast):
        raise OptionError(
            f"forecast is a {type(forecast).__name__}; a function from a Dataset to a Dataset a step later is needed, for example "
            f"xgenda.forecasts.persistence('6h')"
        )
    makers: tuple[tuple[object, str], ...] = ((persistence, "persistence('6h')"), (by_member, "by_member(function)"))
    for maker, call in makers:
        if forecast is maker:
            raise OptionError(
                f"forecast is the function {call.partition('(')[0]} itself, which makes one; call it: forecast=xgenda.forecasts.{call}"
            )
    if guard == "default":
        guard = DivergenceGuard()
    if guard is not None and not isinstance(guard, DivergenceGuard):
        raise OptionError(f"guard={guard!r} is not accepted; give xgenda.DivergenceGuard(...), 'default' or None.")
    resolve_device(device)
    relaxation = Inflation(inflation, rtpp, rtps)
    path = None if store is None else storage.check_path(store)
    if path is not None and resume and path.exists() and seed is None:
        seed = int(storage.read_record(path)["seed"])
    drawn = engine.check_seed(seed)
    chosen = None if isinstance(model, LETKF) else model
    filtered = isinstance(model, LETKF)
    count = None if members is None else len(engine.check_members(members))
    frame, state = read_initial(initial, count, otherwise=None if filtered else MEMBERS)
    clash = [n for n in map(str, frame.template.variables) if n in RESERVED]
    if clash:
        raise OptionError(
            f"initial has a variable {clash[0]!r}, a name that the result has for something else; rename it: "
            f"initial.rename({clash[0]}='my_{clash[0]}')"
        )
    moments = analysis_times(times, window, frame, obs)
    width = parse_window(window if window is not None else shortest(moments))
    asked = SamplingOptions(
        guidance,
        sampler,
        steps,
        batch_size,
        schedule,
        likelihood,
        check_mapping("guidance_options", guidance_options),
        check_mapping("sampler_options", sampler_options),
    )
    template = _all_times(frame, moments)
    if filtered:  # what is the same in all members is no state
        every = frame.state.variables(metadata.data_variables(frame.state.ds, frame.state.layout))
        template = template.drop_vars([n for n in every if n not in frame.names])
    setup = prepare(
        template, obs, chosen, error, width, None if filtered else background_check, quality, representativeness,
        lapse_rate, operators, any_model=not filtered, masked=filtered,
    )  # fmt: skip
    analyst: Analyst
    if isinstance(model, LETKF):
        asked.refuse_all_but((), "a filter draws nothing")
        if background != "control":
            raise OptionError(f"background={background!r} has no effect: a filter has its ensemble. Leave it out.")
        if relaxation != Inflation():
            raise OptionError(
                f"A filter has its own inflation: model=xgenda.LETKF(inflation={inflation!r}, rtpp={rtpp!r}, rtps={rtps!r}, ...)"
            )
        check_filter(setup, model, len(frame.numbers))
        check_spread(state.values(), "initial")
        analyst = FilterAnalyst(frame, setup, model, ensemble_threshold(background_check), drawn)
    else:
        check_choice("background", background, BACKGROUNDS)
        analyst = ModelAnalyst.of(frame, setup, background, relaxation, asked, drawn, device)
    restart = None if guard is None else _restart_states(guard, frame)
    if guard is not None and analyst.threshold is not None and guard.chi2 >= (most := highest_square(analyst.threshold)):
        raise OptionError(
            f"DivergenceGuard: chi2={guard.chi2!r} is never reached: with background_check={analyst.threshold:g} no observation counts with more "
            f"than {most:g}. Lower it, for example chi2={most / 4:g}, or pass background_check=None."
        )
    described = {
        "model": analyst.described(),
        "members": len(frame.numbers),
        "seed": drawn,
        "window": str(pd.Timedelta(width)),
        **summary_of(error, quality, representativeness, lapse_rate, fingerprints(setup, frame, state)),
        "background_check": analyst.threshold,
        "guard": None if guard is None else guard.described(),
    }
    if (identity := identity_of(forecast)) is not None:
        described["forecast"] = dict(identity)
    outline = Outline(frame, setup, moments, _attributes(frame, described))
    plan = _Plan(frame, setup, analyst, forecast, moments, drawn, guard, restart)
    content = {"initial": frame.digest(state)} | ({} if restart is None else {"guard.restart": frame.digest(restart)})
    record = {"options": described, "content": content, "seed": drawn, "window_given": window is not None}
    total = len(moments)
    with ExitStack() as stack:
        kept: Memory | Stored
        if path is None:
            kept = Memory(outline)
        else:
            stack.enter_context(storage.locked(path))
            kept = Stored.of(outline, path, record, resume=resume, overwrite=overwrite)
        first = kept.done
        bar = progress_bar(total, progress, "cycling")
        advance = stack.enter_context(bar)
        advance(first)
        if first:
            state = kept.last_analysis()
        for t, _ in enumerate(_run(plan, state, kept), start=first):
            advance(1)
            bar.note(f"{setup.labels[t][:16]}, chi2 {kept.chi2[-1]:.2f}")
        result = kept.result()
    warn_of_run(result, total, setup, SUSPICIOUS if guard is None else guard.chi2)
    return result


def _run(plan: _Plan, state: Arrays, kept: Memory | Stored) -> Iterator[None]:
    """Go through the cycles that are left, and keep each."""
    frame, guard = plan.frame, plan.guard
    if kept.done:
        now = plan.times[kept.done - 1]
    else:
        now, state = frame.template[frame.time].values[()], plan.analyst.from_forecast(state)
    first = kept.done
    for t in range(first, len(plan.times)):
        label = str(plan.setup.labels[t])
        where = f"Cycle {t} of {len(plan.times)} ({label[:19]})"
        state, leads, what = _to(plan, state, now, plan.times[t], where, kept)
        if t == first:
            _refuse_other_steps(kept, leads, where)
        now = plan.times[t]
        notice = 0
        problem = _broken(plan, state)
        if problem is not None:
            if not _may_restart(plan, kept):
                raise _stopped(f"{where}: {what} is broken: {problem}.", t, kept)
            state = _restarted(plan, f"{where}: {what} is broken: {problem}", label)
            notice |= RESTARTED
        step = plan.analyst.analyse(t, state)
        problem = _broken(plan, step.analysis)
        why = None if guard is None or notice & RESTARTED else guard.lost([*kept.chi2_since_restart(), step.chi2])
        told = why if problem is None else f"the analysis is broken: {problem}"
        if told is not None and not notice & RESTARTED and _may_restart(plan, kept):
            state, why = _restarted(plan, f"{where}: {told}", label), None
            step = plan.analyst.analyse(t, state)
            problem = _broken(plan, step.analysis)
            notice |= RESTARTED
        if problem is not None:
            raise _stopped(f"{where}: the analysis is broken: {problem}.", t, kept)
        notice |= SUSPECT if step.chi2 > (SUSPICIOUS if guard is None else guard.chi2) else 0
        notice |= EMPTY if not step.used else 0
        kept.keep(t, state, step, notice, leads)
        if why is not None:
            raise DivergenceError(
                f"{where}: the run has diverged: {why}. Raise the inflation (xgenda.LETKF(inflation=1.05) or rtps=0.5), localise, check the "
                f"errors of the observations, or go on from other states: guard=xgenda.DivergenceGuard(restart=climatology). "
                f"guard=None turns this off.",
                t,
                kept.result(),
            )
        state = step.analysis
        yield


def _broken(plan: _Plan, state: Arrays) -> str | None:
    """Return in words why a state is no state; None where it is one."""
    problem = plan.frame.missing(state)
    return problem if problem is not None or plan.guard is None else plan.guard.beyond(state)


def _stopped(what: str, cycle: int, kept: Memory | Stored) -> DivergenceError:
    advice = "Shorter time steps of the forecast, or more inflation and localisation, may help."
    return DivergenceError(f"{what} {advice}", cycle, kept.result())


def _may_restart(plan: _Plan, kept: Memory | Stored) -> bool:
    return plan.restart is not None and plan.guard is not None and kept.restarts() < plan.guard.most


def _restarted(plan: _Plan, why: str, label: str) -> Arrays:
    """Return other states, and say so."""
    warnings.warn(f"{why}. It goes on from states of DivergenceGuard(restart=...).", stacklevel=user_level())
    return _others(plan, label)


def _refuse_other_steps(kept: Memory | Stored, leads: list[float], where: str) -> None:
    """Refuse to go on with a forecast of other steps, over the same time as before."""
    before = kept.leads
    if before and leads and abs(sum(before) - sum(leads)) < 1 and len(before) != len(leads):
        raise OptionError(
            f"{where}: resume=True goes on with the same forecast, and this one goes {leads[0]:g} s ahead at a time, that of the cycles in the "
            f"store {before[0]:g} s. Call cycle as before, or start again: resume=False, overwrite=True"
        )


def _to(plan: _Plan, state: Arrays, now: Any, target: Any, where: str, kept: Memory | Stored) -> tuple[Arrays, list[float], str]:
    """Return the forecast of all members at a time, or where it breaks before; the seconds that each call of it went ahead; what this is."""
    leads: list[float] = []
    what = "the forecast"
    frame = plan.frame
    first = now
    while now < target:
        given = plan.analyst.to_forecast(state)
        few = (
            frame
            if len(next(iter(given.values()))) == len(frame.numbers)
            else dataclasses.replace(frame, numbers=frame.numbers[:1])
        )
        try:
            out = plan.forecast(few.dataset(given, now))
        except Exception as problem:
            problem.add_note(f"In xgenda.cycle: {where}, forecast from {now}.")
            if isinstance(problem, DivergenceError) and problem.result is None:
                problem.cycle, problem.result = kept.done, kept.result()
            raise
        found = few.read(
            out,
            "What forecast returned",
            call="A forecast of one member at a time needs an adapter: xgenda.forecasts.by_member(forecast)",
        )
        later = labels.time_in(out, frame.time, now, f"{where}: what forecast returned from {now}")
        if later is None or not later > now or later > target:
            raise _no_step(frame.time, (first, now, later, target), where)
        leads += metadata.in_seconds(np.array([later - now])).tolist()
        state, now = plan.analyst.from_forecast(found), later
        what = f"the forecast for {now}"
        if _broken(plan, state) is not None:
            break
    return state, leads, what


def _no_step(time: str, moments: tuple[Any, Any, Any, Any], where: str) -> StateError:
    """Return the error of a forecast that is not of a later time, or goes beyond the next analysis.

    `moments` are when the forecasts to this analysis began, when this one did, what it returned, and when the analysis is.
    """
    first, now, later, target = moments
    if later is None or not later > now:
        whole = int(metadata.in_seconds(np.array([target - first]))[0])
        add = f"numpy.timedelta64({whole}, 's')" if isinstance(target, np.datetime64) else f"datetime.timedelta(seconds={whole})"
        return StateError(
            f"{where}: the forecast from {now} returned {'no time' if later is None else f'the time {later}'}; it must be later. If it is of the "
            f"next analysis, at {target}, say so: out.assign_coords({time}=ds.{time} + {add})"
        )
    step, span = (round(float(metadata.in_seconds(np.array([x]))[0])) for x in (later - now, target - first))
    fits = math.gcd(step, span)
    shown = f"{fits // 3600}h" if fits % 3600 == 0 else f"{fits}s"
    return StateError(
        f"{where}: the forecast from {now} returned the time {later}, beyond the next analysis at {target}. The step of the forecast, "
        f"{step / 3600:g} h, must divide the {span / 3600:g} h from {first} to there: give one of shorter steps, such as "
        f"xgenda.forecasts.persistence({shown!r}), or other times=..."
    )


def _others(plan: _Plan, label: str) -> Arrays:
    """Return some states of the guard's sample, drawn by seed and time."""
    assert plan.restart is not None
    size = len(next(iter(plan.restart.values())))
    rng = np.random.default_rng(seed_for(plan.seed, label, -2))
    some = np.sort(rng.choice(size, len(plan.frame.numbers), replace=False))
    return plan.analyst.from_forecast({n: v[some].copy() for n, v in plan.restart.items()})


def _restart_states(guard: DivergenceGuard, frame: Frame) -> Arrays | None:
    """Return the sample of the guard, checked."""
    for name in guard.limits or {}:
        if name not in frame.names:
            raise OptionError(
                f"DivergenceGuard: limits names {name!r}, which is no variable of the state; it has {', '.join(map(repr, frame.names))}."
            )
    if guard.restart is None:
        return None
    dim = metadata.find_member(guard.restart) or metadata.find_time(guard.restart)
    if dim is None or dim not in guard.restart.dims:
        raise OptionError(
            "DivergenceGuard: restart has neither a dimension 'member' nor 'time' along which states could be drawn."
        )
    found = frame.read(guard.restart.compute(), "DivergenceGuard: restart", sample=dim)
    size = guard.restart.sizes[dim]
    if size < len(frame.numbers):
        raise OptionError(
            f"DivergenceGuard: restart has {size} states, and the cycle has {len(frame.numbers)} members; give as many."
        )
    problem = frame.missing(found)
    if problem is not None:
        raise StateError(
            f"DivergenceGuard: restart: {problem}, where initial has values. Fill or drop those: restart.fillna(...)"
        )
    problem = guard.beyond(found)
    if problem is not None:
        raise StateError(f"DivergenceGuard: restart is beyond the limits itself: {problem}.")
    return found


def _all_times(frame: Frame, times: np.ndarray) -> xr.Dataset:
    """Return the template at all times, whose values are those of the first, without copies."""
    template, dim = frame.template, frame.time
    fields = {
        n: xr.Variable(
            (dim, *frame.dims[n]), np.broadcast_to(template[n].values, (len(times), *template[n].shape)), template[n].attrs
        )
        for n in frame.names
    }
    others = template.drop_vars([*frame.names, dim])
    return others.assign_coords({dim: (dim, times, template[dim].attrs)}).assign(fields)


def _attributes(frame: Frame, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes of the result: those of the initial state, history and provenance."""
    flat = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in described.items()}
    call = f"cycle(model={described['model']}, members={described['members']}, seed={described['seed']})"
    return dict(frame.template.attrs) | metadata.provenance_attrs(frame.template, call, flat)

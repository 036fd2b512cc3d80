"""What `assimilate` and `innovations` do before anything is computed: check the input, match variables, place the observations."""

from __future__ import annotations

import dataclasses
import numbers
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from xgenda import chunking, engine, metadata, states
from xgenda.appropriate import move_to_analysis_times
from xgenda.curvilinear import AnyGrid
from xgenda.devices import handle_of
from xgenda.errors import CoordinateError, GridError, ModelNotFoundError, OptionError, check_choice
from xgenda.formatting import duration, user_level
from xgenda.grids import Orientation, ground_of
from xgenda.models.conditions import lead_times, planes_of
from xgenda.models.generative import GenerativeModel
from xgenda.models.loading import choose_model
from xgenda.observations.columns import ERROR_SUFFIXES, FLAG_SUFFIXES
from xgenda.observations.containers import ErrorLike, Observations, Wanted
from xgenda.observations.operators import Located, columned, locate_observations
from xgenda.observations.quality import Quality, QualityControl
from xgenda.operators import AnyOperator, LinearOperator, Operator, extended
from xgenda.scaling import cycle_basis
from xgenda.states import State

#: Threshold of the background check where the prior is centred on a background, and where it is a climatology.
BACKGROUND_THRESHOLD = 3.0
CLIMATE_THRESHOLD = 10.0

#: Above this part of the observations rejected, or this mean squared departure over its expectation, a user is told.
REJECTED, MANY = 0.2, 10
#: Around a background, and around a climatology, which a warming world leaves behind.
LARGE_CHI2, LARGE_CLIMATE_CHI2 = 4.0, 100.0

#: Ensemble size where nothing says it.
MEMBERS = 16

ModelLike = GenerativeModel | str | os.PathLike[str] | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """The checked input of one call.

    Attributes
    ----------
    state
        The fields.
    time
        Name of the time dimension, None for one time.
    model
        The model, or None where none is needed.
    variables, arrays, factors
        Per channel: its name in the model and in `state`, the field, and scale and offset to the units of the model.
    labels
        Of the times.
    located
        Observations, or None where there are none.
    threshold, quality
        Of the background check, and all others.
    operators, observable
        Operators that are not linear with the channels that they take; what may be observed: variables, on all their levels, and what all
        operators make.
    shift
        What was taken from the values of `located` to move them to the analysis time.
    conditions
        What a background model takes beside the fields.
    """

    state: State
    time: str | None
    model: Any
    variables: dict[str, str]
    arrays: list[xr.DataArray]
    factors: tuple[tuple[float, float], ...]
    labels: np.ndarray
    located: Located | None
    threshold: float | None
    quality: QualityControl
    operators: tuple[tuple[Operator, tuple[int, ...]], ...]
    observable: list[Wanted]
    shift: np.ndarray
    conditions: engine.InputTimes | None = None

    @property
    def linear(self) -> bool:
        """Whether nothing is observed through an operator that is not linear."""
        first = len(self.observable) - len(self.operators)
        return self.located is None or not bool((self.located.table.variable >= first).any())

    def job(self, members: tuple[int, ...], seed: int, options: Any, device: str, progress: bool | None) -> engine.Job:
        """Return what the engine needs for these members and options."""
        spec = self.model.spec
        layout = self.state.layout
        time = self.state.ds[layout.time] if layout.time is not None else None
        cycle = "none" if spec.scaling is None else spec.scaling.cycle
        return engine.Job(
            handle=handle_of(self.model), grid=self.state.grid, orientation=self.state.orientation, factors=self.factors,
            names=tuple(self.variables.values()), labels=self.labels, basis=cycle_basis(time, cycle, len(self.labels)),
            located=self.located, threshold=self.threshold, quality=self.quality, operators=self.operators,
            members=members, seed=seed, options=options, device=device,
            output=self.state.orientation, check=spec.needs_background, progress=progress, threads=None, conditions=self.conditions,
            areal=tuple(w.rows is not None or bool(w.inputs) for w in self.observable),
        )  # fmt: skip


def observed_state(setup: Prepared, fields: Sequence[np.ndarray]) -> np.ndarray:
    """Return what operators and interpolation see of the fields of each channel, shape (n, all channels * cells).

    `fields` are (n, rows, columns), in the units and order of the user.
    """
    scaled = [setup.state.orientation.to_model(f).astype(float) * s + o for f, (s, o) in zip(fields, setup.factors, strict=True)]
    return np.asarray(extended(torch.as_tensor(np.stack(scaled, 1)), setup.operators).flatten(1))


def at_times(job: engine.Job, times: np.ndarray) -> engine.Job:
    """Return the job of some of its times, without observations."""
    given = job.conditions
    conditions = None if given is None else engine.InputTimes(given.basis[times], given.planes[times])
    return dataclasses.replace(job, labels=job.labels[times], basis=job.basis[times], located=None, conditions=conditions)


def prepare(
    ds: xr.Dataset,
    obs: Observations,
    model: ModelLike,
    error: ErrorLike,
    window: Any,
    check: float | str | None,
    quality: QualityControl | None,
    representativeness: float | Mapping[str, float] | None,
    lapse_rate: float | Mapping[str, float] | None = None,
    operators: Mapping[str, AnyOperator] | None = None,
    first_guess: xr.Dataset | xr.DataArray | None = None,
    *,
    argument: str = "obs",
    any_model: bool = True,
    task: str | None = None,
    masked: bool = False,
) -> Prepared:
    """Check the input of a call, match variables and place the observations.

    With `masked` and no model, cells where `ds` is NaN at its first time, which is read, hold no state.

    Raises
    ------
    ObservationError, OptionError, GridError, CoordinateError, ChunkingError, ModelNotFoundError, UnitsError
        With the line to type.
    """
    state = states.enter(ds)
    ds, layout, grid, orientation = state.ds, state.layout, state.grid, state.orientation
    if layout.member is not None and ds.sizes[layout.member] > 0:
        raise OptionError(
            f"ds has the ensemble dimension {layout.member!r}, and one background is needed. Type ds.mean({layout.member!r}), and for "
            f"the ensemble as prior: model=xgenda.gaussian_prior(ds)"
        )
    time = layout.time if layout.time in ds.dims else None
    if time is not None and ds.sizes[time] == 0:
        raise GridError(f"ds: dimension {time!r} is empty; there is nothing to do.")
    chosen = choose_model(model, ds, layout, grid, task="prior") if any_model or model is not None else None
    if chosen is not None:
        if chosen.spec.task not in (("prior", "background") if task is None else (task,)):
            raise ModelNotFoundError(
                f"model={chosen.spec.name!r} is for {chosen.spec.task!r}; type ds.genda.{chosen.spec.task}(model=...)"
            )
        check_grid(chosen, grid)
        wanted = [Wanted(v.name, v.standard_name, v.units) for v in chosen.spec.variables]
    else:
        wanted = [
            Wanted(n, ds[n].attrs.get("standard_name"), ds[n].attrs.get("units")) for n in metadata.data_variables(ds, layout)
        ]
    variables = {w.name: states.match_channel(ds, w.name, w.standard_name) for w in wanted}
    wanted = [dataclasses.replace(w, given_units=metadata.units_of(ds[variables[w.name]])) for w in wanted]
    metadata.check_dims(ds, variables.values(), layout)
    arrays = [ds[n] if time is None or time in ds[n].dims else ds[n].expand_dims({time: ds[time]}) for n in variables.values()]
    chunking.check_core_chunks(arrays, layout.dims)
    factors = tuple(metadata.unit_factors_of(ds[n], w.units) for n, w in zip(variables.values(), wanted, strict=True))
    times = ds[layout.time] if layout.time is not None else None
    labels = metadata.time_labels(times)
    metadata.check_unique_times(labels)
    located = None
    # the result, and so the message, speak of the user's variable; the table of the model's
    names = {states.parse_channel(ours)[0]: states.parse_channel(theirs)[0] for ours, theirs in variables.items()}
    renamed = _rename_back(obs, names)
    control = check_quality(quality)
    trajectory = chosen is not None and int(chosen.spec.options.get("window", 1)) > 1
    made, derived = _operators(operators, wanted, variables, grid, trajectory)
    observable = [*(_on_single_level(w, ds) for w in columned(wanted)), *derived]
    valid = _filled(arrays, layout, orientation) if chosen is None and masked else None if chosen is None else chosen.valid
    located = locate_observations(
        renamed, observable, grid, times, error=_rename_error(error, names), window=window, quality=control,
        representativeness=_renamed(representativeness, names), ground=ground_of(ds, layout, orientation),
        lapse_rate=_renamed(lapse_rate, names), valid=valid, trajectory=trajectory, argument=argument,
    )  # fmt: skip
    shift = np.zeros(len(located.table))
    if first_guess is not None:
        if trajectory:
            raise OptionError("first_guess has no effect on a model of windows, whose states have their own times. Leave it out.")
        if times is None or (len(located.table) and located.table.time is None):
            raise OptionError("first_guess needs times in ds and in obs; without them leave it out.")
        if len(located.table):
            located, shift = move_to_analysis_times(
                located, first_guess, state, times, list(variables.values()),
                [w.units for w in wanted], made,
            )  # fmt: skip
    threshold = _threshold(check, chosen)
    conditions = None if chosen is None else conditions_of(chosen, ds, layout.time, times, len(labels))
    return Prepared(state, time, chosen, variables, arrays, factors, labels, located if len(located.table) else None,
                  threshold, control, made, observable, shift, conditions)  # fmt: skip


def conditions_of(
    model: GenerativeModel, ds: xr.Dataset, time: str | None, times: xr.DataArray | None, size: int
) -> engine.InputTimes | None:
    """Return what a background model takes beside the fields, or None for other models.

    Raises
    ------
    CoordinateError
        If season, hour or lead time are not there.
    """
    inputs = model.spec.inputs
    if inputs is None:
        return None
    cycles = (inputs.cycle, inputs.scaling.cycle)
    if times is None and any(c != "none" for c in cycles):
        raise CoordinateError(
            f"model={model.spec.name!r} takes the season or the hour, and ds has no time. Assign it: "
            f"ds.assign_coords(time=numpy.datetime64('2020-01-01T12:00'))"
        )
    lead = None if inputs.lead_time is None else lead_times(ds, time, size)
    basis = cycle_basis(times, inputs.scaling.cycle, size)[:, None]
    return engine.InputTimes(basis, planes_of(times, inputs.cycle, lead, inputs.lead_time, size))


def _filled(arrays: Sequence[xr.DataArray], layout: metadata.Layout, orientation: Orientation) -> np.ndarray | None:
    """Return which cells of each channel hold values at the first time, in model order; None where all do."""
    first = {d: 0 for a in arrays for d in a.dims if d not in layout.dims}
    found = [~np.isnan(a.isel(first, missing_dims="ignore").transpose(*layout.dims).values.astype(float)) for a in arrays]
    valid = np.stack([orientation.to_model(f) for f in found])
    return None if valid.all() else valid


def _on_single_level(wanted: Wanted, ds: xr.Dataset) -> Wanted:
    """Let a state that was selected on one level know it, so that observations of other levels are outside."""
    found = states.single_level(ds)
    if wanted.levels or found is None:
        return wanted
    return dataclasses.replace(wanted, levels=found.values, vertical=found.kind, optional=True)


def check_trajectory(setup: Prepared) -> None:
    """Refuse what a model of windows cannot solve together."""
    options = setup.model.spec.options
    window = int(options.get("window", 1))
    if window == 1:
        return
    name, count = setup.model.spec.name, len(setup.labels)
    if setup.time is None or count < window:
        raise GridError(
            f"model={name!r} is of windows of {window} consecutive times, and ds has {count}; give at least {window}."
        )
    steps = metadata.seconds_between(setup.state.ds[setup.time].values)
    shortest, longest = metadata.equal_steps(options["spacing"])
    if steps.min() < shortest or steps.max() > longest:
        raise GridError(
            f"model={name!r} is of states {duration(options['spacing'])} apart, and those of ds are {duration(steps.min())} to "
            f"{duration(steps.max())} apart. Select such times, in order: ds.sel({setup.time}=...)"
        )
    chunking.check_core_chunks(setup.arrays, (setup.time,))


def _rename_back(obs: Observations, variables: dict[str, str]) -> Observations:
    """Let observations use the names of `ds` as well as those of the model."""
    names = {theirs: ours for ours, theirs in variables.items() if theirs != ours}
    if not names:
        return obs
    if isinstance(obs, (list, tuple)):
        return [_rename_back(o, variables) for o in obs]
    if isinstance(obs, xr.DataArray) and obs.name is not None:
        obs = obs.to_dataset()
    if isinstance(obs, (xr.Dataset, pd.DataFrame)):
        columns = set(map(str, obs.data_vars if isinstance(obs, xr.Dataset) else obs.columns))
        both = {o: n for o, n in names.items() if o in columns and n not in columns}
        beside = {f"{o}_{s}": f"{n}_{s}" for o, n in both.items() for s in (*ERROR_SUFFIXES, *FLAG_SUFFIXES)}
        given = both | {o: n for o, n in beside.items() if o in columns}
        return obs.rename(given) if isinstance(obs, xr.Dataset) else obs.rename(columns=given)
    return obs


def _rename_error(error: ErrorLike, variables: dict[str, str]) -> ErrorLike:
    if isinstance(error, (list, tuple)):
        return [_rename_error(e, variables) for e in error]
    renamed: ErrorLike = _renamed(error, variables)
    return renamed


def _renamed(given: Any, variables: dict[str, str]) -> Any:
    """Let a mapping use the names of `ds`."""
    if not isinstance(given, Mapping):
        return given
    names = {theirs: ours for ours, theirs in variables.items()}
    return {names.get(str(k), str(k)): v for k, v in given.items()}


def _operators(
    operators: Mapping[str, AnyOperator] | None, wanted: list[Wanted], variables: dict[str, str], grid: AnyGrid, trajectory: bool
) -> tuple[tuple[tuple[Operator, tuple[int, ...]], ...], list[Wanted]]:
    """Return the operators that are not linear with the indices of their channels, and what all observe, linear ones first.

    The user's names and the model's both count.
    """
    if operators is None:
        return (), []
    if not isinstance(operators, Mapping):
        raise OptionError(
            f"operators={operators!r} is not accepted; give a mapping: operators={{'wind_speed': xgenda.operators.wind_speed('u', 'v')}}"
        )
    names = {w.name: i for i, w in enumerate(wanted)}
    places = names | {variables[w.name]: i for i, w in enumerate(wanted)}
    whole = {w.name: w for w in columned(wanted)}
    whole |= {states.parse_channel(variables[c.name])[0]: whole[states.parse_channel(c.name)[0]] for c in wanted}
    out: list[tuple[Operator, tuple[int, ...]]] = []
    linear: list[Wanted] = []
    derived: list[Wanted] = []
    for name, operator in operators.items():
        if not isinstance(operator, AnyOperator):
            raise OptionError(
                f"operators[{name!r}] is a {type(operator).__name__}; make it with xgenda.operators, for example "
                f"xgenda.operators.function({name}, variables=({next(iter(places))!r},), units='K')"
            )
        if name in places or name in whole:
            raise OptionError(
                f"operators[{name!r}] has the name of a variable of the state; give it another, and rename the observations."
            )
        if isinstance(operator, LinearOperator):
            operator.check(name, grid, list(whole))
            of = whole[operator.variable]
            units = (of.units, of.given_units) if operator.units is None else (operator.units, None)
            if operator.period is not None and not trajectory:
                raise OptionError(
                    f"operators[{name!r}] is a mean in time, and the model knows single states. Use a model of windows: xgenda.train(ds, window=3)"
                )
            linear.append(
                Wanted(name, operator.standard_name, *units, of.levels, of.vertical, of.name, operator.rows, operator.period)
            )
            continue
        operator.check(name, grid.plane, list(places))
        out.append((operator, tuple(places[v] for v in operator.variables)))
        taken = tuple(places[v] for v in operator.variables)
        derived.append(Wanted(name, operator.standard_name, operator.units, inputs=taken))
    return tuple(out), [*linear, *derived]


def check_quality(quality: QualityControl | None) -> QualityControl:
    """Return the checks, the defaults for None."""
    if quality is not None and not isinstance(quality, QualityControl):
        raise OptionError(
            f"quality={quality!r} is not accepted; give for example quality=xgenda.QualityControl(thin=50e3, blacklist=['08181'])"
        )
    return quality or QualityControl()


def _threshold(check: float | str | None, model: GenerativeModel | None) -> float | None:
    if check is None or model is None:
        return None
    if isinstance(check, str):
        check_choice("background_check", check, ("auto",))
        return BACKGROUND_THRESHOLD if model.spec.needs_background else CLIMATE_THRESHOLD
    if isinstance(check, bool) or not isinstance(check, numbers.Real) or not np.isfinite(check) or check <= 0:
        raise OptionError(f"background_check={check!r} is not accepted; give a positive number, 'auto' or None.")
    return float(check)


def check_grid(model: GenerativeModel, grid: AnyGrid) -> None:
    """Refuse a grid that is not the model's."""
    expected = model.spec.grid
    if expected is not None and not expected.same_as(grid):
        raise GridError(
            f"model={model.spec.name!r} works on the grid {expected.describe()}; ds has {grid.describe()}. "
            f"Interpolate, where they overlap: ds.genda.regrid(model.template()), with the model that xgenda.load_model gives"
        )


def departure_chi2(departure: np.ndarray, error: np.ndarray, spread: np.ndarray, code: np.ndarray) -> float | None:
    """Return the mean of (O - B)^2 / (s_o^2 + s_b^2) over what is used, 1 where the errors are right; None where nothing is."""
    used = (code == Quality.USED) & np.isfinite(departure)
    if not used.any():
        return None
    return float(np.mean(departure[used] ** 2 / (error[used] ** 2 + spread[used] ** 2)))


def warn_of_departures(code: np.ndarray, chi2: float | None, around_background: bool) -> None:
    """Warn where observations and prior disagree more than their errors allow: other units, another datum, another place."""
    judged = np.isin(code, (Quality.USED, Quality.BACKGROUND, Quality.BUDDY)).sum()
    rejected = int(judged - (code == Quality.USED).sum())
    look = "See xgenda.innovations(ds, obs, ...)."
    if judged >= MANY and rejected > REJECTED * judged:
        warnings.warn(
            f"{rejected} of {judged} observations are too far from the background or from their neighbours and are not used. Other units, or "
            f"another datum? {look}",
            stacklevel=user_level(),
        )
    elif chi2 is not None and judged >= MANY and chi2 > (LARGE_CHI2 if around_background else LARGE_CLIMATE_CHI2):
        warnings.warn(
            f"Squared departures from the background are {chi2:.1f} times as large as their errors let expect, over {judged - rejected} "
            f"observations. Other units, another datum, or errors that are too small? {look}",
            stacklevel=user_level(),
        )

"""First guess at appropriate time (FGAT): each observation is compared with a background at its own time, not at that of the analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from xgenda import metadata, states
from xgenda.errors import CoordinateError, OptionError
from xgenda.observations.operators import Located
from xgenda.observations.quality import Quality
from xgenda.observations.times import trajectory_weights
from xgenda.operators import Operator, extended
from xgenda.states import State


def move_to_analysis_times(
    located: Located,
    first_guess: xr.Dataset | xr.DataArray,
    state: State,
    times: xr.DataArray,
    variables: Sequence[str],
    units: Sequence[str | None],
    operators: Sequence[tuple[Operator, tuple[int, ...]]],
) -> tuple[Located, np.ndarray]:
    """Take from each observation what the first guess changes between the time of its analysis and its own.

    What is left, y - [H(b(t_o)) - H(b(t_a))], is compared with the state at the analysis time: the departure is y - H(b(t_o)) (Lawless 2010,
    Tellus A 62, 544-549, for what this assumes). The first guess is linear between its times.

    Parameters
    ----------
    located
        Observations with their analysis times.
    first_guess
        Variables of the state on its grid at more times, which are read where observations need them.
    state, times
        The state and its times.
    variables, units, operators
        Its channels, their units in the model, and what may be observed beside them.

    Returns
    -------
    Located
        Values at the analysis times. Outside of the times of the first guess observations are outside of the window; where it is not
        finite their operator failed.
    numpy.ndarray
        What was taken, in the units of each observation.
    """
    guess = states.on_grid_of(state, metadata.as_dataset(first_guess, "first_guess"), "first_guess", "ds")
    time, member = metadata.find_time(guess), metadata.find_member(guess)
    if time is None or time not in guess.dims:
        raise CoordinateError("first_guess has no dimension time; give the background at several times around those of ds.")
    if member is not None:
        raise OptionError(f"first_guess has the ensemble dimension {member!r}; give its mean: first_guess.mean({member!r})")
    variables = [states.match_channel(guess, n, state.ds[n].attrs.get("standard_name"), "first_guess") for n in variables]
    moments, stamps = located.table.time, guess[time]
    assert moments is not None
    shift, code = np.zeros(len(located.table)), located.table.code.copy()
    rows = np.flatnonzero(located.time_index >= 0)
    at = np.atleast_1d(times.values)[located.time_index[rows]]
    (seen, _), (analysed, _) = (trajectory_weights(m, stamps, "obs") for m in (moments[rows], at))
    covered = (moments[rows] >= stamps.values.min()) & (moments[rows] <= stamps.values.max())
    covered &= (at >= stamps.values.min()) & (at <= stamps.values.max())
    code[rows[~covered & (code[rows] <= Quality.PASSIVE)]] = Quality.WINDOW
    change = (seen - analysed).tocsc()
    factors = [metadata.unit_factors_of(guess[n], u) for n, u in zip(variables, units, strict=True)]
    for t in np.flatnonzero(np.diff(change.indptr)):
        some, weight = (getattr(change, k)[change.indptr[t] : change.indptr[t + 1]] for k in ("indices", "data"))
        fields: list[Any] = []
        for name, (scale, offset) in zip(variables, factors, strict=True):
            field = guess[name].isel({time: int(t)}) if time in guess[name].dims else guess[name]
            values = np.asarray(field.transpose(*state.layout.dims).values, dtype=float)
            fields.append(state.orientation.to_model(values) * scale + offset)
        flat = extended(torch.as_tensor(np.stack(fields)), operators).numpy().ravel()
        shift[rows[some]] += weight * located.operator.select(rows[some])(flat)
    failed = ~np.isfinite(shift)
    code[failed & (code <= Quality.PASSIVE)] = Quality.OPERATOR
    shift[failed] = 0.0
    table = located.table.moved(located.table.value - shift).with_code(code)
    return Located(table, located.time_index, located.operator), shift

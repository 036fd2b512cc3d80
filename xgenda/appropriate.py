"""First guess at appropriate time (FGAT): each observation is compared with a background at its own time, not at that of the analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from xgenda import metadata, states
from xgenda.errors import CoordinateError, GridError, OptionError
from xgenda.observations.operators import Located
from xgenda.observations.quality import Quality
from xgenda.observations.times import trajectory_weights
from xgenda.operators import Operator, extended
from xgenda.states import State


def move_to_analysis_times(
    located: Located,
    first_guess: xr.Dataset,
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
    guess = states.enter(metadata.as_dataset(first_guess, "first_guess"), "first_guess")
    time = guess.layout.time
    if time is None or time not in guess.ds.dims:
        raise CoordinateError("first_guess has no dimension time; give the background at several times around those of ds.")
    if not getattr(guess.grid, "same_as", lambda _: False)(state.grid):
        raise GridError(
            f"first_guess is on the grid {guess.grid.describe()}, and ds on {state.grid.describe()}; both must be the same."
        )
    if guess.layout.member is not None:
        raise OptionError(
            f"first_guess has the ensemble dimension {guess.layout.member!r}; give its mean: first_guess.mean({guess.layout.member!r})"
        )
    variables = [states.match_channel(guess.ds, n, state.ds[n].attrs.get("standard_name"), "first_guess") for n in variables]
    moments, stamps = located.table.time, guess.ds[time]
    assert moments is not None
    shift, code = np.zeros(len(located.table)), located.table.code.copy()
    rows = np.flatnonzero(located.time_index >= 0)
    at = np.atleast_1d(times.values)[located.time_index[rows]]
    (seen, _), (analysed, _) = (trajectory_weights(m, stamps, "obs") for m in (moments[rows], at))
    covered = (moments[rows] >= stamps.values.min()) & (moments[rows] <= stamps.values.max())
    covered &= (at >= stamps.values.min()) & (at <= stamps.values.max())
    code[rows[~covered & (code[rows] <= Quality.PASSIVE)]] = Quality.WINDOW
    change = (seen - analysed).tocsc()
    factors = [metadata.unit_factors_of(guess.ds[n], u) for n, u in zip(variables, units, strict=True)]
    for t in np.flatnonzero(np.diff(change.indptr)):
        some, weight = (getattr(change, k)[change.indptr[t] : change.indptr[t + 1]] for k in ("indices", "data"))
        fields: list[Any] = []
        for name, (scale, offset) in zip(variables, factors, strict=True):
            field = guess.ds[name].isel({time: int(t)}) if time in guess.ds[name].dims else guess.ds[name]
            values = np.asarray(field.transpose(*guess.layout.dims).values, dtype=float)
            fields.append(guess.orientation.to_model(values) * scale + offset)
        flat = extended(torch.as_tensor(np.stack(fields)), operators).numpy().ravel()
        shift[rows[some]] += weight * located.operator.select(rows[some])(flat)
    failed = ~np.isfinite(shift)
    code[failed & (code <= Quality.PASSIVE)] = Quality.OPERATOR
    shift[failed] = 0.0
    table = located.table.moved(located.table.value - shift).with_code(code)
    return Located(table, located.time_index, located.operator), shift

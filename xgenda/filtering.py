"""One analysis of an ensemble by a filter: quality control, what is observed of each member, the update, rotation and relaxation."""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xgenda import chunking, states
from xgenda.curvilinear import spacing_far_above
from xgenda.diffusion.noise import seed_for
from xgenda.errors import ChunkingError, OptionError, StateError, check_choice
from xgenda.filters import LETKF, find_neighbours, random_rotation, rotated, transform, wrapped_box
from xgenda.formatting import user_level
from xgenda.observations.containers import ErrorLike, Observations
from xgenda.observations.correlations import whitened
from xgenda.observations.operators import Located
from xgenda.observations.quality import Quality, QualityControl, against_background
from xgenda.operators import AnyOperator
from xgenda.preparation import Prepared, observed_state, prepare

#: Background check of an ensemble, whose own spread is only an estimate.
ENSEMBLE_THRESHOLD = 5.0


@dataclass(frozen=True, eq=False)
class Departures:
    """What the observations of one time say of the background.

    Attributes
    ----------
    code
        `Quality` of each, shape (m,).
    innovation, error, spread
        O - B with the mean of the background; standard deviations of observation and background, shapes (m,).
    inflation
        The factor on the anomalies of the background, times how many times wider relaxation makes the analysis, see `spread_ratio`.
    """

    code: np.ndarray
    innovation: np.ndarray
    error: np.ndarray
    spread: np.ndarray
    inflation: float = 1.0


def ensemble_threshold(check: float | str | None) -> float | None:
    """Return the threshold of the background check of a filter."""
    if check is None:
        return None
    if isinstance(check, str):
        check_choice("background_check", check, ("auto",))
        return ENSEMBLE_THRESHOLD
    if isinstance(check, bool) or not isinstance(check, numbers.Real) or not np.isfinite(check) or check <= 0:
        raise OptionError(f"background_check={check!r} is not accepted; give a positive number, 'auto' or None.")
    return float(check)


def check_filter(setup: Prepared, filter: LETKF, members: int) -> None:
    """Refuse what a filter cannot do, before anything is computed."""
    if members < 2:
        raise OptionError(f"A filter needs an ensemble, and ds has {members} member; give at least 2, and rather 20 to 100.")
    located = setup.located
    if located is not None and filter.localization is not None and bool((located.table.correlation >= 0).any()):
        raise OptionError(
            "Errors that depend on each other (ErrorCovariance) and localization exclude each other. Type model=xgenda.LETKF() for a "
            "global filter, or give standard deviations and thin: quality=xgenda.QualityControl(thin=50e3)"
        )
    if filter.localization is not None and (spacing := spacing_far_above(setup.state.grid, filter.localization)):
        warnings.warn(
            f"LETKF(localization={filter.localization:g}) is in metres, and the cells of the state are about {spacing / 1e3:.3g} km apart: an "
            f"observation acts only on a cell that it lies on. Kilometres? localization={1e3 * filter.localization:g}",
            stacklevel=user_level(),
        )
    if filter.wraps and located is not None and len(located.table):
        wrapped_box(setup.state.grid)


def analyse(
    setup: Prepared,
    located: Located | None,
    filter: LETKF,
    fields: list[np.ndarray],
    threshold: float | None,
    seed: int,
    label: str,
) -> tuple[list[np.ndarray], Departures]:
    """Return the analysis of one time, and what its observations say.

    Parameters
    ----------
    setup
        Of the call.
    located
        The observations of this time, or None.
    filter
        The method.
    fields
        Background of each channel, shape (members, rows, columns), in the order and units of the user. What is NaN must be so in all members
        and is left alone.
    threshold
        Of the background check.
    seed, label
        Key of the random rotation.

    Returns
    -------
    list
        The analysis of each channel, float64; the background itself where no observation is used.
    Departures
        Over all of `located`.
    """
    nothing = np.zeros(0)
    if located is None or not len(located.table):
        return fields, Departures(nothing.astype(np.uint8), nothing, nothing, nothing)
    wet = [np.isfinite(f).all(0) for f in fields]
    if not all(w.all() for w in wet):
        fields = [np.where(w, f, 0.0) for w, f in zip(wet, fields, strict=True)]
    inflated = [filter.relaxation.before(f.astype(np.float64)) for f in fields]
    state = observed_state(setup, inflated)
    seen = located.operator(state)
    departures = _check(located, seen, threshold, setup.quality)
    used = np.flatnonzero(departures.code == Quality.USED)
    if not len(used):
        analysis = [np.asarray(f, dtype=np.float64) for f in fields]
    else:
        some = located.take(used)
        operator, value, variance = whitened(some.table, some.operator, some.time_index)
        if operator is not some.operator:
            seen = operator(state)
        else:
            seen = seen[:, used]
        neighbours = None
        if filter.localization is not None:
            neighbours = find_neighbours(
                setup.state.grid, some.table.latitude, some.table.longitude, filter.localization, wraps=filter.wraps
            )
        orientation = setup.state.orientation
        stacked = np.stack([orientation.to_model(f) for f in inflated], 1)
        flat = transform(stacked.reshape(*stacked.shape[:2], -1), seen, value, variance, neighbours)
        whole = orientation.from_model(flat.reshape(stacked.shape))
        relaxed = filter.relaxation.after(whole, np.stack(inflated, 1))
        departures = dataclasses.replace(departures, inflation=filter.inflation * spread_ratio(relaxed, whole, wet))
        if filter.rotation:
            rng = np.random.default_rng(seed_for(seed, label, -1))
            relaxed = rotated(relaxed, random_rotation(len(relaxed), rng))
        analysis = [relaxed[:, c] for c in range(relaxed.shape[1])]
    return [np.where(w, a, np.nan) if not w.all() else a for w, a in zip(wet, analysis, strict=True)], departures


def spread_ratio(relaxed: np.ndarray, whole: np.ndarray, wet: Sequence[np.ndarray]) -> float:
    """Return how many times wider an ensemble is than another: of mean standard deviations over cells with a state.

    It is the geometric mean over channels, which does not depend on their units; those without a width do not count, and without any it is 1.
    Both have the shape (members, channels, rows, columns).
    """
    if relaxed is whole or len(whole) < 2:
        return 1.0
    widths = [tuple(float(e[:, c].std(0)[there].mean()) for e in (relaxed, whole)) for c, there in enumerate(wet) if there.any()]
    ratios = [now / then for now, then in widths if then > 0 and now > 0]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0


def check_spread(fields: Iterable[np.ndarray], argument: str) -> None:
    """Refuse an ensemble whose members, along the first axis, are all the same: a filter would believe it whatever is observed.

    Raises
    ------
    StateError
        If they are.
    """
    if not any((np.nan_to_num(f) != np.nan_to_num(f[:1])).any() for f in fields):
        raise StateError(
            f"All members of {argument} are the same, so that a filter cannot learn from observations. Give an ensemble with a spread, such as "
            f"states of other times: xarray.concat([ds.isel(time=t, drop=True) for t in ...], 'member')"
        )


def _check(located: Located, seen: np.ndarray, threshold: float | None, quality: QualityControl) -> Departures:
    """Return codes after the background and buddy checks, by what each member lets expect."""
    mean, spread = seen.mean(0), seen.std(0, ddof=1)
    code = against_background(located.table, mean, spread, threshold, quality)
    return Departures(code, located.table.value - mean, located.table.finite_error, spread)


def prepare_ensemble(
    ds: xr.Dataset,
    obs: Observations,
    error: ErrorLike,
    window: Any,
    check: float | str | None,
    quality: QualityControl | None,
    representativeness: float | Mapping[str, float] | None,
    lapse_rate: float | Mapping[str, float] | None,
    operators: Mapping[str, AnyOperator] | None,
    first_guess: xr.Dataset | xr.DataArray | None,
) -> tuple[Prepared, states.State, str, float | None]:
    """Check the input of one call of `assimilate` with a filter.

    Returns
    -------
    tuple
        The setup of the first member, the ensemble, its dimension, and the threshold of the background check.
    """
    ensemble = states.enter(ds)
    member = ensemble.layout.member
    if member is None or member not in ds.dims:
        raise OptionError(
            "A filter needs an ensemble as background, and ds has no dimension 'member'. Give one, or a model of its errors: "
            "model=xgenda.gaussian_prior(ds, length_scale=300e3, std=2.0)"
        )
    one = ds.isel({member: 0}, drop=True)
    setup = prepare(
        one, obs, None, error, window, None, quality, representativeness, lapse_rate, operators, first_guess,
        any_model=False, masked=True,
    )  # fmt: skip
    if chunking.is_chunked(setup.arrays):
        raise ChunkingError("A filter works on fields in memory, and ds is chunked; type ds.compute().")
    fields: list[np.ndarray] = []
    for name in setup.variables.values():
        if member not in ensemble.ds[name].dims:
            raise StateError(f"ds[{name!r}] has no dimension {member!r}, and others have; drop it: ds.drop_vars({name!r})")
        lead = [d for d in (setup.time, member) if d in ensemble.ds[name].dims]
        values = ensemble.ds[name].transpose(*lead, ...).values
        fields.append(np.moveaxis(values, lead.index(member), 0))
        _check_members(values.reshape(-1, *values.shape[len(lead) :]), ds.sizes[member], name)
    if ds.sizes[member] > 1:
        check_spread(fields, "ds")
    return setup, ensemble, member, ensemble_threshold(check)


def _check_members(values: np.ndarray, members: int, name: str) -> None:
    """Refuse infinity, and NaN that not all members share at all times; values are (times * members, ...)."""
    there = np.isfinite(values)
    odd = (np.isinf(values) | (there != there.any(0))).reshape(len(there), -1).any(1)
    if odd.any():
        found = np.unique(np.flatnonzero(odd) % members)
        raise StateError(
            f"ds[{name!r}] holds NaN or infinity in {len(found)} of {members} members where others, or other times, have values, first in "
            f"member {found[0]}. Drop those members, or fill them: ds.fillna(...)"
        )

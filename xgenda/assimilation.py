"""`assimilate`: the posterior ensemble of the state, given observations; and its moments where they have a closed form."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import chunking, engine, metadata, states
from xgenda.devices import resolve_device
from xgenda.diffusion.covariances import DENSE_LIMIT
from xgenda.errors import OptionError, check_mapping
from xgenda.filtering import analyse, check_filter, prepare_ensemble
from xgenda.filters import LETKF
from xgenda.formatting import brief, user_level, written_call
from xgenda.models.generative import SamplingOptions
from xgenda.observations.containers import ErrorLike, Observations
from xgenda.observations.places import interpolated, rounded
from xgenda.observations.quality import Quality, QualityControl, count_codes
from xgenda.operators import AnyOperator
from xgenda.preparation import MEMBERS, ModelLike, Prepared, check_trajectory, departure_chi2, prepare, warn_of_departures
from xgenda.states import State


def assimilate(
    ds: xr.Dataset | xr.DataArray,
    obs: Observations,
    *,
    model: ModelLike | LETKF = None,
    error: ErrorLike = None,
    members: int | None = None,
    seed: int | None = None,
    guidance: str = "auto",
    guidance_options: Mapping[str, Any] | None = None,
    likelihood: str = "gaussian",
    sampler: str = "auto",
    sampler_options: Mapping[str, Any] | None = None,
    schedule: str = "auto",
    steps: int | None = None,
    window: Any = None,
    background_check: float | str | None = "auto",
    quality: QualityControl | None = None,
    representativeness: float | Mapping[str, float] | None = None,
    lapse_rate: float | Mapping[str, float] | None = None,
    operators: Mapping[str, AnyOperator] | None = None,
    first_guess: xr.Dataset | xr.DataArray | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    progress: bool | None = None,
    at: xr.Dataset | xr.DataArray | pd.DataFrame | None = None,
) -> xr.Dataset:
    """Return an ensemble of the states that fit the observations.

    Reads the grid, times and variables of `ds`; its values are the background where the model needs one (of task 'background', a covariance
    function, or ``gaussian_prior(..., mean='background')``) and are not read otherwise. Each time is analysed on its own, unless the model was
    trained on windows of states: then all times are one trajectory, solved together. Chunked input (dask, along time) gives a
    lazy result, unchunked input an eager one, with the same numbers; a trajectory must be one chunk.

    Parameters
    ----------
    ds
        The background, or any Dataset on the analysis grid: dimensions latitude, longitude and optionally time, in any order and
        direction. Variables that the model does not know are left out of the result.
    obs
        A table along one dimension (Dataset or pandas DataFrame with latitude, longitude, time and one column per variable),
        a gridded Dataset with NaN where nothing was observed, or a list of these. Empty or None gives the prior, with a
        notice. Read into memory when called.
    model
        A `GenerativeModel`, a registered name, or a path. None takes the one registered model that fits. Or a filter, `LETKF`: `ds` is then
        the background ensemble, with ``member``, in memory, and all of its variables are analysed.
    error
        Standard deviation of the observation error in the units of the observation, instrument and representativeness together:
        a number, an `ErrorCovariance`, or a mapping per variable (one of these, or one per row). None where `obs` carries ``<name>_error``.
    members
        Ensemble size. Member k does not depend on it. None: 16, and for a filter the members of `ds`, which are all that it can have.
    seed
        Key of the random numbers; None draws one and records it in the result.
    guidance
        How observations act on a diffusion model: 'anchor', 'mmps', 'sda', 'w2c', 'pigdm', 'dps', 'diffpir' or 'inpaint'; see the
        methods page. 'auto' is 'anchor' where the model has a Gaussian and all operators are linear, else 'mmps'; the result
        records which. On an autoencoder 'posterior' or, as published, 'mse', and with a diffusion of its latent vectors all but 'inpaint'.
    guidance_options
        Such as ``{"gamma": 0.1}`` for 'sda', ``{"iterations": 8, "solver": "gmres"}`` for 'mmps', or ``{"preset": "published"}`` for
        'inpaint': the soft mask of DiffDA in its 2,910 calls of the network ('soft': the same in 48).
    likelihood
        Of the observation errors: 'gaussian', or for suspect data 'student-t' or 'huber', for diffusion models and autoencoders.
    sampler
        'auto', or for diffusion models 'heun', 'ddim', 'ancestral', 'dpm++', 'adams' or 'pc'; for autoencoders 'map', 'rmap' ('auto') or 'hmc',
        and where a diffusion of their latent vectors was learned also those of diffusion models, one of which 'auto' is then.
    sampler_options
        Such as ``{"churn": 20}`` for 'heun', ``{"corrections": 2, "tau": 0.25}`` for 'pc', ``{"resample": 5}`` for any.
    schedule
        Spacing of the noise levels: 'auto' ('karras'), 'karras', 'log', 'vp-cosine', 'vp-linear' or 'rectified'.
    steps
        Noise levels of the sampler; for autoencoders iterations of the optimiser, or trajectories of 'hmc'.
    window
        Width of the half-open time window around each analysis time, such as '6h'; by default 1 h. An observation in several
        windows goes to the nearest time.
    background_check
        Reject observations with abs(O - B) above this many sqrt(s_o**2 + s_b**2). 'auto': 3 where the prior is
        centred on a background, 10 where it is a climatology, whose mean a warming world leaves. None turns it off.
    quality
        The other checks and what is thinned or merged, as a `QualityControl`; None takes its defaults.
    representativeness
        Standard deviation of what a cell of the grid cannot represent, in the units of the observation, added to `error` in quadrature: a number
        or a mapping per variable.
    lapse_rate
        Decrease per metre of height in the units of the state, a number or a mapping such as ``{"t2m": 0.0065}``: observations are taken
        from the height of their station to that of the ground (``surface_altitude`` of `ds`), where both are known.
    operators
        Observed quantities that are functions of the state, by their name in `obs`: see `xgenda.operators`, for example
        ``{"wind_speed": xgenda.operators.wind_speed("u", "v")}``. Those that are not linear need a diffusion model or an autoencoder.
    first_guess
        The background at more times than those of `ds`, on its grid: each observation is compared with it at its own time (first guess at
        appropriate time), linearly between its times, which are read when called. None: all observations of a window count as of its centre.
    batch_size
        Samples computed at once; changes time and memory only.
    device
        'auto', 'cpu' or 'cuda'.
    progress
        True or False; None shows a bar in notebooks and terminals.
    at
        Where the result is wanted instead of on the grid of `ds`, inside of which it lies: points (latitude and longitude along one
        dimension, or the columns of a table) or another grid. The same members, evaluated there by a model whose ``representation`` is 'points',
        and interpolated for others. What the cells leave open between them is drawn for all places of a call together: ask for places that belong
        together in one call. Cells, and places of observations, are the same in every call.

    Returns
    -------
    xarray.Dataset
        The variables of the model with the leading dimension ``member``, on the coordinates and in the units of `ds`, or on those of `at`.
        Attributes record model, checksum, seed, guidance and (for eager results) the number of observations per quality code.

    Raises
    ------
    ObservationError, OptionError, GridError, ChunkingError, ModelNotFoundError, UnitsError
        Before anything is computed.
    StateError
        If the background holds NaN or fill values; for chunked input when it is computed.

    See Also
    --------
    posterior_moments : mean and standard deviation without noise, for Gaussian priors.
    innovations : observation minus background with the quality code of every observation.
    gaussian_prior : a prior that needs no training.

    References
    ----------
    Rozet, F. and Louppe, G. (2023), Score-based data assimilation, arXiv:2306.10574, eq. 6 and 13.
    Huang, L. et al. (2024), DiffDA: a diffusion model for weather-scale data assimilation, arXiv:2401.05932, for models of task 'background'.

    Examples
    --------
    >>> import xgenda
    >>> background = xgenda.tutorial.open_dataset("europe-t2m-forecast")
    >>> stations = xgenda.tutorial.open_dataset("europe-synop")[["t2m"]].isel(obs=slice(0, 200))
    >>> prior = xgenda.gaussian_prior(background, length_scale=200e3, std=1.9)
    >>> analysis = background.genda.assimilate(stations, model=prior, error=1.0, members=2, seed=0)
    >>> dict(analysis.sizes)
    {'member': 2, 'time': 1, 'latitude': 97, 'longitude': 165}
    """
    ds = metadata.as_dataset(ds)
    member_numbers, drawn_seed = engine.check_members(MEMBERS if members is None else members), engine.check_seed(seed)
    resolve_device(device)
    target = None if at is None else _target(at)
    asked = SamplingOptions(
        guidance, sampler, steps, batch_size, schedule, likelihood, check_mapping("guidance_options", guidance_options),
        check_mapping("sampler_options", sampler_options),
    )  # fmt: skip
    if isinstance(model, LETKF):
        if target is not None:
            raise OptionError("at has no effect on a filter, whose members are on the grid of ds. Leave it out.")
        asked.refuse_all_but((), "a filter draws nothing")
        given = (error, window, background_check, quality, representativeness, lapse_rate, operators, first_guess)
        return _filtered(ds, obs, model, members, drawn_seed, *given)
    setup = prepare(
        ds, obs, model, error, window, background_check, quality, representativeness, lapse_rate, operators, first_guess
    )
    options = setup.model.plan(asked, linear=setup.linear)
    check_trajectory(setup)
    job = setup.job(member_numbers, drawn_seed, options, device, progress)
    asked_for = {
        "seed": drawn_seed,
        "guidance": _described(options.guidance, options.guidance_options),
        "likelihood": options.likelihood,
        "sampler": _described(options.sampler, options.sampler_options),
        "schedule": options.schedule,
        "steps": options.steps or None,
        **_what_was_given(error, window, quality, representativeness, lapse_rate, operators, first_guess),
    }
    said = {
        "model": setup.model.spec.name, "members": len(member_numbers), "seed": drawn_seed, "guidance": options.guidance,
        "sampler": options.sampler, "steps": options.steps or None,
    }  # fmt: skip
    call = written_call("assimilate", said)
    member = xr.DataArray(np.array(member_numbers), dims="member", attrs=metadata.MEMBER_ATTRS)
    return analysed(setup, job, ds, member, asked_for, call, at=target)


def posterior_moments(
    ds: xr.Dataset | xr.DataArray,
    obs: Observations,
    *,
    model: ModelLike = None,
    error: ErrorLike = None,
    window: Any = None,
    background_check: float | str | None = "auto",
    quality: QualityControl | None = None,
    representativeness: float | Mapping[str, float] | None = None,
    lapse_rate: float | Mapping[str, float] | None = None,
    operators: Mapping[str, AnyOperator] | None = None,
    first_guess: xr.Dataset | xr.DataArray | None = None,
    progress: bool | None = None,
    at: xr.Dataset | xr.DataArray | pd.DataFrame | None = None,
) -> xr.Dataset:
    """Return mean and standard deviation of the posterior of a Gaussian prior in closed form: the analysis of optimal interpolation.

    What an ensemble of `assimilate` tends to with its size, without the noise of its mean.

    Parameters
    ----------
    ds, obs, model, error, window, background_check, quality, representativeness, lapse_rate, operators, first_guess, progress
        As in `assimilate`; the model is one of `gaussian_prior`.
    at
        As in `assimilate`, for a model whose ``representation`` is 'points'.

    Returns
    -------
    xarray.Dataset
        As that of `assimilate`, with the dimension ``moment`` ('mean', 'std') instead of ``member``.

    Raises
    ------
    OptionError
        If the model is no Gaussian; and what `assimilate` raises.

    Examples
    --------
    >>> import xgenda
    >>> background = xgenda.tutorial.open_dataset("europe-t2m-forecast")
    >>> stations = xgenda.tutorial.open_dataset("europe-synop")[["t2m"]].isel(obs=slice(0, 200))
    >>> prior = xgenda.gaussian_prior(background, length_scale=200e3, std=1.9)
    >>> moments = xgenda.posterior_moments(background, stations, model=prior, error=1.0)
    >>> bool(moments.t2m.sel(moment="std").max() <= 1.9001)
    True
    """
    ds = metadata.as_dataset(ds)
    setup = prepare(
        ds, obs, model, error, window, background_check, quality, representativeness, lapse_rate, operators, first_guess
    )
    if not setup.model.closed_form:
        raise OptionError(
            f"model={setup.model.spec.name!r} has no posterior in closed form; take the moments of members: "
            f"xgenda.assimilate(...).mean('member'), or use xgenda.gaussian_prior(ds)"
        )
    target = None if at is None else _target(at)
    if target is not None and not setup.model.pointwise:
        raise OptionError(
            f"at needs a covariance between the cells, which model={setup.model.spec.name!r} does not have. Make it a prior over functions: "
            f"gaussian_prior(..., representation='points')"
        )
    job = setup.job((0, 1), 0, setup.model.plan(SamplingOptions(), linear=setup.linear), "cpu", progress)
    moment = xr.DataArray(["mean", "std"], dims="moment", attrs={"long_name": "moment of the posterior"})
    given = _what_was_given(error, window, quality, representativeness, lapse_rate, operators, first_guess)
    call = f"posterior_moments(model={setup.model.spec.name!r})"
    return analysed(setup, dataclasses.replace(job, moments=True), ds, moment, given, call, at=target)


def analysed(
    setup: Prepared,
    job: engine.Job,
    ds: xr.Dataset,
    lead: xr.DataArray,
    asked_for: Mapping[str, object],
    call: str,
    *,
    observed: bool = True,
    at: State | None = None,
) -> xr.Dataset:
    """Compute, or lay out, what `job` says and describe it.

    Parameters
    ----------
    lead
        The coordinate of the leading dimension.
    asked_for, call
        For the attributes and the history of the result.
    observed
        Whether observations belong to such a call, so that their absence and their departures are told of.
    at
        Where the result is wanted, None on the grid of the state.
    """
    if at is not None:
        interpolated(setup.state.grid, rounded(*at.grid.points()), 1, None)  # refuses what lies outside
        if same := {setup.time, lead.dims[0]} & set(at.layout.dims):
            raise OptionError(
                f"at is along {(name := min(map(str, same)))!r}, which the result has already; rename it: at.rename({name}='point')"
            )
        if setup.model.pointwise and not job.moments and at.grid.size > DENSE_LIMIT:
            raise OptionError(
                f"at: {at.grid.size} places are more than members of a model of functions are drawn at ({DENSE_LIMIT}); ask for parts of them."
            )
        job = dataclasses.replace(job, at=at.grid, output=at.orientation)
    if not observed:
        values = engine.lay(job, setup.arrays, setup.state.layout, setup.time, setup.state.grid.plane)
        given = {"model": setup.model.spec.name, "model_sha256": setup.model.sha256, **asked_for}
        return _described_as(setup, values, ds, lead, call, given)
    nothing = setup.located is None or not (setup.located.table.code == Quality.USED).any()
    if nothing:
        count = 0 if setup.located is None else len(setup.located.table)
        by_code = {} if setup.located is None else count_codes(setup.located.table.code)
        reasons = ", ".join(f"{n} {k}" for n, k in by_code.items() if n != "used")
        warnings.warn(
            f"No observation can be used ({count} given); the result is the prior. See xgenda.innovations(ds, obs, ...) for the reasons."
            + (f" By quality code: {reasons}." if reasons else "")
            + (" Are they in the units that they say?" if "bounds" in by_code else ""),
            stacklevel=user_level(),
        )
    values = engine.lay(job, setup.arrays, setup.state.layout, setup.time, setup.state.grid.plane)
    counts, chi2 = None, None
    if not chunking.is_chunked(setup.arrays):
        codes, chi2 = _final_codes(setup, job)
        counts = json.dumps(count_codes(codes))
        if not nothing and not (codes == Quality.USED).any():
            warnings.warn(
                f"No observation can be used: of {len(codes)} given, all on the grid are too far from what the model expects; the result is the "
                f"prior. See xgenda.innovations(ds, obs, ...).",
                stacklevel=user_level(),
            )
        else:
            warn_of_departures(codes, chi2, setup.model.spec.needs_background)
    provenance = {
        "model": setup.model.spec.name,
        "model_sha256": setup.model.sha256,
        **asked_for,
        "background_check": "off" if setup.threshold is None else setup.threshold,
        "departure_chi2": chi2,
        "observation_counts": counts if counts is not None else "computed with the blocks; see xgenda.innovations",
    }
    return _described_as(setup, values, ds, lead, call, provenance, at)


def _described_as(
    setup: Prepared,
    values: Any,
    ds: xr.Dataset,
    lead: xr.DataArray,
    call: str,
    provenance: Mapping[str, object],
    at: State | None = None,
) -> xr.Dataset:
    """Return values as a Dataset like `ds`, or at other places."""
    result = setup.state.leave(_wrap(setup, values, lead)) if at is None else _wrap_at(setup, values, lead, at)
    return metadata.carry_metadata(result, ds, setup.state.variables(setup.variables.values()), call=call, provenance=provenance)


def _filtered(
    ds: xr.Dataset,
    obs: Observations,
    filter: LETKF,
    members: int | None,
    seed: int,
    error: ErrorLike,
    window: Any,
    check: float | str | None,
    quality: QualityControl | None,
    representativeness: float | Mapping[str, float] | None,
    lapse_rate: float | Mapping[str, float] | None,
    operators: Mapping[str, AnyOperator] | None,
    first_guess: xr.Dataset | xr.DataArray | None,
) -> xr.Dataset:
    """Return the analysis of an ensemble by a filter, on the coordinates of `ds`."""
    setup, ensemble, dim, threshold = prepare_ensemble(
        ds, obs, error, window, check, quality, representativeness, lapse_rate, operators, first_guess
    )
    count = ds.sizes[dim]
    if members not in (None, count):
        raise OptionError(f"members={members} is not accepted: a filter has the {count} members of ds. Leave it out.")
    check_filter(setup, filter, count)
    lead = [setup.time] if setup.time else []
    names = list(setup.variables.values())
    fields = [ensemble.ds[n].transpose(*lead, dim, *ensemble.layout.dims) for n in names]
    values = [np.array(f.values, dtype=np.result_type(np.float32, f.dtype)) for f in fields]
    departures = []
    for t, label in enumerate(setup.labels):
        located = None if setup.located is None else setup.located.at(t)
        at = (t,) if setup.time else ()
        analysis, found = analyse(setup, located, filter, [v[at] for v in values], threshold, seed, str(label))
        for v, a in zip(values, analysis, strict=True):
            v[at] = a
        departures.append(found)
    codes = np.concatenate([d.code for d in departures])
    outside = 0 if setup.located is None else int((setup.located.time_index < 0).sum())
    if not (codes == Quality.USED).any():
        warnings.warn(
            f"No observation can be used ({len(codes) + outside} given); the result is the background. See xgenda.innovations(ds, obs, ...) "
            f"for the reasons.",
            stacklevel=user_level(),
        )
    innovation, sigma, spread = (np.concatenate([getattr(d, n) for d in departures]) for n in ("innovation", "error", "spread"))
    chi2 = departure_chi2(innovation, sigma, spread, codes)
    warn_of_departures(codes, chi2, around_background=True)
    if outside and setup.located is not None:
        codes = np.concatenate([codes, setup.located.table.code[setup.located.time_index < 0]])
    analysed = ensemble.ds.assign(
        {n: f.copy(data=v).transpose(*ensemble.ds[n].dims) for n, f, v in zip(names, fields, values, strict=True)}
    )
    result = ensemble.leave(analysed)
    result = result.transpose(dim, ...)
    provenance = {
        "model": repr(filter),
        "seed": seed,
        **_what_was_given(error, window, quality, representativeness, lapse_rate, operators, first_guess),
        "background_check": "off" if threshold is None else threshold,
        "departure_chi2": chi2,
        "observation_counts": json.dumps(count_codes(codes)),
    }
    call = f"assimilate(model={filter!r}, seed={seed})"
    return metadata.carry_metadata(result, ds, ensemble.variables(names), call=call, provenance=provenance)


def _what_was_given(
    error: ErrorLike,
    window: Any,
    quality: QualityControl | None,
    representativeness: float | Mapping[str, float] | None,
    lapse_rate: float | Mapping[str, float] | None,
    operators: Mapping[str, AnyOperator] | None,
    first_guess: object,
) -> dict[str, str | None]:
    """Return the options of the observations as they go into the attributes of the result."""
    given = {
        "error": error,
        "representativeness": representativeness,
        "lapse_rate": lapse_rate,
        "window": window,
        "quality": quality,
    }
    shown: dict[str, str | None] = {k: brief(v) for k, v in given.items()}
    shown["first_guess"] = None if first_guess is None else "at the times of the observations"
    shown["operators"] = None if operators is None else ", ".join(operators)
    return shown


def _described(name: str, options: Mapping[str, Any]) -> str:
    """Return a name with its options, for the attributes of the result."""
    return name if not options else f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})"


def _final_codes(setup: Prepared, job: engine.Job) -> tuple[np.ndarray, float | None]:
    """Return the final code of all observations and chi2 of those that are used, for an eager call."""
    located = setup.located
    if located is None:
        return np.zeros(0), None
    fields = [a.transpose(*([setup.time] if setup.time else []), *setup.state.layout.dims).values for a in setup.arrays]
    mean, deviation, _ = engine.moments(dataclasses.replace(job, located=None), *(f if setup.time else f[None] for f in fields))
    checked, expected, spread = engine.background_codes(
        located, *engine.in_observation_space(job, mean, deviation), setup.threshold, setup.quality
    )
    return checked, departure_chi2(located.table.value - expected, located.table.error, spread, checked)


def _wrap(setup: Prepared, values: Any, lead: xr.DataArray) -> xr.Dataset:
    ds, layout, out = setup.state.ds, setup.state.layout, {}
    for c, name in enumerate(setup.variables.values()):
        array = xr.DataArray(
            values[:, :, c] if setup.time else values[0, :, c],
            dims=([setup.time] if setup.time else []) + [lead.dims[0], *layout.dims],
        )
        order = list(setup.arrays[c].dims)
        out[name] = array.transpose(lead.dims[0], *order)
    kept = {
        str(n): v for n, v in ds.variables.items() if n not in out and (n in ds.coords or not set(layout.dims) <= set(v.dims))
    }
    kept = {n: v for n, v in kept.items() if n in ds.coords or not set(v.dims) & {layout.member}}
    result = xr.Dataset(out, coords={n: v for n, v in kept.items() if n in ds.coords})
    result = result.assign({n: v for n, v in kept.items() if n not in ds.coords})
    return result.assign_coords({str(lead.dims[0]): lead.variable})


def _wrap_at(setup: Prepared, values: Any, lead: xr.DataArray, at: State) -> xr.Dataset:
    """Return values at other places, on the coordinates of these."""
    time, dims = [setup.time] if setup.time else [], at.layout.dims
    out = xr.Dataset(
        {
            name: ([lead.dims[0], *time, *dims], np.swapaxes(values[:, :, c], 0, 1) if time else values[0, :, c])
            for c, name in enumerate(setup.variables.values())
        }
    )
    known = setup.state.ds.coords
    own = {
        n: known[n].variable for n in known if set(known[n].dims) <= set(time)
    }  # its times, not those of what lies at the places
    out = at.leave(
        out.assign_coords({n: c for n, c in at.ds.coords.items() if n not in own}).assign_coords(
            {str(lead.dims[0]): lead.variable}
        )
    )
    out = setup.state.leave(out.assign_coords(own))
    places = {n: c.variable for n, c in at.origin.coords.items() if n not in own and set(c.dims) <= set(out.dims)}
    return out.assign_coords(places).assign_coords({n: v for n, v in own.items() if n in setup.state.origin.coords})


def _target(at: xr.Dataset | xr.DataArray | pd.DataFrame) -> State:
    """Return where a result is wanted, without any variables.

    Raises
    ------
    OptionError, CoordinateError, GridError
        If these are no places.
    """
    if isinstance(at, pd.DataFrame):
        at = xr.Dataset.from_dataframe(at.reset_index(drop=True).rename_axis("point"))
    if not isinstance(at, (xr.Dataset, xr.DataArray)):
        raise OptionError(
            f"at={brief(at)} is not accepted; give places with latitude and longitude: at=obs, or "
            f"at=xr.Dataset(coords={{'latitude': ('point', [50.0]), 'longitude': ('point', [10.0])}})"
        )
    ds = at.to_dataset(name="at") if isinstance(at, xr.DataArray) else at
    names = [n for n in metadata.find_positions(ds) if n is not None]
    ds = ds.set_coords(names)
    kept = {str(d) for n in names for d in ds[n].dims}
    ds = ds.drop_vars([n for n, v in ds.variables.items() if n in ds.data_vars or not set(v.dims) <= kept or not v.dims])
    return states.enter(ds, "at")

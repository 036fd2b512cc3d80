"""`forecast`: what a state becomes, from a diffusion model of the state a lead later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import engine, metadata, states
from xgenda.assimilation import analysed
from xgenda.devices import resolve_device
from xgenda.diffusion.noise import seed_for
from xgenda.errors import ModelNotFoundError, OptionError, check_mapping
from xgenda.models.generative import GenerativeModel, SamplingOptions
from xgenda.models.loading import choose_model
from xgenda.preparation import ModelLike, prepare


def forecast(
    ds: xr.Dataset | xr.DataArray,
    *,
    model: ModelLike = None,
    members: int | None = None,
    seed: int | None = None,
    sampler: str = "auto",
    sampler_options: Mapping[str, Any] | None = None,
    schedule: str = "auto",
    steps: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> xr.Dataset:
    """Return an ensemble of what each state becomes, one lead of the model later.

    Chunked input (dask, along time) gives a lazy result, unchunked input an eager one, with the same numbers. With the model bound it is a
    function from Dataset to Dataset: ``functools.partial(xgenda.forecast, model=model, seed=0)``.

    Parameters
    ----------
    ds
        States on the grid of the model, at any times; each is forecast on its own. Of an ensemble, with a dimension ``member``, each member is
        forecast on its own.
    model
        Of ``xgenda.train(series, task='forecast', lag=...)``, a registered name, or a path.
    members
        Forecasts of each state, by default 1; of an ensemble one of each member, and nothing else.
    seed, sampler, sampler_options, schedule, steps, batch_size, device, progress
        As in `xgenda.assimilate`. Random numbers belong to the seed, the time that is forecast and the number of the member.

    Returns
    -------
    xarray.Dataset
        The variables of the model with the leading dimension ``member``, at the times of `ds` plus the lead.

    Raises
    ------
    OptionError, GridError, ChunkingError, ModelNotFoundError, UnitsError
        Before anything is computed.
    StateError
        If the states hold NaN or fill values; for chunked input when it is computed.

    See Also
    --------
    assimilate : the same for a model of task 'background', with observations.

    Examples
    --------
    >>> import xgenda
    >>> ds = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=slice(0, 40), latitude=slice(8, 16), longitude=slice(8, 16))
    >>> model = xgenda.train(ds, task="forecast", lag="360D", steps=2, width=8)
    >>> later = xgenda.forecast(ds.isel(time=[3]), model=model, members=2, seed=0, steps=4)
    >>> later.time.values[0] - ds.time.values[3]
    datetime.timedelta(days=360)
    """
    ds = metadata.as_dataset(ds)
    drawn = engine.check_seed(seed)
    resolve_device(device)
    asked = SamplingOptions(
        sampler=sampler,
        steps=steps,
        batch_size=batch_size,
        schedule=schedule,
        sampler_options=check_mapping("sampler_options", sampler_options),
    )
    member = metadata.find_member(ds)
    if member is None or member not in ds.dims:
        return _forecast(ds, model, engine.check_members(1 if members is None else members), drawn, asked, device, progress)
    if members is not None:
        raise OptionError(f"members={members!r} has no effect on an ensemble, of which each member is forecast. Leave it out.")
    parts = [
        _forecast(ds.isel({member: k}, drop=True), model, (k,), drawn, asked, device, progress) for k in range(ds.sizes[member])
    ]
    out = xr.concat(parts, "member", data_vars="all", coords="minimal", compat="override", join="override")
    return out.assign_coords(member=("member", ds[member].values, metadata.MEMBER_ATTRS)) if member in ds.coords else out


def _forecast(
    ds: xr.Dataset,
    model: ModelLike,
    numbers: tuple[int, ...],
    seed: int,
    asked: SamplingOptions,
    device: str,
    progress: bool | None,
) -> xr.Dataset:
    """Forecast states with so many members each."""
    state = states.enter(ds)
    chosen = choose_model(model, state.ds, state.layout, state.grid, task="forecast")
    if chosen.spec.task != "forecast":
        raise ModelNotFoundError(
            f"model={chosen.spec.name!r} is for {chosen.spec.task!r}; train one for this: xgenda.train(series, task='forecast', lag='48h')"
        )
    later = _later(ds, state.layout.time, chosen)
    setup = prepare(later, None, chosen, None, None, None, None, None, task="forecast")
    options = chosen.plan(asked)
    # other random numbers than those of an analysis of the same time with the same seed
    job = setup.job(numbers, seed_for(seed, "forecast", 0), options, device, progress)
    given = {"seed": seed, "sampler": options.sampler, "schedule": options.schedule, "steps": options.steps}
    call = f"forecast(model={chosen.spec.name!r}, members={len(numbers)}, seed={seed})"
    lead = xr.DataArray(np.array(numbers), dims="member", attrs=metadata.MEMBER_ATTRS)
    return analysed(setup, job, later, lead, given, call, observed=False)


def _later(ds: xr.Dataset, time: str | None, model: GenerativeModel) -> xr.Dataset:
    """Return the states at the times that they become something else."""
    if time is None or time not in ds.coords:
        return ds
    seconds, stamps = float(model.spec.options["lag"]), ds[time]
    step = (
        np.timedelta64(round(seconds * 1e9), "ns") if stamps.dtype.kind == "M" else pd.Timedelta(seconds=seconds).to_pytimedelta()
    )
    moved = (stamps.dims, np.asarray(stamps.values + step), stamps.attrs)
    return ds.assign_coords({time: moved})

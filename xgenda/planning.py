"""`plan`: what a call of `downscale`, `assimilate` or `forecast` would do, before it does it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from xgenda import metadata, states
from xgenda.diffusion.guidance import goes_through
from xgenda.diffusion.memory import guided_memory, peak_memory, plan_memory
from xgenda.diffusion.samplers import SAMPLERS, network_calls
from xgenda.diffusion.tiles import TiledNetwork, Tiling
from xgenda.diffusion.trajectories import TrajectoryDenoiser
from xgenda.downscaling import by_axis, chunk_sizes
from xgenda.errors import OptionError, check_choice, check_count, check_mapping
from xgenda.latent import linearised
from xgenda.models.background import BackgroundModel
from xgenda.models.conditioning import STEPS as DIFFUSION_STEPS
from xgenda.models.conditioning import evaluations
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.decoding import AT_ONCE
from xgenda.models.diffusive import DiffusionModel
from xgenda.models.generative import GenerativeModel, SamplingOptions
from xgenda.models.latents import DRAWS, LatentModel
from xgenda.models.loading import choose_model


@dataclass(frozen=True)
class Plan:
    """What a call would do.

    Attributes
    ----------
    model
        Name.
    samples
        Times x members.
    grid
        Rows and columns of the result.
    part
        Rows and columns that are sampled together: the grid, or a chunk with its halo.
    parts
        How many.
    tile, tiles
        Rows and columns that the network sees, and how many of them there are in a part.
    calls
        Of the network, each on one tile of one sample, in all.
    memory
        Peak in bytes of one part with one batch of samples: weights, fields and one network call. Without what observations take.
    gradients
        Through the network, of the guidance of `assimilate`: at most so many, in all, each about two calls' worth of time.
    guidance
        Of `assimilate`; empty where there is none.
    decoded
        States that the decoder of a latent model makes of latent vectors, in all, where all times are observed; with the derivatives that
        the guidance takes of it each about two to three times as long as without.
    once
        How many of the calls are made once for a model in each process, for its background check.
    """

    model: str
    samples: int
    grid: tuple[int, int]
    part: tuple[int, int]
    parts: int
    tile: tuple[int, int]
    tiles: int
    calls: int
    memory: int
    gradients: int = 0
    guidance: str = ""
    decoded: int = 0
    once: int = 0

    def __repr__(self) -> str:
        """Return the plan as text."""
        rows = {
            "samples": f"{self.samples} (times x members), each on {self.grid[0]} x {self.grid[1]} cells",
            "parts": "the whole grid"
            if self.parts == 1
            else f"{self.parts} of at most {self.part[0]} x {self.part[1]} cells with their halo",
            "tiles": "none" if self.tiles == 1 else f"{self.tiles} of {self.tile[0]} x {self.tile[1]} cells in each",
            **({"guidance": self.guidance} if self.guidance else {}),
            "network calls": f"{self.calls}, each on one tile of one sample"
            + (f", and at most {self.gradients} gradients through it" if self.gradients else "")
            + (f"; {self.once} of them once in a process, for background_check" if self.once else ""),
            **({"decoder": f"{self.decoded} states of latent vectors"} if self.decoded else {}),
            "memory": f"{_bytes(self.memory)} for each part that is computed at the same time",
        }
        return f"<xgenda.Plan for {self.model!r}>\n" + "\n".join(f"  {k:<14} {v}" for k, v in rows.items())


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def plan(
    ds: xr.Dataset | xr.DataArray,
    *,
    model: GenerativeModel | str | os.PathLike[str] | None = None,
    task: str = "downscale",
    members: int = 16,
    guidance: str = "auto",
    guidance_options: Mapping[str, Any] | None = None,
    sampler: str = "auto",
    sampler_options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    tile: Any = "auto",
    overlap: Any = None,
    chunks: Any = None,
    batch_size: int | None = None,
) -> Plan:
    """Return what `downscale`, `assimilate` or `forecast` would do with the same arguments: network calls, tiles, memory. Nothing is computed.

    Memory is predicted by replaying the calls without their numbers; on a CPU it was within 5 % of what was measured for networks of 80 million
    parameters, see the benchmarks. Observations are not asked for: what they take is not counted, and their operators count as linear. Where they
    are more precise than the lowest noise level a few more calls are made. Of a latent model the calls and states that its background check
    takes, once in a process, are counted.

    Parameters
    ----------
    ds, model, members, sampler, sampler_options, steps, tile, overlap, chunks, batch_size
        As in the verb that the model is for.
    task
        Where `model` is None, what to look for: 'downscale', 'prior' (for `assimilate`) or 'forecast'.
    guidance, guidance_options
        As in `xgenda.assimilate`.

    Raises
    ------
    OptionError
        If the model is no diffusion model, or of a latent model is searched, or an option is not for it.

    Examples
    --------
    >>> import xgenda
    >>> fine = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=[200], latitude=slice(0, 36), longitude=slice(0, 48))
    >>> coarse = fine.coarsen(latitude=4, longitude=4).mean()
    >>> xgenda.plan(coarse, model="t2m-north-america-x4", members=8, steps=10).calls
    152
    >>> print(xgenda.plan(fine, model="t2m-north-america", members=8).calls)
    392
    """
    check_choice("task", task, ("downscale", "prior", "forecast"))
    state = states.enter(metadata.as_dataset(ds))
    chosen = choose_model(model, state.ds, state.layout, state.grid, task=task)
    time = state.layout.time
    times = state.ds.sizes[time] if time in state.ds.dims else 1
    if isinstance(chosen, (DiffusionModel, BackgroundModel, LatentModel)):
        left = {"tile": tile, "overlap": overlap, "chunks": chunks}
        if unfit := [f"{k}={v!r}" for k, v in left.items() if v not in ("auto", None)]:
            raise OptionError(f"{unfit[0]} has no effect: model={chosen.spec.name!r} is not for downscaling. Leave it out.")
        asked = SamplingOptions(
            guidance, sampler, steps, batch_size, guidance_options=check_mapping("guidance_options", guidance_options),
            sampler_options=check_mapping("sampler_options", sampler_options),
        )  # fmt: skip
        count = check_count("members", members)
        return _of_codes(chosen, asked, times, count) if isinstance(chosen, LatentModel) else _guided(chosen, asked, times, count)
    if not isinstance(chosen, CorrectiveModel):
        raise OptionError(f"model={chosen.spec.name!r} is no diffusion model; there is nothing to plan: call the verb itself.")
    if guidance != "auto" or guidance_options:
        raise OptionError(f"guidance={guidance!r} has no effect: model={chosen.spec.name!r} is for downscaling. Leave it out.")
    given = by_axis(state, chosen, tile=tile, overlap=overlap, chunks=chunks)
    options = chosen.plan(
        SamplingOptions(
            sampler=sampler, steps=steps, batch_size=batch_size, sampler_options=check_mapping("sampler_options", sampler_options),
            tile=given["tile"], overlap=given["overlap"],
        )
    )  # fmt: skip
    samples = times * check_count("members", members)
    grid = chosen.grid.plane
    part, parts = grid, 1
    if chunks is not None:
        sizes = chunk_sizes(chosen, given["chunks"])
        part = (min(grid[0], sizes[0] + 2 * chosen.halo), min(grid[1], sizes[1] + 2 * chosen.halo))
        parts = -(-grid[0] // sizes[0]) * -(-grid[1] // sizes[1])
    tile = part if options.tile is None else (min(options.tile[0], part[0]), min(options.tile[1], part[1]))
    overlaps = (0, 0) if options.tile is None else options.overlap or (0, 0)
    wraps = part[1] == grid[1] and bool(chosen.grid.periodic)
    tiling = Tiling(part, tile, overlaps, periodic=wraps, multiple=chosen.stride)
    place = np.arange(part[0]), np.arange(part[1])
    network = chosen.network_on(
        chosen.denoiser.network,
        place,
        0 if chosen.spec.options.get("lead_index") else None,
        (tile[0] < part[0], tile[1] < part[1]),
    )
    channels, batch = chosen.spec.channels, min(int(options.batch_size or 1), samples)
    memory = plan_memory(
        network, tiling, channels, chosen.features.channels + (channels if chosen.mean_condition else 0), samples=batch, batch=batch,
        sampler=options.sampler, whole_condition=chosen.whole_condition,
    )  # fmt: skip
    once = network_calls(options.sampler, int(options.steps or 0), options.sampler_options)
    # the first stage, and what a calibration takes deviations from
    means = times * parts * len(tiling.places) * ((chosen.regression is not None) + (chosen.calibration is not None))
    calls = samples * parts * len(tiling.places) * once + means
    return Plan(chosen.spec.name, samples, grid, part, parts, tiling.tile, len(tiling.places), calls, memory.peak)


def _guided(model: DiffusionModel | BackgroundModel, asked: SamplingOptions, times: int, members: int) -> Plan:
    """Return what an analysis or a forecast would do."""
    options = model.plan(asked)
    batch, plane = int(options.batch_size or 1), model.spec.grid.plane if model.spec.grid is not None else (1, 1)
    window = model.window if isinstance(model, DiffusionModel) else 1
    _check_times(model.spec.name, times, window)
    # of a trajectory all times are one sample, and the network is asked for each of its windows
    spans, windows = (times, 1) if window == 1 else (1, times - window + 1)
    count = min(batch, spans * members)
    shape = (count, *((times,) if window > 1 else ()), model.spec.channels, *plane)
    # with an anchor of its own: what that keeps for the next call must not be what has no numbers
    alone = copy.copy(model.in_tiles(batch) if isinstance(model, DiffusionModel) else model.denoiser)
    tiling = alone.network.tiling if isinstance(alone.network, TiledNetwork) else None
    tile, tiles = (plane, 1) if tiling is None else (tiling.tile, len(tiling.places))
    for axis in tiling.axes if tiling is not None else ():
        assert axis.segments  # with values, before there are none
    alone.anchor = copy.deepcopy(alone.anchor)
    denoise: Any = alone
    condition = None
    if isinstance(model, BackgroundModel):
        condition = (count, model.features.channels + (model.spec.channels if model.mean_condition else 0), *plane)
    elif window > 1:
        denoise = TrajectoryDenoiser(alone, window // 2, batch)
        if denoise.anchor is not None:
            denoise.whole(times)  # found by its numbers
    through = 0 if model.spec.task == "forecast" else goes_through(options.guidance, options.guidance_options)
    peak, held = guided_memory(denoise, shape, condition, sampler=options.sampler, through=through > 0)
    once = spans * members * windows * tiles
    calls = once * evaluations(options)
    first = times if isinstance(model, BackgroundModel) and model.regression is not None else 0
    return Plan(
        model.spec.name, times * members, plane, plane, 1, tile, tiles, calls + first, peak + held, calls * through,
        "" if model.spec.task == "forecast" else options.guidance,
    )  # fmt: skip


def _of_codes(model: LatentModel, asked: SamplingOptions, times: int, members: int) -> Plan:
    """Return what an analysis by a diffusion of latent vectors would do."""
    options, name = model.plan(asked), model.spec.name
    if model.prior is None or options.sampler not in SAMPLERS:
        raise OptionError(
            f"model={name!r} is searched with sampler={options.sampler!r}, and how often it is decoded depends on the observations; there is "
            f"nothing to plan: call the verb itself. A diffusion of its latent vectors is what train(latent_prior='diffusion') learns."
        )
    _check_times(name, times, model.window)
    spans, length = (times, 1) if model.window == 1 else (1, times)
    windows, count = length - model.window + 1, min(int(options.batch_size or 1), spans * members)
    denoise: Any = copy.copy(model.prior)
    denoise.anchor = copy.deepcopy(denoise.anchor)
    if model.window > 1:
        denoise = TrajectoryDenoiser(denoise, model.window // 2)
        denoise.whole(times)  # found by its numbers

    def decode(z: Tensor) -> Tensor:
        return model.network.decode(z.reshape(-1, model.latent)).reshape(len(z), -1)

    def observe(z: Tensor) -> None:
        state, tangent = linearised(decode, z.flatten(1))
        tangent.back(tangent.forth(z.flatten(1)) + state)

    through = goes_through(options.guidance, {k: v for k, v in options.guidance_options.items() if k != "decoder_error"})
    shape = (count, *((times,) if model.window > 1 else ()), model.latent, 1, 1)
    peak, held = guided_memory(denoise, shape, sampler=options.sampler, through=through > 0, observe=observe)
    # of the background check: draws of the prior, and their states
    drawn = guided_memory(model.prior, (DRAWS, model.window * model.latent, 1, 1))[0]
    checked = max(drawn, peak_memory(decode, (AT_ONCE, model.latent))[0])
    once = evaluations(options)
    calls, samples = spans * members * windows * once, times * members
    # departures and derivatives at each evaluation, and the states in the end; and before them the derivatives at the middle
    decoded = samples * (2 * once + 1) + times * model.latent
    assert model.spec.grid is not None
    plane = model.spec.grid.plane
    moments = DRAWS * network_calls("heun", DIFFUSION_STEPS)
    return Plan(
        name, samples, plane, plane, 1, plane, 1, calls + moments, max(peak, checked) + held, calls * through, options.guidance, decoded + DRAWS,
        moments,
    )  # fmt: skip


def _check_times(name: str, times: int, window: int) -> None:
    if times < window:
        raise OptionError(f"ds has {times} times, and the windows of model={name!r} {window}; give at least {window}.")

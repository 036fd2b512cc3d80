"""`plan`: what a call of `downscale` would do, before it does it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata, states
from xgenda.diffusion.memory import plan_memory
from xgenda.diffusion.samplers import network_calls
from xgenda.diffusion.tiles import Tiling
from xgenda.downscaling import by_axis, chunk_sizes
from xgenda.errors import OptionError, check_count
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.generative import GenerativeModel, SamplingOptions
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
        Peak in bytes of one part with one batch of samples: weights, fields and one network call.
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

    def __repr__(self) -> str:
        """Return the plan as text."""
        rows = {
            "samples": f"{self.samples} (times x members), each on {self.grid[0]} x {self.grid[1]} cells",
            "parts": "the whole grid"
            if self.parts == 1
            else f"{self.parts} of at most {self.part[0]} x {self.part[1]} cells with their halo",
            "tiles": "none" if self.tiles == 1 else f"{self.tiles} of {self.tile[0]} x {self.tile[1]} cells in each",
            "network calls": f"{self.calls}, each on one tile of one sample",
            "memory": f"{_bytes(self.memory)} for each part that is computed at the same time",
        }
        return f"<xgenda.Plan for {self.model!r}>\n" + "\n".join(f"  {k:<14} {v}" for k, v in rows.items())


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def plan(
    ds: xr.Dataset | xr.DataArray,
    *,
    model: GenerativeModel | str | os.PathLike[str] | None = None,
    members: int = 16,
    sampler: str = "auto",
    sampler_options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    tile: Any = "auto",
    overlap: Any = None,
    chunks: Any = None,
    batch_size: int | None = None,
) -> Plan:
    """Return what `downscale` would do with the same arguments: network calls, tiles, memory. Nothing is computed.

    Memory is predicted by replaying the calls without their numbers; on a CPU it was within 5 % of what was measured for networks of 80 million
    parameters, see the benchmarks.

    Parameters
    ----------
    ds, model, members, sampler, sampler_options, steps, tile, overlap, chunks, batch_size
        As in `xgenda.downscale`.

    Raises
    ------
    OptionError
        If the model is no diffusion model for downscaling.

    Examples
    --------
    >>> import xgenda
    >>> fine = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=[200], latitude=slice(0, 36), longitude=slice(0, 48))
    >>> coarse = fine.coarsen(latitude=4, longitude=4).mean()
    >>> xgenda.plan(coarse, model="t2m-north-america-x4", members=8, steps=10).calls
    152
    """
    state = states.enter(metadata.as_dataset(ds))
    chosen = choose_model(model, state.ds, state.layout, state.grid, task="downscale")
    if not isinstance(chosen, CorrectiveModel) or chosen.spec.task != "downscale":
        raise OptionError(f"model={chosen.spec.name!r} is no diffusion model for downscaling; there is nothing to plan.")
    given = by_axis(state, chosen, tile=tile, overlap=overlap, chunks=chunks)
    options = chosen.plan(
        SamplingOptions(
            sampler=sampler, steps=steps, batch_size=batch_size, sampler_options=dict(sampler_options or {}), tile=given["tile"],
            overlap=given["overlap"],
        )
    )  # fmt: skip
    time = state.layout.time
    times = state.ds.sizes[time] if time in state.ds.dims else 1
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

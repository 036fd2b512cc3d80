"""Every kind of model behind one call on fine fields: what they all promise, and refuse, is tested for each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import xarray as xr

DIFFUSION: dict[str, Any] = {"steps": 4}


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes
    ----------
    model
        Name of the fixture that makes it.
    options
        Of the verb.
    downscales
        Whether it takes the 4 x 4 block means instead of observations.
    sees
        Of the series: 'own' time, the times 'around', or 'all' of them, which are then solved together and in one chunk.
    batches
        Whether samples are computed in batches.
    reads
        Whether the values that it is given matter, as those of a background or of coarse fields do.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    downscales: bool = False
    sees: str = "own"
    batches: bool = True
    reads: bool = False

    def given(self, ds: xr.Dataset) -> xr.Dataset:
        """Return what it takes of fine fields."""
        return ds.coarsen(latitude=4, longitude=4).mean() if self.downscales else ds

    def call(self, request: pytest.FixtureRequest) -> Callable[..., xr.Dataset]:
        """Return the verb, by the accessor, of what it takes and observations."""
        model = request.getfixturevalue(self.model)

        def run(ds: xr.Dataset, observations: Any = None, **options: Any) -> xr.Dataset:
            given = {"model": model, "members": 4, "seed": 3, "error": 0.5} | self.options | options
            error = given.pop("error")
            return ds.genda.downscale(**given) if self.downscales else ds.genda.assimilate(observations, error=error, **given)

        return run


KINDS: dict[str, Kind] = {
    "anchor": Kind("tiny_prior", DIFFUSION | {"guidance": "anchor"}),
    "mmps": Kind("tiny_prior", DIFFUSION | {"guidance": "mmps"}),
    "sda": Kind("tiny_prior", DIFFUSION | {"guidance": "sda"}),
    "gaussian": Kind("tiny_eofs", batches=False),
    "downscale": Kind("tiny_downscaler", DIFFUSION, downscales=True, reads=True),
    "latent search": Kind("tiny_latents", {"sampler": "rmap"}),
    "latent diffusion": Kind("tiny_latents", DIFFUSION),
    "latent trajectories": Kind("tiny_trajectories", DIFFUSION, sees="all"),
    "conversion": Kind("tiny_conversion", downscales=True, reads=True),
    "points": Kind("tiny_process", batches=False, reads=True),
    "points of a diffusion": Kind("tiny_points", DIFFUSION),
    "functions": Kind("tiny_functions", DIFFUSION | {"guidance_options": {"iterations": 1}}),
    "context": Kind("tiny_context", DIFFUSION, downscales=True, sees="around", reads=True),
}

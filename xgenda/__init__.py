"""xgenda: generative data assimilation and downscaling for xarray.

>>> import xgenda
>>> analysis = background.genda.assimilate(obs, members=16)     # doctest: +SKIP
>>> fine = coarse.genda.downscale(members=8)                    # doctest: +SKIP
>>> model = xgenda.train(ds, start="t2m-north-america")         # doctest: +SKIP

Importing xgenda registers the accessor ``.genda`` and nothing more: torch and dask are imported when they are first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xgenda import accessor as _accessor  # registers .genda

if TYPE_CHECKING:
    from xgenda import errors, forecasts, operators, tutorial
    from xgenda.assimilation import assimilate, posterior_moments
    from xgenda.cycling import cycle
    from xgenda.departures import fit_covariance, innovation_statistics, innovations
    from xgenda.divergence import DivergenceGuard
    from xgenda.downscaling import downscale
    from xgenda.filters import LETKF
    from xgenda.forecasting import forecast
    from xgenda.models.gaussian import gaussian_prior
    from xgenda.models.generative import GenerativeModel
    from xgenda.models.loading import load_model
    from xgenda.models.store import list_models
    from xgenda.observations.correlations import ErrorCovariance
    from xgenda.observations.quality import QualityControl, quality_report
    from xgenda.planning import plan
    from xgenda.regridding import Regridder, regrid
    from xgenda.storage import open_cycles
    from xgenda.training.calibrating import calibrate
    from xgenda.training.loop import train
    from xgenda.training.reporting import Progress, TensorBoard
    from xgenda.verification import verify

#: Public name -> module that defines it.
_WHERE = {
    "assimilate": "xgenda.assimilation",
    "posterior_moments": "xgenda.assimilation",
    "innovations": "xgenda.departures",
    "fit_covariance": "xgenda.departures",
    "innovation_statistics": "xgenda.departures",
    "plan": "xgenda.planning",
    "calibrate": "xgenda.training.calibrating",
    "cycle": "xgenda.cycling",
    "open_cycles": "xgenda.storage",
    "DivergenceGuard": "xgenda.divergence",
    "downscale": "xgenda.downscaling",
    "forecast": "xgenda.forecasting",
    "LETKF": "xgenda.filters",
    "train": "xgenda.training.loop",
    "Progress": "xgenda.training.reporting",
    "TensorBoard": "xgenda.training.reporting",
    "verify": "xgenda.verification",
    "gaussian_prior": "xgenda.models.gaussian",
    "GenerativeModel": "xgenda.models.generative",
    "load_model": "xgenda.models.loading",
    "list_models": "xgenda.models.store",
    "ErrorCovariance": "xgenda.observations.correlations",
    "QualityControl": "xgenda.observations.quality",
    "quality_report": "xgenda.observations.quality",
    "regrid": "xgenda.regridding",
    "Regridder": "xgenda.regridding",
}
_MODULES = ("errors", "forecasts", "observations", "ocean", "operators", "plotting", "tutorial", "twins")

__all__ = [
    "LETKF",
    "DivergenceGuard",
    "ErrorCovariance",
    "GenerativeModel",
    "Progress",
    "QualityControl",
    "Regridder",
    "TensorBoard",
    "__version__",
    "assimilate",
    "calibrate",
    "cycle",
    "downscale",
    "errors",
    "fit_covariance",
    "forecast",
    "forecasts",
    "gaussian_prior",
    "innovation_statistics",
    "innovations",
    "list_models",
    "load_model",
    "open_cycles",
    "operators",
    "plan",
    "posterior_moments",
    "quality_report",
    "regrid",
    "train",
    "tutorial",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from xgenda.metadata import package_version

        return package_version()
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name == "observations":
        importlib.import_module("xgenda.observations.networks")
    if name in _MODULES:
        return importlib.import_module(f"xgenda.{name}")
    raise AttributeError(f"module 'xgenda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


del _accessor

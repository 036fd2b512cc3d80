"""The accessor ``.genda`` on Dataset and DataArray: it stores the object and forwards, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import xarray as xr

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import pandas as pd

    from xgenda.divergence import DivergenceGuard
    from xgenda.downscaling import Pair
    from xgenda.filters import LETKF
    from xgenda.models.generative import GenerativeModel
    from xgenda.observations.containers import ErrorLike, Observations
    from xgenda.observations.quality import QualityControl
    from xgenda.operators import AnyOperator

    ModelLike: TypeAlias = GenerativeModel | str | os.PathLike[str] | None


@xr.register_dataset_accessor("genda")
@xr.register_dataarray_accessor("genda")
class GendaAccessor:
    """Generative data assimilation and downscaling.

    Each method is the function of the same name with the Dataset as its first argument.
    """

    def __init__(self, obj: xr.Dataset | xr.DataArray) -> None:
        self._obj = obj

    def assimilate(
        self,
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
        """Return an ensemble of the states that fit the observations; see `xgenda.assimilate`."""
        from xgenda.assimilation import assimilate

        return assimilate(
            self._obj, obs, model=model, error=error, members=members, seed=seed, guidance=guidance,
            guidance_options=guidance_options, likelihood=likelihood, sampler=sampler, sampler_options=sampler_options, schedule=schedule,
            steps=steps, window=window, background_check=background_check, quality=quality,
            representativeness=representativeness, lapse_rate=lapse_rate,
            operators=operators, first_guess=first_guess, batch_size=batch_size, device=device, progress=progress, at=at,
        )  # fmt: skip

    def cycle(
        self,
        obs: Observations,
        *,
        forecast: Callable[[xr.Dataset], xr.Dataset],
        model: ModelLike | LETKF,
        window: Any = None,
        times: Any = None,
        store: str | os.PathLike[str] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        error: ErrorLike = None,
        members: int | None = None,
        seed: int | None = None,
        background: str = "control",
        inflation: float = 1.0,
        rtpp: float = 0.0,
        rtps: float = 0.0,
        guard: DivergenceGuard | str | None = "default",
        guidance: str = "auto",
        guidance_options: Mapping[str, Any] | None = None,
        likelihood: str = "gaussian",
        sampler: str = "auto",
        sampler_options: Mapping[str, Any] | None = None,
        schedule: str = "auto",
        steps: int | None = None,
        background_check: float | str | None = "auto",
        quality: QualityControl | None = None,
        representativeness: float | Mapping[str, float] | None = None,
        lapse_rate: float | Mapping[str, float] | None = None,
        operators: Mapping[str, AnyOperator] | None = None,
        batch_size: int | None = None,
        device: str = "auto",
        progress: bool | None = None,
    ) -> xr.Dataset:
        """Return analyses at many times, each with the forecast from the one before as background; see `xgenda.cycle`."""
        from xgenda.cycling import cycle

        return cycle(
            self._obj, obs, forecast=forecast, model=model, window=window, times=times, store=store, resume=resume, overwrite=overwrite,
            error=error, members=members, seed=seed, background=background, inflation=inflation, rtpp=rtpp, rtps=rtps, guard=guard,
            guidance=guidance, guidance_options=guidance_options, likelihood=likelihood, sampler=sampler, sampler_options=sampler_options,
            schedule=schedule, steps=steps, background_check=background_check, quality=quality, representativeness=representativeness,
            lapse_rate=lapse_rate, operators=operators, batch_size=batch_size, device=device, progress=progress,
        )  # fmt: skip

    def posterior_moments(
        self,
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
        """Return mean and standard deviation of a Gaussian posterior; see `xgenda.posterior_moments`."""
        from xgenda.assimilation import posterior_moments

        return posterior_moments(
            self._obj, obs, model=model, error=error, window=window, background_check=background_check, quality=quality,
            representativeness=representativeness, lapse_rate=lapse_rate, operators=operators, first_guess=first_guess,
            progress=progress, at=at,
        )  # fmt: skip

    def fit_covariance(
        self,
        obs: Observations,
        *,
        covariance: str = "exponential",
        window: Any = None,
        quality: QualityControl | None = None,
        lapse_rate: float | Mapping[str, float] | None = None,
    ) -> pd.DataFrame:
        """Return the errors of this background and of observations; see `xgenda.fit_covariance`."""
        from xgenda.departures import fit_covariance

        return fit_covariance(
            self._obj, obs, covariance=covariance, window=window, quality=quality, lapse_rate=lapse_rate
        )  # fmt: skip

    def innovations(
        self,
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
        analysis: xr.Dataset | None = None,
    ) -> xr.Dataset:
        """Return observation minus background with quality codes; see `xgenda.innovations`."""
        from xgenda.departures import innovations

        return innovations(
            self._obj, obs, model=model, error=error, window=window, background_check=background_check, quality=quality,
            representativeness=representativeness, lapse_rate=lapse_rate, operators=operators, first_guess=first_guess, analysis=analysis,
        )  # fmt: skip

    def downscale(
        self,
        *,
        model: ModelLike = None,
        target: xr.Dataset | xr.DataArray | None = None,
        members: int = 16,
        seed: int | None = None,
        stage: str = "all",
        sampler: str = "auto",
        sampler_options: Mapping[str, Any] | None = None,
        schedule: str = "auto",
        steps: int | None = None,
        tile: Pair | str | None = "auto",
        overlap: Pair | None = None,
        chunks: Pair | None = None,
        error: float | Mapping[str, float] | None = None,
        batch_size: int | None = None,
        device: str = "auto",
        progress: bool | None = None,
    ) -> xr.Dataset:
        """Return the fine ensemble behind a coarse field; see `xgenda.downscale`."""
        from xgenda.downscaling import downscale

        return downscale(
            self._obj, model=model, target=target, members=members, seed=seed, stage=stage, sampler=sampler,
            sampler_options=sampler_options, schedule=schedule, steps=steps, tile=tile, overlap=overlap, chunks=chunks, error=error,
            batch_size=batch_size, device=device, progress=progress,
        )  # fmt: skip

    def forecast(
        self,
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
        """Return what these states become; see `xgenda.forecast`."""
        from xgenda.forecasting import forecast

        return forecast(
            self._obj, model=model, members=members, seed=seed, sampler=sampler, sampler_options=sampler_options, schedule=schedule,
            steps=steps, batch_size=batch_size, device=device, progress=progress,
        )  # fmt: skip

    def regrid(
        self,
        target: xr.Dataset | xr.DataArray,
        *,
        method: str = "bilinear",
        regridder: str = "auto",
        skipna: bool = False,
        na_thres: float = 1.0,
        extrapolate: str | None = None,
        source_mask: xr.DataArray | None = None,
        target_mask: xr.DataArray | None = None,
    ) -> xr.Dataset | xr.DataArray:
        """Return these fields on another horizontal grid; see `xgenda.regrid`."""
        from xgenda.regridding import regrid

        return regrid(
            self._obj, target, method=method, regridder=regridder, skipna=skipna, na_thres=na_thres, extrapolate=extrapolate,
            source_mask=source_mask, target_mask=target_mask,
        )  # fmt: skip

    def verify(
        self,
        truth: Any,
        *,
        error: ErrorLike = None,
        dims: str | list[str] | None = None,
        quality: QualityControl | None = None,
        lapse_rate: float | Mapping[str, float] | None = None,
        window: Any = None,
        representativeness: float | Mapping[str, float] | None = None,
        operators: Mapping[str, AnyOperator] | None = None,
    ) -> xr.Dataset:
        """Return scores of this ensemble against a truth or observations; see `xgenda.verify`."""
        from xgenda.verification import verify

        return verify(
            self._obj, truth, error=error, dims=dims, quality=quality, lapse_rate=lapse_rate, window=window,
            representativeness=representativeness, operators=operators,
        )  # fmt: skip

"""`gaussian_prior`: a zero-training prior in closed form, from a sample or from a covariance function."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from xgenda import metadata, states
from xgenda.curvilinear import AnyGrid, spacing_far_above
from xgenda.diffusion.anchors import LowRank
from xgenda.diffusion.covariances import (
    DENSE_LIMIT,
    KERNELS,
    Covariance,
    KernelCovariance,
    LocalisedSample,
    SphereKernel,
)
from xgenda.diffusion.denoisers import GaussianDenoiser
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.hybrids import HybridSample, hybrid_modes
from xgenda.diffusion.kriging import ExtendedKernel
from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import OptionError, StateError, check_choice, check_count, did_you_mean
from xgenda.formatting import user_level
from xgenda.models.checkpoints import content_hash
from xgenda.models.fitting import candidates, fit_sample, fit_standardised, kernel_on, memory_length, outside, read_sample, search
from xgenda.models.generative import GenerativeModel, PointEvidence, Request, SamplingOptions
from xgenda.models.places import Places
from xgenda.models.spec import ModelSpec, VariableSpec
from xgenda.scaling import CYCLES, cycle_basis
from xgenda.states import State

SAMPLE_KINDS = ("hybrid", "localized", "eof")


class GaussianModel(GenerativeModel):
    """A Gaussian prior: exact posterior members, mean and variance, and the exact denoiser.

    Use `gaussian_prior` to make one.

    Parameters
    ----------
    spec
        ``options['covariance']`` names the kind; the scaling, where there is one, standardises with one standard deviation per
        variable.
    arrays
        'anomalies' (hybrid, localized), 'factor' and 'residual' (eof), in standardised units; nothing for a covariance function.
    """

    closed_form = True

    def __init__(self, spec: ModelSpec, arrays: Mapping[str, Tensor]) -> None:
        self.spec, self.arrays = spec, {k: v for k, v in arrays.items() if k != "valid"}
        self.valid = None if "valid" not in arrays else arrays["valid"].bool().numpy()
        self._covariances: dict[tuple[bytes, bytes], Covariance] = {}
        self.sha256 = content_hash(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the factorisations behind: a worker makes its own."""
        return {**self.__dict__, "_covariances": {}}

    def covariance(self, grid: AnyGrid | None = None) -> Covariance:
        """Return the covariance of the state on `grid` (by default the model's own), in standardised units."""
        grid = grid or self.spec.grid
        if grid is None:
            raise OptionError("This prior fits any grid; say which: model.covariance(grid)")
        key = (type(grid).__name__.encode() + grid.latitude.tobytes(), grid.longitude.tobytes())
        if key not in self._covariances:
            self._covariances = {key: self._build(grid)}
        return self._covariances[key]

    def _build(self, grid: AnyGrid) -> Covariance:
        options = self.spec.options
        kind = options["covariance"]
        if kind == "eof":
            return LowRank(self.arrays["factor"], self.arrays["residual"])
        if kind == "localized":
            return LocalisedSample(
                self.arrays["anomalies"], kernel_on(grid, "gaspari-cohn", options["radius"]), options["inflation"]
            )
        if kind == "hybrid":
            kernel = kernel_on(grid, options["kernel"], options["length"])
            taper = kernel_on(grid, "gaspari-cohn", options["radius"]) if "radius" in options else None
            return HybridSample(self.arrays["anomalies"], kernel, options["weight"], options["inflation"], taper)
        names = [v.name for v in self.spec.variables]
        kernels = [kernel_on(grid, kind, options["length_scale"][n]) for n in names]
        std = torch.tensor([options["std"][n] for n in names], dtype=torch.float64)
        return KernelCovariance(
            kernels, std[:, None].expand(-1, grid.size), _between_levels(names, options.get("vertical_scale"))
        )

    def _with_places(self, grid: AnyGrid, places: Places | None) -> Covariance:
        """Return the covariance of the state on the cells and, after those of each channel, at scattered places."""
        own = self.covariance(grid)
        if places is None or not len(places.latitude):
            return own
        assert isinstance(own, KernelCovariance)
        made: dict[tuple[str, float], ExtendedKernel] = {}
        for k in own.kernels:
            if (k.kind, k.length) not in made:
                made[k.kind, k.length] = ExtendedKernel(k, places.latitude, places.longitude, places.observed)
        kernels: list[SphereKernel] = [made[k.kind, k.length] for k in own.kernels]
        return KernelCovariance(kernels, own.std[:, :1].expand(-1, kernels[0].size), own.between)

    def denoiser(self, grid: AnyGrid | None = None) -> GaussianDenoiser:
        """Return the exact denoiser of the standardised anomaly, N(0, S), for use in the diffusion machinery."""
        covariance = self.covariance(grid)
        low_rank: LowRank
        if isinstance(covariance, HybridSample) and covariance.size > DENSE_LIMIT:
            low_rank = hybrid_modes(covariance)
        else:
            low_rank = LowRank.of(covariance)
        return GaussianDenoiser(torch.zeros(low_rank.size), low_rank)

    def plan(self, asked: SamplingOptions, *, linear: bool = True) -> SamplingOptions:
        """Accept 'auto' and 'exact' only: the posterior is drawn in closed form."""
        if not linear:
            raise OptionError(
                f"model={self.spec.name!r} is Gaussian and solved in closed form, which operators that are not linear do not have; use a "
                f"diffusion model, for example xgenda.train(ds)."
            )
        check_choice("guidance", asked.guidance, ("auto", "exact"))
        check_choice("sampler", asked.sampler, ("auto", "exact"))
        asked.refuse_all_but(("guidance", "sampler"), "a Gaussian prior is solved in closed form")
        return SamplingOptions("exact", "exact", 0, 0, "none")

    def prior_moments(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation in physical units."""
        mean, std = self._mean(request), self._std(request.grid)
        deviation = self.covariance(request.grid).diagonal().sqrt().reshape(self.spec.channels, -1) * std
        return mean, deviation.expand_as(mean)

    def _mean(self, request: Request) -> Tensor:
        if self.spec.needs_background or request.climatology is None:
            return request.fields
        return request.climatology

    def _std(self, grid: AnyGrid) -> Tensor:
        scaling = self.spec.scaling
        if scaling is None:
            return torch.ones(self.spec.channels, grid.size, dtype=torch.float64)
        return torch.as_tensor(scaling.std).double().expand(self.spec.channels, *grid.plane).flatten(1)

    def posterior(self, request: Request) -> Tensor:
        """Draw exact members; times with the same network share one factorisation."""
        out: dict[int, Tensor] = {}
        for times in _same_network(request.evidence):
            covariance, means, std, places = self._around(request, times)
            solver = self._condition(covariance, request.evidence[times[0]], std)
            for t, mean in zip(times, means, strict=True):
                noise = NoiseStream([(request.seed, request.labels[t], m) for m in request.members])
                if solver is None:
                    z = covariance.draw(noise)
                else:
                    value = request.evidence[t].value.double() - _observe(request.evidence[t], mean)
                    z = solver.draw(torch.zeros(covariance.size, dtype=torch.float64), value, noise)
                members = (mean + std * z).reshape(len(request.members), self.spec.channels, -1)
                out[t] = members if places is None else places.picked(members, request.grid.size)
                request.advance(1)
        return torch.stack([out[t] for t in range(len(out))])

    def _around(self, request: Request, times: list[int]) -> tuple[Covariance, Tensor, Tensor, Places | None]:
        """Return covariance, prior means of each time and standard deviations of the state at times of one network, and its places."""
        places = request.evidence[times[0]].places
        mean, std = self._mean(request)[times], self._std(request.grid)
        if places is not None:
            mean, std = places.extend(mean), places.extend(std)
        return self._with_places(request.grid, places), mean.flatten(1), std.flatten(), places

    def moments(self, request: Request, *, spread: bool = True) -> tuple[Tensor, Tensor]:
        """Return posterior mean and standard deviation in closed form, each shape (t, channels, cells); zero without `spread`."""
        found: dict[int, Tensor] = {}
        for times in _same_network(request.evidence):
            covariance, means, std, places = self._around(request, times)
            solver = self._condition(covariance, request.evidence[times[0]], std)
            deviation = torch.zeros_like(std)
            if spread:
                deviation = std * (covariance.diagonal() if solver is None else solver.variance()).clamp(min=0).sqrt()
            for t, prior in zip(times, means, strict=True):
                mean = prior
                if solver is not None:
                    value = request.evidence[t].value.double() - _observe(request.evidence[t], prior)
                    mean = prior + std * solver.mean(torch.zeros(covariance.size, dtype=torch.float64), value)
                both = torch.stack([mean, deviation]).reshape(2, self.spec.channels, -1)
                found[t] = both if places is None else places.picked(both, request.grid.size)
        both = torch.stack([found[t] for t in range(len(found))], 1)
        return both[0], both[1]

    @staticmethod
    def _condition(covariance: Covariance, evidence: PointEvidence, std: Tensor) -> GaussianPosterior | None:
        if len(evidence.value) == 0:
            return None
        weights = evidence.weights.double() * std[evidence.indices]
        return GaussianPosterior(covariance, evidence.indices, weights, evidence.variance)

    def tensors(self) -> dict[str, Tensor]:
        """Return the arrays in single precision."""
        masked = {} if self.valid is None else {"valid": torch.as_tensor(self.valid, dtype=torch.uint8)}
        return {k: v.float() for k, v in self.arrays.items()} | masked

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: dict[str, Tensor]) -> GaussianModel:
        """Rebuild the model from stored tensors."""
        kind, names = spec.options["covariance"], [v.name for v in spec.variables]
        expected = {"eof": {"factor", "residual"}, "localized": {"anomalies"}, "hybrid": {"anomalies"}}.get(kind, set())
        if kind not in (*SAMPLE_KINDS, *KERNELS):
            raise KeyError(f"covariance {kind!r} is not known")
        if kind in KERNELS and not all(set(spec.options[k]) == set(names) for k in ("std", "length_scale")):
            raise KeyError("std and length_scale do not cover the variables")
        if kind == "hybrid" and not {"kernel", "length", "weight", "inflation"} <= set(spec.options):
            raise KeyError("a hybrid needs kernel, length, weight and inflation")
        if set(tensors) - {"valid"} != expected:
            raise KeyError(f"expected tensors {sorted(expected)}, found {sorted(tensors)}")
        return cls(spec, {k: v.double() for k, v in tensors.items()})


def _observe(evidence: PointEvidence, state: Tensor) -> Tensor:
    return (state[evidence.indices] * evidence.weights).sum(-1)


def _same_network(evidence: Any) -> list[list[int]]:
    """Group the times whose observations have the same places and errors."""
    groups: dict[bytes, list[int]] = {}
    for t, e in enumerate(evidence):
        key = b"".join(x.numpy().tobytes() for x in (e.indices, e.weights, e.variance)) + (
            b"" if e.places is None else e.places.key
        )
        groups.setdefault(key, []).append(t)
    return list(groups.values())


def gaussian_prior(
    ds: xr.Dataset | xr.DataArray,
    *,
    length_scale: float | Mapping[str, float] | None = None,
    std: float | Mapping[str, float] | None = None,
    vertical_scale: float | None = None,
    covariance: str | None = None,
    radius: float | None = None,
    rank: int | None = None,
    inflation: float | None = None,
    climatology: str = "auto",
    mean: Literal["sample", "background"] = "sample",
    folds: int = 5,
    representation: Literal["grid", "points"] = "grid",
) -> GaussianModel:
    """Make a Gaussian prior that needs no training.

    With `length_scale` and `std` it is a covariance function around the background that is later given to `assimilate`. Without
    them the covariance is that of the sample in `ds`, along ``member`` (an ensemble) or ``time`` (a history): the sample
    covariance under a Gaspari-Cohn taper ('localized'), a blend of that with a function of distance ('hybrid'), or its leading EOFs plus an
    uncorrelated residual ('eof').

    Parameters
    ----------
    ds
        The background (any Dataset of the variables to analyse), or the sample. Read into memory when it is the sample.
    length_scale
        Length of the covariance function in metres, for all variables or per variable.
    std
        Its standard deviation in the units of the variable: the error of the background.
    vertical_scale
        With `length_scale`, for variables on levels: levels of one variable are correlated as exp(-d / vertical_scale), with d their
        difference in the logarithm of pressure, or in metres of height or depth. None: not at all.
    covariance
        'exponential' (default with `length_scale`; great-circle distance), 'matern32', 'matern52' or 'gaussian' (chordal
        distance, without which they are not valid on a sphere); or 'hybrid', 'localized' or 'eof' for a sample. None chooses between
        the last three by cross-validation.
    radius
        Distance in metres at which the taper reaches zero. None: by cross-validation.
    rank
        Number of EOFs. None: by cross-validation.
    inflation
        Factor on the covariance. None: by cross-validation, because a sample that is also scored in sample is overconfident.
    climatology
        Part of the cycle to remove from a history before its covariance is taken: 'none', 'dayofyear', 'hour',
        'dayofyear+hour'; or 'auto', what describes withheld blocks of times best.
    mean
        Prior mean for a sample: that of the 'sample' (its climatology), or the 'background' given to `assimilate`.
    folds
        Blocks of consecutive times (or members) of the cross-validation.
    representation
        With `length_scale`: what a field is between the cells. 'grid': interpolated from them, so that observations see
        smoothed values. 'points': a function with the same covariance, evaluated at the place of each observation, however dense they are.

    Returns
    -------
    GaussianModel
        Ready for ``ds.genda.assimilate(obs, model=...)``.

    Cells that are NaN in all of `ds` (for a covariance function: at its first time, which is read) are masked, such as land in an ocean: NaN
    in the analysis, and unknown to observations.

    Raises
    ------
    OptionError
        If only one of `length_scale` and `std` is given, or options of the two routes are mixed.
    StateError
        If the sample is too small or holds NaN.

    Notes
    -----
    Each fold is withheld as a block; the Gaussian of the rest is conditioned on some cells of a withheld field, with a small
    error, and predicts others. The mean logarithmic score of those predictions chooses. Blocks of consecutive times,
    without the neighbours that resemble them, make the choice honest for autocorrelated and trending data.

    References
    ----------
    Gaspari, G. and Cohn, S. E. (1999), Construction of correlation functions in two and three dimensions, Q. J. R. Meteorol.
    Soc. 125, 723-757, eq. 4.10.

    Examples
    --------
    >>> import xgenda
    >>> background = xgenda.tutorial.open_dataset("europe-t2m-forecast")
    >>> prior = xgenda.gaussian_prior(background, length_scale=300e3, std=2.0)
    >>> prior.spec.kind
    'gaussian'
    """
    ds = metadata.as_dataset(ds)
    state = states.enter(ds)
    names = metadata.data_variables(state.ds, state.layout)
    if not names:
        raise OptionError(f"ds has no variable on the dimensions {' and '.join(map(repr, state.layout.dims))}.")
    variables = tuple(VariableSpec(n, **states.described(state.ds, n)) for n in names)
    check_choice("covariance", covariance or "localized", (*SAMPLE_KINDS, *KERNELS))
    check_choice("representation", representation, ("grid", "points"))
    if length_scale is not None or std is not None or covariance in KERNELS:
        stray = [k for k, v in {"radius": radius, "rank": rank, "inflation": inflation}.items() if v is not None]
        if stray or covariance in SAMPLE_KINDS or mean != "sample" or climatology not in ("auto", "none"):
            raise OptionError(
                f"{stray[0] if stray else 'covariance=' + repr(covariance)} belongs to a prior from a sample; leave out "
                f"length_scale and std for that, or leave it out for a covariance function."
            )
        return _from_function(
            state, names, variables, covariance or "exponential", length_scale, std, vertical_scale, representation
        )
    if representation == "points":
        raise OptionError(
            "representation='points' needs a covariance between cells, which a sample does not have; give a covariance function: "
            "gaussian_prior(ds, length_scale=300e3, std=2.0, representation='points')"
        )
    if vertical_scale is not None:
        raise OptionError("vertical_scale belongs to a covariance function; give length_scale and std too, or leave it out.")
    check_choice("mean", mean, ("sample", "background"))
    check_choice("climatology", climatology, ("auto", *CYCLES))
    check_count("folds", folds, 2)
    if rank is not None:
        check_count("rank", rank)
        if covariance == "localized":
            raise OptionError("rank belongs to covariance='eof'; for 'localized' give radius, or leave both out.")
        covariance = "eof"
    if radius is not None:
        _positive("radius", radius)
        if covariance == "eof":
            raise OptionError("radius belongs to covariance='localized'; for 'eof' give rank, or leave both out.")
        covariance = "localized"
    if inflation is not None:
        _positive("inflation", inflation)
    return _from_sample(state, names, variables, covariance, radius, rank, inflation, climatology, mean, folds)


def _positive(argument: str, value: Any, where: str = "") -> None:
    try:
        positive = bool(np.isfinite(float(value)) and float(value) > 0)
    except (TypeError, ValueError):
        positive = False
    if not positive:
        raise OptionError(f"{argument}={value!r}{where} is not accepted; it must be a positive number.")


def _per_variable(argument: str, value: Any, names: list[str]) -> dict[str, float]:
    if value is None:
        raise OptionError(
            f"{argument} is missing: a covariance function needs length_scale in metres and std in the units of the variable, "
            f"for example gaussian_prior(ds, length_scale=300e3, std=2.0)."
        )
    given = dict.fromkeys(names, value) if not isinstance(value, Mapping) else dict(value)
    for n in names:  # one value for all levels of a variable
        variable = states.parse_channel(n)[0]
        if n not in given and variable in given:
            given[n] = given[variable]
    given = {n: v for n, v in given.items() if n not in {states.parse_channel(m)[0] for m in names} - set(names)}
    for n in given:
        if n not in names:
            known = list(dict.fromkeys(states.parse_channel(m)[0] for m in names))
            raise OptionError(
                f"{argument} names {n!r}, which ds does not have; it has {', '.join(known)}.{did_you_mean(n, known)}"
            )
    for n in names:
        if n not in given:
            raise OptionError(f"{argument} has no entry for {n!r}; add one: {argument}={{..., {n!r}: ...}}")
        _positive(argument, given[n], f" for {n!r}")
    return {n: float(given[n]) for n in names}


def _from_function(
    state: State,
    names: list[str],
    variables: tuple[VariableSpec, ...],
    kind: str,
    length_scale: float | Mapping[str, float] | None,
    std: float | Mapping[str, float] | None,
    vertical_scale: float | None,
    representation: str = "grid",
) -> GaussianModel:
    lengths, deviations = _per_variable("length_scale", length_scale, names), _per_variable("std", std, names)
    options: dict[str, Any] = {"covariance": kind, "length_scale": lengths, "std": deviations}
    if representation == "points":
        options["representation"] = "points"
    if vertical_scale is not None:
        _positive("vertical_scale", vertical_scale)
        if not any(levels for _, _, levels, _ in states.columns(names)):
            raise OptionError(f"vertical_scale={vertical_scale!r} has no effect: no variable of ds has levels. Leave it out.")
        for variable, at, _, _ in states.columns(names):
            if len({lengths[names[i]] for i in at}) > 1:
                raise OptionError(
                    f"length_scale differs between the levels of {variable!r}, and vertical_scale needs one for all: "
                    f"length_scale={{{variable!r}: {lengths[names[at[0]]]:g}}}"
                )
        options["vertical_scale"] = float(vertical_scale)
    shown = ", ".join(
        f"{variable}: {lengths[names[at[0]]] / 1e3:g} km, {_range([deviations[names[i]] for i in at])} {variables[at[0]].units or ''}".rstrip()
        for variable, at, _, _ in states.columns(names)
    ) + (f"; between levels {vertical_scale:g}" if vertical_scale is not None else "")  # fmt: skip
    for variable, length in lengths.items():
        if spacing := spacing_far_above(state.grid, length):
            warnings.warn(
                f"length_scale={length:g} for {variable!r} is in metres, and the cells of ds are about {spacing / 1e3:.3g} km apart: no cell "
                f"knows of another. Kilometres? length_scale={1e3 * length:g}",
                stacklevel=user_level(),
            )
    # what is NaN in the background is masked: land in an ocean
    metadata.check_dims(state.ds, names, state.layout)
    first = {d: 0 for d in state.ds.dims if d not in state.layout.dims}
    fields = [state.ds[n].isel(first, missing_dims="ignore").transpose(*state.layout.dims).values for n in names]
    valid = np.stack([state.orientation.to_model(~np.isnan(np.asarray(f, dtype=float))) for f in fields])
    if not valid.any((1, 2)).all():
        empty = names[int(np.flatnonzero(~valid.any((1, 2)))[0])]
        raise StateError(f"ds[{empty!r}] is NaN everywhere; there is no background to analyse. Drop it: ds.drop_vars({empty!r})")
    return GaussianModel(
        ModelSpec(
            f"gaussian-{kind}", "prior", "gaussian", variables, None if valid.all() else state.grid, needs_background=True, options=options,
            licence="none", training={"covariance": f"{kind} ({shown})"}, description="Covariance function around the background",
        ),
        {} if valid.all() else {"valid": torch.as_tensor(valid)},
    )  # fmt: skip


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _between_levels(names: list[str], scale: float | None) -> Tensor | None:
    """Return the correlation between channels, exp(-d / scale) with d the distance of two levels of one variable, in ln p or metres."""
    if scale is None:
        return None
    out = torch.eye(len(names), dtype=torch.float64)
    for _, at, levels, kind in states.columns(names):
        if levels:
            place = torch.tensor(levels, dtype=torch.float64)
            place = place.log() if kind == "pressure" else place
            index = torch.tensor(at)
            out[index[:, None], index] = torch.exp(-(place[:, None] - place).abs() / scale)
    return out


def _from_sample(
    state: State,
    names: list[str],
    variables: tuple[VariableSpec, ...],
    covariance: str | None,
    radius: float | None,
    rank: int | None,
    inflation: float | None,
    climatology: str,
    mean: str,
    folds: int,
) -> GaussianModel:
    grid = state.grid
    metadata.check_dims(state.ds, names, state.layout)
    sample_dim, values, time, valid = read_sample(state, names)
    if len(values) < 2 * folds:
        raise StateError(
            f"ds has {len(values)} fields along {sample_dim!r}; a sample covariance with {folds}-fold cross-validation needs at "
            f"least {2 * folds}. Give more, or use a covariance function: gaussian_prior(ds, length_scale=300e3, std=2.0)"
        )
    # several runs may have the same times, in any order: neighbours in time, not in storage, tell of each other
    place = np.arange(len(values)) if time is None else np.unique(time.values, return_inverse=True)[1].ravel()
    if place.max() + 1 < 2 * folds:
        place = np.arange(len(values))
    fold = place * folds // (int(place.max()) + 1)
    scaling, z = fit_standardised(values, time, names, fold, climatology, valid=valid)
    if rank is not None and rank >= len(values):
        raise OptionError(
            f"rank={rank} is not below the {len(values)} fields of the sample; leave it out to choose by cross-validation."
        )
    kinds = SAMPLE_KINDS if covariance is None else (covariance,)
    choices = list(candidates(kinds, grid, z.shape, radius, rank, inflation))
    best, tried = choices[0], 1
    if len(choices) > 1:
        first = np.unique(place, return_index=True)[1]
        gap = memory_length(z[first], fold[first])
        away = np.stack([outside(fold, k, gap, place) for k in range(folds)])
        best, scores = search(z, grid, choices, fold, valid, cycle_basis(time, scaling.cycle, len(z)), away)
        tried = len(scores)
    options, arrays = fit_sample(z, best)
    training = {
        "sample": f"{len(values)} fields along {sample_dim}",
        "covariance": best.describe(),
        "climatology": scaling.cycle,
        "cross_validation": f"best of {tried} by log score over {folds} blocks" if tried > 1 else "none: all options given",
    }
    spec = ModelSpec(
        f"gaussian-{best.kind}", "prior", "gaussian", variables, grid, scaling, None, mean == "background", options, training,
        licence="that of the sample", description="Covariance of a sample",
    )  # fmt: skip
    return GaussianModel(spec, arrays if valid is None else arrays | {"valid": torch.as_tensor(valid)})

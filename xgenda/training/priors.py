"""Training of diffusion priors, from scratch or from an existing one."""

from __future__ import annotations

import dataclasses
import datetime
import numbers
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr

from xgenda import metadata
from xgenda.curvilinear import AnyGrid
from xgenda.diffusion.anchors import Anchor, Separable
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.errors import OptionError, StateError, UnitsError
from xgenda.formatting import duration
from xgenda.models.colouring import noise_on
from xgenda.models.diffusive import SIGMA_MIN, DiffusionModel, Network, build_network, highest_sigma, in_tiles
from xgenda.models.fitting import standardise
from xgenda.models.generative import GenerativeModel
from xgenda.models.loading import load_model
from xgenda.models.spec import ModelSpec, VariableSpec
from xgenda.networks.mesh import MeshNet
from xgenda.networks.songunet import SongUNet
from xgenda.networks.unet import UNet
from xgenda.scaling import Scaling
from xgenda.training.anchoring import correlation_in_time, fit_anchors
from xgenda.training.architectures import (
    WIDTHS,
    around_the_sphere,
    check_architecture,
    mesh_arguments,
    operator_arguments,
    suitable_width,
)
from xgenda.training.corpus import Corpus
from xgenda.training.crops import Tile, automatic_tile, check_wraps, inherited_tile, network_periodic, saves_reading, tile_options
from xgenda.training.defaults import warn_of_little
from xgenda.training.fields import Fields
from xgenda.training.objectives import Denoising
from xgenda.training.optimiser import Optimiser
from xgenda.training.scoring import Comparison, beside_gaussian
from xgenda.training.statistics import has_seen, some_marks
from xgenda.training.transfer import (
    add_adapters,
    continued_anchor,
    freeze_backbone,
    kept_arguments,
    matched,
    position_on,
    thawed,
    transfer,
)
from xgenda.training.weighting import loss_weights
from xgenda.training.windows import FOLDS, HELD, Samples, blocks, evenly_spaced, split_rows, window_rows

FEW_STEPS = 20  # which nothing is learnt in
SCORED, OBSERVED = 4, 64  # states and places of the scores in training, which are to take seconds
LARGEST_SCORED = 200_000  # cells of a state, above which ensembles are not scored in training


@dataclass(frozen=True)
class PriorRecipe:
    """How to build a prior; see `xgenda.train`."""

    climatology: str
    transform: str | Mapping[str, str]
    offset: float | Mapping[str, float]
    bounds: Mapping[str, Sequence[float | None]] | None
    anchor: str | None
    window: int
    periodic: Any
    width: int | None
    validation: Any = None
    freeze: str = "none"
    adapters: int | None = None
    augment: str = "auto"
    architecture: str = "unet"
    network_options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | Mapping[str, float] = "auto"
    tile: Tile | str | None = None
    noise: Mapping[str, Any] = field(default_factory=dict)
    resolutions: tuple[int, ...] = (1,)


@dataclass(frozen=True, eq=False)
class Gaussians:
    """A scaling, and the Gaussians of states in it: of all samples, and without each block; and what the fields are worth."""

    scaling: Scaling
    final: Anchor
    crossed: list[Anchor]
    note: str
    independent: float = 0.0


def train_prior(
    corpus: Corpus,
    recipe: PriorRecipe,
    start: GenerativeModel | str | os.PathLike[str] | None,
    optimiser: Optimiser,
    name: str | None,
    licence: str,
) -> DiffusionModel:
    """Train an unconditional prior of one state, or of a window of states."""
    before = None if start is None else _starting(start)
    if before is not None:
        if corpus.source is None:
            recipe = _in_terms_of(recipe, corpus.samples.variables, before)
        recipe, corpus = _continued(recipe, before, corpus.samples.grid), _in_units_of(corpus, before)
        _check_transforms(corpus, before)
    samples = corpus.samples
    counts = loss_weights(recipe.weights, samples.variables, samples.grid, samples.valid, recipe.window)
    every = blocks(corpus.time, corpus.size, FOLDS, recipe.validation)
    windows, fold, spacing = window_rows(corpus.time, every, recipe.window)  # before the fit of the anchors, which takes long
    if before is not None and spacing is not None:
        _check_spacing(before, spacing)
    channels, feeds_state = len(samples.variables) * recipe.window, recipe.anchor is not None
    plane = samples.grid.plane
    noise = noise_on(recipe.noise, plane)
    tile = None if isinstance(recipe.tile, str) or recipe.tile == plane else recipe.tile

    def arguments(width: int, tile: Tile | None) -> dict[str, Any]:
        periodic = network_periodic(tile, recipe.periodic, plane, samples.grid.periodic)
        found = network_arguments(
            channels, channels if feeds_state else 0, width, samples, periodic, recipe.architecture, recipe.network_options
        )
        return found if before is None else kept_arguments(found, before.spec.options["network"])

    options = arguments(recipe.width or WIDTHS[recipe.architecture], tile)  # refuses before the fit, too
    fitted = _fitted(corpus, every[corpus.rows], recipe, optimiser.progress)
    kept = None if before is None else _kept_gaussians(before, samples, recipe)
    # a Gaussian of these very fields would look better than any that is fitted to others, and so would what is scored on it
    if kept is not None and before is not None and has_seen(before.spec, samples.values, fitted.scaling):
        kept = None
    if kept is not None and _fits_better(kept, fitted, samples, every[corpus.rows]):
        fitted = kept
    z = corpus.anomalies(fitted.scaling)
    gap = corpus.gap(z)
    final, crossed, note = fitted.final, fitted.crossed, fitted.note
    rows, held = _split(windows, every, fold, corpus.time, gap)
    if recipe.tile == "auto":
        tile = automatic_tile(z, plane, recipe.periodic, samples.grid.periodic)
    if before is None and recipe.width is None:
        width = suitable_width(
            recipe.architecture, optimiser.planned(len(rows)), fitted.independent * _values(samples),
            lambda width: _parameters(arguments(width, tile)),
        )  # fmt: skip
        options = arguments(width, tile)
    elif recipe.tile == "auto":
        options = arguments(recipe.width or WIDTHS[recipe.architecture], tile)
    network = build_network(options)
    transferred: dict[str, Any] = {}
    if before is not None:
        transferred = _transferred(network, before, samples, recipe, feeds_state)
        if recipe.freeze == "backbone":
            freeze_backbone(network)
        if recipe.adapters is not None:
            add_adapters(network, recipe.adapters, optimiser.seed)
    shifts, crop = _shifts(recipe, samples), None
    # a Gaussian, shifts around the grid and parts across its seam need the whole field
    if tile is not None and corpus.source is not None and not (feeds_state or any(shifts) or samples.grid.periodic):
        crop = tile if saves_reading(corpus.source, tile, recipe.window) else None
    fields = corpus.fields(fitted.scaling, z, windows, crop)
    sigma_max = highest_sigma(final) if noise is None else max(80.0, noise.highest_sigma(_spectrum(z, noise.shape)))
    objective = Denoising(
        fields, torch.as_tensor(fold), crossed if feeds_state else None, SIGMA_MIN, sigma_max, feeds_state=feeds_state,
        shifts=shifts, tile=tile, weights=counts, wraps=samples.grid.periodic, noise=noise, resolutions=recipe.resolutions,
        whitens=recipe.noise.get("norm") == "cameron-martin",
    )  # fmt: skip
    compared = feeds_state and recipe.window == 1 and crossed[HELD].size <= LARGEST_SCORED

    extra = tile_options(tile, int(getattr(network, "stride", 1)))

    def compare(net: torch.nn.Module, count: int = SCORED) -> Comparison:
        net = in_tiles(net, samples.grid, extra, optimiser.batch_size)
        return _comparison(net, fields, held, crossed[HELD], fitted.scaling, samples, count)

    score = (lambda net: _scores(compare(net), samples.variables)) if compared else None
    report = optimiser.fit(network, objective, rows, held, 1.0, "prior", score, corpus.labels if recipe.window == 1 else None)
    thawed(network)
    report["card"] = _card(recipe.anchor, report)
    if compared and report["correction_weight"]:
        final_comparison = compare(network, 3 * SCORED)
        report["scores"] = final_comparison.describe(samples.variables)
        if final_comparison.worse:  # the denoising got better, and the ensembles did not
            network.scale_output(0.0)
            report |= {"correction_weight": 0.0, "validation_best": report["validation_without"]}
            report["card"] = (
                "the learned correction did not make posterior ensembles better: its weight is zero, and this is the Gaussian"
            )
    record = {
        "anchor": note if feeds_state else "none",
        "guidance_covariance": note,
        "marks": some_marks(samples.values),
        **transferred,
    }
    if tile is not None:
        record["crops"] = f"{tile[0]} x {tile[1]} of {plane[0]} x {plane[1]} cells"
    if len(recipe.resolutions) > 1:
        record["resolutions"] = ", ".join(f"{plane[0] // f} x {plane[1] // f}" for f in recipe.resolutions) + " cells"
    extra |= {} if spacing is None else {"window": recipe.window, "spacing": spacing}
    extra |= {"noise": dict(recipe.noise)} if recipe.noise else {}
    spec = ModelSpec(
        name or (f"{before.spec.name}-tuned" if before is not None else "trained-prior"), "prior", "diffusion", samples.variables,
        samples.grid, fitted.scaling, options={"network": options, "sigma_max": sigma_max, "feeds_state": feeds_state, **extra},
        training=record_of(corpus.size, samples.dimension, corpus.period, optimiser, record, report), licence=licence,
        description="Unconditional diffusion prior" + (" with a Gaussian anchor" if feeds_state else ""),
    )  # fmt: skip
    return DiffusionModel(spec, EDMDenoiser(network, final if feeds_state else None, feeds_state), final, samples.valid)


def _fitted(corpus: Corpus, fold: np.ndarray, recipe: PriorRecipe, progress: bool | None) -> Gaussians:
    """Fit scaling and Gaussians to the samples."""
    samples = corpus.samples
    scaling, z = corpus.standardised(
        fold, recipe.climatology, recipe.transform, recipe.offset, recipe.bounds, recipe.periodic == "both"
    )
    chosen, few = corpus.few()
    verdict = warn_of_little(z[chosen], few, corpus.size)
    kind = recipe.anchor or "auto"  # without one in the denoiser, still for guidance
    if kind == "auto" and recipe.periodic == "both":
        kind = "spectral"
    final, crossed, note = fit_anchors(
        z[chosen], few, fold[chosen], kind, crossed=recipe.anchor is not None, cycle=scaling.cycle, progress=progress
    )
    if recipe.window > 1:
        memory = [correlation_in_time(z, samples, fold, recipe.window, without) for without in (None, *range(len(crossed)))]
        in_time = [Separable(space, m) for space, m in zip([final, *crossed], memory, strict=True)]
        final, crossed = in_time[0], list(in_time[1:])
        note += f", correlation {float(memory[0][1]):.2f} from one time to the next"
    return Gaussians(scaling, final, crossed, note, verdict.independent)


def _values(samples: Samples) -> int:
    """Return how many values a field has, without masked ones."""
    return int(np.prod(samples.values.shape[1:]) if samples.valid is None else samples.valid.sum())


def _parameters(options: Mapping[str, Any]) -> int:
    """Return how many parameters a network has, which is not built."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(options).parameters())


def _spectrum(z: np.ndarray, plane: tuple[int, int]) -> torch.Tensor:
    """Return the variance of each wave of anomalies, the largest of all channels, in the order of a real Fourier transform."""
    fields = torch.as_tensor(z, dtype=torch.float64).reshape(len(z), -1, *plane)
    power = torch.fft.rfft2(fields, norm="forward").abs().square().mean(0)
    out: torch.Tensor = power.amax(0)
    return out


def _split(
    windows: np.ndarray, every: np.ndarray, fold: np.ndarray, time: xr.DataArray | None, gap: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows to train on, none of whose states is near the validation block, and those of that block."""
    near = np.ones(len(every), dtype=bool)
    near[split_rows(every, time, gap)[0].numpy()] = False
    return torch.as_tensor(np.flatnonzero(~near[windows].any(1))), torch.as_tensor(np.flatnonzero(fold == HELD))


def _comparison(
    network: torch.nn.Module, fields: Fields, held: torch.Tensor, anchor: Anchor, scaling: Scaling, samples: Samples, count: int
) -> Comparison:
    """Compare a network with the Gaussian that it corrects, on a few states of the validation block."""
    few = evenly_spaced(held, count)
    states = fields.read(few)
    share = min(0.05, OBSERVED / samples.grid.size)
    return beside_gaussian(
        network, anchor, states, std=scaling.std, valid=samples.valid, most=count, share=share, steps=10,
        device=next(network.parameters()).device,
    )  # fmt: skip


def _scores(found: Comparison, variables: Sequence[VariableSpec]) -> dict[str, float]:
    """Return scores by the name of the variable."""
    out: dict[str, float] = {}
    for v, model, gaussian in zip(variables, found.model.tolist(), found.gaussian.tolist(), strict=True):
        out |= {f"crps_{v.name}": model, f"crps_{v.name}_gaussian": gaussian}
    return out


def _shifts(recipe: PriorRecipe, samples: Samples) -> tuple[int, int]:
    """Return by how many rows and columns a field may be shifted and still be one of the same climate."""
    if recipe.augment == "longitude":
        if not samples.grid.periodic and recipe.periodic is not True:
            raise OptionError(
                f"augment='longitude' shifts fields around the sphere, and the grid is {samples.grid.describe()}; leave it out."
            )
        return 0, 1
    everywhere = int(recipe.periodic == "both" and recipe.augment == "auto")
    return everywhere, everywhere


def _card(anchor: str | None, report: dict[str, Any]) -> str:
    """Say in a sentence what training was worth on the validation block."""
    if anchor is None:
        if not report["correction_weight"]:
            return "the network explained nothing on the validation block, and there is no classical answer to fall back on: train for longer"
        return "plain network; no classical answer to fall back on"
    if not report["correction_weight"] and report["steps"] < FEW_STEPS:
        return (
            f"{report['steps']} steps are too few to learn anything: this is the Gaussian. A time budget includes the fit of the Gaussian; "
            f"give more"
        )
    if not report["correction_weight"]:
        return "the learned correction explained nothing on the validation block: its weight is zero, and this is the Gaussian"
    ratio = report["validation_best"] / report["validation_without"]
    return f"validation loss {ratio:.3f} of the Gaussian's, with the correction at weight {report['correction_weight']:.2f}"


def _starting(start: GenerativeModel | str | os.PathLike[str]) -> DiffusionModel:
    before = start if isinstance(start, GenerativeModel) else load_model(start)
    if not isinstance(before, DiffusionModel):
        raise OptionError(
            f"start={before.spec.name!r} is a {before.spec.kind} model for {before.spec.task!r}; a diffusion prior is needed."
        )
    if not isinstance(before.denoiser.network, (UNet, SongUNet, MeshNet)):
        raise OptionError(
            f"start={before.spec.name!r} has a network that cannot be trained on; leave out start to train from scratch."
        )
    if before.spec.options.get("noise"):
        raise OptionError(
            f"start={before.spec.name!r} has coloured noise, and models of functions are trained from scratch: leave out start, and pass "
            f"noise={dict(before.spec.options['noise'])}"
        )
    return before


def _continued(recipe: PriorRecipe, before: DiffusionModel, grid: AnyGrid) -> PriorRecipe:
    """Return the recipe with what the network of the other model fixes."""
    training = before.spec.training
    note = training.get("guidance_covariance", training.get("anchor", "auto"))
    anchor = continued_anchor(before, before.denoiser.anchor is None, note, recipe.anchor, recipe.width)
    network = before.spec.options["network"]
    periodic, architecture = network.get("periodic"), network.get("architecture", "unet")
    check_architecture(recipe.architecture, architecture, recipe.network_options)
    tile = recipe.tile
    if tile is not None and architecture == "mesh":
        raise OptionError("start has a mesh network, which sees the whole grid; leave out tile.")
    if tile is None and before.spec.grid is not None:
        tile = inherited_tile(before.spec.options.get("tile"), before.spec.grid.plane, grid.plane)
    if isinstance(tile, tuple):
        check_wraps(tile, grid.plane, "both" if periodic == "both" else recipe.periodic, grid.periodic)
    scaling = before.scaling
    names = [v.name for v in before.spec.variables]
    transform, offset = recipe.transform, recipe.offset
    if transform == "none":
        transform = dict(zip(names, scaling.transforms, strict=True))
        offset = dict(zip(names, scaling.offsets, strict=True))
    return dataclasses.replace(
        recipe, anchor=anchor, window=before.window if recipe.window == 1 else recipe.window, transform=transform, offset=offset,
        periodic="both" if periodic == "both" else recipe.periodic, architecture=architecture, tile=tile,
        climatology=scaling.cycle if recipe.climatology in ("none", "auto") else recipe.climatology,
    )  # fmt: skip


def _in_terms_of(recipe: PriorRecipe, variables: Sequence[VariableSpec], before: DiffusionModel) -> PriorRecipe:
    """Return the recipe with options of variables by the names and in the units of the other model."""
    names, units = matched(variables, before.spec.variables), {v.name: v.units for v in before.spec.variables}
    offsets: dict[str, float] = {}
    bounds: dict[str, Sequence[float | None]] | None = None if recipe.bounds is None else {}
    transforms = {}
    for v in variables:
        name = names.get(v.name, v.name)
        wanted = units.get(name)
        factor, shift = metadata.unit_factors(str(v.units), str(wanted)) if v.units and wanted else (1.0, 0.0)
        own = recipe.offset.get(v.name, 1e-3) if isinstance(recipe.offset, Mapping) else recipe.offset
        offsets[name] = own * factor - shift  # log(x + offset), to a constant
        if isinstance(recipe.transform, Mapping):
            transforms[name] = recipe.transform.get(v.name, "none")
        if bounds is not None and recipe.bounds is not None and v.name in recipe.bounds:
            given = recipe.bounds[v.name]
            well = isinstance(given, (tuple, list)) and all(b is None or isinstance(b, numbers.Real) for b in given)
            bounds[name] = [None if b is None else b * factor + shift for b in given] if well else given
    return dataclasses.replace(recipe, transform=transforms or recipe.transform, offset=offsets, bounds=bounds)


def _in_units_of(corpus: Corpus, before: DiffusionModel) -> Corpus:
    """Return the fields in the units, and by the names, of the variables that the other model has too."""
    samples = corpus.samples
    names = matched(samples.variables, before.spec.variables)
    theirs = {v.name: v for v in before.spec.variables}
    values, specs = samples.values.copy(), []
    for c, v in enumerate(samples.variables):
        known = theirs.get(names.get(v.name, ""))
        if known is None:
            specs.append(v)
            continue
        if known.units and not v.units:
            raise UnitsError(
                f"ds[{v.name!r}] has no units, and start={before.spec.name!r} has it in {known.units}. Say which they are: "
                f"ds[{v.name!r}].attrs['units'] = {known.units!r}"
            )
        if v.units and known.units:
            factor, shift = metadata.unit_factors(str(v.units), str(known.units))
            if corpus.source is not None and (factor, shift) != (1.0, 0.0):
                raise OptionError(
                    f"ds[{v.name!r}] is in {v.units} and start={before.spec.name!r} in {known.units}; fields that are streamed must be in the same "
                    f"units. Convert them first, lazily."
                )
            values[:, c] = values[:, c] * factor + shift
        specs.append(known)
    return dataclasses.replace(corpus, samples=dataclasses.replace(samples, values=values, variables=tuple(specs)))


def _check_transforms(corpus: Corpus, before: DiffusionModel) -> None:
    """Refuse statistics of a stream in which variables are not transformed as in the other model."""
    if corpus.statistics is None:
        return
    theirs = {v.name: t for v, t in zip(before.spec.variables, before.scaling.transforms, strict=True)}
    ours = {v.name: t for v, t in zip(corpus.samples.variables, corpus.statistics.transforms, strict=True)}
    wanted = {
        own: theirs[v.name] for own, v in zip(corpus.statistics.names, corpus.samples.variables, strict=True) if v.name in theirs
    }
    if any(theirs.get(name, t) != t for name, t in ours.items()):
        raise OptionError(
            f"start={before.spec.name!r} is of other transforms, and fields that are streamed have to be transformed as those: transform={wanted}"
        )


def _check_spacing(before: DiffusionModel, found: float) -> None:
    spacing = before.spec.options.get("spacing")
    if spacing is None:
        return
    shortest, longest = metadata.equal_steps(spacing)
    if not shortest <= found <= longest:
        raise StateError(
            f"start={before.spec.name!r} is of states {duration(spacing)} apart, and those of ds are {duration(found)} apart. "
            f"Select such times, or leave out start to train from scratch."
        )


def _kept_gaussians(before: DiffusionModel, samples: Samples, recipe: PriorRecipe) -> Gaussians | None:
    """Return scaling and Gaussian of the other model, where they are of the same variables and cells."""
    same = (
        [v.name for v in samples.variables] == [v.name for v in before.spec.variables]
        and before.spec.grid is not None
        and before.spec.grid.same_as(samples.grid)
        and np.array_equal(np.asarray(before.valid), np.asarray(samples.valid))
        and before.window == recipe.window
    )
    if not same or before.covariance is None:
        return None
    note = str(before.spec.training.get("guidance_covariance", "as before"))
    return Gaussians(before.scaling, before.covariance, [before.covariance] * FOLDS, f"that of {before.spec.name!r}: {note}")


def _fits_better(kept: Gaussians, fitted: Gaussians, samples: Samples, fold: np.ndarray) -> bool:
    """Return whether the Gaussian of the other model explains each block better than one fitted to the other blocks.

    By the mean squared error of denoising at a noise of a third of the climatological standard deviation, in transformed units.
    """
    errors = []
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((len(samples.values), samples.values[0].size))
    for g in (kept, fitted):
        z = standardise(g.scaling, samples.values, samples.time)
        std = np.broadcast_to(g.scaling.std, samples.values.shape[1:]).reshape(-1)
        level = 0.3 * np.broadcast_to(kept.scaling.std, samples.values.shape[1:]).reshape(-1)
        sigma = float((level / std).mean())
        total = 0.0
        for k, anchor in enumerate(g.crossed or [g.final] * FOLDS):
            rows = np.flatnonzero(fold == k)
            noisy = torch.as_tensor(z[rows] + sigma * noise[rows])
            space = anchor.space if isinstance(anchor, Separable) else anchor
            left = space.given_noise(sigma).shrink(noisy).numpy() - z[rows]
            total += float(((left * std) ** 2).sum())
        errors.append(total)
    return errors[0] < errors[1]


def _transferred(
    network: Network, before: DiffusionModel, samples: Samples, recipe: PriorRecipe, feeds_state: bool
) -> dict[str, Any]:
    """Give the network the weights of the other model, and return what is to be recorded."""
    own, other = (
        _channels(variables, window)
        for variables, window in ((samples.variables, recipe.window), (before.spec.variables, before.window))
    )
    inputs = (
        own + ([("state", *k) for k in own] if feeds_state else []),
        other + ([("state", *k) for k in other] if before.denoiser.feeds_state else []),
    )
    network_before = before.denoiser.network
    found = transfer(network, network_before, inputs, (own, other), position_on(samples.grid, network_before, before.spec.grid))
    return {"started_from": f"{before.spec.name} ({before.sha256[:12]})", **{f"transfer_{k}": v for k, v in found.items()}}


def _channels(variables: Sequence[VariableSpec], window: int) -> list[tuple[Hashable, ...]]:
    """Return what the channels of windows of states are: time step from the centre, and variable."""
    return [(step - window // 2, v.name) for step in range(window) for v in variables]


def network_arguments(
    channels: int, condition: int, width: int, samples: Samples, periodic: Any = None, architecture: str = "unet",
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of the U-Net, or of a mesh network; on a doubly periodic grid no place differs from another."""
    if architecture == "mesh":
        return mesh_arguments(channels, condition, width, samples.grid, periodic, options)
    if architecture == "uno":
        return operator_arguments(channels, condition, width, samples.grid, periodic, options)
    given, periodic = periodic, samples.grid.periodic if periodic is None else periodic
    ny, nx = samples.grid.plane
    wrapped = (ny, nx) if periodic == "both" else (nx,) if periodic else ()
    # a periodic axis cannot be padded, so it decides how often the grid is halved
    halvings = next(h for h in (2, 1, 0) if all(n % 2**h == 0 for n in wrapped))
    if given is None and (across := around_the_sphere(samples.grid, halvings)) is not None:
        periodic = across
    return {
        "channels": channels, "condition_channels": condition, "width": width, "multipliers": [1, 2, 2][: halvings + 1],
        "position": 0 if periodic == "both" else 2, "shape": list(samples.grid.plane), "periodic": periodic,
    }  # fmt: skip


def record_of(
    size: int, dimension: str, period: str, optimiser: Optimiser, extra: dict[str, Any], report: dict[str, Any]
) -> dict[str, Any]:
    """Return what the model file says of its training."""
    return {
        "samples": f"{size} along {dimension}",
        "period": period,
        **extra,
        **report,
        "validation_ratio": report["validation_best"] / report["validation_without"],
        "batch_size": optimiser.batch_size,
        "learning_rate": optimiser.learning_rate,
        "seed": optimiser.seed,
        "trained_on": datetime.date.today().isoformat(),
        "versions": f"xgenda {metadata.package_version()}, torch {torch.__version__}",
    }

r"""Training of autoencoders: a latent space for `assimilate`.

The loss of a state x with N cells is twice the negative evidence lower bound (Kingma and Welling 2014, arXiv 1312.6114, eq. 3) per cell,

    1/N sum_i m_i w_i ((x_i - g_i(z))^2 / s^2 + log s^2) + 2 beta / N KL(q(z | x), N(0, I)),    z ~ q(z | x),

with one variance s^2 per variable that is learned (Rybkin et al. 2021, arXiv 2006.13202, section 3), so that beta = 1 needs no tuning; m is 0 where
nothing was observed, and w weighs cells. A decoder that explains nothing has a loss of 1. Without the second term and s this is a plain
autoencoder, whose latent vectors are standardised in the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from xgenda.diffusion.covariances import DENSE_LIMIT
from xgenda.errors import OptionError, StateError
from xgenda.grids import EARTH_RADIUS, Grid
from xgenda.models.fitting import HYBRID_KERNELS, correlation_at
from xgenda.models.latents import LatentModel, build_autoencoder
from xgenda.models.spec import ModelSpec
from xgenda.networks.autoencoder import suitable_levels
from xgenda.scaling import Scaling, check_named
from xgenda.training.corpus import Corpus, open_corpus
from xgenda.training.defaults import warn_of_little
from xgenda.training.fields import Fields
from xgenda.training.latent_priors import check_same_fields, positive, with_learned_prior
from xgenda.training.objectives import Batch, Draws
from xgenda.training.optimiser import Optimiser
from xgenda.training.priors import record_of
from xgenda.training.sources import Samples, Source, open_source
from xgenda.training.surveys import Survey, look
from xgenda.training.weighting import loss_weights
from xgenda.training.windows import FOLDS, blocks, evenly_spaced, split_rows, window_rows

LENGTHS = (8, 16, 32, 64, 100)  # of the latent vector that are tried
LARGEST_LINEAR = 2**24  # numbers in each of the linear maps
LARGEST_HELD = 2**26  # numbers of withheld states that the error of the decoder is fitted to
PLACES, SCALES = 120, 10  # cells, and length scales, by which the decoder's error is described
INFLATIONS = (0.7, 1.0, 1.4, 2.0, 2.8)  # of the variances of principal components, which are tried
OWN = 10.0  # states that the error of a cell is worth before any was seen, which it then shares with the others
REPEATS = 4  # draws of the latent vector for each withheld state
JITTER = 1e-6
SHARE = 0.7  # of the effort, where a prior of the latent vectors is to be learned as well


@dataclass(frozen=True)
class AutoencoderRecipe:
    """How to build an autoencoder; see `xgenda.train`."""

    latent: int | None
    variational: bool
    beta: float
    climatology: str
    transform: str | Mapping[str, str]
    offset: float | Mapping[str, float]
    bounds: Mapping[str, Sequence[float | None]] | None
    linear: bool
    periodic: Any
    width: int | None
    validation: Any = None
    weights: str | Mapping[str, float] = "auto"
    prior: str = "normal"
    window: int = 1


class Autoencoding:
    """Reconstruction of standardised states, with missing cells.

    Parameters
    ----------
    fields
        Standardised states; what was not observed may have any value.
    latent
        Length of the latent vector.
    weights
        Of the values in the loss, shape (channels, ny, nx); zero at masked cells.
    observed
        Where each state was observed, shape (n, channels, ny, nx), bool; None: everywhere.
    beta
        Weight of the divergence from the latent prior.
    """

    def __init__(self, fields: Fields, latent: int, weights: Tensor, observed: Tensor | None = None, beta: float = 1.0) -> None:
        self.fields, self.latent, self.weights, self.observed, self.beta = fields, latent, weights, observed, beta
        self.tile = None  # all of the grid at once

    def batch(self, rows: Tensor, states: Tensor, draws: Draws) -> Batch:
        """Return some samples: the label is the noise of the latent vector, and the condition tells what was observed."""
        mask = None if self.observed is None else self.observed[rows].to(states)
        x = states if mask is None else states * mask
        return Batch(x, draws.normal([self.latent]), mask, x, weight=self.weights)

    def losses(self, network: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """Return the loss of each sample, shape (n,)."""
        x = batch.x.to(device)
        mean, variance, found, error = (t.float() for t in network(x, batch.label.to(device)))
        weights = self.weights.to(device)
        counts = weights if batch.condition is None else weights * batch.condition.to(device)
        squares = (x - found).square()
        if not getattr(network, "module", network).variational:
            plain: Tensor = (counts * squares).flatten(1).sum(1) / weights.sum()
            return plain
        spread = error[:, None, None]
        fit = (counts * (squares * (-spread).exp() + spread)).flatten(1).sum(1)
        divergence = (mean.square() + variance.exp() - 1 - variance).sum(1)  # twice
        out: Tensor = (fit + self.beta * divergence) / weights.sum()
        return out


@dataclass(frozen=True, eq=False)
class Components:
    """The best linear autoencoder (Tipping and Bishop 1999): orthonormal patterns (k, n), their variances, and that of what is left."""

    patterns: Tensor
    power: Tensor
    left: float

    @classmethod
    def of(cls, z: Tensor, most: int) -> Components:
        """Fit to states (n, size), about zero."""
        n = len(z)
        values, vectors = torch.linalg.eigh(z @ z.T / n)
        count = min(most, int((values > 1e-9 * values[-1]).sum()) - 1)
        power, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        patterns = (vectors.T @ z) / (n * power).sqrt()[:, None]
        cells = int((z != 0).any(0).sum())
        return cls(patterns, power, max(1e-6 * float(values.mean()), float(values.sum() - power.sum()) / max(1, cells - count)))

    def first(self, k: int) -> Components:
        """Return the first k; what the others explain is left."""
        count = max(1.0, float(self.patterns.any(0).sum()) - k)
        left = self.left * max(0.0, count - (len(self.power) - k)) + float(self.power[k:].sum())
        return Components(self.patterns[:k], self.power[:k], left / count)

    def suited(self, withheld: Tensor, inflations: Sequence[float]) -> Components:
        """Return the same patterns with what withheld states (n, size) say of their variances: those of the states of a fit are biased.

        What is left is theirs, and the variances are multiplied by that of `inflations` under which these states are most likely.
        """
        cells = float(self.patterns.any(0).sum())
        outside = withheld.square().sum(1) - (withheld @ self.patterns.T).square().sum(1)
        left = max(self.left, float(outside.mean()) / max(1.0, cells - len(self.power)))
        signal = (self.power - self.left).clamp(min=0.0)
        choices = [Components(self.patterns, left + f * signal, left) for f in inflations]
        return max(choices, key=lambda c: c.likelihood(withheld))

    def likelihood(self, z: Tensor) -> float:
        """Return the mean log-density of states (n, size), up to a constant (eq. 4)."""
        power = self.power.clamp(min=self.left * (1 + 1e-9))
        seen = (z @ self.patterns.T).square().mean(0)
        cells = float(self.patterns.any(0).sum())
        whole = float(z.square().sum(1).mean())
        fit = (whole - float(((1 - self.left / power) * seen).sum())) / self.left
        return -0.5 * (fit + (cells - len(power)) * math.log(self.left) + float(power.log().sum()))

    def maps(self, variational: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return decoder and encoder, both (k, size), and the log-variance of the latent vector (eq. 7 and 8)."""
        power = self.power.clamp(min=self.left * (1 + 1e-6))
        signal = power - self.left if variational else power
        basis = signal.sqrt()[:, None] * self.patterns
        projection = (signal.sqrt() / power)[:, None] * self.patterns
        return basis, projection, (self.left / power).log()


def open_gappy(
    ds: xr.Dataset | xr.DataArray, variables: Sequence[str] | None, memory: float, climatology: str, transform: Any, offset: Any, bounds: Any,
    progress: bool | None,
) -> tuple[Corpus, Tensor | None]:  # fmt: skip
    """Read fields of which cells may be missing at some times, and return where they were observed; None: everywhere.

    Missing cells have the mean of their times. Fields larger than `memory` are streamed, and must be whole.
    """
    source = open_source(ds, variables)
    check_named(transform, offset, bounds, source.names)
    if source.nbytes > memory:
        try:
            return open_corpus(ds, variables, memory, 1, climatology, transform, offset, bounds, progress), None
        except StateError as problem:
            problem.add_note(f"Cells may be missing where all fields are read: memory='{math.ceil(source.nbytes / 1e6)}MB'")
            raise
    samples, observed = read_gappy(source)
    corpus = Corpus(samples, np.arange(samples.size), samples.time, samples.size)
    return corpus, None if observed is None else torch.as_tensor(observed)


def read_gappy(source: Source) -> tuple[Samples, np.ndarray | None]:
    """Return fields of which cells may be missing at some times, with the mean of their times there, and where they were observed.

    The latter has the shape of the fields, bool; None where no cell is missing at some times only.
    """
    values = source.read_all().astype(np.float64)
    holes = np.isnan(values)
    missing = np.asarray(np.asarray(holes.all((2, 3))).any(1))
    partial = (holes & ~missing[:, None, None, None]).any(0) & ~holes[~missing].all(0)
    found = Survey(source)
    counts = (~holes[~missing]).sum(0)
    means = np.divide(np.nansum(values[~missing], 0), counts, out=np.zeros(counts.shape), where=counts > 0)
    filled = np.where(holes & partial & ~missing[:, None, None, None], means, values)
    found.add(look(filled))
    source = found.apply()
    filled, holes = filled[~missing], holes[~missing]
    if source.valid is not None and source.fill is not None:
        filled = np.where(source.valid, filled, source.fill[:, None, None])
    samples = Samples(filled, source.time, source.grid, source.variables, source.dimension, source.valid)
    return samples, ~holes if partial.any() else None


def train_autoencoder(
    corpus: Corpus, observed: Tensor | None, recipe: AutoencoderRecipe, optimiser: Optimiser, name: str | None, licence: str
) -> LatentModel:
    """Train an autoencoder, and describe what its decoder leaves."""
    samples = corpus.samples
    fold = blocks(corpus.time, corpus.size, FOLDS, recipe.validation)
    scaling, z = corpus.standardised(
        fold[corpus.rows], recipe.climatology, recipe.transform, recipe.offset, recipe.bounds, recipe.periodic == "both",
        None if observed is None else observed.numpy(),
    )  # fmt: skip
    if observed is not None:
        scaling, z = by_observed(scaling, z, observed)
    chosen, few = corpus.few()
    warn_of_little(z[chosen], few, corpus.size)
    gap = corpus.gap(z)
    rows, held = split_rows(fold, corpus.time, gap)
    known, apart = (np.flatnonzero(np.isin(corpus.rows, r.numpy())) for r in (rows, held))
    states, withheld = torch.as_tensor(z[known]), torch.as_tensor(z[apart])
    components = None
    if recipe.linear and len(states) > 2 and max(recipe.latent or LENGTHS[0], 1) * z.shape[1] <= LARGEST_LINEAR:
        most = recipe.latent or min(LENGTHS[-1], LARGEST_LINEAR // z.shape[1])
        components = Components.of(states, min(most, max(1, len(states) // 2)))
    latent = recipe.latent or (LENGTHS[2] if components is None else 0)
    inflations = INFLATIONS if recipe.variational else (1.0,)
    if components is not None and not latent:
        tried = [k for k in LENGTHS if k <= len(components.power)] or [len(components.power)]
        found = components
        latent = max(tried, key=lambda k: found.first(k).suited(withheld, inflations).likelihood(withheld))
    if components is not None and len(components.power) < latent:
        raise OptionError(
            f"latent={latent} is more than {len(states)} training states determine; give at most {len(components.power)}: "
            f"latent={len(components.power)}, or anchor=None for a network without the linear part."
        )
    grid, channels = samples.grid, len(samples.variables)
    options = {
        "channels": channels, "shape": list(grid.plane), "latent": latent, "width": recipe.width or 16, "levels": suitable_levels(grid.plane),
        "periodic": grid.periodic if recipe.periodic is None else recipe.periodic, "variational": recipe.variational,
        "linear": components is not None,
    }  # fmt: skip
    network = build_autoencoder(options)
    if components is not None:
        _start(network, components.first(latent).suited(withheld, inflations), recipe.variational, channels, withheld)
    valid = torch.ones(channels, *grid.plane) if samples.valid is None else torch.as_tensor(samples.valid).float()
    counts = loss_weights(recipe.weights, samples.variables, grid, samples.valid)
    fields = corpus.fields(scaling, z, np.arange(corpus.size)[:, None])
    objective = Autoencoding(fields, latent, valid if counts is None else counts * valid, observed, recipe.beta)
    if recipe.prior != "normal":
        window_rows(corpus.time, fold, recipe.window)  # refuses before the training
    share = 1.0 if recipe.prior == "normal" else SHARE
    report = optimiser.fit(network, objective, rows, held, share, "autoencoder", None, corpus.labels)
    if (
        components is not None and not report["correction_weight"]
    ):  # without convolutions that add nothing, a search takes no time
        options["levels"] = 0
        kept, network = network, build_autoencoder(options)
        assert kept.basis is not None
        assert kept.projection is not None
        network.start_from(kept.basis, kept.projection, kept.log_variance, kept.log_error_start)
    seed = optimiser.seed
    states_held = max(8, LARGEST_HELD // z.shape[1])  # more of them say little more, and would not fit into memory
    if not recipe.variational:
        encoded = _encoded(network, fields, evenly_spaced(rows, min(2000, states_held)), None)[1]
        covariance = positive(torch.cov(encoded.T).reshape(latent, latent))
        network.standardise(encoded.mean(0), torch.linalg.cholesky(covariance))
    repeats = REPEATS if recipe.variational else 1
    some = evenly_spaced(held, states_held)
    drawn = [_encoded(network, fields, some, Draws(seed, 10**6 + r, len(some)))[0] for r in range(repeats)]
    left = torch.cat(drawn)
    mask = None if observed is None else observed[some].repeat(len(left) // len(some), 1, 1, 1)
    error, kind, lengths = decoder_error(left, mask, len(some), grid, recipe.periodic, valid.bool())
    report["card"] = _card(report, components is not None)
    record = record_of(
        corpus.size, samples.dimension, corpus.period, optimiser,
        {
            "latent": latent, "variational": recipe.variational, "beta": recipe.beta, "decoder_error": f"{float(error[valid.bool()].mean()):.3f} "
            + f"climatological standard deviations, {kind}" + (f" over {', '.join(f'{x / 1e3:.0f} km' for x in lengths)}" if lengths else ""),
            **({} if observed is None else {"observed": float(observed[:, valid.bool()].float().mean())}),
        },
        report,
    )  # fmt: skip
    record.pop("validation_ratio")  # losses of variational autoencoders may be negative
    spec = ModelSpec(
        name or "trained-autoencoder", "prior", "latent", samples.variables, grid, scaling,
        options={"network": options, "error_kind": kind, "error_lengths": lengths}, training=record, licence=licence,
        description=("Variational autoencoder" if recipe.variational else "Autoencoder") + f" with a latent vector of {latent} numbers",
    )  # fmt: skip
    model = LatentModel(spec, network, error, samples.valid)
    if recipe.prior == "normal":
        return model
    rest = 1.0 if optimiser.effort.steps is None else 1.0 - SHARE
    return with_learned_prior(model, corpus, fields, observed, fold, gap, recipe.window, optimiser, rest)


def train_latent_prior(
    corpus: Corpus, observed: Tensor | None, start: LatentModel, recipe: AutoencoderRecipe, optimiser: Optimiser, name: str | None
) -> LatentModel:
    """Learn what the latent vectors of a trained autoencoder are, which is kept."""
    check_same_fields(start, corpus)
    fold = blocks(corpus.time, corpus.size, FOLDS, recipe.validation)
    z = corpus.anomalies(start.scaling)
    if observed is not None:
        z = z * observed.numpy().reshape(z.shape)
    fields = corpus.fields(start.scaling, z, np.arange(corpus.size)[:, None])
    model = with_learned_prior(start, corpus, fields, observed, fold, corpus.gap(z), recipe.window, optimiser)
    started = {"started_from": f"{start.spec.name} ({start.sha256[:12]})"}
    model.spec = dataclasses.replace(model.spec, name=name or start.spec.name, training={**model.spec.training, **started})
    return model


def by_observed(scaling: Scaling, z: np.ndarray, observed: Tensor) -> tuple[Scaling, np.ndarray]:
    """Return scaling and states with the standard deviations of what was observed: what was filled in varies less; it is set to zero."""
    seen = observed.numpy().reshape(z.shape)
    z = z * seen
    channels = len(scaling.std)
    parts, counts = z.reshape(len(z), channels, -1), seen.reshape(len(z), channels, -1)
    wider = np.sqrt((parts**2).sum((0, 2)) / np.maximum(1, counts.sum((0, 2))))
    whole = np.sqrt((parts**2).mean((0, 2)) * parts.shape[2] / np.maximum(1, counts.any(0).sum(1)))
    factor = np.where(whole > 0, wider / np.where(whole > 0, whole, 1.0), 1.0)
    shaped = factor[:, None, None]
    out = dataclasses.replace(scaling, std=scaling.std * shaped)
    return out, (parts / factor[:, None]).reshape(z.shape)


def _start(network: Any, components: Components, variational: bool, channels: int, withheld: Tensor) -> None:
    """Give the network the linear maps, with the error that they make of withheld states: of those that they were fitted to it is too small."""
    basis, projection, log_variance = components.maps(variational)
    left = (withheld - (withheld @ projection.T) @ basis).square()
    if variational:
        left = left + (log_variance.exp()[:, None] * basis.square()).sum(0)
    counts = components.patterns.any(0).reshape(channels, -1).sum(1).clamp(min=1)
    network.start_from(basis, projection, log_variance, (left.mean(0).reshape(channels, -1).sum(1) / counts).log())


@torch.no_grad()
def _encoded(network: Any, fields: Fields, rows: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
    """Return what the decoder leaves of some states, (n, channels, ny, nx), and their latent vectors; drawn, or their means without `draws`."""
    left, latent = [], []
    noise = torch.zeros(len(rows), network.latent) if draws is None else draws.normal([network.latent])
    for part, white in zip(rows.split(64), noise.split(64), strict=True):
        x = fields.read(part).float()
        mean, variance = network.encode(x)
        z = mean + (0.5 * variance).exp() * white if network.variational else mean
        left.append((x - network.decode(z)).double())
        latent.append(z.double())
    return torch.cat(left), torch.cat(latent)


def decoder_error(
    left: Tensor, observed: Tensor | None, states: int, grid: Any, periodic: Any, valid: Tensor
) -> tuple[Tensor, str, list[float]]:
    """Return standard deviations (channels, ny, nx) of the decoder's error, the kind of its correlation and a length scale per channel.

    Parameters
    ----------
    left
        What the decoder leaves of withheld states, shape (n, channels, ny, nx), of which `states` are different ones.
    observed
        Of the same shape, bool; None: everywhere.
    valid
        Where the state is, shape (channels, ny, nx), bool.
    """
    counts = torch.full(left.shape[1:], float(states), dtype=torch.float64)
    if observed is not None:
        left = torch.where(observed, left, 0.0)
        counts = observed.double().mean(0) * states
    total = left.square().mean(0) * states
    shared = torch.stack([total[c][valid[c]].sum() / counts[c][valid[c]].sum().clamp(min=1.0) for c in range(len(valid))])
    variance = (total + OWN * shared[:, None, None]) / (counts + OWN)
    error = variance.sqrt() * valid
    scaled = torch.where(valid, left / variance.sqrt(), 0.0).flatten(2)
    kind, lengths = "white", list[float]()
    drawable = not isinstance(grid, Grid) or grid.longitude_count is not None or grid.size <= DENSE_LIMIT
    if periodic == "both" or not drawable or observed is not None:
        return error, kind, lengths
    best = math.fsum(_log_density(torch.eye(len(p), dtype=torch.float64), scaled[:, c, p]) for c, p in enumerate(_places(valid)))
    latitude, _ = grid.points()
    spacing = EARTH_RADIUS * math.sqrt(4 * math.pi / max(2, len(latitude))) / 20
    scales = np.geomspace(spacing, EARTH_RADIUS / 2, SCALES)
    for candidate in HYBRID_KERNELS:
        found, likelihood = [], 0.0
        for c, places in enumerate(_places(valid)):
            scores = [_log_density(correlation_at(grid, candidate, s, places), scaled[:, c, places]) for s in scales]
            found.append(float(scales[int(np.argmax(scores))]))
            likelihood += max(scores)
        if likelihood > best:
            best, kind, lengths = likelihood, candidate, found
    return error, kind, lengths


def _places(valid: Tensor) -> list[Tensor]:
    """Return some cells of each channel."""
    generator = torch.Generator().manual_seed(0)
    cells = [torch.nonzero(v.reshape(-1))[:, 0] for v in valid]
    return [c[torch.randperm(len(c), generator=generator)[:PLACES]] for c in cells]


def _log_density(correlation: Tensor, values: Tensor) -> float:
    """Return the mean log-density of rows of `values` under a Gaussian with this correlation, up to a constant."""
    factor, failed = torch.linalg.cholesky_ex(correlation + JITTER * torch.eye(len(correlation), dtype=torch.float64))
    if int(failed):
        return -math.inf
    white = torch.linalg.solve_triangular(factor, values.T, upper=False)
    return -0.5 * float(white.square().sum(0).mean()) - float(factor.diagonal().log().sum())


def _card(report: Mapping[str, Any], linear: bool) -> str:
    """Say in a sentence what training was worth on the validation block."""
    if not linear and not report["correction_weight"]:
        return (
            "the network explained nothing of the validation block: this is white noise around the climatology; train for longer"
        )
    if not linear:
        return f"validation loss {report['validation_best']:.3f}; there is no linear answer to compare with"
    if not report["correction_weight"]:
        return "the convolutions did not describe the validation block better than principal components, and are left out"
    return f"validation loss {report['validation_best']:.3f}, that of principal components {report['validation_without']:.3f}"

r"""A diffusion of latent vectors: what the codes of an autoencoder are, where they are not standard normal.

The idea is that of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), for data assimilation that of Andry et al. (2025, arXiv
2504.18720). The codes of the training fields are drawn from the encoder's own distribution, anew in every batch, and standardised by
their mean and covariance, so that the Gaussian N(0, I) which a network corrects is that of the codes. Of windows of consecutive states
it is separable in time.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xgenda.diffusion.anchors import Anchor, Modes, Separable
from xgenda.diffusion.denoisers import EDMDenoiser, precondition
from xgenda.errors import OptionError
from xgenda.models.conditioning import SIGMA_MIN
from xgenda.models.diffusive import highest_sigma
from xgenda.models.latents import LatentModel
from xgenda.networks.autoencoder import Autoencoder
from xgenda.networks.dense import LatentNet
from xgenda.training.anchoring import correlation_in_time
from xgenda.training.corpus import Corpus
from xgenda.training.fields import Fields
from xgenda.training.objectives import Batch, Denoising, Draws
from xgenda.training.optimiser import Optimiser
from xgenda.training.windows import FOLDS, split_rows, window_rows

LARGER_BATCH = 4  # times that of the autoencoder: a step on vectors costs next to nothing
JITTER = 1e-6
REACH = 2.0  # of the network of codes, in standard deviations of their largest mode


class OfCodes(Denoising):
    """Denoising of windows of codes, drawn anew in every batch.

    Parameters
    ----------
    means, deviations, turn
        Of the encoder's distributions, shape (n, window, k) twice, and (k, k): a code is mean + turn (deviations u), u standard normal.
    fold, anchors, sigma_max
        As of `Denoising`.
    """

    def __init__(
        self, means: Tensor, deviations: Tensor, turn: Tensor, fold: Tensor, anchors: Sequence[Anchor] | None, sigma_max: float
    ) -> None:  # fmt: skip
        states = means.flatten(1)[:, :, None, None]
        super().__init__(states, fold, anchors, SIGMA_MIN, sigma_max, feeds_state=anchors is not None)
        self.deviations, self.turn = deviations, turn

    def batch(self, rows: Tensor, states: Tensor, draws: Draws, given: Tensor | None = None) -> Batch:
        """Draw codes, and add noise to them."""
        own = self.deviations[rows]
        drawn = ((own * draws.normal(own.shape[1:])) @ self.turn.T).reshape(states.shape)
        if self.anchors is not None:
            return super().batch(rows, states + drawn, draws)
        # without an anchor all samples at once: vectors are so small that a loop over them would be all that takes time
        sigma = torch.tensor(self.levels, dtype=torch.float32)[draws.integers(len(self.levels))]
        clean, noise = states + drawn, draws.normal(states.shape[1:])
        skip, scale, inner, _ = precondition(None, clean + sigma[:, None, None, None] * noise, sigma)
        return Batch(inner, sigma.log() / 4, None, (clean - skip) / scale)


@dataclass(frozen=True, eq=False)
class Codes:
    """Gaussians of the latent vectors of states: means (n, k), and deviations (n, k), of components before they are standardised."""

    means: Tensor
    deviations: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, network: Autoencoder, fields: Fields, observed: Tensor | None = None) -> Codes:
        """Encode all fields; `observed` as of `Autoencoding`."""
        means, deviations = [], []
        for rows in torch.arange(fields.shape[0]).split(64):
            x = fields.read(rows).double()
            mean, variance = network.encode(x if observed is None else x * observed[rows].to(x))
            means.append(mean.double())
            deviations.append((0.5 * variance).exp().double() * float(network.variational))
        return cls(torch.cat(means), torch.cat(deviations))


def with_learned_prior(
    model: LatentModel, corpus: Corpus, fields: Fields, observed: Tensor | None, fold: np.ndarray, gap: int, window: int, optimiser: Optimiser,
    share: float = 1.0,
) -> LatentModel:  # fmt: skip
    """Return a latent model with a diffusion of the codes of some fields as its prior.

    Parameters
    ----------
    model
        Whose encoder and decoder are kept, but for the affine map that makes codes standard normal ones.
    fields, observed
        All standardised states, and where they were observed.
    fold, gap
        Block of each, and how many around a block resemble it.
    window
        States that are seen together.
    share
        Part of the effort that is left.

    Raises
    ------
    StateError
        If there are no windows of consecutive times.
    """
    windows, blocks, spacing = window_rows(corpus.time, fold, window)
    rows, held = split_rows(fold, corpus.time, gap)
    network = copy.deepcopy(model.network).cpu()
    codes = Codes.of(network, fields, observed)
    centre, spread = standardising(codes, network, rows, held)
    network.restandardise(centre, spread)
    means = torch.linalg.solve_triangular(spread, (codes.means - centre).T, upper=False).T
    turn = network.turned(torch.eye(model.latent, dtype=torch.float64)).T
    crossed, anchor = None, None
    if window > 1:
        samples = dataclasses.replace(corpus.samples, time=corpus.time)
        times = [correlation_in_time(means.numpy(), samples, fold, window, without) for without in (None, *range(FOLDS))]
        anchor, *crossed = (Separable(Modes(torch.eye(model.latent)), t) for t in times)
    sigma_max = highest_sigma(anchor)
    picked = torch.as_tensor(windows)
    objective = OfCodes(
        means[picked].float(), codes.deviations[picked].float(), turn.float(), torch.as_tensor(blocks), crossed, sigma_max
    )
    size = window * model.latent
    arguments: dict[str, Any] = {
        "channels": size, "condition_channels": size if anchor is not None else 0, "width": 128 if size <= 128 else 256, "blocks": 3,
        "reach": REACH * (1.0 if anchor is None else math.sqrt(anchor.largest())),
    }  # fmt: skip
    latent_net = LatentNet(**arguments)
    near = torch.ones(len(fold), dtype=torch.bool)
    near[rows] = False
    known = torch.nonzero(~near[picked].any(1))[:, 0]
    apart = torch.as_tensor(np.flatnonzero(np.isin(windows, held.numpy()).all(1)))
    how = dataclasses.replace(optimiser, batch_size=LARGER_BATCH * optimiser.batch_size)
    report = how.fit(latent_net, objective, known, apart, share, "codes")
    record: dict[str, Any] = {
        "latent_prior": _card(report), "prior_steps": report["steps"], "prior_correction_weight": report["correction_weight"],
        "prior_codes": f"{_kurtosis(means[rows]):.2f} mean excess kurtosis",
        "history": {**model.spec.training.get("history", {}), **report["history"]},
    }  # fmt: skip
    extra = {"prior": arguments, "sigma_max": sigma_max} | ({} if spacing is None else {"window": window, "spacing": spacing})
    kept = {k: v for k, v in model.spec.options.items() if k not in ("prior", "sigma_max", "window", "spacing")}
    first = model.spec.description.partition(",")[0]
    spec = dataclasses.replace(
        model.spec, options={**kept, **extra}, training={**model.spec.training, **record},
        description=f"{first}, and a diffusion of such vectors",
    )  # fmt: skip
    return LatentModel(spec, network, model.error, model.valid, EDMDenoiser(latent_net, anchor, anchor is not None))


def standardising(codes: Codes, network: Autoencoder, rows: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (k,) and Cholesky factor (k, k) of the codes to train on, wider where withheld codes are.

    The prior is a Gaussian of withheld states, too: their mean square, in units of what the training says, is at most what it is given.
    """
    turn = network.turned(torch.eye(codes.means.shape[1], dtype=torch.float64)).T

    def second(some: Tensor, about: Tensor) -> Tensor:
        turned = turn * codes.deviations[some].square().mean(0).sqrt()
        away = codes.means[some] - about
        return away.T @ away / len(some) + turned @ turned.T

    centre = codes.means[rows].mean(0)
    covariance = positive(second(rows, centre))
    seen = float(torch.linalg.solve(covariance, second(held, centre)).trace()) / len(centre)
    spread: Tensor = torch.linalg.cholesky(covariance)
    return centre, math.sqrt(max(1.0, seen)) * spread


def positive(covariance: Tensor) -> Tensor:
    """Return a covariance with so much on its diagonal that it has a Cholesky factor."""
    return covariance + JITTER * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)


def check_same_fields(model: LatentModel, corpus: Corpus) -> None:
    """Refuse fields that are not those of a latent model.

    Raises
    ------
    OptionError
        If they have other variables, other units, another grid or other masked cells.
    """
    samples, spec = corpus.samples, model.spec
    ours, theirs = ([(v.name, v.units) for v in variables] for variables in (samples.variables, spec.variables))
    if ours != theirs:
        raise OptionError(f"start={spec.name!r} is of {theirs}, and ds has {ours}. Rename or convert the variables of ds.")
    if spec.grid is None or not spec.grid.same_as(samples.grid):
        raise OptionError(f"start={spec.name!r} is on another grid than ds: a latent space has one grid. Leave out start.")
    if not np.array_equal(np.asarray(model.valid), np.asarray(samples.valid)):
        raise OptionError(f"start={spec.name!r} has other masked cells than ds. Leave out start to train from scratch.")


def _kurtosis(codes: Tensor) -> float:
    away = codes - codes.mean(0)
    power = away.square().mean(0)
    varying = power > 0  # those of a network that explains nothing are all the same
    return float((away**4).mean(0)[varying].div(power[varying].square()).mean()) - 3.0 if bool(varying.any()) else 0.0


def _card(report: dict[str, Any]) -> str:
    """Say in a sentence what the diffusion of the codes was worth on the validation block."""
    if not report["correction_weight"]:
        return "the network explained nothing of the codes of the validation block: this is their Gaussian"
    ratio = report["validation_best"] / report["validation_without"]
    return f"validation loss {ratio:.3f} of that of the Gaussian of the codes, with the network at weight {report['correction_weight']:.2f}"

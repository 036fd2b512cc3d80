"""What a prior under training is worth: the CRPS of its posterior given simulated observations of withheld states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xgenda.diffusion.anchors import Anchor
from xgenda.diffusion.denoisers import Denoiser, EDMDenoiser, GaussianDenoiser
from xgenda.diffusion.evidence import LinearEvidence
from xgenda.diffusion.guidance import guide
from xgenda.diffusion.noise import LabelledNoise
from xgenda.diffusion.samplers import integrate
from xgenda.diffusion.schedules import noise_levels
from xgenda.models.diffusive import SIGMA_MIN, highest_sigma
from xgenda.models.variables import VariableSpec
from xgenda.training.windows import evenly_spaced

LARGEST_BATCH = 2**18  # values of states that are sampled at once


def posterior_crps(
    denoisers: Mapping[str, Denoiser],
    anchor: Anchor,
    states: Tensor,
    *,
    std: np.ndarray | float = 1.0,
    valid: np.ndarray | None = None,
    share: float = 0.05,
    error: float = 0.25,
    members: int = 8,
    steps: int = 12,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Return the fair CRPS of the posterior of each state under several priors, with the same observations and the same random numbers.

    The Gaussian beside which a model is scored is ``GaussianDenoiser(torch.zeros(n), anchor)``. Because they share their noise, the
    differences of two priors are much more certain than their scores.

    Parameters
    ----------
    denoisers
        By name; of states in standard deviations.
    anchor
        Gaussian for the guidance and, usually, of the denoisers; not fitted to `states`.
    states
        Standardised, shape (k, channels, ny, nx); a handful.
    std
        Standard deviation that multiplies the scores, shape (channels, ny, nx) or broadcastable: physical units.
    valid
        Cells that can be observed and that count, shape (channels, ny, nx).
    share
        Part of the cells that is observed, the same random ones in all states, in all channels.
    error
        Of the observations, in standard deviations.
    members, steps
        Of the ensembles and of the sampler.
    seed
        Of network, errors and members.
    device
        Where the networks are.

    Returns
    -------
    dict of str to Tensor
        Mean over the cells that count and are not observed, shape (k, channels), in the units of `std`.
    """
    k, channels, ny, nx = states.shape
    size, cells = channels * ny * nx, ny * nx
    counted = torch.ones(channels, cells, dtype=torch.bool) if valid is None else torch.as_tensor(valid).reshape(channels, cells)
    generator = torch.Generator().manual_seed(seed)
    sea = torch.nonzero(counted.any(0))[:, 0]
    seen = sea[torch.randperm(len(sea), generator=generator)[: max(1, round(share * len(sea)))]]
    where = (torch.arange(channels)[:, None] * cells + seen).flatten()
    where = where[counted.flatten()[where]]
    flat = states.reshape(k, size).double()
    value = flat[:, where] + error * torch.randn(k, len(where), generator=generator, dtype=torch.float64)

    def observed(values: Tensor) -> LinearEvidence:
        shape = (len(values), len(where), 1)
        one, zero = torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        variance = torch.full(shape[:2], error**2, dtype=torch.float64)
        group = torch.arange(len(values)).repeat_interleave(members)
        return LinearEvidence(where.expand(len(values), -1)[..., None], one, zero, one, values, variance, group).to(
            torch.device(device)
        )

    sigma_max = highest_sigma(anchor)
    levels = noise_levels("karras", steps, SIGMA_MIN, sigma_max)
    left = counted.clone()
    left[:, seen] = False
    unit = torch.as_tensor(np.broadcast_to(np.asarray(std), (channels, ny, nx)).copy()).reshape(channels, cells)
    parts = torch.arange(k).split(max(1, LARGEST_BATCH // (members * size)))
    out = {}
    with torch.no_grad():
        for name, denoiser in denoisers.items():
            scores = []
            for part in parts:
                guided = guide(denoiser, observed(value[part]), "anchor", anchor=anchor)
                noise = LabelledNoise([[(seed, str(int(t)), m)] for t in part for m in range(members)])
                x = sigma_max * noise.normal(channels, ny, nx, dtype=torch.float64).to(device)
                x = integrate(guided, x + guided(x, sigma_max), levels, "heun", noise)
                drawn = x.reshape(len(part), members, channels, cells).cpu()
                scores.append(unit * fair_crps(drawn, flat[part].reshape(len(part), 1, channels, cells)))
            out[name] = (torch.cat(scores) * left).sum(-1) / left.sum(-1).clamp(min=1)
    return out


@dataclass(frozen=True)
class Comparison:
    """Validation CRPS of the Gaussian that a network corrects and of the corrected one, by channel, in physical units.

    Attributes
    ----------
    gaussian, model
        Shape (channels,).
    gain, error
        By how much the model's is below the Gaussian's, relative to that and averaged over channels, and the standard error of this over the
        withheld states.
    """

    gaussian: Tensor
    model: Tensor
    gain: float
    error: float

    @classmethod
    def of(cls, gaussian: Tensor, model: Tensor) -> Comparison:
        """Compare scores of the same states, shape (states, channels)."""
        gain = ((gaussian - model) / gaussian.mean(0).clamp(min=1e-300)).mean(1)
        error = float(gain.std(correction=1)) / len(gain) ** 0.5 if len(gain) > 1 else float("nan")
        return cls(gaussian.mean(0), model.mean(0), float(gain.mean()), error)

    @property
    def worse(self) -> bool:
        """Whether the correction did harm, beyond what the few states that were scored leave open."""
        return self.gain < (-self.error if math.isfinite(self.error) else 0.0)

    def describe(self, variables: Sequence[VariableSpec] = ()) -> str:
        """Return the comparison in a line; `variables` are what the channels are, for names and units."""
        names = [f"{v.name} " for v in variables] or [""] * len(self.model)
        units = [f" {v.units}" if v.units and v.units != "1" else "" for v in variables] or names
        rows = zip(names, self.model.tolist(), self.gaussian.tolist(), units, strict=True)
        both = ", ".join(f"{name}{m:.4g} (Gaussian {g:.4g}){unit}" for name, m, g, unit in rows)
        return f"CRPS of withheld states: {both}; gain {self.gain:.1%} ± {self.error:.1%}"


def beside_gaussian(
    network: nn.Module,
    anchor: Anchor,
    states: Tensor,
    *,
    feeds_state: bool = True,
    std: np.ndarray | float = 1.0,
    valid: np.ndarray | None = None,
    most: int = 8,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Comparison:
    """Return what a network is worth as a correction of a Gaussian, both scored by `posterior_crps` on some of the withheld states.

    Parameters
    ----------
    network
        F of an `EDMDenoiser` on `anchor`, in training or not; it is left in the mode that it was in.
    anchor
        The Gaussian fitted without `states`: that of their fold.
    states
        The withheld ones, standardised, shape (n, channels, ny, nx), in order of time.
    feeds_state
        As in `EDMDenoiser`.
    std, valid, device, **options
        As in `posterior_crps`.
    most
        How many of the states to take, evenly spread.
    """
    chosen = evenly_spaced(states, most)
    before = network.training
    network.eval()
    model = EDMDenoiser(network, anchor, feeds_state, (SIGMA_MIN, highest_sigma(anchor)))
    pair: dict[str, Denoiser] = {"gaussian": GaussianDenoiser(torch.zeros(anchor.size), anchor), "model": model}
    found = posterior_crps(pair, anchor, chosen, std=std, valid=valid, device=device, **options)
    network.train(before)
    return Comparison.of(found["gaussian"], found["model"])


def fair_crps(members: Tensor, truth: Tensor) -> Tensor:
    """Return the fair CRPS of members along the second axis (Ferro 2014, eq. 6); `truth` has a length of one there."""
    m = members.shape[1]
    weight = torch.arange(1 - m, m, 2, dtype=members.dtype)
    spread = torch.einsum("m,kmcn->kcn", weight, members.sort(1).values)
    return (members - truth).abs().mean(1) - spread / (m * (m - 1))

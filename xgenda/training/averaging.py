r"""Averages of weights over training, whose width can be chosen after it.

Power-function averages (Karras et al. 2024, arXiv:2312.02696, section 3 and appendix C): at step t

    mean_t = b mean_{t-1} + (1 - b) w_t,   b = (1 - 1/t)^(g + 1),

which weights w_s by (g + 1) s^g / t^(g + 1): however long training was, the average reaches over the same part of it. That part is the
width, the standard deviation of this profile relative to t, sqrt(g + 1) / ((g + 2) sqrt(g + 3)).

Two averages, kept now and then, span those of other widths well (section 3.2): any one is had from them afterwards by least squares
between profiles.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

WIDTHS = (0.05, 0.10)  # of the averages that are kept
CHOICES = (0.03, 0.05, 0.07, 0.10, 0.15, 0.20)  # of those that are tried
SNAPSHOTS = 16
LARGEST = 2**26  # numbers in all snapshots together: 256 MB

State = dict[str, Tensor]


def exponent_of(width: float) -> float:
    """Return g of an average whose profile has this standard deviation relative to the length of training."""
    return float(brentq(lambda g: width_of(g) - width, 0.0, 1e6))


def width_of(exponent: float) -> float:
    """Return the standard deviation of the profile relative to the length of training."""
    g = exponent
    return float(np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))))


def overlap(g: np.ndarray, t: np.ndarray, other: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the inner products of profiles with exponents `g` at steps `t` with others (appendix C.4), shape (profiles, others)."""
    g, t, other, at = g[:, None], t[:, None], other[None], at[None]
    early = t < at
    ratio, power, latest = np.minimum(t, at) / np.maximum(t, at), np.where(early, other, g), np.maximum(t, at)
    return np.asarray((g + 1) * (other + 1) * ratio**power / ((g + other + 1) * latest))


class PowerAverages:
    """Running averages of some tensors, and snapshots of these.

    Parameters
    ----------
    parameters
        What is averaged, by name; the averages start from its values.
    widths
        Of the averages.
    """

    def __init__(self, parameters: Mapping[str, Tensor], widths: tuple[float, ...] = WIDTHS) -> None:
        self.widths, self.exponents = widths, [exponent_of(w) for w in widths]
        self.running: list[State] = [{k: v.detach().clone() for k, v in parameters.items()} for _ in widths]
        numbers = len(widths) * sum(v.numel() for v in parameters.values())
        self.most = min(SNAPSHOTS, LARGEST // max(1, numbers)) if len(widths) > 1 else 0
        self.every, self.snapshots = 1, dict[int, list[State]]()

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after `step` steps, counted from 1."""
        now = list(parameters.values())
        for exponent, state in zip(self.exponents, self.running, strict=True):
            torch._foreach_lerp_(list(state.values()), now, 1 - (1 - 1 / step) ** (exponent + 1))
        if self.most >= 4 and step % self.every == 0:
            self.snapshots[step] = self.copies()
            if len(self.snapshots) > self.most:  # every second one, so that they stay evenly spaced
                self.every *= 2
                self.snapshots = {s: kept for s, kept in self.snapshots.items() if s % self.every == 0}

    def copies(self) -> list[State]:
        """Return copies of the running averages."""
        return [{k: v.clone() for k, v in state.items()} for state in self.running]

    def weights(self, width: float, step: int) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Return which averages (step, number of the width) make that of `width` at `step`, and with which weights.

        Those at `step` itself are among them, whether there is a snapshot or not.
        """
        names = [(s, k) for s in sorted({*(s for s in self.snapshots if s < step), step}) for k in range(len(self.widths))]
        g, t = np.array([self.exponents[k] for _, k in names]), np.array([float(s) for s, _ in names])
        matrix = overlap(g, t, g, t)
        target = overlap(g, t, np.array([exponent_of(width)]), np.array([float(step)]))[:, 0]
        return names, np.linalg.lstsq(matrix, target, rcond=1e-10)[0]

    @torch.no_grad()
    def of_width(self, width: float, step: int, latest: list[State]) -> State:
        """Return the average of a width after `step` steps, given the running ones of that time."""
        names, weights = self.weights(width, step)
        found: State = {}
        for (s, k), weight in zip(names, weights.tolist(), strict=True):
            for name, tensor in (latest if s == step else self.snapshots[s])[k].items():
                found[name] = weight * tensor if name not in found else found[name].add_(tensor, alpha=weight)
        return found

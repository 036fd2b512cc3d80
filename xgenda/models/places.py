r"""Scattered places where a prior over functions is evaluated beside the cells of the grid.

A prior of the cells x becomes one of functions by what lies between them: at a place f = m + W (x - m_x) + r, with r a Gaussian that is
independent of x, W and the covariance C of r those of a kernel given the cells (`xgenda.diffusion.kriging`). Observations y = H_x x + H_f f + e
are then observations of the cells with the operator H_x + H_f W and errors of covariance R + H_f C H_f^T (`given_cells`): any sampler of x
will do. Given its samples r is drawn in closed form (`between_cells`). For a Gaussian prior with the same kernel this is the Gaussian process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xgenda.diffusion.gaussian import factor_of
from xgenda.diffusion.noise import NoiseStream

if TYPE_CHECKING:
    from xgenda.models.generative import PointEvidence

NEGLIGIBLE = 1e-9  # of the largest weight of an observation


@dataclass(frozen=True, eq=False)
class Places:
    """Places of one time, after the cells of each channel.

    Attributes
    ----------
    latitude, longitude
        In degrees, shape (p,); none of them is a cell, and no two are the same.
    observed
        How many at the beginning are those of observations.
    indices, weights
        Linear interpolation from the cells, for what the prior expects: shape (p, k), and of each channel (channels, p, k).
    wanted
        Where the state is asked for, as indices into the cells and, after them, these places; None: the cells.
    """

    latitude: Tensor
    longitude: Tensor
    observed: int
    indices: Tensor
    weights: Tensor
    wanted: Tensor | None = None

    def extend(self, fields: Tensor) -> Tensor:
        """Return fields (..., channels, cells) with their interpolation to the places after the cells."""
        return torch.cat([fields, (fields[..., self.indices] * self.weights).sum(-1)], -1)

    def picked(self, fields: Tensor, cells: int) -> Tensor:
        """Return what is asked for of fields (..., cells + p)."""
        return fields[..., :cells] if self.wanted is None else fields[..., self.wanted]

    @property
    def key(self) -> bytes:
        """What tells these places from others."""
        parts = [self.latitude, self.longitude, torch.tensor([self.observed])] + ([] if self.wanted is None else [self.wanted])
        return b"|".join(x.numpy().tobytes() for x in parts)


@dataclass(frozen=True, eq=False)
class Between:
    """What the cells say of the places, and what they leave open, of one channel.

    Attributes
    ----------
    rows
        W, shape (p, cells).
    root
        Lower Cholesky factor of C, shape (p, p).
    """

    rows: Tensor
    root: Tensor

    def expected(self, cells: Tensor, mean: Tensor) -> Tensor:
        """Return m + W (x - m_x) for cells (..., n), with `mean` that of cells and then places, shape (n + p,)."""
        n = cells.shape[-1]
        return mean[..., n:] + (cells - mean[..., :n]) @ self.rows.T


def _operators(evidence: PointEvidence, channels: int, cells: int) -> tuple[Tensor, Tensor]:
    """Return H_x and H_f as matrices, shapes (m, channels, cells) and (m, channels, p)."""
    assert evidence.places is not None
    width = cells + len(evidence.places.latitude)
    whole = torch.zeros(len(evidence.value), channels * width, dtype=torch.float64)
    whole.scatter_add_(1, evidence.indices, evidence.weights.double())
    whole = whole.reshape(len(whole), channels, width)
    return whole[..., :cells], whole[..., cells:]


def given_cells(evidence: PointEvidence, between: Sequence[Between], mean: Tensor) -> PointEvidence:
    """Return observations of cells and places as observations of cells alone, with errors that are independent of each other.

    Parameters
    ----------
    evidence
        With places.
    between
        Of each channel.
    mean
        Expected of cells and places, shape (channels, cells + p).
    """
    from xgenda.models.generative import PointEvidence

    assert evidence.places is not None
    channels, width = mean.shape
    count = len(evidence.places.latitude)
    cells = width - count
    if not evidence.places.observed:
        channel, cell = evidence.indices // width, evidence.indices % width
        return PointEvidence(channel * cells + cell, evidence.weights, evidence.value, evidence.variance)
    of_cells, of_places = _operators(evidence, channels, cells)
    value, covariance = evidence.value.double(), torch.diag(evidence.variance.double())
    for c, b in enumerate(between):
        seen = of_places[:, c]
        value = value - seen @ b.expected(torch.zeros(cells, dtype=torch.float64), mean[c])
        of_cells[:, c] += seen @ b.rows
        spread = seen @ b.root
        covariance = covariance + spread @ spread.T
    factor = factor_of(covariance)
    operator = torch.linalg.solve_triangular(factor, of_cells.flatten(1), upper=False)
    operator[operator.abs() < NEGLIGIBLE * operator.abs().amax(1, keepdim=True)] = 0.0
    value = torch.linalg.solve_triangular(factor, value[:, None], upper=False)[:, 0]
    k = int((operator != 0).sum(1).max())
    found = operator.abs().topk(k, 1).indices.sort(1).values
    return PointEvidence(found, operator.gather(1, found), value, torch.ones_like(value))


def between_cells(
    evidence: PointEvidence, between: Sequence[Between], mean: Tensor, cells: Tensor, keys: Sequence[tuple[int, str, int]]
) -> Tensor:
    """Draw the places of states whose cells were drawn given the same observations, shape (samples, channels, cells + p).

    Parameters
    ----------
    evidence, between, mean
        As of `given_cells`.
    cells
        Shape (samples, channels, cells), float64.
    keys
        (seed, time label, member number) of each sample. What is drawn at observed places does not depend on the others.
    """
    assert evidence.places is not None
    count, observed, n = len(evidence.places.latitude), evidence.places.observed, cells.shape[-1]
    streams = [(NoiseStream(keys).beside(name), size) for name, size in (("observed", observed), ("elsewhere", count - observed))]
    out = []
    for c, b in enumerate(between):
        white = torch.cat([stream.normal(size, dtype=torch.float64) for stream, size in streams], -1)
        out.append(b.expected(cells[:, c], mean[c]) + white @ b.root.T)
    places = torch.stack(out, 1)
    if len(evidence.value):
        of_cells, of_places = _operators(evidence, len(between), n)
        error = evidence.variance.double().sqrt()
        seen = torch.einsum("mcn,scn->sm", of_cells, cells) + torch.einsum("mcp,scp->sm", of_places, places)
        departure = evidence.value.double() - seen - error * streams[0][0].normal(len(error), dtype=torch.float64)
        spread = [of_places[:, c] @ b.root for c, b in enumerate(between)]
        inner = torch.diag(error**2) + torch.stack([s @ s.T for s in spread]).sum(0)
        solved = torch.cholesky_solve(departure.T, factor_of(inner))
        places = places + torch.stack([(b.root @ (s.T @ solved)).T for b, s in zip(between, spread, strict=True)], 1)
    return torch.cat([cells, places], -1)

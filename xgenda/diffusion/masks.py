"""Where the cells of a grid are, in cells, and how near each of them is to what is observed: the soft mask of DiffDA.

Huang et al. (2024, arXiv 2401.05932) measure distances along rows, and along columns times the cosine of the latitude (plus 0.05, which keeps
them from vanishing at the poles), and not across the date line. Here they are great circles, in units of the spacing of latitudes, or on a
plane the shorter way around the axes that wrap.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from xgenda.diffusion.evidence import LinearEvidence


class Places(Protocol):
    """Where cells are."""

    size: int

    def centres(self, cells: Tensor, weights: Tensor) -> Tensor:
        """Return the mean place of some cells (m, k) with these weights, shape (m, axes)."""
        ...

    def between(self, points: Tensor, others: Tensor | None = None) -> Tensor:
        """Return distances in cells from points (m, axes) to others (p, axes) or to all cells, shape (m, p)."""
        ...


class OnPlane:
    """Cells of a plane of rows and columns, which may wrap around."""

    def __init__(self, rows: int, columns: int, wraps: tuple[bool, bool] = (False, False)) -> None:
        self.shape, self.wraps, self.size = (rows, columns), wraps, rows * columns
        cell = torch.arange(self.size)
        self.cells = torch.stack([cell // columns, cell % columns], -1).double()

    def centres(self, cells: Tensor, weights: Tensor) -> Tensor:
        """Return mean places, found around the heaviest cell, so that those across a seam stay there."""
        place, share = self.cells[cells], _shares(weights)
        heaviest = place.gather(1, share.argmax(1)[:, None, None].expand(-1, 1, 2))
        out: Tensor = heaviest[:, 0] + (share[..., None] * self._step(place - heaviest)).sum(1)
        return out

    def between(self, points: Tensor, others: Tensor | None = None) -> Tensor:
        """Return distances, the shorter way around."""
        to = self.cells if others is None else others
        return self._step(to[None] - points[:, None]).square().sum(-1).sqrt()

    def _step(self, step: Tensor) -> Tensor:
        for axis, size in enumerate(self.shape):
            if self.wraps[axis]:
                along = (step[..., axis] + size / 2) % size - size / 2
                step = torch.cat([step[..., :axis], along[..., None], step[..., axis + 1 :]], -1)
        return step


class OnSphere:
    """Cells on a sphere.

    Parameters
    ----------
    vectors
        Unit vectors of the cells, shape (cells, 3).
    spacing
        Angle in radians that counts as one cell.
    """

    def __init__(self, vectors: Tensor, spacing: float) -> None:
        self.vectors, self.spacing, self.size = vectors.double(), spacing, len(vectors)

    def centres(self, cells: Tensor, weights: Tensor) -> Tensor:
        """Return mean places on the sphere."""
        found = (_shares(weights)[..., None] * self.vectors[cells]).sum(1)
        return torch.nn.functional.normalize(found, dim=-1)

    def between(self, points: Tensor, others: Tensor | None = None) -> Tensor:
        """Return great-circle distances."""
        chord = torch.cdist(points, self.vectors if others is None else others, compute_mode="donot_use_mm_for_euclid_dist")
        out: Tensor = 2 * torch.asin((chord / 2).clamp(max=1.0)) / self.spacing
        return out


def _shares(weights: Tensor) -> Tensor:
    total = weights.abs().sum(1, keepdim=True)
    return weights.abs() / torch.where(total > 0, total, 1.0)


class Seen:
    """The observations of one group of an evidence: where they are, in which channel, and their units."""

    def __init__(self, evidence: LinearEvidence, group: int, places: Places) -> None:
        weights = (evidence.weights[group] * evidence.std[group]).double().cpu()
        real = (weights != 0).any(1)
        index = evidence.indices[group].cpu()
        heaviest = index.gather(1, weights.abs().argmax(1, keepdim=True))[:, 0]
        self.real, self.places = real, places
        self.channel = torch.where(real, heaviest // places.size, -1)
        self.points = places.centres(index % places.size, weights)
        self.unit = torch.where(real, weights.abs().sum(1), 1.0)

    def mask(self, channels: int, reach: float) -> Tensor:
        """Return max over observations of exp(-d^2 / (2 reach^2)), shape (channels * cells,)."""
        out = torch.zeros(channels, self.places.size, dtype=torch.float64)
        for c in range(channels):
            own = self.channel == c
            if own.any():
                out[c] = torch.exp(-self.places.between(self.points[own]).amin(0).square() / (2 * reach**2))
        return out.flatten()

    def averaging(self, channels: int, reach: float) -> list[tuple[int, Tensor, Tensor]]:
        """Return the maps from departures to the mask times their mean, each observation with its own mask as weight.

        Returns
        -------
        list
            Channel, its observations (m_c,), and the map, shape (cells, m_c).
        """
        out = []
        for c in range(channels):
            own = torch.nonzero(self.channel == c)[:, 0]
            if len(own):
                near = torch.exp(-self.places.between(self.points[own]).square() / (2 * reach**2))
                total = near.sum(0)
                share = near / torch.where(total > 0, total, 1.0) * near.amax(0)
                out.append((c, own, share.T / self.unit[own]))
        return out

    def kriged(self, departure: Tensor, variance: Tensor, channels: int, length: float) -> Tensor:
        """Return simple kriging of departures (m,) with a Matern-1/2 covariance of variance one, channel by channel; (channels * cells,).

        Parameters
        ----------
        departure, variance
            In the units of the observations.
        length
            The range, in cells.
        """
        out = torch.zeros(channels, self.places.size, dtype=torch.float64)
        for c in range(channels):
            own = torch.nonzero(self.channel == c)[:, 0]
            if not len(own):
                continue
            at = self.points[own]
            inner = torch.exp(-self.places.between(at, at) / length) + torch.diag(variance[own] / self.unit[own] ** 2)
            inner += 1e-9 * torch.eye(len(own), dtype=torch.float64)
            solved = torch.linalg.solve(inner, departure[own] / self.unit[own])
            out[c] = solved @ torch.exp(-self.places.between(at) / length)
        return out.flatten()

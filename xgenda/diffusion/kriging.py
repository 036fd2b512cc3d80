r"""Random fields at scattered places beside the cells of a grid.

A field with a correlation function c is known at places between cells as well: given the cells it is Gaussian there,

    x_i = sum_j w_ij x_j + s_i e_i,        j: the cells nearest to place i, and the nearest of the places before it,

with the weights of simple kriging, what they leave, s_i^2, and e_i independent (Vecchia 1988, J. R. Stat. Soc. B 50, 297-312; Datta et al. 2016,
J. Am. Stat. Assoc. 111, 800-812). The cells come first, so that places refine a field and never change it. Variances are exact. So are
covariances where no more cells and places are there than are looked at; else they are as exact as kriging from the nearest is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from xgenda.diffusion.covariances import DENSE_LIMIT, SphereKernel, unit_positions
from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import OptionError

CELLS, PLACES = 32, 32  # that each place is kriged from: the nearest
NUGGET = 1e-10  # of the variance: correlations at short distances are singular to rounding
PIECE = 2**22  # distances at once


class Kriged:
    """A field at places, given it on the cells of a grid.

    Parameters
    ----------
    kernel
        Correlation function on the grid.
    latitude, longitude
        Of the places in degrees, shapes (p,). None of them is a cell, and no two are the same.
    """

    def __init__(self, kernel: SphereKernel, latitude: Tensor, longitude: Tensor) -> None:
        if len(latitude) > DENSE_LIMIT:
            raise OptionError(
                f"{len(latitude)} places between the cells at one time are more than representation='points' solves ({DENSE_LIMIT}). Thin the "
                f"observations, quality=xgenda.QualityControl(thin=10e3), or ask for fewer places."
            )
        self.kernel, self.cells = kernel, kernel.size
        self.positions = unit_positions(latitude, longitude)
        count = len(latitude)
        near = _nearest(self.positions, kernel.positions, CELLS)
        before = _nearest(self.positions, self.positions, PLACES, earlier=True)
        known = torch.cat([kernel.positions[near], self.positions[before.clamp(min=0)]], 1)
        there = torch.cat([torch.ones(near.shape, dtype=torch.bool), before >= 0], 1)
        size = known.shape[1]
        inner = kernel.of_distance(_between(known, known)) * (there[:, :, None] & there[:, None, :])
        # what is not there is a number of its own, which says nothing
        inner = inner + torch.diag_embed(torch.where(there, NUGGET, 1.0).double())
        cross = kernel.of_distance(_between(self.positions[:, None], known))[:, 0] * there
        weight = torch.linalg.solve(inner, cross) if count else torch.zeros(0, size, dtype=torch.float64)
        self.near, self.weight = near, weight[:, : near.shape[1]]
        self.left = (1.0 - (weight * cross).sum(-1)).clamp(min=0.0).sqrt()
        # x = W cells + B x + s e, B strictly lower
        self._lower = torch.eye(count, dtype=torch.float64)
        self._lower.scatter_add_(1, before.clamp(min=0), -weight[:, near.shape[1] :] * (before >= 0))

    def extend(self, known: Tensor, white: Tensor) -> Tensor:
        """Return the field at the places, shape (..., p), for cells (..., n) and white noise (..., p)."""
        given = (known[..., self.near] * self.weight).sum(-1) + self.left * white
        flat = given.reshape(-1, given.shape[-1]).T
        out: Tensor = torch.linalg.solve_triangular(self._lower, flat, upper=False, unitriangular=True).T
        return out.reshape(given.shape)

    @functools.cached_property
    def rows(self) -> Tensor:
        """What the places are expected to be given the cells, as a matrix, shape (p, n)."""
        dense = torch.zeros(len(self.positions), self.cells, dtype=torch.float64)
        dense.scatter_add_(1, self.near, self.weight)
        out: Tensor = torch.linalg.solve_triangular(self._lower, dense, upper=False, unitriangular=True)
        return out

    @functools.cached_property
    def root(self) -> Tensor:
        """The lower Cholesky factor of what the cells leave open, shape (p, p)."""
        out: Tensor = torch.linalg.solve_triangular(self._lower, torch.diag(self.left), upper=False, unitriangular=True)
        return out


class ExtendedKernel(SphereKernel):
    """A correlation function on the cells of a grid and, after them, at scattered places.

    Drawn on the cells it is what it is without the places; those that are `observed` have a stream of random numbers of their own, so that the
    others may be any, and change neither.

    Parameters
    ----------
    kernel
        On the grid.
    latitude, longitude
        Of the places, see `Kriged`.
    observed
        How many places at the beginning are observed.
    """

    def __init__(self, kernel: SphereKernel, latitude: Tensor, longitude: Tensor, observed: int) -> None:
        self.kind, self.length, self._own, self._observed = kernel.kind, kernel.length, kernel, observed
        self._kriged: Kriged | None = None
        self._places = latitude.double(), longitude.double()
        self.positions = torch.cat([kernel.positions, unit_positions(*self._places)])
        self.size = len(self.positions)

    def draw(self, noise: NoiseStream, fields: int = 1) -> Tensor:
        """Draw `fields` independent fields per sample with this correlation, shape (samples, fields, size), float64."""
        if self._kriged is None:
            self._kriged = Kriged(self._own, *self._places)
        known = self._own.draw(noise, fields)
        counts = {"observed": self._observed, "elsewhere": self.size - self._own.size - self._observed}
        white = torch.cat([noise.beside(n).normal(fields, c, dtype=torch.float64) for n, c in counts.items()], -1)
        return torch.cat([known, self._kriged.extend(known, white)], -1)


def _between(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(places: Tensor, among: Tensor, count: int, *, earlier: bool = False) -> Tensor:
    """Return the nearest of `among`, shape (p, at most count); with `earlier` of those before each place, -1 where there are fewer."""
    found = []
    k = min(count, len(among))
    step = max(1, PIECE // max(1, len(among)))
    for rows in torch.arange(len(places)).split(step):
        apart = _between(places[rows], among)
        if earlier:
            apart = apart.masked_fill(torch.arange(len(among)) >= rows[:, None], torch.inf)
        distance, index = apart.topk(k, largest=False)
        found.append(torch.where(distance.isinf(), -1, index))
    return torch.cat(found) if found else torch.zeros(0, k, dtype=torch.int64)

r"""Isotropic Gaussian random fields on the sphere, by spherical harmonics.

    f = std sum_lm sqrt(C_l) a_lm Y_lm,    a_lm ~ N(0, 1),    sum_l (2 l + 1) C_l / (4 pi) = 1,
    c(angle) = sum_l (2 l + 1) C_l / (4 pi) P_l(cos angle),    C_l = 2 pi int_-1^1 c(t) P_l(t) dt

(Marinucci & Peccati 2011, Random Fields on the Sphere, section 5.2). Y_lm are real and orthonormal, from the recurrence of fully normalised
associated Legendre functions in double precision (Holmes & Featherstone 2002, J. Geodesy 76, 279-299, eq. 11). Numbers are drawn degree by
degree: a higher degree adds to a field and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from xgenda.diffusion.covariances import EARTH_RADIUS
from xgenda.diffusion.kernels import Kernel
from xgenda.diffusion.random_fields import Source
from xgenda.errors import GridError, OptionError, check_count

HIGHEST_DEGREE = 1500  # beyond it sin^m underflows in double precision where functions of that order still count


class SphereField:
    """Isotropic Gaussian fields on rows and columns of latitude and longitude, global or not.

    Parameters
    ----------
    latitude, longitude
        Axes in degrees, shapes (ny,) and (nx,).
    kernel
        Correlation function: of great-circle distance for the kinds that are a correlation of it ('exponential', 'published', and
        'matern' up to nu = 1/2), of the chord for the others (Gneiting 2013, Bernoulli 19, 1327-1349).
    radius
        Of the sphere, in the units of the kernel's length; by default that of the Earth in metres.
    std
        Standard deviation.
    cutoff
        Highest degree; by default as many as there are rows of this spacing from pole to pole, less one.

    Attributes
    ----------
    power
        std^2 (2 l + 1) C_l / (4 pi): the variance of each degree, shape (cutoff + 1,).
    left_out
        Share of the kernel's variance in higher degrees, which is given to the others.

    Raises
    ------
    GridError
        If latitudes do not lie between the poles, or there is one row and no cutoff.
    OptionError
        If an argument is out of its range.
    """

    def __init__(
        self,
        latitude: Tensor,
        longitude: Tensor,
        kernel: Kernel,
        *,
        radius: float = EARTH_RADIUS,
        std: float = 1.0,
        cutoff: int | None = None,
    ) -> None:
        latitude, longitude = latitude.double(), longitude.double()
        if latitude.ndim != 1 or longitude.ndim != 1 or not bool((latitude.abs() <= 90).all()):
            raise GridError("latitude and longitude must be axes in degrees, latitudes between -90 and 90.")
        if cutoff is None:
            if len(latitude) < 2:
                raise GridError("One row has no spacing to find the highest degree from; pass cutoff, for example cutoff=90.")
            cutoff = max(1, round(180 / float(latitude.diff().abs().median())) - 1)
        if check_count("cutoff", cutoff) > HIGHEST_DEGREE:
            raise OptionError(
                f"cutoff={cutoff} is not accepted; spherical harmonics are exact up to degree {HIGHEST_DEGREE} here."
            )
        self.kernel, self.radius, self.std, self.cutoff = kernel, float(radius), std, cutoff
        self.shape = (len(latitude), len(longitude))
        self._sine = torch.sin(torch.deg2rad(latitude))
        turn = torch.arange(cutoff + 1, dtype=torch.float64)[:, None] * torch.deg2rad(longitude)
        factor = torch.full((cutoff + 1, 1), math.sqrt(2.0), dtype=torch.float64)
        factor[0] = 1.0
        self._cosines, self._sines = factor * turn.cos(), factor * turn.sin()
        share = power_by_degree(kernel, cutoff, self.radius)
        self.left_out = max(0.0, 1.0 - float(share.sum()))
        self.power = std**2 * share / share.sum()
        # per coefficient, and with Y of unit mean square instead of unit integral
        self._weight = (4 * math.pi * self.power / (2 * torch.arange(cutoff + 1) + 1)).tolist()

    def draw(self, noise: Source, *lead: int) -> Tensor:
        """Draw independent fields of every sample, shape ``(samples, *lead, ny, nx)``, float64; one stream per sample."""
        degrees = [noise.normal(*lead, 2 * n + 1, dtype=torch.float64) for n in range(self.cutoff + 1)]
        head = degrees[0].shape[:-1]
        coefficients = [math.sqrt(w) * _ordered(d.reshape(-1, d.shape[-1])) for w, d in zip(self._weight, degrees, strict=True)]
        return self._synthesis(coefficients).reshape(*head, *self.shape)

    def apply(self, x: Tensor) -> Tensor:
        """Return K x for fields (..., ny, nx)."""
        if tuple(x.shape[-2:]) != self.shape:
            raise GridError(f"x has {tuple(x.shape[-2:])} cells, and the field has {self.shape}.")
        flat = x.reshape(-1, *self.shape).double()
        sums = torch.stack([flat @ self._cosines.T.to(flat), flat @ self._sines.T.to(flat)], -1)  # (b, ny, m, 2)
        coefficients = [
            w * torch.einsum("my,bymz->bmz", p.to(flat), sums[:, :, : len(p)])
            for w, p in zip(self._weight, self._functions(), strict=True)
        ]
        return self._synthesis(coefficients).reshape(x.shape).to(x.dtype)

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the covariance of cells (numbers along the flattened grid), which are broadcast against each other."""
        cosine = (1 - self._sine**2).clamp(min=0).sqrt()
        nx = self.shape[1]
        a, b = rows // nx, columns // nx
        m1_cos, m1_sin = (self._cosines[1] / math.sqrt(2), self._sines[1] / math.sqrt(2))
        turned = m1_cos[rows % nx] * m1_cos[columns % nx] + m1_sin[rows % nx] * m1_sin[columns % nx]
        return self.correlation_at(self._sine[a] * self._sine[b] + cosine[a] * cosine[b] * turned)

    def correlation_at(self, cosine: Tensor) -> Tensor:
        """Return the covariance at angles of this cosine: the sum of the series up to the cutoff."""
        before, now = torch.zeros_like(cosine), torch.ones_like(cosine)
        out = torch.zeros_like(cosine)
        for n, p in enumerate(self.power.tolist()):
            out += p * now
            before, now = now, ((2 * n + 1) * cosine * now - n * before) / (n + 1)
        return out

    def _functions(self) -> Iterator[Tensor]:
        """Yield of degree after degree the Legendre functions of orders 0 to l at all latitudes, shape (l + 1, ny)."""
        t, u = self._sine, (1 - self._sine**2).clamp(min=0).sqrt()
        previous, now = (
            torch.zeros(0, len(t), dtype=torch.float64),
            torch.full((1, len(t)), math.sqrt(1 / (4 * math.pi)), dtype=torch.float64),
        )
        yield now
        for n in range(1, self.cutoff + 1):
            m = torch.arange(n - 1, dtype=torch.float64)[:, None]
            grow = ((4 * n**2 - 1) / (n**2 - m**2)).sqrt()
            lower = ((((n - 1) ** 2 - m**2) / (4 * (n - 1) ** 2 - 1)).sqrt()) if n > 1 else m
            inner = grow * (t * now[: n - 1] - lower * previous)
            ahead = torch.cat(
                [inner, math.sqrt(2 * n + 1) * t * now[n - 1 :], math.sqrt((2 * n + 1) / (2 * n)) * u * now[n - 1 :]]
            )
            previous, now = now, ahead
            yield now

    def _synthesis(self, coefficients: list[Tensor]) -> Tensor:
        """Return fields (b, ny, nx) from the coefficients of every degree, each shape (b, l + 1, 2)."""
        count, like = len(coefficients[0]), coefficients[0]
        rows = torch.zeros(count, self.shape[0], self.cutoff + 1, 2, dtype=like.dtype, device=like.device)
        for c, p in zip(coefficients, self._functions(), strict=True):
            rows[:, :, : len(p)] += p.T.to(like)[None, :, :, None] * c[:, None]
        return rows[..., 0] @ self._cosines.to(like) + rows[..., 1] @ self._sines.to(like)


def power_by_degree(kernel: Kernel, cutoff: int, radius: float = EARTH_RADIUS) -> Tensor:
    """Return the share of the variance of each degree, (2 l + 1) C_l / (4 pi), shape (cutoff + 1,), float64.

    By Gauss-Legendre quadrature in the angle, refined towards zero distance, where rough kernels have their kink.
    """
    arc = kernel.order is not None and kernel.order <= 0.5
    # nodes of panels that double in width from below the smallest scale on
    smallest = min(kernel.scale / radius, math.pi / cutoff, 1.0) / 8
    edges = [0.0, smallest]
    while edges[-1] < math.pi:
        edges.append(min(math.pi, edges[-1] + min(edges[-1], 8 / cutoff)))
    nodes, weights = np.polynomial.legendre.leggauss(16)
    low, high = np.array(edges[:-1])[:, None], np.array(edges[1:])[:, None]
    angle = torch.as_tensor((low + (high - low) * (nodes + 1) / 2).ravel())
    weight = torch.as_tensor(((high - low) / 2 * weights).ravel()) * angle.sin()
    correlation = kernel(radius * (angle if arc else 2 * (angle / 2).sin()))
    cosine, product = angle.cos(), weight * correlation
    before, now, out = torch.zeros_like(cosine), torch.ones_like(cosine), []
    for n in range(cutoff + 1):
        out.append((2 * n + 1) / 2 * (product * now).sum())
        before, now = now, ((2 * n + 1) * cosine * now - n * before) / (n + 1)
    return torch.stack(out).clamp(min=0.0)


def _ordered(degree: Tensor) -> Tensor:
    """Return the coefficients of a degree l by order, shape (b, l + 1, 2), from a list (b, 2 l + 1) of m = 0, then cosine and sine of m = 1, ..."""
    first = torch.stack([degree[:, :1], torch.zeros_like(degree[:, :1])], -1)
    return torch.cat([first, degree[:, 1:].unflatten(1, (-1, 2))], 1)

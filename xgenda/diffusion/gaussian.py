r"""Gaussian posterior in closed form.

For x ~ N(mu, S) and y = H x + e, e ~ N(0, R), R diagonal,

    mean = mu + S H^T (H S H^T + R)^-1 (y - H mu),    cov = S - S H^T (H S H^T + R)^-1 H S.

Exact draws by Matheron's rule: s + S H^T (H S H^T + R)^-1 (y + e - H s) with s ~ N(mu, S), e ~ N(0, R). Everything is solved in
observation space; S H^T is made a block of rows at a time and never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xgenda.diffusion.covariances import Covariance
from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import ObservationError, OptionError

BLOCK_ELEMENTS = 2**23  # 64 MB of float64 a block
OBSERVATION_LIMIT = 20_000
WIDE = 32  # entries of a row above which the rows are a dense matrix: those of correlated observations, whitened, touch all places of a block


def factor_of(covariance: Tensor) -> Tensor:
    """Return the Cholesky factor of the covariance of observations.

    Raises
    ------
    ObservationError
        If it is not positive definite: observations that say the same with hardly any error.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed.any():
        raise ObservationError(
            "The covariance of the observations is not positive definite: some lie at one place with errors so small that they "
            "contradict each other. Merge such observations, or give larger errors: error={'t2m': 0.5}"
        )
    return factor


class GaussianPosterior:
    """The Gaussian conditioned on linear observations.

    Parameters
    ----------
    covariance
        S.
    indices, weights
        Rows of H, shape (m, k).
    variance
        Diagonal of R, shape (m,).
    """

    def __init__(self, covariance: Covariance, indices: Tensor, weights: Tensor, variance: Tensor) -> None:
        if len(variance) > OBSERVATION_LIMIT:
            raise OptionError(
                f"{len(variance)} observations at one time are more than the closed form solves ({OBSERVATION_LIMIT}); "
                f"thin them, for example obs.isel(obs=slice(None, None, {len(variance) // OBSERVATION_LIMIT + 1}))"
            )
        self.covariance = covariance
        self.weights = weights.double()
        self.indices = indices
        self._columns, inverse = torch.unique(indices, return_inverse=True)
        self._place = inverse.reshape(indices.shape)
        self._dense: Tensor | None = None
        if indices.shape[1] > WIDE:
            self._dense = torch.zeros(len(indices), len(self._columns), dtype=torch.float64)
            self._dense.scatter_add_(1, self._place, self.weights)
        inner = self._observe_columns(self._cross(self._columns))
        self._error = variance.double().sqrt()
        self._factor = factor_of(inner + torch.diag(variance.double()))

    def _cross(self, rows: Tensor) -> Tensor:
        """Return S H^T for some rows of the state, shape (rows, m)."""
        block = self.covariance.block(rows, self._columns)
        if self._dense is not None:
            return block @ self._dense.T
        out = torch.zeros(len(rows), len(self.indices), dtype=torch.float64)
        for j in range(self.indices.shape[1]):
            out += block[:, self._place[:, j]] * self.weights[:, j]
        return out

    def _observe_columns(self, values: Tensor) -> Tensor:
        """Apply H to arrays whose first axis runs over the observed columns only."""
        if self._dense is not None:
            return self._dense @ values
        out = torch.zeros(len(self.indices), values.shape[1], dtype=torch.float64)
        for j in range(self.indices.shape[1]):
            out += values[self._place[:, j]] * self.weights[:, j, None]
        return out

    @property
    def factor(self) -> Tensor:
        """The lower Cholesky factor of H S H^T + R, shape (m, m)."""
        return self._factor

    def observe(self, state: Tensor) -> Tensor:
        """Return H x for states (..., n), shape (..., m)."""
        if self._dense is not None:
            return state[..., self._columns].double() @ self._dense.T
        return (state[..., self.indices] * self.weights).sum(-1)

    def _rows(self) -> list[Tensor]:
        step = max(1, BLOCK_ELEMENTS // max(1, len(self._columns)))
        return list(torch.arange(self.covariance.size).split(step))

    def update(self, prior: Tensor, values: Tensor) -> Tensor:
        """Return prior + S H^T (H S H^T + R)^-1 (values - H prior) for states (s, n) and values (s, m) or (m,)."""
        departure = values.double() - self.observe(prior)
        solved = torch.cholesky_solve(departure.T, self._factor)
        return prior + torch.cat([(self._cross(rows) @ solved).T for rows in self._rows()], -1)

    def mean(self, prior_mean: Tensor, values: Tensor) -> Tensor:
        """Return the posterior mean, shape (n,)."""
        return self.update(prior_mean[None].double(), values)[0]

    def variance(self) -> Tensor:
        """Return the posterior variances, shape (n,)."""
        gain = [torch.linalg.solve_triangular(self._factor, self._cross(rows).T, upper=False) for rows in self._rows()]
        return self.covariance.diagonal() - torch.cat([(g**2).sum(0) for g in gain])

    def dense_covariance(self) -> Tensor:
        """Return the posterior covariance, shape (n, n); for small states."""
        rows = torch.arange(self.covariance.size)
        gain = torch.linalg.solve_triangular(self._factor, self._cross(rows).T, upper=False)
        out: Tensor = self.covariance.block(rows, rows) - gain.T @ gain
        return out

    def draw(self, prior_mean: Tensor, values: Tensor, noise: NoiseStream) -> Tensor:
        """Draw exact members, one per sample of `noise`, shape (samples, n)."""
        prior = prior_mean.double() + self.covariance.draw(noise)
        return self.update(prior, values + self._error * noise.normal(len(self._error), dtype=torch.float64))

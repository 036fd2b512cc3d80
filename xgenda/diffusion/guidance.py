r"""Likelihood guidance: from a prior denoiser and observations to a posterior denoiser.

For y ~ N(A x, R) the posterior score is approximated by

    score(x | y) = score(x) + grad_x log N(y; A xhat, R + V),   xhat = D(x; sigma),

so that D(x | y) = xhat + sigma^2 grad_x log N(...). The methods differ in V and in what is differentiated:

======== =========================================== ============================== ================================
name     V                                           gradient                       source
======== =========================================== ============================== ================================
sda      gamma sigma^2 diag(A A^T)                   through the network            Rozet & Louppe 2023, 2306.10574
mmps     A (sigma^2 dD/dx) A^T, by conjugate         through the network            Rozet et al. 2024, 2405.13712
         gradients
anchor   A C A^T, C = (S^-1 + sigma^-2 I)^-1         with respect to xhat only; J   exact for Gaussian priors
         of the anchor's covariance S                replaced by C / sigma^2
======== =========================================== ============================== ================================

Nothing is shared between samples: losses, norms and the iterations of the solver are per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xgenda.diffusion.covariances import LowRank
from xgenda.diffusion.denoisers import Denoiser
from xgenda.errors import OptionError, check_choice

GUIDANCES = ("anchor", "mmps", "sda")
SDA_GAMMA = 0.3
MMPS_ITERATIONS = 5


@dataclass(frozen=True, eq=False)
class Evidence:
    """Observations of `groups` different times, as tensors.

    An observation is ``sum_k weights * u(state[indices])`` in physical units, with u(z) = mean + std z, or its exponential minus
    `offset` for log-scaled channels. Shorter groups are padded with weight 0 and value 0, which observe nothing.

    Attributes
    ----------
    indices, weights, mean, std
        Shape (groups, m, k); indices into the flattened standardised state.
    log, offset
        Shape (groups, m, k) or None where no channel is log-scaled.
    value, variance
        Shape (groups, m), in physical units; variance is positive.
    """

    indices: Tensor
    weights: Tensor
    mean: Tensor
    std: Tensor
    value: Tensor
    variance: Tensor
    log: Tensor | None = None
    offset: Tensor | None = None

    def observe(self, state: Tensor, group: Tensor) -> Tensor:
        """Return the observed values of states (batch, n) that belong to `group` (batch,), shape (batch, m)."""
        index = self.indices[group]
        taken = state.gather(1, index.reshape(len(state), -1)).reshape(index.shape)
        taken = self.mean[group].to(state) + self.std[group].to(state) * taken
        if self.log is not None and self.offset is not None:
            taken = torch.where(self.log[group], taken.exp() - self.offset[group].to(state), taken)
        return (self.weights[group].to(state) * taken).sum(-1)

    def slope(self, state: Tensor, group: Tensor) -> Tensor:
        """Return the derivative of each observation with respect to each of its cells, shape (batch, m, k)."""
        index = self.indices[group]
        out = (self.weights[group] * self.std[group]).to(state)
        if self.log is not None:
            taken = state.gather(1, index.reshape(len(state), -1)).reshape(index.shape)
            grown = (self.mean[group].to(state) + self.std[group].to(state) * taken).exp()
            out = torch.where(self.log[group], out * grown, out)
        return out

    def gain(self) -> Tensor:
        """Return diag(A A^T) of the affine part, shape (groups, m)."""
        return ((self.weights * self.std) ** 2).sum(-1)

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Return per group the observed columns (c,) and the dense A restricted to them (m, c), for affine operators."""
        if self.log is not None:
            raise OptionError(
                "guidance='anchor' needs a linear operator, and a log-scaled variable makes it non-linear; use 'mmps'."
            )
        out = []
        for index, weight in zip(self.indices, self.weights * self.std, strict=True):
            columns, place = torch.unique(index, return_inverse=True)
            dense = torch.zeros(len(index), len(columns), dtype=torch.float64, device=index.device)
            dense.scatter_add_(1, place.reshape(index.shape), weight.double())
            out.append((columns, dense))
        return out


def guide(
    denoise: Denoiser,
    evidence: Evidence,
    group: Tensor,
    kind: str,
    *,
    anchor: LowRank | None = None,
    gamma: float = SDA_GAMMA,
    iterations: int = MMPS_ITERATIONS,
) -> Denoiser:
    """Return the posterior denoiser.

    Parameters
    ----------
    denoise
        Prior denoiser.
    evidence, group
        Observations, and which group of them each sample of the batch has, shape (batch,).
    kind
        One of 'anchor', 'mmps', 'sda'.
    anchor
        Covariance of the standardised state, needed by 'anchor'.
    gamma
        For 'sda'.
    iterations
        Conjugate-gradient iterations for 'mmps'.
    """
    check_choice("guidance", kind, GUIDANCES)
    if evidence.value.shape[1] == 0:
        return denoise
    if kind == "sda":
        return _Sda(denoise, evidence, group, gamma)
    if kind == "mmps":
        return _Mmps(denoise, evidence, group, iterations)
    if anchor is None:
        raise OptionError("guidance='anchor' needs a model with a Gaussian anchor, and this one has none; use guidance='sda'.")
    return _Anchor(denoise, evidence, group, anchor)


class _Sda:
    def __init__(self, denoise: Denoiser, evidence: Evidence, group: Tensor, gamma: float) -> None:
        self.denoise, self.evidence, self.group = denoise, evidence, group
        self.variance, self.spread = evidence.variance[group], gamma * evidence.gain()[group]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            clean = self.denoise(x, sigma)
            departure = self.evidence.value[self.group].to(x) - self.evidence.observe(clean.flatten(1), self.group)
            total = (self.variance + sigma**2 * self.spread).to(x)
            (score,) = torch.autograd.grad(-0.5 * (departure**2 / total).sum(), x)
        return (clean + sigma**2 * score).detach()


class _Mmps:
    r"""Solve (R + A sigma^2 J A^T) v = y - A xhat with J = dD/dx, symmetric for a true denoiser, then add sigma^2 J A^T v.

    The system is scaled by R^-1/2 on both sides, so that its eigenvalues start at 1.
    """

    def __init__(self, denoise: Denoiser, evidence: Evidence, group: Tensor, iterations: int) -> None:
        self.denoise, self.evidence, self.group, self.iterations = denoise, evidence, group, iterations
        self.error = evidence.variance[group].sqrt()

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            clean = self.denoise(x, sigma)
        state, error = clean.detach().flatten(1), self.error.to(x)
        index = self.evidence.indices[self.group].flatten(1)
        slope = self.evidence.slope(state, self.group)

        def forth(change: Tensor) -> Tensor:
            """Return R^-1/2 A' dx, with A' the derivative of the operator at the denoised state."""
            return (slope * change.flatten(1).gather(1, index).reshape(slope.shape)).sum(-1) / error

        def back(vector: Tensor) -> Tensor:
            """Return sigma^2 J A'^T R^-1/2 v."""
            upward = torch.zeros_like(state).scatter_add(1, index, (slope * (vector / error)[..., None]).flatten(1))
            (out,) = torch.autograd.grad(clean, x, upward.reshape(x.shape), retain_graph=True)
            return sigma**2 * out

        target = (self.evidence.value[self.group].to(x) - self.evidence.observe(state, self.group)) / error
        solution = conjugate_gradients(lambda v: v + forth(back(v)), target, self.iterations)
        return clean.detach() + back(solution)


class _Anchor:
    """x + C A^T (A C A^T + R)^-1 (y - A x): a linear solve in observation space per noise level and time, no backpropagation."""

    def __init__(self, denoise: Denoiser, evidence: Evidence, group: Tensor, anchor: LowRank) -> None:
        self.denoise, self.evidence, self.group, self.anchor = denoise, evidence, group, anchor
        self.matrices = evidence.matrices()
        self._gains: dict[float, list[Tensor]] = {}

    def _gain(self, sigma: float) -> list[Tensor]:
        """Return C A^T (A C A^T + R)^-1 of every group, each shape (n, m)."""
        if sigma not in self._gains:
            given = self.anchor.given_noise(sigma)
            out = []
            for (columns, dense), variance in zip(self.matrices, self.evidence.variance, strict=True):
                where = columns.cpu()
                observed = dense.cpu() @ given.factor[where]
                inner = (
                    (dense.cpu() * given.diagonal[where]) @ dense.cpu().T
                    + observed @ observed.T
                    + torch.diag(variance.double().cpu())
                )
                cross = given.factor @ observed.T
                cross[where] += given.diagonal[where, None] * dense.cpu().T
                factor = torch.linalg.cholesky(inner)
                out.append(torch.cholesky_solve(cross.T, factor).T)
            self._gains = {sigma: out} | dict(list(self._gains.items())[:1])  # Heun asks for each level twice in a row
        return self._gains[sigma]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        clean = self.denoise(x, sigma)
        departure = self.evidence.value[self.group].to(x) - self.evidence.observe(clean.flatten(1), self.group)
        out = clean.flatten(1).clone()
        for g, gain in enumerate(self._gain(sigma)):
            members = self.group == g
            if members.any():
                out[members] += departure[members] @ gain.T.to(x)
        return out.reshape(x.shape)


def conjugate_gradients(multiply: Callable[[Tensor], Tensor], target: Tensor, iterations: int) -> Tensor:
    """Solve a symmetric positive definite system per row of `target` (batch, m) with a fixed number of iterations.

    A row that has converged, or whose curvature is not positive (a network's Jacobian need not be symmetric), stops there;
    the other rows are not affected.
    """
    solution, residual = torch.zeros_like(target), target.clone()
    direction, power = residual.clone(), (residual**2).sum(-1, keepdim=True)
    start = power.clone()
    for _ in range(iterations):
        product = multiply(direction)
        curvature = (direction * product).sum(-1, keepdim=True)
        alive = (curvature > 0) & (power > 1e-12 * start) & torch.isfinite(curvature)
        rate = torch.where(alive, power / torch.where(alive, curvature, 1.0), 0.0)
        solution = solution + rate * direction
        residual = residual - rate * torch.where(alive, product, 0.0)
        following = (residual**2).sum(-1, keepdim=True)
        ratio = torch.where(alive, following / torch.where(power > 0, power, 1.0), 0.0)
        direction = torch.where(alive, residual + ratio * direction, direction)
        power = torch.where(alive, following, power)
    return solution

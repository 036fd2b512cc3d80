r"""The posterior in a latent space: most probable vectors, randomised ones, and Markov chains.

A state is x = g(z) + e, with z ~ N(0, I) and the decoder's error e ~ N(0, S); observations are y = A(x) + o, o ~ N(0, R). With e taken
out, the latent vector has

    -log p(z | y) = 1/2 |L^-1 (y - A(g(z)))|^2 + 1/2 |z|^2 + const.,    L L^T = R + A' S A'^T.

Its minimum is the latent form of 3D-Var. A randomised minimum, with y + L u for y and z - v for z in the second term, u and v standard
normal, is an exact draw where A g is linear (Kitanidis 1995; Oliver et al. 1996; Bardsley et al. 2014, SIAM J. Sci. Comput. 36, A1895-A1910),
and a proposal-free approximation elsewhere. Hamiltonian Monte Carlo (Neal 2011, arXiv 1206.1901) is right everywhere; it moves in the
coordinates in which the Gauss-Newton Hessian of the minimum is the identity.

Everything is per sample: step sizes, convergence and acceptance of a sample depend on nothing but the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xgenda.diffusion.evidence import Evidence, Tangent
from xgenda.diffusion.noise import NoiseStream

MEMORY = 12  # pairs of L-BFGS
HALVINGS = 10  # of a step, before a sample counts as converged
ARMIJO = 1e-4
FEWEST, PATIENCE = 100, 20  # steps of Adam before it may end, and without a lower loss
ACCEPTANCE = 0.8  # that step sizes are adapted to
JITTER = (0.7, 1.3)  # of the step size from one trajectory to the next, so that none is periodic

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]
Done = Callable[[], None]


class Whitener(Protocol):
    """L^-1 for the departures of every sample."""

    def __call__(self, departures: Tensor) -> Tensor:
        """Return L^-1 d for departures (batch, m)."""
        ...

    def transposed(self, vector: Tensor) -> Tensor:
        """Return L^-T v for vectors (batch, m)."""
        ...

    def coloured(self, white: Tensor) -> Tensor:
        """Return L u for standard normal numbers (batch, m)."""
        ...


@dataclass(frozen=True, eq=False)
class Diagonal:
    """L of independent errors.

    Attributes
    ----------
    deviation
        Standard deviations, shape (batch or 1, m).
    """

    deviation: Tensor

    def __call__(self, departures: Tensor) -> Tensor:
        """Return departures over their standard deviations."""
        return departures / self.deviation

    def transposed(self, vector: Tensor) -> Tensor:
        """Return the same: L is diagonal."""
        return vector / self.deviation

    def coloured(self, white: Tensor) -> Tensor:
        """Return errors."""
        return white * self.deviation


@dataclass(frozen=True, eq=False)
class Factored:
    """L of correlated errors, of several groups of samples.

    Attributes
    ----------
    factors
        Lower triangular, shape (groups, m, m).
    group
        Of each sample.
    """

    factors: Tensor
    group: Tensor

    def __call__(self, departures: Tensor) -> Tensor:
        """Return L^-1 d."""
        return self._solved(departures, self.factors, upper=False)

    def transposed(self, vector: Tensor) -> Tensor:
        """Return L^-T v."""
        return self._solved(vector, self.factors.transpose(1, 2), upper=True)

    def _solved(self, vector: Tensor, factors: Tensor, *, upper: bool) -> Tensor:
        out = torch.zeros_like(vector)
        for g, factor in enumerate(factors):
            rows = torch.nonzero(self.group == g)[:, 0]
            solved = torch.linalg.solve_triangular(factor, vector[rows].T, upper=upper).T
            out = out.index_copy(0, rows, solved)
        return out

    def coloured(self, white: Tensor) -> Tensor:
        """Return L u."""
        out = torch.zeros_like(white)
        for g, factor in enumerate(self.factors):  # a factor for each sample would not fit into memory
            rows = torch.nonzero(self.group == g)[:, 0]
            out[rows] = white[rows] @ factor.T
        return out


@dataclass(frozen=True, eq=False)
class Posterior:
    """The negative logarithm of the posterior density of latent vectors, up to a constant, and its gradient.

    Attributes
    ----------
    decode
        g, from (batch, k) to flat states (batch, n).
    evidence
        Observations of every sample.
    whiten
        L^-1.
    likelihood, scale
        'gaussian', 'student-t' or 'huber', with degrees of freedom or threshold; see `xgenda.diffusion.evidence.reweighted`.
    prior
        Whether the latent prior N(0, I) counts.
    published
        Whether the misfit is the mean of the squares (Brohan 2022), instead of half their sum.
    value, centre
        Observations and prior means instead of those of the evidence and zero, for randomised minima; shapes (batch, m) and (batch, k).
    """

    decode: Callable[[Tensor], Tensor]
    evidence: Evidence
    whiten: Whitener
    likelihood: str = "gaussian"
    scale: float = 0.0
    prior: bool = True
    published: bool = False
    value: Tensor | None = None
    centre: Tensor | None = None

    def energy(self, z: Tensor) -> Tensor:
        """Return the negative log-density of each sample, shape (batch,)."""
        seen = self.evidence.observe(self.decode(z))
        departures = (self.evidence.value if self.value is None else self.value).to(seen) - seen
        real = self.evidence.seen().to(departures.device)
        departures = torch.where(real, departures, 0.0)
        if self.published:
            out = self.whiten(departures).square().sum(1) / real.sum(1).clamp(min=1)
        else:
            out = self._misfit(self.whiten(departures).square()).sum(1)
        if self.prior:
            out = out + 0.5 * (z if self.centre is None else z - self.centre).square().sum(1)
        return out

    def _misfit(self, squares: Tensor) -> Tensor:
        """Return the negative log-density of standardised errors, given their squares."""
        if self.likelihood == "student-t":
            return 0.5 * (self.scale + 1) * torch.log1p(squares / self.scale)
        if self.likelihood == "huber":
            size = squares.clamp(min=1e-30).sqrt()
            return torch.where(size <= self.scale, 0.5 * squares, self.scale * size - 0.5 * self.scale**2)
        return 0.5 * squares

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies (batch,) and their gradients (batch, k)."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            energy = self.energy(leaf)
            (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return energy.detach(), gradient

    def curvature(self, z: Tensor) -> Tensor:
        """Return the Gauss-Newton Hessian of each sample at z, shape (batch, k, k); of a heavy-tailed likelihood that of its core."""
        columns, real = [], self.evidence.seen().to(z.device)
        state, decoder = linearised(self.decode, z)
        tangent = self.evidence.tangent(state)
        for k in range(z.shape[1]):
            along = torch.zeros_like(z)
            along[:, k] = 1.0
            columns.append(self.whiten(torch.where(real, tangent.forth(decoder.forth(along)), 0.0)))
        jacobian = torch.stack(columns, -1).detach()
        return jacobian.transpose(1, 2) @ jacobian + torch.eye(z.shape[1], dtype=z.dtype, device=z.device)


class Decoded:
    """Observations of states seen from their latent vectors, with errors of variance 1: L^-1 y = L^-1 A(g(z)) + o.

    An `xgenda.diffusion.evidence.Evidence`, so that everything which conditions a diffusion of states conditions one of latent vectors.

    Parameters
    ----------
    decode
        g, from (batch, k) to flat states (batch, n).
    evidence
        Observations of every state.
    whiten
        L^-1.
    slopes
        Derivative of L^-1 A(g(z)) at the middle of the latent space, by component, shape (batch, m, k).
    linear
        Whether g is affine.
    """

    def __init__(
        self, decode: Callable[[Tensor], Tensor], evidence: Evidence, whiten: Whitener, slopes: Tensor, *, linear: bool = False
    ) -> None:
        self.decode, self.evidence, self.whiten, self.slopes = decode, evidence, whiten, slopes
        self.linear = linear and evidence.linear
        self.value = whiten(evidence.value.double().expand(len(slopes), -1))
        self.variance = torch.ones_like(self.value)

    def observe(self, state: Tensor) -> Tensor:
        """Return L^-1 A(g(z)), shape (batch, m)."""
        return self.whiten(self.evidence.observe(self.decode(state)))

    def tangent(self, state: Tensor) -> Tangent:
        """Return the derivative at some latent vectors, by automatic differentiation of the decoder."""
        decoded, decoder = linearised(self.decode, state)
        inner = self.evidence.tangent(decoded)

        def forth(change: Tensor) -> Tensor:
            return self.whiten(inner.forth(decoder.forth(change)))

        def back(vector: Tensor) -> Tensor:
            return decoder.back(inner.back(self.whiten.transposed(vector.to(decoded))))

        return Tangent(forth, back)

    def gain(self, state: Tensor) -> Tensor:
        """Return diag(A' A'^T) at the middle of the latent space."""
        return self.slopes.square().sum(-1)

    def seen(self) -> Tensor:
        """Return which observations are real."""
        return self.evidence.seen()

    def unit(self) -> Tensor:
        """Return what one standard deviation of the latent vectors is in each observation, 1 where it is nothing."""
        total = self.gain(self.value).sqrt()
        return torch.where(total > 0, total, 1.0)


def linearised(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tangent]:
    """Return a function of vectors (batch, k) at z, and its derivative there, by automatic differentiation."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        value = function(leaf)
        dual = torch.zeros_like(value, requires_grad=True)
        # J^T v is linear in v, so its own derivative with respect to v is J; torch's forward mode takes seconds to load
        (pulled,) = torch.autograd.grad(value, leaf, dual, create_graph=True)

    def forth(change: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(pulled, dual, change.to(pulled), retain_graph=True)
        return out

    def back(vector: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(value, leaf, vector, retain_graph=True)
        return out

    return value.detach(), Tangent(forth, back)


def most_probable(function: Gradient, candidates: Tensor) -> Tensor:
    """Return the candidate with the lowest value of each sample, shape (batch, k), of candidates (tries, batch, k): where a search begins.

    Of several valleys a search finds that in which it begins.
    """
    values = torch.stack([function(z)[0] for z in candidates])
    best = torch.nan_to_num(values, nan=math.inf).argmin(0)
    return candidates[best, torch.arange(candidates.shape[1], device=candidates.device)]


def lbfgs(function: Gradient, start: Tensor, steps: int, tolerance: float = 1e-5, done: Done | None = None) -> Tensor:
    """Minimise each sample's function by L-BFGS (Nocedal and Wright 2006, algorithms 7.4 and 3.1).

    Parameters
    ----------
    function
        Returns values (batch,) and gradients (batch, k).
    start
        Shape (batch, k).
    steps
        At most.
    tolerance
        Relative decrease of a step below which a sample has converged.
    done
        Called after each step.
    """
    z, (value, gradient) = start.clone(), function(start)
    active = torch.ones(len(z), dtype=torch.bool, device=z.device)
    moves: list[tuple[Tensor, Tensor, Tensor]] = []  # changes of z and of the gradient, and 1 over their product or zero
    scale = 1.0 / gradient.norm(dim=1).clamp(min=1.0)
    for _ in range(steps):
        if bool(active.any()):
            direction = -_inverse_hessian(gradient, moves, scale)
            slope = (direction * gradient).sum(1)
            uphill = slope >= 0
            direction = torch.where(uphill[:, None], -gradient, direction)
            slope = torch.where(uphill, -gradient.square().sum(1), slope)
            # half the slope is what a quadratic would lose; below the tolerance it is the rounding of the network that is searched
            active = active & (-0.5 * slope > tolerance * (1 + value.abs()))
            step, searching = torch.ones_like(value), active
            new, new_value, new_gradient = z.clone(), value.clone(), gradient.clone()
            for _ in range(HALVINGS):
                if not bool(searching.any()):
                    break
                trial = torch.where(searching[:, None], z + step[:, None] * direction, new)
                found, slopes = function(trial)
                good = searching & (found <= value + ARMIJO * step * slope)
                new = torch.where(good[:, None], trial, new)
                new_value, new_gradient = torch.where(good, found, new_value), torch.where(good[:, None], slopes, new_gradient)
                searching, step = searching & ~good, step / 2
            change, turned = new - z, new_gradient - gradient
            product = (change * turned).sum(1)
            sound = product > 1e-12 * turned.square().sum(1)
            moves = [*moves, (change, turned, torch.where(sound, 1 / torch.where(sound, product, 1.0), 0.0))][-MEMORY:]
            scale = torch.where(sound, product / turned.square().sum(1).clamp(min=1e-300), scale)
            active = active & (value - new_value > tolerance * (1 + value.abs()))
            z, value, gradient = new, new_value, new_gradient
        if done is not None:
            done()
    return z


def _inverse_hessian(gradient: Tensor, moves: list[tuple[Tensor, Tensor, Tensor]], scale: Tensor) -> Tensor:
    """Return the estimate of H^-1 g by the two loops over what was seen of H."""
    out, parts = gradient, []
    for change, turned, weight in reversed(moves):
        part = weight * (change * out).sum(1)
        out = out - part[:, None] * turned
        parts.append(part)
    out = scale[:, None] * out
    for (change, turned, weight), part in zip(moves, reversed(parts), strict=True):
        out = out + (part - weight * (turned * out).sum(1))[:, None] * change
    return out


def adam(
    function: Gradient, start: Tensor, steps: int, rate: float = 0.05, tolerance: float = 1e-5, done: Done | None = None
) -> Tensor:
    """Minimise each sample's function by Adam (Kingma and Ba 2015), as published for the search of a latent space (Brohan 2022).

    A sample ends where its lowest value has not decreased by `tolerance`, relative to itself, in `PATIENCE` steps, and not before
    `FEWEST`. The other parameters are those of `lbfgs`, and `rate` is the size of the steps.
    """
    z, best = start.clone(), start.clone()
    lowest = torch.full(start.shape[:1], math.inf, dtype=start.dtype, device=start.device)
    waited, active = torch.zeros_like(lowest), torch.ones_like(lowest, dtype=torch.bool)
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    for t in range(1, steps + 1):
        if bool(active.any()):
            value, gradient = function(z)
            better = active & (value < lowest)
            enough = active & ~(value > lowest - tolerance * (1 + lowest.abs()).clamp(max=1e300))
            best, lowest = torch.where(better[:, None], z, best), torch.where(better, value, lowest)
            waited = torch.where(enough, 0.0, waited + 1)
            active = active & ((waited < PATIENCE) | (t < FEWEST))
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
            move = rate * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            z = torch.where(active[:, None], z - move, z)
        if done is not None:
            done()
    return best


def hamiltonian(
    function: Gradient, start: Tensor, noise: NoiseStream, steps: int, leapfrog: int = 8, done: Done | None = None
) -> tuple[Tensor, Tensor]:
    """Draw from exp(-function) by Hamiltonian Monte Carlo, one chain per sample.

    Parameters
    ----------
    function
        As for `lbfgs`; best where its Hessian is about the identity, in which a trajectory turns by a quarter.
    start
        Shape (batch, k).
    noise
        One stream per chain.
    steps
        Trajectories. In the first half the size of the leapfrog steps is adapted, for each chain on its own.
    leapfrog
        Steps of a trajectory; 1 is the Langevin algorithm (MALA).
    done
        Called after each trajectory.

    Returns
    -------
    tuple
        The last vectors (batch, k), and the part of the proposals that was accepted in the second half, shape (batch,).
    """
    u, (value, gradient) = start.clone(), function(start)
    size = torch.full_like(value, math.pi / 2 / leapfrog if leapfrog > 1 else 1.0)
    taken, counted = torch.zeros_like(value), 0
    for t in range(steps):
        momentum, chances = (noise.normal(n, dtype=torch.float64).to(u) for n in (u.shape[1], 2))
        jitter, chance = torch.special.ndtr(chances).unbind(1)
        step = (size * (JITTER[0] + (JITTER[1] - JITTER[0]) * jitter))[:, None]
        energy = value + 0.5 * momentum.square().sum(1)
        at, slope, found, p = u, gradient, value, momentum
        for _ in range(leapfrog):
            p = p - 0.5 * step * slope
            at = at + step * p
            found, slope = function(at)
            p = p - 0.5 * step * slope
        excess = torch.nan_to_num(found + 0.5 * p.square().sum(1) - energy, nan=math.inf)
        accept = (-excess).clamp(max=0.0).exp()
        good = chance < accept
        u, gradient = torch.where(good[:, None], at, u), torch.where(good[:, None], slope, gradient)
        value = torch.where(good, found, value)
        if t < steps // 2:
            size = size * torch.exp((accept - ACCEPTANCE) / math.sqrt(t + 1))
            size = size.clamp(max=math.pi / 2 / leapfrog if leapfrog > 1 else 2.0)
        else:
            taken, counted = taken + good.to(taken), counted + 1
        if done is not None:
            done()
    return u, taken / max(1, counted)

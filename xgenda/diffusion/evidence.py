r"""Evidence: observations y = A(x) + e of a batch of states, e with known variance, as tensors.

States are flat, shape (batch, n). What a guidance needs of the operator A is `observe` and its derivative at a state in both
directions (`Tangent`); nothing differentiates through A itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from xgenda.errors import OptionError

NARROW = 8  # cells per observation up to which padded rows beat a sparse matrix


@dataclass(frozen=True, eq=False)
class Tangent:
    """The derivative A' of the operator at some states.

    Attributes
    ----------
    forth
        A' dx, from (batch, n) to (batch, m).
    back
        A'^T v, from (batch, m) to (batch, n).
    """

    forth: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


class Evidence(Protocol):
    """Observations of every sample of a batch."""

    @property
    def value(self) -> Tensor:
        """y, shape (batch, m)."""
        ...

    @property
    def variance(self) -> Tensor:
        """Variance of the observation error, shape (batch, m)."""
        ...

    @property
    def linear(self) -> bool:
        """Whether A is affine, with the same A' at all states."""
        ...

    def observe(self, state: Tensor) -> Tensor:
        """Return A(x), shape (batch, m)."""
        ...

    def tangent(self, state: Tensor) -> Tangent:
        """Return the derivative at `state`."""
        ...

    def gain(self, state: Tensor) -> Tensor:
        """Return diag(A' A'^T) at `state`, shape (batch, m)."""
        ...

    def seen(self) -> Tensor:
        """Return which observations are real and which only pad a shorter list, shape (1 or batch, m), bool."""
        ...

    def unit(self) -> Tensor:
        """Return what one climatological standard deviation of the state is in each observation, shape (1 or batch, m)."""
        ...


@dataclass(frozen=True, eq=False)
class LinearEvidence:
    """Observations of `groups` different times.

    An observation is ``sum_k weights * u(state[indices])`` in physical units, with u(z) = mean + std z, or its exponential minus
    `offset` for log-scaled channels. Shorter groups are padded with weight 0 and value 0, which observe nothing.

    Attributes
    ----------
    indices, weights, mean, std
        Shape (groups, m, k); indices into the flattened standardised state.
    log, offset
        Shape (groups, m, k) or None where no channel is log-scaled.
    values, variances
        Shape (groups, m), in physical units; variances are positive.
    group
        Which group each sample of the batch has, shape (batch,).
    """

    indices: Tensor
    weights: Tensor
    mean: Tensor
    std: Tensor
    values: Tensor
    variances: Tensor
    group: Tensor
    log: Tensor | None = None
    offset: Tensor | None = None
    _cache: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)

    @property
    def value(self) -> Tensor:
        """Y per sample."""
        return self.values[self.group]

    @property
    def variance(self) -> Tensor:
        """Error variance per sample."""
        return self.variances[self.group]

    @property
    def linear(self) -> bool:
        """Whether no channel is log-scaled."""
        return self.log is None

    def to(self, device: torch.device) -> LinearEvidence:
        """Return the same on a device."""
        parts = {k: v for k, v in vars(self).items() if k != "_cache"}
        moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in parts.items()}
        return LinearEvidence(**moved)

    def _take(self, state: Tensor) -> Tensor:
        """Return the observed cells, shape (batch, m, k)."""
        if len(self.indices) == 1:
            return state[:, self.indices[0]]
        index = self.indices[self.group]
        return state.gather(1, index.flatten(1)).reshape(index.shape)

    def _of(self, part: Tensor, like: Tensor) -> Tensor:
        """Return a (groups, m, k) array for every sample, broadcast where there is one group."""
        return (part if len(part) == 1 else part[self.group]).to(like)

    def _sparse(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return per group A and A^T as sparse matrices and what they observe of the climatology; for wide rows."""
        if not self._cache:
            weights = (self.weights * self.std).double()
            for index, weight, constant in zip(self.indices, weights, (self.weights * self.mean).double().sum(-1), strict=True):
                row, place = torch.nonzero(weight, as_tuple=True)
                where, size = torch.stack([row, index[row, place]]), (len(index), int(self.indices.max()) + 1)
                matrix = torch.sparse_coo_tensor(where, weight[row, place], size, check_invariants=False).coalesce()
                self._cache.append((matrix, matrix.t().coalesce(), constant))
        return self._cache

    def _multiply(self, which: int, vector: Tensor, columns: int) -> Tensor:
        """Return A x (0) or A^T v (1) for the rows of `vector`, group by group."""
        out = torch.zeros(len(vector), columns, dtype=torch.float64, device=vector.device)
        for g, matrices in enumerate(self._sparse()):
            members = torch.nonzero(self.group == g)[:, 0] if len(self.indices) > 1 else slice(None)
            matrix, part = matrices[which], vector[members].double()
            out[members, : matrix.shape[0]] = torch.sparse.mm(matrix, part[:, : matrix.shape[1]].T).T
        return out.to(vector)

    @property
    def _wide(self) -> bool:
        return self.log is None and self.indices.shape[-1] > NARROW

    def observe(self, state: Tensor) -> Tensor:
        """Return the observed values, shape (batch, m)."""
        if self._wide:
            constant = torch.stack([c for _, _, c in self._sparse()])[self.group]
            return self._multiply(0, state, self.indices.shape[1]) + constant.to(state)
        taken = self._of(self.mean, state) + self._of(self.std, state) * self._take(state)
        if self.log is not None and self.offset is not None:
            log = self._of(self.log, state) > 0
            taken = torch.where(log, taken.exp() - self._of(self.offset, state), taken)
        return (self._of(self.weights, state) * taken).sum(-1)

    def slope(self, state: Tensor) -> Tensor:
        """Return the derivative of each observation with respect to each of its cells, shape (batch or 1, m, k)."""
        out = self._of(self.weights * self.std, state)
        if self.log is not None:
            grown = (self._of(self.mean, state) + self._of(self.std, state) * self._take(state)).exp()
            out = torch.where(self._of(self.log, state) > 0, out * grown, out)
        return out

    def tangent(self, state: Tensor) -> Tangent:
        """Return the derivative, by gather and scatter."""
        if self._wide:
            rows, columns = self.indices.shape[1], state.shape[1]
            return Tangent(lambda change: self._multiply(0, change, rows), lambda vector: self._multiply(1, vector, columns))
        slope, shape = self.slope(state), state.shape
        index = self.indices if len(self.indices) == 1 else self.indices[self.group]

        def forth(change: Tensor) -> Tensor:
            return (slope.to(change) * self._take(change)).sum(-1)

        def back(vector: Tensor) -> Tensor:
            entries = (slope.to(vector) * vector[..., None]).flatten(1)
            return torch.zeros(shape, dtype=vector.dtype, device=vector.device).scatter_add(
                1, index.flatten(1).expand(len(entries), -1), entries
            )

        return Tangent(forth, back)

    def gain(self, state: Tensor) -> Tensor:
        """Return diag(A' A'^T), taking the cells of one observation to be different."""
        return (self.slope(state) ** 2).sum(-1).expand(len(state), -1)

    def seen(self) -> Tensor:
        """Return where an observation has a weight."""
        return (self.weights != 0).any(-1)[self.group]

    def sharpness(self) -> Tensor:
        """Return the precision that the observations of each group give to the cell they know best, shape (groups,).

        The largest element of diag(A^T R^-1 A), in inverse squares of climatological standard deviations.
        """
        parts = (self.weights * self.std).double().square() / self.variances.double()[..., None]
        out = parts.new_zeros(len(parts), int(self.indices.max()) + 1 if self.indices.numel() else 1)
        return out.scatter_add(1, self.indices.flatten(1), parts.flatten(1)).amax(1)

    def contrast(self) -> Tensor:
        """Return the median ratio of the state's climatological variance at an observation to that of its error, shape (groups,); 0: none."""
        gain = (self.weights * self.std).double().square().sum(-1)
        ratio = torch.where(gain > 0, gain / self.variances.double(), torch.nan)
        return torch.nan_to_num(ratio.nanmedian(1).values) if ratio.shape[1] else gain.new_zeros(len(gain))

    def unit(self) -> Tensor:
        """Return the sum of the absolute weights in units of the state; 1 where nothing is observed."""
        total = (self.weights * self.std).abs().sum(-1)[self.group]
        return torch.where(total > 0, total, 1.0)

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Return per group the observed columns (c,) and the dense A restricted to them (m, c), for affine operators."""
        if self.log is not None:
            raise OptionError("A log-scaled variable makes the operator non-linear; it has no matrix.")
        out = []
        for index, weight in zip(self.indices, self.weights * self.std, strict=True):
            columns, place = torch.unique(index, return_inverse=True)
            dense = torch.zeros(len(index), len(columns), dtype=torch.float64, device=index.device)
            dense.scatter_add_(1, place.reshape(index.shape), weight.double())
            out.append((columns, dense))
        return out


class FunctionEvidence:
    """Observations through any differentiable torch function, the same for all samples.

    Parameters
    ----------
    function
        A, from states (batch, *event) to (batch, m); it must treat the samples independently.
    event
        Shape of one state.
    value, variance
        Shape (m,) or (batch, m).
    linear
        Whether A is affine.

    Raises
    ------
    OptionError
        If the function returns another shape or no gradient.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        event: Sequence[int],
        value: Tensor,
        variance: Tensor | float,
        *,
        linear: bool = False,
    ) -> None:
        self.function, self.event, self.linear = function, tuple(event), linear
        self._value: Tensor = torch.atleast_2d(value)
        self._variance: Tensor = torch.atleast_2d(torch.as_tensor(variance, dtype=value.dtype)).expand(*self._value.shape)
        probe = torch.zeros(2, *self.event, dtype=value.dtype, requires_grad=True)
        with torch.enable_grad():
            found = function(probe)
        shape = tuple(getattr(found, "shape", ())) if isinstance(found, Tensor) else type(found).__name__  # type: ignore[redundant-expr]
        if shape != (2, self._value.shape[1]):
            raise OptionError(
                f"The operator returned {shape} for 2 states of shape {self.event}; expected a tensor of shape "
                f"{(2, self._value.shape[1])}, one row of observations per state."
            )
        if not found.requires_grad:
            raise OptionError(
                "The operator returned a tensor without gradient; use torch functions on the state, without .detach()."
            )
        self._gain = self._mean_gain()

    @property
    def value(self) -> Tensor:
        """y, broadcast over the batch."""
        return self._value

    @property
    def variance(self) -> Tensor:
        """Error variance, broadcast over the batch."""
        return self._variance

    def observe(self, state: Tensor) -> Tensor:
        """Return A(x)."""
        return self.function(state.reshape(-1, *self.event))

    def tangent(self, state: Tensor) -> Tangent:
        """Return the derivative, by automatic differentiation."""
        fixed = state.detach()
        with torch.enable_grad():
            leaf = fixed.clone().requires_grad_(True)
            seen = self.observe(leaf)
            dual = torch.zeros_like(seen, requires_grad=True)
            # A'^T v is linear in v, so its own derivative with respect to v is A'
            (pulled,) = torch.autograd.grad(seen, leaf, dual, create_graph=True)

        def forth(change: Tensor) -> Tensor:
            if not pulled.requires_grad:  # no observation depends on the state here
                return torch.zeros_like(seen)
            (out,) = torch.autograd.grad(pulled, dual, change.to(pulled), retain_graph=True)
            return out

        def back(vector: Tensor) -> Tensor:
            (out,) = torch.autograd.grad(seen, leaf, vector.to(seen), retain_graph=True)
            return out

        return Tangent(forth, back)

    def gain(self, state: Tensor) -> Tensor:
        """Return the average of diag(A' A'^T) over standard normal states."""
        return self._gain.to(state).expand(len(state), -1)

    def seen(self) -> Tensor:
        """Return that every observation is real."""
        return torch.ones_like(self._value, dtype=torch.bool)

    def unit(self) -> Tensor:
        """Return ones: the units of the observations are those of the state."""
        return torch.ones_like(self._value)

    def _mean_gain(self, probes: int = 64) -> Tensor:
        """Estimate the gain with random signs s: E[s o A' A'^T s]; exact where rows do not overlap."""
        generator = torch.Generator().manual_seed(0)
        size = 1
        for n in self.event:
            size *= n
        states = torch.randn(probes, size, generator=generator).to(self._value)
        signs = (torch.randint(0, 2, (probes, self._value.shape[1]), generator=generator) * 2 - 1).to(self._value)
        tangent = self.tangent(states)
        found = (tangent.forth(tangent.back(signs)) * signs).mean(0)
        return found.clamp(min=0.1 * float(found.mean()))[None]


class JointEvidence:
    """Several sources at once, each with its own operator and errors."""

    def __init__(self, parts: Sequence[Evidence]) -> None:
        if not parts:
            raise OptionError("Joint evidence needs at least one part.")
        self.parts = tuple(parts)
        self.linear = all(p.linear for p in parts)

    @property
    def value(self) -> Tensor:
        """The parts' values one after the other."""
        return _side_by_side([p.value for p in self.parts])

    @property
    def variance(self) -> Tensor:
        """The parts' variances one after the other."""
        return _side_by_side([p.variance for p in self.parts])

    def observe(self, state: Tensor) -> Tensor:
        """Return the parts' observations one after the other."""
        return torch.cat([p.observe(state) for p in self.parts], 1)

    def tangent(self, state: Tensor) -> Tangent:
        """Return the derivative of all parts."""
        tangents = [p.tangent(state) for p in self.parts]
        sizes = [p.value.shape[1] for p in self.parts]

        def forth(change: Tensor) -> Tensor:
            return torch.cat([t.forth(change) for t in tangents], 1)

        def back(vector: Tensor) -> Tensor:
            pieces = [t.back(v) for t, v in zip(tangents, vector.split(sizes, 1), strict=True)]
            return torch.stack(pieces).sum(0)

        return Tangent(forth, back)

    def gain(self, state: Tensor) -> Tensor:
        """Return the parts' gains one after the other."""
        return torch.cat([p.gain(state) for p in self.parts], 1)

    def seen(self) -> Tensor:
        """Return which observations of the parts are real."""
        return _side_by_side([p.seen() for p in self.parts])

    def unit(self) -> Tensor:
        """Return the parts' units one after the other."""
        return _side_by_side([p.unit() for p in self.parts])


def _side_by_side(found: Sequence[Tensor]) -> Tensor:
    rows = max(len(f) for f in found)
    return torch.cat([f.expand(rows, -1) for f in found], 1)


def reweighted(likelihood: str, departure: Tensor, error: Tensor, expected: Tensor, scale: float) -> Tensor:
    r"""Return the error variance that a heavy-tailed likelihood gives observations with this departure.

    A Student-t or Huber error is a Gaussian whose variance depends on how surprising the value is (Lange, Little and Taylor
    1989, J. Am. Stat. Assoc. 84, 881-896, eq. 3; Huber 1964): R / w with, for u = departure / sqrt(expected),
    w = (nu + 1) / (nu + u^2) or w = min(1, k / abs(u)). `expected` holds R plus the variance of the estimate at this noise level,
    so that nothing is suspect while the state is still unknown.

    Parameters
    ----------
    likelihood
        'gaussian', 'student-t' or 'huber'.
    departure, error, expected
        y - A(xhat), R, and R + V; shape (batch, m).
    scale
        nu or k.
    """
    if likelihood == "gaussian":
        return error
    surprise = departure.square() / expected
    weight = (scale + 1) / (scale + surprise) if likelihood == "student-t" else (scale / surprise.sqrt()).clamp(max=1.0)
    return error / weight

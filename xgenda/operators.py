"""Observed quantities that are functions of the state: wind speed and direction, logarithms, anything in torch.

An operator turns fields of the state into a field of what is observed; `assimilate(..., operators={"wind_speed": ...})` then interpolates it
to the places of the observations called ``wind_speed``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xgenda.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

CALM = 1e-3  # m s-1: below it speed and direction are smoothed, so that their gradients stay finite


@dataclass(frozen=True)
class Operator:
    """A function of some variables of the state.

    Parameters
    ----------
    variables
        Names of the variables that it takes, in order.
    function
        From their fields, tensors of shape (..., rows, columns) in the units of the state, to one such field. It must be made of
        torch functions and treat leading dimensions independently.
    units
        Of what it returns; observations are converted to them.
    standard_name
        CF name of what it returns, by which observations may be found and bounds are known.
    """

    variables: tuple[str, ...]
    function: Callable[..., Tensor]
    units: str | None = None
    standard_name: str | None = None

    def __call__(self, *fields: Tensor) -> Tensor:
        """Return the field of what is observed."""
        return self.function(*fields)

    def check(self, name: str, shape: tuple[int, int], known: Sequence[str]) -> None:
        """Try the function on two states.

        Raises
        ------
        OptionError
            If it needs variables that the state lacks, or returns another shape, another type, or no gradient.
        """
        import torch

        lacking = [v for v in self.variables if v not in known]
        if lacking:
            raise OptionError(
                f"operators[{name!r}] needs {lacking[0]!r}, which is no variable of the state; it has {', '.join(map(repr, known))}."
            )
        generator = torch.Generator().manual_seed(0)
        fields = [
            (1.0 + 0.1 * torch.rand(2, *shape, generator=generator, dtype=torch.float64)).requires_grad_(True)
            for _ in self.variables
        ]
        found: Any
        try:
            found = self.function(*fields)
        except Exception as problem:
            raise OptionError(f"operators[{name!r}] failed on fields of shape {(2, *shape)}: {problem}") from problem
        kind = (
            f"shape {tuple(found.shape)}"
            if isinstance(found, torch.Tensor)
            else f"a {type(found).__module__}.{type(found).__name__}"
        )
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != (2, *shape):
            raise OptionError(
                f"operators[{name!r}] returned {kind} for fields of shape {(2, *shape)}; a tensor of that shape is needed."
            )
        if not found.requires_grad:
            raise OptionError(
                f"operators[{name!r}] returned a tensor without gradient; use torch functions on the fields, without .detach() or .numpy()."
            )
        slopes: tuple[Any, ...] = torch.autograd.grad(found.sum(), fields, allow_unused=True)
        if not all(s is None or bool(torch.isfinite(s).all()) for s in slopes):
            raise OptionError(
                f"operators[{name!r}] has a gradient that is not finite; add a small number under roots and logarithms."
            )


def function(
    function: Callable[..., Tensor], variables: Sequence[str], *, units: str | None = None, standard_name: str | None = None
) -> Operator:
    """Make an operator of any torch function; see `Operator`.

    Examples
    --------
    >>> import xgenda
    >>> density = xgenda.operators.function(lambda t, s: 1027 - 0.15 * (t - 10) + 0.78 * (s - 35), ("temperature", "salinity"))
    >>> density.variables
    ('temperature', 'salinity')
    """
    if not callable(function):
        raise OptionError(f"function={function!r} cannot be called; give a function of {len(variables)} tensors.")
    names = (variables,) if isinstance(variables, str) else tuple(variables)
    return Operator(names, function, units, standard_name)


def wind_speed(u: str, v: str, *, units: str = "m s-1") -> Operator:
    """Return sqrt(u^2 + v^2), with a finite gradient where there is no wind.

    Parameters
    ----------
    u, v
        Names of the components.
    units
        Theirs.
    """
    return Operator((u, v), _speed, units, "wind_speed")


def _speed(u: Tensor, v: Tensor) -> Tensor:
    return (u.square() + v.square() + CALM**2).sqrt()


def wind_direction(u: str, v: str, *, part: str) -> Operator:
    """Return the sine or the cosine of the direction from which the wind comes: the angle itself jumps at north.

    Parameters
    ----------
    u, v
        Names of the components.
    part
        'sine' (of the direction: positive from the east) or 'cosine' (positive from the north).
    """
    if part not in ("sine", "cosine"):
        raise OptionError(f"part={part!r} is not accepted; choose 'sine' or 'cosine'.")
    return Operator((u, v), _Direction(part), "1", None)


@dataclass(frozen=True)
class _Direction:
    part: str

    def __call__(self, u: Tensor, v: Tensor) -> Tensor:
        return -(u if self.part == "sine" else v) / _speed(u, v)


def logarithm(variable: str, *, offset: float) -> Operator:
    """Return log(x + offset), for observations whose errors are multiplicative, such as rain.

    Parameters
    ----------
    variable
        Name of the variable.
    offset
        In its units, positive; also the smallest value of x + offset.
    """
    if not offset > 0 or not math.isfinite(offset):
        raise OptionError(f"offset={offset!r} is not accepted; it must be a positive number in the units of {variable!r}.")
    return Operator((variable,), _Logarithm(float(offset)), "1", None)


@dataclass(frozen=True)
class _Logarithm:
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        return (x.clamp(min=0.0) + self.offset).log()


def extended(state: Tensor, operators: Sequence[tuple[Operator, tuple[int, ...]]]) -> Tensor:
    """Return the channels of a state (..., channels, rows, columns) and after them what each operator makes of them.

    Parameters
    ----------
    state
        In physical units.
    operators
        Each with the indices of its channels.
    """
    import torch

    if not operators:
        return state
    made = [operator(*(state[..., c, :, :] for c in channels)) for operator, channels in operators]
    return torch.cat([state, torch.stack(made, -3)], -3)


def extended_deviation(mean: Tensor, deviation: Tensor, operators: Sequence[tuple[Operator, tuple[int, ...]]]) -> Tensor:
    """Return standard deviations of the channels and, to first order and as if operators were local, of what operators make of them."""
    import torch

    if not operators:
        return deviation
    leaf = mean.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        made: list[Any] = []
        for operator, channels in operators:
            field = operator(*(leaf[..., c, :, :] for c in channels))
            (slope,) = torch.autograd.grad(field.sum(), leaf)
            made.append((slope * deviation).square().sum(-3).sqrt())
    return torch.cat([deviation, torch.stack(made, -3)], -3)

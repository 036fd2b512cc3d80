"""Observed quantities that are functions of the state: means over a footprint, wind speed and direction, anything in torch.

An `Operator` turns fields of the state into a field of what is observed; `assimilate(..., operators={"wind_speed": ...})` then interpolates it
to the places of the observations called ``wind_speed``. A `LinearOperator` gives the weights of each observation instead, so that all
that supposes linear observations works with it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from xgenda.curvilinear import AnyGrid, CurvilinearGrid
from xgenda.errors import GendaError, GridError, OptionError, check_choice, check_count
from xgenda.grids import Grid
from xgenda.maps import LinearMap, block_mean
from xgenda.observations.times import parse_window
from xgenda.regridding import Regridder
from xgenda.weights import FOOTPRINTS, footprint_means, interpolation

if TYPE_CHECKING:
    from torch import Tensor

    from xgenda.tensors import TensorMap

WIDEST = 5e6  # m: a footprint is local
PARTIAL = 1e-6  # a cell whose weights miss 1 by more is not wholly covered
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

        _check_variables(name, self.variables, known)
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


@dataclass(frozen=True)
class LinearOperator:
    """A weighted sum over one variable of the state, with its own weights for each observation.

    Parameters
    ----------
    variable
        Name of the variable that it takes.
    rows
        From the grid of the state and latitude and longitude of m observations in degrees, shape (m,), to a `LinearMap` of
        shape (m, grid.size) and a bool array of shape (m,), False where an observation cannot be computed. Weights apply to the variable in
        the units of the state.
    units
        Of what is observed; None: those of the variable.
    standard_name
        CF name by which observations may be found and bounds are known.
    period
        Time over which an observation is a mean, up to its own time; None: at that time.
    """

    variable: str
    rows: Callable[[AnyGrid, np.ndarray, np.ndarray], tuple[LinearMap, np.ndarray]]
    units: str | None = None
    standard_name: str | None = None
    period: np.timedelta64 | None = None

    def check(self, name: str, grid: AnyGrid, known: Sequence[str]) -> None:
        """Try the rows at two cells of the grid.

        Raises
        ------
        OptionError
            If the state lacks the variable, or the rows fail on this grid, have another shape, or weights that are not finite.
        """
        _check_variables(name, (self.variable,), known)
        latitude, longitude = (a[[0, grid.size // 2]] for a in grid.points())
        try:
            found: Any = self.rows(grid, latitude, longitude)
        except GendaError as problem:
            raise OptionError(f"operators[{name!r}] does not work on the grid of the state: {problem}") from problem
        except Exception as problem:
            raise OptionError(f"operators[{name!r}] failed for two observations: {problem}") from problem
        fits = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], LinearMap)
        if not fits or found[0].shape != (2, grid.size) or np.shape(found[1]) != (2,) or np.asarray(found[1]).dtype != bool:
            kinds = ", ".join(
                f"{type(f).__name__} of shape {getattr(f, 'shape', None)}"
                for f in (found if isinstance(found, tuple) else (found,))
            )
            raise OptionError(
                f"operators[{name!r}] returned {kinds} for two observations; a LinearMap of shape {(2, grid.size)} and a bool array of shape "
                f"(2,) are needed."
            )
        if not np.isfinite(found[0].matrix.data).all():
            raise OptionError(f"operators[{name!r}] has weights that are not finite.")


AnyOperator: TypeAlias = Operator | LinearOperator


def _check_variables(name: str, needed: Sequence[str], known: Sequence[str]) -> None:
    lacking = [v for v in needed if v not in known]
    if lacking:
        raise OptionError(
            f"operators[{name!r}] needs {lacking[0]!r}, which is no variable of the state; it has {', '.join(map(repr, known))}."
        )


def footprint(variable: str, *, radius: float, shape: str = "disc") -> LinearOperator:
    """Return the mean over an area around each observation, as radiometers, altimeters and radars see.

    Parameters
    ----------
    variable
        Name of the variable.
    radius
        In metres: of the disc, or the standard deviation of the Gaussian.
    shape
        'disc': the mean over the cells whose centres lie within `radius`, weighted by their areas; 'gaussian': also weighted by a Gaussian
        of the great-circle distance, cut off at three standard deviations.

    Notes
    -----
    A footprint that holds no cell centre, smaller than the grid resolves, is bilinear interpolation. Observations whose footprint
    lies by less than half on the grid are outside (code DOMAIN); of the others the part on the grid stands for the whole.

    Examples
    --------
    >>> import xgenda
    >>> xgenda.operators.footprint("sst", radius=25e3).variable
    'sst'
    """
    check_choice("shape", shape, FOOTPRINTS)
    if isinstance(radius, bool) or not isinstance(radius, numbers.Real) or not 0 < float(radius) <= WIDEST:
        raise OptionError(
            f"radius={radius!r} is not accepted; give metres, up to {WIDEST:g}: footprint({variable!r}, radius=25e3)."
        )
    return LinearOperator(variable, _Footprint(float(radius), shape))


@dataclass(frozen=True)
class _Footprint:
    radius: float
    shape: str

    def __call__(self, grid: AnyGrid, latitude: np.ndarray, longitude: np.ndarray) -> tuple[LinearMap, np.ndarray]:
        return footprint_means(grid, latitude, longitude, self.radius, self.shape)


def time_mean(observed: str | LinearOperator, *, period: Any) -> LinearOperator:
    """Return the mean over the time before each observation, such as of daily means, for models of windows of states.

    Parameters
    ----------
    observed
        Name of a variable, or what another linear operator makes of it.
    period
        Time span that ends with the time of the observation, such as '24h'.

    Notes
    -----
    The trajectory is taken to be linear between its times, and the mean is exact for that. A period that begins before the first state is
    outside of the window.

    Examples
    --------
    >>> import xgenda
    >>> str(xgenda.operators.time_mean("t2m", period="24h").period.astype("timedelta64[h]"))
    '24 hours'
    """
    operator = LinearOperator(observed, _Interpolation()) if isinstance(observed, str) else observed
    if not isinstance(operator, LinearOperator):
        raise OptionError(
            f"observed={observed!r} is not accepted; give the name of a variable or a linear operator: time_mean('t2m', period='24h')"
        )
    return LinearOperator(
        operator.variable, operator.rows, operator.units, operator.standard_name, parse_window(period, "period")
    )


@dataclass(frozen=True)
class _Interpolation:
    def __call__(self, grid: AnyGrid, latitude: np.ndarray, longitude: np.ndarray) -> tuple[LinearMap, np.ndarray]:
        return interpolation(grid, latitude, longitude)


def coarsened(variable: str, *, factor: int) -> LinearOperator:
    """Return plain means over blocks of `factor` x `factor` cells, interpolated between their centres: what a coarse product gives.

    Parameters
    ----------
    variable
        Name of the variable, on a rectilinear grid whose shape is a multiple of `factor`.
    factor
        Cells along each side of a block.

    Notes
    -----
    Observations beyond the outermost centres of the blocks are outside, except over the poles and across the seam of a globe.
    """
    return LinearOperator(variable, _Coarsened(check_count("factor", factor, 2)))


@dataclass(frozen=True)
class _Coarsened:
    factor: int

    def __call__(self, grid: AnyGrid, latitude: np.ndarray, longitude: np.ndarray) -> tuple[LinearMap, np.ndarray]:
        if not isinstance(grid, Grid):
            raise GridError(f"Block means need a rectilinear grid, and this is {grid.describe()}; use operators.regridded.")
        points, inside = interpolation(grid.coarsened(self.factor), latitude, longitude)
        return points.after(block_mean(grid, self.factor)), inside


def regridded(variable: str, regridder: Regridder) -> LinearOperator:
    """Return the variable on the target grid of a `xgenda.Regridder`, interpolated between its cell centres.

    Parameters
    ----------
    variable
        Name of the variable.
    regridder
        From the grid of the state to that on which the observed product was made, for example ``method='conservative'``.

    Notes
    -----
    Observations that would need a target cell of which a part lies outside the source, or is masked, are outside.
    """
    if not isinstance(regridder, Regridder):
        raise OptionError(
            f"regridder={regridder!r} is not accepted; make one: xgenda.Regridder(ds, target, method='conservative')"
        )
    return LinearOperator(variable, _Regridded(regridder))


@dataclass(frozen=True)
class _Regridded:
    regridder: Regridder

    def __call__(self, grid: AnyGrid, latitude: np.ndarray, longitude: np.ndarray) -> tuple[LinearMap, np.ndarray]:
        source, target = self.regridder.source, self.regridder.target
        same = (
            isinstance(grid, Grid) and source.grid.same_as(grid)
            if isinstance(source.grid, Grid)
            else isinstance(source.grid, CurvilinearGrid) and source.grid.same_as(grid)
        )
        if not same:
            raise GridError(f"The regridder starts from {source.grid.describe()}, and the state is on {grid.describe()}.")
        # from the order of the user's arrays to model order
        entries = self.regridder.map.matrix.tocoo()
        fields = LinearMap.from_entries(
            target.places[entries.row], source.places[entries.col], entries.data, self.regridder.map.shape
        )
        partial = np.abs(fields(np.ones(grid.size)) - 1.0) > PARTIAL
        points, inside = interpolation(target.grid, latitude, longitude)
        inside = inside & (points(partial.astype(float)) == 0)
        return points.after(fields).kept(inside), inside


def as_torch(linear: LinearMap | Regridder) -> TensorMap:
    """Return a linear map, or a regridder, as a differentiable function of torch tensors.

    Parameters
    ----------
    linear
        A `LinearMap`: the function takes tensors (..., size) and returns (..., rows). A `xgenda.Regridder`: it takes fields with the
        dimensions of the source last and returns them with those of the target, each in the order of the Datasets that the regridder
        was made of; target cells that nothing maps to are NaN.

    Returns
    -------
    TensorMap
        Reverse and forward mode, higher derivatives and ``torch.func`` work; the gradient is the adjoint of the map. Leading dimensions are
        independent, and a NaN goes where, and only where, its weight is not zero.

    Examples
    --------
    >>> import numpy as np, torch, xarray as xr, xgenda
    >>> fine = xr.Dataset(coords={"latitude": np.arange(40.0, 50.0), "longitude": np.arange(10.0)})
    >>> coarse = xr.Dataset(coords={"latitude": np.arange(40.5, 50.0, 2.0), "longitude": np.arange(0.5, 10.0, 2.0)})
    >>> to_coarse = xgenda.operators.as_torch(xgenda.Regridder(fine, coarse, method="conservative", regridder="builtin"))
    >>> to_coarse(torch.ones(2, 10, 10)).shape
    torch.Size([2, 5, 5])
    """
    from xgenda.tensors import TensorMap

    if isinstance(linear, Regridder):
        return TensorMap(linear.map, linear.source.shape, linear.target.shape, linear.weights.mapped)
    if not isinstance(linear, LinearMap):
        raise OptionError(f"linear={linear!r} is not accepted; give a LinearMap or a xgenda.Regridder.")
    return TensorMap(linear, (linear.size,), linear.shape[:1])


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
    """Return standard deviations of the channels and, after them, how far from their value at the mean operators are in the root mean square.

    By the symmetric points of the unscented transform (Julier and Uhlmann 2004, Proc. IEEE 92, 401-422, eq. 12), as if cells were wholly
    correlated and channels independent: the standard deviation where an operator is linear, and not zero where only its slope is, such as for
    a speed around no wind.
    """
    import torch

    if not operators:
        return deviation
    made = []
    for operator, channels in operators:
        centre = [mean[..., c, :, :] for c in channels]
        middle, square = operator(*centre), torch.zeros_like(centre[0])
        for i, c in enumerate(channels):
            step = math.sqrt(len(channels)) * deviation[..., c, :, :]
            for sign in (-1.0, 1.0):
                moved = operator(*(x + sign * step if j == i else x for j, x in enumerate(centre)))
                square = square + (moved - middle).square() / (2 * len(channels))
        made.append(square.sqrt())
    return torch.cat([deviation, torch.stack(made, -3)], -3)

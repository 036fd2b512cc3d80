"""Standardise fields: transform, climatology, standard deviation; and back. Saved with the model.

With t the transform (identity, or log(x + offset)) and b(time) a basis of harmonics,

    z = (t(x) - sum_k b_k(time) mean_k) / std.

The climatology is a least-squares fit of harmonics of the day of the year or of the hour, because a plain mean of the few
samples that fall on one day is mostly noise.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import xarray as xr

from xgenda.errors import OptionError, StateError, check_choice

Cycle = Literal["none", "dayofyear", "hour", "dayofyear+hour"]
CYCLES = ("none", "dayofyear", "hour", "dayofyear+hour")
TRANSFORMS = ("none", "log")
HARMONICS = 2
ALIKE = 1e-9  # of a harmonic, root mean square, what rounding makes of one that is constant
BEYOND = 2.0  # times the largest training value, which results of a logarithm keep to


@dataclass(frozen=True, eq=False)
class Scaling:
    """Standardisation of a stack of channels.

    Parameters
    ----------
    mean
        Climatology coefficients in transformed units, shape (k, channels, ny, nx) or (k, channels, 1, 1).
    std
        Standard deviation of the anomaly in transformed units, shape (channels, ny, nx) or (channels, 1, 1); positive.
    cycle
        Which harmonics `mean` holds.
    transforms
        One of 'none', 'log' per channel.
    offsets
        Per channel, in the units of the variable: log(x + offset).
    bounds
        Lowest and highest value per channel, in the units of the variable, infinite where there is none; see `clipped`.
    """

    mean: np.ndarray
    std: np.ndarray
    cycle: Cycle = "none"
    transforms: tuple[str, ...] = ()
    offsets: tuple[float, ...] = ()
    bounds: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        """Fill in the defaults for the transforms."""
        channels = self.mean.shape[1]
        object.__setattr__(self, "transforms", self.transforms or ("none",) * channels)
        object.__setattr__(self, "offsets", self.offsets or (0.0,) * channels)
        object.__setattr__(self, "bounds", self.bounds or ((-math.inf, math.inf),) * channels)

    @property
    def is_affine(self) -> bool:
        """Whether no channel is log-transformed."""
        return all(t == "none" for t in self.transforms)

    def climatology(self, basis: np.ndarray) -> np.ndarray:
        """Return the mean for each row of `basis` (from `cycle_basis`), shape (t, channels, ny, nx)."""
        return np.asarray(np.tensordot(basis, self.mean, axes=(1, 0)))

    def forward(self, values: np.ndarray, basis: np.ndarray) -> np.ndarray:
        """Standardise an array (t, channels, ny, nx)."""
        return np.asarray((self.transform(values) - self.climatology(basis)) / self.std)

    def inverse(self, values: np.ndarray, basis: np.ndarray) -> np.ndarray:
        """Undo `forward` for an array (t, channels, ny, nx)."""
        return self.untransformed(values * self.std + self.climatology(basis), 1)

    def untransformed(self, values: np.ndarray, axis: int) -> np.ndarray:
        """Return what has these transforms; channels are along `axis`."""
        if self.is_affine:
            return values
        out = np.moveaxis(np.array(values), axis, 0)
        for c, (name, offset) in enumerate(zip(self.transforms, self.offsets, strict=True)):
            if name == "log":
                out[c] = np.exp(out[c]) - offset
        return np.moveaxis(out, 0, axis)

    @property
    def is_bounded(self) -> bool:
        """Whether any channel has a bound."""
        return any(math.isfinite(b) for pair in self.bounds for b in pair)

    def clipped(self, values: np.ndarray, axis: int) -> np.ndarray:
        """Return physical values within the bounds of their channels, which are along `axis`."""
        if not self.is_bounded:
            return values
        low, high = np.array(self.bounds).reshape(-1, 2).T
        shape = [1] * values.ndim
        shape[axis] = len(self.bounds)
        return np.asarray(np.clip(values, low.reshape(shape), high.reshape(shape)).astype(values.dtype, copy=False))

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Apply the transforms only, to an array (t, channels, ny, nx)."""
        out = np.array(values, dtype=np.float64)
        for c, (name, offset) in enumerate(zip(self.transforms, self.offsets, strict=True)):
            if name == "log":
                if (out[:, c] + offset <= 0).any():
                    raise StateError(
                        f"Channel {c} is scaled by log(x + {offset:g}) and holds {out[:, c].min():.6g}; "
                        f"clip it: ds.clip(min=0), or choose a larger offset."
                    )
                out[:, c] = np.log(out[:, c] + offset)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Return the options, without the arrays, as JSON-serialisable values."""
        bounds = [[b if math.isfinite(b) else None for b in pair] for pair in self.bounds]
        return {"cycle": self.cycle, "transforms": list(self.transforms), "offsets": list(self.offsets), "bounds": bounds}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], mean: np.ndarray, std: np.ndarray) -> Scaling:
        """Join the options written by `to_dict` and the two arrays; the first files have no bounds."""
        bounds = tuple(
            (-math.inf if low is None else float(low), math.inf if high is None else float(high))
            for low, high in data.get("bounds", ())
        )
        cycle = cast("Cycle", check_choice("cycle", data["cycle"], CYCLES))
        return cls(mean, std, cycle, tuple(data["transforms"]), tuple(data["offsets"]), bounds)


def cycle_basis(time: xr.DataArray | None, cycle: str, size: int = 1) -> np.ndarray:
    """Return the harmonics of each time, shape (t, k); a column of ones for ``cycle='none'``.

    Works for numpy datetimes and every cftime calendar.
    """
    if cycle == "none" or time is None:
        if cycle != "none":
            raise OptionError(f"climatology={cycle!r} needs a time coordinate.")
        return np.ones((size, 1))
    stamps = time if time.ndim else time.expand_dims(str(time.name))
    columns = [np.ones(stamps.size)]
    hour = (stamps.dt.hour + stamps.dt.minute / 60.0).values
    if "dayofyear" in cycle:
        length = {"360_day": 360.0, "noleap": 365.0, "365_day": 365.0, "all_leap": 366.0, "366_day": 366.0}
        year = length.get(str(stamps.dt.calendar), 365.2425)
        columns += _harmonics(((stamps.dt.dayofyear.values - 1) + hour / 24.0) / year)
    if "hour" in cycle:
        columns += _harmonics(hour / 24.0)
    return np.stack(columns, -1).astype(np.float64)


def _harmonics(phase: np.ndarray) -> list[np.ndarray]:
    return [f(2 * np.pi * k * phase) for k in range(1, HARMONICS + 1) for f in (np.cos, np.sin)]


def settled(basis: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return coefficients (k, ...) of the same fit at the times of a basis (t, k), with no more of the harmonics than these times ask for.

    Where times do not tell a harmonic from a constant (fields that are all of one hour) or from others, least squares shares among them what
    belongs to one, and at other times the sum would be another.
    """
    average = basis[:, 1:].mean(0)
    _, s, across = np.linalg.svd(basis[:, 1:] - average, full_matrices=False)
    asked = across[s > ALIKE * np.sqrt(len(basis))]
    if len(asked) == basis.shape[1] - 1:
        return mean
    harmonics = np.tensordot(asked.T @ asked, mean[1:], axes=1)
    return np.concatenate([mean[:1] + np.tensordot(average, mean[1:] - harmonics, axes=1)[None], harmonics])


def cycle_regression(basis: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the coefficients (k, state) of fields (t, state) in a basis (t, k), by least squares, `settled`."""
    return settled(basis, np.linalg.lstsq(basis, z, rcond=None)[0])


def fit_scaling(
    values: np.ndarray,
    time: xr.DataArray | None,
    names: list[str],
    *,
    cycle: str = "none",
    transform: str | Mapping[str, str] = "none",
    offset: float | Mapping[str, float] = 1e-3,
    bounds: Mapping[str, Sequence[float | None]] | None = None,
    pointwise_std: bool = False,
    homogeneous: bool = False,
    valid: np.ndarray | None = None,
) -> Scaling:
    """Fit a `Scaling` to training fields.

    Parameters
    ----------
    values
        Fields in physical units, shape (t, channels, ny, nx), finite.
    time
        Time of each sample; needed when `cycle` is not 'none'.
    names
        Channel names, for options given per variable and for messages.
    cycle
        'none', 'dayofyear', 'hour' or 'dayofyear+hour': which part of the climatology to remove.
    transform
        'none' or 'log', for all or per variable.
    offset
        Offset of the logarithm in the units of the variable, for all or per variable.
    bounds
        Lowest and highest value per variable, None where there is none. By default a logarithm bounds its variable by zero and by `BEYOND`
        times the largest value, because the exponential of an unlikely residual is a value that nobody has seen.
    pointwise_std
        One standard deviation per cell instead of one per variable.
    homogeneous
        One climatology for all cells, where all places are alike.
    valid
        Which cells count for the standard deviation, shape (channels, ny, nx); None: all.

    Raises
    ------
    StateError
        If a variable does not vary at all.
    """
    per, offsets = per_channel(names, transform, offset)
    check_choice("climatology", cycle, CYCLES)
    basis = cycle_basis(time, cycle, len(values))
    check_times(len(values), basis.shape[1], cycle)
    lowest, highest = (f(values, axis=(0, 2, 3)).astype(float) for f in (np.min, np.max))
    check_logarithms(names, per, offsets, lowest)
    blank = Scaling(np.zeros((1, len(names), 1, 1)), np.ones((len(names), 1, 1)), "none", per, offsets)
    transformed = blank.transform(values)
    mean = cycle_regression(basis, transformed.reshape(len(values), -1)).reshape(-1, *values.shape[1:])
    if homogeneous:
        mean = mean.mean((2, 3), keepdims=True)
    anomaly = transformed - np.tensordot(basis, mean, axes=(1, 0))
    axes = (0,) if pointwise_std else (0, 2, 3)
    counted = True if valid is None or pointwise_std else np.broadcast_to(valid, anomaly.shape)
    std = np.sqrt(np.mean(anomaly**2, axis=axes, keepdims=True, where=counted))[0]
    if pointwise_std and valid is not None:
        std = np.where(valid, std, 1.0)
    largest = np.abs(transformed).max(axis=axes, keepdims=True)[0]
    return scaling_of(names, mean, std, largest, lowest, highest, cycle=cycle, transforms=per, offsets=offsets, bounds=bounds)


def check_named(transform: object, offset: object, bounds: object, names: Sequence[str]) -> None:
    """Refuse options of variables that there are not, and what is neither an option for all nor a mapping."""
    check_kinds(transform, offset, bounds, names[0])
    for argument, given in (("transform", transform), ("offset", offset), ("bounds", bounds)):
        strange = [k for k in given if k not in names] if isinstance(given, Mapping) else []
        if strange:
            raise OptionError(
                f"{argument} names {strange[0]!r}, and the variables are {', '.join(map(repr, dict.fromkeys(names)))}."
            )


def check_kinds(transform: object, offset: object, bounds: object, name: str = "t2m") -> None:
    """Refuse what is neither an option for all variables nor a mapping, `name` being one of them for the message."""
    for t in transform.values() if isinstance(transform, Mapping) else (transform,):
        check_choice("transform", t, TRANSFORMS)
    for o in offset.values() if isinstance(offset, Mapping) else (offset,):
        if isinstance(o, bool) or not isinstance(o, numbers.Real) or not math.isfinite(o):
            raise OptionError(f"offset={offset!r} is not accepted; give a number, or one per variable: offset={{{name!r}: 0.1}}")
    if bounds is not None and not isinstance(bounds, Mapping):
        raise OptionError(f"bounds={bounds!r} is not accepted; give a pair per variable: bounds={{{name!r}: (0, None)}}")
    for known, given in bounds.items() if isinstance(bounds, Mapping) else ():
        _check_pair_of(str(known), given)


def _check_pair_of(name: str, given: object) -> None:
    """Refuse bounds that are no lowest and highest value."""
    pair = tuple(given) if isinstance(given, (tuple, list)) else ()
    if (
        len(pair) != 2
        or not all(b is None or (isinstance(b, numbers.Real) and math.isfinite(b)) for b in pair)
        or (None not in pair and pair[0] >= pair[1])
    ):
        raise OptionError(
            f"bounds of {name!r} are {given!r}; a lowest and a highest value are needed, None for none: bounds={{{name!r}: (0, None)}}"
        )


def per_channel(
    names: Sequence[str], transform: str | Mapping[str, str], offset: float | Mapping[str, float]
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return transform and offset of each channel, from options for all or per variable."""
    per = [transform.get(n, "none") if isinstance(transform, Mapping) else transform for n in names]
    for name in per:
        check_choice("transform", name, TRANSFORMS)
    return tuple(per), tuple(float(offset.get(n, 1e-3)) if isinstance(offset, Mapping) else float(offset) for n in names)


def check_times(count: int, coefficients: int, cycle: str) -> None:
    """Refuse a climatology of more coefficients than half the times."""
    if count < 2 * coefficients:
        raise StateError(
            f"{count} times are too few to fit climatology={cycle!r} ({coefficients} coefficients); "
            f"use climatology='none' or give more data."
        )


def check_logarithms(names: Sequence[str], transforms: Sequence[str], offsets: Sequence[float], lowest: np.ndarray) -> None:
    """Refuse logarithms of what is not positive, given the lowest value of each channel."""
    for name, transform, offset, low in zip(names, transforms, offsets, lowest, strict=True):
        if transform == "log" and low + offset <= 0:
            raise StateError(
                f"{name!r} is to be scaled by log(x + {offset:g}) and holds {low:.6g}. Clip it: ds[{name!r}].clip(min=0), or take the "
                f"logarithm of others only: transform={{'precipitation': 'log'}}"
            )


def scaling_of(
    names: Sequence[str], mean: np.ndarray, std: np.ndarray, largest: np.ndarray, lowest: np.ndarray, highest: np.ndarray, *,
    cycle: str, transforms: tuple[str, ...], offsets: tuple[float, ...], bounds: Mapping[str, Sequence[float | None]] | None,
) -> Scaling:  # fmt: skip
    """Return a `Scaling` of fitted arrays, with its bounds.

    Parameters
    ----------
    mean, std
        As in `Scaling`.
    largest
        Largest absolute value in transformed units, with the axes of `std`: less than its rounding is no variation.
    lowest, highest
        Per channel, in physical units.
    cycle, transforms, offsets, bounds
        As in `fit_scaling`.

    Raises
    ------
    StateError
        If a variable does not vary at all, or leaves its bounds.
    """
    for c, name in enumerate(names):
        if (std[c] <= 1e-12 * largest[c]).any():
            raise StateError(f"ds[{name!r}] does not vary, so it cannot be standardised; drop it: ds.drop_vars({name!r})")
    limits = tuple(
        _bounds_of(n, float(low), float(high), t, (bounds or {}).get(n))
        for n, low, high, t in zip(names, lowest, highest, transforms, strict=True)
    )
    return Scaling(mean, std, cast("Cycle", cycle), transforms, offsets, limits)


def _bounds_of(
    name: str, lowest: float, highest: float, transform: str, given: Sequence[float | None] | None
) -> tuple[float, float]:
    """Return the bounds of a variable, which its fields must keep to."""
    if given is None:  # exp(z) - offset can be negative, and far beyond anything
        return (0.0, BEYOND * highest) if transform == "log" and lowest >= 0 else (-math.inf, math.inf)
    _check_pair_of(name, given)
    pair = tuple(given)
    low, high = (-math.inf if pair[0] is None else float(pair[0])), (math.inf if pair[1] is None else float(pair[1]))
    if lowest < low or highest > high:
        raise StateError(
            f"ds[{name!r}] ranges from {lowest:.6g} to {highest:.6g}, outside of its bounds {given!r}. Clip it: "
            f"ds.assign({name}=ds[{name!r}].clip({pair[0]}, {pair[1]})), or give wider bounds."
        )
    return low, high

"""A forecast of the simulated ocean, right or slightly wrong, for cycles of forecasts and analyses."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.fft
import xarray as xr

from xgenda.errors import GridError, OptionError, StateError
from xgenda.grids import EARTH_RADIUS, GRAVITY, ROTATION
from xgenda.metadata import check_values, find_layout, unit_factors_of
from xgenda.observations.times import at_time, later, parse_window
from xgenda.twins import (
    LOWER_LAYER,
    MEAN_SALINITY,
    MEAN_TEMPERATURE,
    OCEAN_VARIABLES,
    QGState,
    TwoLayerQG,
    ocean_model,
    ocean_surface,
)

COMPLETE = ("ssh", "lower", "temperature", "salinity")  # what a state must hold
UNITS = {n: attrs["units"] for n, attrs in (OCEAN_VARIABLES | LOWER_LAYER).items()}  # of the model


@dataclass(frozen=True)
class OceanForecast:
    """A function from states of the simulated ocean to those a step later; see `ocean_forecast`."""

    step: np.timedelta64
    time_step: float
    rd: float = 25e3
    U1: float = 0.1
    rek: float = 1e-6

    def __call__(self, ds: xr.Dataset) -> xr.Dataset:
        """Return the states of `ds`, of one time with or without members, a step later."""
        lacking = [n for n in COMPLETE if n not in ds]
        if lacking:
            raise StateError(
                f"The state lacks {lacking[0]!r}; a complete one has {', '.join(COMPLETE)}: xgenda.tutorial.simulate_ocean(..., lower=True)"
            )
        layout = find_layout(ds)
        model, coriolis = self._model(*(ds[n].values.astype(float).tobytes() for n in (layout.latitude, layout.longitude)))
        dims = ds["ssh"].transpose(..., *layout.dims).dims
        values = [_in_units_of_the_model(ds[n], n, dims) for n in COMPLETE]
        psi = scipy.fft.rfft2(np.stack(values[:2]) * (GRAVITY / coriolis))
        k, l = model.wavenumbers  # noqa: E741
        upper, lower = model.stretching
        square = k**2 + l**2
        q = np.stack([-(square + upper) * psi[0] + upper * psi[1], lower * psi[0] - (square + lower) * psi[1]])
        tracers = scipy.fft.rfft2(np.stack([values[2] - MEAN_TEMPERATURE, values[3] - MEAN_SALINITY]))
        state = QGState(np.concatenate([q, tracers]) * model.filter)
        state = model.advance(state, round(self.step / np.timedelta64(1, "s") / model.dt))
        surface = dict(zip(OCEAN_VARIABLES, ocean_surface(model, state, coriolis, True), strict=True))
        surface["lower"] = model.streamfunction(state)[1] * (coriolis / GRAVITY)
        made = {}
        for n, v in surface.items():
            if n in ds:
                scale, offset = unit_factors_of(ds[n], UNITS[n])
                as_given = v if (scale, offset) == (1.0, 0.0) else (v - offset) / scale
                made[n] = xr.Variable(dims, as_given.astype(ds[n].dtype), ds[n].attrs).transpose(*ds[n].dims)
        return at_time(ds.assign(made), later(ds, self.step))

    @functools.cache  # noqa: B019  (small, and as long as the forecast)
    def _model(self, latitude: bytes, longitude: bytes) -> tuple[TwoLayerQG, float]:
        """Return the model for a grid, and the Coriolis parameter of its middle."""
        rows, columns = (np.frombuffer(b) for b in (latitude, longitude))
        middle = float(rows.mean())
        spacing = math.radians(EARTH_RADIUS) * float(np.diff(rows).mean())
        across = math.radians(EARTH_RADIUS) * math.cos(math.radians(middle)) * float(np.diff(columns).mean())
        if len(rows) != len(columns) or spacing <= 0 or abs(across - spacing) > 1e-3 * spacing:
            raise GridError(
                f"The state is on {len(rows)} x {len(columns)} cells of {spacing / 1e3:.4g} x {across / 1e3:.4g} km; the whole square of "
                f"xgenda.tutorial.simulate_ocean is needed, northward and eastward."
            )
        seconds = float(self.step / np.timedelta64(1, "s"))
        longest = self.time_step * spacing / 15e3
        model = ocean_model(
            len(rows), spacing, middle, dt=seconds / math.ceil(seconds / longest), rd=self.rd, U1=self.U1, rek=self.rek
        )
        return model, 2 * ROTATION * math.sin(math.radians(middle))


def _in_units_of_the_model(array: xr.DataArray, name: str, dims: tuple[Hashable, ...]) -> np.ndarray:
    """Return a variable in the units and the order of the model, in double precision.

    Raises
    ------
    StateError
        If it holds no real numbers, or some that are not finite, or is on other dimensions than ``ssh``.
    UnitsError
        If its units cannot be converted.
    """
    if array.dtype.kind != "f":
        raise StateError(f"The state's {name!r} has dtype {array.dtype}; real numbers are needed: ds[{name!r}].astype('float64')")
    if set(array.dims) != set(dims):
        raise StateError(
            f"The state's {name!r} has dimensions {array.dims}, and 'ssh' has {dims}; give all of them the same: "
            f"ds[{name!r}].broadcast_like(ds['ssh'])"
        )
    values = np.asarray(array.transpose(*dims).values, dtype=float)
    check_values(values, name)
    scale, offset = unit_factors_of(array, UNITS[name])
    return values if (scale, offset) == (1.0, 0.0) else values * scale + offset


def ocean_forecast(
    step: str | pd.Timedelta = "1D", *, rd: float = 25e3, U1: float = 0.1, rek: float = 1e-6, time_step: float = 2400.0
) -> OceanForecast:
    """Return a forecast of the ocean of `simulate_ocean`, for `xgenda.cycle`: all members at once, from complete states.

    With the parameters of `simulate_ocean`, which are the defaults, it is right but for its first time steps, which know of none before them;
    with others it has an error of its own, as real forecasts have.

    Parameters
    ----------
    step
        How far it goes, as pandas reads it.
    rd, U1, rek
        Deformation radius in metres, shear of the mean flow in m s-1 and drag at the bottom in s-1, see `xgenda.twins.TwoLayerQG`.
    time_step
        Longest time step in seconds where cells are 15 km wide; in proportion for others.

    Returns
    -------
    OceanForecast
        Takes and returns Datasets of one time with ``ssh``, ``lower``, ``temperature`` and ``salinity``, and ``u`` and ``v`` where they are
        there, on the whole doubly periodic square, with or without ``member``; in other units than those of the simulation (m, degC, psu, m s-1)
        where the attribute says so, and then back in these.

    Examples
    --------
    >>> import xgenda
    >>> ocean = xgenda.tutorial.simulate_ocean(times=2, size=16, spinup="20D", lower=True)
    >>> tomorrow = xgenda.tutorial.ocean_forecast("1D")(ocean.isel(time=0))
    >>> bool(abs(tomorrow.ssh - ocean.ssh[1]).max() < 1e-3)
    True
    """
    for name, value in (("rd", rd), ("U1", U1), ("rek", rek), ("time_step", time_step)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
            raise OptionError(f"{name}={value!r} is not accepted; it must be a positive number.")
    return OceanForecast(parse_window(step, "step"), float(time_step), float(rd), float(U1), float(rek))

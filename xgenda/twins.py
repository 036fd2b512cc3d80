"""Simulated oceans for twin experiments: two-layer quasi-geostrophic turbulence with two passive tracers.

The equations, for the perturbations of layers i = 1 (upper) and 2 (lower), doubly periodic in x (east) and y (north)::

    d q_i/dt + (u_i + U_i) d q_i/dx + v_i d q_i/dy + Q_i v_i = - r lap(psi_2) where i = 2
    q_1 = lap(psi_1) + F_1 (psi_2 - psi_1)          F_1 = rd**-2 / (1 + delta)    Q_1 = beta + F_1 (U_1 - U_2)
    q_2 = lap(psi_2) + F_2 (psi_1 - psi_2)          F_2 = delta F_1               Q_2 = beta - F_2 (U_1 - U_2)
    d T/dt + (u_1 + U_1) dT/dx + v_1 dT/dy + u_1 G_x + v_1 G_y = kappa lap(T) - T / relaxation

Vallis 2017, Atmospheric and Oceanic Fluid Dynamics, sections 5.4 and 9.6. Pseudo-spectral, Adams-Bashforth in time, with the
exponential filter of the small scales of LaCasce 1996 (thesis, MIT and WHOI).
"""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy.fft
import xarray as xr

from xgenda.errors import OptionError, StateError, check_count
from xgenda.grids import EARTH_RADIUS, GRAVITY, ROTATION
from xgenda.metadata import package_version

#: Adams-Bashforth weights of the newest tendency first, by the number of tendencies at hand.
_ADAMS_BASHFORTH = {1: (1.0,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12)}


@dataclass(frozen=True)
class Tracer:
    """A passive tracer of the upper layer, as the deviation from a constant mean gradient.

    Parameters
    ----------
    gradient_x, gradient_y
        Mean gradient eastward and northward, in tracer units per metre.
    relaxation
        Time in seconds in which deviations decay to 1/e; None for never.
    diffusivity
        kappa in m2 s-1.
    """

    gradient_x: float = 0.0
    gradient_y: float = 0.0
    relaxation: float | None = None
    diffusivity: float = 0.0


@dataclass(frozen=True, eq=False)
class QGState:
    """What a run needs to go on.

    Parameters
    ----------
    spectrum
        Half spectra as of ``scipy.fft.rfft2`` of q_1, q_2 (s-1) and the tracers, shape (2 + tracers, n, n // 2 + 1).
    tendencies
        Earlier time derivatives of `spectrum`, newest first.
    time
        Seconds since the start.
    """

    spectrum: np.ndarray
    tendencies: tuple[np.ndarray, ...] = ()
    time: float = 0.0


@dataclass(frozen=True, eq=False)
class TwoLayerQG:
    """A doubly periodic two-layer quasi-geostrophic model on a beta plane with mean shear.

    The layers enter through the ratio of their depths alone. Arrays have the axes (..., y, x).

    Parameters
    ----------
    nx
        Cells along each side; even.
    length
        Side in metres.
    beta
        Northward gradient of the Coriolis parameter, m-1 s-1.
    rd
        Deformation radius in metres.
    delta
        Depth of the upper over that of the lower layer.
    U1, U2
        Eastward mean flow of the layers, m s-1.
    rek
        Linear drag at the bottom, s-1.
    dt
        Time step in seconds.
    filterfac
        Strength of the exponential filter. None takes the sharp filter of the two-thirds rule instead: products are then free
        of aliasing, and without drag and shear energy and enstrophy are conserved up to the error of the time step.
    order
        Of the Adams-Bashforth scheme, 2 or 3.
    tracers
        Passive tracers of the upper layer.
    """

    nx: int = 64
    length: float = 1e6
    beta: float = 1.5e-11
    rd: float = 15e3
    delta: float = 0.25
    U1: float = 0.025
    U2: float = 0.0
    rek: float = 5.787e-7
    dt: float = 7200.0
    filterfac: float | None = 23.6
    order: int = 3
    tracers: tuple[Tracer, ...] = ()

    def __post_init__(self) -> None:
        if check_count("nx", self.nx, 4) % 2:
            raise OptionError(f"nx={self.nx} is not accepted; it must be even, for example nx={self.nx + 1}.")
        for name in ("length", "rd", "delta", "dt"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name}={getattr(self, name)!r} is not accepted; it must be a positive number.")
        if self.order not in (2, 3):
            raise OptionError(f"order={self.order!r} is not accepted; choose order=2 or order=3.")

    @functools.cached_property
    def wavenumbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Eastward and northward wavenumbers in m-1, shapes (1, n // 2 + 1) and (n, 1)."""
        step = self.length / self.nx
        k, l = scipy.fft.rfftfreq(self.nx, step), scipy.fft.fftfreq(self.nx, step)  # noqa: E741
        return 2 * np.pi * k[None, :], 2 * np.pi * l[:, None]

    @functools.cached_property
    def stretching(self) -> tuple[float, float]:
        """F_1 and F_2, m-2."""
        upper = self.rd**-2 / (1 + self.delta)
        return upper, self.delta * upper

    @functools.cached_property
    def gradients(self) -> tuple[float, float]:
        """Mean northward gradients of potential vorticity Q_1 and Q_2, m-1 s-1."""
        shear, (upper, lower) = self.U1 - self.U2, self.stretching
        return self.beta + upper * shear, self.beta - lower * shear

    @functools.cached_property
    def filter(self) -> np.ndarray:
        """Factor on each coefficient after a time step, shape (n, n // 2 + 1)."""
        k, l = self.wavenumbers  # noqa: E741
        step = self.length / self.nx
        if self.filterfac is None:
            cut = 2 / 3 * np.pi * (1 - 1e-9)
            return np.asarray((np.abs(k) * step < cut) & (np.abs(l) * step < cut), dtype=float)
        scaled = np.hypot(k, l) * step  # pi at the shortest wave along an axis
        return np.asarray(np.exp(-self.filterfac * np.maximum(scaled - 0.65 * np.pi, 0.0) ** 4))

    @functools.cached_property
    def _inversion(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Rows of the matrix that takes (q_1, q_2) to (psi_1, psi_2), for each wave; zero for the mean."""
        k, l = self.wavenumbers  # noqa: E741
        square, (upper, lower) = k**2 + l**2, self.stretching
        determinant = square * (square + upper + lower)
        determinant[0, 0] = np.inf
        return (
            (-(square + lower) / determinant, -upper / determinant),
            (-lower / determinant, -(square + upper) / determinant),
        )

    @functools.cached_property
    def _linear(self) -> np.ndarray:
        """Tendency of each row by the streamfunction of its layer: mean gradients and drag, shape (2 + tracers, n, n // 2 + 1)."""
        k, l = self.wavenumbers  # noqa: E741
        rows = [-1j * k * self.gradients[0] + 0 * l, -1j * k * self.gradients[1] + self.rek * (k**2 + l**2)]
        return np.stack(rows + [1j * (l * tracer.gradient_x - k * tracer.gradient_y) for tracer in self.tracers])

    @functools.cached_property
    def _decay(self) -> np.ndarray:
        """Rate of decay of each tracer by diffusion and relaxation, s-1, shape (tracers, n, n // 2 + 1)."""
        k, l = self.wavenumbers  # noqa: E741
        rates = [t.diffusivity * (k**2 + l**2) + (1 / t.relaxation if t.relaxation else 0.0) for t in self.tracers]
        return np.array(rates).reshape(-1, self.nx, self.nx // 2 + 1)

    def start(self, q: np.ndarray, tracers: np.ndarray | None = None) -> QGState:
        """Return the state of given fields.

        Parameters
        ----------
        q
            Potential vorticity of the two layers without that of the mean flow, s-1, shape (2, n, n).
        tracers
            Shape (tracers, n, n); zero by default.
        """
        fields = np.zeros((2 + len(self.tracers), self.nx, self.nx))
        fields[:2] = q
        if tracers is not None:
            fields[2:] = tracers
        return QGState(scipy.fft.rfft2(fields) * self.filter)

    def fields(self, state: QGState) -> np.ndarray:
        """Return q_1, q_2 and the tracers, shape (2 + tracers, n, n)."""
        return self._to_grid(state.spectrum)

    def streamfunction(self, state: QGState) -> np.ndarray:
        """Return psi_1 and psi_2 in m2 s-1, shape (2, n, n)."""
        return self._to_grid(self._invert(state.spectrum))

    def velocity(self, state: QGState) -> np.ndarray:
        """Return u and v of both layers without the mean flow, m s-1, shape (2, 2, n, n), components first."""
        k, l = self.wavenumbers  # noqa: E741
        psi = self._invert(state.spectrum)
        return self._to_grid(np.stack([-1j * l * psi, 1j * k * psi]))

    def kinetic_energy(self, state: QGState) -> np.ndarray:
        """Return the mean of (u**2 + v**2) / 2 in each layer without the mean flow, m2 s-2, shape (2,)."""
        return np.asarray((self.velocity(state) ** 2).sum(0).mean((-2, -1)) / 2)

    def energy(self, state: QGState) -> float:
        """Return kinetic and available potential energy per mass of both layers together, m2 s-2."""
        psi = self.streamfunction(state)
        share = self.delta / (1 + self.delta)  # of the upper layer in the depth
        kinetic = np.array([share, 1 - share]) @ self.kinetic_energy(state)
        return float(kinetic + share * self.stretching[0] * ((psi[0] - psi[1]) ** 2).mean() / 2)

    def advance(self, state: QGState, steps: int) -> QGState:
        """Return the state `steps` time steps later.

        Raises
        ------
        StateError
            If the numbers overflow.
        """
        spectrum, past = state.spectrum, list(state.tendencies)
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(steps):
                past = [self._tendency(spectrum), *past[: self.order - 1]]
                weights = _ADAMS_BASHFORTH[len(past)]
                change = (weights[0] * self.dt) * past[0]
                for weight, tendency in zip(weights[1:], past[1:], strict=True):
                    change += (weight * self.dt) * tendency
                change += spectrum
                change *= self.filter
                spectrum = change
        if not np.isfinite(spectrum).all():
            raise StateError(
                f"The simulation overflowed with time steps of dt={self.dt:g} s; take shorter ones, for example dt={self.dt / 2:g}."
            )
        return QGState(spectrum, tuple(past[: self.order - 1]), state.time + steps * self.dt)

    def _to_grid(self, spectrum: np.ndarray) -> np.ndarray:
        return np.asarray(scipy.fft.irfft2(spectrum, s=(self.nx, self.nx)))

    def _invert(self, spectrum: np.ndarray) -> np.ndarray:
        (a, b), (c, d) = self._inversion
        q1, q2 = spectrum[0], spectrum[1]
        return np.stack([a * q1 + b * q2, c * q1 + d * q2])

    def _tendency(self, spectrum: np.ndarray) -> np.ndarray:
        """Return the time derivative of spectra, shape (2 + tracers, ..., n, n // 2 + 1); further states lie between rows and waves."""
        k, l = self.wavenumbers  # noqa: E741
        inner = (slice(None), *(None,) * (spectrum.ndim - 3))
        rows = len(spectrum)
        psi = self._invert(spectrum)
        work = np.empty((rows + 4, *spectrum.shape[1:]), dtype=complex)
        work[:rows] = spectrum
        np.multiply(-1j * l, psi, out=work[rows : rows + 2])
        np.multiply(1j * k, psi, out=work[rows + 2 :])
        grid = self._to_grid(work)
        fields, u, v = grid[:rows], grid[rows : rows + 2], grid[rows + 2 :]
        u[0] += self.U1
        u[1] += self.U2
        flux = np.empty((2, rows, *spectrum.shape[1:-2], self.nx, self.nx))
        for velocity, out in ((u, flux[0]), (v, flux[1])):
            np.multiply(velocity[0], fields[0], out=out[0])
            np.multiply(velocity[1], fields[1], out=out[1])
            np.multiply(velocity[0], fields[2:], out=out[2:])
        along = scipy.fft.rfft2(flux, overwrite_x=True)
        change: np.ndarray = -1j * k * along[0]
        change -= (1j * l) * along[1]
        change[:2] += self._linear[:2][inner] * psi
        change[2:] += self._linear[2:][inner] * psi[0] - self._decay[inner] * spectrum[2:]
        return change


#: Colder and fresher towards the pole, saltier to the west: the two gradients are at an angle of 63 degrees.
OCEAN_TRACERS = (
    Tracer(gradient_x=0.3e-5, gradient_y=-1.2e-5, relaxation=45 * 86400.0, diffusivity=100.0),
    Tracer(gradient_x=-1.4e-6, gradient_y=-1.2e-6, relaxation=90 * 86400.0, diffusivity=100.0),
)
MEAN_TEMPERATURE, MEAN_SALINITY = 18.0, 35.5  # degC and psu: 1e-3, the CF spelling, is no unit to pint
#: Variables of `simulate_ocean`, in the order of `ocean_surface`.
OCEAN_VARIABLES = {
    "ssh": {"standard_name": "sea_surface_height_above_geoid", "long_name": "sea surface height", "units": "m"},
    "temperature": {"standard_name": "sea_surface_temperature", "long_name": "sea surface temperature", "units": "degC"},
    "salinity": {"standard_name": "sea_surface_salinity", "long_name": "sea surface salinity", "units": "psu"},
    "u": {"standard_name": "eastward_sea_water_velocity", "long_name": "eastward velocity", "units": "m s-1"},
    "v": {"standard_name": "northward_sea_water_velocity", "long_name": "northward velocity", "units": "m s-1"},
}


#: What makes a state complete, beside height, temperature and salinity.
LOWER_LAYER = {"lower": {"long_name": "streamfunction of the lower layer as a height", "units": "m"}}


def ocean_model(
    size: int, spacing: float, latitude: float, *, dt: float, rd: float = 25e3, U1: float = 0.1, rek: float = 1e-6
) -> TwoLayerQG:
    """Return the model of `simulate_ocean`, see `TwoLayerQG`."""
    return TwoLayerQG(
        nx=size, length=size * spacing, beta=2 * ROTATION * math.cos(math.radians(latitude)) / EARTH_RADIUS, rd=rd, delta=0.25,
        U1=U1, U2=0.0, rek=rek, filterfac=18.4, dt=dt,
        tracers=tuple(replace(t, gradient_y=math.copysign(1, latitude) * t.gradient_y) for t in OCEAN_TRACERS),
    )  # fmt: skip


def simulate_ocean(
    times: int = 365,
    *,
    every: str | pd.Timedelta = "1D",
    start: str | pd.Timestamp = "2000-01-01",
    size: int = 64,
    spacing: float = 15e3,
    seed: int = 0,
    spinup: str | pd.Timedelta = "360D",
    latitude: float = 38.0,
    longitude: float = -55.0,
    cyclogeostrophic: bool = True,
    lower: bool = False,
) -> xr.Dataset:
    """Simulate the surface of an eddying ocean, as the truth of a twin experiment or to train a model on.

    Two-layer quasi-geostrophic turbulence (`TwoLayerQG`) with parameters of a mid-latitude current: eddies of some 12 cells from
    crest to crest, kinetic energy 0.05 m2 s-2, and a memory of 10 to 20 days. Runs of different seeds are independent.

    Parameters
    ----------
    times
        Number of output times.
    every
        Spacing of the output times.
    start
        Label of the first output time.
    size
        Cells along each side of the square, doubly periodic basin; even, at least 16.
    spacing
        Width of a cell in metres. The deformation radius stays at 25 km, whatever the spacing.
    seed
        Of the random flow that the run begins with.
    spinup
        Simulated before the first output time; statistics are steady after about 300 days.
    latitude, longitude
        Centre of the basin in degrees. `latitude` sets the Coriolis parameter and its gradient, and is 25 to 70 north or south.
    cyclogeostrophic
        Whether `u` and `v` have the centrifugal force of curved flow added to their balance, to first order in the Rossby number.
        Otherwise they are geostrophic.
    lower
        Whether the flow of the lower layer is returned, too: with it a state is complete, and `ocean_forecast` can go on from it.

    Returns
    -------
    xarray.Dataset
        ``ssh`` (m), ``temperature`` (degC), ``salinity`` (psu), ``u`` and ``v`` (m s-1) in single precision on
        (time, latitude, longitude), with `lower` also ``lower`` (m), the streamfunction of the lower layer as a
        height. Mean slope, mean current and mean gradients are left out: the statistics are the same
        everywhere.

    Raises
    ------
    OptionError
        A keyword is not accepted.

    Notes
    -----
    The plane becomes a piece of the globe with the Coriolis parameter f and the length of a degree of longitude those of the
    central latitude in every row. ``ssh`` is f psi_1 / g. At the default size and latitude the Coriolis parameter of the sphere
    differs from f by up to 10 % in the outer rows, and so do geostrophic velocities taken from ``ssh`` on the sphere.

    Temperature and salinity are passive, with mean gradients across each other and different decay times: their correlation
    with each other is weak (0.2), and that with ``ssh`` 0.7 and 0.4.

    Examples
    --------
    >>> import xgenda
    >>> ocean = xgenda.tutorial.simulate_ocean(times=3, size=32, spinup="2D")
    >>> dict(ocean.sizes)
    {'time': 3, 'latitude': 32, 'longitude': 32}
    """
    times, size, seed = check_count("times", times), check_count("size", size, 16), check_count("seed", seed, 0)
    if size % 2:
        raise OptionError(f"size={size} is not accepted; it must be even, for example size={size + 1}.")
    if not (_is_number(spacing) and 1e3 <= spacing <= 20e3):
        raise OptionError(f"spacing={spacing!r} is not accepted; it is 1e3 to 20e3 metres, for example spacing=15e3.")
    if not (_is_number(latitude) and 25 <= abs(latitude) <= 70):
        raise OptionError(
            f"latitude={latitude!r} is not accepted; it must be 25 to 70 degrees north or south, for example latitude=38."
        )
    if not (_is_number(longitude) and -360 <= longitude <= 360):
        raise OptionError(f"longitude={longitude!r} is not accepted; it is in degrees east, for example longitude=-55.")
    interval, before = _seconds("every", every), _seconds("spinup", spinup, 0.0)
    labels = _labels(start, times, interval)

    coriolis = 2 * ROTATION * math.sin(math.radians(latitude))
    longest = 2400.0 * spacing / 15e3  # stable up to 2 m s-1
    model = ocean_model(size, spacing, latitude, dt=interval / math.ceil(interval / longest))
    per_output = round(interval / model.dt)
    state = model.advance(_random_flow(model, seed), round(before / model.dt))
    variables = OCEAN_VARIABLES | (LOWER_LAYER if lower else {})
    fields = np.empty((len(variables), times, size, size), dtype=np.float32)
    for t in range(times):
        if t:
            state = model.advance(state, per_output)
        fields[: len(OCEAN_VARIABLES), t] = ocean_surface(model, state, coriolis, cyclogeostrophic)
        if lower:
            fields[-1, t] = model.streamfunction(state)[1] * (coriolis / GRAVITY)

    offset = (np.arange(size) - (size - 1) / 2) * spacing
    degree = math.radians(EARTH_RADIUS)
    rows, columns = latitude + offset / degree, longitude + offset / (degree * math.cos(math.radians(latitude)))
    parameters = {
        "beta": model.beta, "rd": model.rd, "delta": model.delta, "U1": model.U1, "U2": model.U2, "rek": model.rek, "dt": model.dt,
        "filterfac": model.filterfac, "f": coriolis, "spacing": float(spacing),
    }  # fmt: skip
    return xr.Dataset(
        {
            name: (("time", "latitude", "longitude"), field, dict(attrs))
            for (name, attrs), field in zip(variables.items(), fields, strict=True)
        },
        coords={
            "time": ("time", labels, {"standard_name": "time", "long_name": "time"}),
            "latitude": ("latitude", rows, {"standard_name": "latitude", "units": "degrees_north", "long_name": "latitude"}),
            "longitude": (
                "longitude",
                columns,
                {"standard_name": "longitude", "units": "degrees_east", "long_name": "longitude"},
            ),
        },
        attrs={
            "Conventions": "CF-1.11",
            "title": "Simulated ocean: two-layer quasi-geostrophic turbulence with passive temperature and salinity",
            "source": f"xgenda {package_version()}, xgenda.twins.simulate_ocean",
            "comment": "Doubly periodic plane. Mean slope, mean current and mean gradients are left out. "
            + ("Velocities are in cyclogeostrophic balance." if cyclogeostrophic else "Velocities are geostrophic."),
            "seed": seed,
            "spinup_days": before / 86400,
            **parameters,
        },
    )


def _is_number(found: object) -> bool:
    return not isinstance(found, bool) and isinstance(found, numbers.Real) and math.isfinite(float(found))


def _seconds(argument: str, found: str | pd.Timedelta, minimum: float | None = None) -> float:
    """Return a time span in seconds, more than zero or at least `minimum`."""
    try:
        seconds = float(pd.Timedelta(found).total_seconds())
    except (TypeError, ValueError):
        seconds = math.nan
    if not (seconds > 0 or seconds == minimum) or isinstance(found, (int, float)):
        raise OptionError(
            f"{argument}={found!r} is not accepted; give a time span as pandas reads it, for example {argument}='1D'."
        )
    return seconds


def _labels(start: str | pd.Timestamp, times: int, interval: float) -> np.ndarray:
    try:
        first = pd.Timestamp(start)
        last = first.as_unit("s") + pd.Timedelta(seconds=interval * times).as_unit("s")
        if not (pd.Timestamp.min < first and last < pd.Timestamp.max):
            raise ValueError("dates outside the years 1678 to 2262 do not fit in nanoseconds")
        labels = pd.date_range(first, periods=times, freq=pd.Timedelta(seconds=interval))
    except (TypeError, ValueError) as problem:
        raise OptionError(
            f"start={start!r} is not accepted; give a date, for example start='2000-01-01'. ({problem})"
        ) from problem
    return np.asarray(labels.values, dtype="datetime64[ns]")


def _random_flow(model: TwoLayerQG, seed: int) -> QGState:
    """Return a random upper-layer flow about as energetic as the turbulence that it becomes, and no tracers."""
    noise = np.random.default_rng(seed).normal(size=(model.nx, model.nx))
    scaled = np.hypot(*model.wavenumbers) * model.rd
    psi = scipy.fft.rfft2(noise) * np.exp(-(((scaled - 0.7) / 0.3) ** 2) / 2)
    psi[0, 0] = 0.0
    upper, lower = model.stretching
    q = np.stack([-((scaled / model.rd) ** 2 + upper) * psi, lower * psi])
    fields = scipy.fft.irfft2(q, s=(model.nx, model.nx))
    energy = model.kinetic_energy(model.start(fields))[0]
    return model.start(fields * math.sqrt(4 * (model.U1 - model.U2) ** 2 / energy))


def ocean_surface(model: TwoLayerQG, state: QGState, coriolis: float, cyclogeostrophic: bool) -> np.ndarray:
    """Return the fields of `OCEAN_VARIABLES`, shape (5, ..., n, n)."""
    k, l = model.wavenumbers  # noqa: E741
    psi = scipy.fft.rfft2(model.streamfunction(state)[0])
    derivatives = np.stack([psi, -1j * l * psi, 1j * k * psi, l**2 * psi, k**2 * psi, k * l * psi])
    grid = scipy.fft.irfft2(derivatives, s=(model.nx, model.nx))
    height, (u, v) = grid[0] * (coriolis / GRAVITY), grid[1:3]
    if cyclogeostrophic:  # f k x (u - u_g) = -(u_g . grad) u_g
        u_y, v_x, u_x = grid[3], -grid[4], grid[5]  # v_y = -u_x
        u, v = u - (u * v_x - v * u_x) / coriolis, v + (u * u_x + v * u_y) / coriolis
    temperature, salinity = model.fields(state)[2:]
    return np.stack([height, MEAN_TEMPERATURE + temperature, MEAN_SALINITY + salinity, u, v])

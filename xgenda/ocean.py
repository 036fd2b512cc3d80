"""Surface currents taken apart and put together again: geostrophic, Ekman and what is left.

::

    u = u_geostrophic(ssh) + u_ekman(wind stress) + u_ageostrophic,    the same for v

Martin, Manucharyan and Klein 2025, J. Adv. Model. Earth Syst., doi:10.1029/2025MS005063. Metrics are those of the sphere in
each row; everything is lazy for dask.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

import numpy as np
import scipy.ndimage
import xarray as xr

from xgenda import metadata
from xgenda.errors import CoordinateError, GridError, OptionError, StateError, UnitsError
from xgenda.grids import EARTH_RADIUS, GRAVITY, ROTATION, Grid, Orientation, grid_of

_EAST, _NORTH = "eastward_sea_water_velocity", "northward_sea_water_velocity"
TOTAL = {
    "u": {"standard_name": _EAST, "long_name": "eastward velocity", "units": "m s-1"},
    "v": {"standard_name": _NORTH, "long_name": "northward velocity", "units": "m s-1"},
}
GEOSTROPHIC = {
    "u_geostrophic": {
        "standard_name": f"surface_geostrophic_{_EAST}", "long_name": "eastward geostrophic velocity", "units": "m s-1",
    },
    "v_geostrophic": {
        "standard_name": f"surface_geostrophic_{_NORTH}", "long_name": "northward geostrophic velocity", "units": "m s-1",
    },
}  # fmt: skip
EKMAN = {
    "u_ekman": {"standard_name": f"{_EAST}_due_to_ekman_drift", "long_name": "eastward Ekman velocity", "units": "m s-1"},
    "v_ekman": {"standard_name": f"{_NORTH}_due_to_ekman_drift", "long_name": "northward Ekman velocity", "units": "m s-1"},
}
#: CF has no standard name for it.
AGEOSTROPHIC = {
    "u_ageostrophic": {"long_name": "eastward velocity that is neither geostrophic nor Ekman", "units": "m s-1"},
    "v_ageostrophic": {"long_name": "northward velocity that is neither geostrophic nor Ekman", "units": "m s-1"},
}
STRESS = {
    "tau_x": {"standard_name": "surface_downward_eastward_stress", "long_name": "eastward wind stress", "units": "N m-2"},
    "tau_y": {"standard_name": "surface_downward_northward_stress", "long_name": "northward wind stress", "units": "N m-2"},
}
COEFFICIENTS = {
    "C_ux": {"long_name": "eastward velocity per eastward stress", "units": "m3 N-1 s-1"},
    "C_uy": {"long_name": "eastward velocity per northward stress", "units": "m3 N-1 s-1"},
    "C_vx": {"long_name": "northward velocity per eastward stress", "units": "m3 N-1 s-1"},
    "C_vy": {"long_name": "northward velocity per northward stress", "units": "m3 N-1 s-1"},
}
INTERCEPTS = {
    "C_u": {"long_name": "eastward velocity without stress", "units": "m s-1"},
    "C_v": {"long_name": "northward velocity without stress", "units": "m s-1"},
}


def coriolis_parameter(latitude: float | np.ndarray | xr.DataArray) -> float | np.ndarray | xr.DataArray:
    """Return f = 2 Omega sin(latitude), with Omega = 7.292115e-5 s-1.

    Parameters
    ----------
    latitude : float, numpy.ndarray or xarray.DataArray
        Degrees north, of any shape.

    Returns
    -------
    float, numpy.ndarray or xarray.DataArray
        s-1, as `latitude`.

    Examples
    --------
    >>> round(coriolis_parameter(30.0), 8)
    7.292e-05
    """
    if isinstance(latitude, xr.DataArray):
        out: xr.DataArray = xr.apply_ufunc(coriolis_parameter, latitude, dask="allowed", keep_attrs=False)
        return out.rename("f").assign_attrs(standard_name="coriolis_parameter", long_name="Coriolis parameter", units="s-1")
    if isinstance(latitude, (int, float)):
        return 2 * ROTATION * math.sin(math.radians(latitude))
    out_array: np.ndarray = 2 * ROTATION * np.sin(np.radians(latitude))
    return out_array


def geostrophic_velocity(ssh: xr.DataArray, *, equator: float = 5.0, smoothing: float | None = None) -> xr.Dataset:
    """Return the geostrophic velocity of a sea surface height.

    Parameters
    ----------
    ssh : xarray.DataArray
        Sea surface height over one-dimensional latitude and longitude, and any other dimensions, in any order and direction;
        of any unit of length, metres where it has none.
    equator
        Cells nearer to the equator than this, in degrees, are NaN.
    smoothing
        Standard deviation in kilometres of a Gaussian that smooths the velocities; None for none. It needs even longitudes.

    Returns
    -------
    xarray.Dataset
        ``u_geostrophic`` and ``v_geostrophic``, m s-1, with the dimensions of `ssh`. Cells without `ssh` and their neighbours
        are NaN.

    Raises
    ------
    OptionError, CoordinateError, GridError, UnitsError
        `ssh` or a keyword cannot be used.

    Notes
    -----
    u = -(g / f) d ssh/dy and v = (g / f) d ssh/dx with dx = R cos(latitude) dlon; centred differences, of second order for even
    spacing, across the seam of a global grid, and one-sided at the edges of a region. Smoothing averages over the cells that have
    a value, with a width in cells of its own in each row; distances along latitude are exact for uneven spacing too.

    Examples
    --------
    >>> import xgenda
    >>> from xgenda.ocean import geostrophic_velocity
    >>> ocean = xgenda.tutorial.simulate_ocean(times=1, size=32, spinup="2D")
    >>> list(geostrophic_velocity(ocean.ssh))
    ['u_geostrophic', 'v_geostrophic']
    """
    height = _field("ssh", ssh, "m")
    _check_number("equator", equator, 0.0, 90.0, "equator=5.0")
    if smoothing is not None:
        _check_number("smoothing", smoothing, 1e-3, 1e5, "smoothing=25.0, in kilometres")
    ds = height.to_dataset(name="ssh")
    layout = metadata.find_layout(ds, "ssh")
    horizontal = list(layout.dims)
    grid, orientation = grid_of(ds, layout, "ssh")
    if min(grid.shape) < 2:
        raise GridError(f"ssh has {grid.shape[0]} x {grid.shape[1]} cells; gradients need at least 2 x 2.")
    step = np.diff(grid.longitude)
    if smoothing is not None and np.ptp(step) > 0.01 * step.mean():
        raise GridError(
            f"ssh: smoothing needs evenly spaced longitudes; {layout.longitude!r} has steps of {step.min():.6g} to {step.max():.6g} "
            f"degrees. Leave it out: smoothing=None"
        )
    if height.chunks is not None:  # differences and Gaussians reach across the whole field
        height = height.chunk(dict.fromkeys(horizontal, -1))
    u, v = xr.apply_ufunc(
        _geostrophic, height, input_core_dims=[horizontal], output_core_dims=[horizontal] * 2, dask="parallelized",
        output_dtypes=[height.dtype] * 2, keep_attrs=False,
        kwargs={"grid": grid, "orientation": orientation, "equator": float(equator), "width": 1e3 * (smoothing or 0.0)},
    )  # fmt: skip
    return _dataset({"u_geostrophic": u.transpose(*height.dims), "v_geostrophic": v.transpose(*height.dims)}, GEOSTROPHIC)


def wind_stress(u10: xr.DataArray, v10: xr.DataArray, *, air_density: float = 1.2, drag: float = 1.2e-3) -> xr.Dataset:
    """Return the stress of the wind on the sea, tau = air_density drag abs(U) U.

    Parameters
    ----------
    u10, v10 : xarray.DataArray
        Eastward and northward wind at 10 m on the same coordinates; of any unit of speed, m s-1 where they have none.
    air_density
        kg m-3.
    drag
        Drag coefficient, no unit.

    Returns
    -------
    xarray.Dataset
        ``tau_x`` and ``tau_y``, N m-2.

    Examples
    --------
    >>> import xarray as xr
    >>> wind = xr.DataArray([3.0, 10.0], dims="time")
    >>> wind_stress(wind, 0 * wind).tau_x.values.round(5).tolist()
    [0.01296, 0.144]
    """
    for name, value in (("air_density", air_density), ("drag", drag)):
        _check_number(name, value, 0.0, 1e3, {"air_density": "air_density=1.2", "drag": "drag=1.2e-3"}[name])
    fields = {"u10": _field("u10", u10, "m s-1"), "v10": _field("v10", v10, "m s-1")}
    _check_aligned(fields)
    east, north = fields.values()
    factor = air_density * drag * (east**2 + north**2) ** 0.5
    return _dataset({"tau_x": factor * east, "tau_y": factor * north}, STRESS)


def fit_ekman(
    residual_u: xr.DataArray,
    residual_v: xr.DataArray,
    tau_x: xr.DataArray,
    tau_y: xr.DataArray,
    *,
    time: str = "time",
    intercept: bool = False,
) -> xr.Dataset:
    """Regress velocities on the wind stress, in each cell, by least squares over time.

    Parameters
    ----------
    residual_u, residual_v : xarray.DataArray
        Velocity less the geostrophic one; m s-1 where it has no units.
    tau_x, tau_y : xarray.DataArray
        Wind stress; N m-2 where it has no units.
    time
        Dimension to fit over.
    intercept
        Whether to fit a constant as well.

    Returns
    -------
    xarray.Dataset
        ``C_ux``, ``C_uy``, ``C_vx`` and ``C_vy`` in m3 N-1 s-1, where u = C_ux tau_x + C_uy tau_y, and with `intercept` ``C_u`` and
        ``C_v`` in m s-1. NaN in cells where a value is missing at any time, or where the stress has one direction only.

    Raises
    ------
    OptionError, CoordinateError, UnitsError
        The fields do not fit together.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> tau_x, tau_y = (xr.DataArray(np.random.default_rng(i).normal(size=50), dims="time") for i in range(2))
    >>> fit = fit_ekman(0.3 * tau_x + 0.1 * tau_y, -0.1 * tau_x + 0.3 * tau_y, tau_x, tau_y)
    >>> [round(float(c), 6) for c in fit.values()]
    [0.3, 0.1, -0.1, 0.3]
    """
    fields = {
        "residual_u": _field("residual_u", residual_u, "m s-1"), "residual_v": _field("residual_v", residual_v, "m s-1"),
        "tau_x": _field("tau_x", tau_x, "N m-2"), "tau_y": _field("tau_y", tau_y, "N m-2"),
    }  # fmt: skip
    for name, array in fields.items():
        if time not in array.dims:
            raise CoordinateError(
                f"{name} has dimensions {array.dims} and lacks {time!r}, over which coefficients are fitted. "
                f"Name yours: time={str(next(iter(array.dims), 'time'))!r}"
            )
    _check_aligned(fields)
    needed = 3 if intercept else 2
    if fields["tau_x"].sizes[time] <= needed:
        raise OptionError(
            f"{fields['tau_x'].sizes[time]} times along {time!r} cannot fix {needed} coefficients in each cell; "
            f"give more of them, or known coefficients."
        )
    # in double precision: sums of squares in single precision lose what the determinant needs
    u, v, x, y = (a.astype(np.float64) for a in fields.values())
    complete = (u + v + x + y).notnull().all(time)
    u, v, x, y = (a.where(complete) for a in (u, v, x, y))
    means = [a.mean(time) if intercept else xr.zeros_like(a.isel({time: 0}, drop=True)) for a in (u, v, x, y)]
    u, v, x, y = (a - m for a, m in zip((u, v, x, y), means, strict=True))

    def total(array: xr.DataArray) -> xr.DataArray:
        return array.sum(time, skipna=False)

    xx, yy, xy = total(x * x), total(y * y), total(x * y)
    determinant = xx * yy - xy**2
    determinant = determinant.where(determinant > 1e-12 * xx * yy)
    out = {}
    for name, residual, mean in (("u", u, means[0]), ("v", v, means[1])):
        along_x, along_y = total(residual * x), total(residual * y)
        out[f"C_{name}x"] = (yy * along_x - xy * along_y) / determinant
        out[f"C_{name}y"] = (xx * along_y - xy * along_x) / determinant
        if intercept:
            out[f"C_{name}"] = mean - out[f"C_{name}x"] * means[2] - out[f"C_{name}y"] * means[3]
    names = [*COEFFICIENTS, *(INTERCEPTS if intercept else ())]
    return _dataset({n: out[n] for n in names}, COEFFICIENTS | INTERCEPTS)


def ekman_velocity(coefficients: xr.Dataset, tau_x: xr.DataArray, tau_y: xr.DataArray) -> xr.Dataset:
    """Return the Ekman velocity of a wind stress.

    Parameters
    ----------
    coefficients : xarray.Dataset
        As of `fit_ekman`.
    tau_x, tau_y : xarray.DataArray
        Wind stress; N m-2 where it has no units.

    Returns
    -------
    xarray.Dataset
        ``u_ekman`` and ``v_ekman``, m s-1.
    """
    held = list(getattr(coefficients, "data_vars", ()))
    lacking = [n for n in COEFFICIENTS if n not in held]
    if lacking:
        raise OptionError(
            f"coefficients lack {', '.join(map(repr, lacking))}; give what xgenda.ocean.fit_ekman returns: "
            f"coefficients=fit_ekman(residual_u, residual_v, tau_x, tau_y)"
        )
    fields = {"tau_x": _field("tau_x", tau_x, "N m-2"), "tau_y": _field("tau_y", tau_y, "N m-2")}
    _check_aligned({**fields, "coefficients": coefficients["C_ux"]})
    out = {}
    for name in ("u", "v"):
        velocity = coefficients[f"C_{name}x"] * fields["tau_x"] + coefficients[f"C_{name}y"] * fields["tau_y"]
        if f"C_{name}" in coefficients:
            velocity = velocity + coefficients[f"C_{name}"]
        out[f"{name}_ekman"] = velocity.transpose(*fields["tau_x"].dims, ...)
    return _dataset(out, EKMAN)


def decompose_velocity(
    u: xr.DataArray,
    v: xr.DataArray,
    ssh: xr.DataArray,
    tau_x: xr.DataArray | None = None,
    tau_y: xr.DataArray | None = None,
    *,
    coefficients: xr.Dataset | None = None,
    time: str = "time",
    intercept: bool = False,
    equator: float = 5.0,
    smoothing: float | None = None,
) -> xr.Dataset:
    """Split a current into its geostrophic part, its Ekman part, and what is left.

    Parameters
    ----------
    u, v : xarray.DataArray
        Eastward and northward velocity; m s-1 where they have no units.
    ssh : xarray.DataArray
        Sea surface height on the same coordinates.
    tau_x, tau_y : xarray.DataArray, optional
        Wind stress, as of `wind_stress`. Without it there is no Ekman part.
    coefficients : xarray.Dataset, optional
        As of `fit_ekman`. Fitted to the fields given here where it is left out; to keep test data apart, fit to the training data.
    time, intercept
        As in `fit_ekman`.
    equator, smoothing
        As in `geostrophic_velocity`.

    Returns
    -------
    xarray.Dataset
        ``u_geostrophic``, ``u_ekman`` (with wind stress), ``u_ageostrophic``, the same for v, in m s-1, and the coefficients.
        NaN where one of the parts is.

    Examples
    --------
    >>> import xgenda
    >>> from xgenda.ocean import compose_velocity, decompose_velocity
    >>> ocean = xgenda.tutorial.simulate_ocean(times=2, size=32, spinup="2D")
    >>> parts = decompose_velocity(ocean.u, ocean.v, ocean.ssh)
    >>> float(abs(compose_velocity(parts).u - ocean.u).max()) < 1e-6
    True
    """
    fields = {"u": _field("u", u, "m s-1"), "v": _field("v", v, "m s-1"), "ssh": _field("ssh", ssh, "m")}
    stress = _stress(tau_x, tau_y)
    _check_aligned(fields | stress)
    parts = geostrophic_velocity(fields["ssh"], equator=equator, smoothing=smoothing)
    rest = {n: fields[n] - parts[f"{n}_geostrophic"] for n in ("u", "v")}
    if stress:
        if coefficients is None:
            coefficients = fit_ekman(rest["u"], rest["v"], **stress, time=time, intercept=intercept)
        ekman = ekman_velocity(coefficients, **stress)
        rest = {n: rest[n] - ekman[f"{n}_ekman"] for n in rest}
        kept = {n: coefficients[n] for n in (*COEFFICIENTS, *INTERCEPTS) if n in coefficients}
        parts = parts.assign({**ekman.data_vars, **kept})
    elif coefficients is not None:
        raise OptionError("coefficients are given without wind stress; add it: tau_x=..., tau_y=...")
    remainder = {f"{n}_ageostrophic": rest[n].transpose(*fields[n].dims) for n in ("u", "v")}
    return parts.assign(dict(_dataset(remainder, AGEOSTROPHIC).data_vars))


def compose_velocity(
    parts: xr.Dataset,
    *,
    ssh: xr.DataArray | None = None,
    tau_x: xr.DataArray | None = None,
    tau_y: xr.DataArray | None = None,
    coefficients: xr.Dataset | None = None,
    equator: float = 5.0,
    smoothing: float | None = None,
) -> xr.Dataset:
    """Put a current together from its parts: the inverse of `decompose_velocity`.

    Parameters
    ----------
    parts : xarray.Dataset
        ``u_ageostrophic`` and ``v_ageostrophic``; ``u_geostrophic``, ``v_geostrophic`` unless `ssh` is given; ``u_ekman``, ``v_ekman``
        unless wind stress is given, or where there is no Ekman part.
    ssh : xarray.DataArray, optional
        Sea surface height to take the geostrophic part from, in place of that in `parts`.
    tau_x, tau_y : xarray.DataArray, optional
        Wind stress to take the Ekman part from, in place of that in `parts`.
    coefficients : xarray.Dataset, optional
        As of `fit_ekman`; those in `parts` where it is left out.
    equator, smoothing
        As in `decompose_velocity`: the values must be the same.

    Returns
    -------
    xarray.Dataset
        ``u`` and ``v``, m s-1.
    """
    if not isinstance(parts, xr.Dataset):
        raise OptionError(f"parts is a {type(parts).__name__}; a Dataset is needed, as xgenda.ocean.decompose_velocity returns.")
    needed = [*AGEOSTROPHIC, *(() if ssh is not None else GEOSTROPHIC)]
    lacking = [n for n in needed if n not in parts]
    if lacking:
        raise OptionError(
            f"parts lack {', '.join(map(repr, lacking))}; they have {', '.join(map(repr, parts.data_vars)) or 'none'}."
            + (" Give the sea surface height: ssh=..." if set(lacking) <= set(GEOSTROPHIC) else "")
        )
    stress = _stress(tau_x, tau_y)
    if coefficients is not None and not stress:
        raise OptionError("coefficients are given without wind stress; add it: tau_x=..., tau_y=...")
    balanced = parts if ssh is None else geostrophic_velocity(ssh, equator=equator, smoothing=smoothing)
    ekman = ekman_velocity(parts if coefficients is None else coefficients, **stress) if stress else parts
    out = {}
    for n in ("u", "v"):
        rest = _field(f"parts['{n}_ageostrophic']", parts[f"{n}_ageostrophic"], "m s-1")
        terms = {"parts": rest, "ssh": _field(f"parts['{n}_geostrophic']", balanced[f"{n}_geostrophic"], "m s-1")}
        if f"{n}_ekman" in ekman:
            terms["tau_x"] = _field(f"parts['{n}_ekman']", ekman[f"{n}_ekman"], "m s-1")
        _check_aligned(terms)
        total = sum(list(terms.values())[1:], start=rest)
        out[n] = total.transpose(*rest.dims, ...)
    return _dataset(out, TOTAL)


def _dataset(fields: Mapping[str, xr.DataArray], attrs: Mapping[str, Mapping[str, str]]) -> xr.Dataset:
    out = xr.Dataset(dict(fields), attrs={"Conventions": "CF-1.11"})
    for name in fields:
        out[name].attrs = dict(attrs[name])
    return out


def _field(argument: str, found: object, units: str) -> xr.DataArray:
    """Return `found` as real numbers in `units`, under no name."""
    if not isinstance(found, xr.DataArray):
        hint = f" Select the variable: {argument}=ds[{argument!r}]" if isinstance(found, xr.Dataset) else ""
        raise OptionError(
            f"{argument} is a {type(found).__module__}.{type(found).__name__}; an xarray DataArray is needed.{hint}"
        )
    if found.dtype.kind not in "fiu":
        raise StateError(f"{argument} has dtype {found.dtype}; real numbers are needed: {argument}.astype('float32')")
    try:
        out = metadata.convert_units(found, units)
    except UnitsError as problem:
        raise UnitsError(f"{argument}: {problem}") from problem
    return (out if out.dtype.kind == "f" else out.astype(np.float64)).rename(None)


def _stress(tau_x: xr.DataArray | None, tau_y: xr.DataArray | None) -> dict[str, xr.DataArray]:
    if tau_x is None and tau_y is None:
        return {}
    if tau_x is None or tau_y is None:
        lacking, given = ("tau_x", "tau_y") if tau_x is None else ("tau_y", "tau_x")
        raise OptionError(f"{given} is given without {lacking}; add it: {lacking}=...")
    return {"tau_x": _field("tau_x", tau_x, "N m-2"), "tau_y": _field("tau_y", tau_y, "N m-2")}


def _check_aligned(fields: Mapping[str, xr.DataArray]) -> None:
    """Refuse fields whose coordinates differ: xarray would silently keep the cells in common."""
    try:
        xr.align(*fields.values(), join="exact", copy=False)
    except ValueError as problem:
        names = list(fields)
        raise OptionError(
            f"{', '.join(names[:-1])} and {names[-1]} have different coordinates; put them on the same: "
            f"{names[-1]}.interp_like({names[0]}). ({problem})"
        ) from problem


def _check_number(argument: str, found: object, lowest: float, highest: float, example: str) -> None:
    if isinstance(found, bool) or not isinstance(found, numbers.Real) or not lowest <= float(found) <= highest:
        raise OptionError(
            f"{argument}={found!r} is not accepted; it must be a number from {lowest:g} to {highest:g}, for example {example}."
        )


def _geostrophic(
    values: np.ndarray, *, grid: Grid, orientation: Orientation, equator: float, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return u and v of sea surface heights (..., latitude, longitude) in the user's order; `width` of the Gaussian in metres."""
    height = orientation.to_model(np.asarray(values, dtype=np.float64))
    phi = np.radians(grid.latitude)
    f = 2 * ROTATION * np.sin(phi)[:, None]
    cosine = np.cos(phi)[:, None]
    use = (np.abs(grid.latitude)[:, None] >= equator) & (f != 0) & (cosine > 1e-9)  # a pole has no east
    factor = np.divide(GRAVITY, f, out=np.full_like(f, np.nan), where=use)
    period = 2 * np.pi * EARTH_RADIUS if grid.periodic else None
    along_y = _gradient(height.swapaxes(-1, -2), EARTH_RADIUS * phi).swapaxes(-1, -2)
    along_x = _gradient(height, EARTH_RADIUS * np.radians(grid.longitude), period) / np.maximum(cosine, 1e-9)
    out = []
    for velocity in (-factor * along_y, factor * along_x):
        smooth = _smooth(velocity, grid, width) if width else velocity
        out.append(orientation.from_model(smooth).astype(values.dtype, copy=False))
    return out[0], out[1]


def _gradient(values: np.ndarray, x: np.ndarray, period: float | None = None) -> np.ndarray:
    """Return the derivative along the last axis at increasing `x`, from three points; NaN where the middle one is NaN."""
    if period is not None:
        values = np.concatenate([values[..., -1:], values, values[..., :1]], -1)
        x = np.concatenate([x[-1:] - period, x, x[:1] + period])
    step = np.diff(x)
    slope = np.diff(values) / step
    before, after = step[:-1], step[1:]
    # 0 * middle: for even spacing the middle cell cancels, and land would go unnoticed
    inner = (after * slope[..., :-1] + before * slope[..., 1:]) / (before + after) + 0 * values[..., 1:-1]
    if period is not None:
        return np.asarray(inner)
    out = np.empty_like(values)
    out[..., 1:-1] = inner
    for edge, inward in ((0, 1), (-1, -2)):
        out[..., edge] = slope[..., edge]
        if len(step) > 1:
            bend = (slope[..., inward] - slope[..., edge]) * step[edge] / (step[edge] + step[inward])
            out[..., edge] -= np.nan_to_num(bend)  # land two cells away spoils the second order only
    return out


def _smooth(values: np.ndarray, grid: Grid, width: float) -> np.ndarray:
    """Return Gaussian means over the cells that have a value, NaN where there is none."""
    missing = np.isnan(values)
    if missing.all():
        return values
    known = (~missing).astype(float)
    north = EARTH_RADIUS * np.radians(grid.latitude)
    kernel = np.exp(-(((north[:, None] - north[None]) / width) ** 2) / 2) * np.abs(np.gradient(north))[None]
    spread = np.stack([np.where(missing, 0.0, values), known])
    spread = kernel @ spread
    metre = EARTH_RADIUS * np.cos(np.radians(grid.latitude)) * np.radians(np.diff(grid.longitude).mean())
    for row, cell in enumerate(metre):
        sigma = min(width / max(cell, 1e-9), 4.0 * grid.shape[1])
        spread[..., row, :] = scipy.ndimage.gaussian_filter1d(
            spread[..., row, :], sigma, axis=-1, mode="wrap" if grid.periodic else "constant"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(missing, np.nan, spread[0] / spread[1]))

"""Priors of cells continued between them: which kernel, and what it makes of places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from xgenda import metadata, states
from xgenda.diffusion.kriging import Kriged
from xgenda.diffusion.random_fields import TorusField
from xgenda.errors import GridError, OptionError, StateError, check_choice
from xgenda.grids import EARTH_RADIUS, Grid
from xgenda.models.fitting import kernel_on
from xgenda.models.places import Between, Places
from xgenda.models.spec import ModelSpec
from xgenda.observations.places import cell_at
from xgenda.scaling import cycle_basis
from xgenda.spherical import unit_vectors
from xgenda.weights import interpolation

KINDS = ("exponential", "matern32", "matern52")
LENGTHS, WIDEST = 8, 30.0  # that are tried, from half of the distance of neighbouring cells to so many of them
WINDOWS, PLACES, TIMES = 3, 120, 60  # of a fit: regions, places of each, times
SOME = 100  # cells, from which distances to the next ones are looked at
EXAMPLE = "model.between_cells(fine), with the fields that it was trained on at a finer grid"


def continued(
    options: Mapping[str, Any], names: list[str], grid: Any, places: Places, colour: TorusField | None
) -> list[Between]:
    """Return for each channel what cells say of places."""
    if options["covariance"] == "waves":
        assert colour is not None
        row, column = (
            (p - float(axis[0])) / float(np.diff(axis).mean())
            for p, axis in ((places.latitude, grid.latitude), (_near(places.longitude, grid), grid.longitude))
        )
        rows = colour.rows(row, column)
        return [Between(rows, torch.zeros(len(rows), len(rows), dtype=torch.float64))] * len(names)
    made: dict[float, Kriged] = {}
    for length in options["length_scale"].values():
        made[length] = made.get(length) or Kriged(
            kernel_on(grid, options["covariance"], length), places.latitude, places.longitude
        )
    return [
        Between(made[options["length_scale"][n]].rows, options["std"][n] * made[options["length_scale"][n]].root) for n in names
    ]


def _near(longitude: Tensor, grid: Grid) -> Tensor:
    return torch.as_tensor(grid.locate(longitude.numpy()))


def fit_between(spec: ModelSpec, fine: xr.Dataset | xr.DataArray) -> dict[str, Any]:
    """Return the kernel under which fields of a finer grid are most likely between the cells of a model, given these.

    Kind and length are searched, the standard deviation has a closed form; places are taken all from a few small regions, because it is neighbours
    in one cell that tell of them.

    Raises
    ------
    GridError, OptionError, StateError
        If `fine` has no places between the cells, or not the variables of the model.
    """
    grid, scaling = spec.grid, spec.scaling
    assert grid is not None
    assert scaling is not None
    state = states.enter(metadata.as_dataset(fine, "fine"), "fine")
    if (member := state.layout.member) in state.ds.dims:
        raise OptionError(f"fine has the ensemble dimension {member!r}; give one member: fine.isel({member}=0)")
    names = [v.name for v in spec.variables]
    found = [states.match_channel(state.ds, v.name, v.standard_name, "fine") for v in spec.variables]
    time = state.layout.time
    dims = [time] if time in state.ds.dims else []
    arrays = [
        metadata.convert_units(state.ds[n], v.units).transpose(*dims, *state.layout.dims)
        for n, v in zip(found, spec.variables, strict=True)
    ]
    some = np.unique(np.linspace(0, state.ds.sizes[time] - 1, TIMES).astype(int)) if dims else np.zeros(1, dtype=int)
    values = np.stack(
        [state.orientation.to_model((a.isel({time: some}) if dims else a.expand_dims("_")).values.astype(float)) for a in arrays],
        1,
    )
    if not np.isfinite(values).all():
        raise StateError("fine holds values that are not finite. Leave them out, or fill them.")
    values = values.reshape(*values.shape[:2], -1)
    times = state.ds[time].isel({time: some}) if dims else None
    climatology = np.broadcast_to(
        scaling.climatology(cycle_basis(times, scaling.cycle, len(some))), (len(some), len(names), *grid.plane)
    ).reshape(len(some), len(names), -1)
    latitude, longitude = state.grid.points()
    to_cells, inside = interpolation(state.grid, *grid.points())
    apart_from_poles = np.abs(latitude) < 90.0 - 1e-6  # where a row is one place
    between = np.flatnonzero(
        interpolation(grid, latitude, longitude)[1] & (cell_at(grid, latitude, longitude) < 0) & apart_from_poles
    )
    if not inside.all() or len(between) < 4:
        raise GridError(
            f"fine must cover the grid of the model ({grid.describe()}) and have places between its cells; it has {state.grid.describe()}."
        )
    cells = to_cells(values)
    vectors = unit_vectors(latitude, longitude)
    rng = np.random.default_rng(0)
    windows = []
    for centre in rng.choice(between, min(WINDOWS, len(between)), replace=False):
        order = np.argsort(((vectors[between] - vectors[centre]) ** 2).sum(-1), kind="stable")
        windows.append(np.sort(between[order[:PLACES]]))
    apart = _spacing(unit_vectors(*grid.points())) * EARTH_RADIUS
    # what does not depend on the kernel: values at the places of each window less what is expected there, and the cells less theirs
    departures = [values[:, :, w] - interpolation(grid, latitude[w], longitude[w])[0](climatology) for w in windows]
    anomalies = cells - climatology
    best: tuple[float, dict[str, Any]] | None = None
    for kind in KINDS:
        chosen, total = {"length_scale": dict[str, float](), "std": dict[str, float]()}, 0.0
        scores = dict.fromkeys(names, (-np.inf, 0.0, 0.0))
        for length in np.geomspace(apart / 2, apart * WIDEST, LENGTHS):
            kernel = kernel_on(grid, kind, float(length))
            made = [Kriged(kernel, torch.as_tensor(latitude[w]), torch.as_tensor(longitude[w])) for w in windows]
            for c, n in enumerate(names):
                square, size, log = 0.0, 0, 0.0
                for departure, k in zip(departures, made, strict=True):
                    left = torch.as_tensor(departure[:, c] - anomalies[:, c] @ k.rows.numpy().T)
                    square += float(torch.linalg.solve_triangular(k.root, left.T, upper=False).square().sum())
                    size += left.numel()
                    log += len(left) * float(k.root.diagonal().log().sum())
                score = -0.5 * size * np.log(square / size) - log
                if score > scores[n][0]:
                    scores[n] = (score, float(length), float(np.sqrt(square / size)))
        for n, (score, length, std) in scores.items():
            chosen["length_scale"][n], chosen["std"][n] = length, std
            total += score
        if best is None or total > best[0]:
            best = total, {"covariance": kind, **chosen}
    assert best is not None
    return best[1]


def _spacing(centres: np.ndarray) -> float:
    """Return the distance of neighbouring cells, unit vectors (n, 3), where it is largest: near the poles of a grid meridians meet."""
    some = centres[np.unique(np.linspace(0, len(centres) - 1, SOME).astype(int))]
    nearest = [np.sort(((one - centres) ** 2).sum(-1))[1] for one in some]
    return float(np.sqrt(max(nearest)))


def check_between(spec: ModelSpec, colour: TorusField | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what lies between cells, checked: a kernel, or for band-limited functions nothing but their waves.

    Raises
    ------
    OptionError
        With the line to type.
    """
    known = {k: v for k, v in given.items() if v is not None}
    if not known:
        if colour is None or colour.cutoff is None:
            raise OptionError(f"between_cells needs a covariance: {EXAMPLE}, or covariance=, length_scale= (in metres) and std=.")
        colour.rows(torch.zeros(1), torch.zeros(1))
        return {"covariance": "waves"}
    if set(known) != {"covariance", "length_scale", "std"}:
        raise OptionError(f"between_cells takes covariance, length_scale and std together, or none of them: {EXAMPLE}")
    check_choice("covariance", known["covariance"], (*KINDS, "gaussian"))
    out: dict[str, Any] = {"covariance": known["covariance"]}
    for key in ("length_scale", "std"):
        value = known[key]
        each = dict(value) if isinstance(value, Mapping) else {v.name: value for v in spec.variables}
        if set(each) != {v.name for v in spec.variables} or not all(_positive(v) for v in each.values()):
            raise OptionError(
                f"{key}={value!r} is not accepted; give a positive number, or one for each of {', '.join(v.name for v in spec.variables)}."
            )
        out[key] = {v.name: float(each[v.name]) for v in spec.variables}
    return out


def _positive(value: Any) -> bool:
    try:
        return 0 < float(value) < np.inf
    except (TypeError, ValueError):
        return False

"""Prognostic models of earth2studio as forecasts.

A model is any object with the interface of ``earth2studio.models.px.PrognosticModel`` (as of 0.19): `input_coords`, `output_coords`, a call for
one step of a tensor with its coordinates, and `create_iterator` for several. Neither earth2studio nor torch is imported: whoever has such a
model has loaded them.
"""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from xgenda import metadata
from xgenda.errors import CoordinateError, GridError, OptionError, StateError, check_count
from xgenda.observations.times import parse_window
from xgenda.published import Interface

#: Dimensions of the tensors of a model; the first two are optional.
DIMS = ("batch", "time", "lead_time", "variable", "lat", "lon")
METHODS = ("input_coords", "output_coords", "create_iterator", "__call__")
#: Steps of an iterator after which it is given up.
STEPS = 1000


@dataclass(frozen=True, eq=False)
class Earth2StudioForecast:
    """A forecast by a prognostic model of earth2studio; see `earth2studio`."""

    model: Any
    interface: Interface
    coords: Mapping[str, np.ndarray]
    single: bool
    batch: int
    seed: int | None
    device: str

    def __call__(self, ds: xr.Dataset) -> xr.Dataset:
        """Return the state of all members one step later."""
        return self.interface.forecast(ds, self._run, self.batch, np.float32)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What `cycle` writes down and compares where a run is resumed: class, weights and options."""
        weights = hashlib.sha256()
        state = self.model.state_dict() if hasattr(self.model, "state_dict") else {}
        for name in sorted(state):
            if hasattr(state[name], "detach"):  # there may be more than tensors
                weights.update(name.encode())
                flat = state[name].detach().cpu().contiguous().reshape(-1)
                weights.update(flat.view(_torch().uint8).numpy().tobytes())
        options = f"{self.interface.settings()} {self.single} {self.seed}"
        kind = type(self.model)
        return {
            "earth2studio": f"{kind.__module__}.{kind.__qualname__}", "weights": weights.hexdigest(),
            "options": hashlib.sha256(options.encode()).hexdigest(),
        }  # fmt: skip

    def _run(self, fields: np.ndarray, time: Any, members: np.ndarray) -> np.ndarray:
        coords = OrderedDict((k, np.array(v)) for k, v in self.coords.items())
        if "batch" in coords:
            coords["batch"] = np.arange(len(fields))
        if "time" in coords:
            if time.dtype.kind != "M":
                raise CoordinateError(
                    "The model reads the time, and knows the calendar of datetime64 only: "
                    "ds.assign_coords(time=numpy.datetime64('2020-01-01T00:00'))"
                )
            coords["time"] = np.atleast_1d(time.values).astype("datetime64[ns]")
        shape = [len(coords[d]) for d in coords]
        tensor = _torch().from_numpy(np.ascontiguousarray(fields.reshape(shape))).to(self.device)
        if self.seed is not None:
            label = f"{self.seed}/{metadata.time_labels(time)[0]}/{members[0]}"
            self.model.set_rng(int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "little") >> 1)
        out, found = self.model(tensor, coords) if self.single else self._advance(tensor, coords)
        leads = list(np.asarray(found["lead_time"]))
        if self.interface.step not in leads:
            raise StateError(
                f"The model returned the lead times {', '.join(map(str, leads))}; {self.interface.step} is expected."
            )
        outputs = [str(v) for v in found["variable"]]
        if outputs != list(self.interface.outputs):
            raise StateError(f"The model returned variables {outputs[:5]}, and has said {list(self.interface.outputs[:5])}.")
        values: np.ndarray = np.moveaxis(np.asarray(out.detach().cpu()), list(found).index("lead_time"), 0)[
            leads.index(self.interface.step)
        ]
        if values.size != len(fields) * len(outputs) * self.interface.grid.size:
            return values  # whose shape will be refused
        return values.reshape(len(fields), len(outputs), *self.interface.grid.shape)

    def _advance(self, tensor: Any, coords: Any) -> tuple[Any, Any]:
        """Return the first output of the iterator that has the lead time."""
        for count, (out, found) in enumerate(self.model.create_iterator(tensor, coords)):
            reached = np.asarray(found["lead_time"])
            if self.interface.step in reached:
                return out, found
            if reached.max() > self.interface.step or count > STEPS:
                break
        raise OptionError(
            f"lead={self.interface.step} is not accepted: the model goes from lead times before it to {reached.max()}. Give a multiple of its step."
        )


def earth2studio(
    model: Any,
    *,
    lead: Any = None,
    variables: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    batch: int = 1,
    seed: int | None = None,
    device: str = "cpu",
) -> Earth2StudioForecast:
    """Return a forecast for `xgenda.cycle` from a prognostic model of earth2studio.

    Variables of the state are found by name or standard name, converted to the units of the model, and turned to the order of its latitudes and
    longitudes; what it returns goes the same way back. All values must be finite, before and after.

    Parameters
    ----------
    model
        Such as ``Pangu6.load_model(Pangu6.load_default_package())``: an object with `input_coords`, `output_coords`, `create_iterator` and a
        call, as of earth2studio 0.19. It is moved to `device` and set to evaluation.
    lead
        What lies between input and output, such as '24h', reached by the model's iterator. None: one step, by its call.
    variables, units, keep
        As in `xgenda.forecasts.onnx`. Channels are those of earth2studio.
    batch
        Members that the model is given at once. More take more memory, and may change last bits.
    seed
        For models that draw random numbers (those with `set_rng`), with the time and the number of the member; needed for them.
    device
        Of torch.

    Returns
    -------
    Earth2StudioForecast
        A function from a Dataset of one time, with or without members, to the same a step later, of the same dtypes. Its `identity`, with a
        checksum of the weights that torch knows of, goes into the record of a cycle.

    Raises
    ------
    OptionError, GridError
        If the model is none, needs several input times (a state is all that goes round in a cycle), has other dimensions than latitude and
        longitude, or several lead times where `lead` is None. When called, if a channel is not found in the state, or the state has another grid.
    StateError, DivergenceError
        When called, if the state or what the model returns is not finite.

    Examples
    --------
    >>> from xgenda import forecasts
    >>> from earth2studio.models.px import Pangu6  # doctest: +SKIP
    >>> forecast = forecasts.earth2studio(Pangu6.load_model(Pangu6.load_default_package()), device="cuda")  # doctest: +SKIP
    """
    lacking = [m for m in METHODS if not callable(getattr(model, m, None))]
    if lacking or isinstance(model, type):
        raise OptionError(
            f"model is {'the class' if isinstance(model, type) else 'a'} {(model if isinstance(model, type) else type(model)).__name__}"
            + (f" without {lacking[0]!r}" if lacking else "")
            + "; a prognostic model of earth2studio is needed: Pangu6.load_model(Pangu6.load_default_package())"
        )
    check_count("batch", batch)
    random = callable(getattr(model, "set_rng", None))
    if seed is None and random:
        raise OptionError("The model draws random numbers; key them, so that a run can be repeated and resumed: seed=0")
    if seed is not None:
        check_count("seed", seed, 0)
        if not random:
            raise OptionError(f"seed={seed} has no effect: the model has no set_rng. Leave it out.")
        if batch > 1:
            raise OptionError(f"batch={batch} is not accepted with a seed: each member has its own random numbers. Leave it out.")
    coords = model.input_coords()
    if not isinstance(coords, Mapping):
        raise OptionError(
            f"input_coords() of the model returned a {type(coords).__name__}; a mapping from dimensions to values is needed, as of "
            "earth2studio 0.19"
        )
    coords = OrderedDict((str(k), np.asarray(v)) for k, v in coords.items())
    odd = [k for k in coords if k not in DIMS]
    if odd or "lead_time" not in coords or list(coords)[-3:] != ["variable", "lat", "lon"]:
        raise GridError(
            f"The model has fields along {tuple(coords)}; {DIMS} are supported: one time, on a grid of latitude and longitude"
            + (f", without {odd[0]!r}." if odd else ".")
        )
    before = coords["lead_time"]
    if len(before) != 1 or before[0] != np.timedelta64(0, "h"):
        raise OptionError(
            f"The model needs the states at lead times {', '.join(str(t) for t in before)}: models of several input times are not "
            "supported, because a "
            f"state of `cycle` is of one."
        )
    if "batch" not in coords and batch > 1:
        raise OptionError(f"batch={batch} is not accepted: the model has no dimension 'batch'. Leave it out.")
    filled = OrderedDict(coords)
    filled |= {
        k: v for k, v in (("batch", np.zeros(1, dtype=int)), ("time", np.array(["2000-01-01"], "datetime64[ns]"))) if k in coords
    }
    after = model.output_coords(filled)
    leads = np.asarray(after["lead_time"]).astype("timedelta64[ns]")
    if lead is None and len(leads) != 1:
        raise OptionError(f"The model returns lead times {', '.join(map(str, after['lead_time']))}; say which: lead='6h'")
    step = leads[0] if lead is None else parse_window(lead, "lead")
    for name in ("lat", "lon"):
        if not np.array_equal(np.asarray(after[name]), coords[name]):
            raise GridError(f"The model returns fields on other {name} than it takes, and a state stays on its grid.")
    interface = Interface.of(
        [str(v) for v in coords["variable"]],
        [str(v) for v in after["variable"]],
        coords["lat"],
        coords["lon"],
        step,
        variables,
        units,
        keep,
    )
    moved = model.to(device) if callable(getattr(model, "to", None)) else model
    moved = model if moved is None else moved
    if callable(getattr(moved, "eval", None)):
        moved.eval()
    single = lead is None or (len(leads) == 1 and step == leads[0])
    return Earth2StudioForecast(moved, interface, coords, single, batch, seed, device)


def _torch() -> Any:
    """Return torch, which the model has loaded: fields know nothing of it."""
    if "torch" not in sys.modules:
        raise OptionError("The model has not loaded torch; a prognostic model of earth2studio is needed.")
    return sys.modules["torch"]

"""What users get wrong, and what they are told; and what looks odd and must simply work."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cftime
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from model_kinds import KINDS, Kind
from safetensors import safe_open
from safetensors.torch import save_file

import xgenda
from xgenda.errors import (
    CheckpointError,
    ChecksumError,
    ChunkingError,
    CoordinateError,
    GridError,
    ModelNotFoundError,
    ObservationError,
    OptionError,
    OutputExistsError,
    StateError,
    UnitsError,
)
from xgenda.models import entries

MEMBERS = 2


@dataclasses.dataclass
class Kit:
    """Good input, to be spoilt in one place."""

    request: pytest.FixtureRequest
    ds: xr.Dataset
    obs: pd.DataFrame
    prior: Any
    tmp: Path

    @property
    def coarse(self) -> xr.Dataset:
        return self.climate.isel(time=[0]).coarsen(latitude=4, longitude=4).mean()

    def __getattr__(self, name: str) -> Any:
        return self.request.getfixturevalue(name)

    def assimilate(self, **change: Any) -> xr.Dataset:
        given = {"ds": self.ds, "obs": self.obs, "model": self.prior, "members": MEMBERS, "seed": 0} | change
        return xgenda.assimilate(given.pop("ds"), given.pop("obs"), **given)

    def diffuse(self, **change: Any) -> xr.Dataset:
        ds = self.climate.isel(time=[0])
        return self.assimilate(
            **{"ds": ds, "obs": ds.isel(latitude=[3], longitude=[4]), "error": 0.5, "model": self.tiny_prior, "steps": 4} | change
        )

    def downscale(self, **change: Any) -> xr.Dataset:
        given = {"ds": self.coarse, "model": self.tiny_downscaler, "members": MEMBERS, "steps": 4, "seed": 0} | change
        return xgenda.downscale(given.pop("ds"), **given)

    def train(self, **change: Any) -> Any:
        given = {"ds": self.climate, "steps": 1, "width": 8, "progress": False} | change
        return xgenda.train(given.pop("ds"), **given)

    def put(self, value: float) -> xr.Dataset:
        ds = self.ds.copy(deep=True)
        ds["t2m"][1, 2, 3] = value
        return ds

    def saved(self, name: str = "model.safetensors") -> Path:
        return self.prior.save(self.tmp / name)

    def altered(self, change: Callable[[dict, dict], None]) -> Path:
        """Write a copy of a model file with another header or other tensors."""
        path = shutil.copy(self.tiny_prior.path, self.tmp / "altered.safetensors")
        with safe_open(path, "pt") as file:
            header, tensors = dict(file.metadata()), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        change(header, tensors)
        save_file(tensors, path, metadata=header)
        return Path(path)


@pytest.fixture
def kit(request, background, stations, prior, tmp_path) -> Kit:
    return Kit(request, background, stations, prior, tmp_path)


def described(change: Callable[[dict], None]) -> Callable[[dict, dict], None]:
    def alter(header: dict, tensors: dict) -> None:
        data = json.loads(header["xgenda"])
        change(data["model"])
        header["xgenda"] = json.dumps(data)

    return alter


def spoil(tensors: dict) -> None:
    name = next(k for k in tensors if k.startswith("network."))
    tensors[name].view(-1)[0] = float("nan")


def truncated(k: Kit) -> Path:
    path = k.saved()
    big = Path(shutil.copy(k.tiny_prior.path, path))
    big.write_bytes(big.read_bytes()[:-1000])
    return big


def changed_after_setup(k: Kit) -> xr.Dataset:
    lazy = k.assimilate(ds=k.ds.chunk(time=1), model=xgenda.load_model(k.saved()))
    xgenda.gaussian_prior(k.ds, length_scale=1e5, std=9.0).save(k.tmp / "model.safetensors", overwrite=True)
    return lazy.compute(scheduler="synchronous")


def registered(k: Kit, *, sha256: str = "0" * 64) -> str:
    """Register a file as part of a package of its own; by default under a wrong checksum."""
    package = k.tmp / "package"
    (package / "data" / "weights").mkdir(parents=True)
    path = k.prior.save(package / "data" / "weights" / "tiny.safetensors")
    (package / "weights.toml").write_text(
        f'schema = 1\n[models.tiny-europe]\nfile = "tiny.safetensors"\nsha256 = "{sha256}"\nsize = {path.stat().st_size}\n'
        'task = "prior"\ndescription = "a test"\nlicence = "none"\nvariables = ["t2m"]\nregion = "Europe"\n'
    )
    k.monkeypatch.setattr(entries, "PACKAGE", package)
    return "tiny-europe"


def history(k: Kit, n: int = 30) -> xr.Dataset:
    rng = np.random.default_rng(0)
    noise = xr.DataArray(rng.normal(size=(n, 6, 8)), dims=("time", "latitude", "longitude"))
    ds = (k.ds.isel(time=0, drop=True) + noise).transpose("time", ...)
    return ds.assign_coords(time=pd.date_range("2000-01-01", periods=n))


Case = tuple[Callable[[Kit], Any], type[Exception], str]

CASES: dict[str, Case] = {
    # -- the state
    "missing variable": (
        lambda k: k.assimilate(ds=k.ds.rename(t2m="t2").drop_attrs()),
        OptionError,
        r"ds lacks the variable 't2m' .*it has 't2'. Did you mean 't2'\? Rename yours: ds.rename\({'t2': 't2m'}\)",
    ),
    "two variables fit": (
        lambda k: k.assimilate(ds=k.ds.rename(t2m="a").assign(b=k.ds.t2m)),
        OptionError,
        r"'a', 'b' all have standard_name 'air_temperature'",
    ),
    "wrong units": (
        lambda k: k.assimilate(ds=k.ds.assign(t2m=k.ds.t2m.assign_attrs(units="m"))),
        UnitsError,
        r"Units 'm' cannot be converted to 'K'",
    ),
    "unknown units": (
        lambda k: k.assimilate(ds=k.ds.assign(t2m=k.ds.t2m.assign_attrs(units="Kelwin"))),
        UnitsError,
        r"The units 'Kelwin' are not known; use UDUNITS",
    ),
    "units without saying so": (
        lambda k: k.downscale(ds=(k.coarse - 273.15).drop_attrs()),
        StateError,
        r"ds\['air_temperature'\] has mean .*, and the model was trained on a mean of .* K. Other units\? Set the true ones",
    ),
    "nan": (
        lambda k: k.assimilate(ds=k.put(np.nan)),
        StateError,
        r"ds\['t2m'\] holds NaN in 1 of 96 cells \(1 %\), first at index \(1, 2, 3\).*ds.fillna",
    ),
    "inf": (lambda k: k.assimilate(ds=k.put(np.inf)), StateError, r"ds\['t2m'\] holds infinity in 1 of 96 cells"),
    "netcdf fill value": (
        lambda k: k.assimilate(ds=k.put(9.969209968386869e36)),
        StateError,
        r"ds\['t2m'\] holds 9.96921e\+36 in 1 of 96 .*looks like a fill value",
    ),
    "-9999": (
        lambda k: k.assimilate(ds=k.put(-9999.0)),
        StateError,
        r"ds\['t2m'\] holds -9999 in 1 of 96 .*fill value. Mask and fill them: ds.where\(ds\['t2m'\] != -9999\)",
    ),
    "nan in a chunk": (
        lambda k: k.assimilate(ds=k.put(np.nan).chunk(time=1)).compute(),
        StateError,
        r"ds\['t2m'\] at 2018-11-20T12:00.* holds NaN in 1 of 48 cells",
    ),
    "nan in coarse fields": (
        lambda k: k.downscale(ds=k.coarse.where(lambda c: c.longitude < -95)),
        StateError,
        r"ds\['air_temperature'\].* holds NaN",
    ),
    "no latitude": (
        lambda k: k.assimilate(ds=k.ds.drop_vars("latitude")),
        CoordinateError,
        r"ds has no latitude coordinate \(found: time, longitude\). Assign one",
    ),
    "nan latitude": (
        lambda k: k.assimilate(ds=k.ds.assign_coords(latitude=[40, 42, np.nan, 46, 48, 50])),
        CoordinateError,
        r"latitude coordinate 'latitude' holds values that are not finite",
    ),
    "unsorted latitude": (
        lambda k: k.assimilate(ds=k.ds.isel(latitude=[0, 2, 1, 3, 4, 5])),
        GridError,
        r"latitude 'latitude' is not monotonic or repeats a value; sort it",
    ),
    "repeated meridian": (
        lambda k: k.assimilate(ds=k.ds.assign_coords(longitude=np.linspace(0, 360, 8))),
        GridError,
        r"repeats its first meridian at the end; drop it: ds.isel\(longitude=slice\(0, -1\)\)",
    ),
    "swapped axes": (
        lambda k: k.assimilate(ds=k.ds.assign_coords(latitude=k.ds.latitude + 60)),
        GridError,
        r"latitude 'latitude' reaches 110; it must lie in -90 to 90",
    ),
    "extra dimension": (
        lambda k: k.assimilate(ds=k.ds.expand_dims(level=3)),
        CoordinateError,
        r"ds\['t2m'\] has the extra dimension 'level' of size 3; select one entry: ds.isel\(level=0\)",
    ),
    "a single meridian": (
        lambda k: k.assimilate(ds=k.ds.isel(longitude=0)),
        CoordinateError,
        r"longitude coordinate 'longitude' is a scalar.*ds.expand_dims\('longitude'\)",
    ),
    "empty time": (
        lambda k: k.assimilate(ds=k.ds.isel(time=slice(0))),
        GridError,
        r"dimension 'time' is empty; there is nothing to do",
    ),
    "empty time, downscale": (
        lambda k: k.downscale(ds=k.climate.isel(time=slice(0)).coarsen(latitude=4, longitude=4).mean()),
        GridError,
        r"dimension 'time' is empty",
    ),
    "empty latitude": (lambda k: k.assimilate(ds=k.ds.isel(latitude=slice(0))), GridError, r"dimension 'latitude' is empty"),
    "duplicate times": (
        lambda k: k.assimilate(ds=k.ds.isel(time=[0, 0])),
        CoordinateError,
        r"ds holds the time 2018-11-20T00.* more than once. Keep the first: ds.drop_duplicates\('time'\)",
    ),
    "undecoded time": (
        lambda k: k.assimilate(ds=k.ds.assign_coords(time=[0.0, 12.0])),
        CoordinateError,
        r"time coordinate 'time' has dtype float64; decode it: xarray.decode_cf\(ds\)",
    ),
    "no time stamp": (
        lambda k: k.assimilate(ds=k.ds.assign_coords(time=k.ds.time.where([True, False]))),
        CoordinateError,
        r"time coordinate 'time' holds NaT",
    ),
    "unnamed array": (
        lambda k: k.assimilate(ds=k.ds.t2m.rename(None)),
        OptionError,
        r"ds is a DataArray without a name. Name the variable: ds.rename\('t2m'\)",
    ),
    "pandas as state": (
        lambda k: k.assimilate(ds=k.ds.to_dataframe()),
        OptionError,
        r"ds is a pandas.*DataFrame; an xarray Dataset is needed.*Dataset.from_dataframe\(df\)",
    ),
    "array as state": (
        lambda k: k.downscale(ds=np.zeros((2, 2))),
        OptionError,
        r"ds is a numpy.ndarray; an xarray Dataset is needed",
    ),
    "members in the state": (
        lambda k: k.assimilate(ds=k.ds.expand_dims(number=3)),
        OptionError,
        r"ds has the ensemble dimension 'number', and one background is needed. Type ds.mean\('number'\)",
    ),
    "members in coarse fields": (
        lambda k: k.downscale(ds=k.coarse.expand_dims(member=2)),
        OptionError,
        r"downscale one member at a time: ds.isel\(member=0\)",
    ),
    "text in the state": (
        lambda k: k.assimilate(ds=k.ds.astype(object)),
        StateError,
        r"ds\['t2m'\] has dtype object; real numbers are needed",
    ),
    "packed": (
        lambda k: k.assimilate(ds=k.ds.assign(t2m=k.ds.t2m.astype("int16").assign_attrs(scale_factor=0.1, units="K"))),
        StateError,
        r"still carries scale_factor: it is packed",
    ),
    "chunks in space": (
        lambda k: k.assimilate(ds=k.ds.chunk(latitude=3, longitude=4)),
        ChunkingError,
        r"ds\['t2m'\] is split along 'latitude', 'longitude' into 2 x 2 chunks.*Type: ds\.chunk\(latitude=-1, longitude=-1\)",
    ),
    "chunks in space, downscale": (
        lambda k: k.downscale(ds=k.coarse.chunk(longitude=1)),
        ChunkingError,
        r"Type: ds\.chunk\(longitude=-1\)",
    ),
    # -- observations and their errors
    "no error": (
        lambda k: k.assimilate(obs=k.obs.drop(columns="t2m_error")),
        ObservationError,
        r"obs\['t2m'\] has no error, and none is invented. Give the standard deviation",
    ),
    "zero error": (
        lambda k: k.assimilate(error=0.0),
        ObservationError,
        r"The error of obs\['t2m'\] is 0 in 6 of 6 values, first at row 0; a standard deviation must be positive",
    ),
    "negative error": (lambda k: k.assimilate(error=-1.0), ObservationError, r"is -1 in 6 of 6 values"),
    "nan error": (
        lambda k: k.assimilate(obs=k.obs.assign(t2m_error=[1, 1, np.nan, 1, 1, 1])),
        ObservationError,
        r"is nan in 1 of 6 values, first at row 2",
    ),
    "error of another length": (
        lambda k: k.assimilate(error={"t2m": [1.0, 2.0]}),
        ObservationError,
        r"error\['t2m'\] has 2 values and obs\['t2m'\] has 6",
    ),
    "error as text": (
        lambda k: k.assimilate(error="0.3"),
        ObservationError,
        r"error='0.3' is no standard deviation; give numbers: error=1.0",
    ),
    "representativeness as text": (
        lambda k: k.assimilate(representativeness={"t2m": "a"}),
        ObservationError,
        r"representativeness=\{'t2m': 'a'\} is no standard deviation; give numbers",
    ),
    "representativeness of each observation": (
        lambda k: k.assimilate(representativeness=[0.1, 0.2]),
        ObservationError,
        r"representativeness=\[0.1, 0.2\] is not accepted; give a number, or one by variable: representativeness=\{'t2m': 0.5\}",
    ),
    "error for what is not there": (
        lambda k: k.assimilate(error={"t2": 1.0}),
        ObservationError,
        r"error names 't2', which is no variable of the state; it has 't2m'. Did you mean 't2m'",
    ),
    "unknown variable": (
        lambda k: k.assimilate(obs=k.obs.assign(u10=3.0)),
        ObservationError,
        r"obs holds 'u10', which is not in the state; it has 't2m'",
    ),
    "text column": (
        lambda k: k.assimilate(obs=k.obs.assign(t2m="warm")),
        ObservationError,
        r"obs\['t2m'\] holds 'warm', which is no number; make it numeric",
    ),
    "no time": (
        lambda k: k.assimilate(obs=k.obs.drop(columns="time")),
        ObservationError,
        r"obs has no time and the state has 2 times. Give each observation its time, or select one",
    ),
    "other calendar": (
        lambda k: k.assimilate(obs=k.obs.assign(time=cftime.Datetime360Day(2018, 11, 20))),
        ObservationError,
        r"The time of obs is Datetime360Day and that of the state is datetime64; use one calendar",
    ),
    "outside the window": (
        lambda k: k.assimilate(obs=k.obs.assign(time=k.obs.time + pd.Timedelta("9D"))),
        ObservationError,
        r"6 of 6 obs fall in no time window of the state .*Is their time UTC\?",
    ),
    "swapped": (
        lambda k: k.assimilate(obs=k.obs.rename(columns={"latitude": "longitude", "longitude": "latitude"})),
        ObservationError,
        r"6 of 6 obs lie outside the grid.*Did you swap them",
    ),
    "units of observations": (
        lambda k: k.assimilate(obs=k.obs.to_xarray().pipe(lambda d: d.assign(t2m=d.t2m.assign_attrs(units="Pa")))),
        UnitsError,
        r"obs\['t2m'\]: Units 'Pa' cannot be converted to 'K'",
    ),
    "a path as observations": (
        lambda k: k.assimilate(obs="obs.csv"),
        ObservationError,
        r"obs is a builtins.str; give a pandas DataFrame or xarray Dataset",
    ),
    # -- options
    "no members": (
        lambda k: k.assimilate(members=0),
        OptionError,
        r"members=0 is not accepted; it must be a whole number of at least 1, for example members=8",
    ),
    "minus one member": (lambda k: k.assimilate(members=-1), OptionError, r"members=-1 is not accepted"),
    "half a member": (lambda k: k.downscale(members=2.5), OptionError, r"members=2.5 is not accepted"),
    "members as text": (lambda k: k.assimilate(members="8"), OptionError, r"members='8' is not accepted"),
    "members as truth": (lambda k: k.downscale(members=True), OptionError, r"members=True is not accepted"),
    "one step": (lambda k: k.diffuse(steps=1), OptionError, r"steps=1 is not accepted; it must be a whole number of at least 2"),
    "one step, downscale": (lambda k: k.downscale(steps=1), OptionError, r"steps=1 is not accepted"),
    "batch of none": (lambda k: k.diffuse(batch_size=0), OptionError, r"batch_size=0 is not accepted"),
    "unknown guidance": (
        lambda k: k.diffuse(guidance="mmp"),
        OptionError,
        r"guidance='mmp' is not accepted; choose one of .*Did you mean 'mmps'",
    ),
    "guidance in capitals": (
        lambda k: k.diffuse(guidance="MMPS"),
        OptionError,
        r"guidance='MMPS' is not accepted; choose one of .*Did you mean 'mmps'",
    ),
    "guidance of another model": (
        lambda k: k.assimilate(guidance="sda"),
        OptionError,
        r"guidance='sda' is not accepted; choose one of 'auto', 'exact'",
    ),
    "unknown sampler": (
        lambda k: k.downscale(sampler="heum"),
        OptionError,
        r"sampler='heum' is not accepted; choose one of .*Did you mean 'heun'",
    ),
    "options as a list": (
        lambda k: k.diffuse(sampler_options=[1]),
        OptionError,
        r"sampler_options=\[1\] is not accepted; give a mapping of names to values: sampler_options=\{'name': 1.0\}",
    ),
    "options of the guidance as text": (
        lambda k: k.diffuse(guidance_options="width=2"),
        OptionError,
        r"guidance_options='width=2' is not accepted; give a mapping",
    ),
    "options as text, downscale": (
        lambda k: k.downscale(sampler_options="corrections=2"),
        OptionError,
        r"sampler_options='corrections=2' is not accepted; give a mapping",
    ),
    "unknown background check": (
        lambda k: k.assimilate(background_check="yes"),
        OptionError,
        r"background_check='yes' is not accepted; choose one of 'auto'",
    ),
    "negative background check": (
        lambda k: k.assimilate(background_check=-3.0),
        OptionError,
        r"background_check=-3.0 is not accepted; give a positive number, 'auto' or None",
    ),
    "true background check": (
        lambda k: k.assimilate(background_check=True),
        OptionError,
        r"background_check=True is not accepted",
    ),
    "listed background check": (
        lambda k: k.assimilate(background_check=[3.0]),
        OptionError,
        r"background_check=\[3.0\] is not accepted",
    ),
    "seed as text": (
        lambda k: k.assimilate(seed="x"),
        OptionError,
        r"seed='x' is not accepted; give a whole number or None, for example seed=0",
    ),
    "seed as truth": (lambda k: k.downscale(seed=True), OptionError, r"seed=True is not accepted"),
    "unknown device": (
        lambda k: k.assimilate(device="tpu"),
        OptionError,
        r"device='tpu' is not accepted; choose 'auto', 'cpu' or 'cuda'",
    ),
    "device without numbers": (lambda k: k.assimilate(device="meta"), OptionError, r"device='meta' is not supported"),
    "window of words": (
        lambda k: k.assimilate(window="a while"),
        OptionError,
        r"window='a while' is no time span; give for example window='6h'",
    ),
    "window backwards": (lambda k: k.assimilate(window="-6h"), OptionError, r"window='-6h' must be positive"),
    # -- models
    "no model": (
        lambda k: k.assimilate(model=5),
        OptionError,
        r"model=5 is not accepted; give a GenerativeModel, a registered name, or a path",
    ),
    "unknown model": (
        lambda k: (registered(k), k.assimilate(model="tiny-europ")),
        ModelNotFoundError,
        r"No model is named 'tiny-europ'. Did you mean 'tiny-europe'\? Registered models: 'tiny-europe'",
    ),
    "unknown model, load": (
        lambda k: (registered(k), xgenda.load_model("tinyeurope")),
        ModelNotFoundError,
        r"No model is named 'tinyeurope'. Did you mean 'tiny-europe'",
    ),
    "no such file": (
        lambda k: xgenda.load_model(k.tmp / "absent.safetensors"),
        ModelNotFoundError,
        r"absent.safetensors does not exist. Pass the path of",
    ),
    "a folder": (lambda k: xgenda.load_model(k.tmp), ModelNotFoundError, r"is a folder, not a file"),
    "wrong checksum": (
        lambda k: k.assimilate(model=registered(k)),
        ChecksumError,
        r"is not the registered one: expected sha256 0000",
    ),
    "changed before computing": (
        changed_after_setup,
        ChecksumError,
        r"model.safetensors has changed since this computation was set up",
    ),
    "truncated": (
        lambda k: xgenda.load_model(truncated(k)),
        CheckpointError,
        r"model.safetensors cannot be read as safetensors .*It may be truncated; fetch it again",
    ),
    "empty file": (
        lambda k: ((k.tmp / "e.safetensors").touch(), xgenda.load_model(k.tmp / "e.safetensors")),
        CheckpointError,
        r"cannot be read as safetensors",
    ),
    "a web page": (
        lambda k: ((k.tmp / "w.safetensors").write_text("<!DOCTYPE html><html>"), xgenda.load_model(k.tmp / "w.safetensors")),
        CheckpointError,
        r"is no safetensors file .*Was it downloaded whole",
    ),
    "foreign": (
        lambda k: (save_file({"w": torch.zeros(2)}, k.tmp / "f.safetensors"), xgenda.load_model(k.tmp / "f.safetensors")),
        CheckpointError,
        r"is a safetensors file, but no xgenda model",
    ),
    "newer format": (
        lambda k: xgenda.load_model(
            k.altered(lambda h, _: h.update(xgenda=json.dumps({**json.loads(h["xgenda"]), "format": 99, "requires": "7.1"})))
        ),
        CheckpointError,
        r"has format 99; xgenda .* reads formats 1 to 2. Type: pip install --upgrade 'xgenda>=7.1'",
    ),
    "nan in a tensor": (
        lambda k: xgenda.load_model(k.altered(lambda _, tensors: spoil(tensors))),
        CheckpointError,
        r"tensor 'network.* holds values that are not finite",
    ),
    "description is no json": (
        lambda k: xgenda.load_model(k.altered(lambda header, _: header.update(xgenda="{"))),
        CheckpointError,
        r"the model description is no valid JSON",
    ),
    "unknown key": (
        lambda k: xgenda.load_model(k.altered(described(lambda d: d.update(colour="red")))),
        CheckpointError,
        r"unexpected or missing keys: \['colour'\]",
    ),
    "unknown kind": (
        lambda k: xgenda.load_model(k.altered(described(lambda d: d.update(kind="oracle")))),
        CheckpointError,
        r"The model is a 'oracle' for 'prior', which this version does not know",
    ),
    "missing tensor": (
        lambda k: xgenda.load_model(k.altered(lambda _, t: t.pop(next(n for n in t if n.startswith("network."))))),
        CheckpointError,
        r"the tensors are not those that its header lists:\n  missing: network\.\S+ \(",
    ),
    "missing scaling": (
        lambda k: xgenda.load_model(k.altered(lambda _, t: t.pop("scaling.std"))),
        CheckpointError,
        r"missing: scaling.std \(1, ",
    ),
    "pickle": (
        lambda k: ((k.tmp / "m.pt").write_bytes(b"\x80\x04."), xgenda.load_model(k.tmp / "m.pt")),
        CheckpointError,
        r"is a pickled checkpoint, which is never loaded: opening one can run code",
    ),
    "model for downscaling": (
        lambda k: k.diffuse(model=k.tiny_downscaler),
        ModelNotFoundError,
        r"model='tiny-downscaler' is for 'downscale'; type ds.genda.downscale",
    ),
    "model for assimilation": (
        lambda k: k.downscale(model=k.prior),
        ModelNotFoundError,
        r"has no grid of its own, and a prior that downscales needs one: train it on fine fields, xgenda.train\(fine\)",
    ),
    "other grid": (
        lambda k: k.diffuse(ds=k.climate.isel(time=[0], latitude=slice(1, 7)), obs=None),
        GridError,
        r"model='tiny-prior' works on the grid 8 x 12.*ds has 6 x 12.*Interpolate, where they overlap: ds.genda.regrid\(model.template\(\)\)",
    ),
    "fine fields to downscale": (
        lambda k: k.downscale(ds=k.climate.isel(time=[0])),
        GridError,
        r"takes fields on the grid 2 x 3.*ds has 8 x 12.*the 4x4 block means of its grid.*coarsen\(latitude=4, longitude=4\).mean\(\)",
    ),
    "another target": (
        lambda k: k.downscale(target=k.climate.isel(latitude=slice(4))),
        GridError,
        r"target is not on the grid of model='tiny-downscaler'",
    ),
    "existing output": (
        lambda k: (k.saved(), k.saved()),
        OutputExistsError,
        r"model.safetensors exists. Choose another name, or replace it: model.save\(.*overwrite=True\)",
    ),
    "output of another kind": (
        lambda k: k.prior.save(k.tmp / "model.pt"),
        CheckpointError,
        r"A model file ends in .safetensors; got 'model.pt'. Type: model.save\('model.safetensors'\)",
    ),
    # -- a prior without training
    "only std": (
        lambda k: xgenda.gaussian_prior(k.ds, std=2.0),
        OptionError,
        r"length_scale is missing: a covariance function needs length_scale in metres and std",
    ),
    "only length_scale": (lambda k: xgenda.gaussian_prior(k.ds, length_scale=3e5), OptionError, r"std is missing"),
    "negative std": (
        lambda k: xgenda.gaussian_prior(k.ds, length_scale=3e5, std=-2.0),
        OptionError,
        r"std=-2.0 for 't2m' is not accepted; it must be a positive number",
    ),
    "std of something else": (
        lambda k: xgenda.gaussian_prior(k.ds, length_scale=3e5, std={"t2": 1.0}),
        OptionError,
        r"std names 't2', which ds does not have; it has t2m. Did you mean 't2m'",
    ),
    "both routes": (
        lambda k: xgenda.gaussian_prior(k.ds, length_scale=3e5, std=2.0, rank=5),
        OptionError,
        r"rank belongs to a prior from a sample; leave out length_scale and std for that",
    ),
    "both routes, kind": (
        lambda k: xgenda.gaussian_prior(k.ds, length_scale=3e5, std=2.0, covariance="eof"),
        OptionError,
        r"covariance='eof' belongs to a prior from a sample",
    ),
    "unknown covariance": (
        lambda k: xgenda.gaussian_prior(k.ds, length_scale=3e5, std=2.0, covariance="exponental"),
        OptionError,
        r"covariance='exponental' is not accepted.*Did you mean 'exponential'",
    ),
    "small sample": (
        lambda k: xgenda.gaussian_prior(history(k, 6)),
        StateError,
        r"ds has 6 fields along 'time'; a sample covariance with 5-fold cross-validation needs at least 10",
    ),
    "no sample": (
        lambda k: xgenda.gaussian_prior(k.ds.isel(time=0)),
        OptionError,
        r"A sample needs one dimension \(member or time\).*For a single background give gaussian_prior",
    ),
    "constant sample": (
        lambda k: xgenda.gaussian_prior(xr.full_like(history(k), 280.0)),
        StateError,
        r"ds\['t2m'\] does not vary, so it cannot be standardised; drop it",
    ),
    "nan in the sample": (
        lambda k: xgenda.gaussian_prior(history(k).where(lambda d: (d.latitude < 49) | (d.time != d.time[3]))),
        StateError,
        r"ds\['t2m'\] holds NaN in 8 of 1440 cells",
    ),
    # -- training
    "unknown task": (
        lambda k: k.train(task="downscaling"),
        OptionError,
        r"'downscaling' is not accepted.*'prior', 'downscale', 'background', 'forecast', 'autoencoder', 'conversion'. Did you mean 'downscale'",
    ),
    "no factor": (
        lambda k: k.train(task="downscale"),
        OptionError,
        r"factor is missing: for task='downscale' give the cells per coarse cell, for example factor=4",
    ),
    "factor for a prior": (lambda k: k.train(factor=4), OptionError, r"factor=4 belongs to task='downscale'"),
    "factor that does not fit": (
        lambda k: k.train(task="downscale", factor=3),
        GridError,
        r"A grid of 8 x 12 cells is not a multiple of 3; crop it",
    ),
    "odd width": (
        lambda k: k.train(width=12),
        OptionError,
        r"width=12 is not accepted; it must be a multiple of 8, for example width=16",
    ),
    "budget of words": (
        lambda k: k.train(time_budget="a coffee"),
        OptionError,
        r"time_budget='a coffee' is not accepted; give seconds or a text such as '90s', '10min' or '2h'",
    ),
    "budget of dots": (lambda k: k.train(time_budget="1.2.3min"), OptionError, r"time_budget='1.2.3min' is not accepted"),
    "negative learning rate": (
        lambda k: k.train(learning_rate=-1.0),
        OptionError,
        r"learning_rate=-1.0 is not accepted; it must be a positive number",
    ),
    "average of everything": (
        lambda k: k.train(ema=1.0),
        OptionError,
        r"ema=1.0 is not accepted; it must be a positive number below 0.3",
    ),
    "no epochs": (lambda k: k.train(epochs=0), OptionError, r"epochs=0 is not accepted"),
    "constant field": (
        lambda k: k.train(ds=xr.full_like(k.climate, 280.0)),
        StateError,
        r"ds\['air_temperature'\] does not vary",
    ),
    "nan in training": (
        lambda k: k.train(ds=k.climate.where((k.climate.latitude < 30) | (k.climate.time != k.climate.time[3]))),
        StateError,
        r"ds\['air_temperature'\] holds NaN in .* cells",
    ),
    "few fields": (
        lambda k: k.train(ds=k.climate.isel(time=slice(10))),
        StateError,
        r"ds has 10 fields along 'time'; at least 20 are needed.*xgenda.gaussian_prior\(ds\)",
    ),
    "variable that is not there": (
        lambda k: k.train(variables="temperature"),
        OptionError,
        r"ds lacks the variable 'temperature'; it has 'air_temperature'. Did you mean 'air_temperature'",
    ),
    "unknown climatology": (
        lambda k: k.train(climatology="monthly"),
        OptionError,
        r"climatology='monthly' is not accepted; choose one of 'auto', 'none', 'dayofyear'",
    ),
    "unknown anchor": (
        lambda k: k.train(anchor="iron"),
        OptionError,
        r"anchor='iron' is not accepted; choose one of 'auto', 'eof'",
    ),
    "even window": (lambda k: k.train(window=2), OptionError, r"window=2 is not accepted; it must be odd"),
    "window of a downscaler": (
        lambda k: k.train(task="downscale", factor=4, window=3),
        OptionError,
        r"window=3 belongs to task='prior'",
    ),
    "spectral anchor of a region": (
        lambda k: k.train(anchor="spectral"),
        OptionError,
        r"anchor='spectral' is for doubly periodic grids; pass periodic='both' too",
    ),
    "periodic in what": (
        lambda k: k.train(periodic="yes"),
        OptionError,
        r"periodic='yes' is not accepted; it must be True, False",
    ),
    "unknown precision": (
        lambda k: k.train(dtype="float16"),
        OptionError,
        r"dtype='float16' is not accepted; choose one of 'auto', 'float32'",
    ),
    "existing training output": (
        lambda k: k.train(out=k.saved()),
        OutputExistsError,
        r"out='.*model.safetensors' exists. Choose another name, or pass overwrite=True",
    ),
    "training output of another kind": (
        lambda k: k.train(out=k.tmp / "model.pt"),
        CheckpointError,
        r"a model file ends in .safetensors",
    ),
    "folder that is not there": (
        lambda k: k.train(out=k.tmp / "no" / "model.safetensors"),
        OptionError,
        r"there is no folder '.*no'; make it first: mkdir -p",
    ),
    "start from something else": (
        lambda k: k.train(start=k.prior, width=16),
        OptionError,
        r"is a gaussian model for 'prior'; a diffusion prior is needed",
    ),
    "start from a downscaler": (
        lambda k: k.train(start=k.tiny_downscaler, width=None),
        OptionError,
        r"is a model for downscaling; pass task='downscale' too, with target= or factor=",
    ),
    "start with another width": (
        lambda k: k.train(start=k.tiny_prior, width=16),
        OptionError,
        r"width=16 has no effect with start, whose network is kept. Leave it out",
    ),
    # -- scores
    "truth on another grid": (
        lambda k: xgenda.verify(k.ds, k.ds.isel(latitude=slice(3))),
        GridError,
        r"truth is on the grid 3 x 8.* and ensemble on 6 x 8.*Interpolate: truth.genda.regrid\(ensemble\)",
    ),
    "truth without error": (
        lambda k: xgenda.verify(k.ds, k.obs.drop(columns="t2m_error")),
        ObservationError,
        r"truth\['t2m'\] has no error",
    ),
    "truth elsewhere": (
        lambda k: xgenda.verify(k.ds, k.obs.assign(latitude=-60.0)),
        OptionError,
        r"No observation in truth can be compared",
    ),
    "scores along nothing": (
        lambda k: xgenda.verify(k.ds, k.ds, dims="level"),
        OptionError,
        r"dims='level' is not averaged over",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*c, id=i) for i, c in CASES.items()])
def test_bad_input(kit: Kit, call: Callable[[Kit], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(kit)
    assert isinstance(caught.value, xgenda.errors.GendaError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("call", [Kit.assimilate, Kit.downscale, Kit.train])
def test_a_gpu_that_is_not_there(kit: Kit, call: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match=r"device='cuda' was asked for, and torch sees no GPU here. Type device='cpu'"):
        call(kit, device="cuda")


def test_chunked_input_is_refused_before_anything_is_computed(kit: Kit, no_compute: None) -> None:
    for name in ("chunks in space", "extra dimension", "duplicate times", "missing variable", "no members", "zero error"):
        call, error, message = CASES[name]
        lazy = dataclasses.replace(kit, ds=kit.ds.chunk(time=1))
        with pytest.raises(error, match=message):
            call(lazy)


# -- every kind of model ------------------------------------------------------------------------------------------------

Spoilt = tuple[Callable[[xr.Dataset], xr.Dataset], type[Exception], str]

#: What is refused of the fields that any model takes, before anything is computed.
FIELDS: dict[str, Spoilt] = {
    "missing variable": (
        lambda ds: ds.rename(air_temperature="temperature").drop_attrs(),
        OptionError,
        r"ds lacks the variable 'air_temperature'.*it has 'temperature'.*Rename yours: ds.rename",
    ),
    "wrong units": (lambda ds: with_attrs(ds, units="m"), UnitsError, "Units 'm' cannot be converted to 'K'"),
    "unknown units": (lambda ds: with_attrs(ds, units="Kelwin"), UnitsError, "The units 'Kelwin' are not known; use UDUNITS"),
    "no latitude": (lambda ds: ds.drop_vars("latitude"), CoordinateError, r"ds has no latitude .*\(found: .*Assign (one|them)"),
    "repeated latitude": (lambda ds: ds.isel(latitude=[0, 0]), GridError, "is not monotonic or repeats a value; sort it"),
    "swapped axes": (lambda ds: ds.assign_coords(latitude=ds.latitude + 80), GridError, "it must lie in -90 to 90"),
    "empty time": (lambda ds: ds.isel(time=slice(0)), GridError, "dimension 'time' is empty; there is nothing to do"),
    "repeated times": (
        lambda ds: ds.isel(time=[0, 0, 0]),
        CoordinateError,
        r"more than once. Keep the first: ds.drop_duplicates",
    ),
    "undecoded time": (lambda ds: ds.assign_coords(time=np.arange(6.0)), CoordinateError, r"decode it: xarray.decode_cf\(ds\)"),
    "extra dimension": (lambda ds: ds.expand_dims(level=3), CoordinateError, r"select one entry: ds.isel\(level=0\)"),
    "members": (lambda ds: ds.expand_dims(number=3), OptionError, r"ensemble dimension 'number'.*|one member at a time"),
    "text": (lambda ds: ds.astype(object), StateError, r"has dtype object; real numbers are needed"),
    "packed": (
        lambda ds: with_attrs(ds.astype("int16"), scale_factor=0.1),
        StateError,
        "still carries scale_factor: it is packed",
    ),
    "chunks in space": (lambda ds: ds.chunk(longitude=1), ChunkingError, r"Type: ds\.chunk\(longitude=-1\)"),
    "other grid": (
        lambda ds: ds.isel(longitude=slice(0, -1)),
        GridError,
        r"(works on|takes fields on) the grid .* ds has|is not on the grid",
    ),
}

#: The same of observations, where a model takes some.
OBSERVATIONS: dict[str, tuple[Callable[[pd.DataFrame], Any], type[Exception], str]] = {
    "no error": (lambda o: o.drop(columns="air_temperature_error"), ObservationError, "has no error, and none is invented"),
    "zero error": (lambda o: o.assign(air_temperature_error=0.0), ObservationError, "a standard deviation must be positive"),
    "nan error": (lambda o: o.assign(air_temperature_error=np.nan), ObservationError, "is nan in 6 of 6 values, first at row 0"),
    "unknown variable": (lambda o: o.assign(u10=3.0), ObservationError, "obs holds 'u10', which is not in the state; it has"),
    "text": (lambda o: o.assign(air_temperature="warm"), ObservationError, "holds 'warm', which is no number; make it numeric"),
    "no time": (lambda o: o.drop(columns="time"), ObservationError, "obs has no time and the state has 6 times"),
    "other calendar": (
        lambda o: o.assign(time=cftime.DatetimeNoLeap(1860, 6, 1)),
        ObservationError,
        "The time of obs is DatetimeNoLeap and that of the state is .*; use one calendar",
    ),
    "outside the window": (
        lambda o: o.assign(time=o.time + pd.Timedelta("9000D").to_pytimedelta()),
        ObservationError,
        r"6 of 6 obs fall in no time window of the state",
    ),
    "other units": (
        lambda o: o.to_xarray().pipe(lambda d: d.assign(air_temperature=d.air_temperature.assign_attrs(units="Pa"))),
        UnitsError,
        "Units 'Pa' cannot be converted to 'K'",
    ),
    "a path": (lambda o: "obs.csv", ObservationError, "obs is a builtins.str; give a pandas DataFrame or xarray Dataset"),
}

#: And of the options of all of them; of those after the bar where there are observations.
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no members": ({"members": 0}, "members=0 is not accepted; it must be a whole number of at least 1"),
    "members as text": ({"members": "8"}, "members='8' is not accepted"),
    "seed as text": ({"seed": "x"}, "seed='x' is not accepted; give a whole number or None"),
    "batch of none": ({"batch_size": 0}, "batch_size=0 is not accepted"),
    "no steps": ({"steps": 0}, "steps=0 (is not accepted|has no effect)"),
    "unknown sampler": ({"sampler": "heum"}, "sampler='heum' (is not accepted|has no effect)"),
    "unknown device": ({"device": "tpu"}, "device='tpu' is not accepted; choose 'auto', 'cpu' or 'cuda'"),
    "| unknown guidance": ({"guidance": "mmp"}, "guidance='mmp' (is not accepted|has no effect)"),
    "| unknown likelihood": (
        {"likelihood": "cauchy"},
        "likelihood='cauchy' (is not accepted|has no effect)|needs likelihood='gaussian'",
    ),
    "| unknown option": ({"guidance_options": {"gama": 1}}, "has no option 'gama'|guidance_options=.*has no effect"),
    "| background check": ({"background_check": -3.0}, "background_check=-3.0 is not accepted; give a positive number"),
    "| window of words": ({"window": "a while"}, "window='a while' is no time span"),
}

#: Of values, which are seen when they are computed.
VALUES: dict[str, tuple[Callable[[xr.Dataset], xr.Dataset], str]] = {
    "nan": (lambda ds: put(ds, np.nan), "holds NaN in 1 of"),
    "infinity": (lambda ds: put(ds, np.inf), "holds infinity in 1 of"),
    "fill value": (lambda ds: put(ds, 9.969209968386869e36), "looks like a fill value"),
    "-9999": (lambda ds: put(ds, -9999.0), "holds -9999 in 1 of .*Mask and fill them"),
}


def with_attrs(ds: xr.Dataset, **attrs: Any) -> xr.Dataset:
    return ds.assign(air_temperature=ds.air_temperature.assign_attrs(attrs))


def put(ds: xr.Dataset, value: float) -> xr.Dataset:
    out = ds.copy(deep=True)
    out.air_temperature[2, 1, 1] = value
    return out


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def seen(climate: xr.Dataset) -> pd.DataFrame:
    """One cell of six years."""
    cell = climate.isel(time=slice(0, 6), latitude=3, longitude=4)
    fixed = {"latitude": float(cell.latitude), "longitude": float(cell.longitude), "air_temperature_error": 0.5}
    return pd.DataFrame({"time": cell.time.values, "air_temperature": cell.air_temperature.values, **fixed})


def test_every_kind_refuses_the_same(request, kind: Kind, climate: xr.Dataset, seen: pd.DataFrame, no_compute: None) -> None:  # type: ignore[no-untyped-def]
    with xr.set_options(keep_attrs=True):
        ds = kind.given(climate.isel(time=slice(0, 6)).drop_vars("time_bnds")).chunk()
    call = functools.partial(kind.call(request), error=None)
    anywhere = request.getfixturevalue(kind.model).spec.grid is None
    for name, (change, error, message) in FIELDS.items():
        if not (anywhere and name == "other grid"):
            refused(name, error, message, lambda: call(change(ds), seen))  # noqa: B023
    for name, (options, message) in OPTIONS.items():
        if not (kind.downscales and name.startswith("|")):
            refused(name, OptionError, message, lambda: call(ds, seen, **options))  # noqa: B023
    for name, (spoil_obs, error, message) in OBSERVATIONS.items() if not kind.downscales else ():
        refused(name, error, message, lambda: call(ds, spoil_obs(seen)))  # noqa: B023


def refused(name: str, error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(xgenda.errors.GendaError) as caught:
        call()
    assert isinstance(caught.value, error), f"{name}: {caught.value!r}"
    assert re.search(message, str(caught.value)), f"{name}: {caught.value}"


def test_every_kind_refuses_values_that_are_none_where_they_matter(  # type: ignore[no-untyped-def]
    request, kind: Kind, climate: xr.Dataset, seen: pd.DataFrame
) -> None:
    ds, call = kind.given(climate.isel(time=slice(0, 6))), functools.partial(kind.call(request), error=None, members=1)
    if not kind.reads:
        assert call(put(ds, np.nan), seen).air_temperature.identical(call(ds, seen).air_temperature)
        return
    for change, message in VALUES.values():
        with pytest.raises(StateError, match=message):
            call(change(ds), seen)
    later = call(put(ds, np.nan).chunk(time=1), seen)
    with pytest.raises(StateError, match=r"ds\['air_temperature'\] at .* holds NaN"):
        later.compute(scheduler="synchronous")


# -- what must simply work ---------------------------------------------------------------------------------------------


def celsius(ds: xr.Dataset) -> xr.Dataset:
    return ds.assign(t2m=(ds.t2m.astype(float) - 273.15).assign_attrs(ds.t2m.attrs, units="degC"))


def read_only(ds: xr.Dataset) -> xr.Dataset:
    values = np.asfortranarray(ds.t2m.values[:, ::-1])[:, ::-1]  # neither contiguous nor with positive strides
    values.flags.writeable = False
    return ds.assign(t2m=ds.t2m.copy(data=values))


def with_units(obs: pd.DataFrame) -> xr.Dataset:
    ds = obs.to_xarray()
    return ds.assign(t2m=(ds.t2m - 273.15).assign_attrs(units="degC"))


Odd = tuple[Callable[[xr.Dataset], Any], Callable[[pd.DataFrame], Any], float]

#: The state, the observations, and the tolerance in kelvin.
ODD: dict[str, Odd] = {
    "descending latitude": (lambda ds: ds.isel(latitude=slice(None, None, -1)), lambda o: o, 0.0),
    "descending longitude": (lambda ds: ds.isel(longitude=slice(None, None, -1)), lambda o: o, 0.0),
    "0-360, wrapped in the middle": (lambda ds: ds.assign_coords(longitude=ds.longitude % 360), lambda o: o, 1e-9),
    "0-360 in the observations": (lambda ds: ds, lambda o: o.assign(longitude=o.longitude % 360), 1e-9),
    "beyond 360": (lambda ds: ds.assign_coords(longitude=ds.longitude + 360), lambda o: o, 1e-9),
    "transposed": (lambda ds: ds.transpose("longitude", "time", "latitude"), lambda o: o, 0.0),
    "other names": (lambda ds: ds.rename(latitude="lat", longitude="lon", time="valid_time"), lambda o: o, 0.0),
    "another variable name": (lambda ds: ds.rename(t2m="tas"), lambda o: o, 0.0),
    "another variable name in both": (
        lambda ds: ds.rename(t2m="tas"),
        lambda o: o.rename(columns={"t2m": "tas", "t2m_error": "tas_error"}),
        0.0,
    ),
    "celsius": (celsius, lambda o: o.to_xarray().pipe(lambda d: d.assign(t2m=d.t2m.assign_attrs(units="K"))), 1e-4),
    "celsius in the observations": (lambda ds: ds, with_units, 1e-4),
    "celsius in both": (celsius, with_units, 1e-4),
    "float64": (lambda ds: ds.astype("float64"), lambda o: o, 1e-4),
    "big-endian": (lambda ds: ds.astype(">f4"), lambda o: o, 0.0),
    "read-only": (read_only, lambda o: o, 0.0),
    "an array": (lambda ds: ds.t2m, lambda o: o, 0.0),
    "more variables": (lambda ds: ds.assign(z=ds.t2m * np.nan, mask=("latitude", np.ones(6)), crs=0), lambda o: o, 0.0),
    "times in another order": (lambda ds: ds.isel(time=[1, 0]), lambda o: o, 1e-9),
    "times in seconds": (lambda ds: ds.assign_coords(time=ds.time.astype("datetime64[s]")), lambda o: o, 0.0),
    "chunked": (lambda ds: ds.chunk(time=1), lambda o: o, 1e-4),
    "observations twice as uncertain, twice": (
        lambda ds: ds,
        lambda o: pd.concat([o.assign(t2m_error=o.t2m_error * np.sqrt(2))] * 2),
        None,
    ),
}


def canonical(result: xr.Dataset) -> xr.DataArray:
    """Return the only variable in kelvin, in one order and one longitude convention."""
    array = next(v for n, v in result.data_vars.items() if n in ("t2m", "tas"))
    names = {"lat": "latitude", "lon": "longitude", "valid_time": "time"}
    array = array.rename({k: v for k, v in names.items() if k in array.dims}).transpose("member", "time", "latitude", "longitude")
    array = array + (273.15 if array.attrs["units"] == "degC" else 0.0)
    array = array.assign_coords(longitude=np.round((array.longitude + 180) % 360 - 180, 9))
    return array.drop_attrs().sortby(["time", "latitude", "longitude"])


@pytest.mark.parametrize(("state", "seen", "tolerance"), ODD.values(), ids=ODD)
def test_the_same_answer_however_it_is_stored(kit: Kit, state, seen, tolerance: float | None) -> None:
    expected = canonical(kit.assimilate(members=3))
    given, obs = state(kit.ds), seen(kit.obs)
    if tolerance is None:  # the noise differs, the mean does not
        found = canonical(kit.assimilate(ds=given, obs=obs, members=600)).mean("member")
        wanted = canonical(kit.assimilate(members=600)).mean("member")
        assert np.abs(found - wanted).max() < 5 * 2.0 * np.sqrt(2 / 600)
        return
    result = kit.assimilate(ds=given, obs=obs, members=3)
    source = given.to_dataset() if isinstance(given, xr.DataArray) else given
    name = next(n for n in ("t2m", "tas") if n in result)
    assert result[name].dims == ("member", *source[name].dims)
    for dim in source[name].dims:
        assert result[dim].identical(source[dim])
    assert result[name].attrs == source[name].attrs
    found = canonical(result.compute())
    if tolerance == 0.0:
        np.testing.assert_array_equal(found.values, expected.values)
    else:
        assert found.values == pytest.approx(expected.values, abs=max(tolerance, 5e-5))


@pytest.mark.parametrize("dtype", ["int16", "int64", "float16", "float64"])
def test_any_type_of_number(kit: Kit, dtype: str) -> None:
    whole = kit.ds.round()  # whole kelvins are exact in each of them
    expected = kit.assimilate(ds=whole)
    found = kit.assimilate(ds=whole.astype(dtype, keep_attrs=True))
    assert found.t2m.dtype == ("float64" if dtype == "float64" else "float32")
    assert found.t2m.values == pytest.approx(expected.t2m.values, abs=1e-4)


def test_a_scalar_time(kit: Kit) -> None:
    obs = kit.obs.iloc[3:]
    expected = kit.assimilate(ds=kit.ds.isel(time=[1]), obs=obs)
    found = kit.assimilate(ds=kit.ds.isel(time=1), obs=obs)
    assert found.t2m.dims == ("member", "latitude", "longitude")
    xr.testing.assert_equal(found.t2m, expected.t2m.isel(time=0))
    both = kit.assimilate()
    assert both.t2m.isel(time=1).values == pytest.approx(found.t2m.values, abs=1e-4)  # each time on its own


def test_no_time_at_all(kit: Kit) -> None:
    ds, obs = kit.ds.isel(time=1, drop=True), kit.obs.iloc[3:].drop(columns="time")
    found = kit.assimilate(ds=ds, obs=obs, members=600)
    assert found.t2m.dims == ("member", "latitude", "longitude")
    timed = kit.assimilate(ds=kit.ds.isel(time=1), obs=obs, members=600)  # other noise, the same distribution
    assert np.abs(found.t2m.mean("member") - timed.t2m.mean("member")).max() < 5 * 2.0 * np.sqrt(2 / 600)
    assert float(found.t2m.std("member").mean()) == pytest.approx(float(timed.t2m.std("member").mean()), rel=0.05)


NOTHING = {
    "none": lambda o: None,
    "empty": lambda o: o.iloc[:0],
    "empty dataset": lambda o: o.iloc[:0].to_xarray(),
    "empty list": lambda o: [],
    "all missing": lambda o: o.assign(t2m=np.nan),
    "all outside": lambda o: o.assign(latitude=-60.0),
    "all impossible": lambda o: o.assign(t2m=500.0),
    "all passive": lambda o: o.assign(t2m_error=np.inf),
    "no cell observed": lambda o: o.assign(t2m=np.nan).set_index(["time", "latitude", "longitude"]).to_xarray(),
}


def test_why_nothing_can_be_used_is_said(kit: Kit) -> None:
    with pytest.warns(UserWarning, match=r"By quality code: bounds \d\. Are they in the units that they say\?$"):
        kit.assimilate(obs=NOTHING["all impossible"](kit.obs))
    with pytest.warns(UserWarning, match=r"By quality code: domain \d\.$"):
        kit.assimilate(obs=NOTHING["all outside"](kit.obs))
    with pytest.warns(UserWarning, match=r"\(0 given\).*for the reasons\.$"):
        kit.assimilate(obs=None)


@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
def test_without_observations_the_result_is_the_prior(kit: Kit, nothing) -> None:
    with pytest.warns(
        UserWarning, match=r"No observation can be used \(\d given\); the result is the prior. See xgenda.innovations"
    ) as caught:
        found = kit.assimilate(obs=nothing(kit.obs), members=400)
    assert caught[0].filename == __file__  # at the line of the user
    with pytest.warns(UserWarning, match="No observation can be used") as caught:
        kit.ds.genda.assimilate(nothing(kit.obs), model=kit.prior, members=2)
    assert caught[0].filename == __file__
    spread = found.t2m.std("member", ddof=1)
    assert np.abs(found.t2m.mean("member") - kit.ds.t2m).max() < 5 * 2.0 / np.sqrt(400)
    assert float(np.sqrt((spread**2).mean())) == pytest.approx(2.0, rel=0.15)
    with pytest.warns(UserWarning, match="the result is the prior"):
        again = kit.assimilate(obs=None, members=400)
    xr.testing.assert_equal(found.t2m, again.t2m)


def test_without_observations_a_lazy_result_is_the_same(kit: Kit) -> None:
    with pytest.warns(UserWarning, match="the result is the prior"):
        lazy = kit.assimilate(ds=kit.ds.chunk(time=1), obs=None)
    with pytest.warns(UserWarning, match="the result is the prior"):
        eager = kit.assimilate(obs=None)
    assert lazy.t2m.values == pytest.approx(eager.t2m.values, abs=1e-4)


DIRECTIONS = {
    "descending": lambda c: c.isel(latitude=slice(None, None, -1)),
    "0-360": lambda c: c.assign_coords(longitude=c.longitude % 360),
    "transposed": lambda c: c.transpose("longitude", "latitude", "time", ...),
    "celsius": lambda c: c.assign(
        air_temperature=(c.air_temperature - 273.15).assign_attrs(c.air_temperature.attrs, units="degC")
    ),
    "float64": lambda c: c.assign(air_temperature=c.air_temperature.astype("float64")),
    "an array": lambda c: c.air_temperature,
    "scalar time": lambda c: c.isel(time=0),
    "chunked": lambda c: c.chunk(time=1),
}


@pytest.fixture(scope="module")
def downscaled(climate, tiny_downscaler) -> tuple[xr.Dataset, xr.Dataset]:
    with xr.set_options(keep_attrs=True):
        coarse = climate[["air_temperature"]].isel(time=[3]).coarsen(latitude=4, longitude=4).mean()
    return coarse, xgenda.downscale(coarse, model=tiny_downscaler, members=MEMBERS, steps=4, seed=0)


@pytest.mark.parametrize("change", DIRECTIONS.values(), ids=DIRECTIONS)
def test_downscaling_gives_the_same_answer_however_it_is_stored(kit: Kit, downscaled, change) -> None:
    coarse, expected = downscaled
    found = kit.downscale(ds=change(coarse))
    array = found.air_temperature + (273.15 if found.air_temperature.attrs.get("units") == "degC" else 0.0)
    array = array.assign_coords(longitude=(array.longitude + 180) % 360 - 180)
    if "time" not in array.dims:
        array = array.expand_dims("time")
    array = array.sortby(["latitude", "longitude"]).transpose(*expected.air_temperature.dims)
    assert array.values == pytest.approx(expected.air_temperature.values, abs=1e-3)
    means = expected.air_temperature.coarsen(latitude=4, longitude=4).mean()
    assert means.values == pytest.approx(np.stack([coarse.air_temperature.values] * MEMBERS), abs=1e-3)


def test_a_diffusion_prior_gives_the_same_answer_however_it_is_stored(kit: Kit) -> None:
    expected = kit.diffuse()
    ds = kit.climate.isel(time=[0])
    obs = ds.isel(latitude=[3], longitude=[4])
    flipped = kit.diffuse(ds=ds.isel(latitude=slice(None, None, -1)).transpose("longitude", ...), obs=obs)
    np.testing.assert_array_equal(
        flipped.air_temperature.transpose(*expected.air_temperature.dims).isel(latitude=slice(None, None, -1)).values,
        expected.air_temperature.values,
    )
    east = kit.diffuse(ds=ds.assign_coords(longitude=ds.longitude % 360), obs=obs)
    assert east.air_temperature.values == pytest.approx(expected.air_temperature.values, abs=1e-3)

"""The bundled data: every set opens without a warning, says where it comes from, and holds what the docstring says."""

from __future__ import annotations

from pathlib import Path

import cftime
import numpy as np
import pytest
import xarray as xr

from xgenda import tutorial
from xgenda.errors import OptionError

DATA = Path(tutorial.__file__).parent / "data"
FIELDS = {
    "europe-t2m-forecast": {"t2m": (1, 97, 165)},
    "europe-synop": dict.fromkeys(["t2m", "d2m", "mslp", "wind_speed", "wind_from_direction"], (1215,)),
    "z500-ensemble": {"z": (50, 46, 71)},
    "a1b-north-america": {"air_temperature": (240, 37, 49)},
    "e1-north-america": {"air_temperature": (240, 37, 49)},
}


def test_the_names() -> None:
    assert tutorial.list_datasets() == list(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_data_set(name: str) -> None:
    ds = tutorial.open_dataset(name)
    assert {key: variable.shape for key, variable in ds.data_vars.items()} == FIELDS[name]
    assert {"latitude", "longitude", "time"} <= set(ds.coords)
    assert {"title", "source", "license", "Conventions"} <= set(ds.attrs)
    for variable in ds.data_vars.values():
        assert {"standard_name", "units"} <= set(variable.attrs)
        assert variable.dtype == "float32"
        assert isinstance(variable.variable._data, np.ndarray)  # in memory


@pytest.mark.parametrize("name", FIELDS)
def test_a_data_set_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    ds = tutorial.open_dataset(name)
    ds.to_netcdf(tmp_path / "copy.nc")
    with xr.open_dataset(tmp_path / "copy.nc", decode_coords="all") as copy:
        xr.testing.assert_identical(ds, copy.load())


@pytest.mark.parametrize("name", ["a1b-north-america", "e1-north-america"])
def test_the_climate_runs(name: str) -> None:
    ds = tutorial.open_dataset(name)
    assert ds.time.values[0] == cftime.Datetime360Day(1860, 6, 1)
    assert ds.time.values[-1] == cftime.Datetime360Day(2099, 6, 1)
    values = ds.air_temperature.values
    assert np.array_equal(values * 128, np.round(values * 128))
    assert 250 < values.min() < values.max() < 310
    assert "Open Government Licence" in ds.attrs["license"]


def test_every_call_gives_a_data_set_of_its_own() -> None:
    tutorial.open_dataset("z500-ensemble")["z"][:] = 0
    assert float(tutorial.open_dataset("z500-ensemble")["z"].min()) > 4e4


@pytest.mark.parametrize("name", ["europe-t2m", "europe_t2m_forecast", "../data/europe_synop", None])
def test_an_unknown_name(name: object) -> None:
    with pytest.raises(OptionError, match=r"name=.* is not accepted; choose one of 'europe-t2m-forecast', "):
        tutorial.open_dataset(name)  # type: ignore[arg-type]


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(OptionError, match=r"Did you mean 'europe-synop'\?"):
        tutorial.open_dataset("europe-synops")


def test_the_bundled_files_are_small_and_have_a_licence() -> None:
    files = sorted(DATA.glob("*.nc"))
    assert len(files) == len(FIELDS)
    assert sum(file.stat().st_size for file in files) < 2_000_000
    licences = (DATA / "LICENSES.md").read_text(encoding="utf-8")
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for file in files:
        assert file.name in licences
        assert file.name in readme

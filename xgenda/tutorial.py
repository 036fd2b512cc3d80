"""Small data sets, real and simulated, for examples and for trying things out.

The real ones come with xgenda:

==================== ===============================================================================================
name                 content
==================== ===============================================================================================
europe-t2m-forecast  2 m temperature, 48 h forecast of the ECMWF valid 2018-11-20 12 UTC, 0.5 degrees, 97 x 165
europe-synop         1,215 station reports of the same hour: temperature, dew point, pressure and wind
z500-ensemble        500 hPa geopotential, 50 members of the ECMWF ensemble, 1 degree, 46 x 71
a1b-north-america    annual mean temperature at 1.5 m, 1860-2099, Met Office climate run, scenario A1B, 37 x 49
e1-north-america     the same for scenario E1; until 1999 the two are the same
==================== ===============================================================================================

Sources and licences are in the attributes of each data set.

`simulate_ocean` makes sea surface height, temperature, salinity and currents of an eddying ocean, as many days as are wanted: the
truth of a twin experiment, or data to train a model on. `ocean_forecast` takes such states to later times, for `xgenda.cycle`.
"""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from xgenda.errors import check_choice
from xgenda.twin_forecasts import ocean_forecast
from xgenda.twins import simulate_ocean

__all__ = ["list_datasets", "ocean_forecast", "open_dataset", "simulate_ocean"]

_FILES = {
    "europe-t2m-forecast": "europe_t2m_forecast.nc",
    "europe-synop": "europe_synop.nc",
    "z500-ensemble": "z500_ensemble.nc",
    "a1b-north-america": "a1b_north_america.nc",
    "e1-north-america": "e1_north_america.nc",
}


def list_datasets() -> list[str]:
    """List the names that `open_dataset` accepts.

    Returns
    -------
    list of str
        The names.

    Examples
    --------
    >>> import xgenda
    >>> xgenda.tutorial.list_datasets()[:2]
    ['europe-t2m-forecast', 'europe-synop']
    """
    return list(_FILES)


def open_dataset(name: str) -> xr.Dataset:
    """Open a data set that comes with xgenda.

    The data are read into memory and the file is closed. Bounds and grid mappings are coordinates, so that the data
    variables are the fields alone.

    Parameters
    ----------
    name : str
        One of `list_datasets`.

    Returns
    -------
    xarray.Dataset
        The data, with CF attributes, source and licence.

    Raises
    ------
    OptionError
        There is no data set of that name.

    Examples
    --------
    >>> import xgenda
    >>> dict(xgenda.tutorial.open_dataset("z500-ensemble").sizes)
    {'member': 50, 'latitude': 46, 'longitude': 71}
    """
    path = Path(__file__).parent / "data" / _FILES[check_choice("name", name, _FILES)]
    with xr.open_dataset(path, engine="netcdf4", decode_coords="all") as ds:
        return ds.load()

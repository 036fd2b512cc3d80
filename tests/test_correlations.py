"""Correlated observation errors: the analysis is that of the full covariance, and what is no covariance is refused."""

from __future__ import annotations

import json
import pickle  # noqa: TID251  (dask sends objects so)
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import xgenda
from xgenda import engine
from xgenda.errors import ObservationError, OptionError
from xgenda.grids import EARTH_RADIUS
from xgenda.models.generative import GenerativeModel
from xgenda.observations.containers import Wanted, read_observations
from xgenda.observations.correlations import LARGEST_BLOCK, ErrorCovariance
from xgenda.preparation import prepare

ONCE = xgenda.QualityControl(buddy=None, duplicates=False)
STD, LENGTH = 0.8, 400e3


@pytest.fixture
def state(background: xr.Dataset) -> xr.Dataset:
    return background.isel(time=[0])


@pytest.fixture
def prior(state: xr.Dataset) -> GenerativeModel:
    return xgenda.gaussian_prior(state, length_scale=500e3, std=2.0)


def network(count: int = 12, seed: int = 0) -> pd.DataFrame:
    """Stations of two platforms; three values will be rejected."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "time": pd.Timestamp("2018-11-20T00"),
            "latitude": rng.uniform(40.5, 49.5, count),
            "longitude": rng.uniform(-5.0, 14.0, count),
            "t2m": 280.0 + rng.standard_normal(count),
            "platform": np.where(np.arange(count) % 3 == 0, "SHIP", "SYNOP"),
            "station": [f"s{i}" for i in range(count)],
        }
    )
    frame.loc[1, "t2m"], frame.loc[4, "t2m"], frame.loc[7, "latitude"] = np.nan, 500.0, 70.0
    return frame


def moments(state: xr.Dataset, obs: pd.DataFrame, model: Any, error: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return posterior mean and variance as the library finds them."""
    quality = options.pop("quality", ONCE)
    setup = prepare(state, obs, model, error, None, None, quality, options.pop("representativeness", None))
    _, _, request = engine.moments(setup.job((0,), 0, None, "cpu", False), *(np.asarray(a) for a in setup.arrays))
    mean, deviation = model.moments(request)
    return mean.numpy().ravel(), deviation.numpy().ravel() ** 2


def distances(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Great-circle distances by the haversine formula."""
    phi, lam = np.radians(latitude), np.radians(longitude)
    h = np.sin((phi[:, None] - phi) / 2) ** 2 + np.cos(phi)[:, None] * np.cos(phi) * np.sin((lam[:, None] - lam) / 2) ** 2
    return 2 * EARTH_RADIUS * np.arcsin(np.sqrt(h))


def closed_form(state: xr.Dataset, obs: pd.DataFrame, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return posterior mean and variance with the full R in numpy, with H from xarray's interpolation."""
    latitude, longitude = (a.ravel() for a in np.meshgrid(state.latitude, state.longitude, indexing="ij"))
    prior = 4.0 * np.exp(-distances(latitude, longitude) / 500e3)
    used = np.array([i for i in range(len(obs)) if i not in (1, 4, 7)])
    unit = xr.DataArray(
        np.eye(48).reshape(48, 6, 8),
        dims=("cell", "latitude", "longitude"),
        coords={k: state[k] for k in ("latitude", "longitude")},
    )
    points = {k: xr.DataArray(obs[k].to_numpy()[used], dims="obs") for k in ("latitude", "longitude")}
    H = unit.interp(**points).transpose("obs", "cell").values
    mean = state.t2m.values.astype(float).ravel()
    gain = prior @ H.T @ np.linalg.inv(H @ prior @ H.T + covariance[np.ix_(used, used)])
    return mean + gain @ (obs.t2m.to_numpy()[used] - H @ mean), np.diag(prior - gain @ H @ prior)


def by_distance(obs: pd.DataFrame) -> np.ndarray:
    platform = obs.platform.to_numpy()
    R = STD**2 * np.exp(-distances(obs.latitude.to_numpy(), obs.longitude.to_numpy()) / LENGTH)
    return np.where(platform[:, None] == platform, R, 0.0)


def any_matrix(count: int = 12, seed: int = 1) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal((count, count))
    return 0.1 * a @ a.T + 0.2 * np.eye(count)


@pytest.mark.parametrize("representativeness", [None, 0.5])
@pytest.mark.parametrize("form", ["by distance", "matrix"])
def test_the_analysis_is_that_of_the_full_covariance(state, prior, form: str, representativeness: float | None) -> None:  # type: ignore[no-untyped-def]
    obs = network()
    full = by_distance(obs) if form == "by distance" else any_matrix()
    error = ErrorCovariance(std=STD, length_scale=LENGTH) if form == "by distance" else ErrorCovariance(matrix=full)
    mean, variance = moments(state, obs, prior, error, representativeness=representativeness)
    R = full + (representativeness or 0.0) ** 2 * np.eye(len(obs))
    expected = closed_form(state, obs, R)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-6 / 280)
    np.testing.assert_allclose(variance, expected[1], rtol=1e-6)
    # and it matters: without the correlations it is another one
    assert np.abs(closed_form(state, obs, np.diag(np.diag(R)))[0] - expected[0]).max() > 1e-2
    counts = json.loads(xgenda.innovations(state, obs, error=error, quality=ONCE).attrs["counts"])
    assert counts == {"used": 9, "missing": 1, "bounds": 1, "domain": 1}


def test_reports_know_the_standard_deviation(state: xr.Dataset) -> None:
    full = any_matrix()
    departures = xgenda.innovations(state, network(), error={"t2m": ErrorCovariance(matrix=full)}, representativeness=0.3)
    assert departures.error.values == pytest.approx(np.sqrt(np.diag(full) + 0.09))


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_rows_does_not_matter(state: xr.Dataset, prior: GenerativeModel, seed: int) -> None:
    obs, full = network(), any_matrix()
    order = np.random.default_rng(seed).permutation(len(obs))
    for one, other in (
        (ErrorCovariance(matrix=full), ErrorCovariance(matrix=full[np.ix_(order, order)])),
        (ErrorCovariance(std=STD, length_scale=LENGTH), ErrorCovariance(std=STD, length_scale=LENGTH)),
    ):
        a = moments(state, obs, prior, one)
        b = moments(state, obs.iloc[order].reset_index(drop=True), prior, other)
        assert np.array_equal(a[0], b[0])
        assert np.array_equal(a[1], b[1])


def test_a_diagonal_covariance_is_the_plain_error(state: xr.Dataset, prior: GenerativeModel) -> None:
    obs, std = network(), np.linspace(0.3, 2.0, 12)
    plain = xgenda.assimilate(state, obs, model=prior, error={"t2m": std}, members=2, seed=0)
    same = xgenda.assimilate(state, obs, model=prior, error=ErrorCovariance(matrix=np.diag(std**2)), members=2, seed=0)
    assert np.array_equal(plain.t2m.values, same.t2m.values)


def test_times_sources_and_variables_are_independent(background: xr.Dataset) -> None:
    """One matrix over the rows of all times: what concerns one time is its block."""
    prior = xgenda.gaussian_prior(background, length_scale=500e3, std=2.0)
    late = network(seed=5).assign(time=pd.Timestamp("2018-11-20T12"))
    both = pd.concat([network(), late], ignore_index=True)
    full = any_matrix(24)
    together = moments(background, both, prior, ErrorCovariance(matrix=full))
    for t, (obs, block) in enumerate(((network(), full[:12, :12]), (late, full[12:, 12:]))):
        alone = closed_form(background.isel(time=[t]), obs, block)
        np.testing.assert_allclose(together[0].reshape(2, -1)[t], alone[0], rtol=1e-6 / 280)
    by_source = moments(background, [network(), late], prior, [ErrorCovariance(matrix=full[:12, :12]), 1.0])
    np.testing.assert_allclose(by_source[0].reshape(2, -1)[0], together[0].reshape(2, -1)[0], rtol=1e-12)
    lazy = background.chunk(time=1)
    a = xgenda.assimilate(lazy, both, model=prior, error=ErrorCovariance(matrix=full), members=2, seed=0).compute()
    b = xgenda.assimilate(background, both, model=prior, error=ErrorCovariance(matrix=full), members=2, seed=0)
    np.testing.assert_allclose(a.t2m, b.t2m, atol=1e-4)


def test_units_of_a_covariance(state: xr.Dataset) -> None:
    obs = network().to_xarray()
    obs["t2m"] = (obs.t2m - 273.15) * 1.8 + 32
    obs["t2m"].attrs["units"] = "degF"
    wanted = [Wanted("t2m", "air_temperature", "K")]
    for error in (ErrorCovariance(std=1.8, length_scale=1e5), ErrorCovariance(matrix=3.24 * np.eye(12))):
        table = read_observations(obs, wanted, error)
        assert table.error == pytest.approx(np.ones(12))
        row, latitude, longitude = table.row[:2], table.latitude[:2], table.longitude[:2]
        assert np.diag(table.correlated[0].covariance(row, latitude, longitude)) == pytest.approx([1.0, 1.0])


def test_levels_are_independent() -> None:
    """Of one profile no two errors are one: exp(-0) would make them the same."""
    from xgenda.maps import identity
    from xgenda.observations.correlations import whitened

    air = Wanted("t", "air_temperature", "K", levels=(50000.0, 85000.0), vertical="pressure")
    frame = pd.DataFrame(
        {
            "latitude": [40.0, 40.0, 41.0],
            "longitude": [0.0, 0.0, 1.0],
            "pressure": [85000.0, 50000.0, 85000.0],
            "t": [280.0, 250.0, 281.0],
        }
    )
    table = read_observations(frame, [air], ErrorCovariance(std=2.0, length_scale=1e6))
    operator, value, variance = whitened(table, identity(3), np.zeros(3, dtype=np.int64))
    dense = operator.matrix.toarray()
    R = np.linalg.inv(dense.T @ np.diag(1 / variance) @ dense)
    c = 4.0 * np.exp(-distances(np.array([40.0, 41.0]), np.array([0.0, 1.0]))[0, 1] / 1e6)
    np.testing.assert_allclose(R, [[4, 0, c], [0, 4, 0], [c, 0, 4]], atol=1e-12)
    np.testing.assert_allclose(dense @ table.value, value)
    assert pickle.loads(pickle.dumps(table)).correlated[0].given.std == 2.0  # noqa: S301  (travels to workers)


def test_thinning_and_superobs(state: xr.Dataset, prior: GenerativeModel) -> None:
    error = ErrorCovariance(std=STD, length_scale=LENGTH)
    thin = xgenda.innovations(state, network(), error=error, quality=xgenda.QualityControl(thin=300e3))
    assert 1 < (thin.quality_code == 0).sum() < 9
    with pytest.raises(ObservationError, match=r"superob merges observations with independent errors.*Thin instead.*thin=50e3"):
        xgenda.innovations(state, network(), error=error, quality=xgenda.QualityControl(superob=300e3))


def test_too_many_at_once(state: xr.Dataset) -> None:
    rng = np.random.default_rng(0)
    count = LARGEST_BLOCK + 1
    crowd = pd.DataFrame({"latitude": rng.uniform(41, 49, count), "longitude": rng.uniform(-5, 14, count), "t2m": 280.0})
    error = ErrorCovariance(std=1.0, length_scale=1e4)
    with pytest.raises(
        ObservationError, match=r"errors of 2001 observations of one time depend.*at most 2000.*QualityControl\(thin=50e3\)"
    ):
        xgenda.innovations(state.isel(time=0), crowd, error=error)
    halves = crowd.assign(platform=np.arange(count) % 2)
    assert xgenda.innovations(state.isel(time=0), halves, error=error).sizes["obs"] == count


def test_one_place_twice(state: xr.Dataset, prior: GenerativeModel) -> None:
    obs = network()
    obs.loc[2, ["latitude", "longitude", "platform"]] = obs.loc[3, ["latitude", "longitude", "platform"]]
    error = ErrorCovariance(std=STD, length_scale=LENGTH)
    with pytest.raises(ObservationError, match=r"obs: rows [23] and [23] are observations of one place.*representativeness=0.1"):
        xgenda.assimilate(state, obs, model=prior, error=error, members=1, seed=0)
    assert xgenda.assimilate(state, obs, model=prior, error=error, representativeness=0.1, members=1, seed=0).sizes["member"] == 1


NO_COVARIANCE: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, r"needs either std and length_scale or matrix: ErrorCovariance\(std=0.5, length_scale=50e3\)"),
    "one of two": ({"std": 1.0}, r"needs either std and length_scale or matrix"),
    "all": ({"std": 1.0, "length_scale": 1.0, "matrix": np.eye(2)}, r"needs either std and length_scale or matrix"),
    "zero": ({"std": 0.0, "length_scale": 1e5}, r"std=0.0 is not accepted; give a positive number"),
    "infinite": ({"std": np.inf, "length_scale": 1e5}, r"std=inf is not accepted"),
    "negative": ({"std": 1.0, "length_scale": -1e5}, r"length_scale=-100000.0 is not accepted; give a positive number"),
    "text": ({"std": 1.0, "length_scale": "50 km"}, r"length_scale='50 km' is not accepted"),
    "not square": ({"matrix": np.ones((3, 2))}, r"matrix has shape \(3, 2\) and must be square; give an array of shape \(n, n\)"),
    "one row": ({"matrix": np.ones(3)}, r"matrix has shape \(3,\) and must be square"),
    "nan": ({"matrix": [[1.0, 0.0], [0.0, np.nan]]}, r"matrix holds 1 values that are not finite, first in row 1"),
    "not symmetric": (
        {"matrix": [[1.0, 0.2], [0.1, 1.0]]},
        r"not symmetric \(it differs from its transpose by up to 0.1\).*\(r \+ r.T\) / 2",
    ),
    "not positive": (
        {"matrix": [[1.0, 2.0], [2.0, 1.0]]},
        r"not positive definite; its smallest eigenvalue is -1\. Add the variance",
    ),
    "no numbers": ({"matrix": [["a"]]}, r"matrix is a list that holds no numbers"),
}


@pytest.mark.parametrize(("given", "message"), NO_COVARIANCE.values(), ids=NO_COVARIANCE)
def test_what_is_no_covariance(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ErrorCovariance(**given)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "wrong size": (
        lambda: ErrorCovariance(matrix=np.eye(5)), r"error\['t2m'\]: the matrix has shape \(5, 5\) and obs has 12 rows; give one of",
    ),
    "by platform": (
        lambda: {"t2m": {"SHIP": ErrorCovariance(std=1.0, length_scale=1.0)}}, r"error\['t2m'\]=.*must be numbers by platform: error={'t2m'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message"), REFUSED.values(), ids=REFUSED)
def test_covariances_that_do_not_fit(error: Callable[[], Any], message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        read_observations(network(), [Wanted("t2m", "air_temperature", "K")], error())


def test_one_matrix_for_two_variables() -> None:
    obs = network().assign(d2m=270.0)
    wanted = [Wanted("t2m", "air_temperature", "K"), Wanted("d2m", "dew_point_temperature", "K")]
    with pytest.raises(
        ObservationError, match=r"error is one covariance matrix and obs has 2 variables; give one each: error={'t2m': "
    ):
        read_observations(obs, wanted, ErrorCovariance(matrix=np.eye(12)))
    table = read_observations(obs, wanted, ErrorCovariance(std=1.0, length_scale=1e5))
    assert len(table.correlated) == 2

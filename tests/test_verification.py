"""Scores against their definitions, closed forms, and what a perfect ensemble must score."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

import xgenda
from xgenda.errors import GridError, ObservationError, OptionError, UnitsError
from xgenda.verification import METRICS, fair_crps, power_spectrum, rank_histogram


def crps_by_double_sum(ensemble: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return mean |x - y| - sum over pairs |x - x'| / (2 M (M - 1))."""
    m = len(ensemble)
    error = np.abs(ensemble - truth).mean(0)
    return error - np.abs(ensemble[:, None] - ensemble[None]).sum((0, 1)) / (2 * m * (m - 1))


def crps_of_normal(mean: float, std: float, truth: np.ndarray) -> np.ndarray:
    """Gneiting and Raftery 2007, J. Am. Stat. Assoc. 102, eq. 21 (with the sign of an error)."""
    z = (truth - mean) / std
    return std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))


# -- CRPS --------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 10**6), st.booleans())
def test_crps_is_the_double_sum(members: int, points: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    ensemble, truth = rng.normal(size=(members, points)), rng.normal(size=points)
    if ties:
        ensemble, truth = np.round(ensemble), np.round(truth)
    assert fair_crps(ensemble, truth) == pytest.approx(crps_by_double_sum(ensemble, truth), abs=1e-12)


def test_crps_of_many_members_is_that_of_the_distribution() -> None:
    members = 200_000
    quantiles = norm.ppf((np.arange(members) + 0.5) / members, loc=1.0, scale=2.0)
    truth = np.array([-3.0, 0.0, 1.0, 4.5])
    found = fair_crps(quantiles[:, None], truth)
    assert found == pytest.approx(crps_of_normal(1.0, 2.0, truth), abs=2e-4)


@pytest.mark.parametrize("members", [2, 3, 8])
def test_crps_does_not_favour_large_ensembles(members: int) -> None:
    rng = np.random.default_rng(members)
    n = 200_000
    scores = fair_crps(rng.normal(size=(members, n)), rng.normal(size=n))
    expected = 1 / np.sqrt(np.pi)  # of a perfect normal ensemble, whatever its size
    assert scores.mean() == pytest.approx(expected, abs=4 * scores.std() / np.sqrt(n))


def test_crps_of_one_member_is_the_absolute_error() -> None:
    assert fair_crps(np.array([[1.0, -2.0]]), np.array([3.0, -2.5])) == pytest.approx([2.0, 0.5])


# -- fields ------------------------------------------------------------------------------------------------------------


def fields(members: int | None, times: int = 1, ny: int = 6, nx: int = 8, seed: int = 0, scale: float = 1.0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    dims = (*(() if members is None else ("member",)), "time", "latitude", "longitude")
    shape = (*(() if members is None else (members,)), times, ny, nx)
    return xr.Dataset(
        {"t2m": (dims, 280 + scale * rng.normal(size=shape), {"units": "K", "standard_name": "air_temperature"})},
        coords={
            "time": pd.date_range("2018-11-20", periods=times, freq="12h"),
            "latitude": np.linspace(10, 80, ny),
            "longitude": np.linspace(0, 70, nx),
        },
    )


def score(ds: xr.Dataset, metric: str) -> float:
    return float(ds.t2m.sel(metric=metric))


@pytest.mark.parametrize("members", [4, 20])
def test_a_perfect_ensemble(members: int) -> None:
    ensemble, truth = fields(members, 10, 40, 50), fields(None, 10, 40, 50, seed=1)
    n = 10 * 40 * 50
    scores = xgenda.verify(ensemble, truth)
    # squares of standard normal numbers: relative standard error of each mean square sqrt(2 / n), with weights somewhat more
    assert score(scores, "spread_skill") == pytest.approx(1.0, abs=4 * np.sqrt(1.5 / n))
    assert score(scores, "rmse") == pytest.approx(np.sqrt(1 + 1 / members), abs=4 * np.sqrt(1.5 / n))
    # E[chi2] = E of an F distribution with 1 and M - 1 degrees of freedom: (M - 1) / (M - 3)
    assert score(scores, "chi2") == pytest.approx((members - 1) / (members - 3), rel=0.05 if members > 10 else 2.0)
    assert score(scores, "crps") == pytest.approx(1 / np.sqrt(np.pi), abs=0.02)
    assert score(scores, "bias") == pytest.approx(0.0, abs=0.04)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(0.5, 0.5 * np.sqrt(21 / 20) / np.sqrt(1 + 0.25 / 20)), (2.0, 2 * np.sqrt(21 / 20) / np.sqrt(1 + 4 / 20))],
)
def test_too_little_and_too_much_spread(scale: float, expected: float) -> None:
    scores = xgenda.verify(fields(20, 5, 40, 50, scale=scale), fields(None, 5, 40, 50, seed=1))
    assert score(scores, "spread_skill") == pytest.approx(expected, rel=0.03)


def by_hand(ensemble: np.ndarray, truth: np.ndarray, weights: np.ndarray, error: float = 0.0) -> dict[str, float]:
    m, mean = len(ensemble), ensemble.mean(0)
    variance = ((ensemble - mean) ** 2).sum(0) / (m - 1) * (m + 1) / m + error**2

    def average(x: np.ndarray) -> float:
        return float((x * weights).sum() / (weights * np.ones_like(x)).sum())

    out = {
        "rmse": np.sqrt(average((mean - truth) ** 2)), "mae": average(np.abs(mean - truth)), "bias": average(mean - truth),
        "crps": average(crps_by_double_sum(ensemble, truth)), "spread": np.sqrt(average(variance)),
        "chi2": average((mean - truth) ** 2 / variance),
    }  # fmt: skip
    return {**out, "spread_skill": out["spread"] / out["rmse"]}


def test_all_scores_by_hand_with_area_weights() -> None:
    ensemble, truth = fields(5, 2), fields(None, 2, seed=1)
    truth["t2m"] += truth.latitude / 20  # worse to the north: weights matter
    half = 7.0  # of the spacing of latitudes
    latitude = ensemble.latitude.values
    bands = np.sin(np.radians(np.minimum(latitude + half, 90))) - np.sin(np.radians(latitude - half))
    expected = by_hand(ensemble.t2m.values, truth.t2m.values, bands[:, None] * np.ones(8))
    scores = xgenda.verify(ensemble, truth)
    assert set(scores.metric.values) == set(METRICS) == set(expected)
    for metric, value in expected.items():
        assert score(scores, metric) == pytest.approx(value, rel=1e-9), metric
    assert scores.t2m.attrs["units"] == "K"
    again = ensemble.transpose("longitude", "member", "latitude", "time").genda.verify(truth)  # any order of dimensions
    xr.testing.assert_allclose(again, scores)
    named = xgenda.verify(ensemble.t2m.rename("t2m").rename(member="number"), truth.t2m)
    xr.testing.assert_allclose(named, scores)


def test_over_some_dimensions() -> None:
    ensemble, truth = fields(5, 3), fields(None, 3, seed=1)
    by_cell = xgenda.verify(ensemble, truth, dims="time")
    assert dict(by_cell.sizes) == {"metric": 7, "latitude": 6, "longitude": 8}
    cell = by_hand(ensemble.t2m.values[:, :, 2, 3], truth.t2m.values[:, 2, 3], np.ones(3))
    for metric, value in cell.items():
        assert float(by_cell.t2m.sel(metric=metric)[2, 3]) == pytest.approx(value)
    by_time = xgenda.verify(ensemble, truth, dims=["latitude", "longitude"])
    xr.testing.assert_allclose(by_time.isel(time=1, drop=True), xgenda.verify(ensemble.isel(time=[1]), truth.isel(time=[1])))


def test_a_single_field() -> None:
    field, truth = fields(None), fields(None, seed=1)
    scores = xgenda.verify(field, truth)
    assert score(scores, "crps") == pytest.approx(score(scores, "mae"))
    for metric in ("spread", "spread_skill", "chi2"):
        assert np.isnan(score(scores, metric))


@pytest.mark.parametrize("members", [2, 3])
def test_the_variance_of_three_members_is_no_measure_of_single_errors(members: int) -> None:
    scores = xgenda.verify(fields(members), fields(None, seed=1))
    assert np.isnan(score(scores, "chi2"))
    assert score(scores, "spread_skill") == pytest.approx(1.0, abs=0.1)
    truth = fields(None, seed=1).isel(time=0)
    at_points = truth.stack(obs=("latitude", "longitude")).reset_index("obs")
    assert (
        0.2 < score(xgenda.verify(fields(members).isel(time=[0]), at_points, error=1.0), "chi2") < 2.0
    )  # an error of one bounds it
    assert np.isfinite(score(xgenda.verify(fields(4), fields(None, seed=1)), "chi2"))


def test_gaps_in_the_truth_count_nowhere() -> None:
    ensemble, truth = fields(5), fields(None, seed=1)
    ensemble["t2m"][..., 4:] = 280 + 9 * (ensemble.t2m[..., 4:] - 280)  # much spread where there is no truth
    truth["t2m"][..., 4:] = np.nan
    scores = xgenda.verify(ensemble, truth)
    cut = xgenda.verify(ensemble.isel(longitude=slice(4)), truth.isel(longitude=slice(4)))
    xr.testing.assert_allclose(scores, cut)


@pytest.mark.parametrize("kind", ["float64", "int16"])
def test_units_of_the_truth(kind: str) -> None:
    ensemble = fields(5)
    truth = fields(None, seed=1).round().astype(kind)
    truth["t2m"].attrs["units"] = "K"
    celsius = ensemble.assign(t2m=(ensemble.t2m - 273.15).assign_attrs(units="degC"))
    one, other = xgenda.verify(ensemble, truth), xgenda.verify(celsius, truth)
    xr.testing.assert_allclose(one, other)
    assert other.t2m.attrs["units"] == "degC"


def test_chunked_input() -> None:
    ensemble, truth = fields(5, 3), fields(None, 3, seed=1)
    xr.testing.assert_allclose(xgenda.verify(ensemble.chunk(time=1), truth.chunk(time=1)), xgenda.verify(ensemble, truth))


# -- points ------------------------------------------------------------------------------------------------------------


def test_points_by_hand() -> None:
    ensemble = fields(6, 2)
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({
        "time": np.repeat(ensemble.time.values, 10), "latitude": rng.uniform(10, 80, 20), "longitude": rng.uniform(0, 70, 20),
        "t2m": 280 + rng.normal(size=20),
    })  # fmt: skip
    frame.loc[4, "t2m"] = np.nan
    frame.loc[7, "latitude"] = -80.0
    good = frame.drop(index=[4, 7])
    at = {k: xr.DataArray(good[k].to_numpy(), dims="obs") for k in ("time", "latitude", "longitude")}
    seen = ensemble.t2m.sel(time=at["time"]).interp(latitude=at["latitude"], longitude=at["longitude"])
    expected = by_hand(seen.transpose("member", "obs").values, good.t2m.to_numpy(), np.ones(18), error=0.7)
    for stored in (ensemble, ensemble.isel(latitude=slice(None, None, -1)), ensemble.transpose(..., "member")):
        scores = xgenda.verify(stored, frame, error=0.7)
        for metric, value in expected.items():
            assert score(scores, metric) == pytest.approx(value, rel=1e-3), metric
    xr.testing.assert_allclose(xgenda.verify(ensemble, frame.to_xarray(), error={"t2m": 0.7}), scores)


def test_a_perfect_ensemble_at_points_with_error() -> None:
    n, m = 4000, 10
    rng = np.random.default_rng(5)
    values = rng.normal(size=(m + 1, 1, 40, 50))
    ensemble = fields(m, 1, 40, 50).copy(data={"t2m": 280 + values[:m]})
    i, j = rng.integers(40, size=n), rng.integers(50, size=n)
    obs = pd.DataFrame({
        "time": ensemble.time.values[0], "latitude": ensemble.latitude.values[i], "longitude": ensemble.longitude.values[j],
        "t2m": 280 + values[m, 0, i, j] + 0.5 * rng.normal(size=n),
    })  # fmt: skip
    scores = xgenda.verify(ensemble, obs, error=0.5)
    assert score(scores, "spread_skill") == pytest.approx(1.0, abs=0.1)
    assert score(scores, "rmse") == pytest.approx(np.sqrt(1 + 1 / m + 0.25), abs=0.08)
    without = xgenda.verify(ensemble, obs, error=1e-6)
    assert score(without, "spread") < score(scores, "spread")
    assert score(without, "crps") == pytest.approx(score(scores, "crps"))


# -- ranks and spectra -------------------------------------------------------------------------------------------------


def test_ranks_by_hand() -> None:
    ensemble, truth = fields(3, 2), fields(None, 2, seed=1)
    truth["t2m"][0, 0, 0] = np.nan
    truth["t2m"][1, 2, 3] = ensemble.t2m[1, 1, 2, 3]  # a tie, which leaves two ranks open
    below = (ensemble.t2m.values < truth.t2m.values).sum(0)
    tied = below[1, 2, 3]
    found = rank_histogram(ensemble, truth)
    expected = np.bincount(np.delete(below.ravel(), [0, 48 + 2 * 8 + 3]), minlength=4)
    difference = found.t2m.values - expected
    assert difference.sum() == 1
    assert np.flatnonzero(difference)[0] in (tied, tied + 1)
    assert found["rank"].values.tolist() == [0, 1, 2, 3]
    by_time = rank_histogram(ensemble.transpose(..., "member"), truth, dims=["longitude", "latitude"])
    assert set(by_time.t2m.dims) == {"rank", "time"}
    xr.testing.assert_equal(by_time.t2m.sum("time"), found.t2m)
    with pytest.raises(OptionError, match=r"ensemble\['t2m'\] has one member; ranks need at least 2"):
        rank_histogram(fields(1), truth.isel(time=[0]))


@pytest.mark.parametrize(("scale", "outermost"), [(1.0, 2 / 10), (0.5, None), (2.0, None)])
def test_ranks_are_flat_for_a_perfect_ensemble(scale: float, outermost: float | None) -> None:
    counts = rank_histogram(fields(9, 10, 40, 50, scale=scale), fields(None, 10, 40, 50, seed=1)).t2m.values
    share = (counts[0] + counts[-1]) / counts.sum()
    if outermost is None:  # too little spread fills the outermost ranks, too much empties them
        assert (share > 0.35) if scale < 1 else (share < 0.1)
    else:
        assert (counts / counts.sum()) == pytest.approx(np.full(10, 0.1), abs=4 * np.sqrt(0.09 / counts.sum()))


def test_tied_ranks_are_equally_likely() -> None:
    dry = fields(9, 5, 40, 50) * 0.0
    counts = rank_histogram(dry, dry.isel(member=0, drop=True)).t2m.values
    assert counts / counts.sum() == pytest.approx(np.full(10, 0.1), abs=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(6, 15), st.integers(6, 15), st.integers(0, 1000), st.sampled_from([False, True, "both"]))
def test_the_spectrum_adds_up_to_the_variance(ny: int, nx: int, seed: int, periodic: bool) -> None:
    ds = fields(2, 3, ny, nx, seed)
    found = power_spectrum(ds, periodic=periodic)  # type: ignore[arg-type]
    assert found.t2m.dims == ("member", "time", "wavenumber")
    np.testing.assert_allclose(found.t2m.sum("wavenumber"), ds.t2m.var(["latitude", "longitude"]), rtol=1e-9)
    assert found.t2m.attrs["units"] == "(K)2"
    np.testing.assert_allclose(found.wavelength * found.wavenumber, 1.0)
    turned = power_spectrum(ds.transpose("longitude", "member", "latitude", "time"), periodic=periodic)  # type: ignore[arg-type]
    xr.testing.assert_allclose(turned, found)


def test_waves_are_found_at_their_wavenumber() -> None:
    ds = fields(None, 1, 24, 32)
    y, x = np.meshgrid(np.arange(24), np.arange(32), indexing="ij")

    def peak(wave: np.ndarray, periodic: bool | str) -> float:
        power = power_spectrum(ds.copy(data={"t2m": wave[None]}), periodic=periodic).t2m.isel(time=0)  # type: ignore[arg-type]
        assert float(power.max()) == pytest.approx(float(power.sum()), rel=1e-9)
        return float(power.wavenumber[int(power.values.argmax())])

    both = np.cos(2 * np.pi * (6 / 24 * y + 8 / 32 * x) + 1.0)
    assert peak(both, "both") == pytest.approx(np.hypot(0.25, 0.25), abs=0.5 / 24)
    mirrored = np.cos(np.pi * 9 * (y + 0.5) / 24) * np.cos(np.pi * 4 * (x + 0.5) / 32)
    assert peak(mirrored, False) == pytest.approx(np.hypot(9 / 48, 4 / 64), abs=0.5 / 48)
    around = np.cos(np.pi * 9 * (y + 0.5) / 24) * np.cos(2 * np.pi * 4 * x / 32 + 0.3)
    assert peak(around, True) == pytest.approx(np.hypot(9 / 48, 4 / 32), abs=0.5 / 32)


def test_a_trend_across_a_region_stays_at_large_scales() -> None:
    ds = fields(None, 1, 40, 40)
    trend = ds.copy(data={"t2m": np.broadcast_to(np.arange(40.0), (1, 40, 40))})
    small = {p: power_spectrum(trend, periodic=p).t2m.sel(wavenumber=slice(0.25, None)).sum() for p in (False, "both")}
    assert float(small[False]) < 0.01 * float(small["both"])


def test_spectra_that_are_refused() -> None:
    ds = fields(None)
    with pytest.raises(OptionError, match="ds holds NaN; fill the gaps"):
        power_spectrum(ds.where(ds.latitude > 30))
    with pytest.raises(OptionError, match="periodic='x' is not accepted"):
        power_spectrum(ds, periodic="x")  # type: ignore[arg-type]
    points = xr.Dataset(
        {"t": ("point", np.zeros(4))}, coords={"latitude": ("point", np.arange(4.0)), "longitude": ("point", np.arange(4.0))}
    )
    with pytest.raises(GridError, match="ds has no rows and columns"):
        power_spectrum(points)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.rename(t2m="tas"), OptionError, r"truth has none of the variables \['t2m'\]; it has \['tas'\]"),
        (
            lambda t: t.assign_coords(latitude=t.latitude + 0.5),
            GridError,
            r"truth is on the grid .* and ensemble on .*. Interpolate: truth.genda.regrid\(ensemble\)",
        ),
        (lambda t: t.isel(time=[0]), OptionError, r"truth\['t2m'\] and the ensemble have different coordinates"),
        (lambda t: t.assign(t2m=t.t2m.assign_attrs(units="m")), UnitsError, r"Units 'm' cannot be converted to 'K'"),
        (lambda t: t.t2m.rename(None), OptionError, r"truth is a DataArray without a name. Name the variable: truth.rename"),
        (lambda t: t.to_dataframe().reset_index(), ObservationError, r"truth\['t2m'\] has no error, and none is invented"),
        (lambda t: 280.0, ObservationError, r"truth is a builtins.float; give a pandas DataFrame or xarray Dataset"),
        (lambda t: None, OptionError, r"No observation in truth can be compared"),
    ],
)
def test_a_truth_that_cannot_be_compared(change, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        xgenda.verify(fields(3, 2), change(fields(None, 2)))


def test_other_arguments_that_are_refused() -> None:
    with pytest.raises(
        OptionError, match=r"dims='foo' is not averaged over; ensemble\['t2m'\] has 'time', 'latitude', 'longitude'"
    ):
        xgenda.verify(fields(3), fields(None), dims="foo")
    with pytest.raises(OptionError, match=r"ensemble is a builtins.list; an xarray Dataset is needed"):
        xgenda.verify([1, 2], fields(None))

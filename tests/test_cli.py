"""The command line, the demo behind it, and the maps it draws."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib import pyplot
from matplotlib.figure import Figure

import xgenda
from xgenda import demo
from xgenda.cli import main
from xgenda.errors import GridError, MissingDependencyError, OptionError, OutputExistsError
from xgenda.files import aside
from xgenda.plotting import plot_analysis

COMMANDS = ("demo", "models")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


# -- the command line -----------------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"xgenda {xgenda.__version__}\n"


def test_models_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    names = list(xgenda.list_models().index)
    assert all(name in out for name in names)
    assert names or "No model is registered" in out


def test_the_wrong_command_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["downscale"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "downscale" in err
    assert all(command in err for command in COMMANDS)


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: xgenda")


@pytest.mark.parametrize("members", ["1", "0", "-3", "many"])
def test_too_few_members(members: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path / "new"), "--members", members])
    assert stopped.value.code == 2
    assert not (tmp_path / "new").exists()


def test_the_module_is_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xgenda", "--help"], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: xgenda")
    assert all(command in done.stdout for command in COMMANDS)


def test_the_help_is_quick(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom xgenda.cli import main\ntry:\n    main(['demo', '--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'matplotlib', 'dask'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_script_is_installed() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="xgenda")
    assert script.load() is main


# -- the demo -------------------------------------------------------------------------------------------------------------------


def test_the_demo_refuses_a_folder_with_something_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--overwrite" in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputExistsError, match="is not empty"):
        demo.run(tmp_path)
    assert demo.check_folder(tmp_path, overwrite=True) == tmp_path


def test_the_demo_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="is a file"):
            demo.run(tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "precious"


def test_without_matplotlib_the_demo_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'xgenda\[plot\]'"):
        demo.run(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.nc"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), aside(path) as partial:
        fail(partial)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.nc"]
    with aside(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"


def test_every_station_is_withheld_once() -> None:
    fold = demo.station_folds(103, 5, seed=1)
    assert np.bincount(fold).tolist() == [21, 21, 21, 20, 20]
    assert np.array_equal(fold, demo.station_folds(103, 5, seed=1))
    assert not np.array_equal(fold, demo.station_folds(103, 5, seed=2))


def test_the_years_are_apart() -> None:
    train, test = demo.training_years(), demo.withheld_years()
    assert train.sizes["time"] == 180 + 40
    assert test.sizes["time"] == 40
    assert int(train.time.dt.year.max()) == 2039
    assert int(test.time.dt.year.min()) == 2060
    # the two runs are the same until 1999, so none of it is taken twice
    later = train.isel(time=slice(140, None)).air_temperature.values
    assert len(np.unique(later.reshape(80, -1), axis=0)) == 80
    assert demo.withheld_years(every=20, scenario="e1").time.dt.year.values.tolist() == [2060, 2080]


def test_sparse_observations() -> None:
    truth = demo.withheld_years(every=20)
    obs = demo.sparse_observations(truth, count=30, error=0.5, seed=3)
    xr.testing.assert_identical(obs, demo.sparse_observations(truth, count=30, error=0.5, seed=3))
    assert dict(obs.sizes) == {"obs": 60}
    assert len(set(zip(obs.latitude.values[:30], obs.longitude.values[:30], strict=True))) == 30
    assert np.array_equal(obs.latitude[:30], obs.latitude[30:])
    departures = xgenda.innovations(truth, obs, error=0.5)
    assert (departures.quality_code == 0).all()
    assert 0.35 < float(departures.innovation.std()) < 0.65


def test_the_experiment_of_downscaling() -> None:
    """Ridge regression is far better than interpolation, and a field alone says nothing of its error."""
    table = demo.downscaling_experiment("t2m-north-america-x4", members=8, every=10, steps=6).table
    single, several = table.loc["ridge regression"], table.loc["ridge regression + past errors"]
    assert single.rmse < 0.3 * table.rmse["bilinear interpolation"]
    assert several.crps < single.crps
    assert np.isnan(single.spread_skill)
    assert 0.3 < several.spread_skill < 1.5
    assert table.crps["xgenda: t2m-north-america-x4"] < several.crps


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    lines: list[str] = []
    out = tmp_path / "new" / "folder"
    tables = demo.run(out, members=4, every=20, folds=2, steps=12, say=lines.append)
    names = {"europe-analysis", "america-fine", "america-analysis"}
    assert {p.name for p in out.iterdir()} == {f"{n}.{s}" for n in names for s in ("nc", "png")}
    text = "\n".join(lines)
    assert str(out) in text
    assert re.search(r"26 without a usable value, 80 more than 500 m above or below the ground", text)
    for name in names:
        with xr.open_dataset(out / f"{name}.nc") as ds:
            assert ds.sizes["member"] == 4
            assert ds.attrs["xgenda_seed"] == 0
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    stations, fine, sparse = tables["stations"], tables["downscaling"], tables["assimilation"]
    assert stations.rmse["analysis"] < stations.rmse["background"]
    ours = "xgenda: t2m-north-america"
    assert fine.rmse[f"{ours}-x4"] < fine.rmse["bilinear interpolation"]
    assert fine.crps[f"{ours}-x4"] < fine.crps["ridge regression"]
    assert sparse.rmse[ours] < 0.5 * sparse.rmse["mean of the training years"]


# -- maps -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ensemble() -> xr.Dataset:
    z = xgenda.tutorial.open_dataset("z500-ensemble").isel(member=slice(0, 5))
    return z.expand_dims(time=pd.to_datetime(["2012-09-24T00", "2012-09-24T06"])).assign(
        z=lambda d: d.z + 100.0 * (d.time.dt.hour == 6)
    )


def _titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def test_the_panels(ensemble: xr.Dataset) -> None:
    figure = plot_analysis(ensemble.isel(member=0, drop=True), ensemble, member=2, reference_label="truth")
    assert isinstance(figure, Figure)
    assert _titles(figure) == [
        "truth", "ensemble mean", "member 3", "spread (standard deviation)", "mean minus truth", "member 3 minus mean",
    ]  # fmt: skip
    maps = [ax.collections[0] for ax in figure.axes[:6]]
    assert len({m.get_clim() for m in maps[:3]}) == 1
    assert maps[4].get_clim() == maps[5].get_clim()
    assert maps[4].get_clim()[0] == -maps[4].get_clim()[1]
    np.testing.assert_allclose(maps[3].get_array().reshape(46, 71), ensemble.z.isel(time=0).std("member", ddof=1), rtol=1e-3)
    assert all("[m2 s-2]" in label for ax in figure.axes[6:] if (label := ax.get_xlabel()))
    assert "2012-09-24 00:00 UTC" in figure.get_suptitle()


def test_the_observations_of_the_time_are_drawn(ensemble: xr.Dataset) -> None:
    obs = xr.Dataset(
        {"z": ("obs", [5.6e4, 5.7e4, np.nan, 5.5e4], {"units": "m2 s-2"})},
        coords={
            "latitude": ("obs", [50.0, 40.0, 30.0, 60.0]),
            "longitude": ("obs", [350.0, 10.0, 0.0, 5.0]),
            "time": ("obs", pd.to_datetime(["2012-09-24T00", "2012-09-24T01", "2012-09-24T00", "2012-09-24T05"])),
        },
    )
    for time, places in ((0, [[-10.0, 50.0], [10.0, 40.0]]), (1, [[5.0, 60.0]])):
        figure = plot_analysis(ensemble.isel(member=0, drop=True), ensemble, obs, time=time)
        assert figure.axes[0].collections[1].get_offsets().tolist() == places
        assert _titles(figure)[0] == f"background and {len(places)} observation{'s' * (len(places) > 1)}"
    grid = ensemble.isel(member=0, drop=True).isel(latitude=[3, 9], longitude=[4, 5, 6])
    figure = plot_analysis(ensemble.isel(member=0, drop=True), ensemble, grid.where(grid.longitude > grid.longitude[0]), time=1)
    assert figure.axes[0].collections[1].get_offsets().tolist() == [
        [x, y] for y in grid.latitude.values for x in grid.longitude.values[1:]
    ]
    np.testing.assert_array_equal(figure.axes[0].collections[1].get_array(), grid.z[1, :, 1:].values.ravel())
    zoned = obs.to_dataframe().assign(time=lambda d: d.time.dt.tz_localize("UTC"))
    figure = plot_analysis(ensemble.isel(member=0, drop=True), ensemble, zoned, time=0)
    assert figure.axes[0].collections[1].get_offsets().tolist() == [[-10.0, 50.0], [10.0, 40.0]]
    with pytest.raises(OptionError, match=r"obs\['z'\] is along 'level' too, .* select one: obs.isel\(level=0\)"):
        plot_analysis(ensemble.isel(member=0, drop=True), ensemble, obs.expand_dims(level=2))
    with pytest.raises(
        OptionError,
        match=r"obs\['z'\] has dimensions \('latitude',\), and its longitude is along 'longitude'; give each value a place",
    ):
        plot_analysis(
            ensemble.isel(member=0, drop=True),
            ensemble,
            grid.isel(time=0).mean("longitude").assign_coords(longitude=grid.longitude),
        )
    table = obs.isel(obs=[0]).to_dataframe().reset_index(drop=True)
    assert _titles(plot_analysis(ensemble.isel(member=0, drop=True), ensemble, table))[0] == "background and 1 observation"


def test_the_axes_count_from_greenwich() -> None:
    truth = demo.withheld_years(every=20)
    figure = plot_analysis(truth, truth.expand_dims(member=[0, 1]))
    assert figure.axes[0].get_xlim()[0] < -134
    assert "2060-06-01" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("change", "keyword", "message"),
    [
        (lambda e: e.isel(member=0), {}, "no member dimension"),
        (lambda e: e, {"variable": "t2m"}, "choose one of 'z'"),
        (lambda e: e, {"member": 5}, "choose one of 0 to 4"),
        (lambda e: e, {"time": 2}, "choose one of 0 to 1"),
        (lambda e: e.isel(latitude=slice(0, 9)), {}, "reference is on the grid 46 x 71.* and ensemble on 9 x 71"),
    ],
)
def test_what_cannot_be_drawn(ensemble: xr.Dataset, change, keyword, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((OptionError, GridError), match=message):
        plot_analysis(ensemble.isel(member=0, drop=True), change(ensemble), **keyword)


def test_without_matplotlib_maps_name_the_extra(ensemble: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'xgenda\[plot\]'"):
        plot_analysis(ensemble.isel(member=0), ensemble)

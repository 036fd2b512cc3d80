"""Videos of series: what is in the file, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot
from matplotlib.image import AxesImage
from PIL import Image

import xgenda
from xgenda.errors import MissingDependencyError, OptionError, OutputExistsError, StateError
from xgenda.plotting import animate


@pytest.fixture(autouse=True)
def _closed() -> None:
    pyplot.close("all")


@pytest.fixture
def run() -> xr.Dataset:
    """A step that moves one column a frame; two members, the second below zero."""
    time = np.datetime64("2020-01-01T00", "ns") + np.arange(4) * np.timedelta64(6, "h")
    step = (np.arange(8) < 2 * np.arange(1, 5)[:, None]).astype(float)[:, None] * np.ones((1, 6, 1))
    return xr.Dataset(
        {"a": (("member", "time", "latitude", "longitude"), np.stack([step, -step]), {"units": "K", "long_name": "a step"})},
        coords={"member": [3, 7], "time": time, "latitude": np.arange(40.0, 46.0), "longitude": np.arange(8.0)},
    )


def frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as video:
        assert video.info["loop"] == 0
        out = []
        for i in range(video.n_frames):
            video.seek(i)
            out.append(np.asarray(video.convert("RGB")).astype(int))
        return out


def test_a_frame_for_each_time(run: xr.Dataset, tmp_path: Path) -> None:
    path = animate(run.isel(member=0), tmp_path / "run.gif", dpi=40, fps=10)
    assert path == tmp_path / "run.gif"
    assert [p.name for p in tmp_path.iterdir()] == ["run.gif"]
    shown = frames(path)
    assert len(shown) == 4
    assert len({f.shape for f in shown}) == 1
    assert shown[0].shape[1] == pytest.approx(4.4 * 40, abs=1)
    with Image.open(path) as video:
        assert video.info["duration"] == 100
    # the step goes on: more and more of the picture has the colour of its high side, and nothing but it and the title changes
    high = shown[-1][len(shown[0]) // 2, shown[0].shape[1] // 2]
    share = [float((np.abs(f - high).sum(-1) < 30).mean()) for f in shown]
    assert share[0] < share[1] < share[2] < share[3]
    assert share[3] == pytest.approx(4 * share[0], rel=0.15)


def test_members_side_by_side_on_one_scale(run: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    subplots = pyplot.subplots

    def keep(*args: object, **options: object) -> object:
        made.append(subplots(*args, **options))
        return made[-1]

    monkeypatch.setattr(pyplot, "subplots", keep)
    shown = frames(animate(run, tmp_path / "both.gif", dpi=40))
    assert shown[0].shape[1] == pytest.approx(2 * 4.4 * 40, abs=1)
    figure = made[0][0]
    panels = figure.axes[:2]
    assert [ax.get_title() for ax in panels] == ["member 3", "member 7"]
    assert {ax.collections[0].get_clim() for ax in panels} == {(-1.0, 1.0)}  # zero in the middle of values to both sides
    assert {ax.collections[0].get_cmap().name for ax in panels} == {"RdBu_r"}
    assert figure.get_suptitle() == "a step, 2020-01-01 18:00 UTC"
    assert not pyplot.get_fignums()
    animate(run, tmp_path / "second.gif", members=[1], dpi=40, limits=(-2, 2), colours="magma", title="mine")
    (axis,) = made[1][0].axes[:1]
    assert axis.get_title() == "member 7"
    assert axis.collections[0].get_clim() == (-2.0, 2.0)
    assert axis.collections[0].get_cmap().name == "magma"
    assert made[1][0].get_suptitle().startswith("mine, ")
    assert not any(isinstance(child, AxesImage) for child in axis.get_children())


def test_chunks_change_nothing(run: xr.Dataset, tmp_path: Path) -> None:
    eager = animate(run, tmp_path / "eager.gif", dpi=40)
    lazy = animate(run.chunk(time=1, member=1), tmp_path / "lazy.gif", dpi=40)
    assert eager.read_bytes() == lazy.read_bytes()


def test_other_grids_and_missing_cells(run: xr.Dataset, tmp_path: Path) -> None:
    rotated = run.isel(member=0).rename(latitude="y", longitude="x").drop_vars(["y", "x"])
    y, x = np.meshgrid(np.arange(6.0), np.arange(8.0), indexing="ij")
    rotated = rotated.assign_coords(
        latitude=(("y", "x"), 40 + y + 0.1 * x, {"standard_name": "latitude"}), longitude=(("y", "x"), x - 0.1 * y, {"standard_name": "longitude"})
    )  # fmt: skip
    masked = rotated.where(rotated.latitude > 41)
    assert len(frames(animate(masked, tmp_path / "rotated.gif", dpi=40))) == 4


def test_what_is_written_is_whole_or_not_there(run: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = animate(run.isel(time=[0]), tmp_path / "run.gif", dpi=40)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        animate(run, path)
    from matplotlib.animation import PillowWriter

    grab, count = PillowWriter.grab_frame, iter(range(9))

    def stop(self: PillowWriter, **options: object) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt
        grab(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PillowWriter, "grab_frame", stop)
        with pytest.raises(KeyboardInterrupt):
            animate(run, path, overwrite=True, dpi=40)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.gif"]
    assert len(frames(animate(run, path, overwrite=True, dpi=40))) == 4


def test_without_ffmpeg(run: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"ffmpeg, which is not found.*conda install.*run\.gif"):
        animate(run, tmp_path / "run.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_mp4(run: xr.Dataset, tmp_path: Path) -> None:
    path = animate(run, tmp_path / "run.mp4", dpi=40)
    assert path.read_bytes()[4:8] == b"ftyp"
    assert [p.name for p in tmp_path.iterdir()] == ["run.mp4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "run.avi"}, r"must end with '\.gif' or '\.mp4'"),
        ({"variable": "b"}, "choose one of 'a'"),
        ({"members": [2]}, "positions of 0 to 1"),
        ({"members": []}, "positions of 0 to 1"),
        ({"members": 0}, "at least 1"),
        ({"limits": (1.0, 1.0)}, "the lowest and the highest"),
        ({"fps": 0}, "fps=0"),
        ({"dpi": True}, "dpi=True"),
        ({"colours": "grey-ish"}, "no colour map"),
        ({"path": "nowhere/run.gif"}, "no folder"),
    ],
)
def test_refusals(run: xr.Dataset, tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = tmp_path / str(options.pop("path", "run.gif"))
    with pytest.raises(OptionError, match=message):
        animate(run, path, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_nothing_to_show(run: xr.Dataset, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no times"):
        animate(run.isel(time=0), tmp_path / "run.gif")
    with pytest.raises(OptionError, match=r"path is a Dataset; give the fields first, then a name: animate\(ds, 'run.gif'\)"):
        animate("run.gif", run)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no dimension of members"):
        animate(run.isel(member=0), tmp_path / "run.gif", members=1)
    with pytest.raises(StateError, match="no finite values"):
        animate(run * np.nan, tmp_path / "run.gif")
    assert not list(tmp_path.iterdir())


def test_dates_of_other_calendars(tmp_path: Path) -> None:
    years = xgenda.tutorial.open_dataset("a1b-north-america").isel(time=slice(0, 2))
    assert len(frames(animate(years, tmp_path / "years.gif", dpi=30))) == 2

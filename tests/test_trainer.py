"""The trainer: averages, batches, interruption and resume, several processes, reports, the command line, fine-tuning, streams."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.diffusion.anchors import LowRank
from xgenda.errors import (
    CheckpointError,
    CoordinateError,
    MissingDependencyError,
    ModelNotFoundError,
    OptionError,
    OutputExistsError,
    StateError,
)
from xgenda.grids import Grid
from xgenda.models.cards import DEFAULTS, model_card
from xgenda.models.generative import GenerativeModel
from xgenda.models.history import plot_history, remarks_of
from xgenda.models.spec import VariableSpec
from xgenda.networks.unet import UNet
from xgenda.training import __main__ as command
from xgenda.training import averaging, journal, loop, optimiser
from xgenda.training.averaging import CHOICES, WIDTHS, PowerAverages, exponent_of, overlap
from xgenda.training.fields import InMemory
from xgenda.training.objectives import Denoising, Draws
from xgenda.training.optimiser import Effort, Optimiser
from xgenda.training.processes import Single
from xgenda.training.reporting import History, Progress, TensorBoard
from xgenda.training.transfer import add_adapters, freeze_backbone, matched, position_on, thawed, transfer


def regimes(count: int = 90, shape: tuple[int, int] = (8, 12), seed: int = 0) -> xr.Dataset:
    """Daily fields of a pattern of amplitude +1 or -1 with some noise: there is something to learn beyond a Gaussian."""
    rng = np.random.default_rng(seed)
    pattern = np.outer(np.sin(np.linspace(0.5, 2.5, shape[0])), np.cos(np.linspace(-1, 1, shape[1])))
    values = rng.choice([-1.0, 1.0], count)[:, None, None] * pattern + 0.1 * rng.standard_normal((count, *shape))
    coords = {
        "time": np.datetime64("2000-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D"),
        "latitude": np.linspace(30, 44, shape[0]),
        "longitude": np.linspace(0, 22, shape[1]),
    }
    return xr.Dataset({"x": (("time", "latitude", "longitude"), values, {"units": "K"})}, coords)


OPTIONS: dict[str, Any] = {
    "anchor": "eof",
    "climatology": "none",
    "steps": 60,
    "width": 8,
    "batch_size": 24,
    "learning_rate": 4e-3,
    "seed": 3,
}


def train(ds: xr.Dataset | None = None, **change: Any) -> GenerativeModel:
    return xgenda.train(regimes() if ds is None else ds, progress=False, **{**OPTIONS, **change})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> GenerativeModel:
    """A training that nobody interrupted."""
    return train(out=tmp_path_factory.mktemp("whole") / "model.safetensors")


def same_bits(a: GenerativeModel, b: GenerativeModel) -> bool:
    one, two = a.tensors(), b.tensors()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# -- averages


@pytest.mark.parametrize("width", CHOICES)
def test_the_width_of_an_average_is_that_of_its_profile(width: float) -> None:
    s = np.linspace(0, 1, 400_001)
    profile = (exponent_of(width) + 1) * s ** exponent_of(width)
    mean = np.trapezoid(profile * s, s)
    assert np.trapezoid(profile, s) == pytest.approx(1, abs=1e-6)
    assert np.sqrt(np.trapezoid(profile * (s - mean) ** 2, s)) == pytest.approx(width, rel=1e-4)


def test_running_averages_are_integrals_over_their_profile() -> None:
    steps, fine = 60, 400
    values = np.sin(np.arange(1, steps + 1) / 7)
    averages = PowerAverages({"w": torch.full((1,), 99.0, dtype=torch.float64)})  # where it starts from does not matter
    for t, v in enumerate(values, 1):
        averages.update({"w": torch.full((1,), float(v), dtype=torch.float64)}, t)
    s = (np.arange(steps * fine) + 0.5) / fine  # w_s lasts from s - 1 to s
    for width, state in zip(WIDTHS, averages.running, strict=True):
        profile = (exponent_of(width) + 1) * s ** exponent_of(width) / steps ** (exponent_of(width) + 1)
        assert float(state["w"]) == pytest.approx(float((profile * np.repeat(values, fine)).sum() / fine), abs=1e-5)


def test_overlaps_are_integrals_of_products() -> None:
    s = np.linspace(0, 50, 1_000_001)

    def profile(g: float, t: float) -> np.ndarray:
        return np.where(s <= t, (g + 1) * s**g / t ** (g + 1), 0.0)

    g, t, h, u = (np.array(a, float) for a in ([6.9, 16.9], [20, 50], [16.9, 3.0, 6.9], [50, 35, 20]))
    exact = [
        [np.trapezoid(profile(a, b) * profile(c, d), s) for c, d in zip(h, u, strict=True)] for a, b in zip(g, t, strict=True)
    ]
    np.testing.assert_allclose(overlap(g, t, h, u), exact, rtol=1e-3)


def test_other_widths_are_reconstructed() -> None:
    rng = torch.Generator().manual_seed(0)
    walk = torch.randn(500, 30, generator=rng, dtype=torch.float64).cumsum(0)  # rougher than any training
    start = {"w": walk[0]}
    kept = PowerAverages(start)
    tracked = {w: PowerAverages(start, (w,)) for w in CHOICES}
    for t in range(1, len(walk)):
        for a in (kept, *tracked.values()):
            a.update({"w": walk[t]}, t)
    for w, a in tracked.items():
        found = kept.of_width(w, len(walk) - 1, kept.running)["w"]
        wanted = a.running[0]["w"]
        apart = float((wanted - walk[-1]).norm())
        assert float((found - wanted).norm()) < (0.02 if w in WIDTHS else 0.15) * apart, w
    _, weights = kept.weights(0.05, len(walk) - 1)
    assert sorted(np.abs(weights))[-1] == pytest.approx(1.0)  # one of those that are kept is itself
    np.testing.assert_allclose(sorted(np.abs(weights))[:-1], 0.0, atol=1e-6)


def test_which_snapshots_there_are_depends_on_the_step_alone() -> None:
    averages = PowerAverages({"w": torch.zeros(1)})
    for t in range(1, 200):
        averages.update({"w": torch.ones(1)}, t)
        assert len(averages.snapshots) <= averaging.SNAPSHOTS
        assert sorted(averages.snapshots) == list(range(averages.every, t + 1, averages.every))
    assert averages.every == 16


def test_networks_too_large_for_snapshots_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "LARGEST", 30)
    averages = PowerAverages({"w": torch.zeros(10)})
    averages.update({"w": torch.ones(10)}, 1)
    assert not averages.snapshots


# -- batches


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_processes_share_what_one_would_draw(parts: int) -> None:
    fields, rows = InMemory(torch.randn(21, 1, 2, 3)), torch.arange(3, 21)
    for step in (0, 1, 7):
        whole = Draws(5, step, 8)
        shares = [Draws(5, step, 8, (k, parts)) for k in range(parts)]
        assert torch.equal(torch.cat([d.integers(48) for d in shares]), whole.integers(48))
        assert torch.equal(torch.cat([d.normal((2, 3)) for d in shares]), whole.normal((2, 3)))
        assert {d.corner((2, 2), (9, 9)) for d in shares} == {whole.corner((2, 2), (9, 9))}
        wanted = next(fields.batches(rows, 8, 5, step))
        found = [next(fields.batches(rows, 8, 5, step, (k, parts))) for k in range(parts)]
        for j in range(2):
            assert torch.equal(torch.cat([f[j] for f in found]), wanted[j])
    assert not torch.equal(Draws(5, 1, 8).normal((2,)), Draws(5, 2, 8).normal((2,)))
    assert not torch.equal(Draws(5, 1, 8).normal((2,)), Draws(6, 1, 8).normal((2,)))


def test_batches_go_through_the_data_from_any_step() -> None:
    fields, rows = InMemory(torch.arange(21.0).reshape(21, 1, 1, 1)), torch.arange(21)
    batches = fields.batches(rows, 8, 0)
    taken = [next(batches)[0] for _ in range(21)]  # eight epochs
    assert all(sorted(torch.cat(taken).tolist()[21 * e : 21 * e + 21]) == list(range(21)) for e in range(8))
    for step in (1, 5, 20):
        assert torch.equal(next(fields.batches(rows, 8, 0, step))[0], taken[step])


def fit(states: torch.Tensor, network: UNet, how: Optimiser, labels: list[str] | None = None, steps: int = 0) -> dict[str, Any]:
    anchors = [LowRank(0.3 * torch.ones(states[0].numel(), 1), torch.ones(states[0].numel())) for _ in range(6)]
    objective = Denoising(states, torch.arange(len(states)) * 6 // len(states), anchors, 0.05, 10.0, feeds_state=True)
    rows = torch.arange(len(states))
    return how.fit(
        network,
        objective,
        rows[: len(states) * 4 // 6],
        rows[len(states) * 4 // 6 : len(states) * 5 // 6],
        1.0,
        "prior",
        None,
        labels,
    )


def small(steps: int, accumulate: int = 1, **change: Any) -> tuple[UNet, Optimiser]:
    torch.manual_seed(0)
    network = UNet(1, 1, width=8, multipliers=(1, 2), position=2, shape=(8, 8))
    torch.nn.init.normal_(network.last.conv.weight, std=0.1)
    options: dict[str, Any] = {"batch_size": 12, "learning_rate": 1e-3, "ema": None, "seed": 0, "progress": False, **change}
    return network, Optimiser(
        Effort(None, steps, None), options.pop("batch_size"), options.pop("learning_rate"), options.pop("ema"), options.pop("seed"),
        options.pop("progress"), Single(torch.device("cpu")), accumulate=accumulate, **options,
    )  # fmt: skip


def test_parts_of_a_batch_give_the_same_weights() -> None:
    states, found = torch.randn(36, 1, 8, 8, generator=torch.Generator().manual_seed(1)), []
    for accumulate in (1, 2, 3):
        network, how = small(4, accumulate)
        before = copy.deepcopy(network.state_dict())
        losses = fit(states, network, how)["history"]["prior"]["loss"]
        found.append(({k: v - before[k] for k, v in network.state_dict().items()}, losses))
    for moved, losses in found[1:]:
        np.testing.assert_allclose(losses, found[0][1], rtol=1e-6)
        for name, tensor in moved.items():
            torch.testing.assert_close(tensor, found[0][0][name], atol=1e-6, rtol=1e-3)


def test_what_stands_around_a_network_in_several_processes_does_not_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DistributedDataParallel does, which passes on calls and nothing else; random tiles need the positions of the network."""

    class Around(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.module = network

        def forward(self, *inputs: Any) -> Any:
            return self.module(*inputs)

    class Wrapping(Single):
        def prepare(self, network: torch.nn.Module) -> torch.nn.Module:
            return Around(network)

    ds, options = regimes(shape=(16, 16)), {"task": "downscale", "factor": 2, "tile": 8, "calibrate": False, "steps": 2}
    plain = train(ds, **options, anchor=None)
    monkeypatch.setattr(loop, "Single", Wrapping)
    assert same_bits(train(ds, **options, anchor=None), plain)


# -- losses that are not finite


def test_a_bad_field_is_named() -> None:
    states = torch.randn(36, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    states[[5, 17]] = torch.nan
    network, how = small(40)
    with pytest.raises(
        StateError,
        match=r"loss of the prior is not finite at step \d, in the batch of the samples (day 5|day 17|day 5, day 17|day 17, day 5)\. Look",
    ):
        fit(states, network, how, [f"day {k}" for k in range(36)])


def test_a_learning_rate_beyond_reason_is_named() -> None:
    with pytest.raises(
        StateError, match=r"not finite at step \d+, in the batch of the samples 2000-.*, \.\.\.\. .*learning_rate=2\.5e\+29"
    ):
        train(learning_rate=1e30, batch_size=9)


# -- interruption


def saving_at(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Save after these steps and no others."""
    count = itertools.count(1)
    patch.setattr(journal.Journal, "due", lambda self: next(count) in steps)


def typed_at(step: int, act: Callable[[], Any]) -> Callable[[Progress], Any]:
    """Return a callback that does something at the first report from `step` on."""
    done: list[int] = []

    def callback(progress: Progress) -> None:
        if progress.step >= step and not done:
            done.append(progress.step)
            act()

    return callback


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Have SIGINT raise, as in a program of its own: processes of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stop() -> None:
    raise KeyboardInterrupt


KILLED = """
import json, os, random, signal, sys, time
import xarray as xr
import xgenda
from xgenda.training import journal

out, options, times = json.loads(sys.argv[1])
journal.SAVE_EVERY, journal.SHARE = 0.0, 0.5
state = os.path.join(out + ".training", "prior.safetensors")
ds, rng, killed = xr.load_dataset(out + ".nc"), random.Random(0), 0
while True:
    before = os.stat(state).st_mtime_ns if os.path.exists(state) else 0
    training = os.fork()
    if not training:
        xgenda.train(ds, out=out + ".safetensors", progress=False, resume=killed > 0, **options)
        os._exit(0)
    if killed < times:
        while not os.path.exists(state) or os.stat(state).st_mtime_ns == before:
            time.sleep(0.001)
            if os.waitpid(training, os.WNOHANG)[0]:
                raise SystemExit("ended before it was killed")
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(training, signal.SIGKILL)
    status = os.waitpid(training, 0)[1]
    if not os.WIFSIGNALED(status):
        raise SystemExit(status)
    killed += 1
    print(killed, flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_costs_nothing(whole: GenerativeModel, tmp_path: Path) -> None:
    regimes().to_netcdf(tmp_path / "killed.nc")
    asked = json.dumps([str(tmp_path / "killed"), OPTIONS, 3])
    done = subprocess.run([sys.executable, "-c", KILLED, asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "2", "3"]
    assert same_bits(xgenda.load_model(tmp_path / "killed.safetensors"), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.nc", "killed.safetensors"]


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_training_goes_on_to_the_same_bits(whole: GenerativeModel, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt) as found:  # by a callback; another time below, by Ctrl-C
        train(out=out, callbacks=[typed_at(20, stop)])
    assert found.value.__notes__ == ["Stopped at step 20. Go on with the same call and resume=True."]
    (tmp_path / "m.training" / ".prior.safetensors.partial-12345").write_bytes(b"half of a state")  # as kill -9 leaves it
    with pytest.raises(
        OutputExistsError, match=r"m\.training holds a training that was interrupted.*resume=True.*overwrite=True"
    ):
        train(out=out)
    with pytest.raises(
        OptionError, match=r"and those of .* differ:\n  seed: 3 then, 4 now\n  steps: 60 then, 61 now\nCall train as"
    ):
        train(out=out, seed=4, steps=61, resume=True)
    with pytest.raises(OptionError, match=r"  ds: the data differ\n"):
        train(regimes(seed=1), out=out, resume=True)
    with pytest.raises(KeyboardInterrupt) as found:
        train(out=out, resume=True, callbacks=[typed_at(40, lambda: signal.raise_signal(signal.SIGINT))])
    assert found.value.__notes__ == ["Stopped at step 40. Go on with the same call and resume=True."]
    assert [p.name for p in (tmp_path / "m.training").iterdir()] == ["prior.safetensors"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    steps: list[int] = []
    again = train(out=out, resume=True, callbacks=[lambda p: steps.append(p.step)])
    assert steps == [60]
    assert same_bits(again, whole)
    assert again.history.step.values.tolist() == whole.history.step.values.tolist() == [20, 40, 60]
    np.testing.assert_array_equal(again.history.validation_loss, whole.history.validation_loss)
    assert not (tmp_path / "m.training").exists()
    # what is finished is not trained again, and not for other data or options
    assert same_bits(train(out=out, resume=True, callbacks=[lambda p: pytest.fail("trained")]), whole)
    with pytest.raises(OptionError, match=r"those of .*m\.safetensors differ:\n  seed: 3 then, 4 now"):
        train(out=out, seed=4, resume=True)


def test_overwrite_starts_again_and_that_can_be_resumed(whole: GenerativeModel, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    train(out=out, steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(out=out, seed=4, overwrite=True, callbacks=[typed_at(20, stop)])
    assert xgenda.load_model(out).spec.training["steps"] == 2  # the old one until there is a new one
    with pytest.raises(KeyboardInterrupt):
        train(out=out, overwrite=True, callbacks=[typed_at(40, stop)])
    assert same_bits(train(out=out, resume=True), whole)  # although the file there was of other options


def test_half_a_step_is_no_state_to_go_on_from(whole: GenerativeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt that cannot wait, between new weights and their average."""
    out, update, at = tmp_path / "m.safetensors", PowerAverages.update, [3]

    def torn(self: PowerAverages, parameters: Any, step: int) -> None:
        if step in at:
            raise KeyboardInterrupt
        update(self, parameters, step)

    with monkeypatch.context() as patch:
        patch.setattr(PowerAverages, "update", torn)
        with pytest.raises(KeyboardInterrupt) as found:
            train(out=out)
        assert found.value.__notes__ == ["Stopped at step 3. Nothing could be saved."]
        saving_at(patch, 25)
        at[0] = 33
        with pytest.raises(KeyboardInterrupt) as found:
            train(out=out)
    assert found.value.__notes__ == [
        "Stopped at step 33. That could not be saved. Go on from an earlier step with the same call and resume=True."
    ]
    assert same_bits(train(out=out, resume=True), whole)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), journal.Interrupts() as interrupts:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it waited")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), journal.Interrupts():
        signal.raise_signal(signal.SIGINT)
    found: list[bool] = []

    def elsewhere() -> None:  # only the first thread can have handlers
        with journal.Interrupts() as interrupts:
            found.append(interrupts.asked)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False]


def test_without_a_file_there_is_nothing_to_resume() -> None:
    with pytest.raises(KeyboardInterrupt) as found:
        train(callbacks=[typed_at(20, stop)])
    assert found.value.__notes__ == ["Stopped at step 20. Training with out='model.safetensors' can be resumed."]


@pytest.fixture
def limit() -> Iterator[Callable[[int | None], None]]:
    """Set the size above which no file grows, as on a disk that is full; None for none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def change(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield change
    change(None)


def test_a_full_disk_stops_nothing(
    whole: GenerativeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: Callable[[int | None], None]
) -> None:
    saving_at(monkeypatch, 10, 30, 31)
    seen: list[int] = []

    def callback(progress: Progress) -> None:
        if progress.step == 20:
            limit(20_000)
        if progress.step == 40:
            limit(None)
            (file,) = (tmp_path / "m.training").iterdir()  # and nothing half written beside it
            found = journal.Journal(file.parent, {}).load("prior")
            assert found is not None
            seen.append(found[1]["step"])
            assert len(found[0]) > 100

    with pytest.warns(
        UserWarning, match=r"could not be saved to .*prior\.safetensors \(.*File too large.*Training goes on; what was"
    ):
        model = train(out=tmp_path / "m.safetensors", callbacks=[callback])
    assert seen == [10]
    assert same_bits(model, whole)


def test_a_state_that_is_no_state(tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(out=out, callbacks=[typed_at(20, stop)])
    state = tmp_path / "m.training" / "prior.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"prior\.safetensors is no state of a training \(.*Start again: overwrite=True"):
        train(out=out, resume=True)
    assert train(out=out, overwrite=True, steps=1).spec.training["steps"] == 1


def test_refused_trainings_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="batch_size=24 cannot be shared by 1 processes in 5 parts each.*multiple of 5: batch_size=25"
    ):
        train(out=tmp_path / "m.safetensors", accumulate=5)
    assert not list(tmp_path.iterdir())


# -- several processes


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command of the documentation."""
    regimes().to_netcdf(tmp_path / "data.nc")
    options = [f"--{k.replace('_', '-')}={v}" for k, v in {**OPTIONS, "steps": 30}.items()]
    arguments = ["-m", "xgenda.training", str(tmp_path / "data.nc"), "--device", "cpu", *options, "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *arguments, str(tmp_path / "two.safetensors")], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained-prior") == 1  # one of them prints
    assert command.main([*arguments[2:], str(tmp_path / "one.safetensors")]) == 0
    one, two = (xgenda.load_model(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(two.tensors()[name], tensor, atol=1e-5, rtol=1e-5)
    assert two.history.step.values.tolist() == [20, 30]
    for name in ("loss", "validation_loss"):
        np.testing.assert_allclose(two.history[name], one.history[name], atol=1e-5)
    assert not list(tmp_path.glob("*.training"))


def test_processes_that_see_different_states_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Single):
        def mean(self, value: float) -> float:
            return value / 2  # of two, of which the other one has found nothing

    out = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(out=out, callbacks=[typed_at(20, stop)])
    monkeypatch.setattr(loop, "Single", Elsewhere)
    with pytest.raises(OptionError, match="different states of the training; all of them must see the folder"):
        train(out=out, resume=True)


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'xgenda\[train\]'"):
        train()


def test_the_precision_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(OptionError, match="mixed_precision='fp16'; use --mixed_precision bf16"):
        train(steps=1)
    found: list[Any] = []
    monkeypatch.setattr(optimiser.Optimiser, "fit", lambda self, *a, **k: found.append(self.dtype) or stop())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(KeyboardInterrupt):
        train(steps=1)
    assert found == [torch.bfloat16]


# -- reports


def test_callbacks_get_reports_in_order_and_can_stop() -> None:
    seen: list[Progress] = []

    def callback(progress: Progress) -> bool:
        seen.append(progress)
        return progress.step >= 40

    model = train(steps=500, callbacks=[callback])
    assert [(p.stage, p.step, p.steps) for p in seen] == [("prior", 20, 500), ("prior", 40, 500)]
    assert 0 < seen[0].seconds < seen[1].seconds
    assert all(0 < p.loss < 3 and 0 < p.validation_loss < 3 and p.samples_per_second > 0 for p in seen)
    assert seen[0].scores.keys() == {"crps_x", "crps_x_gaussian"}
    assert model.spec.training["steps"] == 40
    described = optimiser.described(seen[0])
    assert "samples/s, CRPS of x 0." in described
    assert "(Gaussian 0." in described


def test_tensorboard_gets_scalars(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoard(tmp_path / "runs")
    for step in (20, 40):
        writer(Progress("prior", step, 60, 1.0, 0.9, 0.8 - step / 100, 100.0, {"crps_x": 0.25, "crps_x_gaussian": float("nan")}))
    writer.writer.close()
    events = reading.EventAccumulator(str(tmp_path / "runs")).Reload()
    assert set(events.Tags()["scalars"]) == {"prior/loss", "prior/validation_loss", "prior/samples_per_second", "prior/crps_x"}
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("prior/validation_loss")] == [(20, 0.6), (40, 0.4)]


def test_tensorboard_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'xgenda\[tensorboard\]'"):
        TensorBoard(tmp_path)


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_a_bar_where_it_is_asked_for(progress: bool | None, shown: bool, capfd: pytest.CaptureFixture[str]) -> None:
    xgenda.train(regimes(40), **{**OPTIONS, "steps": 21}, progress=progress)
    text = capfd.readouterr().err
    assert ("training the prior" in text) == shown
    assert ("validation" in text) == shown


def test_small_numbers_are_not_rounded_away() -> None:
    history = History()
    history.add(Progress("prior", 12_345_678, None, 1.0, float("nan"), 0.5, 10.0, {"crps_pr": 1.23456789e-9}))
    assert history.columns["crps_pr"] == [1.234568e-9]
    assert history.columns["step"] == [12_345_678]
    assert history.columns["loss"] == [None]
    history.add(Progress("prior", 12_345_698, None, 2.0, 0.5, 0.5, 10.0))
    assert history.columns["crps_pr"] == [1.234568e-9, None]


def test_the_history_of_a_model(whole: GenerativeModel, tmp_path: Path) -> None:
    history = whole.history
    assert history.sizes == {"step": 3}
    assert set(history.data_vars) == {"loss", "validation_loss", "seconds", "samples_per_second", "crps_x", "crps_x_gaussian"}
    assert all("long_name" in history[n].attrs for n in history.variables)
    history.to_netcdf(tmp_path / "history.nc")
    with xr.open_dataset(tmp_path / "history.nc") as again:
        xr.testing.assert_identical(again.load(), history)
    figure = whole.plot_history()
    figure.savefig(tmp_path / "history.png")
    assert [a.get_title() for a in figure.axes] == ["prior: loss", "x"]
    assert [line.get_label() for line in figure.axes[1].lines] == ["model", "Gaussian"]
    start = whole.spec.training["validation_start"]  # before the first step
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_xdata(), [0, *history.step.values])
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), [start, *history.validation_loss.values])
    assert history.crps_x.attrs["units"] == history.crps_x_gaussian.attrs["units"] == "K"
    assert figure.axes[1].get_ylabel() == "CRPS, validation [K]"
    assert figure.axes[1].get_xlim()[1] >= 60


@pytest.mark.parametrize("start", [None, 0.8001])
def test_the_figure_of_one_step_does_not_make_mountains_of_rounding(start: float | None) -> None:
    column = {"step": [1], "loss": [0.8], "validation_loss": [0.8], "crps_x": [2.0], "crps_x_gaussian": [2.0 + 1e-9]}
    training = {"history": {"prior": column}} | ({} if start is None else {"validation_start": start})
    figure = plot_history("a", training)
    for axis, value in zip(figure.axes, (0.8, 2.0), strict=True):
        low, high = axis.get_ylim()
        assert low < value < high
        assert high - low >= 0.0099 * value
        ticks = np.asarray(axis.get_xticks())
        np.testing.assert_array_equal(ticks, ticks.round())
    assert len(figure.axes[0].lines[1].get_xdata()) == 1 + (start is not None)


def test_a_summary_is_short_and_its_numbers_are_readable(whole: GenerativeModel) -> None:
    training = dict(whole.spec.training)
    assert {"averaging_width", "validation_without", "seconds", "guidance_covariance"} <= set(training)  # kept for who looks
    shown = whole.summary()
    assert not {"averaging_width", "validation_without", "seconds", "guidance_covariance", "marks", "history"} & set(shown)
    assert shown["validation_best"] == f"{training['validation_best']:.4g}"
    assert shown["learning_rate"] == "0.004"
    assert remarks_of({"anchor": "none", "guidance_covariance": "eof", "mean_seconds": 3.0}) == {
        "anchor": "none",
        "guidance_covariance": "eof",
    }


def test_a_card_tells_the_options_that_were_chosen(whole: GenerativeModel) -> None:
    card = model_card(whole)
    options = card[card.index("### Options of training") : card.index("## Scores")]
    rows = dict(re.findall(r"^\| ([a-z].*?) \| (.*) \|$", options, re.MULTILINE))
    chosen = {name: str(value) for name, value in OPTIONS.items() if name not in ("steps", "batch_size", "seed", "learning_rate")}
    assert rows == chosen | {"dtype": "float32"}
    signature = inspect.signature(xgenda.train).parameters
    for name, value in DEFAULTS.items():
        default = signature[name].default
        assert value == (list(default) if isinstance(default, tuple) else default), name


# -- the command line


def test_training_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ds = regimes(60)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part in the Zarr format 3")
        ds.to_zarr(tmp_path / "data.zarr")
        ds.isel(time=slice(0, 30)).to_netcdf(tmp_path / "a.nc")
        ds.isel(time=slice(30, 60)).to_netcdf(tmp_path / "b.nc")
        options = [
            "--anchor=None",
            "--steps=2",
            "--width=8",
            "--progress=False",
            "--validation=2000-02-10/2000-02-20",
            "--name=2024",
        ]
        for k, path in enumerate((tmp_path / "data.zarr", f"{tmp_path}/[ab]*.nc")):
            assert command.main([str(path), *options, "--out", str(tmp_path / f"{k}.safetensors")]) == 0
    text = capsys.readouterr().out
    assert text.count("2024") == 2
    a, b = (xgenda.load_model(tmp_path / f"{k}.safetensors") for k in range(2))
    assert same_bits(a, b)
    assert a.spec.name == "2024"
    assert a.spec.training["anchor"] == "none"
    assert command.main([str(tmp_path / "a.nc"), "--steps=2", "--out", str(tmp_path / "0.safetensors")]) == 1
    assert "exists. Choose another name, or pass --overwrite." in capsys.readouterr().err


def test_wrong_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.nc").write_text("no fields")
    for name in ("text.nc", "missing.nc", "missing.zarr", "*.grib"):
        assert command.main([str(tmp_path / name)]) == 1
        assert "cannot be opened: " in capsys.readouterr().err
    for wrong in (["data.nc", "--stepz=2"], ["data.nc", "--step=2"], []):
        with pytest.raises(SystemExit) as found:
            command.main(wrong)
        assert found.value.code == 2
    capsys.readouterr()

    @functools.wraps(loop.train)
    def interrupted(*_: Any, **__: Any) -> None:
        problem = KeyboardInterrupt()
        problem.add_note("Stopped at step 7. Go on with the same call and resume=True.")
        raise problem

    regimes(30).to_netcdf(tmp_path / "data.nc")
    monkeypatch.setattr(loop, "train", interrupted)
    assert command.main([str(tmp_path / "data.nc")]) == 130
    assert capsys.readouterr().err == "xgenda: Stopped at step 7. Go on with the same command and --resume.\n"


@pytest.mark.parametrize(
    ("arguments", "name", "found"),
    [
        (["--neighbours", "-1,0,1"], "neighbours", (-1, 0, 1)),
        (["--neighbours=-1,0,1"], "neighbours", (-1, 0, 1)),
        (["--seed", "-3", "--steps", "2"], "seed", -3),
        (["--anchor", "none"], "anchor", None),
        (["--climatology", "none"], "climatology", "none"),
        (["--start", "none"], "start", "none"),
        (["--memory", "20"], "memory", "20"),
        (["--bounds", "{'sst': (271, None)}"], "bounds", {"sst": (271, None)}),
        (["--validation", "slice('2008','2009')"], "validation", slice("2008", "2009")),
        (["--validation", 'slice(None, "2009")'], "validation", slice(None, "2009")),
        (["--validation", "2008:2009"], "validation", slice("2008", "2009")),
        (["--validation", "2008-01-01T06:00/2009"], "validation", slice("2008-01-01T06:00", "2009")),
        (["--validation", "2008/"], "validation", slice("2008", None)),
        (["--validation", "0.2"], "validation", 0.2),
        (["--validation", "none"], "validation", None),
    ],
)  # fmt: skip
def test_values_of_the_command(monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str, found: Any) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(loop, "train", functools.wraps(loop.train)(lambda _, **options: given.update(options)))
    monkeypatch.setattr(command, "opened", str)
    assert command.main(["data.nc", *arguments]) == 0
    assert given[name] == found
    assert type(given[name]) is type(found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Go on: resume=True, or again: resume=False, overwrite=True", "Go on: --resume, or again: --no-resume, --overwrite"),
        ("out='a b.nc': pass out='c.nc'.", "--out 'a b.nc': pass --out c.nc."),
        ("bounds='0,4'; give bounds={'t2m': (0, None)}", "--bounds 0,4; give --bounds \"{'t2m': (0, None)}\""),
        ("time_budget=-1.5. Of learning_rate=2e-3.", "--time-budget -1.5. Of --learning-rate 2e-3."),
        ("validation=slice('2010', '2014', None)", "--validation 2010/2014"),
        ("conserve=True has no effect", "--conserve True has no effect"),
        ("type xgenda.train(ds, task='downscale', out='x')", "type xgenda.train(ds, task='downscale', out='x')"),
        ("ds.resample(time='1D') needs window= and sha256='0'", "ds.resample(time='1D') needs --window and sha256='0'"),
    ],
)  # fmt: skip
def test_messages_of_the_command_are_as_typed(text: str, shown: str) -> None:
    assert command.typed(text, inspect.signature(loop.train).parameters) == shown


def test_the_help_of_the_command_describes_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = {text.split()[0].rstrip(","): " ".join(text.split()) for text in re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]}
    for name in inspect.signature(loop.train).parameters:
        if name not in command.NOT_HERE:
            said = re.sub(r"\(default .*|VALUE|--\S+", "", shown[f"--{name.replace('_', '-')}"])
            assert len(said.split()) > 1, name
    assert "Channels of the network at full resolution; by default 16." in shown["--width"]


@pytest.mark.slow
def test_an_error_in_several_processes_is_told_once(tmp_path: Path) -> None:
    regimes(30).to_netcdf(tmp_path / "data.nc")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "xgenda.training"]
    done = subprocess.run(
        [*launch, str(tmp_path / "data.nc"), "--device=cpu", "--bounds", "sst=0,400"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    told = "xgenda: error: --bounds sst=0,400 is not accepted; give a pair per variable: --bounds \"{'t2m': (0, None)}\""
    assert done.stderr.count(told) == 1
    assert told in "\n".join(done.stderr.splitlines()[-3:])  # in the report of the launcher, after its traceback


# -- fine-tuning


def unet(channels: int, condition: int, seed: int, **options: Any) -> UNet:
    torch.manual_seed(seed)
    network = UNet(channels, condition, **{"width": 8, "multipliers": (1, 2), "position": 2, "shape": (8, 8), **options})
    for parameter in network.last.parameters():
        torch.nn.init.normal_(parameter)
    return network.eval()


def test_the_same_variables_keep_every_bit() -> None:
    before, after = unet(2, 2, 0), unet(2, 2, 1)
    names = ["a", "b", ("state", "a"), ("state", "b")]
    report = transfer(after, before, (names, names), (names[:2], names[:2]), before.position)
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in after.state_dict().items())
    assert report["tensors"] == f"{len(after.state_dict())} of {len(after.state_dict())} kept"
    assert (report["new_inputs"], report["new_outputs"], report["position"]) == (0, 0, "kept")


def test_a_new_variable_disturbs_nothing_and_says_nothing() -> None:
    before, after = unet(2, 2, 0), unet(3, 3, 1)
    theirs, ours = ["a", "b"], ["new", "b", "a"]
    inputs = [o for name in (ours, theirs) for o in ([*name, *[("state", v) for v in name]],)]
    report = transfer(after, before, (inputs[0], inputs[1]), (ours, theirs), before.position)
    assert (report["new_inputs"], report["new_outputs"]) == (2, 1)
    x, state, label = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.randn(4)
    with torch.no_grad():
        found = after(x, label, state)
        wanted = before(x[:, [2, 1]], label, state[:, [2, 1]])
    torch.testing.assert_close(found[:, [2, 1]], wanted, atol=1e-5, rtol=1e-5)
    assert not found[:, 0].any()
    loss = (after(x, label, state) - 1).square().mean()
    loss.backward()
    for gradient in (after.last.conv.weight.grad[0], after.first.conv.weight.grad[:, 0]):  # and yet it learns
        assert float(gradient.abs().max()) > 0


def test_positions_on_another_grid() -> None:
    """Bilinear within the old grid, so that planes stay planes; zero where there is none."""
    latitude, longitude = np.linspace(30, 44, 8), np.linspace(350, 371, 8)
    before = unet(1, 1, 0)
    with torch.no_grad():
        before.position[0] = torch.as_tensor(latitude[:, None] + 0 * longitude)
        before.position[1] = torch.as_tensor(longitude + 0 * latitude[:, None])
    old = Grid(latitude, longitude)
    found = position_on(Grid(np.linspace(31, 43, 25), np.linspace(-8, 8, 33)), before, old)
    assert found is not None
    np.testing.assert_allclose(found[0], np.broadcast_to(np.linspace(31, 43, 25)[:, None], (25, 33)), atol=1e-4)
    np.testing.assert_allclose(found[1], np.broadcast_to(np.linspace(352, 368, 33), (25, 33)), atol=1e-4)
    assert position_on(Grid(np.linspace(20, 40, 25), np.linspace(-8, 8, 33)), before, old) is None
    assert torch.equal(position_on(Grid(latitude, longitude), before, old), before.position)


def tuned(change: Callable[[UNet], None]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights of a network before and after some steps of fine-tuning."""
    network, how = small(25)
    before = copy.deepcopy(network.state_dict())
    change(network)
    report = fit(torch.randn(72, 1, 8, 8, generator=torch.Generator().manual_seed(1)), network, how)
    assert report["best_step"] > 0
    thawed(network)
    assert all(p.requires_grad for p in network.parameters())
    return before, network.state_dict()


def test_a_frozen_backbone_stays(whole: GenerativeModel) -> None:
    before, after = tuned(freeze_backbone)
    assert {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])} == {"first", "last", "position"}
    start, model = (network_of(m) for m in (whole, train(regimes(seed=5), start=whole, freeze="backbone", width=None, steps=3)))
    assert all(torch.equal(v, model[k]) for k, v in start.items() if k.split(".")[0] not in ("first", "last", "position"))


def test_adapters_are_of_their_rank_and_end_in_the_weights() -> None:
    before, after = tuned(lambda network: add_adapters(network, 2, 0))
    assert set(before) == set(after)
    ranks = []
    for name, tensor in after.items():
        if name.endswith(".weight") and tensor.ndim > 1 and name.split(".")[0] not in ("first", "last"):
            power = torch.linalg.svdvals((tensor - before[name]).flatten(1).double())
            ranks.append(int((power > 1e-4 * power[0]).sum()))
    assert set(ranks) == {2}
    assert len(ranks) > 10


def network_of(model: GenerativeModel) -> dict[str, torch.Tensor]:
    return model.denoiser.network.state_dict()  # type: ignore[attr-defined,no-any-return]


def test_adapters_are_resumed(whole: GenerativeModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ds": regimes(seed=5), "start": whole, "adapters": 2, "width": None, "steps": 22}
    with pytest.raises(KeyboardInterrupt):
        train(**options, out=tmp_path / "m.safetensors", callbacks=[typed_at(20, stop)])
    assert same_bits(train(**options, out=tmp_path / "m.safetensors", resume=True), train(**options))


def test_variables_are_matched_one_to_one() -> None:
    def specs(**names: str | None) -> list[VariableSpec]:
        return [VariableSpec(n, standard, "K") for n, standard in names.items()]

    air = "air_temperature"
    assert matched(specs(t2m=air, t850=air), specs(t2m=air)) == {"t2m": "t2m"}  # not both
    assert matched(specs(tas=air), specs(t2m=air)) == {"tas": "t2m"}
    assert matched(specs(tas=air, ta=air), specs(t2m=air)) == {}
    assert matched(specs(tas=air), specs(t2m=air, t850=air)) == {}
    assert matched(specs(a=None), specs(b=None)) == {}


def test_another_variable_resolution_and_region(whole: GenerativeModel) -> None:
    finer = regimes(shape=(12, 16), seed=2).assign(y=regimes(shape=(12, 16), seed=3).x)
    record = train(finer, start=whole, width=None, steps=1).spec.training
    assert (record["transfer_new_inputs"], record["transfer_new_outputs"], record["transfer_position"]) == (2, 1, "kept")
    assert "kept, 3 in part" in record["transfer_tensors"]
    away = regimes(seed=2).assign_coords(latitude=regimes().latitude - 60)
    assert train(away, start=whole, width=None, steps=1).spec.training["transfer_position"] == "zero"


# -- streams, and what is withheld


@pytest.mark.parametrize(
    ("memory", "found"), [("500MB", 5e8), ("1.5 GB", 1.5e9), (".5kB", 500.0), (1e16, 1e16), (300, 300.0), (np.inf, np.inf)]
)
def test_memory(memory: str | float, found: float) -> None:
    assert loop.parse_memory(memory) == found


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> xr.Dataset:
    monkeypatch.setenv("XGENDA_CACHE", str(tmp_path / "cache"))
    regimes(400).to_zarr(tmp_path / "data.zarr", consolidated=False)
    return xr.open_zarr(tmp_path / "data.zarr", consolidated=False)


def test_a_stream_is_trained_on_like_fields_in_memory(stored: xr.Dataset) -> None:
    options: dict[str, Any] = {"steps": 40, "anchor": "eof"}
    held, streamed = train(stored, **options), train(stored, **options, memory="100kB")
    assert held.spec.scaling is not None
    assert streamed.spec.scaling is not None
    np.testing.assert_allclose(streamed.spec.scaling.mean, held.spec.scaling.mean, atol=1e-6)
    np.testing.assert_allclose(streamed.spec.scaling.std, held.spec.scaling.std, rtol=1e-6)
    for key in ("samples", "period"):
        assert streamed.spec.training[key] == held.spec.training[key]
    for key in ("validation_start", "validation_best"):  # to the Gaussian, which is fitted to fewer fields
        assert streamed.spec.training[key] == pytest.approx(held.spec.training[key], rel=0.1)
    trajectory = train(stored, **{**options, "steps": 2}, memory="100kB", window=3)
    assert trajectory.window == 3  # type: ignore[attr-defined]


def test_a_stream_is_resumed_as_the_same_stream(stored: xr.Dataset, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(stored, steps=22, memory="100kB", out=out, callbacks=[typed_at(20, stop)])
    with pytest.raises(OptionError, match=r"  memory: 100000\.0 then, None now"):
        train(stored, steps=22, out=out, resume=True)
    assert same_bits(train(stored, steps=22, memory="100kB", out=out, resume=True), train(stored, steps=22, memory="100kB"))


def test_a_stream_is_transformed_as_the_model_that_it_starts_from(stored: xr.Dataset) -> None:
    before = train(np.exp(regimes()).assign_attrs(units="K"), transform="log", steps=1)
    with pytest.raises(OptionError, match=r"of other transforms, .* transform=\{'x': 'log'\}"):
        train(np.exp(stored), start=before, width=None, steps=1, memory="100kB")


def held_of(**options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that are trained on and those that are withheld."""
    found: list[Any] = []

    class Found(Exception):
        pass

    def fit(self: Optimiser, network: Any, objective: Any, rows: Any, held: Any, *more: Any) -> None:
        found.extend([rows.numpy(), held.numpy()])
        raise Found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimiser, "fit", fit)
        with pytest.raises(Found):
            train(**options)
    return found[0], found[1]


def test_what_is_withheld_is_not_trained_on() -> None:
    ds = regimes(120)
    slow = np.cumsum(np.random.default_rng(0).standard_normal((120, 1, 1)), 0) / 3
    ds = ds + slow - slow.mean()  # states that remember each other, so that there is a gap
    for validation, wanted in ((0.2, np.arange(96, 120)), (slice("2000-02-01", "2000-02-20"), np.arange(31, 51))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", xgenda.errors.LittleDataWarning)
            rows, held = held_of(ds=ds, validation=validation)
        np.testing.assert_array_equal(held, wanted)
        distance = np.abs(rows[:, None] - held).min(1)
        assert distance.min() > 1
        assert len(rows) == 120 - len(held) - (distance.min() - 1) * (1 if held[-1] == 119 else 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"freeze": "backbone"}, OptionError, r"freeze='backbone' belongs to fine-tuning; pass the model to start from: start='name'"),
        ({"freeze": "all"}, OptionError, r"freeze='all' is not accepted.*none.*backbone"),
        ({"adapters": 4}, OptionError, r"adapters=4 belongs to fine-tuning"),
        ({"adapters": 0}, OptionError, r"adapters=0 is not accepted"),
        ({"augment": "flip"}, OptionError, r"augment='flip' is not accepted.*longitude"),
        ({"augment": "longitude"}, OptionError, r"augment='longitude' shifts fields around the sphere, and the grid is .*leave it out"),
        ({"validation": 0.9}, OptionError, r"validation=0.9 is not accepted; give a part of the times, the last ones, below 0.8"),
        ({"validation": True}, OptionError, r"validation=True is not accepted"),
        ({"validation": "2010"}, OptionError, r"validation='2010' is not accepted.*slice\('2010', '2014'\)"),
        ({"validation": slice("1950", "1960")}, OptionError, r"withholds 0 of 90 samples; at least 5 must be"),
        ({"validation": 0.03}, OptionError, r"withholds 3 of 90 samples; at least 5 must be.* validation=0.2"),
        ({"ds": regimes(20), "validation": 0.2}, OptionError, r"withholds 4 of 20 samples; .* validation=0.25"),
        ({"validation": slice("1950", None)}, OptionError, r"withholds 90 of 90 samples; at least 5 must be, and a fifth must be left"),
        ({"validation": slice("spring", "summer")}, OptionError, r"validation=slice\('spring', 'summer', None\)"),
        ({"validation": slice(0, 10)}, OptionError, r"validation=slice\(0, 10, None\)"),
        ({"accumulate": 0}, OptionError, r"accumulate=0 is not accepted"),
        ({"resume": "yes"}, OptionError, r"resume='yes' is not accepted"),
        ({"resume": True}, OptionError, r"resume=True needs the file of the model.*out='model.safetensors'"),
        ({"memory": "much"}, OptionError, r"memory='much' is not accepted; give bytes or a text such as '500MB' or '2GB'"),
        ({"memory": "20"}, OptionError, r"memory='20' is not accepted; .*'2GB', with its unit"),
        ({"memory": "0GB"}, OptionError, r"memory='0GB' is not accepted"),
        ({"memory": -5}, OptionError, r"memory=-5 is not accepted"),
        ({"memory": True}, OptionError, r"memory=True is not accepted"),
        ({"callbacks": print}, OptionError, r"callbacks=.* is not accepted; give a list of functions: callbacks=\[print\]"),
        ({"callbacks": ["print"]}, OptionError, r"callbacks=\['print'\] is not accepted"),
        ({"ema": 0.5}, OptionError, r"ema=0.5 is not accepted; it must be a positive number below 0.3: the part of training"),
        ({"ema": 0}, OptionError, r"ema=0 is not accepted"),
        ({"ema": "wide"}, OptionError, r"ema='wide' is not accepted"),
        ({"task": "downscale", "factor": 2, "augment": "longitude"}, OptionError, r"augment='longitude' belongs to task='prior'"),
        ({"start": "no-such-model"}, Exception, r"no-such-model"),
        ({"start": "no/such.safetensors"}, ModelNotFoundError, r"^start='no/such.safetensors': .* does not exist"),
        ({"start": "t2m-north-america.safetensors"}, ModelNotFoundError, r"^start=.*Did you mean 't2m-north-america'\?"),
        ({"start": "t2m-north-america", "adapters": 64}, OptionError, r"adapters=64 .*'t2m-north-america' is 16 channels wide; .* 1 to 16"),
        ({"transform": {"x": "sqrt"}}, OptionError, r"transform='sqrt' is not accepted"),
        ({"offset": "0.1"}, OptionError, r"offset='0.1' is not accepted; give a number"),
        ({"bounds": "x=0,400"}, OptionError, r"bounds='x=0,400' is not accepted; give a pair per variable"),
        ({"bounds": {"x": "0,400"}, "task": "downscale", "factor": 2}, OptionError, r"bounds of 'x' are '0,400'; a lowest and a highest"),
        ({"ds": "x.nc"}, OptionError, r"ds='x.nc' is a path.*Open it: xr.open_dataset\('x.nc'\)"),
        ({"ds": Path("a/x.zarr")}, OptionError, r"Open it: xr.open_zarr\('a/x.zarr'\)"),
        ({"ds": regimes(60).rename(time="t").drop_vars("t")}, CoordinateError, r"dimension 't' of size 60; .*ds.rename\({'t': 'time'}\)"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train(**options)


def test_bad_options_of_fine_tuning(whole: GenerativeModel) -> None:
    other = regimes().rename(x="y")
    for options, message in (
        ({"freeze": "backbone", "adapters": 2}, r"freeze='backbone' and adapters=2 exclude each other"),
        ({"width": 16}, r"width=16 has no effect with start"),
        ({"ds": other}, r"has the variables \['x'\], and ds has \['y'\]: none in common\. Leave out start.*rename\({'y': 'x'}\)"),
    ):
        with pytest.raises(OptionError, match=message):
            train(**{"start": whole, "width": None, "steps": 1, **options})

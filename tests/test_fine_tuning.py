"""Fine-tuning of downscalers: what their networks keep of another model, with other variables, inputs, resolution or region."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.errors import OptionError
from xgenda.models import means
from xgenda.models.corrective import CorrectiveModel
from xgenda.models.diffusive import build_network
from xgenda.models.spec import VariableSpec
from xgenda.training.comparing import Withheld
from xgenda.training.pairs import read_pairs
from xgenda.training.standardising import Prepared, prepare_pairs
from xgenda.training.transfer import matched
from xgenda.training.tuning import Inheritance
from xgenda.training.windows import near_blocks

QUICK: dict[str, Any] = {"task": "downscale", "steps": 2, "progress": False, "calibrate": False}


def fields(ny: int = 16, nx: int = 24, n: int = 48, seed: int = 0, south: float = 40.0, step: float = 0.25) -> xr.Dataset:
    """Return fine temperature and humidity, every six hours, half of whose small structure depends on the large one."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, ny), np.linspace(0, 1, nx), indexing="ij")
    waves = np.stack([np.cos(np.pi * (j * y + k * x)) for j, k in itertools.product(range(2), range(2))])
    large = np.tensordot(rng.normal(size=(n, 4)), waves, 1)
    small = np.sin(40 * x) * np.cos(30 * y)
    values = {
        "t2m": (280 + 3 * large + 0.5 * np.abs(large) * small, "K", "air_temperature"),
        "q": (5 + 0.5 * np.roll(large, 1, 0) + 0.2 * rng.normal(size=large.shape), "g kg-1", "specific_humidity"),
    }
    return xr.Dataset(
        {
            k: (("time", "latitude", "longitude"), v, {"units": units, "standard_name": standard})
            for k, (v, units, standard) in values.items()
        },
        coords={
            "time": np.datetime64("2020-01-01", "ns") + np.arange(n) * np.timedelta64(6, "h"),
            "latitude": south + step * np.arange(ny), "longitude": 5.5 + step * np.arange(nx),
        },
    )  # fmt: skip


def coarse_of(fine: xr.Dataset) -> xr.Dataset:
    return fine.coarsen(latitude=4, longitude=4).mean()


def ground(fine: xr.Dataset, *names: str) -> xr.Dataset:
    """Return fields that never change."""
    rng = np.random.default_rng(len(names))
    shape = fine.sizes["latitude"], fine.sizes["longitude"]
    coords = {k: fine[k] for k in ("latitude", "longitude")}
    return xr.Dataset({n: (("latitude", "longitude"), rng.normal(size=shape)) for n in names}, coords=coords)


@pytest.fixture(scope="module")
def fine() -> xr.Dataset:
    return fields()


@pytest.fixture(scope="module")
def before(fine: xr.Dataset) -> CorrectiveModel:
    """A downscaler of temperature from both variables at two times and a static field, all of whose weights are of order one."""
    model = xgenda.train(
        coarse_of(fine), target=fine[["t2m"]], statics=ground(fine, "orog"), neighbours=(-1, 0), width=8, anchor=None, **QUICK
    )
    assert isinstance(model, CorrectiveModel)
    return with_weights(model)


def with_weights(model: CorrectiveModel) -> CorrectiveModel:
    """Return the model with random networks for mean and residual."""
    options = dict(model.spec.options)
    if options["regression"] is None:
        given = model.features.channels + (0 if model.mean.is_zero else model.spec.channels)
        options["regression"] = {**options["network"], "condition_channels": given}
    torch.manual_seed(0)
    networks = [build_network(options[k]) for k in ("regression", "network")]
    for network in networks:
        for parameter in network.last.conv.parameters():  # type: ignore[union-attr]
            torch.nn.init.normal_(parameter, std=0.1)
    denoiser = model.denoiser
    denoiser.network = networks[1]
    return CorrectiveModel(
        dataclasses.replace(model.spec, options=options), model.mean, networks[0], model.spread, denoiser, model.statics
    )


def prepared(coarse: xr.Dataset, fine: xr.Dataset, statics: xr.Dataset | None, neighbours: Sequence[int]) -> Prepared:
    pairs = read_pairs(coarse, fine, None, variables=None, statics=statics, offsets=neighbours, lead_time=False)
    return prepare_pairs(pairs, "none", "none", 1e-3, None, "hour", "x", "diffusion", "none")


def answers(network: torch.nn.Module, ready: Prepared, mean: torch.Tensor, stage: str) -> torch.Tensor:
    """Return what a network says to the same mean and state, and to its own inputs, at three times."""
    given = ready.features.of(ready.interpolated, ready.planes, ready.features.everywhere())[:3]
    condition = torch.cat([given, mean] if stage == "mean" else [mean, given], 1)
    with torch.no_grad():
        out: torch.Tensor = network(mean.flip(0), torch.linspace(-1, 1, 3), condition)
    return out


def inherited(
    before: CorrectiveModel, ready: Prepared, stage: str, **options: Any
) -> tuple[torch.nn.Module, torch.nn.Module, Inheritance]:
    """Return the network of the model, a new one for other pairs with its weights, and what was recorded."""
    own = before.regression if stage == "mean" else before.denoiser.network
    assert own is not None
    channels = ready.shape[0]
    arguments = {
        **before.spec.options["network"], "channels": channels, "condition_channels": channels + ready.features.channels,
        "shape": list(ready.shape[1:]),
    }  # fmt: skip
    network = build_network(arguments)
    found = Inheritance(before, ready, options.get("freeze", "none"), options.get("adapters"), 0)
    assert found.give(stage, network, mean=True)
    return own, network, found


@pytest.mark.parametrize("stage", ["mean", "residual"])
def test_the_same_channels_give_the_same_output_to_the_bit(before: CorrectiveModel, fine: xr.Dataset, stage: str) -> None:
    ready = prepared(coarse_of(fine), fine[["t2m"]], ground(fine, "orog"), (-1, 0))
    own, network, found = inherited(before, ready, stage)
    mean = torch.randn(3, 1, 16, 24)
    assert torch.equal(answers(own, ready, mean, stage), answers(network, ready, mean, stage))
    assert (found.record[f"transfer_{stage}_new_inputs"], found.record[f"transfer_{stage}_position"]) == (0, "kept")
    assert float(answers(own, ready, mean, stage).std()) > 0.1  # there was something to keep


@pytest.mark.parametrize("stage", ["mean", "residual"])
def test_reordered_and_new_inputs_change_nothing_at_first(before: CorrectiveModel, fine: xr.Dataset, stage: str) -> None:
    coarse = coarse_of(fine)
    target = fine[["t2m"]].isel(time=slice(1, -1))  # all of whose times have their neighbours in both cases
    theirs = prepared(coarse, target, ground(fine, "orog"), (-1, 0))
    more = coarse[["q", "t2m"]].rename(t2m="tas").assign(wind=coarse.q.reset_coords(drop=True) ** 2)
    more["wind"].attrs = {"units": "m s-1"}
    statics = ground(fine, "orog").assign(mask=ground(fine, "a", "b").b)[["mask", "orog"]]
    ours = prepared(more, target.rename(t2m="tas"), statics, (1, 0, -1))
    own, network, found = inherited(before, ours, stage)
    mean = torch.randn(3, 1, 16, 24)
    torch.testing.assert_close(answers(network, ours, mean, stage), answers(own, theirs, mean, stage), rtol=1e-5, atol=1e-5)
    # wind at three times, two variables an hour later, the mask
    assert found.record[f"transfer_{stage}_new_inputs"] == 3 + 2 + 1
    assert "dropped_inputs" not in found.record


def test_a_new_static_changes_nothing_to_the_bit(before: CorrectiveModel, fine: xr.Dataset) -> None:
    theirs = prepared(coarse_of(fine), fine[["t2m"]], ground(fine, "orog"), (-1, 0))
    statics = ground(fine, "orog").assign(mask=ground(fine, "a", "b").b)
    ours = prepared(coarse_of(fine), fine[["t2m"]], statics, (-1, 0))
    own, network, _ = inherited(before, ours, "residual")
    mean = torch.randn(3, 1, 16, 24)
    torch.testing.assert_close(
        answers(network, ours, mean, "residual"), answers(own, theirs, mean, "residual"), rtol=1e-5, atol=1e-5
    )


def test_what_is_no_longer_given_is_said(before: CorrectiveModel, fine: xr.Dataset) -> None:
    with pytest.warns(UserWarning, match=r"sees q, t2m -6 h, q -6 h, orog, not given here: what it learned of them is lost"):
        model = xgenda.train(coarse_of(fine[["t2m"]]), target=fine[["t2m"]], start=before, **QUICK)
    assert model.spec.training["dropped_inputs"] == "q, t2m -6 h, q -6 h, orog"
    assert model.spec.inputs is not None
    assert model.spec.inputs.cycle == "hour"


@pytest.mark.filterwarnings("ignore:1 of 3 times have no neighbours")
def test_another_variable_resolution_and_region(before: CorrectiveModel, fine: xr.Dataset, tmp_path: Any) -> None:
    """Finer cells inside the old region interpolate what the network knows of places; elsewhere it knows nothing of them."""
    path = before.save(tmp_path / "before.safetensors")
    inside, apart = fields(12, 16, seed=1, south=40.5, step=0.125), fields(12, 16, seed=1, south=-30.0)
    for ds, place in ((inside, "kept"), (apart, "zero")):
        model = xgenda.train(
            coarse_of(ds), target=ds, start=path, statics=ground(ds, "orog"), neighbours=(-1, 0), out=tmp_path / f"{place}.safetensors",
            **QUICK,
        )  # fmt: skip
        record = model.spec.training
        assert record["started_from"].startswith("trained-downscaler (")
        assert model.spec.name == "trained-downscaler-tuned"
        assert record["transfer_residual_position"] == record["transfer_mean_position"] == place
        # the state and the mean of humidity are new, and its part of the result
        assert (record["transfer_residual_new_inputs"], record["transfer_residual_new_outputs"]) == (2, 1)
        assert record["learning_rate"] == 1e-3
        again = xgenda.load_model(tmp_path / f"{place}.safetensors")
        found = coarse_of(ds).isel(time=slice(1, 4)).genda.downscale(model=again, members=2, steps=3, seed=0)
        assert dict(found.sizes) == {"member": 2, "time": 2, "latitude": 12, "longitude": 16}


def test_the_linear_mean_is_kept_where_it_is_better(fine: xr.Dataset) -> None:
    """Trained on many times, it predicts a few others better than what can be fitted to these."""
    many = fields(n=200)
    model = xgenda.train(many[["t2m"]].isel(time=slice(24, None)), factor=4, width=8, anchor=None, **QUICK)
    few = many[["t2m"]].isel(time=slice(0, 24))
    tuned = xgenda.train(few, factor=4, start=model, **QUICK)
    assert isinstance(model, CorrectiveModel)
    assert isinstance(tuned, CorrectiveModel)
    assert tuned.spec.training["linear_mean"].startswith("that of 'trained-downscaler': ")
    for name, tensor in model.mean.tensors().items():
        assert torch.equal(tensor, tuned.mean.tensors()[name]), name
    np.testing.assert_array_equal(tuned.scaling.std, model.scaling.std)
    np.testing.assert_array_equal(tuned.scaling.mean, model.scaling.mean)
    seen = xgenda.train(many[["t2m"]].isel(time=slice(24, 48)), factor=4, start=model, **QUICK)  # whose errors are too small
    assert not seen.spec.training["linear_mean"].startswith("that of")
    other = few * 1.0 + 20 * ground(few, "x").x  # of another climate: it has no use for the old mean
    other["t2m"].attrs = few["t2m"].attrs
    refitted = xgenda.train(other, factor=4, start=model, **QUICK)
    assert not refitted.spec.training["linear_mean"].startswith("that of")


@pytest.mark.parametrize("option", [{"freeze": "backbone"}, {"adapters": 2}], ids=["frozen", "adapters"])
def test_only_what_was_asked_for_is_trained(before: CorrectiveModel, fine: xr.Dataset, option: dict[str, Any]) -> None:
    model = xgenda.train(
        coarse_of(fine), target=fine[["t2m"]], start=before, statics=ground(fine, "orog"), neighbours=(-1, 0), learning_rate=1e-2,
        **{**QUICK, "steps": 25}, **option,
    )  # fmt: skip
    assert isinstance(model, CorrectiveModel)
    old, new = before.denoiser.network.state_dict(), model.denoiser.network.state_dict()
    assert old.keys() == new.keys()  # adapters are in the weights
    changed = {k.split(".")[0] for k in old if not torch.equal(old[k], new[k])}
    assert "first" in changed
    if "freeze" in option:
        assert changed <= {"first", "last", "position"}
    else:
        update = (new["middle.conv1.conv.weight"] - old["middle.conv1.conv.weight"]).flatten(1)
        values = torch.linalg.svdvals(update)
        assert values[0] > 0
        assert values[2] < 1e-4 * values[0]  # of rank 2


def test_the_classical_start_is_reached_again(before: CorrectiveModel, fine: xr.Dataset) -> None:
    """Networks of noise are worth nothing: they get the weight that they deserve even where training does not better them."""
    model = xgenda.train(
        coarse_of(fine),
        target=fine[["t2m"]],
        start=before,
        statics=ground(fine, "orog"),
        neighbours=(-1, 0),
        learning_rate=1e-12,
        **QUICK,
    )
    record = model.spec.training
    assert record["correction_weight"] < 0.2
    assert record["validation_best"] < 1.1 < record["validation_start"]


def test_transforms_of_the_model_are_those_of_its_variables() -> None:
    ds = fields()
    ds["rain"] = np.exp(ds.q - 5).assign_attrs(units="mm", standard_name="precipitation_amount")
    model = xgenda.train(ds[["rain"]], factor=4, width=8, transform="log", offset=0.1, anchor=None, **QUICK)
    metres = ds[["rain"]].rename(rain="pr") / 1000
    metres["pr"].attrs = {"units": "m", "standard_name": "precipitation_amount"}
    tuned = xgenda.train(metres, factor=4, start=model, **QUICK)
    assert tuned.spec.scaling is not None
    assert tuned.spec.scaling.transforms == ("log",)
    assert tuned.spec.scaling.offsets == pytest.approx((1e-4,))


def test_standard_names_match_only_where_they_tell_one_variable() -> None:
    def named(*names: str) -> list[VariableSpec]:
        return [VariableSpec(n, "air_temperature" if n.startswith("t") else None, "K") for n in names]

    assert matched(named("tas", "q"), named("t2m", "q")) == {"tas": "t2m", "q": "q"}
    assert matched(named("t850", "t500"), named("t2m")) == {}
    assert matched(named("tas"), named("t850", "t500")) == {}
    assert matched(named("t2m", "tas"), named("t2m")) == {"t2m": "t2m"}
    assert matched(named("x"), named("y")) == {}


def test_wrong_starts_are_refused(before: CorrectiveModel, fine: xr.Dataset, tiny_prior: xgenda.GenerativeModel) -> None:
    coarse, target = coarse_of(fine), fine[["t2m"]]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"start": tiny_prior}, "is a diffusion model for 'prior'; a diffusion model for downscaling is needed"),
        ({"method": "ridge"}, "start has no effect with method='ridge'"),
        ({"width": 16}, "width=16 has no effect with start, whose network is kept"),
        ({"anchor": "eof"}, "anchor='eof' does not go with start='trained-downscaler', whose network was trained without one"),
        ({"architecture": "songunet"}, "architecture='songunet' has no effect with start"),
        ({"target": fine[["t2m"]].rename(t2m="x").drop_attrs()}, "none in common"),
    ]
    for change, message in bad:
        with pytest.raises(OptionError, match=message):
            xgenda.train(coarse, **{"target": target, "start": before, **QUICK, **change})
    with pytest.raises(OptionError, match="is a model for downscaling; pass task='downscale' too"):
        xgenda.train(fine, start=before, progress=False)
    anchored = xgenda.train(target, factor=4, width=8, anchor="eof", **QUICK)
    with pytest.raises(OptionError, match="corrects a Gaussian of the whole grid, and tile="):
        xgenda.train(target, factor=4, start=anchored, tile=8, **QUICK)


def test_songunets_need_the_same_channels(fine: xr.Dataset) -> None:
    target = fine[["t2m"]]
    model = xgenda.train(target, factor=4, width=8, architecture="songunet", stages="residual", anchor=None, **QUICK)
    again = xgenda.train(target, factor=4, start=model, stages="residual", **QUICK)
    assert again.spec.training["transfer_residual_new_inputs"] == 0
    assert again.spec.options["network"] == model.spec.options["network"]
    with pytest.raises(OptionError, match="its network is a 'songunet', whose channels cannot be exchanged"):
        xgenda.train(fine, factor=4, start=model, stages="residual", **QUICK)


@pytest.mark.parametrize("asked", [0.25, slice("2020-01-10", None)], ids=["part", "slice"])
def test_downscalers_withhold_what_was_asked_for(fine: xr.Dataset, asked: Any) -> None:
    """Fields of the withheld times cannot change what was trained: only choices among weights see them."""
    pairs = read_pairs(fine, None, 4, variables=["t2m"], statics=None, offsets=(0,), lead_time=False)
    ready = prepare_pairs(pairs, "none", "none", 1e-3, None, "none", "x", "diffusion", "none", validation=asked)
    rows, held = ready.split()
    times = pairs.fine.time
    assert times is not None
    first = np.datetime64("2020-01-10") if isinstance(asked, slice) else times.values[36]
    assert set(held.tolist()) == set(np.flatnonzero(times.values >= first).tolist())
    assert int(rows.max()) < int(held.min())
    model = xgenda.train(fine[["t2m"]], factor=4, width=8, validation=asked, anchor=None, **QUICK)
    assert model.spec.training["samples"] == "48 along time"


def test_predictions_of_a_block_are_fitted_away_from_it() -> None:
    """What is near to a block in time has no part in the linear map that predicts it."""
    rng = np.random.default_rng(0)
    time = xr.DataArray(np.arange(60), dims="time")
    fold = np.repeat(np.arange(6), 10)
    near = near_blocks(fold, time, 3)
    assert near.sum(1).tolist() == [3, 6, 6, 6, 6, 3]
    coarse, y = torch.as_tensor(rng.normal(size=(60, 2, 4))), torch.as_tensor(rng.normal(size=(60, 1, 4, 4)))
    interpolated = torch.as_tensor(rng.normal(size=(60, 2, 4, 4))).float()

    def crossed(fine: torch.Tensor) -> torch.Tensor:
        pairs = means.Pairs(coarse, interpolated, fine, fold, [None], near=near)
        return torch.stack([found for _, found, _ in means._local(pairs)])  # of each penalty

    changed = y.clone()
    changed[7:10] += 100.0
    changed[20:23] += 100.0
    a, b = crossed(y), crossed(changed)
    assert torch.equal(a[:, 10:20], b[:, 10:20])
    assert not torch.equal(a[:, 30:40], b[:, 30:40])


def test_members_are_scored_in_training_beside_the_linear_mean(fine: xr.Dataset) -> None:
    """Without a linear mean and a Gaussian that is the mean absolute anomaly at six withheld times."""
    seen: list[dict[str, float]] = []
    xgenda.train(
        fine, factor=4, stages="single", anchor=None, conserve=False, width=8, callbacks=[lambda p: seen.append(dict(p.scores))],
        **{**QUICK, "steps": 25},
    )  # fmt: skip
    times = np.linspace(32, 39, 6).round().astype(int)  # the fifth of six blocks
    for name in ("t2m", "q"):
        anomaly = fine[name] - fine[name].mean("time")
        assert seen[0][f"crps_{name}_linear"] == pytest.approx(float(abs(anomaly[times]).mean()), rel=1e-5)
        assert 0 < seen[0][f"crps_{name}"] < 10 * seen[0][f"crps_{name}_linear"]


def test_a_network_of_noise_is_found_worse_than_none(fine: xr.Dataset) -> None:
    kept: list[Withheld] = []

    class Kept(Withheld):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xgenda.training.downscalers.Withheld", Kept)
        model = xgenda.train(fine[["t2m"]], factor=4, anchor="eof", width=8, **QUICK)
    assert isinstance(model, CorrectiveModel)
    network = model.denoiser.network
    network.scale_output(0.0)
    same = kept[0].compare(network)
    assert torch.equal(same.model, same.gaussian)
    assert same.gain == 0.0
    torch.manual_seed(0)
    for parameter in network.last.conv.parameters():
        torch.nn.init.normal_(parameter)
    assert kept[0].compare(network).worse


def test_a_correction_that_makes_members_worse_is_left_out(fine: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgenda.training.scoring.Comparison.worse", True)
    model = xgenda.train(fine[["t2m"]], factor=4, anchor="eof", width=8, learning_rate=1e-2, **{**QUICK, "steps": 60})
    assert isinstance(model, CorrectiveModel)
    record = model.spec.training
    assert record["best_step"] > 0  # by the loss of denoising it had learned something
    assert record["correction_weight"] == 0.0
    mean, _, residual = record["card"].partition("; residual: ")
    assert ("its weight is zero, and this is the linear mean" in mean) == (model.regression is None)
    assert residual == "the learned correction did not make the members better: its weight is zero, and this is a Gaussian"
    assert record["scores"].startswith("CRPS of withheld states: t2m ")
    assert " K; gain" in record["scores"]
    assert record["validation_best"] == record["validation_without"] == pytest.approx(record["validation_start"])
    assert float(model.denoiser.network.last.conv.weight.abs().max()) == 0.0


@pytest.mark.slow
def test_fine_tuning_takes_a_fifth_of_the_steps() -> None:
    """Structure that depends on the sign of the coarse field, beyond any linear map, in another climate of fewer samples."""

    def climate(n: int, amplitude: float, seed: int) -> xr.Dataset:
        rng = np.random.default_rng(seed)
        coarse = amplitude * rng.standard_normal((n, 2, 2))
        fine = np.repeat(np.repeat(coarse, 4, 1), 4, 2)
        values = fine + np.abs(fine) * np.tile([[1.0, -1.0], [-1.0, 1.0]], (4, 4)) + 0.05 * rng.standard_normal((n, 8, 8))
        axis = np.linspace(0, 35, 8)
        return xr.Dataset({"x": (("member", "latitude", "longitude"), values)}, coords={"latitude": axis, "longitude": axis})

    options: dict[str, Any] = {**QUICK, "factor": 4, "anchor": None, "conserve": False}
    before = xgenda.train(climate(200, 1.0, 0), width=8, learning_rate=5e-3, **{**options, "steps": 400})
    few = climate(60, 2.0, 1)
    tuned = xgenda.train(few, start=before, learning_rate=5e-3, **{**options, "steps": 60}).spec.training
    scratch = xgenda.train(few, width=8, learning_rate=5e-3, **{**options, "steps": 300}).spec.training
    assert tuned["transfer_mean_new_inputs"] == 0
    assert tuned["mean_validation_best"] < scratch["mean_validation_best"] < 0.9

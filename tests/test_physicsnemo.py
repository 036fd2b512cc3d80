"""Networks of published CorrDiff models: the same function, and files that are read without trusting them."""

from __future__ import annotations

import io
import itertools
import json
import pickle  # noqa: TID251  (to see it refused)
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.errors import CheckpointError, GridError, OptionError, OutputExistsError
from xgenda.models.physicsnemo import Preconditioned, read_mdlus, write_mdlus
from xgenda.networks.songunet import Attention, GroupNorm, Resampled, SongUNet, drop, positional_channels
from xgenda.networks.unet import UNet

FILE = Path(__file__).parent / "data" / "corrdiff" / "diffusion_hr_mean.mdlus"


@pytest.fixture(scope="module")
def members() -> dict[str, bytes]:
    with zipfile.ZipFile(FILE) as archive:
        return {n: archive.read(n) for n in archive.namelist()}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    with np.load(FILE.with_suffix(".npz"), allow_pickle=False) as data:  # noqa: TID251
        return {k: torch.as_tensor(data[k]) for k in data}


def pack(path: Path, members: dict[str, bytes], kind: str = "zip") -> Path:
    if kind == "tar":
        with tarfile.open(path, "w:") as tar:
            for name, content in reversed(members.items()):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return path
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_published_network_is_the_same_function(
    kind: str, members: dict[str, bytes], reference: dict[str, Any], tmp_path: Path
) -> None:
    net = read_mdlus(pack(tmp_path / "net.mdlus", members, kind))
    condition = torch.cat([reference["mean_hr"], reference["img_lr"]], 1)
    for sigma in (0.05, 3.0):
        expected = reference[f"D_sigma_{sigma}"]
        found = net(sigma * reference["x_unit"], condition, sigma)
        assert float((found - expected).abs().max() / expected.std()) < 1e-5


def test_its_samples_are_the_same(reference: dict[str, Any]) -> None:
    """Heun's method of Karras et al. (2022), algorithm 1, in single precision, from 800 to 0.002."""
    net = read_mdlus(FILE)
    condition = torch.cat([reference["mean_hr"], reference["img_lr"]], 1)
    steps = int(reference["num_steps"])
    levels = (800 ** (1 / 7) + torch.arange(steps, dtype=torch.float64) / (steps - 1) * (0.002 ** (1 / 7) - 800 ** (1 / 7))) ** 7
    levels = torch.cat([levels, torch.zeros(1)]).float()
    x = reference["latents"] * levels[0]
    for here, there in itertools.pairwise(levels):
        slope = (x - net(x, condition, here)) / here
        ahead = x + (there - here) * slope
        if there > 0:
            ahead = x + (there - here) * (slope + (ahead - net(ahead, condition, there)) / there) / 2
        x = ahead
    expected = reference["sample_heun"]
    assert float((x - expected).abs().max() / expected.std()) < 2e-5


RELATIVES = ("diffusion_lead", "regression_lead", "stormcast_diffusion", "stormcast_regression", "diffusion_nested")


def call(net: Any, case: dict[str, Any]) -> torch.Tensor:
    where = {"lead": case["lead"]} if "lead" in case else {}
    found = net(case["condition"], **where) if "x" not in case else net(case["x"], case["condition"], case["sigma"], **where)
    assert isinstance(found, torch.Tensor)
    return found


def load_case(name: str) -> dict[str, Any]:
    with np.load(FILE.with_name(f"{name}.npz"), allow_pickle=False) as data:  # noqa: TID251
        return {k: torch.as_tensor(data[k]) for k in data}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_are_the_same_functions(name: str) -> None:
    """Lead times, classes, StormCast, nested modules; a noise level for each sample."""
    case = load_case(name)
    found = call(read_mdlus(FILE.with_name(f"{name}.mdlus")), case)
    assert float((found - case["output"]).abs().max() / case["output"].std()) < 1e-5


@pytest.mark.parametrize("name", [FILE.stem, *RELATIVES])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    net = read_mdlus(FILE.with_name(f"{name}.mdlus"))
    first = write_mdlus(net, tmp_path / "first.mdlus")
    again = read_mdlus(first)
    assert write_mdlus(again, tmp_path / "second.mdlus").read_bytes() == first.read_bytes()
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {k: v.tolist() for k, v in net.state_dict().items()}
    assert type(again) is type(net)
    if name in RELATIVES:
        case = load_case(name)
        assert torch.equal(call(again, case), call(net, case))
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        write_mdlus(net, first)
    assert write_mdlus(net, first, overwrite=True) == first
    with zipfile.ZipFile(first) as archive:
        assert sorted(archive.namelist()) == ["args.json", "metadata.json", "model.pt"]
        assert all(m.compress_type == zipfile.ZIP_STORED for m in archive.infolist())


def test_older_networks_scale_their_condition(members: dict[str, bytes], reference: dict[str, Any], tmp_path: Path) -> None:
    args = members["args.json"].replace(b"EDMPrecondSuperResolution", b"EDMPrecondSR").replace(b"physicsnemo.", b"modulus.")
    old, new = read_mdlus(pack(tmp_path / "old.mdlus", {**members, "args.json": args})), read_mdlus(FILE)
    condition = torch.cat([reference["mean_hr"], reference["img_lr"]], 1)
    scaled = condition / np.hypot(3.0, 0.5)
    torch.testing.assert_close(old(reference["x_unit"], condition, 3.0), new(reference["x_unit"], scaled, 3.0))
    again = read_mdlus(write_mdlus(old, tmp_path / "again.mdlus"))
    assert torch.equal(again(reference["x_unit"], condition, 3.0), old(reference["x_unit"], condition, 3.0))


def test_what_the_format_has_no_place_for_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "net.mdlus"
    net = SongUNet(2, 2, (8, 8), width=8, multipliers=(1,), blocks=1)
    with pytest.raises(CheckpointError, match="make it with unbiased=True"):
        write_mdlus(EDMDenoiser(net), target)
    with pytest.raises(CheckpointError, match="no place for a Gaussian anchor"):
        write_mdlus(EDMDenoiser(net, feeds_state=True), target)
    with pytest.raises(CheckpointError, match="holds a SongUNet, not a UNet"):
        write_mdlus(EDMDenoiser(UNet(1, width=8)), target)
    with pytest.raises(CheckpointError, match=r"ends in .mdlus; got 'net.pt'"):
        write_mdlus(EDMDenoiser(net), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="mkdir -p"):
        write_mdlus(EDMDenoiser(net), tmp_path / "none" / "net.mdlus")
    assert not list(tmp_path.iterdir())


def test_lead_times_are_checked() -> None:
    net = SongUNet(2 + 3, 2, (8, 8), width=8, multipliers=(1,), blocks=1, lead_times=2, lead_channels=3).eval()
    x, label = torch.randn(2, 2, 8, 8), torch.zeros(2)
    with pytest.raises(OptionError, match=r"lead=None is not accepted; this network knows the lead times 0 to 1"):
        net(x, label)
    with pytest.raises(OptionError, match="lead=2 is"):
        net(x, label, lead=torch.tensor([0, 2]))
    first, second = net.position_channels(0), net.position_channels(1)
    assert first is not None
    assert second is not None
    given = net(x, label, position=torch.stack([first, second]))
    assert torch.equal(given, net(x, label, lead=torch.tensor([0, 1])))


class Bomb:
    """Pickled, it runs a command when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def state_of(members: dict[str, bytes]) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(members["model.pt"]), weights_only=True)  # noqa: TID251  (what PhysicsNeMo writes)


def saved(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)  # noqa: TID251
    return stream.getvalue()


def described(members: dict[str, bytes], **change: Any) -> bytes:
    args = json.loads(members["args.json"])
    args["__args__"] |= change
    return json.dumps(args).encode()


HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "a path out of the archive": (lambda m: {**m, "../evil": b""}, r"holds .*a .mdlus file holds args.json, metadata.json, model.pt"),
    "a member too few": (lambda m: {k: v for k, v in m.items() if k != "metadata.json"}, r"a .mdlus file holds"),
    "a giant member": (lambda m: {**m, "metadata.json": b" " * (2**20 + 1)}, r"metadata.json has 1048577 bytes, and at most 1048576 are read"),
    "no description": (lambda m: {**m, "args.json": b"{"}, r"args.json does not describe a network"),
    "another class": (
        lambda m: {**m, "args.json": m["args.json"].replace(b"EDMPrecondSuperResolution", b"os.system")},
        r"holds a 'os.system'; this version reads UNet",
    ),
    "another backbone": (lambda m: {**m, "args.json": described(m, model_type="DhariwalUNet")}, r"the backbone 'DhariwalUNet' of"),
    "a strange argument": (lambda m: {**m, "args.json": described(m, hook="os.system")}, r"the argument 'hook' of"),
    "a width in words": (lambda m: {**m, "args.json": described(m, model_channels="many")}, r"model_channels='many' of .* an integer from 4 to"),
    "a negative width": (lambda m: {**m, "args.json": described(m, model_channels=-8)}, r"model_channels='-8' of .* is not accepted"),
    "a width that is true": (lambda m: {**m, "args.json": described(m, model_channels=True)}, r"model_channels='True' of .* is not accepted"),
    "a shape in words": (lambda m: {**m, "args.json": described(m, img_resolution="32")}, r"img_resolution='32' of .* one or two integers"),
    "a shape of three": (lambda m: {**m, "args.json": described(m, img_resolution=[1, 2, 3])}, r"img_resolution=.* one or two integers"),
    "levels of mappings": (lambda m: {**m, "args.json": described(m, channel_mult=[{}, {}])}, r"channel_mult=.* 1 to 8 integers"),
    "no levels": (lambda m: {**m, "args.json": described(m, channel_mult=[])}, r"channel_mult=.* 1 to 8 integers"),
    "a sigma that is infinite": (lambda m: {**m, "args.json": described(m, sigma_data=float("inf"))}, r"sigma_data='inf' of .* a number from"),
    "the largest network": (
        lambda m: {**m, "args.json": described(m, model_channels=4096, channel_mult=[64] * 4, num_blocks=32)}, r"the weights do not fit",
    ),
    "a giant grid": (
        lambda m: {**m, "args.json": described(m, img_resolution=2**15, N_grid_channels=1024)}, r"positional or probability channels are out of",
    ),
    "a grid of three": (lambda m: {**m, "args.json": described(m, N_grid_channels=3)}, r"A sinusoidal grid has a multiple of four channels"),
    "channels that are left out": (
        lambda m: {**m, "args.json": m["args.json"].replace(b'"img_out_channels": 2, ', b"")}, r"resolution, channels or backbone are missing",
    ),
    "another encoder": (lambda m: {**m, "args.json": described(m, encoder_type="residual")}, r"encoder_type='residual' of .* reads 'standard'"),
    "a description that is deep": (lambda m: {**m, "args.json": b"[" * 100000}, r"args.json does not describe a network"),
    "a lead time that has no channels": (
        lambda m: {**m, "args.json": described(m, model_type="SongUNetPosLtEmbd")}, r"lead_time_channels is missing",
    ),
    "another size": (lambda m: {**m, "args.json": described(m, model_channels=16)}, r"0 are missing, 0 too many, \d+ of another shape"),
    "more levels": (lambda m: {**m, "args.json": described(m, channel_mult=[1, 2, 2])}, r"the weights do not fit .* are missing"),
    "a pickle": (lambda m: {**m, "model.pt": pickle.dumps(Bomb())}, r"model.pt is no plain state dict"),
    "a torch file with a pickle": (lambda m: {**m, "model.pt": saved({"model": Bomb()})}, r"model.pt is no plain state dict"),
    "weights that are no numbers": (
        lambda m: {**m, "model.pt": saved({k: v * float("nan") for k, v in state_of(m).items()})}, r"holds values that are not finite",
    ),
    "weights of something else": (lambda m: {**m, "model.pt": saved({"a": torch.ones(2)})}, r"the weights do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(
    change: Callable[[dict[str, bytes]], dict[str, bytes]], message: str, kind: str, members: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file = pack(tmp_path / "net.mdlus", change(members), kind)
    with pytest.raises(CheckpointError, match=message):
        read_mdlus(file)
    assert [p.name for p in tmp_path.iterdir()] == ["net.mdlus"]


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_mdlus(tmp_path / "none.mdlus")
    (tmp_path / "short.mdlus").write_bytes(FILE.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"is no .mdlus archive, or truncated"):
        read_mdlus(tmp_path / "short.mdlus")


def test_older_names_are_understood(members: dict[str, bytes], reference: dict[str, Any], tmp_path: Path) -> None:
    state = {
        k.replace(".attn.norm.", ".norm2.").replace(".attn.", "."): v for k, v in state_of(members).items() if "freqs" not in k
    }
    state |= {"device_buffer": torch.zeros(0), "model.device_buffer": torch.zeros(0), "model.pos_embd": torch.zeros(4, 32, 32)}
    old = read_mdlus(pack(tmp_path / "old.mdlus", {**members, "model.pt": saved(state)}))
    condition = torch.cat([reference["mean_hr"], reference["img_lr"]], 1)
    assert torch.equal(old(reference["x_unit"], condition, 1.0), read_mdlus(FILE)(reference["x_unit"], condition, 1.0))


def test_group_norm_by_the_unbiased_variance() -> None:
    norm = GroupNorm(8, unbiased=True).eval()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 + 2 * torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    grouped = x.reshape(2, 2, -1)
    plain = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = plain.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)
    usual = torch.nn.functional.group_norm(x, 2, norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(norm.train()(x), usual)


def test_dropout() -> None:
    torch.manual_seed(0)
    x = torch.ones(4, 6, 50, 51)
    out = drop(x, 0.13)
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - 0.13)], rel=1e-4)
    assert float((out == 0).float().mean()) == pytest.approx(0.13, abs=4 * (0.13 * 0.87 / x.numel()) ** 0.5)
    pairs = (out == 0).float() - 0.13
    for axis in (1, 2, 3):  # independent
        assert abs(float((pairs * pairs.roll(1, axis)).mean())) < 5 * 0.13 * 0.87 / x.numel() ** 0.5
    assert not torch.equal(drop(x, 0.13), out)
    net = SongUNet(2, 2, (8, 8), width=8, multipliers=(1,), blocks=1, dropout=0.5)
    net.scale_output(1e5)
    state, label = torch.randn(1, 2, 8, 8), torch.zeros(1)
    assert torch.equal(net.eval()(state, label), net(state, label))
    for name, parameter in net.named_parameters():
        if name.endswith("conv1.weight"):
            torch.nn.init.normal_(parameter)
    assert not torch.equal(net.train()(state, label), net(state, label))


@pytest.mark.parametrize("sides", [(3, 5), (4, 4)])
def test_convolutions_at_another_resolution(sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *sides)
    fine = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for kernel in (1, 3):
        up = Resampled(3, 4, kernel, up=True)
        torch.nn.init.normal_(up.bias)
        expected = torch.nn.functional.conv2d(fine, up.weight, up.bias, padding=kernel // 2)
        torch.testing.assert_close(up(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(up(x, 0.5), expected / 2, rtol=1e-5, atol=1e-5)
    down = Resampled(3, 4, 3, down=True)
    torch.testing.assert_close(down(fine), torch.nn.functional.conv2d(x, down.weight, down.bias, padding=1))


def test_attention_by_hand() -> None:
    attention = Attention(4, unbiased=False)
    torch.nn.init.normal_(attention.proj.weight)
    x = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    qkv = attention.qkv(attention.norm(x)).reshape(2, 12, 6)
    q, k, v = qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]
    weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / 2.0, -1)
    torch.testing.assert_close(attention(x), attention.proj(torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)))


def test_rectangular_networks_and_positions() -> None:
    net = SongUNet(2 + 3 + 2, 2, (16, 24), width=8, multipliers=(1, 2), blocks=1, attention=(8,), grid="linear", grid_channels=2)
    x, condition = torch.randn(2, 2, 16, 24), torch.randn(2, 3, 16, 24)
    assert net(x, torch.zeros(2), condition).shape == (2, 2, 16, 24)
    linear = positional_channels("linear", 2, (3, 5))
    assert linear[0, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert linear[1, :, 0].tolist() == [-1, 0, 1]
    octave = positional_channels("sinusoidal_octave", 8, (4, 6))
    x_axis = torch.linspace(0, 2 * torch.pi, 6)
    y_axis = torch.linspace(0, 2 * torch.pi, 4)
    torch.testing.assert_close(octave[4, 0], (2 * x_axis).sin())
    torch.testing.assert_close(octave[5, :, 0], (2 * y_axis).sin())
    torch.testing.assert_close(octave[6, 0], (2 * x_axis).cos())
    legacy = positional_channels("sinusoidal", 8, (4, 6))
    torch.testing.assert_close(legacy[4, 0], (4 * x_axis).sin())
    with pytest.raises(GridError, match="multiples of 2, and the shape is 15 x 24"):
        SongUNet(3, 2, (15, 24), width=8, multipliers=(1, 2))


def test_tiles_bring_their_own_positions() -> None:
    net = SongUNet(2 + 2, 2, (16, 24), width=8, multipliers=(1, 2), blocks=1, grid="linear", grid_channels=2).eval()
    whole = net.position_channels()
    assert whole is not None
    assert whole.shape == (2, 16, 24)
    x, label = torch.randn(3, 2, 16, 24), torch.zeros(3)
    torch.testing.assert_close(net(x, label, position=whole.expand(3, -1, -1, -1)), net(x, label), rtol=0, atol=0)
    corners = torch.stack([whole[:, :8, :8], whole[:, 8:, 16:], whole[:, 4:12, 8:16]])
    found = net(x[..., :8, :8], label, position=corners)
    for k in range(3):
        torch.testing.assert_close(found[k : k + 1], net(x[k : k + 1, :, :8, :8], label[:1], position=corners[k : k + 1]))
    assert not torch.allclose(found[0], net(x[..., :8, :8], label, position=corners[1:2])[0])
    with pytest.raises(
        GridError, match=r"the places of 16 x 24 cells, and the state has 8 x 8; give position, shape \(batch, P, 8, 8\)"
    ):
        net(x[..., :8, :8], label)
    with pytest.raises(GridError, match=r"multiples of 2, and the state has 7 x 8"):
        net(x[..., :7, :8], label, position=corners[..., :7, :])
    assert SongUNet(2, 2, (8, 8), width=8, multipliers=(1, 2), blocks=1).position_channels() is None


def test_the_output_can_be_scaled() -> None:
    net = SongUNet(2, 2, (8, 8), width=8, multipliers=(1,), blocks=1).eval()
    torch.nn.init.normal_(list(net.dec.values())[-1].bias)
    x, label = torch.randn(1, 2, 8, 8), torch.zeros(1)
    before = net(x, label)
    net.scale_output(0.5)
    torch.testing.assert_close(net(x, label), before / 2)


def test_a_noise_level_for_each_sample(reference: dict[str, Any]) -> None:
    net = read_mdlus(FILE)
    assert isinstance(net, Preconditioned)
    x, condition = reference["x_unit"], torch.cat([reference["mean_hr"], reference["img_lr"]], 1)
    x, condition = torch.cat([x, -x])[:2], torch.cat([condition, condition])[:2]
    together = net.denoiser(x, torch.tensor([0.3, 4.0]), condition)
    for k, sigma in enumerate((0.3, 4.0)):
        alone = net.denoiser(x[k : k + 1], sigma, condition[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-5, atol=1e-5)
    by_hand = EDMDenoiser(net.model, sigma_data=0.5).parts(x, 4.0, condition)[0]
    torch.testing.assert_close(by_hand, 0.25 / 16.25 * x)


def test_reduced_precision_is_near(reference: dict[str, Any]) -> None:
    net, condition = read_mdlus(FILE), torch.cat([reference["mean_hr"], reference["img_lr"]], 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(reference["x_unit"], condition, 1.0)
    exact = net(reference["x_unit"], condition, 1.0)
    assert found.dtype == torch.float32
    assert 0 < float((found - exact).std() / exact.std()) < 0.02

"""Tiles, their noise and their memory: against closed forms, and against the domain as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.memory import MemoryTracker, peak_memory, plan_memory
from xgenda.diffusion.noise import PlaneNoise
from xgenda.diffusion.samplers import integrate
from xgenda.diffusion.schedules import noise_levels
from xgenda.diffusion.tiles import TiledNetwork, Tiling, decorrelation_length, suggest_tile
from xgenda.errors import GridError, OptionError
from xgenda.networks.songunet import SongUNet
from xgenda.networks.unet import UNet

KEYS = [(0, "2020-01-01", 3), (0, "2020-01-01", 4), (7, "2020-01-02", 3)]


class Identity(nn.Module):
    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        return x


class Local(nn.Module):
    """Three convolutions, so that nothing farther than three cells is seen, of state, label, condition and position."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in ((4, 8), (8, 8), (8, 1))])
        self.grid = nn.Parameter(torch.randn(1, *shape))

    def position_channels(self) -> Tensor:
        return self.grid

    def forward(self, x: Tensor, label: Tensor, condition: Tensor, position: Tensor | None = None) -> Tensor:
        own = (self.grid if position is None else position).expand(len(x), -1, -1, -1)
        x = torch.cat([x * (1 + label[:, None, None, None]), condition, own], 1)
        for layer in self.layers:
            x = layer(torch.tanh(x))
        return x


def unet(**options: object) -> UNet:
    torch.manual_seed(0)
    net = UNet(1, width=8, multipliers=(1, 2), **options)  # type: ignore[arg-type]
    nn.init.normal_(net.last.conv.weight, std=0.1)
    return net.eval().requires_grad_(False)


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    shape, tile, overlap, margin = [], [], [], []
    multiple = draw(st.integers(1, 3))
    for _ in range(2):
        shape.append(draw(st.integers(1, 60)))
        tile.append(draw(st.integers(multiple, 40)))
        overlap.append(draw(st.integers(0, tile[-1] - multiple)))
        margin.append(draw(st.integers(0, max(0, (overlap[-1] - 1) // 2))))
    pairs = [(a[0], a[1]) for a in (shape, tile, overlap, margin)]
    if draw(st.booleans()):
        boundary = draw(st.integers(0, 4))
        overlap = [min(o, max(0, t - boundary - 1)) for o, t in zip(overlap, tile, strict=True)]
        if all(t > o + boundary for o, t in zip(overlap, tile, strict=True)):
            return Tiling(pairs[0], pairs[1], (overlap[0], overlap[1]), boundary=(boundary, boundary))
    return Tiling(*pairs[:3], periodic=draw(st.booleans()), multiple=multiple, margin=pairs[3])


@given(tilings())
@settings(max_examples=60, deadline=None)
def test_the_windows_add_to_one(tiling: Tiling) -> None:
    total = torch.zeros(tiling.shape, dtype=torch.float64)
    for place in tiling.places:
        tiling.add(total, torch.ones(tiling.tile, dtype=torch.float64), place)
    rounding = len(tiling.places) * torch.finfo(torch.float64).eps  # each of the windows of a sum adds its own
    torch.testing.assert_close(total, torch.ones_like(total), atol=max(1e-14, rounding), rtol=0)
    x = torch.randn(2, 1, *tiling.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(TiledNetwork(Identity(), tiling, 3)(x, torch.zeros(2)), x, atol=2e-7, rtol=1e-6)


@given(tilings())
@settings(max_examples=60, deadline=None)
def test_the_corners(tiling: Tiling) -> None:
    if tiling.boundary is not None:
        return
    for k, axis in enumerate(tiling.axes):
        n, tile, corners = tiling.shape[k], tiling.tile[k], axis.corners
        wraps = tiling.periodic and k == 1 and tile < n
        assert corners[0] == 0
        assert list(corners) == sorted(set(corners))
        assert all(c % tiling.multiple == 0 for c in corners[: None if wraps else -1])
        assert wraps or corners[-1] == n - tile
        ends = [*corners[1:], n] if wraps else corners[1:]
        assert all(here + tile - there >= tiling.overlap[k] for here, there in zip(corners, ends, strict=False))
        if tiling.margin == (0, 0):
            assert (axis.weights > 0).all()


def test_a_tile_as_large_as_the_domain_is_the_domain() -> None:
    net, x = unet().double(), torch.randn(2, 1, 20, 24).double()
    tiling = Tiling((20, 24), (32, 64), (16, 16))
    assert tiling.whole
    assert tiling.corners == ((0, 0),)
    torch.testing.assert_close(TiledNetwork(net, tiling)(x, torch.ones(2)), net(x, torch.ones(2)), atol=1e-12, rtol=0)


def test_a_local_network_is_that_of_the_domain() -> None:
    torch.manual_seed(0)
    net = Local((40, 56)).double().requires_grad_(False)
    x, label, condition = (
        torch.randn(3, 1, 40, 56).double(),
        torch.tensor([0.1, 0.5, 2.0]).double(),
        torch.randn(3, 2, 40, 56).double(),
    )
    whole = net(x, label, condition)
    tiling = Tiling((40, 56), (20, 24), (8, 8), margin=(3, 3))
    for batch in (1, 4, 100):
        torch.testing.assert_close(TiledNetwork(net, tiling, batch)(x, label, condition), whole, atol=1e-12, rtol=0)
    # without the margin the edges of tiles, where the network pads, are seen a little
    soft = TiledNetwork(net, Tiling((40, 56), (20, 24), (8, 8)))(x, label, condition)
    assert 1e-4 < float((soft - whole).abs().max()) < float(whole.std())
    # along a periodic axis, the cells across the end are neighbours
    around = TiledNetwork(net, Tiling((40, 56), (20, 24), (8, 8), periodic=True, margin=(3, 3)))
    wide = [functional.pad(f, (8, 8, 0, 0), mode="circular") for f in (x, condition, net.grid[None].detach())]
    expected = net(wide[0], label, wide[1], wide[2])[..., 8:-8]
    torch.testing.assert_close(around(x, label, condition), expected, atol=1e-12, rtol=0)


def test_positions_of_a_window_of_the_domain() -> None:
    torch.manual_seed(0)
    net = unet(position=2, shape=(32, 48))
    x = torch.randn(1, 1, 32, 48)
    whole = TiledNetwork(net, Tiling((32, 48), (16, 16), (8, 8)))(x, torch.zeros(1))
    # tiles of the right part alone are the same tiles
    right = Tiling((32, 24), (16, 16), (8, 8))
    own = net.position_channels()
    assert own is not None
    found = TiledNetwork(net, right)(x[..., 24:], torch.zeros(1), position=own[None, ..., 24:])
    torch.testing.assert_close(found[..., 8:], whole[..., 32:], atol=1e-6, rtol=1e-6)
    with pytest.raises(GridError, match=r"knows the places of \(32, 48\) cells, and the domain has \(32, 24\)"):
        TiledNetwork(net, right)(x[..., 24:], torch.zeros(1))


class Backwards(Tiling):
    @property
    def places(self) -> tuple[tuple[int, int], ...]:  # type: ignore[override]
        return tuple(reversed(Tiling(self.shape, self.tile, self.overlap).places))


def test_order_and_batches_do_not_matter() -> None:
    net, x, label = unet(), torch.randn(2, 1, 40, 56), torch.tensor([0.3, -0.5])
    args = ((40, 56), (16, 24), (9, 10))
    found = TiledNetwork(net, Tiling(*args))(x, label)
    assert torch.equal(TiledNetwork(net, Backwards(*args))(x, label), found)
    torch.testing.assert_close(TiledNetwork(net, Tiling(*args), 7)(x, label), found, atol=1e-5, rtol=0)
    torch.testing.assert_close(TiledNetwork(net, Tiling(*args), 7)(x[1:], label[1:]), found[1:], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch itself, in forward mode
def test_derivatives_go_through_the_tiles() -> None:
    net = TiledNetwork(unet().double(), Tiling((24, 24), (16, 16), (8, 8)), 2)
    x, v, u = (torch.randn(1, 1, 24, 24, dtype=torch.float64) for _ in range(3))

    def function(x: Tensor) -> Tensor:
        found: Tensor = net(x, torch.zeros(1).double())
        return found

    _, forward = torch.func.jvp(function, (x,), (v,))
    _, backward = torch.func.vjp(function, x)
    assert float((forward * u).sum()) == pytest.approx(float((backward(u)[0] * v).sum()), rel=1e-10)
    assert float(forward.norm()) > 0.1


def test_published_tiles() -> None:
    # the published form: reflect, unfold, call, fold, divide by the number of patches; and a condition as a whole
    shape, patch, overlap, edge = (50, 70), 16, 4, 2
    stride = patch - overlap - edge
    counts = [math.ceil(n / stride) for n in shape]
    padded = [stride * (c - 1) + patch + edge for c in counts]
    mask = torch.randn(patch, patch)

    class Patched(nn.Module):
        def forward(self, x: Tensor, label: Tensor, condition: Tensor) -> Tensor:
            assert condition.shape[1] == 5
            return torch.tanh(x * mask + condition.mean(1, keepdim=True))

    x, condition = torch.randn(1, 1, *shape), torch.randn(1, 3, *shape)

    def patches(f: Tensor) -> Tensor:
        f = functional.pad(f, (edge, padded[1] - shape[1] - edge, edge, padded[0] - shape[0] - edge), mode="reflect")
        return functional.unfold(f, patch, stride=stride).reshape(f.shape[1], patch, patch, -1).permute(3, 0, 1, 2)

    def fold(f: Tensor) -> Tensor:
        out = functional.fold(f.permute(1, 2, 3, 0).reshape(1, -1, len(f)), padded, patch, stride=stride)
        return out[..., edge : edge + shape[0], edge : edge + shape[1]]

    whole = functional.interpolate(condition[:, 1:], (patch, patch), mode="bilinear")
    cut = patches(x)
    called = Patched()(cut, torch.zeros(len(cut)), torch.cat([patches(condition), whole.expand(len(cut), -1, -1, -1)], 1))
    expected = fold(called) / fold(torch.ones_like(called))
    tiling = Tiling(shape, (patch, patch), (overlap, overlap), boundary=(edge, edge))
    found = TiledNetwork(Patched(), tiling, 4, whole_condition=slice(1, None))(x, torch.zeros(1), condition)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert len(Tiling((1056, 1792), (448, 448), (4, 4), boundary=(2, 2)).places) == 15


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Tiling((64, 64), (16, 16), (16, 4)), GridError, r"does not advance along its rows; use a larger tile"),
        (lambda: Tiling((64, 64), (16, 16), (4, 10), multiple=8), GridError, "along its columns"),
        (lambda: Tiling((64, 64), (0, 16)), OptionError, "tile=0 is not accepted"),
        (lambda: Tiling((64, 64), 16), OptionError, r"tile=16 is not accepted; give rows and columns"),  # type: ignore[arg-type]
        (lambda: Tiling((64, 64), (16, 16), periodic=True, boundary=(2, 2)), OptionError, "leave one of the two out"),
        (lambda: Tiling((64, 64), (16, 16), (4, 4), margin=(2, 1)), OptionError, "overlap of more than twice as much"),
        (lambda: TiledNetwork(unet(periodic=True), Tiling((64, 64), (32, 16))), GridError, r"use tile=\(32, 64\)"),
        (
            lambda: TiledNetwork(Identity(), Tiling((64, 64), (16, 16)))(torch.zeros(1, 1, 8, 8), torch.zeros(1)),
            GridError,
            r"has \(8, 8\) cells, and the tiles are those of \(64, 64\)",
        ),
        (lambda: PlaneNoise(KEYS, (64, 64), (32, 0), (33, 64)), GridError, "does not fit a plane"),
        (lambda: PlaneNoise(KEYS, (64, 64), size=(8, 8)).normal(1, 8, 9), GridError, r"noise for \(8, 9\) was asked for"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Noise by coordinate ---------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 89), st.integers(-200, 200), st.integers(1, 90), st.integers(1, 150), st.sampled_from([7, 64]))
@settings(max_examples=40, deadline=None)
def test_a_window_of_noise_is_a_cut_of_the_plane(row: int, column: int, rows: int, columns: int, block: int) -> None:
    shape, rows = (90, 150), min(rows, 90 - row)
    whole = PlaneNoise(KEYS, shape, block=block)
    part = PlaneNoise(KEYS, shape, (row, column), (rows, columns), block)
    for channels in (2, 1):  # the draws that follow too
        expected = whole.normal(channels, *shape).roll(-column, -1)[..., row : row + rows, :columns]
        assert torch.equal(part.normal(channels, rows, columns), expected)


def test_noise_is_normal_and_independent() -> None:
    shape = (192, 256)
    source = PlaneNoise(KEYS, shape)
    draws = [source.normal(2, *shape, dtype=torch.float64) for _ in range(2)]
    assert draws[0].dtype == torch.float64
    alone = PlaneNoise(KEYS[1:2], shape).normal(2, *shape, dtype=torch.float64)
    assert torch.equal(alone[0], draws[0][1])
    # samples, channels, draws, blocks: nothing is correlated with anything
    fields = torch.stack(draws).reshape(-1, *shape)
    blocks = fields.unfold(1, 64, 64).unfold(2, 64, 64).reshape(-1, 64 * 64)
    found = blocks @ blocks.T / 64**2
    far = 5.0 / 64  # standard errors
    assert float((found - torch.eye(len(found))).abs().max()) < far * math.sqrt(2)
    assert float(fields.mean().abs()) < 5 / math.sqrt(fields.numel())
    assert float((fields**4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / fields.numel()))
    for axis in (1, 2):
        assert float((fields * fields.roll(1, axis)).mean().abs()) < 5 / math.sqrt(fields.numel())


# Seams -----------------------------------------------------------------------------------------------------------------------------------


class Gaussian(nn.Module):
    """The network whose EDM denoiser is exact for a stationary Gaussian field with exponential covariance, on any number of cells."""

    def __init__(self, length: float) -> None:
        super().__init__()
        self.length = length

    def covariance(self, shape: tuple[int, int]) -> Tensor:
        place = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in shape))
        return torch.exp(-torch.cdist(place, place) / self.length)

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        sigma = math.exp(4 * float(label[0]))
        values, vectors = torch.linalg.eigh(self.covariance((x.shape[-2], x.shape[-1])))
        shrink = (vectors * (values / (values + sigma**2))) @ vectors.T
        noisy = math.sqrt(sigma**2 + 1) * x.flatten(1).double()
        out = (noisy @ shrink - noisy / (sigma**2 + 1)) * math.sqrt(sigma**2 + 1) / sigma
        return out.reshape(x.shape)


SEAM = (4, 48)


def sampled_covariance(denoise: Callable[[Tensor, float], Tensor], start: Tensor) -> Tensor:
    """Return the exact covariance of samples: the sampler of a Gaussian is a linear map, here of each unit of noise."""
    levels = noise_levels("karras", 12, 0.02, 20.0)
    found = integrate(denoise, start * levels[0] * 1e-2, levels).flatten(1) * 1e2  # scaled, since the units are no states
    return found.T @ found


def steps_across(covariance: Tensor) -> Tensor:
    """Return the mean square difference of neighbouring columns, shape (columns - 1,)."""
    variance = covariance.diagonal().reshape(SEAM)
    beside = covariance.reshape(*SEAM, *SEAM).diagonal(dim1=0, dim2=2).permute(2, 0, 1).diagonal(1, dim1=1, dim2=2)
    return (variance[:, 1:] + variance[:, :-1] - 2 * beside).mean(0)


def test_seams_are_not_seen() -> None:
    network = Gaussian(6.0)
    units = torch.eye(SEAM[0] * SEAM[1], dtype=torch.float64).reshape(-1, 1, *SEAM)
    whole = steps_across(sampled_covariance(EDMDenoiser(network), units))

    def worst(tiling: Tiling) -> float:
        found = steps_across(sampled_covariance(EDMDenoiser(TiledNetwork(network, tiling, 10**6)), units))
        return float((found / whole - 1).abs().max())

    assert worst(Tiling(SEAM, (4, 24), (0, 12))) < 0.03
    assert worst(Tiling(SEAM, (4, 16), (0, 0))) > 0.3
    assert worst(Tiling(SEAM, (4, 24), (0, 2), boundary=(0, 1))) > 3 * worst(Tiling(SEAM, (4, 24), (0, 12)))


def test_blocks_with_halo_and_noise_by_coordinate_have_no_seams() -> None:
    network, edge = Gaussian(6.0), SEAM[1] // 2
    units = torch.eye(SEAM[0] * SEAM[1], dtype=torch.float64).reshape(-1, 1, *SEAM)
    whole = steps_across(sampled_covariance(EDMDenoiser(network), units))

    def worst(halo: int, shared: bool) -> float:
        levels = noise_levels("karras", 12, 0.02, 20.0)
        halves = []
        for k, columns in enumerate((slice(0, edge + halo), slice(edge - halo, None))):
            start = units[..., columns]
            if not shared:  # each block draws its own noise in its halo
                start = torch.cat([start * (k == 0), start * (k == 1)])
            found = integrate(EDMDenoiser(network), start * levels[0] * 1e-2, levels) * 1e2
            halves.append(found[..., :edge] if k == 0 else found[..., halo:])
        found = torch.cat(halves, -1).flatten(1)
        return float((steps_across(found.T @ found) / whole - 1).abs().max())

    assert worst(halo=16, shared=True) < 0.02
    assert worst(halo=0, shared=True) > 0.3
    assert worst(halo=16, shared=False) > 0.3


# The size of a tile ----------------------------------------------------------------------------------------------------------------------


def autoregressive(parameter: float, *shape: int) -> Tensor:
    """Return fields whose columns are AR(1) of unit variance, rows independent."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    out = [noise[..., 0]]
    for k in range(1, shape[-1]):
        out.append(parameter * out[-1] + math.sqrt(1 - parameter**2) * noise[..., k])
    return torch.stack(out, -1)


def test_the_decorrelation_length_of_known_fields() -> None:
    fields = torch.cat(
        [autoregressive(0.5, 40, 1, 64, 160), 3 * autoregressive(0.8, 40, 1, 64, 160), torch.zeros(40, 1, 64, 160)], 1
    )
    rows, columns = decorrelation_length(fields)
    assert columns == pytest.approx(math.log(0.05) / math.log(0.8), rel=0.1)
    assert 0.9 < rows < 1.0  # white: linear from one to zero
    turned = decorrelation_length(fields.transpose(-1, -2))
    assert turned == pytest.approx((columns, rows))
    assert decorrelation_length(torch.ones(2, 1, 8, 9)) == (8, 9)
    assert decorrelation_length(torch.zeros(2, 1, 8, 9)) == (0, 0)


def test_suggested_tiles() -> None:
    fields = autoregressive(0.8, 20, 1, 64, 160)  # 13.4 cells, and as found 13.9
    assert suggest_tile(fields, 8) == ((64, 160), (0, 0))
    assert suggest_tile(fields, 4, (32, 100)) == ((16, 28), (4, 8))
    assert suggest_tile(fields, 8, (64, 100)) == ((64, 32), (0, 8))
    Tiling((64, 160), *suggest_tile(fields, 4, (32, 100)))
    with pytest.warns(UserWarning, match="correlated over 14 cells, and a tile has 8"):
        suggest_tile(fields, 8, (32, 8))


# Memory ----------------------------------------------------------------------------------------------------------------------------------


def test_memory_of_known_allocations() -> None:
    def function(x: Tensor) -> Tensor:
        y = x + 1  # one more
        y = y * y  # two until the first y goes
        view = y[:10].t()
        del y
        return torch.cat([view, view, view])  # a view keeps the whole

    assert peak_memory(function, (100, 100)) == (8 * 100**2, 4 * 100**2)
    assert peak_memory(lambda x: torch.cat([x[:10].t()] * 3) + 0, (100, 100))[0] == 2 * 4 * 3000


@pytest.mark.parametrize("kind", ["unet", "songunet"])
def test_memory_without_values_is_that_with_values(kind: str) -> None:
    net = (
        unet() if kind == "unet" else SongUNet(2, 1, (32, 32), 16, (1, 2), blocks=1, attention=(16,)).eval().requires_grad_(False)
    )
    extra = 0 if kind == "unet" else 1
    with torch.no_grad(), MemoryTracker() as tracker:
        x, label, condition = torch.zeros(2, 1, 32, 32), torch.zeros(2), torch.zeros(2, 1, 32, 32) if extra else None
        before = tracker.live
        net(x, label, condition)
    weights = sum(4 * t.numel() for t in (*net.parameters(), *net.buffers()))
    peak, given = peak_memory(net, (2, 1, 32, 32), (2,), (2, 1, 32, 32) if extra else None)
    assert before == 4 * (2 * 32**2 * (1 + extra) + 2)
    assert peak == tracker.peak - before
    # of a buffer of fixed numbers a copy may be used
    assert given == pytest.approx(weights + before, rel=0.01)
    assert tracker.live == before  # all else has gone


def test_the_plan_is_what_sampling_takes() -> None:
    net = unet(condition_channels=2, position=2, shape=(96, 160))
    tiling = Tiling((96, 160), (32, 32), (8, 8))
    plan = plan_memory(net, tiling, 1, 2, samples=2, batch=4)
    denoiser = EDMDenoiser(TiledNetwork(net, Tiling((96, 160), (32, 32), (8, 8)), 4))
    with torch.no_grad(), MemoryTracker() as tracker:
        condition, start = torch.randn(2, 2, 96, 160), torch.randn(2, 1, 96, 160).double()
        integrate(lambda x, sigma: denoiser(x, sigma, condition), start, [1.0, 0.5, 0.25, 0.0])
    assert plan.peak == pytest.approx(tracker.peak + tracker.given, rel=0.1)
    assert plan.weights == sum(4 * t.numel() for t in (*net.parameters(), *net.buffers()))
    tall = unet(condition_channels=2, position=2, shape=(192, 160))
    larger = plan_memory(tall, Tiling((192, 160), (32, 32), (8, 8)), 1, 2, samples=2, batch=4)
    assert larger.network == plan.network
    assert larger.fields == pytest.approx(2 * plan.fields, rel=0.1)
    assert plan_memory(net, tiling, 1, 2, samples=2, batch=8).network == pytest.approx(2 * plan.network, rel=0.05)

"""The neural operator: one function on every grid."""

from __future__ import annotations

import pytest
import torch

from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.kernels import Kernel
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.random_fields import TorusField
from xgenda.errors import OptionError
from xgenda.models.diffusive import build_network
from xgenda.networks.uno import UNO, SpectralConv, resample

pytestmark = pytest.mark.usefixtures("one_thread")
LABEL = torch.tensor([-0.3, 0.4])


def network(**options: object) -> UNO:
    torch.manual_seed(0)
    options = {"width": 8, "multipliers": (1, 2), "modes": 6, "periodic": "both", **options}
    net = UNO(2, 1, **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(net.last.weight, std=0.3)
    return net.eval()


def field(n: tuple[int, int], cutoff: int = 7, channels: int = 3) -> torch.Tensor:
    """Band-limited, the same function on every grid."""
    torus = TorusField(n, Kernel("exponential", 0.3), cutoff=cutoff)
    return torus.draw(NoiseStream([(0, "t", 0), (0, "t", 1)]), channels).float()


def call(net: UNO, fields: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(fields[:, :2], LABEL, fields[:, 2:])


def test_a_spectral_layer_is_a_multiplication_in_fourier_space() -> None:
    """Against sums of waves written out: each wave alone, with the weight of its wavenumber."""
    torch.manual_seed(0)
    layer = SpectralConv(2, 3, 3)
    weight = torch.view_as_complex(layer.weight.detach())
    y, x = torch.meshgrid(torch.arange(9) / 9, torch.arange(10) / 10, indexing="ij")
    for ky, kx in ((2, 1), (-3, 2), (0, 3), (1, 0)):
        angle = 2 * torch.pi * (ky * y + kx * x)
        out = layer(torch.stack([angle.cos(), torch.zeros_like(angle)])[None])[0]
        if kx:  # R(k) exp(i k x) / 2 and its conjugate
            expected = [(weight[0, o, ky + 3, kx] * torch.exp(1j * angle)).real for o in range(3)]
        else:  # where k and -k are both stored they share
            both = (weight[0, :, ky + 3, 0] + weight[0, :, 3 - ky, 0].conj()) / 2
            expected = [(both[o] * torch.exp(1j * angle)).real for o in range(3)]
        torch.testing.assert_close(out, torch.stack(expected), atol=1e-5, rtol=1e-4)
    for ky, kx in ((4, 0), (0, 4), (-4, 4)):  # beyond its modes
        assert layer(torch.cos(2 * torch.pi * (ky * y + kx * x)).expand(1, 2, 9, 10)).abs().max() < 1e-5


def test_low_rank_weights_are_what_their_factors_multiply_to() -> None:
    torch.manual_seed(0)
    low, full = SpectralConv(3, 4, 2, rank=2), SpectralConv(3, 4, 2)
    a, b, c, d = (torch.view_as_complex(p) for p in (low.inward, low.outward, low.rows, low.columns))
    with torch.no_grad():
        full.weight.copy_(torch.view_as_real(torch.einsum("ir,or,ry,rx->ioyx", a, b, c, d)))
    x = torch.randn(2, 3, 8, 7)
    torch.testing.assert_close(low(x), full(x), atol=1e-5, rtol=1e-4)


def test_resampling_carries_functions() -> None:
    small, large = field((17, 20)), field((64, 36))
    torch.testing.assert_close(resample(small, (64, 36)), large, atol=1e-5, rtol=0)
    torch.testing.assert_close(resample(large, (17, 20)), small, atol=1e-5, rtol=0)
    white = torch.randn(1, 1, 16, 16)
    again = resample(resample(white, (40, 40)), (16, 16))  # all but half of the shortest waves
    lost = torch.fft.rfft2(white - again).abs() > 1e-4
    assert lost[..., 8, :].any()
    assert not lost[..., :8, :8].any()
    assert resample(white, (16, 16)) is white


@pytest.mark.parametrize("rank", [None, 4])
def test_it_is_the_same_function_on_every_grid(rank: int | None) -> None:
    net = network(rank=rank, resolution=(24, 24))
    reference = call(net, field((32, 32)))
    assert reference.abs().mean() > 0.05
    for n in ((64, 64), (33, 45), (128, 32)):
        found = call(net, field(n))
        torch.testing.assert_close(resample(found, (32, 32)), reference, atol=2e-4, rtol=0)
    # without a grid of its own it is nearly so; a grid that shows more makes fewer waves of others
    free = network(rank=rank)
    outs = [resample(call(free, field((n, n))), (16, 16)) for n in (16, 32, 64, 128)]
    errors = [float((o - outs[-1]).abs().mean() / outs[-1].abs().mean()) for o in outs[:-1]]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.05


def test_it_commutes_with_shifts_of_a_torus() -> None:
    """By multiples of the coarsest level's cells exactly; by others as nearly as its grids show what pointwise functions make."""
    net, x = network(), field((32, 32))
    out = call(net, x)
    torch.testing.assert_close(call(net, x.roll((6, -10), (-2, -1))), out.roll((6, -10), (-2, -1)), atol=1e-4, rtol=0)
    odd = call(net, x.roll((5, 3), (-2, -1))) - out.roll((5, 3), (-2, -1))
    assert odd.abs().mean() < 0.08 * out.abs().mean()
    flat = network(multipliers=(1,))
    torch.testing.assert_close(call(flat, x.roll(5, -1)), call(flat, x).roll(5, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("periodic", [False, True, "both"])
@pytest.mark.parametrize("size", [(7, 13), (16, 9), (1, 20)])
def test_any_grid_and_only_axes_that_wrap_do(periodic: object, size: tuple[int, int]) -> None:
    net = network(periodic=periodic, position=2, shape=(8, 8))
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    out = call(net, x)
    assert out.shape == (2, 2, *size)
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    plain = network(periodic=periodic)
    turned = call(plain, x.roll(4 if size[1] % 4 == 0 else size[1], -1)).roll(-4 if size[1] % 4 == 0 else -size[1], -1)
    if size[1] % 4 == 0:
        assert torch.allclose(turned, call(plain, x), atol=1e-4) is bool(periodic)


def test_gradients_reach_every_weight_and_the_input() -> None:
    net = network(rank=3, position=1, shape=(16, 16), periodic=True)
    x = torch.randn(2, 2, 16, 16, requires_grad=True)
    out = net(x, LABEL, torch.randn(2, 1, 16, 16))
    out.square().mean().backward()
    assert x.grad is not None
    assert (x.grad.abs() > 0).all()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
        assert not parameter.is_complex()  # for files and optimisers
    assert call(UNO(2, 1, width=8), torch.randn(2, 3, 16, 16)).abs().max() == 0  # untrained it says nothing


def test_size() -> None:
    def count(**options: object) -> int:
        return sum(p.numel() for p in UNO(1, width=16, periodic="both", **options).parameters())  # type: ignore[arg-type]

    full, low = count(modes=8), count(modes=8, rank=8)
    # two spectral layers a block; five blocks and the middle: (inputs + outputs) of each, full matrices for every wave
    waves = {8: 17 * 9, 4: 9 * 5, 2: 5 * 3}
    layers = [(16, 16, 8), (16, 32, 4), (32, 32, 2), (32, 32, 2), (64, 32, 2), (64, 32, 4), (48, 16, 8)]
    spectral = sum(2 * waves[m] * (i * o + o * o) for i, o, m in layers)
    factors = sum(2 * 8 * (i + o + 2 * o + 2 * (3 * m + 2)) for i, o, m in layers)
    assert full - spectral == low - factors
    assert low < 0.2 * full


def test_a_network_of_this_kind_is_built_by_its_options_and_denoises_under_autocast() -> None:
    options = {
        "architecture": "uno",
        "channels": 1,
        "width": 8,
        "multipliers": [1, 2],
        "modes": 4,
        "periodic": "both",
        "resolution": [16, 16],
    }
    net = build_network(options)
    assert isinstance(net, UNO)
    assert net.resolution == (16, 16)
    denoise = EDMDenoiser(net, None)
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(denoise(x, 1.0), x / 2)
    assert denoise(torch.randn(2, 1, 48, 20), 1.0).shape == (2, 1, 48, 20)
    with torch.autocast("cpu", torch.bfloat16):
        found = network()(x.float().expand(2, 2, 16, 16), LABEL, x.float())
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": 0}, "modes=0 is not accepted"),
        ({"rank": 0}, "rank=0 is not accepted"),
        ({"periodic": "sphere"}, "periodic='sphere' is not accepted by a neural operator; it must be True, False or 'both'"),
        ({"resolution": 1}, "resolution=1 is not accepted"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        UNO(1, **options)  # type: ignore[arg-type]

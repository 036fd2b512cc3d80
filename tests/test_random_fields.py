"""Random fields against their kernels, and one field on many grids."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.special import j0

from xgenda.diffusion.coloured import ColouredNoise
from xgenda.diffusion.covariances import SphereKernel
from xgenda.diffusion.kernels import KINDS, Kernel
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.random_fields import PlaneField, TorusField
from xgenda.diffusion.spherical_fields import SphereField, power_by_degree
from xgenda.errors import GridError, OptionError

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = [Kernel(k, 0.3 if k == "published" else 0.1, 0.9 if k == "matern" else None) for k in KINDS]


def stream(*members: int, seed: int = 0) -> NoiseStream:
    return NoiseStream([(seed, "t", m) for m in members])


def lags(shape: tuple[int, int], steps: tuple[float, float], torus: bool) -> torch.Tensor:
    axes = []
    for n, step in zip(shape, steps, strict=True):
        k = torch.arange(n)
        axes.append((torch.minimum(k, n - k) if torus else k).double() * step)
    return torch.hypot(axes[0][:, None], axes[1])


@pytest.mark.parametrize("kernel", ALL, ids=KINDS)
def test_density_is_the_transform_of_the_kernel(kernel: Kernel) -> None:
    for k in (0.0, 3.0, 17.0):
        found = quad(
            lambda r, k=k: 2 * math.pi * r * float(kernel(torch.tensor(r))) * j0(k * r), 0, kernel.reach(), limit=2000, epsabs=1e-9
        )[0]  # fmt: skip
        assert float(kernel.density(torch.tensor(k))) == pytest.approx(found, rel=1e-4, abs=1e-7)


def test_kernels_meet_where_they_are_the_same() -> None:
    r = torch.linspace(0, 2, 41)
    for nu, kind in ((0.5, "exponential"), (1.5, "matern32"), (2.5, "matern52")):
        torch.testing.assert_close(Kernel("matern", 0.4, nu + 1e-9)(r), Kernel(kind, 0.4)(r), atol=1e-7, rtol=0)
    torch.testing.assert_close(Kernel("published", 0.05)(r), torch.exp(-r.double() / 0.005))


@pytest.mark.parametrize("kernel", ALL, ids=KINDS)
@pytest.mark.parametrize("shape", [(16, 24), (15, 9)])
def test_covariance_on_a_torus_is_the_kernel_around_it(kernel: Kernel, shape: tuple[int, int]) -> None:
    """Also where the grid is far too coarse for the kernel; ways around the torus are summed."""
    field = TorusField(shape, kernel, size=(2.0, 3.0), std=1.5)
    y = torch.arange(shape[0], dtype=torch.float64) * (2.0 / shape[0])
    x = torch.arange(shape[1], dtype=torch.float64) * (3.0 / shape[1])
    around = torch.zeros(shape, dtype=torch.float64)
    for i in range(-4, 5):
        for j in range(-4, 5):
            around += kernel(torch.hypot((y + 2.0 * i)[:, None], x + 3.0 * j))
    torch.testing.assert_close(field.covariance(), 2.25 * around / around[0, 0], atol=1e-7, rtol=0)
    assert float(field.covariance()[0, 0]) == pytest.approx(2.25, abs=1e-12)
    assert field.left_out == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kernel", ALL, ids=KINDS)
def test_covariance_on_a_plane_is_the_kernel(kernel: Kernel) -> None:
    field = PlaneField((12, 20), kernel, spacing=(0.05, 0.03), std=2.0)
    torch.testing.assert_close(field.covariance(), 4 * kernel(lags((12, 20), (0.05, 0.03), False)), atol=1e-8, rtol=0)
    # K as a matrix, by its columns and by its blocks
    matrix = field.apply(torch.eye(240, dtype=torch.float64).reshape(240, 12, 20)).reshape(240, 240)
    cells = torch.arange(240)
    torch.testing.assert_close(matrix, field.block(cells[:, None], cells), atol=1e-8, rtol=0)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-8


def test_a_plane_that_no_torus_embeds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgenda.diffusion.random_fields.LARGEST_EMBEDDING", 2000)
    with pytest.raises(GridError, match="is too long for 10 x 10 cells 0.1 x 0.1 apart.*not positive.*a length of at most 0.354"):
        PlaneField((10, 10), Kernel("gaussian", 1.0), spacing=(0.1, 0.1))
    PlaneField((10, 10), Kernel("gaussian", 0.3), spacing=(0.1, 0.1))


def test_drawn_fields_have_the_covariance_of_the_kernel() -> None:
    """All lags, within 4.5 standard errors of 4,000 draws; the plane does not wrap."""
    for field in (TorusField((8, 12), Kernel("matern32", 0.2)), PlaneField((8, 12), Kernel("exponential", 4.0))):
        draws = field.draw(stream(*range(4000)))
        assert draws.dtype == torch.float64
        found = torch.cov(draws.flatten(1).T)
        cells = torch.arange(96)
        exact = field.block(cells[:, None], cells)
        error = ((exact**2 + 1) / 4000).sqrt()
        assert ((found - exact) / error).abs().max() < 4.5
        assert (((found - exact) / error) ** 2).mean().sqrt() < 1.15


def test_root_is_a_root() -> None:
    torus = TorusField((9, 12), Kernel("matern52", 0.2))
    white = torch.randn(3, 2, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(torus.root(torus.root(white)), torus.apply(white))
    plane = PlaneField((5, 6), Kernel("matern32", 3.0))
    eye = torch.eye(plane.torus[0] * plane.torus[1], dtype=torch.float64)
    columns = plane.root(eye.reshape(-1, *plane.torus)).flatten(1)
    cells = torch.arange(30)
    torch.testing.assert_close(columns.T @ columns, plane.block(cells[:, None], cells), atol=1e-9, rtol=0)
    assert torus.apply(white.float()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(32, 32), (33, 35), (48, 64), (128, 128)])
def test_one_seed_is_one_function_on_every_grid(shape: tuple[int, int]) -> None:
    """With a cutoff fields are the same function: its Fourier coefficients do not depend on the grid."""
    field = TorusField((64, 64), Kernel("matern32", 0.1), cutoff=15, std=2.0)
    other = field.on(shape)
    assert float(other.covariance()[0, 0]) == pytest.approx(4.0)
    a, b = (torch.fft.fft2(f.draw(stream(3, 7), 2), norm="forward") for f in (field, other))
    k = torch.arange(-15, 16)
    torch.testing.assert_close(a[..., k[:, None], k], b[..., k[:, None], k], atol=1e-12, rtol=0)
    left = a.clone()
    left[..., k[:, None], k] = 0
    assert left.abs().max() < 1e-12


def test_a_finer_grid_refines() -> None:
    """Waves of a rough field that both grids show are equal, where those that the coarse one cannot show are left out."""
    coarse = TorusField((32, 48), Kernel("exponential", 0.05), folded=False)
    fine = coarse.on((64, 96))
    assert 0.05 < fine.left_out < coarse.left_out < 0.5
    a, b = (torch.fft.fft2(f.draw(stream(0)), norm="forward") for f in (coarse, fine))
    y, x = torch.arange(-15, 16)[:, None], torch.arange(-23, 24)
    torch.testing.assert_close(a[..., y, x], b[..., y, x], atol=1e-12, rtol=0)
    # folded: of the same phase, with what the waves that look alike are worth
    c, d = (torch.fft.fft2(TorusField(f.shape, f.kernel).draw(stream(0)), norm="forward") for f in (coarse, fine))
    ratio = c[..., y, x] / d[..., y, x]
    assert ratio.imag.abs().max() < 1e-9
    assert ratio.real.min() > 1 - 1e-9


def test_members_depend_on_nothing_but_their_key() -> None:
    for field in (TorusField((16, 20), Kernel()), PlaneField((10, 9), Kernel("exponential", 2.0))):
        together = field.draw(stream(0, 1, 2, 3), 2)
        torch.testing.assert_close(together[2:3], field.draw(stream(2), 2), atol=1e-13, rtol=0)
        torch.testing.assert_close(together[[3, 0]], field.draw(stream(3, 0), 2), atol=1e-13, rtol=0)
        assert (together[0] - together[1]).abs().min() > 0
        assert not torch.allclose(together[:, 0], together[:, 1])


def test_coloured_noise_is_the_same_function_at_every_draw() -> None:
    field = TorusField((16, 16), Kernel("gaussian", 0.2), cutoff=7)
    keys = [[(0, "a", 0)], [(0, "b", 0)]]
    coarse, fine = ColouredNoise(keys, field), ColouredNoise(keys, field.on((32, 32)))
    first = coarse.normal(1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(first[:, 0], field.draw(NoiseStream([k[0] for k in keys])))
    draws = [first, *(coarse.normal(1, 16, 16, dtype=torch.float64) for _ in range(2))]
    for draw in draws:
        torch.testing.assert_close(draw, fine.normal(1, 32, 32, dtype=torch.float64)[..., ::2, ::2], atol=1e-12, rtol=0)
    assert not torch.allclose(draws[0], draws[1], atol=0.1)
    assert not torch.allclose(draws[1][0], draws[1][1], atol=0.1)
    parts = ColouredNoise([[(0, "a", 0), (0, "b", 0)]], field).normal(2, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(parts[0], first)
    with pytest.raises(GridError, match=r"has \(16, 16\) cells, and noise for \(8, 8\)"):
        coarse.normal(1, 8, 8)


def test_the_highest_noise_drowns_the_prior_in_every_wave() -> None:
    rough, smooth = (TorusField((32, 32), Kernel(k, 0.1)) for k in ("exponential", "matern52"))
    level = rough.highest_sigma(smooth.power)
    assert (rough.power * level**2 >= 99.9 * smooth.power).all()
    assert level < 20  # set by the longest waves
    assert smooth.highest_sigma(rough.power, share=1e-9) > 100  # set by the shortest
    with pytest.raises(OptionError, match=r"is smoother than the prior.*noise=\{'kind': 'exponential'"):
        TorusField((32, 32), Kernel("gaussian", 0.1)).highest_sigma(rough.power)
    with pytest.raises(OptionError, match="cutoff=3 leaves out waves that hold 46% of the variance.*up to 15, or none"):
        TorusField((32, 32), Kernel("exponential", 0.1), cutoff=3).highest_sigma(rough.power)
    cut = TorusField((32, 32), Kernel("exponential", 0.1), cutoff=9)
    assert (cut.power * cut.highest_sigma(smooth.power) ** 2 >= 99.9 * smooth.power)[cut.power > 0].all()
    fields = rough.draw(stream(0))
    lost = torch.fft.rfft2(fields - cut.limited(fields), norm="forward").abs()
    assert lost[cut.power.expand_as(lost) > 0].max() < 1e-12
    assert torch.fft.rfft2(cut.limited(fields), norm="forward").abs()[cut.power.expand_as(lost) == 0].max() < 1e-12
    assert rough.limited(fields) is fields


LATITUDE, LONGITUDE = torch.linspace(-84, 84, 15), torch.arange(0, 360, 30.0)


@pytest.mark.parametrize("kind", ["exponential", "matern32", "matern52", "gaussian"])
def test_power_on_the_sphere_is_that_of_the_kernel(kind: str) -> None:
    """The sum over degrees is the kernel, at great-circle distances for 'exponential' and chords for the others."""
    kernel, radius = Kernel(kind, 0.5), 1.0
    power = power_by_degree(kernel, 1200, radius)
    assert float(power.sum()) == pytest.approx(1, abs=2e-3 if kind == "exponential" else 1e-5)
    assert (power >= 0).all()
    field = SphereField(LATITUDE, LONGITUDE, kernel, radius=radius, cutoff=1200)
    angle = torch.linspace(0, math.pi, 19, dtype=torch.float64)
    expected = kernel(angle if kind == "exponential" else 2 * (angle / 2).sin())
    torch.testing.assert_close(field.correlation_at(angle.cos()), expected, atol=2e-3 if kind == "exponential" else 1e-5, rtol=0)


def test_covariance_on_the_sphere_is_a_function_of_distance() -> None:
    """Harmonics of every order add up to the Legendre polynomial of the angle, poles included; as the covariance in blocks."""
    latitude = torch.tensor([-90.0, -60.0, -7.5, 0.0, 33.0, 90.0])
    longitude = torch.tensor([0.0, 100.0, 350.0])
    field = SphereField(latitude, longitude, Kernel("matern32", 3e6), cutoff=30, std=1.5)
    matrix = field.apply(torch.eye(18, dtype=torch.float64).reshape(18, 6, 3)).reshape(18, 18)
    cells = torch.arange(18)
    torch.testing.assert_close(matrix, field.block(cells[:, None], cells), atol=1e-10, rtol=0)
    torch.testing.assert_close(matrix.diagonal(), torch.full((18,), 2.25, dtype=torch.float64))
    other = SphereKernel(latitude, longitude, "matern32", 3e6)
    assert (matrix / 2.25 - other.correlation(cells, cells)).abs().max() < 2 * field.left_out
    draws = field.draw(stream(*range(3000))).flatten(1)
    error = ((matrix**2 + 2.25**2) / 3000).sqrt()
    assert ((torch.cov(draws.T) - matrix) / error).abs().max() < 4.5


def test_a_higher_degree_adds_to_a_field_on_the_sphere() -> None:
    kernel = Kernel("gaussian", 2e6)
    fields = [SphereField(a, b, kernel, cutoff=40) for a, b in ((LATITUDE, LONGITUDE), (LATITUDE[::2], LONGITUDE[3:]))]
    whole, part = (f.draw(stream(4, 5), 2) for f in fields)
    torch.testing.assert_close(whole[..., ::2, 3:], part, atol=1e-12, rtol=0)
    more = SphereField(LATITUDE, LONGITUDE, kernel, cutoff=60).draw(stream(4, 5), 2)
    torch.testing.assert_close(more, whole, atol=1e-4, rtol=0)  # the kernel has next to nothing there
    assert SphereField(torch.linspace(-89, 89, 90), LONGITUDE, kernel).cutoff == 89


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Kernel("matern33"), "kind='matern33' is not accepted.*Did you mean 'matern32'"),
        (lambda: Kernel("matern"), r"nu=None is not accepted with kind='matern'.*nu=1.0"),
        (lambda: Kernel("gaussian", nu=1.0), "belongs to kind='matern'"),
        (lambda: Kernel(length=0.0), "length=0.0 is not accepted"),
        (lambda: TorusField((8, 8), Kernel(), std=-1), "std=-1 is not accepted"),
        (lambda: TorusField((8, 8), Kernel(), size=(1.0, 0.0)), "size=0.0 is not accepted"),
        (lambda: TorusField((8, 8), Kernel(), cutoff=0), "cutoff=0 is not accepted"),
        (lambda: TorusField((8, 0), Kernel()), "shape=0 is not accepted"),
        (lambda: SphereField(LATITUDE, LONGITUDE, Kernel(), cutoff=2000), "cutoff=2000 is not accepted"),
        (lambda: SphereField(LATITUDE * 2, LONGITUDE, Kernel()), "between -90 and 90"),
        (lambda: SphereField(LATITUDE[:1], LONGITUDE, Kernel()), "pass cutoff"),
        (lambda: TorusField((8, 8), Kernel()).apply(torch.zeros(4, 4)), r"x has \(4, 4\) cells, and the field has \(8, 8\)"),
        (lambda: PlaneField((8, 8), Kernel()).root(torch.zeros(8, 8)), r"white noise on the torus of \(16, 16\) is needed"),
    ],
)
def test_what_is_no_field(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((GridError, OptionError), match=message):
        call()

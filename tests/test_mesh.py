"""The mesh network: counts and geometry of the multi-mesh, symmetries of the network, poles of the U-Net, weights of the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import xgenda
from xgenda.curvilinear import CurvilinearGrid
from xgenda.devices import resolve_device
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.memory import MemoryTracker, call_cost, step_cost
from xgenda.errors import GridError, OptionError
from xgenda.grids import Grid
from xgenda.models.diffusive import build_network
from xgenda.models.variables import VariableSpec
from xgenda.networks.icosahedron import GridMesh, Icosphere, icosahedron, suitable_refinement, undirected
from xgenda.networks.mesh import MeshNet
from xgenda.networks.unet import UNet, pad_field
from xgenda.spherical import great_circle, polygon_areas, unit_vectors
from xgenda.training.objectives import Denoising, Draws
from xgenda.training.optimiser import Effort, Optimiser
from xgenda.training.priors import network_arguments
from xgenda.training.processes import Single
from xgenda.training.weighting import loss_weights
from xgenda.training.windows import Samples

LAT, LON = np.linspace(-88.0, 88.0, 45), 4.0 * np.arange(90)


def mesh_net(seed: int = 0, lat: np.ndarray = LAT, lon: np.ndarray = LON, **options: object) -> MeshNet:
    """Return a network that says something."""
    torch.manual_seed(seed)
    given: dict[str, object] = {"width": 16, "refinement": 2, "rounds": 2, **options}
    net = MeshNet(2, 1, latitude=lat.tolist(), longitude=lon.tolist(), **given)  # type: ignore[arg-type]
    torch.manual_seed(seed + 1)
    torch.nn.init.normal_(net.last.weight)
    return net.eval()


def given(net: MeshNet, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, c = (torch.randn(batch, k, *net.shape, generator=generator).to(dtype) for k in (2, 1))
    return x, torch.linspace(-1.0, 1.0, batch, dtype=dtype), c


# -- geometry ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refinement", range(5))
def test_counts_of_the_multi_mesh(refinement: int) -> None:
    sphere = Icosphere.of(refinement)
    assert len(sphere.nodes) == 10 * 4**refinement + 2
    assert [len(f) for f in sphere.faces] == [20 * 4**r for r in range(refinement + 1)]
    edges = [undirected(f) for f in sphere.faces]
    assert [len(e) for e in edges] == [30 * 4**r for r in range(refinement + 1)]
    assert len(np.unique(np.concatenate(edges), axis=0)) == sum(map(len, edges))  # levels share nodes and no edges
    np.testing.assert_allclose(np.linalg.norm(sphere.nodes, axis=1), 1.0, rtol=1e-14)
    areas = polygon_areas(sphere.nodes[sphere.faces[-1]])
    assert areas.min() > 0  # counterclockwise
    assert areas.sum() == pytest.approx(4 * np.pi, rel=1e-12)
    assert np.bincount(edges[-1].ravel()).min() == 5  # the twelve corners; six elsewhere
    assert (np.bincount(edges[-1].ravel()) == 5).sum() == 12


def test_the_published_counts() -> None:
    # Lam et al. (2023): 40,962 nodes and 327,660 directed edges; 1,618,824 edges from a grid of 721 x 1440 to them, 3,114,720 back
    sphere = Icosphere.of(6)
    assert len(sphere.nodes) == 40_962
    assert 2 * sum(len(undirected(f)) for f in sphere.faces) == 327_660
    graph = GridMesh.of(np.linspace(-90, 90, 721), 0.25 * np.arange(480), 6)  # the other two thirds are as this one
    assert 3 * graph.up.shape[1] == 1_618_824
    assert 3 * graph.down.size == 3_114_720
    assert (np.bincount(graph.up[0]) >= 1).all()
    assert suitable_refinement(np.linspace(-90, 90, 721), 0.25 * np.arange(1440)) == 6


def test_the_icosahedron_is_regular_and_stands_on_a_triangle() -> None:
    nodes, faces = icosahedron()
    edges = undirected(faces)
    angle = great_circle(nodes[edges[:, 0]], nodes[edges[:, 1]])
    np.testing.assert_allclose(angle, np.arctan(2.0), rtol=1e-12)
    for turn in (np.radians(120.0), np.radians(240.0)):
        c, s = np.cos(turn), np.sin(turn)
        turned = nodes @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        assert np.linalg.norm(turned[:, None] - nodes, axis=-1).min(1).max() < 1e-12
    assert np.abs(nodes[:, 2]).max() < 0.8


@pytest.mark.parametrize(
    ("lat", "lon"),
    [
        (np.linspace(-90, 90, 37), 5.0 * np.arange(72)),
        (LAT, LON - 180.0),
        (np.linspace(30, 50, 21), np.linspace(170, 195, 26)),  # across the date line
        (np.linspace(60, 90, 31), 10.0 * np.arange(36)),
        (np.array([10.0]), np.array([20.0])),
    ],
)
def test_each_point_lies_in_its_triangle(lat: np.ndarray, lon: np.ndarray) -> None:
    refinement = 3
    graph = GridMesh.of(lat, lon, refinement)
    points = unit_vectors(*(c.ravel() for c in np.meshgrid(lat, lon, indexing="ij")))
    nodes = unit_vectors(graph.nodes[:, 0], graph.nodes[:, 1])
    assert graph.barycentric.min() > -1e-5
    np.testing.assert_allclose(graph.barycentric.sum(1), 1.0)
    flat = np.einsum("pk,pkc->pc", graph.barycentric, nodes[graph.down])  # on the plane, under the point
    np.testing.assert_allclose(flat / np.linalg.norm(flat, axis=1, keepdims=True), points, atol=1e-12)
    # each point speaks to a node within reach, each node hears a mean
    longest = Icosphere.of(refinement).longest(refinement)
    assert np.array_equal(np.unique(graph.up[0]), np.arange(len(points)))
    distance = np.linalg.norm(points[graph.up[0]] - nodes[graph.up[1]], axis=1)
    assert distance.max() <= 0.6 * longest
    np.testing.assert_allclose(np.bincount(graph.up[1], graph.up_weights)[np.unique(graph.up[1])], 1.0)
    # as many as a search of all pairs finds
    every = np.linalg.norm(points[:, None] - nodes, axis=-1) <= 0.6 * longest
    assert every.sum() == graph.up.shape[1]
    # a region keeps what is around it
    assert graph.edges.max() < len(nodes)
    if lon.max() - lon.min() < 300:
        assert len(nodes) < 642 / 4
    assert np.isin(np.unique(graph.down), np.unique(graph.edges)).all()


def test_features_are_relative_to_the_receiver() -> None:
    graph = GridMesh.of(LAT, LON, 2)
    longest = Icosphere.of(2).longest(2)
    points = np.stack([c.ravel() for c in np.meshgrid(LAT, LON, indexing="ij")], 1)
    p, node = 45 * 90 // 2, graph.down[45 * 90 // 2, 0]
    (lat, lon), (phi, lam) = np.radians(points[p]), np.radians(graph.nodes[node])
    east = np.cos(phi) * np.sin(lam - lon)
    north = np.sin(phi) * np.cos(lat) - np.cos(phi) * np.sin(lat) * np.cos(lam - lon)
    up = np.sin(phi) * np.sin(lat) + np.cos(phi) * np.cos(lat) * np.cos(lam - lon) - 1
    np.testing.assert_allclose(graph.down_features[p, 0, :3], np.array([up, east, north]) / longest, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(graph.edge_features[:, :3], axis=1).max(), 1.0)  # of each refinement its longest


# -- the network -------------------------------------------------------------------------------------------------------------------


def test_it_starts_from_nothing() -> None:
    net = MeshNet(2, 1, latitude=LAT, longitude=LON, width=8, refinement=1)
    x, label, c = given(net)
    assert torch.equal(net(x, label, c), torch.zeros_like(x))
    out = net(x, label, c).sum()
    out.backward()
    assert all(p.grad is not None for p in net.parameters())  # as several processes need


def test_a_turn_of_the_mesh_turns_the_result() -> None:
    net = mesh_net(absolute=False).double()
    x, label, c = given(net, dtype=torch.float64)
    for columns in (30, 60):  # 120 and 240 degrees
        turned = net(x.roll(columns, -1), label, c.roll(columns, -1))
        torch.testing.assert_close(turned, net(x, label, c).roll(columns, -1), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(net(x.roll(10, -1), label, c.roll(10, -1)), net(x, label, c).roll(10, -1), atol=1e-3)


def test_the_date_line_is_nowhere() -> None:
    one, other = mesh_net(), mesh_net(lon=LON - 180.0)
    x, label, c = given(one)
    found = other(x.roll(45, -1), label, c.roll(45, -1)).roll(-45, -1)
    torch.testing.assert_close(found, one(x, label, c), atol=2e-4, rtol=1e-3)
    # and what happens beside it is felt on its other side
    change = x.clone()
    change[..., 22, -1] += 1
    assert (one(change, label, c) - one(x, label, c))[..., 22, :3].abs().max() > 1e-3


def test_pieces_and_batches_change_nothing() -> None:
    net = mesh_net(position=1)
    x, label, c = given(net, 3)
    with torch.no_grad():
        whole = net(x, label, c)
        each = torch.cat([net(x[k : k + 1], label[k : k + 1], c[k : k + 1]) for k in range(3)])
        net.in_pieces(1000)
        torch.testing.assert_close(net(x, label, c), whole, atol=1e-4, rtol=1e-4)
        net.one_at_a_time = True
        torch.testing.assert_close(net(x, label, c), whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(each, whole, atol=1e-4, rtol=1e-4)
        own = net.position_channels()
        assert own is not None
        torch.testing.assert_close(net(x, label, c, own[None]), net(x, label, c))
        assert not torch.allclose(net(x, label, c, own[None] + 1), whole, atol=1e-3)


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        net = mesh_net(checkpointing=checkpointing, position=2).train()
        net.in_pieces(1500)
        x, label, c = given(net)
        (net(x, label, c) - x).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_precision() -> None:
    net = mesh_net()
    x, label, c = given(net)
    with torch.no_grad():
        single = net(x, label, c)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x, label, c)
        double = net.double()(x.double(), label.double(), c.double())
    scale = float(double.std())
    assert float((single - double).abs().max()) < 1e-4 * scale
    assert float((half - double).abs().double().mean()) < 0.05 * scale


def test_it_is_built_from_what_is_stored() -> None:
    net = mesh_net(position=1)
    stored = {"architecture": "mesh", **net.arguments}
    assert not [k for k in net.state_dict() if k in dict(net.named_buffers())]  # the grid gives the graph
    other = build_network(stored)
    assert isinstance(other, MeshNet)
    other.load_state_dict(net.state_dict())
    x, label, c = given(net)
    assert torch.equal(other(x, label, c), net(x, label, c))
    other.scale_output(0.5)
    torch.testing.assert_close(other(x, label, c), 0.5 * net(x, label, c))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"latitude": LAT[::-1]}, GridError, "latitude of a mesh network must be one ascending axis"),
        ({"latitude": np.zeros((3, 4))}, GridError, "architecture='unet', or interpolate first"),
        ({"latitude": [80.0, 95.0]}, GridError, "within 180 degrees"),
        ({"longitude": [0.0, np.nan]}, GridError, "longitude of a mesh network"),
        ({"longitude": np.linspace(0, 400, 90)}, GridError, "within 360 degrees"),
        ({"refinement": 9}, OptionError, "refinement=9 is not accepted; it must be at most 8"),
        ({"rounds": 0}, OptionError, "rounds=0 is not accepted"),
        ({"checkpointing": 1}, OptionError, "checkpointing=1 is not accepted"),
    ],
)
def test_what_is_no_mesh(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MeshNet(1, **{"latitude": LAT, "longitude": LON, **options})  # type: ignore[arg-type]


def test_parts_of_the_grid_are_refused() -> None:
    net = mesh_net()
    x, label, c = given(net)
    with pytest.raises(GridError, match="of a grid of 45 x 90 cells, and got 20 x 90"):
        net(x[..., :20, :], label, c[..., :20, :])


# -- the poles of the U-Net --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "lat"), [("sphere", np.linspace(-88, 88, 45)), ("poles", np.linspace(-90, 90, 46))])
def test_latitude_goes_on_across_the_poles(kind: str, lat: np.ndarray) -> None:
    points = unit_vectors(*np.meshgrid(lat, LON, indexing="ij"))
    field = torch.as_tensor(points @ [0.3, -0.5, 0.8])
    padded = pad_field(field[None, None], 2, 2, 2, 2, kind)[0, 0]  # type: ignore[arg-type]
    step = lat[1] - lat[0]
    further = np.concatenate([lat[0] - step * np.array([2, 1]), lat, lat[-1] + step * np.array([1, 2])])
    everywhere = unit_vectors(
        *np.meshgrid(further, np.arange(-8.0, 368.0, 4.0), indexing="ij")
    )  # beyond 90 degrees is the other side
    np.testing.assert_allclose(padded.numpy(), everywhere @ [0.3, -0.5, 0.8], atol=1e-12)


@pytest.mark.parametrize("kind", ["sphere", "poles", True])
def test_the_network_turns_with_its_grid(kind: bool | str) -> None:
    torch.manual_seed(0)
    net = UNet(2, 1, width=8, periodic=kind).double().eval()  # type: ignore[arg-type]
    torch.nn.init.normal_(net.last.conv.weight)
    x, c = torch.randn(2, 2, 20, 32, dtype=torch.float64), torch.randn(2, 1, 20, 32, dtype=torch.float64)
    label = torch.zeros(2, dtype=torch.float64)
    for columns in (4, 16):
        turned = net(x.roll(columns, -1), label, c.roll(columns, -1))
        torch.testing.assert_close(turned, net(x, label, c).roll(columns, -1), atol=1e-10, rtol=1e-10)
    # a change beside the pole reaches the meridian on the other side at once
    change = x.clone()
    change[..., -1, 0] += 1
    reached = (net(change, label, c) - net(x, label, c))[..., -1, :].detach().abs().amax((0, 1))
    assert (float(reached[16]) > 0.1 * float(reached[0])) == (kind is not True)


def test_which_grids_go_around_the_sphere() -> None:
    def kind(lat: np.ndarray, lon: np.ndarray) -> object:
        grid = Grid(lat, lon)
        samples = Samples(np.zeros((0, 1, *grid.plane)), None, grid, (VariableSpec("t"),), "time")
        return network_arguments(1, 0, 16, samples)["periodic"]

    assert kind(np.linspace(-88.75, 88.75, 72), 2.5 * np.arange(144)) == "sphere"
    assert kind(np.linspace(-90, 90, 73), 2.5 * np.arange(144)) == "poles"
    assert kind(np.linspace(-90, 90, 73), 5.0 * np.arange(72)) == "poles"
    assert kind(np.linspace(-90, 90, 19), 10.0 * np.arange(36)) is True  # 36 columns: their halves of halves are not even
    assert kind(np.linspace(-60, 60, 49), 2.5 * np.arange(144)) is True
    assert kind(np.linspace(-90, 60, 61), 2.5 * np.arange(144)) is True
    assert kind(np.linspace(30, 60, 13), 2.5 * np.arange(20)) is False


def test_columns_without_a_meridian_across_the_pole() -> None:
    with pytest.raises(GridError, match="needs a multiple of 8 columns for this network.*20 x 36"):
        UNet(1, periodic="sphere")(torch.zeros(1, 1, 20, 36), torch.zeros(1))


# -- weights of the loss -----------------------------------------------------------------------------------------------------------

GLOBE, STRIP = Grid(LAT, LON), Grid(np.linspace(35, 70, 8), np.linspace(0, 40, 9))
LEVELS = tuple(VariableSpec(n) for n in ("t@85000Pa", "t@50000Pa", "t@15000Pa", "msl"))


def test_cells_count_by_their_area() -> None:
    found = loss_weights("auto", LEVELS[:1], GLOBE)
    assert found is not None
    band = np.sin(np.radians(LAT + 2.0)) - np.sin(np.radians(LAT - 2.0))
    np.testing.assert_allclose(found[0].numpy(), np.broadcast_to((band / band.mean())[:, None], (45, 90)), rtol=1e-5)
    assert float(found.mean()) == pytest.approx(1.0, abs=1e-6)
    for weights, grid in (("none", GLOBE), ("auto", STRIP), ("auto", Grid(np.linspace(-50, 50, 26), LON))):
        assert loss_weights(weights, LEVELS[:1], grid) is None
    strip = loss_weights("area", LEVELS[:1], STRIP)
    assert strip is not None
    assert float(strip[0, 0, 0] / strip[0, -1, 0]) == pytest.approx(np.cos(np.radians(35)) / np.cos(np.radians(70)), rel=1e-3)


def test_levels_count_by_their_pressure() -> None:
    found = loss_weights("pressure", LEVELS, STRIP, window=3)
    assert found is not None
    assert found.shape == (12, 8, 9)
    np.testing.assert_allclose(found[:4, 0, 0].numpy(), [1.7, 1.0, 0.3, 1.0], rtol=1e-6)
    assert torch.equal(found[4:8], found[:4])
    mine = loss_weights({"t": 2.0, "t@15000Pa": 0.5}, LEVELS, STRIP)
    assert mine is not None
    np.testing.assert_allclose(mine[:, 0, 0].numpy(), np.array([2.0, 2.0, 0.5, 1.0]) / 1.375, rtol=1e-6)


def test_masked_cells_do_not_move_the_mean() -> None:
    valid = np.ones((1, *GLOBE.plane), dtype=bool)
    valid[:, :20] = False
    found = loss_weights("auto", LEVELS[:1], GLOBE, valid)
    assert found is not None
    assert float(found[torch.as_tensor(valid)].mean()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("pressure", "needs variables on pressure levels, and ds has \\['msl'\\]"),
        ({"t2m": 1.0}, "weights has \\['t2m'\\], and the variables are \\['msl'\\]"),
    ],
)
def test_weights_of_nothing(weights: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        loss_weights(weights, LEVELS[3:], GLOBE)  # type: ignore[arg-type]


def test_training_and_validation_use_the_weights() -> None:
    # a network that is a constant: the weight that it earns, and the losses, are those of a weighted mean
    torch.manual_seed(0)
    weights = torch.tensor([0.2, 0.6, 1.4, 1.8])[None, :, None].expand(1, 4, 8).contiguous()
    states = torch.randn(40, 1, 4, 8) * torch.tensor([2.0, 1.0, 0.5, 0.1])[:, None]
    net = UNet(1, width=8, multipliers=(1,))
    torch.nn.init.constant_(net.last.conv.bias, 0.3)  # type: ignore[arg-type]
    objective = Denoising(states, torch.zeros(40, dtype=torch.long), None, 0.5, 2.0, weights=weights)
    how = Optimiser(Effort(None, 1, None), 8, 1e-12, None, 0, False, Single(resolve_device("cpu")))
    held = torch.arange(30, 40)
    report = how.fit(net, objective, torch.arange(30), held, 1.0, "prior")
    checks = [objective.batch(held, states[held], Draws(1000 + k, 0, 10)) for k in range(4)]
    targets = torch.stack([b.target for b in checks]).double()
    assert report["validation_without"] == pytest.approx(float((weights * targets**2).mean()), rel=1e-5)
    assert report["validation_start"] == pytest.approx(float((weights * (0.3 - targets) ** 2).mean()), rel=1e-5)
    assert report["validation_start"] != pytest.approx(float(((0.3 - targets) ** 2).mean()), rel=1e-3)


# -- through train -----------------------------------------------------------------------------------------------------------------


def globe(count: int = 24, ny: int = 8, nx: int = 16, names: tuple[str, ...] = ("t",)) -> xr.Dataset:
    """Return random smooth fields on the sphere."""
    rng = np.random.default_rng(0)
    lat, lon = (np.arange(ny) + 0.5) * 180 / ny - 90, 360 / nx * np.arange(nx)
    points = unit_vectors(*np.meshgrid(lat, lon, indexing="ij"))
    centres = rng.normal(size=(count, len(names), 5, 3))
    centres /= np.linalg.norm(centres, axis=-1, keepdims=True)
    fields = np.exp(4 * (np.einsum("nvkc,yxc->nvkyx", centres, points) - 1)).sum(2)
    time = np.datetime64("2000-01-01", "ns") + np.timedelta64(30, "D") * np.arange(count)
    dims = ("time", "latitude", "longitude")
    data = {name: (dims, fields[:, k], {"units": "K"}) for k, name in enumerate(names)}
    return xr.Dataset(data, coords={"time": time, "latitude": lat, "longitude": lon})


@pytest.mark.filterwarnings("ignore::xgenda.errors.LittleDataWarning")
def test_a_prior_with_a_mesh(tmp_path: Path) -> None:
    ds = globe()
    options = {"refinement": 1, "rounds": 1, "checkpointing": True}
    model = xgenda.train(
        ds,
        architecture="mesh",
        network_options=options,
        steps=3,
        width=8,
        batch_size=8,
        out=tmp_path / "m.safetensors",
        progress=False,
    )
    stored = model.spec.options["network"]
    assert {k: stored[k] for k in ("architecture", "refinement", "rounds", "width")} == {
        "architecture": "mesh", "refinement": 1, "rounds": 1, "width": 8,
    }  # fmt: skip
    assert model.spec.training["asked"]["weights"] == "auto"
    read = xgenda.load_model(tmp_path / "m.safetensors")
    now = ds.isel(time=[3])
    obs = now.isel(latitude=slice(None, None, 3), longitude=slice(None, None, 3))
    found = [now.genda.assimilate(obs, model=m, error=0.1, members=2, steps=4, seed=0) for m in (model, read)]
    xr.testing.assert_identical(found[0].t.drop_attrs(), found[1].t.drop_attrs())
    # layers know nothing of the grid: another resolution, and one more variable
    tuned = xgenda.train(globe(ny=12, nx=24, names=("t", "q")), start=read, steps=2, batch_size=8, progress=False)
    said = tuned.spec.training
    assert said["transfer_new_outputs"] == 1
    assert "in part" in said["transfer_tensors"]
    network = tuned.denoiser.network
    assert isinstance(network, MeshNet)
    assert network.shape == (12, 24)
    with pytest.raises(OptionError, match="architecture='songunet' belongs to task='downscale'"):
        xgenda.train(ds, start=read, architecture="songunet", steps=1)
    with pytest.raises(OptionError, match=r"network_options has \['rounds'\], which have no effect with start"):
        xgenda.train(ds, start=read, architecture="mesh", network_options={"rounds": 2}, steps=1)


@pytest.mark.filterwarnings("ignore::xgenda.errors.LittleDataWarning")
def test_a_downscaler_with_a_mesh() -> None:
    model = xgenda.train(
        globe(), task="downscale", factor=2, architecture="mesh", anchor=None, steps=4, width=8, batch_size=8, progress=False,
        network_options={"refinement": 1, "rounds": 1}, calibrate=False,
    )  # fmt: skip
    coarse = globe().isel(time=[3]).coarsen(latitude=2, longitude=2).mean()
    fine = coarse.genda.downscale(model=model, members=2, steps=3, seed=0, progress=False)
    assert dict(fine.t.sizes) == {"member": 2, "time": 1, "latitude": 8, "longitude": 16}
    assert xgenda.plan(coarse, model=model, members=2, steps=3).memory > 0
    with pytest.raises(OptionError, match="has a mesh network, which sees the whole grid; leave out tile"):
        coarse.genda.downscale(model=model, members=2, steps=3, tile=4)
    with pytest.raises(OptionError, match="has a mesh network, which sees the whole grid; leave out chunks"):
        coarse.genda.downscale(model=model, members=2, steps=3, chunks=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "cosine"}, "weights='cosine' is not accepted; give 'auto', 'none', 'area' or 'pressure'"),
        ({"weights": {"t": 0.0}}, "a positive weight for each variable"),
        ({"weights": {"t2": 1.0}}, r"weights has \['t2'\], and the variables are \['t'\]"),
        ({"weights": "pressure"}, "needs variables on pressure levels"),
        ({"network_options": {"rounds": 2}}, "belongs to architecture='mesh'"),
        (
            {"architecture": "mesh", "network_options": {"depth": 2}},
            r"network_options has \['depth'\], which a mesh network does not take",
        ),
        (
            {"architecture": "mesh", "network_options": {"refinement": 1.5}},
            r"network_options\['refinement'\]=1.5 is not accepted",
        ),
        ({"architecture": "mesh", "network_options": 3}, "network_options=3 is not accepted; give a mapping"),
        ({"architecture": "mesh", "periodic": "both"}, "architecture='mesh' is for the sphere"),
        (
            {"architecture": "mesh", "task": "downscale", "factor": 2, "tile": 4},
            "architecture='mesh' sees the whole grid, which tile cuts",
        ),
        (
            {"task": "downscale", "factor": 2, "method": "bilinear", "architecture": "mesh"},
            "has no effect with method='bilinear'",
        ),
        ({"task": "downscale", "factor": 2, "method": "bilinear", "weights": "area"}, "has no effect with method='bilinear'"),
    ],
)
def test_options_of_train(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        xgenda.train(globe(), steps=1, progress=False, **options)  # type: ignore[arg-type]


def test_grids_without_a_mesh() -> None:
    y, x = np.meshgrid(np.linspace(40, 50, 8), np.linspace(0, 10, 9), indexing="ij")
    grid = CurvilinearGrid(y + 0.1 * x, x)
    samples = Samples(np.zeros((0, 1, 8, 9)), None, grid, (VariableSpec("t"),), "time")  # type: ignore[arg-type]
    with pytest.raises(GridError, match="architecture='mesh' needs latitude and longitude along one axis each"):
        network_arguments(1, 0, 16, samples, None, "mesh")
    with pytest.raises(OptionError, match="weights='area' needs a grid"):
        loss_weights("area", (VariableSpec("t"),), grid)


def test_a_denoiser_is_differentiable_in_its_state() -> None:
    # what guidance through the network needs
    net = mesh_net()
    denoiser = EDMDenoiser(net)
    x = given(net, 1)[0].requires_grad_()
    c = given(net, 1)[2]
    (gradient,) = torch.autograd.grad(denoiser(x, 0.5, c).sum(), x)
    assert float(gradient.abs().min()) > 0


# -- what it takes -----------------------------------------------------------------------------------------------------------------


def test_operations_of_a_call() -> None:
    assert call_cost(torch.nn.Linear(5, 7, bias=False), (3, 5)).flops == 2 * 3 * 5 * 7
    cost = call_cost(torch.nn.Linear(5, 7, bias=False), (3, 5))
    assert cost.weights == 4 * (5 * 7 + 3 * 5)
    assert cost.seconds(210.0, 8.4) == pytest.approx(1.0 + cost.traffic / 8.4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_predicted_without_numbers(checkpointing: bool) -> None:
    small = {"lat": np.linspace(-88, 88, 23), "lon": 8.0 * np.arange(45), "rounds": 1, "refinement": 1}
    net = mesh_net(checkpointing=checkpointing, **small).train()  # type: ignore[arg-type]
    net.in_pieces(300)
    x, label, c = given(net, 1)
    shapes = tuple(x.shape), tuple(label.shape), tuple(c.shape)
    plan = step_cost(net, *shapes)
    with MemoryTracker() as tracker:  # with numbers
        net(x, label, c).square().mean().backward()
    assert plan.memory == pytest.approx(tracker.peak, rel=0.02)
    with torch.no_grad(), MemoryTracker() as tracker:
        net(x, label, c)
    assert call_cost(net, *shapes).memory == pytest.approx(tracker.peak, rel=0.02)
    if checkpointing:
        assert plan.memory < 0.5 * step_cost(mesh_net(**small).train(), *shapes).memory  # type: ignore[arg-type]

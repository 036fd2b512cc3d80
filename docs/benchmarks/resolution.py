"""Models of vorticity trained on one grid, asked for grids of twice and four times as many rows: spectra of members, and super-resolution.

OMP_NUM_THREADS=1 python docs/benchmarks/resolution.py                            # 64, 128, 256: an hour on one core; files are in --cache
OMP_NUM_THREADS=1 python docs/benchmarks/resolution.py --trained 32 --seconds 120 # 32, 64, 128: a quarter of an hour
OMP_NUM_THREADS=1 python docs/benchmarks/resolution.py --quick                    # a minute, numbers without meaning

The truth is Kolmogorov flow at a low viscosity, so that half of its octaves of vorticity are beyond the waves of the training: solved on
256 x 256 cells, and filtered spectrally to coarser grids. All networks are trained for the same processor time, but for one that is given
twice of it. "Three grids" are trained on the fields of all three, and their models are of the finest.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from kolmogorov import Flow
from safetensors.torch import load_file, save_file
from torch import Tensor

import xgenda
from xgenda.diffusion.coloured import ColouredNoise
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.samplers import integrate
from xgenda.diffusion.schedules import noise_levels
from xgenda.models.diffusive import SIGMA_MIN, DiffusionModel, build_network
from xgenda.networks.uno import resample

VISCOSITY, SOLVED = 2e-4, 256
ERROR = 0.1  # of block means for networks, in standard deviations: with less, guidance under coloured noise is not stable in so few steps
SIDE = 3.2  # degrees, of a box that is nowhere
EDGES = (1, 2, 4, 8, 16, 32, 64, 86)  # of bands of wavenumber; the solver keeps waves below a third of its grid
NOISE = {"kind": "exponential", "length": 0.1}
# of low rank, because full weights for 32 waves are 14 million; and few fields withheld, because validation is on the finest grid
THREE: dict[str, Any] = {
    "architecture": "uno", "noise": NOISE, "resolutions": (1, 2, 4), "network_options": {"rank": 16}, "validation": 0.05,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "uno, coloured, cutoff": {"architecture": "uno", "noise": NOISE},
    "uno, coloured, three grids": THREE,
    "uno, coloured, three grids, twice": {**THREE, "times": 2},
    "uno, white": {"architecture": "uno", "anchor": None},
    "unet, white": {"architecture": "unet", "anchor": None},
}


# Data


def vorticity(
    runs: int, states: int, size: int = SOLVED, *, calm: float = 20.0, spin_up: float = 3.0, every: float = 0.5
) -> Tensor:
    """Return developed vorticity of independent runs, `every` so many units of time: (runs, states, size, size).

    Runs begin on 64 x 64 cells, at five times the viscosity, where that costs little.
    """
    slow, fast = Flow(64, 0.02), Flow(size, every / round(250 * every * size / 256), viscosity=VISCOSITY)
    out = []
    for run in range(runs):
        w = slow.start(1, torch.Generator().manual_seed(run))
        for _ in range(round(calm / slow.step)):
            w = slow.advance(w)
        w = torch.fft.rfft2(resample(torch.fft.irfft2(w), (size, size)))
        kept = []
        for i in range(-round(spin_up / every), states):
            for _ in range(round(every / fast.step)):
                w = fast.advance(w)
            if i >= 0:
                kept.append(torch.fft.irfft2(w))
        out.append(torch.cat(kept))
        if not torch.isfinite(out[-1]).all():
            raise RuntimeError("The flow is not finite; take shorter steps.")
        print(f"run {run + 1} of {runs}, standard deviation {float(out[-1].std()):.3f}", flush=True)
    return torch.stack(out)


def on(fields: Tensor, n: int) -> Tensor:
    """Return fields on n x n cells of the same box, without the waves that these do not show."""
    return resample(fields, (n, n), limit=True)


def box(values: Tensor) -> xr.Dataset:
    n = values.shape[-1]
    return xr.Dataset(
        {"vorticity": (("time", "latitude", "longitude"), values.numpy().astype(np.float32), {"units": "s-1"})},
        coords={
            "time": np.datetime64("2020-01-01", "ns") + np.arange(len(values)) * np.timedelta64(1, "D"),
            "latitude": 30 + SIDE / n * np.arange(n), "longitude": SIDE / n * np.arange(n),
        },
    )  # fmt: skip


def bands(fields: Tensor) -> np.ndarray:
    """Return the variance in bands of wavenumber, NaN in those that the grid does not show."""
    n = fields.shape[-1]
    power = torch.fft.fft2(fields.double(), norm="forward").abs().square().flatten(0, -3).mean(0)
    k = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)] * 2, indexing="ij"))
    shown = [float(power[(k >= a) & (k < b)].sum()) if a < n // 2 else np.nan for a, b in itertools.pairwise(EDGES)]
    return np.array(shown)


# Models


def trained(name: str, fields: Tensor, path: Path, seconds: float) -> DiffusionModel:
    """Return a model from `path`, or trained for so much processor time."""
    if not path.exists():
        begin, began, options = time.process_time(), time.perf_counter(), dict(RUNS[name])
        seconds *= options.pop("times", 1)
        if "noise" in options:
            options["noise"] = {**options["noise"], "cutoff": fields.shape[-1] // 2 - 1}
        xgenda.train(
            box(fields), periodic="both", steps=1_000_000, width=16, seed=0, progress=False, out=path, name=name,
            callbacks=[lambda report: time.process_time() - begin > seconds], **options,
        )  # fmt: skip
        print(f"{name}: {time.process_time() - begin:.0f} s of processor, {time.perf_counter() - began:.0f} s", flush=True)
    model = xgenda.load_model(path)
    assert isinstance(model, DiffusionModel)
    record = model.spec.training
    print(f"{name}: {record['steps']} steps, best {record['best_step']}, highest noise {model.sigma_max:.0f}", flush=True)
    return model


def finer(model: DiffusionModel, factor: int) -> DiffusionModel:
    """Return a model on another grid: refined where it is one of functions, else the same network called on more cells."""
    if model.colour is not None:
        return model if factor == 1 else model.refined(factor)
    assert model.spec.scaling is not None
    n = factor * model.spec.grid.plane[0]  # type: ignore[union-attr]
    grid = xgenda.grids.Grid(*(a[0] + (a[1] - a[0]) / factor * np.arange(n) for a in _axes(model)))
    moments = {k: np.broadcast_to(m.mean((-2, -1), keepdims=True), (*m.shape[:-2], n, n)).copy()
               for k, m in (("mean", model.scaling.mean), ("std", model.scaling.std))}  # fmt: skip
    network = {**model.spec.options["network"], "shape": [n, n]}
    if "resolution" in network:
        network["resolution"] = None  # a neural operator on the grid of its input
    built = build_network(network)
    built.load_state_dict(model.denoiser.network.state_dict())
    spec = dataclasses.replace(
        model.spec, grid=grid, scaling=dataclasses.replace(model.scaling, **moments), options={**model.spec.options, "network": network}
    )  # fmt: skip
    return DiffusionModel(spec, EDMDenoiser(built))


def on_cells(model: DiffusionModel, n: int) -> DiffusionModel:
    """Return a model on n x n cells: `finer`, or where it was trained on several grids on a coarser one of them."""
    grid = model.spec.grid
    assert isinstance(grid, xgenda.grids.Grid)
    step = grid.plane[0] // n
    if step <= 1:
        return finer(model, n // grid.plane[0])
    assert model.colour is not None
    moments = {k: getattr(model.scaling, k)[..., ::step, ::step] for k in ("mean", "std")}  # all cells are alike
    noise, network = {**model.spec.options["noise"], "cutoff": n // 2 - 1}, {**model.spec.options["network"], "shape": [n, n]}
    spec = dataclasses.replace(
        model.spec, grid=xgenda.grids.Grid(grid.latitude[::step], grid.longitude[::step]),
        scaling=dataclasses.replace(model.scaling, **moments), options={**model.spec.options, "network": network, "noise": noise},
    )  # fmt: skip
    out = DiffusionModel(spec, model.denoiser)
    out.colour = model.colour.on((n, n), folded=False)  # as in training: the waves of the fine noise that these cells show
    return out


def _axes(model: DiffusionModel) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(model.spec.grid, xgenda.grids.Grid)
    return model.spec.grid.latitude, model.spec.grid.longitude


def sampled(model: DiffusionModel, members: int, steps: int) -> Tensor:
    """Return members of the prior in physical units."""
    keys, n = [(0, "prior", m) for m in range(members)], model.spec.grid.plane[0]
    noise: Any = NoiseStream(keys) if model.colour is None else ColouredNoise([[k] for k in keys], model.colour)
    levels = noise_levels("karras", steps, SIGMA_MIN, model.sigma_max)
    with torch.no_grad():
        x = integrate(model.denoiser, levels[0] * noise.normal(1, n, n), levels, "heun")[:, 0]
    return x * float(model.scaling.std.mean()) + float(model.scaling.mean[0].mean())


# Detail that nobody taught, and classical super-resolution


def extrapolated(fields: Tensor, n: int) -> Tensor:
    """Return an isotropic spectrum of fields, continued by its power law to all waves of n x n cells, (n, n // 2 + 1).

    The law is fitted to the upper two thirds of the waves that the fields show.
    """
    m = fields.shape[-1]
    power = torch.fft.fft2(fields.double(), norm="forward").abs().square().flatten(0, -3).mean(0)
    k = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(m, 1 / m, dtype=torch.float64)] * 2, indexing="ij"))
    shell = k.round().long()
    mean = torch.zeros(int(shell.max()) + 1, dtype=torch.float64).index_add(0, shell.flatten(), power.flatten())
    mean = mean / torch.bincount(shell.flatten())
    first, last = m // 6, m // 2 - 1
    x = torch.arange(first, last + 1, dtype=torch.float64).log()
    y = mean[first : last + 1].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    wanted = torch.hypot(torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)[:, None], torch.arange(n // 2 + 1, dtype=torch.float64))
    law = (y.mean() + slope * (wanted.clamp(min=1).log() - x.mean())).exp()
    known = mean[wanted.round().long().clamp(max=m // 2 - 1)]
    out = torch.where(wanted < m // 2, known, law)
    out[0, 0] = 0.0
    return torch.where(wanted < min(n // 2, SOLVED / 3), out, 0.0)


def drawn(power: Tensor, members: int, label: str) -> Tensor:
    """Return Gaussian fields of a spectrum, (members, n, n)."""
    n = len(power)
    white = NoiseStream([(0, label, m) for m in range(members)]).normal(n, n, dtype=torch.float64)
    return torch.fft.irfft2(torch.fft.rfft2(white) * (power.sqrt() * n), s=(n, n))


def with_detail(fields: Tensor, power: Tensor, cutoff: int, label: str) -> Tensor:
    """Return fields with Gaussian waves beyond those of the training, of the extrapolated spectrum."""
    n = len(power)
    k = torch.hypot(torch.fft.fftfreq(n, 1 / n)[:, None], torch.arange(n // 2 + 1.0))
    return fields + drawn(torch.where(k > cutoff, power, 0.0), len(fields), label)


def block_means(fields: Tensor, cells: int) -> Tensor:
    r = fields.shape[-1] // cells
    return fields.unflatten(-1, (cells, r)).unflatten(-3, (cells, r)).mean((-3, -1))


def gaussian(power: Tensor, means: Tensor, members: int, label: str) -> Tensor:
    """Return members of the posterior of a homogeneous Gaussian given block means, without error: (members, n, n).

    Drawn from the prior, and corrected by what the block means of the draw lack, x + S B' (B S B')^-1 (y - B x), where B S B' is a
    circulant.
    """
    n, cells = len(power), means.shape[-1]

    def spread(y: Tensor) -> Tensor:
        """Return S B' y."""
        r = n // cells
        cut = y.repeat_interleave(r, -2).repeat_interleave(r, -1) / r**2
        return torch.fft.irfft2(torch.fft.rfft2(cut) * power * n**2, s=(n, n))

    one = torch.zeros(cells, cells, dtype=torch.float64)
    one[0, 0] = 1.0
    eigenvalues = torch.fft.rfft2(block_means(spread(one), cells)).real
    x = drawn(power, members, label)
    lacking = torch.fft.rfft2(means.double() - block_means(x, cells))
    # the total of a field has no variance here
    solved = torch.where(eigenvalues > 1e-12 * eigenvalues.max(), lacking / eigenvalues, 0.0)
    return x + spread(torch.fft.irfft2(solved, s=(cells, cells)))


def upsampled(means: Tensor, n: int, how: str) -> Tensor:
    """Return one field from block means: 'bilinear', or 'spectral', the waves that the blocks show with what a mean takes from them."""
    cells, r = means.shape[-1], n // means.shape[-1]
    if how == "bilinear":
        padded = torch.nn.functional.pad(means[:, None].float(), (1, 1, 1, 1), mode="circular")
        fine = torch.nn.functional.interpolate(padded, scale_factor=r, mode="bilinear", align_corners=False)
        return fine[:, 0, r:-r, r:-r]
    fine = resample(means, (n, n))
    window = torch.zeros(n, n, dtype=torch.float32)
    window[:r, :r] = 1 / r**2  # a mean is of the cells from its first on
    response = torch.fft.rfft2(window).conj()
    k = torch.fft.fftfreq(n, 1 / n)[:, None].abs().clamp(min=torch.arange(n // 2 + 1.0))
    low = k < cells // 2
    return torch.fft.irfft2(torch.where(low, torch.fft.rfft2(fine) / torch.where(low, response, 1.0), 0.0), s=(n, n))


# What is printed


def ratios(fields: Tensor, truth: np.ndarray) -> str:
    """Return the decadic logarithm of variance over that of the truth by band, as cells of a table."""
    found = np.log10(bands(fields).clip(1e-12) / truth)
    return " | ".join("" if np.isnan(v) else "none" if v < -6 else f"{v:+.2f}" for v in found)


def scores(members: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return CRPS and RMSE of the mean of (dates, members, n, n)."""
    ensemble = members.double()
    m = ensemble.shape[1]
    error = (ensemble - truth[:, None]).abs().mean()
    apart = sum(float((ensemble[:, i] - ensemble[:, j]).abs().mean()) for i in range(m) for j in range(i))
    crps = float(error) - (apart / (m * (m - 1)) if m > 1 else 0.0)
    return crps, float((ensemble.mean(1) - truth).square().mean().sqrt())


def picture(path: Path, panels: dict[str, Tensor], limit: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(3 * columns, 3.2 * -(-len(panels) // columns)))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (label, field) in zip(axes.flat, panels.items(), strict=False):
        axis.imshow(field, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower")
        axis.set_title(label, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("resolution"))
    parser.add_argument("--trained", type=int, default=64, help="rows of the grid of the training")
    parser.add_argument("--models", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--block", type=int, default=4, help="cells of the training along a side of a block whose mean is given")
    parser.add_argument("--seconds", type=float, default=600.0, help="of processor time for each model")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--dates", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--stage", choices=("all", "train", "prior", "posterior"), default="all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs, states, spin = 6, 30, {}
    if args.quick:
        args.seconds, args.members, args.dates, args.steps = 4.0, 2, 1, 4
        runs, states, spin = 4, 12, {"calm": 2.0, "spin_up": 0.25, "every": 0.05}
    args.cache.mkdir(parents=True, exist_ok=True)
    path = args.cache / "flow.safetensors"
    if not path.exists():
        save_file({"vorticity": vorticity(runs, states, **spin)}, path)
    flow = load_file(path)["vorticity"]
    past, held = flow[:-2].flatten(0, 1), flow[-2:].flatten(0, 1)
    held = held[:: len(held) // args.dates][: args.dates]
    fields = on(past, args.trained)
    models = {
        name: trained(
            name,
            on(past, args.trained * max(RUNS[name].get("resolutions", (1,)))),
            args.cache / f"{args.trained}-{name.replace(', ', '-')}.safetensors",
            args.seconds,
        )
        for name in args.models
    }
    if args.stage in ("all", "prior"):
        priors(models, past, fields, args)
    if args.stage in ("all", "posterior"):
        posteriors(models, held, fields, args)


def priors(models: dict[str, DiffusionModel], past: Tensor, fields: Tensor, args: argparse.Namespace) -> None:
    """Print spectra of members without observations."""
    limit = 3 * float(past.std())
    print(
        f"log10 of variance over that of the truth, by wavenumber {EDGES}; {args.members} members, {args.steps} levels",
        flush=True,
    )
    own = args.trained
    sizes = (own, 2 * own, 4 * own)
    truth = {n: bands(on(past, n)) for n in sizes}
    print("| truth, variance | | " + " | ".join(f"{v:.3f}" for v in truth[sizes[-1]]) + " |", flush=True)
    panels = {f"truth, {n}": on(past[:1], n)[0] for n in sizes}
    for name, model in models.items():
        for n in sizes:
            found = sampled(on_cells(model, n), args.members, args.steps)
            print(f"| {name} | {n} | {ratios(found, truth[n])} |", flush=True)
            panels[f"{name}, {n}"] = found[0]
            if model.colour is not None and n > model.spec.grid.plane[0]:  # type: ignore[union-attr]
                found = with_detail(found, extrapolated(fields, n), own // 2 - 1, "detail")
                print(f"| {name}, Gaussian detail | {n} | {ratios(found, truth[n])} |", flush=True)
                panels[f"{name}, detail, {n}"] = found[0]
    for n in sizes:
        print(
            f"| Gaussian, spectrum of the training | {n} | {ratios(drawn(extrapolated(fields, n), 64, 'prior'), truth[n])} |",
            flush=True,
        )
    panels[f"Gaussian, {sizes[-1]}"] = drawn(extrapolated(fields, sizes[-1]), 1, "prior")[0]
    picture(args.cache / f"{own}-priors.png", panels, limit)


def posteriors(models: dict[str, DiffusionModel], held: Tensor, fields: Tensor, args: argparse.Namespace) -> None:
    """Print scores of super-resolution from means of blocks."""
    limit = 3 * float(held.std())
    own = args.trained
    cells = own // args.block
    print(f"from {cells} x {cells} block means: CRPS, RMSE; {args.dates} dates, {args.members} members", flush=True)
    panels: dict[str, Tensor] = {}
    for n in (own, 2 * own, 4 * own):
        if n == cells:  # given
            continue
        truth = on(held, n).double()
        means, power = block_means(truth, cells), extrapolated(fields, n)
        panels |= {f"truth, {n}": truth[0], f"means, {n}": means[0]}
        found: dict[str, Tensor] = {how: upsampled(means, n, how)[:, None] for how in ("bilinear", "spectral")}
        found["Gaussian, spectrum of the training"] = torch.stack(
            [gaussian(power, y, args.members, f"date {i}") for i, y in enumerate(means)]
        )
        for name, members in found.items():
            report(name, n, members, truth, panels)
        coarse = box(truth).coarsen(latitude=n // cells, longitude=n // cells).mean()
        for name, model in models.items():
            if (
                model.colour is None and n > 2 * own
            ):  # gradients through networks on ever more cells, for what 2 * own already shows
                continue
            call = {
                "error": ERROR * float(fields.std()),
                "members": args.members,
                "steps": args.steps,
                "seed": 0,
                "progress": False,
            }
            began = time.process_time()
            try:
                ensemble = xgenda.downscale(coarse, model=on_cells(model, n), **call)
            except xgenda.errors.StateError as problem:
                print(f"| {name} | {n} | {problem} |", flush=True)
                continue
            members = torch.as_tensor(ensemble.vorticity.transpose("time", "member", ...).values)
            report(name, n, members, truth, panels, time.process_time() - began)
            if model.colour is not None and n > model.spec.grid.plane[0]:  # type: ignore[union-attr]
                members = torch.stack([with_detail(m, power, own // 2 - 1, f"date {i}") for i, m in enumerate(members)])
                report(f"{name}, Gaussian detail", n, members, truth, panels)
    picture(args.cache / f"{own}-posteriors-{args.block}.png", panels, limit)


def report(name: str, n: int, members: Tensor, truth: Tensor, panels: dict[str, Tensor], seconds: float | None = None) -> None:
    crps, rmse = scores(members, truth)
    cost = "" if seconds is None else f"{seconds:.0f}"
    print(f"| {name} | {n} | {crps:.3f} | {rmse:.3f} | {ratios(members.flatten(0, 1), bands(truth))} | {cost} |", flush=True)
    panels[f"{name}, {n}"] = members[0, 0]


if __name__ == "__main__":
    main()

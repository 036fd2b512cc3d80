r"""`CorrectiveModel`: downscaling by a regression of the mean and a diffusion of the residual.

After CorrDiff (Mardani et al. 2023, arXiv 2309.15214), with a linear mean underneath the regression network:

    m = K c + s R(f, K c),     x = m + u r,     r ~ diffusion given (m, f),

with c the coarse fields, f these interpolated to the fine grid and whatever else the model takes (`Features`), K a `LinearMean`, R a network
whose output is in units of s, and u the standard deviation of the residual; everything standardised. Published networks have K = 0,
s = 1 and u = 1. Where the coarse cells are blocks of fine ones, every block mean of x can be made that of c, at every call of the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xgenda.diffusion.anchors import anchor_tensors, read_anchor
from xgenda.diffusion.batches import in_batches
from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.diffusion.samplers import SAMPLERS, integrate, sampler_options
from xgenda.diffusion.schedules import SCHEDULES, noise_levels
from xgenda.diffusion.tiles import TiledNetwork, Tiling
from xgenda.errors import OptionError, check_choice, check_count, check_pair
from xgenda.grids import rectilinear
from xgenda.models.blocks import Blocks
from xgenda.models.calibration import Calibration
from xgenda.models.checkpoints import load_weights
from xgenda.models.diffusive import BATCH, STEPS, build_network
from xgenda.models.features import Features
from xgenda.models.generative import STAGES, GenerativeModel, Request, SamplingOptions
from xgenda.models.means import LinearMean, Place
from xgenda.models.parts import Part
from xgenda.models.spec import ModelSpec
from xgenda.models.windows import OnWindow, plane_noise, unwrapped

LARGEST_BATCH = 2**20  # cells of all samples that go together


@dataclass(frozen=True)
class Conserved:
    """Which channels keep the means of their blocks, and the inputs that say what these are.

    Attributes
    ----------
    weights
        'cells' for plain means, 'areas'.
    channels, inputs
        Pairs of fine channels and coarse inputs, in the same units.
    """

    weights: str
    channels: tuple[int, ...]
    inputs: tuple[int, ...]


class CorrectiveModel(GenerativeModel):
    """Fine ensembles from coarse fields.

    Parameters
    ----------
    spec
        With grid, scaling and inputs. ``options``: 'network' and 'regression' (arguments, or None), 'sigma_min', 'sigma_max', 'sigma_data',
        'unit' (standard deviation of the residual in standardised units, of all channels or of each), 'mean_condition' (whether the diffusion
        gets the mean),
        'conserve' and 'calibration' (None, or what `Conserved` and `Calibration` take), 'tile' and 'overlap' (rows and columns, where
        the model was trained on parts of its grid), 'halo' (cells around a part that is sampled on its own).
    mean
        K.
    regression
        R; None where it did not beat K alone on the validation block.
    spread
        s, shape (channels, rows or 1, columns or 1), standardised.
    denoiser
        Of the residual in units of 'unit'.
    statics
        Fields that never change, standardised, shape (statics, rows, columns).
    """

    def __init__(
        self, spec: ModelSpec, mean: LinearMean, regression: nn.Module | None, spread: Tensor, denoiser: EDMDenoiser,
        statics: Tensor | None = None,
    ) -> None:  # fmt: skip
        if spec.grid is None or spec.scaling is None or spec.inputs is None:
            raise OptionError("A downscaling model needs a grid, a scaling and inputs.")
        self.spec, self.mean, self.spread, self.statics = spec, mean, spread.float(), statics
        self.grid, self.scaling, self.inputs = spec.grid, spec.scaling, spec.inputs
        self.regression = None if regression is None else regression.eval().requires_grad_(False)
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.features = Features(spec.inputs, spec.grid, statics, spec.wraps)
        options = spec.options
        self.sigma_min, self.sigma_max = float(options["sigma_min"]), float(options["sigma_max"])
        # one number, or one per channel
        unit = options["unit"]
        self.unit: float | Tensor = (
            torch.tensor(unit, dtype=torch.float64)[:, None, None] if isinstance(unit, (list, tuple)) else float(unit)
        )
        self.mean_condition = bool(options["mean_condition"])
        given = options["calibration"]
        self.calibration = None if given is None else Calibration(tuple(given["widths"]), tuple(map(tuple, given["factors"])))
        given = options["conserve"]
        self.conserved = None if given is None else Conserved(given["weights"], tuple(given["channels"]), tuple(given["inputs"]))
        self.blocks = None
        if self.conserved is not None:
            self.blocks = Blocks(
                rectilinear(spec.grid, spec.name), check_count("factor", spec.factor, 2), self.conserved.weights, spec.wraps
            )

    # -- options --------------------------------------------------------------------------------------------------------------

    def plan(self, asked: SamplingOptions, *, linear: bool = True) -> SamplingOptions:
        """Resolve the options; there is nothing to guide."""
        accepted = ("sampler", "steps", "schedule", "sampler_options", "tile", "overlap", "stage")
        asked.refuse_all_but(accepted, "a downscaler is not guided by observations")
        check_choice("sampler", asked.sampler, ("auto", *SAMPLERS))
        check_choice("schedule", asked.schedule, ("auto", *SCHEDULES))
        check_choice("stage", asked.stage, STAGES)
        sampler = str(self.spec.options.get("sampler", "heun")) if asked.sampler == "auto" else asked.sampler
        tile, overlap = self._tiling(asked.tile, asked.overlap)
        steps = int(self.spec.options.get("steps", STEPS)) if asked.steps is None else check_count("steps", asked.steps, 2)
        return SamplingOptions(
            "none", sampler, steps, self._batch() if asked.batch_size is None else check_count("batch_size", asked.batch_size),
            "karras" if asked.schedule == "auto" else asked.schedule,
            sampler_options=sampler_options(sampler, asked.sampler_options), tile=tile, overlap=overlap, stage=asked.stage,
        )  # fmt: skip

    def _batch(self) -> int:
        """Return how many samples go together: fewer on large grids."""
        return max(1, min(BATCH, LARGEST_BATCH // self.grid.size))

    def _tiling(self, tile: Any, overlap: Any) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """Return tile and overlap, those of the training for 'auto'; None for the whole grid."""
        own = self.spec.options.get("tile")
        if tile not in ("auto", None) and getattr(self.denoiser.network, "needs_whole", False):
            raise OptionError(f"model={self.spec.name!r} has a mesh network, which sees the whole grid; leave out tile.")
        if tile in ("auto", None):
            if overlap is not None and own is None:
                raise OptionError(f"overlap={overlap!r} needs a tile; pass it too, for example tile=64.")
            if tile is None or own is None:
                return None, None
            tile = tuple(own)
        found = check_pair("tile", tile, 1)
        stride = self.stride
        if any(t % stride for t in found) and found != self.grid.plane:
            raise OptionError(
                f"tile={tile!r} is not accepted; rows and columns must be multiples of {stride}, such as tile={8 * stride}."
            )
        if overlap is None:
            overlap = self.spec.options.get("overlap") or tuple(min(t // 4, max(t - stride, 0)) for t in found)
        shared = check_pair("overlap", overlap, 0)
        Tiling(self.grid.plane, found, shared)  # refuses what does not go together
        return found, shared

    def work(self, times: int, members: int, options: SamplingOptions) -> int:
        """Return the number of sampler steps of all samples."""
        return times if options.stage == "mean" else times * members * int(options.steps or STEPS)

    @property
    def halo(self) -> int:
        """Cells around a window that are sampled with it, a multiple of the factor of the blocks."""
        least = max(int(self.spec.options.get("halo", 32)), 0 if self.calibration is None else self.calibration.reach)
        return -(-least // self.step) * self.step

    @property
    def step(self) -> int:
        """Rows and columns of windows are multiples of this: of the stride, and of whole blocks where their means are kept."""
        return self.stride if self.blocks is None else math.lcm(self.blocks.factor, self.stride)

    @property
    def stride(self) -> int:
        """Rows and columns of parts of the grid are multiples of this."""
        return int(getattr(self.denoiser.network, "stride", 1))

    def check_windows(self, chunks: tuple[int, int]) -> None:
        """Refuse windows that the model cannot be sampled on.

        Raises
        ------
        OptionError
            If a Gaussian ties all cells together, or windows cut blocks whose means are kept.
        """
        if self.whole_condition is not False:
            raise OptionError(
                f"model={self.spec.name!r} sees the whole grid beside each tile, so that it cannot be cut; leave out chunks."
            )
        if getattr(self.denoiser.network, "needs_whole", False):
            raise OptionError(f"model={self.spec.name!r} has a mesh network, which sees the whole grid; leave out chunks.")
        if self.denoiser.anchor is not None:
            raise OptionError(
                f"model={self.spec.name!r} has a Gaussian of the whole grid, so that its grid cannot be cut into chunks; leave out chunks, "
                f"or train without: xgenda.train(..., anchor=None)"
            )
        for n, whole in zip(chunks, self.grid.plane, strict=True):
            if n % self.step and n < whole:
                raise OptionError(
                    f"chunks of {n} cells are not accepted; they must be multiples of {self.step} here, such as {8 * self.step}."
                )

    # -- sampling -------------------------------------------------------------------------------------------------------------

    def posterior(self, request: Request) -> Tensor:
        """Sample in micro-batches of (time, member); `request.fields` are the coarse fields."""
        inner, outer, trim = self._windows(request.window)
        count = 1 if request.options.stage == "mean" else len(request.members)
        size = (len(inner[0]), len(inner[1]))
        out = torch.empty(len(request.labels), count, self.spec.channels, *size, dtype=torch.float64)
        for part, residual, centre in self._sampled(request, outer, centred=self.calibration is not None):
            z = part.mean[:, None]
            if residual is not None:
                z = z + self.unit * residual
            if self.calibration is not None and residual is not None and centre is not None:
                deviation = residual - centre
                z = z + self.unit * (self.without_means(self.calibration(deviation), outer) - deviation)
            out[part.rows] = part.physical(z)[..., trim[0], trim[1]]
        return out.flatten(-2)

    def deviations(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return what `Calibration` multiplies, standardised: members' deviations (t, members, channels, rows, columns) from their mean.

        Returns
        -------
        Tensor, Tensor
            The mean, (t, channels, rows, columns): that of the first stage, and of the residual as the denoiser has it at its highest
            noise level, where it knows nothing but the condition. And the deviations from it before any calibration.
        """
        shape = (self.spec.channels, *self.grid.plane)
        means = torch.empty(len(request.labels), *shape, dtype=torch.float64)
        found = torch.empty(len(request.labels), len(request.members), *shape, dtype=torch.float64)
        for part, residual, centre in self._sampled(request, self.features.everywhere(), centred=True):
            assert residual is not None
            assert centre is not None
            # those of one lead time come together, whatever their order
            means[part.rows] = part.mean + self.unit * centre[:, 0]
            found[part.rows] = self.unit * (residual - centre)
        return means, found

    def without_means(self, deviations: Tensor, place: Place | None = None) -> Tensor:
        """Return standardised deviations (..., channels, rows, columns), on a window, less smooth fields that have their block means."""
        if self.blocks is None or self.conserved is None:
            return deviations
        blocks, out = self.blocks if place is None else self.blocks.on(place), deviations.clone()
        for c in self.conserved.channels:  # of others a deviation with no means does not keep the means of the field
            if self.scaling.transforms[c] == "none" and self.scaling.bounds[c][0] == -np.inf and self.scaling.std[c].size == 1:
                out[..., c, :, :] -= blocks.smooth(blocks.mean(out[..., c, :, :]))
        return out

    def _sampled(self, request: Request, outer: Place, centred: bool) -> Iterator[tuple[Part, Tensor | None, Tensor | None]]:
        """Yield some times after the other: what their samples share, the residuals of all members in their unit, and their mean."""
        options, members = request.options, len(request.members)
        assert options.batch_size is not None
        networks: dict[int | None, tuple[nn.Module | None, EDMDenoiser | None]] = {}
        with torch.no_grad():
            for rows, lead in self._groups(request, max(1, options.batch_size // members)):
                if lead not in networks:
                    networks[lead] = (
                        None if self.regression is None else self._placed(self.regression, outer, request, lead),
                        None if options.stage == "mean" else self._denoiser(outer, request, lead),
                    )
                regression, denoiser = networks[lead]
                part = Part(self, request, rows, outer, regression)
                if denoiser is None:
                    request.advance(len(part.rows))
                    yield part, None, None
                    continue
                shape = (self.spec.channels, len(outer[0]), len(outer[1]))
                drawn = self._residuals(request, part, denoiser, shape, outer)
                centre = None
                if centred:
                    nothing = torch.zeros(len(part.rows), *shape, dtype=torch.float64, device=request.device)
                    found = denoiser(nothing, self.sigma_max, part.condition.to(request.device)).cpu()
                    centre = part.conserving(found, list(range(len(part.rows))))[:, None]
                yield part, drawn.reshape(len(part.rows), members, *shape), centre

    def _groups(self, request: Request, size: int) -> Iterator[tuple[list[int], int | None]]:
        """Yield some times after the other, and the number of their lead time where networks know such numbers."""
        leads: list[int | None] = [None] * len(request.labels)
        if self.spec.options.get("lead_index"):
            assert request.planes is not None
            steps = request.planes[:, -1]
            odd = torch.nonzero((steps - steps.round()).abs() > 0.01).flatten()
            if len(odd):
                step = float(self.inputs.lead_time or 1.0)
                raise OptionError(
                    f"The lead time at {request.labels[int(odd[0])]} is {float(steps[odd[0]]) * step / 3600:g} h, and "
                    f"model={self.spec.name!r} knows multiples of {step / 3600:g} h. Select such times."
                )
            leads = [round(float(p)) for p in steps]
        for lead in dict.fromkeys(leads):
            rows = [i for i, found in enumerate(leads) if found == lead]
            yield from ((rows[start : start + size], lead) for start in range(0, len(rows), size))

    def _residuals(self, request: Request, part: Part, denoiser: EDMDenoiser, shape: tuple[int, ...], outer: Place) -> Tensor:
        options = request.options
        assert options.steps is not None
        assert options.batch_size is not None
        levels = noise_levels(options.schedule, options.steps, self.sigma_min, self.sigma_max)
        condition = part.condition

        def sample(batch: list[tuple[int, int]]) -> Tensor:
            given = condition[[t for t, _ in batch]].to(request.device)
            noise = plane_noise([(request.seed, request.labels[part.rows[t]], m) for t, m in batch], self.grid.plane, outer)
            x = self.sigma_max * noise.normal(*shape).double().to(request.device)

            def denoise(x: Tensor, sigma: float) -> Tensor:
                return part.conserving(denoiser(x, sigma, given), [t for t, _ in batch])

            return integrate(
                denoise, x, levels, options.sampler, noise, lambda: request.advance(len(batch)), **options.sampler_options
            ).cpu()

        return in_batches(sample, [(t, m) for t in range(len(part.rows)) for m in request.members], options.batch_size)

    def _denoiser(self, place: Place, request: Request, lead: int | None) -> EDMDenoiser:
        own, network = self.denoiser, self._placed(self.denoiser.network, place, request, lead)
        found = EDMDenoiser(network, own.anchor, own.feeds_state, own.sigma_range, own.sigma_data, own.scale_condition)
        return found.to(request.device)

    def _placed(self, network: nn.Module, place: Place, request: Request, lead: int | None) -> nn.Module:
        """Return a network at a lead time, on a window of the grid, in tiles where asked for."""
        options, size = request.options, (len(place[0]), len(place[1]))
        tile = size if options.tile is None else options.tile
        cut = tile[0] < size[0], tile[1] < size[1]
        placed = self.network_on(network, place, lead, cut)
        if any(cut):
            wraps = size[1] == self.grid.plane[1] and bool(self.grid.periodic)
            tiling = Tiling(size, tile, options.overlap or (0, 0), periodic=wraps, multiple=self.stride)
            placed = TiledNetwork(placed, tiling, options.batch_size or 1, self.whole_condition)
        return placed.to(request.device)

    @property
    def whole_condition(self) -> bool | slice:
        """Which conditions each tile gets as a whole beside its own: of some published networks all but the mean."""
        first = self.spec.channels if self.mean_condition else 0
        return slice(first, None) if self.spec.options.get("whole_condition") else False

    def network_on(
        self, network: nn.Module, place: Place, lead: int | None = None, cut: tuple[bool, bool] = (False, False)
    ) -> nn.Module:
        """Return a network at a lead time on a window of the grid, to be called on parts of its rows or columns where these are `cut`."""
        pieces = [c or len(p) < n for c, p, n in zip(cut, place, self.grid.plane, strict=True)]
        whole = all(len(p) == n for p, n in zip(place, self.grid.plane, strict=True))
        network = unwrapped(network, pieces[0], pieces[1])
        return network if whole and lead is None else OnWindow(network, place, lead)

    def _windows(self, window: Place | None) -> tuple[Place, Place, tuple[slice, slice]]:
        """Return a window, the window with its halo, and where the first lies in the second."""
        whole = self.features.everywhere()
        if window is None or all(len(a) == len(b) for a, b in zip(window, whole, strict=True)):
            return whole, whole, (slice(None), slice(None))
        outer, trim = [], []
        for axis, (cells, n) in enumerate(zip(window, self.grid.plane, strict=True)):
            first, count, halo = int(cells[0]), len(cells), self.halo
            wraps = axis == 1 and bool(self.grid.periodic) and count + 2 * halo <= n
            before = halo if wraps else min(halo, first)
            after = halo if wraps else min(halo, n - first - count)
            if count == n:
                before = after = 0
            outer.append(np.arange(first - before, first + count + after) % n)
            trim.append(slice(before, before + count))
        return window, (outer[0], outer[1]), (trim[0], trim[1])

    # -- storage --------------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return networks, linear mean, spread, statics and anchor."""
        out: dict[str, Tensor] = {f"network.{k}": v for k, v in self.denoiser.network.state_dict().items()}
        if self.regression is not None:
            out |= {f"regression.{k}": v for k, v in self.regression.state_dict().items()}
        if self.statics is not None:
            out["statics"] = self.statics.float()
        return out | {"spread": self.spread} | self.mean.tensors() | anchor_tensors(self.denoiser.anchor)

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: dict[str, Tensor]) -> CorrectiveModel:
        """Rebuild the model; the tensors must be exactly those that it stores."""
        if spec.grid is None:
            raise KeyError("grid")
        anchor, spread, statics = read_anchor(tensors), tensors.pop("spread"), tensors.pop("statics", None)
        mean = LinearMean.from_tensors((spec.channels, *spec.grid.plane), tensors)
        networks: list[Any] = []
        for part in ("network", "regression"):
            arguments = spec.options[part]
            if arguments is None:
                networks.append(None)
                continue
            built = build_network(arguments)
            load_weights(built, tensors, f"{part}.")
            networks.append(built)
        known = tuple(f"{part}." for part in ("network", "regression") if spec.options[part] is not None)
        if stray := sorted(k for k in tensors if not k.startswith(known)):
            raise KeyError(f"unexpected tensors {stray}")
        options = spec.options
        denoiser = EDMDenoiser(
            networks[0],
            anchor,
            sigma_data=float(options["sigma_data"]),
            scale_condition=bool(options.get("scale_condition", False)),
        )
        return cls(spec, mean, networks[1], spread, denoiser, statics)

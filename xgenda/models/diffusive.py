"""`DiffusionModel`: an unconditional diffusion prior, conditioned on observations by likelihood guidance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from xgenda.diffusion.anchors import Anchor, Separable, Spectral, anchor_tensors, read_anchor
from xgenda.diffusion.denoisers import Denoiser, EDMDenoiser
from xgenda.diffusion.guidance import WHITE_ONLY
from xgenda.diffusion.tiles import TiledNetwork, Tiling
from xgenda.diffusion.trajectories import TrajectoryDenoiser
from xgenda.errors import OptionError, check_choice, check_count
from xgenda.grids import Grid
from xgenda.models.checkpoints import content_hash, load_weights
from xgenda.models.colouring import noise_on
from xgenda.models.conditioning import (
    BATCH,
    SIGMA_MIN,
    STEPS,
    Conditioning,
    physical_moments,
    places_of,
    plan_guided,
    stack_evidence,
    without_logarithms,
)
from xgenda.models.continuing import check_between, continued, fit_between
from xgenda.models.generative import GenerativeModel, Request, SamplingOptions
from xgenda.models.places import Between, between_cells, given_cells
from xgenda.models.spec import ModelSpec
from xgenda.networks.mesh import MeshNet
from xgenda.networks.songunet import SongUNet
from xgenda.networks.unet import UNet
from xgenda.networks.uno import UNO
from xgenda.scaling import Scaling

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["ARCHITECTURES", "BATCH", "SIGMA_MIN", "STEPS", "DiffusionModel", "build_network", "highest_sigma", "stack_evidence"]

Network = UNet | SongUNet | MeshNet | UNO
NETWORKS: dict[str, Any] = {"unet": UNet, "songunet": SongUNet, "mesh": MeshNet, "uno": UNO}
ARCHITECTURES = tuple(NETWORKS)


class DiffusionModel(GenerativeModel):
    """A diffusion prior of the standardised state, or of a window of consecutive states.

    Parameters
    ----------
    spec
        With grid, scaling and ``options``: 'network' (arguments of the U-Net), 'sigma_max', and where they apply 'feeds_state',
        'window' (number of states) and 'spacing' (seconds between them), 'noise' (of what covariance, if it is not
        white), 'tile' and 'overlap' (rows and columns of the parts of the grid
        that the network is called on, and those that neighbours share).
    denoiser
        Network and, where trained with one, Gaussian anchor.
    covariance
        Of the standardised state, for guidance='anchor'; by default that of the denoiser's anchor.
    valid
        Where the state is, see `GenerativeModel`.
    """

    def __init__(
        self, spec: ModelSpec, denoiser: EDMDenoiser, covariance: Anchor | None = None, valid: np.ndarray | None = None
    ) -> None:
        if spec.grid is None or spec.scaling is None:
            raise OptionError("A diffusion model needs a grid and a scaling.")
        self.spec, self.denoiser = spec, denoiser.eval().requires_grad_(False)
        covariance = denoiser.anchor if covariance is None else covariance
        self.scaling: Scaling = spec.scaling
        self.valid = valid
        self.sigma_max = float(spec.options["sigma_max"])
        self.denoiser.sigma_range = (SIGMA_MIN, self.sigma_max)
        self.colour = noise_on(spec.options.get("noise"), spec.grid.plane)
        if self.colour is not None:  # only one that is diagonal where that of the noise is can be had beside it
            covariance = covariance.under(self.colour) if isinstance(covariance, Spectral) else None
        self.covariance = covariance

    @property
    def window(self) -> int:
        """Number of states that the model sees together."""
        return int(self.spec.options.get("window", 1))

    def plan(self, asked: SamplingOptions, *, linear: bool = True) -> SamplingOptions:
        """Resolve the options, see `plan_guided`."""
        has_anchor = self.covariance is not None and (self.window == 1 or isinstance(self.covariance, Separable))
        if self.colour is not None and asked.guidance in WHITE_ONLY:
            raise OptionError(
                f"guidance={asked.guidance!r} is for white noise, and {self.spec.name!r} was trained with coloured noise; leave it out, or "
                f"use guidance='mmps'."
            )
        if self.pointwise and not (linear and asked.likelihood == "gaussian" and asked.guidance != "inpaint"):
            raise OptionError(
                f"{self.spec.name!r} is evaluated between its cells, which needs likelihood='gaussian', operators that are linear, and another "
                f"guidance than 'inpaint'; leave these options out, or use the model without between_cells."
            )
        return plan_guided(asked, self.spec.name, has_anchor=has_anchor, linear=linear and self.scaling.is_affine)

    def work(self, times: int, members: int, options: SamplingOptions) -> int:
        """Return the number of sampler steps of all samples."""
        return times * members * int(options.steps or STEPS)

    def prior_moments(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return the climatology and its standard deviation, in physical units."""
        assert request.climatology is not None
        std = torch.as_tensor(self.scaling.std).expand(self.spec.channels, *_grid(self.spec).plane).flatten(1)
        if self.covariance is not None:
            spread = self.covariance.diagonal().sqrt().reshape(self.window, *std.shape)
            std = std * spread[self.window // 2]
        return physical_moments(self.scaling, request.climatology, std)

    def posterior(self, request: Request) -> Tensor:
        """Sample in micro-batches of (time, member), or of members where the model is of windows."""
        whole = self.in_tiles(int(request.options.batch_size or BATCH)).to(request.device)
        denoiser: Denoiser = whole
        options, times, k = request.options, len(request.labels), self.window // 2
        assert options.batch_size is not None
        assert request.climatology is not None
        std = torch.as_tensor(self.scaling.std).expand(self.spec.channels, *_grid(self.spec).plane).reshape(-1)
        # a span is what is solved together: one time of one member, or all times of one member
        if k == 0:
            spans: list[tuple[int, ...]] = [(t,) for t in range(times)]
            observed = list(request.evidence)
        else:
            spans, observed = [tuple(range(times))], list(request.evidence[:1])
            denoiser = TrajectoryDenoiser(whole, k, batch=options.batch_size)
        between = self._between(request) if self.pointwise else []
        if between:
            observed = [given_cells(e, b, m) for e, (b, m) in zip(observed, between, strict=True)]
        covariance = self.covariance.of_length(times) if isinstance(self.covariance, Separable) else self.covariance
        places = places_of(_grid(self.spec), self.spec.options["network"].get("periodic"))
        z = Conditioning(
            request, self.scaling, _grid(self.spec).plane, request.climatology.flatten(1), std, spans, observed, lambda _: denoiser,
            covariance, (SIGMA_MIN, self.sigma_max), places, request.labels, trajectory=k > 0, colour=self.colour,
        ).samples()  # fmt: skip
        out = without_logarithms(self.scaling, z * std.reshape(self.spec.channels, -1) + request.climatology[:, None], -2)
        if not between or all(e.places is None or e.places.wanted is None for e in request.evidence):
            return out
        wanted = []
        for evidence, (b, m), label, cells in zip(request.evidence, between, request.labels, out, strict=True):
            assert evidence.places is not None
            keys = [(request.seed, label, member) for member in request.members]
            wanted.append(evidence.places.picked(between_cells(evidence, b, m, cells, keys), cells.shape[-1]))
        return torch.stack(wanted)

    def _between(self, request: Request) -> list[tuple[list[Between], Tensor]]:
        """Return what the cells say of the places of each time, and what is expected of both, shape (channels, cells + p)."""
        assert request.climatology is not None
        names, made, out = [v.name for v in self.spec.variables], dict[bytes, list[Between]](), []
        for evidence, mean in zip(request.evidence, request.climatology, strict=True):
            assert evidence.places is not None
            key = evidence.places.key
            if key not in made:
                made[key] = continued(self.spec.options["between"], names, self.spec.grid, evidence.places, self.colour)
            out.append((made[key], evidence.places.extend(mean.double())))
        return out

    def between_cells(
        self,
        fine: xr.Dataset | xr.DataArray | None = None,
        *,
        covariance: str | None = None,
        length_scale: float | Mapping[str, float] | None = None,
        std: float | Mapping[str, float] | None = None,
    ) -> DiffusionModel:
        """Return the same model as a prior over functions: known between its cells, so that observations are seen at their own places.

        Its cells are values at their centres, not means. Between them a field is what a covariance function makes of the cells, and
        independent of them what it leaves open. Observations that lie nearer to each other than cells then share what the
        grid does not show, and ``assimilate(..., at=places)`` evaluates the members anywhere.

        Parameters
        ----------
        fine
            Fields of the same variables on a finer grid around that of the model; the covariance is fitted to what the cells do not say of them.
        covariance, length_scale, std
            Instead of that: 'exponential', 'matern32', 'matern52' or 'gaussian', its length in metres, and its standard deviation in the units of
            each variable. Without any of these the model must be of band-limited functions (noise with a 'cutoff'), whose waves are
            summed at each place.

        Raises
        ------
        OptionError, GridError, StateError
            Saying what is needed.

        References
        ----------
        Lim, J. H. et al. (2023), Score-based diffusion models in function space, arXiv:2302.07400.
        """
        if self.window > 1 or self.valid is not None or not self.scaling.is_affine:
            raise OptionError(
                f"{self.spec.name!r} cannot be known between its cells: it must be of single states, without mask and logarithms."
            )
        given = {"covariance": covariance, "length_scale": length_scale, "std": std}
        if fine is not None:
            if any(v is not None for v in given.values()):
                raise OptionError("between_cells takes fine, or covariance, length_scale and std; leave one of them out.")
            between = fit_between(self.spec, fine)
        else:
            between = check_between(self.spec, self.colour, given)
        options = {**self.spec.options, "representation": "points", "between": between}
        out = DiffusionModel(dataclasses.replace(self.spec, options=options), self.denoiser, self.covariance)
        out.sha256 = content_hash(out)
        return out

    def in_tiles(self, batch: int) -> EDMDenoiser:
        """Return the denoiser of the whole grid, whose network is called on so many parts at once where it was trained on parts."""
        own = self.denoiser
        network = in_tiles(own.network, self.spec.grid, self.spec.options, batch)
        return own if network is own.network else EDMDenoiser(network, own.anchor, own.feeds_state, own.sigma_range)

    def refined(self, factor: int) -> DiffusionModel:
        """Return the same model on a grid of `factor` times as many rows and columns, whose every `factor`-th is one of this model's.

        It must be a model of functions: of a neural operator, with coloured noise, on a doubly periodic box. What is shorter than the waves
        that it was trained on is noise, unless that noise has none ('cutoff').

        Parameters
        ----------
        factor
            A whole number of at least 2.

        Raises
        ------
        OptionError
            If the model is not one of functions, or its box has masked cells.
        """
        check_count("factor", factor, 2)
        network, grid, scaling = dict(self.spec.options["network"]), self.spec.grid, self.scaling
        if self.colour is None or not isinstance(self.denoiser.network, UNO):
            raise OptionError(
                f"{self.spec.name!r} knows one resolution only. Models of functions are of boxes that are periodic along both axes: "
                f"xgenda.train(ds, periodic='both', architecture='uno', noise={{'kind': 'exponential', 'length': 0.1, 'cutoff': "
                f"{max(self.spec.grid.plane) // 3}}}). Finer fields of anywhere else come from a downscaling model: "  # type: ignore[union-attr]
                f"xgenda.train(coarse, target=fine, task='downscale')"
            )
        if not isinstance(grid, Grid) or self.valid is not None or network["position"]:
            raise OptionError(
                f"{self.spec.name!r} cannot be refined: it needs rows and columns, all cells valid, and position=0."
            )
        finer = Grid(*(_between(axis, factor) for axis in (grid.latitude, grid.longitude)))
        moments = [
            np.broadcast_to(m.mean((-2, -1), keepdims=True), (*m.shape[:-2], *finer.plane)).copy()
            for m in (scaling.mean, scaling.std)
        ]
        scaling = dataclasses.replace(scaling, mean=moments[0], std=moments[1])
        network |= {"shape": list(finer.plane), "resolution": network["resolution"] or list(grid.plane)}
        spec = dataclasses.replace(
            self.spec,
            name=f"{self.spec.name}-x{factor}",
            grid=finer,
            scaling=scaling,
            options={**self.spec.options, "network": network},
        )
        built = build_network(network)
        built.load_state_dict(self.denoiser.network.state_dict())
        # without a cutoff nothing is known of the waves that are new, and a covariance without them would keep observations from them
        known = isinstance(self.covariance, Spectral) and self.colour.cutoff is not None
        covariance = self.covariance.on(finer.plane) if known else None  # type: ignore[union-attr]
        out = DiffusionModel(spec, EDMDenoiser(built, None, False), covariance)
        out.sha256 = content_hash(out)  # by which lazy results are told apart
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, anchor, and the Gaussian for guidance where that is another one."""
        out = {f"network.{k}": v for k, v in self.denoiser.network.state_dict().items()}
        own = self.covariance if self.covariance is not self.denoiser.anchor else None
        masked = {} if self.valid is None else {"valid": torch.as_tensor(self.valid, dtype=torch.uint8)}
        return out | anchor_tensors(self.denoiser.anchor) | anchor_tensors(own, "covariance") | masked

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: dict[str, Tensor]) -> DiffusionModel:
        """Rebuild the model; the tensors must be exactly those that it stores."""
        anchor, covariance = read_anchor(tensors), read_anchor(tensors, "covariance")
        valid = tensors.pop("valid").bool().numpy() if "valid" in tensors else None
        network = build_network(spec.options["network"])
        load_weights(network, tensors, "network.")
        if stray := sorted(k for k in tensors if not k.startswith("network.")):
            raise KeyError(f"unexpected tensors {stray}")
        return cls(spec, EDMDenoiser(network, anchor, bool(spec.options.get("feeds_state", False))), covariance, valid)


def in_tiles(network: nn.Module, grid: Any, options: Mapping[str, Any], batch: int) -> nn.Module:
    """Return a network as it is called on the whole grid: on parts of it, blended, where `options` has a 'tile' and an 'overlap'."""
    tile = options.get("tile")
    if tile is None or tuple(tile) == tuple(grid.plane):
        return network
    (rows, columns), (above, beside) = tile, options["overlap"]
    wraps = bool(grid.periodic) and columns < grid.plane[1]
    tiling = Tiling(grid.plane, (rows, columns), (above, beside), periodic=wraps, multiple=int(getattr(network, "stride", 1)))
    return TiledNetwork(network, tiling, batch)


def build_network(options: Mapping[str, Any]) -> Network:
    """Build a network from stored options; 'architecture' says which, by default the small U-Net."""
    known = dict(options)
    architecture = check_choice("architecture", known.pop("architecture", "unet"), ARCHITECTURES)
    lists = {k: tuple(v) for k, v in known.items() if isinstance(v, list)}
    built: Network = NETWORKS[architecture](**known | lists)
    return built


def highest_sigma(anchor: Anchor | None) -> float:
    """Return a noise level that drowns the largest mode of the state tenfold (a correlated field's is far above 1)."""
    return 80.0 if anchor is None else max(80.0, 10.0 * math.sqrt(anchor.largest()))


def _between(axis: np.ndarray, factor: int) -> np.ndarray:
    """Return an evenly spaced axis with `factor` - 1 places after each of its own."""
    step = float(np.diff(axis).mean()) if len(axis) > 1 else 1.0
    return np.asarray(axis[0] + step / factor * np.arange(factor * len(axis)))


def _grid(spec: ModelSpec) -> Any:
    return spec.grid

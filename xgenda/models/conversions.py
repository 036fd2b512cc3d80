"""`ConversionModel`: fields of another kind to the latent space of an autoencoder, and by its decoder to fields of the kind that it knows.

After Brohan's conversion of one dataset to another: the decoder is kept, and an encoder is trained from a source with another grid, other
variables, or gaps. A state is

    x = g(m(s) + D(s) C u) + e,    u ~ N(0, I),    e ~ N(0, S),

with s the source, g the decoder and e its error, m(s) and D(s) (diagonal) mean and standard deviation of the latent vector given the source, and
C C^T the correlation of what the source leaves unsaid. No search is needed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import CheckpointError, OptionError, StateError, check_choice
from xgenda.models.checkpoints import load_weights
from xgenda.models.conditioning import without_logarithms
from xgenda.models.conditions import Conditions
from xgenda.models.generative import STAGES, GenerativeModel, Request, SamplingOptions
from xgenda.models.latents import LatentModel
from xgenda.models.means import LinearMean
from xgenda.models.spec import ModelSpec
from xgenda.networks.autoencoder import Encoder

ONE = np.zeros(1, np.int64)  # a latent vector is a field of one cell


@dataclass(frozen=True, eq=False)
class Route:
    """From fields of a source to latent vectors.

    Attributes
    ----------
    mean
        From standardised fields (zero in gaps) to latent vectors, as fields of shape (k, 1, 1).
    encoder
        What is added to it.
    factor
        Cholesky factor C of the correlation, shape (k, k).
    seen
        Where the source had values at any time, shape (inputs, rows, columns), bool; None: everywhere. What stands elsewhere, such as the land of
        a field that was filled, is not looked at.
    """

    mean: LinearMean
    encoder: Encoder
    factor: Tensor
    seen: Tensor | None = None


class ConversionModel(GenerativeModel):
    """From fields of a source to states of a `LatentModel`, for `downscale`.

    Parameters
    ----------
    spec
        Of task 'downscale' with inputs, whose variables, grid, scaling and options are those of the latent model; 'encoder' of
        ``spec.options``: arguments of the `Encoder` and 'masks', whether it sees where the source has values, or None.
    target
        The latent model.
    route
        From the source; None for the encoder of the latent model itself, whose source are its own states.
    """

    def __init__(self, spec: ModelSpec, target: LatentModel, route: Route | None) -> None:
        if spec.inputs is None or spec.grid is None or spec.scaling is None:
            raise OptionError("A conversion needs a grid, a scaling and inputs.")
        k = target.latent
        if route is not None and (route.factor.shape != (k, k) or route.mean.shape != (k, 1, 1)):
            raise OptionError(
                f"The latent vector has length {k}; mean and factor are of {route.mean.shape[0]} and {len(route.factor)}."
            )
        self.spec, self.target, self.route, self.inputs = spec, target, route, spec.inputs
        self.valid, self.gaps = target.valid, route is None or bool(spec.options["encoder"]["masks"])
        if route is not None:
            route.encoder.eval().requires_grad_(False)

    def plan(self, asked: SamplingOptions, *, linear: bool = True) -> SamplingOptions:
        """Resolve the options; there is nothing to search, and little to sample."""
        asked.refuse_all_but(("tile", "stage"), f"model={self.spec.name!r} draws from a latent space")
        check_choice("stage", asked.stage, STAGES)
        if asked.tile not in ("auto", None):
            raise OptionError(f"tile={asked.tile!r} has no effect: model={self.spec.name!r} sees the whole grid. Leave it out.")
        return SamplingOptions("none", "none", None, asked.batch_size, "none", stage=asked.stage)

    def latent_of(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latent vectors, each shape (t, k), of fields (t, inputs, cells), NaN in gaps."""
        plane, route = self.inputs.grid.plane, self.route
        if route is None:
            own = self.target.network.cpu()
            states = torch.where(standardised.isfinite(), standardised, 0.0).double()  # as it was trained
            mean, variance = own.encode(states.reshape(len(states), -1, *plane))
            return mean, (0.5 * variance).exp() if own.variational else torch.zeros_like(mean)
        if route.seen is not None:
            standardised = torch.where(route.seen.flatten(1), standardised, torch.nan)
        fields = encoder_inputs(standardised, plane, self.spec.options["encoder"]["masks"])
        filled = fields[:, : standardised.shape[1]]
        linear = route.mean.at(filled, filled[..., :1, None], (ONE, ONE))[:, :, 0, 0]
        mean, variance = (t.double() for t in route.encoder(fields.reshape(len(fields), -1, *plane).float(), linear))
        return mean, (0.5 * variance).exp()

    @torch.no_grad()
    def posterior(self, request: Request) -> Tensor:
        """Return members, or for stage 'mean' what is decoded from the mean of the latent vector."""
        assert request.standardised is not None
        assert request.climatology is not None
        seen = torch.ones(()) if self.route is None or self.route.seen is None else self.route.seen.flatten(1)
        empty = [t for t, s in enumerate(request.standardised) if not bool((s.isfinite() & seen.bool()).any())]
        if empty:
            raise StateError(
                f"ds is NaN everywhere at {request.labels[empty[0]]} and says nothing; leave it out: ds.dropna('time', how='all')"
            )
        mean, deviation = self.latent_of(request.standardised)
        std, shape, network = self.target.deviations(), self.target.error.shape, self.target.network.cpu()
        out = []
        for t, label in enumerate(request.labels):
            if request.options.stage == "mean":
                states = network.decode(mean[t][None]).flatten(1)
            else:
                streams = [
                    NoiseStream([(request.seed, f"{label}|{what}", m) for m in request.members])
                    for what in ("latent vector", "decoder")
                ]
                white = streams[0].normal(self.target.latent, dtype=torch.float64)
                if self.route is None:  # whose deviations are those of components as the encoder knows them
                    around = network.turned(deviation[t] * white)
                else:
                    around = deviation[t] * (white @ self.route.factor.double().T)
                states = network.decode(mean[t] + around).flatten(1) + self.target.covariance.draw(streams[1])
            out.append(states * std + request.climatology[t].reshape(-1))
            request.advance(1)
        scaled = torch.stack(out).reshape(len(out), -1, shape[0], shape[1] * shape[2])
        return without_logarithms(self.target.scaling, scaled, -2)

    def tensors(self) -> dict[str, Tensor]:
        """Return those of the latent model, and what leads to it."""
        if self.route is None:
            return self.target.tensors()
        own = {f"encoder.{k}": v for k, v in self.route.encoder.state_dict().items()}
        seen = {} if self.route.seen is None else {"seen": self.route.seen.to(torch.uint8)}
        return self.target.tensors() | self.route.mean.tensors() | own | {"factor": self.route.factor.float()} | seen

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: dict[str, Tensor]) -> ConversionModel:
        """Rebuild the model; the tensors must be exactly those that it stores.

        Raises
        ------
        CheckpointError
            If a tensor, or a part of the description, is not what it has to be.
        """
        if spec.inputs is None:
            raise CheckpointError("a conversion needs inputs")
        if spec.options["encoder"] is None:
            return cls(spec, LatentModel.from_tensors(latent_spec(spec), tensors), None)
        encoder = Encoder(**encoder_arguments(spec))
        load_weights(encoder, {k: tensors.pop(k) for k in list(tensors) if k.startswith("encoder.")}, "encoder.")
        mean, factor = LinearMean.from_tensors((encoder.latent, 1, 1), tensors), tensors.pop("factor")
        seen = tensors.pop("seen").bool() if "seen" in tensors else None
        return cls(spec, LatentModel.from_tensors(latent_spec(spec), tensors), Route(mean, encoder, factor, seen))


def reconstructing(model: LatentModel) -> ConversionModel:
    """Return the conversion of states of an autoencoder into themselves: encoded, and decoded again."""
    spec = model.spec
    assert spec.grid is not None
    inputs = Conditions(spec.variables, spec.grid, model.scaling)
    options = {**spec.options, "encoder": None}
    return ConversionModel(
        dataclasses.replace(spec, task="downscale", kind="conversion", inputs=inputs, options=options), model, None
    )


def latent_spec(spec: ModelSpec) -> ModelSpec:
    """Return the description of the latent model within a conversion."""
    return dataclasses.replace(spec, task="prior", kind="latent", inputs=None)


def encoder_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Return the arguments of the encoder of a conversion."""
    assert spec.inputs is not None
    given = dict(spec.options["encoder"])
    channels = spec.inputs.coarse_channels * (2 if given.pop("masks") else 1)
    return {"channels": channels, "shape": spec.inputs.grid.plane, "latent": int(spec.options["network"]["latent"]), **given}


def encoder_inputs(standardised: Tensor, plane: tuple[int, int], masks: bool) -> Tensor:
    """Return fields (t, inputs, cells) with their gaps filled from around and, with `masks`, after them where they have values."""
    seen = standardised.isfinite()
    shape = (*standardised.shape[:2], *plane)
    filled = filled_from_around(torch.where(seen, standardised, 0.0).reshape(shape), seen.reshape(shape)).flatten(2)
    return torch.cat([filled, seen.to(filled)], 1) if masks else filled


def filled_from_around(fields: Tensor, seen: Tensor) -> Tensor:
    """Return fields (t, channels, rows, columns) where they are `seen`, and elsewhere means over ever larger blocks of cells that hold some.

    The pull and push of Gortler et al. (1996). Zero, the climate, only where nothing of a field is seen: in a climate that has changed
    all cells are far from it, and gaps would tell where they are.
    """
    if bool(seen.all()) or max(fields.shape[-2:]) == 1:
        return torch.where(seen, fields, 0.0)
    pooling: dict[str, Any] = {
        "kernel_size": [min(2, n) for n in fields.shape[-2:]],
        "ceil_mode": True,
        "count_include_pad": False,
    }
    share = functional.avg_pool2d(seen.to(fields), **pooling)
    mean = functional.avg_pool2d(torch.where(seen, fields, 0.0), **pooling) / torch.where(share > 0, share, 1.0)
    above = functional.interpolate(filled_from_around(mean, share > 0), size=fields.shape[-2:], mode="bilinear")
    return torch.where(seen, fields, above)

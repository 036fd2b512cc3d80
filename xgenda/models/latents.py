"""`LatentModel`: an autoencoder as a prior, conditioned on observations by a search of its latent space."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xgenda.diffusion.anchors import LowRank, Modes, Separable, anchor_tensors, read_anchor
from xgenda.diffusion.covariances import Covariance, KernelCovariance
from xgenda.diffusion.denoisers import Denoiser, EDMDenoiser
from xgenda.diffusion.guidance import GUIDANCES as OF_DIFFUSION
from xgenda.diffusion.guidance import LIKELIHOODS
from xgenda.diffusion.noise import NoiseStream
from xgenda.diffusion.samplers import SAMPLERS as DIFFUSIONS
from xgenda.diffusion.samplers import integrate
from xgenda.diffusion.schedules import noise_levels
from xgenda.diffusion.trajectories import TrajectoryDenoiser
from xgenda.errors import CheckpointError, OptionError, check_choice, check_count, check_flag, check_option
from xgenda.models.checkpoints import load_weights
from xgenda.models.conditioning import SIGMA_MIN, physical_moments, plan_guided, without_logarithms
from xgenda.models.conditioning import STEPS as DIFFUSION_STEPS
from xgenda.models.decoding import AT_ONCE
from xgenda.models.fitting import kernel_on
from xgenda.models.generative import GenerativeModel, Request, SamplingOptions
from xgenda.models.latent_samples import STEPS, Diffusion, Search
from xgenda.models.spec import ModelSpec
from xgenda.networks.autoencoder import Autoencoder
from xgenda.networks.dense import LatentNet
from xgenda.scaling import Scaling

GUIDANCES: Mapping[str, Mapping[str, Any]] = {
    "posterior": {"prior": True, "decoder_error": True},
    "mse": {"decoder_error": False},
}
SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "map": {"optimiser": "lbfgs", "rate": 0.05, "tolerance": None, "tries": 8},
    "rmap": {"optimiser": "lbfgs", "rate": 0.05, "tolerance": None, "tries": 8, "perturb": "both"},
    "hmc": {"leapfrog": 8, "tries": 8},
}
OPTIMISERS = {"lbfgs": 1e-5, "adam": 1e-5}  # with the tolerances of each
PERTURBED = ("both", "observations")
BATCH = 16  # those of one time, usually: a batch ends with the last of its members
ERRORS = ("white", "exponential", "matern32", "matern52")
DRAWS = 512  # of the prior, for its moments
PRIORS = ("normal", "diffusion")  # of latent vectors
UNFIT = ("inpaint",)  # guidances that replace cells, which a latent vector has none of


class LatentModel(GenerativeModel):
    """A decoder of latent vectors, with its own error: x = climatology + std (g(z) + e).

    Latent vectors are standard normal, or what a diffusion learned of them: each for itself, or windows of consecutive ones.

    Parameters
    ----------
    spec
        With grid, scaling and ``options``: 'network' (arguments of the `Autoencoder`), 'error_kind' (one of `ERRORS`) and 'error_lengths' (in
        metres, per channel; empty for 'white'); with a learned prior 'prior' (arguments of the `LatentNet`) and 'sigma_max', and of windows
        'window' (number of states) and 'spacing' (seconds between them).
    network
        The autoencoder.
    error
        Standard deviation of the decoder's error in standardised units, shape (channels, rows, columns).
    valid
        Where the state is, see `GenerativeModel`.
    prior
        Denoiser of latent vectors (batch, window * k, 1, 1), where one was learned; of windows with a Gaussian that is separable in time.

    Raises
    ------
    OptionError
        If the description lacks grid or scaling, or the error has another shape or is negative.
    """

    def __init__(
        self, spec: ModelSpec, network: Autoencoder, error: Tensor, valid: np.ndarray | None = None, prior: EDMDenoiser | None = None
    ) -> None:  # fmt: skip
        if spec.grid is None or spec.scaling is None:
            raise OptionError("A latent model needs a grid and a scaling.")
        shape = (spec.channels, *spec.grid.plane)
        if tuple(error.shape) != shape or not bool((error >= 0).all()):
            raise OptionError(f"The decoder's error has shape {tuple(error.shape)} or is negative; {shape} is needed.")
        self.spec, self.network = spec, network.exactly().eval().requires_grad_(False)
        self.scaling: Scaling = spec.scaling
        self.error, self.valid = error.double(), valid
        if valid is not None:
            self.error = torch.where(torch.as_tensor(valid), self.error, 0.0)
        self.prior = None if prior is None else prior.eval().requires_grad_(False)
        if self.prior is not None:
            self.prior.sigma_range = (SIGMA_MIN, float(spec.options["sigma_max"]))
        self._covariance: Covariance | None = None
        self._moments: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what a worker can make itself."""
        return {**self.__dict__, "_covariance": None, "_moments": None}

    @property
    def latent(self) -> int:
        """Length of the latent vector."""
        return self.network.latent

    @property
    def window(self) -> int:
        """Number of latent vectors that the learned prior sees together."""
        return int(self.spec.options.get("window", 1))

    @property
    def covariance(self) -> Covariance:
        """S, that of the decoder's error in standardised units."""
        if self._covariance is None:
            flat, kind = self.error.flatten(1), self.spec.options["error_kind"]
            if kind == "white":
                self._covariance = LowRank(torch.zeros(flat.numel(), 1, dtype=torch.float64), flat.reshape(-1) ** 2)
            else:
                assert self.spec.grid is not None
                kernels = [kernel_on(self.spec.grid, kind, length) for length in self.spec.options["error_lengths"]]
                self._covariance = KernelCovariance(kernels, flat)
        return self._covariance

    def plan(self, asked: SamplingOptions, *, linear: bool = True) -> SamplingOptions:
        """Resolve the options.

        With a learned prior sampler 'auto' is a diffusion, with guidance 'mmps' or, where decoder and operators are linear, 'anchor'. Without, or
        with guidance 'posterior' or 'mse', it is a search: guidance 'auto' is then 'posterior', and 'mse' the published mean squared error, without
        errors of the observations and without the prior; sampler 'auto' is 'rmap', and 'map' and 'hmc' are the others, see `xgenda.latent`.

        Raises
        ------
        OptionError
            If an option is not known, or has no effect here.
        """
        if self.prior is not None and asked.guidance not in GUIDANCES and asked.sampler not in SAMPLERS:
            return self._plan_diffusion(asked, linear)
        name = self.spec.name
        if self.window > 1:
            raise OptionError(
                f"model={name!r} is of windows of states, which are solved together, by a diffusion; searches are for single states. Leave out "
                f"{f'guidance={asked.guidance!r}' if asked.guidance in GUIDANCES else f'sampler={asked.sampler!r}'}."
            )
        if self.prior is None and (asked.guidance in OF_DIFFUSION or asked.sampler in DIFFUSIONS):
            given = f"guidance={asked.guidance!r}" if asked.guidance in OF_DIFFUSION else f"sampler={asked.sampler!r}"
            accepted = ("auto", *GUIDANCES) if asked.guidance in OF_DIFFUSION else ("auto", *SAMPLERS)
            raise OptionError(
                f"{given} is not accepted; it must be one of {', '.join(map(repr, accepted))}: the latent vectors of {name!r} are standard normal. "
                f"For a diffusion of them: xgenda.train(ds, task='autoencoder', latent_prior='diffusion')"
            )
        why = f"model={name!r} is searched in its latent space, which has no levels of noise"
        dataclasses.replace(asked, likelihood="gaussian").refuse_all_but(
            ("guidance", "sampler", "steps", "guidance_options", "sampler_options"), why
        )
        check_choice("guidance", asked.guidance, ("auto", *GUIDANCES))
        check_choice("sampler", asked.sampler, ("auto", *SAMPLERS))
        check_choice("likelihood", asked.likelihood, tuple(LIKELIHOODS))
        guidance = "posterior" if asked.guidance == "auto" else asked.guidance
        sampler = "rmap" if asked.sampler == "auto" else asked.sampler
        if guidance == "mse" and sampler == "hmc":
            raise OptionError(
                "guidance='mse' is no probability to draw from; use sampler='map' or 'rmap', or guidance='posterior'."
            )
        if guidance == "mse" and asked.likelihood != "gaussian":
            raise OptionError(f"likelihood={asked.likelihood!r} has no effect with guidance='mse'. Leave it out.")
        of_guidance = dict(GUIDANCES[guidance])
        for key, value in asked.guidance_options.items():
            check_option("guidance_options", guidance, key, of_guidance)
            check_flag(f"guidance_options[{key!r}]", value)
            of_guidance[key] = value
        if of_guidance.get("prior") is False and sampler == "hmc":
            raise OptionError("sampler='hmc' draws from a posterior, which needs its prior; leave out guidance_options['prior'].")
        of_sampler = _sampler_options(sampler, asked.sampler_options)
        steps = STEPS[of_sampler.get("optimiser", sampler)] if asked.steps is None else check_count("steps", asked.steps)
        batch = BATCH if asked.batch_size is None else check_count("batch_size", asked.batch_size)
        return SamplingOptions(guidance, sampler, steps, batch, "none", asked.likelihood, of_guidance, of_sampler)

    def _plan_diffusion(self, asked: SamplingOptions, linear: bool) -> SamplingOptions:
        check_choice("guidance", asked.guidance, ("auto", *(g for g in OF_DIFFUSION if g not in UNFIT), *GUIDANCES))
        check_choice("sampler", asked.sampler, ("auto", *DIFFUSIONS, *SAMPLERS))
        why = f"model={self.spec.name!r} samples latent vectors, which have no place"
        for name in ("tile", "overlap", "stage"):
            if getattr(asked, name) not in (None, "all"):
                raise OptionError(f"{name}={getattr(asked, name)!r} has no effect: {why}. Leave it out.")
        given = dict(asked.guidance_options)
        error = given.pop("decoder_error", True)
        check_flag("guidance_options['decoder_error']", error)
        through = linear and self.scaling.is_affine and self.network.inner is None
        found = plan_guided(dataclasses.replace(asked, guidance_options=given), self.spec.name, has_anchor=True, linear=through)
        return dataclasses.replace(found, guidance_options={**found.guidance_options, "decoder_error": error})

    def work(self, times: int, members: int, options: SamplingOptions) -> int:
        """Return the number of samples, or of a diffusion that of the steps of all of them."""
        return times * members * (int(options.steps or DIFFUSION_STEPS) if options.sampler in DIFFUSIONS else 1)

    def prior_moments(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the prior from draws of the decoder, in physical units."""
        assert request.climatology is not None
        if self._moments is None:
            total = torch.zeros(2, self.error.numel(), dtype=torch.float64)
            network = self.network.cpu()
            with torch.no_grad():
                for part in self.drawn(DRAWS).split(AT_ONCE):
                    decoded = network.decode(part).flatten(1)
                    total += torch.stack([decoded.sum(0), decoded.square().sum(0)])
            mean = total[0] / DRAWS
            variance = (total[1] / DRAWS - mean**2).clamp(min=0.0) + self.error.reshape(-1) ** 2
            self._moments = mean.reshape(self.error.shape).flatten(1), variance.sqrt().reshape(self.error.shape).flatten(1)
        mean, deviation = self._moments
        std = self.deviations().reshape(mean.shape)
        return physical_moments(self.scaling, request.climatology + std * mean, std * deviation)

    def drawn(self, count: int) -> Tensor:
        """Return always the same draws of the latent prior, shape (count, k), float64; of a window those of its centre."""
        white = NoiseStream([(0, "moments of the prior", k) for k in range(count)]).normal(
            self.window, self.latent, dtype=torch.float64
        )
        if self.prior is None:
            return white[:, 0]
        levels = noise_levels("karras", DIFFUSION_STEPS, SIGMA_MIN, float(self.spec.options["sigma_max"]))
        with torch.no_grad():
            z = integrate(self.prior.cpu(), levels[0] * white.reshape(count, -1, 1, 1), levels, "heun")
        return z.reshape(white.shape)[:, self.window // 2]

    def deviations(self) -> Tensor:
        """Return the standard deviations of the scaling, flat, in the order of a state."""
        return torch.as_tensor(self.scaling.std).double().expand(self.error.shape).reshape(-1)

    def posterior(self, request: Request) -> Tensor:
        """Sample latent vectors for every (time, member), in batches, or for members where all times are solved together."""
        assert request.climatology is not None
        options, times, std = request.options, len(request.labels), self.deviations()
        single = [(t,) for t in range(times)]
        if options.sampler in SAMPLERS:
            out = Search(self, request, std, single, list(request.evidence)).samples()
        else:
            assert self.prior is not None
            sigmas = SIGMA_MIN, float(self.spec.options["sigma_max"])
            prior = self.prior.to(request.device)
            if isinstance(prior.anchor, Separable):
                denoise: Denoiser = TrajectoryDenoiser(prior, self.window // 2)
                sampled = Diffusion(self, request, std, [tuple(range(times))], list(request.evidence[:1]))
                out = sampled.samples(denoise, prior.anchor.of_length(times), sigmas)
            else:
                sampled = Diffusion(self, request, std, single, list(request.evidence))
                out = sampled.samples(prior, Modes(torch.eye(self.latent)), sigmas)
        shape = (times, len(request.members), self.spec.channels, -1)
        scaled = (out * std + request.climatology.flatten(1)[:, None]).reshape(shape)
        return without_logarithms(self.scaling, scaled, -2)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, the decoder's error, and the learned prior of latent vectors, in single precision."""
        masked = {} if self.valid is None else {"valid": torch.as_tensor(self.valid, dtype=torch.uint8)}
        weights = {f"network.{k}": v.float() for k, v in self.network.state_dict().items()}
        if self.prior is not None:
            weights |= {f"prior.{k}": v for k, v in self.prior.network.state_dict().items()}
            weights |= {k: v.float() for k, v in anchor_tensors(self.prior.anchor).items()}
        return weights | {"error": self.error.float()} | masked

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: dict[str, Tensor]) -> LatentModel:
        """Rebuild the model; the tensors must be exactly those that it stores.

        Raises
        ------
        CheckpointError
            If the description of the error, or a tensor, is not what it has to be.
        """
        kind, lengths = spec.options["error_kind"], spec.options["error_lengths"]
        if kind not in ERRORS or len(lengths) != (0 if kind == "white" else spec.channels):
            raise CheckpointError(f"the decoder's error is {kind!r} with {len(lengths)} lengths, for {spec.channels} channels")
        valid = tensors.pop("valid").bool().numpy() if "valid" in tensors else None
        error = tensors.pop("error")
        network = build_autoencoder(spec.options["network"])
        load_weights(network, tensors, "network.")
        prior: EDMDenoiser | None = None
        if "prior" in spec.options:
            anchor, latent_net = read_anchor(tensors), LatentNet(**spec.options["prior"])
            if (anchor is not None) != ("window" in spec.options):
                raise CheckpointError("a prior of windows of latent vectors has a Gaussian, and one of single ones has none")
            load_weights(latent_net, tensors, "prior.")
            prior = EDMDenoiser(latent_net, anchor, anchor is not None)
        known = "network." if prior is None else ("network.", "prior.")
        if stray := sorted(k for k in tensors if not k.startswith(known)):
            raise KeyError(f"unexpected tensors {stray}")
        return cls(spec, network, error, valid, prior)


def build_autoencoder(options: Mapping[str, Any]) -> Autoencoder:
    """Build the network from stored options."""
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return Autoencoder(**arguments)


def _sampler_options(sampler: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a sampler, checked."""
    known = dict(SAMPLERS[sampler])
    for key, value in given.items():
        where = f"sampler_options[{key!r}]"
        check_option("sampler_options", sampler, key, known)
        if key == "optimiser":
            check_choice(where, value, OPTIMISERS)
        elif key == "perturb":
            check_choice(where, value, PERTURBED)
        elif key in ("leapfrog", "tries"):
            check_count(where, value)
        elif isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < float("inf"):
            raise OptionError(f"{where}={value!r} is not accepted; it must be a positive number.")
        known[key] = value
    if "optimiser" in known:
        if "rate" in given and known["optimiser"] != "adam":
            raise OptionError("sampler_options['rate'] is the step of Adam; pass optimiser='adam' too, or leave it out.")
        if known["tolerance"] is None:
            known["tolerance"] = OPTIMISERS[known["optimiser"]]
        if known["optimiser"] != "adam":
            known.pop("rate")
    return known

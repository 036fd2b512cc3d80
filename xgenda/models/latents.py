"""`LatentModel`: an autoencoder as a prior, conditioned on observations by a search of its latent space."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xgenda.diffusion.anchors import LowRank
from xgenda.diffusion.batches import in_batches
from xgenda.diffusion.covariances import Covariance, KernelCovariance
from xgenda.diffusion.evidence import Evidence
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.guidance import LIKELIHOODS
from xgenda.diffusion.noise import NoiseStream
from xgenda.errors import CheckpointError, OptionError, check_choice, check_count, check_flag, check_option
from xgenda.latent import Diagonal, Factored, Posterior, Whitener, adam, hamiltonian, lbfgs, most_probable
from xgenda.models.checkpoints import load_weights
from xgenda.models.conditioning import Observed, physical_moments, without_logarithms
from xgenda.models.fitting import kernel_on
from xgenda.models.generative import GenerativeModel, PointEvidence, Request, SamplingOptions
from xgenda.models.spec import ModelSpec
from xgenda.networks.autoencoder import Autoencoder
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
STEPS = {"lbfgs": 200, "adam": 1000, "hmc": 12}
BATCH = 16  # those of one time, usually: a batch ends with the last of its members
ERRORS = ("white", "exponential", "matern32", "matern52")
DRAWS, AT_ONCE = 512, 64  # of the prior, for its moments


class LatentModel(GenerativeModel):
    """A decoder of standard normal latent vectors, with its own error: x = climatology + std (g(z) + e).

    Parameters
    ----------
    spec
        With grid, scaling and ``options``: 'network' (arguments of the `Autoencoder`), 'error_kind' (one of `ERRORS`) and 'error_lengths' (in
        metres, per channel; empty for 'white').
    network
        The autoencoder.
    error
        Standard deviation of the decoder's error in standardised units, shape (channels, rows, columns).
    valid
        Where the state is, see `GenerativeModel`.

    Raises
    ------
    OptionError
        If the description lacks grid or scaling, or the error has another shape or is negative.
    """

    def __init__(self, spec: ModelSpec, network: Autoencoder, error: Tensor, valid: np.ndarray | None = None) -> None:
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

        Guidance 'auto' is 'posterior'; 'mse' is the published mean squared error, without errors of the observations and without the prior.
        Sampler 'auto' is 'rmap'; 'map' and 'hmc' are the others, see `xgenda.latent`.

        Raises
        ------
        OptionError
            If an option is not known, or has no effect here.
        """
        name = self.spec.name
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

    def work(self, times: int, members: int, options: SamplingOptions) -> int:
        """Return the number of samples."""
        return times * members

    def prior_moments(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the prior from draws of the decoder, in physical units."""
        assert request.climatology is not None
        if self._moments is None:
            noise = NoiseStream([(0, "moments of the prior", k) for k in range(DRAWS)]).normal(self.latent, dtype=torch.float64)
            total = torch.zeros(2, self.error.numel(), dtype=torch.float64)
            network = self.network.cpu()
            with torch.no_grad():
                for part in noise.split(AT_ONCE):
                    decoded = network.decode(part).flatten(1)
                    total += torch.stack([decoded.sum(0), decoded.square().sum(0)])
            mean = total[0] / DRAWS
            variance = (total[1] / DRAWS - mean**2).clamp(min=0.0) + self.error.reshape(-1) ** 2
            self._moments = mean.reshape(self.error.shape).flatten(1), variance.sqrt().reshape(self.error.shape).flatten(1)
        mean, deviation = self._moments
        std = self.deviations().reshape(mean.shape)
        return physical_moments(self.scaling, request.climatology + std * mean, std * deviation)

    def deviations(self) -> Tensor:
        """Return the standard deviations of the scaling, flat, in the order of a state."""
        return torch.as_tensor(self.scaling.std).double().expand(self.error.shape).reshape(-1)

    def posterior(self, request: Request) -> Tensor:
        """Search the latent space for every (time, member), in batches."""
        assert request.climatology is not None
        options, times = request.options, len(request.labels)
        assert options.batch_size is not None
        std = self.deviations()
        search = _Search(self, request, std)
        derived = [bool((e.indices >= len(std)).any()) for e in request.evidence]
        together = [[t for t in range(times) if not derived[t]], *([t] for t in range(times) if derived[t])]
        out = torch.empty(times, len(request.members), len(std), dtype=torch.float64)
        for which in together:
            if which:
                found = in_batches(search, [(t, m) for t in which for m in request.members], options.batch_size)
                out[which] = found.reshape(len(which), len(request.members), -1)
        shape = (times, len(request.members), self.spec.channels, -1)
        scaled = (out * std + request.climatology.flatten(1)[:, None]).reshape(shape)
        return without_logarithms(self.scaling, scaled, -2)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and the decoder's error, in single precision."""
        masked = {} if self.valid is None else {"valid": torch.as_tensor(self.valid, dtype=torch.uint8)}
        weights = {f"network.{k}": v.float() for k, v in self.network.state_dict().items()}
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
        if stray := sorted(k for k in tensors if not k.startswith("network.")):
            raise KeyError(f"unexpected tensors {stray}")
        return cls(spec, network, error, valid)


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


@dataclass(frozen=True, eq=False)
class _Search:
    """Searches the latent space for some (time, member)."""

    model: LatentModel
    request: Request
    std: Tensor

    def __call__(self, batch: list[tuple[int, int]]) -> Tensor:
        """Return standardised states with the decoder's error, shape (batch, n), on the CPU."""
        request, model, options = self.request, self.model, self.request.options
        device = request.device
        network = model.network.to(device)
        groups = sorted({t for t, _ in batch})
        group = torch.tensor([groups.index(t) for t, _ in batch])
        exact = {t: self._conditioned(request.evidence[t]) for t in groups}
        linear = all(e is not None for e in exact.values())

        def decode(z: Tensor) -> Tensor:
            return network.decode(z).flatten(1)

        def problem(times: list[int], of: Tensor) -> Posterior:
            evidence = self._evidence(times, of)
            whiten = self._whitener(evidence, [exact[t] for t in times], of, decode)
            published = options.guidance == "mse"
            if published:
                whiten = Diagonal(evidence.unit())
            return Posterior(
                decode, evidence, whiten, options.likelihood, LIKELIHOODS[options.likelihood],
                bool(options.guidance_options.get("prior", False)), published,
            )  # fmt: skip

        where = problem(groups, group)
        tries = int(options.sampler_options["tries"])
        drawn = self._noise(batch, "latent vector").normal(tries, model.latent, dtype=torch.float64).to(device).transpose(0, 1)
        start = drawn[0]
        if options.sampler == "hmc":
            # the minimum and its Hessian belong to the time, whichever members are in the batch
            once = problem(groups, torch.arange(len(groups)))
            some = NoiseStream([(request.seed, f"{request.labels[t]}|where to begin", 0) for t in groups])
            begin = some.normal(tries, model.latent, dtype=torch.float64).to(device).transpose(0, 1)
            begin = torch.cat([torch.zeros_like(begin[:1]), begin])
            centre = lbfgs(once, most_probable(once, begin), STEPS["lbfgs"])
            root = torch.linalg.cholesky(once.curvature(centre))
            z = self._chain(where, centre[group], root[group], start, self._noise(batch, "chain"))
        else:
            if options.sampler == "rmap":
                where = self._randomised(where, batch, start)
            z = self._minimum(where, most_probable(where, drawn))
        with torch.no_grad():
            states = decode(z).cpu()
        if options.guidance_options["decoder_error"]:
            states = states + self._errors(batch, states, exact if linear else {})
        request.advance(len(batch))
        return states

    def _noise(self, batch: list[tuple[int, int]], purpose: str) -> NoiseStream:
        """Return a stream for each sample; what one draws does not depend on what another purpose has drawn before."""
        labels = self.request.labels
        return NoiseStream([(self.request.seed, f"{labels[t]}|{purpose}", m) for t, m in batch])

    def _evidence(self, times: list[int], group: Tensor) -> Evidence:
        request, model = self.request, self.model
        assert request.climatology is not None
        plane = model.error.shape[1], model.error.shape[2]
        spans = [(t,) for t in range(len(request.labels))]
        observed = Observed(
            request, model.scaling, plane, request.climatology.flatten(1), self.std, spans, list(request.evidence)
        )
        if bool((request.evidence[times[0]].indices >= len(self.std)).any()):
            return observed.through_operators(times[0])
        return observed.evidence(times, group).to(request.device)

    def _conditioned(self, evidence: PointEvidence) -> GaussianPosterior | None:
        """Return the decoder's error conditioned on linear observations; None for others, or where there is no error."""
        indices = evidence.indices
        if not self.request.options.guidance_options["decoder_error"] or not self.model.scaling.is_affine:
            return None
        if bool((indices >= len(self.std)).any()) or not bool((self.model.error > 0).any()):
            return None
        return GaussianPosterior(self.model.covariance, indices, evidence.weights.double() * self.std[indices], evidence.variance)

    def _whitener(
        self, evidence: Evidence, exact: list[GaussianPosterior | None], group: Tensor, decode: Callable[[Tensor], Tensor]
    ) -> Whitener:
        """Return L^-1 of the errors of observations and decoder."""
        device, size = self.request.device, evidence.value.shape[1]
        if all(e is not None for e in exact):
            factors = torch.eye(size, dtype=torch.float64).repeat(len(exact), 1, 1)
            for k, found in enumerate(exact):
                assert found is not None
                factors[k, : len(found.factor), : len(found.factor)] = found.factor
            return Factored(factors.to(device), group.to(device))
        variance = evidence.variance.double()
        if self.request.options.guidance_options["decoder_error"]:
            variance = variance + self._seen_error(evidence, len(group), decode)
        return Diagonal(variance.sqrt())

    def _seen_error(self, evidence: Evidence, size: int, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the variances of A' e, with A' at the middle of the latent space, from random signs (Hutchinson 1990)."""
        generator = torch.Generator().manual_seed(0)
        middle = torch.zeros(size, self.model.latent, dtype=torch.float64, device=self.request.device)
        with torch.no_grad():
            state = decode(middle)
        tangent, total = evidence.tangent(state), torch.zeros_like(evidence.value, dtype=torch.float64)
        error = self.model.error.reshape(-1).to(state)
        for _ in range(AT_ONCE):
            signs = torch.randint(0, 2, (len(error),), generator=generator).to(error) * 2 - 1
            total = total + tangent.forth((error * signs).expand(size, -1)).square().detach()
        return total / AT_ONCE

    def _minimum(self, where: Posterior, start: Tensor) -> Tensor:
        options = self.request.options
        steps, known = int(options.steps or STEPS["lbfgs"]), options.sampler_options
        if known["optimiser"] == "adam":
            return adam(where, start, steps, float(known["rate"]), float(known["tolerance"]))
        return lbfgs(where, start, steps, float(known["tolerance"]))

    def _randomised(self, where: Posterior, batch: list[tuple[int, int]], start: Tensor) -> Posterior:
        """Return the problem with perturbed observations, and around perturbed prior means."""
        value = where.evidence.value.double().expand(len(batch), -1)
        white = torch.zeros_like(value)
        for k, (t, m) in enumerate(batch):
            count = len(self.request.evidence[t].value)
            white[k, :count] = self._noise([(t, m)], "observations").normal(count, dtype=torch.float64)[0].to(white)
        if where.published:  # its misfit knows no errors, but the perturbations are those of the observations
            perturbation = white * where.evidence.variance.double().sqrt()
        else:
            perturbation = where.whiten.coloured(white)
        both = self.request.options.sampler_options["perturb"] == "both" and where.prior
        return dataclasses.replace(where, value=value + perturbation, centre=start if both else None)

    def _chain(self, where: Posterior, centre: Tensor, root: Tensor, white: Tensor, noise: NoiseStream) -> Tensor:
        """Return the ends of chains in the coordinates u of z = centre + root^-T u, which begin at draws of the Gaussian there."""
        options = self.request.options

        def placed(u: Tensor) -> Tensor:
            moved: Tensor = torch.linalg.solve_triangular(root.transpose(1, 2), u[..., None], upper=True)
            return centre + moved[..., 0]

        def function(u: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = where(placed(u))
            return value, torch.linalg.solve_triangular(root, slope[..., None], upper=False)[..., 0]

        steps = int(options.steps or STEPS["hmc"])
        return placed(hamiltonian(function, white, noise, steps, int(options.sampler_options["leapfrog"]))[0])

    def _errors(self, batch: list[tuple[int, int]], states: Tensor, exact: Mapping[int, GaussianPosterior | None]) -> Tensor:
        """Return draws of the decoder's error: given what observations leave of it where these are linear, else of S."""
        request, out = self.request, torch.empty_like(states)
        assert request.climatology is not None
        for t in sorted({t for t, _ in batch}):
            rows = [k for k, (s, _) in enumerate(batch) if s == t]
            noise = self._noise([batch[k] for k in rows], "decoder")
            found, observed = exact.get(t), request.evidence[t]
            if found is None or not len(observed.value):
                out[rows] = self.model.covariance.draw(noise)
                continue
            errors = self.model.covariance.draw(noise)
            mean = request.climatology.flatten(1)[t]
            expected = (observed.weights.double() * mean[observed.indices]).sum(-1) + found.observe(states[rows])
            perturbed = observed.value.double() + observed.variance.double().sqrt() * noise.normal(
                len(observed.value), dtype=torch.float64
            )
            out[rows] = found.update(errors, perturbed - expected)
        return out

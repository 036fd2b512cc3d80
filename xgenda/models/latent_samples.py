"""Samples of the latent vectors of a `LatentModel` given observations: by search, by Markov chains, or by diffusion."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xgenda.diffusion.anchors import Anchor
from xgenda.diffusion.batches import in_batches
from xgenda.diffusion.denoisers import Denoiser
from xgenda.diffusion.guidance import LIKELIHOODS, guide
from xgenda.diffusion.noise import LabelledNoise, NoiseStream
from xgenda.latent import Diagonal, Posterior, adam, hamiltonian, lbfgs, most_probable
from xgenda.models.conditioning import finer_levels, from_noise
from xgenda.models.decoding import Decoding

STEPS = {"lbfgs": 200, "adam": 1000, "hmc": 12}


class Search(Decoding):
    """Searches the latent space for some (time, member)."""

    def samples(self) -> Tensor:
        """Return standardised states with the decoder's error, shape (times, members, n), on the CPU."""
        request, times = self.request, len(self.spans)
        assert request.options.batch_size is not None
        derived = [self.derives(t) for t in range(times)]
        together = [[t for t in range(times) if not derived[t]], *([t] for t in range(times) if derived[t])]
        out = torch.empty(times, len(request.members), len(self.std), dtype=torch.float64)
        for which in together:
            if which:
                found = in_batches(self._batch, [(t, m) for t in which for m in request.members], request.options.batch_size)
                out[which] = found.reshape(len(which), len(request.members), -1)
        return out

    def _batch(self, batch: list[tuple[int, int]]) -> Tensor:
        """Return standardised states, shape (batch, n)."""
        request, model, options = self.request, self.model, self.request.options
        device = request.device
        groups = sorted({t for t, _ in batch})
        group = torch.tensor([groups.index(t) for t, _ in batch])

        def problem(of: Tensor) -> Posterior:
            evidence = self.evidence(groups, of)
            published = options.guidance == "mse"
            whiten = Diagonal(evidence.unit()) if published else self.whitener(evidence, groups, of)
            return Posterior(
                self.decode, evidence, whiten, options.likelihood, LIKELIHOODS[options.likelihood],
                bool(options.guidance_options.get("prior", False)), published,
            )  # fmt: skip

        where = problem(group)
        tries = int(options.sampler_options["tries"])
        drawn = self.noise(batch, "latent vector").normal(tries, model.latent, dtype=torch.float64).to(device).transpose(0, 1)
        start = drawn[0]
        if options.sampler == "hmc":
            # the minimum and its Hessian belong to the time, whichever members are in the batch
            once = problem(torch.arange(len(groups)))
            some = NoiseStream([(request.seed, f"{request.labels[t]}|where to begin", 0) for t in groups])
            begin = some.normal(tries, model.latent, dtype=torch.float64).to(device).transpose(0, 1)
            begin = torch.cat([torch.zeros_like(begin[:1]), begin])
            centre = lbfgs(once, most_probable(once, begin), STEPS["lbfgs"])
            root = torch.linalg.cholesky(once.curvature(centre))
            z = self._chain(where, centre[group], root[group], start, self.noise(batch, "chain"))
        else:
            if options.sampler == "rmap":
                where = self._randomised(where, batch, start)
            z = self._minimum(where, most_probable(where, drawn))
        with torch.no_grad():
            states = self.decode(z).cpu()
        if self.with_error:
            states = states + self.errors(batch, states)
        request.advance(len(batch))
        return states

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
            count = len(self.observed[t].value)
            white[k, :count] = self.noise([(t, m)], "observations").normal(count, dtype=torch.float64)[0].to(white)
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


class Diffusion(Decoding):
    """Samples latent vectors, or trajectories of them, by a diffusion guided by what their states show."""

    def samples(self, denoise: Denoiser, covariance: Anchor, sigmas: tuple[float, float]) -> Tensor:
        """Return standardised states with the decoder's error, shape (times, members, n), on the CPU.

        Parameters
        ----------
        denoise
            Of latent vectors (batch, k, 1, 1), or of trajectories of them (batch, times, k, 1, 1).
        covariance
            Gaussian of a span, for guidance 'anchor'.
        sigmas
            Lowest and highest noise level.
        """
        request, members = self.request, self.request.members
        assert request.options.batch_size is not None
        nothing = torch.zeros(0, self.model.latent, dtype=torch.float64)
        slopes = {s: self.slopes(s) if len(e.value) else nothing for s, e in enumerate(self.observed)}
        finer = [self._finer(s, slopes[s], sigmas[0]) for s in range(len(self.spans))]
        kinds = [(finer[s], s if self.derives(s) else -1) for s in range(len(self.spans))]
        parts: dict[int, Tensor] = {}
        for kind in sorted(set(kinds)):
            which = [s for s in range(len(self.spans)) if kinds[s] == kind]

            def sample(batch: list[tuple[int, int]], more: int = kind[0]) -> Tensor:
                return self._batch(batch, slopes, more, denoise, covariance, sigmas)

            found = in_batches(sample, [(s, m) for s in which for m in members], request.options.batch_size)
            parts.update(zip(which, found.reshape(len(which), len(members), -1), strict=True))
        out = torch.stack([parts[s] for s in range(len(self.spans))])
        out = out.reshape(len(self.spans), len(members), self.length, -1)
        return out.transpose(1, 2).flatten(0, 1)

    def _finer(self, span: int, slopes: Tensor, lowest: float) -> int:
        """Return how many levels below the lowest the sharpest observations need."""
        if not len(slopes):
            return 0
        states = len(self.std) // self.model.spec.channels * (self.model.spec.channels + len(self.request.operators))
        times = self.observed[span].indices[:, 0] // states
        sharpness = torch.zeros(int(times.max()) + 1, slopes.shape[1], dtype=torch.float64)
        return finer_levels(sharpness.index_add_(0, times, slopes.square()), lowest)

    def _batch(
        self, batch: list[tuple[int, int]], slopes: dict[int, Tensor], finer: int, denoise: Denoiser, covariance: Anchor,
        sigmas: tuple[float, float],
    ) -> Tensor:  # fmt: skip
        """Return standardised states of some (span, member), shape (batch, length * n)."""
        request, options = self.request, self.request.options
        groups = sorted({s for s, _ in batch})
        evidence = self.decoded(groups, torch.tensor([groups.index(s) for s, _ in batch]), slopes)
        known = {k: v for k, v in options.guidance_options.items() if k != "decoder_error"}
        guided = guide(denoise, evidence, options.guidance, anchor=covariance, likelihood=options.likelihood, **known)
        noise = LabelledNoise([[(request.seed, request.labels[t], m) for t in self.spans[s]] for s, m in batch])
        shape = (self.length, self.model.latent, 1, 1) if self.length > 1 else (self.model.latent, 1, 1)
        z = from_noise(guided, request, sigmas, finer, noise, shape, lambda: request.advance(len(batch) * self.length))
        with torch.no_grad():
            states = self.decode(z.flatten(1)).cpu()
        return states + self.errors(batch, states) if self.with_error else states

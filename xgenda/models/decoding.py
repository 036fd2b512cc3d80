"""What is observed through the decoder of a latent model, and the error that the decoder makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xgenda.diffusion.covariances import Covariance
from xgenda.diffusion.evidence import Evidence
from xgenda.diffusion.gaussian import GaussianPosterior
from xgenda.diffusion.noise import NoiseStream
from xgenda.latent import Decoded, Diagonal, Factored, Whitener
from xgenda.models.conditioning import Observed
from xgenda.models.generative import PointEvidence, Request

if TYPE_CHECKING:
    from xgenda.models.latents import LatentModel

AT_ONCE = 64  # states that are decoded together
Exact = GaussianPosterior | None


class Independent:
    """The covariance of consecutive states that do not depend on each other."""

    def __init__(self, one: Covariance, length: int) -> None:
        self.one, self.size = one, length * one.size

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return S[rows][:, columns], time by time."""
        n = self.one.size
        out = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        for t in torch.unique(rows // n).tolist():
            r, c = torch.nonzero(rows // n == t)[:, 0], torch.nonzero(columns // n == t)[:, 0]
            if len(c):
                out[r[:, None], c] = self.one.block(rows[r] % n, columns[c] % n)
        return out

    def diagonal(self) -> Tensor:
        """Return the variances."""
        return self.one.diagonal().repeat(self.size // self.one.size)

    def draw(self, noise: NoiseStream) -> Tensor:
        """Draw one trajectory per sample."""
        return torch.cat([self.one.draw(noise) for _ in range(self.size // self.one.size)], 1)


class Decoding:
    """Latent vectors of some (span, member), and what is observed of their states.

    Parameters
    ----------
    model, request
        Of whom what is asked.
    std
        Climatological standard deviations, shape (channels * cells,).
    spans
        Times that are solved together: one each, or all of a trajectory.
    observed
        Observations of each span.
    """

    def __init__(
        self, model: LatentModel, request: Request, std: Tensor, spans: Sequence[tuple[int, ...]], observed: Sequence[PointEvidence]
    ) -> None:  # fmt: skip
        self.model, self.request, self.std, self.spans, self.observed = model, request, std, spans, observed
        self.length = len(spans[0])
        self.network = model.network.to(request.device)
        self.with_error = bool(request.options.guidance_options["decoder_error"])
        self._exact: dict[int, Exact] = {}

    def decode(self, z: Tensor) -> Tensor:
        """Return the flat states, one after the other, of latent vectors (batch, length * k)."""
        return self.network.decode(z.reshape(-1, self.model.latent)).reshape(len(z), -1)

    def noise(self, batch: list[tuple[int, int]], purpose: str, time: int = 0) -> NoiseStream:
        """Return a stream for each sample, of a time of its span; what one draws does not depend on what another purpose has drawn before."""
        labels = self.request.labels
        return NoiseStream([(self.request.seed, f"{labels[self.spans[s][time]]}|{purpose}", m) for s, m in batch])

    def derives(self, span: int) -> bool:
        """Tell whether something beside the channels may be observed."""
        beyond = bool((self.observed[span].indices >= len(self.std)).any())
        return beyond if self.length == 1 else bool(self.request.operators)

    def evidence(self, which: list[int], group: Tensor) -> Evidence:
        """Return the observations of the states of some spans; `group` says which of these each sample of a batch has."""
        request, model = self.request, self.model
        assert request.climatology is not None
        plane = model.error.shape[1], model.error.shape[2]
        observed = Observed(
            request, model.scaling, plane, request.climatology.flatten(1), self.std, self.spans, self.observed, trajectory=self.length > 1
        )  # fmt: skip
        if self.derives(which[0]):
            return observed.through_operators(which[0])
        return observed.evidence(which, group).to(request.device)

    def exact(self, span: int) -> Exact:
        """Return the decoder's error conditioned on linear observations; None for others, or where there is no error."""
        if span not in self._exact:
            self._exact[span] = self._conditioned(span)
        return self._exact[span]

    def _conditioned(self, span: int) -> Exact:
        evidence = self.observed[span]
        if not self.with_error or not self.model.scaling.is_affine or self.derives(span):
            return None
        if not bool((self.model.error > 0).any()):
            return None
        covariance = self.model.covariance if self.length == 1 else Independent(self.model.covariance, self.length)
        std = self.std[evidence.indices % len(self.std)]
        return GaussianPosterior(covariance, evidence.indices, evidence.weights.double() * std, evidence.variance)

    def whitener(self, evidence: Evidence, which: list[int], group: Tensor) -> Whitener:
        """Return L^-1 of the errors of observations and decoder."""
        device, size = self.request.device, evidence.value.shape[1]
        exact = [self.exact(s) for s in which]
        if all(e is not None for e in exact):
            factors = torch.eye(size, dtype=torch.float64).repeat(len(exact), 1, 1)
            for k, found in enumerate(exact):
                assert found is not None
                factors[k, : len(found.factor), : len(found.factor)] = found.factor
            return Factored(factors.to(device), group.to(device))
        variance = evidence.variance.double()
        if self.with_error:
            variance = variance + self._seen_error(evidence, len(group))
        return Diagonal(variance.sqrt())

    def _seen_error(self, evidence: Evidence, size: int) -> Tensor:
        """Return the variances of A' e, with A' at the middle of the latent space, from random signs (Hutchinson 1990)."""
        generator = torch.Generator().manual_seed(0)
        middle = torch.zeros(size, self.length * self.model.latent, dtype=torch.float64, device=self.request.device)
        with torch.no_grad():
            state = self.decode(middle)
        tangent, total = evidence.tangent(state), torch.zeros_like(evidence.value, dtype=torch.float64)
        error = self.model.error.reshape(-1).repeat(self.length).to(state)
        for _ in range(AT_ONCE):
            signs = torch.randint(0, 2, (len(error),), generator=generator).to(error) * 2 - 1
            total = total + tangent.forth((error * signs).expand(size, -1)).square().detach()
        return total / AT_ONCE

    def decoded(self, which: list[int], group: Tensor, slopes: Mapping[int, Tensor]) -> Decoded:
        """Return the observations as they are seen from latent vectors; `slopes` are those of each span, see `slopes`."""
        evidence = self.evidence(which, group)
        padded = torch.zeros(len(which), evidence.value.shape[1], self.model.latent, dtype=torch.float64)
        for k, s in enumerate(which):
            padded[k, : len(slopes[s])] = slopes[s]
        own = padded[group].to(self.request.device)
        return Decoded(self.decode, evidence, self.whitener(evidence, which, group), own, linear=self.network.inner is None)

    def slopes(self, span: int) -> Tensor:
        """Return the derivative of the whitened observations of a span at the middle of the latent space, shape (m, k).

        By components of the latent vectors, of all times at once: an observation sees those of its own time.
        """
        latent, found = self.model.latent, []
        for part in torch.arange(latent).split(max(1, AT_ONCE // self.length)):
            group = torch.zeros(len(part), dtype=torch.int64)
            evidence = self.evidence([span], group)
            along = torch.zeros(len(part), latent, dtype=torch.float64, device=self.request.device)
            along[torch.arange(len(part)), part] = 1.0
            seen = Decoded(self.decode, evidence, self.whitener(evidence, [span], group), along.new_zeros(len(part), 0))
            along = along.repeat(1, self.length)
            found.append(seen.tangent(torch.zeros_like(along)).forth(along).detach().T)
        return torch.cat(found, 1).cpu()

    def errors(self, batch: list[tuple[int, int]], states: Tensor) -> Tensor:
        """Return draws of the decoder's error: given what observations leave of it where these are all linear, else of S."""
        request, out = self.request, torch.empty_like(states)
        assert request.climatology is not None
        linear = all(self.exact(s) is not None for s in {s for s, _ in batch})
        for s in sorted({s for s, _ in batch}):
            rows = [k for k, (span, _) in enumerate(batch) if span == s]
            some = [batch[k] for k in rows]
            streams = [self.noise(some, "decoder", t) for t in range(self.length)]
            errors = torch.cat([self.model.covariance.draw(stream) for stream in streams], 1)
            found, observed = self.exact(s), self.observed[s]
            if not linear or found is None or not len(observed.value):
                out[rows] = errors
                continue
            mean = request.climatology.flatten(1)[list(self.spans[s])].reshape(-1)
            expected = (observed.weights.double() * mean[observed.indices]).sum(-1) + found.observe(states[rows])
            perturbed = observed.value.double() + observed.variance.double().sqrt() * streams[0].normal(
                len(observed.value), dtype=torch.float64
            )
            out[rows] = found.update(errors, perturbed - expected)
        return out

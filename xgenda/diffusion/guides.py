"""What all guidances share: the departure, the error variance, the derivative of the operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from xgenda.diffusion.anchors import Anchor
from xgenda.diffusion.denoisers import Denoiser
from xgenda.diffusion.evidence import Evidence, reweighted
from xgenda.diffusion.masks import Places
from xgenda.diffusion.solvers import conjugate_gradients


class Guide:
    """What all guidances share: the departure, the error variance, the derivative of the operator."""

    def __init__(
        self,
        denoise: Denoiser,
        evidence: Evidence,
        options: Mapping[str, Any],
        anchor: Anchor | None,
        likelihood: tuple[str, float],
        places: Places | None = None,
    ) -> None:
        self.denoise, self.evidence, self.options, self.anchor, self.likelihood = denoise, evidence, options, anchor, likelihood
        self.places = places
        self.value, self.error = evidence.value, evidence.variance
        self.sigma_range = getattr(denoise, "sigma_range", None)
        self._guess: Tensor | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the posterior estimate of the state."""
        with torch.no_grad():
            clean = self.denoise(x, sigma)
            return clean + self.update(clean.flatten(1), sigma).reshape(x.shape)

    def update(self, clean: Tensor, sigma: float) -> Tensor:
        """Return what to add to the flat denoised state."""
        raise NotImplementedError

    def departure(self, clean: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Return y - A(xhat) and R, reweighted where the likelihood is heavy-tailed."""
        departure = self.value.to(clean) - self.evidence.observe(clean)
        error = self.error.to(clean)
        if self.likelihood[0] != "gaussian":
            expected = error + self.evidence.gain(clean) * sigma**2 / (1 + sigma**2)
            error = reweighted(self.likelihood[0], departure, error, expected, self.likelihood[1])
        return departure, error

    def proximal(
        self,
        clean: Tensor,
        sigma: float,
        spread: Callable[[Tensor], Tensor],
        scale: float,
        iterations: int,
        tolerance: float = 1e-6,
    ) -> Tensor:
        """Return A'^T (A' C A'^T + R)^-1 (y - A xhat) for C = `spread`, solved in observation space.

        Scaled by R^-1/2 on both sides; `scale`, the size of C's diagonal, is for preconditioning.
        """
        departure, error = self.departure(clean, sigma)
        tangent, root = self.evidence.tangent(clean), error.sqrt()
        diagonal = 1 + self.evidence.gain(clean).to(clean) * scale / error
        # the solution changes little from one noise level to the next
        guess = self._guess if self._guess is not None and self._guess.shape == departure.shape else None
        solved = conjugate_gradients(
            lambda v: v + tangent.forth(spread(tangent.back(v / root))) / root,
            departure / root, iterations, tolerance=tolerance, preconditioner=1 / diagonal, guess=guess,
        )  # fmt: skip
        self._guess = solved
        return tangent.back(solved / root)

"""What all guidances share: the departure, the error variance, the derivative of the operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from xgenda.diffusion.anchors import Anchor
from xgenda.diffusion.coloured import like_fields
from xgenda.diffusion.denoisers import Denoiser
from xgenda.diffusion.evidence import Evidence, LinearEvidence, reweighted
from xgenda.diffusion.masks import Places
from xgenda.diffusion.random_fields import Colour
from xgenda.diffusion.solvers import conjugate_gradients
from xgenda.errors import OptionError

WIDEST = 64  # cells of an observation up to which its variance under coloured noise is summed pair by pair


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
        colour: Colour | None = None,
    ) -> None:
        self.denoise, self.evidence, self.options, self.anchor, self.likelihood = denoise, evidence, options, anchor, likelihood
        self.places, self.colour = places, colour
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
            expected = error + self.gain(clean) * sigma**2 / (1 + sigma**2)
            error = reweighted(self.likelihood[0], departure, error, expected, self.likelihood[1])
        return departure, error

    def coloured(self, vector: Tensor) -> Tensor:
        """Return K v, the covariance of the noise times flat states; v where it is white."""
        return vector if self.colour is None else like_fields(self.colour, vector)

    def gain(self, clean: Tensor) -> Tensor:
        """Return diag(A' K A'^T) at the flat denoised state, shape (batch, m).

        Raises
        ------
        OptionError
            Under coloured noise, if the operator does not say which cells it looks at, or looks at many.
        """
        if self.colour is None:
            return self.evidence.gain(clean).to(clean)
        rows = self.evidence
        if not isinstance(rows, LinearEvidence) or rows.indices.shape[-1] > WIDEST:
            raise OptionError(
                f"With coloured noise guidance 'sda' and 'w2c' and likelihoods other than 'gaussian' are for observations of at most {WIDEST} "
                f"cells each, and not for operators= that are functions; use guidance='mmps', likelihood='gaussian'."
            )
        cells, slope = self.colour.shape[0] * self.colour.shape[1], rows.slope(clean)
        one, other = rows.indices[rows.group, :, :, None], rows.indices[rows.group, :, None, :]
        between = torch.where(
            one // cells == other // cells, self.colour.block(one.cpu() % cells, other.cpu() % cells).to(slope), 0.0
        )
        total = torch.einsum("bmi,bmij,bmj->bm", slope, between, slope)
        return total.expand(len(clean), -1).to(clean)

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

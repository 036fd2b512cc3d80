"""Guidance by replacement: inpainting under a hard or a soft mask.

Replacement samples no posterior of the errors of observations: what is known counts as exact, or for what the interpolation makes of it, and
its surroundings follow the prior. Resampling (RePaint) brings them into agreement. Likelihood guidance weighs both by their errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xgenda.diffusion.anchors import Anchor
from xgenda.diffusion.denoisers import Denoiser
from xgenda.diffusion.evidence import Evidence, LinearEvidence
from xgenda.diffusion.guides import Guide
from xgenda.diffusion.masks import OnPlane, Places, Seen
from xgenda.diffusion.solvers import conjugate_gradients
from xgenda.errors import OptionError

INTERPOLATIONS = ("mask", "anchor", "matern")
NO_NOISE = 1e4  # a noise level that tells nothing of the state


class Inpaint(Guide):
    """Replace what is observed.

    Without `reach`: xhat + A^T (A A^T)^-1 (y - A xhat). With it under the soft mask m = max_i exp(-d_i^2 / (2 reach^2)) of Huang et al.
    (2024), d_i cells from observation i of the same channel: xhat + m (k - xhat), with k the interpolated observations.

    ========= =====================================================================================================================
    mask      k - xhat is the mean of the departures y - A xhat with their masks as weights, each for what it is worth at this
              noise level, V / (V + R)
    anchor    k = S A^T (A S A^T + R)^-1 (y - A 0) of the Gaussian of the model: the best linear estimate
    matern    simple kriging of each channel on its own, Matern-1/2 of range `length`, with the errors of the observations as nugget
    ========= =====================================================================================================================

    Parameters
    ----------
    denoise, evidence, options, anchor, likelihood, places
        As in `xgenda.diffusion.guidance.guide`.
    both
        Makes the guided denoiser whose estimate is replaced under the mask; None: that of the prior.
    """

    def __init__(
        self, denoise: Denoiser, evidence: Evidence, options: Any, anchor: Anchor | None, likelihood: tuple[str, float],
        places: Places | None = None, both: Callable[[], Denoiser] | None = None, best: Callable[[], Guide] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(denoise, evidence, options, anchor, likelihood, places)
        reach, how = float(options["reach"]), options["interpolation"]
        if not reach and (how != "mask" or options["also"] is not None):
            raise OptionError(
                "guidance_options: 'interpolation' and 'also' of 'inpaint' need a soft mask; give its width in cells: 'reach': 1.5"
            )
        if how == "anchor" and anchor is None:
            raise OptionError(
                "guidance_options['interpolation']='anchor' needs a Gaussian anchor, and there is none; use 'matern'."
            )
        if reach and not isinstance(evidence, LinearEvidence):
            raise OptionError("guidance_options['reach'] needs observations of cells, and these are of a function; leave it out.")
        self.best = best
        self.inner = denoise if both is None else both()
        self._known: tuple[Tensor, Tensor] | None = None
        self._maps: list[list[tuple[int, Tensor, Tensor]]] = []
        self._channels = 0
        self._event: torch.Size | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return the estimate with what is observed in its place."""
        self._event = x.shape[1:]
        with torch.no_grad():
            clean = self.inner(x, sigma)
            return clean + self.update(clean.flatten(1), sigma).reshape(x.shape)

    def update(self, clean: Tensor, sigma: float) -> Tensor:
        """Return what to add to the flat denoised state."""
        if self.options["interpolation"] != "mask":
            known, mask = self._interpolated(clean)
            assert isinstance(self.evidence, LinearEvidence)
            group = self.evidence.group
            return mask[group].to(clean) * (known[group].to(clean) - clean)
        departure, error = self.departure(clean, sigma)
        share = sigma**2 / (1 + sigma**2)
        worth = share * self.evidence.gain(clean).to(clean)
        if not self.options["reach"]:
            tangent = self.evidence.tangent(clean)
            solved = conjugate_gradients(
                lambda v: tangent.forth(tangent.back(v)) + error / max(share, 1e-30) * v, departure, 50,
                preconditioner=share / (worth + error),
            )  # fmt: skip
            return tangent.back(solved)
        counts = worth / (worth + error).clamp(min=1e-30)
        return self._averaged(counts * departure)

    def _seen(self) -> tuple[list[Seen], int]:
        """Return the observations of every group, and the number of channels; those of several states lie one after the other."""
        assert isinstance(self.evidence, LinearEvidence)
        assert self._event is not None
        places = self.places or OnPlane(self._event[-2], self._event[-1])
        channels = int(torch.tensor(self._event).prod()) // places.size
        return [Seen(self.evidence, g, places) for g in range(len(self.evidence.indices))], channels

    def _averaged(self, departure: Tensor) -> Tensor:
        """Return the departures averaged under the mask, times the mask."""
        assert self._event is not None
        assert isinstance(self.evidence, LinearEvidence)
        if not self._maps:
            seen, self._channels = self._seen()
            self._maps = [s.averaging(self._channels, float(self.options["reach"])) for s in seen]
        size = int(torch.tensor(self._event).prod())
        out = torch.zeros(len(departure), self._channels, size // self._channels).to(departure)
        for g, maps in enumerate(self._maps):
            members = torch.nonzero(self.evidence.group == g)[:, 0]
            for channel, own, matrix in maps:
                out[members, channel] = departure[members][:, own] @ matrix.T.to(departure)
        return out.flatten(1)

    def _interpolated(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the interpolated observations and the mask of every group, shape (groups, n)."""
        if self._known is None:
            seen, channels = self._seen()
            assert isinstance(self.evidence, LinearEvidence)
            mask = torch.stack([s.mask(channels, float(self.options["reach"])) for s in seen])
            groups = len(seen)
            if self.options["interpolation"] == "anchor":
                assert self.best is not None
                found = self.best().update(torch.zeros(len(like), like.shape[1]).to(like), NO_NOISE)
                first = [int(torch.nonzero(self.evidence.group == g)[0, 0]) for g in range(groups)]
                known = found[first].double().cpu()
            else:
                departure = self.value.double() - self.evidence.observe(torch.zeros(len(like), like.shape[1]).to(like)).double()
                known = torch.stack([
                    s.kriged(
                        departure[int(torch.nonzero(self.evidence.group == g)[0, 0])].cpu(), self.evidence.variances[g].double().cpu(),
                        channels, float(self.options["length"]),
                    )
                    for g, s in enumerate(seen)
                ])  # fmt: skip
            self._known = known, mask
        return self._known

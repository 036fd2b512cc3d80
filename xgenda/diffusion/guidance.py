r"""Likelihood guidance: turn a prior denoiser D into the posterior denoiser E[x0 | x, y].

For y = A(x0) + e, e ~ N(0, R), with xhat = D(x; sigma), every method approximates x0 | x by N(xhat, C), so that y | x ~
N(A(xhat), A C A^T + R), and adds sigma^2 times the gradient of its logarithm (Tweedie). They differ in V = A C A^T, and in whether the
gradient goes through the network, J = dD/dx:

======== =========================================== ============================== ================================
kind     V                                           gradient                       source
======== =========================================== ============================== ================================
dps      none; step zeta / norm(y - A xhat)          through the network            Chung et al. 2023, 2209.14687
pigdm    r^2 A A^T, r^2 = sigma^2 / (1 + sigma^2)    through the network            Song et al. 2023, PiGDM
sda      gamma sigma^2 diag(A A^T)                   through the network, or        Rozet & Louppe 2023, 2306.10574
                                                     `detach`: J replaced by I
w2c      gamma r^2 diag(A A^T)                       with respect to xhat; J        Schmidt et al. 2024
                                                     replaced by r^2 / sigma^2
mmps     A (sigma^2 J) A^T, by a Krylov solver       through the network            Rozet et al. 2024, 2405.13712
anchor   A C A^T, C = (S^-1 + sigma^-2 I)^-1         with respect to xhat; J        exact for Gaussian priors
         of a fitted covariance S                    replaced by C / sigma^2
diffpir  (sigma^2 / lambda) A A^T                    the proximal point itself      Zhu et al. 2023, 2305.08995
inpaint  none: the observed cells are replaced       none                           Lugmayr et al. 2022, 2201.09865;
         under a hard or a soft mask                                                Huang et al. 2024, 2401.05932
======== =========================================== ============================== ================================

With coloured noise, x = x0 + sigma K^1/2 e, the table holds with sigma^2 K for sigma^2 and r^2 K for r^2: K is applied to the gradient and stands
between A and A^T in V (`xgenda.diffusion.coloured`). C of 'anchor' is (S^-1 + sigma^-2 K^-1)^-1 then, which takes an S that is diagonal where
K is (`Spectral.under`); 'inpaint' is for white noise.

States are in units of their climatological standard deviation, in which the scalars of the table are meant. Nothing is shared between
samples: losses, norms and the iterations of the solvers are per sample.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from xgenda.diffusion.anchors import Anchor, Observable
from xgenda.diffusion.denoisers import Denoiser
from xgenda.diffusion.evidence import Evidence, LinearEvidence
from xgenda.diffusion.gaussian import factor_of
from xgenda.diffusion.guides import Guide
from xgenda.diffusion.inpainting import INTERPOLATIONS, Inpaint
from xgenda.diffusion.masks import Places
from xgenda.diffusion.random_fields import Colour
from xgenda.diffusion.solvers import SOLVERS, arnoldi_solve, conjugate_gradients
from xgenda.errors import OptionError, check_choice, check_count, check_flag, check_option

STIFF, MORE = 100.0, 3  # see `factorises`
WHITE_ONLY = ("inpaint",)
GUIDANCES = ("anchor", "mmps", "sda", "w2c", "pigdm", "dps", "diffpir", "inpaint")
LIKELIHOODS = {"gaussian": 0.0, "student-t": 4.0, "huber": 1.345}
#: Options of each guidance with their defaults, chosen on the closed form (docs/benchmarks/closed_form.py).
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "anchor": {"tolerance": 1e-6, "iterations": 200},
    "mmps": {"iterations": 5, "solver": "damped"},
    "sda": {"gamma": 0.3, "detach": False},
    "w2c": {"gamma": 1.0},
    "pigdm": {"iterations": 30},
    "dps": {"zeta": 1.0},
    "diffpir": {"lambda": 1.0, "iterations": 30},
    "inpaint": {"reach": 0.0, "interpolation": "mask", "length": 6.0, "also": None},
}


def guidance_options(kind: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all options of a guidance, checked.

    Raises
    ------
    OptionError
        If the guidance or an option is not known, or a value is out of its range.
    """
    check_choice("guidance", kind, GUIDANCES)
    known = dict(OPTIONS[kind])
    for name, value in (given or {}).items():
        where = f"guidance_options[{name!r}]"
        check_option("guidance_options", kind, name, known)
        if name == "solver":
            check_choice(where, value, SOLVERS)
        elif name == "iterations":
            check_count(where, value)
        elif name == "detach":
            check_flag(where, value)
        elif name == "interpolation":
            check_choice(where, value, INTERPOLATIONS)
        elif name == "also":
            if value is not None:
                check_choice(where, value, tuple(k for k in GUIDANCES if k != "inpaint"))
        elif (
            isinstance(value, bool)
            or not isinstance(value, numbers.Real)
            or not 0 <= float(value) < float("inf")
            or (float(value) == 0 and name != "reach")
        ):
            raise OptionError(f"{where}={value!r} is not accepted; it must be a positive number.")
        known[name] = value
    return known


def guide(
    denoise: Denoiser,
    evidence: Evidence,
    kind: str,
    *,
    anchor: Anchor | None = None,
    likelihood: str = "gaussian",
    likelihood_scale: float | None = None,
    places: Places | None = None,
    colour: Colour | None = None,
    **options: Any,
) -> Denoiser:
    """Return the posterior denoiser.

    Parameters
    ----------
    denoise
        Prior denoiser of states (batch, *event).
    evidence
        Observations of each sample.
    kind
        One of `GUIDANCES`.
    anchor
        Covariance of the flattened standardised state, needed by 'anchor'.
    likelihood
        'gaussian', or for suspect data 'student-t' or 'huber': see `xgenda.diffusion.evidence.reweighted`.
    likelihood_scale
        Degrees of freedom of Student's t (4), or Huber's threshold in standard deviations (1.345).
    places
        Where the cells are, for the distances of 'inpaint'; by default on a plane with the last two axes of the state.
    colour
        Covariance of the noise that the denoiser was trained with, of unit variance, the same in all channels; None for white noise.
    **options
        See `OPTIONS`.

    Raises
    ------
    OptionError
        If an option is not known, 'anchor' has no covariance or one that is for other noise, or 'inpaint' a non-linear operator or coloured
        noise.
    """
    known = guidance_options(kind, options)
    check_choice("likelihood", likelihood, LIKELIHOODS)
    if colour is not None and kind in WHITE_ONLY:
        raise OptionError(
            f"guidance={kind!r} is for white noise, and this model was trained with coloured noise; leave it out, or use guidance='mmps'."
        )
    if kind == "anchor" and anchor is None:
        raise OptionError("guidance='anchor' needs a Gaussian anchor, and there is none; use guidance='mmps'.")
    if kind == "anchor" and (getattr(anchor, "noise", None) is None) != (colour is None):
        raise OptionError(
            "guidance='anchor' has the covariance of states under other noise than the denoiser; use guidance='mmps'."
        )
    if kind == "inpaint" and not evidence.linear:
        raise OptionError("guidance='inpaint' needs a linear operator, and this one is not; use guidance='mmps'.")
    if evidence.value.shape[1] == 0:
        return denoise
    scale = LIKELIHOODS[likelihood] if likelihood_scale is None else float(likelihood_scale)
    heavy = likelihood, scale
    if kind == "inpaint":
        also = known["also"]
        both = None if also is None else functools.partial(guide, denoise, evidence, also, anchor=anchor, likelihood=likelihood)
        best = functools.partial(_Anchor, denoise, evidence, OPTIONS["anchor"], anchor, ("gaussian", 0.0))
        return Inpaint(denoise, evidence, known, anchor, heavy, places, both, best)
    return _KINDS[kind](denoise, evidence, known, anchor, heavy, places, colour)


class _ThroughNetwork(Guide):
    """Guidances that need the gradient of the denoiser."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            clean = self.denoise(x, sigma)
        state = clean.detach()
        flat = state.flatten(1)

        def through(vector: Tensor, keep: bool) -> Tensor:
            """Return K J^T v."""
            (out,) = torch.autograd.grad(clean, x, vector.reshape(x.shape), retain_graph=keep)
            return self.coloured(out.flatten(1))

        return state + sigma**2 * self.pull(flat, sigma, through).reshape(x.shape)

    def pull(self, clean: Tensor, sigma: float, through: Callable[[Tensor, bool], Tensor]) -> Tensor:
        """Return K times the gradient of log p(y | x) with respect to the noisy state, flat; `through` is K J^T."""
        raise NotImplementedError


class _Dps(_ThroughNetwork):
    def pull(self, clean: Tensor, sigma: float, through: Callable[[Tensor, bool], Tensor]) -> Tensor:
        departure, error = self.departure(clean, sigma)
        # departures in units of the state, weighted by their errors so that equal errors leave the published step
        unit = self.evidence.unit().to(clean)
        departure, error = departure / unit, error / unit**2
        seen = self.evidence.seen().to(error)
        weight = (error * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1) / error
        norm = (weight * departure.square()).sum(1, keepdim=True).sqrt().clamp(min=1e-12)
        step = weight * departure / (norm * unit)
        return 2 * float(self.options["zeta"]) * through(self.evidence.tangent(clean).back(step), False)


class _Sda(_ThroughNetwork):
    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        if not self.options["detach"]:
            return super().__call__(x, sigma)
        with torch.no_grad():
            clean = self.denoise(x, sigma)
            return clean + sigma**2 * self.pull(clean.flatten(1), sigma, lambda v, _: self.coloured(v)).reshape(x.shape)

    def pull(self, clean: Tensor, sigma: float, through: Callable[[Tensor, bool], Tensor]) -> Tensor:
        departure, error = self.departure(clean, sigma)
        total = error + self.options["gamma"] * sigma**2 * self.gain(clean)
        return through(self.evidence.tangent(clean).back(departure / total), False)


class _W2c(Guide):
    def update(self, clean: Tensor, sigma: float) -> Tensor:
        departure, error = self.departure(clean, sigma)
        share = sigma**2 / (1 + sigma**2)
        total = error + self.options["gamma"] * share * self.gain(clean)
        return share * self.coloured(self.evidence.tangent(clean).back(departure / total))


class _Pigdm(_ThroughNetwork):
    def pull(self, clean: Tensor, sigma: float, through: Callable[[Tensor, bool], Tensor]) -> Tensor:
        share = sigma**2 / (1 + sigma**2)
        return through(self.proximal(clean, sigma, lambda v: share * self.coloured(v), share, self.options["iterations"]), False)


class _Diffpir(Guide):
    def update(self, clean: Tensor, sigma: float) -> Tensor:
        share = sigma**2 / float(self.options["lambda"])
        found = self.proximal(clean, sigma, lambda v: share * self.coloured(v), share, self.options["iterations"])
        return share * self.coloured(found)


class _Mmps(_ThroughNetwork):
    r"""Solve (I + R^-1/2 A sigma^2 J A^T R^-1/2) v = R^-1/2 (y - A xhat), and pull back R^-1/2 v.

    sigma^2 J (sigma^2 K J^T under coloured noise) is a covariance for a true denoiser. For a network it is neither symmetric nor
    positive, and the system may be singular; see `arnoldi_solve`. A member whose solution or gradient is not finite gets the step
    of 'pigdm' without its gradient through the network at that level.
    """

    def pull(self, clean: Tensor, sigma: float, through: Callable[[Tensor, bool], Tensor]) -> Tensor:
        departure, error = self.departure(clean, sigma)
        tangent, root = self.evidence.tangent(clean), error.sqrt()
        target = departure / root

        def spread(vector: Tensor) -> Tensor:
            return sigma**2 * tangent.forth(through(tangent.back(vector / root), True)) / root

        if self.options["solver"] == "cg":
            solved = conjugate_gradients(lambda v: v + spread(v), target, self.options["iterations"])
            left = torch.zeros_like(target[:, 0])
        else:
            damped = self.options["solver"] == "damped"
            solved, left = arnoldi_solve(spread, target, self.options["iterations"], damped=damped)
        out = through(tangent.back(solved / root), False)
        failed = ~torch.isfinite(left) | ~torch.isfinite(out).all(1)
        if failed.any():
            share = sigma**2 / (1 + sigma**2)
            plain = self.coloured(self.proximal(clean, sigma, lambda v: share * self.coloured(v), share, 30)) / (1 + sigma**2)
            out = torch.where(failed[:, None], plain, out)
        return out


def factorises(anchor: Anchor | None, evidence: Evidence) -> bool:
    """Tell whether guidance 'anchor' factorises the matrix of the observations, rather than iterating.

    Iterations grow with the ratio of the state's variance to that of the errors, and beyond `STIFF` do not converge in as many as are allowed;
    so precise observations are factorised up to a number that is larger by `MORE`.
    """
    given: Any = None if anchor is None else anchor.given_noise(1.0)
    if not isinstance(given, Observable) or not isinstance(evidence, LinearEvidence):
        return False
    limit = given.direct_limit * (MORE if float(evidence.contrast().min()) > STIFF else 1)
    return int(evidence.seen().sum(1).max()) <= limit


class _Anchor(Guide):
    """x + C A^T (A C A^T + R)^-1 (y - A x): no backpropagation, a linear solve in observation space per noise level."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._factors: dict[float, list[Tensor]] = {}
        assert self.anchor is not None
        self.matrices = None
        exact = self.evidence.linear and self.likelihood[0] == "gaussian"
        if exact and factorises(self.anchor, self.evidence):
            assert isinstance(self.evidence, LinearEvidence)
            self.matrices = self.evidence.matrices()

    def update(self, clean: Tensor, sigma: float) -> Tensor:
        assert self.anchor is not None
        given = self.anchor.given_noise(sigma)
        if self.matrices is None:
            scale, options = float(given.variance.mean()), self.options
            return given.multiply(self.proximal(clean, sigma, given.multiply, scale, options["iterations"], options["tolerance"]))
        assert isinstance(self.evidence, LinearEvidence)
        departure, _ = self.departure(clean, sigma)
        solved = torch.zeros_like(departure)
        for g, factor in enumerate(self._factor(sigma)):
            members = self.evidence.group == g
            if members.any():
                solved[members] = torch.cholesky_solve(departure[members].T, factor.to(clean)).T
        return given.multiply(self.evidence.tangent(clean).back(solved))

    def _factor(self, sigma: float) -> list[Tensor]:
        """Return the Cholesky factor of A C A^T + R of every group, each shape (m, m)."""
        if sigma not in self._factors:
            assert self.anchor is not None
            assert self.matrices is not None
            assert isinstance(self.evidence, LinearEvidence)
            given = self.anchor.given_noise(sigma)
            assert isinstance(given, Observable)
            out = [
                factor_of(given.observed(columns.cpu(), matrix.cpu()) + torch.diag(variance.double().cpu()))
                for (columns, matrix), variance in zip(self.matrices, self.evidence.variances, strict=True)
            ]
            self._factors = {sigma: out} | dict(list(self._factors.items())[:1])  # Heun asks for each level twice in a row
        return self._factors[sigma]


_KINDS: Mapping[str, type[Guide]] = {
    "anchor": _Anchor, "mmps": _Mmps, "sda": _Sda, "w2c": _W2c, "pigdm": _Pigdm, "dps": _Dps, "diffpir": _Diffpir,
}  # fmt: skip


def goes_through(kind: str, options: Mapping[str, Any]) -> int:
    """Return how many gradients through the network a guidance takes at most for each of its evaluations; 0: none.

    Parameters
    ----------
    kind, options
        As from `guidance_options`.
    """
    if kind == "inpaint":
        also = options.get("also")
        return 0 if also is None else goes_through(also, OPTIONS[also])
    if not issubclass(_KINDS[kind], _ThroughNetwork) or options.get("detach"):
        return 0
    return 1 + (int(options["iterations"]) if kind == "mmps" else 0)

r"""Correlation functions of distance in the plane, and their spectra.

============= ================================================= ===========================================================
kind          c(r)                                              source
============= ================================================= ===========================================================
matern        2^(1-nu) / Gamma(nu) s^nu K_nu(s),                Rasmussen & Williams 2006, Gaussian Processes, eq. 4.14, 4.15
              s = sqrt(2 nu) r / length
exponential   exp(-r / length), matern of nu = 1/2              the same, eq. 4.18
matern32      (1 + s) exp(-s), s = sqrt(3) r / length           the same, eq. 4.17
matern52      (1 + s + s^2 / 3) exp(-s), s = sqrt(5) r / length the same, eq. 4.17
gaussian      exp(-r^2 / (2 length^2))                          squared exponential; the same, eq. 4.9
published     exp(-r / (2 length^2))                            the noise of denoising diffusion operators as it was released (Lim et
                                                                al. 2023, arXiv 2302.07400): the distance is not squared, so
                                                                that it is 'exponential' with another length
============= ================================================= ===========================================================
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from scipy.special import gamma, kv
from torch import Tensor

from xgenda.errors import OptionError, check_choice

KINDS = ("exponential", "matern32", "matern52", "matern", "gaussian", "published")
NEGLIGIBLE = 1e-13
_ORDERS = {"exponential": 0.5, "published": 0.5, "matern32": 1.5, "matern52": 2.5}


@dataclass(frozen=True)
class Kernel:
    """A correlation function c(r) with c(0) = 1.

    Parameters
    ----------
    kind
        One of `KINDS`.
    length
        Length scale, in the units of the distances.
    nu
        Smoothness of 'matern', between 0.1 and 20: fields have derivatives up to below that order.

    Raises
    ------
    OptionError
        If the kind is not known, the length not positive, or `nu` missing or not asked for.
    """

    kind: str = "matern32"
    length: float = 0.1
    nu: float | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if isinstance(self.length, bool) or not isinstance(self.length, numbers.Real) or not 0 < self.length < math.inf:
            raise OptionError(f"length={self.length!r} is not accepted; it must be a positive number, for example length=0.1.")
        if self.kind != "matern" and self.nu is not None:
            raise OptionError(f"nu={self.nu!r} belongs to kind='matern', and kind={self.kind!r} has none. Leave it out.")
        wrong = isinstance(self.nu, bool) or not isinstance(self.nu, numbers.Real) or not 0.1 <= self.nu <= 20
        if self.kind == "matern" and wrong:
            raise OptionError(f"nu={self.nu!r} is not accepted with kind='matern'; it must lie between 0.1 and 20: nu=1.0")

    @property
    def order(self) -> float | None:
        """Smoothness of a Matern; None for 'gaussian', which has derivatives of every order."""
        return None if self.kind == "gaussian" else _ORDERS.get(self.kind, self.nu)

    @property
    def scale(self) -> float:
        """Length scale in the convention of 'exponential', 'matern' and 'gaussian'."""
        return 2 * float(self.length) ** 2 if self.kind == "published" else float(self.length)

    def __call__(self, distance: Tensor) -> Tensor:
        """Return c at distances of any shape, float64."""
        scaled = distance.double() / self.scale
        nu = self.order
        if nu is None:
            return torch.exp(-0.5 * scaled**2)
        s = math.sqrt(2 * nu) * scaled
        if nu == 0.5:
            return torch.exp(-s)
        if nu == 1.5:
            return (1 + s) * torch.exp(-s)
        if nu == 2.5:
            return (1 + s + s**2 / 3) * torch.exp(-s)
        positive = s.clamp(min=1e-12)
        value = 2 ** (1 - nu) / gamma(nu) * positive**nu * torch.as_tensor(kv(nu, positive.cpu().numpy())).to(s)
        return torch.where(s > 1e-12, torch.nan_to_num(value, nan=0.0), 1.0)

    def density(self, wavenumber: Tensor) -> Tensor:
        """Return the integral of c(r) exp(-i k r) over the plane at angular wavenumbers k, in units of length squared, float64."""
        k = wavenumber.double() * self.scale
        nu = self.order
        if nu is None:
            return 2 * math.pi * self.scale**2 * torch.exp(-0.5 * k**2)
        # eq. 4.15 in two dimensions, with Gamma(nu + 1) / Gamma(nu) = nu
        return 2 * math.pi * self.scale**2 * (1 + k**2 / (2 * nu)) ** (-(nu + 1))

    def reach(self) -> float:
        """Return a distance beyond which c is negligible."""
        r = self.scale
        while float(self(torch.tensor(r))) > NEGLIGIBLE:
            r *= 1.2
        return r

"""What training finds out about its data before it starts: how much they are worth."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from xgenda.errors import LittleDataWarning
from xgenda.formatting import user_level
from xgenda.models.fitting import autocorrelation, leading_components
from xgenda.training.windows import Samples, time_order

LITTLE = 15.0  # independent fields below which withheld later times are hardly ever like the training


@dataclass(frozen=True)
class Verdict:
    """How much the training fields are worth.

    Attributes
    ----------
    fields
        Their number.
    independent
        The number of independent fields whose sample covariance is as accurate.
    text
        What to say of it.
    """

    fields: int
    independent: float
    text: str

    @property
    def enough(self) -> bool:
        """Whether there is something to learn from."""
        return self.independent >= LITTLE


def independent_fields(z: np.ndarray) -> float:
    """Return how many independent fields are worth as much as consecutive ones, for the estimate of a covariance.

    With the autocorrelation r_l of a principal component at lag l, N / (1 + 2 sum_l (1 - l / N) (r_l^2 - c_l)), where c_l is what chance alone
    gives, (1 + 2 sum_k<l r_k^2) / N (Bartlett 1935 and 1946). The median of the leading components: a trend, which fills one of them,
    leaves the others what they are.

    Parameters
    ----------
    z
        Anomalies in order of time, shape (n, state).
    """
    n, worth = len(z), []
    for p in leading_components(z):
        total = 0.0
        for lag in range(1, max(2, n // 3)):
            total += (1 - lag / n) * (autocorrelation(p, lag) ** 2 - (1 + 2 * max(0.0, total)) / n)
        worth.append(n / (1 + 2 * max(0.0, total)))
    return float(np.median(worth))


def judge(z: np.ndarray, samples: Samples, size: int | None = None) -> Verdict:
    """Return what standardised anomalies (n, state) are worth; `size` is the number of fields that they are evenly spaced ones of."""
    size = len(z) if size is None else size
    worth = independent_fields(z[time_order(samples.time, len(z))])
    text = (
        f"The {size} fields of ds ({samples.period}) are worth about {worth:.0f} independent ones, because they resemble their neighbours in "
        f"time. What comes later is then unlike all of them: expect too little spread, and no gain over a Gaussian, which takes seconds: "
        f"xgenda.gaussian_prior(ds). Fields over a longer time would help, more of them in the same time would not."
    )
    return Verdict(size, worth, text)


def warn_of_little(z: np.ndarray, samples: Samples, size: int | None = None) -> Verdict:
    """Return the verdict, after a `LittleDataWarning` if it is that there is too little."""
    verdict = judge(z, samples, size)
    if not verdict.enough:
        warnings.warn(verdict.text, LittleDataWarning, stacklevel=user_level())
    return verdict

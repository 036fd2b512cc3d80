"""What a downscaler in training is worth: the CRPS of its members at withheld times, beside what its network corrects."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from xgenda.models.corrective import CorrectiveModel
from xgenda.models.diffusive import Network
from xgenda.models.generative import SamplingOptions
from xgenda.training.calibrating import withheld_request
from xgenda.training.pairs import Pairs
from xgenda.training.scoring import Comparison, fair_crps
from xgenda.training.standardising import Prepared

TIMES, MEMBERS, STEPS = 6, 4, 8
LARGEST_SAMPLED = 50_000  # values of a fine field, above which members are not sampled in training


class Withheld:
    """Compares a residual network with none on a few withheld times, with the same random numbers.

    Parameters
    ----------
    build
        Makes a model of a residual network; with False as its second argument on the linear mean alone. Neither its mean nor its
        Gaussian was fitted to the withheld times.
    ready, pairs
        All pairs.
    held
        The withheld ones.
    batch_size
        Samples, or tiles of them, of a call of the network.
    """

    def __init__(
        self, build: Callable[[nn.Module, bool], CorrectiveModel], ready: Prepared, pairs: Pairs, held: Tensor, batch_size: int
    ) -> None:
        self.build, self.ready, self.pairs, self.held, self.batch_size = build, ready, pairs, held, batch_size
        self.linear: list[float] | None = None  # the same throughout the training

    def scores(self, network: Network) -> dict[str, float]:
        """Return the CRPS of each variable, and that of the linear mean: with its Gaussian, or where there is none its absolute error."""
        if self.linear is None:
            silent = self.build(_silent(network), False)
            self.linear = self._crps(silent, "all" if silent.denoiser.anchor is not None else "mean").mean(0).tolist()
        out: dict[str, float] = {}
        for v, model, linear in zip(
            self.ready.spec.variables, self._crps(self.build(network, True)).mean(0).tolist(), self.linear, strict=True
        ):
            out |= {f"crps_{v.name}": model, f"crps_{v.name}_linear": linear}
        return out

    def compare(self, network: Network) -> Comparison:
        """Return what the network is worth as a correction of the Gaussian around the mean."""
        return Comparison.of(self._crps(self.build(_silent(network), True)), self._crps(self.build(network, True)))

    def _crps(self, model: CorrectiveModel, stage: str = "all") -> Tensor:
        """Return the fair CRPS of each time and variable, in physical units."""
        where = next(model.denoiser.network.parameters()).device
        options = model.plan(SamplingOptions(steps=STEPS, batch_size=self.batch_size, tile="auto", stage=stage))
        rows, request = withheld_request(model, self.ready, self.pairs, self.held, (TIMES, MEMBERS), options, where)
        members = model.posterior(request)
        truth = torch.as_tensor(self.pairs.fine.values[rows.numpy()]).flatten(2)[:, None]
        if stage == "mean":
            return (members - truth).abs().mean((1, 3))
        return fair_crps(members, truth).mean(-1)


def _silent(network: Network) -> Network:
    """Return a network that says zero."""
    out = copy.deepcopy(network)
    out.scale_output(0.0)
    return out

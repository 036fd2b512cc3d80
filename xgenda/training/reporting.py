"""What training says while it runs: progress for callbacks, and the history that the model keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from xgenda.errors import missing_dependency


@dataclass(frozen=True)
class Progress:
    """The state of a training, as callbacks get it.

    Attributes
    ----------
    stage
        Which network of the model: 'prior', 'mean' or 'residual'.
    step, steps
        Finished steps, and how many there will be at most; None where a time ends the training.
    seconds
        Since the training of this network began, over all sessions of a resumed one.
    loss, validation_loss
        Mean loss of the steps since the last report, and that of the averaged weights on the validation block. Losses are relative: that of a
        network that explains nothing is about one.
    samples_per_second
        Since the last report.
    scores
        Where they were taken at this step: fair CRPS of posterior ensembles on the validation block in the units of each variable, of the model
        ('crps_<variable>') and of the Gaussian alone ('crps_<variable>_gaussian'). Of a downscaler that of its members, and that of the linear mean
        with a Gaussian around it, or without one its absolute error ('crps_<variable>_linear').
    """

    stage: str
    step: int
    steps: int | None
    seconds: float
    loss: float
    validation_loss: float
    samples_per_second: float
    scores: Mapping[str, float] = field(default_factory=dict)


#: Called with a `Progress` at every validation; training ends, with the best weights so far, when one returns True.
Callback = Callable[[Progress], Any]


class TensorBoard:
    """A callback that writes losses, scores and speed for TensorBoard.

    Parameters
    ----------
    folder
        Of the log files: ``tensorboard --logdir FOLDER`` shows them.

    Examples
    --------
    >>> import xgenda
    >>> model = xgenda.train(ds, callbacks=[xgenda.TensorBoard("runs")])  # doctest: +SKIP
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as problem:
            raise missing_dependency("tensorboard", "tensorboard", "TensorBoard") from problem
        self.writer = SummaryWriter(str(folder))

    def __call__(self, progress: Progress) -> None:
        """Write what is known at this step."""
        known = {"loss": progress.loss, "validation_loss": progress.validation_loss}
        for name, value in {**known, "samples_per_second": progress.samples_per_second, **progress.scores}.items():
            if math.isfinite(value):
                self.writer.add_scalar(f"{progress.stage}/{name}", value, progress.step)
        self.writer.flush()


class History:
    """Reports of one network, by name; what is not known at a step is None."""

    def __init__(self, columns: Mapping[str, list[float | None]] | None = None) -> None:
        self.columns: dict[str, list[float | None]] = {k: list(v) for k, v in (columns or {}).items()}

    def add(self, progress: Progress) -> None:
        """Append a report."""
        row: dict[str, float] = {
            "step": progress.step, "seconds": progress.seconds, "loss": progress.loss, "validation_loss": progress.validation_loss,
            "samples_per_second": progress.samples_per_second, **progress.scores,
        }  # fmt: skip
        before = len(self.columns.get("step", ()))
        for name in row:
            self.columns.setdefault(name, [None] * before)
        for name, column in self.columns.items():
            value = row.get(name)
            known = value is not None and math.isfinite(value)
            column.append(None if value is None or not known else value if isinstance(value, int) else float(f"{value:.7g}"))

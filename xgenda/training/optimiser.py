"""The training loop: AdamW, averaged weights, the best of them on the validation block; resumable at any step, in any number of processes.

What a step does is a function of the weights before it and of (seed, step) alone: batch, noise and learning rate. So a training that goes on
from a saved state ends with the weights of one that was never interrupted.
"""

from __future__ import annotations

import copy
import math
import time as clock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from xgenda.errors import OptionError, StateError
from xgenda.formatting import progress_bar
from xgenda.networks.autoencoder import Autoencoder, Encoder
from xgenda.networks.dense import LatentNet
from xgenda.networks.mesh import MeshNet
from xgenda.networks.songunet import SongUNet
from xgenda.networks.unet import UNet
from xgenda.networks.uno import UNO
from xgenda.training.averaging import CHOICES, WIDTHS, PowerAverages
from xgenda.training.crops import laid_corners
from xgenda.training.draws import Draws, cut
from xgenda.training.fields import Fields
from xgenda.training.journal import Interrupts, Journal
from xgenda.training.objectives import Batch
from xgenda.training.processes import Processes
from xgenda.training.reporting import Callback, History, Progress
from xgenda.training.streaming import Streamed
from xgenda.training.windows import evenly_spaced

DEFAULT_EPOCHS = 60
PATIENCE = 40  # validations without a lower loss, after which training ends
WARM_UP, HELD = 50, 1000  # steps
VALIDATION_SAMPLES = 200  # about as many as tell 1 % from nothing; fewer fields are used with several draws of noise
LARGEST_VALIDATION = 2**24  # numbers in its states, of which there are three to four sets
VALIDATION_SHARE = 0.05  # of the work of training, where the cost of a step is that of three evaluations per sample
LEAST_INTERVAL, LARGEST_INTERVAL = 20, 200  # steps between validations: an epoch within these, unless they cost too much
FEWEST_STEPS = 100  # for a choice among averages
SCORE_SHARE = 0.05  # of the time
LEAST_SHARE = 0.3  # of a time budget, for the networks where the fit of the Gaussian has taken more than the rest


def learning_rate_factor(step: int, limit: int | None) -> float:
    """Return the part of the learning rate at a step: a warm-up, and a cosine to its end, or where that is not known an inverse root.

    A function of the step alone, so that the same steps give the same weights, however long each one takes.
    """
    warm = min(1.0, (step + 1) / WARM_UP)
    if limit is None:
        return warm / math.sqrt(max(1.0, step / HELD))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / limit)))


class Objective(Protocol):
    """What a network is trained on."""

    @property
    def fields(self) -> Fields:
        """What samples are read from."""
        ...

    @property
    def tile(self) -> tuple[int, int] | None:
        """Rows and columns of the part of the grid that a batch shows."""
        ...

    def batch(self, rows: Tensor, states: Tensor, draws: Draws) -> Batch:
        """Return the batch of some samples."""
        ...


@runtime_checkable
class OwnLoss(Protocol):
    """An objective whose loss is no mean square of what the network returns."""

    def losses(self, network: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """Return the loss of each sample, shape (n,)."""
        ...


@dataclass(frozen=True)
class Effort:
    """How long to train: the first of these that is reached ends it; `begin` is when the clock of `seconds` started."""

    epochs: int | None
    steps: int | None
    seconds: float | None
    begin: float = 0.0


Network = UNet | SongUNet | MeshNet | UNO | Autoencoder | Encoder | LatentNet
#: Returns scores of a network, by name; see `Progress`.
Scorer = Callable[[Any], Mapping[str, float]]


@dataclass(frozen=True)
class Optimiser:
    """How networks are trained.

    Parameters
    ----------
    batch_size
        Samples of a step, of all processes together.
    ema
        Width of the average of weights relative to the length of training; None: the best of several on the validation block.
    accumulate
        Parts in which a process takes its part of a batch, to save memory.
    journal
        Where the state of training is kept.
    """

    effort: Effort
    batch_size: int
    learning_rate: float
    ema: float | None
    seed: int
    progress: bool | None
    processes: Processes
    dtype: torch.dtype = torch.float32
    accumulate: int = 1
    journal: Journal = field(default_factory=Journal)
    callbacks: Sequence[Callback] = ()

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    def planned(self, samples: int, share: float = 1.0) -> int | None:
        """Return how many steps a training on so many samples takes, if it is not ended before; None where a time was given."""
        return None if self.effort.seconds is not None else self.limit(samples, share)

    def limit(self, samples: int, share: float = 1.0) -> int:
        """Return after how many steps a training on so many samples ends at the latest."""
        effort = self.effort
        epochs = effort.epochs or (DEFAULT_EPOCHS if effort.steps is None and effort.seconds is None else 10**9)
        return min(max(1, samples // self.batch_size) * epochs, max(1, round((effort.steps or 10**9) * share)))

    def fit(
        self, network: Network, objective: Objective, rows: Tensor, held: Tensor, share: float, stage: str, score: Scorer | None = None,
        labels: Sequence[str] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train `network` in place and leave the best averaged weights in it.

        Parameters
        ----------
        rows, held
            Training and validation samples.
        share
            Part of the effort that is left which this network may use.
        stage
            Name of the network, for the state on disk and for reports.
        score
            Of the network, now and then.
        labels
            Of the samples, for messages.

        Returns
        -------
        dict
            Steps taken, validation loss before training and of the kept weights, the weight that the correction earned there, and the
            history.
        """
        return _Fit(self, network, objective, rows, held, share, stage, score, labels).run()


class _Fit:
    """One network in training."""

    def __init__(
        self, how: Optimiser, network: Network, objective: Objective, rows: Tensor, held: Tensor, share: float, stage: str,
        score: Scorer | None, labels: Sequence[str] | None,
    ) -> None:  # fmt: skip
        self.how, self.network, self.objective, self.rows, self.stage = how, network, objective, rows, stage
        self.score, self.labels, self.processes = score, labels, how.processes
        parts = how.processes.count * how.accumulate
        if how.batch_size % parts:
            raise OptionError(
                f"batch_size={how.batch_size} cannot be shared by {how.processes.count} processes in {how.accumulate} parts each; it must be "
                f"a multiple of {parts}: batch_size={parts * max(1, round(how.batch_size / parts))}"
            )
        if not len(rows):
            raise StateError(
                "All fields resemble those of the validation block, or are of the same times, so that none are left to train on. Give fields "
                "over a longer time, or withhold fewer: validation=0.1"
            )
        per_epoch = max(1, len(rows) // how.batch_size)
        effort = how.effort
        self.limit = how.limit(len(rows), share)
        # what was spent before, on fits and other networks, belongs to the time that was given
        self.seconds = (
            None
            if effort.seconds is None
            else share
            * max(LEAST_SHARE * effort.seconds, effort.seconds - (clock.monotonic() - effort.begin) - how.journal.recalled)
        )
        network.to(how.device)
        self.parameters = {k: p for k, p in network.named_parameters() if p.requires_grad}
        self.shown = copy.deepcopy(network)  # has the averaged weights
        self.adam = torch.optim.AdamW(self.parameters.values(), lr=how.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
        self.averages = PowerAverages(self.parameters, WIDTHS if how.ema is None else (how.ema,))
        most = min(VALIDATION_SAMPLES, max(how.batch_size, LARGEST_VALIDATION // math.prod(objective.fields.shape[1:])))
        held = evenly_spaced(held, most)
        repeats = max(1, min(4, most // len(held)))
        self.checks = self._checks(held, repeats)
        work = repeats * len(held) / (3 * how.batch_size * getattr(objective, "cost", 1.0))  # of a validation, in steps
        self.interval = max(LEAST_INTERVAL, min(per_epoch, LARGEST_INTERVAL), math.ceil(work / VALIDATION_SHARE))
        # what a resumed training finds again
        self.step = self.best_step = self.waited = self.validated = 0
        self.spent, self.losses, self.finished = 0.0, 0.0, False
        self.first = self.lowest = math.inf
        self.best = self.averages.copies()
        self.history = History()
        self.whole = True  # whether these belong to one step

    def _checks(self, held: Tensor, repeats: int) -> list[Batch]:
        """Return the samples that are validated on with their noise; of parts of the grid such that they cover it."""
        objective = self.objective
        if objective.tile is None:
            states = objective.fields.read(held)
            return [objective.batch(held, states, Draws(1000 + k, 0, len(held))) for k in range(repeats)]
        rows, fields = torch.cat([held.roll(r) for r in range(repeats)]), objective.fields
        corners = laid_corners(objective.tile, fields.shape[-2:], len(rows))
        out = []
        for k, corner in enumerate(corners):
            some = rows[k :: len(corners)]
            states = fields.read(some, corner) if isinstance(fields, Streamed) and fields.crop is not None else fields.read(some)
            out.append(objective.batch(some, states, Draws(1000 + k, 0, len(some), place=corner)))
        return out

    def run(self) -> dict[str, Any]:
        """Train."""
        self._recall()
        if self.processes.any(self.processes.mean(self.step) != self.step):
            raise OptionError(
                "The processes found different states of the training; all of them must see the folder of the file: out=..."
            )
        begin = clock.monotonic() - self.spent
        if math.isinf(self.first):
            self.first = self.lowest = self._validated(self.averages.running[-1])
        if not self.finished:
            try:
                self._train(begin)
            except KeyboardInterrupt as stop:
                stop.add_note(f"Stopped at step {self.step}. {self._left()}")
                raise
            self.finished = True
            self._remember()
        report = self._kept()
        self.network.cpu().eval()
        return report

    def _train(self, begin: float) -> None:
        how, processes = self.how, self.processes
        wrapped = processes.prepare(self.network.train())
        part = (processes.index, processes.count)
        batches = self.objective.fields.batches(self.rows, how.batch_size, how.seed % 2**63, self.step, part)
        reported, reported_step, scored, score_cost = clock.monotonic(), self.step, -math.inf, 0.0
        steps_known = self.seconds is None
        total = self.limit if self.seconds is None else round(self.seconds)
        shown = processes.index == 0
        bar = progress_bar(total, how.progress if shown else False, f"training the {self.stage}")
        with bar as advance, Interrupts() as interrupts:
            told = self.step if steps_known else min(total, round(self.spent))
            advance(told)
            try:
                while self.step < self.limit:
                    if processes.any(interrupts.asked):
                        raise KeyboardInterrupt
                    self.spent = clock.monotonic() - begin
                    out_of_time = self.seconds is not None and processes.any(self.spent >= self.seconds)
                    if out_of_time or self.waited >= PATIENCE:
                        break
                    rows, states = next(batches)
                    self.whole = False
                    self.losses += self._advance(wrapped, rows, states)
                    now = clock.monotonic()
                    report: Progress | None = None
                    late = self.seconds is not None and processes.any(now - reported > 0.1 * self.seconds)
                    if self.step % self.interval == 0 or late:
                        scores: Mapping[str, float] = {}
                        if self.score is not None and score_cost <= SCORE_SHARE * (now - scored):
                            scores = self._scores()
                            scored, score_cost = clock.monotonic(), clock.monotonic() - now
                        rate = how.batch_size * (self.step - reported_step) / max(1e-9, now - reported)
                        report = self._report(begin, rate, scores)
                        bar.note(described(report))
                        reported, reported_step = clock.monotonic(), self.step
                    self.whole = True
                    if report is not None and self._told(report):
                        break
                    if processes.index == 0 and how.journal.due():
                        self._remember()
                    finished = self.step if steps_known else min(total, round(clock.monotonic() - begin))
                    advance(finished - told)
                    told = finished
            finally:
                getattr(batches, "close", lambda: None)()
        if self.step != self.validated:
            rate = how.batch_size * (self.step - reported_step) / max(1e-9, clock.monotonic() - reported)
            self.whole = False
            report = self._report(begin, rate, {})
            self.whole = True
            self._told(report)

    def _advance(self, wrapped: nn.Module, rows: Tensor, states: Tensor) -> float:
        """Take a step, and return its loss."""
        how, processes, total = self.how, self.processes, 0.0
        for group in self.adam.param_groups:
            group["lr"] = how.learning_rate * learning_rate_factor(self.step, None if self.seconds is not None else self.limit)
        self.adam.zero_grad()
        parts = torch.arange(len(rows)).tensor_split(how.accumulate)
        for j, own in enumerate(parts):
            part = (processes.index * how.accumulate + j, processes.count * how.accumulate)
            batch = self.objective.batch(rows[own], states[own], Draws(how.seed, self.step + 1, how.batch_size, part))
            with processes.accumulating(wrapped, last=j == len(parts) - 1):
                loss = self._loss(wrapped, batch) / len(parts)
                loss.backward()
            total += float(loss.detach())
        total = processes.mean(total)
        if not math.isfinite(total):
            raise StateError(self._not_finite(rows, states))
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.adam.step()
        self.step += 1
        self.averages.update({k: p.detach() for k, p in self.parameters.items()}, self.step)
        return total

    def _not_finite(self, rows: Tensor, states: Tensor) -> str:
        bad = ~states.flatten(1).isfinite().all(1)
        if bad.any():
            rows = rows[bad]
        names = [self.labels[int(r)] if self.labels else str(int(r)) for r in rows[:8]]
        more = ", ..." if len(rows) > 8 else ""
        return (
            f"The loss of the {self.stage} is not finite at step {self.step}, in the batch of the samples {', '.join(names)}{more}. Look at these "
            f"fields, or lower the learning rate: learning_rate={self.how.learning_rate / 4:g}"
        )

    def _report(self, begin: float, rate: float, scores: Mapping[str, float]) -> Progress:
        """Validate, and return the state of the training."""
        found = self._validated(self.averages.running[-1])
        loss, self.losses = self.losses / max(1, self.step - self.validated), 0.0
        self.validated, self.waited = self.step, self.waited + 1
        if found < self.lowest:
            self.lowest, self.best_step, self.waited, self.best = found, self.step, 0, self.averages.copies()
        self.spent = clock.monotonic() - begin
        steps = self.limit if self.seconds is None else None
        report = Progress(self.stage, self.step, steps, self.spent, loss, found, rate, scores)
        self.history.add(report)
        return report

    def _told(self, report: Progress) -> bool:
        """Tell the callbacks, and return whether one of them wants to stop."""
        asked = [c(report) is True for c in self.how.callbacks] if self.processes.index == 0 else []
        return bool(self.how.callbacks) and self.processes.any(any(asked))

    def _scores(self) -> Mapping[str, float]:
        assert self.score is not None
        self._show(self.averages.running[-1])
        return self.score(self.shown.eval())

    # -- what is kept -----------------------------------------------------------------------------------------------------------

    def _kept(self) -> dict[str, Any]:
        """Leave the best weights in the network, and return the report."""
        if self.best_step:
            width, lowest = self._best_width()
        else:
            width, lowest = 0.0, self.first
        self._show(self._average(width))
        self.network.load_state_dict(self.shown.state_dict())
        weight, weighted, without = self._earn()
        report = {
            "steps": self.step, "best_step": self.best_step, "validation_start": self.first, "validation_best": min(lowest, weighted),
            "validation_without": without,
            "correction_weight": weight, "averaging_width": width, "seconds": round(self.spent, 1),
            "history": {self.stage: self.history.columns},
        }  # fmt: skip
        return report

    def _best_width(self) -> tuple[float, float]:
        """Return the width of the average with the lowest validation loss, and that loss."""
        own = self.averages.widths[-1]
        if self.how.ema is not None or self.step < FEWEST_STEPS:
            return own, self.lowest
        found = {w: self._validated(self._average(w)) for w in CHOICES if w != own} if self.averages.snapshots else {}
        found[own] = self.lowest
        best = min(found, key=lambda w: found[w])
        return best, found[best]

    def _average(self, width: float) -> dict[str, Tensor]:
        if width in self.averages.widths or not self.best_step:
            return self.best[self.averages.widths.index(width) if width else -1]
        return self.averages.of_width(width, self.best_step, self.best)

    def _left(self) -> str:
        """Save an interrupted training, and return what can be done with it."""
        if self.how.journal.folder is None:
            return "Training with out='model.safetensors' can be resumed."
        if self.whole and self._remember():
            return "Go on with the same call and resume=True."
        if self.how.journal.holds:
            return "That could not be saved. Go on from an earlier step with the same call and resume=True."
        return "Nothing could be saved."

    def _remember(self) -> bool:
        """Save the state of the training."""
        if self.processes.index != 0 or self.how.journal.folder is None:
            return self.how.journal.folder is not None
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        for name, p in self.parameters.items():
            for key, value in self.adam.state.get(p, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        for kind, states in (("running", self.averages.running), ("best", self.best)):
            tensors |= {f"{kind}.{k}.{name}": v for k, state in enumerate(states) for name, v in state.items()}
        for step, states in self.averages.snapshots.items():
            tensors |= {f"snapshot.{step}.{k}.{name}": v for k, state in enumerate(states) for name, v in state.items()}
        values = {k: getattr(self, k) for k in _REMEMBERED} | {"every": self.averages.every, "history": self.history.columns}
        return self.how.journal.save(self.stage, tensors, values)

    def _recall(self) -> None:
        """Go on from the state on disk, where there is one."""
        found = self.how.journal.load(self.stage)
        if found is None:
            return
        tensors, values = found
        for key in _REMEMBERED:
            setattr(self, key, values[key])
        self.how.journal.recalled += self.spent if self.finished else 0.0
        self.history, self.averages.every = History(values["history"]), values["every"]
        self.network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")})
        device = self.how.device
        for name, parameter in self.parameters.items():
            state = {k.split(".", 2)[1]: v for k, v in tensors.items() if k.startswith("adam.") and k.split(".", 2)[2] == name}
            if state:  # the count of steps stays where torch has it
                self.adam.state[parameter] = {k: v if k == "step" else v.to(device) for k, v in state.items()}
        for kind, states in (("running", self.averages.running), ("best", self.best)):
            for k, state in enumerate(states):
                for name in state:
                    state[name] = tensors[f"{kind}.{k}.{name}"].to(device)
        for key, tensor in tensors.items():
            if key.startswith("snapshot."):
                _, step, width, name = key.split(".", 3)
                kept = self.averages.snapshots.setdefault(int(step), [{} for _ in self.averages.widths])
                kept[int(width)][name] = tensor.to(device)
        self.averages.snapshots = dict(sorted(self.averages.snapshots.items()))

    # -- the network --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _show(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.shown.named_parameters():
            if name in state:
                parameter.copy_(state[name])

    @torch.no_grad()
    def _validated(self, state: Mapping[str, Tensor]) -> float:
        """Return the validation loss of averaged weights, each process taking its part."""
        self._show(state)
        self.shown.eval()
        total = 0.0
        for batch in self.checks:
            own = torch.arange(len(batch.x)).tensor_split(self.processes.count)[self.processes.index]
            mine = batch.of(own)
            if isinstance(self.objective, OwnLoss):
                total += self._own_losses(self.objective, mine) * self.processes.count / len(batch.x)
                continue
            count = max(1, batch.target[0].numel()) * len(batch.x)
            if len(own):
                wrong = counted(self._answers(mine) - mine.target, batch)
                total += float(weighted(wrong.double().square(), batch).sum()) * self.processes.count / count
        return self.processes.mean(total / len(self.checks))

    @torch.no_grad()
    def _earn(self) -> tuple[float, float, float]:
        """Scale the output of the network by what it is worth on the validation block; return that weight, the loss, and that without it.

        The loss is quadratic in the weight w of the correction: E |w F - T|^2, least at w = E F T / E F^2, with the means weighted as in
        training. A correction that explains nothing there gets a weight of zero, which leaves the classical answer.
        """
        self.shown.eval()
        if isinstance(self.objective, OwnLoss):
            return self._earn_all(self.objective)
        product = power = target = 0.0
        for batch in self.checks:
            found, wanted = counted(self._answers(batch), batch), counted(batch.target, batch)
            product += float(weighted((found * wanted).double(), batch).mean()) / len(self.checks)
            power += float(weighted((found**2).double(), batch).mean()) / len(self.checks)
            target += float(weighted((wanted**2).double(), batch).mean()) / len(self.checks)
        weight = min(1.0, max(0.0, product / power)) if power > 0 else 0.0
        if not self.best_step and 0 < power <= 2 * product:  # what training did not better stays as it was, unless it does harm
            weight = 1.0
        self.network.scale_output(weight)
        return weight, weight**2 * power - 2 * weight * product + target, target

    def _earn_all(self, objective: OwnLoss) -> tuple[float, float, float]:
        """Keep what the network adds to its classical start where that lowers a loss of another form, and nothing of it elsewhere."""
        bare = copy.deepcopy(self.shown)
        bare.scale_output(0.0)
        count = sum(len(batch.x) for batch in self.checks)
        kept, without = (
            sum(self._own_losses(objective, batch, network) for batch in self.checks) / count for network in (self.shown, bare)
        )
        weight = float(kept < without)
        self.network.scale_output(weight)
        return weight, min(kept, without), without

    def _own_losses(self, objective: OwnLoss, batch: Batch, network: nn.Module | None = None) -> float:
        """Return the sum of the losses of a large batch, a few samples at a time."""
        parts = torch.arange(len(batch.x)).split(self.how.batch_size)
        network = self.shown if network is None else network
        with self._arithmetic():
            return math.fsum(float(objective.losses(network, batch.of(rows), self.how.device).double().sum()) for rows in parts)

    def _arithmetic(self) -> torch.autocast:
        """Return the context of the network's arithmetic."""
        return torch.autocast(self.how.device.type, self.how.dtype, enabled=self.how.dtype != torch.float32)

    def _answers(self, batch: Batch) -> Tensor:
        """Return what the averaged network gives for a large batch, a few samples at a time, on the CPU."""
        parts = torch.arange(len(batch.x)).split(self.how.batch_size)
        return torch.cat([self._apply(self.shown, batch.of(rows)).cpu() for rows in parts])

    def _apply(self, network: nn.Module, batch: Batch) -> Tensor:
        device = self.how.device
        condition = None if batch.condition is None else batch.condition.to(device)
        position: tuple[Tensor, ...] = ()
        # of the network itself: around it there may be what several processes need
        own = None if batch.corner is None else (self.shown if network is self.shown else self.network).position_channels()
        if own is not None:
            position = (cut(own[None], batch.corner, batch.x.shape[-2:]).expand(len(batch.x), -1, -1, -1),)
        with self._arithmetic():
            found: Tensor = network(batch.x.to(device), batch.label.to(device), condition, *position)
        return found.float()

    def _loss(self, network: nn.Module, batch: Batch) -> Tensor:
        if isinstance(self.objective, OwnLoss):
            with self._arithmetic():
                return self.objective.losses(network, batch, self.how.device).mean()
        found = self._apply(network, batch)
        loss: Tensor = weighted(counted(found - batch.target.to(self.how.device), batch).square(), batch).mean()
        return loss


def counted(fields: Tensor, batch: Batch) -> Tensor:
    """Return errors, answers or targets of a batch, shape (n, channels, ny, nx), as their squares count in the loss."""
    return fields if batch.norm is None else batch.norm(fields)


def weighted(values: Tensor, batch: Batch) -> Tensor:
    """Return values of a batch, shape (n, channels, ny, nx), each multiplied by what it counts in the loss."""
    return values if batch.weight is None else values * batch.weight.to(values)


_REMEMBERED = ("step", "best_step", "waited", "validated", "spent", "losses", "finished", "first", "lowest")


def described(report: Progress) -> str:
    """Return a report in a few words, for the progress bar."""
    text = f"loss {report.loss:.3f}, validation {report.validation_loss:.3f}, {report.samples_per_second:.0f} samples/s"
    references = {"_gaussian": "Gaussian", "_linear": "linear mean"}
    model = next((k for k in report.scores if not k.endswith(tuple(references))), None)
    if model is not None:
        text += f", {model.replace('crps_', 'CRPS of ')} {report.scores[model]:.3g}"
        for ending, name in references.items():
            if model + ending in report.scores:
                text += f" ({name} {report.scores[model + ending]:.3g})"
    return text

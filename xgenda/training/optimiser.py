"""The training loop: AdamW, averaged weights, the best of them on the validation block."""

from __future__ import annotations

import copy
import math
import time as clock
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from xgenda.engine import progress_bar
from xgenda.errors import StateError
from xgenda.networks.songunet import SongUNet
from xgenda.networks.unet import UNet
from xgenda.training.objectives import Batch

DEFAULT_EPOCHS = 60
PATIENCE = 40  # validations without a lower loss, after which training ends
WARM_UP, HELD = 50, 1000  # steps
VALIDATION_SAMPLES = 200  # about as many as tell 1 % from nothing; fewer fields are used with several draws of noise


def learning_rate_factor(step: int, limit: int | None) -> float:
    """Return the part of the learning rate at a step: a warm-up, and a cosine to its end, or where that is not known an inverse root.

    A function of the step alone, so that the same steps give the same weights, however long each one takes.
    """
    warm = min(1.0, (step + 1) / WARM_UP)
    if limit is None:
        return warm / math.sqrt(max(1.0, step / HELD))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / limit)))


class Objective(Protocol):
    """Draws training batches."""

    def batch(self, rows: torch.Tensor, generator: torch.Generator) -> Batch:
        """Return a batch for some samples."""
        ...


@dataclass(frozen=True)
class Effort:
    """How long to train: the first of these that is reached ends it."""

    epochs: int | None
    steps: int | None
    seconds: float | None


@dataclass(frozen=True)
class Optimiser:
    """AdamW with warm-up and decay, averaged weights, and the best weights on the validation block."""

    effort: Effort
    batch_size: int
    learning_rate: float
    ema: float
    seed: int
    device: torch.device
    progress: bool | None
    dtype: torch.dtype = torch.float32

    def fit(
        self, network: UNet | SongUNet, objective: Objective, rows: torch.Tensor, held: torch.Tensor, share: float, label: str
    ) -> dict[str, Any]:
        """Train `network` in place and leave the best averaged weights in it.

        Parameters
        ----------
        rows, held
            Training and validation samples.
        share
            Part of the effort that this network may use.
        label
            For the progress bar.

        Returns
        -------
        dict
            Steps taken, validation loss before training and of the kept weights, and the weight that the correction earned there.
        """
        generator = torch.Generator().manual_seed(self.seed)
        per_epoch = max(1, len(rows) // self.batch_size)
        epochs = self.effort.epochs or (DEFAULT_EPOCHS if self.effort.steps is None and self.effort.seconds is None else 10**9)
        limit = min(per_epoch * epochs, max(1, round((self.effort.steps or 10**9) * share)))
        seconds = None if self.effort.seconds is None else self.effort.seconds * share
        network.to(self.device).train()
        averaged = copy.deepcopy(network)
        optimiser = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
        repeats = max(1, min(4, VALIDATION_SAMPLES // len(held)))
        checks = [objective.batch(held, torch.Generator().manual_seed(1000 + k)) for k in range(repeats)]
        first = lowest = self._validate(averaged, checks)
        best, best_step, step = copy.deepcopy(averaged.state_dict()), 0, 0
        begin = clock.monotonic()
        order: list[torch.Tensor] = []
        validated, checked, waited = 0, begin, 0

        def validate() -> None:
            nonlocal lowest, best, best_step, validated, checked, waited
            validated, checked = step, clock.monotonic()
            found = self._validate(averaged, checks)
            waited += 1
            if found < lowest:
                lowest, best_step, waited = found, step, 0
                best = {k: v.clone() for k, v in averaged.state_dict().items()}

        with progress_bar(limit if seconds is None else round(seconds), self.progress, label) as advance:
            told = 0
            while step < limit:
                elapsed = clock.monotonic() - begin
                fraction = step / limit if seconds is None else max(step / limit, elapsed / seconds)
                if fraction >= 1 or waited >= PATIENCE:
                    break
                if not order:
                    order = list(rows[torch.randperm(len(rows), generator=generator)].split(self.batch_size))
                batch = objective.batch(order.pop(), generator)
                loss = self._loss(network, batch)
                if not torch.isfinite(loss):
                    raise StateError(
                        f"The {label} loss is not finite at step {step}. Lower learning_rate (now {self.learning_rate:g})."
                    )
                for group in optimiser.param_groups:
                    group["lr"] = self.learning_rate * learning_rate_factor(step, None if seconds is not None else limit)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                step += 1
                decay = min(self.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    for mean, now in zip(averaged.parameters(), network.parameters(), strict=True):
                        mean.lerp_(now, 1 - decay)
                late = seconds is not None and clock.monotonic() - checked > 0.1 * seconds
                if step % max(20, per_epoch) == 0 or late:
                    validate()
                now_told = step if seconds is None else min(round(seconds), round(clock.monotonic() - begin))
                advance(now_told - told)
                told = now_told
        if step != validated:
            validate()
        network.load_state_dict(best)
        weight, weighted = self._earn(network, checks) if best_step else (0.0, first)
        network.cpu().eval()
        return {
            "steps": step, "best_step": best_step, "validation_start": first, "validation_best": min(lowest, weighted),
            "correction_weight": weight,
        }  # fmt: skip

    @torch.no_grad()
    def _earn(self, network: UNet | SongUNet, batches: list[Batch]) -> tuple[float, float]:
        """Scale the output of the network by what it is worth on the validation block, and return that weight and the loss.

        The loss is quadratic in the weight w of the correction: E |w F - T|^2, least at w = E F T / E F^2. A correction that explains
        nothing there gets a weight of zero, which leaves the classical answer.
        """
        network.eval()
        product = power = target = 0.0
        for b in batches:
            found, wanted = self._answers(network, b), b.target
            product += float((found * wanted).double().mean()) / len(batches)
            power += float((found**2).double().mean()) / len(batches)
            target += float((wanted**2).double().mean()) / len(batches)
        weight = min(1.0, max(0.0, product / power)) if power > 0 else 0.0
        network.scale_output(weight)
        return weight, weight**2 * power - 2 * weight * product + target

    def _answers(self, network: UNet | SongUNet, batch: Batch) -> torch.Tensor:
        """Return what the network gives for a large batch, a few samples at a time, on the CPU."""
        parts = torch.arange(len(batch.x)).split(self.batch_size)
        return torch.cat([self._apply(network, batch.of(rows)).cpu() for rows in parts])

    def _apply(self, network: UNet | SongUNet, batch: Batch) -> torch.Tensor:
        condition = None if batch.condition is None else batch.condition.to(self.device)
        position: tuple[torch.Tensor, ...] = ()
        if batch.corner is not None and (own := network.position_channels()) is not None:
            (row, column), (ny, nx) = batch.corner, batch.x.shape[-2:]
            position = (own[None, :, row : row + ny, column : column + nx].expand(len(batch.x), -1, -1, -1),)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found: torch.Tensor = network(batch.x.to(self.device), batch.label.to(self.device), condition, *position)
        return found.float()

    def _loss(self, network: UNet | SongUNet, batch: Batch) -> torch.Tensor:
        found = self._apply(network, batch)
        loss: torch.Tensor = (found - batch.target.to(self.device)).square().mean()
        return loss

    @torch.no_grad()
    def _validate(self, network: UNet | SongUNet, batches: list[Batch]) -> float:
        network.eval()
        found = float(np.mean([float((self._answers(network, b) - b.target).square().mean()) for b in batches]))
        network.train()
        return found

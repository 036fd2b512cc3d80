"""Training pairs that are read when asked for: standardised by threads, and turned into targets and conditions while the network trains.

Of a pair, the fine field and its coarse ones wait in memory, each on its own grid. What a network is trained on (what a mean leaves, and inputs
interpolated to the fine grid) is made batch by batch, one step ahead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xgenda.models.conditions import planes_of
from xgenda.models.means import LinearMean
from xgenda.models.parts import with_means
from xgenda.scaling import cycle_basis
from xgenda.training.objectives import Batch, Denoising, Draws, Regression
from xgenda.training.reservoirs import Reservoir
from xgenda.training.sources import WORKERS, Window, in_order
from xgenda.training.standardising import Prepared
from xgenda.training.streaming import BUFFER, SMALLEST, Streamed, blocks_of, standardised
from xgenda.training.windows import HELD

AHEAD = 1  # batches
#: Targets and conditions of some pairs, given their numbers and both sides, standardised.
Make = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Sides(Streamed):
    """Fine and coarse fields of pairs, standardised and joined to a row of numbers; read as `Streamed` reads states.

    Parameters
    ----------
    found
        The pairs.
    ready
        What standardises them.
    memory, workers
        As in `Streamed`.
    """

    def __init__(self, found: Reservoir, ready: Prepared, memory: int = BUFFER, workers: int = WORKERS) -> None:
        scaling, conditions = ready.spec.scaling, ready.features.conditions
        assert scaling is not None
        fine, coarse = found.fine, found.coarse
        both = int(np.prod(fine.shape[1:]) + len(conditions.offsets) * np.prod(coarse.shape[1:]))
        super().__init__(fine, scaling, memory=max(memory, 64 * 4 * both), workers=workers)
        self.found, self.given = found, conditions.scaling
        self.given_basis = cycle_basis(coarse.time, self.given.cycle, coarse.size)
        self.numbers, self.row_bytes = both, 4 * both
        # where the coarse fields have longer chunks than the fine ones, each would be decoded again for every part
        wanted = max(fine.step(SMALLEST), fine.chunk * (-(-coarse.chunk // fine.chunk)))
        self.block = blocks_of(fine.places, fine.chunk, max(1, min(self.memory // (16 * self.row_bytes), wanted)))

    def apart(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """Return fine (n, channels, rows, columns) and coarse fields (n, inputs, cells)."""
        size = int(np.prod(self.shape[1:]))
        coarse = joined[:, size:].reshape(len(joined), -1, self.found.coarse.grid.size)
        return joined[:, :size].reshape(len(joined), *self.shape[1:]), coarse

    def _states(self, rows: np.ndarray, window: Window | None = None) -> tuple[Tensor, np.ndarray]:
        """Return both sides of each row, shape (rows, numbers)."""
        assert window is None
        fine = standardised(self.found.fine.read(rows), self.basis[rows], self.scaling)
        needed, back = np.unique(self.found.places[rows], return_inverse=True)
        coarse = standardised(self.found.coarse.read(needed), self.given_basis[needed], self.given)
        joined = np.empty((len(rows), self.numbers), np.float32)
        joined[:, : fine[0].size] = fine.reshape(len(rows), -1)
        joined[:, fine[0].size :] = coarse[back.reshape(len(rows), -1)].reshape(len(rows), -1)
        return torch.as_tensor(joined), np.arange(len(rows))[:, None]


class PairFields:
    """Targets and conditions of pairs, one after the other along the channels: `xgenda.training.fields.Fields`.

    Parameters
    ----------
    sides
        What is read.
    make
        What becomes of it.
    channels
        Of the targets, and of the conditions.
    """

    def __init__(self, sides: Sides, make: Make, channels: tuple[int, int]) -> None:
        self.sides, self.make, self.channels = sides, make, channels
        self.shape = (sides.shape[0], sum(channels), sides.shape[2], sides.shape[3])

    def read(self, rows: Tensor) -> Tensor:
        """Return some of them, float32."""
        return self._made((rows, self.sides.read(rows)))[1]

    def order(self, rows: Tensor, seed: int, epoch: int) -> Tensor:
        """Return `rows` in the order of an epoch."""
        return self.sides.order(rows, seed, epoch)

    def batches(
        self, rows: Tensor, size: int, seed: int, step: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield batches without end, see `xgenda.training.fields.Fields`; close it to stop its threads."""
        with (
            contextlib.closing(self.sides.batches(rows, size, seed, step, part)) as read,
            contextlib.closing(in_order(self._made, read, 1, AHEAD)) as made,
        ):
            yield from made

    @torch.no_grad()
    def _made(self, read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rows, joined = read
        if not len(rows):
            return rows, torch.zeros((0, *self.shape[1:]))
        return rows, torch.cat(self.make(rows, *self.sides.apart(joined)), 1)


class Paired:
    """An objective whose fields hold targets and conditions one after the other."""

    def __init__(self, fields: PairFields, objective: Denoising | Regression) -> None:
        self.fields, self.objective, self.tile = fields, objective, objective.tile

    def batch(self, rows: Tensor, states: Tensor, draws: Draws) -> Batch:
        """Return the batch of some samples."""
        count = self.fields.channels[0]
        return self.objective.batch(rows, states[:, :count], draws, states[:, count:])


class PairStream:
    """What the networks of a downscaler are trained on, of pairs that are read when asked for.

    Parameters
    ----------
    found
        The pairs.
    ready
        Those in memory, and how they are standardised.
    linear
        The linear mean of each block of times, fitted without it.
    sees_mean
        Whether the network of the mean sees it.
    """

    def __init__(self, found: Reservoir, ready: Prepared, linear: Sequence[LinearMean], sees_mean: bool) -> None:
        self.found, self.ready, self.linear = found, ready, linear
        self.sides, self.fold = Sides(found, ready), torch.as_tensor(found.fold)
        conditions = ready.features.conditions
        self.planes = torch.as_tensor(
            planes_of(found.fine.time, conditions.cycle, found.lead, conditions.lead_time, found.fine.size)
        )
        self.sees_mean = sees_mean

    def predicted(self) -> Tensor:
        """Return the linear means of the pairs in memory, shape (n, channels, rows, columns), float64."""
        rows = torch.as_tensor(self.found.rows)
        return self._means(rows, self.ready.coarse, self.ready.interpolated)

    def regression(self, spread: Tensor) -> PairFields:
        """Return what the linear mean leaves, in units of `spread` (channels, rows, columns), and the inputs of its network."""

        def make(rows: Tensor, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
            given, mean = self._given(rows, coarse)
            return (fine.double() - mean).float() / spread, self._seen(given, mean)

        return self._fields(make, self.sees_mean)

    def residual(
        self, unit: float | Sequence[float], optimistic: Tensor, mean_condition: bool, network: Callable[[Tensor], Tensor] | None,
        conserve: Mapping[str, Any] | None,
    ) -> PairFields:  # fmt: skip
        """Return what the whole mean leaves, and the inputs of the diffusion.

        Parameters
        ----------
        unit
            Of the residual, for all channels or for each.
        optimistic
            How much larger it is than on what the network was trained on, shape (channels,).
        mean_condition
            Whether the mean is an input.
        network
            Returns what is added to the linear mean, float64, given the inputs of `regression`.
        conserve
            Which block means are kept, see `xgenda.models.corrective.CorrectiveModel`.
        """
        divisor = torch.tensor(unit, dtype=torch.float64).reshape(-1, 1, 1)
        blocks = None if conserve is None else self.ready.for_mean().blocks

        def make(rows: Tensor, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
            given, mean = self._given(rows, coarse)
            truth = fine.double()
            if network is not None:
                mean = mean + network(self._seen(given, mean))
            if conserve is not None and blocks is not None:
                scaling, basis, channels = self.sides.scaling, self.sides.basis[rows.numpy()], list(conserve["channels"])
                block_means = blocks.mean(torch.as_tensor(scaling.inverse(truth.numpy(), basis)))[:, channels]
                climatology = torch.as_tensor(scaling.climatology(basis)).expand(truth.shape)
                mean = with_means(mean, blocks, block_means, channels, scaling, torch.as_tensor(scaling.std), climatology)
            left = truth - mean
            left[self.fold[rows] != HELD] *= optimistic[:, None, None]  # what a network has seen it predicts too well
            return (left / divisor).float(), torch.cat([mean.float(), given], 1) if mean_condition else given

        return self._fields(make, mean_condition)

    def _fields(self, make: Make, with_mean: bool) -> PairFields:
        channels = self.ready.shape[0]
        return PairFields(self.sides, make, (channels, self.ready.features.channels + channels * with_mean))

    def _given(self, rows: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs on the fine grid, and the linear mean."""
        features = self.ready.features
        interpolated = features.interpolated(coarse, features.everywhere())
        return features.of(interpolated, self.planes[rows], features.everywhere()), self._means(rows, coarse, interpolated)

    def _means(self, rows: Tensor, coarse: Tensor, interpolated: Tensor) -> Tensor:
        fold, place = self.fold[rows], self.ready.features.everywhere()
        out = torch.zeros((len(rows), *self.ready.shape), dtype=torch.float64)
        for k in fold.unique().tolist():
            out[fold == k] = self.linear[k].at(coarse[fold == k], interpolated[fold == k], place)
        return out

    def _seen(self, given: Tensor, mean: Tensor) -> Tensor:
        return torch.cat([given, mean.float()], 1) if self.sees_mean else given

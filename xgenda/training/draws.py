"""The random numbers of a batch, and parts of the grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """Random numbers of a batch, a function of seed and step alone; each of several processes draws those of all and keeps its own.

    Parameters
    ----------
    seed, step
        The key; step 0 is validation.
    size
        Samples of the whole batch.
    part
        (k, n) for the k-th of n equal parts of it.
    place
        First row and column of the part of the grid that is shown, where they are not drawn.
    """

    def __init__(
        self, seed: int, step: int, size: int, part: tuple[int, int] = (0, 1), place: tuple[int, int] | None = None
    ) -> None:
        state = np.random.SeedSequence([seed % 2**63, step]).generate_state(1)
        self.generator, self.size = torch.Generator().manual_seed(int(state[0])), size
        self.own, self.place, self.step = torch.arange(size).tensor_split(part[1])[part[0]], place, step

    def integers(self, below: int) -> Tensor:
        """Return one whole number for each sample."""
        return torch.randint(below, (self.size,), generator=self.generator)[self.own]

    def choice(self, weights: Sequence[float]) -> int:
        """Return the number of one of some alternatives, with probabilities in proportion to weights, for all samples; 0 in validation."""
        if self.step == 0:
            return 0
        return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=self.generator))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers of this shape for each sample."""
        return torch.randn((self.size, *shape), generator=self.generator)[self.own]

    def corner(self, tile: tuple[int, int] | None, plane: Sequence[int], wraps: bool = False) -> tuple[int, int] | None:
        """Return first row and column of a random part of the grid, the same for all samples; None for the whole grid.

        Where the grid `wraps`, and not all columns are shown, any column may be the first. It is what is drawn first, so that who knows
        seed and step knows the corner.
        """
        if tile is None:
            return None
        if self.place is not None:
            return self.place
        (ny, nx), (rows, columns) = plane, tile
        below = ny - rows + 1, nx if wraps and columns < nx else nx - columns + 1
        row, column = (int(torch.randint(n, (1,), generator=self.generator)) for n in below)
        return row, column

    def shifts(self, step: int, plane: Sequence[int]) -> list[list[int]]:
        """Return rows and columns by which to shift each sample around the plane: multiples of `step`; of zero not at all."""
        return [(step * self.integers(n // step)).tolist() if step else [0] * len(self.own) for n in plane]


def cut(fields: Tensor, corner: tuple[int, int] | None, tile: Sequence[int] | None) -> Tensor:
    """Return a part of the grid, where there is one; columns beyond the last are the first ones again."""
    if corner is None or tile is None:
        return fields
    (row, column), (ny, nx) = corner, tile
    band = fields[..., row : row + ny, :]
    past = column + nx - fields.shape[-1]
    return band[..., column : column + nx] if past <= 0 else torch.cat([band[..., column:], band[..., :past]], -1)

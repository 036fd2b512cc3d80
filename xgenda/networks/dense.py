"""A network of dense layers for vectors that have no place on a grid, such as those of a latent space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from xgenda.networks.shared import LevelNetwork

BOUND = 5.0  # standard deviations


class LatentNet(LevelNetwork):
    """F(x, noise label, condition) of residual dense layers, whose output is initialised to zero.

    Far above the noise that drowns the vectors the best answer is that of their Gaussian, and what is left for a network falls with the square of
    the level. So does what this one returns, F / (1 + (sigma / reach)^2): there the covariance that a guidance takes from its derivative, sigma^2
    dD/dx, would otherwise be mostly the noise of its weights.

    Inputs are bounded, x / sqrt(1 + (x / 5)^2), as those of the autoencoder of Andry et al. (2025, arXiv 2504.18720) are: a vector far from
    those of the training gets no answer that grows with its distance, and what the network is added to has the rest.

    Parameters
    ----------
    channels
        Length of the vectors; of a window of them, all of its numbers.
    condition_channels
        Further inputs.
    width
        Of the layers.
    blocks
        Number of residual blocks, of two layers each.
    reach
        Noise level up to which the network counts, in standard deviations of the largest mode about 2.
    """

    last: nn.Linear

    def __init__(
        self, channels: int, condition_channels: int = 0, *, width: int = 128, blocks: int = 3, reach: float = 2.0
    ) -> None:
        super().__init__()
        self.reach = reach
        self.position = None
        embedding = self.hear(max(8, width // 4))
        self.first = nn.Linear(channels + condition_channels, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.affine = nn.ModuleList(nn.Linear(embedding, 2 * width) for _ in range(blocks))
        self.inward = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.outward = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.last = nn.Linear(width, channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return F, of the shape of `x` (batch, channels, 1, 1); labels, of shape (batch,), are a quarter of the logarithm of the noise level."""
        given = x.flatten(1) if condition is None else torch.cat([x.flatten(1), condition.flatten(1)], 1)
        heard = self.heard(label)
        h = self.first(given / (1 + (given / BOUND) ** 2).sqrt())
        for norm, affine, inward, outward in zip(self.norms, self.affine, self.inward, self.outward, strict=True):
            scale, shift = affine(heard).chunk(2, 1)
            h = h + outward(functional.silu(inward(norm(h) * (1 + scale) + shift)))
        share = 1 / (1 + ((4 * label).exp() / self.reach) ** 2)
        out: Tensor = (share[:, None] * self.last(functional.silu(h))).reshape(x.shape)
        return out

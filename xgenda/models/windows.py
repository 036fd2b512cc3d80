"""Networks and noise on a window of their grid: a chunk of a result with its halo, or the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xgenda.diffusion.noise import PlaneNoise
from xgenda.models.diffusive import build_network
from xgenda.models.means import Place


class OnWindow(nn.Module):
    """A network on a window of its grid, and at one of the lead times that it knows: it gets the positions of these."""

    def __init__(self, network: nn.Module, place: Place, lead: int | None = None) -> None:
        super().__init__()
        self.network, self.stride, self.lead = network, int(getattr(network, "stride", 1)), lead
        self.rows, self.columns = (torch.as_tensor(p) for p in place)

    def position_channels(self) -> Tensor | None:
        """Return the positions of the window, shape (P, rows, columns), or None."""
        own: Tensor | None = self.network.position_channels(*(() if self.lead is None else (self.lead,)))  # type: ignore[operator]
        return None if own is None else own.index_select(1, self.rows.to(own.device)).index_select(2, self.columns.to(own.device))

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """Return F on the window."""
        if position is None and (own := self.position_channels()) is not None:
            position = own[None].expand(len(x), -1, -1, -1)
        out: Tensor = self.network(x, label, condition, *(() if position is None else (position,)))
        return out


def unwrapped(network: nn.Module, rows: bool, columns: bool) -> nn.Module:
    """Return a network with the same weights for parts of the rows or of the columns of its grid, along which it does not wrap around."""
    own = getattr(network, "periodic", False)
    periodic = own if not (rows or columns) else bool(own) and not columns
    if periodic == own:
        return network
    arguments: Mapping[str, Any] = network.arguments  # type: ignore[assignment]
    plain = build_network({**arguments, "periodic": periodic})
    plain.load_state_dict(network.state_dict(), assign=True)
    return plain.eval().requires_grad_(False)


def plane_noise(keys: list[tuple[int, str, int]], plane: tuple[int, int], place: Place) -> PlaneNoise:
    """Return noise of a window of the grid, which may go over its seam."""
    return PlaneNoise(keys, plane, (int(place[0][0]), int(place[1][0])), (len(place[0]), len(place[1])))

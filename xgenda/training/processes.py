"""One process, or several that share each batch: Hugging Face accelerate, where training was started by it."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from xgenda.errors import OptionError, missing_dependency


class Processes(Protocol):
    """What training asks of the processes it runs in.

    Attributes
    ----------
    index, count
        Number of this one, from 0, and how many there are.
    device
        Of this one.
    """

    index: int
    count: int
    device: torch.device

    def prepare(self, network: nn.Module) -> nn.Module:
        """Return the network as it is called in training: its gradients are means over all processes."""
        ...

    def accumulating(self, network: nn.Module, *, last: bool) -> Any:
        """Return a context in which gradients are added up, and exchanged only if `last`."""
        ...

    def mean(self, value: float) -> float:
        """Return the mean over all processes, the same number in each."""
        ...

    def any(self, flag: bool) -> bool:
        """Return whether it is so in any process."""
        ...

    def wait(self) -> None:
        """Wait for all processes."""
        ...


class Single:
    """The own process alone."""

    index, count = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, network: nn.Module) -> nn.Module:
        """Return the network."""
        return network

    def accumulating(self, network: nn.Module, *, last: bool) -> Any:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def mean(self, value: float) -> float:
        """Return the value."""
        return value

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def wait(self) -> None:
        """Do not wait."""


class Accelerated:
    """The processes that ``accelerate launch``, ``torchrun`` or ``accelerate.notebook_launcher`` have started."""

    def __init__(self, device: str) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as problem:
            raise missing_dependency("accelerate", "train", "Training in several processes") from problem
        # torch's own autocast is used, around the network; that of accelerate would stay in the trained one
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        self.index, self.count = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        self.device: torch.device = self.accelerator.device
        self.accumulate = int(self.accelerator.gradient_accumulation_steps)

    def prepare(self, network: nn.Module) -> nn.Module:
        """Wrap the network."""
        wrapped: nn.Module = self.accelerator.prepare_model(network)
        return wrapped

    def accumulating(self, network: nn.Module, *, last: bool) -> Any:
        """Exchange gradients at the end of a step only."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(network)

    def mean(self, value: float) -> float:
        """Return the mean over all processes."""
        return self._reduced(value, "mean")

    def any(self, flag: bool) -> bool:
        """Return whether it is so in any process."""
        return self._reduced(float(flag), "sum") > 0

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def _reduced(self, value: float, how: str) -> float:
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        found: Tensor = self.accelerator.reduce(tensor, how)
        return float(found)


def launched() -> bool:
    """Return whether several processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def launched_in_bfloat16() -> bool:
    """Return whether ``accelerate launch`` was asked for bfloat16, in one process or several.

    Raises
    ------
    OptionError
        If it was asked for another precision.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise OptionError(f"accelerate was launched with mixed_precision={asked!r}; use --mixed_precision bf16, or no")
    return asked == "bf16"

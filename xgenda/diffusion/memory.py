r"""How much memory sampling takes, found without running it.

A call is replayed on tensors that have shapes and no values, and every allocation and release of storage is followed. The libraries that
convolve on a CPU allocate more than what they return: they copy input, output and weights into the layout of their kernels. That is
counted as one more copy of each while a convolution runs. What a GPU library takes as workspace is not known here and not counted.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from xgenda.diffusion.denoisers import Denoiser, EDMDenoiser
from xgenda.diffusion.samplers import _STEPPERS, sampler_options
from xgenda.diffusion.tiles import TiledNetwork, Tiling
from xgenda.errors import check_choice


class MemoryTracker(TorchDispatchMode):
    """Follow the storage of all tensors that are made while it is entered.

    Attributes
    ----------
    peak
        Most bytes that were alive at once, without `given`.
    given
        Bytes of tensors that were there before and were used: weights and arguments.
    written
        Bytes of all that was made, some of it in the same place.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.given = self.written = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it allocates."""
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in inputs:
            self.given += self._follow(tensor, alive=False)
        out = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        made = sum(self._follow(t, alive=True) for t in outputs)
        self.live, self.written = self.live + made, self.written + made
        scratch = 0
        if func is torch.ops.aten.convolution.default and outputs[0].device.type == "cpu":
            scratch = sum(_size(t) for t in (*inputs, *outputs))
        self.peak = max(self.peak, self.live + scratch)
        return out

    def _follow(self, tensor: Tensor, alive: bool) -> int:
        """Return the bytes of a storage that is seen for the first time, and be told when it goes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return 0
        size = self._known[key] = storage.nbytes()
        weakref.finalize(storage, self._release, key, size if alive else 0).atexit = False
        return size

    def _release(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def peak_memory(function: Callable[..., Any], *shapes: tuple[int, ...] | None) -> tuple[int, int]:
    """Return the most bytes that a call has alive at once, and the bytes of weights and arguments that it uses besides.

    Parameters
    ----------
    function
        Any function of tensors without gradients, such as a network. It is called with float32 tensors that have no values.
    shapes
        Of its arguments; None is passed on.
    """
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        arguments = [None if s is None else torch.empty(s) for s in shapes]
        with MemoryTracker() as tracker:
            function(*arguments)
            return tracker.peak, tracker.given


@dataclass(frozen=True)
class CallCost:
    """What one call of a network takes.

    Attributes
    ----------
    weights
        Bytes of weights, buffers and arguments that are there before.
    memory
        Most bytes that are alive at once besides; in training with what is kept for the way back, and the gradients.
    flops
        Floating-point operations of matrix products and convolutions, a multiplication with its addition as two.
    traffic
        Bytes that all operations write.
    """

    weights: int
    memory: int
    flops: int
    traffic: int

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Return how long it takes at so many operations, and so many bytes that are written, per second.

        These are what a machine reaches, not what it is sold with: measure them on a smaller network.
        """
        return self.flops / flops + self.traffic / bandwidth


def call_cost(function: Callable[..., Any], *shapes: tuple[int, ...] | None, dtype: torch.dtype = torch.float32) -> CallCost:
    """Predict what a call takes, without its numbers.

    Parameters
    ----------
    function, shapes
        As in `peak_memory`.
    dtype
        Of the arithmetic: torch.bfloat16 for that of `torch.autocast`, as it is on a CPU.
    """
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        arguments = [None if s is None else torch.empty(s) for s in shapes]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            return _cost(lambda: function(*arguments))


def step_cost(network: nn.Module, *shapes: tuple[int, ...] | None) -> CallCost:
    """Predict what a training step takes in single precision, without its numbers: a call, and the gradients of all weights.

    Parameters
    ----------
    network, shapes
        As in `peak_memory`. The network must be in the mode of training.
    """
    arguments = [None if s is None else torch.empty(s, device="meta") for s in shapes]
    everything = (*network.named_parameters(), *network.named_buffers())
    blank = {f"network.{k}": torch.empty_like(v, device="meta", requires_grad=v.requires_grad) for k, v in everything}
    return _cost(lambda: functional_call(_Step(network), blank, tuple(arguments)))


def _cost(call: Callable[[], Any]) -> CallCost:
    """Return what a call takes; twice, since who counts operations keeps tensors alive."""
    with FlopCounterMode(display=False) as counter:
        call()
    with MemoryTracker() as tracker:
        call()
        return CallCost(tracker.given, tracker.peak, int(counter.get_total_flops()), tracker.written)


class _Step(nn.Module):
    """A training step of a network; what is computed twice must be so while its weights are those that it was given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *arguments: Tensor | None) -> None:
        self.network(*arguments).square().mean().backward()


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of tiled sampling at its peak.

    Parameters
    ----------
    weights
        Of the network.
    network
        One network call: activations, and the copies that convolutions make.
    fields
        Of the whole domain: state, slopes, condition, sums.
    """

    weights: int
    network: int
    fields: int

    @property
    def peak(self) -> int:
        """All of them."""
        return self.weights + self.network + self.fields


def plan_memory(
    network: nn.Module,
    tiling: Tiling,
    channels: int,
    condition_channels: int = 0,
    *,
    samples: int = 1,
    batch: int = 1,
    sampler: str = "heun",
    whole_condition: bool | slice = False,
    position: Tensor | None = None,
) -> MemoryPlan:
    """Predict the memory that tiled sampling takes, on a CPU within about a tenth of what is measured.

    Parameters
    ----------
    network
        F(x, label, condition).
    tiling
        Of the domain.
    channels, condition_channels
        Of the state and of its condition.
    samples
        Sampled at once.
    batch
        Tiles in one network call.
    sampler
        As in `xgenda.diffusion.samplers`.
    whole_condition
        As in `TiledNetwork`.
    position
        Shape (1, P, rows, columns), where it is not the network's own, as for networks with a lead time.
    """
    check_choice("sampler", sampler, _STEPPERS)
    one = _First(**{f.name: getattr(tiling, f.name) for f in dataclasses.fields(tiling)})
    one.keep(-(-batch // samples))
    tiled = TiledNetwork(network, one, batch, whole_condition)
    if position is None and (own := tiled.position_channels()) is not None:
        position = own[None]
    denoiser = EDMDenoiser(_Placed(tiled, position))

    def sample(start: Tensor, condition: Tensor | None) -> Tensor:
        def conditioned(x: Tensor, sigma: float) -> Tensor:
            found: Tensor = denoiser(x, sigma, condition)
            return found

        return _steps(conditioned, start.double(), sampler)

    known = (samples, condition_channels, *tiling.shape) if condition_channels else None
    whole, given = peak_memory(sample, (samples, channels, *tiling.shape), known)
    inner = condition_channels * (2 if whole_condition is True else 1)
    if isinstance(whole_condition, slice):
        inner += len(range(condition_channels)[whole_condition])
    count = min(batch, samples * len(tiling.places))
    places = [] if position is None else [(count, position.shape[1], *tiling.tile)]
    call, _ = peak_memory(
        network, (count, channels, *tiling.tile), (count,), (count, inner, *tiling.tile) if inner else None, *places
    )
    weights = sum(_size(t) for t in (*network.parameters(), *network.buffers()))
    return MemoryPlan(weights, call, whole + given - weights - call)


def guided_memory(
    denoise: Callable[..., Tensor],
    shape: tuple[int, ...],
    condition: tuple[int, ...] | None = None,
    *,
    sampler: str = "heun",
    through: bool = False,
    observe: Callable[[Tensor], None] | None = None,
) -> tuple[int, int]:
    """Predict what sampling of one batch under guidance takes, without what the observations themselves take.

    Parameters
    ----------
    denoise
        D(x, sigma) of states of `shape`, or D(x, sigma, condition).
    shape, condition
        Of the states of a batch, and of what they are conditioned on.
    sampler
        As in `xgenda.diffusion.samplers`.
    through
        Whether the guidance goes through the network, see `xgenda.diffusion.guidance.goes_through`: all activations are then kept.
    observe
        What is done with a denoised state to find what is observed of it, and the way back, where that is more than a linear map.

    Returns
    -------
    peak, given : int
        As `peak_memory`; `given` has what the denoiser holds.
    """
    check_choice("sampler", sampler, _STEPPERS)

    def sample(start: Tensor, known: Tensor | None) -> Tensor:
        extra = () if known is None else (known,)

        def guided(x: Tensor, sigma: float) -> Tensor:
            if not through:
                clean = denoise(x, sigma, *extra)
                if observe is not None:
                    observe(clean)
                return clean
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                clean = denoise(x, sigma, *extra)
            state = clean.detach()
            if observe is not None:
                observe(state)
            (pulled,) = torch.autograd.grad(clean, x, state, retain_graph=True)  # as for several gradients
            return state + pulled

        return _steps(guided, start.double(), sampler)

    return peak_memory(sample, shape, condition)


def _steps(denoise: Denoiser, start: Tensor, sampler: str) -> Tensor:
    """Take as many steps as a multistep sampler remembers; what noise costs comes and goes between network calls."""
    stepper = _STEPPERS[sampler](denoise, [8.0] * 4, lambda: torch.empty_like(start), sampler_options(sampler))
    x = start  # the first state is kept by whoever gave it
    for level in (8.0, 4.0, 2.0) if sampler == "adams" else (8.0, 4.0):
        x = stepper.step(0, x, level, level / 2)
    return x


class _Placed(nn.Module):
    """A network with its positions."""

    def __init__(self, network: TiledNetwork, position: Tensor | None) -> None:
        super().__init__()
        self.network, self.position = network, position

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        found: Tensor = self.network(x, label, condition, self.position)
        return found


class _First(Tiling):
    """The tiles of the first network call: all calls take the same memory."""

    def keep(self, count: int) -> None:
        for axis in self.axes:
            assert axis.segments  # with values, before there are none
        object.__setattr__(self, "places", self.places[:count])

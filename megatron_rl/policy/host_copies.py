"""The optimizer's state moved to the host and back, through one piece of memory that is kept."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_rl import device

_MOMENTS = ("exp_avg", "exp_avg_sq")


class HostCopies:
    """The places of an optimizer's main weights and moments on the host.

    Megatron-Core 0.16.1 copies into memory that is allocated anew each time and that a GPU cannot reach by itself; both
    cost more than the copy. Here the host keeps as many bytes as the state has, from the first move on.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        """The state of `optimizer`, whose weights are no views of the model's."""
        self._optimizer = optimizer
        self._memory: Tensor | None = None

    def move_out(self) -> None:
        """Leave the state on the host and its device memory to others, until `move_back`."""
        if self._memory is None:  # with room for the moments, which the first update makes
            weights = (tensor.nbytes for _, name, tensor in self._places() if name == "data")
            self._memory = device.host_memory((1 + len(_MOMENTS)) * sum(weights))
        start = 0
        for holder, name, tensor in self._places():
            copy = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            start += tensor.nbytes
            _put(holder, name, copy.copy_(tensor, non_blocking=True))
            del tensor  # the device's memory is given back below
        device.synchronize()
        device.give_back_memory()

    def move_back(self) -> None:
        """Undo `move_out`."""
        for holder, name, tensor in self._places():
            there = torch.empty_like(tensor, device=device.device())
            _put(holder, name, there.copy_(tensor, non_blocking=True))
        device.synchronize()

    def _places(self) -> Iterator[tuple[Any, str, Tensor]]:
        """Yield each tensor of the state with who holds it under what name: a parameter its `data`, a dict a moment."""
        for adam in (c.optimizer for c in self._optimizer.chained_optimizers if c.optimizer is not None):
            for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
                yield parameter, "data", parameter.data
            for moments in adam.state.values():
                yield from ((moments, name, moments[name]) for name in _MOMENTS)


def _put(holder: Any, name: str, tensor: Tensor) -> None:
    if isinstance(holder, dict):
        holder[name] = tensor
    else:
        holder.data = tensor

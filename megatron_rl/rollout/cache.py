"""The embedded engine's key-value cache."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer's keys and values `[B, groups, tokens, d]` as the beginning of larger buffers: transformers' own layer
    copies all of them for every token."""

    _buffers: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, groups, new, d]`; returns all so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = key_states, value_states
        elif end > self._buffers[0].shape[-2]:
            self._buffers = _longer(self._buffers[0], end), _longer(self._buffers[1], end)
        if start:
            for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[..., start:end, :] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may come several times."""
        self._buffers = self.keys[indices], self.values[indices]
        self._show(self._buffers[0].shape[-2])

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)


def roomy_cache() -> Cache:
    """Empty, for any number of layers."""
    return Cache(layer_class_to_replicate=RoomyLayer)


def _longer(buffer: Tensor, length: int) -> Tensor:
    """Half as long again as asked for, so that all copies together cost a constant for each token."""
    longer = buffer.new_empty((*buffer.shape[:-2], length + max(8, length // 2), buffer.shape[-1]))
    longer[..., : buffer.shape[-2], :] = buffer
    return longer

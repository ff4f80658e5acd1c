"""A cache of keys and values with spare memory for the tokens to come."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """transformers' dynamic layer without copying all keys and values at each token.

    `keys` and `values`, (B, H, S, K), are views of the first S positions of buffers (B, H, C, K). A buffer is replaced
    by one twice as large when it is full, or when something else has replaced `keys` or `values`, as beam search does.
    """

    key_buffer: Tensor | None = None
    value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, H, T, K) of the new positions -> (B, H, S + T, K) of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        length = self.get_seq_length()
        self.keys, self.key_buffer = _append(self.keys, length, key_states, self.key_buffer)
        self.values, self.value_buffer = _append(self.values, length, value_states, self.value_buffer)
        return self.keys, self.values


def growing_cache() -> Cache:
    """An empty cache for one call of `generate()`."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def _append(old: Tensor, length: int, new: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, heads, added, width = new.shape
    total = length + added
    in_place = buffer is not None and old.data_ptr() == buffer.data_ptr() and old.shape[:2] == buffer.shape[:2]
    if buffer is None or not in_place or total > buffer.shape[2]:
        buffer = new.new_empty((batch, heads, 2 * total, width))
        if length:
            buffer[:, :, :length] = old
    buffer[:, :, length:total] = new
    return buffer[:, :, :total], buffer

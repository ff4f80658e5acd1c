"""Keys and values of the text so far, in memory that has room for what comes."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """transformers' dynamic layer without its copy of everything at each token: new positions go behind the others.

    `keys` and `values`, (B, H, S, K), begin a room of (B, H, C, K), which is left for one twice as large when it is
    full, or when something else has been put in their place, as beam search does.
    """

    key_room: Tensor | None = None
    value_room: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, H, T, K) of the new positions -> (B, H, S + T, K) of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        length = self.get_seq_length()
        self.keys, self.key_room = _append(self.keys, length, key_states, self.key_room)
        self.values, self.value_room = _append(self.values, length, value_states, self.value_room)
        return self.keys, self.values


def growing_cache() -> Cache:
    """An empty cache for one call of `generate()`."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def _append(old: Tensor, length: int, new: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, heads, added, width = new.shape
    total = length + added
    in_place = room is not None and old.data_ptr() == room.data_ptr() and old.shape[:2] == room.shape[:2]
    if room is None or not in_place or total > room.shape[2]:
        room = new.new_empty((batch, heads, 2 * total, width))
        if length:
            room[:, :, :length] = old
    room[:, :, length:total] = new
    return room[:, :, :total], room

"""A KV cache that is copied once and then written in place.

transformers' `DynamicCache` concatenates at every step, which copies every prefix again for every new token.
After `spread` each question has its copy of its image's prefix in a buffer with room for what follows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values (B, H, L, d) of one layer, views into buffers that are longer than L."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        """keys, values: (B, H, L, d) to begin with; room: tokens that can follow before the buffers grow."""
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._take(keys, values, room)

    @classmethod
    def copied(cls, layer: DynamicLayer, index: Tensor, room: int) -> RoomyLayer:
        """Rows `index` (B,) of another layer, each copied once."""
        made = cls(layer.keys[:0], layer.values[:0], 0)
        made._take(layer.keys, layer.values, room, index)
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, n, d) of new tokens; returns all keys and values so far."""
        length, more = self.keys.shape[2], key_states.shape[2]
        if length + more > self._keys.shape[2]:
            self._take(self.keys, self.values, more + length)  # twice as long: copies stay few
        self._keys[:, :, length : length + more] = key_states
        self._values[:, :, length : length + more] = value_states
        self.keys = self._keys[:, :, : length + more]
        self.values = self._values[:, :, : length + more]
        return self.keys, self.values

    def _take(self, keys: Tensor, values: Tensor, room: int, index: Tensor | None = None) -> None:
        rows, heads, length, width = keys.shape
        rows = rows if index is None else len(index)
        self._keys = keys.new_empty(rows, heads, length + room, width)
        self._values = values.new_empty(rows, heads, length + room, values.shape[3])
        for buffer, old in ((self._keys, keys), (self._values, values)):
            buffer[:, :, :length] = old if index is None else old[index]
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]


def spread(cache: Any, index: Tensor, room: int) -> None:
    """Turn a `DynamicCache` of P prefixes into one of B rows, row b continuing prefix `index[b]`, in place.

    index: (B,) int64. Layers that are no plain growing ones (sliding windows) stay what they are.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = RoomyLayer.copied(layer, index, room)
        else:
            layer.batch_select_indices(index)

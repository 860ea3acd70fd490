"""A KV cache that is copied once and then written in place.

transformers' `DynamicCache` concatenates at every step, which copies every prefix again for every new token.
After `spread` each question has its copy of its image's prefix in a buffer with room for its suffix. Rows may
be computed in groups of similar length first (each group has its own cache, a window into the same buffers)
and together afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llava.model.transformers_compat import DynamicLayer, init_cache_layer, is_growing_layer


class RoomyLayer(DynamicLayer):
    """Keys and values (B, H, L, d) of one layer: positions `start` to `end` of buffers that are longer."""

    def __init__(self, keys: Tensor, values: Tensor, start: int, end: int) -> None:
        """Use buffers `keys` and `values` (B, H, >= end, d); new tokens are written from `end` on."""
        super().__init__()
        init_cache_layer(self, keys, values)
        self._keys, self._values, self._start = keys, values, start
        self.reach(end)

    def reach(self, end: int) -> None:
        """Set the end of the layer: positions before it were written through another window."""
        self._end = end
        self.keys = self._keys[:, :, self._start : end]
        self.values = self._values[:, :, self._start : end]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, n, d) of new tokens; return all keys and values so far."""
        end = self._end + key_states.shape[2]
        if end > self._keys.shape[2]:
            self._grow(end - self._start)
            end = self._end + key_states.shape[2]
        self._keys[:, :, self._end : end] = key_states
        self._values[:, :, self._end : end] = value_states
        self.reach(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows `indices` (int64) only."""
        self._keys, self._values = self._keys[indices], self._values[indices]
        self.reach(self._end)

    def _grow(self, needed: int) -> None:
        rows, heads, length, width = self.keys.shape
        size = max(needed, 2 * length)  # twice as long: copies stay few
        keys = self.keys.new_empty(rows, heads, size, width)
        values = self.values.new_empty(rows, heads, size, self.values.shape[3])
        keys[:, :, :length], values[:, :, :length] = self.keys, self.values
        self._keys, self._values, self._start = keys, values, 0
        self.reach(length)


def is_plain(cache: Any) -> bool:
    """Return whether all layers keep everything: no sliding windows."""
    return all(is_growing_layer(layer) for layer in cache.layers)


def spread(cache: Any, index: Tensor, room: int, groups: Sequence[tuple[int, int, int]] = ()) -> list[Any]:
    """Turn a `DynamicCache` of P prefixes into one of B rows, row b continuing prefix `index[b]`, in place.

    Layers that do not keep everything stay what they are; with any of those there are no groups.

    Args:
        cache: the prefixes.
        index: (B,) int64.
        room: tokens that can follow before buffers grow.
        groups: (first row, last row + 1, shift): the prefixes of these rows begin `shift` positions further
            right, so that suffixes shorter by as much end together with the longest.

    Returns:
        A cache for every group, over its rows and its own prefix only. Once all of them have been filled,
        `join` continues with the whole cache.
    """
    layers: list[list[RoomyLayer]] = [[] for _ in groups]
    for number, layer in enumerate(cache.layers):
        if not is_growing_layer(layer):
            layer.batch_select_indices(index)
            continue
        length = layer.keys.shape[2]
        most = max((shift for *_, shift in groups), default=0)
        buffers = []
        for old in (layer.keys, layer.values):
            shape = (len(index), old.shape[1], most + length + room, old.shape[3])
            buffer = old.new_empty(shape)
            for first, last, shift in groups or [(0, len(index), 0)]:
                buffer[first:last, :, :shift] = 0  # masked, but 0 times NaN is NaN
                buffer[first:last, :, shift : shift + length] = old[index[first:last]]
            buffers.append(buffer)
        for found, (first, last, shift) in zip(layers, groups, strict=True):
            found.append(RoomyLayer(*(one[first:last] for one in buffers), shift, shift + length))
        cache.layers[number] = RoomyLayer(*buffers, 0, length)
    made = []
    for found in layers:
        part = copy.copy(cache)
        part.layers = found
        made.append(part)
    return made


def join(cache: Any, length: int) -> None:
    """Continue after all groups of `spread` have written their suffixes: the cache is `length` long."""
    for layer in cache.layers:
        layer.reach(length)

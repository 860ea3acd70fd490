"""Static memory for the KV cache: one buffer per layer, in which a batch has its rows and positions.

    arena.fit(rows, length)            # (B, H, length, d) per layer; grows, never shrinks
    cache = arena.cache(positions, end)      # a transformers cache over the first `end` positions

Row b of a batch has its tokens at positions 0, 1, 2 ... without gaps, so that no row depends on the length of
another: prompts are padded on the right, and padding is overwritten by the answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava.model.transformers_compat import DynamicLayer, init_cache_layer

_ROUND = 1024  # tokens that buffers have room for are a multiple of this


class ArenaLayer(DynamicLayer):
    """Keys and values (B, H, end, d) of one layer, written in place; transformers' layers read them.

    Args:
        positions: (B, n) int64, where the n new tokens of each row are written; an int: from there on in all
            rows; None: from 0 on, and only the new tokens are returned (a prompt sees nothing before it).
    """

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor | int | None) -> None:
        super().__init__()
        init_cache_layer(self, keys, values)
        self.keys, self.values, self._positions = keys, values, positions

    def get_seq_length(self, *_: Any) -> int:
        """Return the tokens before the new ones, as far as transformers may know: callers pass masks."""
        return self._positions if isinstance(self._positions, int) else 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write (B, H, n, d) of new tokens; return what they attend to."""
        if isinstance(self._positions, Tensor):
            rows, heads, new, _ = key_states.shape
            place = self._positions[:, None, :, None]
            for held, states in ((self.keys, key_states), (self.values, value_states)):
                held.scatter_(2, place.expand(rows, heads, new, states.shape[3]), states)
            return self.keys, self.values
        begin = self._positions or 0
        end = begin + key_states.shape[2]
        self.keys[:, :, begin:end].copy_(key_states)
        self.values[:, :, begin:end].copy_(value_states)
        return (key_states, value_states) if self._positions is None else (self.keys, self.values)


class Arena:
    """Buffers for the keys and values of a decoder; a batch at a time.

    Attributes:
        shape: (rows, positions) of the batch.
        capacity: tokens that fit without moving the buffers.
        dirty: they may hold values that are not finite, and are set to zero before the next batch.
        version: changes when the buffers move, after which graphs that use them are void.
    """

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._layers = config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._token = (heads, width)
        self._place = {"device": device, "dtype": dtype}
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self.capacity = 0
        self.dirty = False
        self.shape = (0, 0)
        self.version = 0

    def fits(self, rows: int, length: int) -> bool:
        """Return whether `fit` leaves the buffers where they are."""
        return rows * length <= self.capacity

    def fit(self, rows: int, length: int) -> None:
        """Make room for `rows` of `length` tokens; what was there is lost."""
        self.shape = (rows, length)
        if self.fits(rows, length):
            if self.dirty:
                self.wipe()
            return
        self._buffers, self.capacity = [], 0  # before the new ones
        self.version += 1
        tokens = -(-rows * length // _ROUND) * _ROUND
        heads, width = self._token
        with torch.inference_mode(False):  # written in any mode
            self._buffers = [
                (
                    torch.zeros(tokens * heads * width, **self._place),
                    torch.zeros(tokens * heads * width, **self._place),
                )
                for _ in range(self._layers)
            ]
        self.capacity, self.dirty = tokens, False

    def wipe(self) -> None:
        """Set all buffers to zero: masked positions may hold anything finite, but 0 times NaN is NaN."""
        for layer in self._buffers:
            for one in layer:
                one.zero_()
        self.dirty = False

    def views(self, rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values (rows, H, length, d) of every layer."""
        heads, width = self._token
        size = rows * heads * length * width
        return [
            tuple(one[:size].view(rows, heads, length, width) for one in layer) for layer in self._buffers
        ]

    def cache(self, positions: Tensor | int | None, end: int, rows: slice = slice(None)) -> Any:
        """Return a cache of transformers over the batch, or some of its rows, up to position `end`."""
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.layers = [
            ArenaLayer(keys[rows, :, :end], values[rows, :, :end], positions)
            for keys, values in self.views(*self.shape)
        ]
        return cache

    def spread(self, prefixes: Arena, index: Tensor) -> None:
        """Copy prefixes: row b begins with row `index[b]` of another arena, all of its positions."""
        rows, length = len(index), prefixes.shape[1]
        for old, new in zip(prefixes.views(*prefixes.shape), self.views(*self.shape), strict=True):
            for source, target in zip(old, new, strict=True):
                target[:rows, :, :length].copy_(source[index])

    def keep(self, index: Tensor) -> None:
        """Keep rows `index` (B',) of the batch only, B' smaller than B."""
        rows, length = len(index), self.shape[1]
        before = self.views(*self.shape)
        self.shape = (rows, length)
        for old, new in zip(before, self.views(rows, length), strict=True):
            for source, target in zip(old, new, strict=True):
                target.copy_(source[index])

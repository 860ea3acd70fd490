"""Evenly spread tokens, as a baseline: the same grid positions for every image."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

from .base import Kept, Pruner
from .registry import register_pruner


@register_pruner("uniform")
class Uniform(Pruner):
    """T positions on an even grid over the square patch grid, exactly T of them for any T.

    Where N is no square number there is no grid to speak of: even steps in raster order instead.
    """

    def choose(
        self, features: Tensor, attention: Tensor, tokens: int, keys: Sequence[str | int] | None = None
    ) -> Kept:
        rows, n = features.shape[:2]
        picks = torch.tensor(_spread(n, min(tokens, n)), dtype=torch.int64, device=features.device)
        return Kept.from_picks(picks.repeat(rows, 1), 0)


def _spread(n: int, k: int) -> list[int]:
    """k of n patch indices: about sqrt(k) rows, about sqrt(k) in each, each in the middle of its share."""
    side = isqrt(n)
    if side * side != n:
        return _middles(n, k)
    if 2 * k > n:  # then the holes are what has to be spread evenly
        holes = set(_spread(n, n - k))
        return [i for i in range(n) if i not in holes]
    n_rows = (isqrt(4 * k) + 1) // 2  # sqrt(k), rounded
    picks: list[int] = []
    for i, row in enumerate(_middles(side, n_rows)):
        in_row = (i + 1) * k // n_rows - i * k // n_rows  # shares of k that differ by one at most
        picks += [row * side + column for column in _middles(side, in_row)]
    return picks


def _middles(length: int, parts: int) -> list[int]:
    """Middle of each of `parts` equal shares of 0..length-1; distinct as long as parts <= length."""
    return [(2 * i + 1) * length // (2 * parts) for i in range(parts)]

"""Evenly spread tokens, as a baseline: the same grid positions for every image."""

from __future__ import annotations

import functools
from math import isqrt

import torch

from .base import Kept, Pruner
from .registry import register_pruner


@register_pruner("uniform")
class Uniform(Pruner):
    """Keep T positions on an even grid over the square patch grid, exactly T of them for any T.

    If N is not a square number, there is no patch grid: the positions are even steps in raster order.
    """

    def choose(self, features, cues, tokens):
        rows, n = features.shape[:2]
        return Kept.from_selected(_positions(n, min(tokens, n), features.device).repeat(rows, 1), 0)


@functools.cache  # without a bound: a captured CUDA graph may read the tensor, which must stay where it is
def _positions(n: int, k: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(_spread(n, k), dtype=torch.int64, device=device)


def _spread(n: int, k: int) -> list[int]:
    """Choose k of n patch indices: about sqrt(k) rows, about sqrt(k) in each, centered in equal shares."""
    side = isqrt(n)
    if side * side != n:
        return _centers(n, k)
    if 2 * k > n:  # then the dropped positions have to be spread evenly
        dropped = set(_spread(n, n - k))
        return [i for i in range(n) if i not in dropped]
    n_rows = (isqrt(4 * k) + 1) // 2  # sqrt(k), rounded
    positions: list[int] = []
    for i, row in enumerate(_centers(side, n_rows)):
        in_row = (i + 1) * k // n_rows - i * k // n_rows  # shares of k that differ by one at most
        positions += [row * side + column for column in _centers(side, in_row)]
    return positions


def _centers(length: int, parts: int) -> list[int]:
    """Return the center of each of `parts` equal shares of 0..length-1; distinct if parts <= length."""
    return [(2 * i + 1) * length // (2 * parts) for i in range(parts)]

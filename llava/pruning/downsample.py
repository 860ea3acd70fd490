"""Average pooling to the budget, as a baseline: what a smaller image would give."""

from __future__ import annotations

import functools
from math import isqrt

import torch
from torch import Tensor

from .base import Kept, Pruner
from .greedy import row_products
from .registry import register_pruner


@register_pruner("downsample")
class Downsample(Pruner):
    """Average the features over T cells of the square patch grid, exactly T of them for any T.

    The cells form about sqrt(T) bands of grid rows with about sqrt(T) cells in each; numbers differ by one at
    most. Every patch is in one cell. A token stands at the patch in the middle of its cell. If N is not a
    square number, the cells are even runs in raster order.
    """

    merges = True

    def choose(self, features, cues, tokens):
        rows, n = features.shape[:2]
        groups, places = _cells(n, min(tokens, n), features.device)
        member = (groups == torch.arange(len(places), device=groups.device)[:, None]).to(torch.float64)
        mean = row_products(
            (member / member.sum(dim=1, keepdim=True)).expand(rows, -1, -1), features.to(torch.float64)
        )
        places = places.repeat(rows, 1)
        flags = torch.zeros_like(places, dtype=torch.bool)
        return Kept(places, flags, mean.to(features.dtype), groups.repeat(rows, 1))

    def flops(self, patches, channels, projected):
        return 2.0 * patches * channels


@functools.cache  # without a bound: a captured CUDA graph may read the tensors, which must stay in place
def _cells(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cell of every patch (N,) and the middle patch of every cell (K,), int64."""
    groups = _divide(n, k)
    members: list[list[int]] = [[] for _ in range(k)]
    for patch, cell in enumerate(groups):
        members[cell].append(patch)
    side = isqrt(n)
    if side * side == n:
        rows = [_middle({i // side for i in one}) for one in members]
        columns = [_middle({i % side for i in one}) for one in members]
        places = [row * side + column for row, column in zip(rows, columns, strict=True)]
    else:
        places = [_middle(set(one)) for one in members]
    return tuple(torch.tensor(one, dtype=torch.int64, device=device) for one in (groups, places))


def _divide(n: int, k: int) -> list[int]:
    """Number the cell of each of n patches: k cells, row by row."""
    side = isqrt(n)
    if side * side != n:
        return [i * k // n for i in range(n)]
    bands = (isqrt(4 * k) + 1) // 2  # sqrt(k), rounded
    cells = []
    for i in range(n):
        band = i // side * bands // side
        start, end = band * k // bands, (band + 1) * k // bands
        cells.append(start + i % side * (end - start) // side)
    return cells


def _middle(numbers: set[int]) -> int:
    """Return the middle of consecutive numbers, the upper one of two."""
    return sorted(numbers)[len(numbers) // 2]

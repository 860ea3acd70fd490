"""Mean [CLS] attention and the ranking of patches, in one kernel launch each, equal to the torch code.

    order = descending(mean_attention(attention))       # (B, H, N) -> (B, N), see llava.pruning.base

Heads are added in float64, one after the other, so that equal columns tie exactly. The place of a patch in
the order is the number of patches of greater score, or of equal score and lower index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 32  # patches per program
_CHUNK = 128  # scores compared together
_WARPS = 4


@triton.jit
def _mean_kernel(
    attention, mean, n, row_stride, head_stride, patch_stride, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    patch = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = attention + row * row_stride + patch * patch_stride
    total = tl.load(here, mask=patch < n, other=0.0).to(tl.float64)
    for head in tl.static_range(1, HEADS):
        total += tl.load(here + head * head_stride, mask=patch < n, other=0.0).to(tl.float64)
    total /= tl.full([], HEADS, tl.float64)
    tl.store(mean + row * n + patch, total, mask=patch < n)


@triton.jit
def _order_kernel(score, order, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    score += row * n
    patch = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(score + patch, mask=patch < n, other=0.0)
    mine = tl.where(mine == mine, mine, float("-inf"))  # NaN has no rank
    before = tl.zeros([BLOCK, CHUNK], tl.int32)
    start = 0
    while start < n:
        other = start + tl.arange(0, CHUNK)
        theirs = tl.load(score + other, mask=other < n, other=float("-inf"))  # before no patch
        theirs = tl.where(theirs == theirs, theirs, float("-inf"))
        before += (
            (theirs[None, :] > mine[:, None])
            | ((theirs[None, :] == mine[:, None]) & (other[None, :] < patch[:, None]))
        ).to(tl.int32)
        start += CHUNK
    tl.store(order + row * n + tl.sum(before, axis=1), patch.to(tl.int64), mask=patch < n)


def mean_attention(attention: Tensor) -> Tensor:
    """Average over the heads: (B, H, N) floating point -> (B, N) float64."""
    rows, heads, n = attention.shape
    mean = torch.empty(rows, n, dtype=torch.float64, device=attention.device)
    _mean_kernel[(rows, triton.cdiv(n, _BLOCK))](
        attention, mean, n, *attention.stride(), HEADS=heads, BLOCK=_BLOCK, num_warps=1
    )
    return mean


def descending(score: Tensor) -> Tensor:
    """Order the patches by descending score, ties to the lower index: (B, N) float64 -> (B, N) int64."""
    rows, n = score.shape
    order = torch.empty(rows, n, dtype=torch.int64, device=score.device)
    _order_kernel[(rows, triton.cdiv(n, _BLOCK))](
        score.contiguous(), order, n, BLOCK=_BLOCK, CHUNK=_CHUNK, num_warps=_WARPS
    )
    return order

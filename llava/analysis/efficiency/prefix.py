"""Attention of many questions over one shared prefix: does it pay not to copy the prefix's keys and values?

    measure_prefix(2880, rows=64, queries=40, device="cuda", dtype=torch.float16)

Two ways for one layer. Copied: the keys and values of the prefix are copied to every row, and one call of
SDPA with a mask attends to prefix and suffix, as in `generate_shared` of `llava.model.decode`. Merged: the
queries of all rows attend to the one prefix, every row attends to its own suffix, and both results are merged
by their log-sum-exp. Used by the part `prefix` of `gpu_check.py`; no model is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def measure_prefix(
    prefix: int,
    rows: int,
    queries: int,
    device: str,
    dtype: torch.dtype,
    heads: int = 32,
    width: int = 128,
    suffix: int = 40,
    repeats: int = 7,
) -> dict[str, Any]:
    """Time both ways for one layer.

    Args:
        prefix: Tokens of the shared prefix.
        queries: New tokens per row: `suffix` for the questions, 1 for a decoded token.
        width: Channels of a head.
        suffix: Tokens of a row after the prefix.

    Returns:
        Milliseconds of the copies, of the attention over them and of the merged attention, for one layer, and
        the largest difference between both results.
    """
    from llava.analysis.efficiency.timing import compare

    generator = torch.Generator(device).manual_seed(0)

    def draw(batch: int, length: int) -> Tensor:
        # (batch, length, heads, width) in memory, as a projection writes it
        made = torch.randn(batch, length, heads, width, generator=generator, device=device).to(dtype)
        return made.transpose(1, 2)

    q = draw(rows, queries)
    shared = draw(1, prefix), draw(1, prefix)
    own = draw(rows, suffix), draw(rows, suffix)
    ones = torch.ones(queries, prefix + suffix, dtype=torch.bool, device=device)
    mask = ones.tril(prefix + suffix - queries)[None, None].expand(rows, 1, -1, -1).contiguous()
    room = [torch.empty(rows, heads, prefix + suffix, width, dtype=dtype, device=device) for _ in range(2)]

    def copy() -> None:
        for whole, first, last in zip(room, shared, own, strict=True):
            whole[:, :, :prefix] = first
            whole[:, :, prefix:] = last

    def copied() -> Tensor:
        return functional.scaled_dot_product_attention(q, *room, attn_mask=mask)

    def merged() -> Tensor:
        return merged_attention(q, shared, own)

    copy()
    difference = (copied().float() - merged().float()).abs().max().item()
    spent = compare({"copy": copy, "copied": copied, "merged": merged}, device, repeats, 2)
    found: dict[str, Any] = {f"{name}_ms": 1000 * timing.median for name, timing in spent.items()}
    return {"prefix": prefix, "rows": rows, "queries": queries, **found, "max_difference": difference}


def merged_attention(q: Tensor, shared: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
    """Attend to one shared prefix and, causally, to the own suffix of every row: two calls, merged exactly.

    Args:
        q: (B, H, L, d), the last L positions of the suffix.
        shared: keys and values (1, H, P, d).
        own: keys and values (B, H, S, d), S >= L.

    Returns:
        (B, H, L, d).
    """
    rows, heads, length, width = q.shape
    line = q.transpose(1, 2).reshape(1, rows * length, heads, width).transpose(1, 2)  # one long query
    first, weight = attention_and_sum(line, *shared, causal=False)
    first = first.transpose(1, 2).reshape(rows, length, heads, width).transpose(1, 2)
    weight = weight.transpose(1, 2).reshape(rows, length, heads).transpose(1, 2)
    last, own_weight = attention_and_sum(q, *own, causal=length > 1)
    share = torch.sigmoid(weight - own_weight)[..., None].to(q.dtype)  # of the prefix in the whole softmax
    return share * first + (1 - share) * last


def attention_and_sum(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return attention (B, H, L, d) and the log-sum-exp (B, H, L) of its scores, float32.

    `causal` takes as many queries as keys. The CPU computes it step by step; only a GPU is meant to be fast.
    """
    if q.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal)
        return found[0], found[1][..., : q.shape[2]]
    scores = q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)

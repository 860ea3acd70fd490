"""The rounds of VisPruner's selection in one kernel launch: a Triton kernel, one program per row.

    selected = remove_duplicates(similarity, residual, target)      # same indices as in torch

The neighbors of every token are sorted once, by descending similarity. In a round, an even's best odd is then
the first of its neighbors that is currently an odd: a few positions of a short list instead of all pairs. The
kernel only compares the float64 similarities it is given, and equal ones rank by their position in the list,
so the indices are those of `llava.pruning.diversity.remove_duplicates_in_torch`, ties included.

Triton compiles for NVIDIA and AMD GPUs. With TRITON_INTERPRET=1 in the environment it interprets the kernel
on CPU, which is how the tests compare it with the rounds in torch where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import MAX_RESIDUAL

_WIDTH = 16  # neighbors read together
_CHUNK = 16  # scores compared together


@triton.jit
def _rounds_kernel(
    values,
    places,
    residual,
    rho,
    state,
    score,
    out,
    size,
    target,
    DROP: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Run all rounds of one row.

    values, places (B, R, R) are the similarities and odds of each even, sorted by descending similarity.
    Scratch memory: rho (B, 2, 2 HALF) int32, the list and the next one; state (B, R) int32, zeros, the last
    round in which a token was an odd; score (B, HALF) float64. What one thread stores and another loads is in
    global memory with a barrier in between.
    """
    row = tl.program_id(0).to(tl.int64)
    values += row * size * size
    places += row * size * size
    residual += row * size
    rho += row * 4 * HALF
    state += row * size
    score += row * HALF
    out += row * target

    lanes = tl.arange(0, HALF)
    all_lanes = tl.arange(0, 2 * HALF)
    wide = tl.arange(0, WIDTH)
    chunk = tl.arange(0, CHUNK)
    tl.store(rho + all_lanes, all_lanes, mask=all_lanes < size)
    tl.debug_barrier()

    length = size
    turn = 0
    while length > target:
        evens = (length + 1) // 2
        odds = length // 2
        drop = tl.minimum(tl.minimum(DROP, length - target), evens)
        source_list = rho + (turn % 2) * 2 * HALF
        target_list = rho + ((turn + 1) % 2) * 2 * HALF
        is_even = lanes < evens
        is_odd = lanes < odds
        even = tl.load(source_list + 2 * lanes, mask=is_even, other=0)
        odd = tl.load(source_list + 2 * lanes + 1, mask=is_odd, other=0)
        tl.store(state + odd, turn + 1 + tl.zeros_like(odd), mask=is_odd)
        tl.debug_barrier()

        best = tl.full([HALF], float("-inf"), tl.float64)
        todo = is_even.to(tl.int32)
        at = 0
        while (at < size) & (tl.max(todo, axis=0) > 0):
            here = even[:, None] * size + (at + wide)[None, :]
            inside = (todo[:, None] > 0) & ((at + wide)[None, :] < size)
            who = tl.load(places + here, mask=inside, other=0)
            hit = inside & (tl.load(state + who, mask=inside, other=0) == turn + 1)
            found = tl.max(tl.load(values + here, mask=hit, other=float("-inf")), axis=1)
            any_hit = tl.max(hit.to(tl.int32), axis=1)
            best = tl.where((todo > 0) & (any_hit > 0), found, best)
            todo = tl.where(any_hit > 0, 0, todo)
            at += WIDTH

        # The rank of an even is the number of evens before it: of greater score, or earlier at equal score.
        tl.store(score + lanes, best, mask=is_even)
        tl.debug_barrier()
        rank = tl.zeros([HALF], tl.int32)
        for start in range(0, evens, CHUNK):
            other = start + chunk
            theirs = tl.load(score + other, mask=other < evens, other=float("-inf"))
            ahead = (theirs[:, None] > best[None, :]) | (
                (theirs[:, None] == best[None, :]) & (other[:, None] < lanes[None, :])
            )
            ahead = ahead & (other < evens)[:, None]
            rank += tl.sum(ahead.to(tl.int32), axis=0)

        # Survivors are listed by descending similarity, before the odds: this decides the next split.
        tl.store(target_list + rank - drop, even, mask=is_even & (rank >= drop))
        tl.store(target_list + evens - drop + lanes, odd, mask=is_odd)
        length -= drop
        turn += 1
        tl.debug_barrier()

    stays = all_lanes < target
    place = tl.load(rho + (turn % 2) * 2 * HALF + all_lanes, mask=stays, other=0)
    tl.store(out + all_lanes, tl.load(residual + place, mask=stays, other=0), mask=stays)


def remove_duplicates(similarity: Tensor, residual: Tensor, target: int, drop: int = 8) -> Tensor:
    """Reduce each row of `residual` to `target` indices, in the order of the last round's list.

    Args:
        similarity: (B, R, R) float64 [odd, even], no NaN.
        residual: (B, R) int64, R at most `MAX_RESIDUAL`.
        target: Indices to keep per row, 1..R.
        drop: Evens to drop per round.
    Returns:
        (B, target) int64.
    Raises:
        ValueError: for R or target out of range.
    """
    rows, size = residual.shape
    if not 1 <= target <= size or size > MAX_RESIDUAL:
        raise ValueError(
            f"target: got {target} of {size} tokens, expected 1..{size} of at most {MAX_RESIDUAL} tokens"
        )
    values, places = similarity.transpose(1, 2).sort(dim=2, descending=True)  # per even, its odds
    half = max(16, triton.next_power_of_2((size + 1) // 2))
    scratch = {"device": residual.device, "dtype": torch.int32}
    rho = torch.empty(rows, 2, 2 * half, **scratch)
    state = torch.zeros(rows, size, **scratch)
    score = torch.empty(rows, half, device=residual.device, dtype=torch.float64)
    out = torch.empty(rows, target, device=residual.device, dtype=torch.int64)
    _rounds_kernel[(rows,)](
        values.contiguous(),
        places.to(torch.int32).contiguous(),
        residual.contiguous(),
        rho,
        state,
        score,
        out,
        size,
        target,
        DROP=drop,
        HALF=half,
        WIDTH=_WIDTH,
        CHUNK=_CHUNK,
        num_warps=8 if half <= 512 else 16,
    )
    return out

"""The diverse part of VisPruner in three Triton kernels: similarities, nearest neighbors and all rounds.

    similarity, exceptional = signed_square_cosines(products, ...)
    selected = remove_duplicates(similarity, residual, target)      # same indices as in torch

The nearest `_NEIGHBORS` of every token are listed once, by descending similarity. In a round, an even's best
odd is the first of its neighbors that is currently an odd. An even without one in its list compares all odds,
and so does every even once few are left. One program runs all rounds of a row. Its tiles shrink with the
list, and counts and maxima stay with their threads until the end of a loop.

The kernels only compare the float64 similarities they are given, and equal ones rank by their position in the
list, so the indices are those of `llava.pruning.diversity.remove_duplicates_in_torch`, ties included.

Triton compiles for NVIDIA and AMD GPUs. With TRITON_INTERPRET=1 in the environment it interprets the kernels
on CPU, which is how the tests compare them with the torch code where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import MAX_RESIDUAL

_NEIGHBORS = 32  # length of the lists, a power of two
_DIRECT = 64  # evens, rounded up to a power of two, from which on all odds are compared
_CHUNK = 16  # scores, or odds, that are compared together
_WARPS = 32  # of the program that runs the rounds of a row
_LINE_WARPS = 4  # of the programs that compute a line of similarities
_LIST_WARPS = 1  # of the programs that list neighbors: a warp needs no barriers


@triton.jit
def _similarity_kernel(
    products,
    squares,
    exceptional,
    size,
    NEARLY_ONE: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Replace one line of products by similarities, and flag it; see `signed_square_cosines`."""
    line = tl.program_id(0).to(tl.int64)
    row, token = line // size, line % size
    lanes = tl.arange(0, SIZE)
    inside = lanes < size
    product = tl.load(products + line * size + lanes, mask=inside, other=0.0)
    own = tl.load(squares + line)
    similarity = product * tl.abs(product)
    similarity /= own * tl.load(squares + row * size + lanes, mask=inside, other=1.0)
    # tl.full, because a bare Python number may be rounded to float32
    near = ~(similarity <= tl.full([], NEARLY_ONE, tl.float64)) & inside & (lanes != token)
    usual = (own < tl.full([], MOST, tl.float64)) & (own > tl.full([], LEAST, tl.float64))
    usual = usual & (tl.sum(near.to(tl.int32), axis=0) == 0)
    tl.store(exceptional + line, tl.where(usual, 0, 1).to(tl.int8))
    similarity = tl.where(similarity == similarity, similarity, 0.0)  # the rounds take no NaN
    tl.store(products + line * size + lanes, similarity, mask=inside)


@triton.jit
def _neighbors_kernel(similarity, values, places, size, SIZE: tl.constexpr, KEEP: tl.constexpr):
    """List the KEEP greatest similarities of one even, and their odds, by descending similarity.

    If fewer than KEEP are greater than -inf, the list ends in any tokens at -inf: an even that finds its
    first odd there has no better one.
    """
    line = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    slots = tl.arange(0, KEEP)
    left = tl.load(similarity + line * size + lanes, mask=lanes < size, other=float("-inf"))
    left = tl.where(lanes == line % size, float("-inf"), left)  # a token is not its own odd
    best = tl.full([KEEP], float("-inf"), tl.float64)
    who = tl.zeros([KEEP], tl.int32)
    for slot in range(KEEP):
        top = tl.max(left, axis=0)
        place = tl.min(tl.where(left == top, lanes, size - 1), axis=0)
        best = tl.where(slots == slot, top, best)
        who = tl.where(slots == slot, place, who)
        left = tl.where(lanes == place, float("-inf"), left)
    tl.store(values + line * KEEP + slots, best)
    tl.store(places + line * KEEP + slots, who.to(tl.int16))


@triton.jit
def _best_of_all(similarity, source, even, wanted, odds, size, HALF: tl.constexpr, CHUNK: tl.constexpr):
    """Return the similarity of each wanted even to its best odd, by comparing all odds; -inf for others."""
    best = tl.full([HALF, CHUNK], float("-inf"), tl.float64)
    start = 0
    while start < odds:
        at = start + tl.arange(0, CHUNK)
        odd = tl.load(source + 2 * at + 1, mask=at < odds, other=0)
        theirs = tl.load(
            similarity + even[:, None] * size + odd[None, :],
            mask=wanted[:, None] & (at < odds)[None, :],
            other=float("-inf"),
        )
        best = tl.where(theirs > best, theirs, best)
        start += CHUNK
    return tl.max(best, axis=1)


@triton.jit
def _round(
    similarity,
    values,
    places,
    is_odd,
    score,
    source,
    sink,
    size,
    length,
    drop,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    KEEP: tl.constexpr,
    CHUNK: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """Write the next list to `sink`. What one thread stores and another loads has a barrier in between."""
    evens = (length + 1) // 2
    odds = length // 2
    lanes = tl.arange(0, HALF)
    in_evens = lanes < evens
    in_odds = lanes < odds
    even = tl.load(source + 2 * lanes, mask=in_evens, other=0)
    odd = tl.load(source + 2 * lanes + 1, mask=in_odds, other=0)
    if DIRECT:
        best = _best_of_all(similarity, source, even, in_evens, odds, size, HALF, CHUNK)
    else:
        tl.store(is_odd + even, tl.zeros([HALF], tl.int8), mask=in_evens)
        tl.store(is_odd + odd, tl.full([HALF], 1, tl.int8), mask=in_odds)
        tl.debug_barrier()
        slots = tl.arange(0, KEEP)
        who = tl.load(places + even[:, None] * KEEP + slots[None, :], mask=in_evens[:, None], other=0)
        # tl.gather, because a load would first move the whole tile to other threads.
        tokens = tl.arange(0, SIZE)
        flags = tl.load(is_odd + tokens, mask=tokens < size, other=0).to(tl.int32)
        hit = tl.gather(flags, tl.reshape(who.to(tl.int32), [HALF * KEEP]), axis=0)
        hit = tl.reshape(hit, [HALF, KEEP]) > 0
        first = tl.min(tl.where(hit, slots[None, :], KEEP), axis=1)
        # Through memory, or the compiler computes it twice, for two orders of threads.
        tl.store(sink + lanes, first, mask=in_evens)
        tl.debug_barrier()
        first = tl.load(sink + lanes, mask=in_evens, other=0)
        found = in_evens & (first < KEEP)
        missing = in_evens & (first == KEEP)
        best = tl.load(values + even * KEEP + first, mask=found, other=float("-inf"))
        if tl.max(missing.to(tl.int32), axis=0) > 0:
            rest = _best_of_all(similarity, source, even, missing, odds, size, HALF, CHUNK)
            best = tl.where(missing, rest, best)

    # The rank of an even is the number of evens before it: of greater score, or earlier at equal score.
    tl.store(score + lanes, best, mask=in_evens)
    tl.debug_barrier()
    before = tl.zeros([HALF, CHUNK], tl.int32)
    start = 0
    while start < evens:
        other = start + tl.arange(0, CHUNK)
        theirs = tl.load(score + other, mask=other < evens, other=float("-inf"))  # before no even
        before += (
            (theirs[None, :] > best[:, None])
            | ((theirs[None, :] == best[:, None]) & (other[None, :] < lanes[:, None]))
        ).to(tl.int32)
        start += CHUNK
    rank = tl.sum(before, axis=1)

    # Survivors are listed by descending similarity, before the odds: this decides the next split.
    tl.store(sink + rank - drop, even, mask=in_evens & (rank >= drop))
    tl.store(sink + evens - drop + lanes, odd, mask=in_odds)
    tl.debug_barrier()


@triton.jit
def _rounds_kernel(
    similarity,
    values,
    places,
    residual,
    rho,
    is_odd,
    score,
    out,
    size,
    target,
    DROP: tl.constexpr,
    HALF: tl.constexpr,
    LEVELS: tl.constexpr,
    KEEP: tl.constexpr,
    CHUNK: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """Run all rounds of one row, those of at most HALF, HALF / 2 ... evens in tiles of that size.

    similarity (B, R, R) is [even, odd]; values, places (B, R, KEEP) are its sorted lists. Scratch memory: rho
    (B, 2, 2 HALF) int32, the list and the next one; is_odd (B, R) int8; score (B, HALF) float64.
    """
    row = tl.program_id(0).to(tl.int64)
    similarity += row * size * size
    values += row * size * KEEP
    places += row * size * KEEP
    residual += row * size
    rho += row * 4 * HALF
    is_odd += row * size
    score += row * HALF
    out += row * target

    lanes = tl.arange(0, 2 * HALF)
    tl.store(rho + lanes, lanes, mask=lanes < size)
    tl.debug_barrier()

    length = size
    turn = 0
    for level in tl.static_range(LEVELS):
        # A list of HALF >> level fits the next tile, of half as many evens.
        while (length > target) & ((length > (HALF >> level)) | (level == LEVELS - 1)):
            drop = tl.minimum(tl.minimum(DROP, length - target), (length + 1) // 2)
            source = rho + (turn % 2) * 2 * HALF
            sink = rho + ((turn + 1) % 2) * 2 * HALF
            _round(
                similarity,
                values,
                places,
                is_odd,
                score,
                source,
                sink,
                size,
                length,
                drop,
                SIZE=2 * HALF,
                HALF=HALF >> level,
                KEEP=KEEP,
                CHUNK=CHUNK,
                DIRECT=(HALF >> level) <= DIRECT,
            )
            length -= drop
            turn += 1

    stays = lanes < target
    place = tl.load(rho + (turn % 2) * 2 * HALF + lanes, mask=stays, other=0)
    tl.store(out + lanes, tl.load(residual + place, mask=stays, other=0), mask=stays)


def signed_square_cosines(
    products: Tensor, nearly_one: float, least: float, most: float
) -> tuple[Tensor, Tensor]:
    """Turn dot products into cos * |cos|, in place, and tell which rows are exceptional.

    Args:
        products: (B, R, R) float64, contiguous, with the squared norms on the diagonal.
        nearly_one, least, most: As in `llava.pruning.diversity`.
    Returns:
        `products`, with 0 instead of NaN, and whether each row is exceptional: (B,) bool.
    """
    rows, size = products.shape[:2]
    squares = products.diagonal(dim1=1, dim2=2).contiguous()
    exceptional = torch.empty(rows, size, device=products.device, dtype=torch.int8)
    _similarity_kernel[(rows * size,)](
        products,
        squares,
        exceptional,
        size,
        NEARLY_ONE=nearly_one,
        LEAST=least,
        MOST=most,
        SIZE=triton.next_power_of_2(size),
        num_warps=_LINE_WARPS,
    )
    return products, exceptional.any(dim=1)


def _nearest(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """List the nearest odds of each even: (B, R, R) [even, odd] -> values and places (B, R, `_NEIGHBORS`)."""
    rows, size = similarity.shape[:2]
    values = similarity.new_empty(rows, size, _NEIGHBORS)
    places = similarity.new_empty(rows, size, _NEIGHBORS, dtype=torch.int16)
    _neighbors_kernel[(rows * size,)](
        similarity,
        values,
        places,
        size,
        SIZE=triton.next_power_of_2(size),
        KEEP=_NEIGHBORS,
        num_warps=_LIST_WARPS,
    )
    return values, places


def remove_duplicates(similarity: Tensor, residual: Tensor, target: int, drop: int = 8) -> Tensor:
    """Reduce each row of `residual` to `target` indices, in the order of the last round's list.

    Args:
        similarity: (B, R, R) float64 [odd, even], no NaN; not copied if its transpose is contiguous.
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
    similarity = similarity.transpose(1, 2).contiguous()  # [even, odd]
    values, places = _nearest(similarity)
    half = max(16, triton.next_power_of_2((size + 1) // 2))
    least = max(16, triton.next_power_of_2((target + 1) // 2))
    new = {"device": residual.device}
    rho = torch.empty(rows, 2, 2 * half, dtype=torch.int32, **new)
    is_odd = torch.empty(rows, size, dtype=torch.int8, **new)
    score = torch.empty(rows, half, dtype=torch.float64, **new)
    out = torch.empty(rows, target, dtype=torch.int64, **new)
    _rounds_kernel[(rows,)](
        similarity,
        values,
        places,
        residual.contiguous(),
        rho,
        is_odd,
        score,
        out,
        size,
        target,
        DROP=drop,
        HALF=half,
        LEVELS=(half // least).bit_length(),
        KEEP=_NEIGHBORS,
        CHUNK=_CHUNK,
        DIRECT=_DIRECT,
        num_warps=_WARPS,
    )
    return out

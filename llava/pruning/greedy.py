"""What methods share that choose tokens one after the other: cosines, the loop, and exact ties.

    similarity = cosines(features)                                    # (B, N, N) float64
    chosen = spread(similarity, first, tokens, lambda closest: 1 - closest)
    Kept.from_selected(chosen, 0)

`first` (B, N) are the scores of the first choice; `closest` (B, N) is each token's largest similarity to a
chosen one. A rule that remembers something else passes its own update to `greedy`. All of it is batched, in
float64, without a device sync, and gives a row the same bits in every batch. Ties go to the lower index, and
tokens with equal features tie exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .base import defer, is_large
from .diversity import NEARLY_EQUAL, dot_products
from .pairs import MAX_SQUARE, MIN_SQUARE, PairLines, check_square

Pairs = Tensor | PairLines  # (B, N, N) float64, or of one row that is too long for it


def cosines(x: Tensor, change: Callable[[Tensor], object] | None = None) -> Pairs:
    """Compute the cosine of all pairs of tokens of each row: (B, N, C) -> (B, N, N) float64.

    A token whose norm is zero has cosine 0 with every token. Tokens with equal features have equal cosines to
    the bit, and 1 with each other.

    Args:
        x: (B, N, C) floating point.
        change: An elementwise function that overwrites the cosines of a row.
    Raises:
        ValueError: for features whose squared norm is not below 1e100.
    """

    if len(x) == 1 and is_large(x.shape[1]):
        found = to_cosines(PairLines(x[0]))
        if change is None:
            return found

        def changed(entries: Tensor, _rows: Tensor, _columns: Tensor) -> Tensor:
            change(entries)
            return entries

        return found.then(changed)

    def finish(products: Tensor) -> None:
        to_cosines(products)
        if change is not None:
            change(products)

    return gram(x, finish)


def gram(x: Tensor, change: Callable[[Tensor], object] | None = None) -> Pairs:
    """Compute all dot products: (B, N, C) -> (B, N, N) float64; tokens with equal features have equal ones.

    Args:
        x: (B, N, C) floating point.
        change: A function that overwrites the products (n, n) of a row, of which equal tokens share one line.
    Raises:
        ValueError: for features whose squared norm is not below 1e100.
    """
    if change is None and len(x) == 1 and is_large(x.shape[1]):
        return PairLines(x[0])
    x = x.to(torch.float64)
    found = _symmetric(dot_products(x))
    square = found.diagonal(dim1=1, dim2=2)
    equal = (found - square[:, :, None]).abs_() < NEARLY_EQUAL * square[:, :, None]
    more = equal.sum((1, 2)) > (square > 0).sum(1)  # more than the diagonal
    exceptional = more | ~(square < MAX_SQUARE).all(1)
    special = [] if defer(exceptional) else exceptional.nonzero().flatten().tolist()
    for row in range(len(x)):
        if row not in special:
            if change is not None:
                change(found[row])
            continue
        # An entry at the edge of a block of BLAS may be summed in another order, so equal tokens share one.
        distinct, place = torch.unique(x[row], dim=0, return_inverse=True)
        shared = _symmetric(dot_products(distinct[None]))[0]
        check_square(shared.diagonal().max().item())
        if change is not None:
            change(shared)
        found[row] = shared[place][:, place]
    return found


def _symmetric(products: Tensor) -> Tensor:
    """Make entries (i, j) and (j, i) equal to the bit: tokens that are nearest to each other have to tie."""
    return torch.maximum(products, products.transpose(1, 2))


def to_cosines(products: Pairs, least: Tensor | float = MIN_SQUARE) -> Pairs:
    """Turn dot products (..., N, N) into cosines in place; tokens of a squared norm below `least` have 0."""
    if isinstance(products, PairLines):
        own = products.own()
        is_zero = own < (products.of_groups(least[0]) if isinstance(least, Tensor) else least)

        def divide(entries: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            entries.div_((own[rows][:, None] * own[columns]).sqrt_())
            return entries.masked_fill_(is_zero[rows][:, None] | is_zero[columns], 0.0)

        return products.then(divide)
    square = products.diagonal(dim1=-2, dim2=-1).clone()
    zero = square < least
    products.div_((square[..., :, None] * square[..., None, :]).sqrt_())  # s / sqrt(s * s) is exactly 1
    return products.masked_fill_(zero[..., :, None] | zero[..., None, :], 0.0)


def greedy(
    score: Tensor, tokens: int, update: Callable[[Tensor], Tensor], pairs: Pairs | None = None
) -> Tensor:
    """Choose the token of the largest score, `tokens` times, each token once.

    Args:
        score: (B, N) float64, of the first choice.
        tokens: At most N.
        update: Called with the last chosen tokens (B, 1); returns the scores (B, N) of the next choice.
        pairs: What `update` reads lines of.
    Returns:
        (B, tokens) int64, in the order of choice.
    """
    taken = torch.zeros_like(score, dtype=torch.bool)
    chosen: list[Tensor] = []
    for step in range(tokens):
        if step:
            score = update(chosen[-1])
        # Not finite within `Pruner.keep_deferred` only, where indices have to be distinct nevertheless
        free = torch.nan_to_num(score).masked_fill_(taken, -math.inf)
        if isinstance(pairs, PairLines):
            pairs.expect(free[0])
        chosen.append(free.argmax(dim=1, keepdim=True))  # the first of equal ones
        taken.scatter_(1, chosen[-1], True)
    return torch.cat(chosen, dim=1)


def spread(similarity: Pairs, first: Tensor, tokens: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Choose greedily by a score that depends on each token's largest similarity to a chosen one.

    Args:
        similarity: (B, N, N) float64.
        first: (B, N) float64, scores of the first choice.
        tokens: At most N.
        score: Turns the largest similarities (B, N) into scores (B, N).
    Returns:
        (B, tokens) int64, in the order of choice.
    """
    closest = torch.full_like(first, -math.inf)

    def update(last: Tensor) -> Tensor:
        torch.maximum(closest, line(similarity, last), out=closest)
        return score(closest)

    return greedy(first, tokens, update, similarity)


def line(matrix: Pairs, index: Tensor) -> Tensor:
    """Return line index[b] of each matrix: (B, N, N), (B, 1) -> (B, N)."""
    if isinstance(matrix, PairLines):
        return matrix.line(int(index))[None]
    return matrix.gather(1, index[:, :, None].expand(-1, -1, matrix.shape[2]))[:, 0]


def diagonal(matrix: Pairs) -> Tensor:
    """Return the entry of every token with itself: (B, N, N) -> (B, N)."""
    if isinstance(matrix, PairLines):
        return matrix.own()[matrix.place][None]
    return matrix.diagonal(dim1=1, dim2=2)


def line_sums(matrix: Pairs, weight: Tensor | None = None) -> Tensor:
    """Add the entries of every line, times a weight (B, N) of their columns: (B, N, N) -> (B, N)."""
    if isinstance(matrix, PairLines):
        return matrix.per_token(lambda lines: (lines if weight is None else lines * weight).sum(dim=1))[None]
    return (matrix if weight is None else matrix * weight[:, None]).sum(dim=2)


def nearest_other(similarity: Pairs) -> Tensor:
    """Return each token's largest similarity to another token: (B, N, N) -> (B, N)."""
    if isinstance(similarity, PairLines):
        return similarity.nearest_other()[None]
    diagonal = similarity.diagonal(dim1=1, dim2=2)
    before = diagonal.clone()
    diagonal.fill_(-math.inf)
    found = similarity.amax(dim=2)
    diagonal.copy_(before)
    return found


def sum_of_heads(attention: Tensor) -> Tensor:
    """Add [CLS] attention over the heads, one after the other: (B, H, N) -> (B, N) float64."""
    wide = attention.to(torch.float64)
    total = wide[:, 0].clone()
    for head in range(1, wide.shape[1]):
        total += wide[:, head]
    return total


def min_max(x: Tensor) -> Tensor:
    """Scale each row to [0, 1]; a row whose values are all equal becomes 1: (B, N) -> (B, N)."""
    least, most = x.aminmax(dim=1, keepdim=True)
    return ((x - least) / (most - least)).masked_fill_(most == least, 1.0)


def power(x: Tensor, exponent: float) -> Tensor:
    """Raise (B, N) to a power; equal values of a row have equal results.

    Libraries compute the last few elements of an array by other code than the rest, which may round another
    way; so every value is looked up in its row's sorted values.
    """
    if exponent == 1:
        return x
    ordered = x.sort(dim=1).values
    results = torch.stack([row.pow(exponent) for row in ordered]) if len(x) else ordered
    return results.gather(1, torch.searchsorted(ordered, x.contiguous()))


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Multiply the matrices of each row: (B, M, N), (B, N, C) -> (B, M, C).

    Each row has its own product, because a batched one may round differently at another batch size.
    """
    if len(a) == 0:
        return a.new_empty(0, a.shape[1], b.shape[2])
    return torch.stack([left @ right for left, right in zip(a, b, strict=True)])


def at_least_zero(name: str, value: object) -> float:
    """Check an option of a method and return it as a float.

    Raises:
        ValueError: if it is not a finite number >= 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(value)


def gram_flops(patches: int, channels: int) -> float:
    """Return FLOPs of all dot products of pairs of a row's tokens, each pair once."""
    return float(patches * (patches + 1) * channels)

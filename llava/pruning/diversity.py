"""The diverse part of VisPruner: rounds that remove the tokens most similar to another one.

    kept = most_diverse(features, residual, target)      # (B, R) patch indices -> (B, target)

Equal to Algorithm 1 with one similarity product per round, but faster: all similarities of the residual
tokens are computed once per row, and the rounds only look them up.

Similarities are float64 whatever the dtype of the features, because one changed rank changes every later
even/odd split. Therefore a tensor and any exact copy of it in another dtype give the same indices, whatever
the other rows of the batch are, and tokens with equal features tie exactly (see `_similarity`). Between
devices or BLAS libraries, the last bit of a float64 dot product of float32 features may differ, which changes
a rank only where two similarities agree to about 1e-15.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import kernels, pairs
from .base import defer, deferring, is_large
from .pairs import MAX_SQUARE, MIN_SQUARE, PairLines, check_square

DROP_PER_ROUND = 8
NEARLY_EQUAL = 1e-9  # tokens nearer than this may be equal ones, which have to tie exactly
_NEIGHBORS = 32  # that are known of every token of a long row
_STREAMS = 4  # of a GPU, which compute products of rows at the same time; each has a workspace of cuBLAS


def most_diverse(
    features: Tensor,
    residual: Tensor,
    target: int,
    drop_per_round: int = DROP_PER_ROUND,
    on_round: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Reduce each row of `residual` to `target` patches that are dissimilar to each other.

    Args:
        features: (B, N, C) floating point.
        residual: (B, R) int64, patch indices in the order of attention, which decides the even/odd split.
        target: Patches to keep per row.
        drop_per_round: Evens to drop per round; kernels exist for the default only.
        on_round: Called after every round with the patches that are left, (B, n) int64; runs in torch.
    Returns:
        (B, min(target, R)) int64, in the order of the last round's list.
    """
    if target == 0 or residual.shape[1] <= target:
        return residual[:, :target]
    if is_large(residual.shape[1]):
        return torch.stack(
            [
                _most_diverse_of_many(x[row], row, target, drop_per_round, on_round)
                for x, row in zip(features, residual, strict=True)
            ]
        )
    similarity = _similarity_of_rows(features, residual)
    if residual.shape[1] > kernels.MAX_RESIDUAL or drop_per_round != DROP_PER_ROUND or on_round is not None:
        return remove_duplicates_in_torch(similarity, residual, target, drop_per_round, on_round)
    return kernels.run("rounds.remove_duplicates", remove_duplicates_in_torch, similarity, residual, target)


def remove_duplicates_in_torch(
    similarity: Tensor,
    residual: Tensor,
    target: int,
    drop_per_round: int = DROP_PER_ROUND,
    on_round: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Run the rounds in torch: the reference that other backends have to equal.

    All rows have the same R, so every round has the same sizes in all of them and the batch moves in step.

    Args:
        similarity: (B, R, R) float64 [odd, even], no NaN.
        residual: (B, R) int64.
        target: Patches to keep per row, 1..R.
        drop_per_round: Evens to drop per round.
        on_round: Called after every round with the patches that are left, (B, n) int64.
    Returns:
        (B, target) int64, in the order of the last round's list.
    """
    rows, size = residual.shape
    similarity = similarity.reshape(rows * size, size)
    start = torch.arange(rows, device=residual.device)[:, None] * size  # first line of each batch row in it

    rho = torch.arange(size, device=residual.device).expand(
        rows, size
    )  # the list, as positions in `residual`
    while rho.shape[1] > target:
        even, odd = rho[:, 0::2], rho[:, 1::2]
        drop = min(drop_per_round, rho.shape[1] - target, even.shape[1])
        # Copying whole lines and ignoring most columns is faster than gathering single elements.
        matches = similarity.index_select(0, (odd + start).flatten()).view(rows, odd.shape[1], size)
        best = matches.amax(dim=1).gather(1, even)  # (B, evens): similarity to the best odd
        rank = best.argsort(dim=1, descending=True, stable=True)
        # Survivors are listed by descending similarity, before the odds: this decides the next split.
        rho = torch.cat([even.gather(1, rank[:, drop:]), odd], dim=1)
        if on_round is not None:
            on_round(residual.gather(1, rho))
    return residual.gather(1, rho)


def _most_diverse_of_many(
    x: Tensor, residual: Tensor, target: int, drop_per_round: int, on_round: Callable[[Tensor], object] | None
) -> Tensor:
    """Run the rounds of one long row with the nearest neighbors of every token, not with all pairs.

    The best odd of an even is the first odd among its neighbors, by falling similarity. Where all of them
    were dropped or are evens, its similarities to the tokens that are left are computed again.

    Args:
        x: (R, C) features of the tokens in `residual` (R,).
    Returns:
        (target,) int64, in the order of the last round's list.
    """
    lines = PairLines(x).then(lambda entries, rows, columns: entries.mul_(entries.abs()))
    square, place = lines.square, lines.place
    zero = square < MIN_SQUARE

    def similarity(evens: Tensor, odds: Tensor) -> Tensor:
        """Compute cos * |cos| of groups; an odd of zero norm matches no token."""
        found = lines.block(evens, odds).div_(square[evens][:, None] * square[odds])
        return found.masked_fill_(zero[odds], -torch.inf)

    groups = torch.arange(len(square), device=x.device)
    near_value = square.new_full((len(square), _NEIGHBORS), -torch.inf)
    near = groups[:, None].repeat(1, _NEIGHBORS)  # a value of -inf is never better than another

    def find_neighbors(some: Tensor, left: Tensor, odds: Tensor | None = None) -> Tensor | None:
        """List the neighbors of some groups among those that are left; return their best odds."""
        found = similarity(some, left)
        count = min(_NEIGHBORS, len(left))
        values, columns = found.topk(count, dim=1)
        near_value[some], near[some] = -torch.inf, some[:, None]
        near_value[some, :count], near[some, :count] = values, left[columns]
        return None if odds is None else found[:, odds].amax(dim=1)

    for part in lines.blocks():
        find_neighbors(part, groups)
    rho = torch.arange(len(residual), device=x.device)
    while len(rho) > target:
        even, odd = rho[0::2], rho[1::2]
        drop = min(drop_per_round, len(rho) - target, len(even))
        is_odd = torch.zeros_like(zero)
        is_odd[place[odd]] = True
        own = place[even]
        hit = is_odd[near[own]]
        best = near_value[own].gather(1, hit.to(torch.uint8).argmax(dim=1, keepdim=True))[:, 0]
        missing = own[~hit.any(dim=1)].unique()
        if len(missing):
            left = place[rho].unique()
            odds = is_odd[left].nonzero()[:, 0]
            fresh = torch.zeros_like(square)
            for part in missing.split(max(1, pairs.ENTRIES // len(left))):
                fresh[part] = find_neighbors(part, left, odds)
            best = torch.where(hit.any(dim=1), best, fresh[own])
        best = best.masked_fill_(zero[own], torch.inf)  # an even of zero norm is dropped first
        rank = best.argsort(descending=True, stable=True)
        rho = torch.cat([even[rank[drop:]], odd])
        if on_round is not None:
            on_round(residual[rho][None])
    return residual[rho]


def _similarity_of_rows(features: Tensor, residual: Tensor) -> Tensor:
    """Compute similarity[b, j, i] of the j-th residual token, as an odd, to the i-th, as an even; float64."""
    if features.device.type == "cuda" or deferring():
        return _similarity_of_rows_without_syncs(features, residual)
    rows, size = residual.shape
    similarity = torch.empty(rows, size, size, dtype=torch.float64, device=features.device)
    for row in range(rows):
        similarity[row] = _similarity(features[row, residual[row]].to(torch.float64).contiguous())
    return similarity


def _similarity_of_rows_without_syncs(features: Tensor, residual: Tensor) -> Tensor:
    """Compute the same with one device sync for all rows; rows with exceptional tokens are redone.

    Within `Pruner.keep_deferred` there is no sync, and those rows are left to a later call.
    """
    x = features.gather(1, residual[..., None].expand(-1, -1, features.shape[2])).to(torch.float64)
    products = dot_products(x)
    limits = 1 - NEARLY_EQUAL, MIN_SQUARE, MAX_SQUARE
    if residual.shape[1] > kernels.MAX_RESIDUAL:
        similarity, exceptional = _similarity_of_products(products, *limits)
    else:
        similarity, exceptional = kernels.run(
            "rounds.signed_square_cosines", _similarity_of_products, products, *limits
        )
    similarity = similarity.transpose(1, 2)  # its lines are evens, which the kernels read
    if defer(exceptional):
        return similarity
    for row in exceptional.nonzero().flatten().tolist():
        similarity[row] = _similarity(x[row])
    return similarity


def dot_products(x: Tensor) -> Tensor:
    """Compute the dot products of all pairs of tokens of each row: (B, R, C) -> (B, R, R).

    Each row has its own matrix product, because a batched one may round differently at another batch size.
    One product does not fill a GPU, so those of several rows run at the same time.
    """
    rows, size = x.shape[:2]
    products = x.new_empty(rows, size, size)
    if x.device.type != "cuda" or rows == 1:
        for row in range(rows):
            _gram(x[row], products[row])
        return products
    current = torch.cuda.current_stream(x.device)
    streams = _streams(x.device)[:rows]
    for stream in streams:
        stream.wait_stream(current)
    for row in range(rows):
        with torch.cuda.stream(streams[row % len(streams)]):
            _gram(x[row], products[row])
    for stream in streams:  # before the memory of either tensor can be used again
        current.wait_stream(stream)
    return products


@functools.cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(_STREAMS)]


def _similarity_of_products(
    products: Tensor, nearly_one: float, least: float, most: float
) -> tuple[Tensor, Tensor]:
    """Turn dot products into cos * |cos|, 0 instead of NaN, and tell which rows are exceptional.

    Args:
        products: (B, R, R) float64.
        nearly_one: A row where two tokens have a similarity above it is exceptional.
        least, most: A row with a squared norm that is not between them is exceptional.
    Returns:
        (B, R, R) float64 and (B,) bool.
    """
    square = products.diagonal(dim1=1, dim2=2).clone()
    similarity = (products * products.abs()).div_(square[:, :, None] * square[:, None, :])
    # Not "> nearly_one": NaN has to count as well. The diagonal counts always.
    equal = (~(similarity <= nearly_one)).sum((1, 2)) > similarity.shape[1]
    exceptional = equal | ~((square < most) & (square > least)).all(1)
    return similarity.masked_fill_(similarity.isnan(), 0.0), exceptional


def _similarity(x: Tensor) -> Tensor:
    """Compute cos * |cos| of all pairs: (R, C) float64 -> (R, R) [odd, even], zero-norm tokens included.

    Tokens with equal features have equal entries to the bit, and exactly 1 with each other. No BLAS
    guarantees that (an entry at the edge of a block may be summed in another order), so if any two tokens are
    nearly equal, the product runs over distinct features only, and equal tokens share its entries.
    """
    similarity, square = _signed_square_cosines(x)
    # Not "> 1 - NEARLY_EQUAL": a zero-norm token gives NaN, which has to count as well.
    if (~(similarity <= 1 - NEARLY_EQUAL)).sum() > len(x):  # more than the diagonal
        distinct, place = torch.unique(x, dim=0, return_inverse=True)
        similarity, square = _signed_square_cosines(distinct)
        similarity = torch.maximum(similarity, similarity.T)[place][:, place]  # equal for (i, j) and (j, i)
        square = square[place]
    check_square(square.max().item())
    zero = square < MIN_SQUARE
    if zero.any():  # carries no information: as an odd it matches no token, as an even it is dropped first
        infinity = float("inf")
        similarity = similarity.masked_fill(zero[:, None], -infinity).masked_fill(zero[None, :], infinity)
    return similarity


def _signed_square_cosines(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cos * |cos| (R, R) and squared norms (R,) of (R, C) float64.

    Only the order of cosines matters, and this preserves it without a root: roots are not correctly rounded
    on every device, products and quotients are. So the result is exact where dot products are (nearly always
    for half-precision features, in any order of summation), and equal tokens get s * s / (s * s) = 1.
    """
    gram = _gram(x, x.new_empty(len(x), len(x)))
    square = gram.diagonal().clone()
    return (gram * gram.abs()).div_(square[:, None] * square), square


def _gram(x: Tensor, out: Tensor, block: int = 96) -> Tensor:
    """Compute the dot products of all pairs into `out`: (R, C) -> (R, R)."""
    if x.device.type == "cuda":  # one kernel launch
        return torch.mm(x, x.T, out=out)
    for lo in range(0, len(x), block):  # lower triangle by strips, mirrored: about half the multiplications
        hi = lo + block
        out[lo:hi, :hi] = x[lo:hi] @ x[:hi].T
        out[:lo, lo:hi] = out[lo:hi, :lo].T
    return out

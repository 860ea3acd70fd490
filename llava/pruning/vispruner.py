"""VisPruner (arXiv:2412.01818, Algorithm 1): the most attended tokens, and the most diverse of the rest.

Same result as the algorithm written out with one similarity product per round, at a fraction of its cost: all
similarities of the residual tokens are computed once per row, and the rounds only look them up.

Selection is in float64 whatever the dtype of the inputs, because one changed rank re-shuffles every later
even/odd split. What that buys, and what it does not: a tensor and any exact copy of it in another dtype give
the same indices, whatever stands in the other rows of the batch, and tokens with equal features tie exactly
(see `_similarities`). Between devices or BLAS libraries the last bit of a float64 dot product of float32
features may differ, which moves a rank only where two similarities agree to about 1e-15.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from .base import Kept, Pruner, attention_order
from .registry import register_pruner

DROP_PER_ROUND = 8
_INF = float("inf")
_ALIKE = 1e-9  # tokens nearer than this may be equal ones, which have to tie exactly
_SMALLEST, _LARGEST = 1e-100, 1e100  # squared norms: below is zero, above is refused
_LONGEST = 4096  # residual tokens in a row that kernels are used for
_failed: set[str] = set()  # ways to run the rounds that raised something here


@register_pruner("vispruner")
class VisPruner(Pruner):
    """Keep floor(T * r) tokens by [CLS] attention and T - floor(T * r) by diversity.

    The product is Python's float product, `int(T * r)`, as in the released code: T = 90, r = 0.7 gives 62
    important tokens, since 90 * 0.7 is 62.99...
    """

    uses_ratio = True

    def choose(
        self, features: Tensor, attention: Tensor, tokens: int, keys: Sequence[str | int] | None = None
    ) -> Kept:
        order = attention_order(attention)  # (B, N)
        n = order.shape[1]
        n_important = min(int(tokens * self.important_ratio), n)
        if tokens >= n:
            return Kept.from_picks(order, n_important)
        important, residual = order[:, :n_important], order[:, n_important:]
        diverse = _most_diverse(features, residual, tokens - n_important)
        return Kept.from_picks(torch.cat([important, diverse], dim=1), n_important)


def _most_diverse(features: Tensor, residual: Tensor, target: int) -> Tensor:
    """Thin each row of `residual` (B, R), patch indices by attention rank, to `target` < R indices."""
    if target == 0:
        return residual[:, :0]
    return _thin(_similar_rows(features, residual), residual, target)


def thin_by_torch(similar: Tensor, residual: Tensor, target: int) -> Tensor:
    """The rounds: (B, R, R) float64 [odd, even] and (B, R) int64 -> (B, target) int64, of the last list.

    All rows have the same R, so every round has the same sizes in all of them and the batch moves in step.
    """
    rows, size = residual.shape
    similar = similar.view(rows * size, size)
    start = torch.arange(rows, device=residual.device)[:, None] * size  # where each batch row begins in it

    rho = torch.arange(size, device=residual.device).expand(rows, size)  # the list, as places in `residual`
    while rho.shape[1] > target:
        even, odd = rho[:, 0::2], rho[:, 1::2]
        drop = min(DROP_PER_ROUND, rho.shape[1] - target, even.shape[1])
        # Whole rows are copied and most columns then ignored: quicker than picking single elements.
        matches = similar.index_select(0, (odd + start).flatten()).view(rows, odd.shape[1], size)
        best = matches.amax(dim=1).gather(1, even)  # (B, evens): each one's best odd
        rank = best.argsort(dim=1, descending=True, stable=True)
        # Survivors stand in falling order of similarity, before the odds: this decides the next split.
        rho = torch.cat([even.gather(1, rank[:, drop:]), odd], dim=1)
    return residual.gather(1, rho)


def _thin(similar: Tensor, residual: Tensor, target: int) -> Tensor:
    """`thin_by_torch` on whatever is quickest here: on a GPU one launch for the batch, if it can be had."""
    way = rounds_run_on(similar.device) if similar.shape[1] <= _LONGEST else "torch"
    if way != "torch":
        try:
            if way == "triton":
                from llava.pruning.kernels import rounds

                return rounds.thin(similar, residual, target, DROP_PER_ROUND)
            from llava.pruning.kernels import graph

            return graph.thin(similar, residual, target, thin_by_torch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers and drivers raise anything; the indices are the same anyhow
            warnings.warn(f"selection goes on without {way}: {type(error).__name__}: {error}", stacklevel=2)
            _failed.add(way)
            return _thin(similar, residual, target)
    return thin_by_torch(similar, residual, target)


def rounds_run_on(device: torch.device | str) -> str:
    """ "triton", "graph" (a captured CUDA graph) or "torch": the first that has not failed here.

    VISPRUNER_ROUNDS in the environment picks one, for comparison. Only CUDA devices have more than "torch".
    """
    ways = ["torch"]
    if torch.device(device).type == "cuda":
        ways = (["triton"] if find_spec("triton") else []) + ["graph", "torch"]
        ways = [way for way in ways if way == (os.environ.get("VISPRUNER_ROUNDS") or way)] + ["torch"]
    return next(way for way in ways if way not in _failed)


def _similar_rows(features: Tensor, residual: Tensor) -> Tensor:
    """similar[b, j, i]: how well the j-th residual token, as an odd, matches the i-th, as an even; float64.

    One product for each row: a batched kernel may round differently at another batch size.
    """
    if features.device.type == "cuda":
        return _similar_rows_in_few_launches(features, residual)
    rows, size = residual.shape
    similar = torch.empty(rows, size, size, dtype=torch.float64, device=features.device)
    for row in range(rows):
        similar[row] = _similarities(features[row, residual[row]].to(torch.float64).contiguous())
    return similar


def _similar_rows_in_few_launches(features: Tensor, residual: Tensor) -> Tensor:
    """The same, looking at the results once for all rows: those with anything unusual are done again."""
    rows, size = residual.shape
    similar = torch.empty(rows, size, size, dtype=torch.float64, device=features.device)
    x = features.gather(1, residual[..., None].expand(-1, -1, features.shape[2])).to(torch.float64)
    for row in range(rows):
        torch.mm(x[row], x[row].T, out=similar[row])
    square = similar.diagonal(dim1=1, dim2=2).clone()
    similar = (similar * similar.abs()).div_(square[:, :, None] * square[:, None, :])
    alike = (~(similar <= 1 - _ALIKE)).sum((1, 2)) > size  # more than the diagonal, or NaN
    unusual = alike | ~((square < _LARGEST) & (square > _SMALLEST)).all(1)
    for row in unusual.nonzero().flatten().tolist():
        similar[row] = _similarities(x[row])
    return similar


def _similarities(x: Tensor) -> Tensor:
    """(R, C) float64 -> (R, R), [odd, even]: cos * |cos|, with the rule for zero-norm tokens applied.

    Tokens with equal features have equal entries to the bit, and exactly 1 with each other. No BLAS promises
    that (an entry at the edge of a block may be summed in another order), so if any two tokens look alike,
    the product runs over distinct features only, and equal tokens share its entries.
    """
    similar, square = _signed_square_cosines(x)
    # Not "> 1 - _ALIKE": a zero-norm token gives NaN, which has to count as well.
    if (~(similar <= 1 - _ALIKE)).sum() > len(x):  # more than the diagonal
        distinct, place = torch.unique(x, dim=0, return_inverse=True)
        similar, square = _signed_square_cosines(distinct)
        similar = torch.maximum(similar, similar.T)[place][:, place]  # one value for (i, j) and (j, i)
        square = square[place]
    if (square > _LARGEST).any():
        raise ValueError(
            "features too large for float64 similarities: "
            f"the largest squared norm is {square.max().item():.3g}, the limit is 1e100"
        )
    zero = square < _SMALLEST
    if zero.any():  # carries nothing: as an odd it matches nobody, as an even it is dropped first
        similar = similar.masked_fill(zero[:, None], -_INF).masked_fill(zero[None, :], _INF)
    return similar


def _signed_square_cosines(x: Tensor, block: int = 96) -> tuple[Tensor, Tensor]:
    """(R, C) float64 -> cos * |cos| (R, R), and squared norms (R,).

    Only the order of cosines counts, and this has it without a root: roots are not correctly rounded on every
    device, products and quotients are. So the result is exact where dot products are (nearly always for
    half-precision features, in any order of summation), and equal tokens get s * s / (s * s) = 1.
    """
    gram = x.new_empty(len(x), len(x))
    for lo in range(0, len(x), block):  # lower triangle by strips, mirrored: about half the multiplications
        hi = lo + block
        gram[lo:hi, :hi] = x[lo:hi] @ x[:hi].T
        gram[:lo, lo:hi] = gram[lo:hi, :lo].T
    square = gram.diagonal().clone()
    return (gram * gram.abs()).div_(square[:, None] * square), square

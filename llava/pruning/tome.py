"""Token Merging (ICLR 2023): the most similar tokens are merged inside the layers of the tower.

    for layer, r in zip(layers, schedule(N, tokens, len(layers))):     # between attention and MLP of a layer
        matching = match(keys, r)                     # (B, T, D), mean over heads; T = N + 1, [CLS] first
        x, sizes = merge(x, sizes, matching)          # sizes (B, T) are 1 at first
        groups = regroup(groups, matching)            # (B, T), at first 0 ... T - 1

The attention of later layers adds log(sizes) to the logits of the keys. The functions are batched; nothing
but r is decided on the host. The method "tome" takes what a tower merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept, Pruner, has_float64
from .diversity import MIN_SQUARE
from .greedy import row_products
from .registry import register_pruner

_TIE = 2.0**40  # cosines that agree to about 1e-12 tie, so that a library's rounding does not decide


@register_pruner("tome")
class ToMe(Pruner):
    """Take the features of a tower that merged N patches to T; each place is the first patch of its group.

    The budget is met by a constant number of merges per layer (see `schedule`), which is not published.
    """

    merges = True

    @property
    def cues(self) -> tuple[str, ...]:
        """The features that the tower merged to the budget, and their groups; none if nothing is merged."""
        return (f"merged@{self.tokens}", f"merged_groups@{self.tokens}") if self.tokens else ()

    def choose(self, features, cues, tokens):
        merged, groups = (cues[name] for name in self.cues)
        merged, groups, places = in_raster_order(merged, groups)
        return Kept(places, torch.zeros_like(places, dtype=torch.bool), merged, groups)


@dataclass(frozen=True)
class Matching:
    """Which of T tokens are merged, as columns of the T and of the T - r tokens that are left.

    Attributes:
        kept: (B, T - r) int64, the old column of every new one: unmerged tokens of even columns, then all of
            odd columns.
        merged: (B, r) int64, old columns of the tokens that are merged into another.
        target: (B, r) int64, the new columns into which they are merged.
    """

    kept: Tensor
    merged: Tensor
    target: Tensor


def schedule(patches: int, tokens: int, layers: int) -> list[int]:
    """Divide the merges from `patches` to `tokens` evenly over the layers, the remainder to the first ones.

    A layer merges at most half of its patches. Where the even share is more, earlier layers merge more.

    Raises:
        ValueError: if even half of the patches in every layer leave more than `tokens`.
    """
    if tokens >= patches:
        return [0] * layers
    left = patches
    for total in range(patches - tokens, patches * layers + 1):
        merges, left = [], patches
        for layer in range(layers):
            merges.append(min(total // layers + (layer < total % layers), left // 2))
            left -= merges[-1]
        if left == tokens:
            return merges
    raise ValueError(
        f"tokens: got {tokens}, but {layers} layers merge {patches} patches to {left} at least. Each merges "
        f"half of them at most. Use {left} tokens or more."
    )


@torch.no_grad()
def match(metric: Tensor, r: int, class_token: bool = True) -> Matching:
    """Match r tokens of even columns with their most similar ones of odd columns.

    Args:
        metric: (B, T, D) floating point, compared by cosine: the keys of a layer, averaged over the heads.
        r: Merges; more than half of the tokens ([CLS] not counted) are reduced to that.
        class_token: Whether column 0 is [CLS], which is not merged. Unmerged tokens of even columns are
            ascending with it, and by falling similarity without.
    """
    rows, size = metric.shape[:2]
    r = max(0, min(r, (size - class_token) // 2))
    columns = torch.arange(size, device=metric.device).repeat(rows, 1)
    if r == 0:
        return Matching(columns, columns[:, :0], columns[:, :0])
    if not has_float64(metric.device.type):
        found = match(metric.cpu(), r, class_token)
        return Matching(*(one.to(metric.device) for one in (found.kept, found.merged, found.target)))
    metric = metric.to(torch.float64)
    norm = (metric * metric).sum(dim=2, keepdim=True).sqrt_()
    unit = (metric / norm).masked_fill_(norm * norm < MIN_SQUARE, 0.0)
    similarity = row_products(unit[:, 0::2], unit[:, 1::2].transpose(1, 2)).mul_(_TIE).round_()
    if class_token:
        similarity[:, 0].fill_(-torch.inf)
    order = similarity.amax(dim=2).argsort(dim=1, descending=True, stable=True)
    merged, unmerged = order[:, :r], order[:, r:]
    if class_token:
        unmerged = unmerged.sort(dim=1).values
    partner = similarity.argmax(dim=2).gather(1, merged)  # the first of equal ones
    kept = torch.cat([2 * unmerged, columns[:, 1::2]], dim=1)
    return Matching(kept, 2 * merged, unmerged.shape[1] + partner)


def merge(x: Tensor, sizes: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Average the merged tokens, weighted by the number of patches they stand for.

    Args:
        x: (B, T, C) floating point.
        sizes: (B, T) of the same dtype, patches that each token stands for.
    Returns:
        (B, T - r, C) and (B, T - r).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    merged, size = matching.merged.shape[1], matching.kept.shape[1]
    if merged == 0:
        return x, sizes
    weighted = torch.cat([x.to(wide) * sizes[:, :, None].to(wide), sizes[:, :, None].to(wide)], dim=2)
    columns = torch.arange(size, device=x.device)
    onto = (matching.target[:, None] == columns[:, None]).to(wide)  # a product adds in a fixed order
    total = _take(weighted, matching.kept) + row_products(onto, _take(weighted, matching.merged))
    return (total[:, :, :-1] / total[:, :, -1:]).to(x.dtype), total[:, :, -1].to(sizes.dtype)


def regroup(groups: Tensor, matching: Matching) -> Tensor:
    """Follow the tokens that patches are part of: (B, N) int64, columns before the merge -> columns after."""
    rows, size = matching.kept.shape
    column = torch.cat([matching.kept, matching.merged], dim=1).argsort(dim=1)  # place in kept + merged
    numbers = torch.arange(size, device=groups.device).repeat(rows, 1)
    return torch.cat([numbers, matching.target], dim=1).gather(1, column).gather(1, groups)


def in_raster_order(features: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order merged tokens, without [CLS], by their first patch.

    Args:
        features: (B, L, C).
        groups: (B, N) int64, the column that each patch is part of; no column is empty.
    Returns:
        Features, groups, and (B, L) int64: the first patch of each column, ascending.
    """
    rows, size = features.shape[:2]
    n = groups.shape[1]
    patches = torch.arange(n, device=groups.device).repeat(rows, 1)
    first = torch.full((rows, size), n, dtype=torch.int64, device=groups.device)
    places, order = first.scatter_reduce(1, groups, patches, "amin").sort(dim=1)
    return _take(features, order), order.argsort(dim=1).gather(1, groups), places


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))

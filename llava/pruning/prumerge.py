"""LLaVA-PruMerge (ICCV 2025): outliers of the last layer's attention, each merged with its nearest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import NO_PLACE, NO_TOKEN, Kept, Pruner, descending
from .greedy import cosines, gram_flops, row_products
from .registry import register_pruner

NEAREST = 32  # tokens that a picked one is merged with


@register_pruner("prumerge")
@dataclass(frozen=True)
class PruMerge(Pruner):
    """Pick patches by a', merge each with its nearest tokens, and append one token of all that is left.

    a' is the [CLS] attention of the tower's last layer with all heads as one: softmax(q k / sqrt(width)). A
    picked token becomes V_i + the sum of a'_j V_j over its 32 nearest tokens j by cosine of the keys; the
    extra token is the sum of a'_j V_j over the patches that were not picked. Columns are the picked patches
    by falling a', and the extra token. With a budget T, the T - 1 patches of the largest a' are picked; the
    official code has no fixed budget.

    Args:
        adaptive: Pick, as published, as many as there are outliers of a' (above Q3 + 1.5 IQR), at least one;
            the budget is then ignored unless it is 0.
    """

    adaptive: bool = False

    cues = ("last_query", "last_keys")
    merges = True
    adds_uniform: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive must be True or False, got {self.adaptive!r}")

    @property
    def is_adaptive(self) -> bool:
        return self.adaptive

    @property
    def reads_values(self) -> bool:
        """Whether the number of tokens has to be known on the host."""
        return self.adaptive

    def choose(self, features, cues, tokens):
        weight = _attention(cues["last_query"].to(torch.float64), cues["last_keys"].to(torch.float64))
        similarity = cosines(cues["last_keys"][:, 1:])
        if not self.adaptive:
            picked, n_top = self._pick(weight, tokens - 1)
            return _merge(features, weight, similarity, picked, n_top)
        rows = []
        for row in range(len(features)):
            one = slice(row, row + 1)
            picked, n_top = self._pick_adaptively(weight[one])
            rows.append(_merge(features[one], weight[one], similarity[one], picked, n_top))
        return _padded(rows, features)

    def _pick(self, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Pick `count` patches: (B, count), and how many of them are picked by a' (B, 1)."""
        order = descending(weight)
        if not self.adds_uniform:
            return order[:, :count], torch.full_like(order[:, :1], count)
        n = order.shape[1]
        top = _outliers(weight).clamp(max=-(-count // 4))
        # The patches that are not top, ascending; and `count - top` of them, evenly spread
        rest = descending(-torch.where(order.argsort(dim=1) < top, n, torch.arange(n, device=weight.device)))
        number = torch.arange(count, device=weight.device)
        spread = (2 * (number - top) + 1) * (n - top) // (2 * (count - top)).clamp(min=1)
        uniform = rest.gather(1, spread.clamp(min=0))
        return torch.where(number < top, order[:, :count], uniform), top

    def _pick_adaptively(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Pick the outliers of one row, and for "+" every step-th patch that is none: (1, P), (1, 1)."""
        n = weight.shape[1]
        share = max(1, int(_outliers(weight))) / n
        picked = descending(weight)[:, : int(n * share)]
        top = torch.full_like(picked[:, :1], picked.shape[1])
        if self.adds_uniform:
            step = max(1, int(int(1 / share) / 3))
            grid = torch.arange(0, max(n - 1, 1), step, device=weight.device)
            picked = torch.cat([picked, grid[None, ~torch.isin(grid, picked)]], dim=1)
        return picked, top

    def flops(self, patches, channels, projected):
        budget = patches if self.tokens is None else min(self.tokens, patches)
        return gram_flops(patches, channels) + 2.0 * patches * channels * (1 + budget)


@register_pruner("prumerge+")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """Pick spatially uniform patches too, between the ones picked by a' and the extra token.

    With a budget T, a quarter of the T - 1 patches (rounded up), but at most the outliers, are picked by a',
    and the others evenly from all patches that are left. Adaptive, as published: every step-th patch from 0
    to N - 2, with step = floor(floor(1 / share of outliers) / 3), at least 1.
    """

    adds_uniform = True


def _attention(query: Tensor, keys: Tensor) -> Tensor:
    """Return a' (B, N): softmax over all N + 1 keys, without [CLS]."""
    scores = (keys * query[:, None]).sum(dim=2) / query.shape[1] ** 0.5
    return torch.softmax(scores, dim=1)[:, 1:]


def _outliers(weight: Tensor) -> Tensor:
    """Count the weights strictly above Q3 + 1.5 IQR: (B, N) -> (B, 1) int64."""
    ordered = weight.sort(dim=1).values
    q1, q3 = (_quantile(ordered, quarter) for quarter in (1, 3))
    return (weight > q3 + 1.5 * (q3 - q1)).sum(dim=1, keepdim=True)


def _quantile(ordered: Tensor, quarter: int) -> Tensor:
    """Interpolate a quartile of sorted rows linearly: (B, N) -> (B, 1)."""
    below, part = divmod(quarter * (ordered.shape[1] - 1), 4)
    low = ordered[:, below : below + 1]
    return low + (ordered[:, min(below + 1, ordered.shape[1] - 1), None] - low) * (part / 4)


def _merge(features: Tensor, weight: Tensor, similarity: Tensor, picked: Tensor, n_top: Tensor) -> Kept:
    """Merge every picked patch with its nearest ones, and the others into one extra token.

    Args:
        features: (B, N, C).
        weight: (B, N) float64, a'.
        similarity: (B, N, N) float64, of the keys.
        picked: (B, P) int64, distinct.
        n_top: (B, 1) int64, how many of them are important.
    """
    rows, n = weight.shape
    count = picked.shape[1]
    lines = picked[:, :, None].expand(-1, -1, n)
    others = similarity.gather(1, lines).scatter_(2, picked[:, :, None], -torch.inf)
    nearest = others.argsort(dim=2, descending=True, stable=True)[:, :, : min(NEAREST, n - 1)]
    shares = weight[:, None].expand(-1, count, -1)
    shares = torch.zeros_like(shares).scatter(2, nearest, shares.gather(2, nearest))
    left = weight.scatter(1, picked, 0.0)
    values = features.to(torch.float64)
    merged = row_products(torch.cat([shares, left[:, None]], dim=1), values)
    merged[:, :count] += values.gather(1, picked[:, :, None].expand(-1, -1, values.shape[2]))
    number = torch.arange(count, device=picked.device)
    groups = torch.full_like(weight, count, dtype=torch.int64).scatter_(1, picked, number.repeat(rows, 1))
    places = torch.cat([picked, torch.full_like(n_top, NO_PLACE)], dim=1)
    important = torch.cat([number < n_top, torch.zeros_like(n_top, dtype=torch.bool)], dim=1)
    return Kept(places, important, merged.to(features.dtype), groups)


def _padded(rows: list[Kept], features: Tensor) -> Kept:
    """Join rows that differ in their number of tokens; columns without a token are NO_TOKEN and zero."""
    most = max((row.indices.shape[1] for row in rows), default=0)
    places = torch.full((len(rows), most), NO_TOKEN, dtype=torch.int64, device=features.device)
    important = torch.zeros_like(places, dtype=torch.bool)
    merged = features.new_zeros(len(rows), most, features.shape[2])
    for number, row in enumerate(rows):
        count = row.indices.shape[1]
        places[number, :count], important[number, :count] = row.indices[0], row.important[0]
        merged[number, :count] = row.features[0]
    groups = torch.empty(features.shape[:2], dtype=torch.int64, device=features.device)
    for number, row in enumerate(rows):
        groups[number] = row.groups[0]
    return Kept(places, important, merged, groups)

"""HiPrune: anchors of a middle layer with their neighbors, then the most attended tokens of a deep layer."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch

from .base import Kept, Pruner, descending
from .greedy import at_least_zero
from .registry import register_pruner

_OBJECT = "received@9/24"


@register_pruner("hiprune")
@dataclass(frozen=True)
class HiPrune(Pruner):
    """Keep anchors with their four neighbors, then the tokens that receive most attention until T are kept.

    The anchors are the round(alpha * T / 5) tokens that receive most attention in layer 9 of 24 (Python's
    round). Neighbors are the indices one less and more, and one grid row less and more, clamped to
    [0, N - 1]; if N is not a square number there are no grid rows. If anchors and neighbors are more than T,
    anchors come first, then neighbors, each by the attention of the select layer.

    Args:
        alpha: Share of the budget for anchors and their neighbors, in [0, 1].
    """

    alpha: float = 0.1

    cues = ("received", _OBJECT)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", at_least_zero("alpha", self.alpha))
        if self.alpha > 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")

    def choose(self, features, cues, tokens):
        n = features.shape[1]
        side = isqrt(n)
        anchors = descending(cues[_OBJECT].to(torch.float64))[:, : round(self.alpha * tokens / 5)]
        steps = (-1, 1, -side, side) if side * side == n else (-1, 1)
        neighbors = torch.cat([(anchors + step).clamp(0, n - 1) for step in steps], dim=1)
        rank = descending(cues["received"].to(torch.float64)).argsort(dim=1)
        priority = torch.zeros_like(rank).scatter_(1, neighbors, 1).scatter_(1, anchors, 2)
        order = (rank - n * priority).argsort(dim=1)
        return Kept.from_selected(order[:, :tokens], 0)

"""Farthest point sampling: a control that shows what diversity gives without importance."""

from __future__ import annotations

from .base import Kept, Pruner, mean_attention
from .greedy import cosines, gram_flops, spread
from .registry import register_pruner


@register_pruner("farthest")
class Farthest(Pruner):
    """Choose the most attended token, then always the one farthest from the chosen ones, by 1 - cosine.

    This is "score" with exponent 0.
    """

    def choose(self, features, cues, tokens):
        first = mean_attention(cues.attention)
        chosen = spread(cosines(features), first, tokens, lambda closest: 1 - closest)
        return Kept.from_selected(chosen, 0)

    def flops(self, patches, channels, projected):
        return gram_flops(patches, channels)

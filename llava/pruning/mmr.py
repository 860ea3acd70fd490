"""Maximal marginal relevance: attention against similarity to the tokens that were already chosen."""

from __future__ import annotations

from .base import Kept, Pruner, mean_attention
from .greedy import cosines, gram_flops, min_max, spread
from .registry import register_pruner


@register_pruner("mmr")
class MaximalMarginalRelevance(Pruner):
    """Choose the most attended token, then always 0.5 importance - 0.5 largest cosine with a chosen one.

    Importance is the [CLS] attention, scaled to [0, 1] by the smallest and largest of the row. Implemented
    from its formula.
    """

    def choose(self, features, cues, tokens):
        importance = min_max(mean_attention(cues.attention))
        half = 0.5 * importance
        chosen = spread(cosines(features), importance, tokens, lambda closest: half - 0.5 * closest)
        return Kept.from_selected(chosen, 0)

    def flops(self, patches, channels, projected):
        return gram_flops(patches, channels)

"""DivPrune (CVPR 2025): the most diverse tokens after the projector, without attention."""

from __future__ import annotations

from .base import Kept, Pruner
from .greedy import cosines, gram_flops, nearest_other, spread
from .registry import register_pruner


@register_pruner("divprune")
class DivPrune(Pruner):
    """Choose the token whose nearest other token is farthest, then always the farthest from the chosen ones.

    Distance is 1 - cosine of projected tokens. All crops of an image are one pool.
    """

    cues = ("projected",)
    per_image = True

    def choose(self, features, cues, tokens):
        similarity = cosines(cues["projected"])
        first = 1 - nearest_other(similarity)
        return Kept.from_selected(spread(similarity, first, tokens, lambda closest: 1 - closest), 0)

    def flops(self, patches, channels, projected):
        return gram_flops(patches, projected)

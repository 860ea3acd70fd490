"""ID-Selection (2026): every chosen token lowers the scores of the tokens near to it.

Implemented from its formulas; no official code is known.
"""

from __future__ import annotations

from .base import Kept, Pruner, mean_attention
from .greedy import cosines, gram_flops, greedy, line
from .registry import register_pruner


@register_pruner("idsel")
class IDSelection(Pruner):
    """Choose the largest score s, which starts as [CLS] attention; then s_j -= exp(-20 d_ij^2) s_i for all j.

    i is the chosen token, d_ij = 1 - cosine.
    """

    def choose(self, features, cues, tokens):
        nearness = cosines(features, lambda s: s.sub_(1).square_().mul_(-20).exp_())
        score = mean_attention(cues.attention)

        def update(last):
            return score.sub_(line(nearness, last) * score.gather(1, last))

        return Kept.from_selected(greedy(score, tokens, update, nearness), 0)

    def flops(self, patches, channels, projected):
        return gram_flops(patches, channels)

"""SCoRe (CVPR 2026): the tokens farthest from the chosen ones, weighted by a power of [CLS] attention.

Implemented from its formulas; no official code is known. Its notes take [CLS] of the last layer; here both
features and attention are those of the select layer, as for the other methods.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Kept, Pruner, mean_attention
from .greedy import at_least_zero, cosines, gram_flops, power, spread
from .registry import register_pruner


@register_pruner("score")
@dataclass(frozen=True)
class WeightedFarthest(Pruner):
    """Choose the most attended token, then always the largest distance to the chosen ones x a ** exponent.

    Args:
        exponent: Of the [CLS] attention a, averaged over the heads; 0 ignores it after the first token.
    """

    exponent: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "exponent", at_least_zero("exponent", self.exponent))

    def choose(self, features, cues, tokens):
        attention = mean_attention(cues.attention)
        weight = power(attention, self.exponent)
        chosen = spread(cosines(features), attention, tokens, lambda closest: (1 - closest) * weight)
        return Kept.from_selected(chosen, 0)

    def flops(self, patches, channels, projected):
        return gram_flops(patches, channels)

"""SCOPE (NeurIPS 2025): tokens that cover all others, weighted by [CLS] attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Kept, Pruner
from .greedy import at_least_zero, cosines, gram_flops, greedy, line, power, sum_of_heads
from .registry import register_pruner


@register_pruner("scope")
@dataclass(frozen=True)
class Scope(Pruner):
    """Choose always the token j of the largest w_j ** alpha * sum over i of max(0, S_ij - covered_i).

    S is the cosine, w the [CLS] attention summed over the heads, and covered_i the largest S_ij with a chosen
    j, at first 0: a negative cosine covers nothing.

    Args:
        alpha: Exponent of the attention; 0 ignores it.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", at_least_zero("alpha", self.alpha))

    def choose(self, features, cues, tokens):
        similarity = cosines(features)
        weight = power(sum_of_heads(cues.attention), self.alpha)
        covered = torch.zeros_like(weight)
        scratch = torch.empty_like(similarity)

        def score():
            torch.sub(similarity, covered[:, None], out=scratch)
            return weight * scratch.clamp_(min=0).sum(dim=2)

        def update(last):
            torch.maximum(covered, line(similarity, last), out=covered)
            return score()

        return Kept.from_selected(greedy(score(), tokens, update), 0)

    def flops(self, patches, channels, projected):
        budget = patches if self.tokens is None else min(self.tokens, patches)
        return gram_flops(patches, channels) + 2.0 * budget * patches * patches

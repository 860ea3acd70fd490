"""SCOPE (NeurIPS 2025): tokens that cover all others, weighted by [CLS] attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept, Pruner, deferring
from .greedy import at_least_zero, cosines, gram_flops, greedy, line, power, sum_of_heads
from .registry import register_pruner

_BLOCK, _GROWTH = 16, 8  # gains that are computed together, at first and times as many after that


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
        if similarity.is_cuda or deferring():
            chosen = _choose_densely(similarity, weight, tokens)
        else:
            chosen = similarity.new_empty(len(similarity), tokens, dtype=torch.int64)
            for row in range(len(similarity)):
                _choose_lazily(similarity[row], weight[row], chosen[row])
        return Kept.from_selected(chosen, 0)

    def flops(self, patches, channels, projected):
        budget = patches if self.tokens is None else min(self.tokens, patches)
        return gram_flops(patches, channels) + 2.0 * budget * patches * patches


def _choose_densely(similarity: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """Compute the gains of all tokens in every step: (B, N, N), (B, N) -> (B, tokens)."""
    covered = torch.zeros_like(weight)
    scratch = torch.empty_like(similarity)

    def score():
        torch.sub(similarity, covered[:, None], out=scratch)
        return weight * scratch.clamp_(min=0).sum(dim=2)

    def update(last):
        torch.maximum(covered, line(similarity, last), out=covered)
        return score()

    return greedy(score(), tokens, update)


def _choose_lazily(similarity: Tensor, weight: Tensor, chosen: Tensor) -> None:
    """Choose the same tokens of one row into `chosen` (tokens,), with few gains per step.

    A gain never grows, rounding included, so an old one bounds the new one: the largest value decides as soon
    as it is a new one.
    """
    covered = torch.zeros_like(weight)
    bound = weight * similarity.clamp(min=0).sum(dim=1)
    for step in range(len(chosen)):
        old = torch.zeros_like(bound) if step else torch.full_like(bound, -torch.inf)  # -inf where it is new
        block = _BLOCK
        while old[best := int(bound.argmax())] == 0:
            some = (bound + old).topk(min(block, len(bound))).indices
            block *= _GROWTH
            gains = (similarity[some] - covered).clamp_(min=0).sum(dim=1)
            bound[some] = torch.minimum(bound[some], weight[some] * gains)
            old[some] = -torch.inf
        chosen[step] = best
        bound[best] = -torch.inf
        torch.maximum(covered, similarity[best], out=covered)

"""vispruner+: the tokens that represent best what [CLS] attends to. See docs/vispruner_plus.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept, Pruner, mean_attention
from .diversity import MIN_SQUARE
from .greedy import gram, gram_flops
from .registry import register_pruner
from .scope import cover

# The demand of all patches. What a token represents is rounded to whole units, whose sums are exact in
# any order: so every device and every order of evaluation agrees, and two tokens of equal gain tie.
_UNITS = 2.0**40
_AT_MEAN = (
    1e-6  # a distance from the mean, by the norm: below, a token has no direction and counts for nothing
)


@register_pruner("vispruner+")
@dataclass(frozen=True)
class VisPrunerPlus(Pruner):
    """Keep the set S of the largest sum over patches i of a_i * max over j in S of K_ij, greedily.

    a is the [CLS] attention, and K the squared cosine of features minus their mean, or 0 for a negative one:
    the share of patch i's energy that token j explains. Attention is the demand, what has to be represented,
    and not the candidate's weight. The sum is submodular, so that the greedy set reaches 1 - 1/e of the best.
    """

    def choose(self, features, cues, tokens):
        x, directed = _centered(features)
        attention = mean_attention(cues.attention)
        total = torch.stack([row.sum() for row in attention]) if len(attention) else attention.sum(dim=1)
        demand = attention * directed * (_UNITS / total.clamp(min=MIN_SQUARE))[:, None]
        represented = gram(x, _to_explained).mul_(demand[:, None]).round_()
        return Kept.from_selected(cover(represented, directed.to(torch.float64), tokens), 0)

    def flops(self, patches, channels, projected):
        budget = patches if self.tokens is None else min(self.tokens, patches)
        return gram_flops(patches, channels) + 2.0 * budget * patches * patches


def _centered(features: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the mean of each row's tokens: (B, N, C) float64; and which are not at the mean (B, N)."""
    x = features.to(torch.float64)
    if not len(x):
        return x, x.new_ones(x.shape[:2], dtype=torch.bool)
    centered = x - torch.stack([row.mean(dim=0) for row in x])[:, None]
    distance = torch.linalg.vector_norm(centered, dim=2)
    norm = torch.linalg.vector_norm(x, dim=2)
    return centered, (distance > _AT_MEAN * norm) & (distance * distance > MIN_SQUARE)


def _to_explained(products: Tensor) -> Tensor:
    """Turn dot products (n, n) into squared positive cosines in place, 0 for a token of zero norm."""
    square = products.diagonal().clamp(min=MIN_SQUARE)
    return products.clamp_(min=0).square_().div_(square[:, None] * square)  # s * s / (s * s) is exactly 1

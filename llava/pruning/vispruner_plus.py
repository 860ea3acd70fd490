"""vispruner+: tokens that represent what stands out and is attended to. See docs/vispruner_plus.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept, Pruner, mean_attention
from .diversity import MIN_SQUARE
from .greedy import gram, gram_flops, min_max
from .registry import register_pruner
from .scope import cover

# The largest possible demand of all patches. Demands and what a token represents are rounded to whole units,
# whose sums are exact in any order: every device and order of evaluation agrees, and equal gains tie.
_UNITS = 2.0**40
_AT_MEAN = (
    1e-6  # a distance from the mean, by the norm: below, a token has no direction and counts for nothing
)


@register_pruner("vispruner+")
@dataclass(frozen=True)
class VisPrunerPlus(Pruner):
    """Keep the set S of the largest sum over patches i of a_i * u_i * max over j in S of K_ij, greedily.

    a is the [CLS] attention; u is how unlike the others a projected token is: minus its mean cosine with all
    tokens, scaled to [0, 1] by the smallest and largest of the row. K is the squared cosine of projected
    tokens minus their mean, or 0 for a negative one: the share of patch i's energy that token j explains. So
    a and u are the demand, what has to be represented, and not a weight of the candidate. The sum is monotone
    and submodular: the greedy set reaches 1 - 1/e of the best one.
    """

    cues = ("projected",)

    def choose(self, features, cues, tokens):
        x, unlike, directed = _parts(cues["projected"])
        attention = mean_attention(cues.attention)
        total = torch.stack([row.sum() for row in attention]) if len(attention) else attention.sum(dim=1)
        demand = attention * unlike * directed * (_UNITS / total.clamp(min=MIN_SQUARE))[:, None]
        represented = gram(x, _to_explained).mul_(demand[:, None]).round_()
        return Kept.from_selected(cover(represented, directed.to(torch.float64), tokens), 0)

    def flops(self, patches, channels, projected):
        budget = patches if self.tokens is None else min(self.tokens, patches)
        return gram_flops(patches, projected) + 2.0 * budget * patches * patches


def _parts(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens minus their mean (B, N, D) float64, u (B, N), and which are not at the mean (B, N)."""
    x = tokens.to(torch.float64)
    if not len(x):
        none = x.new_ones(x.shape[:2])
        return x, none, none
    norm = torch.linalg.vector_norm(x, dim=2)
    unit = (x / norm[:, :, None]).masked_fill_((norm * norm < MIN_SQUARE)[:, :, None], 0.0)
    # Not a matrix product: equal tokens have equal sums. Rounded, so that noise is not scaled to [0, 1].
    likeness = (unit * _mean(unit)).sum(dim=2).mul_(_UNITS).round_()
    centered = x - _mean(x)
    distance = torch.linalg.vector_norm(centered, dim=2)
    directed = (distance > _AT_MEAN * norm) & (distance * distance > MIN_SQUARE)
    return centered, min_max(-likeness), directed


def _mean(x: Tensor) -> Tensor:
    """Average the tokens of each row, by itself: (B, N, D) -> (B, 1, D)."""
    return torch.stack([row.mean(dim=0, keepdim=True) for row in x])


def _to_explained(products: Tensor) -> Tensor:
    """Turn dot products (n, n) into squared positive cosines in place, 0 for a token of zero norm."""
    square = products.diagonal().clamp(min=MIN_SQUARE)
    return products.clamp_(min=0).square_().div_(square[:, None] * square)  # s * s / (s * s) is exactly 1

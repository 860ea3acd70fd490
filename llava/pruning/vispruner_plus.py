"""vispruner+: tokens that represent what stands out and is attended to. See docs/vispruner_plus.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept, Pruner, mean_attention
from .diversity import MIN_SQUARE
from .greedy import Pairs, diagonal, gram, gram_flops, line_sums, min_max
from .pairs import PairLines
from .registry import register_pruner
from .scope import cover

# The largest possible demand of all patches. Demands and what a token represents are rounded to whole units,
# whose sums are exact in any order: every device and order of evaluation agrees, and equal gains tie.
_UNITS = 2.0**40
_AT_MEAN = 1e-12  # squared distance from the mean over squared norm: below, a token counts for nothing


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
        products = gram(cues["projected"])
        unlike = _unlike(products)
        represented, directed = _explained(products)
        attention = mean_attention(cues.attention)
        total = torch.stack([row.sum() for row in attention]) if len(attention) else attention.sum(dim=1)
        demand = attention * unlike * directed * (_UNITS / total.clamp(min=MIN_SQUARE))[:, None]
        represented = _times(represented, demand)
        return Kept.from_selected(cover(represented, directed.to(torch.float64), tokens), 0)

    def flops(self, patches, channels, projected):
        budget = patches if self.tokens is None else min(self.tokens, patches)
        return gram_flops(patches, projected) + 2.0 * budget * patches * patches


def _times(represented: Pairs, demand: Tensor) -> Pairs:
    """Multiply the columns of K by the demands (B, N), in whole units."""
    if isinstance(represented, PairLines):
        return represented.each_line(lambda lines: lines.mul_(demand).round_())
    return represented.mul_(demand[:, None]).round_()


def _unlike(products: Pairs) -> Tensor:
    """Return u from the dot products of all tokens: (B, N, N) -> (B, N)."""
    square = diagonal(products)
    inverse = torch.where(square < MIN_SQUARE, 0.0, square.clamp(min=MIN_SQUARE).rsqrt())
    # Not a matrix product: equal tokens have equal sums. Rounded, so that noise is not scaled to [0, 1].
    likeness = line_sums(products, inverse) * inverse * (_UNITS / inverse.shape[1])
    return min_max(-likeness.round_())


def _explained(products: Pairs) -> tuple[Pairs, Tensor]:
    """Return K from the dot products of all tokens, and which tokens are not at the mean (B, N)."""
    with_mean = line_sums(products)
    n = with_mean.shape[1]
    with_mean = with_mean / n
    mean = torch.stack([row.sum() for row in with_mean]) / n if len(with_mean) else with_mean.sum(dim=1)
    least = (_AT_MEAN * diagonal(products)).clamp(min=MIN_SQUARE)
    if isinstance(products, PairLines):
        own = products.of_groups(with_mean[0])
        centered = products.then(
            lambda entries, rows, columns: entries - (own[rows][:, None] + own[columns]).sub_(mean)
        )
        distance = centered.own()
        directed = distance[centered.place][None] > least
        share = distance.clamp(min=MIN_SQUARE)
        return centered.then(
            lambda entries, rows, columns: (
                entries.clamp_(min=0).square_().div_(share[rows][:, None] * share[columns])
            )
        ), directed
    centered = products - (with_mean[:, :, None] + with_mean[:, None]).sub_(mean[:, None, None])
    distance = centered.diagonal(dim1=1, dim2=2).clone()
    directed = distance > least
    distance.clamp_(min=MIN_SQUARE)
    # s * s / (s * s) is exactly 1
    return centered.clamp_(min=0).square_().div_(distance[:, :, None] * distance[:, None]), directed

"""Cen-Prune on DivPrune: diversity of mean-centered tokens, weighted by how unlike the others a token is.

Implemented from its formulas; no official code is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Kept, Pruner
from .greedy import Pairs, diagonal, gram, gram_flops, line_sums, min_max, nearest_other, spread, to_cosines
from .pairs import PairLines
from .registry import register_pruner

_AT_MEAN = 1e-12  # squared distance to the mean over squared norm: below, a token counts as the mean


@register_pruner("divprune_cen")
class DivPruneCentered(Pruner):
    """Run DivPrune on tokens minus their mean, with distances times a weight per token.

    The weight is minus the mean cosine of the uncentered token with all others, scaled to [0, 1] by the
    smallest and largest of the image (1 for all if they are equal). The first token is DivPrune's. A token
    that is nearer to the mean than a millionth of its norm has cosine 0 with all.
    """

    cues = ("projected",)
    per_image = True

    def choose(self, features, cues, tokens):
        products = gram(cues["projected"])
        similarity = _centered(products)
        weight = min_max(-_mean_of_others(to_cosines(products)))
        first = 1 - nearest_other(similarity)
        chosen = spread(similarity, first, tokens, lambda closest: weight * (1 - closest))
        return Kept.from_selected(chosen, 0)

    def flops(self, patches, channels, projected):
        return gram_flops(patches, projected)


def _centered(products: Pairs) -> Pairs:
    """Return cosines of tokens minus their mean m, from dot products: x_i x_j - x_i m - x_j m + m m."""
    with_mean = line_sums(products)
    n = with_mean.shape[1]
    with_mean = with_mean / n
    mean = torch.stack([row.sum() for row in with_mean]) / n if len(with_mean) else with_mean.sum(dim=1)
    least = _AT_MEAN * diagonal(products)
    if isinstance(products, PairLines):
        own = products.of_groups(with_mean[0])
        return to_cosines(
            products.then(
                lambda entries, rows, columns: entries + (mean - (own[rows][:, None] + own[columns]))
            ),
            least,
        )
    centered = products + (mean[:, None, None] - (with_mean[:, :, None] + with_mean[:, None, :]))
    return to_cosines(centered, least)


def _mean_of_others(similarity: Pairs) -> Tensor:
    """Return each token's mean similarity to the other tokens: (B, N, N) -> (B, N)."""
    own = diagonal(similarity)
    return (line_sums(similarity) - own) / max(own.shape[1] - 1, 1)

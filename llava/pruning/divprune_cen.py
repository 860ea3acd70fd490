"""Cen-Prune on DivPrune: diversity of mean-centered tokens, weighted by how unlike the others a token is.

Implemented from its formulas; no official code is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Kept, Pruner
from .greedy import gram, gram_flops, min_max, nearest_other, spread, to_cosines
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


def _centered(products: Tensor) -> Tensor:
    """Return cosines of tokens minus their mean m, from dot products: x_i x_j - x_i m - x_j m + m m."""
    n = products.shape[1]
    with_mean = products.sum(dim=2) / n
    mean = torch.stack([row.sum() for row in with_mean]) / n if len(products) else with_mean.sum(dim=1)
    centered = products + (mean[:, None, None] - (with_mean[:, :, None] + with_mean[:, None, :]))
    return to_cosines(centered, _AT_MEAN * products.diagonal(dim1=1, dim2=2))


def _mean_of_others(similarity: Tensor) -> Tensor:
    """Return each token's mean similarity to the other tokens: (B, N, N) -> (B, N)."""
    own = similarity.diagonal(dim1=1, dim2=2)
    return (similarity.sum(dim=2) - own) / max(similarity.shape[1] - 1, 1)

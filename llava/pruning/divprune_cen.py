"""Cen-Prune on DivPrune: diversity of mean-centered tokens, weighted by how unlike the others a token is.

Implemented from its formulas; no official code is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Kept, Pruner
from .diversity import MIN_SQUARE
from .greedy import cosines, gram_flops, min_max, nearest_other, spread
from .registry import register_pruner


@register_pruner("divprune_cen")
class DivPruneCentered(Pruner):
    """Run DivPrune on tokens minus their mean, with distances times a weight per token.

    The weight is minus the mean cosine of the uncentered token with all others, scaled to [0, 1] by the
    smallest and largest of the image (1 for all if they are equal). The first token is DivPrune's.
    """

    cues = ("projected",)
    per_image = True

    def choose(self, features, cues, tokens):
        x = cues["projected"].to(torch.float64)
        similarity = cosines(x - column_sums(x)[:, None] / x.shape[1])
        weight = min_max(-_mean_cosine(x))
        first = 1 - nearest_other(similarity)
        chosen = spread(similarity, first, tokens, lambda closest: weight * (1 - closest))
        return Kept.from_selected(chosen, 0)

    def flops(self, patches, channels, projected):
        return gram_flops(patches, projected) + 2.0 * patches * projected


def _mean_cosine(x: Tensor) -> Tensor:
    """Return the mean cosine of every token with the others: (B, N, C) float64 -> (B, N).

    The sum of the cosines is one product with the sum of the normalized tokens.
    """
    norm = (x * x).sum(dim=2, keepdim=True).sqrt_()
    unit = (x / norm).masked_fill_(norm * norm < MIN_SQUARE, 0.0)
    own = (unit * unit).sum(dim=2)
    return ((unit * column_sums(unit)[:, None]).sum(dim=2) - own) / max(x.shape[1] - 1, 1)


def column_sums(x: Tensor) -> Tensor:
    """Add the tokens of each row, by itself: (B, N, C) -> (B, C)."""
    return torch.stack([row.sum(dim=0) for row in x]) if len(x) else x.sum(dim=1)

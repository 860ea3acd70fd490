"""CDPruner (NeurIPS 2025): greedy MAP of a determinantal point process, conditioned on the question."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Kept, Pruner, descending
from .diversity import MIN_SQUARE
from .greedy import cosines, diagonal, gram_flops, greedy, line
from .registry import register_pruner

_EXHAUSTED = 1e-12  # share of a token's own L that is left where it depends on the chosen ones


@register_pruner("cdpruner")
class CDPruner(Pruner):
    """Choose greedily the tokens of the largest determinant of L = diag(q) S diag(q).

    S is the cosine of projected tokens, q the relevance to the question, scaled by the row's smallest and
    largest (1 for all if they are equal). Relevance is minus the mean over the question's parts of the cosine
    in CLIP's space. Tokens that depend on the chosen ones have no determinant left: if all do, the tokens of
    the largest relevance fill the budget.
    """

    cues = ("projected", "image_embeds", "text_embeds")
    needs_question = True

    def choose(self, features, cues, tokens):
        similarity = cosines(cues["projected"])
        relevance = _relevance(cues["image_embeds"], cues["text_embeds"])
        least, most = relevance.aminmax(dim=1, keepdim=True)
        quality = ((relevance - least + 1e-6) / (most - least)).masked_fill_(most == least, 1.0)
        volume = quality * quality * diagonal(similarity)  # what is left of each token
        floor = _EXHAUSTED * volume
        fill = -1.0 - descending(relevance).argsort(dim=1).to(volume.dtype)  # below any volume
        factor = volume.new_empty(volume.shape[0], tokens, volume.shape[1])  # Cholesky, line by line
        count = 0

        def score():
            return torch.where(volume > floor, volume, fill)

        def update(last):
            nonlocal count
            kernel = quality * quality.gather(1, last) * line(similarity, last)
            if count:
                before = factor[:, :count]
                own = before.gather(2, last[:, None].expand(-1, count, -1))
                # cumsum adds in the same order in every column, unlike sum and BLAS: equal tokens tie
                kernel = kernel - (before * own).cumsum(dim=1)[:, -1]
            left = volume.gather(1, last)
            step = (kernel / left.sqrt()).masked_fill_(left <= floor.gather(1, last), 0.0)
            factor[:, count] = step
            count += 1
            volume.sub_(step * step)
            return score()

        return Kept.from_selected(greedy(score(), tokens, update, similarity), 0)

    def flops(self, patches, channels, projected):
        budget = patches if self.tokens is None else min(self.tokens, patches)
        return gram_flops(patches, projected) + float(budget * (budget - 1) * patches)


def _relevance(image: Tensor, text: Tensor) -> Tensor:
    """Return minus the mean cosine of every token with the texts: (B, N, E), (M, E) -> (B, N) float64."""
    image, text = image.to(torch.float64), text.to(torch.float64)
    norm = _norm(image)
    total = torch.zeros_like(norm)
    for part in text:
        total -= (image * (part / _norm(part))).sum(dim=2) / norm
    return total / max(len(text), 1)


def _norm(x: Tensor) -> Tensor:
    """Return the norm of the last dimension; infinite for vectors of zero norm, which have cosine 0 then."""
    square = (x * x).sum(dim=-1)
    return square.sqrt().masked_fill_(square < MIN_SQUARE, torch.inf)

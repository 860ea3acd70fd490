"""SCOPE (NeurIPS 2025): tokens that cover all others, weighted by [CLS] attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from . import pairs
from .base import Kept, Pruner, deferring
from .greedy import Pairs, at_least_zero, cosines, gram_flops, greedy, line, power, sum_of_heads
from .pairs import PairLines
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
        weight = power(sum_of_heads(cues.attention), self.alpha)
        return Kept.from_selected(cover(cosines(features), weight, tokens), 0)

    def flops(self, patches, channels, projected):
        budget = patches if self.tokens is None else min(self.tokens, patches)
        return gram_flops(patches, channels) + 2.0 * budget * patches * patches


def cover(gain: Pairs, weight: Tensor, tokens: int) -> Tensor:
    """Choose always the j of the largest w_j * sum over i of max(0, G_ji - c_i); then c = max(c, G_j).

    Args:
        gain: (B, N, N) float64 [j, i], what token j gives to i.
        weight: (B, N) float64, >= 0.
        tokens: At most N.
    Returns:
        (B, tokens) int64, in the order of choice.
    """
    chosen = weight.new_empty(len(weight), tokens, dtype=torch.int64)
    if isinstance(gain, PairLines):
        bound = gain.per_token(lambda lines: lines.clamp_(min=0).sum(dim=1))
        _choose_lazily(gain.lines, gain.place, bound, weight[0], chosen[0])
        return chosen
    if gain.is_cuda or deferring():
        return _choose_densely(gain, weight, tokens)
    every = torch.arange(weight.shape[1])
    for row in range(len(gain)):
        bound = gain[row].clamp(min=0).sum(dim=1)
        _choose_lazily(partial(gain[row].index_select, 0), every, bound, weight[row], chosen[row])
    return chosen


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


def _choose_lazily(
    lines: Callable[[Tensor], Tensor], group: Tensor, gains: Tensor, weight: Tensor, chosen: Tensor
) -> None:
    """Choose the same tokens of one row into `chosen` (tokens,), with few gains per step.

    A gain never grows, rounding included, so an old one bounds the new one: the largest value decides as soon
    as it is a new one. Bookkeeping is in numpy, whose calls take a fraction of the time of torch's.

    Args:
        lines: Returns the lines (m, N) of some groups (m,), a copy.
        group: (N,) int64; tokens of one group have one line.
        gains: (N,) float64, sums of the lines where they are positive.
        weight: (N,) float64.
    """
    covered = torch.zeros_like(weight)
    groups, weights = group.cpu().numpy(), weight.cpu().numpy()
    gain = np.zeros(len(groups))
    gain[groups] = gains.cpu().numpy()
    bound = weights * gain[groups]
    taken = np.zeros(len(groups), dtype=bool)
    size = max(1, pairs.ENTRIES // len(groups))
    for step in range(len(chosen)):
        bound[taken] = -math.inf
        best, old, new, block = int(bound.argmax()), bound.copy(), np.zeros(len(gain), dtype=bool), _BLOCK
        while step and not new[groups[best]]:
            some = np.unique(groups[old.argpartition(-min(block, len(old)))[-block:]])
            block *= _GROWTH
            parts = torch.from_numpy(some).to(weight.device).split(size)
            fresh = torch.cat([lines(part).sub_(covered).clamp_(min=0).sum(dim=1) for part in parts])
            gain[some] = fresh.cpu().numpy().clip(max=gain[some])
            new[some] = True
            members = new[groups]
            bound[members] = weights[members] * gain[groups[members]]
            bound[taken] = -math.inf
            old[members] = -math.inf
            best = int(bound.argmax())
        chosen[step] = best
        taken[best] = True
        torch.maximum(covered, lines(group[best : best + 1])[0], out=covered)

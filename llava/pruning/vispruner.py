"""VisPruner (arXiv:2412.01818, Algorithm 1): the most attended tokens, and the most diverse of the others."""

from __future__ import annotations

import torch

from .base import Kept, Pruner, attention_order
from .diversity import most_diverse
from .greedy import gram_flops
from .kernels import rounds_backend
from .registry import register_pruner


@register_pruner("vispruner")
class VisPruner(Pruner):
    """Keep floor(T * r) tokens by [CLS] attention and T - floor(T * r) by diversity.

    The product is Python's float product, `int(T * r)`, as in the released code: T = 90, r = 0.7 gives 62
    important tokens, since 90 * 0.7 is 62.99...
    """

    uses_ratio = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rounds_backend("cpu")  # refuses an invalid VISPRUNER_ROUNDS here, before a model is loaded

    def choose(self, features, cues, tokens):
        order = attention_order(cues.attention)  # (B, N)
        n_important = int(tokens * self.important_ratio)
        important, residual = order[:, :n_important], order[:, n_important:]
        diverse = most_diverse(features, residual, tokens - n_important)
        return Kept.from_selected(torch.cat([important, diverse], dim=1), n_important)

    def flops(self, patches, channels, projected):
        if self.tokens is None or self.tokens >= patches:
            return 0.0
        important = int(self.tokens * self.important_ratio)
        return gram_flops(patches - important, channels) if important < self.tokens else 0.0

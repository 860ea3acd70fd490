"""FasterVLM: keep the tokens with the highest [CLS] attention. Equal to VisPruner with ratio 1."""

from __future__ import annotations

from .base import Pruner, mean_attention
from .registry import register_pruner


@register_pruner("fastervlm")
class FasterVLM(Pruner):
    """Keep the top T by [CLS] attention, averaged over the heads."""

    scores_attention = True

    def score(self, features, cues):
        return mean_attention(cues.attention)

"""FasterVLM: the tokens that [CLS] attends to most, nothing else. VisPruner with ratio 1."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Kept, Pruner, attention_order
from .registry import register_pruner


@register_pruner("fastervlm")
class FasterVLM(Pruner):
    """Top T by head-mean [CLS] attention; ties go to the lower patch index."""

    def choose(
        self, features: Tensor, attention: Tensor, tokens: int, keys: Sequence[str | int] | None = None
    ) -> Kept:
        return Kept.from_picks(attention_order(attention)[:, :tokens], tokens)

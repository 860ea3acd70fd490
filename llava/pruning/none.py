"""No pruning: every token stays. The upper bound of every table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Kept, Pruner
from .registry import register_pruner


@register_pruner("none")
class NoPruning(Pruner):
    """Keeps all N tokens, whatever `tokens` was asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tokens", None)

    def choose(
        self, features: Tensor, attention: Tensor, tokens: int, keys: Sequence[str | int] | None = None
    ) -> Kept:
        rows, n = features.shape[:2]
        return Kept.from_picks(torch.arange(n, device=features.device).repeat(rows, 1), 0)

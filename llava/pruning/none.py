"""No pruning: every token is kept. The upper bound of every table."""

from __future__ import annotations

import torch

from .base import Pruner
from .registry import register_pruner


@register_pruner("none")
class NoPruning(Pruner):
    """Keep all N tokens, whatever `tokens` is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tokens", None)

    def score(self, features, cues):
        return torch.zeros(features.shape[:2], device=features.device)

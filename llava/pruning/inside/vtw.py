"""VTW (Lin et al., 2024): all visual tokens leave the language model after half of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava.pruning.registry import register_pruner

from .base import DecoderPruner, DecoderState, Reduced, Stage, check_positive


@register_pruner("vtw")
@dataclass(frozen=True)
class VTW(DecoderPruner):
    """Remove all visual tokens before one layer.

    The budget is the mean over the layers: K of D layers with N tokens are N K / D, and K is the greatest
    number of layers within the budget. The published K = 15 of 32 is a mean of 270 of 576 tokens.

    Args:
        layer: Layers that run in full, instead of a budget.
    """

    layer: int | None = None

    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "layer")

    @property
    def has_schedule(self) -> bool:
        """Whether `layer` is set."""
        return self.layer is not None

    def schedule(self, depth: int, visual: int, budget: int) -> Sequence[Stage]:
        """Return the one stage, which keeps nothing."""
        layer = budget * depth // visual if self.layer is None else self.layer
        if layer < 1:
            raise ValueError(
                f"tokens: 'vtw' cannot have a mean of {budget} visual tokens over {depth} layers, because "
                f"one layer with all {visual} is more. Set at least {-(-visual // depth)} of {visual} tokens."
            )
        return [Stage(layer, 0)]

    def reduce(self, stage: Stage, state: DecoderState) -> Reduced:
        """Keep nothing."""
        return Reduced(torch.empty(0, dtype=torch.int64, device=state.visual.device))

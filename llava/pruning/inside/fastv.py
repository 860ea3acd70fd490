"""FastV (Chen et al., 2024): keep what the last prompt token attends to, from the third layer of 32 on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava.pruning.base import scaled_layer
from llava.pruning.registry import register_pruner

from .base import (
    PUBLISHED_DEPTH,
    DecoderPruner,
    DecoderState,
    Reduced,
    Stage,
    check_positive,
    row_flops,
    strongest,
)


@register_pruner("fastv")
@dataclass(frozen=True)
class FastV(DecoderPruner):
    """Keep the `tokens` visual tokens that the prompt's last token attends to most, in one stage.

    The budget is that of the layers from the stage on, as in the paper of VisPruner, and not a mean over all.

    Args:
        layer: Layers that run in full; None is 2 of 32, scaled to the decoder's depth.
    """

    layer: int | None = None

    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "layer")

    def schedule(self, depth: int, visual: int, budget: int) -> Sequence[Stage]:
        """Return the one stage."""
        layer = scaled_layer(2, PUBLISHED_DEPTH, depth) if self.layer is None else self.layer
        return [Stage(layer, budget)]

    def flops(self, patches: int, channels: int, projected: int) -> float:
        """Return FLOPs of one attention row."""
        return sum(row_flops(1, patches, projected) for _ in self.stages(PUBLISHED_DEPTH, patches))

    def reduce(self, stage: Stage, state: DecoderState) -> Reduced:
        """Keep the tokens of the greatest attention in the last full layer."""
        return Reduced(strongest(state.attention()[0], stage.keep))

"""DART (Wen et al., 2025): drop visual tokens that duplicate a few pivots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.pruning.base import descending, scaled_layer
from llava.pruning.registry import register_pruner

from .base import PUBLISHED_DEPTH, DecoderPruner, DecoderState, Reduced, Stage, check_positive

_PIVOTS = 4


@register_pruner("dart")
@dataclass(frozen=True)
class DART(DecoderPruner):
    """Keep the visual tokens of the largest keys, and for every pivot those that are least similar to it.

    The rule follows a re-implementation by a third party. The budget is that of the layers from the stage on;
    what is left of it after the pivots is shared evenly by the pivots.

    Args:
        layer: Layers that run in full; None is 2 of 32, scaled to the decoder's depth.
        pivots_visual, pivots_text: Pivots among the visual tokens and the text after them; None is 4.
    """

    layer: int | None = None
    pivots_visual: int | None = None
    pivots_text: int | None = None

    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "layer", "pivots_visual", "pivots_text")

    def schedule(self, depth: int, visual: int, budget: int) -> Sequence[Stage]:
        """Return the one stage."""
        layer = scaled_layer(2, PUBLISHED_DEPTH, depth) if self.layer is None else self.layer
        return [Stage(layer, budget)]

    def flops(self, patches: int, channels: int, projected: int) -> float:
        """Return FLOPs of the similarities to the pivots."""
        return sum(2.0 * 2 * _PIVOTS * patches * projected for _ in self.stages(PUBLISHED_DEPTH, patches))

    def reduce(self, stage: Stage, state: DecoderState) -> Reduced:
        """Keep the pivots among the visual tokens and what is least similar to all pivots."""
        pivots = [_PIVOTS if one is None else one for one in (self.pivots_visual, self.pivots_text)]
        given = state.keys(), state.normed(), len(state.visual), stage.keep
        return Reduced(duplicates_removed(*given, *pivots, state.start))


def duplicates_removed(
    keys: Tensor,
    states: Tensor,
    visual: int,
    keep: int,
    pivots_visual: int = _PIVOTS,
    pivots_text: int = _PIVOTS,
    start: int = 0,
) -> Tensor:
    """Return the columns of `keep` visual tokens, ascending.

    A token that several pivots would take goes to the first of them. The re-implementation serves them in the
    order in which Python iterates over a set of their places, and so it is done here.

    Args:
        keys: (n + T, W) rotated keys of the visual tokens and the text after them.
        states: (n + T, D) their states.
        visual: n.
        pivots_visual, pivots_text: pivots among the visual tokens and the text.
        start: place of the first visual token in the prompt.
    """
    size = keys.float().abs().sum(1)
    first = descending(size[None, :visual])[0, : min(pivots_visual, keep)]
    second = descending(size[None, visual:])[0, :pivots_text] + visual
    pivots = list(set((torch.cat([first, second]) + start).tolist()))
    unit = torch.nn.functional.normalize(states.float(), dim=1)
    columns = torch.tensor(pivots, device=keys.device) - start
    likeness = unit[columns] @ unit[:visual].T  # (pivots, n)
    used = torch.zeros(visual, dtype=torch.bool, device=keys.device)
    used[first] = True
    share, more = divmod(keep - len(first), len(pivots))
    for number in range(len(pivots)):
        count = share + (number < more)
        order = (-likeness[number]).masked_fill(used, -torch.inf)
        used[descending(order[None])[0, :count]] = True
    return used.nonzero().flatten()

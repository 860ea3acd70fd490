"""What Figures 2c and 3c prune inside the decoder. These are not methods: no table or sweep has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning import Cues, Kept, get_pruner
from llava.pruning.inside import DecoderPruner, DecoderState, Reduced, Stage
from llava.pruning.inside.base import strongest

SOURCES = ("cls", "last", "equi_last", "random")  # of Figure 3c
_BEFORE = {"cls": "fastervlm", "random": "random"}  # methods that choose before the language model


@dataclass(frozen=True)
class KeptQuarter(DecoderPruner):
    """Keep one quarter of the visual tokens, by index, from a layer on.

    Positions are renumbered, so that layer 0 is the prompt with this quarter only; no source says which ones
    the paper used.
    """

    layer: int = 0  # the first one that gets the quarter
    quarter: int = 0

    name: ClassVar[str] = "quarter"
    positions: ClassVar[str] = "contiguous"
    has_schedule: ClassVar[bool] = True  # its stage needs no budget

    def stages(self, depth: int, visual: int, crops: int = 1) -> list[Stage]:
        """Return the one stage; none for layer 0, before which `choose` keeps the quarter."""
        return [] if self.layer == 0 else super().stages(depth, visual, crops)

    def schedule(self, depth: int, visual: int, budget: int) -> Sequence[Stage]:
        return [Stage(self.layer, len(self._columns(visual)))]

    def choose(self, features: Tensor, cues: Cues, tokens: int) -> Kept:
        if self.layer:
            return super().choose(features, cues, tokens)
        if len(features) > 1:
            raise ValueError(f"quarter: layer 0 needs images of one crop, got {len(features)}")
        indices = self._columns(features.shape[1]).to(features.device)[None]
        return Kept(indices, torch.zeros_like(indices, dtype=torch.bool))

    def reduce(self, stage: Stage, state: DecoderState) -> Reduced:
        return Reduced(self._columns(len(state.visual)).to(state.visual.device))

    def _columns(self, visual: int) -> Tensor:
        columns = torch.arange(visual)
        return columns[columns * 4 // visual == self.quarter]


@dataclass(frozen=True)
class KeptByScore(DecoderPruner):
    """Keep the `tokens` best tokens by one score, from a layer on, with the positions they had (as FastV).

    The attention is that of the last full layer. [CLS] attention and random choices are those of the methods
    "fastervlm" and "random".
    """

    source: str = "last"
    layer: int = 1  # layers that run in full

    name: ClassVar[str] = "inside"
    positions: ClassVar[str] = "original"

    def schedule(self, depth: int, visual: int, budget: int) -> Sequence[Stage]:
        return [Stage(self.layer, budget)]

    def choose(self, features: Tensor, cues: Cues, tokens: int) -> Kept:
        """Keep all patches, and mark those that are chosen by what is known of the image."""
        kept = super().choose(features, cues, tokens)
        if (method := _BEFORE.get(self.source)) is None:
            return kept
        chosen = get_pruner(method, self.tokens, seed=self.seed).choose(features, cues, tokens)
        return Kept(kept.indices, kept.important.scatter(1, chosen.indices, True))

    def reduce(self, stage: Stage, state: DecoderState) -> Reduced:
        if self.source in _BEFORE:
            assert state.marked is not None
            return Reduced(state.marked.nonzero().flatten())
        attention = state.attention(level=self.source == "equi_last")
        return Reduced(strongest(attention[0], stage.keep))

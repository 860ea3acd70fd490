"""The base of methods that prune inside the language model: when they act, what they read, what they return.

    @register_pruner("fastv")
    class FastV(DecoderPruner):
        positions = "original"
        def schedule(self, depth, patches, budget):
            return [Stage(scaled_layer(2, 32, depth), budget)]
        def reduce(self, stage, state):
            return Reduced(strongest(state.attention(), stage.keep))

Layers are counted from 0, and `Stage.layer` is the first layer that gets the shortened sequence, which is
also the number of layers that run in full. Numbers published for 32 layers are scaled by `scaled_layer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.pruning.base import Cues, Kept, Pruner, descending

PUBLISHED_DEPTH = 32  # layers of the decoders that the methods were published for
WORDS = 40  # text tokens after the image with which the cost of a method is counted


@dataclass(frozen=True)
class Stage:
    """One reduction of the visual block."""

    layer: int  # the first layer that gets the reduced sequence
    keep: int  # visual tokens that stay
    new: int = 0  # tokens made of the removed ones, which follow those that stay

    @property
    def visual(self) -> int:
        """Visual tokens that enter the layers from here on."""
        return self.keep + self.new


@dataclass(frozen=True)
class Reduced:
    """The visual block after a stage."""

    kept: Tensor  # (K,) int64, ascending: columns of the block before
    new: Tensor | None = None  # (C, D) states of the new tokens


class DecoderState(ABC):
    """What a method can read at a stage about one prompt, which is text, visual block, text.

    n is the number of visual tokens that are left, T the number of text tokens after them.
    """

    prepared: Tensor | None  # what `DecoderPruner.prepare` returned for this prompt
    visual: Tensor  # (n, D) states after the last layer, before the next one
    text: Tensor  # (T, D) the same of the text after the image
    marked: (
        Tensor | None
    )  # (N,) bool, tokens that `DecoderPruner.choose` marked as important; None if unknown
    start: int  # place of the first visual token in the prompt

    @abstractmethod
    def attention(self, rows: Tensor | None = None, ahead: bool = False, level: bool = False) -> Tensor:
        """Return attention to the visual block, (R, n) float32, mean over query heads.

        Args:
            rows: (R,) int64, which tokens of the text after the image look; None is the prompt's last token.
            ahead: False for the attention of the last layer; True for the one that the next layer would
                compute without a reduction.
            level: True with every visual key at the position of the query, for the last layer and token.
        """

    @abstractmethod
    def keys(self) -> Tensor:
        """Return the rotated keys of the last layer, (n + T, W), heads side by side."""

    @abstractmethod
    def normed(self) -> Tensor:
        """Return `visual` and `text` after the decoder's final norm, (n + T, D)."""


@dataclass(frozen=True)
class DecoderPruner(Pruner):
    """A method that prunes inside the language model. `tokens` is the budget per crop.

    Before the language model it keeps all tokens, or none for a budget of 0. All crops of an image are one
    visual block, whose budget is tokens x crops.
    """

    acts_in: ClassVar[str] = "decoder"
    # "original": a token keeps the position it had; "contiguous": every layer counts the tokens that it sees
    positions: ClassVar[str] = "contiguous"

    @property
    def is_adaptive(self) -> bool:
        """True: the number of tokens that enter the language model is not the budget."""
        return True

    @property
    def has_schedule(self) -> bool:
        """Whether options of the method set its stages, so that no budget is needed."""
        return False

    def config(self) -> dict[str, object]:
        """Return the settings that affect the result, ready for JSON; options only where they are set."""
        return {key: one for key, one in super().config().items() if one is not None or key == "tokens"}

    def choose(self, features: Tensor, cues: Cues, tokens: int) -> Kept:
        """Keep all patches."""
        indices = torch.arange(features.shape[1], device=features.device).repeat(len(features), 1)
        return Kept(indices, torch.zeros_like(indices, dtype=torch.bool))

    def stages(self, depth: int, visual: int, crops: int = 1) -> list[Stage]:
        """Return the reductions of a visual block, by ascending layer; none if the budget covers the block.

        Args:
            depth: layers of the decoder.
            visual: visual tokens that enter it.
            crops: crops of the image, for the budget.

        Raises:
            ValueError: the budget cannot be met, or a layer does not exist.
        """
        budget = visual if self.tokens is None else min(self.tokens * crops, visual)
        if visual == 0 or budget == 0 or (budget == visual and not self.has_schedule):
            return []
        found = self.schedule(depth, visual, budget)
        last = {stage.layer: stage for stage in found}  # stages that fall on one layer: the last one counts
        inside = [stage for _, stage in sorted(last.items()) if stage.layer < depth]
        if not inside or inside[0].layer < 1:
            raise ValueError(
                f"{self.name}: it would act before layer {found[0].layer} of {depth}. A method inside the "
                f"language model acts before one of the layers 1 to {depth - 1} (from 0). Choose another "
                "layer, or a method that prunes before the language model."
            )
        stages, live = [], visual
        for stage in inside:
            if stage.new or stage.keep < live:  # others change nothing
                stages.append(stage)
                live = stage.visual
        return stages

    def visual_per_layer(self, depth: int, visual: int, crops: int = 1) -> list[int]:
        """Return the visual tokens that enter each layer, without running it; arguments as of `stages`."""
        counts = [0 if self.tokens == 0 else visual] * depth
        for stage in self.stages(depth, visual, crops):
            counts[stage.layer :] = [stage.visual] * (depth - stage.layer)
        return counts

    def schedule(self, depth: int, visual: int, budget: int) -> Sequence[Stage]:
        """Return the reductions of `visual` tokens for a budget in total (1 <= budget <= visual)."""
        raise TypeError(f"{type(self).__name__} must define schedule")

    def prepare(self, visual: Tensor, text: Tensor) -> Tensor | None:
        """Return what is decided once per prompt, from the input embeddings of image (N, D) and text (T, D).

        The text is that after the image. `DecoderState.prepared` has the result at every stage.
        """
        return None

    def reduce(self, stage: Stage, state: DecoderState) -> Reduced:
        """Return the visual block after a stage: `stage.keep` tokens and `stage.new` new ones."""
        raise TypeError(f"{type(self).__name__} must define reduce")


def strongest(score: Tensor, keep: int) -> Tensor:
    """Return the columns of the `keep` greatest scores (n,), ascending; ties go to the lower column."""
    return descending(score[None])[0, :keep].sort().values


def row_flops(rows: int, visual: int, width: int) -> float:
    """Return FLOPs of `rows` attention rows over a visual block: queries, and products with cached keys."""
    return 2.0 * rows * (width**2 + visual * width)


def check_positive(pruner: DecoderPruner, *names: str) -> None:
    """Raise `ValueError` for an option that is neither None nor an integer of at least 1."""
    for name in names:
        value = getattr(pruner, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: {value!r} is not an integer >= 1. Pass one, or leave it out.")


def integers(name: str, value: Iterable[int] | None) -> tuple[int, ...] | None:
    """Return an option that is a list of integers as a tuple.

    Raises:
        ValueError: it is something else, or empty.
    """
    if value is None:
        return None
    found = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if not found or any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in found):
        raise ValueError(f"{name}: {value!r} is not a list of integers >= 0. Pass one per stage.")
    return found

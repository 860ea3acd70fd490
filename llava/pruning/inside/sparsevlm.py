"""SparseVLM (Zhang et al., 2024), version 1.5: text rates the visual tokens, removed ones are recycled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.pruning.base import descending, scaled_layer
from llava.pruning.registry import register_pruner

from .base import (
    PUBLISHED_DEPTH,
    WORDS,
    DecoderPruner,
    DecoderState,
    Reduced,
    Stage,
    integers,
    row_flops,
    strongest,
)

_AFTER = (2, 6, 15)  # layers of 32 after which it acts
_PRESETS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
_PRESET_TOKENS = 576  # visual tokens that the presets were published for


@register_pruner("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(DecoderPruner):
    """Keep the tokens that the relevant words attend to, and merge the best of the removed ones.

    Budgets 192, 128, 96 and 64 of 576 are the published schedules after layers 2, 6 and 15 of 32; their means
    over all layers are 206, 145, 114 and 82 tokens, recycled ones included. For other budgets, and other
    numbers of tokens, there is one stage after layer 2 of 32, with kept and recycled tokens equal to the
    budget. Layers are scaled to the decoder's depth.

    Args:
        layers: The layers after which it acts, instead of a budget.
        counts: Tokens that stay at each of `layers`, before recycled ones.
    """

    layers: Sequence[int] | None = None
    counts: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "counts"):
            object.__setattr__(self, name, integers(name, getattr(self, name)))
        if (self.layers is None) != (self.counts is None) or len(self.layers or ()) != len(self.counts or ()):
            raise ValueError(f"counts: got {self.counts} for layers {self.layers}. Pass one per layer.")

    @property
    def has_schedule(self) -> bool:
        """Whether `layers` and `counts` are set."""
        return self.layers is not None

    def schedule(self, depth: int, visual: int, budget: int) -> Sequence[Stage]:
        """Return the stages, with their recycled tokens."""
        if self.layers is not None and self.counts is not None:
            layers, keep = [after + 1 for after in self.layers], self.counts
        else:
            layers = [scaled_layer(after + 1, PUBLISHED_DEPTH, depth) for after in _AFTER]
            preset = _PRESETS.get(budget) if visual == _PRESET_TOKENS else None
            keep = preset if preset is not None else (single_stage(visual, budget),)
        last = dict(zip(layers, keep, strict=False))  # of stages on one layer, the last
        stages, live = [], visual
        for layer, wanted in sorted(last.items()):
            kept = min(wanted, live - 1)
            stages.append(Stage(layer, kept, recycled(live - kept)[1]))
            live = stages[-1].visual
        return stages

    def flops(self, patches: int, channels: int, projected: int) -> float:
        """Return FLOPs of choosing raters, of attention rows (half of the words rate), and of recycling."""
        stages, live = self.stages(PUBLISHED_DEPTH, patches), patches
        total = 2.0 * patches * WORDS * projected if stages else 0.0
        for stage in stages:
            candidates = recycled(live - stage.keep)[0]
            total += row_flops(WORDS // 2, live, projected) + 2.0 * candidates**2 * projected
            live = stage.visual
        return total

    def prepare(self, visual: Tensor, text: Tensor) -> Tensor | None:
        """Return the raters."""
        return raters(visual, text)

    def reduce(self, stage: Stage, state: DecoderState) -> Reduced:
        """Keep the tokens that the raters attend to most; recycle the best of the others."""
        score = state.attention(state.prepared).mean(0)
        kept = strongest(score, stage.keep)
        order = descending(score[None])[0, stage.keep :]
        candidates, centers = recycled(len(order))
        return Reduced(kept, merge(state.visual[order[:candidates]], centers))


def raters(visual: Tensor, text: Tensor) -> Tensor | None:
    """Return the text tokens (R,) that are more relevant to the image than the mean; None if there are none.

    Relevance is the mean over visual tokens (N, D) of their softmax over the text tokens (T, D). If all are
    equally relevant, as a single word is, the prompt's last token rates (None).
    """
    relevance = (visual.float() @ text.float().T).softmax(1).mean(0)
    found = (relevance > relevance.mean()).nonzero().flatten()
    return found if len(found) else None


def recycled(removed: int) -> tuple[int, int]:
    """Return how many of the removed tokens are recycled, and into how many new ones."""
    candidates = int(0.3 * removed) + 1
    return candidates, candidates // 10 + 1


def single_stage(visual: int, budget: int) -> int:
    """Return how many tokens may stay so that, with the recycled ones, they are the budget.

    Raises:
        ValueError: one token that stays and the recycled ones are more than the budget.
    """
    for keep in range(min(budget, visual - 1), 0, -1):
        if keep + recycled(visual - keep)[1] <= budget:
            return keep
    least = 1 + recycled(visual - 1)[1]
    raise ValueError(
        f"tokens: 'sparsevlm' cannot have a budget of {budget} of {visual} visual tokens, because it "
        f"recycles removed ones into {least - 1}. Set at least {least} in total."
    )


def merge(states: Tensor, centers: int) -> Tensor:
    """Cluster states (m, D), in the order of falling scores, by density peaks; return a mean of each cluster.

    The means (centers, D) divide by the number of members + 1e-6. Equal densities go by the order of scores.
    """
    wide = states.float()
    m = len(wide)
    distance = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[1] ** 0.5
    nearest = distance.topk(min(centers, m), dim=1, largest=False).values
    density = (-(nearest**2).mean(1)).exp()
    density = density + 1e-6 * torch.arange(m, 0, -1, device=density.device, dtype=density.dtype) / m
    denser = density[None, :] > density[:, None]
    delta = distance.masked_fill(~denser, torch.inf).amin(1)
    delta = torch.where(denser.any(1), delta, distance.max())
    chosen = descending((density * delta)[None])[0, :centers]
    member = distance[:, chosen].argmin(1)
    member[chosen] = torch.arange(len(chosen), device=member.device)
    sums = wide.new_zeros(len(chosen), states.shape[1]).index_add_(0, member, wide)
    counts = torch.bincount(member, minlength=len(chosen))
    return (sums / (counts[:, None] + 1e-6)).to(states.dtype)

"""PyramidDrop (Xing et al., 2024): drop a share of the visual tokens at several depths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llava.pruning.base import scaled_layer
from llava.pruning.registry import register_pruner

from .base import PUBLISHED_DEPTH, DecoderPruner, DecoderState, Reduced, Stage, integers, row_flops, strongest

_LAYERS = (2, 8, 16)  # its author's advice for budgets other than the published one


@register_pruner("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(DecoderPruner):
    """Keep a share of the original visual tokens before each of several layers.

    The share is p, p^2, p^3 of the tokens from layers 2, 8, 16 of 32 on, with the p that makes the mean over
    all layers the budget; layers are scaled to the decoder's depth. A decoder so shallow that its full layers
    alone exceed the budget uses the p of 32 layers, and its mean is greater than the budget. A budget that
    the two full layers of 32 exceed cannot be had.

    Args:
        layers: The layers before which it acts, instead of a budget.
        ratios: Share of the original tokens from each of `layers` on.
    """

    layers: Sequence[int] | None = None
    ratios: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", integers("layers", self.layers))
        if self.ratios is not None:
            given = tuple(self.ratios) if isinstance(self.ratios, Iterable) else ()
            if not given or not all(isinstance(one, int | float) and 0 <= one <= 1 for one in given):
                raise ValueError(
                    f"ratios: {self.ratios!r} is not a list of shares in [0, 1]. Pass one per layer."
                )
            object.__setattr__(self, "ratios", given)
        if (self.layers is None) != (self.ratios is None) or len(self.layers or ()) != len(self.ratios or ()):
            raise ValueError(f"ratios: got {self.ratios} for layers {self.layers}. Pass one ratio per layer.")

    @property
    def has_schedule(self) -> bool:
        """Whether `layers` and `ratios` are set."""
        return self.layers is not None

    def schedule(self, depth: int, visual: int, budget: int) -> Sequence[Stage]:
        """Return a stage per layer."""
        if self.layers is not None and self.ratios is not None:
            return [Stage(*pair) for pair in zip(self.layers, _shares(visual, self.ratios), strict=True)]
        layers = [scaled_layer(layer, PUBLISHED_DEPTH, depth) for layer in _LAYERS]
        share = budget / visual
        if (p := solve(layers, depth, share)) is None and (
            p := solve(_LAYERS, PUBLISHED_DEPTH, share)
        ) is None:
            raise ValueError(
                f"tokens: 'pyramiddrop' cannot have a mean of {budget} of {visual} visual tokens, because "
                f"its first {_LAYERS[0]} of {PUBLISHED_DEPTH} layers have all of them. Set at least "
                f"{visual * _LAYERS[0] // PUBLISHED_DEPTH + 1} of {visual}."
            )
        return [Stage(*pair) for pair in zip(layers, _shares(visual, [p, p**2, p**3]), strict=True)]

    def flops(self, patches: int, channels: int, projected: int) -> float:
        """Return FLOPs of one attention row per stage, for which the layer's keys are computed twice."""
        total, live = 0.0, patches
        for stage in self.stages(PUBLISHED_DEPTH, patches):
            total += row_flops(1, live, projected) + 2.0 * live * projected**2
            live = stage.visual
        return total

    def reduce(self, stage: Stage, state: DecoderState) -> Reduced:
        """Keep what the prompt's last token would attend to in the next layer, run without a reduction."""
        return Reduced(strongest(state.attention(ahead=True)[0], stage.keep))


def solve(layers: Sequence[int], depth: int, share: float) -> float | None:
    """Return p in (0, 1) for which the mean share of tokens over `depth` layers is `share`, by bisection.

    Layers before the first of `layers` have all tokens; after the i-th it is p^i. None if there is no such p.
    """

    def mean(p: float) -> float:
        steps = [0, *layers, depth]
        return (
            sum((end - start) * p**i for i, (start, end) in enumerate(zip(steps, steps[1:], strict=False)))
            / depth
        )

    low, high = 0.0, 1.0
    if not mean(low) < share < mean(high):
        return None
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < share else (low, middle)
    return low


def _shares(visual: int, ratios: Sequence[float]) -> list[int]:
    return [int(visual * ratio) for ratio in ratios]

"""What a pruning method costs on one image and prompt: FLOPs by part, its own selection and cues included.

    cost = method_cost(get_pruner("divprune", tokens=64), language, vision, text_tokens=60)
    cost.visual_per_layer, cost.entering_mean, cost.flops()

Counted as in `flops.py`, 2 FLOPs per multiply-accumulate. The cost of a cue is what the method adds to the
unpruned model, whether or not code could share it with the ordinary run.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava.model.flops import (
    LanguageShape,
    VisionShape,
    cls_row_macs,
    llm_prefill_macs,
    projector_macs,
    vision_layer_macs,
    vision_tower_macs,
)
from llava.pruning import Pruner
from llava.pruning.tome import schedule

# CLIP ViT-L's text encoder on a question of 20 tokens, for methods that compare patches with the question
_TEXT_LAYERS, _TEXT_WIDTH, _QUESTION = 12, 768, 20


@dataclass(frozen=True)
class MethodCost:
    """FLOPs of one image and prompt up to the first answer token, by part."""

    visual_per_layer: tuple[int, ...]  # visual tokens that enter each layer of the language model
    vision_tower: float
    cues: float  # what the method reads besides features and [CLS] attention
    selection: float
    projector: float
    language_model: float

    @property
    def entering_mean(self) -> float:
        """Visual tokens that enter a layer of the language model, mean over its layers."""
        return sum(self.visual_per_layer) / len(self.visual_per_layer)

    @property
    def total(self) -> float:
        """FLOPs of all parts."""
        return self.vision_tower + self.cues + self.selection + self.projector + self.language_model

    def flops(self) -> dict[str, float]:
        """Return FLOPs by part, and their total."""
        parts = ("vision_tower", "cues", "selection", "projector", "language_model", "total")
        return {part: float(getattr(self, part)) for part in parts}


def method_cost(
    pruner: Pruner,
    language: LanguageShape,
    vision: VisionShape,
    text_tokens: int,
    crops: int = 1,
    projector_type: str = "mlp2x_gelu",
    select_layer: int = -2,
) -> MethodCost:
    """Compute the cost of a method on one image, without newlines, and its prompt.

    Args:
        text_tokens: Text tokens in the prompt.
        crops: Crops of the image.

    Raises:
        ValueError: The method cannot meet its budget on this model.
    """
    patches = vision.patches
    kept = patches if pruner.tokens is None else min(pruner.tokens, patches)
    inside = pruner.acts_in == "decoder"
    entering = crops * (patches if inside else kept)
    if inside:
        visual = pruner.visual_per_layer(language.layers, entering, crops)
    else:
        visual = [entering] * language.layers
    prunes = kept < patches or pruner.is_adaptive
    cues = pruner.cues if prunes else ()
    tower = vision_tower_macs(vision, select_layer)
    if any(cue.startswith("merged") for cue in cues):
        tower = _merging_tower_macs(vision, select_layer, kept)
    rows, row_patches = (1, crops * patches) if pruner.per_image else (crops, patches)
    selection = rows * pruner.flops(row_patches, vision.width, language.width) if prunes else 0.0
    reads_attention = prunes and not inside
    projected = crops * patches if "projected" in cues else entering  # all patches, once
    return MethodCost(
        visual_per_layer=tuple(visual),
        vision_tower=2.0 * crops * tower,
        cues=2.0
        * crops
        * (sum(_cue_macs(cue, vision) for cue in cues) + reads_attention * cls_row_macs(vision)),
        selection=float(selection),
        projector=2.0 * projector_macs(projected, vision.width, language.width, projector_type),
        language_model=2.0 * llm_prefill_macs([n + text_tokens for n in visual], language),
    )


def _cue_macs(cue: str, vision: VisionShape) -> int:
    """Count MACs of one cue of a crop; that of the projector is counted with the projector."""
    kind = cue.partition("@")[0]
    tokens, width = vision.patches + 1, vision.width
    return {
        "received": 2 * tokens * width**2 + tokens**2 * width,  # queries, keys, and their products
        "attention": tokens * width**2 + tokens * width,
        "keys": tokens * width**2,
        "last_query": width**2,
        "last_keys": tokens * width**2,
        "image_embeds": vision.patches * width * _TEXT_WIDTH,
        "text_embeds": _TEXT_LAYERS * _QUESTION * 12 * _TEXT_WIDTH**2,
    }.get(kind, 0)


def _merging_tower_macs(vision: VisionShape, select_layer: int, tokens: int) -> int:
    """Count MACs of a tower that merges its patches to `tokens` between attention and MLP of its layers."""
    layers = select_layer if select_layer >= 0 else vision.layers + 1 + select_layer
    size = vision.patches + 1
    total = vision_tower_macs(vision, 0)  # patch embedding
    for merged in schedule(vision.patches, tokens, layers):
        pairs = (size // 2) * (size - size // 2) * vision.width // 16 if merged else 0  # keys of one head
        attention, mlp = vision_layer_macs(vision, size), vision_layer_macs(vision, size - merged)
        total += attention[0] + pairs + mlp[1]
        size -= merged
    return total

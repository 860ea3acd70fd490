"""LLaVA-1.5 and VipLlava (`llava-hf/llava-1.5-7b-hf`): one row of N patches per image.

CLIP towers give [CLS] attention of the layer whose features are used; SigLIP towers, which have no [CLS], the
attention that each patch receives. Similarity is computed on the projector's input. With the strategy "full",
[CLS] has a placeholder of its own, which goes when the image is pruned. Pixtral towers are refused.
"""

from __future__ import annotations

from torch import nn

from llava.integrations.cue import TowerParts

from .base import Host, HostRows, Seen, encoder_parts, feature_layer, plain_rows


class LlavaHost(Host):
    classes = ("LlavaForConditionalGeneration", "VipLlavaForConditionalGeneration")

    def towers(self, base: nn.Module) -> dict[str, TowerParts]:
        where = type(base.config).__name__
        return {"image": encoder_parts(base.vision_tower, feature_layer(base.config), where)}

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        return plain_rows(seen)

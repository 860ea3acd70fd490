"""Video-LLaVA (`LanguageBind/Video-LLaVA-7B-hf`): two towers, a row per image and per frame.

Each frame of a video has a placeholder for [CLS] in front of its patches. It stays while its frame is whole
and goes when the frame is pruned: a budget of 256 tokens per frame drops [CLS], one of 257 drops nothing.
"""

from __future__ import annotations

from torch import nn

from llava.integrations.cue import TowerParts

from .base import ALL_CUES, Host, HostRows, Seen, encoder_parts, feature_layer, plain_rows


class VideoLlavaHost(Host):
    classes = ("VideoLlavaForConditionalGeneration",)
    modalities = {"image": "image_token_id", "video": "video_token_id"}
    cues = {"image": ALL_CUES, "video": ALL_CUES}
    merges = {"image": True, "video": True}

    def towers(self, base: nn.Module) -> dict[str, TowerParts]:
        layer, where = feature_layer(base.config), type(base.config).__name__
        return {
            "image": encoder_parts(base.image_tower, layer, where),
            "video": encoder_parts(base.video_tower, layer, where),
        }

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        is_video = seen.modality == "video"
        return plain_rows(seen, frames=seen.arguments["pixel_values_videos"].shape[1] if is_video else None)

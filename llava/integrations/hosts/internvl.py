"""InternVL (`OpenGVLab/InternVL3-1B-hf` and later): a row per tile, or per frame of a video.

2 x 2 patches become one token before the projector (pixel shuffle): its score is the mean of their [CLS]
attention. Videos are passed as images, a tile per frame, so their budget is per frame.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from llava.integrations.cue import TowerParts

from .base import POOLED_CUES, Host, HostRows, Seen, encoder_parts, feature_layer, plain_rows


class InternVLHost(Host):
    classes = ("InternVLForConditionalGeneration",)
    cues = {"image": POOLED_CUES}

    def towers(self, base: nn.Module) -> dict[str, TowerParts]:
        where = type(base.config).__name__
        return {"image": encoder_parts(base.vision_tower, feature_layer(base.config), where)}

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        return plain_rows(seen, partial(_shuffled, base))


def _shuffled(base: nn.Module, cue: Tensor) -> Tensor:
    """Average the patches of each token: (..., N) -> (..., N / 4)."""
    side = round(cue.shape[-1] ** 0.5)
    maps = cue.reshape(-1, side, side, 1)
    merged = base.pixel_shuffle(maps, scale_factor=base.config.downsample_ratio).mean(-1)
    return merged.reshape(*cue.shape[:-1], -1)

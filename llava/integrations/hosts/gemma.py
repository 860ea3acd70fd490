"""PaliGemma and Gemma3: a row of N tokens per image, with a SigLIP tower.

`generate` of these classes takes ids, not embeddings, because attention within an image is in both
directions: the shortened prompt is passed as ids with fewer placeholders, and the features that fill them as
outputs of the encoder. A patch's score is the attention that it receives in the tower's last layer; Gemma3
averages squares of patches to one token, and so are their scores. Similarity is computed on the projector's
output.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from llava.integrations.cue import TowerParts

from .base import (
    POOLED_CUES,
    Host,
    HostRows,
    PrunedFeatures,
    Seen,
    UnsupportedRelease,
    encoder_parts,
    plain_rows,
)


class PaliGemmaHost(Host):
    classes = ("PaliGemmaForConditionalGeneration",)
    cues = {"image": POOLED_CUES}
    needs_ids = True
    takes_embeds = False

    def towers(self, base: nn.Module) -> dict[str, TowerParts]:
        if "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
            raise UnsupportedRelease(
                f"model: {type(base).__name__} of transformers {transformers.__version__} does not take "
                "features in place of pixels, so it cannot be pruned. Install transformers 5.23 or later."
            )
        return {"image": encoder_parts(base.vision_tower, -1, type(base.config).__name__)}

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        seen.features = seen.projected
        side = round(seen.projected.shape[1] ** 0.5)
        return plain_rows(seen, lambda cue: _pooled(cue, side))

    def project(self, base: nn.Module, features: Tensor) -> Tensor:
        return features

    def feed(self, short: Any, generating: bool) -> dict[str, Any]:
        features = short.embeds[short.visual["image"].to(short.embeds.device)]
        encoded = PrunedFeatures(pooler_output=features[None])
        return {"input_ids": short.ids, "mm_encoder_outputs": {"image": encoded}}


class Gemma3Host(PaliGemmaHost):
    classes = ("Gemma3ForConditionalGeneration",)


def _pooled(cue: Tensor, side: int) -> Tensor:
    """Average squares of patches to side x side tokens: (..., N) -> (..., side ** 2)."""
    patches = round(cue.shape[-1] ** 0.5)
    maps = cue.reshape(-1, 1, patches, patches)
    return torch.nn.functional.avg_pool2d(maps, patches // side).reshape(*cue.shape[:-1], -1)

"""Idefics3 and SmolVLM: a row per tile of an image.

The tower has no [CLS]: a patch's score is the attention that it receives in the last layer. The connector
puts neighboring patches into one token (pixel shuffle), whose score is the mean of theirs; similarity is
computed on its output. The language model is the attribute `text_model`.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from llava.integrations.cue import TowerParts

from .base import POOLED_CUES, Host, HostRows, Seen, encoder_parts, plain_rows


class Idefics3Host(Host):
    classes = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
    language_model = "text_model"
    projector = "connector"
    cues = {"image": POOLED_CUES}

    def towers(self, base: nn.Module) -> dict[str, TowerParts]:
        return {"image": encoder_parts(base.vision_model, -1, type(base.config).__name__)}

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        seen.features = seen.projected
        return plain_rows(seen, partial(_shuffled, base.connector))

    def project(self, base: nn.Module, features: Tensor) -> Tensor:
        return features


def _shuffled(connector: nn.Module, cue: Tensor) -> Tensor:
    """Average the patches of each token: (..., N) -> (..., N / scale_factor ** 2)."""
    maps = cue.reshape(-1, cue.shape[-1], 1)
    return connector.pixel_shuffle(maps, connector.scale_factor).mean(-1).reshape(*cue.shape[:-1], -1)

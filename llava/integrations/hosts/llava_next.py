"""LLaVA-NeXT and LLaVA-NeXT-Video: a row per crop or frame; newlines between rows of the grid always stay.

The crops of an image are stitched to a grid, whose padding is cut off, so a crop's patches are spread over
the placeholders, and some have none. The model's own packing, run on indices, gives their places. Frames of a
video are pooled (2 x 2) before the projector, and so are their scores; they have no newlines.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.cue import TowerParts

from .base import (
    ALL_CUES,
    POOLED_CUES,
    Host,
    HostRow,
    HostRows,
    Seen,
    encoder_parts,
    feature_layer,
    plain_rows,
)


class LlavaNextHost(Host):
    classes = ("LlavaNextForConditionalGeneration",)
    watched = ("pack_image_features",)
    merges = {"image": False}

    def towers(self, base: nn.Module) -> dict[str, TowerParts]:
        parts = encoder_parts(base.vision_tower, feature_layer(base.config), type(base.config).__name__)
        return dict.fromkeys(self.modalities, parts)

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        plain = plain_rows(seen)
        arguments, pack = seen.calls["pack_image_features"][0]
        packed = repack(pack, arguments, indices_like(arguments["image_features"]), -1.0)
        return crop_rows(plain.rows, torch.cat(packed)[:, 0])


class LlavaNextVideoHost(LlavaNextHost):
    classes = ("LlavaNextVideoForConditionalGeneration",)
    modalities = {"image": "image_token_id", "video": "video_token_id"}
    cues = {"image": ALL_CUES, "video": POOLED_CUES}
    merges = {"image": False, "video": True}

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        if seen.modality == "image":
            return super().rows(base, seen)
        frames = seen.arguments["pixel_values_videos"].shape[1]
        return plain_rows(seen, partial(_pooled, base), frames=frames)


def indices_like(features: list[Tensor]) -> list[Tensor]:
    """Number the patches of all crops: (crops, N, 1) float64 per image."""
    found, start = [], 0
    for one in features:
        count = one.shape[0] * one.shape[1]
        found.append(torch.arange(start, start + count, dtype=torch.float64).view(*one.shape[:2], 1))
        start += count
    return found


def repack(pack: Any, arguments: dict[str, Any], features: list[Tensor], newline: float) -> list[Tensor]:
    """Run the model's packing on other features, with a constant newline: (L, C) per image."""
    values = {**arguments, "image_features": features}
    values["image_newline"] = torch.full(features[0].shape[-1:], newline, dtype=features[0].dtype)
    return pack(**values)[0]


def crop_rows(crops: list[HostRow], packed: Tensor) -> HostRows:
    """Give crops their placeholders.

    Args:
        packed: (M,) float64, the number of the patch at each placeholder, negative for others.
    """
    places = torch.full((sum(len(row.places) for row in crops),), -1, dtype=torch.int64)
    patch = packed >= 0
    places[packed[patch].long()] = patch.nonzero()[:, 0]
    start = 0
    for row in crops:
        count = len(row.places)
        row.places = places[start : start + count]
        start += count
    return HostRows(len(packed), crops)


def _pooled(base: nn.Module, cue: Tensor) -> Tensor:
    """Pool scores as the model pools features: (..., N) -> (..., n)."""
    pooler, maps = base.vision_resampler, cue.reshape(len(cue), -1, cue.shape[-1])
    if isinstance(pooler.pool, nn.Conv2d):  # mixes channels, which scores do not have
        side, stride = round(cue.shape[-1] ** 0.5), pooler.pool.stride
        found = nn.functional.avg_pool2d(maps.unflatten(-1, (side, side)), stride).flatten(2)
    else:
        found = pooler(maps.transpose(1, 2)).transpose(1, 2)
    return found.reshape(*cue.shape[:-1], -1)

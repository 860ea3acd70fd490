"""Build the vision tower of a checkpoint: the right class for its config.json, without weights yet."""

from __future__ import annotations

import torch

from llava.model.checkpoint.entries import UNUSED
from llava.model.checkpoint.tower import TowerSource
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.transformers_compat import build_config


def build_vision_tower(
    source: TowerSource,
    select_layer: int = -2,
    select_feature: str = "patch",
    attn_implementation: str = "sdpa",
) -> VisionTower:
    """Build an empty tower of the right class on the meta device: it has shapes and no memory.

    Raises:
        ValueError: the architecture is not supported, or `select_feature` is not "patch".
    """
    from llava.model.image_processor import load_image_processor

    if select_feature != "patch":
        raise ValueError(
            f"config.json: mm_vision_select_feature is {select_feature!r}, but only 'patch' is supported: "
            "patches are ranked by [CLS], which is not itself a visual token. Set it to 'patch'."
        )
    config = _tower_config(source.config)
    processor = load_image_processor(source.processor)
    crop = processor.crop_size
    crop = crop["height"] if hasattr(crop, "keys") else getattr(crop, "height", crop)  # dict, SizeDict, int
    with torch.device("meta"):
        return _classes()[config.model_type].build(
            config, processor, select_layer, int(crop) if crop else None, attn_implementation
        )


def _classes() -> dict[str, type]:
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.model.multimodal_encoder.dinov2_encoder import Dinov2VisionTower

    return {"clip_vision_model": CLIPVisionTower, "dinov2": Dinov2VisionTower}


def _tower_config(config: dict) -> object:
    from transformers import CLIPVisionConfig, Dinov2Config

    kind = config.get("model_type")
    if kind == "clip":  # a whole CLIP, as on the Hub
        config, kind = config.get("vision_config") or {}, "clip_vision_model"
    classes = {"clip_vision_model": CLIPVisionConfig, "dinov2": Dinov2Config}
    if kind not in classes:
        raise ValueError(
            f"vision tower: model_type {kind!r} is not supported. Choose CLIP (clip, clip_vision_model) or "
            "DINOv2 without register tokens (dinov2)."
        )
    fields = {k: v for k, v in config.items() if k not in UNUSED}
    return build_config(classes[kind], fields, "config.json of the vision tower")

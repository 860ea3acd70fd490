"""Build the vision tower of a checkpoint: the right class for its config.json, without weights yet."""

from __future__ import annotations

import functools
from typing import Any

import torch

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.entries import UNUSED
from llava.model.checkpoint.placement import main_device
from llava.model.checkpoint.read import Assigner, listing
from llava.model.checkpoint.tower import (
    IMAGE_KIND,
    VIDEO_KIND,
    TowerSource,
    fill_tower,
    find_tower,
    tower_weights,
)
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.transformers_compat import build_config


def build_vision_tower(
    source: TowerSource | Any,
    select_layer: int = -2,
    select_feature: str = "patch",
    attn_implementation: str = "sdpa",
    delay_load: bool = False,
) -> VisionTower:
    """Build an empty tower of the right class on the meta device: it has shapes and no memory.

    Called as in LLaVA, with a model's config or training arguments in place of a `TowerSource`, the tower
    also gets its weights: now, or with `delay_load` when its `load_model` is called.

    Args:
        source: where the tower comes from; or an object that names it in `mm_vision_tower` or `vision_tower`,
            and its layer in `mm_vision_select_layer`.

    Raises:
        FileNotFoundError: there is no such tower.
        ValueError: the architecture is not supported, or `select_feature` is not "patch".
    """
    from llava.model.image_processor import LanguageBindProcessor, load_image_processor

    if not isinstance(source, TowerSource):
        return _build_named(source, attn_implementation, delay_load)
    if select_feature != "patch":
        raise ValueError(
            f"config.json: mm_vision_select_feature is {select_feature!r}, but only 'patch' is supported: "
            "patches are ranked by [CLS], which is not itself a visual token. Set it to 'patch'."
        )
    try:
        config, kind = _tower_config(source.config), source.config.get("model_type")
        binds = kind in (IMAGE_KIND, VIDEO_KIND)
        processor = LanguageBindProcessor(source.side) if binds else load_image_processor(source.processor)
        crop = processor.crop_size
        crop = crop["height"] if hasattr(crop, "keys") else getattr(crop, "height", crop)  # dict, SizeDict
        with torch.device("meta"):
            tower = _classes()[kind if kind == VIDEO_KIND else config.model_type].build(
                config, processor, select_layer, int(crop) if crop else None, attn_implementation
            )
    except ValueError as error:
        where = "" if source.folder is None else f"{source.folder}: "
        raise CheckpointError(f"{where}{error}") from error
    tower.read_weights, tower.folder = functools.partial(tower_weights, source), source.folder
    return tower


def _build_named(args: Any, attn_implementation: str, delay_load: bool) -> VisionTower:
    name = getattr(args, "mm_vision_tower", None) or getattr(args, "vision_tower", None)
    if not name:
        raise ValueError("vision_tower is not set. Set it to the name or the folder of a vision tower.")
    source = find_tower(name, None)
    tower = build_vision_tower(
        source,
        getattr(args, "mm_vision_select_layer", -2),
        getattr(args, "mm_vision_select_feature", None) or "patch",
        attn_implementation,
    )
    tower.is_loaded, tower._load = False, functools.partial(_fill, source, str(name))
    if not delay_load:
        tower.load_model()
    return tower


def _fill(source: TowerSource, name: str, tower: VisionTower, device_map: object) -> None:
    device = main_device("cpu" if device_map is None else device_map, None)
    assigner = Assigner(tower.vision_tower, lambda _: (torch.float32, device))
    fill_tower(tower, source, assigner.assign)
    wrong = {"unexpected": list(assigner.unexpected), "missing": assigner.missing()}
    for what, keys in wrong.items():
        if keys:
            raise CheckpointError(
                f"vision tower {name}: {len(keys)} {what} keys. Weights and config.json do not match; "
                f"use one checkpoint's files.\n{listing(keys)}"
            )
    tower.restore_buffers()


def _classes() -> dict[str, type]:
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.model.multimodal_encoder.dinov2_encoder import Dinov2VisionTower
    from llava.model.multimodal_encoder.video_encoder import VideoTower

    return {"clip_vision_model": CLIPVisionTower, "dinov2": Dinov2VisionTower, VIDEO_KIND: VideoTower}


def _tower_config(config: dict) -> object:
    from transformers import CLIPVisionConfig, Dinov2Config

    kind = config.get("model_type")
    if kind in ("clip", IMAGE_KIND, VIDEO_KIND):  # a whole CLIP, as on the Hub
        config, kind = config.get("vision_config") or {}, "clip_vision_model"
    classes = {"clip_vision_model": CLIPVisionConfig, "dinov2": Dinov2Config}
    if kind not in classes:
        raise ValueError(
            f"vision tower: model_type {kind!r} is not supported. Choose CLIP (clip, clip_vision_model), "
            "LanguageBind or DINOv2 without register tokens (dinov2)."
        )
    fields = {k: v for k, v in config.items() if k not in UNUSED}
    return build_config(classes[kind], fields, "config.json of the vision tower")

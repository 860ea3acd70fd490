"""From the name in `mm_vision_tower` to a tower: the right class, empty or with its own weights."""

from __future__ import annotations

from pathlib import Path

import torch

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.tower import TowerSource, fill_tower, find_tower
from llava.model.multimodal_encoder.base import VisionTower


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


def load_vision_tower(
    name: str | Path,
    select_layer: int = -2,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
) -> VisionTower:
    """Load a tower without a language model, for training, analysis and tests.

    Raises:
        FileNotFoundError, ValueError: as `find_tower` and `build_vision_tower`.
        CheckpointError: weights are missing or unexpected; the message lists them.
    """
    from llava.model.checkpoint.read import Assigner, listing

    source = find_tower(str(name), checkpoint)
    tower = build_vision_tower(source, select_layer, attn_implementation=attn_implementation)
    assigner = Assigner(tower.vision_tower, lambda _: (dtype, torch.device(device)))
    fill_tower(tower, source, assigner.assign)
    for problem, names in (("missing", assigner.missing()), ("unexpected", assigner.unexpected)):
        if names:
            raise CheckpointError(
                f"{source.folder}: {len(names)} {problem} keys in the vision tower. Weights and config.json "
                f"do not match; use one tower's files.\n{listing(names)}"
            )
    tower.restore_buffers()
    return tower.eval()


def _classes() -> dict[str, type]:
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.model.multimodal_encoder.dinov2_encoder import Dinov2VisionTower

    return {"clip_vision_model": CLIPVisionTower, "dinov2": Dinov2VisionTower}


def _tower_config(config: dict) -> object:
    from transformers import CLIPVisionConfig, Dinov2Config

    kind = config.get("model_type")
    if kind == "clip":  # a whole CLIP, as on the Hub
        config, kind = config.get("vision_config", {}), "clip_vision_model"
    classes = {"clip_vision_model": CLIPVisionConfig, "dinov2": Dinov2Config}
    if kind not in classes:
        raise ValueError(
            f"vision tower: model_type {kind!r} is not supported. Choose CLIP (clip, clip_vision_model) or "
            "DINOv2 without register tokens (dinov2)."
        )
    fields = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
    return classes[kind].from_dict(fields)

"""From the name in `mm_vision_tower` to an empty tower, and the tower's own weights into it.

Building and filling are two steps because some checkpoints hold their own tower weights, which then win.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llava.model.checkpoint.find import resolve_tower
from llava.model.multimodal_encoder.base import VisionTower

# Towers that LLaVA checkpoints name: where the weights lie inside, no hub is needed to know the shape.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        "projection_dim": 768, "hidden_act": "quick_gelu",
    },
    "openai/clip-vit-large-patch14": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
        "projection_dim": 768, "hidden_act": "quick_gelu",
    },
}  # fmt: skip


@dataclass(frozen=True)
class TowerSource:
    """What a tower is made from: its configuration, where its weights lie, how its images are prepared."""

    config: dict
    folder: Path | None  # None: the weights must be inside the checkpoint
    processor: object  # for llava.model.image_processor.load_image_processor: a folder or a dict
    why_no_folder: str = ""


def find_tower(name: str, checkpoint: Path | None) -> TowerSource:
    """Find the tower `name`. Raises `FileNotFoundError` listing where it was looked for."""
    try:
        folder = resolve_tower(name, checkpoint)
    except FileNotFoundError as error:
        if name in KNOWN_TOWERS:
            config = KNOWN_TOWERS[name]
            return TowerSource(config, None, clip_processor(config["image_size"]), str(error))
        raise
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (folder / "preprocessor_config.json").is_file():
        processor: object = folder
    else:
        vision = config.get("vision_config") or config
        processor = clip_processor(vision.get("image_size", 224))
    return TowerSource(config, folder, processor)


def clip_processor(side: int) -> dict:
    """The preprocessor_config.json of OpenAI's CLIP for square crops of `side` pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip


def build_vision_tower(
    source: TowerSource,
    select_layer: int = -2,
    select_feature: str = "patch",
    attn_implementation: str = "sdpa",
) -> VisionTower:
    """An empty tower of the right class, on the meta device: it has shapes and no memory.

    Raises `ValueError` for an architecture that is not supported and for `select_feature` other than "patch".
    """
    from llava.model.image_processor import load_image_processor

    if select_feature != "patch":
        raise ValueError(
            f"mm_vision_select_feature={select_feature!r} is not supported, only 'patch': [CLS] is what "
            "patches are ranked by, it is not itself a visual token"
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
    if kind == "clip":  # a whole CLIP, as on the hub
        config, kind = config.get("vision_config", {}), "clip_vision_model"
    classes = {"clip_vision_model": CLIPVisionConfig, "dinov2": Dinov2Config}
    if kind not in classes:
        raise ValueError(
            f"vision towers of model_type {kind!r} are not supported; supported: CLIP (clip, "
            "clip_vision_model) and DINOv2 without register tokens (dinov2)"
        )
    fields = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
    return classes[kind].from_dict(fields)


class TowerKeys:
    """Translates the keys of a tower's weight file to the parameter names of the tower that was built."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower
        # releases of transformers name the modules differently, files too: compare canonical spellings
        self.table = {tower.canonical(n): n for n, _ in tower.vision_tower.named_parameters()}

    def translate(self, key: str) -> str | None:
        """Name below `vision_tower.`, or None for a key that this tower does not use.

        Unused on purpose: layers behind the select layer, final norms, buffers, CLIP's text half. A key that
        means nothing comes back as it is, for the caller to report.
        """
        name = self.tower.canonical(key)
        if name is None:
            return None
        layer = self.tower.layer_of(name)
        if layer is not None and len(self.tower.layers()) <= layer < self.tower.config.num_hidden_layers:
            return None
        return self.table.get(name, key)


def fill_tower(tower: VisionTower, source: TowerSource, assign: Callable[[str, Tensor, str], None]) -> None:
    """Read the tower folder's weights: `assign(name below vision_tower, tensor, origin)` for each."""
    from llava.model.checkpoint.read import CheckpointError, read_folder

    if source.folder is None:
        raise CheckpointError(
            "the checkpoint holds no vision tower weights, and the tower cannot be found: "
            f"{source.why_no_folder}"
        )
    keys = TowerKeys(tower)
    for key, tensor, path in read_folder(source.folder):
        name = keys.translate(key)
        if name is not None:
            assign(name, tensor, f"{path}: {key}")


def load_vision_tower(
    name: str | Path,
    select_layer: int = -2,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
) -> VisionTower:
    """A tower alone, ready to run: for training, analysis and tests.

    Raises as `find_tower` and `build_vision_tower`, and `CheckpointError` for missing or unexpected keys.
    """
    from llava.model.checkpoint.read import Assigner, CheckpointError, listing

    source = find_tower(str(name), checkpoint)
    tower = build_vision_tower(source, select_layer, attn_implementation=attn_implementation)
    assigner = Assigner(tower.vision_tower, lambda _: (dtype, torch.device(device)))
    fill_tower(tower, source, assigner.assign)
    for problem, names in (("missing", assigner.missing()), ("unexpected", assigner.unexpected)):
        if names:
            raise CheckpointError(f"{source.folder}: {problem} keys in the vision tower:\n{listing(names)}")
    tower.restore_buffers()
    return tower.eval()

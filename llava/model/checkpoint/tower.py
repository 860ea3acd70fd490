"""A checkpoint's vision tower: where it comes from, how its files' keys are named, its own weights.

Building the tower and filling it are two steps, because a checkpoint that contains tower weights overrides
the tower's own folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.find import resolve_tower

if TYPE_CHECKING:
    from torch import Tensor

    from llava.model.multimodal_encoder.base import VisionTower

# Towers that LLaVA checkpoints name: a checkpoint that contains their weights loads without the Hub.
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
    """What a tower is made from: its configuration, the folder of its weights, its image processor."""

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
    """Return the preprocessor_config.json of OpenAI's CLIP for square crops of `side` pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip


class TowerKeys:
    """Translates the keys of a tower's weight file to the parameter names of the tower that was built."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower
        # Releases of transformers name the modules differently, and so do files: compare canonical names.
        self.table = {tower.canonical(n): n for n, _ in tower.vision_tower.named_parameters()}

    def translate(self, key: str) -> str | None:
        """Return the name below `vision_tower.`, or None for a key that this tower does not use.

        Unused keys are layers after the select layer, final norms, buffers and CLIP's text encoder. An
        unknown key is returned unchanged, for the caller to report.
        """
        name = self.tower.canonical(key)
        if name is None:
            return None
        layer = self.tower.layer_of(name)
        if layer is not None and len(self.tower.layers()) <= layer < self.tower.config.num_hidden_layers:
            return None
        return self.table.get(name, key)


def fill_tower(tower: VisionTower, source: TowerSource, assign: Callable[[str, Tensor, str], None]) -> None:
    """Read the tower folder's weights: call `assign(name below vision_tower, tensor, origin)` for each."""
    from llava.model.checkpoint.read import read_folder

    if source.folder is None:
        raise CheckpointError(
            f"the checkpoint contains no vision tower weights, and the tower was not found: "
            f"{source.why_no_folder}"
        )
    keys = TowerKeys(tower)
    for key, tensor, path in read_folder(source.folder):
        name = keys.translate(key)
        if name is not None:
            assign(name, tensor, f"{path}: {key}")

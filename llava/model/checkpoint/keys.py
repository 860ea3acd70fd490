"""Names of weights in checkpoint files, translated to the names in our classes. Strings only.

Five layouts: LLaVA's own (`model.layers`, `model.mm_projector.0`, `model.vision_tower.vision_tower.*`), the
same below `base_model.model.` or `model.` (LoRA runs), and transformers' LLaVA as saved before release 5
(`language_model.model.*`, `vision_tower.vision_model.*`) and by it (`model.language_model.*`,
`model.vision_tower.*`); and Video-LLaVA's, with `model.image_tower.image_tower.*` and
`model.video_tower.video_tower.*`.
"""

from __future__ import annotations

import re

# They mark a key of the tower for images and of that for clips, followed by the key in the tower's own file.
TOWER, VIDEO_TOWER = "tower:", "video tower:"
HOLDERS = {TOWER: "vision_tower", VIDEO_TOWER: "video_tower"}  # attributes of the decoder

_LANGUAGE = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)")
_PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.linear_([1-9])\.(weight|bias)")
_ABOVE = re.compile(r"^(?:base_model\.)?(?:model\.(?=model\.|lm_head\.)){0,2}")
_TOWER = re.compile(r"(?:model\.)?(?:(?:vision_tower|image_tower)\.)+(.+)")
_VIDEO_TOWER = re.compile(r"(?:model\.)?video_tower\.(?:(?:vision|video)_tower\.)*(.+)")


def translate(key: str) -> str | None:
    """Return the name in our model, `TOWER` or `VIDEO_TOWER` + key for a tower, None for a constant."""
    key = _ABOVE.sub("", key)
    if key.endswith("rotary_emb.inv_freq"):
        return None  # a constant that old releases saved
    if match := _TOWER.fullmatch(key):
        return TOWER + match.group(1)
    if match := _VIDEO_TOWER.fullmatch(key):
        return VIDEO_TOWER + match.group(1)
    if match := _PROJECTOR.fullmatch(key):
        return f"model.mm_projector.{2 * (int(match.group(1)) - 1)}.{match.group(2)}"
    if match := _LANGUAGE.fullmatch(key):
        name = match.group(1)
        return name if name.startswith("lm_head.") else f"model.{name}"
    return f"model.{key}" if key == "image_newline" or key.startswith("mm_projector.") else key

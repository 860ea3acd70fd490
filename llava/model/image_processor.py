"""The image processor of a vision tower: PIL, so that pixels equal those of the released models bit for bit.

transformers also has torchvision processors; their values differ by up to 0.015, and torchvision is not
needed by anything else here.

Not known here: padding and tiles, which come before (`llava.mm_utils.process_images`), and towers.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

_NAME = "preprocessor_config.json"
_CLASSES = {"clip": "CLIPImageProcessor", "bit": "BitImageProcessor"}
# What the processors take; a config also holds a class name and other entries that are not theirs.
_SETTINGS = (
    "do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean "
    "image_std do_convert_rgb"
).split()


def load_image_processor(
    folder_or_config: "str | Path | dict[str, Any]", image_size: int | None = None
) -> "BaseImageProcessor":
    """The processor of a tower folder (CLIP, or DINOv2's Bit), from its `preprocessor_config.json`.

    `.preprocess(image, return_tensors="pt")["pixel_values"]` is (1, 3, H, W) float32: shortest edge resized
    to `size` (bicubic), centre crop to `crop_size`, mean and deviation of the config. `.image_mean` and
    `.crop_size["height"]` are what padding and tiling need.

    Args:
        folder_or_config: a tower's folder, its preprocessor_config.json, or that file's content.
        image_size: the tower's side in pixels; replaces the config's sizes (DINOv2's own file says 256
            and 224, whatever the tower runs at).

    Raises:
        FileNotFoundError: the folder has no preprocessor_config.json.
        ValueError: the file cannot be read, or is for another kind of processor.
    """
    if isinstance(folder_or_config, dict):
        config, source = folder_or_config, "The image processor's config"
    else:
        path = Path(folder_or_config)
        path = path / _NAME if path.is_dir() or path.suffix != ".json" else path
        config, source = _read(path), str(path)
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIP")
    name = next((name for key, name in _CLASSES.items() if kind.lower().startswith(key)), None)
    if name is None:
        raise ValueError(f"{source} is for {kind}; only CLIP and Bit (DINOv2) processors are supported.")
    settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
    # Old files say 336; the square of a crop and the shortest edge of a resize are what they mean.
    if isinstance(settings.get("size"), int):
        settings["size"] = {"shortest_edge": settings["size"]}
    if isinstance(settings.get("crop_size"), int):
        settings["crop_size"] = {"height": settings["crop_size"], "width": settings["crop_size"]}
    if image_size is not None:
        settings["size"] = {"shortest_edge": int(image_size)}
        settings["crop_size"] = {"height": int(image_size), "width": int(image_size)}
    return _class(name)(**settings)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy it from the vision tower's checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(config).__name__}: fetch it again.")
    return config


def _class(name: str) -> Any:
    """The PIL class; before transformers 5.3 or so, the class without suffix is it."""
    import transformers

    return getattr(transformers, name + "Pil", None) or getattr(transformers, name)

"""The image processor of a vision tower: PIL, so that pixels equal those of the released models bit for bit.

transformers also has torchvision processors; their values differ by up to 0.015, and nothing else here needs
torchvision. Padding and tiling come before, in `llava.mm_utils.process_images`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.model.checkpoint.entries import check_processor, read_object
from llava.model.checkpoint.tower import read_processor

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

_NAME = "preprocessor_config.json"
_CLASSES = {"clip": "CLIPImageProcessor", "bit": "BitImageProcessor"}
# Arguments of the processors; a config also has a class name and other entries.
_SETTINGS = (
    "do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean "
    "image_std do_convert_rgb"
).split()


def load_image_processor(
    folder_or_config: "str | Path | dict[str, Any]", image_size: int | None = None
) -> "BaseImageProcessor":
    """Load the processor of a tower folder (CLIP, or DINOv2's Bit) from its `preprocessor_config.json`.

    `.preprocess(image, return_tensors="pt")["pixel_values"]` is (1, 3, H, W) float32: shortest edge resized
    to `size` (bicubic), center crop to `crop_size`, mean and deviation of the config. Padding and tiling use
    `.image_mean` and `.crop_size["height"]`.

    Args:
        folder_or_config: a tower's folder, its preprocessor_config.json, or that file's content.
        image_size: the tower's side in pixels; replaces the config's sizes (DINOv2's own file has 256
            and 224, whatever the tower's size).

    Raises:
        FileNotFoundError: the folder has no preprocessor_config.json.
        ValueError: the file cannot be read or is for another processor, or an entry has a wrong type.
    """
    if isinstance(folder_or_config, dict):
        config, source = folder_or_config, _NAME
        check_processor(config, source)
    elif (path := Path(folder_or_config)).suffix == ".json" and not path.is_dir():
        config, source = read_object(path), str(path)
        check_processor(config, source)
    else:
        config, source = read_processor(path), str(path / _NAME)
        if config is None:
            raise FileNotFoundError(f"{source}: no such file. Copy it from the vision tower's checkpoint.")
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIP")
    name = next((name for key, name in _CLASSES.items() if kind.lower().startswith(key)), None)
    if name is None:
        raise ValueError(f"{source}: {kind} is not supported. Choose a CLIP or Bit (DINOv2) processor.")
    settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
    # Old files have numbers: the side of a square crop, and the shortest edge of a resized image.
    if isinstance(settings.get("size"), int):
        settings["size"] = {"shortest_edge": settings["size"]}
    if isinstance(settings.get("crop_size"), int):
        settings["crop_size"] = {"height": settings["crop_size"], "width": settings["crop_size"]}
    if image_size is not None:
        settings["size"] = {"shortest_edge": int(image_size)}
        settings["crop_size"] = {"height": int(image_size), "width": int(image_size)}
    return _class(name)(**settings)


def _class(name: str) -> Any:
    """Return the PIL class; before about transformers 5.3 it has no suffix."""
    import transformers

    return getattr(transformers, name + "Pil", None) or getattr(transformers, name)

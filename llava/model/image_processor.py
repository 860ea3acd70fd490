"""The image processor of a vision tower: PIL, so that pixels equal those of the released models bit for bit.

transformers also has torchvision processors; their values differ by up to 0.015, and nothing else here needs
torchvision. Padding and tiling come before, in `llava.mm_utils.process_images`.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava.image_files import to_rgb
from llava.model.checkpoint.entries import check_processor, read_object
from llava.model.checkpoint.tower import read_processor

if TYPE_CHECKING:
    import torch
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


class _RowsFirst:
    """Resizing in the classical order of passes (`mm_utils.classical_resize`) under every Pillow.

    For clients that call the processor themselves; `mm_utils.process_images` resizes before.
    """

    def resize(self, image: Any, size: Any, resample: Any = None, **options: Any) -> Any:
        """Resize an array to `size`, a dict or SizeDict; other dtypes than uint8 in transformers' own way."""
        from transformers.image_utils import get_image_size, infer_channel_dimension_format

        layout = options.get("input_data_format") or infer_channel_dimension_format(image)
        height, width = get_image_size(image, layout)
        edge, target = dict(size).get("shortest_edge"), dict(size)
        resize = functools.partial(super().resize, resample=resample, **options)
        if image.dtype != np.uint8 or target.get("longest_edge") or not (edge or target.get("width")):
            return resize(image, size)
        new_height, new_width = target.get("height"), target.get("width")
        if edge:
            longer = int(edge * max(width, height) / min(width, height))
            new_height, new_width = (longer, edge) if width <= height else (edge, longer)
        rows = resize(image, type(size)(height=height, width=new_width))
        return resize(rows, type(size)(height=new_height, width=new_width))

    def __reduce__(self) -> tuple:
        """Pickle by the name of the class, which is built on demand."""
        return _empty, (type(self).__name__.removesuffix("Pil"),), self.__dict__


@functools.cache
def _class(name: str) -> Any:
    """Return the PIL class, with classical resizing; before about transformers 5.3 it has no suffix."""
    import transformers

    parent = getattr(transformers, name + "Pil", None) or getattr(transformers, name)
    return type(parent.__name__, (_RowsFirst, parent), {"__module__": __name__})


def _empty(name: str) -> Any:
    kind = _class(name)
    return kind.__new__(kind)


class LanguageBindProcessor:
    """Pixels of LanguageBind's towers, for pictures and clips: fixed rules, which no file can change.

    Both are resized without antialiasing, so that their short side is `side`, and cut to its center.
    """

    image_mean = [0.48145466, 0.4578275, 0.40821073]
    image_std = [0.26862954, 0.26130258, 0.27577711]

    def __init__(self, side: int) -> None:
        self.crop_size = {"height": side, "width": side}

    def preprocess(self, images: Any, return_tensors: str = "pt", **_: Any) -> dict[str, Any]:
        """Convert one picture or several of equal size: {"pixel_values": (n, 3, S, S) float32}.

        Resized in float from 0 to 1, bicubic; values may leave this range. Then normalized.
        """
        images = images if isinstance(images, list | tuple) else [images]
        pixels = self._tensor(images) / 255  # (n, 3, H, W)
        height, width = pixels.shape[2:]
        edge, short = self.crop_size["height"], min(height, width)
        size = [edge if side == short else int(edge * side / short) for side in (height, width)]
        return {"pixel_values": self._normalize(self._crop(pixels, size, "bicubic"))}

    def preprocess_clip(self, frames: Sequence[Image.Image]) -> "torch.Tensor":
        """Convert the frames of a clip: (3, F, S, S) float32.

        Normalized first, then resized, bilinear.

        Raises:
            ValueError: no frames, or frames of different sizes.
        """
        pixels = self._normalize(self._tensor(frames) / 255)  # (F, 3, H, W)
        height, width = pixels.shape[2:]
        edge, short = self.crop_size["height"], min(height, width)
        size = [edge if side == short else int(side / short * edge) for side in (height, width)]
        return self._crop(pixels, size, "bilinear").transpose(0, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, as processors of transformers do."""
        return {"image_processor_type": type(self).__name__, "crop_size": self.crop_size}

    @staticmethod
    def _tensor(images: Sequence[Image.Image]) -> "torch.Tensor":
        """(n, 3, H, W) float32, from 0 to 255"""
        import torch

        sizes = sorted({image.size for image in images})
        if len(sizes) != 1:
            found = f"sizes {sizes}" if sizes else "none"
            raise ValueError(f"images: expected one size, got {found}. Pass the frames of one video.")
        pixels = np.stack([np.asarray(to_rgb(image)) for image in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()

    def _normalize(self, pixels: "torch.Tensor") -> "torch.Tensor":
        mean, std = (pixels.new_tensor(one)[:, None, None] for one in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    def _crop(self, pixels: "torch.Tensor", size: list[int], mode: str) -> "torch.Tensor":
        """Resize to `size` (height, width) and cut the center; a half is rounded to even."""
        from torch.nn import functional

        pixels = functional.interpolate(pixels, size=size, mode=mode, align_corners=False)
        edge = self.crop_size["height"]
        top, left = (round((side - edge) / 2) for side in size)
        return pixels[:, :, top : top + edge, left : left + edge]

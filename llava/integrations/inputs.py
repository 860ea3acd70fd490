"""Model inputs of texts, images and videos for host models, also without the processor of transformers.

    processor = load_processor("Qwen/Qwen2.5-VL-7B-Instruct")
    inputs = host_inputs(processor, text, images=[image])
    model.generate(**inputs)

Processors with videos need torchvision. Without it, `load_processor` returns `HostParts`, and `host_inputs`
does what the processor would: image processors that use Pillow, placeholders repeated in the text as often as
the model has features, and frames of videos by PyAV. Ids, grids and masks are those of the processor; pixels
of resized videos differ by rounding, because torchvision resizes tensors and Pillow resizes images.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.utils import is_torchvision_available
from transformers.utils.hub import cached_file

from llava.video_files import read_frames

Video = str | Path | Sequence[Image.Image]

_CLIP_FRAMES = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
}
# What the video processor of a class does where a checkpoint has no file for it
_VIDEO_DEFAULTS: dict[str, dict[str, Any]] = {
    "llava_next_video": _CLIP_FRAMES,
    "video_llava": _CLIP_FRAMES,
    "llava_onevision": {"size": {"height": 384, "width": 384}, "do_center_crop": False},
    "internvl": {},
    "qwen2_vl": {"size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}},
    "qwen2_5_vl": {"size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}},
    "qwen3_vl": {
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
}
_TIMED = ("qwen2_5_vl", "qwen3_vl")  # whose prompts or positions depend on the time between frames
_VIDEO_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class HostParts:
    """What a processor consists of, where transformers cannot build one.

    Attributes:
        config: Configuration of the model.
        tokenizer: Its tokenizer.
        image_processor: Its image processor, of those that use Pillow.
        video: Entries of its video processor that differ from the defaults of the class: size, crop_size,
            do_center_crop, resample, image_mean, image_std.
    """

    config: Any
    tokenizer: Any
    image_processor: Any
    video: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.config.model_type not in _PLACED:
            raise ValueError(
                f"model_type: no inputs for {self.config.model_type!r} without its processor. Choose from "
                f"{', '.join(_PLACED)}, or install the torchvision that belongs to your torch."
            )


def load_processor(path: str) -> Any:
    """Load the processor of a checkpoint, or its `HostParts` where the processor needs torchvision.

    Args:
        path: Folder or name of a checkpoint in the format of transformers.
    """
    config = transformers.AutoConfig.from_pretrained(path)
    if config.model_type not in _VIDEO_DEFAULTS or is_torchvision_available():
        return transformers.AutoProcessor.from_pretrained(path)
    return HostParts(
        config,
        transformers.AutoTokenizer.from_pretrained(path),
        transformers.AutoImageProcessor.from_pretrained(path),
        _video_settings(path),
    )


def _video_settings(path: str) -> dict[str, Any]:
    """Read the entries of a checkpoint's video processor, as transformers looks for them."""
    entries: dict[str, Any] = {}
    for name in _VIDEO_FILES:
        try:
            file = cached_file(path, name)
        except OSError:
            continue  # not every checkpoint has each of them
        try:
            entries = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not valid JSON ({error}). Download the file again.") from error
        break
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if entries.get(old) is not None:
            entries["size"] = {**entries.get("size", {}), new: entries[old]}
    names = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std")
    return {name: entries[name] for name in names if entries.get(name) is not None}


def host_inputs(
    processor: Any,
    text: str | Sequence[str],
    images: Sequence[Image.Image] = (),
    videos: Sequence[Video] = (),
    *,
    frames: int = 8,
    fps: float | None = None,
    padding_side: str = "left",
) -> dict[str, Tensor]:
    """Make the inputs of a host model.

    Args:
        processor: A processor of transformers, or `HostParts`.
        text: Prompts with one placeholder per image or video, as the chat template of the checkpoint makes.
        images: All images, in the order of their placeholders.
        videos: All videos, in the order of their placeholders: files, or lists of frames.
        frames: Frames to read of each file, spread evenly.
        fps: How many of the frames given to the model are from one second; needed for videos of Qwen2.5-VL
            and Qwen3-VL.
        padding_side: left to generate, right to train.
    Returns:
        Arguments of the model's `forward` and `generate`, as tensors.
    Raises:
        ValueError: for another number of images or videos than placeholders, naming both, and for arguments
            of another kind.
    """
    rows = [text] if isinstance(text, str) else list(text)
    if not rows:
        raise ValueError("text: no prompts. Pass one per row.")
    for name, given in (("images", images), ("videos", videos)):
        if isinstance(given, str | Path | Image.Image):
            raise ValueError(
                f"{name}: got {given!r}, expected a list. Pass [{name[:-1]}], even if it is one."
            )
    if fps is not None and not (isinstance(fps, int | float) and 0 < fps < math.inf):
        raise ValueError(f"fps: expected a number above 0, got {fps!r}. Pass the frames per second.")
    kind = processor.config.model_type if isinstance(processor, HostParts) else _kind_of(processor)
    tokens = _placeholders(processor)
    counts = {}
    for name, given in (("image", images), ("video", videos)):
        counts[name] = [row.count(tokens[name]) if tokens[name] else 0 for row in rows]
        if sum(counts[name]) != len(given):
            raise ValueError(
                f"{name}s: {len(given)} given, but the text has {sum(counts[name])} placeholders "
                f"{tokens[name]!r}. Pass one {name} per placeholder, in order."
            )
    if videos and fps is None and kind in _TIMED:
        raise ValueError(
            f"fps: not given, but {kind} uses the time between frames. Pass the number of frames per second."
        )
    clips = [read_frames(clip, frames) if isinstance(clip, (str, Path)) else list(clip) for clip in videos]
    if any(not clip for clip in clips):
        raise ValueError("videos: a video without frames. Pass at least one frame of each.")
    grouped = _by_row(list(images), counts["image"])
    if isinstance(processor, HostParts):
        return _inputs_of_parts(processor, rows, grouped, clips, fps, padding_side)
    return _inputs_of_processor(processor, rows, grouped, clips, fps, padding_side)


def _kind_of(processor: Any) -> str:
    """Return the model type that a processor of transformers belongs to: the folder of its module."""
    return type(processor).__module__.split(".")[-2]


def _placeholders(processor: Any) -> dict[str, str | None]:
    """Return the strings that stand for an image and for a video in a text."""
    if not isinstance(processor, HostParts):
        return {name: getattr(processor, f"{name}_token", None) for name in ("image", "video")}
    config, tokenizer = processor.config, processor.tokenizer
    if config.model_type == "internvl":
        return {
            "image": tokenizer.convert_ids_to_tokens(config.image_token_id),
            "video": getattr(tokenizer, "video_token", "<video>"),
        }
    ids = {name: getattr(config, f"{name}_token_id", None) for name in ("image", "video")}
    return {k: None if i is None else tokenizer.convert_ids_to_tokens(i) for k, i in ids.items()}


def _by_row(items: list[Any], counts: list[int]) -> list[list[Any]]:
    following = iter(items)
    return [[next(following) for _ in range(count)] for count in counts]


def _inputs_of_processor(
    processor: Any,
    rows: list[str],
    images: list[list[Image.Image]],
    clips: list[list[Image.Image]],
    fps: float | None,
    padding_side: str,
) -> dict[str, Tensor]:
    arguments: dict[str, Any] = {}
    grouped = [row for row in images if row]
    if grouped:
        arguments["images"] = grouped
    if clips:
        arguments["videos"] = [
            np.stack([np.asarray(frame.convert("RGB")) for frame in clip]) for clip in clips
        ]
        arguments["videos_kwargs"] = {
            "do_sample_frames": False,
            "video_metadata": [
                {"total_num_frames": len(clip), "fps": fps, "frames_indices": list(range(len(clip)))}
                for clip in clips
            ],
        }
    encoded = processor(
        text=rows,
        **arguments,
        text_kwargs={"padding": True, "padding_side": padding_side, "return_tensors": "pt"},
        common_kwargs={"return_tensors": "pt"},
    )
    return {name: torch.as_tensor(value) for name, value in encoded.items() if name != "video_metadata"}


def _inputs_of_parts(
    parts: HostParts,
    rows: list[str],
    images: list[list[Image.Image]],
    clips: list[list[Image.Image]],
    fps: float | None,
    padding_side: str,
) -> dict[str, Tensor]:
    tokens = _placeholders(parts)
    inputs, texts = _PLACED[parts.config.model_type](parts, images, clips, fps)
    expanded = [_expand(row, tokens, texts) for row in rows]
    # The mask and ids only: segments of a text are no input of these models
    encoded = parts.tokenizer(expanded, padding=True, padding_side=padding_side, return_tensors="pt")
    ids = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    if parts.config.model_type.startswith("qwen") and takes_argument(parts.config, "mm_token_type_ids"):
        config = parts.config
        ids["mm_token_type_ids"] = (ids["input_ids"] == config.image_token_id).int() + 2 * (
            ids["input_ids"] == config.video_token_id
        ).int()
    if parts.config.model_type == "internvl":  # tiles of images and frames in the order of the text
        order = [kind for row in rows for kind in _order(row, tokens)]
        tiles = {kind: iter(inputs.pop(kind, [])) for kind in ("image", "video")}
        inputs["pixel_values"] = torch.cat([next(tiles[kind]) for kind in order]) if order else None
    return {**ids, **{name: value for name, value in inputs.items() if value is not None}}


def _order(row: str, tokens: dict[str, str | None]) -> list[str]:
    """Return the kinds of the placeholders of a text, in order."""
    found = []
    for kind, token in tokens.items():
        start = row.find(token) if token else -1
        while start >= 0:
            found.append((start, kind))
            start = row.find(token, start + len(token))
    return [kind for _, kind in sorted(found)]


def _expand(row: str, tokens: dict[str, str | None], texts: dict[str, Any]) -> str:
    """Replace each placeholder of a text by the next text of its kind."""
    done, rest = "", row
    for kind in _order(row, tokens):
        before, _, rest = rest.partition(tokens[kind])
        done += before + next(texts[kind])
    return done + rest


# ---- one function per family: (inputs, texts that replace placeholders) ----

_Placed = tuple[dict[str, Any], dict[str, Any]]


def _flat(images: list[list[Image.Image]]) -> list[Image.Image]:
    return [image for row in images for image in row]


def _patches(config: Any) -> int:
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def _repeat(parts: HostParts, kind: str, lengths: list[int]) -> Any:
    token = _placeholders(parts)[kind]
    return iter([token * length for length in lengths])


def _place_llava(parts: HostParts, images: Any, clips: Any, fps: Any) -> _Placed:
    flat = _flat(images)
    if not flat:
        return {}, {}
    pixels = parts.image_processor(flat, return_tensors="pt")["pixel_values"]
    patch = parts.config.vision_config.patch_size
    has_cls = parts.config.vision_config.model_type.startswith("clip")
    tokens = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch) + has_cls
    tokens -= parts.config.vision_feature_select_strategy == "default"
    return {"pixel_values": pixels}, {"image": _repeat(parts, "image", [tokens] * len(flat))}


def _frames(parts: HostParts, clips: list[list[Image.Image]]) -> Tensor | None:
    """Turn frames into (videos, frames, 3, H, W), as the video processors with one size for all do."""
    if not clips:
        return None
    lengths = sorted({len(clip) for clip in clips})
    if len(lengths) > 1:
        raise ValueError(f"videos: numbers of frames differ, {lengths}. Pass as many frames of each video.")
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    settings = {**_VIDEO_DEFAULTS[parts.config.model_type], **parts.video}
    flat = [frame for clip in clips for frame in clip]
    pixels = processor(**settings)(flat, return_tensors="pt")["pixel_values"]
    return pixels.view(len(clips), lengths[0], *pixels.shape[1:])


def _place_crops(parts: HostParts, images: list[list[Image.Image]], clips: Any, fps: Any) -> _Placed:
    config = parts.config
    several = config.model_type == "llava_onevision"
    inputs: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    flat = _flat(images)
    if flat:
        rows = [row for row in images if row]
        encoded = parts.image_processor(rows if several else flat, return_tensors="pt")
        sizes = encoded["image_sizes"]
        inputs |= {"pixel_values": encoded["pixel_values"], "image_sizes": sizes}
        single = [not several or len(row) == 1 for row in rows for _ in row]
        lengths = packed_lengths(config, sizes, single)
        texts["image"] = _repeat(parts, "image", lengths)
        if several:
            inputs["batch_num_images"] = torch.tensor([len(row) for row in rows])
    if clips:
        inputs["pixel_values_videos"] = _frames(parts, clips)
        shape = inputs["pixel_values_videos"].shape
        patch = config.vision_config.patch_size
        side = [length // patch for length in shape[-2:]]
        if several:
            tokens = shape[1] * math.ceil(side[0] / 2) * math.ceil(side[1] / 2) + 1  # one newline
        else:
            tokens = side[0] * side[1] // 4 * shape[1]
        texts["video"] = _repeat(parts, "video", [tokens] * len(clips))
    return inputs, texts


def packed_lengths(config: Any, sizes: Tensor, cut: list[bool]) -> list[int]:
    """Count the placeholders of images that are cut into crops, by the model's own packing.

    Args:
        config: Of LlavaNext, LlavaNextVideo or LlavaOnevision.
        sizes: (n, 2) height and width of each image.
        cut: Whether an image is cut; one that is not has the resized whole only.
    """
    base = getattr(transformers, type(config).__name__.replace("Config", "Model"))
    options: dict[str, Any] = {"image_newline": torch.zeros(1)}
    if config.model_type == "llava_onevision":
        options["vision_aspect_ratio"] = config.vision_aspect_ratio
    else:
        options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
    features = [torch.zeros(n, _patches(config), 1) for n in crop_counts(config, sizes, cut)]
    return base.pack_image_features(SimpleNamespace(config=config), features, sizes, **options)[1].tolist()


def crop_counts(config: Any, sizes: Tensor, cut: list[bool]) -> list[int]:
    """Count the crops of images, the resized whole included; see `packed_lengths`."""
    module = inspect.getmodule(getattr(transformers, type(config).__name__.replace("Config", "Model")))
    count = module.image_size_to_num_patches
    pairs = zip(sizes, cut, strict=True)
    return [
        count(size, config.image_grid_pinpoints, config.vision_config.image_size) if one else 1
        for size, one in pairs
    ]


def takes_argument(config: Any, name: str) -> bool:
    """Return whether the model class of a configuration takes an argument, in which releases differ."""
    class_name = type(config).__name__.replace("Config", "ForConditionalGeneration")
    return name in inspect.signature(getattr(transformers, class_name).forward).parameters


def video_llava_pixels(config: Any) -> str:
    """Return the name of the argument for images of VideoLlava."""
    return "pixel_values" if takes_argument(config, "pixel_values") else "pixel_values_images"


def _place_video_llava(parts: HostParts, images: Any, clips: Any, fps: Any) -> _Placed:
    inputs: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    flat = _flat(images)
    patches = _patches(parts.config)
    if flat:
        # It guesses where channels are, wrongly for images that are 1 or 3 pixels high
        flat = [np.asarray(image.convert("RGB")) for image in flat]
        encoded = parts.image_processor(images=flat, input_data_format="channels_last", return_tensors="pt")
        inputs[video_llava_pixels(parts.config)] = next(iter(encoded.values()))
        texts["image"] = _repeat(parts, "image", [patches] * len(flat))
    if clips:
        inputs["pixel_values_videos"] = _frames(parts, clips)
        tokens = inputs["pixel_values_videos"].shape[1] * (patches + 1)  # a [CLS] token per frame
        texts["video"] = _repeat(parts, "video", [tokens] * len(clips))
    return inputs, texts


def _place_internvl(parts: HostParts, images: Any, clips: Any, fps: Any) -> _Placed:
    """Make tiles of images and of frames, still separate; a frame is one tile."""
    tokenizer, config = parts.tokenizer, parts.config
    start, end = (
        getattr(tokenizer, f"{name}_image_token", default)
        for name, default in (("start", "<img>"), ("end", "</img>"))
    )
    tile = tokenizer.convert_ids_to_tokens(config.image_token_id) * config.image_seq_length
    inputs: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    flat = _flat(images)
    if flat:
        encoded = parts.image_processor(flat, crop_to_patches=True, return_tensors="pt")
        numbers = [int(n) for n in encoded["num_patches"]]
        inputs["image"] = encoded["pixel_values"].split(numbers)
        texts["image"] = iter([start + tile * n + end for n in numbers])
    if clips:
        settings = {"size": parts.video["size"]} if "size" in parts.video else {}
        inputs["video"] = [
            parts.image_processor(clip, crop_to_patches=False, return_tensors="pt", **settings)[
                "pixel_values"
            ]
            for clip in clips
        ]
        texts["video"] = iter(
            "\n".join(f"Frame{i + 1}: {start}{tile}{end}" for i in range(len(clip))) for clip in clips
        )
    return inputs, texts


def _place_qwen(parts: HostParts, images: Any, clips: Any, fps: float | None) -> _Placed:
    processor, config = parts.image_processor, parts.config
    merged = processor.merge_size**2
    inputs: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    flat = _flat(images)
    if flat:
        encoded = processor(images=flat, return_tensors="pt")
        inputs |= {name: encoded[name] for name in ("pixel_values", "image_grid_thw")}
        texts["image"] = _repeat(parts, "image", (inputs["image_grid_thw"].prod(1) // merged).tolist())
    if clips:
        encoded_clips = [_qwen_clip(parts, clip) for clip in clips]
        inputs["pixel_values_videos"] = torch.cat([pixels for pixels, _ in encoded_clips])
        grids = [grid for _, grid in encoded_clips]
        inputs["video_grid_thw"] = torch.tensor(grids)
        if config.model_type == "qwen3_vl":
            texts["video"] = iter(
                _timed_text(parts, grid, len(clip), fps) for grid, clip in zip(grids, clips, strict=True)
            )
        else:
            texts["video"] = _repeat(parts, "video", [math.prod(grid) // merged for grid in grids])
        if config.model_type == "qwen2_5_vl":
            seconds = processor.temporal_patch_size / fps
            inputs["second_per_grid_ts"] = torch.full((len(clips),), seconds)
    return inputs, texts


def _qwen_clip(parts: HostParts, clip: list[Image.Image]) -> tuple[Tensor, list[int]]:
    """Make the flat patches (t h w, 3 * 2 * p * p) of a video and its grid (t, h, w).

    Frames are patches of images of one frame; two of them, or as many as a temporal patch has, are put
    together, with the last one repeated where a frame is missing.
    """
    processor = parts.image_processor
    settings = {**_VIDEO_DEFAULTS[parts.config.model_type], **parts.video}
    size, factor = settings["size"], processor.patch_size * processor.merge_size
    per = processor.temporal_patch_size
    limits = size["shortest_edge"], size["longest_edge"]
    width, height = clip[0].size
    if any(frame.size != clip[0].size for frame in clip):
        raise ValueError("videos: frames of a video have different sizes. Pass frames of one size.")
    whole = parts.config.model_type == "qwen3_vl"  # whose limits are for the pixels of all frames
    height, width = fitting_size(height, width, factor, *limits, *((len(clip), per) if whole else ()))
    resample = settings.get("resample", Image.Resampling.BICUBIC)
    frames = [frame.convert("RGB").resize((width, height), resample) for frame in clip]
    names = [name for name in ("image_mean", "image_std") if name in settings]
    encoded = processor(
        images=frames,
        do_resize=False,
        temporal_patch_size=1,
        return_tensors="pt",
        **{name: settings[name] for name in names},
    )
    _, rows, columns = encoded["image_grid_thw"][0].tolist()
    patches = encoded["pixel_values"].view(len(frames), rows * columns, 3, 1, -1)
    patches = torch.cat([patches, patches[-1:].expand(-len(frames) % per, -1, -1, -1, -1)])
    steps = len(patches) // per
    patches = patches.view(steps, per, rows * columns, 3, -1).permute(0, 2, 3, 1, 4)
    return patches.reshape(steps * rows * columns, -1), [steps, rows, columns]


def fitting_size(
    height: int, width: int, factor: int, least: int, most: int, frames: int = 1, temporal: int = 1
) -> tuple[int, int]:
    """Return the size nearest to (height, width) in multiples of `factor`, with a number of pixels in limits.

    Args:
        factor: Pixels of a side of a token.
        least, most: Limits of frames * height * width.
        frames: Frames that share the limits.
        temporal: `frames` counts rounded to a multiple of it, half to even.
    """
    if frames > 1 and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    counted = round(frames / temporal) * temporal
    if counted * high * wide > most:
        scale = math.sqrt(frames * height * width / most)
        high = max(factor, math.floor(height / scale / factor) * factor)
        wide = max(factor, math.floor(width / scale / factor) * factor)
    elif counted * high * wide < least:
        scale = math.sqrt(least / (frames * height * width))
        high = math.ceil(height * scale / factor) * factor
        wide = math.ceil(width * scale / factor) * factor
    return high, wide


def _timed_text(parts: HostParts, grid: list[int], frames: int, fps: float) -> str:
    """Return what stands for a video of Qwen3-VL: the time of each temporal patch, then its placeholders."""
    per = parts.image_processor.temporal_patch_size
    token = _placeholders(parts)["video"] * (grid[1] * grid[2] // parts.image_processor.merge_size**2)
    start, end = (
        parts.tokenizer.convert_ids_to_tokens(i)
        for i in (parts.config.vision_start_token_id, parts.config.vision_end_token_id)
    )
    times = [min(i, frames - 1) / fps for i in range(grid[0] * per)]
    middles = [(times[i] + times[i + per - 1]) / 2 for i in range(0, len(times), per)]
    return "".join(f"<{middle:.1f} seconds>{start}{token}{end}" for middle in middles)


_PLACED: dict[str, Callable[..., _Placed]] = {
    "llava": _place_llava,
    "llava_next": _place_crops,
    "llava_next_video": _place_crops,
    "llava_onevision": _place_crops,
    "video_llava": _place_video_llava,
    "internvl": _place_internvl,
    "qwen2_vl": _place_qwen,
    "qwen2_5_vl": _place_qwen,
    "qwen3_vl": _place_qwen,
}

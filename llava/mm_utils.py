"""From images and prompts to the tensors a LLaVA model takes: the helper functions LLaVA's users import.

Images are PIL images; sizes are (width, height) in pixels, tensors are (channels, height, width). Independent
of templates (`llava.conversation`), checkpoints and models.
"""

import ast
import math
import re
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    DEFAULT_VID_END_TOKEN,
    DEFAULT_VID_START_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.image_files import load_image, load_image_from_base64, to_rgb

__all__ = [
    "KeywordsStoppingCriteria",
    "classical_resize",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "is_anyres",
    "load_image",
    "load_image_from_base64",
    "media_tags",
    "process_anyres_image",
    "process_images",
    "read_pinpoints",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]

# A square canvas larger than this (800 MB) is not needed to fill a few hundred pixels: thin images are shrunk
# first.
_MAX_CANVAS_SIDE = 16384
_SHRUNK_SIDE = 4096
# Beyond this ratio of sides, resizing the short side to the tower's size would make the long one enormous.
_MAX_ASPECT = 64


def classical_resize(
    image: Image.Image, size: tuple[int, int], resample: int = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resize to `size` (width, height), rows first, then columns, as every Pillow up to 12 does.

    Pillow 13 takes the columns of portrait images first, which changes values by up to 26 of 255. All
    published results come from the classical order.
    """
    return image.resize((size[0], image.height), resample).resize(size, resample)


def expand2square(pil_img: Image.Image, background_color: int | tuple[int, ...]) -> Image.Image:
    """Center an image on a square canvas as wide as its longer side (`image_aspect_ratio: pad`)."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    canvas = Image.new(pil_img.mode, (side, side), background_color)
    canvas.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return canvas


# --- anyres (LLaVA-NeXT) -------------------------------------------------------------------------------
def is_anyres(image_aspect_ratio: Any) -> bool:
    """Return whether images are cut into tiles: "anyres" or "anyres_max_N"."""
    return re.fullmatch("anyres(_max_[1-9][0-9]*)?", str(image_aspect_ratio)) is not None


def read_pinpoints(grid_pinpoints: Any, side: int | None = None) -> list[tuple[int, int]]:
    """Read the resolutions (width, height) of `image_grid_pinpoints`.

    Args:
        grid_pinpoints: a list of pairs, the same as text, or crops in a text: "(1x1),...,(6x6)" is every pair
            between the first and the last, "(1x2),(2x1)" is these two.
        side: pixels of a crop's side, for the latter.

    Raises:
        ValueError: something else.
    """
    given, wanted = grid_pinpoints, "expected a list of positive [width, height] pairs"
    problem = ValueError(f"image_grid_pinpoints: {wanted}, got {reprlib.repr(given)}. Fix config.json.")
    if isinstance(given, str) and (crops := re.findall(r"\((\d{1,3})x(\d{1,3})\)", given)):
        if side is None or re.sub(r"\(\d+x\d+\)|\.\.\.|[\[\]\s,]", "", given):
            raise problem
        pairs = [(int(columns), int(rows)) for columns, rows in crops]
        if "..." in given:
            (left, top), (right, bottom) = pairs[0], pairs[-1]
            pairs = [(i, j) for i in range(left, right + 1) for j in range(top, bottom + 1)]
        pairs = [(side * columns, side * rows) for columns, rows in pairs]
    else:
        try:
            parsed = ast.literal_eval(given) if isinstance(given, str) else given
            pairs = [(int(width), int(height)) for width, height in parsed]
        except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError, OverflowError):
            raise problem from None
    if (
        not pairs
        or min(min(pair) for pair in pairs) < 1
        or max(max(pair) for pair in pairs) > _MAX_CANVAS_SIDE
    ):
        raise problem
    return pairs


def select_best_resolution(
    original_size: tuple[int, int], possible_resolutions: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """Select the resolution that keeps most of the image's pixels; among ties, the one with least padding.

    Args:
        original_size: (width, height) of the image.
        possible_resolutions: (width, height) each.
    """
    width, height = original_size

    def rank(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - resolution[0] * resolution[1]  # the second is minus the padding

    best = max(possible_resolutions, key=rank)  # max keeps the first of equals
    return best[0], best[1]


def resize_and_pad_image(image: Image.Image, target_resolution: tuple[int, int]) -> Image.Image:
    """Resize into `target_resolution` (width, height), aspect ratio kept, centered on black."""
    width, height = image.size
    target_width, target_height = target_resolution
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        size = (target_width, min(math.ceil(height * scale_width), target_height))
    else:
        size = (min(math.ceil(width * scale_height), target_width), target_height)
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(
        classical_resize(image, size), ((target_width - size[0]) // 2, (target_height - size[1]) // 2)
    )
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut square tiles of `patch_size` pixels in raster order."""
    width, height = image.size
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, height, patch_size)
        for left in range(0, width, patch_size)
    ]


def get_anyres_image_grid_shape(
    image_size: tuple[int, int], grid_pinpoints: Any, patch_size: int
) -> tuple[int, int]:
    """Return (columns, rows) of tiles for an image of `image_size`; `patch_size` is the tower's side."""
    width, height = select_best_resolution(image_size, read_pinpoints(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: Any) -> torch.Tensor:
    """Squash the whole image to a square, then cut its tiles in raster order: (1 + tiles, 3, side, side)."""
    side = _side(processor)
    resolution = select_best_resolution(image.size, read_pinpoints(grid_pinpoints, side))
    tiles = divide_to_patches(resize_and_pad_image(image, resolution), side)
    crops = [classical_resize(image, (side, side)), *tiles]
    return torch.stack([_pixels(crop, processor) for crop in crops])


def process_images(
    images: Sequence[Image.Image | Sequence[Image.Image]], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Convert images, and for Video-LLaVA clips, to pixel values, as the checkpoint's config specifies.

    Args:
        images: PIL images of any mode; a clip is a sequence of its frames.
        image_processor: of the model's vision tower.
        model_cfg: object or dict with `image_aspect_ratio`: "pad" (square canvas in the mean color), "anyres"
            or "anyres_max_N" (tiles), "square" or None (resize and center crop). For tiles also
            `image_grid_pinpoints` and `anyres_protocol`: "paper" cuts every image into 2 x 2 tiles whatever
            the pinpoints are, otherwise the best pinpoint is used.

    Returns:
        (n, 3, H, W) floats, with anyres (n, crops, 3, H, W), of clips (n, 3, frames, H, W); a list of n
        tensors where their shapes differ.

    Raises:
        ValueError: another `image_aspect_ratio`, or a clip for a model that takes only images.
    """
    get = model_cfg.get if isinstance(model_cfg, dict) else lambda name: getattr(model_cfg, name, None)
    aspect = get("image_aspect_ratio")
    tiled = is_anyres(aspect)
    if not tiled and aspect not in ("pad", "square", "none", None):
        raise ValueError(
            f"image_aspect_ratio: {aspect!r} is unknown. Choose pad, anyres, anyres_max_N or square in "
            "config.json."
        )
    pixels = []
    for image in images:
        if isinstance(image, list | tuple):
            if not hasattr(image_processor, "preprocess_clip"):
                raise ValueError(
                    "images: a clip, but this model takes only images. Load a Video-LLaVA checkpoint."
                )
            pixels.append(image_processor.preprocess_clip(image))
            continue
        image = to_rgb(image)
        if tiled:
            side = _side(image_processor)
            paper = get("anyres_protocol") == "paper"
            grid = [(2 * side, 2 * side)] if paper else get("image_grid_pinpoints")
            pixels.append(process_anyres_image(image, image_processor, grid))
            continue
        if aspect == "pad":
            if max(image.size) > _MAX_CANVAS_SIDE:
                image = _shrink(image)
            image = expand2square(image, tuple(int(mean * 255) for mean in image_processor.image_mean))
        elif max(image.size) > _MAX_ASPECT * min(image.size):
            image = _middle(image)
        pixels.append(_pixels(image, image_processor))
    if pixels and all(one.shape == pixels[0].shape for one in pixels):
        return torch.stack(pixels)
    return pixels


def _side(processor: Any) -> int:
    return int(processor.crop_size["height"])


def _pixels(image: Image.Image, processor: Any) -> torch.Tensor:
    """(3, H, W)"""
    # Explicit, because older processors guess: they take the rows of a 3 pixel high image for channels.
    options = {"return_tensors": "pt", "input_data_format": "channels_last"}
    edge = dict(getattr(processor, "size", None) or {}).get("shortest_edge")
    if edge and getattr(processor, "do_resize", False):
        width, height = image.size
        longer = int(edge * max(width, height) / min(width, height))
        size = (edge, longer) if width <= height else (longer, edge)
        image = classical_resize(image, size, processor.resample)
        options["do_resize"] = False
    return processor.preprocess(image, **options)["pixel_values"][0]


def _shrink(image: Image.Image) -> Image.Image:
    scale = _SHRUNK_SIDE / max(image.size)
    return classical_resize(image, tuple(max(1, round(side * scale)) for side in image.size))


def _middle(image: Image.Image) -> Image.Image:
    """Cut the middle out of a very thin image: more than its center crop can contain."""
    width, height = image.size
    keep = 4 * min(width, height)
    left, top = max(0, (width - keep) // 2), max(0, (height - keep) // 2)
    return image.crop((left, top, width - left, height - top))


def media_tags(clips: Sequence[bool], model_cfg: Any, frames: int = 8) -> str:
    """Return what stands for pictures and clips at the beginning of a question, before a line break.

    One <image> per picture and one per frame of a clip, with nothing between them.

    Args:
        clips: for each, in the order of `images`, whether it is a clip.
        model_cfg: object or dict; with `mm_use_im_start_end` each is put between tokens of its own.
        frames: of a clip.
    """
    get = model_cfg.get if isinstance(model_cfg, dict) else lambda name: getattr(model_cfg, name, None)
    ends = {False: (DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN)}
    ends[True] = (DEFAULT_VID_START_TOKEN, DEFAULT_VID_END_TOKEN)
    tags = ""
    for is_clip in clips:
        start, end = ends[is_clip] if get("mm_use_im_start_end") else ("", "")
        tags += start + DEFAULT_IMAGE_TOKEN * (frames if is_clip else 1) + end
    return tags


# --- prompts in, texts out -----------------------------------------------------------------------------
def tokenizer_image_token(
    prompt: str,
    tokenizer: Any,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Tokenize a prompt, with `image_token_index` for each `<image>`.

    The texts between images are tokenized separately, and only the first one keeps its BOS; so each has
    sentencepiece's leading space, as in the released models.

    Returns:
        A list of ids, or a 1-D int64 tensor with `return_tensors="pt"`.

    Raises:
        ValueError: another `return_tensors`.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors: {return_tensors!r} is not supported. Use 'pt' or None.")
    pieces = [list(tokenizer(piece).input_ids) for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
    bos = tokenizer.bos_token_id
    prefixed = bos is not None and list(tokenizer("").input_ids)[:1] == [bos]
    ids = pieces[0]
    for piece in pieces[1:]:
        ids += [image_token_index, *piece[int(prefixed) :]]
    return torch.tensor(ids, dtype=torch.long) if return_tensors else ids


def get_model_name_from_path(model_path: str) -> str:
    """Return the last folder of a path, with its parent for a training checkpoint.

    `run/checkpoint-10` gives `run_checkpoint-10`.
    """
    parts = str(model_path).replace("\\", "/").strip("/").split("/")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


class KeywordsStoppingCriteria:
    """Stops a row of `generate` once its new text contains a keyword.

    Works whether `output_ids` contains the prompt (generation from ids) or only new ids (from embeddings, as
    in LLaVA). transformers accepts any callable as a stopping criterion; not inheriting keeps this module's
    import light.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor) -> None:
        self.keywords = [keyword for keyword in keywords if keyword]
        self.tokenizer = tokenizer
        self.input_ids = input_ids if input_ids.dim() == 2 else input_ids[None]
        # No keyword spans more tokens than it has bytes; a few more keep the first character whole.
        self.window = max((len(keyword.encode()) for keyword in self.keywords), default=0) + 4

    def __call__(self, output_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        """Return (B,) bool for ids (B, L), True where a row is done."""
        start = self.input_ids.shape[1]
        prompt = self.input_ids.to(output_ids.device)
        whole = output_ids.shape[1] >= start and bool((output_ids[:, :start] == prompt).all())
        new = output_ids[:, start:] if whole else output_ids
        done = [self._done(row) for row in new[:, -self.window :].tolist()]
        return torch.tensor(done, dtype=torch.bool, device=output_ids.device)

    def _done(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return any(keyword in text for keyword in self.keywords)

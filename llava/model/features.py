"""Data passed between vision tower, pruner and language model, for one image each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.pruning import Kept


@dataclass
class VisionFeatures:
    """Tower output for one image or clip: everything that is the same for all questions and all budgets.

    The frames of a clip take the place of crops, and their `features` have [CLS] first: (frames, N + 1, C).
    """

    features: Tensor  # (crops, N, C), in the dtype the projector reads
    attention: Tensor  # (crops, H, N), [CLS] row of the select layer, float32 or wider
    image_size: tuple[int, int] | None  # (width, height) of the image before preprocessing
    keys: Sequence[str]  # one identity per crop, see `crop_key`; `CropKeys` until they are needed
    as_crops: bool = True  # False: came as a plain (B, 3, H, W) batch, which is never merged
    cues: dict[str, Tensor] = field(default_factory=dict)  # further cues of the tower, (crops, ...) each
    is_clip: bool = False


@dataclass
class VisualTokens:
    """What enters the language model for one image or clip."""

    embeds: Tensor  # (K, D) projected, in final order, image_newline rows included
    # (crops, T) patches per crop, before unpadding cuts any; for a clip and for a method that selects per
    # image (1, T), patch p of crop c being c * N + p
    kept: Kept
    # (K,) int64, places of the tokens among those of the unpruned image, of which there are `span`; None if
    # positions are contiguous
    places: Tensor | None = field(default=None, kw_only=True)
    span: int = field(default=0, kw_only=True)
    # () bool on the device, True: the tokens may be wrong, call `visual_tokens`; None: they are right
    doubt: Tensor | None = field(default=None, kw_only=True)
    # tokens of every frame of a clip, which has an <image> tag per frame; None for an image
    lengths: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    def count(self) -> int:
        """K, the number of visual tokens that enter the language model."""
        return self.embeds.shape[0]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """One (K_i, D) for every <image> tag: the tokens of an image, or of every frame of a clip."""
        return (self.embeds,) if self.lengths is None else self.embeds.split(self.lengths)


class CropKeys(Sequence):
    """The identities of crops, computed when the first of them is read: few methods need them."""

    def __init__(self, crops: Tensor) -> None:
        self._crops: Tensor | None = crops  # (crops, 3, H, W)
        self._keys: list[str] = []
        self._count = len(crops)

    def __len__(self) -> int:
        return self._count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __getitem__(self, place):
        if self._crops is not None:
            self._keys, self._crops = [crop_key(crop) for crop in self._crops], None
        return self._keys[place]


class IdsReadError(Exception):
    """A pruning method reads the identities of crops, so its selection cannot be captured."""


class UnreadableIds(Sequence):
    """Identities of `count` crops, for methods that do not need them; reading one raises `IdsReadError`."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place):
        raise IdsReadError("the identities of crops are read on the host")


def crop_key(crop: Tensor) -> str:
    """Return the identity of a crop (3, H, W): a hash of its pixels, rounded to float16.

    Rounded, because callers pass the same image in float32 or float16 and must get the same random subset.
    """
    pixels = crop.detach().to("cpu", torch.float16).contiguous()
    return hashlib.sha1(pixels.numpy().tobytes(), usedforsecurity=False).hexdigest()


def as_image_list(images: Tensor | list[Tensor]) -> tuple[list[Tensor], bool]:
    """Convert every form in which LLaVA's callers pass images to one (crops, 3, H, W) tensor per image.

    Args:
        images: (3, H, W): one image; (B, 3, H, W): B images of one crop; (B, crops, 3, H, W): B images; or a
            list with (3, H, W) or (crops, 3, H, W) per image.

    Returns:
        The tensors, and `as_crops` (see `VisionFeatures`).

    Raises:
        ValueError: any other form.
    """
    if isinstance(images, Tensor):
        if images.ndim == 3:
            return [images[None]], False
        if images.ndim == 4:
            return list(images.split(1)) if len(images) else [], False
        if images.ndim == 5:
            return _with_crops(list(images)), True
        raise ValueError(f"images: {images.ndim} dimensions, expected (B, 3, H, W) or (B, crops, 3, H, W).")
    if not isinstance(images, list | tuple):
        raise ValueError(f"images: expected a tensor or a list of tensors, got {type(images).__name__}.")
    result = []
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim not in (3, 4):
            shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"images[{i}]: expected a tensor (3, H, W) or (crops, 3, H, W), got {shape}.")
        result.append(image[None] if image.ndim == 3 else image)
    return _with_crops(result), True


def _with_crops(images: list[Tensor]) -> list[Tensor]:
    """Return images (crops, 3, H, W). Raises `ValueError` for one without crops."""
    for i, image in enumerate(images):
        if not len(image):
            raise ValueError(f"images[{i}]: shape is {tuple(image.shape)}, without a crop. Leave it out.")
    return images


def as_media_list(images: Tensor | list[Tensor], frames: int) -> tuple[list[Tensor], list[bool]]:
    """Convert pictures and clips, told apart by their dimensions, to (crops or frames, 3, H, W) each.

    Args:
        images: a list with (3, H, W) for a picture and (3, frames, H, W) for a clip; or a tensor: one of
            these, (B, 3, H, W) or (B, 3, frames, H, W).
        frames: of a clip.

    Returns:
        The tensors, and which of them are clips.

    Raises:
        ValueError: any other form, or a clip of another number of frames.
    """
    if isinstance(images, Tensor):
        is_one = images.ndim == 3 or (images.ndim == 4 and len(images) == 3 != images.shape[1])
        images = [images] if is_one else list(images)
    elif not isinstance(images, list | tuple):
        raise ValueError(f"images: expected a tensor or a list of tensors, got {type(images).__name__}.")
    found = []
    for i, one in enumerate(images):
        shape = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
        if not isinstance(one, Tensor) or one.ndim not in (3, 4) or len(one) != 3:
            raise ValueError(
                f"images[{i}]: expected a picture (3, H, W) or a clip (3, {frames}, H, W), got {shape}."
            )
        if one.ndim == 4 and one.shape[1] != frames:
            raise ValueError(
                f"images[{i}]: a clip of {one.shape[1]} frames, but the video tower takes exactly {frames}. "
                f"Take {frames} frames (llava.video_files.read_frames)."
            )
        found.append(one.transpose(0, 1) if one.ndim == 4 else one[None])
    return found, [one.ndim == 4 for one in images]


def as_size_list(image_sizes: object, count: int) -> list[tuple[int, int] | None]:
    """Return (width, height) per image from a list of pairs or an (n, 2) tensor; None for all if unknown.

    Raises:
        ValueError: there are not `count` pairs.
    """
    if image_sizes is None:
        return [None] * count
    if isinstance(image_sizes, Tensor):
        image_sizes = image_sizes.tolist()
    sizes = list(image_sizes)
    if count == 1 and len(sizes) == 2 and all(isinstance(s, int) for s in sizes):
        sizes = [tuple(sizes)]  # the pair itself, for a single image
    if len(sizes) != count:
        raise ValueError(
            f"image_sizes: {len(sizes)} entries for {count} images. Pass one (width, height) per image."
        )
    return [None if s is None else (int(s[0]), int(s[1])) for s in sizes]

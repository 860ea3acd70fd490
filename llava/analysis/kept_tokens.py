"""What the tokens of a method stand for in an image: patches of every crop, kept or merged.

    crops, vision = encode(engine, image, pruners)
    for crop in kept_tokens(engine, vision, pruner, question):
        crop.kept, crop.groups

The selection is that of the model's own `visual_tokens`, and for methods inside the language model that of
its prefill, so it is the one that an evaluation uses. Independent of how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava.eval.benchmarks import Question
from llava.mm_utils import process_images
from llava.model.decode import Row
from llava.model.features import VisionFeatures
from llava.model.inside import acts_inside, prefill
from llava.model.multimodal_encoder.cues import tower_cues
from llava.pruning import Pruner
from llava.pruning.base import NO_TOKEN

if TYPE_CHECKING:
    from llava.eval.inference.engine import Engine


@dataclass(frozen=True)
class CropTokens:
    """The tokens of one crop, of N patches.

    Attributes:
        kept: (k,) int64, patches that are tokens, ascending; of merged tokens those that no other patch was
            merged into.
        important: (k,) bool, True for those that were selected by attention.
        groups: (N,) int64, number of the token that a patch was merged into with others, -1 for all other
            patches; None if the method merges nothing.
        unplaced: Tokens that stand for no patch, such as [CLS], newlines, and what a method makes inside the
            language model.
    """

    kept: np.ndarray
    important: np.ndarray
    groups: np.ndarray | None = None
    unplaced: int = 0

    @property
    def merged(self) -> int:
        """Tokens that stand for several patches."""
        return 0 if self.groups is None else len(np.unique(self.groups[self.groups >= 0]))


def counts(crops: Sequence[CropTokens]) -> dict[str, int]:
    """Return the tokens of an image: all ("kept"), and how many of them are important, merged, unplaced."""
    merged, unplaced = (sum(getattr(crop, name) for crop in crops) for name in ("merged", "unplaced"))
    return {
        "kept": sum(len(crop.kept) for crop in crops) + merged + unplaced,
        "important": sum(int(crop.important.sum()) for crop in crops),
        "merged": merged,
        "unplaced": unplaced,
    }


def encode(engine: Engine, image: Any, pruners: Sequence[Pruner]) -> tuple[list[Image.Image], VisionFeatures]:
    """Return the crops of an image as the tower gets them, and its features with all cues of the methods.

    Crops are cut by the anyres protocol that the model is set to.
    """
    model = engine.model
    pixels = process_images([image], engine.image_processor, model.config)[0]
    cues = tower_cues([cue for pruner in pruners for cue in pruner.cues])
    with torch.inference_mode():
        vision = model.encode_vision([pixels], [image.size], cues)[0]
    return crops_as_images(pixels if pixels.ndim == 4 else pixels[None], engine.image_processor), vision


def crops_as_images(pixels: Tensor, processor: Any) -> list[Image.Image]:
    """Convert processed pixels (crops, 3, S, S) back to RGB images."""
    mean, deviation = (
        np.array(v, np.float32)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    arrays = pixels.float().cpu().numpy() * deviation + mean
    return [Image.fromarray((a.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)) for a in arrays]


@torch.inference_mode()
def kept_tokens(
    engine: Engine, vision: VisionFeatures, pruner: Pruner, question: Question
) -> list[CropTokens]:
    """Return the tokens that a method keeps of an image, of every crop.

    For methods inside the language model these are the tokens that are left after their last stage.

    Args:
        vision: From `encode`.
        question: Decides for methods that read it, and for those inside the language model.

    Raises:
        ValueError: The model does not have what the method reads, or the budget cannot be met.
    """
    model, crops = engine.model, len(vision.features)
    cue = engine.text_cue(question) if pruner.needs_question else None
    tokens = model.visual_tokens(vision, pruner, cue)
    kept = tokens.kept
    if (
        pruner.per_image and crops > 1 and model.has_newlines(crops, vision.as_crops)
    ):  # places among patches and newlines
        places, important = _entering(model, vision)[kept.indices.cpu().flatten()], kept.important
        return _by_crop(places, important.flatten(), None, vision)
    if kept.features is not None:
        return _merged_by_crop(kept, vision)
    places = _entering(model, vision, kept.indices.cpu())
    if not acts_inside(pruner):
        columns = _layout(model, vision, kept.indices.cpu())
        return _by_crop(places, kept.important.flatten().cpu()[columns] & (columns >= 0), None, vision)
    if len(places) != len(tokens.embeds):
        raise ValueError(
            f"{pruner.name}: {len(tokens.embeds)} tokens enter the language model, but {len(places)} patches "
            "are known. Tokens of a resized grid cannot be shown; pass a budget."
        )
    row = Row(
        engine.prompt_ids(question), tokens.embeds, None, crops, kept.important.flatten(), tokens.places,
        tokens.span,
    )  # fmt: skip
    left = torch.arange(len(places))
    for reduction in prefill(model, [row], pruner).reductions[0][-1:]:
        left = reduction.ids.cpu()
    made = torch.full((int((left >= len(places)).sum()),), -1)
    places = torch.cat([places[left[left < len(places)]], made])
    return _by_crop(places, torch.zeros(len(places), dtype=torch.bool), None, vision)


def _layout(model: Any, vision: VisionFeatures, indices: Tensor) -> Tensor:
    """Return the final order of the kept patches `indices` (see `token_layout`), -1 for newlines."""
    return model.layout(len(vision.features), vision.image_size, vision.as_crops)(indices)


def _entering(model: Any, vision: VisionFeatures, indices: Tensor | None = None) -> Tensor:
    """Return what the tokens stand for in final order: (L,) patch p of crop c as c * N + p, -1 for newlines.

    Args:
        indices: (crops, K) or (1, K), kept patches (default: all).
    """
    crops, patches = vision.features.shape[:2]
    if indices is None:
        indices = torch.arange(patches).expand(crops, -1)
    columns = _layout(model, vision, indices)
    if len(indices) == crops:
        indices = indices + torch.arange(crops)[:, None] * patches
    return torch.where(columns >= 0, indices.flatten()[columns], -1)


def _by_crop(places: Tensor, important: Tensor, groups: Any, vision: VisionFeatures) -> list[CropTokens]:
    """Divide tokens among the crops; those without a place belong to the first one.

    Args:
        places: (L,) patch p of crop c as c * N + p; negative for tokens without a place.
        important: (L,) bool.
        groups: (crops, N) array, or None.
    """
    crops, patches = vision.features.shape[:2]
    places, important = places.cpu().numpy(), important.cpu().numpy()
    found = []
    for crop in range(crops):
        here = np.flatnonzero((places >= 0) & (places // patches == crop))
        here = here[places[here].argsort(kind="stable")]
        lost = int((places < 0).sum()) if crop == 0 else 0
        own = None if groups is None else groups[crop]
        found.append(CropTokens(places[here] % patches, important[here], own, lost))
    return found


def _merged_by_crop(kept: Any, vision: VisionFeatures) -> list[CropTokens]:
    """Return the tokens of a method that merges; `kept` has one row per crop, or one for all crops."""
    crops, patches = vision.features.shape[:2]
    rows, columns = kept.indices.shape
    groups, indices = kept.groups.cpu(), kept.indices.cpu()
    # Number the tokens of all rows, so that one row for all crops is the same case
    first = torch.arange(rows)[:, None] * columns
    numbers = torch.where(groups >= 0, groups + first, -1).flatten()  # (crops * N,)
    patch = (numbers >= 0).nonzero().flatten()
    sizes = torch.bincount(numbers[patch], minlength=rows * columns)
    places = torch.full((rows * columns,), -1).scatter(0, numbers[patch], patch)
    single = (sizes <= 1) & (indices.flatten() != NO_TOKEN)
    shared = torch.where(sizes[numbers.clamp(min=0)] > 1, numbers, -1)
    important = kept.important.flatten().cpu()
    return _by_crop(places[single], important[single], shared.view(crops, patches).numpy(), vision)

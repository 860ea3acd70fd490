"""What the core has to know about a family of models: towers, placeholders, and rows to prune.

    class LlavaHost(Host):
        classes = ("LlavaForConditionalGeneration",)
        def towers(self, base): ...         # where attention is
        def rows(self, base, seen): ...     # what a method selects from

The names of attributes and methods are those of transformers' `ForConditionalGeneration` classes of that
shape: a base model `model.model` with a vision tower, `get_image_features`, perhaps `get_video_features`, and
a language model. Everything else (doors, shortening, positions) is in `core.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava.integrations.cue import TowerParts

# Cues of a tower with [CLS] whose patches are the tokens, one to one
ALL_CUES = ("attention", "received", "keys", "cls", "last_query", "last_keys", "projected")
POOLED_CUES = ("attention", "received", "projected")  # of tokens made of several patches, and without [CLS]


class UnsupportedRelease(ValueError):
    """The installed transformers lacks what pruning of a class needs."""


class PrunedFeatures(BaseModelOutputWithPooling):
    """Features of kept tokens, for hosts that take them as outputs of the encoder."""


@dataclass
class Seen:
    """What one call of `get_image_features` or `get_video_features` did.

    Attributes:
        modality: "image" or "video".
        arguments: Of the call, by name, with defaults.
        output: The features as returned: a tensor, or one per image.
        pixels: Input of the tower.
        features: Input of the projector; None if the host has none.
        projected: Output of the projector.
        calls: Arguments and function of the watched methods of the base model, in order.
        cues: A tensor per attention call of the tower, for each cue.
    """

    modality: str
    arguments: dict[str, Any]
    output: Any = None
    pixels: Tensor | None = None
    features: Tensor | None = None
    projected: Tensor | None = None
    calls: dict[str, list[tuple[dict[str, Any], Callable[..., Any]]]] = field(default_factory=dict)
    cues: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Frames per clip of (clips, frames, 3, H, W), whose argument older releases call `pixel_values`."""
        names = ("pixel_values_videos", "pixel_values")
        clips = next(self.arguments[name] for name in names if self.arguments.get(name) is not None)
        return clips.shape[1]

    def embeds(self) -> Tensor:
        """Return the features of all placeholders (M, D), in their order."""
        parts = self.output if isinstance(self.output, (list, tuple)) else [self.output]
        return torch.cat([part.flatten(0, -2) for part in parts])

    def stacked(self, change: Callable[[Tensor], Tensor] = lambda cue: cue) -> dict[str, Tensor]:
        """Return the cues of all rows; `change` makes cues of tokens from those of patches (B, ..., N)."""
        found = {name: torch.cat(parts) for name, parts in self.cues.items()}
        return {name: change(cue) if _of_patches(name) else cue for name, cue in found.items()}


def _of_patches(cue: str) -> bool:
    return cue.partition("@")[0] in ("attention", "received")


@dataclass
class HostRow:
    """Tokens from which a method selects: one image, crop, tile or frame.

    Attributes:
        places: (N,) int64, the placeholder of each token among those of the call; -1 for none.
        features: (N, C), what similarity is computed on.
        cues: Cues of the row without a batch dimension, "attention" (H, N) among them.
        pixels: What the row was made from: the identity of the row for random methods.
        extra: Placeholders that stay only while the row is not pruned, such as that of [CLS].
        frame: (i, f) of the i-th of f frames of a clip; None for an image.
        crops: Crops that are joined in this row.
        grid: (rows, columns) of the tokens, None if unknown.
    """

    places: Tensor
    features: Tensor
    cues: dict[str, Tensor]
    pixels: Tensor
    extra: Tensor | None = None
    frame: tuple[int, int] | None = None
    crops: int = 1
    grid: tuple[int, int] | None = None


@dataclass
class HostRows:
    """The rows of one call; placeholders that are in no row are always kept.

    Attributes:
        count: Placeholders of the call, M.
        rows: The rows, in the order of their placeholders.
    """

    count: int
    rows: list[HostRow]


class Host:
    """A family of models. Subclasses are descriptors without state."""

    classes: ClassVar[tuple[str, ...]] = ()  # names in transformers
    modalities: ClassVar[Mapping[str, str]] = {"image": "image_token_id"}  # -> entry of the configuration
    language_model: ClassVar[str] = "language_model"  # attribute of the base model
    projector: ClassVar[str | None] = "multi_modal_projector"  # None: the tower projects
    watched: ClassVar[tuple[str, ...]] = ()  # methods of the base model whose calls `rows` reads
    mrope: ClassVar[bool] = False  # positions have a time, a row and a column
    needs_ids: ClassVar[bool] = False  # positions are derived from ids
    takes_embeds: ClassVar[bool] = True  # False: `feed` passes features as outputs of the encoder
    cues: ClassVar[Mapping[str, Sequence[str]]] = {"image": ALL_CUES}  # by modality
    merges: ClassVar[Mapping[str, bool]] = {"image": True}  # whether merged tokens can take placeholders

    def base(self, model: nn.Module) -> nn.Module:
        """Return the model that merges features into text: the one without a head."""
        return model.model

    def towers(self, base: nn.Module) -> dict[str, TowerParts]:
        """Return the tower of each modality.

        Raises:
            ValueError: a tower whose attention cannot be read.
        """
        raise NotImplementedError

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        """Return the rows of a call."""
        raise NotImplementedError

    def project(self, base: nn.Module, features: Tensor) -> Tensor:
        """Return the embeddings (K, D) of merged features (K, C)."""
        projector = getattr(base, self.projector)
        weight = next(projector.parameters())
        return projector(features.to(weight.dtype)[None])[0]

    def feed(self, short: Any, generating: bool) -> dict[str, Any]:
        """Return the arguments by which the model gets the shortened prompt (`core.Shortened`)."""
        given = {"inputs_embeds": short.embeds}
        return {**given, "input_ids": short.ids} if generating and short.ids is not None else given

    def cues_of(self, base: nn.Module, modality: str) -> tuple[str, ...]:
        """Return the kinds of cues that tokens of a modality have; fewer for a tower without [CLS]."""
        kinds = tuple(self.cues[modality])
        if self.towers(base)[modality].has_cls:
            return kinds
        return tuple(kind for kind in kinds if kind in POOLED_CUES)


def encoder_parts(tower: nn.Module, select: int | Sequence[int], where: str) -> TowerParts:
    """Return the parts of a tower of the CLIP kind.

    Args:
        select: `vision_feature_layer`, an index into hidden states, which start before the first layer; of
            several, the last one counts.
        where: The configuration that names the tower, for the error.
    """
    kinds = {  # model type -> has [CLS], list of layers, attention of a layer
        "clip_vision_model": (True, "layers", "self_attn"),
        "dinov2": (True, "layer", "attention"),
        "siglip_vision_model": (False, "layers", "self_attn"),
        "idefics3_vision": (False, "layers", "self_attn"),
        "smolvlm_vision": (False, "layers", "self_attn"),
        "internvl_vision": (True, "layer", "attention"),
    }
    kind = tower.config.model_type
    if kind not in kinds:
        raise ValueError(
            f"{where}.vision_config: the tower is {kind!r}, whose attention pruning cannot read. Use a model "
            f"with one of {', '.join(kinds)}."
        )
    has_cls, layers, attention = kinds[kind]
    modules = getattr(getattr(tower, "vision_model", tower).encoder, layers)
    indices = [select] if isinstance(select, int) else list(select)
    states = len(modules) + 1
    if any(not -states <= index < states or index % states == 0 for index in indices):
        raise ValueError(
            f"{where}.vision_feature_layer: {select!r} is not the output of one of {len(modules)} layers. "
            "Correct config.json."
        )
    outputs = [index % states - 1 for index in indices]
    return TowerParts(tower, modules, attention, has_cls, outputs[-1], outputs=outputs)


def feature_layer(config: Any) -> int | list[int]:
    """Return `vision_feature_layer` of a configuration; VipLlava names it in the plural."""
    found = getattr(config, "vision_feature_layer", None)
    return config.vision_feature_layers if found is None else found


def plain_rows(
    seen: Seen,
    change: Callable[[Tensor], Tensor] = lambda cue: cue,
    frames: int | None = None,
    gap: int = 0,
) -> HostRows:
    """Return a row per input of the tower, whose tokens have consecutive placeholders.

    Tokens in front of those that have cues are [CLS], with placeholders that go when the row is pruned.

    Args:
        change: Makes cues of tokens from those of patches.
        frames: Frames per clip, None for images.
        gap: Placeholders after each clip, which stay.
    """
    cues = seen.stacked(change)
    count, total = seen.features.shape[:2]
    n = cues["attention"].shape[-1]
    extra = total - n
    cues |= {} if seen.projected is None else {"projected": seen.projected[:, extra:].detach()}
    rows = []
    for i in range(count):
        start = i * total + (0 if frames is None else i // frames * gap)
        places = torch.arange(start, start + total)
        side = isqrt(n)
        rows.append(
            HostRow(
                places[extra:],
                seen.features[i, extra:].detach(),
                {name: cue[i] for name, cue in cues.items()},
                seen.pixels[i],
                extra=places[:extra],
                frame=None if frames is None else (i % frames, frames),
                grid=(side, side) if side * side == n else None,
            )
        )
    return HostRows(count * total + (0 if frames is None else count // frames * gap), rows)

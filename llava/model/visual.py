"""Turn images into the visual tokens of a language model: encode, prune, project, put in order.

Mixed into the causal language model by `llava_arch.py`. The pruner is called between tower and projector, so
that only kept tokens are projected. Independent of prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llava.model.anyres import NEWLINE, PROTOCOLS, has_newlines, shrunk_grid, token_layout
from llava.model.checkpoint.entries import ANYRES_MAX
from llava.model.features import (
    CropKeys,
    IdsReadError,
    UnreadableIds,
    VisionFeatures,
    VisualTokens,
    as_image_list,
    as_size_list,
)
from llava.model.settings import PRESETS, Preset
from llava.pruning import Kept, Pruner, TextCue, get_pruner

USE_CURRENT = "use current"  # default of visual_tokens(pruner=): the model's own pruner


class VisualTokenMixin:
    """Mixed into a model with `get_model()` (projector, image_newline), `get_vision_tower()` and `config`."""

    def init_pruning(self) -> None:
        """Start without pruning. Called once by the constructor."""
        self._pruner = get_pruner("none")
        self._anyres: str | None = None
        self.preset: Preset = PRESETS["exact"]
        self._told_unshrunk = False
        self._read_ids: set[type[Pruner]] = set()  # methods that read the identities of crops
        self.config.anyres_protocol = self.anyres

    # --- which tokens stay -------------------------------------------------------------------------------
    @property
    def pruner(self) -> Pruner:
        """The pruner in use; its name is "none" when nothing is pruned."""
        return self._pruner

    @property
    def anyres(self) -> str:
        """How crops are merged, "paper" or "llava"; process_images reads it as `config.anyres_protocol`."""
        return self._anyres or self.preset.anyres or ("llava" if self._pruner.tokens is None else "paper")

    def set_pruner(
        self,
        pruner: Pruner | str | None = None,
        tokens: int | None = None,
        important_ratio: float = 0.5,
        anyres: str | None = None,
    ) -> Pruner:
        """Change the pruning of a loaded model, starting with the next image.

        Args:
            pruner: a `Pruner`, the name of one, or None ("vispruner" if `tokens` is given, else no pruning).
            tokens: visual tokens to keep per crop.
            important_ratio: share of them selected by attention.
            anyres: "paper", "llava" or "auto" (the preset's, else "paper" if tokens are pruned and "llava" if
                not); None keeps an earlier choice.

        Raises:
            ValueError: unknown name or invalid value.
        """
        if anyres not in (None, "auto", *PROTOCOLS):
            raise ValueError(f"anyres: {anyres!r} is unknown. Choose one of {', '.join(PROTOCOLS)}, auto.")
        if pruner is None:
            pruner = "none" if tokens is None else "vispruner"
        if isinstance(pruner, str):
            pruner = get_pruner(pruner, tokens=tokens, important_ratio=important_ratio)
        elif not isinstance(pruner, Pruner):
            raise ValueError(f"pruner: {pruner!r} is neither a Pruner nor a name. Pass a budget as tokens=.")
        elif tokens is not None:
            raise ValueError(
                "pruner and tokens are both given, but a Pruner has its own budget. Pass one of them."
            )
        self._pruner = pruner
        self._anyres = None if anyres == "auto" else anyres or self._anyres
        self.config.anyres_protocol = self.anyres
        return pruner

    def get_visual_token_num(self) -> int:
        """Return the visual tokens that are kept per crop; all of them without pruning."""
        tower, budget = self.get_vision_tower(), self._pruner.tokens
        patches = None if tower is None else tower.num_patches
        return patches if budget is None else budget if patches is None else min(budget, patches)

    def get_important_ratio(self) -> float:
        """Return the share of kept tokens that is selected by attention."""
        return self._pruner.important_ratio

    # --- images -> visual tokens -------------------------------------------------------------------------
    def encode_vision(
        self, images: Tensor | list[Tensor], image_sizes: object = None
    ) -> list[VisionFeatures]:
        """Run the tower once for every image, independent of the pruner and the question.

        Args:
            images: (B, 3, H, W), (B, crops, 3, H, W), a single (3, H, W), or a list of (3, H, W) or
                (crops, 3, H, W); any float dtype, any device.
            image_sizes: (width, height) of each original image.
        """
        tower = self.get_vision_tower()
        if tower is None:
            raise ValueError("the model has no vision tower. Load it with load_pretrained_model.")
        crops, as_crops = as_image_list(images)
        sizes = as_size_list(image_sizes, len(crops))
        if not crops:
            return []
        if self.preset.pixel_dtype is not None:
            crops = [image.to(self.preset.pixel_dtype) for image in crops]
        shapes = {tuple(image.shape[1:]) for image in crops}
        if len(shapes) > 1:
            raise ValueError(
                f"images: different crop sizes in one batch: {sorted(shapes)}. Use one image processor."
            )
        counts = [len(image) for image in crops]
        pixels = torch.cat([image.to(tower.device, non_blocking=True) for image in crops])
        features, attention = tower(pixels, counts, self.runtime.runner(self, "vision tower"))
        # The projector needs features in its own dtype, and selection uses the same values as the projector.
        features = features.to(device=self._projector_place[0], dtype=self._projector_place[1])
        attention = attention.to(features.device)
        return [
            VisionFeatures(f, a, size, CropKeys(image), as_crops)
            for f, a, size, image in zip(
                features.split(counts), attention.split(counts), sizes, crops, strict=True
            )
        ]

    @property
    def _projector_place(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self.get_model().mm_projector.parameters(), None)
        weight = self.get_input_embeddings().weight if weight is None else weight
        return weight.device, weight.dtype

    def visual_tokens(
        self,
        vision: VisionFeatures,
        pruner: Pruner | str | None = USE_CURRENT,
        question: TextCue | None = None,
    ) -> VisualTokens:
        """Prune one image's tokens, project the kept ones and put them in order for the language model.

        One image at a time, so that the shape of the projector's product, and with it the last bit, does not
        depend on the batch.

        Args:
            vision: from `encode_vision`.
            pruner: another `Pruner` than the model's own, or None for all tokens. Crops are merged by the
                model's `anyres` protocol in any case.
            question: for a pruner that needs it.
        """
        pruner = self._chosen(pruner)
        asked = {"question": question} if pruner.needs_question else {}
        kept = pruner.keep(vision.features, vision.attention, vision.keys, **asked)
        embeds = self._project(vision.features, kept.indices, pruner, vision.image_size, vision.as_crops)
        return VisualTokens(embeds, kept)

    def visual_tokens_deferred(
        self, visions: Sequence[VisionFeatures], pruner: Pruner | str | None = USE_CURRENT
    ) -> list[VisualTokens]:
        """Prune, project and order the tokens of several images without waiting for the device.

        Equal to `visual_tokens` of each, except that the checks of values are not read: where `doubt` of the
        result is True, `visual_tokens` has to be called, which raises, or computes rare cases with care.
        Methods that choose by the question or draw at random are computed by `visual_tokens`.
        """
        pruner = self._chosen(pruner)
        if self._asks_the_host(pruner):
            return [self.visual_tokens(vision, pruner) for vision in visions]
        found: dict[int, VisualTokens] = {}
        for places in self._of_one_shape(visions):
            group = [visions[place] for place in places]
            try:
                tokens = self._tokens_of_one_shape(group, pruner)
            except IdsReadError:
                self._read_ids.add(type(pruner))
                return self.visual_tokens_deferred(visions, pruner)
            found |= zip(places, tokens, strict=True)
        return [found[place] for place in range(len(visions))]

    @staticmethod
    def _of_one_shape(visions: Sequence[VisionFeatures]) -> list[list[int]]:
        """Group images that are pruned together: equal shapes, and with several crops one size."""
        groups: dict[Any, list[int]] = {}
        for place, one in enumerate(visions):
            size = one.image_size if len(one.features) > 1 else None
            key = (one.features.shape, one.attention.shape, size, one.as_crops)
            groups.setdefault(key, []).append(place)
        return list(groups.values())

    def _tokens_of_one_shape(self, group: Sequence[VisionFeatures], pruner: Pruner) -> list[VisualTokens]:
        first = group[0]
        crops = len(first.features)
        select = partial(
            self._select, pruner=pruner, size=first.image_size, as_crops=first.as_crops, crops=crops
        )
        inputs = [torch.cat([getattr(one, name) for one in group]) for name in ("features", "attention")]
        run = (
            self.runtime.runner(self, "selection")
            if self._is_capturable(pruner, crops, first.as_crops)
            else None
        )
        if run is None:
            *embeds, indices, important, doubt = select(*inputs)
        else:
            key = (pruner, self.anyres, crops, first.image_size if crops > 1 else None, first.as_crops)
            *embeds, indices, important, doubt = run(key, select, *inputs)
        rows = zip(indices.split(crops), important.split(crops), strict=True)
        return [VisualTokens(e, Kept(*row), doubt) for e, row in zip(embeds, rows, strict=True)]

    def _select(
        self,
        features: Tensor,
        attention: Tensor,
        pruner: Pruner,
        size: tuple[int, int] | None,
        as_crops: bool,
        crops: int,
    ) -> tuple[Tensor, ...]:
        """Prune and project images of `crops` crops each.

        Args:
            features: (n crops, N, C) of n images.
            attention: (n crops, H, N).

        Returns:
            The visual tokens (L, D) of every image, kept indices and important (n crops, K), doubt ().
        """
        kept, doubt = pruner.keep_deferred(features, attention, UnreadableIds(len(features)))
        embeds = [
            self._project(of_image, indices, pruner, size, as_crops)
            for of_image, indices in zip(features.split(crops), kept.indices.split(crops), strict=True)
        ]
        return *embeds, kept.indices, kept.important, doubt

    def _is_capturable(self, pruner: Pruner, crops: int, as_crops: bool) -> bool:
        """Return whether pruning needs nothing from the host, which orders newlines and draws at random."""
        return not self._asks_the_host(pruner) and not self._has_newlines(crops, as_crops)

    def _asks_the_host(self, pruner: Pruner) -> bool:
        return pruner.needs_question or pruner.uses_seed or type(pruner) in self._read_ids

    def image_tokens_deferred(
        self, images: Tensor | list[Tensor], image_sizes: object = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Encode and prune images for one answer: `encode_vision` and `visual_tokens_deferred` in one stage.

        Returns:
            Visual tokens (L, D) of every image, which the next call may overwrite; and flags () on the
            device, True: the tokens may be wrong, call `encode_images`.
        """
        found = self._image_tokens_in_one_stage(images, image_sizes)
        if found is not None:
            return [found[0]], [found[1]]
        tokens = self.visual_tokens_deferred(self.encode_vision(images, image_sizes))
        return [one.embeds for one in tokens], [one.doubt for one in tokens if one.doubt is not None]

    def _image_tokens_in_one_stage(
        self, images: Tensor | list[Tensor], image_sizes: object
    ) -> tuple[Tensor, Tensor] | None:
        """Return tokens and doubt of a single image by one captured stage; None where it is impossible."""
        tower, pruner = self.get_vision_tower(), self._pruner
        crops, as_crops = as_image_list(images)
        if tower is None or not tower.is_loaded or len(crops) != 1:
            return None
        pixels, (size,) = crops[0], as_size_list(image_sizes, 1)
        count, side = len(pixels), tower.image_size
        fits = pixels.shape[1:] == (3, side, side) and self._is_capturable(pruner, count, as_crops)
        run = self.runtime.runner(self, "vision") if fits else None
        if run is None:
            return None
        if self.preset.pixel_dtype is not None:
            pixels = pixels.to(self.preset.pixel_dtype)
        pixels = tower.on_device(pixels)
        if tower.passes(pixels, [count]) != [(0, count, count)]:
            return None
        device, dtype = self._projector_place

        def see(pixels: Tensor) -> tuple[Tensor, Tensor]:
            features, attention = tower.forward_features(pixels)
            features, attention = features.to(device=device, dtype=dtype), attention.to(device)
            found = self._select(features, attention, pruner, size, as_crops, count)
            return found[0], found[-1]

        key = (pruner, self.anyres, size if count > 1 else None, as_crops)
        try:
            embeds, doubt = run(key, see, pixels, copies=False)
            return embeds, doubt.clone()  # it is read after other graphs were replayed
        except IdsReadError:
            self._read_ids.add(type(pruner))
            return None

    def _chosen(self, pruner: Pruner | str | None) -> Pruner:
        pruner = self._pruner if isinstance(pruner, str) and pruner == USE_CURRENT else pruner
        return get_pruner("none") if pruner is None else pruner

    def _project(
        self,
        features: Tensor,
        indices: Tensor,
        pruner: Pruner,
        image_size: tuple[int, int] | None,
        as_crops: bool,
    ) -> Tensor:
        """Project the kept patches `indices` (crops, K) of `features` (crops, N, C), in final order: (L, D).

        Waits for the device only where the kept patches decide the number of tokens: pruned crops without
        their padding (protocol "llava").
        """
        crops, patches = features.shape[:2]
        newlines = self._has_newlines(crops, as_crops)
        if indices.shape[1] == patches:  # all of them: known without asking the device
            place = "cpu" if newlines else indices.device
            indices = torch.arange(patches, device=place).expand(crops, -1)
        layout = token_layout(
            indices,
            side=self.get_vision_tower().num_patches_per_side,
            protocol=self.anyres,
            merge_type=getattr(self.config, "mm_patch_merge_type", None) or "flat",
            image_size=image_size,
            grid=self._grid(crops, image_size),
            as_crops=as_crops,
        )
        indices = indices.to(layout.device)
        rows = (indices + torch.arange(crops, device=layout.device)[:, None] * patches).flatten()
        newline = layout == NEWLINE  # (L,), on CPU if there are any
        rows = rows[layout[~newline] if newlines else layout].to(features.device, non_blocking=True)
        embeds = self.get_model().mm_projector(features.flatten(0, 1)[rows])  # (n, D)
        if not newlines:
            return embeds
        if crops > 1 and (shape := self._shrunk(pruner, crops, newline)) is not None:
            grid, height = embeds[patches:], int(newline.sum())  # after the base crop: rows of a grid
            grid = grid.view(1, height, -1, grid.shape[-1]).permute(0, 3, 1, 2)
            grid = functional.interpolate(grid, size=shape, mode="bilinear")[0].permute(1, 2, 0)
            ends = self.get_model().image_newline.to(embeds).expand(shape[0], 1, -1)
            return torch.cat([embeds[:patches], torch.cat([grid, ends], dim=1).flatten(0, 1)])
        embeds = torch.cat([embeds, self.get_model().image_newline.to(embeds)[None]])
        place = torch.where(newline, len(embeds) - 1, (~newline).cumsum(0) - 1)
        return embeds[place.to(embeds.device, non_blocking=True)]

    def _has_newlines(self, crops: int, as_crops: bool) -> bool:
        merge_type = getattr(self.config, "mm_patch_merge_type", None) or "flat"
        return has_newlines(self.anyres, merge_type, crops, as_crops)

    def _shrunk(self, pruner: Pruner, crops: int, newline: Tensor) -> tuple[int, int] | None:
        """Return the (height, width) that `anyres_max_N` resizes the grid to, None if it stays as it is.

        Args:
            newline: (L,) bool, True where the merged tokens have a newline, at the end of every row.
        """
        match = ANYRES_MAX.fullmatch(str(getattr(self.config, "image_aspect_ratio", None)))
        if match is None:
            return None
        side, height = self.get_vision_tower().num_patches_per_side, int(newline.sum())
        if pruner.tokens is None:
            return shrunk_grid(height, (len(newline) - side**2) // height - 1, int(match[1]), side)
        if crops - 1 > int(match[1]) and not self._told_unshrunk:
            self._told_unshrunk = True
            warnings.warn(
                f"image_aspect_ratio {match[0]}: pruned tokens are not resized to {match[1]} tiles under "
                "anyres='llava', because they have places and no grid.",
                stacklevel=3,
            )
        return None

    def _grid(self, crops: int, image_size: tuple[int, int] | None) -> tuple[int, int] | None:
        """Return the (columns, rows) of tiles that an image should have been cut into."""
        if crops == 1:
            return None
        if self.anyres == "paper":
            return (2, 2)
        if image_size is None:
            return None
        from llava.mm_utils import get_anyres_image_grid_shape

        side = self.get_vision_tower().image_size
        return get_anyres_image_grid_shape(image_size, self.config.image_grid_pinpoints, side)

    def encode_images(self, images: Tensor | list[Tensor], image_sizes: object = None) -> list[Tensor]:
        """Return the visual tokens (K_i, D) of every image: encoded, pruned, projected and merged."""
        return [self.visual_tokens(v).embeds for v in self.encode_vision(images, image_sizes)]

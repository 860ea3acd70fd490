"""Project the tokens of an image that stay, and put them in the order of the prompt.

Mixed into the model below `visual.py`. Crops are merged by the model's anyres protocol (`anyres.py`); places
are what positions='original' needs. Independent of how tokens were selected.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from llava.model.anyres import NEWLINE, has_newlines, shrunk_grid, token_layout
from llava.model.checkpoint.entries import ANYRES_MAX
from llava.model.features import VisionFeatures
from llava.pruning import Kept, Pruner
from llava.pruning.base import NO_TOKEN


class TokenOrderMixin:
    """Mixed into a model with `get_model()`, `get_vision_tower()`, `anyres` and `config`."""

    _told_unshrunk = False

    @property
    def _projector_place(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self.get_model().mm_projector.parameters(), None)
        weight = self.get_input_embeddings().weight if weight is None else weight
        return weight.device, weight.dtype

    def _project(
        self,
        features: Tensor,
        kept: Kept,
        pruner: Pruner,
        image_size: tuple[int, int] | None,
        as_crops: bool,
        cues: Mapping[str, Tensor],
    ) -> Tensor:
        """Project the kept tokens of `features` (crops, N, C), in final order: (L, D).

        Waits for the device only where the kept patches decide the number of tokens: pruned crops without
        their padding (protocol "llava"), and methods that choose their number.
        """
        steps = self._projecting(features, kept, pruner, image_size, as_crops, cues)
        rows = next(steps)
        return _last(steps, self.get_model().mm_projector(rows) if rows is not None else None)

    def project_together(
        self, visions: Sequence[VisionFeatures], kept: Sequence[Kept], pruner: Pruner
    ) -> tuple[list[Tensor], Tensor]:
        """Project the kept tokens of several images in one call of the projector, for training.

        A further row of zeros is projected, so that projector and newline have a gradient, and the projector
        is called once, however many images a process has.

        Returns:
            The tokens (L_i, D) of every image in final order, and a scalar: 0 with gradients of 0, to be
            added to what the loss is computed from.
        """
        steps = [
            self._projecting(one.features, of_one, pruner, one.image_size, one.as_crops, {})
            for one, of_one in zip(visions, kept, strict=True)
        ]
        rows = [next(one) for one in steps]
        device, dtype = self._projector_place
        zero = torch.zeros(1, self.config.mm_hidden_size, device=device, dtype=dtype)
        embeds = self.get_model().mm_projector(torch.cat([*rows, zero]))
        *parts, last = embeds.split([*map(len, rows), 1])
        nothing = last.sum() * 0
        if (newline := getattr(self.get_model(), "image_newline", None)) is not None:
            nothing = nothing + newline.sum() * 0
        return [_last(one, part) for one, part in zip(steps, parts, strict=True)], nothing

    def _projecting(
        self,
        features: Tensor,
        kept: Kept,
        pruner: Pruner,
        image_size: tuple[int, int] | None,
        as_crops: bool,
        cues: Mapping[str, Tensor],
    ) -> Generator[Tensor | None, Tensor | None, Tensor]:
        """Yield the rows (n, C) to project, None if `cues` has them; take them back, return them in order."""
        crops, patches = features.shape[:2]
        indices, pooled = kept.indices, len(kept.indices) != crops
        newlines = self.has_newlines(crops, as_crops)
        if kept.features is not None:
            return (yield from self._projecting_merged(kept, pruner, image_size, as_crops))
        if indices.shape[1] == patches and not pooled:  # all of them: known without asking the device
            place = "cpu" if newlines else indices.device
            indices = torch.arange(patches, device=place).expand(crops, -1)
        layout = self.layout(crops, image_size, as_crops)(indices)
        indices = indices.to(layout.device)
        if not pooled:
            indices = indices + torch.arange(crops, device=layout.device)[:, None] * patches
        newline = layout == NEWLINE  # (L,), on CPU if there are any
        rows = indices.flatten()[layout[~newline] if newlines else layout]
        rows = rows.to(features.device, non_blocking=True)
        if "projected" in cues:  # all patches were projected already, for the method
            yield None
            embeds = cues["projected"].flatten(0, 1)[rows]
        else:
            embeds = yield features.flatten(0, 1)[rows]  # (n, D)
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

    def _projecting_merged(
        self, kept: Kept, pruner: Pruner, image_size: tuple[int, int] | None, as_crops: bool
    ) -> Generator[Tensor, Tensor, Tensor]:
        """Yield merged features to project, and return them in final order: (L, D)."""
        crops = len(kept.indices)
        if crops > 1 and self.has_newlines(crops, as_crops):
            raise ValueError(
                f"anyres: {pruner.name!r} merges tokens, which have no rows that a newline could end. Set "
                "anyres='paper'."
            )
        layout = self.layout(crops, image_size, as_crops, newlines=False)(kept.indices)
        if pruner.is_adaptive:
            layout = layout[kept.indices.flatten()[layout] != NO_TOKEN]
        rows = kept.features.flatten(0, 1)[layout]
        weight = self._projector_place
        embeds = yield rows.to(device=weight[0], dtype=weight[1])
        if self.has_newlines(crops, as_crops):  # of a single crop: one, at the end
            embeds = torch.cat([embeds, self.get_model().image_newline.to(embeds)[None]])
        return embeds

    def layout(
        self, crops: int, image_size: tuple[int, int] | None, as_crops: bool, newlines: bool = True
    ) -> Callable[[Tensor], Tensor]:
        """Return `token_layout` for the kept places of one image; a single crop may be without newline."""
        return partial(
            token_layout,
            side=self.get_vision_tower().num_patches_per_side,
            protocol=self.anyres if newlines or crops > 1 else "paper",
            merge_type=getattr(self.config, "mm_patch_merge_type", None) or "flat",
            image_size=image_size,
            grid=self._grid(crops, image_size),
            as_crops=as_crops,
            crops=crops,
        )

    def has_newlines(self, crops: int, as_crops: bool) -> bool:
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

    def _places(self, vision: VisionFeatures, kept: Kept, pruner: Pruner) -> tuple[Tensor, int]:
        """Return the places (L,) of the kept tokens among those of the unpruned image, and their number."""
        crops, patches = vision.features.shape[:2]
        newlines = self.has_newlines(crops, vision.as_crops)
        if (crops > 1 and newlines) or (kept.features is not None and bool((kept.indices < 0).any())):
            what = "newlines" if newlines else "merged tokens"
            raise ValueError(
                f"positions: {what} of {pruner.name!r} have no original position. Set positions='contiguous'"
                + (", or anyres='paper'." if newlines else ".")
            )
        layout = self.layout(crops, vision.image_size, vision.as_crops, newlines=False)
        indices, device = kept.indices, kept.indices.device
        if len(indices) == crops:
            indices = indices + torch.arange(crops, device=device)[:, None] * patches
        place = torch.empty(crops * patches, dtype=torch.int64, device=device)
        full = torch.arange(patches, device=device).expand(crops, -1)
        place[layout(full)] = torch.arange(crops * patches, device=device)
        places = place[indices.flatten()[layout(kept.indices)]]
        if newlines:  # of a single crop: one, at the end
            places = torch.cat([places, places.new_tensor([patches])])
        return places, crops * patches + newlines


def _last(steps: Generator[Tensor | None, Tensor | None, Tensor], embeds: Tensor | None) -> Tensor:
    """Send projected rows to `_projecting`, and return what it returns."""
    try:
        steps.send(embeds)
    except StopIteration as end:
        return end.value
    raise RuntimeError("projecting: rows were asked for twice.")

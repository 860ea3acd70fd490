"""Turn images into the visual tokens of a language model: encode, prune, project, put in order.

Mixed into the causal language model by `llava_arch.py`. The pruner is called between tower and projector, so
that only kept tokens are projected. Independent of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava.model.anyres import PROTOCOLS
from llava.model.clips import CLIP_BUDGETS, ClipTokenMixin
from llava.model.features import (
    CropKeys,
    IdsReadError,
    UnreadableIds,
    VisionFeatures,
    VisualTokens,
    as_image_list,
    as_media_list,
    as_size_list,
)
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.cues import tower_cues
from llava.model.settings import PRESETS, Preset
from llava.model.token_order import TokenOrderMixin
from llava.pruning import Kept, Pruner, TextCue, get_pruner
from llava.pruning.base import parse_cue

POSITIONS = ("contiguous", "original")
# Cues of single patches, and the dimension of the patches: crops can be joined along it
_OF_PATCHES = {"attention": 2, "received": 1, "features": 1, "projected": 1, "image_embeds": 1}
USE_CURRENT = "use current"  # default of visual_tokens(pruner=): the model's own pruner


class VisualTokenMixin(ClipTokenMixin, TokenOrderMixin):
    """Mixed into a model with `get_model()` (towers, projector, image_newline) and `config`."""

    def init_pruning(self) -> None:
        """Start without pruning. Called once by the constructor."""
        self._pruner = get_pruner("none")
        self._anyres: str | None = None
        self.positions = "contiguous"
        self.preset: Preset = PRESETS["exact"]
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
        positions: str | None = None,
        clip_budget: str | None = None,
    ) -> Pruner:
        """Change the pruning of a loaded model, starting with the next image.

        Args:
            pruner: a `Pruner`, the name of one, or None ("vispruner" if `tokens` is given, else no pruning).
            tokens: visual tokens to keep per crop; of a clip as `clip_budget` says.
            important_ratio: share of them selected by attention.
            anyres: "paper", "llava" or "auto" (the preset's, else "paper" if tokens are pruned and "llava" if
                not); None keeps an earlier choice.
            positions: of kept tokens in the prompt, "contiguous" (as in the released code) or "original",
                those of the unpruned prompt, for which decoding is greedy; None keeps an earlier choice.
            clip_budget: what the budget is for a clip: "frame" (of every frame), "total" (of the clip, split
                over its frames) or "clip" (of the clip, over all frames at once); None keeps an earlier
                choice.

        Raises:
            ValueError: unknown name or invalid value.
        """
        if positions not in (None, *POSITIONS):
            raise ValueError(f"positions: {positions!r} is unknown. Choose one of {', '.join(POSITIONS)}.")
        if clip_budget not in (None, *CLIP_BUDGETS):
            known = ", ".join(CLIP_BUDGETS)
            raise ValueError(f"clip_budget: {clip_budget!r} is unknown. Choose one of {known}.")
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
        self.positions = positions or self.positions
        self.clip_budget = clip_budget or self.clip_budget
        self.config.anyres_protocol = self.anyres
        return pruner

    def check_pruner(self, pruner: Pruner) -> None:
        """Raise `ValueError` if this model does not have what a method reads."""
        try:
            for tower in self.get_model().towers():
                if not tower.is_loaded:
                    continue
                for cue in pruner.cues:
                    parse_cue(cue, tower.config.num_hidden_layers)
                tower.prepare(tower_cues(pruner.cues))
                if "text_embeds" in pruner.cues:
                    tower.clip.text_embeds("")
                if pruner.acts_in == "decoder":
                    pruner.visual_per_layer(self.config.num_hidden_layers, tower.num_patches)
        except ValueError as error:
            raise ValueError(f"{pruner.name}: {error}") from error

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
        self,
        images: Tensor | list[Tensor],
        image_sizes: object = None,
        cues: Sequence[str] | None = None,
    ) -> list[VisionFeatures]:
        """Run the tower once for every image, independent of budget and question.

        Args:
            images: (B, 3, H, W), (B, crops, 3, H, W), a single (3, H, W), or a list of (3, H, W) or
                (crops, 3, H, W); any float dtype, any device. Of a model that takes clips, see
                `as_media_list`: a list of (3, H, W) or (3, frames, H, W).
            image_sizes: (width, height) of each original image.
            cues: what methods read besides features and [CLS] attention (default: what the model's own
                pruner reads); cues that the tower does not compute are ignored.

        Raises:
            ValueError: the tower does not have a cue.
        """
        cues = tower_cues(self._pruner.cues if cues is None else cues)
        tower, video = self.get_vision_tower(), self.get_video_tower()
        if tower is None:
            raise ValueError("the model has no vision tower. Load it with load_pretrained_model.")
        if video is None:
            crops, as_crops = as_image_list(images)
            return self._encode(tower, crops, as_size_list(image_sizes, len(crops)), as_crops, cues)
        media, clips = as_media_list(images, video.num_frames)
        sizes = as_size_list(image_sizes, len(media))
        found: dict[int, VisionFeatures] = {}
        for is_clip in sorted(set(clips)):
            places = [place for place, one in enumerate(clips) if one == is_clip]
            encoder = video if is_clip else self.get_model().vision_tower
            if encoder is None:
                raise ValueError(
                    f"images[{places[0]}]: a picture, but the model takes only clips (mm_image_tower in "
                    f"config.json is empty). Pass (3, {video.num_frames}, H, W)."
                )
            parts = [media[place] for place in places], [sizes[place] for place in places]
            found |= zip(places, self._encode(encoder, *parts, False, cues, is_clip), strict=True)
        return [found[place] for place in range(len(media))]

    def _encode(
        self,
        tower: VisionTower,
        crops: list[Tensor],
        sizes: list[tuple[int, int] | None],
        as_crops: bool,
        cues: tuple[str, ...],
        is_clip: bool = False,
    ) -> list[VisionFeatures]:
        """Run a tower on images of (crops, 3, H, W), or on clips of (frames, 3, H, W)."""
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
        run = None if is_clip else self.runtime.runner(self, "vision tower")
        asked = tuple(dict.fromkeys((*cues, "cls"))) if is_clip else cues
        features, attention, *found = tower(pixels, counts, run, asked)
        if is_clip:  # unpruned, the [CLS] of every frame is a visual token
            features = torch.cat([found[asked.index("cls")][:, None], features], dim=1)
            found = found[: len(cues)]
        # The projector needs features in its own dtype, and selection uses the same values as the projector.
        features = features.to(device=self._projector_place[0], dtype=self._projector_place[1])
        attention = attention.to(features.device)
        parts = [cue.to(features.device).split(counts) for cue in found]
        return [
            VisionFeatures(f, a, size, CropKeys(image), as_crops, dict(zip(cues, rest, strict=True)), is_clip)
            for f, a, size, image, *rest in zip(
                features.split(counts), attention.split(counts), sizes, crops, *parts, strict=True
            )
        ]

    def visual_tokens(
        self,
        vision: VisionFeatures,
        pruner: Pruner | str | None = USE_CURRENT,
        question: TextCue | None = None,
    ) -> VisualTokens:
        """Prune the tokens of an image or clip, project the kept ones and put them in order for the prompt.

        One image at a time, so that the shape of the projector's product, and with it the last bit, does not
        depend on the batch.

        Args:
            vision: from `encode_vision`.
            pruner: another `Pruner` than the model's own, or None for all tokens. Crops are merged by the
                model's `anyres` protocol in any case.
            question: for a pruner that needs it.
        """
        pruner = self._chosen(pruner)
        if vision.is_clip:
            return self._tokens_of_clip(vision, pruner, question)
        if self._pools_newlines(pruner, vision):
            return self._tokens_of_pool(vision, pruner)
        cues = self._cues(pruner, vision.features, vision.cues, question)
        rows, pooled = self._rows(pruner, vision.features, vision.attention, cues, crops=len(vision.features))
        asked = {"question": question} if pruner.needs_question else {}
        kept = pooled.keep(*rows[:2], vision.keys if pooled is pruner else None, cues=rows[2], **asked)
        embeds = self._project(vision.features, kept, pruner, vision.image_size, vision.as_crops, cues)
        if not self.keeps_positions(pruner):
            return VisualTokens(embeds, kept)
        places, span = self._places(vision, kept, pruner)
        return VisualTokens(embeds, kept, places=places, span=span)

    def keeps_positions(self, pruner: Pruner) -> bool:
        """Return whether tokens that a method keeps have their positions in the unpruned prompt."""
        chosen = pruner.positions or self.positions
        prunes = pruner.tokens is not None or pruner.is_adaptive
        return chosen == "original" and pruner.acts_in == "image" and prunes

    def _cues(
        self,
        pruner: Pruner,
        features: Tensor,
        cues: Mapping[str, Tensor],
        question: TextCue | None = None,
        tower: VisionTower | None = None,
    ) -> dict[str, Tensor]:
        """Return the cues that a method reads: those of the tower, and those that follow from its features.

        Args:
            features: (n, N, C).
            cues: of the tower, (n, ...) each.
            tower: that for clips, if it computed them.

        Raises:
            ValueError: the image was encoded without a cue, or the model does not have it.
        """
        found, tower = {}, tower or self.get_vision_tower()
        for cue in pruner.cues:
            if cue == "projected":
                projector = self.get_model().mm_projector
                found[cue] = torch.stack([projector(one) for one in features])  # one shape per crop
            elif cue == "image_embeds":
                found[cue] = tower.clip.image_embeds(features)
            elif cue == "text_embeds":
                if question is not None:
                    text = question.text if question.bare is None else question.bare
                    found[cue] = tower.clip.text_embeds(text).to(features.device)
            elif cue in cues:
                found[cue] = cues[cue]
            elif cue != "attention":
                parse_cue(cue, tower.config.num_hidden_layers)
                raise ValueError(
                    f"cues: the image was encoded without {cue!r}, which {pruner.name!r} reads. Encode it "
                    "with encode_vision(images, cues=pruner.cues)."
                )
        return found

    @classmethod
    def _rows(
        cls, pruner: Pruner, features: Tensor, attention: Tensor, cues: dict[str, Tensor], crops: int
    ) -> tuple[tuple[Tensor, Tensor, dict[str, Tensor]], Pruner]:
        """Return what `Pruner.keep` gets; a method that selects per image gets all crops as one row.

        Args:
            features, attention, cues: (n crops, ...) of n images.
        """
        if not pruner.per_image or crops == 1:
            return (features, attention, cues), pruner
        budget = None if pruner.tokens is None else pruner.tokens * crops
        return cls._join(pruner, features, attention, cues, crops), replace(pruner, tokens=budget)

    @staticmethod
    def _join(
        pruner: Pruner, features: Tensor, attention: Tensor, cues: dict[str, Tensor], crops: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Join the crops of an image, or the frames of a clip, to one row of `crops` * N patches.

        Args:
            features, attention, cues: (n crops, ...) of n images.
        """

        def join(tensor: Tensor, dim: int) -> Tensor:
            images = tensor.view(-1, crops, *tensor.shape[1:]).movedim(1, dim)
            return images.flatten(dim, dim + 1)

        for name in cues:
            if name.partition("@")[0] not in _OF_PATCHES:
                raise ValueError(
                    f"cues: {pruner.name!r} would select over all crops or frames by {name!r}, which has no "
                    f"row per patch. Read {', '.join(_OF_PATCHES)}, or select per crop or frame."
                )
        joined = {name: join(cue, _OF_PATCHES[name.partition("@")[0]]) for name, cue in cues.items()}
        return join(features, 1), join(attention, 2), joined

    def _pools_newlines(self, pruner: Pruner, vision: VisionFeatures) -> bool:
        crops = len(vision.features)
        return pruner.per_image and crops > 1 and self.has_newlines(crops, vision.as_crops)

    def _tokens_of_pool(self, vision: VisionFeatures, pruner: Pruner) -> VisualTokens:
        """Prune the whole sequence of an image, newlines included, to the same share of tokens.

        As DivPrune does on LLaVA-NeXT. Only methods that read nothing but projected tokens can.
        """
        if tuple(pruner.cues) != ("projected",):
            raise ValueError(
                f"anyres: {pruner.name!r} selects per image by cues that newlines do not have. Set "
                "anyres='paper'."
            )
        crops, patches = vision.features.shape[:2]
        every = torch.arange(patches, device=vision.features.device).expand(crops, -1)
        whole = Kept(every, torch.zeros_like(every, dtype=torch.bool))
        unpruned = get_pruner("none")
        embeds = self._project(vision.features, whole, unpruned, vision.image_size, vision.as_crops, {})
        count = len(embeds)
        if pruner.tokens is not None:
            pruner = replace(pruner, tokens=round(pruner.tokens / patches * count))
        row = embeds[None]  # (1, L, D)
        kept = pruner.keep(row, row.new_zeros(1, 1, count), cues={"projected": row})
        return VisualTokens(embeds[kept.indices[0]], kept)

    def visual_tokens_deferred(
        self, visions: Sequence[VisionFeatures], pruner: Pruner | str | None = USE_CURRENT
    ) -> list[VisualTokens]:
        """Prune, project and order the tokens of several images without waiting for the device.

        Equal to `visual_tokens` of each, except that the checks of values are not read: where `doubt` of the
        result is True, `visual_tokens` has to be called, which raises, or computes rare cases with care.
        Methods that choose by the question or draw at random are computed by `visual_tokens`.
        """
        pruner = self._chosen(pruner)
        careful = self._asks_the_host(pruner) or self.keeps_positions(pruner)
        if careful or any(one.is_clip or self._pools_newlines(pruner, one) for one in visions):
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
            key = (one.features.shape, one.attention.shape, size, one.as_crops, tuple(one.cues))
            groups.setdefault(key, []).append(place)
        return list(groups.values())

    def _tokens_of_one_shape(self, group: Sequence[VisionFeatures], pruner: Pruner) -> list[VisualTokens]:
        first = group[0]
        crops = len(first.features)
        names = tower_cues(pruner.cues)
        select = partial(
            self._select,
            names=names,
            pruner=pruner,
            size=first.image_size,
            as_crops=first.as_crops,
            crops=crops,
        )
        inputs = [torch.cat([getattr(one, name) for one in group]) for name in ("features", "attention")]
        inputs += [torch.cat([one.cues[name] for one in group]) for name in names]
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
        each = 1 if pruner.per_image else crops
        rows = zip(indices.split(each), important.split(each), strict=True)
        return [VisualTokens(e, Kept(*row), doubt=doubt) for e, row in zip(embeds, rows, strict=True)]

    def _select(
        self,
        features: Tensor,
        attention: Tensor,
        *cues: Tensor,
        names: Sequence[str],
        pruner: Pruner,
        size: tuple[int, int] | None,
        as_crops: bool,
        crops: int,
    ) -> tuple[Tensor, ...]:
        """Prune and project images of `crops` crops each.

        Args:
            features: (n crops, N, C) of n images.
            attention: (n crops, H, N).
            cues: the tower's cues `names`, (n crops, ...) each.

        Returns:
            The visual tokens (L, D) of every image, kept indices and important (n crops, K), doubt ().
        """
        read = self._cues(pruner, features, dict(zip(names, cues, strict=True)))
        rows, pooled = self._rows(pruner, features, attention, read, crops)
        kept, doubt = pooled.keep_deferred(*rows[:2], UnreadableIds(len(rows[0])), cues=rows[2])
        images, each = len(features) // crops, len(kept.indices) // (len(features) // crops)
        embeds = []
        for image in range(images):
            here = slice(image * crops, (image + 1) * crops)
            part = kept[image * each : (image + 1) * each]
            of_image = {name: cue[here] for name, cue in read.items()}
            embeds.append(self._project(features[here], part, pruner, size, as_crops, of_image))
        return *embeds, kept.indices, kept.important, doubt

    def _is_capturable(self, pruner: Pruner, crops: int, as_crops: bool) -> bool:
        """Return whether pruning needs nothing from the host, which orders newlines and draws at random."""
        return not self._asks_the_host(pruner) and not self.has_newlines(crops, as_crops)

    def _asks_the_host(self, pruner: Pruner) -> bool:
        return (
            pruner.needs_question
            or pruner.uses_seed
            or pruner.reads_values
            or pruner.is_adaptive
            or type(pruner) in self._read_ids
        )

    def image_tokens_deferred(
        self, images: Tensor | list[Tensor], image_sizes: object = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Encode and prune images for one answer: `encode_vision` and `visual_tokens_deferred` in one stage.

        Returns:
            Visual tokens (L, D) of every image or frame, which the next call may overwrite; and flags () on
            the device, True: the tokens may be wrong, call `encode_images`.
        """
        found = self._image_tokens_in_one_stage(images, image_sizes)
        if found is not None:
            return [found[0]], [found[1]]
        tokens = self.visual_tokens_deferred(self.encode_vision(images, image_sizes))
        parts = [part for one in tokens for part in one.parts]
        return parts, [one.doubt for one in tokens if one.doubt is not None]

    def _image_tokens_in_one_stage(
        self, images: Tensor | list[Tensor], image_sizes: object
    ) -> tuple[Tensor, Tensor] | None:
        """Return tokens and doubt of a single image by one captured stage; None where it is impossible."""
        tower, pruner = self.get_vision_tower(), self._pruner
        if self.get_video_tower() is not None:
            return None
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
        names = tower_cues(pruner.cues)
        tower.prepare(names)

        def see(pixels: Tensor) -> tuple[Tensor, Tensor]:
            features, attention, *cues = tower.forward_features(pixels, names)
            features, attention = features.to(device=device, dtype=dtype), attention.to(device)
            cues = [cue.to(device) for cue in cues]
            found = self._select(
                features,
                attention,
                *cues,
                names=names,
                pruner=pruner,
                size=size,
                as_crops=as_crops,
                crops=count,
            )
            return found[0], found[-1]

        key = (pruner, self.anyres, size if count > 1 else None, as_crops)
        try:
            embeds, doubt = run(key, see, pixels, copies=False)
            return embeds, doubt.clone()  # it is read after other graphs were replayed
        except IdsReadError:
            self._read_ids.add(type(pruner))
            return None

    def _chosen(self, pruner: Pruner | str | None) -> Pruner:
        if pruner is None:
            return get_pruner("none")
        if isinstance(pruner, str) and pruner == USE_CURRENT:
            return self._pruner
        if not isinstance(pruner, Pruner):
            raise ValueError(
                f"pruner: {pruner!r} is not a Pruner. Pass get_pruner(name, tokens=64) of llava.pruning, or "
                "None for all tokens."
            )
        return pruner

    def encode_images(self, images: Tensor | list[Tensor], image_sizes: object = None) -> list[Tensor]:
        """Return the visual tokens (K_i, D) of every image or frame: encoded, pruned, projected, merged."""
        visions = self.encode_vision(images, image_sizes)
        return [part for one in visions for part in self.visual_tokens(one).parts]

"""encode -> prune -> project -> splice: what turns a language model into LLaVA with VisPruner.

`LlavaMetaModel` carries tower, projector and image_newline; `LlavaMetaForCausalLM` adds images to `forward`
and `generate`. Both are mixed into a language model of transformers in `language_model/`. The pruner decides
which tokens stay; this file decides where it is asked: between tower and projector, so that only kept tokens
are projected.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava.model.anyres import NEWLINE, PROTOCOLS, token_layout
from llava.model.features import (
    VisionFeatures,
    VisualTokens,
    as_image_list,
    as_size_list,
    crop_key,
)
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import Spliced, check_tags, splice
from llava.pruning import Pruner, get_pruner

USE_CURRENT = "use current"  # default of visual_tokens(pruner=): the model's own pruner


class LlavaMetaModel:
    """Mixed into the decoder (`model.model`): adds `vision_tower`, `mm_projector`, `image_newline`."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.vision_tower: VisionTower | None = None  # attached by the loader
        if getattr(config, "mm_hidden_size", None):
            self.mm_projector = build_vision_projector(config)
        if "unpad" in (getattr(config, "mm_patch_merge_type", None) or ""):
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)

    def get_vision_tower(self) -> VisionTower | None:
        return self.vision_tower


class LlavaMetaForCausalLM:
    """Mixed into a causal language model: images in, pruned, spliced, answered."""

    def init_pruning(self) -> None:
        """Start without pruning; called once by the constructor."""
        self._pruner = get_pruner("none")
        self._anyres: str | None = None
        self.config.anyres_protocol = self.anyres

    # --- parts -------------------------------------------------------------------------------------------
    def get_model(self) -> LlavaMetaModel:
        """The decoder, which also holds tower and projector."""
        return self.model

    def get_vision_tower(self) -> VisionTower | None:
        """The vision tower."""
        return self.get_model().get_vision_tower()

    # --- which tokens stay -------------------------------------------------------------------------------
    @property
    def pruner(self) -> Pruner:
        """The pruner in use; its name is "none" when nothing is pruned."""
        return self._pruner

    @property
    def anyres(self) -> str:
        """How crops are merged, "paper" or "llava"; process_images reads it as `config.anyres_protocol`."""
        return self._anyres or ("llava" if self._pruner.tokens is None else "paper")

    def set_pruner(
        self,
        pruner: Pruner | str | None = None,
        tokens: int | None = None,
        important_ratio: float = 0.5,
        anyres: str | None = None,
    ) -> Pruner:
        """Change the pruning of a loaded model; takes effect with the next image.

        pruner: a `Pruner`, the name of one, or None ("vispruner" if `tokens` is given, else no pruning).
        tokens: visual tokens to keep per crop. anyres: "paper" or "llava"; "auto" is "paper" while pruning
        and "llava" while not; None leaves an earlier choice alone. Raises `ValueError`.
        """
        if anyres not in (None, "auto", *PROTOCOLS):
            raise ValueError(f"anyres={anyres!r} is unknown; choose one of {', '.join(PROTOCOLS)}, auto")
        if pruner is None:
            pruner = "none" if tokens is None else "vispruner"
        if isinstance(pruner, str):
            pruner = get_pruner(pruner, tokens=tokens, important_ratio=important_ratio)
        elif tokens is not None:
            raise ValueError("give either a Pruner or tokens=, not both: a Pruner has its own budget")
        self._pruner = pruner
        self._anyres = None if anyres == "auto" else anyres or self._anyres
        self.config.anyres_protocol = self.anyres
        return pruner

    def save_pretrained(self, *args, **kwargs):
        """transformers' own, but a protocol that merely followed from the pruner is not written down: whoever
        loads the folder decides anew."""
        followed = self.config.anyres_protocol
        if self._anyres is None:
            del self.config.anyres_protocol
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.config.anyres_protocol = followed

    # --- images -> visual tokens -------------------------------------------------------------------------
    def encode_vision(
        self, images: Tensor | list[Tensor], image_sizes: object = None
    ) -> list[VisionFeatures]:
        """Run the tower once for every image; nothing here depends on the pruner or the question.

        images: (B, 3, H, W), (B, crops, 3, H, W), a single (3, H, W), or a list of (3, H, W) or
        (crops, 3, H, W); any float dtype, any device. image_sizes: (width, height) of each original picture.
        """
        tower = self.get_vision_tower()
        if tower is None:
            raise ValueError("this model has no vision tower; load it with load_pretrained_model")
        crops, as_crops = as_image_list(images)
        sizes = as_size_list(image_sizes, len(crops))
        if not crops:
            return []
        keys = [[crop_key(c) for c in image] for image in crops]
        shapes = {tuple(image.shape[1:]) for image in crops}
        if len(shapes) > 1:
            raise ValueError(f"images of different crop sizes in one batch: {sorted(shapes)}")
        features, attention = tower(torch.cat([image.to(tower.device) for image in crops]))
        # the projector reads features in its own dtype, and selection sees exactly what the projector reads
        features = features.to(device=self._projector_place[0], dtype=self._projector_place[1])
        attention = attention.to(features.device)
        counts = [len(image) for image in crops]
        return [
            VisionFeatures(f, a, size, key, as_crops)
            for f, a, size, key in zip(
                features.split(counts), attention.split(counts), sizes, keys, strict=True
            )
        ]

    @property
    def _projector_place(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self.get_model().mm_projector.parameters(), None)
        weight = self.get_input_embeddings().weight if weight is None else weight
        return weight.device, weight.dtype

    def visual_tokens(
        self, vision: VisionFeatures, pruner: Pruner | str | None = USE_CURRENT
    ) -> VisualTokens:
        """Prune, project what is kept, put it in order: one image's tokens for the language model.

        pruner: another `Pruner` than the model's own, or None for all tokens; crops are merged by the model's
        `anyres` protocol in any case. One image at a time, so that the shape of the projector's product, and
        with it the last bit, does not depend on the batch.
        """
        pruner = self._pruner if isinstance(pruner, str) and pruner == USE_CURRENT else pruner
        pruner = get_pruner("none") if pruner is None else pruner
        kept = pruner.keep(vision.features, vision.attention, vision.keys)
        crops, patches = vision.features.shape[:2]
        layout = token_layout(
            kept.indices,
            side=self.get_vision_tower().num_patches_per_side,
            protocol=self.anyres,
            merge_type=getattr(self.config, "mm_patch_merge_type", None) or "flat",
            image_size=vision.image_size,
            grid=self._grid(crops, vision.image_size),
            as_crops=vision.as_crops,
        ).to(vision.features.device)
        rows = kept.indices + torch.arange(crops, device=kept.indices.device)[:, None] * patches
        newline = layout == NEWLINE
        picked = vision.features.flatten(0, 1)[rows.flatten()[layout[~newline]]]  # (n, C)
        embeds = self.get_model().mm_projector(picked)  # (n, D)
        if newline.any():
            embeds = torch.cat([embeds, self.get_model().image_newline.to(embeds)[None]])
            place = torch.where(newline, len(embeds) - 1, (~newline).cumsum(0) - 1)
            embeds = embeds[place]
        return VisualTokens(embeds, kept)

    def _grid(self, crops: int, image_size: tuple[int, int] | None) -> tuple[int, int] | None:
        """(columns, rows) of tiles an image should have been cut into."""
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
        """Images -> their visual tokens (K_i, D), encoded, pruned, projected and merged. LLaVA's name."""
        return [self.visual_tokens(v).embeds for v in self.encode_vision(images, image_sizes)]

    # --- into the prompt ---------------------------------------------------------------------------------
    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """LLaVA's six values: (None, position_ids, attention_mask, past_key_values, inputs_embeds, labels).

        What came in as None (position_ids, attention_mask, labels) goes out as None. Without images, or for a
        single id (a decoding step), everything comes back as it was and inputs_embeds is None.
        Padding is on `config.tokenizer_padding_side` ("right" if unset).
        """
        if images is None or input_ids.shape[1] == 1:
            if images is None:
                check_tags([input_ids.flatten()], 0)
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        side = getattr(self.config, "tokenizer_padding_side", None) or "right"
        visual = self.encode_images(images, image_sizes)
        batch = self._splice(input_ids, attention_mask, labels, visual, side)
        return (
            None,
            None if position_ids is None else batch.position_ids,
            None if attention_mask is None else batch.mask.to(attention_mask.dtype),
            past_key_values,
            batch.embeds,
            None if labels is None else batch.labels,
        )

    def _splice(self, input_ids, attention_mask, labels, visual: list[Tensor], side: str) -> Spliced:
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        embed = self.get_input_embeddings()
        device = embed.weight.device
        input_ids = input_ids.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        labels = None if labels is None else labels.to(device)
        return splice(input_ids, attention_mask, labels, visual, embed, side, limit)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: object = None,
        visual: list[Tensor] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ):
        """The language model's forward, with images (or ready `visual` tokens) spliced into `input_ids`.

        Logits cover the spliced sequence; with `labels` (B, L), aligned with `input_ids`, there is a loss
        over text tokens. Batches padded on the left stay so, others are padded on
        `config.tokenizer_padding_side`.
        """
        first = input_ids is not None and inputs_embeds is None and input_ids.shape[1] > 1
        if first and (images is not None or visual is not None):
            if visual is None:
                visual = self.encode_images(images, image_sizes)
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            before, attention_mask = _split_mask(attention_mask, past, input_ids.shape[1])
            left = attention_mask is not None and not bool(attention_mask[:, 0].all())
            side = "left" if left else getattr(self.config, "tokenizer_padding_side", None) or "right"
            batch = self._splice(input_ids, attention_mask, labels, visual, side)
            input_ids, inputs_embeds = None, batch.embeds
            labels = None if labels is None else batch.labels
            if before is None and past:
                before = batch.mask.new_ones(len(batch.mask), past)
            seen = batch.mask if before is None else torch.cat([before.bool(), batch.mask], dim=1)
            attention_mask = None if bool(seen.all()) else seen
            position_ids = (seen.cumsum(1) - 1).clamp(min=0)[:, past:] if past else batch.position_ids
        elif first:
            check_tags([input_ids.flatten()], 0)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: object = None,
        attention_mask: Tensor | None = None,
        visual: list[Tensor] | None = None,
        inputs: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Answer prompts; returns new ids only, (B, new), whatever was spliced in front of them.

        input_ids (B, L), or LLaVA's name `inputs`; prompts of different lengths are padded on either side and
        marked in `attention_mask`. images / image_sizes as for `encode_vision`; or `visual`, one (K, D) per
        <image> tag in reading order over the batch. Everything else is transformers' `generate`; settings
        given as None count as not given.
        """
        input_ids = inputs if input_ids is None else input_ids
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        if not kwargs.get("do_sample", kwargs.get("temperature", 1) != 0):
            # greedy: scripts pass temperature=0 and top_p with it, which transformers only warns about
            kwargs["do_sample"] = False
            for name in ("temperature", "top_p", "top_k"):
                kwargs.pop(name, None)
        kwargs.setdefault("pad_token_id", self._pad_token_id())
        if input_ids is None:
            if images is not None or visual is not None:
                raise ValueError("images need input_ids that hold an <image> tag for each of them")
            return super().generate(attention_mask=attention_mask, **kwargs)
        if images is not None and visual is not None:
            raise ValueError("give images or visual, not both")
        kwargs.pop("position_ids", None)  # of the prompt before splicing: they no longer fit
        if visual is None:
            visual = [] if images is None else self.encode_images(images, image_sizes)
        batch = self._splice(input_ids, attention_mask, None, visual, "left")
        return super().generate(inputs_embeds=batch.embeds, attention_mask=batch.mask.long(), **kwargs)

    def _pad_token_id(self) -> int | None:
        eos = self.generation_config.eos_token_id
        end = eos[0] if isinstance(eos, list) else eos
        choices = (self.generation_config.pad_token_id, self.config.pad_token_id, end)
        return next((i for i in choices if i is not None and i >= 0), None)


def _split_mask(mask: Tensor | None, past: int, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Mask (B, past + length) or (B, length) -> (that of the cache or None, that of the new ids)."""
    if mask is None or not past or mask.shape[1] == length:
        return None, mask
    if mask.shape[1] != past + length:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} positions; the cache holds {past}, input_ids {length}"
        )
    return mask[:, :past], mask[:, past:]

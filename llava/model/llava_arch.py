"""LLaVA on a language model of transformers: images in `forward` and `generate`, LLaVA's method names.

`LlavaMetaModel` is mixed into the decoder and adds tower, projector and image_newline; `LlavaMetaForCausalLM`
is mixed into the causal model (see `language_model/`). `visual.py` turns an image into tokens, `splice.py`
inserts them into a prompt.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from llava.model.decode import SWITCHES
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import ContextLimits, Spliced, check_tags, splice
from llava.model.visual import VisualTokenMixin


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


class LlavaMetaForCausalLM(VisualTokenMixin):
    """Mixed into a causal language model: encodes, prunes and splices images, then generates."""

    def get_model(self) -> LlavaMetaModel:
        """Return the decoder, which also contains tower and projector."""
        return self.model

    def get_vision_tower(self) -> VisionTower | None:
        """Return the vision tower."""
        return self.get_model().get_vision_tower()

    def save_pretrained(self, *args, **kwargs):
        """Save as in transformers, without an anyres protocol that only followed from the pruner.

        Whoever loads the folder chooses again.
        """
        followed = self.config.anyres_protocol
        if self._anyres is None:
            del self.config.anyres_protocol
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.config.anyres_protocol = followed

    # --- visual tokens into the prompt -------------------------------------------------------------------
    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """Return None, position_ids, attention_mask, past_key_values, inputs_embeds, labels, as in LLaVA.

        position_ids, attention_mask and labels that are None stay None. Without images, or for a single id (a
        decoding step), everything is returned unchanged and inputs_embeds is None. Padding is on
        `config.tokenizer_padding_side` ("right" if unset). Rows longer than tokenizer_model_max_length are
        truncated on the right with a warning.
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

    def _splice(
        self, input_ids, attention_mask, labels, visual: list[Tensor], side: str, truncate=True, new=0
    ) -> Spliced:
        """Splice images into the prompts.

        Args:
            truncate: cut rows that are too long, with a warning, as LLaVA does in training; else ValueError.
            new: tokens that have to fit after the longest row.
        """
        limits = ContextLimits.of(self.config)
        embed = self.get_input_embeddings()
        device = embed.weight.device
        input_ids = input_ids.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        labels = None if labels is None else labels.to(device)
        cut = limits.prompt if truncate else None
        batch = splice(input_ids, attention_mask, labels, visual, embed, side, cut)
        if not truncate and (reason := limits.refuse(batch.embeds.shape[1], new=new)):
            raise ValueError(f"input_ids: {reason}.")
        return batch

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
        """Run the language model with images (or `visual` tokens) spliced into `input_ids`.

        Logits cover the spliced sequence; with `labels` (B, L), aligned with `input_ids`, there is a loss
        over text tokens. Batches padded on the left are padded on the left again, others on
        `config.tokenizer_padding_side`. Prompts that do not fit are truncated with a warning in training (and
        with labels), as in LLaVA.

        Raises:
            ValueError: a prompt without labels does not fit the checkpoint's limits.
        """
        first = input_ids is not None and inputs_embeds is None and input_ids.shape[1] > 1
        if first and (images is not None or visual is not None):
            if visual is None:
                visual = self.encode_images(images, image_sizes)
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            before, attention_mask = _split_mask(attention_mask, past, input_ids.shape[1])
            left = attention_mask is not None and not bool(attention_mask[:, 0].all())
            side = "left" if left else getattr(self.config, "tokenizer_padding_side", None) or "right"
            truncate = labels is not None or self.training
            batch = self._splice(input_ids, attention_mask, labels, visual, side, truncate)
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
        """Answer prompts.

        Args:
            input_ids: (B, L), or LLaVA's name `inputs`. Prompts of different lengths are padded on either
                side and marked in `attention_mask`.
            images, image_sizes: as for `encode_vision`.
            visual: instead of images, one (K, D) per <image> tag in reading order over the batch.
            kwargs: of transformers' `generate`. None counts as not given, but switches off what filters or
                penalizes tokens (top_p, repetition_penalty ...), as in LLaVA, whatever the checkpoint's
                generation_config.json sets.

        Returns:
            New ids only, (B, new). A warning is given if they run past max_position_embeddings.

        Raises:
            ValueError: a prompt does not fit tokenizer_model_max_length or max_position_embeddings.
        """
        input_ids = inputs if input_ids is None else input_ids
        kwargs = {k: v for k, v in kwargs.items() if v is not None or k in SWITCHES}
        if not kwargs.get("do_sample", kwargs.get("temperature", 1) != 0):
            # Greedy: scripts pass temperature=0 with top_p, which makes transformers warn.
            kwargs["do_sample"] = False
            for name in ("temperature", "top_p", "top_k"):
                kwargs.pop(name, None)
        kwargs.setdefault("pad_token_id", self._pad_token_id())
        if input_ids is None:
            if images is not None or visual is not None:
                raise ValueError(
                    "images: input_ids is missing. Pass prompts with an <image> tag for each image."
                )
            return super().generate(attention_mask=attention_mask, **kwargs)
        if images is not None and visual is not None:
            raise ValueError("images and visual are both given. Pass one of them.")
        kwargs.pop("position_ids", None)  # those of the prompt before splicing
        if visual is None:
            visual = [] if images is None else self.encode_images(images, image_sizes)
        batch = self._splice(input_ids, attention_mask, None, visual, "left", truncate=False, new=1)
        found = super().generate(inputs_embeds=batch.embeds, attention_mask=batch.mask.long(), **kwargs)
        new = found if isinstance(found, Tensor) else found.sequences
        limits = ContextLimits.of(self.config)
        if limits.overrun(batch.embeds.shape[1], new.shape[1]):  # then row by row, without padding
            count = new.ne(-1 if (pad := kwargs["pad_token_id"]) is None else pad).sum(1)
            length = batch.mask.sum(1).repeat_interleave(len(new) // len(batch.mask))
            worst = int((length + count).argmax())
            if reason := limits.overrun(int(length[worst]), int(count[worst])):
                warnings.warn(reason, stacklevel=2)
        return found

    def _pad_token_id(self) -> int | None:
        eos = self.generation_config.eos_token_id
        end = eos[0] if isinstance(eos, list) else eos
        choices = (self.generation_config.pad_token_id, self.config.pad_token_id, end)
        return next((i for i in choices if i is not None and i >= 0), None)


def _split_mask(mask: Tensor | None, past: int, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask (B, past + length) or (B, length) into that of the cache (or None) and of the new ids."""
    if mask is None or not past or mask.shape[1] == length:
        return None, mask
    if mask.shape[1] != past + length:
        raise ValueError(
            f"attention_mask: {mask.shape[1]} positions, expected {past} of the cache + {length} new ones."
        )
    return mask[:, :past], mask[:, past:]

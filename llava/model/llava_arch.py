"""LLaVA around a language model of transformers: images in `forward` and `generate`, LLaVA's method names.

`LlavaMetaModel` is mixed into the decoder and carries tower, projector and image_newline;
`LlavaMetaForCausalLM` into the causal model (see `language_model/`). How an image becomes tokens is in
`visual.py`, how tokens get into a prompt in `splice.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import Spliced, check_tags, splice
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
    """Mixed into a causal language model: images in, pruned, spliced, answered."""

    def get_model(self) -> LlavaMetaModel:
        """The decoder, which also holds tower and projector."""
        return self.model

    def get_vision_tower(self) -> VisionTower | None:
        """The vision tower."""
        return self.get_model().get_vision_tower()

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

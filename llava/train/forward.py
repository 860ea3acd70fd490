"""One training forward: encode, prune, project and splice a batch, and compute the loss of its answers.

Equal in loss and gradients to LLaVA's forward, and written so that processes with different images stay in
step: one call of the projector, of the embedding and of the output layer per batch, whatever it contains. The
output layer runs only on positions that have a label.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.features import VisionFeatures
from llava.model.multimodal_encoder.cues import tower_cues
from llava.model.splice import ContextLimits, splice
from llava.pruning import Kept, Pruner


@dataclass
class StepCounts:
    """What went through the model since the counts were last read."""

    samples: int = 0
    images: int = 0
    visual_tokens: int = 0  # that entered the language model
    tokens: int = 0  # text and visual ones
    labels: int = 0  # positions with a label
    unlabeled: int = 0  # samples without any


class TrainingForward:
    """The forward of a model in training; set as `model.train_step`.

    Attributes:
        pruner: which tokens stay in the next batch.
        vision: encodes images (default: the model's tower, for every batch).
        counts: what went through since they were reset.
    """

    def __init__(self, pruner: Pruner, vision: Any = None) -> None:
        self.pruner = pruner
        self.vision = vision
        self.counts = StepCounts()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        images: Tensor | Sequence[Tensor | None] | None = None,
        image_sizes: Sequence[Any] | None = None,
        image_paths: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the mean loss over the labelled tokens of a batch.

        Args:
            model: a LLaVA model.
            input_ids: (B, L), -200 at the image of a sample.
            labels: (B, L), -100 where there is none.
            attention_mask: (B, L), False at padding.
            images: one (3, H, W) or (crops, 3, H, W) per sample; those of samples without an image tag are
                not used. None if no sample has any.
            image_sizes, image_paths: one per sample.

        Raises:
            ValueError: a sample has another number of tags than one, or the pruner cannot be trained with.
        """
        has_tag = (input_ids == IMAGE_TOKEN_INDEX).any(1).tolist()
        rows = [row for row, tag in enumerate(has_tag) if tag]
        visions = self._encode(model, images, image_sizes, image_paths, rows)
        visual, nothing = self._project(model, visions)
        table = model.get_input_embeddings()
        keep = (
            torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        )
        # One call for all text; -200 has no embedding. Rows take theirs in turn.
        text = keep & (input_ids != IMAGE_TOKEN_INDEX)
        embedded = iter(table(input_ids[text]).split(text.sum(1).tolist()))
        limit = ContextLimits.of(model.config).prompt
        batch = splice(input_ids, keep, labels, visual, lambda _: next(embedded), "right", limit)
        embeds = batch.embeds + nothing.to(batch.embeds.dtype)
        whole = bool(batch.mask.all())
        hidden = model.get_model()(
            inputs_embeds=embeds,
            attention_mask=None if whole else batch.mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        targets = batch.labels[:, 1:]
        labeled = targets != IGNORE_INDEX
        self._count(batch.mask, labeled, visual, rows)
        if bool(labeled.any()):
            logits = model.lm_head(hidden[:, :-1][labeled])
            loss = functional.cross_entropy(logits.float(), targets[labeled])
        else:  # every process calls every module, also one without a label
            loss = model.lm_head(hidden[:, 0]).float().sum() * 0
        return CausalLMOutputWithPast(loss=loss)

    def _encode(
        self,
        model: Any,
        images: Any,
        sizes: Sequence[Any] | None,
        paths: Sequence[str | None] | None,
        rows: list[int],
    ) -> list[VisionFeatures]:
        """Encode the images of the samples `rows`, which have a tag, in the dtype of the tower."""
        if not rows:
            return []
        if images is None:
            raise ValueError(f"images: sample {rows[0]} of the batch has an <image> tag and no image.")
        images = [images[row] for row in rows]
        sizes = None if sizes is None else [sizes[row] for row in rows]
        cues = tower_cues(self.pruner.cues)
        device = model.get_vision_tower().device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            if self.vision is not None:
                return self.vision.encode(
                    images, sizes, [paths[row] for row in rows] if paths else None, cues
                )
            return model.encode_vision(images, sizes, cues)

    def _project(self, model: Any, visions: list[VisionFeatures]) -> tuple[list[Tensor], Tensor]:
        """Prune and project; return the tokens of every image, and a 0 that all projector weights lead to."""
        projector = getattr(model.get_model(), "mm_projector", None)
        if projector is None:
            if visions:
                raise ValueError("images: the model has no projector. Set --vision_tower.")
            return [], torch.zeros((), device=model.device)
        chosen = self.pruner
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            kept = [self._keep(model, one) for one in visions]
        return model.project_together(visions, kept, chosen)

    def _keep(self, model: Any, vision: VisionFeatures) -> Kept:
        pruner = self.pruner
        cues = model._cues(pruner, vision.features, vision.cues)
        crops = len(vision.features)
        (features, attention, cues), pooled = model._rows(
            pruner, vision.features, vision.attention, cues, crops=crops
        )
        return pooled.keep(features, attention, vision.keys if pooled is pruner else None, cues=cues)

    def _count(self, mask: Tensor, labeled: Tensor, visual: list[Tensor], rows: list[int]) -> None:
        counts = self.counts
        counts.samples += len(mask)
        counts.images += len(rows)
        counts.visual_tokens += sum(map(len, visual))
        counts.tokens += int(mask.sum())
        counts.labels += int(labeled.sum())
        empty = int((~labeled.any(1)).sum())
        counts.unlabeled += empty
        if empty == len(mask):
            warnings.warn("a batch without any label: every answer in it was cut", stacklevel=3)

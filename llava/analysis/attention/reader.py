"""Run one question through a model and read the attention of every layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llava.analysis.attention.rows import AttentionSample, UnreadableSample, layer_rows
from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.benchmarks import Question
from llava.eval.inference.engine import Engine, not_finite
from llava.eval.inference.image_loading import ImageLoader
from llava.model.splice import ContextLimits
from llava.model.transformers_compat import watch_attention
from llava.pruning.base import mean_attention


class AttentionReader:
    """Reads the attention of an unpruned model at the prefill of a question.

    The layers run with the kernels of the model. Memory holds one layer's rows and the features of one image.

    Args:
        engine: Model, tokenizer, image processor and conversation template.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.model = engine, engine.model
        self.model.set_pruner("none", anyres=engine.anyres)
        self._load = ImageLoader(engine.load_image, engine.image_processor, self.model.config)
        self._image: Any = None
        self._encoded: tuple[torch.Tensor, np.ndarray] | None = None

    @torch.inference_mode()
    def read(self, question: Question) -> AttentionSample:
        """Return the attention at the prefill of a question.

        Raises:
            UnreadableSample: It has no image, the image cannot be read, or the prompt does not fit.
        """
        if question.image is None:
            raise UnreadableSample("the question has no image")
        if question.image != self._image or self._encoded is None:
            self._encoded, self._image = self._encode(question.image), question.image
        visual, cls = self._encoded
        ids = self.engine.prompt_ids(question)
        start, length = ids.index(IMAGE_TOKEN_INDEX), len(ids) - 1 + len(cls)
        if length - start - len(cls) < 2:
            raise UnreadableSample("the prompt has no text rows after the image. Use another --conv-mode")
        if reason := ContextLimits.of(self.model.config).refuse(length, len(cls)):
            raise UnreadableSample(reason)
        layers: list[dict[str, np.ndarray]] = []

        def see(module: Any, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
            layers.append(layer_rows(module, hidden, rotary, start, len(cls)))

        with watch_attention(self.model.get_model(), see):
            row = torch.tensor([ids], device=self.model.device)
            logits = self.model(row, visual=[visual], use_cache=False, logits_to_keep=1).logits[0, -1]
        if not torch.isfinite(logits).all():
            raise UnreadableSample(not_finite(self.model))
        stacked = {kind: np.stack([layer[kind] for layer in layers]) for kind in layers[0]}
        new = int(logits.argmax())
        return AttentionSample(cls=cls, visual_start=start, length=length, first_new_id=new, **stacked)

    def _encode(self, image: Any) -> tuple[torch.Tensor, np.ndarray]:
        """Return the visual tokens (N, D) and the [CLS] attention (N,) of an image, crop by crop."""
        content, error = self._load(image)
        if error is not None:
            raise UnreadableSample(error)
        pixels, size = content
        (vision,) = self.model.encode_vision([pixels], [size])
        tokens = self.model.visual_tokens(vision, None).embeds
        cls = mean_attention(vision.attention.cpu()).flatten().numpy()
        if len(tokens) != len(cls):
            raise UnreadableSample(
                f"{len(tokens)} visual tokens of {len(cls)} patches: newlines or unpadding change their "
                "number from image to image. Use --anyres paper"
            )
        return tokens, cls

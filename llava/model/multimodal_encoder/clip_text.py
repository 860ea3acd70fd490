"""CLIP's comparison of patches with texts, for pruning methods that choose by the question (CDPruner).

Needs a whole CLIP in the tower's folder, as on the Hub: the final norm and the projection of its image
encoder, its text encoder and its tokenizer. They are read when they are first needed, in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_NEEDED = ("post_layernorm.weight", "post_layernorm.bias", "visual_projection.weight")


class ClipTexts:
    """Puts patches and texts into one space. E is its width.

    Raises:
        ValueError: the tower is not a CLIP, or its folder lacks the text encoder or its tokenizer.
    """

    def __init__(self, tower: Any) -> None:
        if tower.kind != "clip":
            raise ValueError(
                "the pruning method compares patches with texts, but the vision tower is "
                f"{tower.kind!r}, which has no text encoder. Use a model with a CLIP tower, or another "
                "method."
            )
        if tower.folder is None or tower.read_weights is None:
            raise ValueError(
                "the pruning method compares patches with texts, but the folder of the CLIP vision tower was "
                "not found. Download it (mm_vision_tower in config.json)."
            )
        self._folder, self._epsilon = tower.folder, tower.config.layer_norm_eps
        self._head = _image_head(tower)
        self._texts = functools.lru_cache(4096)(self._embed)

    def image_embeds(self, features: Tensor) -> Tensor:
        """Return patch features (B, N, C) of the select layer in the common space: (B, N, E) float32."""
        weight, bias, projection = (self._head[name].to(features.device) for name in _NEEDED)
        normed = functional.layer_norm(features.float(), weight.shape, weight, bias, self._epsilon)
        return torch.stack([one @ projection.T for one in normed])  # one shape per crop

    def text_embeds(self, text: str) -> Tensor:
        """Return a text in the common space: (M, E) float32 on the CPU, one row per 77 tokens."""
        return self._texts(text)

    @functools.cached_property
    def _encoder(self) -> tuple[object, torch.nn.Module]:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would list every weight of the image encoder as unexpected
        try:
            tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
            model, info = CLIPTextModelWithProjection.from_pretrained(
                self._folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self._folder}: could not read CLIP's text encoder and tokenizer: {reason}. Download the "
                "whole CLIP, not only its image encoder."
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        wrong = [*info["missing_keys"], *info["mismatched_keys"]]
        if wrong:
            raise ValueError(
                f"{self._folder}: {len(wrong)} weights of CLIP's text encoder are missing or do not fit its "
                f"config.json. Download the whole CLIP, not only its image encoder."
            )
        return tokenizer, model.eval()

    @torch.no_grad()
    def _embed(self, text: str) -> Tensor:
        tokenizer, model = self._encoder
        most = model.config.max_position_embeddings
        ids = tokenizer(text, add_special_tokens=False).input_ids
        room = most - 2
        parts = [ids[start : start + room] for start in range(0, len(ids), room)] or [[]]
        rows = [[tokenizer.bos_token_id, *part, tokenizer.eos_token_id] for part in parts]
        found = [model(input_ids=torch.tensor([row])).text_embeds[0] for row in rows]
        return torch.stack(found)


def _image_head(tower: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, tensor, _ in tower.read_weights():
        name = key.removeprefix("vision_model.")
        if name in _NEEDED:
            found[name] = tensor.float().clone()
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise ValueError(
            f"{tower.folder}: {missing[0]} is missing, which the pruning method needs to compare patches "
            "with texts. Download the whole CLIP, not only its image encoder."
        )
    return found

"""CLIP's image encoder as a tower. Wraps transformers' `CLIPVisionModel`.

It is wrapped and not subclassed: transformers 5 renames checkpoint keys by class name, and a subclass under
another name would silently load random weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.checkpoint.tower import IMAGE_KIND
from llava.model.image_processor import LanguageBindProcessor
from llava.model.multimodal_encoder.base import VisionTower, layers_to_run
from llava.model.transformers_compat import set_attention


class CLIPVisionTower(VisionTower):
    """CLIP ViT: [CLS] + patches, pre-norm layers after `pre_layrnorm`."""

    kind = "clip"
    file_kind = IMAGE_KIND  # model_type in config.json of LanguageBind's towers

    @classmethod
    def build(
        cls, config: CLIPVisionConfig, image_processor: object, select_layer: int, crop: int | None, attn: str
    ) -> CLIPVisionTower:
        """Build an empty tower. `crop`: side in pixels of the image processor's crops."""
        if crop is not None and crop != config.image_size:
            raise ValueError(
                f"preprocessor_config.json: crop_size is {crop}, but the vision tower expects "
                f"{config.image_size}. Set crop_size to {config.image_size}."
            )
        short = copy.deepcopy(config)
        short.num_hidden_layers = layers_to_run(select_layer, config.num_hidden_layers)
        set_attention(short, attn)
        model = CLIPVisionModel(short)
        tower = cls(model, config, image_processor, config.image_size, select_layer)
        tower._inner.post_layernorm = nn.Identity()  # after the select layer
        for layer in tower.layers():
            tower.extend(layer, short)
        return tower

    def extend(self, layer: nn.Module, config: CLIPVisionConfig) -> None:
        """Add to a new layer what CLIP's does not have."""

    def save_settings(self, folder: Path) -> None:
        if not isinstance(self.image_processor, LanguageBindProcessor):
            return super().save_settings(folder)
        folder.mkdir(parents=True, exist_ok=True)
        entries = {"model_type": self.file_kind, "vision_config": self.config.to_dict()}
        (folder / "config.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")

    @property
    def _inner(self) -> nn.Module:
        # releases of transformers 5 differ in whether there is a `vision_model` level
        return getattr(self.vision_tower, "vision_model", self.vision_tower)

    def embed(self, images: Tensor) -> Tensor:
        return self._inner.pre_layrnorm(self._inner.embeddings(images))

    def layers(self) -> nn.ModuleList:
        return self._inner.encoder.layers

    def attention_parts(self, layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        return layer.layer_norm1, layer.self_attn.q_proj, layer.self_attn.k_proj

    def attend(self, layer: nn.Module, hidden: Tensor, bias: Tensor) -> Tensor:
        return hidden + layer.self_attn(layer.layer_norm1(hidden), attention_mask=bias)[0]

    def feed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return hidden + layer.mlp(layer.layer_norm2(hidden))

    def restore_buffers(self) -> None:
        """Make the buffers that no file contains, on the device of the weights."""
        import torch

        embeddings = self._inner.embeddings
        count = embeddings.position_embedding.weight.shape[0]
        embeddings.position_ids = torch.arange(count, device=self.device).expand(1, -1)

    @staticmethod
    def canonical(key: str) -> str | None:
        """Return a file's key without prefixes that differ between files; None if the tower has no use."""
        if key.startswith(("text_model.", "visual_projection.", "text_projection.", "logit_scale")):
            return None  # of a whole CLIP's text encoder
        key = key.removeprefix("vision_model.")
        if key.endswith("position_ids") or key.startswith("post_layernorm."):
            return None
        return key

    @staticmethod
    def layer_of(key: str) -> int | None:
        """Return the index of the layer that a canonical key belongs to, None for other keys."""
        parts = key.split(".")
        return int(parts[2]) if parts[:2] == ["encoder", "layers"] else None

"""CLIP's image encoder as a tower. Wraps transformers' `CLIPVisionModel`.

It is wrapped and never subclassed: transformers 5 renames checkpoint keys by class name, and a subclass under
another name would load random weights without a word.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.multimodal_encoder.base import VisionTower, layers_to_run


class CLIPVisionTower(VisionTower):
    """CLIP ViT: [CLS] + patches, pre-norm layers behind `pre_layrnorm`."""

    kind = "clip"

    @classmethod
    def build(
        cls, config: CLIPVisionConfig, image_processor: object, select_layer: int, crop: int | None, attn: str
    ) -> CLIPVisionTower:
        """An empty tower (fill its weights next). `crop`: side in pixels of what the processor makes."""
        if crop is not None and crop != config.image_size:
            raise ValueError(
                f"the image processor makes {crop} px crops, this CLIP tower takes {config.image_size} px; "
                "mend crop_size in preprocessor_config.json"
            )
        short = copy.deepcopy(config)
        short.num_hidden_layers = layers_to_run(select_layer, config.num_hidden_layers)
        short._attn_implementation = attn
        model = CLIPVisionModel(short)
        tower = cls(model, config, image_processor, config.image_size, select_layer)
        tower._inner.post_layernorm = nn.Identity()  # behind the select layer
        return tower

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

    def restore_buffers(self) -> None:
        """Make the buffers that no file holds, on the device of the weights."""
        import torch

        embeddings = self._inner.embeddings
        count = embeddings.position_embedding.weight.shape[0]
        embeddings.position_ids = torch.arange(count, device=self.device).expand(1, -1)

    @staticmethod
    def canonical(key: str) -> str | None:
        """A file's key, free of prefixes that differ between files; None for what the tower does not use."""
        if key.startswith(("text_model.", "visual_projection.", "text_projection.", "logit_scale")):
            return None  # the other half of a whole CLIP
        key = key.removeprefix("vision_model.")
        if key.endswith("position_ids") or key.startswith("post_layernorm."):
            return None
        return key

    @staticmethod
    def layer_of(key: str) -> int | None:
        """Index of the layer a canonical key belongs to, None for the rest."""
        parts = key.split(".")
        return int(parts[2]) if parts[:2] == ["encoder", "layers"] else None

"""DINOv2's image encoder as a tower. Wraps transformers' `Dinov2Model`.

Position embeddings are interpolated from the grid of the checkpoint (37 x 37 for 518 px) to the crops of the
image processor (24 x 24 for 336 px), once, and kept.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from llava.model.multimodal_encoder.base import VisionTower, layers_to_run
from llava.model.transformers_compat import set_attention

# names before and after transformers renamed DINOv2's attention modules
_RENAMED = (
    (re.compile(r"\.attention\.attention\.(q)uery\."), r".attention.\1_proj."),
    (re.compile(r"\.attention\.attention\.(k)ey\."), r".attention.\1_proj."),
    (re.compile(r"\.attention\.attention\.(v)alue\."), r".attention.\1_proj."),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
)


class Dinov2VisionTower(VisionTower):
    """DINOv2 ViT without register tokens: [CLS] + patches, pre-norm layers with layer scale."""

    kind = "dinov2"

    @classmethod
    def build(
        cls, config: Dinov2Config, image_processor: object, select_layer: int, crop: int | None, attn: str
    ) -> Dinov2VisionTower:
        """Build an empty tower. `crop`: side in pixels of the image processor's crops."""
        if config.use_swiglu_ffn:
            raise ValueError(
                "vision tower: use_swiglu_ffn (DINOv2 giant) is not supported. Choose another size."
            )
        image_size = crop or config.image_size
        if image_size % config.patch_size:
            raise ValueError(
                f"preprocessor_config.json: crop_size is {image_size}, but the vision tower's patch_size is "
                f"{config.patch_size}. Set crop_size to a multiple of {config.patch_size}."
            )
        short = copy.deepcopy(config)
        short.num_hidden_layers = layers_to_run(select_layer, config.num_hidden_layers)
        set_attention(short, attn)
        model = Dinov2Model(short)
        model.embeddings.mask_token = None  # for pretraining only
        model.layernorm = nn.Identity()  # after the select layer
        tower = cls(model, config, image_processor, image_size, select_layer)
        tower._positions = (None, None)
        return tower

    def embed(self, images: Tensor) -> Tensor:
        embeddings = self.vision_tower.embeddings
        patches = embeddings.patch_embeddings(images)
        cls_token = embeddings.cls_token.expand(len(images), -1, -1)
        return torch.cat([cls_token, patches], dim=1) + self._position_embeddings(patches)

    def _position_embeddings(self, patches: Tensor) -> Tensor:
        """Return (1, N + 1, C), interpolated once per state of the parameter unless it is being trained."""
        embeddings = self.vision_tower.embeddings
        table = embeddings.position_embeddings
        version = None if table.is_inference() else table._version
        state = (table.data_ptr(), version, table.dtype, table.device)
        if self._positions[0] == state and not table.requires_grad:
            return self._positions[1]
        like = patches.new_empty(1, self.num_patches + 1, 1).expand(-1, -1, table.shape[-1])
        # interpolate_pos_encoding reads only the shape
        value = embeddings.interpolate_pos_encoding(like, self.image_size, self.image_size)
        if not table.requires_grad:
            self._positions = (state, value)
        return value

    def layers(self) -> nn.ModuleList:
        encoder = self.vision_tower.encoder
        return encoder.layer if hasattr(encoder, "layer") else encoder.layers

    def attention_parts(self, layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        attention = layer.attention
        if hasattr(attention, "q_proj"):
            return layer.norm1, attention.q_proj, attention.k_proj
        return layer.norm1, attention.attention.query, attention.attention.key  # older transformers 5

    def attend(self, layer: nn.Module, hidden: Tensor, bias: Tensor) -> Tensor:
        attended = layer.attention(layer.norm1(hidden), attention_mask=bias)[0]
        return hidden + layer.layer_scale1(attended)

    def feed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return hidden + layer.layer_scale2(layer.mlp(layer.norm2(hidden)))

    def restore_buffers(self) -> None:
        """Drop cached positions of other weights; DINOv2 has no buffers."""
        self._positions = (None, None)

    @staticmethod
    def canonical(key: str) -> str | None:
        """Return a file's key in one spelling; None if the tower does not use it."""
        key = key.removeprefix("dinov2.")
        if key.startswith(("layernorm.", "classifier.")) or key == "embeddings.mask_token":
            return None
        for pattern, name in _RENAMED:
            key = pattern.sub(name, key)
        return key

    @staticmethod
    def layer_of(key: str) -> int | None:
        """Return the index of the layer that a canonical key belongs to, None for other keys."""
        parts = key.split(".")
        return int(parts[2]) if parts[0] == "encoder" and parts[1] in ("layer", "layers") else None

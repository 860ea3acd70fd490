"""Dummy models: the sizes of published checkpoints with random weights, created on the device they run on.

    model = build_model("llava-1.5-7b", device="cuda", dtype="float16")

They suffice to measure time and memory, which do not depend on the values of weights; answers are
meaningless. `video-llava-7b` has Video-LLaVA's sizes (8 frames of 256 patches) with an image tower: the
temporal attention of Video-LLaVA's own tower is left out.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

_VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
_VICUNA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
}
_TINY = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
}
_SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_TINY = {
    **_CLIP_L,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 3,
}
_DINOV2_S = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "mlp_ratio": 4,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class DummyModel:
    """Sizes of a model."""

    language: dict[str, Any]
    tower: dict[str, Any]
    crops: int = 1  # per image, or frames of a video
    budgets: tuple[int, ...] = (128, 64, 32)  # T per crop, as in the paper
    extra: dict[str, Any] = field(default_factory=dict)  # entries of config.json

    @property
    def patches(self) -> int:
        """Patches N of one crop."""
        return (self.tower["image_size"] // self.tower["patch_size"]) ** 2


DUMMY_MODELS = {
    "llava-1.5-7b": DummyModel(_VICUNA_7B, _CLIP_L),
    "llava-1.5-13b": DummyModel(_VICUNA_13B, _CLIP_L),
    "llava-next-7b": DummyModel(
        _VICUNA_7B,
        _CLIP_L,
        crops=5,
        extra={
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        },
    ),
    "video-llava-7b": DummyModel(_VICUNA_7B, {**_CLIP_L, "image_size": 224}, crops=8, budgets=(57, 28, 14)),
    "smol": DummyModel(_SMOLLM2_135M, _DINOV2_S),
    "tiny": DummyModel(_TINY, _CLIP_TINY),
}


def build_model(
    sizes: str | DummyModel,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    tower_dtype: str | torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    share: Mapping[str, Tensor] | None = None,
) -> Any:
    """Build a model with random weights on `device`, in `dtype` (default: float32 on CPU, else float16).

    The same seed gives the same weights on one kind of device.

    Args:
        sizes: A name of `DUMMY_MODELS`, or other sizes.
        share: Parameters of another model by name, on `device`: those of the same shape and dtype are
            used without a copy instead of random ones.
    """
    import torch

    from llava.model.checkpoint.read import Assigner
    from llava.model.checkpoint.tower import TowerSource, clip_processor
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.settings import choose_attention, choose_dtypes
    from llava.model.transformers_compat import rebuild_rotary, set_attention

    sizes = sizes if isinstance(sizes, DummyModel) else DUMMY_MODELS[sizes]
    device = torch.device(device)
    language_dtype, tower_type = choose_dtypes(dtype, tower_dtype, None, device)
    kernels, tower_kernels = choose_attention(attn_implementation, language_dtype, tower_type)
    config = LlavaConfig(
        **{"tie_word_embeddings": False, **sizes.language},
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{
            "mm_hidden_size": sizes.tower["hidden_size"],
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "random",
            "image_aspect_ratio": "pad",
            **sizes.extra,
        },
    )
    config.dtype = language_dtype
    set_attention(config, kernels)
    source = TowerSource(sizes.tower, None, clip_processor(sizes.tower["image_size"]))
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(config)
    model.model.vision_tower = build_vision_tower(source, attn_implementation=tower_kernels)
    tower_prefix = "model.vision_tower."
    dtypes = {True: tower_type, False: language_dtype}
    assigner = Assigner(model, lambda name: (dtypes[name.startswith(tower_prefix)], device))
    for name, parameter in list(model.named_parameters()):
        shared = (share or {}).get(name)
        if shared is not None and (shared.shape, shared.dtype) == (parameter.shape, assigner.place(name)[0]):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, shared)
        else:
            assigner.assign(name, _random(name, parameter.shape, device, seed), name)
    model.tie_weights()
    rebuild_rotary(model, device)
    model.get_vision_tower().restore_buffers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tower_prefix))
    return model.eval()


def build_tower(
    sizes: str | DummyModel,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    select_layer: int = -2,
    seed: int = 0,
) -> Any:
    """Build only the vision tower, with random weights; layers after `select_layer` are left out."""
    import torch

    from llava.model.checkpoint.read import Assigner
    from llava.model.checkpoint.tower import TowerSource, clip_processor
    from llava.model.multimodal_encoder.builder import build_vision_tower

    sizes = sizes if isinstance(sizes, DummyModel) else DUMMY_MODELS[sizes]
    source = TowerSource(sizes.tower, None, clip_processor(sizes.tower["image_size"]))
    tower = build_vision_tower(source, select_layer, attn_implementation=attn_implementation)
    place = (dtype or torch.float32, torch.device(device))
    assigner = Assigner(tower.vision_tower, lambda _: place)
    for name, parameter in list(tower.vision_tower.named_parameters()):
        assigner.assign(name, _random(name, parameter.shape, place[1], seed), name)
    tower.restore_buffers()
    return tower.eval()


def dummy_image(path: Path) -> Path:
    """Write a JPEG of 640 x 480 with the entropy of a photograph: smooth colors and some noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:480, 0:640]
    colors = 25 + 200 * np.stack([x / 640, y / 480, (x + y) / 1120], axis=2)
    colors += rng.normal(0, 12, colors.shape)
    Image.fromarray(colors.clip(0, 255).astype("uint8")).save(path, quality=90)
    return path


def _random(name: str, shape: Sequence[int], device: torch.device, seed: int) -> Tensor:
    """Draw a parameter in float32; zeros for a bias and ones for a norm."""
    import torch

    # By name: layers that are left out do not change the others.
    generator = torch.Generator(device).manual_seed(seed + zlib.crc32(name.encode()))
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if len(shape) == 1 and "norm" in name.lower():
        return torch.ones(shape, device=device)
    return torch.randn(shape, device=device, generator=generator) * 0.02

"""Cost model: multiply-accumulates (MACs) and KV cache bytes of a forward pass, from the sizes of a model.

    from llava.model.flops import LanguageShape, llm_prefill_macs
    2 * llm_prefill_macs(2880 + 80, LanguageShape(layers=32, width=4096, mlp=11008)) / 1e12     # 42.9 TFLOPs

Functions named `*_macs` count MACs of matrix products. 1 MAC is 2 FLOPs, and the paper's efficiency table
prints FLOPs (papers that give 3.82 T for LLaVA-1.5-7B at 576 tokens count MACs, of visual tokens only).
Attention is counted in full, without halving it for causality; norms, softmax, activations, rotary
embeddings, the embedding table and the output head are not counted. Vision tower, selection, projector and
language model are counted separately.

The cost does not determine the time: prefill of a short prompt, for example, is not bound by FLOPs. No model
is loaded, and torch is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

DROP_PER_ROUND = 8  # as in llava.pruning.diversity, which imports torch


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of a decoder with gated MLP (Llama, Mistral)."""

    layers: int
    width: int
    mlp: int
    kv_width: int | None = None  # width of keys and of values; None: as `width`

    @classmethod
    def from_config(cls, config: object) -> LanguageShape:
        """Read sizes from a transformers config or its dict, or from its `text_config`.

        Raises:
            ValueError: for a config without a size.
        """
        config = _get(config, "text_config", default=None) or config
        width, heads = _get(config, "hidden_size"), _get(config, "num_attention_heads")
        kv_heads = _get(config, "num_key_value_heads", default=None) or heads
        head_dim = _get(config, "head_dim", default=None) or width // heads
        layers, mlp = _get(config, "num_hidden_layers"), _get(config, "intermediate_size")
        return cls(layers, width, mlp, kv_heads * head_dim)


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision transformer over `patches` patches and one [CLS] token."""

    layers: int
    width: int
    mlp: int
    patches: int
    patch_size: int
    gated: bool = False  # SwiGLU MLP, which has three matrices

    @classmethod
    def from_config(cls, config: object) -> VisionShape:
        """Read sizes from a transformers CLIP or DINOv2 config or its dict, or from its `vision_config`.

        Raises:
            ValueError: for a config without a size.
        """
        config = _get(config, "vision_config", default=None) or config
        width, patch = _get(config, "hidden_size"), _get(config, "patch_size")
        gated = bool(_get(config, "use_swiglu_ffn", default=False))
        mlp = _get(config, "intermediate_size", default=None)
        if mlp is None:
            mlp = int(width * _get(config, "mlp_ratio"))
            if gated:  # DINOv2 shrinks a gated MLP to two thirds and rounds up to a multiple of 8
                mlp = (int(mlp * 2 / 3) + 7) // 8 * 8
        side = _get(config, "image_size") // patch
        return cls(_get(config, "num_hidden_layers"), width, mlp, side * side, patch, gated)


def llm_prefill_macs(tokens: int | Sequence[int], shape: LanguageShape) -> int:
    """Count MACs of the prefill: L (2 n d^2 + 2 n d d_kv + 2 n^2 d + 3 n d m).

    The terms are queries and output, keys and values, attention, and MLP.

    Args:
        tokens: Visual and text tokens n together; or one n per layer, for methods that prune in the decoder.
    Raises:
        ValueError: for another number of layers than the model's.
    """
    per_layer = [tokens] * shape.layers if isinstance(tokens, int) else list(tokens)
    if len(per_layer) != shape.layers:
        raise ValueError(
            f"tokens: expected one number per layer for {shape.layers} layers, got {len(per_layer)}"
        )
    d, m = shape.width, shape.mlp
    kv = d if shape.kv_width is None else shape.kv_width
    return sum(2 * n * d * d + 2 * n * d * kv + 2 * n * n * d + 3 * n * d * m for n in per_layer)


def llm_prefill_gflops(tokens: float | Sequence[float], shape: Sequence[int | None]) -> float:
    """Return GFLOPs of the prefill of `tokens` tokens; `shape` has the fields of `LanguageShape`.

    Args:
        tokens: Mean number of tokens, or one per layer; rounded.
    """
    whole = [round(one) for one in tokens] if isinstance(tokens, Sequence) else round(tokens)
    return 2 * llm_prefill_macs(whole, LanguageShape(*shape)) / 1e9


def kv_cache_bytes(tokens: int | Sequence[int], shape: LanguageShape, bytes_per_element: int = 2) -> int:
    """Count bytes of keys and values: 2 L n d_kv x bytes per element. `tokens` as in `llm_prefill_macs`."""
    n = tokens * shape.layers if isinstance(tokens, int) else sum(tokens)
    return 2 * n * (shape.width if shape.kv_width is None else shape.kv_width) * bytes_per_element


def vision_tower_macs(shape: VisionShape, select_layer: int = -2) -> int:
    """Count MACs of one crop: patch embedding, and layers up to the output hidden_states[select_layer].

    hidden_states has layers + 1 entries, the first before any layer, so -2 leaves out the last layer.

    Raises:
        ValueError: for a `select_layer` that does not exist.
    """
    n_layers = select_layer if select_layer >= 0 else shape.layers + 1 + select_layer
    if not 0 <= n_layers <= shape.layers:
        raise ValueError(f"select_layer {select_layer} is outside a tower of {shape.layers} layers")
    embedding = shape.patches * 3 * shape.patch_size**2 * shape.width
    return embedding + n_layers * sum(vision_layer_macs(shape, shape.patches + 1))


def vision_layer_macs(shape: VisionShape, tokens: int) -> tuple[int, int]:
    """Count MACs of one layer over `tokens` tokens, [CLS] included: (attention, MLP)."""
    n, d = tokens, shape.width
    return 4 * n * d * d + 2 * n * n * d, (3 if shape.gated else 2) * n * d * shape.mlp


def cls_row_macs(shape: VisionShape) -> int:
    """Count MACs of the [CLS] row of one crop, in addition to fused attention."""
    return (shape.patches + 1) * shape.width


def selection_macs(
    patches: int, channels: int, tokens: int, important_ratio: float = 0.5, per_round: bool = False
) -> int:
    """Count MACs of VisPruner's similarities for one crop of `patches` tokens, `tokens` of them kept.

    Args:
        per_round: True counts evens times odds in every round, as Algorithm 1 is written; False counts all
            pairs of the residual tokens once, as computed here.
    """
    n_important = int(tokens * important_ratio)
    size, target = patches - n_important, tokens - n_important
    if tokens >= patches or target <= 0:
        return 0
    if not per_round:
        return size * (size + 1) // 2 * channels
    pairs = 0
    while size > target:
        pairs += (size + 1) // 2 * (size // 2)
        size -= min(DROP_PER_ROUND, size - target, (size + 1) // 2)
    return pairs * channels


def projector_macs(tokens: int, vision_width: int, width: int, projector_type: str = "mlp2x_gelu") -> int:
    """Count MACs of projecting `tokens` visual tokens.

    Raises:
        ValueError: for another type than "linear", "mlpNx_gelu" and "identity".
    """
    if projector_type == "identity":
        return 0
    match = re.fullmatch(r"mlp(\d+)x_gelu", projector_type)
    if projector_type != "linear" and not match:
        raise ValueError(
            f"unknown projector type {projector_type!r} (choose from linear, mlpNx_gelu, identity)"
        )
    depth = int(match.group(1)) if match else 1
    return tokens * (vision_width * width + (depth - 1) * width * width)


@dataclass(frozen=True)
class Cost:
    """MACs of one image and prompt up to the first answer token, by part, and bytes of the KV cache."""

    vision_tower: int
    selection: int
    projector: int
    language_model: int
    kv_cache_bytes: int

    @property
    def total(self) -> int:
        """Sum of the MACs of all parts."""
        return self.vision_tower + self.selection + self.projector + self.language_model

    def flops(self) -> dict[str, int]:
        """Return FLOPs (2 per MAC) by part, and their total."""
        parts = ("vision_tower", "selection", "projector", "language_model", "total")
        return {part: 2 * getattr(self, part) for part in parts}


def pipeline_cost(
    language: LanguageShape | object,
    vision: VisionShape | object,
    visual_tokens: int,
    text_tokens: int,
    crops: int = 1,
    tokens_per_crop: int | None = None,
    important_ratio: float = 0.5,
    projector_type: str = "mlp2x_gelu",
    select_layer: int = -2,
    bytes_per_element: int = 2,
) -> Cost:
    """Compute the cost of one image and prompt.

    Args:
        language: Sizes of the language model, or a config (object or dict) to read them from.
        vision: Sizes of the vision tower, or a config (object or dict) to read them from.
        visual_tokens: Visual tokens in the language model's input, of all crops.
        text_tokens: Text tokens in the language model's input.
        crops: Crops of the image.
        tokens_per_crop: Tokens that VisPruner keeps per crop; None if no similarities are computed.
    """
    if not isinstance(language, LanguageShape):
        language = LanguageShape.from_config(language)
    if not isinstance(vision, VisionShape):
        vision = VisionShape.from_config(vision)
    selection = 0
    if tokens_per_crop is not None:
        selection = cls_row_macs(vision) + selection_macs(
            vision.patches, vision.width, tokens_per_crop, important_ratio
        )
    n = visual_tokens + text_tokens
    return Cost(
        vision_tower=crops * vision_tower_macs(vision, select_layer),
        selection=crops * selection,
        projector=projector_macs(visual_tokens, vision.width, language.width, projector_type),
        language_model=llm_prefill_macs(n, language),
        kv_cache_bytes=kv_cache_bytes(n, language, bytes_per_element),
    )


_REQUIRED = object()


def _get(config: object, name: str, default: object = _REQUIRED):  # type: ignore[no-untyped-def]
    value = config.get(name, default) if isinstance(config, dict) else getattr(config, name, default)
    if value is _REQUIRED:
        raise ValueError(f"{type(config).__name__} has no {name!r}, which the cost model requires")
    return value

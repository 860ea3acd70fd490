"""Cost of a forward pass: multiply-accumulates (MACs) from shapes alone, without a model.

Convention: functions named `*_macs` count MACs of matrix products. 1 MAC = 2 FLOPs, the unit of the paper's
efficiency table (papers that give 3.82 T for LLaVA-1.5-7B at 576 tokens count MACs, and visual tokens only).
Attention is counted in full, not halved for causality; norms, softmax, activations, rotary embeddings, the
embedding table and the output head are not counted. Vision tower, selection, projector and language model are
separate; report them separately.

    from llava.model.flops import LanguageShape, llm_prefill_macs
    2 * llm_prefill_macs(2880 + 80, LanguageShape(layers=32, width=4096, mlp=11008)) / 1e12     # 42.9 TFLOPs

Costs are not times: prefill on a small GPU, or of a short prompt, is not bound by FLOPs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

DROP_PER_ROUND = 8  # of the method; repeated here so that costs can be computed without torch


@dataclass(frozen=True)
class LanguageShape:
    """A decoder with gated MLP (Llama, Mistral). kv_width: width of keys and of values; None = width."""

    layers: int
    width: int
    mlp: int
    kv_width: int | None = None

    @classmethod
    def from_config(cls, config: object) -> LanguageShape:
        """Read a transformers config or its dict, or the `text_config` in a LLaVA config."""
        config = _get(config, "text_config", default=None) or config
        width, heads = _get(config, "hidden_size"), _get(config, "num_attention_heads")
        kv_heads = _get(config, "num_key_value_heads", default=None) or heads
        head_dim = _get(config, "head_dim", default=None) or width // heads
        layers, mlp = _get(config, "num_hidden_layers"), _get(config, "intermediate_size")
        return cls(layers, width, mlp, kv_heads * head_dim)


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer over `patches` patches and one [CLS] token. gated: SwiGLU MLP (three matrices)."""

    layers: int
    width: int
    mlp: int
    patches: int
    patch_size: int
    gated: bool = False

    @classmethod
    def from_config(cls, config: object) -> VisionShape:
        """Read a CLIP or DINOv2 config of transformers or its dict, or the `vision_config` in one."""
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
    """Count L (2 n d^2 + 2 n d d_kv + 2 n^2 d + 3 n d m): queries, output; keys, values; attention; MLP.

    tokens: n, visual and text tokens together; or one n per layer, for methods that prune inside the decoder.
    """
    per_layer = [tokens] * shape.layers if isinstance(tokens, int) else list(tokens)
    if len(per_layer) != shape.layers:
        raise ValueError(f"tokens: {len(per_layer)} numbers for {shape.layers} layers. Pass one per layer.")
    d, m = shape.width, shape.mlp
    kv = d if shape.kv_width is None else shape.kv_width
    return sum(2 * n * d * d + 2 * n * d * kv + 2 * n * n * d + 3 * n * d * m for n in per_layer)


def kv_cache_bytes(tokens: int | Sequence[int], shape: LanguageShape, bytes_per_element: int = 2) -> int:
    """Compute 2 L n d_kv x bytes: keys and values of every layer. `tokens` as in `llm_prefill_macs`."""
    n = tokens * shape.layers if isinstance(tokens, int) else sum(tokens)
    return 2 * n * (shape.width if shape.kv_width is None else shape.kv_width) * bytes_per_element


def vision_tower_macs(shape: VisionShape, select_layer: int = -2) -> int:
    """Count one crop: patch embedding, and the layers up to the one that makes hidden_states[select_layer].

    hidden_states has layers + 1 entries, the first before any layer, so -2 omits the last layer.
    """
    n_layers = select_layer if select_layer >= 0 else shape.layers + 1 + select_layer
    if not 0 <= n_layers <= shape.layers:
        raise ValueError(f"select_layer: {select_layer} is outside a tower of {shape.layers} layers.")
    n, d = shape.patches + 1, shape.width
    mlp_matrices = 3 if shape.gated else 2
    layer = 4 * n * d * d + 2 * n * n * d + mlp_matrices * n * d * shape.mlp
    return shape.patches * 3 * shape.patch_size**2 * d + n_layers * layer


def cls_row_macs(shape: VisionShape) -> int:
    """Count the [CLS] row next to fused attention for one crop: one query, all keys, all heads."""
    return (shape.patches + 1) * shape.width


def selection_macs(
    patches: int, channels: int, tokens: int, important_ratio: float = 0.5, per_round: bool = False
) -> int:
    """Count VisPruner's similarities for one crop of `patches` tokens, `tokens` of them kept.

    As computed here: all pairs of the R residual tokens, once. per_round=True: as in Algorithm 1, evens with
    odds again in every round.
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
    """Count `tokens` visual tokens through "linear", "mlpNx_gelu" or "identity"."""
    if projector_type == "identity":
        return 0
    match = re.fullmatch(r"mlp(\d+)x_gelu", projector_type)
    if projector_type != "linear" and not match:
        raise ValueError(
            f"projector_type: {projector_type!r} is unknown. Choose linear, mlpNx_gelu or identity."
        )
    depth = int(match.group(1)) if match else 1
    return tokens * (vision_width * width + (depth - 1) * width * width)


@dataclass(frozen=True)
class Cost:
    """MACs of one image and prompt up to the first answer token, part by part, and the KV cache in bytes."""

    vision_tower: int
    selection: int
    projector: int
    language_model: int
    kv_cache_bytes: int

    @property
    def total(self) -> int:
        """MACs of all parts."""
        return self.vision_tower + self.selection + self.projector + self.language_model

    def flops(self) -> dict[str, int]:
        """FLOPs (2 per MAC) by part, and their total."""
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
    """Compute the cost of one image with `visual_tokens` and `text_tokens` in the language model.

    Args:
        language, vision: shapes, or configs (objects or dicts) to read them from.
        crops: passes of the vision tower.
        tokens_per_crop: tokens that VisPruner keeps per crop; None if nothing is selected (no pruning, or a
            method without similarities).
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
        raise ValueError(f"{type(config).__name__}: {name!r} is missing, but the cost model needs it.")
    return value

"""Token merging inside the layers of a vision tower (ToMe): between attention and MLP of every layer.

    merged, groups = merged_features(tower, images, tokens)

The rule is in `llava.pruning.tome`; here it runs on a tower's layers. The logits of attention get log(size)
of each key, the number of patches that it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava.model.multimodal_encoder.cues import mean_keys
from llava.pruning.tome import match, merge, regroup, schedule

KERNELS = ("sdpa", "eager")  # that take a bias of the logits


def check_merging(tower: Any, tokens: int) -> None:
    """Raise `ValueError` if the tower cannot merge its patches to `tokens`."""
    schedule(tower.num_patches, tokens, len(tower.layers()))
    if tower.attn_implementation not in KERNELS:
        raise ValueError(
            f"attn_implementation: merging inside the vision tower adds to attention logits, which "
            f"{tower.attn_implementation!r} cannot. Use sdpa."
        )


def merged_features(tower: Any, images: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Run the tower up to the select layer and merge its N patches to `tokens` on the way.

    Args:
        images: (B, 3, S, S) in the tower's dtype.

    Returns:
        (B, tokens, C) features without [CLS], in the order of the last layer; (B, N) int64, the column of
        each patch.
    """
    hidden = tower.embed(images)
    rows, size = hidden.shape[:2]
    sizes = torch.ones(rows, size, device=hidden.device)  # float32: a size can be above what half counts
    groups = torch.arange(size, device=hidden.device).repeat(rows, 1)
    heads = tower.config.num_attention_heads
    layers = tower.layers()
    for layer, r in zip(layers, schedule(tower.num_patches, tokens, len(layers)), strict=True):
        norm, _, key = tower.attention_parts(layer)
        keys = mean_keys(norm(hidden), key, heads)
        hidden = tower.attend(layer, hidden, sizes.log()[:, None, None, :].to(hidden.dtype))
        matching = match(keys, r)
        hidden, sizes = merge(hidden, sizes, matching)
        groups = regroup(groups, matching)
        hidden = tower.feed(layer, hidden)
    return hidden[:, 1:], groups[:, 1:] - 1  # [CLS] is always the first column

"""The attention of a decoder layer to the visual tokens, recomputed from the layer's input.

The run itself uses any kernels (SDPA, flash, eager). Rows are computed in chunks, so that no S x S matrix of
all heads exists. Llama and Mistral decoders, grouped query heads and sliding windows included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("last", "full", "image", "text", "equi_last", "cls")
_CHUNK = 1 << 24  # attention weights of all heads that are in memory at once


class UnreadableSample(ValueError):
    """A question whose attention cannot be read; the message says why."""


@dataclass(frozen=True)
class AttentionSample:
    """Attention to the N visual tokens in the L layers of a decoder for one prompt, mean over heads.

    None of the vectors is renormalized over the visual tokens.
    """

    last: np.ndarray  # (L, N) row of the last prompt token
    full: np.ndarray  # (L, N) mean over all rows that see the token
    image: np.ndarray  # (L, N) mean over the visual rows that see it
    text: np.ndarray  # (L, N) mean over the text rows after the image, without the last one
    equi_last: np.ndarray  # (L, N) as `last`, every visual key at the position of the query
    cls: np.ndarray  # (N,) row of [CLS] in the vision tower, as pruning methods read it
    visual_start: int = 0  # tokens before the image
    length: int = 0  # tokens of the prompt, text and visual
    first_new_id: int = -1  # the most likely first token of the answer

    @property
    def text_rows(self) -> int:
        """Rows that `text` is the mean of."""
        return self.length - self.visual_start - len(self.cls) - 1

    def layers(self, kind: str) -> np.ndarray:
        """Return the vectors of a kind as (layers, N); [CLS] attention is of one layer."""
        return np.atleast_2d(getattr(self, kind))


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary position embedding of Llama to (..., n, d); cos and sin are (n, d) or (1, d)."""
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return states * cos + turned * sin


@torch.inference_mode()
def layer_rows(
    attention: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], start: int, count: int
) -> dict[str, np.ndarray]:
    """Return the attention of one layer to the visual tokens, by kind.

    Args:
        attention: The `self_attn` module of a Llama or Mistral layer.
        hidden: (1, S, D), its input.
        rotary: cos and sin, (1, S, d) each.
        start: Tokens before the image.
        count: N visual tokens; at least two tokens follow them.

    Returns:
        (N,) float64 for last, full, image, text and equi_last.
    """
    length, size = hidden.shape[1], attention.head_dim
    end = start + count
    wide = torch.promote_types(hidden.dtype, torch.float32)
    cos, sin = (one[0].to(hidden.device, wide) for one in rotary)
    keys = attention.k_proj(hidden)[0].to(wide).view(length, -1, size).transpose(0, 1)  # (G, S, d)
    queries = attention.q_proj(hidden[:, start:])[0].to(wide)
    # (G, heads per key head, rows, d): query heads that share a key head are neighbors
    queries = queries.view(length - start, len(keys), -1, size).permute(1, 2, 0, 3)
    queries = rotate(queries, cos[start:], sin[start:]) * attention.scaling
    turned = rotate(keys, cos, sin)
    window = getattr(attention.config, "sliding_window", None) or length
    places = torch.arange(length, device=hidden.device)

    def weights(first: int, last: int, keys: Tensor) -> np.ndarray:
        """(rows, S) attention of the rows first .. last - 1, mean over heads."""
        scores = queries[:, :, first - start : last - start] @ keys[:, None].transpose(2, 3)
        ahead = places[first:last, None] - places
        scores = scores.masked_fill((ahead < 0) | (ahead >= window), -torch.inf)
        return scores.softmax(-1).mean((0, 1)).cpu().double().numpy()

    step = max(1, _CHUNK // (queries.shape[0] * queries.shape[1] * length))
    sums = {kind: np.zeros(count) for kind in ("full", "image", "text")}
    for kind, first, stop in (("image", start, end), ("text", end, length - 1)):
        for row in range(first, stop, step):
            sums[kind] += weights(row, min(row + step, stop), turned)[:, start:end].sum(0)
    last = weights(length - 1, length, turned)[0, start:end]
    sums["full"] = sums["image"] + sums["text"] + last
    level = turned.clone()
    level[:, start:end] = rotate(keys[:, start:end], cos[-1:], sin[-1:])
    equi_last = weights(length - 1, length, level)[0, start:end]
    columns = np.arange(start, end)
    # Rows that see a column: from its own on, within the window.
    seen = np.minimum(length, columns + window) - columns
    by_image = np.minimum(end, columns + window) - columns
    return {
        "last": last,
        "full": sums["full"] / seen,
        "image": sums["image"] / by_image,
        "text": sums["text"] / (length - 1 - end),
        "equi_last": equi_last,
    }

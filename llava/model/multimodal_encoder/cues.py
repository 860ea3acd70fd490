"""Cues of a vision tower that pruning methods declare: attention rows, keys and features of single layers.

    reader = CueReader(tower, ("received", "received@9/24", "cls"))
    reader.before(layer number, layer, hidden)    # for each layer, with the hidden states that enter it
    reader.found                                  # name -> tensor

Every cue is computed from the hidden states that enter its layer, next to the layer's own fused attention.
What the names mean is in `llava.pruning.base.CUES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.pruning.base import parse_cue

# Cues of the tower; others come from the projector or the question.
TOWER_CUES = (
    "attention",
    "received",
    "features",
    "keys",
    "cls",
    "last_query",
    "last_keys",
    "merged",
    "merged_groups",
)


def tower_cues(cues: Sequence[str]) -> tuple[str, ...]:
    """Return those of `cues` that a tower computes, sorted; not the [CLS] row, which it always computes."""
    return tuple(sorted({cue for cue in cues if cue.partition("@")[0] in TOWER_CUES} - {"attention"}))


def budgets(cues: Sequence[str]) -> list[int]:
    """Return the numbers of tokens that the tower itself has to merge its patches to ("merged@64")."""
    return sorted({int(cue.partition("@")[2]) for cue in cues if cue.startswith("merged")})


class CueReader:
    """Collects cues of one pass through a tower; `found` has them under their names.

    Raises:
        ValueError: a cue that the tower does not have.
    """

    def __init__(self, tower: Any, cues: Sequence[str]) -> None:
        self._tower, self._heads = tower, tower.config.num_attention_heads
        self._depth, self._run = tower.config.num_hidden_layers, len(tower.layers())
        self.found: dict[str, Tensor] = {}
        self._places: dict[int, list[tuple[str, str]]] = {}  # layer number -> [(kind, cue)]
        for cue in cues:
            kind, number = parse_cue(cue, self._depth)
            if kind in ("merged", "merged_groups"):
                continue  # of a run of its own
            number = self._run if number is None else number
            if kind in ("last_query", "last_keys"):
                number = self._depth
            elif kind in ("features", "cls"):
                number += 1  # they are read where the next layer begins
            if number < 1:
                raise ValueError(f"cue {cue!r}: layers count from 1. Choose one from 1 to {self._run}.")
            if number > self._run + 1 or (number > self._run and kind in ("attention", "received", "keys")):
                number -= kind in ("features", "cls")
                raise ValueError(
                    f"cue {cue!r}: layer {number} is after the tower's select layer {self._run}. Choose a "
                    "layer up to there, or a method that does not read it."
                )
            self._places.setdefault(number, []).append((kind, cue))

    def before(self, number: int, hidden: Tensor) -> None:
        """Compute the cues of layer `number` (1 is the first) from its input (B, N + 1, C)."""
        wanted = self._places.get(number, [])
        if not wanted:
            return
        for kind, cue in wanted:
            if kind == "features":
                self.found[cue] = hidden[:, 1:]
            elif kind == "cls":
                self.found[cue] = hidden[:, 0]
        if all(kind in ("features", "cls") for kind, _ in wanted):
            return
        layers = self._tower.layers()
        layer = layers[number - 1] if number <= len(layers) else self._tower.next_layer()
        norm, query, key = self._tower.attention_parts(layer)
        normed = norm(self._tower.enter(layer, hidden))
        for kind, cue in wanted:
            if kind == "attention":
                self.found[cue] = cls_row(normed, query, key, self._heads)
            elif kind == "received":
                self.found[cue] = received_attention(normed, query, key, self._heads)
            elif kind == "keys":
                self.found[cue] = mean_keys(normed, key, self._heads)
            elif kind == "last_query":
                self.found[cue] = _wide(query(normed))[:, 0]
            elif kind == "last_keys":
                self.found[cue] = _wide(key(normed))


def cls_row(hidden: Tensor, query: nn.Module, key: nn.Module, heads: int) -> Tensor:
    """Compute the attention of the [CLS] query over the patches: softmax over all N + 1 keys without [CLS].

    Args:
        hidden: (B, N + 1, C) after the norm, [CLS] first.

    Returns:
        (B, H, N), float32 or wider whatever the tower's dtype: half precision would create ties.
    """
    batch, tokens, _ = hidden.shape
    # On a GPU several crops share a pass. A product with one line per crop would be rounded differently for
    # each number of crops, so the query is projected with all other tokens, and the scores are sums.
    shared = hidden.device.type != "cpu"
    q = query(hidden if shared else hidden[:, :1])[:, :1].view(batch, 1, heads, -1).transpose(1, 2)
    k = key(hidden).view(batch, tokens, heads, -1).transpose(1, 2)  # (B, H, N + 1, d); q: (B, H, 1, d)
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    if shared:
        scores = (q.to(wide) * k).sum(-1)[:, :, None] * scale
    else:
        scores = q.to(wide) @ k.to(wide).transpose(2, 3) * scale
    return scores.softmax(dim=-1)[:, :, 0, 1:]  # of (B, H, 1, N + 1)


def received_attention(hidden: Tensor, query: nn.Module, key: nn.Module, heads: int) -> Tensor:
    """Compute the attention that each patch receives: mean over heads and all N + 1 queries.

    One crop and head at a time, so that no more than one (N + 1) x (N + 1) matrix is in memory, and that the
    bits of a crop do not depend on the crops beside it.

    Args:
        hidden: (B, N + 1, C) after the norm, [CLS] first.

    Returns:
        (B, N), float32 or wider.
    """
    batch, tokens, _ = hidden.shape
    q = _wide(query(hidden)).view(batch, tokens, heads, -1)
    k = _wide(key(hidden)).view(batch, tokens, heads, -1)
    scale = q.shape[-1] ** -0.5
    rows = []
    for crop in range(batch):
        total = q.new_zeros(tokens)
        for head in range(heads):
            scores = q[crop, :, head] @ k[crop, :, head].T * scale  # (N + 1, N + 1)
            total = total + scores.softmax(dim=-1).mean(dim=0)
        rows.append(total / heads)
    return torch.stack(rows)[:, 1:]


def mean_keys(hidden: Tensor, key: nn.Module, heads: int) -> Tensor:
    """Compute unscaled key projections, averaged over the heads: (B, N + 1, C) -> (B, N + 1, d)."""
    batch, tokens, _ = hidden.shape
    return _wide(key(hidden)).view(batch, tokens, heads, -1).mean(dim=2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

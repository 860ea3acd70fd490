"""Cues of a host's vision tower, read while the tower runs with whatever attention kernel it is set to.

    with CueCollector(parts, ("attention", "received@9/24")) as collector:
        base(**inputs)
        collector.take()              # name -> one tensor per attention call

The attention modules that are read get a copy of their configuration, for the time of the block, which names
an attention function that is registered here. It gets queries and keys after norm, rotary embedding and
splitting into images, keeps what was asked for, and calls the function that the real configuration names. So
there is no code per architecture, and attention weights are not computed beside the rows that are needed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava.model.multimodal_encoder.cues import attention_of_cls
from llava.pruning.base import parse_cue

ATTENTION_NAME = "vispruner_cue"
BLOCK = 2**24  # attention weights that are in memory at once, of all heads
_active: ContextVar[CueCollector | None] = ContextVar("cue_collector", default=None)


@dataclass(frozen=True)
class TowerParts:
    """Where a tower's attention is.

    Attributes:
        tower: The module that gets pixels.
        layers: Its layers, from first to last.
        attention: Name of the attention module in a layer.
        has_cls: Whether the first token is [CLS].
        select: Index of the layer whose attention scores patches.
        whole: Indices of the layers that attend to whole images, not windows; empty: all of them.
    """

    tower: nn.Module
    layers: Sequence[nn.Module]
    attention: str
    has_cls: bool
    select: int
    whole: Sequence[int] = ()

    def layer_of(self, cue: str) -> tuple[str, int]:
        """Return the kind of a cue ("received@9/24": received) and the index of the layer that it is from."""
        kind, number = parse_cue(cue, len(self.layers))
        if kind in ("last_query", "last_keys"):
            return kind, len(self.layers) - 1
        if number is None:
            return kind, self.select
        if not 1 <= number <= len(self.layers):
            raise ValueError(
                f"cue {cue!r}: the tower has {len(self.layers)} layers. Choose one from 1 to that number."
            )
        later = [index for index in self.whole if index >= number - 1]
        return kind, number - 1 if not self.whole else min(later) if later else max(self.whole)


class CueCollector:
    """Reads cues of one or more towers; a context manager that leaves the towers as they were.

    Args:
        towers: Different towers; each is read alone, so cues are in the order of calls.
        cues: Names as in `llava.pruning.base.CUES`; only "attention", "received", "keys", "cls", "last_query"
            and "last_keys" are read here.
    """

    def __init__(self, towers: Sequence[TowerParts], cues: Sequence[str]) -> None:
        self._wanted: dict[int, list[tuple[str, str, bool]]] = {}  # id of an attention module -> cues
        self._modules: list[nn.Module] = []
        self._cls: list[tuple[str, nn.Module]] = []
        self._found: dict[str, list[Tensor]] = {}
        self._undo: list[Any] = []
        for parts in towers:
            for cue in cues:
                kind, index = parts.layer_of(cue)
                if kind == "projected":
                    continue
                layer = parts.layers[index]
                if kind == "cls":
                    self._cls.append((cue, layer))
                    continue
                module = getattr(layer, parts.attention)
                if id(module) not in self._wanted:
                    self._modules.append(module)
                self._wanted.setdefault(id(module), []).append((cue, kind, parts.has_cls))

    def __enter__(self) -> CueCollector:
        _register()
        for module in self._modules:
            real = module.config
            while hasattr(real, "_vispruner_real"):  # another thread is reading this tower
                real = real._vispruner_real
            marked = copy.copy(real)
            marked._vispruner_real = real
            marked._attn_implementation_internal = ATTENTION_NAME
            module.config = marked
            self._undo.append((module, real))
        self._handles = [layer.register_forward_hook(self._keeper(cue)) for cue, layer in self._cls]
        self._token = _active.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _active.reset(self._token)
        for handle in self._handles:
            handle.remove()
        for module, real in self._undo:
            module.config = real
        self._undo.clear()

    def take(self) -> dict[str, list[Tensor]]:
        """Return what was read since the last call: a tensor per attention call, in order, for each cue."""
        found, self._found = self._found, {}
        return found

    @torch.no_grad()
    def see(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Keep the cues of one attention call, from queries and keys (B, H, N, d), with any [CLS]."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        for cue, kind, has_cls in self._wanted.get(id(module), ()):
            if kind == "attention" and has_cls:
                found = attention_of_cls(query[:, :, :1].detach(), key.detach(), scale)
            elif kind in ("attention", "received"):
                found = received_per_head(query.detach(), key.detach(), scale)[:, :, int(has_cls) :]
                found = found.mean(1) if kind == "received" else found
            elif kind == "keys":
                found = _wide(key).mean(1)
            elif kind == "last_query":
                found = _wide(query)[:, :, 0].flatten(1)
            else:
                found = _wide(key).transpose(1, 2).flatten(2)
            self._found.setdefault(cue, []).append(found)

    def _keeper(self, cue: str) -> Any:
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self._found.setdefault(cue, []).append(hidden[:, 0].detach())

        return keep


def received_per_head(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the attention that each token receives: mean over all queries, per head, in blocks of queries.

    One row of the batch at a time, so that its bits do not depend on the other rows.

    Args:
        query: (B, H, N, d).
        key: (B, H, N, d).

    Returns:
        (B, H, N), float32 or wider.
    """
    heads, length = query.shape[1:3]
    block = max(1, BLOCK // (heads * length))
    rows = []
    for q, k in zip(_wide(query), _wide(key), strict=True):
        total = q.new_zeros(heads, length)
        for part in q.split(block, dim=1):
            total += (part @ k.transpose(1, 2) * scale).softmax(dim=-1).sum(dim=1)
        rows.append(total / length)
    return torch.stack(rows)


def cue_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Compute attention as the tower is set to, and let the active collector see queries and keys."""
    collector = _active.get()
    if collector is not None:
        collector.see(module, query, key, kwargs.get("scaling"))
    name = module.config._vispruner_real._attn_implementation
    if name in (None, "eager"):
        real = sys.modules[type(module).__module__].eager_attention_forward
    else:
        real = ALL_ATTENTION_FUNCTIONS[name]
    return real(module, query, key, value, attention_mask, **kwargs)


def _register() -> None:
    if ATTENTION_NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(ATTENTION_NAME, cue_attention)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

"""Selection of visual tokens: pure functions on tensors, independent of model, files, device and benchmark.

    from llava.pruning import get_pruner
    kept = get_pruner("vispruner", tokens=64, important_ratio=0.5).keep(features, attention)
    kept.indices                       # (B, 64) int64, ascending: gather these before the projector

A new method is one new file in this folder: a subclass of `Pruner` under `@register_pruner("its_name")`.
Every module of this folder is imported below, so no other file has to change; a method that is defined
elsewhere only has to be imported. Methods that prune inside the language model are in `inside`.
"""

import pkgutil
from importlib import import_module

from .base import CUES, Cues, Kept, Pruner, TextCue, attention_order, has_float64, scaled_layer
from .registry import get_pruner, list_pruners, register_pruner

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


__all__ = [
    "CUES",
    "Cues",
    "Kept",
    "Pruner",
    "TextCue",
    "attention_order",
    "get_pruner",
    "has_float64",
    "list_pruners",
    "register_pruner",
    "scaled_layer",
]

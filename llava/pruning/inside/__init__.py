"""Methods that prune inside the language model: the rule of one method per file, pure functions on tensors.

All visual tokens of an image enter the language model; between two of its layers, at prefill, a method
shortens the visual block (see `base.DecoderPruner`). `llava.model.inside` runs the layers and gives a method
what it reads. A new method is one new file in this folder.
"""

import pkgutil
from importlib import import_module

from .base import DecoderPruner, DecoderState, Reduced, Stage

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["DecoderPruner", "DecoderState", "Reduced", "Stage"]

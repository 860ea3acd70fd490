"""Visual token pruning of vision-language models that transformers defines: one line, undone by another.

    llava.prune(model, tokens=64)             # a LlavaForConditionalGeneration, Qwen2_5_VL...; see `hosts`
    model.generate(**inputs)                  # as before, with 64 visual tokens per image
    llava.pruning_of(model).last.rows         # the places that were kept
    llava.unprune(model)

    with llava.pruned(model, tokens=32):      # the same, undone at the end of the block
        model.generate(**inputs)

The mechanism is in `core.py`; what differs between model families is in `hosts`.
"""

from llava.integrations.core import prune, pruned, pruning_of, shorten, unprune
from llava.integrations.hosts import supported_classes
from llava.integrations.plan import Plan, Pruning, Shortened

__all__ = [
    "Plan",
    "Pruning",
    "Shortened",
    "prune",
    "pruned",
    "pruning_of",
    "shorten",
    "supported_classes",
    "unprune",
]

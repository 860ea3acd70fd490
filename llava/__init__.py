"""VisPruner for LLaVA: training-free pruning of visual tokens, and the LLaVA it runs in.

`import llava` is fast: torch and transformers are imported when a name is first used. From then on
transformers' `AutoConfig` and `AutoModelForCausalLM` know LLaVA's checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava.model.auto import teach_auto_classes

if TYPE_CHECKING:
    from llava.integrations import prune, pruned, pruning_of, unprune
    from llava.model import (
        LlavaConfig,
        LlavaLlamaForCausalLM,
        LlavaMistralConfig,
        LlavaMistralForCausalLM,
        load_pretrained_model,
    )
    from llava.pruning import get_pruner

__version__ = "0.2.0"  # as in pyproject.toml

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "get_pruner",
    "load_pretrained_model",
    "prune",
    "pruned",
    "pruning_of",
    "unprune",
]
_INTEGRATIONS = ("prune", "pruned", "pruning_of", "unprune")

teach_auto_classes()


def __getattr__(name: str) -> Any:
    if name == "get_pruner":
        from llava.pruning import get_pruner

        return get_pruner
    if name in _INTEGRATIONS:
        import llava.integrations

        return getattr(llava.integrations, name)
    if name in __all__:
        import llava.model

        return getattr(llava.model, name)
    raise AttributeError(f"module 'llava' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

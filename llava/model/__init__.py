"""What runs: vision tower, projector, splice, language model, checkpoint loading.

The names below are LLaVA's. They are imported on first use, so that a command line can parse its arguments
before torch and transformers are loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.model.builder import load_pretrained_model
    from llava.model.features import VisionFeatures, VisualTokens
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
    from llava.model.language_model.llava_mpt import LlavaMptForCausalLM

_HOMES = {
    "load_pretrained_model": "llava.model.builder",
    "VisionFeatures": "llava.model.features",
    "VisualTokens": "llava.model.features",
    "LlavaConfig": "llava.model.language_model.llava_llama",
    "LlavaLlamaForCausalLM": "llava.model.language_model.llava_llama",
    "LlavaMistralConfig": "llava.model.language_model.llava_mistral",
    "LlavaMistralForCausalLM": "llava.model.language_model.llava_mistral",
    "LlavaMptForCausalLM": "llava.model.language_model.llava_mpt",
}

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaMptForCausalLM",
    "VisionFeatures",
    "VisualTokens",
    "load_pretrained_model",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llava.model' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

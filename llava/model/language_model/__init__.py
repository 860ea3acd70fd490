"""The language models that LLaVA is built on, by the `model_type` of their config.json."""

from __future__ import annotations

from importlib import import_module

_CLASSES = {
    "llava_llama": ("LlavaConfig", "LlavaLlamaForCausalLM"),
    "llava_mistral": ("LlavaMistralConfig", "LlavaMistralForCausalLM"),
}


def model_type_of(config: dict) -> str | None:
    """Return "llava_llama" or "llava_mistral" for a config.json in LLaVA's own format, else None.

    Old folders have the model_type "llava", which transformers uses for another model: a LLaVA of
    transformers has a `text_config`, one of LLaVA an `mm_vision_tower`, or Video-LLaVA's two towers.
    """
    kind, classes = config.get("model_type"), config.get("architectures")
    classes = [str(name) for name in classes] if isinstance(classes, list) else []
    if kind in _CLASSES:
        return kind
    towers = {"mm_vision_tower", "mm_image_tower", "mm_video_tower"}
    ours = not towers.isdisjoint(config) or any(
        name.startswith(("LlavaLlama", "LlavaMistral")) for name in classes
    )
    if kind != "llava" or "text_config" in config or not ours:
        return None
    return "llava_mistral" if any("mistral" in name.lower() for name in classes) else "llava_llama"


def classes_of(model_type: str) -> tuple[type, type]:
    """Return (configuration class, model class); their import registers them with transformers."""
    module = import_module(f"{__name__}.{model_type}")
    config_class, model_class = (getattr(module, name) for name in _CLASSES[model_type])
    return config_class, model_class

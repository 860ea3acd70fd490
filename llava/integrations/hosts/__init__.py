"""Families of models that can be pruned, one short file each: what differs between them, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Host
from .gemma import Gemma3Host, PaliGemmaHost
from .glm import Glm4vHost
from .idefics import Idefics3Host
from .internvl import InternVLHost
from .llava import LlavaHost
from .llava_next import LlavaNextHost, LlavaNextVideoHost
from .mistral import Mistral3Host
from .onevision import LlavaOnevisionHost
from .qwen import Qwen3VLHost, Qwen25VLHost, QwenVLHost
from .video_llava import VideoLlavaHost

HOSTS: tuple[Host, ...] = (
    LlavaHost(),
    LlavaNextHost(),
    LlavaNextVideoHost(),
    LlavaOnevisionHost(),
    VideoLlavaHost(),
    InternVLHost(),
    QwenVLHost(),
    Qwen25VLHost(),
    Qwen3VLHost(),
    Idefics3Host(),
    Mistral3Host(),
    Glm4vHost(),
    PaliGemmaHost(),
    Gemma3Host(),
)


def supported_classes() -> list[str]:
    """Return the names of the classes of transformers that can be pruned."""
    return [name for host in HOSTS for name in host.classes]


def find_host(model: Any) -> tuple[Any, Host]:
    """Return the model that is pruned, which may be inside an adapter of PEFT, and its family.

    Raises:
        TypeError: a class that is not supported.
    """
    inner = model
    while hasattr(inner, "get_base_model"):  # of PEFT
        inner = inner.get_base_model()
    for cls in type(inner).__mro__:
        if cls.__module__.startswith("transformers.models."):
            for host in HOSTS:
                if cls.__name__ in host.classes:
                    return inner, host
    if hasattr(inner, "set_pruner"):
        raise TypeError(
            f"model: {type(inner).__name__} is of this package, whose models prune by themselves. Call "
            "model.set_pruner('vispruner', tokens=64)."
        )
    for name in ("module", "_orig_mod"):  # of DataParallel, and of torch.compile
        if isinstance(getattr(inner, name, None), nn.Module):
            raise TypeError(
                f"model: {type(inner).__name__} is around the model. Pass the one inside, model.{name}."
            )
    raise TypeError(
        f"model: {type(inner).__name__} cannot be pruned. Pass an instance of one of transformers' "
        f"{', '.join(supported_classes())}."
    )

"""Decide the device of every parameter. CPU is a device like any other; one GPU needs no map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava.model.transformers_compat import whole_modules


@dataclass(frozen=True)
class Placement:
    """`main`: the device of inputs. `parts`: module name -> device if there are several, else None."""

    main: torch.device
    parts: dict[str, torch.device] | None = None

    def device_of(self, name: str) -> torch.device:
        """Return the device of a parameter: that of the longest module name that contains it."""
        if self.parts is None:
            return self.main
        above = [p for p in self.parts if p == "" or name == p or name.startswith(p + ".")]
        best = max(above, key=len, default=None)
        if best is None:
            raise ValueError(f"device_map: no device for {name}. Add it, or '' for everything else.")
        return self.parts[best]


def main_device(device_map: object, device: object) -> torch.device:
    """Return the device of inputs before any model is built; `device` wins over device_map="auto"."""
    if isinstance(device_map, dict):
        if not device_map:
            raise ValueError("device_map: the dict is empty. Pass 'auto' or module names with devices.")
        return _device(device_map.get("", next(iter(device_map.values()))))
    if device_map not in (None, "auto", "balanced", "sequential"):
        return _device(device_map)
    if device is not None:
        return _device(device)
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def place(model: nn.Module, device_map: object, device: object, dtype: torch.dtype) -> Placement:
    """Place a model that was built on the meta device.

    Args:
        model: the model, its tower attached.
        device_map: "auto" (one GPU, several if there are, else CPU), a device, or a dict of module names to
            devices. Several devices need accelerate, which moves activations between them.
        device: wins over device_map="auto".
        dtype: of the weights, for estimating their size.
    """
    main = main_device(device_map, device)
    if isinstance(device_map, dict):
        parts = {k: _device(v) for k, v in device_map.items()}
        unknown = sorted(k for k in parts if k and not _exists(model, k))
        if unknown:
            raise ValueError(f"device_map: unknown modules {', '.join(unknown)}. Use the model's names.")
        return Placement(main) if len(set(parts.values())) == 1 and "" in parts else Placement(main, parts)
    spread = device_map in ("auto", "balanced", "sequential") and device is None
    if not spread or torch.cuda.device_count() < 2:
        return Placement(main)
    from accelerate import infer_auto_device_map

    whole = [*whole_modules(model), *(type(tower).__name__ for tower in model.get_model().towers())]
    parts = infer_auto_device_map(model, no_split_module_classes=whole, dtype=dtype)
    if "disk" in parts.values():
        raise ValueError("device_map: the model does not fit into the devices' memory. Try load_4bit=True.")
    parts = {k: _device(v) for k, v in parts.items()}
    # visual tokens and text are joined before the first layer: keep what makes them together
    for name in ("model.vision_tower", "model.video_tower", "model.mm_projector", "model.image_newline"):
        if _exists(model, name):
            parts = {k: v for k, v in parts.items() if k != name and not k.startswith(name + ".")}
            parts[name] = Placement(main, parts).device_of("model.embed_tokens")
    return Placement(main) if len(set(parts.values())) == 1 else Placement(main, parts)


def connect(model: nn.Module, placement: Placement) -> None:
    """Let accelerate move activations between the devices of a model that is placed on several."""
    if placement.parts is None:
        return
    from accelerate import dispatch_model

    dispatch_model(model, {k: str(v) for k, v in placement.parts.items()}, force_hooks=True)


def _device(value: object) -> torch.device:
    try:
        device = torch.device(f"cuda:{value}" if isinstance(value, int) else value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: {value!r} is not a device ({str(error).splitlines()[0]}).") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: {str(value)!r} is missing: torch finds no GPU. Use device='cpu'.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device: {str(value)!r} is missing: torch finds {torch.cuda.device_count()} GPUs, "
                "numbered from 0. Choose one of them."
            )
    elif device.type == "meta":
        raise ValueError("device: 'meta' has no memory for weights. Use device='cpu'.")
    elif device.type != "cpu":  # Apple's mps and others
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device: {str(value)!r} is missing ({reason}). Use device='cpu'.") from error
    return device


def _exists(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        owner, _, leaf = name.rpartition(".")
        try:
            return leaf in dict(model.get_submodule(owner).named_parameters(recurse=False))
        except AttributeError:
            return False
    return True

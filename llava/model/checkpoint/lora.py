"""LoRA folders as LLaVA's fine-tuning writes them, merged into the base while it is read (without peft).

A folder contains adapter_config.json, adapter_model.{safetensors,bin} with `...lora_A/B.weight` pairs, and
non_lora_trainables.bin with the weights that were trained in full (the projector).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.keys import translate
from llava.model.checkpoint.read import listing, read_file

_PAIR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def is_lora(folder: Path) -> bool:
    """Return whether this is the folder of a LoRA run."""
    return (folder / "adapter_config.json").is_file()


def merge_lora(base: Iterable[tuple[str, Tensor, Path]], folder: Path) -> Iterator[tuple[str, Tensor, Path]]:
    """Yield the base's tensors, W + scale * B @ A where the adapter has a pair, then those trained in full.

    Raises:
        CheckpointError: another kind of adapter, or pairs without a weight in the base.
    """
    scale = _scale(folder / "adapter_config.json")
    pairs, origin = _read_pairs(folder)
    for key, tensor, path in base:
        name = translate(key)
        if name in pairs:
            a, b = pairs.pop(name)
            delta = scale * (b.to(torch.float32) @ a.to(torch.float32))
            if delta.shape != tensor.shape:
                shape = tuple(tensor.shape)
                raise CheckpointError(
                    f"{origin}: the lora_A/lora_B pair for {name} has shape {tuple(delta.shape)}, but the "
                    f"weight in model_base has {shape}. Pass the model the adapter was trained on."
                )
            tensor = (tensor.to(torch.float32) + delta).to(torch.promote_types(tensor.dtype, a.dtype))
        yield key, tensor, path
    if pairs:
        names = listing(sorted(pairs))
        raise CheckpointError(
            f"{origin}: {len(pairs)} adapters for weights that model_base does not have. Pass the model the "
            f"adapter was trained on.\n{names}"
        )
    trained = folder / "non_lora_trainables.bin"
    if trained.is_file():
        for key, tensor in read_file(trained):
            yield key, tensor, trained


def _scale(path: Path) -> float:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a LoRA configuration ({error!r}). Download it again.") from error
    for name in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save"):
        if config.get(name):
            raise CheckpointError(f"{path}: {name} is not supported. Merge the adapter with peft first.")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _read_pairs(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], Path]:
    files = [folder / n for n in ("adapter_model.safetensors", "adapter_model.bin") if (folder / n).is_file()]
    if not files:
        raise CheckpointError(
            f"{folder}: adapter_config.json without adapter_model.safetensors or .bin. Copy the adapter's "
            "weights into the folder."
        )
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_file(files[0]):
        match = _PAIR.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{files[0]}: {key} is not a LoRA weight. Merge it with peft first.")
        halves.setdefault(translate(match.group(1) + ".weight"), {})[match.group(2)] = tensor
    single = sorted(n for n, h in halves.items() if len(h) != 2)
    if single:
        raise CheckpointError(
            f"{files[0]}: {len(single)} unpaired lora_A/lora_B keys. Download the file again.\n"
            f"{listing(single)}"
        )
    return {n: (h["A"], h["B"]) for n, h in halves.items()}, files[0]

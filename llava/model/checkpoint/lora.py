"""LoRA folders as LLaVA's fine-tuning writes them, merged into the base while it is read (without peft).

A folder contains adapter_config.json, adapter_model.{safetensors,bin} with `...lora_A/B.weight` pairs, and
non_lora_trainables.bin with the weights that were trained in full (the projector).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.model.checkpoint import CheckpointError, warn
from llava.model.checkpoint.entries import ADAPTER, read_entries, require_entries
from llava.model.checkpoint.find import ADAPTER_CONFIG
from llava.model.checkpoint.keys import translate
from llava.model.checkpoint.read import DTYPES, check_finite, listing, read_file

_PAIR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
# Settings of peft under which a merged weight is something other than W + scale * B @ A.
_OTHER_KINDS = (
    "use_dora rank_pattern alpha_pattern fan_in_fan_out modules_to_save lora_bias layer_replication "
    "alora_invocation_tokens target_parameters trainable_token_indices use_qalora"
).split()
_ALL = "all-linear"  # a value of target_modules
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass
class LoraAdapter:
    """The pairs of one adapter, held against its configuration and against the weights they are merged into.

    Attributes:
        path: the file of the pairs, named in errors.
        scale: W + scale * B @ A is the merged weight.
        pairs: (A, B) by the name of the weight.
        targets: tells of a module's name whether the configuration asks for a pair.
    """

    path: Path
    scale: float
    pairs: dict[str, tuple[Tensor, Tensor]]
    targets: Callable[[str], bool]
    _used: set[str] = field(default_factory=set)
    _without: list[str] = field(default_factory=list)  # targets that have no pair

    def rename(self, name_of: Callable[[str], str | None]) -> None:
        """Use the model's names; `name_of` gives None for a weight that the model does not use."""
        renamed = {name_of(name): pair for name, pair in self.pairs.items()}
        self.pairs = {name: pair for name, pair in renamed.items() if name is not None}

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """Return the merged weight, or `tensor` itself if there is no pair for it."""
        pair = self.pairs.get(name)
        if pair is None:
            if name.startswith("model.layers.") and self.targets(name.removesuffix(".weight")):
                self._without.append(name)
            return tensor
        a, b = pair
        self._used.add(name)
        if (b.shape[0], a.shape[1]) != tuple(tensor.shape):
            raise CheckpointError(
                f"{self.path}: the lora_A/lora_B pair for {name} has shape {(b.shape[0], a.shape[1])}, but "
                f"the weight in model_base has {tuple(tensor.shape)}. Pass the model the adapter was trained "
                "on."
            )
        delta = self.scale * (b.to(torch.float32) @ a.to(torch.float32))
        return (tensor.to(torch.float32) + delta).to(torch.promote_types(tensor.dtype, a.dtype))

    def finish(self) -> None:
        """Raise `CheckpointError` for pairs that were not merged; warn about targets without a pair."""
        left = sorted(self.pairs.keys() - self._used)
        if left:
            raise CheckpointError(
                f"{self.path}: {len(left)} adapters for weights that model_base does not have. Pass the "
                f"model the adapter was trained on.\n{listing(left)}"
            )
        if self._without:
            layers = {match[1] for name in self._without if (match := _LAYER.match(name))}
            warn(
                f"{self.path}: the adapter is incomplete: {len(self._without)} weights that target_modules "
                f"names have no lora_A/lora_B pair, in {len(layers)} layers (first: {self._without[0]}). "
                "They are those of model_base. Use the files of the finished run."
            )


def read_adapter(folder: Path) -> LoraAdapter:
    """Read an adapter folder.

    Raises:
        CheckpointError: another kind of adapter, no pairs, or pairs that do not fit adapter_config.json.
    """
    where = folder / ADAPTER_CONFIG
    config = read_entries(where, ADAPTER)
    require_entries(config, "r lora_alpha", str(where))
    for name in _OTHER_KINDS:
        if config.get(name):
            raise CheckpointError(f"{where}: {name} is not supported. Merge the adapter with peft first.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights is {start!r}, which changed the weights below the adapter before "
            "training. Merge the adapter with peft first."
        )
    rank, alpha = config["r"], config["lora_alpha"]
    pairs, modules, path = _read_pairs(folder)
    for name, (a, b) in pairs.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(
                f"{path}: the lora_A/lora_B pair for {name} has shapes {tuple(a.shape)} and "
                f"{tuple(b.shape)}, but r is {rank} in {where.name}. Use the two files of one adapter."
            )
        if a.dtype not in DTYPES or b.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: the lora_A/lora_B pair for {name} is {a.dtype} and {b.dtype}. Download it again."
            )
        for half in (a, b):
            check_finite(half, f"{path}: the lora_A/lora_B pair for {name}")
    targets = _targets(config, where)
    named = config.get("target_modules") not in (None, [], "", _ALL)
    _warn_of_claims(path, pairs, modules if named else [], targets)
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return LoraAdapter(path, scale, pairs, targets)


def _warn_of_claims(
    path: Path, pairs: dict[str, tuple[Tensor, Tensor]], modules: list[str], targets: Callable[[str], bool]
) -> None:
    """Warn about an adapter that changes nothing, and about pairs that its configuration does not name."""
    if not any(b.any() for _, b in pairs.values()):
        warn(
            f"{path}: every lora_B is zero, so the adapter changes nothing: it was saved before training, or "
            "without its weights. Use the files of the finished run."
        )
    others = [module for module in modules if not targets(module)]
    if others:
        warn(
            f"{path}: {len(others)} lora_A/lora_B pairs are for modules that {ADAPTER_CONFIG} does not name "
            f"(first: {others[0]}). They are merged, and peft would ignore them. Use the two files of one "
            "adapter."
        )


def _targets(config: dict[str, Any], where: Path) -> Callable[[str], bool]:
    """Return the test of a module's name that the configuration describes."""
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    wanted, excluded = (_pattern(config, key, where) for key in ("target_modules", "exclude_modules"))

    def is_target(module: str) -> bool:
        layer = _LAYER.search(module + ".")
        inside = layers is None or layer is None or int(layer[1]) in layers
        return inside and wanted.fullmatch(module) is not None and excluded.fullmatch(module) is None

    return is_target


def _pattern(config: dict[str, Any], key: str, where: Path) -> re.Pattern[str]:
    """Return the pattern of the modules that an entry names: a regular expression, or a list of suffixes."""
    modules = config.get(key)
    if not modules:
        return re.compile("(?!)")
    if modules == _ALL:
        return re.compile(r".*_proj")
    if isinstance(modules, list):
        return re.compile(r"(.*\.)?(" + "|".join(map(re.escape, modules)) + ")")
    try:
        return re.compile(modules)
    except re.error as error:
        raise CheckpointError(
            f"{where}: {key} is not a regular expression ({error}). Download it again."
        ) from error


def _read_pairs(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str], Path]:
    """Return the pairs by the name of their weight, the modules as peft names them, and the file."""
    files = [folder / n for n in ("adapter_model.safetensors", "adapter_model.bin") if (folder / n).is_file()]
    if not files:
        raise CheckpointError(
            f"{folder}: {ADAPTER_CONFIG} without adapter_model.safetensors or .bin. Copy the adapter's "
            "weights into the folder."
        )
    if len(files) > 1:
        warn(
            f"{folder}: two adapters. {files[0].name} is read, as in peft, and {files[1].name} is not. "
            "Remove the file that is not of this run."
        )
    path, halves, modules = files[0], {}, []
    for key, tensor in read_file(path):
        match = _PAIR.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{path}: {key} is not a LoRA weight. Merge it with peft first.")
        halves.setdefault(translate(match.group(1) + ".weight"), {})[match.group(2)] = tensor
        if match.group(2) == "A":
            modules.append(match.group(1).removeprefix("base_model.model."))
    if not halves:
        raise CheckpointError(
            f"{path}: the adapter is empty: it contains no lora_A/lora_B pair. Saving it failed in training; "
            "use another checkpoint of the run."
        )
    single = sorted(str(n) for n, h in halves.items() if len(h) != 2)
    if single:
        raise CheckpointError(
            f"{path}: {len(single)} unpaired lora_A/lora_B keys. Download the file again.\n{listing(single)}"
        )
    return {n: (h["A"], h["B"]) for n, h in halves.items()}, modules, path

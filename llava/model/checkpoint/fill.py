"""Fill a model that was built without memory: every weight is read once, directly to its device and dtype.

Missing and unexpected keys are errors that list them. Allowed to be missing: tower layers after the select
layer, final norms, constants that old releases saved, and a tied output layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.keys import TOWER, translate
from llava.model.checkpoint.placement import Placement
from llava.model.checkpoint.quantize import Quantizer
from llava.model.checkpoint.read import Assigner, listing
from llava.model.checkpoint.tower import TowerKeys, TowerSource, fill_tower
from llava.model.transformers_compat import rebuild_rotary

TOWER_PREFIX = "model.vision_tower.vision_tower."


def fill_model(
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor, Path]],
    tower_source: TowerSource,
    placement: Placement,
    dtype: torch.dtype,
    tower_dtype: torch.dtype,
    quantizer: Quantizer | None,
    folder: Path,
) -> None:
    """Assign `weights` to `model`, then the tower's own file if they contained no tower.

    Args:
        model: built on the meta device, its tower attached.
        weights: (key, tensor, file) of everything in the checkpoint.
        tower_source: where the tower's own weights are.
        dtype, tower_dtype: of the language model with the projector, and of the tower.
        quantizer: None for ordinary weights.
        folder: named in errors.

    Raises:
        CheckpointError: keys are missing or unexpected; the message lists them.
    """

    def where(name: str) -> tuple[torch.dtype, torch.device]:
        return (tower_dtype if name.startswith(TOWER_PREFIX) else dtype), placement.device_of(name)

    wrap = None if quantizer is None else lambda n, t: quantizer.wrap(n, t, placement.device_of(n))
    assigner = Assigner(model, where, wrap)
    tower = model.get_vision_tower()
    tower_keys = TowerKeys(tower)
    tied = model.config.tie_word_embeddings

    def fill(name: str, tensor: Tensor, origin: str) -> None:
        assigner.assign(TOWER_PREFIX + name, tensor, origin)

    for key, tensor, path in weights:
        name, origin = translate(key), f"{path}: {key}"
        if name is None or (tied and name == "lm_head.weight"):
            continue
        if name.startswith(TOWER):
            inside = tower_keys.translate(name.removeprefix(TOWER))
            if inside is not None:
                fill(inside, tensor, origin)
        else:
            assigner.assign(name, tensor, origin)
    if not any(n.startswith(TOWER_PREFIX) for n in assigner.done):
        fill_tower(tower, tower_source, fill)

    if assigner.unexpected:
        raise CheckpointError(
            f"{folder}: {len(assigner.unexpected)} unexpected keys. Weights and config.json do not match; "
            f"use one checkpoint's files.\n{listing(assigner.unexpected)}"
        )
    missing = assigner.missing()
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} missing keys. Weights and config.json do not match; use one "
            f"checkpoint's files.\n{listing(missing)}"
        )
    _finish(model, placement, frozen=set(quantizer.weights) if quantizer else set())


def _finish(model: nn.Module, placement: Placement, frozen: set[str]) -> None:
    """Tie weights, make buffers that no file contains, and freeze the tower and quantized weights."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    rebuild_rotary(model, placement.device_of("model.rotary_emb"))
    model.get_vision_tower().restore_buffers()
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise CheckpointError(f"internal error: {len(left)} tensors were not loaded.\n{listing(left)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and not name.startswith("model.vision_tower."))

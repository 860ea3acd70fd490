"""What pruning a host has to equal, by other means: a prompt masked by hand, and a batch cut into rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llava.integrations
from helpers.hosts import HOSTS
from llava.integrations.tiny_hosts import FIRST_WORD, IMAGE, VIDEO

# Tiny hosts, variants included, that `llava.prune` takes
NAMES = [name for name, case in HOSTS.items() if case.class_name in llava.integrations.supported_classes()]
every_host = pytest.mark.parametrize("name", NAMES)
Batch = dict[str, Tensor]
MEDIA = {"single": ["i"], "padded": ["i", "iii"], "video": ["v", "vv"], "mixed": ["iv", "v"]}
TOLERANCE = 1e-5  # of logits, whose standard deviation is above 1


def logits(model, inputs: Batch) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def new_tokens(model, inputs: Batch, **options) -> Tensor:
    """Return the tokens (B, t) of a greedy answer, or of beams."""
    found = model.generate(**inputs, do_sample=False, **options)
    return found[:, inputs["input_ids"].shape[1] :]


def visual(ids: Tensor) -> Tensor:
    return (ids == IMAGE) | (ids == VIDEO)


def masked(batch: Batch, plan) -> Tensor:
    """Return the caller's mask with a 0 at every place that the plan dropped."""
    mask = torch.zeros_like(batch["attention_mask"])
    for row, (sel, valid) in enumerate(zip(plan.sel, plan.valid, strict=True)):
        mask[row, sel[valid]] = 1
    return mask


def positions(model, batch: Batch, mask: Tensor, kind: str) -> Tensor:
    """Return positions (B, S), or (4, B, S), of a prompt whose dropped places are masked."""
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    if hasattr(model.model, "get_rope_index"):
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
        given = {name: batch[name] for name in names if name in batch}
        ids = batch["input_ids"]
        places, _ = model.model.get_rope_index(ids, attention_mask=batch["attention_mask"], **given)
        return torch.cat([counted[None], places])
    return counted if kind == "contiguous" else (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)


def by_hand(model, batch: Batch, plan, kind: str = "contiguous") -> Batch:
    """Return inputs of the unpruned model in which the dropped places are masked."""
    mask = masked(batch, plan)
    return {**batch, "attention_mask": mask, "position_ids": positions(model, batch, mask, kind)}


def at(logits: Tensor, plan) -> Tensor:
    """Return the logits (n, V) of the kept places of the full prompt, row by row."""
    return torch.cat([row[sel[valid]] for row, sel, valid in zip(logits, plan.sel, plan.valid, strict=True)])


def kept(logits: Tensor, plan) -> Tensor:
    """Return the logits (n, V) of the places of a shortened prompt that are no padding."""
    return logits[plan.valid]


def grown(batch: Batch, new: Tensor) -> Batch:
    """Append tokens (B, t) to a prompt."""
    found = {**batch, "input_ids": torch.cat([batch["input_ids"], new], 1)}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in batch:
            found[name] = torch.cat([batch[name], torch.full_like(new, value)], 1)
    return found


def rows_of(batch: Batch, media: list[str]) -> list[Batch]:
    """Cut a batch into its rows, without padding."""
    starts = dict.fromkeys(("i", "v", "tile", "image_patch", "video_patch", "with_images"), 0)
    found = []
    for row, kinds in enumerate(media):
        real = batch["attention_mask"][row].bool()
        counts = {"i": kinds.count("i"), "v": kinds.count("v"), "with_images": int("i" in kinds)}
        counts["tile"] = 2 * counts["i"] + 4 * counts["v"]
        for kind, grid in (("i", "image"), ("v", "video")):
            grids = batch.get(f"{grid}_grid_thw", torch.zeros(0, 3, dtype=torch.int64))
            mine = grids[starts[kind] : starts[kind] + counts[kind]]
            counts[f"{grid}_patch"] = int(mine.prod(1).sum())
        one = {}
        for name, value in batch.items():
            unit = _unit(name, batch)
            if unit is None:
                one[name] = value[row : row + 1, real]
            elif counts[unit]:
                one[name] = value[starts[unit] : starts[unit] + counts[unit]]
        for unit, count in counts.items():
            starts[unit] += count
        found.append(one)
    return found


def _unit(name: str, batch: Batch) -> str | None:
    """Return what the first dimension of an input counts, None for rows of the batch."""
    if name == "pixel_values":
        if "image_grid_thw" in batch:
            return "image_patch"
        return "tile" if "image_sizes" not in batch and _has_tiles(batch) else "i"
    if name == "pixel_values_videos":
        return "video_patch" if "video_grid_thw" in batch else "v"
    if name == "batch_num_images":
        return "with_images"
    if name in ("image_sizes", "image_grid_thw", "pixel_values_images"):
        return "i"
    return "v" if name in ("video_grid_thw", "second_per_grid_ts") else None


def _has_tiles(batch: Batch) -> bool:
    """Return whether images are passed as tiles (InternVL), whose prompt delimits them."""
    return bool((batch["input_ids"] == 102).any())


def other_words(batch: Batch) -> Batch:
    """Return the prompt with other words, and the same images."""
    ids = batch["input_ids"]
    word = (ids >= FIRST_WORD) & ~visual(ids) & (ids < IMAGE)
    return {**batch, "input_ids": torch.where(word, FIRST_WORD + (ids * 7 + 3) % 80, ids)}

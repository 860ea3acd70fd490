"""Let a method select tokens of the rows that a host descriptor makes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.hosts.base import Host, HostRow, HostRows, Seen
from llava.integrations.plan import KeptRow, Pruning
from llava.pruning import Kept, Pruner
from llava.pruning.base import CLS_PLACE, NO_TOKEN

GRAM_ELEMENTS = 2**24  # N x N elements of rows whose tokens are selected together


def problem_of(base: nn.Module, host: Host, pruner: Pruner, modality: str) -> str | None:
    """Return why a method cannot select tokens of a modality, None if it can."""
    has = host.cues_of(base, modality)
    missing = [cue for cue in pruner.cues if cue.partition("@")[0] not in has]
    if missing:
        return (
            f"{pruner.name!r} reads {missing[0]!r}, which the tower does not have for {modality} tokens. "
            f"Choose a method that reads at most {', '.join(has)}."
        )
    if pruner.merges and not host.merges.get(modality, False):
        return (
            f"{pruner.name!r} merges tokens, for which {modality} tokens have no place here. Choose a method "
            "that keeps tokens as they are."
        )
    return None


@dataclass
class Choice:
    """What is kept of one call of `get_*_features`.

    Attributes:
        keep: (M,) bool, of the call's placeholders.
        merged: (place (K,), embeddings (K, D)) of merged tokens.
        kept: A `KeptRow` per row, with one of its placeholders; its row of the batch is not known, and its
            places are placeholders of the call.
    """

    keep: Tensor
    merged: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    kept: list[tuple[int, KeptRow]] = field(default_factory=list)


def select_tokens(base: nn.Module, pruning: Pruning, seen: Seen) -> Choice:
    """Select the tokens of all rows of a call; rows never influence each other."""
    host = pruning.host
    found: HostRows = host.rows(base, seen)
    choice = Choice(torch.ones(found.count, dtype=torch.bool))
    groups: dict[Any, list[tuple[int, HostRow]]] = defaultdict(list)
    results: dict[int, KeptRow] = {}
    budgets: dict[int, int | None] = {}
    for number, row in enumerate(found.rows):
        total = len(row.places)
        extra = 0 if row.extra is None else len(row.extra)
        budget = pruning.budget.of_row(total + extra, row.frame, row.crops)
        budgets[number] = budget
        if pruning.method == "none" or budget is None or budget >= total + extra:
            every = torch.arange(total)
            results[number] = _kept_row(seen, row, every, torch.zeros(total, dtype=torch.bool), budget)
            continue
        if pruning.acts_inside and row.frame is not None and pruning.budget.clip_tokens:
            budget = max(1, budget)  # frames enter the language model together, whatever their shares
        groups[total, min(budget, total), row.cues["attention"].shape].append((number, row))
    for (total, budget, _), rows in groups.items():
        each = max(1, GRAM_ELEMENTS // total**2)
        for start in range(0, len(rows), each):
            part = rows[start : start + each]
            pruner = pruning.pruner(budget)
            kept = _keep(pruner, [row for _, row in part])
            for i, (number, row) in enumerate(part):
                _apply(base, host, choice, pruner, seen.modality, row, kept[i : i + 1])
                mine = kept.indices[i].cpu(), kept.important[i].cpu()
                results[number] = _kept_row(seen, row, *mine, budgets[number])
    place = 0
    for number, row in enumerate(found.rows):
        place = max(place, int(row.places.max()))  # a crop may be all padding, which has no place
        choice.kept.append((place, results[number]))
    return choice


def _kept_row(seen: Seen, row: HostRow, kept: Tensor, important: Tensor, budget: int | None) -> KeptRow:
    total = len(row.places)
    return KeptRow(-1, seen.modality, total, kept, important, row.frame, row.grid, row.places, budget)


def _keep(pruner: Pruner, rows: list[HostRow]) -> Kept:
    """Call the method with the rows as a batch."""
    features = torch.stack([row.features for row in rows])
    cues = {
        name: torch.stack([row.cues[name] for row in rows]).to(features.device)
        for name in {"attention", *pruner.cues}
    }
    ids = [_identity(row.pixels) for row in rows] if pruner.uses_seed else None
    return pruner.keep(features, cues["attention"], ids, cues=cues)


def _identity(pixels: Tensor) -> str:
    """Return what is the same for the same image in any batch."""
    values = pixels.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()


def _apply(
    base: nn.Module, host: Host, choice: Choice, pruner: Pruner, modality: str, row: HostRow, kept: Kept
) -> None:
    """Write what one row keeps into `choice`."""
    places, indices = row.places, kept.indices[0].cpu()
    choice.keep[places[places >= 0]] = False
    if row.extra is not None:
        choice.keep[row.extra] = False
    if kept.features is None:
        mine = places[indices]
        choice.keep[mine[mine >= 0]] = True
        return
    if not host.merges.get(modality, False) or not bool((places[1:] == places[:-1] + 1).all()):
        raise ValueError(
            f"method: {pruner.name!r} merges tokens, for which {modality} tokens have no place here. Choose "
            "a method that keeps tokens as they are."
        )
    column = indices != NO_TOKEN
    taken = places[_places_of_merged(indices[column], len(places))]
    choice.keep[taken] = True
    embeds = host.project(base, kept.features[0, column.to(kept.features.device)])
    choice.merged.append((taken, embeds))


def _places_of_merged(indices: Tensor, total: int) -> Tensor:
    """Return one place per merged token, ascending: its own patch, or a free one at the start or the end."""
    own = {index for index in indices.tolist() if index >= 0}
    free = [index for index in range(total) if index not in own]
    first = int((indices == CLS_PLACE).sum())
    last = len(indices) - len(own) - first
    return torch.tensor(sorted([*own, *free[:first], *free[len(free) - last :]]), dtype=torch.int64)

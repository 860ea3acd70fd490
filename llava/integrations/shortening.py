"""Shorten a prompt to its text and the kept visual tokens: every tensor by one index, once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.hosts.base import Host
from llava.integrations.plan import KeptRow, Plan, Pruning, Shortened
from llava.integrations.selection import problem_of, select_tokens
from llava.integrations.watch import dry_run

IGNORED_LABEL = -100


def shortened(
    model: nn.Module, given: Mapping[str, Any], pruning: Pruning, generating: bool = False
) -> Shortened:
    """Encode and prune the visual tokens of a prompt, without running the language model.

    Args:
        given: The arguments of `forward` or `generate` that are not None.
        generating: Whether positions are those that `generate` takes.

    Raises:
        ValueError: arguments that cannot be pruned.
    """
    host = pruning.host
    base = host.base(model)
    refuse_prompt(base, host, given)
    reached, seen = dry_run(model, host, given, pruning.pruner(pruning.budget.tokens or 1))
    embeds = reached["inputs_embeds"]
    visual = placeholders(model, base, host, given)
    mask = given.get("attention_mask")
    real = torch.ones_like(next(iter(visual.values()))) if mask is None else mask.to(embeds.device).bool()
    retained, rows = real.clone(), []
    for one in seen:
        problem = problem_of(base, host, pruning.pruner(1), one.modality)
        if problem is not None and pruning.method != "none":
            raise ValueError(f"method: {problem}")
        choice = select_tokens(base, pruning, one)
        where = visual[one.modality]
        if int(where.sum()) != len(choice.keep):
            raise ValueError(
                f"input_ids: {int(where.sum())} placeholders of {one.modality} tokens for {len(choice.keep)} "
                "features. Pass ids and pixels of one processor call."
            )
        spots = where.nonzero()
        gone = spots[~choice.keep.to(spots.device)]
        retained[gone[:, 0], gone[:, 1]] = False
        for places, merged in choice.merged:
            spot = spots[places.to(spots.device)]
            embeds = embeds.index_put((spot[:, 0], spot[:, 1]), merged.to(embeds))
        for place, row in choice.kept:
            row.sample = int(spots[place, 0])
            row.places = torch.where(row.places < 0, row.places, spots[row.places, 1].cpu())
            rows.append(row)
    plan = plan_of(real, retained, rows)
    whole = bool((retained == real).all())
    result = Shortened(
        embeds=embeds if whole else take(embeds, plan),
        mask=mask if whole else plan.valid.to(torch.int64 if mask is None else mask.dtype),
        positions=_positions(model, base, pruning, reached, given, real, plan, whole, generating),
        ids=None if "input_ids" not in given else _text(given["input_ids"], plan, whole),
        others=_others(given, plan, whole),
        visual={name: take(where, plan) & plan.valid for name, where in visual.items()},
        deepstack=_short_deepstack(reached, retained, plan),
        plan=plan,
    )
    pruning.last = plan
    return result


def take(tensor: Tensor, plan: Plan, dim: int = 0) -> Tensor:
    """Gather the kept places of a tensor (..., B, S, ...), whose batch is dimension `dim`."""
    sel = plan.sel.to(tensor.device)
    rows = torch.arange(len(sel), device=tensor.device)[:, None]
    return tensor[(slice(None),) * dim + (rows, sel)]


def plan_of(real: Tensor, retained: Tensor, rows: list[KeptRow]) -> Plan:
    """Return the index that drops what is not retained; padding is on the side on which the prompt had it."""
    batch, length = retained.shape
    every = torch.arange(length, device=retained.device)
    if bool((retained == real).all()):
        return Plan(every.repeat(batch, 1), real, rows, length)
    counts = retained.sum(1)
    width = int(counts.max())
    column = torch.arange(width, device=retained.device)
    if bool(real[:, -1].all()):
        valid = column >= width - counts[:, None]
    else:
        valid = column < counts[:, None]
    sel = torch.zeros(batch, width, dtype=torch.int64, device=retained.device)
    sel[valid] = every.repeat(batch, 1)[retained]
    return Plan(sel, valid, rows, length)


def _text(ids: Tensor, plan: Plan, whole: bool, fill: int = 0) -> Tensor:
    if whole:
        return ids
    return take(ids, plan).masked_fill(~plan.valid.to(ids.device), fill)


def _others(given: Mapping[str, Any], plan: Plan, whole: bool) -> dict[str, Tensor]:
    fills = {"labels": IGNORED_LABEL, "token_type_ids": 0, "mm_token_type_ids": 0}
    return {name: _text(given[name], plan, whole, fill) for name, fill in fills.items() if name in given}


def _positions(
    model: nn.Module,
    base: nn.Module,
    pruning: Pruning,
    reached: Mapping[str, Any],
    given: Mapping[str, Any],
    real: Tensor,
    plan: Plan,
    whole: bool,
    generating: bool,
) -> Tensor | None:
    """Return the positions of kept tokens; None where the model derives them."""
    native = reached.get("position_ids")
    if pruning.host.mrope:
        if native is None:
            raise ValueError(
                "mm_token_type_ids: missing, so there are no positions of rows and columns. Pass it; the "
                "processor returns it with input_ids."
            )
        valid = plan.valid.to(native.device)
        native = native if native.ndim == 3 else native[None].expand(3, -1, -1)
        places = native[-3:] if whole else take(native[-3:], plan, dim=1).masked_fill(~valid, 0)
        counts = valid.sum(1, keepdim=True)
        most = places.masked_fill(~valid, 0).amax(dim=(0, 2))[:, None]
        base.rope_deltas = most + 1 - counts
        if whole and not generating:
            return native
        return torch.cat([_counted(valid)[None].to(places), places])
    if whole:
        return given.get("position_ids")
    if pruning.positions == "original":
        native = _counted(real) if native is None else native
        return take(native.expand(len(real), -1), plan).masked_fill(~plan.valid.to(native.device), 0)
    return None if generating or bool(plan.valid.all()) else _counted(plan.valid)


def _counted(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _short_deepstack(reached: Mapping[str, Any], retained: Tensor, plan: Plan) -> dict[str, Any]:
    where, layers = reached.get("visual_pos_masks"), reached.get("deepstack_visual_embeds")
    if where is None or layers is None:
        return {}
    stay = retained.to(where.device)[where]
    return {
        "visual_pos_masks": take(where, plan) & plan.valid.to(where.device),
        "deepstack_visual_embeds": [layer[stay.to(layer.device)] for layer in layers],
    }


@contextlib.contextmanager
def deepstack_given(model: nn.Module, host: Host, short: Shortened) -> Iterator[None]:
    """Give the language model its visual embeddings of the first layers, in the next call only."""
    if not short.deepstack:
        yield
        return
    thread = threading.get_ident()

    def inject(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if threading.get_ident() != thread:
            return None
        handle.remove()
        times = kwargs["inputs_embeds"].shape[0] // len(short.embeds)  # beams
        return args, {**kwargs, **_repeated(short.deepstack, times)}

    language_model = getattr(host.base(model), host.language_model)
    handle = language_model.register_forward_pre_hook(inject, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _repeated(deepstack: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Repeat the rows of a batch, as beam search does."""
    where, layers = deepstack["visual_pos_masks"], deepstack["deepstack_visual_embeds"]
    if times == 1:
        return dict(deepstack)
    counts = where.sum(1).tolist()
    layers = [torch.cat([part for part in one.split(counts) for _ in range(times)]) for one in layers]
    return {"visual_pos_masks": where.repeat_interleave(times, 0), "deepstack_visual_embeds": layers}


def refuse_prompt(base: nn.Module, host: Host, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for arguments that would be pruned wrongly."""
    if "input_ids" in given and "inputs_embeds" in given:
        raise ValueError(
            "input_ids, inputs_embeds: both are given, so it is not known which of them the places are in. "
            "Pass one of them with the pixels."
        )
    if host.needs_ids and "input_ids" not in given:
        raise ValueError(
            "inputs_embeds: rows and columns of visual tokens are derived from ids. Pass input_ids with the "
            "pixels."
        )
    if "input_ids" not in given and "inputs_embeds" not in given:
        raise ValueError("input_ids: missing. Pass the prompt with the pixels.")
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected (batch, length), got {shape}. Pass a mask of padding.")
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"past_key_values: {cache.get_seq_length()} tokens are cached, and the call has pixels. Start "
            "with an empty cache, or go on without pixels: pass only ids that are not cached, with an "
            "attention_mask of cached and new tokens."
        )
    prompt = given["input_ids"] if "input_ids" in given else given["inputs_embeds"]
    if prompt.ndim != (2 if "input_ids" in given else 3):
        raise ValueError(f"prompt: its shape is {tuple(prompt.shape)}. Pass a batch of rows of ids.")
    for name in ("attention_mask", "labels", "token_type_ids", "mm_token_type_ids"):
        if name in given and given[name].shape != prompt.shape[:2]:
            raise ValueError(
                f"{name}: its shape is {tuple(given[name].shape)}, that of the prompt "
                f"{tuple(prompt.shape[:2])}. Pass a value per token."
            )
    for name in ("vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy"):
        config = getattr(base.config, name, None)
        if name in given and given[name] != config:
            raise ValueError(
                f"{name}: got {given[name]!r}, but the model was pruned for {config!r} of its configuration. "
                "Leave the argument out, or change model.config before llava.prune."
            )


DROPPED = "vispruner_dropped"  # attribute of a cache: how many places of the caller's prompt it lacks


def mark_cache(cache: Any, plan: Plan) -> None:
    """Note in a cache that it is shorter than the caller's prompt; copies of it have the note, too."""
    less = plan.length - plan.sel.shape[1]
    if less and cache is not None:
        setattr(cache, DROPPED, less)


def refuse_full_prompt(model: nn.Module, host: Host, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a prompt with visual tokens whose cache lacks some of them.

    `generate` passes over as many ids as are cached, and would take the last ones of the prompt twice.
    """
    cache = given.get("past_key_values")
    if not getattr(cache, DROPPED, 0) or cache.get_seq_length() == 0:
        return
    if any(bool(where.any()) for where in placeholders(model, host.base(model), host, given).values()):
        raise ValueError(
            f"past_key_values: {getattr(cache, DROPPED)} visual tokens of the prompt were pruned and are not "
            f"cached, so the {cache.get_seq_length()} cached tokens are not the first ids. Pass only ids "
            "that are not cached, with an attention_mask of cached and new tokens."
        )


def placeholders(
    model: nn.Module, base: nn.Module, host: Host, given: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the placeholders of each modality, (B, S) bool."""
    found = {}
    for modality, entry in host.modalities.items():
        number = getattr(base.config, entry, None)
        number = getattr(base.config, entry.replace("_id", "_index")) if number is None else number
        if "input_ids" in given:
            found[modality] = given["input_ids"] == number
        else:
            embeds = given["inputs_embeds"]
            row = model.get_input_embeddings()(torch.tensor(number, device=embeds.device))
            found[modality] = (embeds == row).all(-1)
    return found

"""What `generate` is told about a shortened prompt, so that callers see the full one.

Everything that counts or shows tokens of the prompt is adapted: lengths, stopping criteria, logits
processors, streamers and the returned sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def refuse_generation(given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for arguments of `generate` that read ids before they are shortened."""
    config = given.get("generation_config")
    chunk = given.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
    if chunk is not None:
        raise ValueError(
            "prefill_chunk_size: chunks are cut from ids, without pruned embeddings. Leave it out."
        )
    if given.get("assistant_model") is not None:
        raise ValueError(
            "assistant_model: it would get the shortened ids without the image. Leave it out, or call "
            "llava.unprune(model)."
        )
    if "paged" in (given.get("cache_implementation"), getattr(config, "cache_implementation", None)):
        raise ValueError("cache_implementation: 'paged' takes ids only. Choose another one.")
    if "inputs" in given and "input_ids" in given:
        raise ValueError("inputs, input_ids: both are given. Pass one of them.")


def refuse_several_answers(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for beams of a batch, for which transformers repeats encoded images, not rows."""
    configs = [given.get("generation_config"), model.generation_config]
    for name in ("num_beams", "num_return_sequences"):
        number = setting(given, configs, name) or 1
        if number > 1 and len(given.get("input_ids", ())) > 1:
            raise ValueError(
                f"{name}: {number} answers per row of a batch are not possible after pruning for "
                f"{type(model).__name__}. Pass one row at a time, or one beam."
            )


def inferred_mask(model: nn.Module, given: Mapping[str, Any]) -> Tensor | None:
    """Return the mask that `generate` derives from padding ids if none is passed; None if there is none."""
    ids, configs = given["input_ids"], [given.get("generation_config"), model.generation_config]
    pad, eos = (setting(given, configs, name) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or not bool((ids == pad).any()):
        return None
    ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    return None if int(pad) in ends else ids.ne(int(pad)).long()


def setting(given: Mapping[str, Any], configs: list[Any], name: str) -> Any:
    """Return a generation setting by precedence: argument, given configuration, the model's."""
    values = [given.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def adapt_generation(
    model: nn.Module, rest: dict[str, Any], full: Tensor | None, plan: Any
) -> dict[str, Any]:
    """Return the arguments of `generate` for a shortened prompt.

    Args:
        rest: Arguments that do not have places.
        full: The caller's ids (B, S); None if the prompt is embeddings, whose answers have no prompt.
        plan: `core.Plan`.
    """
    rest, less = dict(rest), plan.length - plan.sel.shape[1]
    config = rest.get("generation_config")
    configs = [config, model.generation_config]
    longest = setting(rest, configs, "max_length")
    if longest is not None and longest <= plan.length and setting(rest, configs, "max_new_tokens") is None:
        raise ValueError(
            f"max_length: {longest}, but the prompt has {plan.length} tokens, which count. Pass "
            "max_new_tokens, or a larger max_length."
        )
    for name in ("max_length", "min_length"):
        if rest.get(name) is not None:
            rest[name] = max(0, rest[name] - less)
        elif getattr(config, name, None):
            config = rest["generation_config"] = copy.copy(config)
            setattr(config, name, max(0, getattr(config, name) - less))
        elif getattr(model.generation_config, name, None):
            new = name.replace("_length", "_new_tokens")
            if setting(rest, configs, new) is None:
                rest[name] = max(0, getattr(model.generation_config, name) - less)
    if full is None:
        return rest
    prompt = FullPrompt(full, plan.sel.shape[1])
    for name, wrapper in (("stopping_criteria", FullIdsCriterion), ("logits_processor", FullIdsProcessor)):
        if rest.get(name) is not None:
            rest[name] = type(rest[name])(wrapper(one, prompt) for one in rest[name])
    if rest.get("prefix_allowed_tokens_fn") is not None:
        rest["prefix_allowed_tokens_fn"] = FullIdsPrefix(rest["prefix_allowed_tokens_fn"], prompt)
    if rest.get("streamer") is not None:
        rest["streamer"] = FullPromptStreamer(rest["streamer"], full)
    return rest


def full_output(output: Any, full: Tensor, plan: Any) -> Any:
    """Put the caller's prompt in front of new tokens, in a tensor (B', S' + t) or in `.sequences`."""
    prompt = FullPrompt(full, plan.sel.shape[1])
    if isinstance(output, Tensor):
        return prompt.of(output)
    output.sequences = prompt.of(output.sequences)
    return output


class FullPrompt:
    """The caller's ids (B, S), which take the place of the first `length` shortened ones."""

    def __init__(self, ids: Tensor, length: int) -> None:
        self.ids, self.length = ids, length

    def of(self, short: Tensor) -> Tensor:
        """Return full sequences for shortened ones (B', S' + t); B' is a multiple of B."""
        full = self.ids.repeat_interleave(len(short) // len(self.ids), dim=0).to(short)
        return torch.cat([full, short[:, self.length :]], dim=1)


class FullIdsCriterion:
    """A stopping criterion that gets full sequences."""

    def __init__(self, criterion: Callable, prompt: FullPrompt) -> None:
        self.criterion, self.prompt = criterion, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.criterion(self.prompt.of(input_ids), scores, **kwargs)


class FullIdsProcessor:
    """A logits processor that gets full sequences."""

    def __init__(self, processor: Callable, prompt: FullPrompt) -> None:
        self.processor, self.prompt = processor, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.processor(self.prompt.of(input_ids), scores)


class FullIdsPrefix:
    """A `prefix_allowed_tokens_fn` that gets a full sequence."""

    def __init__(self, allowed: Callable, prompt: FullPrompt) -> None:
        self.allowed, self.prompt = allowed, prompt

    def __call__(self, batch_id: int, input_ids: Tensor) -> list[int]:
        full = self.prompt.ids[batch_id].to(input_ids)
        return self.allowed(batch_id, torch.cat([full, input_ids[self.prompt.length :]]))


class FullPromptStreamer:
    """A streamer whose first piece is the full prompt."""

    def __init__(self, streamer: Any, full: Tensor) -> None:
        self.streamer, self.full = streamer, full

    def put(self, value: Tensor) -> None:
        if self.full is not None:
            value, self.full = self.full.cpu(), None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()

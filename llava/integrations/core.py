"""Prune visual tokens at the boundary of the language model, before the host counts a single token.

`prune` puts two callable objects in front of `model.forward` and `model.generate`. A call with pixels is done
in four steps, and any other call passes through:

1. The host's base model runs until it calls its language model. A hook raises there and carries away what the
   language model would have got: embeddings with visual features in place, and positions. So the tower, the
   projector and the merging are the host's own, and run once (`watch.py`).
2. The host's descriptor makes rows of that, from which the method selects (`selection.py`).
3. Embeddings, ids, labels, positions and mask are shortened by one index (`shortening.py`).
4. The original `forward` or `generate` is called with embeddings, and without pixels.

A method that prunes inside the language model gets the prompt whole, and runs there by this repository's own
code (`inside.py`).

Independent of model families, which `hosts` describes, and of methods, which are in `llava.pruning`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.budget import HostBudget
from llava.integrations.generation import (
    adapt_generation,
    full_output,
    inferred_mask,
    refuse_generation,
    refuse_several_answers,
)
from llava.integrations.hosts import find_host
from llava.integrations.hosts.base import Host, PrunedFeatures
from llava.integrations.inside import answer_greedily_inside, check_decoder, refuse_inside
from llava.integrations.plan import Pruning, Shortened
from llava.integrations.selection import problem_of
from llava.integrations.shortening import deepstack_given, mark_cache, refuse_full_prompt, shortened
from llava.integrations.watch import PROMPT_ARGUMENTS, TEXT_ARGUMENTS
from llava.pruning import Pruner, get_pruner
from llava.pruning.inside import DecoderPruner

POSITIONS = ("contiguous", "original")
_PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images")


def prune(
    model: Any,
    method: str = "vispruner",
    tokens: int | None = None,
    keep: float | None = None,
    clip_tokens: int | None = None,
    important_ratio: float = 0.5,
    positions: str = "contiguous",
) -> Any:
    """Prune visual tokens in every further `forward` and `generate` of a model of transformers.

    Args:
        model: An instance of one of `supported_classes()`, or an adapter of PEFT around one.
        method: Name of a method that needs no question. One that prunes inside the language model takes a
            decoder of the Llama kind and greedy `generate` (see `integrations.inside`).
        tokens: Visual tokens to keep per row: an image, crop, tile, or frame of a video.
        keep: Share of each row to keep, in (0, 1]; instead of `tokens`.
        clip_tokens: Tokens to keep per video, shared by its frames; images are then pruned by `tokens` or
            `keep`, and kept whole without them.
        important_ratio: Share of the kept tokens that is selected by attention.
        positions: Of kept tokens: "contiguous", as in the released method, or "original", those of the
            unpruned prompt. Models with rows and columns in their positions (Qwen) always keep them, and
            methods that prune inside the language model have a rule of their own.

    Returns:
        The same model.

    Raises:
        TypeError: the class is not supported.
        ValueError: an invalid setting, a method that this model cannot serve, or a model that is pruned.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions: {positions!r} is unknown. Choose from {', '.join(POSITIONS)}.")
    budget = HostBudget(tokens, keep, clip_tokens)
    if budget.is_empty and method != "none":
        raise ValueError(
            "tokens, keep, clip_tokens: none is given. Pass one, such as tokens=64 or keep=0.25."
        )
    if not isinstance(method, str):
        raise ValueError(f"method: expected a name such as 'vispruner', got {method!r}.")
    sample = get_pruner(method, tokens=budget.tokens or 1, important_ratio=important_ratio)
    inner, host = find_host(model)
    if _doors(inner):
        raise ValueError(
            f"model: this {type(inner).__name__} is pruned already. Call llava.unprune(model) first."
        )
    _check(inner, host, sample, budget)
    inside = isinstance(sample, DecoderPruner)
    if inside and positions == "original" and sample.positions != "original":
        raise ValueError(
            f"positions: {method!r} counts the tokens that a layer sees, got 'original'. Leave it out."
        )
    positions = sample.positions if inside else "original" if host.mrope else positions
    if positions == "original" and not host.mrope and not inside and _uses_flash(inner):
        raise ValueError(
            "positions: 'original' leaves gaps, which flash attention takes for several prompts in one row. "
            "Load the model with attn_implementation='sdpa', or use positions='contiguous'."
        )
    pruning = Pruning(method, budget, sample.important_ratio, positions, host)
    inner.forward = ForwardDoor(inner, inner.forward, pruning, "forward" in vars(inner))
    inner.generate = GenerateDoor(inner, inner.generate, pruning, "generate" in vars(inner))
    return model


def unprune(model: Any) -> Any:
    """Undo `prune`, and return the model.

    Raises:
        ValueError: the model is not pruned, or its `forward` was wrapped since, so that undoing would leave
            half of it.
    """
    inner, _ = find_host(model)
    doors = _doors(inner)
    if not doors:
        raise ValueError(
            f"model: this {type(inner).__name__} is not pruned. Call llava.prune(model, ...) first."
        )
    if len(doors) < 2:
        name = next(name for name in ("forward", "generate") if name not in doors)
        raise ValueError(
            f"model.{name}: it was replaced after llava.prune, by {vars(inner).get(name)!r}. Undo that first "
            "(accelerate: remove_hook_from_module(model, recurse=True)), then call llava.unprune."
        )
    for name, door in doors.items():
        if door.was_set:
            setattr(inner, name, door.original)
        else:
            delattr(inner, name)
    return model


def pruning_of(model: Any) -> Pruning | None:
    """Return the settings and the last plan of a pruned model; None if it is not pruned.

    Raises:
        TypeError: the class is not supported.
    """
    inner, _ = find_host(model)
    return next((door.pruning for door in _doors(inner).values()), None)


def shorten(model: Any, generating: bool = False, **inputs: Any) -> Shortened:
    """Encode and prune the visual tokens of a prompt, without running the language model.

    Args:
        model: A pruned model.
        generating: Whether positions are those that `generate` takes, not those of `forward`.
        inputs: As for `forward`.

    Raises:
        ValueError: the model is not pruned, or inputs that cannot be pruned.
    """
    pruning = pruning_of(model)
    if pruning is None:
        raise ValueError("model: it is not pruned. Call llava.prune(model, ...) first.")
    refuse_inside(pruning, "shorten")
    given = {name: value for name, value in inputs.items() if value is not None}
    return shortened(find_host(model)[0], given, pruning, generating)


class pruned(contextlib.AbstractContextManager):  # noqa: N801, used like a function
    """Prune a model for a `with` block; it gives the model's `Pruning`.

    Arguments are those of `prune`. The model is unpruned at the end of the block, whatever happens inside,
    unless it was unpruned there. A block inside a block of the same model is refused, and changes nothing.
    """

    def __init__(self, model: Any, *args: Any, **settings: Any) -> None:
        self._model, self._args, self._settings = model, args, settings
        self._pruning: Pruning | None = None

    def __enter__(self) -> Pruning:
        prune(self._model, *self._args, **self._settings)
        self._pruning = pruning_of(self._model)
        return self._pruning

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if pruning_of(self._model) is self._pruning:
            unprune(self._model)


def _doors(model: nn.Module) -> dict[str, _Door]:
    found = {name: vars(model).get(name) for name in ("forward", "generate")}
    return {name: door for name, door in found.items() if isinstance(door, _Door)}


def _check(model: nn.Module, host: Host, pruner: Pruner, budget: HostBudget) -> None:
    """Raise `ValueError` if a method cannot run on a model."""
    if pruner.needs_question:
        raise ValueError(
            f"method: {pruner.name!r} chooses by the question, which is not known here. Choose a method "
            "without text, or run it through llava.eval."
        )
    name = type(model).__name__
    if budget.clip_tokens is not None and "video" not in host.modalities:
        raise ValueError(
            f"clip_tokens: {name} has no videos of their own: frames are passed as images. Pass tokens=, the "
            "budget per image."
        )
    base = host.base(model)
    if pruner.acts_in != "image":
        check_decoder(base, host, pruner)
    problems = [problem_of(base, host, pruner, modality) for modality in host.modalities]
    if all(problems):
        raise ValueError(f"method: {name}: {problems[0]}")


def _uses_flash(model: nn.Module) -> bool:
    text = model.config.get_text_config()
    return "flash" in str(getattr(text, "_attn_implementation", None))


# --- the doors ---------------------------------------------------------------------------------------------
class _Door:
    """Stands in front of a method of a model. An object, so that deepcopy and pickle see its parts."""

    def __init__(self, model: nn.Module, original: Callable, pruning: Pruning, was_set: bool) -> None:
        self.model, self.original, self.pruning, self.was_set = model, original, pruning, was_set

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments of the original, by which callers choose what they pass."""
        return inspect.signature(self.original)

    def named(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, without those that are None."""
        signature = self.__signature__
        bound = signature.bind(*args, **kwargs).arguments
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound = {**bound, **bound.pop(name, {})}
        return {name: value for name, value in bound.items() if value is not None}

    def run(self, short: Shortened, arguments: Mapping[str, Any]) -> Any:
        """Call the original with a shortened prompt."""
        with deepstack_given(self.model, self.pruning.host, short):
            output = self.original(**{name: value for name, value in arguments.items() if value is not None})
        for cache in (arguments.get("past_key_values"), getattr(output, "past_key_values", None)):
            mark_cache(cache, short.plan)
        return output


class ForwardDoor(_Door):
    """Stands in front of `model.forward`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs if len(args) <= 1 else self.named(args, kwargs)  # ids alone carry no pixels
        if not _has_pixels(given):
            return self.original(*args, **kwargs)
        refuse_inside(self.pruning, "forward")
        given = self.named(args, kwargs)
        if isinstance(given.get("logits_to_keep"), Tensor):
            raise ValueError(
                "logits_to_keep: places of the full prompt have others after pruning. Pass a number, or take "
                "them from the output by llava.pruning_of(model).last.sel."
            )
        short = shortened(self.model, given, self.pruning)
        rest = _without_pixels(self.model, self.pruning.host, given)
        rest |= {**short.others, **self.pruning.host.feed(short, generating=False)}
        rest |= {"attention_mask": short.mask, "position_ids": short.positions}
        return self.run(short, rest)


class GenerateDoor(_Door):
    """Stands in front of `model.generate`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.named(args, kwargs)
        has_pixels = _has_pixels(given)
        if has_pixels:
            refuse_generation(given)
        if (ids := given.pop("inputs", None)) is not None:
            given["input_ids"] = ids
        if not has_pixels:
            refuse_full_prompt(self.model, self.pruning.host, given)
            return self.original(*args, **kwargs)
        if not self.pruning.host.takes_embeds:
            refuse_several_answers(self.model, given)
        mask = given.get("attention_mask")
        if mask is None and "input_ids" in given:
            mask = inferred_mask(self.model, given)
            given |= {} if mask is None else {"attention_mask": mask}
        rest = _without_pixels(self.model, self.pruning.host, given)
        if self.pruning.acts_inside:
            return answer_greedily_inside(self.model, given, rest, self.pruning)
        with torch.no_grad():
            short = shortened(self.model, given, self.pruning, generating=True)
        rest |= {**short.others, **self.pruning.host.feed(short, generating=True)}
        rest |= {"attention_mask": short.mask, "position_ids": short.positions}
        full = given.get("input_ids")
        rest = adapt_generation(self.model, rest, full, short.plan)
        output = self.run(short, rest)
        return output if full is None else full_output(output, full, short.plan)


def _has_pixels(given: Mapping[str, Any]) -> bool:
    encoded = given.get("mm_encoder_outputs") or {}  # `generate` passes a dictionary without features
    if any(one is not None and not isinstance(one, PrunedFeatures) for one in encoded.values()):
        raise ValueError(
            "mm_encoder_outputs: features of all tokens would not be pruned. Pass pixels, or call "
            "llava.unprune(model)."
        )
    return any(given.get(name) is not None for name in _PIXELS)


def _without_pixels(model: nn.Module, host: Host, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that go on to the original: none about images, and none that is shortened."""
    base = host.base(model)
    visual = set(_PIXELS) | (set(inspect.signature(base.forward).parameters) - TEXT_ARGUMENTS)
    for modality in host.modalities:
        visual |= set(inspect.signature(getattr(base, f"get_{modality}_features")).parameters)
    drop = visual | PROMPT_ARGUMENTS | {"labels", "cache_position"}
    return {name: value for name, value in given.items() if name not in drop}

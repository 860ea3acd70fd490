"""Prune visual tokens at the boundary of the language model, before the host counts a single token.

`prune` puts two callable objects in front of `model.forward` and `model.generate`. A call with pixels is done
in four steps, and any other call passes through:

1. The host's base model runs until it calls its language model. A hook raises there and carries away what the
   language model would have got: embeddings with visual features in place, and positions. So the tower, the
   projector and the merging are the host's own, and run once.
2. The host's descriptor makes rows of that, from which the method selects (`select_tokens`).
3. Embeddings, ids, labels, positions and mask are shortened by one index (`shorten`).
4. The original `forward` or `generate` is called with embeddings, and without pixels.

Independent of model families, which `hosts` describes, and of methods, which are in `llava.pruning`.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.budget import HostBudget
from llava.integrations.cue import CueCollector
from llava.integrations.generation import adapt_generation, full_output, inferred_mask, refuse_generation
from llava.integrations.hosts import find_host
from llava.integrations.hosts.base import Host, HostRow, HostRows, Seen
from llava.pruning import Kept, Pruner, get_pruner
from llava.pruning.base import CLS_PLACE, NO_PLACE, NO_TOKEN

POSITIONS = ("contiguous", "original")
IGNORED_LABEL = -100
GRAM_ELEMENTS = 2**24  # N x N elements of rows whose tokens are selected together
# Arguments of a base model that are not about images
_TEXT_ARGUMENTS = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
    "past_key_values",
    "use_cache",
    "cache_position",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "kwargs",
}
_DRY_ARGUMENTS = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
}
_PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images")
_seeing = threading.RLock()  # methods of the model are replaced while the tower runs


@dataclass
class KeptRow:
    """What was kept of one row: an image, crop, tile or frame.

    Attributes:
        sample: Row of the batch.
        modality: "image" or "video".
        total: Tokens of the row, N.
        kept: (K,) int64 as in `llava.pruning.base.Kept.indices`: places in the row.
        important: (K,) bool, selected by attention.
        frame: (i, f) of the i-th of f frames of a clip, None for an image.
        grid: (rows, columns) of the N tokens, None if unknown.
    """

    sample: int
    modality: str
    total: int
    kept: Tensor
    important: Tensor
    frame: tuple[int, int] | None
    grid: tuple[int, int] | None


@dataclass
class Plan:
    """Which places of the caller's prompt were kept.

    Attributes:
        sel: (B, S') int64, places in the caller's sequence.
        valid: (B, S') bool, False on padding.
        rows: What was kept of every image, crop, tile or frame, in the order of their placeholders.
        length: S, the caller's length.
    """

    sel: Tensor
    valid: Tensor
    rows: list[KeptRow]
    length: int


@dataclass
class Shortened:
    """A prompt whose visual tokens were pruned, as the language model gets it.

    Attributes:
        embeds: (B, S', D).
        mask: The attention mask (B, S'); the caller's own if nothing was dropped, which may be None.
        positions: (B, S'), or (4, B, S') of text, time, row and column; None where the model derives them.
        ids: (B, S') int64, None if the caller passed embeddings.
        others: Further tensors of the prompt: labels, token types.
        visual: Modality -> (B, S') bool, placeholders.
        deepstack: Arguments of the language model for its first layers; empty for most hosts.
        plan: Which places were kept.
    """

    embeds: Tensor
    mask: Tensor | None
    positions: Tensor | None
    ids: Tensor | None
    others: dict[str, Tensor]
    visual: dict[str, Tensor]
    deepstack: dict[str, Any]
    plan: Plan


@dataclass
class Pruning:
    """Settings of a pruned model, and what its last call kept.

    Attributes:
        method: Name of the method.
        budget: `tokens`, `keep` and `clip_tokens`.
        important_ratio: Share of kept tokens that is selected by attention.
        positions: "contiguous" or "original"; "original" on hosts whose positions have rows and columns.
        last: The plan of the last call with pixels, None before.
    """

    method: str
    budget: HostBudget
    important_ratio: float
    positions: str
    host: Host
    last: Plan | None = None

    def config(self) -> dict[str, object]:
        """Return the settings, ready for JSON."""
        settings = {"method": self.method, **vars(self.budget), "important_ratio": self.important_ratio}
        return {**settings, "positions": self.positions}

    def pruner(self, tokens: int | None) -> Pruner:
        """Return the method with the budget of one row."""
        return get_pruner(self.method, tokens=tokens, important_ratio=self.important_ratio)


# --- prune, unprune ----------------------------------------------------------------------------------------
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
        method: Name of a method that needs no question and acts before the language model.
        tokens: Visual tokens to keep per row: an image, crop, tile, or frame of a video.
        keep: Share of each row to keep, in (0, 1]; instead of `tokens`.
        clip_tokens: Tokens to keep per video, shared by its frames; images are then pruned by `tokens` or
            `keep`, and kept whole without them.
        important_ratio: Share of the kept tokens that is selected by attention.
        positions: Of kept tokens: "contiguous", as in the released method, or "original", those of the
            unpruned prompt. Models with rows and columns in their positions (Qwen) always keep them.

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
    positions = "original" if host.mrope else positions
    if positions == "original" and not host.mrope and _uses_flash(inner):
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
    if pruner.acts_in != "image":
        raise ValueError(
            f"method: {pruner.name!r} prunes inside the language model, which llava.prune does not do. "
            "Choose a method that selects before it, or use llava.load_pretrained_model."
        )
    if pruner.needs_question:
        raise ValueError(
            f"method: {pruner.name!r} chooses by the question, which is not known here. Choose a method "
            "without text, or run it through llava.eval."
        )
    name = type(model).__name__
    if budget.clip_tokens is not None and "video" not in host.modalities:
        raise ValueError(
            f"clip_tokens: {name} gets videos as images, one per frame. Pass tokens=, the budget per frame."
        )
    base = host.base(model)
    problems = [_problem(base, host, pruner, modality) for modality in host.modalities]
    for parts in host.towers(base).values():
        for cue in pruner.cues:
            parts.layer_of(cue)
    if all(problems):
        raise ValueError(f"method: {name}: {problems[0]}")


def _problem(base: nn.Module, host: Host, pruner: Pruner, modality: str) -> str | None:
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


def _uses_flash(model: nn.Module) -> bool:
    text = model.config.get_text_config()
    return "flash" in str(getattr(text, "_attn_implementation", None))


# --- the doors ---------------------------------------------------------------------------------------------
class _Door:
    """Stands in front of a method of a model. An object, so that deepcopy and pickle see its parts."""

    def __init__(self, model: nn.Module, original: Callable, pruning: Pruning, was_set: bool) -> None:
        self.model, self.original, self.pruning, self.was_set = model, original, pruning, was_set
        self.__signature__ = inspect.signature(original)
        self.__name__ = getattr(original, "__name__", type(self).__name__)

    def named(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, without those that are None."""
        bound = self.__signature__.bind(*args, **kwargs).arguments
        for name, parameter in self.__signature__.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound = {**bound, **bound.pop(name, {})}
        return {name: value for name, value in bound.items() if value is not None}


class ForwardDoor(_Door):
    """Stands in front of `model.forward`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs if len(args) <= 1 else self.named(args, kwargs)  # ids alone carry no pixels
        if not _has_pixels(given):
            return self.original(*args, **kwargs)
        given = self.named(args, kwargs)
        if isinstance(given.get("logits_to_keep"), Tensor):
            raise ValueError(
                "logits_to_keep: places of the full prompt have others after pruning. Pass a number, or take "
                "them from the output by llava.pruning_of(model).last.sel."
            )
        short = shorten(self.model, given, self.pruning)
        rest = _without_pixels(self.model, self.pruning.host, given)
        rest |= {**short.others, **self.pruning.host.feed(short, generating=False)}
        rest |= {"attention_mask": short.mask, "position_ids": short.positions}
        with _deepstack(self.model, self.pruning.host, short):
            return self.original(**{name: value for name, value in rest.items() if value is not None})


class GenerateDoor(_Door):
    """Stands in front of `model.generate`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.named(args, kwargs)
        if not _has_pixels(given):
            return self.original(*args, **kwargs)
        refuse_generation(given)
        if (ids := given.pop("inputs", None)) is not None:
            given["input_ids"] = ids
        mask = given.get("attention_mask")
        if mask is None and "input_ids" in given:
            mask = inferred_mask(self.model, given)
            given |= {} if mask is None else {"attention_mask": mask}
        with torch.no_grad():
            short = shorten(self.model, given, self.pruning, generating=True)
        rest = _without_pixels(self.model, self.pruning.host, given)
        rest |= {**short.others, **self.pruning.host.feed(short, generating=True)}
        rest |= {"attention_mask": short.mask, "position_ids": short.positions}
        full = given.get("input_ids")
        rest = adapt_generation(self.model, rest, full, short.plan)
        with _deepstack(self.model, self.pruning.host, short):
            output = self.original(**{name: value for name, value in rest.items() if value is not None})
        return output if full is None else full_output(output, full, short.plan)


def _has_pixels(given: Mapping[str, Any]) -> bool:
    encoded = given.get("mm_encoder_outputs") or {}  # `generate` passes a dictionary without features
    if any(one is not None for one in encoded.values()):
        raise ValueError(
            "mm_encoder_outputs: features of all tokens would not be pruned. Pass pixels, or call "
            "llava.unprune(model)."
        )
    return any(given.get(name) is not None for name in _PIXELS)


def _without_pixels(model: nn.Module, host: Host, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that go on to the original: none about images, and none that is shortened."""
    base = host.base(model)
    visual = set(_PIXELS) | (set(inspect.signature(base.forward).parameters) - _TEXT_ARGUMENTS)
    for modality in host.modalities:
        visual |= set(inspect.signature(getattr(base, f"get_{modality}_features")).parameters)
    drop = visual | _DRY_ARGUMENTS | {"labels", "cache_position"}
    return {name: value for name, value in given.items() if name not in drop}


# --- step 1: run the host up to its language model ---------------------------------------------------------
class LanguageModelReached(BaseException):
    """Carries the arguments of the language model out of the base model; not an error."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def _dry_run(
    model: nn.Module, host: Host, given: Mapping[str, Any], pruner: Pruner
) -> tuple[dict[str, Any], list[Seen]]:
    """Run the base model until it calls its language model; return what that gets, and what was seen."""
    base = host.base(model)
    takes = set(inspect.signature(base.forward).parameters) - (_TEXT_ARGUMENTS - _DRY_ARGUMENTS)
    inputs = {name: value for name, value in given.items() if name in takes}
    if (device := getattr(getattr(model, "_hf_hook", None), "execution_device", None)) is not None:
        inputs = {name: _moved(value, device) for name, value in inputs.items()}  # accelerate's, of the model
    thread = threading.get_ident()

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            raise LanguageModelReached({**dict(zip(names, args, strict=False)), **kwargs})

    with _seeing, _watched(base, host, pruner) as seen:
        handle = getattr(base, host.language_model).register_forward_pre_hook(
            stop, with_kwargs=True, prepend=True
        )
        try:
            base(**inputs)
        except LanguageModelReached as reached:
            return reached.arguments, seen
        finally:
            handle.remove()
    raise RuntimeError(f"{type(base).__name__} did not call its {host.language_model}")


def _moved(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _watched(base: nn.Module, host: Host, pruner: Pruner) -> Iterator[list[Seen]]:
    """Record the calls of `get_*_features` within the block, with cues of the towers."""
    towers = {id(parts.tower): parts for parts in host.towers(base).values()}
    cues = ("attention", *(cue for cue in pruner.cues if cue != "attention"))
    seen: list[Seen] = []
    open_calls: list[Seen] = []

    def recorded(name: str, original: Callable, modality: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if open_calls:  # `get_video_features` may call `get_image_features`
                return original(*args, **kwargs)
            bound = inspect.signature(original).bind(*args, **kwargs)
            bound.apply_defaults()
            one = Seen(modality, dict(bound.arguments))
            open_calls.append(one)
            collector.take()
            try:
                output = original(*args, **kwargs)
            finally:
                open_calls.clear()
            one.output = getattr(output, "pooler_output", output)
            one.cues = collector.take()
            seen.append(one)
            return output

        return call

    def listened(name: str, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if open_calls:
                bound = inspect.signature(original).bind(*args, **kwargs)
                open_calls[0].calls.setdefault(name, []).append((dict(bound.arguments), original))
            return original(*args, **kwargs)

        return call

    def tower_starts(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if open_calls:
            open_calls[0].pixels = args[0] if args else next(iter(kwargs.values()))

    def projector_ends(module: nn.Module, args: tuple, output: Tensor) -> None:
        if open_calls:
            open_calls[0].features, open_calls[0].projected = args[0], output

    handles, replaced = [], []
    with contextlib.ExitStack() as stack:
        collector = stack.enter_context(CueCollector(list(towers.values()), cues))

        @stack.callback
        def _restore() -> None:
            for handle in handles:
                handle.remove()
            for name in replaced:
                delattr(base, name)

        for parts in towers.values():
            handles.append(parts.tower.register_forward_pre_hook(tower_starts, with_kwargs=True))
        if host.projector is not None:
            handles.append(getattr(base, host.projector).register_forward_hook(projector_ends))
        wrappers = {
            f"get_{modality}_features": recorded(
                f"get_{modality}_features", getattr(base, f"get_{modality}_features"), modality
            )
            for modality in host.modalities
        }
        wrappers |= {name: listened(name, getattr(base, name)) for name in host.watched}
        for name, wrapper in wrappers.items():
            setattr(base, name, wrapper)
            replaced.append(name)
        yield seen


# --- step 2: select ----------------------------------------------------------------------------------------
@dataclass
class Choice:
    """What is kept of one call of `get_*_features`.

    Attributes:
        keep: (M,) bool, of the call's placeholders.
        merged: (place (K,), embeddings (K, D)) of merged tokens.
        kept: A `KeptRow` per row, without its row of the batch, with its first placeholder.
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
    for number, row in enumerate(found.rows):
        total = len(row.places)
        extra = 0 if row.extra is None else len(row.extra)
        budget = pruning.budget.of_row(total + extra, row.frame, row.crops)
        if pruning.method == "none" or budget is None or budget >= total + extra:
            every = torch.arange(total)
            results[number] = _kept_row(seen, row, every, torch.zeros(total, dtype=torch.bool))
            continue
        groups[total, min(budget, total), row.cues["attention"].shape].append((number, row))
    for (total, budget, _), rows in groups.items():
        each = max(1, GRAM_ELEMENTS // total**2)
        for start in range(0, len(rows), each):
            part = rows[start : start + each]
            pruner = pruning.pruner(budget)
            kept = _keep(pruner, [row for _, row in part])
            for i, (number, row) in enumerate(part):
                _apply(base, host, choice, pruner, row, kept[i : i + 1])
                results[number] = _kept_row(seen, row, kept.indices[i].cpu(), kept.important[i].cpu())
    for number, row in enumerate(found.rows):
        first = int(row.places.max()) if len(row.places) else 0
        choice.kept.append((first, results[number]))
    return choice


def _kept_row(seen: Seen, row: HostRow, kept: Tensor, important: Tensor) -> KeptRow:
    return KeptRow(-1, seen.modality, len(row.places), kept, important, row.frame, row.grid)


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


def _apply(base: nn.Module, host: Host, choice: Choice, pruner: Pruner, row: HostRow, kept: Kept) -> None:
    """Write what one row keeps into `choice`."""
    places, indices = row.places, kept.indices[0].cpu()
    choice.keep[places[places >= 0]] = False
    if row.extra is not None:
        choice.keep[row.extra] = False
    if kept.features is None:
        mine = places[indices]
        choice.keep[mine[mine >= 0]] = True
        return
    if not bool((places[1:] == places[:-1] + 1).all()):
        raise ValueError(
            f"method: {pruner.name!r} merges tokens, which have no place between the rows of crops that were "
            "stitched. Choose a method that keeps tokens as they are."
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
    assert last == int((indices == NO_PLACE).sum())
    return torch.tensor(sorted([*own, *free[:first], *free[len(free) - last :]]), dtype=torch.int64)


# --- step 3: shorten ---------------------------------------------------------------------------------------
def shorten(
    model: Any, given: Mapping[str, Any], pruning: Pruning | None = None, generating: bool = False
) -> Shortened:
    """Encode and prune the visual tokens of a prompt, without running the language model.

    Args:
        model: A pruned model, or the model itself with `pruning`.
        given: The arguments of `forward` or `generate`.
        generating: Whether positions are those that `generate` takes.

    Raises:
        ValueError: arguments that cannot be pruned.
    """
    if pruning is None:
        pruning = pruning_of(model)
        if pruning is None:
            raise ValueError("model: it is not pruned. Call llava.prune(model, ...) first.")
        model = find_host(model)[0]
    host = pruning.host
    base = host.base(model)
    _refuse(base, host, given)
    reached, seen = _dry_run(model, host, given, pruning.pruner(pruning.budget.tokens or 1))
    embeds = reached["inputs_embeds"]
    visual = _placeholders(model, base, host, given)
    mask = given.get("attention_mask")
    real = torch.ones_like(next(iter(visual.values()))) if mask is None else mask.to(embeds.device).bool()
    retained, rows = real.clone(), []
    for one in seen:
        problem = _problem(base, host, pruning.pruner(1), one.modality)
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
            rows.append(row)
    plan = _plan(real, retained, rows)
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


def _plan(real: Tensor, retained: Tensor, rows: list[KeptRow]) -> Plan:
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
def _deepstack(model: nn.Module, host: Host, short: Shortened) -> Iterator[None]:
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


def _refuse(base: nn.Module, host: Host, given: Mapping[str, Any]) -> None:
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
            "with an empty cache, or pass later images in one prompt with the first."
        )
    for name in ("vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy"):
        config = getattr(base.config, name, None)
        if name in given and given[name] != config:
            raise ValueError(
                f"{name}: got {given[name]!r}, but the model was pruned for {config!r} of its configuration. "
                "Leave the argument out, or change model.config before llava.prune."
            )


def _placeholders(
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

"""Run a host up to its language model, and record what its tower and its features were on the way.

    reached, seen = dry_run(model, host, inputs, pruner)
    reached["inputs_embeds"]                  # (B, S, D), visual features in place
    seen[0].cues["attention"]                 # of the first modality; see `hosts.base.Seen`

Methods and modules of the host are watched for the time of the run only.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from llava.integrations.cue import CueCollector
from llava.integrations.hosts.base import Host, Seen
from llava.pruning import Pruner

# Arguments of a base model that are not about images
TEXT_ARGUMENTS = {
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
PROMPT_ARGUMENTS = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
}
_seeing = threading.RLock()  # methods of the model are replaced while the tower runs


class LanguageModelReached(BaseException):
    """Carries the arguments of the language model out of the base model; not an error."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def dry_run(
    model: nn.Module, host: Host, given: Mapping[str, Any], pruner: Pruner
) -> tuple[dict[str, Any], list[Seen]]:
    """Run the base model until it calls its language model; return what that gets, and what was seen."""
    base = host.base(model)
    takes = set(inspect.signature(base.forward).parameters) - (TEXT_ARGUMENTS - PROMPT_ARGUMENTS)
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

"""The parts of transformers that are not public, each behind one function.

transformers may rename or move them in any release. `tests/model/test_transformers_compat.py` checks each one
and names what changed. Tried on transformers 5.2 and 5.23.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from llava.model.checkpoint import CheckpointError


def build_config(config_class: Any, entries: dict[str, Any], where: str) -> Any:
    """Make a configuration of transformers from checked entries of `where`, a config.json.

    Raises:
        CheckpointError: transformers refuses an entry that is not among the checked ones.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class.from_dict(entries)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where}: {reason}. Use the file of the original checkpoint.") from error


def set_attention(config: Any, kernels: str) -> None:
    """Choose the attention kernels (sdpa, eager, flash_attention_2) of a model to be built from `config`."""
    config._attn_implementation = kernels


def attention_of(config: Any) -> str:
    """Return the attention kernels that a model with this config runs."""
    return config._attn_implementation


def run_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Run one layer of a vision transformer, without a mask; (B, N + 1, C) in and out.

    Releases differ in whether DINOv2's layer takes a mask and whether layers return a tuple.
    """
    return layer_function(layer)(layer, hidden)


def layer_function(layer: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return what `run_layer` calls for layers of this kind, to be compiled."""
    return _run_with_mask if _takes_mask(type(layer)) else _run_without_mask


def _run_with_mask(layer: nn.Module, hidden: Tensor) -> Tensor:
    result = layer(hidden, attention_mask=None)
    return result[0] if isinstance(result, tuple) else result


def _run_without_mask(layer: nn.Module, hidden: Tensor) -> Tensor:
    result = layer(hidden)
    return result[0] if isinstance(result, tuple) else result


@functools.cache
def _takes_mask(layer_class: type[nn.Module]) -> bool:
    return "attention_mask" in inspect.signature(layer_class.forward).parameters


def run_decoder_layers(
    decoder: nn.Module, embeds: Tensor, positions: Tensor, cache: Any, mask: Tensor | None, run: Any
) -> Tensor:
    """Run the layers of a Llama or Mistral decoder one by one, as its `forward` does.

    A layer is given its own part of the cache, so that nothing it computes with depends on its number: one
    compiled function can be used for all layers.

    Args:
        embeds: (B, n, D).
        positions: (B, n).
        mask: (B, 1, n, L) to add to attention scores; None is causal.
        run: `run_decoder_layer`, or a compiled version of it.
    """
    rotary = decoder.rotary_emb(embeds, position_ids=positions)
    hidden = embeds
    for layer, held in zip(decoder.layers, cache.layers, strict=True):
        hidden = run(layer, hidden, mask, rotary, positions, held)
    return decoder.norm(hidden)


def run_decoder_layer(
    layer: nn.Module, hidden: Tensor, mask: Tensor | None, rotary: Any, positions: Tensor | None, held: Any
) -> Tensor:
    """Run one layer of a decoder; `held` is its layer of the cache, `rotary` has the angles of positions."""
    result = layer(
        hidden,
        attention_mask=mask,
        position_embeddings=rotary,
        position_ids=positions,
        past_key_values=held,
        use_cache=True,
    )
    return result[0] if isinstance(result, tuple) else result


def all_idle(hooks: Iterable[Callable[..., Any]]) -> bool:
    """Return whether transformers itself left all of these forward hooks behind.

    It adds them when `output_hidden_states` or `output_attentions` is first used, and never removes them.
    They do nothing in calls without these arguments.
    """
    return all(getattr(hook, "__module__", None) == "transformers.utils.output_capturing" for hook in hooks)


def rope_follows_length(decoder: nn.Module) -> bool:
    """Return whether the angle of a position depends on how many positions there are (dynamic, longrope)."""
    kind = decoder.rotary_emb.rope_type
    return "dynamic" in kind or kind == "longrope"


def rebuild_rotary(model: nn.Module, device: torch.device) -> None:
    """Build the decoder's rotary embedding again, on `device`: its buffers are not in any file."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)


def whole_modules(model: nn.Module) -> list[str]:
    """Return the class names of modules that must not be split over devices."""
    return list(model._no_split_modules or ())


def is_growing_layer(layer: Any) -> bool:
    """Return whether a cache layer keeps all keys and values: no sliding window, no fixed size."""
    return type(layer) is DynamicLayer


def init_cache_layer(layer: DynamicLayer, keys: Tensor, values: Tensor) -> None:
    """Make a cache layer that was just created ready for keys and values like these."""
    layer.lazy_initialization(keys, values)


@contextmanager
def watch_attention(decoder: nn.Module, see: Callable[[nn.Module, Tensor, Any], None]) -> Iterator[None]:
    """Within this context, call see(module, hidden, rotary) before the attention of every decoder layer.

    `hidden` (B, S, D) is the module's input after the norm, `rotary` the cos and sin (B, S, d) that it
    rotates queries and keys with. Llama and Mistral, with any kernels.
    """

    def hook(module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(module, kwargs["hidden_states"], kwargs["position_embeddings"])

    handles = [layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for layer in decoder.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""The runtime of a loaded model: which stages are captured, and the memory that they share.

    model.set_runtime(graphs=False)      # or VISPRUNER_GRAPHS=0: every stage is eager
    model.runtime.captured.refused      # stages that could not be captured, and why

Graphs contain addresses of weights. They are dropped if weights move or are replaced, modules are exchanged
or other kernels are chosen. Where a graph would not do what the modules do, the model runs eagerly: in
training, with gradients, under autocast, with hooks, and with adapters that can be switched off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from llava.model.runtime.arena import Arena
from llava.model.runtime.graphs import GraphCache
from llava.model.settings import choose_runtime
from llava.model.transformers_compat import (
    all_idle,
    attention_of,
    rope_follows_length,
    run_decoder_layer,
)

_MOST_SHAPES = 64
_KERNELS = ("sdpa", "eager")  # that take a mask of two dimensions and a value per element


class Runtime:
    """The captured stages of one model.

    Args:
        graphs: capture stages; None: on CUDA, unless VISPRUNER_GRAPHS is 0. On other devices a stand-in runs,
            which is only of use in tests.
        compiled: fuse the kernels of layers with torch.compile. Moves last bits.
    """

    def __init__(self, device: torch.device, graphs: bool | None = None, compiled: bool = False) -> None:
        self.graphs, self.compiled = choose_runtime(graphs, False, device), compiled
        self.decoder_layer = None  # a compiled function that all layers share
        if compiled:
            _allow_shapes()
            self.decoder_layer = torch.compile(run_decoder_layer)
        self.lock = threading.RLock()  # buffers are shared: one batch at a time
        self.captured = GraphCache()
        self.arenas: dict[str, Arena] = {}
        self.lent: int | None = None  # the thread whose search by transformers holds the arenas
        self._seen: Any = None
        self._inside = _Inside()
        self._hooks: int | None = None  # hooks that had been registered anywhere when modules were looked at
        self._plain = True
        self._checked: bool | None = None  # within `checked`

    def __deepcopy__(self, _memo: Any) -> Runtime:
        return _restored(self.graphs, self.compiled)

    def __reduce__(self) -> Any:
        return _restored, (self.graphs, self.compiled)

    @contextmanager
    def checked(self, model: Any) -> Iterator[None]:
        """Look at the modules of `model` once for all stages of the block; other threads wait."""
        with self.lock:
            outer = self._checked
            self._checked = self.ready(model)
            try:
                yield
            finally:
                self._checked = outer

    def ready(self, model: Any) -> bool:
        """Return whether the stages of `model` may be captured now; drop graphs of other weights."""
        if not (self.graphs or self.compiled) or model.training or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled(model.get_input_embeddings().weight.device.type):
            return False
        with self.lock:
            return self._look_at(model) if self._checked is None else self._checked

    def _look_at(self, model: Any) -> bool:
        seen = _identity(model, self._inside)
        if seen != self._seen:
            self.clear()
            self._inside = _Inside(model)
            self._seen, self._hooks = _identity(model, self._inside), None
        # Every hook of a module has a number; counting them is faster than looking at all modules.
        if self._hooks != RemovableHandle.next_id or not self._plain:
            self._hooks = RemovableHandle.next_id
            self._plain = all(map(_is_plain, (model.__dict__, *self._inside.attributes)))
            if not self._plain:
                self.captured.clear()
        return self._plain

    def decodes(self, model: Any) -> bool:
        """Return whether prompts may be answered over the static cache, which keeps every position."""
        config = model.config
        if self.lent == threading.get_ident():  # asked by a streamer or stopping criterion of that search
            return False
        if _slides(config) or rope_follows_length(model.get_model()):  # padding would count
            return False
        return attention_of(config) in _KERNELS and self.ready(model)

    def runner(self, model: Any, stage: str) -> Callable[..., Any] | None:
        """Return run(key, function, *inputs), which captures `function`; None if `model` runs eagerly."""
        return partial(self.run, stage) if self.ready(model) else None

    def run(
        self, stage: str, key: Hashable, function: Callable[..., Any], *inputs: Tensor, copies: bool = True
    ) -> Any:
        """Return `function(*inputs)`, from a graph unless graphs are off (see `GraphCache.run`)."""
        if not self.graphs:
            return function(*inputs)
        with self.lock:  # a graph has one set of inputs and outputs
            return self.captured.run(stage, key, function, *inputs, copies=copies)

    def arena(self, model: Any, name: str, rows: int, length: int) -> Arena:
        """Return the arena `name` with room for a batch; graphs over one that has to move are dropped."""
        weight = model.get_input_embeddings().weight
        arena = self.arenas.setdefault(name, Arena(model.config, weight.device, weight.dtype))
        if not arena.fits(rows, length):
            for stage in ("prefill", "suffixes", "decoding step"):
                self.captured.clear(stage)
        arena.fit(rows, length)
        return arena

    def clear(self) -> None:
        """Free all graphs and buffers."""
        with self.lock:
            self.captured.clear()
            self.arenas.clear()


def _slides(config: Any) -> bool:
    """Return whether layers attend to a window of the last tokens only."""
    window = getattr(config, "sliding_window", None)
    return window is not None and getattr(config, "use_sliding_window", True)


def _allow_shapes() -> None:
    """Let a function be compiled for more shapes: past its limit, torch runs it eagerly without a word."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(_MOST_SHAPES, getattr(config, name)))


def _restored(graphs: bool, compiled: bool) -> Runtime:
    return Runtime(torch.device("cpu"), graphs, compiled)


def _is_plain(inside: dict[str, Any]) -> bool:
    """Return whether a graph does what a module does, by its attributes.

    It calls no hooks, and does not see when weights wait on another device (accelerate) or when an adapter is
    switched off (peft).
    """
    if inside["_forward_pre_hooks"] or "_hf_hook" in inside or "_disable_adapters" in inside:
        return False
    return not inside["_forward_hooks"] or all_idle(inside["_forward_hooks"].values())


def _precision() -> str:
    """Return how float32 products are computed on CUDA. torch 2.9 has another setting than before."""
    new = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() if new is None else new  # the old one may raise there


class _Inside:
    """The dictionaries of the modules inside a model: reading them is ten times faster than modules.

    Not those of the model itself, which contains the runtime: its memory is freed with the last reference.
    """

    def __init__(self, model: Any = None) -> None:
        modules = [] if model is None else [module for module in model.modules() if module is not model]
        self.attributes = [module.__dict__ for module in modules]
        self.children = [one["_modules"] for one in self.attributes if one["_modules"]]
        tensors = [one[name] for one in self.attributes for name in ("_parameters", "_buffers")]
        self.tensors = [one for one in tensors if one]
        self.ids: tuple[int, ...] = ()  # of the tensors, when `weights` was made
        self.weights: list[Tensor] = []


def _identity(model: Any, inside: _Inside) -> tuple:
    """Return what graphs of a model depend on besides inputs: modules, weights, functions, kernels.

    Called for every question.
    """
    # without a loop in Python: it would take as long as a stage
    children = tuple(map(id, chain.from_iterable(map(dict.values, (model._modules, *inside.children)))))
    tensors = tuple(map(id, chain.from_iterable(map(dict.values, inside.tensors))))
    if tensors != inside.ids:  # then all of them are looked at anew
        inside.ids = tensors
        held = chain.from_iterable(map(dict.values, inside.tensors))
        inside.weights = [one for one in held if one is not None]
    weights = tuple(map(Tensor.data_ptr, inside.weights))
    replaced = [id(one["forward"]) for one in inside.attributes if "forward" in one]
    tower, dtypes = model.get_vision_tower(), [model.get_input_embeddings().weight.dtype]
    kernels = [attention_of(model.config), _precision()]
    if tower is not None:
        dtypes.append(tower.dtype)
        kernels.append(tower.attn_implementation)
    return children, weights, replaced, dtypes, kernels

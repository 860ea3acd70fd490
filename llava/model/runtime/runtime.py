"""The runtime of a loaded model: which stages are captured, and the memory that they share.

    model.set_runtime(graphs=False)      # or VISPRUNER_GRAPHS=0: every stage is eager
    model.runtime.captured.refused      # stages that could not be captured, and why

Graphs contain addresses of weights. They are dropped if weights move, modules are exchanged or hooks are
added; a model in training or with hooks runs eagerly.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from llava.model.runtime.arena import Arena
from llava.model.runtime.graphs import GraphCache
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
        if graphs is None:
            chosen = os.environ.get("VISPRUNER_GRAPHS")
            graphs = device.type == "cuda" and chosen != "0"
        self.graphs, self.compiled = graphs, compiled
        self.decoder_layer = None  # a compiled function that all layers share
        if compiled:
            _allow_shapes()
            self.decoder_layer = torch.compile(run_decoder_layer)
        self.lock = threading.RLock()  # buffers are shared: one batch at a time
        self.captured = GraphCache()
        self.arenas: dict[str, Arena] = {}
        self.lent: int | None = None  # the thread whose search by transformers holds the arenas
        self._seen: Any = None
        self._modules: list[dict[str, Any]] = []  # the attributes of every module
        self._hooks: int | None = None  # hooks that had been registered anywhere when modules were looked at
        self._plain = True
        self._checked: bool | None = None  # within `checked`

    def __deepcopy__(self, _memo: Any) -> Runtime:
        return self._fresh()

    def __reduce__(self) -> Any:
        return _restored, (self.graphs, self.compiled)

    def _fresh(self) -> Runtime:
        return _restored(self.graphs, self.compiled)

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
        if self._checked is not None:
            return self._checked
        # Every hook of a module has a number; counting them is faster than looking at all modules.
        seen = _identity(model, self._modules)
        if seen != self._seen:
            self.clear()
            self._modules = [module.__dict__ for module in model.modules()]
            self._seen, self._hooks = _identity(model, self._modules), None
        if self._hooks != RemovableHandle.next_id or not self._plain:
            self._hooks, self._plain = RemovableHandle.next_id, _is_plain(self._modules)
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
        with self.lock:  # images are also encoded outside of `checked`
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


def _is_plain(modules: list[dict[str, Any]]) -> bool:
    """Return whether no module has hooks, which a graph would not call, or is split over devices."""
    return not any(
        inside["_forward_pre_hooks"]
        or "_hf_hook" in inside
        or (inside["_forward_hooks"] and not all_idle(inside["_forward_hooks"].values()))
        for inside in modules
    )


def _identity(model: Any, modules: list[dict[str, Any]]) -> tuple:
    """Return what graphs of a model depend on besides inputs: its modules, where weights are, kernels.

    Called for every question, so modules are read from their dictionaries, which is ten times faster.
    """
    children = tuple([id(child) for inside in modules for child in inside["_modules"].values()])
    decoder = model.get_model()
    parts = (
        *(model.get_input_embeddings(), model.get_output_embeddings(), decoder.layers[-1]),
        *(getattr(decoder, "mm_projector", None), model.get_vision_tower()),
    )
    weights = [next(part.parameters(), None) for part in parts if part is not None]
    places = tuple(weight.data_ptr() for weight in weights if weight is not None)
    return children, places, attention_of(model.config)

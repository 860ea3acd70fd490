"""Functions of fixed shapes, captured once and replayed as CUDA graphs, which launch all kernels at once.

    captured = capture(function, inputs)    # function(*inputs) -> a tensor, or a tuple of tensors
    outputs = captured(*inputs)             # valid until the next call, also of others in the same pool

    graphs = GraphCache()
    outputs = graphs.run("prefill", key, function, *inputs)     # captured on first use, copies of the outputs

A graph replays the same kernels on the same addresses, so it gives the bits of the function: `capture`
compares them once and raises if they differ. On other devices than CUDA a stand-in runs the function into
static buffers, so that everything around it runs the same way. Independent of models.

A captured function must not look at the device, must give the same outputs for the same inputs, and may write
into buffers that outlive the graph if writing twice changes nothing.
"""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]

MOST_GRAPHS = 96
MOST_BYTES = 4 << 30  # of static buffers and intermediate results
_MOST_EAGER = 4096  # keys that are remembered as not capturable
_NO_MEMORY = "out of memory"
_WARMUP = 2  # libraries allocate workspaces and Triton compiles before the capture

_log = logging.getLogger(__name__)


class CaptureError(RuntimeError):
    """A function cannot be captured, or its graph gives other bits."""


class _StandIn:
    """What a CUDA graph does, without one: replaying computes the outputs into the same tensors again."""

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self._function, self._inputs = function, inputs
        self.outputs = tuple(torch.empty_like(one) for one in _several(function(*inputs)))

    def replay(self) -> None:
        for static, new in zip(self.outputs, _several(self._function(*self._inputs)), strict=True):
            static.copy_(new)


class Captured:
    """A captured function: `captured(*inputs)` returns its outputs, which the next call overwrites.

    Raises:
        ValueError: an input has another shape or dtype than at the capture.
    """

    def __init__(
        self, graph: Any, inputs: Sequence[Tensor], outputs: tuple[Tensor, ...], alone: bool
    ) -> None:
        self._graph, self._inputs, self._outputs, self._alone = graph, inputs, outputs, alone

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        for static, new in zip(self._inputs, inputs, strict=True):
            if new.shape != static.shape or new.dtype != static.dtype:  # copying would broadcast and round
                raise ValueError(
                    f"captured function: got an input {tuple(new.shape)} {new.dtype}, but it was captured "
                    f"with {tuple(static.shape)} {static.dtype}. Capture it for these inputs as well."
                )
            static.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._outputs[0] if self._alone else self._outputs


def capture(function: Function, inputs: Sequence[Tensor], pool: Any = None) -> Captured:
    """Capture `function(*inputs)`, and check that replaying gives its bits.

    Args:
        function: returns a tensor or a tuple of tensors, and looks at no value on the device.
        inputs: at least one tensor; all on one device.
        pool: of memory, shared with other graphs (`torch.cuda.graph_pool_handle()`).

    Raises:
        CaptureError: the function cannot be captured, or its outputs differ. torch.OutOfMemoryError.
    """
    # Neither graphs nor their buffers may be inference tensors: they are written in any mode.
    with torch.inference_mode(False), torch.no_grad():
        static = [one.clone() for one in inputs]
        device = static[0].device
        try:
            if device.type == "cuda":
                with torch.cuda.device(device):
                    graph, found = _cuda_graph(function, static, pool, _stream(device))
            else:
                graph = _StandIn(function, static)
                found = graph.outputs
            expected = function(*static)
            alone, outputs = isinstance(expected, Tensor), _several(found)
            expected = tuple(one.clone() for one in _several(expected))
            graph.replay()
            if not all(map(same_bits, outputs, expected)):
                again = all(map(same_bits, _several(function(*static)), expected))
                counts = [int((a != b).sum()) for a, b in zip(outputs, expected, strict=True)]
                raise CaptureError(
                    f"replaying gives other bits than the function (values that differ: {counts}; the "
                    f"function repeats its own bits: {again})"
                )
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise torch.OutOfMemoryError(str(error)) from error
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise error if isinstance(error, CaptureError) else CaptureError(reason) from error
    return Captured(graph, static, outputs, alone)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream in which graphs of a device are captured, with one workspace of cuBLAS for all.

    torch's own belongs to the device that captured first: on another one, it would capture nothing.
    """
    return torch.cuda.Stream(device)


def _cuda_graph(
    function: Function, static: Sequence[Tensor], pool: Any, beside: torch.cuda.Stream
) -> tuple[Any, Any]:
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(_WARMUP):
            function(*static)
    torch.cuda.current_stream().wait_stream(beside)
    torch.cuda.synchronize()
    _drop_workspaces()
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may go on uploading images
    with torch.cuda.graph(graph, pool=pool, stream=beside, capture_error_mode="thread_local"):
        outputs = function(*static)
    return graph, outputs


def _drop_workspaces() -> None:
    """Make cuBLAS take its next workspace from the memory of the graph that is captured next.

    torch.compile frees all workspaces when it captures graphs of its own, and replaying a graph that uses
    one would fail. In the graph's memory it stays mapped.
    """
    drop = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if drop is not None:
        drop()


def _several(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error of a device without memory; MPS and libraries raise no OutOfMemoryError."""
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal to the bit, NaN included. Looks at the device."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


class GraphCache:
    """Captured functions by key, the least recently used dropped first; `run` is eager where capture fails.

    Attributes:
        bytes: memory of all graphs together, as far as the device counts it.
        refused: names of stages that could not be captured for some shapes, with the first reason.
    """

    def __init__(self, most_graphs: int = MOST_GRAPHS, most_bytes: int = MOST_BYTES) -> None:
        self.most_graphs, self.most_bytes = most_graphs, most_bytes
        self.bytes = 0
        self.refused: dict[str, str] = {}
        self._eager: dict[Hashable, str] = {}  # keys that could not be captured
        self._graphs: OrderedDict[Hashable, tuple[Captured, int]] = OrderedDict()
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self, stage: str | None = None) -> None:
        """Drop all graphs, or those of one stage; stages that found no memory may be captured again."""
        self.refused = {name: why for name, why in self.refused.items() if why != _NO_MEMORY}
        self._eager = {key: why for key, why in self._eager.items() if why != _NO_MEMORY}
        for key in [key for key in self._graphs if stage in (None, key[0])]:
            self.bytes -= self._graphs.pop(key)[1]
        self._free_pool()

    def _free_pool(self) -> None:
        if not self._graphs:
            self._pool = None  # a pool ends with the last graph in it, and cannot be used again

    def run(self, stage: str, key: Hashable, function: Function, *inputs: Tensor, copies: bool = True) -> Any:
        """Return `function(*inputs)` from a graph, captured now if there is none.

        Args:
            stage: name of what the function does, for messages.
            key: everything besides the shapes and dtypes of inputs that shapes the graph.
            copies: return copies of the outputs. Without, they are valid until the next replay of any graph:
                graphs share memory, and an earlier one may use that of the outputs of a later one.

        Returns:
            The outputs. Where capturing fails, the function's own, with one warning per stage.
        """
        whole = (stage, key, *((one.shape, one.dtype, one.device) for one in inputs))
        if whole in self._eager or (whole not in self._graphs and not self._capture(whole, function, inputs)):
            return function(*inputs)
        self._graphs.move_to_end(whole)
        found = self._graphs[whole][0](*inputs)
        if not copies:
            return found
        return found.clone() if isinstance(found, Tensor) else tuple(one.clone() for one in found)

    def _capture(self, whole: tuple, function: Function, inputs: Sequence[Tensor]) -> bool:
        start, device = time.perf_counter(), inputs[0].device
        if device.type == "cuda" and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        before = _reserved(device)
        try:
            captured = capture(function, inputs, self._pool)
        except torch.OutOfMemoryError:
            self.clear()
            self._refuse(whole, _NO_MEMORY)
            return False
        except CaptureError as error:
            self._free_pool()
            self._refuse(whole, str(error))
            return False
        size = max(0, _reserved(device) - before)
        self._graphs[whole] = captured, size
        self.bytes += size
        while len(self._graphs) > 1 and (
            len(self._graphs) > self.most_graphs or self.bytes > self.most_bytes
        ):
            self.bytes -= self._graphs.popitem(last=False)[1][1]
        shapes = ", ".join(str(tuple(one.shape)) for one in inputs)
        taken = time.perf_counter() - start
        _log.info("captured %s of %s in %.2f s, %.0f MiB", whole[0], shapes, taken, size / 2**20)
        return True

    def _refuse(self, whole: tuple, reason: str) -> None:
        if len(self._eager) >= _MOST_EAGER:
            self._eager.clear()
        stage, self._eager[whole] = whole[0], reason
        if stage in self.refused:
            return
        self.refused[stage] = reason
        warnings.warn(
            f"{stage}: runs without a CUDA graph, which is slower and gives the same results: {reason}",
            stacklevel=4,
        )


def _reserved(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)

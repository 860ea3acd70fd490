"""The rounds of the selection as a captured CUDA graph: hundreds of small kernels, one launch.

Used where Triton is absent. Shapes are fixed by batch, residual length and target, so every such triple has a
graph of its own; the few most recent are kept, with the memory they hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT = 8
_graphs: OrderedDict[tuple[object, ...], _Captured] = OrderedDict()


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    similar: Tensor
    residual: Tensor
    out: Tensor


def thin(
    similar: Tensor, residual: Tensor, target: int, rounds: Callable[[Tensor, Tensor, int], Tensor]
) -> Tensor:
    """`rounds(similar, residual, target)`, replayed: (B, R, R) float64, (B, R) int64 -> (B, target) int64."""
    key = (similar.device, similar.shape, target)
    captured = _graphs.get(key)
    if captured is None:
        captured = _graphs[key] = _capture(similar, residual, target, rounds)
        if len(_graphs) > KEPT:
            _graphs.popitem(last=False)
    _graphs.move_to_end(key)
    captured.similar.copy_(similar)
    captured.residual.copy_(residual)
    captured.graph.replay()
    return captured.out.clone()


def _capture(
    similar: Tensor, residual: Tensor, target: int, rounds: Callable[[Tensor, Tensor, int], Tensor]
) -> _Captured:
    similar, residual = similar.clone(), residual.clone()
    with torch.cuda.device(similar.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a run before the capture: libraries set themselves up in it
            rounds(similar, residual, target)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = rounds(similar, residual, target)
    return _Captured(graph, similar, residual, out)

"""Captured stages on a device: the same functions and the same bits, without launching every kernel."""

from llava.model.runtime.graphs import Captured, CaptureError, GraphCache, capture
from llava.model.runtime.runtime import Runtime

__all__ = ["Captured", "CaptureError", "GraphCache", "Runtime", "capture"]

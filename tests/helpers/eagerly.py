"""Eager stages of a model with captured ones, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def eagerly(model: Any, function: Callable[[], Any]) -> Any:
    """Call a function with eager stages."""
    before = model.runtime
    model.set_runtime(graphs=False)
    try:
        return function()
    finally:
        model.__dict__["_runtime"] = before

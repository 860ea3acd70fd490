"""Small models for captured stages, and their eager stages to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.model.builder import load_pretrained_model

CHECKPOINTS = Path(__file__).parents[1] / "data" / "model"


def load_case(device: str, name: str, kernels: str) -> tuple[Any, Any]:
    """Load a small checkpoint in float32; return (tokenizer, model). Skips the test without a GPU for it."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    same = {"device": device, "dtype": "float32", "attn_implementation": kernels}
    return load_pretrained_model(str(CHECKPOINTS / name), **same)[:2]


def eagerly(model: Any, function: Callable[[], Any]) -> Any:
    """Call a function with eager stages."""
    before = model.runtime
    model.set_runtime(graphs=False)
    try:
        return function()
    finally:
        model.__dict__["_runtime"] = before

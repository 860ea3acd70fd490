"""Access to the reference pipeline's data (tests/data/model): checkpoints, cases, images, statistics."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers.recipe_images import SIZES, make_image

DATA = Path(__file__).resolve().parents[1] / "data" / "model"
CHECKPOINT = {key: f"ckpt_llava{key}" for key in ("15", "15s", "16", "16s")}


@functools.cache
def e2e(name: str = "e2e") -> dict:
    """e2e.json (pruned) or e2e_vanilla.json (unpruned)."""
    return json.loads((DATA / f"{name}.json").read_text())


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(DATA / "e2e_arrays.npz") as file:
        return {k: file[k] for k in file.files}


@functools.cache
def golden_image(name: str) -> Image.Image:
    """Return one of the eight synthetic test images."""
    return next(Image.fromarray(make_image(w, h, seed)) for n, w, h, seed in SIZES if n == name)


def assert_like(tensor: torch.Tensor, stats: dict, tolerance: float) -> None:
    """Compare a tensor with its recorded shape, moments and probes (flat index, value)."""
    array = tensor.detach().double().numpy()
    assert list(array.shape) == stats["shape"]
    flat = array.ravel()
    for index, value in stats["probe"]:
        assert abs(flat[index] - value) < tolerance, (index, flat[index], value)
    assert abs(flat.mean() - stats["mean"]) < tolerance
    assert abs(flat.std() - stats["std"]) < tolerance
    assert abs(np.abs(flat).max() - stats["absmax"]) < tolerance


def unpack_mask(text: str, patches: int) -> np.ndarray:
    """Hex of np.packbits -> bool (patches,)."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:patches].astype(bool)

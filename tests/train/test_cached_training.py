"""Whole runs with encoded images on disk: the losses of a run without, and no work twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.checkpoints import DATA, SOURCE
from llava.train import data
from llava.train.budgets import Budgets
from llava.train.train import train

IMAGES = 6
QUESTION = "<image>\nIs there a dog?"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder, samples = tmp_path_factory.mktemp("world"), []
    for seed in range(IMAGES):
        pixels = np.random.default_rng(seed).integers(0, 255, (50, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "No" if seed % 2 else "Yes"}]
        samples.append({"id": str(seed), "image": f"{seed}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples))
    return folder


def losses(world: Path, output: Path, **more: object) -> tuple[list[float], dict]:
    """Train for two epochs of three batches, two of them per step."""
    tower = json.loads((SOURCE / "config.json").read_text())["mm_vision_tower"]
    given = {
        "model_name_or_path": SOURCE,
        "version": "v1",
        "vision_tower": DATA / tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
        "data_path": world / "data.json",
        "image_folder": world,
        "image_aspect_ratio": "pad",
        "output_dir": output,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **more,
    }
    summary = train([word for name, value in given.items() for word in (f"--{name}", str(value))])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], summary


def test_losses_are_those_without_a_cache(world, tmp_path, monkeypatch) -> None:
    torch.set_num_threads(1)
    drawn, opened, draw, open_image = [], [], Budgets.draw, data.open_image
    monkeypatch.setattr(Budgets, "draw", lambda self, *step: drawn.append(step) or draw(self, *step))
    monkeypatch.setattr(data, "open_image", lambda path: opened.append(path) or open_image(path))
    options = {"method": "random", "visual_token_num": "8,none"}
    plain, _ = losses(world, tmp_path / "plain", **options)
    assert len(opened) == 2 * IMAGES
    # the last batch of an epoch is a step of its own, and a resumed run counts its batches from 0 again
    assert drawn == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0)]
    opened.clear()
    cached, summary = losses(world, tmp_path / "run", vision_cache=tmp_path / "cache", **options)
    assert cached == plain and len(opened) == IMAGES
    assert (summary["images_encoded"], summary["images_read"]) == (IMAGES, IMAGES)
    assert len(list((tmp_path / "cache").glob("*/*"))) == IMAGES

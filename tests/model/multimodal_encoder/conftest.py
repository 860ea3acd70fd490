"""A small DINOv2 for the tests of towers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

PROCESSOR = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 56}, "resample": 3,
    "crop_size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A small DINOv2 of 98 px (7 x 7 patches) that is run at 56 px (4 x 4)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=98,
        patch_size=14,
        layerscale_value=0.7,
    )
    model = Dinov2Model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder, model.eval()

"""Features: the store keeps rows, and patch labels match the image."""

import numpy as np
import torch

from llava.tiny import world
from llava.tiny.training.features import GRID, PATCH, FeatureStore, patch_labels, pixels


def test_store_keeps_rows_and_grows(tmp_path):
    store = FeatureStore(tmp_path, 2)
    row = torch.randn(576, 384)
    store.write(1, row)
    larger = FeatureStore(tmp_path, 3)
    assert larger.done.tolist() == [0, 1, 0]
    assert torch.equal(larger.read(np.array([1]))[0], row.to(torch.bfloat16).float())


def test_patch_labels_match_objects():
    for seed in range(5):
        image, scene = world.draw(seed)
        tensor, (x0, y0) = pixels(image)
        assert tensor.shape == (3, 336, 336)
        labels = patch_labels(scene).reshape(GRID, GRID)
        for item in scene.objects:
            row, column = int((item.center[1] + y0) // PATCH), int((item.center[0] + x0) // PATCH)
            assert (world.OBJECTS + world.WORDS)[labels[row, column]] == item.name

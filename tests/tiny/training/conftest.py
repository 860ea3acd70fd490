"""A tokenizer folder, random features and a small recipe for the tests of training."""

import pytest
import torch

from llava.paths import BUNDLED_MODEL
from llava.tiny.training import export
from llava.tiny.training.features import FeatureStore
from llava.tiny.training.student import Phase, Recipe

torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name in export.TOKENIZER_FILES:
        (folder / name).write_bytes((BUNDLED_MODEL / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Random features of a dozen images, so that no test needs the tower."""
    store = FeatureStore(tmp_path_factory.mktemp("features"), 12)
    for row in range(12):
        store.write(row, torch.randn(576, 384))
    return store


@pytest.fixture
def recipe():
    return Recipe(
        pictures=12,
        validation=(6, 10),
        phases=(
            Phase(2, 2, (16, 32), pool=6, averaged=True),
            Phase(2, 1, (576, 576), (1.0, 0.0), mixture="late", pool=8, wide=True, averaged=True),
        ),
        questions=2,
        width=32,
        layers=1,
        heads=1,
        mlp=64,
        bfloat16=False,
    )

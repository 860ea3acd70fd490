"""Caches of derived data: other source code means another cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava import paths
from llava.tiny import cache_key, train
from llava.tiny.training import features
from llava.tiny.training.student import Recipe


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """Simulate an edit of one source file, by its path below llava/tiny."""
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))

    def replaced(name: str, old: bytes, new: bytes) -> None:
        source = cache_key.TINY / name
        copy = tmp_path / source.name
        copy.write_bytes(source.read_bytes().replace(old, new))
        assert copy.read_bytes() != source.read_bytes()
        for module, attribute in ((features, "FEATURE_SOURCES"), (train, "RUN_SOURCES")):
            files = tuple(copy if path == source else path for path in getattr(module, attribute))
            monkeypatch.setattr(module, attribute, files)

    return replaced


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("world/scenes.py", b"0.72", b"0.5"),
        ("world/sprites/atlas.png", b"IDAT", b"IDOT"),
        ("tower.py", b'"resample": 3', b'"resample": 2'),
        ("training/features.py", b"SELECT_LAYER = -2", b"SELECT_LAYER = -1"),
    ],
)
def test_features_of_other_code_are_not_used(edit, name, old, new):
    before, run = features.feature_folder(), train.run_folder(Recipe())
    features.FeatureStore(before, 1).write(0, torch.ones(576, 384))
    assert features.FeatureStore(features.feature_folder(), 1).done.all()
    edit(name, old, new)
    assert features.feature_folder().parent == before.parent == paths.cache_folder() / "tiny"
    assert not features.FeatureStore(features.feature_folder(), 1).done.any()
    assert train.run_folder(Recipe()) != run


def test_a_run_with_other_questions_does_not_resume_but_keeps_its_features(edit):
    folder, run = features.feature_folder(), train.run_folder(Recipe())
    assert train.run_folder(Recipe(seed=1)) != run
    edit("world/questions.py", b"rs.rand() < 0.75", b"rs.rand() < 0.25")
    assert features.feature_folder() == folder and train.run_folder(Recipe()) != run


def test_comments_do_not_change_the_key(edit):
    folder = features.feature_folder()
    edit("world/scenes.py", b"SIDE = 336", b"SIDE = 336  # pixels")
    assert features.feature_folder() == folder


@pytest.mark.parametrize(
    "module, sources",
    [
        ("llava.tiny.training.features", cache_key.FEATURE_SOURCES),
        ("llava.tiny.training.trainer", cache_key.RUN_SOURCES),
    ],
)
def test_all_imported_sources_are_in_the_key(module, sources):
    code = (
        f"import sys, {module}\n"
        "print(*[m.__file__ for n, m in sys.modules.items() if n.startswith('llava.tiny')], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {path for line in done.stdout.splitlines() if (path := Path(line)).name != "__init__.py"}
    assert imported - {Path(cache_key.__file__)} <= set(sources)

"""Cache keys from source code, so that data derived by other code is not reused."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

TINY = Path(__file__).parent
# What features of the training images depend on: how images are drawn, preprocessed and encoded.
FEATURE_SOURCES = (
    TINY / "world" / "vocabulary.py",
    TINY / "world" / "background.py",
    TINY / "world" / "foreground.py",
    TINY / "world" / "sprites" / "atlas.png",
    TINY / "world" / "scenes.py",
    TINY / "registry.py",
    TINY / "tower.py",
    TINY / "training" / "features.py",
)
# What features of the training clips depend on.
CLIP_SOURCES = (
    TINY / "world" / "vocabulary.py",
    TINY / "world" / "background.py",
    TINY / "world" / "foreground.py",
    TINY / "world" / "sprites" / "atlas.png",
    TINY / "world" / "clips.py",
    TINY / "registry.py",
    TINY / "tower.py",
    TINY / "training" / "clip_features.py",
)
# What a training run depends on besides its recipe.
RUN_SOURCES = (
    *FEATURE_SOURCES,
    TINY / "world" / "questions.py",
    TINY / "world" / "mixtures.py",
    TINY / "training" / "tokenizer.py",
    TINY / "training" / "student.py",
    TINY / "training" / "trainer.py",
)


def source_key(*files: Path) -> str:
    """Hash source files; comments and formatting of Python files do not change the result.

    Returns:
        Twelve hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in files:
        data = path.read_bytes()
        digest.update(ast.dump(ast.parse(data)).encode() if path.suffix == ".py" else data)
        digest.update(b"\0")
    return digest.hexdigest()[:12]

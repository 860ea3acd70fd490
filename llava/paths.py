"""Locations of the repository, the bundled model and data, and the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED_MODEL = REPOSITORY / "playground" / "tiny" / "llava-tiny"
BUNDLED_ANYRES_MODEL = BUNDLED_MODEL.with_name("llava-tiny-anyres")  # the same weights, LLaVA-NeXT's crops
BUNDLED_DATA = REPOSITORY / "playground" / "tiny" / "eval"


def cache_folder() -> Path:
    """Return the folder of everything this package caches: $VISPRUNER_CACHE, else ~/.cache/vispruner."""
    return Path(os.environ.get("VISPRUNER_CACHE") or Path.home() / ".cache" / "vispruner").expanduser()

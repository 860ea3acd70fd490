"""Locations of the repository, the bundled model and the bundled data."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED_MODEL = REPOSITORY / "playground" / "tiny" / "llava-tiny"
BUNDLED_ANYRES_MODEL = BUNDLED_MODEL.with_name("llava-tiny-anyres")  # the same weights, LLaVA-NeXT's crops
BUNDLED_DATA = REPOSITORY / "playground" / "tiny" / "eval"

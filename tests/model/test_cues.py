"""Cues of a vision tower, against eager attention of transformers and plain formulas."""

from __future__ import annotations

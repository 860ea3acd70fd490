"""score.json files as runs and sweeps leave them, for the tests of tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHECKPOINT = "llava-v1.5-7b"


def write_score(
    folder: Path,
    benchmark: str,
    score: float | None,
    method: str = "vispruner",
    tokens: int | None = 64,
    ratio: float | None = 0.5,
    model: str = CHECKPOINT,
    **more: Any,
) -> None:
    """Write a score.json with these entries into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": benchmark,
        "score": score,
        "details": {},
        "model": model,
        "method": method,
        "tokens": tokens,
        "important_ratio": ratio,
        **more,
    }
    (folder / "score.json").write_text(json.dumps(document))

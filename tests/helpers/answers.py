"""Answer files as tests compare them."""

from __future__ import annotations

import json
from pathlib import Path


def without_ids(path: Path) -> list[dict]:
    """Return the answers of a file without their random `answer_id`."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{key: value for key, value in row.items() if key != "answer_id"} for row in rows]

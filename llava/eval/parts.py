"""Answer files of parts of a run, merged when all are there; and files that change at one instant.

Each process of a run in chunks has an `AnswerFile` of its own; whoever finds every part complete writes the
whole. Several may find so at once: they write the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from llava.eval.answers import AnswerFileError
from llava.eval.provenance import Configuration, differences


def merge_parts(
    parts: Sequence[Path], whole: Path, configuration: Configuration, part_of: dict[int, Path]
) -> bool:
    """Write the answers of finished part files as one, in question order; False if any is still missing.

    part_of: the part file of every question index. Raises AnswerFileError where a part has another
    configuration.
    """
    lines: dict[int, bytes] = {}
    for part in parts:
        if not part.exists():
            return False
        for number, raw in enumerate(part.read_bytes().splitlines(keepends=True), 1):
            try:
                metadata = json.loads(raw)["metadata"]
            except (ValueError, KeyError):
                return False  # being written right now
            if metadata["config"] != configuration.hash():
                apart = "; ".join(differences(metadata, configuration))
                raise AnswerFileError(f"{part}:{number}: answers of another configuration: {apart}. Delete "
                                      "that file or give another output")
            if part_of.get(metadata["index"]) == part and raw.endswith(b"\n"):
                lines[metadata["index"]] = raw
    if lines.keys() != part_of.keys():
        return False
    write_atomically(whole, b"".join(lines[index] for index in sorted(lines)))
    return True


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content at one instant (temporary file, fsync, rename). Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Read LLaVA's question files, and build a question from the values of any file.

A line that cannot be used becomes a `DataIssue` with file and line, and reading continues.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import DataError, DataIssue, Question, check_file, read_jsonl

_MAX_NAME, _MAX_PATH = 255, 4095  # bytes of a file name and of a path, on nearly every file system
_SHOWN = 80  # characters of a value in a message


def read_questions(
    path: str | Path, image_folder: str | Path, problems: list[DataIssue], allow_outside: bool = False
) -> Iterator[Question]:
    """Stream LLaVA's question jsonl: {"question_id", "image" (relative, optional), "text", "category"}.

    Args:
        problems: Receives the lines that cannot be used.
        allow_outside: Accept images outside `image_folder`.

    Raises:
        DataError: The file is missing, empty, or not a question file.
    """
    path, image_folder = Path(path), Path(image_folder)
    check_file(path, "question file")
    index, known = 0, len(problems)
    for number, row in read_jsonl(path, problems, ("question_id", "text")):
        values = row["question_id"], row.get("image"), row["text"], image_folder, allow_outside
        category = str(row.get("category", "default"))
        try:
            yield make_question(index, *values, category=category, file=str(path), line=number)
        except ValueError as error:
            problems.append(DataIssue(str(path), number, str(error)))
            continue
        index += 1
    if not index and len(problems) == known:
        raise DataError(
            f"{path}: contains no questions. Pass LLaVA's question file, one JSON object per line."
        )


def make_question(
    index: int,
    question_id: Any,
    image: Any,
    text: Any,
    folder: Path,
    allow_outside: bool = False,
    **more: Any,
) -> Question:
    """Build a question from the values of a file.

    Args:
        image: File name in `folder`, a list of one, or None.
        more: Further fields of `Question`.

    Raises:
        ValueError: A value is of another kind; the message names it.
    """
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise ValueError(f"question_id is {_short(question_id)}, expected an integer or a string")
    if not isinstance(text, str):
        raise ValueError(f"text is {_short(text)}, expected a string")
    if not text.isascii():
        text.encode()  # half of a surrogate pair, which no tokenizer accepts, is a ValueError
    return Question(index, question_id, image_file(folder, image, allow_outside), text, **more)


def image_file(folder: Path, name: Any, allow_outside: bool = False) -> Path | None:
    """Return the path of an image that a question file names; None for a question without image.

    Links are followed wherever they lead: who made the folder chose them.

    Raises:
        ValueError: It is not the name of one file, or leads out of `folder`.
    """
    if name is None:
        return None
    if isinstance(name, list):
        if len(name) != 1:
            raise ValueError(
                f"image is a list of {len(name)} names, expected one. Ask about one image per line"
            )
        name = name[0]
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"image is {_short(name)}, expected a file name")
    try:
        size = len(name) if name.isascii() else len(os.fsencode(name))
    except UnicodeEncodeError as error:
        raise ValueError(f"image is {_short(name)}, not a valid file name") from error
    if size > _MAX_NAME and (
        size > _MAX_PATH or max(len(os.fsencode(one)) for one in Path(name).parts) > _MAX_NAME
    ):
        raise ValueError(f"image is {_short(name)}: a name of {size} bytes is too long for a file")
    if not allow_outside and (".." in name or name[0] in "/\\" or ":" in name[:3]):
        base, place = os.path.abspath(folder), os.path.abspath(folder / name)
        if os.path.commonpath((base, place)) != base:
            fix = "Move the image there, or pass --allow-outside-images"
            raise ValueError(f"image {_short(name)} is outside the image folder {folder}. {fix}")
    return folder / name


def _short(value: Any) -> str:
    """Return a value as a message shows it."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."

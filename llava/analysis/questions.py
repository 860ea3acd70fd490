"""Read the questions of an analysis: LLaVA's training format or LLaVA's question files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.benchmarks import DataError, DataIssue, Question
from llava.eval.benchmarks.files import read_jsonl
from llava.eval.benchmarks.questions import make_question


def read_question_file(
    path: Path, image_folder: Path, issues: list[DataIssue], allow_outside: bool = False
) -> list[Question]:
    """Return the questions of a JSON list or of JSON lines.

    An entry is of LLaVA's training format ({"id", "image", "conversations"}; the first turn is asked), or of
    a question file ({"question_id", "image", "text"}). Entries without an image are issues.

    Args:
        issues: Receives the entries that cannot be used.
        allow_outside: Accept images outside `image_folder`.

    Raises:
        DataError: The file is missing, of another kind, or has no question about an image.
    """
    questions: list[Question] = []
    for number, row in read_jsonl(path, issues):
        try:
            identity, text = _asked(row)
            if row.get("image") is None:
                raise ValueError("no image; only questions about an image are analyzed")
            values = identity, row["image"], text, image_folder, allow_outside
            questions.append(make_question(len(questions), *values, file=str(path), line=number))
        except ValueError as error:
            issues.append(DataIssue(str(path), number, str(error)))
    if not questions:
        first = f" (first problem: {issues[0]})" if issues else ""
        raise DataError(
            f"{path}: contains no question about an image{first}. Pass LLaVA's training data "
            "(id, image, conversations) or a question file (question_id, image, text)."
        )
    return questions


def _asked(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return id and text of the question that an entry asks. Raises ValueError."""
    if "conversations" not in row:
        missing = [key for key in ("question_id", "text") if key not in row]
        if missing:
            raise ValueError(f"missing key {missing[0]!r}, and no 'conversations' either")
        return row["question_id"], row["text"]
    turns = row["conversations"]
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict) or not isinstance(first.get("value"), str):
        raise ValueError("conversations has no first turn with a text as 'value'")
    if first.get("from") not in ("human", "user"):
        raise ValueError(f"the first turn is from {first.get('from')!r}, expected 'human'")
    if "id" not in row:
        raise ValueError("missing key 'id'")
    # The prompt puts the image first; a tag takes its own line break with it.
    text = first["value"].replace(DEFAULT_IMAGE_TOKEN + "\n", "").replace(DEFAULT_IMAGE_TOKEN, "")
    return row["id"], text


def reference_answers(path: Path, questions: Sequence[Question]) -> dict[int, str]:
    """Return the answers that a file of LLaVA's training format gives, by `Question.index`.

    Args:
        questions: Of `read_question_file`; those without a reply, and all of a question file, are left out.
    """
    by_line = {question.line: question.index for question in questions}
    found = {}
    for number, row in read_jsonl(path, []):
        turns = row.get("conversations", ())
        reply = turns[1] if len(turns) > 1 and isinstance(turns[1], dict) else {}
        if number in by_line and isinstance(reply.get("value"), str):
            found[by_line[number]] = reply["value"]
    return found

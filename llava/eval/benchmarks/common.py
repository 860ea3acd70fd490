"""What several benchmarks share: scores that are plain means, JSON files, answers held against questions.

`MeanBenchmark` turns one mark per question into tallies per image; the rest are functions. Nothing here is
a benchmark.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks.base import Benchmark, DataError, PerImageCounts, Question, QuestionScore

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LLAVA_EVAL_ZIP = "eval.zip of LLaVA (its docs/Evaluation.md)"


class MeanBenchmark(Benchmark):
    """A benchmark whose number is 100 x the mean of its marks."""

    def per_image_counts(self, data: Path, answers: list[dict[str, Any]]) -> PerImageCounts:
        """counts: (images, 2), the sum of marks and their number."""
        table: dict[str, np.ndarray] = {}
        for mark in self.question_scores(data, answers):
            table.setdefault(mark.image, np.zeros(2))[:] += mark.value, 1
        if not table:
            raise DataError(f"{self.title}: no answer matches the ground truth")
        return PerImageCounts(tuple(table), np.stack(list(table.values())))

    def score_counts(self, counts: np.ndarray) -> np.ndarray:
        """(..., 2) -> (...): 100 x sum / number."""
        total, number = counts[..., 0], counts[..., 1]
        return 100 * np.divide(total, number, out=np.zeros_like(total), where=number > 0)


def require(data: Path, names: str | Sequence[str], what: str) -> Path:
    """The first of these files that is there. Raises DataError that says what to put where."""
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if (data / name).is_file():
            return data / name
    others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    raise DataError(f"{data / names[0]}: no such file; put {what} there{others}")


def read_json(path: Path, kind: type, keys: Iterable[str] = ()) -> Any:
    """A JSON document whose top level is a `kind` (dict or list). Raises DataError naming the file.

    keys: what a dict, or every object of a list, must have.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except ValueError as error:
        raise DataError(f"{path}: not a JSON document ({error})") from error
    if not isinstance(document, kind):
        raise DataError(
            f"{path}: holds a JSON {type(document).__name__}, not a {kind.__name__}: another file?"
        )
    keys = tuple(keys)
    for number, part in enumerate([document] if kind is dict else document, 1):
        lacking = [key for key in keys if not isinstance(part, dict) or key not in part]
        if lacking:
            where = "" if kind is dict else f" in its entry {number}"
            raise DataError(f"{path}: lacks the key {', '.join(map(repr, lacking))}{where}: another file?")
    return document


def read_json_answers(path: Path, key: str, text: str) -> list[dict[str, Any]] | None:
    """Rows of a JSON list of {key, text} (a result file made for a server); None if it is no JSON list."""
    try:
        with path.open("rb") as file:
            begins = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such answer file") from None
    return read_json(path, list, (key, text)) if begins.startswith(b"[") else None


def check_known(
    title: str, answered: Sequence[Hashable], known: Iterable[Hashable], path: Path, what: str = "question_id"
) -> list[str]:
    """Warnings: repeated and missing answers, with counts. Raises DataError for other questions' answers."""
    known = set(known)
    strange = [key for key in answered if key not in known]
    if strange:
        raise DataError(
            f"{len(strange)} of {len(answered)} answers are to questions that {path} does not "
            f"have, e.g. {what} {strange[0]!r}: another benchmark, split or release?"
        )
    warnings = []
    asked = set(answered)
    if len(answered) > len(asked):
        warnings.append(
            f"{title}: {len(answered) - len(asked)} answers repeat the {what} of another; the last one counts"
        )
    if len(known) > len(asked):
        warnings.append(f"{title}: {len(known) - len(asked)} of {len(known)} questions have no answer")
    return warnings


def check_pairing(
    questions: Sequence[Question], keys: Iterable[Hashable], known: Iterable[Hashable], path: Path
) -> list[str]:
    """Warnings before asking: questions that the ground truth does not know; `keys` are the questions'."""
    known = set(known)
    strange = [question for question, key in zip(questions, keys, strict=True) if key not in known]
    if not strange:
        return []
    return [
        f"{len(strange)} of {len(questions)} questions are not in {path}, e.g. "
        f"{strange[0].file}:{strange[0].line}: question file and ground truth of different releases?"
    ]


def commonest(texts: Iterable[str], number: int = 5) -> list[str]:
    """The most frequent texts, the first ones first."""
    return [text for text, _ in Counter(texts).most_common(number)]


def by_key(marks: Iterable[QuestionScore]) -> dict[str, float]:
    """Marks as {key: value}."""
    return {mark.key: mark.value for mark in marks}


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def group_means(
    values: Iterable[tuple[Any, float]], scale: float = 100.0, digits: int | None = None
) -> dict[str, float]:
    """{group: scale x mean} of (group, value) pairs, in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for group, value in values:
        groups.setdefault(str(group), []).append(value)
    found = {group: scale * sum(inside) / len(inside) for group, inside in groups.items()}
    return found if digits is None else {group: round(value, digits) for group, value in found.items()}


def to_json(document: Any, indent: int | None = None) -> bytes:
    """As the converters of LLaVA write it: json.dump's own separators, ASCII."""
    return json.dumps(document, indent=indent).encode()


def last_by(rows: Iterable[Mapping[str, Any]], key: str) -> dict[Any, Mapping[str, Any]]:
    """Rows by a key; of several the last one counts, as in a dict that is filled in order."""
    return {row[key]: row for row in rows}

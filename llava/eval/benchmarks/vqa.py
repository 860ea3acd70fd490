"""What VQAv2 and VizWiz share: a test split scored by a server, a validation split scored locally.

The score is the official one of what LLaVA uploads, that is, of answers after the "EvalAI" normalization;
`raw_text` in the details is that of the unmodified answers. Not a benchmark.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .base import Benchmark, Score, Submission, grouped, mean, most_common, to_json
from .files import DataError, DataIssue, Question, Row, parse_once, read_rows
from .joining import check_foreign, join_by_prompt, known_id, repeated_answers
from .normalize import evalai
from .questions import make_question, read_questions
from .shapes import ID, Shape

REFERENCES: Shape = [{"answer": str}]
_uploaded_text = lru_cache(1 << 16)(evalai)


def uploaded(row: Row) -> str:
    """Return the answer as LLaVA uploads it; rows of a result file already contain it."""
    return _uploaded_text(row["text"]) if "text" in row else row["answer"]


def asked(path: Path) -> dict[Any, tuple[str, str]]:
    """Return {question_id: (image, question)} of LLaVA's question file, without the instruction."""
    rows = read_rows(path, {"question_id": ID, "image": str, "text": str}, problems=[])
    return {row["question_id"]: (row["image"], row["text"].split("\n")[0]) for row in rows}


def references(path: Path, key: Any, answers: Sequence[Row]) -> tuple[str, ...]:
    """Return the reference answers of a question. Raises DataError unless there are ten."""
    if len(answers) != 10:
        what = f"{key!r} has {len(answers)} reference answers, expected 10"
        raise DataError(f"{path}: {what}. Use the official validation file.")
    return tuple(sys.intern(one["answer"]) for one in answers)  # few are distinct


class UploadedVQA(Benchmark):
    """A VQA benchmark with both splits; ground truth entries have `answers`, the reference answers."""

    metric = "accuracy"
    question_files: tuple[str, ...]  # of which the first existing one is used
    test_file: str  # the one of the test split, with images in `test_images`
    test_images: str
    test_split = "test"
    val_images: str
    upload_files: tuple[str, ...]  # lists of the submission's questions; the first existing one is used
    upload_all = False  # the server requires all answers; else missing ones are submitted as ''
    server: str
    needs_all = False  # the official scorer stops if an answer is missing
    accuracy: Callable[[str, Sequence[str]], float]  # the official accuracy, in [0, 1]
    total: str  # name of the score in the details
    tables: dict[str, str]  # name in the details -> key of the ground truth, of the scores per group

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        path = self.find(data, *self.question_files)
        images = data / (self.test_images if path.name == self.test_file else self.val_images)
        if path.suffix == ".jsonl":
            return read_questions(path, images, problems, self.allow_outside)
        return self._official(path, images, problems)

    def _official(self, path: Path, images: Path, problems: list[DataIssue]) -> Iterator[Question]:
        for index, (identity, image, text) in enumerate(self.official_questions(path)):
            values, place = (identity, image, text, images, self.allow_outside), (str(path), index + 1)
            try:
                yield make_question(index, *values, file=place[0], line=place[1])
            except ValueError as error:
                problems.append(DataIssue(*place, str(error)))

    @staticmethod
    @abstractmethod
    def official_questions(path: Path) -> Iterable[tuple[Any, str, str]]:
        """Yield (id, image, LLaVA's prompt) of the official validation file."""

    @abstractmethod
    def is_test(self, data: Path, answers: list[Row]) -> bool:
        """Return True for answers to the test split."""

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        if Path(questions[0].file).name != self.test_file:
            return super().check_truth(data, questions)
        listed = data / self.upload_files[0]
        missing = f"{listed} is missing: the answers cannot be submitted without its ids"
        return [] if listed.is_file() else [missing]

    def credit(self, entry: Row, row: Row) -> float:
        return self.accuracy(uploaded(row), entry["answers"])

    def asked_texts(self, data: Path) -> Mapping[Hashable, Sequence[str]]:
        """Return the questions of the question file, if there is one: the annotations have none."""
        names = (name for name in self.question_files if name != self.test_file)
        path = next((path for name in names if (path := data / name).is_file()), None)
        if path is None:
            return {}
        return {key: (text,) for key, (_, text) in parse_once(self.listed, path).items()}

    @classmethod
    def listed(cls, path: Path) -> dict[Any, tuple[str, str]]:
        """Return {question_id: (image, question)} of LLaVA's or the official question file."""
        if path.suffix == ".jsonl":
            return asked(path)
        return {key: (image, text.split("\n")[0]) for key, image, text in cls.official_questions(path)}

    def reading(self, entry: Any, text: str) -> str:
        return _uploaded_text(text)

    def official_score(self, data: Path, answers: list[Row], fixed: bool) -> Score:
        if self.is_test(data, answers):
            note = (
                f"{self.test_split} has no public answers. Write the server's file with python -m "
                f"llava.eval.submit --benchmark {self.name} and submit it to {self.server}"
            )
            return Score(self.name, None, {"split": self.test_split}, [note])
        rows, warnings, missing = self.join(data, answers)
        details: dict[str, Any] = {"split": "validation", "answered": len(rows)}
        if missing and self.needs_all and not fixed:
            return self.stopped(details, warnings, "AssertionError")
        found = [(self.truth(data)[key], row) for key, row in rows.items()]
        details |= self.summary(found, uploaded)
        if any("text" in row for row in rows.values()):
            details["raw_text"] = self.summary(found, lambda row: row.get("text", row.get("answer")))
        return Score(self.name, details[self.total], details, warnings)

    def summary(self, found: list[tuple[Row, Row]], text: Callable[[Row], str]) -> Row:
        """Return the official numbers of (ground truth, answer), given what is scored of an answer."""
        values = [(entry, self.accuracy(text(row), entry["answers"])) for entry, row in found]
        numbers: dict[str, Any] = {self.total: round(100 * mean(value for _, value in values), 2)}
        for name, key in self.tables.items():
            groups = grouped((entry[key], value) for entry, value in values)
            numbers[name] = {group: round(100 * mean(inside), 2) for group, inside in groups.items()}
        return numbers

    def constants(self, data: Path) -> list[str]:
        return most_common(answer for entry in self.truth(data).values() for answer in entry["answers"])

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return [{`key_name`, "answer"}] of all listed questions, in their order."""
        path = questions or self.find(self.needed(data, ", or --questions FILE"), *self.upload_files)
        needs = {"question_id": ID, self.key_name: ID, "text?": str}
        listed = read_rows(path, needs, "A question list cannot be used in part; replace it")
        questions = {row["question_id"]: (row["text"].split("\n")[0],) for row in listed if "text" in row}
        known = {row["question_id"] for row in listed}
        by_name = {row[self.key_name]: row["question_id"] for row in listed}
        names = [row.get(self.key_name, row.get("question_id")) for row in answers]
        keys = [by_name[one] if one in by_name else known_id(one, known) for one in names]
        check_foreign(keys, known, path, "question_id")
        keys = join_by_prompt(keys, answers, questions, path)
        texts = {key: uploaded(row) for key, row in zip(keys, answers, strict=True)}
        missing = [row[self.key_name] for row in listed if row["question_id"] not in texts]
        what = f"{len(missing)} of {len(listed)} questions have no answer"
        if missing and self.upload_all:
            raise DataError(f"{what} (first: {missing[0]}). The server requires all of them.")
        document = [
            {self.key_name: row[self.key_name], "answer": texts.get(row["question_id"], "")} for row in listed
        ]
        warnings = repeated_answers(keys, answers, "question_id")
        warnings += [f"{what}; they are submitted as ''"] if missing else []
        return Submission(
            {f"{self.folder}_submission.json": to_json(document)}, len(listed), self.server, warnings
        )

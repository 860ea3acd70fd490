"""What VQAv2 and VizWiz share: a test split scored by a server, a validation split scored locally.

The score is the official one of what LLaVA uploads, that is, of answers after the "EvalAI" normalization;
`raw_text` in the details is that of the unmodified answers. Not a benchmark.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.base import Benchmark, Score, most_common
from llava.eval.benchmarks.files import DataIssue, Question, Row, read_questions
from llava.eval.benchmarks.normalize import evalai


def uploaded(row: Row) -> str:
    """Return the answer as LLaVA uploads it; rows of a result file already contain it."""
    return evalai(row["text"]) if "text" in row else row["answer"]


class UploadedVQA(Benchmark):
    """A VQA benchmark with both splits; ground truth entries have `answers`, the reference answers.

    Attributes:
        test_file, test_images: Test questions, used if they exist, and their images.
        test_split: Name of the test split.
        test_list: File that lists the questions of the submission.
        val_files, val_images: LLaVA's validation questions, else the official ones, and their images.
        val_only: Use the validation split even if the test split exists.
        needs_all: The official scorer stops if an answer is missing.
        total: Entry of `summary` that is the score.
    """

    test_file: str
    test_images: str
    test_split = "test"
    test_list: str
    val_files: tuple[str, ...]
    val_images: str
    val_only = False
    needs_all = False
    total: str
    server: str
    metric = "accuracy"

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        if not self.val_only and (data / self.test_file).is_file():
            return read_questions(data / self.test_file, data / self.test_images, problems)
        names = self.val_files if self.val_only else (*self.val_files, self.test_file)
        path = self.find(data, *names)
        if path.suffix == ".jsonl":
            return read_questions(path, data / self.val_images, problems)
        return self.official_questions(path, data / self.val_images)

    @abstractmethod
    def official_questions(self, path: Path, images: Path) -> Iterator[Question]:
        """Yield the questions of the official validation file with LLaVA's prompts."""

    @abstractmethod
    def is_test(self, data: Path, answers: list[Row]) -> bool:
        """Return True for answers to the test split."""

    @abstractmethod
    def accuracy(self, prediction: str, references: tuple[str, ...]) -> float:
        """Return the official accuracy in [0, 1]."""

    @abstractmethod
    def summary(self, found: list[tuple[Row, str, float]]) -> Row:
        """Return the official numbers of (ground truth, prediction, accuracy)."""

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        if Path(questions[0].file).name != self.test_file:
            return super().check_truth(data, questions)
        listed = data / self.test_list
        missing = f"{listed} is missing: the answers cannot be submitted without its ids"
        return [] if listed.is_file() else [missing]

    def credit(self, entry: Row, row: Row) -> float:
        return self.accuracy(uploaded(row), entry["answers"])

    def score(self, data: Path, answers: list[Row], fixed: bool = False) -> Score:
        if self.is_test(data, answers):
            note = (
                f"{self.test_split} has no public answers. Write the server's file with python -m "
                f"llava.eval.submit --benchmark {self.name} and submit it to {self.server}"
            )
            return Score(self.name, None, {"split": self.test_split}, [note])
        rows, warnings, missing = self.join(data, answers)
        details: dict[str, Any] = {"split": "validation", "answered": len(rows)}
        if missing and self.needs_all and not fixed:
            return self.stopped(details, warnings, "AssertionError", "AssertionError: missing answers")
        truth = self.truth(data)
        texts = {key: uploaded(row) for key, row in rows.items()}
        details |= self._summary(truth, texts)
        if any("text" in row for row in rows.values()):
            raw = {key: row.get("text", row.get("answer")) for key, row in rows.items()}
            details["raw_text"] = self._summary(truth, raw)
        return Score(self.name, details[self.total], details, warnings)

    def _summary(self, truth: Mapping[Any, Any], texts: dict[Any, str]) -> Row:
        return self.summary(
            [(truth[key], text, self.accuracy(text, truth[key]["answers"])) for key, text in texts.items()]
        )

    def constants(self, data: Path) -> list[str]:
        return most_common(answer for entry in self.truth(data).values() for answer in entry["answers"])

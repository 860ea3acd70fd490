"""What every benchmark is: questions, a prompt, decoding lengths, the official score, per-image tallies.

A benchmark reads files and does arithmetic. It holds no loop over a model and knows no pruner; the engine,
in turn, knows no benchmark. Readers stream line by line: a malformed line becomes a `DataIssue` with file and
line and the reader goes on; a missing file is a `DataError` that says what to put where.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


class DataError(ValueError):
    """Files of a benchmark are missing or cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class DataIssue:
    """One thing that went wrong with one line of one file."""

    file: str
    line: int  # 1-based
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Question:
    """One question as the model will be asked it.

    `index` is the position among the readable questions of the file (0-based) and the only key that is
    unique: `question_id` is shared by several questions in some benchmarks. `image` is whatever the
    benchmark's `load_image` understands (a path here); questions with equal `image` share one encoding.
    """

    index: int
    question_id: int | str
    image: Path | None
    text: str
    category: str = "default"
    file: str = ""
    line: int = 0  # 1-based
    extra: dict[str, Any] = field(default_factory=dict, compare=False)  # more keys for the answer line


@dataclass
class Score:
    """A benchmark's number in the units papers print it in; None where the official scorer gives none."""

    benchmark: str
    score: float | None
    details: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The JSON document that the command lines print last."""
        return {
            "benchmark": self.benchmark,
            "score": self.score,
            "details": {**self.details, "warnings": self.warnings},
        }


@dataclass(frozen=True)
class QuestionScore:
    """How one question was answered: what a comparison of two answer files is made of."""

    key: str  # unique among the questions of the benchmark
    image: str
    value: float  # in [0, 1]


@dataclass(frozen=True)
class DataFile:
    """A file or folder of a benchmark, for those who have yet to put it there."""

    path: str  # relative to the benchmark's folder
    what: str
    source: str  # a data set's name and official page, by name
    purpose: str = "ask"  # ask, score or submit
    also: tuple[str, ...] = ()  # other names, patterns allowed, under which it is as good


@dataclass
class Submission:
    """What a server takes: one file, or (several names) a folder of files."""

    files: dict[str, bytes]
    rows: int
    server: str
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PerImageCounts:
    """Sufficient statistics of a score, one row per image: whatever adds up over images.

    `counts` is (images, ...) float64; `Benchmark.score_counts` turns a sum over images into the score, so
    that a bootstrap over images needs no second look at the answers.
    """

    images: tuple[str, ...]
    counts: np.ndarray


class Benchmark(ABC):
    """The protocol. Class attributes name things; methods read and count."""

    name: str
    title: str
    folder: str  # under DATA_DIR
    max_new_tokens: int = 128
    unit: str = "%"  # of `Score.score`
    metric: str = "score"  # heading of the score's column
    media: str = "image"  # or "video"
    asks_without_image: bool = False  # some questions are meant to have none
    marker: str  # a file that tells the benchmark's folder
    markers: tuple[str, ...] = ()  # others that do
    other_folders: tuple[str, ...] = ()  # where else people put it under DATA_DIR
    files: tuple[DataFile, ...] = ()  # what a full set consists of
    sizes: Mapping[int, str] = {}  # number of questions -> the release that has so many

    def owns(self, folder: Path) -> bool:
        """True if the benchmark's own files lie in that folder."""
        return any((folder / name).exists() for name in (self.marker, *self.markers))

    def locate(self, data: str | Path) -> Path:
        """The benchmark's own folder: `data` itself, or its sub-folder `self.folder` if the files lie there.

        Raises DataError if `data` is no folder.
        """
        data = Path(data)
        if self.owns(data):
            return data
        for above in (data,) if data.is_dir() else (data, data.parent):
            for name in (self.folder, *self.other_folders):
                if self.owns(above / name):
                    return above / name
        if not data.is_dir():
            raise DataError(f"{data}: no such folder; --data is the one that holds {self.marker}")
        return data

    @abstractmethod
    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Stream the questions in file order; append what cannot be read to `problems`."""

    @abstractmethod
    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        """Score by the official rules; `fixed` mends those that are plain bugs. Raises DataError."""

    @abstractmethod
    def per_image_counts(self, data: Path, answers: list[dict[str, Any]]) -> PerImageCounts:
        """Per-image counts of these answers, joined by id (`fixed`)."""

    @abstractmethod
    def score_counts(self, counts: np.ndarray) -> np.ndarray:
        """(..., counts of one or many sums over images) -> (...) scores, in `unit`, undefined ones as 0."""

    @abstractmethod
    def question_scores(self, data: Path, answers: list[dict[str, Any]]) -> list[QuestionScore]:
        """One mark per answered question, joined by id (`fixed`), in the order of the ground truth."""

    def constants(self, data: Path) -> list[str]:
        """Texts worth giving to every question, by the ground truth: what one gets who sees nothing."""
        return []

    def read_answers(self, path: str | Path) -> list[dict[str, Any]]:
        """Answers of a file: LLaVA's jsonl, and whatever else the benchmark's own tools read."""
        return read_answers(path)

    def check(self, data: Path, questions: list[Question]) -> list[str]:
        """Warnings about these questions before they are asked; raises DataError if none can be."""
        warnings = check_questions(self.title, questions)
        bare = [question for question in questions if question.image is None]
        if bare and not self.asks_without_image:
            warnings.append(
                f"{len(bare)} of {len(questions)} questions name no image and are asked blind; "
                f"first: {bare[0].file}:{bare[0].line}"
            )
        return warnings + self.check_truth(Path(data), questions)

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        """Warnings where the ground truth beside the questions is another release, or missing."""
        return []

    def submission(
        self, data: Path | None, answers: list[dict[str, Any]], questions: Path | None = None
    ) -> Submission:
        """What the server takes; `questions` is the file that lists what it wants. Raises DataError."""
        raise DataError(f"{self.title} has no server: score it with python -m llava.eval.score")

    def load_image(self, image: Any) -> Any:
        """PIL image (RGB) of a question's `image`. Raises OSError or ValueError that names the file."""
        from llava.mm_utils import load_image

        return load_image(str(image))


def read_jsonl(
    path: Path, problems: list[DataIssue], needs: Iterable[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream (line number, object) of a jsonl file; lines without object or `needs` are problems."""
    needs = tuple(needs)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                if b"\\u" in raw:  # an escape may name half a character, which no tokenizer takes
                    json.dumps(row, ensure_ascii=False).encode()
            except ValueError as error:
                problems.append(DataIssue(str(path), number, f"not a JSON line ({error})"))
                continue
            if not isinstance(row, dict):
                problems.append(DataIssue(str(path), number, f"a JSON {type(row).__name__}, not an object"))
                continue
            lacking = [key for key in needs if key not in row]
            if lacking:
                problems.append(
                    DataIssue(str(path), number, f"lacks the key {', '.join(map(repr, lacking))}")
                )
                continue
            yield number, row


def read_questions(
    path: str | Path, image_folder: str | Path, problems: list[DataIssue]
) -> Iterator[Question]:
    """Stream LLaVA's question jsonl: {"question_id", "image" (relative, optional), "text", "category"}.

    A line that cannot be used is appended to `problems` and stops nobody else. Raises DataError if the
    file is missing.
    """
    path, image_folder = Path(path), Path(image_folder)
    if not path.is_file():
        raise DataError(f"{path}: no such question file")
    index = 0
    for number, row in read_jsonl(path, problems, ("question_id", "text")):
        identity, text, image = row["question_id"], row["text"], row.get("image")
        wrong = None
        if isinstance(identity, bool) or not isinstance(identity, int | str):
            wrong = f"question_id is {identity!r}, neither a number nor a string"
        elif not isinstance(text, str):
            wrong = f"text is {text!r}, not a string"
        elif image is not None and (not isinstance(image, str) or not image):
            wrong = f"image is {image!r}, not a file name"
        if wrong:
            problems.append(DataIssue(str(path), number, wrong))
            continue
        where = None if image is None else image_folder / image
        yield Question(index, identity, where, text, str(row.get("category", "default")), str(path), number)
        index += 1


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """All answers of an answer jsonl, made anywhere: objects with at least question_id and text.

    Raises DataError naming file and line: a score over half-read answers would look like a score.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such answer file")
    problems: list[DataIssue] = []
    rows = [row for _, row in read_jsonl(path, problems, ("question_id", "text"))]
    if problems:
        more = f" (and {len(problems) - 1} more lines)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; mend or delete such lines before scoring")
    if not rows:
        raise DataError(f"{path}: holds no answers")
    return rows


def duplicates(questions: Iterable[Question]) -> list[tuple[int | str, str]]:
    """(question_id, text) pairs that occur more than once: twice the same question, worth a warning."""
    counted = Counter((question.question_id, question.text) for question in questions)
    return [pair for pair, times in counted.items() if times > 1]


def check_questions(benchmark_title: str, questions: list[Question]) -> list[str]:
    """Warnings about readable questions: duplicates, images that are not there. Needs paths as images.

    Raises DataError if there is no question, or if none of the images exists.
    """
    if not questions:
        raise DataError(f"{benchmark_title}: no readable question")
    warnings = []
    twice = duplicates(questions)
    if twice:
        warnings.append(f"{len(twice)} questions occur more than once, e.g. question_id {twice[0][0]!r}")
    images = dict.fromkeys(question.image for question in questions if isinstance(question.image, Path))
    absent = [image for image in images if not image.is_file()]
    if absent:
        missing = set(absent)
        asked = [question for question in questions if question.image in missing]
        says = (
            f"{len(absent)} of {len(images)} images are missing, {len(asked)} questions ask about them; "
            f"first: {asked[0].file}:{asked[0].line} wants {asked[0].image}"
        )
        if len(absent) == len(images):
            raise DataError(f"{benchmark_title}: {says}. Put the images into {absent[0].parent}")
        warnings.append(says)
    return warnings

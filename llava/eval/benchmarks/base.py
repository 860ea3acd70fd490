"""The protocol of a benchmark: files, questions, official score, submission.

A benchmark reads files and computes numbers. It contains no loop over a model and no pruner; the engine
knows no benchmark. `Benchmark` implements what benchmarks share, for a score that is the mean of one credit
per question; a new benchmark declares its files, reads its ground truth and states its rule
(docs/add_a_benchmark.md).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava.eval.benchmarks.files import (
    DataError,
    DataIssue,
    Question,
    Row,
    parse_once,
    read_answers,
    read_questions,
    read_rows,
)

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LLAVA_EVAL_ZIP = "eval.zip of LLaVA (its docs/Evaluation.md)"


@dataclass
class Score:
    """The score in the unit papers report; None where the official scorer reports none."""

    benchmark: str
    score: float | None
    details: Row
    warnings: list[str] = field(default_factory=list)

    def document(self) -> Row:
        """Return the JSON document that the commands print last."""
        return {
            "benchmark": self.benchmark,
            "score": self.score,
            "details": {**self.details, "warnings": self.warnings},
        }


@dataclass(frozen=True)
class QuestionScore:
    """The credit of one answered question; comparisons of two answer files use these."""

    key: str  # unique among the questions of the benchmark
    image: str
    value: float  # in [0, 1]


@dataclass(frozen=True)
class DataFile:
    """A file or folder of a benchmark.

    Attributes:
        path: Relative to the benchmark's folder.
        what: Content, in a few words.
        source: Name of the dataset and its official page.
        purpose: ask, score or submit.
        also: Other names, patterns allowed, that are accepted instead.
    """

    path: str
    what: str
    source: str = LLAVA_EVAL_ZIP
    purpose: str = "ask"
    also: tuple[str, ...] = ()

    def find(self, folder: Path) -> Path | None:
        """Return the file, or the last match of an alternative, if it exists and is not an empty folder."""
        for pattern in (self.path, *self.also):
            for path in sorted(folder.glob(pattern), reverse=True):
                if path.is_file() or any(path.iterdir()):
                    return path
        return None


@dataclass
class Submission:
    """The input of a server: one file, or a folder of several."""

    files: dict[str, bytes]
    rows: int
    server: str
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PerImageCounts:
    """Sufficient statistics of a score per image.

    `counts` is (images, ...) float64. `Benchmark.score_counts` turns a sum over images into the score, so
    that a bootstrap over images does not have to score answers again.
    """

    images: tuple[str, ...]
    counts: np.ndarray


class Joined(NamedTuple):
    """Answers by their key in the ground truth; of repeated answers the last one."""

    rows: dict[Hashable, Row]
    warnings: list[str]
    missing: int  # wanted keys without an answer


class Benchmark(ABC):
    """One benchmark; class attributes declare its files, methods read and score.

    Attributes:
        name: Name on the command line.
        folder: Default folder under DATA_DIR; `other_folders` are accepted as well.
        unit, metric: Unit of the score and heading of its column.
        media: "image" or "video".
        asks_without_image: True if some questions have no image.
        marker: LLaVA's question file; it or one of `markers` (patterns allowed) identifies the folder.
        image_folder: Folder of the images.
        files: Files of a full set; `optional_files` are used if present.
        truth_files: Paths from `files` that `read_truth` receives.
        key_name: What identifies an answer, for messages.
        list_keys: Keys of a JSON list of answers that is accepted besides LLaVA's jsonl.
        constant_answers: Answers for the constant-answer baseline.
        sizes: Number of questions -> release.
    """

    name: str
    title: str
    folder: str
    other_folders: tuple[str, ...] = ()
    max_new_tokens: int = 128
    unit: str = "%"
    metric: str = "score"
    media: str = "image"
    asks_without_image: bool = False
    marker: str
    markers: tuple[str, ...] = ()
    image_folder: str = ""
    files: tuple[DataFile, ...] = ()
    optional_files: tuple[DataFile, ...] = ()
    truth_files: tuple[str, ...] = ()
    key_name: str = "question_id"
    list_keys: tuple[str, ...] = ()
    constant_answers: tuple[str, ...] = ()
    sizes: Mapping[int, str] = {}

    # -- files ------------------------------------------------------------------------------------

    def owns(self, folder: Path) -> bool:
        """Return True if the folder contains the benchmark's own files."""
        return any(any(folder.glob(name)) for name in (self.marker, *self.markers))

    def locate(self, data: str | Path) -> Path:
        """Return the benchmark's own folder: `data`, or its subfolder `folder` if the files are there.

        Raises:
            DataError: `data` is not a folder.
        """
        data = Path(data)
        if self.owns(data):
            return data
        for above in (data,) if data.is_dir() else (data, data.parent):
            for name in (self.folder, *self.other_folders):
                if self.owns(above / name):
                    return above / name
        if not data.is_dir():
            raise DataError(f"{data}: no such folder. Set --data to the folder that contains {self.marker}.")
        return data

    def find(self, data: Path, *names: str) -> Path:
        """Return the first of these files that exists; of a single one also its alternatives in `files`.

        Raises:
            DataError: None exists; the message names the content and its source.
        """
        listed = {file.path: file for file in (*self.optional_files, *self.files)}
        for name in names:
            file = listed.get(name) if len(names) == 1 else None
            found = (file or DataFile(name, "", "")).find(data)
            if found:
                return found
        file = next(listed[name] for name in names if name in listed)
        others = sorted({*names, *file.also} - {file.path})
        accepted = f" Also accepted: {', '.join(others)}." if others else ""
        raise DataError(f"{data / file.path}: not found. Add the {file.what} from {file.source}.{accepted}")

    # -- questions --------------------------------------------------------------------------------

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Stream the questions in file order.

        Args:
            problems: Receives the lines that cannot be used.
        Raises:
            DataError: The question file is missing or cannot be used.
        """
        return read_questions(self.find(data, self.marker), self.images(data, self.image_folder), problems)

    def images(self, data: Path, name: str) -> Path:
        """Return the image folder of that name or an alternative of it, whether it exists or not."""
        file = next((file for file in self.files if file.path == name), None)
        return (file and file.find(data)) or data / name

    def load_image(self, image: Any) -> Any:
        """Return a question's `image` as PIL image (RGB). Raises OSError or ValueError naming the file."""
        from llava.mm_utils import load_image

        return load_image(str(image))

    def check(self, data: Path, questions: list[Question]) -> list[str]:
        """Return warnings about these questions. Raises DataError if none can be asked."""
        warnings = check_questions(self.title, questions)
        bare = [question for question in questions if question.image is None]
        if bare and not self.asks_without_image:
            warnings.append(
                f"{len(bare)} of {len(questions)} questions have no image and are asked without one "
                f"(first: {bare[0].file}:{bare[0].line})"
            )
        return warnings + self.check_truth(Path(data), questions)

    # -- ground truth -----------------------------------------------------------------------------

    @staticmethod
    def read_truth(*paths: Path) -> dict[Hashable, Any]:
        """Return {key: entry} of the files `truth_files`."""
        raise NotImplementedError

    def truth_paths(self, data: Path) -> list[Path]:
        """Return the arguments of `read_truth`; messages about unknown questions name the first one."""
        return [self.find(data, name) for name in self.truth_files]

    def parsed(self, data: Path) -> Any:
        """Return the result of `read_truth`, read-only and parsed once. Raises DataError."""
        return parse_once(self.read_truth, *self.truth_paths(data))

    def truth(self, data: Path) -> Mapping[Hashable, Any]:
        """Return {key: entry}, the read-only ground truth. Raises DataError."""
        return self.parsed(data)

    def key(self, row: Row) -> Hashable:
        """Return the key of an answer in the ground truth. Raises DataError."""
        return row["question_id"]

    def keys(self, data: Path, answers: Sequence[Row]) -> list[Hashable]:
        """Return the keys of all answers. Raises DataError."""
        return [self.key(row) for row in answers]

    def known(self, data: Path) -> Collection[Hashable]:
        """Return the keys that answers may have."""
        return self.truth(data).keys()

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        """Return warnings if the ground truth is missing or belongs to another release."""
        try:
            truth = self.truth(data)
        except DataError as error:
            return [f"cannot be scored: {error}"]
        unknown = [question for question in questions if self.question_key(question) not in truth]
        if not unknown:
            return []
        files = ", ".join(str(path.relative_to(data)) for path in self.truth_paths(data))
        return [
            f"{len(unknown)} of {len(questions)} questions have no ground truth in {files} (first: "
            f"{unknown[0].file}:{unknown[0].line}). Use question file and ground truth of the same release"
        ]

    def question_key(self, question: Question) -> Hashable:
        """Return the key of a question in the ground truth, None if it has none."""
        row = {"question_id": question.question_id, "prompt": question.text, **question.extra}
        try:
            return self.key({**row, "image": getattr(question.image, "name", None)})
        except DataError:
            return None

    def join(
        self,
        data: Path,
        answers: Sequence[Row],
        wanted: Collection[Hashable] | None = None,
        noun: str = "questions",
        repeats: str = "only the last one is scored",
    ) -> Joined:
        """Join answers with the ground truth by key.

        Args:
            wanted: Keys that should have an answer, called `noun` in the warning; default: all.
            repeats: Effect of several answers to one question, for the warning.
        Raises:
            DataError: There are answers to other questions.
        """
        keys, known = self.keys(data, answers), self.known(data)
        check_foreign(keys, known, self.truth_paths(data)[0], self.key_name)
        rows, warnings = dict(zip(keys, answers, strict=True)), []
        if len(rows) < len(answers):
            warnings.append(
                f"{len(answers) - len(rows)} answers repeat the {self.key_name} of another; {repeats}"
            )
        wanted = known if wanted is None else wanted
        missing = sum(key not in rows for key in wanted)
        unlabeled = len(rows.keys() - self.truth(data).keys())
        if unlabeled:
            warnings.append(f"{unlabeled} answers have no ground truth; left out")
        if missing:
            warnings.append(f"{missing} of {len(wanted)} {noun} have no answer")
        return Joined(rows, warnings, missing)

    # -- rule -------------------------------------------------------------------------------------

    def read_answers(self, path: str | Path) -> list[Row]:
        """Return the answers of LLaVA's jsonl or of a file that the benchmark's own tools read."""
        return read_answers(path, self.list_keys)

    @abstractmethod
    def score(self, data: Path, answers: list[Row], fixed: bool = False) -> Score:
        """Score by the official rules.

        Args:
            fixed: Work around known bugs of the official scorer.
        Raises:
            DataError: Files are missing, or there are answers to other questions.
        """

    def credit(self, entry: Any, row: Row) -> float | None:
        """Return the credit in [0, 1] of an answer, given its ground truth; None if it is left out."""
        raise NotImplementedError

    def image_of(self, key: Hashable, entry: Any) -> str:
        """Return the image of a question in the ground truth."""
        return str(key)

    def question_scores(self, data: Path, answers: list[Row]) -> list[QuestionScore]:
        """Return one credit per answered question, joined by key, in the order of the ground truth."""
        rows, found = self.join(data, answers).rows, []
        for key, entry in self.truth(data).items():
            value = self.credit(entry, rows[key]) if key in rows else None
            if value is not None:
                name = "/".join(map(str, key)) if isinstance(key, tuple) else str(key)
                found.append(QuestionScore(name, self.image_of(key, entry), float(value)))
        return found

    def per_image_counts(self, data: Path, answers: list[Row]) -> PerImageCounts:
        """Return per-image counts of these answers, joined by key; here (images, 2): credits, questions."""
        table: dict[str, np.ndarray] = {}
        for one in self.question_scores(data, answers):
            table.setdefault(one.image, np.zeros(2))[:] += one.value, 1
        return self._per_image(table)

    def _per_image(self, table: dict[str, np.ndarray]) -> PerImageCounts:
        if not table:
            raise DataError(f"{self.title}: no answer matches the ground truth")
        return PerImageCounts(tuple(table), np.stack(list(table.values())))

    def score_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return the scores (...) in `unit` of sums over images (..., counts); undefined ones are 0."""
        total, number = counts[..., 0], counts[..., 1]
        return 100 * np.divide(total, number, out=np.zeros_like(total), where=number > 0)

    def stopped(self, details: Row, warnings: list[str], raises: str, why: str = "") -> Score:
        """Return the missing score of answers at which the official scorer raises an error."""
        note = (
            f"the official scorer stops here ({why or raises}) and reports no score. Use --fixed to get one"
        )
        return Score(self.name, None, {**details, "raises": raises}, [*warnings, note])

    def constants(self, data: Path) -> list[str]:
        """Return answers to give to every question for the constant-answer baseline."""
        return list(self.constant_answers)

    # -- submission -------------------------------------------------------------------------------

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return the input of the server.

        Args:
            questions: File that lists the questions; default: the one in `data`.
        Raises:
            DataError: There is no server, or answers or files are missing.
        """
        raise DataError(f"{self.title} has no server. Score it with python -m llava.eval.score.")

    def listed(
        self, data: Path | None, questions: Path | None, *names: str, needs: Iterable[str] = ()
    ) -> tuple[Path, list[Row]]:
        """Return the jsonl that lists the questions of a submission, and its rows. Raises DataError."""
        path = questions or self.find(self.needed(data, "--questions FILE"), *names)
        return path, read_rows(path, needs, "A question list cannot be used in part; replace it")

    def needed(self, data: Path | None, instead: str = "") -> Path:
        """Return `data`. Raises DataError if it is None."""
        if data is None:
            other = f", or {instead}" if instead else ""
            raise DataError(f"{self.title}: the submission needs files of the benchmark; give --data{other}")
        return data


def check_questions(benchmark_title: str, questions: list[Question]) -> list[str]:
    """Return warnings about repeated questions and missing image files.

    Raises:
        DataError: There is no question, or none of the images exists.
    """
    if not questions:
        raise DataError(f"{benchmark_title}: no readable question")
    warnings = []
    counted = Counter((question.question_id, question.text) for question in questions)
    repeated = [identity for (identity, _), times in counted.items() if times > 1]
    if repeated:
        warnings.append(
            f"{len(repeated)} questions occur more than once (first: question_id {repeated[0]!r})"
        )
    images = dict.fromkeys(question.image for question in questions if isinstance(question.image, Path))
    missing = {image: None for image in images if not image.is_file()}
    if missing:
        affected = [question for question in questions if question.image in missing]
        first = affected[0]
        message = (
            f"{len(missing)} of {len(images)} images are missing; {len(affected)} questions use them "
            f"(first: {first.file}:{first.line} uses {first.image})"
        )
        if len(missing) == len(images):
            raise DataError(
                f"{benchmark_title}: {message}. Put the images into {next(iter(missing)).parent}."
            )
        warnings.append(message)
    return warnings


def check_foreign(
    keys: Sequence[Hashable], known: Collection[Hashable], path: Path, key_name: str = "question_id"
) -> None:
    """Raise DataError if there are answers whose key is not known; `path` is the file that lists the keys."""
    foreign = [key for key in keys if key not in known]
    if foreign:
        raise DataError(
            f"{len(foreign)} of {len(keys)} answers match no question in {path} (first {key_name}: "
            f"{foreign[0]!r}). Pass the --data of the same benchmark, split and release."
        )


def most_common(texts: Iterable[str], number: int = 5) -> list[str]:
    """Return the most frequent texts; ties in order of first appearance."""
    return [text for text, _ in Counter(texts).most_common(number)]


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean; 0 if there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def grouped(pairs: Iterable[tuple[Any, float]]) -> dict[str, list[float]]:
    """Return {group: values} of (group, value) pairs, in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for group, value in pairs:
        groups.setdefault(str(group), []).append(value)
    return groups


def group_percents(pairs: Iterable[tuple[Any, float]], digits: int) -> dict[str, float]:
    """Return {group: 100 x mean, rounded}."""
    return {group: round(100 * mean(values), digits) for group, values in grouped(pairs).items()}


def to_json(document: Any, indent: int | None = None) -> bytes:
    """Return JSON as LLaVA's converters write it: default separators, ASCII."""
    return json.dumps(document, indent=indent).encode()

"""The protocol of a benchmark: files, questions, official score, submission.

A benchmark reads files and computes numbers. It contains no loop over a model and no pruner; the engine
knows no benchmark. `Benchmark` implements what benchmarks share, for a score that is the mean of one credit
per question; a new benchmark declares its files, reads its ground truth and states its rule
(docs/add_a_benchmark.md).
"""

from __future__ import annotations

import json
import os
from abc import ABC
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .files import ANSWER, INSTRUCTIONS, DataError, DataIssue, Question, Row, parse_once, read_answers
from .joining import check_foreign, check_not_empty, is_empty, join_by_prompt, known_id, repeated_answers
from .normalize import cleaned
from .questions import read_questions
from .shapes import Shape

_, SHORT_ANSWER, LETTER_ANSWER = (f"\n{line}" for line in INSTRUCTIONS)
LLAVA_EVAL_ZIP = "eval.zip of LLaVA (its docs/Evaluation.md)"


@dataclass
class Score:
    """The score in the unit papers report; None where the official scorer reports none.

    Attributes:
        empty: Number of answers without text; None if not counted.
        unreadable: Number of other answers that the official rule reads differently from a person, or that
            fit no class (see `Benchmark.careful`); None if not counted.
    """

    benchmark: str
    score: float | None
    details: Row
    warnings: list[str] = field(default_factory=list)
    empty: int | None = None
    unreadable: int | None = None

    def document(self) -> Row:
        """Return the JSON document that the commands print last."""
        details = {**self.details, "warnings": self.warnings}
        counts = {"empty": self.empty, "unreadable": self.unreadable}
        return {"benchmark": self.benchmark, "score": self.score, **counts, "details": details}


@dataclass(frozen=True)
class QuestionScore:
    """The credit of one answered question; comparisons of two answer files use these."""

    key: str  # unique among the questions of the benchmark
    image: str
    value: float  # in [0, 1]


@dataclass(frozen=True)
class DataFile:
    """A file or folder of a benchmark."""

    path: str  # relative to the benchmark's folder
    what: str = ""  # content, in a few words
    source: str = LLAVA_EVAL_ZIP  # name of the dataset and its official page
    purpose: str = "ask"  # or score, or submit
    also: tuple[str, ...] = ()  # other names, patterns allowed, that are accepted instead

    def find(self, folder: Path) -> Path | None:
        """Return the file, or the last match of an alternative, if it exists and is not an empty folder."""
        for pattern in (self.path, *self.also):
            for path in sorted(folder.glob(pattern), reverse=True):
                if path.name[0] != "." and (not path.is_dir() or any(path.iterdir())):
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
    """Sums per image from which `Benchmark.score_counts` computes the score, as a bootstrap needs them."""

    images: tuple[str, ...]
    counts: np.ndarray  # (images, ...) float64


class Joined(NamedTuple):
    """Answers joined with the ground truth."""

    rows: dict[Hashable, Row]  # by key; of repeated answers the last one
    warnings: list[str]
    missing: int  # wanted keys without an answer


class Benchmark(ABC):
    """One benchmark; class attributes declare its files, methods read and score."""

    name: str  # on the command line
    title: str
    folder: str  # default folder under DATA_DIR; `other_folders` are accepted as well
    other_folders: tuple[str, ...] = ()
    max_new_tokens: int = 128
    unit: str = "%"
    metric: str = "score"  # heading of the score's column
    media: str = "image"  # or video
    asks_without_image: bool = False  # some questions have no image
    marker: str  # LLaVA's question file; it or one of `markers` (patterns allowed) identifies the folder
    markers: tuple[str, ...] = ()
    image_folder: str = ""
    files: tuple[DataFile, ...] = ()  # of a full set; `optional_files` are used if present
    optional_files: tuple[DataFile, ...] = ()
    truth_files: tuple[str, ...] = ()  # paths from `files` that `read_truth` receives
    key_name: str = "question_id"  # what identifies an answer, for messages
    image_key: str = ""  # of the image in an entry of the ground truth
    repeats: str = "only the last one counts"  # effect of several answers to one question, for messages
    answer_shape: Mapping[str, Shape] = ANSWER  # of a line of an answer file
    list_shape: Mapping[str, Shape] | None = None  # of a JSON list of answers that the server's tools read
    constant_answers: tuple[str, ...] = ()  # for the constant-answer baseline
    sizes: Mapping[int, str] = {}  # number of questions -> release
    allow_outside: bool = False  # questions may name images outside the image folder

    def owns(self, folder: Path) -> bool:
        """Return True if the folder contains the benchmark's own files."""
        return any(any(folder.glob(name)) for name in (self.marker, *self.markers))

    def locate(self, data: str | Path) -> Path:
        """Return `data` or its subfolder with the files. Raises DataError if `data` is not a folder."""
        data = Path(data)
        above = (data,) if data.is_dir() else (data, data.parent)
        names = (self.folder, *self.other_folders)
        for folder in (data, *(one / name for one in above for name in names)):
            if self.owns(folder):
                return folder
        if not data.is_dir():
            raise DataError(f"{data}: no such folder. Set --data to the folder that contains {self.marker}.")
        return data

    def find(self, data: Path, *names: str) -> Path:
        """Return the first of these files that exists; of a single one also its alternatives in `files`.

        Raises DataError that names content and source if none exists.
        """
        listed = {file.path: file for file in (*self.optional_files, *self.files)}
        for name in names:
            file = listed.get(name) if len(names) == 1 else None
            if found := (file or DataFile(name)).find(data):
                return found
        file = next(listed[name] for name in names if name in listed)
        others = sorted({*names, *file.also} - {file.path})
        accepted = f" Also accepted: {', '.join(others)}." if others else ""
        raise DataError(f"{data / file.path}: not found. Add the {file.what} from {file.source}.{accepted}")

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Stream the questions in file order. Raises DataError if the file cannot be used.

        Args:
            problems: Receives the lines that cannot be used.
        """
        images = next((file.find(data) for file in self.files if file.path == self.image_folder), None)
        images = images or data / self.image_folder
        return read_questions(self.find(data, self.marker), images, problems, self.allow_outside)

    def load_image(self, image: Any) -> Any:
        """Return a question's `image` as PIL image (RGB). Raises OSError or ValueError naming the file."""
        from llava.image_files import load_image

        return load_image(str(image))

    def check(self, data: Path, questions: list[Question]) -> list[str]:
        """Return warnings about these questions. Raises DataError if none can be asked."""
        warnings = check_questions(self.title, questions, self.media)
        bare = [f"{question.file}:{question.line}" for question in questions if question.image is None]
        if bare and not self.asks_without_image:
            what = f"{len(bare)} of {len(questions)} questions have no image"
            warnings.append(f"{what} and are asked without one (first: {bare[0]})")
        return warnings + self.check_truth(Path(data), questions)

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
        """Return the keys of all answers.

        Ids that other files may number differently are compared with the prompts (see `join_by_prompt`).
        Raises DataError.
        """
        known = self.truth(data)
        keys = [known_id(self.key(row), known) for row in answers]
        return join_by_prompt(keys, answers, self.asked_texts(data), self.truth_paths(data)[-1])

    def asked_texts(self, data: Path) -> Mapping[Hashable, Sequence[str]]:
        """Return {key: parts of the question that its prompt contains}, to verify the join by id."""
        return {}

    def wanted(self, data: Path) -> Collection[Hashable]:
        """Return the keys that should have an answer; answers to others need an entry in the ground truth."""
        return self.truth(data).keys()

    def question_key(self, question: Question) -> Hashable:
        """Return the key of a question in the ground truth, None if it has none."""
        row = {"question_id": question.question_id, "prompt": question.text, **question.extra}
        try:
            return self.key({**row, "image": getattr(question.image, "name", None)})
        except DataError:
            return None

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        """Return warnings if the ground truth is missing or belongs to another release."""
        try:
            truth = self.truth(data)
        except DataError as error:
            return [f"cannot be scored: {error}"]
        unknown = [f"{one.file}:{one.line}" for one in questions if self.question_key(one) not in truth]
        if not unknown:
            return []
        files = ", ".join(str(path.relative_to(data)) for path in self.truth_paths(data))
        what = f"{len(unknown)} of {len(questions)} questions have no ground truth in {files}"
        return [f"{what} (first: {unknown[0]}). Use question file and ground truth of the same release"]

    def join(self, data: Path, answers: Sequence[Row]) -> Joined:
        """Join answers with the ground truth by key. Raises DataError for answers to other questions."""
        keys, truth, wanted = self.keys(data, answers), self.truth(data), self.wanted(data)
        check_foreign(keys, {*truth, *wanted}, self.truth_paths(data)[0], self.key_name)
        rows, warnings = dict(zip(keys, answers, strict=True)), []
        missing = sum(key not in rows for key in wanted)
        warnings += repeated_answers(keys, answers, self.key_name, self.repeats)
        if unlabeled := len(rows.keys() - truth.keys()):
            warnings.append(f"{unlabeled} answers have no ground truth; left out")
        if missing:
            warnings.append(f"{missing} of {len(wanted)} questions have no answer")
        return Joined(rows, warnings, missing)

    def counted(self, data: Path, answers: Sequence[Row], fixed: bool) -> list[tuple[Any, Row]]:
        """Return (key, answer) of every answer in file order; of repeated ones only the last if `fixed`."""
        pairs = list(zip(self.keys(data, answers), answers, strict=True))
        return list(dict(pairs).items()) if fixed else pairs

    def matched(self, data: Path, answers: Sequence[Row]) -> list[tuple[Any, Any, Row]]:
        """Return (key, entry, answer) of the answered questions, in the order of the ground truth."""
        rows = self.join(data, answers).rows
        return [(key, entry, rows[key]) for key, entry in self.truth(data).items() if key in rows]

    def read_answers(self, path: str | Path, problems: list[DataIssue] | None = None) -> list[Row]:
        """Return the answers of LLaVA's jsonl or of a file that the benchmark's own tools read.

        Args:
            problems: If given, receives malformed lines, which are then left out instead of raising.
        Raises:
            DataError: The file cannot be read, or a line is malformed.
            EmptyAnswersError: All answers are empty.
        """
        rows = read_answers(path, self.answer_shape, self.list_shape, problems)
        check_not_empty(path, rows)
        return rows

    def score(self, data: Path, answers: list[Row], fixed: bool = False) -> Score:
        """Score by the official rules; count empty and unreadable answers. Raises DataError as `join` does.

        Args:
            fixed: Work around known bugs of the official scorer, and read answers as a person does.
        """
        readings = self.careful_texts(data, answers)
        score = self.official_score(data, self._reread(answers, readings) if fixed else answers, fixed)
        unreadable = [answers[place] for place in readings if not is_empty(answers[place])]
        score.empty, score.unreadable = sum(map(is_empty, answers)), len(unreadable)
        if unreadable:
            first, count = unreadable[0], f"{len(unreadable)} of {len(answers)}"
            what = f"the official rule does not read {count} answers as a person would"
            fix = "here they are read as a person would, or are wrong" if fixed else "--fixed reads them"
            identity = first.get("question_id")
            score.warnings.append(f"{what} (first: question_id {identity!r}, {first['text'][:40]!r}); {fix}")
        return score

    def official_score(self, data: Path, answers: list[Row], fixed: bool) -> Score:
        """Score by the official rules. Raises DataError as `join` does.

        Args:
            fixed: Work around known bugs of the official scorer.
        """
        raise NotImplementedError

    def entries(self, data: Path, answers: Sequence[Row]) -> Sequence[Any]:
        """Return what `reading` and `careful` need of each answer's ground truth, by default nothing."""
        return [None] * len(answers)

    def reading(self, entry: Any, text: str) -> Hashable:
        """Return what the official rule reads in an answer."""
        return text.strip()

    def careful(self, entry: Any, text: str) -> str | None:
        """Return what a person reads in a text, worded for the official rule; None if it is no answer."""
        return cleaned(text)

    def careful_texts(self, data: Path, answers: Sequence[Row]) -> dict[int, str | None]:
        """Return {place: text by `careful`} of the answers that the official rule reads differently."""
        found = {}
        for place, (entry, row) in enumerate(zip(self.entries(data, answers), answers, strict=True)):
            text = row.get("text")
            if text is not None:
                careful = self.careful(entry, text)
                if careful is None or self.reading(entry, careful) != self.reading(entry, text):
                    found[place] = careful
        return found

    def unreadable(self, data: Path, answers: Sequence[Row]) -> int:
        """Return the number of answers that the official rule reads differently and that are not empty."""
        return sum(not is_empty(answers[place]) for place in self.careful_texts(data, answers))

    def careful_answers(self, data: Path, answers: Sequence[Row]) -> list[Row]:
        """Return the answers as `score` with `fixed` reads them."""
        return self._reread(answers, self.careful_texts(data, answers))

    @staticmethod
    def _reread(answers: Sequence[Row], readings: Mapping[int, str | None]) -> list[Row]:
        rows = list(answers)
        for place, text in readings.items():
            rows[place] = {**rows[place], "text": text or "", "unreadable": text is None}
        return rows

    def stopped(self, details: Row, warnings: list[str], raises: str) -> Score:
        """Return the missing score of answers at which the official scorer raises an error."""
        note = f"the official scorer stops here ({raises}) and reports no score. Use --fixed to get one"
        return Score(self.name, None, {**details, "raises": raises}, [*warnings, note])

    def credit(self, entry: Any, row: Row) -> float | None:
        """Return the credit in [0, 1] of an answer, given its ground truth; None if it is left out."""
        raise NotImplementedError

    def image_of(self, key: Hashable, entry: Any) -> str:
        """Return the image of a question, by default its key; tuples end with the question."""
        if self.image_key:
            return str(entry[self.image_key])
        return "/".join(key[:-1]) if isinstance(key, tuple) else str(key)

    def question_scores(self, data: Path, answers: list[Row]) -> list[QuestionScore]:
        """Return one credit per answered question, joined by key, in the order of the ground truth."""
        found = []
        for key, entry, row in self.matched(data, answers):
            value = self.credit(entry, row)
            if value is not None:
                name = "/".join(map(str, key)) if isinstance(key, tuple) else str(key)
                found.append(QuestionScore(name, self.image_of(key, entry), float(value)))
        return found

    def image_counts(self, data: Path, answers: list[Row]) -> Iterable[tuple[str, Any]]:
        """Yield (image, counts) whose sums per image `score_counts` receives; here credit and 1."""
        return ((one.image, (one.value, 1)) for one in self.question_scores(data, answers))

    def per_image_counts(self, data: Path, answers: list[Row]) -> PerImageCounts:
        """Return per-image sums of `image_counts`. Raises DataError if no answer matches."""
        table: dict[str, np.ndarray] = {}
        for image, counts in self.image_counts(data, answers):
            table[image] = table.get(image, 0.0) + np.asarray(counts, float)
        if not table:
            raise DataError(f"{self.title}: no answer matches the ground truth")
        return PerImageCounts(tuple(table), np.stack(list(table.values())))

    def score_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return the scores (...) in `unit` of sums over images (..., counts); undefined ones are 0."""
        return 100 * ratio(counts[..., 0], counts[..., 1])

    def constants(self, data: Path) -> list[str]:
        """Return answers to give to every question for the constant-answer baseline."""
        return list(self.constant_answers)

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return the input of the server. Raises DataError if there is none, or answers or files are missing.

        Args:
            questions: File that lists the questions; default: the one in `data`.
        """
        raise DataError(f"{self.title} has no server. Score it with python -m llava.eval.score.")

    def needed(self, data: Path | None, instead: str = "") -> Path:
        """Return `data`. Raises DataError if it is None."""
        if data is None:
            raise DataError(f"{self.title}: the submission needs the benchmark's files; give --data{instead}")
        return data


def check_questions(benchmark_title: str, questions: list[Question], media: str = "image") -> list[str]:
    """Return warnings about repeated questions and missing images. Raises DataError if none can be asked."""
    if not questions:
        raise DataError(f"{benchmark_title}: no readable question")
    warnings = []
    counted = Counter((question.question_id, question.text) for question in questions)
    repeated = [identity for (identity, _), times in counted.items() if times > 1]
    if repeated:
        what = f"{len(repeated)} questions occur more than once"
        warnings.append(f"{what} (first: question_id {repeated[0]!r})")
    images = {question.image for question in questions if isinstance(question.image, Path)}
    missing = {image for image in images if not os.path.isfile(image)}  # also for names that no file can have
    if missing:
        affected = [question for question in questions if question.image in missing]
        first = affected[0]
        message = f"{len(missing)} of {len(images)} {media}s are missing; {len(affected)} questions use them"
        message += f" (first: {first.file}:{first.line} uses {first.image})"
        if len(missing) == len(images):
            raise DataError(f"{benchmark_title}: {message}. Put the {media}s into {first.image.parent}.")
        warnings.append(message)
    return warnings


def most_common(texts: Iterable[str]) -> list[str]:
    """Return the five most frequent texts; ties in order of first appearance."""
    return [text for text, _ in Counter(texts).most_common(5)]


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean; 0 if there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[str, list[Any]]:
    """Return {group: values} of (group, value) pairs, in order of first appearance."""
    groups: dict[str, list[Any]] = {}
    for group, value in pairs:
        groups.setdefault(str(group), []).append(value)
    return groups


def to_json(document: Any, indent: int | None = None) -> bytes:
    """Return JSON as LLaVA's converters write it: default separators, ASCII."""
    return json.dumps(document, indent=indent).encode()

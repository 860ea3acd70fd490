"""Two answer files side by side: the questions on which they differ, with the tokens that each method kept.

Used by `llava.analysis.overlay`. Method and budget of a file come from the metadata of its answers, and the
selection is computed again by the model that gave them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.analysis.questions import read_question_file
from llava.eval.benchmarks import Benchmark, DataError, DataIssue, Question, get_benchmark, list_benchmarks
from llava.eval.benchmarks.files import ANSWER, Row, check_file, read_answers
from llava.eval.store.answer_lines import asked_prompt
from llava.eval.store.provenance import Configuration
from llava.image_files import load_image
from llava.pruning import Pruner, get_pruner

# Metadata that an overlay repeats; files that differ in others than the pruning need two models.
MODEL_KEYS = ("model", "weights", "preset", "tower_dtype")
_OWN = {"index", "visual_tokens", "retried", "config", "versions", "notes"}
_FIELDS = set(Configuration.__dataclass_fields__) - {"pruning"}


@dataclass(frozen=True)
class AnswerSet:
    """The answers of one file, and the setting that its metadata names."""

    path: Path
    pruner: Pruner
    anyres: str | None
    metadata: Row
    texts: Mapping[int, str]  # by `Question.index`
    credits: Mapping[int, float]  # in [0, 1] by `Question.index`; empty without a known ground truth


@dataclass(frozen=True)
class Flip:
    """A question and what the two files answer; a credit is None if it is not known."""

    question: Question
    texts: tuple[str, str]
    credits: tuple[float | None, float | None]

    @property
    def differs(self) -> bool:
        return self.texts[0].strip() != self.texts[1].strip()


@dataclass(frozen=True)
class AskedQuestions:
    """The questions of a file, with the benchmark that they belong to, if it is a known one."""

    path: Path
    questions: Sequence[Question]
    benchmark: Benchmark | None = None

    @property
    def load_image(self) -> Callable[[Any], Any]:
        return load_image if self.benchmark is None else self.benchmark.load_image


def read_asked(path: Path, image_folder: Path | None, allow_outside: bool = False) -> AskedQuestions:
    """Return the questions of a benchmark's own question file, or of any other one.

    Args:
        image_folder: None is the benchmark's, else the folder of the file.

    Raises:
        DataError: The file cannot be used.
    """
    check_file(path, "question file")
    issues: list[DataIssue] = []
    for name in list_benchmarks() if image_folder is None else ():
        benchmark = get_benchmark(name)
        if (
            benchmark.media == "image"
            and path.name == Path(benchmark.marker).name
            and benchmark.owns(path.parent)
        ):
            benchmark.allow_outside = allow_outside
            return AskedQuestions(path, list(benchmark.questions(path.parent, issues)), benchmark)
    return AskedQuestions(path, read_question_file(path, image_folder or path.parent, issues, allow_outside))


def read_answer_set(path: Path, asked: AskedQuestions) -> AnswerSet:
    """Return the answers of a file that this program wrote to these questions.

    Args:
        path: An answer file, or the folder of a run.

    Raises:
        DataError: The file cannot be read, has answers of several settings or to other questions, or was
            not made by this program.
    """
    path = inside if (inside := path / "answers.jsonl").is_file() else path
    check_file(path, "answer file")
    rows = read_answers(path, ANSWER)
    if not rows:
        raise DataError(f"{path}: contains no answers. Pass the answer file of a run.")
    metadata = [row["metadata"] if isinstance(row.get("metadata"), dict) else {} for row in rows]
    first = metadata[0]
    if any("method" not in one or "index" not in one for one in metadata):
        raise DataError(
            f"{path}: the answers have no metadata that names the pruning method. Pass answer files that "
            "llava.eval.run, sweep or the question loops of this program wrote."
        )
    configs = {str(one.get("config")) for one in metadata}
    if len(configs) > 1:
        raise DataError(f"{path}: answers of {len(configs)} configurations. Pass the file of one run.")
    by_index = {question.index: question for question in asked.questions}
    texts: dict[int, str] = {}
    for number, (row, one) in enumerate(zip(rows, metadata, strict=True), 1):
        question = by_index.get(one["index"]) if isinstance(one["index"], int) else None
        known = question is not None and row["question_id"] == question.question_id
        if not known or row.get("prompt", asked_prompt(question)) != asked_prompt(question):
            raise DataError(
                f"{path}:{number}: answers question_id {row['question_id']!r}, which is not question number "
                f"{one['index']!r} of {asked.path}. Pass the question file that was asked."
            )
        texts[question.index] = row["text"]
    return AnswerSet(path, _pruner_of(path, first), first.get("anyres"), first, texts, _credits(asked, rows))


def flips(asked: AskedQuestions, a: AnswerSet, b: AnswerSet, only_flips: bool) -> list[Flip]:
    """Return the questions that both files answer, in file order; only those with different texts if asked.

    Raises:
        DataError: There is no such question, or the files are of different models.
    """
    for key in MODEL_KEYS:
        values = [one.metadata.get(key) for one in (a, b)]
        if values[0] != values[1]:
            raise DataError(
                f"{b.path}: {key} is {values[1]!r}, in {a.path} it is {values[0]!r}. Pass two runs of one "
                "model that differ in the pruning."
            )
    found = [
        Flip(
            question,
            (a.texts[question.index], b.texts[question.index]),
            (a.credits.get(question.index), b.credits.get(question.index)),
        )
        for question in asked.questions
        if question.index in a.texts and question.index in b.texts and question.image is not None
    ]
    if not found:
        raise DataError(f"{b.path}: has no question about an image in common with {a.path}.")
    return [one for one in found if one.differs] if only_flips else found


def _pruner_of(path: Path, metadata: Row) -> Pruner:
    """Return the pruner that the metadata of an answer names."""
    settings = {k: v for k, v in metadata.items() if k not in _OWN | _FIELDS and k != "unused_settings"}
    known = [settings.pop(name, default) for name, default in (("tokens", None), ("important_ratio", 0.5))]
    try:
        return get_pruner(settings.pop("method"), *known, metadata.get("seed", 0), **settings)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: the method of its answers cannot be used: {error}.") from error


def _credits(asked: AskedQuestions, rows: list[Row]) -> dict[int, float]:
    """Return the credit of every answer by the benchmark's rule; empty if it cannot be scored here."""
    benchmark = asked.benchmark
    if benchmark is None:
        return {}
    folder = asked.path.parent
    try:
        matched = benchmark.matched(folder, rows)
    except DataError:  # no ground truth on this machine
        return {}
    found: dict[int, float] = {}
    for _, entry, row in matched:
        try:
            credit = benchmark.credit(entry, row)
        except NotImplementedError:  # scored by a judge or a server
            return {}
        if credit is not None:
            found[row["metadata"]["index"]] = float(credit)
    return found

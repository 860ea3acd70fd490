"""What lies beside an answer file: the questions without an answer, and the command that made it.

    answers.jsonl         failures.jsonl           run.json            of a run, or a setting of a sweep
    NAME.jsonl            NAME.failures.jsonl      NAME.run.json       of LLaVA's question loops

`failures.jsonl` has one line per question that no start has answered; a later start that answers them
removes the lines, and the file with the last one. `run.json` is written when a start begins to answer, so
that `llava.eval.status` can tell how many questions were asked and which command resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import llava
from llava.eval.benchmarks import DataIssue, Question
from llava.eval.benchmarks.files import DataError, read_json, read_jsonl
from llava.eval.store.atomic import write_atomically
from llava.eval.store.provenance import Configuration

FAILURES, RUN = "failures.jsonl", "run.json"


def beside(answers: Path, name: str) -> Path:
    """Return the path of FAILURES or RUN of an answer file that a question loop of LLaVA writes."""
    # Not the stem: r_0.5 and r_0.25 without .jsonl would share their files.
    return answers.with_name(f"{answers.name.removesuffix('.jsonl')}.{name}")


@dataclass(frozen=True)
class FailedQuestion:
    """A question without an answer. A line that cannot be read has no id, index and image."""

    question_id: int | str | None
    index: int | None
    file: str
    line: int
    image: str | None
    reason: str


def read_failures(path: Path) -> list[FailedQuestion]:
    """Return the failures of earlier starts; none if the file is missing, and no lines that are not ours."""
    if not path.is_file():
        return []
    names = [one.name for one in fields(FailedQuestion)]
    kinds = (int | str | None, int | None, str, int, str | None, str)
    try:
        rows = [row for _, row in read_jsonl(path, [], names)]
    except DataError:  # of another kind: it will be written again
        return []
    found = [[row[name] for name in names] for row in rows]
    return [FailedQuestion(*values) for values in found if all(map(isinstance, values, kinds))]


def failed_before(path: Path, questions: Sequence[Question]) -> dict[int, FailedQuestion]:
    """Return the failures of earlier starts among `questions`, by index."""
    ids = {one.index: one for one in read_failures(path) if one.index is not None}
    asked = {question.index: question for question in questions if question.index in ids} if ids else {}
    return {index: ids[index] for index, one in asked.items() if one.question_id == ids[index].question_id}


def update_failures(
    path: Path,
    questions: Sequence[Question],
    issues: Iterable[DataIssue],
    answered: Container[int],
    failures: Iterable[DataIssue],
) -> None:
    """Replace the failures beside an answer file, or remove the file if there are none.

    If the file cannot be written, a warning is printed: the end of the command lists the failures as well.

    Args:
        issues: Lines of the question file that cannot be used.
        answered: Indices of all questions with an answer.
        failures: What this start could not answer, by file and line of the questions.
    """
    reasons = {(one.file, one.line): one.message for one in failures}
    before = failed_before(path, questions)
    rows = [FailedQuestion(None, None, one.file, one.line, None, one.message) for one in issues]
    for question in questions if reasons or before else ():
        if question.index in answered:
            continue
        if reason := reasons.get((question.file, question.line)):
            image = None if question.image is None else str(question.image)
            place = question.file, question.line, image
            rows.append(FailedQuestion(question.question_id, question.index, *place, reason))
        elif question.index in before:
            rows.append(before[question.index])
    try:
        if rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
        elif path.is_file():
            path.unlink(missing_ok=True)
    except OSError as error:
        print(f"warning: {path}: cannot be written ({error.strerror})", file=sys.stderr)


@dataclass(frozen=True)
class RunRecord:
    """The start that last answered questions into an answer file.

    Attributes:
        command: Module and arguments for `python -m`, with absolute paths.
        environment: Variables VISPRUNER_* that were set.
        benchmark: Registered name; None for a plain question file.
        questions: Number of questions asked by this start, answered before or not.
        unreadable: Lines of the question file that cannot be used.
        config: Hash of the configuration.
        configuration: What was hashed (see `Configuration.flat`).
        started: Time in UTC, ISO 8601.
        answers: Absolute path of the answer file; empty in files that do not have it.
    """

    command: list[str]
    environment: dict[str, str]
    benchmark: str | None
    questions: int
    unreadable: int
    config: str
    configuration: dict[str, Any]
    started: str
    answers: str = ""
    version: str = field(default_factory=lambda: llava.__version__)

    def write(self, path: Path, only_new: bool = False) -> None:
        """Replace the file, or with `only_new` write it unless there is one. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n", only_new)

    @property
    def batch_size(self) -> int | None:
        """Questions per batch of this start; None if it is unknown."""
        if "batch_size" in self.configuration:
            return _size(self.configuration["batch_size"])
        # Written before the size was recorded: the option, or the default of that time.
        option, command = "--batch-size", self.command
        if option in command[:-1]:
            text = command[command.index(option) + 1]
            return _size(int(text)) if text.isdecimal() and len(text) < 10 else None
        return 64 if self.configuration.get("device") == "cpu" else 16

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a record. Raises DataError if it is missing, or not one."""
        names = [one.name for one in fields(cls)]
        document = {"answers": "", **read_json(path, dict, [name for name in names if name != "answers"])}
        kinds = (list, dict, str | None, int, int, str, dict, str, str, str)
        values = [document[name] for name in names]
        wrong = [
            name
            for name, value, kind in zip(names, values, kinds, strict=True)
            if not isinstance(value, kind)
        ]
        texts = [*values[0], *values[1].values()] if not wrong else []
        if wrong or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}: unexpected value of {', '.join(wrong) or 'command'}. Delete the file.")
        return cls(*values)


def recorded_batch_size(record: Path, answers: Sequence[Path], configuration: Configuration) -> int | None:
    """Return the batch size of an earlier start of the same configuration; None if there was none.

    Args:
        record: run.json.
        answers: Answer files, whose first lines are read if `record` is missing or of another run.
        configuration: Of this run, its batch size not decided yet.
    """

    def is_same(size: int | None, config: object) -> bool:
        return size is not None and replace(configuration, batch_size=size).hash() == config

    try:
        earlier = RunRecord.read(record) if record.is_file() else None
    except DataError:  # it will be written again
        earlier = None
    if earlier is not None and is_same(earlier.batch_size, earlier.config):
        return earlier.batch_size
    for path in filter(Path.is_file, answers):  # a pipe would be waited for
        try:
            with path.open("rb") as file:
                metadata = json.loads(file.readline())["metadata"]
            size, config = _size(metadata["batch_size"]), metadata["config"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if is_same(size, config):
            return size
    return None


def _size(value: object) -> int | None:
    """Return a batch size, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None

"""What benchmarks graded by a language model share: the judge, and which judge gave the stored grades.

Every stored grade records the judge model and the instruction that produced it, because grades of two judges
or two instructions are not comparable. A benchmark yields what to store; the command `llava.eval.judge`
writes it.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.files import DataError, Row

UNKNOWN = "unknown"
Ask = Callable[[list[dict[str, str]], float | None, int | None], tuple[str, str]]


@dataclass(frozen=True)
class Judge:
    """A judge model and its instruction.

    Attributes:
        ask: (messages, temperature, max_tokens) -> (reply, model that replied).
        prompt: Replaces the benchmark's own instruction; None keeps it.
    """

    model: str
    ask: Ask
    prompt: str | None = None

    def record(self) -> dict[str, str]:
        """Return what is stored with every grade."""
        digest = (
            hashlib.sha256(self.prompt.encode()).hexdigest()[:16] if self.prompt is not None else "built-in"
        )
        return {"judge": self.model, "prompt": digest}


class GradeStep(NamedTuple):
    """One graded answer: write `content` to `path`, unless it is None (graded before)."""

    answer: str
    path: Path
    content: str | None


class JudgedBenchmark(Benchmark):
    """A benchmark whose answers a language model grades.

    Attributes:
        judge_model: Default judge.
        placeholders: Required in an instruction that replaces the benchmark's own.
    """

    judge_model: str
    placeholders: tuple[str, ...] = ()

    @abstractmethod
    def grades_path(self, answers: Path, model: str, runs: int) -> Path:
        """Return the default path of the grades of an answer file."""

    @abstractmethod
    def read_ungraded(self, path: Path) -> list[Row]:
        """Return the answers of a file, without grades."""

    @abstractmethod
    def stored_grades(self, path: Path) -> list[Path]:
        """Return the grades to use with an answer file, if any, then those of other judges."""

    def read_answers(self, path: str | Path) -> list[Row]:
        """Return the answers of a file, with the grades stored in it or next to it."""
        rows, stored = self.read_ungraded(Path(path)), self.stored_grades(Path(path))
        if not stored:
            return rows
        others = [one.name for one in stored[1:]]
        return [{**row, "other_grades": others} for row in self.with_grades(rows, stored[0])]

    @abstractmethod
    def with_grades(self, rows: list[Row], path: Path) -> list[Row]:
        """Return the answers with the grades stored in `path`."""

    @abstractmethod
    def grade(
        self, data: Path, answers: list[Row], judge: Judge, output: Path, runs: int, adopt: bool
    ) -> Iterator[GradeStep]:
        """Grade the answers that `output` does not contain yet, `runs` times each.

        Args:
            adopt: Keep stored grades of unknown judges.
        Raises:
            DataError: `output` contains grades of another judge or instruction.
        """

    def check_prompt(self, path: Path, prompt: str) -> None:
        """Raise DataError if placeholders are missing in an instruction."""
        missing = [name for name in self.placeholders if name not in prompt]
        if missing:
            raise DataError(
                f"{path}: missing placeholder {', '.join(missing)}. The judge would not see that part. Add "
                "it to the instruction; other braces are sent unchanged."
            )

    def check_judge(self, path: Path, records: Iterable[Row], judge: Judge, adopt: bool) -> None:
        """Raise DataError unless `judge` gave all stored grades; `adopt` accepts unknown ones."""
        mine = judge.record()
        for record in records:
            given = record.get("judge", UNKNOWN)
            if {"judge": given, "prompt": record.get("prompt")} == mine or (given == UNKNOWN and adopt):
                continue
            other = " with another instruction" if given == mine["judge"] else f", not of {mine['judge']!r}"
            hint = f", or --output {path} to add to these" if given == UNKNOWN else ""
            raise DataError(
                f"{path}: contains grades of judge {given!r}{other}. Grades of two judges or instructions "
                f"are not comparable. Pass --output with a new name{hint}."
            )

    def judged_by(self, answers: list[Row]) -> tuple[str | None, list[str]]:
        """Return the judge that gave the grades of these answers, and warnings if it is ambiguous."""
        judges = sorted({row["judge"] for row in answers if row.get("judge")})
        warnings = []
        if len(judges) > 1:
            warnings.append(f"these grades are of several judges and not comparable: {', '.join(judges)}")
        row = next((row for row in answers if row.get("other_grades") and row.get("grades_file")), None)
        if row:
            warnings.append(
                f"several grades of these answers are stored: {row['grades_file']} (judge "
                f"{', '.join(judges) or UNKNOWN}) is used, not {', '.join(row['other_grades'])}. Pass the "
                "one to use as --answers"
            )
        return ", ".join(judges) or None, warnings

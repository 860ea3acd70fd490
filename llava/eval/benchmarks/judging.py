"""What benchmarks graded by a language model share: the judge, stored grades, the grading loop.

Every stored grade records the judge model and the instruction that produced it, because grades of two judges
or two instructions are not comparable. Grades are stored as {answer: entry}, in one JSON file or in a folder
with one <answer>.json per entry. A benchmark yields what to store; the command `llava.eval.judge` writes it.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.base import Benchmark, Score
from llava.eval.benchmarks.files import DataError, DataIssue, Row, read_json
from llava.eval.benchmarks.joining import check_not_empty

UNKNOWN = "unknown"
TRIES = 5  # requests until a reply can be read


@dataclass(frozen=True)
class Judge:
    """A judge model and its instruction."""

    model: str
    ask: Callable[..., tuple[str, str]]  # (messages, temperature, max_tokens) -> (reply, model that replied)
    prompt: str | None = None  # replaces the benchmark's own instruction

    def record(self) -> dict[str, str]:
        """Return what is stored with every grade."""
        digest = "built-in" if self.prompt is None else hashlib.sha256(self.prompt.encode()).hexdigest()[:16]
        return {"judge": self.model, "prompt": digest}

    def file_name(self) -> str:
        """Return the model's name as part of a file name."""
        return self.model.replace("/", "-").replace("_", "-")


class JudgedBenchmark(Benchmark):
    """A benchmark whose answers a language model grades."""

    judge_model: str  # the default judge
    placeholders: tuple[str, ...] = ()  # required in an instruction that replaces the benchmark's own
    grades_name: str  # of stored grades: a .json file of several runs of the judge, or a folder of one run
    scores_parts: bool = False  # there is a score before all answers are graded
    without_judge: str  # end of the warning that there are no grades

    @abstractmethod
    def read_ungraded(
        self, path: Path, problems: list[DataIssue] | None = None
    ) -> tuple[list[Row], list[Path]]:
        """Return answers without grades, and their stored grades: those to use, then other judges'.

        Args:
            problems: As of `read_answers`.
        """

    @abstractmethod
    def rate(self, truth: Mapping[Hashable, Row], graded: dict[Hashable, Row], score: Score) -> None:
        """Set the value of `score`, and add to its details and warnings, by the official rule."""

    @abstractmethod
    def grades_of(self, entry: Any) -> Row:
        """Return the "grades" of a stored entry, one per run, and their "judge"."""

    @abstractmethod
    def record_of(self, entry: Any, path: Path, judge: Judge) -> Row:
        """Return the "judge" and "prompt" of a stored entry of `path`, to compare with those of `judge`."""

    @abstractmethod
    def ask(self, judge: Judge, truth: Row, row: Row, entry: Any | None) -> Any | None:
        """Return `entry` with one more grade of the answer `row`, or None without a readable reply."""

    def read_grades(self, path: Path) -> dict[str, Any]:
        """Return the stored entries of a file or folder."""
        if path.is_dir():
            files = (one for one in sorted(path.glob("*.json")) if one.name[0] != ".")
            stored = {one.stem: read_json(one, list) for one in files}
        else:
            stored = read_json(path, dict)
        for key, entry in stored.items():
            if found := self.entry_mismatch(entry):
                raise DataError(f"{path}: entry {key!r} is not a grade: {found}. Delete it and judge again.")
        return stored

    @abstractmethod
    def entry_mismatch(self, entry: Any) -> str | None:
        """Return what is wrong with the form of a stored entry."""

    def read_answers(self, path: str | Path, problems: list[DataIssue] | None = None) -> list[Row]:
        """Return the answers of a file, with the grades stored in it or next to it."""
        rows, stored = self.read_ungraded(Path(path), problems)
        if not rows:
            raise DataError(f"{path}: contains no answers")
        check_not_empty(path, rows)
        others = [one.name for one in stored[1:]]
        graded = self.with_grades(rows, stored[0]) if stored else rows
        return [{**row, "other_grades": others} for row in graded]

    def with_grades(self, rows: list[Row], path: Path) -> list[Row]:
        """Return the answers with the grades stored in `path`."""
        stored = self.read_grades(path)
        return [
            {**row, **self.grades_of(stored[key]), "grades_file": path.name} if key in stored else row
            for row, key in ((row, str(self.key(row))) for row in rows)
        ]

    def grade(
        self, data: Path, answers: list[Row], judge: Judge, output: Path, runs: int = 1, adopt: bool = False
    ) -> Iterator[tuple[Path, str]]:
        """Grade answers that `output` does not contain yet; yield (file, new content) after every grade.

        Args:
            adopt: Keep stored grades of unknown judges.
        Raises:
            DataError: `output` contains grades of another judge or instruction.
        """
        truth, rows = self.truth(data), self.join(data, answers).rows
        stored = self.read_grades(output) if output.exists() else {}
        in_file = self.grades_name.endswith(".json")
        for record in (self.record_of(entry, output, judge) for entry in stored.values()):
            given = record.get("judge", UNKNOWN)
            if judge.record().items() <= record.items() or (given == UNKNOWN and adopt):
                continue
            other = " with another instruction" if given == judge.model else f", not of {judge.model!r}"
            hint = f", or --output {output} to add to these" if given == UNKNOWN else ""
            raise DataError(
                f"{output}: contains grades of judge {given!r}{other}. Grades of two judges or instructions "
                f"are not comparable. Pass --output with a new name{hint}."
            )
        for key, row in rows.items():
            entry = stored.get(str(key))
            for _ in range(len(self.grades_of(entry)["grades"]) if entry else 0, runs if in_file else 1):
                entry = self.ask(judge, truth[key], row, entry)
                if entry is None:  # asked again by the next start
                    break
                stored[str(key)] = entry
                path = output if in_file else output / f"{key}.json"
                yield path, json.dumps(stored, indent=1) if in_file else json.dumps(entry)

    def official_score(self, data: Path, answers: list[Row], fixed: bool) -> Score:
        rows, warnings, _ = self.join(data, answers)
        graded = {key: row for key, row in rows.items() if row.get("grades")}
        score = Score(self.name, None, {"answered": len(rows), "graded": len(graded)}, warnings)
        if not graded:
            warnings.append(
                f"not graded yet: run python -m llava.eval.judge --benchmark {self.name} --data ... "
                f"--answers ...{self.without_judge}"
            )
            return score
        used, judges = next(iter(graded.values())), {row["judge"] for row in graded.values()}
        names = ", ".join(sorted(judges))
        score.details |= {"judge": names, "grades": used["grades_file"]}
        if len(judges) > 1:
            warnings.append(f"these grades are of several judges and not comparable: {names}")
        if used.get("other_grades"):
            warnings.append(
                f"several grades of these answers are stored: {used['grades_file']} (judge {names}) is used, "
                f"not {', '.join(used['other_grades'])}. Pass the one to use as --answers"
            )
        runs = {len(row["grades"]) for row in graded.values()}
        unfinished = len(runs) > 1 or len(graded) < len(rows)
        if unfinished:
            warnings.append(
                f"grading is not finished: {len(rows) - len(graded)} answers have no grade, the others "
                f"{min(runs)} to {max(runs)}. Run the judge again to resume"
            )
        if self.scores_parts or fixed or not unfinished:
            self.rate(self.truth(data), graded, score)
        return score

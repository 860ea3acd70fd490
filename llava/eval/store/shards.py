"""Shard files: the answers of a run that several processes share, merged into one file at the end.

Process I of N appends to `N_I.jsonl` beside `answers.jsonl` and writes `N_I.report.json` when it has
finished. A question counts as answered if any of these files has its answer, for any number of processes, so
a restart with another number resumes as well. The merge requires every question exactly once; lines that are
byte-identical are one answer (a merged file beside its shards). A lock on the folder lets one process merge.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import DataIssue, Question
from llava.eval.store.answer_file import fcntl, is_locked
from llava.eval.store.answer_lines import AnswerFileError, AnswerLines, ForeignAnswerError
from llava.eval.store.atomic import write_atomically
from llava.eval.store.provenance import Configuration

SHARD = re.compile(r"^(\d+)_(\d+)\.jsonl$")
ANSWERS = "answers.jsonl"


@dataclass
class ShardReport:
    """What one process did besides answering."""

    config: str
    asked: int = 0
    seconds: float = 0.0
    failures: list[DataIssue] = field(default_factory=list)  # questions that cannot be answered
    failed: list[int] = field(default_factory=list)  # their indices
    prefill: dict[str, Any] | None = None  # what the FLOPs of the prefill follow from
    speed: dict[str, Any] | None = None  # of this setting alone
    cost: dict[str, Any] | None = None  # of the pass that answered it
    unavailable: str | None = None  # why the model cannot run this setting


@dataclass(frozen=True)
class LineLocation:
    """One line of one file; `digest` is comparable within this process."""

    file: Path
    offset: int
    length: int
    digest: int


class FoundAnswers(dict[int, LineLocation]):
    """Where the answers are, by question index."""

    def elsewhere(self, path: Path) -> set[int]:
        """Return the indices answered in files other than `path`."""
        return {index for index, location in self.items() if location.file != path}


class Shards:
    """The answer files of one run in a folder."""

    def __init__(self, folder: Path, questions: Sequence[Question], configuration: Configuration) -> None:
        self.folder, self.merged = folder, folder / ANSWERS
        self._lines = AnswerLines(questions, configuration)
        self._config = configuration.hash()

    def path(self, rank: int, size: int) -> Path:
        """Return the file that process `rank` of `size` appends to; a single process uses the merged file."""
        return self.merged if size == 1 else self.folder / f"{size}_{rank}.jsonl"

    def files(self) -> list[Path]:
        """Return the merged file, if present, then the shard files of any number of processes."""
        return answer_files(self.folder)

    def check_free(self, size: int, exclusive: bool = False) -> None:
        """Raise AnswerFileError if a run with another number of processes is active here.

        Args:
            size: The number of processes of this run, whose own files may be locked.
            exclusive: Refuse any active process, as one that starts the others must.
        """
        own = set() if exclusive or size == 1 else {self.path(rank, size) for rank in range(size)}
        for path in self.files():
            if path not in own and (path != self.merged or size > 1) and is_locked(path):
                raise AnswerFileError(
                    f"{path}: another process is writing to this file. Wait for it, stop it, or use a new "
                    "--output"
                )

    def scan(self) -> FoundAnswers:
        """Locate all answers.

        Raises:
            AnswerFileError: Files of another configuration or origin, duplicate or foreign answers.
        """
        found, foreign, twice = FoundAnswers(), [], []
        for path in self.files():
            complete = len(found) == len(self._lines.questions) and not found.elsewhere(self.merged)
            if complete and path != self.merged:
                break  # finished and merged
            for number, offset, raw in _stream(path):
                where = f"{path}:{number}"
                try:
                    index = self._lines.read(raw, where)
                except ForeignAnswerError:
                    foreign.append(where)
                    continue
                if index is None:
                    continue  # incomplete: the process was killed, or is writing now
                here = LineLocation(path, offset, len(raw), hash(raw.rstrip(b"\n")))
                other = found.setdefault(index, here)
                if other.digest != here.digest or (other is not here and other.file == path):
                    identity = self._lines.questions[index].question_id
                    twice.append(f"{identity!r} in {where} and {other.file.name}")
        trouble = []
        if twice:
            trouble.append(f"{len(twice)} questions are answered twice (first: question {twice[0]})")
        if foreign:
            trouble.append(
                f"{len(foreign)} answers are to questions that are not asked (first: {foreign[0]})"
            )
        if trouble:
            raise AnswerFileError(
                f"{self.folder}: shard files cannot be merged: {'; '.join(trouble)}. Delete those lines, or "
                "the shard files of the folder, and run again"
            )
        return found

    def merge(self, found: FoundAnswers) -> None:
        """Write the merged file in question order, atomically; leave it if it is already complete.

        Raises:
            AnswerFileError: A file changed since the scan.
        """
        contents: dict[Path, bytes] = {}
        lines = []
        for _, location in sorted(found.items()):
            if location.file not in contents:
                contents[location.file] = location.file.read_bytes()
            raw = contents[location.file][location.offset : location.offset + location.length]
            line = raw.rstrip(b"\n")
            if hash(line) != location.digest:
                raise AnswerFileError(
                    f"{location.file}: the file changed while it was merged. Run the same command again"
                )
            lines.append(line + b"\n")
        joined = b"".join(lines)
        if joined and (not self.merged.is_file() or joined != self.merged.read_bytes()):
            write_atomically(self.merged, joined)

    # -- reports ----------------------------------------------------------------------------------

    def write_report(self, rank: int, size: int, report: ShardReport) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._report(rank, size), json.dumps(asdict(report)))

    def reports(self, size: int) -> dict[int, ShardReport]:
        """Return the reports of finished processes, by rank."""
        found = {}
        for rank in range(size):
            if not self._report(rank, size).is_file():
                continue
            try:
                document = json.loads(self._report(rank, size).read_bytes())
                failures = [DataIssue(**one) for one in document.pop("failures")]
                report = ShardReport(**document, failures=failures)
                is_ours = {*report.failed} <= self._lines.questions.keys()
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            is_ours &= isinstance(report.asked, int) and isinstance(report.seconds, int | float)
            is_ours &= all(
                isinstance(one, dict | None) for one in (report.prefill, report.speed, report.cost)
            )
            is_ours &= isinstance(report.unavailable, str | None)
            if report.config == self._config and is_ours:
                found[rank] = report
        return found

    def clear_report(self, rank: int, size: int) -> None:
        self._report(rank, size).unlink(missing_ok=True)

    def _report(self, rank: int, size: int) -> Path:
        return self.folder / f"{size}_{rank}.report.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder; without effect on file systems that have no locks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.folder, os.O_RDONLY)
        except OSError:  # folders cannot be opened everywhere
            yield
            return
        try:
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def answer_files(folder: Path) -> list[Path]:
    """Return the merged file of a run, if present, then the shard files of any number of processes."""
    if not folder.is_dir():
        return []
    shards = [
        (tuple(map(int, found.groups())), path)
        for path in folder.iterdir()
        if (found := SHARD.match(path.name)) and path.is_file()
    ]
    merged = folder / ANSWERS
    return [merged] * merged.is_file() + [path for _, path in sorted(shards)]


def _stream(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number, offset, line) of a file; nothing if it has been removed."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, offset, raw
                offset += len(raw)
    except FileNotFoundError:
        return

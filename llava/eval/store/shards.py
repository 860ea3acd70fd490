"""The answers of a run that several processes share: a file per process, one whole in the end.

Process I of N appends to `N_I.jsonl` beside `answers.jsonl`, and leaves `N_I.report.json` when it is through.
What counts as answered is in any of these files, whichever number of processes made them, so that a start
with another number goes on as well. The merge wants every question exactly once; lines that are equal to
the byte are one answer (a whole that was merged before, beside its parts). Several processes may find at
the same time that all is there: a lock on the folder lets one of them merge.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llava.eval.benchmarks.base import DataIssue, Question
from llava.eval.store.answer_file import fcntl, is_locked
from llava.eval.store.answer_lines import AnswerFileError, ForeignAnswerError, Lines
from llava.eval.store.atomic import write_atomically
from llava.eval.store.provenance import Configuration

_PART = re.compile(r"^(\d+)_(\d+)\.jsonl$")
WHOLE = "answers.jsonl"


@dataclass
class Report:
    """What one process did besides answering."""

    config: str
    asked: int = 0
    seconds: float = 0.0
    failures: list[DataIssue] = field(default_factory=list)  # questions that cannot be answered
    failed: list[int] = field(default_factory=list)  # their indices


@dataclass(frozen=True)
class Place:
    """One line of one file; `digest` is good for comparing within this process."""

    file: Path
    offset: int
    length: int
    digest: int


@dataclass
class Found:
    """Where the answers lie, by question index, and which are there twice or foreign."""

    where: dict[int, Place] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)

    def elsewhere(self, path: Path) -> set[int]:
        """Indices answered in other files than this one."""
        return {index for index, place in self.where.items() if place.file != path}


class Parts:
    """The answer files of one run in a folder."""

    def __init__(self, folder: Path, questions: Sequence[Question], made_by: Configuration) -> None:
        self.folder, self.whole = folder, folder / WHOLE
        self._lines = Lines(questions, made_by, made_by.model)
        self._config = made_by.hash()

    def path(self, rank: int, size: int) -> Path:
        """The file that process `rank` of `size` appends to: the whole itself if it is alone."""
        return self.whole if size == 1 else self.folder / f"{size}_{rank}.jsonl"

    def files(self) -> list[Path]:
        """The whole, if there, then part files, of any number of processes."""
        if not self.folder.is_dir():
            return []
        parts = [
            (tuple(map(int, found.groups())), path)
            for path in self.folder.iterdir()
            if (found := _PART.match(path.name))
        ]
        return [self.whole] * self.whole.is_file() + [path for _, path in sorted(parts)]

    def check_free(self, size: int, alone: bool = False) -> None:
        """Raise AnswerFileError if a run with another number of processes is at work here.

        alone: any run is, which a process that starts the others wants to know.
        """
        mine = set() if alone or size == 1 else {self.path(rank, size) for rank in range(size)}
        for path in self.files():
            if path not in mine and (path != self.whole or size > 1) and is_locked(path):
                raise AnswerFileError(
                    f"{path}: another process is writing to this file; wait for it, stop "
                    "it, or give another output"
                )

    def scan(self) -> Found:
        """All answers there are. Raises AnswerFileError for files of another configuration or origin."""
        found, foreign, twice = Found(), [], []
        for path in self.files():
            if (
                path != self.whole
                and len(found.where) == len(self._lines.questions)
                and not found.elsewhere(self.whole)
            ):
                break  # finished, and merged
            for number, offset, raw in _stream(path):
                place = f"{path}:{number}"
                try:
                    index = self._lines.read(raw, place)
                except ForeignAnswerError:
                    foreign.append(place)
                    continue
                if index is None:
                    continue  # torn: the process was killed, or writes right now
                here = Place(path, offset, len(raw), hash(raw.rstrip(b"\n")))
                other = found.where.setdefault(index, here)
                if other.digest != here.digest or (other is not here and other.file == path):
                    twice.append(
                        f"{self._lines.questions[index].question_id!r} in {place} and {other.file.name}"
                    )
        if twice:
            found.trouble.append(f"{len(twice)} questions are answered twice (first: question {twice[0]})")
        if foreign:
            found.trouble.append(
                f"{len(foreign)} answers are to questions that are not asked (first: {foreign[0]})"
            )
        return found

    def check(self, found: Found) -> None:
        """Raise AnswerFileError, with counts, where answers are doubled or foreign."""
        if found.trouble:
            raise AnswerFileError(
                f"{self.folder}: the files do not make one whole: "
                f"{'; '.join(found.trouble)}. Delete those lines, or the folder's part "
                "files, and run again"
            )

    def merge(self, found: Found) -> None:
        """Write the whole in question order, at one instant; untouched if it is so already."""
        self.check(found)
        files: dict[Path, bytes] = {}
        content = []
        for _, place in sorted(found.where.items()):
            if place.file not in files:
                files[place.file] = place.file.read_bytes()
            line = files[place.file][place.offset : place.offset + place.length]
            content.append(line.rstrip(b"\n") + b"\n")
        joined = b"".join(content)
        if joined and (not self.whole.is_file() or joined != self.whole.read_bytes()):
            write_atomically(self.whole, joined)

    # -- reports ----------------------------------------------------------------------------------

    def write_report(self, rank: int, size: int, report: Report) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._report(rank, size), json.dumps(asdict(report)))

    def reports(self, size: int) -> dict[int, Report]:
        """What the processes that are through have left, by rank."""
        found = {}
        for rank in range(size):
            try:
                document = json.loads(self._report(rank, size).read_bytes())
                failures = [DataIssue(**one) for one in document.pop("failures")]
                report = Report(**document, failures=failures)
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if report.config == self._config:
                found[rank] = report
        return found

    def clear_report(self, rank: int, size: int) -> None:
        self._report(rank, size).unlink(missing_ok=True)

    def _report(self, rank: int, size: int) -> Path:
        return self.folder / f"{size}_{rank}.report.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time in here; where the file system has no locks, everybody."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.folder, os.O_RDONLY)
        except OSError:  # folders cannot be opened everywhere
            yield
            return
        try:
            if fcntl is not None:
                _quietly(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX))
            yield
        finally:
            os.close(descriptor)


def _quietly(lock: Callable[[], None]) -> None:
    try:
        lock()
    except OSError:
        pass


def _stream(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number, offset, line) of a file; nothing if it is gone by now."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, offset, raw
                offset += len(raw)
    except FileNotFoundError:
        return

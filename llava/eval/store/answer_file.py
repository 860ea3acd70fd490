"""The answer file: LLaVA's jsonl, appended after each batch, resumable after any interruption.

    with AnswerFile(path, questions, configuration, model_id) as file:
        file.missing                     # indices of questions without answer
        file.write([Answer(...), ...])   # one write call per batch
        file.finalize()                  # question order, atomically

During a run, lines are in the order in which they were answered; `finalize` rewrites the file in question
order (temporary file, fsync, rename), so there is a valid file under the name at any time. An incomplete last
line is discarded; a complete one without newline is completed. A POSIX lock keeps a second process out; where
there are no locks (Windows, some network folders) a second process is not noticed.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import Answer, Question
from llava.eval.store.answer_lines import AnswerFileError, AnswerLines
from llava.eval.store.atomic import write_atomically
from llava.eval.store.provenance import Configuration

try:
    import fcntl
except ImportError:  # no POSIX locks on this platform
    fcntl = None  # type: ignore[assignment]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOCK_TRIES = (0.05, 0.2, 0.0)  # seconds after each; `is_locked` of another process locks for an instant
_FSYNC_SECONDS = 5.0  # what a power cut may cost; a killed process loses nothing that was written


def is_locked(path: Path) -> bool:
    """Return True if a process has this answer file open."""
    if fcntl is None or not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            pass
    return False


class AnswerFile:
    """One answer file of one configuration, open for appending. Use as a context manager.

    Args:
        questions: All questions that may have an answer in this file.
        only: Indices of the questions to answer; default: all. Answers to the others are kept.
        retried: Indices of the questions that an earlier start failed to answer; their answers say so.

    Raises:
        AnswerFileError: Another process writes to the file; its answers are of another configuration, to
            other questions, or not made by this program; a line is corrupt; it is not a regular file; or the
            disk is full.
    """

    def __init__(
        self,
        path: str | Path,
        questions: Sequence[Question],
        configuration: Configuration,
        only: Collection[int] | None = None,
        retried: Collection[int] = (),
    ) -> None:
        self.path = Path(path)
        self._retried = frozenset(retried)
        self._lines = AnswerLines(questions, configuration)
        self._wanted = frozenset(self._lines.questions if only is None else only)
        self._where: dict[int, tuple[int, int]] = {}  # question index -> (offset, length) of its line
        self._size = 0
        self._synced = time.monotonic()
        self._file = self._open()
        try:
            for left in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # of a run killed in finalize
                left.unlink(missing_ok=True)
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def answered(self) -> int:
        """Return the number of answers in the file."""
        return len(self._where)

    @property
    def missing(self) -> list[int]:
        """Return the indices of this file's questions without answer, ascending."""
        return sorted(index for index in self._wanted if index not in self._where)

    def note(self, notes: Sequence[str]) -> None:
        """Record in the metadata of new answers how the loaded model departs from its checkpoint's files."""
        self._lines.note(notes)

    def wants(self, index: int) -> bool:
        """Return True if the question is one of this file's and has no answer."""
        return index in self._wanted and index not in self._where

    def write(self, answers: Sequence[Answer]) -> None:
        """Append answers that the file does not have; all of them or, on a full disk, none."""
        lines, places, offset = [], {}, self._size
        for answer in answers:
            if not self.wants(answer.index) or answer.index in places:
                continue
            line = self._lines.write(answer, answer.index in self._retried)
            lines.append(line)
            places[answer.index] = (offset, len(line))
            offset += len(line)
        self._append(b"".join(lines))
        self._where.update(places)
        if time.monotonic() - self._synced > _FSYNC_SECONDS:
            self._sync()

    def finalize(self) -> None:
        """Put the lines in question order, atomically, and close the file."""
        self._sync()
        places = [self._where[index] for index in sorted(self._where)]
        if places != sorted(places):
            try:
                # This file stays locked until the new one has its name; nothing is written after that.
                write_atomically(self.path, (os.pread(self._file, size, start) for start, size in places))
            except OSError as error:
                raise self._cannot_write(error) from error
        self.close()

    def close(self) -> None:
        """Close the file; remove it if it is empty although there were questions."""
        if self._file < 0:
            return
        if self._lines.questions and os.fstat(self._file).st_size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1

    # -- reading ----------------------------------------------------------------------------------

    def _open(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():
                what = "a folder" if self.path.is_dir() else "a pipe, socket or device"
                raise AnswerFileError(f"{self.path}: {what}, expected a file. Use another name")
            while True:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                try:
                    self._lock(descriptor)
                    # another process may have renamed its finished file over the one we opened
                    if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                        return descriptor
                except FileNotFoundError:
                    pass
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _lock(self, descriptor: int) -> None:
        if fcntl is None:
            return
        for wait in _LOCK_TRIES:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(wait)
            except OSError:  # a file system without locks
                return
        raise AnswerFileError(
            f"{self.path}: another process is writing to this file. Wait for it, stop it, or use a new "
            "--output"
        )

    def _read(self) -> None:
        offset = number = 0
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                index = self._lines.read(raw, f"{self.path}:{number}")
                if index is None:
                    if file.read(1):
                        raise AnswerFileError(
                            f"{self.path}:{number}: a corrupt line in the middle of the file. Delete that "
                            "line and run again"
                        )
                    os.ftruncate(self._file, offset)  # incomplete: its question is answered again
                    break
                if index in self._where:
                    identity = self._lines.questions[index].question_id
                    raise AnswerFileError(
                        f"{self.path}:{number}: a second answer to question {identity!r}. "
                        "Delete one of the two lines"
                    )
                self._where[index] = (offset, len(raw))
                offset += len(raw)
                if not raw.endswith(b"\n"):
                    self._size = offset
                    self._append(b"\n")
                    self._where[index] = (self._where[index][0], len(raw) + 1)
                    offset += 1
        self._size = offset

    # -- writing ----------------------------------------------------------------------------------

    def _append(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, self._size)  # half a line helps nobody
            raise self._cannot_write(error) from error
        self._size += len(data)

    def _cannot_write(self, error: OSError) -> AnswerFileError:
        if error.errno in _FULL:
            why = "the disk is full (or a file size limit or quota is reached)"
            fix = "Free some space and run the same command to resume"
        else:
            why = f"cannot write ({error.strerror})"
            fix = "Make it writable and run the same command, or use another --output-dir (OUT_DIR)"
        return AnswerFileError(f"{self.path}: {why}. The {self.answered} answers in it are safe. {fix}")

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            if error.errno != errno.EINVAL:  # not every file can be synced
                raise self._cannot_write(error) from error
        self._synced = time.monotonic()

"""The samples of an analysis on disk, so that it resumes and that memory does not grow with their number.

A file has a header line that names the analysis (JSON), then records of equal size, appended one by one: the
index of the question, the vectors in float32, and a checksum. A kill may leave a part of the last record,
which is dropped. Whatever happened before, the same samples are read in the same order.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.analysis.attention.rows import KINDS, AttentionSample

try:
    import fcntl
except ImportError:  # no POSIX locks on this platform
    fcntl = None  # type: ignore[assignment]

_HEAD, _CHECK = struct.Struct("<q4q"), struct.Struct("<I")
_STACKED = KINDS[:-1]
_MOST = 1 << 16  # bytes of a header


@dataclass(frozen=True)
class StoredSamples:
    """Samples that are read from their file whenever they are iterated over."""

    records: Records
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[AttentionSample]:
        return map(self.records.read, self.indices)


class Records:
    """An append-only file of samples by question. Use as a context manager; one process at a time.

    Args:
        path: Created if it does not exist, with the folders above.
        header: What decides the samples; as JSON it must equal that of a file that exists.

    Raises:
        OSError: The file is of another analysis, is being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._header = (json.dumps(header, sort_keys=True) + "\n").encode()
        self._shape: tuple[int, int] | None = None
        self._places: dict[int, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")
        try:
            self._lock()
            self._scan()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def __len__(self) -> int:
        return len(self._places)

    def append(self, index: int, sample: AttentionSample) -> None:
        """Write the sample of a question.

        Raises:
            ValueError: Its shape is not that of the others.
        """
        shape = sample.last.shape
        if self._shape is None:
            self._shape = shape
        if shape != self._shape:
            raise ValueError(
                f"question {index}: attention of {shape[0]} layers to {shape[1]} tokens, before it "
                f"{self._shape[0]} and {self._shape[1]}. Analyze images of one number of visual tokens."
            )
        parts = [np.asarray(getattr(sample, kind), "<f4").tobytes() for kind in KINDS]
        facts = (sample.visual_start, sample.length, *shape)
        body = _HEAD.pack(index, *facts) + b"".join(parts)
        place = os.fstat(self._file.fileno()).st_size
        self._file.write(body + _CHECK.pack(zlib.crc32(body)))
        self._file.flush()
        self._places[index] = place

    def samples(self, indices: Iterable[int]) -> StoredSamples:
        """Return the samples of these questions, in this order; questions without one are skipped."""
        return StoredSamples(self, [one for one in indices if one in self._places])

    def read(self, index: int) -> AttentionSample:
        """Return the sample of a question."""
        self._file.seek(self._places[index])
        found = self._next()
        assert found is not None
        return found[1]

    # -- the file ---------------------------------------------------------------------------------

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"{self.path}: another process is writing to this file. Wait for it, or use another --output."
            ) from None
        except OSError:  # a file system without locks
            pass

    def _scan(self) -> None:
        """Find all records; cut the file after the last one that is whole."""
        self._file.seek(0)
        found = self._file.read(_MOST).partition(b"\n")
        line = found[0] + found[1]
        if line != self._header:
            if self._header.startswith(line):  # new, or killed in the header
                self._file.truncate(0)
                self._file.write(self._header)
                self._file.flush()
                line = self._header
            else:
                raise OSError(
                    f"{self.path}: the samples of another analysis. Remove the file, or use another --output."
                )
        place = len(line)
        self._file.seek(place)
        while (record := self._next()) is not None:
            self._places[record[0]] = place
            self._shape = record[1].last.shape
            place = self._file.tell()
        self._file.truncate(place)

    def _next(self) -> tuple[int, AttentionSample] | None:
        """Read the record at the current position; None at the end, or if it is not whole."""
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        index, start, length, layers, tokens = _HEAD.unpack(head)
        size = 4 * tokens * (layers * len(_STACKED) + 1)
        left = os.fstat(self._file.fileno()).st_size - self._file.tell()
        if (
            min(layers, tokens) < 1
            or size + _CHECK.size > left
            or self._shape not in (None, (layers, tokens))
        ):
            return None
        body = self._file.read(size)
        if _CHECK.pack(zlib.crc32(head + body)) != self._file.read(_CHECK.size):
            return None
        vectors = np.frombuffer(body, "<f4").astype(np.float64)
        stacked = vectors[:-tokens].reshape(len(_STACKED), layers, tokens)
        named = dict(zip(_STACKED, stacked, strict=True))
        return index, AttentionSample(**named, cls=vectors[-tokens:], visual_start=start, length=length)

"""Stream MMBench's TSV tables, which contain images as base64; an image is decoded when it is used.

Cells are read as pandas reads them, including quotes and missing values, because LLaVA reads the tables with
pandas. Uses the columns `index` and `image`; the benchmark uses the others.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import DataError, DataIssue

_NEEDS = ("index", "question", "A", "B", "answer", "image")
# What pandas reads as a missing cell, and therefore LLaVA as well; an option "None" is lost.
MISSING_CELLS = frozenset(
    "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null"
    "".split("|")
)


@dataclass(frozen=True)
class TableImage:
    """An image in a row of a TSV file; equal images compare equal, whatever their row."""

    name: str  # hash of the base64 text
    path: Path = field(compare=False)
    offset: int = field(compare=False)  # of its row, in bytes
    length: int = field(compare=False)
    column: int = field(compare=False)

    def __str__(self) -> str:
        return f"{self.path} (row at byte {self.offset})"

    def load(self) -> Any:
        """Return the image as RGB. Raises OSError or ValueError that names file and row."""
        from llava.mm_utils import load_image_from_base64

        with self.path.open("rb") as file:
            file.seek(self.offset)
            (row,) = _reader([file.read(self.length).decode("utf-8")])
        try:
            return load_image_from_base64(row[self.column])
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from error


def rows_of(path: Path, problems: list[DataIssue]) -> Iterator[tuple[int, TableImage | str, dict[str, str]]]:
    """Stream (line, image or index of the row that has it, row without image) of a TSV."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as file:
        end = 0

        def lines() -> Iterator[str]:
            nonlocal end
            for raw in file:
                end += len(raw)
                yield raw.decode("utf-8-sig" if end == len(raw) else "utf-8")

        reader = _reader(lines())
        header = next(reader, [])
        missing = [name for name in _NEEDS if name not in header]
        if missing:
            fix = "Check that it is the right file."
            raise DataError(f"{path}:1: missing columns {', '.join(missing)}. {fix}")
        column, start = header.index("image"), end
        for cells in reader:
            offset, length, start = start, end - start, end
            if not cells:
                continue
            if len(cells) != len(header) or not cells[header.index("index")].isdigit():
                what = f"{len(cells)} cells for {len(header)} columns, or no index"
                problems.append(DataIssue(str(path), reader.line_num, what))
                continue
            row = dict(zip(header, cells, strict=True))
            image = row.pop("image")
            if not image.isdigit() or len(image) >= 64:
                name = hashlib.sha256(image.encode()).hexdigest()[:32]
                image = TableImage(name, path, offset, length, column)
            yield reader.line_num, image, row


def is_missing(cell: str) -> bool:
    """Return True for a cell that pandas or LLaVA reads as missing."""
    return cell in MISSING_CELLS or cell.lower() in ("nan", "none")


def _reader(lines: Iterable[str]) -> Any:
    # The limit belongs to the process, and images are loaded in worker processes as well.
    csv.field_size_limit(2**31 - 1)
    return csv.reader(lines, delimiter="\t")

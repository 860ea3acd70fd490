"""Stream MMBench's TSV tables, which contain images as base64; an image is decoded when it is used.

Cells are read as pandas reads them, including quotes and missing values, because LLaVA reads the tables with
pandas. Uses the columns `index` and `image`; the benchmark uses the others.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import DataError, DataIssue, not_text

_INDEX = re.compile(r"0*([0-9]{1,15})(?:\.0*)?")
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
        from llava.image_files import load_image_from_base64

        with self.path.open("rb") as file:
            file.seek(self.offset)
            raw = file.read(self.length)
        try:
            (row,) = _reader([raw.decode("utf-8")])
            return load_image_from_base64(row[self.column])
        except (ValueError, IndexError, csv.Error) as error:
            raise ValueError(f"{self}: {error}") from error


def rows_of(path: Path, problems: list[DataIssue]) -> Iterator[tuple[int, TableImage | str, dict[str, str]]]:
    """Stream (line, image or index of the row that has it, row without image) of a TSV.

    The index is a whole number; pandas writes "7.0" for 7 in a column with an empty cell.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as file:
        end = number = 0

        def lines() -> Iterator[str]:
            nonlocal end, number
            for raw in file:
                end += len(raw)
                number += 1
                try:
                    yield raw.decode("utf-8-sig" if end == len(raw) else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: {not_text(error)}") from error

        reader = _cells(_reader(lines()), path)
        _, header = next(reader, (1, []))
        missing = [name for name in _NEEDS if name not in header]
        if missing:
            fix = "Check that it is the right file."
            raise DataError(f"{path}:1: missing columns {', '.join(missing)}. {fix}")
        column, start = header.index("image"), end
        for line, cells in reader:
            offset, length, start = start, end - start, end
            if not cells:
                continue
            row = dict(zip(header, cells, strict=False))
            if len(cells) != len(header) or not (index := _INDEX.fullmatch(row["index"])):
                what = f"{len(cells)} cells for {len(header)} columns, or no index"
                problems.append(DataIssue(str(path), line, what))
                continue
            row["index"], image = index[1], row.pop("image")
            if reference := _INDEX.fullmatch(image):
                yield line, reference[1], row
                continue
            name = hashlib.sha256(image.encode()).hexdigest()[:32]
            yield line, TableImage(name, path, offset, length, column), row


def is_missing(cell: str) -> bool:
    """Return True for a cell that pandas or LLaVA reads as missing."""
    return cell in MISSING_CELLS or cell.lower() in ("nan", "none")


def _cells(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of every row. Raises DataError where the table ends early."""
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        fix = "Save it with Unix line ends, or download it again."
        raise DataError(f"{path}:{reader.line_num}: not a row of a table ({error}). {fix}") from error


def _reader(lines: Iterable[str]) -> Any:
    # The limit belongs to the process, and images are loaded in worker processes as well.
    csv.field_size_limit(2**31 - 1)
    return csv.reader(lines, delimiter="\t")

"""Tables with pictures in them (MMBench's TSV), streamed: a picture is read from its row when it is shown.

Cells are read as pandas reads them, quotes and missing values included, because that is how the tables are
meant. Knows columns `index` and `image`; the rest is the benchmark's.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.base import DataError, DataIssue

_NEEDS = ("index", "question", "A", "B", "answer", "image")
# What pandas takes for a missing cell, and LLaVA therefore too; an option "None" is lost.
MISSING_CELLS = frozenset(
    (
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    )
)


@dataclass(frozen=True)
class EmbeddedImage:
    """A picture inside a row of a TSV file; equal pictures are equal, wherever they stand."""

    name: str  # hash of the base64 text
    path: Path = field(compare=False)
    offset: int = field(compare=False)  # of its row, in bytes
    length: int = field(compare=False)
    column: int = field(compare=False)

    def __str__(self) -> str:
        return f"{self.path} (row at byte {self.offset})"

    def load(self) -> Any:
        """The picture as RGB. Raises OSError or ValueError that names file and row."""
        from llava.mm_utils import load_image_from_base64

        with self.path.open("rb") as file:
            file.seek(self.offset)
            (row,) = csv.reader([file.read(self.length).decode("utf-8")], delimiter="\t")
        try:
            return load_image_from_base64(row[self.column])
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from error


def rows_of(
    path: Path, problems: list[DataIssue]
) -> Iterator[tuple[int, EmbeddedImage | str, dict[str, str]]]:
    """Stream (line, picture or index of the row that has it, row without picture) of a TSV."""
    csv.field_size_limit(2**31 - 1)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as file:
        end = 0

        def lines() -> Iterator[str]:
            nonlocal end
            for raw in file:
                end += len(raw)
                yield raw.decode("utf-8-sig" if end == len(raw) else "utf-8")

        reader = csv.reader(lines(), delimiter="\t")
        header = next(reader, [])
        lacking = [name for name in _NEEDS if name not in header]
        if lacking:
            raise DataError(f"{path}:1: lacks the columns {', '.join(lacking)}: another table?")
        column, begin = header.index("image"), end
        for cells in reader:
            length, start = end - begin, begin
            begin = end
            if not cells:
                continue
            if len(cells) != len(header) or not cells[header.index("index")].isdigit():
                problems.append(
                    DataIssue(
                        str(path),
                        reader.line_num,
                        f"{len(cells)} cells under {len(header)} columns, or no index",
                    )
                )
                continue
            text = cells[column]
            row = dict(zip(header, cells, strict=True))
            del row["image"]
            if text.isdigit() and len(text) < 64:
                yield reader.line_num, text, row
            else:
                name = hashlib.sha256(text.encode()).hexdigest()[:32]
                yield reader.line_num, EmbeddedImage(name, path, start, length, column), row


def is_missing(cell: str) -> bool:
    """True for a cell that holds nothing, by pandas' and LLaVA's reading."""
    return cell in MISSING_CELLS or cell.lower() in ("nan", "none")

"""Read benchmark files: question and answer jsonl, JSON documents, ground truth parsed once per version.

A malformed line of a question file becomes a `DataIssue` with file and line, and reading continues. A file
that is missing or cannot be used as a whole raises `DataError`. Independent of any benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

Row = Mapping[str, Any]  # a JSON object: a question, an answer or an entry of the ground truth


class DataError(ValueError):
    """Files of a benchmark are missing or cannot be used; the message names them and the fix."""


@dataclass(frozen=True)
class DataIssue:
    """A problem with one line of one file."""

    file: str
    line: int  # 1-based
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Question:
    """One question as given to the model."""

    index: int  # among the readable questions of the file, from 0; unique, unlike `question_id`
    question_id: int | str
    image: Path | None  # or whatever `Benchmark.load_image` accepts; equal images share one encoding
    text: str  # prompt without image token and conversation template
    category: str = "default"
    file: str = ""
    line: int = 0  # from 1; or entry of a JSON list
    extra: Row = field(default_factory=dict, compare=False)  # further keys of the answer line


@dataclass(frozen=True)
class Answer:
    """The model's answer to one question, and the number of visual tokens behind it."""

    index: int  # Question.index
    text: str
    visual_tokens: int


def read_jsonl(path: Path, problems: list[DataIssue], needs: Iterable[str] = ()) -> Iterator[tuple[int, Row]]:
    """Stream (line number, object) of a jsonl file; `problems` receives lines without all keys of `needs`."""
    needs = tuple(needs)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                if b"\\u" in raw:  # an escape may be half of a surrogate pair, which no tokenizer accepts
                    json.dumps(row, ensure_ascii=False).encode()
            except ValueError as error:
                problems.append(DataIssue(str(path), number, f"not a JSON line ({error})"))
                continue
            missing = [key for key in needs if not isinstance(row, dict) or key not in row]
            if isinstance(row, dict) and not missing:
                yield number, row
                continue
            what = f"a JSON {type(row).__name__}, not an object"
            if isinstance(row, dict):
                what = f"missing key {', '.join(map(repr, missing))}"
            problems.append(DataIssue(str(path), number, what))


def read_rows(path: Path, needs: Iterable[str] = (), fix: str = "Fix or replace the file") -> list[Row]:
    """Return all objects of a jsonl file. Raises DataError if the file is missing or a line is malformed."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    problems: list[DataIssue] = []
    rows = [row for _, row in read_jsonl(path, problems, needs)]
    if problems:
        more = f" (and {len(problems) - 1} more lines)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}. {fix}.")
    return rows


def read_questions(
    path: str | Path, image_folder: str | Path, problems: list[DataIssue]
) -> Iterator[Question]:
    """Stream LLaVA's question jsonl: {"question_id", "image" (relative, optional), "text", "category"}.

    `problems` receives the lines that cannot be used. Raises DataError if the file is missing.
    """
    path, image_folder = Path(path), Path(image_folder)
    if not path.is_file():
        raise DataError(f"{path}: no such question file")
    index = 0
    for number, row in read_jsonl(path, problems, ("question_id", "text")):
        identity, text, image = row["question_id"], row["text"], row.get("image")
        if isinstance(identity, bool) or not isinstance(identity, int | str):
            message = f"question_id is {identity!r}, expected a number or a string"
        elif not isinstance(text, str):
            message = f"text is {text!r}, expected a string"
        elif image is not None and (not isinstance(image, str) or not image):
            message = f"image is {image!r}, expected a file name"
        else:
            where, category = image and image_folder / image, str(row.get("category", "default"))
            yield Question(index, identity, where, text, category, str(path), number)
            index += 1
            continue
        problems.append(DataIssue(str(path), number, message))


def read_answers(path: str | Path, list_keys: tuple[str, ...] = ()) -> list[Row]:
    """Return all answers of a jsonl file, objects with at least question_id and text.

    Raises DataError if the file is missing, empty or malformed anywhere: a score over a part of the answers
    would look like a score.

    Args:
        list_keys: If given, a JSON list of objects with these keys is accepted as well.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such answer file")
    with path.open("rb") as file:
        is_list = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if list_keys and is_list:
        rows = read_json(path, list, list_keys)
    else:
        rows = read_rows(path, ("question_id", "text"), "Fix or delete such lines before scoring")
    if not rows:
        raise DataError(f"{path}: contains no answers")
    return rows


def read_json(path: Path, kind: type, keys: Sequence[str] = ()) -> Any:
    """Return a JSON document. Raises DataError if the file is missing or has another content.

    Args:
        kind: Expected type of the top level, dict or list.
        keys: Required keys of the dict, or of every object of the list.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except ValueError as error:
        raise DataError(f"{path}: not a JSON document ({error})") from error
    fix = "Check that it is the right file."
    if not isinstance(document, kind):
        what = f"a JSON {type(document).__name__}, expected a {kind.__name__}"
        raise DataError(f"{path}: contains {what}. {fix}")
    for number, part in enumerate([document] if kind is dict else document, 1):
        missing = [key for key in keys if not isinstance(part, dict) or key not in part]
        if missing:
            where = "" if kind is dict else f" in entry {number}"
            raise DataError(f"{path}: missing key {', '.join(map(repr, missing))}{where}. {fix}")
    return document


def parse_once(parse: Callable[..., Any], *paths: Path) -> Any:
    """Return `parse(*paths)`, computed once per process and version (time and size) of the files.

    A sweep scores every setting against the same ground truth, which takes minutes to parse for VQAv2. A
    folder counts as all its *.txt files. The last 16 results are kept. They are shared, and therefore
    read-only: dicts become mapping proxies, lists tuples. `parse` must be a function, not a bound method, so
    that all instances of a benchmark share the result.
    """
    files = [one for path in paths for one in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])]
    version = tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _parsed(parse, paths, version)


@lru_cache(maxsize=16)
def _parsed(parse: Callable[..., Any], paths: tuple[Path, ...], version: tuple[Any, ...]) -> Any:
    return _frozen(parse(*paths))


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _frozen(part) for key, part in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list) else value

"""Read benchmark files: question and answer jsonl, JSON documents, ground truth parsed once per version.

A malformed line of a question file becomes a `DataIssue` with file and line, and reading continues. A file
that is missing or cannot be used as a whole raises `DataError`. Each benchmark declares the fields of its
files and their types once, as a `Shape`; `mismatch` compares. Independent of any benchmark.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

Row = Mapping[str, Any]  # a JSON object: a question, an answer or an entry of the ground truth
# What a JSON value must be: a type (a bool is not an int, an int is a float, a float is finite), a tuple of
# shapes of which one must fit, a frozenset of strings, [shape] for a list, {"key": shape, "key?": shape} for
# an object with required and optional keys, or {str: shape} for an object with any keys.
Shape = Any

ID = (int, str)
TEXT = (str, int, float, type(None))  # written as text wherever it is used
ANSWER: Mapping[str, Shape] = {"question_id": ID, "text": str, "prompt?": str}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MISSING = object()
_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
_NAMES |= {list: "a list", dict: "an object"}


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
            except (ValueError, RecursionError) as error:
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


def mismatch(value: Any, shape: Shape) -> str | None:
    """Return where and how a JSON value differs from its shape, e.g. ".answers[3] is 5, ..."; else None."""
    kind = type(value)
    if isinstance(shape, type):
        if shape is object or kind is shape and (kind is not float or math.isfinite(value)):
            return None
        if shape is float and kind is int and abs(value) < 2**63:
            return None
    elif isinstance(shape, tuple):
        if kind in shape and kind is not float:
            return None
        found = [mismatch(value, one) for one in shape]
        if None in found:
            return None
        objects = [one for one in found if one and one[0] in ".:"]
        if kind is dict and objects:  # the one whose keys are there
            return next((one for one in objects if one[0] == "."), objects[-1])
    elif isinstance(shape, frozenset):
        if kind is str and value in shape:
            return None
    elif isinstance(shape, list):
        if kind is list:
            for place, part in enumerate(value):
                if found := mismatch(part, shape[0]):
                    return f"[{place}]{found}"
            return None
    elif kind is dict:
        if str in shape:
            for key, part in value.items():
                if found := mismatch(part, shape[str]):
                    return f"[{reprlib.repr(key)}]{found}"
            return None
        for key, part in shape.items():
            name = key if key in value or key[-1] != "?" else key[:-1]
            inside = value.get(name, _MISSING)
            if inside is _MISSING:
                if name is key:
                    return f": missing key {key!r}"
            elif type(inside) is not part or part is float:  # most values need no call
                if found := mismatch(inside, part):
                    return f".{name}{found}"
        return None
    return f" is {reprlib.repr(value)}, expected {_expected(shape)}"


def _expected(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_expected, shape))
    if isinstance(shape, frozenset):
        return " or ".join(map(repr, sorted(shape)))
    return _NAMES[shape if isinstance(shape, type) else type(shape)]


def _row_mismatch(row: Any, shape: Shape) -> str | None:
    """Compare a row with its shape; a question_id like 7.0, as pandas writes, becomes an integer first."""
    identity = row.get("question_id") if isinstance(row, dict) else None
    if type(identity) is float and identity.is_integer():
        row["question_id"] = int(identity)
    found = mismatch(row, shape)
    return found and found.lstrip(".: ")


def decode_text(raw: bytes) -> str:
    """Decode UTF-8, or UTF-16 and UTF-32 with a byte order mark. Raises UnicodeDecodeError."""
    return raw.decode(next((name for mark, name in _BOMS if raw.startswith(mark)), "utf-8"))


def read_text(path: Path) -> str:
    r"""Return a text file with "\n" as its line ends. Raises DataError naming file and line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        text = decode_text(raw)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {not_text(error)}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def not_text(error: UnicodeDecodeError) -> str:
    """Return the message about bytes that are not UTF-8, with the fix."""
    byte = f" (byte 0x{error.object[error.start]:02x})" if error.start < len(error.object) else ""
    return f"not {error.encoding} text{byte}. Save the file as UTF-8."


def load_json(raw: bytes) -> Any:
    """Parse a JSON document (see `decode_text`). Raises ValueError, also if it is nested too deeply."""
    text = decode_text(raw)
    try:
        document = json.loads(text)
        if _SURROGATE.search(text):  # an escape may be half of a pair, which cannot be printed
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return document


def read_rows(
    path: Path,
    shape: Shape = object,
    fix: str = "Fix or replace the file",
    problems: list[DataIssue] | None = None,
) -> list[Row]:
    """Return all objects of a jsonl file. Raises DataError if the file is missing or a line is malformed.

    Args:
        shape: Of every object.
        problems: If given, receives the malformed lines, which are then left out.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found: list[DataIssue] = []
    rows = []
    for number, row in read_jsonl(path, found):
        if wrong := _row_mismatch(row, shape):
            found.append(DataIssue(str(path), number, wrong))
        else:
            rows.append(row)
    if problems is not None:
        problems += found
    elif found:
        first = min(found, key=lambda issue: issue.line)
        more = f" (and {len(found) - 1} more lines)" if len(found) > 1 else ""
        raise DataError(f"{first}{more}. {fix}.")
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


def read_answers(
    path: str | Path,
    shape: Mapping[str, Shape] = ANSWER,
    list_shape: Mapping[str, Shape] | None = None,
    problems: list[DataIssue] | None = None,
) -> list[Row]:
    """Return all answers of a jsonl file, or of a JSON list of the same objects.

    Raises DataError if the file is missing, empty or malformed anywhere: a score over a part of the answers
    would look like a score.

    Args:
        shape: Of an answer. A question_id that is a float without fraction, as pandas writes, is an integer.
        list_shape: If given, a JSON list of such objects is accepted as well.
        problems: If given, receives the malformed lines, which are then left out.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such answer file")
    fix = "Fix or delete such lines before scoring"
    with path.open("rb") as file:
        is_list = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not is_list:
        rows = read_rows(path, shape, fix, problems)
    else:
        rows, found = [], []
        document = read_json(path, list)
        if list_shape and not any(isinstance(row, dict) and "text" in row for row in document):
            shape = list_shape
        for number, row in enumerate(document, 1):
            if wrong := _row_mismatch(row, shape):
                found.append(DataIssue(str(path), number, f"entry {number}: {wrong}"))
            else:
                rows.append(row)
        if problems is not None:
            problems += found
        elif found:
            raise DataError(f"{path}: {found[0].message}. {fix}.")
    if not rows:
        raise DataError(f"{path}: contains no answers")
    return rows


def read_json(path: Path, kind: type, shape: Mapping[Any, Shape] | Sequence[str] = ()) -> Any:
    """Return a JSON document. Raises DataError if the file is missing or has another content.

    Args:
        kind: Expected type of the top level, dict or list.
        shape: Shape of the dict, or of every object of the list; or only their required keys.
    """
    try:
        document = load_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not a JSON document ({error})") from error
    fix = "Check that it is the right file."
    if not isinstance(document, kind):
        what = f"a JSON {type(document).__name__}, expected a {kind.__name__}"
        raise DataError(f"{path}: contains {what}. {fix}")
    if not isinstance(shape, Mapping):
        shape = dict.fromkeys(shape, object)
    for number, part in enumerate([document] if kind is dict else document, 1) if shape else ():
        if found := mismatch(part, shape):
            where = "" if kind is dict else f"entry {number}: "
            raise DataError(f"{path}: {where}{found.lstrip('.: ')}. {fix}")
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
    try:
        return _frozen(parse(*paths))
    except RecursionError:
        raise DataError(f"{paths[0]}: nested too deeply. Check that it is the right file.") from None


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _frozen(part) for key, part in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list) else value

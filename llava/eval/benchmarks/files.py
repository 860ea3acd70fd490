"""Read benchmark files: JSON lines, answers, JSON documents, ground truth parsed once per version.

A malformed line becomes a `DataIssue` with file and line, and reading continues. A file
that is missing or cannot be used as a whole raises `DataError`. Independent of any benchmark.
"""

from __future__ import annotations

import io
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from .shapes import ID, Shape, mismatch

Row = Mapping[str, Any]  # a JSON object: a question, an answer or an entry of the ground truth
ANSWER: Mapping[str, Shape] = {"question_id": ID, "text": str, "prompt?": str}
_MALFORMED = (ValueError, RecursionError)  # of JSON: broken, of another encoding, or nested too deeply
_HEAD = 1 << 16  # bytes by which kind, encoding and line ends of a file are recognized
_OTHER_KINDS = {
    b"\x1f\x8b": "compressed with gzip",
    b"PK\x03\x04": "a zip archive or Excel table",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PAR1": "a Parquet table",
    b"<": "an HTML or XML page",
    b"version https://git-lfs": "a Git LFS pointer without the file's content",
}


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


# Lines that LLaVA's prompts append to a question
INSTRUCTIONS = (
    "When the provided information is insufficient, respond with 'Unanswerable'.",
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)


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

    @property
    def bare(self) -> str:
        """The text without the instructions after it."""
        lines = self.text.rstrip().split("\n")
        while len(lines) > 1 and lines[-1].strip() in INSTRUCTIONS:
            lines.pop()
        return "\n".join(lines)


@dataclass(frozen=True)
class Answer:
    """The model's answer to one question, and its visual tokens in the language model, mean over layers."""

    index: int  # Question.index
    text: str
    visual_tokens: int | float


def check_file(path: Path, what: str = "file") -> None:
    """Raise DataError unless `path` is a regular file: reading a pipe or a device may never end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"{path}: no such {what}") from None
    except (OSError, ValueError) as error:  # not permitted, name too long, a NUL in the name
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise DataError(
            f"{path}: {found}, expected {'an' if what[0] in 'aeiou' else 'a'} {what}. Pass a regular file."
        )


def read_jsonl(path: Path, problems: list[DataIssue], needs: Iterable[str] = ()) -> Iterator[tuple[int, Row]]:
    """Stream (line number, object) of a jsonl file, or (entry number, object) of a JSON list.

    Text is UTF-8, or UTF-16 or UTF-32 (recognized by byte order mark or zero bytes); lines end with LF, CRLF
    or CR.

    Args:
        problems: Receives lines that are not an object with all keys of `needs`.

    Raises:
        DataError: The file is missing, or of another kind as a whole.
    """
    needs = tuple(needs)
    check_file(path)
    with path.open("rb") as file:
        head = file.read(_HEAD)
        for start, what in _OTHER_KINDS.items():
            if head.startswith(start):
                fix = "Download, unpack or convert it"
                raise DataError(f"{path}: {what}, expected one JSON object per line. {fix}.")
        if _is_table(head):
            fix = "Convert it; MMBench's TSV is read by `llava.eval.model_vqa_mmbench`"
            raise DataError(f"{path}: a CSV or TSV table, expected one JSON object per line. {fix}.")
        document = _whole(path, file) if _begins_with(head, "[") else None
        if isinstance(document, list):
            entries: Iterable[tuple[int, Any]] = enumerate(document, 1)
        else:
            entries = _parsed_lines(path, file, head, problems)
        for number, row in entries:
            missing = [key for key in needs if key not in row] if isinstance(row, dict) else needs
            if isinstance(row, dict) and not missing:
                yield number, row
                continue
            what = f"a JSON {type(row).__name__}, not an object"
            if isinstance(row, dict):
                found = ", ".join(map(repr, [*row][:5])) or "none"
                what = f"missing key {', '.join(map(repr, missing))}, found {found}"
            problems.append(DataIssue(str(path), number, f"entry {number}: {what}" if document else what))


def _parsed_lines(
    path: Path, file: BinaryIO, head: bytes, problems: list[DataIssue]
) -> Iterator[tuple[int, Any]]:
    """Yield (line number, JSON value); `problems` receives lines that are not JSON."""
    first = True
    for number, raw in enumerate(_lines(path, file, head), 1):
        if raw.isspace():
            continue
        try:
            row = json.loads(raw.removeprefix(b"\xef\xbb\xbf").decode())
            if b"\\u" in raw:  # an escape may be half of a surrogate pair, which no tokenizer accepts
                json.dumps(row, ensure_ascii=False).encode()
        except _MALFORMED as error:
            if first and isinstance(whole := _whole(path, file), dict):
                keys = ", ".join(map(repr, [*whole][:5]))
                what = f"one JSON object over several lines (keys {keys}), expected one object per line"
                raise DataError(f"{path}: {what}. Convert it to JSON lines, or to a JSON list.") from None
            problems.append(DataIssue(str(path), number, f"not a JSON line ({_reason(error)})"))
        else:
            yield number, row
        first = False


def _lines(path: Path, file: BinaryIO, head: bytes) -> Iterable[bytes]:
    """Return an iterator over the lines of a text file, as UTF-8."""
    encoding = _encoding(head)
    is_utf8 = encoding.startswith("utf-8")
    file.seek(0)
    if is_utf8 and (b"\n" in head or b"\r" not in head):
        return file

    def decoded() -> Iterator[bytes]:
        # Invalid bytes of UTF-8 are kept, so that they cost their own line only.
        errors = "surrogateescape" if is_utf8 else "strict"
        try:
            for line in io.TextIOWrapper(file, encoding, errors):
                yield line.encode("utf-8", errors)
        except UnicodeError as error:
            raise DataError(f"{path}: not {encoding.upper()} ({error}). Save it as UTF-8.") from error

    return decoded()


def _encoding(head: bytes) -> str:
    return json.detect_encoding(head)  # by byte order mark, else by the positions of zero bytes


def _begins_with(head: bytes, character: str) -> bool:
    """Return True if this is the first character of the text that is not blank."""
    text = head.decode(_encoding(head[:4]), "ignore")
    return text.lstrip().startswith(character)


def _is_table(head: bytes) -> bool:
    """Return True if the first line has several columns and no line begins as JSON does."""
    lines = head.decode(_encoding(head[:4]), "ignore").lstrip("\ufeff").splitlines()
    columns = max(map(lines[0].count, "\t,")) if lines else 0
    return columns > 1 and not any(line.lstrip().startswith(("{", "[")) for line in lines)


def _whole(path: Path, file: BinaryIO) -> Any:
    """Return a file as one JSON document; None for JSON lines. The position in the file is kept."""
    place = file.tell()
    file.seek(0)
    raw = file.read()
    file.seek(place)
    try:
        return _parse(raw)
    except _MALFORMED as error:
        if _begins_with(raw[:_HEAD], "[") and getattr(error, "msg", "") != "Extra data":
            raise DataError(
                f"{path}: not a JSON list ({_reason(error)}). Fix or replace the file."
            ) from error
        return None


def _parse(raw: bytes) -> Any:
    """Return a JSON document, of Unicode that every tokenizer accepts.

    Raises:
        ValueError, RecursionError: It is not one.
    """
    document = json.loads(raw.decode(_encoding(raw[:4])))
    if re.search(rb"\\u[dD][89a-fA-F]", raw):  # perhaps half of a surrogate pair
        json.dumps(document, ensure_ascii=False).encode()
    return document


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _row_mismatch(row: Any, shape: Shape) -> str | None:
    """Compare a row with its shape; a question_id like 7.0, as pandas writes, becomes an integer first."""
    identity = row.get("question_id") if isinstance(row, dict) else None
    if type(identity) is float and identity.is_integer():
        row["question_id"] = int(identity)
    found = mismatch(row, shape)
    return found and found.lstrip(".: ")


def read_text(path: Path) -> str:
    r"""Return a text file with "\n" as its line ends. Raises DataError naming file and line."""
    check_file(path)
    raw = path.read_bytes()
    try:
        text = raw.decode(_encoding(raw[:4]))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {not_text(error)}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def not_text(error: UnicodeDecodeError) -> str:
    """Return the message about bytes that are not UTF-8, with the fix."""
    byte = f" (byte 0x{error.object[error.start]:02x})" if error.start < len(error.object) else ""
    return f"not {error.encoding} text{byte}. Save the file as UTF-8."


def load_json(raw: bytes) -> Any:
    """Parse a JSON document. Raises ValueError, also if it is nested too deeply."""
    try:
        return _parse(raw)
    except RecursionError as error:
        raise ValueError(_reason(error)) from None


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
    check_file(path, "answer file")
    with path.open("rb") as file:
        is_list = _begins_with(file.read(_HEAD), "[")
    used = (list_shape, shape) if list_shape and is_list else shape
    rows = read_rows(path, used, "Fix or delete such lines before scoring", problems)
    if not rows:
        raise DataError(f"{path}: contains no answers")
    return rows


def read_json(path: Path, kind: type, shape: Mapping[Any, Shape] | Sequence[str] = ()) -> Any:
    """Return a JSON document. Raises DataError if the file is missing or has another content.

    Args:
        kind: Expected type of the top level, dict or list.
        shape: Shape of the dict, or of every object of the list; or only their required keys.
    """
    check_file(path)
    try:
        document = load_json(path.read_bytes())
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


def by_key(path: Path, rows: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return {key: entry} of a ground truth file. Raises DataError if two entries have one key."""
    found: dict[Any, Any] = {}
    for key, entry in rows:
        if found.setdefault(key, entry) is not entry:
            raise DataError(f"{path}: {key!r} occurs more than once. Use the file of one split and release.")
    return found


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

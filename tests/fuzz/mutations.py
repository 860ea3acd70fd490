"""Twelve ways to damage a file: JSON, JSON lines, tables and plain text, as bytes.

    damaged = mutate("type", content, "answers.jsonl", random.Random(7))

Each is a function of (content, form, rng). `form` is "json", "jsonl", "tsv", "txt" or "binary". Forms that a
mutation does not know fall back to bytes: every mutation applies to every file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEPTH = 100_000  # of nested JSON, beyond any recursion limit
WRONG: tuple[Any, ...] = (None, True, 7, -1, 0.5, "", "x", "7", [], ["a", 1], {}, {"a": None})
NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000)
TEXTS = (
    *("{} ", " {}", "\t{}\n", "{}\r\n", "\ufeff{}", "\u00a0{}", "{}</s>", "{}\u2028", "{}\u200b"),
    *("", " ", "../{}", "/{}", "{}\0", "\ud800{}", "\U0001f642{}", "={}", "|{}|", "<b>{}</b>", "nan", "None"),
)
FORMS = {".jsonl": "jsonl", ".json": "json", ".tsv": "tsv", ".txt": "txt", ".csv": "tsv"}


def form_of(path: Path, content: bytes) -> str:
    """Return the form of a file, by name and content: POPE's label files are JSON lines named .json."""
    form = FORMS.get(path.suffix, "binary")
    if form == "json":
        try:
            json.loads(content)
        except ValueError:
            return "jsonl"
    return form


def mutate(name: str, content: bytes, form: str, rng: random.Random) -> bytes:
    """Return the content after one mutation; it may come out equal if nothing applies."""
    return MUTATIONS[name](content, form, rng)


def _load(content: bytes, form: str) -> Any:
    """Return JSON as objects (jsonl: a list of them); None for other forms."""
    if form == "json":
        return json.loads(content)
    return [json.loads(line) for line in content.splitlines() if line.strip()] if form == "jsonl" else None


def _dump(document: Any, form: str) -> bytes:
    if form == "jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in document)
    return json.dumps(document).encode()


def _places(document: Any, form: str, rng: random.Random, wanted: type | None = None) -> list[Any]:
    """Return up to 60 (container, key) of values in a document, drawn evenly over its entries."""
    entries = list(document) if isinstance(document, list) else list(document.values())
    containers: list[Any] = [document] if form == "json" else []
    for entry in rng.sample(entries, min(len(entries), 4)):
        containers.append(entry)
    found = []
    while containers:
        one = containers.pop()
        pairs = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, value in pairs:
            if wanted is None or (type(value) is wanted if wanted is not float else _is_number(value)):
                found.append((one, key))
            if isinstance(value, dict | list) and one is not document:
                containers.append(value)
    return found


def _alike(one: Any, other: Any) -> bool:
    return type(one) is type(other) or (_is_number(one) and _is_number(other))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cells(content: bytes) -> list[list[bytes]]:
    return [line.split(b"\t") for line in content.split(b"\n")]


def _join(cells: list[list[bytes]]) -> bytes:
    return b"\n".join(b"\t".join(row) for row in cells)


def _put(content: bytes, form: str, rng: random.Random, raw: str, wanted: type | None = None) -> bytes:
    """Replace one value by raw JSON text, or one cell of a table."""
    if form in ("json", "jsonl"):
        document = _load(content, form)
        places = _places(document, form, rng, wanted)
        if not places:
            return content
        container, key = rng.choice(places)
        container[key] = "@here@"
        return _dump(document, form).replace(b'"@here@"', raw.encode("utf-8", "surrogatepass"), 1)
    if form in ("tsv", "txt"):
        cells = _cells(content)
        row = rng.choice(cells)
        row[rng.randrange(len(row))] = raw.strip('"').encode("utf-8", "surrogatepass")
        return _join(cells)
    return content[: len(content) // 2] + raw.encode("utf-8", "surrogatepass") + content[len(content) // 2 :]


def drop(content: bytes, form: str, rng: random.Random) -> bytes:
    """Remove a key, an entry, a line or a column."""
    if form in ("json", "jsonl"):
        document = _load(content, form)
        if form == "jsonl" and rng.random() < 0.3:
            del document[rng.randrange(len(document))]
            return _dump(document, form)
        places = [(one, key) for one, key in _places(document, form, rng) if isinstance(one, dict)]
        if places:
            container, key = rng.choice(places)
            del container[key]
        return _dump(document, form)
    if form == "tsv" and rng.random() < 0.5:
        cells = _cells(content)
        column = rng.randrange(len(cells[0]))
        return _join([row[:column] + row[column + 1 :] for row in cells])
    lines = content.splitlines(keepends=True)
    if lines:
        del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def wrong_type(content: bytes, form: str, rng: random.Random) -> bytes:
    """Replace a value by one of another type."""
    if form not in ("json", "jsonl"):
        return _put(content, form, rng, json.dumps(rng.choice(WRONG)))
    document = _load(content, form)
    places = _places(document, form, rng)
    if places:
        container, key = rng.choice(places)
        container[key] = rng.choice([one for one in WRONG if not _alike(one, container[key])])
    return _dump(document, form)


def null(content: bytes, form: str, rng: random.Random) -> bytes:
    """Replace a value by null, a cell by nothing."""
    return _put(content, form, rng, "null" if form in ("json", "jsonl") else "")


def number(content: bytes, form: str, rng: random.Random) -> bytes:
    """Replace a number by one that is not finite or has 5,000 digits."""
    return _put(content, form, rng, rng.choice(NUMBERS), float)


def text(content: bytes, form: str, rng: random.Random) -> bytes:
    """Surround or replace a string: blanks, control characters, escapes, paths, markup."""
    if form not in ("json", "jsonl"):
        return _put(content, form, rng, rng.choice(TEXTS).format("x"))
    document = _load(content, form)
    places = _places(document, form, rng, str)
    if not places:
        return content
    container, key = rng.choice(places)
    container[key] = rng.choice(TEXTS).format(container[key])
    return _dump(document, form)


def long(content: bytes, form: str, rng: random.Random) -> bytes:
    """Replace a string by one of 5,000 characters."""
    return _put(content, form, rng, json.dumps("a/" * 2500), str)


def nest(content: bytes, form: str, rng: random.Random) -> bytes:
    """Replace a value by lists in lists, deeper than any parser recurses."""
    return _put(content, form, rng, "[" * DEPTH + "]" * DEPTH)


def truncate(content: bytes, form: str, rng: random.Random) -> bytes:
    """Cut the file somewhere."""
    return content[: rng.randrange(len(content))] if content else content


def repeat(content: bytes, form: str, rng: random.Random) -> bytes:
    """Repeat one line or entry at the end."""
    if form == "json":
        document = _load(content, form)
        if isinstance(document, list) and document:
            document.append(rng.choice(document))
        return _dump(document, form)
    lines = content.splitlines(keepends=True)
    return content + rng.choice(lines) if lines else content


def shuffle(content: bytes, form: str, rng: random.Random) -> bytes:
    """Permute lines (of a table all but the header) or entries."""
    if form == "json":
        document = _load(content, form)
        if isinstance(document, dict):
            keys = list(document)
            rng.shuffle(keys)
            document = {key: document[key] for key in keys}
        elif isinstance(document, list):
            rng.shuffle(document)
        return _dump(document, form)
    lines = content.splitlines(keepends=True)
    head = lines[:1] if form == "tsv" else []
    rest = lines[len(head) :]
    rng.shuffle(rest)
    return b"".join(head + rest)


def encode(content: bytes, form: str, rng: random.Random) -> bytes:
    """Store the same text in another encoding, with other line ends, or with a byte that is none."""
    if form == "binary":
        return bytes(255 - byte for byte in content[:64]) + content[64:]
    decoded = content.decode("utf-8", "replace")
    return rng.choice(
        (
            lambda: decoded.encode("utf-16"),
            lambda: decoded.encode("utf-8-sig"),
            lambda: decoded.encode("latin-1", "replace"),
            lambda: content.replace(b"\n", b"\r\n"),
            lambda: content.replace(b"\n", b"\r"),
            lambda: content[: len(content) // 2] + b"\xe9\xff" + content[len(content) // 2 :],
        )
    )()


def replace(content: bytes, form: str, rng: random.Random) -> bytes:
    """Put another document in the file's place."""
    return rng.choice((b"", b"\n", b"[]", b"{}", b"null", b"7", b'"x"', b"[[]]", b"\0" * 100, b"\x89PNG\r\n"))


MUTATIONS: dict[str, Callable[[bytes, str, random.Random], bytes]] = {
    "drop": drop,
    "type": wrong_type,
    "null": null,
    "number": number,
    "text": text,
    "long": long,
    "nest": nest,
    "truncate": truncate,
    "repeat": repeat,
    "shuffle": shuffle,
    "encode": encode,
    "replace": replace,
}

"""Join answers with questions by id and prompt; find answers that are empty, repeated or to other questions.

Works on rows and keys; independent of any benchmark.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from .files import DataError, Row
from .normalize import is_blank

_MOST_LINES = 16  # of a prompt that are searched for its question


class EmptyAnswersError(DataError):
    """All answers of a file are empty, so that a score would say nothing about the model."""


def is_empty(row: Row) -> bool:
    """Return True for an answer without text; rows of a server's file have other keys."""
    text = next((row[key] for key in ("text", "answer", "prediction") if key in row), None)
    return text is not None and is_blank(text)


def check_not_empty(path: str | Path, rows: Sequence[Row]) -> None:
    """Raise EmptyAnswersError if all answers are empty."""
    if rows and all(map(is_empty, rows)):
        raise EmptyAnswersError(
            f"{path}: all {len(rows)} answers are empty. A score would only say how the rule counts empty "
            "texts. Check the checkpoint and --dtype, and answer the questions again into a new file."
        )


def known_id(key: Hashable, known: Collection[Hashable]) -> Hashable:
    """Return the key as it is in `known`, which may write the same number differently: 1, "1" or "1.0"."""
    if key in known or not isinstance(key, int | str):
        return key
    text = str(key).strip().removesuffix(".0")
    if text in known:
        return text
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None
    return number if number in known and str(number) == text else key


def join_by_prompt(
    keys: Sequence[Hashable], answers: Sequence[Row], asked: Mapping[Hashable, Sequence[str]], path: Path
) -> list[Hashable]:
    """Return the keys if the prompts of the answers belong to them, else the keys that the prompts identify.

    Ids that are positions in a file belong to other questions if another file was used.

    Args:
        keys: Keys by id, one per answer.
        asked: Parts of the question of every key, in the order in which its prompt contains them.
        path: The file that has the questions, for messages.
    Raises:
        DataError: A prompt does not belong to its id, and the prompts identify no other question or several.
    """
    wrong = other_questions(keys, answers, asked)
    if not wrong:
        return list(keys)
    by_text: dict[str, list[Hashable]] = {}
    for key, parts in asked.items():
        by_text.setdefault(_letters("".join(parts)), []).append(key)
    found = [_asked_by(row.get("prompt"), by_text) for row in answers]
    if all(len(one) == 1 for one in found) and len({one[0] for one in found}) == len({*keys}):
        return [one[0] for one in found]
    key, prompt = wrong[0]
    first = f"first: {key!r} is {asked[key][0][:60]!r}, its prompt {prompt[:60]!r}"
    raise DataError(
        f"{path}: {len(wrong)} of {len(keys)} answers have the prompt of another question than their id has "
        f"in this file ({first}), and prompts alone do not identify the questions. Pass the --data whose "
        "question file was used."
    )


def other_questions(
    keys: Sequence[Hashable], answers: Sequence[Row], asked: Mapping[Hashable, Sequence[str]]
) -> list[tuple[Hashable, str]]:
    """Return (key, prompt) of the answers whose prompt does not contain the question of their key."""
    pairs = ((key, row.get("prompt")) for key, row in zip(keys, answers, strict=True))
    return [
        (key, prompt)
        for key, prompt in pairs
        if prompt is not None and key in asked and not _asks(prompt, asked[key])
    ]


def _asks(prompt: str, parts: Sequence[str]) -> bool:
    """Return True if a prompt contains the parts of a question in their order, spaces and marks aside."""
    return _in_order(prompt, parts) or _in_order(_letters(prompt), map(_letters, parts))


def _in_order(text: str, parts: Iterable[str]) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def _asked_by(prompt: str | None, by_text: Mapping[str, list[Hashable]]) -> list[Hashable]:
    """Return the keys of the longest run of lines of a prompt that is a question."""
    lines = (prompt or "").split("\n")[:_MOST_LINES]
    runs = [lines[first:last] for first in range(len(lines)) for last in range(first + 1, len(lines) + 1)]
    texts = (_letters("".join(run)) for run in sorted(runs, key=len, reverse=True))
    return next((by_text[text] for text in texts if text in by_text), [])


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def repeated_answers(
    keys: Sequence[Hashable], answers: Sequence[Row], key_name: str, effect: str = "only the last one counts"
) -> list[str]:
    """Return the warning that several answers have one key, as when two answer files are in one."""
    last = dict(zip(keys, answers, strict=True))
    if len(last) == len(answers):
        return []
    other = sum(row.get("text") != last[key].get("text") for key, row in zip(keys, answers, strict=True))
    several = f" ({other} with another text, as of several runs)" if other else ""
    return [f"{len(answers) - len(last)} answers repeat the {key_name} of another{several}; {effect}"]


def check_foreign(keys: Sequence[Hashable], known: Collection[Hashable], path: Path, key_name: str) -> None:
    """Raise DataError if there are answers whose key is not known; `path` is the file that lists the keys."""
    foreign = [key for key in keys if key not in known]
    if foreign:
        what = f"{len(foreign)} of {len(keys)} answers match no question in {path}"
        fix = "Pass the --data of the same benchmark, split and release."
        raise DataError(f"{what} (first {key_name}: {foreign[0]!r}). {fix}")

"""Read every score.json that runs and sweeps left under some folders.

A score.json without `method`, `tokens` or `model` (the line that `llava.eval.score` prints, saved by hand) is
left out with a warning that names what to add. Where only a server scores (VQAv2 test-dev, VizWiz test), put
`server.json`, {"benchmark": NAME, "score": NUMBER}, next to score.json or the answers. Entries that
`Scorecard` does not accept, such as NaN, leave the file out with a warning. Does not score.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import get_benchmark
from llava.eval.benchmarks.base import DataError
from llava.eval.benchmarks.files import check_file
from llava.eval.metrics.scorecard import FACTS, NAME, SETTING, Scorecard, read_json

SERVER = "server.json"
_FEW = 0.01  # share of answers that may be unreadable without a warning


@dataclass(frozen=True)
class MeasuredResult:
    """One score.json. `card.score` is the server's where there is a server.json."""

    path: Path
    card: Scorecard
    validation: bool  # of a validation set, where papers print the server's score of the test set

    @property
    def full_set(self) -> bool:
        """True if the number of answers is that of a full set, or unknown."""
        sizes = get_benchmark(self.card.benchmark).sizes
        return self.card.limit is None and (
            self.card.answered is None or not sizes or self.card.answered in sizes
        )

    @property
    def fixed(self) -> bool:
        """True if the score does not follow the official rule."""
        return str(self.card.details.get("rule", "")).startswith("fixed")

    @property
    def doubts(self) -> str:
        """What the scorer reported that makes the score doubtful; empty if there is nothing."""
        card, warnings = self.card, self.card.details.get("warnings")
        unread = (card.unreadable or 0) + (card.empty or 0)
        found = []
        if card.answered and unread > _FEW * card.answered:
            found.append(f"{unread} of {card.answered} answers are empty or not read by the official rule")
        if isinstance(warnings, list):
            found += [one for one in warnings if isinstance(one, str) and "not valid" in one][:1]
        return "; ".join(found)

    @property
    def kv_elements(self) -> int | None:
        """Elements of the keys and values of one token in all layers, where the run recorded the shapes."""
        try:
            layers, width, _, kv_width = self.card.prefill["shape"]  # type: ignore[index]
            return 2 * layers * (kv_width or width)
        except (KeyError, TypeError, ValueError):
            return None


def read_results(folders: Iterable[Path]) -> tuple[list[MeasuredResult], list[str]]:
    """Read all results; of several of one setting see `rank`.

    Returns:
        The results, and warnings about files that were left out.
    Raises:
        DataError: A folder does not exist.
    """
    paths: list[Path] = []
    for folder in folders:
        if not folder.exists():
            raise DataError(f"{folder}: no such folder. Pass the --output of runs and sweeps to --results.")
        paths += _visible(folder, NAME) if folder.is_dir() else [folder]
        paths += [path for path in _visible(folder, SERVER) if not path.with_name(NAME).exists()]
    warnings: list[str] = []
    found: dict[Any, MeasuredResult] = {}
    for path in {path.resolve(): path for path in paths}.values():  # a file once, however it was named
        try:
            result = _read(path, warnings)
        except DataError as error:
            warnings.append(f"{path}: left out, {str(error).removeprefix(f'{path}: ')}")
            continue
        visual = result.card.visual_tokens  # tables choose between several: other crops, other protocols
        key = (result.card.benchmark, *(getattr(result.card, name) for name in SETTING))
        key += (None if visual is None else round(visual),)
        better, worse = sorted([found.get(key, result), result], key=rank, reverse=True)
        found[key] = better
        if better.card.score != worse.card.score:
            differences = [a != b for a, b in zip(rank(better), rank(worse), strict=True)]
            reasons = ("scored", "complete", "of the published preset", "newer")
            why = reasons[differences.index(True)] if True in differences else "newer"
            warnings.append(
                f"{worse.path}: left out ({_shown(worse)}), because {better.path} has the same setting "
                f"({_shown(better)}) and is {why}"
            )
    return list(found.values()), warnings


def _visible(folder: Path, name: str) -> list[Path]:
    """Return the files of this name below a folder, but none in hidden folders, such as copies of editors."""
    found = sorted(folder.rglob(name))
    return [path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts)]


def rank(result: MeasuredResult) -> tuple[bool, bool, bool, float]:
    """Order results of one setting: those with a score, of a full set, of the published preset, the newest.

    An ablation of the tower's dtype leaves scores of the same setting, but without the preset.
    """
    card = result.card
    return card.score is not None, result.full_set, card.preset == "published", result.path.stat().st_mtime


def _shown(result: MeasuredResult) -> str:
    return "no score" if result.card.score is None else f"{result.card.score:.2f}"


def _read(path: Path, warnings: list[str]) -> MeasuredResult:
    """Read one file. Raises DataError with the reason why it cannot be used."""
    document = read_json(path)
    first = _first_metadata(path)
    card = Scorecard.of_document({**first, **document} if isinstance(document, dict) else document)
    given = {**first, **document}
    missing = [key for key in ("model", "method") if given.get(key) is None]
    missing += ["tokens"] if "tokens" not in given else []  # null means all
    other = [
        f"{key} is {document[key]!r}, but {first[key]!r} in the answers beside it"
        for key in (*SETTING, *FACTS)
        if key in first and key in document and first[key] != document[key]
    ]
    method = card.method
    checks = {
        f"it has no {' and no '.join(missing)}; add {', '.join(map(repr, missing))} to it "
        "(tokens: null for all of them)": not missing,
        f"method is {method!r}, but tokens is null, which means all; set tokens": card.tokens is not None
        or card.keep is not None
        or method in (None, "none"),
        f"tokens is {card.tokens}, but method 'none' keeps all; set tokens to null": card.tokens is None
        or method != "none",
        "it has no important_ratio; add it": card.important_ratio is not None or method != "vispruner",
        f"{'; '.join(other)}. Score the answers again": not other,
    }
    for problem, passed in checks.items():
        if not passed:
            raise DataError(problem)
    server = path.with_name(SERVER)
    scored_by_server = path == server
    if server.is_file() and path != server:
        try:
            given = _object(read_json(server))
            of_server = Scorecard.of_document({"benchmark": card.benchmark, **given})
            for key in (*SETTING, *FACTS):
                if key in given and given[key] != getattr(card, key):
                    raise DataError(f"its {key} is {given[key]!r}, {getattr(card, key)!r} in {NAME}")
            if of_server.benchmark != card.benchmark:
                raise DataError(f"it is about {of_server.benchmark}, {NAME} about {card.benchmark}")
            if of_server.score is None:
                raise DataError("its score is null")
        except DataError as error:
            warnings.append(f"{server}: left out, {str(error).removeprefix(f'{server}: ')}")
        else:
            if card.score is not None and card.score != of_server.score:
                warnings.append(
                    f"{server}: its score {of_server.score:g} is used, not {card.score:g} of {NAME}"
                )
            interval = {
                "ci_low": of_server.ci_low,
                "ci_high": of_server.ci_high,
            }  # that of the local score is not its
            card, scored_by_server = card.replace(score=of_server.score, **interval), True
    return MeasuredResult(path, card, card.details.get("split") == "validation" and not scored_by_server)


def _object(document: Any) -> dict[str, Any]:
    """Return a JSON object. Raises DataError for other values."""
    if not isinstance(document, dict):
        raise DataError('not {"benchmark": NAME, "score": NUMBER}')
    return document


def _first_metadata(path: Path) -> dict[str, Any]:
    """Read the configuration of the first answer next to a score, for entries that the score lacks."""
    answers = path.with_name("answers.jsonl")
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        check_file(answers)  # reading a pipe may never end
        with answers.open("rb") as file:
            metadata = json.loads(file.readline())["metadata"]
        return {key: metadata[key] for key in (*SETTING, *FACTS, "visual_tokens") if key in metadata}
    return {}

"""Read every score.json that runs and sweeps left under some folders.

A score.json without `method`, `tokens` or `model` (the line that `llava.eval.score` prints, saved by hand) is
left out with a warning that names what to add. Where only a server scores (VQAv2 test-dev, VizWiz test), put
`server.json`, {"benchmark": NAME, "score": NUMBER}, next to score.json or the answers. Does not score.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import benchmark_name, get_benchmark, list_benchmarks
from llava.eval.benchmarks.base import DataError
from llava.eval.metrics.scorecard import NAME, Scorecard

SERVER = "server.json"
_SETTING = ("model", "method", "tokens", "important_ratio")


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
        return self.card.answered is None or not sizes or self.card.answered in sizes

    @property
    def fixed(self) -> bool:
        """True if the score does not follow the official rule."""
        return str(self.card.details.get("rule", "")).startswith("fixed")

    @property
    def kv_elements(self) -> int | None:
        """Elements of the keys and values of one token in all layers, where the run recorded the shapes."""
        try:
            layers, width, _, kv_width = self.card.prefill["shape"]  # type: ignore[index]
            return 2 * layers * (kv_width or width)
        except (KeyError, TypeError, ValueError):
            return None


def read_results(folders: Iterable[Path]) -> tuple[list[MeasuredResult], list[str]]:
    """Read all results; of several of one setting the full set is used, then the newest.

    Returns:
        The results, and warnings about files that were left out.
    Raises:
        DataError: A folder does not exist.
    """
    paths: list[Path] = []
    for folder in folders:
        if not folder.exists():
            raise DataError(f"{folder}: no such folder. Pass the --output of runs and sweeps to --results.")
        paths += sorted(folder.rglob(NAME)) if folder.is_dir() else [folder]
        paths += [path for path in sorted(folder.rglob(SERVER)) if not path.with_name(NAME).exists()]
    warnings: list[str] = []
    found: dict[Any, MeasuredResult] = {}
    for path in {path.resolve(): path for path in paths}.values():  # a file once, however it was named
        try:
            result = _read(path, warnings)
        except DataError as error:
            warnings.append(f"{path}: left out, {error}")
            continue
        key = (result.card.benchmark, *(getattr(result.card, name) for name in _SETTING))
        better, worse = sorted([found.get(key, result), result], key=_rank, reverse=True)
        found[key] = better
        if better.card.score != worse.card.score:
            why = "newer" if worse.full_set == better.full_set else "complete"
            warnings.append(
                f"{worse.path}: left out ({_shown(worse)}), because {better.path} has the same setting "
                f"({_shown(better)}) and is {why}"
            )
    return list(found.values()), warnings


def _rank(result: MeasuredResult) -> tuple[bool, bool, float]:
    return result.card.score is not None, result.full_set, result.path.stat().st_mtime


def _shown(result: MeasuredResult) -> str:
    return "no score" if result.card.score is None else f"{result.card.score:.2f}"


def _read(path: Path, warnings: list[str]) -> MeasuredResult:
    """Read one file. Raises DataError with the reason why it cannot be used."""
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"not a JSON document ({error})") from error
    if not isinstance(document, dict) or not {"benchmark", "score"} <= document.keys():
        raise DataError("not a score of a benchmark; it needs the keys 'benchmark' and 'score'")
    name = benchmark_name(str(document["benchmark"]))
    score, document = document["score"], {**_first_metadata(path), **document}
    missing = [key for key in ("model", "method", "tokens") if key not in document]
    tokens = document.get("tokens")
    checks = {
        f"unknown benchmark {document['benchmark']!r}": name in list_benchmarks(),
        f"its score is {score!r}, not a number": score is None or is_number(score),
        f"it has no {' and no '.join(missing)}; add {', '.join(map(repr, missing))} to it "
        "(tokens: null for all of them)": not missing,
        f"its tokens are {tokens!r}, neither a number nor null": tokens is None or is_number(tokens),
    }
    for problem, passed in checks.items():
        if not passed:
            raise DataError(problem)
    card = Scorecard.of_document(document)
    server = path.with_name(SERVER)
    if server.is_file():
        given = None
        with suppress(ValueError, KeyError, TypeError):
            given = json.loads(server.read_bytes())["score"]
        if is_number(given):
            score = given
        else:
            warnings.append(f'{server}: left out, not {{"score": NUMBER}}')
    card = card.replace(
        benchmark=name,
        model=str(card.model),
        method=str(card.method),
        details=card.details if isinstance(card.details, dict) else {},
        answered=card.answered if is_number(card.answered) else None,
        score=score,
    )
    return MeasuredResult(path, card, card.details.get("split") == "validation" and not server.is_file())


def _first_metadata(path: Path) -> dict[str, Any]:
    """Read the setting from the first answer next to a score; earlier sweeps did not repeat it there."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with path.with_name("answers.jsonl").open("rb") as file:
            metadata = json.loads(file.readline())["metadata"]
        return {key: metadata[key] for key in _SETTING if key in metadata}
    return {}


def is_number(value: Any) -> bool:
    """True for numbers, which true and false of JSON are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)

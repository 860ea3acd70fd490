"""Read every score.json that runs and sweeps left under some folders.

A score.json without `method`, `tokens` or `model` (the line that `llava.eval.score` prints, saved by hand) is
left out with a warning that names what to add. Where only a server scores (VQAv2 test-dev, VizWiz test), put
`server.json`, {"benchmark": NAME, "score": NUMBER}, next to score.json or the answers. Does not score.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import benchmark_name, get_benchmark, list_benchmarks
from llava.eval.benchmarks.base import DataError
from llava.eval.metrics.scorecard import NAME, Scorecard

SERVER = "server.json"


@dataclass(frozen=True)
class MeasuredResult:
    """One score.json. `card.score` is the server's where there is a server.json."""

    path: Path
    card: Scorecard
    validation: bool = False  # of a validation set, where papers print the server's score of the test set

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies a result; of several, one is used."""
        card = self.card
        return card.model, card.benchmark, card.method, card.tokens, card.important_ratio

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
        if folder.is_dir():
            paths += sorted(folder.rglob(NAME))
            paths += [path for path in sorted(folder.rglob(SERVER)) if not path.with_name(NAME).exists()]
        elif folder.is_file():
            paths.append(folder)
        else:
            raise DataError(f"{folder}: no such folder. Pass the --output of runs and sweeps to --results.")
    warnings: list[str] = []
    found: dict[Any, MeasuredResult] = {}
    for path in {path.resolve(): path for path in paths}.values():  # a file once, however it was named
        try:
            result = _read(path, warnings)
        except DataError as error:
            warnings.append(f"{path}: left out, {error}")
            continue
        other = found.setdefault(result.key, result)
        if other is result:
            continue
        better, worse = sorted([other, result], key=_rank, reverse=True)
        found[result.key] = better
        if better.card.score != worse.card.score:
            why = "newer" if worse.full_set == better.full_set else "complete"
            warnings.append(
                f"{worse.path}: left out ({_shown(worse)}), because {better.path} has the same setting "
                f"({_shown(better)}) and is {why}"
            )
    return list(found.values()), warnings


def count_models(results: Sequence[MeasuredResult]) -> Counter[str]:
    """Count the results of every model."""
    return Counter(str(result.card.model) for result in results)


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
    if name not in list_benchmarks():
        raise DataError(f"unknown benchmark {document['benchmark']!r}")
    if not _is_number(document["score"], True):
        raise DataError(f"its score is {document['score']!r}, not a number")
    document = {**_first_metadata(path), **document}
    missing = [key for key in ("model", "method", "tokens") if key not in document]
    if missing:
        raise DataError(
            f"it has no {' and no '.join(missing)}; add {', '.join(map(repr, missing))} to it "
            "(tokens: null for all of them)"
        )
    if not _is_number(document["tokens"], True):
        raise DataError(f"its tokens are {document['tokens']!r}, neither a number nor null")
    card = Scorecard.of_document(document)
    card = card.replace(
        benchmark=name,
        model=str(card.model),
        method=str(card.method),
        details=card.details if isinstance(card.details, dict) else {},
        answered=card.answered if _is_number(card.answered) else None,
        score=_server(path, card.score, warnings),
    )
    validation = card.details.get("split") == "validation" and not path.with_name(SERVER).is_file()
    return MeasuredResult(path, card, validation)


def _first_metadata(path: Path) -> dict[str, Any]:
    """Read the setting from the first answer next to a score; earlier sweeps did not repeat it there."""
    try:
        with path.with_name("answers.jsonl").open("rb") as file:
            metadata = json.loads(file.readline())["metadata"]
        return {
            key: metadata[key] for key in ("model", "method", "tokens", "important_ratio") if key in metadata
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _server(path: Path, score: float | None, warnings: list[str]) -> float | None:
    """Return the server's score where there is one, else this one."""
    server = path.with_name(SERVER)
    if not server.is_file():
        return score
    try:
        given = json.loads(server.read_bytes())["score"]
    except (ValueError, KeyError, TypeError):
        given = None
    if _is_number(given):
        return given
    warnings.append(f'{server}: left out, not {{"score": NUMBER}}')
    return score


def _is_number(value: Any, null: bool = False) -> bool:
    return (null and value is None) or (isinstance(value, int | float) and not isinstance(value, bool))

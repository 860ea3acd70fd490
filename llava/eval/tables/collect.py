"""What runs and sweeps have left: every score.json under some folders, as rows for the tables.

A score.json without `method`, `tokens` or `model` (the line that `llava.eval.score` prints, kept by hand) is
left out with a warning that says what to add. Where only a server scores (VQAv2 test-dev, VizWiz test), put
`server.json`, {"benchmark": NAME, "score": NUMBER}, beside score.json or the answers. Does
not score and does not check what a server said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import benchmark_name, get_benchmark, list_benchmarks
from llava.eval.benchmarks.base import DataError

SCORE = "score.json"
SERVER = "server.json"


@dataclass(frozen=True)
class Result:
    """One score.json."""

    path: Path
    benchmark: str
    model: str
    method: str
    budget: int | None  # as given to the pruner (per crop); None: all tokens
    ratio: float | None
    score: float | None
    details: dict[str, Any]
    low: float | None = None
    high: float | None = None
    visual_tokens: float | None = None  # that entered the language model, mean
    gflops: float | None = None  # prefill of the language model
    kv_elements: int | None = None  # keys and values of one token, where the run recorded the shapes
    answered: int | None = None
    whole: bool = True  # the full set, as far as the number of answers tells
    fixed: bool = False  # not by the official rule
    validation: bool = False  # of a validation set; the server's number of the test set is another

    @property
    def key(self) -> tuple[str, str, str, int | None, float | None]:
        """What may be there once."""
        return self.model, self.benchmark, self.method, self.budget, self.ratio


def read_results(folders: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """(results, warnings); of several of one cell the full set wins, then the newest.

    Raises DataError for a folder that is not there.
    """
    paths: dict[Path, None] = {}
    for folder in folders:
        if folder.is_file():
            paths[folder] = None
        elif folder.is_dir():
            paths.update(dict.fromkeys(sorted(folder.rglob(SCORE))))
            paths.update(
                dict.fromkeys(
                    path for path in sorted(folder.rglob(SERVER)) if not path.with_name(SCORE).exists()
                )
            )
        else:
            raise DataError(f"{folder}: no such folder; --results takes the --output of runs and sweeps")
    warnings: list[str] = []
    found: dict[Any, Result] = {}
    for path in {path.resolve(): path for path in paths}.values():  # a file once, however it was named
        result = _read(path, warnings)
        if result is None:
            continue
        other = found.get(result.key)
        if other is None:
            found[result.key] = result
            continue
        better, worse = sorted([other, result], key=_rank, reverse=True)
        found[result.key] = better
        if better.score != worse.score:
            why = "newer" if worse.whole == better.whole else "complete"
            warnings.append(
                f"{worse.path}: left out ({_number(worse.score)}), {better.path} is about the "
                f"same cell ({_number(better.score)}) and {why}"
            )
    return list(found.values()), warnings


def _rank(result: Result) -> tuple[bool, bool, float]:
    return result.score is not None, result.whole, result.path.stat().st_mtime


def _number(score: float | None) -> str:
    return "no score" if score is None else f"{score:.2f}"


def _read(path: Path, warnings: list[str]) -> Result | None:
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        warnings.append(f"{path}: left out, not a JSON document ({error})")
        return None
    if not isinstance(document, dict) or "benchmark" not in document or "score" not in document:
        warnings.append(f"{path}: left out, it is no score of a benchmark (keys 'benchmark' and 'score')")
        return None
    name = benchmark_name(str(document["benchmark"]))
    if name not in list_benchmarks():
        warnings.append(f"{path}: left out, unknown benchmark {document['benchmark']!r}")
        return None
    if not _is_number(document["score"], True):
        warnings.append(f"{path}: left out, its score is {document['score']!r}, not a number")
        return None
    document = {**_first_metadata(path), **document}
    lacking = [key for key in ("model", "method", "tokens") if key not in document]
    if lacking:
        warnings.append(
            f"{path}: left out, it does not say {' and '.join(lacking)}; add "
            f"{', '.join(map(repr, lacking))} to it (tokens: null for all of them)"
        )
        return None
    if not _is_number(document["tokens"], True):
        warnings.append(f"{path}: left out, its tokens are {document['tokens']!r}, neither a number nor null")
        return None
    answered = document.get("answered", document.get("answers"))
    answered = answered if _is_number(answered) else None
    sizes = get_benchmark(name).sizes
    details = document.get("details") if isinstance(document.get("details"), dict) else {}
    return Result(
        path,
        name,
        str(document["model"]),
        str(document["method"]),
        document["tokens"],
        document.get("important_ratio"),
        _server(path, document["score"], warnings),
        details,
        document.get("low"),
        document.get("high"),
        document.get("visual_tokens"),
        document.get("llm_gflops"),
        _kv_elements(document),
        answered,
        answered is None or not sizes or answered in sizes,
        str(details.get("rule", "")).startswith("fixed"),
        details.get("split") == "validation" and not path.with_name(SERVER).is_file(),
    )


def _kv_elements(document: dict[str, Any]) -> int | None:
    try:
        layers, width, _, kv_width = document["gflops"]["shape"]
        return 2 * layers * (kv_width or width)
    except (KeyError, TypeError, ValueError):
        return None


def _first_metadata(path: Path) -> dict[str, Any]:
    """What the first answer beside a score says about its making; earlier sweeps did not repeat it."""
    try:
        with path.with_name("answers.jsonl").open("rb") as file:
            metadata = json.loads(file.readline())["metadata"]
        return {
            key: metadata[key] for key in ("model", "method", "tokens", "important_ratio") if key in metadata
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _server(path: Path, score: float | None, warnings: list[str]) -> float | None:
    server = path.with_name(SERVER)
    if not server.is_file():
        return score
    try:
        said = json.loads(server.read_bytes())["score"]
    except (ValueError, KeyError, TypeError):
        said = None
    if not _is_number(said):
        warnings.append(f'{server}: not {{"score": NUMBER}}; left out')
        return score
    return said


def _is_number(value: Any, null: bool = False) -> bool:
    return (null and value is None) or (isinstance(value, int | float) and not isinstance(value, bool))


def models_of(results: Sequence[Result]) -> dict[str, int]:
    """How many results there are of every model."""
    counted: dict[str, int] = {}
    for result in results:
        counted[result.model] = counted.get(result.model, 0) + 1
    return counted

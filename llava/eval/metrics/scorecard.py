"""The scorecard: one schema, one writer and one reader of score.json.

    card = Scorecard.of(benchmark.score(folder, rows), rows)
    card.write(folder)
    card = Scorecard.read(folder / "score.json")

Every command that scores answers writes this document, and every command that reads one reads it here: each
entry is validated, so that nobody else meets a text, NaN or a list in place of a number. Earlier versions
wrote `answers` as a path in one command and as a count in another; `read` accepts both. The writer uses
`answered` (a count) and `answers_file` (a path), and repeats renamed numbers under their old names for
scripts that read them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import (
    DataError,
    PerImageCounts,
    Score,
    benchmark_name,
    get_benchmark,
    list_benchmarks,
)
from llava.eval.benchmarks.files import check_file
from llava.eval.store.atomic import write_atomically

NAME = "score.json"
_OLD_NAMES = {
    "ci_low": "low",
    "ci_high": "high",
    "setting": "cell",
    "generated": "asked",
    "prefill": "gflops",
}
SETTING = ("model", "method", "tokens", "important_ratio", "keep")
# What else decides the answers of a run. Scores with different values are not of one table.
FACTS = (
    *("preset", "weights", "dtype", "tower_dtype", "conv_mode", "temperature", "num_beams"),
    *("server", "load_bits", "clip_budget"),
)
_RECORDED = (*SETTING, *FACTS, "anyres", "config")  # keys of the answers' metadata
# Validation by entry; None is allowed everywhere. Other numbers are finite and not negative.
_TEXTS = {"model", "method", "setting", "answers_file", "config", "version", *FACTS, "anyres"}
_TEXTS -= {"temperature", "num_beams", "load_bits"}
_COUNTS = {"tokens", "answered", "empty", "unreadable", "questions", "generated", "limit", "num_beams"}
_COUNTS |= {"load_bits"}
_NUMBERS = {"score", "ci_low", "ci_high", "important_ratio", "visual_tokens", "llm_gflops", "temperature"}
_NUMBERS |= {"seconds", "questions_per_second", "keep"}
_CONTAINERS = {"details": dict, "prefill": dict, "speed": dict, "failures": list}
_MOST_POINTS = 2800  # MME: 14 tasks of 200
_MOST_OF_DETAILS = {"average_score": 5}  # a judge's grade, which tables show


@dataclass(frozen=True)
class Scorecard:
    """The content of score.json. None means unknown, except where noted; unknown entries are not written.

    Attributes:
        benchmark: Registered name of the benchmark.
        score: The reported number in the benchmark's unit; None where a server or a judge gives it.
        details: Breakdown by the benchmark, with its list of `warnings`.
        model: LLaVA's name of the checkpoint.
        method: Pruning method.
        tokens: Token budget per crop; None if all tokens are kept.
        important_ratio: r of methods that have one.
        keep: Share of each image's tokens that is kept, where there is no number; then `tokens` is None.
        setting: Name of the pruning setting, e.g. "vispruner-r0.5-64".
        ci_low, ci_high: 95% bootstrap interval over images.
        visual_tokens: Mean number of visual tokens that enter a layer of the language model.
        llm_gflops: Prefill of the language model for one question, 2 per multiply-accumulate.
        prefill: Shape of the language model and mean text tokens, from which `llm_gflops` follows; for a
            method inside the language model also visual tokens per layer.
        empty, unreadable: Numbers of answers without text, and of answers that the official rule does not
            read as a person would.
        answered, questions: Number of answers, and of questions in the run.
        answers_file: The answer file that was scored.
        generated, seconds: Questions answered by the last start of the command, and its duration.
        questions_per_second: Of the start that generated answers last.
        speed: Durations and rates of one setting of a sweep.
        failures: One line for every question without an answer.
        config: Hash of the configuration that made the answers.
        preset, weights, dtype, tower_dtype, conv_mode, anyres, temperature, num_beams, server, load_bits,
        clip_budget: That configuration.
        limit: N of a run that asked only the first N questions.
        version: Version of this package that wrote the file.
        extra: Further entries, e.g. `submission` or `judge`.
    """

    benchmark: str
    score: float | None
    details: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    method: str | None = None
    tokens: int | None = None
    important_ratio: float | None = None
    keep: float | None = None
    setting: str | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    visual_tokens: float | None = None
    llm_gflops: float | None = None
    prefill: dict[str, Any] | None = None
    answered: int | None = None
    empty: int | None = None
    unreadable: int | None = None
    questions: int | None = None
    answers_file: str | None = None
    generated: int | None = None
    seconds: float | None = None
    questions_per_second: float | None = None
    speed: dict[str, Any] | None = None
    failures: list[str] | None = None
    config: str | None = None
    preset: str | None = None
    weights: str | None = None
    dtype: str | None = None
    tower_dtype: str | None = None
    conv_mode: str | None = None
    anyres: str | None = None
    temperature: float | None = None
    num_beams: int | None = None
    server: str | None = None
    load_bits: int | None = None
    clip_budget: str | None = None
    limit: int | None = None
    version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, score: Score, rows: Sequence[dict[str, Any]], **known: Any) -> Scorecard:
        """Build the scorecard of scored answers.

        Args:
            score: Result of `Benchmark.score`.
            rows: The answers, at least one. Their `metadata` names the setting, if they have any; an entry in
                which they differ is left out with a warning.
            known: Further fields.
        """
        import llava

        metadata = [found for row in rows if isinstance(found := row.get("metadata"), dict)]
        made_by, warnings = {}, list(score.warnings)
        for key in _RECORDED:
            values = {repr(one[key]): one[key] for one in metadata if key in one}
            if len(values) == 1 or (values and key == "config"):  # a version may hash more than another
                made_by[key] = next(iter(values.values()))
            elif values:
                listed = ", ".join(list(values)[:3])
                warnings.append(
                    f"the answers were made with different {key} ({listed}): several runs in one file"
                )
        counts = [count for one in metadata if is_number(count := one.get("visual_tokens"))]
        return cls(
            score.benchmark,
            score.score,
            {**score.details, "warnings": warnings},
            **{
                **made_by,
                "visual_tokens": sum(counts) / len(counts) if counts else None,
                "answered": len(rows),
                "empty": score.empty,
                "unreadable": score.unreadable,
                "version": llava.__version__,
                **known,
            },
        )

    def document(self) -> dict[str, Any]:
        """Return the JSON document, with renamed numbers under their old names as well."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "extra"}
        always = {"benchmark", "score", "details"} | ({"tokens"} if self.method is not None else set())
        found = {key: value for key, value in found.items() if value is not None or key in always}
        old = {old: found[new] for new, old in _OLD_NAMES.items() if new in found}
        return {**found, **old, **self.extra}

    def write(self, folder: Path) -> None:
        """Replace score.json in `folder`. Raises OSError."""
        write_atomically(folder / NAME, json.dumps(self.document(), indent=1) + "\n")

    def replace(self, **changes: Any) -> Scorecard:
        """Return a copy with other values."""
        return replace(self, **changes)

    @classmethod
    def read(cls, path: Path) -> Scorecard:
        """Read a score.json of this or an earlier version.

        Raises:
            DataError: The file is missing, not JSON, or has no `benchmark` and `score`.
        """
        document = read_json(path)
        try:
            return cls.of_document(document)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @classmethod
    def of_document(cls, document: Any) -> Scorecard:
        """Validate a document with `benchmark` and `score`, under new or old names, and build its scorecard.

        Raises:
            DataError: It is not a scorecard; the message names the key, without the file.
        """
        if not isinstance(document, dict) or not {"benchmark", "score"} <= document.keys():
            raise DataError("not a score of a benchmark; it needs the keys 'benchmark' and 'score'")
        rest = dict(document)
        for new, old in _OLD_NAMES.items():
            value = rest.pop(old, None)
            rest.setdefault(new, value)
        answers = rest.pop("answers", None)
        if isinstance(answers, str):
            rest.setdefault("answers_file", answers)
        elif answers is not None:
            rest.setdefault("answered", answers)
        names = {one.name for one in fields(cls)} - {"extra"}
        known = {key: rest.pop(key) for key in list(rest) if key in names}
        return cls(**_validated(known), extra=rest)


def is_number(value: Any) -> bool:
    """True for finite numbers, which true, false and NaN of JSON are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def read_json(path: Path) -> Any:
    """Read a small JSON file. Raises DataError that names it."""
    check_file(path)
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON document ({error}). Correct it, or write it again.") from error


def _validated(known: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a scorecard with the registered benchmark name. Raises DataError."""
    given = known["benchmark"]
    name = benchmark_name(given) if isinstance(given, str) else None
    if name not in list_benchmarks():
        raise DataError(f"unknown benchmark {given!r:.80}; choose from {', '.join(list_benchmarks())}")
    most = {
        "important_ratio": 1,
        "keep": 1,
        "score": 100 if get_benchmark(name).unit == "%" else _MOST_POINTS,
    }
    most |= {"ci_low": most["score"], "ci_high": most["score"]}
    found = {key: value for key, value in known.items() if value is not None or key == "score"}
    for key in found.keys() & _TEXTS:
        if not isinstance(found[key], str):
            raise _invalid(key, found[key], "a text")
    for key in found.keys() & _COUNTS:
        if not (is_number(found[key]) and found[key] >= 0 and found[key] == int(found[key])):
            raise _invalid(key, found[key], "a whole number, 0 or more, or null")
        found[key] = int(found[key])
    _check_numbers({key: found[key] for key in found.keys() & _NUMBERS}, most)
    for key, kind in _CONTAINERS.items():
        if not isinstance(found.get(key, kind()), kind):
            raise _invalid(key, found[key], "an object" if kind is dict else "a list")
    details, prefill = found.get("details", {}), found.get("prefill", {})
    _check_numbers({key: details.get(key) for key in _MOST_OF_DETAILS}, _MOST_OF_DETAILS, "details.")
    _check_numbers(found.get("speed", {}), {}, "speed.")
    if prefill:
        shape = prefill.get("shape")
        sizes = shape if isinstance(shape, list) and len(shape) in (3, 4) else [None]
        if None in sizes[:3] or not all(one is None or (is_number(one) and one > 0) for one in sizes):
            raise _invalid("prefill.shape", shape, "3 or 4 sizes")
        _check_numbers({"text_tokens": prefill.get("text_tokens", "missing")}, {}, "prefill.")
        layers = prefill.get("visual_per_layer", [])
        if not isinstance(layers, list) or not all(is_number(one) and one >= 0 for one in layers):
            raise _invalid("prefill.visual_per_layer", layers, "a list of numbers from 0 up")
        if layers and len(layers) != sizes[0]:
            raise _invalid("prefill.visual_per_layer", layers, f"one number for each of {sizes[0]} layers")
    return {**found, "benchmark": name}


def _check_numbers(values: Mapping[str, Any], most: Mapping[str, float], prefix: str = "") -> None:
    """Raise DataError for the first value that is not null or a number from 0 to its highest value."""
    for key, value in sorted(values.items()):
        limit = most.get(key, math.inf)
        if value is not None and not (is_number(value) and 0 <= value <= limit):
            to = f" to {limit}" if limit < math.inf else " up"
            raise _invalid(prefix + key, value, f"a number from 0{to}, or null")


def _invalid(key: str, value: Any, expected: str) -> DataError:
    return DataError(
        f"{key} is {value!r:.80}, expected {expected}. Score the answers again, or correct the file."
    )


@dataclass(frozen=True)
class ScoredSetting:
    """One setting of one benchmark: its scorecard, and the counts to resample; None without ground truth."""

    name: str
    card: Scorecard
    counts: PerImageCounts | None = None

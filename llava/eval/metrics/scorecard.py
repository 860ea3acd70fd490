"""The scorecard: one schema, one writer and one reader of score.json.

    card = Scorecard.of(benchmark.score(folder, rows), rows)
    card.write(folder)
    card = Scorecard.read(folder / "score.json")

Every command that scores answers writes this document. Earlier versions wrote `answers` as a path in one
command and as a count in another; `read` accepts both. The writer uses `answered` (a count) and
`answers_file` (a path), and repeats renamed numbers under their old names for scripts that read them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import DataError, PerImageCounts, Score
from llava.eval.store.atomic import write_atomically

NAME = "score.json"
_OLD_NAMES = {
    "ci_low": "low",
    "ci_high": "high",
    "setting": "cell",
    "generated": "asked",
    "prefill": "gflops",
}


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
        preset: Name of the settings of dtypes and pixels, see `llava.model.settings.Preset`.
        setting: Name of the pruning setting, e.g. "vispruner-r0.5-64".
        ci_low, ci_high: 95% bootstrap interval over images.
        visual_tokens: Mean number of visual tokens fed to the language model.
        llm_gflops: Prefill of the language model for one question, 2 per multiply-accumulate.
        prefill: Shape of the language model and mean text tokens, from which `llm_gflops` follows.
        answered, questions: Number of answers, and of questions in the run.
        answers_file: The answer file that was scored.
        generated, seconds: Questions answered by the last start of the command, and its duration.
        questions_per_second: Of the start that generated answers last.
        speed: Durations and rates of one setting of a sweep.
        failures: One line for every question without an answer.
        config: Hash of the configuration that made the answers.
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
    preset: str | None = None
    setting: str | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    visual_tokens: float | None = None
    llm_gflops: float | None = None
    prefill: dict[str, Any] | None = None
    answered: int | None = None
    questions: int | None = None
    answers_file: str | None = None
    generated: int | None = None
    seconds: float | None = None
    questions_per_second: float | None = None
    speed: dict[str, Any] | None = None
    failures: list[str] | None = None
    config: str | None = None
    version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, score: Score, rows: Sequence[dict[str, Any]], **known: Any) -> Scorecard:
        """Build the scorecard of scored answers.

        Args:
            score: Result of `Benchmark.score`.
            rows: The answers, at least one; the first one's `metadata` names the setting, if it has any.
            known: Further fields.
        """
        import llava

        metadata = rows[0].get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        made_by = {
            key: metadata.get(key)
            for key in ("model", "method", "tokens", "important_ratio", "preset", "config")
        }
        counts = [row["metadata"]["visual_tokens"] for row in rows] if "visual_tokens" in metadata else []
        return cls(
            score.benchmark,
            score.score,
            {**score.details, "warnings": score.warnings},
            **{
                **made_by,
                "visual_tokens": sum(counts) / len(counts) if counts else None,
                "answered": len(rows),
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
        try:
            document = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise DataError(f"{path}: not a JSON document ({error})") from error
        if not isinstance(document, dict) or not {"benchmark", "score"} <= document.keys():
            raise DataError(f"{path}: not a score of a benchmark; it needs the keys 'benchmark' and 'score'")
        return cls.of_document(document)

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> Scorecard:
        """Build a scorecard from a document that has `benchmark` and `score`, under new or old names."""
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
        return cls(**known, extra=rest)


@dataclass(frozen=True)
class ScoredSetting:
    """One setting of one benchmark: its scorecard, and the counts to resample; None without ground truth."""

    name: str
    card: Scorecard
    counts: PerImageCounts | None = None

"""The paper's numbers (`published.json`, with their source) and its rule for Acc. and Rel.

    from llava.eval.tables.published import load_published, accuracy, relative
    table = load_published()["llava-1.5-7b"]

Scores are in percent, MME in perception points (at most 2,000). Token counts are totals fed to the language
model. The numbers were read from the printed tables and are rounded as printed. FLOPs are not printed for
most rows; `prefill_flops` computes them from the shapes of the models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

PUBLISHED = Path(__file__).with_name("published.json")
TEXT_TOKENS = 80  # of a prompt; the paper's efficiency table follows from the shapes with this number
RATIO = 0.5  # share of important tokens in all published rows of VisPruner
_MME_TASK_POINTS = 200
_FASTV_LAYERS = 2  # that process all tokens


@dataclass(frozen=True)
class ColumnSpec:
    """A column: its header, and the source of its number, a score.json of `benchmark`."""

    title: str
    benchmark: str | None = None  # None: derived from other columns, or not a benchmark's
    detail: str | None = None  # a key of `details` instead of the score
    digits: int = 1


_VIDEO = (("tgif", "TGIF"), ("msvd", "MSVD"), ("msrvtt", "MSRVTT"))
COLUMNS = {
    "vqav2": ColumnSpec("VQAv2", "vqav2"),
    "gqa": ColumnSpec("GQA", "gqa"),
    "vizwiz": ColumnSpec("VizWiz", "vizwiz"),
    "sqa_img": ColumnSpec("SQA-IMG", "scienceqa"),
    "textvqa": ColumnSpec("TextVQA", "textvqa"),
    "pope": ColumnSpec("POPE", "pope"),
    "mme": ColumnSpec("MME", "mme"),
    "mmbench": ColumnSpec("MMB", "mmbench"),
    "mmbench_cn": ColumnSpec("MMB-CN", "mmbench_cn"),
    "mmvet": ColumnSpec("MM-Vet", "mmvet"),
    "acc": ColumnSpec("Acc."),
    "rel": ColumnSpec("Rel."),
    **{f"{name}_acc": ColumnSpec(f"{title} Acc.", name) for name, title in _VIDEO},
    **{f"{name}_score": ColumnSpec(f"{title} score", name, "average_score", 2) for name, title in _VIDEO},
    "avg_acc": ColumnSpec("Avg. Acc."),
    "avg_score": ColumnSpec("Avg. score", digits=2),
    "flops_T": ColumnSpec("FLOPs (T)"),
    "kv_cache_MB": ColumnSpec("KV cache (MB)", digits=0),
    "gpu_memory_GB": ColumnSpec("GPU memory (GB)"),
    "cuda_time_ms": ColumnSpec("CUDA time (ms)", digits=0),
}
DERIVED = ("acc", "rel", "avg_acc", "avg_score")


@dataclass(frozen=True)
class PublishedModel:
    """A model of a table. language: layers, width, MLP width. checkpoints: names of its weights."""

    name: str
    title: str
    full_tokens: int
    checkpoints: tuple[str, ...]
    language: tuple[int, int, int]


@dataclass(frozen=True)
class PublishedRow:
    """One printed line; `tokens` in total; values by column."""

    model: str
    method: str
    tokens: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class PublishedTable:
    """One table of the paper. tokens_per_budget: total tokens for every token of a budget (5 crops: 5)."""

    name: str
    title: str
    source: str
    tokens_per_budget: int
    models: Mapping[str, PublishedModel]
    columns: tuple[str, ...]
    rows: tuple[PublishedRow, ...]

    @property
    def scored(self) -> list[str]:
        """Columns that are a benchmark's number."""
        return [name for name in self.columns if COLUMNS[name].benchmark]

    @property
    def mean(self) -> str | None:
        """The column with the mean over the benchmarks, for the plots."""
        return next((name for name in ("acc", "avg_acc") if name in self.columns), None)


def load_published() -> dict[str, PublishedTable]:
    """Return all published tables by name. The file is part of the package, and a test validates it."""
    document = json.loads(PUBLISHED.read_bytes())
    tables = {}
    for name, raw in document["tables"].items():
        models = {key: PublishedModel(key, **one) for key, one in raw["models"].items()}
        columns = tuple(raw["columns"])
        rows = [
            PublishedRow(**{**row, "values": dict(zip(columns, row["values"], strict=True))})
            for row in raw["rows"]
        ]
        tables[name] = PublishedTable(
            name, raw["title"], document["source"], raw["tokens_per_budget"], models, columns, tuple(rows)
        )
    return tables


def accuracy(scores: Mapping[str, float | np.ndarray], mme_tasks: int = 10) -> float | np.ndarray:
    """Compute Acc.: the mean of the scores, with MME in percent of its highest score.

    Args:
        scores: Score by benchmark, or an array of bootstrap draws for every benchmark.
        mme_tasks: Number of tasks with 200 points each; 10 in the paper (MME / 2000 x 100).
    Raises:
        ValueError: There are no scores.
    """
    if not scores:
        raise ValueError("no scores to take the mean of")
    percent = [
        value * (100 / (_MME_TASK_POINTS * mme_tasks)) if name == "mme" else value
        for name, value in scores.items()
    ]
    return sum(percent) / len(percent)


def relative(
    scores: Mapping[str, float | np.ndarray], full: Mapping[str, float | np.ndarray]
) -> float | np.ndarray:
    """Compute Rel.: 100 x mean of score / score with all tokens (MME's scale cancels in each ratio).

    Args:
        scores: Score by benchmark, or an array of bootstrap draws for every benchmark.
        full: The same with all tokens.
    Raises:
        ValueError: The benchmarks differ, or a score with all tokens is 0.
    """
    if not scores or set(scores) != set(full):
        raise ValueError("Rel. needs the same benchmarks on both sides, at least one")
    if not all(np.all(value) for value in full.values()):
        raise ValueError("Rel. is not defined where the score with all tokens is 0")
    return 100 * sum(value / full[name] for name, value in scores.items()) / len(scores)


def derived_columns(
    columns: Sequence[str], values: Mapping[str, float], full: Mapping[str, float] | None
) -> dict[str, float]:
    """Compute the derived columns among `columns` that follow from the scores.

    Args:
        columns: Columns of the table; a mean needs a score in every column of a benchmark.
        values: Scores by column.
        full: Scores of the same model with all tokens, if known.
    """
    found: dict[str, float] = {}
    for name in (name for name in columns if name in DERIVED):
        kind = name.removeprefix("avg") if name in ("avg_acc", "avg_score") else ""
        parts = [part for part in columns if COLUMNS[part].benchmark and part.endswith(kind)]
        if not parts or any(part not in values for part in parts):
            continue
        own = {part: values[part] for part in parts}
        if name != "rel":
            found[name] = accuracy(own)
        elif full and all(full.get(part) for part in parts):
            found[name] = relative(own, {part: full[part] for part in parts})
    return found


def restrict(table: PublishedTable, columns: Sequence[str]) -> PublishedTable:
    """Return the table with some of its benchmarks only, and its means over these.

    Raises:
        ValueError: The table has no such benchmark.
    """
    unknown = [name for name in columns if name not in table.scored]
    if unknown:
        known = ", ".join(table.scored) or "none in this table"
        raise ValueError(f"table {table.name} has no column {unknown[0]!r}; choose from {known}")
    kept = tuple(name for name in table.columns if name in columns or not COLUMNS[name].benchmark)
    full = {row.model: row.values for row in table.rows if row.method == "none"}
    rows = []
    for row in table.rows:
        values = {name: row.values[name] for name in kept if name in columns}
        rows.append(replace(row, values=values | derived_columns(kept, row.values, full.get(row.model))))
    source = f"{table.source} (means recomputed from its rows, over these columns)"
    return replace(table, source=source, columns=kept, rows=tuple(rows))


def prefill_flops(method: str, tokens: float, model: PublishedModel) -> float | None:
    """Compute FLOPs (2 per multiply-accumulate) of the language model's prefill; None if unknown.

    FastV's first two layers process all tokens. SparseVLM's budget is a mean over layers, and its tokens per
    layer are not published.
    """
    from llava.model.flops import LanguageShape, llm_prefill_macs

    if method == "sparsevlm":
        return None
    early = _FASTV_LAYERS if method == "fastv" else 0
    visual = [model.full_tokens] * early + [round(tokens)] * (model.language[0] - early)
    macs = llm_prefill_macs([count + TEXT_TOKENS for count in visual], LanguageShape(*model.language))
    return float(2 * macs)

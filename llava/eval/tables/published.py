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
_DOCUMENT = json.loads(PUBLISHED.read_bytes())
# Names as papers write them. The colors are those of Okabe and Ito, which most color-blind people can tell
# apart, and some darker ones.
METHODS = _DOCUMENT["methods"]
NOTES = _DOCUMENT["notes"]  # by the column, method, mark or chart that they explain
TEXT_TOKENS = 80  # of a prompt; the paper's efficiency table follows from the shapes with this number
RATIO = 0.5  # share of important tokens in all published rows of VisPruner
_MME_TASK_POINTS = 200
_FASTV_LAYERS = 2  # that process all tokens


@dataclass(frozen=True)
class ColumnSpec:
    """A column: its header, and the source of its number."""

    title: str
    benchmark: str | None = None  # its score.json has the number
    detail: str | None = None  # a key of `details` there instead of the score
    mean_of: str | None = None  # derived from the columns of benchmarks with this ending
    digits: int = 1


COLUMNS = {name: ColumnSpec(**spec) for name, spec in _DOCUMENT["columns"].items()}


@dataclass(frozen=True)
class PublishedModel:
    """A model of a table."""

    name: str
    title: str
    full_tokens: int
    checkpoints: tuple[str, ...]  # names of its weights
    language: tuple[int, int, int]  # layers, width, MLP width


@dataclass(frozen=True)
class PublishedRow:
    """One printed line."""

    model: str
    method: str
    tokens: int  # in total
    values: Mapping[str, float]  # by column


@dataclass(frozen=True)
class PublishedTable:
    """One table of the paper."""

    name: str
    title: str
    source: str
    tokens_per_budget: int  # total tokens for every token of a budget (5 crops: 5)
    models: Mapping[str, PublishedModel]
    columns: tuple[str, ...]
    rows: tuple[PublishedRow, ...]

    @property
    def scored(self) -> list[str]:
        """Columns that are a benchmark's number."""
        return [name for name in self.columns if COLUMNS[name].benchmark]


def load_published() -> dict[str, PublishedTable]:
    """Return all published tables by name. The file is part of the package, and a test validates it."""
    tables = {}
    for name, raw in _DOCUMENT["tables"].items():
        models = {key: PublishedModel(key, **one) for key, one in raw["models"].items()}
        rows = []
        for row in raw["rows"]:
            values = dict(zip(raw["columns"], row["values"], strict=True))
            rows.append(PublishedRow(row["model"], row["method"], row["tokens"], values))
        known = {"columns": tuple(raw["columns"]), "source": _DOCUMENT["source"]}
        tables[name] = PublishedTable(name, **{**raw, **known, "models": models, "rows": tuple(rows)})
    return tables


def accuracy(scores: Mapping[str, float | np.ndarray], mme_tasks: int = 10) -> float | np.ndarray:
    """Compute Acc.: the mean of the scores, with MME in percent of its highest score.

    Args:
        scores: Score by benchmark, or an array of bootstrap draws for every benchmark; at least one.
        mme_tasks: Number of tasks with 200 points each; 10 in the paper (MME / 2000 x 100).
    """
    if not scores:
        raise ValueError("no scores to take the mean of")
    if "mme" in scores:
        scores = {**scores, "mme": scores["mme"] * (100 / (_MME_TASK_POINTS * mme_tasks))}
    return sum(scores.values()) / len(scores)


def relative(
    scores: Mapping[str, float | np.ndarray], full: Mapping[str, float | np.ndarray]
) -> float | np.ndarray:
    """Compute Rel.: 100 x mean of score / score with all tokens (MME's scale cancels in each ratio).

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
    """Compute the derived columns that follow from the scores; Rel. needs `full`, those with all tokens."""
    found: dict[str, float] = {}
    for name in (name for name in columns if COLUMNS[name].mean_of is not None):
        ending = COLUMNS[name].mean_of
        parts = [part for part in columns if COLUMNS[part].benchmark and part.endswith(ending)]
        if parts and all(part in values for part in parts):
            own = {part: values[part] for part in parts}
            if name != "rel":
                found[name] = accuracy(own)
            elif full and all(full.get(part) for part in parts):
                found[name] = relative(own, {part: full[part] for part in parts})
    return found


def restrict(table: PublishedTable, columns: Sequence[str]) -> PublishedTable:
    """Return the table with some of its benchmarks only, and its means over these. Raises ValueError."""
    for name in (name for name in columns if name not in table.scored):
        known = ", ".join(table.scored) or "none in this table"
        raise ValueError(f"table {table.name} has no column {name!r}; choose from {known}")
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

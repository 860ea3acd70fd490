"""The paper's numbers (`published.json`, with their source) and its rule for Acc. and Rel.

    from llava.eval.tables.published import load_published, accuracy, relative
    table = load_published()["llava-1.5-7b"]
    table = load_further()["fastervlm-llava-1.5-13b"]
    curves = published_figure("figure-3a").rows

`more.json` has what the paper does not print: the tables of its predecessor (FasterVLM), runs of other
people, curves measured from the authors' pictures, and which cells of the paper repeat numbers of the
predecessor.

Scores are in percent, MME in perception points (at most 2,000). Token counts are totals fed to the language
model. The numbers were read from the printed tables and are rounded as printed. FLOPs are not printed for
most rows; `prefill_flops` computes them from the shapes of the models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

PUBLISHED = Path(__file__).with_name("published.json")
MORE = Path(__file__).with_name("more.json")
_DOCUMENT = json.loads(PUBLISHED.read_bytes())
_MORE = json.loads(MORE.read_bytes())
# Names as papers write them. The colors are those of Okabe and Ito, which most color-blind people can tell
# apart, and some darker ones.
METHODS = _DOCUMENT["methods"] | _MORE["methods"]
# by the column, method, mark or chart that they explain
NOTES = _DOCUMENT["notes"] | _MORE["notes"]
TEXT_TOKENS = 80  # of a prompt; the paper's efficiency table follows from the shapes with this number
RATIO = 0.5  # share of important tokens in all published rows of VisPruner
_MME_TASK_POINTS = 200
_FASTV_LAYERS = 2  # that process all tokens
_UNKNOWN_LAYERS = ("sparsevlm", "fitprune")  # methods whose tokens per layer are not published


@dataclass(frozen=True)
class ColumnSpec:
    """A column: its header, and the source of its number."""

    title: str
    benchmark: str | None = None  # its score.json has the number
    detail: str | None = None  # a key of `details` there instead of the score
    mean_of: str | None = None  # derived from the columns of benchmarks with this ending
    relative: bool = False  # a derived column in percent of the scores with all tokens
    digits: int = 1


COLUMNS = {name: ColumnSpec(**spec) for name, spec in (_DOCUMENT["columns"] | _MORE["columns"]).items()}


@dataclass(frozen=True)
class PublishedModel:
    """A model of a table."""

    name: str
    title: str
    full_tokens: int
    checkpoints: tuple[str, ...]  # names of its weights
    language: tuple[int, int, int]  # layers, width, MLP width


@dataclass(frozen=True)
class Reprint:
    """Numbers of a row that the predecessor printed for another method and another number of tokens."""

    method: str
    tokens: int
    columns: frozenset[str]


@dataclass(frozen=True)
class PublishedRow:
    """One printed line."""

    model: str
    method: str
    tokens: int  # in total
    values: Mapping[str, float]  # by column
    reprint: Reprint | None = None

    def is_reprinted(self, column: str) -> bool:
        """True if the number is one of the predecessor, or a mean of such numbers and others."""
        if self.reprint is None or column not in self.values:
            return False
        ending = COLUMNS[column].mean_of
        parts = {column} if ending is None else {name for name in self.values if name.endswith(ending)}
        return bool(parts & self.reprint.columns)


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
    certainty: str = ""  # how the numbers were read, where not from a printed table
    second_hand: bool = False  # measured by others than the authors

    def digits(self, column: str) -> int:
        """Return the digits after the point with which a column is printed."""
        values = [row.values[column] for row in self.rows if column in row.values]
        printed = [len(str(value).partition(".")[2]) for value in values if value != int(value)]
        return max([COLUMNS[column].digits, *printed])

    @property
    def scored(self) -> list[str]:
        """Columns that are a benchmark's number."""
        return [name for name in self.columns if COLUMNS[name].benchmark]


@dataclass(frozen=True)
class PublishedFigure:
    """Curves or bars of a figure, measured from the authors' picture.

    Attributes:
        what: What is drawn, and the picture.
        certainty: Measuring error, or how else the numbers were read.
        note: Peculiarities of the picture; may be empty.
        columns: Names or x values of the numbers of a row; empty where there is only a description.
        rows: Numbers by method (text) or layer (int). None is hidden in the picture.
    """

    name: str
    what: str
    certainty: str
    note: str
    columns: tuple[str | int, ...]
    rows: Mapping[str | int, tuple[float | None, ...]]


def published_figure(name: str) -> PublishedFigure:
    """Return a figure of the paper, such as "figure-3a". Raises ValueError for an unknown name."""
    figures = _MORE["figures"]
    if name not in figures:
        raise ValueError(f"{name}: no such figure. Choose from {', '.join(figures)}.")
    raw = figures[name]
    rows = {row.get("method", row.get("layer")): tuple(row["values"]) for row in raw["rows"]}
    note = raw.get("note", "")
    return PublishedFigure(name, raw["what"], raw["certainty"], note, tuple(raw["columns"]), rows)


def load_published() -> dict[str, PublishedTable]:
    """Return all tables of the paper by name. The file is part of the package, and a test validates it."""
    reprints = {
        (one["table"], one["v2_method"], one["v2_tokens"]): Reprint(
            one["v1_method"], one["v1_tokens"], frozenset(one["equal_columns"])
        )
        for one in _MORE["reprints"]["rows"]
    }
    return _tables(_DOCUMENT, reprints)


def load_further() -> dict[str, PublishedTable]:
    """Return the tables that are not the paper's by name: fastervlm-... (the predecessor) and others-....

    Tables of others are second hand: they follow other protocols and are never shown in one table with the
    paper's averages.
    """
    return _tables(_MORE, {})


def _tables(
    document: Mapping[str, Any], reprints: Mapping[tuple[str, str, int], Reprint]
) -> dict[str, PublishedTable]:
    tables = {}
    for name, raw in document["tables"].items():
        models = {key: PublishedModel(key, **one) for key, one in raw["models"].items()}
        rows = []
        for row in raw["rows"]:
            values = dict(zip(raw["columns"], row["values"], strict=True))
            reprint = reprints.get((name, row["method"], row["tokens"]))
            rows.append(PublishedRow(row["model"], row["method"], row["tokens"], values, reprint))
        known = {"columns": tuple(raw["columns"]), "models": models, "rows": tuple(rows)}
        tables[name] = PublishedTable(name, **{"source": document["source"], **raw, **known})
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
            if not COLUMNS[name].relative:
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

    FastV's first two layers process all tokens. The budgets of SparseVLM and FitPrune are means over layers,
    and their tokens per layer are not published.
    """
    from llava.model.flops import LanguageShape, llm_prefill_macs

    if method in _UNKNOWN_LAYERS:
        return None
    early = _FASTV_LAYERS if method == "fastv" else 0
    visual = [model.full_tokens] * early + [round(tokens)] * (model.language[0] - early)
    macs = llm_prefill_macs([count + TEXT_TOKENS for count in visual], LanguageShape(*model.language))
    return float(2 * macs)

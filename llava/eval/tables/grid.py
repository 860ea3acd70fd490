"""What a sweep over several sets adds up to: Acc. and Rel. of every cell, against the best constant answer.

Acc. and Rel. follow the paper's rule, over the sets on which the model with all tokens is clearly better than
one answer given to every question (the lower end of its 95% interval is above the majority): elsewhere
fewer tokens cannot lose anything. MME counts as a share of its highest score (200 per task; with ten tasks
that is MME / 2000 x 100). Intervals resample the pictures of every set, alike for all cells, the sets
apart from each other. `grid_page` writes this; neither asks a model anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks import Benchmark, Question
from llava.eval.jobs.cells import Cell
from llava.eval.metrics.statistics import resampled_sums

FULL = "none"  # the method that keeps all tokens
Interval = tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """One set of a sweep, with the cells that have a score and tallies."""

    benchmark: Benchmark
    folder: Path
    questions: Sequence[Question]
    cells: Sequence[Cell]


@dataclass
class Column:
    """One set. counted: part of Acc. and Rel.; share: percent per point of the score."""

    benchmark: Benchmark
    questions: int
    pictures: int
    majority: float | None
    counted: bool
    cells: dict[str, Cell]
    share: float = 1.0
    draws: dict[str, np.ndarray] = field(default_factory=dict)  # (resamples,) of every cell, in percent


@dataclass
class Row:
    """One cell over all sets. tokens: the budget, None for all."""

    name: str
    method: str
    ratio: float | None
    tokens: int | None
    visual_tokens: float
    gflops: float | None
    acc: float | None = None
    acc_interval: Interval | None = None
    rel: float | None = None
    rel_interval: Interval | None = None
    draws: np.ndarray | None = None  # of Acc.


@dataclass(frozen=True)
class Contrast:
    """Acc. of one row less that of another of the same budget, both resampled alike."""

    first: Row
    second: Row
    difference: float
    interval: Interval

    @property
    def separates(self) -> bool:
        """True if the interval excludes 0."""
        return self.interval[0] > 0 or self.interval[1] < 0


@dataclass
class Grid:
    """Everything on the page."""

    model: str
    columns: list[Column]
    rows: list[Row]
    contrasts: list[Contrast]
    unscored: list[str]  # titles of sets whose answers have no number here

    @property
    def counted(self) -> list[Column]:
        """The sets behind Acc. and Rel."""
        return [column for column in self.columns if column.counted]


def majority(benchmark: Benchmark, folder: Path, questions: Sequence[Question]) -> float | None:
    """The score of the best answer given to all questions alike; None where there is nothing to try."""
    scores = []
    for text in benchmark.constants(folder):
        rows: list[dict[str, Any]] = [
            {"question_id": one.question_id, "prompt": one.extra.get("prompt", one.text), "text": text}
            for one in questions
        ]
        scores.append(float(benchmark.score_counts(benchmark.per_image_counts(folder, rows).counts.sum(0))))
    return max(scores, default=None)


def build_grid(
    model: str,
    measured: Sequence[Measured],
    unscored: Sequence[str] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> Grid:
    """Add up the sets of a sweep. Sets without a scored cell are left out."""
    columns = [_column(one, resamples, seed + place) for place, one in enumerate(measured) if one.cells]
    rows = _rows(columns)
    counted = [column for column in columns if column.counted]
    whole = next((row for row in rows if row.method == FULL), None)
    for row in rows:
        if not counted or any(row.name not in column.cells for column in counted):
            continue
        row.draws = np.mean([column.draws[row.name] for column in counted], axis=0)
        row.acc = _mean(column.cells[row.name].document["score"] * column.share for column in counted)
        row.acc_interval = _interval(row.draws)
        if whole is not None and all(whole.name in column.cells for column in counted):
            row.rel = 100 * _mean(
                column.cells[row.name].document["score"] / column.cells[whole.name].document["score"]
                for column in counted
            )
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = [column.draws[row.name] / column.draws[whole.name] for column in counted]
            row.rel_interval = _interval(100 * np.nan_to_num(np.mean(ratios, axis=0), posinf=np.inf))
    return Grid(model, columns, rows, _contrasts(rows), list(unscored))


def _column(one: Measured, resamples: int, seed: int) -> Column:
    benchmark, cells = one.benchmark, {cell.name: cell for cell in one.cells}
    constant = majority(benchmark, one.folder, one.questions)
    full = next((cell for cell in one.cells if cell.pruner.name == FULL), None)
    counted = full is None or constant is None or full.document["low"] > constant
    counted = counted and all(cell.document["score"] is not None for cell in one.cells)
    pictures = len({question.image for question in one.questions})
    column = Column(benchmark, len(one.questions), pictures, constant, counted, cells)
    if benchmark.unit == "points":
        tasks = [len(cell.document["details"]["perception"]["subtasks"]) for cell in one.cells]
        column.share = 100 / (200 * max(tasks))
    for name, cell in cells.items():
        if cell.tallies is not None:
            sums = resampled_sums(cell.tallies.counts, resamples, seed)
            column.draws[name] = benchmark.score_counts(sums) * column.share
    return column


def _rows(columns: Sequence[Column]) -> list[Row]:
    """One per cell, in the order of the sweep."""
    found: dict[str, list[Cell]] = {}
    for column in columns:
        for name, cell in column.cells.items():
            found.setdefault(name, []).append(cell)
    rows = []
    for name, cells in found.items():
        settings = cells[0].pruner.config()
        gflops = [cell.document["llm_gflops"] for cell in cells if cell.document["llm_gflops"] is not None]
        rows.append(
            Row(
                name,
                settings["method"],
                settings.get("important_ratio"),
                settings["tokens"],
                _mean(cell.document["visual_tokens"] for cell in cells),
                _mean(gflops) if gflops else None,
            )
        )
    return rows


def _contrasts(rows: Sequence[Row]) -> list[Contrast]:
    """VisPruner at its first ratio against all others of its budget."""
    ours = [row for row in rows if row.method == "vispruner" and row.draws is not None]
    found = []
    for first in (row for row in ours if row.ratio == ours[0].ratio):
        for second in rows:
            if second is first or second.tokens != first.tokens or second.draws is None:
                continue
            found.append(
                Contrast(first, second, first.acc - second.acc, _interval(first.draws - second.draws))
            )
    return found


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _interval(draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)

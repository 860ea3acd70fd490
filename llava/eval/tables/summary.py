"""Summarize a sweep over several benchmarks: Acc. and Rel. of every setting, as tables and charts.

    summary = build_summary("llava-tiny", scored, unscored)
    print(summary.text())
    write_summary(summary, folder)                       # grid.html, grid.md, grid.csv, grid.tex

Acc. and Rel. follow the paper's rule (`published`), over the benchmarks on which the model with all tokens is
clearly better than the constant-answer baseline: the lower end of its 95% interval is above the best score
that one answer to all questions can get. On other benchmarks fewer tokens cannot lower the score. Intervals
resample the images of every benchmark, with the same draws for all settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks import Benchmark, PerImageCounts, Question
from llava.eval.metrics.scorecard import Scorecard
from llava.eval.metrics.statistics import resampled_sums
from llava.eval.store.atomic import write_atomically
from llava.eval.tables.page import html_page
from llava.eval.tables.plots import SMALL, Chart, Series, charts_html, method_colors, method_label
from llava.eval.tables.published import accuracy, relative
from llava.eval.tables.table import Table, TableCell, TableColumn, TableRow, csv_text, number

FULL = "none"  # the method that keeps all tokens
_FIELDS = (  # of the CSV file; names of its first version, which scripts read
    *("set", "counted", "questions", "pictures", "majority", "method", "important_ratio", "tokens"),
    *("score", "low", "high", "visual_tokens", "llm_gflops", "questions_per_second", "answers"),
)


@dataclass(frozen=True)
class ScoredSetting:
    """One setting of a sweep on one benchmark: its scorecard, and the counts to resample."""

    name: str
    card: Scorecard
    counts: PerImageCounts | None = None


@dataclass(frozen=True)
class ScoredBenchmark:
    """One benchmark of a sweep, with the settings that have answers."""

    benchmark: Benchmark
    folder: Path
    questions: Sequence[Question]
    settings: Sequence[ScoredSetting]


@dataclass(frozen=True)
class Estimate:
    """A score with its 95% interval, and the bootstrap draws (resamples,) behind it, where they are known."""

    value: float
    ci_low: float | None
    ci_high: float | None
    draws: np.ndarray | None = None

    @classmethod
    def of(cls, value: float | np.ndarray, draws: float | np.ndarray) -> Estimate:
        """Take the interval from the draws."""
        low, high = np.quantile(draws, [0.025, 0.975])
        return cls(float(value), float(low), float(high), np.asarray(draws))

    @property
    def significant(self) -> bool:
        """True if the interval excludes 0."""
        return self.ci_low > 0 or self.ci_high < 0

    def interval(self, form: str = ".1f") -> str:
        """Return the interval as text."""
        return "" if self.ci_low is None else f"[{self.ci_low:{form}}, {self.ci_high:{form}}]"


@dataclass(frozen=True)
class SummaryColumn:
    """One benchmark; `constant` is the score of the constant-answer baseline."""

    benchmark: Benchmark
    questions: int
    images: int
    constant: float | None
    in_mean: bool  # part of Acc. and Rel.

    @property
    def title(self) -> str:
        """Name of the benchmark, marked if it is not part of the means."""
        return self.benchmark.title + ("" if self.in_mean else "†")


@dataclass
class SummaryRow:
    """One setting: scorecards by benchmark, and estimates by benchmark and of "acc" and "rel"."""

    name: str
    method: str
    ratio: float | None
    tokens: int | None  # the budget; None: all
    cards: dict[str, Scorecard] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)

    @property
    def label(self) -> list[str]:
        """The method with its ratio, and the budget."""
        return [method_label(self.method, self.ratio), "all" if self.tokens is None else str(self.tokens)]

    def mean(self, name: str) -> float | None:
        """Return the mean of a field of the scorecards, where it is known."""
        values = [value for card in self.cards.values() if (value := getattr(card, name)) is not None]
        return float(np.mean(values)) if values else None


@dataclass(frozen=True)
class Summary:
    """A sweep over several benchmarks.

    Attributes:
        model: Name of the model.
        columns, rows: Benchmarks and settings.
        contrasts: (first, second, difference in Acc.) of settings with the same budget.
        unscored: Titles of benchmarks whose answers are not scored here.
    """

    model: str
    columns: Sequence[SummaryColumn]
    rows: Sequence[SummaryRow]
    contrasts: Sequence[tuple[SummaryRow, SummaryRow, Estimate]]
    unscored: Sequence[str]

    @property
    def notes(self) -> list[str]:
        """Explanations below the table."""
        means = ", ".join(one.benchmark.title for one in self.columns if one.in_mean) or "no benchmark"
        left_out = ", ".join(one.benchmark.title for one in self.columns if not one.in_mean)
        found = [
            f"Model: {self.model}. Brackets: 95% bootstrap intervals over images; they do not cover other "
            "training runs. Constant answer: the best score that one answer to all questions can get.",
            f"Acc.: mean over {means} (MME in percent of its highest score). Rel.: 100 x mean of score / "
            "score with all tokens." + (" Bold: the best of a budget." if len(self.rows) > 1 else ""),
        ]
        if left_out:
            found.append(
                "† Not in the means, because the model with all tokens is not clearly above the "
                f"constant answer: {left_out}."
            )
        if self.unscored:
            found.append(f"Answered, but not scored here: {', '.join(self.unscored)}.")
        return [
            *found,
            "Prefill GFLOPs: the language model's prefill of one question, visual and text tokens, 2 per "
            "multiply-accumulate; mean over the benchmarks.",
        ]

    def table(self) -> Table:
        """Build the table over all benchmarks; its first row is the constant-answer baseline."""
        columns = [TableColumn("method", left=True), TableColumn("tokens")]
        columns += [TableColumn(title, kind="mean") for title in ("Acc.", "Rel.")]
        columns += [TableColumn(one.title, kind="" if one.in_mean else "muted") for one in self.columns]
        constants = ["Constant answer", "", "", "", *(number(one.constant, ".1f") for one in self.columns)]
        rows = [TableRow([TableCell(text) for text in constants], "constant")]
        best = {key: self._best(key) for key in ("acc", "rel")}
        best |= {one.benchmark.name: self._best(one.benchmark.name, one.in_mean) for one in self.columns}
        tokens: Any = ...
        for row in self.rows:
            cells = [TableCell(text) for text in row.label]
            for key, winners in best.items():
                found = row.estimates.get(key)
                shown = ("", "") if found is None else (f"{found.value:.1f}", found.interval())
                cells.append(TableCell(*shown, strong=row.name in winners))
            rows.append(TableRow(cells, "", row.tokens != tokens))
            tokens = row.tokens
        title = f"{self.model}: {len(self.rows)} settings on {len(self.columns)} benchmarks"
        return Table(title, columns, rows, self.notes)

    def _best(self, key: str, in_mean: bool = True) -> set[str]:
        """Return the names of the rows that are best among several pruned ones of their budget."""
        groups: dict[int | None, list[SummaryRow]] = {}
        for row in self.rows:
            if in_mean and row.method != FULL and key in row.estimates:
                groups.setdefault(row.tokens, []).append(row)
        several = [group for group in groups.values() if len(group) > 1]
        return {max(group, key=lambda row: row.estimates[key].value).name for group in several}

    def differences(self) -> Table:
        """Build the table of differences in Acc."""
        rows = []
        for first, second, one in self.contrasts:
            shown = f"{one.value:+.1f}", one.interval("+.1f"), "yes" if one.significant else "no"
            rows.append(TableRow.of(f"{first.label[0]} - {second.label[0]}", first.label[1], *shown))
        note = (
            "Both sides are computed from the same draws, so that images that are difficult for all methods "
            "do not widen the interval. Significant: the interval excludes 0."
        )
        columns = TableColumn.of("difference in Acc.", "tokens", "points", "95% CI", "significant")
        return Table("Differences in Acc.", columns, rows, [note])

    def benchmark_table(self, column: SummaryColumn) -> Table:
        """Build the table of one benchmark, with tokens, FLOPs and speed."""
        rows, key = [], column.benchmark.name
        for row in (row for row in self.rows if key in row.estimates):
            card, found = row.cards[key], row.estimates[key]
            score = [f"{found.value:.2f}", found.interval(), number(card.visual_tokens, ".1f")]
            rate = (card.speed or {}).get("questions_per_second")
            rows.append(TableRow.of(*row.label, *score, number(card.llm_gflops, ".3g"), number(rate, ".0f")))
        notes = [
            f"{column.benchmark.metric}; {column.questions:,} questions, {column.images:,} images, "
            f"constant answer {number(column.constant, '.1f')}"
        ]
        header = ("method", "tokens", "score", "95% CI", "visual tokens", "prefill GFLOPs", "questions/s")
        return Table(column.title, TableColumn.of(*header), rows, notes)

    def text(self) -> str:
        """Return the table with title and notes for a terminal, without intervals."""
        return self.table().text()

    def markdown(self) -> str:
        """Return the table with intervals, and the differences."""
        return self.table().markdown() + ("\n" + self.differences().markdown(2) if self.contrasts else "")

    def csv(self) -> str:
        """Return one row per benchmark and setting, then Acc. and Rel. as if they were benchmarks."""
        rows: list[list[Any]] = []
        for one in self.columns:
            key = one.benchmark.name
            about = [key, str(one.in_mean).lower(), one.questions, one.images, one.constant]
            for row in self.rows:
                if key in row.estimates:
                    card = row.cards[key]
                    rate = (card.speed or {}).get("questions_per_second")
                    cost = [card.visual_tokens, card.llm_gflops, rate, card.answered]
                    rows.append([*about, *_numbers(row, key), *cost])
        for row in self.rows:
            for key in ("acc", "rel"):
                if key in row.estimates:
                    cost = [row.mean("visual_tokens"), row.mean("llm_gflops"), None, None]
                    rows.append([key, *[None] * 4, *_numbers(row, key), *cost])
        return csv_text(_FIELDS, rows)

    def html(self) -> str:
        """Return the page: the table, charts, differences, and a table of every benchmark."""
        parts = [self.table().html(), self._charts()]
        if self.contrasts:
            parts.append(self.differences().html())
        each = [self.benchmark_table(column).html(3) for column in self.columns]
        parts += ["<h2>Benchmarks</h2>", '<div class="side">', *each, "</div>"]
        return html_page(f"Sweep of {self.model}", parts)

    def _charts(self) -> str:
        tokens = {row.name: row.mean("visual_tokens") for row in self.rows}
        flops = {row.name: row.mean("llm_gflops") for row in self.rows}
        ticks = sorted({round(count) for count in tokens.values() if count})
        title, label, unit = "Acc. against tokens", "visual tokens", "Acc. (%)"
        charts = [
            Chart(title, label, unit, self._series("acc", tokens), ticks),
            Chart("Acc. against FLOPs", "prefill GFLOPs", unit, self._series("acc", flops)),
        ]
        for one in self.columns:
            series = self._series(one.benchmark.name, tokens)
            unit = f"{one.benchmark.metric} ({one.benchmark.unit})"
            charts.append(Chart(one.title, label, unit, series, ticks, one.constant, SMALL))
        note = "Whiskers: 95% intervals. Dotted line: the constant answer."
        return charts_html(charts, method_colors((row.method, row.ratio) for row in self.rows), note)

    def _series(self, key: str, xs: Mapping[str, float | None]) -> list[Series]:
        """Collect the points of all methods; every line ends at the point with all tokens."""
        found: dict[str, list[Any]] = {}
        for row in self.rows:
            one, x = row.estimates.get(key), xs[row.name]
            if one is not None and x:
                found.setdefault(row.label[0], []).append((x, one.value, one.ci_low, one.ci_high))
        full = method_label(FULL, None)
        ends = [(x, y, None, None) for x, y, _, _ in found.get(full, [])]
        series = [Series(name, points + ends) for name, points in found.items() if name != full]
        return series + ([Series(full, found[full])] if full in found else [])  # on top

    def document(self) -> dict[str, Any]:
        """Return the means as a JSON value; renamed entries also have their first names."""
        in_mean = [one.benchmark.name for one in self.columns if one.in_mean]
        constants = {one.benchmark.name: one.constant for one in self.columns}
        rows: list[dict[str, Any]] = []
        for row in self.rows:
            rows.append({"setting": row.name, "cell": row.name})
            for key in ("acc", "rel"):
                one = row.estimates.get(key)
                rows[-1][key] = one and one.value
                rows[-1][f"{key}_interval"] = one and (one.ci_low, one.ci_high)
        new = {"in_mean": in_mean, "constant_answer": constants, "summary": rows}
        return {**new, "counted": in_mean, "majority": constants, "sums": rows}


def constant_answer_score(benchmark: Benchmark, folder: Path, questions: Sequence[Question]) -> float | None:
    """Compute the best score of one answer to all questions; None without candidates."""
    scores = []
    for text in benchmark.constants(folder):
        rows: list[dict[str, Any]] = [
            {"question_id": one.question_id, "prompt": one.extra.get("prompt", one.text), "text": text}
            for one in questions
        ]
        scores.append(float(benchmark.score_counts(benchmark.per_image_counts(folder, rows).counts.sum(0))))
    return max(scores, default=None)


def build_summary(
    model: str,
    scored: Sequence[ScoredBenchmark],
    unscored: Sequence[str] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> Summary:
    """Summarize the benchmarks of a sweep; those without a scored setting are left out.

    Args:
        model: Name of the model.
        scored: Benchmarks with their scored settings.
        unscored: Titles of benchmarks whose answers are not scored here.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.
    """
    columns, rows, mme_tasks = [], {}, 0
    for place, one in enumerate(scored):
        if not one.settings:
            continue
        columns.append(_column(one))
        for setting in one.settings:
            card, key = setting.card, one.benchmark.name
            row = SummaryRow(setting.name, str(card.method), card.important_ratio, card.tokens)
            row = rows.setdefault(setting.name, row)
            row.cards[key] = card
            if card.score is not None:
                draws = None
                if setting.counts is not None:
                    sums = resampled_sums(setting.counts.counts, resamples, seed + place)
                    draws = one.benchmark.score_counts(sums)
                row.estimates[key] = Estimate(card.score, card.ci_low, card.ci_high, draws)
            if one.benchmark.unit == "points":
                mme_tasks = max(mme_tasks, len(card.details["perception"]["subtasks"]))
    keys = [column.benchmark.name for column in columns if column.in_mean]
    drawn = {name: {k for k, e in row.estimates.items() if e.draws is not None} for name, row in rows.items()}
    complete = [row for name, row in rows.items() if keys and drawn[name] >= set(keys)]
    full = next((row for row in complete if row.method == FULL), None)
    for row in complete:
        values, draws = _by_benchmark(row, keys)
        row.estimates["acc"] = Estimate.of(accuracy(values, mme_tasks), accuracy(draws, mme_tasks))
        if full is not None:
            full_values, full_draws = _by_benchmark(full, keys)
            defined = np.all(list(full_draws.values()), axis=0)
            if all(full_values.values()) and defined.any():
                draws, full_draws = ({k: v[defined] for k, v in of.items()} for of in (draws, full_draws))
                row.estimates["rel"] = Estimate.of(relative(values, full_values), relative(draws, full_draws))
    return Summary(model, columns, list(rows.values()), _contrasts(list(rows.values())), list(unscored))


def _by_benchmark(row: SummaryRow, keys: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    found = {key: row.estimates[key] for key in keys}
    return {key: one.value for key, one in found.items()}, {key: one.draws for key, one in found.items()}


def _column(one: ScoredBenchmark) -> SummaryColumn:
    constant = constant_answer_score(one.benchmark, one.folder, one.questions)
    cards = [setting.card for setting in one.settings]
    full = next((card for card in cards if card.method == FULL), None)
    in_mean = full is None or constant is None or (full.ci_low is not None and full.ci_low > constant)
    in_mean = in_mean and all(card.score is not None for card in cards)
    images = len({question.image for question in one.questions})
    return SummaryColumn(one.benchmark, len(one.questions), images, constant, in_mean)


def _contrasts(rows: Sequence[SummaryRow]) -> list[tuple[SummaryRow, SummaryRow, Estimate]]:
    """Compare VisPruner at its first ratio with all others of its budget, by the same draws."""
    rows = [row for row in rows if "acc" in row.estimates]
    ours = [row for row in rows if row.method == "vispruner"]
    found = []
    for first in (row for row in ours if row.ratio == ours[0].ratio):
        for second in (row for row in rows if row is not first and row.tokens == first.tokens):
            a, b = first.estimates["acc"], second.estimates["acc"]
            found.append((first, second, Estimate.of(a.value - b.value, a.draws - b.draws)))
    return found


def _numbers(row: SummaryRow, key: str) -> list[Any]:
    one = row.estimates[key]
    return [row.method, row.ratio, row.tokens, one.value, one.ci_low, one.ci_high]


def write_summary(summary: Summary, folder: Path) -> list[Path]:
    """Write grid.html, grid.md, grid.csv and grid.tex into a folder; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    forms = {"html": summary.html(), "md": summary.markdown(), "csv": summary.csv()}
    forms["tex"] = summary.table().latex()
    files = {folder / f"grid.{suffix}": text for suffix, text in forms.items()}
    for path, text in files.items():
        write_atomically(path, text)
    return list(files)

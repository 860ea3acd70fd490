"""Summarize a sweep over several benchmarks: Acc. and Rel. of every setting, as tables and charts.

    summary = build_summary("llava-tiny", scored, unscored)
    print(summary.text())
    summary.files()                                      # grid.html, grid.md, grid.csv, grid.tex

Acc. and Rel. follow the paper's rule (`published`), over the benchmarks on which the model with all tokens is
clearly better than the constant-answer baseline: the lower end of its 95% interval is above the best score
that one answer to all questions can get. On other benchmarks fewer tokens cannot lower the score. Intervals
resample the images of every benchmark, with the same draws for all settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks import Benchmark, Question
from llava.eval.metrics.scorecard import Scorecard, ScoredSetting
from llava.eval.metrics.statistics import resampled_sums
from llava.eval.tables import plots
from llava.eval.tables.published import accuracy, relative
from llava.table import Table, TableCell, TableRow, csv_text, number

FULL = "none"  # the method that keeps all tokens
MEANS = ("acc", "rel")
_FIELDS = (  # of the CSV file; names of its first version, which scripts read
    *("set", "counted", "questions", "pictures", "majority", "method", "important_ratio", "tokens"),
    *("score", "low", "high", "visual_tokens", "llm_gflops", "questions_per_second", "answers"),
)


@dataclass(frozen=True)
class ScoredBenchmark:
    """One benchmark of a sweep, with the settings that have answers."""

    benchmark: Benchmark
    folder: Path
    questions: Sequence[Question]
    settings: Sequence[ScoredSetting]

    @cached_property
    def images(self) -> int:
        """Number of images that the questions are about."""
        return len({question.image for question in self.questions})

    @cached_property
    def constant(self) -> float | None:
        """The best score of one answer to all questions; None without candidates."""
        scores = []
        for text in self.benchmark.constants(self.folder):
            rows: list[dict[str, Any]] = [
                {"question_id": one.question_id, "prompt": one.extra.get("prompt", one.text), "text": text}
                for one in self.questions
            ]
            counts = self.benchmark.per_image_counts(self.folder, rows).counts
            scores.append(float(self.benchmark.score_counts(counts.sum(0))))
        return max(scores, default=None)

    @cached_property
    def in_mean(self) -> bool:
        """True if the benchmark is part of Acc. and Rel."""
        cards, least = [setting.card for setting in self.settings], self.constant
        full = next((card for card in cards if card.method == FULL), None)
        above = full is None or least is None or (full.ci_low is not None and full.ci_low > least)
        return above and all(card.score is not None for card in cards)

    @property
    def title(self) -> str:
        """Name of the benchmark, marked if it is not part of the means."""
        return self.benchmark.title + ("" if self.in_mean else "†")


@dataclass
class SummaryRow:
    """One setting: its scorecards by benchmark, and of the means "acc" and "rel" as if they were benchmarks.

    `draws` are the bootstrap draws (resamples,) of the scores, where they are known.
    """

    name: str
    cards: dict[str, Scorecard] = field(default_factory=dict)
    draws: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def overall(self) -> Scorecard:
        """The setting without a score, with the mean cost on all benchmarks."""
        cards, costs = [card for name, card in self.cards.items() if name not in MEANS], {}
        for name in ("visual_tokens", "llm_gflops"):
            known = [value for card in cards if (value := getattr(card, name)) is not None]
            costs[name] = float(np.mean(known)) if known else None
        return cards[0].replace(score=None, speed=None, answered=None, **costs)

    @property
    def label(self) -> list[str]:
        """The method with its ratio, and the budget."""
        one = self.overall
        method = plots.method_label(str(one.method), one.important_ratio)
        return [method, "all" if one.tokens is None else str(one.tokens)]

    def card(self, key: str) -> Scorecard | None:
        """Return the scorecard of a benchmark or a mean; None without a score."""
        card = self.cards.get(key)
        return None if card is None or card.score is None else card

    def add_mean(self, key: str, score: float | np.ndarray, draws: float | np.ndarray) -> None:
        """Add a mean, with the interval of its draws."""
        low, high = map(float, np.quantile(draws, [0.025, 0.975]))
        self.draws[key] = np.asarray(draws)
        self.cards[key] = self.overall.replace(benchmark=key, score=float(score), ci_low=low, ci_high=high)


@dataclass(frozen=True)
class Summary:
    """A sweep over several benchmarks."""

    model: str
    columns: Sequence[ScoredBenchmark]
    rows: Sequence[SummaryRow]
    unscored: Sequence[str]  # titles of benchmarks whose answers are not scored here

    @property
    def notes(self) -> list[str]:
        """Explanations below the table."""
        means = ", ".join(one.benchmark.title for one in self.columns if one.in_mean) or "no benchmark"
        left_out = ", ".join(one.benchmark.title for one in self.columns if not one.in_mean)
        notes = [
            f"Model: {self.model}. Brackets: 95% bootstrap intervals over images; they do not cover other "
            "training runs. Constant answer: the best score that one answer to all questions can get.",
            f"Acc.: mean over {means} (MME in percent of its highest score). Rel.: 100 x mean of score / "
            "score with all tokens." + (" Bold: the best of a budget." if len(self.rows) > 1 else ""),
            "† Not in the means, because the model with all tokens is not clearly above the "
            f"constant answer: {left_out}.",
            f"Answered, but not scored here: {', '.join(self.unscored)}.",
            "Prefill GFLOPs: the language model's prefill of one question, visual and text tokens, 2 per "
            "multiply-accumulate; mean over the benchmarks.",
        ]
        return list(compress(notes, [True, True, left_out, self.unscored, True]))

    def table(self) -> Table:
        """Build the table over all benchmarks; its first row is the constant-answer baseline."""
        header = ["method", "tokens", "Acc.", "Rel.", *(one.title for one in self.columns)]
        kinds = ["left", "", "mean", "mean", *("" if one.in_mean else "muted" for one in self.columns)]
        constants = ["Constant answer", "", "", "", *(number(one.constant, ".1f") for one in self.columns)]
        rows = [TableRow(list(map(TableCell, constants)), "constant")]
        shown = dict.fromkeys(MEANS, True) | {one.benchmark.name: one.in_mean for one in self.columns}
        best = {key: self._best(key) if in_mean else set() for key, in_mean in shown.items()}
        for before, row in zip([None, *self.rows], self.rows, strict=False):
            cells = list(map(TableCell, row.label))
            for key, winners in best.items():
                card = row.card(key)
                texts = (f"{card.score:.1f}", _interval(card)) if card else ()
                cells.append(TableCell(*texts, strong=row.name in winners))
            group = before is None or row.overall.tokens != before.overall.tokens
            rows.append(TableRow(cells, starts_group=group))
        title = f"{self.model}: {len(self.rows)} settings on {len(self.columns)} benchmarks"
        return Table(title, header, rows, self.notes, kinds)

    def _best(self, key: str) -> set[str]:
        """Return the names of the rows that are best among several pruned ones of their budget."""
        groups: dict[int | None, dict[str, float]] = {}
        for row in self.rows:
            card = row.card(key)
            if card and card.method != FULL:
                groups.setdefault(card.tokens, {})[row.name] = card.score
        return {max(group, key=group.__getitem__) for group in groups.values() if len(group) > 1}

    def differences(self) -> Table:
        """Compare VisPruner's Acc. at its first ratio with all others of its budget."""
        rows, complete = [], [row for row in self.rows if row.card("acc")]
        ours = [row for row in complete if row.overall.method == "vispruner"]
        for one in (row for row in ours if row.overall.important_ratio == ours[0].overall.important_ratio):
            for other in complete:
                if other is not one and other.overall.tokens == one.overall.tokens:
                    points = one.cards["acc"].score - other.cards["acc"].score
                    low, high = np.quantile(one.draws["acc"] - other.draws["acc"], [0.025, 0.975])
                    significant = "yes" if low > 0 or high < 0 else "no"
                    method, tokens = one.label
                    texts = [f"{method} - {other.label[0]}", tokens, f"{points:+.1f}"]
                    texts += [f"[{low:+.1f}, {high:+.1f}]", significant]
                    rows.append(TableRow(list(map(TableCell, texts))))
        note = (
            "Both sides are computed from the same draws, so that images that are difficult for all methods "
            "do not widen the interval. Significant: the interval excludes 0."
        )
        header = ["difference in Acc.", "tokens", "points", "95% CI", "significant"]
        return Table("Differences in Acc.", header, rows, [note])

    def benchmark_table(self, column: ScoredBenchmark) -> Table:
        """Build the table of one benchmark, with tokens, FLOPs and speed."""
        rows = []
        for row in self.rows:
            if card := row.card(column.benchmark.name):
                texts = [*row.label, f"{card.score:.2f}", _interval(card), number(card.visual_tokens, ".1f")]
                texts += [number(card.llm_gflops, ".3g"), number(_rate(card), ".0f")]
                rows.append(TableRow(list(map(TableCell, texts))))
        note = (
            f"{column.benchmark.metric}; {len(column.questions):,} questions, {column.images:,} images, "
            f"constant answer {number(column.constant, '.1f')}"
        )
        header = ["method", "tokens", "score", "95% CI", "visual tokens", "prefill GFLOPs", "questions/s"]
        return Table(column.title, header, rows, [note])

    def text(self) -> str:
        """Return the table for a terminal, without intervals."""
        return self.table().text()

    def csv(self) -> str:
        """Return one row per benchmark and setting, then Acc. and Rel. as if they were benchmarks."""
        found: list[tuple[list[Any], Scorecard | None]] = []
        for one in self.columns:
            key = one.benchmark.name
            about = [key, str(one.in_mean).lower(), len(one.questions), one.images, one.constant]
            found += [(about, row.card(key)) for row in self.rows]
        found += [([key, *[None] * 4], row.card(key)) for row in self.rows for key in MEANS]
        names = "method important_ratio tokens score ci_low ci_high visual_tokens llm_gflops".split()
        rows = []
        for about, card in found:
            if card:
                rows.append([*about, *(getattr(card, name) for name in names), _rate(card), card.answered])
        return csv_text(_FIELDS, rows)

    def html(self) -> str:
        """Return the page: the table, charts, differences, and a table of every benchmark."""
        parts, differences = [self.table().html(), self._charts()], self.differences()
        parts += [differences.html()] if differences.rows else []
        each = [self.benchmark_table(column).html(3) for column in self.columns]
        parts += ["<h2>Benchmarks</h2>", '<div class="side">', *each, "</div>"]
        return plots.html_page(f"Sweep of {self.model}", parts)

    def _charts(self) -> str:
        ticks = sorted({round(count) for row in self.rows if (count := row.overall.visual_tokens)})
        label, unit = "visual tokens", "Acc. (%)"
        charts = [
            plots.Chart("Acc. against tokens", label, unit, self._points("acc", "visual_tokens"), ticks),
            plots.Chart("Acc. against FLOPs", "prefill GFLOPs", unit, self._points("acc", "llm_gflops")),
        ]
        for one in self.columns:
            points = self._points(one.benchmark.name, "visual_tokens")
            unit = f"{one.benchmark.metric} ({one.benchmark.unit})"
            charts.append(plots.Chart(one.title, label, unit, points, ticks, one.constant, plots.SMALL))
        note = "Whiskers: 95% intervals. Dotted line: the constant answer."
        settings = [(row.overall.method, row.overall.important_ratio) for row in self.rows]
        return plots.charts_html(charts, plots.method_colors(settings), note)

    def _points(self, key: str, cost: str) -> list[plots.ChartPoint]:
        """Collect the points of all methods; every line ends at the point with all tokens."""
        full: list[plots.ChartPoint] = []
        pruned: list[plots.ChartPoint] = []
        for row in self.rows:
            card, x = row.card(key), getattr(row.overall, cost)
            if card and x:
                point = plots.ChartPoint(row.label[0], x, card.score, card.ci_low, card.ci_high)
                (full if card.method == FULL else pruned).append(point)
        names = dict.fromkeys(point.name for point in pruned)
        ends = [plots.ChartPoint(name, end.x, end.y) for name in names for end in full]
        return pruned + ends + full  # all tokens on top

    def files(self) -> dict[str, str]:
        """Return file name -> content of all forms."""
        table, differences = self.table(), self.differences()
        markdown = table.markdown() + ("\n" + differences.markdown(2) if differences.rows else "")
        files = {"grid.html": self.html(), "grid.md": markdown}
        return {**files, "grid.csv": self.csv(), "grid.tex": table.latex()}

    def document(self) -> dict[str, Any]:
        """Return the means as a JSON value; renamed entries also have their first names."""
        in_mean = [one.benchmark.name for one in self.columns if one.in_mean]
        constants = {one.benchmark.name: one.constant for one in self.columns}
        rows: list[dict[str, Any]] = []
        for row in self.rows:
            rows.append({"setting": row.name, "cell": row.name})
            for key in MEANS:
                card = row.card(key)
                rows[-1][key] = card and card.score
                rows[-1][f"{key}_interval"] = card and (card.ci_low, card.ci_high)
        new = {"in_mean": in_mean, "constant_answer": constants, "summary": rows}
        return {**new, "counted": in_mean, "majority": constants, "sums": rows}


def build_summary(
    model: str,
    scored: Sequence[ScoredBenchmark],
    unscored: Sequence[str] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> Summary:
    """Summarize the benchmarks of a sweep; those without a scored setting are left out.

    Args:
        unscored: Titles of benchmarks whose answers are not scored here.
        resamples, seed: Number and seed of the bootstrap draws.
    """
    mme_tasks = 0
    by_name: dict[str, SummaryRow] = {}
    for place, one in enumerate(scored):
        for setting in one.settings:
            row = by_name.setdefault(setting.name, SummaryRow(setting.name))
            row.cards[one.benchmark.name] = setting.card
            if setting.card.score is not None and setting.counts is not None:
                sums = resampled_sums(setting.counts.counts, resamples, seed + place)
                row.draws[one.benchmark.name] = one.benchmark.score_counts(sums)
            if one.benchmark.unit == "points":
                mme_tasks = max(mme_tasks, len(setting.card.details["perception"]["subtasks"]))
    rows, columns = list(by_name.values()), [one for one in scored if one.settings]
    keys = [column.benchmark.name for column in columns if column.in_mean]
    complete = [row for row in rows if keys and row.draws.keys() >= set(keys)]
    full = next((row for row in complete if row.overall.method == FULL), None)
    for row in complete:
        scores, draws = _by_benchmark(row, keys)
        row.add_mean("acc", accuracy(scores, mme_tasks), accuracy(draws, mme_tasks))
        if full is not None:
            full_scores, full_draws = _by_benchmark(full, keys)
            defined = np.all(list(full_draws.values()), axis=0)
            if all(full_scores.values()) and defined.any():
                draws, full_draws = ({k: v[defined] for k, v in of.items()} for of in (draws, full_draws))
                row.add_mean("rel", relative(scores, full_scores), relative(draws, full_draws))
    return Summary(model, columns, rows, list(unscored))


def _by_benchmark(row: SummaryRow, keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {key: row.cards[key].score for key in keys}, {key: row.draws[key] for key in keys}


def _interval(card: Scorecard) -> str:
    return "" if card.ci_low is None else f"[{card.ci_low:.1f}, {card.ci_high:.1f}]"


def _rate(card: Scorecard) -> float | None:
    return (card.speed or {}).get("questions_per_second")

"""What an ablation found: tables, CSV, plots and a page.

report = AblationReport("ratio", ABLATIONS["ratio"], "llava-tiny", rows)
print(report.text())
report.files()                     # ratio.html, ratio.md, ratio.csv, ratio-pope.svg ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

from llava.analysis.ablation.definitions import Ablation
from llava.eval.benchmarks import Benchmark, get_benchmark
from llava.eval.metrics.scorecard import Scorecard
from llava.eval.metrics.statistics import Difference
from llava.eval.tables import plots
from llava.table import Table, TableCell, TableRow, csv_text, number

_FIELDS = (
    *("ablation", "model", "benchmark", "metric", "questions", "images", "tokens", "value", "setting"),
    *("score", "ci_low", "ci_high", "difference", "difference_low", "difference_high", "significant"),
    "visual_tokens",
)


class Interval(NamedTuple):
    """A number with its 95% interval."""

    value: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class AblationRow:
    """One value of an ablation at one budget on one benchmark.

    Attributes:
        difference: To the default at this budget; None for the default itself, and if that has no score.
        extra: Further numbers of this ablation, by the title of their column; those of the default are None.
    """

    label: str
    tokens: int
    card: Scorecard
    images: int
    difference: Difference | None = None
    extra: dict[str, Interval | None] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the row as a JSON value."""
        card, found = self.card, self.difference
        return {
            "benchmark": card.benchmark,
            "value": self.label,
            "setting": card.setting,
            "tokens": self.tokens,
            "score": card.score,
            "ci_low": card.ci_low,
            "ci_high": card.ci_high,
            "difference": found and found.difference,
            "difference_low": found and found.ci_low,
            "difference_high": found and found.ci_high,
            "significant": found and found.significant,
            "visual_tokens": card.visual_tokens,
            "questions": card.questions,
            "images": self.images,
            **{key: value and value._asdict() for key, value in self.extra.items()},
        }


@dataclass(frozen=True)
class AblationReport:
    """All rows of an ablation, by benchmark, budget and value."""

    name: str
    ablation: Ablation
    model: str
    rows: Sequence[AblationRow]

    @property
    def benchmarks(self) -> list[Benchmark]:
        """The benchmarks that have rows, in order."""
        return [get_benchmark(name) for name in dict.fromkeys(row.card.benchmark for row in self.rows)]

    def of(self, benchmark: Benchmark) -> list[AblationRow]:
        """Return the rows of one benchmark."""
        return [row for row in self.rows if row.card.benchmark == benchmark.name]

    def tables(self) -> list[Table]:
        """Return one table per benchmark; rows of one budget are a group."""
        return [self._table(benchmark) for benchmark in self.benchmarks]

    def _table(self, benchmark: Benchmark) -> Table:
        found, rows = self.of(benchmark), []
        extra = list(dict.fromkeys(key for row in found for key in row.extra))
        header = ["tokens", self.ablation.axis, benchmark.metric, "95% CI", "difference", "95% CI"]
        header += [title for key in extra for title in (key, f"{key} 95% CI")]
        for place, row in enumerate(found):
            card, diff = row.card, row.difference
            cells = [str(row.tokens), row.label, number(card.score, ".2f")]
            cells += [_interval(card.ci_low, card.ci_high, ".1f"), number(diff and diff.difference, "+.2f")]
            cells += [_interval(diff and diff.ci_low, diff and diff.ci_high, "+.2f")]
            for key in extra:
                value = row.extra.get(key)
                cells += [number(value and value.value, ".3f")]
                cells += [_interval(value and value.ci_low, value and value.ci_high, ".3f")]
            starts = place == 0 or found[place - 1].tokens != row.tokens
            strong = diff is not None and diff.significant
            row_cells = [TableCell(text, strong=strong and column == 4) for column, text in enumerate(cells)]
            rows.append(TableRow(row_cells, starts_group=starts))
        card = found[0].card
        notes = [
            f"Model: {self.model}. {card.questions:,} questions about {found[0].images:,} images. 95% CI: "
            f"bootstrap over images. Difference: to {self.ablation.axis} = {self.ablation.default}, paired; "
            "bold: its interval excludes 0.",
            *([self.ablation.about] if self.ablation.about else []),
        ]
        title = f"{self.ablation.title}: {benchmark.title}"
        return Table(title, header, rows, notes, kinds=("left", "left"))

    def text(self) -> str:
        """Return all tables for a terminal."""
        return "\n\n".join(table.text() for table in self.tables())

    def csv(self) -> str:
        """Return one line per row, numbers not rounded."""
        extra = list(dict.fromkeys(key for row in self.rows for key in row.extra))
        lines = []
        for row in self.rows:
            about = {"ablation": self.name, "model": self.model, **row.document()}
            about["metric"] = get_benchmark(row.card.benchmark).metric
            line = [about[name] for name in _FIELDS]
            for key in extra:
                line += list(row.extra.get(key) or [None] * 3)
            lines.append(line)
        titles = [f"{key}{end}" for key in extra for end in ("", " low", " high")]
        return csv_text([*_FIELDS, *titles], lines)

    def charts(self) -> list[plots.Chart]:
        """Return one chart per benchmark, a line per budget."""
        return [self._chart(benchmark) for benchmark in self.benchmarks]

    def _chart(self, benchmark: Benchmark) -> plots.Chart:
        labels = list(self.ablation.values)
        numeric = self.ablation.numeric
        points = []
        for row in self.of(benchmark):
            if row.card.score is not None:
                x = float(row.label) if numeric else float(labels.index(row.label))
                ends = (row.card.ci_low, row.card.ci_high)
                points.append(plots.ChartPoint(_line(row.tokens), x, row.card.score, *ends))
        return plots.Chart(
            f"{self.ablation.title}: {benchmark.title}",
            self.ablation.axis,
            f"{benchmark.metric} ({benchmark.unit})",
            points,
            [float(label) if numeric else float(place) for place, label in enumerate(labels)],
            scale="linear" if numeric else "names",
            names=() if numeric else labels,
        )

    def files(self) -> dict[str, str]:
        """Return file name -> content of all forms; without matplotlib there are no plots."""
        charts = [chart for chart in self.charts() if chart.points]
        tokens = sorted({row.tokens for row in self.rows}, reverse=True)
        colors = plots.line_colors([_line(budget) for budget in tokens])
        note = "Whiskers: 95% bootstrap intervals over images."
        drawn = plots.charts_html(charts, colors, note)
        parts = [drawn, *(table.html() for table in self.tables())]
        files = {
            f"{self.name}.md": "\n".join(table.markdown() for table in self.tables()),
            f"{self.name}.csv": self.csv(),
            f"{self.name}.html": plots.html_page(f"Ablation: {self.ablation.title}", parts),
        }
        if find_spec("matplotlib") is not None:
            for benchmark, chart in zip(self.benchmarks, self.charts(), strict=True):
                if chart.points:
                    files[f"{self.name}-{benchmark.name}.svg"] = plots.draw(chart, colors, legend=True)
        return files


def _line(tokens: int) -> str:
    return f"{tokens} tokens"


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"

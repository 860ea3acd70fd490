"""A table of the paper with what was measured: joining both, and its forms.

Every published row is one line of a `PaperTable`; where something was measured, the measured numbers and the
differences follow in rows of their own. Cells without a number are empty. The CSV form has one row per cell
instead, with intervals and the file of a measured score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.tables.collect import MeasuredResult, count_models
from llava.eval.tables.plots import SMALL, Chart, Series, charts_html, method_colors, method_label
from llava.eval.tables.published import (
    COLUMNS,
    RATIO,
    TEXT_TOKENS,
    PublishedModel,
    PublishedTable,
    derived_columns,
    prefill_flops,
)
from llava.eval.tables.table import Table, TableCell, TableColumn, TableRow, csv_text

_MARKS = {
    "*": "* not the full set of questions (for Acc. and Rel.: of some column).",
    "+": "+ scored with --fixed, not by the official rule.",
}
_CHART_NOTE = (
    "The dotted line is the published score with all tokens. FLOPs: prefill of the language model, 2 per "
    "multiply-accumulate; measured points as a sweep recorded them, all others from the model's shapes with "
    f"{TEXT_TOKENS} text tokens. FastV's first two layers process all tokens; SparseVLM is left out, because "
    "its tokens per layer are not published. Whiskers: 95% bootstrap intervals over images."
)
_FIELDS = (
    *("table", "model", "method", "important_ratio", "tokens", "column", "published", "measured"),
    *("difference", "low", "high", "visual_tokens", "answered", "full_set", "official_rule", "file"),
)


@dataclass
class PaperLine:
    """One setting of one model: published and measured numbers by column, where there are any."""

    model: str
    method: str
    ratio: float | None  # None: the published one, or a method without
    tokens: int  # in total
    published: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    results: dict[str, MeasuredResult] = field(default_factory=dict)  # of the measured scores

    @property
    def label(self) -> str:
        """The method as papers write it, with its ratio where that is not the usual one."""
        return method_label(self.method, self.ratio)

    @property
    def difference(self) -> dict[str, float]:
        """Measured minus published, where there are both."""
        both = [name for name in self.measured if name in self.published]
        return {name: self.measured[name] - self.published[name] for name in both}

    def marks(self, column: str) -> str:
        """Marks of a measured cell: * not the full set, + scored with --fixed; for a mean, of any part."""
        parts = [self.results[column]] if column in self.results else list(self.results.values())
        part = "*" if any(not one.full_set for one in parts) else ""
        return part + ("+" if any(one.fixed for one in parts) else "")


@dataclass
class PaperTable:
    """A published table with what was measured."""

    published: PublishedTable
    lines: list[PaperLine]
    notes: list[str]

    def table(self) -> Table:
        """Build the table in order of reading; model, method and tokens are shown once for several rows."""
        several = len(self.published.models) > 1
        columns = [TableColumn("model", left=True)] if several else []
        columns += [TableColumn("method", left=True), TableColumn("tokens"), TableColumn("")]
        columns += [TableColumn(COLUMNS[name].title) for name in self.published.columns]
        rows = []
        before: PaperLine | None = None
        for line, kind in self._strips():
            same_model = before is not None and line.model == before.model
            front = ["" if same_model else self.published.models[line.model].title] if several else []
            front += ["", ""] if line is before else [line.label, str(line.tokens)]
            texts = [*front, kind, *(_text(line, kind, name) for name in self.published.columns)]
            cells = [TableCell(text, strong=kind == "measured") for text in texts]
            group = before is None or (line.model, line.tokens) != (before.model, before.tokens)
            rows.append(TableRow(cells, kind, group))
            before = line
        marks = {mark for line in self.lines for name in line.measured for mark in line.marks(name)}
        notes = self.notes + [text for mark, text in _MARKS.items() if mark in marks]
        return Table(self.published.title, columns, rows, notes)

    def _strips(self) -> Iterator[tuple[PaperLine, str]]:
        for line in self.lines:
            for kind in ("published", "measured", "difference"):
                if getattr(line, kind):
                    yield line, kind

    def csv(self) -> str:
        """Return one row per cell of every line."""
        rows = []
        for line in self.lines:
            for name in self.published.columns:
                one = line.results.get(name)
                row = [self.published.name, line.model, line.method, line.ratio, line.tokens, name]
                row += [values.get(name) for values in (line.published, line.measured, line.difference)]
                row += _interval(line, name)
                if one is not None:
                    row += [one.card.visual_tokens, one.card.answered, str(one.full_set).lower()]
                    row += [str(not one.fixed).lower(), one.path]
                rows.append(row + [None] * (len(_FIELDS) - len(row)))
        return csv_text(_FIELDS, rows)

    def html(self) -> str:
        """Return the table and the charts of every model as parts of a page."""
        return "\n".join([self.table().html(), *map(self._charts, self.published.models)])

    def _charts(self, model: str) -> str:
        """Draw the mean against tokens and FLOPs, and every measured benchmark against tokens."""
        mean, title = self.published.mean, self.published.models[model].title
        lines = [line for line in self.lines if line.model == model]
        if mean is None:
            return ""
        about = f"{title}: {COLUMNS[mean].title} against"
        charts = [
            self._chart(lines, mean, f"{about} tokens", False),
            self._chart(lines, mean, f"{about} FLOPs", True),
        ]
        for name in self.published.scored:
            if any(name in line.measured for line in lines):
                charts.append(self._chart(lines, name, f"{title}: {COLUMNS[name].title}", False, SMALL))
        return charts_html(charts, method_colors((line.method, line.ratio) for line in lines), _CHART_NOTE)

    def _chart(
        self, lines: Sequence[PaperLine], column: str, title: str, flops: bool, size: Any = Chart.size
    ) -> Chart:
        series = []
        for measured in (False, True):
            points: dict[str, list[Any]] = {}
            for line in lines:
                value = (line.measured if measured else line.published).get(column)
                x = flops_of(self.published, line, measured) if flops else float(line.tokens)
                if value is not None and x:
                    interval = _interval(line, column) if measured else (None, None)
                    points.setdefault(line.label, []).append((x, value, *interval))
            series += [Series(name, inside, measured) for name, inside in points.items()]
        unit = "points" if column == "mme" else "score" if column.endswith("_score") else "%"
        full = [line.published[column] for line in lines if line.method == "none" and line.published]
        return Chart(
            title,
            "prefill TFLOPs" if flops else "visual tokens",
            f"{COLUMNS[column].title} ({unit})",
            series,
            None if flops else sorted({float(line.tokens) for line in lines}),
            full[0] if full else None,
            size,
        )

    def document(self) -> dict[str, Any]:
        """Return the table as a JSON value."""
        rows = [
            {
                "model": line.model,
                "method": line.method,
                "important_ratio": line.ratio,
                "tokens": line.tokens,
                "published": line.published,
                "measured": line.measured,
                "difference": line.difference,
            }
            for line in self.lines
        ]
        return {
            "table": self.published.name,
            "source": self.published.source,
            "columns": list(self.published.columns),
            "measured_cells": sum(len(line.measured) for line in self.lines),
            "rows": rows,
        }


def build_paper_table(
    table: PublishedTable,
    results: Sequence[MeasuredResult],
    ratio: float = RATIO,
    names: dict[str, set[str]] | None = None,
) -> PaperTable:
    """Join a published table with measured results.

    Args:
        table: The published table.
        results: What was measured. Settings that the paper does not have get lines after those of the same
            number of tokens.
        ratio: Ratio of the measured results to compare with the published ones.
        names: Checkpoint names by model of the table (default: the published ones).
    """
    names = names or {model.name: set(model.checkpoints) for model in table.models.values()}
    lines = {
        (row.model, row.method, row.tokens, None): PaperLine(
            row.model, row.method, None, row.tokens, dict(row.values)
        )
        for row in table.rows
    }
    used: set[Path] = set()
    for model in table.models.values():
        known = {name.lower() for name in names.get(model.name, ())}
        for result in results:
            card = result.card
            cells = _cells(table, model, result) if str(card.model).lower() in known else {}
            if not cells:
                continue
            tokens = model.full_tokens if card.tokens is None else card.tokens * table.tokens_per_budget
            other = None if card.important_ratio == ratio else card.important_ratio
            method = "none" if card.tokens is None else str(card.method)
            line = lines.setdefault(
                (model.name, method, tokens, other), PaperLine(model.name, method, other, tokens)
            )
            used.add(result.path)
            line.measured |= cells
            line.results |= dict.fromkeys(cells, result)
    models = list(table.models)
    ordered = sorted(  # stable: published lines stay in the paper's order
        lines.values(),
        key=lambda line: (
            (models.index(line.model), -line.tokens, not line.published)
            + (() if line.published else (line.method, line.ratio or 0))
        ),
    )
    for line in ordered:
        full = next((one for one in ordered if (one.model, one.method) == (line.model, "none")), None)
        line.measured |= derived_columns(table.columns, line.measured, full.measured if full else None)
    return PaperTable(table, ordered, _notes(table, results, used, ratio))


def _cells(table: PublishedTable, model: PublishedModel, result: MeasuredResult) -> dict[str, float]:
    """Return the numbers that one result has for this table, by column."""
    card = result.card
    found: dict[str, Any] = {}
    for name in table.columns:
        column = COLUMNS[name]
        if column.benchmark == card.benchmark and not result.validation:
            found[name] = card.details.get(column.detail) if column.detail else card.score
    if "flops_T" in table.columns and card.benchmark == "pope":
        # one benchmark, because prompts differ in length; POPE is the most common one
        found["flops_T"] = None if card.llm_gflops is None else card.llm_gflops / 1000
        own = _is_own(model, result)
        elements = result.kv_elements or (2 * model.language[0] * model.language[1] if own else None)
        if card.visual_tokens is not None and elements:
            found["kv_cache_MB"] = 2 * elements * card.visual_tokens / 2**20  # half precision
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _is_own(model: PublishedModel, result: MeasuredResult) -> bool:
    """True if the result is of the published checkpoint, so that the shapes of its model hold."""
    return str(result.card.model).lower() in {name.lower() for name in model.checkpoints}


def _notes(
    table: PublishedTable, results: Sequence[MeasuredResult], used: set[Path], ratio: float
) -> list[str]:
    notes = [f"Published: {table.source}."]
    if "rel" in table.columns:
        notes.append(
            "Acc.: mean of the columns, MME as MME / 2000 x 100. Rel.: 100 x mean of score / score "
            "with all tokens; measured rows are relative to the measured model with all tokens."
        )
    if "vispruner" in {row.method for row in table.rows}:
        notes.append(f"VisPruner: published with r = {RATIO:g}, measured with r = {ratio:g} unless noted.")
    if "flops_T" in table.columns:
        notes.append(
            "FLOPs: 2 per multiply-accumulate. Measured: prefill of the language model for a question of "
            "POPE, and KV cache of the visual tokens in half precision, both computed from the tokens fed to "
            "the language model; published: the whole model with about 80 text tokens. The published rows "
            "of 640 tokens follow from the shapes only with 720."
        )
    shown = count_models([result for result in results if result.path in used])
    other = [result for result in results if result.path not in used]
    if shown:
        notes.append(f"Measured: {', '.join(sorted(shown))}.")
    validation = {one.card.benchmark for one in other if one.validation and one.card.model in shown}
    if validation:
        notes.append(
            f"Validation scores ({', '.join(sorted(validation))}) are not compared with the published ones, "
            "which a server computed on the test set: python -m llava.eval.submit writes its file."
        )
    if other:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(count_models(other).items()))
        notes.append(f"Results not in this table: {listed}; --model shows those of another checkpoint.")
    return notes


def flops_of(table: PublishedTable, line: PaperLine, measured: bool) -> float | None:
    """Return TFLOPs of the prefill of a line: as a sweep recorded them, else from the shapes."""
    results = list(line.results.values()) if measured else []
    recorded = [one.card.llm_gflops for one in results if one.card.llm_gflops is not None]
    if recorded:
        return sum(recorded) / len(recorded) / 1000
    model = table.models[line.model]
    if not all(_is_own(model, one) for one in results):
        return None  # the shapes of another model are unknown
    found = prefill_flops(line.method, line.tokens, model)
    return None if found is None else found / 1e12


def _interval(line: PaperLine, column: str) -> tuple[float | None, float | None]:
    """Return the interval of a measured score; (None, None) for other columns."""
    one, spec = line.results.get(column), COLUMNS[column]
    return (one.card.ci_low, one.card.ci_high) if one and spec.benchmark and not spec.detail else (None, None)


def _text(line: PaperLine, kind: str, column: str) -> str:
    value = getattr(line, kind).get(column)
    if value is None:
        return ""
    text = format(value, f"{'+' if kind == 'difference' else ''}.{COLUMNS[column].digits}f")
    if float(text) == 0:
        text = text.lstrip("+-")
    return text + line.marks(column) if kind == "measured" else text

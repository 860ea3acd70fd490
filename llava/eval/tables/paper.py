"""A table of the paper with what was measured: joining both, and its forms.

Every published row is one line of a `PaperTable`; where something was measured, the measured numbers and the
differences follow in rows of their own. Cells without a number are empty. The CSV form has one row per cell
instead, with intervals and the file of a measured score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from llava.eval.metrics.scorecard import FACTS
from llava.eval.tables.collect import MeasuredResult, rank
from llava.eval.tables.plots import SMALL, Chart, ChartPoint, charts_html, method_colors, method_label
from llava.eval.tables.published import (
    COLUMNS,
    NOTES,
    RATIO,
    PublishedModel,
    PublishedRow,
    PublishedTable,
    derived_columns,
    prefill_flops,
)
from llava.pruning import get_pruner, list_pruners
from llava.pruning.inside.base import DecoderPruner
from llava.table import Table, TableCell, TableRow, csv_text

_SETTING = ("model", "method", "important_ratio", "tokens")
_FIELDS = (
    *("table", *_SETTING, "column", "published", "measured", "difference", "low", "high"),
    *("visual_tokens", "answered", "full_set", "official_rule", "file"),
    *("marks", *FACTS, "reprinted"),
)
_MARKS = "*+#~"
REPRINTED = "^"  # mark of published cells


@dataclass
class PaperLine:
    """One setting of one model: published and measured numbers by column, where there are any."""

    model: str
    method: str
    important_ratio: float | None  # None: the published one, or a method without
    tokens: int  # in total
    row: PublishedRow | None = None
    published: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    results: dict[str, MeasuredResult] = field(default_factory=dict)  # of the measured scores
    unusual: dict[str, str] = field(default_factory=dict)  # marks by column beside those of single results

    @property
    def difference(self) -> dict[str, float]:
        """Measured minus published, where there are both."""
        known = self.published
        return {name: value - known[name] for name, value in self.measured.items() if name in known}

    def marks(self, column: str) -> str:
        """Return the marks of a measured cell, explained by `NOTES`; for a mean, those of any part.

        * not the full set, + scored with --fixed, # another number of visual tokens, ~ another configuration.
        """
        names = [column] if column in self.results else list(self.results)
        parts = [self.results[name] for name in names]
        found = "*" * any(not one.full_set for one in parts) + "+" * any(one.fixed for one in parts)
        found += "".join(self.unusual.get(name, "") for name in {column, *names})
        return "".join(mark for mark in _MARKS if mark in found)

    def is_reprinted(self, column: str) -> bool:
        """True if the published number is one of the predecessor, measured at another number of tokens."""
        return self.row is not None and self.row.is_reprinted(column)

    def interval(self, column: str) -> tuple[float | None, float | None]:
        """Return the interval of a measured score; (None, None) for other columns."""
        one, spec = self.results.get(column), COLUMNS[column]
        known = one is not None and spec.benchmark is not None and not spec.detail
        return (one.card.ci_low, one.card.ci_high) if known else (None, None)

    def label(self) -> str:
        """Return the method as papers write it, with a ratio that is not the published one."""
        return method_label(self.method, self.important_ratio)


@dataclass
class PaperTable:
    """A published table with what was measured."""

    published: PublishedTable
    lines: list[PaperLine]
    notes: list[str]
    warnings: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Build the table in order of reading; model, method and tokens are shown once for several rows."""
        several = len(self.published.models) > 1
        rows = []
        before: PaperLine | None = None
        for line in self.lines:
            same_model = before is not None and line.model == before.model
            group = not same_model or line.tokens != before.tokens
            front = ["" if same_model else self.published.models[line.model].title] if several else []
            front += [line.label(), str(line.tokens)]
            for kind in ("published", "measured", "difference"):
                if getattr(line, kind):
                    texts = [*front, kind, *(self._text(line, kind, name) for name in self.published.columns)]
                    cells = [TableCell(text, strong=kind == "measured") for text in texts]
                    rows.append(TableRow(cells, kind, group))
                    before, front, group = line, [""] * len(front), False
        header = ["model"] * several + ["method", "tokens", ""]
        header += [COLUMNS[name].title for name in self.published.columns]
        marks = {mark for line in self.lines for name in line.measured for mark in line.marks(name)}
        notes = self.notes + [NOTES[mark] for mark in _MARKS if mark in marks] + self._reprints()
        return Table(self.published.title, header, rows, notes, ["left"] * (1 + several))

    def _reprints(self) -> list[str]:
        """Explain the mark of reprinted cells, if there are any."""
        found = []
        for line in self.lines:
            columns = [name for name in self.published.scored if line.is_reprinted(name)]
            if columns and line.row is not None and (of := line.row.reprint):
                shown = ", ".join(COLUMNS[name].title for name in columns)
                source = f"{method_label(of.method, None)} at {of.tokens}"
                found.append(f"{line.label()} at {line.tokens} ({shown}) is its {source}")
        return [NOTES[REPRINTED].format(reprints="; ".join(found))] if found else []

    def _text(self, line: PaperLine, kind: str, column: str) -> str:
        """Return the text of a cell with its marks."""
        value = getattr(line, kind).get(column)
        if value is None:
            return ""
        digits = self.published.digits(column)
        text = format(value, f"{'+' if kind == 'difference' else ''}.{digits}f")
        if float(text) == 0:
            text = text.lstrip("+-")
        if kind == "published":
            return text + REPRINTED * line.is_reprinted(column)
        return text + line.marks(column)

    def csv(self) -> str:
        """Return one row per cell of every line."""
        rows = []
        for line in self.lines:
            for name in self.published.columns:
                row = [self.published.name, *(getattr(line, key) for key in _SETTING), name]
                row += [values.get(name) for values in (line.published, line.measured, line.difference)]
                row += line.interval(name)
                if one := line.results.get(name):
                    row += [one.card.visual_tokens, one.card.answered, str(one.full_set).lower()]
                    row += [str(not one.fixed).lower(), one.path, line.marks(name)]
                    row += [getattr(one.card, fact) for fact in FACTS]
                row += [None] * (len(_FIELDS) - 1 - len(row))
                rows.append([*row, str(line.is_reprinted(name)).lower()])
        return csv_text(_FIELDS, rows)

    def html(self) -> str:
        """Return the table and the charts of every model as parts of a page."""
        return "\n".join([self.table().html(), *map(self._charts, self.published.models)])

    def _charts(self, model: str) -> str:
        """Draw the mean against tokens and FLOPs, and every measured benchmark against tokens."""
        lines = [line for line in self.lines if line.model == model]
        measured = {name for line in lines for name in line.measured}
        charts = []
        means = [name for name in ("acc", "avg_acc", "rel", "rel_acc") if name in self.published.columns]
        for mean in means[:1]:
            charts = [self._chart(lines, mean, f" against {axis}") for axis in ("tokens", "FLOPs")]
            shown = [name for name in self.published.scored if name in measured]
            charts += [self._chart(lines, name, size=SMALL) for name in shown]
        colors = method_colors((line.method, line.important_ratio) for line in lines)
        return charts_html(charts, colors, NOTES["charts"])

    def _chart(self, lines: Sequence[PaperLine], column: str, against: str = "", **options: Any) -> Chart:
        flops, points = against.endswith("FLOPs"), []
        for line in lines:
            label = line.label()
            for measured, values in ((False, line.published), (True, line.measured)):
                x = flops_of(self.published, line, measured) if flops else float(line.tokens)
                if measured and "#" in line.marks(column):
                    continue  # not a point of these tokens
                if column in values and x:
                    interval = line.interval(column) if measured else (None, None)
                    points.append(ChartPoint(label, x, values[column], *interval, measured))
        full = [line.published[column] for line in lines if line.method == "none" and line.published]
        title, unit = COLUMNS[column].title, "score" if column.endswith("_score") else "%"
        return Chart(
            f"{self.published.models[lines[0].model].title}: {title}{against}",
            "prefill TFLOPs" if flops else "visual tokens",
            f"{title} ({'points' if column == 'mme' else unit})",
            points,
            ticks=None if flops else sorted({float(line.tokens) for line in lines}),
            level=full[0] if full else None,
            **options,
        )

    def document(self) -> dict[str, Any]:
        """Return the table as a JSON value."""
        keys = (*_SETTING, "published", "measured", "difference")
        return {
            "table": self.published.name,
            "source": self.published.source,
            "columns": list(self.published.columns),
            "measured_cells": sum(len(line.measured) for line in self.lines),
            "rows": [
                {key: getattr(line, key) for key in keys}
                | {"marks": {name: marks for name in line.measured if (marks := line.marks(name))}}
                | {"reprinted": [name for name in line.published if line.is_reprinted(name)]}
                for line in self.lines
            ],
        }


def build_paper_table(
    table: PublishedTable,
    results: Sequence[MeasuredResult],
    ratio: float = RATIO,
    names: dict[str, set[str]] | None = None,
) -> PaperTable:
    """Join a published table with measured results.

    Args:
        results: What was measured. Settings that the paper does not have get lines after those of the same
            number of tokens.
        ratio: Ratio of the measured results to compare with the published ones.
        names: Checkpoint names by model of the table (default: the published ones).
    """
    names = names or {model.name: set(model.checkpoints) for model in table.models.values()}
    lines: dict[Any, PaperLine] = {}
    for row in table.rows:
        key = (row.model, row.method, None, row.tokens)
        lines[key] = PaperLine(*key, row=row, published=dict(row.values))
    used: set[Path] = set()
    warnings: list[str] = []
    for model in table.models.values():
        known = {name.lower() for name in names.get(model.name, ())}
        own = [one for one in results if one.card.model.lower() in known and one.card.keep is None]
        for result in sorted(own, key=lambda one: (_fits(table, model, one), *rank(one)), reverse=True):
            card, cells = result.card, _cells(table, model, result)
            if cells:
                method = "none" if card.tokens is None else card.method
                other = None if card.important_ratio == ratio else card.important_ratio
                key = (model.name, method, other, _row_tokens(table, model, card.tokens))
                line = lines.setdefault(key, PaperLine(*key))
                if better := next((line.results[name] for name in cells if name in line.results), None):
                    warnings.append(
                        f"{result.path}: left out of {table.name} ({card.visual_tokens} visual tokens), "
                        f"because {better.path} ({better.card.visual_tokens}) has the same setting"
                    )
                    continue
                used.add(result.path)
                if result.doubts:
                    warnings.append(f"{result.path}: shown in {table.name}, but {result.doubts}")
                line.measured |= cells
                line.results |= dict.fromkeys(cells, result)
                if not _fits(table, model, result):
                    line.unusual |= dict.fromkeys(cells, "#")
                    warnings.append(
                        f"{result.path}: marked with # in {table.name}: measured with {card.visual_tokens:g} "
                        f"visual tokens, in the row of {line.tokens}"
                    )
        warnings += _mark_other_facts([line for line in lines.values() if line.model == model.name])
    models = list(table.models)

    def place(line: PaperLine) -> tuple[Any, ...]:
        """Keep the paper's order of published lines; `sorted` is stable."""
        other = () if line.published else (line.method, line.important_ratio or 0)
        return (models.index(line.model), -line.tokens, not line.published, *other)

    ordered = sorted(lines.values(), key=place)
    full = {line.model: line for line in reversed(ordered) if line.method == "none"}
    for line in ordered:
        all_tokens = full.get(line.model)
        derived = derived_columns(table.columns, line.measured, all_tokens and all_tokens.measured)
        line.measured |= derived
        for name in (name for name in derived if COLUMNS[name].relative):
            line.unusual[name] = all_tokens.marks(name)
    return PaperTable(table, ordered, _notes(table, results, used, ratio), warnings)


def _row_tokens(table: PublishedTable, model: PublishedModel, budget: int | None) -> int:
    """Return the total number of visual tokens of the row of a budget."""
    return model.full_tokens if budget is None else budget * table.tokens_per_budget


def _fits(table: PublishedTable, model: PublishedModel, result: MeasuredResult) -> bool:
    """True if the language model was fed the number of visual tokens of the row, or it was not recorded.

    Of a method inside the language model, the recorded number is the mean over layers, which differs from the
    row's: FastV at 128 tokens has 156.
    """
    card, tokens = result.card, _row_tokens(table, model, result.card.tokens)
    if card.visual_tokens is None:
        return True
    expected: float = tokens
    if card.tokens is not None and card.method in list_pruners():
        pruner = get_pruner(card.method, card.tokens)
        if isinstance(pruner, DecoderPruner):
            with suppress(ValueError):  # a budget that this depth cannot have
                crops = table.tokens_per_budget
                expected = fmean(pruner.visual_per_layer(model.language[0], model.full_tokens, crops))
    return abs(card.visual_tokens - expected) < 0.5


def _mark_other_facts(lines: Sequence[PaperLine]) -> list[str]:
    """Mark the cells that were measured with another configuration than most; return a warning for each fact.

    Facts that a score.json of an earlier version does not have are unknown and not compared.
    """
    cells = [(line, name, one.card) for line in lines for name, one in line.results.items()]
    known = [cell for cell in cells if cell[2].dtype is not None]
    warnings = []
    for fact in FACTS:
        counts = Counter(getattr(card, fact) for _, _, card in known)
        if len(counts) > 1:
            usual = counts.most_common(1)[0][0]
            for line, name, card in known:
                if getattr(card, fact) != usual:
                    line.unusual[name] = line.unusual.get(name, "") + "~"
            listed = ", ".join(f"{value} ({count} cells)" for value, count in counts.most_common())
            warnings.append(f"{lines[0].model}: cells were measured with different {fact}: {listed}")
    return warnings


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
        shape = 2 * model.language[0] * model.language[1] if is_own(model, result) else None
        elements = result.kv_elements or shape
        if card.visual_tokens is not None and elements:
            found["kv_cache_MB"] = 2 * elements * card.visual_tokens / 2**20  # half precision
    return {name: float(value) for name, value in found.items() if value is not None}


def is_own(model: PublishedModel, result: MeasuredResult) -> bool:
    """True if the result is of the published checkpoint, so that the shapes of its model hold."""
    return result.card.model.lower() in {name.lower() for name in model.checkpoints}


def _notes(
    table: PublishedTable, results: Sequence[MeasuredResult], used: set[Path], ratio: float
) -> list[str]:
    shown = sorted({one.card.model for one in results if one.path in used})
    other = [one for one in results if one.path not in used]
    left_out = sorted(Counter(one.card.model for one in other).items())
    validation = {one.card.benchmark for one in other if one.validation and one.card.model in shown}
    explained = {*table.columns, *(row.method for row in table.rows)}
    notes = [f"Published: {table.source}."]
    notes += [f"{table.certainty[0].upper()}{table.certainty[1:]}."] if table.certainty else []
    notes += [NOTES["second hand"]] if table.second_hand else []
    notes += [text.format(ratio=ratio) for about, text in NOTES.items() if about in explained]
    notes += [f"Measured: {', '.join(shown)}."] if shown else []
    if validation:
        notes.append(
            f"Validation scores ({', '.join(sorted(validation))}) are not compared with the published ones, "
            "which a server computed on the test set: python -m llava.eval.submit writes its file."
        )
    if left_out:
        listed = ", ".join(f"{name} ({count})" for name, count in left_out)
        notes.append(f"Results not in this table: {listed}; --model shows those of another checkpoint.")
    return notes


def flops_of(table: PublishedTable, line: PaperLine, measured: bool) -> float | None:
    """Return TFLOPs of the prefill of a line: as a sweep recorded them, else from the shapes."""
    results = list(line.results.values()) if measured else []
    recorded = [one.card.llm_gflops for one in results if one.card.llm_gflops is not None]
    if recorded:
        return sum(recorded) / len(recorded) / 1000
    model = table.models[line.model]  # the shapes of another model are unknown
    own = all(is_own(model, one) for one in results)
    found = prefill_flops(line.method, line.tokens, model) if own else None
    return None if found is None else found / 1e12

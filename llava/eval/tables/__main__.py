"""The paper's tables: measured beside published, and the difference.

    python -m llava.eval.tables --table llava-1.5-7b --results outputs --output outputs/tables

Reads every score.json that `llava.eval.run` and `llava.eval.sweep` left under --results, and writes
OUTPUT/TABLE.md, .csv (one line per cell), .tex, and one self-contained HTML page with accuracy against tokens
and against FLOPs. A cell that was not measured is empty; Acc. and Rel. are measured only where every column
is. Rel. is against the same model with all tokens as measured here. Only results of the table's own
checkpoints stand beside its numbers; --model names others. The last line of standard output is one JSON
document. Does not run anything: what is missing, the scripts under scripts/v1_5/eval measure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava import argtypes
from llava.eval.benchmarks.base import DataError
from llava.eval.cli import guarded, model_name
from llava.eval.store.atomic import write_atomically
from llava.eval.tables.collect import Result, models_of, read_results
from llava.eval.tables.published import (
    COLUMNS,
    RATIO,
    Model,
    Row,
    Table,
    load_published,
    prefill_flops,
    restrict,
    summarise,
)

ALL = "all"


@dataclass
class Line:
    """One row of a table: what is published, what was measured, by column; absent where there is none."""

    model: str
    method: str
    ratio: float | None  # None: the published one, or a method without
    tokens: int  # in total
    published: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)  # behind the measured scores

    @property
    def difference(self) -> dict[str, float]:
        """Measured less published, where there are both."""
        return {
            name: value - self.published[name]
            for name, value in self.measured.items()
            if name in self.published
        }

    def doubts(self, column: str) -> str:
        """Marks of a measured cell: * not the full set, + scored with --fixed; of any part for a mean."""
        parts = [self.results[column]] if column in self.results else list(self.results.values())
        return "".join(
            mark
            for mark, bites in (
                ("*", any(not one.whole for one in parts)),
                ("+", any(one.fixed for one in parts)),
            )
            if bites
        )


@dataclass
class Report:
    """A table with what was measured."""

    table: Table
    lines: list[Line]
    notes: list[str]


def build_report(
    table: Table, results: Sequence[Result], ratio: float = RATIO, names: dict[str, set[str]] | None = None
) -> Report:
    """Lines of a table: the published ones, and after those of the same budget what else was measured.

    ratio: that of the measured rows to set beside the published. names: checkpoint names by model of the
    table; default: its own.
    """
    names = names or {model.name: set(model.checkpoints) for model in table.models.values()}
    lines = {(row.model, row.method, row.tokens, None): _published_line(row) for row in table.rows}
    used: set[Path] = set()
    for model in table.models.values():
        lower = {name.lower() for name in names.get(model.name, ())}
        for result in results:
            if result.model.lower() not in lower:
                continue
            tokens = _total(result, table, model)
            other = None if result.ratio is None or result.ratio == ratio else result.ratio
            method = "none" if tokens == model.full_tokens and result.budget is None else result.method
            key = (model.name, method, tokens, other)
            cells = _cells(table, model, result)
            if not cells:
                continue
            line = lines.setdefault(key, Line(model.name, method, other, tokens))
            used.add(result.path)
            for name, value in cells.items():
                line.measured[name] = value
                line.results[name] = result
    ordered = _in_order(table, list(lines.values()))
    for line in ordered:
        whole = next((one for one in ordered if (one.model, one.method) == (line.model, "none")), None)
        derived = summarise(table.columns, line.measured, whole.measured if whole else None)
        line.measured |= {name: value for name, value in derived.items() if value is not None}
    return Report(table, ordered, _notes(table, results, used, ratio))


def _published_line(row: Row) -> Line:
    return Line(row.model, row.method, None, row.tokens, dict(row.values))


def _total(result: Result, table: Table, model: Model) -> int:
    """Tokens of a budget in total, as the paper counts them."""
    return model.full_tokens if result.budget is None else result.budget * table.tokens_per_budget


def _cells(table: Table, model: Model, result: Result) -> dict[str, float]:
    """What one result says in this table, by column."""
    found: dict[str, Any] = {}
    for name in table.columns:
        column = COLUMNS[name]
        if column.benchmark == result.benchmark and not result.validation:
            found[name] = result.details.get(column.detail) if column.detail else result.score
    if "flops_T" in table.columns and result.benchmark == "pope":
        # one benchmark, because prompts differ in length; POPE is the one that everybody has
        found["flops_T"] = None if result.gflops is None else result.gflops / 1000
        own = result.model.lower() in {name.lower() for name in model.checkpoints}
        elements = result.kv_elements or (2 * model.language[0] * model.language[1] if own else None)
        if result.visual_tokens is not None and elements:
            found["kv_cache_MB"] = 2 * elements * result.visual_tokens / 2**20  # half precision
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _in_order(table: Table, lines: list[Line]) -> list[Line]:
    """By model, then budgets falling, then published before what the paper has not."""
    models = list(table.models)
    place = {id(line): number for number, line in enumerate(lines)}
    return sorted(
        lines,
        key=lambda line: (
            models.index(line.model),
            -line.tokens,
            not line.published,
            line.method if not line.published else "",
            line.ratio or 0,
            place[id(line)],
        ),
    )


def _notes(table: Table, results: Sequence[Result], used: set[Path], ratio: float) -> list[str]:
    notes = [f"Published: {table.source}."]
    if "rel" in table.columns:
        notes.append(
            "Acc.: mean of the columns, MME as MME / 2000 x 100. Rel.: 100 x mean of score / score "
            "with all tokens, measured rows against the measured."
        )
    if "vispruner" in {row.method for row in table.rows}:
        notes.append(f"VisPruner: published with r = {RATIO:g}, measured with r = {ratio:g} unless said.")
    if "flops_T" in table.columns:
        notes.append(
            "FLOPs: 2 per multiply-accumulate. Measured: the language model's prefill of a question "
            "of POPE, KV cache of the visual tokens in half precision, both reckoned from the "
            "tokens that really entered; published: everything, of about 80 text tokens. The "
            "published rows of 640 tokens follow from the shapes only with 720."
        )
    mine = models_of([result for result in results if result.path in used])
    if mine:
        notes.append(f"Measured: {', '.join(sorted(mine))}.")
    here = sorted(
        {
            result.benchmark
            for result in results
            if result.validation and result.model in mine and result.path not in used
        }
    )
    if here:
        notes.append(
            f"Validation scores ({', '.join(here)}) do not stand beside the published ones, which a "
            "server made of the test set: python -m llava.eval.submit writes its file."
        )
    other = models_of([result for result in results if result.path not in used])
    if other:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(other.items()))
        notes.append(f"Results without a place in this table: {listed}; --model shows another checkpoint's.")
    return notes


def flops_of(table: Table, line: Line, measured: bool) -> float | None:
    """TFLOPs of the prefill of a line, for the plots: as a sweep recorded it, else from the shapes."""
    recorded = [one.gflops for one in line.results.values() if one.gflops is not None] if measured else []
    if recorded:
        return sum(recorded) / len(recorded) / 1000
    own = {name.lower() for name in table.models[line.model].checkpoints}
    if measured and any(one.model.lower() not in own for one in line.results.values()):
        return None  # another model's shapes are not known here
    found = prefill_flops(line.method, line.tokens, table.models[line.model])
    return None if found is None else found / 1e12


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", default=ALL, help="one, several by commas, or all (default)")
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders with score.json files at any depth (default: outputs, if it is there)",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs", "tables"))
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[ROW=]NAME",
        help="checkpoint whose results to show (folder or its name), instead of the table's "
        "own; ROW is the table's model, where it has several; may be repeated",
    )
    parser.add_argument(
        "--ratio",
        type=argtypes.ratio,
        default=RATIO,
        help="r of the rows beside the published (default %(default)s)",
    )
    parser.add_argument("--columns", help="only these benchmarks, by commas; Acc. and Rel. over them")
    return parser


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _plain(name: str) -> str:
    """llava_1_5_7b and LLaVA-1.5-7B are one table."""
    return "".join(character for character in name.lower() if character.isalnum())


def _chosen(text: str, tables: dict[str, Table]) -> list[Table]:
    if text.strip().lower() == ALL:
        return list(tables.values())
    by_name = {_plain(name): table for name, table in tables.items()}
    found = {}
    for name in _names(text):
        if _plain(name) not in by_name:
            raise ValueError(f"--table {name}: no such table; there are {', '.join(tables)} and {ALL}")
        found[name] = by_name[_plain(name)]
    if not found:
        raise ValueError(f"--table names no table; there are {', '.join(tables)} and {ALL}")
    return list(found.values())


def _checkpoints(given: Sequence[str], tables: Sequence[Table]) -> list[dict[str, set[str]] | None]:
    """Checkpoint names by model of every table, None where none were given for it. Raises ValueError."""
    found: list[dict[str, set[str]]] = [{} for _ in tables]
    for text in given:
        row, _, name = text.rpartition("=")
        fits = False
        for table, names in zip(tables, found, strict=True):
            model = row or (next(iter(table.models)) if len(table.models) == 1 else "")
            if model in table.models:
                fits = True
                names.setdefault(model, set()).add(model_name(name.rstrip("/")))
        if not fits:
            models = dict.fromkeys(model for table in tables for model in table.models)
            raise ValueError(
                f"--model {text}: say which model of the table it stands for: "
                f"{', '.join(f'{model}=NAME' for model in models)}"
            )
    return [names or None for names in found]


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        tables = _chosen(args.table, load_published())
        if args.columns is not None:
            tables = [restrict(table, _names(args.columns)) for table in tables]
        names = _checkpoints(args.model, tables)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        parser.error(str(error))
    folders = args.results or [folder for folder in [Path("outputs")] if folder.is_dir()]
    results, warnings = read_results(folders)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    reports = [
        build_report(table, results, args.ratio, given) for table, given in zip(tables, names, strict=True)
    ]
    from llava.eval.tables import paper_forms as forms

    args.output.mkdir(parents=True, exist_ok=True)
    files = []
    for report in reports:
        print(forms.as_text(report) + "\n")
        for suffix, form in (("md", forms.as_markdown), ("csv", forms.as_csv), ("tex", forms.as_latex)):
            files.append(args.output / f"{report.table.name}.{suffix}")
            write_atomically(files[-1], form(report))
    files.append(args.output / f"{reports[0].table.name if len(reports) == 1 else 'tables'}.html")
    write_atomically(files[-1], forms.as_html(reports))
    print(f"written: {', '.join(str(file) for file in files)}")
    print(
        json.dumps(
            {
                "tables": [_document(report) for report in reports],
                "results": len(results),
                "files": [str(file) for file in files],
                "warnings": warnings,
            }
        )
    )
    return 0


def _document(report: Report) -> dict[str, Any]:
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
        for line in report.lines
    ]
    return {
        "table": report.table.name,
        "source": report.table.source,
        "columns": list(report.table.columns),
        "measured_cells": sum(len(line.measured) for line in report.lines),
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())

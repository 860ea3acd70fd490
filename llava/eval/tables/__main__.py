"""Compare measured scores with the paper's tables.

    python -m llava.eval.tables --table llava-1.5-7b --results outputs --output outputs/tables

Reads every score.json that `llava.eval.run` and `llava.eval.sweep` left under --results, and writes
OUTPUT/TABLE.md, .csv (one row per cell), .tex, and one self-contained HTML page with charts of accuracy
against tokens and FLOPs. A cell that was not measured is empty; Acc. and Rel. are measured only where every
column is. Measured Rel. is relative to the same model with all tokens as measured here. Only results of the
table's own checkpoints are compared with its numbers; --model names others. The last line of standard output
is one JSON document. No model is run; scripts/v1_5/eval measures what is missing.

--verdict adds a verdict on every published number: equal, inside or outside of the measured interval, without
an interval, reprinted, not comparable (another model or part of the set) or missing; also as
OUTPUT/TABLE_verdict.md and .csv.

--table fastervlm shows the tables of the paper's predecessor, and --table others the runs of other people,
which are second hand and get no verdict. Neither is part of "all".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava import argtypes
from llava.eval.cli import guarded, new_parser
from llava.eval.jobs.job import model_name
from llava.eval.store.atomic import write_atomically
from llava.eval.tables.collect import read_results
from llava.eval.tables.paper import build_paper_table
from llava.eval.tables.plots import html_page
from llava.eval.tables.published import RATIO, PublishedTable, load_further, load_published, restrict
from llava.eval.tables.verdict import (
    CellVerdict,
    count_statuses,
    verdict_csv,
    verdict_documents,
    verdict_table,
    verdicts,
)

ALL = "all"
GROUPS = ("fastervlm", "others")  # prefixes of the names of further tables


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    parser = new_parser("tables", __doc__)
    parser.add_argument(
        "--table",
        default=ALL,
        help=f"{', '.join(load_published())}, several by commas, or all of these (default); "
        f"{' or '.join(GROUPS)}, or one of {', '.join(load_further())}",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders with score.json files at any depth (default: outputs, if it exists)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs", "tables"),
        metavar="DIR",
        help="folder to write to (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[ROW=]NAME",
        help="checkpoint (folder or name) whose results to show instead of those of the table's own "
        "checkpoint; ROW is the table's model, where it has several; may be repeated",
    )
    parser.add_argument(
        "--ratio",
        type=argtypes.ratio,
        default=RATIO,
        help="ratio of the measured rows to compare with the published ones (default: %(default)s)",
    )
    parser.add_argument(
        "--verdict", action="store_true", help="also give a verdict on every published number"
    )
    parser.add_argument(
        "--columns",
        metavar="NAMES",
        help="show only these benchmarks, by commas, with Acc. and Rel. over them (default: all)",
    )
    return parser


_names = argtypes.comma_separated()


def choose_tables(text: str) -> list[PublishedTable]:
    """Return the tables that --table names, as llava_1_5_7b or LLaVA-1.5-7B. Raises ValueError."""

    def plain(name: str) -> str:
        return "".join(character for character in name.lower() if character.isalnum())

    paper, further = load_published(), load_further()
    groups = {ALL: list(paper.values())}
    for group in GROUPS:
        groups[group] = [table for name, table in further.items() if name.startswith(f"{group}-")]
    groups |= {name: [table] for name, table in (paper | further).items()}
    by_name = {plain(name): tables for name, tables in groups.items()}
    found: dict[str, PublishedTable] = {}
    for name in _names(text) or [text]:
        if plain(name) not in by_name:
            raise ValueError(f"--table {name}: no such table. Choose from {', '.join(groups)}.")
        found |= {table.name: table for table in by_name[plain(name)]}
    return list(found.values())


def _checkpoints(given: Sequence[str], table: PublishedTable) -> dict[str, set[str]]:
    """Return the names of checkpoints that --model gives for models of a table."""
    found: dict[str, set[str]] = {}
    for text in given:
        row, _, name = text.rpartition("=")
        for model in table.models:
            if row == model or (not row and len(table.models) == 1):
                found.setdefault(model, set()).add(model_name(name.rstrip("/")))
    return found


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        chosen = choose_tables(args.table)
        if args.columns is not None:
            chosen = [restrict(table, _names(args.columns)) for table in chosen]
        known = dict.fromkeys(f"{model}=NAME" for table in chosen for model in table.models)
        for text in args.model:
            if not any(_checkpoints([text], table) for table in chosen):
                raise ValueError(f"--model {text}: no table has this model. Choose from {', '.join(known)}.")
    except ValueError as error:
        parser.error(str(error))
    results, warnings = read_results(args.results or filter(Path.is_dir, [Path("outputs")]))
    tables = [
        build_paper_table(table, results, args.ratio, _checkpoints(args.model, table)) for table in chosen
    ]
    warnings += [warning for one in tables for warning in one.warnings]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    files: dict[Path, str] = {}
    found: list[CellVerdict] = []
    parts: list[str] = []
    for one in tables:
        form, stem = one.table(), args.output / one.published.name
        print(form.text() + "\n")
        parts.append(one.html())
        if args.verdict and not one.published.second_hand:
            own = verdicts(one)
            judged = verdict_table(one, own)
            print(judged.text() + "\n")
            parts.append(judged.html())
            files[Path(f"{stem}_verdict.md")] = judged.markdown()
            files[Path(f"{stem}_verdict.csv")] = verdict_csv(own)
            found += own
        files[Path(f"{stem}.md")] = form.markdown()
        files[Path(f"{stem}.csv")] = one.csv()
        files[Path(f"{stem}.tex")] = form.latex()
    single = tables[0].published if len(tables) == 1 else None
    title = "Measured and published scores" + (f": {single.title}" if single else "")
    page = args.output / f"{single.name if single else 'tables'}.html"
    files[page] = html_page(title, parts)
    for path, text in files.items():
        write_atomically(path, text)
    print(f"written: {', '.join(map(str, files))}")
    document: dict[str, Any] = {"tables": [one.document() for one in tables], "results": len(results)}
    if args.verdict:
        by_table = {name: [cell for cell in found if cell.table == name] for name in {c.table for c in found}}
        document["verdict"] = {
            "counts": count_statuses(found),
            "by_table": {name: count_statuses(cells) for name, cells in sorted(by_table.items())},
            "cells": verdict_documents(found),
        }
    print(json.dumps({**document, "files": [str(path) for path in files], "warnings": warnings}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How a run ends: the score of its answer file, a table, one JSON document, and the file for a server.

Knows how answers are counted and shown, not how they were made or by how many processes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval import cli, submit
from llava.eval.benchmarks import Benchmark, DataIssue
from llava.eval.benchmarks.base import DataError
from llava.eval.score import print_score
from llava.eval.store.atomic import write_atomically


def finish(
    benchmark: Benchmark,
    folder: Path,
    answers: Path,
    asked: int,
    problems: Sequence[DataIssue],
    cost: dict[str, Any],
    fixed: bool,
    submission: bool = False,
) -> int:
    """Score a finished answer file, print table and JSON, keep the JSON beside the answers; the exit code.

    asked: number of questions. cost: what asking cost this time, for the document. submission: write the
    file that the benchmark's server takes, too; where it cannot be made, a warning says why.
    """
    if not answers.exists():
        print("error: no question could be answered", file=sys.stderr)
        return 1
    rows = benchmark.read_answers(answers)
    handed_in, warnings = _submission(benchmark, folder, rows, answers) if submission else (None, [])
    score = benchmark.score(folder, rows, fixed=fixed)
    metadata = rows[0]["metadata"]
    visual = sum(row["metadata"]["visual_tokens"] for row in rows) / len(rows)
    print_score(score)
    for warning in warnings:
        if warning not in score.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    rate = cost["asked"] / cost["seconds"] if cost["asked"] else _earlier_rate(answers, metadata["config"])
    print(
        cli.table(
            ["method", "r", "tokens", benchmark.metric, "real tokens", "answered", "q/s"],
            [
                [
                    metadata["method"],
                    cli.cell(metadata.get("important_ratio"), "g"),
                    "all" if metadata["tokens"] is None else str(metadata["tokens"]),
                    cli.cell(score.score, ".2f"),
                    f"{visual:.1f}",
                    f"{len(rows)}/{asked}",
                    cli.cell(rate, ".1f"),
                ]
            ],
        )
    )
    document = {
        **score.document(),
        "method": metadata["method"],
        "tokens": metadata["tokens"],
        "important_ratio": metadata.get("important_ratio"),
        "visual_tokens": visual,
        "model": metadata["model"],
        "answered": len(rows),
        "questions": asked,
        "failures": [str(problem) for problem in problems],
        **cost,
        "questions_per_second": rate,
        "answers": str(answers),
        "config": metadata["config"],
    }
    if submission:
        document["submission"] = handed_in
    write_atomically(answers.with_name("score.json"), json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return 1 if problems else 0


def _submission(
    benchmark: Benchmark, folder: Path, rows: list[dict[str, Any]], answers: Path
) -> tuple[str | None, list[str]]:
    """(path, warnings); before anything is scored, as the server needs no number of ours."""
    try:
        made, path = submit.write(benchmark, folder, rows, answers)
    except DataError as error:
        return None, [f"no file for a server: {error}"]
    print(f"{made.rows} answers for {made.server}: {path}")
    return str(path), made.warnings


def _earlier_rate(answers: Path, config: str) -> float | None:
    """Questions/s of the run that made these answers, if it left its score beside them."""
    try:
        document = json.loads(answers.with_name("score.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document.get("questions_per_second") if document.get("config") == config else None

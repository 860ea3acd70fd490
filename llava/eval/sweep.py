"""A whole grid in one pass over the pictures: methods x tokens x ratios, one table with intervals.

    python -m llava.eval.sweep --benchmarks pope,gqa --methods none,random,fastervlm,vispruner \\
        --tokens 128,64,32 --ratios 0.5,0 --output outputs/sweep

The model is loaded once, every picture is decoded and encoded once for all cells, and (as far as
--vision-cache goes) for all benchmarks that show it. `none` is one cell at full length; ratios multiply only
methods that have one. Every cell has its own folder OUTPUT/BENCHMARK/CELL with answers.jsonl and score.json;
finished cells are skipped on restart, interrupted ones go on. A cell or benchmark that fails stops no other;
failures are listed at the end, and the exit code is then 1. Sets whose number comes from elsewhere keep their
answers. Without --model or --data the embedded ones serve. The last line of standard output is one JSON
document.

Columns: score with its 95% bootstrap interval over pictures; visual tokens that really entered the language
model (mean); GFLOPs of the language model's prefill per question (2 FLOPs per multiply-accumulate, visual
and text tokens, nothing shared); questions/s of the cell as if it had run alone (its own pruning,
projecting and answering, plus decoding and encoding its pictures), and without decoding and encoding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava import argtypes
from llava.eval import cli
from llava.eval.benchmarks import (
    Benchmark,
    DataError,
    Question,
    benchmark_name,
    get_benchmark,
    list_benchmarks,
)
from llava.eval.jobs.cells import Cell, Session, fill, score
from llava.eval.metrics.scorecard import Scorecard
from llava.eval.metrics.statistics import paired_bootstrap
from llava.eval.run import add_source_arguments, fixed_for_part, read_benchmark
from llava.eval.tables.summary import ScoredBenchmark, ScoredSetting, build_summary, write_summary
from llava.eval.tables.table import number, text_table

_SHOWN = 50  # failures


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--benchmarks", type=_benchmarks, default=["pope"], help=f"of {', '.join(list_benchmarks())}"
    )
    parser.add_argument("--methods", type=_names, default=["none", "random", "fastervlm", "vispruner"])
    parser.add_argument("--tokens", type=_list(argtypes.tokens), default=[128, 64, 32])
    parser.add_argument("--ratios", type=_list(argtypes.ratio), default=[0.5, 0.0])
    add_source_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs", "sweep"))
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write a page over all sets there: grid.html, .md, .csv and .tex",
    )
    parser.add_argument("--fixed", action="store_true", help="mend plain bugs of the official scoring rules")
    parser.add_argument("--resamples", type=argtypes.at_least(100), default=2000, help="of the bootstrap")
    parser.add_argument(
        "--vision-cache",
        type=argtypes.at_least(0),
        default=2048,
        metavar="MIB",
        help="memory for pictures that several benchmarks show (default %(default)s)",
    )
    cli.add_model_arguments(parser)
    cli.add_asking_arguments(parser)
    return parser


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _benchmarks(text: str) -> list[str]:
    return [benchmark_name(name) for name in _names(text)]


def _list(kind: Any) -> Any:
    return lambda text: [kind(part) for part in _names(text)]


def grid(
    methods: Sequence[str], budgets: Sequence[int | str], ratios: Sequence[float], seed: int
) -> list[Any]:
    """Pruners of all cells, each once, in the order of the table. Raises ValueError."""
    from llava.pruning import get_pruner

    cells: dict[Any, None] = {}
    for budget in budgets:
        for method in methods:
            for given in ratios or [0.5]:
                full = budget == "none" or method == "none"
                get_pruner(method)  # complains about a wrong name even where the budget is none
                share = _used(method, given)
                pruner = get_pruner("none") if full else get_pruner(method, budget, share, seed)
                cells[pruner] = None
    if not cells:
        raise ValueError("nothing to do: --methods and --tokens must name at least one each")
    return list(cells)


def _used(method: str, share: float) -> float:
    """The ratio where it matters; one constant elsewhere, so that equal cells are equal."""
    from llava.pruning import get_pruner

    return share if get_pruner(method, 1).uses_ratio else 0.5


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        benchmarks = [get_benchmark(name) for name in dict.fromkeys(args.benchmarks)]
    except ValueError as error:
        parser.error(str(error))
    several = args.data is not None and len(benchmarks) > 1
    if several and any(one.owns(args.data) for one in benchmarks):
        parser.error("--data is the folder of one benchmark; for several give the folder above")
    cli.announce_embedded(args.model is None, args.data is None)
    model = cli.model_folder(args, parser)
    # pictures that several benchmarks show are encoded once; within one the engine sees to that
    session = Session(args, model, args.vision_cache << 20 if len(benchmarks) > 1 else 0)
    read = _read(session, benchmarks)
    try:
        pruners = grid(args.methods, args.tokens, args.ratios, args.seed)
        cli.resolve_device(args, model)
        cli.check_conv_mode(args.conv_mode)
    except ValueError as error:
        parser.error(str(error))
    args.anyres = args.anyres or _common_anyres(model)
    args.fixed = fixed_for_part(args)
    tables, unscored, measured = [], [], []
    for benchmark, folder, questions in read:
        try:
            cells, vision = fill(session, benchmark, questions, pruners)
            scored = _scored(session, benchmark, folder, cells)
            if scored is None:
                unscored.append(benchmark)
            else:
                settings = [
                    ScoredSetting(cell.name, Scorecard.of_document(cell.document), cell.tallies)
                    for cell in scored
                ]
                measured.append(ScoredBenchmark(benchmark, folder, questions, settings))
                tables.append(_show(args, benchmark, questions, scored, vision))
        except cli.ModelError:  # without a model no benchmark can be asked
            raise
        except Exception as error:
            session.fail(benchmark.title, error)
    report = {}
    if args.report is not None and any(one.settings for one in measured):
        titles = [benchmark.title for benchmark in unscored]
        report = _report(args, cli.model_name(model), measured, titles)
    if session.failures:
        print(f"{len(session.failures)} failures:", file=sys.stderr)
        for failure in session.failures[:_SHOWN]:
            print(f"  {failure}", file=sys.stderr)
        if len(session.failures) > _SHOWN:
            print(f"  ... and {len(session.failures) - _SHOWN} more", file=sys.stderr)
    print(
        json.dumps(
            {
                "model": cli.model_name(model),
                "tables": tables,
                "output": str(args.output),
                "unscored": [benchmark.name for benchmark in unscored],
                **report,
                "failures": session.failures,
            }
        )
    )
    return 1 if session.failures or any(not table["cells"] for table in tables) else 0


def _read(session: Session, benchmarks: Sequence[Benchmark]) -> list[tuple[Benchmark, Path, list[Question]]]:
    """Folder and questions of every benchmark that can be read; one alone that cannot raises DataError."""
    found = []
    for benchmark in benchmarks:
        try:
            folder, questions, problems = read_benchmark(benchmark, session.args.data, session.args.limit)
        except DataError as error:
            if len(benchmarks) == 1:
                raise
            session.fail(benchmark.title, error)
            continue
        session.failures += [str(problem) for problem in problems]
        found.append((benchmark, folder, questions))
    if not found:
        raise DataError("none of the benchmarks can be asked")
    return found


def _scored(session: Session, benchmark: Benchmark, folder: Path, cells: Sequence[Cell]) -> list[Cell] | None:
    """The cells that have a score; None where the benchmark gives none here."""
    warned: set[str] = set()
    found = []
    for cell in cells:
        if not (cell.folder / "answers.jsonl").exists():
            continue
        try:
            found.append(score(session.args, cell, benchmark, folder, warned))
        except DataError as error:  # test-dev sets and judged ones: the answers are there, the number is not
            print(f"{benchmark.title}: no number here: {error}", flush=True)
            return None
        except Exception as error:
            session.fail(f"{benchmark.title}, {cell.name}", error)
    return found


def _report(
    args: argparse.Namespace, model: str, measured: Sequence[ScoredBenchmark], unscored: Sequence[str]
) -> dict[str, Any]:
    """Write the summary over all benchmarks and print it; return its part of the JSON document."""
    summary = build_summary(model, measured, unscored, args.resamples, args.seed)
    files = [str(path) for path in write_summary(summary, args.report)]
    print(f"\n{summary.text()}\n\nwritten: {', '.join(files)}")
    return {"files": files, **summary.document()}


def _common_anyres(model: Path | str) -> str | None:
    """One way to cut pictures for all cells of an anyres model, the published tables': one pass needs one."""
    if isinstance(model, Path):
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        if config.get("image_aspect_ratio") == "anyres" or "image_grid_pinpoints" in config:
            return "paper"
    return None


def _show(
    args: argparse.Namespace,
    benchmark: Benchmark,
    questions: Sequence[Question],
    cells: Sequence[Cell],
    vision: dict[str, Any],
) -> dict[str, Any]:
    """Print paired differences and the table; the table as a JSON value."""
    paired = _paired(args, benchmark, cells)
    if paired:
        print(
            "\n"
            + text_table(
                ["paired difference", "tokens", benchmark.metric, "95% interval"],
                [
                    [
                        f"{row['a']} - {row['b']}",
                        str(row["tokens"]),
                        f"{row['difference']:+.2f}",
                        f"[{row['low']:+.2f}, {row['high']:+.2f}]",
                    ]
                    for row in paired
                ],
            )
        )
    images = len({question.image for question in questions})
    shared = ""
    if vision:
        shared = f": {vision['seconds']:.0f} s for {vision['images']} pictures"
        shared += f", {vision['reused']} were encoded before" if vision["reused"] else ""
    print(
        f"\n{benchmark.title}: {len(questions)} questions about {images} pictures; intervals: 95% "
        "bootstrap over pictures.\nLLM GFLOPs: prefill of one question, 2 per multiply-accumulate, visual "
        "and text tokens.\nq/s: the cell alone, decoding and encoding of its pictures included; w/o "
        f"vision: without those, which\nare shared in this pass{shared}.\n"
    )
    rows = []
    for cell in cells:
        found, speed = cell.document, cell.document["speed"] or {}
        rows.append(
            [
                found["method"],
                number(found.get("important_ratio"), "g"),
                "all" if found["tokens"] is None else str(found["tokens"]),
                number(found["score"], ".2f"),
                f"[{found['low']:.1f}, {found['high']:.1f}]",
                f"{found['visual_tokens']:.1f}",
                number(found["llm_gflops"], ".3g"),
                number(speed.get("questions_per_second"), ".0f"),
                number(speed.get("questions_per_second_without_vision"), ".0f"),
            ]
        )
    print(
        text_table(
            [
                "method",
                "r",
                "tokens",
                benchmark.metric,
                "95% interval",
                "real tokens",
                "LLM GFLOPs",
                "q/s",
                "w/o vision",
            ],
            rows,
        )
    )
    documents = [
        {key: value for key, value in cell.document.items() if key not in ("details", "gflops")}
        for cell in cells
    ]
    return {
        "benchmark": benchmark.name,
        "questions": len(questions),
        "images": images,
        "vision": vision,
        "cells": documents,
        "paired": paired,
    }


def _paired(args: argparse.Namespace, benchmark: Benchmark, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """VisPruner at the first ratio against every other cell of its budget, and against none."""
    found = []
    ours = [cell for cell in cells if cell.pruner.name == "vispruner"]
    ours = [cell for cell in ours if cell.pruner.important_ratio == ours[0].pruner.important_ratio]
    for a in ours:
        for b in cells:
            same_pictures = set(a.tallies.images) == set(b.tallies.images)
            if b is a or b.pruner.tokens not in (None, a.pruner.tokens) or not same_pictures:
                continue
            result = paired_bootstrap(a.tallies, b.tallies, benchmark.score_counts, args.resamples, args.seed)
            found.append(
                {
                    "a": a.name,
                    "b": b.name,
                    "tokens": a.pruner.tokens,
                    "difference": result.difference,
                    "low": result.low,
                    "high": result.high,
                    "separates": result.separates,
                }
            )
    return found


if __name__ == "__main__":
    sys.exit(main())

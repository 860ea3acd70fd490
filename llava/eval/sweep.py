"""A whole grid in one pass over the pictures: methods x tokens x ratios, one table with intervals.

    python -m llava.eval.sweep --benchmarks pope --methods none,random,fastervlm,vispruner \\
        --tokens 128,64,32 --ratios 0.5,0 --output outputs/sweep

The model is loaded once, every picture is decoded and encoded once for all cells. `none` is one cell at
full length; ratios multiply only methods that have one. Every cell has its own folder OUTPUT/BENCHMARK/CELL
with answers.jsonl and score.json; finished cells are skipped on restart, interrupted ones go on. Without
--model or --data the embedded ones serve. The last line of standard output is one JSON document.

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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava import arguments
from llava.eval import cli
from llava.eval.answers import AnswerFile
from llava.eval.benchmarks import (
    Benchmark,
    DataError,
    Problem,
    Question,
    Tallies,
    get_benchmark,
    list_benchmarks,
)
from llava.eval.parts import write_atomically
from llava.eval.run import add_source_arguments, fixed_for_part, read_benchmark, setting_name
from llava.eval.statistics import bootstrap_interval, paired_bootstrap

_PROMPTS = 256  # questions whose prompts are measured for the FLOPs


@dataclass
class Cell:
    """One row of the table."""

    name: str
    pruner: Any
    folder: Path
    file: AnswerFile
    document: dict[str, Any]  # of score.json, once there
    tallies: Tallies | None = None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.sweep", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", type=_names, default=["pope"],
                        help=f"of {', '.join(list_benchmarks())}")
    parser.add_argument("--methods", type=_names, default=["none", "random", "fastervlm", "vispruner"])
    parser.add_argument("--tokens", type=_list(arguments.tokens), default=[128, 64, 32])
    parser.add_argument("--ratios", type=_list(arguments.ratio), default=[0.5, 0.0])
    add_source_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs", "sweep"))
    parser.add_argument("--fixed", action="store_true", help="mend plain bugs of the official scoring rules")
    parser.add_argument("--resamples", type=arguments.at_least(100), default=2000, help="of the bootstrap")
    cli.add_model_arguments(parser)
    cli.add_asking_arguments(parser)
    return parser


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


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
        benchmarks = [get_benchmark(name) for name in args.benchmarks]
    except ValueError as error:
        parser.error(str(error))
    several = args.data is not None and len(benchmarks) > 1
    if several and any(one.owns(args.data) for one in benchmarks):
        parser.error("--data is the folder of one benchmark; for several give the folder above")
    cli.announce_embedded(args.model is None, args.data is None)
    model = cli.model_folder(args, parser)
    read = [read_benchmark(benchmark, args.data, args.limit) for benchmark in benchmarks]
    try:
        pruners = grid(args.methods, args.tokens, args.ratios, args.seed)
        cli.resolve_device(args, model)
        cli.check_conv_mode(args.conv_mode)
    except ValueError as error:
        parser.error(str(error))
    args.anyres = args.anyres or _common_anyres(model)

    loaded: list[Any] = []
    tables, failures = [], []
    args.fixed = fixed_for_part(args)
    for benchmark, (folder, questions, problems) in zip(benchmarks, read, strict=True):
        cells, failed, vision = _fill(args, model, benchmark, questions, pruners, loaded)
        failures += problems + failed
        warned: set[str] = set()
        try:
            cells = [_score(args, cell, benchmark, folder, warned) for cell in cells
                     if (cell.folder / "answers.jsonl").exists()]
        except DataError as error:  # test-dev sets and judged ones: the answers are there, the number is not
            print(f"{benchmark.title}: no number here: {error}", flush=True)
            continue
        tables.append(_show(args, benchmark, questions, cells, vision))
    cli.report_problems(failures)
    print(json.dumps({"model": cli.model_name(model), "tables": tables, "output": str(args.output),
                      "failures": [str(problem) for problem in failures]}))
    return 1 if failures or any(not table["cells"] for table in tables) else 0


def _common_anyres(model: Path | str) -> str | None:
    """One way to cut pictures for all cells of an anyres model, the published tables': one pass needs one."""
    if isinstance(model, Path):
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        if config.get("image_aspect_ratio") == "anyres" or "image_grid_pinpoints" in config:
            return "paper"
    return None


def _fill(
    args: argparse.Namespace, model: Path | str, benchmark: Benchmark, questions: Sequence[Question],
    pruners: Sequence[Any], loaded: list[Any],
) -> tuple[list[Cell], list[Problem], dict[str, Any]]:
    """Ask what is not answered yet, in one pass; the cells, failures, and what vision cost."""
    max_new_tokens = args.max_new_tokens or benchmark.max_new_tokens
    with ExitStack() as stack:
        cells = []
        for pruner in pruners:
            name = setting_name(pruner)
            made_by = cli.configuration(args, model, questions, pruner, max_new_tokens)
            folder = args.output / benchmark.name / name
            file = AnswerFile(folder / "answers.jsonl", questions, made_by, made_by.model)
            stack.enter_context(file)
            cells.append(Cell(name, pruner, folder, file, _stored(folder, made_by.hash())))
        todo = [cell for cell in cells if cell.file.missing]
        print(f"{benchmark.title}: {len(questions)} questions, {len(cells)} cells, "
              f"{len(cells) - len(todo)} finished already", flush=True)
        if not todo:
            return cells, [], {}
        if not loaded:
            loaded.append(cli.load(args, model))
        engine = cli.build_engine(args, loaded[0], max_new_tokens, benchmark.load_image)
        from llava.eval.engine import Setting

        settings = [Setting(cell.name, cell.pruner, cell.file) for cell in todo]
        report = engine.run(questions, settings)
        per_image = report.vision_seconds / report.images if report.images else 0.0
        gflops = _prefill(engine, questions)
        for cell, setting in zip(todo, settings, strict=True):
            cell.file.finalise()
            vision = per_image * setting.images
            cell.document = {"speed": {
                "asked": setting.asked, "own_seconds": setting.seconds, "vision_seconds": vision,
                "questions_per_second": _rate(setting.asked, setting.seconds + vision),
                "questions_per_second_without_vision": _rate(setting.asked, setting.seconds),
            }, "gflops": gflops}
        return cells, report.failures, {"images": report.images, "seconds": report.vision_seconds,
                                        "pass_seconds": report.seconds}


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count else None


def _stored(folder: Path, config: str) -> dict[str, Any]:
    """What an earlier run left in score.json, if it is about this configuration."""
    try:
        document = json.loads((folder / "score.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if document.get("config") == config else {}


def _prefill(engine: Any, questions: Sequence[Question]) -> dict[str, Any]:
    """What the language model's prefill costs: shape and mean text tokens of a prompt."""
    from llava.analysis.flops import LanguageShape

    sample = questions[:: max(1, len(questions) // _PROMPTS)]
    text = sum(sum(token >= 0 for token in engine.prompt_ids(question)) for question in sample) / len(sample)
    shape = LanguageShape.from_config(engine.model.config)
    return {"text_tokens": text, "shape": [shape.layers, shape.width, shape.mlp, shape.kv_width]}


def _gflops(stored: dict[str, Any] | None, visual: float) -> float | None:
    if not stored:
        return None
    from llava.analysis.flops import LanguageShape, llm_prefill_macs

    return 2 * llm_prefill_macs(round(stored["text_tokens"] + visual), LanguageShape(*stored["shape"])) / 1e9


def _score(
    args: argparse.Namespace, cell: Cell, benchmark: Benchmark, folder: Path, warned: set[str]
) -> Cell:
    rows = benchmark.read_answers(cell.folder / "answers.jsonl")
    score = benchmark.score(folder, rows, fixed=args.fixed)
    for warning in score.warnings:
        if warning not in warned:  # what is wrong with the data is wrong in every cell
            print(f"warning: {cell.name}: {warning}", file=sys.stderr)
            warned.add(warning)
    cell.tallies = benchmark.tallies(folder, rows)
    low, high = bootstrap_interval(cell.tallies, benchmark.score_tallies, args.resamples, args.seed)
    visual = sum(row["metadata"]["visual_tokens"] for row in rows) / len(rows)
    speed, gflops = cell.document.get("speed"), cell.document.get("gflops")
    settings = {key: value for key, value in cell.pruner.config().items() if key != "seed"}
    cell.document = {
        **score.document(), "cell": cell.name, "model": rows[0]["metadata"]["model"], **settings,
        "low": low, "high": high, "visual_tokens": visual,
        "llm_gflops": _gflops(gflops, visual), "answers": len(rows), "config": rows[0]["metadata"]["config"],
        "speed": speed, "gflops": gflops}
    write_atomically(cell.folder / "score.json", json.dumps(cell.document, indent=1) + "\n")
    return cell


def _show(
    args: argparse.Namespace, benchmark: Benchmark, questions: Sequence[Question], cells: Sequence[Cell],
    vision: dict[str, Any],
) -> dict[str, Any]:
    """Print paired differences and the table; the table as a JSON value."""
    paired = _paired(args, benchmark, cells)
    if paired:
        print("\n" + cli.table(
            ["paired difference", "tokens", benchmark.metric, "95% interval"],
            [[f"{row['a']} - {row['b']}", str(row["tokens"]), f"{row['difference']:+.2f}",
              f"[{row['low']:+.2f}, {row['high']:+.2f}]"] for row in paired]))
    images = len({question.image for question in questions})
    shared = f": {vision['seconds']:.0f} s for {vision['images']} pictures" if vision else ""
    print(f"\n{benchmark.title}: {len(questions)} questions about {images} pictures; intervals: 95% "
          "bootstrap over pictures.\nLLM GFLOPs: prefill of one question, 2 per multiply-accumulate, visual "
          "and text tokens.\nq/s: the cell alone, decoding and encoding of its pictures included; w/o "
          f"vision: without those, which\nare shared in this pass{shared}.\n")
    rows = []
    for cell in cells:
        found, speed = cell.document, cell.document["speed"] or {}
        rows.append([
            found["method"], cli.cell(found.get("important_ratio"), "g"),
            "all" if found["tokens"] is None else str(found["tokens"]),
            cli.cell(found["score"], ".2f"), f"[{found['low']:.1f}, {found['high']:.1f}]",
            f"{found['visual_tokens']:.1f}", cli.cell(found["llm_gflops"], ".3g"),
            cli.cell(speed.get("questions_per_second"), ".0f"),
            cli.cell(speed.get("questions_per_second_without_vision"), ".0f")])
    print(cli.table(["method", "r", "tokens", benchmark.metric, "95% interval", "real tokens", "LLM GFLOPs",
                     "q/s", "w/o vision"], rows))
    documents = [{key: value for key, value in cell.document.items() if key not in ("details", "gflops")}
                 for cell in cells]
    return {"benchmark": benchmark.name, "questions": len(questions), "images": images, "vision": vision,
            "cells": documents, "paired": paired}


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
            result = paired_bootstrap(
                a.tallies, b.tallies, benchmark.score_tallies, args.resamples, args.seed)
            found.append({"a": a.name, "b": b.name, "tokens": a.pruner.tokens,
                          "difference": result.difference, "low": result.low, "high": result.high,
                          "separates": result.separates})
    return found


if __name__ == "__main__":
    sys.exit(main())

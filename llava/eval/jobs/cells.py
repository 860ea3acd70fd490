"""The cells of a sweep: answer files of one benchmark, filled in one pass over its pictures, and scored.

A cell that fails (its file belongs to another run, its pruner or its scoring raises) is reported and stops no
other: when a pass over all cells raises, they are asked one by one. `sweep` is the command around this.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval import cli
from llava.eval.benchmarks import Benchmark, DataError, PerImageCounts, Question
from llava.eval.metrics.statistics import bootstrap_interval
from llava.eval.run import setting_name
from llava.eval.store.answer_file import AnswerFile, AnswerFileError
from llava.eval.store.atomic import write_atomically

_PROMPTS = 256  # questions whose prompts are measured for the FLOPs


@dataclass
class Cell:
    """One row of a benchmark's table."""

    name: str
    pruner: Any
    folder: Path
    file: AnswerFile
    document: dict[str, Any]  # of score.json, once there
    tallies: PerImageCounts | None = None
    failed: bool = False


@dataclass
class Session:
    """What all benchmarks of a sweep share: the model, once loaded, and the pictures it has encoded."""

    args: argparse.Namespace
    model: Path | str
    cache_bytes: int = 0
    loaded: Any = None
    cache: Any = None
    encoded: int = 0  # pictures, in all passes
    seconds: float = 0.0  # decoding and encoding them
    failures: list[str] = field(default_factory=list)

    def engine(self, benchmark: Benchmark, max_new_tokens: int) -> Any:
        """An engine for one benchmark; loads the model when first called. Raises ModelError."""
        if self.loaded is None:
            try:
                self.loaded = cli.load(self.args, self.model)
            except OSError as error:
                raise cli.ModelError(str(error)) from error
            if self.cache_bytes:
                from llava.eval.inference.vision_cache import VisionCache

                # an accelerator has better uses for its memory
                self.cache = VisionCache(self.cache_bytes, "cpu")
                self.cache.bind(self.loaded[1])
        engine = cli.build_engine(self.args, self.loaded, max_new_tokens, benchmark.load_image)
        engine.vision_cache = self.cache
        return engine

    def fail(self, what: str, error: Exception) -> None:
        """Note a failure, to be reported at the end; unforeseen ones with where they happened."""
        if not isinstance(error, AnswerFileError | DataError | OSError):
            traceback.print_exception(error, file=sys.stderr)
        self.failures.append(f"{what}: {error}" if str(error) else f"{what}: {type(error).__name__}")
        print(f"failed: {self.failures[-1]}; going on", file=sys.stderr)


def fill(
    session: Session, benchmark: Benchmark, questions: Sequence[Question], pruners: Sequence[Any]
) -> tuple[list[Cell], dict[str, Any]]:
    """Ask what is not answered yet, in one pass; the cells that have answers, and what vision cost.

    Failures are noted in the session. Raises ModelError if the model cannot be loaded.
    """
    args = session.args
    max_new_tokens = args.max_new_tokens or benchmark.max_new_tokens
    with ExitStack() as stack:
        cells = []
        for pruner in pruners:
            name = setting_name(pruner)
            made_by = cli.configuration(args, session.model, questions, pruner, max_new_tokens)
            folder = args.output / benchmark.name / name
            try:
                file = AnswerFile(folder / "answers.jsonl", questions, made_by, made_by.model)
            except (AnswerFileError, OSError) as error:
                session.fail(f"{benchmark.title}, {name}", error)
                continue
            stack.enter_context(file)
            cells.append(Cell(name, pruner, folder, file, _stored(folder, made_by.hash())))
        todo = [cell for cell in cells if cell.file.missing]
        print(
            f"{benchmark.title}: {len(questions)} questions, {len(cells)} cells, "
            f"{len(cells) - len(todo)} finished already",
            flush=True,
        )
        vision = _ask(session, benchmark, questions, todo, max_new_tokens) if todo else {}
        return [cell for cell in cells if not cell.failed], vision


def _ask(
    session: Session,
    benchmark: Benchmark,
    questions: Sequence[Question],
    todo: Sequence[Cell],
    max_new_tokens: int,
) -> dict[str, Any]:
    """Ask all cells in one pass, or, where that raises, one by one."""
    engine = session.engine(benchmark, max_new_tokens)
    from llava.eval.inference.engine import Setting

    settings = {cell.name: Setting(cell.name, cell.pruner, cell.file) for cell in todo}
    reports = []
    try:
        reports.append(engine.run(questions, list(settings.values())))
    except Exception as error:  # a pruner, the device, a full disk: one cell alone will tell
        print(
            f"{benchmark.title}: {error or type(error).__name__}; asking the cells one by one",
            file=sys.stderr,
        )
        for cell in todo:
            try:
                reports.append(engine.run(questions, [settings[cell.name]]))
            except Exception as own:
                cell.failed = True
                session.fail(f"{benchmark.title}, {cell.name}", own)
    session.encoded += sum(report.images for report in reports)
    session.seconds += sum(report.vision_seconds for report in reports)
    per_image = session.seconds / session.encoded if session.encoded else 0.0
    gflops = _prefill(engine, questions)
    for cell in todo:
        if cell.failed:
            continue
        setting = settings[cell.name]
        cell.file.finalise()
        vision = per_image * setting.images
        cell.document = {
            "speed": {
                "asked": setting.asked,
                "own_seconds": setting.seconds,
                "vision_seconds": vision,
                "questions_per_second": _rate(setting.asked, setting.seconds + vision),
                "questions_per_second_without_vision": _rate(setting.asked, setting.seconds),
            },
            "gflops": gflops,
        }
    problems = dict.fromkeys(str(problem) for report in reports for problem in report.failures)
    session.failures += problems
    return {
        "images": sum(report.images for report in reports),
        "reused": sum(report.reused for report in reports),
        "seconds": sum(report.vision_seconds for report in reports),
        "pass_seconds": sum(report.seconds for report in reports),
    }


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
    from llava.model.flops import LanguageShape

    sample = questions[:: max(1, len(questions) // _PROMPTS)]
    text = sum(sum(token >= 0 for token in engine.prompt_ids(question)) for question in sample) / len(sample)
    shape = LanguageShape.from_config(engine.model.config)
    return {"text_tokens": text, "shape": [shape.layers, shape.width, shape.mlp, shape.kv_width]}


def _gflops(stored: dict[str, Any] | None, visual: float) -> float | None:
    if not stored:
        return None
    from llava.model.flops import LanguageShape, llm_prefill_macs

    return 2 * llm_prefill_macs(round(stored["text_tokens"] + visual), LanguageShape(*stored["shape"])) / 1e9


def score(args: argparse.Namespace, cell: Cell, benchmark: Benchmark, folder: Path, warned: set[str]) -> Cell:
    """Score a cell's answers and keep the number beside them. Raises DataError where there is none."""
    rows = benchmark.read_answers(cell.folder / "answers.jsonl")
    found = benchmark.score(folder, rows, fixed=args.fixed)
    for warning in found.warnings:
        if warning not in warned:  # what is wrong with the data is wrong in every cell
            print(f"warning: {cell.name}: {warning}", file=sys.stderr)
            warned.add(warning)
    cell.tallies = benchmark.per_image_counts(folder, rows)
    low, high = bootstrap_interval(cell.tallies, benchmark.score_counts, args.resamples, args.seed)
    visual = sum(row["metadata"]["visual_tokens"] for row in rows) / len(rows)
    speed, gflops = cell.document.get("speed"), cell.document.get("gflops")
    settings = {key: value for key, value in cell.pruner.config().items() if key != "seed"}
    cell.document = {
        **found.document(),
        "cell": cell.name,
        "model": rows[0]["metadata"]["model"],
        **settings,
        "low": low,
        "high": high,
        "visual_tokens": visual,
        "llm_gflops": _gflops(gflops, visual),
        "answers": len(rows),
        "config": rows[0]["metadata"]["config"],
        "speed": speed,
        "gflops": gflops,
    }
    write_atomically(cell.folder / "score.json", json.dumps(cell.document, indent=1) + "\n")
    return cell

"""Evaluate methods x tokens x ratios in one pass over the images, with confidence intervals.

    python -m llava.eval.sweep --benchmarks pope,gqa --methods none,random,fastervlm,vispruner \\
        --tokens 128,64,32 --ratios 0.5,0 --output outputs/sweep

The model is loaded once. Every image is loaded and encoded once for all settings and, within the limit of
--vision-cache, for all benchmarks that show it. `none` is one setting at full length; ratios multiply only
the methods that have one. Every setting has its own folder OUTPUT/BENCHMARK/SETTING with answers.jsonl and
score.json; rerunning the command skips finished settings and resumes interrupted ones. A setting or benchmark
that fails does not stop the others; failures are listed at the end, and the exit code is then 1. Benchmarks
scored by a server or a judge keep their answers. A method that needs what the model does not have is named,
and its cells stay empty. Without --model or --data the bundled ones are used. The last line of standard
output is one JSON document.

--num-processes N starts one process per GPU, or N that divide the cores of a CPU; each answers a share of the
images in all settings. Default: VISPRUNER_PROCESSES, else the GPUs that CUDA_VISIBLE_DEVICES lists, else one;
the bundled model on a CPU has one per core if there is much to do.

Columns: score with its 95% bootstrap interval over images; mean number of visual tokens that enter a layer of
the language model; GFLOPs of its prefill per question (2 per multiply-accumulate, visual and text tokens,
nothing shared); questions/s of the setting alone (pruning, projection and answers, plus loading and encoding
its images), and without loading and encoding.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from llava import argtypes
from llava.eval import cli
from llava.eval.benchmarks import DataError, EmptyAnswersError, benchmark_name, get_benchmark, list_benchmarks
from llava.eval.cli import ModelError
from llava.eval.jobs import execute, processes
from llava.eval.jobs.execute import SettingRun
from llava.eval.jobs.job import Job, Task, check_media, common_anyres, read_task, setting_name
from llava.eval.jobs.session import MethodUnavailable, Session, TooManyFailures
from llava.eval.metrics.scorecard import ScoredSetting
from llava.eval.metrics.statistics import paired_bootstrap
from llava.eval.store.answer_file import AnswerFileError
from llava.eval.store.atomic import write_atomically
from llava.eval.store.run_record import FAILURES
from llava.eval.tables.summary import ScoredBenchmark, build_summary
from llava.model.checkpoint.config import stored_config
from llava.table import text_table

_MANY = 8_000  # answers that take much longer than the start of another process with the bundled model


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("sweep", __doc__)
    add = parser.add_argument
    known = f"comma-separated (default: pope); choose from {', '.join(list_benchmarks())}"
    add("--benchmarks", type=argtypes.comma_separated(benchmark_name), default=["pope"], help=known)
    methods = ["none", "random", "fastervlm", "vispruner"]
    known = f"comma-separated pruning methods, or all (default: {','.join(methods)})"
    add("--methods", type=argtypes.comma_separated(str), default=methods, help=known)
    budgets = "comma-separated visual tokens to keep per crop (default: 128,64,32)"
    add("--tokens", type=argtypes.comma_separated(argtypes.tokens), default=[128, 64, 32], help=budgets)
    ratios = "comma-separated shares selected by [CLS] attention (default: 0.5,0)"
    add("--ratios", type=argtypes.comma_separated(argtypes.ratio), default=[0.5, 0.0], help=ratios)
    cli.add_source_arguments(parser)
    add("--output", type=Path, default=Path("outputs", "sweep"), help="(default: outputs/sweep)")
    summary = "write a summary over all benchmarks there: grid.html, .md, .csv and .tex"
    add("--report", type=Path, metavar="DIR", help=summary)
    add("--fixed", action="store_true", help="work around known bugs of the official scoring rules")
    cli.add_bootstrap_argument(parser)
    memory = "memory for encoded images that several benchmarks show (default: 2048)"
    add("--vision-cache", type=argtypes.at_least(0), default=2048, metavar="MIB", help=memory)
    launched = "processes to launch, one per GPU (default: see above)"
    add("--num-processes", "--processes", type=argtypes.at_least(1), help=launched)
    add("--part", action="store_true", help=argparse.SUPPRESS)  # started by --num-processes
    cli.add_clip_argument(parser)
    cli.add_model_arguments(parser)
    cli.add_inference_arguments(parser)
    return parser


def grid(
    methods: Sequence[str], budgets: Sequence[int | str], ratios: Sequence[float], seed: int
) -> list[Any]:
    """Return the pruners of all settings, each once, in table order. Raises ValueError."""
    from llava.pruning import get_pruner, list_pruners

    if "all" in methods:  # tables start with all tokens
        after = methods.index("all") + 1
        methods = [*methods[: after - 1], "none", *list_pruners(), *methods[after:]]
    pruners: dict[Any, None] = {}
    for budget in budgets:
        for method in methods:
            uses_ratio = get_pruner(method, 1).uses_ratio  # refuses an unknown method for any budget
            for ratio in ratios or [0.5]:
                full = budget == "none" or method == "none"
                # one constant for methods without a ratio, so that equal settings are one
                used = ratio if uses_ratio else 0.5
                pruners[get_pruner("none") if full else get_pruner(method, budget, used, seed)] = None
    if not pruners:
        raise ValueError("nothing to do: --methods and --tokens must each name at least one")
    return list(pruners)


class Failures(list[str]):
    """Failures so far, announced as they happen and listed at the end.

    Attributes:
        unavailable: Why the model cannot run a setting, by its name; its cells stay empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unavailable: dict[str, str] = {}

    def note(self, what: str, error: Exception) -> None:
        """Record a failure; print the traceback of unexpected errors."""
        if not isinstance(error, AnswerFileError | DataError | OSError):
            traceback.print_exception(error, file=sys.stderr)
        self.append(f"{what}: {error}" if str(error) else f"{what}: {type(error).__name__}")
        print(f"failed: {self[-1]}; continuing", file=sys.stderr)


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.part:
        processes.end_with_parent()
        # The process that started this one says the same.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            session, tasks, pruners = _plan(args, parser, Failures())
        return _answer_part(args, session, tasks, pruners)
    if args.num_processes is None:
        args.num_processes = _listed_processes(args.device)
    cli.announce_bundled(args.model is None, args.data is None)
    failures = Failures()
    session, tasks, pruners = _plan(args, parser, failures)
    job, command = session.job, cli.command_of(parser, args)
    cli.print_warnings(job.warnings)
    size = args.num_processes or _processes(args, job, tasks, pruners)
    if size > 1:
        _answer_together(args, argv, command, job, tasks, pruners, size)
    tables: list[dict[str, Any]] = []
    unscored, scored = [], []
    for task in tasks:
        try:
            runs, vision = answer_task(args.output, session, task, pruners, failures, command, size)
            found = score_task(args, task, runs, failures)
            if found is None:
                unscored.append(task.benchmark)
                continue
            scored.append(ScoredBenchmark(task.benchmark, task.folder, task.asked, found))
            tables.append(_show(args, task, found, vision))
        except (ModelError, TooManyFailures):  # without a model no benchmark can be evaluated
            raise
        except Exception as error:
            failures.note(task.title, error)
    summary = {}
    if args.report is not None and any(one.settings for one in scored):
        summary = _summarize(args, job.name, scored, [benchmark.title for benchmark in unscored])
    for name, reason in failures.unavailable.items():
        print(f"{name}: not available: {reason}")
    everywhere = args.output / "BENCHMARK" / "SETTING" / FAILURES
    cli.report_issues(failures, "failures", str(everywhere))
    document = {
        "model": job.name,
        "tables": tables,
        "output": str(args.output),
        "unscored": [benchmark.name for benchmark in unscored],
        **summary,
        "unavailable": failures.unavailable,
        "failures": failures,
    }
    print(json.dumps(document))
    return 1 if failures or any(not table["cells"] for table in tables) else 0


def _plan(
    args: argparse.Namespace, parser: argparse.ArgumentParser, failures: Failures
) -> tuple[Session, list[Task], list[Any]]:
    """Check the arguments and read the questions; wrong arguments end the command."""
    benchmarks = find_benchmarks(args, dict.fromkeys(args.benchmarks), parser)
    media = "video" if all(one.media == "video" for one in benchmarks) else "image"
    model = cli.model_folder(args, parser, media=media)
    tasks = read_tasks(args, benchmarks, failures)
    try:
        pruners = grid(args.methods, args.tokens, args.ratios, args.seed)
        config = stored_config(model, args.model_base)
        rank = processes.rank_info(os.environ)
        local = rank.local_rank if args.part else None
        job = cli.job_of(args, model, config, common_anyres(config, args.anyres, args.preset), local)
    except ValueError as error:
        parser.error(str(error))
    if (args.num_processes or 1) > 1 and ":" in job.device:
        parser.error(
            f"--device {job.device}: one GPU for {args.num_processes} processes. List several in "
            "CUDA_VISIBLE_DEVICES"
        )
    tasks = suitable(tasks, config, model, failures)
    # Images that several benchmarks show are encoded once; within one benchmark the engine sees to that.
    cache = args.vision_cache << 20 if len(benchmarks) > 1 else 0
    return Session(job, cache, args.max_failures), tasks, pruners


def _listed_processes(device: str | None) -> int | None:
    """Return the number of processes that the environment asks for, as scripts/v1_5/eval does."""
    if (number := os.environ.get("VISPRUNER_PROCESSES", "")).isdecimal():
        return int(number) or None
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return len(gpus) if len(gpus) > 1 and device in (None, "auto", "cuda") else None


def _processes(args: argparse.Namespace, job: Job, tasks: Sequence[Task], pruners: Sequence[Any]) -> int:
    """Return how many processes pay: with the bundled model on a CPU one per core, for many questions."""
    from llava.eval.inference.image_loading import usable_cores

    asked = sum(len(task.asked) for task in tasks) * len(pruners)
    if not cli.is_bundled(args.model) or job.device != "cpu" or asked < _MANY:
        return 1
    return min(usable_cores(), asked // _MANY + 1)


def _answer_together(
    args: argparse.Namespace,
    argv: Sequence[str],
    command: Sequence[str],
    job: Job,
    tasks: Sequence[Task],
    pruners: Sequence[Any],
    size: int,
) -> None:
    """Answer shares of all tasks in several processes; what they leave open is left to this one."""
    runs: list[SettingRun] = []
    missing = 0
    for task in tasks:
        opened = _open(args.output, job, task, pruners, {"size": size, "exclusive": True})
        for run in opened:
            execute.record_start(task, run, command)
            missing += len(run.missing(task))
        runs += opened
    if not missing or (args.num_processes is None and missing < _MANY):
        return
    print(f"{size} processes", flush=True)
    execute.start_processes("llava.eval.sweep", argv, runs, size, job.device)


def _answer_part(
    args: argparse.Namespace, session: Session, tasks: Sequence[Task], pruners: Sequence[Any]
) -> int:
    """Answer this process's share of every task. What fails here is reported by the process that waits."""
    rank, code = processes.rank_info(os.environ), 0
    for task in tasks:
        try:
            runs = _open(args.output, session.job, task, pruners, {"size": rank.size})
            execute.answer_share(session, task, runs, rank)
        except TooManyFailures as error:
            print(f"error: {error}", file=sys.stderr)
            return processes.STOPPED
        except (AnswerFileError, DataError, MethodUnavailable, OSError):
            code = 1
    return code


def _open(
    output: Path, job: Job, task: Task, pruners: Sequence[Any], several: dict[str, Any]
) -> list[SettingRun]:
    """Open the settings of a task that can be answered."""
    runs = []
    for pruner in pruners:
        folder = output / task.benchmark.name / setting_name(pruner)
        with suppress(MethodUnavailable, AnswerFileError, DataError, OSError):
            runs.append(SettingRun.open(job, task, pruner, folder, together=pruners, **several))
    return runs


def find_benchmarks(
    args: argparse.Namespace, names: Iterable[str], parser: argparse.ArgumentParser
) -> list[Any]:
    """Return the benchmarks of these names; wrong arguments end the command."""
    try:
        benchmarks = [get_benchmark(name) for name in names]
    except ValueError as error:
        parser.error(str(error))
    for benchmark in benchmarks:
        benchmark.allow_outside = args.allow_outside_images
    if args.data is not None and len(benchmarks) > 1 and any(one.owns(args.data) for one in benchmarks):
        parser.error("--data is the folder of one benchmark; for several give the folder above")
    return benchmarks


def read_tasks(args: argparse.Namespace, benchmarks: Sequence[Any], failures: Failures) -> list[Task]:
    """Read every benchmark that can be read; a single one that cannot raises DataError."""
    tasks = []
    for benchmark in benchmarks:
        try:
            task = read_task(benchmark, args.data, args.limit)
        except DataError as error:
            if len(benchmarks) == 1:
                raise
            failures.note(benchmark.title, error)
            continue
        cli.print_warnings(task.warnings)
        if task.partial and not args.fixed:
            print(f"{task.title}: scored as with --fixed, as only {len(task.asked)} questions are evaluated")
        failures += [str(issue) for issue in task.issues]
        tasks.append(task)
    if not tasks:
        raise DataError("none of the benchmarks can be evaluated")
    return tasks


def suitable(
    tasks: Sequence[Task], config: dict[str, Any], model: Path | str, failures: Failures
) -> list[Task]:
    """Return the tasks whose images or videos the model takes; a single one that does not fit raises."""
    found = []
    for task in tasks:
        try:
            check_media(task.benchmark, config, model)
            found.append(task)
        except DataError as error:
            if len(tasks) == 1:
                raise
            failures.note(task.title, error)
    return found


def answer_task(
    output: Path,
    session: Session,
    task: Task,
    pruners: Sequence[Any],
    failures: Failures,
    command: Sequence[str],
    size: int = 1,
) -> tuple[list[SettingRun], dict[str, Any]]:
    """Answer one benchmark with all settings; return those that have answers, and the cost of the pass.

    Args:
        size: Processes that have answered shares of it in this start.
    """
    runs = []
    for pruner in pruners:
        name = setting_name(pruner)
        try:
            folder = output / task.benchmark.name / name
            runs.append(SettingRun.open(session.job, task, pruner, folder, together=pruners))
            execute.record_start(task, runs[-1], command)
        except MethodUnavailable as error:
            failures.unavailable[name] = str(error)
        except (AnswerFileError, DataError, OSError) as error:
            failures.note(f"{task.title}, {name}", error)
    finished = sum(not run.missing(task) for run in runs)
    print(
        f"{task.title}: {len(task.asked)} questions, {len(runs)} settings, {finished} already finished",
        flush=True,
    )
    for line in dict.fromkeys(run.batch_line for run in runs if run.missing(task)):
        if line:
            print(line, flush=True)
    shared = execute.collect_reports(runs, size) if size > 1 else {}
    able = [run for run in runs if run.error is None]
    try:
        more = execute.answer(session, task, able)
        vision = {name: shared.get(name, 0) + more.get(name, 0) for name in shared | more}
    except (ModelError, TooManyFailures):
        raise
    except MethodUnavailable as error:
        able[0].error, vision = error, {}
    except Exception as error:  # of a single setting
        if len(able) > 1:
            raise
        able[0].error, vision = error, {}
    for run in runs:
        if isinstance(run.error, MethodUnavailable):
            failures.unavailable[run.name] = str(run.error)
        elif run.error is not None:
            failures.note(f"{task.title}, {run.name}", run.error)
    failures += dict.fromkeys(str(issue) for run in runs for issue in run.failures)
    return [run for run in runs if run.error is None], vision


def score_task(
    args: argparse.Namespace, task: Task, runs: Sequence[SettingRun], failures: Failures
) -> list[ScoredSetting] | None:
    """Score all settings that have answers; return None if the benchmark has no score here."""
    found, warnings = [], []
    for run in runs:
        if not run.answers.is_file():
            continue
        try:
            one = execute.score(task, run, args.fixed or task.partial, args.bootstrap_iters, args.seed)
        except EmptyAnswersError as error:  # of this setting only
            failures.note(f"{task.title}, {run.name}", error)
            continue
        except DataError as error:  # no ground truth on this machine
            print(f"{task.title}: no score here: {error}", flush=True)
            return None
        except Exception as error:
            failures.note(f"{task.title}, {run.name}", error)
            continue
        said = one.card.details["warnings"]
        if one.counts is None:  # test sets and judged ones: the answers exist, the score does not
            reason = said[-1] if said else "it comes from a server or a judge"
            print(f"{task.title}: no score here: {reason}", flush=True)
            return None
        new = [warning for warning in said if warning not in warnings]
        warnings += new  # a problem of the data occurs in every setting
        cli.print_warnings([f"{run.name}: {warning}" for warning in new])
        found.append(one)
    return found


def _summarize(
    args: argparse.Namespace, model: str, scored: Sequence[ScoredBenchmark], unscored: Sequence[str]
) -> dict[str, Any]:
    """Write the summary over all benchmarks, print its table; return its entries of the JSON document."""
    summary = build_summary(model, scored, unscored, args.bootstrap_iters, args.seed)
    args.report.mkdir(parents=True, exist_ok=True)
    files = {str(args.report / name): content for name, content in summary.files().items()}
    for path, content in files.items():
        write_atomically(Path(path), content)
    print(f"\n{summary.text()}\n\nwritten: {', '.join(files)}")
    return {"files": list(files), **summary.document()}


def _show(
    args: argparse.Namespace, task: Task, scored: Sequence[ScoredSetting], vision: dict[str, Any]
) -> dict[str, Any]:
    """Print paired differences and the table of one benchmark; return them as a JSON value."""
    benchmark = task.benchmark
    paired = _paired(args, task, scored)
    if paired:
        rows = [
            [
                f"{row['a']} - {row['b']}",
                str(row["tokens"]),
                f"{row['difference']:+.2f}",
                f"[{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]",
            ]
            for row in paired
        ]
        print("\n" + text_table(["paired difference", "tokens", benchmark.metric, "95% CI"], rows))
    images = len({question.image for question in task.asked})
    shared = f": {vision['seconds']:.0f} s for {vision['images']} images" if vision else ""
    shared += f", {vision['reused']} were encoded before" if vision.get("reused") else ""
    print(
        f"\n{benchmark.title}: {len(task.asked)} questions about {images} images. 95% CI: bootstrap over "
        "images.\nPrefill GFLOPs: language model, one question, 2 per multiply-accumulate, visual and text "
        "tokens.\nQuestions/s: each setting alone, loading and encoding of its images included; "
        f"w/o vision:\nwithout these, which are shared in this pass{shared}.\n"
    )
    cli.print_settings(benchmark, [one.card for one in scored])
    return {
        "benchmark": benchmark.name,
        "questions": len(task.asked),
        "images": images,
        "vision": vision,
        "cells": [_cell(one) for one in scored],
        "paired": paired,
    }


def _cell(scored: ScoredSetting) -> dict[str, Any]:
    """Return one setting's entry of the JSON document: its scorecard without what changes at every start."""
    left_out = {"details", "prefill", "gflops", "generated", "asked", "seconds", "failures"}
    document = {key: value for key, value in scored.card.document().items() if key not in left_out}
    return {**document, "answers": scored.card.answered}  # its name in earlier versions


def _paired(args: argparse.Namespace, task: Task, scored: Sequence[ScoredSetting]) -> list[dict[str, Any]]:
    """Compare VisPruner at the first ratio with every other setting of its budget, and with none."""
    ours = [one for one in scored if one.card.method == "vispruner"]
    ours = [one for one in ours if one.card.important_ratio == ours[0].card.important_ratio]
    found = []
    for a in ours:
        for b in scored:
            if b is a or b.card.tokens not in (None, a.card.tokens):
                continue
            if set(a.counts.images) != set(b.counts.images):
                continue
            difference = paired_bootstrap(
                a.counts, b.counts, task.benchmark.score_counts, args.bootstrap_iters, args.seed
            )
            found.append({"a": a.name, "b": b.name, "tokens": a.card.tokens, **difference.document()})
    return found


if __name__ == "__main__":
    sys.exit(main())

"""Who asks which questions of a run, and how the answers become one file and one number.

A run is asked by this process alone, by processes that this one starts, or by this one among others that a
launcher started. All go on from whatever answers lie in the folder. Decides nothing about an answer: `Run`
is complete before it comes here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval import cli
from llava.eval.benchmarks import Benchmark, DataIssue, Question
from llava.eval.jobs import processes as workers
from llava.eval.jobs.outcome import finish
from llava.eval.store.answer_file import AnswerFile
from llava.eval.store.provenance import Configuration
from llava.eval.store.shards import Found, Parts, Report


@dataclass
class Run:
    """Everything that is known before a model is loaded."""

    args: argparse.Namespace
    argv: list[str]
    place: workers.World
    benchmark: Benchmark
    folder: Path  # of the benchmark
    model: Path | str
    questions: list[Question]
    problems: list[DataIssue]
    pruner: Any
    made_by: Configuration
    parts: Parts
    fixed: bool  # score by the mended rule

    def say(self, text: str) -> None:
        """For people; once, however many processes there are."""
        if not self.args.part and self.place.rank == 0:
            print(text, flush=True)


def dispatch(run: Run) -> int:
    """Ask what is not answered yet, merge, score; the exit code."""
    run.parts.check_free(max(run.args.processes, run.place.size), run.args.processes > 1)
    found = run.parts.scan()
    run.parts.check(found)
    if len(found.where) == len(run.questions):
        run.say("every question is answered already")
    elif found.where:
        run.say(f"going on: {len(found.where)} of {len(run.questions)} questions are answered already")
    if run.args.processes > 1:
        return _with_others(run, found)
    return _alone(run, found) if run.place.size == 1 else _among_others(run, found)


def _alone(run: Run, found: Found) -> int:
    report = _ask(run, found, {question.index for question in run.questions}, run.questions)
    if found.elsewhere(run.parts.whole):
        run.parts.merge(run.parts.scan())
    return _finish(run, {0: report})


def _with_others(run: Run, found: Found) -> int:
    """Start the processes that ask, and make one whole of what they leave."""
    size = run.args.processes
    wrong: list[str] = []
    if len(found.where) < len(run.questions):
        for rank in range(size):
            run.parts.clear_report(rank, size)
        named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        gpus = named or [str(number) for number in range(_gpus())]
        wrong = workers.start(
            [*run.argv, "--processes", "1", "--part"], size, gpus if run.args.device == "cuda" else []
        )
    reports, missing, merged = _merge(run, size)
    if not merged:
        why = "; ".join(wrong) or "nobody asked them"
        print(
            f"error: {missing} of {len(run.questions)} questions have no answer yet: {why}. Start the same "
            "command again to go on",
            file=sys.stderr,
        )
        return 1
    return max(_finish(run, reports), int(bool(wrong)))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _among_others(run: Run, found: Found) -> int:
    """Ask a share of the questions; merge and score if that was the last one."""
    place, parts = run.place, run.parts
    finished = len(found.where) == len(run.questions) and not found.elsewhere(parts.whole)
    report = Report(run.made_by.hash())
    if not finished:
        parts.clear_report(place.rank, place.size)
        shares, whole_batches = workers.deal(run.questions, run.args.batch_size, place.size)
        mine = [one for one in run.questions if one.index in shares[place.rank]]
        first = not any(shares[rank] - found.where.keys() for rank in place.neighbours)
        report = _ask(run, found, shares[place.rank], run.questions if whole_batches else mine, first)
        parts.write_report(place.rank, place.size, report)
    if run.args.part:
        print(
            f"process {place.rank} of {place.size}: asked {report.asked} questions in {report.seconds:.0f} s",
            flush=True,
        )
        return 0
    if finished and place.rank == 0:
        return _finish(run, {})
    reports, missing, last = ({}, 0, False) if finished else _merge(run, place.size, place.rank)
    if not last:
        print(
            json.dumps(
                {
                    "benchmark": run.benchmark.name,
                    "score": None,
                    "process": place.rank,
                    "processes": place.size,
                    "asked": report.asked,
                    "seconds": report.seconds,
                    "missing": missing,
                    "answers": str(parts.path(place.rank, place.size)),
                }
            ),
            flush=True,
        )
        return 0
    return _finish(run, reports)


def _merge(run: Run, size: int, rank: int | None = None) -> tuple[dict[int, Report], int, bool]:
    """(reports of the processes, number of questions still open, whether the whole has been written now).

    Merges if nothing is open: every question is answered once, or could not be. Among others (`rank`), only
    the last one does, when all have left their reports; it takes these away.
    """
    with run.parts.alone():
        found, reports = run.parts.scan(), run.parts.reports(size)
        run.parts.check(found)
        given_up = {index for report in reports.values() for index in report.failed}
        missing = len(run.questions) - len(found.where.keys() | given_up)
        if missing or (rank is not None and len(reports) < size):
            return reports, missing, False
        run.parts.merge(found)
        for one in reports:
            run.parts.clear_report(one, size)
    return reports, 0, True


def _ask(
    run: Run, found: Found, share: set[int], questions: Sequence[Question], progress: bool = True
) -> Report:
    """Ask what of a share nobody has answered; `questions` is what the engine forms its batches of."""
    path = run.parts.path(run.place.rank, run.place.size)
    report = Report(run.made_by.hash())
    only = share - found.elsewhere(path)
    with AnswerFile(path, run.questions, run.made_by, run.made_by.model, only) as file:
        if file.missing:
            loaded = cli.load(run.args, run.model)
            engine = cli.build_engine(run.args, loaded, run.args.max_new_tokens, run.benchmark.load_image)
            from llava.eval.inference.engine import Setting

            done = engine.run(questions, [Setting("run", run.pruner, file)], progress)
            report.asked, report.seconds = done.asked, done.seconds
            report.failures, report.failed = done.failures, file.missing
        file.finalise()
    return report


def _finish(run: Run, reports: dict[int, Report]) -> int:
    failures = [one for rank in sorted(reports) for one in reports[rank].failures]
    problems = [*run.problems, *dict.fromkeys(failures)]
    cli.report_problems(problems)
    cost = {
        "asked": sum(report.asked for report in reports.values()),
        "seconds": max((report.seconds for report in reports.values()), default=0.0),
    }
    return finish(
        run.benchmark,
        run.folder,
        run.parts.whole,
        len(run.questions),
        problems,
        cost,
        run.fixed,
        run.args.submit,
    )

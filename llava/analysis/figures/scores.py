"""Scores of benchmarks for settings that prune inside the decoder; resumable as every run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava.eval import cli
from llava.eval.benchmarks import DataError, DataIssue, get_benchmark
from llava.eval.jobs import execute
from llava.eval.jobs.execute import SettingRun
from llava.eval.jobs.job import Task, read_task, setting_name
from llava.eval.jobs.session import Session
from llava.eval.metrics.statistics import resampled_sums
from llava.pruning import Pruner

BENCHMARKS = ("gqa", "textvqa", "pope", "mme")  # of both figures
MEAN = "mean"  # over benchmarks


@dataclass(frozen=True)
class PanelScore:
    """A score with its 95% interval, in percent; MME in percent of its highest score, as in the paper."""

    pruner: Pruner
    benchmark: str  # or MEAN
    score: float
    ci_low: float
    ci_high: float
    questions: int

    @classmethod
    def of(cls, pruner: Pruner, name: str, score: float, draws: np.ndarray, questions: int) -> PanelScore:
        """Add the interval of bootstrap draws to a score."""
        return cls(pruner, name, score, *map(float, np.quantile(draws, [0.025, 0.975])), questions)


def read_tasks(args: argparse.Namespace) -> list[Task]:
    """Return the benchmarks that are present. Raises DataError if there are none but some are asked for."""
    tasks, missing = [], []
    for name in args.benchmarks:
        try:
            tasks.append(read_task(get_benchmark(name), args.data, args.limit))
        except DataError as error:
            missing.append(f"{name}: {error}")
    if missing and not tasks:
        raise DataError(missing[0])
    cli.print_warnings([f"left out: {reason}" for reason in missing])
    return tasks


def evaluate(
    session: Session,
    tasks: Sequence[Task],
    pruners: Sequence[Pruner],
    folder: Path,
    command: Sequence[str],
    issues: list[DataIssue],
    iters: int = 2000,
) -> list[PanelScore]:
    """Answer and score benchmarks in one pass each; with several, add the mean of every pruner.

    The folders have no score.json, because these settings belong into no table.

    Args:
        folder: Of the answers, one folder per benchmark and setting in it.
        command: Module and arguments that resume, for run.json.
        issues: Receives the questions without an answer, and lines that cannot be used.

    Raises:
        DataError: A benchmark cannot be scored.
    """
    found: list[PanelScore] = []
    values: dict[Pruner, list[tuple[float, np.ndarray]]] = {pruner: [] for pruner in pruners}
    for number, task in enumerate(tasks):
        runs = []
        for pruner in pruners:
            place = folder / task.benchmark.name / setting_name(pruner)
            runs.append(SettingRun.open(session.job, task, pruner, place, together=pruners))
            execute.record_start(task, runs[-1], command)
        execute.answer(session, task, runs)
        issues += dict.fromkeys([*task.issues, *(issue for run in runs for issue in run.failures)])
        for run in runs:
            if run.error is not None:
                raise run.error
            values[run.pruner].append(_percent(task, run.answers, iters, number))
            one = PanelScore.of(run.pruner, task.benchmark.name, *values[run.pruner][-1], len(task.asked))
            found.append(one)
    for pruner, scores in values.items() if len(tasks) > 1 else ():
        mean = float(np.mean([score for score, _ in scores]))
        draws = np.mean([sampled for _, sampled in scores], axis=0)
        found.append(PanelScore.of(pruner, MEAN, mean, draws, sum(len(task.asked) for task in tasks)))
    return found


def _percent(task: Task, answers: Path, iters: int, seed: int) -> tuple[float, np.ndarray]:
    """Return score and bootstrap draws (iters,) in percent, by the rule of `execute.score`."""
    benchmark, folder, fixed = task.benchmark, task.folder, task.partial
    asked = {question.index for question in task.asked}
    rows = [row for row in benchmark.read_answers(answers) if row["metadata"]["index"] in asked]
    result = benchmark.score(folder, rows, fixed=fixed)
    if result.score is None:
        reason = (result.warnings or ["it comes from a server or a judge"])[-1]
        raise DataError(f"{task.title}: has no score here: {reason}. Leave it out of --benchmarks.")
    counts = benchmark.per_image_counts(folder, benchmark.careful_answers(folder, rows) if fixed else rows)
    draws = benchmark.score_counts(resampled_sums(counts.counts, iters, seed))
    if benchmark.name != "mme":
        return result.score, draws
    points = 2 * len(result.details["perception"]["subtasks"])  # of 200 per task, in percent
    return result.score / points, draws / points

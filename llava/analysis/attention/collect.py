"""Read the attention of many questions, resumable at any point."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from llava.analysis.attention.records import Records
from llava.analysis.attention.rows import UnreadableSample
from llava.analysis.attention.statistics import AttentionStatistics, analyze
from llava.eval.benchmarks import DataError, DataIssue
from llava.eval.jobs.job import Job, Task
from llava.eval.jobs.session import Session
from llava.pruning import get_pruner

_FORMAT = 1  # of the records and of what they mean


@dataclass(frozen=True)
class Collected:
    """The analysis of the asked questions of a task."""

    statistics: AttentionStatistics
    records: Path
    read: int  # samples that this start computed
    issues: tuple[DataIssue, ...]  # questions without a sample


def records_file(job: Job, task: Task, folder: Path) -> tuple[Path, dict[str, object]]:
    """Return where the samples of a model and a question file are kept, and the header of that file."""
    configuration = job.configuration(task, get_pruner("none"))
    decides = ("model", "weights", "questions", "conv_mode", "dtype", "tower_dtype", "attn_implementation")
    decides += ("device", "anyres", "preset")
    header = {"format": _FORMAT, **{name: getattr(configuration, name) for name in decides}}
    return folder / f"{job.name}-{configuration.hash()}.bin", header


def collect(session: Session, task: Task, folder: Path, progress: bool = True) -> Collected:
    """Read the attention of the asked questions that have no sample yet, and analyze all of them.

    The model is loaded only if a sample is missing.

    Args:
        folder: Of the samples, one file for each model and question file.

    Raises:
        DataError: No question has a sample.
        ModelError: The model cannot be loaded.
        TooManyFailures: More questions failed than the session allows.
        OSError: The samples cannot be written, or another process writes them.
    """
    path, header = records_file(session.job, task, folder)
    issues: list[DataIssue] = list(task.issues)
    read = 0
    with Records(path, header) as records:
        missing = [question for question in task.asked if question.index not in records]
        if missing:
            from llava.analysis.attention.reader import AttentionReader

            reader = AttentionReader(session.engine(task))
            bar = tqdm(
                missing,
                unit="q",
                desc="attention",
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10,
                disable=not progress,
            )
            for question in bar:
                try:
                    records.append(question.index, reader.read(question))
                    read += 1
                except UnreadableSample as error:
                    issues.append(DataIssue(question.file, question.line, str(error)))
                    session.check_failures(task, len(task.asked), issues)
        samples = records.samples(question.index for question in task.asked)
        if not len(samples):
            first = f" (first: {issues[0]})" if issues else ""
            raise DataError(f"{task.title}: none of {len(task.asked)} questions has a sample{first}")
        return Collected(analyze(samples), path, read, tuple(issues))

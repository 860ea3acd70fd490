"""The driver: answers the tasks of a job, merges the answers, and scores them. A run is a sweep of one
setting.

    session = Session(job)
    runs = [SettingRun.open(job, task, pruner, folder) for pruner in pruners]
    answer(session, task, runs)
    scored = score(task, runs[0])      # and write score.json

All settings of a task are answered in one pass over its images. With several processes, each answers its
share of the questions in all settings. Every start resumes from the answers in the folders.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.environment import PREFIX
from llava.eval.benchmarks import DataError, DataIssue, Question
from llava.eval.jobs import processes
from llava.eval.jobs.batches import check_inside, with_batch_size
from llava.eval.jobs.job import Job, Task, setting_name
from llava.eval.jobs.processes import ALONE, RankInfo
from llava.eval.jobs.session import MethodUnavailable, Session, TooManyFailures
from llava.eval.metrics.scorecard import Scorecard, ScoredSetting
from llava.eval.metrics.statistics import bootstrap_interval
from llava.eval.store.answer_file import AnswerFile, AnswerFileError
from llava.eval.store.provenance import Configuration
from llava.eval.store.run_record import (
    FAILURES,
    RUN,
    RunRecord,
    beside,
    failed_before,
    recorded_batch_size,
    update_failures,
)
from llava.eval.store.shards import ANSWERS, FoundAnswers, ShardReport, Shards, answer_files
from llava.model.flops import LanguageShape, llm_prefill_gflops

if TYPE_CHECKING:
    from llava.eval.inference.engine import InferenceStats, PassSetting

_PROMPTS = 256  # questions whose prompts are measured for the FLOPs
_RECORD_SECONDS = 30.0  # what a kill may cost of failures.jsonl; the file is written as a whole


@dataclass(eq=False)
class SettingRun:
    """One setting of one task: its folder, its answers so far, and the cost of this start.

    Attributes:
        card: The score.json that an earlier start with this configuration left.
        generated: Answers of this start, by all processes.
        seconds: Duration of this start, of the slowest process.
        failures: Questions of this start that this setting could not answer.
        error: Why this setting has no answers, if it failed as a whole.
    """

    name: str
    pruner: Any
    folder: Path
    configuration: Configuration
    shards: Shards
    found: FoundAnswers
    card: Scorecard | None = None
    generated: int = 0
    seconds: float = 0.0
    failures: list[DataIssue] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)  # indices of questions that could not be answered
    speed: dict[str, Any] | None = None
    prefill: dict[str, Any] | None = None
    error: Exception | None = None
    batch_line: str = ""

    @classmethod
    def open(
        cls,
        job: Job,
        task: Task,
        pruner: Any,
        folder: Path,
        size: int = 1,
        exclusive: bool = False,
        together: Sequence[Any] = (),
        command: Sequence[str] = (),
    ) -> SettingRun:
        """Find the answers that exist in `folder`.

        Args:
            size: Number of processes of this run.
            exclusive: This process starts the others, so none may be active.
            together: Pruners of all settings of the pass (default: this one).
            command: Module and arguments that resume, for run.json.

        Raises:
            AnswerFileError: They are of another configuration, inconsistent, or being written by another run.
            MethodUnavailable: The method prunes inside the language model and cannot do what is asked.
            ModelError: The sizes of the model, on which the batch size depends, cannot be read.
        """
        check_inside(job, task, pruner)
        before, record = answer_files(folder), folder / RUN
        of_this = (job, task, pruner, together or [pruner], record, before)
        configuration, batch_line = with_batch_size(*of_this)
        if size > 1 and job.batch_size is None and recorded_batch_size(record, (), configuration) is None:
            # Processes that do not communicate, on GPUs that differ, need one size: that of the first.
            with Shards(folder, task.questions, configuration).locked():
                first = record_of(task, configuration, command, len(task.asked), folder / ANSWERS)
                is_new = not record.is_file()
                if is_new or (not before and recorded_batch_size(record, (), configuration) is None):
                    first.write(record, only_new=is_new)
            own = configuration
            configuration, line = with_batch_size(*of_this)
            batch_line = batch_line if configuration == own else line
        shards = Shards(folder, task.questions, configuration)
        shards.check_free(size, exclusive)
        found = shards.scan()
        card = None
        if (folder / "score.json").is_file():
            try:
                card = Scorecard.read(folder / "score.json")
            except DataError:  # it will be written again
                card = None
        if card is not None and card.config != configuration.hash():
            card = None
        speed, prefill = (card.speed, card.prefill) if card is not None else (None, None)
        return cls(
            setting_name(pruner),
            pruner,
            folder,
            configuration,
            shards,
            found,
            card,
            speed=speed,
            prefill=prefill,
            batch_line=batch_line,
        )

    @property
    def batch_size(self) -> int:
        """Questions per batch."""
        assert self.configuration.batch_size is not None
        return self.configuration.batch_size

    @property
    def answers(self) -> Path:
        return self.shards.merged

    @property
    def failures_file(self) -> Path:
        return self.folder / FAILURES

    def missing(self, task: Task) -> set[int]:
        """Return the indices of the asked questions without an answer when the run was opened."""
        return {question.index for question in task.asked} - self.found.keys()

    def add_cost(self, setting: PassSetting, stats: InferenceStats, vision: float, alone: bool) -> None:
        """Record what a pass cost this setting.

        Args:
            vision: Seconds of loading and encoding the images of this setting.
            alone: The pass had no other setting, so that its duration is this setting's.
        """
        count, seconds = setting.generated, setting.seconds
        if self.generated and not count:  # only questions that failed before were asked again
            return
        self.generated = count
        self.seconds = stats.seconds if alone else seconds + vision
        self.speed = {
            "generated": count,
            "asked": count,  # its name in earlier versions
            "own_seconds": seconds,
            "vision_seconds": vision,
            "questions_per_second": count / (seconds + vision) if count else None,
            "questions_per_second_without_vision": count / seconds if count else None,
        }

    def read_reports(self, reports: Sequence[ShardReport]) -> None:
        """Take over what several processes recorded: they worked at the same time."""
        self.generated = sum(report.asked for report in reports)
        self.seconds = max((report.seconds for report in reports), default=0.0)
        self.prefill = next((report.prefill for report in reports if report.prefill), self.prefill)
        speeds = [report.speed for report in reports if report.speed and report.asked]
        if speeds:
            count = sum(one["generated"] for one in speeds)
            own, vision = (max(one[f"{part}_seconds"] for one in speeds) for part in ("own", "vision"))
            self.speed = {
                "generated": count,
                "asked": count,  # its name in earlier versions
                "own_seconds": own,
                "vision_seconds": vision,
                "questions_per_second": count / max(o["own_seconds"] + o["vision_seconds"] for o in speeds),
                "questions_per_second_without_vision": count / own,
            }


def answer(session: Session, task: Task, runs: Sequence[SettingRun]) -> dict[str, Any]:
    """Answer what is missing in one pass over the images, and put all answer files in order.

    Settings that were begun with different batch sizes have a pass for each size. A setting that fails keeps
    its error in `SettingRun.error` and does not stop the others: if a pass over all settings raises, they are
    answered one by one. The error of a single setting is raised.

    Returns:
        Cost of the pass: images, reused, seconds, pass_seconds; empty if nothing was missing.

    Raises:
        ModelError: The model cannot be loaded.
        AnswerFileError: The answer file of a single setting cannot be written.
        TooManyFailures: More questions failed than the session allows.
    """
    share = {question.index for question in task.asked}
    todo = [run for run in runs if run.missing(task)]
    if todo:
        session.check_failures(task, len(task.asked))
    cost: dict[str, Any] = {}
    for size in dict.fromkeys(run.batch_size for run in todo):
        alike = [run for run in todo if run.batch_size == size]
        more = _pass(session, task, alike, share, task.asked)
        cost = {name: cost.get(name, 0) + value for name, value in more.items()}
    for run in runs:
        if run not in todo:
            update_failures(run.failures_file, task.questions, task.issues, run.found, ())
    for run in runs:  # also those without new answers: the last start may have been killed before it did this
        if run.error is None and run not in todo:
            run.shards.merge(run.found)
        elif run.error is None and run.found.elsewhere(run.answers):
            run.shards.merge(run.shards.scan())
    return cost


def _pass(
    session: Session,
    task: Task,
    runs: Sequence[SettingRun],
    share: set[int],
    questions: Sequence[Question],
    rank: RankInfo = ALONE,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer the questions of `share` in one pass; batches are formed of `questions`."""
    from llava.eval.inference.engine import InferenceStats, PassSetting

    engine, stats = session.engine(task, runs[0].batch_size), InferenceStats()
    with ExitStack() as stack:
        settings: dict[str, PassSetting] = {}
        for run in runs:
            try:
                session.check_method(run.pruner)
            except MethodUnavailable as error:
                if len(runs) == 1:
                    raise
                run.error = error
                continue
            path = run.shards.path(rank.rank, rank.size)
            only = share - run.found.elsewhere(path)
            retried = failed_before(run.failures_file, task.questions)
            try:
                file = AnswerFile(path, task.questions, run.configuration, only, retried)
            except AnswerFileError as error:
                if len(runs) == 1:
                    raise
                run.error = error
                continue
            settings[run.name] = PassSetting(run.name, run.pruner, stack.enter_context(file))
        opened = [run for run in runs if run.name in settings]

        def note() -> None:
            for run in opened:
                setting = settings[run.name]
                _note_failures(task, run, share, setting.writer.missing, setting.failures)

        engine.after_group = _watch(session, task, len(share), note)
        try:
            engine.run(questions, list(settings.values()), progress, stats)
        except TooManyFailures:
            raise
        except Exception as error:  # a pruner, the device, a full disk: one setting at a time shows which
            if len(runs) == 1:
                raise
            reason = error or type(error).__name__
            print(f"{task.title}: {reason}; answering the settings one by one", file=sys.stderr)
            for run in opened:
                try:
                    engine.run(questions, [settings[run.name]], progress, stats)
                except TooManyFailures:
                    raise
                except Exception as own:
                    run.error = own
        finally:  # also of a run that is stopped
            note()
        session.images += stats.images
        session.seconds += stats.vision_seconds
        # If an earlier command encoded all images, this is the time for reading them.
        per_image = session.seconds / (session.images or stats.reused or 1)
        prefill = _prefill(engine, task)
        for run in (run for run in opened if run.error is None):
            setting = settings[run.name]
            setting.writer.finalize()
            run.prefill = prefill
            if (layers := engine.visual_per_layer.get(run.pruner)) is not None:
                run.prefill = {**prefill, "visual_per_layer": layers}
            run.add_cost(setting, stats, per_image * setting.images, len(runs) == 1)
    return {
        "images": stats.images,
        "reused": stats.reused,
        "seconds": stats.vision_seconds,
        "pass_seconds": stats.seconds,
    }


def _watch(
    session: Session, task: Task, asked: int, note: Callable[[], None]
) -> Callable[[InferenceStats], None]:
    """Return what the engine calls after each group: records new failures, and stops if they are too many.

    Args:
        asked: Number of questions that this process answers.
        note: Writes failures.jsonl.
    """
    noted, again = 0, 0.0

    def after_group(stats: InferenceStats) -> None:
        nonlocal noted, again
        if len(stats.failures) > noted and time.monotonic() >= again:
            note()
            noted, again = len(stats.failures), time.monotonic() + _RECORD_SECONDS
        session.check_failures(task, asked, stats.failures)

    return after_group


def _note_failures(
    task: Task, run: SettingRun, share: set[int], missing: Sequence[int], failures: Sequence[DataIssue]
) -> None:
    """Record what this process could not answer in the run, and in failures.jsonl beside its answers."""
    run.failed, open_ = list(missing), set(missing)
    places = {(one.file, one.line) for one in task.questions if one.index in open_} if failures else ()
    run.failures = [one for one in dict.fromkeys(failures) if (one.file, one.line) in places]
    answered = (run.found.keys() | share) - open_
    with run.shards.locked():
        update_failures(run.failures_file, task.questions, task.issues, answered, run.failures)


def answer_chunk(
    session: Session,
    task: Task,
    chunk: Sequence[Question],
    pruner: Any,
    path: Path,
    command: Sequence[str] = (),
) -> list[DataIssue]:
    """Answer a part of a question file into one answer file in question order, as LLaVA's question loops do.

    Args:
        command: Module and arguments that resume, for run.json.

    Returns:
        Lines and questions without an answer.

    Raises:
        AnswerFileError: The answer file is of another configuration or cannot be written.
        MethodUnavailable: The model does not have what the method reads, or cannot prune as it asks.
        ModelError: The model cannot be loaded.
        TooManyFailures: More questions failed than the session allows.
    """
    from llava.eval.inference.engine import InferenceStats, PassSetting

    check_inside(session.job, task, pruner)
    failed, record, stats = beside(path, FAILURES), beside(path, RUN), InferenceStats()
    configuration, line = with_batch_size(session.job, task, pruner, [pruner], record, [path])
    with AnswerFile(path, chunk, configuration, retried=failed_before(failed, chunk)) as file:

        def note() -> None:
            answered = {one.index for one in chunk} - set(file.missing)
            update_failures(failed, chunk, task.issues, answered, stats.failures)

        if command and (file.missing or not record.is_file()):
            record_of(task, configuration, command, len(chunk), path).write(record)
        try:
            if file.missing:
                session.check_failures(task, len(chunk))
                if line:
                    print(line, file=sys.stderr)
                engine = session.engine(task, configuration.batch_size)
                session.check_method(pruner)
                engine.after_group = _watch(session, task, len(chunk), note)
                engine.run(chunk, [PassSetting("run", pruner, file)], stats=stats)
        finally:
            note()
        file.finalize()
    return [*dict.fromkeys([*task.issues, *stats.failures])]


def record_start(task: Task, run: SettingRun, command: Sequence[str]) -> None:
    """Write run.json beside the answers, if this start has questions to answer or there is none."""
    path = run.folder / RUN
    if run.missing(task) or not path.is_file():
        record_of(task, run.configuration, command, len(task.asked), run.answers).write(path)


def record_of(
    task: Task, configuration: Configuration, command: Sequence[str], asked: int, answers: Path
) -> RunRecord:
    """Return the record of a start that asks so many questions of a task."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    variables = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    name = task.benchmark.name if task.benchmark is not None else None
    same = (configuration.hash(), configuration.flat(), now, os.path.abspath(answers))
    return RunRecord(list(command), variables, name, asked, len(task.issues), *same)


# -- several processes ----------------------------------------------------------------------------


def answer_share(session: Session, task: Task, runs: Sequence[SettingRun], rank: RankInfo) -> None:
    """Answer this process's share of the questions into its shard files, and leave a report beside each.

    Raises:
        ModelError, AnswerFileError, TooManyFailures: As `answer`.
    """
    for run in runs:
        run.shards.clear_report(rank.rank, rank.size)
    for size in dict.fromkeys(run.batch_size for run in runs):
        shares, whole_batches = processes.shard(task.asked, size, rank.size)
        share = shares[rank.rank]
        alike = [run for run in runs if run.batch_size == size]
        todo, cost = [run for run in alike if share - run.found.keys()], {}
        if todo:
            session.check_failures(task, len(task.asked))
            own = [question for question in task.asked if question.index in share]
            before = [shares[other] - run.found.keys() for other in rank.neighbors for run in todo]
            whole_batches |= session.job.temperature > 0  # draws depend on the batch
            questions = task.asked if whole_batches else own
            cost = _pass(session, task, todo, share, questions, rank, progress=not any(before))
        for run in alike:
            done = (run.generated, run.seconds, run.failures, run.failed, run.prefill, run.speed, cost)
            report = ShardReport(run.configuration.hash(), *done)
            if isinstance(run.error, MethodUnavailable):
                report.unavailable = str(run.error)
            if run.error is None or report.unavailable:
                run.shards.write_report(rank.rank, rank.size, report)


def start_processes(
    command: str, argv: Sequence[str], runs: Sequence[SettingRun], size: int, device: str
) -> list[str]:
    """Start `size` processes of a command that answer a share of these runs each, and wait.

    Args:
        command: Module that takes `--num-processes 1 --part` after `argv`, as llava.eval.run.

    Returns:
        One line per failed process.
    """
    for run in runs:
        for rank in range(size):
            run.shards.clear_report(rank, size)
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    gpus: list[str] = []
    if device == "cuda":
        import torch

        gpus = named or [str(number) for number in range(torch.cuda.device_count())]
    return processes.start(command, [*argv, "--num-processes", "1", "--part"], size, gpus)


def collect_reports(runs: Sequence[SettingRun], size: int) -> dict[str, Any]:
    """Take over and delete the reports of `size` processes.

    A setting that the model cannot run has its reason in `error` then.

    Returns:
        Cost of the pass as of `answer`: images and reused of all processes, seconds of the slowest one.
    """
    passes: dict[tuple[int, int], dict[str, Any]] = {}  # by rank and batch size
    for run in runs:
        reports = run.shards.reports(size)
        if any(report.asked for report in reports.values()):
            run.read_reports(list(reports.values()))
        for rank, report in reports.items():
            if report.unavailable:
                run.error = MethodUnavailable(report.unavailable)
            passes.setdefault((rank, run.batch_size), report.cost or {})
            run.shards.clear_report(rank, size)
    costs = [{name: 0 for name in cost} for cost in passes.values() if cost][:1]
    if not costs:
        return {}
    for name in costs[0]:
        of_rank = [
            sum(cost.get(name, 0) for (r, _), cost in passes.items() if r == rank) for rank in range(size)
        ]
        costs[0][name] = sum(of_rank) if name in ("images", "reused") else max(of_rank)
    return costs[0]


def merge(task: Task, run: SettingRun, size: int, rank: int | None = None) -> tuple[int, bool]:
    """Merge the shards if no question is open.

    Args:
        rank: This process among others; then only the last one merges, when all have left their reports.

    Returns:
        Number of open questions, and whether the merged file has been written now.
    """
    with run.shards.locked():
        # Reports first: a process writes its report after its last change to its shard, so the locations that
        # the scan finds stay valid.
        reports = run.shards.reports(size)
        found = run.shards.scan()
        given_up = {index for report in reports.values() for index in report.failed}
        missing = len({question.index for question in task.asked} - found.keys() - given_up)
        if missing or (rank is not None and len(reports) < size):
            return missing, False
        run.shards.merge(found)
        update_failures(run.failures_file, task.questions, task.issues, found, ())
        for one in reports:
            run.shards.clear_report(one, size)
    run.failures = [failure for one in sorted(reports) for failure in reports[one].failures]
    run.read_reports(list(reports.values()))
    return 0, True


# -- scores ---------------------------------------------------------------------------------------


def score(
    task: Task,
    run: SettingRun,
    fixed: bool = False,
    bootstrap_iters: int = 2000,
    seed: int = 0,
    extra: dict[str, Any] | None = None,
) -> ScoredSetting:
    """Score the answers of a setting and write score.json beside them.

    With --limit, only the answers to the first N questions count. A score.json of more answers is kept then.

    Args:
        fixed: Work around known bugs of the official rule.
        extra: Further entries of score.json.

    Raises:
        DataError: No answers, or answers that do not match the ground truth.
    """
    benchmark, folder = task.benchmark, task.folder
    if not run.answers.is_file():
        raise DataError(f"{task.title}: no question could be answered")
    rows = every = benchmark.read_answers(run.answers)
    if task.partial:
        asked = {question.index for question in task.asked}
        rows = [row for row in every if row["metadata"]["index"] in asked]
    result = benchmark.score(folder, rows, fixed=fixed)
    counts = interval = None
    try:
        used = benchmark.careful_answers(folder, rows) if fixed else rows
        counts = benchmark.per_image_counts(folder, used)
        interval = bootstrap_interval(counts, benchmark.score_counts, bootstrap_iters, seed)
    except DataError:
        if result.score is not None:
            raise
    rate = run.generated / run.seconds if run.generated and run.seconds else None
    if rate is None and run.card is not None:
        rate = run.card.questions_per_second
    card = Scorecard.of(
        result,
        rows,
        setting=run.name,
        ci_low=interval and interval[0],
        ci_high=interval and interval[1],
        questions=len(task.asked),
        limit=task.limit if task.partial else None,
        answers_file=str(run.answers),
        generated=run.generated,
        seconds=run.seconds,
        questions_per_second=rate,
        speed=run.speed,
        prefill=run.prefill,
        failures=[str(issue) for issue in dict.fromkeys([*task.issues, *run.failures])],
        extra=extra or {},
    )
    if run.prefill and card.visual_tokens is not None:
        card = card.replace(llm_gflops=_gflops(run.prefill, card.visual_tokens))
    if len(rows) == len(every) or not (run.folder / "score.json").is_file():
        card.write(run.folder)
    return ScoredSetting(run.name, card, counts)


def _gflops(prefill: dict[str, Any], visual: float) -> float:
    """Return GFLOPs of the prefill with a mean of `visual` visual tokens over layers and answers."""
    layers = prefill.get("visual_per_layer")
    if not layers:
        return llm_prefill_gflops(prefill["text_tokens"] + visual, prefill["shape"])
    share = visual * len(layers) / sum(layers)  # 1 unless prompts have no image, or images differ in size
    return llm_prefill_gflops([prefill["text_tokens"] + share * one for one in layers], prefill["shape"])


def _prefill(engine: Any, task: Task) -> dict[str, Any]:
    """Return what the FLOPs of the prefill follow from: shape and mean text tokens of a prompt."""
    sample = task.asked[:: max(1, len(task.asked) // _PROMPTS)]
    text = sum(sum(token >= 0 for token in engine.prompt_ids(question)) for question in sample) / len(sample)
    return {"text_tokens": text, "shape": list(astuple(LanguageShape.from_config(engine.model.config)))}

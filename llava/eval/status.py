"""Show every run below a folder: state, answered of asked questions, score, and the command that resumes it.

    python -m llava.eval.status outputs
    python -m llava.eval.status outputs --json

States: finished; failed questions (all were asked, some have no answer; the command asks them again);
interrupted (the command resumes); running; foreign answers (not made by this program, or of several
configurations); unreadable (or a question is answered twice); unknown (answers of an earlier version, which
did not record the number of questions). A run whose configuration differs from the others of its benchmark
and model, in more than the pruning, is marked. Reads runs, sweeps, shards of several processes and the files
of LLaVA's question loops; changes nothing and loads no model. The command resumes in the folder where the run
is now. Exit code 0, whatever the states; 1 if the folder cannot be read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llava.environment import PREFIX
from llava.eval import cli
from llava.eval.benchmarks import DataError
from llava.eval.metrics.scorecard import NAME, Scorecard
from llava.eval.store.answer_file import is_locked
from llava.eval.store.provenance import Configuration, compared
from llava.eval.store.run_record import FAILURES, RUN, RunRecord, beside, read_failures
from llava.eval.store.shards import ANSWERS, SHARD
from llava.paths import REPOSITORY
from llava.table import text_table

STATES = (
    *("finished", "failed questions", "interrupted", "running"),
    *("foreign answers", "unreadable", "unknown"),
)
# Quotes inside a JSON string are escaped, so that these match keys only.
_INDEX = re.compile(rb'"metadata": \{"index": (\d{1,9})[,}]')
_CONFIG = re.compile(rb'"config": "([^"\\]{1,64})"')
_PEEK = 1 << 20  # bytes of a first line by which an answer file is recognized
_OUTPUTS = ("--output", "--output-dir", "--answers-file")  # replaced: folders are renamed and moved
_NAMED = 3  # runs named with the command that resumes them
_MAX_SCORE = 1e6  # above the points of any benchmark
# What all settings of a benchmark and model share.
_SHARED = sorted({one.name for one in fields(Configuration)} - {"pruning", "model"})


@dataclass
class RunState:
    """What is known about one run: a folder with answers.jsonl and shards, or one answer file."""

    path: str
    state: str = "unknown"
    benchmark: str | None = None
    model: str | None = None
    method: str | None = None
    tokens: int | None = None
    important_ratio: float | None = None
    answered: int = 0
    asked: int | None = None
    failed: int = 0
    score: float | None = None
    differs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str | None = None
    configuration: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class AnswerScan:
    """The answers in the files of one run, as far as they can be told without their questions."""

    indices: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # by configuration
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the first answer of each
    foreign: list[str] = field(default_factory=list)  # first line of each file that is not ours
    twice: list[str] = field(default_factory=list)  # first line of each file that answers a question again
    is_complete: bool = True  # no file ends within a line, or is not in question order

    def read(self, path: Path) -> None:
        """Add the answers of a file. Raises OSError."""
        last, known, here = -1, set(), set()
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                index, config = _INDEX.search(raw), _CONFIG.search(raw)
                if not (index and config and raw.endswith(b"}\n") and config[1] in known):
                    facts = _metadata(raw)
                    if facts is None:
                        blank = not raw.strip(b"\0\r\n ")
                        if not raw.endswith(b"\n") or blank:  # killed while it was written, or a power cut
                            self.is_complete &= blank
                        elif not any(one.startswith(f"{path}:") for one in self.foreign):
                            self.foreign.append(f"{path}:{number}")
                        continue
                    place, name = facts["index"], facts["config"]
                    self.metadata.setdefault(name, facts)
                    known.add(name.encode("utf-8", "surrogatepass"))
                else:
                    place, name = int(index[1]), config[1].decode("utf-8", "surrogatepass")
                if (name, place) in here and not any(one.startswith(f"{path}:") for one in self.twice):
                    self.twice.append(f"{path}:{number}")
                here.add((name, place))
                self.is_complete &= place > last
                last = place
                self.indices[name].add(place)


def _metadata(raw: bytes) -> dict[str, Any] | None:
    """Return the metadata of an answer line of this program, else None."""
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    facts = row.get("metadata") if isinstance(row, dict) else None
    is_ours = isinstance(facts, dict) and "question_id" in row and "text" in row
    is_ours = is_ours and isinstance(facts.get("index"), int) and isinstance(facts.get("config"), str)
    return facts if is_ours else None


def find_runs(root: Path) -> Iterator[tuple[Path, list[Path], Path, Path]]:
    """Yield (name, answer files, run.json, failures.jsonl) of every run below a folder."""
    seen = set()

    def leave_out(error: OSError) -> None:
        cli.print_warnings([f"{error.filename}: left out ({error.strerror})"])

    for name, folders, files in os.walk(root, onerror=leave_out, followlinks=True):
        folder, folders[:] = Path(name), sorted(folders)
        try:
            place = os.stat(folder)
        except OSError as error:  # removed in the meantime
            leave_out(error)
            continue
        if (place.st_dev, place.st_ino) in seen:  # a circle of links
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        names = [one for one in sorted(files) if os.path.isfile(folder / one)]
        single = {f"{one.removesuffix(f'.{RUN}')}.jsonl" for one in names if one.endswith(f".{RUN}")}
        parts = [one for one in names if (one == ANSWERS or SHARD.match(one)) and one not in single]
        if parts or RUN in names:
            parts.sort(key=lambda one: one != ANSWERS)
            yield folder, [folder / one for one in parts], folder / RUN, folder / FAILURES
        for one in sorted(single | {one for one in names if one.endswith(".jsonl")} - {*parts}):
            path = folder / one
            if one in single or (not one.endswith(FAILURES) and _is_answer_file(path)):
                yield path, [path] if one in names else [], beside(path, RUN), beside(path, FAILURES)


def _is_answer_file(path: Path) -> bool:
    """Return True if the first line is an answer in LLaVA's format."""
    try:
        with path.open("rb") as file:
            row = json.loads(file.readline(_PEEK))
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(row, dict)
        and {"question_id", "text"} <= row.keys()
        and not {"answer_id", "metadata"}.isdisjoint(row)
    )


def state_of(name: Path, files: Sequence[Path], record_file: Path, failures_file: Path) -> RunState:
    """Return the state of one run, as `find_runs` yields it."""
    run, scan, record = RunState(str(name)), AnswerScan(), None
    try:
        if record_file.is_file():
            record = RunRecord.read(record_file)
    except DataError as error:
        run.notes.append(str(error))
    try:
        for path in files:
            scan.read(path)
        is_running = any(map(is_locked, files))
        failures = read_failures(failures_file)
    except OSError as error:
        run.state = "unreadable"
        run.notes.append(f"{error.filename or name}: cannot be read ({error.strerror})")
        return run
    counts = Counter({config: len(found) for config, found in scan.indices.items()})
    config = record.config if record is not None else next(iter(dict(counts.most_common(1))), None)
    found = scan.indices.get(config, set()) if config is not None else set()
    configuration = record.configuration if record is not None else scan.metadata.get(config, {})
    if configuration:
        run.configuration = {"compile": False, **compared(configuration)}
    _describe(run, record)
    card = _card(run, name, config) if name.is_dir() else None
    run.answered = len(found)
    run.failed = sum(one.index not in found for one in failures)
    if record is not None:
        run.asked = record.questions + record.unreadable
    elif card is not None and isinstance(card.questions, int):
        run.asked = card.questions
        run.failed = run.failed or max(0, run.asked - run.answered)
    others = sum(counts.values()) - counts[config]
    if others:
        run.notes.append(f"{others} answers of another configuration")
    run.notes += [f"{where}: not an answer of this program" for where in scan.foreign]
    run.notes += [f"{where}: a second answer to a question. Delete one of them" for where in scan.twice]
    is_merged = name.is_file() or name / ANSWERS in files
    if is_running:
        run.state = "running"
    elif others or scan.foreign:
        run.state = "foreign answers"
    elif scan.twice:  # a run refuses them
        run.state = "unreadable"
    elif run.asked is None:
        run.state = "unknown" if is_merged and scan.is_complete and found else "interrupted"
    elif run.answered >= run.asked and is_merged and scan.is_complete:
        run.state = "finished"
    elif run.failed and run.answered + run.failed >= run.asked:
        run.state = "failed questions"
    else:
        run.state = "interrupted"
    if run.state in ("interrupted", "failed questions"):
        run.command = _command(record, name)
        if run.command is None:
            why = "not recorded" if record is None else "of a sweep from whose folder this one was moved"
            run.notes.append(f"its command is {why}: run the original command again")
    return run


def _describe(run: RunState, record: RunRecord | None) -> None:
    """Fill in what the configuration says, where it has the expected type."""
    run.benchmark = record.benchmark if record is not None else None
    for name, kind in (("model", str), ("method", str), ("tokens", int), ("important_ratio", float | int)):
        value = run.configuration.get(name)
        if isinstance(value, kind):
            setattr(run, name, value)


def _card(run: RunState, folder: Path, config: str | None) -> Scorecard | None:
    """Return score.json if it belongs to the answers; note the score, or that of a server."""
    found = None
    for name in (NAME, "server.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            card = Scorecard.read(path)
        except (DataError, RecursionError) as error:
            run.notes.append(
                f"{path}: not a valid score" if isinstance(error, RecursionError) else str(error)
            )
            continue
        if name == NAME and card.config is not None and card.config != config:
            run.notes.append(f"{path}: the score of another configuration")
            continue
        found = found or (card if name == NAME else None)
        is_number = isinstance(card.score, int | float) and not isinstance(card.score, bool)
        if run.score is None and is_number and abs(card.score) < _MAX_SCORE:  # neither NaN nor infinite
            run.score = card.score
        if run.benchmark is None and isinstance(card.benchmark, str):
            run.benchmark = card.benchmark
    return found


# Commands whose option names the folder above BENCHMARK/SETTING, or above MODEL/BENCHMARK/SETTING
_ABOVE = {"llava.eval.sweep": 1, "llava.eval.native": 2}


def _command(record: RunRecord | None, name: Path) -> str | None:
    """Return the shell command of a record, for any working directory.

    Args:
        name: Folder or answer file of the run, where it is now.
    """
    if record is None or not record.command or not re.fullmatch(r"llava\.eval\.\w+", record.command[0]):
        return None
    output = Path(os.path.abspath(name))
    if record.command[0] in _ABOVE:
        if record.answers and Path(record.answers).parts[-3:-1] != output.parts[-2:]:
            return None
        output = output.parents[_ABOVE[record.command[0]]]
    command, option = [], "--output" if name.is_dir() else "--answers-file"
    for word in record.command:  # an option of paths and its value are two arguments, see `cli.command_of`
        if command and command[-1] in _OUTPUTS:
            command.pop()
        else:
            command.append(word)
    command += [option, str(output)]
    names = [name for name in sorted(record.environment) if re.fullmatch(PREFIX + r"[A-Z_]+", name)]
    variables = [f"{name}={shlex.quote(record.environment[name])}" for name in names]
    words = [*variables, shlex.join([sys.executable or "python", "-m", *command])]
    if (REPOSITORY / "pyproject.toml").is_file():
        # A clone. Python imports from the working directory first, and paths in the command are absolute.
        words = [f"(cd {shlex.quote(str(REPOSITORY))} &&", *words]
        return " ".join(words) + ")"
    return " ".join(words)


def mark_differences(runs: Sequence[RunState]) -> None:
    """Note in every run how its configuration differs from most others of its benchmark and model."""
    groups = defaultdict(list)
    for run in runs:
        if run.configuration:
            groups[run.benchmark or os.path.dirname(run.path), run.model].append(run)
    for group in groups.values():
        for name in _SHARED:
            known = [run for run in group if name in run.configuration]
            values = [json.dumps(run.configuration[name], sort_keys=True) for run in known]
            common = Counter(values).most_common(2)
            if len(common) < 2:
                continue
            is_tie = common[0][1] == common[1][1]
            for run, value in zip(known, values, strict=True):
                usual = common[1][0] if value == common[0][0] else common[0][0]
                if is_tie or value != common[0][0]:
                    run.differs.append(f"{name} is {value}, {usual} in other runs")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("status", __doc__)
    text = "folder of runs (default: outputs)"
    parser.add_argument("folder", nargs="?", type=cli.path_argument, default=Path("outputs"), help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not args.folder.is_dir():
        what = "not a folder" if args.folder.exists() else "no such folder"
        raise DataError(f"{args.folder}: {what}. Pass the folder of your runs, as --output-dir.")
    os.listdir(args.folder)  # one that cannot be read is an error, those below it are left out
    runs = [state_of(*one) for one in find_runs(args.folder)]
    mark_differences(runs)
    counts = Counter(run.state for run in runs)
    if args.json:
        documents = [
            {key: value for key, value in asdict(run).items() if key != "configuration"} for run in runs
        ]
        states = {state: counts[state] for state in STATES if counts[state]}
        print(json.dumps({"folder": str(args.folder), "states": states, "runs": documents}))
        return 0
    print(_text(args.folder, runs, counts).encode("utf-8", "backslashreplace").decode())
    return 0


def _text(folder: Path, runs: Sequence[RunState], counts: Counter[str]) -> str:
    """Return the table, and below it what to know and to do about single runs."""
    if not runs:
        return f"{folder}: no runs"
    rows, more, commands = [], [], defaultdict(list)
    for run in runs:
        path = os.path.relpath(run.path, folder)
        asked = "?" if run.asked is None else str(run.asked)
        score = "-" if run.score is None else f"{run.score:.2f}"
        rows.append([path, run.state, f"{run.answered} of {asked}", str(run.failed or "-"), score])
        lines = [f"  {note}" for note in (*run.notes, *run.differs)]
        more += ["", f"{path}: {run.state}", *lines] if lines else []
        if run.command:
            commands[run.command].append(path)
    for command, paths in commands.items():  # the settings of a sweep have one
        named = ", ".join(paths[:_NAMED]) + (f" and {len(paths) - _NAMED} more" * (len(paths) > _NAMED))
        more += ["", f"to resume {named}:", f"  {command}"]
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    table = text_table(["run", "state", "answered", "failed", "score"], rows)
    return "\n".join([table, *more, "", f"{len(runs)} runs: {states}"])


if __name__ == "__main__":
    sys.exit(main())

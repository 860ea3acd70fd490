"""Run everything that the paper reports, and write one report: outputs/paper/index.html.

    bash scripts/paper.sh [--quick] [--list]
    CKPT_DIR=checkpoints DATA_DIR=playground/data/eval bash scripts/paper.sh

Steps: a sweep of all methods over all benchmarks for every model, the tables of the paper, every script of
scripts/ablation and scripts/figures, and the questions that pruning changes. Without CKPT_DIR and DATA_DIR,
the bundled models and data are used, which are never compared with published numbers. With both, the
published checkpoints found there are evaluated with the paper's preset, and the report ends in a verdict on
every published number.

The command first prints what it will run, what is missing, and how long and how much disk that takes on this
machine, from a short timing of each model. --list stops there. A step whose inputs and code did not change
is skipped; rerunning the command after any interruption resumes. A step that fails does not stop the others
and is part of the report; the exit code is then 1. The last line of output is one JSON document.

A script of scripts/ablation or scripts/figures writes to $OUT_DIR/ablation/NAME or $OUT_DIR/figures/NAME, and
gets --limit N with --quick. The report shows its images (PNG, SVG, JPEG), Markdown (tables and paragraphs)
and CSV files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llava.eval import cli
from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.data import check
from llava.eval.jobs.job import setting_name
from llava.eval.jobs.steps import DONE, FAILED, MISSING, Step, StepRunner, commit, machine
from llava.eval.store.atomic import write_atomically
from llava.eval.sweep import grid
from llava.eval.tables.published import COLUMNS, PublishedTable, load_further, load_published
from llava.eval.tables.report import ReportSection, read_markdown, report_page
from llava.paths import BUNDLED_ANYRES_MODEL, BUNDLED_DATA, BUNDLED_MODEL, REPOSITORY, require_bundled
from llava.pruning import get_pruner, list_pruners
from llava.table import Table, TableCell, TableRow, text_table

PAPER = {"Zhang et al., arXiv:2412.01818": "https://arxiv.org/abs/2412.01818"}
BUDGETS, RATIOS = (128, 64, 32), (0.5, 0.0)
_FLIPPED = 64  # tokens: of the questions that pruning changes, and of a quick run
_ANYRES = ("pope", "gqa")  # benchmarks of the bundled model with crops, which take five times as long
_QUICK, _ANYRES_LIMIT, _TIMED = 36, 240, 48  # questions
_LOCAL = {"vqav2": "vqav2_val", "vizwiz": "vizwiz_val"}  # bundled sets are scored here
_TABLES = "all,fastervlm,others"
_IMAGES = 24  # of a step that the report shows
_LARGE_SVG = 1 << 20


@dataclass(frozen=True)
class PaperStep:
    """A step and what its duration follows from: a timing of its model, and the sizes of a sweep."""

    step: Step
    timing: Step | None = None
    images: int = 0
    questions: int = 0
    settings: int = 1


@dataclass(frozen=True)
class Setup:
    """Where everything is. `checkpoints` and `data` are None for the bundled ones."""

    output: Path
    quick: bool = False
    checkpoints: Path | None = None
    data: Path | None = None

    @property
    def limit(self) -> list[str]:
        return ["--limit", str(_QUICK)] if self.quick else []

    def module(self, *words: str | Path) -> tuple[str, ...]:
        """Return the command that runs a module of this repository."""
        return (sys.executable, str(REPOSITORY / "scripts" / "_launch.py"), *map(str, words))


def plan(setup: Setup) -> list[PaperStep]:
    """Return all steps in order. Raises DataError if there is nothing to evaluate."""
    sweeps = _published_sweeps(setup) if setup.checkpoints else _bundled_sweeps(setup)
    steps, inputs = list(sweeps), sweeps[0].step.inputs
    variables = {}
    if setup.checkpoints and setup.data:
        variables = {"CKPT_DIR": str(setup.checkpoints), "DATA_DIR": str(setup.data)}
        if inputs and inputs[0] != setup.checkpoints:  # the model of the first sweep
            variables["CKPT"] = inputs[0].name
    for kind in ("ablation", "figures"):
        for script in sorted((REPOSITORY / "scripts" / kind).glob("[!_]*.sh")):
            folder = setup.output / kind / script.stem
            environment = {**variables, "OUT_DIR": str(setup.output)}  # shared: answers, attention samples
            command = ("bash", str(script), *setup.limit)
            title = f"{kind.capitalize().rstrip('s')}: {script.stem}"
            step = Step(f"{kind}/{script.stem}", title, command, folder, inputs, environment=environment)
            steps.append(PaperStep(step))
    compared = [_selection(setup), _methods(setup, sweeps[0].step)]
    last = [*compared, _flips(setup, sweeps[0].step), _efficiency(setup), _tables(setup)]
    return [*steps, *map(PaperStep, last)]


def _bundled_sweeps(setup: Setup) -> list[PaperStep]:
    data = require_bundled(BUNDLED_DATA, "CKPT_DIR and DATA_DIR")
    names = [_LOCAL.get(name, name) for name in _columns(load_published()["llava-1.5-7b"])]
    crops = ["--limit", str(_QUICK if setup.quick else _ANYRES_LIMIT)]
    budgets = (_FLIPPED,) if setup.quick else BUDGETS
    every: dict[str, Any] = dict(methods=_ordered(list_pruners()), tokens=budgets, ratios=RATIOS)
    published = {row.method for row in load_published()["llava-next-7b"].rows}
    fewer = _ordered(published & set(list_pruners()) | {"fastervlm"})
    title = "All methods, budgets and benchmarks: bundled model"
    found = [_sweep(setup, "llava-tiny", title, BUNDLED_MODEL, data, names, setup.limit, every)]
    title = "Images in crops, as LLaVA-NeXT: bundled model"
    model = BUNDLED_ANYRES_MODEL
    some = _ANYRES[:1] if setup.quick else _ANYRES
    return [
        *found,
        _sweep(setup, "llava-tiny-anyres", title, model, data, some, crops, dict(every, methods=fewer)),
    ]


def _ordered(methods: Iterable[str]) -> list[str]:
    return sorted(methods, key=lambda name: (name != "none", name))  # tables start with all tokens


def _published_sweeps(setup: Setup) -> list[PaperStep]:
    """Return a sweep for every table of one model whose checkpoint is there; for others, what is missing."""
    found, with_all = [], set[Path]()
    tables = [load_published()[name] for name in ("llava-1.5-7b", "llava-next-7b")]
    tables += [table for name, table in load_further().items() if name.startswith("fastervlm-llava")]
    for table in tables:
        (model,) = table.models.values()
        folder, methods = _checkpoint(setup, model.checkpoints), {row.method for row in table.rows}
        of_paper = table.name in load_published()
        names = set(list_pruners()) if of_paper else methods & set(list_pruners())
        if folder in with_all:  # the table before has its scores with all tokens
            names.discard("none")
        budgets = {row.tokens // table.tokens_per_budget for row in table.rows if row.method != "none"} - {0}
        settings = dict(methods=_ordered(names), tokens=sorted(budgets, reverse=True), ratios=(0.5,))
        title = f"{table.title}: {', '.join(map(str, settings['tokens']))} tokens per crop"
        more = ["--preset", "published", *setup.limit]
        if folder and setup.data:
            with_all.add(folder)
            found.append(
                _sweep(setup, table.name, title, folder, setup.data, _columns(table), more, settings)
            )
        else:
            missing = f"no checkpoint {' or '.join(model.checkpoints)} in {setup.checkpoints}"
            found.append(_absent(setup, table.name, title, missing))
    if not with_all:
        known = dict.fromkeys(
            name for table in tables for m in table.models.values() for name in m.checkpoints
        )
        listed = ", ".join(known)
        raise DataError(
            f"{setup.checkpoints}: none of the published checkpoints is there ({listed}). Correct CKPT_DIR."
        )
    return sorted(found, key=lambda one: bool(one.step.missing))


def _absent(setup: Setup, name: str, title: str, missing: str) -> PaperStep:
    folder = setup.output / "scores" / name
    return PaperStep(Step(f"scores/{name}", title, (), folder, missing=missing))


def _columns(table: PublishedTable) -> list[str]:
    """Return the benchmarks of a table, each once."""
    return list(dict.fromkeys(name for key in table.scored if (name := COLUMNS[key].benchmark)))


def _checkpoint(setup: Setup, names: Sequence[str]) -> Path | None:
    root = setup.checkpoints or Path()
    folders = [root / name for name in names] + [root] * (root.name in names)
    return next((one for one in folders if (one / "config.json").is_file()), None)


def _sweep(
    setup: Setup,
    name: str,
    title: str,
    model: Path,
    data: Path,
    benchmarks: Sequence[str],
    more: Sequence[str],
    settings: dict[str, Any],
) -> PaperStep:
    """Return the sweep of one model over the benchmarks whose questions and images are there."""
    reports = {one: _report(one, data) for one in benchmarks}
    present = [one for one, report in reports.items() if _can_be_asked(report)]
    if not present:
        return _absent(setup, name, title, f"no data: python -m llava.eval.data check all --data {data}")
    lacking = [one for one in benchmarks if one not in present]
    title += f" (no data: {', '.join(lacking)})" * bool(lacking)
    words = [
        word
        for option in ("methods", "tokens", "ratios")
        for word in (f"--{option}", ",".join(map(str, settings[option])))
    ]
    common, folder = ["--model", model, "--data", data, *more], setup.output / "scores" / name
    command = setup.module("llava.eval.sweep", "--benchmarks", ",".join(present), *words, *common)
    command += ("--output", str(folder), "--report", str(folder / "tables"))
    files = [file.find(Path(reports[one]["folder"])) for one in present for file in get_benchmark(one).files]
    sums = data / "SHA256SUMS"  # of the bundled files
    known = [sums] if sums.is_file() else [file for file in files if file and file.is_file()]
    step = Step(f"scores/{name}", title, command, folder, (model, *known))
    first, where = "pope" if "pope" in present else present[0], setup.output / "timing" / model.name
    words = ["--methods", "none,vispruner", "--tokens", "64", "--ratios", "0.5"]
    command = setup.module("llava.eval.sweep", "--benchmarks", first, *words, *common)
    command += ("--limit", str(_TIMED), "--output", str(where))
    # Images that an earlier command encoded would take no time here, unlike those of the sweep.
    alone = {"VISPRUNER_VISION_CACHE": "0"}
    name, title = f"timing/{model.name}", f"timing of {model.name}"
    timing = Step(name, title, command, where, step.inputs, environment=alone)
    limit = int(more[more.index("--limit") + 1]) if "--limit" in more else None
    counts = [(reports[one]["questions"], reports[one]["images"]) for one in present]
    questions = sum(min(count, limit or count) for count, _ in counts)
    images = sum(min(count, limit or count) for _, count in counts)
    size = len(grid(settings["methods"], settings["tokens"], settings["ratios"], 0))
    return PaperStep(step, timing, images, questions, size)


@cache
def _report(benchmark: str, data: Path) -> dict[str, Any]:
    return check(get_benchmark(benchmark), data)


def _can_be_asked(report: dict[str, Any]) -> bool:
    return bool(report["questions"]) and not any(one["for"] == "ask" for one in report["missing"])


def _selection(setup: Setup) -> Step:
    folder = setup.output / "selection"
    words = ("llava.analysis.efficiency", "selection", "--device", "cpu", "--methods", "all")
    command = setup.module(*words, "--batch-sizes", "1", "--output", folder / "selection.json")
    command += ("--repeats", "3", "--tokens", str(_FLIPPED)) if setup.quick else ()
    return Step("selection", "Time of the selection of all methods", command, folder)


def _methods(setup: Setup, sweep: Step) -> Step:
    grid, times = sweep.folder / "tables" / "grid.csv", setup.output / "selection" / "selection.json"
    command = setup.module("llava.analysis.methods", "--grid", grid, "--selection", times)
    folder = setup.output / "methods"
    command += ("--output", str(folder), *(("--tokens", str(_FLIPPED)) if setup.quick else ()))
    return Step("methods", "All methods: score, tokens, cost", command, folder, (), (grid, times))


def _flips(setup: Setup, sweep: Step) -> Step:
    pruned = setting_name(get_pruner("vispruner", _FLIPPED, 0.5))
    answers = [sweep.folder / "pope" / name / "answers.jsonl" for name in ("none", pruned)]
    root = setup.data or BUNDLED_DATA
    pope, folder = get_benchmark("pope"), setup.output / "flips"
    questions = next((found for file in pope.files if (found := file.find(pope.locate(root)))), root)
    words = ("llava.analysis.overlay", "--question-file", questions, "--answers", *answers, "--only-flips")
    command = setup.module(*words, "--output", folder / "flips.png")
    title = f"Questions that pruning changes (POPE, {_FLIPPED} tokens)"
    return Step("flips", title, command, folder, (), tuple(answers))


def _efficiency(setup: Setup) -> Step:
    folder, script = (
        setup.output / "tables" / "efficiency",
        REPOSITORY / "scripts" / "tables" / "efficiency.sh",
    )
    command = ("bash", str(script), "--markdown", str(folder / "efficiency.md"))
    return Step(
        "tables/efficiency", "Efficiency on LLaVA-NeXT-7B", command, folder, (REPOSITORY / "outputs" / "gpu",)
    )


def _tables(setup: Setup) -> Step:
    folder, scores = setup.output / "tables" / "published", setup.output / "scores"
    command = setup.module("llava.eval.tables", "--table", _TABLES, "--results", scores)
    command += ("--output", str(folder), *(["--verdict"] if setup.checkpoints else []))
    return Step("tables/published", "Published tables, and what was measured", command, folder, (), (scores,))


def estimate(runner: StepRunner, one: PaperStep) -> tuple[float | None, float]:
    """Return seconds and bytes that a step will take; None if only a run can tell."""
    state, record = runner.state(one.step), runner.record(one.step)
    if state in (DONE, MISSING):
        return 0.0, 0.0
    if one.timing is None:
        return (record["seconds"] if record and record.get("state") == DONE else None), 0.0
    try:
        (table,) = runner.document(one.timing)["tables"]
        full, pruned = (cell["speed"]["own_seconds"] / cell["speed"]["generated"] for cell in table["cells"])
        encode = table["vision"]["seconds"] / table["vision"]["images"]
        sizes = [Path(cell["answers_file"]).stat().st_size / cell["answered"] for cell in table["cells"]]
    except (KeyError, ValueError, TypeError, ZeroDivisionError, OSError):
        return None, 0.0
    seconds = one.images * encode + one.questions * (full + (one.settings - 1) * pruned)
    return seconds, one.questions * one.settings * max(sizes)


def show_plan(runner: StepRunner, steps: Sequence[PaperStep], folder: Path) -> dict[str, Any]:
    """Time every model that has work to do, print the plan, and return it."""
    for one in steps:
        if one.timing and runner.state(one.step) != DONE and runner.state(one.timing) != DONE:
            print(f"{one.timing.title}: {_TIMED} questions", flush=True)
            shutil.rmtree(one.timing.folder, ignore_errors=True)  # a part of it would be no timing
            for line in runner.run(one.timing)["tail"]:
                print(f"    | {line}", file=sys.stderr)
    rows, lines, total, size = [], [], 0.0, 0.0
    for one in steps:
        state, (seconds, needed) = runner.state(one.step), estimate(runner, one)
        total, size = total + (seconds or 0), size + needed
        lines.append({"step": one.step.name, "state": state, "seconds": seconds, "bytes": round(needed)})
        lines[-1] |= {"missing": one.step.missing, "command": one.step.shown()}
        shown = "?" if seconds is None else f"{seconds / 60:.1f}" if seconds else ""
        texts = [one.step.name, state, shown, f"{needed / 1e6:.0f}" if needed else ""]
        rows.append([*texts, one.step.missing or one.step.title])
    free = shutil.disk_usage(folder).free
    print(text_table(["step", "state", "minutes", "MB", ""], rows))
    unknown = sum(line["seconds"] is None for line in lines)
    note = f", and {unknown} steps without an estimate before their first run" * bool(unknown)
    print(
        f"About {total / 60:.0f} minutes{note}; {size / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are free.\n",
        flush=True,
    )
    if size > free:
        raise DataError(
            f"{folder}: {size / 1e6:.0f} MB are needed and {free / 1e6:.0f} free. Choose another --output."
        )
    return {"plan": lines, "seconds": round(total), "bytes": round(size), "free": free}


def section_of(runner: StepRunner, step: Step) -> ReportSection:
    """Return what a step wrote as a section of the report, or why it has nothing."""
    state, record = runner.state(step), runner.record(step) or {"outputs": {}}
    why = step.missing or "; ".join(record.get("tail", [])[-3:]) or "not run yet"
    before = [] if state == DONE else [f"{state}: {why}"]
    there = [step.folder / name for name in record["outputs"] if state in (DONE, FAILED)]
    found = [path for path in there if path.is_file()]
    pages = [path for path in found if path.suffix == ".html"]
    written = [read_markdown(path) for path in found if path.suffix == ".md" and not pages]
    drawn: dict[Path, Path] = {}
    for path in found:
        if path.suffix in (".png", ".jpg") or (path.suffix == ".svg" and path.stat().st_size <= _LARGE_SVG):
            drawn[path.with_suffix("")] = path  # of PNG and SVG of one name the SVG, which is the later
    shown = list(drawn.values())[:_IMAGES]
    more = [f"{len(drawn) - len(shown)} further images in {step.folder}."] * (len(drawn) > len(shown))
    images = [(path, f"{step.title}: {path.stem}") for path in shown]
    data = [path for path in found if path.suffix == ".csv" and not pages]
    texts = [text for part in written for text in part.paragraphs]
    tables = [table for part in written for table in part.tables]
    fixed = [text for part in written for text in part.preformatted]
    return ReportSection(step.title, [*before, *texts, *more], tables, fixed, images, data, pages)


def write_report(setup: Setup, runner: StepRunner, steps: Sequence[PaperStep]) -> Path:
    """Write index.html from whatever steps have written so far; return its path."""
    rows = []
    for one in steps:
        record, state = runner.record(one.step) or {}, runner.state(one.step)
        texts = [one.step.name, state, f"{record['seconds']:.0f}" if "seconds" in record else ""]
        texts += [
            record.get("commit", ""),
            record.get("machine", ""),
            one.step.shown() if one.step.command else "",
        ]
        kind = "failed" if state in (FAILED, MISSING) else ""
        rows.append(TableRow([TableCell(text) for text in texts], kind))
    header = ["step", "state", "seconds", "commit", "machine", "command"]
    facts = Table("Steps", header, rows, kinds=["left", "left", "", "", "text", "text"])
    about = [
        f"Written on {time.strftime('%Y-%m-%d')} at commit {commit()}. This machine: {machine()}.",
    ]
    if setup.checkpoints is None:
        about.append(
            "The bundled models are small, see a synthetic dataset, and are not compared with the paper."
        )
    else:
        about.append("The verdict on every published number is in the section of the published tables.")
    if setup.quick:
        about.append("A quick run: the first questions of every benchmark, to see that everything works.")
    sections = [section_of(runner, one.step) for one in steps]
    last = ReportSection("What was measured on what", about, [facts])
    path = setup.output / "index.html"
    write_atomically(path, report_page("VisPruner: everything the paper reports", [*sections, last], PAPER))
    return path


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    parser = cli.new_parser("paper", __doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="print what would run, what is missing, and how long it takes")
    add("--quick", action="store_true", help=f"only the first {_QUICK} questions of every benchmark")
    add(
        "--output",
        type=cli.path_argument,
        metavar="DIR",
        help="folder to write to (default: outputs/paper, or outputs/paper-quick)",
    )
    add(
        "--checkpoints",
        type=cli.path_argument,
        metavar="DIR",
        help="folder of checkpoints (default: CKPT_DIR)",
    )
    add("--data", type=cli.path_argument, metavar="DIR", help="folder of all benchmarks (default: DATA_DIR)")
    return parser


def _setup(args: argparse.Namespace) -> Setup:
    given = {"CKPT_DIR": args.checkpoints, "DATA_DIR": args.data}
    places = {
        name: path or (Path(os.environ[name]) if os.environ.get(name) else None)
        for name, path in given.items()
    }
    if None in places.values() and any(places.values()):
        missing = next(name for name, path in places.items() if path is None)
        raise DataError(
            f"{missing}: not set. Published checkpoints need both CKPT_DIR and DATA_DIR; set or unset both."
        )
    for name, path in places.items():
        if path is not None and not path.is_dir():
            raise DataError(f"{name}: no such folder: {path}. Correct it, or unset CKPT_DIR and DATA_DIR.")
    output = args.output or Path("outputs", "paper-quick" if args.quick else "paper")
    known = {name: path and path.absolute() for name, path in places.items()}
    return Setup(output.absolute(), args.quick, known["CKPT_DIR"], known["DATA_DIR"])


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = build_parser().parse_args(argv)
    setup = _setup(args)
    if setup.checkpoints is None:
        cli.announce_bundled(True, True)
    steps, runner = plan(setup), StepRunner(setup.output / "steps")
    with runner.alone():
        document = show_plan(runner, steps, setup.output)
        if not args.list:
            document = run_steps(setup, runner, steps)
    print(json.dumps(document))
    return 1 if document.get("failed") else 0


def run_steps(setup: Setup, runner: StepRunner, steps: Sequence[PaperStep]) -> dict[str, Any]:
    """Run what is not done, write the report, and return the summary; also write it when interrupted."""
    start, ran = time.monotonic(), 0
    try:
        for number, one in enumerate(steps, 1):
            if runner.state(one.step) in (DONE, MISSING):
                continue
            print(f"[{number}/{len(steps)}] {one.step.name}: {one.step.shown()}", flush=True)
            record, ran = runner.run(one.step), ran + 1
            print(f"    {record['state']} in {record['seconds']:.0f} s", flush=True)
            for line in record["tail"]:
                print(f"    | {line}", file=sys.stderr)
    finally:
        report = write_report(setup, runner, steps)
        print(f"report: {report}", flush=True)
    states = {one.step.name: runner.state(one.step) for one in steps}
    verdict = runner.document(steps[-1].step).get("verdict", {}).get("counts") if setup.checkpoints else None
    if verdict:
        print("verdict: " + "; ".join(f"{status}: {count}" for status, count in verdict.items()), flush=True)
    summary = {"report": str(report), "steps": states, "ran": ran, "verdict": verdict}
    failed = [name for name, state in states.items() if state not in (DONE, MISSING)]
    return {**summary, "failed": failed, "seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    sys.exit(main())

"""Change one choice of VisPruner, keep everything else, and compare the scores.

    python -m llava.analysis.ablation ratio
    python -m llava.analysis.ablation cue --tokens 64,32 --benchmarks pope,gqa --output outputs/ablation

All values of an ablation are answered in one pass over the images. Answers are in OUTPUT/answers/MODEL, one
folder per benchmark and setting, which ablations share; rerunning a command skips finished settings and
resumes interrupted ones. Tables, CSV, plots and a page are in OUTPUT/NAME. Every value is compared with the
default, paired over the images. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava import argtypes, paths
from llava.analysis.ablation.agreement import (
    accuracy_where,
    changed_answers,
    images_of,
    kept_iou,
    kept_tokens,
)
from llava.analysis.ablation.definitions import ABLATIONS, Ablation
from llava.analysis.ablation.report import AblationReport, AblationRow
from llava.eval import cli
from llava.eval.benchmarks import benchmark_name, get_benchmark, list_benchmarks
from llava.eval.jobs.execute import SettingRun
from llava.eval.jobs.job import Job, Task, common_anyres, setting_name
from llava.eval.jobs.session import Session
from llava.eval.metrics.scorecard import ScoredSetting
from llava.eval.metrics.statistics import paired_bootstrap
from llava.eval.store.atomic import write_atomically
from llava.eval.store.run_record import FAILURES
from llava.eval.sweep import Failures, answer_task, find_benchmarks, read_tasks, score_task
from llava.mm_utils import is_anyres
from llava.model.checkpoint.config import stored_config

_CACHE_BYTES = 2 << 30  # of encoded images that several passes need
_Key = tuple[str, int]  # label and budget


def build_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m llava.analysis.ablation", description=__doc__, formatter_class=form
    )
    add = parser.add_argument
    listed = "; ".join(f"{name}: {one.title.lower()}" for name, one in ABLATIONS.items())
    add("ablation", choices=ABLATIONS, metavar="NAME", help=listed)
    defaults = "pope,gqa,vqav2_val; positions: pope,gqa,mme; ratio, crops, dtype: pope"
    known = f"comma-separated (default: {defaults}); choose from {', '.join(list_benchmarks())}"
    add("--benchmarks", type=argtypes.comma_separated(benchmark_name), help=known)
    budgets = "comma-separated visual tokens to keep per crop (default: 64,32)"
    add("--tokens", type=argtypes.comma_separated(argtypes.at_least(1)), default=[64, 32], help=budgets)
    cli.add_source_arguments(parser)
    folder = "outputs/ablation"
    text = f"folder to write to (default: {folder})"
    add("--output", type=cli.path_argument, default=Path(folder), metavar="DIR", help=text)
    add("--fixed", action="store_true", help="work around known bugs of the official scoring rules")
    cli.add_bootstrap_argument(parser)
    cli.add_model_arguments(parser)
    cli.add_inference_arguments(parser)
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    code, document = run(argv)
    print(json.dumps(document))
    return code


def run(argv: Sequence[str] | None = None) -> tuple[int, dict[str, Any]]:
    """Run or resume an ablation; return the exit code and the document of its last line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    ablation: Ablation = ABLATIONS[args.ablation]
    args.tokens = list(dict.fromkeys(args.tokens))
    if not args.tokens or args.benchmarks == []:
        parser.error("nothing to do: --tokens and --benchmarks must each name at least one")
    benchmarks = find_benchmarks(args, _benchmarks(args, ablation), parser)
    cli.announce_bundled(args.model is None, args.data is None)
    if args.limit is None and args.data is None and ablation.limit is not None:
        args.limit = ablation.limit
        print(f"The first {args.limit} questions are evaluated. Set --limit for more.")
    if args.model is None and ablation.crops:
        args.model = str(paths.BUNDLED_ANYRES_MODEL)
    model, failures = cli.model_folder(args, parser), Failures()
    try:
        config = stored_config(model, args.model_base)
        job = cli.job_of(args, model, config, common_anyres(config, args.anyres, args.preset))
        jobs = _jobs(args, ablation, job)
        pruners = {
            (label, tokens): ablation.pruner(label, tokens, args.seed)
            for label in ablation.values
            for tokens in args.tokens
        }
    except ValueError as error:
        parser.error(str(error))
    if ablation.crops and not is_anyres(config.get("image_aspect_ratio")):
        parser.error(
            f"--model {model}: its images are not cut into crops, so that both budgets are the same. Use a "
            "LLaVA-NeXT checkpoint."
        )
    cli.print_warnings(job.warnings)
    tasks = read_tasks(args, benchmarks, failures)
    command = cli.command_of(parser, args)
    found: dict[str, dict[_Key, tuple[SettingRun, ScoredSetting]]] = {
        task.benchmark.name: {} for task in tasks
    }
    kept: dict[tuple[str, str, int], Any] = {}
    several = len(tasks) > 1 or ablation.agreement  # passes over the same images
    for own, labels, folder in jobs:
        session = Session(own, _CACHE_BYTES if several else 0, args.max_failures)
        wanted = {key: pruner for key, pruner in pruners.items() if key[0] in labels}
        for task in tasks:
            done, _ = answer_task(
                folder, session, task, list(dict.fromkeys(wanted.values())), failures, command
            )
            runs = {run.name: run for run in done}
            scored = {one.name: one for one in score_task(args, task, done, failures) or ()}
            for key, pruner in wanted.items():
                name = setting_name(pruner)
                if name in scored:
                    found[task.benchmark.name][key] = (runs[name], scored[name])
            if ablation.agreement:
                here = [key for key in wanted if key in found[task.benchmark.name]]
                selected = kept_tokens(session, task, [found[task.benchmark.name][key][0] for key in here])
                kept |= {(task.benchmark.name, *key): one for key, one in zip(here, selected, strict=True)}
    rows = [row for task in tasks for row in _rows(args, ablation, task, found[task.benchmark.name], kept)]
    report = AblationReport(args.ablation, ablation, job.name, rows)
    written = _write(args.output / args.ablation, report)
    print(f"\n{report.text()}\n\nwritten: {', '.join(written)}")
    for name, reason in failures.unavailable.items():
        print(f"{name}: not available: {reason}")
    cli.report_issues(failures, "failures", str(args.output / "answers" / "..." / FAILURES))
    document = {
        "ablation": args.ablation,
        "model": job.name,
        "default": ablation.default,
        "rows": [row.document() for row in rows],
        "files": written,
        "unavailable": failures.unavailable,
        "failures": failures,
    }
    return (1 if failures or not rows else 0), document


def _benchmarks(args: argparse.Namespace, ablation: Ablation) -> list[str]:
    """Return the benchmarks that are asked for; of the default ones, those whose data are there."""
    if args.benchmarks is not None:
        return list(dict.fromkeys(args.benchmarks))
    if args.data is None:
        return list(ablation.benchmarks)
    there = [name for name in ablation.benchmarks if (one := get_benchmark(name)).owns(one.locate(args.data))]
    left_out = [name for name in ablation.benchmarks if name not in there]
    if there and left_out:
        print(f"{args.data}: no data of {', '.join(left_out)}, left out", flush=True)
    return there or list(ablation.benchmarks)


def _jobs(args: argparse.Namespace, ablation: Ablation, job: Job) -> list[tuple[Job, list[str], Path]]:
    """Return the job of every loaded model that the ablation needs, its labels, and the folder of answers.

    Raises:
        ValueError: An argument sets what the ablation changes.
    """
    found = []
    for options, labels in ablation.job_options().items():
        chosen, name = dict(options), job.name
        if chosen:
            if args.tower_dtype or job.preset == "published" or args.attn_implementation != "sdpa":
                raise ValueError(
                    f"{args.ablation}: sets tower dtype and kernel itself. Leave out --tower-dtype, "
                    "--attn-implementation and --preset published (VISPRUNER_PRESET)."
                )
            name = "-".join([name, *chosen.values()])
        found.append((replace(job, **chosen), labels, args.output / "answers" / name))
    return found


def _rows(
    args: argparse.Namespace,
    ablation: Ablation,
    task: Task,
    found: dict[_Key, tuple[SettingRun, ScoredSetting]],
    kept: dict[tuple[str, str, int], Any],
) -> Iterator[AblationRow]:
    """Yield the rows of one benchmark, by budget and value, with their differences to the default."""
    draws = args.bootstrap_iters, args.seed
    images = len(images_of(task))
    for tokens in args.tokens:
        default = found.get((ablation.default, tokens))
        for label in ablation.values:
            if (label, tokens) not in found:
                continue
            run, scored = found[label, tokens]
            is_compared = default is not None and label != ablation.default
            difference, extra = None, {}
            if is_compared and set(scored.counts.images) == set(default[1].counts.images):
                difference = paired_bootstrap(
                    scored.counts, default[1].counts, task.benchmark.score_counts, *draws
                )
            if ablation.agreement:
                extra = {"kept IoU": None, "changed": None}
            if ablation.where and (where := accuracy_where(task, run, *draws)) is not None:
                extra["where"] = where
            if ablation.agreement and is_compared:
                selected = [kept[task.benchmark.name, one, tokens] for one in (label, ablation.default)]
                extra["kept IoU"] = kept_iou(*selected, *draws)
                extra["changed"] = changed_answers(run.answers, default[0].answers, task, *draws)
            yield AblationRow(label, tokens, scored.card, images, difference, extra)


def _write(folder: Path, report: AblationReport) -> list[str]:
    """Write all files of a report that has rows; return their names."""
    if not report.rows:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = {str(folder / name): content for name, content in report.files().items()}
    for path, content in files.items():
        write_atomically(Path(path), content)
    return list(files)


if __name__ == "__main__":
    sys.exit(main())

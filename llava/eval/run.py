"""Ask one model all questions of one benchmark, score the answers, print the number.

    python -m llava.eval.run --benchmark pope --model CHECKPOINT --data playground/data/eval \\
        --tokens 64 --ratio 0.5 --method vispruner --output outputs/pope/llava-v1.5-7b/vispruner-64

Answers land in OUTPUT/answers.jsonl as they come, the score in OUTPUT/score.json; stopped at any instant,
the same command goes on, and a finished run is only scored again. Without --model or --data the embedded
ones serve. The last line of standard output is one JSON document. Exit code: 0 all answered, 1 something
could not be, 2 wrong arguments, 130 stopped.

Several processes: --processes N starts one per GPU here; torchrun, accelerate launch, mpirun and srun are
recognised by the environment; --num-chunks N --chunk-idx I says it by hand. Questions are dealt out by
picture, process I of N appends to OUTPUT/N_I.jsonl, and the one that finds all answered merges and scores.
What one that died has not asked is asked by the next start, with as many processes or another number.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava import argtypes, paths
from llava.eval import cli
from llava.eval.benchmarks import (
    Benchmark,
    DataIssue,
    Question,
    benchmark_name,
    get_benchmark,
    list_benchmarks,
)
from llava.eval.benchmarks.base import DataError
from llava.eval.jobs import processes as workers
from llava.eval.jobs.execute import Run, dispatch
from llava.eval.store.shards import Parts


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--benchmark", required=True, type=benchmark_name, choices=list_benchmarks())
    add_source_arguments(parser)
    group = parser.add_argument_group("pruning")
    group.add_argument("--method", help="pruning method (default vispruner, none without --tokens)")
    group.add_argument(
        "--tokens",
        type=argtypes.tokens,
        help="visual tokens to keep per crop; none (default): all of them; 0: blind",
    )
    group.add_argument("--ratio", type=argtypes.ratio, help="share of important tokens (default 0.5)")
    parser.add_argument("--output", type=Path, help="folder; default OUTPUT_DIR/BENCHMARK/MODEL/SETTING")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="default %(default)s")
    parser.add_argument("--submit", action="store_true", help="write the file for its server, too")
    group = parser.add_argument_group("several processes")
    group.add_argument("--processes", type=argtypes.at_least(1), default=1, help="start so many, a GPU each")
    group.add_argument("--num-chunks", type=argtypes.at_least(1), default=1)
    group.add_argument("--chunk-idx", type=argtypes.at_least(0), default=0)
    group.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # one that --processes started
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument("--fixed", action="store_true", help="mend plain bugs of the official scoring rule")
    rule.add_argument("--strict", dest="fixed", action="store_false", help="the official rule (default)")
    parser.set_defaults(fixed=False)
    cli.add_model_arguments(parser)
    cli.add_asking_arguments(parser)
    return parser


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """What is asked of whom; shared with the sweep."""
    parser.add_argument("--model", help="checkpoint folder; default: the embedded one")
    parser.add_argument("--model-base", help="base checkpoint, for LoRA or projector-only folders")
    parser.add_argument("--data", type=Path, help="the benchmark's own folder; default: the embedded one")
    parser.add_argument("--limit", type=argtypes.at_least(1), help="only the first so many questions")
    parser.add_argument("--max-new-tokens", type=argtypes.at_least(1), help="default: the benchmark's own")


def read_benchmark(
    benchmark: Benchmark, data: Path | None, limit: int | None, quiet: bool = False
) -> tuple[Path, list[Question], list[DataIssue]]:
    """(folder, questions, malformed lines), with warnings printed unless `quiet`; raises DataError."""
    if benchmark.media != "image":
        raise DataError(
            f"{benchmark.title} asks about videos, and no model here takes any; answers made "
            "elsewhere are scored by python -m llava.eval.score"
        )
    given = paths.BUNDLED_DATA / benchmark.folder if data is None else data.expanduser()
    if data is None and not benchmark.owns(given):
        raise DataError(
            f"there is no embedded {benchmark.title} ({given} lacks {benchmark.marker}); give "
            "--data (DATA_DIR)"
        )
    folder = benchmark.locate(given)
    if (
        not benchmark.owns(folder)
        and not folder.joinpath(benchmark.folder).is_dir()
        and folder.name not in (benchmark.folder, *benchmark.other_folders)
    ):
        raise DataError(
            f"{folder}: holds neither {benchmark.marker} nor a folder {benchmark.folder} with "
            f"it; python -m llava.eval.data check {benchmark.name} says what is needed"
        )
    problems: list[DataIssue] = []
    questions = list(benchmark.questions(folder, problems))[:limit]
    if not questions:
        cli.report_problems(problems)
    for warning in benchmark.check(folder, questions):
        if not quiet:
            print(f"warning: {warning}", file=sys.stderr)
    return folder, questions, problems


def setting_name(pruner: Any) -> str:
    """A pruner's settings as a file name and row label: none, random-64, vispruner-r0.5-64."""
    settings = pruner.config()
    settings.pop("seed", None)
    method, budget = settings.pop("method"), settings.pop("tokens")
    share = settings.pop("important_ratio", None)
    parts = [
        method,
        f"r{share:g}" if share is not None else None,
        *(f"{k}={v}" for k, v in settings.items()),
        str(budget) if budget is not None else None,
    ]
    return "-".join(part for part in parts if part)


def fixed_for_part(args: argparse.Namespace, quiet: bool = False) -> bool:
    """--fixed, also for a part of the questions: official rules are about whole sets."""
    if args.limit and not args.fixed and not quiet:
        print(f"scored as with --fixed, as only {args.limit} questions were to be asked")
    return args.fixed or args.limit is not None


def prepare(argv: list[str]) -> Run:
    """Check the arguments, read the questions and decide everything that decides an answer."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.part:
        workers.end_with_parent()
    place = _place(args, parser)
    benchmark = get_benchmark(args.benchmark)
    quiet = args.part or place.rank > 0
    if not quiet:
        cli.announce_embedded(cli.is_embedded(args.model), args.data is None)
    model = cli.model_folder(args, parser)
    folder, questions, problems = read_benchmark(benchmark, args.data, args.limit, quiet)
    try:
        pruner = cli.resolve_pruner(args, args.method, args.tokens, args.ratio, model)
        cli.resolve_device(args, model, place.local_rank if place.size > 1 else None)
        cli.check_conv_mode(args.conv_mode)
    except ValueError as error:
        parser.error(str(error))
    if args.processes > 1 and ":" in args.device:
        parser.error(
            f"--device {args.device} is one GPU for {args.processes} processes; name several in "
            "CUDA_VISIBLE_DEVICES"
        )
    args.max_new_tokens = args.max_new_tokens or benchmark.max_new_tokens
    made_by = cli.configuration(args, model, questions, pruner, args.max_new_tokens)
    output = args.output or args.output_dir / benchmark.name / made_by.model / setting_name(pruner)
    parts = Parts(output.expanduser(), questions, made_by)
    return Run(
        args,
        argv,
        place,
        benchmark,
        folder,
        model,
        questions,
        problems,
        pruner,
        made_by,
        parts,
        fixed_for_part(args, quiet),
    )


def _place(args: argparse.Namespace, parser: argparse.ArgumentParser) -> workers.World:
    """This process among others: by --num-chunks and --chunk-idx, or as a launcher says."""
    if args.chunk_idx >= args.num_chunks:
        parser.error(f"--chunk-idx {args.chunk_idx}: chunks are numbered 0 to {args.num_chunks - 1}")
    try:
        place = workers.world(os.environ)
    except ValueError as error:
        parser.error(str(error))
    if args.num_chunks > 1:
        place = workers.World(args.chunk_idx, args.num_chunks)
    if place.size > 1 and args.processes > 1:
        parser.error(f"--processes {args.processes}, but this is one of {place.size} processes already")
    return place


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    run = prepare(list(sys.argv[1:] if argv is None else argv))
    size = max(run.args.processes, run.place.size)
    run.say(
        f"{run.benchmark.title}: {len(run.questions)} questions, {run.made_by.model}, "
        f"{setting_name(run.pruner)}, {run.args.dtype} on {run.args.device.split(':')[0]}"
        + (f", {size} processes" if size > 1 else "")
    )
    return dispatch(run)


if __name__ == "__main__":
    sys.exit(main())

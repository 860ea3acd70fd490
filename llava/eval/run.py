"""Ask one model all questions of one benchmark, score the answers, print the number.

    python -m llava.eval.run --benchmark pope --model CHECKPOINT --data playground/data/eval/pope \\
        --tokens 64 --ratio 0.5 --method vispruner --output outputs/pope/llava-v1.5-7b/vispruner-64

Answers land in OUTPUT/answers.jsonl as they come, the score in OUTPUT/score.json; stopped at any instant,
the same command goes on, and a finished run is only scored again. With --num-chunks N --chunk-idx I the
answers of that contiguous part go to OUTPUT/N_I.jsonl, and the process that finds all parts complete merges
them. Without --model or --data the embedded ones serve. The last line of standard output is one JSON
document. Exit code: 0 all answered, 1 something could not be, 2 wrong arguments, 130 stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava import arguments
from llava.eval import cli
from llava.eval.answers import AnswerFile
from llava.eval.benchmarks import (
    Benchmark,
    Problem,
    Question,
    benchmark_name,
    get_benchmark,
    list_benchmarks,
)
from llava.eval.benchmarks.base import DataError
from llava.eval.parts import merge_parts, write_atomically
from llava.eval.score import print_score


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", required=True, type=benchmark_name, choices=list_benchmarks())
    add_source_arguments(parser)
    group = parser.add_argument_group("pruning")
    group.add_argument("--method", help="pruning method (default vispruner, none without --tokens)")
    group.add_argument("--tokens", type=arguments.tokens,
                       help="visual tokens to keep per crop; none (default): all of them; 0: blind")
    group.add_argument("--ratio", type=arguments.ratio, help="share of important tokens (default 0.5)")
    parser.add_argument("--output", type=Path, help="folder; default outputs/BENCHMARK/MODEL/SETTING")
    parser.add_argument("--num-chunks", type=arguments.at_least(1), default=1)
    parser.add_argument("--chunk-idx", type=arguments.at_least(0), default=0)
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
    parser.add_argument("--limit", type=arguments.at_least(1), help="only the first so many questions")
    parser.add_argument("--max-new-tokens", type=arguments.at_least(1), help="default: the benchmark's own")


def read_benchmark(
    benchmark: Benchmark, data: Path | None, limit: int | None
) -> tuple[Path, list[Question], list[Problem]]:
    """(folder, questions, malformed lines), with warnings printed; raises DataError."""
    if benchmark.media != "image":
        raise DataError(f"{benchmark.title} asks about videos, and no model here takes any; answers made "
                        "elsewhere are scored by python -m llava.eval.score")
    given = arguments.EMBEDDED_DATA / benchmark.folder if data is None else data.expanduser()
    folder = benchmark.locate(given)
    problems: list[Problem] = []
    questions = list(benchmark.questions(folder, problems))[:limit]
    if not questions:
        cli.report_problems(problems)
    for warning in benchmark.check(folder, questions):
        print(f"warning: {warning}", file=sys.stderr)
    return folder, questions, problems


def setting_name(pruner: Any) -> str:
    """A pruner's settings as a file name and row label: none, random-64, vispruner-r0.5-64."""
    settings = pruner.config()
    settings.pop("seed", None)
    method, budget = settings.pop("method"), settings.pop("tokens")
    share = settings.pop("important_ratio", None)
    parts = [method, f"r{share:g}" if share is not None else None, *(f"{k}={v}" for k, v in settings.items()),
             str(budget) if budget is not None else None]
    return "-".join(part for part in parts if part)


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.chunk_idx >= args.num_chunks:
        parser.error(f"--chunk-idx {args.chunk_idx}: chunks are numbered 0 to {args.num_chunks - 1}")
    benchmark = get_benchmark(args.benchmark)
    cli.announce_embedded(args.model is None, args.data is None)
    model = cli.model_folder(args, parser)
    folder, questions, problems = read_benchmark(benchmark, args.data, args.limit)
    try:
        pruner = cli.resolve_pruner(args, args.method, args.tokens, args.ratio, model)
        cli.resolve_device(args, model)
        cli.check_conv_mode(args.conv_mode)
    except ValueError as error:
        parser.error(str(error))
    max_new_tokens = args.max_new_tokens or benchmark.max_new_tokens
    made_by = cli.configuration(args, model, questions, pruner, max_new_tokens)
    output = args.output or Path("outputs", benchmark.name, made_by.model, setting_name(pruner))

    print(f"{benchmark.title}: {len(questions)} questions, {made_by.model}, {setting_name(pruner)}, "
          f"{args.dtype} on {args.device}", flush=True)
    parts = [output / f"{args.num_chunks}_{index}.jsonl" for index in range(args.num_chunks)]
    mine = cli.chunk(questions, args.num_chunks, args.chunk_idx)
    answers = output / "answers.jsonl"
    path = answers if args.num_chunks == 1 else parts[args.chunk_idx]
    cost: dict[str, Any] = {"asked": 0, "seconds": 0.0}
    with AnswerFile(path, mine, made_by, made_by.model) as file:
        if file.missing:
            if file.answered:
                print(f"going on: {file.answered} of {len(mine)} questions are answered already", flush=True)
            engine = cli.build_engine(args, cli.load(args, model), max_new_tokens, benchmark.load_image)
            from llava.eval.engine import Setting

            report = engine.run(mine, [Setting("run", pruner, file)])
            cost = {"asked": report.asked, "seconds": report.seconds}
            problems += report.failures
        else:
            print("every question is answered already", flush=True)
        file.finalise()
    cli.report_problems(problems)

    if args.num_chunks > 1:
        where = {index: part for part in range(args.num_chunks)
                 for index in [q.index for q in cli.chunk(questions, args.num_chunks, part)]}
        whole = merge_parts(parts, answers, made_by, {q.index: parts[where[q.index]] for q in questions})
        if not whole:
            print(f"chunk {args.chunk_idx} of {args.num_chunks} is done; the score comes with the last one")
            print(json.dumps({"benchmark": benchmark.name, "score": None, "chunk": args.chunk_idx,
                              "answers": str(parts[args.chunk_idx]), **cost}))
            return 1 if problems else 0
    fixed = fixed_for_part(args)
    return finish(benchmark, folder, answers, len(questions), problems, cost, fixed)


def fixed_for_part(args: argparse.Namespace) -> bool:
    """--fixed, also for a part of the questions: official rules are about whole sets."""
    if args.limit and not args.fixed:
        print(f"scored as with --fixed, as only {args.limit} questions were to be asked")
    return args.fixed or args.limit is not None


def finish(
    benchmark: Benchmark, folder: Path, answers: Path, asked: int, problems: Sequence[Problem],
    cost: dict[str, Any], fixed: bool,
) -> int:
    """Score a finished answer file, print table and JSON, keep the JSON beside the answers; the exit code."""
    if not answers.exists():
        print("error: no question could be answered", file=sys.stderr)
        return 1
    rows = benchmark.read_answers(answers)
    score = benchmark.score(folder, rows, fixed=fixed)
    metadata = rows[0]["metadata"]
    visual = sum(row["metadata"]["visual_tokens"] for row in rows) / len(rows)
    print_score(score)
    rate = cost["asked"] / cost["seconds"] if cost["asked"] else _earlier_rate(answers, metadata["config"])
    print(cli.table(
        ["method", "r", "tokens", benchmark.metric, "real tokens", "answered", "q/s"],
        [[metadata["method"], cli.cell(metadata.get("important_ratio"), "g"),
          "all" if metadata["tokens"] is None else str(metadata["tokens"]),
          cli.cell(score.score, ".2f"), f"{visual:.1f}", f"{len(rows)}/{asked}", cli.cell(rate, ".1f")]]))
    document = {**score.document(), "method": metadata["method"], "tokens": metadata["tokens"],
                "important_ratio": metadata.get("important_ratio"), "visual_tokens": visual,
                "model": metadata["model"], "answered": len(rows), "questions": asked,
                "failures": [str(problem) for problem in problems], **cost, "questions_per_second": rate,
                "answers": str(answers), "config": metadata["config"]}
    write_atomically(answers.with_name("score.json"), json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return 1 if problems else 0


def _earlier_rate(answers: Path, config: str) -> float | None:
    """Questions/s of the run that made these answers, if it left its score beside them."""
    try:
        document = json.loads(answers.with_name("score.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document.get("questions_per_second") if document.get("config") == config else None


if __name__ == "__main__":
    sys.exit(main())

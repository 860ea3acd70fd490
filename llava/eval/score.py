"""Score an answer file of any origin in LLaVA's format.

    python -m llava.eval.score --benchmark pope --data playground/data/eval/pope --answers answers.jsonl

Prints the details and, as the last line of standard output, {"benchmark", "score", "details"}. The score
reproduces the official scorer, including its bugs; warnings (on standard error and in the details) report
where a bug applies, and `--fixed` works around it. Loads no model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.eval.benchmarks import Score, benchmark_name, get_benchmark, list_benchmarks
from llava.eval.cli import guarded


def answer_parser(
    command: str, description: str, benchmarks: Sequence[str], needs_answers: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with the arguments that the commands about answer files share."""
    parser = argparse.ArgumentParser(
        f"python -m llava.eval.{command}",
        None,
        description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--benchmark", required=True, type=benchmark_name, choices=benchmarks, help="benchmark of the answers"
    )
    default = "" if needs_answers else " (default: found by the setting)"
    add("--answers", required=needs_answers, type=Path, help=f"answer file of the benchmark{default}")
    return parser


def build_parser() -> argparse.ArgumentParser:
    parser = answer_parser("score", __doc__, list_benchmarks())
    parser.add_argument("--data", required=True, type=Path, help="folder of the benchmark")
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument("--strict", dest="fixed", action="store_false", help="use the official rule (default)")
    rule.add_argument("--fixed", action="store_true", help="work around known bugs of the official rule")
    parser.set_defaults(fixed=False)
    return parser


def print_score(score: Score) -> None:
    """Print the details to standard output and the warnings to standard error."""
    for name, value in score.details.items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {_short(part)}" for key, part in value.items())
        print(f"{name:<12} {_short(value)}")
    for warning in score.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _short(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    benchmark = get_benchmark(args.benchmark)
    data, answers = benchmark.locate(args.data.expanduser()), benchmark.read_answers(args.answers)
    score = benchmark.score(data, answers, fixed=args.fixed)
    print_score(score)
    print(json.dumps(score.document()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
